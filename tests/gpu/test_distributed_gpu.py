"""Two GPUs on one cell against one GPU: the same losses, whether each holds the whole model or a share of it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from gpu_marks import ON_GPU

from hgrn2_bench.results import find_rows

pytestmark = ON_GPU

RUN = (
    *("-m", "hgrn2_bench", "run", "suite=mqar", "preset=test", "seed=0", "model=hgrn2", "backend=chunked", "num_layers=2", "updates=50"),
    *("lower_bound=exclusive", "schedule=inverse_sqrt", "warmup=0", "warmup_steps=10", "decay_all=true", "--device", "cuda"),
)
WITHIN_S = 300


def curve(results, *words, processes=1):
    """Losses and gradient norms of a run, and its rows."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}") if processes > 1 else ()
    command = [sys.executable, *torchrun, *RUN, *words, "--results", str(results)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=results, env=environment, capture_output=True, text=True, timeout=WITHIN_S)
    assert done.returncode == 0, done.stderr
    (path,) = results.glob("cells/mqar/*/metrics.jsonl")
    rows, _ = find_rows(results, "mqar")
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in kept if "loss" in record], rows


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "words", [("parallel=ddp",), ("parallel=fsdp",), ("parallel=ddp", "micro_batch=4"), ("parallel=fsdp", "micro_batch=4")]
)
def test_two_gpus_take_the_steps_of_one(tmp_path, words, dtype):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    expected, _ = curve(tmp_path / "one", "clip=1.0", f"dtype={dtype}", *words[1:])
    found, rows = curve(tmp_path / "two", "clip=1.0", f"dtype={dtype}", *words, processes=2)
    assert len(expected) >= 1
    rel = 1e-3 if dtype == "float32" else 2e-2
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=rel)
    assert {row.processes for row in rows} == {2}
    assert {row.effective["parallel"] for row in rows} == {words[0].removeprefix("parallel=")}


def test_accumulation_is_captured_in_a_cuda_graph(tmp_path):
    """The fourth step records all micro batches; losses and norms stay those of the eager loop."""
    for name in ("graph", "eager"):
        (tmp_path / name).mkdir()
    words = ("micro_batch=8", "clip=0")
    found, rows = curve(tmp_path / "graph", *words)
    expected, _ = curve(tmp_path / "eager", *words, "cuda_graph=false")
    assert {row.effective["training_step"] for row in rows} == {"CUDA graph"}
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
