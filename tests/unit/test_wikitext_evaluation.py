"""Scoring: every token once, in windows that mean what they say, added up over tokens; against models of known probabilities."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hgrn2_bench import registry
from hgrn2_bench.blocks import Text
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.corpus import TokenSplit
from hgrn2_bench.interfaces import Context
from hgrn2_bench.model import SequenceModel
from suites.wikitext.evaluation import (
    Ledger,
    Sums,
    by_position,
    carried,
    carried_card,
    excess,
    windowed,
    windowed_card,
)

CUTS = [(1, 0), (2, 0), (2, 1), (3, 1), (5, 0), (5, 4), (7, 3), (10, 0), (10, 9), (16, 5)]


class NGram:
    """Knows the n - 1 tokens before each target, as far as its window or its state holds them; where it does not, `start` stands."""

    can_carry = True

    def __init__(self, nats: np.ndarray, start: int = 0) -> None:
        self.nats, self.start = torch.from_numpy(nats).float(), start

    def losses(self, inputs_BT, targets_BT, states=None, return_states=False):
        older = self.nats.ndim - 2
        assert inputs_BT.shape == targets_BT.shape
        states = torch.full((len(inputs_BT), older), self.start) if states is None else states
        seen = torch.cat([states, inputs_BT], 1)
        context = [seen[:, i : i + inputs_BT.shape[1]] for i in range(older + 1)]
        return self.nats[(*context, targets_BT)], seen[:, seen.shape[1] - older :]


class Places:
    """Loses as many nats as its window holds inputs before a target's own."""

    can_carry = False

    def losses(self, inputs_BT, targets_BT, states=None, return_states=False):
        return torch.arange(inputs_BT.shape[1]).expand(inputs_BT.shape).float(), None


class Tiny(SequenceModel):
    """The real model, as much of it as scoring needs."""

    can_carry = True

    @torch.no_grad()
    def losses(self, inputs_BT, targets_BT, states=None, return_states=False):
        x_BTD, shared, carry, tables, left = self.embed(inputs_BT), self.shared(), {}, {}, []
        for block, state in zip(self.blocks, states or [None] * len(self.blocks), strict=True):
            ctx = Context(shared=shared, carry=carry, tables=tables, state=state, return_state=return_states)
            x_BTD = block(x_BTD, ctx)
            left.append(ctx.next_state)
        logits_BVT = self.head(self.norm(x_BTD)).transpose(1, 2)
        return F.cross_entropy(logits_BVT, targets_BT, reduction="none"), left


def table(order, symbols=4, seed=0):
    """Nats of a random n-gram model: (symbols,) * order."""
    share = np.random.default_rng(seed).dirichlet(np.ones(symbols), symbols ** (order - 1))
    return -np.log(share).reshape((symbols,) * order)


def text(tokens, seed=1, symbols=4, start=0, **kwargs):
    return Text(np.random.default_rng(seed).integers(symbols, size=tokens).astype(np.uint16), start, **kwargs)


def closed_form(nats, one, start=0):
    """Nats of every token from the table, in plain Python."""
    older = nats.ndim - 1
    seen = [start] * older + one.ids_N.tolist()
    return np.array([nats[tuple(seen[i : i + older + 1])] for i in range(len(one))])


def tiny(d_model=16):
    torch.manual_seed(0)
    config = ModelConfig(d_model=d_model, num_layers=2, conv=4, embed_std=1.0, forget_bias=3.0)
    return Tiny(config, registry.load("hgrn2"), {"expand_ratio": 8}, "chunked", 20, 16).eval()


@pytest.mark.parametrize(("block", "window"), CUTS)
@pytest.mark.parametrize("tokens", [1, 9, 10, 23])
def test_a_bigram_has_its_perplexity_under_every_window(tokens, block, window):
    one, nats = text(tokens, batch_size=3, start=2), table(2)
    want = closed_form(nats, one, start=2)
    got = windowed(NGram(nats), one, block, window)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert Sums.of(got).perplexity == pytest.approx(math.exp(want.mean()), rel=1e-6)


