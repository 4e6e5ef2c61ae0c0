"""Compiles and tunes the GPU kernels of a plan ahead of its run. Imports no torch.

Triton compiles a kernel's configurations one after another, and only then times them. Compiling is work of the host's cores, and what is
compiled is kept on disk. So several processes rehearse the same cell at once, each compiling its part of every kernel's
configurations; then one process alone, with all compiled and nothing else on the GPU, times them.
"""

import json
import time
from collections.abc import Iterable, Sequence

from hgrn2_bench import executor
from hgrn2_bench.console import duration, names
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.executor import Event, LocalExecutor
from hgrn2_bench.matching import resolve
from hgrn2_bench.ops import autotune
from hgrn2_bench.plan import Cell, make_plan
from hgrn2_bench.provenance import cuda_devices, cuda_memory

MOST_WORKERS = 16
WORKER_BYTES, TIMED_WORKER_BYTES = 1_500_000_000, 16_000_000_000
"""GPU memory of one process: its CUDA context, and a small model with a batch; or the larger work of a suite that times."""
SECTIONS = ("suite", "model_ref", "settings", "model_config", "data", "backend", "dtype", "device")
TRAINING = ("batch_size", "micro_batch", "eval_batch_size", "cuda_graph", "compile_blocks")
"""What of a cell decides which kernels it launches, and on which sizes."""


def distinct(cells: Iterable[Cell]) -> list[Cell]:
    """The first of each group of cells that launch the same kernels on the same sizes."""
    found: dict[str, Cell] = {}
    for cell in cells:
        content = cell.to_json()
        same = {k: content[k] for k in SECTIONS} | {k: content["train"][k] for k in TRAINING}
        found.setdefault(json.dumps(same, sort_keys=True), cell)
    return list(found.values())


def default_workers(timed: bool = False) -> int:
    """One worker a core, at most MOST_WORKERS, and no more than the GPUs have memory for."""
    fit = cuda_devices() * cuda_memory() // (TIMED_WORKER_BYTES if timed else WORKER_BYTES)
    return max(1, min(executor.default_workers("cpu"), MOST_WORKERS, fit))


def parts(workers: int) -> int:
    """In how many parts a kernel's configurations are compiled: with quick tuning there are but a few to share."""
    return workers if autotune.is_full() else min(workers, autotune.CONFIGURATIONS)


def warm(words: Sequence[str], workers: int) -> bool:
    """Warm the kernels of the plan that the words give, with so many workers (0: as many as fit); whether all cells could be rehearsed.

    ConfigError where there is no GPU, and for what a run refuses.
    """
    if not cuda_devices():
        raise ConfigError("warm compiles for a GPU; the driver shows none")
    plan = make_plan(words, "cuda")
    with LocalExecutor(workers or default_workers(plan.protocol.speed)) as pool:
        plan, _ = resolve(plan, pool.solve)
        cells = distinct(cell for cell in plan.cells if cell.backend == "fla")
        if not cells:
            print("nothing to compile: no model of this plan runs on Triton's kernels")
        return not cells or rehearse(cells, pool)


def rehearse(cells: Sequence[Cell], pool: LocalExecutor) -> bool:
    """Compile in parallel, then tune in one worker; prints a line for each cell. Whether all could be rehearsed."""
    began, called, shares = time.monotonic(), names(cells), parts(pool.count)
    compiled = dict.fromkeys(called, 0.0)
    if shares > 1:
        for event in pool.warm(cells, shares):
            seconds, fault = _outcome(event)
            compiled[event.cell.key] = max(compiled[event.cell.key], seconds)
            if fault:
                print(f"note: {called[event.cell.key]}: one of {shares} parts was not compiled: {fault}", flush=True)
    pool.shrink(1)
    faults = 0
    for event in pool.warm(cells, 1):
        seconds, fault = _outcome(event)
        faults += bool(fault)
        first = f"compiled in {duration(compiled[event.cell.key])}, " if shares > 1 else ""
        print(f"{called[event.cell.key]}: {f'failed: {fault}' if fault else f'{first}tuned in {duration(seconds)}'}", flush=True)
    print(f"{len(cells) - faults} of {len(cells)} warm after {duration(time.monotonic() - began)}")
    return not faults


def _outcome(event: Event) -> tuple[float, str]:
    """Seconds, and what went wrong."""
    if event.kind == "warmed":
        return event.content
    return 0.0, event.content[1]  # of a lost worker its reason
