"""The one training loop: AdamW, schedules, autocast, clipping, early stop, selection, exact resume.

Everything random in a step is a function of (seed, step): the runner gives batch number `step`, and torch's generators are part of
the checkpoint. So a run that was killed and continued has the same curve and the same weights as one that was not. Losses stay on the
device until they are logged, so that the host never waits for a step.
"""

import io
import json
import math
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hgrn2_bench.cells import CellFolder, replace_file
from hgrn2_bench.config import TrainConfig
from hgrn2_bench.interfaces import Mixer
from hgrn2_bench.steps import Batch, Steps

LOG_EVERY = 50
CHECKPOINT_EVERY_S = 15.0


class DivergedError(Exception):
    """The loss is no longer a finite number."""


class InterruptedTrainingError(Exception):
    """The user stopped the run; a checkpoint was written."""


class TrainableTask(Protocol):
    """What the loop asks of a suite's runner."""

    steps_per_epoch: int

    def batch(self, step: int) -> Batch:
        """Batch number `step` on the device, a pure function of (data, step); its tokens (B, T, ...) come first."""
        ...

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Mean loss of a batch: device work alone, nothing that waits for its result."""
        ...

    def score(self, model: Any, split: str) -> float:
        """What selection goes by on a split, larger is better: the primary metric, or its negative where lower is better."""
        ...


@dataclass
class Progress:
    """Where a run stands; all of it is in the checkpoint."""

    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    best: float = -math.inf
    score: float | None = None
    stopped: bool = False
    train_s: float = 0.0
    warm_s: float = 0.0
    """Seconds of steps that compile and tune kernels or capture a CUDA graph."""
    warm_steps: int = 0
    step_times: list[float] = field(default_factory=list)
    """Mean seconds of a step in each window of up to LOG_EVERY steps after these."""
    token_rates: list[float] = field(default_factory=list)
    """Tokens per second in each of these windows: where steps differ in length, no step's time stands for all."""


def make_optimizer(model: nn.Module, config: TrainConfig, device: str) -> torch.optim.AdamW:
    """AdamW with decay on matrices only, or on all parameters where the source does so (`decay_all`).

    A mixer's `no_weight_decay` names stay undecayed unless `decay_all` says otherwise; those in its `max_lr` form groups of their own,
    which learn at the share `lr_share` of the rate. On a GPU it is one fused kernel, and each group's learning rate a tensor, which a
    CUDA graph reads anew at each replay.
    """
    own = [(m, n, p) for m in model.modules() if isinstance(m, Mixer) for n, p in m.named_parameters()]
    exempt = {id(p) for m, n, p in own if n in m.no_weight_decay}
    shares = {id(p): m.max_lr[n] / max(config.lr, m.max_lr[n]) for m, n, p in own if n in m.max_lr}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for parameter in model.parameters():
        decays = config.decay_all or (parameter.ndim >= 2 and id(parameter) not in exempt)
        groups.setdefault((decays, shares.get(id(parameter), 1.0)), []).append(parameter)
    gpu = device == "cuda"
    described = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr": torch.tensor(config.lr * share, device=device) if gpu else config.lr * share,
            "lr_share": share,
        }
        for (decays, share), parameters in groups.items()
        if parameters
    ]
    return torch.optim.AdamW(described, fused=gpu, capturable=gpu)


