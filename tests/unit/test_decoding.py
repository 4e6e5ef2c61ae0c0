"""Decoding: for every model, a prompt and steps after it give what one forward pass gives; buffers, modes and refusals."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hgrn2_bench import decoding, layers, measure, registry
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.decoding import Decoder
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, recomputing
from hgrn2_bench.model import SequenceModel
from hgrn2_bench.ops import cache
from hgrn2_bench.steps import EAGER_STEPS, NotCapturedError

B, T, VOCAB = 3, 20, 11
BASE = ModelConfig(d_model=16, num_layers=2, conv=0, embed_std=1.0)
MODELS = sorted(registry.models())
CACHED = {"attention", "hybrid"}


class Mean(nn.Module):
    """A plain module: the mean of all tokens so far."""

    def __init__(self, d_model):
        super().__init__()
        self.proj = nn.Linear(d_model, d_model)

    def forward(self, x):
        return self.proj(x).cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]


def build(name="hgrn2", settings=None, length=T, **changes):
    """A model in which every layer matters: noise on all parameters, as some start at zero."""
    torch.manual_seed(0)
    mixer = recomputing(Mean) if name == "plain" else registry.load(name)
    model = SequenceModel(dataclasses.replace(BASE, **changes), mixer, settings or {}, "chunked", VOCAB, length).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tokens(length=T, seed=1):
    return torch.randint(VOCAB, (B, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def whole(model, tokens_BT):
    return model.head(model(tokens_BT))


def decode(decoder, tokens_BT, prompt):
    """Logits from the prompt's last token on."""
    first = decoder.prefill(tokens_BT[:, :prompt])
    return torch.stack([first, *(decoder.step(tokens_B) for tokens_B in tokens_BT[:, prompt:].unbind(1))], 1)


def close(got, want, rtol=1e-4, atol=1e-5):
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol * want.std().item())


@pytest.mark.parametrize("prompt", [1, 9])
@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("name", [*MODELS, "plain"])
def test_a_prompt_and_steps_equal_one_forward_pass(name, conv, prompt):
    changes = {"positions": "rope"} if name in CACHED else {"positions": "none"}
    if name in ("hgrn1", "hgrn2"):
        changes["lower_bound"] = "exclusive"
    model = build(name, conv=conv, channel_mixer="glu", **changes)
    close(decode(Decoder(model, B, T, graph=False), tokens(), prompt), whole(model, tokens())[:, prompt - 1 :], atol=1e-4)


@pytest.mark.parametrize("name", ["hgrn2", "attention", "plain"])
@pytest.mark.parametrize("positions", ["learned", "sinusoid"])
def test_positions_of_the_model_continue(positions, name):
    model = build(name, positions=positions)
    got = decode(Decoder(model, B, T, graph=False), tokens(), 9)
    close(got, whole(model, tokens())[:, 8:])
    if positions == "learned":
        with torch.no_grad():
            model.position.weight[T - 1] *= -1
        other = whole(model, tokens())[:, 8:]
        assert not torch.allclose(got[:, -1], other[:, -1], atol=1e-2)


@pytest.mark.parametrize("settings", [{"long": "odd"}, {"long": "all"}])
def test_a_long_convolution_decodes_without_a_fixed_buffer(settings):
    model = build("base_conv", settings)
    decoder = Decoder(model, B, T, graph=True)
    close(decode(decoder, tokens(), 9), whole(model, tokens())[:, 8:])
    assert decoder.mode == "eager; cannot be captured in a CUDA graph: the state of BaseConv grows with every token"


@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("name", [*MODELS, "plain"])
def test_another_prompt_starts_over_in_the_same_buffers(name, conv):
    decoder = Decoder(build(name, conv=conv), B, T, graph=False)
    want = decode(decoder, tokens(12), 5)
    at = addresses(decoder)
    decode(decoder, tokens(T, seed=2), 15)  # longer: its rows are left in a cache
    assert torch.equal(decode(decoder, tokens(12), 5), want)
    assert name == "plain" or addresses(decoder) == at


def addresses(decoder):
    held = [t for state in decoder.states for tensors in state.values() for t in tensors]
    return [t.data_ptr() for t in [decoder.position, decoder.tokens_B, *held] if t.numel()]


def test_free_rows_of_a_cache_are_not_seen():
    decoder = Decoder(build("attention"), B, T, graph=False)
    want = decode(decoder, tokens(), 9)
    for state in decoder.states:
        for rows in state["op"]:
            assert rows[:, T:].abs().sum() == 0
            rows[:, 9:] = 1e4
    assert torch.equal(decode(decoder, tokens(), 9), want)