@pytest.mark.parametrize(("order", "window"), [(3, 1), (3, 4), (4, 2), (4, 5)])
def test_an_ngram_has_its_perplexity_once_the_window_holds_its_context(order, window):
    one, nats = text(101), table(order)
    want, model = closed_form(nats, one), NGram(nats)
    for block in range(window + 1, 12):
        np.testing.assert_allclose(windowed(model, one, block, window), want, rtol=1e-6)
    np.testing.assert_allclose(carried(model, one, chunk=7), want, rtol=1e-6)
    assert abs(windowed(model, one, 8, order - 3) - want).max() > 0.01  # one token of context too few


def test_ten_tokens_are_scored_ten_of_ten_with_the_nats_of_a_hand():
    """The same token again has probability 3/4, the other one 1/4; 0 | 0 0 1 1 1 0 1 1 0 0 changes 4 times."""
    model = NGram(-np.log(np.array([[0.75, 0.25], [0.25, 0.75]])))
    ten = Text(np.array([0, 0, 1, 1, 1, 0, 1, 1, 0, 0]), 0, batch_size=2)
    nats = 6 * math.log(4 / 3) + 4 * math.log(4)
    for block in range(1, 13):
        for window in range(block):
            sums = Sums.of(windowed(model, ten, block, window))
            assert sums.tokens == 10
            assert sums.nats == pytest.approx(nats, rel=1e-6)
            assert sums.perplexity == pytest.approx((4 / 3) ** 0.6 * 4**0.4, rel=1e-6)


@pytest.mark.parametrize(("block", "window"), CUTS)
@pytest.mark.parametrize(("tokens", "batch_size"), [(1, 2), (10, 1), (16, 32), (29, 2), (64, 3)])
def test_a_window_holds_the_old_tokens_that_it_says(tokens, batch_size, block, window):
    want = []
    while len(want) < tokens:
        old = window if want else 0
        new = min(block - old, tokens - len(want))
        want += range(old, old + new)
    np.testing.assert_array_equal(windowed(Places(), text(tokens, batch_size=batch_size), block, window), want)


@pytest.mark.parametrize(("block", "window"), [(4, 4), (4, 5), (4, -1), (0, 0)])
def test_a_window_without_new_tokens_is_refused(block, window):
    with pytest.raises(ValueError, match=f"window={window} must be at least 0 and less than block={block}"):
        windowed(Places(), text(5), block, window)


def test_batches_change_nothing():
    model, ids = tiny(), text(150, symbols=20).ids_N
    for block, window in ((16, 0), (16, 5), (16, 15)):
        one, *others = (windowed(model, Text(ids, 0, batch_size), block, window) for batch_size in (1, 2, 7, 64))
        for other in others:
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def test_a_carried_state_equals_one_long_forward():
    model, one = tiny(), text(150, symbols=20)
    want = windowed(model, one, 150)
    for chunk in (1, 7, 64, 149, 150, 4096):
        np.testing.assert_allclose(carried(model, one, chunk), want, rtol=1e-4, atol=1e-5)
    assert abs(windowed(model, one, 16) - want).max() > 0.01


def test_a_model_without_a_state_cannot_carry_it():
    with pytest.raises(ValueError, match="no state of fixed size"):
        carried(Places(), text(5))


def test_the_mean_is_over_tokens_and_never_over_windows():
    one = text(10)
    nats_N = windowed(Places(), one, 8)
    assert Sums.of(nats_N).mean == pytest.approx((28 + 1) / 10)
    assert Sums.of(nats_N).mean != pytest.approx((28 / 8 + 1 / 2) / 2)


def test_all_means_come_from_one_sum():
    sums = Sums(nats=12.0, tokens=10, words=4, bytes=30)
    assert sums.mean == 1.2
    assert sums.perplexity == pytest.approx(math.exp(1.2))
    assert sums.word_perplexity == pytest.approx(math.exp(3.0))
    assert sums.bits_per_byte == pytest.approx(0.4 / math.log(2))


def test_a_sum_is_taken_in_float64():
    nats_N = np.full(3_000_001, 0.1, np.float32)
    assert Sums.of(nats_N).nats == pytest.approx(3_000_001 * float(np.float32(0.1)), rel=1e-12)


def test_words_and_bytes_are_those_of_the_split():
    split = TokenSplit(np.zeros(3, np.uint16), words=2, bytes=9)
    assert Sums.of(np.ones(3, np.float32), split) == Sums(3.0, 3, 2, 9)


