import math
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.rwkv7 import RWKV7
from hgrn2_bench import measure
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, MixerSpec
from hgrn2_bench.model import SequenceModel

D, T = 12, 6
RANKS = {"decay_low_rank_dim": 3, "a_low_rank_dim": 4, "v_low_rank_dim": 5, "gate_low_rank_dim": 6}


def build(d_model: int = D, layer: int = 1, num_layers: int = 3, conv: int = 0, forget_bias: float = 0.0, **settings: Any) -> RWKV7:
    torch.manual_seed(0)
    spec = MixerSpec(d_model, layer, num_layers, conv=conv, forget_bias=forget_bias, backend="reference", settings=settings)
    return RWKV7(spec)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def equations(mixer: RWKV7, x_TD: Tensor, first_TD: Tensor, H: int, K: int) -> tuple[Tensor, Tensor]:
    """The layer written from the paper, one token and one head after the other, with the paper's state S (V x K); and its values."""
    S, before, outputs, values = [torch.zeros(K, K).double() for _ in range(H)], torch.zeros_like(x_TD[0]), [], []
    for x_D, first_D in zip(x_TD, first_TD, strict=True):
        x_r, x_w, x_k, x_v, x_a, x_g = (x_D + mu_D * (before - x_D) for mu_D in mixer.mu)
        before = x_D
        r, k, v = mixer.r_proj.weight @ x_r, mixer.k_proj.weight @ x_k, mixer.v_proj.weight @ x_v
        d = mixer.w_0 + mixer.w_proj.second.weight @ torch.tanh(mixer.w_proj.first.weight @ x_w)
        w = (-math.exp(-0.5) * sigmoid(d)).exp()
        eta = sigmoid(mixer.a_0 + mixer.a_proj.second.weight @ (mixer.a_proj.first.weight @ x_a))
        g = mixer.gate_proj.second.weight @ sigmoid(mixer.gate_proj.first.weight @ x_g)
        if mixer.spec.layer:
            v = v + (first_D - v) * sigmoid(mixer.v_0 + mixer.mix_proj.second.weight @ (mixer.mix_proj.first.weight @ x_v))
        values.append(v)
        removal, replacement = k * mixer.xi, k * (1 + (eta - 1) * mixer.alpha)
        heads = []
        for h in range(H):
            c = slice(h * K, (h + 1) * K)
            kappa = removal[c] / (removal[c] @ removal[c]).sqrt()
            S[h] = S[h] @ (torch.diag(w[c]) - torch.outer(kappa, eta[c] * kappa)) + torch.outer(v[c], replacement[c])
            o = S[h] @ r[c]
            normed = (o - o.mean()) / (((o - o.mean()) ** 2).mean() + K * 1e-5).sqrt() * mixer.norm.weight[c] + mixer.norm.bias[c]
            heads.append(normed + (r[c] * mixer.rho[h] * replacement[c]).sum() * v[c])
        outputs.append(mixer.out_proj.weight @ (g * torch.cat(heads)))
    return torch.stack(outputs), torch.stack(values)


