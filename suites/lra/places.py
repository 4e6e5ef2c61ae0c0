"""What a folder holds of the Long Range Arena: each copy of a task's data, and in which layout. Reads names only, and parquet footers."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hgrn2_bench import reviews
from hgrn2_bench.cifar import CIFAR10, FOLDERS, locate_batches, locate_folders
from hgrn2_bench.errors import ConfigError, DataError
from hgrn2_bench.files import Copy, Files, files_in, folders, only_copy, subfolders
from hgrn2_bench.rows import has_column, parquet_footer, shards

EXPECTED = {
    "listops": "listops-1000/basic_{train,val,test}.tsv",
    "text": reviews.EXPECTED,
    "retrieval": "tsv_data/new_aan_pairs.{train,eval,test}.tsv",
    "image": "cifar-10-batches-py, cifar-10-batches-bin, {train,test}/<class>/*.png, or *train*.parquet and *test*.parquet (img, label)",
    "pathfinder": "pathfinder32/curv_contour_length_14/{imgs,metadata}",
    "pathx": "pathfinder128/curv_contour_length_14/{imgs,metadata}",
}
"""Where each task's data lie, in words; folders above may have any name."""
RESOLUTIONS = {"pathfinder": 32, "pathx": 128}
CLASSES = CIFAR10.classes
CLOSED = {"imgs", "metadata", "train", "test", "pos", "neg", "unsup"}
"""Folders of items, which are many: never searched for further data."""


class Place(Copy):
    """One copy of one task's data."""

    def lacks(self, split: str) -> str:
        """What to say where a split is missing."""
        return f"{self.folder}: no {split} split of {self.what} in {self.layout}; expected {EXPECTED[self.what]}"


@dataclass(frozen=True)
class Found:
    """All that a folder holds."""

    places: tuple[Place, ...]
    faults: tuple[str, ...]
    """Files and folders that look like data and cannot be used: one line each."""

    def of(self, task: str) -> list[Place]:
        """All copies of a task's data."""
        return [place for place in self.places if place.what == task]


def find(root: Path, task: str) -> Place:
    """The only copy of a task's data below a folder. ConfigError where there is none, or more than one to choose from."""
    found = locate(root)
    return only_copy(found.of(task), root, task, EXPECTED[task], found.faults)


def locate(root: Path) -> Found:
    """Every copy of every task's data in a folder or at most four below it. ConfigError where there is no such folder."""
    if not root.is_dir():
        raise ConfigError(f"no folder {root}")
    places: list[Place] = []
    faults: list[str] = []
    for folder in folders(root, _searched):
        try:
            files = files_in(folder)
        except OSError as error:
            faults.append(f"{folder}: cannot be read ({error.strerror})")
            continue
        places += _tables(folder, files)
        places += (Place("image", layout, folder, there) for layout, there in locate_batches(CIFAR10, files))
        places += _folders_of_items(folder)
        for there in shards(files, reviews.WORDS, reviews.ENDINGS):
            try:
                places += _sharded(folder, there)
            except DataError as error:
                faults.append(str(error))
        if (folder / "metadata").is_dir() and (folder / "imgs").is_dir() and folder == root:
            faults.append(f"{folder} is one difficulty of Pathfinder: give the folder above, named pathfinder32 or pathfinder128")
    return Found(tuple(places), tuple(faults))


def _searched(folder: Path) -> list[Path]:
    """Folders in a folder that may hold data."""
    return [] if _difficulties(folder) else [path for path in subfolders(folder) if path.name not in CLOSED]


def _difficulties(folder: Path) -> list[Path]:
    return [path for path in subfolders(folder) if path.name.startswith("curv_")] if folder.resolve().name.startswith("pathfinder") else []


def _tables(folder: Path, files: list[Path]) -> Iterator[Place]:
    """TSV files of the original archive."""
    names = {path.name: path for path in files}
    for task, pattern, evaluation in (("listops", "basic_{}.tsv", "val"), ("retrieval", "new_aan_pairs.{}.tsv", "eval")):
        splits = {"train": "train", "val": evaluation, "test": "test"}
        there: Files = {split: (names[name],) for split, word in splits.items() if (name := pattern.format(word)) in names}
        if there:
            yield Place(task, pattern.format("*"), folder, there)


def _folders_of_items(folder: Path) -> Iterator[Place]:
    """One file an item: reviews, pictures by class, Pathfinder."""
    splits: Files = {split: (folder / split,) for split in ("train", "test") if (folder / split).is_dir()}
    inside = {path.name for paths in splits.values() for path in subfolders(paths[0])}
    if inside & {"pos", "neg"}:
        yield Place("text", reviews.FOLDERS, folder, splits)
    elif cifar := locate_folders(CIFAR10, folder):
        yield Place("image", FOLDERS, folder, cifar)
    there: Files = {path.name: (path,) for path in _difficulties(folder)}
    for task, size in RESOLUTIONS.items():
        if there and folder.resolve().name == f"pathfinder{size}":
            yield Place(task, "PNG files with metadata", folder, there)


def _sharded(folder: Path, there: dict[str, list[Path]]) -> Iterator[Place]:
    files = {split: tuple(paths) for split, paths in there.items()}
    first = next(path for paths in files.values() for path in paths)
    if first.suffix != ".parquet":
        if len(files) > 1:  # a lone file may be any data set's
            yield Place("text", "json lines", folder, files)
        return
    kinds = Counter(_kind(path) for paths in files.values() for path in paths)
    if len(kinds) == 1 and (kind := next(iter(kinds))):
        yield Place(kind, "parquet", folder, files)


def _kind(path: Path) -> str:
    """The task whose columns a parquet file has; empty for another's."""
    footer = parquet_footer(path)
    if not has_column(footer, "label"):
        return ""
    return "image" if has_column(footer, "img") or has_column(footer, "image") else "text" if has_column(footer, "text") else ""
