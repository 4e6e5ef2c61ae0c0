"""What tells LRA's files from others. Imports neither torch nor numpy."""

import functools
from pathlib import Path

from hgrn2_bench.files import SAMPLE, check_data_folder, data_folder, fingerprint, named
from suites.lra.places import find


@functools.cache
def fingerprint_of(dataset: str) -> str:
    """16 hex digits over names, sizes and ends of a task's files, after `jpeg:` where its images are compressed with loss.

    ConfigError where the files are not there.
    """
    root = data_folder()
    check_data_folder(root, dataset)
    place = find(root, dataset)
    files = list(named(place.folder, place.files))
    lossy = dataset == "image" and any(_lossy(file) for _, file in files)
    return "jpeg:" * lossy + fingerprint(files)


def _lossy(file: Path) -> bool:
    """Whether a file is a JPEG, or a table that holds such."""
    with file.open("rb") as opened:
        start = opened.read(SAMPLE)
    return b"\xff\xd8\xff" in start and b"\x89PNG" not in start
