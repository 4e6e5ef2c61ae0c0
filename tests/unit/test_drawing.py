"""Figures on paper: files, the same bytes again, one line per curve, looks that tell curves apart."""

import csv
import dataclasses
import itertools

import pytest
from test_figures import LONGER, RATE, STATE, WIDTH, cell, only, widths
from test_results import failed

from hgrn2_bench.drawing import FADED, MARKERS, SETTINGS, curve_styles, draw, model_styles
from hgrn2_bench.figures import points_csv

MANY = [f"model{i}" for i in range(16)]


def busy_rows():
    """Three seeds of two models with a grid, a failure, a median at the floor, and splits beyond training."""
    rows = [
        each
        for model, high in (("gla", 0.32), ("hgrn2", 1.0))
        for d, lr, seed, task in itertools.product((64, 128), (1e-3, 1e-2), (0, 1, 2), ("len64_kv4", "len128_kv8"))
        for each in cell(
            high * (0.9 if lr == 1e-3 else 0.8),
            settings={"d_model": d, "lr": lr},
            model=model,
            seed=seed,
            task=task,
            state_bytes=d * 128,
            beyond={"test_len2x": high * 0.6},
        )
    ]
    return [*rows, failed("oom", "no memory", settings={"d_model": 256}, model="gla", task="len64_kv4", state_bytes=32_768)]


def page_of(plot, models=("gla", "hgrn2")):
    """The drawn page, before it is saved."""
    matplotlib = pytest.importorskip("matplotlib")
    from hgrn2_bench.drawing import _page

    with matplotlib.rc_context(SETTINGS):
        return _page(plot, curve_styles(plot, models))


