"""Kernels compiled ahead: a run after `warm` compiles and tunes nothing."""

import os
import subprocess
import sys

from gpu_marks import ON_GPU

pytestmark = ON_GPU

WORDS = ("suite=mqar", "preset=test", "model=hgrn2")


def bench(command, *options, cwd, cache):
    env = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_PRINT_AUTOTUNING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-m", "hgrn2_bench", command, *WORDS, *options]
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_run_after_warm_compiles_and_tunes_nothing(tmp_path):
    cache = tmp_path / "cache"
    assert "1 of 1 warm" in bench("warm", "--workers", "4", cwd=tmp_path, cache=cache)
    binaries = set(cache.rglob("*.cubin"))
    timings = set(cache.rglob("*.autotune.json"))
    assert binaries
    assert timings
    assert "Triton autotuning for function" not in bench("run", "--device", "cuda", cwd=tmp_path, cache=cache)
    assert set(cache.rglob("*.cubin")) == binaries
    assert set(cache.rglob("*.autotune.json")) == timings
