"""One record of inputs per recurrence family, and the one place that runs them on a backend.

Shape letters: B batch, T time, H heads, K key, V value, M slots, D channels, N states per channel.
Every implementation module (`reference`, `chunked`, `fla`) has one function per family, named as the record's `family`:
`f(inputs, state) -> (outputs, final state)`, where a state is a tuple of tensors and None means the start (zeros, or an empty cache).
Recurrent states are fp32 or wider.
"""

import dataclasses
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

State = tuple[Tensor, ...]


class OpInputs(Protocol):
    """What a mixer's `project` returns: the inputs of one recurrence, and an optional skip term added once to its output."""

    family: ClassVar[str]

    @property
    def skip(self) -> Tensor | None:
        """Added once to the output."""
        ...

    def masked(self, lengths_B: Tensor) -> "OpInputs":
        """The same inputs with positions at and after each row's length made neutral: the state passes them unchanged."""
        ...


@dataclass(frozen=True)
class DecayInputs:
    """Per-channel decay (HGRN2, GLA): S_t = diag(exp(log_f_t)) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t; state (S_BHKV,)."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    log_f_BTHK: Tensor
    scale: float = 1.0
    skip: Tensor | None = None
    family: ClassVar[str] = "per_channel_decay"

    def masked(self, lengths_B: Tensor) -> "DecayInputs":
        """Zero key and log decay at the padding."""
        return replace(self, k_BTHK=zero_padding(self.k_BTHK, lengths_B), log_f_BTHK=zero_padding(self.log_f_BTHK, lengths_B))


@dataclass(frozen=True)
class ScalarDecayInputs:
    """Scalar decay per head (RetNet, Mamba2): S_t = exp(log_f_t) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t; state (S_BHKV,)."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    log_f_BTH: Tensor
    scale: float = 1.0
    skip: Tensor | None = None
    family: ClassVar[str] = "scalar_decay"

    def masked(self, lengths_B: Tensor) -> "ScalarDecayInputs":
        """Zero key and log decay at the padding."""
        return replace(self, k_BTHK=zero_padding(self.k_BTHK, lengths_B), log_f_BTH=zero_padding(self.log_f_BTH, lengths_B))


@dataclass(frozen=True)
class DeltaInputs:
    """Delta rule: S_t = exp(log_f_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = scale * S_t^T q_t; state (S_BHKV,).

    `log_f_BTH` is None where nothing decays (DeltaNet), one number per head in Gated DeltaNet. The keys are expected to have unit length:
    k_t then recalls the share 1 - beta_t of the value it recalled before, and the share beta_t of v_t.
    """

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    beta_BTH: Tensor
    log_f_BTH: Tensor | None = None
    scale: float = 1.0
    skip: Tensor | None = None
    family: ClassVar[str] = "delta_rule"

    def masked(self, lengths_B: Tensor) -> "DeltaInputs":
        """Zero beta and log decay at the padding."""
        log_f_BTH = None if self.log_f_BTH is None else zero_padding(self.log_f_BTH, lengths_B)
        return replace(self, beta_BTH=zero_padding(self.beta_BTH, lengths_B), log_f_BTH=log_f_BTH)


@dataclass(frozen=True)
class DiagonalLowRankInputs:
    """Diagonal plus low rank (RWKV7): S_t = (diag(exp(log_f_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t; state (S_BHKV,).

    b_t receives what a_t recalls from S_{t-1}, before any decay. The transition must not grow the state: RWKV7 has a_t = -kappa_t of unit
    length and b_t = eta_t kappa_t with eta_t in (0, 1). `least_log_f` is a bound that the mixer promises for log_f, if it knows one;
    it changes no result, and lets `chunked` and `fla` take faster paths.
    """

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    a_BTHK: Tensor
    b_BTHK: Tensor
    log_f_BTHK: Tensor
    scale: float = 1.0
    least_log_f: float | None = None
    skip: Tensor | None = None
    family: ClassVar[str] = "diagonal_low_rank"

    def masked(self, lengths_B: Tensor) -> "DiagonalLowRankInputs":
        """Zero k, b and log decay at the padding."""
        k_BTHK, b_BTHK = zero_padding(self.k_BTHK, lengths_B), zero_padding(self.b_BTHK, lengths_B)
        return replace(self, k_BTHK=k_BTHK, b_BTHK=b_BTHK, log_f_BTHK=zero_padding(self.log_f_BTHK, lengths_B))


@dataclass(frozen=True)
class SlotInputs:
    """Gated slots (GSA): keys and values are written into M slots per head, and a query reads the values by softmax over the slots.

    slots_k_t = diag(exp(log_f_t)) slots_k_{t-1} + s_t k_t^T, slots_v_t = diag(exp(log_f_t)) slots_v_{t-1} + s_t v_t^T,
    o_t = slots_v_t^T softmax(scale * slots_k_t q_t); state (slots_k_BHMK, slots_v_BHMV). `s_BTHM` is normally 1 - exp(log_f).
    """

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    s_BTHM: Tensor
    log_f_BTHM: Tensor
    scale: float = 1.0
    skip: Tensor | None = None
    family: ClassVar[str] = "gated_slots"

    def masked(self, lengths_B: Tensor) -> "SlotInputs":
        """Zero writing strength and log decay at the padding."""
        return replace(self, s_BTHM=zero_padding(self.s_BTHM, lengths_B), log_f_BTHM=zero_padding(self.log_f_BTHM, lengths_B))


