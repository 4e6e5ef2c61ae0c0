"""The forget gate of HGRN and HGRN2 as one Triton kernel each way, where torch has nine forward and more backward.

With s = sigmoid(logit), lb the bound and f = lb + (1 - lb) s the kernels compute

    log f = log sigmoid(logit) + log(1 + lb exp(-logit))     1 - f = (1 - lb) (1 - s)
    d logit = (1 - f) s (d log f / f - d rest)               d lb = sum over tokens of (1 - s) (d log f / f - d rest)

in float32, like `hgrn2_bench.layers.forget_gate`, and like it with a bound of float32's least number in log f where lb is less, and without
the first term of d lb there. Only logit and bound are kept for the backward pass. No sum depends on the order in which programs run.

Shape letters: B batch, T time, D width, M = B T rows, P programs along the rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TINY = tl.constexpr(1.1754943508222875e-38)
"""The least normal number of float32; below it a bound counts as it in log f, as torch's clamp has it."""
LOG_TINY = tl.constexpr(-87.33654475055310898657)
ROWS, COLUMNS = 16, 128
"""Of a program; it takes ROWS of them at a time, backward STEPS times."""
STEPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _log1p(u):  # type: ignore[no-untyped-def]
    """log(1 + u) for u in [0, 1], to the last digits of a small u too (Kahan)."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / (w - 1.0)))


@triton.jit  # type: ignore[untyped-decorator]
def _gate_forward(  # type: ignore[no-untyped-def]
    logit, bound, log_f, rest, M, D, stride, BOUNDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = (row < M) & (column < D)
    z = tl.load(logit + row * stride + column, mask=there, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(z))
    log_s = tl.minimum(z, 0.0) - _log1p(small)
    away = tl.where(z >= 0, small, 1.0) / (1.0 + small)  # sigmoid(-z)
    if BOUNDED:
        lb = tl.load(bound + column, mask=column < D, other=0.0).to(tl.float32)
        y = tl.log(tl.maximum(lb, TINY)) - z
        log_s += tl.maximum(y, 0.0) + _log1p(tl.exp(-tl.abs(y)))
        away *= 1.0 - lb
    place = row * D + column
    tl.store(log_f + place, log_s, mask=there)
    tl.store(rest + place, away.to(rest.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _gate_backward(  # type: ignore[no-untyped-def]
    logit, bound, d_log_f, d_rest, d_logit, d_bound, M, D, stride,
    BOUNDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    lb = tl.zeros((1, COLUMNS), tl.float32)
    if BOUNDED:
        lb = tl.load(bound + column, mask=column < D, other=0.0).to(tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)[:, None]
        there = (row < M) & (column < D)
        place = row * D + column
        z = tl.load(logit + row * stride + column, mask=there, other=0.0).to(tl.float32)
        d_log = tl.load(d_log_f + place, mask=there, other=0.0).to(tl.float32)
        d_key = tl.load(d_rest + place, mask=there, other=0.0).to(tl.float32)
        small = tl.exp(-tl.abs(z))
        s = tl.where(z >= 0, 1.0, small) / (1.0 + small)
        away = tl.where(z >= 0, small, 1.0) / (1.0 + small)
        slope = away  # of log f
        if BOUNDED:
            f = lb + (1.0 - lb) * s
            slope = tl.where(lb >= TINY, (1.0 - lb) * away * (s / f), away - 1.0 / (1.0 + tl.exp(z - LOG_TINY)))
            total += away * (tl.where(lb >= TINY, d_log / f, 0.0) - d_key)
        d_z = d_log * slope - d_key * (1.0 - lb) * away * s
        tl.store(d_logit + place, d_z.to(d_logit.dtype.element_ty), mask=there)
    if BOUNDED:
        tl.store(d_bound + tl.program_id(0).to(tl.int64) * D + column, tl.sum(total, 0)[None, :], mask=column < D)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logit_BTD: Tensor, bound_D: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        D = logit_BTD.shape[-1]
        logit_MD = logit_BTD.reshape(-1, D)  # a view of a chunk of a projection, whose rows are further apart
        if logit_MD.stride(-1) != 1:
            logit_MD = logit_MD.contiguous()
        log_f_BTD = logit_MD.new_empty(logit_BTD.shape, dtype=torch.float32)
        rest_BTD = logit_MD.new_empty(logit_BTD.shape, dtype=dtype)
        M = len(logit_MD)
        grid = (triton.cdiv(M, ROWS), triton.cdiv(D, COLUMNS))
        bounded = bound_D is not None
        with torch.cuda.device_of(logit_MD):  # Triton launches on the current one
            _gate_forward[grid](logit_MD, bound_D, log_f_BTD, rest_BTD, M, D, logit_MD.stride(0), bounded, ROWS, COLUMNS)
        ctx.save_for_backward(logit_MD, bound_D)
        return log_f_BTD, rest_BTD

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        logit_MD, bound_D = ctx.saved_tensors
        d_log_f, d_rest = (each.contiguous() for each in gradients)
        M, D = logit_MD.shape
        d_logit = logit_MD.new_empty(d_log_f.shape)
        grid = (triton.cdiv(M, ROWS * STEPS), triton.cdiv(D, COLUMNS))
        d_bound_PD = None if bound_D is None else logit_MD.new_empty(grid[0], D, dtype=torch.float32)
        bounded, stride = bound_D is not None, logit_MD.stride(0)
        with torch.cuda.device_of(logit_MD):
            _gate_backward[grid](logit_MD, bound_D, d_log_f, d_rest, d_logit, d_bound_PD, M, D, stride, bounded, ROWS, COLUMNS, STEPS)
        return d_logit, None if d_bound_PD is None else d_bound_PD.sum(0).to(bound_D.dtype), None


def forget_gate(logit_BTD: Tensor, bound_D: Tensor | None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """`hgrn2_bench.layers.forget_gate` of logits in float32 or narrower; log f in float32, 1 - f in `dtype`."""
    if bound_D is not None:
        bound_D = bound_D.expand(logit_BTD.shape[-1]).contiguous()
    found: tuple[Tensor, Tensor] = _Gate.apply(logit_BTD, bound_D, dtype)  # type: ignore[no-untyped-call]
    return found