def learning_rate(config: TrainConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """Learning rate of 0-based `step` of `steps`: linear warm-up, then cosine to 0 per step or per epoch, or constant.

    A cosine that ends before the last step rises again after its end, as transformers' `get_cosine_schedule_with_warmup` does.
    """
    warm = config.warmup_steps or round(config.warmup * steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    if config.schedule == "constant":
        return config.lr
    by_epoch = config.schedule == "cosine_epoch"
    share = step // steps_per_epoch / config.epochs if by_epoch else (step - warm) / max(1, (config.schedule_steps or steps) - warm)
    return config.lr * 0.5 * (1 + math.cos(math.pi * share))


class Trainer:
    """Trains one model on one task inside one cell folder."""

    def __init__(self, model: nn.Module, task: TrainableTask, config: TrainConfig, folder: CellFolder, device: str, dtype: str) -> None:
        self.model, self.task, self.config, self.folder, self.device = model, task, config, folder, device
        self.total = config.epochs * task.steps_per_epoch
        self.eval_every = config.eval_every or task.steps_per_epoch
        self.optimizer = make_optimizer(model, config, device)
        autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
        self.steps = Steps(model, self.optimizer, task.loss, autocast, config.clip, config.cuda_graph and device == "cuda")
        self.at = Progress()
        self.rate = config.lr
        self.pending: list[Tensor] = []
        self.window_tokens = 0
        self.window_began = 0.0
        self.best_weights: dict[str, Tensor] | None = None
        self.saved_at = time.monotonic()

    def fit(self, report: Callable[[int, int, str], None], stop: Callable[[], bool]) -> Progress:
        """Train to the end or to the early stop, from the checkpoint where there is one.

        `report(step, steps, text)` hears of progress; where `stop()` turns true the loop checkpoints and raises InterruptedTrainingError.
        Raises DivergedError at a loss that is not finite.
        """
        self._resume()
        began = time.perf_counter() - self.at.train_s
        self.model.train()
        self.window_began = time.perf_counter()
        while self.at.step < self.total and not self.at.stopped:
            self._step()
            at = self.at
            if at.step % self.eval_every == 0 or at.step == self.total:
                self._evaluate()
            if at.step % LOG_EVERY == 0 or at.step == self.total or at.stopped:
                self._log()
                report(at.step, self.total, "" if at.score is None else f"{self.config.select} {at.score:.3f}")
            at.train_s = time.perf_counter() - began
            if stop():
                self._save()
                raise InterruptedTrainingError
            if time.monotonic() - self.saved_at > CHECKPOINT_EVERY_S:
                self._save()
        if self.config.keep == "best" and self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        return self.at

    def _step(self) -> None:
        at = self.at
        self.rate = learning_rate(self.config, at.step, self.total, self.task.steps_per_epoch)
        batch = self.task.batch(at.step)
        warm = self.steps.warm(batch)
        if warm:
            self._settle()
        self.pending.append(self.steps(batch, self.rate))
        self.window_tokens += batch[0].shape[:2].numel()
        at.step += 1
        if warm:
            self._settle(warm=True)

    def _settle(self, warm: bool = False) -> None:
        """Wait for the device, and take in the losses and the time of the steps since the last call; `warm` ones measure no speed."""
        at, values = self.at, torch.stack(self.pending).tolist() if self.pending else []
        took = time.perf_counter() - self.window_began
        for step, value in enumerate(values, at.step - len(values) + 1):
            if not math.isfinite(value):
                at.step = step
                raise DivergedError(f"loss {value} at step {step} of {self.total}")
            at.loss_sum += value
            at.loss_count += 1
        if values and warm:
            at.warm_s += took
            at.warm_steps += len(values)
        elif values:
            at.step_times = [*at.step_times[-999:], took / len(values)]
            at.token_rates = [*at.token_rates[-999:], self.window_tokens / took]
        self.window_tokens = 0
        self.pending.clear()
        self.window_began = time.perf_counter()

    def _log(self) -> None:
        self._settle()
        at = self.at
        self._append({"step": at.step, "loss": at.loss_sum / at.loss_count, "lr": self.rate})
        at.loss_sum, at.loss_count = 0.0, 0

    def _evaluate(self) -> None:
        self._settle()
        at, config = self.at, self.config
        self.model.eval()
        at.score = self.task.score(self.model, config.select)
        self.model.train()
        self._append({"step": at.step, f"{config.select}_score": at.score})
        if at.score > at.best:
            at.best = at.score
            if config.keep != "last":
                self.best_weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        at.stopped = bool(config.stop_at) and at.score > config.stop_at
        self.window_began = time.perf_counter()

    def _append(self, record: dict[str, Any]) -> None:
        with self.folder.curve.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _save(self) -> None:
        """Write one file with everything that the next step depends on."""
        self._settle()
        buffer = io.BytesIO()
        content = {
            "progress": asdict(self.at),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best_weights,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.device == "cuda" else None,
            "threads": torch.get_num_threads(),
            "curve_bytes": self.folder.curve.stat().st_size if self.folder.curve.exists() else 0,
        }
        torch.save(content, buffer)
        replace_file(self.folder.checkpoint, buffer.getvalue())
        self.folder.set_status("running", step=self.at.step, steps=self.total)
        self.saved_at = time.monotonic()
        self.window_began = time.perf_counter()

    def _read_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint, or None where there is none that can be read: a damaged one is worth no more than none."""
        if not self.folder.checkpoint.exists():
            return None
        try:
            content: dict[str, Any] = torch.load(self.folder.checkpoint, map_location=self.device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
            print(f"note: {self.folder.checkpoint} is damaged ({type(error).__name__}): the cell starts again", file=sys.stderr)
            return None
        return content

    def _resume(self) -> None:
        """Continue from the checkpoint, and cut the curve back to where it was then; start from nothing without one."""
        content = self._read_checkpoint()
        if content is None:
            self.folder.curve.unlink(missing_ok=True)
            return
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.at = Progress(**content["progress"])
        self.best_weights = content["best"]
        torch.set_rng_state(content["rng"].cpu())
        if content["cuda_rng"] is not None:
            torch.cuda.set_rng_state(content["cuda_rng"].cpu())
        torch.set_num_threads(content["threads"])
        if self.folder.curve.exists():
            with self.folder.curve.open("r+b") as file:
                file.truncate(content["curve_bytes"])
