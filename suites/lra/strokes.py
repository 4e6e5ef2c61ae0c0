"""The small pictures that Pathfinder images are put together from: dashes with the space around them, and marker discs.

Shapes are rasterised at twice the resolution ("fine" pixels) and reduced with a Lanczos filter. A dash depends only on the fine pixel
where it ends, seen from where it starts, so there are a few dozen of them per setting; each is made once and kept.
Points and displacements are (y, x), y downward; rounding up is part of the published generator.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Point = tuple[int, int]

SCALE = 2
"""Fine pixels per pixel (antialias scale, data.md's table gives 2 at every resolution)."""
LANCZOS_LOBES = 3
ROUND_OFF = 1e-9
"""Taken off before rounding up, so that an axis-parallel dash ends on its axis."""


@dataclass(frozen=True)
class Pen:
    """How dashes are drawn, in pixels."""

    length: int
    thickness: float
    margin: int
    """Space kept free around a dash."""

    @property
    def reach(self) -> int:
        """Pixels from the middle of a dash's picture to its sides."""
        return self.length + math.ceil(self.thickness) + self.margin


@dataclass(frozen=True, eq=False)
class Stamp:
    """The picture of a dash that starts in its middle pixel; 255 is full. All are squares around that pixel."""

    ink: Bytes
    space: NDArray[np.int16]
    """The dash made wider by the margin on all sides; int16, for sums."""
    wide: Bytes
    """The space made wider by the margin once more; its square is larger by the margin on every side."""

    @property
    def reach(self) -> int:
        """Pixels from the middle to the sides of `ink` and `space`."""
        return len(self.ink) // 2


def step(start: Point, angle: float, distance: float) -> Point:
    """The pixel at `distance` (pixels) from `start` in direction `angle` (radians), both coordinates rounded up."""
    y, x = start[0] + distance * math.sin(angle), start[1] + distance * math.cos(angle)
    return math.ceil(y - ROUND_OFF), math.ceil(x - ROUND_OFF)


def dash(pen: Pen, angle: float) -> Stamp:
    """The dash that runs from its middle pixel in direction `angle` (radians)."""
    return _dash(pen, step((0, 0), angle, pen.length * SCALE))


@cache
def _dash(pen: Pen, end: Point) -> Stamp:
    """The dash that ends `end` fine pixels from its start."""
    width, radius = round(pen.thickness * SCALE), pen.reach * SCALE
    fine = _line(radius, end) if width == 1 else _strip(radius, end, width)
    full = fine.astype(np.uint8) * np.uint8(255)
    size = 2 * pen.reach + 1
    space = reduce(dilate(full, pen.margin * SCALE), size)
    return Stamp(reduce(full, size), space.astype(np.int16), dilate(np.pad(space, pen.margin), pen.margin))


@cache
def disc(radius: float) -> Bytes:
    """A marker of this radius (pixels), 255 is full: a square of even side n whose pixel (n/2, n/2) is the marked one.

    Its middle lies between fine pixels in the reduced grid, so it leans down and to the right by a quarter of a pixel.
    """
    half = math.ceil(radius) + LANCZOS_LOBES + 1
    y, x = np.mgrid[-half * SCALE : half * SCALE, -half * SCALE : half * SCALE]
    inside = y**2 + x**2 <= (radius * SCALE) ** 2
    return reduce(inside.astype(np.uint8) * np.uint8(255), 2 * half)


def reduce(picture: Bytes, size: int) -> Bytes:
    """A square picture at `size` pixels a side: Lanczos along x, then y, rounded and cut to 0 .. 255 after each."""
    filter_ = _lanczos(len(picture), size)
    across = np.clip(np.rint(picture @ filter_.T), 0, 255)
    return np.clip(np.rint(filter_ @ across), 0, 255).astype(np.uint8)


def dilate(picture: Bytes, radius: int) -> Bytes:
    """At every pixel the maximum over the disc of `radius` pixels around it; outside the picture is 0."""
    padded = np.pad(picture, radius)
    height, width = picture.shape
    out = picture.copy()
    for y in range(-radius, radius + 1):
        for x in range(-radius, radius + 1):
            if y**2 + x**2 <= radius**2:
                np.maximum(out, padded[radius + y : radius + y + height, radius + x : radius + x + width], out=out)
    return out


@cache
def _lanczos(before: int, after: int) -> NDArray[np.float64]:
    """(after, before): the reduction of `before` samples to `after` as a matrix; rows sum to 1, also at the ends."""
    ratio = before / after
    middle = (np.arange(after) + 0.5) * ratio
    t = (np.arange(before) + 0.5 - middle[:, None]) / ratio
    weight = np.where(np.abs(t) < LANCZOS_LOBES, np.sinc(t) * np.sinc(t / LANCZOS_LOBES), 0.0)
    return weight / weight.sum(axis=1, keepdims=True)


def _round(value: float) -> int:
    """To the nearest integer, halves away from 0."""
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def _line(radius: int, end: Point) -> Mask:
    """(2 radius + 1)^2: a line one fine pixel wide from the middle to `end`, one pixel per step of its longer axis."""
    out = np.zeros((2 * radius + 1, 2 * radius + 1), np.bool_)
    steps = max(abs(end[0]), abs(end[1]))
    for i in range(steps + 1):
        out[radius + _round(end[0] * i / steps), radius + _round(end[1] * i / steps)] = True
    return out


def _strip(radius: int, end: Point, width: int) -> Mask:
    """(2 radius + 1)^2: a line `width` fine pixels wide from the middle to `end`: the quadrangle between its four rounded corners.

    An even width has no middle pixel: one side gets one more. In each row the pixels less than half a pixel outside the outline count.
    """
    (dy, dx), length = end, math.hypot(*end)
    more, less = width // 2, (width - 1) // 2
    left = _round(more * dx / length), -_round(less * dy / length)
    right = -_round(less * dx / length), _round(more * dy / length)
    corners = [left, (dy + left[0], dx + left[1]), (dy + right[0], dx + right[1]), right]
    out = np.zeros((2 * radius + 1, 2 * radius + 1), np.bool_)
    for y in range(min(corners)[0], max(corners)[0] + 1):
        crossings = [x for edge in zip(corners, corners[1:] + corners[:1], strict=True) for x in _crossings(y, *edge)]
        first, last = math.floor(min(crossings) - 0.5) + 1, math.ceil(max(crossings) + 0.5) - 1
        out[radius + y, radius + first : radius + last + 1] = True
    return out


def _crossings(y: int, start: Point, end: Point) -> tuple[float, ...]:
    """Where row y meets the edge from `start` to `end`: nowhere, once, or from end to end."""
    if start[0] == end[0]:
        return (start[1], end[1]) if start[0] == y else ()
    if not min(start[0], end[0]) <= y <= max(start[0], end[0]):
        return ()
    return (start[1] + (end[1] - start[1]) * (y - start[0]) / (end[0] - start[0]),)
