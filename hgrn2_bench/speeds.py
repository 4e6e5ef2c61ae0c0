"""Rows of a suite that times (`Protocol.speed`) to tables: a line for each model, a column for each size, repeats reduced to their median.

A table holds one task, metric, model size, preset, protocol version, precision and device. Nothing is ranked: what a cell could not do
(out of memory, no kernel) stands in its place.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hgrn2_bench.lines import commits, settings_of
from hgrn2_bench.protocol import Protocol
from hgrn2_bench.render import Column, Score, Table, byte_count, count, short
from hgrn2_bench.results import Row

SIZE = ("d_model", "num_layers")
"""What makes a model's size, in the title."""
SHOWN = {"tokens/s": count, "bytes": byte_count, "s": lambda value: duration(value), "FLOP/s": count, "bytes/s": byte_count}
"""How values of a unit are shown."""
TIMES = ("tokens_per_s", "latency")
"""Metrics beside which the share of the roofline is printed."""
STILL = ("state", "peak", "chunk_extra", "relative_error", "compile")
"""What does not come from the timed sample: whether that was steady says nothing of it."""
DERIVED = {
    "flops_per_s": ("FLOP/s", "algorithmic FLOP/s"),
    "bytes_per_s": ("bytes/s", "algorithmic bytes/s"),
    "roofline": ("share", "share of the roofline measured in the same process"),
    "chunk_extra": ("share", "work that chunks add, relative to the recurrent form"),
    "relative_error": ("error", "largest relative error against reference before timing"),
    "compile": ("s", "first call beyond a usual one: compiling and tuning kernels"),
}
"""What `--metric` shows beside the metrics of the rows: a detail's unit, and what it is."""


@dataclass(frozen=True)
class Entry:
    """One model at one size: its repeats."""

    rows: tuple[Row, ...]
    values: tuple[float, ...]
    """Of the repeats that have one."""

    @property
    def median(self) -> float | None:
        """Over repeats; None where one failed."""
        return statistics.median(self.values) if len(self.values) == len(self.rows) else None

    @property
    def spread(self) -> float:
        """Largest less smallest, relative to the median."""
        return (max(self.values) - min(self.values)) / statistics.median(self.values) if len(self.values) > 1 else 0.0

    @property
    def outcome(self) -> str:
        """The status of the first repeat that is not ok."""
        return next((row.status for row in self.rows if row.status != "ok"), "ok")

    def marks(self, metric: str) -> str:
        """`~` where a repeat never became steady, `!` where one is above the measured ceiling."""
        if metric in STILL:
            return ""
        unsteady = any(row.details.get("steady") is False for row in self.rows)
        return "~" * unsteady + "!" * any(row.details.get("above_ceiling") for row in self.rows)


def duration(value: float) -> str:
    """Seconds as `1.23 ms`, three digits."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= 0.9995 * factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def speed_tables(rows: Iterable[Row], protocol: Protocol, metric: str | None = None) -> list[Table]:
    """Every table that the rows give, tasks in alphabetical order: of `metric`, or of the first one that each task has."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in _newest(row for row in rows if protocol.across in row.settings):
        size = tuple(row.settings.get(key) for key in SIZE)
        groups[row.preset, row.task, size, row.protocol_version, row.dtype, row.device_name].append(row)
    tables = []
    for key in sorted(groups, key=str):
        alike = [k for k in groups if k[:3] == key[:3] and k != key]
        table = _table(groups[key], protocol, metric)
        if table:
            why = ("rows of another protocol version, precision or device are in a table of their own",) if alike else ()
            tables.append(Table(table.title, table.columns, table.lines, (*table.notes, *why)))
    return tables


def _newest(rows: Iterable[Row]) -> list[Row]:
    """The rows of each cell's newest run."""
    cells: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        cells[row.cell].append(row)
    return [row for same in cells.values() for row in same if row.time == max(r.time for r in same)]


