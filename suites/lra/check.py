"""`data lra check [DIR]`: what a folder holds of the Long Range Arena, whether it is whole, and how to repair it. Changes nothing.

Expected numbers: the published files (see the readers), where a number is the literature's only a difference is a note.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from hgrn2_bench.doctor import NOTE, OK, PROBLEM, Finding, counted
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.images import grey
from hgrn2_bench.rows import parquet_rows
from suites.lra import images, listops, retrieval, text
from suites.lra.characters import count_vocabulary
from suites.lra.check_pathfinder import check_pathfinder
from suites.lra.places import CLASSES, EXPECTED, Place, locate

COPY_AGAIN = "copy or unpack it again from its source"
LISTOPS_HEADER = b"Source\tTarget"
LISTOPS_BRACKETS = ((b"[", b"]"), (b"(", b")"))
TEXT_DUPLICATES = (96, 199, 123)
"""Inside train, inside test, and texts of train that stand in test too: measured on the real files."""
TEXT_VOCABULARY, RETRIEVAL_VOCABULARY = 134, 98
GREY_MEAN, GREY_SD, GREY_TOLERANCE = 122.6, 61.0, 1.0
"""Of the training images (state-spaces/s4 src/dataloaders/basic.py); JPEG's losses change them by a tenth."""
LOPSIDED = 1.5
"""Times its fair share that a class has in a head of a sorted file."""


def findings(root: Path) -> Iterator[Finding]:
    """A line for each thing found in a folder, as it is found. ConfigError where there is nothing of the Long Range Arena."""
    found = locate(root)
    if not found.places and not found.faults:
        raise ConfigError(f"nothing of the Long Range Arena in {root}: expected for example {EXPECTED['listops']} ({EXPECTED['text']})")
    for fault in found.faults:
        yield Finding(PROBLEM, fault)
    for task, expected in EXPECTED.items():
        places = found.of(task)
        if not places:
            yield Finding(NOTE, f"{task}: not here", f"expected {expected}")
        if len(places) > 1:
            where = ", ".join(map(str, places))
            yield Finding(PROBLEM, f"{task}: {len(places)} copies: {where}", "give a run the folder of the one that is well")
        for place in places:
            yield from _checked(place)


def _checked(place: Place) -> Iterator[Finding]:
    """Findings of one copy; what its reader refuses is a problem too."""
    checks = {"listops": _listops, "text": _text, "retrieval": _retrieval, "image": _image}
    yield Finding(OK, f"{place.what}: found {place}")
    try:
        yield from checks.get(place.what, check_pathfinder)(place)
    except ConfigError as error:
        yield Finding(PROBLEM, f"{place.what}: {error}")


def count_finding(place: Place, split: str, number: int, expected: int, soft: bool = False) -> Finding:
    """Whether a split has as many items as it should; `soft` where the expected number is not certain."""
    found = f"{place.what} {split}: {number:,} items"
    if number == expected:
        return Finding(OK, f"{found}, as expected")
    if soft:
        return Finding(NOTE, f"{found}, the literature has {expected:,}", "see that the file is whole")
    return Finding(PROBLEM, f"{found}, expected {expected:,}", COPY_AGAIN)


def order_findings(place: Place, split: str, labels: Sequence[int] | np.ndarray, classes: int, expected: int) -> Iterator[Finding]:
    """Whether an incomplete split is the head of a file sorted by class, and whether a whole one is sorted."""
    labels_N = np.asarray(labels)
    counts = np.bincount(labels_N, minlength=classes)
    text = f"{place.what} {split}: items by class {', '.join(f'{count:,}' for count in counts)}"
    if len(labels_N) < expected and counts.max() > LOPSIDED * len(labels_N) / classes:
        remedy = "such a head of a sorted file teaches nothing; give the whole file, of which readers draw a part by seed"
        yield Finding(PROBLEM, f"{text}: a subset sorted by class", remedy)
        return
    is_sorted = np.count_nonzero(np.diff(labels_N)) < classes
    yield Finding(OK, f"{text}{', sorted by class' if is_sorted else ''}")


def _listops(place: Place) -> Iterator[Finding]:
    for split, expected in listops.COUNTS.items():
        (path,) = place.of(split)
        number, faults, end = 0, [], b"\n"
        with path.open("rb") as file:
            if not (header := file.readline()).rstrip().startswith(LISTOPS_HEADER):
                yield Finding(PROBLEM, f"listops {split}: {path}:1: {header[:30]!r} instead of Source and Target", COPY_AGAIN)
            for number, line in enumerate(file, 1):
                end = line[-1:]
                if fault := _listops_fault(line):
                    faults.append(f"{path}:{number + 1}: {fault}")
        yield from _line_findings(f"listops {split}", path, faults, end)
        yield count_finding(place, split, number, expected)


def _listops_fault(line: bytes) -> str:
    """What is wrong with one example; empty for a good one."""
    source, _, target = line.rstrip(b"\r\n").partition(b"\t")
    if len(target) != 1 or not target.isdigit():
        return "not an expression, a tab and a digit"
    uneven = [f"{left.decode()} {right.decode()}" for left, right in LISTOPS_BRACKETS if source.count(left) != source.count(right)]
    return f"brackets {uneven[0]} do not match" if uneven else ""


