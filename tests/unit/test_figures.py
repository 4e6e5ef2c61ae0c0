"""Figures as a pure function of rows: what shares a figure, what a point and a curve stand for, what is said below."""

import csv
import io

import pytest
from test_results import failed, row

from hgrn2_bench.figures import Plot, make_plots, natural, points_csv
from hgrn2_bench.protocol import Figure, Preset, Protocol
from hgrn2_bench.published import preset_settings

WIDTH = Figure("width", "accuracy against width", "d_model", "width", "accuracy", log_x=2)
RATE = Figure("lr", "accuracy against learning rate", "lr", "learning rate", "accuracy", log_x=10, rows="d_model")
LONGER = Figure("length", "beyond", "length", "length", "accuracy", log_x=2, splits={"test": 1, "test_len2x": 2, "test_len4x": 4})
STATE = Figure("state", "memory", "state_bytes", "state", "accuracy", log_x=10, joined=("expand_ratio", "d_model"))


def protocol(*figures, **changes):
    tasks = {"len64_kv4": (), "len128_kv8": ()}
    fields = {
        "name": "mqar",
        "version": 1,
        "metric": "accuracy",
        "unit": "fraction",
        "higher_is_better": True,
        "data_schema": object,
        "name_task": str,
        "presets": {"smoke": Preset("tiny", "ours", ("model=hgrn2",), tasks)},
        "solved": 0.99,
        "figures": figures,
    }
    return Protocol(**fields | changes)


def cell(value, selection=None, settings=None, beyond=None, **changes):
    """The rows of one finished cell: test, validation, and what lies beyond training."""
    fields = {"task": "len64_kv4"} | changes
    rows = [row(settings, **fields, value=value), row(settings, **fields, split="validation", value=selection or value)]
    return rows + [row(settings, **fields, split=split, value=v) for split, v in (beyond or {}).items()]


def widths(*values, model="hgrn2", settings=None, **changes):
    """One cell for each width from 64 on, doubling."""
    return [r for i, v in enumerate(values) for r in cell(v, settings={"d_model": 64 * 2**i} | (settings or {}), model=model, **changes)]


def plots(rows, *figures, **changes):
    return make_plots(rows, protocol(*figures, **changes))[0]


def only(rows, figure, **changes) -> Plot:
    made, missing = make_plots(rows, protocol(figure, **changes))
    assert not missing
    (plot,) = made
    return plot


def panel(rows, figure, **changes):
    (found,) = only(rows, figure, **changes).panels
    return found


def curves(rows, figure, **changes):
    """Label to the places and medians of a curve's points."""
    return {curve.label: [(p.x, p.median) for p in curve.points] for curve in panel(rows, figure, **changes).curves}


# what shares a figure


def test_rows_of_another_match_have_a_figure_of_their_own():
    match = {"match": "params", "match_target": 40_000, "match_len": 0, "match_tolerance": 0.02}
    near, far = ({"match_reached": round(40_000 * (1 + miss)), "match_residual": miss} for miss in (0.01, 0.1))
    one, other = plots([*widths(0.5, 0.6), *widths(0.7, 0.8, settings=match, effective=near)], WIDTH)
    assert {one.stem, other.stem} == {"mqar_smoke_v1_float32_width", "mqar_smoke_v1_float32_params-40000-0_width"}
    assert ["matched to 40000 non-embedding parameters" in plot.subtitle for plot in (one, other)] == [False, True]
    made, (reason,) = make_plots(widths(0.7, 0.8, settings=match, effective=far), protocol(WIDTH))
    assert not made
    assert reason.startswith("no mqar_smoke_v1_float32_params-40000-0_width: refused: hgrn2 has 44000 for a target of 40000")


