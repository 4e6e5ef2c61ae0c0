"""The fla adapter against the reference on a machine without a GPU: fla's real kernels in Triton's interpreter, in one child process."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from fla_cases import CASES, LAYER_CASES, TOKENS, decay_case, delta_case, diagonal_case, low_rank_case, slot_case

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.ops import families, fla

TOLERANCE = 2e-5  # fp32 against fp64; seen: 6e-6
TOLERANCE_HALF = 5e-3  # fp16


def why_not() -> str:
    if find_spec("triton") is None or find_spec("fla") is None:
        return "triton and flash-linear-attention are not installed (they exist for Linux only)"
    return "with a GPU, tests/gpu runs the compiled kernels" if torch.cuda.is_available() else ""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The child's report; under pytest-xdist the first worker to come runs the child, and the others wait for its file."""
    if reason := why_not():
        pytest.skip(reason)
    import fcntl  # not on Windows, where the skip above comes first

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / "fla_report.json"
    with (folder / "fla_report.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            run_child(path, folder / "triton_cache")
    return json.loads(path.read_text())


def run_child(path: Path, cache: Path) -> None:
    env = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(cache), "TRITON_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("fla_cases.py")), str(path)]
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_reference(case: str, report: dict[str, Any]) -> None:
    found = report[case]
    assert isinstance(found, dict), found
    assert {"o", "final"} < set(found)
    assert ("dstart" in found) == ("from zero" not in case)
    tolerance = TOLERANCE_HALF if "float16" in case else TOLERANCE
    assert all(error < tolerance for error in found.values()), found


@pytest.mark.parametrize("case", TOKENS)
def test_kernel_for_one_token_matches_reference(case: str, report: dict[str, Any]) -> None:
    found = report[f"token {case}"]
    assert isinstance(found, dict), found
    assert set(found) - {"final1"} == {"o", "final"}
    assert ("final1" in found) == case.startswith("gated_slots")
    tolerance = TOLERANCE_HALF if "float16" in case else TOLERANCE
    assert all(error < tolerance for error in found.values()), found


@pytest.mark.parametrize("case", LAYER_CASES)
def test_layers_kernel_matches_torch(case: str, report: dict[str, Any]) -> None:
    found = report[case]
    assert isinstance(found, dict), found
    assert {"y", "dx"} <= set(found)
    assert ("kept" in found) == ("continued" in case)
    tolerance = TOLERANCE_HALF if "float16" in case else TOLERANCE
    assert all(error < tolerance for error in found.values()), found


def test_refused_gradient_reaches_the_caller(report: dict[str, Any]) -> None:
    assert "upgrade Triton to >= 3.7.1" in report["hopper"]


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        (decay_case(5)[0], "fla.chunk_gla"),
        (decay_case(5, K=8, V=16)[0], "fla.chunk_gla (K padded 8 to 16)"),
        (decay_case(5, K=2, V=1)[0], "fla.fused_recurrent_hgrn (every number of the state a channel)"),
        (decay_case(1, K=2, V=1)[0], "fla.fused_recurrent_hgrn (every number of the state a channel)"),  # gradients
        (decay_case(5, K=8, V=4)[0], "fla.chunk_gla (K padded 8 to 16, V padded 4 to 16)"),
        (decay_case(5, scalar=True)[0], "fla.chunk_simple_gla"),
        (decay_case(5, K=17, V=32, scalar=True)[0], "fla.chunk_simple_gla (K padded 17 to 18)"),
        (decay_case(5, K=15, V=33, scalar=True)[0], "fla.chunk_simple_gla (K padded 15 to 16, V padded 33 to 34)"),
        (delta_case(5)[0], "fla.chunk_gated_delta_rule"),
        (delta_case(5, decays=False)[0], "fla.chunk_gated_delta_rule (no decay: chunk_delta_rule in half precision)"),
        (delta_case(5, decays=False, dtype=torch.bfloat16)[0], "fla.chunk_delta_rule"),
        (delta_case(5, K=8, decays=False, dtype=torch.float16)[0], "fla.chunk_delta_rule (K padded 8 to 16, V padded 8 to 16)"),
        (low_rank_case(5)[0], "fla.chunk_dplr_delta_rule (chunks of 16)"),
        (low_rank_case(5, bounded=True)[0], "fla.chunk_dplr_delta_rule (chunks of 16)"),  # float32
        (low_rank_case(5, bounded=True, dtype=torch.bfloat16)[0], "fla.chunk_dplr_delta_rule (log f >= -0.6065)"),
        (low_rank_case(5, K=8, V=16)[0], "fla.chunk_dplr_delta_rule (chunks of 16, K padded 8 to 16)"),
        (slot_case(5)[0], "fla.chunk_gsa"),
        (slot_case(5, K=8, V=16, M=5)[0], "fla.chunk_gsa (K padded 8 to 16, slots repeated 4 times)"),
        (diagonal_case(5)[0], "fla.fused_recurrent_hgrn"),
        (diagonal_case(5, phase="token")[0], "fla.fused_recurrent_hgrn (complex channels as pairs of real ones)"),
        (families.SoftmaxInputs(*torch.zeros(3, 1, 5, 1, 8), scale=1.0), "torch.scaled_dot_product_attention"),
    ],
)
def test_kernel_name(inputs: families.OpInputs, name: str) -> None:
    assert fla.kernel_name(inputs) == name


