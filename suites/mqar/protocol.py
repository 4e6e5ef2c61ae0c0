"""MQAR's numbers, each with its source: settings, presets, metric. Imports neither torch nor numpy.

Letters: V vocabulary, L length in tokens, k pairs. Sources: Zoology (arXiv 2312.04927), HazyResearch/zoology; HGRN2's runs of it,
OpenNLPLab/Zoology zoology/experiments/hgrn/hgrn2.py.
"""

from dataclasses import dataclass
from numbers import Integral

from hgrn2_bench.config import choice, require
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.protocol import Preset, Protocol

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


@dataclass(frozen=True, kw_only=True)
class MQARConfig(MQAR):
    """The suite's own keys: the setting, and how much of it is drawn. The cell's seed is the data seed (`data.segment_seeds`)."""

    seq_len: int = 64
    num_pairs: int = 4
    train_examples: int = 100_000
    validation_examples: int = 1_000
    test_examples: int = 3_000
    generator: str = choice("fast", "reference")
    """`reference` gives the bytes of Zoology's generator, tens to hundreds of times slower; `fast` draws from the same distribution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_examples", "validation_examples", "test_examples"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")


def name_task(config: MQARConfig) -> str:
    """`len64_kv4`, with what departs from zero filler and the source's power written out."""
    fill = "_fill" if config.random_fill else ""
    power = "" if config.power_a == 0.01 else f"_a{config.power_a:g}"
    return f"len{config.seq_len}_kv{config.num_pairs}{fill}{power}"


def setting(seq_len: int, num_pairs: int, *words: str) -> dict[str, tuple[str, ...]]:
    """One task of a preset."""
    return {f"len{seq_len}_kv{num_pairs}": (f"seq_len={seq_len}", f"num_pairs={num_pairs}", *words)}


SMALL_STACK = (
    # Two mixer layers and nothing else, the same trimmings for all.
    "model=hgrn2,attention,gla,mamba,hgrn1",
    "vocab_size=32",
    "d_model=64",
    "num_layers=2",
    "conv=4",
    "positions=none",
    "channel_mixer=none",
    "tie_embeddings=false",
    "embed_std=1.0",
    "gla.num_heads=1",  # one head, as HGRN2 and attention have at this width
    "lr=5e-3",  # of 3e-3, 4e-3 and 5e-3 the one at which Mamba passes 0.9 at (32, 4) in all five seeds tried
    "weight_decay=0.1",
    "schedule=cosine",
    "warmup=0.1",
    "batch_size=32",
    "dtype=float32",
)

SMOKE = Preset(
    summary="real task, tiny scale: V=32, L=32, k=4 and 8, two layers of width 64, 1,500 steps of fresh examples, CPU",
    source="ours: 4 pairs, which every mixer can learn in a CPU minute, and 8, which shows whose state is too small",
    words=(*SMALL_STACK, "seed=0,1", "train_examples=48_000", "validation_examples=500", "eval_every=100", "stop_at=0.998"),
    tasks={**setting(32, 4), **setting(32, 8)},
)

TEST = Preset(
    summary="the whole path in seconds: V=16, L=16, k=2, one layer of width 16, 20 steps; no model learns anything",
    source="ours: for the contract test",
    words=(
        *SMALL_STACK,
        "seed=0",
        "vocab_size=16",
        "d_model=16",
        "num_layers=1",
        "train_examples=640",
        "validation_examples=64",
        "test_examples=64",
    ),
    tasks=setting(16, 2),
)

PAPER = Preset(
    summary="HGRN2's protocol: V=8192, four settings, four widths, seven learning rates, zero filler, 64 epochs",
    source="OpenNLPLab/Zoology zoology/experiments/hgrn/hgrn2.py and hgrn1.py; attention, GLA, Mamba are our extension of the protocol",
    source_models=("hgrn2", "hgrn1"),  # its transformer.py, by an indentation slip, trains length 512 only
    words=(
        "model=hgrn2,hgrn1,attention",
        "seed=123",  # DataConfig.seed and TrainConfig.seed
        "vocab_size=8192",
        "power_a=0.01",  # the class default; the config's train_power_a is not a field there and has no effect
        "random_fill=false",
        "train_examples=100_000",
        "validation_examples=3_000",  # ours, never used to choose: the source has train and test only
        "test_examples=3_000",
        "d_model=64,128,256,512",
        "num_layers=2",
        "conv=0",
        "positions=none",
        "attention.positions=learned",  # only softmax attention has positions there; its attention dropout 0.1 is not repeated
        "attention.num_heads=1",
        "lower_bound=none",
        "channel_mixer=identity",  # Zoology's block without a state mixer adds the normalised residual back
        "norm=layernorm",
        "tie_embeddings=true",
        "embed_std=0.02",
        "embed_dropout=0.1",
        "init=blanket",  # Zoology re-initialises every Linear of every mixer
        "lr=1e-5,5e-5,1e-4,5e-4,1e-3,5e-3,1e-2",
        "weight_decay=0.1",
        "decay_all=true",
        "epochs=64",
        "schedule=cosine_epoch",
        "warmup=0.0",
        "clip=0.0",
        "stop_at=0.99",
        "select=test",  # the source stops and chooses its learning rate on the test set
        "dtype=bfloat16",  # autocast in training; evaluation without. bfloat16 needs no gradient scaler
    ),
    tasks={
        **setting(64, 4, "batch_size=512"),
        **setting(128, 8, "batch_size=512"),
        **setting(256, 16, "batch_size=256"),
        **setting(512, 64, "batch_size=64"),
    },
)

PROTOCOL = Protocol(
    name="mqar",
    version=1,
    metric="accuracy",
    unit="fraction",
    higher_is_better=True,
    data_schema=MQARConfig,
    name_task=name_task,
    presets={"test": TEST, "smoke": SMOKE, "paper": PAPER},
    budget=("train_examples",),
    solved=0.99,  # Zoology's early-stopping threshold
)
