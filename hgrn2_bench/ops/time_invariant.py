"""The time-invariant recurrence in pure PyTorch, chunk by chunk; `chunked` takes `diagonal_ssm` from here.

All steps have one decay, so a chunk is three matrices per channel that serve every chunk: its own inputs to its outputs (the convolution
kernel's first taps as a Toeplitz matrix), its inputs to the state it adds, and the state before it to its outputs. The usual way is one FFT
convolution of the whole sequence. This one is about as fast on a CPU, has the states at hand, and lets no rounding pass from a token to
earlier outputs.

Shape letters: B batch, T time, D channels, N states per channel, P = 2 N real numbers of them; c chunks, R = c x B rows, L steps per
chunk, s the powers 0 to L.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hgrn2_bench.ops import reference
from hgrn2_bench.ops.families import DiagonalSSMInputs, State
from hgrn2_bench.ops.scans import DiagonalScan

LONGEST = 64
"""Steps of the longest chunk: of 32, 64 and 128 the fastest for the published 32 states, forward and backward, on a CPU."""


def diagonal_ssm(inputs: DiagonalSSMInputs, state: State | None) -> tuple[Tensor, State]:
    """h_t = a h_{t-1} + x_t, o_t = Re(sum_n C_n h_tn); shapes as in `DiagonalSSMInputs`.

    In a chunk that starts from h, o_i = sum_{j <= i} Re(sum_n C_n a_n^(i-j)) x_j + Re(sum_n C_n a_n^(i+1) h_n), and the next chunk
    starts from a^L h + sum_j a^(L-1-j) x_j. Powers are computed in float64: float32 would lose the phase of high powers.
    """
    dtype = reference.wide_dtype(inputs.x_BTD, inputs.log_a_DN, inputs.theta_DN, inputs.C_DN)
    B, T, D = inputs.x_BTD.shape
    if T == 1:
        return reference.diagonal_ssm(inputs, state)  # a single step has nothing to gain from a chunk
    c = math.ceil(T / LONGEST)
    L = math.ceil(T / c)
    x_BTD, powers_DNs = inputs.x_BTD.to(dtype), _powers(inputs, L)
    x_DRL = F.pad(x_BTD, (0, 0, 0, c * L - T)).reshape(B, c, L, D).permute(3, 1, 0, 2).reshape(D, c * B, L)
    h0_BDN = powers_DNs.new_zeros(B, D, powers_DNs.shape[1]) if state is None else state[0]
    with torch.autocast(x_BTD.device.type, enabled=False):
        writes_DLP = _pairs(powers_DNs[..., :L].flip(-1).mT).to(dtype)
        added_cDBN = _complex(x_DRL @ writes_DLP).unflatten(1, (c, B)).transpose(0, 1)
        before_cDBN = _states_before(inputs, L, added_cDBN, h0_BDN.transpose(0, 1).to(dtype.to_complex()))
        within_DLL, reads_DPL = (m.to(dtype) for m in _outputs(powers_DNs, inputs.C_DN))
        o_DRL = torch.baddbmm(x_DRL @ within_DLL.mT, _pairs(before_cDBN.transpose(0, 1).flatten(1, 2)), reads_DPL)
        final_BDN = _final_state(x_BTD, inputs.lengths_B, before_cDBN, writes_DLP, powers_DNs)
    o_BTD = o_DRL.reshape(D, c, B, L).permute(2, 1, 3, 0).reshape(B, c * L, D)[:, :T]
    return o_BTD.to(inputs.x_BTD.dtype), (final_BDN,)


def _powers(inputs: DiagonalSSMInputs, L: int) -> Tensor:
    """a^0 to a^L, (D, N, L + 1), in complex128."""
    steps_s = torch.arange(L + 1, device=inputs.log_a_DN.device, dtype=torch.float64)
    # e^-1000 is 0 in float64: the floor changes no value, and makes 0^0 = 1 of a decay to exactly 0 (log a = -inf).
    log_a_DN1, theta_DN1 = inputs.log_a_DN.double().clamp(min=-1000.0)[..., None], inputs.theta_DN.double()[..., None]
    return torch.polar((log_a_DN1 * steps_s).exp(), theta_DN1 * steps_s)


def _outputs(powers_DNs: Tensor, C_DN: Tensor) -> tuple[Tensor, Tensor]:
    """What the inputs of a chunk (D, L, L) and the state before it (D, P, L) are multiplied by to give its outputs."""
    L = powers_DNs.shape[-1] - 1
    read_DNs = C_DN.to(powers_DNs.dtype)[..., None] * powers_DNs
    taps_DL = read_DNs[..., :L].real.sum(1)
    within_DLL = F.pad(taps_DL, (L - 1, 0)).unfold(-1, L, 1).flip(-1)  # row i holds taps i, i - 1, ..., 0, and then zeros
    return within_DLL, torch.stack([read_DNs[..., 1:].real, -read_DNs[..., 1:].imag], 2).flatten(1, 2)


def _states_before(inputs: DiagonalSSMInputs, L: int, added_cDBN: Tensor, h0_DBN: Tensor) -> Tensor:
    """The state before every chunk, (c, D, B, N), from what each chunk adds to it."""
    if len(added_cDBN) == 1:
        return h0_DBN[None]
    dtype = added_cDBN.real.dtype
    log_decay_D1N = (inputs.log_a_DN.double() * L).to(dtype)[:, None]
    turn_D1N = (inputs.theta_DN.double() * L).remainder(2 * math.pi).to(dtype)[:, None]
    added_cDBN = added_cDBN[:-1]
    after_cDBN = DiagonalScan.apply(log_decay_D1N.expand(len(added_cDBN), -1, -1, -1), turn_D1N, added_cDBN, h0_DBN)
    return torch.cat([h0_DBN[None], after_cDBN])


def _final_state(x_BTD: Tensor, lengths_B: Tensor | None, before_cDBN: Tensor, writes_DLP: Tensor, powers_DNs: Tensor) -> Tensor:
    """The state after each row's length, (B, D, N): that before the chunk in which the row ends, decayed, and what the chunk adds."""
    (B, T, D), L = x_BTD.shape, writes_DLP.shape[1]
    ends_B = torch.full((B,), T, device=x_BTD.device) if lengths_B is None else lengths_B.to(x_BTD.device)
    chunk_B = (ends_B // L).clamp(max=len(before_cDBN) - 1)
    token_BL = ends_B[:, None] - L + torch.arange(L, device=x_BTD.device)
    x_BLD = x_BTD.gather(1, token_BL.clamp(min=0)[..., None].expand(-1, -1, D))
    x_BLD = x_BLD.masked_fill((token_BL < chunk_B[:, None] * L)[..., None], 0)
    added_DBN = _complex(x_BLD.permute(2, 0, 1) @ writes_DLP)
    start_BDN = before_cDBN[chunk_B, :, torch.arange(B, device=x_BTD.device)]
    decay_BDN = powers_DNs[..., ends_B - chunk_B * L].permute(2, 0, 1).to(start_BDN.dtype)
    return torch.addcmul(added_DBN.transpose(0, 1), decay_BDN, start_BDN)


def _pairs(z: Tensor) -> Tensor:
    """(..., N) complex to (..., P) real."""
    return torch.view_as_real(z.contiguous()).flatten(-2)


def _complex(pairs: Tensor) -> Tensor:
    """(..., P) real to (..., N) complex."""
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))
