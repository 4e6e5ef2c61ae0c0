"""Scoring of a split: nats of every token, each predicted exactly once, and what they add up to.

Three ways to see a text: in windows, with the state carried from chunk to chunk, and in long blocks by the position within them. All give
the nats of the tokens in the order of the text; every mean is taken over tokens, never over windows or batches.

Letters: N tokens of a split, B windows of a batch, T tokens of a window.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hgrn2_bench.blocks import Text
from hgrn2_bench.corpus import TokenSplit

CARRIED_TOKENS = 4096
"""Tokens of a chunk with a carried state, which only bounds memory: the state is the same however the text is cut."""

Nats = NDArray[np.float32]


class Scores(Protocol):
    """What scoring asks of a model; see `hgrn2_bench.language.LanguageModel`."""

    @property
    def can_carry(self) -> bool:
        """Whether a state can be carried from block to block."""

    def losses(self, inputs_BT: Tensor, targets_BT: Tensor, states: Any = None, return_states: bool = False) -> tuple[Tensor, Any]:
        """Nats of every target (B, T), and the states after the last one where they are asked for."""


class Ledger:
    """Nats by token, filled from the first to the last; RuntimeError where one would be scored twice or not at all."""

    def __init__(self, text: Text) -> None:
        self.nats_N = torch.zeros(len(text), dtype=torch.float32, device=text.device)
        self.scored = 0

    def add(self, first: int, nats_M: Tensor) -> None:
        """Book the tokens from `first` on."""
        after = first + len(nats_M)
        if first != self.scored or after > len(self.nats_N):
            raise RuntimeError(f"tokens {first} to {after} of {len(self.nats_N)} were scored when {self.scored} already were")
        self.nats_N[first:after] = nats_M
        self.scored = after

    def close(self) -> Nats:
        """All of them, on the CPU."""
        if self.scored != len(self.nats_N):
            raise RuntimeError(f"{self.scored} of {len(self.nats_N)} tokens were scored")
        return self.nats_N.cpu().numpy()


def windowed(model: Scores, text: Text, block: int, window: int = 0) -> Nats:
    """Nats (N,) of every token, read in windows of `block` tokens that know nothing of the text before them.

    The first window scores all its tokens. Each further one holds up to `window` old tokens, which are not scored, and `block - window`
    new ones; the last has fewer and is read without padding. ValueError unless 0 <= window < block.
    """
    if not 0 <= window < block:
        raise ValueError(f"window={window} must be at least 0 and less than block={block}")
    ledger = Ledger(text)
    for begin_B, width in _windows(len(text), block, window, text.batch_size):
        nats_BT, _ = model.losses(*text.pairs(begin_B, width))
        first, old = int(begin_B[0]), min(window, width)
        if first == 0:
            ledger.add(0, nats_BT[0, :old])  # what is context to the others is new in the first window
        ledger.add(first + old, nats_BT[:, old:].flatten())
    return ledger.close()


def _windows(tokens: int, block: int, window: int, batch_size: int) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Begins (B,) of windows of one width, batch after batch; the last window, where it is not whole, alone."""
    if tokens <= block:
        if tokens:
            yield np.zeros(1, np.int64), tokens
        return
    stride = block - window
    whole, rest = divmod(tokens - window, stride)
    for start in range(0, whole, batch_size):
        yield np.arange(start, min(start + batch_size, whole), dtype=np.int64) * stride, block
    if rest:
        yield np.array([whole * stride]), window + rest


def carried(model: Scores, text: Text, chunk: int = CARRIED_TOKENS) -> Nats:
    """Nats (N,) of every token with everything before it in the state: one stream, since several would each begin without a past.

    ValueError for a model that has no state of fixed size to carry.
    """
    if not model.can_carry:
        raise ValueError("the model has no state of fixed size that could be carried from block to block")
    ledger, states = Ledger(text), None
    for begin in range(0, len(text), chunk):
        width = min(chunk, len(text) - begin)
        nats_BT, states = model.losses(*text.pairs(np.array([begin]), width), states, return_states=True)
        ledger.add(begin, nats_BT[0])
    return ledger.close()


