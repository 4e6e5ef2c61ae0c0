"""fla's HGRN2 language model and ours give the same logits, in both directions, on a machine without a GPU: in one child process."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from fla_models_child import CASES, ITEMS, asked

TOLERANCE = 1e-5  # fp32 kernels against fp32 torch; seen: 2e-6
NATS = 1e-4
"""Of a sum over a continuation or a text."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all workers of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="module")
def report(base: Path) -> dict[str, Any]:
    """The child's report; under pytest-xdist the first worker to come runs the child, and the others wait for its file."""
    if find_spec("triton") is None or find_spec("fla") is None:
        pytest.skip("triton and flash-linear-attention are not installed (they exist for Linux only)")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    import fcntl  # not on Windows, where the skip above comes first

    path = base / "fla_models_report.json"
    with (base / "fla_models_report.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            run_child(base / "fla_models", path, base / "triton_cache")
    return json.loads(path.read_text())


def run_child(folder: Path, path: Path, cache: Path) -> None:
    own = {
        "TRITON_INTERPRET": "1",
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(Path(__file__).with_name("fla_models_child.py")), str(folder), str(path)]
    child = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=600, check=False)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("case", CASES)
def test_fla_s_model_here_and_back_there_has_its_logits(case: str, report: dict[str, Any]) -> None:
    found = report[case]
    assert isinstance(found, dict), found
    assert set(found) == {"ours", "and back"}
    assert all(error < TOLERANCE for error in found.values()), found


def test_our_model_has_its_logits_in_fla(report: dict[str, Any]) -> None:
    found = report["made here"]
    assert isinstance(found, dict), found
    assert found["theirs"] < TOLERANCE


def test_fields_that_a_folder_leaves_out_have_fla_s_defaults(report: dict[str, Any]) -> None:
    assert report["other defaults"] == []


def test_weights_came_in_several_files(report: dict[str, Any]) -> None:
    assert report["shards"] > 1


@pytest.mark.filterwarnings("ignore")  # lm-eval and what it imports warn about themselves
def test_every_item_scores_as_with_lm_evals_own_model_on_fla(report: dict[str, Any], base: Path) -> None:
    lm = pytest.importorskip("suites.zeroshot.lm")
    want = report["scored"]
    assert isinstance(want, dict), want
    for batch_size in (1, 8):
        bench = lm.BenchLM(base / "fla_models/scored/fla", device="cpu", batch_size=batch_size)
        got = asked(bench)
        assert len(got["items"]) == len(want["items"]) == len(ITEMS)
        for (nats, greedy), (their_nats, their_greedy) in zip(got["items"], want["items"], strict=True):
            assert (nats, greedy) == (pytest.approx(their_nats, abs=NATS), their_greedy)
        assert got["texts"] == pytest.approx(want["texts"], abs=NATS)
        assert (bench.told()["tokens_saved"] > 0) == (batch_size > 1)
        assert bench.told()["truncated"] == 1


@pytest.mark.filterwarnings("ignore")
def test_a_model_taken_to_fla_scores_as_before_with_the_token_before_each_text(report: dict[str, Any], base: Path) -> None:
    lm = pytest.importorskip("suites.zeroshot.lm")
    assert isinstance(report["scored"], dict), report["scored"]
    ours, theirs = (lm.BenchLM(base / "fla_models/scored" / name, bos=bos) for name, bos in (("ours", "auto"), ("fla", "always")))
    found = asked(theirs)
    assert asked(ours) == found
    without = report["scored"]["items"]
    assert any(abs(one[0] - other[0]) > 10 * NATS for one, other in zip(found["items"], without, strict=True))
