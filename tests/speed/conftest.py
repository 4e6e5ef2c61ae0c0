"""`--speed-baseline`: what pytest-benchmark lacks, baselines of one device only, with a limit for each test from its own noise."""

import guard
import pytest

from hgrn2_bench import provenance


def pytest_addoption(parser):
    parser.addoption(
        "--speed-baseline",
        nargs="?",
        const="compare",
        choices=["compare", "record"],
        help="compare with results/speed/DEVICE.json, or record one more run into it; needs -n0",
    )


def pytest_configure(config):
    """Turn pytest-benchmark on, and let it write, or read and show, the file of this device."""
    mode = config.getoption("speed_baseline", None)
    if not mode:
        return
    if config.getoption("dist", "no") != "no":
        raise pytest.UsageError("--speed-baseline measures in one process: add -n0")
    file = guard.baseline_file(guard.machine()["device"])
    config.option.benchmark_disable = False
    config.option.reportchars += "s"  # a test without a baseline says why it was skipped
    if mode == "record":
        file.parent.mkdir(parents=True, exist_ok=True)
        config.option.benchmark_json = file
    elif file.exists():
        config.option.benchmark_compare = str(file)


def pytest_benchmark_generate_machine_info(config):
    return guard.machine()


def pytest_benchmark_generate_commit_info(config):
    return dict(zip(("id", "dirty"), provenance.commit(), strict=True))


def pytest_benchmark_update_json(config, benchmarks, output_json):
    if config.getoption("speed_baseline", None) == "record":
        guard.with_earlier_runs(output_json, config.option.benchmark_json)


def pytest_benchmark_compare_machine_info(config, benchmarksession, machine_info, compared_benchmark):
    """A run of another device is not compared, so `--benchmark-compare-fail` finds nothing; other versions are named.

    pytest-benchmark looks after this hook, and only warns of any difference; here a warning would be an error.
    """
    other, say = compared_benchmark["machine_info"], benchmarksession.logger.info
    if other.get("device") != machine_info["device"]:
        say(f"Not compared: measured on {other.get('device', 'an unnamed device')}, this is {machine_info['device']}")
        compared_benchmark["benchmarks"].clear()
    elif other["versions"] != machine_info["versions"]:
        then = {name: version for name, version in other["versions"].items() if version != machine_info["versions"].get(name)}
        say(f"Note: the baseline was measured with {then}")
    compared_benchmark["machine_info"] = machine_info


@pytest.fixture
def hold_speed(request, benchmark):
    """`hold_speed(make)` runs what `make()` builds; with `--speed-baseline` it records the speed, or fails where that is lower."""
    mode, device = request.config.getoption("speed_baseline", None), guard.machine()["device"]

    def hold(make):
        benchmark.pedantic(make(), rounds=guard.ROUNDS, warmup_rounds=2)
        if not mode:
            return
        if mode == "record":
            benchmark.extra_info["ratios"] = [guard.calibrated(make)]
            return
        baseline = stored(request.node.nodeid, device)
        slower = guard.alarm(lambda: guard.calibrated(make), baseline.limit)
        assert not slower, f"slower than before: {', '.join(f'{x:.3f}' for x in slower)} times the calibration; {baseline}"

    return hold


def stored(test, device):
    """The baseline of a test; skips where this device has none that can be trusted."""
    file = guard.baseline_file(device)
    if not file.exists():
        pytest.skip(f"no baseline of {device}: run with --speed-baseline=record {guard.LEAST_RUNS} times")
    found = guard.read_baselines(file, device).get(test)
    if found is None or len(found.ratios) < guard.LEAST_RUNS:
        runs = 0 if found is None else len(found.ratios)
        pytest.skip(f"{runs} runs in {file.name}, {guard.LEAST_RUNS} needed: run with --speed-baseline=record")
    return found
