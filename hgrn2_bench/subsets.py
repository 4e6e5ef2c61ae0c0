"""Which items go into which split: seeded permutations, equal to those of torch's `random_split`."""

from collections.abc import Sequence

import numpy as np

from hgrn2_bench.errors import DataError


def permutation(number: int, seed: int) -> np.ndarray:
    """The numbers below `number` in an order that the seed alone decides: torch's `randperm`, int64."""
    import torch

    return torch.randperm(number, generator=torch.Generator().manual_seed(seed)).numpy()


def random_parts(sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """Indices of each part of `sum(sizes)` items, as `torch.utils.data.random_split` with a generator of this seed gives them."""
    return np.split(permutation(sum(sizes), seed), np.cumsum(sizes)[:-1])


def drawn(indices_N: np.ndarray, number: int, seed: int) -> np.ndarray:
    """At most `number` of the indices (0: all), drawn in seeded order: files are sorted by class, so their heads are no sample."""
    if not number or number >= len(indices_N):
        return indices_N
    return indices_N[permutation(len(indices_N), seed)[:number]]


def check_count(where: str, number: int, expected: int | None, reason: str = "a part of the data, or cut short") -> None:
    """Raise DataError unless there are as many items as expected (None: any number but 0)."""
    if number != expected if expected is not None else not number:
        raise DataError(f"{where}: {number:,} items, expected {'some' if expected is None else f'{expected:,}'}: {reason}")
