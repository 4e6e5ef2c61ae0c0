"""From the scores of single items to a task's metrics, their standard errors, and a group's: closed forms, nothing is drawn.

lm-eval bootstraps some standard errors and leaves out others; by these formulas every mean and every perplexity has one.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

UNITS = {
    "perplexity": "per item",
    "word_perplexity": "per word",
    "byte_perplexity": "per byte",
    "bits_per_byte": "bits per byte",
    "brier_score": "squared distance",
}
FRACTION = "fraction"
"""Unit of all accuracies."""
SCORE = "score"
"""Unit of a metric that is none of these."""


@dataclass(frozen=True)
class Measure:
    """One metric of one task over its items."""

    name: str
    value: float
    num_items: int
    higher_is_better: bool
    unit: str
    stderr: float | None = None
    """None where no closed form is known."""
    bits: str = ""
    """Of a metric that is right or wrong: which items are right, one bit each, as base64."""


@dataclass(frozen=True)
class Scored:
    """One task's metrics."""

    name: str
    measures: Mapping[str, Measure]
    primary: str
    """The metric that is the task's score."""
    num_items: int
    docs: str
    """16 hex digits over the hashes of the scored items, in order."""
    chance: float | None = None
    """Accuracy of guessing, where there are choices."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """How it was asked, for the metrics' cards."""

    @property
    def score(self) -> Measure:
        """The primary metric."""
        return self.measures[self.primary]


def measure(name: str, values: Sequence[Any], aggregate: Any, higher_is_better: bool) -> Measure:
    """A metric from the values of its items, in the order of the items; `aggregate` is lm-eval's function of the metric."""
    kind = getattr(aggregate, "__name__", "")
    value = float(aggregate(list(values)))
    bits = right_bits(values)
    unit = UNITS.get(name.partition("@")[0], FRACTION if bits or _are_fractions(values) else SCORE)
    return Measure(name, value, len(values), bool(higher_is_better), unit, stderr(kind, values, value), bits)


def right_bits(values: Sequence[Any]) -> str:
    """Base64 of the items that are right, eight to a byte, the first item in the highest bit; empty where values are not all 0 or 1."""
    if not all(isinstance(value, int | float | np.number | np.bool_) and value in (0, 1) for value in values):
        return ""
    return base64.b64encode(np.packbits(np.asarray(values, bool)).tobytes()).decode()


def _are_fractions(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float | np.number) and 0 <= value <= 1 for value in values)


def docs_hash(hashes: Sequence[str]) -> str:
    """16 hex digits over the hashes of items, in order."""
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]


def stderr(kind: str, values: Sequence[Any], value: float) -> float | None:
    """The standard error of an aggregate of so many independent items; None for fewer than two, or where no closed form is known.

    A mean: s / sqrt(n). exp of a mean, of a ratio of sums, and the ratio itself: the same through the derivative (delta method).
    """
    if len(values) < 2 or not math.isfinite(value):
        return None
    if kind in ("mean", "nanmean"):
        return _of_mean(np.asarray(values, np.float64))
    if kind == "perplexity":  # exp(-mean nats)
        return value * _of_mean(np.asarray(values, np.float64))
    if kind in ("weighted_perplexity", "bits_per_byte"):  # of -sum(nats) / sum(weights)
        nats_N, weights_N = np.asarray(values, np.float64).T
        error = _of_ratio(nats_N, weights_N)
        return value * error if kind == "weighted_perplexity" else error / math.log(2)
    return None


def _of_mean(values_N: np.ndarray) -> float:
    return float(values_N.std(ddof=1) / math.sqrt(len(values_N)))


def _of_ratio(above_N: np.ndarray, below_N: np.ndarray) -> float:
    """Of sum(above) / sum(below)."""
    residual_N = above_N - above_N.sum() / below_N.sum() * below_N
    number = len(above_N)
    return float(math.sqrt(number / (number - 1) * (residual_N**2).sum()) / below_N.sum())


@dataclass(frozen=True)
class GroupScore:
    """The score of a group: a mean of its members' scores."""

    value: float
    stderr: float | None
    num_items: int
    chance: float | None
    left_out: tuple[str, ...]
    """Members whose score is of another kind than the first one's, and has no place in a mean."""
    metric: str
    """Names of the members' metrics."""


def group_score(members: Sequence[Scored], weighting: str) -> GroupScore:
    """The mean of the members' scores: `items` gives every item the same weight, `tasks` every member.

    Its standard error is that of a weighted mean of independent members. Accuracies are averaged where there are any.
    """
    kinds = [(each.score.unit, each.score.higher_is_better) for each in members]
    kind = next((each for each in kinds if each == (FRACTION, True)), kinds[0])
    taken = [each for each, own in zip(members, kinds, strict=True) if own == kind]
    weights_M = np.array([each.num_items if weighting == "items" else 1 for each in taken], np.float64)
    weights_M /= weights_M.sum()
    errors = [each.score.stderr for each in taken]
    whole = None if None in errors else float(np.sqrt(((weights_M * np.array(errors, np.float64)) ** 2).sum()))
    chances = [each.chance for each in taken]
    chance = None if None in chances else float(weights_M @ np.array(chances, np.float64))
    return GroupScore(
        value=float(weights_M @ np.array([each.score.value for each in taken])),
        stderr=whole,
        num_items=sum(each.num_items for each in taken),
        chance=chance,
        left_out=tuple(each.name for each in members if each not in taken),
        metric=", ".join(sorted({each.primary for each in taken})),
    )