def _line_findings(what: str, path: Path, faults: list[str], end: bytes) -> Iterator[Finding]:
    """The first bad line and their number; a last line without its end."""
    if faults:
        yield Finding(PROBLEM, f"{what}: {counted(len(faults), 'bad line')}, the first {faults[0]}", COPY_AGAIN)
    if end != b"\n":
        yield Finding(NOTE, f"{what}: the last line of {path} has no end", "see whether the file was cut short")


def _text(place: Place) -> Iterator[Finding]:
    options = text.TextOptions()
    distinct: dict[str, set[bytes]] = {}
    inside = []
    for split, expected in text.COUNTS.items():
        labels, long, seen = [], 0, set()
        for row in text.text_rows(place, split):
            if row.label >= 0:
                labels.append(row.label)
                long += len(row.texts[0]) >= options.max_length
                seen.add(hashlib.blake2b(row.texts[0].encode("utf-8", "surrogatepass"), digest_size=16).digest())
        distinct[split] = seen
        inside.append(len(labels) - len(seen))
        yield count_finding(place, split, len(labels), expected)
        yield from order_findings(place, split, labels, 2, expected)
        yield Finding(OK, f"text {split}: {long:,} texts are cut to {options.max_length - 1} characters and eos")
    yield _vocabulary(place, options, TEXT_VOCABULARY)
    yield _duplicates((*inside, len(distinct["train"] & distinct["test"])))


def _vocabulary(place: Place, options: text.TextOptions | retrieval.RetrievalOptions, expected: int) -> Finding:
    rows = text.text_rows if place.what == "text" else retrieval.retrieval_rows
    number = len(count_vocabulary(partial(rows, place, "train"), options.max_length, options.min_freq))
    if number == expected:
        return Finding(OK, f"{place.what}: vocabulary of {number} ids, as expected")
    return Finding(NOTE, f"{place.what}: vocabulary of {number} ids", f"the published files give {expected}")


def _duplicates(found: tuple[int, ...]) -> Finding:
    line = f"text: {found[0]} texts twice in train, {found[1]} in test; {found[2]} of train are in test too"
    if found == TEXT_DUPLICATES:
        return Finding(OK, f"{line}, as in the published files; left in")
    return Finding(NOTE, line, f"left in; the published files have {', '.join(map(str, TEXT_DUPLICATES))}")


def _retrieval(place: Place) -> Iterator[Finding]:
    for split, expected in retrieval.COUNTS.items():
        (path,) = place.of(split)
        labels: Counter[int] = Counter()
        faults, number, end = [], 0, b"\n"
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                end = line[-1:]
                try:
                    labels[retrieval.parse_line(line).label] += 1
                except ValueError as error:
                    faults.append(f"{path}:{number}: {error}")
        yield from _line_findings(f"retrieval {split}", path, faults, end)
        yield count_finding(place, split, number, expected, soft=split != "train")
        yield Finding(OK, f"retrieval {split}: {labels[0]:,} pairs of different papers, {labels[1]:,} of related ones")
        if split == "train" and not faults:
            yield _vocabulary(place, retrieval.RetrievalOptions(), RETRIEVAL_VOCABULARY)


def _image(place: Place) -> Iterator[Finding]:
    for split, expected in images.COUNTS.items():
        labels: list[int] = []
        empty: list[str] = []
        total, squares, pixels = 0, 0, 0
        for batch in images.image_batches(place, split):
            labels += batch.labels_N.tolist()
            empty += batch.empty
            values = grey(batch.pixels_NHW3).astype(np.int64)
            total, squares, pixels = total + int(values.sum()), squares + int((values**2).sum()), pixels + values.size
        if empty:
            yield Finding(PROBLEM, f"image {split}: {counted(len(empty), images.EMPTY)}, left out: {', '.join(empty[:5])}", COPY_AGAIN)
        yield count_finding(place, split, len(labels), expected)
        yield from order_findings(place, split, labels, len(CLASSES), expected)
        if split == "train":
            mean = total / pixels
            yield _grey_finding(mean, (squares / pixels - mean**2) ** 0.5)
    if _is_jpeg(place):
        yield Finding(NOTE, "image: the images were compressed as JPEG, which CIFAR-10 is not", 'report results as "CIFAR-10 (JPEG)"')


def _grey_finding(mean: float, sd: float) -> Finding:
    line = f"image: grey mean {mean:.1f}, sd {sd:.1f} of 255"
    if abs(mean - GREY_MEAN) <= GREY_TOLERANCE and abs(sd - GREY_SD) <= GREY_TOLERANCE:
        return Finding(OK, f"{line}, as expected")
    return Finding(NOTE, line, f"CIFAR-10 has {GREY_MEAN} and {GREY_SD}: other images, or a part of them")


def _is_jpeg(place: Place) -> bool:
    (first, *_) = place.of("train")
    if place.layout == "parquet":
        image, _ = next(parquet_rows(first, ("img|image", "label")))
        content = image["bytes"] if isinstance(image, dict) else image
        return bytes(content or b"").startswith(b"\xff\xd8")
    return place.layout == "image folders" and next(first.glob("*/*.jp*g"), None) is not None
