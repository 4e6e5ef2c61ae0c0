"""Pictures mixed in pairs, by weight (mixup, arXiv 1710.09412) or by a box (CutMix, arXiv 1905.04899), and boxes of noise (random erasing).

Neighbours 2 i and 2 i + 1 of a batch are mixed with each other; timm pairs the first with the last, which is the same where the order is
random. All draws follow from a seed, and each process can draw those of its own pictures alone.

Shape letters: B pictures, H height, W width, C channels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from suites.imagenet.task import TaskConfig


class Box(NamedTuple):
    """Rows top to bottom - 1, columns left to right - 1."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        """Its pixels."""
        return (self.bottom - self.top) * (self.right - self.left)


class Mix(NamedTuple):
    """What a group of pictures keeps of itself: `share` of every pixel, or all outside of a box; `share` of the label in both cases."""

    share: float
    box: Box | None


def draw_mixes(config: TaskConfig, number: int, rng: np.random.Generator) -> list[Mix]:
    """One draw for each group of a batch of so many pictures."""
    groups = math.ceil(number / config.mix_group) if config.mix_group else 1
    return [_draw_mix(config, rng) for _ in range(groups)]


def _draw_mix(config: TaskConfig, rng: np.random.Generator) -> Mix:
    boxed = config.cutmix > 0 and (config.mixup == 0 or rng.random() < config.mix_switch)
    alpha = config.cutmix if boxed else config.mixup
    share = float(rng.beta(alpha, alpha))
    if not boxed:
        return Mix(share, None)
    side = config.image_size
    half = int(side * math.sqrt(1 - share)) // 2
    y, x = (int(place) for place in rng.integers(side, size=2))
    box = Box(max(0, y - half), min(side, y + half), max(0, x - half), min(side, x + half))
    return Mix(1 - box.area / side**2, box)


def mixed(images_BCHW: Tensor, mixes: Sequence[Mix], first: int, group: int) -> Tensor:
    """The pictures from the even number `first` of their batch on, mixed; one without a neighbour stays as it is."""
    neighbours_B = neighbours(len(images_BCHW), images_BCHW.device)
    out = torch.empty_like(images_BCHW)
    for number, mix in enumerate(mixes):
        start, stop = (number * group - first, (number + 1) * group - first) if group else (0, len(out))
        rows = slice(max(0, start), max(0, stop))
        own, other = images_BCHW[rows], images_BCHW[neighbours_B[rows]]
        if mix.box is None:
            out[rows] = own.lerp(other, 1 - mix.share)
        else:
            out[rows] = own
            area = (..., slice(mix.box.top, mix.box.bottom), slice(mix.box.left, mix.box.right))
            out[rows][area] = other[area]
    return out


def neighbours(number: int, device: torch.device) -> Tensor:
    """For each of so many pictures the one it is mixed with: itself, for a last one without a neighbour."""
    return (torch.arange(number, device=device) ^ 1).clamp(max=number - 1)


def shares(mixes: Sequence[Mix], number: int, group: int) -> Tensor:
    """How much of its own label each picture keeps, (B,) in float32."""
    return torch.tensor([mix.share for mix in mixes]).repeat_interleave(group or number)[:number]


def draw_erased(config: TaskConfig, rng: np.random.Generator) -> Box | None:
    """The box of a picture that becomes noise, or None: a share of its area from 0.02 to 1/3, sides 0.3 to 1/0.3, as timm draws it."""
    if rng.random() >= config.erasing:
        return None
    side = config.image_size
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * side**2
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < side and width < side:
            top, left = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
            return Box(top, top + height, left, left + width)
    return None


def erase(images_BCHW: Tensor, config: TaskConfig, seeds: Sequence[Sequence[int]]) -> None:
    """Put standard normal noise into the boxes of normalised pictures, in place; each follows from the seed of its picture.

    The noise is drawn where the pictures are, other numbers on a GPU than on a CPU: it is nothing that a host must wait to hand over.
    """
    noise = torch.Generator(images_BCHW.device)
    for image_CHW, seed in zip(images_BCHW, seeds, strict=True):
        rng = np.random.default_rng(seed)
        box = draw_erased(config, rng)
        if box is not None:
            noise.manual_seed(int(rng.integers(2**63)))
            image_CHW[:, box.top : box.bottom, box.left : box.right].normal_(generator=noise)
