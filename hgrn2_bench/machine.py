"""What this machine has, for `doctor`: versions, driver, GPUs, environment, folders, and the self-test's answers. Imports no torch."""

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hgrn2_bench import provenance, registry
from hgrn2_bench.errors import ConfigError

MIB = 1 << 20
TEST_WITHIN_S = 400.0
MOST_TESTS_AT_ONCE = 8
"""Each takes a core, 2 GB of memory and half a GB of the GPU's."""
MODULES = ("flash_qla", "tilelang", "mamba_ssm", "causal_conv1d", "flash_attn", "matplotlib", "PIL", "pyarrow")
"""Packages that need not be installed, or whose presence changes what runs, as they are imported."""
VARIABLES = ("TRITON_INTERPRET", "FLA_FLASH_QLA", "FLA_TILELANG", "FLA_USE_FAST_OPS")
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class Gpu:
    """One CUDA device that the driver shows to this process."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    uuid: str = ""
    used_bytes: int = 0
    """Taken before we touched it; 0 where nvidia-smi is missing."""
    processes: int = 0
    """Other processes on it, as far as nvidia-smi sees them."""


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver as it answers without torch."""

    cuda: tuple[int, int] | None = None
    """Newest CUDA version that it serves; None where there is no driver."""
    release: str = ""
    """Its own version; empty where neither nvidia-smi nor /proc tells."""
    fault: int = 0
    """Error code of cuInit; 0 for none."""
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class TorchFacts:
    """What torch says of itself, in a process of its own."""

    version: str
    cuda: str
    """The CUDA version that it was built for; empty for a CPU build."""
    available: bool
    """Whether it can use the GPU."""
    reason: str = ""
    """Its own words where it cannot."""
    cases: tuple[str, ...] = ()
    """What the self-test can compare."""


@dataclass(frozen=True)
class Comparison:
    """A kernel against `reference`: the largest relative error and the tensor that has it, or why there is none."""

    case: str
    family: str
    kernel: str
    dtype: str
    error: float = 0.0
    tensor: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Folder:
    """A folder that runs write to."""

    path: str
    exists: bool
    writable: bool
    """Whether it, or the nearest parent that exists, can be written to."""
    free_bytes: int
    size_bytes: int = 0


