"""Classification of whole sequences, one at a time or in pairs: the blocks of `model`, a mean over time, a head.

Shape letters: B sequences, P pairs of them, T time, C channels, D width, N classes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Mixer, Recomputing
from hgrn2_bench.model import Backbone, Ends


class PairHead(nn.Module):
    """Two documents' means a, b to classes: Linear(4 D, D), GELU, Linear(D, N) of [a, b, a - b, a * b] (OpenNLPLab/lra, its `nli` head).

    The first P of 2 P rows are the first documents of the pairs, the others the second.
    """

    def __init__(self, d_model: int, classes: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4 * d_model, d_model), nn.Linear(d_model, classes)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """Logits (P, N) of means (2 P, D)."""
        a, b = pooled_BD.chunk(2)
        logits_PN: Tensor = self.down(F.gelu(self.up(torch.cat([a, b, a - b, a * b], -1))))
        return logits_PN


class Classifier(Backbone):
    """Token ids (B, T), or values (B, T, C) with `channels`, to logits (B, N); with `pairs` to (B / 2, N).

    The mean runs over each sequence's true length. With `mask_padding` the recurrences and norms skip the padding too, and a sequence's
    logits are those that it has alone; without, padding is read as text is, as in the published runs. ConfigError where a plain module
    would have to skip it.
    """

    def __init__(
        self,
        config: ModelConfig,
        mixer: type[Mixer],
        settings: Mapping[str, Any],
        backend: str,
        max_len: int,
        *,
        vocab_size: int = 0,
        channels: int = 0,
        classes: int,
        pairs: bool = False,
        mask_padding: bool = True,
        grid: tuple[int, int] | None = None,
    ) -> None:
        D = config.d_model
        ends = Ends(
            embedding=lambda: nn.Linear(channels, D) if channels else nn.Embedding(vocab_size, D),
            head=lambda: PairHead(D, classes) if pairs else nn.Linear(D, classes),
        )
        if mask_padding and not channels and issubclass(mixer, Recomputing):
            name = mixer.wrapped.__name__
            raise ConfigError(
                f"{name} is a plain module, which cannot skip padding: give {name}.mask_padding=false, or write it as a Mixer"
            )
        super().__init__(config, mixer, settings, backend, max_len, ends)
        self.grid = grid
        self.vocab_size, self.channels, self.pairs, self.mask_padding = vocab_size, channels, pairs, mask_padding

    def logits(self, inputs: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Logits of a batch that is padded on the right to one length."""
        x_BTD = self(inputs, lengths_B if self.mask_padding else None)
        return self.head(pooled(x_BTD, lengths_B))

    def loss(self, inputs: Tensor, lengths_B: Tensor | None, labels: Tensor) -> Tensor:
        """Mean cross-entropy in float32."""
        return F.cross_entropy(self.logits(inputs, lengths_B).float(), labels)

    def probe(self, B: int, T: int, labels: int) -> Tensor:
        """The loss of random inputs, one label for each sequence or pair."""
        generator = torch.Generator().manual_seed(0)
        B += B % 2 if self.pairs else 0
        shape = (B, T)
        inputs = torch.randn(*shape, self.channels, generator=generator) if self.channels else None
        if inputs is None:
            inputs = torch.randint(self.vocab_size, shape, generator=generator)
        return self.logits(inputs).logsumexp(-1).mean()


def pooled(x_BTD: Tensor, lengths_B: Tensor | None) -> Tensor:
    """The mean (B, D) over time, of each sequence over its true length, in float32 or wider."""
    x_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
    if lengths_B is None:
        return x_BTD.mean(1)
    real_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device) < lengths_B[:, None]
    return x_BTD.masked_fill(~real_BT[..., None], 0).sum(1) / lengths_B[:, None]