def _table(rows: Sequence[Row], protocol: Protocol, asked: str | None) -> Table | None:
    """One table; None where no cell has the metric asked for."""
    held = dict.fromkeys(row.metric for row in rows if row.status == "ok")
    metric = asked or next(iter(held), protocol.metric)
    lines = _lines(rows, protocol.across, metric)
    if asked and not any(entry.values for line in lines.values() for entry in line.values()):
        return None
    sizes = sorted({size for line in lines.values() for size in line})
    first = next((e.rows[0] for line in lines.values() for e in line.values() if e.values), rows[0])
    unit, what = DERIVED.get(metric, (first.unit, metric))
    varying = _varying([next(iter(line.values())).rows[0] for line in lines.values()], protocol)
    show = SHOWN.get(unit, short3)
    columns = [Column("model"), *(Column(key, short) for key in varying), *(Column(f"{size:,}") for size in sizes)]
    columns += [Column("first calls", lambda value: "–" if value is None else duration(value))]
    columns += [Column(f"state at {max(sizes):,}", byte_count), Column("parameters", count), Column("kernel")]
    body = []
    for line in lines.values():
        row = next(iter(line.values())).rows[0]
        known = next((e.rows[0] for e in line.values() if e.values), row)
        kernel = known.details.get("kernel") or known.effective.get("kernel", "–")
        values = [_shown(line.get(size), show, metric) for size in sizes]
        cold = max((r.compile_s for entry in line.values() for r in entry.rows if r.step_s is not None), default=None)
        body.append(
            (
                named(row),
                *(settings_of(row).get(key) for key in varying),
                *values,
                cold,
                line[max(line)].rows[0].state_bytes,
                known.parameters,
                kernel,
            )
        )
    size_text = ", ".join(f"{key} {first.settings.get(key)}" for key in SIZE)
    title = f"{first.suite}, preset {first.preset}, {first.task}, {size_text}: {what} ({unit}) by {protocol.across}"
    return Table(title, tuple(columns), tuple(body), tuple(_notes(rows, lines, protocol, metric, varying)))


def named(row: Row) -> str:
    """The model, with the kernel that stands in for the one it was published with, where its mixer says so."""
    other = row.effective.get("stands_in")
    return f"{row.model} ({other})" if other else row.model


