"""Mamba2: state space duality, one decay per head (arXiv 2405.21060).

The width grows to E = expand * D, split into H heads of P = head_dim channels; N = d_state, B and C are shared by the heads:

    x_t, B_t, C_t = silu(conv(W_x u_t, W_B u_t, W_C u_t))         the published convolution has width 4; `conv=0` leaves silu alone
    dt_t = softplus(W_dt u_t + b_dt)                              one step size per head
    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)^T                  A = -exp(A_log), one per head; state, N x P
    y_t = S_t^T C_t + D x_t
    out = W RMSNorm(y_t * silu(W_z u_t))                          one norm over all heads, after the gate

So C is the query, B the key and dt x the value of the scalar-decay recurrence.

Shape letters: B batch, T time, D width (E inside the recurrence), H heads, K key (N), V value (P).
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec, heads_of
from hgrn2_bench.layers import RMSNorm, ShortConv, conv_buffers, split_heads
from hgrn2_bench.ops.families import ScalarDecayInputs

# state-spaces/mamba, mamba_ssm/modules/mamba2.py
DT_MIN, DT_MAX = 1e-3, 1e-1
A_MIN, A_MAX = 1.0, 16.0


class Mamba2(Mixer):
    """The mixer inside the paper's block; `head_dim=None` is min(64, E), 64 as published.

    `forget_bias` is subtracted from b_dt: for small steps dt, and with it -log of the decay, shrinks by exp(-forget_bias), as -log f of a
    sigmoid gate near 1 does.
    """

    version: ClassVar[int] = 1
    gated: ClassVar[bool] = True
    family: ClassVar[str] = "scalar_decay"
    position_free: ClassVar[bool] = True
    no_weight_decay: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias")
    state_setting: ClassVar[str] = "d_state"

    d_state: int = 128
    expand: int = 2
    head_dim: int | None = None

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        D, N = spec.d_model, self.d_state
        if min(N, self.expand) < 1:
            raise ConfigError(f"d_state={N} and expand={self.expand} must be at least 1")
        E = self.inner = self.expand * D
        self.head_v = min(64, E) if self.head_dim is None else self.head_dim
        H = self.heads = heads_of(E, self.head_v, "head_dim", width="expand * d_model")
        self.in_proj = nn.Linear(D, E + 2 * N + H, bias=False)
        if spec.conv:
            self.conv_xBC = ShortConv(E + 2 * N, spec.conv, "conv_xBC", bias=True)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H).uniform_(A_MIN, A_MAX).log())
        self.D = nn.Parameter(torch.ones(H))
        self.gate_proj = nn.Linear(D, E, bias=False)
        self.norm = RMSNorm(E, eps=1e-5)
        self.out_proj = nn.Linear(E, D, bias=False)
        self.init_step_size()

    @torch.no_grad()
    def init_step_size(self) -> None:
        """Start softplus(b_dt) log-uniform in [DT_MIN, DT_MAX], less `spec.forget_bias`.

        Once: b_dt is no bias of a projection, so nothing zeroes it, and `init_forget_bias` has nothing to restore.
        """
        dt = torch.exp(torch.empty_like(self.dt_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX)))
        self.dt_bias.copy_(dt.expm1().log() - self.spec.forget_bias)  # the inverse of softplus

    def project(self, x_BTD: Tensor, ctx: Context) -> ScalarDecayInputs:
        """C, B and dt x as query, key and value; step size and A in float32 or wider, the skip D x apart."""
        E, N, H = self.inner, self.d_state, self.heads
        xBC, logit_BTH = self.in_proj(x_BTD).split((E + 2 * N, H), -1)
        if self.spec.conv:
            xBC = self.conv_xBC(xBC, ctx)
        u_BTE, B_BTN, C_BTN = F.silu(xBC).split((E, N, N), -1)
        dtype = torch.promote_types(logit_BTH.dtype, torch.float32)
        dt_BTH = F.softplus(logit_BTH.to(dtype) + self.dt_bias.to(dtype))
        q, k = (t[:, :, None].expand(-1, -1, H, -1) for t in (C_BTN, B_BTN))
        u_BTHV = split_heads(u_BTE, H)
        v = (u_BTHV * dt_BTH[..., None]).to(u_BTHV.dtype)
        log_f_BTH = -self.A_log.to(dtype).exp() * dt_BTH
        return ScalarDecayInputs(q_BTHK=q, k_BTHK=k, v_BTHV=v, log_f_BTH=log_f_BTH, skip=self.D[:, None] * u_BTHV)

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """Swish gate, then the norm over all heads, output projection."""
        y_BTE = o.flatten(-2).to(self.out_proj.weight.dtype)
        out_BTD: Tensor = self.out_proj(self.norm(y_BTE * F.silu(self.gate_proj(x_BTD))))
        return out_BTD

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """E x N numbers (H matrices N x P), whatever the length, and the convolution buffer."""
        return 4 * self.inner * self.d_state + itemsize * conv_buffers(self)

    def op_flops(self, seq_len: int) -> float:
        """5 N P + P + 2 per head: decay 1, outer product and its addition 2, read-out 2; dt x; dt A and its exponential."""
        return self.inner * (5.0 * self.d_state + 1) + 2 * self.heads

    def effective(self) -> dict[str, Any]:
        """Inner width, heads, states and gates as built."""
        return {
            "heads": self.heads,
            "head_k": self.d_state,
            "head_v": self.head_v,
            "inner": self.inner,
            "scale": 1.0,
            "input_activation": "silu on x, B and C, after the convolution",
            "output_gate": "silu, before the norm",
            "norm": "RMSNorm",
            "bias": False,
            "forget_bias": "subtracted from dt_bias",
            "gate_dtype": "float32",
        } | ({"stands_in": "simple_gla"} if self.spec.backend == "fla" else {})  # for mamba-ssm's kernel
