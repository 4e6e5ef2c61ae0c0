"""Classification of images: patches as tokens, the blocks of `model`, the mean over the patches or a class token, a head.

Shape letters: B images, C channels, H and W height and width in pixels, T tokens, D width, N classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Mixer
from hgrn2_bench.model import Backbone, Ends


@dataclass(frozen=True)
class Patches:
    """How images become tokens: square patches of `patch` pixels, row by row. ConfigError where they do not cover the image."""

    size: tuple[int, int]
    """Height and width for which the model is built; others work too, unless positions are a fixed table."""
    patch: int
    channels: int = 3
    class_token: bool = False
    """A learned token before the patches, which the head reads instead of their mean."""

    def __post_init__(self) -> None:
        if self.patch < 1 or any(side < self.patch or side % self.patch for side in self.size):
            height, width = self.size
            raise ConfigError(f"an image of {height} x {width} pixels is not made of whole patches of {self.patch} x {self.patch}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.size[0] // self.patch, self.size[1] // self.patch

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1] + self.class_token


class PatchEmbedding(nn.Module):
    """One linear map of each patch, as a convolution that steps from patch to patch: (B, C, H, W) to (B, T, D)."""

    def __init__(self, patches: Patches, d_model: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(patches.channels, d_model, patches.patch, patches.patch)
        self.matrix_weights = self.proj.weight.numel()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Embed all patches of a batch; a token's channels lie side by side, as every sum with them will."""
        return self.proj(images_BCHW).flatten(2).transpose(1, 2).contiguous()


class VisionModel(Backbone):
    """Images (B, C, H, W) to hidden states (B, T, D), and with `logits` to (B, N); without a head where `classes` is 0.

    ConfigError for a class token under a 2-D scan, in whose image it has no place.
    """

    embedding: PatchEmbedding

    def __init__(
        self, config: ModelConfig, mixer: type[Mixer], settings: Mapping[str, Any], backend: str, patches: Patches, classes: int
    ) -> None:
        if patches.class_token and config.scan.startswith("2d"):
            raise ConfigError(f"scan={config.scan} reads an image, in which a class token has no place: pool the mean")
        D = config.d_model
        ends = Ends(lambda: PatchEmbedding(patches, D), lambda: nn.Linear(D, classes) if classes else nn.Identity())
        super().__init__(config, mixer, settings, backend, patches.tokens, ends)
        self.patches, self.grid = patches, patches.grid
        self.class_token = nn.Parameter(torch.zeros(D).normal_(std=1e-6)) if patches.class_token else None

    def grid_of(self, inputs: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of these images. ValueError where their patches do not cover them."""
        height, width = inputs.shape[-2:]
        patch = self.patches.patch
        if height % patch or width % patch:
            raise ValueError(f"images of {height} x {width} pixels are not made of whole patches of {patch} x {patch}")
        return height // patch, width // patch

    def embed(self, inputs: Tensor) -> Tensor:
        """Embedded patches with their positions, the class token first. ValueError where positions are known for fewer tokens."""
        grid = self.grid_of(inputs)
        x_BTD = self.embedded(inputs)
        if self.class_token is not None:
            x_BTD = torch.cat([self.class_token.to(x_BTD.dtype).expand(len(x_BTD), 1, -1), x_BTD], 1)
        table_TD = self.position_table()
        if table_TD is None:
            return self.embed_dropout(x_BTD)
        if self.config.positions == "learned" and grid != self.grid:
            table_TD = resampled(table_TD, self.patches, grid)
        if len(table_TD) < x_BTD.shape[1]:
            raise ValueError(f"{x_BTD.shape[1]} tokens, but positions={self.config.positions} knows only {len(table_TD)}")
        return self.embed_dropout(x_BTD + table_TD[: x_BTD.shape[1]])

    def pooled(self, x_BTD: Tensor) -> Tensor:
        """The class token, or the mean over all patches, (B, D); the mean in float32 or wider, both in the dtype of the parameters."""
        x_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        x_BD = x_BTD[:, 0] if self.patches.class_token else x_BTD.mean(1)
        return x_BD.to(self.embedding.proj.weight.dtype)

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, N)."""
        return self.head(self.pooled(VisionModel.forward(self, images_BCHW)))

    def probe(self, B: int, T: int, labels: int) -> Tensor:
        """The loss of random images, one label for each."""
        images = torch.randn(B, self.patches.channels, *self.patches.size, generator=torch.Generator().manual_seed(0))
        return self.logits(images).logsumexp(-1).mean()


def resampled(table_TD: Tensor, patches: Patches, grid: tuple[int, int]) -> Tensor:
    """A table of learned positions for another grid, by bicubic interpolation between rows and columns; a class token keeps its own."""
    first = int(patches.class_token)
    image_1DHW = table_TD[first:].T.unflatten(1, patches.grid)[None]
    image_1DHW = F.interpolate(image_1DHW.float(), size=grid, mode="bicubic", antialias=True)
    return torch.cat([table_TD[:first], image_1DHW[0].flatten(1).T.to(table_TD.dtype)])
