"""Pictures that lie on a device: random shifts and flips, drawn on the host so that they follow from a seed alone.

Shape letters: B batch, H height, W width, C channels.
"""

import numpy as np
import torch
from torch import Tensor

MARGIN = 4


def shifted(pixels_BHWC: Tensor, rng: np.random.Generator) -> Tensor:
    """A random crop of each image after mirroring MARGIN pixels at each side, then a flip of every second one by chance."""
    B, H, W, _ = pixels_BHWC.shape
    device = pixels_BHWC.device
    top_B, left_B = torch.from_numpy(rng.integers(2 * MARGIN + 1, size=(2, B))).to(device, non_blocking=True)
    flip_B = torch.from_numpy(rng.random(B) < 0.5).to(device, non_blocking=True)
    y_BH = _mirrored(top_B[:, None] + torch.arange(H, device=device) - MARGIN, H)
    x_BW = _mirrored(left_B[:, None] + torch.arange(W, device=device) - MARGIN, W)
    x_BW = torch.where(flip_B[:, None], x_BW.flip(1), x_BW)
    return pixels_BHWC[torch.arange(B, device=device)[:, None, None], y_BH[:, :, None], x_BW[:, None, :]]


def _mirrored(place: Tensor, size: int) -> Tensor:
    """Places outside of 0 .. size - 1 mirrored at the border, whose own pixel is repeated."""
    place = torch.where(place < 0, -1 - place, place)
    return torch.where(place >= size, 2 * size - 1 - place, place)