@dataclass(frozen=True)
class Sums:
    """The one stored sum of a split's nats, and the counts that it may be divided by: any mean of it follows from these."""

    nats: float
    tokens: int
    words: int | None = None
    bytes: int | None = None

    @classmethod
    def of(cls, nats_N: NDArray[np.floating], split: TokenSplit | None = None) -> "Sums":
        """The sum in float64; words and bytes are those of the split."""
        total = float(nats_N.sum(dtype=np.float64))
        return cls(total, len(nats_N), split.words if split else None, split.bytes if split else None)

    @property
    def mean(self) -> float | None:
        """Nats per token; None without tokens."""
        return self.nats / self.tokens if self.tokens else None

    @property
    def perplexity(self) -> float | None:
        """Per token; None without tokens."""
        return _exp(self.mean)

    @property
    def word_perplexity(self) -> float | None:
        """Per word; None without words."""
        return _exp(self.nats / self.words) if self.words else None

    @property
    def bits_per_byte(self) -> float | None:
        """Of the original text; None without bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None


def _exp(nats: float | None) -> float | None:
    """Infinite where a float cannot hold it."""
    if nats is None:
        return None
    return math.exp(nats) if not nats > MAX_EXPONENT else math.inf


MAX_EXPONENT = 709.0
"""exp of more overflows."""


@dataclass(frozen=True)
class Bin:
    """Tokens with `first` to `last` - 1 others of their block before them."""

    first: int
    last: int
    sums: Sums


def by_position(model: Scores, text: Text, curve: int, trained: int) -> tuple[list[Bin], Nats]:
    """The loss by position in blocks of `curve` tokens, each read alone, in bins that double; and the nats (N,) themselves.

    A bin also ends at `trained`, the length of training, beyond which a model extrapolates. As many tokens are read at once as in blocks
    of that length. ValueError for a curve of less than one token.
    """
    if curve < 1:
        raise ValueError(f"curve={curve} must be at least 1")
    fewer = dataclasses.replace(text, batch_size=max(1, text.batch_size * trained // curve))
    nats_N = windowed(model, fewer, curve)
    position_N = np.arange(len(nats_N)) % curve
    ends = sorted({*(2**power for power in range(curve.bit_length()) if 2**power < curve), min(trained, curve), curve} - {0})
    bins = [Bin(a, b, Sums.of(nats_N[(position_N >= a) & (position_N < b)])) for a, b in zip([0, *ends], ends, strict=False)]
    return bins, nats_N


@dataclass(frozen=True)
class Excess:
    """What a model loses beyond the best predictor of a generated source, summed over free tokens and, apart, over recalled ones."""

    free: Sums
    recalled: Sums


def excess(nats_N: NDArray[np.floating], split: TokenSplit) -> Excess:
    """Nats above the optimum. ValueError for a split whose optimum is not known."""
    if split.optimum_N is None or split.recalled_N is None:
        raise ValueError("the optimum of this text is not known: only a generated source has one")
    above_N = nats_N - split.optimum_N
    return Excess(Sums.of(above_N[~split.recalled_N]), Sums.of(above_N[split.recalled_N]))


def windowed_card(corpus: Mapping[str, str], unit: str, block: int, window: int = 0) -> dict[str, str]:
    """The card of a metric over `windowed`: its unit, how the text was cut, and how it became tokens."""
    cut = {"window": f"{block} tokens, up to {window} of them old and not scored", "stride": f"{block - window} tokens"}
    return {"unit": unit, **cut, "state": "from nothing in each window", **corpus}


def carried_card(corpus: Mapping[str, str], unit: str) -> dict[str, str]:
    """The card of a metric over `carried`."""
    return {"unit": unit, "window": "all tokens before", "stride": "none", "state": "carried from the first token on", **corpus}
