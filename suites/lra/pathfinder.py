"""Pathfinder images (Long Range Arena, arXiv 2011.04006), drawn and seeded per item: do two markers lie on one dashed path, yes or no.

An image holds two long paths of dashes and several short ones. A disc marks the start of a long path, another one the end of the same
path (label 1) or of the other (label 0). The distribution is that of the published generator, with the byte scaling of old SciPy:

- A path grows dash by dash. Its pivot, a point in the gap before each dash, moves on along the last direction; the next head is drawn
  from a circle around the pivot by (1 - taken) cos^2(continuity x turn). A dash keeps its margin from the margins of what is taken.
- The two long paths grow in turn from the middle of the image. If either is stuck, both are thrown away and begun anew.
- A dash counts as taken only when the next of its path stands, as neighbours in a path are closer than their margins.

It is fast because dashes are small stamps made once (`strokes`), a test or an update touches only the stamp's square, and the dilated mask
that weighs heads is kept up to date instead of made anew. Points are (y, x) in pixels. Shape letters: N images, H height, W width.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from hgrn2_bench.errors import ConfigError
from suites.lra.strokes import Bytes, Pen, Point, Stamp, dash, dilate, disc, step

Number = TypeVar("Number", bound=np.generic)

FULL = 255
"""Value of a pixel that is wholly covered."""
CONTOUR_LENGTHS = (6, 9, 14)
"""Easy, intermediate, hard: the published difficulties."""
DASH_TRIES = 3
"""Heads drawn for one dash before the path is stuck."""
DISTRACTOR_TRIES = 5
"""Attempts at one short path before it is left out."""
COLLISION = round(1.8 * FULL)
"""Two dashes are too close where their spaces add up to this."""
MIN_FREE = 0.01
"""Share of the pixels where a short path must be able to start; with less it is left out at once."""


@dataclass(frozen=True)
class Parameters:
    """The published numbers of one resolution and difficulty; lengths in pixels."""

    size: int
    border: int
    """Width of the frame that is taken from the start."""
    dash_length: int
    dash_thickness: float
    margins: tuple[int, ...]
    """One is drawn per image."""
    seed_distance: int
    """From the first long path's tail to the second's; twice this from every side to the first."""
    continuity: float
    """Turns of 90 degrees / continuity and more never happen."""
    marker_radius: float
    distractor_dashes: int
    """Dashes of all short paths together, at most."""
    path_contrast: float
    """Brightness of the long paths; markers have 1."""
    distractor_contrast: float
    contour_length: int = CONTOUR_LENGTHS[-1]
    """Dashes of a long path."""

    @property
    def distractor_length(self) -> int:
        """Dashes of a short path."""
        return self.contour_length // 3

    @property
    def num_distractors(self) -> int:
        """Short paths, where there is room for all."""
        return self.distractor_dashes // self.distractor_length


_HARD = {
    32: Parameters(32, 1, 2, 0.5, (1,), 7, 1.0, 1.5, 20, path_contrast=1.5, distractor_contrast=2.0),
    64: Parameters(64, 1, 5, 1.0, (1,), 12, 1.8, 2.5, 22, path_contrast=0.8, distractor_contrast=0.8),
    128: Parameters(128, 1, 5, 1.5, (2, 3), 20, 1.8, 3.0, 35, path_contrast=0.9, distractor_contrast=0.9),
    256: Parameters(256, 22, 5, 2.0, (3,), 27, 1.8, 5.0, 30, path_contrast=1.0, distractor_contrast=1.0),
}


def parameters(resolution: int, contour_length: int = CONTOUR_LENGTHS[-1]) -> Parameters:
    """The published numbers for images of `resolution` pixels a side; 128 is Path-X."""
    if resolution not in _HARD:
        raise ConfigError(f"resolution={resolution} is not one of Pathfinder's: {', '.join(map(str, _HARD))}")
    if contour_length not in CONTOUR_LENGTHS:
        raise ConfigError(f"contour_length={contour_length} is not one of Pathfinder's: {', '.join(map(str, CONTOUR_LENGTHS))}")
    return replace(_HARD[resolution], contour_length=contour_length)


class Dash(NamedTuple):
    """One dash of a path."""

    tail: Point
    head: Point
    stamp: Stamp
    anchor: Point
    """The end its stamp starts from: the tail of a path's first dash, the heads of all others."""


@dataclass
class Path:
    """A path as far as it has grown."""

    dashes: list[Dash]
    pivot: Point
    angle: float
    """Direction of the last dash, radians."""


@dataclass(frozen=True)
class Drawing:
    """What an image shows."""

    label: int
    """1: both markers are on one path."""
    paths: tuple[Path, Path]
    distractors: list[Path]
    markers: tuple[Point, Point]


def draw_many(parameters: Parameters, seed: int, indices: range) -> dict[str, Bytes]:
    """The images (N, H, W) and labels (N) of these indices, under those names."""
    items = [draw(parameters, seed, index) for index in indices]
    images = np.array([image for image, _ in items], np.uint8).reshape(-1, parameters.size, parameters.size)
    return {"images": images, "labels": np.array([label for _, label in items], np.uint8)}


