"""DeltaNet: linear attention that writes by the delta rule (arXiv 2406.06484).

Per head of K = V = D / H channels:

    q_t, k_t = norm(silu(W_q x_t)), norm(silu(W_k x_t))             norm: to unit length, per head
    v_t = silu(W_v x_t)
    beta_t = sigmoid(w_b x_t)                                       writing strength, one number per head
    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T         state, K x V: replaces what k_t recalled, no decay
    o_t = K^-0.5 S_t^T q_t
    out = W RMSNorm(o_t)                                            norm per head, its weight shared by the heads

Scale and activations as in the published code (fla-org/flash-linear-attention, fla/layers/delta_net.py). The published convolution has
width 4 and comes before silu.

Shape letters: B batch, T time, D width, H heads, K key, V value.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.interfaces import Context, Mixer, MixerSpec, fewest_heads, heads_of
from hgrn2_bench.layers import RMSNorm, ShortConv, conv_buffers, l2_norm, split_heads
from hgrn2_bench.ops.families import DeltaInputs

HEAD_DIM = 128  # of the published models: 16 heads at width 2048 (fla, fla/models/delta_net/configuration_delta_net.py)


class DeltaNet(Mixer):
    """The published layer without its optional gate; `num_heads=None` takes as few heads as keep them within 128 channels."""

    version: ClassVar[int] = 1
    family: ClassVar[str] = "delta_rule"
    position_free: ClassVar[bool] = True
    state_setting: ClassVar[str] = "num_heads"

    num_heads: int | None = None

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        D = spec.d_model
        self.heads = fewest_heads(D, HEAD_DIM) if self.num_heads is None else self.num_heads
        self.head_dim = heads_of(D, self.heads, "num_heads", result="head dimension")
        self.scale = self.head_dim**-0.5
        self.in_proj = nn.Linear(D, 3 * D, bias=False)
        self.beta_proj = nn.Linear(D, self.heads, bias=False)
        if spec.conv:
            self.conv_q, self.conv_k, self.conv_v = (ShortConv(D, spec.conv, f"conv_{stream}") for stream in "qkv")
        self.norm = RMSNorm(self.head_dim, eps=1e-5)
        self.out_proj = nn.Linear(D, D, bias=False)

    def project(self, x_BTD: Tensor, ctx: Context) -> DeltaInputs:
        """Queries and keys of unit length, values, and beta, the last in float32 or wider."""
        q, k, v = self.in_proj(x_BTD).chunk(3, -1)
        if self.spec.conv:
            q, k, v = self.conv_q(q, ctx), self.conv_k(k, ctx), self.conv_v(v, ctx)
        q, k, v = (split_heads(F.silu(t), self.heads) for t in (q, k, v))
        logit_BTH = self.beta_proj(x_BTD)
        beta_BTH = logit_BTH.to(torch.promote_types(logit_BTH.dtype, torch.float32)).sigmoid()
        return DeltaInputs(q_BTHK=l2_norm(q), k_BTHK=l2_norm(k), v_BTHV=v, beta_BTH=beta_BTH, scale=self.scale)

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """Norm per head, output projection."""
        out_BTD: Tensor = self.out_proj(self.norm(o.to(self.out_proj.weight.dtype)).flatten(-2))
        return out_BTD

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """H matrices of K x V numbers, whatever the length, and the convolution buffers."""
        return 4 * self.heads * self.head_dim**2 + itemsize * conv_buffers(self)

    def op_flops(self, seq_len: int) -> float:
        """6 K V per head (what k recalls 2, outer product and its addition 2, read-out 2), 2 V for the difference and beta."""
        return self.heads * (6.0 * self.head_dim**2 + 2 * self.head_dim)

    def effective(self) -> dict[str, Any]:
        """Heads, scale and gates as built."""
        return {
            "heads": self.heads,
            "head_k": self.head_dim,
            "head_v": self.head_dim,
            "scale": self.scale,
            "input_activation": "silu; q and k to unit length",
            "output_gate": "none",
            "norm": "RMSNorm per head",
            "bias": False,
            "forget_bias": "no decay",
            "gate_dtype": "float32",
        }
