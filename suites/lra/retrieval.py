"""LRA Retrieval: pairs of papers (AAN) as characters, from the TSV files of the original archive (state-spaces/s4 src/dataloaders/lra.py).

A line is label, id, id, text, text, without header or quoting: texts hold double quotes, and a reader that obeys them merges lines.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from hgrn2_bench.config import require
from hgrn2_bench.errors import DataError
from hgrn2_bench.subsets import check_count, drawn
from suites.lra.characters import Row, count_vocabulary, encode
from suites.lra.items import Split
from suites.lra.places import Place

COUNTS = {"train": 147_086, "val": 18_090, "test": 17_437}
"""Train: state-spaces/s4. The other two are from the literature, unchecked: `data lra check` only notes a difference."""
COLUMNS = 5
IDS_ONLY = 3


@dataclass(frozen=True)
class RetrievalOptions:
    """How AAN is read. The defaults are the published ones."""

    max_length: int = 4000
    """Ids of a text, eos included."""
    min_freq: int = 1
    """98 ids on the real files."""
    items: dict[str, int] = field(default_factory=dict)
    """At most so many pairs of a split, drawn by the seed; all of a split that is not named here, or with 0."""
    seed: int = 42
    counts: dict[str, int] = field(default_factory=lambda: {"train": COUNTS["train"]})
    """Lines that a split must have; a split that is not named here may have any number."""

    def __post_init__(self) -> None:
        require(self.max_length > 1, f"max_length={self.max_length} must be at least 2: one character and eos")


def read_retrieval(place: Place, options: RetrievalOptions) -> dict[str, Split]:
    """The splits train, val and test. DataError names file and line, or the number of lines where it is not as published."""
    sources = {split: partial(retrieval_rows, place, split) for split in ("train", "val", "test")}
    for split in sources:
        place.of(split)
    vocabulary = count_vocabulary(sources["train"], options.max_length, options.min_freq)
    splits = {}
    for split, source in sources.items():
        encoded = encode(source, vocabulary, options.max_length, texts_per_row=2)
        number = len(encoded.labels_N)
        check_count(str(place.of(split)[0]), number, options.counts.get(split), "cut short, or lines merged by a program that obeys quotes")
        splits[split] = encoded.split(drawn(np.arange(number), options.items.get(split, 0), options.seed))
    return splits


def retrieval_rows(place: Place, split: str) -> Iterator[Row]:
    """Pairs of a split in the order of its lines. DataError names the line that is none."""
    for path in place.of(split):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield parse_line(line)
                except ValueError as error:
                    raise DataError(f"{path}:{number}: {error}") from None


def parse_line(line: bytes) -> Row:
    """Label 1 (same) or 0 and both texts. ValueError says what is wrong with the line."""
    try:
        fields = line.decode().removesuffix("\n").removesuffix("\r").split("\t")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if len(fields) == IDS_ONLY or (len(fields) == COLUMNS and not any(fields[IDS_ONLY:])):
        raise ValueError("ids without texts (some copies have only those, for the licence): rebuild them from the AAN corpus")
    if len(fields) != COLUMNS:
        raise ValueError(f"{len(fields)} columns instead of {COLUMNS} (label, id, id, text, text): merged or broken lines")
    try:
        label = float(fields[0])
    except ValueError:
        label = -1.0
    if label not in (0.0, 1.0):
        raise ValueError(f"label {fields[0][:20]!r} instead of 0.0 or 1.0: a header, or merged lines")
    return Row(int(label), (fields[3], fields[4]))
