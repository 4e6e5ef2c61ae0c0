"""The fla adapter's compiled kernels against the reference on a CUDA device: outputs, final states and every gradient."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from fla_cases import (
    LAYERS,
    TOKENS,
    Case,
    decay_case,
    delta_case,
    diagonal_case,
    errors,
    gate_errors,
    layer_errors,
    leaf,
    linear_loss_errors,
    loss_errors,
    low_rank_case,
    results,
    saturated_gate_errors,
    slot_case,
    to,
    wide,
)
from gpu_marks import UNTUNED

from hgrn2_bench.ops import families, fla
from hgrn2_bench.ops.families import DecayInputs, OpInputs, ScalarDecayInputs, State

pytestmark = UNTUNED

FAMILIES: dict[str, Callable[..., Case]] = {
    "per_channel_decay": decay_case,
    "scalar_decay": partial(decay_case, scalar=True),
    "delta_rule": delta_case,
    "delta_rule without decay": partial(delta_case, decays=False),
    "diagonal_low_rank": low_rank_case,
    "gated_slots": slot_case,
    "diagonal_scan": diagonal_case,
}
TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 2e-2}  # fp32 matrix products run in tf32


def on_gpu(case: Case) -> Case:
    inputs, state = case
    return to(inputs, torch.Tensor.cuda), None if state is None else tuple(x.cuda() for x in state)


def has_gradient(family: str) -> bool:
    """Whether fla gives the gradient: on Hopper it refuses those of one decay per head with the Triton versions that miscompile them."""
    triton = tuple(int(part) for part in version("triton").split(".")[:3])
    refused = torch.cuda.get_device_capability()[0] == 9 and (3, 4) <= triton < (3, 7, 1) and find_spec("tilelang") is None
    return family in ("per_channel_decay", "diagonal_low_rank", "gated_slots", "diagonal_scan") or not refused


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("T", [64, 65, 1334])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernel_matches_reference(family: str, T: int, dtype: torch.dtype) -> None:
    case = FAMILIES[family](T, 32, dtype=dtype)
    found = errors(*on_gpu(case), gradients=has_gradient(family))
    assert all(error < TOLERANCES[dtype] for error in found.values()), found


@pytest.mark.parametrize("case", TOKENS)
def test_kernel_for_one_token_matches_reference(case: str) -> None:
    found = errors(*on_gpu(TOKENS[case]()), gradients=False)
    tolerance = TOLERANCES[torch.bfloat16] if "float16" in case else 1e-4  # no matrix product, hence no tf32
    assert all(error < tolerance for error in found.values()), found


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("K", [64, 128, 256])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "diagonal_scan"])
def test_kernel_for_one_token_at_the_usual_head_dimensions(family: str, K: int, dtype: torch.dtype) -> None:
    found = errors(*on_gpu(FAMILIES[family](1, K, dtype=dtype)), gradients=False)
    tolerance = TOLERANCES[dtype] if dtype == torch.bfloat16 else 1e-4
    assert all(error < tolerance for error in found.values()), found


@pytest.mark.parametrize("phase", ["channel", "token"])
def test_complex_scan_matches_reference(phase: str) -> None:
    found = errors(*on_gpu(diagonal_case(1334, 32, phase=phase)))
    assert all(error < 1e-4 for error in found.values()), found  # no matrix product, hence no tf32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K", [8, 32, 64])
def test_bounded_decay_on_tensor_cores(K: int, dtype: torch.dtype) -> None:
    found = errors(*on_gpu(low_rank_case(1334, K, dtype=dtype, bounded=True)))
    assert all(error < TOLERANCES[torch.bfloat16] for error in found.values()), found


@pytest.mark.parametrize("family", ["per_channel_decay", "scalar_decay", "delta_rule", "diagonal_low_rank"])
def test_head_dimension_8_is_padded(family: str) -> None:
    inputs, state = on_gpu(FAMILIES[family](100, 8))
    found = errors(inputs, state, gradients=has_gradient(family))
    assert fla.kernel_name(inputs).endswith("K padded 8 to 16, V padded 8 to 16)")
    assert all(error < TOLERANCES[torch.float32] for error in found.values()), found


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("K", "V"), [(1, 1), (2, 2), (1, 2), (4, 4)])
def test_the_tiniest_heads_are_scanned(K: int, V: int, dtype: torch.dtype) -> None:
    inputs, state = on_gpu(decay_case(1334, K, V, dtype=dtype))
    found = errors(inputs, state)
    assert fla.kernel_name(inputs) == "fla.fused_recurrent_hgrn (every number of the state a channel)"
    assert all(error < TOLERANCES[dtype] for error in found.values()), found


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "diagonal_scan"])
def test_odd_head_dimensions_are_padded(family: str, dtype: torch.dtype) -> None:
    inputs, state = on_gpu(FAMILIES[family](100, K=17, V=33, dtype=dtype))
    found = errors(inputs, state, gradients=has_gradient(family))
    assert "K padded 17 to 18, V padded 33 to 34" in fla.kernel_name(inputs)
    assert all(error < TOLERANCES[dtype] for error in found.values()), found


def test_few_slots_are_repeated() -> None:
    inputs, state = on_gpu(slot_case(100, 32, M=5))
    found = errors(inputs, state)
    assert fla.kernel_name(inputs) == "fla.chunk_gsa (slots repeated 4 times)"
    assert all(error < TOLERANCES[torch.float32] for error in found.values()), found


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_strong_decay_in_single_steps(family: str, dtype: torch.dtype) -> None:
    case = FAMILIES[family](130, 32, dtype=dtype, drops=(0, 1, 40, 63, 64, 100, 129))
    found = errors(*on_gpu(case), gradients=has_gradient(family))
    assert all(error < TOLERANCES[dtype] for error in found.values()), found  # a NaN fails too


@pytest.mark.parametrize("family", FAMILIES)
def test_long_memory(family: str) -> None:
    """Slow decay: what a chunk hands to the next one is most of the output (fla's chunk_hgrn fails here)."""
    found = errors(*on_gpu(FAMILIES[family](1334, 32, rate=1e-3)), gradients=has_gradient(family))
    assert all(error < TOLERANCES[torch.float32] for error in found.values()), found


@pytest.mark.parametrize("family", ["per_channel_decay", "scalar_decay"])
def test_output_has_the_dtype_of_v(family: str) -> None:
    """Under autocast v comes from a projection, in bf16, while a key made from a gate may be fp32."""
    inputs, state = on_gpu(FAMILIES[family](65, 32))
    assert isinstance(inputs, DecayInputs | ScalarDecayInputs)
    inputs = replace(inputs, v_BTHV=inputs.v_BTHV.bfloat16())
    o_BTHV, (final_BHKV,) = families.run(inputs, "fla", state)
    assert (o_BTHV.dtype, final_BHKV.dtype) == (torch.bfloat16, torch.float32)
    found = errors(inputs, state, gradients=has_gradient(family))
    assert all(error < TOLERANCES[torch.bfloat16] for error in found.values()), found


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("T", [17, 64, 5003])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_kernel_matches_torch(layer: str, T: int, dtype: torch.dtype) -> None:
    found = layer_errors(layer, dtype, T, device="cuda", parts=1 + 2 * ("norm" in layer))
    tolerance = 1e-4 if dtype == torch.float32 else TOLERANCES[dtype]  # no matrix product, hence no tf32
    assert all(error < tolerance for error in found.values()), found


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("vocab_size", [50, 8192])
def test_cross_entropy_matches_torch(vocab_size: int, dtype: torch.dtype) -> None:
    found = loss_errors(vocab_size, dtype, device="cuda")
    tolerance = 1e-5 if dtype == torch.float32 else TOLERANCES[dtype]
    assert all(error < tolerance for error in found.values()), found


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_linear_cross_entropy_matches_torch(dtype: torch.dtype) -> None:
    found = linear_loss_errors(dtype, device="cuda")
    assert all(error < TOLERANCES[dtype] for error in found.values()), found


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "diagonal_scan"])
def test_more_heads_and_sequences_than_a_launch_takes(family: str) -> None:
    """70,000 of them, where a launch takes 65,535: 35 sequences of two heads, a thousand times."""
    inputs, state = on_gpu(FAMILIES[family](64, 16, B=35))
    want = summed(to(inputs, wide), tuple(map(wide, state or ())), "reference", has_gradient(family))
    many = to(inputs, thousandfold), tuple(map(thousandfold, state or ()))
    for name, tensor in summed(*many, "fla", has_gradient(family)).items():
        expected = thousandfold(want[name])
        error = (wide(tensor) - expected).norm() / expected.norm()
        assert error < TOLERANCES[torch.float32], (name, error.item())


