"""Timed cells as a user runs them: what Ctrl-C and --dry-run do where nothing is trained."""

import os
import signal
import subprocess
import sys
import time

LONG = ("suite=throughput", "preset=test", "task=op", "model=gla", "backend=reference", "seq_len=32768", "tokens=32768")


def command(*words):
    return [sys.executable, "-m", "hgrn2_bench", "run", *map(str, words)]


def test_ctrl_c_waits_for_no_timed_cell(tmp_path):
    process = subprocess.Popen(
        command(*LONG, "--results", tmp_path), cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cells/throughput/*/status.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == 130
    assert "the same command continues" in said
    assert "checkpoint" not in said
    assert "Traceback" not in said


def test_a_dry_run_times_no_step(tmp_path):
    """A step of this cell takes a CPU minutes and many gigabytes."""
    words = ("suite=throughput", "preset=short", "task=decode", "model=hgrn2", "seq_len=65536", "num_layers=4", "graph=false", "--dry-run")
    done = subprocess.run(command(*words), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "decode_batch1_eager" in done.stdout
    assert "estimate without" not in done.stdout
