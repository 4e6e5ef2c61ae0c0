"""The truth: every recurrence step by step, exactly as its record in `families` writes it.

Computed in float32, or in float64 where any input is float64; outputs take the dtype of v (or x), states stay wide, except
that the cache of softmax keeps the dtype of its keys and values. Plain autograd, no tricks: slow, and easy to check by eye.

Shape letters: B batch, T time, S cached plus new time, H heads, K key, V value, M slots, D channels, N states per channel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hgrn2_bench.ops.families import (
    DecayInputs,
    DeltaInputs,
    DiagonalInputs,
    DiagonalLowRankInputs,
    DiagonalSSMInputs,
    ScalarDecayInputs,
    SelectiveInputs,
    SlotInputs,
    SoftmaxInputs,
    State,
)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The real dtype to compute in: float64 if any tensor has that precision, else float32."""
    double = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
    return torch.float64 if double else torch.float32


def per_channel_decay(inputs: DecayInputs, state: State | None) -> tuple[Tensor, State]:
    """S_t = diag(f_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t (HGRN2, arXiv 2404.07904, equation 7; GLA, arXiv 2312.06635)."""
    return _matrix_state(inputs, inputs.log_f_BTHK, state)


def scalar_decay(inputs: ScalarDecayInputs, state: State | None) -> tuple[Tensor, State]:
    """S_t = f_t S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, one f_t per head (RetNet, arXiv 2307.08621; Mamba2, arXiv 2405.21060)."""
    return _matrix_state(inputs, inputs.log_f_BTH[..., None], state)


def _matrix_state(inputs: DecayInputs | ScalarDecayInputs, log_f_BTHK: Tensor, state: State | None) -> tuple[Tensor, State]:
    dtype = wide_dtype(inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV, log_f_BTHK)
    q, k, v, log_f = (x.to(dtype) for x in (inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV, log_f_BTHK))
    B, _, H, K = q.shape
    S_BHKV = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state[0].to(dtype)
    o = []
    for q_BHK, k_BHK, v_BHV, f_BHK in zip(q.unbind(1), k.unbind(1), v.unbind(1), log_f.exp().unbind(1), strict=True):
        S_BHKV = f_BHK[..., None] * S_BHKV + k_BHK[..., None] * v_BHV[..., None, :]
        o.append(inputs.scale * (q_BHK[..., None] * S_BHKV).sum(-2))
    return torch.stack(o, 1).to(inputs.v_BTHV.dtype), (S_BHKV,)


def delta_rule(inputs: DeltaInputs, state: State | None) -> tuple[Tensor, State]:
    """S_t = f_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t.

    Gated DeltaNet, arXiv 2412.06464, section 3.1, whose state is the transpose of ours; DeltaNet, arXiv 2406.06484, is f_t = 1.
    Written as its factors: f_t S_{t-1} first, then beta_t of the difference between v_t and what k_t recalls from that.
    """
    log_f_BTH = torch.zeros_like(inputs.beta_BTH) if inputs.log_f_BTH is None else inputs.log_f_BTH
    dtype = wide_dtype(inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV, inputs.beta_BTH, log_f_BTH)
    q, k, v, beta = (x.to(dtype) for x in (inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV, inputs.beta_BTH[..., None]))
    f = log_f_BTH.to(dtype).exp()[..., None, None]
    B, _, H, K = q.shape
    S_BHKV = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state[0].to(dtype)
    o = []
    for q_BHK, k_BHK, v_BHV, beta_BH1, f_BH11 in zip(*(x.unbind(1) for x in (q, k, v, beta, f)), strict=True):
        S_BHKV = f_BH11 * S_BHKV
        u_BHV = beta_BH1 * (v_BHV - (k_BHK[..., None] * S_BHKV).sum(-2))
        S_BHKV = S_BHKV + k_BHK[..., None] * u_BHV[..., None, :]
        o.append(inputs.scale * (q_BHK[..., None] * S_BHKV).sum(-2))
    return torch.stack(o, 1).to(inputs.v_BTHV.dtype), (S_BHKV,)


