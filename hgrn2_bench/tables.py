"""Rows to tables: a pure function of the rows and the suite's protocol.

A table holds one task under one preset, protocol version, precision, match, metric card and data; rows that differ in these go to
tables of their own, and a note says why. `lines.py` says what one line of a table is.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from hgrn2_bench import fairness, items, paired
from hgrn2_bench.averages import averages
from hgrn2_bench.lines import (
    Line,
    Run,
    as_published,
    beats_floors,
    best_lines,
    came_trained,
    chosen_on,
    commits,
    comparable,
    floors_of,
    learned,
    looks_ahead,
    settings_of,
    tokens_seen,
)
from hgrn2_bench.protocol import Protocol
from hgrn2_bench.render import Column, Score, Table, byte_count, count, short
from hgrn2_bench.results import Row
from hgrn2_bench.speeds import speed_tables

PAIRS_NEEDED = 5
"""Paired seeds from which two models may be called not distinguishable."""
WEIGHTS = {"test_best": "at the best validation", "test_ema": "of the averaged weights"}
"""Splits of the test data on which other weights than the last ones were measured: with `keep=both`, and with `ema`."""
MEMBERS_SHOWN = 8
"""Tasks of a group up to which each has a column."""
COSTS = (
    Column("parameters", count),
    Column("non-embedding", count),
    Column("state", byte_count),
    Column("train FLOPs/token", count),
    Column("local mixing"),
    Column("positions"),
)
SHOWN_BY_COLUMN = ("conv", "positions", "seed")


def make_tables(rows: Iterable[Row], protocol: Protocol, metric: str | None = None) -> list[Table]:
    """Every table that the rows of one suite give, presets and tasks in alphabetical order."""
    if protocol.speed:
        return speed_tables(rows, protocol, metric)
    metric = metric or protocol.metric
    parts = comparable(rows, protocol, metric)
    return [*(_table(part.runs, protocol, metric, part.apart) for part in parts), *averages(parts, protocol, metric)]


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
        at_floor = "no better than the floor" if came_trained(line.first) else "not learned in this budget"
        words.append(at_floor + f" ({above} of {len(line.runs)} seeds beat the floor)" * (above > 0))
    ran = [run.row.seed for run in line.runs]
    if ran != list(seeds):
        words.append(f"seed{'s' * (len(ran) > 1)} {_listed(ran)} only")
    if looks_ahead(line.first):
        words.append("not causal")
    words += [f"best {key} at the edge of its grid" for key in line.edge]
    if best is not None and line is not best and not all_solved((line, best), protocol):
        words += _like_best(line, best)
    if preset and preset.source_models and line.first.model not in preset.source_models:
        words.append("our extension of the protocol")
    return "; ".join(words) or "ok"


def _like_best(line: Line, best: Line) -> list[str]:
    """That a line is not distinguishable from the best, and by which test; nothing where it is, or where none can be made."""
    if indistinguishable(line, best):
        return ["not distinguishable from best (paired t-test over seeds)"]
    found = paired.of_lines(line, best)
    return [f"not distinguishable from best ({found})"] if found and not found.is_clear else []


def all_solved(lines: Sequence[Line], protocol: Protocol) -> bool:
    """Whether every run of these lines solved the task: values above that line say how the early stop fell, not who is better."""
    if protocol.solved is None:
        return False
    sign = 1 if protocol.higher_is_better else -1
    return all(value is not None and sign * value >= sign * protocol.solved for line in lines for value in line.values)


def _table(runs: Sequence[Run], protocol: Protocol, metric: str, why: Sequence[str]) -> Table:
    lines = best_lines(runs, protocol)
    first, matched = lines[0].first, fairness.matched(lines[0].first)
    arrow = "higher" if first.higher_is_better else "lower"
    title = f"{first.suite}, preset {first.preset}, {first.task}: {metric} on test data ({first.unit}; {arrow} is better)"
    title += f", {matched}" * bool(matched)
    if refusal := fairness.refusal([run.row for run in runs]):
        return Table(title, (), (), (refusal, *why))
    varying = _varying(lines, protocol)
    seeds = sorted({run.row.seed for line in lines for run in line.runs})
    best = next((line for line in lines if learned(line)), None)
    one_device = len({run.row.device_name for line in lines for run in line.runs if run.value is not None}) <= 1
    tuned = [key for key in protocol.tuned if any(line.searched or line.tuned[key] != lines[0].tuned[key] for line in lines)]
    columns = [Column("model"), *(Column(key, short) for key in (*varying, *tuned))]
    columns += [Column("tokens seen", count)] * protocol.takes_any_language_model
    columns += [*COSTS[:4], *[Column("off the match", fairness.percent)] * bool(matched), *COSTS[4:]]
    columns += [Column(f"{metric}, seed{'s' * (len(seeds) > 1)} {_listed(seeds)}")]
    measured = [split for split in WEIGHTS if any(split in run.splits for line in lines for run in line.runs)]
    columns += [Column(f"{metric} {WEIGHTS[split]}") for split in measured]
    others = _others(lines, protocol) if metric == protocol.metric else []
    columns += [Column(heading) for heading, _, _ in others]
    rates = _rates(lines, protocol) if one_device else {}
    columns += [Column("tokens/s", count)] * one_device + [Column(heading, count) for heading in rates] + [Column("status")]
    body = [
        (
            line.first.model,
            *(settings_of(line.first).get(key) for key in varying),
            *(line.tuned.get(key) for key in tuned),
            *[tokens_seen(line.first)] * protocol.takes_any_language_model,
            *_costs(line.first)[:4],
            *[fairness.miss(line.first)] * bool(matched),
            *_costs(line.first)[4:],
            Score(summary(line, protocol.solved) + _error(line), {run.row.seed: run.value for run in line.runs}),
            *(_with_weights(line, split) for split in measured),
            *(_beside(line, each) for each in others),
            *([_speed(line)] * one_device),
            *(_rate(line, key) for key, _ in rates.values()),
            _status(line, best, seeds, protocol),
        )
        for line in lines
    ]
    gone_by = [f"{heading}: {told}" for heading, (_, told) in rates.items() if told]
    return Table(title, tuple(columns), tuple(body), (*_notes(lines, protocol, why, one_device), *gone_by))


def _with_weights(line: Line, split: str) -> Score:
    """Test values of other weights than the last ones, in seed order."""
    found = {run.row.seed: row.value for run in line.runs if (row := run.splits.get(split)) is not None}
    values = [found.get(run.row.seed) for run in line.runs]
    return Score(", ".join("–" if value is None else f"{value:.3f}" for value in values), found)


def _error(line: Line) -> str:
    """The standard error over the items of one run, where it is known."""
    error = items.score_error(line.first) if len(line.finished) == len(line.runs) == 1 else None
    return "" if error is None else f" ± {error:.3f}"


def _others(lines: Sequence[Line], protocol: Protocol) -> list[tuple[str, str, str]]:
    """Further columns that some line has a value for: those of the protocol, and of a group of tasks the score of each, if they are few."""
    tasks = {task: metric for line in lines for task, metric in items.scored(line.first).items()}
    named = {(metric, split) for _, metric, split in protocol.beside_metric}
    members = [(f"{task} {metric}", metric, task) for task, metric in tasks.items() if (metric, task) not in named]
    members = members if len(tasks) <= MEMBERS_SHOWN else []
    return [each for each in (*protocol.beside_metric, *members) if any(_beside(line, each).by_seed for line in lines)]


def _beside(line: Line, further: tuple[str, str, str]) -> Score:
    """The mean over seeds of another metric, of one run with its standard error over items; – where no run has it."""
    _, metric, split = further
    known = {run.row.seed: run.beside[metric, split] for run in line.runs if (metric, split) in run.beside}
    if not known:
        return Score("–", {})
    error = items.error_of(line.first, split, metric) if len(known) == len(line.runs) == 1 else None
    return Score(f"{statistics.fmean(known.values()):.3f}" + (f" ± {error:.3f}" if error is not None else ""), known)


def _costs(row: Row) -> tuple[Any, ...]:
    asked = row.settings.get("conv", 0)
    mixing = row.effective.get("local_mixing") or (f"conv {asked}" if asked else "none")  # what was built, where it got that far
    return (
        row.parameters,
        row.non_embedding_parameters,
        row.state_bytes,
        row.train_flops_per_token,
        mixing,
        row.settings.get("positions") or row.effective.get("positions", "none"),  # of another maker's model only what was built
    )


def _varying(lines: Sequence[Line], protocol: Protocol) -> list[str]:
    """Settings that differ between lines: shared ones over the table, a model's own and its version among its lines."""
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for line in lines:
        for key, value in settings_of(line.first).items():
            seen[key, line.first.model if key == "version" else ""].add(json.dumps(value))
    hidden = {*SHOWN_BY_COLUMN, *protocol.tuned}
    return list(dict.fromkeys(key for (key, _), values in seen.items() if len(values) > 1 and key not in hidden))


