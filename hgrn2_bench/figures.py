"""Rows to figures: a pure function of the rows and of the figures that the suite's protocol declares. `drawing.py` puts them on paper.

A figure holds one preset, protocol version, precision and match, as a table does, with one column of panels per task (and data). A point is
a line of a table: all seeds of one model under one setting, the tuning grid reduced to its best value unless the figure runs over that
grid.
"""

import dataclasses
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hgrn2_bench import fairness
from hgrn2_bench.lines import (
    Line,
    Part,
    Run,
    as_published,
    best_lines,
    chosen_on,
    commits,
    comparable,
    floors_of,
    learned,
    looks_ahead,
    place_of,
    settings_of,
)
from hgrn2_bench.protocol import Figure, Protocol
from hgrn2_bench.published import reproduced
from hgrn2_bench.render import Column, Table, render, short
from hgrn2_bench.results import Row


@dataclass(frozen=True)
class Point:
    """One line of a table at its place on the horizontal axis."""

    x: float
    line: Line
    chosen: bool
    """Whether the selection split chose this value of the tuning grid."""
    published: float | None
    """What was published for it, where the preset repeats that protocol."""

    @property
    def median(self) -> float | None:
        """Over seeds, a failed run counting as the worst; None where that makes it infinite."""
        return self.line.middle if math.isfinite(self.line.middle) else None

    @property
    def learned(self) -> bool:
        """Whether the median beats the floors."""
        return learned(self.line)

    @property
    def failed(self) -> int:
        """Runs without a value."""
        return len(self.line.runs) - len(self.line.finished)


@dataclass(frozen=True)
class Curve:
    """Points that are joined, from left to right."""

    model: str
    settings: str
    """What sets this curve apart from others of its model; empty where it is the only one."""
    points: tuple[Point, ...]

    @property
    def label(self) -> str:
        """The model with its settings."""
        return f"{self.model}, {self.settings}" if self.settings else self.model


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    curves: tuple[Curve, ...]
    floors: Mapping[str, Mapping[float, float]]
    """Each floor's value at every x, the floor that counts first."""


@dataclass(frozen=True)
class Plot:
    """One figure, ready to draw."""

    figure: Figure
    stem: str
    """Its file name without ending."""
    title: str
    subtitle: str
    y_label: str
    unit: str
    grid: tuple[tuple[Panel | None, ...], ...]
    """Rows of panels; None where a task lacks a row's setting."""
    notes: tuple[str, ...]

    @property
    def panels(self) -> list[Panel]:
        """All panels, row by row."""
        return [panel for row in self.grid for panel in row if panel]

    @property
    def points(self) -> list[Point]:
        """All points, panel by panel."""
        return [point for panel in self.panels for curve in panel.curves for point in curve.points]

    @property
    def whole_grid(self) -> bool:
        """Whether the figure shows a tuning grid, so that the chosen values want a mark."""
        return any(not point.chosen for point in self.points)


@dataclass(frozen=True)
class _Place:
    """A panel's place in the grid: the number of its part, and its value of the setting that makes rows."""

    column: int
    row: Any


def make_plots(rows: Iterable[Row], protocol: Protocol) -> tuple[list[Plot], list[str]]:
    """Every figure that the rows of one suite give, and a line for each that they do not."""
    rows = list(rows)
    plots, skipped = [], []
    for figure in protocol.figures:
        groups: dict[tuple[Any, ...], list[Part]] = defaultdict(list)
        for part in comparable(rows, protocol, figure.metric):
            groups[place_of(part.runs[0].row, protocol)].append(part)
        for key in sorted(groups):
            made = _plot(figure, groups[key], protocol)
            plots += [made] if isinstance(made, Plot) else []
            skipped += [made] if isinstance(made, str) else []
    return plots, skipped


