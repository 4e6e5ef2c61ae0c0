"""The generated source: its optimum against an enumeration of everything that it can draw, its text against its rules, its seeds."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.markov import SEPARATOR, card_of, draw_split, generate, make_source
from hgrn2_bench.markov_recipe import Recipe


def config(symbols=12, facts=2, document=16):
    return Recipe(symbols, facts, document)


def probabilities(source, settings, length):
    """The probability of every text of so many tokens from a document's start on, summed over all ways in which it can be drawn."""
    found, ends, F, S = defaultdict(float), 1 / (settings.document - 2 * settings.facts), settings.facts, settings.symbols - 1
    headers = [
        [token for pair in zip(keys, values, strict=True) for token in pair]
        for keys in itertools.permutations(range(1, F + 1))
        for values in itertools.permutations(range(F + 1, S + 1), F)
    ]

    def follow(text, share, told, last):
        if len(text) >= length:
            found[tuple(text[:length])] += share
        elif last is None:
            for header in headers:
                follow([*text, *header], share / len(headers), dict(zip(header[::2], header[1::2], strict=True)), 0)
        else:
            follow([*text, SEPARATOR], share * ends, {}, None)
            row = zip(source.next_SK[last - 1], source.weight_SK[last - 1], strict=True) if last else enumerate(source.start_S)
            for symbol, weight in row:
                drawn = [symbol + 1, *([told[symbol + 1]] if symbol + 1 in told else [])]
                follow([*text, *drawn], share * (1 - ends) * weight, told, drawn[-1])

    follow([], 1.0, {}, None)
    return found


def starts(split, length):
    """Where documents begin that have so many tokens of text after them."""
    begins = np.flatnonzero(np.diff(split.document_N, prepend=-1))
    return begins[begins + length <= len(split.ids_N)]


@pytest.mark.parametrize(("symbols", "facts", "document", "length"), [(4, 0, 3, 6), (4, 1, 5, 7), (6, 2, 6, 7)])
def test_the_optimum_is_that_of_an_enumeration_of_the_source(symbols, facts, document, length):
    source, settings = make_source(symbols), config(symbols, facts, document)
    exact = probabilities(source, settings, length)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-12)
    prefixes = defaultdict(float, {(): 1.0})
    for text, share in exact.items():
        for end in range(1, length + 1):
            prefixes[text[:end]] += share
    split = draw_split(source, settings, 50_000, (7,))
    seen, losses = Counter(), []
    for begin in starts(split, length):
        text = tuple(split.ids_N[begin : begin + length].tolist())
        seen[text] += 1
        losses.append(split.optimum_N[begin : begin + length].sum())
        if seen[text] == 1:
            want = [math.log(prefixes[text[:end]] / prefixes[text[: end + 1]]) for end in range(length)]
            np.testing.assert_allclose(split.optimum_N[begin : begin + length], want, atol=1e-9)
    entropy = -sum(share * math.log(share) for share in exact.values() if share)
    assert abs(np.mean(losses) - entropy) < 4 * np.std(losses) / len(losses) ** 0.5
    for text, share in exact.items():
        expected = share * len(losses)
        assert abs(seen[text] - expected) < 5 * expected**0.5 + 5


def test_a_text_keeps_its_rules():
    settings = config(symbols=16, facts=3, document=40)
    split = draw_split(make_source(16), settings, 20_000, (3,))
    ids, place, document, told = split.ids_N.tolist(), 0, 0, {}
    for i, token in enumerate(ids):
        assert split.document_N[i] == document
        if place < 6:
            assert token not in (*told, *told.values())
            assert (1 <= token <= 3) if place % 2 == 0 else (4 <= token <= 15)
            told |= {ids[i - 1]: token} if place % 2 else {}
        recalled = place > 6 and ids[i - 1] in told
        assert split.recalled_N[i] == recalled
        if recalled:
            assert token == told[ids[i - 1]]
            assert split.optimum_N[i] == 0
        place, document, told = (0, document + 1, {}) if token == SEPARATOR and place >= 6 else (place + 1, document, told)
    assert document > 300
    assert split.recalled_N.mean() > 0.05


def test_documents_have_their_mean_length_without_recalled_values():
    split = draw_split(make_source(16), config(symbols=16, facts=3, document=40), 200_000, (5,))
    free = np.bincount(split.document_N[~split.recalled_N])[:-1]
    assert abs(free.mean() - 40) < 4 * free.std() / len(free) ** 0.5


def test_the_start_is_stationary_and_every_symbol_can_be_reached():
    source = make_source(40)
    matrix = np.zeros((39, 39))
    np.add.at(matrix, (np.arange(39)[:, None], source.next_SK), source.weight_SK)
    np.testing.assert_allclose(matrix.sum(1), 1)
    np.testing.assert_allclose(source.start_S @ matrix, source.start_S, atol=1e-12)
    assert (source.start_S > 0).all()
    entropy = -(source.start_S[:, None] * matrix * np.log(matrix, where=matrix > 0, out=np.zeros_like(matrix))).sum()
    assert f"{entropy:.4f} nats" in card_of(source, config(40))["text"]
    assert entropy < 0.6 * math.log(39)


def test_a_shorter_text_is_a_prefix_of_a_longer_one():
    source, settings = make_source(12), config()
    short, long = (draw_split(source, settings, tokens, (1, 2)) for tokens in (777, 5000))
    for name in ("ids_N", "optimum_N", "recalled_N", "document_N"):
        np.testing.assert_array_equal(getattr(short, name), getattr(long, name)[:777])


def test_seeds_change_the_training_text_and_nothing_else():
    first, again, other = (generate(config(), seed, 3000, 1000) for seed in (0, 0, 1))
    assert first.hash == again.hash != other.hash
    assert first.card == other.card
    assert (first.splits["train"].ids_N != other.splits["train"].ids_N).any()
    for split in ("validation", "test"):
        np.testing.assert_array_equal(first.splits[split].ids_N, other.splits[split].ids_N)
    texts = {corpus.splits[split].ids_N[:1000].tobytes() for corpus in (first, other) for split in corpus.splits}
    assert len(texts) == 4
    assert {split: len(each.ids_N) for split, each in first.splits.items()} == {"train": 3000, "validation": 1000, "test": 1000}
    assert first.splits["train"].ids_N.max() < first.vocab_size == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"symbols": 8, "facts": 4}, "are different symbols"), ({"document": 5, "facts": 2}, "must be at least 6")],
)
def test_facts_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        config(**changes)


def test_the_text_is_the_one_that_results_were_measured_on():
    assert generate(Recipe(symbols=32, facts=4, document=128), 0, 4096, 1024).hash == "2040a2f1659f7a6d"
