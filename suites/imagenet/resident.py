"""Sets small enough to be held as pixels: CIFAR-10, CIFAR-100 and Fashion-MNIST.

Shape letters: N items, H height, W width, C channels.
"""

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hgrn2_bench.cifar import COUNTS as CIFAR_COUNTS
from hgrn2_bench.cifar_readers import Batch, read_batches
from hgrn2_bench.errors import DataError
from suites.imagenet.places import CIFARS, Place

FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
"""In the order of the labels (github.com/zalandoresearch/fashion-mnist, README)."""
IMAGES, LABELS = 2051, 2049
"""What the two kinds of IDX file begin with: unsigned bytes in three dimensions, in one."""
COUNTS = {"train": 60_000, "test": 10_000}


class Pixels(NamedTuple):
    """A split."""

    pixels_NHWC: np.ndarray
    """uint8."""
    labels_N: np.ndarray
    """int64."""
    empty: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    """Where pictures were left out because their files are empty, or do not decode."""


def class_names(dataset: str) -> tuple[str, ...]:
    """The classes of a set in the order of their labels."""
    return FASHION_CLASSES if dataset == "fashion" else CIFARS[dataset].classes


def read_pixels(place: Place, split: str, skip: bool = False) -> Pixels:
    """Every picture of a split, in its own size. DataError names the file that is damaged, or the split that is not whole.

    With `skip`, single pictures that do not decode are left out; files of many that are damaged are not.
    """
    if place.what == "fashion":
        read, expected = _read_fashion(place.of(split)), COUNTS[split]
    else:
        read, expected = _joined(list(read_batches(CIFARS[place.what], place.layout, place.of(split), skip))), CIFAR_COUNTS[split]
    number = len(read.labels_N) + len(read.empty) + len(read.damaged)
    if number != expected:
        raise DataError(f"{place}, {split}: {number:,} pictures, expected {expected:,}: a part of the data, or cut short")
    return read


def _joined(batches: Sequence[Batch]) -> Pixels:
    pixels_NHWC = np.concatenate([batch.pixels_NHW3 for batch in batches])
    labels_N = np.concatenate([batch.labels_N for batch in batches])
    empty = tuple(where for batch in batches for where in batch.empty)
    return Pixels(pixels_NHWC, labels_N, empty, tuple(where for batch in batches for where in batch.damaged))


def _read_fashion(paths: tuple[Path, ...]) -> Pixels:
    images, labels = paths
    pixels_NHW, labels_N = read_idx(images, IMAGES), read_idx(labels, LABELS)
    if len(pixels_NHW) != len(labels_N):
        raise DataError(f"{images}: {len(pixels_NHW)} images, {len(labels_N)} labels in {labels.name}: files of different sets")
    if len(labels_N) and labels_N.max() >= len(FASHION_CLASSES):
        raise DataError(f"{labels}: labels up to {labels_N.max()}; Fashion-MNIST has 0 to 9")
    return Pixels(pixels_NHW[..., None], labels_N.astype(np.int64))


def read_idx(path: Path, magic: int) -> np.ndarray:
    """The bytes of an IDX file, `.gz` or not, in the shape that it says. DataError for another kind of file, or one that is cut short."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path}: cut short or damaged ({error}): copy it again") from None
    dimensions = magic % 256
    head = np.frombuffer(content[: 4 * (1 + dimensions)], ">u4", count=min(1 + dimensions, len(content) // 4))
    if len(head) <= dimensions or head[0] != magic:
        raise DataError(
            f"{path}: no IDX file of {dimensions} dimensions: it begins with {content[:4].hex(' ')}, not {magic.to_bytes(4).hex(' ')}"
        )
    shape = tuple(map(int, head[1:]))
    size = int(np.prod(shape))
    if len(content) != head.nbytes + size:
        raise DataError(f"{path}: {len(content) - head.nbytes:,} bytes of values, expected {size:,}: cut short; copy it again")
    return np.frombuffer(content, np.uint8, offset=head.nbytes).reshape(shape).copy()  # or it could not be written, of which torch warns
