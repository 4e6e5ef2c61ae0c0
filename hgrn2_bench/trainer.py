"""The one training loop: AdamW, schedules, autocast, clipping, early stop, selection, exact resume.

Everything random in a step is a function of (seed, step): the runner gives batch number `step`, and torch's generators are part of
the checkpoint. So a run that was killed and continued has the same curve and the same weights as one that was not. Losses stay on the
device until they are logged, so that the host need not wait for a step.

Several processes (see `hgrn2_bench.distributed`) take the same steps together; what depends on the clock or on the user rank 0 decides.
"""

import io
import math
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hgrn2_bench import distributed, parallel
from hgrn2_bench.accumulation import PieceSteps, check_divisible
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.config import TrainConfig
from hgrn2_bench.ema import Average
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Mixer
from hgrn2_bench.steps import Batch, Steps
from hgrn2_bench.stopping import InterruptedTrainingError

LOG_EVERY = 50
CHECKPOINT_EVERY_S = 15.0
DECIDE_EVERY = 10
"""Steps after which several processes hear whether to save or to stop."""
GO_ON, SAVE, STOP = range(3)


class DivergedError(Exception):
    """The loss is no longer a finite number."""


class TrainableTask(Protocol):
    """What the loop asks of a suite's runner; `hgrn2_bench.accumulation.Divisible` is what splitting a batch takes beside it."""

    steps_per_epoch: int

    def batch(self, step: int) -> Batch:
        """Batch number `step` on the device, a pure function of (data, step).

        Its tokens (B, T, ...) come first; a task whose batches begin with anything else has a method `tokens(batch)` that counts them.
        """
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
    processes: list[int] = field(default_factory=list)
    """How many trained together, in turn: one number unless a run went on with another."""


def make_optimizer(model: nn.Module, config: TrainConfig, device: str) -> torch.optim.AdamW:
    """AdamW with decay on matrices only, or on all parameters where the source does so (`decay_all`).

    A mixer's `no_weight_decay` names stay undecayed unless `decay_all` says otherwise; those in its `max_lr` form groups of their own,
    which learn at the share `lr_share` of the rate. On a GPU it is one fused kernel, and each group's learning rate a tensor, which a
    CUDA graph reads anew at each replay (several processes record none).

    With `decay_all` it is what fairseq calls adam: there too weights decay by lr * weight_decay before the step. One thing differs. The
    step is lr m' / (sqrt(v') + eps) with m' = m / (1 - beta1^t) and v' = v / (1 - beta2^t); fairseq adds eps to sqrt(v) before it corrects
    v, so that its eps is 1 / sqrt(1 - beta2^t) times ours: 7 times in the first step with beta2 0.98, the same after some hundred.
    """
    own = [(m, n, p) for m in model.modules() if isinstance(m, Mixer) for n, p in m.named_parameters()]
    exempt = {id(p) for m, n, p in own if n in m.no_weight_decay}
    shares = {id(p): m.max_lr[n] / max(config.lr, m.max_lr[n]) for m, n, p in own if n in m.max_lr}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for parameter in model.parameters():
        decays = config.decay_all or (parameter.ndim >= 2 and id(parameter) not in exempt)
        groups.setdefault((decays, shares.get(id(parameter), 1.0)), []).append(parameter)
    gpu = device == "cuda"
    recorded = gpu and distributed.current().size == 1
    described = [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr": torch.tensor(config.lr * share, device=device) if recorded else config.lr * share,
            "lr_share": share,
        }
        for (decays, share), parameters in groups.items()
        if parameters
    ]
    return torch.optim.AdamW(described, betas=(config.beta1, config.beta2), fused=gpu, capturable=recorded)


