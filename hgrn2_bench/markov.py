"""A generated text whose best possible loss is known exactly: an order-1 Markov source with facts to remember.

A document is `k1 v1 ... kF vF`, then free draws, then the separator. The F keys, symbols 1 to F, come in an order of this document's own;
the values are F different other symbols, drawn anew. A free draw follows the row of the symbol before it (the first one the stationary
distribution), but after a key comes its value of this document, which no row tells. Before each free draw the document ends with
probability 1 / (document - 2F): nobody need count, and a document has `document` tokens in the mean, recalled values not counted.

The past tells the source's state without doubt, so the optimum of a token is minus the log of the probability with which it was drawn.

Letters: N tokens, D documents, F facts, M free draws of all documents, S symbols without the separator, K successors in a row.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hgrn2_bench.corpus import Corpus, TokenSplit
from hgrn2_bench.markov_recipe import Recipe

Integers = NDArray[np.integer]
Floats = NDArray[np.floating]

SEPARATOR = 0
"""Ends a document, and stands before the first one."""
SOURCE_SEED = 0
"""Of the matrix and of the scored documents, whatever the cell's seed: all cells are measured on one text."""
SUCCESSORS = 8
"""Symbols that may follow one symbol; with flat Dirichlet weights their entropy is 1.72 nats in the mean."""
TRAIN_TOKENS = 2**22
SCORED_TOKENS = 2**16
"""Where all tokens are asked for, of which there is no end."""


@dataclass(frozen=True)
class Source:
    """The Markov matrix as its non-zero entries: `next_SK` may hold a symbol twice, whose probabilities then add up."""

    next_SK: Integers
    weight_SK: Floats
    start_S: Floats
    """The stationary distribution, from which a document's first free draw comes."""

    def draw(self, state_D: Integers, u_D: Floats) -> Integers:
        """The successors that uniform numbers pick; of state -1 a start."""
        start_D = np.searchsorted(self.start_S.cumsum(), u_D, side="right").clip(max=len(self.start_S) - 1)
        column_D = (self.weight_SK[state_D].cumsum(1) <= u_D[:, None]).sum(1).clip(max=self.next_SK.shape[1] - 1)
        return np.where(state_D < 0, start_D, self.next_SK[state_D, column_D])

    def nats(self, state_M: Integers, symbol_M: Integers) -> Floats:
        """Minus the log probability of each symbol after its state; of state -1 of a start."""
        found_MK = self.next_SK[state_M] == symbol_M[:, None]
        return -np.log(np.where(state_M < 0, self.start_S[symbol_M], (self.weight_SK[state_M] * found_MK).sum(1)))


def make_source(symbols: int, seed: int = SOURCE_SEED) -> Source:
    """A random source of S = `symbols` - 1 symbols: one successor from a cycle through all, the others anywhere."""
    rng, S = np.random.default_rng([seed, 0]), symbols - 1
    cycle, next_SK = rng.permutation(S), rng.integers(S, size=(S, min(SUCCESSORS, S)))
    next_SK[cycle, 0] = np.roll(cycle, 1)  # so that no symbol is a dead end
    weight_SK = rng.standard_exponential(next_SK.shape)
    weight_SK /= weight_SK.sum(1, keepdims=True)
    return Source(next_SK, weight_SK, _stationary(next_SK, weight_SK))


def _stationary(next_SK: Integers, weight_SK: Floats) -> Floats:
    """Where the matrix leaves a distribution as it is, by steps that half of the mass skips, so that no period keeps them from settling."""
    share_S = np.full(len(next_SK), 1 / len(next_SK))
    for _ in range(10_000):
        moved_S = np.bincount(next_SK.ravel(), (share_S[:, None] * weight_SK).ravel(), len(share_S))
        if np.abs(moved_S - share_S).max() < 1e-15:
            break
        share_S = (share_S + moved_S) / 2
    return share_S / share_S.sum()


def generate(recipe: Recipe, seed: int, train_tokens: int = 0, scored_tokens: int = 0) -> Corpus:
    """Train documents of this seed, validation and test documents that every seed shares; a shorter split is a prefix of a longer one."""
    source = make_source(recipe.symbols)
    scored = scored_tokens or SCORED_TOKENS
    splits = {
        "train": draw_split(source, recipe, train_tokens or TRAIN_TOKENS, (SOURCE_SEED, 1, seed)),
        "validation": draw_split(source, recipe, scored, (SOURCE_SEED, 2)),
        "test": draw_split(source, recipe, scored, (SOURCE_SEED, 3)),
    }
    card = card_of(source, recipe)
    return Corpus(splits, recipe.symbols, SEPARATOR, card, _hash(splits, card))


def card_of(source: Source, recipe: Recipe) -> Mapping[str, str]:
    """What the text is, in words."""
    entropy = max(0.0, float(source.start_S @ -(source.weight_SK * np.log(_merged(source))).sum(1)))
    made = f"markov: {recipe.symbols} symbols, {recipe.facts} facts, documents of about {recipe.document} tokens"
    return {
        "text": f"{made}, matrix and scored documents of seed {SOURCE_SEED}, {entropy:.4f} nats per free draw",
        "tokenizer": "none: the source's symbols are the tokens",
        "end of line": "none",
        "word": "none",
    }


def _merged(source: Source) -> Floats:
    """For each entry of the matrix the whole probability of its successor, repeated entries added up."""
    same_SKK = source.next_SK[:, :, None] == source.next_SK[:, None, :]
    return (same_SKK * source.weight_SK[:, None, :]).sum(2)


