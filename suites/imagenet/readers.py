"""Encoded pictures of a split, from class folders, parquet or tar shards: listed and indexed, not decoded.

An index of tar shards is kept in the cache. Rows of parquet are packed into the cache once, since a single row cannot be read quickly.
"""

import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from hgrn2_bench.caching import folder_of, locked, writing
from hgrn2_bench.cells import replace_file
from hgrn2_bench.cifar import IMAGE_COLUMN
from hgrn2_bench.errors import DataError
from hgrn2_bench.files import cache_folder, fingerprint, named, subfolders
from hgrn2_bench.rows import check_whole, needed, parquet_rows
from suites.imagenet.decode import INSTALL
from suites.imagenet.places import FOLDERS, PARQUET, PICTURES, TARS, Place
from suites.imagenet.stored import Extents, Stored

RULES = 1
"""Raised when the same files give another index or pack."""
LABEL_MEMBERS = ("cls", "json")
LABEL_KEYS = ("label", "cls")
"""Of a sample's JSON."""


def pictures_in(folder: Path) -> Iterator[str]:
    """Pictures anywhere in a class folder by name relative to it; hidden files and folders are none, nor are links to folders around them.

    DataError where a folder cannot be read.
    """
    for where, below, files in os.walk(folder, onerror=_refuse, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".") and not _leads_around(Path(where, name))]
        inner = os.path.relpath(where, folder)
        prefix = "" if inner == "." else inner + "/"
        yield from (prefix + name for name in files if name.lower().endswith(PICTURES) and not name.startswith("."))


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror})")


def _leads_around(path: Path) -> bool:
    """Whether this is a link to a folder around it, below which everything would be found again."""
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def in_order(names: Sequence[str]) -> list[str]:
    """Class names in the order of their labels: numbers by value, others as text."""
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


Listing = Mapping[str, list[str]]
"""Class folder -> its pictures; classes in the order of their labels, none of them empty."""


def list_classes(folder: Path) -> Listing:
    """The class folders of a split that hold pictures; hidden folders and empty ones are no classes."""
    there = {path.name: sorted(pictures_in(path)) for path in subfolders(folder)}
    return {name: there[name] for name in in_order([name for name, files in there.items() if files])}


def class_names(place: Place) -> tuple[str, ...]:
    """The classes in the order of their labels; of tables and shards that name none, empty."""
    if place.layout == FOLDERS:
        return tuple(in_order([path.name for path in subfolders(place.of("train")[0]) if next(pictures_in(path), "")]))
    return parquet_classes(place.of("train")[0]) if place.layout == PARQUET else ()


def read_split(place: Place, split: str, classes: Sequence[str]) -> Stored:
    """Every picture of a split with its label. DataError names the file that cannot be used."""
    if place.layout == FOLDERS:
        return _read_folder(place.of(split)[0], classes)
    check_whole(place.of(split))
    stored = {PARQUET: _read_parquet, TARS: _read_tars}[place.layout](place, split)
    if not len(stored):
        raise DataError(f"{place.of(split)[0]}: no pictures")
    return stored


def _read_folder(folder: Path, classes: Sequence[str]) -> Stored:
    listing = list_classes(folder)
    if not listing:
        remedy = "move each picture into the folder of its class; `data imagenet check` says how"
        raise DataError(f"{folder}: no class folders with pictures: {remedy}")
    labels = {name: label for label, name in enumerate(classes)}
    if foreign := [name for name in listing if name not in labels]:
        raise DataError(f"{folder}: class folders that train has not: {', '.join(foreign[:5])}{', ...' * (len(foreign) > 5)}")
    names = [os.fsencode(f"{name}/{file}") for name, files in listing.items() for file in files]
    counts = [len(files) for files in listing.values()]
    return Stored(folder, np.array(names), np.repeat([labels[name] for name in listing], counts).astype(np.int64))


class Sample(NamedTuple):
    """A picture in a larger file."""

    name: str
    """File, comma, member."""
    label: int
    start: int
    size: int


def tar_samples(path: Path) -> Iterator[Sample]:
    """The samples of a shard: members whose names agree up to the first dot are one. DataError where one has no label, or no picture."""
    key, picture, label = "", None, None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
                    continue
                stem, ending = _key_and_ending(member.name)
                if stem != key:
                    yield from _sample(path, key, picture, label)
                    key, picture, label = stem, None, None
                if f".{ending.rpartition('.')[2]}" in PICTURES:
                    picture = member
                elif ending in LABEL_MEMBERS and (content := tar.extractfile(member)) and (label is None or ending == "cls"):
                    found = _label(content.read(), ending)
                    label = label if found is None else found
            yield from _sample(path, key, picture, label)
            if path.stat().st_size < tar.offset + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("the block that ends a tar is missing")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path}: no tar, or cut short ({error}): copy it again") from None


