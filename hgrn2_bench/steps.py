"""One optimiser step: forward, backward, clip, update; eager, or on a GPU as one CUDA graph.

Small models leave a big GPU waiting for launches: a step of an MQAR model is a few hundred kernels of microseconds each. Captured once
and replayed, it is one launch. The kernels and their order are those of the eager steps before it.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hgrn2_bench.errors import one_line
from hgrn2_bench.layers import for_a_graph

Batch = tuple[Tensor, ...]
Shapes = tuple[torch.Size, ...]

EAGER_STEPS = 3
"""Eager steps on one shape before its capture: kernels are compiled and tuned, the optimiser's state exists."""
MAX_SHAPES = 64
"""Where batches come in more shapes than these, no further one is captured: it would cost more than it saves."""


@dataclass(frozen=True)
class _Captured:
    """A recorded step: what it reads, and the loss and gradient norm that it leaves."""

    graph: torch.cuda.CUDAGraph
    inputs: Batch
    loss: Tensor
    norm: Tensor | None


class Steps:
    """Takes one optimiser step per call: `steps(batch, rate)` gives the batch's loss, a 0-d tensor left on its device.

    `batch_loss(model, batch)` is the suite's. With `graph` a shape seen EAGER_STEPS times is captured the next time. All graphs share one
    memory pool: nothing in it has to outlive a replay. `warm` says whether a batch still compiles, tunes or captures, `mode` what the
    steps after that are.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch_loss: Callable[[Any, Batch], Tensor],
        autocast: torch.autocast,
        clip: float,
        graph: bool,
    ) -> None:
        self.model, self.optimizer, self.batch_loss = model, optimizer, batch_loss
        self.autocast, self.clip = autocast, clip
        self.graph = self.capturing = graph  # kernels go by the first, whatever comes of a capture: a resumed run takes the same ones
        self.mode = "eager"
        self.norm: Tensor | None = None
        """Of the last step's gradient, before it was clipped; None after an eager step without clipping, which did not need it."""
        self.captured: dict[Shapes, _Captured] = {}
        self.seen: Counter[Shapes] = Counter()

    def warm(self, batch: Batch) -> bool:
        """Whether the step on this batch compiles, tunes or captures: an eager loop's first one does, and the first ones on each shape."""
        return _shapes(batch) not in self.captured if self._may_capture() else not self.seen

    def _may_capture(self) -> bool:
        return self.capturing and len(self.seen) <= MAX_SHAPES

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """Step on one batch at learning rate `rate`, or in a group with an `lr_share` at that share of it."""
        for group in self.optimizer.param_groups:
            own = rate * group.get("lr_share", 1.0)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(own)
            else:
                group["lr"] = own
        shapes = _shapes(batch)
        if self._may_capture() and shapes not in self.captured and self.seen[shapes] >= EAGER_STEPS:
            self._capture(batch, shapes)
        self.seen[shapes] += 1
        found = self.captured.get(shapes)
        if found is None:
            return self._eager(batch)
        for mine, given in zip(found.inputs, batch, strict=True):
            mine.copy_(given)
        found.graph.replay()
        self.norm = found.norm
        return found.loss.clone()

    def gradient_norm(self) -> float:
        """The norm of the last step's gradient before it was clipped; waits for the device.

        With clipping every step has computed it, and so has a CUDA graph, where it costs no launch; otherwise it is computed here, from
        the gradients that the last eager step has left.
        """
        return _plain(self._norm() if self.norm is None else self.norm).item()

    def _norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def gradient(self, batch: Batch) -> Tensor:
        """Leave the batch's gradient in the parameters, and return its loss."""
        with self.autocast:
            loss = self.batch_loss(self.model, batch)
        loss.backward()
        return loss.detach()

    def _eager(self, batch: Batch, capturing: bool = False) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with for_a_graph(self.graph):
            loss = self.gradient(batch)
        self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip) if self.clip else self._norm() if capturing else None
        self.optimizer.step()
        return loss

    def _capture(self, batch: Batch, shapes: Shapes) -> None:
        """Record one step without running it. A model that waits for the GPU inside its step cannot be recorded and stays eager."""
        inputs = tuple(t.clone() for t in batch)
        try:
            graph, loss = capture(lambda: self._eager(inputs, capturing=True), self._pool())
        except NotCapturedError as error:
            self.capturing = False
            kind = "CUDA graph for some shapes, eager for others" if self.captured else "eager"
            self.mode = f"{kind}; cannot be captured in a CUDA graph: {error}"
            return
        self.captured[shapes], self.mode = _Captured(graph, inputs, loss, self.norm), "CUDA graph"

    def _pool(self) -> Any:
        """The memory pool of the graphs so far; None before the first, which makes it."""
        return next((found.graph.pool() for found in self.captured.values()), None)


def _plain(tensor: Tensor) -> Tensor:
    """A tensor of which processes may hold shares, as a whole."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _shapes(batch: Batch) -> Shapes:
    return tuple(t.shape for t in batch)


def replayed(call: Callable[[], Tensor]) -> tuple[Callable[[], object], str]:
    """A call on fixed inputs as the replay of its CUDA graph, after its first eager runs; itself where it cannot be recorded. And which."""
    try:
        with for_a_graph():
            for _ in range(EAGER_STEPS):
                call()
            graph, left = capture(call)
    except NotCapturedError as error:
        return call, f"eager; cannot be captured in a CUDA graph: {error}"

    def replay(kept: object = (call, left)) -> None:  # what it reads and where it writes stay alive with it
        graph.replay()

    return replay, "CUDA graph"


class NotCapturedError(Exception):
    """A step waits for the GPU, or does something else that a CUDA graph cannot hold; the text says what."""


def capture(step: Callable[[], Tensor], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Record one step without running it: its graph, and the tensor in which each replay leaves what the step returns.

    With `pool` it takes its memory from that of another graph. NotCapturedError where it cannot be recorded; eager work goes on as before.
    Other threads may call CUDA meanwhile, as a loader's does that pins its batches; else their calls would fail, and the recording too.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            left = step()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # a failed capture keeps its own stream, and may keep the generator waiting for its end
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        reason = error.__context__ or error  # the end of a failed capture raises too, and says less
        raise NotCapturedError(one_line(reason)[:120]) from error
    return graph, left
