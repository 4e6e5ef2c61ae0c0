"""The pictures of a configuration, split by split: encoded where they lie, or pixels in memory.

Shape letters: N items, H height, W width, C channels.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from hgrn2_bench.caching import folder_of, locked
from hgrn2_bench.cells import replace_file
from hgrn2_bench.config import require
from hgrn2_bench.errors import ConfigError, DataError
from hgrn2_bench.files import cache_folder, data_folder
from hgrn2_bench.images import EMPTY
from hgrn2_bench.subsets import drawn, random_parts
from suites.imagenet import readers, resident
from suites.imagenet.decode import decode, decode_aloud, pillow, quiet
from suites.imagenet.files import real_file
from suites.imagenet.places import Place, find
from suites.imagenet.settings import DRAWN, RESIDENT, ImagenetConfig
from suites.imagenet.stored import Stored

if TYPE_CHECKING:
    from PIL.Image import Image

DATA_SEED = 0
"""A set is split in one way, whatever the cell's seed."""
HELD_OUT, MOST_HELD_OUT = 0.1, 50_000
"""Of the training data, where selection has no data of its own: this share, at most so many."""
IMAGENET_CLASSES = 1000
REAL_COUNT = 50_000
DAMAGED = "damaged file"


@dataclass(frozen=True)
class PictureSplit:
    """N pictures with their classes; either `stored` or `pixels_NHWC` is there.

    Worker processes may be forked or spawned: of stored pictures names and places travel to a spawned one, the pictures do not.
    """

    labels_N: np.ndarray
    """int64."""
    stored: Stored | None = None
    pixels_NHWC: np.ndarray | None = None
    """uint8, in the set's own size."""
    orientation: str = "stored"
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Pictures left out, by reason."""

    def __len__(self) -> int:
        """Number of items."""
        return len(self.labels_N)

    def encoded(self, i: int) -> bytes:
        """The file of picture i, as it lies on the disk."""
        assert self.stored is not None
        return self.stored.read(i)

    def where(self, i: int) -> str:
        """Where picture i came from."""
        return f"picture {i}" if self.stored is None else self.stored.where(i)

    def image(self, i: int) -> Image:
        """Picture i in RGB. DataError, one line that names it, where it is damaged."""
        if self.pixels_NHWC is not None:
            pixels_HWC = self.pixels_NHWC[i]
            whole = np.repeat(pixels_HWC, 3, axis=-1) if pixels_HWC.shape[-1] == 1 else pixels_HWC
            return pillow("a picture").fromarray(whole)
        try:
            return decode(self.encoded(i), self.where(i), self.orientation)
        except DataError as error:
            raise DataError(f"{error}; copy it again, or leave it out with policy=skip") from None

    def take(self, indices_N: np.ndarray) -> PictureSplit:
        """Some pictures, in the order of the indices."""
        stored = None if self.stored is None else self.stored.take(indices_N)
        pixels_NHWC = None if self.pixels_NHWC is None else self.pixels_NHWC[indices_N]
        return replace(self, labels_N=self.labels_N[indices_N], stored=stored, pixels_NHWC=pixels_NHWC)


@dataclass(frozen=True)
class Pictures:
    """A set's splits `train`, `validation` and `test`."""

    splits: Mapping[str, PictureSplit]
    classes: tuple[str, ...]
    """Names in the order of the labels."""
    real_labels: tuple[tuple[int, ...], ...] | None = None
    """ReaL's classes of each test picture, of some none; None where they were not asked for."""
    notes: tuple[str, ...] = ()
    """What is not as the names of the splits say."""

    @property
    def skipped(self) -> int:
        """Pictures that were left out as damaged."""
        return sum(sum(split.skipped.values()) for split in self.splits.values())

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits over classes, and each picture's label and pixels; of encoded ones over the name in place of pixels."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for name in sorted(self.splits):
            split = self.splits[name]
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(split.labels_N).data)
            if split.pixels_NHWC is not None:
                digest.update(np.ascontiguousarray(split.pixels_NHWC).data)
            if split.stored is not None:
                split.stored.update(digest)
        return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=2)
def load(config: ImagenetConfig) -> Pictures:
    """The pictures of a configuration, from the data folder. ConfigError where they are not there, DataError where one is damaged."""
    require(config.dataset != DRAWN, "dataset=drawn is made, not read")
    place = find(data_folder(), config.dataset)
    whole, classes = (_resident if config.dataset in RESIDENT else _encoded)(config, place)
    splits = {name: _part(name, split, config) for name, split in _assigned(whole, config).items()}
    if config.policy == "skip":
        splits = {name: _without_damaged(split) for name, split in splits.items()}
    real = _real_labels(splits["test"]) if config.real_labels else None
    alone = len(whole) == 1
    return Pictures(splits, classes, real, ("the set has no test data: a part of its training data is held out as such",) * alone)


def _resident(config: ImagenetConfig, place: Place) -> tuple[dict[str, PictureSplit], tuple[str, ...]]:
    whole = {}
    for name in ("train", "test"):
        found = resident.read_pixels(place, name, skip=config.policy == "skip")
        if found.empty and config.policy == "error":
            raise DataError(f"{found.empty[0]}: {EMPTY}; copy it again, or leave it out with policy=skip")
        skipped = {reason: len(those) for reason, those in ((EMPTY, found.empty), (DAMAGED, found.damaged)) if those}
        whole[name] = PictureSplit(found.labels_N, pixels_NHWC=found.pixels_NHWC, skipped=skipped)
    return whole, resident.class_names(config.dataset)


