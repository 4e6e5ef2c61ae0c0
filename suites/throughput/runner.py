"""Times one throughput cell: its correctness first, then its work, then what the numbers mean.

Shape letters: B sequences, T time, D width, V vocabulary.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hgrn2_bench import measure, numerics, provenance, registry, timing
from hgrn2_bench.decoding import Decoder
from hgrn2_bench.engine import Measured, Shape, SkippedError, itemsize
from hgrn2_bench.interfaces import Context, Mixer
from hgrn2_bench.model import SequenceModel
from hgrn2_bench.ops import families
from hgrn2_bench.plan import Cell
from hgrn2_bench.protocol import Metric
from hgrn2_bench.steps import EAGER_STEPS, Batch, Steps
from hgrn2_bench.timing import Call, Timing
from hgrn2_bench.trainer import make_optimizer
from suites.throughput.protocol import ThroughputConfig

Given = TypeVar("Given")

GATE_TOKENS = 200
"""Tokens of the sequence on which the kernel is compared with `reference` before it is timed."""
BACKWARD = 3.0
"""Work of forward and backward in units of the forward pass: each product has two gradients."""
OPTIMIZER_PASSES = 9
"""AdamW reads weight, gradient and two moments and writes three of them; the pass before it wrote gradients and read weights."""
LEARNING_RATE = 1e-6
CHUNK = 64
"""Tokens of a chunk in fla's kernels of these families."""
SPAN = 256
"""Tokens that are decoded again and again."""


def detached(inputs: families.OpInputs) -> families.OpInputs:
    """The inputs of one recurrence without their history, each a tensor of its own unless it is broadcast."""
    own = {name: x.detach() if 0 in x.stride() else x.detach().contiguous() for name, x in numerics.tensors(inputs).items()}
    return replace(inputs, **own)  # type: ignore[type-var]


def chunk_extra(inputs: families.OpInputs) -> float:
    """Operations per token that chunks of CHUNK tokens add to a matrix recurrence; 0 for a family that is not computed in chunks.

    Inside a chunk each token meets (CHUNK + 1) / 2 others: 2 (K + V) operations each for scores and outputs. The delta rule has also the
    products of the keys, and the solved keys and values, 2 (2 K + V) each, and reads the state once more, 2 K V.
    """
    if not isinstance(inputs, families.DecayInputs | families.ScalarDecayInputs | families.DeltaInputs):
        return 0.0
    (H, K), V = inputs.k_BTHK.shape[-2:], inputs.v_BTHV.shape[-1]
    delta = isinstance(inputs, families.DeltaInputs)
    return H * ((CHUNK + 1) * (K + V + (2 * K + V) * delta) + 2 * K * V * delta)


