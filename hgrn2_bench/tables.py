"""Rows to tables: a pure function of the rows and the suite's protocol.

A table holds one task under one preset, protocol version, precision and data; rows that differ in these go to tables of their own, and a
note says why. Within a table, runs that differ only in seed are one line, and the tuning grid is reduced to its best value, chosen on
the selection split. A failed run counts as the worst value; it is never dropped.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hgrn2_bench.protocol import Protocol
from hgrn2_bench.render import Column, Score, Table, byte_count, count, short
from hgrn2_bench.results import Row

PAIRS_NEEDED = 5
"""Paired seeds from which two models may be called not distinguishable."""
SHOWN_BY_COLUMN = ("conv", "positions", "seed")


@dataclass(frozen=True)
class Run:
    """One cell: its row on the test split (or its failure), and its value on the split that selects."""

    row: Row
    selection: float | None

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


def make_tables(rows: Iterable[Row], protocol: Protocol, metric: str | None = None) -> list[Table]:
    """Every table that the rows of one suite give, presets and tasks in alphabetical order."""
    metric = metric or protocol.metric
    groups: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in _runs(rows, metric):
        row = run.row
        groups[row.preset, row.task, row.protocol_version, row.dtype, row.device_name if protocol.speed else ""].append(run)
    tables = []
    for key in sorted(groups):
        parts = _split_by_data(groups[key], protocol)
        others = [k for k in groups if k[:2] == key[:2] and k != key]
        why = ["rows of another protocol version, precision or device are in a table of their own"] if others else []
        tables += [_table(part, protocol, metric, [*why, *_why_apart(part, parts)]) for part in parts]
    return tables


def _why_apart(part: Sequence[Run], parts: Sequence[Sequence[Run]]) -> list[str]:
    """A note for one of several tables that differ in data: why, and the settings by which to tell this one."""
    if len(parts) == 1:
        return []
    shared = [{k: v for k, v in p[0].row.settings.items() if all(r.row.settings.get(k) == v for r in p)} for p in parts]
    mine = shared[[p is part for p in parts].index(True)]
    here = [f"{key} {short(value)}" for key, value in mine.items() if any(key in s and s[key] != value for s in shared)]
    which = ", ".join(here) or f"data hash {', '.join(sorted({r.row.data_hash for r in part if r.row.data_hash}))}"
    return [f"rows of the same seed but other data (data hash) are in a table of their own; this one: {which}"]


def _runs(rows: Iterable[Row], metric: str) -> list[Run]:
    """One run per cell, the newest where a cell was run twice."""
    cells: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: r.time):
        if row.metric == metric or row.status != "ok":
            cells[row.cell].append(row)
    runs = []
    for same in cells.values():
        newest = [row for row in same if row.time == same[-1].time]
        tested = next((row for row in newest if row.split == "test"), newest[-1])
        select = tested.settings.get("select", "validation")
        chosen = next((row.value for row in newest if row.split == select and row.status == "ok"), None)
        runs.append(Run(tested, chosen))
    return runs


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


def _settings(row: Row) -> dict[str, Any]:
    """Everything that sets lines of a table apart, the seed left out."""
    place = {"backend": row.backend, "device": row.device, "processes": row.processes, "version": row.mixer_version}
    return {k: v for k, v in row.settings.items() if k != "seed"} | place


def _grouped(runs: Sequence[Run], protocol: Protocol) -> dict[str, list[Run]]:
    """Runs that are equal in everything but seed and tuned keys, in an order that does not depend on theirs."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        same = {k: v for k, v in _settings(run.row).items() if k not in protocol.tuned}
        groups[json.dumps([run.row.model, same], sort_keys=True)].append(run)
    return dict(sorted(groups.items()))


def _lines(runs: Sequence[Run], protocol: Protocol) -> list[Line]:
    """The best tuned value of each group of equal runs, best lines first."""
    lines = [_best_line(group, protocol) for group in _grouped(runs, protocol).values()]
    return sorted(lines, key=lambda line: _rank(line, protocol), reverse=True)


def best_point(rows: Iterable[Row], protocol: Protocol) -> tuple[Any, ...]:
    """The best values of the tuned keys among rows that are equal in all else but the seed."""
    return _best_of(_grid(_runs(rows, protocol.metric), protocol), protocol)


def _grid(runs: Iterable[Run], protocol: Protocol) -> dict[tuple[Any, ...], list[Run]]:
    """Runs by their values of the tuned keys."""
    grid: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        grid[tuple(run.row.settings.get(k) for k in protocol.tuned)].append(run)
    return grid


def _best_of(grid: Mapping[tuple[Any, ...], Sequence[Run]], protocol: Protocol) -> tuple[Any, ...]:
    """The point with the best mean on the selection split; a point with a failed run is never preferred to one without.

    Where the grid was tuned on its first seed, the others were run at its best point only and have no say.
    """
    sign = 1 if protocol.higher_is_better else -1
    everyone = [run.row for runs in grid.values() for run in runs]
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
    best = _best_of(grid, protocol)
    edge = []
    for position, key in enumerate(protocol.tuned):
        tried = sorted({point[position] for point in grid})
        if len(tried) > 2 and best[position] in (tried[0], tried[-1]):
            edge.append(key)
    tuned = dict(zip(protocol.tuned, best, strict=True))
    return Line(tuple(sorted(grid[best], key=lambda r: r.row.seed)), tuned, len(grid) > 1, tuple(edge))


