import math
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.gsa import GSA
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, MixerSpec


def build(d_model: int = 16, conv: int = 0, forget_bias: float = 0.0, **settings: Any) -> GSA:
    torch.manual_seed(0)
    return GSA(MixerSpec(d_model, conv=conv, forget_bias=forget_bias, backend="reference", settings=settings))


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def equations(mixer: GSA, x_TD: Tensor, H: int, M: int, normalizer: int) -> Tensor:
    """The layer written from the paper, one token, one head and one slot after the other."""
    D = x_TD.shape[1]
    W_q, W_k, W_v = mixer.in_proj.weight.split(D)
    slots_k, slots_v = torch.zeros(2, H, M, D // H).double().unbind(0)
    outputs = []
    for x_D in x_TD:
        q, k, v = (silu(W @ x_D).split(D // H) for W in (W_q, W_k, W_v))
        logit = mixer.forget_proj.weight @ x_D + (0 if mixer.forget_proj.bias is None else mixer.forget_proj.bias)
        f = ((1 + (-logit).exp()) ** (-1 / normalizer)).reshape(H, M)
        heads = []
        for h in range(H):
            for m in range(M):
                slots_k[h, m] = f[h, m] * slots_k[h, m] + (1 - f[h, m]) * k[h]
                slots_v[h, m] = f[h, m] * slots_v[h, m] + (1 - f[h, m]) * v[h]
            weights = (slots_k[h] @ q[h]).exp()
            heads.append(sum(w * slot for w, slot in zip(weights, slots_v[h], strict=True)) / weights.sum())
        o = silu(torch.cat(heads))
        outputs.append(mixer.out_proj.weight @ (o / ((o**2).mean() + 1e-5).sqrt() * mixer.norm.weight))
    return torch.stack(outputs)


@torch.no_grad()
@pytest.mark.parametrize("forget_bias", [0.0, 1.5])
@pytest.mark.parametrize(
    ("settings", "H", "M", "normalizer"),
    [({"num_slots": 6}, 4, 6, 8), ({"num_heads": 2, "num_slots": 3, "gate_logit_normalizer": 2}, 2, 3, 2)],
)
def test_layer_equals_the_equations(settings: dict[str, Any], H: int, M: int, normalizer: int, forget_bias: float) -> None:
    mixer, x = build(forget_bias=forget_bias, **settings).double(), 3 * torch.randn(2, 6, 16).double()
    torch.nn.init.normal_(mixer.norm.weight)
    mixer.in_proj.weight *= 3  # scores large enough for the softmax to prefer a slot
    want = torch.stack([equations(mixer, x_TD, H, M, normalizer) for x_TD in x])
    torch.testing.assert_close(mixer(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("forget_bias", [0.0, 1.0])
def test_parameter_count(d: int, conv: int, forget_bias: float) -> None:
    slots = 4 * 64
    want = 4 * d * d + slots * d + slots * bool(forget_bias) + d + conv * 3 * d  # four matrices, gate, its bias, norm, convolutions
    assert sum(p.numel() for p in build(d, conv, forget_bias).parameters()) == want


@pytest.mark.parametrize("forget_bias", [-2.0, 0.0, 3.0])
def test_forget_bias_moves_the_median_gate_to_the_root_of_its_sigmoid(forget_bias: float) -> None:
    log_f = build(64, forget_bias=forget_bias).project(torch.randn(8, 32, 64), Context()).log_f_BTHM
    assert (8 * log_f).exp().median().item() == pytest.approx(1 / (1 + math.exp(-forget_bias)), abs=0.03)


def test_a_slot_takes_what_it_forgets_also_where_that_is_little() -> None:
    inputs = build(64, forget_bias=30.0).project(torch.randn(2, 8, 64), Context())
    assert inputs.s_BTHM.dtype == torch.float32
    assert inputs.s_BTHM.min() > 0  # 1 - exp(log f) would be 0
    torch.testing.assert_close(inputs.s_BTHM, -inputs.log_f_BTHM)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_heads": 7}, r"d_model=64 must be a multiple of num_heads=7 \(head dimension = .*\); nearest legal num_heads: 4 or 8"),
        ({"num_slots": 0}, "num_slots=0 and gate_logit_normalizer=8 must be at least 1"),
        ({"gate_logit_normalizer": 0}, "gate_logit_normalizer=0 must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(64, **settings)


def test_state_and_flops_by_formula() -> None:
    mixer = build(64, conv=4, num_slots=12)  # 4 heads of 16 keys and 16 values
    assert mixer.state_size(100) == 4 * (4 * 12 * (16 + 16) + 3 * 3 * 64)
    assert mixer.op_flops(100) == 5 * 4 * 12 * (16 + 16)
    assert build(64).state_size(100) == 4 * 4 * 64 * (16 + 16)
