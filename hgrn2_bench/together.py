"""Runs cells in the processes that torchrun started, all of them on one cell after another. Imports no torch at the top.

The run is planned and told of by the process of rank 0, whose executor has the methods of `LocalExecutor`. The others `follow`: they hear
of a cell once rank 0 has locked it, take every step with it, and write nothing.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hgrn2_bench import distributed
from hgrn2_bench.cells import CellFolder, LockedError
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.executor import LOCK_POLL_S, Event, LocalExecutor, Order, alone, default_workers
from hgrn2_bench.matching import Solution
from hgrn2_bench.plan import Cell
from hgrn2_bench.results import Row
from hgrn2_bench.stopping import InterruptedTrainingError
from hgrn2_bench.worker import REPORT_EVERY_S, named

STOPS = (signal.SIGINT, signal.SIGTERM)


def choose(device: str, speed: bool, workers: int) -> "Together | LocalExecutor":
    """The executor of a run: a pool of workers, or where torchrun started several processes, these. `speed`: the cells time something.

    ConfigError where they cannot run so.
    """
    if distributed.world().size == 1:
        return LocalExecutor((alone(workers) if speed else workers) or default_workers(device))
    if speed:
        raise ConfigError("cells that are timed run alone, in one process: start without torchrun")
    if workers > 1:
        raise ConfigError(f"--workers {workers}: the processes that torchrun started all work on one cell")
    return Together(device)


class Together:
    """The executor of rank 0."""

    count = 1

    def __init__(self, device: str) -> None:
        self.device = device
        self.stopping = threading.Event()
        self.open = contextlib.ExitStack()
        self.world = distributed.world()
        self.heard: Callable[[Event], None] = lambda event: None

    @property
    def crew(self) -> str:
        """`4 processes together`."""
        return f"{self.world.size} processes together"

    def __enter__(self) -> "Together":
        self.open.enter_context(_group(self.device))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, distributed.GroupError):
            with contextlib.suppress(distributed.GroupError):  # they may have heard of the end before
                distributed.tell(("end",))
            self.open.close()

    def describe(self, cells: Sequence[Cell], probe: bool, timeout_s: float | None = None) -> dict[str, tuple[Any, str]]:
        """As `LocalExecutor.describe`; the time limit does not apply."""
        from hgrn2_bench import engine

        found: dict[str, tuple[Any, str]] = {}
        for cell in cells:
            try:
                found[cell.key] = engine.describe(cell, engine.build(cell), probe), ""
            except ConfigError as error:
                raise ConfigError(named(cell, error)) from None
            except Exception as error:  # a fault of the model's code: its cell will fail and say so
                found[cell.key] = None, engine.outcome_of(error)[1]
        return found

    def solve(self, asked: Sequence[tuple[Cell, tuple[str, ...]]]) -> dict[str, Solution]:
        """As `LocalExecutor.solve`."""
        from hgrn2_bench import engine, matching

        found: dict[str, Solution] = {}
        for cell, free in asked:
            try:
                found[cell.key] = matching.solve(cell, free)
            except ConfigError as error:
                raise ConfigError(named(cell, error)) from None
            except Exception as error:  # as in `describe`
                found[cell.key] = Solution(fault=engine.outcome_of(error)[1])
        return found

    def run(
        self, cells: Sequence[Cell], results: Path, force: bool = False, timeout_s: float | None = None, track: str = ""
    ) -> Iterator[Event]:
        """Run cells one after another, yielding events; cells that another run holds are waited for at the end.

        KeyboardInterrupt after the event of a cell that a signal has interrupted.
        """
        todo = deque(Order("run", cell) for cell in cells)
        while todo:
            order = todo.popleft()
            folder = CellFolder(results, order.cell)
            try:
                with folder.lock() as remark:
                    if remark:
                        yield Event("note", order.cell, (remark,), order)
                    yield from self._locked(order, folder, (force, timeout_s, track))
            except LockedError:
                yield Event("locked", order.cell, (), order)
                todo.append(order)
                time.sleep(LOCK_POLL_S)
            if self.stopping.is_set():
                raise KeyboardInterrupt

    def listen(self, heard: Callable[[Event], None]) -> None:
        """Tell of a cell's progress at once: its events cannot be yielded before this process has run it."""
        self.heard = heard

    def stop(self, within_s: float = 0.0) -> Iterator[Event]:
        """Nothing runs any more when the interrupt is heard."""
        return iter(())

    def _locked(self, order: Order, folder: CellFolder, how: tuple[bool, float | None, str]) -> Iterator[Event]:
        """Run one cell that this process holds, or find that another run has finished it."""
        force, timeout_s, track = how
        rows = None if force else folder.rows()
        if force:
            folder.start_over()
        if rows is None:
            rows = self._work(order, folder, timeout_s, track)
        yield Event("interrupted", order.cell, (), order) if rows is None else Event("done", order.cell, (rows,), order)

    def _work(self, order: Order, folder: CellFolder, timeout_s: float | None, track: str) -> list[Row] | None:
        """The rows of a cell, or None where a signal stopped it."""
        from hgrn2_bench import engine

        began = said = time.monotonic()

        def report(step: int, steps: int, text: str) -> None:
            nonlocal said
            if time.monotonic() - said > REPORT_EVERY_S:
                said = time.monotonic()
                self.heard(Event("progress", order.cell, (step, steps, text), order))

        def stop() -> bool:
            return self.stopping.is_set() or (timeout_s is not None and time.monotonic() - began > timeout_s)

        distributed.tell(("run", order.cell.to_json(), str(folder.path.parents[2])))
        try:
            with self._signals(), contextlib.redirect_stdout(sys.stderr):
                return engine.run_cell(order.cell, folder, report, stop, 1, track)
        except InterruptedTrainingError:
            if self.stopping.is_set():
                return None
        rows = engine.make_rows(order.cell, [], "timeout", f"no result after {timeout_s:g} s", engine.Facts())
        folder.finish(rows)
        return rows

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """A signal asks for a stop at the next step that the processes decide on; twice or more asks for no more."""
        before = [signal.signal(each, lambda *_: self.stopping.set()) for each in STOPS]
        try:
            yield
        finally:
            for each, handler in zip(STOPS, before, strict=True):
                signal.signal(each, handler)


def follow(device: str) -> None:
    """Take part in what rank 0 runs until it says that this is the end."""
    with _group(device), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        while (order := distributed.hear())[0] != "end":
            from hgrn2_bench import engine

            cell = Cell.from_json(order[1])
            before = [signal.signal(each, signal.SIG_IGN) for each in STOPS]  # rank 0 says when to stop
            with contextlib.suppress(InterruptedTrainingError):
                engine.run_cell(cell, CellFolder(Path(order[2]), cell, writes=False), lambda *_: None, lambda: False)
            for each, handler in zip(STOPS, before, strict=True):
                signal.signal(each, handler)


@contextlib.contextmanager
def _group(device: str) -> Iterator[None]:
    import torch

    torch.set_num_threads(1)  # as workers have
    with distributed.group(device):
        yield
