"""A cache of tokenised splits: memory-mapped, made once, in a folder named after everything that decides the ids.

`<cache>/<name>-<hash of the key>/` holds for each split `<split>.ids`, `<split>.lines` and, written last, the record `<split>.json` with
their lengths and hashes. Each file is written under another name, flushed and renamed: after a kill the splits with a record are whole, the
others are made again, and so is, with a warning, a split whose files do not have the recorded hashes. Whoever makes one holds the lock.

Shape letters: N tokens, L lines.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hgrn2_bench.caching import writing
from hgrn2_bench.cells import replace_file
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.files import CACHE
from suites.wikitext.counts import UNKNOWN, Counted
from suites.wikitext.readers import Batch
from suites.wikitext.tokenizers import Tokenizer, byte_length, dtype_of

CHUNK = 1 << 20
"""Bytes hashed at once."""
CHECKSUM_BYTES = 32
LINE_COLUMNS = 3


@dataclass(frozen=True)
class Stored:
    """One tokenised split."""

    ids_N: np.ndarray
    lines_L3: np.ndarray
    """int64: tokens, words (the end of line is one) and bytes of each line."""
    unknown: int
    """How often the text has `<unk>`."""
    hash: str
    """Over the ids."""

    @property
    def counted(self) -> Counted:
        """What the split was found to have."""
        return Counted(len(self.lines_L3), int(self.lines_L3[:, 1].sum()), self.unknown)

    def first(self, tokens: int) -> tuple[int, int]:
        """Words and bytes of the first so many tokens (0: all); of a line that is cut, in proportion to its tokens."""
        ends_L = np.cumsum(self.lines_L3[:, 0])
        whole = int(np.searchsorted(ends_L, tokens or len(self.ids_N), side="right"))
        words, size = (int(part) for part in self.lines_L3[:whole, 1:].sum(axis=0))
        if whole == len(self.lines_L3):
            return words, size
        of_line, words_of_line, bytes_of_line = map(int, self.lines_L3[whole])
        rest = tokens - (int(ends_L[whole - 1]) if whole else 0)
        return words + rest * words_of_line // of_line, size + rest * bytes_of_line // of_line


def stored_words(folder: Path, make: Callable[[], list[str]]) -> list[str]:
    """The words of `words.txt`, made where there is no whole one. The folder is locked."""
    path = folder / "words.txt"
    if path.exists():
        content, checksum = path.read_bytes()[:-CHECKSUM_BYTES], path.read_bytes()[-CHECKSUM_BYTES:]
        if hashlib.sha256(content).digest() == checksum:
            return content.decode().split("\n")
        warnings.warn(f"{path} is damaged; it is made again", stacklevel=2)
    words = make()
    content = "\n".join(words).encode()
    with writing(path):
        replace_file(path, content + hashlib.sha256(content).digest())
    return words


def stored_split(folder: Path, split: str, tokenizer: Tokenizer, lines: Callable[[], Iterator[Batch]]) -> Stored:
    """A tokenised split, made where there is no whole one. The folder is locked.

    Memory: one batch of lines. ConfigError, one line, where the disk is full or cannot be written; nothing half-written is left then.
    """
    if (folder / f"{split}.json").exists():
        if stored := _open(folder, split, tokenizer):
            return stored
        warnings.warn(f"{folder / split} is damaged; it is made again", stacklevel=2)
        (folder / f"{split}.json").unlink()
    for leftover in folder.glob(f"{split}.*.tmp"):  # of a killed writer
        leftover.unlink()
    _make(folder, split, tokenizer, lines())
    made = _open(folder, split, tokenizer)
    if made is None:
        raise ConfigError(f"{folder / split} is damaged again: the disk does not give back what was written; set {CACHE} to another")
    return made


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _open(folder: Path, split: str, tokenizer: Tokenizer) -> Stored | None:
    """A split whose files are as its record says; None where they are not, or the tokenizer was another."""
    try:
        record = json.loads((folder / f"{split}.json").read_bytes())
        ids, lines = folder / f"{split}.ids", folder / f"{split}.lines"
        if (record["tokenizer"], record["ids"], record["lines"]) != (tokenizer.hash, hash_file(ids), hash_file(lines)):
            return None
        ids_N = np.memmap(ids, dtype_of(tokenizer.vocab_size), "r")
        return Stored(ids_N, np.memmap(lines, np.int64, "r").reshape(-1, LINE_COLUMNS), record["unknown"], record["ids"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _make(folder: Path, split: str, tokenizer: Tokenizer, batches: Iterator[Batch]) -> None:
    """Write a split's files, then its record."""
    unknown = 0
    with _Growing(folder / f"{split}.ids") as ids, _Growing(folder / f"{split}.lines") as lines:
        for batch in batches:
            encoded = tokenizer.encode(batch)
            words = [len(line.split()) + 1 for line in batch]
            sizes = [byte_length(line) for line in batch]
            lines.append(np.stack([encoded.lengths_L, words, sizes], axis=1).astype(np.int64))
            ids.append(encoded.ids_N.astype(dtype_of(tokenizer.vocab_size), copy=False))
            unknown += sum(line.count(UNKNOWN) for line in batch)
        record = {"tokenizer": tokenizer.hash, "ids": ids.keep(), "lines": lines.keep(), "unknown": unknown}
    path = folder / f"{split}.json"
    with writing(path):
        replace_file(path, json.dumps(record))


class _Growing:
    """A file under another name, which gets its own when it is kept, and is gone otherwise."""

    def __init__(self, path: Path) -> None:
        self._path, self._digest = path, hashlib.sha256()
        self._temporary = path.with_name(f"{path.name}.tmp")
        with writing(path):
            self._file = self._temporary.open("wb")

    def __enter__(self) -> "_Growing":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a full disk: what it says was said
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def append(self, array: np.ndarray) -> None:
        """Write an array's values behind those before."""
        content = np.ascontiguousarray(array).tobytes()
        self._digest.update(content)
        with writing(self._path):
            self._file.write(content)

    def keep(self) -> str:
        """Give the file its name; SHA-256 of its content."""
        with writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._temporary.replace(self._path)
        return self._digest.hexdigest()
