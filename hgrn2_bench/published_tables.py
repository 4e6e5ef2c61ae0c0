"""Tables of what was published beside our own: a line for each value, or for each model where models of several sizes were published."""

import re
import statistics
from collections.abc import Mapping, Sequence

from hgrn2_bench.averages import average_error, by_model, ending
from hgrn2_bench.lines import Line, comparable, tokens_seen
from hgrn2_bench.protocol import Protocol
from hgrn2_bench.published import interval, plain, published, tolerance, verdict
from hgrn2_bench.render import Column, Table, count
from hgrn2_bench.results import Row

AVERAGE = "AVG"
"""The heading of the published averages."""
NEAR = 0.1
"""Relative difference up to which models have one size, and have seen as many tokens."""
NORMAL_95 = 1.96
"""Standard errors to either side of a score over many items that make its 95% interval."""


def published_table(rows: Sequence[Row], protocol: Protocol) -> Table | None:
    """All published values of the suite with our own and the verdict; None where nothing is published for it."""
    lines = published(protocol.name)
    if not lines:
        return None
    sources = tuple(dict.fromkeys(f"{line['table']}: {line['source']}" for line in lines))
    title = f"{protocol.name}: published values"
    if protocol.averaged_as:
        return _by_model(lines, rows, protocol, title, sources)
    columns = tuple(Column(name) for name in ("model", "task", "layers", "published", "ours", "verdict"))
    body = []
    for line in lines:
        ours, words = verdict(line, rows, protocol)
        body.append((line["model"], line["task"], line["layers"] or "–", line["value"], ours, words))
    return Table(title, columns, tuple(body), sources)


def _by_model(lines: Sequence[dict[str, str]], rows: Sequence[Row], protocol: Protocol, title: str, sources: Sequence[str]) -> Table:
    """A line for each published model with the verdict on each task, and below them our own models."""
    headings = (*protocol.averaged_as, AVERAGE)
    columns = (
        Column("model"),
        Column("parameters", count),
        Column("tokens seen", count),
        *(Column(heading) for heading in headings),
        Column("verdict on ours"),
    )
    models: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for line in lines:
        models.setdefault((line["model"], line["params_m"]), {})[line["task"]] = line
    ours = _whole(lines, rows, protocol)
    body: list[tuple[object, ...]] = []
    for (name, _), values in models.items():
        shown = (values[heading]["value"] if heading in values else "–" for heading in headings)
        body.append((name, *_sizes(values), *shown, _verdict(name, values, ours, protocol)))
    for name, tasks in ours.items():
        scores = _scores(tasks, protocol)
        row = _first(tasks)
        shown = (f"{scores[heading][0]:.2f}" if heading in scores else "–" for heading in headings)
        body.append((f"{name} (ours)", row.parameters, tokens_seen(row), *shown, "–"))
    notes = (
        "in percent; a verdict needs a model of the published one's kind, size and tokens (each within 10%), and whole tasks; "
        "it compares the 95% interval over the items of one run, or over the seeds of several",
        *sources,
    )
    return Table(title, columns, tuple(body), notes)


def _whole(lines: Sequence[dict[str, str]], rows: Sequence[Row], protocol: Protocol) -> dict[str, dict[str, list[Line]]]:
    """Our models with their lines by task, of presets that repeat a published table: whole tasks of the average, scored."""
    tables = {line["table"] for line in lines}
    presets = {name for name, preset in protocol.presets.items() if tables & set(preset.reproduces)}
    setting, tasks = protocol.averaged
    kept = [row for row in rows if row.preset in presets and row.protocol_version == protocol.version]
    kept = [row for row in kept if row.settings[setting] in tasks and not ending(row, protocol)]
    found = by_model(comparable(kept, protocol, protocol.metric), protocol)
    scored = {name: {task: [line for line in each if line.finished] for task, each in lines.items()} for name, lines in found.items()}
    return {name: tasks for name, tasks in sorted(scored.items()) if any(tasks.values())}


