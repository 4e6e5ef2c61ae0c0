"""LRU: linear recurrent unit, a complex diagonal recurrence that is the same at every step (arXiv 2303.06349).

    h_t = lambda h_{t-1} + gamma * (B u_t)                        N = `d_state` complex states, B and C dense and complex
    y_t = Re(C h_t) + D u_t
    out = W_1 gelu(y_t) * sigmoid(W_2 gelu(y_t))                  the block's gated linear unit, with biases

The eigenvalues are stable by construction, and gamma is learned from what keeps the state's size:

    lambda = exp(-exp(nu_log) + i exp(theta_log)),   gamma = exp(gamma_log)
    at the start  |lambda|^2 uniform in [r_min^2, r_max^2], phase uniform in [0, max_phase], gamma = sqrt(1 - |lambda|^2)

Shape letters: B batch, T time, D width, N states; the real and imaginary part of a state are neighbours.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec
from hgrn2_bench.layers import ShortConv, activation_dtype, conv_buffers
from hgrn2_bench.ops.families import DiagonalInputs

RECURRENT_LR = 1e-3


class LRU(Mixer):
    """The layer of the paper's appendix A inside its block.

    The paper trains lambda, gamma and B without weight decay, at a tuned share of the learning rate. Here none of them decays, and lambda
    and gamma learn at no more than RECURRENT_LR, the rule of S4D; B learns at the rate of all matrices.
    """

    version: ClassVar[int] = 1
    family: ClassVar[str] = "diagonal_scan"
    position_free: ClassVar[bool] = True
    in_readout: ClassVar[tuple[str, ...]] = ("C_proj", "out_proj")
    no_weight_decay: ClassVar[tuple[str, ...]] = ("nu_log", "theta_log", "gamma_log", "in_proj.weight")
    max_lr: ClassVar[Mapping[str, float]] = dict.fromkeys(("nu_log", "theta_log", "gamma_log"), RECURRENT_LR)
    state_setting: ClassVar[str] = "d_state"

    d_state: int = 256
    r_min: float = 0.9
    r_max: float = 0.999
    max_phase: float = 6.283185307179586

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        D, N = spec.d_model, self.d_state
        if N < 1:
            raise ConfigError(f"d_state={N} must be at least 1")
        if not 0 <= self.r_min < self.r_max <= 1:
            raise ConfigError(f"r_min={self.r_min:g} and r_max={self.r_max:g} must be radii, 0 <= r_min < r_max <= 1")
        if not 0 < self.max_phase <= 2 * math.pi:
            raise ConfigError(f"max_phase={self.max_phase:g} must be an angle, 0 < max_phase <= {2 * math.pi:g}")
        if spec.conv:
            self.conv_u = ShortConv(D, spec.conv, "conv_u")
        self.in_proj = nn.Linear(D, 2 * N, bias=False)
        self.nu_log, self.theta_log, self.gamma_log = (nn.Parameter(torch.empty(N)) for _ in range(3))
        self.C_proj = nn.Linear(2 * N, D, bias=False)
        self.D = nn.Parameter(torch.randn(D))
        self.out_proj = nn.Linear(D, 2 * D)
        self.init_recurrence()

    @torch.no_grad()
    def init_recurrence(self) -> None:
        """Eigenvalues on the ring, gamma from them, B and C normal with variances 1 / (2 D) and 1 / N."""
        # Not quite 0 or 1: a radius or an angle of 0 has no logarithm, and a radius of 1 no decay to take one of.
        share_N, turn_N = (torch.rand_like(self.nu_log).clamp(1e-6, 1 - 1e-6) for _ in range(2))
        nu_N = -0.5 * torch.log(share_N * (self.r_max**2 - self.r_min**2) + self.r_min**2)
        self.nu_log.copy_(nu_N.log())
        self.theta_log.copy_((self.max_phase * turn_N).log())
        self.gamma_log.copy_(0.5 * torch.log(-torch.expm1(-2 * nu_N)))
        nn.init.normal_(self.in_proj.weight, std=(2 * self.spec.d_model) ** -0.5)
        nn.init.normal_(self.C_proj.weight, std=self.d_state**-0.5)

    def project(self, x_BTD: Tensor, ctx: Context) -> DiagonalInputs:
        """The normalised complex input; eigenvalues in float32 or wider."""
        u_BTD = self.conv_u(x_BTD.to(activation_dtype(x_BTD)), ctx) if self.spec.conv else x_BTD
        dtype = torch.promote_types(self.nu_log.dtype, torch.float32)
        v_BTN = torch.view_as_complex(self.in_proj(u_BTD).to(dtype).unflatten(-1, (-1, 2)))
        log_a_N = -self.nu_log.to(dtype).exp()
        return DiagonalInputs(
            x_BTD=v_BTN * self.gamma_log.to(dtype).exp(), log_a_BTD=log_a_N.expand(v_BTN.shape), theta=self.theta_log.to(dtype).exp()
        )

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """Read the real part through C, whose imaginary weights carry the minus sign; add D times the layer's input; GELU, GLU."""
        h_BTP = torch.view_as_real(o).flatten(-2).to(self.C_proj.weight.dtype)
        y_BTD = self.C_proj(h_BTP) + self.D * x_BTD
        return F.glu(self.out_proj(F.gelu(y_BTD)), -1)

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """N complex numbers, whatever the length, and the convolution buffer."""
        return 8 * self.d_state + itemsize * conv_buffers(self)

    def op_flops(self, seq_len: int) -> float:
        """10 per state (complex decay and addition 8, gamma 2), and 2 per channel for the skip."""
        return 10.0 * self.d_state + 2 * self.spec.d_model

    def effective(self) -> dict[str, Any]:
        """States, starting values and activations as built."""
        return {
            "heads": 1,
            "state": f"{self.d_state} complex",
            "init": f"radius {self.r_min:g} to {self.r_max:g}, phase to {self.max_phase:.4g}",
            "scale": 1.0,
            "input_activation": "none",
            "output_gate": "sigmoid (GLU), after GELU",
            "norm": "none",
            "bias": True,
            "forget_bias": "none",
            "max_lr": f"{RECURRENT_LR:g} for {', '.join(self.max_lr)}",
            "gate_dtype": "float32",
        }
