"""What a folder holds of pictures with classes: each copy, and in which layout. Reads names, footers of parquet files and headers of tars.

Imports neither torch nor numpy.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from hgrn2_bench import cifar
from hgrn2_bench.errors import DataError
from hgrn2_bench.files import Copy, Files, check_data_folder, files_in, folders, only_copy, subfolders
from hgrn2_bench.rows import has_column, parquet_footer, shards

WORDS = {
    "training": "train",
    "train": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "evaluation": "val",
    "eval": "val",
    "testing": "test",
    "test": "test",
}
"""What files and folders call a split."""
FOLDERS, PARQUET, TARS, IDX = "image folders", "parquet", "webdataset", "idx files"
"""Layouts, beside CIFAR's own."""
PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
LOOKED_INTO = 10
"""Class folders in which pictures are looked for."""
WNID = re.compile(r"n\d{8}")
SHARD_INFO = "_info.json"
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where the package dataset-fashion-mnist puts its files."""
UNPACK = {
    "train": "unpack it into train/, and there each class: for f in *.tar; do mkdir ${f%.tar} && tar -xf $f -C ${f%.tar}; done",
    "val": "unpack it into val/, and move each file into the folder of its wnid, as the devkit's ground truth tells",
}
"""What to do with the archives that ImageNet is downloaded as."""
EXPECTED = {
    "imagenet": "{train,val}/<wnid>/*.JPEG, {train,validation}-*.parquet (image, label), or *{train,validation}*.tar (jpg and cls)",
    "folder": "{train,val}/<class>/*.jpg, *train*.parquet (image, label), or *train*.tar (jpg and cls)",
    "cifar10": "cifar-10-batches-py, cifar-10-batches-bin, {train,test}/<class>/*.png, or *{train,test}*.parquet (img, label)",
    "cifar100": "cifar-100-python, cifar-100-binary, {train,test}/<class>/*.png, or *{train,test}*.parquet (img, fine_label)",
    "fashion": "{train,t10k}-{images-idx3,labels-idx1}-ubyte, .gz or not (Debian: apt install dataset-fashion-mnist)",
}
"""Where each set's data lie, in words; folders above may have any name."""
OWN_NAMES = {
    "imagenet": re.compile(r"imagenet|ilsvrc", re.IGNORECASE),
    "cifar100": re.compile(r"cifar[-_]?100", re.IGNORECASE),
    "cifar10": re.compile(r"cifar[-_]?10(?!0)", re.IGNORECASE),
    "fashion": re.compile(r"fashion|mnist", re.IGNORECASE),
}
"""What a path says where it names a set; a table of pictures is else told by nothing from any other."""
CIFARS = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}


class Place(Copy):
    """One copy of one set, with its splits `train`, `val`, `test`; of pictures in class folders a split's file is the folder of these."""

    def lacks(self, split: str) -> str:
        """What to say where a split is missing."""
        return f"{self.folder}: no {split} split ({self.layout}); there are {', '.join(self.files) or 'none'}"


def find(root: Path, dataset: str) -> Place:
    """The only copy of a set below a folder. ConfigError where there is none, or more than one to choose from."""
    if dataset != "fashion" or not DEBIAN_FASHION.is_dir():
        check_data_folder(root, dataset)
    places, faults = locate(root, dataset)
    if not places and dataset == "fashion":
        places, _ = locate(DEBIAN_FASHION, dataset)
    return only_copy(places, root, dataset, EXPECTED[dataset], faults)


def locate(root: Path, dataset: str) -> tuple[list[Place], list[str]]:
    """Every copy of a set in a folder or at most four below it, and a line for each thing that looks like data and cannot be used."""
    places: list[Place] = []
    faults: list[str] = []
    for folder in folders(root, _searched):
        try:
            files = files_in(folder)
        except OSError as error:
            faults += [f"{folder}: cannot be read ({error.strerror})"] * folder.exists()
            continue
        faults += list(_original_archives(files))
        try:
            places += _in_folder(folder, files, dataset)
        except DataError as error:
            faults.append(str(error))
    return _meant(places, root, dataset), faults


def _meant(places: list[Place], root: Path, dataset: str) -> list[Place]:
    """Those of the places that are not another set's by name; where names say which is the set's own, that alone."""
    others = set(OWN_NAMES) - {dataset} - ({"imagenet"} if dataset == "folder" else set())
    left = [place for place in places if _names(place, root, dataset) or not any(_names(place, root, name) for name in others)]
    if dataset == "folder":
        return left or places
    return [place for place in left if _names(place, root, dataset)] or left


