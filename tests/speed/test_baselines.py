"""The kernels held to the speed they had: `pytest tests/speed -n0 --speed-baseline` compares, otherwise each runs once.

A kernel of your own is one more line of GUARDED, or a test of your own that calls `hold_speed`.
"""

from functools import partial

import guard
import pytest
import torch
from cases import CPU_CASES, GPU_CASES, gpu_dtype, selective, training_step

pytestmark = [
    pytest.mark.benchmark(timer=guard.clock),
    pytest.mark.filterwarnings("ignore:::fla", "ignore:::triton"),
]

GPU = torch.cuda.is_available()
GUARDED = GPU_CASES if GPU else CPU_CASES | {"selective_scan": partial(selective, 16, 64, 64, 16)}
"""On a CPU the scan's states stay small: beyond the cache its time varies by 9% between runs."""


@pytest.mark.parametrize("family", GUARDED)
def test_recurrence(hold_speed, family):
    backend, dtype = ("fla", gpu_dtype(family)) if GPU else ("chunked", torch.float32)
    inputs = GUARDED[family]()
    hold_speed(lambda: training_step(inputs, backend, guard.device(), dtype))
