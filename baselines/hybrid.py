"""Hybrid: layers of different mixers, in a pattern that repeats over the depth.

    layer i is the mixer layers[i mod n], n the length of the pattern

`hybrid.layers=[hgrn2,hgrn2,attention]` puts one attention layer after every two of HGRN2. Every layer has its mixer's default settings, and
obeys the same protocol (local mixing, forget bias, lower bound, positions) as that mixer alone would.

Shape letters: B batch, T time, D width.
"""

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from hgrn2_bench import registry
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec
from hgrn2_bench.ops.families import OpInputs


class Hybrid(Mixer):
    """One layer of the pattern: builds the mixer of its place, the part, and hands everything to it.

    ConfigError for an unknown part, a hybrid within the hybrid, a part without the backend, and a depth that would cut the pattern short.
    """

    version: ClassVar[int] = 1
    parts: ClassVar[str] = "layers"

    layers: tuple[str, ...] = ("hgrn2", "attention")

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        registry.listed(self.layers, "hybrid.layers")
        self._check_depth(spec.num_layers)
        self.label = self.layers[spec.layer % len(self.layers)]
        mixer = registry.load(self.label)
        if mixer.family and spec.backend not in mixer.backends:
            raise ConfigError(f"backend={spec.backend}: {self.label} has only {', '.join(mixer.backends)}")
        first = next(layer for layer in range(spec.first, spec.layer + 1) if self.layers[layer % len(self.layers)] == self.label)
        self.part = mixer(replace(spec, first=first, settings={}))
        for fact in ("gated", "bounded", "rotary", "family", "cached", "position_free", "in_readout"):
            setattr(self, fact, getattr(self.part, fact))

    def _check_depth(self, num_layers: int) -> None:
        n = len(self.layers)
        if num_layers % n:
            near = [legal for legal in (num_layers // n * n, (num_layers // n + 1) * n) if legal]
            raise ConfigError(
                f"num_layers={num_layers} must be a multiple of {n}, the length of hybrid.layers=[{','.join(self.layers)}]; "
                f"nearest legal num_layers: {' or '.join(map(str, near))}"
            )

    def init_forget_bias(self) -> None:
        """The part's own."""
        self.part.init_forget_bias()

    def project(self, x_BTD: Tensor, ctx: Context) -> OpInputs:
        """The part's own."""
        return self.part.project(x_BTD, ctx)

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """The part's own."""
        return self.part.readout(o, x_BTD)

    def forward(self, x_BTD: Tensor, ctx: Context | None = None) -> Tensor:
        """The part's own."""
        out_BTD: Tensor = self.part(x_BTD, ctx)
        return out_BTD

    def step_in_place(self, x_BD: Tensor, ctx: Context) -> Tensor:
        """The part's own."""
        return self.part.step_in_place(x_BD, ctx)

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """The part's own."""
        return self.part.state_size(seq_len, itemsize)

    def op_flops(self, seq_len: int) -> float | None:
        """The part's own."""
        return self.part.op_flops(seq_len)

    def effective(self) -> dict[str, Any]:
        """The part's own."""
        return self.part.effective()
