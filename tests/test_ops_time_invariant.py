"""What is particular to `diagonal_ssm`: it is a convolution, its chunks join at every length, and its phases stay exact for long."""

import math

import numpy as np
import pytest
import torch

from hgrn2_bench.ops import families
from hgrn2_bench.ops.families import DiagonalSSMInputs


def system(B: int, T: int, D: int = 3, N: int = 4, rate: float = 0.1) -> tuple[DiagonalSSMInputs, families.State]:
    """A float64 system of fast and slow turning states, and a state to start from."""
    torch.manual_seed(0)
    x, log_a, theta = torch.randn(B, T, D).double(), -rate * torch.rand(D, N).double(), 10 * torch.rand(D, N).double()
    C, h0 = torch.randn(D, N, dtype=torch.complex128), torch.randn(B, D, N, dtype=torch.complex128)
    return DiagonalSSMInputs(x, log_a, theta, C), (h0,)


@pytest.mark.parametrize("T", [2, 64, 65, 300])
def test_outputs_are_the_convolution_with_the_kernel(T: int) -> None:
    """The kernel k_t = Re(sum_n C_n a_n^t) and its convolution, by numpy."""
    inputs, _ = system(2, T)
    o, _ = families.run(inputs, "chunked")
    a = np.exp(inputs.log_a_DN.numpy() + 1j * inputs.theta_DN.numpy())
    for row, channel in ((0, 0), (1, 2)):
        kernel = np.array([(inputs.C_DN[channel].numpy() * a[channel] ** t).sum().real for t in range(T)])
        want = np.convolve(inputs.x_BTD[row, :, channel].numpy(), kernel)[:T]
        np.testing.assert_allclose(o[row, :, channel].numpy(), want, rtol=0, atol=1e-11)


def test_final_state_at_every_length_of_padded_rows() -> None:
    """One row per length, chunk borders (here 44 steps) among them, from a state; what stands at the padding may be anything."""
    T = 130
    inputs, (h0,) = system(1, T)
    lengths = torch.arange(T + 1)
    x = inputs.x_BTD.repeat(T + 1, 1, 1).masked_fill((torch.arange(T) >= lengths[:, None])[..., None], torch.nan)
    padded = DiagonalSSMInputs(x, inputs.log_a_DN, inputs.theta_DN, inputs.C_DN).masked(lengths)
    (got,) = families.run(padded, "chunked", (h0.repeat(T + 1, 1, 1),))[1]
    want = [h0[0]]
    a = torch.exp(torch.complex(inputs.log_a_DN, inputs.theta_DN))
    for x_D in inputs.x_BTD[0]:
        want.append(a * want[-1] + x_D[:, None])
    torch.testing.assert_close(got, torch.stack(want), rtol=0, atol=1e-11)


@pytest.mark.parametrize("start", [False, True])
def test_float32_keeps_the_phase_of_states_that_hardly_decay(start: bool) -> None:
    """10 radians a step over 4,000 steps: a phase summed in float32 would be off by 1e-3."""
    inputs, (h0,) = system(1, 4_000, rate=1e-4)
    single = DiagonalSSMInputs(inputs.x_BTD.float(), inputs.log_a_DN.float(), inputs.theta_DN.float(), inputs.C_DN.to(torch.complex64))
    wide = DiagonalSSMInputs(single.x_BTD.double(), single.log_a_DN.double(), single.theta_DN.double(), single.C_DN.to(torch.complex128))
    o, (h,) = families.run(single, "chunked", (h0.to(torch.complex64),) if start else None)
    want, (want_h,) = families.run(wide, "reference", (h0.to(torch.complex64).to(torch.complex128),) if start else None)
    assert (o - want).abs().max() / want.abs().max() < 1e-5
    assert (h - want_h).abs().max() / want_h.abs().max() < 1e-5


def test_gradients_of_padded_rows_equal_those_of_the_reference() -> None:
    inputs, (h0,) = system(3, 100)
    found = []
    for backend in ("chunked", "reference"):
        leaves = [x.clone().requires_grad_() for x in (inputs.x_BTD, inputs.log_a_DN, inputs.theta_DN, inputs.C_DN, h0)]
        masked = DiagonalSSMInputs(*leaves[:4]).masked(torch.tensor([100, 51, 0]))
        o, (h,) = families.run(masked, backend, (leaves[4],))
        loss = o.square().sum() + (h * math.e**0.5j).real.square().sum()
        found.append([o.detach(), h.detach(), *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
