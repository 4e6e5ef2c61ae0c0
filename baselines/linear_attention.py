"""Linear attention: softmax replaced by a feature map (arXiv 2006.16236).

    q_t, k_t, v_t = W_q x_t, W_k x_t, W_v x_t     split into H heads of K = D / H channels
    S_t = S_{t-1} + phi(k_t) v_t^T                state, K x K; nothing is ever forgotten
    z_t = z_{t-1} + phi(k_t)                      its normaliser
    o_t = S_t^T phi(q_t) / (phi(q_t) . z_t)
    out = W o_t

phi(x) = elu(x) + 1 in the paper. z is what S would hold for a value that is always 1: it is one more value column of the same state.

Shape letters: B batch, T time, D width, H heads, K key and value.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.errors import ConfigError, unknown
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec, heads_of
from hgrn2_bench.layers import ShortConv, conv_buffers, identity, split_heads
from hgrn2_bench.ops.families import ScalarDecayInputs

EPS = 1e-6  # added to phi(q) . z: idiap/fast-transformers, fast_transformers/attention/causal_linear_attention.py


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 without the cancellation: x + 1 above 0, exp(x) below, so that it stays positive in bfloat16 too."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {"elu": elu_plus_one, "relu": F.relu, "identity": identity}


class LinearAttention(Mixer):
    """Multi-head linear attention, with biases as in the paper's code; `normalize=false` leaves the division out.

    `feature_map=identity` needs `normalize=false`: its normaliser may be 0 or negative.
    """

    version: ClassVar[int] = 1
    family: ClassVar[str] = "scalar_decay"
    position_free: ClassVar[bool] = True
    state_setting: ClassVar[str] = "num_heads"

    num_heads: int = 1
    feature_map: Literal["elu", "relu", "identity"] = "elu"
    normalize: bool = True
    bias: bool = True

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        D = spec.d_model
        if self.feature_map not in FEATURE_MAPS:
            raise unknown("feature_map", self.feature_map, FEATURE_MAPS)
        if self.feature_map == "identity" and self.normalize:
            raise ConfigError("feature_map=identity has no positive normaliser: use normalize=false, or feature_map=elu or relu")
        self.head_dim = heads_of(D, self.num_heads, "num_heads", result="head dimension")
        self.in_proj = nn.Linear(D, 3 * D, bias=self.bias)
        if spec.conv:
            self.conv_q, self.conv_k, self.conv_v = (ShortConv(D, spec.conv, f"conv_{stream}") for stream in "qkv")
        self.out_proj = nn.Linear(D, D, bias=self.bias)

    @property
    def columns(self) -> int:
        """Value columns of the state, the normaliser's among them."""
        return self.head_dim + self.normalize

    def project(self, x_BTD: Tensor, ctx: Context) -> ScalarDecayInputs:
        """Mapped queries and keys, and values with a column of ones; the decay is 1."""
        q_BTD, k_BTD, v_BTD = self.in_proj(x_BTD).chunk(3, -1)
        if self.spec.conv:
            q_BTD, k_BTD, v_BTD = self.conv_q(q_BTD, ctx), self.conv_k(k_BTD, ctx), self.conv_v(v_BTD, ctx)
        q, k, v = (split_heads(t, self.num_heads) for t in (q_BTD, k_BTD, v_BTD))
        if self.normalize:
            v = F.pad(v, (0, 1), value=1.0)
        phi = FEATURE_MAPS[self.feature_map]
        log_f = q.new_zeros(1, dtype=torch.promote_types(q.dtype, torch.float32)).expand(q.shape[:-1])
        return ScalarDecayInputs(q_BTHK=phi(q), k_BTHK=phi(k), v_BTHV=v, log_f_BTH=log_f)

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """Division by the last column, output projection."""
        o_BTHV = o.to(self.out_proj.weight.dtype)
        if self.normalize:
            o_BTHV = o_BTHV[..., :-1] / (o_BTHV[..., -1:] + EPS)
        out_BTD: Tensor = self.out_proj(o_BTHV.flatten(-2))
        return out_BTD

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """H matrices of K x K numbers and H normalisers of K, whatever the length, and the convolution buffers."""
        return 4 * self.num_heads * self.head_dim * self.columns + itemsize * conv_buffers(self)

    def op_flops(self, seq_len: int) -> float:
        """4 K (K + 1) per head, the normaliser included: outer product and its addition 2, read-out 2; a decay of 1 costs nothing."""
        return 4.0 * self.num_heads * self.head_dim * self.columns

    def effective(self) -> dict[str, Any]:
        """Heads, feature map and normaliser as built."""
        return {
            "heads": self.num_heads,
            "head_k": self.head_dim,
            "head_v": self.head_dim,
            "scale": 1.0,
            "feature_map": "elu + 1" if self.feature_map == "elu" else self.feature_map,
            "normalizer": f"phi(q) . sum of phi(k) + {EPS:g}" if self.normalize else "none",
            "norm": "none",
            "bias": self.bias,
            "forget_bias": "none",
        }
