"""S4D: diagonal state space model, the same at every step (arXiv 2206.11893).

Every channel has its own system of N complex states, one of each conjugate pair, in continuous time:

    h'(t) = A h(t) + B u(t),   y(t) = 2 Re(C h(t)) + D u(t)           A = -exp(log_A_real) + i A_imag

held constant over steps of length dt, one per channel (zero-order hold), and read at them:

    h_t = exp(dt A) h_{t-1} + A^-1 (exp(dt A) - 1) B u_t,   y_t = 2 Re(C h_t) + D u_t

Starting values (P = 2 N = `d_state`, n = 0 .. N - 1), with real part -1/2, B = 1 and C standard normal:

    init=lin     A_imag_n = pi n
    init=inv     A_imag_n = P / pi (P / (2 n + 1) - 1)
    init=legs    those of the normal part of HiPPO-LegS, P x P

Then mixes channels as S4's block does: out = W_1 gelu(y) * sigmoid(W_2 gelu(y)), with biases.

Shape letters: B batch, T time, D width, N states per channel, P both of each pair.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.errors import ConfigError, unknown
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec
from hgrn2_bench.layers import ShortConv, activation_dtype, conv_buffers
from hgrn2_bench.ops.families import DiagonalSSMInputs

# state-spaces/s4, models/s4/s4d.py
DT_MIN, DT_MAX = 1e-3, 1e-1
SSM_LR = 1e-3
INITS = ("lin", "inv", "legs")


class S4D(Mixer):
    """The layer of state-spaces/s4, models/s4/s4d.py, with the paper's B, which that file leaves out.

    dt, A and B learn at no more than SSM_LR and are not decayed, C is a matrix like any other. The op takes C, B and the factor of the
    discretisation as one product, so the state that it holds lacks the last two.
    """

    version: ClassVar[int] = 1
    family: ClassVar[str] = "diagonal_ssm"
    position_free: ClassVar[bool] = True
    backends: ClassVar[tuple[str, ...]] = ("reference", "chunked")
    no_weight_decay: ClassVar[tuple[str, ...]] = ("log_dt", "log_A_real", "A_imag", "B")
    max_lr: ClassVar[Mapping[str, float]] = dict.fromkeys(("log_dt", "log_A_real", "A_imag", "B"), SSM_LR)
    state_setting: ClassVar[str] = "d_state"

    d_state: int = 64
    init: Literal["lin", "inv", "legs"] = "lin"

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        D, N = spec.d_model, self.d_state // 2
        if self.init not in INITS:
            raise unknown("init", self.init, INITS)
        if self.d_state < 2 or self.d_state % 2:
            near = f"{2 * N} or {2 * N + 2}" if N > 0 else "2"
            raise ConfigError(f"d_state={self.d_state} must be even, states come in pairs; nearest legal d_state: {near}")
        if spec.conv:
            self.conv_u = ShortConv(D, spec.conv, "conv_u")
        self.log_dt = nn.Parameter(torch.empty(D).uniform_(math.log(DT_MIN), math.log(DT_MAX)))
        self.log_A_real = nn.Parameter(torch.full((D, N), math.log(0.5)))
        self.A_imag = nn.Parameter(frequencies(self.init, self.d_state).repeat(D, 1))
        self.B = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(D, N, 1))
        self.C = nn.Parameter(torch.randn(D, N, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(D))
        self.out_proj = nn.Linear(D, 2 * D)

    def project(self, x_BTD: Tensor, ctx: Context) -> DiagonalSSMInputs:
        """The input, and the system discretised in float32 or wider; the skip D u apart."""
        u_BTD = self.conv_u(x_BTD.to(activation_dtype(x_BTD)), ctx) if self.spec.conv else x_BTD
        dtype = torch.promote_types(self.log_dt.dtype, torch.float32)
        A_DN = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        log_a_DN = self.log_dt.to(dtype).exp()[:, None] * A_DN
        B_DN, C_DN = (torch.view_as_complex(pair.to(dtype)) for pair in (self.B, self.C))
        C_DN = 2 * C_DN * B_DN * torch.expm1(log_a_DN) / A_DN
        return DiagonalSSMInputs(x_BTD=u_BTD, log_a_DN=log_a_DN.real, theta_DN=log_a_DN.imag, C_DN=C_DN, skip=self.D * u_BTD)

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """GELU, output projection, gated linear unit."""
        return F.glu(self.out_proj(F.gelu(o.to(self.out_proj.weight.dtype))), -1)

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """D x N complex numbers, whatever the length, and the convolution buffer."""
        return 8 * self.spec.d_model * (self.d_state // 2) + itemsize * conv_buffers(self)

    def op_flops(self, seq_len: int) -> float:
        """11 per channel and state (complex decay 6, real input 1, real part of the read-out and its sum 4), 2 per channel for the skip."""
        return self.spec.d_model * (11.0 * (self.d_state // 2) + 2)

    def effective(self) -> dict[str, Any]:
        """States, starting values and activations as built."""
        return {
            "heads": 1,
            "state": f"{self.d_state // 2} complex per channel",
            "init": self.init,
            "discretisation": "zero-order hold",
            "scale": 1.0,
            "input_activation": "none",
            "output_gate": "sigmoid (GLU), after GELU",
            "norm": "none",
            "bias": True,
            "forget_bias": "none",
            "max_lr": f"{SSM_LR:g} for {', '.join(self.max_lr)}",
            "gate_dtype": "float32",
        }


def frequencies(init: str, P: int) -> Tensor:
    """The starting imaginary parts of A, (P / 2,)."""
    n_N = torch.arange(P // 2, device="cpu")  # a model may be built without numbers, which an eigenvalue needs
    if init == "lin":
        return math.pi * n_N
    if init == "inv":
        return P / math.pi * (P / (2 * n_N + 1) - 1)
    root_P = (2 * torch.arange(P, device="cpu").double() + 1).sqrt()
    lower_PP = torch.outer(root_P, root_P).tril(-1) / 2
    return torch.linalg.eigvalsh(1j * (lower_PP - lower_PP.mT))[P // 2 :].float()
