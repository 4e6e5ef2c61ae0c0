"""Gated DeltaNet: the delta rule with Mamba2's decay (arXiv 2412.06464).

Per head of K = expand_k D / H key and V = expand_v D / H value channels:

    q_t, k_t = norm(silu(W_q x_t)), norm(silu(W_k x_t))                   norm: to unit length, per head
    v_t = silu(W_v x_t)
    beta_t = sigmoid(w_b x_t)                                             writing strength, one number per head
    alpha_t = exp(-exp(A_log) softplus(w_a x_t + b_dt))                   decay, one number per head
    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T       state, K x V
    o_t = K^-0.5 S_t^T q_t
    out = W (RMSNorm(o_t) * silu(W_g x_t))                                norm per head, its weight shared by the heads

As published in fla-org/flash-linear-attention, fla/layers/gated_deltanet.py; the paper writes o_t without a scale. The published
convolution has width 4 and comes before silu.

Shape letters: B batch, T time, D width, H heads, K key, V value.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.interfaces import Context, Mixer, MixerSpec, expanded_width, fewest_heads, heads_of
from hgrn2_bench.layers import RMSNorm, ShortConv, conv_buffers, l2_norm, split_heads
from hgrn2_bench.ops.families import DeltaInputs

HEAD_K = 256  # of the published models: 6 heads at width 2048 (fla, fla/layers/gated_deltanet.py)
A_MAX, DT_MIN, DT_MAX = 16.0, 1e-3, 1e-1  # the same file


class GatedDeltaNet(Mixer):
    """The published layer: 6 D^2 weights. `num_heads=None` takes as few heads as keep their keys within 256 channels.

    `forget_bias` is subtracted from b_dt: for small steps, -log alpha shrinks by exp(-forget_bias), as -log f of a sigmoid gate near 1
    does.
    """

    version: ClassVar[int] = 1
    gated: ClassVar[bool] = True
    family: ClassVar[str] = "delta_rule"
    position_free: ClassVar[bool] = True
    no_weight_decay: ClassVar[tuple[str, ...]] = ("A_log",)
    state_setting: ClassVar[str] = "expand_k"

    num_heads: int | None = None
    expand_k: float = 0.75
    expand_v: float = 1.5

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        D = spec.d_model
        HK, HV = expanded_width(D, self.expand_k, "expand_k"), expanded_width(D, self.expand_v, "expand_v")
        H = self.heads = fewest_heads(HK, HEAD_K) if self.num_heads is None else self.num_heads
        self.head_k, self.head_v = (
            heads_of(width, H, "num_heads", width=f"d_model * {name}", result="head dimension")
            for width, name in ((HK, "expand_k"), (HV, "expand_v"))
        )
        self.scale = self.head_k**-0.5
        self.widths = (HK, HK, HV)
        self.in_proj = nn.Linear(D, sum(self.widths), bias=False)
        self.beta_proj = nn.Linear(D, H, bias=False)
        self.dt_proj = nn.Linear(D, H)
        self.A_log = nn.Parameter(torch.empty(H).uniform_(0, A_MAX).log())
        if spec.conv:
            self.conv_q, self.conv_k = ShortConv(HK, spec.conv, "conv_q"), ShortConv(HK, spec.conv, "conv_k")
            self.conv_v = ShortConv(HV, spec.conv, "conv_v")
        self.gate_proj = nn.Linear(D, HV, bias=False)
        self.norm = RMSNorm(self.head_v, eps=1e-5)
        self.out_proj = nn.Linear(HV, D, bias=False)
        self.init_step_size()
        self.init_forget_bias()

    @torch.no_grad()
    def init_step_size(self) -> None:
        """Start softplus(b_dt) log-uniform in [DT_MIN, DT_MAX]."""
        dt = torch.exp(torch.empty_like(self.dt_proj.bias).uniform_(math.log(DT_MIN), math.log(DT_MAX)))
        self.dt_proj.bias.copy_(dt.expm1().log())  # the inverse of softplus

    @torch.no_grad()
    def init_forget_bias(self) -> None:
        """Subtract `spec.forget_bias` from the bias of the step size."""
        self.dt_proj.bias.sub_(self.spec.forget_bias)

    def project(self, x_BTD: Tensor, ctx: Context) -> DeltaInputs:
        """Queries and keys of unit length, values, and the two gates, those in float32 or wider."""
        q, k, v = self.in_proj(x_BTD).split(self.widths, -1)
        if self.spec.conv:
            q, k, v = self.conv_q(q, ctx), self.conv_k(k, ctx), self.conv_v(v, ctx)
        q, k, v = (split_heads(F.silu(t), self.heads) for t in (q, k, v))
        beta_BTH, dt_BTH = self.beta_proj(x_BTD), F.linear(x_BTD, self.dt_proj.weight)
        dtype = torch.promote_types(dt_BTH.dtype, torch.float32)
        log_f_BTH = -self.A_log.to(dtype).exp() * F.softplus(dt_BTH.to(dtype) + self.dt_proj.bias.to(dtype))
        return DeltaInputs(l2_norm(q), l2_norm(k), v, beta_BTH.to(dtype).sigmoid(), log_f_BTH, scale=self.scale)

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """Norm per head, swish gate, output projection."""
        o_BTHV = self.norm(o.to(self.out_proj.weight.dtype))
        out_BTD: Tensor = self.out_proj(o_BTHV.flatten(-2) * F.silu(self.gate_proj(x_BTD)))
        return out_BTD

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """H matrices of K x V numbers, whatever the length, and the convolution buffers."""
        return 4 * self.heads * self.head_k * self.head_v + itemsize * conv_buffers(self)

    def op_flops(self, seq_len: int) -> float:
        """7 K V per head (decay 1, what k recalls 2, outer product and its addition 2, read-out 2), 2 V for the difference and beta."""
        return self.heads * (7.0 * self.head_k * self.head_v + 2 * self.head_v)

    def effective(self) -> dict[str, Any]:
        """Heads, scale and gates as built."""
        return {
            "heads": self.heads,
            "head_k": self.head_k,
            "head_v": self.head_v,
            "scale": self.scale,
            "input_activation": "silu; q and k to unit length",
            "output_gate": "silu, after the norm",
            "norm": "RMSNorm per head",
            "bias": False,
            "forget_bias": "subtracted from the bias of dt_proj",
            "gate_dtype": "float32",
        }
