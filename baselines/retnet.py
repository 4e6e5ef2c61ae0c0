"""RetNet: multi-scale retention, one fixed decay per head (arXiv 2307.08621).

Per head h = 0 .. H - 1 of K = expand_k D / H key and V = expand_v D / H value channels:

    q_t, k_t = turn_t(W_q x_t), turn_t(W_k x_t)   channel pair (2j, 2j + 1) turned by the angle t * 10000^(-j / (K/2 - 1))
    v_t = W_v x_t
    S_t = gamma S_{t-1} + k_t v_t^T               gamma = 1 - 2^(-5 - h); state, K x V
    o_t = K^-0.5 S_t^T q_t
    out = W (RMSNorm(o_t) * silu(W_g x_t))        norm per head, without weights

The paper's parallel form also divides every o_t by two positive numbers, to keep it small; the norm undoes that, so it is left out.

Shape letters: B batch, T time, D width, H heads, K key, V value, J channel pairs of a key.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec, expanded_width, heads_of
from hgrn2_bench.layers import RMSNorm, ShortConv, conv_buffers, split_heads, turned
from hgrn2_bench.ops.families import ScalarDecayInputs

# microsoft/torchscale, torchscale/architecture: retnet.py (RetNetRelPos) and config.py (RetNetConfig)
TURN_BASE = 10_000.0
NORM_EPS = 1e-6


class RetNet(Mixer):
    """The layer of the paper's code, in the paper's widths: keys D, values 2 D, and 8 heads (2048 channels / 256 in its 1.3B model).

    The rotation is part of the recurrence, whatever `positions` says; `rotate=false` leaves it out.
    """

    version: ClassVar[int] = 1
    family: ClassVar[str] = "scalar_decay"
    state_setting: ClassVar[str] = "expand_k"

    num_heads: int = 8
    expand_k: float = 1.0
    expand_v: float = 2.0
    rotate: bool = True

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        D, H = spec.d_model, self.num_heads
        self.head_k, self.head_v = self._head_dim("expand_k", self.expand_k), self._head_dim("expand_v", self.expand_v)
        if self.rotate:
            self._check_pairs()
        HK, HV = H * self.head_k, H * self.head_v
        self.scale = self.head_k**-0.5
        self.widths = (HK, HK, HV)
        self.in_proj = nn.Linear(D, sum(self.widths), bias=False)
        if spec.conv:
            self.conv_q, self.conv_k = ShortConv(HK, spec.conv, "conv_q"), ShortConv(HK, spec.conv, "conv_k")
            self.conv_v = ShortConv(HV, spec.conv, "conv_v")
        self.gate_proj = nn.Linear(D, HV, bias=False)
        self.norm = RMSNorm(self.head_v, eps=NORM_EPS, elementwise_affine=False)
        self.out_proj = nn.Linear(HV, D, bias=False)

    def _head_dim(self, name: str, expand: float) -> int:
        width = expanded_width(self.spec.d_model, expand, name)
        return heads_of(width, self.num_heads, "num_heads", width=f"d_model * {name}", result="head dimension")

    def _check_pairs(self) -> None:
        width = self.num_heads * self.head_k
        if width % 2:
            raise ConfigError(f"rotate=true turns pairs of key channels: d_model * expand_k = {width} must be even, or rotate=false")
        heads_of(width // 2, self.num_heads, "num_heads", width="d_model * expand_k / 2", result="rotated pairs of channels")

    def project(self, x_BTD: Tensor, ctx: Context) -> ScalarDecayInputs:
        """Turned queries and keys, values, and the log decay of every head, the last in float32 or wider."""
        q, k, v = self.in_proj(x_BTD).split(self.widths, -1)
        if self.spec.conv:
            q, k, v = self.conv_q(q, ctx), self.conv_k(k, ctx), self.conv_v(v, ctx)
        q, k, v = (split_heads(t, self.num_heads) for t in (q, k, v))
        if self.rotate:
            position_BT = self._positions(x_BTD, ctx)
            table = ctx.table(f"retnet {self.head_k}", lambda: turn_table(position_BT, q))
            q, k = turn(q, table), turn(k, table)
        dtype = torch.promote_types(q.dtype, torch.float32)
        log_f_H = torch.log1p(-torch.exp2(-5.0 - torch.arange(self.num_heads, device=q.device, dtype=dtype)))
        return ScalarDecayInputs(q_BTHK=q, k_BTHK=k, v_BTHV=v, log_f_BTH=log_f_H.expand(q.shape[:-1]), scale=self.scale)

    def _positions(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        """Positions of these tokens, (B, T), or (1, T) from 0 on; how many tokens were seen is kept in the state, for decoding."""
        B, T, _ = x_BTD.shape
        start_B = torch.zeros(1, dtype=torch.int32, device=x_BTD.device) if ctx.state is None else ctx.state["position"][0]
        if ctx.return_state:
            seen_B = start_B.new_full((B,), T) if ctx.lengths_B is None else ctx.lengths_B.to(start_B)
            ctx.next_state["position"] = (start_B + seen_B,)
        return start_B[:, None] + torch.arange(T, device=x_BTD.device)

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """Norm per head, swish gate, output projection."""
        o_BTHV = self.norm(o.to(self.out_proj.weight.dtype))
        out_BTD: Tensor = self.out_proj(o_BTHV.flatten(-2) * F.silu(self.gate_proj(x_BTD)))
        return out_BTD

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """H matrices of K x V numbers, whatever the length, the position of the rotation (4 bytes), and the convolution buffers."""
        return 4 * (self.num_heads * self.head_k * self.head_v + self.rotate) + itemsize * conv_buffers(self)

    def op_flops(self, seq_len: int) -> float:
        """5 K V per head: decay 1, outer product and its addition 2, read-out 2."""
        return 5.0 * self.num_heads * self.head_k * self.head_v

    def effective(self) -> dict[str, Any]:
        """Heads, scale, decay and rotation as built."""
        return {
            "heads": self.num_heads,
            "head_k": self.head_k,
            "head_v": self.head_v,
            "scale": self.scale,
            "decay": "1 - 2^(-5 - head), fixed",
            "rotation_base": TURN_BASE if self.rotate else None,
            "input_activation": "none",
            "output_gate": "silu, after the norm",
            "norm": "RMSNorm per head, without weights",
            "bias": False,
            "forget_bias": "none",
        }


def turn_table(position_BT: Tensor, like_BTHK: Tensor) -> Tensor:
    """Cosine and signed sine of every channel's angle, (2, B, T, 1, K), in float32 or wider.

    The angle is taken in float64, since it grows with time and only its remainder counts.
    """
    K, dtype = like_BTHK.shape[-1], torch.promote_types(like_BTHK.dtype, torch.float32)
    rate_J = TURN_BASE ** -torch.linspace(0, 1, K // 2, dtype=torch.float64, device=position_BT.device)
    angle_BT1J = (position_BT[..., None] * rate_J)[:, :, None]
    cos, sin = angle_BT1J.cos().to(dtype), angle_BT1J.sin().to(dtype)
    return torch.stack([torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)]).flatten(-2)


def turn(x_BTHK: Tensor, table_2BT1K: Tensor) -> Tensor:
    """Each channel pair (2j, 2j + 1) of every head turned by its angle."""
    return turned(x_BTHK, x_BTHK.unflatten(-1, (-1, 2)).flip(-1).flatten(-2), *table_2BT1K)
