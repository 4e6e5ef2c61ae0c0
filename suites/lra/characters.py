"""Texts as characters: rows from a source, a vocabulary counted on them, ids. Memory holds the ids and one row.

Ids: pad 0, unk 1, eos 2, then characters by descending frequency in the training texts after cutting, ties in code point order
(torchtext's order; state-spaces/s4 src/dataloaders/lra.py). Every sequence ends with eos, cut ones too.

Shape letters: N items, S tokens of all items together.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from suites.lra.items import Split, Texts, take_texts

PAD, UNK, EOS = 0, 1, 2
SPECIALS = 3
CODE_POINTS = 0x110000
"""Size of Unicode."""


class Row(NamedTuple):
    """One item of a source: its label (negative: unlabelled) and its texts, one or two."""

    label: int
    texts: tuple[str, ...]


Source = Callable[[], Iterable[Row]]
"""Gives the rows of a split; can be asked again."""


@dataclass(frozen=True)
class Vocabulary:
    """The characters that have an id of their own, in the order of their ids."""

    characters: str

    def __len__(self) -> int:
        """Number of ids, pad, unk and eos included."""
        return len(self.characters) + SPECIALS

    @cached_property
    def table(self) -> np.ndarray:
        """The id of every code point, uint8, or int16 where there are more than 256 ids."""
        ids = np.full(CODE_POINTS, UNK, np.uint8 if len(self) <= 256 else np.int16)
        ids[[ord(each) for each in self.characters]] = np.arange(SPECIALS, len(self))
        return ids

    def ids(self, text: str) -> np.ndarray:
        """Ids of a text's characters, without eos."""
        return self.table[_code_points(text)]


@dataclass(frozen=True)
class Encoded:
    """The rows of one file, as ids."""

    texts: tuple[Texts, ...]
    """One for each text of a row."""
    labels_N: np.ndarray
    cut_N: np.ndarray
    """bool: whether a text of the item was longer than the limit."""
    vocab_size: int
    skipped: dict[str, int] = field(default_factory=dict)

    def split(self, indices_N: np.ndarray) -> Split:
        """The items of some indices."""
        texts = [take_texts(each, indices_N) for each in self.texts]
        second = texts[1] if len(texts) > 1 else None
        return Split(texts[0], self.labels_N[indices_N], second, int(self.cut_N[indices_N].sum()), dict(self.skipped), self.vocab_size)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def count_vocabulary(rows: Source, max_length: int, min_freq: int) -> Vocabulary:
    """The vocabulary of labelled training texts, of which `max_length - 1` characters are read."""
    counts = np.zeros(CODE_POINTS, np.int64)
    for row in rows():
        for text in row.texts if row.label >= 0 else ():
            seen = np.bincount(_code_points(text[: max_length - 1]))
            counts[: len(seen)] += seen
    frequent = np.flatnonzero(counts >= min_freq)
    return Vocabulary("".join(map(chr, frequent[np.argsort(-counts[frequent], kind="stable")])))


def encode(rows: Source, vocabulary: Vocabulary, max_length: int, texts_per_row: int = 1) -> Encoded:
    """Ids of all labelled rows, each text cut to `max_length - 1` characters and ended by eos; the others are counted."""
    buffers = [bytearray() for _ in range(texts_per_row)]
    ends: list[list[int]] = [[] for _ in range(texts_per_row)]
    labels, cut = [], []
    skipped: dict[str, int] = {}
    dtype = vocabulary.table.dtype
    end = np.array([EOS], dtype).tobytes()
    for row in rows():
        if row.label < 0:
            skipped["unlabelled"] = skipped.get("unlabelled", 0) + 1
            continue
        labels.append(row.label)
        cut.append(any(len(text) >= max_length for text in row.texts))
        for buffer, stops, text in zip(buffers, ends, row.texts, strict=True):
            buffer += vocabulary.ids(text[: max_length - 1]).tobytes() + end
            stops.append(len(buffer) // dtype.itemsize)
    texts = tuple(Texts(np.frombuffer(buffer, dtype), np.array(stops, np.int64)) for buffer, stops in zip(buffers, ends, strict=True))
    return Encoded(texts, np.array(labels, np.int64), np.array(cut, bool), len(vocabulary), skipped)