def draw(parameters: Parameters, seed: int, index: int) -> tuple[Bytes, int]:
    """Image (H, W) and label of item `index`: a function of these three alone."""
    drawing = sketch(parameters, seed, index)
    return paint(parameters, drawing), drawing.label


def sketch(parameters: Parameters, seed: int, index: int) -> Drawing:
    """Where everything lies in the image of item `index`."""
    rng = np.random.Generator(np.random.PCG64([seed, index]))
    label, margin = _below(rng, 2), parameters.margins[_below(rng, len(parameters.margins))]
    hand = _Hand(parameters, Pen(parameters.dash_length, parameters.dash_thickness, margin), rng)
    paths, distractors = hand.long_paths(), hand.short_paths()
    start = _below(rng, 2)
    end = start if label else 1 - start
    return Drawing(label, paths, distractors, (paths[start].dashes[0].tail, paths[end].dashes[-1].head))


def paint(parameters: Parameters, drawing: Drawing) -> Bytes:
    """The image (H, W): the brightest of all things at each pixel, scaled so that 0 and 255 occur."""
    marker, first = disc(parameters.marker_radius), drawing.paths[0].dashes[0]
    pad = max(len(marker) // 2, first.stamp.reach)
    layers = np.zeros((3, parameters.size + 2 * pad, parameters.size + 2 * pad), np.uint8)
    for layer, paths in zip(layers, (drawing.paths, drawing.distractors), strict=False):
        for each in (each for path in paths for each in path.dashes):
            _lay(layer, each.stamp.ink, (each.anchor[0] + pad - each.stamp.reach, each.anchor[1] + pad - each.stamp.reach))
    for y, x in drawing.markers:
        _lay(layers[2], marker, (y + pad - len(marker) // 2, x + pad - len(marker) // 2))
    contrasts = np.array([parameters.path_contrast, parameters.distractor_contrast, 1.0])
    image = (layers[:, pad:-pad, pad:-pad] * contrasts[:, None, None]).max(axis=0)
    return np.rint((image - image.min()) * (FULL / (image.max() - image.min()))).astype(np.uint8)


def _lay(layer: Bytes, picture: Bytes, corner: Point) -> None:
    """Put a square picture on the layer, its first pixel at `corner`."""
    square = layer[corner[0] : corner[0] + len(picture), corner[1] : corner[1] + len(picture)]
    np.maximum(square, picture, out=square)


def _below(rng: np.random.Generator, n: int) -> int:
    """Uniform in 0 .. n-1; several times faster than `integers` for one number, and n is small."""
    return int(rng.random() * n)


def _direction(rng: np.random.Generator) -> float:
    """A whole number of degrees in [-180, 180), in radians."""
    return math.radians(_below(rng, 360) - 180)


class _Hand:
    """Draws the paths of one image."""

    def __init__(self, parameters: Parameters, pen: Pen, rng: np.random.Generator) -> None:
        self.parameters, self.pen, self.rng = parameters, pen, rng
        self.taken = _Taken(parameters.size, parameters.border, pen)

    def long_paths(self) -> tuple[Path, Path]:
        """Both long paths, grown in turn; begun anew until both have their length."""
        while True:
            self.taken.clear()
            first, second = self._seeds()
            if all(self._grow(path) for _ in range(self.parameters.contour_length - 1) for path in (first, second)):
                self.taken.add(first.dashes[-1])
                self.taken.add(second.dashes[-1])
                return first, second

    def short_paths(self) -> list[Path]:
        """The distractors, as many as there is room for."""
        found = (self._short_path() for _ in range(self.parameters.num_distractors))
        return [path for path in found if path]

    def _seeds(self) -> tuple[Path, Path]:
        """The first dashes of the long paths. That far from the frame no test is needed: both fit anywhere, in any direction."""
        distance, inset = self.parameters.seed_distance, 2 * self.parameters.seed_distance
        side = self.parameters.size - 2 * inset
        y, x = inset + _below(self.rng, side), inset + _below(self.rng, side)
        first, around = self._begin((y, x), _direction(self.rng)), _direction(self.rng)
        other = round(y + distance * math.sin(around)), round(x + distance * math.cos(around))
        return first, self._begin(other, _direction(self.rng))

    def _short_path(self) -> Path | None:
        """One distractor, or None where too little is free or all attempts got stuck."""
        for _ in range(DISTRACTOR_TRIES):
            angle = _direction(self.rng)
            free = self.taken.free_tails(dash(self.pen, angle))
            if len(free) < MIN_FREE * self.parameters.size**2:
                return None
            path = self._begin(divmod(int(free[_below(self.rng, len(free))]), self.parameters.size), angle)
            before = self.taken.save()
            if all(self._grow(path) for _ in range(self.parameters.distractor_length - 1)):
                self.taken.add(path.dashes[-1])
                return path
            self.taken.restore(before)
        return None

    def _begin(self, tail: Point, angle: float) -> Path:
        """A path of one dash."""
        head = step(tail, angle, self.pen.length)
        pivot = step(head, angle + math.pi, self.pen.length + self.pen.margin)
        return Path([Dash(tail, head, dash(self.pen, angle), tail)], pivot, angle)

    def _grow(self, path: Path) -> bool:
        """Add a dash to the path; False, with all as it was, where it is stuck."""
        pivot = step(path.pivot, path.angle, self.pen.length + 2 * self.pen.margin)
        if not (0 <= pivot[0] < self.parameters.size and 0 <= pivot[1] < self.parameters.size):
            return False  # all heads are further on: outside too, or in the frame
        heads = _heads(self.pen.length + self.pen.margin, self.parameters.continuity, path.angle)
        weights = list(accumulate(self.taken.free_share(pivot, head.offset) * head.weight for head in heads))
        if not weights[-1]:
            return False
        for _ in range(DASH_TRIES):
            offset, angle, _ = heads[bisect_right(weights, self.rng.random() * weights[-1])]
            head, back = (pivot[0] + offset[0], pivot[1] + offset[1]), angle + math.pi
            new = Dash(step(head, back, self.pen.length), head, dash(self.pen, back), head)
            if self.taken.fits(new):
                self.taken.add(path.dashes[-1])
                path.dashes.append(new)
                path.pivot, path.angle = pivot, angle
                return True
        return False


class _Head(NamedTuple):
    """A place for the next head: from the pivot, in which direction, how welcome if it is free."""

    offset: Point
    angle: float
    weight: float


@cache
def _heads(radius: int, continuity: float, last: float) -> tuple[_Head, ...]:
    """The heads around a pivot for which the turn from the direction `last` (radians) is not too sharp.

    They are the pixels under a circle sampled at steps of one pixel, rounded down, so the circle leans up and to the left.
    """
    angles = [i / radius for i in range(math.ceil(2 * math.pi * radius))]
    found = []
    for y, x in dict.fromkeys((math.floor(radius * math.sin(a)), math.floor(radius * math.cos(a))) for a in angles):
        angle = math.atan2(y, x)
        turn = continuity * abs((angle - last + math.pi) % (2 * math.pi) - math.pi)
        weight = max(math.cos(min(turn, math.pi / 2)), 0.0) ** 2
        if weight > np.finfo(float).eps:
            found.append(_Head((y, x), angle, weight))
    return tuple(found)


class _Taken:
    """What is taken in an image. Both masks have a pad on every side, so that no stamp needs to be cut."""

    def __init__(self, size: int, border: int, pen: Pen) -> None:
        self.size, self.pad, self.widening = size, pen.reach + pen.margin, pen.margin
        self.stride = size + 2 * self.pad
        frame = np.full((size, size), FULL, np.uint8)
        frame[border : size - border, border : size - border] = 0
        self._blank = np.pad(frame, self.pad).astype(np.int16), np.pad(dilate(frame, pen.margin), self.pad, constant_values=FULL)
        self._space, wide = self._blank[0].copy(), self._blank[1].copy()
        self._wide_bytes = bytearray(wide.tobytes())  # reads single pixels several times faster than an array
        self._wide = np.frombuffer(self._wide_bytes, np.uint8).reshape(wide.shape)

    def clear(self) -> None:
        """Nothing but the frame is taken."""
        self.restore(self._blank)

    def save(self) -> tuple[NDArray[np.int16], Bytes]:
        """The state, for `restore`."""
        return self._space.copy(), self._wide.copy()

    def restore(self, state: tuple[NDArray[np.int16], Bytes]) -> None:
        """Back to a saved state."""
        np.copyto(self._space, state[0])
        np.copyto(self._wide, state[1])

    def add(self, new: Dash) -> None:
        """Take the space of a dash."""
        space = self._square(self._space, new.anchor, new.stamp.reach)
        np.maximum(space, new.stamp.space, out=space)
        wide = self._square(self._wide, new.anchor, new.stamp.reach + self.widening)
        np.maximum(wide, new.stamp.wide, out=wide)

    def fits(self, new: Dash) -> bool:
        """Whether the space of a dash collides with nothing taken."""
        both = self._square(self._space, new.anchor, new.stamp.reach) + new.stamp.space
        return bool(both.max() < COLLISION)

    def free_share(self, pivot: Point, offset: Point) -> int:
        """0 .. 255: how free a head's pixel is, its margin included. Outside the image nothing is."""
        y, x = pivot[0] + offset[0] + self.pad, pivot[1] + offset[1] + self.pad
        return FULL - self._wide_bytes[y * self.stride + x]

    def free_tails(self, stamp: Stamp) -> NDArray[np.intp]:
        """The pixels y * size + x where the dash can start so that its space touches nothing taken, however faint."""
        taken = self._space > 0
        touched = np.zeros((self.size, self.size), np.bool_)
        for y, x in np.argwhere(stamp.space > 0) + self.pad - stamp.reach:
            touched |= taken[y : y + self.size, x : x + self.size]
        return np.flatnonzero(~touched)

    def _square(self, mask: NDArray[Number], middle: Point, reach: int) -> NDArray[Number]:
        y, x = middle[0] + self.pad - reach, middle[1] + self.pad - reach
        return mask[y : y + 2 * reach + 1, x : x + 2 * reach + 1]
