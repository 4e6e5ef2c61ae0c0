"""Where a number comes from: commit, versions, device. Imports none of our modules; torch only where a CUDA device is named."""

import ctypes
import functools
import importlib.metadata
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


def device_name(device: str) -> str:
    """The GPU's or the processor's name."""
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
