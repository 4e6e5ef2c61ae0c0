"""Two models over the rows they share: a pure function of the rows and the suite's protocol.

Runs are paired by seed where preset, task, data, protocol version, precision, match and every shared setting agree; each model takes part
at its best tuned value, chosen on the selection split. Nothing is claimed from fewer than `PAIRS_NEEDED` pairs.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hgrn2_bench import fairness, paired
from hgrn2_bench.errors import ConfigError, unknown
from hgrn2_bench.lines import Line, Run, best_lines, came_trained, chosen_on, comparable, learned, place_of, settings_of
from hgrn2_bench.protocol import Protocol
from hgrn2_bench.render import Column, Table, count, short
from hgrn2_bench.results import Row
from hgrn2_bench.speeds import named
from hgrn2_bench.tables import PAIRS_NEEDED, all_solved, half_interval

FITTED = ("conv", "positions", "forget_bias", "lower_bound", "num_layers", "first_layer", "scan", "backend", "device", "processes")
"""Shared settings that a model may lack or a preset sets per model: equal where both models have a value in common, else noted."""
INTERVAL_NEEDED = 3
SIMILAR = 1.1
"""Ratio up to which parameter counts pass without a note."""
LISTED = 8
BETTER, WORSE, SAME = "better", "worse", "not distinguishable"
SOLVED, UNLEARNED = "both solve it", "neither learned"
FEW, UNPAIRED = f"no claim (under {PAIRS_NEEDED} paired seeds)", "no claim (unpaired: no seed in common)"


@dataclass(frozen=True)
class Names:
    """The two models, in the order asked."""

    ours: str
    theirs: str


@dataclass(frozen=True)
class Comparison:
    """One line of each model under the same shared settings."""

    ours: Line
    theirs: Line

    @property
    def pairs(self) -> list[tuple[Run, Run]]:
        """Runs of one seed, in seed order."""
        other = {run.row.seed: run for run in self.theirs.runs}
        return [(run, other[run.row.seed]) for run in self.ours.runs if run.row.seed in other]

    @property
    def differences(self) -> dict[int, float]:
        """Ours minus theirs by seed, over pairs that both finished."""
        return {a.row.seed: a.value - b.value for a, b in self.pairs if a.value is not None and b.value is not None}

    @property
    def complete(self) -> bool:
        """Whether every paired run finished."""
        return len(self.differences) == len(self.pairs)

    @property
    def difference(self) -> float | None:
        """The mean over pairs that both finished; without any pair the difference of the two means."""
        if self.pairs:
            return statistics.fmean(self.differences.values()) if self.differences else None
        both = self.ours.finished and self.theirs.finished
        return statistics.fmean(self.ours.finished) - statistics.fmean(self.theirs.finished) if both else None

    @property
    def items(self) -> paired.McNemar | None:
        """The test over items, where one run stands on each side."""
        return paired.of_lines(self.ours, self.theirs)

    def finding(self, protocol: Protocol) -> str:
        """How ours stands to theirs, in words."""
        if not self.pairs:
            return UNPAIRED
        if all_solved((self.ours, self.theirs), protocol):
            return SOLVED
        if not learned(self.ours) and not learned(self.theirs):
            return UNLEARNED
        sign = 1 if self.ours.first.higher_is_better else -1
        if self.items:
            return SAME if not self.items.is_clear else BETTER if self.items.ours_only > self.items.theirs_only else WORSE
        if len(self.pairs) < PAIRS_NEEDED:
            return FEW
        if self.complete:
            gaps = list(self.differences.values())
            clear = abs(statistics.fmean(gaps)) > half_interval(gaps)
            return SAME if not clear else BETTER if sign * statistics.fmean(gaps) > 0 else WORSE
        ranks = [tuple(-math.inf if run.value is None else sign * run.value for run in pair) for pair in self.pairs]
        return BETTER if all(a > b for a, b in ranks) else WORSE if all(a < b for a, b in ranks) else SAME


@dataclass(frozen=True)
class Report:
    """What one suite's rows of one preset, protocol version, precision, match and unit say about two models."""

    table: Table
    sentence: str


def compare_models(rows: Sequence[Row], protocols: Mapping[str, Protocol], names: Names, registered: Iterable[str] = ()) -> list[Report]:
    """A report for every suite, preset, protocol version, precision, match and unit in which the two models share settings.

    ConfigError with the nearest name for a model that is neither registered nor in the rows, and where nothing is shared.
    """
    known = {*registered, *(row.model for row in rows)}
    for name in (names.ours, names.theirs):
        if name not in known:
            raise unknown("model", name, known)
    if names.ours == names.theirs:
        raise ConfigError(f"compare takes two models, not {names.ours!r} twice")
    found = []
    for suite, protocol in sorted(protocols.items()):
        found += _of_suite([row for row in rows if row.suite == suite], protocol, names)
    if not found:
        raise ConfigError(f"no rows with the same settings: {holdings(rows, names.ours)}; {holdings(rows, names.theirs)}")
    return found