def _hash(splits: Mapping[str, TokenSplit], card: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(card, sort_keys=True).encode())
    for name, split in splits.items():
        digest.update(name.encode() + split.ids_N.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def draw_split(source: Source, recipe: Recipe, tokens: int, key: tuple[int, ...]) -> TokenSplit:
    """The first so many tokens of the text that a key names. Each kind of draw has a random stream of its own, in document order."""
    F, S, ends = recipe.facts, len(source.start_S), 1 / (recipe.document - 2 * recipe.facts)
    length_rng, fact_rng, body_rng = (np.random.default_rng([*key, kind]) for kind in range(3))
    draws_D = _draw_counts(length_rng, ends, 2 * F + 1, tokens)
    D = len(draws_D)
    facts_DF2 = _draw_facts(fact_rng, D, F, S)
    body = _draw_bodies(source, facts_DF2, draws_D, body_rng.random(draws_D.sum()))

    is_key_M = body.value_M >= 0
    recalled_D = np.bincount(body.document_M[is_key_M], minlength=D)
    length_D = 2 * F + draws_D + recalled_D + 1
    end_D, passed_D = length_D.cumsum(), np.arange(D) + 1  # of a free draw's place: headers up to its own, separators before it
    place_M = np.arange(len(is_key_M)) + is_key_M.cumsum() - is_key_M + (2 * F * passed_D + passed_D - 1)[body.document_M]
    header = (end_D - length_D)[:, None] + np.arange(2 * F)

    ids_N, optimum_N, recalled_N = np.full(end_D[-1], SEPARATOR, np.uint16), np.zeros(end_D[-1]), np.zeros(end_D[-1], bool)
    ids_N[header], optimum_N[header] = facts_DF2.reshape(D, -1) + 1, _header_nats(F, S)
    ids_N[place_M], optimum_N[place_M] = body.symbol_M + 1, body.nats_M - math.log1p(-ends)
    ids_N[place_M[is_key_M] + 1], recalled_N[place_M[is_key_M] + 1] = body.value_M[is_key_M] + 1, True
    optimum_N[end_D - 1] = -math.log(ends)
    document_N = np.repeat(np.arange(D), length_D)
    return TokenSplit(ids_N[:tokens], None, None, optimum_N[:tokens], recalled_N[:tokens], document_N[:tokens])


def _header_nats(F: int, S: int) -> Floats:
    """Nats (2F,) of keys and values in turn, each uniform over those that its document has left."""
    return np.log(np.array([F, S - F]) - np.arange(F)[:, None]).ravel()


def _draw_counts(rng: np.random.Generator, ends: float, overhead: int, tokens: int) -> Integers:
    """Free draws (D,) of as many documents as hold at least so many tokens, without the values that follow keys."""
    draws_D = np.empty(0, np.int64)
    while (draws_D + overhead).sum() < tokens:
        more = 1 + math.ceil((tokens - (draws_D + overhead).sum()) * ends)
        draws_D = np.concatenate([draws_D, rng.geometric(ends, more) - 1])
    enough = np.searchsorted((draws_D + overhead).cumsum(), tokens) + 1
    return draws_D[:enough]


def _draw_facts(rng: np.random.Generator, D: int, F: int, S: int) -> Integers:
    """Keys and values (D, F, 2) as symbols counted from 0, each uniform over those that its document has left."""
    facts_DF2, u_DF2 = np.empty((D, F, 2), np.int64), rng.random((D, F, 2))
    for pool, (first, size) in enumerate(((0, F), (F, S - F))):
        for i in range(F):
            number_D = (u_DF2[:, i, pool] * (size - i)).astype(np.int64) + first
            for taken_D in np.sort(facts_DF2[:, :i, pool], 1).T:
                number_D += number_D >= taken_D
            facts_DF2[:, i, pool] = number_D
    return facts_DF2


@dataclass(frozen=True)
class _Bodies:
    """The free draws of all documents: symbol, the value that it calls for (-1: none), nats within its row, and its document."""

    symbol_M: Integers
    value_M: Integers
    nats_M: Floats
    document_M: Integers


def _draw_bodies(source: Source, facts_DF2: Integers, draws_D: Integers, u_M: Floats) -> _Bodies:
    """Draw j of every document at once, for j = 0, 1, ...; the longest documents come first, so that those still open stand together."""
    order = np.argsort(-draws_D, kind="stable")
    begin_D = (draws_D.cumsum() - draws_D)[order]
    open_J = len(order) - np.searchsorted(np.sort(draws_D), np.arange(draws_D.max(initial=0)), side="right")
    facts_DF2, state_D = facts_DF2[order], np.full(len(order), -1)
    state_M, symbol_M, value_M = (np.full(len(u_M), -1) for _ in range(3))
    for j, opened in enumerate(open_J):
        place, before = begin_D[:opened] + j, state_D[:opened]
        symbol = source.draw(before, u_M[place])
        is_key = facts_DF2[:opened, :, 0] == symbol[:, None]
        value = np.where(is_key, facts_DF2[:opened, :, 1], -1).max(1, initial=-1)
        state_M[place], symbol_M[place], value_M[place] = before, symbol, value
        state_D[:opened] = np.where(value < 0, symbol, value)
    return _Bodies(symbol_M, value_M, source.nats(state_M, symbol_M), np.repeat(np.arange(len(draws_D)), draws_D))
