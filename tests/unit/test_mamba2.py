import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from baselines.mamba2 import Mamba2
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, MixerSpec


def build(d_model: int = 6, conv: int = 0, forget_bias: float = 0.0, backend: str = "reference", **settings: Any) -> Mamba2:
    torch.manual_seed(0)
    return Mamba2(MixerSpec(d_model, conv=conv, forget_bias=forget_bias, backend=backend, settings=settings))


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def equations(mixer: Mamba2, x_TD: Tensor, conv: int, H: int, P: int) -> Tensor:
    """The block's mixer written from the paper, one token, one head and one channel after the other."""
    E, N = H * P, mixer.d_state
    W_x, W_B, W_C, W_dt = mixer.in_proj.weight.split([E, N, N, H])
    S, past, outputs = torch.zeros(H, P, N).double(), [torch.zeros(E + 2 * N).double()] * max(conv - 1, 0), []
    for x_D in x_TD:
        stream = torch.cat([W_x @ x_D, W_B @ x_D, W_C @ x_D])
        if conv:
            window = [*past, stream]
            past, weight = window[1:], mixer.conv_xBC.conv.weight[:, 0]
            stream = sum((weight[:, w] * window[w] for w in range(conv)), torch.zeros(E + 2 * N)) + mixer.conv_xBC.conv.bias
        x, B, C = silu(stream).split([E, N, N])
        dt, y = (1 + (W_dt @ x_D + mixer.dt_bias).exp()).log(), []
        for h in range(H):
            decay = torch.exp(-dt[h] * mixer.A_log[h].exp())
            for p in range(P):
                S[h, p] = decay * S[h, p] + dt[h] * x[h * P + p] * B
                y.append(S[h, p] @ C + mixer.D[h] * x[h * P + p])
        gated = torch.stack(y) * silu(mixer.gate_proj.weight @ x_D)
        outputs.append(mixer.out_proj.weight @ (gated / ((gated**2).mean() + 1e-5).sqrt() * mixer.norm.weight))
    return torch.stack(outputs)


SETTINGS = [({"d_state": 3}, 1, 12), ({"d_state": 2, "head_dim": 4}, 3, 4), ({"d_state": 5, "expand": 3, "head_dim": 2}, 9, 2)]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize(("settings", "H", "P"), SETTINGS)
def test_layer_equals_the_equations(backend: str, conv: int, settings: dict[str, int], H: int, P: int) -> None:
    mixer, x = build(conv=conv, backend=backend, **settings).double(), torch.randn(2, 6, 6).double()
    nn.init.normal_(mixer.D)
    nn.init.normal_(mixer.norm.weight)
    mixer.dt_bias += 2  # steps large enough for the decay to matter
    want = torch.stack([equations(mixer, x_TD, conv, H, P) for x_TD in x])
    torch.testing.assert_close(mixer(x), want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("settings", [s for s, _, _ in SETTINGS])
def test_decoding_equals_the_forward_pass(conv: int, settings: dict[str, int]) -> None:
    mixer, x = build(conv=conv, **settings).double(), torch.randn(2, 6, 6).double()
    state, outputs = None, []
    for x_BD in x.unbind(1):
        y_BD, state = mixer.step(x_BD, state)
        outputs.append(y_BD)
    torch.testing.assert_close(torch.stack(outputs, 1), mixer(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("d", "H"), [(64, 2), (128, 4), (16, 1)])
@pytest.mark.parametrize("conv", [0, 4])
def test_parameter_count(d: int, H: int, conv: int) -> None:
    E, N = 2 * d, 128
    want = d * (2 * E + 2 * N + H) + 3 * H + E + E * d + (conv + 1) * (E + 2 * N) * bool(conv)
    assert sum(p.numel() for p in build(d, conv).parameters()) == want


def test_published_initialisation() -> None:
    mixer = build(64, head_dim=1, expand=64)
    A = mixer.A_log.exp()
    assert 1 <= A.min() < 1.05
    assert 15.95 < A.max() <= 16
    assert A.mean().item() == pytest.approx(8.5, abs=0.3)  # uniform, 4,096 draws
    assert (mixer.D == 1).all()
    dt = softplus(mixer.dt_bias)
    assert dt.min().item() == pytest.approx(1e-3, rel=0.01)
    assert dt.max().item() == pytest.approx(1e-1, rel=0.01)
    share_below_the_middle = (dt.log() < math.log(1e-2)).float().mean().item()
    assert share_below_the_middle == pytest.approx(0.5, abs=0.03)  # log-uniform
    assert Mamba2.no_weight_decay == ("A_log", "D", "dt_bias")


def test_default_head_is_64_channels_or_all() -> None:
    assert [(m.heads, m.head_v) for m in map(build, (16, 32, 64, 96))] == [(1, 32), (1, 64), (2, 64), (3, 64)]


def test_forget_bias_shrinks_the_step_and_with_it_the_decay_rate() -> None:
    x = torch.randn(4, 16, 64)
    plain, slow = (build(64, forget_bias=b, head_dim=4).project(x, Context()).log_f_BTH for b in (0.0, 3.0))
    assert (slow / plain).median().item() == pytest.approx(math.exp(-3), rel=0.05)
    difference = build(64).dt_bias - build(64, forget_bias=3.0).dt_bias
    torch.testing.assert_close(difference, torch.full_like(difference, 3.0))


def test_forget_bias_is_applied_once() -> None:
    mixer = build(64, forget_bias=3.0)
    before = mixer.dt_bias.clone()
    mixer.init_forget_bias()
    assert torch.equal(mixer.dt_bias, before)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"d_state": 0}, "d_state=0 and expand=2 must be at least 1"),
        ({"expand": 0}, "d_state=128 and expand=0 must be at least 1"),
        (
            {"head_dim": 48},
            r"expand \* d_model=128 must be a multiple of head_dim=48 \(heads = .* / head_dim\); nearest legal head_dim: 32 or 64",
        ),
        ({"head_dim": 0}, "nearest legal head_dim: 1"),
        ({"expand": 3, "head_dim": 128}, r"expand \* d_model=192 must be a multiple of head_dim=128 .*: 96 or 192"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(64, **settings)


def test_a_width_without_heads_of_64_names_those_it_has() -> None:
    with pytest.raises(ConfigError, match=r"expand \* d_model=200 must be a multiple of head_dim=64 .*; nearest legal head_dim: 50 or 100"):
        build(100)


def test_state_and_flops_by_formula() -> None:
    mixer = build(64, conv=4)  # 2 heads of 128 states and 64 channels
    assert mixer.state_size(100) == 4 * (2 * 128 * 64 + 3 * (128 + 2 * 128))
    assert mixer.state_size(100, itemsize=2) == 4 * 2 * 128 * 64 + 2 * 3 * (128 + 2 * 128)
    assert mixer.op_flops(100) == 2 * (5 * 128 * 64 + 64 + 2)
