"""Decoding, one token at a time: the one loop in which every model is timed, step by step or replayed as a CUDA graph.

All that a step reads and writes stays at one address: a token, a position and the states of the layers. Recurrent mixers give new states,
which are copied into place: one read and one write of the state beyond what the recurrence needs. Softmax attention writes into a cache
that is padded to a power of two and reads all of it.

Shape letters: B batch, T time, D width, V vocabulary.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from hgrn2_bench import measure
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerState
from hgrn2_bench.layers import for_a_graph
from hgrn2_bench.model import Block, SequenceModel
from hgrn2_bench.ops import cache
from hgrn2_bench.steps import EAGER_STEPS, NotCapturedError, capture


class Decoder:
    """Decodes `batch` sequences in step: `prefill` takes their prompts, each `step` one more token of each.

    `capacity` is the most tokens of one sequence, prompt and decoded. Activations have the model's dtype; or that of an autocast around the
    calls, the same for all of them: a step then casts every weight again. With `graph` the step after EAGER_STEPS eager ones is captured
    and replayed from then on, also after another prefill; `warm_steps` steps compile, tune and capture, and `mode` says what the others
    are. ValueError for a model in training mode, ConfigError for a capacity beyond its table of positions.
    """

    def __init__(self, model: SequenceModel, batch: int, capacity: int, graph: bool) -> None:
        if model.training:
            raise ValueError("decoding needs the model in eval mode: call model.eval() first")
        if min(batch, capacity) < 1:
            raise ValueError(f"batch={batch} and capacity={capacity} must be at least 1")
        table = model.position_table()
        if table is not None and len(table) < capacity:
            raise ConfigError(f"capacity={capacity} tokens, but positions={model.config.positions} knows only {len(table)}")
        self.model, self.batch, self.capacity = model, batch, capacity
        self.blocks = [block for block in model.blocks if isinstance(block, Block)]
        self.states: list[MixerState] = [{} for _ in self.blocks]
        self.stays = [in_place(block.mixer) for block in self.blocks]
        self.length = self.steps = 0
        with torch.no_grad():
            self.shared = model.shared()
        device = model.embedding.weight.device
        self.tokens_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.bucket = cache.bucket(capacity) if any(mixer.cached for mixer in model.mixers) else 0
        """Tokens that caches are padded to; 0 without a cache."""
        obstacle = self._obstacle() if graph else ""
        self.capturing = graph and not obstacle
        self.mode = f"eager; cannot be captured in a CUDA graph: {obstacle}" if obstacle else "eager"
        self.warm_steps = EAGER_STEPS + 1 if self.capturing else 1
        self.captured: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def _obstacle(self) -> str:
        """Why no step can be captured, known beforehand; empty if it may be."""
        for mixer, stays in zip(self.model.mixers, self.stays, strict=True):
            if not stays:
                return f"the state of {mixer.label or type(mixer).__name__} grows with every token"
        device = self.position.device
        return "" if device.type == "cuda" else f"the model is on {device.type}"

    @torch.no_grad()
    def prefill(self, tokens_BT: Tensor) -> Tensor:
        """Start over with these prompts: logits (B, V) after their last token. ValueError where they do not fit batch and capacity."""
        B, T = tokens_BT.shape
        if self.batch != B or not 1 <= T <= self.capacity:
            raise ValueError(f"a prompt of shape {(B, T)} does not fit batch={self.batch} and capacity={self.capacity}")
        carry: dict[str, Tensor] = {}
        tables: dict[str, Tensor] = {}
        with self._autocast():
            x_BTD = self.model.embed(tokens_BT)
            for layer, block in enumerate(self.blocks):
                ctx = Context(shared=self.shared, carry=carry, tables=tables, return_state=True)
                x_BTD = block(x_BTD, ctx)
                self._hold(layer, ctx.next_state)
            self.position.fill_(T)
            self.length = T
            logits_BV: Tensor = self.model.head(self.model.norm(x_BTD[:, -1]))
        return logits_BV

    @torch.no_grad()
    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits (B, V) of the position after these tokens. ValueError before the first prefill, and beyond `capacity`."""
        if not 0 < self.length < self.capacity:
            told = "call prefill first" if not self.length else f"capacity={self.capacity} tokens are reached"
            raise ValueError(f"no step can follow: {told}")
        self.tokens_B.copy_(tokens_B)
        if self.capturing and self.captured is None and self.steps >= EAGER_STEPS:
            self._capture()
        self.length, self.steps = self.length + 1, self.steps + 1
        if self.captured is None:
            return self._eager()
        graph, logits_BV = self.captured
        graph.replay()
        return logits_BV.clone()

    @property
    def state_bytes(self) -> int:
        """Bytes that the states of all B sequences take, a cache with its padding; 0 before the first prefill."""
        return sum(t.numel() * t.element_size() for state in self.states for tensors in state.values() for t in tensors)

    @property
    def kernel(self) -> str:
        """The implementation that runs the recurrence of one token; of each kind of layer where there are several."""
        first = {mixer.label: mixer for mixer in reversed(self.model.mixers)}
        with torch.no_grad(), self._autocast():
            names = {label: self._kernel(first[label]) for label in dict.fromkeys(mixer.label for mixer in self.model.mixers)}
        return next(iter(names.values())) if len(names) == 1 else "; ".join(f"{label}: {name}" for label, name in names.items())

    def _kernel(self, mixer: Mixer) -> str:
        if mixer.cached:
            return f"torch.scaled_dot_product_attention with a mask over {self.bucket} cached tokens"
        return measure.kernel(mixer.spec.backend, measure.sample_inputs(self.model, mixer, seq_len=1))

    def _autocast(self) -> AbstractContextManager:
        """The caller's autocast without its cache of cast weights: what a graph had read from there would be gone at the caller's end."""
        device = self.position.device.type
        if not torch.is_autocast_enabled(device):
            return nullcontext()
        return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)

    def _hold(self, layer: int, state: MixerState) -> None:
        """Keep a layer's state after the prompt: in buffers that stay where they are, unless it grows."""
        if not self.stays[layer]:
            self.states[layer] = state
            return
        held, cached = self.states[layer], self.blocks[layer].mixer.cached
        for name, tensors in state.items():
            if name not in held:
                if name in cached:
                    held[name] = tuple(t.new_zeros(t.shape[0], self.bucket, *t.shape[2:]) for t in tensors)
                else:
                    held[name] = tuple(torch.zeros_like(t) for t in tensors)  # also in their strides: a copy that transposes is slow
            for mine, given in zip(held[name], tensors, strict=True):
                mine[tuple(slice(size) for size in given.shape)].copy_(given)

    def _eager(self) -> Tensor:
        """One step from the buffers into the buffers; logits (B, V)."""
        table_PD, carry, tables = self.model.position_table(), dict[str, Tensor](), dict[str, Tensor]()
        with self._autocast(), for_a_graph(self.capturing):
            x_BD = self.model.embedded(self.tokens_B)
            if table_PD is not None:
                x_BD = x_BD + table_PD.index_select(0, self.position)
            for layer, block in enumerate(self.blocks):
                ctx = Context(shared=self.shared, carry=carry, tables=tables, state=self.states[layer])
                if self.stays[layer]:
                    ctx.position = self.position
                    x_BD = block.step_in_place(x_BD, ctx)
                else:
                    ctx.return_state = True
                    x_BD = block(x_BD[:, None], ctx)[:, 0]
                    self.states[layer] = ctx.next_state
            self.position.add_(1)
            logits_BV: Tensor = self.model.head(self.model.norm(x_BD))
        return logits_BV

    def _capture(self) -> None:
        """Record one step; a model that waits for the GPU inside it stays eager, and `mode` says so."""
        try:
            self.captured, self.mode = capture(self._eager), "CUDA graph"
        except NotCapturedError as error:
            self.capturing, self.mode = False, f"eager; cannot be captured in a CUDA graph: {error}"


def in_place(mixer: Mixer) -> bool:
    """Whether a mixer's state keeps its shapes while decoding, or is a cache that can be padded."""
    return bool(mixer.cached) or mixer.state_size(1) == mixer.state_size(2)
