"""What tells LRA's files from others. Imports neither torch nor numpy."""

import functools
from collections.abc import Iterator
from pathlib import Path

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.files import DATA, SAMPLE, data_folder, fingerprint, spread
from suites.lra.places import Place, find


@functools.cache
def fingerprint_of(dataset: str) -> str:
    """16 hex digits over names, sizes and ends of a task's files, after `jpeg:` where its images are compressed with loss.

    ConfigError where the files are not there.
    """
    root = data_folder()
    if not root.is_dir():
        raise ConfigError(f"{dataset} needs files: {root} is no folder; set {DATA}, or choose preset=smoke, which needs none")
    named = list(_named(find(root, dataset)))
    lossy = dataset == "image" and any(_lossy(file) for _, file in named)
    return "jpeg:" * lossy + fingerprint(named)


def _named(place: Place) -> Iterator[tuple[str, Path]]:
    """Files by split and name; of a split that is a folder of many files, some."""
    for split in sorted(place.files):
        for path in place.files[split]:
            for file in spread(path) if path.is_dir() else [path]:
                yield f"{split}/{file.relative_to(place.folder) if file.is_relative_to(place.folder) else file.name}", file


def _lossy(file: Path) -> bool:
    """Whether a file is a JPEG, or a table that holds such."""
    with file.open("rb") as opened:
        start = opened.read(SAMPLE)
    return b"\xff\xd8\xff" in start and b"\x89PNG" not in start
