"""How thoroughly fla's kernels are tuned. Triton times every configuration of a kernel at each new head dimension, and compiles them first.

That takes minutes for a model whose whole MQAR run takes seconds. So of those that the kernel itself admits at a head dimension it tries
CONFIGURATIONS, spread evenly over them; `HGRN2_BENCH_TUNING=full` in the environment has it try them all, for work whose speed is the
result. Imports none of our modules.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

CONFIGURATIONS = 4


def thoroughness() -> str:
    """For the row: `full`, or how many configurations a kernel tries."""
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
    """Have each loaded kernel try CONFIGURATIONS only, unless the environment asks for all."""
    if thoroughness() == "full":
        return
    for tuner in autotuners():
        if "prune_configs" not in vars(tuner):
            tuner.prune_configs = functools.partial(_fewer, tuner.prune_configs)


def take_first() -> None:
    """Have each loaded kernel run the first configuration that it admits, and time none: for a look at results, not at speed."""
    for tuner in autotuners():
        tuner.prune_configs = functools.partial(_first, tuner.prune_configs)


def _first(admitted: Callable[[dict[str, Any]], list[Any]], arguments: dict[str, Any]) -> list[Any]:
    return admitted(arguments)[:1]


def _fewer(admitted: Callable[[dict[str, Any]], list[Any]], arguments: dict[str, Any]) -> list[Any]:
    """A few of the configurations that the kernel admits for these arguments, the first and the last among them.

    Of those admitted, not of all: at small heads a kernel of GLA would be left with the one whose two warps take ten times as long.
    """
    configs = admitted(arguments)
    n = len(configs)
    return configs if n <= CONFIGURATIONS else [configs[i * (n - 1) // (CONFIGURATIONS - 1)] for i in range(CONFIGURATIONS)]
