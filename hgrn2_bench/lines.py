"""Rows to lines: which runs may be compared, and what one line of a table or one point of a figure stands for.

Runs are compared within one task, preset, protocol version, precision, match, metric card and data. Runs that differ only in seed are
one line, and the tuning grid is reduced to its best value, chosen on the selection split. A failed run counts as the worst value; it is
never dropped.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hgrn2_bench import fairness
from hgrn2_bench.protocol import Protocol
from hgrn2_bench.render import short
from hgrn2_bench.results import Row


@dataclass(frozen=True)
class Run:
    """One cell: its row on the test split (or its failure), its finished rows by split, and its other metrics by name and split."""

    row: Row
    splits: Mapping[str, Row]
    beside: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def selection(self) -> float | None:
        """The value on the split that selects; None where the cell has none."""
        chosen = self.splits.get(self.row.settings.get("select", "validation"))
        return chosen.value if chosen else None

    @property
    def value(self) -> float | None:
        """The reported value; None where the cell has none."""
        return self.row.value if self.row.status == "ok" else None


@dataclass(frozen=True)
class Line:
    """One model under one setting: the runs of its best tuned value, one per seed."""

    runs: tuple[Run, ...]
    tuned: Mapping[str, Any]
    searched: bool
    """Whether the tuning grid had more than one point."""
    edge: tuple[str, ...]
    """Tuned keys whose best value lies at the edge of its grid."""

    @property
    def first(self) -> Row:
        """A row that speaks for what all runs share."""
        return next((r.row for r in self.runs if r.value is not None), self.runs[0].row)

    @property
    def values(self) -> list[float | None]:
        """Values in seed order."""
        return [run.value for run in self.runs]

    @property
    def finished(self) -> list[float]:
        """Values of the runs that have one."""
        return [v for v in self.values if v is not None]

    @property
    def middle(self) -> float:
        """The median over seeds; a run without a value counts as the worst, so the median may be infinite."""
        worst = -math.inf if self.first.higher_is_better else math.inf
        return statistics.median(worst if v is None else v for v in self.values)


@dataclass(frozen=True)
class Part:
    """Runs of one task that may be compared with each other."""

    runs: tuple[Run, ...]
    apart: tuple[str, ...]
    """Where rows of the same preset and task are in other parts: why, in whole sentences."""
    which: str
    """Where the other parts differ in the metric's card or in data only: what by which to tell this one."""

    @property
    def task(self) -> str:
        """The task of all its runs."""
        return self.runs[0].row.task


def place_of(row: Row, protocol: Protocol) -> tuple[Any, ...]:
    """What all rows of one report share whatever their tasks: preset, protocol version, precision, match, and for a speed the device."""
    device = row.device_name if protocol.speed else ""
    return (row.preset, row.protocol_version, row.dtype, device, *fairness.match_of(row))


def comparable(rows: Iterable[Row], protocol: Protocol, metric: str) -> list[Part]:
    """Runs in parts that share what `place_of` says, task, metric card and data, in alphabetical order."""
    groups: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in _runs(rows, metric):
        groups[(run.row.preset, run.row.task, *place_of(run.row, protocol))].append(run)
    found = []
    for key in sorted(groups):
        by_card = _split_by_card(groups[key], protocol)
        others = [k for k in groups if k[:2] == key[:2] and k != key]
        why = ["rows of another protocol version, precision or device, or of another match, are in a table of their own"] if others else []
        for card, runs in by_card.items():
            carded = _told_card(card, list(by_card))
            cards = [f"rows whose metric is defined otherwise (its card) are in a table of their own; this one: {carded}"] if carded else []
            parts = _split_by_data(runs, protocol)
            for part in parts:
                which = _told_by(part, parts)
                data = [f"rows of the same seed but other data (data hash) are in a table of their own; this one: {which}"] if which else []
                found.append(Part(tuple(part), (*why, *cards, *data), ", ".join(filter(None, (carded, which)))))
    return found


def _split_by_card(runs: Sequence[Run], protocol: Protocol) -> dict[str, list[Run]]:
    """Runs by the card of their metric, as JSON. A run that came to nothing has none and stays with its own line, else with the first."""
    known = sorted({_card(run) for run in runs if run.row.status == "ok"}) or [""]
    if len(known) == 1:
        return {known[0]: list(runs)}
    parts: dict[str, list[Run]] = {card: [] for card in known}
    for line in _grouped(runs, protocol).values():
        own = [_card(run) for run in line if run.row.status == "ok"] or known
        for run in line:
            parts[_card(run) if run.row.status == "ok" else own[0]].append(run)
    return parts


def _card(run: Run) -> str:
    return json.dumps(dict(run.row.card), sort_keys=True)


def _told_card(card: str, cards: Sequence[str]) -> str:
    """The entries of a card in which it differs from others; nothing where there is one card."""
    if len(cards) == 1:
        return ""
    mine, each = json.loads(card), [json.loads(other) for other in cards]
    return ", ".join(f"{key} {mine[key]}" for key in mine if any(other.get(key) != mine[key] for other in each)) or "no card"