def _first(tasks: Mapping[str, Sequence[Line]]) -> Row:
    return next(line.first for each in tasks.values() for line in each)


def _sizes(values: Mapping[str, Mapping[str, str]]) -> tuple[float | None, float | None]:
    """Parameters and training tokens of a published model; None where they were not printed."""
    line = next(iter(values.values()))
    tokens = re.search(r"train tokens (\d+)B", line["note"])
    return float(line["params_m"]) * 1e6 if line["params_m"] else None, float(tokens[1]) * 1e9 if tokens else None


def _scores(tasks: Mapping[str, Sequence[Line]], protocol: Protocol) -> dict[str, tuple[float, float, float]]:
    """For each heading our score in percent with the ends of its 95% interval: tasks of one setting, and the average of all."""
    single = {task: each[0] for task in protocol.averaged[1] if len(each := tasks.get(task, ())) == 1}
    named = zip(protocol.averaged[1], protocol.averaged_as, strict=True)
    found = {heading: _interval([single[task]]) for task, heading in named if task in single}
    if len(found) == len(protocol.averaged_as):
        found[AVERAGE] = _interval([single[task] for task in protocol.averaged[1]])
    return found


def _interval(lines: Sequence[Line]) -> tuple[float, float, float]:
    """The mean of some tasks in percent, and its interval: over the items where each was run once, else over the seeds of one task."""
    mean = statistics.fmean(statistics.fmean(line.finished) for line in lines)
    error = average_error(lines)
    low, high = (mean, mean) if error is None else (mean - NORMAL_95 * error, mean + NORMAL_95 * error)
    if len(lines) == 1 and len(lines[0].finished) > 1:
        low, high, _ = interval(lines[0].finished)
    scale = 100 if lines[0].first.unit == "fraction" else 1
    return scale * mean, scale * low, scale * high


def _verdict(
    name: str, values: Mapping[str, Mapping[str, str]], ours: Mapping[str, Mapping[str, Sequence[Line]]], protocol: Protocol
) -> str:
    """How our models of a published one's kind stand to it, task by task, or why they are not comparable."""
    alike = {mine: tasks for mine, tasks in ours.items() if plain(_kind(_first(tasks))) == plain(name)}
    if not alike:
        return "not comparable because there are no rows of such a model over whole tasks"
    reasons = {mine: _unlike(_first(tasks), *_sizes(values)) for mine, tasks in alike.items()}
    told = []
    for mine, tasks in alike.items():
        if not reasons[mine]:
            where: dict[str, list[str]] = {"within": [], "above": [], "below": []}
            for heading, (_, low, high) in _scores(tasks, protocol).items():
                if heading in values:
                    where[_place(low, high, values[heading])].append(heading)
            told.append(f"{mine}: " + ", ".join(f"{place} on {', '.join(each)}" for place, each in where.items() if each))
    return "; ".join(told) or "not comparable because " + "; ".join(f"{mine} {reason}" for mine, reason in reasons.items())


def _place(low: float, high: float, line: Mapping[str, str]) -> str:
    target, slack = float(line["value"]), tolerance(line["note"])
    return "below" if high + slack < target else "above" if low - slack > target else "within"


def _kind(row: Row) -> str:
    """What a row's model is, whatever its folder is called."""
    return str(row.details.get("trained_model", row.model))


def _unlike(row: Row, parameters: float | None, tokens: float | None) -> str:
    """Why a model of ours is not the published one; empty where it has its size and has seen as many tokens."""
    for what, mine, theirs in (("parameters", row.parameters, parameters), ("tokens of training", tokens_seen(row), tokens)):
        if mine is None:
            return f"does not say its {what}"
        if theirs is None:
            return f"has {count(mine)} {what}, the published one does not say"
        if abs(mine / theirs - 1) > NEAR:
            return f"has {count(mine)} {what}, the published one {count(theirs)}"
    return ""
