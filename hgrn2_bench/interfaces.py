"""The mixer contract: what a token mixer provides, and what it is given.

Shape letters: B batch, T time, D width. A mixer's own settings are annotated class attributes with literal defaults
(`expand_ratio: int = 128`); the registry reads them from the source text, so they need no import to be listed or checked.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hgrn2_bench import directions
from hgrn2_bench.config import heads_of as heads_of
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.ops import families

MixerState = dict[str, families.State]


@dataclass(frozen=True)
class MixerSpec:
    """What the protocol decides for a mixer: its place in the model, and the fields that every mixer shares."""

    d_model: int
    layer: int = 0
    num_layers: int = 1
    conv: int = 0
    """Width of the causal depthwise convolution on the projected streams; 0 for none."""
    forget_bias: float = 0.0
    """Added to the forget gate's logit at initialisation; 0 as published."""
    positions: str = "none"
    """`rope` is the mixer's business (softmax attention rotates its queries and keys); other kinds are added by the model."""
    backend: str = "chunked"
    settings: Mapping[str, Any] = field(default_factory=dict)
    max_len: int = 0
    """Tokens of the longest sequence; 0 where it is not known in advance."""
    first: int = 0
    """The first layer that has this mixer: 0 unless the layers differ."""
    scan: str = "causal"
    """The orders in which it reads, of `hgrn2_bench.directions`."""


