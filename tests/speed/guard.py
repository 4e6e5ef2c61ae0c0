"""How speed is compared: a clock that waits for the GPU, two functions taking turns, and what was measured before on the same device.

Two functions take turns in one process, so that whatever slows the machine slows both. Time itself is never held against a limit, only
time / time of the other: of `reference`, of a bare loop, or of a calibration, the fixed piece of torch work below. A baseline file keeps
the ratio to the calibration, which belongs to a device as a time does, and drifts far less.
"""

import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hgrn2_bench import provenance

Call = Callable[[], object]

FOLDER = Path(__file__).parents[2] / "results" / "speed"
THREADS = 1
ROUNDS = 12
PARTS, PART_ROUNDS = 5, 24
ATTEMPTS = 3
"""A measurement above its limit is repeated: an alarm is one that stays above it this many times."""
LEAST_RUNS = 5
LEAST_MARGIN = 0.05
NOISES = 3.0
"""A limit is this many times the measured noise above the median, and LEAST_MARGIN at least."""


def clock() -> float:
    """Seconds, read after the GPU has finished what it was given; without that a kernel costs its launch.

    Without a GPU it is the processor time of all threads of this process: other processes preempt it for milliseconds, which on a busy
    machine made ratios vary by 7 to 16% where processor time varied by 3 to 4%. Waiting, for a disk or a lock, is not counted.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds(call: Call) -> float:
    start = clock()
    call()
    return clock() - start


def ratios(call: Call, other: Call, rounds: int) -> list[float]:
    """time(call) / time(other) of rounds that swap the order, after two rounds of warm-up."""
    found = []
    for turn in range(rounds + 2):
        if turn % 2:
            first, second = seconds(call), seconds(other)
        else:
            second, first = seconds(other), seconds(call)
        found.append(first / second)
    return found[2:]


def lower_quartile(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 4]


def ratio(call: Call, other: Call, rounds: int = ROUNDS) -> float:
    return lower_quartile(ratios(call, other, rounds))


def calibrated(make: Callable[[], Call]) -> float:
    """Lower quartile of time / time of the calibration over PARTS times PART_ROUNDS rounds, each part on inputs of its own.

    Where buffers happen to lie changes a time by percents; parts halved the difference between processes.
    """
    parts = (ratios(make(), calibration(device()), PART_ROUNDS) for _ in range(PARTS))
    return lower_quartile([x for part in parts for x in part])


def calibration(device: str) -> Call:
    """Matrix products and a scan over rows, the two kinds of work that recurrences are made of; milliseconds on a CPU and on a GPU."""
    torch.manual_seed(0)
    M, size = (64, 64) if device == "cpu" else (256, 512)
    x, y = torch.randn(2, M, size, size, device=device).unbind(0)
    decay, rows = torch.rand(64, 8192, device=device), torch.randn(64, 8192, device=device)

    def work() -> None:
        for _ in range(8):
            torch.bmm(x, y)
        for _ in range(2):
            h = rows.clone()
            for t in range(1, len(h)):
                h[t].addcmul_(decay[t], h[t - 1])

    return work


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, Any]:
    """What must be equal for speeds to be compared (`device`), and what else a reader wants to know."""
    kind = device()
    threads = f", {THREADS} thread{'s' * (THREADS > 1)}" * (kind == "cpu")
    return {"device": f"{kind} {provenance.device_name(kind)}{threads}", "versions": provenance.versions()}


def baseline_file(device: str, folder: Path = FOLDER) -> Path:
    """`cpu AMD EPYC, 1 thread` is kept in `cpu_AMD_EPYC_1_thread.json`."""
    return folder / (re.sub(r"[^A-Za-z0-9.]+", "_", device).strip("_") + ".json")


@dataclass(frozen=True)
class Baseline:
    """Ratios of one test to the calibration in several runs, each a process of its own, on one device."""

    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def noise(self) -> float:
        """Standard deviation between runs, as a share of the median."""
        return statistics.stdev(self.ratios) / self.median

    @property
    def limit(self) -> float:
        return self.median * (1 + max(LEAST_MARGIN, NOISES * self.noise))

    def __str__(self) -> str:
        return f"median {self.median:.3f} of {len(self.ratios)} runs, noise {self.noise:.1%}, limit {self.limit:.3f}"


def read_baselines(file: Path, device: str) -> dict[str, Baseline]:
    """Baselines by the full name of their test. ValueError where the file was measured on another device."""
    content = json.loads(file.read_text())
    if (other := content["machine_info"]["device"]) != device:
        raise ValueError(f"{file.name} was measured on {other}, this is {device}")
    return {b["fullname"]: Baseline(tuple(b["extra_info"]["ratios"])) for b in content["benchmarks"]}


def with_earlier_runs(now: dict[str, Any], file: Path) -> None:
    """Put the ratios that `file` keeps before those of `now`, a pytest-benchmark report, and keep its tests that did not run now."""
    for benchmark in now["benchmarks"]:
        benchmark["stats"].pop("data", None)  # every single time: long, and of no use later
    if not file.exists():
        return
    old = {name: b.ratios for name, b in read_baselines(file, now["machine_info"]["device"]).items()}
    for benchmark in now["benchmarks"]:
        benchmark["extra_info"]["ratios"] = [*old.pop(benchmark["fullname"], ()), *benchmark["extra_info"]["ratios"]]
    now["benchmarks"] += [b for b in json.loads(file.read_text())["benchmarks"] if b["fullname"] in old]


def alarm(measure: Callable[[], float], limit: float) -> Sequence[float]:
    """The ratios measured where each of ATTEMPTS was above the limit; empty as soon as one was not: noise adds time, it takes none away."""
    found: list[float] = []
    while len(found) < ATTEMPTS:
        if (now := measure()) <= limit:
            return ()
        found.append(now)
    return found
