"""Runs one cell: seed, data, model, training, evaluation, rows. A bad cell becomes a row with an outcome and a reason."""

import contextlib
import dataclasses
import gc
import importlib
import json
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import torch
from torch import nn

from hgrn2_bench import distributed, foreign_config, foreign_models, matching, measure, provenance, registry, timing
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.errors import ConfigError, one_line
from hgrn2_bench.model import Backbone
from hgrn2_bench.ops.tuned import thoroughness
from hgrn2_bench.plan import Cell, Description, versions
from hgrn2_bench.protocol import Metric
from hgrn2_bench.results import Row
from hgrn2_bench.stopping import InterruptedTrainingError, at_once, in_its_own_time
from hgrn2_bench.trackers import mirrored
from hgrn2_bench.trainer import DivergedError, Progress, TrainableTask, Trainer

PROBE_TOKENS = 1024
"""Tokens of one probe step, by which a plan's cost on a CPU is estimated."""


@dataclass(frozen=True)
class Shape:
    """The size of a cell's task, known without its data."""

    seq_len: int
    labels_per_token: float
    steps_per_epoch: int
    tokens_per_epoch: int
    step_tokens: int
    """Tokens of a full step; the mean where steps differ."""

    def tokens(self, steps: int) -> int:
        """Tokens of so many steps."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.tokens_per_epoch + rest * self.step_tokens


class CellRunner(Protocol):
    """What every suite's `runner.py` offers as its class `Runner`: one cell's data and model."""

    data_hash: str
    truncated: int
    skipped: int

    def __init__(self, cell: Cell) -> None:
        """Make or read the cell's data on the cell's device; touches no global random state and knows no model.

        A runner that has an attribute `folder` (None at first) gets there the cell's own folder, in the process that may write to it.
        """

    @staticmethod
    def shape(cell: Cell) -> Shape:
        """The task's size; where something is timed its batch counts as one epoch of one step."""
        ...

    @staticmethod
    def build(cell: Cell) -> Backbone:
        """The untrained model, its weights drawn from torch's global generator: on the CPU, or where a timed cell runs."""
        ...


class Runner(TrainableTask, CellRunner, Protocol):
    """Of a suite that trains: also its loss and metrics."""

    def report(self, model: Any) -> Sequence[Metric]:
        """Every metric of the trained model on the validation split, on the test split, and on any further one; the primary ones first."""
        ...


@dataclass(frozen=True)
class Measured:
    """What timing a cell gave."""

    metrics: Sequence[Metric]
    """All of split `test`, the primary one first."""
    median_s: float | None
    """Of one call."""
    compile_s: float
    tokens_per_s: float | None
    details: Mapping[str, Any]


class Stopwatch(CellRunner, Protocol):
    """Of a suite that times (`Protocol.speed`): what it does instead of training."""

    def measure(self, model: Any) -> Measured:
        """Check, warm up and time the model, which is on the cell's device. SkippedError where there is nothing to time."""
        ...

    def rehearse(self, model: Any) -> None:
        """Launch what `measure` launches, a few times at most."""
        ...


class SkippedError(Exception):
    """A cell that has nothing to run here, and why."""


def runner_class(cell: Cell) -> type[Runner]:
    """The suite's runner."""
    found: type[Runner] = importlib.import_module(f"{registry.suites()[cell.suite]}.runner").Runner
    return found


def build(cell: Cell) -> Backbone:
    """The cell's model as its seed makes it. ConfigError where the device is not there or the model's settings are illegal."""
    if cell.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch cannot use the GPU that the driver shows (a CPU build, or too old a driver): pass --device cpu")
    torch.manual_seed(cell.seed)
    return runner_class(cell).build(cell)


