"""The user's files and the cache: where they are, how folders are searched, what tells one set of files from another.

Imports neither torch nor numpy.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hgrn2_bench.errors import ConfigError, DataError

Files = Mapping[str, tuple[Path, ...]]
"""By split."""
DATA, CACHE = "HGRN2_BENCH_DATA", "HGRN2_BENCH_CACHE"
WORD = "data_dir="
SAMPLE = 1 << 16
"""Bytes at each end of a file that go into its fingerprint, beside its size."""
MOST_FILES = 1000
"""Of a folder of more files, so many count, spread evenly."""
MAX_DEPTH = 4
"""Folders below the given one that are searched: lra_release/lra_release/pathfinder/pathfinder32."""


@dataclass(frozen=True)
class Copy:
    """One copy of some data: the files of each of its splits, in one folder."""

    what: str
    """The task or set that it holds."""
    layout: str
    """In words: `parquet`, `json lines`."""
    folder: Path
    files: Files
    """Of each split that is there; in layouts of many small files the folder of the split."""

    def __str__(self) -> str:
        """`DIR (parquet)`."""
        return f"{self.folder} ({self.layout})"

    def of(self, split: str) -> tuple[Path, ...]:
        """The files of a split. DataError where it is missing."""
        if not self.files.get(split):
            raise DataError(self.lacks(split))
        return self.files[split]

    def lacks(self, split: str) -> str:
        """What to say where a split is missing."""
        return f"{self}: no {split} split of {self.what}; here: {', '.join(sorted(self.files))}"


AnyCopy = TypeVar("AnyCopy", bound=Copy)


def data_folder() -> Path:
    """The user's data: HGRN2_BENCH_DATA, or `data` here."""
    return Path(os.environ.get(DATA, "data"))


def take_data_folder(words: Sequence[str]) -> list[str]:
    """The words without `data_dir=DIR`, whose folder becomes that of the user's data here and in processes that start from here.

    A path is no setting: what is read is told by its fingerprint. ConfigError where there is no such folder.
    """
    others = [word for word in words if not word.startswith(WORD)]
    given = [word.removeprefix(WORD) for word in words if word.startswith(WORD)]
    for text in given:
        folder = Path(text).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"{WORD}{text}: no such folder")
        os.environ[DATA] = str(folder.resolve())
    return others


def check_data_folder(root: Path, what: str) -> None:
    """ConfigError where the folder in which `what` is looked for is not there."""
    if not root.is_dir():
        remedy = f"give data_dir=DIR or set {DATA}, or choose preset=smoke, which needs none"
        raise ConfigError(f"{what} needs files: {root} is no folder; {remedy}")


def only_copy(copies: Sequence[AnyCopy], root: Path, what: str, expected: str, faults: Sequence[str] = ()) -> AnyCopy:
    """The one copy among those found below a folder. ConfigError where there is none, with what was expected, or more than one."""
    if not copies:
        raise ConfigError("; ".join([f"no data of {what} in {root}: expected {expected}", *faults]))
    if len(copies) > 1:
        raise ConfigError(f"{root} holds {len(copies)} copies of {what}: {', '.join(map(str, copies))}; give the folder of one")
    return copies[0]


def cache_folder(suite: str) -> Path:
    """Where a suite keeps what it generated or tokenised: under HGRN2_BENCH_CACHE, or under `~/.cache/hgrn2_bench`."""
    return Path(os.environ.get(CACHE, Path.home() / ".cache" / "hgrn2_bench")) / suite


def subfolders(folder: Path) -> list[Path]:
    """Folders in a folder by name, hidden ones left out; none where it cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def files_in(folder: Path) -> list[Path]:
    """Files in a folder by name, hidden ones left out. OSError where it cannot be read."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def folders(root: Path, below: Callable[[Path], list[Path]] = subfolders) -> Iterator[Path]:
    """The folder and those at most MAX_DEPTH below it, nearest first; `below` gives the folders of one that are searched too."""
    level = [root]
    for depth in range(MAX_DEPTH + 1):
        yield from level
        if depth < MAX_DEPTH:
            level = [path for folder in level for path in below(folder)]


def searched(root: Path, closed: Container[str]) -> Iterator[tuple[Path, list[Path]]]:
    """Folders, nearest first, and their files; those that cannot be read, and those below with a closed name, are passed over."""
    for folder in folders(root, lambda folder: [path for path in subfolders(folder) if path.name not in closed]):
        with contextlib.suppress(OSError):
            yield folder, files_in(folder)


def named(folder: Path, files: Mapping[str, Sequence[Path]]) -> Iterator[tuple[str, Path]]:
    """Files of each split with a name free of where the folder lies; of one that is a folder of many files, some."""
    for split in sorted(files):
        for path in files[split]:
            for file in _spread(path) if path.is_dir() else [path]:
                yield f"{split}/{file.relative_to(folder) if file.is_relative_to(folder) else file.name}", file


def _spread(folder: Path) -> list[Path]:
    """Files under a folder, all or about MOST_FILES of them."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return found[:: max(1, len(found) // MOST_FILES)]


def fingerprint(named: Iterable[tuple[str, Path]]) -> str:
    """16 hex digits over the names that are given, and over sizes and ends of the files."""
    digest = hashlib.sha256()
    for name, file in named:
        digest.update(name.encode())
        digest.update(_sample(file))
    return digest.hexdigest()[:16]


def _sample(file: Path) -> bytes:
    """Size, first and last bytes. DataError for a file that cannot be read."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(0)
            first = opened.read(SAMPLE)
            opened.seek(max(0, size - SAMPLE))
            return b"%d " % size + first + opened.read(SAMPLE)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
