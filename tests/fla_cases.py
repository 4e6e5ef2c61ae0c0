"""Random inputs for the fla adapter and the layers on it, and their errors; as a script, on the CPU through Triton's interpreter.

`TRITON_INTERPRET=1 python fla_cases.py REPORT` writes {case: {tensor: relative error}}, or the traceback of a case that failed. It needs
a process of its own: Triton reads the variable at import, and a process where it is set can no longer use a GPU.
"""

import builtins
import copy
import importlib
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hgrn2_bench.interfaces import Context
from hgrn2_bench.layers import FollowsBackend, LayerNorm, RMSNorm, ShortConv, for_a_graph, forget_gate
from hgrn2_bench.ops import families
from hgrn2_bench.ops import fla as adapter
from hgrn2_bench.ops.autotune import autotuners
from hgrn2_bench.ops.families import (
    DecayInputs,
    DeltaInputs,
    DiagonalInputs,
    DiagonalLowRankInputs,
    OpInputs,
    ScalarDecayInputs,
    SlotInputs,
    State,
)

Case = tuple[OpInputs, State | None]


def decay_case(
    T: int,
    K: int = 16,
    V: int | None = None,
    scalar: bool = False,
    dtype: torch.dtype = torch.float32,
    start: bool = True,
    rate: float = 1.0,
    drops: tuple[int, ...] = (),
    B: int = 2,
) -> Case:
    """Inputs of a matrix state: `scalar` or per-channel log decay times `rate`, -60 at the steps `drops`; `start` gives a state."""
    H, V = 2, K if V is None else V
    torch.manual_seed(0)
    q_BTHK, k_BTHK, v_BTHV = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    log_f = rate * F.logsigmoid(torch.randn((B, T, H) if scalar else (B, T, H, K)))
    log_f[:, list(drops)] = -60.0
    state = (torch.randn(B, H, K, V),) if start else None
    make = ScalarDecayInputs if scalar else DecayInputs
    return make(q_BTHK.to(dtype), k_BTHK.to(dtype), v_BTHV.to(dtype), log_f, scale=0.7), state


def delta_case(
    T: int,
    K: int = 16,
    V: int | None = None,
    decays: bool = True,
    dtype: torch.dtype = torch.float32,
    start: bool = True,
    rate: float = 1.0,
    drops: tuple[int, ...] = (),
    B: int = 2,
) -> Case:
    """Inputs of the delta rule with keys of unit length; with `decays` a log decay times `rate`, -60 at the steps `drops`."""
    H, V = 2, K if V is None else V
    torch.manual_seed(0)
    q_BTHK, k_BTHK, v_BTHV = torch.randn(B, T, H, K), F.normalize(torch.randn(B, T, H, K), dim=-1), torch.randn(B, T, H, V)
    beta_BTH, log_f_BTH = torch.rand(B, T, H), rate * F.logsigmoid(torch.randn(B, T, H) + 2)
    log_f_BTH[:, list(drops)] = -60.0
    state = (torch.randn(B, H, K, V),) if start else None
    q, k, v = (x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV))
    return DeltaInputs(q, k, v, beta_BTH, log_f_BTH if decays else None, scale=0.7), state


def low_rank_case(
    T: int,
    K: int = 16,
    V: int | None = None,
    dtype: torch.dtype = torch.float32,
    start: bool = True,
    rate: float = 1.0,
    drops: tuple[int, ...] = (),
    bounded: bool = False,
    B: int = 1,
) -> Case:
    """Inputs of a diagonal plus low-rank transition as RWKV7 has: a of unit length, b = -a times a rate per channel.

    The log decays are multiplied by `rate` and -60 at the steps `drops`; with `bounded` they keep RWKV7's bound instead.
    """
    H, V = 2, K if V is None else V
    torch.manual_seed(0)
    q_BTHK, k_BTHK, v_BTHV = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    a_BTHK = F.normalize(torch.randn(B, T, H, K), dim=-1)
    b_BTHK = -a_BTHK * torch.rand(B, T, H, K)
    least = -0.6065 if bounded else None
    log_f_BTHK = rate * (F.logsigmoid(torch.randn(B, T, H, K) + 2) if least is None else least * torch.rand(B, T, H, K))
    log_f_BTHK[:, list(drops)] = -60.0
    state = (torch.randn(B, H, K, V),) if start else None
    q, k, v, a, b = (x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK))
    return DiagonalLowRankInputs(q, k, v, a, b, log_f_BTHK, scale=0.7, least_log_f=least), state


