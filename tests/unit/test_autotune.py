"""How many configurations of a kernel are tried."""

import pytest
import triton
import triton.language as tl
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources

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
    assert autotune.tried() == "full"


def compiled(kernel, part, parts, monkeypatch, broken=()):
    """What one process compiles, in order, and what it goes on with; configurations in `broken` do not fit the GPU."""
    ran = []

    def launch(x, N, **_):
        ran.append(N)
        if N in broken:
            raise OutOfResources(2, 1, "shared memory")

    monkeypatch.setattr(autotune, "autotuners", lambda: iter([kernel]))
    monkeypatch.setattr(kernel.fn, "run", launch)
    with autotune.compiling(part, parts):
        kernel.run(64)
    *compiled, picked = ran
    return compiled, picked


@pytest.mark.parametrize(("n", "parts"), [(4, 4), (9, 4), (36, 16), (3, 3), (5, 2)])
def test_parts_compile_every_configuration_once(n, parts, monkeypatch):
    ran = [compiled(tuner(n), part, parts, monkeypatch) for part in range(parts)]
    assert sorted(each for found, _ in ran for each in found) == list(range(n))
    assert all(picked in found for found, picked in ran)


def test_a_part_without_configurations_runs_one_of_the_others(monkeypatch):
    assert compiled(tuner(3), 4, 8, monkeypatch) == ([1], 1)


def test_a_part_of_which_none_fits_goes_on_with_the_next_that_does(monkeypatch):
    assert compiled(tuner(6), 1, 3, monkeypatch, broken=(1, 4, 2)) == ([1, 4, 2, 3], 3)


def test_parts_are_of_what_quick_tuning_tries(cut, monkeypatch):
    kernel = tuner(36)
    cut(kernel)
    assert compiled(kernel, 1, 4, monkeypatch)[0] == [11]


def test_compiling_keeps_nothing_in_memory_and_writes_no_timing(monkeypatch):
    kernel = tuner(4)
    kernel.cache_results, kernel.cache = True, {"key": "kept"}
    monkeypatch.setattr(autotune, "autotuners", lambda: iter([kernel]))
    before = dict(vars(kernel))
    with autotune.compiling(0, 2):
        assert not kernel.cache_results
        assert kernel.cache == {"key": "kept"}
        kernel.cache["other"] = "picked without timing"
        runs = []
        assert kernel.do_bench(lambda: runs.append(1), quantiles=(0.5, 0.2, 0.8)) == [0.0] * 3
        assert runs == [1]
    assert vars(kernel) == before
    assert kernel.cache == {"key": "kept"}


def test_triton_finds_a_timing_again_by_its_list_of_configurations_alone(tmp_path, monkeypatch):
    """Why a part's timing may not be written: the first part of five of 16 is what quick tuning of 16 tries."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", type("Driver", (), {"get_current_target": lambda _: None})())
    monkeypatch.setattr("triton.compiler.compiler.make_backend", lambda target: type("Backend", (), {"hash": lambda _: "cuda:90"})())
    kernel = tuner(16)
    configs = kernel.configs
    quick = autotune._fewer(lambda _: configs, {})
    assert quick == configs[0::5]

    def timed(tried):
        def bench():
            kernel.configs_timings = {config: [1.0, 1.0, 1.0] for config in tried}

        return not kernel.check_disk_cache((64,), tried, bench)

    assert timed(configs)
    assert timed(configs[0::5])
    assert timed(configs[1::5])
    assert not timed(quick)