def test_the_returned_logits_are_not_overwritten():
    decoder = Decoder(build(), B, T, graph=False)
    first = decoder.prefill(tokens(5))
    second = decoder.step(tokens()[:, 5])
    kept = first.clone(), second.clone()
    decoder.step(tokens()[:, 6])
    assert torch.equal(first, kept[0])
    assert torch.equal(second, kept[1])


@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("name", [*MODELS, "plain"])
def test_state_bytes_are_those_of_the_buffers(name, conv):
    model = build(name, conv=conv)
    decoder = Decoder(model, B, 300, graph=False)
    assert decoder.state_bytes == 0
    decode(decoder, tokens(7), 5)
    assert decoder.bucket == (512 if name in CACHED else 0)
    assert decoder.state_bytes == B * measure.state_bytes(model, decoder.bucket or 7)


@pytest.mark.parametrize(
    ("size", "rows"), [(1, 256), (255, 256), (256, 256), (257, 512), (512, 512), (1000, 1024), (65_536, 65_536), (65_537, 131_072)]
)
def test_a_bucket_is_a_power_of_two(size, rows):
    assert cache.bucket(size) == rows


# dtypes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_by_weights_or_by_autocast(name, autocast):
    model = build(name, conv=4 if registry.load(name).convolved else 0)
    want = whole(model, tokens())[:, 8:]
    if not autocast:
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        decoder = Decoder(model, B, T, graph=False)
        got = decode(decoder, tokens(), 9)
        assert decoder.kernel
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.25 * want.std().item())
    assert decoder.state_bytes <= B * measure.state_bytes(model, decoder.bucket, 4)


def test_autocast_keeps_no_cast_weights_for_a_graph_to_read():
    model, seen = build("attention"), []
    model.norm.register_forward_hook(lambda *_: seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled())))
    decoder = Decoder(model, B, T, graph=False)
    with torch.autocast("cpu", torch.bfloat16):
        decode(decoder, tokens(7), 5)
    decode(decoder, tokens(6), 5)
    assert seen == [(True, False)] * 3 + [(False, True)] * 2


# modes; capturing itself needs a GPU


@pytest.mark.parametrize(
    ("name", "graph", "mode"),
    [
        ("hgrn2", False, "eager"),
        ("plain", False, "eager"),
        ("hgrn2", True, "eager; cannot be captured in a CUDA graph: the model is on cpu"),
        ("attention", True, "eager; cannot be captured in a CUDA graph: the model is on cpu"),
        ("plain", True, "eager; cannot be captured in a CUDA graph: the state of Mean grows with every token"),
    ],
)
def test_mode_says_why_nothing_is_captured(name, graph, mode):
    decoder = Decoder(build(name), B, T, graph)
    decode(decoder, tokens(), 5)
    assert (decoder.mode, decoder.warm_steps, decoder.captured) == (mode, 1, None)