def slot_case(
    T: int,
    K: int = 16,
    V: int | None = None,
    M: int = 16,
    dtype: torch.dtype = torch.float32,
    start: bool = True,
    rate: float = 1.0,
    drops: tuple[int, ...] = (),
    B: int = 2,
) -> Case:
    """Inputs of M gated slots: a log decay per slot times `rate`, -60 at the steps `drops`; the slots take what they have forgotten."""
    H, V = 2, K if V is None else V
    torch.manual_seed(0)
    q_BTHK, k_BTHK, v_BTHV = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    log_f_BTHM = rate * F.logsigmoid(torch.randn(B, T, H, M) + 2)
    log_f_BTHM[:, list(drops)] = -60.0
    state = (torch.randn(B, H, M, K), torch.randn(B, H, M, V)) if start else None
    q, k, v, s = (x.to(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, -torch.expm1(log_f_BTHM)))
    return SlotInputs(q, k, v, s, log_f_BTHM, scale=0.3), state


def diagonal_case(
    T: int,
    D: int = 24,
    phase: str = "none",
    dtype: torch.dtype = torch.float32,
    start: bool = True,
    rate: float = 1.0,
    drops: tuple[int, ...] = (),
) -> Case:
    """Inputs of a diagonal scan: `phase` is none (real), channel (one angle each) or token (an angle per step and channel)."""
    B = 2
    torch.manual_seed(0)
    number = dtype if phase == "none" else torch.complex64
    log_a_BTD = rate * F.logsigmoid(torch.randn(B, T, D) + 2)
    log_a_BTD[:, list(drops)] = -60.0
    theta = {"none": None, "channel": 6.28 * torch.rand(D), "token": 6.28 * torch.rand(B, T, D)}[phase]
    state = (torch.randn(B, D, dtype=torch.float32 if phase == "none" else number),) if start else None
    return DiagonalInputs(torch.randn(B, T, D, dtype=number), log_a_BTD, theta), state