def _in_folder(folder: Path, files: list[Path], dataset: str) -> Iterator[Place]:
    """The copies of a set whose files lie in this folder."""
    if dataset == "fashion":
        yield from _idx_files(dataset, folder, files)
    elif dataset in CIFARS:
        yield from _cifar(dataset, folder, files)
    else:
        if (splits := _split_folders(folder)) and _has_pictures(splits["train"]):
            yield Place(dataset, FOLDERS, folder, {split: (path,) for split, path in splits.items()})
        yield from (Place(dataset, PARQUET, folder, there) for there in _tables(files, "label"))
        yield from (Place(dataset, TARS, folder, there) for there in _tars(folder, files))


def _searched(folder: Path) -> list[Path]:
    """Folders in a folder that may hold data: those of a split's class folders, which are many, are not searched."""
    splits = set(_split_folders(folder).values())
    return [path for path in subfolders(folder) if path not in splits]


def _split_folders(folder: Path) -> dict[str, Path]:
    """Folders named as a split that hold class folders; the first name of each split counts.

    One named `val` counts without them too: a flat one was not prepared, and is not to be passed over.
    """
    there = {path.name.lower(): path for path in subfolders(folder)}
    splits: dict[str, Path] = {}
    for word, split in WORDS.items():
        if word in there and split not in splits and (split == "val" or subfolders(there[word])):
            splits[split] = there[word]
    return splits if "train" in splits else {}


def _has_pictures(train: Path) -> bool:
    """Whether one of the first class folders, or a folder in it, holds a picture: texts have classes too."""
    for folder in subfolders(train)[:LOOKED_INTO]:
        for where in (folder, *subfolders(folder)[:1]):
            with os.scandir(where) as entries:
                if any(entry.name.lower().endswith(PICTURES) for entry in entries):
                    return True
    return False


def _names(place: Place, root: Path, dataset: str) -> bool:
    """Whether the names of a place's files, or of the folders on the way to them, are those of a set."""
    pattern = OWN_NAMES.get(dataset)
    paths = [path for files in place.files.values() for path in files]
    return pattern is not None and any(pattern.search(str(path.relative_to(root) if path.is_relative_to(root) else path)) for path in paths)


def _tables(files: list[Path], label: str) -> Iterator[Files]:
    """Sets of parquet files with pictures and labels; files whose names tell no split are training data."""
    parquet = [path for path in files if path.suffix == ".parquet"]
    unsplit = [path for path in parquet if not re.search("|".join(WORDS), path.name)]
    for there in [*shards(parquet, WORDS, ("parquet",)), {"train": unsplit} if unsplit else {}]:
        footers = [parquet_footer(path) for paths in there.values() for path in paths]
        if footers and all(has_column(each, label) and (has_column(each, "img") or has_column(each, "image")) for each in footers):
            yield {split: tuple(paths) for split, paths in there.items()}


def _tars(folder: Path, files: list[Path]) -> Iterator[Files]:
    """Sets of shards, by timm's `_info.json` or by their names."""
    info = folder / SHARD_INFO
    tars = [path for path in files if path.suffix == ".tar" and not _is_original(path)]
    if info in files:
        try:
            splits = json.loads(info.read_bytes())["splits"]
            named = {name: tuple(folder / file for file in split["filenames"]) for name, split in splits.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f'{info}: expected {{"splits": {{"train": {{"filenames": [...]}}}}}}') from None
        yield {WORDS.get(name, name): paths for name, paths in named.items()}
        return
    for there in shards(tars, WORDS, ("tar",)):
        yield {split: tuple(paths) for split, paths in there.items()}


def _is_original(path: Path) -> bool:
    return path.name.startswith("ILSVRC2012_img_")


def _original_archives(files: list[Path]) -> Iterator[str]:
    """ImageNet as it is downloaded."""
    for path in files:
        if _is_original(path) and path.suffix == ".tar":
            yield f"{path}: the original archive: {UNPACK['train' if 'train' in path.name else 'val']}"


def _cifar(dataset: str, folder: Path, files: list[Path]) -> Iterator[Place]:
    kind = CIFARS[dataset]
    for layout, there in cifar.locate_batches(kind, files):
        yield Place(dataset, layout, folder, there)
    if splits := cifar.locate_folders(kind, folder):
        yield Place(dataset, cifar.FOLDERS, folder, splits)
    for tables in _tables(files, kind.label):
        yield Place(dataset, cifar.PARQUET, folder, tables)


def _idx_files(dataset: str, folder: Path, files: list[Path]) -> Iterator[Place]:
    """Images and labels of each split, as MNIST's authors wrote theirs."""
    names = {path.name.removesuffix(".gz").replace(".idx", "-idx"): path for path in files}
    there: dict[str, tuple[Path, ...]] = {}
    for split, word in (("train", "train"), ("test", "t10k")):
        pair = [f"{word}-images-idx3-ubyte", f"{word}-labels-idx1-ubyte"]
        if names.keys() >= set(pair):
            there[split] = tuple(names[name] for name in pair)
    if there:
        yield Place(dataset, IDX, folder, there)
