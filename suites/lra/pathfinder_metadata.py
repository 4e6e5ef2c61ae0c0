"""Metadata of Pathfinder's pictures: a file for each batch, `metadata/<batch>.npy`, and whether pictures and metadata belong together.

A metadata file is plain text in spite of its ending, a line a picture: folder, file, number, label, continuity, contour length,
distractor length, dash length, dash thickness, margin, number of contrasts. The public generator writes true NumPy arrays of strings.

Two trees named pathfinder128 were published, and labels of one do not fit the pictures of the other: a model stays at chance. No cheap
statistic of a picture tells its label (that is the task), but Path-X draws the margin between dashes anew for each picture, and its
metadata name it.

Shape letters: H height, W width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hgrn2_bench.errors import DataError
from hgrn2_bench.images import decode_image

FIELDS = 10
"""Least number of fields of a line; the last may be missing."""
CONTOURS = {"curv_baseline": 6, "curv_contour_length_9": 9, "curv_contour_length_14": 14}
"""Dashes of a path, by difficulty."""
MAGIC = b"\x93NUMPY"
SAMPLE = 64
"""Pictures of each margin that are compared with their metadata."""
LEAST_SAMPLE = 10
LEAST_AGREEMENT = 0.75
"""Share of pairs of pictures ranked as their margins are: 1 where pictures belong to the metadata, 0.5 where they do not."""
INK = 64
"""Grey level above which a pixel belongs to a dash."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of metadata."""

    where: str
    """File and line."""
    batch: str
    """Stem of the metadata file."""
    fields: tuple[str, ...]

    @property
    def name(self) -> str:
        """`imgs/0/sample_5.png`, below the difficulty."""
        return f"{self.fields[0]}/{self.fields[1]}"

    @property
    def contour(self) -> float:
        """Dashes of a path; NaN where the field is no number, as in the others."""
        return _number(self.fields[5])

    @property
    def dash(self) -> tuple[float, float]:
        """Length and thickness in pixels."""
        return _number(self.fields[7]), _number(self.fields[8])

    @property
    def margin(self) -> float:
        """Pixels that a dash keeps from others."""
        return _number(self.fields[9])

    @property
    def label(self) -> int:
        """1 where the markers lie on one path."""
        return int(self.fields[3])


def metadata(folder: Path) -> Iterator[Line]:
    """All lines of a difficulty, files by their number. DataError names the line that is none."""
    files = [path for path in (folder / "metadata").glob("*.npy") if path.stem.isdecimal()]
    if not files:
        raise DataError(f"{folder}: no metadata/<number>.npy; expected {folder.name}/metadata/*.npy and {folder.name}/imgs/*/*.png")
    some = False
    for path in sorted(files, key=lambda path: int(path.stem)):
        for number, fields in enumerate(_rows(path), 1):
            if len(fields) < FIELDS or fields[3] not in ("0", "1"):
                text = " ".join(fields)[:60]
                raise DataError(f"{path}:{number}: {text!r} is no line of metadata (folder, file, number, label 0 or 1, ...)")
            yield Line(f"{path}:{number}", path.stem, tuple(fields))
            some = True
    if not some:
        raise DataError(f"{folder / 'metadata'}: its files are empty: unpack the archive again")


def _rows(path: Path) -> Iterator[list[str]]:
    with path.open("rb") as file:
        binary = file.read(len(MAGIC)) == MAGIC
    try:
        if binary:
            rows = np.load(path, allow_pickle=False).astype(str)
            yield from (row.split() if rows.ndim == 1 else list(row.tolist()) for row in rows)
        else:
            yield from (line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (ValueError, OSError) as error:  # UnicodeDecodeError is a ValueError
        raise DataError(f"{path}: neither text nor a NumPy array of strings, or cut short ({str(error).splitlines()[0]})") from None


def size_of(folder: Path, line: Line) -> int:
    """Bytes of an image's file. DataError where it is missing."""
    try:
        return (folder / line.name).stat().st_size
    except OSError:
        raise DataError(f"{line.where}: no file {folder / line.name}: unpack the archive again") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def foreign_contours(lines: Sequence[Line], difficulty: str) -> str:
    """What is wrong with the contour lengths for a folder of this name; empty where nothing is, or the name is none of the three."""
    expected = CONTOURS.get(difficulty)
    found = {line.contour for line in lines}
    if expected is None or found == {expected}:
        return ""
    return f"contours of {', '.join(f'{each:g}' for each in sorted(found))} dashes, expected {expected}: another difficulty under this name"


def margin_agreement(folder: Path, lines: Sequence[Line], size: int) -> float | None:
    """Share of pairs of pictures in which the one of the wider margin shows wider gaps: about 1, or 0.5 where labels are of other pictures.

    None where not two margins were drawn, or too few pictures have one of them.
    """
    margins = sorted({line.margin for line in lines})
    if len(margins) != 2:
        return None
    pieces = [_pieces(folder, [line for line in lines if line.margin == margin], size) for margin in margins]
    if min(map(len, pieces)) < LEAST_SAMPLE:
        return None
    narrow, wide = (np.array(each) for each in pieces)
    return float((wide[:, None] > narrow[None]).mean() + 0.5 * (wide[:, None] == narrow[None]).mean())


def _pieces(folder: Path, lines: Sequence[Line], size: int) -> list[int]:
    """Into how many pieces the ink falls once gaps of the narrower margin are closed, for a sample spread evenly over all batches."""
    from scipy import ndimage

    disc = np.hypot(*np.mgrid[-2:3, -2:3]) <= 2
    found = []
    for line in lines[:: max(1, len(lines) // SAMPLE)][:SAMPLE]:
        if size_of(folder, line):
            ink_HW = decode_image(folder / line.name, str(folder / line.name), "L", size)[..., 0] > INK
            found.append(int(ndimage.label(ndimage.binary_dilation(ink_HW, disc), np.ones((3, 3)))[1]))
    return found
