import math
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.rwkv6 import RWKV6
from hgrn2_bench import measure, registry
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, MixerSpec
from hgrn2_bench.model import SequenceModel

SMALL = {"head_dim": 4, "mix_rank": 3, "decay_rank": 2}


def build(d_model: int = 8, conv: int = 0, forget_bias: float = 0.0, backend: str = "reference", **settings: Any) -> RWKV6:
    torch.manual_seed(0)
    return RWKV6(MixerSpec(d_model, conv=conv, forget_bias=forget_bias, backend=backend, settings=settings))


def far_from_its_start(conv: int = 0, backend: str = "reference", forget_bias: float = 0.0) -> RWKV6:
    """A small mixer in float64 whose low ranks, norm and bonus all matter."""
    mixer = build(conv=conv, backend=backend, forget_bias=forget_bias, **SMALL).double()
    for parameter in (mixer.mix_in.weight, mixer.mix_out, mixer.decay_in.weight, mixer.decay_out.weight, mixer.bonus, mixer.norm.weight):
        torch.nn.init.normal_(parameter)
    torch.nn.init.normal_(mixer.norm.bias)
    torch.nn.init.uniform_(mixer.decay, -2, 1)
    return mixer


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def convolved(mixer: RWKV6, name: str, past: list[Tensor]) -> Tensor:
    """The short convolution of a stream at its last token, tap by tap."""
    if not mixer.spec.conv:
        return past[-1]
    weight = getattr(mixer, name).conv.weight[:, 0]
    return sum((weight[:, -1 - lag] * past[-1 - lag] for lag in range(min(mixer.spec.conv, len(past)))), torch.zeros(8).double())


def equations(mixer: RWKV6, x_TD: Tensor, H: int = 2, K: int = 4) -> tuple[Tensor, Tensor]:
    """The layer written from the paper, one token and one head after the other: outputs and the last state."""
    mu_x, *mu = mixer.mix
    before, streams, S, outputs = torch.zeros(8).double(), ([], [], []), [torch.zeros(K, K).double() for _ in range(H)], []
    for x in x_TD:
        low = torch.tanh(mixer.mix_in.weight @ (x + mu_x * (before - x))).chunk(5)
        mixed = [x + (mu[s] + low[s] @ mixer.mix_out[s]) * (before - x) for s in range(5)]
        for stream, projection, x_s in zip(streams, (mixer.r_proj, mixer.k_proj, mixer.v_proj), mixed[:3], strict=True):
            stream.append(projection.weight @ x_s)
        r, k, v = (convolved(mixer, name, stream) for name, stream in zip(("conv_r", "conv_k", "conv_v"), streams, strict=True))
        w = torch.exp(-torch.exp(mixer.decay + mixer.decay_out.weight @ torch.tanh(mixer.decay_in.weight @ mixed[3])))
        normed = []
        for h in range(H):
            part = slice(h * K, (h + 1) * K)
            kv = torch.outer(k[part], v[part])
            o = (S[h] + torch.diag(mixer.bonus[h]) @ kv).T @ r[part]
            S[h] = torch.diag(w[part]) @ S[h] + kv
            normed.append((o - o.mean()) / (o.var(correction=0) + 64e-5).sqrt())
        gate = mixer.gate_proj.weight @ mixed[4]
        o = torch.cat(normed) * mixer.norm.weight + mixer.norm.bias
        outputs.append(mixer.out_proj.weight @ (o * gate * sigmoid(gate)))
        before = x
    return torch.stack(outputs), torch.stack(S)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("conv", [0, 3])
