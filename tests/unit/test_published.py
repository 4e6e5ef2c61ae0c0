"""Published values beside our own: the file, and a verdict that gives its reason."""

import csv
import dataclasses
import functools
import itertools
import json
import math
import statistics
from pathlib import Path

import pytest
from test_results import row

import hgrn2_bench.published
from hgrn2_bench import registry
from hgrn2_bench.plan import make_plan
from hgrn2_bench.protocol import Preset, Protocol
from hgrn2_bench.published import departures, interval, preset_settings, published, reproduced, verdict
from hgrn2_bench.published_tables import published_table
from hgrn2_bench.render import render

FILE = Path(hgrn2_bench.published.__file__).with_name("published.csv")
COLUMNS = ["suite", "table", "task", "metric", "higher_is_better", "model", "params_m", "layers", "value", "unit", "source", "note"]
OURS = registry.protocol("mqar")
RATES = preset_settings("mqar", "zoology", "len64_kv4", "attention")["lr"]
LR = RATES[1]


def quoted(**changes):
    """A line of the file."""
    line = dict.fromkeys(COLUMNS, "") | {"suite": "mqar", "table": "zoology_figure2", "task": "len64_kv4_d64", "metric": "accuracy"}
    return (
        line
        | {"model": "Attention", "layers": "2", "value": "0.80", "unit": "fraction", "source": "s", "note": "read off, +-0.01"}
        | changes
    )


@functools.cache
def settings_of(preset, task, model):
    """The settings of one cell that a preset plans for a model, as a row holds them."""
    cell = make_plan(["suite=mqar", f"preset={preset}", f"task={task}", f"model={model}", "d_model=64", f"lr={LR}"], "cpu").cells[0]
    return json.loads(json.dumps(cell.fields()))


def ours(value=0.8, settings=None, **changes):
    """A row of a preset that repeats Zoology's figure, with that preset's own settings."""
    fields = {"preset": "zoology", "task": "len64_kv4", "model": "attention", "value": value} | changes
    known = fields["preset"] in ("zoology", "zoology_head") and fields["task"] in OURS.presets[fields["preset"]].tasks
    known = known and fields["model"] in registry.models()
    base = settings_of(*(fields[k] for k in ("preset", "task", "model"))) if known else settings_of("zoology", "len64_kv4", "attention")
    made = row(**fields)
    return dataclasses.replace(made, settings=base | (settings or {}), cell=str((made.cell, fields["preset"], settings)))


def lost(**changes):
    return ours(None, status="diverged", reason="loss nan at step 7", num_items=0, floors={}, **changes)


def lines_of_file():
    with FILE.open(newline="") as file:
        return list(csv.DictReader(file))


# the file


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


# the interval


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
def test_a_verdict_on_one_or_two_seeds_compares_their_range(values, where):
    shown, words = verdict(quoted(), [ours(v, seed=s) for s, v in enumerate(values)], OURS)
    assert shown == ", ".join(f"{v:.3f}" for v in values)
    seeds = "1 seed" if len(values) == 1 else "2 seeds"
    assert words == f"{where} (preset zoology, range of {seeds}, lr 0.000464159, 1 of the preset's 4 tried, reading error 0.01)"


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ((0.70, 0.71, 0.72), "below"),  # 0.710 +- 0.025
        ((0.75, 0.76, 0.77), "below"),  # up to 0.785, and 0.79 is as far as the reading error goes
        ((0.756, 0.766, 0.776), "within"),  # up to 0.791, although every value is below it
        ((0.60, 0.70, 0.78), "within"),  # 0.693 +- 0.224
        ((0.89, 0.90, 0.91), "above"),
        ((0.79, 0.79, 0.89), "within"),
        ((0.78, 0.78, 0.78, 0.78), "below"),  # no spread, no width
    ],
)
def test_a_verdict_on_three_seeds_or_more_compares_their_t_interval(values, where):
    _, words = verdict(quoted(), [ours(v, seed=s) for s, v in enumerate(values)], OURS)
    assert words.startswith(f"{where} (preset zoology, 95% t-interval of {len(values)} seeds, lr ")


def test_the_interval_is_the_t_interval_of_the_mean():
    values = (0.5, 0.6, 0.8)
    low, high, kind = interval(values)
    half = 4.302652729749464 * statistics.stdev(values) / math.sqrt(3)  # t at 0.975 with 2 degrees of freedom
    assert (low, high) == pytest.approx((statistics.fmean(values) - half, statistics.fmean(values) + half))
    assert kind == "95% t-interval"
    assert interval((0.9, 0.1)) == (0.1, 0.9, "range")


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


# the learning rate


