import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from baselines.mamba import Mamba
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, MixerSpec


def build(d_model: int = 6, conv: int = 0, forget_bias: float = 0.0, **settings: Any) -> Mamba:
    torch.manual_seed(0)
    return Mamba(MixerSpec(d_model, conv=conv, forget_bias=forget_bias, backend="reference", settings=settings))


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def equations(mixer: Mamba, x_TD: Tensor, conv: int) -> Tensor:
    """The block's mixer written from the paper, one token, one channel and one state after the other."""
    E, N, R = mixer.inner, mixer.d_state, mixer.rank
    h, past, outputs = torch.zeros(E, N).double(), [torch.zeros(E).double()] * max(conv - 1, 0), []
    for x_D in x_TD:
        u = mixer.in_proj.weight @ x_D
        if conv:
            window = [*past, u]
            past = window[1:]
            u = sum((mixer.conv_x.conv.weight[:, 0, w] * window[w] for w in range(conv)), torch.zeros(E)) + mixer.conv_x.conv.bias
        u = silu(u)
        r, B, C = (mixer.x_proj.weight @ u).split([R, N, N])
        dt = (1 + (mixer.dt_proj.weight @ r + mixer.dt_proj.bias).exp()).log()
        y = []
        for e in range(E):
            for n in range(N):
                h[e, n] = torch.exp(-dt[e] * mixer.A_log[e, n].exp()) * h[e, n] + dt[e] * B[n] * u[e]
            y.append((h[e] * C).sum() + mixer.D[e] * u[e])
        outputs.append(mixer.out_proj.weight @ (torch.stack(y) * silu(mixer.gate_proj.weight @ x_D)))
    return torch.stack(outputs)


@torch.no_grad()
@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("settings", [{"d_state": 3}, {"d_state": 2, "expand": 3, "dt_rank": 2}])
def test_layer_equals_the_equations(conv: int, settings: dict[str, int]) -> None:
    mixer, x = build(conv=conv, **settings).double(), torch.randn(2, 6, 6).double()
    torch.nn.init.normal_(mixer.D)
    mixer.dt_proj.bias += 3  # steps large enough for the decay to matter
    want = torch.stack([equations(mixer, x_TD, conv) for x_TD in x])
    torch.testing.assert_close(mixer(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("d", "rank"), [(64, 4), (100, 7)])
@pytest.mark.parametrize("conv", [0, 4])
def test_parameter_count(d: int, rank: int, conv: int) -> None:
    E, N = 2 * d, 16
    want = 3 * d * E + E * (rank + 2 * N) + rank * E + E + E * N + E + (conv + 1) * E * bool(conv)
    assert sum(p.numel() for p in build(d, conv).parameters()) == want


def test_published_initialisation() -> None:
    mixer = build(64, expand=64)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).repeat(4096, 1))
    assert (mixer.D == 1).all()
    dt = softplus(mixer.dt_proj.bias)
    assert dt.min().item() == pytest.approx(1e-3, rel=0.01)
    assert dt.max().item() == pytest.approx(1e-1, rel=0.01)
    share_below_the_middle = (dt.log() < math.log(1e-2)).float().mean().item()
    assert share_below_the_middle == pytest.approx(0.5, abs=0.03)  # log-uniform, 4,096 draws
    bound = 4**-0.5
    assert 0.95 * bound < mixer.dt_proj.weight.abs().max() <= bound
    assert Mamba.no_weight_decay == ("A_log", "D")


def test_forget_bias_shrinks_the_step_and_with_it_the_decay_rate() -> None:
    x = torch.randn(4, 16, 64)
    plain, slow = (build(64, forget_bias=b).project(x, Context()).dt_BTD for b in (0.0, 3.0))
    assert (slow / plain).median().item() == pytest.approx(math.exp(-3), rel=0.05)
    difference = build(64).dt_proj.bias - build(64, forget_bias=3.0).dt_proj.bias
    torch.testing.assert_close(difference, torch.full_like(difference, 3.0))


@pytest.mark.parametrize("settings", [{"d_state": 0}, {"expand": 0}, {"dt_rank": 0}])
def test_empty_sizes_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"must be at least 1"):
        build(**settings)


def test_state_and_flops_by_formula() -> None:
    mixer = build(64, conv=4)
    assert mixer.state_size(100) == 4 * (128 * 16 + 3 * 128)
    assert mixer.op_flops(100) == 128 * (7 * 16 + 1)
