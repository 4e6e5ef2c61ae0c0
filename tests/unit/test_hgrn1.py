import cmath
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.hgrn1 import HGRN1
from hgrn2_bench.interfaces import Context, MixerSpec

D, T = 4, 6
BOUND = torch.stack([torch.zeros(D), torch.linspace(0.1, 0.8, D)]).double()


def build(variant: str, d_model: int = D, **spec: Any) -> HGRN1:
    torch.manual_seed(0)
    return HGRN1(MixerSpec(d_model, backend="reference", settings={"variant": variant}, **spec))


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def complex_equations(mixer: HGRN1, x_TD: Tensor, bound_D: Tensor) -> Tensor:
    """The published layer with Python's complex numbers; real and imaginary part of an input are neighbours in the projection."""
    assert mixer.theta is not None
    h, outputs = [0j] * D, []
    for x_D in x_TD:
        i = silu(mixer.in_proj.weight[: 2 * D] @ x_D + mixer.in_proj.bias[: 2 * D])
        f = bound_D + (1 - bound_D) / (1 + (-(mixer.in_proj.weight[2 * D :] @ x_D) - mixer.in_proj.bias[2 * D :]).exp())
        for d in range(D):
            turn = cmath.exp(1j * mixer.theta[d].item())
            h[d] = f[d].item() * turn * h[d] + (1 - f[d].item()) * complex(i[2 * d].item(), i[2 * d + 1].item())
        o = torch.tensor([z.real for z in h] + [z.imag for z in h], dtype=torch.float64)
        centred = o - o.mean()
        o = centred / ((centred**2).mean() + 1e-5).sqrt() * mixer.norm.weight + mixer.norm.bias
        gate = silu(mixer.gate_proj.weight @ x_D + mixer.gate_proj.bias)
        outputs.append(mixer.out_proj.weight @ (o * gate) + mixer.out_proj.bias)
    return torch.stack(outputs)


def real_equations(mixer: HGRN1, x_TD: Tensor, bound_D: Tensor) -> Tensor:
    h, outputs = torch.zeros(D).double(), []
    for x_D in x_TD:
        f = bound_D + (1 - bound_D) / (1 + (-(mixer.in_proj.weight[D:] @ x_D)).exp())
        h = f * h + (1 - f) * silu(mixer.in_proj.weight[:D] @ x_D)
        o = h / ((h**2).mean() + 1e-5).sqrt() * mixer.norm.weight
        outputs.append(mixer.out_proj.weight @ (o * silu(mixer.gate_proj.weight @ x_D)))
    return torch.stack(outputs)


def control_equations(mixer: HGRN1, x_TD: Tensor, bound_D: Tensor) -> Tensor:
    """Twice as many real channels, of which j and j + D share a bound; the sigmoid gate comes before the norm."""
    bound, h, outputs = torch.cat([bound_D, bound_D]), torch.zeros(2 * D).double(), []
    for x_D in x_TD:
        z = mixer.in_proj.weight @ x_D + mixer.in_proj.bias
        f = bound + (1 - bound) / (1 + (-z[2 * D :]).exp())
        h = f * h + (1 - f) * silu(z[: 2 * D])
        o = h / (1 + (-(mixer.gate_proj.weight @ x_D) - mixer.gate_proj.bias).exp())
        centred = o - o.mean()
        o = centred / ((centred**2).mean() + 1e-5).sqrt() * mixer.norm.weight + mixer.norm.bias
        outputs.append(mixer.out_proj.weight @ o + mixer.out_proj.bias)
    return torch.stack(outputs)


@pytest.mark.parametrize(("variant", "equations"), [("paper", complex_equations), ("fla", real_equations), ("expand2", control_equations)])
@pytest.mark.parametrize("layer", [None, 0, 1])
def test_layer_equals_the_equations(variant: str, equations: Any, layer: int | None) -> None:
    mixer = build(variant, layer=layer or 0).double()
    for parameter in mixer.norm.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, T, D).double()
    shared = {} if layer is None else {"lower_bound": BOUND}
    want = torch.stack([equations(mixer, x_TD, BOUND[layer or 0]) for x_TD in x])
    torch.testing.assert_close(mixer(x, Context(shared=shared)), want, rtol=1e-9, atol=1e-9)


def test_theta_starts_on_the_published_spiral() -> None:
    theta = build("paper", 8).theta
    assert theta is not None
    torch.testing.assert_close(theta, torch.tensor([10_000 ** (-2 * j / 8) for j in range(8)]))
    assert theta.requires_grad


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    ("variant", "conv", "forget_bias", "count"),
    [
        ("paper", 0, 0.0, lambda d: 7 * d * d + 6 * d + 4 * d + d),  # weights, biases, norm, theta
        ("paper", 0, 3.0, lambda d: 7 * d * d + 6 * d + 4 * d + d),
        ("paper", 4, 3.0, lambda d: 7 * d * d + 6 * d + 4 * d + d + 4 * 3 * d + d),
        ("expand2", 0, 0.0, lambda d: 8 * d * d + 7 * d + 4 * d),
        ("expand2", 4, 3.0, lambda d: 8 * d * d + 7 * d + 4 * d + 4 * 4 * d + 2 * d),
        ("fla", 0, 0.0, lambda d: 4 * d * d + d),
        ("fla", 0, 3.0, lambda d: 4 * d * d + d + d),
        ("fla", 4, 0.0, lambda d: 4 * d * d + d + 4 * 2 * d),
    ],
)
def test_parameter_count(variant: str, conv: int, forget_bias: float, count: Any, d: int) -> None:
    assert sum(p.numel() for p in build(variant, d, conv=conv, forget_bias=forget_bias).parameters()) == count(d)


@pytest.mark.parametrize("variant", ["paper", "fla"])
@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("forget_bias", [-2.0, 0.0, 3.0])
def test_forget_bias_moves_the_median_gate_to_its_sigmoid(variant: str, conv: int, forget_bias: float) -> None:
    mixer = build(variant, 64, conv=conv, forget_bias=forget_bias)
    f = mixer.project(torch.randn(8, 32, 64), Context()).log_a_BTD.exp()
    assert f.median().item() == pytest.approx(torch.tensor(forget_bias).sigmoid().item(), abs=0.03)


@pytest.mark.parametrize(
    ("variant", "state", "buffers", "flops"),
    [("paper", 8 * 64, 3 * 3 * 64, 8 * 64), ("fla", 4 * 64, 3 * 2 * 64, 2 * 64), ("expand2", 8 * 64, 3 * 4 * 64, 4 * 64)],
)
def test_state_and_flops_by_formula(variant: str, state: int, buffers: int, flops: int) -> None:
    mixer = build(variant, 64, conv=4)
    assert mixer.state_size(100) == state + 4 * buffers
    assert mixer.op_flops(100) == flops