def describe(cell: Cell, model: Backbone, probe: bool = False) -> Description:
    """What a cell's model is and costs; `probe` times it forward and backward on few random tokens of the CPU."""
    if cell.backend == foreign_config.BACKEND:
        return foreign_models.describe(model)
    shape = runner_class(cell).shape(cell)
    steps = 0 if cell.checkpoint else cell.train.steps(shape.steps_per_epoch)
    tokens = shape.tokens(steps)
    built = measure.effective(model) | matching.facts(cell, model)
    if cell.checkpoint:
        built["median_decay"] = built.pop("median_decay_at_init", None)
    return Description(
        *measure.parameters(model),
        state_bytes=measure.state_bytes(model, shape.seq_len, itemsize(cell)),
        train_flops_per_token=measure.train_flops_per_token(model, shape.seq_len, shape.labels_per_token),
        steps=steps,
        tokens=tokens,
        effective=plain(built),
        seconds=_probe(cell, model, shape) * tokens if probe and tokens else None,
    )


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as JSON holds them: a model's own objects as text, NaN as null."""
    content: dict[str, Any] = json.loads(json.dumps(dict(facts), default=str), parse_constant=lambda _: None)
    return content


def itemsize(cell: Cell) -> int:
    """Bytes of one activation."""
    return 2 if cell.dtype == "bfloat16" else 4