def _speed(line: Line) -> float | None:
    known = [run.row.tokens_per_s for run in line.runs if run.row.tokens_per_s]
    return statistics.median(known) if known else None


def _rates(lines: Sequence[Line], protocol: Protocol) -> dict[str, tuple[str, str]]:
    """By heading the further speeds that some line has: the key in a row's details, and what it goes by, the same in all rows."""
    found = {}
    for heading, key, by in protocol.rates:
        rows = [run.row.details for line in lines for run in line.runs if run.row.details.get(key) is not None]
        told = {", ".join(f"{name} {details[name]}" for name in by if details.get(name) is not None) for details in rows}
        if len(told) == 1:
            found[heading] = key, told.pop()
    return found


def _rate(line: Line, key: str) -> float | None:
    """The median over seeds of a speed in the rows' details."""
    known = [run.row.details[key] for run in line.runs if run.row.details.get(key) is not None]
    return statistics.median(known) if known else None


def _definition(rows: Sequence[Row]) -> list[str]:
    """The floors of the metric, how it is counted, and what stands behind its ±."""
    notes = []
    each_row = [floors_of(row) for row in rows]
    floors = {name: [found[name] for found in each_row if name in found] for row in each_row for name in row}
    if floors:
        ends = {name: dict.fromkeys(f"{value:.3f}" for value in (min(found), max(found))) for name, found in floors.items()}
        notes.append("floors: " + "; ".join(f"{name} {' to '.join(each)}" for name, each in ends.items()))
    told = next((row for row in rows if row.card), None)
    if told:
        notes.append(f"{told.metric} counted so: " + "; ".join(f"{key} {value}" for key, value in told.card.items()))
    if any(items.score_error(row) is not None for row in rows):
        notes.append("± beside a single run is the standard error over its items, of three seeds or more half the 95% t-interval")
    return notes


