import math
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.gla import GLA
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, MixerSpec


def build(d_model: int = 16, conv: int = 0, forget_bias: float = 0.0, **settings: Any) -> GLA:
    torch.manual_seed(0)
    return GLA(MixerSpec(d_model, conv=conv, forget_bias=forget_bias, backend="reference", settings=settings))


def equations(mixer: GLA, x_TD: Tensor, H: int, K: int, V: int, normalizer: int) -> Tensor:
    """The layer written from the paper, one token and one head after the other."""
    W_q, W_k, W_v, W_1 = mixer.in_proj.weight.split([H * K, H * K, H * V, mixer.gate_low_rank_dim])
    S, outputs = [torch.zeros(K, V).double() for _ in range(H)], []
    for x_D in x_TD:
        q, k, v = W_q @ x_D, W_k @ x_D, W_v @ x_D
        f = (1 / (1 + (-(mixer.forget_proj.weight @ (W_1 @ x_D) + mixer.forget_proj.bias)).exp())) ** (1 / normalizer)
        heads = []
        for h in range(H):
            keys, values = slice(h * K, (h + 1) * K), slice(h * V, (h + 1) * V)
            S[h] = torch.diag(f[keys]) @ S[h] + torch.outer(k[keys], v[values])
            o = S[h].T @ q[keys] / math.sqrt(K)
            heads.append(o / ((o**2).mean() + 1e-5).sqrt() * mixer.norm.weight)
        gate = mixer.gate_proj.weight @ x_D
        outputs.append(mixer.out_proj.weight @ (torch.cat(heads) * gate / (1 + (-gate).exp())))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    ("settings", "K", "V"),
    [
        ({}, 2, 4),
        ({"num_heads": 2, "expand_k": 1.0, "expand_v": 2.0, "gate_low_rank_dim": 3, "gate_logit_normalizer": 4}, 8, 16),
    ],
)
def test_layer_equals_the_equations(settings: dict[str, Any], K: int, V: int) -> None:
    mixer, x = build(**settings).double(), torch.randn(2, 6, 16).double()
    torch.nn.init.normal_(mixer.norm.weight)
    want = torch.stack([equations(mixer, x_TD, mixer.num_heads, K, V, mixer.gate_logit_normalizer) for x_TD in x])
    torch.testing.assert_close(mixer(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("conv", [0, 4])
def test_parameter_count(d: int, conv: int) -> None:
    queries_keys_values_gate_output = d * (d // 2) * 2 + 3 * d * d
    low_rank_gate = 16 * d + 16 * (d // 2) + d // 2
    want = queries_keys_values_gate_output + low_rank_gate + d // 4 + conv * 2 * d
    assert sum(p.numel() for p in build(d, conv).parameters()) == want


@pytest.mark.parametrize("forget_bias", [-2.0, 0.0, 3.0])
def test_forget_bias_moves_the_median_gate_to_the_root_of_its_sigmoid(forget_bias: float) -> None:
    log_f = build(64, forget_bias=forget_bias).project(torch.randn(8, 32, 64), Context()).log_f_BTHK
    assert (16 * log_f).exp().median().item() == pytest.approx(torch.tensor(forget_bias).sigmoid().item(), abs=0.03)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"num_heads": 7},
            r"d_model \* expand_k=32 must be a multiple of num_heads=7 \(head dimension = .*\); nearest legal num_heads: 4 or 8",
        ),
        ({"expand_k": 0.3}, r"d_model \* expand_k = 64 \* 0.3 = 19.2 must be a whole number .* nearest legal expand_k: 0.296875 or 0.3125"),
        ({"expand_v": 0.0}, r"d_model \* expand_v = 64 \* 0 = 0 must be a whole number"),
        ({"expand_v": -1.0}, r"d_model \* expand_v = 64 \* -1 = -64 must be a whole number"),
        ({"gate_low_rank_dim": 0}, "gate_low_rank_dim=0"),
        ({"gate_logit_normalizer": 0}, "gate_logit_normalizer=0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(64, **settings)


def test_state_and_flops_by_formula() -> None:
    mixer = build(64, conv=4)  # 4 heads of 8 keys and 16 values
    assert mixer.state_size(100) == 4 * (4 * 8 * 16 + 3 * (32 + 32 + 64))
    assert mixer.op_flops(100) == 5 * 8 * 16 * 4
