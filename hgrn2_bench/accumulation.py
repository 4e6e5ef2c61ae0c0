"""A batch in pieces: micro batches that fit into memory, and each process's share of them.

A batch's loss is the mean over its targets. So the loss of a piece counts with its share of the batch's targets, and the gradients of all
pieces, over all processes, add up to the gradient of the whole batch. Which rows a piece holds follows from sizes alone.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hgrn2_bench.distributed import World
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.steps import Batch, Steps


class Divisible(Protocol):
    """What a suite's runner offers where its batches may be split."""

    def size(self, batch: Batch) -> int:
        """How many sequences, or pairs of them, a batch holds."""
        ...

    def part(self, batch: Batch, rows: slice) -> Batch:
        """Some of the sequences of a batch as a batch of their own."""
        ...

    def targets(self, batch: Batch) -> int | Tensor:
        """How many targets the mean loss of a batch is over; a tensor where only the device knows."""
        ...


@dataclass(frozen=True)
class Piece:
    """Some sequences of a batch."""

    rows: slice
    counts: bool
    """False for one that only keeps this process in step with others that have a sequence more: its loss counts nothing."""


def pieces(size: int, micro: int, world: World) -> list[Piece]:
    """The pieces of a batch of `size` sequences that this process takes, of at most `micro` (0: any number); each has as many.

    The sequences of a process lie together, in the order of the ranks.
    """
    begin, end = size * world.rank // world.size, size * (world.rank + 1) // world.size
    most = -(-size // world.size)
    count = -(-most // micro) if micro else 1
    cuts = [begin + (end - begin) * i // count for i in range(count + 1)]
    return [Piece(slice(a, b), True) if a < b else Piece(slice(0, 1), False) for a, b in itertools.pairwise(cuts)]


class PieceSteps(Steps):
    """Steps whose batches are taken in pieces; the loss that a step gives is this process's share of the batch's.

    `sync(last)` surrounds the work on a piece: gradients of all processes are added up in that on the last one.
    """

    def __init__(
        self, task: Divisible, micro: int, world: World, sync: Callable[[bool], AbstractContextManager[None]], *shared: Any
    ) -> None:
        super().__init__(*shared)
        self.task, self.micro, self.world, self.sync = task, micro, world, sync

    def gradient(self, batch: Batch) -> Tensor:
        """Leave the gradient of the whole batch, over all processes, in the parameters."""
        losses = []
        for piece, last in self._pieces(batch):
            part = self.task.part(batch, piece.rows)
            weight = self.task.targets(part) / self.task.targets(batch) if piece.counts else 0.0
            with self.sync(last):
                with self.autocast:
                    loss = self.batch_loss(self.model, part) * weight
                (loss * self.world.size).backward()  # processes exchange the mean of their gradients, and what is wanted is the sum
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _pieces(self, batch: Batch) -> Iterator[tuple[Piece, bool]]:
        found = pieces(self.task.size(batch), self.micro, self.world)
        return ((piece, i == len(found) - 1) for i, piece in enumerate(found))


def check_divisible(task: Any, model: torch.nn.Module, why: str) -> None:
    """ConfigError where a task's batches cannot be split, or where a piece would not be computed as in the whole batch."""
    from hgrn2_bench.layers import BatchNorm

    if missing := [name for name in ("size", "part", "targets") if not hasattr(task, name)]:
        raise ConfigError(f"{why}: this suite cannot split its batches (its runner has no {', '.join(missing)})")
    if any(isinstance(m, BatchNorm | torch.nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise ConfigError(f"{why}: norm=batchnorm needs the whole batch in one piece")
