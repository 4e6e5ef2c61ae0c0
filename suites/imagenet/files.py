"""What tells the files of a set of pictures from others. Imports no torch."""

import functools
import hashlib
import json
import os
from pathlib import Path

from hgrn2_bench.cifar import IMAGE_COLUMN
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.files import MOST_FILES, data_folder, fingerprint, named
from hgrn2_bench.rows import parquet_rows
from suites.imagenet.places import CIFARS, FOLDERS, PARQUET, Place, find
from suites.imagenet.readers import list_classes
from suites.imagenet.settings import DRAWN, ImagenetConfig

REAL = "real.json"
"""ReaL's labels: a list of classes for each of the 50,000 validation pictures, in the order of their numbers (github.com/google-research/
reassessed-imagenet)."""
TIMM_REAL, TIMM_WNIDS = "imagenet_real_labels.json", "imagenet_synsets.txt"
"""In timm's folder data/_info."""
JPEG = b"\xff\xd8\xff"


def fingerprint_of(config: ImagenetConfig) -> str:
    """16 hex digits over names, sizes and ends of the files that a configuration reads, after `jpeg:` for CIFAR compressed with loss.

    Of class folders all names count, and about a thousand of the pictures. Empty for drawn pictures. ConfigError where the files are
    not there.
    """
    return "" if config.dataset == DRAWN else _fingerprint(str(data_folder()), config.dataset, config.real_labels)


@functools.cache
def _fingerprint(root: str, dataset: str, real_labels: bool) -> str:
    place = find(Path(root), dataset)
    found = fingerprint_of_place(place)
    if real_labels:
        found = hashlib.sha256(found.encode() + real_file(Path(root)).read_bytes()).hexdigest()[:16]
    return "jpeg:" * (dataset in CIFARS and is_jpeg(place)) + found


def fingerprint_of_place(place: Place) -> str:
    """16 hex digits over a copy's files; a picture in a class folder that cannot be read counts by its name, and is told of later."""
    if place.layout != FOLDERS:
        return fingerprint(named(place.folder, place.files))
    names, some = hashlib.sha256(), []
    for split in sorted(place.files):
        (folder,) = place.files[split]
        files = [f"{name}/{file}" for name, inside in list_classes(folder).items() for file in inside]
        names.update(json.dumps([split, files]).encode())
        some += [(split, folder / file) for file in files[:: max(1, len(files) // MOST_FILES)] if os.access(folder / file, os.R_OK)]
    return fingerprint([(names.hexdigest(), file) if i == 0 else (split, file) for i, (split, file) in enumerate(some)])


def is_jpeg(place: Place) -> bool:
    """Whether CIFAR's images, which were never compressed with loss, are JPEGs here."""
    (first, *_) = place.of("train")
    if place.layout == PARQUET:
        (image,) = next(parquet_rows(first, (IMAGE_COLUMN,)))
        content = image["bytes"] if isinstance(image, dict) else image
        return bytes(content or b"").startswith(JPEG)
    return first.is_dir() and next(first.glob("*/*.jp*g"), None) is not None


def real_file(root: Path) -> Path:
    """The file of ReaL labels: the user's, or timm's. ConfigError where neither is there."""
    for path in (root / REAL, *root.glob(f"*/{REAL}"), timm_file(TIMM_REAL)):
        if path is not None and path.is_file():
            return path
    raise ConfigError(f"real_labels=true: no {REAL} in {root}, and timm, which has a copy, is not installed: pip install timm")


def timm_file(name: str) -> Path | None:
    """One of timm's lists, found without importing timm, which takes seconds; None where it is not installed."""
    from importlib.util import find_spec

    spec = find_spec("timm")
    return Path(spec.submodule_search_locations[0]) / "data/_info" / name if spec and spec.submodule_search_locations else None


def timm_wnids() -> tuple[str, ...]:
    """ImageNet's wnids in the order of their labels, as timm has them; empty without timm."""
    path = timm_file(TIMM_WNIDS)
    return tuple(path.read_text().split()) if path is not None and path.is_file() else ()
