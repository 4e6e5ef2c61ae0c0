"""One contract for every registered suite, run with its preset `test`: plan, data, training or timing, rows, table."""

import dataclasses
import json
import time

import pytest
import torch

from hgrn2_bench import engine, provenance, registry
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.plan import make_plan, sections
from hgrn2_bench.render import render
from hgrn2_bench.results import Row, parse_row
from hgrn2_bench.tables import make_tables

SUITES = sorted(registry.suites())
TIMED = [name for name in SUITES if registry.protocol(name).speed]
TRAINED = [name for name in SUITES if name not in TIMED]


def plan_of(suite, *words):
    return make_plan([f"suite={suite}", "preset=test", *words], "cpu")


def run(cell, folder):
    made = CellFolder(folder, cell)
    with made.lock():
        return engine.run_cell(cell, made, lambda *_: None, lambda: False)


@pytest.mark.parametrize("suite", SUITES)
def test_protocol_is_complete(suite):
    protocol = registry.protocol(suite)
    assert {"test", "smoke", "paper"} <= set(protocol.presets)
    assert registry.suite_summary(suite)
    for preset in protocol.presets.values():
        assert preset.summary
        assert preset.source
        assert preset.tasks
    for name in ("test", "smoke", "paper"):
        assert make_plan([f"suite={suite}", f"preset={name}"], "cpu", files=False).cells


@pytest.mark.parametrize("suite", SUITES)
def test_figures_name_what_rows_have(suite):
    protocol = registry.protocol(suite)
    keys = {field.name for schema in sections(protocol).values() for field in dataclasses.fields(schema)}
    own = {field.name for model in registry.models().values() for field in dataclasses.fields(model.settings)}
    assert len({figure.name for figure in protocol.figures}) == len(protocol.figures)
    for figure in protocol.figures:
        settings = keys | {
            f"{name}.{field.name}" for name, model in registry.models().items() for field in dataclasses.fields(model.settings)
        }
        assert figure.splits or figure.x in settings | {field.name for field in dataclasses.fields(Row)}
        assert not figure.splits or any(split.startswith("test") for split in figure.splits)
        assert figure.rows in keys | {""}
        assert set(figure.joined) <= keys | own


@pytest.mark.parametrize("suite", TRAINED)
def test_preset_test_runs_every_model_and_its_rows_make_a_table(suite, tmp_path):
    began = time.perf_counter()
    deeper = [f"{name}.num_layers=2" for name, model in registry.models().items() if "parts" in model.facts]  # one layer for each part
    plan = plan_of(suite, f"model={','.join(registry.models())}", *deeper)
    rows = [row for cell in plan.cells for row in run(cell, tmp_path)]
    assert time.perf_counter() - began < 30  # 15 s on one core, with slack for a busy machine
    assert {row.status for row in rows} == {"ok"}, [row.reason for row in rows]
    assert {row.model for row in rows} == set(registry.models())
    assert {"validation", "test"} <= {row.split for row in rows}
    for row in rows:
        assert parse_row(row.to_json()) == row
        assert row.command.startswith("python -m hgrn2_bench run ")
        assert min(row.parameters, row.train_flops_per_token, row.steps, row.tokens, row.num_items) > 0
        assert row.peak_bytes is None  # only a GPU's allocator knows
        causal = row.settings["scan"] == "causal"
        assert row.effective["causal"] is causal
        assert row.state_bytes > 0 if causal else row.state_bytes is None
        assert row.data_hash
        assert row.weights_hash
        assert {"kernel", "positions", "local_mixing", "median_decay_at_init", "state_dtype"} <= set(row.effective)
    for seed in {row.seed for row in rows}:
        assert len({(row.task, row.data_hash) for row in rows if row.seed == seed}) == len({row.task for row in rows})
    tables, (setting, tasks) = make_tables(rows, registry.protocol(suite)), registry.protocol(suite).averaged
    averaged = len({row.settings[setting] for row in rows if setting} & set(tasks)) > 1
    assert len(tables) == len({row.task for row in rows}) + averaged
    for form in ("md", "csv", "latex", "html"):
        assert render(tables[0], form)