def beats_floors(value: float, row: Row) -> bool:
    """Whether a value beats every floor of its row by more than twice the floor's standard error."""
    if not math.isfinite(value) or not row.floors:
        return math.isfinite(value)
    floor = max(row.floors.values()) if row.higher_is_better else min(row.floors.values())
    error = (floor * (1 - floor) / max(1, row.num_items)) ** 0.5 if 0 < floor < 1 else 0.0
    return value > floor + 2 * error if row.higher_is_better else value < floor - 2 * error


def learned(line: Line) -> bool:
    """Whether the median run beats the floors."""
    return beats_floors(line.middle, line.first)


def _rank(line: Line, protocol: Protocol) -> tuple[bool, bool, float]:
    return bool(line.finished), learned(line), line.middle if protocol.higher_is_better else -line.middle


def summary(line: Line, solved: float | None) -> str:
    """Values of the seeds in words: all of them below three; else median, range and share solved, or mean and 95% t-interval."""
    if solved is None and len(line.finished) == len(line.runs) >= 3:
        return f"{statistics.fmean(line.finished):.3f} ± {half_interval(line.finished):.3f}"
    if solved is None or len(line.runs) < 3:
        return ", ".join("–" if v is None else f"{v:.3f}" for v in line.values)
    higher = line.first.higher_is_better
    worst = -math.inf if higher else math.inf
    known = [worst if v is None else v for v in line.values]
    middle, low, high = (f"{v:.3f}" if math.isfinite(v) else "–" for v in (line.middle, min(known), max(known)))
    reached = sum(v >= solved if higher else v <= solved for v in known)
    return f"{middle} [{low}, {high}], solved {reached}/{len(known)}"


def half_interval(values: Sequence[float]) -> float:
    """Half the 95% t-interval of the mean of at least two values."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5)


def indistinguishable(line: Line, best: Line) -> bool | None:
    """Whether a paired t-test over common seeds leaves a line no different from the best (p >= 0.05); None below five pairs.

    None too where a paired run failed. Where both lines solve the task in every seed there is nothing to tell apart (see `_status`).
    """
    ours = {run.row.seed: run.value for run in line.runs}
    pairs = [(run.value, ours[run.row.seed]) for run in best.runs if run.row.seed in ours]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(known) < max(PAIRS_NEEDED, len(pairs)):
        return None
    differences = [a - b for a, b in known]
    return abs(statistics.fmean(differences)) <= half_interval(differences)


def _status(line: Line, best: Line | None, seeds: Sequence[int], protocol: Protocol) -> str:
    """Outcomes that are not ok with their first reason, else whether the model learned and how it stands to the best."""
    preset = protocol.presets.get(line.first.preset)
    failures: dict[str, list[Row]] = defaultdict(list)
    for run in line.runs:
        if run.row.status != "ok":
            failures[run.row.status].append(run.row)
    words = [f"{status} {len(rows)}/{len(line.runs)}: {rows[0].reason}" for status, rows in failures.items()]
    if math.isfinite(line.middle) and not learned(line):
        above = sum(beats_floors(value, line.first) for value in line.finished)
        words.append("not learned in this budget" + f" ({above} of {len(line.runs)} seeds beat the floor)" * (above > 0))
    ran = [run.row.seed for run in line.runs]
    if ran != list(seeds):
        words.append(f"seed{'s' * (len(ran) > 1)} {_listed(ran)} only")
    if line.first.effective.get("causal") is False:
        words.append("not causal")
    words += [f"best {key} at the edge of its grid" for key in line.edge]
    if best is not None and line is not best and not _all_solved((line, best), protocol) and indistinguishable(line, best):
        words.append("not distinguishable from best (paired t-test over seeds)")
    if preset and preset.source_models and line.first.model not in preset.source_models:
        words.append("our extension of the protocol")
    return "; ".join(words) or "ok"


def _all_solved(lines: Sequence[Line], protocol: Protocol) -> bool:
    """Whether every run of these lines solved the task: values above that line say how the early stop fell, not who is better."""
    if protocol.solved is None:
        return False
    sign = 1 if protocol.higher_is_better else -1
    return all(value is not None and sign * value >= sign * protocol.solved for line in lines for value in line.values)


def _table(runs: Sequence[Run], protocol: Protocol, metric: str, why: Sequence[str]) -> Table:
    lines = _lines(runs, protocol)
    varying = _varying(lines, protocol)
    seeds = sorted({run.row.seed for line in lines for run in line.runs})
    arrow = "higher" if protocol.higher_is_better else "lower"
    best = next((line for line in lines if learned(line)), None)
    one_device = len({run.row.device_name for line in lines for run in line.runs if run.value is not None}) <= 1
    tuned = [key for key in protocol.tuned if any(line.searched or line.tuned[key] != lines[0].tuned[key] for line in lines)]
    columns = [Column("model"), *(Column(key, short) for key in (*varying, *tuned))]
    columns += [
        Column("parameters", count),
        Column("non-embedding", count),
        Column("state", byte_count),
        Column("train FLOPs/token", count),
    ]
    columns += [Column("local mixing"), Column("positions"), Column(f"{metric}, seed{'s' * (len(seeds) > 1)} {_listed(seeds)}")]
    columns += [Column("tokens/s", count)] * one_device + [Column("status")]
    body = [
        (
            line.first.model,
            *(_settings(line.first).get(key) for key in varying),
            *(line.tuned.get(key) for key in tuned),
            *_costs(line.first),
            Score(summary(line, protocol.solved), {run.row.seed: run.value for run in line.runs}),
            *([_speed(line)] * one_device),
            _status(line, best, seeds, protocol),
        )
        for line in lines
    ]
    first = lines[0].first
    title = f"{first.suite}, preset {first.preset}, {first.task}: {metric} on test data ({protocol.unit}; {arrow} is better)"
    return Table(title, tuple(columns), tuple(body), tuple(_notes(lines, protocol, why, one_device)))


def _costs(row: Row) -> tuple[Any, ...]:
    asked = row.settings.get("conv", 0)
    mixing = row.effective.get("local_mixing") or (f"conv {asked}" if asked else "none")  # what was built, where it got that far
    return (
        row.parameters,
        row.non_embedding_parameters,
        row.state_bytes,
        row.train_flops_per_token,
        mixing,
        row.settings.get("positions", "none"),
    )


def _varying(lines: Sequence[Line], protocol: Protocol) -> list[str]:
    """Settings that differ between lines: shared ones over the table, a model's own among its lines."""
    seen: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        for key, value in _settings(line.first).items():
            seen[key].add(json.dumps(value))
    hidden = {*SHOWN_BY_COLUMN, *protocol.tuned}
    return [key for key, values in seen.items() if len(values) > 1 and key not in hidden]