def _plot(figure: Figure, parts: Sequence[Part], protocol: Protocol) -> Plot | str:
    """The figure of parts that may stand side by side, or why there is none."""
    first = parts[0].runs[0].row
    words = [first.suite, first.preset, f"v{first.protocol_version}", first.dtype, *([first.device_name] if protocol.speed else [])]
    words += [" ".join(map(str, fairness.match_of(first)))] * bool(fairness.matched(first))
    stem = "_".join(re.sub(r"[^\w.-]+", "-", word) for word in (*words, figure.name))
    if refusal := fairness.refusal([run.row for part in parts for run in part.runs]):
        return f"no {stem}: {refusal}"
    parts = _in_order(parts, protocol)
    places, lost = _placed(figure, parts, protocol)
    tried = [{point.x for point in points} for points in places.values()]
    if max(map(len, tried), default=0) < 2:
        only = ", ".join(map(short, sorted(set().union(*tried))))
        return f"no {stem}: its rows give {f'only {figure.x} {only}' if only else f'no {figure.x}'}"
    names = _Names(list(places.values()), figure, protocol)
    panels = {place: names.panel(_heading(parts[place.column], figure, place.row), points) for place, points in places.items()}
    columns = sorted({place.column for place in places})
    rows = sorted({place.row for place in places}, key=lambda value: natural(short(value)))
    points = [point for found in places.values() for point in found]
    return Plot(
        figure=figure,
        stem=stem,
        title=f"{first.suite}, preset {first.preset}: {figure.title}",
        subtitle=_subtitle([run.row for part in parts for run in part.runs]),
        y_label=f"{figure.metric} ({first.unit})",
        unit=first.unit,
        grid=tuple(tuple(panels.get(_Place(column, row)) for column in columns) for row in rows),
        notes=(*([figure.note] if figure.note else []), *_notes(points, figure, protocol), *names.notes(), *_lost(lost, figure)),
    )


def _in_order(parts: Sequence[Part], protocol: Protocol) -> list[Part]:
    """Parts in the order of their preset's tasks; tasks of the user's own follow."""
    preset = protocol.presets.get(parts[0].runs[0].row.preset)
    order = list(preset.tasks) if preset else []
    return sorted(parts, key=lambda part: (order.index(part.task) if part.task in order else len(order), natural(part.task)))


def _placed(figure: Figure, parts: Sequence[Part], protocol: Protocol) -> tuple[dict[_Place, list[Point]], list[Line]]:
    """The points of each panel, and the lines that have none."""
    places: dict[_Place, list[Point]] = defaultdict(list)
    lost = []
    for column, part in enumerate(parts):
        for line, points in _points(part, figure, protocol):
            lost += [] if points else [line]
            for point in points:
                places[_Place(column, line.first.settings.get(figure.rows))].append(point)
    return dict(places), lost


def natural(text: str) -> list[tuple[int, float, str]]:
    """A sorting key by which `d_model 64` comes before `d_model 128`."""
    pieces = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(piece), "") if i % 2 else (1, 0.0, piece) for i, piece in enumerate(pieces)]


def _points(part: Part, figure: Figure, protocol: Protocol) -> list[tuple[Line, list[Point]]]:
    """Each line of a part with its points: one, or one for each split."""
    chosen = {run.row.cell for line in best_lines(part.runs, protocol) for run in line.runs}
    grid = dataclasses.replace(protocol, tuned=tuple(key for key in protocol.tuned if key != figure.x))
    found = []
    for line in best_lines(part.runs, grid):
        quoted = figure.x in line.first.settings and figure.x not in protocol.tuned  # else its place on the axis was not published
        points = [
            Point(x, at, all(run.row.cell in chosen for run in at.runs), reproduced(at.first, protocol) if quoted else None)
            for x, at in _along(line, figure)
            if isinstance(x, int | float) and math.isfinite(x) and (x > 0 or not figure.log_x)
        ]
        found.append((line, points))
    return found