def test_a_verdict_takes_the_learning_rate_that_the_table_takes():
    """The mean over seeds decides, on the split that the preset selects by; the best single seed does not."""
    by_rate = ((RATES[3], (0.5, 0.6)), (RATES[2], (0.78, 0.81)), (RATES[0], (0.2, 0.95)))
    rows = [ours(v, {"lr": lr}, seed=s) for lr, values in by_rate for s, v in enumerate(values)]
    for order in (rows, rows[::-1], rows[3:] + rows[:3]):
        shown, words = verdict(quoted(), order, OURS)
        assert shown == "0.780, 0.810"
        assert words == "within (preset zoology, range of 2 seeds, lr 0.00215443, 3 of the preset's 4 tried, reading error 0.01)"
    tied = [ours(0.9, {"lr": lr}) for lr in RATES]
    assert len({verdict(quoted(), order, OURS) for order in itertools.permutations(tied)}) == 1


def test_a_learning_rate_chosen_on_validation_data_is_not_chosen_on_test_data(monkeypatch):
    monkeypatch.setattr(hgrn2_bench.published, "departures", lambda row, protocol: "")  # no preset that repeats a table selects so
    cells = ((RATES[1], 0.9, 0.99), (RATES[2], 0.8, 0.5))  # rate, validation, test
    rows = [
        ours(value, {"lr": lr, "select": "validation"}, split=split)
        for lr, validation, test in cells
        for split, value in (("validation", validation), ("test", test))
    ]
    assert verdict(quoted(), rows, OURS)[0] == "0.990"
    swapped = [dataclasses.replace(r, value=1 - r.value) if r.split == "validation" else r for r in rows]
    assert verdict(quoted(), swapped, OURS)[0] == "0.500"


def test_a_verdict_takes_the_lowest_value_where_lower_is_better():
    lower = dataclasses.replace(OURS, metric="ppl", unit="ppl", higher_is_better=False)
    same = {"metric": "ppl", "unit": "ppl", "higher_is_better": False}
    rows = [ours(18.0, {"lr": RATES[0]}, **same), ours(25.0, {"lr": RATES[1]}, **same)]
    shown, words = verdict(quoted(metric="ppl", unit="ppl", value="18.0"), rows, lower)
    assert shown == "18.000"
    assert words.startswith("within")


def test_a_verdict_counts_runs_that_failed():
    rows = [ours(0.8, seed=0), lost(seed=1), lost(seed=2), *(lost(settings={"lr": RATES[3]}, seed=s) for s in range(3))]
    _, words = verdict(quoted(), rows, OURS)
    assert words == (
        "within (preset zoology, range of 1 seed, lr 0.000464159, 2 of the preset's 4 tried, 2 more failed, reading error 0.01)"
    )


def test_a_verdict_takes_the_setting_with_most_seeds_and_not_the_best():
    rows = [*(ours(v, seed=s) for s, v in enumerate((0.7, 0.71))), ours(0.8, seed=0, backend="reference")]
    assert verdict(quoted(), rows, OURS)[0] == "0.700, 0.710"


def test_a_verdict_gives_our_fraction_in_per_cent_where_the_published_value_is():
    shown, words = verdict(quoted(unit="%", value="80.005", note=""), [ours(0.8)], OURS)
    assert shown == "80.000"
    assert words.startswith("within")
    assert verdict(quoted(unit="%", value="80.5", note=""), [ours(0.8)], OURS)[1].startswith("below")


# which preset, and whose settings


def test_presets_that_repeat_one_table_are_never_pooled():
    rows = [ours(0.5, preset="zoology_head", seed=1), ours(0.8, seed=0), ours(0.4, preset="zoology_head", seed=2)]
    shown, words = verdict(quoted(), rows, OURS)
    assert shown == "0.800"
    assert words.startswith("within (preset zoology, range of 1 seed")
    shown, words = verdict(quoted(), rows[:1], OURS)
    assert shown == "0.500"
    assert words.startswith("below (preset zoology_head, ")


def test_a_preset_without_rows_at_the_published_depth_makes_way_for_one_with_them():
    four = quoted(model="BaseConv", layers="4")
    head, first = ours(0.5, preset="zoology_head", model="base_conv"), ours(0.8, model="base_conv")
    assert (head.settings["num_layers"], first.settings["num_layers"]) == (2, 4)
    assert verdict(four, [head], OURS)[1] == "not comparable because ours has 2 layers and the published one 4"
    assert verdict(four, [head, first], OURS)[0] == "0.800"
    assert verdict(quoted(model="BaseConv", layers="2"), [head, first], OURS)[0] == "0.500"


def test_a_row_whose_settings_depart_from_its_preset_makes_way_for_another_preset():
    rows = [ours(0.8, {"epochs": 1}), ours(0.5, preset="zoology_head")]
    assert verdict(quoted(), rows, OURS)[0] == "0.500"
    assert verdict(quoted(), rows[:1], OURS)[1] == "not comparable because epochs=1, the preset has 64"


