"""HGRN2: gated linear RNN whose decay is also its key (arXiv 2404.07904).

Per head of K = V = `expand_ratio` channels, heads = D / expand_ratio:

    f_t = lb + (1 - lb) * sigmoid(W_f x_t)        forget gate, per channel, never below lb
    k_t = 1 - f_t                                 the input gate is tied to it
    v_t = act(W_i x_t),  q_t = gate(W_o x_t)      input and output gate
    S_t = diag(f_t) S_{t-1} + k_t v_t^T           state, K x V
    y_t = scale * S_t^T q_t
    out = W norm(y_t)                             one norm over all heads, no further gate

Shape letters: B batch, T time, D width, H heads, K key, V value.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from hgrn2_bench.errors import unknown
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec, heads_of
from hgrn2_bench.layers import ACTIVATIONS, ForgetGate, LayerNorm, RMSNorm, ShortConv, conv_buffers, split_heads
from hgrn2_bench.ops.families import DecayInputs


@dataclass(frozen=True)
class Variant:
    """What the public sources of HGRN2 disagree about."""

    input_activation: str
    output_gate: str
    norm: str
    bias: bool
    scaled: bool
    """Read-out scale K^-0.5 instead of 1."""


VARIANTS = {
    # Doraemonzzz/hgru2-pytorch, branch reproduce: the layer modules, used for MQAR, LRA and images
    "paper": Variant("silu", "sigmoid", "LayerNorm", bias=True, scaled=False),
    # the same branch: its language model (which also scales its embedding, outside the mixer)
    "paper_lm": Variant("none", "silu", "RMSNorm without weight", bias=False, scaled=False),
    # fla, and the checkpoints published with it
    "fla": Variant("none", "silu", "RMSNorm", bias=False, scaled=True),
}


class HGRN2(Mixer):
    """The layer in three published variants; `expand_ratio=None` is min(D, 128), as in the paper's MQAR runs.

    `forget_bias` raises the bias of W_f. Where there is none, or a convolution follows, the gate gets a learned bias when it is not 0.
    """

    version: ClassVar[int] = 1
    gated: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    family: ClassVar[str] = "per_channel_decay"
    position_free: ClassVar[bool] = True
    state_setting: ClassVar[str] = "expand_ratio"

    expand_ratio: int | None = None
    variant: Literal["paper", "paper_lm", "fla"] = "paper"

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        if self.variant not in VARIANTS:
            raise unknown("variant", self.variant, VARIANTS)
        D, self.parts = spec.d_model, VARIANTS[self.variant]
        self.head_dim = min(D, 128) if self.expand_ratio is None else self.expand_ratio
        self.heads = heads_of(D, self.head_dim, "expand_ratio")
        self.scale = self.head_dim**-0.5 if self.parts.scaled else 1.0
        self.in_proj = nn.Linear(D, 3 * D, bias=self.parts.bias)
        if spec.conv:
            self.conv_i, self.conv_q, self.conv_f = (ShortConv(D, spec.conv, f"conv_{stream}") for stream in "iqf")
        self.forget_gate = ForgetGate(spec, self.parts.bias)
        self.norm = self._norm(D)
        self.out_proj = nn.Linear(D, D, bias=self.parts.bias)
        self.init_forget_bias()

    def _norm(self, D: int) -> nn.Module:
        if self.parts.norm == "LayerNorm":
            return LayerNorm(D)
        if self.parts.norm == "RMSNorm":
            return RMSNorm(D, eps=1e-5)
        return RMSNorm(D, eps=1e-6, elementwise_affine=False)  # eps: SimpleRMSNorm of hgru2-pytorch

    def init_forget_bias(self) -> None:
        """Put `spec.forget_bias` where the gate's bias is."""
        self.forget_gate.init_bias(self.in_proj)

    def project(self, x_BTD: Tensor, ctx: Context) -> DecayInputs:
        """Input, output gate and forget gate of every head; the gate in float32 or wider, the key in the type of the others."""
        i_BTD, q_BTD, f_BTD = self.in_proj(x_BTD).chunk(3, -1)
        if self.spec.conv:
            i_BTD, q_BTD, f_BTD = self.conv_i(i_BTD, ctx), self.conv_q(q_BTD, ctx), self.conv_f(f_BTD, ctx)
        log_f_BTD, k_BTD = self.forget_gate(f_BTD, ctx, q_BTD.dtype)
        i_BTD = ACTIVATIONS[self.parts.input_activation](i_BTD)
        q_BTD = ACTIVATIONS[self.parts.output_gate](q_BTD)
        q, k, v, log_f = (split_heads(t, self.heads) for t in (q_BTD, k_BTD, i_BTD, log_f_BTD))
        return DecayInputs(q_BTHK=q, k_BTHK=k, v_BTHV=v, log_f_BTHK=log_f, scale=self.scale)

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """One norm over the full width, then the output projection."""
        o_BTD: Tensor = o.flatten(-2).to(self.out_proj.weight.dtype)
        out_BTD: Tensor = self.out_proj(self.norm(o_BTD))
        return out_BTD

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """D * expand_ratio numbers of state (H matrices K x V), whatever the length, and the convolution buffers."""
        return 4 * self.spec.d_model * self.head_dim + itemsize * conv_buffers(self)

    def op_flops(self, seq_len: int) -> float:
        """5 K V per head: decay 1, outer product and its addition 2, read-out 2."""
        return 5.0 * self.heads * self.head_dim**2

    def effective(self) -> dict[str, Any]:
        """Heads, scale, and the sources' disagreements as resolved."""
        return {
            "heads": self.heads,
            "head_k": self.head_dim,
            "head_v": self.head_dim,
            "scale": self.scale,
            "input_activation": self.parts.input_activation,
            "output_gate": self.parts.output_gate,
            "norm": self.parts.norm,
            "bias": self.parts.bias,
            "forget_bias": self.forget_gate.describe(self.in_proj),
            "gate_dtype": "float32",
        }
