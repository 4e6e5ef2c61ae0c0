"""MQAR examples: multi-query associative recall, seeded and independent of every global random state.

Source: Zoology (arXiv 2312.04927), HazyResearch/zoology, zoology/data/multiquery_ar.py.

Letters: V vocabulary, L length in tokens, k pairs, N examples. Token 0 is the filler, keys are 1 .. V//2 - 1, values V//2 .. V - 1.
A row starts with its k pairs, `key1 value1 key2 value2 ...`; the rest is seen as (L - 2k)//2 cells of two tokens. Every key is asked
once, as the first token of a cell of its own, and the label there is its value; all other labels are -100 (`IGNORED`).
The label stands where the question stands, so a loss compares them without a shift.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hgrn2_bench.errors import ConfigError
from suites.mqar.protocol import MQAR

Integers = NDArray[np.integer]

IGNORED = -100
"""Label of a position that is not scored."""
MAX_SEED = 2**32
"""Seeds of the reference are below this; `segment_seeds` draws below half of it for training, from the upper half for testing."""
CHUNK_TOKENS = 2**18
"""Rows are made in chunks of about this many tokens, to bound memory. Part of the random stream: another value gives other data."""
FLOOR_DRAWS = 4_000_000
"""Cells that `recall_free_floor` draws by default."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and labels, each (N, L), of type `token_dtype` (the reference mode gives int64)."""

    inputs: Integers
    labels: Integers


class SegmentSeeds(NamedTuple):
    """One seed per segment of a mixture."""

    train: tuple[int, ...]
    test: tuple[int, ...]


def token_dtype(task: MQAR) -> np.dtype[np.signedinteger]:
    """The type of inputs and labels: int16 where every token fits (V <= 32768), else int32."""
    return np.dtype(np.int16 if task.vocab_size - 1 <= np.iinfo(np.int16).max else np.int32)


def generate(task: MQAR, num_examples: int, seed: int) -> Examples:
    """`num_examples` rows of the reference's distribution, tens of times faster: the same bytes for the same task, count and seed.

    The random fill has a stream of its own, so that it changes nothing but the fillers.
    """
    _check_count(num_examples)
    _check_seed(seed, None)
    rng, fill_rng = np.random.Generator(np.random.PCG64(seed)), np.random.Generator(np.random.PCG64(seed).jumped())
    inputs = np.zeros((num_examples, task.seq_len), token_dtype(task))
    labels = np.full((num_examples, task.seq_len), IGNORED, token_dtype(task))
    for rows in _chunks(num_examples, task.seq_len):
        num_rows = rows.stop - rows.start
        keys = _distinct(rng, num_rows, task.num_pairs, task.num_keys) + 1
        values = _distinct(rng, num_rows, task.num_pairs, task.num_values) + task.vocab_size // 2
        _place(task, inputs[rows], labels[rows], keys, values, _cells(rng, task, num_rows))
        if task.random_fill:
            fill = fill_rng.integers(task.vocab_size, size=(num_rows, task.seq_len), dtype=np.int32)
            np.copyto(inputs[rows], fill, casting="same_kind", where=inputs[rows] == 0)
    return Examples(inputs, labels)


def generate_reference(task: MQAR, num_examples: int, numpy_seed: int, torch_seed: int | None = None) -> Examples:
    """The very bytes of the Zoology generator, as int64, at its speed: for tests and for repeating published data.

    It draws from a legacy RandomState: the keys of all rows, then the values of all rows, then the cells of all rows. Only the random
    fill takes `torch_seed`; there the reference reads torch's global generator, whose state depends on what ran before.
    """
    _check_count(num_examples)
    _check_seed(numpy_seed, MAX_SEED)
    if task.random_fill and torch_seed is None:
        raise ConfigError("random_fill in reference mode needs torch_seed: the fillers come from torch's generator")
    rng, k, half = np.random.RandomState(numpy_seed), task.num_pairs, task.vocab_size // 2
    weight = np.arange(1, task.slots + 1) ** (task.power_a - 1.0)
    share = weight / weight.sum()
    keys = np.stack([rng.permutation(task.num_keys)[:k] + 1 for _ in range(num_examples)])
    values = np.stack([rng.permutation(task.num_values)[:k] + half for _ in range(num_examples)])
    cells = np.stack([rng.choice(task.slots, size=k, replace=False, p=share) for _ in range(num_examples)])
    inputs = np.zeros((num_examples, task.seq_len), np.int64)
    labels = np.full((num_examples, task.seq_len), IGNORED, np.int64)
    _place(task, inputs, labels, keys, values, cells)
    if task.random_fill:
        import torch

        torch_rng = torch.Generator().manual_seed(torch_seed or 0)
        fill = torch.randint(task.vocab_size, inputs.shape, generator=torch_rng).numpy()
        np.copyto(inputs, fill, where=inputs == 0)
    return Examples(inputs, labels)


