"""ListOps as a model reads it: ids by how often a token occurs in training, cut, with an end (state-spaces/s4, src/dataloaders/lra.py).

Shape letters: N expressions, S tokens of all expressions together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hgrn2_bench.subsets import drawn
from suites.lra.items import Split, Texts, take_texts
from suites.lra.listops import CLOSE, CODES, TOKENS, Examples, evaluate, expression, tokenize

SPECIALS = ("<pad>", "<unk>", "<eos>")
"""Tokens with the ids 0, 1, 2; state-spaces/s4. Nothing here is unknown: a text with a foreign token is refused."""
EOS = SPECIALS.index("<eos>")
MAX_TOKENS = 2_048
"""Greatest length with <eos>, as published; no published or generated expression reaches it."""
PART_SEED = 42
"""Draws the part of a file that is asked for."""


@dataclass(frozen=True)
class Vocabulary:
    """Ids of tokens: SPECIALS, then the closed set of tokens by falling frequency in the training split, ties by name."""

    tokens: tuple[str, ...]
    """In the order of their ids."""

    @classmethod
    def of(cls, train: Examples) -> "Vocabulary":
        """The vocabulary of a training split; a token that does not occur has its id nevertheless. The closing bracket is named X here."""
        counts = [np.count_nonzero(train.codes.ids_S == code) for code in range(len(TOKENS))]  # bincount would take 8 bytes a token
        ordered = sorted(TOKENS, key=lambda token: (-counts[CODES[token]], "X" if token == CLOSE else token))
        return cls((*SPECIALS, *ordered))

    @property
    def ids(self) -> np.ndarray:
        """The id of each code, uint8 (15,)."""
        return np.array([self.tokens.index(token) for token in TOKENS], np.uint8)

    def encode(self, text: str) -> np.ndarray:
        """The ids of an expression's text, uint8, without <eos>."""
        return self.ids[np.frombuffer(tokenize(text), np.uint8)]

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids, as published."""
        return expression(self._codes(ids))

    def evaluate(self, ids: np.ndarray) -> int:
        """The value of ids."""
        return evaluate(self._codes(ids))

    def _codes(self, ids: np.ndarray) -> list[int]:
        """The codes of ids up to the first <eos>, if there is one."""
        tokens = [self.tokens[i] for i in ids.tolist()]
        tokens = tokens[: tokens.index("<eos>")] if "<eos>" in tokens else tokens
        if any(token in SPECIALS for token in tokens):
            raise ValueError("special token inside an expression")
        return [CODES[token] for token in tokens]


def splits(examples: Mapping[str, Examples], max_tokens: int = MAX_TOKENS, items: Mapping[str, int] | None = None) -> dict[str, Split]:
    """What a model reads: the ids of the training split's vocabulary, cut to max_tokens - 1, then <eos>.

    Of a split that `items` names, at most so many examples, drawn by a seed; the vocabulary is that of all.
    """
    ids = Vocabulary.of(examples["train"]).ids
    return {name: _split(_some(each, (items or {}).get(name, 0)), ids, max_tokens) for name, each in examples.items()}


def _some(examples: Examples, number: int) -> Examples:
    rows_N = drawn(np.arange(len(examples.labels_N)), number, PART_SEED)
    return replace(examples, codes=take_texts(examples.codes, rows_N), labels_N=examples.labels_N[rows_N])


def _split(examples: Examples, ids: np.ndarray, max_tokens: int) -> Split:
    codes, lengths = examples.codes.ids_S, examples.codes.lengths_N
    kept = np.minimum(lengths, max_tokens - 1)
    truncated = int(np.count_nonzero(kept < lengths))
    if truncated:
        place_S = np.arange(len(codes)) - np.repeat(examples.codes.ends_N - lengths, lengths)
        codes = codes[place_S < np.repeat(kept, lengths)]
    ends = np.cumsum(kept + 1)
    ids_S, real_S = np.full(ends[-1], EOS, np.uint8), np.ones(ends[-1], np.bool_)
    real_S[ends - 1] = False
    ids_S[real_S] = ids[codes]
    return Split(Texts(ids_S, ends), examples.labels_N.astype(np.int64), truncated=truncated, skipped=dict(examples.skipped))
