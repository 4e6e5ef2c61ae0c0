"""How many configurations of a kernel are tried."""

import pytest
import triton
import triton.language as tl
from triton.runtime.autotuner import Autotuner

from hgrn2_bench.ops import autotune


def tuner(n, prune=None):
    """A kernel with n configurations, as fla makes them."""

    def kernel(x, N: tl.constexpr):
        pass

    configs = [triton.Config({"N": i}) for i in range(n)]
    return Autotuner(triton.jit(kernel), ["x", "N"], configs, ["x"], None, None, prune_configs_by=prune and {"early_config_prune": prune})


def tried(kernel):
    kernel.nargs = {}
    return [config.kwargs["N"] for config in kernel.prune_configs({})]


@pytest.fixture
def cut(monkeypatch):
    """Cut the given kernels, as if fla had loaded them."""

    def run(*kernels):
        monkeypatch.setattr(autotune, "autotuners", lambda: iter(kernels))
        autotune.cut()

    monkeypatch.delenv("HGRN2_BENCH_TUNING", raising=False)
    return run


@pytest.mark.parametrize(("n", "expected"), [(1, [0]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 4]), (36, [0, 11, 23, 35])])
def test_a_few_configurations_are_tried_spread_over_all(cut, n, expected):
    kernel = tuner(n)
    cut(kernel)
    assert tried(kernel) == expected


def test_they_are_chosen_among_those_the_kernel_admits(cut):
    kernel = tuner(36, prune=lambda configs, nargs, **kwargs: configs[:9])
    cut(kernel)
    assert tried(kernel) == [0, 2, 5, 8]


def test_cutting_again_changes_nothing(cut):
    kernel = tuner(36)
    cut(kernel)
    cut(kernel)
    assert tried(kernel) == [0, 11, 23, 35]


@pytest.mark.parametrize("tuning", ["", "full"])
def test_the_first_admitted_is_taken_for_a_look_at_results(cut, monkeypatch, tuning):
    monkeypatch.setenv("HGRN2_BENCH_TUNING", tuning)
    kernels = tuner(36), tuner(36, prune=lambda configs, nargs, **kwargs: configs[9:])
    cut(*kernels)
    autotune.take_first()
    assert [tried(kernel) for kernel in kernels] == [[0], [9]]


def test_full_tuning_tries_all(cut, monkeypatch):
    monkeypatch.setenv("HGRN2_BENCH_TUNING", "full")
    kernel = tuner(36)
    cut(kernel)
    assert len(tried(kernel)) == 36
    assert autotune.thoroughness() == "full"
