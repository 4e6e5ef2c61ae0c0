"""The CUDA default: each family on the Triton kernel of flash-linear-attention (fla), the same kernel whatever the length.

But a single token without gradient, as in decoding, goes to the recurrent kernel: a chunk kernel would compute 64 tokens for it.
Gates and states are computed in fp32; the output has the dtype of `v` (matrix states) or `x` (diagonal scan).
Mamba's selective scan is absent on purpose: its fast kernel is in another package. So is S4D's recurrence, for which fla has none.
Shape letters as in `families`; E is 2D: the real and imaginary parts of D complex channels, side by side.
"""

import functools
import importlib
import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.ops import autotune, tuned
from hgrn2_bench.ops.chunked import softmax as softmax  # torch's own attention kernel on every backend
from hgrn2_bench.ops.families import (
    DecayInputs,
    DeltaInputs,
    DiagonalInputs,
    DiagonalLowRankInputs,
    OpInputs,
    ScalarDecayInputs,
    SlotInputs,
    State,
    over_time,
)

# Triton multiplies matrices of at least 16 rows and columns, and in half precision fla refuses the gradient of a scalar decay where K or
# V is odd: such heads are padded with zeros, which changes no result. Fewer slots are repeated: an empty slot would take its share of the
# softmax, while r equal ones share what one had.
MIN_HEAD_DIM = 16

MAX_SCANNED = 4
"""Heads of at most so many keys and values are scanned as the K x V numbers they are. On an H100 (B=128, T=1024, D=128, forward and
backward, bf16) heads of 1 took 2.0 ms in place of 50 padded to 16, and 0.7 GB in place of 19; heads of 4, each kernel at one configuration,
4.9 ms in place of 50. Larger heads were not compared with both kernels tuned."""

MAX_GRID = 65_535
"""Blocks that CUDA takes along a launch's second or third axis, where fla's chunk kernels have one for each head of each sequence."""

MatrixInputs = DecayInputs | ScalarDecayInputs | DeltaInputs | DiagonalLowRankInputs
HeadInputs = MatrixInputs | SlotInputs

_KERNELS = {
    "per_channel_decay": ("fla.ops.gla", "chunk_gla"),
    "scalar_decay": ("fla.ops.simple_gla", "chunk_simple_gla"),
    "delta_rule": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    "delta_rule without decay": ("fla.ops.delta_rule", "chunk_delta_rule"),
    "diagonal_low_rank": ("fla.ops.generalized_delta_rule", "chunk_dplr_delta_rule"),
    "gated_slots": ("fla.ops.gsa", "chunk_gsa"),
    "diagonal_scan": ("fla.ops.hgrn", "fused_recurrent_hgrn"),
}
_TOKEN_KERNELS = {
    "per_channel_decay": ("fla.ops.gla", "fused_recurrent_gla"),
    "scalar_decay": ("fla.ops.simple_gla", "fused_recurrent_simple_gla"),
    "delta_rule": ("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule"),
    "delta_rule without decay": ("fla.ops.delta_rule", "fused_recurrent_delta_rule"),
    "diagonal_low_rank": ("fla.ops.generalized_delta_rule", "fused_recurrent_dplr_delta_rule"),
    "gated_slots": ("fla.ops.gsa", "fused_recurrent_gsa"),
}
"""For one token. They multiply no matrices on tensor cores, so they take every head dimension, and any number of slots."""


Recurrence = Callable[[Any, State | None], tuple[Tensor, State]]


def in_parts(run: Recurrence) -> Recurrence:
    """`run`, a chunk kernel's recurrence over heads, on parts of the batch one after another where the whole exceeds `MAX_GRID`.

    Two-dimensional scans do: every line of every image is a sequence, once for each direction.
    """

    @functools.wraps(run)
    def in_turn(inputs: HeadInputs, state: State | None) -> tuple[Tensor, State]:
        B, _, H, _ = inputs.v_BTHV.shape
        if B * H <= MAX_GRID or _is_token(inputs) or _is_scanned(inputs):  # what else runs has its sequences on the first axis
            return run(inputs, state)
        most = MAX_GRID // H
        done = [run(*_part(inputs, state, slice(start, start + most))) for start in range(0, B, most)]
        return torch.cat([o for o, _ in done]), tuple(map(torch.cat, zip(*(final for _, final in done), strict=True)))

    return in_turn