CASES: dict[str, Callable[[], Case]] = {
    "per_channel_decay T=17": partial(decay_case, 17),
    "per_channel_decay T=64": partial(decay_case, 64),
    "per_channel_decay T=65 from zero": partial(decay_case, 65, start=False),
    "per_channel_decay T=100 strong decay": partial(decay_case, 100, drops=(0, 9, 64, 99)),
    "per_channel_decay T=100 long memory": partial(decay_case, 100, rate=1e-3),
    "per_channel_decay T=100 K=V=8": partial(decay_case, 100, K=8),
    "per_channel_decay T=100 K=V=1": partial(decay_case, 100, K=1),
    "per_channel_decay T=65 K=1 V=2": partial(decay_case, 65, K=1, V=2),
    "per_channel_decay T=65 K=V=4 from zero": partial(decay_case, 65, K=4, start=False),
    "per_channel_decay T=65 K=24 V=8": partial(decay_case, 65, K=24, V=8),
    "scalar_decay T=17": partial(decay_case, 17, scalar=True),
    "scalar_decay T=64": partial(decay_case, 64, scalar=True),
    "scalar_decay T=65 from zero": partial(decay_case, 65, scalar=True, start=False),
    "scalar_decay T=100 strong decay": partial(decay_case, 100, scalar=True, drops=(0, 9, 64, 99)),
    "scalar_decay T=100 long memory": partial(decay_case, 100, scalar=True, rate=1e-3),
    "scalar_decay T=100 K=V=8": partial(decay_case, 100, K=8, scalar=True),
    "scalar_decay T=65 K=24 V=8": partial(decay_case, 65, K=24, V=8, scalar=True),
    "scalar_decay T=65 K=17 V=33 float16": partial(decay_case, 65, K=17, V=33, scalar=True, dtype=torch.float16),
    "delta_rule T=65": partial(delta_case, 65),
    "delta_rule T=100 K=V=8 from zero": partial(delta_case, 100, K=8, start=False, B=1),
    "delta_rule T=100 strong decay": partial(delta_case, 100, drops=(0, 9, 64, 99), B=1),
    "delta_rule without decay T=65": partial(delta_case, 65, decays=False, B=1),
    "delta_rule without decay T=65 float16": partial(delta_case, 65, decays=False, dtype=torch.float16, B=1),
    "diagonal_low_rank T=17": partial(low_rank_case, 17),
    "diagonal_low_rank T=35 from zero": partial(low_rank_case, 35, start=False),
    "diagonal_low_rank T=35 strong decay": partial(low_rank_case, 35, drops=(0, 9, 10, 11, 34)),
    "diagonal_low_rank T=20 K=24 V=8": partial(low_rank_case, 20, K=24, V=8),
    "diagonal_low_rank T=70 bounded float16": partial(low_rank_case, 70, bounded=True, dtype=torch.float16),
    "gated_slots T=17": partial(slot_case, 17, B=1),
    "gated_slots T=65 from zero": partial(slot_case, 65, start=False, B=1),
    "gated_slots T=100 strong decay": partial(slot_case, 100, drops=(0, 9, 64), B=1),
    "gated_slots T=100 long memory M=24": partial(slot_case, 100, rate=1e-3, M=24, B=1),
    "gated_slots T=65 K=V=M=8": partial(slot_case, 65, K=8, M=8, B=1),
    "gated_slots T=65 K=24 V=8 M=3": partial(slot_case, 65, K=24, V=8, M=3, B=1),
    "gated_slots T=65 float16": partial(slot_case, 65, dtype=torch.float16, B=1),
    "diagonal_scan T=17": partial(diagonal_case, 17),
    "diagonal_scan T=65 from zero": partial(diagonal_case, 65, start=False),
    "diagonal_scan T=100 strong decay": partial(diagonal_case, 100, drops=(0, 9, 99)),
    "diagonal_scan T=100 long memory": partial(diagonal_case, 100, rate=1e-3),
    "diagonal_scan T=17 phase per channel": partial(diagonal_case, 17, phase="channel"),
    "diagonal_scan T=65 phase per channel from zero": partial(diagonal_case, 65, phase="channel", start=False),
    "diagonal_scan T=100 phase per token": partial(diagonal_case, 100, phase="token"),
}

