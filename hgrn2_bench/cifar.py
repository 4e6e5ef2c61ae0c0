"""CIFAR-10 and CIFAR-100: what their files are called, and which a folder holds. Imports neither torch nor numpy."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hgrn2_bench.files import Files, subfolders

SIZE = 32
"""Pixels in height and width."""
PICKLES, BINARIES, FOLDERS, PARQUET = "python pickles", "binary files", "image folders", "parquet"
"""Layouts."""
IMAGE_COLUMN = "img|image"
NAMES_100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle caterpillar cattle
chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter
palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip
turtle wardrobe whale willow_tree wolf woman worm
"""

COUNTS = {"train": 50_000, "test": 10_000}
"""Pictures of each split, of either set."""


@dataclass(frozen=True)
class Cifar:
    """One of the two sets."""

    name: str
    classes: tuple[str, ...]
    """In the order of the labels."""
    label: str
    """The column of a table that holds the class."""
    key: str
    """Of a pickle."""
    label_bytes: int
    """Before the pixels of an item of a binary file; the last of them is the class."""
    stems: tuple[str, str]
    """Patterns of the names of training and test files, without their ending."""

    @property
    def folder_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What class folders are called: the names, or the labels."""
        return self.classes, tuple(map(str, range(len(self.classes))))


CIFAR10 = Cifar(
    "CIFAR-10",
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "label",
    "labels",
    1,
    (r"data_batch_\d", "test_batch"),
)
CIFAR100 = Cifar("CIFAR-100", tuple(NAMES_100.split()), "fine_label", "fine_labels", 2, ("train", "test"))


def locate_batches(cifar: Cifar, files: Sequence[Path]) -> Iterator[tuple[str, Files]]:
    """Layout and files of a set as its authors give it, among the files of a folder."""
    for layout, ending in ((PICKLES, ""), (BINARIES, ".bin")):
        there: Files = {
            split: tuple(path for path in files if re.fullmatch(stem + re.escape(ending), path.name))
            for split, stem in zip(("train", "test"), cifar.stems, strict=True)
        }
        if any(there.values()):
            yield layout, there


def locate_folders(cifar: Cifar, folder: Path) -> Files:
    """The splits of a folder of class folders; empty where it holds no class of the set."""
    splits: Files = {split: (folder / split,) for split in ("train", "test") if (folder / split).is_dir()}
    inside = {path.name for paths in splits.values() for path in subfolders(paths[0])}
    names, numbers = map(set, cifar.folder_names)
    return splits if inside & names or inside >= numbers else {}