@pytest.mark.parametrize("suite", TRAINED)
def test_same_cell_twice_gives_the_same_rows(suite, tmp_path):
    cell = plan_of(suite, "model=hgrn2").cells[0]
    first, second = run(cell, tmp_path / "a"), run(cell, tmp_path / "b")
    for one, other in zip(first, second, strict=True):
        kept = [{k: v for k, v in json.loads(row.to_json()).items() if k not in Row.VOLATILE} for row in (one, other)]
        assert kept[0] == kept[1]


@pytest.mark.parametrize("suite", TRAINED)
def test_another_seed_gives_other_weights(suite, tmp_path):
    rows = [run(cell, tmp_path)[0] for cell in plan_of(suite, "model=hgrn2", "seed=1,2").cells]
    assert rows[0].weights_hash != rows[1].weights_hash


@pytest.mark.parametrize("suite", SUITES)
def test_runner_leaves_global_random_state_alone(suite):
    cell = plan_of(suite, "model=hgrn2").cells[0]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    engine.runner_class(cell)(cell)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("suite", TRAINED)
def test_batches_are_a_function_of_the_step_alone(suite):
    cell = plan_of(suite, "model=hgrn2").cells[0]
    model = engine.build(cell).eval()
    one, other = engine.runner_class(cell)(cell), engine.runner_class(cell)(cell)
    for step in (3, 0, 1):
        later = one.loss(model, one.batch(step))
    assert torch.equal(later, other.loss(model, other.batch(1)))
    for mine, theirs in zip(one.batch(1), other.batch(1), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("suite", TRAINED)
def test_description_agrees_with_the_rows(suite, tmp_path):
    cell = plan_of(suite, "model=hgrn2").cells[0]
    described = engine.describe(cell, engine.build(cell), probe=True)
    row = run(cell, tmp_path)[0]
    assert described.seconds > 0
    assert described.parameters == row.parameters
    assert described.state_bytes == row.state_bytes
    assert (described.steps, described.tokens) == (row.steps, row.tokens)
    assert dict(described.effective) == dict(row.effective)


@pytest.mark.parametrize("suite", TRAINED)
def test_short_last_batch_is_scored_and_trained_on(suite, tmp_path):
    cell = plan_of(suite, "model=attention").cells[0]
    odd = dataclasses.replace(cell, train=dataclasses.replace(cell.train, batch_size=7, eval_batch_size=5))
    rows = run(odd, tmp_path)
    assert {row.num_items for row in rows} == {row.num_items for row in run(cell, tmp_path)}


@pytest.mark.parametrize("suite", TIMED)
def test_preset_test_times_every_model_and_its_rows_make_tables(suite, tmp_path):
    began = time.perf_counter()
    deeper = [f"{name}.num_layers=2" for name, model in registry.models().items() if "parts" in model.facts]
    plan = plan_of(suite, f"model={','.join(registry.models())}", *deeper)
    rows = [row for cell in plan.cells for row in run(cell, tmp_path)]
    assert time.perf_counter() - began < 30
    assert {row.status for row in rows} <= {"ok", "skipped"}, [row.reason for row in rows if row.status == "failed"]
    assert {row.model for row in rows if row.status == "ok"} == set(registry.models())
    for row in rows:
        assert parse_row(row.to_json()) == row
        assert row.reason or row.status == "ok"
        assert row.value is None or row.value > 0
        assert min(row.parameters, row.state_bytes) > 0
        assert {"kernel", "positions", "local_mixing", "state_dtype"} <= set(row.effective)
    for table in make_tables(rows, registry.protocol(suite)):
        for form in ("md", "csv", "latex", "html"):
            assert render(table, form)


@pytest.mark.parametrize("suite", TIMED)
def test_models_take_turns_and_repeats_come_one_after_the_other(suite):
    cells = plan_of(suite, "model=hgrn2,gla", "seed=0,1").cells
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    for one, other in zip(cells[::2], cells[1::2], strict=True):
        assert (one.model, other.model) == ("hgrn2", "gla")
        assert (one.task, one.data) == (other.task, other.data)


@pytest.mark.parametrize("suite", TIMED)
def test_another_device_is_another_cell(suite, monkeypatch):
    key = plan_of(suite, "model=hgrn2").cells[0].key
    monkeypatch.setattr(provenance, "device_name", lambda device: "another processor")
    assert plan_of(suite, "model=hgrn2").cells[0].key != key
