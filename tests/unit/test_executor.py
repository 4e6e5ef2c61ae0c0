"""Worker processes: what a dead one costs, what a late answer may not overwrite, and how many there are."""

import os
import signal
from pathlib import Path

import pytest

from hgrn2_bench import engine, executor, worker
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.executor import LocalExecutor, default_workers
from hgrn2_bench.plan import make_plan


def cells(*words):
    return make_plan(["suite=mqar", "preset=test", *words], "cpu").cells


def statuses(events):
    return {event.cell.model: event.content[0][0].status for event in events if event.kind == "done"}


def test_idle_worker_that_dies_costs_nothing(tmp_path):
    long, short = cells("model=hgrn2", "train_examples=48_000")[0], cells("model=attention")[0]
    seen = []
    with LocalExecutor(2) as pool:
        for event in pool.run([long, short], tmp_path):
            seen.append(event)
            if event.kind == "done" and event.cell is short:
                (idle,) = [w for w in pool.workers if w.order is None]
                os.kill(idle.process.pid, signal.SIGKILL)
    assert statuses(seen) == {"hgrn2": "ok", "attention": "ok"}


def test_killed_worker_costs_its_own_cell_only(tmp_path):
    one, other = cells("model=hgrn2", "train_examples=64_000")[0], cells("model=attention")[0]
    seen = []
    with LocalExecutor(1) as pool:
        for event in pool.run([one, other], tmp_path):
            seen.append(event)
            if event.kind == "progress" and event.cell is one:
                os.kill(pool.workers[0].process.pid, signal.SIGKILL)
    assert statuses(seen) == {"hgrn2": "oom", "attention": "ok"}
    rows = next(e.content[0] for e in seen if e.kind == "done" and e.cell is one)
    assert "killed by signal 9" in rows[0].reason
    assert CellFolder(tmp_path, one).rows() is None


def test_word_of_a_lost_worker_does_not_overwrite_a_finished_cell(tmp_path):
    (cell,) = cells("model=attention")
    with LocalExecutor(1) as pool:
        list(pool.run([cell], tmp_path))
        before = (CellFolder(tmp_path, cell).path / "rows.jsonl").read_bytes()
        late = executor.Order("record", cell, (tmp_path, "timeout", "too late"))
        events = list(pool._serve([late], None))
    assert statuses(events) == {"attention": "ok"}
    assert (CellFolder(tmp_path, cell).path / "rows.jsonl").read_bytes() == before


ODD = '''
"""Odd but legal mixers."""
import torch
from torch import nn
from hgrn2_bench.interfaces import Mixer

class Scalar(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("count", torch.tensor(0))
    def forward(self, x):
        return self.gain * x

class Talkative(Mixer):
    backends = ("chunked",)
    def __init__(self, spec):
        super().__init__(spec)
        self.linear = nn.Linear(spec.d_model, spec.d_model)
    def state_size(self, seq_len, itemsize=4): return 4
    def op_flops(self, seq_len): return 1.0
    def effective(self): return {"dtype": torch.float32, "decay": float("nan")}
    def forward(self, x, ctx=None): return self.linear(x)
'''


def run(cell, folder):
    made = CellFolder(folder, cell)
    with made.lock():
        return engine.run_cell(cell, made, lambda *_: None, lambda: False)


@pytest.mark.parametrize("name", ["Scalar", "Talkative"])
def test_odd_mixers_give_rows(name, tmp_path):
    (tmp_path / "odd.py").write_text(ODD)
    (cell,) = cells(f"model={tmp_path}/odd.py:{name}")
    rows = run(cell, tmp_path)
    assert {row.status for row in rows} == {"ok"}
    if name == "Talkative":
        assert rows[0].effective["dtype"] == "torch.float32"
        assert rows[0].effective["decay"] is None


def test_file_that_changed_since_the_plan_is_not_run_under_its_old_name(tmp_path):
    (tmp_path / "odd.py").write_text(ODD)
    (cell,) = cells(f"model={tmp_path}/odd.py:Scalar")
    (tmp_path / "odd.py").write_text(ODD.replace("self.gain * x", "x * 2 * self.gain"))
    (row,) = run(cell, tmp_path)
    assert row.status == "failed"
    assert "changed after the run was planned" in row.reason


