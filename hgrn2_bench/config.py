"""Schemas of the plain keys, and the turning of `key=value` words into checked values. Imports no torch.

Words follow Hydra's override grammar (`OverridesParser`): a comma is a sweep, `range(3)` and `choice(a,b)` expand,
`model.key=value` sets a key for one model only, `model.key=[a,b]` is a list of words where the key takes one.
OmegaConf converts each value to the type of its schema field.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hgrn2_bench.errors import ConfigError, unknown


def choice(default: str, *others: str) -> Any:
    """A string field that takes one of the given words only."""
    return field(default=default, metadata={"choices": (default, *others)})


def numbers() -> Any:
    """A field that takes a list of whole numbers, [a,b]."""
    return field(default=(), metadata={"items": int})


@dataclass(frozen=True)
class ModelConfig:
    """The model around the mixer; the same for every model of a table unless a protocol says otherwise by name."""

    d_model: int = 64
    num_layers: int = 2
    conv: int = 0
    positions: str = choice("none", "learned", "rope", "sinusoid")
    forget_bias: float = 0.0
    lower_bound: str = choice("none", "exclusive", "inclusive")
    channel_mixer: str = choice("none", "identity", "mlp", "glu")
    channel_width: int = 0
    glu_activation: str = choice("silu", "none")
    """On a GLU's gate; `none` as in HGRN2's language models."""
    glu_bias: bool = True
    norm: str = choice("layernorm", "rmsnorm", "simple_rmsnorm", "batchnorm")
    """`simple_rmsnorm` has no weight."""
    final_norm: str = choice("as_blocks", "layernorm", "rmsnorm", "simple_rmsnorm")
    """The norm before the head."""
    norm_eps: float = 0.0
    """Added under the root of the block norms; 0 for the usual 1e-5, of `simple_rmsnorm` 1e-6."""
    norm_group: int = 0
    """Of a batch norm: how many sequences share their statistics in training, as on one GPU of several; 0 for the whole batch."""
    tie_embeddings: bool = False
    embed_std: float = 0.02
    embed_scale: str = choice("none", "sqrt")
    """`sqrt` multiplies what the embedding gives by the root of `d_model`, before positions."""
    softmax: str = choice("full", "adaptive")
    """Of language models: `adaptive` splits the vocabulary by frequency into a head and tails (see `hgrn2_bench.adaptive`)."""
    cutoffs: tuple = numbers()
    """Of an adaptive softmax: where each cluster but the last ends, in ranks of frequency; none: an eighth and half of the vocabulary."""
    embed_dropout: float = 0.0
    dropout: float = 0.0
    channel_dropout: float = 0.0
    """Inside a GLU, on the product of its branches."""
    drop_path: float = 0.0
    """Stochastic depth: the rate at which a sequence skips a branch of the last layer; it rises linearly from 0 in the first."""
    init: str = choice("mixer", "blanket", "truncated")
    """Of matrices: PyTorch's and each mixer's own; or all anew, as Zoology's trainer does, or as timm's vision transformers."""
    scan: str = choice("causal", "both", "2d_parallel", "2d_series")
    """The orders in which mixers read: see `hgrn2_bench.directions`."""
    first_layer: str = "none"
    """A registered model whose mixer takes layer 0 of every model, or `none`."""
    recompute: bool = False
    """In training keep only each block's input and compute the block again for its gradient: less memory, more time, the same numbers."""

    def __post_init__(self) -> None:
        require(1 <= self.d_model <= MAX_WIDTH, f"d_model={self.d_model} must be at least 1 and at most {MAX_WIDTH}")
        require(1 <= self.num_layers <= MAX_LAYERS, f"num_layers={self.num_layers} must be at least 1 and at most {MAX_LAYERS}")
        require(self.conv == 0 or self.conv >= 2, f"conv={self.conv} must be 0 (none) or a width of at least 2")
        wide = self.channel_mixer in ("mlp", "glu")
        require(
            wide or self.channel_width == 0, f"channel_width={self.channel_width} has no effect with channel_mixer={self.channel_mixer}"
        )
        require(self.channel_width >= 0, f"channel_width={self.channel_width} must be 0 (the usual width) or positive")
        for name in ("embed_dropout", "dropout", "channel_dropout", "drop_path"):
            require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must be at least 0 and less than 1")
        glu = self.channel_mixer == "glu"
        require(
            glu or not self.channel_dropout, f"channel_dropout={self.channel_dropout} has no effect with channel_mixer={self.channel_mixer}"
        )
        for name in ("glu_activation", "glu_bias"):
            value, usual = getattr(self, name), getattr(ModelConfig, name)
            require(glu or value == usual, f"{name}={value} has no effect with channel_mixer={self.channel_mixer}")
        self._check_norm()
        self._check_softmax()
        require(self.embed_std > 0, f"embed_std={self.embed_std} must be positive")
        one = self.first_layer != "none" and self.num_layers == 1
        require(not one, f"first_layer={self.first_layer} would be the only layer: num_layers must be at least 2")
        require(self.positions != "sinusoid" or self.d_model % 2 == 0, f"positions=sinusoid needs an even d_model, not {self.d_model}")

    def _check_norm(self) -> None:
        batch = self.norm == "batchnorm"
        require(self.norm_group >= 0, f"norm_group={self.norm_group} must be 0 (the whole batch) or positive")
        require(batch or not self.norm_group, f"norm_group={self.norm_group} has no effect with norm={self.norm}")
        require(0 <= self.norm_eps < 1, f"norm_eps={self.norm_eps} must be 0 (the usual one) or positive, and less than 1")
        require(not (batch and self.norm_eps), f"norm_eps={self.norm_eps} has no effect with norm=batchnorm")
        require(not (batch and self.recompute), "recompute=true would count every batch twice in the running statistics of norm=batchnorm")

    def _check_softmax(self) -> None:
        object.__setattr__(self, "cutoffs", tuple(self.cutoffs))  # JSON gives a list
        shown = f"cutoffs=[{','.join(map(str, self.cutoffs))}]"
        require(self.softmax == "adaptive" or not self.cutoffs, f"{shown} has no effect with softmax={self.softmax}")
        rising = all(one < other for one, other in itertools.pairwise((0, *self.cutoffs)))
        require(rising, f"{shown} must be whole numbers above 0, each greater than the one before")


