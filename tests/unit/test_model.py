"""The model around a mixer, and what it is measured to cost."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from hgrn2_bench import measure, registry
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, recomputing
from hgrn2_bench.model import SequenceModel, bounds, sinusoid

BASE = ModelConfig(d_model=16, num_layers=2)


def build(name="hgrn2", vocab=11, length=12, settings=None, **changes):
    torch.manual_seed(0)
    return SequenceModel(dataclasses.replace(BASE, **changes), registry.load(name), settings or {}, "chunked", vocab, length)


def tokens(length=12):
    return torch.randint(11, (3, length), generator=torch.Generator().manual_seed(1))


def test_logits_are_those_of_the_whole_sequence_at_the_chosen_positions():
    model = build()
    where = torch.tensor([0, 13, 35])
    whole = model.head(model(tokens())).flatten(0, 1)
    assert torch.equal(model.logits(tokens(), where), whole[where])


@pytest.mark.parametrize("kind", ["none", "identity", "mlp", "glu"])
def test_block_adds_the_channel_mixer_of_the_normalised_residual(kind):
    model = build(channel_mixer=kind, num_layers=1)
    block = model.blocks[0]
    x = model.embedding(tokens())
    y = x + block.mixer(block.mixer_norm(x))
    if kind == "identity":  # Zoology's quirk: the normalised residual itself
        y = y + block.channel_norm(y)
    elif kind != "none":
        y = y + block.channel(block.channel_norm(y))
    torch.testing.assert_close(model(tokens()), model.norm(y))


def test_channel_width_zero_is_the_usual_width_and_is_refused_where_it_has_no_effect():
    assert build(channel_mixer="mlp").blocks[0].channel.up.out_features == 64
    assert build(channel_mixer="glu").blocks[0].channel.gate.out_features == 48
    assert build(channel_mixer="glu", channel_width=20).blocks[0].channel.gate.out_features == 20
    with pytest.raises(ConfigError, match="channel_width=20 has no effect with channel_mixer=none"):
        ModelConfig(channel_width=20)


@pytest.mark.parametrize("kind", ["learned", "sinusoid"])
def test_positions_are_added_to_the_embedding(kind):
    model, plain = build(positions=kind), build()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("position")})
    table = model.position.weight if kind == "learned" else sinusoid(12, 16)
    model.embedding.weight = nn.Parameter(torch.zeros(11, 16))
    x = table.expand(3, 12, 16)
    for block in plain.blocks:
        x = block(x, Context())
    torch.testing.assert_close(model(tokens()), plain.norm(x))


def test_learned_positions_refuse_a_longer_sequence():
    with pytest.raises(ValueError, match="13 tokens, but positions=learned knows only 12"):
        build(positions="learned")(tokens(13))


def test_lower_bounds_follow_their_conventions():
    table = torch.tensor([[0.0, 1.0], [0.5, 0.0], [1.0, -1.0]])
    share = table.exp() / table.exp().sum(0)
    torch.testing.assert_close(bounds(table, "inclusive"), torch.stack([0 * share[0], share[1], share[1] + share[2]]))
    torch.testing.assert_close(bounds(table, "exclusive"), torch.stack([0 * share[0], share[0], share[0] + share[1]]))
    same = torch.ones(4, 2)
    torch.testing.assert_close(bounds(same, "inclusive"), bounds(same, "exclusive"))


def test_lower_bound_is_one_learned_table_that_reaches_the_mixers():
    model = build(lower_bound="exclusive")
    assert model.bound_table.shape == (2, 16)
    model(tokens()).sum().backward()
    assert model.bound_table.grad.abs().sum() > 0
    assert build().bound_table is None


def test_tied_head_shares_the_embedding_and_counts_once():
    tied, free = build(tie_embeddings=True), build()
    assert tied.head.weight is tied.embedding.weight
    assert measure.parameters(free)[0] - measure.parameters(tied)[0] == 11 * 16
    assert measure.parameters(free)[1] == measure.parameters(tied)[1]


def test_embeddings_start_at_the_protocol_s_standard_deviation():
    assert build(vocab=5000, embed_std=1.0).embedding.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert build(vocab=5000, embed_std=0.02).embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_blanket_init_overrides_every_linear_of_the_mixers_but_keeps_the_forget_bias():
    model = build(init="blanket", d_model=64, forget_bias=2.0)
    linears = {name: m for name, m in model.blocks.named_modules() if isinstance(m, nn.Linear)}
    assert len(linears) >= 4
    for name, module in linears.items():
        expected = 0.02 / math.sqrt(4) if name.endswith("out_proj") else 0.02
        assert module.weight.std().item() == pytest.approx(expected, rel=0.1), name
    assert measure.effective(model)["median_decay_at_init"] == pytest.approx(1 / (1 + math.exp(-2)), abs=0.02)
    mamba = build("mamba", init="blanket")
    assert mamba.blocks[0].mixer.dt_proj.bias.abs().max() == 0  # the source's quirk erases the step sizes
    assert build("mamba").blocks[0].mixer.dt_proj.bias.abs().max() > 0


def test_published_size_of_hgrn2_on_mqar():
    """558,464 parameters at width 64, calculated from HGRN2's MQAR recipe."""
    config = {"d_model": 64, "channel_mixer": "identity", "tie_embeddings": True, "num_layers": 2}
    assert measure.parameters(build(vocab=8192, length=64, **config))[0] == 558_464


@pytest.mark.parametrize("name", sorted(registry.models()))
def test_state_bytes_are_the_sum_over_layers(name):
    model = build(name, conv=4)
    assert measure.state_bytes(model, 12) == sum(m.state_size(12, 4) for m in model.mixers)
    assert measure.state_bytes(model, 12, itemsize=2) < measure.state_bytes(model, 12)


