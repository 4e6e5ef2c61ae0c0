"""What every source of data gives: labelled sequences of token ids, or labelled images, held in few arrays.

Shape letters: N items, H height, W width, C channels, S tokens of all items together.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Texts:
    """N sequences of token ids, one after another."""

    ids_S: np.ndarray
    """uint8 or int16."""
    ends_N: np.ndarray
    """int64: where each sequence ends; it begins where the one before it ends."""

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.ends_N)

    def __getitem__(self, i: int) -> np.ndarray:
        """The ids of sequence i."""
        return self.ids_S[self.ends_N[i - 1] if i else 0 : self.ends_N[i]]

    @property
    def lengths_N(self) -> np.ndarray:
        """Tokens of each sequence."""
        return np.diff(self.ends_N, prepend=0)


@dataclass(frozen=True)
class Split:
    """The items of one split, with what became of those that are not as they were."""

    inputs: Texts | np.ndarray
    """Sequences, or images uint8 (N, H, W, C)."""
    labels_N: np.ndarray
    """int64."""
    second: Texts | None = None
    """Of a pair of documents the other one."""
    truncated: int = 0
    """Items cut to the greatest length."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Items left out, by reason."""
    vocab_size: int = 0
    """Ids that a text may have, those that these items lack included; 0 for images."""

    def __len__(self) -> int:
        """Number of items."""
        return len(self.labels_N)


def take_texts(texts: Texts, indices_N: np.ndarray) -> Texts:
    """Some sequences, in the order of the indices; the same object where they are all, in order."""
    if np.array_equal(indices_N, np.arange(len(texts))):
        return texts
    ends_N = np.cumsum(texts.lengths_N[indices_N])
    ids_S = np.empty(ends_N[-1] if len(ends_N) else 0, texts.ids_S.dtype)
    for i, end in zip(indices_N, ends_N, strict=True):
        sequence = texts[i]
        ids_S[end - len(sequence) : end] = sequence
    return Texts(ids_S, ends_N)