@dataclass(frozen=True)
class TrainConfig:
    """The training budget and its optimiser: AdamW, one schedule, one selection rule; and how a step is computed."""

    lr: float = 1e-3
    weight_decay: float = 0.1
    decay_all: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    batch_size: int = 32
    """Sequences of one optimiser step, over all micro batches and processes together."""
    micro_batch: int = 0
    """Sequences that a process takes through the model at once, their gradients added up; 0: its whole share of the batch."""
    epochs: int = 1
    updates: int = 0
    """Optimiser steps in place of `epochs`; 0: epochs."""
    schedule: str = choice("cosine", "cosine_epoch", "cosine_timm", "constant", "inverse_sqrt")
    warmup: float = 0.0
    warmup_steps: int = 0
    """In place of `warmup`, a share of all steps."""
    warmup_from: float = 1e-7
    """Of `inverse_sqrt` and `cosine_timm`: the rate of the first step."""
    lr_end: float = 0.0
    """Of `cosine_timm`: the rate that the cosine falls to."""
    schedule_steps: int = 0
    """Where a cosine per step ends, which may be after the last step or before it; 0 for the last step."""
    clip: float = 0.0
    eval_every: int = 0
    eval_batch_size: int = 256
    stop_at: float = 0.0
    select: str = choice("validation", "test")
    tune_on: str = choice("every_seed", "first_seed")
    """With `first_seed` the tuning grid is run on the lowest seed alone, and its best point on the others."""
    keep: str = choice("last", "best", "both")
    """Which weights are measured at the end; `both` gives rows of the best ones too, on splits `validation_best` and `test_best`."""
    cuda_graph: bool = True
    """On a GPU: replay the training step as one CUDA graph. Off for debugging, and to see what it saves."""
    ema: float = 0.0
    """Decay per step of an average of the weights, which is measured too, on splits `validation_ema` and `test_ema`; 0: none."""
    compile_blocks: bool = False
    """Run the blocks of the model through torch.compile."""
    parallel: str = choice("ddp", "fsdp")
    """With several processes: whole weights in each (DDP), or a share of them (FSDP2). Not in a cell's key: its numbers are the same."""

    def __post_init__(self) -> None:
        require(0 < self.lr <= MAX_LR, f"lr={self.lr} must be positive and at most {MAX_LR:g}")
        for name in ("batch_size", "epochs", "eval_batch_size"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("weight_decay", "clip", "eval_every", "stop_at"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        for name in ("warmup_steps", "schedule_steps", "micro_batch", "updates", "warmup_from"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        for name in ("beta1", "beta2", "ema"):
            require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must be at least 0 and less than 1")
        require(not (self.warmup and self.warmup_steps), f"warmup={self.warmup} and warmup_steps={self.warmup_steps}: give one of them")
        per_step = self.schedule == "cosine"
        require(per_step or not self.schedule_steps, f"schedule_steps={self.schedule_steps} has no effect with schedule={self.schedule}")
        require(0 <= self.warmup < 1, f"warmup={self.warmup} is a share of all steps: at least 0 and less than 1")
        self._check_length()

    def _check_length(self) -> None:
        """ConfigError where length, schedule and batch do not go together."""
        both = self.updates and self.epochs > 1
        require(not both, f"epochs={self.epochs} and updates={self.updates}: give one of them (epochs=1 or updates=0)")
        by_epoch = self.schedule in ("cosine_epoch", "cosine_timm")
        require(not (by_epoch and self.updates), f"schedule={self.schedule} goes by epochs: updates={self.updates} must be 0")
        rooted = self.schedule == "inverse_sqrt"
        require(not rooted or self.warmup_steps >= 1, "schedule=inverse_sqrt falls from the end of its warm-up: give warmup_steps")
        first, by_timm = self.warmup_from, self.schedule == "cosine_timm"
        require(rooted or by_timm or first == type(self).warmup_from, f"warmup_from={first} has no effect with schedule={self.schedule}")
        require(first <= self.lr, f"warmup_from={first} must be at most lr={self.lr}")
        steps = f"warmup_steps={self.warmup_steps}: schedule=cosine_timm warms up for whole epochs; give warmup, a share of them"
        require(not (by_timm and self.warmup_steps), steps)
        require(by_timm or not self.lr_end, f"lr_end={self.lr_end} has no effect with schedule={self.schedule}")
        require(0 <= self.lr_end <= self.lr, f"lr_end={self.lr_end} must be at least 0 and at most lr={self.lr}")
        whole = self.parallel == "ddp" or not self.ema
        require(whole, "parallel=fsdp holds shares of the weights, of which no average is kept: use parallel=ddp or ema=0")
        large = self.micro_batch > self.batch_size
        require(not large, f"micro_batch={self.micro_batch} must be at most batch_size={self.batch_size}")

    def steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of a whole run."""
        return self.updates or self.epochs * steps_per_epoch


@dataclass(frozen=True)
class CellConfig:
    """Keys that belong to the cell itself rather than to its model, training or data."""

    seed: int = 0
    backend: str = choice("auto", "reference", "chunked", "fla")
    dtype: str = choice("float32", "bfloat16")

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, f"seed={self.seed} must be at least 0 and below 2^31")


@dataclass(frozen=True)
class MatchConfig:
    """In what the models of a run are made equal (see `hgrn2_bench.matching`): non-embedding parameters, or bytes of state."""

    match: str = choice("none", "params", "state")
    match_target: int = 0
    """0 is the size of the run's first model, which planning puts here as a number."""
    match_tolerance: float = 0.02
    """Largest miss that is accepted, relative to the target."""
    match_len: int = 0
    """Tokens after which the state is counted; 0 is the task's length, which planning puts here as a number."""

    def __post_init__(self) -> None:
        for given in dataclasses.fields(self):
            value = getattr(self, given.name)
            if given.name != "match":
                require(value >= 0, f"{given.name}={value} must not be negative")
                idle = self.match == "none" or (self.match == "params" and given.name == "match_len")
                require(not idle or value == given.default, f"{given.name}={value} has no effect with match={self.match}")


MAX_WIDTH, MAX_LAYERS, MAX_LR = 65_536, 1_000, 1_000.0
"""Beyond these a word is a slip of the keyboard."""
PLAN_KEYS = ("suite", "preset", "task", "model")
"""Keys that shape the plan; they have no schema field because each names something registered."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds (NaN never does)."""
    if not condition:
        raise ConfigError(message)


def heads_of(d_model: int, head_dim: int, what: str, width: str = "d_model", result: str = "heads") -> int:
    """Number of heads of `head_dim` channels in `d_model`; ConfigError with the nearest legal values where it does not divide.

    `what`, `width` and `result` name the three numbers in the message, for mixers whose setting is the number of heads.
    """
    if head_dim >= 1 and d_model % head_dim == 0:
        return d_model // head_dim
    legal = [n for n in range(1, d_model + 1) if d_model % n == 0]
    near = [*[n for n in legal if n < head_dim][-1:], *[n for n in legal if n > head_dim][:1]]
    raise ConfigError(
        f"{width}={d_model} must be a multiple of {what}={head_dim} ({result} = {width} / {what}); nearest legal {what}: "
        + " or ".join(map(str, near))
    )


@dataclass(frozen=True)
class Word:
    """One parsed word: `owner.key=values`, where an empty owner means every model."""

    text: str
    owner: str
    key: str
    values: tuple[Any, ...]
    plain: bool = True
    """False where the text has one of Hydra's signs that mean nothing here (+, ~, @)."""

    @property
    def name(self) -> str:
        """The key as typed."""
        return f"{self.owner}.{self.key}" if self.owner else self.key

    def check_list(self, *schemas: type) -> None:
        """ConfigError where a value is a bracketed list and the key is no setting of the schemas that takes one."""
        takes = any(f.name == self.key and f.type is tuple for schema in schemas for f in dataclasses.fields(schema))
        if not takes and any(isinstance(value, tuple) for value in self.values):
            raise ConfigError(f"{self.text!r}: a sweep is written without brackets, {self.name}=a,b")


def parse_words(words: Iterable[str]) -> list[Word]:
    """Parse `key=value` words; ConfigError, one line, for anything that is not one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # 0.1 s: only `run` needs it
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed = []
    for text in words:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            fault = str(error).splitlines()[0].partition(" expecting ")[0]  # a list of the grammar's tokens follows
            raise ConfigError(f"cannot read {text!r}: {fault} (expected key=value)") from None
        owner, _, key = override.key_or_group.rpartition(".")
        if not key:
            raise ConfigError(f"cannot read {text!r}: it names no key (expected key=value)")
        plain = not (override.is_delete() or override.is_add() or override.is_force_add() or override.package)
        parsed.append(Word(text, owner, key, _values(override, text) if plain else (), plain))
        if not owner:
            parsed[-1].check_list(ModelConfig)
    return parsed


def _values(override: Any, text: str) -> tuple[Any, ...]:
    """The values of one override: one, or those of its sweep; a bracketed list is a tuple."""
    from hydra.core.override_parser.types import Glob, IntervalSweep

    raw = override.value()
    if isinstance(raw, IntervalSweep | Glob):
        raise ConfigError(f"{text!r}: list the values (a,b,c) or use range(...); intervals and globs cannot be planned")
    try:
        items = list(override.sweep_iterator()) if override.is_sweep_override() else [raw]
    except ValueError as error:  # range(0,1,0)
        raise ConfigError(f"cannot read {text!r}: {error}") from None
    if not items:
        raise ConfigError(f"{text!r}: the sweep is empty")
    return tuple(
        tuple(_scalar(each, override, text) for each in item) if isinstance(item, list) else _scalar(item, override, text) for item in items
    )


def _scalar(item: Any, override: Any, text: str) -> Any:
    """One value of the grammar without its quotes; ConfigError for a list within a list, a dictionary, or an interpolation."""
    from hydra.core.override_parser.types import QuotedString

    value = item.text if isinstance(item, QuotedString) else item
    if isinstance(value, list | dict):
        raise ConfigError(f"{text!r}: a sweep is written without brackets, {override.key_or_group}=a,b")
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{text!r}: ${{...}} means nothing here; write the value")
    return value


def written(value: Any) -> str:
    """A value as one word of the grammar: null, a number or a name as it is, any other text in quotes, a list in brackets."""
    if isinstance(value, tuple):
        return f"[{','.join(map(written, value))}]"
    if not isinstance(value, str):
        return "null" if value is None else str(value)
    if re.fullmatch(r"[A-Za-z_./][\w./:-]*", value) and value.lower() not in ("null", "true", "false", "inf", "nan"):
        return value
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), value)  # Hydra's rule for quotes
    return f"'{escaped}'"


def convert(schema: type, key: str, value: Any, shown: str) -> Any:
    """`value` in the type of `schema`'s field `key`; ConfigError where it has another type or is not among the choices."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    spec = {f.name: f for f in dataclasses.fields(schema)}[key]
    if spec.type is tuple:
        return _items(value, shown, spec.metadata.get("items", str))
    single = dataclasses.make_dataclass("Single", [(key, spec.type, field(default=spec.default))])
    config = OmegaConf.structured(single)
    try:
        OmegaConf.update(config, key, value)
        result = config[key]
    except (OmegaConfBaseException, OverflowError):
        raise ConfigError(f"{shown}={'null' if value is None else value}: expected {type_name(spec.type)}") from None
    if isinstance(result, bool) and value not in (0, 1) and not isinstance(value, str):
        raise ConfigError(f"{shown}={value}: expected true or false")
    if isinstance(result, float) and not math.isfinite(result):
        raise ConfigError(f"{shown}={value}: expected a finite number")
    choices = spec.metadata.get("choices")
    if choices and result is not None and result not in choices:
        raise unknown(shown, str(result), choices)
    return result


def _items(value: Any, shown: str, kind: type) -> tuple[Any, ...]:
    """A list of words or of whole numbers; one alone is a list of one."""
    items = value if isinstance(value, tuple) else (value,)
    if not all(type(item) is kind for item in items):
        expected = type_name(tuple) if kind is str else "a list of whole numbers [1,2]"
        raise ConfigError(f"{shown}={'null' if value is None else list(items)}: expected {expected}")
    return items


def type_name(annotation: Any) -> str:
    """`int`, `float`, `int or null`: a type in words for an error line."""
    if isinstance(annotation, type):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", tuple: "a list of words [a,b]"}
        return names.get(annotation, "a value")
    return str(annotation).replace("None", "null").replace(" | ", " or ")


def schema_of(schemas: Mapping[str, type], key: str) -> tuple[str, type] | None:
    """The section and schema that own a plain key, or None."""
    for section, schema in schemas.items():
        if key in {f.name for f in dataclasses.fields(schema)}:
            return section, schema
    return None
