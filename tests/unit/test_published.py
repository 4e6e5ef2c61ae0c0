"""Published values beside our own: the file, and a verdict that gives its reason."""

import csv
import itertools
from pathlib import Path

import pytest
from test_results import failed, row

import hgrn2_bench.published
from hgrn2_bench.protocol import Preset, Protocol
from hgrn2_bench.published import published, published_table, verdict
from hgrn2_bench.render import render

FILE = Path(hgrn2_bench.published.__file__).with_name("published.csv")
COLUMNS = ["suite", "table", "task", "metric", "higher_is_better", "model", "params_m", "layers", "value", "unit", "source", "note"]


def protocol(name="mqar", reproduces=("zoology_figure2",), higher=True):
    presets = {
        "smoke": Preset("tiny", "ours", ("model=hgrn2",), {"t": ()}),
        "zoology": Preset("Zoology's figure 2", "HazyResearch/zoology", ("model=attention",), {"t": ()}, reproduces),
    }
    return Protocol(name, 1, "accuracy", "fraction", higher, object, str, presets)


OURS = protocol()


def quoted(**changes):
    """A line of the file."""
    line = dict.fromkeys(COLUMNS, "") | {"suite": "mqar", "table": "zoology_figure2", "task": "len64_kv4_d64", "metric": "accuracy"}
    return (
        line
        | {"model": "Attention", "layers": "2", "value": "0.80", "unit": "fraction", "source": "s", "note": "read off, +-0.01"}
        | changes
    )


def ours(value=0.8, lr=1e-3, d_model=64, num_layers=2, **changes):
    """A row of the preset that repeats Zoology's figure."""
    fields = {"preset": "zoology", "task": "len64_kv4", "model": "attention", "value": value} | changes
    return row({"lr": lr, "d_model": d_model, "num_layers": num_layers}, **fields)


def lost(lr=1e-3, **changes):
    settings = {"lr": lr, "d_model": 64, "num_layers": 2}
    return failed("diverged", "loss nan at step 7", settings=settings, preset="zoology", task="len64_kv4", model="attention", **changes)


def lines_of_file():
    with FILE.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_file_holds_what_its_reader_says():
    lines = lines_of_file()
    assert list(lines[0]) == COLUMNS
    assert sum(len(published(suite)) for suite in {line["suite"] for line in lines}) == len(lines)
    assert published("mqar")
    assert published("no such suite") == []


def test_every_published_value_has_a_source_and_is_a_number_or_says_why_not():
    for line in lines_of_file():
        assert None not in line
        assert all(line[name] for name in ("suite", "table", "task", "metric", "model", "source")), line
        assert line["higher_is_better"] in ("true", "false", "na")
        if line["value"]:
            float(line["value"])
        else:
            assert line["note"], line


def test_mqars_published_values_are_fractions_with_a_reading_error():
    for line in published("mqar"):
        assert line["unit"] == "fraction"
        assert 0 <= float(line["value"]) <= 1
        assert "+-0.0" in line["note"]
        assert line["layers"] in ("2", "4")


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ((0.80,), "within"),
        ((0.791,), "within"),
        ((0.809,), "within"),
        ((0.789,), "below"),
        ((0.811,), "above"),
        ((0.70, 0.90), "within"),  # the range of the seeds holds it
        ((0.70, 0.78), "below"),
        ((0.82, 0.90), "above"),
        ((0.0,), "below"),
    ],
)
def test_a_verdict_compares_the_range_of_the_seeds(values, where):
    shown, words = verdict(quoted(), [ours(v, seed=s) for s, v in enumerate(values)], OURS)
    assert shown == ", ".join(f"{v:.3f}" for v in values)
    seeds = "1 seed" if len(values) == 1 else "2 seeds"
    assert words == f"{where} (range of {seeds} at lr 0.001, reading error 0.01)"


@pytest.mark.parametrize(
    ("note", "error", "where"),
    [
        ("read off, +-0.02 (covered)", "0.02", "within"),
        ("read off, +-0.005", "0.005", "below"),
        ("", "0.01", "below"),
        ("+-1", "0.01", "below"),
    ],
)
def test_a_verdict_takes_the_reading_error_from_the_note(note, error, where):
    _, words = verdict(quoted(note=note), [ours(0.785)], OURS)
    assert words.startswith(where)
    assert words.endswith(f"reading error {error})")


def test_a_verdict_takes_the_best_learning_rate_whatever_the_order():
    rows = [
        ours(v, lr=lr, seed=s)
        for lr, values in ((1e-2, (0.5, 0.6)), (1e-3, (0.78, 0.81)), (1e-4, (0.2, 0.3)))
        for s, v in enumerate(values)
    ]
    for order in (rows, rows[::-1], rows[3:] + rows[:3]):
        assert verdict(quoted(), order, OURS) == ("0.780, 0.810", "within (range of 2 seeds at lr 0.001, reading error 0.01)")
    tied = [ours(0.9, lr=lr) for lr in (1e-2, 1e-3, 1e-4)]
    assert len({verdict(quoted(), order, OURS) for order in itertools.permutations(tied)}) == 1


