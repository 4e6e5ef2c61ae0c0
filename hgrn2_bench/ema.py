"""An average of a model's weights over the steps of its training (arXiv 1803.05407 among others), often better than the last weights.

After each step average = decay * average + (1 - decay) * weights. There is no warm-up and no correction: after s steps the initial weights
still count decay^s, as in DeiT.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Average:
    """The average of all floating-point weights and buffers of a model; whole numbers are those of the last step."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        own = model.state_dict()  # whose tensors keep their addresses while the model trains
        self.tensors: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in own.items()}
        floating = [name for name, tensor in own.items() if tensor.is_floating_point()]
        self.moving, self.followed = [self.tensors[name] for name in floating], [own[name] for name in floating]
        self.copied = [(self.tensors[name], tensor) for name, tensor in own.items() if name not in set(floating)]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of now."""
        torch._foreach_lerp_(self.moving, self.followed, 1 - self.decay)
        for mine, tensor in self.copied:
            mine.copy_(tensor)

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from an average that was saved."""
        for name, tensor in self.tensors.items():
            tensor.copy_(saved[name])
