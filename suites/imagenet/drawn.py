"""Drawn pictures whose class is a relation in space: on which side of a red disc the blue one lies, in the same row or column.

Both discs are in every picture, so counts of colours tell nothing, and a model that sums over patches without knowing where they are stays
at chance. A linear map of all pixels would do: the task shows that a model learns where things are, and no more. Classes are as likely as
each other.
"""

import functools

import numpy as np

from suites.imagenet.pictures import Pictures, PictureSplit
from suites.imagenet.settings import ImagenetConfig

CLASSES = ("right", "below", "left", "above")
SIZES = {"train": 20_000, "validation": 1000, "test": 2000}
RADIUS = 2.5
MARGIN, NEAREST = 3, 6
"""Pixels between a disc's middle and the border, and between two middles."""
GREY, CONTRAST, NOISE = 128, (70, 120), 12.0
SEED = 20_240_411


def draw(split: str, number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """So many pictures (N, H, W, 3) of a split, 8 bits, with their classes (N,); a longer split begins with a shorter one's pictures."""
    rng = np.random.default_rng([SEED, list(SIZES).index(split), size])
    labels_N, pixels_NHWC = np.empty(number, np.int64), np.empty((number, size, size, 3), np.uint8)
    for i in range(number):
        labels_N[i], pixels_NHWC[i] = _picture(rng, size)
    return pixels_NHWC, labels_N


def _picture(rng: np.random.Generator, size: int) -> tuple[int, np.ndarray]:
    first, second = _middles(rng, size)
    down, right = second - first
    label = (1 if down > 0 else 3) if down else (0 if right > 0 else 2)
    picture = GREY + rng.normal(0, NOISE, (size, size, 3))
    y, x = np.mgrid[:size, :size]
    for middle, channel in ((first, 0), (second, 2)):
        disc_HW = (y - middle[0]) ** 2 + (x - middle[1]) ** 2 <= RADIUS**2
        picture[disc_HW, channel] += rng.uniform(*CONTRAST)
    return label, picture.clip(0, 255).astype(np.uint8)


def _middles(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two places in one row or column, far enough apart."""
    while True:
        first, second = rng.integers(MARGIN, size - MARGIN, (2, 2))
        shared = rng.integers(2)
        second[shared] = first[shared]
        if np.abs(second - first).max() >= NEAREST:
            return first, second


@functools.lru_cache(maxsize=2)
def pictures(config: ImagenetConfig) -> Pictures:
    """All splits of a configuration."""
    asked = {"train": config.train_examples, "validation": config.validation_examples, "test": config.test_examples}
    splits = {}
    for name, number in asked.items():
        pixels_NHWC, labels_N = draw(name, number or SIZES[name], config.image_size)
        splits[name] = PictureSplit(labels_N, pixels_NHWC=pixels_NHWC)
    return Pictures(splits, CLASSES)