@dataclass(frozen=True)
class DiagonalInputs:
    """Diagonal scan (HGRN1, LRU): h_t = exp(log_a_t + i theta_t) h_{t-1} + x_t, o_t = h_t; state (h_BD,).

    `x_BTD` is complex exactly when a phase `theta` is given; `theta` has shape (D,) (one angle per channel) or (B, T, D).
    """

    x_BTD: Tensor
    log_a_BTD: Tensor
    theta: Tensor | None = None
    skip: Tensor | None = None
    family: ClassVar[str] = "diagonal_scan"

    def masked(self, lengths_B: Tensor) -> "DiagonalInputs":
        """Zero input, log decay and phase at the padding."""
        theta = None if self.theta is None else zero_padding(self.theta.expand(self.log_a_BTD.shape), lengths_B)
        x_BTD, log_a_BTD = zero_padding(self.x_BTD, lengths_B), zero_padding(self.log_a_BTD, lengths_B)
        return replace(self, x_BTD=x_BTD, log_a_BTD=log_a_BTD, theta=theta)


@dataclass(frozen=True)
class DiagonalSSMInputs:
    """Time-invariant system (S4D): h_t = exp(log_a + i theta) h_{t-1} + x_t, o_t = Re(sum_n C_n h_tn); state (h_BDN,), complex.

    One real input and N complex states per channel; `log_a_DN` is at most 0, `C_DN` complex, and the product of a source's B and C. All
    steps have one decay, so padding cannot stop it: past a row's length the outputs decay on, and the final state is that at the length.
    """

    x_BTD: Tensor
    log_a_DN: Tensor
    theta_DN: Tensor
    C_DN: Tensor
    lengths_B: Tensor | None = None
    skip: Tensor | None = None
    family: ClassVar[str] = "diagonal_ssm"

    def masked(self, lengths_B: Tensor) -> "DiagonalSSMInputs":
        """Zero input at the padding, and the final state at the true lengths."""
        return replace(self, x_BTD=zero_padding(self.x_BTD, lengths_B), lengths_B=lengths_B)


@dataclass(frozen=True)
class SelectiveInputs:
    """Selective scan (Mamba): h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, o_t = h_t C_t; `A_DN` is negative; state (h_BDN,)."""

    x_BTD: Tensor
    dt_BTD: Tensor
    A_DN: Tensor
    B_BTN: Tensor
    C_BTN: Tensor
    skip: Tensor | None = None
    family: ClassVar[str] = "selective_scan"

    def masked(self, lengths_B: Tensor) -> "SelectiveInputs":
        """Zero step size at the padding: the decay is then 1 and the input 0."""
        return replace(self, dt_BTD=zero_padding(self.dt_BTD, lengths_B))


@dataclass(frozen=True)
class SoftmaxInputs:
    """Softmax attention: o_t = sum_s softmax_s(scale q_t k_s) v_s over s <= t (`causal`) or all s; state (k_BSHK, v_BSHV), the cache."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    scale: float
    causal: bool = True
    lengths_B: Tensor | None = None
    dropout: float = 0.0
    """Share of the weights set to 0 after the softmax, the others scaled up; for training only."""
    skip: Tensor | None = None
    family: ClassVar[str] = "softmax"

    def masked(self, lengths_B: Tensor) -> "SoftmaxInputs":
        """Hide the keys at the padding."""
        return replace(self, lengths_B=lengths_B)


def zero_padding(x: Tensor, lengths_B: Tensor) -> Tensor:
    """`x` (B, T, ...) with 0 at positions t >= length, whatever stands there (-inf and NaN too)."""
    padding_BT = torch.arange(x.shape[1], device=x.device) >= lengths_B.to(x.device)[:, None]
    return x.masked_fill(padding_BT.reshape(*padding_BT.shape, *[1] * (x.ndim - 2)), 0)


def over_time(inputs: OpInputs, change: Callable[[Tensor], Tensor]) -> OpInputs:
    """The same inputs without skip term, every tensor over time, (B, T, ...), changed; what has two axes at most is not over time."""
    fields = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}  # type: ignore[arg-type]
    changed = {name: change(x) for name, x in fields.items() if name != "skip" and isinstance(x, Tensor) and x.ndim > 2}
    return replace(inputs, **changed, skip=None)  # type: ignore[type-var]


def run(inputs: OpInputs, backend: str, state: State | None = None) -> tuple[Tensor, State]:
    """Run one recurrence on a resolved backend (`reference`, `chunked` or `fla`), and add the skip term.

    Raises as `recur` does.
    """
    o, final = recur(inputs, backend, state)
    return (o if inputs.skip is None else o + inputs.skip), final


def recur(inputs: OpInputs, backend: str, state: State | None = None) -> tuple[Tensor, State]:
    """Run one recurrence on a resolved backend, and leave its skip term to the caller.

    Raises ValueError where the backend has no implementation of the family.
    """
    name = f"hgrn2_bench.ops.{backend}"
    module = sys.modules.get(name) or importlib.import_module(name)  # the compiler reads the former, and stops at the latter
    function = getattr(module, inputs.family, None)
    if function is None:
        raise ValueError(f"backend={backend} has no {inputs.family}; use backend=chunked")
    result: tuple[Tensor, State] = function(inputs, state)
    return result