TOKENS: dict[str, Callable[[], Case]] = {
    "per_channel_decay": partial(decay_case, 1),
    "per_channel_decay from zero": partial(decay_case, 1, start=False),
    "per_channel_decay K=V=1": partial(decay_case, 1, K=1),
    "per_channel_decay K=100 V=33": partial(decay_case, 1, K=100, V=33),
    "per_channel_decay strong decay float16": partial(decay_case, 1, drops=(0,), dtype=torch.float16),
    "scalar_decay": partial(decay_case, 1, scalar=True),
    "scalar_decay from zero": partial(decay_case, 1, scalar=True, start=False),
    "scalar_decay K=153 V=65": partial(decay_case, 1, K=153, V=65, scalar=True),
    "scalar_decay float16": partial(decay_case, 1, scalar=True, dtype=torch.float16),
    "delta_rule": partial(delta_case, 1),
    "delta_rule from zero": partial(delta_case, 1, start=False),
    "delta_rule K=96 V=24": partial(delta_case, 1, K=96, V=24),
    "delta_rule float16": partial(delta_case, 1, dtype=torch.float16),
    "delta_rule without decay": partial(delta_case, 1, decays=False),
    "delta_rule without decay from zero K=5 V=7": partial(delta_case, 1, K=5, V=7, decays=False, start=False),
    "delta_rule without decay float16": partial(delta_case, 1, decays=False, dtype=torch.float16),
    "diagonal_low_rank": partial(low_rank_case, 1),
    "diagonal_low_rank from zero": partial(low_rank_case, 1, start=False),
    "diagonal_low_rank K=24 V=8": partial(low_rank_case, 1, K=24, V=8),
    "diagonal_low_rank bounded float16": partial(low_rank_case, 1, bounded=True, dtype=torch.float16),
    "gated_slots": partial(slot_case, 1),
    "gated_slots from zero": partial(slot_case, 1, start=False),
    "gated_slots K=100 V=72 M=3": partial(slot_case, 1, K=100, V=72, M=3),
    "gated_slots float16": partial(slot_case, 1, dtype=torch.float16),
    "diagonal_scan": partial(diagonal_case, 1),
    "diagonal_scan phase per token": partial(diagonal_case, 1, phase="token"),
}
"""One token without gradients, where the recurrent kernels run."""


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "layer norm of 24": partial(LayerNorm, 24),
    "layer norm of 200": partial(LayerNorm, 200),
    "layer norm of 200 without weight": partial(LayerNorm, 200, elementwise_affine=False),
    "layer norm of 200 without bias": partial(LayerNorm, 200, bias=False),
    "rms norm of 24": partial(RMSNorm, 24, eps=1e-5),
    "rms norm of 200": partial(RMSNorm, 200, eps=1e-5),
    "rms norm of 200 without weight": partial(RMSNorm, 200, eps=1e-5, elementwise_affine=False),
    "conv of width 4": partial(ShortConv, 24, 4, "x"),
    "conv of width 3 with bias": partial(ShortConv, 40, 3, "x", bias=True),
}
"""The layers that have a kernel in Triton beside torch's own."""


def layer_errors(
    name: str, dtype: torch.dtype = torch.float32, T: int = 17, start: bool = False, device: str = "cpu", parts: int = 1
) -> dict[str, float]:
    """||Triton - torch|| / ||torch|| of a layer's output and all its gradients for an input of `dtype`; torch computes in float64.

    With `start` a convolution continues after three tokens; the input is the last of so many parts of a wider tensor.
    """
    torch.manual_seed(0)
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    D = layer.conv.in_channels if isinstance(layer, ShortConv) else layer.normalized_shape[0]
    x_BTE = torch.randn(2, T, parts * D).to(device, dtype)
    past_BPD = torch.randn(2, layer.width - 1 if start else 0, D).to(device, dtype)
    want = layer_results(copy.deepcopy(layer).to(device).double(), wide(x_BTE), wide(past_BPD), parts)
    layer = layer.to(device)
    layer.backend = "fla"
    with for_a_graph():
        got = layer_results(layer, x_BTE, past_BPD, parts)
    return {key: ((wide(got[key]) - tensor).norm() / tensor.norm()).item() for key, tensor in want.items()}


def layer_results(layer: nn.Module, x_BTE: Tensor, past_BPD: Tensor, parts: int = 1) -> dict[str, Tensor]:
    """Output `y` and the gradients of a random weighting of it: `dx` and one for each parameter; of a convolution also what it keeps."""
    x_BTE = leaf(x_BTE)
    x_BTD = x_BTE.chunk(parts, -1)[-1]
    ctx = Context(state={"x": (past_BPD,)}, return_state=True) if past_BPD.shape[1] else Context()
    y_BTD = layer(x_BTD, ctx) if isinstance(layer, ShortConv) else layer(x_BTD).add_(0)  # as torch's, it may be written to
    names, leaves = zip(("x", x_BTE), *layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(weighted(y_BTD, seed=1), leaves)
    kept = {"kept": ctx.next_state["x"][0].detach()} if ctx.next_state else {}
    return {"y": y_BTD.detach(), **kept} | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}