@pytest.mark.parametrize("case", TOKENS)
def test_one_token_runs_the_recurrent_kernel_it_names_and_another_with_gradients(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class AskedError(Exception):
        pass

    def function(module: str, name: str) -> None:
        raise AskedError(f"fla.{name}")

    def asked() -> str:
        with pytest.raises(AskedError) as raised:
            families.run(inputs, "fla", state)
        return str(raised.value)

    monkeypatch.setattr(fla, "_function", function)
    inputs, state = TOKENS[case]()
    with torch.no_grad():
        name = fla.kernel_name(inputs)
        assert name.split(" (")[0] == asked()
        assert name.startswith("fla.fused_recurrent_")
        assert "padded" not in name
    assert fla.kernel_name(inputs).split(" (")[0] == asked()
    elementwise = case.startswith("diagonal_scan") or case.endswith("K=V=1")
    assert asked().startswith("fla.fused_recurrent_hgrn" if elementwise else "fla.chunk_")


def test_two_tokens_run_the_chunk_kernel_also_without_gradients() -> None:
    with torch.no_grad():
        assert fla.kernel_name(decay_case(2)[0]) == "fla.chunk_gla"


@pytest.mark.parametrize(
    "inputs",
    [
        families.SelectiveInputs(*[torch.zeros(1, 5, 4)] * 2, torch.zeros(4, 2), *[torch.zeros(1, 5, 2)] * 2),
        families.DiagonalSSMInputs(torch.zeros(1, 5, 4), *[torch.zeros(4, 2)] * 2, torch.zeros(4, 2, dtype=torch.complex64)),
    ],
)
def test_families_without_a_kernel_are_refused_by_name(inputs: families.OpInputs) -> None:
    with pytest.raises(ConfigError, match=f"backend=fla has no {inputs.family}; use backend=chunked"):
        fla.kernel_name(inputs)
    with pytest.raises(ValueError, match=f"backend=fla has no {inputs.family}"):
        families.run(inputs, "fla")


@pytest.mark.parametrize("make", [decay_case, delta_case, low_rank_case, slot_case, diagonal_case])
def test_missing_fla_names_the_fix(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(ConfigError, match=r"^CUDA runs need fla: pip install flash-linear-attention, or pass backend=chunked$"):
        families.run(make(5)[0], "fla")


def test_phase_is_exact_after_many_steps() -> None:
    T, theta = 100_000, 3.0
    turn_TD = fla._turn(torch.tensor([theta]), T)
    want = [complex(math.cos(theta * t), math.sin(theta * t)) for t in (1, T // 2, T)]
    assert torch.allclose(turn_TD[[0, T // 2 - 1, T - 1], 0], torch.tensor(want), atol=1e-6, rtol=0)
