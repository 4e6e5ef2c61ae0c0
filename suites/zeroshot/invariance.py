"""Whether a model scores a request the same alone and in company: padding, batch and shared contexts must not matter.

Left padding that a recurrent model reads, or a mask that it ignores, moves scores far beyond rounding.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from suites.zeroshot.scoring import Limits, Pair, Reader, score

CHECKED = 8
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.25}
"""Nats a token that rounding may explain, by the type of the weights. Kernels on a GPU round float32 to TF32 inside: 1e-2 there."""
TOLERANCE_TF32 = 1e-2


class InvarianceError(RuntimeError):
    """A model's scores depend on what else is in the batch; the text is one line."""


class Found(NamedTuple):
    """What the check saw."""

    difference: float
    """The largest, in nats a token."""
    tolerance: float
    requests: int


def check(reader: Reader, pairs: Sequence[Pair], max_length: int, dtype: torch.dtype) -> Found:
    """Score a few requests of different lengths one by one, and eight at a time; `dtype` is the coarsest type that computes.

    InvarianceError where they differ by more than the tolerance.
    """
    chosen = spread([pair for pair in pairs if len(pair[0]) and len(pair[1])], CHECKED)
    alone = score(reader, chosen, Limits(max_length, rows=1, reuse=False))
    together = score(reader, chosen, Limits(max_length, rows=CHECKED, multiple=8))
    differences = [
        abs(one.log_p - other.log_p) / len(pair[1]) for one, other, pair in zip(alone, together, chosen, strict=True) if one != other
    ]
    coarse = dtype == torch.float32 and reader.device.type == "cuda"
    found = Found(max(differences, default=0.0), TOLERANCE_TF32 if coarse else TOLERANCES[dtype], len(chosen))
    if not found.difference <= found.tolerance:  # also where it is no number
        raise InvarianceError(
            f"scores depend on the batch: at batch 1 and {CHECKED} they differ by {found.difference:.3g} nats a token, more than the "
            f"{found.tolerance:g} that rounding in {str(dtype).removeprefix('torch.')} explains; this model cannot be scored in batches"
        )
    return found


def spread(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """So many requests at most from the shortest to the longest, those with one context side by side where there are such."""
    ordered = sorted(pairs, key=lambda pair: (len(pair[0]) + len(pair[1]), list(pair[0])))
    if len(ordered) <= most:
        return ordered
    by_context: dict[tuple[int, ...], list[Pair]] = {}
    for pair in ordered:
        by_context.setdefault(tuple(pair[0]), []).append(pair)
    pairs_of = [found[:2] for found in by_context.values()]
    step = max(1, (len(pairs_of) - 1) // max(1, most // 2 - 1))
    return [pair for found in [*pairs_of[::step], pairs_of[-1]] for pair in found][:most]
