import math
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.attention import Attention, rope_table, rotate
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, MixerSpec
from hgrn2_bench.ops import families
from hgrn2_bench.ops.families import SoftmaxInputs

D, T = 8, 6


def build(d_model: int = D, positions: str = "none", conv: int = 0, **settings: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(MixerSpec(d_model, positions=positions, conv=conv, backend="reference", settings=settings))


def rotated(x_K: Tensor, t: int) -> Tensor:
    half = len(x_K) // 2
    y = torch.empty_like(x_K)
    for j in range(half):
        angle = t * 10_000 ** (-2 * j / len(x_K))
        y[j] = x_K[j] * math.cos(angle) - x_K[j + half] * math.sin(angle)
        y[j + half] = x_K[j] * math.sin(angle) + x_K[j + half] * math.cos(angle)
    return y


def equations(mixer: Attention, x_TD: Tensor, heads: int, rope: bool, causal: bool) -> Tensor:
    """Attention written out for every query, head and visible key."""
    K, width = D // heads, len(x_TD[0])
    bias = mixer.in_proj.bias if mixer.in_proj.bias is not None else torch.zeros(3 * width).double()
    qkv = [(mixer.in_proj.weight @ x_D + bias).split(width) for x_D in x_TD]
    outputs = []
    for t in range(len(x_TD)):
        parts = []
        for h in range(heads):
            part = slice(h * K, (h + 1) * K)
            visible = range(t + 1) if causal else range(len(x_TD))
            q = rotated(qkv[t][0][part], t) if rope else qkv[t][0][part]
            keys = [rotated(qkv[s][1][part], s) if rope else qkv[s][1][part] for s in visible]
            weights = torch.stack([(q @ k / math.sqrt(K)).exp() for k in keys])
            parts.append(sum((w * qkv[s][2][part] for w, s in zip(weights, visible, strict=True)), torch.zeros(K)) / weights.sum())
        y = mixer.out_proj.weight @ torch.cat(parts)
        outputs.append(y if mixer.out_proj.bias is None else y + mixer.out_proj.bias)
    return torch.stack(outputs)


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_equals_the_equations(heads: int, rope: bool, causal: bool, bias: bool) -> None:
    mixer = build(positions="rope" if rope else "none", num_heads=heads, causal=causal, bias=bias).double()
    x = 2 * torch.randn(2, T, D).double()
    want = torch.stack([equations(mixer, x_TD, heads, rope, causal) for x_TD in x])
    torch.testing.assert_close(mixer(x), want, rtol=1e-9, atol=1e-9)


def test_rotation_depends_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(t: int, s: int) -> Tensor:
        return (rotate(q, rope_table(t, 1, q)) * rotate(k, rope_table(s, 1, k))).sum()

    near, far = (score(t + 3, t) for t in (0, 500))
    torch.testing.assert_close(near, far)
    assert not torch.allclose(near, score(4, 0))


def test_other_positions_leave_queries_alone() -> None:
    x = torch.randn(1, T, D, generator=torch.Generator().manual_seed(1))
    assert torch.equal(build(positions="learned")(x), build()(x))
    assert not torch.allclose(build(positions="rope")(x), build()(x), atol=1e-4)


@pytest.mark.parametrize("d", [64, 128])
def test_parameter_count(d: int) -> None:
    assert sum(p.numel() for p in build(d).parameters()) == 4 * d * d + 4 * d
    assert sum(p.numel() for p in build(d, bias=False, conv=4).parameters()) == 4 * d * d + 3 * 4 * d


def test_attention_without_mask_cannot_decode() -> None:
    with pytest.raises(ConfigError, match="causal=False cannot decode"):
        build(causal=False).step(torch.randn(1, D), None)
    with pytest.raises(ConfigError, match="causal=False cannot decode"):
        build(causal=False)(torch.randn(1, T, D), Context(return_state=True))


def test_odd_head_dimension_refuses_rotation() -> None:
    with pytest.raises(ConfigError, match=r"positions=rope needs an even head dimension; d_model=6 / num_heads=2 = 3"):
        build(6, positions="rope", num_heads=2)
    with pytest.raises(ConfigError, match=r"d_model=8 must be a multiple of num_heads=3 .*; nearest legal num_heads: 2 or 4"):
        build(num_heads=3)


def test_decoding_after_padded_prefill_is_refused() -> None:
    mixer, x = build(), torch.randn(2, T, D)
    prefill = Context(return_state=True, lengths_B=torch.tensor([T, 2]))
    mixer(x, prefill)
    with pytest.raises(ValueError, match="lengths"):
        mixer(x, Context(state=prefill.next_state, lengths_B=torch.tensor([T, 2])))


def test_cache_and_flops_by_formula() -> None:
    mixer = build(64, conv=4, num_heads=2)
    assert mixer.state_size(10) == 4 * (2 * 64 * 10 + 3 * 3 * 64)
    assert mixer.state_size(10, itemsize=2) == 2 * (2 * 64 * 10 + 3 * 3 * 64)
    assert mixer.op_flops(9) == 4 * 64 * 5
    assert build(64, causal=False).op_flops(9) == 4 * 64 * 9


# dropout


def weights(backend: str, dropout: float, causal: bool, T: int = 48) -> Tensor:
    """The attention weights (B H, T, T) after dropout: with unit vectors as values they are the output."""
    q_BTHK, k_BTHK = torch.randn(2, 4, T, 2, 8, generator=torch.Generator().manual_seed(0))
    v_BTHV = torch.eye(T)[None, :, None].expand(4, T, 2, T)
    torch.manual_seed(1)
    o_BTHV, _ = families.run(SoftmaxInputs(q_BTHK, k_BTHK, v_BTHV, scale=0.3, causal=causal, dropout=dropout), backend)
    return o_BTHV.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_dropout_takes_its_share_of_the_weights_and_scales_the_rest(backend: str, p: float, causal: bool) -> None:
    plain, dropped = weights(backend, 0.0, causal), weights(backend, p, causal)
    visible = plain > 0
    share = (dropped[visible] == 0).double().mean().item()
    assert share == pytest.approx(p, abs=4 * (p * (1 - p) / visible.sum().item()) ** 0.5)
    kept = dropped > 0
    torch.testing.assert_close(dropped[kept], plain[kept] / (1 - p), rtol=1e-4, atol=1e-7)
    assert not (dropped[~visible] != 0).any()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_dropout_acts_in_training_only(backend: str) -> None:
    torch.manual_seed(0)
    mixer = Attention(MixerSpec(D, backend=backend, settings={"dropout": 0.5}))
    plain = Attention(MixerSpec(D, backend=backend))
    plain.load_state_dict(mixer.state_dict())
    x = torch.randn(1, T, D)
    assert torch.equal(mixer.eval()(x), plain(x))
    mixer.train()
    one, other = mixer(x), mixer(x)
    assert not torch.allclose(one, other)
    assert not torch.allclose(one, plain(x))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_dropout_leaves_the_mean(backend: str) -> None:
    torch.manual_seed(0)
    mixer = Attention(MixerSpec(D, backend=backend, settings={"dropout": 0.3}))
    x = torch.randn(1, T, D)
    draws = mixer.train()(x.expand(20_000, T, D)) - mixer.eval()(x)
    error = draws.std(0) / len(draws) ** 0.5
    assert (draws.mean(0).abs() < 5 * error + 1e-6).all()
    assert error.max() > 1e-4  # there was something to average


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, math.nan])
def test_dropout_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"attention\.dropout=.* must be at least 0 and less than 1"):
        build(dropout=value)


def test_dropout_is_in_the_row() -> None:
    assert build(dropout=0.25).effective()["dropout"] == 0.25
