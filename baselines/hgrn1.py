"""HGRN1: elementwise gated RNN with lower-bounded forget gates (arXiv 2311.04823).

The published layer (`variant=paper`) has a complex state of D channels:

    i_t = silu(W_i x_t)                               D complex numbers, from D to 2 D
    f_t = lb + (1 - lb) * sigmoid(W_f x_t)            never below lb
    h_t = f_t exp(i theta) h_{t-1} + (1 - f_t) i_t    theta learned, one angle per channel
    out = W (LayerNorm([Re h_t, Im h_t]) * silu(W_g x_t))

`variant=fla` is the real layer of that library: i_t has D real numbers, theta is 0, the norm is RMSNorm, and there are no biases.

`variant=expand2` is the control of HGRN2's language models, in which the state grows with the projections: real, 2 D channels in input,
forget gate, output gate and state, out = W LayerNorm(h_t * sigmoid(W_g x_t)), 8 D^2 weights. Channel j + D shares the lower bound of j.

Shape letters: B batch, T time, D width, S channels of the state, E width of input and output gate (2 S complex, S real).
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.errors import unknown
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec
from hgrn2_bench.layers import ForgetGate, LayerNorm, RMSNorm, ShortConv, conv_buffers, split_heads
from hgrn2_bench.ops.families import DiagonalInputs

VARIANTS = ("paper", "fla", "expand2")


class HGRN1(Mixer):
    """The layers (Doraemonzzz/hgru-pytorch, hgru/hgru1d.py; fla, layers/hgrn.py; Doraemonzzz/hgru2-pytorch names the control's class only).

    `forget_bias` raises the bias of W_f. Where there is none, or a convolution follows, the gate gets a learned bias when it is not 0.
    """

    version: ClassVar[int] = 1
    gated: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    family: ClassVar[str] = "diagonal_scan"
    position_free: ClassVar[bool] = True

    variant: Literal["paper", "fla", "expand2"] = "paper"

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        if self.variant not in VARIANTS:
            raise unknown("variant", self.variant, VARIANTS)
        D, self.complex, self.biased = spec.d_model, self.variant == "paper", self.variant != "fla"
        S = self.channels = 2 * D if self.variant == "expand2" else D
        E = 2 * S if self.complex else S
        self.widths = (E, S)
        self.in_proj = nn.Linear(D, E + S, bias=self.biased)
        if spec.conv:
            self.conv_i, self.conv_f = ShortConv(E, spec.conv, "conv_i"), ShortConv(S, spec.conv, "conv_f")
        self.forget_gate = ForgetGate(replace(spec, d_model=S), self.biased)
        self.theta = nn.Parameter(10_000.0 ** (-2 * torch.arange(D) / D)) if self.complex else None
        self.gate_proj = nn.Linear(D, E, bias=self.biased)
        self.norm = LayerNorm(E) if self.biased else RMSNorm(E, eps=1e-5)
        self.out_proj = nn.Linear(E, D, bias=self.biased)
        self.init_forget_bias()

    def init_forget_bias(self) -> None:
        """Put `spec.forget_bias` where the gate's bias is."""
        self.forget_gate.init_bias(self.in_proj)

    def project(self, x_BTD: Tensor, ctx: Context) -> DiagonalInputs:
        """Gated input and log decay in float32 or wider; the complex input pairs neighbouring projected channels."""
        i_BTE, f_BTD = self.in_proj(x_BTD).split(self.widths, -1)
        if self.spec.conv:
            i_BTE, f_BTD = self.conv_i(i_BTE, ctx), self.conv_f(f_BTD, ctx)
        log_f_BTD, rest_BTD = self.forget_gate(f_BTD, ctx)
        i_BTE = F.silu(i_BTE.to(rest_BTD.dtype))
        if self.theta is None:
            return DiagonalInputs(x_BTD=i_BTE * rest_BTD, log_a_BTD=log_f_BTD)
        i_BTD = torch.view_as_complex(split_heads(i_BTE, self.spec.d_model).contiguous())
        return DiagonalInputs(x_BTD=i_BTD * rest_BTD, log_a_BTD=log_f_BTD, theta=self.theta)

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """Norm over the full width, swish gate, output projection; of the control the sigmoid gate comes before the norm."""
        o_BTE = (torch.cat([o.real, o.imag], -1) if self.complex else o).to(self.out_proj.weight.dtype)
        if self.variant == "expand2":
            mixed_BTE = self.norm(o_BTE * torch.sigmoid(self.gate_proj(x_BTD)))
        else:
            mixed_BTE = self.norm(o_BTE) * F.silu(self.gate_proj(x_BTD))
        out_BTD: Tensor = self.out_proj(mixed_BTE)
        return out_BTD

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """S numbers, complex (8 bytes) or real (4), whatever the length, and the convolution buffers."""
        return (8 if self.complex else 4) * self.channels + itemsize * conv_buffers(self)

    def op_flops(self, seq_len: int) -> float:
        """One multiplication and one addition per channel: real 2, complex 8."""
        return (8.0 if self.complex else 2.0) * self.channels

    def effective(self) -> dict[str, Any]:
        """State, norm and gates as built."""
        return {
            "heads": 1,
            "state": f"{self.channels} {'complex' if self.complex else 'real'}",
            "scale": 1.0,
            "input_activation": "silu",
            "output_gate": "sigmoid, before the norm" if self.variant == "expand2" else "silu, after the norm",
            "norm": "LayerNorm" if self.biased else "RMSNorm",
            "bias": self.biased,
            "forget_bias": self.forget_gate.describe(self.in_proj),
            "gate_dtype": "float32",
        }