def test_tokens_count_a_short_last_batch_once(tmp_path):
    (cell,) = cells("model=attention", "train_examples=33", "epochs=3", "eval_every=6")
    row = run(cell, tmp_path)[0]
    assert (row.steps, row.tokens) == (6, 3 * 33 * 16)
    assert row.tokens_per_s == pytest.approx((3 * 33 - 32) * 16 / 5 / row.step_s)  # all steps but the first in one window
    assert row.compile_s >= 0


def test_a_single_pair_has_no_recall_free_floor(tmp_path):
    (cell,) = cells("model=attention", "num_pairs=1")
    rows = run(cell, tmp_path)
    assert {tuple(row.floors) for row in rows} == {("1/|values|",)}


@pytest.mark.parametrize(("content", "expected"), [("50000 100000", 1), ("max 100000", 3), ("250000 100000", 3), ("170000 100000", 2)])
def test_default_workers_respect_a_container_s_quota(content, expected, monkeypatch):
    monkeypatch.setattr(executor.os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(Path, "read_text", lambda _: content)
    assert default_workers("cpu") == expected
    assert default_workers("cuda") == 1


def test_a_row_names_the_layers_where_the_first_one_differs(tmp_path):
    (cell,) = cells("model=hgrn2", "first_layer=base_conv", "num_layers=2")
    row = run(cell, tmp_path)[0]
    assert (row.status, row.mixer_version) == ("ok", "1 base_conv:1")
    assert row.effective["layers"] == ["base_conv", "hgrn2"]


# one GPU for each worker


@pytest.mark.parametrize(
    ("seen", "gpu", "visible"),
    [
        (None, 0, "0"),
        (None, 3, "3"),
        ("5,7", 1, "7"),
        ("GPU-abc,GPU-def", 0, "GPU-abc"),
        ("4", 0, "4"),
        ("", 0, ""),  # the user hides every GPU
    ],
)
def test_a_worker_sees_one_of_the_gpus_that_its_parent_sees(seen, gpu, visible, monkeypatch):
    class Stop(Exception):
        pass

    def inbox(pipe):
        raise Stop

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that they come back
    if seen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    monkeypatch.setattr(worker, "_Inbox", inbox)
    with pytest.raises(Stop):
        worker.main(None, 1, gpu)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


class Idle:
    """A worker that is there and does nothing."""

    def __init__(self, threads, gpu):
        self.gpu, self.order, self.ready = gpu, None, True

    def send(self, order):
        self.order = order


@pytest.mark.parametrize(("gpus", "workers", "places"), [(0, 3, [0, 0, 0]), (1, 2, [0, 0]), (2, 4, [0, 1, 0, 1]), (4, 3, [0, 1, 2])])
def test_workers_are_spread_over_the_gpus(gpus, workers, places, monkeypatch):
    monkeypatch.setattr(executor, "cuda_devices", lambda: gpus)
    monkeypatch.setattr(executor, "_Worker", Idle)
    pool = LocalExecutor(workers)
    monkeypatch.setattr(pool, "_readable", lambda: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        list(pool.run(cells("model=attention", "seed=0,1,2,3,4"), Path()))
    assert [each.gpu for each in pool.workers] == places
    assert default_workers("cuda") == max(1, gpus)


def test_a_lost_worker_s_gpu_is_the_next_one_s(monkeypatch):
    monkeypatch.setattr(executor, "cuda_devices", lambda: 3)
    monkeypatch.setattr(executor, "_Worker", Idle)
    pool = LocalExecutor(3)
    pool.workers = [Idle(1, 0), Idle(1, 2)]
    monkeypatch.setattr(pool, "_readable", lambda: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        list(pool.run(cells("model=attention", "seed=0,1,2"), Path()))
    assert [each.gpu for each in pool.workers] == [0, 2, 1]


def test_worker_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise SystemExit(3)")
    with pytest.raises(ConfigError, match="a worker could not start"), LocalExecutor(1) as pool:
        list(pool.run(cells("model=attention"), tmp_path))