@dataclass(frozen=True)
class Facts:
    """All that the findings are made of, the comparisons on a GPU left out: they follow."""

    python: tuple[int, int, int]
    system: str
    versions: Mapping[str, str]
    """Installed distributions among REQUIRED of `doctor`."""
    modules: frozenset[str]
    """Those of MODULES that can be imported."""
    variables: Mapping[str, str]
    """Those of VARIABLES that are set."""
    driver: Driver
    torch: TorchFacts | None
    torch_fault: str
    """Why there are no facts of torch."""
    comparisons: tuple[Comparison, ...]
    registry_faults: tuple[str, ...]
    models_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Registered models by recurrence family."""
    results: Folder = Folder("results/local", False, True, 1 << 40)
    cache: Folder = Folder("~/.triton/cache", False, True, 1 << 40)
    data: Folder = Folder("data", False, True, 1 << 40)


def gather(results: Path, distributions: Sequence[str]) -> Facts:
    """Look at everything but the kernels of a GPU; about three seconds, most of them torch's import and the self-test on the CPU."""
    driver = read_driver()  # first: nobody else has touched the GPU for us yet
    torch, comparisons, fault = ask_torch()
    faults, models_of = read_registry()
    return Facts(
        python=sys.version_info[:3],
        system=platform.system(),
        versions={name: version for name in distributions if (version := provenance.version(name))},
        modules=frozenset(name for name in MODULES if is_importable(name)),
        variables={name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        driver=driver,
        torch=torch,
        torch_fault=fault,
        comparisons=comparisons,
        registry_faults=faults,
        models_of=models_of,
        results=look_at(results),
        cache=look_at(cache_folder(os.environ), measure=True),
        data=look_at(Path(os.environ.get("HGRN2_BENCH_DATA", "data"))),
    )


def is_importable(module: str) -> bool:
    """Whether a module would be found."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # half removed, or hidden on purpose
        return False


def read_registry() -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """What is wrong with the packages beside ours or with the entry points of others; and the models by recurrence family."""
    faults: list[str] = []

    def tried(read: Callable[..., Any], *arguments: str) -> Any:
        try:
            return read(*arguments)
        except ConfigError as error:
            faults.append(str(error))
            return {}

    tried(registry.check_packages)
    for name in tried(registry.suites) if not faults else ():  # an intruder's suites have no protocol of ours
        tried(registry.protocol, name)
    found: dict[str, tuple[str, ...]] = {}
    for name, model in tried(registry.models).items():
        family = model.facts.get("family", "")
        found[family] = (*found.get(family, ()), name)
    return tuple(faults), found


def read_driver() -> Driver:
    """Ask the driver (CUDA_VISIBLE_DEVICES respected), and nvidia-smi where it is installed."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Driver()
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    served = (version.value // 1000, version.value % 1000 // 10)
    fault = cuda.cuInit(0)
    if fault:
        return Driver(served, fault=fault if fault != NO_DEVICE else 0)
    cuda.cuDeviceGetCount(ctypes.byref(count))
    listed = provenance.nvidia_smi("--query-gpu=uuid,driver_version,memory.used")
    processes = provenance.nvidia_smi("--query-compute-apps=gpu_uuid,pid")
    release = listed[0][1] if listed else ""
    return Driver(served, release, gpus=tuple(with_use(_gpu(cuda, i), listed, processes) for i in range(count.value)))


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, memory, name, identity = ctypes.c_int(0), ctypes.c_size_t(0), ctypes.create_string_buffer(256), (ctypes.c_ubyte * 16)()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    cuda.cuDeviceGetUuid(ctypes.byref(identity), device)
    major, minor = ctypes.c_int(0), ctypes.c_int(0)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, device)
    return Gpu(name.value.decode(), memory.value, (major.value, minor.value), f"GPU-{uuid.UUID(bytes=bytes(identity))}")


def with_use(gpu: Gpu, listed: Sequence[Sequence[str]], processes: Sequence[Sequence[str]]) -> Gpu:
    """The GPU with what nvidia-smi says of its use: lines of (uuid, driver, MiB used), and of (uuid, pid)."""
    used = next((line[2] for line in listed if line[0] == gpu.uuid), "0")
    others = sum(line[0] == gpu.uuid for line in processes)
    return Gpu(gpu.name, gpu.memory_bytes, gpu.capability, gpu.uuid, int(used) * MIB if used.isdecimal() else 0, others)


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where Triton keeps compiled kernels."""
    home = environment.get("TRITON_HOME") or str(Path.home())
    return Path(environment.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))


def look_at(path: Path, measure: bool = False) -> Folder:
    """A folder's state; with `measure` also the bytes of the files in it."""
    nearest = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    size = sum(_size(Path(folder, name)) for folder, _, names in os.walk(path) for name in names) if measure else 0
    return Folder(str(path), path.is_dir(), writable, shutil.disk_usage(nearest).free, size)


def _size(file: Path) -> int:
    try:
        return file.lstat().st_size
    except OSError:  # another process has just removed it
        return 0


def ask_torch() -> tuple[TorchFacts | None, tuple[Comparison, ...], str]:
    """What torch says of itself, the comparisons on the CPU where it sees no GPU, and what went wrong, if anything did."""
    lines, fault = self_test()
    if not lines:
        return None, (), fault
    first = lines[0] | {"cases": tuple(lines[0]["cases"])}
    return TorchFacts(**first), tuple(Comparison(**line) for line in lines[1:]), fault


def compare_on_gpu(cases: Sequence[str]) -> list[Comparison]:
    """Every case on the first GPU, as many at once as there are cores; one whose process ended without a word says how."""
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_TESTS_AT_ONCE)) as pool:
        answers = list(pool.map(self_test, cases))
    found: list[Comparison] = []
    for case, (lines, fault) in zip(cases, answers, strict=True):
        found += [Comparison(**line) for line in lines]
        if fault:
            found.append(Comparison(case, case.partition(" ")[0], "", "", fault=fault))
    return found


def self_test(*cases: str) -> tuple[list[dict[str, Any]], str]:
    """The self-test's answers, and why its process failed; in compiled kernels even where the environment asks for Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    source = f"import sys; sys.path[:] = {sys.path!r}; from hgrn2_bench.selftest import main; main({list(cases)!r})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, env=environment, timeout=TEST_WITHIN_S, check=False
        )
    except subprocess.TimeoutExpired:
        return [], f"no answer within {TEST_WITHIN_S:g} s"
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0:
        return lines, ""
    last = (done.stderr.strip().splitlines() or [""])[-1]
    end = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
    return lines, f"its process ended with {end}: {last}".removesuffix(": ")