def thousandfold(x: torch.Tensor) -> torch.Tensor:
    return x.repeat(1000, *[1] * (x.ndim - 1))


def summed(inputs: OpInputs, state: State, backend: str, gradients: bool) -> dict[str, torch.Tensor]:
    """Output, final state, and the gradients of the sum of both: that of a sequence does not depend on how many there are."""
    leaves = {f.name: leaf(x) for f in fields(inputs) if isinstance(x := getattr(inputs, f.name), torch.Tensor)}  # type: ignore[arg-type]
    start = {f"start{i}": leaf(x) for i, x in enumerate(state)}
    with torch.set_grad_enabled(gradients):
        o, final = families.run(replace(inputs, **leaves), backend, tuple(start.values()))  # type: ignore[type-var]
    found = {"o": o.detach()} | {f"final{i}": x.detach() for i, x in enumerate(final)}
    if gradients:
        named = leaves | start
        grads = torch.autograd.grad(sum((x.sum() for x in final), o.sum()), list(named.values()))
        found |= {f"d{name}": grad for name, grad in zip(named, grads, strict=True)}
    return found


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_matches_torch(bounded: bool, dtype: torch.dtype) -> None:
    found = gate_errors(bounded, dtype, device="cuda")
    tolerance = 1e-5 if dtype == torch.float32 else TOLERANCES[dtype]
    assert all(error < tolerance for error in found.values()), found


def test_gate_at_the_least_numbers_matches_torch() -> None:
    found = saturated_gate_errors(device="cuda")
    assert all(error < 1e-5 for error in found.values()), found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_input() -> None:
    assert torch.cuda.current_device() == 0
    for found in (layer_errors("layer norm of 200", device="cuda:1"), gate_errors(True, device="cuda:1")):
        assert all(error < 1e-4 for error in found.values()), found


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.startswith("conv")])
def test_convolution_continues_after_its_state(layer: str) -> None:
    found = layer_errors(layer, T=65, start=True, device="cuda")
    assert found["kept"] == 0
    assert all(error < 1e-4 for error in found.values()), found


def test_refused_gradient_raises() -> None:
    if has_gradient("scalar_decay"):
        pytest.skip("fla gives the gradient of a scalar decay on this GPU and Triton")
    with pytest.raises(RuntimeError, match="Triton"):
        results(*on_gpu(decay_case(65, 32, scalar=True)), "fla")