def _along(line: Line, figure: Figure) -> list[tuple[Any, Line]]:
    """A line at its place on the horizontal axis; where that runs over splits, the line's values on each. A failed run failed on all."""
    if not figure.splits:
        row = line.first
        return [(row.settings.get(figure.x, getattr(row, figure.x, None)), line)]
    found = []
    for split, x in figure.splits.items():
        runs = [Run(run.splits.get(split, run.row), run.splits) for run in line.runs if run.row.status != "ok" or split in run.splits]
        if any(run.value is not None for run in runs) or (runs and x == min(figure.splits.values())):
            found.append((x, dataclasses.replace(line, runs=tuple(runs))))
    return found


class _Names:
    """Which settings set the curves of a figure apart, alike in all of its panels."""

    def __init__(self, panels: Sequence[Sequence[Point]], figure: Figure, protocol: Protocol) -> None:
        self.hidden = {figure.x, *protocol.tuned}
        self.varying: dict[str, list[str]] = defaultdict(list)
        self.between: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for points in panels:
            self._compare(points)
        self.joined: dict[str, str] = {}
        for model, keys in self.varying.items():
            own = {key.removeprefix(f"{model}."): key for key in keys}
            along = next((own[name] for name in figure.joined if name in own), None)
            if along:
                self.joined[model] = along
                keys.remove(along)

    def _compare(self, points: Sequence[Point]) -> None:
        """Note the settings that differ in one panel, among the curves of one model and between models."""
        seen: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for point in points:
            for key, value in settings_of(point.line.first).items():
                if key not in self.hidden:
                    seen[key][point.line.first.model].add(json.dumps(value))
        for key, models in seen.items():
            for model, values in models.items():
                if len(values) > 1 and key not in self.varying[model]:
                    self.varying[model].append(key)
            if len(set().union(*models.values())) > 1 == max(map(len, models.values())) and key != "version":
                for model, values in models.items():
                    self.between[key][next(iter(values))].add(model)

    def panel(self, title: str, points: Sequence[Point]) -> Panel:
        """A panel's points as curves, sorted by name."""
        curves: dict[tuple[str, str], list[Point]] = defaultdict(list)
        floors: dict[str, dict[float, float]] = defaultdict(dict)
        for point in points:
            row = point.line.first
            settings = settings_of(row)
            words = [f"{key.removeprefix(f'{row.model}.')} {short(settings.get(key))}" for key in self.varying[row.model]]
            words += ["not causal"] if looks_ahead(row) else []
            curves[row.model, ", ".join(words)].append(point)
            for name, value in floors_of(row).items():
                floors[name][point.x] = value
        made = [Curve(*key, tuple(sorted(curves[key], key=lambda p: p.x))) for key in sorted(curves, key=lambda k: (k[0], natural(k[1])))]
        sign = -1 if points[0].line.first.higher_is_better else 1
        return Panel(title, tuple(made), dict(sorted(floors.items(), key=lambda item: sign * max(item[1].values()))))

    def notes(self) -> list[str]:
        """What is not the same for all models, and along which settings points are joined."""
        notes = []
        for key, values in sorted(self.between.items()):
            groups = sorted(values.items(), key=lambda item: (-len(item[1]), item[0]))
            rare = [f"{short(json.loads(value))} for {', '.join(sorted(models))}" for value, models in groups[1:]]
            notes.append(f"{key} {short(json.loads(groups[0][0]))}, but {'; '.join(rare)}")
        along: dict[str, list[str]] = defaultdict(list)
        for model, key in sorted(self.joined.items()):
            along[key.rpartition(".")[2]].append(model)
        if len(along) == 1 and len(self.joined) == len(self.varying):
            return [*notes, f"joined along {next(iter(along))}"]
        return notes + [f"joined along {key}: {', '.join(models)}" for key, models in sorted(along.items())]


def _heading(part: Part, figure: Figure, row: Any) -> str:
    words = [part.task, *([part.which] if part.which else []), *([f"{figure.rows} {short(row)}"] if figure.rows else [])]
    return ", ".join(words)


