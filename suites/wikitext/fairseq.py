"""Token ids that fairseq binarised: `<split>.bin` and `.idx` with their `dict.txt` (fairseq/data/indexed_dataset.py).

`.idx`: the word MMIDIDX and two zero bytes, uint64 version 1, one byte for the ids' type, uint64 number of lines, int32 tokens of each,
int64 where each begins.
Shape letters: N tokens, L lines.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hgrn2_bench.errors import DataError
from suites.wikitext.places import DICTIONARY, Place
from suites.wikitext.tokenizers import SPECIALS, UNK

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER_BYTES = len(MAGIC) + 8 + 1 + 8
TYPES: dict[int, np.dtype] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
BYTES_OF_LINE = 4 + 8
CHUNK = 1 << 22
"""Ids looked at together."""


@dataclass(frozen=True)
class Binarised:
    """One split."""

    ids_N: np.ndarray
    """Memory-mapped."""
    lines: int
    unknown: int
    """How many ids are `<unk>`."""
    hash: str
    """Over the ids."""


@dataclass(frozen=True)
class Dictionary:
    """What the ids mean."""

    size: int
    """Ids, specials included."""
    hash: str


def read_dictionary(place: Place) -> Dictionary:
    """The dictionary beside the files. DataError where it is damaged."""
    path = place.folder / DICTIONARY
    digest, entries = hashlib.sha256(), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            entry, _, count = line.rstrip(b"\n").removesuffix(b" #fairseq:overwrite").rpartition(b" ")
            if not entry or not count.isdigit():
                raise DataError(f"{path}:{number}: expected an entry, a space and its count: copy the file again")
            digest.update(entry + b"\n")
            entries += 1
    return Dictionary(len(SPECIALS) + entries, digest.hexdigest()[:16])


def read_split(place: Place, split: str, dictionary: Dictionary) -> Binarised:
    """A split's ids, every one looked at. DataError where the files are damaged or do not belong together."""
    ids_path, index_path = place.of(split)
    sizes_L, dtype = _read_index(index_path)
    tokens, there = int(sizes_L.sum(dtype=np.int64)), ids_path.stat().st_size
    if there != tokens * dtype.itemsize or not tokens:
        raise DataError(f"{ids_path}: {there:,} bytes, {index_path.name} says {tokens:,} ids of {dtype.itemsize} bytes: copy both again")
    ids_N = np.memmap(ids_path, dtype, "r")
    digest, unknown = hashlib.sha256(), 0
    for start in range(0, tokens, CHUNK):
        chunk = ids_N[start : start + CHUNK]
        digest.update(chunk.tobytes())
        unknown += int(np.count_nonzero(chunk == UNK))
        if chunk.min() < 0 or chunk.max() >= dictionary.size:
            odd = chunk[(chunk < 0) | (chunk >= dictionary.size)][0]
            raise DataError(f"{ids_path}: id {odd}, but {DICTIONARY} has {dictionary.size:,}: give the {DICTIONARY} that was made with it")
    return Binarised(ids_N, len(sizes_L), unknown, digest.hexdigest())


def _read_index(path: Path) -> tuple[np.ndarray, np.dtype]:
    """Tokens of each line, int32 (L,), and the type of the ids."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
        if not header.startswith(MAGIC) or len(header) < HEADER_BYTES:
            raise DataError(f"{path}: no index of fairseq's memory-mapped format (MMIDIDX): binarise with --dataset-impl mmap")
        version, kind, lines = (int.from_bytes(part, "little") for part in (header[9:17], header[17:18], header[18:]))
        if version != VERSION or kind not in TYPES:
            raise DataError(f"{path}: version {version}, type {kind}; known: version {VERSION}, types {', '.join(map(str, TYPES))}")
        if size != HEADER_BYTES + lines * BYTES_OF_LINE:
            raise DataError(f"{path}: {size:,} bytes for {lines:,} lines: cut short, copy it again")
        return np.fromfile(file, "<i4", lines), TYPES[kind]