def _part(inputs: OpInputs, state: State | None, rows: slice) -> tuple[OpInputs, State | None]:
    """Some rows of the batch."""
    return over_time(inputs, lambda x: x[rows]), None if state is None else tuple(x[rows] for x in state)


@in_parts
def per_channel_decay(inputs: DecayInputs, state: State | None) -> tuple[Tensor, State]:
    """GLA's chunk kernel (arXiv 2312.06635, section 4): o (B, T, H, V), state (S_BHKV,) in fp32; the tiniest heads go to HGRN's scan."""
    if _is_scanned(inputs):
        return _elementwise(inputs, state)
    return _matrix_state(inputs, (_fitted(inputs, inputs.log_f_BTHK.float(), 1),), state)


@in_parts
def scalar_decay(inputs: ScalarDecayInputs, state: State | None) -> tuple[Tensor, State]:
    """The chunk kernel for one decay per head (Mamba2, arXiv 2405.21060, section 6): o (B, T, H, V), state (S_BHKV,) in fp32."""
    return _matrix_state(inputs, (inputs.log_f_BTH.float(),), state)


@in_parts
def delta_rule(inputs: DeltaInputs, state: State | None) -> tuple[Tensor, State]:
    """The chunk kernels of Gated DeltaNet and DeltaNet (arXiv 2412.06464, 2406.06484): o (B, T, H, V), state (S_BHKV,) in fp32.

    DeltaNet's chunk kernel refuses float32, which goes to the gated one with log decays of 0: the same recurrence, and no precision lost.
    """
    beta_BTH = inputs.beta_BTH.float()
    if _entry(inputs) != inputs.family:
        return _matrix_state(inputs, (), state, beta=beta_BTH)
    log_f_BTH = torch.zeros_like(beta_BTH) if inputs.log_f_BTH is None else inputs.log_f_BTH.float()
    return _matrix_state(inputs, (log_f_BTH,), state, beta=beta_BTH)


@in_parts
def diagonal_low_rank(inputs: DiagonalLowRankInputs, state: State | None) -> tuple[Tensor, State]:
    """The chunk kernel of RWKV7 (arXiv 2503.14456): o (B, T, H, V), state (S_BHKV,) in fp32.

    In half precision a promised bound of the decay lets the kernel take chunks of 64 steps on tensor cores. That path inverts a matrix in
    fp16, so float32 keeps to the other one, chunks of 16. fla itself warns that float32 may not run on every GPU.
    """
    a, b = (_fitted(inputs, x.to(inputs.v_BTHV.dtype), 1) for x in (inputs.a_BTHK, inputs.b_BTHK))
    options = {} if _is_token(inputs) else {"lower_bound": _tensor_core_bound(inputs)}
    return _matrix_state(inputs, (a, b, _fitted(inputs, inputs.log_f_BTHK.float(), 1)), state, **options)


