"""Language models: the loss of every next token, without a logit more than is needed at once, and with a state that can be carried.

The logits of a batch are larger than all else: 128 x 512 tokens over 50,264 words are 13 GB in float32. So they are made for a few tokens
at a time, and in training turned into gradients at once, as fla's kernel does that takes over on a GPU; those of an adaptive softmax are
made a second time when their gradient is due.

Shape letters: B batch, T time, M = B T tokens, D width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hgrn2_bench.adaptive import AdaptiveHead, wide
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.interfaces import Context, MixerState
from hgrn2_bench.model import SequenceModel, normed

CHUNK_LOGITS = 2**25
"""Logits made at once: 128 MiB of them in float32."""


class LanguageModel(SequenceModel):
    """Token ids (B, T) to the loss of the ids that follow them."""

    def _make_head(self, config: ModelConfig) -> nn.Module:
        """A linear layer without bias, or an adaptive softmax. ConfigError where its cut-offs do not fit the vocabulary."""
        if config.softmax == "adaptive":
            return AdaptiveHead(config.d_model, self.vocab_size, config.cutoffs)
        return super()._make_head(config)

    def rank(self, counts: Mapping[int, int]) -> None:
        """Tell an adaptive softmax how often each id occurs in training; a full one has no use for it."""
        if isinstance(self.head, AdaptiveHead):
            self.head.rank(counts)

    @property
    def can_carry(self) -> bool:
        """Whether every layer's state has a fixed size, and no table of positions ends or starts again with each block."""
        fixed = all(not mixer.cached and mixer.state_size(1) == mixer.state_size(2) for mixer in self.mixers)
        return fixed and self.config.scan == "causal" and self.position_table() is None

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:  # type: ignore[override]
        """Mean cross-entropy of the targets in nats and float32, for training; no more than CHUNK_LOGITS logits exist at once."""
        x_MD, targets_M = self(inputs_BT).flatten(0, 1), targets_BT.flatten().long()
        if self.backend == "fla" and x_MD.is_cuda and isinstance(self.head, nn.Linear):
            from hgrn2_bench.ops import fla

            return fla.linear_cross_entropy(x_MD, self.head.weight, targets_M)
        if isinstance(self.head, nn.Linear) and torch.is_grad_enabled():
            return linear_cross_entropy(x_MD, self.head.weight, targets_M, self._chunk_size)
        parts = self._chunks(x_MD, targets_M)
        sums = [checkpoint(_summed, self.head, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.stack(sums).sum() / len(targets_M)

    @torch.no_grad()
    def losses(
        self, inputs_BT: Tensor, targets_BT: Tensor, states: Sequence[MixerState] | None = None, return_states: bool = False
    ) -> tuple[Tensor, list[MixerState] | None]:
        """Nats (B, T) of every target in float32; with `return_states` also the state of every layer after the last token.

        `states` are such, of the tokens before. ValueError where positions are looked up in a table, which every call starts anew.
        """
        x_BTD, after = self.hidden(inputs_BT, states, return_states)
        parts = self._chunks(x_BTD.flatten(0, 1), targets_BT.flatten())
        nats_M = torch.cat([nats_of(self.head, *part) for part in parts])
        return nats_M.reshape(targets_BT.shape), after

    def hidden(
        self, inputs_BT: Tensor, states: Sequence[MixerState] | None = None, return_states: bool = False
    ) -> tuple[Tensor, list[MixerState] | None]:
        """Hidden states (B, T, D) after the final norm, and states as in `losses`."""
        if (states is not None or return_states) and self.position_table() is not None:
            raise ValueError(f"positions={self.config.positions}: no state can be carried from block to block")
        x_BTD, shared = self.embed(inputs_BT), self.shared()
        carry: dict[str, Tensor] = {}
        tables: dict[str, Tensor] = {}
        after = []
        for layer, block in enumerate(self.blocks):
            state = None if states is None else states[layer]
            ctx = Context(shared=shared, carry=carry, tables=tables, state=state, return_state=return_states)
            x_BTD = block(x_BTD, ctx)
            after.append(ctx.next_state)
        return normed(self.norm, x_BTD, None), after if return_states else None

    def probe(self, B: int, T: int, labels: int) -> Tensor:
        """The loss of a batch of random tokens, all of which have a label."""
        tokens_BT = torch.randint(self.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))
        return self.loss(tokens_BT, tokens_BT)

    def _chunks(self, x_MD: Tensor, targets_M: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Hidden states and targets in parts, each with CHUNK_LOGITS logits at most (but at least one token)."""
        return list(zip(x_MD.split(self._chunk_size), targets_M.split(self._chunk_size), strict=True))

    @property
    def _chunk_size(self) -> int:
        return max(1, CHUNK_LOGITS // self.vocab_size)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients of a linear head, `size` rows at a time."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, size: int) -> Tensor:
        dx_MD, dweight_VD, sums = torch.empty_like(x_MD), wide(torch.zeros_like(weight_VD)), []
        for x, dx, targets in zip(x_MD.split(size), dx_MD.split(size), targets_M.split(size), strict=True):
            log_p = wide(F.linear(x, weight_VD)).log_softmax(-1)
            sums.append(-log_p.gather(1, targets[:, None]).sum())
            residue = log_p.exp_().scatter_add_(1, targets[:, None], log_p.new_full((len(targets), 1), -1.0)).to(x.dtype)
            dx.copy_(residue @ weight_VD)
            dweight_VD += residue.T @ x
        ctx.save_for_backward(dx_MD, dweight_VD)
        ctx.dtype = weight_VD.dtype
        return torch.stack(sums).sum() / len(targets_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx_MD, dweight_VD = ctx.saved_tensors
        share = grads[0] / len(dx_MD)
        return dx_MD * share.to(dx_MD.dtype), (dweight_VD * share).to(ctx.dtype), None, None


def linear_cross_entropy(x_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, size: int) -> Tensor:
    """Mean cross-entropy in float32 or wider of the logits x W^T, of which `size` rows exist at a time.

    Under autocast both are cast here, as autocast would do before a product, so that their gradients are cast back.
    """
    if torch.is_autocast_enabled(x_MD.device.type):
        half = torch.get_autocast_dtype(x_MD.device.type)
        x_MD, weight_VD = x_MD.to(half), weight_VD.to(half)
    mean: Tensor = _LinearCrossEntropy.apply(x_MD, weight_VD, targets_M, size)
    return mean


def nats_of(head: nn.Module, x_MD: Tensor, targets_M: Tensor) -> Tensor:
    """-log p (M,) of the targets in float32 or wider."""
    if isinstance(head, AdaptiveHead):
        return head.nats(x_MD, targets_M)
    return F.cross_entropy(wide(head(x_MD)), targets_M.long(), reduction="none")


def _summed(head: nn.Module, x_MD: Tensor, targets_M: Tensor) -> Tensor:
    return nats_of(head, x_MD, targets_M).sum()