def test_a_figure_has_one_panel_per_task_in_the_presets_order():
    rows = [
        *widths(0.5, 0.6, task="len128_kv8"),
        *widths(0.8, 0.9),
        *widths(0.1, 0.2, task="len32_kv2"),
        *widths(0.1, 0.2, task="len9_kv2"),
    ]
    titles = [p.title for p in only(rows, WIDTH).panels]
    assert titles == ["len64_kv4", "len128_kv8", "len9_kv2", "len32_kv2"]


@pytest.mark.parametrize("changes", [{"preset": "paper"}, {"protocol_version": 2}, {"dtype": "bfloat16"}])
def test_rows_that_cannot_be_compared_never_share_a_figure(changes):
    made = plots([*widths(0.5, 0.6), *widths(0.7, 0.8, model="gla", **changes)], WIDTH)
    assert [[c.label for c in p.panels[0].curves] for p in sorted(made, key=lambda p: p.panels[0].curves[0].label)] == [["gla"], ["hgrn2"]]
    assert len({p.stem for p in made}) == 2


def test_other_data_of_one_task_get_a_panel_of_their_own_that_says_which():
    small = widths(0.5, 0.6, settings={"vocab_size": 32}, data_hash="a")
    large = widths(0.7, 0.8, settings={"vocab_size": 64}, data_hash="b")
    assert {p.title for p in only([*small, *large], WIDTH).panels} == {"len64_kv4, vocab_size 32", "len64_kv4, vocab_size 64"}


def test_speeds_of_two_devices_never_share_a_figure():
    rows = [*widths(0.5, 0.6, device_name="H100"), *widths(0.5, 0.6, device_name="A 100", model="gla")]
    assert {p.stem for p in plots(rows, WIDTH, speed=True)} == {"mqar_smoke_v1_float32_H100_width", "mqar_smoke_v1_float32_A-100_width"}
    assert len(plots(rows, WIDTH)) == 1


def test_title_and_subtitle_name_suite_preset_precision_device_and_backend():
    plot = only(widths(0.5, 0.6), WIDTH)
    assert plot.title == "mqar, preset smoke: accuracy against width"
    assert plot.subtitle == "float32, cpu (A processor), backend chunked"
    assert plot.y_label == "accuracy (fraction)"


# what a point and a curve stand for


def test_a_curve_is_one_model_from_left_to_right():
    found = curves([*widths(0.7, 0.8, 0.9), *widths(0.4, 0.5, model="gla")], WIDTH)
    assert found == {"gla": [(64, 0.4), (128, 0.5)], "hgrn2": [(64, 0.7), (128, 0.8), (256, 0.9)]}


def test_a_point_holds_every_seed_and_its_median():
    rows = [r for seed, v in enumerate((0.9, 0.2, 0.4)) for r in widths(v, v, seed=seed)]
    point = panel(rows, WIDTH).curves[0].points[0]
    assert (point.line.values, point.median) == ([0.9, 0.2, 0.4], 0.4)


def test_each_width_takes_its_best_learning_rate_by_validation_data():
    grid = {(64, 1e-3): (0.5, 0.6), (64, 1e-2): (0.9, 0.4), (128, 1e-3): (0.2, 0.1), (128, 1e-2): (0.7, 0.8)}
    rows = [r for (d, lr), (v, s) in grid.items() for r in cell(v, s, {"d_model": d, "lr": lr})]
    plot = only(rows, WIDTH)
    (curve,) = plot.panels[0].curves
    assert [(p.x, p.median, p.line.tuned) for p in curve.points] == [(64, 0.5, {"lr": 1e-3}), (128, 0.7, {"lr": 1e-2})]
    assert not plot.whole_grid
    assert "lr chosen on validation data" in plot.notes[0]


def test_settings_that_vary_within_a_model_make_curves_of_their_own():
    rows = [r for c in (0, 4) for b in (0.0, 3.0) for r in widths(0.5 + c / 100, 0.6, settings={"conv": c, "forget_bias": b})]
    rows += widths(0.3, 0.4, model="gla", settings={"conv": 4, "forget_bias": 0.0})
    assert list(curves(rows, WIDTH)) == [
        "gla",
        "hgrn2, conv 0, forget_bias 0",
        "hgrn2, conv 0, forget_bias 3",
        "hgrn2, conv 4, forget_bias 0",
        "hgrn2, conv 4, forget_bias 3",
    ]


