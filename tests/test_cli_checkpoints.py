"""Folders of trained models as a user types them: numbers and exit code 0, or one line and exit code 2 before anything runs."""

import json
import time

import pytest
from test_cli import bench

from hgrn2_bench import engine
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.plan import make_plan

WORDS = ("suite=wikitext", "preset=test")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two trained models."""
    results, found = tmp_path_factory.mktemp("trained"), []
    for cell in make_plan([*WORDS, "model=hgrn2,gla"], "cpu").cells:
        folder = CellFolder(results, cell)
        with folder.lock():
            engine.run_cell(cell, folder, lambda *_: None, lambda: False)
        found.append(folder.weights.rename(results / cell.model))
    return found


def test_trained_models_are_evaluated_once_and_compared(folders, tmp_path):
    run = ("run", *WORDS, f"model={folders[0]},{folders[1]}", "--device", "cpu", "--workers", "1")
    first = bench(*run, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "2 cells to run" in first.stderr
    names = sorted({line.split("|")[1].strip() for line in first.stdout.splitlines() if "@" in line})
    assert [name.split("@")[0] for name in names] == ["gla", "hgrn2"]
    assert "| ok" in first.stdout
    assert "lr " not in first.stdout
    again = bench(*run, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert "to run" not in again.stderr
    compared = bench("compare", *names, cwd=tmp_path)
    assert compared.returncode == 0, compared.stderr
    assert f"{names[0]} against {names[1]}, perplexity" in compared.stdout
    assert json.loads(next(tmp_path.rglob("status.json")).read_text())["outcome"] == "ok"
    assert bench("status", cwd=tmp_path).stdout.count("1 ok") == 2


def test_a_trained_model_beside_one_that_learns_are_compared(folders, tmp_path):
    run = bench("run", *WORDS, f"model={folders[0]},gla", "lr=2e-3", "--device", "cpu", "--workers", "1", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "note: lr: no effect on hgrn2@" in run.stderr
    name = next(word for word in run.stdout.split() if word.startswith("hgrn2@"))
    compared = bench("compare", name, "gla", cwd=tmp_path)
    assert compared.returncode == 0, compared.stderr
    assert f"{name} against gla, perplexity" in compared.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model={}/nowhere"], "nowhere: no such folder of a model"),
        (["model={}"], "config.json is missing"),
        (["model={}/hgrn2", "lr=1e-3"], "'lr=1e-3' has no effect: hgrn2@"),
        (["model={}/hgrn2", "suite=mqar"], "suite=mqar trains its models"),
        (["preset=evaluate"], "preset=evaluate names no model"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_and_exit_code_2(folders, tmp_path, words, message):
    began = time.monotonic()
    given = {word.partition("=")[0]: word.format(folders[0].parent) for word in ("suite=wikitext", *words)}
    done = bench("run", *given.values(), "--device", "cpu", cwd=tmp_path)
    assert time.monotonic() - began < 10  # 1 s on an idle core: nothing heavy is imported
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
