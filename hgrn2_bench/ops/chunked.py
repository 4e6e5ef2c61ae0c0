"""The CPU default: every recurrence in pure PyTorch, fast enough to train on, equal to `reference` in outputs and gradients.

The matrix-state families work chunk by chunk: inside a chunk all pairs of steps at once as masked attention, between chunks one
update of the state per chunk (GLA, arXiv 2312.06635, section 4). The elementwise families run the scans of `scans`.

Shape letters: B batch, T time, H heads, K key, V value, D channels, N states per channel, or slots per head;
c chunks, M = B x H rows, L steps per chunk.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hgrn2_bench.ops import reference
from hgrn2_bench.ops.families import (
    DecayInputs,
    DeltaInputs,
    DiagonalInputs,
    DiagonalLowRankInputs,
    ScalarDecayInputs,
    SelectiveInputs,
    SlotInputs,
    SoftmaxInputs,
    State,
)
from hgrn2_bench.ops.scans import LOG2E, DiagonalScan, SelectiveScan, scan_rows
from hgrn2_bench.ops.time_invariant import diagonal_ssm as diagonal_ssm

_LIMITS = {torch.float32: (64, -30.0), torch.float64: (32, -60.0)}
"""Steps of the longest chunk, and the least log2 f of a step; half a chunk of it is at most 960, see `_PerChannelDecay`."""


def per_channel_decay(inputs: DecayInputs, state: State | None) -> tuple[Tensor, State]:
    """S_t = diag(f_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t; shapes as in `DecayInputs`."""
    dtype = reference.wide_dtype(inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV, inputs.log_f_BTHK)
    B, T, H, K = inputs.q_BTHK.shape
    if T == 1:
        return reference.per_channel_decay(inputs, state)  # a single step has nothing to gain from a chunk
    if K == 1:
        return _one_key(inputs, state, dtype)
    longest, floor = _LIMITS[dtype]
    L = _chunk_length(T, K, longest)
    q, k, v, log_f = (_chunks(x.to(dtype), L) for x in (inputs.q_BTHK * inputs.scale, inputs.k_BTHK, inputs.v_BTHV, inputs.log_f_BTHK))
    S0 = None if state is None else state[0].to(dtype).flatten(0, 1)
    with torch.autocast(v.device.type, enabled=False):
        o, S = _PerChannelDecay.apply(q, k, v, log_f, S0, floor)
    return _unchunk(o, B, T).to(inputs.v_BTHV.dtype), (S.unflatten(0, (B, H)),)


def scalar_decay(inputs: ScalarDecayInputs, state: State | None) -> tuple[Tensor, State]:
    """S_t = f_t S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t; shapes as in `ScalarDecayInputs`.

    One decay per head, so the decay between every pair of steps of a chunk is a small matrix: 2^(G_i - G_j), never above 1.
    G is float64: after one strong decay, differences of later sums would drown in float32's rounding.
    """
    dtype = reference.wide_dtype(inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV, inputs.log_f_BTH)
    B, T, H, K = inputs.q_BTHK.shape
    if T == 1:
        return reference.scalar_decay(inputs, state)  # a single step has nothing to gain from a chunk
    L = _chunk_length(T, K, 64)
    q, k, v = (_chunks(x.to(dtype), L) for x in (inputs.q_BTHK * inputs.scale, inputs.k_BTHK, inputs.v_BTHV))
    G = _log2_decays(inputs.log_f_BTH, L)
    with torch.autocast(v.device.type, enabled=False):
        A = _bmm(q, k.mT) * _decays_of_pairs(G, dtype)
        o = _bmm(A, v)
        S = _bmm((k * (G[:, :, -1:] - G).to(dtype).exp2()).mT, v)
        if len(S) > 1 or state is not None:
            S0 = torch.zeros_like(S[0]) if state is None else state[0].to(dtype).flatten(0, 1)
            S = DiagonalScan.apply(G[:, :, -1:].to(dtype) / LOG2E, None, S, S0)
            o = o + _bmm(q * G.to(dtype).exp2(), torch.cat([S0[None], S[:-1]]))
    return _unchunk(o, B, T).to(inputs.v_BTHV.dtype), (S[-1].clone().unflatten(0, (B, H)),)


def delta_rule(inputs: DeltaInputs, state: State | None) -> tuple[Tensor, State]:
    """S_t = f_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = scale S_t^T q_t; shapes as in `DeltaInputs`.

    In a chunk that starts from S, S_i = e^G_i S + sum_{j <= i} e^(G_i - G_j) k_j u_j^T, where u_i = beta_i (v_i - what k_i recalls from
    f_i S_{i-1}). Put in, u_i depends on the u_j before it: (I + A) u = beta v - beta e^G k S with a strictly triangular A. Solving for
    both terms first leaves two small products per chunk that wait for S (arXiv 2406.06484, section 3; arXiv 2412.06464, section 3.3).
    """
    given = (inputs.q_BTHK * inputs.scale, inputs.k_BTHK, inputs.v_BTHV, inputs.beta_BTH[..., None])
    dtype = reference.wide_dtype(*given, *[] if inputs.log_f_BTH is None else [inputs.log_f_BTH])
    B, T, H, K = inputs.q_BTHK.shape
    if T == 1:
        return reference.delta_rule(inputs, state)  # a single step has nothing to gain from a chunk
    L = _chunk_length(T, K, 64)
    q, k, v, beta = (_chunks(x.to(dtype), L) for x in given)
    with torch.autocast(v.device.type, enabled=False):
        pairs, since_start, to_end = _delta_decays(inputs.log_f_BTH, v)
        carried = len(v) > 1 or state is not None
        right = torch.cat([v, k * since_start], -1) if carried else v
        A = _bmm(beta * k, k.mT) * pairs  # of which only what is below the diagonal is read
        u, w = torch.linalg.solve_triangular(A, beta * right, upper=False, unitriangular=True).tensor_split([v.shape[-1]], -1)
        if carried:
            S0 = v.new_zeros(B * H, K, v.shape[-1]) if state is None else state[0].to(dtype).flatten(0, 1)
            u, before, S = _carry_delta(u, w, k * to_end, since_start[:, :, -1:], S0)
            o = _bmm(_bmm(q, k.mT) * pairs, u) + _bmm(q * since_start, before)
        else:
            o, S = _bmm(_bmm(q, k.mT) * pairs, u), (k[0] * to_end[0]).mT @ u[0]
    return _unchunk(o, B, T).to(inputs.v_BTHV.dtype), (S.unflatten(0, (B, H)),)


def diagonal_low_rank(inputs: DiagonalLowRankInputs, state: State | None) -> tuple[Tensor, State]:
    """S_t = (diag(f_t) + b_t a_t^T) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t; shapes as in `DiagonalLowRankInputs`.

    In a chunk that starts from S, S_i = f^(0..i) S + sum_{j <= i} f^(j..i) (k_j v_j^T + b_j u_j^T), where u_i = S_{i-1}^T a_i and
    f^(j..i) is the decay from step j to step i. Put in, u_i depends on the u_j before it: (I - A_ab) u = A_ak v + a f^(0..i-1) S, with
    strictly triangular A. So k with v and b with u are two sets of keys and values of one masked attention, read by q and by a.
    """
    given = (inputs.q_BTHK * inputs.scale, inputs.k_BTHK, inputs.v_BTHV, inputs.a_BTHK, inputs.b_BTHK, inputs.log_f_BTHK)
    dtype = reference.wide_dtype(*given)
    B, T, H, K = inputs.q_BTHK.shape
    if T == 1:
        return reference.diagonal_low_rank(inputs, state)  # a single step has nothing to gain from a chunk
    L = _chunk_length(T, K, 32)
    q, k, v, a, b, log_f = (_chunks(x.to(dtype), L) for x in given)
    with torch.autocast(v.device.type, enabled=False):
        (A_qk, A_qb, A_ak, A_ab), beyond = _low_rank_chunks(q, k, a, b, _log2_of_bounded(log_f, inputs.least_log_f))
        q_start, a_start, k_end, b_end, total = beyond
        u, w = (torch.linalg.solve_triangular(-A_ab, x, upper=False, unitriangular=True) for x in (_bmm(A_ak, v), a_start))
        S0 = v.new_zeros(B * H, K, v.shape[-1]) if state is None else state[0].to(dtype).flatten(0, 1)
        u, before, S = _carry_low_rank(u, w, b_end, _bmm(k_end.mT, v), total, S0)
        o = _bmm(A_qk, v) + _bmm(A_qb, u) + _bmm(q_start, before)
    return _unchunk(o, B, T).to(inputs.v_BTHV.dtype), (S.unflatten(0, (B, H)),)


def gated_slots(inputs: SlotInputs, state: State | None) -> tuple[Tensor, State]:
    """o_t = slots_v_t^T softmax(scale slots_k_t q_t) over slots that decay one by one; shapes as in `SlotInputs`.

    Two passes (arXiv 2409.07146, section 3.2): the scores of the slots, then the softmax reads the values as the queries of a
    per-channel decay whose keys are the writing strengths s.
    """
    given = (inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV, inputs.s_BTHM, inputs.log_f_BTHM)
    dtype = reference.wide_dtype(*given)
    B, T, H, N = inputs.s_BTHM.shape
    if T == 1:
        return reference.gated_slots(inputs, state)  # a single step has nothing to gain from a chunk
    longest, floor = _LIMITS[dtype]
    L = _chunk_length(T, N, longest)
    q, k, v, s, log_f = (_chunks(x.to(dtype), L) for x in given)
    k0, v0 = (None, None) if state is None else (x.to(dtype).flatten(0, 1) for x in state)
    with torch.autocast(v.device.type, enabled=False):
        scores, slots_k = _slot_scores(q * inputs.scale, k, s, log_f, k0, floor)
        o, slots_v = _PerChannelDecay.apply(scores.softmax(-1), s, v, log_f, v0, floor)
    return _unchunk(o, B, T).to(inputs.v_BTHV.dtype), (slots_k.unflatten(0, (B, H)), slots_v.unflatten(0, (B, H)))


def diagonal_scan(inputs: DiagonalInputs, state: State | None) -> tuple[Tensor, State]:
    """h_t = exp(log_a_t + i theta_t) h_{t-1} + x_t, o_t = h_t; shapes as in `DiagonalInputs`."""
    dtype = reference.wide_dtype(inputs.x_BTD, inputs.log_a_BTD)
    theta = inputs.theta
    if theta is not None:
        theta = theta.to(dtype) if theta.ndim == 1 else _time_first(theta, dtype)
    x_TBD = inputs.x_BTD.transpose(0, 1).to(dtype if theta is None else dtype.to_complex())
    h0_BD = None if state is None else state[0].to(x_TBD.dtype)
    h_TBD = DiagonalScan.apply(_time_first(inputs.log_a_BTD, dtype), theta, x_TBD, h0_BD)
    return h_TBD.transpose(0, 1).to(inputs.x_BTD.dtype), (h_TBD[-1].clone(),)


def selective_scan(inputs: SelectiveInputs, state: State | None) -> tuple[Tensor, State]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, o_t = h_t C_t; shapes as in `SelectiveInputs`."""
    dtype = reference.wide_dtype(inputs.x_BTD, inputs.dt_BTD, inputs.A_DN, inputs.B_BTN, inputs.C_BTN)
    x, dt, B, C = (_time_first(t, dtype) for t in (inputs.x_BTD, inputs.dt_BTD, inputs.B_BTN, inputs.C_BTN))
    A_ND = inputs.A_DN.to(dtype).mT.contiguous()
    h0_BND = A_ND.new_zeros(x.shape[1], *A_ND.shape) if state is None else state[0].to(dtype).mT.contiguous()
    with torch.autocast(x.device.type, enabled=False):
        y_TBD, h_BND = SelectiveScan.apply(x, dt, A_ND, B, C, h0_BND)
    return y_TBD.transpose(0, 1).to(inputs.x_BTD.dtype), (h_BND.mT,)


def softmax(inputs: SoftmaxInputs, state: State | None) -> tuple[Tensor, State]:
    """o_t = sum_s softmax_s(scale q_t k_s) v_s by torch's own attention kernel; shapes and cache as in `SoftmaxInputs`.

    Computes in the dtype of v, as mixed precision asks, unlike the other families: there is no state to keep wide.
    """
    k_BSHK, v_BSHV = reference.cached_keys(inputs, state)
    T, S = inputs.q_BTHK.shape[1], k_BSHK.shape[1]
    # Padding is at the end: no true position sees any of it under the causal mask.
    triangular = inputs.causal and S == T
    everything = inputs.lengths_B is None and (T == 1 or not inputs.causal)
    mask = None if triangular or everything else reference.visible_keys(inputs, S)
    q, k, v = (x.to(v_BSHV.dtype).transpose(1, 2) for x in (inputs.q_BTHK, k_BSHK, v_BSHV))
    o_BHTV = F.scaled_dot_product_attention(q, k, v, mask, inputs.dropout, triangular, scale=inputs.scale)
    return o_BHTV.transpose(1, 2).to(inputs.v_BTHV.dtype), (k_BSHK, v_BSHV)


def _one_key(inputs: DecayInputs, state: State | None, dtype: torch.dtype) -> tuple[Tensor, State]:
    """Heads of one key channel (`expand_ratio=1`) are a diagonal scan of k v, a hundred times faster than 1 x 1 matrix states."""
    q, k, v, log_f = (_time_first(x, dtype) for x in (inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV, inputs.log_f_BTHK))
    S_TBHV = DiagonalScan.apply(log_f, None, k * v, None if state is None else state[0].squeeze(2).to(dtype))
    o_BTHV = (inputs.scale * q * S_TBHV).transpose(0, 1)
    return o_BTHV.to(inputs.v_BTHV.dtype), (S_TBHV[-1, :, :, None].clone(),)


def _slot_scores(q: Tensor, k: Tensor, s: Tensor, log_f: Tensor, S0: Tensor | None, floor: float) -> tuple[Tensor, Tensor]:
    """S_t q_t (c, M, L, N) and the final S (M, N, K), where S_t = diag(f_t) S_{t-1} + s_t k_t^T; all of (c, M, L, ...), S0 as S.

    The decay belongs to what is read, not to the scores of the pairs of steps: inside a chunk 2^G ((q k^T) (s 2^-G)), in float64 and
    with G from the middle of the chunk as in `_PerChannelDecay`. The middle cancels, so it takes no gradient; and no division, whose
    derivative would square 2^-G.
    """
    G = (log_f.double() * LOG2E).clamp(min=floor).cumsum(2)
    middle = G[:, :, G.shape[2] // 2, None].detach()
    decay, s_out = (G - middle).exp2(), s * (middle - G).exp2()
    scores = decay * _bmm(_bmm(q, k.mT).tril().double(), s_out)
    S = _bmm((s_out * decay[:, :, -1:]).to(q.dtype).mT, k)
    if len(S) > 1 or S0 is not None:
        S0 = torch.zeros_like(S[0]) if S0 is None else S0
        S = DiagonalScan.apply(G[:, :, -1:].mT.to(q.dtype) / LOG2E, None, S, S0)
        scores = scores + decay * middle.exp2() * _bmm(q, torch.cat([S0[None], S[:-1]]).mT)
    return scores.to(q.dtype), S[-1].clone()


def _log2_decays(log_f_BTH: Tensor, L: int) -> Tensor:
    """The sums of log2 f since the start of each chunk, G (c, M, L, 1), in float64."""
    # 2^-1100 is 0 in float64: the floor changes no value, and turns a decay to exactly 0 (log f = -inf) into a number.
    return (_chunks(log_f_BTH[..., None].double(), L) * LOG2E).clamp(min=-1100.0).cumsum(2)


def _decays_of_pairs(G: Tensor, dtype: torch.dtype) -> Tensor:
    """2^(G_i - G_j) for steps j <= i of a chunk, 0 for j > i: (c, M, L, L)."""
    after = torch.ones(G.shape[2], G.shape[2], dtype=torch.bool, device=G.device).triu(1)
    return (G - G.mT).masked_fill(after, -math.inf).to(dtype).exp2()


def _delta_decays(log_f_BTH: Tensor | None, v_cMLV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The decay from step j to step i of a chunk (0 for j > i), from the chunk's start to each step, and from each step to its end."""
    c, _, L, _ = v_cMLV.shape
    if log_f_BTH is None:
        one = v_cMLV.new_ones(()).expand(c, 1, L, 1)
        return v_cMLV.new_ones(L, L).tril(), one, one
    G = _log2_decays(log_f_BTH, L)
    return _decays_of_pairs(G, v_cMLV.dtype), G.to(v_cMLV.dtype).exp2(), (G[:, :, -1:] - G).to(v_cMLV.dtype).exp2()


def _carry_delta(u: Tensor, w: Tensor, k_out: Tensor, total: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chunk after chunk, u - w S and S' = total S + k_out^T (u - w S): all u (c, M, L, V), the states before each chunk, the last state."""
    corrected, before = [], []
    for u_MLV, w_MLK, k_MLK, total_M11 in zip(u, w, k_out, total, strict=True):
        before.append(S)
        corrected.append(torch.baddbmm(u_MLV, w_MLK, S, alpha=-1))
        S = torch.baddbmm(total_M11 * S, k_MLK.mT, corrected[-1])
    return torch.stack(corrected), torch.stack(before), S


def _log2_of_bounded(log_f: Tensor, least: float | None) -> Tensor:
    """log2 f, in the given dtype where `least` says that 16 steps decay by no more than 2^-60, else in float64 and cut at -60."""
    if least is not None and 16 * least * LOG2E >= -60:
        return (log_f * LOG2E).clamp(min=least * LOG2E)
    return (log_f.double() * LOG2E).clamp(min=-60.0)


def _low_rank_chunks(q: Tensor, k: Tensor, a: Tensor, b: Tensor, log2_f: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Inside chunks of at most 32 steps, the scores A_qk, A_qb, A_ak, A_ab (c, M, L, L); and what reaches beyond a chunk.

    The latter: q and a as they read the state before the chunk, and k and b as they are left at its end, all (c, M, L, K); the decay of
    that state over the chunk (c, M, K, 1).

    As in `_PerChannelDecay`, the scores are products around the middle of the chunk: 16 steps to either side, so that 2^960 is the largest
    power in float64, and what overflows above the diagonal is dropped. a reads the state before its own step's decay: it sees the steps
    before it only, over one decay less than q.
    """
    dtype, G = q.dtype, log2_f.cumsum(2)
    middle = G[:, :, (q.shape[2] - 1) // 2, None]
    G = G - middle
    decay, to_middle = G.exp2(), middle.exp2()
    q, a, k, b = q * decay, a * (G - log2_f).exp2(), k / decay, b / decay
    scores = [_bmm(x, y.mT).tril(diagonal).to(dtype) for x, diagonal in ((q, 0), (a, -1)) for y in (k, b)]
    to_end = decay[:, :, -1:]
    beyond = [q * to_middle, a * to_middle, k * to_end, b * to_end, (to_middle * to_end).mT]
    return scores, [x.to(dtype) for x in beyond]


def _carry_low_rank(u: Tensor, w: Tensor, b_end: Tensor, added: Tensor, total: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chunk after chunk, u + w S and S' = total S + added + b_end^T (u + w S): all u (c, M, L, V), the states before, the last state."""
    recalled, before = [], []
    for u_MLV, w_MLK, b_MLK, added_MKV, total_MK1 in zip(u, w, b_end, added, total, strict=True):
        before.append(S)
        recalled.append(torch.baddbmm(u_MLV, w_MLK, S))
        S = torch.baddbmm(torch.addcmul(added_MKV, total_MK1, S), b_MLK.mT, recalled[-1])
    return torch.stack(recalled), torch.stack(before), S


class _PerChannelDecay(torch.autograd.Function):
    """(q_cMLK, k_cMLK, v_cMLV, log_f_cMLK, S0_MKV or None, floor) -> (o_cMLV, final state S_MKV).

    With G the sum of log2 f from the middle of its chunk, the scores are (q 2^G) (k 2^-G)^T: one product, always in float64,
    where 2^G stays finite because log2 f is cut at `floor` and half a chunk of it is at most 960 (2^1023 is the largest power).
    A step cut at 2^-30 in float32 or 2^-60 in float64 has forgotten everything to within rounding, so nothing else changes.
    Above the diagonal the product may overflow to inf or NaN; `tril` drops it.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, S0: Tensor | None, floor: float) -> tuple[Tensor, Tensor]:
        """The masked scores A of every chunk; the state before every chunk; o = A v + q 2^(G since the chunk's start) S."""
        c, M, L, K = q.shape
        G = log_f.to(torch.float64, copy=True).mul_(LOG2E).clamp_(min=floor).cumsum_(2)
        middle = G[:, :, L // 2, None].clone()
        decay, to_middle = G.sub_(middle).exp2_(), middle.exp2()
        q_in, k_out, to_end = q * decay, k / decay, decay[:, :, -1:]
        A = _bmm(q_in, k_out.mT).tril_().to(v.dtype)
        o = _bmm(A, v)
        states = v.new_empty(c + 1, M, K, v.shape[-1])
        states[0] = 0 if S0 is None else S0
        torch.bmm((k_out * to_end).to(v.dtype).flatten(0, 1).mT, v.flatten(0, 1), out=states[1:].flatten(0, 1))
        ctx.carried = c > 1 or S0 is not None
        if ctx.carried:
            scan_rows((to_middle * to_end).to(v.dtype).mT.unbind(0), states.unbind(0))
            o += _bmm((q_in * to_middle).to(v.dtype), states[:-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q_in, k_out, v, decay, to_middle, A, states)
        return o, states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dS: Tensor | None) -> tuple[Tensor | None, ...]:
        """The decays enter only as q 2^G, as k 2^-G and through the state at the chunk's end, so dG = q dq - k dk, plus S dS at the end."""
        q_in, k_out, v, decay, to_middle, A, states = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dS0, dG_end = None, 0.0
        with torch.autocast(v.device.type, enabled=False):
            dA = _bmm(do, v.mT).tril_().double()
            dq_in, dk_out, dv = _bmm(dA, k_out), _bmm(dA.mT, q_in), _bmm(A.mT, do)
            if ctx.carried or dS is not None:
                to_end = decay[:, :, -1:]
                q_start, k_end, chunk_decay = (t.to(v.dtype) for t in (q_in * to_middle, k_out * to_end, (to_middle * to_end).mT))
                dstates = torch.zeros_like(states)
                dstates[:-1] = _bmm(q_start.mT, do)
                if dS is not None:
                    dstates[-1] = dS
                scan_rows(chunk_decay.unbind(0)[::-1], dstates.unbind(0)[::-1])
                dq_in.addcmul_(_bmm(do, states[:-1].mT).double(), to_middle)
                dk_out.addcmul_(_bmm(v, dstates[1:].mT).double(), to_end)
                dv += _bmm(k_end, dstates[1:])
                dS0, dG_end = dstates[0], (states[1:] * dstates[1:]).sum(-1)[:, :, None]
        dG = (q_in * dq_in).addcmul_(k_out, dk_out, value=-1)
        dlog_f = dG.sub_(sums := dG.cumsum(2)).add_(sums[:, :, -1:] + dG_end)  # the sum from each step to the end of its chunk
        dq, dk = dq_in.mul_(decay).to(v.dtype), dk_out.div_(decay).to(v.dtype)
        return dq, dk, dv, dlog_f.to(v.dtype), dS0 if ctx.needs_input_grad[4] else None, None


def _bmm(x_cMij: Tensor, y_cMjk: Tensor) -> Tensor:
    return (x_cMij.flatten(0, 1) @ y_cMjk.flatten(0, 1)).unflatten(0, x_cMij.shape[:2])


def _chunk_length(T: int, K: int, longest: int) -> int:
    """Steps per chunk: about K, where pairs of steps and updates of the state cost the same, and the least padding for that."""
    longest = min(longest, max(16, K))
    return math.ceil(T / math.ceil(T / longest))


def _chunks(x_BTHF: Tensor, L: int) -> Tensor:
    """(B, T, H, F) to (c, B x H, L, F), padded with zeros at the end: a zero key and log decay leave the state alone."""
    B, T, H, _ = x_BTHF.shape
    c = math.ceil(T / L)
    if c * L > T:
        x_BTHF = F.pad(x_BTHF, (0, 0, 0, 0, 0, c * L - T))
    return x_BTHF.reshape(B, c, L, H, -1).permute(1, 0, 3, 2, 4).reshape(c, B * H, L, -1)


def _unchunk(x_cMLF: Tensor, B: int, T: int) -> Tensor:
    """(c, B x H, L, F) back to (B, T, H, F)."""
    x_cBHLF = x_cMLF.unflatten(1, (B, -1))
    return x_cBHLF.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]


def _time_first(x_BTF: Tensor, dtype: torch.dtype) -> Tensor:
    return x_BTF.to(dtype).transpose(0, 1).contiguous()
