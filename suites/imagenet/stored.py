"""Encoded pictures where they lie: files in class folders, members of tar shards, rows of parquet packed into one file.

Reading an item opens its file, reads and closes it: nothing is held that worker processes could share by mistake. Shape letter: N items.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hgrn2_bench.errors import DataError


@dataclass(frozen=True)
class Extents:
    """Parts of a few large files."""

    files: tuple[Path, ...]
    file_N: np.ndarray
    """int32: which of the files."""
    start_N: np.ndarray
    size_N: np.ndarray
    """int64, in bytes."""


@dataclass(frozen=True)
class Stored:
    """N encoded pictures."""

    folder: Path
    names_N: np.ndarray
    """Bytes: each item's file below the folder; of an item in a larger file that file, a comma and the member or row."""
    labels_N: np.ndarray
    """int64."""
    extents: Extents | None = None
    """Where the items are no files of their own."""

    def __len__(self) -> int:
        """Number of items."""
        return len(self.labels_N)

    def where(self, i: int) -> str:
        """The place of item i, for people."""
        return str(self.folder / os.fsdecode(self.names_N[i]))

    def read(self, i: int) -> bytes:
        """The encoded picture. DataError where it cannot be read."""
        try:
            if self.extents is None:
                return Path(self.where(i)).read_bytes()
            start, size = int(self.extents.start_N[i]), int(self.extents.size_N[i])
            with self.extents.files[self.extents.file_N[i]].open("rb") as file:
                file.seek(start)
                content = file.read(size)
        except OSError as error:
            raise DataError(f"{self.where(i)}: cannot be read ({error.strerror})") from None
        if len(content) < size:
            raise DataError(f"{self.where(i)}: the file ends in it: copy it again")
        return content

    def take(self, indices_N: np.ndarray) -> Stored:
        """Some items, in the order of the indices."""
        extents = self.extents
        if extents is not None:
            extents = Extents(extents.files, extents.file_N[indices_N], extents.start_N[indices_N], extents.size_N[indices_N])
        return Stored(self.folder, self.names_N[indices_N], self.labels_N[indices_N], extents)

    def stamp(self, digest: hashlib._Hash) -> None:
        """Add sizes and times of the files to a digest, of one that is not there neither."""
        for path in map(Path, map(self.where, range(len(self)))) if self.extents is None else self.extents.files:
            try:
                found = path.stat()
                digest.update(b"%d %d\n" % (found.st_size, found.st_mtime_ns))
            except OSError:
                digest.update(b"none\n")

    def update(self, digest: hashlib._Hash) -> None:
        """Add names and labels to a digest."""
        for name, label in zip(self.names_N.tolist(), self.labels_N.tolist(), strict=True):
            digest.update(b"%b %d\n" % (name, label))
