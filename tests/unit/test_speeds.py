"""Tables of timed cells as a pure function of rows."""

import dataclasses

import pytest
from test_results import failed, row

from hgrn2_bench.render import FORMATS, Score, render
from hgrn2_bench.speeds import crossover, duration
from hgrn2_bench.tables import make_tables
from suites.throughput.protocol import PROTOCOL

DETAILS = {"steady": True, "above_ceiling": False, "mode": "eager", "copy_ceiling": 3e12, "matmul_ceiling": 7e14, "roofline": 0.5}


def cell(value, seq_len=512, seed=0, model="hgrn2", details=DETAILS, metric="tokens_per_s", **changes):
    """One timed row; every setting has a cell of its own."""
    settings = {"seq_len": seq_len, **changes.pop("settings", {})}
    key = f"{model} {sorted(settings.items())} {seed}"
    fields = {"suite": "throughput", "task": "op_training_32768", "unit": "tokens/s", "cell": key, "metric": metric, "details": details}
    return row(settings, value=value, seed=seed, model=model, **fields | changes)


def only(rows, metric=None):
    (table,) = make_tables(rows, PROTOCOL, metric)
    return table


def shown(table):
    """Model to its columns."""
    names = [column.name for column in table.columns]
    return {line[0]: {n: v.text if isinstance(v, Score) else v for n, v in zip(names, line, strict=True)} for line in table.lines}


def test_sizes_are_columns_and_repeats_their_median():
    rows = [
        cell(v, seq_len, seed) for seq_len, values in ((1024, (3e6, 5e6, 4e6)), (512, (1e6, 1e6, 1e6))) for seed, v in enumerate(values)
    ]
    table = only(rows)
    assert [c.name for c in table.columns][1:3] == ["512", "1,024"]
    assert (shown(table)["hgrn2"]["512"], shown(table)["hgrn2"]["1,024"]) == ("1M (50%)", "4M (50%)")
    assert "median of 3 repeats, models taking turns; largest spread 50.0% (hgrn2, seq_len 1024)" in table.notes


def test_what_failed_stands_in_its_place_with_the_last_size_that_fitted():
    out = failed("oom", "CUDA out of memory", suite="throughput", task="op_training_32768", model="hgrn2", cell="x", details={})
    out = dataclasses.replace(out, settings={**out.settings, "seq_len": 2048}, metric="tokens_per_s")
    table = only([cell(1e6, 512), cell(2e6, 1024), out])
    assert shown(table)["hgrn2"]["2,048"] == "oom"
    assert "hgrn2, seq_len 2,048: oom: CUDA out of memory; the last that fitted: 1,024" in table.notes


def test_a_repeat_that_failed_leaves_no_median():
    bad = dataclasses.replace(cell(None, 512, 1), status="failed", reason="boom")
    assert shown(only([cell(1e6, 512, 0), bad]))["hgrn2"]["512"] == "failed"


def test_unsteady_and_implausible_values_are_marked():
    table = only([cell(1e6, details=DETAILS | {"steady": False}), cell(1e6, 1024, details=DETAILS | {"above_ceiling": True})])
    assert (shown(table)["hgrn2"]["512"], shown(table)["hgrn2"]["1,024"]) == ("1M (50%)~", "1M (50%)!")
    assert {"~ never became steady", "! above the ceiling measured in the same process"} <= set(table.notes)


@pytest.mark.parametrize("metric", ["state", "compile"])
def test_what_is_no_sample_is_not_called_unsteady(metric):
    unsteady = {**DETAILS, "steady": False}
    table = only([cell(1e6, details=unsteady), cell(100.0, metric="state", unit="bytes", details=unsteady)], metric)
    assert "~" not in shown(table)["hgrn2"]["512"]
    assert "~ never became steady" not in table.notes


def test_a_repeat_that_failed_leaves_the_others_their_seeds():
    bad = failed("oom", "CUDA out of memory", suite="throughput", task="op_training_32768", model="hgrn2", cell="x", details={})
    bad = dataclasses.replace(bad, settings=cell(1.0).settings, seed=0)
    (line,) = only([bad, cell(3e6, seed=1)]).lines
    assert next(value for value in line if isinstance(value, Score)).by_seed == {0: None, 1: 3e6}


def test_work_that_is_not_known_has_no_share_of_the_roofline():
    assert shown(only([cell(1e6, details={**DETAILS, "roofline": None})]))["hgrn2"]["512"] == "1M"


def test_devices_precisions_and_sizes_never_share_a_table():
    for changes in ({"device_name": "another"}, {"dtype": "bfloat16"}, {"settings": {"d_model": 2048}}, {"task": "decode_batch1_graph"}):
        assert len(make_tables([cell(1e6), cell(1e6, model="gla", **changes)], PROTOCOL)) == 2