def test_layer_equals_the_equations_with_state_and_every_gradient(backend: str, conv: int) -> None:
    mixer, x = far_from_its_start(conv, backend), torch.randn(2, 20, 8).double().requires_grad_()
    inputs = {"x": x, **dict(mixer.named_parameters())}
    found = [equations(mixer, x_TD) for x_TD in x]
    want, want_state = (torch.stack(tensors) for tensors in zip(*found, strict=True))
    ctx = Context(return_state=True)
    y = mixer(x, ctx)
    torch.testing.assert_close(y, want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ctx.next_state["op"][0], want_state, rtol=1e-8, atol=1e-8)
    weights, state_weights = torch.randn_like(y), torch.randn_like(want_state)
    losses = (
        (y * weights).sum() + (ctx.next_state["op"][0] * state_weights).sum(),
        (want * weights).sum() + (want_state * state_weights).sum(),
    )
    got, expected = (torch.autograd.grad(loss, list(inputs.values())) for loss in losses)
    for name, one, other in zip(inputs, got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
        assert one.abs().max() > 1e-6, name


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("conv", [0, 4])
def test_decoding_equals_the_forward_pass(backend: str, conv: int) -> None:
    mixer, x = far_from_its_start(conv, backend), torch.randn(2, 9, 8).double()
    ctx = Context(return_state=True)
    outputs, state = [mixer(x[:, :3], ctx)], ctx.next_state
    for x_BD in x[:, 3:].unbind(1):
        y_BD, state = mixer.step(x_BD, state)
        outputs.append(y_BD[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_decoding_goes_on_from_each_row_s_own_length() -> None:
    mixer, x, lengths = far_from_its_start(conv=4), torch.randn(3, 9, 8).double(), [1, 4, 6]
    ctx = Context(lengths_B=torch.tensor(lengths), return_state=True)
    mixer(x[:, :6], ctx)
    y_BD, _ = mixer.step(x[:, 8], ctx.next_state)
    for row, length in enumerate(lengths):
        alone = torch.cat([x[row : row + 1, :length], x[row : row + 1, 8:]], 1)
        torch.testing.assert_close(y_BD[row], mixer(alone)[0, -1], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_bonus_is_all_that_a_first_token_reads() -> None:
    mixer, x = far_from_its_start(), torch.randn(2, 1, 8).double()
    mixer.bonus.zero_()
    torch.nn.init.zeros_(mixer.norm.bias)
    assert mixer(x).abs().max() == 0


@pytest.mark.parametrize(("d", "head", "heads"), [(32, 32, 1), (64, 64, 1), (128, 64, 2)])
def test_default_head_is_64_channels_or_all(d: int, head: int, heads: int) -> None:
    mixer = build(d)
    assert (mixer.head_k, mixer.heads) == (head, heads)
    assert mixer.effective()["head_v"] == head


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("conv", [0, 4])
def test_parameter_count(d: int, conv: int) -> None:
    shift, decay = 6 * d + d * 160 + 160 * d, d + 2 * 64 * d
    assert sum(p.numel() for p in build(d, conv).parameters()) == 5 * d * d + shift + decay + d + 2 * d + conv * 3 * d


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_published_initialisation(layer: int) -> None:
    D, mixer = 8, RWKV6(MixerSpec(8, layer=layer, num_layers=4, settings=SMALL))
    depth, rest = layer / 3, 1 - layer / 4
    for n in range(D):
        share = n / D
        slow, fast = 1 - share**rest, 1 - share ** (0.5 * rest)
        assert mixer.mix[:, n].tolist() == pytest.approx([slow, fast, slow, slow - 0.3 * depth, slow, fast], abs=1e-6)
        assert mixer.decay[n].item() == pytest.approx(-6 + 5 * (n / 7) ** (0.7 + 1.3 * depth), abs=1e-6)
        zigzag = ((n + 1) % 3 - 1) * 0.1
        assert mixer.bonus.flatten()[n].item() == pytest.approx(depth * (1 - n / 7) + zigzag, abs=1e-6)


def test_low_ranks_start_small() -> None:
    mixer = build(64)
    for into, out in ((mixer.mix_in.weight, mixer.mix_out), (mixer.decay_in.weight, mixer.decay_out.weight)):
        assert 0.9e-4 < into.abs().max() <= 1e-4
        assert 0.9e-2 < out.abs().max() <= 1e-2


def test_one_layer_and_one_channel_can_be_built() -> None:
    assert all(p.isfinite().all() for p in build(1, head_dim=1).parameters())


def test_only_matrices_of_the_big_projections_decay() -> None:
    decayed = {n for n, p in build().named_parameters() if p.ndim >= 2 and n not in RWKV6.no_weight_decay}
    assert decayed == {"r_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "out_proj.weight"}


def test_forget_bias_shrinks_the_rate_of_decay_once() -> None:
    x = torch.randn(4, 16, 64)
    plain, slow = (build(64, forget_bias=b).project(x, Context()).log_f_BTHK[:, 1:] for b in (0.0, 3.0))
    torch.testing.assert_close(slow, math.exp(-3) * plain, rtol=1e-4, atol=1e-7)
    mixer = build(64, forget_bias=3.0)
    before = mixer.decay.clone()
    mixer.init_forget_bias()
    assert torch.equal(mixer.decay, before)


def test_no_forgetting_and_no_write_at_the_first_step_of_the_run() -> None:
    inputs = build(64).project(torch.randn(2, 5, 64), Context())
    assert inputs.k_BTHK[:, 0].abs().max() == 0
    assert inputs.log_f_BTHK[:, 0].abs().max() == 0
    assert inputs.log_f_BTHK[:, 1:].max() < 0


@pytest.mark.parametrize(("conv", "words"), [(0, "token shift"), (4, "token shift, conv 4")])
def test_the_token_shift_is_shown_as_local_mixing(conv: int, words: str) -> None:
    model = SequenceModel(ModelConfig(d_model=16, conv=conv), registry.load("rwkv6"), {}, "chunked", 11, 12)
    assert measure.effective(model)["local_mixing"] == words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"head_dim": 48}, r"d_model=64 must be a multiple of head_dim=48 \(heads = .*\); nearest legal head_dim: 32 or 64"),
        ({"head_dim": 0}, "nearest legal head_dim: 1"),
        ({"mix_rank": 0}, "mix_rank=0 and decay_rank=64 must be at least 1"),
        ({"decay_rank": 0}, "mix_rank=32 and decay_rank=0 must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(64, **settings)


def test_state_and_flops_by_formula() -> None:
    mixer = build(128, conv=4)  # 2 heads of 64 channels
    assert mixer.state_size(100) == 4 * (2 * 64 * 64 + 128 + 3 * 3 * 128)
    assert mixer.state_size(100, itemsize=2) == 4 * 2 * 64 * 64 + 2 * (128 + 3 * 3 * 128)
    assert mixer.op_flops(100) == 2 * (5 * 64 * 64 + 5 * 64) + 10 * 32 * 128
