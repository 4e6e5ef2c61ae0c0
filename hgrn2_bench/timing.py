"""How long a piece of work takes once it is warm, with quantiles, against ceilings measured in the same process.

On a GPU each call is timed with events on the device, behind a pause in which the first calls are queued: a call's time is the device's and
not that of its launches, unless launching takes longer. On a CPU the wall clock counts. Callers rotate inputs so that no call finds its own
in the cache.
"""

import contextlib
import fcntl
import functools
import itertools
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[[], object]

WINDOW = 5
"""Calls of one warm-up window, and the fewest of a sample."""
MOST_CALLS = 200
MOST_COPIES = 32
STEADY = {"cuda": 0.02, "cpu": 0.05}
"""Two windows in a row whose medians differ by no more are steady."""
CACHE_BYTES = 64 << 20
"""A cache that no processor's share of one core exceeds; a GPU tells its own."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    low: float
    """The 10th percentile."""
    high: float
    """The 90th percentile."""
    calls: int
    warm_up: int
    """Calls before the sample."""
    steady: bool
    """Whether warm-up ended because two windows in a row agreed."""


@contextlib.contextmanager
def alone(device: str) -> Iterator[None]:
    """Time on this machine's device with no other run of this program timing there: the others wait."""
    path = Path(tempfile.gettempdir()) / f"hgrn2_bench-{device}.lock"
    with contextlib.suppress(PermissionError):  # another user's, which can be locked all the same
        path.touch()
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def time_calls(calls: Sequence[Call], device: str, sample_s: float = 0.5, warm_up_s: float = 10.0) -> Timing:
    """Time the calls in turn as one: each does the same work on inputs of its own, and has compiled what it needs before.

    Warm-up goes on until it is steady, or for `warm_up_s`; the sample takes `sample_s` or MOST_CALLS, and at least WINDOW calls.
    """
    turn = itertools.cycle(calls)
    windows: list[float] = []
    steady = False
    began = time.perf_counter()
    while not steady and (time.perf_counter() - began < warm_up_s or len(windows) < 2):
        windows.append(statistics.median(_durations(turn, WINDOW, device)))
        steady = len(windows) > 1 and abs(windows[-1] / windows[-2] - 1) <= STEADY[device]
    count = min(MOST_CALLS, max(WINDOW, round(sample_s / max(windows[-1], 1e-9))))
    sample = sorted(_durations(turn, count, device))
    low, high = (sample[round(share * (count - 1))] for share in (0.1, 0.9))
    return Timing(statistics.median(sample), low, high, count, WINDOW * len(windows), steady)


def _durations(turn: "itertools.cycle[Call]", count: int, device: str) -> list[float]:
    """Seconds of each of the next calls."""
    if device == "cpu":
        ends = [time.perf_counter()]
        for _ in range(count):
            next(turn)()
            ends.append(time.perf_counter())
        return [b - a for a, b in itertools.pairwise(ends)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(10_000_000)  # the device idles for some 6 ms, so that the first calls are queued before it starts
    events[0].record()
    for event in events[1:]:
        next(turn)()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def copies_beyond_cache(nbytes: int, device: str) -> int:
    """How many sets of inputs of `nbytes` must take turns for each to have left the last cache (twice its size) before it comes again.

    At most MOST_COPIES: inputs too small for that stay in the cache, where in use they would be too.
    """
    cache = torch.cuda.get_device_properties().L2_cache_size if device == "cuda" else CACHE_BYTES
    return min(MOST_COPIES, 1 + -(-2 * cache // max(nbytes, 1))) if nbytes < 2 * cache else 1


@dataclass(frozen=True)
class Ceilings:
    """What this device reached just now on work that nothing else limits."""

    copy: float
    """Bytes per second of a large copy, read and written bytes counted."""
    matmul: float
    """Floating-point operations per second of a large matrix product in the dtype of the cell."""

    def share(self, flops: float, nbytes: float, seconds: float) -> float:
        """The part of the roofline reached: the least time that these ceilings allow, over the time taken."""
        return max(flops / self.matmul, nbytes / self.copy) / seconds


@functools.cache
def ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Measure both ceilings, once per process: a copy of 1 GiB (CPU 128 MiB), a product of matrices of 8,192 (CPU 1,024) rows.

    float32 products take TF32 on a GPU, as fla's kernels do.
    """
    count, rows = (1 << 29, 8192) if device == "cuda" else (1 << 26, 1024)
    source, target = (torch.randn(count, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy = time_calls([lambda: target.copy_(source)], device, 0.1, 1.0)
    a, b = (torch.randn(rows, rows, device=device, dtype=dtype) for _ in range(2))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device == "cuda" else precision)
    product = time_calls([lambda: a @ b], device, 0.1, 1.0)
    torch.set_float32_matmul_precision(precision)
    return Ceilings(copy=2 * source.nbytes / copy.median, matmul=2 * rows**3 / product.median)


PEAKS = {
    # dense bfloat16 FLOP/s and bytes/s, from the makers' data sheets
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100": (989e12, 3.35e12),
    "B200": (2250e12, 8.0e12),
    "A100": (312e12, 2.04e12),
    "L40S": (362e12, 0.864e12),
    "L4": (121e12, 0.3e12),
    "RTX 4090": (165e12, 1.008e12),
    "RTX 3090": (71e12, 0.936e12),
}


class MeasuringFaultError(Exception):
    """A result that the device cannot have reached."""


def data_sheet(device_name: str) -> tuple[float, float] | None:
    """Dense bfloat16 FLOP/s and bytes/s of a device; None for one that is not listed."""
    return next((value for name, value in PEAKS.items() if re.search(rf"{name}\b", device_name)), None)  # an L40 is no L4


def check_plausible(flops: float, nbytes: float, seconds: float, device_name: str) -> None:
    """MeasuringFaultError where FLOP/s or bytes/s exceed the data sheet by more than 5%; a device that is not listed passes."""
    peak = data_sheet(device_name)
    if peak is None:
        return
    for amount, most, unit in ((flops, peak[0], "TFLOP/s"), (nbytes, peak[1], "TB/s")):
        if amount / seconds > 1.05 * most:
            raise MeasuringFaultError(
                f"measuring fault: {amount / seconds / 1e12:.4g} {unit} is above the data sheet's {most / 1e12:.4g} of {device_name}"
            )


def tensor_bytes(*tensors: Tensor) -> int:
    """Bytes of all tensors; where a dimension is broadcast its one element counts."""
    return sum(t.itemsize * math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step) for t in tensors)