@pytest.mark.parametrize(
    ("settings", "changes", "reason"),
    [
        ({"epochs": 1}, {}, "epochs=1, the preset has 64"),
        ({"train_examples": 1000, "shuffle": False}, {}, "train_examples=1000, the preset has 100000; shuffle=False, the preset has True"),
        ({"attention.dropout": 0.0}, {}, "attention.dropout=0, the preset has 0.1"),
        ({"attention.num_heads": 2}, {}, "attention.num_heads=2, the preset has 1"),
        ({"embed_dropout": 0.0}, {}, "embed_dropout=0, the preset has 0.1"),
        ({"keep": "best"}, {}, "keep=best, the preset has last"),  # a default, which no word of the preset names
        ({"select": "validation"}, {}, "select=validation, the preset has test"),
        ({"positions": "rope"}, {}, "positions=rope, the preset has learned"),
        ({"d_model": 96}, {}, "d_model=96, the preset has 64, 128, 256, 512"),
        ({}, {"dtype": "bfloat16"}, "dtype=bfloat16, the preset has float32"),
        ({}, {"task": "len1024_kv64"}, "preset zoology has no task len1024_kv64"),
        ({}, {"model": "rwkv_v4"}, "rwkv_v4 is not a registered model"),
    ],
)
def test_rows_that_depart_from_their_preset_are_not_comparable(settings, changes, reason):
    made = ours(0.8, settings, **changes)
    assert departures(made, OURS) == reason
    line = quoted(task=f"{made.task}_d{made.settings['d_model']}", model=made.model)
    assert verdict(line, [made], OURS) == ("–", f"not comparable because {reason}")
    assert reproduced(made, OURS) is None


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {}),
        ({"lr": 0.05}, {}),
        ({"cuda_graph": False}, {}),
        ({"d_model": 512}, {}),
        ({}, {"backend": "fla", "device": "cuda", "seed": 7}),
        ({}, {"preset": "zoology_head"}),
        ({}, {"model": "base_conv"}),
        ({}, {"model": "mamba2", "task": "len512_kv64"}),
    ],
)
def test_rows_may_differ_from_their_preset_in_seed_tuning_backend_and_device(settings, changes):
    assert departures(ours(0.8, settings, **changes), OURS) == ""


def test_a_setting_that_is_younger_than_a_row_is_no_departure():
    made = ours(0.8)
    older = dataclasses.replace(made, settings={k: v for k, v in made.settings.items() if k != "first_layer"})
    assert departures(older, OURS) == ""


def test_a_preset_s_settings_are_what_it_plans():
    found = preset_settings("mqar", "zoology", "len512_kv64", "base_conv")
    assert (found["num_layers"], found["batch_size"], found["base_conv.long"], found["dtype"]) == ([4], [128], ["odd"], ["float32"])
    assert (found["d_model"], found["lr"]) == ([64, 128, 256, 512], RATES)


# why there is no verdict


@pytest.mark.parametrize(
    ("line", "rows", "reason"),
    [
        (quoted(), [], "there are no rows of preset zoology or zoology_head for this model, task and width"),
        (quoted(), [ours(preset="smoke")], "there are no rows of preset zoology"),
        (quoted(), [ours(model="gla")], "there are no rows"),
        (quoted(), [ours(task="len128_kv8")], "there are no rows"),
        (quoted(), [ours(settings={"d_model": 128})], "there are no rows"),
        (quoted(), [ours(metric="accuracy_token")], "there are no rows"),
        (quoted(), [ours(split="validation")], "there are no rows"),
        (quoted(), [ours(protocol_version=OURS.version + 1)], "there are no rows"),
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


@pytest.mark.parametrize(("theirs", "mine"), [("BaseConv", "base_conv"), ("Gated DeltaNet", "gated_delta_net"), ("Delta-Net", "delta_net")])
def test_a_verdict_finds_models_however_their_names_are_written(theirs, mine):
    made = ours(0.8, preset="zoology_head", model=mine)
    assert verdict(quoted(model=theirs), [made], OURS)[1].startswith("within")
    assert verdict(quoted(model=f"{theirs}2"), [made], OURS)[1].startswith("not comparable because there are no rows")


# the table


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
    presets = {"zoology": Preset("s", "theirs", ("model=attention",), {}, tuple({line["table"] for line in published(suite)}))}
    table = published_table([], Protocol(suite, 1, "accuracy", "fraction", True, object, str, presets))
    assert len(table.lines) == len(published(suite))
    assert len(table.notes) == len({(line["table"], line["source"]) for line in published(suite)})


def test_nothing_published_gives_no_table():
    assert published_table([], dataclasses.replace(OURS, name="no such suite")) is None