class Runner:
    """One cell of throughput; see `hgrn2_bench.engine.Stopwatch`."""

    truncated = 0
    skipped = 0
    data_hash = ""  # inputs are standard normal numbers and random tokens of the cell's seed

    def __init__(self, cell: Cell) -> None:
        self.cell, self.device = cell, cell.device
        self.config: ThroughputConfig = cell.data
        self.dtype = torch.bfloat16 if cell.dtype == "bfloat16" else torch.float32
        self.generator = torch.Generator(cell.device).manual_seed(cell.seed)
        self.mode: Callable[[], str] = lambda: "eager"
        self.cold_s, self.cold_calls = 0.0, 0
        self.chunk_extra: float | None = None
        self.card: dict[str, str] = {}

    @staticmethod
    def shape(cell: Cell) -> Shape:
        """One batch."""
        config: ThroughputConfig = cell.data
        tokens = config.sequences * config.seq_len
        has_labels = config.kind in ("train", "prefill", "decode")
        return Shape(config.seq_len, labels_per_token=float(has_labels), steps_per_epoch=1, tokens_per_epoch=tokens, step_tokens=tokens)

    @staticmethod
    def build(cell: Cell) -> SequenceModel:
        """The model of a cell, made where it runs, since a billion numbers take the CPU a minute; op and layer use its first mixer."""
        config: ThroughputConfig = cell.data
        mixer = registry.load(cell.model_ref)
        with torch.device(cell.device):
            return SequenceModel(cell.model_config, mixer, cell.settings, cell.backend, config.vocab_size, config.seq_len + 1)

    def measure(self, model: SequenceModel) -> Measured:
        """Check and time; `timing.MeasuringFaultError` for what the device cannot have done."""
        error, worst = self._gate(model)
        details: dict[str, Any] = {"relative_error": error, "worst": worst}
        kind = self.config.kind
        if kind != "memory":
            timing.ceilings(self.device, self.dtype)  # now: while the work holds its memory there may be none left for them
        if kind in ("decode", "memory"):
            return self._decoding(model, details)
        tokens = self.config.sequences * self.config.seq_len
        calls, flops, nbytes = self._work(model)
        timed = self._timed(calls)
        rate = tokens / timed.median
        details |= {"inputs": len(calls), "mode": self.mode()} | self._account(timed, flops, nbytes)
        details |= {"chunk_extra": self.chunk_extra} if self.chunk_extra else {}
        metrics = [
            Metric("test", "tokens_per_s", rate, timed.calls),
            Metric("test", "latency", timed.median, timed.calls, unit="s", higher_is_better=False),
            *self._peak(),
        ]
        return Measured(metrics, timed.median, self._compile_s(timed), rate, details)

    def rehearse(self, model: SequenceModel) -> None:
        """Launch everything that `measure` times; where there is nothing to time, nothing."""
        with contextlib.suppress(SkippedError):
            self._gate(model)
            if self.config.kind in ("decode", "memory"):
                self._decoder(model)[1]()
            else:
                self._work(model)

    def _work(self, model: SequenceModel) -> tuple[Sequence[Call], float | None, int]:
        """The calls to time, called once so that kernels are compiled; and operations and bytes of each."""
        kind = self.config.kind
        work: dict[str, Callable[[SequenceModel], tuple[Sequence[Call], float | None, int]]]
        work = {"op": self._op, "layer": self._layer, "train": self._train, "prefill": self._prefill}
        calls, flops, nbytes = work[kind](model)
        if kind != "train":
            self._cold(calls[0], 1)
        return calls, flops, nbytes

    def _timed(self, calls: Sequence[Call]) -> Timing:
        """Time calls that have run before: from here on the peak is theirs, and not that of the check or of kernels that tune."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        timed = timing.time_calls(calls, self.device, self.config.sample_s, self.config.warm_up_s)
        if self.device == "cuda":  # the card as it was under load
            self.card = provenance.gpu_state(str(torch.cuda.get_device_properties().uuid))
        return timed

    def _gate(self, model: SequenceModel) -> tuple[float | None, str]:
        """The largest relative error of the recurrences as this model feeds them, one of each kind of layer.

        SkippedError where the model has nothing that could be timed under its name.
        """
        if self.device == "cuda" and any(mixer.family and "fla" not in mixer.backends for mixer in model.mixers):
            raise SkippedError(f"{self.cell.model} has no Triton kernel here: plain PyTorch's speed would say nothing about it")
        if self.config.kind in ("op", "layer") and any(mixer.label for mixer in model.mixers):
            raise SkippedError(f"the layers of {self.cell.model} differ here: time each part as a model, or train, prefill and decode")
        first = {mixer.label: mixer for mixer in reversed(model.mixers) if mixer.family}
        found = [self._checked(model, mixer) for mixer in first.values()]
        return max(found) if found else (None, "")

    def _checked(self, model: SequenceModel, mixer: Mixer) -> tuple[float, str]:
        """The relative error of one recurrence; ValueError where it is too large to be the same function.

        Without the skip term, beside which an error of the kernel may be small.
        """
        inputs, token = (self._projected(model, mixer, 1, T) for T in (min(self.config.seq_len, GATE_TOKENS), 1))
        trains = self.config.kind == "train" or (self.config.kind in ("op", "layer") and self.config.passes == "training")
        self._cold(lambda: numerics.results(inputs, self.cell.backend, trains), 1)
        error, worst = numerics.relative_error(inputs, self.cell.backend, trains)
        if self.config.kind == "decode":
            error, worst = max((error, worst), (numerics.token_error(inputs, token, self.cell.backend), "a single token's o"))
        limit = numerics.TOLERANCES[self.dtype]
        if not error <= limit:
            raise ValueError(f"not timed: {worst} of the recurrence is off by {error:.2g} (at most {limit:g}) from reference")
        return error, worst

    def _projected(self, model: SequenceModel, mixer: Mixer, B: int, T: int) -> families.OpInputs:
        """The inputs of one recurrence on random tokens, without the skip term, which is no part of it."""
        with self._autocast(), torch.no_grad():
            inputs = mixer.project(self._random(B, T, model.config.d_model), Context(shared=model.shared()))
        return replace(detached(inputs), skip=None)  # type: ignore[type-var, no-any-return]

    def _op(self, model: SequenceModel) -> tuple[Sequence[Call], float | None, int]:
        mixer = model.mixers[0]
        if not mixer.family:
            raise SkippedError(f"{self.cell.model} has no recurrence: time its layer")
        shape = self.config.sequences, self.config.seq_len
        first = self._projected(model, mixer, *shape)
        nbytes = timing.tensor_bytes(*numerics.tensors(first).values())
        more = range(timing.copies_beyond_cache(nbytes, self.device) - 1)
        sets = [first, *(self._projected(model, mixer, *shape) for _ in more)]
        with torch.no_grad():
            o_bytes = self._cold(lambda: families.run(first, self.cell.backend)[0], 1).nbytes
        flops = mixer.op_flops(self.config.seq_len)
        tokens = self.config.sequences * self.config.seq_len
        self.chunk_extra = flops and chunk_extra(first) / flops
        if self.config.passes == "forward":
            return [self._op_forward(inputs) for inputs in sets], flops and flops * tokens, nbytes + o_bytes
        # forward, then: inputs and the output's gradient read, the inputs' gradients written
        return [self._op_training(inputs) for inputs in sets], flops and BACKWARD * flops * tokens, 3 * nbytes + 2 * o_bytes

    def _op_forward(self, inputs: families.OpInputs) -> Call:
        def call() -> object:
            with torch.no_grad():
                return families.run(inputs, self.cell.backend)

        return call

    def _op_training(self, inputs: families.OpInputs) -> Call:
        given = {name: x.requires_grad_() for name, x in numerics.tensors(inputs).items()}
        inputs = replace(inputs, **given)  # type: ignore[type-var]
        o, _ = families.run(inputs, self.cell.backend)
        do = torch.randn_like(o)

        def call() -> object:
            o, _ = families.run(inputs, self.cell.backend)
            return torch.autograd.grad(o, list(given.values()), do, allow_unused=True)

        return call

    def _layer(self, model: SequenceModel) -> tuple[Sequence[Call], float | None, int]:
        mixer = model.mixers[0]
        flops = self._layer_flops(mixer)
        self._compile(mixer)
        shape = (self.config.sequences, self.config.seq_len, model.config.d_model)
        shared = {name: x.detach() for name, x in model.shared().items()}
        training = self.config.passes == "training"
        nbytes = 2 * math.prod(shape) * itemsize(self.cell)
        xs = [self._random(*shape).requires_grad_(training) for _ in range(timing.copies_beyond_cache(nbytes, self.device))]
        do, weights = self._random(*shape).to(self.dtype), list(mixer.parameters())

        def forward(x_BTD: Tensor) -> Tensor:
            with self._autocast(), torch.set_grad_enabled(training):
                y_BTD: Tensor = mixer(x_BTD, Context(shared=shared))
            return y_BTD

        def both(x_BTD: Tensor) -> object:
            y_BTD = forward(x_BTD)
            return torch.autograd.grad(y_BTD, [x_BTD, *weights], do.to(y_BTD.dtype), allow_unused=True)

        each = BACKWARD if training else 1.0
        calls = [functools.partial(both if training else forward, x) for x in xs]
        # forward: input and weights read, output written; backward: those two and the output's gradient read, two gradients written
        moved = nbytes * (2.5 if training else 1.0) + each * sum(p.nbytes for p in weights)
        return calls, flops and each * flops * shape[0] * shape[1], round(moved)

    def _layer_flops(self, mixer: Mixer) -> float | None:
        """Forward operations per token: 2 for each weight of a matrix, and the recurrence."""
        own = mixer.op_flops(self.config.seq_len)
        return None if own is None else 2.0 * measure.matrix_weights(mixer) + own

    def _train(self, model: SequenceModel) -> tuple[Sequence[Call], float | None, int]:
        B, T = self.config.sequences, self.config.seq_len
        self._compile(model)
        optimizer = make_optimizer(model.train(), self.cell.train, self.device)
        graph = self.config.graph and self.device == "cuda"
        steps = Steps(model, optimizer, lambda model, batch: model.loss(*batch), self._autocast(), self.cell.train.clip, graph)
        tokens = self._tokens(B, T + 1)
        where = torch.arange(B * T, device=self.device)
        batch: Batch = (tokens[:, :-1].contiguous(), where, tokens[:, 1:].flatten())
        self._cold(lambda: steps(batch, LEARNING_RATE), EAGER_STEPS if graph else 1)  # the capture is left: a replay has no peak to see
        self.mode = lambda: steps.mode
        flops = measure.train_flops_per_token(model, T)
        moved = sum(p.nbytes for p in model.parameters()) * OPTIMIZER_PASSES
        return [lambda: steps(batch, LEARNING_RATE)], flops and flops * B * T, moved

    def _prefill(self, model: SequenceModel) -> tuple[Sequence[Call], float | None, int]:
        B, T = self.config.sequences, self.config.seq_len
        self._compile(model)
        model = model.to(self.dtype).eval()
        tokens_BT, last = self._tokens(B, T), torch.arange(1, B + 1, device=self.device) * T - 1
        flops = measure.train_flops_per_token(model, T, labels_per_token=1 / T)

        def call() -> object:
            with torch.no_grad():
                return model.logits(tokens_BT, last)

        return [call], flops and flops / 3 * B * T, sum(p.nbytes for p in model.parameters())

    def _decoder(self, model: SequenceModel) -> tuple[Decoder, Call]:
        """A decoder that holds a prompt, in weights and activations of the cell's dtype, and the call that takes it one token on.

        The last SPAN tokens up to number `seq_len`, or half of them, are decoded again and again: so a cache is full, and no longer than
        the context asked for.
        """
        config, B = self.config, self.config.batch
        decoder = Decoder(model.to(self.dtype).eval(), B, config.seq_len, config.graph and self.device == "cuda")
        start = max(1, config.seq_len - min(SPAN, config.seq_len // 2))
        decoder.prefill(self._tokens(B, start))
        tokens_B = self._tokens(B, 1)[:, 0]

        def call() -> object:
            if decoder.length == config.seq_len:
                decoder.length = start
                decoder.position.fill_(start)
            return decoder.step(tokens_B)

        return decoder, call

    def _decoding(self, model: SequenceModel, details: dict[str, Any]) -> Measured:
        """The time of one more token for each sequence, and what is held for it."""
        config, B = self.config, self.config.batch
        decoder, call = self._decoder(model)
        held = Metric("test", "state", float(decoder.state_bytes), B, unit="bytes", higher_is_better=False)
        details |= {"kernel": decoder.kernel.replace(f" {decoder.bucket} ", " all "), "bucket": decoder.bucket}
        if config.kind == "memory":
            call()
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                decoder.prefill(self._tokens(B, config.seq_len))  # again, now that no kernel tunes
            return Measured([held, *self._peak()], None, 0.0, None, details)
        self._cold(call, max(1, decoder.warm_steps - 1))
        timed = self._timed([call])
        weights = sum(p.nbytes for part in (model.blocks, model.head) for p in part.parameters())
        flops = measure.train_flops_per_token(model, 2 * config.seq_len - 1)  # attention counts the mean context: here all of it
        moved = weights + decoder.state_bytes * (1 if decoder.bucket else 2)  # a cache is read; a recurrent state is written too
        details |= {"mode": decoder.mode} | self._account(timed, flops and flops / 3 * B, moved)
        rate = B / timed.median
        metrics = [
            Metric("test", "tokens_per_s", rate, timed.calls),
            Metric("test", "latency", timed.median, timed.calls, unit="s", higher_is_better=False),
            held,
            *self._peak(),
        ]
        return Measured(metrics, timed.median, self._compile_s(timed), rate, details)

    def _cold(self, call: Callable[[], Given], times: int) -> Given:
        """Calls before the timed ones, which compile and tune too; what the last of them gave."""
        began = time.perf_counter()
        for _ in range(times):
            given = call()
        timing.wait(self.device)
        self.cold_s += time.perf_counter() - began
        self.cold_calls += times
        return given

    def _compile(self, module: nn.Module) -> None:
        """Compile what is timed, if that is asked for, after dropping what torch keeps of earlier cells.

        They share their code: at the second size torch would make it a variable, and at the ninth cell give up and run eagerly.
        """
        if self.config.compile:
            torch.compiler.reset()
            module.compile()

    def _compile_s(self, timed: Timing) -> float:
        """Seconds of all first calls beyond usual ones."""
        return max(0.0, self.cold_s - self.cold_calls * timed.median)

    def _account(self, timed: Timing, flops: float | None, nbytes: int) -> dict[str, Any]:
        """How the number came about and how near it is to what the device can do."""
        top = timing.ceilings(self.device, self.dtype)
        if self.device == "cuda":
            timing.check_plausible(flops or 0.0, nbytes, timed.median, provenance.device_name("cuda"))
        share = None if flops is None else top.share(flops, nbytes, timed.median)
        return {
            "gpu": self.card,
            "seconds": [timed.low, timed.median, timed.high],
            "calls": timed.calls,
            "warm_up_calls": timed.warm_up,
            "steady": timed.steady,
            "flops": flops,
            "bytes": nbytes,
            "flops_per_s": flops and flops / timed.median,
            "bytes_per_s": nbytes / timed.median,
            "copy_ceiling": top.copy,
            "matmul_ceiling": top.matmul,
            "roofline": share,
            "above_ceiling": share is not None and share > 1.0,
        }

    def _peak(self) -> list[Metric]:
        """Peak bytes of torch's allocator; nothing on a CPU."""
        if self.device != "cuda":
            return []
        return [Metric("test", "peak", float(torch.cuda.max_memory_allocated()), 1, unit="bytes", higher_is_better=False)]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def _tokens(self, B: int, T: int) -> Tensor:
        return torch.randint(self.config.vocab_size, (B, T), generator=self.generator, device=self.device)