@dataclass
class Context:
    """What one call carries besides the input: shared tensors, true lengths, an incoming state, and the state it leaves."""

    shared: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors of the whole model; `lower_bound` is (num_layers, D)."""
    carry: dict[str, Any] = field(default_factory=dict)
    """What a layer leaves for the layers after it, about the same tokens: one dictionary for all layers of one call."""
    tables: dict[str, Any] = field(default_factory=dict)
    """What depends on positions alone, and is the same in every layer: one dictionary for all layers of one call."""
    aside: dict[str, Tensor] = field(default_factory=dict)
    """What `project` leaves for `finish` of the same layer."""
    lengths_B: Tensor | None = None
    grid: tuple[int, int] | None = None
    """Height and width of the image that the tokens are, row by row; None for sequences."""
    state: MixerState | None = None
    position: Tensor | None = None
    """How many tokens came before, (1,), where the state's own length does not tell: in `step_in_place`."""
    return_state: bool = False
    next_state: MixerState = field(default_factory=dict)

    def table(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The table of this name, made by the first layer that asks for it."""
        if name not in self.tables:
            self.tables[name] = make()
        table: Tensor = self.tables[name]
        return table


class Mixer(nn.Module):
    """A token mixer: `forward(x) = readout(op(project(x)), x)`, (B, T, D) -> (B, T, D), causal unless `spec.scan` says otherwise.

    Subclasses set the class facts below, build their parameters in `__init__(spec)` after `super().__init__(spec)`,
    and write `project`, `readout`, `state_size` and `op_flops`.
    """

    version: ClassVar[int] = 1
    """Part of every cell's key: raise it when the numbers a mixer gives change."""
    gated: ClassVar[bool] = False
    """Has a data-dependent forget gate, so `forget_bias` applies."""
    bounded: ClassVar[bool] = False
    """Takes the learned lower bound of HGRN, so `lower_bound` applies."""
    rotary: ClassVar[bool] = False
    """Rotates queries and keys, so `positions=rope` applies."""
    convolved: ClassVar[bool] = True
    """Builds `spec.conv` on its streams; False for a mixer that is a convolution itself, to which `conv` does not apply."""
    family: ClassVar[str] = ""
    """The recurrence family it runs (`hgrn2_bench.ops.families`); empty for a mixer without one, which writes `recur` or `forward`."""
    backends: ClassVar[tuple[str, ...]] = ("reference", "chunked", "fla")
    """Implementations that its family has."""
    no_weight_decay: ClassVar[tuple[str, ...]] = ()
    """Names of own parameters that the optimiser must not decay."""
    position_free: ClassVar[bool] = False
    """Promises that `project`, short convolutions aside, gives a token the same wherever it stands (no shift, no rotation): other scans
    than the causal one then project once for all orders."""
    in_readout: ClassVar[tuple[str, ...]] = ("gate_proj", "out_proj")
    """Names of own modules that the read-out applies; `project` applies the others."""
    max_lr: ClassVar[Mapping[str, float]] = {}
    """Own parameters that learn at no more than this rate at the schedule's peak, and at the same share of the model's rate elsewhere."""
    label = ""
    """What tells this layer's mixer from other layers' of one model; empty where all layers are alike."""
    cached: ClassVar[tuple[str, ...]] = ()
    """Parts of the state that hold one row per token, (B, T, ...), and that its own `step_in_place` takes padded to a fixed T."""
    state_setting: ClassVar[str] = ""
    """The one setting, a number, that `match=state` changes to size the state; empty where none does."""

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__()
        self.spec = spec
        for name, value in spec.settings.items():
            if name not in type(self).setting_names():
                raise ConfigError(f"{type(self).__name__} has no setting {name!r}")
            setattr(self, name, value)
        rigid = type(self).forward is not Mixer.forward and not getattr(type(self), "parts", "")
        if spec.scan != "causal" and rigid:
            name = type(self).__name__
            raise ConfigError(f"{name} has a `forward` of its own, so it reads in one order only: give {name}.scan=causal")

    @classmethod
    def setting_names(cls) -> tuple[str, ...]:
        """The annotated class attributes of the mixer itself, ClassVars left out."""
        return tuple(n for n, a in vars(cls).get("__annotations__", {}).items() if "ClassVar" not in str(a))

    def init_forget_bias(self) -> None:
        """Put `spec.forget_bias` into the forget gate's bias: called at construction, and again by a model that has zeroed all biases."""

    def project(self, x_BTD: Tensor, ctx: Context) -> families.OpInputs:
        """Projections, local mixing, gates and activations: everything before the recurrence."""
        raise NotImplementedError(f"{type(self).__name__} has no project")

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """Norm, gate and output projection: everything after the recurrence."""
        raise NotImplementedError(f"{type(self).__name__} has no readout")

    def finish(self, o: Tensor, x_BTD: Tensor, ctx: Context) -> Tensor:
        """`readout`, for mixers whose norm or gate needs more than the input: they override this and read `ctx.aside`."""
        return self.readout(o, x_BTD)

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """Bytes that decoding holds for one sequence after `seq_len` tokens: states (4 bytes a number) and buffers (`itemsize`)."""
        raise NotImplementedError(f"{type(self).__name__} has no state_size")

    def op_flops(self, seq_len: int) -> float | None:
        """Forward floating-point operations per token of all that is no nn.Linear or nn.Conv1d, which core counts; None if unknown.

        The recurrence counts in its recurrent form, softmax attention at the mean context.
        """
        raise NotImplementedError(f"{type(self).__name__} has no op_flops")

    def effective(self) -> dict[str, Any]:
        """What was really built, for the row: heads, head dimension, scale, activations. Core adds kernel, dtypes and median decay."""
        return {}

    def forward(self, x_BTD: Tensor, ctx: Context | None = None) -> Tensor:
        """Mix one batch; with `ctx.return_state` the final state is left in `ctx.next_state`. ConfigError where `spec.scan` has none."""
        ctx = ctx or Context()
        if self.spec.scan != "causal":
            return directions.mix(self, x_BTD, ctx)
        return self.finish(directions.with_skip(*self.recur(x_BTD, ctx)), x_BTD, ctx)

    def recur(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """All before the read-out, in the order in which the tokens are given: the recurrence's output, and its skip term."""
        inputs = self.project(x_BTD, ctx)
        return self.run(inputs, ctx), inputs.skip

    def run(self, inputs: families.OpInputs, ctx: Context) -> Tensor:
        """The recurrence alone, without skip term; padding is made neutral."""
        if ctx.lengths_B is not None:
            inputs = inputs.masked(ctx.lengths_B)
        o, state = families.recur(inputs, self.spec.backend, ctx.state["op"] if ctx.state else None)
        if ctx.return_state:
            ctx.next_state["op"] = state
        return o

    def step(
        self,
        x_BD: Tensor,
        state: MixerState | None,
        shared: Mapping[str, Tensor] | None = None,
        carry: dict[str, Any] | None = None,
    ) -> tuple[Tensor, MixerState]:
        """Decode one token: (B, D) and the state so far (None at the start) to (B, D) and the next state.

        `carry` is one dictionary per token, handed to every layer in turn, as `Context.carry` is.
        """
        ctx = Context(shared=shared or {}, carry={} if carry is None else carry, state=state, return_state=True)
        return self.forward(x_BD[:, None], ctx)[:, 0], ctx.next_state

    def step_in_place(self, x_BD: Tensor, ctx: Context) -> Tensor:
        """Decode one token, (B, D) to (B, D), and write the next state into the tensors of `ctx.state`, which keep their addresses.

        A CUDA graph can hold it. What the state has in `cached` is padded: rows from `ctx.position` on are free.
        """
        ctx.return_state = True
        y_BD = self.forward(x_BD[:, None], ctx)[:, 0]
        overwrite(ctx)
        return y_BD


def overwrite(ctx: Context) -> None:
    """Copy `ctx.next_state` into the tensors of `ctx.state`. ValueError where one of them has another shape, as a state that grows has."""
    held = ctx.state or {}
    for name, tensors in ctx.next_state.items():
        for mine, given in zip(held[name], tensors, strict=True):
            if mine.shape != given.shape:
                raise ValueError(
                    f"state {name!r} has shape {tuple(given.shape)} after a step, {tuple(mine.shape)} before: it cannot stay in place"
                )
            mine.copy_(given)


def fewest_heads(width: int, head_dim: int) -> int:
    """The smallest number of heads that splits `width` into heads of at most `head_dim` channels."""
    return next(n for n in range(max(1, -(-width // head_dim)), width + 1) if width % n == 0)


def expanded_width(d_model: int, expand: float, name: str) -> int:
    """`d_model * expand` channels; ConfigError with the nearest legal values of the setting `name` where that is no whole number."""
    width = d_model * expand
    if width < 1 or width != int(width):
        near = sorted({max(int(width), 1) / d_model, (max(int(width), 0) + 1) / d_model})
        raise ConfigError(
            f"d_model * {name} = {d_model} * {expand:g} = {width:g} must be a whole number of channels; nearest legal {name}: "
            + " or ".join(f"{n:g}" for n in near)
        )
    return int(width)


class Recomputing(Mixer):
    """A plain module as a Mixer: it decodes by recomputing all tokens, and is told nothing but its input."""

    backends: ClassVar[tuple[str, ...]] = ("chunked",)
    wrapped: ClassVar[type[nn.Module]]

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(replace(spec, settings={}))
        self.module = self.wrapped(spec.d_model, **spec.settings)

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """All inputs so far."""
        return seq_len * self.spec.d_model * itemsize

    def op_flops(self, seq_len: int) -> float | None:
        """Not known."""
        return None

    def effective(self) -> dict[str, Any]:
        """The module's class, and how it decodes."""
        return {"class": self.wrapped.__name__, "decoding": "recomputes all tokens"}

    def forward(self, x_BTD: Tensor, ctx: Context | None = None) -> Tensor:
        """Run the module on all tokens seen. ValueError for padded sequences, and where it changes the shape."""
        ctx, name = ctx or Context(), self.wrapped.__name__
        if ctx.lengths_B is not None:
            raise ValueError(f"{name} is a plain module: it cannot know the true lengths of padded sequences")
        past = ctx.state["op"][0] if ctx.state else x_BTD[:, :0]
        seen_BTD = torch.cat([past, x_BTD], 1)
        if ctx.return_state:
            ctx.next_state["op"] = (seen_BTD,)
        y_BTD = self.module(seen_BTD)
        if not isinstance(y_BTD, Tensor) or y_BTD.shape != seen_BTD.shape:
            got = tuple(y_BTD.shape) if isinstance(y_BTD, Tensor) else type(y_BTD).__name__
            raise ValueError(f"{name} must map (B, T, D) to (B, T, D): gave {got} for {tuple(seen_BTD.shape)}")
        return y_BTD[:, past.shape[1] :]


def recomputing(module: type[nn.Module]) -> type[Mixer]:
    """The Mixer class of a plain module class, which is built as `module(d_model, **settings)`."""
    return type(module.__name__, (Recomputing,), {"wrapped": module})
