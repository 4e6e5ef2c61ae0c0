"""RWKV6 (Finch): per-channel data-dependent decay, with a data-dependent token shift (arXiv 2404.05892).

With H heads of K = D / H channels, and lerp_t(mu) = x_t + mu * (x_{t-1} - x_t):

    m_t = tanh(W_m lerp_t(mu_x))                               five rows of R numbers, one for each s of r, k, v, w, g
    x^s_t = lerp_t(mu_s + U_s m^s_t)
    r_t, k_t, v_t = W_r x^r_t, W_k x^k_t, W_v x^v_t            no activation
    w_t = exp(-exp(d + W_2 tanh(W_1 x^w_t)))                   decay, one number per channel
    o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t                  reads before it writes; u is the bonus of the present token
    S_t = diag(w_t) S_{t-1} + k_t v_t^T                        state, K x K
    out = W (norm(o_t) * silu(W_g x^g_t))                      norm per head, with a weight and a bias per channel

The per-channel family reads after it writes. So its step t gets the write (w, k, v) of step t - 1, which leaves S_{t-1} to be read, and
the bonus is its skip term. The last write is put into the state after the run: what decoding holds is S_t.

Shape letters: B batch, T time, D width, H heads, K key, V value, R rank, S the five mixtures.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec, heads_of
from hgrn2_bench.layers import ShortConv, activation_dtype, conv_buffers, split_heads, token_shift
from hgrn2_bench.ops import families
from hgrn2_bench.ops.families import DecayInputs

# BlinkDL/RWKV-LM, RWKV-v5/src/model.py (RWKV_Tmix_x060)
NORM_EPS = 64e-5
LOW_RANK_BOUND = 0.01


class RWKV6(Mixer):
    """The time mixing of the paper's code; `head_dim=None` is min(64, D), 64 as published. The block's channel mixing is not here.

    Shift, decay and bonus start as there. The matrices start as `nn.Linear` does, and the norm's weight at 1: there they are orthogonal,
    those of key and gate at a tenth, that of the output 0, and the norm's weight is ((layer + 1) / layers)^0.7.

    `forget_bias` is subtracted from d: -log w shrinks by exp(-forget_bias), as -log f of a sigmoid gate near 1 does. The token shift is
    part of the mixer, whatever `conv` says.
    """

    version: ClassVar[int] = 1
    gated: ClassVar[bool] = True
    family: ClassVar[str] = "per_channel_decay"
    state_setting: ClassVar[str] = "head_dim"
    no_weight_decay: ClassVar[tuple[str, ...]] = (
        "mix",
        "mix_in.weight",
        "mix_out",
        "decay",
        "decay_in.weight",
        "decay_out.weight",
        "bonus",
    )

    head_dim: int | None = None
    mix_rank: int = 32
    decay_rank: int = 64

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        D = spec.d_model
        if min(self.mix_rank, self.decay_rank) < 1:
            raise ConfigError(f"mix_rank={self.mix_rank} and decay_rank={self.decay_rank} must be at least 1")
        self.head_k = min(64, D) if self.head_dim is None else self.head_dim
        H = self.heads = heads_of(D, self.head_k, "head_dim")
        self.mix = nn.Parameter(torch.empty(6, D))
        self.mix_in = nn.Linear(D, 5 * self.mix_rank, bias=False)
        self.mix_out = nn.Parameter(torch.empty(5, self.mix_rank, D))
        self.r_proj, self.k_proj, self.v_proj, self.gate_proj = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.decay = nn.Parameter(torch.empty(D))
        self.decay_in = nn.Linear(D, self.decay_rank, bias=False)
        self.decay_out = nn.Linear(self.decay_rank, D, bias=False)
        self.bonus = nn.Parameter(torch.empty(H, self.head_k))
        if spec.conv:
            self.conv_r, self.conv_k, self.conv_v = (ShortConv(D, spec.conv, f"conv_{stream}") for stream in "rkv")
        self.norm = nn.GroupNorm(H, D, eps=NORM_EPS)
        self.out_proj = nn.Linear(D, D, bias=False)
        self.init_by_layer()

    @torch.no_grad()
    def init_by_layer(self) -> None:
        """The published start of shift, decay and bonus, by channel and depth; `spec.forget_bias` is subtracted from the decay's logit.

        Once: no bias of a projection is among them. The published code has the maps into the low rank at 0, where the maps out of it
        have no gradient; a first version had them within 1e-4, as here.
        """
        D, layer, layers = self.spec.d_model, self.spec.layer, self.spec.num_layers
        depth, rest = layer / max(1, layers - 1), 1 - layer / layers
        channel_D = torch.arange(D)
        share_D = channel_D / D
        slow_D, fast_D = 1 - share_D**rest, 1 - share_D ** (rest / 2)
        self.mix.copy_(torch.stack([slow_D, fast_D, slow_D, slow_D - 0.3 * depth, slow_D, fast_D]))
        share_D = channel_D / max(1, D - 1)
        self.decay.copy_(-6 + 5 * share_D ** (0.7 + 1.3 * depth) - self.spec.forget_bias)
        zigzag_D = 0.1 * ((channel_D + 1) % 3 - 1)
        self.bonus.copy_((depth * (1 - share_D) + zigzag_D).view_as(self.bonus))
        for into, out in ((self.mix_in.weight, self.mix_out), (self.decay_in.weight, self.decay_out.weight)):
            into.uniform_(-1e-4, 1e-4)
            out.uniform_(-LOW_RANK_BOUND, LOW_RANK_BOUND)

    def mixtures(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, ...]:
        """The token shift: the inputs (B, T, D) of r, k, v, decay and gate."""
        x_BTD = x_BTD.to(activation_dtype(x_BTD))
        delta_BTD = token_shift(x_BTD, ctx) - x_BTD
        low_BTSR = self.mix_in(x_BTD + delta_BTD * self.mix[0]).tanh().unflatten(-1, (5, -1))
        mu_SBTD = self.mix[1:, None, None] + torch.einsum("btsr,srd->sbtd", low_BTSR, self.mix_out)
        return (x_BTD + delta_BTD * mu_SBTD).unbind(0)

    def writes(self, mixtures: tuple[Tensor, ...], ctx: Context) -> DecayInputs:
        """Receptance, and what each token writes at its own time: key, value, log decay in float32 or wider; the bonus as skip."""
        x_r, x_k, x_v, x_w = mixtures[:4]
        r, k, v = self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)
        if self.spec.conv:
            r, k, v = self.conv_r(r, ctx), self.conv_k(k, ctx), self.conv_v(v, ctx)
        logit_BTD = self.decay_out(self.decay_in(x_w).tanh())
        dtype = torch.promote_types(logit_BTD.dtype, torch.float32)
        log_w_BTD = -(self.decay.to(dtype) + logit_BTD.to(dtype)).exp()
        r, k, v, log_w = (split_heads(t, self.heads) for t in (r, k, v, log_w_BTD))
        bonus_BTH1 = (r.to(dtype) * self.bonus.to(dtype) * k.to(dtype)).sum(-1, keepdim=True)
        return DecayInputs(q_BTHK=r, k_BTHK=k, v_BTHV=v, log_f_BTHK=log_w, skip=(bonus_BTH1 * v).to(v.dtype))

    def project(self, x_BTD: Tensor, ctx: Context) -> DecayInputs:
        """The inputs of the recurrence: every write one step late."""
        return delayed(self.writes(self.mixtures(x_BTD, ctx), ctx))

    def recur(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """As every mixer's, but the gate needs the token shift of `project`, and the last write has yet to reach the state."""
        mixtures = self.mixtures(x_BTD, ctx)
        ctx.aside["gate"] = mixtures[-1]
        written = self.writes(mixtures, ctx)
        if ctx.lengths_B is not None:
            written = written.masked(ctx.lengths_B)
        o, (S_BHKV,) = families.recur(delayed(written), self.spec.backend, ctx.state["op"] if ctx.state else None)
        if ctx.return_state:
            ctx.next_state["op"] = (last_written(written, S_BHKV),)
        return o, written.skip

    def finish(self, o: Tensor, x_BTD: Tensor, ctx: Context) -> Tensor:
        """The read-out, with the gate's mixture for its input."""
        return self.readout(o, ctx.aside["gate"])

    def readout(self, o: Tensor, x_BTD: Tensor) -> Tensor:
        """Norm per head, swish gate, output projection; `x_BTD` is the gate's mixture."""
        o_BTD = o.flatten(-2).to(self.out_proj.weight.dtype)
        normed_BTD = self.norm(o_BTD.flatten(0, 1)).view_as(o_BTD)
        out_BTD: Tensor = self.out_proj(normed_BTD * F.silu(self.gate_proj(x_BTD)))
        return out_BTD

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """H matrices of K x K numbers, whatever the length, the last input of the token shift, and the convolution buffers."""
        return 4 * self.heads * self.head_k**2 + itemsize * (self.spec.d_model + conv_buffers(self))

    def op_flops(self, seq_len: int) -> float:
        """5 K K per head (decay 1, outer product and its addition 2, read-out 2), 5 K for the bonus; 2 R D for each of the five U_s."""
        return self.heads * (5.0 * self.head_k**2 + 5 * self.head_k) + 10 * self.mix_rank * self.spec.d_model

    def effective(self) -> dict[str, Any]:
        """Heads, scale, shift and gates as built."""
        return {
            "local_mixing": "token shift" + (f", conv {self.spec.conv}" if self.spec.conv else ""),
            "heads": self.heads,
            "head_k": self.head_k,
            "head_v": self.head_k,
            "scale": 1.0,
            "input_activation": "none",
            "output_gate": "silu, after the norm",
            "norm": "GroupNorm per head",
            "bias": False,
            "forget_bias": "subtracted from decay",
            "gate_dtype": "float32",
        }


def delayed(written: DecayInputs) -> DecayInputs:
    """Key, value and log decay one step later, neutral at the first: S is then read before the write of its own step."""
    k, v, log_f = (F.pad(t, (0, 0, 0, 0, 1, -1)) for t in (written.k_BTHK, written.v_BTHV, written.log_f_BTHK))
    return replace(written, k_BTHK=k, v_BTHV=v, log_f_BTHK=log_f)


def last_written(written: DecayInputs, S_BHKV: Tensor) -> Tensor:
    """The state after the last step's write, which `delayed` has left out."""
    k, v, log_f = (t[:, -1].to(S_BHKV.dtype) for t in (written.k_BTHK, written.v_BTHV, written.log_f_BTHK))
    return log_f.exp()[..., None] * S_BHKV + k[..., None] * v[..., None, :]
