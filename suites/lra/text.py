"""LRA Text: IMDB reviews as characters, from aclImdb folders, hub parquet or JSON lines (state-spaces/s4 src/dataloaders/lra.py)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from hgrn2_bench.config import require
from hgrn2_bench.reviews import COUNTS, review_rows
from hgrn2_bench.subsets import check_count, drawn, permutation
from suites.lra.characters import Row, count_vocabulary, encode
from suites.lra.items import Split
from suites.lra.places import Place


@dataclass(frozen=True)
class TextOptions:
    """How IMDB is read. The defaults are the published ones."""

    max_length: int = 4096
    """Ids of a text, eos included."""
    min_freq: int = 15
    """A character seen less often in the training file, after cutting, is unk: 134 ids on the real files."""
    val_split: float = 0.0
    """Share of the training file kept for validation; 0: the test set is the validation set too, as published."""
    items: dict[str, int] = field(default_factory=dict)
    """At most so many items of a split, drawn by the seed; all of a split that is not named here, or with 0."""
    seed: int = 42
    counts: dict[str, int] = field(default_factory=lambda: dict(COUNTS))
    """Items that a split must have; a split that is not named here may have any number."""

    def __post_init__(self) -> None:
        require(self.max_length > 1, f"max_length={self.max_length} must be at least 2: one character and eos")
        require(0 <= self.val_split < 1, f"val_split={self.val_split} must be at least 0 and below 1")


def read_text(place: Place, options: TextOptions) -> dict[str, Split]:
    """The splits train, val and test; val is the test set unless `val_split` is given.

    The vocabulary is that of the whole training file, so that ids depend neither on the split nor on a subset. Texts of the training
    file keep its order, which is by class, where all are taken; a part of it is drawn by the seed. DataError names file and line.
    """
    sources = {split: partial(text_rows, place, split) for split in ("train", "test")}
    vocabulary = count_vocabulary(sources["train"], options.max_length, options.min_freq)
    read = {split: encode(source, vocabulary, options.max_length) for split, source in sources.items()}
    for split, encoded in read.items():
        check_count(f"{place}, {split}", len(encoded.labels_N), options.counts.get(split))
    number = len(read["train"].labels_N)
    order = permutation(number, options.seed) if options.val_split else np.arange(number)
    held_out = int(number * options.val_split)
    tested = np.arange(len(read["test"].labels_N))
    val = (read["train"], order[:held_out]) if options.val_split else (read["test"], tested)
    parts = {"train": (read["train"], order[held_out:]), "val": val, "test": (read["test"], tested)}
    return {name: whole.split(drawn(indices, options.items.get(name, 0), options.seed)) for name, (whole, indices) in parts.items()}


def text_rows(place: Place, split: str) -> Iterator[Row]:
    """Reviews of a split in the order of its files; label 0 negative, 1 positive, -1 none."""
    for path in place.of(split):
        yield from (Row(label, (text,)) for text, label in review_rows(place.layout, path))