@pytest.mark.parametrize("figure", [WIDTH, RATE, LONGER, STATE])
def test_a_figure_is_a_png_and_an_svg_with_the_same_bytes_every_time(figure, tmp_path):
    pytest.importorskip("matplotlib")
    plot = only(busy_rows(), figure)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        names = [path.name for path in draw(plot, ["gla", "hgrn2"], tmp_path / folder)]
    assert names == [f"{plot.stem}.png", f"{plot.stem}.svg"]
    for name in names:
        content = (tmp_path / "one" / name).read_bytes()
        assert content == (tmp_path / "two" / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n" or b"<svg" in content
        assert b"<dc:date>" not in content


@pytest.mark.parametrize("figure", [WIDTH, RATE, LONGER, STATE])
def test_every_panel_has_one_line_per_curve_in_its_place(figure):
    plot = only(busy_rows(), figure)
    axes = [ax for ax in page_of(plot).axes if ax.axison]
    assert [ax.get_title(loc="left") for ax in axes] == [panel.title for panel in plot.panels]
    for ax, panel in zip(axes, plot.panels, strict=True):
        lines = [line for line in ax.lines if not line.get_label().startswith("_")]
        assert [line.get_label() for line in lines] == [curve.label for curve in panel.curves]
        for line, curve in zip(lines, panel.curves, strict=True):
            assert list(line.get_xdata()) == [point.x for point in curve.points]
            drawn = [y for y in line.get_ydata() if y == y]
            assert drawn == [point.median for point in curve.points if point.learned]


@pytest.mark.parametrize("log_y", [True, False])
def test_what_is_no_fraction_fits_a_scale_of_its_own_in_each_panel(log_y):
    slow, fast = (("len64_kv4", 3e-4), ("len128_kv8", 5e3))
    rows = [
        each
        for (task, scale), d, model in itertools.product((slow, fast), (64, 128), ("gla", "hgrn2"))
        for each in cell(scale * d, settings={"d_model": d}, model=model, task=task, unit="s")
    ]
    axes = [ax for ax in page_of(only(rows, dataclasses.replace(WIDTH, log_y=log_y))).axes if ax.axison]
    for ax, scale in zip(axes, (3e-4, 5e3), strict=True):
        low, high = ax.get_ylim()
        assert low < 64 * scale < 128 * scale < high < 1000 * scale
    if log_y:
        assert [ax.yaxis.get_major_formatter()(value) for ax, value in zip(axes, (3e-2, 5e5), strict=True)] == ["30m", "500k"]


def test_an_empty_place_of_the_grid_stays_blank():
    rows = [*busy_rows(), *(r for lr in (1e-3, 1e-2) for r in cell(0.5, settings={"d_model": 512, "lr": lr}))]
    plot = only(rows, RATE)
    assert [[panel is None for panel in row] for row in plot.grid][-1] == [False, True]
    assert [ax.axison for ax in page_of(plot).axes][-2:] == [True, False]


def test_what_has_not_learned_is_faded_and_what_failed_is_a_cross_at_the_bottom():
    ax = page_of(only(busy_rows(), WIDTH)).axes[0]
    faded = [line for line in ax.lines if line.get_alpha() == FADED]
    assert [list(line.get_ydata())[:2] for line in faded] == [pytest.approx([0.288, 0.288]), pytest.approx([0.9, 0.9])]
    (cross,) = [line for line in ax.lines if line.get_marker() == "x"]
    assert list(cross.get_xdata()) == [256]
    assert 0 < cross.get_ydata()[0] < 0.1


def test_the_legends_name_every_curve_and_every_mark_that_is_there():
    page = page_of(only(busy_rows(), RATE))
    curves, marks = [[text.get_text() for text in legend.get_texts()] for legend in page.legends]
    assert curves == ["gla", "hgrn2"]
    assert "large marker: chosen lr" in marks
    assert "faded: median not above the floor" in marks
    assert "floor: recall-free guess" in marks
    quiet = page_of(only(widths(0.5, 0.6), WIDTH), ["hgrn2"])
    assert [[text.get_text() for text in legend.get_texts()] for legend in quiet.legends] == [["hgrn2"], ["floor: recall-free guess"]]


def test_title_legends_and_notes_do_not_overlap_the_panels():
    rows = [r for i, model in enumerate(MANY) for c in (0, 4) for r in widths(0.5, 0.4 + i / 30, model=model, settings={"conv": c})]
    page = page_of(only(rows, WIDTH), MANY)
    page.canvas.draw()
    renderer = page.canvas.get_renderer()
    panels = [ax.get_tightbbox(renderer) for ax in page.axes]
    boxes = [
        *panels,
        *(legend.get_window_extent(renderer) for legend in page.legends),
        *(t.get_window_extent(renderer) for t in page.texts),
    ]
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= page.bbox.width
        assert 0 <= box.y0 < box.y1 <= page.bbox.height
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


def test_a_models_look_is_the_same_in_every_figure():
    models = ["attention", "gla", "hgrn2"]
    alone = curve_styles(only(widths(0.5, 0.6), WIDTH), models)
    beside = curve_styles(only([*widths(0.5, 0.6), *widths(0.5, 0.6, model="gla")], WIDTH), models)
    assert alone["hgrn2"] == beside["hgrn2"] == model_styles(models)["hgrn2"]


def test_models_differ_in_the_pair_of_colour_and_marker():
    looks = model_styles([f"model{i}" for i in range(70)]).values()
    assert len({(look.colour, look.marker) for look in looks}) == 70
    assert len({look.marker for look in list(looks)[: len(MARKERS)]}) == len(MARKERS)


def test_curves_of_one_model_share_its_marker_and_differ_in_pattern_or_shade():
    rows = [r for n in range(14) for r in widths(0.5, 0.6, settings={"forget_bias": float(n)})]
    looks = curve_styles(only(rows, WIDTH), ["hgrn2"]).values()
    assert len({look.marker for look in looks}) == 1
    assert len({(look.colour, str(look.pattern)) for look in looks}) == 14


def test_csv_beside_the_figure_holds_the_medians_that_are_drawn():
    plot = only(busy_rows(), WIDTH)
    written = {
        (line["panel"], line["model"], float(line["d_model"])): line["median"] for line in csv.DictReader(points_csv(plot).splitlines())
    }
    for ax in page_of(plot).axes:
        for line in ax.lines:
            if line.get_label() == "hgrn2":
                for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
                    assert float(written[ax.get_title(loc="left"), "hgrn2", x]) == y