def test_attention_s_state_grows_with_the_context_and_hgrn2_s_does_not():
    attention, hgrn2 = build("attention"), build()
    assert measure.state_bytes(attention, 24) == 2 * measure.state_bytes(attention, 12) == 2 * 2 * 2 * 12 * 16 * 4
    assert measure.state_bytes(hgrn2, 24) == measure.state_bytes(hgrn2, 12) == 2 * 16 * 16 * 4


def test_training_flops_count_matrices_recurrence_and_labelled_head():
    model = build("attention", settings={"bias": False}, num_layers=1)
    matrices, head = 4 * 16 * 16, 11 * 16
    attention = model.mixers[0].op_flops(12)
    assert attention == pytest.approx(4 * 16 * (12 + 1) / 2)
    assert measure.train_flops_per_token(model, 12, 0.5) == 3 * (2 * (matrices + 0.5 * head) + attention)


def test_effective_says_what_was_built():
    said = measure.effective(build(conv=4, settings={"expand_ratio": 8}))
    assert said["heads"] == 2
    assert said["kernel"] == "chunked.per_channel_decay"
    assert said["local_mixing"] == "conv 4"
    assert 0.4 < said["median_decay_at_init"] < 0.6
    assert measure.effective(build("attention"))["median_decay_at_init"] is None


class Backwards(nn.Module):
    """A plain module that looks ahead."""

    def __init__(self, d_model):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, x):
        return self.linear(x.flip(1))


def test_plain_module_that_looks_ahead_is_called_not_causal_and_its_flops_are_unknown():
    model = SequenceModel(BASE, recomputing(Backwards), {}, "module", 11, 12)
    assert measure.effective(model)["causal"] is False
    assert measure.train_flops_per_token(model, 12) is None
    assert measure.effective(build("attention"))["causal"] is True
    assert measure.effective(build("attention", settings={"causal": False}))["causal"] is False


def test_local_mixing_is_what_was_built_not_what_was_asked():
    asked = SequenceModel(dataclasses.replace(BASE, conv=4), recomputing(Backwards), {}, "module", 11, 12)
    assert measure.effective(asked)["local_mixing"] == "none"
    assert measure.effective(build(conv=3))["local_mixing"] == "conv 3"


# another mixer in layer 0


def test_layer_0_is_the_first_layer_s_mixer_with_its_default_settings():
    model = build("hgrn2", first_layer="base_conv", num_layers=3, settings={"expand_ratio": 8})
    assert [type(m).__name__ for m in model.mixers] == ["BaseConv", "HGRN2", "HGRN2"]
    assert [m.spec.layer for m in model.mixers] == [0, 1, 2]
    assert [m.spec.first for m in model.mixers] == [0, 1, 1]
    assert [dict(m.spec.settings) for m in model.mixers] == [{}, {"expand_ratio": 8}, {"expand_ratio": 8}]
    same = build("base_conv", first_layer="base_conv", num_layers=2, settings={"width": 5})
    assert [m.width for m in same.mixers] == [3, 5]
    assert {m.spec.first for m in build("hgrn2", num_layers=3).mixers} == {0}


@pytest.mark.parametrize(("first", "other"), [("base_conv", "attention"), ("hgrn2", "mamba"), ("rwkv7", "gla"), ("gla", "rwkv7")])
def test_a_model_with_another_first_layer_is_causal_and_trains(first, other):
    model = build(other, first_layer=first, conv=4)
    assert [type(m) for m in model.mixers] == [registry.load(first), registry.load(other)]
    one, two = tokens(), tokens()
    two[:, 7] = (two[:, 7] + 1) % 11
    torch.testing.assert_close(model(one)[:, :7], model(two)[:, :7])
    assert not torch.allclose(model(one)[:, 7:], model(two)[:, 7:])
    model(one).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.mixers[0].parameters())


def test_costs_and_facts_count_the_first_layer():
    mixed, alike = build("hgrn2", first_layer="base_conv"), build("hgrn2")
    assert measure.state_bytes(mixed, 12, 4) == sum(m.state_size(12, 4) for m in mixed.mixers) != measure.state_bytes(alike, 12, 4)
    found = measure.effective(mixed)
    assert found["layers"] == ["base_conv", "hgrn2"]
    assert found["kernel"] == "base_conv: the module's own; hgrn2: chunked.per_channel_decay"
    assert found["causal"] is True
    assert "layers" not in measure.effective(alike)


@pytest.mark.parametrize(
    ("name", "settings", "layers"),
    [
        ("hybrid", {"layers": ("gla", "attention")}, ["base_conv", "attention", "gla", "attention"]),
        ("base_conv", None, None),  # all alike
    ],
)
def test_layers_are_named_where_they_differ(name, settings, layers):
    model = build(name, first_layer="base_conv", num_layers=4, settings=settings)
    assert measure.effective(model).get("layers") == layers


def test_a_first_layer_of_the_model_s_own_kind_is_told_apart_by_its_settings():
    found = measure.effective(build("gla", first_layer="gla", settings={"num_heads": 2}))
    assert found["layers"] == ["gla (default settings)", "gla"]
    assert found["heads"] == "gla (default settings): 4; gla: 2"
    assert "layers" not in measure.effective(build("gla", first_layer="gla", settings={"num_heads": 4}))


def test_a_class_of_the_user_s_own_is_named_beside_the_first_layer():
    torch.manual_seed(0)
    config = dataclasses.replace(BASE, first_layer="gla")
    model = SequenceModel(config, recomputing(Backwards), {}, "chunked", 11, 12)
    assert measure.effective(model)["layers"] == ["gla", "Backwards"]