def test_a_models_own_settings_are_named_without_its_name_and_in_numeric_order():
    rows = [r for e in (128, 16, 64) for r in widths(0.5, 0.6, settings={"hgrn2.expand_ratio": e})]
    assert list(curves(rows, WIDTH)) == ["hgrn2, expand_ratio 16", "hgrn2, expand_ratio 64", "hgrn2, expand_ratio 128"]


def test_a_setting_that_varies_in_one_panel_is_named_in_all():
    rows = [r for c in (0, 4) for r in widths(0.5, 0.6, settings={"conv": c})] + widths(0.5, 0.6, task="len128_kv8", settings={"conv": 4})
    assert [[c.label for c in p.curves] for p in only(rows, WIDTH).panels] == [["hgrn2, conv 0", "hgrn2, conv 4"], ["hgrn2, conv 4"]]


def test_a_model_that_looks_ahead_says_so():
    assert list(curves(widths(0.5, 0.6, model="attention", effective={"causal": False}), WIDTH)) == ["attention, not causal"]


def test_settings_that_differ_between_models_only_are_noted_and_not_in_their_names():
    rows = [*widths(0.5, 0.6, model="gla"), *widths(0.5, 0.6), *widths(0.9, 0.9, model="attention", settings={"positions": "learned"})]
    plot = only(rows, WIDTH)
    assert [c.label for c in plot.panels[0].curves] == ["attention", "gla", "hgrn2"]
    assert "positions none, but learned for attention" in plot.notes


def test_a_version_of_a_mixer_sets_curves_apart_but_is_no_difference_between_models():
    old, new = widths(0.5, 0.6, mixer_version="1"), widths(0.7, 0.8, mixer_version="2")
    assert list(curves([*old, *new], WIDTH)) == ["hgrn2, version 1", "hgrn2, version 2"]
    assert not any("version 1, but" in n for n in only([*old, *widths(0.5, 0.6, model="gla", mixer_version="2")], WIDTH).notes)


# the tuning grid


def test_a_figure_over_the_grid_shows_all_of_it_and_marks_the_chosen_value():
    grid = {1e-4: (0.3, 0.3), 1e-3: (0.6, 0.9), 1e-2: (0.8, 0.5)}
    rows = [r for lr, (v, s) in grid.items() for d in (64, 128) for r in cell(v, s, {"lr": lr, "d_model": d})]
    plot = only(rows, RATE)
    assert [p.title for p in plot.panels] == ["len64_kv4, d_model 64", "len64_kv4, d_model 128"]
    assert [len(line) for line in plot.grid] == [1, 1]
    for each in plot.panels:
        assert [(p.x, p.median, p.chosen) for p in each.curves[0].points] == [(1e-4, 0.3, False), (1e-3, 0.6, True), (1e-2, 0.8, False)]
    assert plot.whole_grid
    assert "lr chosen on validation data" in plot.notes[0]


def test_a_choice_on_test_data_or_on_one_seed_is_called_that():
    rows = [r for lr in (1e-3, 1e-2) for r in cell(100 * lr / 2, settings={"lr": lr, "select": "test", "tune_on": "first_seed"})]
    assert "lr chosen on test data of the first seed, as the published protocol did" in only(rows, RATE).notes[0]


def test_one_learning_rate_for_all_is_named():
    assert only(widths(0.5, 0.6), WIDTH).notes[0] == "protocol version 1; commit 0123456789; seed 0; lr 0.001"


def test_a_best_value_at_the_edge_of_its_grid_is_counted():
    rows = [r for d in (64, 128) for lr in (1e-4, 1e-3, 1e-2) for r in cell(lr * d / 2, settings={"lr": lr, "d_model": d})]
    assert "best lr at the edge of its grid at 2 of 2 points" in only(rows, WIDTH).notes


