"""Runs cells in worker processes on this machine. Another executor (Ray, Slurm) offers the same methods.

Messages from a worker: ready; described key Description|None fault; solved key Solution; warmed key seconds fault; refused key text;
progress key step steps text; note key text; locked key; interrupted key; done key rows. A worker that dies or overruns sends nothing: its
cell becomes `lost` with a status and a reason, and another worker writes that down where the cell was to have rows.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from hgrn2_bench import worker
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.matching import Solution
from hgrn2_bench.plan import Cell
from hgrn2_bench.provenance import cuda_devices

LOCK_POLL_S = 1.0
STOP_WITHIN_S = 20.0
RUNNING = ("progress", "note")
"""Messages after which the cell goes on."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a cell: `kind` is a worker's message, `content` the rest of it."""

    kind: str
    cell: Cell
    content: tuple[Any, ...]
    order: "Order"


@dataclass(frozen=True)
class Order:
    """What an executor asks for: one of a worker's orders, and the rest of it."""

    kind: str
    cell: Cell
    rest: tuple[Any, ...] = ()


class Executor(Protocol):
    """Runs cells: `LocalExecutor`, or another with the same methods."""

    count: int
    """Cells that run at once."""

    @property
    def crew(self) -> str:
        """Who works, in words."""
        ...

    def describe(self, cells: Sequence[Cell], probe: bool, timeout_s: float | None = None) -> dict[str, tuple[Any, str]]:
        """See `LocalExecutor.describe`."""
        ...

    def solve(self, asked: Sequence[tuple[Cell, tuple[str, ...]]]) -> dict[str, Solution]:
        """See `LocalExecutor.solve`."""
        ...

    def run(
        self, cells: Sequence[Cell], results: Path, force: bool = False, timeout_s: float | None = None, track: str = ""
    ) -> Iterator[Event]:
        """See `LocalExecutor.run`."""
        ...

    def listen(self, heard: Callable[[Event], None]) -> None:
        """Say who hears of progress that `run` cannot yield in time."""
        ...

    def stop(self, within_s: float = 0.0) -> Iterator[Event]:
        """See `LocalExecutor.stop`."""
        ...


