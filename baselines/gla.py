"""GLA: gated linear attention with a low-rank forget gate (arXiv 2312.06635).

Per head of K = expand_k D / H key and V = expand_v D / H value channels:

    q_t, k_t, v_t = W_q x_t, W_k x_t, W_v x_t                     no activation
    f_t = sigmoid(W_2 W_1 x_t + b)^(1 / gate_logit_normalizer)    W_1: D -> gate_low_rank_dim
    S_t = diag(f_t) S_{t-1} + k_t v_t^T                           state, K x V
    o_t = K^-0.5 S_t^T q_t
    out = W (RMSNorm(o_t) * silu(W_g x_t))                        norm per head, its weight shared by the heads

Shape letters: B batch, T time, D width, H heads, K key, V value, R rank of the gate.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec, expanded_width, heads_of
from hgrn2_bench.layers import RMSNorm, ShortConv, conv_buffers, split_heads
from hgrn2_bench.ops.families import DecayInputs


class GLA(Mixer):
    """The layer with the paper's defaults. `forget_bias` raises b; the root makes f = sigmoid(b)^(1/16), near 1 already at 0."""

    version: ClassVar[int] = 1
    gated: ClassVar[bool] = True
    family: ClassVar[str] = "per_channel_decay"
    position_free: ClassVar[bool] = True
    state_setting: ClassVar[str] = "expand_k"

    num_heads: int = 4
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate_low_rank_dim: int = 16
    gate_logit_normalizer: int = 16

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        D, R = spec.d_model, self.gate_low_rank_dim
        if min(R, self.gate_logit_normalizer) < 1:
            raise ConfigError(f"gate_low_rank_dim={R} and gate_logit_normalizer={self.gate_logit_normalizer} must be at least 1")
        self.head_k, self.head_v = self._head_dim("expand_k", self.expand_k), self._head_dim("expand_v", self.expand_v)
        HK, HV = self.num_heads * self.head_k, self.num_heads * self.head_v
        self.scale = self.head_k**-0.5
        self.widths = (HK, HK, HV, R)
        self.in_proj = nn.Linear(D, sum(self.widths), bias=False)
        self.forget_proj = nn.Linear(R, HK)
        if spec.conv:
            self.conv_q, self.conv_k = ShortConv(HK, spec.conv, "conv_q"), ShortConv(HK, spec.conv, "conv_k")
            self.conv_v = ShortConv(HV, spec.conv, "conv_v")
        self.gate_proj = nn.Linear(D, HV, bias=False)
        self.norm = RMSNorm(self.head_v, eps=1e-5)
        self.out_proj = nn.Linear(HV, D, bias=False)
        self.init_forget_bias()

    def _head_dim(self, name: str, expand: float) -> int:
        width = expanded_width(self.spec.d_model, expand, name)
        return heads_of(width, self.num_heads, "num_heads", width=f"d_model * {name}", result="head dimension")

    @torch.no_grad()
    def init_forget_bias(self) -> None:
        """Add `spec.forget_bias` to the bias of the forget gate."""
        self.forget_proj.bias.add_(self.spec.forget_bias)

    def project(self, x_BTD: Tensor, ctx: Context) -> DecayInputs:
        """Queries, keys, values and the log decay of every head, the last in float32 or wider."""
        q, k, v, low_rank = self.in_proj(x_BTD).split(self.widths, -1)
        if self.spec.conv:
            q, k, v = self.conv_q(q, ctx), self.conv_k(k, ctx), self.conv_v(v, ctx)
        logit = self.forget_proj(low_rank)
        log_f = F.logsigmoid(logit.to(torch.promote_types(logit.dtype, torch.float32))) / self.gate_logit_normalizer
        q, k, v, log_f = (split_heads(t, self.num_heads) for t in (q, k, v, log_f))
        return DecayInputs(q_BTHK=q, k_BTHK=k, v_BTHV=v, log_f_BTHK=log_f, scale=self.scale)

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """Norm per head, swish gate, output projection."""
        o_BTHV = self.norm(o.to(self.out_proj.weight.dtype))
        out_BTD: Tensor = self.out_proj(o_BTHV.flatten(-2) * F.silu(self.gate_proj(x_BTD)))
        return out_BTD

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """H matrices of K x V numbers, whatever the length, and the convolution buffers."""
        return 4 * self.num_heads * self.head_k * self.head_v + itemsize * conv_buffers(self)

    def op_flops(self, seq_len: int) -> float:
        """5 K V per head: decay 1, outer product and its addition 2, read-out 2."""
        return 5.0 * self.num_heads * self.head_k * self.head_v

    def effective(self) -> dict[str, Any]:
        """Heads, scale and gates as built."""
        return {
            "heads": self.num_heads,
            "head_k": self.head_k,
            "head_v": self.head_v,
            "scale": self.scale,
            "input_activation": "none",
            "output_gate": "silu, after the norm",
            "norm": "RMSNorm per head",
            "bias": False,
            "forget_bias": f"bias of forget_proj, f = sigmoid(logit)^(1/{self.gate_logit_normalizer})",
            "gate_dtype": "float32",
        }
