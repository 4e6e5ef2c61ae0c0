"""Figures on paper: PNG and SVG by matplotlib, the same bytes for the same rows. Sizes in inches, text in points."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hgrn2_bench.figures import Curve, Panel, Plot, natural
from hgrn2_bench.render import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette for colour-blind readers, without its yellow, which is lost on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "<", ">", "p", "h", "d")
"""More than colours, and their numbers share no factor, so that 77 models differ in the pair."""
PATTERNS: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 3)))
FADED = 0.4
PUBLISHED, NOT_CHOSEN = 9.0, 2.5
"""Marker sizes: wide enough to surround a median's; small enough to let the chosen ones stand out."""
GREY = "#666666"
PANEL_WIDTH, PANEL_HEIGHT = 2.5, 1.9
LEFT, RIGHT, TOP, GAP = 0.62, 0.12, 0.6, 0.62
TITLE_LINE, LEGEND_LINE, NOTE_LINE = 0.17, 0.137, 0.119
TITLE_CHARACTER, LEGEND_CHARACTER, NOTE_CHARACTER = 0.088, 0.06, 0.055
"""Widths of a mean character, to break lines by."""
SHIFT = 4.0
"""Points by which the first and the last curve of a panel are moved sideways, so that equal values do not hide each other."""
MARGIN = 0.08
"""Share of the horizontal axis left free on either side."""
SETTINGS = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine has it
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "lines.markersize": 5,
    "legend.handlelength": 2.6,
    "svg.hashsalt": "hgrn2_bench",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Style:
    """How one curve looks."""

    colour: str
    marker: str
    pattern: Any


