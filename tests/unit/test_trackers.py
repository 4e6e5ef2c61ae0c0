"""Trackers mirror the curve; the packages themselves are played by small modules of the same names."""

import json
import sys
import types

import pytest

from hgrn2_bench import engine, trackers
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.plan import make_plan
from hgrn2_bench.trackers import check_tracker, mirrored


@pytest.fixture
def folder(tmp_path):
    cell = make_plan(["suite=mqar", "preset=test", "model=hgrn2", "train_examples=1_920", "eval_every=25"], "cpu").cells[0]
    made = CellFolder(tmp_path, cell)
    with made.lock():
        yield made


class Writer:
    """Of torch.utils.tensorboard."""

    made = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.written, self.closed = folder, purge_step, [], False
        self.made.append(self)

    def add_scalar(self, name, value, step):
        self.written.append((step, name, value))

    def close(self):
        self.closed = True


@pytest.fixture
def tensorboard(monkeypatch):
    Writer.made = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    return Writer.made


def test_tensorboard_has_every_value_of_the_curve(folder, tensorboard):
    engine.run_cell(folder.cell, folder, lambda *_: None, lambda: False, track="tensorboard")
    (writer,) = tensorboard
    curve = [json.loads(line) for line in folder.curve.read_text().splitlines()]
    assert writer.written == [(record["step"], name, value) for record in curve for name, value in record.items() if name != "step"]
    assert {name for _, name, _ in writer.written} == {"loss", "lr", "grad_norm", "tokens_per_s", "validation_score"}
    assert (writer.folder, writer.purge_step, writer.closed) == (str(folder.path / "tensorboard"), 25, True)


def test_wandb_run_is_the_cell_and_is_resumed_with_it(folder, monkeypatch):
    asked, logged = [], []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished"))
    fake = types.SimpleNamespace(init=lambda **words: asked.append(words) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with mirrored("wandb", folder) as mirror:
        mirror({"step": 50, "loss": 1.5, "grad_norm": None})
        mirror({"step": 100, "loss": 1.25})
    assert logged == [(50, {"loss": 1.5}), (100, {"loss": 1.25}), "finished"]
    (words,) = asked
    assert (words["project"], words["id"], words["resume"], words["dir"]) == ("hgrn2_bench", folder.cell.key, "allow", str(folder.path))
    assert words["config"]["model"] == "hgrn2"
    assert "mode" not in words  # WANDB_MODE decides


def test_nothing_is_opened_without_a_name_or_by_a_process_that_does_not_write(folder, tensorboard):
    with mirrored("", folder) as mirror:
        mirror({"step": 1, "loss": 1.0})
    with mirrored("tensorboard", CellFolder(folder.path, folder.cell, writes=False)) as mirror:
        mirror({"step": 1, "loss": 1.0})
    assert tensorboard == []


def test_a_tracker_that_is_missing_or_unknown_is_one_line(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--track wandb needs wandb: pip install wandb"):
        check_tracker("wandb")
    with pytest.raises(ConfigError, match="Did you mean 'tensorboard'"):
        check_tracker("tensorbord")
    check_tracker("")
