"""The adaptive softmax against its equation, with and without tied embeddings, and with ids in any order."""

import dataclasses

import pytest
import torch

from hgrn2_bench import language, registry
from hgrn2_bench.adaptive import AdaptiveHead, cutoffs_for
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.language import LanguageModel

V, D, CUTS = 40, 8, (5, 20)
COUNTS = {i: (i * 7) % V for i in range(0, V - 3)}
CONFIG = ModelConfig(d_model=D, num_layers=1, softmax="adaptive", cutoffs=CUTS, embed_std=1.0)


def build(counts=None):
    torch.manual_seed(0)
    head = AdaptiveHead(D, V, CUTS).double()
    if counts:
        head.rank(counts)
    return head


def by_definition(head, x_D, word, order):
    """log p of one word, its cluster found by counting."""
    rank = order.index(word)
    first = torch.cat([torch.stack([head.weight[w] @ x_D for w in order[: CUTS[0]]]), head.tails.weight @ x_D]).log_softmax(0)
    if rank < CUTS[0]:
        return first[rank]
    tail = 0 if rank < CUTS[1] else 1
    start, end = (CUTS[0], CUTS[1]) if tail == 0 else (CUTS[1], V)
    within = torch.stack([head.weight[w] @ x_D for w in order[start:end]]).log_softmax(0)
    return first[CUTS[0] + tail] + within[rank - start]


@pytest.mark.parametrize("counts", [None, COUNTS])
def test_nats_equal_the_definition_and_probabilities_sum_to_one(counts):
    head, x = build(counts), torch.randn(V, D, dtype=torch.float64)
    order = sorted(range(V), key=lambda i: (-counts.get(i, 0), i)) if counts else list(range(V))
    words = torch.arange(V)
    want = -torch.stack([by_definition(head, x[i], i, order) for i in range(V)])
    torch.testing.assert_close(head.nats(x, words), want)
    log_p = head(x)
    torch.testing.assert_close(-log_p[words, words], want)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(V).double())
    assert head.sorted == (counts is None)


def test_a_batch_that_meets_one_cluster_only_gives_every_weight_a_gradient():
    head = build()
    head.nats(torch.randn(6, D).double(), torch.zeros(6, dtype=torch.int64)).sum().backward()
    assert head.weight.grad[:5].abs().min() > 0
    assert head.weight.grad[5:].abs().max() == 0
    assert head.tails.weight.grad.abs().min() > 0


@pytest.mark.parametrize("tied", [False, True])
def test_model_of_an_adaptive_softmax_trains_and_scores_alike(tied, monkeypatch):
    torch.manual_seed(0)
    model = LanguageModel(dataclasses.replace(CONFIG, tie_embeddings=tied), registry.load("gla"), {}, "chunked", V, 16)
    model.rank(COUNTS)
    assert (model.head.weight is model.embedding.weight) == tied
    inputs, targets = torch.randint(V, (2, 2, 16), generator=torch.Generator().manual_seed(1))
    whole = model.loss(inputs, targets)
    monkeypatch.setattr(language, "CHUNK_LOGITS", 3 * V)
    loss = model.loss(inputs, targets)
    for one, other in zip(*(torch.autograd.grad(each, list(model.parameters())) for each in (loss, whole)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model.losses(inputs, targets)[0].mean(), loss.detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.loss(inputs, targets).dtype == torch.float32


def test_order_survives_saving():
    head, other = build(COUNTS), build()
    other.load_state_dict(head.state_dict())
    assert not other.sorted
    x = torch.randn(4, D).double()
    torch.testing.assert_close(other(x), head(x))


def test_cutoffs_fit_the_vocabulary_or_are_refused():
    assert cutoffs_for(50_264, ()) == (6283, 25_132)
    assert cutoffs_for(8, ()) == (1, 4)
    assert AdaptiveHead(D, 8).nats(torch.randn(8, D), torch.arange(8)).isfinite().all()
    with pytest.raises(ConfigError, match="needs a vocabulary of at least 8 words, not 7"):
        cutoffs_for(7, ())
    with pytest.raises(ConfigError, match=r"cutoffs=\[10,40\] must be below the vocabulary of 40 words"):
        cutoffs_for(40, (10, 40))
