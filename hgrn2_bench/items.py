"""What the details of a row say of its items: which metrics its score is the mean of, and standard errors over the items.

A row of a suite that scores items one by one holds `details["scored"][task] = metric` (else the card's `metric` names one for all),
`details["stderr"][task][metric]`, and for metrics that are right or wrong `details["items"][task][metric]` with the number of items `n`.
"""

from typing import Any

from hgrn2_bench.results import Row


def scored(row: Row) -> dict[str, str]:
    """For each task that a row's score is the mean of, the metric that counts; empty where the row does not say."""
    if named := row.details.get("scored"):
        return dict(named)
    metric = row.card.get("metric", "").removeprefix("mean of ").partition(" ")[0]
    tasks = {**_part(row, "items"), **_part(row, "stderr")}
    return dict.fromkeys(tasks, metric) if tasks and all(metric in known for known in tasks.values()) else {}


def held(row: Row, task: str, metric: str) -> dict[str, Any]:
    """What a row holds of the items of one metric: `docs`, `n` and `bits`; empty for a metric that is not right or wrong."""
    found: dict[str, Any] = _part(row, "items").get(task, {}).get(metric, {})
    return found


def by_tasks(row: Row) -> bool:
    """Whether the score of several tasks is their plain mean; else each item counts alike."""
    return row.settings.get("weighting") == "tasks" and len(scored(row)) > 1


def score_error(row: Row) -> float | None:
    """The standard error of a row's score over its items, of tasks of their own; None where that of one is not known."""
    metrics = scored(row)
    errors = {task: error_of(row, task, metric) for task, metric in metrics.items()}
    sizes = {task: 1 if by_tasks(row) or len(metrics) == 1 else held(row, task, metric).get("n") for task, metric in metrics.items()}
    if not metrics or None in errors.values() or None in sizes.values():
        return None
    squares = ((size * (errors[task] or 0.0)) ** 2 for task, size in sizes.items() if size is not None)
    return float(sum(squares) ** 0.5 / sum(size for size in sizes.values() if size is not None))


def error_of(row: Row, task: str, metric: str) -> float | None:
    """The standard error of one metric of one task, or of the only task where `task` is the split `test`; None where it is not known."""
    known = _part(row, "stderr")
    errors = next(iter(known.values())) if task == "test" and len(known) == 1 else known.get(task, {})
    error = errors.get(metric)
    return float(error) if isinstance(error, int | float) else None


def _part(row: Row, name: str) -> dict[str, Any]:
    found: dict[str, Any] = row.details.get(name, {})
    return found
