"""Pooling over true lengths, the pair head, padding that changes nothing, batch norm in groups."""

import pytest
import torch
from torch import nn

from hgrn2_bench import measure, registry
from hgrn2_bench.classifier import Classifier, PairHead, pooled
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Recomputing
from hgrn2_bench.layers import BatchNorm

CONFIG = ModelConfig(d_model=16, num_layers=2, channel_mixer="glu", channel_width=16, embed_std=1.0)


def build(config=CONFIG, model="gla", **kind):
    torch.manual_seed(0)
    kind = {"vocab_size": 11, "classes": 3} | kind
    return Classifier(config, registry.load(model), {}, "chunked", 32, **kind)


def test_the_mean_runs_over_the_true_length():
    x = torch.arange(12.0).reshape(2, 3, 2)
    assert torch.equal(pooled(x, None), x.mean(1))
    assert torch.equal(pooled(x, torch.tensor([1, 2])), torch.stack([x[0, 0], x[1, :2].mean(0)]))
    x[0, 1:] = float("nan")
    assert torch.isfinite(pooled(x, torch.tensor([1, 3]))).all()


def test_the_pair_head_takes_both_means_their_difference_and_product():
    head = PairHead(4, 2)
    a, b = torch.randn(2, 3, 4)
    want = head.down(nn.functional.gelu(head.up(torch.cat([a, b, a - b, a * b], 1))))
    assert torch.allclose(head(torch.cat([a, b])), want)


@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_logits_are_those_of_the_sequence_alone(norm):
    model = build(ModelConfig(**{**vars(CONFIG), "norm": norm})).eval()
    tokens = torch.randint(1, 11, (2, 20), generator=torch.Generator().manual_seed(1))
    tokens[0, 7:] = 0
    together = model.logits(tokens, torch.tensor([7, 20]))
    torch.testing.assert_close(together[:1], model.logits(tokens[:1, :7], torch.tensor([7])), rtol=1e-5, atol=1e-5)


def test_published_runs_read_the_padding():
    model, tokens = build(mask_padding=False).eval(), torch.randint(1, 11, (1, 20), generator=torch.Generator().manual_seed(1))
    tokens[0, 7:] = 0
    read = model(tokens)
    assert torch.allclose(model.logits(tokens, torch.tensor([7])), model.head(read[:, :7].mean(1)))


def test_a_plain_module_is_refused_padding_before_anything_runs():
    class Own(nn.Module):
        def __init__(self, d_model):
            super().__init__()
            self.rnn = nn.GRU(d_model, d_model, batch_first=True)

        def forward(self, x_BTD):
            return self.rnn(x_BTD)[0]

    plain = type("Own", (Recomputing,), {"wrapped": Own})
    with pytest.raises(ConfigError, match=r"Own is a plain module, which cannot skip padding: give Own\.mask_padding=false"):
        Classifier(CONFIG, plain, {}, "chunked", 32, vocab_size=11, classes=3)
    for kind in ({"vocab_size": 11, "mask_padding": False}, {"channels": 1}):
        Classifier(CONFIG, plain, {}, "chunked", 32, classes=3, **kind)


def test_a_batch_of_pairs_gives_one_answer_for_each():
    model, tokens = build(pairs=True, classes=2).eval(), torch.randint(11, (6, 9), generator=torch.Generator().manual_seed(1))
    logits = model.logits(tokens, torch.full((6,), 9))
    assert logits.shape == (3, 2)
    alone = model.logits(tokens[[1, 4]], torch.full((2,), 9))
    torch.testing.assert_close(logits[1:2], alone, rtol=1e-5, atol=1e-5)
    assert model.probe(3, 8, 1).ndim == 0


def test_values_are_embedded_by_a_matrix():
    model = build(vocab_size=0, channels=3).eval()
    x = torch.randn(2, 9, 3)
    assert model.logits(x).shape == (2, 3)
    assert model.probe(2, 8, 2).ndim == 0
    total, own = measure.parameters(model)
    assert total - own == (3 * 16 + 16) + (16 * 3 + 3)


def test_the_loss_is_cross_entropy():
    model, tokens = build().eval(), torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(1))
    labels, lengths = torch.tensor([0, 1, 2, 0]), torch.tensor([9, 3, 5, 7])
    want = -model.logits(tokens, lengths).log_softmax(-1)[torch.arange(4), labels].mean()
    assert torch.allclose(model.loss(tokens, lengths, labels), want)


def test_a_group_of_sequences_has_its_own_statistics():
    """Four sequences in groups of two are normalised as two batches of two, and the running values are means of the groups'."""
    x = torch.randn(4, 5, 3) * 3 + 1
    norm, alone = BatchNorm(3, 2), nn.BatchNorm1d(3)
    parts = [alone(part.flatten(0, 1)).reshape(part.shape) for part in x.split(2)]
    torch.testing.assert_close(norm(x), torch.cat(parts))
    means = torch.stack([part.flatten(0, 1).mean(0) for part in x.split(2)])
    torch.testing.assert_close(norm.mean_D, 0.1 * means.mean(0))


def test_without_groups_it_is_torch_s_batch_norm():
    x, norm, theirs = torch.randn(4, 5, 3) * 3 + 1, BatchNorm(3), nn.BatchNorm1d(3)
    for _ in range(3):
        torch.testing.assert_close(norm(x), theirs(x.flatten(0, 1)).reshape(x.shape))
    torch.testing.assert_close(norm.mean_D, theirs.running_mean)
    torch.testing.assert_close(norm.var_D, theirs.running_var)
    torch.testing.assert_close(norm.eval()(x), theirs.eval()(x.flatten(0, 1)).reshape(x.shape))


def test_padding_counts_in_no_statistic():
    x, lengths = torch.randn(3, 6, 2), torch.tensor([6, 2, 4])
    real = torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])
    padded = x.clone()
    for row, n in zip(padded, lengths, strict=True):
        row[n:] = 1e6
    norm, theirs = BatchNorm(2), nn.BatchNorm1d(2)
    out, want = norm(padded, lengths), theirs(real)
    torch.testing.assert_close(torch.cat([row[:n] for row, n in zip(out, lengths, strict=True)]), want)
    torch.testing.assert_close(norm.var_D, theirs.running_var)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"norm_group": 4}, "norm_group=4 has no effect with norm=layernorm"),
        ({"norm": "batchnorm", "norm_group": -1}, "norm_group=-1 must be 0 .* or positive"),
        ({"channel_dropout": 0.1}, "channel_dropout=0.1 has no effect with channel_mixer=none"),
    ],
)
def test_norms_and_dropout_that_cannot_be_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**words)


def test_what_the_blocks_of_continuous_inputs_add_to_is_float32_under_autocast():
    model, seen = build(channels=2, vocab_size=0), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, found: seen.extend([given[0].dtype, found.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        model.logits(torch.rand(2, 5, 2))
    assert set(seen) == {torch.float32}
