"""Based: linear attention with the Taylor series of exp as feature map (arXiv 2402.18668).

Per head of d = feature_dim query and key channels and V = D / H value channels:

    q_t, k_t, v_t = W_q x_t, W_k x_t, W_v x_t
    phi(q) . phi(k) = 1 + s + s^2 / 2                  s = q . k / sqrt(d): exp(s) to second order
    S_t = S_{t-1} + phi(k_t) v_t^T                     state, K x V; nothing is ever forgotten
    z_t = z_{t-1} + phi(k_t)                           its normaliser, one more value column of S for a value that is always 1
    o_t = S_t^T phi(q_t) / (phi(q_t) . z_t)
    out = W o_t

phi has K = 1 + d + d (d + 1) / 2 features: with y = x / d^(1/4) they are 1, y_i, y_i^2 / sqrt(2) and, for i < j, y_i y_j. The published
map has y_i y_j / sqrt(2) twice, for (i, j) and (j, i): the same product from 1 + d + d^2 features (153 against 273 for d = 16).

This is the linear attention alone. The paper's models add sliding windows; its MQAR model has a gated convolution of width 3 as layer 0.

Shape letters: B batch, T time, D width, H heads, K features, V value.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec, heads_of
from hgrn2_bench.layers import ShortConv, conv_buffers, split_heads
from hgrn2_bench.ops.families import ScalarDecayInputs

LEAST = 0.5  # of 1 + s + s^2 / 2 = ((1 + s)^2 + 1) / 2


class Based(Mixer):
    """One head of 16 query channels as in the paper's MQAR models; no biases.

    Features, values and with them the whole recurrence are float32 or wider, also under autocast: 1 + s + s^2 / 2 is a small difference
    of large products where s is negative, and three digits of bfloat16 do not carry it.
    """

    version: ClassVar[int] = 1
    family: ClassVar[str] = "scalar_decay"
    position_free: ClassVar[bool] = True
    state_setting: ClassVar[str] = "feature_dim"

    num_heads: int = 1
    feature_dim: int = 16

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        D, d = spec.d_model, self.feature_dim
        if d < 1:
            raise ConfigError(f"feature_dim={d} must be at least 1")
        self.head_v = heads_of(D, self.num_heads, "num_heads", result="head dimension")
        self.features = 1 + d + d * (d + 1) // 2
        self.widths = (self.num_heads * d, self.num_heads * d, D)
        self.in_proj = nn.Linear(D, sum(self.widths), bias=False)
        if spec.conv:
            self.conv_q, self.conv_k, self.conv_v = (
                ShortConv(width, spec.conv, f"conv_{stream}") for stream, width in zip("qkv", self.widths, strict=True)
            )
        self.out_proj = nn.Linear(D, D, bias=False)

    def project(self, x_BTD: Tensor, ctx: Context) -> ScalarDecayInputs:
        """Mapped queries and keys, and values with a column of ones; the decay is 1."""
        q, k, v = self.in_proj(x_BTD).split(self.widths, -1)
        if self.spec.conv:
            q, k, v = self.conv_q(q, ctx), self.conv_k(k, ctx), self.conv_v(v, ctx)
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, v = (split_heads(t.to(dtype), self.num_heads) for t in (q, k, v))
        log_f = q.new_zeros(1).expand(q.shape[:-1])
        return ScalarDecayInputs(q_BTHK=taylor_exp(q), k_BTHK=taylor_exp(k), v_BTHV=F.pad(v, (0, 1), value=1.0), log_f_BTH=log_f)

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """Division by the last column, output projection.

        Each token adds at least LEAST to that column: an epsilon would change nothing, and the clamp meets rounding errors only.
        """
        o_BTHV = o[..., :-1] / o[..., -1:].clamp_min(LEAST)
        out_BTD: Tensor = self.out_proj(o_BTHV.flatten(-2).to(self.out_proj.weight.dtype))
        return out_BTD

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """H matrices of K x V numbers and H normalisers of K, whatever the length, and the convolution buffers."""
        return 4 * self.num_heads * self.features * (self.head_v + 1) + itemsize * conv_buffers(self)

    def op_flops(self, seq_len: int) -> float:
        """4 K (V + 1) per head: outer product and its addition 2, read-out 2; one operation for each feature of q and of k."""
        return self.num_heads * (4.0 * self.features * (self.head_v + 1) + 2 * self.features)

    def effective(self) -> dict[str, Any]:
        """Heads, feature map and normaliser as built."""
        return {
            "heads": self.num_heads,
            "head_k": self.features,
            "head_v": self.head_v,
            "feature_dim": self.feature_dim,
            "scale": 1.0,
            "feature_map": "exp(q.k / sqrt(feature_dim)) to second order, no feature twice",
            "normalizer": "phi(q) . sum of phi(k)",
            "norm": "none",
            "bias": False,
            "forget_bias": "none",
            "op_dtype": "float32",
        }


def taylor_exp(x: Tensor) -> Tensor:
    """phi: (..., d) to (..., 1 + d + d (d + 1) / 2), with phi(x) . phi(y) = 1 + s + s^2 / 2 for s = x . y / sqrt(d)."""
    phi: Tensor = _Features.apply(x * x.shape[-1] ** -0.25)
    return phi


class _Features(torch.autograd.Function):
    """1, y_i, y_i^2 / sqrt(2) and the products y_i y_{i+r} (mod d) for r = 1 .. d / 2; of a half turn, where d is even, the first d / 2.

    By hand, since autograd would take hundreds of small kernels for these products and keep each factor.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        d, y2 = y.shape[-1], torch.cat([y, y], -1)
        ctx.save_for_backward(y2)
        phi = y.new_ones(*y.shape[:-1], 1 + d + d * (d + 1) // 2)
        phi[..., 1 : d + 1] = y
        torch.mul(y * math.sqrt(0.5), y, out=phi[..., d + 1 : 2 * d + 1])
        for r, n, place in _products(d):
            torch.mul(y2[..., :n], y2[..., r : r + n], out=phi[..., place])
        return phi

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y2,) = ctx.saved_tensors
        d = y2.shape[-1] // 2
        grad_y2 = torch.zeros_like(y2)
        grad_y2[..., :d] = grad[..., 1 : d + 1]
        grad_y2[..., :d].addcmul_(y2[..., :d], grad[..., d + 1 : 2 * d + 1], value=math.sqrt(2))
        for r, n, place in _products(d):
            grad_y2[..., :n].addcmul_(grad[..., place], y2[..., r : r + n])
            grad_y2[..., r : r + n].addcmul_(grad[..., place], y2[..., :n])
        return grad_y2[..., :d] + grad_y2[..., d:]


def _products(d: int) -> Iterator[tuple[int, int, slice]]:
    """Each shift r, the number of its products, and their place among the features."""
    start = 2 * d + 1
    for r in range(1, d // 2 + 1):
        n = d // 2 if 2 * r == d else d
        yield r, n, slice(start, start + n)
        start += n
