"""The orders in which a mixer that may look ahead reads its tokens, and what is made of them.

With P the mixer's `project` and op, giving o, and R its `finish`:

    both          y = R(o(x) + flip o(flip x))                      the current token counts twice
    2d_parallel   y = R(sum of the four o along height and width)   and here four times; a layer sees its own row and column
    2d_series     y = both along width of (both along height of x)  the same weights twice, R each time, no residual between

(HGRN2's Image and Pathfinder models: Doraemonzzz/hgru2-pytorch, branch reproduce.) The weights are shared by all orders. What acts in scan
order, convolutions, token shifts and rotations, starts anew in each: position 0 of the flipped sequence is its last token. What enters
once, skip terms and what `project` leaves aside for the read-out, is the mean over the orders: none of them is preferred, and a flipped
input gives a flipped output. With true lengths every row is flipped within its own.

Softmax has no order: under every scan but `causal` it runs once, without mask, over all positions; its convolutions run in reading order.

Shape letters: B batch, T time, D width, N lines (of all sequences or images), L positions of a line.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.ops import families

if TYPE_CHECKING:
    from hgrn2_bench.interfaces import Context, Mixer

PASSES: dict[str, tuple[tuple[str, ...], ...]] = {
    "both": (("time",),),
    "2d_parallel": (("height", "width"),),
    "2d_series": (("height",), ("width",)),
}
"""For each scan its passes with a read-out, and the axes that each reads both ways."""


@dataclass(frozen=True)
class Lines:
    """How tokens (B, T, ...) become lines (N, L, ...) along one axis, and lines tokens."""

    axis: str
    grid: tuple[int, int] | None = None
    """Height and width, unless the axis is time."""
    lengths_B: Tensor | None = None

    def cut(self, x_BT: Tensor) -> Tensor:
        """The lines: the sequences themselves, the columns (along height) or the rows (along width)."""
        if self.grid is None:
            return x_BT
        image_BHW = x_BT.unflatten(1, self.grid)
        return (image_BHW.transpose(1, 2) if self.axis == "height" else image_BHW).flatten(0, 1)

    def join(self, y_NL: Tensor) -> Tensor:
        """The tokens in reading order."""
        if self.grid is None:
            return y_NL
        H, W = self.grid
        image_BHW = y_NL.unflatten(0, (-1, W)).transpose(1, 2) if self.axis == "height" else y_NL.unflatten(0, (-1, H))
        return image_BHW.flatten(1, 2)

    def flip(self, x_NL: Tensor) -> Tensor:
        """Every line backwards, within its true length where that is known; its own inverse."""
        if self.lengths_B is None:
            return x_NL.flip(1)
        position_L = torch.arange(x_NL.shape[1], device=x_NL.device)
        mirrored_NL = self.lengths_B.to(x_NL.device)[:, None] - 1 - position_L
        index_NL = torch.where(mirrored_NL >= 0, mirrored_NL, position_L)
        return x_NL.gather(1, index_NL.reshape(*index_NL.shape, *[1] * (x_NL.ndim - 2)).expand(x_NL.shape))

    def both_ways(self, x_BT: Tensor) -> Tensor:
        """The lines and the flipped lines in one batch of 2 N, so that one call of the recurrence runs both."""
        x_NL = self.cut(x_BT)
        return torch.cat([x_NL, self.flip(x_NL)])

    def summed(self, y: Tensor) -> Tensor:
        """What became of `both_ways`, (2 N, L, ...): the tokens of both added."""
        forward_NL, backward_NL = y.chunk(2)
        return self.join(forward_NL + self.flip(backward_NL))

    def context(self, ctx: "Context") -> "Context":
        """What a call on the lines carries. Lines of images are no sequences: what layers share about them is kept apart by axis."""
        lengths = None if self.lengths_B is None else self.lengths_B.repeat(2)
        apart = {} if self.grid is None else {"carry": ctx.carry.setdefault(self.axis, {}), "tables": ctx.tables.setdefault(self.axis, {})}
        return replace(ctx, lengths_B=lengths, aside={}, **apart)


def mix(mixer: "Mixer", x_BTD: Tensor, ctx: "Context") -> Tensor:
    """A mixer's output (B, T, D) under a scan that is not causal.

    ConfigError where it is asked to decode, or has no image for a 2-D scan; ValueError where the tokens are not one image.
    """
    scan = mixer.spec.scan
    if ctx.return_state or ctx.state is not None:
        raise ConfigError(f"scan={scan} cannot decode: every output depends on the tokens to come")
    if scan != "both":
        _check_image(scan, x_BTD, ctx)
    if mixer.family == "softmax":
        inputs = replace(mixer.project(x_BTD, ctx), causal=False)  # type: ignore[type-var]
        return mixer.finish(with_skip(mixer.run(inputs, ctx), inputs.skip), x_BTD, ctx)
    for axes in PASSES[scan]:
        x_BTD = _one_pass(mixer, x_BTD, replace(ctx, aside={}), [Lines(a, None if a == "time" else ctx.grid, ctx.lengths_B) for a in axes])
    return x_BTD


def _check_image(scan: str, x_BTD: Tensor, ctx: "Context") -> None:
    if ctx.grid is None:
        raise ConfigError(f"scan={scan} needs images: this task gives sequences, without height and width")
    (H, W), T = ctx.grid, x_BTD.shape[1]
    if T != H * W:
        raise ValueError(f"scan={scan}: {T} tokens are no image of {H} x {W}")
    if ctx.lengths_B is not None:
        raise ValueError(f"scan={scan} reads whole images: true lengths mean nothing to it")


def _one_pass(mixer: "Mixer", x_BTD: Tensor, ctx: "Context", along: list[Lines]) -> Tensor:
    """Both ways along each axis, outputs summed, one read-out. Where nothing before the recurrence knows positions it is computed once."""
    if projects_once(mixer):
        inputs = mixer.project(x_BTD, ctx)
        o = sum_of([lines.summed(mixer.run(families.over_time(inputs, lines.both_ways), lines.context(ctx))) for lines in along])
        return mixer.finish(with_skip(o, inputs.skip), x_BTD, ctx)
    outputs, skips, asides = [], [], []
    for lines in along:
        inner = lines.context(ctx)
        o, skip = mixer.recur(lines.both_ways(x_BTD), inner)
        outputs.append(lines.summed(o))
        skips += [] if skip is None else [lines.summed(skip)]
        asides.append({name: lines.summed(t) for name, t in inner.aside.items()})
    n = 2 * len(along)
    ctx.aside |= {name: sum_of([aside[name] for aside in asides]) / n for name in asides[0]}
    return mixer.finish(with_skip(sum_of(outputs), sum_of(skips) / n if skips else None), x_BTD, ctx)


def sum_of(tensors: list[Tensor]) -> Tensor:
    """Their sum, in their order."""
    first, *others = tensors
    for other in others:
        first = first + other
    return first


def with_skip(o: Tensor, skip: Tensor | None) -> Tensor:
    """The output with its skip term, where it has one."""
    return o if skip is None else o + skip


def projects_once(mixer: "Mixer") -> bool:
    """Whether `project` gives each token the same in every order."""
    return mixer.position_free and not mixer.spec.conv


def scans(mixer: "Mixer") -> int:
    """How often a mixer's recurrence reads every token."""
    once = mixer.spec.scan == "causal" or mixer.family == "softmax"
    return 1 if once else 2 * sum(map(len, PASSES[mixer.spec.scan]))


def uses(mixer: "Mixer", name: str) -> int:
    """How often each token goes through the module of this dotted name in a mixer: read-outs once a pass, the others in every order."""
    if scans(mixer) == 1:
        return 1
    in_readout = not set(name.split(".")).isdisjoint(mixer.in_readout)
    return len(PASSES[mixer.spec.scan]) if in_readout or projects_once(mixer) else scans(mixer)


def describe(mixer: "Mixer") -> str:
    """The scan in words, for the row."""
    scan = mixer.spec.scan
    if scan == "causal":
        return scan
    if mixer.family == "softmax":
        return f"{scan} (all positions at once)"
    steps = [f"{2 * len(axes)} along {' and '.join(axes)}, summed" for axes in PASSES[scan]]
    return f"{scan} ({'; then '.join(steps)})"
