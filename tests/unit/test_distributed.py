"""Several processes on one cell: who they are, what they do together against one process, and how a run with them ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hgrn2_bench import distributed
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.distributed import World
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.results import find_rows

sys.path.insert(0, str(Path(__file__).parents[1]))
import two_processes

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
RUN = ("-m", "hgrn2_bench", "run", "suite=mqar", "preset=test", "model=hgrn2", "--device", "cpu")
WITHIN_S = 120


def start(*words, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*TORCHRUN, *map(str, words)], cwd=cwd, env=environment, **pipes)


def ended(process):
    out, err = process.communicate(timeout=WITHIN_S)
    return process.returncode, out, err


@pytest.fixture
def launched(monkeypatch):
    def launch(**variables):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return distributed.world()

    return launch


def test_a_process_that_nobody_launched_is_alone(launched):
    assert launched() == World(0, 1, 0, 1)
    assert launched(WORLD_SIZE="4") == World(0, 1, 0, 1)


def test_the_environment_says_who_a_process_is(launched):
    assert launched(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4") == World(5, 8, 1, 4)
    assert launched(RANK="1", WORLD_SIZE="2") == World(1, 2, 1, 2)
    assert distributed.current() == World()  # they do not work together yet


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("one", "2")])
def test_an_environment_that_makes_no_sense_is_one_line(launched, rank, size):
    with pytest.raises(ConfigError, match=f"does not say which of how many processes this is: RANK={rank}, WORLD_SIZE={size}"):
        launched(RANK=rank, WORLD_SIZE=size)


def test_one_process_agrees_with_itself():
    distributed.agree("failed", "why")
    assert distributed.from_first(2.5) == 2.5
    assert distributed.gathered("a") == ["a"]
    assert torch.equal(distributed.summed(torch.ones(2)), torch.ones(2))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The results of `two_processes.py`, and those of one process that does the same."""
    together, alone = (tmp_path_factory.mktemp(name) for name in ("together", "alone"))
    process = start(two_processes.__file__, together, cwd=together)
    two_processes.run(alone / "whole", two_processes.CASES["ddp"])
    two_processes.run(alone / "in pieces", two_processes.CASES["ddp in pieces"])
    two_processes.run(alone / "images", two_processes.CASES["images"])
    code, _, err = ended(process)
    assert code == 0, err
    return together, alone


def curve(results, suite):
    (path,) = results.glob(f"cells/{suite}/*/metrics.jsonl")
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in path.read_text().splitlines()]


def assert_alike(results, whole, suite="mqar"):
    found, expected = curve(results, suite), curve(whole, suite)
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "ddp in pieces", "fsdp in pieces"])
def test_two_processes_take_the_steps_of_one(both, name):
    together, alone = both
    assert_alike(together / name, alone / "whole")
    rows, _ = find_rows(together / name, "mqar")
    kept, _ = find_rows(alone / "whole", "mqar")
    assert [row.value for row in rows] == pytest.approx([row.value for row in kept], abs=0.01)
    assert {row.processes for row in rows} == {2}
    assert {row.effective["parallel"] for row in rows} == {name[:4].strip()}
    assert {row.details.get("processes") for row in rows} == {None}


def test_two_processes_that_share_pictures_and_their_scoring_do_what_one_does(both):
    together, alone = both
    assert_alike(together / "images", alone / "images", suite="imagenet")
    rows, kept = (find_rows(results / "images", "imagenet")[0] for results in both)
    assert [(row.split, row.value, row.num_items) for row in rows] == [(row.split, row.value, row.num_items) for row in kept]
    assert {row.num_items for row in rows} == {8, 11}
    assert {row.split for row in rows} == {"validation", "test", "validation_ema", "test_ema"}


def test_pieces_change_nothing_but_rounding(both):
    assert_alike(both[1] / "in pieces", both[1] / "whole")


def test_how_a_batch_is_spread_is_no_part_of_the_key(both):
    assert two_processes.CASES["ddp"].key == two_processes.CASES["fsdp"].key
    assert two_processes.CASES["ddp"].key != two_processes.CASES["ddp in pieces"].key