def _told_by(part: Sequence[Run], parts: Sequence[Sequence[Run]]) -> str:
    """The settings by which to tell one of several parts that differ in data; nothing where there is one part."""
    if len(parts) == 1:
        return ""
    shared = [{k: v for k, v in p[0].row.settings.items() if all(r.row.settings.get(k) == v for r in p)} for p in parts]
    mine = shared[[p is part for p in parts].index(True)]
    here = [f"{key} {short(value)}" for key, value in mine.items() if any(key in s and s[key] != value for s in shared)]
    return ", ".join(here) or f"data hash {', '.join(sorted({r.row.data_hash for r in part if r.row.data_hash}))}"


def _runs(rows: Iterable[Row], metric: str) -> list[Run]:
    """One run per cell, the newest where a cell was run twice.

    None of a cell that was skipped before its files were there, or that came to no data (a file was damaged, mostly) where the same cell
    later ran with other files.
    """
    cells: dict[str, list[Row]] = defaultdict(list)
    others: dict[tuple[str, str], dict[tuple[str, str], float]] = defaultdict(dict)
    for row in sorted(rows, key=lambda r: r.time):
        if row.metric == metric or row.status != "ok":
            cells[row.cell].append(row)
        elif row.value is not None:
            others[row.cell, row.time][row.metric, row.split] = row.value
    runs = []
    for key, same in cells.items():
        newest = [row for row in same if row.time == same[-1].time]
        tested = next((row for row in newest if row.split == "test"), newest[-1])
        beside = others.get((key, tested.time), {})
        runs.append(Run(tested, {row.split: row for row in newest if row.status == "ok"}, beside))
    ran = {_but_files(run.row) for run in runs if run.row.status != "skipped"}
    runs = [run for run in runs if run.row.status != "skipped" or run.row.settings.get("fingerprint") or _but_files(run.row) not in ran]
    well = {_but_files(run.row): run.row.time for run in sorted(runs, key=lambda r: r.row.time) if run.row.status == "ok"}
    return [run for run in runs if run.row.status == "ok" or run.row.data_hash or well.get(_but_files(run.row), "") <= run.row.time]


def _but_files(row: Row) -> str:
    """What a cell is but for the files that it reads."""
    settings = {k: v for k, v in settings_of(row).items() if k != "fingerprint"}
    return json.dumps([row.preset, row.protocol_version, row.dtype, row.task, row.model, row.seed, settings], sort_keys=True)


def _split_by_data(runs: Sequence[Run], protocol: Protocol) -> list[list[Run]]:
    """Runs in parts whose data hashes agree wherever their seeds do. Runs of one line stay together unless they themselves disagree."""
    bundles: list[tuple[dict[int, str], list[Run]]] = []
    for line in _grouped(runs, protocol).values():
        own: list[tuple[dict[int, str], list[Run]]] = []
        for run in sorted(line, key=lambda r: (not r.row.data_hash, r.row.data_hash, r.row.seed)):
            _join(own, {run.row.seed: run.row.data_hash} if run.row.data_hash else {}, [run])
        bundles += own
    parts: list[tuple[dict[int, str], list[Run]]] = []
    for hashes, members in sorted(bundles, key=lambda b: (-len(b[0]), sorted(b[0].items()))):
        _join(parts, hashes, members)
    return [members for _, members in parts]


def _join(parts: list[tuple[dict[int, str], list[Run]]], hashes: dict[int, str], runs: list[Run]) -> None:
    """Add runs to the first part that knows no other data for their seeds, or as a part of their own."""
    for known, members in parts:
        if all(known.get(seed, digest) == digest for seed, digest in hashes.items()):
            known.update(hashes)
            members += runs
            return
    parts.append((dict(hashes), list(runs)))


LATER_SETTINGS: dict[str, Any] = {
    **{"scan": "causal", "norm_group": 0, "channel_dropout": 0.0, "warmup_steps": 0, "schedule_steps": 0},
    **{"glu_activation": "silu", "glu_bias": True, "norm_eps": 0.0, "embed_scale": "none", "softmax": "full", "cutoffs": []},
    **{"recompute": False, "beta1": 0.9, "beta2": 0.999, "micro_batch": 0, "updates": 0, "warmup_from": 1e-7, "compile_blocks": False},
}
"""Settings that came after the first rows, with what rows without them ran with: one line may hold both kinds."""


def settings_of(row: Row) -> dict[str, Any]:
    """Everything that sets lines of a table apart: neither the seed nor over how many processes a batch was spread, and how."""
    place = {"backend": row.backend, "device": row.device, "version": row.mixer_version}
    settings = {**LATER_SETTINGS, **row.settings}
    return {k: v for k, v in settings.items() if k not in ("seed", "parallel", *fairness.MATCH_KEYS)} | place


def looks_ahead(row: Row) -> bool:
    """Whether a model that should read forward was found to know later tokens; under another scan all do, and that is no fault."""
    return row.effective.get("causal") is False and "scan" not in row.effective