def segment_seeds(seed: int, num_train: int, num_test: int) -> SegmentSeeds:
    """The seeds that Zoology derives from a data seed: train segments first, below 2^31; then test segments, from 2^31 up."""
    _check_seed(seed, MAX_SEED)
    rng = np.random.RandomState(seed)
    train = rng.randint(0, MAX_SEED // 2, size=num_train, dtype=np.int64)
    test = rng.randint(MAX_SEED // 2, MAX_SEED, size=num_test, dtype=np.int64)
    return SegmentSeeds(tuple(train.tolist()), tuple(test.tolist()))


def data_hash(examples: Examples) -> str:
    """First 16 hex digits of SHA-256 over the inputs and then the labels, as little-endian int64 whatever type they have."""
    digest = hashlib.sha256()
    for array in (examples.inputs, examples.labels):
        for rows in _chunks(*array.shape):
            digest.update(array[rows].astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def uniform_floor(task: MQAR) -> float:
    """Accuracy of any guess that ignores the input, 1/num_values exactly: a label is uniform over the values at every query."""
    return 1.0 / task.num_values


def recall_free_floor(task: MQAR, num_examples: int | None = None, seed: int = 0) -> float:
    """Accuracy of the best guess that never compares keys: where the query stands tells which pair was probably asked.

    Early pairs get early cells, so the query's rank in the sequence and its cell together favour one pair. The favourite for each
    (rank, cell) is learned from one half of `num_examples` fresh rows and scored on the other half, then the other way round, so that
    the mean is not biased upward. V plays no part; 1.0 for a single pair. With random fill a model cannot see ranks: an upper bound.
    """
    if num_examples is None:
        num_examples = max(2_000, FLOOR_DRAWS // task.slots)
    if num_examples < 2:
        raise ConfigError(f"num_examples={num_examples} must be at least 2 (one half to fit, one to score)")
    _check_seed(seed, None)
    rng = np.random.Generator(np.random.PCG64(seed))
    cells = np.concatenate([_cells(rng, task, r.stop - r.start) for r in _chunks(num_examples, task.seq_len)])
    pair = np.argsort(cells, axis=1)
    place = np.arange(task.num_pairs) * task.slots + np.take_along_axis(cells, pair, axis=1)
    half = num_examples // 2
    first, second = (place[:half], pair[:half]), (place[half:], pair[half:])
    hits = [np.mean(_favourites(task, *fit)[score[0]] == score[1]) for fit, score in ((first, second), (second, first))]
    return float(np.mean(hits))


def _favourites(task: MQAR, place: Integers, pair: Integers) -> Integers:
    """(k * slots): the most frequent pair at each place = rank * slots + cell, and the rank itself where none was seen."""
    k = task.num_pairs
    seen, count = np.unique(place * k + pair, return_counts=True)
    order = np.argsort(count, kind="stable")
    favourite = np.repeat(np.arange(k), task.slots)
    favourite[seen[order] // k] = seen[order] % k  # repeated places keep the last, which is the most frequent
    return favourite


def _check_count(num_examples: int) -> None:
    if num_examples < 1:
        raise ConfigError(f"num_examples={num_examples} must be at least 1")


def _check_seed(seed: int, limit: int | None) -> None:
    if seed < 0 or (limit and seed >= limit):
        raise ConfigError(f"seed={seed} must be 0 or more" + (f" and below {limit}" if limit else ""))


def _chunks(num_rows: int, width: int) -> Iterator[slice]:
    """Slices that cover `num_rows` rows of `width` tokens, about CHUNK_TOKENS tokens each."""
    step = max(1, CHUNK_TOKENS // width)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _distinct(rng: np.random.Generator, num_rows: int, k: int, n: int) -> Integers:
    """(num_rows, k): in each row k different integers of 0 .. n-1, every ordered choice equally likely.

    A row is the first k different numbers of a uniform stream, cut at a width that rarely falls short. Rows that do fall short are
    drawn again; renaming the numbers leaves that event as it is, so the rows kept are still uniform. Right for every k <= n.
    """
    left = n - np.arange(k)  # the j-th new number takes n / left[j] draws in the mean
    width = round(float((n / left).sum() + 2.0 * math.sqrt((n * (n - left) / left**2).sum())))
    out, todo = np.empty((num_rows, k), np.int64), np.arange(num_rows)
    while todo.size:
        drawn = rng.integers(n, size=(todo.size, width))
        new = _first_seen(drawn)
        done = new.sum(axis=1) >= k
        drawn, new = drawn[done], new[done]
        out[todo[done]] = drawn[new & (new.cumsum(axis=1) <= k)].reshape(-1, k)
        todo = todo[~done]
    return out


def _first_seen(drawn: Integers) -> NDArray[np.bool_]:
    """Same shape: whether an entry differs from all entries before it in its row."""
    order = np.argsort(drawn, axis=1, kind="stable")
    in_order = np.take_along_axis(drawn, order, axis=1)
    new = np.ones(drawn.shape, np.bool_)
    np.put_along_axis(new, order[:, 1:], in_order[:, 1:] != in_order[:, :-1], axis=1)
    return new


def _cells(rng: np.random.Generator, task: MQAR, num_rows: int) -> Integers:
    """(num_rows, k): the cell of each key, drawn one after the other without replacement by weight (i + 1)^(power_a - 1).

    Exponential clocks: cell i rings at E / weight(i); the first k to ring, in that order, have exactly this distribution.
    """
    slowness = np.arange(1, task.slots + 1) ** (1.0 - task.power_a)
    rings = rng.standard_exponential((num_rows, task.slots))
    rings *= slowness
    return np.argsort(rings, axis=1)[:, : task.num_pairs]


def _place(task: MQAR, inputs: Integers, labels: Integers, keys: Integers, values: Integers, cells: Integers) -> None:
    """Write pairs, queries and labels of (n, k) keys, values and cells into (n, L) inputs of 0 and labels of IGNORED."""
    context = 2 * task.num_pairs
    inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values
    rows, queries = np.arange(len(keys))[:, None], context + 2 * cells
    inputs[rows, queries], labels[rows, queries] = keys, values
