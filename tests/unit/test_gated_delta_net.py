import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from baselines.gated_delta_net import GatedDeltaNet
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, MixerSpec


def build(d_model: int = 16, conv: int = 0, forget_bias: float = 0.0, **settings: Any) -> GatedDeltaNet:
    torch.manual_seed(0)
    return GatedDeltaNet(MixerSpec(d_model, conv=conv, forget_bias=forget_bias, backend="reference", settings=settings))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def equations(mixer: GatedDeltaNet, x_TD: Tensor, H: int, K: int, V: int) -> Tensor:
    """The layer written from the paper, one token and one head after the other, with the state update as one matrix equation."""
    W_q, W_k, W_v = mixer.in_proj.weight.split([H * K, H * K, H * V])
    S, outputs = [torch.zeros(K, V).double() for _ in range(H)], []
    for x_D in x_TD:
        q, k, v = (y * sigmoid(y) for y in (W_q @ x_D, W_k @ x_D, W_v @ x_D))
        beta = sigmoid(mixer.beta_proj.weight @ x_D)
        alpha = (-mixer.A_log.exp() * (1 + (mixer.dt_proj.weight @ x_D + mixer.dt_proj.bias).exp()).log()).exp()
        heads = []
        for h in range(H):
            q_K, k_K, v_V = q[h * K : (h + 1) * K], k[h * K : (h + 1) * K], v[h * V : (h + 1) * V]
            q_K, k_K = q_K / (q_K @ q_K + 1e-6).sqrt(), k_K / (k_K @ k_K + 1e-6).sqrt()
            transition = alpha[h] * (torch.eye(K).double() - beta[h] * torch.outer(k_K, k_K))
            S[h] = transition @ S[h] + beta[h] * torch.outer(k_K, v_V)
            o = S[h].T @ q_K / math.sqrt(K)
            heads.append(o / ((o**2).mean() + 1e-5).sqrt() * mixer.norm.weight)
        gate = mixer.gate_proj.weight @ x_D
        outputs.append(mixer.out_proj.weight @ (torch.cat(heads) * gate * sigmoid(gate)))
    return torch.stack(outputs)


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "H", "K", "V"),
    [({}, 1, 12, 24), ({"num_heads": 4}, 4, 3, 6), ({"num_heads": 2, "expand_k": 1.0, "expand_v": 2.0}, 2, 8, 16)],
)
def test_layer_equals_the_equations(settings: dict[str, Any], H: int, K: int, V: int) -> None:
    mixer, x = build(**settings).double(), torch.randn(2, 6, 16).double()
    torch.nn.init.normal_(mixer.norm.weight)
    mixer.dt_proj.bias += 2  # steps large enough for the decay to matter
    want = torch.stack([equations(mixer, x_TD, H, K, V) for x_TD in x])
    torch.testing.assert_close(mixer(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("d", "heads"), [(16, 1), (64, 1), (256, 1), (512, 2), (768, 3), (1024, 3), (2048, 6)])
def test_heads_have_at_most_256_key_channels(d: int, heads: int) -> None:
    with torch.device("meta"):
        assert build(d).heads == heads


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("conv", [0, 4])
def test_parameter_count(d: int, conv: int) -> None:
    want = 6 * d * d + 2 * 2 * d + 2 + 2 + 3 * d // 4 + conv * 3 * d  # six matrices, both gates, dt bias and A, norm, convolutions
    assert sum(p.numel() for p in build(d, conv, num_heads=2).parameters()) == want


def test_published_initialisation() -> None:
    mixer = build(64, expand_k=64.0, expand_v=64.0, num_heads=4096)
    A, dt = mixer.A_log.exp(), softplus(mixer.dt_proj.bias)
    assert 0 < A.min() < 0.1
    assert A.mean().item() == pytest.approx(8, abs=0.3)
    assert 15.9 < A.max() <= 16
    assert dt.min().item() == pytest.approx(1e-3, rel=0.01)
    assert dt.max().item() == pytest.approx(1e-1, rel=0.01)
    assert (dt.log() < math.log(1e-2)).float().mean().item() == pytest.approx(0.5, abs=0.03)  # log-uniform, 4,096 draws


def test_forget_bias_shrinks_the_rate_of_decay() -> None:
    x = torch.randn(4, 16, 64)
    plain, slow = (build(64, forget_bias=b).project(x, Context()).log_f_BTH for b in (0.0, 3.0))
    assert plain is not None
    assert slow is not None
    assert (slow / plain).median().item() == pytest.approx(math.exp(-3), rel=0.05)
    difference = build(64).dt_proj.bias - build(64, forget_bias=3.0).dt_proj.bias
    torch.testing.assert_close(difference, torch.full_like(difference, 3.0))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_heads": 7}, r"d_model \* expand_k=48 must be a multiple of num_heads=7 .*; nearest legal num_heads: 6 or 8"),
        ({"num_heads": 2, "expand_v": 1.0 / 64}, r"d_model \* expand_v=1 must be a multiple of num_heads=2"),
        ({"expand_k": 0.3}, r"d_model \* expand_k = 64 \* 0.3 = 19.2 must be a whole number .* nearest legal expand_k: 0.296875 or 0.3125"),
        ({"expand_v": 0.0}, r"d_model \* expand_v = 64 \* 0 = 0 must be a whole number"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(64, **settings)


def test_state_and_flops_by_formula() -> None:
    mixer = build(64, conv=4, num_heads=2)  # 2 heads of 24 keys and 48 values
    assert mixer.state_size(100) == 4 * (2 * 24 * 48 + 3 * (48 + 48 + 96))
    assert mixer.op_flops(100) == 2 * (7 * 24 * 48 + 2 * 48)
