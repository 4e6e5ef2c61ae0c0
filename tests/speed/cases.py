"""Inputs of every recurrence family as training meets them, and one step on them: forward, and backward to every input."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from guard import Call
from torch import Tensor

from hgrn2_bench.ops import families
from hgrn2_bench.ops.families import (
    DecayInputs,
    DeltaInputs,
    DiagonalInputs,
    DiagonalLowRankInputs,
    DiagonalSSMInputs,
    OpInputs,
    ScalarDecayInputs,
    SelectiveInputs,
    SlotInputs,
    SoftmaxInputs,
)

Shape = tuple[int, int, int, int]

SMALL: Shape = (64, 64, 1, 64)
"""B, T, H, K of an MQAR batch, for a CPU."""
LARGE: Shape = (8, 2048, 8, 128)
"""The same of a language model's layer, for a GPU."""


def decay(shape: Shape) -> DecayInputs:
    q, k, v, logits = torch.randn(4, *shape).unbind(0)
    return DecayInputs(q, k, v, F.logsigmoid(logits))


def scalar_decay(shape: Shape) -> ScalarDecayInputs:
    q, k, v = torch.randn(3, *shape).unbind(0)
    return ScalarDecayInputs(q, k, v, F.logsigmoid(torch.randn(shape[:3]) + 2))


def delta(shape: Shape) -> DeltaInputs:
    q, k, v = torch.randn(3, *shape).unbind(0)
    return DeltaInputs(q, F.normalize(k, dim=-1), v, torch.rand(shape[:3]), F.logsigmoid(torch.randn(shape[:3])))


def low_rank(shape: Shape) -> DiagonalLowRankInputs:
    q, k, v, b, logit = torch.randn(5, *shape).unbind(0)
    a, least = F.normalize(torch.randn(shape), dim=-1), -0.6065
    return DiagonalLowRankInputs(q, k, v, -a, b.sigmoid() * a, least * logit.sigmoid(), least_log_f=least)


def slots(shape: Shape) -> SlotInputs:
    q, k, v, logits = torch.randn(4, *shape).unbind(0)
    log_f = F.logsigmoid(logits)
    return SlotInputs(q, k, v, -torch.expm1(log_f), log_f, scale=0.125)


def softmax(shape: Shape) -> SoftmaxInputs:
    q, k, v = torch.randn(3, *shape).unbind(0)
    return SoftmaxInputs(q, k, v, scale=shape[-1] ** -0.5)


def diagonal(B: int, T: int, D: int) -> DiagonalInputs:
    return DiagonalInputs(torch.randn(B, T, D), F.logsigmoid(torch.randn(B, T, D)))


def ssm(B: int, T: int, D: int, N: int) -> DiagonalSSMInputs:
    dt = torch.logspace(-3, -1, D)[:, None]
    theta = torch.pi * torch.arange(N) * dt
    return DiagonalSSMInputs(torch.randn(B, T, D), (-0.5 * dt).expand(D, N), theta, torch.randn(D, N, dtype=torch.complex64))


def selective(B: int, T: int, D: int, N: int) -> SelectiveInputs:
    x, dt = torch.randn(2, B, T, D).unbind(0)
    B_BTN, C_BTN = torch.randn(2, B, T, N).unbind(0)
    return SelectiveInputs(x, F.softplus(dt - 2), -torch.arange(1.0, N + 1).repeat(D, 1), B_BTN, C_BTN)


CPU_CASES: dict[str, Callable[[], OpInputs]] = {
    "per_channel_decay": partial(decay, SMALL),
    "scalar_decay": partial(scalar_decay, SMALL),
    "delta_rule": partial(delta, SMALL),
    "diagonal_low_rank": partial(low_rank, SMALL),
    "gated_slots": partial(slots, SMALL),
    "diagonal_scan": partial(diagonal, 16, 512, 64),
    "diagonal_ssm": partial(ssm, 4, 512, 64, 32),
    "selective_scan": partial(selective, 4, 512, 64, 16),
    "softmax": partial(softmax, (16, 256, 1, 64)),
}
GPU_CASES: dict[str, Callable[[], OpInputs]] = {
    "per_channel_decay": partial(decay, LARGE),
    "scalar_decay": partial(scalar_decay, LARGE),
    "delta_rule": partial(delta, LARGE),
    "diagonal_low_rank": partial(low_rank, LARGE),
    "gated_slots": partial(slots, LARGE),
    "diagonal_scan": partial(diagonal, 8, 2048, 1024),
}
"""The families that fla has kernels for."""


def gpu_dtype(family: str) -> torch.dtype:
    """What training has on a GPU: half precision for what matrices multiply, float32 for a scan."""
    return torch.float32 if family == "diagonal_scan" else torch.bfloat16


def training_step(inputs: OpInputs, backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Call:
    """One step on a copy of the inputs; `dtype` is that of queries, keys and values, gates stay float32."""
    wide = ("log_f", "log_a", "theta", "beta", "dt", "A_", "C_DN")
    tensors = {f.name: x for f in fields(inputs) if isinstance(x := getattr(inputs, f.name), Tensor)}
    dtypes = {n: x.dtype if n.startswith(wide) else dtype for n, x in tensors.items()}
    leaves = {n: x.to(device, dtypes[n], copy=True).requires_grad_() for n, x in tensors.items()}
    given = replace(inputs, **leaves)
    do = torch.randn_like(families.run(given, backend)[0])
    return lambda: torch.autograd.grad(families.run(given, backend)[0], list(leaves.values()), do)
