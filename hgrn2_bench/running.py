"""One run of a plan: what is finished, what the rest costs, and the cells run in the order that ends soonest."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from hgrn2_bench import tuning
from hgrn2_bench.cells import FINAL, CellFolder, check_results
from hgrn2_bench.config import written
from hgrn2_bench.console import Monitor, duration, names
from hgrn2_bench.executor import Executor
from hgrn2_bench.plan import Cell, Plan, swept
from hgrn2_bench.render import byte_count, count
from hgrn2_bench.results import Row, archived

COLUMNS = (
    "task",
    "model",
    "settings",
    "cells",
    "parameters",
    "non-embedding",
    "state",
    "steps",
    "tokens",
    "train FLOPs",
    "time a cell (estimate)",
)
H100_FLOPS = 0.195 * 989e12
"""What a training step of HGRN2 at 340M parameters and 2,048 tokens reached on an H100 (results/tables/throughput.md), of its bf16 peak."""


def grouped(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that are alike, together."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.alike, []).append(cell)
    return list(groups.values())


def one_of_each(cells: Sequence[Cell]) -> list[Cell]:
    """The first cell of each model and setting, whatever is asked of it."""
    found: dict[str, Cell] = {}
    for cell in cells:
        content = cell.to_json() | {"seed": 0, "command": "", "task": "", "data": {}}
        found.setdefault(json.dumps(content, sort_keys=True), cell)
    return list(found.values())


class Run:
    """A plan, the executor that runs its cells, and the rows so far.

    `force` takes no cell as finished; a cell that takes more than `timeout_s` seconds is given up; `track` names a tracker.
    """

    def __init__(
        self, plan: Plan, executor: Executor, results: Path, force: bool = False, timeout_s: float | None = None, track: str = ""
    ) -> None:
        self.plan, self.executor, self.results, self.force, self.timeout_s = plan, executor, results, force, timeout_s
        self.track = track
        kept_rows, problems = archived(results, plan.protocol.name)
        for problem in problems:
            print(f"note: {problem}", file=sys.stderr)
        old = {key: rows for key, rows in kept_rows.items() if rows[0].status in FINAL}
        kept = {} if force else {cell.key: CellFolder(results, cell).rows() or old.get(cell.key) for cell in plan.cells}
        self.finished = {key: rows for key, rows in kept.items() if rows is not None}

    @property
    def todo(self) -> list[Cell]:
        """Cells of the plan without rows, whether or not tuning will ask for them."""
        return [cell for cell in self.plan.cells if cell.key not in self.finished]

    @property
    def required(self) -> list[Cell]:
        """Cells without rows that are to run now, as far as the finished ones tell."""
        return [cell for cell in tuning.required(self.plan.cells, self.finished, self.plan.protocol) if cell.key not in self.finished]

    @property
    def rows(self) -> list[Row]:
        """The rows of all finished cells, in the plan's order."""
        return [row for cell in self.plan.cells for row in self.finished.get(cell.key, [])]

    @property
    def is_well(self) -> bool:
        """Whether every cell that was to run has rows, and none of them a failure."""
        return not self.required and all(row.status in ("ok", "skipped") for row in self.rows)

    def describe(self, cells: Sequence[Cell], probe: bool = False) -> dict[str, tuple[Any, str]]:
        """A description, or None and a fault, for each cell's key, made once for cells that are alike. ConfigError for illegal settings."""
        groups = grouped(cells)
        found = self.executor.describe([group[0] for group in groups], probe, self.timeout_s)
        return {cell.key: found[group[0].key] for group in groups for cell in group}

    def execute(self, hint: str = "") -> None:
        """Run what is to run; `hint` is said once the cells are known to be legal. Ctrl-C checkpoints what runs and exits with 130."""
        if not self.todo:
            return
        check_results(self.results)
        timed = self.plan.protocol.speed  # at dozens of sizes: each model is built once to see whether it is legal
        descriptions = self.describe(one_of_each(self.todo) if timed else self.todo)
        if hint:
            print(hint, file=sys.stderr)
        while cells := self.required:
            print(self._opening(cells), file=sys.stderr)
            ran = self._run_cells(cells, {} if timed else {cell.key: descriptions[cell.key][0] for cell in cells})
            self.finished |= ran
            if len(ran) < len(cells):
                return

    def _opening(self, cells: Sequence[Cell]) -> str:
        """One line that says what starts."""
        first, done = cells[0], len(self.finished)
        kept = f" ({done} finished before)" if done else ""
        backends = ", ".join(sorted({cell.backend for cell in cells}))
        return (
            f"{self.plan.protocol.name} preset {self.plan.preset}: {len(cells)} cells to run{kept}; {first.device}, {first.dtype}, "
            f"backend {backends}, {self.executor.crew}"
        )

    def _run_cells(self, cells: Sequence[Cell], about: dict[str, Any]) -> dict[str, list[Row]]:
        """Run the cells, the dearest first unless they take turns, and return their rows."""
        costs = {key: (d.train_flops_per_token or 6 * d.parameters) * d.tokens / 1e12 or 1.0 if d else 1.0 for key, d in about.items()}
        costs = {cell.key: costs.get(cell.key, 1.0) for cell in cells}
        ordered = sorted(cells, key=lambda cell: -costs[cell.key])  # without costs in the order of the plan
        found: dict[str, list[Row]] = {}
        with Monitor(costs, names(cells)) as monitor:
            self.executor.listen(monitor.hear)
            try:
                for event in self.executor.run(ordered, self.results, self.force, self.timeout_s, self.track):
                    monitor.hear(event)
                    if event.kind == "done":
                        found[event.cell.key] = event.content[0]
            except KeyboardInterrupt:
                timed = self.plan.protocol.speed  # such a cell has nothing to keep: it is timed in one piece
                monitor.say("stopping" if timed else "stopping: running cells write a checkpoint")
                for event in self.executor.stop(0.0) if timed else self.executor.stop():
                    monitor.hear(event)
                monitor.say(f"stopped; the same command{' without --force' * self.force} continues")
                sys.exit(130)
        return found

    def print_plan(self) -> None:
        """Print the plan: one line for each group of cells that differ in seed and learning rate only."""
        cells, protocol, first = self.plan.cells, self.plan.protocol, self.plan.cells[0]
        probe = first.device == "cpu" and not protocol.speed  # a step on 65,536 tokens of a large model takes a CPU an hour
        if probe:
            print("building each model and timing a few of its tokens on this CPU", file=sys.stderr)
        descriptions = self.describe(cells, probe)
        settings = {key: {k: v for k, v in each.items() if k != "lr"} for key, each in swept(cells).items()}
        lines, seconds, flops = [], 0.0, 0.0
        for group in grouped(cells):
            head, (about, fault) = group[0], descriptions[group[0].key]
            total = tuning.count(group, protocol)
            left = total - sum(cell.key in self.finished for cell in tuning.required(group, self.finished, protocol))
            varied = ", ".join(f"{k}={written(v)}" for k, v in settings[head.key].items())
            seconds += left * (about.seconds or 0) if about else 0
            flops += left * (about.train_flops_per_token or 0) * about.tokens if about else 0
            lines.append(
                [head.task, head.model, varied, f"{total} ({left} to run)", *(_costs(about) if about else [f"cannot be built: {fault}"])]
            )
        print(tabulate(lines, COLUMNS, tablefmt="github", disable_numparse=True))
        print(f"\n{tuning.count(cells, protocol)} cells, {first.device}, {first.dtype}; protocol version {first.protocol_version}")
        if probe:
            print(f"estimate without early stops: {duration(seconds / self.executor.count)} with {self.executor.crew}")
        if not protocol.speed and flops:
            hours = flops / H100_FLOPS / 3600
            print(f"on one H100 {hours:.2g} GPU hours or more: {count(flops)} operations, at the rate of a 340M HGRN2's training step")


def _costs(about: Any) -> list[Any]:
    """The columns of a description."""
    sizes = [count(about.parameters), count(about.non_embedding_parameters), byte_count(about.state_bytes)]
    flops = about.train_flops_per_token
    each = duration(about.seconds) if about.seconds is not None else "–"
    return [*sizes, about.steps, count(about.tokens), count(flops and flops * about.tokens), each]