def _probe(cell: Cell, model: Backbone, shape: Shape) -> float:
    """Seconds per token of a forward and backward pass over few random tokens, the faster of two after one warm-up."""
    batch = min(cell.train.micro_batch or cell.train.batch_size, max(1, PROBE_TOKENS // shape.seq_len))
    labels = max(1, round(shape.labels_per_token * batch * shape.seq_len))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        model.probe(batch, shape.seq_len, labels).backward()
        times.append(time.perf_counter() - began)
    return min(times[1:]) / (batch * shape.seq_len)


@dataclass
class Facts:
    """What a run learns on its way, for its rows."""

    description: Description | None = None
    runner: Runner | None = None
    progress: Progress = dataclasses.field(default_factory=Progress)
    peak_bytes: int | None = None
    weights_hash: str = ""
    training_step: str = ""
    workers: int = 1
    track: str = ""
    """The tracker that mirrors the curve."""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def run_cell(
    cell: Cell, folder: CellFolder, report: Callable[[int, int, str], None], stop: Callable[[], bool], workers: int = 1, track: str = ""
) -> list[Row]:
    """Run a cell whose folder the caller has locked, write its rows, and return them; `workers` cells run at once.

    InterruptedTrainingError (of training after a checkpoint), OSError while writing rows, and GroupError where not all processes of the
    cell came to the same outcome pass through; whatever else goes wrong becomes the outcome of the cell. For the main thread.
    """
    facts = Facts(workers=workers, track=track)
    metrics: list[Metric] = []
    status, reason, fault = "ok", "", ""
    try:
        folder.begin()
        with at_once(stop):
            metrics = _train_and_measure(cell, folder, facts, report, stop)
    except InterruptedTrainingError:
        folder.set_status("interrupted")
        raise
    except Exception as error:
        status, reason = outcome_of(error)
        fault = traceback.format_exc()
    try:
        distributed.agree(status, reason)
    except distributed.GroupError:
        folder.set_status("interrupted")
        raise
    if fault:
        folder.write("error.txt", fault)
        gc.collect()  # an error and the frames that it passed hold each other, and with them loaders and memory
    rows = make_rows(cell, metrics, status, reason, facts)
    free_memory(cell)
    folder.finish(rows)
    return rows


def free_memory(cell: Cell) -> None:
    """Give back the GPU's memory that a cell no longer uses: other workers may need it."""
    if cell.device == "cuda":
        with contextlib.suppress(RuntimeError):  # a GPU that refuses all work
            torch.cuda.empty_cache()


def outcome_of(error: Exception) -> tuple[str, str]:
    """The outcome and one-line reason that an exception stands for."""
    text = one_line(error) or type(error).__name__
    if isinstance(error, ConfigError):
        return "failed", text[:300]
    if isinstance(error, DivergedError):
        return "diverged", text
    if isinstance(error, SkippedError):
        return "skipped", text
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text or "out of memory" in text.lower():
        return "oom", text[:200]
    return "failed", f"{type(error).__name__}: {text}"[:300]


def _train_and_measure(
    cell: Cell, folder: CellFolder, facts: Facts, report: Callable[[int, int, str], None], stop: Callable[[], bool]
) -> list[Metric]:
    found = registry.model(cell.model_ref)
    if (versions(found, cell.settings, cell.model_config.first_layer), found.checkpoint) != (cell.mixer_version, cell.checkpoint):
        raise ConfigError(f"{cell.model_ref} changed after the run was planned; run again")
    if found.trained:
        facts.details = {"checkpoint": cell.model_ref, **plain(found.trained.told)}
    model = build(cell)
    facts.description = describe(cell, model)
    facts.runner = runner = runner_class(cell)(cell)
    if hasattr(runner, "folder") and folder.writes:
        runner.folder = folder.path
    model = model.to(cell.device)
    if cell.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(cell.seed + distributed.current().rank)  # each process drops out units of its own
    if registry.protocol(cell.suite).speed:
        return _measure(cell, model, runner, facts)
    further = {} if cell.checkpoint else _train(cell, model, folder, facts, report, stop)
    model.eval()
    facts.weights_hash, began = measure.weights_hash(model), time.perf_counter()
    metrics = list(runner.report(model))
    if hasattr(runner, "details"):
        facts.details = {**facts.details, **plain(runner.details(model))}
    if cell.checkpoint:
        facts.progress.train_s = time.perf_counter() - began
        if cell.device == "cuda":
            facts.peak_bytes = int(torch.cuda.max_memory_allocated())
    elif registry.protocol(cell.suite).saves_weights:
        _save_weights(cell, model, folder, facts)
    for name, weights in further.items():
        model.load_state_dict(weights)
        metrics += [dataclasses.replace(metric, split=f"{metric.split}_{name}") for metric in runner.report(model)]
    return metrics


def _train(
    cell: Cell, model: Backbone, folder: CellFolder, facts: Facts, report: Callable[[int, int, str], None], stop: Callable[[], bool]
) -> Mapping[str, Mapping[str, Any]]:
    """Train the model; what other weights than the last ones are to be measured, by name."""
    assert facts.runner is not None
    assert facts.description is not None
    trainer = Trainer(model, facts.runner, cell.train, folder, cell.device, cell.dtype)
    trainer.peak_tokens_per_s = measure.peak_rate(facts.description.train_flops_per_token, cell.device, distributed.current().size)
    try:
        with mirrored(facts.track, folder) as trainer.mirror, in_its_own_time():
            trainer.fit(report, stop)
    finally:
        facts.progress, facts.training_step = trainer.at, trainer.steps.mode
        if cell.device == "cuda":
            facts.peak_bytes = int(torch.cuda.max_memory_allocated())
    return trainer.further_weights()


def _save_weights(cell: Cell, model: nn.Module, folder: CellFolder, facts: Facts) -> None:
    """Keep the trained model, with what it was and what it learned from; the other processes of the cell wait for that."""
    if folder.writes:
        checkpoints: Any = importlib.import_module("hgrn2_bench.checkpoints")
        tokens = runner_class(cell).shape(cell).tokens(facts.progress.step)
        card = checkpoints.Card(cell.model_ref, cell.settings, getattr(facts.runner, "card", {}), tokens)
        checkpoints.save(model, card, folder.weights, getattr(facts.runner, "vocabulary", None))
    distributed.gathered(None)


def _measure(cell: Cell, model: nn.Module, runner: Any, facts: Facts) -> list[Metric]:
    """Time the model, and leave what a training run would have left."""
    began = time.perf_counter()
    try:
        with timing.alone(cell.device):
            found: Measured = runner.measure(model)
    finally:
        if cell.device == "cuda":
            facts.peak_bytes = int(torch.cuda.max_memory_allocated())
    at = facts.progress
    at.train_s, at.warm_s, facts.details = time.perf_counter() - began, found.compile_s, plain(found.details)
    at.step_times = [] if found.median_s is None else [found.median_s]
    at.token_rates = [] if found.tokens_per_s is None else [found.tokens_per_s]
    return list(found.metrics)


def make_rows(cell: Cell, metrics: Sequence[Metric], status: str, reason: str, facts: Facts) -> list[Row]:
    """One row per metric; for a cell without metrics one row of the primary metric without a value."""
    protocol = registry.protocol(cell.suite)
    shared = _shared_fields(cell, facts) | {"status": status, "reason": reason, "unit": protocol.unit}
    shared["higher_is_better"] = protocol.higher_is_better
    if not metrics:
        return [Row(**shared, split="test", metric=protocol.metric, value=None, num_items=0, floors={})]
    return [_row(shared, metric) for metric in metrics]


def _row(shared: Mapping[str, Any], metric: Metric) -> Row:
    """One metric's row; its own unit and direction win over the protocol's."""
    own: dict[str, Any] = {"unit": metric.unit} if metric.unit else {}
    if metric.higher_is_better is not None:
        own["higher_is_better"] = metric.higher_is_better
    values = {"split": metric.split, "metric": metric.name, "value": metric.value, "num_items": metric.num_items}
    return Row(**{**shared, **own, **values, "floors": dict(metric.floors), "card": dict(metric.card)})


def _effective(cell: Cell, facts: Facts) -> dict[str, Any]:
    """What was built; on a GPU also how its steps ran, and whether float32 products may have been rounded to TF32."""
    built = dict(facts.description.effective) if facts.description else {}
    if cell.device == "cuda":
        built |= {"training_step": facts.training_step, "float32_matmul": torch.get_float32_matmul_precision()}
        built |= {"kernel_tuning": thoroughness()} if cell.backend == "fla" else {}
    if distributed.current().size > 1:
        built["parallel"] = cell.train.parallel
    return built


def _details(facts: Facts) -> dict[str, Any]:
    """How the numbers came about; of a training run only that the number of processes changed on the way."""
    processes = facts.progress.processes
    return dict(facts.details) | ({"processes": ", then ".join(map(str, processes))} if len(processes) > 1 else {})


def _shared_fields(cell: Cell, facts: Facts) -> dict[str, Any]:
    """The fields that all rows of a cell have in common."""
    description, runner, at = facts.description, facts.runner, facts.progress
    step_s = statistics.median(at.step_times) if at.step_times else None
    shape = runner_class(cell).shape(cell)
    commit, dirty = provenance.commit()
    same = ("suite", "protocol_version", "preset", "task", "model", "mixer_version", "seed", "device", "backend", "dtype")
    return {name: getattr(cell, name) for name in same} | {
        "command": cell.command,
        "processes": max(cell.processes, distributed.current().size),
        "settings": plain(cell.fields()),
        "effective": _effective(cell, facts),
        "parameters": description.parameters if description else None,
        "non_embedding_parameters": description.non_embedding_parameters if description else None,
        "state_bytes": description.state_bytes if description else None,
        "train_flops_per_token": description.train_flops_per_token if description else None,
        "steps": at.step,
        "tokens": shape.tokens(at.step),
        "wall_s": round(at.train_s, 3),
        "compile_s": round(max(0.0, at.warm_s - at.warm_steps * (step_s or 0)), 3),
        "step_s": step_s,
        "tokens_per_s": statistics.median(at.token_rates) if at.token_rates else None,
        "peak_bytes": facts.peak_bytes,
        "device_name": provenance.device_name(cell.device),
        "threads": torch.get_num_threads(),
        "workers": facts.workers,
        "versions": provenance.versions(),
        "data_hash": runner.data_hash if runner else "",
        "truncated": runner.truncated if runner else 0,
        "skipped": runner.skipped if runner else 0,
        "weights_hash": facts.weights_hash,
        "details": _details(facts),
        "commit": commit,
        "dirty": dirty,
        "cell": cell.key,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