def _grouped(runs: Sequence[Run], protocol: Protocol) -> dict[str, list[Run]]:
    """Runs that are equal in everything but seed and tuned keys, in an order that does not depend on theirs."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        same = {k: v for k, v in settings_of(run.row).items() if k not in protocol.tuned}
        groups[json.dumps([run.row.model, same], sort_keys=True)].append(run)
    return dict(sorted(groups.items()))


def best_lines(runs: Sequence[Run], protocol: Protocol) -> list[Line]:
    """The best tuned value of each group of equal runs, best lines first."""
    lines = [_best_line(group, protocol) for group in _grouped(runs, protocol).values()]
    return sorted(lines, key=_rank, reverse=True)


def best_point(rows: Iterable[Row], protocol: Protocol) -> tuple[Any, ...]:
    """The best values of the tuned keys among rows that are equal in all else but the seed."""
    return _best_of(_grid(_runs(rows, protocol.metric), protocol))


def _grid(runs: Iterable[Run], protocol: Protocol) -> dict[tuple[Any, ...], list[Run]]:
    """Runs by their values of the tuned keys."""
    grid: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        grid[tuple(run.row.settings.get(k) for k in protocol.tuned)].append(run)
    return grid


def _best_of(grid: Mapping[tuple[Any, ...], Sequence[Run]]) -> tuple[Any, ...]:
    """The point with the best mean on the selection split; a point with a failed run is never preferred to one without.

    Where the grid was tuned on its first seed, the others were run at its best point only and have no say.
    """
    everyone = [run.row for runs in grid.values() for run in runs]
    sign = 1 if next((row for row in everyone if row.status == "ok"), everyone[0]).higher_is_better else -1
    first = min(row.seed for row in everyone)
    alone = all(row.settings.get("tune_on") == "first_seed" for row in everyone)

    def score(point: tuple[Any, ...]) -> tuple[float, float]:
        runs = [run for run in grid[point] if not alone or run.row.seed == first]
        known = [run.selection for run in runs if run.row.status == "ok" and run.selection is not None]
        mean = sign * statistics.fmean(known) if known else -math.inf
        return len(known) / max(1, len(runs)), mean

    return max(sorted(grid), key=score)


def _best_line(runs: Sequence[Run], protocol: Protocol) -> Line:
    grid = _grid(runs, protocol)
    best = _best_of(grid)
    edge = []
    for position, key in enumerate(protocol.tuned):
        tried = sorted({point[position] for point in grid})
        if len(tried) > 2 and best[position] in (tried[0], tried[-1]):
            edge.append(key)
    tuned = dict(zip(protocol.tuned, best, strict=True))
    return Line(tuple(sorted(grid[best], key=lambda r: r.row.seed)), tuned, len(grid) > 1, tuple(edge))


def chosen_on(rows: Iterable[Row]) -> str:
    """The data that chose the tuned values: `validation data`, `test data of the first seed`."""
    settings = [row.settings for row in rows]
    alone = " of the first seed" if any(each.get("tune_on") == "first_seed" for each in settings) else ""
    return f"{' and '.join(sorted({str(each.get('select', 'validation')) for each in settings}))} data{alone}"


def as_published(rows: Iterable[Row]) -> str:
    """A word on test data that chose or stopped, which is the published protocol's doing; empty where none did."""
    return ", as the published protocol did" if any(row.settings.get("select") == "test" for row in rows) else ""


def commits(rows: Iterable[Row]) -> str:
    """The commits that rows come from, `+changes` where the checkout had some."""
    return ", ".join(sorted({row.commit[:10] + ("+changes" if row.dirty else "") for row in rows}))


def floors_of(row: Row) -> Mapping[str, float]:
    """Values that need no learning, by name: those of the row, and of two classes the share of the one that is rarer in training.

    A model that gives one answer to all gives either; where the test data happen to hold more of the rarer class, that floor counts.
    """
    majority = row.floors.get("majority", 1.0)
    rarer = {"minority": round(1 - majority, 4)} if row.floors.get("chance") == 0.5 > majority else {}
    return {**row.floors, **rarer}


def beats_floors(value: float, row: Row) -> bool:
    """Whether a value beats every floor of its row by more than twice the floor's standard error."""
    floors = floors_of(row).values()
    if not math.isfinite(value) or not floors:
        return math.isfinite(value)
    floor = max(floors) if row.higher_is_better else min(floors)
    error = (floor * (1 - floor) / max(1, row.num_items)) ** 0.5 if 0 < floor < 1 else 0.0
    return value > floor + 2 * error if row.higher_is_better else value < floor - 2 * error


def learned(line: Line) -> bool:
    """Whether the median run beats the floors."""
    return beats_floors(line.middle, line.first)


def _rank(line: Line) -> tuple[bool, bool, float]:
    return bool(line.finished), learned(line), line.middle if line.first.higher_is_better else -line.middle


def came_trained(row: Row) -> bool:
    """Whether a row's model was evaluated as it came."""
    return f"{row.model}.checkpoint" in row.settings


def tokens_seen(row: Row) -> int | None:
    """Training tokens that a row's model has seen, here or before it came; None where its folder does not say."""
    if came_trained(row):
        tokens: int | None = row.details.get("trained_tokens")
        return tokens
    return row.tokens
