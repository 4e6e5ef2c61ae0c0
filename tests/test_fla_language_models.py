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
from fla_models_child import CASES

TOLERANCE = 1e-5  # fp32 kernels against fp32 torch; seen: 2e-6


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The child's report; under pytest-xdist the first worker to come runs the child, and the others wait for its file."""
    if find_spec("triton") is None or find_spec("fla") is None:
        pytest.skip("triton and flash-linear-attention are not installed (they exist for Linux only)")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    import fcntl  # not on Windows, where the skip above comes first

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / "fla_models_report.json"
    with (folder / "fla_models_report.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            run_child(folder / "fla_models", path, folder / "triton_cache")
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