def loss_errors(vocab_size: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, float]:
    """||fla - torch|| / ||torch|| of the mean cross-entropy `y` of 9 rows of logits and their gradient `dx`; torch in float64."""
    torch.manual_seed(0)
    x_MV, labels_M = (3 * torch.randn(9, vocab_size)).to(device, dtype), torch.randint(vocab_size, (9,), device=device)
    exact, given = leaf(wide(x_MV)), leaf(x_MV)
    want, got = F.cross_entropy(exact, labels_M), adapter.cross_entropy(given * 1, labels_M)  # the kernel overwrites what it is given
    pairs = {"y": (want, got), "dx": (torch.autograd.grad(want, exact)[0], torch.autograd.grad(got, given)[0])}
    return {name: ((wide(b) - a).norm() / a.norm()).item() for name, (a, b) in pairs.items()}


def linear_loss_errors(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, float]:
    """The same of the mean cross-entropy of 40 rows under a head of 100 words: the loss, its gradient for the rows and for the head."""
    torch.manual_seed(0)
    x_MD, weight_VD = torch.randn(40, 24).to(device, dtype), torch.randn(100, 24).to(device, dtype)
    labels_M = torch.randint(100, (40,), device=device)
    exact, given = [leaf(wide(x_MD)), leaf(wide(weight_VD))], [leaf(x_MD), leaf(weight_VD)]
    want, got = F.cross_entropy(F.linear(*exact), labels_M), adapter.linear_cross_entropy(*given, labels_M)
    wants, gots = ([loss.detach(), *torch.autograd.grad(2 * loss, leaves)] for loss, leaves in ((want, exact), (got, given)))
    return {name: ((wide(b) - a).norm() / a.norm()).item() for name, a, b in zip(("y", "dx", "dweight"), wants, gots, strict=True)}


def gate_errors(bounded: bool, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, float]:
    """||Triton - torch|| / ||torch|| of both results of the forget gate, and the gradients for logits and bound; torch in float64.

    The logits are a part of a projection, as in the mixers. Among them are some far out, also where the bound is 0, small or near 1;
    `far` is the greatest relative error of log f there at the lower bounds, where f near 1 would not show in a norm over all.
    """
    from hgrn2_bench.ops import gate as kernel

    torch.manual_seed(0)
    whole_BTE = (4 * torch.randn(2, 67, 3 * 152)).to(device, dtype)
    far_F = torch.tensor([-80.0, -60.0, -20.0, 14.0, 20.0, 60.0, 80.0])
    whole_BTE[0, : len(far_F), -152:] = far_F[:, None].to(device, dtype)
    bound_D = torch.rand(152, device=device)
    bound_D[:3] = torch.tensor([0.0, 1e-4, 0.999])
    found = []
    for gate, kind in ((forget_gate, torch.float64), (kernel.forget_gate, dtype)):
        leaves = [leaf(whole_BTE.to(kind)), *([leaf(bound_D.to(torch.promote_types(kind, torch.float32)))] if bounded else [])]
        given = [leaves[0].chunk(3, -1)[-1], leaves[1] if bounded else None]
        log_f, rest = gate(*given) if gate is forget_gate else gate(*given, dtype)
        loss = weighted(log_f, seed=1) + weighted(rest.to(log_f.dtype), seed=2)
        found.append([log_f.detach(), rest.detach(), *torch.autograd.grad(loss, leaves)])
    names = ("y", "rest", "dx", "dbound")
    errors = {name: ((wide(got) - want).norm() / want.norm()).item() for name, want, got in zip(names, *found, strict=False)}
    want, got = (wide(log_f[0, : len(far_F), :2]) for log_f, *_ in found)
    return errors | {"far": ((got - want) / want).abs().max().item()}


