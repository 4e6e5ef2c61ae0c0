import math
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.linear_attention import LinearAttention, elu_plus_one
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, MixerSpec

D, T = 8, 6


def build(d_model: int = D, conv: int = 0, backend: str = "reference", **settings: Any) -> LinearAttention:
    torch.manual_seed(0)
    return LinearAttention(MixerSpec(d_model, conv=conv, backend=backend, settings=settings))


def phi(x_K: Tensor, feature_map: str) -> Tensor:
    def one(x: float) -> float:
        return {"elu": x + 1 if x > 0 else math.exp(x), "relu": max(x, 0.0), "identity": x}[feature_map]

    return torch.tensor([one(x) for x in x_K.tolist()], dtype=torch.float64)


def equations(mixer: LinearAttention, x_TD: Tensor) -> Tensor:
    """The layer written from the paper with its own normaliser z, one token and one head after the other."""
    H, K = mixer.num_heads, x_TD.shape[1] // mixer.num_heads
    zeros = torch.zeros(x_TD.shape[1]).double()
    W_q, W_k, W_v = mixer.in_proj.weight.chunk(3)
    b_q, b_k, b_v = mixer.in_proj.bias.chunk(3) if mixer.bias else (zeros, zeros, zeros)
    S, z, outputs = [torch.zeros(K, K).double() for _ in range(H)], [torch.zeros(K).double() for _ in range(H)], []
    for x_D in x_TD:
        heads = []
        for h in range(H):
            part = slice(h * K, (h + 1) * K)
            q = phi((W_q @ x_D + b_q)[part], mixer.feature_map)
            k = phi((W_k @ x_D + b_k)[part], mixer.feature_map)
            S[h] = S[h] + torch.outer(k, (W_v @ x_D + b_v)[part])
            z[h] = z[h] + k
            heads.append(S[h].T @ q / (q @ z[h] + 1e-6) if mixer.normalize else S[h].T @ q)
        outputs.append(mixer.out_proj.weight @ torch.cat(heads) + (mixer.out_proj.bias if mixer.bias else zeros))
    return torch.stack(outputs)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("feature_map", "normalize"), [("elu", True), ("elu", False), ("relu", True), ("relu", False), ("identity", False)]
)
def test_layer_equals_the_equations(backend: str, heads: int, bias: bool, feature_map: str, normalize: bool) -> None:
    mixer = build(backend=backend, num_heads=heads, bias=bias, feature_map=feature_map, normalize=normalize).double()
    x = 2 * torch.randn(2, T, D).double()
    want = torch.stack([equations(mixer, x_TD) for x_TD in x])
    torch.testing.assert_close(mixer(x), want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("settings", [{}, {"num_heads": 2, "feature_map": "identity", "normalize": False}])
def test_decoding_equals_the_forward_pass(conv: int, settings: dict[str, Any]) -> None:
    mixer, x = build(conv=conv, **settings).double(), torch.randn(2, T, D).double()
    state, outputs = None, []
    for x_BD in x.unbind(1):
        y_BD, state = mixer.step(x_BD, state)
        outputs.append(y_BD)
    torch.testing.assert_close(torch.stack(outputs, 1), mixer(x), rtol=1e-9, atol=1e-9)


def test_an_output_is_an_average_of_the_values_seen() -> None:
    mixer = build().double()
    torch.nn.init.eye_(mixer.out_proj.weight)
    torch.nn.init.zeros_(mixer.out_proj.bias)
    x = torch.randn(3, 20, D).double()
    v = mixer.in_proj(x)[..., 2 * D :]
    y = mixer(x)
    assert (y <= v.cummax(1).values + 1e-5).all()
    assert (y >= v.cummin(1).values - 1e-5).all()
    torch.testing.assert_close(y[:, 0], v[:, 0], rtol=1e-5, atol=1e-5)


def test_elu_plus_one_stays_positive_and_exact_in_bfloat16() -> None:
    x = torch.linspace(-20, 20, 401, dtype=torch.float64, requires_grad=True)
    y = elu_plus_one(x)
    torch.testing.assert_close(y, torch.nn.functional.elu(x) + 1, rtol=1e-6, atol=1e-15)
    assert torch.autograd.gradcheck(elu_plus_one, x)
    coarse = x.detach().bfloat16()
    found = elu_plus_one(coarse)
    assert (found > 0).all()
    torch.testing.assert_close(found.double(), elu_plus_one(coarse.double()), rtol=2**-8, atol=0)


@pytest.mark.parametrize("d", [64, 128])
def test_parameter_count(d: int) -> None:
    assert sum(p.numel() for p in build(d).parameters()) == 4 * d * d + 4 * d
    assert sum(p.numel() for p in build(d, conv=4, bias=False, num_heads=4).parameters()) == 4 * d * d + 3 * 4 * d


def test_nothing_is_forgotten() -> None:
    log_f = build().project(torch.randn(2, T, D), Context()).log_f_BTH
    assert torch.equal(log_f, torch.zeros(2, T, 1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_heads": 3}, r"d_model=8 must be a multiple of num_heads=3 \(head dimension = .*\); nearest legal num_heads: 2 or 4"),
        ({"num_heads": 0}, "nearest legal num_heads: 1"),
        ({"feature_map": "elo"}, r"Unknown feature_map 'elo'. Did you mean 'elu'\? Available: elu, identity, relu."),
        ({"feature_map": "identity"}, "feature_map=identity has no positive normaliser: use normalize=false, or feature_map=elu or relu"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**settings)


def test_state_and_flops_by_formula() -> None:
    mixer = build(64, conv=4, num_heads=2)
    assert mixer.state_size(100) == 4 * (2 * 32 * 33 + 3 * 3 * 64)
    assert mixer.state_size(100, itemsize=2) == 4 * 2 * 32 * 33 + 2 * 3 * 3 * 64
    assert mixer.op_flops(100) == 4 * 32 * 33 * 2
    assert build(64, normalize=False).state_size(100) == 4 * 64 * 64