def _of_suite(rows: Iterable[Row], protocol: Protocol, names: Names) -> list[Report]:
    """The reports of one suite; skipped cells never ran."""
    kept = [row for row in rows if row.model in (names.ours, names.theirs) and row.status != "skipped"]
    found: dict[tuple[Any, ...], list[Comparison]] = defaultdict(list)
    alone: dict[tuple[Any, ...], list[Line]] = defaultdict(list)
    for part in comparable(kept, protocol, protocol.metric):
        measured = next((run.row for run in part.runs if run.value is not None), part.runs[0].row)
        key = (*place_of(measured, protocol), measured.unit, measured.higher_is_better)
        matched, rest = match(best_lines(part.runs, protocol), protocol, names)
        found[key] += matched
        alone[key] += rest
    return [_report(each, alone[key], protocol, names) for key, each in sorted(found.items()) if each]


def holdings(rows: Iterable[Row], model: str) -> str:
    """What a results folder has of a model, in words."""
    seeds: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for row in rows:
        if row.model == model:
            seeds[row.suite, row.preset, row.task].add(row.seed)
    has = [f"{' '.join(place)} (seed{'s' * (len(s) > 1)} {_listed(map(str, sorted(s)))})" for place, s in sorted(seeds.items())]
    return f"{model} has {_listed(has) or 'no rows'}"


def match(lines: Sequence[Line], protocol: Protocol, names: Names) -> tuple[list[Comparison], list[Line]]:
    """Lines of one part that agree in every shared setting in which the two models can agree, and the lines left alone."""
    buckets: dict[str, list[Line]] = defaultdict(list)
    fitted_keys = _fitted(lines[0])
    free = {*fitted_keys, *protocol.tuned, *_untaken(lines)}
    for line in lines:
        buckets[_key(line, lambda key: key not in free, names)].append(line)
    found: list[Comparison] = []
    for bucket in buckets.values():
        ours, theirs = ([line for line in bucket if line.first.model == name] for name in (names.ours, names.theirs))
        common = [key for key in fitted_keys if _values(ours, key) & _values(theirs, key)]
        fitted = {id(line): _key(line, common.__contains__, names) for line in bucket}
        found += [Comparison(a, b) for a in ours for b in theirs if fitted[id(a)] == fitted[id(b)]]
    taken = {id(line) for c in found for line in (c.ours, c.theirs)}
    return found, [line for line in lines if id(line) not in taken]


def _fitted(line: Line) -> tuple[str, ...]:
    """FITTED, and what the match of a line's rows sized."""
    return (*FITTED, *fairness.sized_by(line.first))


def _untaken(lines: Iterable[Line]) -> set[str]:
    """Settings that a model trained elsewhere does not take: nothing is shared in them."""
    every = [line.first for line in lines]
    trained = [row for row in every if came_trained(row)]
    return {key for row in every for key in settings_of(row) if any(key not in each.settings for each in trained)}


def _values(lines: Iterable[Line], key: str) -> set[str]:
    return {json.dumps(settings_of(line.first).get(key)) for line in lines}


def _key(line: Line, wanted: Callable[[str], bool], names: Names) -> str:
    """The wanted shared settings of a line as one text; a model's own settings and its version are never shared."""
    own = (f"{names.ours}.", f"{names.theirs}.")
    shared = {k: v for k, v in settings_of(line.first).items() if wanted(k) and k != "version" and not k.startswith(own)}
    return json.dumps(shared, sort_keys=True)


def _report(found: Sequence[Comparison], alone: Sequence[Line], protocol: Protocol, names: Names) -> Report:
    labels = _labels(found, protocol, names)
    first = found[0].ours.first
    arrow = "higher" if first.higher_is_better else "lower"
    title = f"{first.suite}, preset {first.preset}: {names.ours} against {names.theirs}, "
    title += f"{protocol.metric} ({first.unit}; {arrow} is better)"
    title += f", {fairness.matched(first)}" * bool(fairness.matched(first))
    headings = ("task", "setting", names.ours, names.theirs, f"{names.ours} - {names.theirs}", "pairs", "finding")
    body = tuple(
        (
            c.ours.first.task,
            label or "–",
            _mean(c, 0),
            _mean(c, 1),
            _difference(c),
            len(c.pairs),
            {BETTER: f"{names.ours} is better", WORSE: f"{names.ours} is worse"}.get(finding := c.finding(protocol), finding),
        )
        for c, label in zip(found, labels, strict=True)
    )
    table = Table(title, tuple(map(Column, headings)), body, tuple(_notes(found, alone, protocol, names)))
    places = [" ".join(filter(None, (c.ours.first.task, label))) for c, label in zip(found, labels, strict=True)]
    return Report(table, _sentence(found, places, protocol, names))


