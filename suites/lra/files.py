"""Where LRA's files are, and what tells them from others. Imports neither torch nor numpy."""

import functools
import hashlib
import os
from pathlib import Path

from hgrn2_bench.errors import ConfigError

DATA, CACHE = "HGRN2_BENCH_DATA", "HGRN2_BENCH_CACHE"
SAMPLE = 1 << 16
"""Bytes at each end of a file that go into its fingerprint, beside its size."""
MOST_FILES = 1000
"""Of a split that is a folder of more files, so many count, spread evenly."""


def data_folder() -> Path:
    """The user's data: HGRN2_BENCH_DATA, or `data` here."""
    return Path(os.environ.get(DATA, "data"))


def cache_folder() -> Path:
    """Where generated data are kept: HGRN2_BENCH_CACHE, or `~/.cache/hgrn2_bench`."""
    return Path(os.environ.get(CACHE, Path.home() / ".cache" / "hgrn2_bench")) / "lra"


@functools.cache
def fingerprint_of(dataset: str) -> str:
    """16 hex digits over names, sizes and ends of a task's files, after `jpeg:` where its images are compressed with loss.

    ConfigError where the files are not there.
    """
    from suites.lra.places import find

    root = data_folder()
    if not root.is_dir():
        raise ConfigError(f"{dataset} needs files: {root} is no folder; set {DATA}, or choose preset=smoke, which needs none")
    place = find(root, dataset)
    digest = hashlib.sha256()
    lossy = False
    for split in sorted(place.files):
        for path in place.files[split]:
            files = _spread(path) if path.is_dir() else [path]
            lossy |= dataset == "image" and any(_lossy(file) for file in files)
            for file in files:
                digest.update(f"{split}/{file.relative_to(place.folder) if file.is_relative_to(place.folder) else file.name}".encode())
                digest.update(_sample(file))
    return "jpeg:" * lossy + digest.hexdigest()[:16]


def _spread(folder: Path) -> list[Path]:
    """Files under a folder, all or MOST_FILES of them."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return found[:: max(1, len(found) // MOST_FILES)]


def _sample(file: Path) -> bytes:
    """Size, first and last bytes."""
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(0)
        first = opened.read(SAMPLE)
        opened.seek(max(0, size - SAMPLE))
        return b"%d " % size + first + opened.read(SAMPLE)


def _lossy(file: Path) -> bool:
    """Whether a file is a JPEG, or a table that holds such."""
    with file.open("rb") as opened:
        start = opened.read(SAMPLE)
    return b"\xff\xd8\xff" in start and b"\x89PNG" not in start
