"""A worker process: imports torch once, describes and runs cells as it is told, and dies with its parent.

The parent sends (`describe`, cell, probe), (`solve`, cell, free settings), (`warm`, cell, part, parts), (`run`, cell, results, force,
workers, track), (`record`, cell, results, status, reason) or (`stop`,); it answers with the messages that `hgrn2_bench.executor` lists.
What cells print goes to standard error, so that a table can be piped.
"""

import contextlib
import gc
import os
import queue
import signal
import sys
import threading
import time
from multiprocessing import process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hgrn2_bench.stopping import SIGNAL, InterruptedTrainingError

REPORT_EVERY_S = 0.3
FEEDER, FEEDER_S = "QueueFeederThread", 1.0
"""Threads of `multiprocessing.Queue`, which end soon after it is closed; how long each is waited for."""


class _Inbox:
    """Reads the pipe in a thread: queues orders, notes a stop, and ends the process when the parent is gone."""

    def __init__(self, pipe: Connection) -> None:
        self.orders: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.stopping = threading.Event()
        self.pipe, self.worker = pipe, threading.get_ident()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while True:
                order = self.pipe.recv()
                if order[0] == "stop":
                    self.stopping.set()
                    signal.pthread_kill(self.worker, SIGNAL)
                self.orders.put(order)
        except (EOFError, OSError):
            os._exit(1)  # killed parent: the kernel frees the cell's lock, and the next run continues from the checkpoint


def main(pipe: Connection, threads: int, gpu: int) -> None:
    """Serve one parent until it says stop or goes away; of the GPUs that the parent sees, see only number `gpu`."""
    process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # daemons may have no children, which make pictures
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible != "":  # empty: the user hides every GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    signal.pthread_sigmask(signal.SIG_BLOCK, (SIGNAL,))  # until a cell listens to it
    inbox = _Inbox(pipe)
    import torch

    from hgrn2_bench import provenance

    provenance.commit()  # read now, before anybody edits the checkout
    torch.set_num_threads(threads)
    pipe.send(("ready",))
    with contextlib.redirect_stdout(sys.stderr):
        while True:
            order = inbox.orders.get()
            if order[0] == "stop":
                return
            _obey(order, pipe, inbox.stopping)


def _obey(order: tuple[Any, ...], pipe: Connection, stopping: threading.Event) -> None:
    from hgrn2_bench.plan import Cell

    content = dict(order[1])
    key = content.pop("key")
    cell = Cell.from_json(content)
    if order[0] == "describe":
        _describe(cell, key, order[2], pipe)
    elif order[0] == "solve":
        _solve(cell, key, order[2], pipe)
    elif order[0] == "warm":
        _warm(cell, key, order[2], order[3], pipe)
    elif order[0] == "run":
        _run(cell, key, order[2:], pipe, stopping)
    else:
        _record(cell, key, order[2], order[3], order[4], pipe)


def _describe(cell: Any, key: str, probe: bool, pipe: Connection) -> None:
    from hgrn2_bench import engine
    from hgrn2_bench.errors import ConfigError

    try:
        pipe.send(("described", key, engine.describe(cell, engine.build(cell), probe), ""))
    except ConfigError as error:
        pipe.send(("refused", key, named(cell, error)))
    except Exception as error:  # a fault of the model's code: its cell will fail and say so
        pipe.send(("described", key, None, engine.outcome_of(error)[1]))


def _solve(cell: Any, key: str, free: tuple[str, ...], pipe: Connection) -> None:
    from hgrn2_bench import engine, matching
    from hgrn2_bench.errors import ConfigError

    try:
        pipe.send(("solved", key, matching.solve(cell, free)))
    except ConfigError as error:
        pipe.send(("refused", key, named(cell, error)))
    except Exception as error:  # a fault of the model's code: its cell will fail and say so
        pipe.send(("solved", key, matching.Solution(fault=engine.outcome_of(error)[1])))


def _warm(cell: Any, key: str, part: int, parts: int, pipe: Connection) -> None:
    from hgrn2_bench import engine
    from hgrn2_bench.errors import ConfigError
    from hgrn2_bench.ops import autotune, fla
    from hgrn2_bench.rehearsal import rehearse

    began, fault = time.monotonic(), ""
    try:
        if cell.backend == "fla":
            fla.load_all()
        with autotune.compiling(part, parts) if parts > 1 else contextlib.nullcontext():
            rehearse(cell)
    except ConfigError as error:
        pipe.send(("refused", key, named(cell, error)))
        return
    except Exception as error:  # its cell will fail in the same way, and say so
        fault = engine.outcome_of(error)[1]
    engine.free_memory(cell)
    pipe.send(("warmed", key, time.monotonic() - began, fault))
    if fault and _device_is_broken(cell):
        os._exit(1)  # as in `_run`


def named(cell: Any, error: Exception) -> str:
    """What is wrong, with the model's name."""
    return f"{cell.model}: {error}" if cell.model not in str(error) else str(error)


def _run(cell: Any, key: str, how: tuple[Any, ...], pipe: Connection, stopping: threading.Event) -> None:
    from hgrn2_bench import engine
    from hgrn2_bench.cells import CellFolder, LockedError

    results, force, workers, track = how
    sent, interrupted = 0.0, False

    def report(step: int, steps: int, text: str) -> None:
        nonlocal sent
        if time.monotonic() - sent > REPORT_EVERY_S:
            pipe.send(("progress", key, step, steps, text))
            sent = time.monotonic()

    folder = CellFolder(results, cell)
    try:
        with folder.lock() as remark:
            if remark:
                pipe.send(("note", key, remark))
            rows = folder.rows()
            if force:
                folder.start_over()
            if force or rows is None:
                rows = engine.run_cell(cell, folder, report, stopping.is_set, workers, track)
        _settled()
        pipe.send(("done", key, rows))
        if rows[0].status != "ok" and _device_is_broken(cell):
            os._exit(1)  # a CUDA error that stays would fail every later cell of this process
    except LockedError:
        pipe.send(("locked", key))
    except InterruptedTrainingError:
        interrupted = True  # told below: the parent may end this process then, and what the cell held, loaders too, is gone by then
    except OSError as error:  # a full disk: what was written before stays, and the table still says what happened
        reason = f"cannot write cell {key}: {error.strerror or error}"
        pipe.send(("done", key, engine.make_rows(cell, [], "failed", reason, engine.Facts())))
    if interrupted:
        gc.collect()
        _settled()
        pipe.send(("interrupted", key))


def _settled() -> None:
    """Wait for the threads of loaders that are gone: their semaphores would count as leaked once the parent ends this process."""
    for thread in threading.enumerate():
        if thread.name == FEEDER:
            thread.join(FEEDER_S)


def _device_is_broken(cell: Any) -> bool:
    """Whether the GPU refuses all further work of this process, as it does after an illegal memory access."""
    import torch

    if cell.device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _record(cell: Any, key: str, results: Path, status: str, reason: str, pipe: Connection) -> None:
    """Write the outcome of a cell whose own worker is gone."""
    from hgrn2_bench import engine
    from hgrn2_bench.cells import CellFolder, LockedError

    folder = CellFolder(results, cell)
    facts = engine.Facts()
    facts.progress.step = int(folder.status().get("step", 0))
    rows = engine.make_rows(cell, [], status, reason, facts)
    with contextlib.suppress(OSError, LockedError), folder.lock():
        finished = folder.rows()  # written just before the worker died, or by another run
        if finished is None:
            folder.finish(rows)
        rows = finished or rows
    pipe.send(("done", key, rows))