def _encoded(config: ImagenetConfig, place: Place) -> tuple[dict[str, PictureSplit], tuple[str, ...]]:
    """Whole splits and class names; ImageNet's `val` is the test data, and its `test`, which has no labels, is passed over."""
    classes = readers.class_names(place)
    names = ("train", "val") if config.dataset == "imagenet" else [name for name in ("train", "val", "test") if name in place.files]
    whole = {name: readers.read_split(place, name, classes) for name in names}
    whole = {name: stored for name, stored in whole.items() if name != "test" or stored.labels_N.max() >= 0}
    last = max(int(stored.labels_N.max()) for stored in whole.values())
    classes = classes or tuple(map(str, range(last + 1)))
    lowest = min(int(stored.labels_N.min()) for stored in whole.values())
    require(lowest >= 0 and last < len(classes), f"{place}: labels {lowest} to {last} for {len(classes)} classes")
    wrong = f"{place}: {len(classes)} classes, ImageNet-1k has {IMAGENET_CLASSES:,}; choose dataset=folder for another set"
    require(config.dataset != "imagenet" or len(classes) == IMAGENET_CLASSES, wrong)
    return {name: PictureSplit(stored.labels_N, stored, orientation=config.orientation) for name, stored in whole.items()}, classes


def _assigned(whole: Mapping[str, PictureSplit], config: ImagenetConfig) -> dict[str, PictureSplit]:
    """The splits train, validation and test out of those that the set has.

    A set with `val` and `test` is used as it is; else either is the test data, and validation follows `config.validation`. Of a set
    with training data alone a part of these is the test data.
    """
    train, val, test = (whole.get(name) for name in ("train", "val", "test"))
    assert train is not None
    if val is not None and test is not None:
        return {"train": train, "validation": test if config.validation == "test" else val, "test": test}
    test = test or val
    if test is None:
        train, test = _held_out(train, config.test_examples)
    if config.validation == "test":
        return {"train": train, "validation": test, "test": test}
    train, validation = _held_out(train, config.validation_examples)
    return {"train": train, "validation": validation, "test": test}


def _held_out(split: PictureSplit, asked: int) -> tuple[PictureSplit, PictureSplit]:
    """What is left of a split, and a part of it drawn by seed; what was left out as empty counts with the first alone."""
    number = asked or min(int(len(split) * HELD_OUT), MOST_HELD_OUT)
    require(0 < number < len(split), f"{len(split):,} training pictures, of which {number:,} cannot be held out")
    kept_N, held_N = random_parts((len(split) - number, number), DATA_SEED)
    return split.take(np.sort(kept_N)), replace(split.take(np.sort(held_N)), skipped={})


def _part(name: str, split: PictureSplit, config: ImagenetConfig) -> PictureSplit:
    """As many pictures of a split as were asked for."""
    asked = {"train": config.train_examples, "validation": config.validation_examples, "test": config.test_examples}[name]
    there = len(split) + sum(split.skipped.values())
    require(asked <= there, f"{config.dataset} has {there:,} {name} pictures, {asked:,} are wanted")
    return split.take(np.sort(drawn(np.arange(len(split)), asked, DATA_SEED))) if asked else split


def _without_damaged(split: PictureSplit) -> PictureSplit:
    """A split without the pictures that do not decode.

    All are tried once, and again where a file's size or time is another; else those alone that did not, as the cache tells.
    """
    if split.stored is None:
        return split
    digest = hashlib.sha256()
    split.stored.update(digest)
    split.stored.stamp(digest)
    key = {"folder": split.stored.folder.name, "pictures": digest.hexdigest(), "orientation": split.orientation}
    folder = folder_of(cache_folder("imagenet"), "damaged", key)
    path = folder / "damaged.json"
    with locked(folder):
        damaged = find_damaged(split, json.loads(path.read_bytes()) if path.exists() else range(len(split)))
        replace_file(path, json.dumps(damaged))
    if not damaged:
        return split
    whole = np.setdiff1d(np.arange(len(split)), damaged)
    require(len(whole) > 0, f"{split.where(0)} and all others: {DAMAGED}")
    return replace(split.take(whole), skipped={DAMAGED: len(damaged)})


def find_damaged(split: PictureSplit, among: Sequence[int]) -> list[int]:
    """Which of some pictures of a split do not decode."""
    assert split.stored is not None
    stored = split.stored

    def is_damaged(i: int) -> bool:
        try:
            decode_aloud(stored.read(i), "", split.orientation)
        except DataError:
            return True
        return False

    with quiet(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # Pillow decodes outside Python's lock
        return [i for i, damaged in zip(among, pool.map(is_damaged, among), strict=True) if damaged]


def _real_labels(test: PictureSplit) -> tuple[tuple[int, ...], ...]:
    """ReaL's classes of each test picture, by the number in its name."""
    path = real_file(data_folder())
    try:
        labels = json.loads(path.read_bytes())
        right = len(labels) == REAL_COUNT
    except (ValueError, TypeError):
        right = False
    require(right, f"{path}: expected a list of {REAL_COUNT:,} lists of classes")
    assert test.stored is not None
    numbers = [readers.image_number(name) for name in test.stored.names_N.tolist()]
    for i, number in enumerate(numbers):
        if number is None or not 1 <= number <= REAL_COUNT:
            raise ConfigError(f"{test.where(i)}: real_labels=true needs the names that ImageNet gave: ILSVRC2012_val_00000001 and so on")
    return tuple(tuple(labels[number - 1]) for number in numbers if number is not None)
