"""Every family of `chunked` on a GPU against `reference` on the CPU."""

from collections.abc import Callable

from gpu_marks import ON_GPU
from test_ops import EXACT, Case, all_cases, assert_equal, change, results, seeded_small_blocks

pytestmark = ON_GPU
__all__ = ["seeded_small_blocks"]


@all_cases
def test_chunked_runs_on_a_gpu(make: Callable[..., Case]) -> None:
    inputs, state = make(100)
    got = results(change(inputs, lambda _, x: x.cuda()), tuple(x.cuda() for x in state), "chunked")
    assert_equal(got, results(inputs, state, "reference"), EXACT)