def diagonal_low_rank(inputs: DiagonalLowRankInputs, state: State | None) -> tuple[Tensor, State]:
    """S_t = (diag(f_t) + b_t a_t^T) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t (RWKV7, arXiv 2503.14456, whose state is our transpose)."""
    given = (inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV, inputs.a_BTHK, inputs.b_BTHK, inputs.log_f_BTHK)
    q, k, v, a, b, log_f = (x.to(wide_dtype(*given)) for x in given)
    B, _, H, K = q.shape
    S_BHKV = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state[0].to(q.dtype)
    o = []
    for q_BHK, k_BHK, v_BHV, a_BHK, b_BHK, f_BHK in zip(*(x.unbind(1) for x in (q, k, v, a, b, log_f.exp())), strict=True):
        recalled_BHV = (a_BHK[..., None] * S_BHKV).sum(-2)
        S_BHKV = f_BHK[..., None] * S_BHKV + b_BHK[..., None] * recalled_BHV[..., None, :] + k_BHK[..., None] * v_BHV[..., None, :]
        o.append(inputs.scale * (q_BHK[..., None] * S_BHKV).sum(-2))
    return torch.stack(o, 1).to(inputs.v_BTHV.dtype), (S_BHKV,)


def gated_slots(inputs: SlotInputs, state: State | None) -> tuple[Tensor, State]:
    """slots_k_t = diag(f_t) slots_k_{t-1} + s_t k_t^T, slots_v_t alike, o_t = slots_v_t^T softmax(scale slots_k_t q_t).

    Gated Slot Attention, arXiv 2409.07146, section 3.
    """
    dtype = wide_dtype(inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV, inputs.s_BTHM, inputs.log_f_BTHM)
    q, k, v, s = (x.to(dtype) for x in (inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV, inputs.s_BTHM[..., None]))
    f = inputs.log_f_BTHM.to(dtype).exp()[..., None]
    B, _, H, M, _ = f.shape
    slots_k_BHMK, slots_v_BHMV = (q.new_zeros(B, H, M, x.shape[-1]) for x in (k, v)) if state is None else (x.to(dtype) for x in state)
    o = []
    for q_BHK, k_BHK, v_BHV, s_BHM1, f_BHM1 in zip(*(x.unbind(1) for x in (q, k, v, s, f)), strict=True):
        slots_k_BHMK = f_BHM1 * slots_k_BHMK + s_BHM1 * k_BHK[..., None, :]
        slots_v_BHMV = f_BHM1 * slots_v_BHMV + s_BHM1 * v_BHV[..., None, :]
        p_BHM = (inputs.scale * (slots_k_BHMK * q_BHK[..., None, :]).sum(-1)).softmax(-1)
        o.append((p_BHM[..., None] * slots_v_BHMV).sum(-2))
    return torch.stack(o, 1).to(inputs.v_BTHV.dtype), (slots_k_BHMK, slots_v_BHMV)


def diagonal_scan(inputs: DiagonalInputs, state: State | None) -> tuple[Tensor, State]:
    """h_t = exp(log_a_t + i theta_t) h_{t-1} + x_t, o_t = h_t (HGRN1, arXiv 2311.04823; LRU, arXiv 2303.06349)."""
    dtype = wide_dtype(inputs.x_BTD, inputs.log_a_BTD)
    a_BTD = inputs.log_a_BTD.to(dtype).exp()
    if inputs.theta is not None:
        a_BTD = a_BTD * torch.exp(1j * inputs.theta.to(dtype))
    x_BTD = inputs.x_BTD.to(a_BTD.dtype)
    h_BD = torch.zeros_like(x_BTD[:, 0]) if state is None else state[0].to(a_BTD.dtype)
    o = []
    for a_BD, x_BD in zip(a_BTD.unbind(1), x_BTD.unbind(1), strict=True):
        h_BD = a_BD * h_BD + x_BD
        o.append(h_BD)
    return torch.stack(o, 1).to(inputs.x_BTD.dtype), (h_BD,)


def diagonal_ssm(inputs: DiagonalSSMInputs, state: State | None) -> tuple[Tensor, State]:
    """h_t = exp(log_a + i theta) h_{t-1} + x_t, o_t = Re(sum_n C_n h_tn), the same at every step (S4D, arXiv 2206.11893)."""
    dtype = wide_dtype(inputs.x_BTD, inputs.log_a_DN, inputs.theta_DN, inputs.C_DN)
    a_DN = inputs.log_a_DN.to(dtype).exp() * torch.exp(1j * inputs.theta_DN.to(dtype))
    C_DN = inputs.C_DN.to(a_DN.dtype)
    h_BDN = a_DN.new_zeros(len(inputs.x_BTD), *a_DN.shape) if state is None else state[0].to(a_DN.dtype)
    final_BDN, o = h_BDN, []
    for t, x_BD in enumerate(inputs.x_BTD.to(dtype).unbind(1)):
        h_BDN = a_DN * h_BDN + x_BD[..., None]
        o.append((C_DN * h_BDN).sum(-1).real)
        if inputs.lengths_B is None:
            final_BDN = h_BDN
        else:
            final_BDN = torch.where((t < inputs.lengths_B.to(h_BDN.device))[:, None, None], h_BDN, final_BDN)
    return torch.stack(o, 1).to(inputs.x_BTD.dtype), (final_BDN,)


