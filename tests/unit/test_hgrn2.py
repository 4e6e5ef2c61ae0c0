import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.hgrn2 import HGRN2
from hgrn2_bench.interfaces import Context, MixerSpec

D, K, T = 8, 4, 6
H = D // K
BOUND = torch.stack([torch.zeros(D), torch.linspace(0.1, 0.8, D)]).double()


def build(variant: str, expand_ratio: int | None = K, d_model: int = D, **spec: Any) -> HGRN2:
    torch.manual_seed(0)
    return HGRN2(MixerSpec(d_model, backend="reference", settings={"variant": variant, "expand_ratio": expand_ratio}, **spec))


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def normalised(variant: str, o_D: Tensor, mixer: HGRN2) -> Tensor:
    if variant == "paper":
        centred = o_D - o_D.mean()
        return centred / ((centred**2).mean() + 1e-5).sqrt() * mixer.norm.weight + mixer.norm.bias
    if variant == "paper_lm":
        return o_D / ((o_D**2).mean() + 1e-6).sqrt()
    return o_D / ((o_D**2).mean() + 1e-5).sqrt() * mixer.norm.weight


def paper_equations(variant: str, mixer: HGRN2, x_TD: Tensor, bound_D: Tensor) -> Tensor:
    """The layer written from the paper, one token, one head and one channel after the other."""
    W = mixer.in_proj.weight
    b = mixer.in_proj.bias if variant == "paper" else torch.zeros(3 * D).double()
    input_act = silu if variant == "paper" else lambda x: x
    gate_act = sigmoid if variant == "paper" else silu
    scale = 1 / math.sqrt(K) if variant == "fla" else 1.0
    S = [torch.zeros(K, K).double() for _ in range(H)]
    outputs = []
    for x_D in x_TD:
        i, q = input_act(W[:D] @ x_D + b[:D]), gate_act(W[D : 2 * D] @ x_D + b[D : 2 * D])
        f = bound_D + (1 - bound_D) * sigmoid(W[2 * D :] @ x_D + b[2 * D :])
        heads = []
        for h in range(H):
            part = slice(h * K, (h + 1) * K)
            S[h] = torch.diag(f[part]) @ S[h] + torch.outer(1 - f[part], i[part])
            heads.append(scale * S[h].T @ q[part])
        y_D = mixer.out_proj.weight @ normalised(variant, torch.cat(heads), mixer)
        outputs.append(y_D + mixer.out_proj.bias if variant == "paper" else y_D)
    return torch.stack(outputs)


@pytest.mark.parametrize("variant", ["paper", "paper_lm", "fla"])
@pytest.mark.parametrize("layer", [None, 0, 1])
def test_layer_equals_the_equations(variant: str, layer: int | None) -> None:
    mixer = build(variant, layer=layer or 0).double()
    for parameter in mixer.norm.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, T, D).double()
    shared = {} if layer is None else {"lower_bound": BOUND}
    want = torch.stack([paper_equations(variant, mixer, x_TD, BOUND[layer or 0]) for x_TD in x])
    torch.testing.assert_close(mixer(x, Context(shared=shared)), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    ("variant", "conv", "forget_bias", "count"),
    [
        ("paper", 0, 0.0, lambda d: 4 * d * d + 4 * d + 2 * d),
        ("paper", 0, 3.0, lambda d: 4 * d * d + 4 * d + 2 * d),
        ("paper", 4, 0.0, lambda d: 4 * d * d + 4 * d + 2 * d + 3 * 4 * d),
        ("paper", 4, 3.0, lambda d: 4 * d * d + 4 * d + 2 * d + 3 * 4 * d + d),
        ("paper_lm", 0, 0.0, lambda d: 4 * d * d),
        ("paper_lm", 0, 3.0, lambda d: 4 * d * d + d),
        ("fla", 0, 0.0, lambda d: 4 * d * d + d),
        ("fla", 4, 0.0, lambda d: 4 * d * d + d + 3 * 4 * d),
    ],
)
def test_parameter_count(variant: str, conv: int, forget_bias: float, count: Any, d: int) -> None:
    for expand_ratio in (1, 16, 64):
        mixer = build(variant, expand_ratio, d, conv=conv, forget_bias=forget_bias)
        assert sum(p.numel() for p in mixer.parameters()) == count(d)


def test_two_layers_and_the_published_backbone_have_the_published_mqar_size() -> None:
    """558,464 at d = 64: tied embeddings of 8,192 words, two mixers, four block norms and the final one, with weight and bias."""
    mixers = 2 * sum(p.numel() for p in build("paper", None, 64).parameters())
    assert 8192 * 64 + mixers + 5 * 2 * 64 == 558_464


@pytest.mark.parametrize(("d_model", "heads", "head_dim"), [(64, 1, 64), (128, 1, 128), (256, 2, 128), (512, 4, 128)])
def test_default_expand_ratio_is_that_of_the_mqar_runs(d_model: int, heads: int, head_dim: int) -> None:
    effective = build("paper", None, d_model).effective()
    assert (effective["heads"], effective["head_k"], effective["head_v"]) == (heads, head_dim, head_dim)


def test_consistent_sizes_are_accepted_and_inconsistent_ones_refused() -> None:
    assert build("paper", 128, 512).effective()["heads"] == 4
    with pytest.raises(ConfigError) as caught:
        build("paper", 100, 512)
    assert str(caught.value) == (
        "d_model=512 must be a multiple of expand_ratio=100 (heads = d_model / expand_ratio); nearest legal expand_ratio: 64 or 128"
    )


@pytest.mark.parametrize("variant", ["paper", "paper_lm", "fla"])
@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("forget_bias", [-2.0, 0.0, 3.0])
def test_forget_bias_moves_the_median_gate_to_its_sigmoid(variant: str, conv: int, forget_bias: float) -> None:
    mixer = build(variant, 64, 64, conv=conv, forget_bias=forget_bias)
    f = mixer.project(torch.randn(8, 32, 64), Context()).log_f_BTHK.exp()
    assert f.median().item() == pytest.approx(sigmoid(torch.tensor(forget_bias)).item(), abs=0.03)


def test_gate_stays_above_its_bound_and_key_is_what_it_forgets() -> None:
    mixer = build("paper", layer=1)
    op = mixer.project(50 * torch.randn(4, 16, D), Context(shared={"lower_bound": BOUND.float()}))
    f_BTD = op.log_f_BTHK.exp().flatten(-2)
    assert (f_BTD >= BOUND[1].float() - 1e-6).all()
    assert (f_BTD <= 1 + 1e-6).all()
    torch.testing.assert_close(op.k_BTHK.flatten(-2), 1 - f_BTD, rtol=1e-4, atol=1e-6)


def test_state_and_flops_by_formula() -> None:
    mixer = build("paper", 16, 64, conv=4)
    assert mixer.state_size(1_000) == 4 * (64 * 16 + 3 * 3 * 64)
    assert mixer.state_size(1_000, itemsize=2) == 4 * 64 * 16 + 2 * 3 * 3 * 64
    assert mixer.op_flops(1_000) == 5 * 16 * 16 * 4
