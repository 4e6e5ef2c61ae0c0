"""The hand-written backward functions of `chunked` against finite differences."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from hgrn2_bench.ops import chunked, scans


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def leaf(*shape: int, complex: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128 if complex else torch.float64).requires_grad_()


def log_decay(*shape: int) -> Tensor:
    return F.logsigmoid(torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def derivative_is_right(function: type[torch.autograd.Function], *args: Any) -> bool:
    return gradcheck(function.apply, args)


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("start", [False, True])
def test_per_channel_decay_backward_is_the_derivative(c: int, start: bool) -> None:
    S0 = leaf(2, 2, 3) if start else None
    q, k, v, log_f = leaf(c, 2, 4, 2), leaf(c, 2, 4, 2), leaf(c, 2, 4, 3), log_decay(c, 2, 4, 2)
    assert derivative_is_right(chunked._PerChannelDecay, q, k, v, log_f, S0, -60.0)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("phase", [None, (3,), (4, 2, 3)], ids=["real", "angle per channel", "angle per step"])
@pytest.mark.parametrize("shape", [(4, 2, 3), (4, 1, 1)], ids=["decay per channel", "decay per step"])
def test_diagonal_scan_backward_is_the_derivative(shape: tuple[int, ...], phase: tuple[int, ...] | None, start: bool) -> None:
    turning = phase is not None
    theta = leaf(*phase) if phase else None
    x, h0 = leaf(4, 2, 3, complex=turning), leaf(2, 3, complex=turning) if start else None
    assert derivative_is_right(scans.DiagonalScan, log_decay(*shape), theta, x, h0)


def test_selective_scan_backward_is_the_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "BLOCK_ELEMENTS", 2 * 2 * 2 * 3)  # blocks of two steps: the last of five is half full
    dt, A = F.softplus(leaf(5, 2, 3)).detach().requires_grad_(), log_decay(2, 3)
    assert derivative_is_right(scans.SelectiveScan, leaf(5, 2, 3), dt, A, leaf(5, 2, 2), leaf(5, 2, 2), leaf(2, 2, 3))
