"""What a finished cell leaves beside its rows, and what its rows say of several processes; training itself is in `test_trainer.py`."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest

from hgrn2_bench import engine, measure, provenance, registry
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.engine import Shape
from hgrn2_bench.plan import make_plan


def run(results, *words, writes=True):
    cell = make_plan(["suite=mqar", "preset=test", "model=hgrn2", "train_examples=320", *words], "cpu").cells[0]
    folder = CellFolder(results, cell)
    with folder.lock():
        folder.writes = writes
        return engine.run_cell(cell, folder, lambda *_: None, lambda: False), folder


@pytest.fixture
def saved(monkeypatch):
    """What a suite that keeps its models has saved: model, card, folder."""
    kept = []
    protocol = dataclasses.replace(registry.protocol("mqar"), saves_weights=True)
    monkeypatch.setattr(registry, "protocol", lambda name: protocol)
    fake = SimpleNamespace(Card=lambda *facts: facts, save=lambda *what: kept.append(what))
    monkeypatch.setitem(sys.modules, "hgrn2_bench.checkpoints", fake)
    return kept


def test_a_suite_that_asks_for_it_keeps_the_trained_model(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(
        engine.runner_class(make_plan(["suite=mqar", "preset=test"], "cpu").cells[0]), "card", {"tokenizer": "none"}, raising=False
    )
    rows, folder = run(tmp_path, "updates=7")
    ((model, card, path, vocabulary),) = saved
    assert vocabulary is None
    assert measure.weights_hash(model) == rows[0].weights_hash
    assert card == ("hgrn2", folder.cell.settings, {"tokenizer": "none"}, rows[0].tokens)
    assert path == folder.path / "model"
    assert rows[0].steps == 7
    assert not folder.checkpoint.exists()


def test_the_process_that_writes_is_the_only_one_that_keeps_it(tmp_path, saved):
    _, folder = run(tmp_path, writes=False)
    assert saved == []
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.json"]


def test_other_suites_keep_no_model(tmp_path):
    rows, folder = run(tmp_path)
    assert {(row.status, row.processes) for row in rows} == {("ok", 1)}
    assert "parallel" not in rows[0].effective
    assert rows[0].details == {}
    assert not (folder.path / "model").exists()


def test_tokens_of_updates_go_over_the_ends_of_epochs():
    shape = Shape(seq_len=8, labels_per_token=1.0, steps_per_epoch=3, tokens_per_epoch=40, step_tokens=16)
    assert [shape.tokens(steps) for steps in (0, 1, 3, 7)] == [0, 16, 40, 96]


def test_a_plan_counts_the_steps_of_updates():
    cell = make_plan(["suite=mqar", "preset=test", "model=hgrn2", "train_examples=320", "updates=25"], "cpu").cells[0]
    about = engine.describe(cell, engine.build(cell))
    assert (about.steps, about.tokens) == (25, 25 * 32 * 16)


def test_the_peak_rate_is_that_of_all_devices(monkeypatch):
    monkeypatch.setattr(provenance, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert measure.peak_rate(1e9, "cuda", 8) == pytest.approx(8 * 989e12 / 1e9)
    assert measure.peak_rate(None, "cuda", 8) is None
    assert measure.peak_rate(1e9, "cpu", 1) is None
    monkeypatch.setattr(provenance, "device_name", lambda device: "another card")
    assert measure.peak_rate(1e9, "cuda", 1) is None


def test_the_curve_of_a_cpu_has_no_share_of_a_peak(tmp_path):
    _, folder = run(tmp_path)
    (record,) = [r for r in map(json.loads, folder.curve.read_text().splitlines()) if "loss" in r]
    assert set(record) == {"step", "loss", "lr", "grad_norm", "tokens_per_s"}
