"""Where a number comes from: commit, versions, device. Imports none of our modules, and not torch: planning asks for the device too."""

import ctypes
import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("hgrn2_bench", "torch", "triton", "flash-linear-attention", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of Python and of the libraries that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


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
def cuda_devices() -> int:
    """Number of CUDA devices that the driver shows (CUDA_VISIBLE_DEVICES respected), asked without importing torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


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
    if not cuda_devices():
        return "none"
    driver, handle, name = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0), ctypes.create_string_buffer(256)
    if driver.cuDeviceGet(ctypes.byref(handle), 0) != 0 or driver.cuDeviceGetName(name, len(name), handle) != 0:
        return "unknown GPU"
    return name.value.decode()


def gpu_state() -> dict[str, str]:
    """What nvidia-smi says of the first GPU now: driver, clocks, power cap, temperature, and how many other processes compute on it.

    Empty where there is no nvidia-smi. A process of this program's own counts too, so one is usual.
    """
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu", "utilization.gpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    try:
        answers = [_nvidia_smi(visible, words) for words in ("--query-gpu=" + ",".join(fields), "--query-compute-apps=pid")]
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, answers[0].split(", "), strict=False)) | {"processes": str(len(answers[1].split()))}


def _nvidia_smi(gpu: str, words: str) -> str:
    asked = ["nvidia-smi", f"--id={gpu}", words, "--format=csv,noheader,nounits"]
    return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