def randomise(mixer: RWKV7) -> RWKV7:
    """Every parameter drawn anew, and large enough to be seen: the published start makes some of them nearly equal or small."""
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return mixer


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("settings", "H", "K"), [({}, 1, 12), ({"head_dim": 4, **RANKS}, 3, 4), ({"head_dim": 2}, 6, 2)])
def test_layer_equals_the_equations(layer: int, settings: dict[str, int], H: int, K: int) -> None:
    mixer = randomise(build(layer=layer, **settings).double())
    x, first = torch.randn(2, 2, T, D).double().unbind(0)
    carry = {"values": first} if layer else {}
    want, values = (torch.stack(t) for t in zip(*(equations(mixer, *rows, H, K) for rows in zip(x, first, strict=True)), strict=True))
    torch.testing.assert_close(mixer(x, Context(carry=carry)), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(carry["values"], first if layer else values, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
def test_short_convolutions_act_on_queries_keys_and_values(layer: int) -> None:
    plain, mixer = build(layer=layer), build(layer=layer, conv=3)
    mixer.load_state_dict(plain.state_dict(), strict=False)
    for conv in (mixer.conv_r, mixer.conv_k, mixer.conv_v):
        conv.conv.weight.copy_(torch.tensor([0.0, 0.0, 1.0]).expand(D, 1, 3))  # hands its input on
    x, carry = torch.randn(2, T, D), {"values": torch.randn(2, T, D)}
    want = plain(x, Context(carry=dict(carry)))
    torch.testing.assert_close(mixer(x, Context(carry=dict(carry))), want)
    for conv in (mixer.conv_r, mixer.conv_k, mixer.conv_v):
        conv.conv.weight[:, :, 1] = 1.0
        assert not torch.allclose(mixer(x, Context(carry=dict(carry))), want, atol=1e-4)
        conv.conv.weight[:, :, 1] = 0.0


def model(layers: int = 3, **settings: Any) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(ModelConfig(d_model=D, num_layers=layers, conv=4), RWKV7, settings, "chunked", 11, T).double()


@torch.no_grad()
def test_decoding_a_whole_model_equals_its_forward_pass() -> None:
    net, tokens = model(head_dim=4), torch.randint(11, (2, T))
    states: list[Any] = [None] * 3
    outputs = []
    for token_B in tokens.unbind(1):
        x_BD, carry = net.embedding(token_B), {}
        for i, block in enumerate(net.blocks):
            y_BD, states[i] = block.mixer.step(block.mixer_norm(x_BD), states[i], carry=carry)
            x_BD = x_BD + y_BD
        outputs.append(net.norm(x_BD))
    torch.testing.assert_close(torch.stack(outputs, 1), net(tokens), rtol=1e-9, atol=1e-9)


def test_later_layers_see_the_values_of_layer_0_through_the_model() -> None:
    """With the shares of the value residual at 1, the own values of layers 1 and 2 do not matter, and those of layer 0 do."""
    net, tokens = model(), torch.randint(11, (2, T))
    first, *later = net.mixers
    for mixer in later:
        mixer.v_0.data.fill_(1e6)
    net(tokens).square().sum().backward()
    assert first.v_proj.weight.grad.abs().max() > 0
    assert all(mixer.v_proj.weight.grad.abs().max() == 0 for mixer in later)
    before = net(tokens)
    first.v_proj.weight.data.add_(0.1)
    assert not torch.allclose(net(tokens), before, atol=1e-6)


def test_one_call_does_not_see_the_values_of_another() -> None:
    net, tokens = model(), torch.randint(11, (2, T))
    alone = net(tokens)
    net(torch.randint(11, (2, T)))
    assert torch.equal(net(tokens), alone)


def test_a_later_layer_without_the_first_values_says_so() -> None:
    with pytest.raises(ValueError, match="RWKV7 in layer 1 mixes in the values of layer 0: pass it the `carry` that layer filled"):
        build()(torch.randn(1, T, D))
    assert "mix_proj" not in dict(build(layer=0).named_modules())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("d", [64, 128])
def test_parameter_count(d: int, conv: int, layer: int) -> None:
    matrices, vectors = 4 * d * d, (6 + 4 + 1 + 2) * d  # mu; w_0, a_0, xi, alpha; rho; the norm
    low_ranks = 2 * d * (32 + 32 + {64: 32, 128: 64}[d])
    residual = layer * (2 * d * 32 + d)
    assert sum(p.numel() for p in build(d, layer, conv=conv).parameters()) == matrices + vectors + low_ranks + residual + 3 * conv * d


@pytest.mark.parametrize(
    ("d", "ranks"),
    [(16, (16,) * 4), (64, (32, 32, 32, 32)), (768, (64, 64, 32, 128)), (1024, (64, 64, 64, 160)), (2560, (128, 128, 96, 256))],
)
def test_published_ranks(d: int, ranks: tuple[int, ...]) -> None:
    with torch.device("meta"):
        assert tuple(build(d).ranks.values()) == ranks


def test_published_initialisation() -> None:
    mixer = build(128, layer=1, num_layers=3)  # two heads
    n, places = torch.arange(128), (torch.arange(128) % 64 - 31.5) / 31.5
    zigzag, centred = places * places.abs(), n / 127 - 0.5
    torch.testing.assert_close(mixer.w_0, -6 + 6 * (n / 127) ** (1 + 0.5**0.3) + 0.5 + 2.5 * zigzag)
    torch.testing.assert_close(mixer.a_0, -0.19 + 0.3 * zigzag + 0.4 * centred)
    torch.testing.assert_close(mixer.v_0, 0.73 - 0.4 * centred)
    torch.testing.assert_close(mixer.xi, 0.71 - 0.1 * centred)
    for mu_D, power in zip(mixer.mu, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
        torch.testing.assert_close(mu_D, 1 - (n / 128) ** (power * 2 / 3))
    torch.testing.assert_close(mixer.norm.weight, torch.full((128,), (2 / 3) ** 0.7))
    assert mixer.norm.eps == pytest.approx(64e-5)
    for projection, bound in ((mixer.r_proj, 0.5), (mixer.k_proj, 0.05), (mixer.v_proj, 0.5)):
        assert projection.weight.abs().max().item() == pytest.approx(bound * 128**-0.5, rel=0.01)
    second = mixer.w_proj.second.weight
    torch.testing.assert_close(second.T @ second, 0.01 * torch.eye(32), rtol=0, atol=1e-6)
    assert build(layer=0, num_layers=1).w_0.isfinite().all()  # a model of one layer


def test_default_heads_have_at_most_64_channels() -> None:
    assert [(m.heads, m.head_k) for m in map(build, (16, 64, 96, 128))] == [(1, 16), (1, 64), (2, 48), (2, 64)]


def test_decay_keeps_its_bound_and_forget_bias_shrinks_its_rate() -> None:
    x = 100 * torch.randn(4, 16, 64)
    log_w = build(64, layer=0).project(x, Context()).log_f_BTHK
    assert log_w.min() >= -math.exp(-0.5)
    assert log_w.max() <= 0
    mixers = [build(64, layer=0, forget_bias=b) for b in (0.0, 3.0)]
    torch.testing.assert_close(mixers[0].w_0 - mixers[1].w_0, torch.full((64,), 3.0))
    plain, slow = (m.project(x / 100, Context()).log_f_BTHK.flatten(0, 2) for m in mixers)
    small = plain.mean(0) > -0.02  # sigmoids under 0.03
    assert small.sum() > 10
    assert (slow / plain)[:, small].median().item() == pytest.approx(math.exp(-3), rel=0.05)
    kept = mixers[1].w_0.clone()
    mixers[1].init_forget_bias()
    assert torch.equal(mixers[1].w_0, kept)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"head_dim": 48}, r"d_model=64 must be a multiple of head_dim=48 .*; nearest legal head_dim: 32 or 64"),
        ({"head_dim": 1}, "head_dim must be at least 2"),
        ({"gate_low_rank_dim": 0}, "the low ranks must be at least 1; they are w: 32, a: 32, v: 32, g: 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(64, **settings)


def test_state_and_flops_by_formula() -> None:
    first, later = build(128, layer=0, conv=4), build(128, layer=1)
    assert later.state_size(100) == later.state_size(100, itemsize=2) == 4 * (2 * 64 * 64 + 128)
    assert first.state_size(100, itemsize=2) == 4 * (2 * 64 * 64 + 128) + 2 * 3 * 3 * 128
    assert first.op_flops(100) == 9 * 2 * 64 * 64 + 24 * 128
    assert later.op_flops(100) == first.op_flops(100) + 3 * 128


def test_rows_name_token_shift_as_local_mixing() -> None:
    assert measure.effective(model())["local_mixing"] == "token shift, conv 4"
    assert build().effective()["local_mixing"] == "token shift"
    assert 0.9 < measure.effective(model())["median_decay_at_init"] < 1