def model_styles(models: Sequence[str]) -> dict[str, Style]:
    """A look for each model, the same in every figure that is drawn for these models."""
    looks = (
        (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], PATTERNS[i // len(COLOURS) % len(PATTERNS)]) for i in range(len(models))
    )
    return {model: Style(*look) for model, look in zip(models, looks, strict=True)}


def curve_styles(plot: Plot, models: Sequence[str]) -> dict[str, Style]:
    """A look for each curve's label: its model's, with a line pattern of its own among that model's curves, darker when these run out."""
    looks = model_styles(models)
    found: dict[str, Style] = {}
    for model in models:
        labels = dict.fromkeys(curve.label for panel in plot.panels for curve in panel.curves if curve.model == model)
        for nth, label in enumerate(sorted(labels, key=natural)):
            first = PATTERNS.index(looks[model].pattern)
            pattern = PATTERNS[(first + nth) % len(PATTERNS)]
            found[label] = Style(_darker(looks[model].colour, nth // len(PATTERNS)), looks[model].marker, pattern)
    return found


def _darker(colour: str, times: int) -> str:
    """A colour `#rrggbb`, darker by two fifths each time."""
    parts = (round(int(colour[i : i + 2], 16) * 0.6**times) for i in (1, 3, 5))
    return "#" + "".join(f"{part:02X}" for part in parts)


def draw(plot: Plot, models: Sequence[str], folder: Path) -> list[Path]:
    """Write one figure as PNG and SVG and return their paths. `models` are all that any of the figures shows: they fix the colours."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        return _save(_page(plot, curve_styles(plot, models)), folder / plot.stem)


def _page(plot: Plot, styles: Mapping[str, Style]) -> "Figure":
    """From the top: title, panels, the legend of curves, that of marks, notes. Every height is counted, so that nothing overlaps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = len(plot.grid), len(plot.grid[0])
    width = LEFT + RIGHT + PANEL_WIDTH * max(2, size[1])
    curves, marks = _entries(plot, styles)
    title = textwrap.wrap(plot.title, int(width / TITLE_CHARACTER))
    aside = f"curves are moved sideways by at most {SHIFT:g} points, so that equal values do not hide each other"
    notes = [line for note in (*plot.notes, aside) for line in textwrap.wrap(note, int((width - 0.2) / NOTE_CHARACTER))]
    top = TOP + TITLE_LINE * len(title)
    foot = 0.15 + NOTE_LINE * len(notes)
    middle = foot + 0.08 + LEGEND_LINE * _lines(marks, width)
    bottom = middle + 0.45 + LEGEND_LINE * _lines(curves, width)
    height = top + bottom + (PANEL_HEIGHT + GAP) * size[0] - GAP
    page = Figure(figsize=(width, height))
    FigureCanvasAgg(page)
    shared = plot.unit == "fraction"  # speeds of different work do not fit one scale
    axes = page.subplots(*size, squeeze=False, sharey=shared)
    edges = {"left": LEFT / width, "right": 1 - RIGHT / width, "top": 1 - top / height, "bottom": bottom / height}
    page.subplots_adjust(**edges, wspace=0.12 if shared else 0.28, hspace=GAP / PANEL_HEIGHT)
    _panels(plot, axes, styles)
    page.text(0.1 / width, 1 - 0.1 / height, "\n".join(title), va="top", fontsize=9.5, weight="bold")
    page.text(0.1 / width, 1 - (0.13 + TITLE_LINE * len(title)) / height, plot.subtitle, va="top", color=GREY)
    page.text(0.1 / width, 0.1 / height, "\n".join(notes), va="bottom", color=GREY, fontsize=6.8, linespacing=1.25)
    for handles, at in ((curves, middle), (marks, foot)):
        look: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.1 / width, at / height), "borderaxespad": 0, "borderpad": 0}
        page.legend(handles=handles, ncols=_columns(handles, width), frameon=False, labelspacing=0.3, columnspacing=1.2, **look)
    return page


def _columns(handles: Sequence[Any], width: float) -> int:
    """Columns of a legend that fit the page's width, at least one."""
    each = 0.5 + LEGEND_CHARACTER * max((len(handle.get_label()) for handle in handles), default=1)
    return max(1, min(len(handles), int((width - 0.1) / each)))


def _lines(handles: Sequence[Any], width: float) -> int:
    return math.ceil(len(handles) / _columns(handles, width))


def _save(page: "Figure", stem: Path) -> list[Path]:
    """Both files, without dates or versions, which would change their bytes."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    page.savefig(paths[0], dpi=200, metadata={"Software": None})
    page.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths


def _panels(plot: Plot, axes: Any, styles: Mapping[str, Style]) -> None:
    """Fill the grid of axes; empty places stay blank."""
    for r, row in enumerate(plot.grid):
        for c, panel in enumerate(row):
            ax = axes[r][c]
            if panel is None:
                ax.set_axis_off()
                continue
            ax.set_title(panel.title, loc="left")
            if c == 0:
                ax.set_ylabel(plot.y_label)
            if r == len(plot.grid) - 1:
                ax.set_xlabel(plot.figure.x_label)
            _scales(ax, plot, panel)
            _floors(ax, panel)
            _curves(ax, panel, styles, plot.whole_grid)
            _crosses(ax, panel, styles)


def _scales(ax: "Axes", plot: Plot, panel: Panel) -> None:
    """Scales and ticks: a fraction is shown from 0 to 1 in all panels, anything else from the panel's least value to its largest."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    base = plot.figure.log_x
    tried = sorted({point.x for point in plot.points})
    low, high = tried[0], tried[-1]
    ratio, gap = (high / low) ** MARGIN, (high - low) * MARGIN
    if base:
        ax.set_xscale("log", base=base)
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(*((low / ratio, high * ratio) if base else (low - gap, high + gap)))
    if base == 2:
        ax.set_xticks(tried, [f"{x:g}" for x in tried])
        ax.xaxis.set_minor_locator(NullLocator())
    elif base:
        wide = math.log(high / low, base) > 1.7
        ax.xaxis.set_major_locator(LogLocator(base, subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        ax.xaxis.set_major_formatter(lambda x, _: count(x) if x >= 1 else f"{x:g}".replace("e-0", "e-"))
    if plot.unit == "fraction" and not plot.figure.log_y:
        ax.set_ylim(-0.04, 1.04)
        return
    points = [point for curve in panel.curves for point in curve.points]
    known = [y for point in points for y in (*point.line.finished, point.published) if y is not None]
    low, high = min(known, default=1.0), max(known, default=1.0)
    if plot.figure.log_y:
        ax.set_yscale("log")
        ax.set_ylim(low / 1.5, high * 1.5)
        ax.yaxis.set_major_formatter(lambda y, _: _prefixed(y))
        ax.yaxis.set_minor_formatter((lambda y, _: _prefixed(y)) if high / low < 10 else NullFormatter())
    else:
        gap = MARGIN * (high - low or abs(high) or 1.0)
        ax.set_ylim(low - gap, high + gap)


def _prefixed(value: float) -> str:
    """`300µ`, `20m`, `41.2k`: three digits and the prefix of a unit."""
    small = next(((factor, letter) for factor, letter in ((1e3, "m"), (1e6, "µ")) if value * factor >= 0.9995), None)
    return count(value) if value >= 1 or small is None else f"{value * small[0]:.3g}{small[1]}"


def _floors(ax: "Axes", panel: Panel) -> None:
    """Each floor as a broken line behind the curves, the one that counts dashed; across the panel where it is the same at every x."""
    for pattern, values in zip(_floor_patterns(panel), panel.floors.values(), strict=True):
        if len(set(values.values())) == 1:
            ax.axhline(next(iter(values.values())), color=GREY, linewidth=0.9, linestyle=pattern, zorder=1)
        else:
            ax.plot(sorted(values), [values[x] for x in sorted(values)], color=GREY, linewidth=0.9, linestyle=pattern, zorder=1)


def _floor_patterns(panel: Panel) -> list[Any]:
    return [(0, (4, 3)), *[(0, (1, 2))] * (len(panel.floors) - 1)][: len(panel.floors)]


def _curves(ax: "Axes", panel: Panel, styles: Mapping[str, Style], whole_grid: bool) -> None:
    """Each curve, moved sideways by its own few points."""
    from matplotlib.transforms import ScaledTranslation

    for i, curve in enumerate(panel.curves):
        points = SHIFT * (2 * i / (len(panel.curves) - 1) - 1) if len(panel.curves) > 1 else 0.0
        moved = ax.transData + ScaledTranslation(points / 72, 0, ax.figure.dpi_scale_trans)
        _spread(ax, curve, styles[curve.label], moved)
        _medians(ax, curve, styles[curve.label], moved, whole_grid)
        _published(ax, curve, styles[curve.label], moved)


def _spread(ax: "Axes", curve: Curve, style: Style, moved: "Transform") -> None:
    """Seeds as dots and their range as a band."""
    known = [point for point in curve.points if len(point.line.runs) > 1 and point.line.finished]
    lows, highs = [min(p.line.finished) for p in known], [max(p.line.finished) for p in known]
    ax.fill_between([p.x for p in known], lows, highs, color=style.colour, alpha=0.1, linewidth=0, transform=moved)
    for point in known:
        look: dict[str, Any] = {"s": 4, "linewidths": 0, "alpha": 0.6 if point.learned else FADED, "zorder": 2.5, "transform": moved}
        ax.scatter([point.x] * len(point.line.finished), point.line.finished, color=style.colour, **look)


def _medians(ax: "Axes", curve: Curve, style: Style, moved: "Transform", whole_grid: bool) -> None:
    """The median over seeds as a line with markers: full where it beats the floor, faded where not, broken where it failed."""
    xs = [point.x for point in curve.points]
    medians = [math.nan if point.median is None else point.median for point in curve.points]
    learned = [y if point.learned else math.nan for point, y in zip(curve.points, medians, strict=True)]
    look: dict[str, Any] = _look(style) | {"transform": moved}
    if whole_grid:
        look["markersize"] = NOT_CHOSEN
    ax.plot(xs, medians, alpha=FADED, zorder=2, **look)
    ax.plot(xs, learned, label=curve.label, zorder=3, **look)
    for point in curve.points:
        if whole_grid and point.chosen and point.median is not None:
            ax.plot([point.x], [point.median], alpha=None if point.learned else FADED, zorder=4, **_look(style), transform=moved)


def _look(style: Style) -> dict[str, Any]:
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.4}  # keeps markers apart that touch
    return {"color": style.colour, "marker": style.marker, "linestyle": style.pattern, **edge}


def _published(ax: "Axes", curve: Curve, style: Style, moved: "Transform") -> None:
    known = [(point.x, point.published) for point in curve.points if point.published is not None]
    hollow: dict[str, Any] = {"markersize": PUBLISHED, "markerfacecolor": "none", "linestyle": "none", "color": style.colour, "zorder": 4}
    if known:
        ax.plot([x for x, _ in known], [y for _, y in known], marker=style.marker, transform=moved, **hollow)


def _crosses(ax: "Axes", panel: Panel, styles: Mapping[str, Style]) -> None:
    """A cross for each point with failed runs, stacked from the bottom where several stand at one place."""
    levels: dict[float, int] = {}
    for curve in panel.curves:
        for point in curve.points:
            if point.failed:
                level = levels[point.x] = levels.get(point.x, 0) + 1
                place: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "clip_on": False, "zorder": 4}
                ax.plot([point.x], [0.05 * level - 0.02], "x", color=styles[curve.label].colour, markersize=4, **place)


def _entries(plot: Plot, styles: Mapping[str, Style]) -> tuple[list[Any], list[Any]]:
    """Legend entries: one per curve, and one for each kind of mark that the figure has."""
    from matplotlib.lines import Line2D

    def entry(label: str, **look: Any) -> Any:
        return Line2D([], [], label=label, **{"color": GREY, "linestyle": "none", **look})

    points = plot.points
    curves = [entry(label, **_look(style)) for label, style in styles.items()]
    marks = []
    if any(len(point.line.runs) > 1 for point in points):
        marks.append(entry("line: median, dots: seeds, band: range", marker="o", linestyle="-"))
    if any(point.median is not None and not point.learned for point in points):
        marks.append(entry("faded: median not above the floor", marker="o", linestyle="-", alpha=FADED))
    if plot.whole_grid:
        marks.append(entry(f"large marker: chosen {plot.figure.x}", marker="o"))
    if any(point.published is not None for point in points):
        marks.append(entry("large and hollow: published", marker="o", markersize=PUBLISHED, markerfacecolor="none"))
    if any(point.failed for point in points):
        marks.append(entry("cross: failed runs", marker="x", markersize=4))
    names = {name: pattern for panel in plot.panels for name, pattern in zip(panel.floors, _floor_patterns(panel), strict=True)}
    return curves, marks + [entry(f"floor: {name}", linestyle=pattern, linewidth=0.9) for name, pattern in names.items()]
