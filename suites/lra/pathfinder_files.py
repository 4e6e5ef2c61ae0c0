"""Pathfinder and Path-X as the original archive has them: `<difficulty>/metadata/<batch>.npy` and `<difficulty>/imgs/<batch>/*.png`.

Shape letters: N items, H height, W width.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hgrn2_bench.config import require
from hgrn2_bench.errors import DataError
from hgrn2_bench.images import EMPTY, decode_image
from hgrn2_bench.subsets import check_count, drawn, random_parts
from suites.lra.items import Split
from suites.lra.pathfinder_metadata import LEAST_AGREEMENT, Line, foreign_contours, margin_agreement, metadata, size_of
from suites.lra.places import RESOLUTIONS, Place

COUNT = 200_000
"""Images of each difficulty."""
DIFFICULTY = "curv_contour_length_14"
"""The one that everybody reports."""
KNOWN_EMPTY = {("pathfinder32", "curv_baseline", "imgs/0/sample_172.png")}
"""Empty in the published archive."""


@dataclass(frozen=True)
class PathfinderOptions:
    """How Pathfinder is read. The defaults are the published ones (state-spaces/s4 src/dataloaders/lra.py)."""

    difficulty: str = DIFFICULTY
    held_out: float = 0.1
    """Share of all images for validation, and as much for testing."""
    items: dict[str, int] = field(default_factory=dict)
    """At most so many items of a split, drawn by the seed; all of a split that is not named here, or with 0."""
    seed: int = 42
    count: int | None = COUNT
    """Images that the difficulty must have; None: any number."""

    def __post_init__(self) -> None:
        require(0 < self.held_out < 0.5, f"held_out={self.held_out} must be above 0 and below 0.5")


def read_pathfinder(place: Place, options: PathfinderOptions) -> dict[str, Split]:
    """The splits train, val and test: seeded random parts of all images whose file is not empty.

    DataError names file and line, or says why the folder is refused: another difficulty under its name, labels of other pictures.
    """
    (folder,) = place.of(options.difficulty)
    lines, empty = [], 0
    for line in metadata(folder):
        if size_of(folder, line):
            lines.append(line)
        else:
            empty += 1
    check_count(str(folder), len(lines) + empty, options.count)
    held_out = int(options.held_out * len(lines))
    if not held_out:
        raise DataError(f"{folder}: {len(lines)} images, too few to keep {options.held_out:g} of them for validation")
    parts = random_parts((len(lines) - 2 * held_out, held_out, held_out), options.seed)
    size = RESOLUTIONS[place.what]
    _refuse_foreign(folder, lines, size)
    splits = {}
    for split, part in zip(("train", "val", "test"), parts, strict=True):
        chosen = drawn(part, options.items.get(split, 0), options.seed)
        splits[split] = _images(folder, [lines[i] for i in chosen], size, empty)
    return splits


def _refuse_foreign(folder: Path, lines: list[Line], size: int) -> None:
    if fault := foreign_contours(lines, folder.name):
        raise DataError(f"{folder}: {fault}")
    agreement = margin_agreement(folder, lines, size)
    if agreement is not None and agreement < LEAST_AGREEMENT:
        raise DataError(f"{folder}: its metadata belong to other pictures (margins agree in {agreement:.0%} of pairs; chance is 50%)")


def _images(folder: Path, lines: list[Line], size: int, empty: int) -> Split:
    pixels_NHW1 = np.empty((len(lines), size, size, 1), np.uint8)
    for i, line in enumerate(lines):
        path = folder / line.name
        pixels_NHW1[i] = decode_image(path, str(path), "L", size)
    return Split(pixels_NHW1, np.array([line.label for line in lines], np.int64), skipped={EMPTY: empty} if empty else {})
