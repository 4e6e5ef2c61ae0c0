"""Which cells of a plan run: with `tune_on=first_seed` the tuning grid runs on one seed, and its best point on the others."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hgrn2_bench.lines import best_point
from hgrn2_bench.plan import Cell
from hgrn2_bench.protocol import Protocol
from hgrn2_bench.results import Row


def required(cells: Sequence[Cell], rows: Mapping[str, Sequence[Row]], protocol: Protocol) -> list[Cell]:
    """The cells that are to run, as far as the finished rows (by cell key) tell.

    Of a grid tuned on its first seed these are that seed's cells, and once all of them have rows, the other seeds' at the best point.
    """
    found: set[str] = set()
    for group in _groups(cells, protocol):
        first = _leading(group, protocol)
        found |= {cell.key for cell in first}
        if len(first) < len(group) and all(cell.key in rows for cell in first):
            best = best_point([row for cell in first for row in rows[cell.key]], protocol)
            found |= {cell.key for cell in group if _point(cell, protocol) == best}
    return [cell for cell in cells if cell.key in found]


def count(cells: Sequence[Cell], protocol: Protocol) -> int:
    """How many of these cells will have run in the end."""
    total = 0
    for group in _groups(cells, protocol):
        first = _leading(group, protocol)
        total += len(first) + len({cell.seed for cell in group} - {cell.seed for cell in first})
    return total


def _leading(group: Sequence[Cell], protocol: Protocol) -> list[Cell]:
    """The cells of a group that wait for no other."""
    searched = len({_point(cell, protocol) for cell in group}) > 1
    if group[0].train.tune_on != "first_seed" or not searched:
        return list(group)
    lowest = min(cell.seed for cell in group)
    return [cell for cell in group if cell.seed == lowest]


def _groups(cells: Sequence[Cell], protocol: Protocol) -> list[list[Cell]]:
    """Cells that differ in nothing but seed and tuned keys."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        content: dict[str, Any] = cell.to_json() | {"seed": 0, "command": ""}
        for section in ("model_config", "train", "data"):
            content[section] = {k: v for k, v in content[section].items() if k not in protocol.tuned}
        groups.setdefault(json.dumps(content, sort_keys=True), []).append(cell)
    return list(groups.values())


def _point(cell: Cell, protocol: Protocol) -> tuple[Any, ...]:
    """A cell's place in the tuning grid, in the order in which tables write it; None for a key that it does not take."""
    fields = cell.fields()
    return tuple(fields.get(key) for key in protocol.tuned)