def _labels(found: Sequence[Comparison], protocol: Protocol, names: Names) -> list[str]:
    """For each comparison the settings in which comparisons of its task differ."""
    facts = []
    for c in found:
        ours, theirs = settings_of(c.ours.first), settings_of(c.theirs.first)
        own = {k: v for k, v in theirs.items() if k.startswith(f"{names.theirs}.")}
        own |= {f"{names.theirs} {k}": theirs.get(k) for k in _fitted(c.ours) if theirs.get(k) != ours.get(k)}
        versions = {f"{names.ours} version": ours.pop("version"), f"{names.theirs} version": theirs["version"]}
        facts.append({k: v for k, v in (ours | own | versions).items() if k not in protocol.tuned})
    tasks = [c.ours.first.task for c in found]
    varied = [
        {k for other, at in zip(facts, tasks, strict=True) if at == task for k in mine if mine[k] != other.get(k)}
        for mine, task in zip(facts, tasks, strict=True)
    ]
    return [" ".join(f"{k}={short(mine[k])}" for k in mine if k in keys) for mine, keys in zip(facts, varied, strict=True)]


def _mean(c: Comparison, side: int) -> str:
    """One model's mean over its paired runs (all its runs without a pair), failures named."""
    runs = [pair[side] for pair in c.pairs] or (c.ours, c.theirs)[side].runs
    known = [run.value for run in runs if run.value is not None]
    failures = f"{len(runs) - len(known)} of {len(runs)} failed" if len(known) < len(runs) else ""
    return " ".join(filter(None, (f"{statistics.fmean(known):.3f}" if known else "–", failures and f"({failures})")))


def _difference(c: Comparison) -> str:
    """The mean difference, with half its 95% interval from three pairs that all finished."""
    if c.difference is None:
        return "–"
    exact = c.complete and len(c.pairs) >= INTERVAL_NEEDED
    return f"{c.difference:+.3f}" + (f" ± {half_interval(list(c.differences.values())):.3f}" if exact else "")


def _sentence(found: Sequence[Comparison], places: Sequence[str], protocol: Protocol, names: Names) -> str:
    """Who is better where, by how much, from how many pairs."""
    if protocol.speed:
        return _ratio(found, places, protocol, names)
    where: dict[str, list[str]] = defaultdict(list)
    for c, place in zip(found, places, strict=True):
        where[c.finding(protocol)].append(place)
    what = "task" if len({c.ours.first.task for c in found}) == len(found) else "setting"
    count_of = f"{len(found)} {found[0].ours.first.suite} {what}{'s' * (len(found) > 1)}"
    arrow = "higher" if found[0].ours.first.higher_is_better else "lower"
    named = {finding: f" ({_listed(each)})" for finding, each in where.items()}
    lead = f"{names.ours} is better than {names.theirs} ({arrow} {protocol.metric})"
    words = [f"{lead} on {len(where[BETTER])} of {count_of}{named.get(BETTER, '')}"]
    others = (WORSE, SAME, SOLVED, UNLEARNED, FEW, UNPAIRED)
    words += [f"{finding} on {len(where[finding])}{named[finding]}" for finding in others if where[finding]]
    return "; ".join([*words, _overall(found)]) + "."


def _ratio(found: Sequence[Comparison], places: Sequence[str], protocol: Protocol, names: Names) -> str:
    """How many times the other's speed each setting reaches; nothing is claimed of a model on another kernel than its own."""
    stand_in = next((row for c in found for row in (c.ours.first, c.theirs.first) if named(row) != row.model), None)
    if stand_in:
        return f"No claim: {named(stand_in)} does not run the kernel it was published with."
    ratios = {
        place: statistics.median(a.value / b.value for a, b in c.pairs if a.value and b.value)
        for c, place in zip(found, places, strict=True)
        if any(a.value and b.value for a, b in c.pairs)
    }
    if not ratios:
        return "No pair that both finished."
    low, high = min(ratios, key=lambda place: ratios[place]), max(ratios, key=lambda place: ratios[place])
    ahead = sum(ratio > 1 for ratio in ratios.values())
    return (
        f"{names.ours} has more {protocol.metric} than {names.theirs} on {ahead} of {len(ratios)} settings: from {ratios[low]:.2f} times "
        f"({low}) to {ratios[high]:.2f} times ({high})."
    )