def saturated_gate_errors(device: str = "cpu") -> dict[str, float]:
    """As `gate_errors`, of logits below float32's least exponent and bounds of 0 and less than its least number; torch in float32."""
    from hgrn2_bench.ops import gate as kernel

    logit_BTD = torch.tensor([-1e30, -1e4, -100.0, -88.0, -87.0, -85.0, 0.0, 100.0, 1e30], device=device)[None, :, None].expand(1, 9, 3)
    found = []
    for gate in (forget_gate, kernel.forget_gate):
        leaves = [leaf(logit_BTD), leaf(torch.tensor([0.0, 1e-40, 1e-37], device=device))]
        log_f, rest = gate(*leaves)
        found.append([log_f.detach(), rest.detach(), *torch.autograd.grad(log_f.clamp(-1e3).sum() + rest.sum(), leaves)])
    assert all(torch.isfinite(each).all() for each in found[1])
    pairs = zip(("y", "rest", "dx", "dbound"), *found, strict=True)
    return {name: ((wide(got) - wide(want)).norm() / wide(want).norm()).item() for name, want, got in pairs}


LAYER_CASES: dict[str, Callable[[], dict[str, float]]] = {
    **{
        f"gate{' with bound' * b} {dtype}": partial(gate_errors, b, dtype)
        for b in (False, True)
        for dtype in (torch.float32, torch.float16)
    },
    "gate at the least numbers": saturated_gate_errors,
    **{f"{name} {dtype}": partial(layer_errors, name, dtype) for name in LAYERS for dtype in (torch.float32, torch.float16)},
    **{f"{name} of a part": partial(layer_errors, name, parts=3) for name in LAYERS if "norm" in name},
    **{f"{name} continued": partial(layer_errors, name, start=True) for name in LAYERS if name.startswith("conv")},
    **{f"linear loss {dtype}": partial(linear_loss_errors, dtype) for dtype in (torch.float32, torch.float16)},
    **{f"loss over {size} {dtype}": partial(loss_errors, size, dtype) for size in (50, 8192) for dtype in (torch.float32, torch.float16)},
}


def errors(inputs: OpInputs, state: State | None, gradients: bool = True) -> dict[str, float]:
    """||fla - reference|| / ||reference|| of the output, the final state and the gradient of every input; the reference runs in float64.

    Below 1e-20 the error counts against that instead: a gradient that decays to 1e-50 is 0, or a rounding error, in float32.
    """
    want = results(to(inputs, wide), None if state is None else tuple(map(wide, state)), "reference", gradients)
    got = results(inputs, state, "fla", gradients)
    for name, tensor in want.items():
        assert got[name].shape == tensor.shape, f"{name}: shape {tuple(got[name].shape)}, expected {tuple(tensor.shape)}"
    return {name: ((wide(got[name]) - tensor).norm() / tensor.norm().clamp_min(1e-20)).item() for name, tensor in want.items()}


def results(inputs: OpInputs, state: State | None, backend: str, gradients: bool = True) -> dict[str, Tensor]:
    """Output `o`, final state `final`, and the gradients of a random weighting of both, named as the inputs are; `start` is the state's.

    The second tensor of a state is `final1` and `start1`.
    """
    leaves = {f.name: leaf(x) for f in fields(inputs) if isinstance(x := getattr(inputs, f.name), Tensor)}
    start = {f"start{i or ''}": leaf(x) for i, x in enumerate(state or ())}
    with torch.set_grad_enabled(gradients):
        o, final = families.run(replace(inputs, **leaves), backend, tuple(start.values()) or None)
        loss = weighted(o, seed=1) + sum(weighted(x, seed=2 + i) for i, x in enumerate(final))
    found = {"o": o.detach()} | {f"final{i or ''}": x.detach() for i, x in enumerate(final)}
    if gradients:
        named = leaves | start
        found |= {f"d{name}": grad for name, grad in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)}
    return found