class Operations(TorchDispatchMode):
    """Notes the names of torch's operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


HOST = {"_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "is_nonzero", "equal"}
"""What reads a value from the device or brings one to it: a CUDA graph cannot hold them."""


@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_never_waits_for_the_device(name, conv):
    decoder = Decoder(build(name, conv=conv), B, T, graph=False)
    decode(decoder, tokens(9), 8)
    with Operations() as seen:
        decoder.step(tokens()[:, 9])
    assert not seen.names & HOST
    assert {"copy_", "add_"} <= seen.names
    with Operations() as seen:
        torch.ones(2)[torch.tensor([True, False])].sum().item()
    assert {"_local_scalar_dense", "lift_fresh"} <= seen.names


class Replay:
    """Stands in for a graph: does the recorded step again, into the tensor that the recording left."""

    def __init__(self, step, logits_BV):
        self.step, self.logits_BV, self.replays = step, logits_BV, 0

    def replay(self):
        self.replays += 1
        self.logits_BV.copy_(self.step())


def capturing(decoder):
    decoder.capturing, decoder.warm_steps = True, EAGER_STEPS + 1
    return decoder


def test_a_step_is_captured_once_and_replayed_also_after_another_prompt(monkeypatch):
    graphs, model = [], build("hybrid")

    def capture(step):
        logits_BV = torch.zeros(B, VOCAB)
        graphs.append(Replay(step, logits_BV))
        return graphs[-1], logits_BV

    monkeypatch.setattr(decoding, "capture", capture)
    decoder, eager = capturing(Decoder(model, B, T, graph=False)), Decoder(model, B, T, graph=False)
    got = decode(decoder, tokens(), 9)
    assert torch.equal(got, decode(eager, tokens(), 9))
    assert [graph.replays for graph in graphs] == [T - 9 - EAGER_STEPS]
    assert decoder.mode == "CUDA graph"
    assert torch.equal(decode(decoder, tokens(seed=3), 4), decode(eager, tokens(seed=3), 4))
    assert [graph.replays for graph in graphs] == [T - 9 - EAGER_STEPS + T - 4]


def test_layers_hear_whether_a_step_is_for_a_graph(monkeypatch):
    heard, model = [], build()
    model.norm.register_forward_hook(lambda *_: heard.append(layers._for_a_graph))
    monkeypatch.setattr(decoding, "capture", lambda step: (Replay(step, torch.zeros(B, VOCAB)), step()))
    decode(capturing(Decoder(model, B, T, graph=False)), tokens(), 9)
    decode(Decoder(model, B, T, graph=False), tokens(), 9)
    assert heard == [False] + [True] * (T - 9 + 1) + [False] * (1 + T - 9)  # a prompt, its steps and their recording; the same eager


def test_a_step_that_cannot_be_captured_stays_eager_and_says_why(monkeypatch):
    tried = []

    def capture(step):
        tried.append(decoder.steps)
        raise NotCapturedError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decoding, "capture", capture)
    model = build()
    decoder = capturing(Decoder(model, B, T, graph=False))
    close(decode(decoder, tokens(), 9), whole(model, tokens())[:, 8:])
    assert tried == [EAGER_STEPS]
    assert decoder.mode == "eager; cannot be captured in a CUDA graph: operation not permitted when stream is capturing"


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("hgrn2", "chunked.per_channel_decay"),
        ("attention", "torch.scaled_dot_product_attention with a mask over 256 cached tokens"),
        (
            "hybrid",
            "hgrn2: chunked.per_channel_decay; attention: torch.scaled_dot_product_attention with a mask over 256 cached tokens",
        ),
        ("plain", "the module's own"),
    ],
)
def test_the_kernel_of_one_token_is_named(name, kernel):
    assert Decoder(build(name), B, T, graph=False).kernel == kernel


def test_the_kernel_on_fla_is_that_of_one_token():
    model = build()
    for mixer in model.mixers:
        mixer.spec = dataclasses.replace(mixer.spec, backend="fla")
    assert Decoder(model, B, T, graph=False).kernel == "fla.fused_recurrent_gla"


# refusals


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"decoding needs the model in eval mode: call model.eval\(\) first"):
        Decoder(build().train(), B, T, graph=False)


@pytest.mark.parametrize(("batch", "capacity"), [(0, 5), (5, 0)])
def test_empty_sizes_are_refused(batch, capacity):
    with pytest.raises(ValueError, match=f"batch={batch} and capacity={capacity} must be at least 1"):
        Decoder(build(), batch, capacity, graph=False)


@pytest.mark.parametrize("positions", ["learned", "sinusoid"])
def test_a_capacity_beyond_the_table_of_positions_is_refused(positions):
    with pytest.raises(ConfigError, match=f"capacity=21 tokens, but positions={positions} knows only 20"):
        Decoder(build(positions=positions), B, T + 1, graph=False)


def test_steps_before_a_prompt_and_beyond_the_capacity_are_refused():
    decoder = Decoder(build(), B, 6, graph=False)
    with pytest.raises(ValueError, match="no step can follow: call prefill first"):
        decoder.step(tokens()[:, 0])
    decode(decoder, tokens(6), 5)
    with pytest.raises(ValueError, match="no step can follow: capacity=6 tokens are reached"):
        decoder.step(tokens()[:, 0])


@pytest.mark.parametrize("shape", [(2, 5), (3, 7), (3, 0)])
def test_prompts_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"a prompt of shape \(\d, \d\) does not fit batch=3 and capacity=6"):
        Decoder(build(), B, 6, graph=False).prefill(torch.zeros(shape, dtype=torch.int64))


def test_attention_that_sees_the_future_is_refused():
    with pytest.raises(ConfigError, match="attention with causal=False cannot decode"):
        Decoder(build("attention", {"causal": False}), B, T, graph=False).prefill(tokens(5))


def test_attention_in_place_needs_a_cache_and_a_position():
    mixer = build("attention").mixers[0]
    with pytest.raises(ValueError, match="attention decodes in place from a cache and a position: run the prompt first"):
        mixer.step_in_place(torch.zeros(B, 16), Context())


def test_a_state_that_grows_cannot_stay_in_place():
    mixer, ctx = build("plain").mixers[0], Context(return_state=True)
    mixer(torch.zeros(B, 5, 16), ctx)
    assert isinstance(mixer, Mixer)
    with pytest.raises(ValueError, match=r"state 'op' has shape \(3, 6, 16\) after a step, \(3, 5, 16\) before: it cannot stay in place"):
        mixer.step_in_place(torch.zeros(B, 16), Context(state=ctx.next_state))