def test_a_cell_run_twice_counts_once():
    old, new = cell(1e6, time="2026-01-01T00:00:00+00:00"), cell(3e6, time="2026-02-01T00:00:00+00:00")
    assert shown(only([new, old]))["hgrn2"]["512"] == "3M (50%)"


def test_other_metrics_and_details_are_shown_on_demand():
    rows = [cell(1e6), cell(0.012, metric="latency", unit="s", higher_is_better=False)]
    assert shown(only(rows, "latency"))["hgrn2"]["512"] == "12 ms (50%)"
    assert shown(only(rows, "roofline"))["hgrn2"]["512"] == "0.5"
    assert make_tables(rows, PROTOCOL, "peak") == []


def test_a_task_without_the_primary_metric_shows_its_first():
    table = only([cell(4e9, metric="state", unit="bytes", higher_is_better=False, task="memory_batch1")])
    assert "state (bytes)" in table.title
    assert shown(table)["hgrn2"]["512"] == "4GB"


def test_first_calls_have_a_column_of_their_own():
    table = only([cell(1e6, compile_s=2.5), cell(1e6, 1024, compile_s=40.0)])
    assert shown(table)["hgrn2"]["first calls"] == 40.0
    assert "| 40 s" in render(table, "md")


def test_settings_of_one_model_are_lines_and_named():
    rows = [cell(v, model="attention", settings={"attention.num_heads": heads}) for v, heads in ((1e6, 8), (2e6, 16))]
    table = only([*rows, cell(3e6)])
    assert "attention.num_heads" in [c.name for c in table.columns]
    assert len(table.lines) == 3


def test_a_model_on_another_kernel_than_its_own_is_named_so():
    table = only([cell(1e6, model="mamba2", effective={"kernel": "fla.chunk_simple_gla", "stands_in": "simple_gla"})])
    assert list(shown(table)) == ["mamba2 (simple_gla)"]


def test_a_cpu_s_table_says_what_it_is():
    assert any("CPU with the chunked kernels" in note for note in only([cell(1e6)]).notes)
    assert not any("CPU with" in note for note in only([cell(1e6, device="cuda")]).notes)


def test_a_busy_card_is_said():
    gpu = {"driver_version": "580", "power.limit": "700.00", "clocks.max.sm": "1980", "processes": "1"}
    quiet, busy = (only([cell(1e6, details=DETAILS | {"gpu": gpu | {"processes": n}})]).notes for n in ("1", "3"))
    assert any("driver 580; power cap (W) 700.00" in note for note in quiet)
    assert [any("busy" in note for note in notes) for notes in (quiet, busy)] == [False, True]


@pytest.mark.parametrize(
    ("mine", "other", "words"),
    [
        ({512: 1.0, 1024: 4.0}, {512: 2.0, 1024: 2.0}, "is faster from 1,024 on (equal near 724) than"),
        ({512: 3.0, 1024: 3.0}, {512: 2.0, 1024: 2.0}, "is faster at every length measured than"),
        ({512: 1.0}, {512: 2.0, 1024: 2.0}, "is slower at every length measured than"),
        ({1: 3.0, 2: 1.0, 4: 3.0}, {1: 2.0, 2: 2.0, 4: 2.0}, "is faster at 1, 4 only than"),
        ({1: 3.0, 2: 1.0}, {1: 2.0, 2: 2.0}, "is faster at 1 only than"),
        ({1: 3.0}, {2: 2.0}, ""),
    ],
)
def test_the_crossover_in_words(mine, other, words):
    assert crossover(mine, other) == words


def test_the_pair_of_the_protocol_is_compared_whichever_way_a_metric_points():
    rows = [cell(v, n) for n, v in ((512, 1e6), (1024, 4e6))]
    rows += [cell(2e6, n, model="attention", settings={"attention.num_heads": 8}) for n in (512, 1024)]
    assert "hgrn2 is faster from 1,024 on (equal near 724) than attention" in only(rows).notes
    rows += [cell(9e6, n, model="attention", settings={"attention.num_heads": 16}) for n in (512, 1024)]
    assert "hgrn2 is faster from 1,024 on (equal near 724) than attention (attention.num_heads 8)" in only(rows).notes
    assert "hgrn2 is slower at every length measured than attention (attention.num_heads 16)" in only(rows).notes
    slow = [dataclasses.replace(r, metric="latency", value=1 / r.value, unit="s", higher_is_better=False) for r in rows]
    assert "hgrn2 is faster from 1,024 on (equal near 724) than attention (attention.num_heads 8)" in only(slow).notes


@pytest.mark.parametrize(("seconds", "text"), [(2.0, "2 s"), (0.0123, "12.3 ms"), (4.2e-5, "42 µs"), (0.9999, "1 s")])
def test_durations_in_words(seconds, text):
    assert duration(seconds) == text


def test_every_format_renders():
    for form in set(FORMATS) - {"jsonl"}:
        assert "1000000" in (text := render(only([cell(1e6)]), form)) or "1M" in text
