"""Adaptive softmax: a large vocabulary split by frequency, so that most tokens are scored against few words (arXiv 1609.04309).

With the words ranked by frequency and cut into a shortlist and C tails,

    log p(w | x) = log softmax([E_shortlist; G] x)_w                                   w in the shortlist
    log p(w | x) = log softmax([E_shortlist; G] x)_c + log softmax(E_c x)_w            w in tail c

All rows of the table E have the full width, as in Transformer-XL's base model for WikiText-103 (arXiv 1901.02860, its `div_val` 1), so that
it can be the embedding itself. It saves work, not parameters. The tails have no projection, which torch's module has; so that is not used.

Shape letters: M positions, D width, V vocabulary, C tails, S shortlist and tails.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.config import require

MIN_VOCAB = 8
"""The least vocabulary whose eighth is a word."""


def cutoffs_for(vocab_size: int, given: tuple[int, ...]) -> tuple[int, ...]:
    """The ends of all clusters but the last: those given, or an eighth and half of the vocabulary. ConfigError where they do not fit."""
    if not given:
        require(vocab_size >= MIN_VOCAB, f"softmax=adaptive needs a vocabulary of at least {MIN_VOCAB} words, not {vocab_size}")
        return vocab_size // 8, vocab_size // 2
    shown = ",".join(map(str, given))
    require(given[-1] < vocab_size, f"cutoffs=[{shown}] must be below the vocabulary of {vocab_size} words")
    return given


class AdaptiveHead(nn.Module):
    """The head; `weight` (V, D) may be the embedding's. Until `rank` is called ids count as sorted by falling frequency."""

    rank_V: Tensor
    order_V: Tensor

    def __init__(self, d_model: int, vocab_size: int, cutoffs: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.cutoffs = cutoffs_for(vocab_size, cutoffs)
        linear = nn.Linear(d_model, vocab_size, bias=False)
        self.weight = linear.weight
        self.tails = nn.Linear(d_model, len(self.cutoffs), bias=False)
        self.register_buffer("rank_V", torch.arange(vocab_size))
        self.register_buffer("order_V", torch.arange(vocab_size))
        self.sorted = True
        """Whether ids are in the order of their ranks."""
        self.register_load_state_dict_post_hook(_note_order)

    def rank(self, counts: Mapping[int, int]) -> None:
        """Rank the ids by how often each occurs, of equally frequent ones the smaller first; ids without a count are never seen."""
        counts_V = torch.zeros(len(self.rank_V), dtype=torch.int64)
        counts_V[list(counts)] = torch.tensor(list(counts.values()))
        order_V = counts_V.argsort(descending=True, stable=True)
        self.order_V.copy_(order_V)
        self.rank_V.copy_(order_V.argsort())
        _note_order(self)

    @property
    def matrix_weights(self) -> int:
        """Weights of all its matrices: an upper bound of what one token is multiplied with."""
        return self.weight.numel() + self.tails.weight.numel()

    def nats(self, x_MD: Tensor, targets_M: Tensor) -> Tensor:
        """-log p (M,) of the targets, in float32 or wider."""
        ranks_M = self.rank_V[targets_M]
        ends_C = torch.tensor(self.cutoffs, device=ranks_M.device)
        cluster_M = torch.bucketize(ranks_M, ends_C, right=True)
        choice_M = torch.where(cluster_M == 0, ranks_M, self.cutoffs[0] + cluster_M - 1)
        nats_M = F.cross_entropy(wide(self._first(x_MD)), choice_M, reduction="none")
        for tail, (start, end) in enumerate(self._spans(), 1):
            where = (cluster_M == tail).nonzero()[:, 0]
            logits = F.linear(x_MD.index_select(0, where), self._rows(start, end))
            within = F.cross_entropy(wide(logits), ranks_M.index_select(0, where) - start, reduction="none")
            nats_M = nats_M.index_add(0, where, within)
        return nats_M

    def forward(self, x: Tensor) -> Tensor:
        """The log p (..., V) of every id, in float32 or wider: with it a sampler needs no other head."""
        first = wide(self._first(x)).log_softmax(-1)
        size = self.cutoffs[0]
        parts = [first[..., :size]]
        for tail, (start, end) in enumerate(self._spans()):
            parts.append(wide(F.linear(x, self._rows(start, end))).log_softmax(-1) + first[..., size + tail, None])
        ranked: Tensor = torch.cat(parts, -1)
        return ranked if self.sorted else ranked.index_select(-1, self.rank_V)

    def _first(self, x: Tensor) -> Tensor:
        """Logits (..., S) of the shortlist and of the tails as wholes."""
        return F.linear(x, torch.cat([self._rows(0, self.cutoffs[0]), self.tails.weight]))

    def _spans(self) -> list[tuple[int, int]]:
        """First rank of each tail, and the one after its last."""
        return list(zip(self.cutoffs, (*self.cutoffs[1:], len(self.rank_V)), strict=True))

    def _rows(self, start: int, end: int) -> Tensor:
        """The rows of the table that belong to the ranks from `start` to before `end`."""
        return self.weight[start:end] if self.sorted else self.weight.index_select(0, self.order_V[start:end])


def _note_order(head: nn.Module, _keys: Any = None) -> None:
    """See whether the ids of a head are in the order of their ranks; waits for the device, so it is done when they change."""
    assert isinstance(head, AdaptiveHead)
    head.sorted = bool((head.rank_V[1:] > head.rank_V[:-1]).all())


def wide(x: Tensor) -> Tensor:
    """`x` in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
