"""What `data imagenet check` tells of class folders: their names, order and content, and whether train and val agree."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hgrn2_bench.doctor import NOTE, OK, PROBLEM, Finding, counted
from suites.imagenet.files import timm_wnids
from suites.imagenet.places import PICTURES, WNID, Place
from suites.imagenet.readers import Listing, in_order, list_classes

COPY_AGAIN = "copy or unpack it again from its source"
NAMED = 5
COMPARED = 3
"""Pictures of two class folders with the same names that are compared byte by byte."""
MAPPING = (
    "move each picture into the folder of its wnid: line i of the devkit's data/ILSVRC2012_validation_ground_truth.txt is the ILSVRC id "
    "of picture i, whose wnid is in data/meta.mat; ids are not in the order of wnids"
)


def class_findings(classes: Sequence[str]) -> Iterator[Finding]:
    """The classes of a set by name, against ImageNet's where they are wnids; none where the files name no classes."""
    if not classes:
        yield Finding(NOTE, "classes: the files name none", "labels are taken as they are")
    elif all(map(WNID.fullmatch, classes)):
        yield from _wnid_findings(classes)
    else:
        yield Finding(OK, f"classes: {len(classes):,}, from {classes[0]} = 0 to {classes[-1]} = {len(classes) - 1}")


def _wnid_findings(classes: Sequence[str]) -> Iterator[Finding]:
    known = timm_wnids()
    text = f"classes: {len(classes):,} wnids, from {classes[0]} = 0 to {classes[-1]} = {len(classes) - 1}"
    if not known:
        yield Finding(NOTE, f"{text}; not compared with ImageNet's", "timm has the list: pip install timm")
    elif tuple(classes) == known:
        yield Finding(OK, f"{text}, those of ImageNet-1k in its order")
    elif foreign := [name for name in classes if name not in set(known)]:
        yield Finding(PROBLEM, f"{text}; {len(foreign):,} not of ImageNet-1k: {_some(foreign)}", "choose dataset=folder, or remove them")
    elif missing := [name for name in known if name not in set(classes)]:
        remedy = f"{COPY_AGAIN}; where a part is meant, choose dataset=folder"
        yield Finding(PROBLEM, f"{text}; {len(missing):,} of ImageNet-1k are missing: {_some(missing)}", remedy)
    else:
        yield Finding(PROBLEM, f"{text}; not in ImageNet's order, so that labels mean other classes", COPY_AGAIN)


def folder_findings(place: Place) -> Iterator[Finding]:
    """Of pictures in class folders: hidden, empty, unprepared, twofold and disagreeing folders, files that are no pictures."""
    listings: dict[str, Listing] = {}
    for split, (folder,) in place.files.items():
        listings[split] = listing = list_classes(folder)
        yield from _passed_over(split, folder, listing)
        if not listing:
            flat = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES]
            text = f"{split}: {folder} has {len(flat):,} pictures and no class folders: not prepared"
            yield Finding(PROBLEM, text, MAPPING)
        elif len(listing) == 1 and len(listings["train"]) > 1:
            yield Finding(PROBLEM, f"{split}: {folder} has the class {next(iter(listing))} alone: not prepared", MAPPING)
        yield from _twofold(split, folder, listing)
    train = listings["train"]
    yield from _order_findings(list(train))
    for split, listing in listings.items():
        missing, foreign = [name for name in train if name not in listing], [name for name in listing if name not in train]
        if len(listing) > 1 and (missing or foreign):
            text = f"{split}: {len(missing)} classes of train are missing{_listed(missing)}"
            text += f"; {len(foreign)} are not in train{_listed(foreign)}"
            yield Finding(PROBLEM if foreign else NOTE, text, "labels are those of train's folders; rename or remove the others")


def _passed_over(split: str, folder: Path, listing: Listing) -> Iterator[Finding]:
    """Folders that are no classes, and files that are no pictures."""
    there = sorted(path for path in folder.iterdir() if path.is_dir())
    hidden = [path.name for path in there if path.name.startswith(".")]
    empty = [path.name for path in there if path.name not in listing and not path.name.startswith(".")]
    if hidden:
        remedy = "passed over; other tools take it as a class: remove it"
        yield Finding(NOTE, f"{split}: {counted(len(hidden), 'hidden folder')}{_listed(hidden)}", remedy)
    if empty:
        remedy = f"passed over; {COPY_AGAIN}, or remove it"
        yield Finding(NOTE, f"{split}: {counted(len(empty), 'folder')} without pictures{_listed(empty)}", remedy)
    others = [
        f"{name}/{path.name}"
        for name in listing
        for path in (folder / name).iterdir()
        if path.suffix.lower() not in PICTURES and not path.is_dir()
    ]
    if others:
        yield Finding(NOTE, f"{split}: {counted(len(others), 'file')} other than pictures{_listed(sorted(others))}", "passed over")


def _twofold(split: str, folder: Path, listing: Listing) -> Iterator[Finding]:
    """Class folders whose names differ by case or by a copy's ending alone, or which hold the same pictures."""
    by_name: dict[str, list[str]] = {}
    by_files: dict[tuple[str, ...], list[str]] = {}
    for name, files in listing.items():
        by_name.setdefault(re.sub(r"([ _-]*(copy|\(\d+\)))+$", "", name.casefold()), []).append(name)
        by_files.setdefault(tuple(files), []).append(name)
    for several in by_name.values():
        if len(several) > 1:
            yield Finding(PROBLEM, f"{split}: one class in {len(several)} folders: {_some(several)}", "join them")
    for inside, alike in by_files.items():
        first, *others = alike
        same = [name for name in others if all(filecmp.cmp(folder / first / f, folder / name / f, False) for f in inside[:COMPARED])]
        if same:
            yield Finding(PROBLEM, f"{split}: the same pictures in {_some([first, *same])}", "remove all but one of the folders")


def _order_findings(classes: Sequence[str]) -> Iterator[Finding]:
    """Where other tools number the classes otherwise."""
    if in_order(classes) != sorted(classes):
        yield Finding(NOTE, "classes: numbers, taken by value", "torchvision takes them as text: 0, 1, 10, 2")
    natural = sorted(classes, key=lambda name: [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", name)])
    if natural != in_order(classes):
        yield Finding(NOTE, "classes: taken in the order of their text", "timm orders by the numbers in names, so its labels differ")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + ", ..." * (len(names) > NAMED)


def _listed(names: Sequence[str]) -> str:
    return f": {_some(names)}" if names else ""