def learning_rate(config: TrainConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """Learning rate of 0-based `step` of `steps`: linear warm-up, then cosine to 0 per step or per epoch, or constant; or `inverse_sqrt`.

    A cosine that ends before the last step rises again after its end, as transformers' `get_cosine_schedule_with_warmup` does.
    `cosine_timm` stands still within an epoch, as timm's scheduler does when stepped by epochs: from `warmup_from` at epoch 0 it rises to
    the full rate at the end of the warm-up, and then follows a cosine that began at epoch 0 to `lr_end` at the end of the last epoch.
    `inverse_sqrt` is fairseq's: it rises from `warmup_from` at step 0 to the full rate at step `warmup_steps`, and then falls with the root
    of the step's number.
    """
    warm = config.warmup_steps or round(config.warmup * steps)
    if config.schedule == "inverse_sqrt":
        rising = config.warmup_from + (config.lr - config.warmup_from) * step / warm
        return rising if step < warm else config.lr * math.sqrt(warm / step)
    if config.schedule == "cosine_timm":
        epoch, rise = step // steps_per_epoch, round(config.warmup * config.epochs)
        if epoch < rise:
            return config.warmup_from + (config.lr - config.warmup_from) * epoch / rise
        return config.lr_end + (config.lr - config.lr_end) * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
    if step < warm:
        return config.lr * (step + 1) / warm
    if config.schedule == "constant":
        return config.lr
    by_epoch = config.schedule == "cosine_epoch"
    share = step // steps_per_epoch / config.epochs if by_epoch else (step - warm) / max(1, (config.schedule_steps or steps) - warm)
    return config.lr * 0.5 * (1 + math.cos(math.pi * share))


class Trainer:
    """Trains one model on one task inside one cell folder.

    Of several processes each has a Trainer, and the model that each is given holds the trained weights after `fit`.
    """

    def __init__(self, model: nn.Module, task: TrainableTask, config: TrainConfig, folder: CellFolder, device: str, dtype: str) -> None:
        self.task, self.config, self.folder, self.device = task, config, folder, device
        self.world = distributed.current()
        self.total = config.steps(task.steps_per_epoch)
        self.eval_every = config.eval_every or task.steps_per_epoch
        self.trained = parallel.trained(model, task.loss, config, device)
        self.model = model
        self.optimizer = make_optimizer(self.trained.model, config, device)
        self.steps = self._make_steps(torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"))
        self.at = Progress()
        self.rate = config.lr
        self.pending: list[Tensor] = []
        self.window_tokens = 0
        self.window_began = 0.0
        self.logged_tokens, self.logged_s = 0, 0.0
        """Of the steps since the last record of the curve, those left out that measure no speed."""
        self.best_weights: dict[str, Tensor] | None = None
        self.average = Average(model, config.ema) if config.ema else None
        self.tokens_of: Callable[[Batch], int] = getattr(task, "tokens", lambda batch: batch[0].shape[:2].numel())
        self.saved_at = time.monotonic()
        self.peak_tokens_per_s: float | None = None
        """Tokens per second at which the devices' peak would be reached, for the curve."""
        self.mirror: Callable[[dict[str, Any]], None] = lambda record: None
        """Hears every record of the curve."""

    def _make_steps(self, autocast: torch.autocast) -> Steps:
        config, alone = self.config, self.world.size == 1
        graph = config.cuda_graph and self.device == "cuda" and alone
        shared = (self.trained.model, self.optimizer, self.trained.loss, autocast, config.clip, graph)
        if alone and not config.micro_batch:
            return Steps(*shared)
        why = f"micro_batch={config.micro_batch}" if alone else f"{self.world.size} processes"
        task: Any = self.task
        check_divisible(task, self.model, why)
        return PieceSteps(task, config.micro_batch, self.world, self.trained.sync, *shared)

    def fit(self, report: Callable[[int, int, str], None], stop: Callable[[], bool]) -> Progress:
        """Train to the end or to the early stop, from the checkpoint where there is one.

        `report(step, steps, text)` hears of progress; where `stop()` turns true the loop checkpoints and raises InterruptedTrainingError.
        Raises DivergedError at a loss that is not finite.
        """
        self._resume()
        began = time.perf_counter() - self.at.train_s
        self.trained.model.train()
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
            decision = self._decide(stop)
            if decision != GO_ON:
                self._save()
            if decision == STOP:
                raise InterruptedTrainingError
        self.trained.evaluated()
        if self.config.keep == "best" and self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        return self.at

    def further_weights(self) -> dict[str, dict[str, Tensor]]:
        """Weights to measure beside the last ones: the best ones with `keep=both`, and the average where there is one."""
        best = {} if self.config.keep != "both" or self.best_weights is None else {"best": self.best_weights}
        return best if self.average is None else {**best, "ema": self.average.tensors}

    def _decide(self, stop: Callable[[], bool]) -> int:
        """Whether to save or to stop now: what the clock and the user say on rank 0."""
        if self.world.size > 1 and self.at.step % DECIDE_EVERY:
            return GO_ON
        late = time.monotonic() - self.saved_at > CHECKPOINT_EVERY_S
        return round(distributed.from_first(STOP if stop() else SAVE if late else GO_ON))

    def _step(self) -> None:
        at = self.at
        self.rate = learning_rate(self.config, at.step, self.total, self.task.steps_per_epoch)
        batch = self.task.batch(at.step)
        warm = self.steps.warm(batch)
        if warm:
            self._settle()
        self.pending.append(self.steps(batch, self.rate))
        if self.average is not None:
            self.average.update()
        self.window_tokens += self.tokens_of(batch)
        at.step += 1
        if warm:
            self._settle(warm=True)

    def _settle(self, warm: bool = False) -> None:
        """Wait for the device, and take in the losses and the time of the steps since the last call; `warm` ones measure no speed."""
        at, values = self.at, distributed.summed(torch.stack(self.pending)).tolist() if self.pending else []
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
            self.logged_tokens, self.logged_s = self.logged_tokens + self.window_tokens, self.logged_s + took
        self.window_tokens = 0
        self.pending.clear()
        self.window_began = time.perf_counter()

    def _log(self) -> None:
        """One record: mean loss since the last one, and of the last step its rate and the norm of its gradient before clipping."""
        self._settle()
        at, norm = self.at, self.steps.gradient_norm()
        record: dict[str, Any] = {
            "step": at.step,
            "loss": at.loss_sum / at.loss_count,
            "lr": self.rate,
            "grad_norm": norm if math.isfinite(norm) else None,
        }
        if self.logged_s:
            record["tokens_per_s"] = self.logged_tokens / self.logged_s
            if self.peak_tokens_per_s:
                record["mfu"] = record["tokens_per_s"] / self.peak_tokens_per_s
        self._append(record)
        at.loss_sum, at.loss_count = 0.0, 0
        self.logged_tokens, self.logged_s = 0, 0.0

    def _evaluate(self) -> None:
        self._settle()
        at, config = self.at, self.config
        model = self.trained.evaluated()
        model.eval()
        at.score = distributed.from_first(self.task.score(model, config.select))
        self._append({"step": at.step, f"{config.select}_score": at.score})
        if at.score > at.best:
            at.best = at.score
            if config.keep != "last":
                self.best_weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.trained.rest()
        self.trained.model.train()
        at.stopped = bool(config.stop_at) and at.score > config.stop_at
        self.window_began = time.perf_counter()

    def _append(self, record: dict[str, Any]) -> None:
        self.folder.add_to_curve(record)
        self.mirror(record)

    def _save(self) -> None:
        """Write one file with everything that the next step depends on."""
        self._settle()
        state = parallel.state_of(self.trained.model, self.optimizer)
        first, *others = distributed.gathered(self._generators())
        content = {
            **state,
            "progress": asdict(self.at),
            "best": self.best_weights,
            "ema": None if self.average is None else self.average.tensors,
            "rng": first[0],
            "cuda_rng": first[1],
            "other_rngs": others,
            "threads": torch.get_num_threads(),
            "curve_bytes": self.folder.curve.stat().st_size if self.folder.curve.exists() else 0,
        }
        if self.folder.writes:
            buffer = io.BytesIO()
            torch.save(content, buffer)
            self.folder.write(self.folder.checkpoint.name, buffer.getvalue())
        self.folder.set_status("running", step=self.at.step, steps=self.total)
        self.saved_at = time.monotonic()
        self.window_began = time.perf_counter()

    def _generators(self) -> tuple[Tensor, Tensor | None]:
        """The states of this process's random generators."""
        return torch.get_rng_state(), torch.cuda.get_rng_state() if self.device == "cuda" else None

    def _read_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint, or None where there is none that can be read: a damaged one is worth no more than none."""
        if not self.folder.checkpoint.exists():
            return None
        try:
            where = self.device if self.world.size == 1 else "cpu"  # whose memory holds what one process of several need not
            content: dict[str, Any] = torch.load(self.folder.checkpoint, map_location=where, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
            print(f"note: {self.folder.checkpoint} is damaged ({type(error).__name__}): the cell starts again", file=sys.stderr)
            return None
        return content

    def _resume(self) -> None:
        """Continue from the checkpoint, and cut the curve back to where it was then; start from nothing without one."""
        content = self._read_checkpoint()
        self._check_together(0 if content is None else content["progress"]["step"])
        if content is None:
            self.folder.cut_curve(0)
        else:
            parallel.load_state(self.trained.model, self.optimizer, content)
            self.at = Progress(**content["progress"])
            self.best_weights = content["best"]
            if self.average is not None:
                self.average.load(content["ema"])
            self._set_generators([(content["rng"], content["cuda_rng"]), *content.get("other_rngs", [])])
            torch.set_num_threads(content["threads"])
            self.folder.cut_curve(content["curve_bytes"])
        if self.at.processes[-1:] != [self.world.size]:
            self.at.processes = [*self.at.processes, self.world.size]

    def _check_together(self, step: int) -> None:
        """ConfigError where the processes would not start from the same step."""
        if len(set(distributed.gathered(step))) > 1:
            raise ConfigError("the processes found different checkpoints: the results folder must be one that all hosts share")

    def _set_generators(self, saved: list[tuple[Tensor, Tensor | None]]) -> None:
        """Go on with the random numbers of this process; one that was not there before keeps its own seed."""
        if self.world.rank < len(saved):
            cpu, cuda = saved[self.world.rank]
            torch.set_rng_state(cpu.cpu())
            if cuda is not None:
                torch.cuda.set_rng_state(cuda.cpu())
