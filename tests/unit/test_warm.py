"""Warming a plan: which cells are rehearsed, in how many parts by how many workers, and what a failure costs."""

import pytest

from hgrn2_bench import provenance, rehearsal, warm
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.executor import LocalExecutor
from hgrn2_bench.plan import make_plan
from hgrn2_bench.steps import Steps
from suites.mqar.runner import Runner


def cells(*words):
    return make_plan(["suite=mqar", "preset=test", *words], "cpu").cells


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["model=hgrn2,attention"], 2),
        (["model=hgrn2", "seed=0,1,2", "lr=1e-3,1e-2", "weight_decay=0,0.1", "epochs=1,2", "stop_at=0,0.5"], 1),
        (["model=hgrn2", "d_model=32,64"], 2),
        (["model=hgrn2", "hgrn2.expand_ratio=8,16"], 2),
        (["model=hgrn2", "batch_size=16,32"], 2),
        (["model=hgrn2", "eval_batch_size=16,32"], 2),
        (["model=hgrn2", "cuda_graph=true,false"], 2),
        (["model=hgrn2", "dtype=float32,bfloat16"], 2),
        (["model=hgrn2", "train_examples=64,65"], 2),
    ],
)
def test_cells_that_launch_the_same_kernels_are_rehearsed_once(words, count):
    assert len(warm.distinct(cells(*words))) == count


@pytest.mark.parametrize(
    ("cores", "gpus", "gigabytes", "workers"), [(8, 1, 80, 8), (64, 1, 80, 16), (16, 1, 8, 5), (16, 2, 8, 10), (4, 1, 1, 1)]
)
def test_there_are_as_many_workers_as_cores_and_gpu_memory_allow(cores, gpus, gigabytes, workers, monkeypatch):
    monkeypatch.setattr(warm.executor, "default_workers", lambda device: cores)
    monkeypatch.setattr(warm, "cuda_devices", lambda: gpus)
    monkeypatch.setattr(warm, "cuda_memory", lambda: gigabytes * 10**9)
    assert warm.default_workers() == workers


def test_parts_are_no_more_than_the_configurations_tried(monkeypatch):
    monkeypatch.delenv("HGRN2_BENCH_TUNING", raising=False)
    assert [warm.parts(n) for n in (1, 2, 16)] == [1, 2, 4]
    monkeypatch.setenv("HGRN2_BENCH_TUNING", "full")
    assert [warm.parts(n) for n in (1, 2, 16)] == [1, 2, 16]


def test_cells_are_compiled_by_all_workers_and_tuned_by_one(capsys):
    with LocalExecutor(2) as pool:
        assert warm.rehearse(cells("model=hgrn2"), pool)
        assert (pool.count, len(pool.workers)) == (1, 1)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("hgrn2 len16_kv2 seed 0: compiled in ")
    assert "tuned in " in first
    assert last.startswith("1 of 1 warm after ")


BROKEN = '''
"""Mixers that break."""
import os
from torch import nn

class Raises(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)
    def forward(self, x):
        raise RuntimeError("no such kernel")

class Dies(Raises):
    def forward(self, x):
        os._exit(7)
'''


@pytest.mark.parametrize(("name", "reason"), [("Raises", "RuntimeError: no such kernel"), ("Dies", "worker process ended with code 7")])
def test_a_cell_that_fails_costs_itself_only_and_is_told(name, reason, tmp_path, capsys):
    (tmp_path / "broken.py").write_text(BROKEN)
    with LocalExecutor(1) as pool:
        assert not warm.rehearse(cells(f"model={tmp_path}/broken.py:{name},attention"), pool)
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith(name)
    assert f"failed: {reason}" in first
    assert second.startswith("attention len16_kv2 seed 0: tuned in ")
    assert last.startswith("1 of 2 warm")


def test_without_a_gpu_there_is_nothing_to_warm(monkeypatch):
    monkeypatch.setattr(warm, "cuda_devices", lambda: 0)
    with pytest.raises(ConfigError, match="warm compiles for a GPU; the driver shows none"):
        warm.warm(["suite=mqar"], 0)


def test_a_plan_without_tritons_kernels_is_warm(monkeypatch, capsys):
    monkeypatch.setattr(warm, "cuda_devices", lambda: 1)
    assert warm.warm(["suite=mqar", "model=mamba"], 1)
    assert "no model of this plan runs on Triton's kernels" in capsys.readouterr().out


def test_memory_is_nothing_without_a_driver(monkeypatch):
    monkeypatch.setattr(provenance, "_driver", lambda: None)
    assert provenance.cuda_memory() == 0


def test_a_rehearsal_steps_on_each_shape_once_and_evaluates(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (cell,) = cells("model=attention", "batch_size=16", "train_examples=70")
    stepped, evaluated = [], []
    step, report = Steps.__call__, Runner.report
    monkeypatch.setattr(Steps, "__call__", lambda self, batch, rate: stepped.append(len(batch[0])) or step(self, batch, rate))
    monkeypatch.setattr(Runner, "report", lambda self, model: evaluated.append(model.training) or report(self, model))
    rehearsal.rehearse(cell)
    assert stepped == [16, 6]
    assert evaluated == [False]
    assert list(tmp_path.iterdir()) == []
