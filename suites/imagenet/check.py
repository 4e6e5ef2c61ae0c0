"""`data imagenet check DIR`: what a folder holds of ImageNet and other pictures, whether it is whole, how to repair it. Changes nothing.

Expected numbers: ImageNet's from its paper, CIFAR's and Fashion-MNIST's from their authors' descriptions.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hgrn2_bench import cifar
from hgrn2_bench.doctor import NOTE, OK, PROBLEM, Finding, counted
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.rows import parquet_rows
from suites.imagenet import resident
from suites.imagenet.check_folders import COPY_AGAIN, class_findings, folder_findings
from suites.imagenet.check_pictures import picture_findings
from suites.imagenet.decode import pillow
from suites.imagenet.files import is_jpeg
from suites.imagenet.places import CIFARS, EXPECTED, FOLDERS, PARQUET, WNID, Place, locate
from suites.imagenet.readers import class_names, pictures_in, read_split
from suites.imagenet.settings import RESIDENT
from suites.imagenet.stored import Stored

COUNTS = {"train": 1_281_167, "val": 50_000}
CLASSES = 1000
FASHION_MEAN, TOLERANCE = 72.9, 1.0
"""Of the training images' bytes (0.2860 of 255); MNIST's have 33.3."""


def findings(root: Path) -> Iterator[Finding]:
    """A line for each thing found in a folder, as it is found. ConfigError where it holds no pictures with classes."""
    small = [place for dataset in RESIDENT for place in locate(root, dataset)[0] if _is_meant(place)]
    taken = [(place.folder, place.files) for place in small]
    there, faults = locate(root, "folder")
    encoded = [place for place in there if (place.folder, place.files) not in taken]
    if not encoded and not small and not faults:
        raise ConfigError(f"no pictures with classes in {root}: expected for example {EXPECTED['imagenet']}")
    for fault in faults:
        yield Finding(PROBLEM, fault)
    for place in encoded:
        yield from _told("pictures", place, _encoded(place))
    for place in small:
        yield from _told(place.what, place, _resident(place))


def _told(name: str, place: Place, found: Iterator[Finding]) -> Iterator[Finding]:
    """Findings of one copy; what its reader refuses is a problem too."""
    yield Finding(OK, f"{name}: found {place}")
    try:
        yield from found
    except ConfigError as error:
        yield Finding(PROBLEM, f"{name}: {error}")


def _is_meant(place: Place) -> bool:
    """Whether pictures in files are CIFAR's: other sets have the same columns, and folders of some of the same names, but not this size."""
    first = place.files["train"][0] if place.files.get("train") else None
    if place.layout == PARQUET and first is not None:
        (image,) = next(parquet_rows(first, (cifar.IMAGE_COLUMN,)), (None,))
        return _size(image["bytes"] if isinstance(image, dict) else image or b"") == (cifar.SIZE, cifar.SIZE)
    if place.layout == FOLDERS and first is not None:
        classes = class_names(place)
        pictures = (first / name / next(pictures_in(first / name)) for name in classes)
        is_named = set(classes) in map(set, CIFARS[place.what].folder_names)
        return is_named and any(_size(path.read_bytes()) == (cifar.SIZE, cifar.SIZE) for path in pictures)
    return True


def _size(content: bytes) -> tuple[int, int] | None:
    """Width and height of an encoded picture; None for what is none."""
    try:
        with pillow("a picture").open(io.BytesIO(content)) as opened:
            return opened.width, opened.height
    except OSError:
        return None


def _encoded(place: Place) -> Iterator[Finding]:
    """Of pictures in files: the classes, the numbers, the pictures."""
    if place.layout == FOLDERS:
        yield from folder_findings(place)
    classes = class_names(place)
    yield from class_findings(classes)
    of_imagenet = len(classes) == CLASSES and all(map(WNID.fullmatch, classes))
    if "val" not in place.files and "test" not in place.files:
        yield Finding(NOTE, f"{place}: training data alone", "dataset=folder holds a tenth of them out as test data")
    for split in place.files:
        if split == "test" and of_imagenet:
            yield Finding(OK, "test: passed over, ImageNet's has no labels; val is the test data")
            continue
        try:
            stored = read_split(place, split, classes)
        except ConfigError as error:
            yield Finding(PROBLEM, f"{split}: {error}")
            continue
        yield from _label_findings(split, stored, len(classes), of_imagenet)
        yield from picture_findings(split, stored)


def _label_findings(split: str, stored: Stored, classes: int, of_imagenet: bool) -> Iterator[Finding]:
    if unlabelled := int(np.count_nonzero(stored.labels_N < 0)):
        text = f"{split}: {unlabelled:,} of {len(stored):,} pictures have no class (-1)"
        yield Finding(NOTE if split == "test" else PROBLEM, text, "passed over" if split == "test" else COPY_AGAIN)
        return
    counts = np.bincount(stored.labels_N, minlength=classes)
    smallest = int(counts[counts > 0].min())
    text = f"{split}: {len(stored):,} pictures, {smallest:,} to {int(counts.max()):,} in each of {np.count_nonzero(counts):,} classes"
    expected = COUNTS.get(split) if of_imagenet else None
    if expected is None or len(stored) == expected:
        yield Finding(OK, text + ", as expected" * (expected is not None))
    else:
        yield Finding(PROBLEM, f"{text}; ImageNet has {expected:,}", COPY_AGAIN)
    if classes and len(counts) > classes:
        yield Finding(PROBLEM, f"{split}: labels up to {len(counts) - 1} for {classes} classes", COPY_AGAIN)
    absent = np.flatnonzero(counts == 0).tolist()
    if absent:
        named = ", ".join(map(str, absent[:5])) + ", ..." * (len(absent) > 5)
        yield Finding(NOTE, f"{split}: no pictures of {counted(len(absent), 'class', 'es')}: {named}", COPY_AGAIN)


def _resident(place: Place) -> Iterator[Finding]:
    """Of pictures held as pixels: each split whole, nothing left out, the right set."""
    dataset = place.what
    for split in ("train", "test"):
        pixels = resident.read_pixels(place, split, skip=True)
        counts = ", ".join(f"{count:,}" for count in np.unique(np.bincount(pixels.labels_N)))
        yield Finding(OK, f"{dataset} {split}: {len(pixels.labels_N):,} pictures, by class {counts}")
        left_out = [*pixels.empty, *pixels.damaged]
        if left_out:
            text = f"{dataset} {split}: {counted(len(left_out), 'empty or damaged picture')}: {', '.join(left_out[:5])}"
            yield Finding(PROBLEM, text, f"{COPY_AGAIN}, or leave them out with policy=skip")
        mean = float(pixels.pixels_NHWC.mean())
        if dataset == "fashion" and split == "train" and abs(mean - FASHION_MEAN) > TOLERANCE:
            text = f"fashion: mean {mean:.1f} of 255, Fashion-MNIST has {FASHION_MEAN}"
            yield Finding(PROBLEM, text, "other pictures in files of the same names: MNIST's have 33.3")
    if dataset in CIFARS and is_jpeg(place):
        name = CIFARS[dataset].name
        yield Finding(NOTE, f"{dataset}: the images were compressed as JPEG, which {name} is not", f'report results as "{name} (JPEG)"')
