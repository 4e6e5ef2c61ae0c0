"""The average of a model over all tasks of a suite that has one: over every task of one preset, or not at all."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

from hgrn2_bench.lines import Line, Part, best_lines, learned, place_of
from hgrn2_bench.protocol import Protocol
from hgrn2_bench.render import Column, Table

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
    for part in parts:
        groups[place_of(part.runs[0].row, protocol)].append(part)
    setting = protocol.averaged[0]
    several = (group for group in groups.values() if len({part.runs[0].row.settings[setting] for part in group}) > 1)
    return [_table(group, protocol, metric) for group in several]


def _table(parts: Sequence[Part], protocol: Protocol, metric: str) -> Table:
    setting, tasks = protocol.averaged
    found: dict[str, dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for part in parts:
        for line in best_lines(part.runs, protocol):
            found[line.first.model][line.first.settings[setting]].append(line)
    columns = (Column("model"), *map(Column, tasks), Column("average"), Column("why there is none"))
    body = [_row(model, lines, tasks) for model, lines in sorted(found.items())]
    names = sorted({line.first.task for lines in found.values() for each in lines.values() for line in each})
    title = f"{protocol.name}, preset {parts[0].runs[0].row.preset}: average {metric} on test data ({protocol.unit})"
    marked = [f"{AT_FLOOR} not learned in this budget"] if any(cell.endswith(AT_FLOOR) for row in body for cell in row) else []
    return Table(title, columns, tuple(body), (f"tasks: {', '.join(names)}", "of several seeds the mean", *marked))


def _row(model: str, lines: dict[str, list[Line]], tasks: Sequence[str]) -> tuple[str, ...]:
    missing = [task for task in tasks if not lines.get(task)]
    several = [task for task in tasks if len(lines.get(task, ())) > 1]
    failed = [task for task in tasks if any(None in line.values for line in lines.get(task, ()))]
    why = [f"no {', '.join(missing)}"] * bool(missing) + [f"several settings of {', '.join(several)}"] * bool(several)
    why += [f"failed runs of {', '.join(failed)}"] * bool(failed)
    means = {task: statistics.fmean(lines[task][0].finished) for task in tasks if task not in missing + several + failed}
    average = "" if why else f"{statistics.fmean(means.values()):.3f}"
    marks = {task: AT_FLOOR * (not learned(lines[task][0])) for task in means}
    return (model, *(f"{means[task]:.3f}{marks[task]}" if task in means else "–" for task in tasks), average, "; ".join(why))
