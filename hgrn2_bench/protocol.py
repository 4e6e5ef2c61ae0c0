"""The suite contract, torch-free half: a frozen protocol, and what a runner module must offer.

A suite is a folder with `protocol.py`, holding `PROTOCOL = Protocol(...)`, and `runner.py`, holding a class `Runner`
(see `hgrn2_bench.engine.Runner`). Importing `protocol.py` must not import torch: the command line reads it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A named set of words, applied before the user's own. Rows of different presets never share a table."""

    summary: str
    source: str
    """Where its numbers come from."""
    words: tuple[str, ...]
    """`key=value` words in the command line's own grammar, `model=` among them."""
    tasks: Mapping[str, tuple[str, ...]]
    """Each task's own words, applied after `words`."""
    reproduces: tuple[str, ...] = ()
    """Tables of `published.csv` whose protocol this preset repeats, so that values may be compared."""
    source_models: tuple[str, ...] = ()
    """Models that the source ran: the table calls all others our extension of the protocol. Empty where the protocol is ours."""
    open_tasks: bool = False
    """Other names than `tasks` may be given too: those for which the protocol's `open_task` has words."""


@dataclass(frozen=True)
class Figure:
    """One figure of a suite: a metric against something, one column of panels per task, one curve per model and setting."""

    name: str
    """Part of the file's name."""
    title: str
    x: str
    """A setting under the name a user types, a field of the row such as `state_bytes`, or what `splits` counts."""
    x_label: str
    """With its unit."""
    metric: str
    log_x: int = 0
    """Base of the horizontal scale; 0 for a linear one. Base 2 marks the tried values, any other its own powers."""
    log_y: bool = False
    rows: str = ""
    """A setting that gets a row of panels for each of its values."""
    joined: tuple[str, ...] = ()
    """Settings, without their model's name, whose values one curve may run through: the first of them that varies for a model."""
    splits: Mapping[str, float] = field(default_factory=dict)
    """Where the horizontal axis runs over splits of one cell: each split's place on it."""
    note: str = ""
    """What a reader must know beside it; printed below."""


@dataclass(frozen=True)
class Protocol:
    """What a suite fixes for everybody: its presets, its primary metric, how rows are compared."""

    name: str
    version: int
    """Part of every cell's key: raise it when the numbers a protocol gives change."""
    metric: str
    """The primary metric, by which models are compared and learning rates chosen."""
    unit: str
    higher_is_better: bool
    """Holds for every metric of the suite."""
    data_schema: type
    """Frozen dataclass of the suite's own keys (task and data); its `__post_init__` checks combinations."""
    name_task: Callable[[Any], str]
    """The task's name from its data settings, so that a row's task always says what was run."""
    presets: Mapping[str, Preset]
    open_task: Callable[[str], tuple[str, ...]] | None = None
    """Of a suite whose tasks are too many to list: the words of one by its name. ConfigError with the nearest name for an unknown one."""
    fingerprint: Callable[..., str] | None = None
    """Of a suite that reads files: what tells those of these data settings from any others; planning puts it into their `fingerprint`.

    Of a suite that saves weights it also takes the folder of a trained model, where one is evaluated. ConfigError where there are none.
    """
    has_images: Callable[[Any], bool] | None = None
    """Whether items of these data settings have height and width, which two-dimensional scans need; None where no task has."""
    tuned: tuple[str, ...] = ("lr",)
    """Keys of the tuning grid: the table reports the best value of each, chosen on the selection split."""
    budget: tuple[str, ...] = ()
    """Keys of the suite's own that say how much is trained on, for the table's note."""
    solved: float | None = None
    """Where runs pile up near 0 and 1: the value from which a run counts as solved; the table then shows median and range."""
    speed: bool = False
    """The suite times work instead of training: rows of different devices never share a table, cells run alone, models take turns."""
    across: str = ""
    """Of a suite that times: the key whose values are the columns of its tables."""
    beside: tuple[str, str] = ("", "")
    """Of a suite that times: two models, of which the table says from where on the first is faster."""
    beside_metric: tuple[tuple[str, str, str], ...] = ()
    """Further columns of the table of the primary metric, where a run has them: heading, metric, split."""
    rates: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    """Further speeds in the table, beside tokens/s: heading, the key in a row's details, and keys of what it goes by.

    A note says that; where it differs between rows there is no column.
    """
    averaged: tuple[str, tuple[str, ...]] = ("", ())
    """A setting that names the tasks, and the values over all of which, and no fewer, a model has an average."""
    averaged_as: tuple[str, ...] = ()
    """Their headings as `published.csv` has them, where models of several sizes were published; parts of tasks then stand apart."""
    figures: tuple[Figure, ...] = ()
    """What `plot` draws."""
    idle: tuple[str, ...] = ()
    """Keys of the core that change nothing here: refused."""
    saves_weights: bool = False
    """The suite trains language models, and each cell's folder keeps its own under `model/` once the cell has ended well.

    Such folders may stand for models: they are evaluated as they are."""
    takes_any_language_model: bool = False
    """The suite evaluates folders of trained models, and not ours alone but any causal language model that transformers can build."""


@dataclass(frozen=True)
class Metric:
    """One measured number on one split; `num_items` is what it averages over, `floors` are values that need no learning, by name."""

    split: str
    name: str
    value: float
    num_items: int
    floors: Mapping[str, float] = field(default_factory=dict)
    unit: str = ""
    """Where it is not the protocol's."""
    higher_is_better: bool | None = None
    """Where it is not the protocol's."""
    card: Mapping[str, str] = field(default_factory=dict)
    """How the number is defined, in words, where its name does not say all: rows of different cards never share a table."""