# beyond training


def test_a_figure_over_splits_places_each_split_by_its_factor():
    rows = cell(0.9, beyond={"test_len2x": 0.7, "test_len4x": 0.4, "other": 0.1})
    assert curves(rows, LONGER) == {"hgrn2": [(1, 0.9), (2, 0.7), (4, 0.4)]}


def test_the_learning_rate_is_chosen_before_anything_beyond_is_looked_at():
    good = cell(0.6, 0.9, {"lr": 1e-3}, {"test_len2x": 0.2})
    lucky = cell(0.9, 0.5, {"lr": 1e-2}, {"test_len2x": 0.8})
    assert curves([*good, *lucky], LONGER) == {"hgrn2": [(1, 0.6), (2, 0.2)]}


def test_floors_follow_the_split():
    rows = [*cell(0.9, floors={"guess": 0.4}), row(task="len64_kv4", split="test_len2x", value=0.3, floors={"guess": 0.2})]
    found = panel(rows, LONGER)
    assert found.floors == {"guess": {1: 0.4, 2: 0.2}}
    assert [p.learned for p in found.curves[0].points] == [True, True]


def test_a_cell_that_failed_counts_on_every_split_that_its_line_has():
    rows = [*cell(0.9, beyond={"test_len2x": 0.7}), failed("oom", "no memory", task="len64_kv4", seed=1)]
    (curve,) = panel(rows, LONGER).curves
    assert [(p.x, p.failed, p.line.values) for p in curve.points] == [(1, 1, [0.9, None]), (2, 1, [0.7, None])]
    alone = [failed("oom", "no memory", task="len64_kv4", model="gla"), *cell(0.9, beyond={"test_len2x": 0.7})]
    assert curves(alone, LONGER)["gla"] == [(1, None)]


def test_a_cell_without_a_split_is_left_out_there():
    rows = [*cell(0.9, beyond={"test_len2x": 0.7}), *cell(0.8, seed=1), *cell(0.7, model="gla")]
    by_name = {c.label: [(p.x, p.line.values) for p in c.points] for c in panel(rows, LONGER).curves}
    assert by_name == {"gla": [(1, [0.7])], "hgrn2": [(1, [0.9, 0.8]), (2, [0.7])]}


# against memory


def test_points_are_joined_along_the_first_setting_that_varies():
    rows = widths(0.5, 0.6, model="gla", state_bytes=4096)[:2] + widths(0.5, 0.6, model="gla", state_bytes=8192)[2:]
    sizes = {(64, 16): 10_000, (64, 32): 20_000, (128, 16): 20_000, (128, 32): 40_000}
    for (d, e), state in sizes.items():
        rows += cell(state / 50_000, settings={"d_model": d, "hgrn2.expand_ratio": e}, state_bytes=state)
    found = curves(rows, STATE)
    assert found["gla"] == [(4096, 0.5), (8192, 0.6)]
    assert found["hgrn2, d_model 64"] == [(10_000, 0.2), (20_000, 0.4)]
    assert found["hgrn2, d_model 128"] == [(20_000, 0.4), (40_000, 0.8)]
    notes = only(rows, STATE).notes
    assert {"joined along d_model: gla", "joined along expand_ratio: hgrn2"} <= set(notes)


def test_a_run_that_was_never_built_has_no_place_and_is_named():
    rows = [*cell(0.5, state_bytes=4096), *cell(0.6, state_bytes=8192, model="gla")]
    rows += [failed("failed", "no such head", task="len64_kv4", model="mamba", state_bytes=None)]
    plot = only(rows, STATE)
    assert [c.label for c in plot.panels[0].curves] == ["gla", "hgrn2"]
    assert "left out, no state_bytes above 0: mamba (failed)" in plot.notes


