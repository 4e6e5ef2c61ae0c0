"""Rows of the user's tables: parquet and JSON lines, and which files of a folder are the splits of one set. Imports no torch, no numpy."""

import gzip
import importlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hgrn2_bench.errors import ConfigError, DataError

INSTALL = 'pip install "hgrn2_bench[lra]"'
PARQUET_ROWS = 1000
"""Rows held at once."""
TAIL = 8
"""Bytes at the end of a parquet file: the footer's length and the magic word."""


def needed(module: str, package: str, purpose: str, install: str = INSTALL) -> ModuleType:
    """An optional module. ConfigError, one line with the command that installs it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"{purpose} needs {package}, which is not installed: {install}") from None


def shards(files: Sequence[Path], words: Mapping[str, str], endings: Sequence[str]) -> Iterator[dict[str, list[Path]]]:
    """Files by split, for each data set: names that agree before a split's word and in their ending belong together.

    `words` gives the split that a word in a name stands for, longer words before those that they contain.
    """
    sets: dict[tuple[str, str], dict[str, list[Path]]] = {}
    pattern = rf"(.*?)({'|'.join(words)})[^.]*\.({'|'.join(map(re.escape, endings))})"
    for path in files:
        if match := re.fullmatch(pattern, path.name):
            sets.setdefault((match[1], match[3]), {}).setdefault(words[match[2]], []).append(path)
    yield from sets.values()


def check_whole(paths: Sequence[Path]) -> None:
    """DataError where the names of a split's files number them (`-00000-of-00002`, a hash may follow), and some are missing."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for path in paths:
        if match := re.match(r"(.*-)(\d+)-of-(\d+)", path.name):
            numbers.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (before, count), found in numbers.items():
        if len(found) < int(count):
            told = f"{len(found)} of {int(count)} files {before}*-of-{count}* are there"
            raise DataError(f"{paths[0].parent}: {told}: copy the others too")


def parquet_footer(path: Path) -> bytes:
    """The footer of a parquet file, read without pyarrow. DataError where there is none."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL))
        tail = file.read()
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or length + TAIL > size:
            raise DataError(f"{path}: no parquet file, or cut short ({size} bytes): copy it again")
        file.seek(size - TAIL - length)
        return file.read(length)


def has_column(footer: bytes, column: str) -> bool:
    """Whether a parquet footer names a column."""
    return bytes([len(column)]) + column.encode() in footer  # a name stands behind its length


def objects(path: Path, keys: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a parquet, `.jsonl` or `.jsonl.gz` file with some keys at least (without any: with all), and in words where each is.

    DataError names file and row.
    """
    if path.suffix.lower() != ".parquet":
        yield from ((f"{path}:{number}", item) for number, item in _json_objects(path, keys))
        return
    parquet_footer(path)
    columns = keys or needed("pyarrow.parquet", "pyarrow", f"{path}: parquet").read_schema(path).names
    for number, row in enumerate(parquet_rows(path, columns)):
        yield f"{path}, row {number}", dict(zip(columns, row, strict=True))


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Rows of some columns; of each sequence of names (`img|image`) the first that is there. DataError names file and column."""
    parquet = needed("pyarrow.parquet", "pyarrow", f"{path}: parquet")
    arrow = needed("pyarrow", "pyarrow", f"{path}: parquet")
    try:
        with parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            names = [next((name for name in column.split("|") if name in there), "") for column in columns]
            if not all(names):
                raise DataError(f"{path}: columns {', '.join(there)}; needed: {', '.join(columns)}")
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=names):
                yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)
    except (arrow.ArrowInvalid, arrow.ArrowIOError, OSError) as error:
        raise DataError(f"{path}: damaged parquet ({str(error).splitlines()[0]})") from None


def _json_objects(path: Path, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers from 1, and the object of each line."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                item = json.loads(line)
                if not isinstance(item, dict) or not item.keys() >= set(keys):
                    raise ValueError
                yield number, item
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path}: cut short or damaged after line {number}: copy it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:  # no JSON, not UTF-8, no such key, no object
        wanted = " with " * bool(keys) + " and ".join(f'"{key}"' for key in keys)
        raise DataError(f"{path}:{number}: expected one JSON object{wanted}") from None