def _speed(line: Line) -> float | None:
    known = [run.row.tokens_per_s for run in line.runs if run.row.tokens_per_s]
    return statistics.median(known) if known else None


def _notes(lines: Sequence[Line], protocol: Protocol, why: Sequence[str], one_device: bool) -> list[str]:
    rows = [run.row for line in lines for run in line.runs]
    first = lines[0].first
    notes = []
    floors = next((row.floors for row in rows if row.floors), {})
    if floors:
        notes.append("floors: " + "; ".join(f"{name} {value:.3f}" for name, value in floors.items()))
    budget = ("lr", "batch_size", *protocol.budget, "epochs", "weight_decay", "warmup", "schedule", "stop_at", "channel_mixer")
    same = {key: {json.dumps(row.settings.get(key)) for row in rows} for key in budget}
    fixed = [f"{key} {json.loads(next(iter(v)))}" for key, v in same.items() if len(v) == 1]
    if fixed:
        notes.append(f"the same for every line: {', '.join(fixed)}")
    select = sorted({str(row.settings.get("select")) for row in rows})
    if any(line.searched for line in lines):
        alone = " of the first seed" if any(row.settings.get("tune_on") == "first_seed" for row in rows) else ""
        notes.append(f"{', '.join(protocol.tuned)} chosen on {' and '.join(select)} data{alone}" + _warn_test(select))
    elif "test" in select:
        notes.append("stopped on test data" + _warn_test(select))
    if protocol.solved is not None and any(len(line.runs) > 2 for line in lines):
        notes.append(
            f"median [range]; solved: at least {protocol.solved:g}" if protocol.higher_is_better else f"solved: at most {protocol.solved:g}"
        )
    devices = sorted({f"{row.device_name} ({row.device}, {row.threads} thread{'s' * (row.threads > 1)})" for row in rows})
    backends = sorted({row.backend for row in rows})
    commits = sorted({row.commit[:10] + ("+changes" if row.dirty else "") for row in rows})
    notes.append(
        f"protocol version {first.protocol_version}, {first.dtype}, backend {', '.join(backends)}, {'; '.join(devices)}, "
        f"commit {', '.join(commits)}"
    )
    beside = sorted({row.workers for row in rows})
    if one_device and max(beside) > 1:
        notes.append(f"speed measured with {' or '.join(map(str, beside))} cells of one run at once")
    plain = sorted({row.model for row in rows if row.effective.get("decoding")})
    if plain:
        notes.append(f"plain modules ({', '.join(plain)}) decode by recomputing: their state is all past inputs, their FLOPs are not known")
    if not one_device:
        notes.append("no speed column: the rows come from several devices")
    counts = sum(row.truncated + row.skipped for row in rows)
    return notes + ([f"{counts} truncated or skipped items"] if counts else []) + list(why)


def _warn_test(select: Sequence[str]) -> str:
    return ", as the published protocol did" if "test" in select else ""


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