def test_what_a_log_scale_cannot_show_has_no_place():
    rows = [*cell(0.4, state_bytes=0), *cell(0.5, state_bytes=4096, model="gla"), *cell(0.6, state_bytes=8192, model="mamba")]
    plot = only(rows, STATE)
    assert [c.label for c in plot.panels[0].curves] == ["gla", "mamba"]
    assert "left out, no state_bytes above 0: hgrn2 (ok)" in plot.notes
    linear = Figure("linear", "memory", "state_bytes", "state", "accuracy")
    assert curves(rows, linear)["hgrn2"] == [(0, 0.4)]


# what did not go well


def test_failures_are_counted_and_are_the_worst_value():
    one = [r for seed in (0, 1) for r in widths(0.8 + seed / 10, 0.9, seed=seed)]
    one += [failed("diverged", "nan", settings={"d_model": d}, seed=2, task="len64_kv4") for d in (64, 128)]
    plot = only(one, WIDTH)
    (curve,) = plot.panels[0].curves
    assert [(p.median, p.failed, p.learned) for p in curve.points] == [(0.8, 1, True), (0.9, 1, True)]
    assert "2 of 6 runs came to nothing (2 diverged); they count as the worst value" in plot.notes


def test_a_point_most_of_whose_runs_failed_has_no_median():
    rows = [*widths(0.8, 0.9), *(failed("oom", "no memory", settings={"d_model": 64}, seed=s, task="len64_kv4") for s in (1, 2))]
    plot = only(rows, WIDTH)
    assert [(p.median, p.learned, p.failed) for p in plot.points] == [(None, False, 2), (0.9, True, 0)]
    assert "1 of 2 points lack a seed" in plot.notes


def test_a_median_at_the_floor_has_not_learned():
    assert [p.learned for p in only(widths(0.31, 0.5), WIDTH).points] == [False, True]


def test_the_floor_that_counts_comes_first():
    floors = {"uniform": 0.06, "recall-free guess": 0.31}
    assert list(panel(widths(0.5, 0.6, floors=floors), WIDTH).floors) == ["recall-free guess", "uniform"]
    lower = panel(widths(0.5, 0.6, floors=floors, higher_is_better=False), WIDTH, higher_is_better=False)
    assert list(lower.floors) == ["uniform", "recall-free guess"]


@pytest.mark.parametrize(
    ("rows", "figure", "why"),
    [
        (widths(0.5), WIDTH, "only d_model 64"),
        (widths(0.5, 0.6), RATE, "only lr 0.001"),
        (cell(0.5), LONGER, "only length 1"),
        ([failed("oom", "no memory", state_bytes=None)], STATE, "no state_bytes"),
        (widths(0.5, 0.6), Figure("odd", "t", "no_such_key", "x", "accuracy"), "no no_such_key"),
    ],
)
def test_a_figure_with_nothing_to_compare_is_a_line_that_says_why(rows, figure, why):
    made, missing = make_plots(rows, protocol(figure))
    assert made == []
    assert missing == [f"no mqar_smoke_v1_float32_{figure.name}: its rows give {why}"]


def test_one_figure_lacks_nothing_because_another_does():
    made, missing = make_plots(widths(0.5, 0.6), protocol(RATE, WIDTH))
    assert [p.figure.name for p in made] == ["width"]
    assert len(missing) == 1


def test_models_that_the_source_did_not_run_are_called_our_extension():
    presets = {"smoke": Preset("s", "theirs", ("model=hgrn2",), {"len64_kv4": ()}, source_models=("hgrn2",))}
    notes = only([*widths(0.5, 0.6), *widths(0.5, 0.6, model="gla")], WIDTH, presets=presets).notes
    assert "our extension of the protocol: gla" in notes


# published values


ZOOLOGY = {k: v[0] for k, v in preset_settings("mqar", "zoology", "len64_kv4", "attention").items() if k not in ("d_model", "dtype")}
THEIRS = {"model": "attention", "preset": "zoology"}