@in_parts
def gated_slots(inputs: SlotInputs, state: State | None) -> tuple[Tensor, State]:
    """GSA's chunk kernel (arXiv 2409.07146): o (B, T, H, V), state (slots_k_BHMK, slots_v_BHMV) in fp32."""
    K, V, M, dtype = inputs.k_BTHK.shape[-1], inputs.v_BTHV.shape[-1], inputs.s_BTHM.shape[-1], inputs.v_BTHV.dtype
    copies = 1 if _is_token(inputs) else -(-MIN_HEAD_DIM // M)
    slots = None if state is None else [_fitted(inputs, x.float(), 1).repeat(1, 1, copies, 1) for x in state]
    o_BTHV, (slots_k_BHKM, slots_v_BHMV) = _kernel(inputs)(
        _fitted(inputs, inputs.q_BTHK.to(dtype), 1),
        _fitted(inputs, inputs.k_BTHK.to(dtype), 1),
        _fitted(inputs, inputs.v_BTHV, 1),
        inputs.s_BTHM.to(dtype).repeat(1, 1, 1, copies),
        inputs.log_f_BTHM.float().repeat(1, 1, 1, copies),
        scale=inputs.scale,
        initial_state=None if slots is None else (slots[0].mT, slots[1]),
        output_final_state=True,
    )
    return o_BTHV[..., :V].to(dtype), (slots_k_BHKM.mT[:, :, :M, :K], slots_v_BHMV[:, :, :M, :V])


def diagonal_scan(inputs: DiagonalInputs, state: State | None) -> tuple[Tensor, State]:
    """HGRN's recurrent kernel (arXiv 2311.04823): o (B, T, D), state (h_BD,) in fp32 or complex64.

    Why not `chunk_hgrn`: it drops the gradients of the initial and the final state; and past two chunks of 128 steps its threads hand
    values to each other through global memory without a barrier, which cost 8 to 50% of the output on an H100 where the decay was slow.
    """
    h_BD = None if state is None else state[0]
    if inputs.theta is not None:
        return _rotating_scan(inputs.x_BTD, inputs.log_a_BTD, inputs.theta, h_BD)
    o_BTD, final_BD = _scan(inputs.x_BTD, inputs.log_a_BTD, h_BD)
    return o_BTD.to(inputs.x_BTD.dtype), (final_BD,)


def _is_scanned(inputs: OpInputs) -> bool:
    """Whether every number of the matrix states is a channel of the elementwise scan."""
    if not isinstance(inputs, DecayInputs) or _is_token(inputs):
        return False
    return max(inputs.k_BTHK.shape[-1], inputs.v_BTHV.shape[-1]) <= MAX_SCANNED


def _elementwise(inputs: DecayInputs, state: State | None) -> tuple[Tensor, State]:
    """Per-channel decay number by number: S_kv obeys S_t = f_k S_{t-1} + k_k v_v, which is HGRN's scan with D = H K V channels."""
    k_BTHK, v_BTHV = inputs.k_BTHK.float(), inputs.v_BTHV.float()
    x_BTHKV = k_BTHK[..., None] * v_BTHV[..., None, :]
    log_f_BTHKV = inputs.log_f_BTHK.float()[..., None].expand_as(x_BTHKV)
    S_BTD, final_BD = _scan(x_BTHKV.flatten(2), log_f_BTHKV.flatten(2), None if state is None else state[0].flatten(1))
    read_BTHV = (inputs.q_BTHK.float()[..., None] * S_BTD.view_as(x_BTHKV)).sum(-2) * inputs.scale
    return read_BTHV.to(inputs.v_BTHV.dtype), (final_BD.view(len(x_BTHKV), *x_BTHKV.shape[2:]),)


def kernel_name(inputs: OpInputs) -> str:
    """What computes these inputs, for the result row: `fla.chunk_gla`, `fla.chunk_gla (K padded 8 to 16)`, ...

    A single token has another kernel under `torch.no_grad()` than with gradients.
    """
    if inputs.family == "softmax":
        return "torch.scaled_dot_product_attention"
    if inputs.family not in _KERNELS:
        raise ConfigError(f"backend=fla has no {inputs.family}; use backend=chunked")
    entry = _entry(inputs)
    if _is_token(inputs) and entry in _TOKEN_KERNELS:
        return f"fla.{_TOKEN_KERNELS[entry][1]}"
    notes: list[str] = []
    if isinstance(inputs, DeltaInputs) and inputs.log_f_BTH is None and entry == inputs.family:
        notes = ["no decay: chunk_delta_rule in half precision"]
    if isinstance(inputs, DiagonalLowRankInputs):
        bound = _tensor_core_bound(inputs)
        notes = ["chunks of 16" if bound is None else f"log f >= {bound:.4g}"]
    if _is_scanned(inputs):
        notes = ["every number of the state a channel"]
    elif isinstance(inputs, MatrixInputs | SlotInputs):
        sizes = {"K": inputs.k_BTHK.shape[-1], "V": inputs.v_BTHV.shape[-1]}
        notes += [f"{letter} padded {size} to {_padded_size(size)}" for letter, size in sizes.items() if size != _padded_size(size)]
    if isinstance(inputs, SlotInputs) and inputs.s_BTHM.shape[-1] < MIN_HEAD_DIM:
        notes.append(f"slots repeated {-(-MIN_HEAD_DIM // inputs.s_BTHM.shape[-1])} times")
    if isinstance(inputs, DiagonalInputs) and inputs.theta is not None:
        notes = ["complex channels as pairs of real ones"]
    name = f"fla.{_KERNELS[entry][1]}"
    return f"{name} ({', '.join(notes)})" if notes else name


def load(inputs: OpInputs) -> None:
    """Import the kernel of these inputs, so that its tuners can be set before it first runs; torch's own attention needs nothing."""
    if inputs.family in _KERNELS:
        _kernel(inputs)


def _entry(inputs: OpInputs) -> str:
    """The entry of `_KERNELS`, or for a token of `_TOKEN_KERNELS`, that runs these inputs."""
    if isinstance(inputs, DeltaInputs) and inputs.log_f_BTH is None and (_is_token(inputs) or inputs.v_BTHV.dtype != torch.float32):
        return "delta_rule without decay"
    return "diagonal_scan" if _is_scanned(inputs) else inputs.family


def _is_token(inputs: OpInputs) -> bool:
    """Whether these are one token's inputs of which no gradient is asked: most recurrent kernels of fla have none."""
    length: int = (inputs.x_BTD if isinstance(inputs, DiagonalInputs) else inputs.v_BTHV).shape[1]  # type: ignore[attr-defined]
    return length == 1 and not torch.is_grad_enabled()


def _tensor_core_bound(inputs: DiagonalLowRankInputs) -> float | None:
    """The bound of the log decay that fla may build on, or None for the kernel that is exact in float32."""
    return None if inputs.v_BTHV.dtype == torch.float32 else inputs.least_log_f


def _matrix_state(inputs: MatrixInputs, gates: tuple[Tensor, ...], state: State | None, **options: Any) -> tuple[Tensor, State]:
    """Run a kernel with the scale given, never the kernel's default, and every head dimension padded to one that it takes."""
    K, V, dtype = inputs.k_BTHK.shape[-1], inputs.v_BTHV.shape[-1], inputs.v_BTHV.dtype
    o_BTHV, final_BHKV = _kernel(inputs)(
        _fitted(inputs, inputs.q_BTHK.to(dtype), 1),
        _fitted(inputs, inputs.k_BTHK.to(dtype), 1),
        _fitted(inputs, inputs.v_BTHV, 1),
        *gates,
        scale=inputs.scale,
        initial_state=None if state is None else _fitted(inputs, state[0].float(), 2),
        output_final_state=True,
        **options,
    )
    return o_BTHV[..., :V].to(dtype), (final_BHKV[..., :K, :V],)


def _scan(x_BTD: Tensor, log_a_BTD: Tensor, h_BD: Tensor | None) -> tuple[Tensor, Tensor]:
    """The real scan in fp32, whatever the dtype of x: the kernel would keep its outputs, hence its gradients, in that dtype."""
    h_BD = None if h_BD is None else h_BD.float()
    o_BTD, final_BD = _function(*_KERNELS["diagonal_scan"])(x_BTD.float(), log_a_BTD.float(), initial_state=h_BD, output_final_state=True)
    return o_BTD, final_BD


def _rotating_scan(x_BTD: Tensor, log_a_BTD: Tensor, theta: Tensor, h_BD: Tensor | None) -> tuple[Tensor, State]:
    """The complex scan as a real one, in coordinates that turn with the cumulative phase phi.

    g_t = exp(-i phi_t) h_t obeys g_t = exp(log_a_t) g_{t-1} + exp(-i phi_t) x_t. Its decay is real, so the real and imaginary parts
    are channels like any other.
    """
    turn_TD = _turn(theta, x_BTD.shape[1])  # (T, D), or (B, T, D) where theta depends on the input
    x_BTE = _parts(x_BTD.to(torch.complex64) * turn_TD.conj())
    log_a_BTE = log_a_BTD.repeat_interleave(2, dim=-1)
    o_BTE, final_BE = _scan(x_BTE, log_a_BTE, None if h_BD is None else _parts(h_BD.to(torch.complex64)))
    return (_complex(o_BTE) * turn_TD).to(x_BTD.dtype), (_complex(final_BE) * turn_TD[..., -1, :],)


def _turn(theta: Tensor, T: int) -> Tensor:
    """exp(i phi_t), phi_t the sum of the angles up to t: summed in float64, since phi grows with T and only its remainder counts."""
    theta_TD = theta.double() if theta.ndim == 3 else theta.double().expand(T, -1)
    phi_TD = torch.remainder(theta_TD.cumsum(-2), 2 * math.pi).float()
    return torch.polar(torch.ones_like(phi_TD), phi_TD)


def _parts(z: Tensor) -> Tensor:
    """(..., D) complex to (..., 2D) real."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


def _complex(parts: Tensor) -> Tensor:
    """(..., 2D) real to (..., D) complex."""
    return torch.view_as_complex(parts.reshape(*parts.shape[:-1], -1, 2))


def _padded_size(size: int) -> int:
    """The least even head dimension from `MIN_HEAD_DIM` that holds `size`."""
    return max(MIN_HEAD_DIM, size + size % 2)


def _fitted(inputs: OpInputs, x: Tensor, dims: int) -> Tensor:
    """`x` as the kernel takes it: padded where it is a chunk kernel."""
    return x if _is_token(inputs) else _padded(x, dims)


def _padded(x: Tensor, dims: int) -> Tensor:
    """Zeros appended to each of the last `dims` dimensions, up to its `_padded_size`."""
    missing = [_padded_size(size) - size for size in x.shape[::-1][:dims]]
    return F.pad(x, [n for m in missing for n in (0, m)]) if any(missing) else x


def _kernel(inputs: OpInputs) -> Callable[..., Any]:
    """The fla function that runs these inputs."""
    return _function(*(_TOKEN_KERNELS if _is_token(inputs) else _KERNELS)[_entry(inputs)])


@functools.cache
def _function(module: str, name: str) -> Callable[..., Any]:
    """A function of fla, which is imported here, at the first call, because that takes 8 seconds."""
    tuned.point()  # fla reads its environment when it is imported
    for other in ("FLA_TILELANG", "FLA_FLASH_QLA"):  # packages whose kernels fla would take instead of those that a row names
        os.environ.setdefault(other, "0")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "fla":
            raise
        raise ConfigError("CUDA runs need fla: pip install flash-linear-attention, or pass backend=chunked") from error
    autotune.cut()
    tuned.fill()
    return found


def load_all() -> None:
    """Import fla with all its kernels. ConfigError where it is not installed."""
    for module, name in (*_KERNELS.values(), *_TOKEN_KERNELS.values()):
        _function(module, name)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up in the dtype of both, computed in fp32."""
    return _function("fla.modules.activations", "swiglu")(gate, up)  # type: ignore[no-any-return]


def causal_conv(x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor | None) -> Tensor:
    """Causal depthwise convolution over time in the dtype of x, zeros before the start."""
    y_BTD: Tensor = _function("fla.modules.causal_conv1d.ops", "causal_conv1d")(x_BTD, weight_DW, bias_D)[0]
    return y_BTD


def linear_cross_entropy(x_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> Tensor:
    """Mean cross-entropy in fp32 of the logits x W^T, which exist a chunk of rows at a time; gradients are made in the forward pass.

    Under autocast both are cast here, where autograd casts their gradients back: the kernel would multiply fp32 weights in fp32. It sums
    the weight's gradient over its at most 8 chunks in their type; fp32 sums would need fp32 copies of the logits, and fp32 products.
    """
    if torch.is_autocast_enabled(x_MD.device.type):
        half = torch.get_autocast_dtype(x_MD.device.type)
        x_MD, weight_VD = x_MD.to(half), weight_VD.to(half)
    loss = _function("fla.modules.fused_linear_cross_entropy", "fused_linear_cross_entropy_loss")
    mean: Tensor = loss(x_MD, labels_M, weight_VD, accumulate_grad_in_fp32=weight_VD.dtype == torch.float32)
    return mean


def cross_entropy(logits_MV: Tensor, labels_M: Tensor) -> Tensor:
    """Mean cross-entropy in fp32 of logits in any dtype, whose memory its backward takes for their gradient: they cannot be used after."""
    losses_M, _ = _function("fla.modules.fused_cross_entropy", "cross_entropy_loss")(logits_MV, labels_M, inplace_backward=True)
    mean: Tensor = losses_M.mean()
    return mean


def register_language_models() -> None:
    """Tell transformers of fla's language models, so that its Auto classes know their folders."""
    importlib.import_module("fla.models")
