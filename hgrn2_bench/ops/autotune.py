"""How thoroughly fla's kernels are tuned. Triton times every configuration of a kernel at each new head dimension, and compiles them first.

That takes minutes for a model whose whole MQAR run takes seconds. So of those that the kernel itself admits at a head dimension it tries
CONFIGURATIONS, spread evenly over them; `HGRN2_BENCH_TUNING=full` in the environment has it try them all, for work whose speed is the
result. Compiling is work of the host: `compiling` lets several processes share it. Imports none of our modules.
"""

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

CONFIGURATIONS = 4


def is_full() -> bool:
    """Whether the environment asks for all configurations."""
    return os.environ.get("HGRN2_BENCH_TUNING") == "full"


def tried() -> str:
    """For the row: `full`, or how many configurations a kernel tries."""
    return "full" if is_full() else f"{CONFIGURATIONS} configurations a kernel"


def autotuners() -> Iterator[Any]:
    """Every Triton autotuner in the fla modules loaded so far, once."""
    from triton.runtime import KernelInterface
    from triton.runtime.autotuner import Autotuner

    seen: set[int] = set()
    for name in [name for name in sys.modules if name.startswith("fla.")]:
        for kernel in list(vars(sys.modules[name]).values()):
            while isinstance(kernel, KernelInterface) and not isinstance(kernel, Autotuner):
                kernel = getattr(kernel, "fn", None)
            if isinstance(kernel, Autotuner) and id(kernel) not in seen:
                seen.add(id(kernel))
                yield kernel


def cut() -> None:
    """Have each loaded kernel try CONFIGURATIONS only, unless the environment asks for all."""
    if is_full():
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


@contextlib.contextmanager
def compiling(part: int, parts: int) -> Iterator[None]:
    """Have each loaded kernel compile configurations part::parts of those it would try, and time none; all is as before afterwards.

    Triton keeps what it compiles on disk, so processes that each take another part leave a kernel whose tuning only has to time. Their
    own pick is never kept, neither in memory nor on disk: Triton finds a timing again by its list of configurations, and a part may be
    the very list that another run tries.
    """
    tuners = list(autotuners())
    before = [dict(vars(tuner)) for tuner in tuners]
    for tuner in tuners:
        share = _Share(tuner, part, parts)
        tuner.cache, tuner.cache_results, tuner.do_bench = dict(tuner.cache), False, _once
        tuner.prune_configs, tuner._bench = share.order, share.bench
    try:
        yield
    finally:
        for tuner, state in zip(tuners, before, strict=True):
            vars(tuner).clear()
            vars(tuner).update(state)


def _once(call: Callable[[], Any], quantiles: Sequence[float]) -> list[float]:
    """Run a kernel once in place of timing it."""
    call()
    return [0.0] * len(quantiles)


class _Share:
    """One process's share of a kernel's configurations."""

    def __init__(self, tuner: Any, part: int, parts: int) -> None:
        self.admitted, self.run = tuner.prune_configs, tuner._bench
        self.part, self.parts = part, parts
        self.mine: list[Any] = []
        self.has_run = False

    def order(self, arguments: dict[str, Any]) -> list[Any]:
        """All that the kernel would try, this process's share first: a share may be empty, or hold none that fits the GPU's memory."""
        configs = self.admitted(arguments)
        first = self.part % len(configs)
        self.mine, self.has_run = configs[self.part :: self.parts], False
        return sorted(configs[first:] + configs[:first], key=lambda config: config not in self.mine)

    def bench(self, *args: Any, config: Any, **meta: Any) -> list[float]:
        """Compile and run a configuration of the share; of the others one alone, and only where none of the share ran."""
        if self.has_run and config not in self.mine:
            return [math.inf] * 3
        timing: list[float] = self.run(*args, config=config, **meta)
        self.has_run |= timing[0] < math.inf
        return timing
