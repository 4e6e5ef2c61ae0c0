"""Mamba: selective state space model S6 (arXiv 2312.00752).

The width grows to E = expand * D; every channel has N = d_state real states:

    u_t = silu(conv(W_x x_t))                              the published convolution has width 4; `conv=0` leaves silu alone
    r_t, B_t, C_t = W_s u_t                                rank `dt_rank`, N, N
    dt_t = softplus(W_dt r_t + b_dt)                       one step size per channel
    h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t^T             A = -exp(A_log), E x N
    y_t = h_t C_t + D u_t
    out = W (y_t * silu(W_z x_t))

Shape letters: B batch, T time, D width (E inside the recurrence), N states per channel, R rank of the step size.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec
from hgrn2_bench.layers import ShortConv, conv_buffers
from hgrn2_bench.ops.families import SelectiveInputs

DT_MIN, DT_MAX = 1e-3, 1e-1  # state-spaces/mamba, mamba_ssm/modules/mamba_simple.py


class Mamba(Mixer):
    """The mixer inside the paper's block; `dt_rank=None` is D / 16 rounded up.

    `forget_bias` is subtracted from b_dt: for small steps dt, and with it -log of the decay, shrinks by exp(-forget_bias), as -log f of a
    sigmoid gate near 1 does.
    """

    version: ClassVar[int] = 1
    gated: ClassVar[bool] = True
    family: ClassVar[str] = "selective_scan"
    position_free: ClassVar[bool] = True
    backends: ClassVar[tuple[str, ...]] = ("reference", "chunked")
    no_weight_decay: ClassVar[tuple[str, ...]] = ("A_log", "D")
    state_setting: ClassVar[str] = "d_state"

    d_state: int = 16
    expand: int = 2
    dt_rank: int | None = None

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        D, N = spec.d_model, self.d_state
        self.rank = math.ceil(D / 16) if self.dt_rank is None else self.dt_rank
        if min(N, self.expand, self.rank) < 1:
            raise ConfigError(f"d_state={N}, expand={self.expand} and dt_rank={self.rank} must be at least 1")
        E = self.inner = self.expand * D
        self.in_proj = nn.Linear(D, E, bias=False)
        if spec.conv:
            self.conv_x = ShortConv(E, spec.conv, "conv_x", bias=True)
        self.x_proj = nn.Linear(E, self.rank + 2 * N, bias=False)
        self.dt_proj = nn.Linear(self.rank, E)
        self.A_log = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(E, 1))
        self.D = nn.Parameter(torch.ones(E))
        self.gate_proj = nn.Linear(D, E, bias=False)
        self.out_proj = nn.Linear(E, D, bias=False)
        self.init_step_size()
        self.init_forget_bias()

    @torch.no_grad()
    def init_step_size(self) -> None:
        """Start softplus(b_dt) log-uniform in [DT_MIN, DT_MAX], and W_dt uniform with bound R^-0.5."""
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        dt = torch.exp(torch.empty_like(self.dt_proj.bias).uniform_(math.log(DT_MIN), math.log(DT_MAX)))
        self.dt_proj.bias.copy_(dt.expm1().log())  # the inverse of softplus

    @torch.no_grad()
    def init_forget_bias(self) -> None:
        """Subtract `spec.forget_bias` from the bias of the step size."""
        self.dt_proj.bias.sub_(self.spec.forget_bias)

    def project(self, x_BTD: Tensor, ctx: Context) -> SelectiveInputs:
        """Input, step size and the input-dependent B and C; step size and A in float32 or wider, the skip D u apart."""
        u_BTE = self.in_proj(x_BTD)
        if self.spec.conv:
            u_BTE = self.conv_x(u_BTE, ctx)
        u_BTE = F.silu(u_BTE)
        r_BTR, B_BTN, C_BTN = self.x_proj(u_BTE).split((self.rank, self.d_state, self.d_state), -1)
        logit_BTE = F.linear(r_BTR, self.dt_proj.weight)
        dtype = torch.promote_types(logit_BTE.dtype, torch.float32)
        dt_BTE = F.softplus(logit_BTE.to(dtype) + self.dt_proj.bias.to(dtype))
        A_EN = -self.A_log.to(dtype).exp()
        return SelectiveInputs(x_BTD=u_BTE, dt_BTD=dt_BTE, A_DN=A_EN, B_BTN=B_BTN, C_BTN=C_BTN, skip=self.D * u_BTE)

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """Swish gate, output projection."""
        out_BTD: Tensor = self.out_proj(o.to(self.out_proj.weight.dtype) * F.silu(self.gate_proj(x_BTD)))
        return out_BTD

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """E x N numbers, whatever the length, and the convolution buffer."""
        return 4 * self.inner * self.d_state + itemsize * conv_buffers(self)

    def op_flops(self, seq_len: int) -> float:
        """7 per channel and state (dt A, its exponential, decay, input times B and its addition 2, read-out 2), 1 per channel for dt u."""
        return self.inner * (7.0 * self.d_state + 1)

    def effective(self) -> dict[str, Any]:
        """Inner width, states and gates as built."""
        return {
            "heads": 1,
            "inner": self.inner,
            "d_state": self.d_state,
            "dt_rank": self.rank,
            "scale": 1.0,
            "input_activation": "silu, after the convolution",
            "output_gate": "silu",
            "norm": "none",
            "bias": False,
            "forget_bias": "subtracted from the bias of dt_proj",
            "gate_dtype": "float32",
        }
