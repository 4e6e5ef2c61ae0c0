"""The average of a model over all tasks of a suite that has one: over every task of one preset, or not at all."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

from hgrn2_bench import items
from hgrn2_bench.lines import Line, Part, best_lines, learned, place_of, tokens_seen
from hgrn2_bench.protocol import Protocol
from hgrn2_bench.render import Column, Table, count
from hgrn2_bench.results import Row

Models = dict[str, dict[str, list[Line]]]
"""Lines by model and task."""

AT_FLOOR = "†"
"""Beside a mean that does not beat the task's floors."""


def averages(parts: Sequence[Part], protocol: Protocol, metric: str) -> list[Table]:
    """One table for each preset (and protocol version, precision, match) whose suite has an average: a column for each task.

    A model's average is the mean of its tasks' means over seeds. It is left blank, and the reason stands beside it, where a task is
    missing, a run of one failed, or the model has several settings or data sets in one task. One task alone makes no such table.
    """
    if not protocol.averaged[0]:
        return []
    groups: dict[tuple[object, ...], list[Part]] = defaultdict(list)
    setting, tasks = protocol.averaged
    for part in parts:
        row = part.runs[0].row
        if row.settings[setting] in tasks:
            groups[(*place_of(row, protocol), ending(row, protocol))].append(part)
    several = (group for group in groups.values() if len({part.runs[0].row.settings[setting] for part in group}) > 1)
    return [_table(group, protocol, metric) for group in several]


def ending(row: Row, protocol: Protocol) -> str:
    """What a task's name has beyond the value of the setting that names tasks, `-first100`, where parts of tasks stand apart."""
    return row.task.removeprefix(str(row.settings[protocol.averaged[0]])) if protocol.averaged_as else ""


def by_model(parts: Sequence[Part], protocol: Protocol) -> Models:
    """The lines of each model and task."""
    found: Models = defaultdict(lambda: defaultdict(list))
    for part in parts:
        for line in best_lines(part.runs, protocol):
            found[line.first.model][line.first.settings[protocol.averaged[0]]].append(line)
    return found


def _table(parts: Sequence[Part], protocol: Protocol, metric: str) -> Table:
    found, tasks = by_model(parts, protocol), protocol.averaged[1]
    sizes = [Column("parameters", count), Column("tokens seen", count)] * bool(protocol.averaged_as)
    headings = protocol.averaged_as or tasks
    columns = (Column("model"), *sizes, *map(Column, headings), Column("average"), Column("why there is none"))
    body = [_row(model, lines, tasks, len(sizes)) for model, lines in sorted(found.items())]
    names = sorted({line.first.task for lines in found.values() for each in lines.values() for line in each})
    title = f"{protocol.name}, preset {parts[0].runs[0].row.preset}: average {metric} on test data ({protocol.unit})"
    at_floor = "no better than the floor" if protocol.averaged_as else "not learned in this budget"
    marked = [f"{AT_FLOOR} {at_floor}"] if any(str(cell).endswith(AT_FLOOR) for row in body for cell in row) else []
    several = any(len(line.runs) > 1 for lines in found.values() for each in lines.values() for line in each)
    notes = [f"tasks: {', '.join(names)}", *["of several seeds the mean"] * several, *marked]
    errors = ["± is the standard error over the items of all tasks"] if any("±" in str(cell) for row in body for cell in row) else []
    return Table(title, columns, tuple(body), (*notes, *errors))


def _row(model: str, lines: dict[str, list[Line]], tasks: Sequence[str], sizes: int) -> tuple[object, ...]:
    missing = [task for task in tasks if not lines.get(task)]
    several = [task for task in tasks if len(lines.get(task, ())) > 1]
    runs = {task: [run for line in lines.get(task, ()) for run in line.runs] for task in tasks}
    skipped = [task for task, each in runs.items() if any(run.row.status == "skipped" for run in each)]
    failed = [task for task, each in runs.items() if any(run.value is None for run in each) and task not in skipped]
    why = [f"no {', '.join(missing)}"] * bool(missing) + [f"several settings of {', '.join(several)}"] * bool(several)
    why += [f"failed runs of {', '.join(failed)}"] * bool(failed) + [f"skipped {', '.join(skipped)}"] * bool(skipped)
    means = {task: statistics.fmean(lines[task][0].finished) for task in tasks if task not in missing + several + failed + skipped}
    average = "" if why else f"{statistics.fmean(means.values()):.3f}" + _error([lines[task][0] for task in tasks])
    marks = {task: AT_FLOOR * (not learned(lines[task][0])) for task in means}
    first = next(iter(lines.values()))[0].first
    facts = (first.parameters, tokens_seen(first))[:sizes]
    return (model, *facts, *(f"{means[task]:.3f}{marks[task]}" if task in means else "–" for task in tasks), average, "; ".join(why))


def _error(lines: Sequence[Line]) -> str:
    error = average_error(lines)
    return "" if error is None else f" ± {error:.3f}"


def average_error(lines: Sequence[Line]) -> float | None:
    """The standard error of the mean of tasks, each scored by one run, over their items; None where it is not known."""
    errors = [items.score_error(line.first) if len(line.runs) == 1 else None for line in lines]
    known = [error for error in errors if error is not None]
    return float(sum(error**2 for error in known) ** 0.5 / len(errors)) if len(known) == len(errors) else None
