"""The guard itself: ratios on a clock that a test moves, the rule of an alarm, baseline files, and that a GPU is waited for."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import guard
import pytest
import torch
from guard import Baseline, alarm, baseline_file, ratio, read_baselines, with_earlier_runs

import hgrn2_bench

QUIET = Baseline((2.00, 2.01, 1.99, 2.02, 1.98))  # noise 0.8%: the least margin counts
NOISY = Baseline((2.0, 2.2, 1.9, 2.1, 1.8))  # noise 7.9%
DEVICE = "cpu Some CPU, 1 thread"


class FakeTime:
    """A clock that functions move by what they cost; a burst of other work, now and then, doubles what runs in it."""

    def __init__(self, monkeypatch, bursts=0.0):
        self.now, self.bursts, self.rng = 0.0, bursts, random.Random(0)
        monkeypatch.setattr(guard, "clock", lambda: self.now)

    def costs(self, seconds):
        def call():
            self.now += seconds * (2 if self.rng.random() < self.bursts else 1)

        return call


def test_the_order_of_two_functions_swaps_every_round():
    order = []
    ratio(lambda: order.append("a"), lambda: order.append("b"), rounds=2)
    assert "".join(order) == "baabbaab"  # the first two rounds warm up


@pytest.mark.parametrize("bursts", [0.0, 0.1])
def test_ten_percent_more_work_is_a_ratio_ten_percent_higher_whatever_else_runs(monkeypatch, bursts):
    fake = FakeTime(monkeypatch, bursts)
    calibration = fake.costs(1.0)
    assert ratio(fake.costs(2.2), calibration, rounds=120) == pytest.approx(1.1 * ratio(fake.costs(2.0), calibration, rounds=120))


def test_a_planted_slowdown_of_ten_percent_is_an_alarm_and_unchanged_runs_are_none(monkeypatch):
    """Runs differ by 1%, and a tenth of all calls runs into something else; none of 300 unchanged runs raises an alarm."""
    fake, rng = FakeTime(monkeypatch, bursts=0.1), random.Random(1)
    calibration = fake.costs(1.0)

    def run(cost):
        return ratio(fake.costs(cost * rng.gauss(1, 0.01)), calibration, rounds=guard.PARTS * guard.PART_ROUNDS)

    baseline = Baseline(tuple(run(2.0) for _ in range(10)))
    assert baseline.limit < 2.2 * 0.98
    assert not any(alarm(lambda: run(2.0), baseline.limit) for _ in range(300))
    assert all(alarm(lambda: run(2.2), baseline.limit) for _ in range(100))


def test_an_alarm_is_a_measurement_that_stays_above_the_limit():
    slow = [2.3, 2.2, 2.4]
    assert alarm(iter(slow).__next__, QUIET.limit) == slow
    assert alarm(iter([2.3, 2.2, 2.05]).__next__, QUIET.limit) == ()
    assert alarm(iter([QUIET.limit]).__next__, QUIET.limit) == ()


def test_limits_come_from_the_noise_of_each_test():
    assert QUIET.limit == pytest.approx(2.0 * 1.05)
    assert NOISY.noise == pytest.approx(0.0791, abs=1e-4)
    assert NOISY.limit == pytest.approx(2.0 * (1 + 3 * NOISY.noise))


def report(ratios, device=DEVICE):
    """What pytest-benchmark writes, as far as the guard reads it."""
    benchmarks = [{"fullname": name, "stats": {"median": 1.0, "data": [1.0]}, "extra_info": {"ratios": r}} for name, r in ratios.items()]
    return {"machine_info": {"device": device}, "benchmarks": benchmarks}


def test_runs_add_up_in_one_file(tmp_path):
    file = baseline_file(DEVICE, tmp_path)
    assert file.name == "cpu_Some_CPU_1_thread.json"
    for ratios in ({"a": [1.0], "b": [5.0]}, {"a": [1.1]}, {"a": [1.2], "c": [7.0]}):
        content = report(ratios)
        with_earlier_runs(content, file)
        file.write_text(json.dumps(content))
    found = read_baselines(file, DEVICE)
    assert {name: b.ratios for name, b in found.items()} == {"a": (1.0, 1.1, 1.2), "b": (5.0,), "c": (7.0,)}
    assert "data" not in file.read_text()


def test_a_file_of_another_device_is_refused(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(report({"a": [1.0]}, "cuda Some GPU")))
    with pytest.raises(ValueError, match=r"x\.json was measured on cuda Some GPU, this is cpu Some CPU, 1 thread"):
        read_baselines(file, DEVICE)


def test_baselines_kept_in_results_can_be_read_and_are_named_after_their_device():
    for file in guard.FOLDER.glob("*.json"):
        content = json.loads(file.read_text())
        assert file == baseline_file(content["machine_info"]["device"])
        for baseline in read_baselines(file, content["machine_info"]["device"]).values():
            assert len(baseline.ratios) >= guard.LEAST_RUNS


def test_the_clock_waits_for_the_gpu_before_it_is_read(monkeypatch):
    done, launched = 0, 0

    def synchronize():
        nonlocal done
        done = launched

    def launch():
        nonlocal launched
        launched += 3

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(guard.time, "perf_counter", lambda: done)
    assert guard.seconds(launch) == 3
    assert guard.seconds(launch) == 3  # what was launched before the first reading is not counted


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_processor_that_others_use_is_not_counted():
    assert guard.seconds(lambda: time.sleep(0.05)) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_kernel_that_is_only_launched_counts_in_full():
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sleep():
        began.record()
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        ended.record()

    sleep()
    took = guard.seconds(sleep)
    assert took == pytest.approx(began.elapsed_time(ended) / 1000, rel=0.02)
    assert took > 0.03


def run_pytest(root, values, *options):
    """Run tests whose ratios to the calibration are `values` in a process of its own."""
    lines = ["import guard", "guard.calibrated = lambda make: make()()"]
    lines += [f"def test_{name}(hold_speed):\n    hold_speed(lambda: lambda: {value})" for name, value in values.items()]
    (root / "tests/speed/test_mine.py").write_text("\n".join(lines))
    words = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/speed", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(hgrn2_bench.__file__).parents[1]), *sys.path])
    return subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)


def test_a_run_is_recorded_and_a_later_one_fails_where_it_is_slower(tmp_path):
    here = Path(__file__).parent
    (tmp_path / "tests/speed").mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    for name in ("conftest.py", "guard.py"):
        shutil.copy(here / name, tmp_path / "tests/speed")
    file = baseline_file(guard.machine()["device"], tmp_path / "results/speed")
    file.parent.mkdir(parents=True)
    earlier = {f"tests/speed/test_mine.py::test_{name}": [1.0] * 4 for name in ("same", "slower")}
    file.write_text(json.dumps(report(earlier, guard.machine()["device"])))
    recorded = run_pytest(tmp_path, {"same": 1.0, "slower": 1.0}, "--speed-baseline=record")
    assert recorded.returncode == 0, recorded.stdout + recorded.stderr
    compared = run_pytest(tmp_path, {"same": 1.0, "slower": 1.1, "new": 1.0}, "--speed-baseline")
    assert compared.returncode == 1, compared.stdout + compared.stderr
    assert "1 failed, 1 passed, 1 skipped" in compared.stdout
    expected = "slower than before: 1.100, 1.100, 1.100 times the calibration; median 1.000 of 5 runs, noise 0.0%, limit 1.050"
    assert expected in compared.stdout
    assert f"0 runs in {file.name}, 5 needed" in compared.stdout
    file.write_text(file.read_text().replace(guard.machine()["device"], DEVICE))
    other = run_pytest(tmp_path, {"same": 1.0}, f"--benchmark-compare={file}", "--benchmark-compare-fail=median:0.000000001")
    assert other.returncode == 0, other.stdout + other.stderr
    assert f"Not compared: measured on {DEVICE}, this is" in other.stderr
