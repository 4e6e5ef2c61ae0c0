import math
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.based import Based, taylor_exp
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, MixerSpec

D, T = 8, 20


def build(d_model: int = D, conv: int = 0, backend: str = "reference", **settings: Any) -> Based:
    torch.manual_seed(0)
    return Based(MixerSpec(d_model, conv=conv, backend=backend, settings=settings))


def convolved(mixer: Based, name: str, stream: Tensor) -> Tensor:
    """The short convolution of a stream (T, width), tap by tap."""
    if not mixer.spec.conv:
        return stream
    weight = getattr(mixer, name).conv.weight[:, 0]
    rows = []
    for t in range(len(stream)):
        rows.append(sum((weight[:, -1 - lag] * stream[t - lag] for lag in range(min(mixer.spec.conv, t + 1))), torch.zeros(()).double()))
    return torch.stack(rows)


def equations(mixer: Based, x_TD: Tensor) -> Tensor:
    """The layer as attention with the weights 1 + s + s^2 / 2 in the place of exp(s), one query and one head after the other."""
    H, d, V = mixer.num_heads, mixer.feature_dim, D // mixer.num_heads
    weights = mixer.in_proj.weight.split([H * d, H * d, D])
    q, k, v = (convolved(mixer, f"conv_{stream}", x_TD @ weight.T) for stream, weight in zip("qkv", weights, strict=True))
    outputs = []
    for t in range(len(x_TD)):
        heads = []
        for h in range(H):
            s = k[: t + 1, h * d : (h + 1) * d] @ q[t, h * d : (h + 1) * d] / math.sqrt(d)
            similarity = 1 + s + s**2 / 2
            heads.append(similarity @ v[: t + 1, h * V : (h + 1) * V] / similarity.sum())
        outputs.append(mixer.out_proj.weight @ torch.cat(heads))
    return torch.stack(outputs)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("conv", [0, 3])
@pytest.mark.parametrize("settings", [{}, {"num_heads": 2, "feature_dim": 3}, {"num_heads": 4, "feature_dim": 1}])
def test_layer_equals_the_equations_with_every_gradient(backend: str, conv: int, settings: dict[str, int]) -> None:
    mixer = build(conv=conv, backend=backend, **settings).double()
    x = (2 * torch.randn(2, T, D).double()).requires_grad_()
    want, y = torch.stack([equations(mixer, x_TD) for x_TD in x]), mixer(x)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    inputs, weights = {"x": x, **dict(mixer.named_parameters())}, torch.randn_like(y)
    got, expected = (torch.autograd.grad((out * weights).sum(), list(inputs.values())) for out in (y, want))
    for name, one, other in zip(inputs, got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
        assert one.abs().max() > 1e-6, name


@torch.no_grad()
@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("settings", [{}, {"num_heads": 2, "feature_dim": 4}])
def test_decoding_equals_the_forward_pass(conv: int, settings: dict[str, int]) -> None:
    mixer, x = build(conv=conv, **settings).double(), torch.randn(2, T, D).double()
    state, outputs = None, []
    for x_BD in x.unbind(1):
        y_BD, state = mixer.step(x_BD, state)
        outputs.append(y_BD)
    torch.testing.assert_close(torch.stack(outputs, 1), mixer(x), rtol=1e-9, atol=1e-9)


def published_map(x: Tensor) -> Tensor:
    """All d^2 products, the ones off the diagonal twice."""
    d = x.shape[-1]
    products = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x / d**0.25, products / math.sqrt(2 * d)], -1)


@pytest.mark.parametrize(("d", "features"), [(1, 3), (2, 6), (5, 21), (8, 45), (16, 153), (24, 325)])
def test_feature_map_gives_the_published_products_from_fewer_features(d: int, features: int) -> None:
    x, y = torch.randn(2, 50, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert taylor_exp(x).shape == (50, features)
    assert published_map(x).shape == (50, 1 + d + d * d)
    found = taylor_exp(x) @ taylor_exp(y).T
    s = x @ y.T / math.sqrt(d)
    torch.testing.assert_close(found, 1 + s + s**2 / 2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, published_map(x) @ published_map(y).T, rtol=1e-12, atol=1e-12)
    assert found.min() >= 0.5 - 1e-9
    assert build(feature_dim=d).effective()["head_k"] == features


@pytest.mark.parametrize("d", [1, 2, 5, 6])
def test_feature_map_has_the_gradient_of_its_formula(d: int) -> None:
    x = torch.randn(2, 3, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(taylor_exp, x)


def test_autocast_leaves_features_and_values_in_float32() -> None:
    mixer, x = build(64), torch.randn(4, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inputs = mixer.project(x, Context())
        y = mixer(x)
    assert {t.dtype for t in (inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV, inputs.log_f_BTH)} == {torch.float32}
    assert y.dtype == torch.bfloat16


def test_the_normaliser_keeps_its_bound_where_bfloat16_features_break_it() -> None:
    x = 4 * torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    phi = taylor_exp(x)
    right, coarse = phi @ taylor_exp(-x).T, phi.bfloat16().float() @ taylor_exp(-x).bfloat16().float().T
    assert right.min() >= 0.5 - 1e-3
    assert coarse.min() < 0


def test_the_clamp_does_not_touch_a_sum_of_one_token() -> None:
    mixer = build(feature_dim=1).double()
    torch.nn.init.eye_(mixer.out_proj.weight)
    with torch.no_grad():
        mixer.in_proj.weight[0] = -mixer.in_proj.weight[1]
    x = torch.randn(400, 1, D).double()
    s = -(mixer.in_proj(x)[..., 1] ** 2)
    assert ((s + 1).abs() < 0.01).any()  # where 1 + s + s^2 / 2 is least
    torch.testing.assert_close(mixer(x), mixer.in_proj(x)[..., 2:])


def test_nothing_is_forgotten() -> None:
    assert torch.equal(build().project(torch.randn(2, T, D), Context()).log_f_BTH, torch.zeros(2, T, 1))


@pytest.mark.parametrize("d", [64, 128])
def test_parameter_count(d: int) -> None:
    assert sum(p.numel() for p in build(d).parameters()) == 2 * d * d + 2 * 16 * d
    assert sum(p.numel() for p in build(d, conv=4, num_heads=4, feature_dim=8).parameters()) == 2 * d * d + 2 * 32 * d + 4 * (d + 64)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_heads": 3}, r"d_model=8 must be a multiple of num_heads=3 \(head dimension = .*\); nearest legal num_heads: 2 or 4"),
        ({"num_heads": 0}, "nearest legal num_heads: 1"),
        ({"feature_dim": 0}, "feature_dim=0 must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**settings)


def test_state_and_flops_by_formula() -> None:
    mixer = build(64, conv=4, num_heads=2)
    assert mixer.state_size(100) == 4 * (2 * 153 * 33 + 3 * (2 * 32 + 64))
    assert mixer.state_size(100, itemsize=2) == 4 * 2 * 153 * 33 + 2 * 3 * (2 * 32 + 64)
    assert mixer.op_flops(100) == 2 * (4 * 153 * 33 + 2 * 153)
