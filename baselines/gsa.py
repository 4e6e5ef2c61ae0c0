"""GSA: gated slot attention, a softmax over a fixed number of slots that forget (arXiv 2409.07146).

Per head of K = V = D / H channels and M slots:

    q_t, k_t, v_t = silu(W_q x_t), silu(W_k x_t), silu(W_v x_t)
    f_t = sigmoid(W_f x_t)^(1 / gate_logit_normalizer)             one number per slot; s_t = 1 - f_t is what the slot takes
    slots_k_t = diag(f_t) slots_k_{t-1} + s_t k_t^T                state, M x K
    slots_v_t = diag(f_t) slots_v_{t-1} + s_t v_t^T                state, M x V
    o_t = slots_v_t^T softmax(slots_k_t q_t)                       no scale
    out = W RMSNorm(silu(o_t))                                     one norm over all heads

As published in fla-org/flash-linear-attention, fla/layers/gsa.py; 64 slots as in fla/models/gsa/configuration_gsa.py.

Shape letters: B batch, T time, D width, H heads, K key, V value, M slots.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec, heads_of
from hgrn2_bench.layers import RMSNorm, ShortConv, conv_buffers, split_heads
from hgrn2_bench.ops.families import SlotInputs


class GSA(Mixer):
    """The published layer: 4 D^2 weights and D M for each head's gate. `num_slots` sets the state: H M (K + V) = 2 M D numbers.

    The published gate has no bias, so `forget_bias` brings one, learned, unless it is 0. The root makes f = sigmoid(b)^(1/8), near 1
    already at 0.
    """

    version: ClassVar[int] = 1
    gated: ClassVar[bool] = True
    family: ClassVar[str] = "gated_slots"
    position_free: ClassVar[bool] = True
    state_setting: ClassVar[str] = "num_slots"

    num_heads: int = 4
    num_slots: int = 64
    gate_logit_normalizer: int = 8

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        D = spec.d_model
        self.head_dim = heads_of(D, self.num_heads, "num_heads", result="head dimension")
        if min(self.num_slots, self.gate_logit_normalizer) < 1:
            raise ConfigError(f"num_slots={self.num_slots} and gate_logit_normalizer={self.gate_logit_normalizer} must be at least 1")
        self.in_proj = nn.Linear(D, 3 * D, bias=False)
        self.forget_proj = nn.Linear(D, self.num_heads * self.num_slots, bias=spec.forget_bias != 0)
        if spec.conv:
            self.conv_q, self.conv_k, self.conv_v = (ShortConv(D, spec.conv, f"conv_{stream}") for stream in "qkv")
        self.norm = RMSNorm(D, eps=1e-5)
        self.out_proj = nn.Linear(D, D, bias=False)
        self.init_forget_bias()

    @torch.no_grad()
    def init_forget_bias(self) -> None:
        """Set the bias of the forget gate to `spec.forget_bias`, where there is one."""
        if self.forget_proj.bias is not None:
            self.forget_proj.bias.fill_(self.spec.forget_bias)

    def project(self, x_BTD: Tensor, ctx: Context) -> SlotInputs:
        """Queries, keys and values of every head; what every slot keeps and takes, in float32 or wider."""
        q, k, v = self.in_proj(x_BTD).chunk(3, -1)
        if self.spec.conv:
            q, k, v = self.conv_q(q, ctx), self.conv_k(k, ctx), self.conv_v(v, ctx)
        q, k, v = (split_heads(F.silu(t), self.num_heads) for t in (q, k, v))
        logit = self.forget_proj(x_BTD)
        log_f = F.logsigmoid(logit.to(torch.promote_types(logit.dtype, torch.float32))) / self.gate_logit_normalizer
        log_f_BTHM = split_heads(log_f, self.num_heads)
        return SlotInputs(q_BTHK=q, k_BTHK=k, v_BTHV=v, s_BTHM=-torch.expm1(log_f_BTHM), log_f_BTHM=log_f_BTHM)

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """Swish, norm, output projection."""
        out_BTD: Tensor = self.out_proj(self.norm(F.silu(o.flatten(-2).to(self.out_proj.weight.dtype))))
        return out_BTD

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """H times M slots of K + V numbers, whatever the length, and the convolution buffers."""
        return 4 * 2 * self.num_slots * self.spec.d_model + itemsize * conv_buffers(self)

    def op_flops(self, seq_len: int) -> float:
        """5 M (K + V) per head: decay 1, outer product and its addition 2, read-out 2; the softmax over M scores is left out."""
        return 5.0 * 2 * self.num_slots * self.spec.d_model

    def effective(self) -> dict[str, Any]:
        """Heads, slots and gates as built."""
        return {
            "heads": self.num_heads,
            "head_k": self.head_dim,
            "head_v": self.head_dim,
            "slots": self.num_slots,
            "scale": 1.0,
            "input_activation": "silu",
            "output_gate": "none; silu before the norm",
            "norm": "RMSNorm",
            "bias": False,
            "forget_bias": f"{self._bias()}, f = sigmoid(logit)^(1/{self.gate_logit_normalizer})",
            "gate_dtype": "float32",
        }

    def _bias(self) -> str:
        return "none" if self.forget_proj.bias is None else "bias of forget_proj"