class _Worker:
    """One child process and what it is doing."""

    def __init__(self, threads: int, gpu: int) -> None:
        self.gpu = gpu
        context = multiprocessing.get_context("spawn")  # fork after a library has started threads is not safe
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=worker.main, args=(theirs, threads, gpu), daemon=True)
        stops = (signal.SIGINT, signal.SIGTERM)  # the parent's business, from the child's first instruction: ignoring is inherited
        ours = [signal.signal(each, signal.SIG_IGN) for each in stops]
        try:
            self.process.start()
        finally:
            for each, handler in zip(stops, ours, strict=True):
                signal.signal(each, handler)
        theirs.close()
        self.ready = False
        self.order: Order | None = None
        self.since = time.monotonic()

    def send(self, order: "Order") -> None:
        self.order, self.since = order, time.monotonic()
        with contextlib.suppress(OSError):  # a dead worker: reading its pipe says so
            self.pipe.send((order.kind, {**order.cell.to_json(), "key": order.cell.key}, *order.rest))

    def ask_to_stop(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(("stop",))

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def default_workers(device: str) -> int:
    """As many one-thread workers as cores that this process may use (affinity, container quota) on a CPU; one for each GPU."""
    if device != "cpu":
        return max(1, cuda_devices())
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return cores


def alone(asked: int) -> int:
    """The one worker of a run that times, whose cells run alone. ConfigError where more are asked for (0 asks for none in particular)."""
    if asked > 1:
        raise ConfigError(f"--workers {asked}: cells that are timed run alone, on one device")
    return 1


class LocalExecutor:
    """A pool of one-thread worker processes, spread over the GPUs there are; a crashed one is replaced and costs only its own cell."""

    def __init__(self, workers: int, threads: int = 1) -> None:
        self.count, self.threads = workers, threads
        self.workers: list[_Worker] = []

    @property
    def crew(self) -> str:
        """`1 worker`, `8 workers`."""
        return f"{self.count} worker{'s' * (self.count > 1)}"

    def __enter__(self) -> "LocalExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.workers:
            each.kill()
        self.workers.clear()

    def describe(self, cells: Sequence[Cell], probe: bool, timeout_s: float | None = None) -> dict[str, tuple[Any, str]]:
        """A Description (or None and what is wrong with the model's code) for each cell's key. ConfigError for an illegal combination."""
        found: dict[str, tuple[Any, str]] = {}
        for event in self._serve([Order("describe", cell, (probe,)) for cell in cells], timeout_s):
            if event.kind == "refused":
                raise ConfigError(event.content[0])
            found[event.cell.key] = event.content if event.kind == "described" else (None, event.content[1])
        return found

    def solve(self, asked: Sequence[tuple[Cell, tuple[str, ...]]]) -> dict[str, Solution]:
        """What matches each cell, by its key; the settings beside a cell may change. ConfigError for an illegal combination."""
        found: dict[str, Solution] = {}
        for event in self._serve([Order("solve", cell, (free,)) for cell, free in asked], None):
            if event.kind == "refused":
                raise ConfigError(event.content[0])
            found[event.cell.key] = event.content[0] if event.kind == "solved" else Solution(fault=event.content[1])
        return found

    def warm(self, cells: Sequence[Cell], parts: int) -> Iterator[Event]:
        """Rehearse cells, each in so many parts (see `ops.autotune.compiling`), or whole in one. ConfigError for an illegal combination."""
        for event in self._serve([Order("warm", cell, (part, parts)) for cell in cells for part in range(parts)], None):
            if event.kind == "refused":
                raise ConfigError(event.content[0])
            yield event

    def shrink(self, workers: int) -> None:
        """Go on with fewer workers; none may be busy."""
        for each in self.workers[workers:]:
            each.kill()
        self.count, self.workers = workers, self.workers[:workers]

    def run(
        self, cells: Sequence[Cell], results: Path, force: bool = False, timeout_s: float | None = None, track: str = ""
    ) -> Iterator[Event]:
        """Run cells, yielding every event; cells that another run holds are waited for at the end. `track` names a tracker."""
        yield from self._serve([Order("run", cell, (results, force, min(self.count, len(cells)), track)) for cell in cells], timeout_s)

    def listen(self, heard: Callable[[Event], None]) -> None:
        """Nothing to do: `run` yields every event in time."""

    def stop(self, within_s: float = STOP_WITHIN_S) -> Iterator[Event]:
        """Ask for a clean stop: running cells write a checkpoint. Workers that do not answer in time are killed."""
        busy = [w for w in self.workers if w.order is not None]
        for each in busy:
            each.ask_to_stop()
        deadline = time.monotonic() + within_s
        while busy and time.monotonic() < deadline:
            for each in self._readable():
                event = self._receive(each)
                if event is not None:
                    yield event
            busy = [w for w in busy if w.order is not None and w in self.workers]

    def _serve(self, orders: Sequence[Order], timeout_s: float | None) -> Iterator[Event]:
        todo = deque(orders)
        not_before = 0.0
        left = len(orders)
        while left:
            while len(self.workers) < min(self.count, left):
                busy = [w.gpu for w in self.workers]
                self.workers.append(_Worker(self.threads, min(range(max(1, cuda_devices())), key=busy.count)))
            if time.monotonic() >= not_before:
                for each in [w for w in self.workers if w.order is None][: len(todo)]:
                    each.send(todo.popleft())
            late = [w for w in self.workers if timeout_s and w.ready and w.order and time.monotonic() - w.since > timeout_s]
            events: list[Event | None] = [self._replace(w, "timeout", f"no result after {timeout_s:g} s") for w in late]
            for event in events + [self._receive(w) for w in self._readable()]:
                if event is None:
                    continue
                if event.kind == "lost" and event.order.kind == "run":
                    todo.appendleft(Order("record", event.cell, (event.order.rest[0], *event.content)))
                    continue
                if event.kind == "locked":
                    todo.append(Order("run", event.cell, event.order.rest))
                    not_before = time.monotonic() + LOCK_POLL_S
                elif event.kind not in RUNNING:
                    left -= 1
                yield event

    def _readable(self) -> list[_Worker]:
        ready = wait([w.pipe for w in self.workers], 0.2)
        return [w for w in self.workers if w.pipe in ready]

    def _receive(self, each: _Worker) -> Event | None:
        """The next message of a worker, or the end of one that crashed."""
        order = each.order
        try:
            kind, *content = each.pipe.recv()
        except (EOFError, OSError):
            each.process.join()
            code = each.process.exitcode or 0
            if code == -9:
                return self._replace(each, "oom", "worker process killed by signal 9 (the kernel does this when memory runs out)")
            return self._replace(each, "failed", f"worker process ended with {f'signal {-code}' if code < 0 else f'code {code}'}")
        if kind == "ready":
            each.ready, each.since = True, time.monotonic()  # a time limit does not count the import of torch
        if order is None or kind == "ready":
            return None
        if kind not in RUNNING:
            each.order = None
        return Event(kind, order.cell, tuple(content[1:]), order)

    def _replace(self, each: _Worker, status: str, reason: str) -> Event | None:
        """Drop a dead or overdue worker; the pool grows again while there is work. ConfigError where it could not even start."""
        order = each.order
        each.kill()
        self.workers.remove(each)
        if not each.ready and status == "failed":
            raise ConfigError(f"a worker could not start ({reason}); its error is above")
        if order is None:
            return None  # an idle worker costs nothing
        return Event("lost", order.cell, (status, reason), order)
