"""Where a number comes from: commit, versions, device. Imports none of our modules, and not torch: planning asks for the device too."""

import ctypes
import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

SMI_WITHIN_S = 20.0
PACKAGES = ("hgrn2_bench", "torch", "triton", "flash-linear-attention", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of Python and of the libraries that numbers depend on."""
    return {"python": platform.python_version()} | {name: version(name) or "not installed" for name in PACKAGES}


def version(distribution: str) -> str:
    """Installed version; empty where there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def commit() -> tuple[str, bool]:
    """The commit of this checkout and whether tracked files differ from it; ("unknown", False) outside a checkout."""
    root = Path(__file__).parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return "unknown", False
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """NVIDIA's driver, started; None where there is none. Asked directly, because importing torch takes seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


@functools.cache
def cuda_devices() -> int:
    """Number of CUDA devices that the driver shows (CUDA_VISIBLE_DEVICES respected)."""
    driver, count = _driver(), ctypes.c_int(0)
    return count.value if driver is not None and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def cuda_memory() -> int:
    """Bytes of memory of the first CUDA device; 0 where there is none."""
    driver, size = _driver(), ctypes.c_size_t(0)
    return size.value if driver is not None and driver.cuDeviceTotalMem_v2(ctypes.byref(size), 0) == 0 else 0


@functools.cache
def device_name(device: str) -> str:
    """The first GPU's or the processor's name."""
    if device == "cuda":
        return _gpu_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpu_name() -> str:
    """As the driver says it; `none` where it shows no GPU."""
    driver, name = _driver(), ctypes.create_string_buffer(256)
    if driver is None or not cuda_devices():
        return "none"
    return name.value.decode() if driver.cuDeviceGetName(name, len(name), 0) == 0 else "unknown GPU"


def gpu_state(uuid: str) -> dict[str, str]:
    """What nvidia-smi says of one GPU now: its UUID, driver, clocks (MHz), power cap (W), temperature, and its processes.

    This program's own counts too. Empty where nvidia-smi is missing or does not know the GPU.
    """
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu", "utilization.gpu")
    found = next((line[1:] for line in nvidia_smi("--query-gpu=uuid," + ",".join(fields)) if line[0].endswith(uuid)), None)
    if found is None:
        return {}
    processes = sum(line[0].endswith(uuid) for line in nvidia_smi("--query-compute-apps=gpu_uuid,pid"))
    return {"uuid": uuid} | dict(zip(fields, found, strict=True)) | {"processes": str(processes)}


def nvidia_smi(query: str) -> list[list[str]]:
    """The lines of one query, split; none where nvidia-smi is missing, refuses or hangs."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_WITHIN_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()]
    return [words for words in lines if len(words) == query.count(",") + 1]
