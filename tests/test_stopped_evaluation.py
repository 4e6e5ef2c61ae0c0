"""Ctrl-C and `kill -9` while a model is evaluated, or fed by other processes: the run ends within moments, and nothing is done again."""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time

import pytest
from test_cli import bench, command, stable, wait_for

from hgrn2_bench import stopping
from hgrn2_bench.results import find_rows
from hgrn2_bench.stopping import InterruptedTrainingError

WITHIN_S = 8
"""Below what a run waits for workers that do not answer: `hgrn2_bench.executor.STOP_WITHIN_S`."""
ITEMS, CHOICES = 100, 4


def start(words, cwd):
    return subprocess.Popen(command(*words), cwd=cwd, stderr=subprocess.PIPE, text=True, start_new_session=True)


def interrupted(process):
    """What a run says that gets Ctrl-C."""
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - began < WITHIN_S
    assert process.returncode == 130
    assert said.endswith("stopped; the same command continues\n")
    assert "Traceback" not in said
    return said


def test_evaluation_of_a_model_that_was_trained_here_is_left_at_once(tmp_path):
    words = ("run", "suite=wikitext", "preset=test", "model=hgrn2", "eval_tokens=500_000", "--device", "cpu", "--results", "r")
    process = start(words, tmp_path)
    wait_for(lambda: any('"step": 20,' in path.read_text() for path in tmp_path.glob("r/cells/wikitext/*/metrics.jsonl")))
    interrupted(process)
    (status,) = [json.loads(path.read_text()) for path in tmp_path.glob("r/cells/wikitext/*/status.json")]
    assert status["outcome"] == "interrupted"


def test_processes_that_read_pictures_end_with_the_run_and_leave_no_word(tmp_path):
    pytest.importorskip("timm")
    from imagenet_folders import items, write_folders

    write_folders(tmp_path / "data", {"train": items(12, 3), "val": items(6, 3, 12)})
    words = ("run", "suite=imagenet", "preset=test", "model=hgrn2", "dataset=folder", "data_dir=data", "augment=crop_flip", "epochs=5000")
    examples = ("train_examples=0", "validation_examples=0", "test_examples=0")
    process = start((*words, *examples, "--device", "cpu", "--results", "r"), tmp_path)
    wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob("r/cells/imagenet/*/metrics.jsonl")))
    assert "leaked" not in interrupted(process)


def test_zero_shot_items_are_scored_once_however_often_the_run_ends(tmp_path):
    pytest.importorskip("lm_eval")
    from zeroshot_lms import own

    own(tmp_path / "tiny")
    (tmp_path / "data").mkdir()
    names = ["A", "B", "C", "D"]
    rows = [
        {"question_stem": f"Question {i}: what is it", "choices": {"text": [f"{5 * i + k} of them" for k in range(4)], "label": names}}
        | {"answerKey": names[i % 4]}
        for i in range(ITEMS)
    ]
    (tmp_path / "data/openbookqa_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("run", "suite=zeroshot", "model=tiny", "task=openbookqa", "data_dir=data", "eval_batch_size=1", "--device", "cpu")

    def stored():
        return sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("r/cells/zeroshot/*/scores/*.jsonl"))

    for share, sign in ((0.4, signal.SIGINT), (0.8, signal.SIGKILL)):
        process = start((*words, "--results", "r"), tmp_path)
        wait_for(lambda share=share: stored() >= share * ITEMS * CHOICES)
        if sign == signal.SIGINT:
            interrupted(process)
        else:
            os.killpg(process.pid, sign)
            process.communicate(timeout=60)
    before = stored()
    assert 0.8 * ITEMS * CHOICES <= before < ITEMS * CHOICES
    assert bench(*words, "--results", "r", cwd=tmp_path).returncode == 0
    assert bench(*words, "--results", "whole", cwd=tmp_path).returncode == 0
    ours, whole = (find_rows(tmp_path / name, "zeroshot")[0] for name in ("r", "whole"))
    assert stable(ours) == stable(whole)
    assert ours[0].details["items"] == whole[0].details["items"]
    found = ours[0].details["scoring"]
    assert (found["requests"], whole[0].details["scoring"]["stored"]) == (ITEMS * CHOICES, 0)
    assert before - 1 <= found["stored"] <= before  # the last line may have been cut


def test_work_that_does_not_ask_is_left_and_work_that_does_is_not():
    stop, seen = threading.Event(), []

    def run(work):
        with stopping.at_once(stop.is_set):
            work()
            seen.append("after")

    def ask():
        stop.set()
        signal.raise_signal(stopping.SIGNAL)

    def own_time():
        with stopping.in_its_own_time():
            ask()
            seen.append("own time")

    def deaf():
        with contextlib.suppress(Exception):  # as work may have it
            ask()

    run(lambda: signal.raise_signal(stopping.SIGNAL))  # of somebody else: nothing is to stop
    for work in (own_time, deaf):
        with pytest.raises(InterruptedTrainingError):
            run(work)
        stop.clear()
    with stopping.in_its_own_time():  # as a worker is before it runs a cell
        ask()
        with pytest.raises(InterruptedTrainingError):
            run(lambda: seen.append("asked before"))
    run(lambda: None)  # told of a stop in no other way, as processes that work together
    assert seen == ["after", "own time", "after"]
    assert signal.getsignal(stopping.SIGNAL) == signal.SIG_DFL
    assert stopping.SIGNAL not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
