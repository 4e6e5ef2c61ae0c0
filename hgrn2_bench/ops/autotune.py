"""How thoroughly fla's kernels are tuned. Triton times every configuration of a kernel at each new head dimension, and compiles them first.

That takes minutes for a model whose whole MQAR run takes seconds. So a kernel keeps CONFIGURATIONS of its own, spread evenly over them;
`HGRN2_BENCH_TUNING=full` in the environment keeps them all, for work whose speed is the result. Imports none of our modules.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

CONFIGURATIONS = 4


def thoroughness() -> str:
    """For the row: `full`, or how many configurations a kernel keeps."""
    return "full" if os.environ.get("HGRN2_BENCH_TUNING") == "full" else f"{CONFIGURATIONS} configurations a kernel"


def autotuners() -> Iterator[Any]:
    """Every Triton autotuner in the fla modules loaded so far."""
    from triton.runtime import KernelInterface
    from triton.runtime.autotuner import Autotuner

    for name in [name for name in sys.modules if name.startswith("fla.")]:
        for kernel in list(vars(sys.modules[name]).values()):
            while isinstance(kernel, KernelInterface) and not isinstance(kernel, Autotuner):
                kernel = getattr(kernel, "fn", None)
            if isinstance(kernel, Autotuner):
                yield kernel


def cut() -> None:
    """Leave each loaded kernel its CONFIGURATIONS, unless the environment asks for all."""
    if thoroughness() == "full":
        return
    for tuner in autotuners():
        n = len(tuner.configs)
        if n > CONFIGURATIONS:
            tuner.configs = [tuner.configs[i * (n - 1) // (CONFIGURATIONS - 1)] for i in range(CONFIGURATIONS)]
