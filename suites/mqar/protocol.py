"""MQAR's settings and mixtures, and how its rows are compared. Imports neither torch nor numpy.

Letters: V vocabulary, L length in tokens, k pairs. Sources: Zoology (arXiv 2312.04927), HazyResearch/zoology; HGRN2's runs of it,
OpenNLPLab/Zoology zoology/experiments/hgrn/hgrn2.py.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

from hgrn2_bench.config import choice, require
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.protocol import Figure, Protocol
from suites.mqar.presets import PRESETS

MAX_POWER_A = 10.0
MAX_VOCAB = 2**31


@dataclass(frozen=True, kw_only=True)
class MQAR:
    """One MQAR setting. Construction raises ConfigError, one line with the nearest legal values, where no example can exist."""

    vocab_size: int = 8192
    seq_len: int
    num_pairs: int
    power_a: float = 0.01
    """A key prefers cell i (from 0) with weight (i + 1)^(power_a - 1): 0.01 asks early, 1 is uniform."""
    random_fill: bool = False
    """Every input still 0 is replaced by a uniform token 0 .. V-1; labels stay. Off in Zoology's figure 2 and in HGRN2's runs."""

    def __post_init__(self) -> None:
        self.check()

    @property
    def num_keys(self) -> int:
        """Size of the key vocabulary, tokens 1 .. V//2 - 1."""
        return self.vocab_size // 2 - 1

    @property
    def num_values(self) -> int:
        """Size of the value vocabulary, tokens V//2 .. V - 1."""
        return self.vocab_size - self.vocab_size // 2

    @property
    def slots(self) -> int:
        """Two-token cells after the pairs, each of which can hold one query."""
        return (self.seq_len - 2 * self.num_pairs) // 2

    def check(self) -> None:
        """Raise ConfigError unless the numbers are whole and in range, 4k <= L with L even, and k <= V//2 - 1. V may be less than L."""
        for name in ("vocab_size", "seq_len", "num_pairs"):
            if not isinstance(getattr(self, name), Integral):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a whole number")
        self._check_ranges()
        self._check_fit()

    @property
    def max_pairs(self) -> int:
        """The most pairs that this length and vocabulary allow; below 1 where they allow none."""
        return min(self.seq_len // 4, self.num_keys)

    def _check_ranges(self) -> None:
        if self.num_pairs < 1:
            most = f" and at most {self.max_pairs}" if self.max_pairs > 0 else ""
            raise ConfigError(f"num_pairs={self.num_pairs} must be at least 1{most}")
        if self.vocab_size > MAX_VOCAB:
            raise ConfigError(f"vocab_size={self.vocab_size} must be at most {MAX_VOCAB}")
        if not 0.0 < self.power_a <= MAX_POWER_A:
            raise ConfigError(f"power_a={self.power_a} must be above 0 and at most {MAX_POWER_A:g}; Zoology uses 0.01, uniform is 1")

    def _check_fit(self) -> None:
        k, length, shortest = self.num_pairs, self.seq_len, 4 * self.num_pairs
        fewer = f"num_pairs at most {self.max_pairs}, or " if self.max_pairs > 0 else ""
        if length % 2:
            near = [n for n in (length - 1, length + 1) if n >= shortest] or [shortest]
            raise ConfigError(f"seq_len={length} must be even; nearest legal for num_pairs={k}: {' or '.join(map(str, near))}")
        if length < shortest:
            raise ConfigError(f"num_pairs={k} does not fit in seq_len={length} (4 tokens a pair): {fewer}seq_len at least {shortest}")
        if k > self.num_keys:
            raise ConfigError(
                f"num_pairs={k} needs {k} keys and vocab_size={self.vocab_size} has {max(self.num_keys, 0)} (V//2 - 1): "
                f"{fewer}vocab_size at least {2 * k + 2}"
            )


class Segment(NamedTuple):
    """One part of a mixture of settings."""

    seq_len: int
    num_pairs: int
    examples: int


class Mixture(NamedTuple):
    """What a model trains on, segment after segment in this order in every epoch, and what it is tested on."""

    train: tuple[Segment, ...]
    test: tuple[Segment, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """What the keys of a single setting are in a cell of this mixture, so that its rows say what was drawn."""
        tested = sum(segment.examples for segment in self.test)
        return {
            "seq_len": self.test[-1].seq_len,
            "num_pairs": self.test[-1].num_pairs,
            "train_examples": sum(segment.examples for segment in self.train),
            "validation_examples": tested,
            "test_examples": tested,
        }


MIXTURES = {
    # HazyResearch/zoology zoology/experiments/paper_configs/arxiv24_based_figure2/configs.py
    "based": Mixture(
        train=(
            Segment(64, 4, 100_000),
            Segment(128, 8, 20_000),
            Segment(256, 16, 20_000),
            Segment(256, 32, 20_000),
            Segment(256, 64, 20_000),
        ),
        test=(
            Segment(64, 4, 1_000),
            Segment(64, 8, 1_000),
            Segment(64, 16, 1_000),
            Segment(128, 32, 1_000),
            Segment(256, 64, 1_000),
            Segment(512, 128, 1_000),
            Segment(1024, 256, 1_000),
        ),
    ),
}
BEYOND = (2, 4, 8)
"""Factors by which length or number of pairs is taken beyond training, where `beyond_examples` asks for it."""


@dataclass(frozen=True, kw_only=True)
class MQARConfig(MQAR):
    """The suite's own keys: the setting, and how much of it is drawn. The cell's seed is the data seed (`data.segment_seeds`)."""

    seq_len: int = 64
    num_pairs: int = 4
    mixture: str = choice("none", *MIXTURES)
    """A named mixture of settings instead of one; the keys of a single setting must then be `Mixture.sizes`."""
    train_examples: int = 100_000
    validation_examples: int = 1_000
    test_examples: int = 3_000
    beyond_examples: int = 0
    """Test examples for each setting beyond training: 2, 4 and 8 times the length, then the number of pairs. 0 for none."""
    shuffle: bool = False
    """A new order of the training examples in every epoch; Zoology dropped it after its figure 2."""
    generator: str = choice("fast", "reference")
    """`reference` gives the bytes of Zoology's generator, tens to hundreds of times slower; `fast` draws from the same distribution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_examples", "validation_examples", "test_examples"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(self.beyond_examples >= 0, f"beyond_examples={self.beyond_examples} must be 0 (none) or positive")
        if self.mixture != "none":
            sizes = MIXTURES[self.mixture].sizes
            wrong = [f"{name}={size}" for name, size in sizes.items() if getattr(self, name) != size]
            require(not wrong, f"mixture={self.mixture} fixes its own sizes: it needs {' '.join(wrong)}")
            require(not (self.shuffle or self.beyond_examples), f"mixture={self.mixture} takes neither shuffle nor beyond_examples")

    def segments(self) -> dict[str, tuple[Segment, ...]]:
        """Every split and its segments, in the order in which their seeds are drawn: train, test, validation, beyond.

        Beyond: `test_len2x` has twice the length; `test_kv2x` twice the pairs, in the same length where they fit, else in the shortest.
        The validation split of a mixture is its test split drawn anew.
        """
        if self.mixture != "none":
            mixture = MIXTURES[self.mixture]
            return {"train": mixture.train, "test": mixture.test, "validation": mixture.test}
        length, pairs = self.seq_len, self.num_pairs
        sizes = {"train": self.train_examples, "test": self.test_examples, "validation": self.validation_examples}
        found: dict[str, tuple[Segment, ...]] = {split: (Segment(length, pairs, n),) for split, n in sizes.items()}
        if self.beyond_examples:
            longer = {f"test_len{n}x": (Segment(n * length, pairs, self.beyond_examples),) for n in BEYOND}
            fuller = {n: n * pairs for n in BEYOND if n * pairs <= self.num_keys}
            found |= longer
            found |= {f"test_kv{n}x": (Segment(max(length, 4 * k), k, self.beyond_examples),) for n, k in fuller.items()}
        return found

    def only(self, segment: Segment) -> "MQAR":
        """The setting of one segment."""
        return MQAR(
            vocab_size=self.vocab_size,
            seq_len=segment.seq_len,
            num_pairs=segment.num_pairs,
            power_a=self.power_a,
            random_fill=self.random_fill,
        )


def name_task(config: MQARConfig) -> str:
    """`len64_kv4` or `mixed_based`, with what departs from zero filler and the source's power written out."""
    fill = "_fill" if config.random_fill else ""
    power = "" if config.power_a == 0.01 else f"_a{config.power_a:g}"
    if config.mixture != "none":
        return f"mixed_{config.mixture}{power}" + ("" if config.random_fill else "_zeros")
    return f"len{config.seq_len}_kv{config.num_pairs}{fill}{power}"


FIGURES = (
    Figure("width", "accuracy against width", x="d_model", x_label="width d_model (features)", metric="accuracy", log_x=2),
    Figure("lr", "accuracy against learning rate", x="lr", x_label="learning rate", metric="accuracy", log_x=10, rows="d_model"),
    Figure(
        "length",
        "accuracy beyond the training length",
        x="length",
        x_label="length (multiple of the training length)",
        metric="accuracy",
        log_x=2,
        rows="d_model",
        splits={"test": 1, "test_len2x": 2, "test_len4x": 4, "test_len8x": 8},
        note="the number of pairs is that of training",
    ),
    Figure(
        "pairs",
        "accuracy beyond the training number of pairs",
        x="pairs",
        x_label="pairs (multiple of the training number)",
        metric="accuracy",
        log_x=2,
        rows="d_model",
        splits={"test": 1, "test_kv2x": 2, "test_kv4x": 4, "test_kv8x": 8},
        note="the length is that of training where the pairs fit, else the shortest that holds them",
    ),
    Figure(
        "state",
        "accuracy against memory",
        x="state_bytes",
        x_label="state of one sequence at its end (bytes)",
        metric="accuracy",
        log_x=10,
        joined=("expand_ratio", "expand_k", "expand_v", "expand", "d_state", "head_dim", "num_heads", "d_model"),
    ),
)

PROTOCOL = Protocol(
    name="mqar",
    version=1,
    metric="accuracy",
    unit="fraction",
    higher_is_better=True,
    data_schema=MQARConfig,
    name_task=name_task,
    presets=PRESETS,
    budget=("train_examples",),
    solved=0.99,  # Zoology's early-stopping threshold
    figures=FIGURES,
)