def test_a_verdict_takes_the_lowest_value_where_lower_is_better():
    rows = [ours(18.0, lr=1e-3, metric="ppl", unit="ppl"), ours(25.0, lr=1e-2, metric="ppl", unit="ppl")]
    shown, words = verdict(quoted(metric="ppl", unit="ppl", value="18.0"), rows, protocol(higher=False))
    assert shown == "18.000"
    assert words.startswith("within")


def test_a_verdict_gives_our_fraction_in_per_cent_where_the_published_value_is():
    shown, words = verdict(quoted(unit="%", value="80.005", note=""), [ours(0.8)], OURS)
    assert (shown, words) == ("80.000", "within (range of 1 seed at lr 0.001, reading error 0.01)")
    assert verdict(quoted(unit="%", value="80.5", note=""), [ours(0.8)], OURS)[1].startswith("below")


def test_a_verdict_counts_runs_that_failed():
    _, words = verdict(quoted(), [ours(0.8, seed=0), lost(seed=1), lost(seed=2), lost(lr=1e-2, seed=1)], OURS)
    assert words == "within (range of 1 seed at lr 0.001, 2 more failed, reading error 0.01)"


@pytest.mark.parametrize(
    ("line", "rows", "reason"),
    [
        (quoted(), [], "there are no rows of preset zoology for this model, task and width"),
        (quoted(), [ours(preset="smoke")], "there are no rows of preset zoology"),
        (quoted(), [ours(model="gla")], "there are no rows"),
        (quoted(), [ours(task="len128_kv8")], "there are no rows"),
        (quoted(), [ours(d_model=128)], "there are no rows"),
        (quoted(), [ours(metric="accuracy_token")], "there are no rows"),
        (quoted(), [ours(split="validation")], "there are no rows"),
        (quoted(), [ours(protocol_version=2)], "there are no rows"),
        (quoted(table="lra_main"), [ours()], "no preset repeats the protocol of lra_main"),
        (quoted(layers="4"), [ours()], "ours has 2 layers and the published one 4"),
        (quoted(), [lost()], "our run diverged: loss nan at step 7"),
        (quoted(unit="ppl", value="20.0"), [ours()], "ours is in fraction and the published one in ppl"),
        (quoted(unit=""), [ours()], "ours is in fraction and the published one in no stated unit"),
        (quoted(value="", note="printed FAIL"), [ours()], "no value was published: printed FAIL"),
        (quoted(value="", note=""), [ours()], "no value was published: left blank"),
    ],
)
def test_a_verdict_gives_its_reason_where_there_is_none(line, rows, reason):
    shown, words = verdict(line, rows, OURS)
    assert shown == "–"
    assert words.startswith(f"not comparable because {reason}")


@pytest.mark.parametrize(
    ("model", "task", "layers"),
    [("Attention", "len64_kv4_d64", "2"), ("attention", "len64_kv4", "2"), ("ATTENTION", "len64_kv4_d64", "")],
)
def test_a_verdict_finds_rows_by_name_task_and_width(model, task, layers):
    assert verdict(quoted(model=model, task=task, layers=layers), [ours()], OURS)[1].startswith("within")


def test_a_verdict_reads_a_hyphen_as_an_underscore():
    assert verdict(quoted(model="RWKV-v4"), [ours(model="rwkv_v4")], OURS)[1].startswith("within")


def test_the_published_table_shows_every_value_beside_ours():
    table = published_table([ours(1.0)], OURS)
    lines = [dict(zip([c.name for c in table.columns], line, strict=True)) for line in table.lines]
    assert [line["published"] for line in lines] == [line["value"] for line in published("mqar")]
    (compared,) = [line for line in lines if line["ours"] != "–"]
    assert (compared["model"], compared["task"], compared["published"], compared["ours"]) == ("Attention", "len64_kv4_d64", "1.00", "1.000")
    assert all(line["verdict"].startswith(("within", "below", "above", "not comparable because ")) for line in lines)
    assert any("zoology_figure2: HazyResearch/zoology" in note for note in table.notes)
    for form in ("md", "csv", "latex", "html"):
        assert "reproduced" not in render(table, form).lower()


@pytest.mark.parametrize("suite", sorted({line["suite"] for line in lines_of_file()}))
def test_the_published_table_of_every_suite_can_be_made(suite):
    tables = {line["table"] for line in published(suite)}
    table = published_table([], protocol(suite, tuple(tables)))
    assert len(table.lines) == len(published(suite))
    assert len(table.notes) == len({(line["table"], line["source"]) for line in published(suite)})


def test_nothing_published_gives_no_table():
    assert published_table([], protocol("no such suite")) is None
