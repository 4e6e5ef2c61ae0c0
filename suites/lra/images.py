"""LRA Image: CIFAR-10 in grey or colour, from its authors' pickles or binaries, folders of pictures, or hub parquet.

Shape letters: N items, H height, W width, C channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from hgrn2_bench.cifar import CIFAR10, COUNTS
from hgrn2_bench.cifar_readers import Batch, read_batches
from hgrn2_bench.config import require
from hgrn2_bench.images import EMPTY, grey
from hgrn2_bench.subsets import check_count, drawn, random_parts
from suites.lra.items import Split
from suites.lra.places import Place


@dataclass(frozen=True)
class ImageOptions:
    """How CIFAR-10 is read. The defaults are the published ones (state-spaces/s4 src/dataloaders/basic.py)."""

    grey: bool = True
    """One channel, Pillow's `L`; else red, green and blue."""
    val_split: float = 0.1
    """Share of the training images kept for validation."""
    items: dict[str, int] = field(default_factory=dict)
    """At most so many items of a split, drawn by the seed; all of a split that is not named here, or with 0."""
    seed: int = 42
    counts: dict[str, int] = field(default_factory=lambda: dict(COUNTS))
    """Items that a split must have; a split that is not named here may have any number."""

    def __post_init__(self) -> None:
        require(0 < self.val_split < 1, f"val_split={self.val_split} must be above 0 and below 1")


def read_images(place: Place, options: ImageOptions) -> dict[str, Split]:
    """The splits train, val (a part of the training images, drawn as torch's `random_split` draws) and test. DataError names the file."""
    train, test = (_joined(list(image_batches(place, split)), options.grey) for split in ("train", "test"))
    for split, whole in (("train", train), ("test", test)):
        check_count(f"{place}, {split}", len(whole) + sum(whole.skipped.values()), options.counts.get(split))
    number = len(train)
    kept = int(number * (1 - options.val_split))
    train_N, val_N = random_parts((kept, number - kept), options.seed)
    parts = {"train": (train, train_N), "val": (train, val_N), "test": (test, np.arange(len(test)))}
    return {split: _part(whole, drawn(indices, options.items.get(split, 0), options.seed)) for split, (whole, indices) in parts.items()}


def _joined(batches: list[Batch], in_grey: bool) -> Split:
    pixels_NHWC = np.concatenate([grey(batch.pixels_NHW3) if in_grey else batch.pixels_NHW3 for batch in batches])
    empty = sum(len(batch.empty) for batch in batches)
    return Split(pixels_NHWC, np.concatenate([batch.labels_N for batch in batches]), skipped={EMPTY: empty} if empty else {})


def _part(whole: Split, indices_N: np.ndarray) -> Split:
    assert isinstance(whole.inputs, np.ndarray)
    return Split(whole.inputs[indices_N], whole.labels_N[indices_N], skipped=whole.skipped)


def image_batches(place: Place, split: str) -> Iterator[Batch]:
    """Images of a split, file by file. DataError names the file, and the row in it, that cannot be used."""
    yield from read_batches(CIFAR10, place.layout, place.of(split))