def short3(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


def _lines(rows: Sequence[Row], across: str, metric: str) -> dict[str, dict[Any, Entry]]:
    """For each model and setting its entries by size, in the order first seen."""
    cells: dict[str, dict[Any, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        kept = {k: v for k, v in settings_of(row).items() if k != across}
        of_metric = row.metric == metric or row.status != "ok" or metric in DERIVED
        if of_metric:
            cells[json.dumps([row.model, kept], sort_keys=True)][row.settings[across]].setdefault(row.cell, row)
    lines = {line: {size: _entry(list(same.values()), metric) for size, same in sizes.items()} for line, sizes in cells.items()}
    return dict(sorted(lines.items(), key=_best_first))


def _best_first(line: tuple[str, Mapping[Any, Entry]]) -> tuple[Any, ...]:
    """By the value at the largest size, those without one last, then by name."""
    name, entries = line
    last = entries[max(entries)]
    sign = -1 if last.rows[0].higher_is_better else 1
    return last.median is None, sign * (last.median or 0.0), name


def _entry(rows: Sequence[Row], metric: str) -> Entry:
    found = [_value(row, metric) for row in rows]
    return Entry(tuple(rows), tuple(value for value in found if value is not None))


def _value(row: Row, metric: str) -> float | None:
    if row.status != "ok":
        return None
    if metric == "compile":
        return row.compile_s
    value = row.details.get(metric) if metric in DERIVED else row.value
    return None if value is None else float(value)


def _shown(entry: Entry | None, show: Any, metric: str) -> Any:
    if entry is None:
        return "–"
    by_seed = {row.seed: _value(row, metric) for row in entry.rows}
    if entry.median is None:
        return Score(entry.outcome if entry.outcome != "ok" else "–", by_seed)
    shares = [share for row in entry.rows if (share := row.details.get("roofline")) is not None]
    share = f" ({statistics.median(shares):.0%})" if shares and metric in TIMES else ""
    return Score(show(entry.median) + share + entry.marks(metric), by_seed)


def _varying(firsts: Sequence[Row], protocol: Protocol) -> list[str]:
    """Settings in which the lines of one model differ."""
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in firsts:
        for key, value in settings_of(row).items():
            seen[key, row.model].add(json.dumps(value))
    hidden = {protocol.across, "seed"}
    return list(dict.fromkeys(key for (key, _), values in seen.items() if len(values) > 1 and key not in hidden))


def _notes(
    rows: Sequence[Row], lines: Mapping[str, Mapping[Any, Entry]], protocol: Protocol, metric: str, varying: Sequence[str]
) -> list[str]:
    entries = [entry for line in lines.values() for entry in line.values()]
    first = rows[0]
    repeats = max(len(entry.rows) for entry in entries)
    notes = [f"median of {repeats} repeats, models taking turns" if repeats > 1 else "one repeat"]
    widest = max(entries, key=lambda entry: entry.spread)
    if widest.spread:
        place = f"{widest.rows[0].model}, {protocol.across} {widest.rows[0].settings[protocol.across]}"
        notes[0] += f"; largest spread {widest.spread:.1%} ({place})"
    if metric in TIMES:
        notes.append("in parentheses the share of the roofline; first calls: seconds beyond usual ones, in which kernels compile")
    marks = "".join(entry.marks(metric) for entry in entries)
    notes += ["~ never became steady"] * ("~" in marks) + ["! above the ceiling measured in the same process"] * ("!" in marks)
    notes += _failures(entries, protocol.across)
    notes += _crossovers(lines, protocol, metric, varying)
    if first.device == "cpu":
        notes.append("measured on a CPU with the chunked kernels of pure PyTorch: says nothing about a GPU")
    notes += _card([row.details for row in rows])
    devices = sorted({f"{row.device_name} ({row.device}, {row.threads} thread{'s' * (row.threads > 1)})" for row in rows})
    backends = ", ".join(sorted({row.backend for row in rows}))
    where = f"protocol version {first.protocol_version}, {first.dtype}, backend {backends}, {'; '.join(devices)}"
    modes = sorted({str(row.details["mode"]) for row in rows if row.details.get("mode")})
    return [*notes, where + f", {' or '.join(modes)}" * bool(modes) + f", commit {commits(rows)}"]


def _failures(entries: Sequence[Entry], across: str) -> list[str]:
    """One line for each outcome and reason, with the models and the sizes; of memory that ran out also the last size that fitted."""
    bad = [entry for entry in entries if entry.outcome != "ok"]
    notes = []
    for model in dict.fromkeys(entry.rows[0].model for entry in bad):
        mine = [entry for entry in bad if entry.rows[0].model == model]
        reason = next(row for row in mine[0].rows if row.status != "ok")
        sizes = sorted({entry.rows[0].settings[across] for entry in mine})
        fitted = [e.rows[0].settings[across] for e in entries if e.rows[0].model == model and e.values]
        last = f"; the last that fitted: {max(fitted):,}" if reason.status == "oom" and fitted else ""
        notes.append(f"{model}, {across} {', '.join(f'{size:,}' for size in sizes)}: {reason.status}: {reason.reason}{last}")
    return notes


def _crossovers(lines: Mapping[str, Mapping[Any, Entry]], protocol: Protocol, metric: str, varying: Sequence[str]) -> list[str]:
    """From which size on the first of the pair is faster than each line of the second."""
    ours, theirs = protocol.beside
    if metric not in TIMES or not ours:
        return []
    named_lines = [(next(iter(line.values())).rows[0], line) for line in lines.values()]
    notes = []
    for mine, my_line in [pair for pair in named_lines if pair[0].model == ours]:
        for other, other_line in [pair for pair in named_lines if pair[0].model == theirs]:
            text = crossover(_speeds(my_line, metric), _speeds(other_line, metric))
            if text:
                own = [f"{key} {short(settings_of(other).get(key))}" for key in varying if key.startswith(f"{theirs}.")]
                notes.append(f"{mine.model} {text} {theirs}" + f" ({', '.join(own)})" * bool(own))
    return notes


def _speeds(line: Mapping[Any, Entry], metric: str) -> dict[Any, float]:
    """Larger is faster, whatever the metric."""
    known = {size: entry.median for size, entry in line.items() if entry.median}
    return {size: value if metric == "tokens_per_s" else 1 / value for size, value in known.items()}


def crossover(mine: Mapping[int, float], other: Mapping[int, float]) -> str:
    """`is faster from 4,096 on (equal near 3,100) than`; empty where the two share no size.

    Between two sizes the ratio is interpolated on logarithmic scales. Where the order changes more than once, the sizes are listed.
    """
    sizes = sorted(set(mine) & set(other))
    if not sizes:
        return ""
    ahead = [mine[size] > other[size] for size in sizes]
    changes = [i for i in range(1, len(sizes)) if ahead[i] != ahead[i - 1]]
    if not changes:
        return f"is {'faster' if ahead[0] else 'slower'} at every length measured than"
    if len(changes) > 1 or not ahead[-1]:
        return f"is faster at {', '.join(f'{size:,}' for size, yes in zip(sizes, ahead, strict=True) if yes)} only than"
    low, high = sizes[changes[0] - 1], sizes[changes[0]]
    below, above = (math.log(mine[size] / other[size]) for size in (low, high))
    equal = math.exp(math.log(low) + (math.log(high) - math.log(low)) * below / (below - above))
    return f"is faster from {high:,} on (equal near {equal:,.0f}) than"


def _card(details: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ceilings of the processes that measured, and what the driver said of the card."""
    notes = []
    tops = [(d["copy_ceiling"], d["matmul_ceiling"]) for d in details if "copy_ceiling" in d]
    if tops:
        copy, matmul = (statistics.median(column) for column in zip(*tops, strict=True))
        notes.append(f"ceilings measured beside it: copy {byte_count(copy)}/s, matrix product {count(matmul)}FLOP/s")
    cards = [d["gpu"] for d in details if d.get("gpu")]
    if cards:
        names = {"driver_version": "driver", "power.limit": "power cap (W)", "clocks.max.sm": "SM clock at most (MHz)"}
        told = [f"{name} {', '.join(sorted({str(card[key]) for card in cards if key in card}))}" for key, name in names.items()]
        notes.append("; ".join(told))
        if any(int(card.get("processes", 0)) > 1 for card in cards if str(card.get("processes", 0)).isdigit()):
            notes.append("the card was busy: other processes computed on it during some of these cells")
    return notes
