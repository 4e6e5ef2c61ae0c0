"""A tokenised corpus: one array of token ids for each split, in the order of the text. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hgrn2_bench.text_tokenizers import Vocabulary


@dataclass(frozen=True)
class TokenSplit:
    """One split: ids (N,) of some unsigned or signed integer type, memory-mapped where they come from files."""

    ids_N: np.ndarray
    words: int | None
    """Words of the text, each end of line counting as one where the card says so; None where the source has no words."""
    bytes: int | None
    """UTF-8 bytes of the original text, line ends included; None where the source has no text."""
    optimum_N: np.ndarray | None = None
    """Of a generated source: the nats that the best predictor, which knows the source and all earlier tokens, loses on each token."""
    recalled_N: np.ndarray | None = None
    """Of a generated source: which tokens only the memory of an earlier fact predicts."""
    document_N: np.ndarray | None = None
    """Of a generated source: the number of the document that each token belongs to."""


@dataclass(frozen=True)
class Corpus:
    """Splits by name, `train`, `validation`, `test` and further ones that are only scored, and what tells this text from any other."""

    splits: Mapping[str, TokenSplit]
    vocab_size: int
    """Rows of the embedding, made-up entries included where the source pads its dictionary."""
    start_id: int
    """What stands before the first token of a split."""
    card: Mapping[str, str]
    """How the text became tokens, in words: tokenizer with its hash, end-of-line rule, what counts as a word."""
    hash: str
    """16 hex digits over all ids of all splits and the card."""
    skipped: int = 0
    vocabulary: Vocabulary | None = None
    """Of the tokenizer, where its card does not tell it."""
