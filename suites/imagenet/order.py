"""Which pictures a batch holds, in which order, and which of them a process makes; all of it follows from (seed, step).

Shape letters: B pictures of a batch.
"""

from typing import NamedTuple

import numpy as np

from hgrn2_bench import distributed
from suites.imagenet.task import TaskConfig

ORDER, ALTER, MIX, SHUFFLE, ERASE = range(5)
"""What a random draw is for, in its seed."""


class Wanted(NamedTuple):
    """A picture by its number, and the seed of what is done to it."""

    number: int
    seed: tuple[int, ...] = ()


class Order:
    """The batches of a training split of so many pictures."""

    def __init__(self, config: TaskConfig, seed: int, pictures: int, batch_size: int) -> None:
        self.config, self.seed, self.pictures = config, seed, pictures
        self.steps_per_epoch = max(1, pictures // batch_size)
        self.number = min(batch_size, pictures * config.repeats)
        self.orders: dict[int, np.ndarray] = {}

    def rows(self, step: int) -> np.ndarray:
        """The pictures of batch `step`, by their numbers: shuffled by (seed, epoch), each once an epoch but those that fill no batch.

        With `repeats` each fills so many places of one batch, among the others, and fewer pictures make an epoch.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        repeats = self.config.repeats
        if epoch not in self.orders:  # pictures made ahead may be those of the next one
            order = np.random.default_rng([self.seed, ORDER, epoch]).permutation(self.pictures)
            self.orders = {epoch: np.repeat(order, repeats), **{e: kept for e, kept in self.orders.items() if abs(e - epoch) == 1}}
        rows_B = self.orders[epoch][place * self.number : (place + 1) * self.number]
        return rows_B if repeats == 1 else np.random.default_rng([self.seed, SHUFFLE, step]).permutation(rows_B)

    def own(self, number: int) -> slice:
        """The places of a batch that this process needs: its own, and their neighbours where pictures are mixed; one at least."""
        world = distributed.current()
        begin = min(number * world.rank // world.size, number - 1)
        end = max(number * (world.rank + 1) // world.size, begin + 1)
        if self.config.mixes:
            begin, end = begin - begin % 2, min(number, end + end % 2)
        return slice(begin, end)

    def wanted(self, step: int) -> list[Wanted]:
        """What this process needs of a batch."""
        rows_B = self.rows(step)
        own = self.own(len(rows_B))
        altered = self.config.augment != "none"
        return [Wanted(int(rows_B[i]), (self.seed, ALTER, step, i) if altered else ()) for i in range(own.start, own.stop)]