def test_an_empty_split_has_no_mean_and_a_single_token_has_one():
    model = NGram(table(2))
    for score in (lambda one: windowed(model, one, 8, 3), lambda one: carried(model, one), lambda one: by_position(model, one, 16, 8)[1]):
        none, single = Sums.of(score(text(0)), TokenSplit(np.zeros(0), 0, 0)), Sums.of(score(text(1)))
        assert (none.nats, none.tokens) == (0.0, 0)
        assert none.mean is none.perplexity is none.word_perplexity is none.bits_per_byte is None
        assert single.tokens == 1
        assert single.perplexity == pytest.approx(math.exp(closed_form(table(2), text(1))[0]))
    assert Sums(1000.0, 1).perplexity == math.inf
    assert math.isnan(Sums(math.nan, 1).perplexity)


@pytest.mark.parametrize(("tokens", "curve", "trained"), [(100, 16, 4), (100, 24, 6), (7, 16, 4), (33, 1, 1), (64, 32, 64)])
def test_the_loss_by_position_counts_every_token_once(tokens, curve, trained):
    bins, nats_N = by_position(Places(), text(tokens, batch_size=2), curve, trained)
    assert [each.first for each in bins] == [0, *(each.last for each in bins[:-1])]
    assert bins[-1].last == curve
    assert min(trained, curve) in [each.last for each in bins]
    assert sum(each.sums.tokens for each in bins) == tokens == len(nats_N)
    assert sum(each.sums.nats for each in bins) == pytest.approx(nats_N.sum())
    for each in bins:
        places = [i % curve for i in range(tokens) if each.first <= i % curve < each.last]
        assert each.sums.mean == (pytest.approx(sum(places) / len(places)) if places else None)
    assert all(each.last <= 2 * each.first for each in bins if each.first)


def test_long_blocks_are_read_with_as_many_tokens_at_once_as_short_ones():
    read = []

    class Watched(Places):
        def losses(self, inputs_BT, targets_BT, states=None, return_states=False):
            read.append(tuple(inputs_BT.shape))
            return super().losses(inputs_BT, targets_BT)

    by_position(Watched(), text(200, batch_size=8), curve=32, trained=8)
    assert read == [(2, 32)] * 3 + [(1, 8)]
    with pytest.raises(ValueError, match="curve=0"):
        by_position(Watched(), text(5), 0, 4)


def test_a_ledger_takes_no_token_twice_and_leaves_none_out():
    ledger = Ledger(text(5))
    ledger.add(0, torch.ones(3))
    for first, count in ((2, 1), (4, 1), (3, 3)):
        with pytest.raises(RuntimeError, match="when 3 already were"):
            ledger.add(first, torch.ones(count))
    with pytest.raises(RuntimeError, match="3 of 5 tokens"):
        ledger.close()


def test_the_excess_is_told_apart_for_free_and_recalled_tokens():
    recalled, optimum = np.array([False, True, False, True, True]), np.array([1.0, 0.0, 2.0, 0.0, 0.0])
    split = TokenSplit(np.zeros(5, np.uint16), None, None, optimum, recalled)
    found = excess(np.array([1.5, 3.0, 2.0, 0.0, 0.6], np.float32), split)
    assert (found.free.tokens, found.recalled.tokens) == (2, 3)
    assert found.free.mean == pytest.approx(0.25)
    assert found.recalled.mean == pytest.approx(1.2)
    with pytest.raises(ValueError, match="only a generated source"):
        excess(np.zeros(5), TokenSplit(np.zeros(5), None, None))


def test_cards_tell_what_differs():
    corpus = {"tokenizer": "gpt2 0123456789abcdef", "end of line": "one token"}
    cards = [
        windowed_card(corpus, "nats per token", 512),
        windowed_card(corpus, "nats per word", 512),
        windowed_card(corpus, "nats per token", 256),
        windowed_card(corpus, "nats per token", 512, 400),
        carried_card(corpus, "nats per token"),
        windowed_card(corpus | {"tokenizer": "bytes"}, "nats per token", 512),
    ]
    assert all(isinstance(text, str) for card in cards for pair in card.items() for text in pair)
    assert all(a != b and set(a) == set(b) for a, b in itertools.combinations(cards, 2))
