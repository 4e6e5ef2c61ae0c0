"""Runs in which something goes wrong: mixers that fail, time limits, damaged folders, folders that cannot be written."""

import shutil

import pytest
from test_cli import TEST, bench, first_on_path, rows_of

from hgrn2_bench.results import find_rows

BAD_MIXERS = '''
"""Mixers that go wrong."""
import os, torch
from torch import nn

class Good(nn.Module):
    def __init__(self, d_model, width: int = 8):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)
    def forward(self, x):
        return self.linear(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]

class Raises(Good):
    def forward(self, x):
        if self.training: raise KeyError("no such thing")
        return x

class NotANumber(Good):
    def forward(self, x):
        return self.linear(x) * float("nan")

class TooLarge(Good):
    def forward(self, x):
        if self.training: raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return x

class Dies(Good):
    def forward(self, x):
        if self.training: os._exit(7)
        return x
'''


def test_failing_cells_are_shown_and_the_others_finish(tmp_path):
    (tmp_path / "mine.py").write_text(BAD_MIXERS)
    names = ("Raises", "NotANumber", "TooLarge", "Dies", "Good")
    done = bench(*TEST, "model=" + ",".join(f"./mine.py:{n}" for n in names) + ",attention", "--workers", "2", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    table = {line.split("|")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("| ")}
    assert "failed 1/1: KeyError: 'no such thing'" in table["Raises"]
    assert "diverged 1/1: loss nan at step 1 of 20" in table["NotANumber"]
    assert "oom 1/1: CUDA out of memory (simulated)" in table["TooLarge"]
    assert "failed 1/1: worker process ended with code 7" in table["Dies"]
    for name in ("Good", "attention"):
        assert "not learned" in table[name]
    (trace,) = [path for path in tmp_path.glob("results/local/cells/mqar/*/error.txt") if "KeyError" in path.read_text()]
    assert "Traceback" in trace.read_text()
    rows = {row.model: row for row in rows_of(tmp_path / "results/local")}
    assert rows["NotANumber"].value is None
    assert rows["Good"].effective["decoding"] == "recomputes all tokens"
    assert "Good, NotANumber, Raises, TooLarge) decode by recomputing" in done.stdout


def test_damaged_picture_that_another_process_meets_is_named(tmp_path):
    pytest.importorskip("timm")
    from imagenet_folders import items, write_folders

    train = items(12, 3)
    write_folders(tmp_path / "data", {"train": [(train[0][0][:300], 0), *train[1:]], "val": items(6, 3, 12)})
    words = ("suite=imagenet", "preset=test", "model=hgrn2", "dataset=folder", "data_dir=data", "augment=crop_flip")
    examples = ("train_examples=0", "validation_examples=0", "test_examples=0")
    done = bench("run", *words, *examples, "--device", "cpu", "--results", "r", cwd=tmp_path)
    assert done.returncode == 1
    (row,), _ = find_rows(tmp_path / "r", "imagenet")
    assert row.status == "failed"
    assert row.reason.startswith(f"{tmp_path}/data/train/n01440764/n01440764_0.JPEG: no picture, or cut short (")
    assert "leaked" not in done.stderr


def test_cell_beyond_its_time_limit_is_a_timeout(tmp_path):
    done = bench(*TEST, "model=hgrn2", "train_examples=1_000_000", "--timeout", "6", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "timeout 1/1: no result after 6 s" in done.stdout


def test_time_limit_does_not_count_the_start_of_a_worker(tmp_path):
    (tmp_path / "sitecustomize.py").write_text('import sys, time\nif "spawn_main" in " ".join(sys.orig_argv): time.sleep(6)')
    done = bench(*TEST, "model=attention", "--timeout", "5", cwd=tmp_path, env=first_on_path(tmp_path))
    assert done.returncode == 0, done.stdout


def test_damaged_and_foreign_cell_folders_are_set_aside_with_a_line(tmp_path):
    words = (*TEST, "model=attention,hgrn1")
    first = bench(*words, cwd=tmp_path)
    folder = tmp_path / "results/local/cells/mqar"
    one, other = sorted(path.parent for path in folder.glob("*/rows.jsonl"))
    untouched = (other / "rows.jsonl").read_bytes()
    text = (one / "rows.jsonl").read_text()
    (one / "rows.jsonl").write_text(text[: len(text) - 100])
    note = bench("table", "mqar", cwd=tmp_path)
    assert note.returncode == 0
    assert "truncated" in note.stderr
    again = bench(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "rows.jsonl is damaged" in again.stderr
    assert len(list(folder.glob(f"{one.name}.damaged-*"))) == 1
    assert (other / "rows.jsonl").read_bytes() == untouched
    accuracy = [line.split("|")[8] for line in first.stdout.splitlines() if line.startswith("| ")]
    assert [line.split("|")[8] for line in again.stdout.splitlines() if line.startswith("| ")] == accuracy
    shutil.rmtree(one)
    one.mkdir()
    (one / "config.json").write_text('{"something": "else"}')
    foreign = bench(*words, cwd=tmp_path)
    assert foreign.returncode == 0
    assert "of another cell" in foreign.stderr


def test_results_folder_that_cannot_be_written_is_one_line_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = bench(*TEST, "--results", "file/inside", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: results folder file/inside")
    assert len(done.stderr.strip().splitlines()) == 1
