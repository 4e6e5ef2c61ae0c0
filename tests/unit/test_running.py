"""Which cells of a plan are finished before a run starts; how a run goes on is in `tests/test_cli.py`."""

import json

import pytest
from test_results import failed, row

from hgrn2_bench.plan import make_plan
from hgrn2_bench.running import Run, one_of_each


class NoWorkers:
    """An executor that nothing asks."""

    count = 1


def run(results, *kept, force=False):
    plan = make_plan(["suite=mqar", "preset=test", "model=attention", "seed=0,1"], "cpu")
    (results / "rows").mkdir(exist_ok=True)
    lines = [json.dumps(json.loads(each.to_json()) | {"cell": cell.key}) for each, cell in zip(kept, plan.cells, strict=False)]
    (results / "rows/kept.jsonl").write_text("\n".join(lines))
    return Run(plan, NoWorkers(), results, force)


def test_rows_kept_in_the_folder_are_finished_unless_forced(tmp_path):
    made = run(tmp_path, row())
    assert [cell.seed for cell in made.todo] == [cell.seed for cell in made.required] == [1]
    assert [each.value for each in made.rows] == [row().value]
    assert [cell.seed for cell in run(tmp_path, row(), force=True).todo] == [0, 1]


@pytest.mark.parametrize(("status", "again"), [("failed", True), ("oom", True), ("timeout", True), ("diverged", False)])
def test_kept_rows_of_a_cell_that_may_yet_end_well_are_not(tmp_path, status, again):
    assert (0 in [cell.seed for cell in run(tmp_path, failed(status, "why")).todo]) == again


def test_a_timed_model_is_built_once_before_the_run_whatever_its_sizes():
    words = ["suite=throughput", "preset=test", "model=hgrn2,gla", "seq_len=32,64", "seed=0,1", "hgrn2.expand_ratio=8,16"]
    cells = make_plan(words, "cpu").cells
    assert len(cells) == 7 * 2 * 2 * 3
    assert [(cell.model, cell.settings.get("expand_ratio")) for cell in one_of_each(cells)] == [("hgrn2", 8), ("hgrn2", 16), ("gla", None)]