def weighted(x: Tensor, seed: int) -> Tensor:
    """The sum of x under fixed random weights, as a real number."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(x.shape, generator=generator, dtype=torch.complex128 if x.is_complex() else torch.float64)
    return (wide(x) * weights.to(x.device)).sum().real


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def to(inputs: OpInputs, convert: Callable[[Tensor], Tensor]) -> OpInputs:
    """The same inputs with every tensor converted."""
    return replace(inputs, **{f.name: convert(x) for f in fields(inputs) if isinstance(x := getattr(inputs, f.name), Tensor)})


def load_kernels() -> None:
    """Import every module with kernels that the adapter and the layers use."""
    for module, _ in adapter._KERNELS.values():
        importlib.import_module(module)
    for module in (
        "hgrn2_bench.ops.norms",
        "fla.modules.causal_conv1d.ops",
        "fla.modules.fused_cross_entropy",
        "fla.modules.fused_linear_cross_entropy",
    ):
        importlib.import_module(module)


class Counter(int):
    """A loop counter as Triton compiles it: it has `.to`, and its sums and products are counters too."""

    def to(self, dtype: Any) -> "Counter":
        return self

    def __add__(self, other: Any) -> Any:
        return counted(super().__add__(other))

    def __sub__(self, other: Any) -> Any:
        return counted(super().__sub__(other))

    def __mul__(self, other: Any) -> Any:
        return counted(super().__mul__(other))


def counted(value: Any) -> Any:
    return value if value is NotImplemented else Counter(value)


def prepare_interpreter() -> None:
    """Make the kernels run in the interpreter.

    Loop counters get Triton's methods, rows are picked without `tl.gather`, which the interpreter lacks inside kernels, and nothing is
    tuned, since that needs a GPU to measure on. Norms have small tiles, so that few rows fill several programs, and their loops.
    """
    load_kernels()
    from hgrn2_bench.ops import norms

    norms.FORWARD = norms.BACKWARD = 512
    norms.PROGRAMS = 3
    FollowsBackend.on_triton = lambda self, x: self.backend == "fla"  # there is no CUDA tensor here
    for name, module in list(sys.modules.items()):
        if name.startswith(("fla.ops", "fla.modules", "hgrn2_bench.ops.norms")):
            vars(module)["range"] = lambda *bounds: map(Counter, builtins.range(*map(int, bounds)))
            if hasattr(module, "IS_GATHER_SUPPORTED"):
                vars(module)["IS_GATHER_SUPPORTED"] = False
    for tuner in autotuners():
        tuner.configs = tuner.configs[:1]


def hopper_refusal() -> str:
    """What is raised by the gradient of a scalar decay where Triton miscompiles it; the two flags pretend to be such a machine."""
    from fla.ops.common import chunk_o

    chunk_o.IS_NVIDIA_HOPPER, chunk_o.TRITON_ABOVE_3_4_0, chunk_o.TRITON_ABOVE_3_7_1 = True, True, False
    try:
        results(*decay_case(17, scalar=True), "fla")
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def report() -> dict[str, Any]:
    """Run every case; one that raises leaves its traceback and lets the others run."""
    found: dict[str, Any] = {}
    runs = {name: lambda make=make: errors(*make()) for name, make in CASES.items()}
    tokens = {f"token {name}": lambda make=make: errors(*make(), gradients=False) for name, make in TOKENS.items()}
    for name, run in (runs | tokens | LAYER_CASES).items():
        try:
            found[name] = run()
        except Exception:
            found[name] = traceback.format_exc()
    return found | {"hopper": hopper_refusal()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    prepare_interpreter()
    Path(sys.argv[1]).write_text(json.dumps(report()))
