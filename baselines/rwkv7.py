"""RWKV-7 (Goose): a vector-valued delta rule with token shift and a value residual (arXiv 2503.14456).

Each token is mixed with the one before, x^s_t = x_t + mu_s * (x_{t-1} - x_t), with a mu for each of s = r, w, k, v, a, g. Per head of K
channels:

    r_t, k_t, v_t = W_r x^r_t, W_k x^k_t, W_v x^v_t
    w_t = exp(-e^-0.5 sigmoid(w_0 + W_w2 tanh(W_w1 x^w_t)))                  decay per channel, above 0.545
    eta_t = sigmoid(a_0 + W_a2 W_a1 x^a_t)                                    in-context learning rate per channel
    g_t = W_g2 sigmoid(W_g1 x^g_t)                                            output gate
    v_t <- v_t + (v^0_t - v_t) * sigmoid(v_0 + W_v2 W_v1 x^v_t)               v^0: the values of its first layer; later ones only
    kappa_t = norm(xi * k_t);  k_t <- k_t * (1 + (eta_t - 1) * alpha)         removal key, of unit length per head; replacement key
    S_t = (diag(w_t) - (eta_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T       state, K x K; the paper writes its transpose
    p_t = GroupNorm(S_t^T r_t) + (r_t . (rho * k_t)) v_t                      norm per head; bonus of the current token
    out = W_o (g_t * p_t)

As published in BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py (RWKV_Tmix_x070), and fla, fla/layers/rwkv7.py. Only the time mixing is
here: the published block's channel mixing shifts tokens too. mu, w_0, a_0, v_0, xi, alpha, rho and the weights of the norm start as
published. The matrices start in the published ranges too, except that W_w1, W_a1, W_v1, W_g1 and W_o, published as zeros, start as
`nn.Linear` does.

Shape letters: B batch, T time, D width, H heads, K key, V value (= K), R a low rank.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec, fewest_heads, heads_of
from hgrn2_bench.layers import ShortConv, conv_buffers, split_heads, token_shift
from hgrn2_bench.ops.families import DiagonalLowRankInputs

HEAD_K = 64  # of the published models
LEAST_LOG_F = -math.exp(-0.5)
SHIFT_POWERS = (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)  # of r, w, k, v, a, g: mu = 1 - (channel / D)^(power * share of the layers still to come)


def low_rank(d_model: int, factor: float) -> int:
    """The published rank: `factor` sqrt(D) rounded to a multiple of 32, at least 32; here never more than D."""
    return min(d_model, max(32, 32 * round(factor * math.sqrt(d_model) / 32)))


class LowRank(nn.Module):
    """W_2 act(W_1 x) with W_1 (R, D) and W_2 (D, R), the latter orthogonal with gain 0.1 as published."""

    def __init__(self, d_model: int, rank: int, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.activation, self.second = nn.Linear(d_model, rank, bias=False), activation, nn.Linear(rank, d_model, bias=False)
        nn.init.orthogonal_(self.second.weight, gain=0.1 * math.sqrt(max(1.0, rank / d_model)))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.second(self.activation(self.first(x_BTD)))


class RWKV7(Mixer):
    """The published time mixing: 4 D^2 weights and 2 D per rank. `head_dim=None` takes as few heads as keep them within 64 channels.

    Ranks given as None are the published ones, capped at D. `forget_bias` is subtracted from w_0: for small sigmoids, -log w shrinks by
    exp(-forget_bias), as -log f of a sigmoid gate near 1 does. Layers after the first need the `carry` that layer 0 of the call filled.
    """

    version: ClassVar[int] = 1
    gated: ClassVar[bool] = True
    family: ClassVar[str] = "diagonal_low_rank"
    state_setting: ClassVar[str] = "head_dim"
    no_weight_decay: ClassVar[tuple[str, ...]] = ("mu", "rho")
    in_readout: ClassVar[tuple[str, ...]] = ("out_proj",)

    head_dim: int | None = None
    decay_low_rank_dim: int | None = None
    a_low_rank_dim: int | None = None
    v_low_rank_dim: int | None = None
    gate_low_rank_dim: int | None = None

    def __init__(self, spec: MixerSpec) -> None:
        super().__init__(spec)
        D = spec.d_model
        K = self.head_k = D // fewest_heads(D, HEAD_K) if self.head_dim is None else self.head_dim
        H = self.heads = heads_of(D, K, "head_dim")
        if K == 1:
            raise ConfigError("head_dim must be at least 2: the norm per head would leave nothing of a single channel")
        self.ranks = self._ranks()
        self.mu, self.rho = nn.Parameter(torch.empty(6, D)), nn.Parameter(torch.empty(H, K))
        self.w_0, self.a_0, self.xi, self.alpha = (nn.Parameter(torch.empty(D)) for _ in range(4))
        self.r_proj, self.k_proj, self.v_proj = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.w_proj, self.a_proj = LowRank(D, self.ranks["w"], nn.Tanh()), LowRank(D, self.ranks["a"], nn.Identity())
        if spec.layer > spec.first:
            self.v_0, self.mix_proj = nn.Parameter(torch.empty(D)), LowRank(D, self.ranks["v"], nn.Identity())
        if spec.conv:
            self.conv_r, self.conv_k, self.conv_v = (ShortConv(D, spec.conv, f"conv_{s}") for s in "rkv")
        self.gate_proj = LowRank(D, self.ranks["g"], nn.Sigmoid())
        self.norm = nn.GroupNorm(H, D, eps=1e-5 * K)
        self.out_proj = nn.Linear(D, D, bias=False)
        self.init_vectors()
        for projection, bound in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5)):
            nn.init.uniform_(projection.weight, -bound * D**-0.5, bound * D**-0.5)

    def _ranks(self) -> dict[str, int]:
        D = self.spec.d_model
        given = {"w": self.decay_low_rank_dim, "a": self.a_low_rank_dim, "v": self.v_low_rank_dim, "g": self.gate_low_rank_dim}
        published = {"w": low_rank(D, 2.5), "a": low_rank(D, 2.5), "v": low_rank(D, 1.7), "g": low_rank(D, 5.0)}
        ranks = {name: published[name] if rank is None else rank for name, rank in given.items()}
        if min(ranks.values()) < 1:
            raise ConfigError(f"the low ranks must be at least 1; they are {', '.join(f'{n}: {r}' for n, r in ranks.items())}")
        return ranks

    @torch.no_grad()
    def init_vectors(self) -> None:
        """The published values, which depend on the channel, on its place in the head and on the layer; w_0 less `spec.forget_bias`.

        Once: w_0 is no bias of a projection, so nothing zeroes it, and `init_forget_bias` has nothing to restore.
        """
        D, layer, L = self.spec.d_model, self.spec.layer, self.spec.num_layers
        depth, channel_D = layer / max(1, L - 1), torch.linspace(0, 1, D)
        curve_D = torch.linspace(-1, 1, self.head_k).repeat(self.heads)
        zigzag_D, centred_D = curve_D * curve_D.abs(), channel_D - 0.5
        for mu_D, power in zip(self.mu, SHIFT_POWERS, strict=True):
            mu_D.copy_(1 - (torch.arange(D) / D) ** (power * (1 - layer / L)))
        self.w_0.copy_(-5.5 + 6 * channel_D ** (1 + depth**0.3) + 2.5 * zigzag_D - self.spec.forget_bias)
        self.a_0.copy_(-0.19 + 0.3 * zigzag_D + 0.4 * centred_D)
        if layer > self.spec.first:
            self.v_0.copy_(0.73 - 0.4 * centred_D)
        self.xi.copy_(0.71 - 0.1 * centred_D)
        self.alpha.fill_(1.02)
        self.rho.fill_(-0.04)
        self.norm.weight.fill_(((layer + 1) / L) ** 0.7)

    def project(self, x_BTD: Tensor, ctx: Context) -> DiagonalLowRankInputs:
        """Queries, keys, values and the transition, the latter in float32 or wider; the bonus and the output gate go aside."""
        delta_BTD = token_shift(x_BTD, ctx) - x_BTD
        x_r, x_w, x_k, x_v, x_a, x_g = (x_BTD + delta_BTD * mu_D for mu_D in self.mu)
        r, k, v = self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)
        if self.spec.conv:
            r, k, v = self.conv_r(r, ctx), self.conv_k(k, ctx), self.conv_v(v, ctx)
        v = self._with_first_values(v, x_v, ctx)
        logit_w, logit_a = self.w_proj(x_w), self.a_proj(x_a)
        dtype = torch.promote_types(logit_w.dtype, torch.float32)
        log_w = LEAST_LOG_F * torch.sigmoid(logit_w.to(dtype) + self.w_0.to(dtype))
        eta = torch.sigmoid(logit_a.to(dtype) + self.a_0.to(dtype))
        kappa = F.normalize(split_heads(k.to(dtype) * self.xi.to(dtype), self.heads), dim=-1)
        k = k * (1 + (eta - 1) * self.alpha).to(k.dtype)
        r, k, v, log_w, eta = (split_heads(t, self.heads) for t in (r, k, v, log_w, eta))
        ctx.aside["bonus"] = ((r * k * self.rho).sum(-1, keepdim=True) * v).flatten(-2)
        ctx.aside["gate"] = self.gate_proj(x_g)
        return DiagonalLowRankInputs(r, k, v, -kappa, eta * kappa, log_w, least_log_f=LEAST_LOG_F)

    def _with_first_values(self, v_BTD: Tensor, x_BTD: Tensor, ctx: Context) -> Tensor:
        """Layer 0 leaves its values in `ctx.carry`; a later layer moves its own towards them. ValueError where they are missing."""
        if self.spec.layer == self.spec.first:
            ctx.carry["values"] = v_BTD
            return v_BTD
        if "values" not in ctx.carry:
            raise ValueError(
                f"RWKV7 in layer {self.spec.layer} mixes in the values of layer {self.spec.first}: pass it the `carry` that layer filled"
            )
        share_BTD = torch.sigmoid(self.mix_proj(x_BTD) + self.v_0)
        return v_BTD + (ctx.carry["values"].to(v_BTD.dtype) - v_BTD) * share_BTD.to(v_BTD.dtype)

    def finish(self, o: Tensor, x_BTD: Tensor, ctx: Context) -> Tensor:
        """Norm per head, bonus, gate, output projection."""
        o_ND = o.to(self.out_proj.weight.dtype).flatten(-2).flatten(0, 1)
        p_BTD = self.norm(o_ND).view(x_BTD.shape) + ctx.aside["bonus"]
        out_BTD: Tensor = self.out_proj(p_BTD * ctx.aside["gate"])
        return out_BTD

    def state_size(self, seq_len: int, itemsize: int = 4) -> int:
        """H matrices of K x K numbers, whatever the length, the last input (4 bytes a number: no projection made it), the convolutions."""
        return 4 * self.heads * self.head_k**2 + 4 * self.spec.d_model + itemsize * conv_buffers(self)

    def op_flops(self, seq_len: int) -> float:
        """9 K^2 per head (decay 1; what a recalls, its outer product with b, that of k and v, each with its addition, and read-out 2 each).

        Per channel: token shift 13, keys 6, bonus 5, and 3 for the value residual.
        """
        return 9.0 * self.heads * self.head_k**2 + (24 + 3 * (self.spec.layer > self.spec.first)) * self.spec.d_model

    def effective(self) -> dict[str, Any]:
        """Heads, ranks, gates and local mixing as built."""
        return {
            "heads": self.heads,
            "head_k": self.head_k,
            "head_v": self.head_k,
            "scale": 1.0,
            "ranks": self.ranks,
            "local_mixing": "token shift" + (f", conv {self.spec.conv}" if self.spec.conv else ""),
            "input_activation": "none",
            "output_gate": "low rank, after the norm",
            "norm": "GroupNorm per head",
            "bias": False,
            "forget_bias": "subtracted from w_0, w = exp(-0.607 sigmoid(logit))",
            "gate_dtype": "float32",
        }