def _overall(found: Sequence[Comparison]) -> str:
    """The mean difference over all pairs; its interval is over seeds, because the tasks of one seed are not independent runs."""
    gaps = [gap for c in found for gap in c.differences.values()]
    if not gaps:
        return "no pair that both finished"
    several = "s" * (len(gaps) > 1)
    told = f"mean difference {statistics.fmean(gaps):+.3f} over {len(gaps)} pair{several}"
    seeds = [set(c.differences) for c in found if c.pairs]
    if not all(c.complete for c in found):
        return f"{told} that both finished, no interval because runs failed"
    if any(each != seeds[0] for each in seeds):
        return f"{told}, no interval because the seeds are not the same everywhere"
    if len(seeds[0]) < INTERVAL_NEEDED:
        return f"{told}, no interval under {INTERVAL_NEEDED} seeds"
    by_seed = [statistics.fmean(c.differences[seed] for c in found if c.pairs) for seed in sorted(seeds[0])]
    middle, half = statistics.fmean(by_seed), half_interval(by_seed)
    return f"{told}, 95% interval {middle - half:+.3f} to {middle + half:+.3f} over {len(by_seed)} seeds"


def _notes(found: Sequence[Comparison], alone: Sequence[Line], protocol: Protocol, names: Names) -> list[str]:
    first = found[0].ours.first
    place = f"protocol version {first.protocol_version}, {first.dtype}" + f", {first.device_name}" * protocol.speed
    notes = [f"{place}; means over paired seeds; each finding by its own paired 95% t-interval"]
    if tested := {" ".join((c.ours.first.task, str(c.items))): None for c in found if c.items}:
        notes.append(f"one run of each: exact test of these two models over the same items, at p < {paired.LEVEL:g}: {_listed(tested)}")
    if not all(c.complete for c in found):
        notes.append("a failed run counts as worse than any value: with one, a model is better only if it is ahead in every pair")
    sides = {names.ours: [c.ours for c in found], names.theirs: [c.theirs for c in found]}
    tuned = [name for name, lines in sides.items() if any(line.searched for line in lines)]
    if tuned:
        whom = " and ".join(tuned) + " only" * (len(tuned) == 1)
        notes.append(
            f"{', '.join(protocol.tuned)} chosen on {chosen_on(line.first for lines in sides.values() for line in lines)} for {whom}"
        )
    notes += _unequal(found, names)
    left = {name: sum(line.first.model == name for line in alone) for name in sides}
    if alone:
        notes.append("left out, no partner under the same settings: " + ", ".join(f"{n} of {name}" for name, n in left.items() if n))
    return [*notes, *([] if protocol.speed else [_speed(found, names)])]


def _unequal(found: Sequence[Comparison], names: Names) -> list[str]:
    """Notes on what is not equal: fitted settings, and parameter counts more than a tenth apart."""
    notes: dict[str, None] = {}
    for c in found:
        ours, theirs = settings_of(c.ours.first), settings_of(c.theirs.first)
        for key in _fitted(c.ours):
            if key in ours and key in theirs and ours[key] != theirs[key]:
                notes[f"not equal: {key} is {ours.get(key)} for {names.ours}, {theirs.get(key)} for {names.theirs}"] = None
        a, b = c.ours.first.parameters, c.theirs.first.parameters
        if a and b and max(a, b) > SIMILAR * min(a, b):
            notes[f"not equal: {names.ours} has {count(a)} parameters, {names.theirs} {count(b)}"] = None
    return list(notes)


def _speed(found: Sequence[Comparison], names: Names) -> str:
    """How fast ours trains beside theirs, over pairs measured on one device in one way."""
    ratios, devices = [], set()
    for a, b in (pair for c in found for pair in c.pairs):
        same = all(getattr(a.row, name) == getattr(b.row, name) for name in ("device", "device_name", "threads", "workers"))
        if same and a.row.tokens_per_s and b.row.tokens_per_s:
            ratios.append(a.row.tokens_per_s / b.row.tokens_per_s)
            devices.add(a.row.device_name)
    if not ratios:
        return "no speed: no pair was measured on one device"
    several = "s" * (len(ratios) > 1)
    return (
        f"speed: {names.ours} trains at {statistics.median(ratios):.2f} times the tokens/s of {names.theirs} "
        f"(median of {len(ratios)} pair{several}, {', '.join(sorted(devices))})"
    )


def _listed(words: Iterable[str]) -> str:
    """The first few of many."""
    each = list(words)
    return ", ".join(each[:LISTED]) + (f" and {len(each) - LISTED} more" if len(each) > LISTED else "")