def test_a_run_of_two_processes_goes_on_as_one(both):
    together, alone = both
    made = two_processes.CASES["half"]
    folder = CellFolder(together / "half", made)
    assert folder.status() == {"step": two_processes.STOP_AT, "steps": 40, "outcome": "interrupted"}
    two_processes.run(together / "half", made)
    assert_alike(together / "half", alone / "whole")
    (row,) = [row for row in folder.rows() if (row.split, row.metric) == ("test", "accuracy")]
    assert (row.processes, row.details) == (1, {"processes": "2, then 1"})


def test_a_run_with_shares_goes_on_with_whole_weights(both):
    assert_alike(both[0] / "half, then fsdp", both[1] / "whole")


def test_torchrun_runs_the_program(tmp_path):
    words = (*RUN, "train_examples=320", "seed=0,1", "--results", tmp_path / "r")
    code, out, err = ended(start(*words, cwd=tmp_path))
    assert code == 0, err
    assert "mqar preset test: 2 cells to run; cpu, float32, backend chunked, 2 processes together" in err
    assert out.count("**mqar, preset test") == 1  # rank 0 alone prints
    assert err.count("[2/2]") == 1
    rows, problems = find_rows(tmp_path / "r", "mqar")
    assert not problems
    assert {(row.status, row.processes) for row in rows} == {("ok", 2)}
    alone = subprocess.run([sys.executable, *map(str, words)], cwd=tmp_path, capture_output=True, text=True, timeout=WITHIN_S)
    assert (alone.returncode, "to run" in alone.stderr) == (0, False)  # one process finds the cells finished


def test_every_process_reads_the_folder_that_the_words_name(tmp_path, monkeypatch):
    monkeypatch.delenv("HGRN2_BENCH_DATA", raising=False)
    monkeypatch.setenv("HGRN2_BENCH_CACHE", str(tmp_path / "cache"))
    for split in ("train", "valid", "test"):
        tmp_path.joinpath("texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{split}.txt").write_text(f"a line of {split}\n" * 40)
    words = ("suite=wikitext", "preset=test", "model=hgrn2", "dataset=text", "tokenizer=bytes", "symbols=64", "facts=0", "document=256")
    run = ("-m", "hgrn2_bench", "run", *words, "data_dir=texts", "--device", "cpu", "--results", tmp_path / "r")
    code, _, err = ended(start(*run, cwd=tmp_path))
    assert code == 0, err
    rows, _ = find_rows(tmp_path / "r", "wikitext")
    assert {(row.status, row.processes, row.task) for row in rows} == {("ok", 2, "text-bytes")}


def children(process):
    """The processes that torchrun started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (path / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        ranks = [int(each[5:]) for each in variables if each.startswith(b"RANK=")]
        if parent == process.pid and ranks:
            found[ranks[0]] = int(path.name)
    return found


@pytest.mark.parametrize(
    ("rank", "which", "told"),
    [(1, signal.SIGKILL, "error: rank 0: another process of the run failed or is gone;"), (0, signal.SIGTERM, "stopping")],
)
def test_a_run_that_is_stopped_or_loses_a_process_ends_and_can_go_on(tmp_path, rank, which, told):
    process = start(*RUN, "train_examples=64_000", "seed=0", "--results", tmp_path / "r", cwd=tmp_path)
    deadline = time.monotonic() + WITHIN_S
    while not list(tmp_path.glob("r/cells/mqar/*/metrics.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(children(process)[rank], which)
    killed = time.monotonic()
    code, _, err = ended(process)
    assert code == 1
    assert time.monotonic() - killed < 30
    assert err.count(told) == 1, err
    (status,) = [json.loads(path.read_text()) for path in tmp_path.glob("r/cells/mqar/*/status.json")]
    assert status["outcome"] == "interrupted"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("run", "suite=throughput", "preset=test"), "cells that are timed run alone, in one process: start without torchrun"),
        (("run", "suite=mqar", "preset=test", "--workers", "2"), "--workers 2: the processes that torchrun started all work on one cell"),
        (("check", "hgrn2"), "torchrun is for `run`: start `check` without it"),
    ],
)
def test_what_several_processes_cannot_do_is_one_line(tmp_path, words, told):
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    device = ("--device", "cpu") if words[0] == "run" else ()
    command = [sys.executable, "-m", "hgrn2_bench", *words, *device]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=WITHIN_S)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {told}\n" in done.stderr