def _subtitle(rows: Sequence[Row]) -> str:
    devices = sorted({f"{row.device} ({row.device_name})" for row in rows})
    words = [rows[0].dtype, *devices, f"backend {', '.join(sorted({row.backend for row in rows}))}"]
    return ", ".join([*words, *filter(None, [fairness.matched(rows[0])])])


def _notes(points: Sequence[Point], figure: Figure, protocol: Protocol) -> list[str]:
    """Where the numbers come from; then what a reader must know about them."""
    runs = {run.row.cell: run.row for point in points for run in point.line.runs}.values()
    seeds = sorted({row.seed for row in runs})
    origin = [f"protocol version {points[0].line.first.protocol_version}", f"commit {commits(runs)}"]
    notes = ["; ".join([*origin, f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}", *_selection(points, figure, protocol)])]
    failures = Counter(row.status for row in runs if row.status != "ok")
    if failures:
        kinds = ", ".join(f"{n} {status}" for status, n in sorted(failures.items()))
        notes.append(f"{sum(failures.values())} of {len(runs)} runs came to nothing ({kinds}); they count as the worst value")
    short_of = sum({run.row.seed for run in point.line.runs} != set(seeds) for point in points)
    if short_of:
        notes.append(f"{short_of} of {len(points)} points lack a seed")
    edges = Counter(key for point in points for key in point.line.edge)
    notes += [f"best {key} at the edge of its grid at {n} of {len(points)} points" for key, n in edges.items()]
    preset = protocol.presets.get(points[0].line.first.preset)
    if preset and any(point.published is not None for point in points):
        notes.append(f"published values: {', '.join(preset.reproduces)}")
    extension = sorted({row.model for row in runs} - set(preset.source_models)) if preset and preset.source_models else []
    return notes + ([f"our extension of the protocol: {', '.join(extension)}"] if extension else [])


def _selection(points: Sequence[Point], figure: Figure, protocol: Protocol) -> list[str]:
    """How each tuned key was chosen, or the value that all runs share."""
    rows = [run.row for point in points for run in point.line.runs]
    words = []
    for key in protocol.tuned:
        values = {json.dumps(row.settings.get(key)) for row in rows}
        if key == figure.x or any(point.line.searched for point in points):
            words.append(f"{key} chosen on {chosen_on(rows)}{as_published(rows)}")
        elif len(values) == 1:
            words.append(f"{key} {short(json.loads(next(iter(values))))}")
    return words


def _lost(lines: Sequence[Line], figure: Figure) -> list[str]:
    """Lines that have no place on the horizontal axis, by model and outcome."""
    names = sorted({f"{line.first.model} ({line.first.status})" for line in lines})
    return [f"left out, no {figure.x}{' above 0' if figure.log_x else ''}: {', '.join(names)}"] if names else []


def points_csv(plot: Plot) -> str:
    """The numbers of a figure, one line per run, as csv text."""
    floors = list(dict.fromkeys(name for panel in plot.panels for name in panel.floors))
    tuned = list(dict.fromkeys(key for point in plot.points for key in point.line.tuned if key != plot.figure.x))
    names = ["panel", "model", "settings", plot.figure.x, "seed", "status", "value", "median", "lowest", "highest"]
    names += ["learned", "chosen", *tuned, "at the edge", "published", *(f"floor: {name}" for name in floors), "cell"]
    body = []
    for panel in plot.panels:
        for curve in panel.curves:
            for point in curve.points:
                known = point.line.finished
                spread: list[Any] = [point.median, min(known, default=None), max(known, default=None), point.learned, point.chosen]
                spread += [*(point.line.tuned[key] for key in tuned), " ".join(point.line.edge), point.published]
                spread += [panel.floors.get(name, {}).get(point.x) for name in floors]
                for run in point.line.runs:
                    seed = [panel.title, curve.model, curve.settings, point.x, run.row.seed, run.row.status, run.value]
                    body.append((*seed, *spread, run.row.cell))
    return render(Table(plot.title, tuple(map(Column, names)), tuple(body), ()), "csv")
