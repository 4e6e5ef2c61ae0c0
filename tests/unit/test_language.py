"""Language models: chunked losses, carried states, embedding scale, norms, GLU, recomputation."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hgrn2_bench import language, measure, registry
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.decoding import Decoder
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.language import LanguageModel
from hgrn2_bench.model import SequenceModel

BASE = ModelConfig(d_model=16, num_layers=2, channel_mixer="glu", embed_std=1.0)
V, T = 23, 20


def build(name="hgrn2", settings=None, vocab=V, length=T, **changes):
    torch.manual_seed(0)
    return LanguageModel(dataclasses.replace(BASE, **changes), registry.load(name), settings or {}, "chunked", vocab, length)


def tokens(seed=1, vocab=V, length=T):
    return torch.randint(vocab, (3, length), generator=torch.Generator().manual_seed(seed))


def plain_nats(model, inputs, targets):
    logits = model.head(model(inputs))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").reshape(targets.shape)


@pytest.mark.parametrize("logits", [V * 7, 1, 2**25])
@pytest.mark.parametrize("tied", [False, True])
def test_chunks_give_the_loss_and_gradient_of_all_logits_at_once(logits, tied, monkeypatch):
    monkeypatch.setattr(language, "CHUNK_LOGITS", logits)
    model = build(tie_embeddings=tied).double()
    want = plain_nats(model, tokens(1), tokens(2)).mean()
    got = model.loss(tokens(1), tokens(2))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    wants, gots = (torch.autograd.grad(loss, list(model.parameters())) for loss in (want, got))
    for one, other in zip(gots, wants, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model.losses(tokens(1), tokens(2))[0], plain_nats(model, tokens(1), tokens(2)))


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    monkeypatch.setattr(language, "CHUNK_LOGITS", 5 * V)
    seen, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, weight, *bias: seen.append((len(x), len(weight))) or linear(x, weight, *bias))
    model = build()
    for run in (model.loss, model.losses):
        seen.clear()
        run(tokens(1), tokens(2))
        assert [rows for rows, width in seen if width == V] == 12 * [5]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_gradients_made_with_the_loss_are_those_of_autograd(size):
    torch.manual_seed(0)
    x, weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, 4, 1, 2, 3, 0])
    assert torch.autograd.gradcheck(lambda x, weight: 3 * language.linear_cross_entropy(x, weight, targets, size), (x, weight))


def test_autocast_rounds_as_it_does_for_the_plain_loss():
    model, results = build(), []
    for loss in (model.loss, lambda inputs, targets: plain_nats(model, inputs, targets).mean()):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(tokens(1), tokens(2))
        results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    for got, want in zip(*results, strict=True):
        assert got.dtype == torch.float32
        assert ((got - want).norm() / want.norm()).item() < 2e-2


def test_losses_are_float32_under_autocast_and_take_any_integers():
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        nats, states = model.losses(tokens(1).int(), tokens(2).int())
        assert model.loss(tokens(1).int(), tokens(2).int()).dtype == torch.float32
    assert (nats.dtype, nats.shape, nats.requires_grad, states) == (torch.float32, (3, T), False, None)


CARRYING = [name for name in registry.models() if name not in ("attention", "base_conv")]


@pytest.mark.parametrize("name", [*CARRYING, "attention"])
def test_two_blocks_with_the_state_carried_lose_what_one_does(name):
    bound = "inclusive" if name in ("hgrn1", "hgrn2") else "none"
    changes = {"lower_bound": bound, "conv": 4} | ({"positions": "rope"} if name == "attention" else {})
    heads = {"gated_delta_net": {"num_heads": 2}, "delta_net": {"num_heads": 2}, "hybrid": {"layers": ("hgrn2", "gla", "rwkv7")}}
    model = build(name, heads.get(name), num_layers=3, **changes).eval()
    whole, after = model.losses(tokens(1), tokens(2), return_states=True)
    first, states = model.losses(tokens(1)[:, :7], tokens(2)[:, :7], return_states=True)
    rest, end = model.losses(tokens(1)[:, 7:], tokens(2)[:, 7:], states, return_states=True)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(end, after, rtol=1e-3, atol=1e-4)
    assert model.can_carry == (name != "attention")
    assert not torch.allclose(rest, model.losses(tokens(1)[:, 7:], tokens(2)[:, 7:])[0], atol=1e-3)


@pytest.mark.parametrize("kind", ["learned", "sinusoid"])
def test_a_table_of_positions_cannot_be_carried(kind):
    model = build(positions=kind)
    assert not model.can_carry
    with pytest.raises(ValueError, match=f"positions={kind}: no state can be carried"):
        model.losses(tokens(1), tokens(2), return_states=True)
    assert model.losses(tokens(1), tokens(2))[0].shape == (3, T)


def test_a_cache_or_a_long_convolution_is_not_of_fixed_size():
    assert not build("attention").can_carry
    assert not build("base_conv", {"long": "all"}).can_carry
    assert build("base_conv").can_carry


def test_embedding_scale_holds_in_training_and_decoding():
    model, plain = build(embed_scale="sqrt").eval(), build().eval()
    torch.testing.assert_close(model.embed(tokens()), 4 * plain.embed(tokens()))
    decoder = Decoder(model, 3, T, graph=False)
    decoder.prefill(tokens()[:, :8])
    got = decoder.step(tokens()[:, 8])
    torch.testing.assert_close(got, model.head(model(tokens()[:, :9]))[:, -1], rtol=1e-4, atol=1e-5)


def test_simple_rmsnorm_has_no_weight_and_the_published_eps():
    model = build("hgrn2", {"variant": "paper_lm"}, norm="simple_rmsnorm", glu_bias=False, glu_activation="none")
    assert [name for name, _ in model.named_parameters() if "norm" in name or "bias" in name] == []
    x = torch.randn(4, 16)
    torch.testing.assert_close(model.norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    assert (build().norm.eps, build(norm="rmsnorm").norm.eps, build(norm="rmsnorm", norm_eps=1e-3).norm.eps) == (1e-5, 1e-5, 1e-3)


@pytest.mark.parametrize("activation", ["silu", "none"])
def test_glu_equals_its_equation(activation):
    glu, x = build(glu_activation=activation).blocks[0].channel, torch.randn(5, 16)
    gate = F.linear(x, glu.gate.weight, glu.gate.bias)
    gate = gate * gate.sigmoid() if activation == "silu" else gate
    want = F.linear(gate * F.linear(x, glu.up.weight, glu.up.bias), glu.down.weight, glu.down.bias)
    torch.testing.assert_close(glu(x), want)


@pytest.mark.parametrize("name", ["hgrn2", "rwkv7", "retnet", "attention", "mamba"])
def test_recomputed_blocks_give_the_same_gradients(name):
    changes = {"dropout": 0.2, "num_layers": 3} | ({"positions": "rope"} if name == "attention" else {})
    results = []
    for recompute in (False, True):
        model = build(name, recompute=recompute, **changes).train()
        torch.manual_seed(5)
        loss = model.loss(tokens(1), tokens(2))
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_recomputation_keeps_only_the_inputs_of_blocks():
    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(tokens())
        return sum(sizes)

    assert kept(build(num_layers=6, recompute=True)) < kept(build(num_layers=6)) / 4


def test_probe_and_costs():
    model = build(tie_embeddings=True)
    assert model.probe(2, 8, 16).ndim == 0
    total, own = measure.parameters(model)
    assert total - own == V * 16
    adaptive = build(softmax="adaptive")
    assert measure.parameters(adaptive)[1] == own
    assert measure.train_flops_per_token(adaptive, T) == measure.train_flops_per_token(model, T) + 6 * 2 * 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"glu_bias": False}, "glu_bias=False has no effect with channel_mixer=none"),
        ({"glu_activation": "none", "channel_mixer": "mlp"}, "glu_activation=none has no effect with channel_mixer=mlp"),
        ({"cutoffs": (3,)}, r"cutoffs=\[3\] has no effect with softmax=full"),
        ({"cutoffs": (5, 5), "softmax": "adaptive"}, r"cutoffs=\[5,5\] must be whole numbers above 0, each greater"),
        ({"cutoffs": (0, 5), "softmax": "adaptive"}, "above 0"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0 must be 0"),
        ({"norm_eps": 1e-6, "norm": "batchnorm"}, "norm_eps=1e-06 has no effect with norm=batchnorm"),
        ({"recompute": True, "norm": "batchnorm"}, "recompute=true would count every batch twice"),
    ],
)
def test_keys_that_cannot_be_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**words)


def test_cutoffs_survive_json():
    assert ModelConfig(softmax="adaptive", cutoffs=[20, 60]) == ModelConfig(softmax="adaptive", cutoffs=(20, 60))


def test_only_language_models_have_an_adaptive_softmax():
    config = dataclasses.replace(BASE, softmax="adaptive")
    with pytest.raises(ConfigError, match="softmax=adaptive needs a suite of language models"):
        SequenceModel(config, registry.load("hgrn2"), {}, "chunked", V, T)


def test_a_uniform_model_loses_the_logarithm_of_its_vocabulary():
    model = build()
    nn.init.zeros_(model.head.weight)
    torch.testing.assert_close(model.losses(tokens(1), tokens(2))[0], torch.full((3, T), math.log(V)))
