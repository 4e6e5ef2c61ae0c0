"""Layer norm and root-mean-square norm over the last dimension as one Triton kernel each way, without tuning.

With m and r the row's mean (0 for the root-mean-square norm) and inverse deviation, h = (x - m) r and g = w dy the kernels compute

    y = w h + b        dx = r (g - mean(g) - h mean(g h))        dw = sum over rows of h dy        db = sum over rows of dy

in float32, without the term mean(g) for the root-mean-square norm. A program holds a few rows at a time, few enough for its registers
(those of fla hold up to 64 where D is at most 512, spill, take seconds each to compile, and tune again for every further 2,048 tokens). No
sum depends on the order in which programs run.

Shape letters: M rows, D width, P programs of the backward pass.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

FORWARD, BACKWARD = 4096, 2048
"""Numbers of a tensor that a program of 4 warps holds at a time; a wider row has as many more warps."""
PROGRAMS = 512
"""Of a backward pass at most, some for each processor of a GPU; each leaves one row of sums."""


@triton.jit  # type: ignore[untyped-decorator]
def _norm_forward(  # type: ignore[no-untyped-def]
    x, w, b, y, mean, rstd, eps, M, stride,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    there = (row < M)[:, None] & (column < D)[None, :]
    h = tl.load(x + row[:, None] * stride + column[None, :], mask=there, other=0.0).to(tl.float32)
    if not RMS:
        m = tl.sum(h, 1) / D
        tl.store(mean + row, m, mask=row < M)
        h = tl.where(there, h - m[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(h * h, 1) / D + eps)
    tl.store(rstd + row, r, mask=row < M)
    h = h * r[:, None]
    if WEIGHT:
        h = h * tl.load(w + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        h = h + tl.load(b + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * D + column[None, :], h.to(y.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _norm_backward(  # type: ignore[no-untyped-def]
    x, w, mean, rstd, dy, dx, dw, db, M, stride, steps,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    total_w = tl.zeros((ROWS, WIDTH), tl.float32)
    total_b = tl.zeros((ROWS, WIDTH), tl.float32)
    for step in range(steps):
        row = (step * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        there = (row < M)[:, None] & (column < D)[None, :]
        h = tl.load(x + row[:, None] * stride + column[None, :], mask=there, other=0.0).to(tl.float32)
        g = tl.load(dy + row[:, None] * D + column[None, :], mask=there, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < M, other=0.0)
        if not RMS:
            h = tl.where(there, h - tl.load(mean + row, mask=row < M, other=0.0)[:, None], 0.0)
        h = h * r[:, None]
        if BIAS:
            total_b += g
        if WEIGHT:
            total_w += g * h
            g = g * tl.load(w + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
        d = g - h * (tl.sum(g * h, 1) / D)[:, None]
        if not RMS:
            d = d - (tl.sum(g, 1) / D)[:, None]
        tl.store(dx + row[:, None] * D + column[None, :], (d * r[:, None]).to(dx.dtype.element_ty), mask=there)
    place = tl.program_id(0).to(tl.int64) * D + column
    if WEIGHT:
        tl.store(dw + place, tl.sum(total_w, 0), mask=column < D)
    if BIAS:
        tl.store(db + place, tl.sum(total_b, 0), mask=column < D)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float, rms: bool) -> Tensor:
        D = x.shape[-1]
        x_MD = x.reshape(-1, D)
        if x_MD.stride(-1) != 1:
            x_MD = x_MD.contiguous()
        weight_D, bias_D = (None if each is None else each.contiguous() for each in (weight_D, bias_D))
        M, y = len(x_MD), x_MD.new_empty(x.shape)
        mean_M, rstd_M = (x_MD.new_empty(0 if unused else M, dtype=torch.float32) for unused in (rms, False))
        rows, warps = _tile(D, FORWARD)
        kinds = (rms, weight_D is not None, bias_D is not None)
        with torch.cuda.device_of(x):  # Triton launches on the current one
            _norm_forward[(triton.cdiv(M, rows),)](
                x_MD, weight_D, bias_D, y, mean_M, rstd_M, eps, M, x_MD.stride(0), D, _width(D), rows, *kinds, num_warps=warps
            )
        ctx.save_for_backward(x_MD, weight_D, mean_M, rstd_M)
        ctx.kinds, ctx.bias_dtype = kinds, None if bias_D is None else bias_D.dtype
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, weight_D, mean_M, rstd_M = ctx.saved_tensors
        dy = gradients[0].contiguous()
        (M, D), (rms, weight, bias) = x_MD.shape, ctx.kinds
        rows, warps = _tile(D, BACKWARD)
        programs = max(1, min(PROGRAMS, triton.cdiv(M, rows)))
        dx = x_MD.new_empty(dy.shape)
        dw_PD, db_PD = (x_MD.new_empty(programs, D, dtype=torch.float32) if there else None for there in (weight, bias))
        with torch.cuda.device_of(dy):
            _norm_backward[(programs,)](
                x_MD, weight_D, mean_M, rstd_M, dy, dx, dw_PD, db_PD, M, x_MD.stride(0), triton.cdiv(M, rows * programs),
                D, _width(D), rows, rms, weight, bias, num_warps=warps,
            )  # fmt: skip
        dw_D = None if dw_PD is None else dw_PD.sum(0).to(weight_D.dtype)
        db_D = None if db_PD is None else db_PD.sum(0).to(ctx.bias_dtype)
        return dx, dw_D, db_D, None, None


def _width(D: int) -> int:
    return int(triton.next_power_of_2(D))


def _tile(D: int, numbers: int) -> tuple[int, int]:
    """Rows that a program holds at a time, and its warps."""
    width = _width(D)
    return max(1, numbers // width), 4 * min(8, max(1, width // numbers))


def layer_norm(x: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last dimension in the type of x, float32 or narrower."""
    y: Tensor = _Norm.apply(x, weight_D, bias_D, eps, False)  # type: ignore[no-untyped-call]
    return y


def rms_norm(x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, as `layer_norm`."""
    y: Tensor = _Norm.apply(x, weight_D, None, eps, True)  # type: ignore[no-untyped-call]
    return y
