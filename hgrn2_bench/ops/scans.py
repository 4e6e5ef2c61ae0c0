"""The two elementwise scans, time first and in place, with their backward written by hand; `chunked` wraps them.

An autograd loop would keep several tensors per step and launch an operation for each; here one step is one `addcmul_`, and
everything that does not depend on the previous step is done for many steps at once.

Shape letters: T time, B batch, N states per channel, D channels; F any trailing shape.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG2E = math.log2(math.e)
BLOCK_ELEMENTS = 2**19
"""Elements of one block of states in the selective scan: few enough to stay in a CPU's cache, many enough to hide the calls."""


def exp(x: Tensor) -> Tensor:
    """e^x by way of 2^x, whose CPU kernel took a quarter of the time; absolute error up to one unit in the last place for x <= 0."""
    return (x * LOG2E).exp2_()


def scan_rows(decays: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
    """rows[i + 1] += decays[i] * rows[i], in order and in place."""
    for decay, row, following in zip(decays, rows[:-1], rows[1:], strict=True):
        following.addcmul_(decay, row)


class DiagonalScan(torch.autograd.Function):
    """h_t = exp(log_a_t + i theta_t) h_{t-1} + x_t over the first axis: (log_a, theta or None, x_TF, h0_F or None) -> h_TF.

    `log_a` has an entry for every step and broadcasts over the rest of `x`; `theta` broadcasts altogether, and makes `x` complex.
    """

    @staticmethod
    def forward(ctx: Any, log_a: Tensor, theta: Tensor | None, x_TF: Tensor, h0_F: Tensor | None) -> Tensor:
        """Copy x and turn it into h, row by row."""
        a = exp(log_a)
        if theta is not None:
            a = torch.complex(a * theta.cos(), a * theta.sin())
        h_TF = x_TF.clone(memory_format=torch.contiguous_format)
        rows, decays = h_TF.unbind(0), a.unbind(0)
        if h0_F is not None:
            rows[0].addcmul_(decays[0], h0_F)
        scan_rows(decays[1:], rows)
        ctx.shapes = log_a.shape, None if theta is None else theta.shape
        ctx.save_for_backward(a, h_TF, h0_F)
        return h_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_TF: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The same scan backwards, g_t = dh_t + conj(a_{t+1}) g_{t+1}; dx_t = g_t and dlog_a_t + i dtheta_t = g_t conj(a_t h_{t-1})."""
        a, h_TF, h0_F = ctx.saved_tensors
        a = a.conj().resolve_conj()
        g_TF = dh_TF.clone(memory_format=torch.contiguous_format)
        scan_rows(a.unbind(0)[:0:-1], g_TF.unbind(0)[::-1])
        d_TF = a * g_TF
        dh0_F = None if h0_F is None else d_TF[0].clone()
        d_TF[0] = 0 if h0_F is None else d_TF[0] * h0_F.conj()
        d_TF[1:] *= h_TF[:-1].conj()
        log_a_shape, theta_shape = ctx.shapes
        dtheta = None if theta_shape is None else d_TF.imag.sum_to_size(theta_shape)
        return d_TF.real.sum_to_size(log_a_shape), dtheta, g_TF, dh0_F


class SelectiveScan(torch.autograd.Function):
    """Mamba's scan: (x_TBD, dt_TBD, A_ND, B_TBN, C_TBN, h0_BND) -> (y_TBD, final state h_BND), D last so that rows are long.

    Works through blocks of steps that fit in the cache. Only the state before each block is kept; backward recomputes the rest,
    which costs less than writing all T states to memory and reading them back.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TBD: Tensor, dt_TBD: Tensor, A_ND: Tensor, B_TBN: Tensor, C_TBN: Tensor, h0_BND: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Block by block, each from the last state of the one before."""
        y_TBD = torch.empty_like(x_TBD)
        starts = [h0_BND]
        for block in _blocks(len(x_TBD), h0_BND.numel()):
            _, h_BND = _decays_and_states(x_TBD[block], dt_TBD[block], A_ND, B_TBN[block], starts[-1])
            y_TBD[block] = (C_TBN[block, :, None] @ h_BND[1:]).squeeze(2)
            starts.append(h_BND[-1].clone())
        ctx.save_for_backward(x_TBD, dt_TBD, A_ND, B_TBN, C_TBN, *starts[:-1])
        return y_TBD, starts[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TBD: Tensor, dh_BND: Tensor) -> tuple[Tensor, ...]:
        """With g_t the gradient of h_t: g_t = C_t dy_t^T + a_{t+1} g_{t+1}, and the gradient of dt_t A is w_t = a_t g_t h_{t-1}."""
        x_TBD, dt_TBD, A_ND, B_TBN, C_TBN, *starts = ctx.saved_tensors
        dx_TBD, ddt_TBD, dB_TBN, dC_TBN = (torch.empty_like(t) for t in (x_TBD, dt_TBD, B_TBN, C_TBN))
        dA_ND = torch.zeros_like(A_ND)
        with torch.autocast(dy_TBD.device.type, enabled=False):
            for block, start_BND in reversed(list(zip(_blocks(len(x_TBD), dh_BND.numel()), starts, strict=True))):
                x, dt, B, C, dy = (t[block] for t in (x_TBD, dt_TBD, B_TBN, C_TBN, dy_TBD))
                a, h = _decays_and_states(x, dt, A_ND, B, start_BND)
                # The row vector goes first: a matrix times a column took eight times as long in the batched CPU kernel.
                dC_TBN[block] = (dy[:, :, None] @ h[1:].mT).squeeze(2)
                g = C[..., None] * dy[:, :, None]
                g[-1] += dh_BND
                scan_rows(a.unbind(0)[:0:-1], g.unbind(0)[::-1])
                dh_BND = a[0] * g[0]
                dB_TBN[block] = ((dt * x)[:, :, None] @ g.mT).squeeze(2)
                du = (B[:, :, None] @ g).squeeze(2)
                w = a.mul_(g).mul_(h[:-1])
                dA_ND += torch.mul(w, dt[:, :, None], out=g).sum((0, 1))
                ddt_TBD[block] = w.mul_(A_ND).sum(2).addcmul_(du, x)
                dx_TBD[block] = du * dt
        return dx_TBD, ddt_TBD, dA_ND, dB_TBN, dC_TBN, dh_BND


def _blocks(T: int, state_elements: int) -> list[slice]:
    step = max(1, BLOCK_ELEMENTS // max(1, state_elements))
    return [slice(t, t + step) for t in range(0, T, step)]


def _decays_and_states(x_TBD: Tensor, dt_TBD: Tensor, A_ND: Tensor, B_TBN: Tensor, start_BND: Tensor) -> tuple[Tensor, Tensor]:
    """The decays a_TBND = exp(dt A) of one block, and its states h, (T + 1, B, N, D) with the state before the block first."""
    a_TBND = (dt_TBD[:, :, None] * (A_ND * LOG2E)).exp2_()
    h = x_TBD.new_empty(len(x_TBD) + 1, *start_BND.shape)
    h[0] = start_BND
    torch.mul((dt_TBD * x_TBD)[:, :, None], B_TBN[..., None], out=h[1:])
    scan_rows(a_TBND.unbind(0), h.unbind(0))
    return a_TBND, h
