"""LRA Image: CIFAR-10 in grey or colour, from its authors' pickles or binaries, folders of pictures, or hub parquet.

Shape letters: N items, H height, W width, C channels.
"""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hgrn2_bench.config import require
from hgrn2_bench.errors import DataError
from hgrn2_bench.files import subfolders
from hgrn2_bench.rows import parquet_rows
from suites.lra.formats import decode_image, grey
from suites.lra.items import Split
from suites.lra.places import CLASSES, NUMBERED, Place
from suites.lra.splits import check_count, drawn, random_parts

COUNTS = {"train": 50_000, "test": 10_000}
SIZE = 32
RECORD = 1 + 3 * SIZE * SIZE
"""Bytes of an item in a binary file: label, red, green, blue."""
PICTURES = (".png", ".jpg", ".jpeg")
EMPTY = "zero-byte file"


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


class Batch(NamedTuple):
    """Images in colour, uint8 (N, 32, 32, 3), their labels, and files left out because they are empty."""

    pixels_NHW3: np.ndarray
    labels_N: np.ndarray
    empty: tuple[str, ...] = ()


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
    layouts: dict[str, Callable[[Path], Batch]] = {
        "python pickles": _pickle_batch,
        "binary files": _binary_batch,
        "image folders": _folder_batch,
        "parquet": _parquet_batch,
    }
    for path in place.of(split):
        batch = layouts[place.layout](path)
        if not len(batch.labels_N):
            raise DataError(f"{path}: no images")
        if batch.labels_N.min() < 0 or batch.labels_N.max() >= len(CLASSES):
            raise DataError(f"{path}: labels {batch.labels_N.min()} to {batch.labels_N.max()}; CIFAR-10 has 0 to 9")
        yield batch


class _ArraysOnly(pickle.Unpickler):
    """Loads numpy arrays, bytes, strings, numbers, lists and dictionaries; a pickle that names anything else is refused, not run."""

    ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
        **{(f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0] for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(pickle.HIGHEST_PROTOCOL)[0] for core in ("core", "_core")},
    }

    def find_class(self, module: str, name: str) -> Any:
        """One of the few names that arrays need."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self.ALLOWED[module, name]


def _pickle_batch(path: Path) -> Batch:
    try:
        with path.open("rb") as file:
            found = _ArraysOnly(file, encoding="bytes").load()
        named = {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}
        pixels, labels = np.asarray(named["data"]), np.asarray(named["labels"])
    except Exception as error:  # damaged pickles raise nearly anything
        raise DataError(f"{path}: no CIFAR-10 pickle, or cut short ({type(error).__name__}: {error})") from None
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), RECORD - 1):
        raise DataError(f"{path}: data {pixels.dtype} {pixels.shape} for {len(labels)} labels; expected uint8 (N, {RECORD - 1})")
    return Batch(_planes(pixels), labels.astype(np.int64))


def _binary_batch(path: Path) -> Batch:
    raw = np.fromfile(path, np.uint8)
    if len(raw) % RECORD:
        raise DataError(f"{path}: {len(raw)} bytes, no multiple of {RECORD}: cut short, or CIFAR-100; copy it again")
    records = raw.reshape(-1, RECORD)
    return Batch(_planes(records[:, 1:]), records[:, 0].astype(np.int64))


def _planes(pixels: np.ndarray) -> np.ndarray:
    """Images of a plane for each colour, row by row, as (N, H, W, 3)."""
    return np.ascontiguousarray(pixels.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1))


def _folder_batch(folder: Path) -> Batch:
    """Pictures by class folder, in the order of CIFAR-10's labels; hidden folders are none."""
    names = {path.name: path for path in subfolders(folder)}
    classes = NUMBERED if set(names) == set(NUMBERED) else CLASSES
    if set(names) != set(classes):
        missing, foreign = sorted(set(classes) - set(names)), sorted(set(names) - set(classes))
        raise DataError(f"{folder}: class folders missing: {', '.join(missing) or 'none'}; unknown: {', '.join(foreign) or 'none'}")
    pixels, labels, empty = [], [], []
    for label, name in enumerate(classes):
        for path in sorted(path for path in names[name].iterdir() if path.suffix.lower() in PICTURES and not path.name.startswith(".")):
            if not path.stat().st_size:
                empty.append(str(path))
                continue
            pixels.append(decode_image(path, str(path), "RGB", SIZE))
            labels.append(label)
    return Batch(np.array(pixels), np.array(labels, np.int64), tuple(empty))


def _parquet_batch(path: Path) -> Batch:
    pixels, labels, empty = [], [], []
    for number, (image, label) in enumerate(parquet_rows(path, ("img|image", "label"))):
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes | None) or not isinstance(label, int):
            kinds = f"{type(content).__name__} and {type(label).__name__}"
            raise DataError(f"{path}, row {number}: image and label are {kinds}; expected the bytes of a file and a number")
        if not content:
            empty.append(f"{path}, row {number}")
            continue
        pixels.append(decode_image(content, f"{path}, row {number}", "RGB", SIZE))
        labels.append(label)
    return Batch(np.array(pixels), np.array(labels, np.int64), tuple(empty))
