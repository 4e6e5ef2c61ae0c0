"""What is timed, and what is said of it."""

import fcntl
import math
import time

import pytest
import torch

from hgrn2_bench import timing
from hgrn2_bench.timing import Ceilings, MeasuringFaultError, check_plausible, copies_beyond_cache, tensor_bytes, time_calls


def clock(monkeypatch, durations):
    """Calls that take the given seconds, one after the other and the last of them for ever, on a clock of their own."""
    now, left = [0.0], list(durations)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += left.pop(0) if len(left) > 1 else left[0]

    return call


def test_a_slow_start_is_no_part_of_the_sample(monkeypatch):
    timed = time_calls([clock(monkeypatch, [3.0, 0.1])], "cpu", sample_s=1.0)
    assert (timed.median, timed.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert timed.steady
    assert timed.calls == 10


def test_warm_up_lasts_until_two_windows_agree(monkeypatch):
    falling = [0.1 * 0.8**i for i in range(30)] + [0.0001]
    timed = time_calls([clock(monkeypatch, falling)], "cpu", warm_up_s=1000.0)
    assert timed.warm_up > 31
    assert timed.steady
    assert timed.median == pytest.approx(0.0001)


def test_what_never_becomes_steady_says_so(monkeypatch):
    growing = [0.1 * 1.05**i for i in range(400)]
    timed = time_calls([clock(monkeypatch, growing)], "cpu", sample_s=0.5, warm_up_s=3.0)
    assert not timed.steady


def test_a_sample_has_bounds_and_quantiles(monkeypatch):
    few = time_calls([clock(monkeypatch, [2.0])], "cpu", sample_s=0.5)
    many = time_calls([clock(monkeypatch, [1e-6])], "cpu", sample_s=0.5)
    assert (few.calls, many.calls) == (timing.WINDOW, timing.MOST_CALLS)
    mixed = [1.0] * 11 + [1.0 + 0.01 * i for i in range(100)]
    timed = time_calls([clock(monkeypatch, mixed)], "cpu", sample_s=100.0)
    assert timed.low < timed.median < timed.high


def test_calls_take_turns():
    seen = []
    time_calls([lambda: seen.append("a"), lambda: seen.append("b")], "cpu", sample_s=1e-5, warm_up_s=0.01)
    assert seen[:6] == ["a", "b", "a", "b", "a", "b"]


def test_two_runs_do_not_time_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(timing.tempfile, "gettempdir", lambda: str(tmp_path))
    with timing.alone("cpu"), (tmp_path / "hgrn2_bench-cpu.lock").open("a") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with timing.alone("cuda"):
            pass
    with (tmp_path / "hgrn2_bench-cpu.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_that_cannot_be_had_fails_the_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(timing.tempfile, "gettempdir", lambda: str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError), timing.alone("cpu"):
        pass


def test_real_time_is_measured():
    timed = time_calls([lambda: time.sleep(0.004)], "cpu", sample_s=0.1, warm_up_s=0.1)
    assert 0.004 <= timed.median < 0.02


@pytest.mark.parametrize(("nbytes", "copies"), [(1, timing.MOST_COPIES), (timing.CACHE_BYTES, 3), (2 * timing.CACHE_BYTES, 1)])
def test_inputs_that_take_turns_do_not_fit_the_cache(nbytes, copies):
    assert copies_beyond_cache(nbytes, "cpu") == copies


def test_a_broadcast_dimension_is_moved_once():
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert tensor_bytes(x, torch.zeros(1).expand(100), torch.zeros(4, 1).expand(4, 9)) == 12 + 4 + 16


def test_the_roofline_is_the_slower_of_both_ceilings():
    top = Ceilings(copy=100.0, matmul=1000.0)
    assert top.share(flops=500.0, nbytes=10.0, seconds=1.0) == 0.5
    assert top.share(flops=500.0, nbytes=80.0, seconds=1.0) == 0.8


def test_ceilings_of_this_cpu_are_plausible():
    top = timing.ceilings("cpu", torch.float32)
    assert 1e8 < top.copy < 1e12
    assert 1e8 < top.matmul < 1e13
    assert timing.ceilings("cpu", torch.float32) is top


@pytest.mark.parametrize(("flops", "nbytes", "word"), [(2.1e15, 1.0, "TFLOP/s"), (1.0, 4e12, "TB/s"), (math.inf, 1.0, "TFLOP/s")])
def test_what_the_device_cannot_do_is_refused(flops, nbytes, word):
    with pytest.raises(MeasuringFaultError, match=f"measuring fault: .* {word}"):
        check_plausible(flops, nbytes, 1.0, "NVIDIA H100 80GB HBM3")


def test_what_the_device_can_do_passes():
    check_plausible(1.03e15, 3.4e12, 1.0, "NVIDIA H100 80GB HBM3")
    check_plausible(1e30, 1e30, 1.0, "a device that is not listed")
    check_plausible(1.0, 0.8e12, 1.0, "NVIDIA L40")  # no L4


def test_the_more_exact_name_of_a_card_wins():
    with pytest.raises(MeasuringFaultError):
        check_plausible(900e12, 1.0, 1.0, "NVIDIA H100 PCIe")
    check_plausible(900e12, 1.0, 1.0, "NVIDIA H100 80GB HBM3")