def _key_and_ending(name: str) -> tuple[str, str]:
    """`a/b` and `c.jpg` of `a/b.c.jpg`: a sample's key ends at the first dot of its file's name."""
    parent, _, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{parent}/{stem}", ending.lower()


def _label(content: bytes, ending: str) -> int | None:
    """The class that a member tells; None where it tells none."""
    try:
        if ending == "cls":
            return int(content)
        told = json.loads(content)
        return next((told[key] for key in LABEL_KEYS if isinstance(told.get(key), int)), None)
    except (ValueError, AttributeError):
        return None


def _sample(path: Path, key: str, picture: tarfile.TarInfo | None, label: int | None) -> Iterator[Sample]:
    if not key:
        return
    if picture is None or label is None:
        lacks = "no picture" if picture is None else "no class: a whole number in .cls, or under label in .json"
        raise DataError(f"{path}: sample {key.lstrip('/')} has {lacks}")
    yield Sample(f"{path.name}, {picture.name}", label, picture.offset_data, picture.size)


def _read_tars(place: Place, split: str) -> Stored:
    paths = place.of(split)

    def index(_: Path) -> dict[str, np.ndarray]:
        return _columns((i, sample) for i, path in enumerate(paths) for sample in tar_samples(path))

    return _stored(_kept(place, split, index), paths, paths[0].parent)


def _read_parquet(place: Place, split: str) -> Stored:
    paths = place.of(split)
    pack = folder_for(place, split) / "pictures.bin"

    def fill(path: Path) -> dict[str, np.ndarray]:
        print(f"packing {place}, {split}, into {path.parent}: once", file=sys.stderr)
        temporary = path / "pictures.tmp"
        try:
            with writing(pack), temporary.open("wb") as file:
                columns = _columns((0, sample) for each in paths for sample in _packed(file, each))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(pack)
        finally:
            temporary.unlink(missing_ok=True)
        return columns

    columns = _kept(place, split, fill)
    return _stored(columns, (pack,), paths[0].parent)


def _packed(file: io.BufferedWriter, path: Path) -> Iterator[Sample]:
    """Append the pictures of a table to a file. DataError names the row whose picture or label is none."""
    for number, (image, label) in enumerate(parquet_rows(path, (IMAGE_COLUMN, "label"))):
        content, name = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        if not isinstance(content, bytes | None) or not isinstance(label, int):
            kinds = f"{type(content).__name__} and {type(label).__name__}"
            raise DataError(f"{path}, row {number}: image and label are {kinds}; expected the bytes of a file and a number")
        start = file.tell()
        file.write(content or b"")
        yield Sample(f"{path.name}, row {number}{f', {name}' if name else ''}", label, start, len(content or b""))


def _columns(samples: Iterator[tuple[int, Sample]]) -> dict[str, np.ndarray]:
    """Arrays of the number of each sample's file, and of its fields."""
    rows = [(i, os.fsencode(each.name), each.label, each.start, each.size) for i, each in samples]
    files, names, labels, starts, sizes = zip(*rows, strict=True) if rows else ((), (b"",)[:0], (), (), ())
    whole = {"labels": labels, "starts": starts, "sizes": sizes}
    return {"files": np.array(files, np.int32), "names": np.array(names, np.bytes_), **{k: np.array(v, np.int64) for k, v in whole.items()}}


def _stored(columns: Mapping[str, np.ndarray], files: tuple[Path, ...], folder: Path) -> Stored:
    extents = Extents(files, columns["files"], columns["starts"], columns["sizes"])
    return Stored(folder, columns["names"], columns["labels"], extents)


def folder_for(place: Place, split: str) -> Path:
    """Where the cache keeps what belongs to a split; files that changed in their middle alone are told by their times."""
    files = {split: place.of(split)}
    times = [path.stat().st_mtime_ns for path in place.of(split)]
    key = {"rules": RULES, "files": fingerprint(named(place.folder, files)), "times": times, "layout": place.layout}
    return folder_of(cache_folder("imagenet"), split, key)


def _kept(place: Place, split: str, make: Callable[[Path], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of a split from the cache, or made there; `make` is given the split's folder, which is locked."""
    folder = folder_for(place, split)
    index = folder / "index.npz"
    with locked(folder):
        if not index.exists():
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **make(folder))
            with writing(index):
                replace_file(index, buffer.getvalue())
        with np.load(index) as stored:
            return dict(stored)


def parquet_classes(path: Path) -> tuple[str, ...]:
    """The class names that the Hub's `datasets` wrote into a table; empty where there are none."""
    parquet = needed("pyarrow.parquet", "pyarrow", f"{path}: parquet", INSTALL)
    with parquet.ParquetFile(path) as file:
        metadata = file.schema_arrow.metadata or {}
    try:
        return tuple(json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def image_number(name: bytes) -> int | None:
    """The number of one of ImageNet's validation pictures in its name, from 1."""
    found = re.search(rb"ILSVRC2012_val_(\d{8})", name)
    return int(found[1]) if found else None