def _notes(lines: Sequence[Line], protocol: Protocol, why: Sequence[str], one_device: bool) -> list[str]:
    rows = [run.row for line in lines for run in line.runs]
    first = lines[0].first
    notes = _definition(rows)
    trains = not (protocol.takes_any_language_model and all(map(came_trained, rows)))
    budget = ("lr", "batch_size", *protocol.budget * trains, "epochs", "weight_decay", "warmup", "schedule", "stop_at", "channel_mixer")
    notes += _same(rows, budget, "every line")
    here = [row for row in rows if not came_trained(row)]
    if len(here) < len(rows):  # what was evaluated as it came has no lr and no epochs
        learned_by = [key for key in budget if any(key not in row.settings for row in rows)]
        notes += _same(here, learned_by, "every line that learned here")
    notes += [fairness.note(rows)] if fairness.matched(first) else []
    if any(line.searched for line in lines):
        notes.append(f"{', '.join(protocol.tuned)} chosen on {chosen_on(rows)}{as_published(rows)}")
    elif as_published(rows):
        notes.append(f"stopped on test data{as_published(rows)}")
    if protocol.solved is not None and any(len(line.runs) > 2 for line in lines):
        notes.append(
            f"median [range]; solved: at least {protocol.solved:g}" if protocol.higher_is_better else f"solved: at most {protocol.solved:g}"
        )
    devices = sorted({f"{row.device_name} ({row.device}, {row.threads} thread{'s' * (row.threads > 1)})" for row in rows})
    backends = sorted({row.backend for row in rows})
    notes.append(
        f"protocol version {first.protocol_version}, {first.dtype}, backend {', '.join(backends)}, {'; '.join(devices)}, "
        f"commit {commits(rows)}"
    )
    beside = sorted({row.workers for row in rows})
    if one_device and max(beside) > 1 and any(row.tokens_per_s for row in rows):
        notes.append(f"speed measured with {' or '.join(map(str, beside))} cells of one run at once")
    plain = sorted({row.model for row in rows if row.effective.get("decoding")})
    if plain:
        notes.append(f"plain modules ({', '.join(plain)}) decode by recomputing: their state is all past inputs, their FLOPs are not known")
    built = sorted({f"{row.model}: {short(row.effective['layers'])}" for row in rows if row.effective.get("layers")})
    notes += [f"layers of {text}" for text in built]
    for scan in sorted({row.effective["scan"] for row in rows if row.effective.get("scan")}):
        models = sorted({row.model for row in rows if row.effective.get("scan") == scan})
        notes.append(f"scan {scan}, nothing is decoded and no state held: {', '.join(models)}")
    if not one_device:
        notes.append("no speed column: the rows come from several devices")
    counts = sorted({row.truncated + row.skipped for row in rows})  # of one run: every line has the same items
    told = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return notes + ([f"{told} truncated or skipped items"] if counts[-1] else []) + list(why)


def _same(rows: Sequence[Row], keys: Sequence[str], who: str) -> list[str]:
    """The settings among these keys that all rows have, and agree in."""
    values = {key: {json.dumps(row.settings.get(key)) for row in rows} for key in keys if all(key in row.settings for row in rows)}
    fixed = [f"{key} {json.loads(next(iter(found)))}" for key, found in values.items() if len(found) == 1]
    return [f"the same for {who}: {', '.join(fixed)}"] * bool(fixed)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
