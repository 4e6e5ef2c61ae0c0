"""What a run says while it works: a progress bar with ETA on a terminal, plain lines elsewhere; always on standard error."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from hgrn2_bench.config import written
from hgrn2_bench.executor import Event
from hgrn2_bench.plan import Cell, swept
from hgrn2_bench.results import Row

PLAIN_EVERY_S = 15.0
FIRST_REPORT = 50
"""A cell whose first word comes from a later step was resumed."""


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Monitor:
    """Shows how far the cells of a run are; `weights` are their expected costs in any one unit, `names` what to call them."""

    def __init__(self, weights: Mapping[str, float], names: Mapping[str, str]) -> None:
        self.weights, self.names = weights, names
        self.share: dict[str, float] = {}
        self.start: dict[str, float] = {}
        """Share that a resumed cell had before this run."""
        self.finished = 0
        self.began = self.said = time.monotonic()
        self.console = Console(stderr=True, highlight=False)
        name, note = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}"))
        self.bars = Progress(name, BarColumn(), note, console=self.console)
        self.live = self.console.is_terminal
        self.total: TaskID | None = None
        self.running: dict[str, TaskID] = {}

    def __enter__(self) -> "Monitor":
        if self.live:
            self.bars.start()
            self.total = self.bars.add_task("all cells", total=1.0, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.bars.stop()

    def eta(self) -> str:
        """Time left in words, from the share of expected cost done so far; empty before anything is done."""
        done = sum(self.weights[key] * (share - self.start.get(key, 0.0)) for key, share in self.share.items())
        left = sum(self.weights[key] * (1 - self.share.get(key, 0.0)) for key in self.weights)
        return f"about {duration((time.monotonic() - self.began) * left / done)} left" if done > 0 else ""

    def say(self, text: str) -> None:
        """One line above the bars."""
        self.console.print(text, markup=False, soft_wrap=True)

    def hear(self, event: Event) -> None:
        """Take in one event of a running cell."""
        key, cell = event.cell.key, event.cell
        if event.kind == "progress":
            step, steps, text = event.content
            self.start.setdefault(key, 0.0 if step <= FIRST_REPORT else step / steps)
            self.share[key] = step / steps
            self._show_running(cell, step / steps, f"step {step}/{steps} {text}")
        elif event.kind == "note":
            self.say(event.content[0])
        elif event.kind == "locked":
            self._show_running(cell, 0.0, "waiting for another run")
        elif event.kind in ("done", "lost", "interrupted"):
            self.finish(event)

    def finish(self, event: Event) -> None:
        """A cell ended: say how."""
        key = event.cell.key
        self.share[key] = 1.0
        self.finished += 1
        if key in self.running:
            self.bars.remove_task(self.running.pop(key))
        if event.kind != "interrupted":
            rows: list[Row] = event.content[0] if event.kind == "done" else []
            left = self.eta() if self.finished < len(self.weights) else "all done"
            self.say(f"[{self.finished}/{len(self.weights)}] {self.names[key]}: {result(rows)}; {left}")
        self._refresh()

    def _show_running(self, cell: Cell, share: float, text: str) -> None:
        if self.live:
            if cell.key not in self.running:
                self.running[cell.key] = self.bars.add_task(self.names[cell.key], total=1.0, note="")
            self.bars.update(self.running[cell.key], completed=share, note=text)
        elif time.monotonic() - self.said > PLAIN_EVERY_S:
            self.say(f"{self.names[cell.key]}: {text}; {self.eta()}")
            self.said = time.monotonic()
        self._refresh()

    def _refresh(self) -> None:
        if self.live and self.total is not None:
            total = sum(self.weights.values())
            done = sum(self.weights[key] * share for key, share in self.share.items())
            self.bars.update(self.total, completed=done / total if total else 1.0, note=self.eta())


def names(cells: Sequence[Cell]) -> dict[str, str]:
    """Each cell in a few words, by key: model, task, what the plan sweeps, seed."""
    return {
        key: " ".join([cell.model, cell.task, *(f"{k}={written(v)}" for k, v in settings.items()), f"seed {cell.seed}"])
        for cell, (key, settings) in zip(cells, swept(cells).items(), strict=True)
    }


def result(rows: list[Row]) -> str:
    """How a cell ended, in a few words."""
    row = next((r for r in rows if r.split == "test"), None)
    if row is None:
        return "failed without a row"
    if row.status != "ok" or row.value is None:
        return f"{row.status} ({row.reason})"
    trained = f"after {row.steps} steps " * bool(row.steps)
    return f"{row.metric} {row.value:.3f} {trained}in {duration(row.wall_s)}"
