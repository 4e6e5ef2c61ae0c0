"""The processes among which lm-eval divides a task's items, where torchrun or accelerate started several."""

from typing import Any

import torch
from torch import Tensor, distributed

from hgrn2_bench.distributed import World, current, world

UNSAID = "cuda:0"
"""The device that lm-eval's command names where its user names none."""


class Ranks:
    """One process among the others, with a line of its own to them.

    A cell of suite zeroshot that several processes run together counts as one: only its first process evaluates.
    """

    def __init__(self) -> None:
        found = world() if current().size == 1 else World()
        self.rank, self.size, self.local_rank = found.rank, found.size, found.local_rank
        self._line: Any = None
        if self.size > 1:
            if not distributed.is_initialized():
                distributed.init_process_group("gloo")
            self._line = distributed.new_group(backend="gloo")

    def device(self, asked: str | None) -> str:
        """Where this process computes: as asked, else on a GPU of its own, without one on the CPU."""
        if asked and asked != UNSAID:
            return asked
        return f"cuda:{self.local_rank}" if torch.cuda.is_available() else "cpu"

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, one after another in the first dimension; numbers become one of so many."""
        if self.size == 1:
            return tensor
        mine = tensor.cpu().reshape(-1, *tensor.shape[1:])
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(parts, mine, group=self._line)
        return torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes, at process `dst`; nothing elsewhere."""
        if self.size == 1:
            return [obj]
        parts: list[Any] | None = [None] * self.size if self.rank == dst else None
        distributed.gather_object(obj, parts, dst=dst, group=self._line)
        return parts

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            distributed.barrier(group=self._line)
