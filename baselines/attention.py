"""Softmax attention, the Transformer's mixer (arXiv 1706.03762).

    q_t, k_t, v_t = W_q x_t, W_k x_t, W_v x_t     split into H heads of K = D / H channels
    o_t = sum_{s <= t} softmax_s(K^-0.5 q_t . k_s) v_s
    out = W o_t

With `positions=rope` (arXiv 2104.09864) the angle of channel pair (j, j + K/2) of queries and keys at position t grows by
t * 10000^(-2j/K).

Shape letters: B batch, T time, D width, H heads, K key and value.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec, heads_of, overwrite
from hgrn2_bench.layers import ShortConv, conv_buffers, split_heads, turned
from hgrn2_bench.ops import cache
from hgrn2_bench.ops.families import SoftmaxInputs


class Attention(Mixer):
    """Multi-head attention; one head and biases as in zoology's MQAR baseline (HazyResearch/zoology, zoology/mixers/attention.py)."""

    version: ClassVar[int] = 1
    rotary: ClassVar[bool] = True
    family: ClassVar[str] = "softmax"
    cached: ClassVar[tuple[str, ...]] = ("op",)

    num_heads: int = 1
    causal: bool = True
    bias: bool = True
    dropout: float = 0.0

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        D = spec.d_model
        self.head_dim = heads_of(D, self.num_heads, "num_heads", result="head dimension")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"attention.dropout={self.dropout} must be at least 0 and less than 1")
        self.masked = self.causal and spec.scan == "causal"
        self.rope = spec.positions == "rope"
        if self.rope and self.head_dim % 2:
            raise ConfigError(f"positions=rope needs an even head dimension; d_model={D} / num_heads={self.num_heads} = {self.head_dim}")
        self.scale = self.head_dim**-0.5
        self.in_proj = nn.Linear(D, 3 * D, bias=self.bias)
        if spec.conv:
            self.conv_q, self.conv_k, self.conv_v = (ShortConv(D, spec.conv, f"conv_{stream}") for stream in "qkv")
        self.out_proj = nn.Linear(D, D, bias=self.bias)

    def project(self, x_BTD: Tensor, ctx: Context) -> SoftmaxInputs:
        """Queries, keys and values of every head, rotated from the length of the cache on."""
        if not self.masked and (ctx.return_state or ctx.state is not None):
            why = f"scan={self.spec.scan}" if self.causal else "causal=False"
            raise ConfigError(f"attention with {why} cannot decode: every output depends on the tokens to come")
        q_BTD, k_BTD, v_BTD = self.in_proj(x_BTD).chunk(3, -1)
        if self.spec.conv:
            q_BTD, k_BTD, v_BTD = self.conv_q(q_BTD, ctx), self.conv_k(k_BTD, ctx), self.conv_v(v_BTD, ctx)
        q, k, v = (split_heads(t, self.num_heads) for t in (q_BTD, k_BTD, v_BTD))
        if self.rope:
            seen = ctx.state["op"][0].shape[1] if ctx.state else 0
            offset = seen if ctx.position is None else ctx.position
            table = ctx.table(f"rope {self.head_dim}", lambda: rope_table(offset, q.shape[1], q))
            q, k = rotate(torch.cat([q, k], 2), table).chunk(2, 2)
        dropout = self.dropout if self.training else 0.0
        return SoftmaxInputs(q_BTHK=q, k_BTHK=k, v_BTHV=v, scale=self.scale, causal=self.masked, dropout=dropout)

    def step_in_place(self, x_BD: Tensor, ctx: Context) -> Tensor:
        """Decode one token from the padded cache: keys and values go to row `ctx.position`, and the query sees the rows up to it."""
        if ctx.state is None or ctx.position is None:
            raise ValueError("attention decodes in place from a cache and a position: run the prompt first")
        ctx.return_state = True
        x_B1D = x_BD[:, None]
        inputs, held, position = self.project(x_B1D, ctx), ctx.state["op"], ctx.position
        mask_1S = ctx.table("mask", lambda: cache.mask(held[0].shape[1], position, inputs.v_BTHV.dtype))
        o_B1HK = cache.attend(inputs, held, position, mask_1S)
        overwrite(ctx)  # the convolutions' buffers
        return self.readout(o_B1HK, x_B1D)[:, 0]

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """The output projection."""
        out_BTD: Tensor = self.out_proj(o.flatten(-2).to(self.out_proj.weight.dtype))
        return out_BTD

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """The cache, 2 D numbers a token, and the convolution buffers."""
        return itemsize * (2 * self.spec.d_model * seq_len + conv_buffers(self))

    def op_flops(self, seq_len: int) -> float:
        """4 K per head and visible position (scores 2, weighted sum 2), at the mean context: (T + 1) / 2, or T without the mask."""
        context = (seq_len + 1) / 2 if self.masked else seq_len
        return 4.0 * self.num_heads * self.head_dim * context

    def effective(self) -> dict[str, Any]:
        """Heads, scale, mask and rotation as built."""
        return {
            "heads": self.num_heads,
            "head_k": self.head_dim,
            "head_v": self.head_dim,
            "scale": self.scale,
            "causal": self.masked,
            "dropout": self.dropout,
            "rope_base": ROPE_BASE if self.rope else None,
            "norm": "none",
            "bias": self.bias,
            "forget_bias": "none",
        }


ROPE_BASE = 10_000.0


def rope_table(offset: int | Tensor, T: int, like_BTHK: Tensor) -> Tensor:
    """Cosine and signed sine of positions offset, offset + 1, ..., (2, T, 1, K), in float32 or wider; offset may be (1,)."""
    K, device = like_BTHK.shape[-1], like_BTHK.device
    dtype = torch.promote_types(like_BTHK.dtype, torch.float32)
    rate = ROPE_BASE ** (-torch.arange(0, K, 2, device=device, dtype=dtype) / K)
    angle_T1J = torch.outer(torch.arange(T, device=device, dtype=dtype) + offset, rate)[:, None]
    cos, sin = angle_T1J.cos(), angle_T1J.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])


def rotate(x_BTHK: Tensor, table_2T1K: Tensor) -> Tensor:
    """Rotary positions: channel j of the first half of the last dimension is turned with channel j of the second."""
    return turned(x_BTHK, x_BTHK.roll(x_BTHK.shape[-1] // 2, -1), *table_2T1K)
