"""A cell's folder: atomic files, the lock, damage, and what counts as finished."""

import json
import multiprocessing
import time

import pytest

from hgrn2_bench import cells, engine
from hgrn2_bench.cells import CellFolder, LockedError, check_results, is_locked, read_json, replace_file
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.plan import Cell, make_plan
from hgrn2_bench.protocol import Metric


@pytest.fixture
def cell():
    return make_plan(["suite=mqar", "preset=test", "model=attention"], "cpu").cells[0]


def finished(cell, results, status="ok"):
    folder = CellFolder(results, cell)
    with folder.lock():
        folder.finish(engine.make_rows(cell, [], status, "a reason", engine.Facts()))
    return folder


def test_a_row_has_the_card_of_its_metric_and_none_where_nothing_was_measured(cell):
    carded = Metric("test", "perplexity", 20.0, 10, card={"window": "512 tokens"})
    plain = Metric("test", "accuracy", 0.5, 10)
    assert [row.card for row in engine.make_rows(cell, [carded, plain], "ok", "", engine.Facts())] == [{"window": "512 tokens"}, {}]
    assert engine.make_rows(cell, [], "failed", "a reason", engine.Facts())[0].card == {}


def hold(results, content, ready):
    with CellFolder(results, Cell.from_json(content)).lock():
        ready.set()
        time.sleep(60)


def test_lock_makes_a_folder_that_names_its_cell(cell, tmp_path):
    with CellFolder(tmp_path, cell).lock() as remark:
        assert remark == ""
        stored = read_json(tmp_path / "cells/mqar" / cell.key / "config.json")
    assert Cell.from_json(stored) == cell
    assert not list(tmp_path.glob("cells/mqar/*.tmp*"))


def test_lock_of_a_killed_process_is_free_again(cell, tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=hold, args=(tmp_path, cell.to_json(), ready))
    holder.start()
    assert ready.wait(60)
    folder = CellFolder(tmp_path, cell)
    assert is_locked(folder.path)
    with pytest.raises(LockedError), folder.lock():
        pass
    holder.kill()
    holder.join()
    assert not is_locked(folder.path)
    with folder.lock():
        pass


@pytest.mark.parametrize(("status", "kept"), [("ok", True), ("diverged", True), ("skipped", True), ("failed", False), ("oom", False)])
def test_only_lasting_outcomes_count_as_finished(cell, tmp_path, status, kept):
    assert (finished(cell, tmp_path, status).rows() is not None) == kept


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "foreign"])
def test_damaged_rows_are_not_finished_and_are_set_aside(cell, tmp_path, damage):
    folder = finished(cell, tmp_path)
    path = folder.path / "rows.jsonl"
    text = path.read_text()
    if damage == "gone":
        path.unlink()
    else:
        path.write_text({"cut": text[:-20], "empty": "", "foreign": text.replace(cell.key, "0" * 16)}[damage])
    assert folder.rows() is None
    with folder.lock() as remark:
        assert "rows.jsonl is damaged; set aside as" in remark
        assert folder.status() == {}
    assert len(list(folder.path.parent.glob("*.damaged-*"))) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"suite": "mqar"}'])
def test_folder_without_our_config_is_foreign(cell, tmp_path, content):
    folder = CellFolder(tmp_path, cell)
    folder.path.mkdir(parents=True)
    (folder.path / "config.json").write_text(content)
    with folder.lock() as remark:
        assert "of another cell" in remark


def test_folder_reached_by_another_path_or_command_is_the_same_cell(cell, tmp_path):
    folder = finished(cell, tmp_path)
    config = read_json(folder.path / "config.json") | {"command": "typed otherwise", "model_ref": "elsewhere"}
    (folder.path / "config.json").write_text(json.dumps(config))
    assert folder.damage() == ""


def test_replace_file_leaves_the_old_content_where_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cells.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_full_results_folder_is_refused_in_one_line(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cells.os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device; nothing was run"):
        check_results(tmp_path / "results")


def test_finish_keeps_no_checkpoint_of_a_finished_cell(cell, tmp_path):
    folder = CellFolder(tmp_path, cell)
    with folder.lock():
        folder.checkpoint.write_bytes(b"state")
        folder.finish(engine.make_rows(cell, [], "ok", "", engine.Facts()))
        assert not folder.checkpoint.exists()