def repeating(*tables):
    return {"zoology": Preset("s", "theirs", ("model=attention",), {"len64_kv4": ()}, tables)}


@pytest.mark.parametrize(("tables", "values"), [(("zoology_figure2",), [1.0, None]), ((), [None, None])])
def test_published_values_stand_beside_ours_only_where_the_preset_repeats_their_protocol(tables, values):
    plot = only(widths(0.9, 0.95, settings=ZOOLOGY, **THEIRS), WIDTH, presets=repeating(*tables))
    assert [p.published for p in plot.points] == values
    assert ("published values: zoology_figure2" in plot.notes) == bool(tables)
    rates = [r for lr in (1e-3, 1e-2) for r in cell(0.9, settings=ZOOLOGY | {"lr": lr, "d_model": 64}, **THEIRS)]
    assert [p.published for p in only(rates, RATE, presets=repeating(*tables)).points] == [None, None]


def test_published_values_are_of_the_test_split_and_of_this_protocol_version():
    presets = repeating("zoology_figure2")
    beyond = Figure("odd", "t", "d_model", "x", "accuracy", splits={"test": 1, "test_len2x": 2})
    rows = cell(0.9, settings=ZOOLOGY | {"d_model": 64}, beyond={"test_len2x": 0.5}, **THEIRS)
    assert [p.published for p in only(rows, beyond, presets=presets).points] == [1.0, None]
    theirs = widths(0.9, 0.9, settings=ZOOLOGY, **THEIRS)
    assert [p.published for p in only(theirs, WIDTH, presets=presets, version=2).points] == [None, None]


@pytest.mark.parametrize("departs", [{"num_layers": 4}, {"epochs": 1}, {"attention.dropout": 0.0}])
def test_published_values_stand_beside_no_row_that_departs_from_its_preset(departs):
    rows = widths(0.9, 0.9, settings=ZOOLOGY | departs, **THEIRS)
    assert [p.published for p in only(rows, WIDTH, presets=repeating("zoology_figure2")).points] == [None, None]


# the numbers as csv


def test_csv_holds_every_run_that_is_drawn():
    rows = [r for seed in (0, 1) for r in widths(0.5 + seed / 10, 0.8, seed=seed)] + widths(0.7, 0.9, model="gla", settings={"conv": 0})
    rows.append(failed("oom", "no memory", settings={"d_model": 128, "conv": 0}, model="gla", task="len64_kv4", seed=1))
    plot = only(rows, WIDTH)
    lines = list(csv.DictReader(io.StringIO(points_csv(plot))))
    assert len(lines) == 7
    assert len({line["cell"] for line in lines}) == 7
    first = next(line for line in lines if (line["model"], line["d_model"], line["seed"]) == ("hgrn2", "64", "1"))
    assert (first["panel"], first["status"], first["learned"], first["lr"]) == ("len64_kv4", "ok", "True", "0.001")
    numbers = [float(first[key]) for key in ("value", "median", "lowest", "highest", "floor: recall-free guess")]
    assert numbers == pytest.approx([0.6, 0.55, 0.5, 0.6, 0.31])
    lost = next(line for line in lines if line["status"] == "oom")
    assert (lost["value"], lost["median"], lost["lowest"]) == ("", "", "0.9")


def test_rows_in_any_order_give_the_same_figure():
    rows = [*widths(0.5, 0.6), *widths(0.7, 0.8, model="gla"), *widths(0.1, 0.2, task="len128_kv8", seed=3)]
    one, other = only(rows, WIDTH), only(rows[::-1], WIDTH)
    assert points_csv(one) == points_csv(other)
    assert one.notes == other.notes


def test_names_sort_by_the_numbers_in_them():
    assert sorted(["d 128", "d 64", "d 2.5", "c 9", "d"], key=natural) == ["c 9", "d", "d 2.5", "d 64", "d 128"]