def selective_scan(inputs: SelectiveInputs, state: State | None) -> tuple[Tensor, State]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, o_t = h_t C_t (Mamba, arXiv 2312.00752, algorithm 2 with B discretised as dt B)."""
    dtype = wide_dtype(inputs.x_BTD, inputs.dt_BTD, inputs.A_DN, inputs.B_BTN, inputs.C_BTN)
    x, dt, B, C = (t.to(dtype).unbind(1) for t in (inputs.x_BTD, inputs.dt_BTD, inputs.B_BTN, inputs.C_BTN))
    A_DN = inputs.A_DN.to(dtype)
    h_BDN = A_DN.new_zeros(len(inputs.x_BTD), *A_DN.shape) if state is None else state[0].to(dtype)
    o = []
    for x_BD, dt_BD, B_BN, C_BN in zip(x, dt, B, C, strict=True):
        h_BDN = (dt_BD[..., None] * A_DN).exp() * h_BDN + (dt_BD * x_BD)[..., None] * B_BN[:, None]
        o.append((h_BDN * C_BN[:, None]).sum(-1))
    return torch.stack(o, 1).to(inputs.x_BTD.dtype), (h_BDN,)


def softmax(inputs: SoftmaxInputs, state: State | None) -> tuple[Tensor, State]:
    """o_t = sum_s softmax_s(scale q_t k_s) v_s; a query that sees no key at all gives 0.

    With a cache the queries are the last T of the S = P + T positions, so that query t sees keys s <= P + t.
    """
    k_BSHK, v_BSHV = cached_keys(inputs, state)
    dtype = wide_dtype(inputs.q_BTHK, k_BSHK, v_BSHV)
    visible = visible_keys(inputs, k_BSHK.shape[1])
    with torch.autocast(inputs.q_BTHK.device.type, enabled=False):
        scores_BHTS = inputs.scale * torch.einsum("bthk,bshk->bhts", inputs.q_BTHK.to(dtype), k_BSHK.to(dtype))
        # The lowest finite number, and not -inf, keeps a row without any key free of NaN, backward too; the product gives its zeros.
        weights_BHTS = scores_BHTS.masked_fill(~visible, torch.finfo(dtype).min).softmax(-1) * visible
        weights_BHTS = F.dropout(weights_BHTS, inputs.dropout)
        o_BTHV = torch.einsum("bhts,bshv->bthv", weights_BHTS, v_BSHV.to(dtype))
    return o_BTHV.to(inputs.v_BTHV.dtype), (k_BSHK, v_BSHV)


def cached_keys(inputs: SoftmaxInputs, state: State | None) -> State:
    """The cache with the new keys and values appended: (k_BSHK, v_BSHV). ValueError where padding would end up inside a cache."""
    if state is None:
        return inputs.k_BTHK, inputs.v_BTHV
    if inputs.lengths_B is not None:
        raise ValueError(
            "softmax takes lengths or a cache, not both: a padded prompt leaves gaps in its cache; decode rows of equal length."
        )
    return torch.cat([state[0], inputs.k_BTHK], 1), torch.cat([state[1], inputs.v_BTHV], 1)


def visible_keys(inputs: SoftmaxInputs, S: int) -> Tensor:
    """Which key each query may see, (T, S), with lengths (B, 1, T, S); one row for all queries, T = 1, without the causal mask."""
    T, device = inputs.q_BTHK.shape[1], inputs.q_BTHK.device
    visible = torch.ones(T if inputs.causal else 1, S, dtype=torch.bool, device=device)
    if inputs.causal:
        visible = visible.tril(S - T)
    if inputs.lengths_B is not None:
        visible = visible & (torch.arange(S, device=device) < inputs.lengths_B.to(device)[:, None])[:, None, None]
    return visible
