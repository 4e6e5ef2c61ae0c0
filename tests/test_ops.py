"""Every family of `chunked` against `reference`, with gradients."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hgrn2_bench.ops import families, scans
from hgrn2_bench.ops.families import (
    DecayInputs,
    DeltaInputs,
    DiagonalInputs,
    DiagonalLowRankInputs,
    OpInputs,
    ScalarDecayInputs,
    SelectiveInputs,
    SlotInputs,
    SoftmaxInputs,
    State,
)

B, H, V, D, N, P = 2, 2, 5, 6, 3, 7
"""Batch, heads, value, channels, states per channel, cached positions."""
EXACT = 1e-11
"""float64, relative to the largest entry; seen: 5e-14. The clamps of `chunked` leave 2^-60 at most."""
SINGLE = 2e-5
"""float32 against float64; seen: 5e-6, in sums of 130 steps without decay."""

Case = tuple[OpInputs, State]
Decay = Callable[[Tensor], Tensor]


def gate(x: Tensor) -> Tensor:
    """Log decays around log 0.5, as a sigmoid gate gives at initialisation."""
    return F.logsigmoid(x)


def drops(x: Tensor) -> Tensor:
    """Mild decays with single steps of e^-60: one for all channels at once, others for some channels."""
    log_f = F.logsigmoid(x + 2)
    log_f[:, 3::7] = -60.0
    return torch.where(x > 1.5, -60.0, log_f)


def erasures(x: Tensor) -> Tensor:
    """The same with a decay of exactly 0 at those steps."""
    return torch.where(drops(x) == -60.0, -torch.inf, drops(x))


def constant(value: float, x: Tensor) -> Tensor:
    return torch.full_like(x, value)


DECAYS: dict[str, Decay] = {
    "drops": drops,
    "erasures": erasures,
    "strong": partial(constant, -20.0),
    "zero": partial(constant, -torch.inf),
    "near one": partial(constant, -1e-6),
    "one": partial(constant, 0.0),
}


def matrix_case(T: int, decay: Decay = gate, K: int = 8, scalar: bool = False) -> Case:
    q, k, v = (torch.randn(B, T, H, n, dtype=torch.float64) for n in (K, K, V))
    state = (torch.randn(B, H, K, V, dtype=torch.float64),)
    if scalar:
        return ScalarDecayInputs(q, k, v, decay(torch.randn(B, T, H, dtype=torch.float64)), scale=0.7), state
    return DecayInputs(q, k, v, decay(torch.randn(B, T, H, K, dtype=torch.float64)), scale=0.7), state


def delta_case(T: int, decay: Decay = gate, K: int = 8, decays: bool = True) -> Case:
    q, k, v = (torch.randn(B, T, H, n, dtype=torch.float64) for n in (K, K, V))
    beta, logit = torch.randn(2, B, T, H, dtype=torch.float64).unbind(0)
    log_f = decay(logit) if decays else None
    state = (torch.randn(B, H, K, V, dtype=torch.float64),)
    return DeltaInputs(q, F.normalize(k, dim=-1), v, beta.sigmoid(), log_f, scale=0.7), state


def low_rank_case(T: int, decay: Decay = gate, K: int = 8, least: float | None = None) -> Case:
    """Independent a and b: the transition is not symmetric, and b is small enough not to grow the state by much."""
    q, k, v, a, b, logit = (torch.randn(B, T, H, n, dtype=torch.float64) for n in (K, K, V, K, K, K))
    log_f = decay(logit) if least is None else least * logit.sigmoid()
    state = (torch.randn(B, H, K, V, dtype=torch.float64),)
    a, b = F.normalize(a, dim=-1), 0.3 * F.normalize(b, dim=-1)
    return DiagonalLowRankInputs(q, k, v, a, b, log_f, scale=0.7, least_log_f=least), state


def slot_case(T: int, decay: Decay = gate, M: int = 8) -> Case:
    K = 7
    q, k, v = (torch.randn(B, T, H, n, dtype=torch.float64) for n in (K, K, V))
    s, logit = torch.randn(2, B, T, H, M, dtype=torch.float64).unbind(0)
    state = torch.randn(B, H, M, K, dtype=torch.float64), torch.randn(B, H, M, V, dtype=torch.float64)
    return SlotInputs(q, k, v, s.sigmoid(), decay(logit), scale=0.3), state


def diagonal_case(T: int, decay: Decay = gate, phase: str = "none") -> Case:
    dtype = torch.float64 if phase == "none" else torch.complex128
    theta = {"none": None, "channel": 6.28 * torch.rand(D).double(), "step": 6.28 * torch.rand(B, T, D).double()}[phase]
    log_a = decay(torch.randn(B, T, D, dtype=torch.float64))
    return DiagonalInputs(torch.randn(B, T, D, dtype=dtype), log_a, theta), (torch.randn(B, D, dtype=dtype),)


def ssm_case(T: int, decay: Decay = gate) -> Case:
    log_a, theta = decay(torch.randn(D, N, dtype=torch.float64)), 6.28 * torch.rand(D, N).double()
    C, state = torch.randn(D, N, dtype=torch.complex128), torch.randn(B, D, N, dtype=torch.complex128)
    return families.DiagonalSSMInputs(torch.randn(B, T, D, dtype=torch.float64), log_a, theta, C), (state,)


def selective_case(T: int, decay: Decay | None = None) -> Case:
    x, dt = torch.randn(B, T, D, dtype=torch.float64), F.softplus(torch.randn(B, T, D, dtype=torch.float64))
    A = -torch.randn(D, N, dtype=torch.float64).exp()
    if decay is not None:  # the step size carries the decay: with A near -1, exp(dt A) is near exp(-dt)
        dt, A = -decay(torch.randn(B, T, D, dtype=torch.float64)).clamp(min=-100), A.sign() + 0.1 * A
    B_BTN, C_BTN = torch.randn(2, B, T, N, dtype=torch.float64).unbind(0)
    return SelectiveInputs(x, dt, A, B_BTN, C_BTN), (torch.randn(B, D, N, dtype=torch.float64),)


def softmax_case(T: int, causal: bool = True) -> Case:
    K = 8
    q, k, v = (torch.randn(B, T, H, n, dtype=torch.float64) for n in (K, K, V))
    cache = torch.randn(B, P, H, K, dtype=torch.float64), torch.randn(B, P, H, V, dtype=torch.float64)
    return SoftmaxInputs(q, k, v, scale=0.5, causal=causal), cache


DECAYING: dict[str, Callable[..., Case]] = {
    "per_channel_decay K=1": partial(matrix_case, K=1),
    "per_channel_decay K=8": matrix_case,
    "per_channel_decay K=64": partial(matrix_case, K=64),
    "scalar_decay K=8": partial(matrix_case, scalar=True),
    "scalar_decay K=64": partial(matrix_case, K=64, scalar=True),
    "delta_rule K=8": delta_case,
    "delta_rule K=64": partial(delta_case, K=64),
    "diagonal_low_rank K=8": low_rank_case,
    "diagonal_low_rank K=64": partial(low_rank_case, K=64),
    "gated_slots M=1": partial(slot_case, M=1),
    "gated_slots M=8": slot_case,
    "gated_slots M=64": partial(slot_case, M=64),
    "diagonal_scan real": diagonal_case,
    "diagonal_scan angle per channel": partial(diagonal_case, phase="channel"),
    "diagonal_scan angle per step": partial(diagonal_case, phase="step"),
    "diagonal_ssm": ssm_case,
    "selective_scan": selective_case,
}
RECURRENT = DECAYING | {
    "delta_rule without decay": partial(delta_case, decays=False),
    "diagonal_low_rank bounded": partial(low_rank_case, least=-2.5),
}
CASES = RECURRENT | {"softmax": softmax_case, "softmax not causal": partial(softmax_case, causal=False)}
CAUSAL = {name: make for name, make in CASES.items() if name != "softmax not causal"}
all_cases = pytest.mark.parametrize("make", CASES.values(), ids=CASES)
causal_cases = pytest.mark.parametrize("make", CAUSAL.values(), ids=CAUSAL)
recurrent_cases = pytest.mark.parametrize("make", RECURRENT.values(), ids=RECURRENT)
decaying_cases = pytest.mark.parametrize("make", DECAYING.values(), ids=DECAYING)


@pytest.fixture(autouse=True)
def seeded_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed inputs; and blocks of 8 steps in the selective scan, so that short sequences have several."""
    torch.manual_seed(0)
    monkeypatch.setattr(scans, "BLOCK_ELEMENTS", 8 * B * D * N)


def tensors(inputs: OpInputs) -> dict[str, Tensor]:
    return {f.name: x for f in fields(inputs) if isinstance(x := getattr(inputs, f.name), Tensor)}


def change(inputs: OpInputs, function: Callable[[str, Tensor], Tensor]) -> OpInputs:
    """The inputs with each tensor replaced by `function(name, tensor)`."""
    changed: dict[str, Any] = {name: function(name, x) for name, x in tensors(inputs).items()}
    return replace(inputs, **changed)


def steps(inputs: OpInputs, which: slice) -> OpInputs:
    """The inputs at some positions only; what has no time axis stays."""
    T = next(iter(tensors(inputs).values())).shape[1]
    return change(inputs, lambda name, x: x[:, which] if x.ndim > 2 and x.shape[1] == T else x)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To a real dtype or its complex partner; torch has no complex bfloat16, so complex64 stands in for it."""
    if x.is_complex():
        return x.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return x.to(dtype)


def results(inputs: OpInputs, state: State | None, backend: str) -> dict[str, Tensor]:
    """The output, the final state, and the gradient of a random weighting of both for every input and for the initial state."""
    inputs = change(inputs, lambda _, x: x.detach().requires_grad_())
    state = None if state is None else tuple(x.detach().requires_grad_() for x in state)
    o, final = families.run(inputs, backend, state)
    found = named(o, final)
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for x in found.values():
        weights = torch.randn(x.shape, dtype=torch.complex128 if x.is_complex() else torch.float64, generator=generator)
        loss = loss + (weights * x.cpu()).sum().real
    leaves = tensors(inputs) | {f"initial {i}": x for i, x in enumerate(state or ())}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {name: x.detach() for name, x in found.items()} | {f"d {name}": x for name, x in zip(leaves, gradients, strict=True)}


def named(o: Tensor, final: State) -> dict[str, Tensor]:
    return {"o": o} | {f"final {i}": x for i, x in enumerate(final)}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within `tolerance` of the largest entry of the wanted one (or of 1, where all entries are smaller)."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert got[name].shape == expected.shape, f"{name}: shape {tuple(got[name].shape)}, expected {tuple(expected.shape)}"
        error = (cast(got[name].cpu(), torch.float64) - cast(expected, torch.float64)).abs().max()
        scale = max(1.0, expected.abs().max().item())
        assert error / scale <= tolerance, f"{name}: relative error {error / scale:.1e}, allowed {tolerance:.0e}"  # NaN fails too


@pytest.mark.parametrize("start", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("T", [1, 2, 17, 63, 64, 65, 100, 256])
@all_cases
def test_chunked_equals_reference_with_gradients(make: Callable[..., Case], T: int, start: bool) -> None:
    inputs, state = make(T)
    given = state if start else None
    assert_equal(results(inputs, given, "chunked"), results(inputs, given, "reference"), EXACT)


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
@decaying_cases
def test_chunked_equals_reference_under_extreme_decays(make: Callable[..., Case], decay: Decay) -> None:
    inputs, state = make(100, decay)
    assert_equal(results(inputs, state, "chunked"), results(inputs, state, "reference"), EXACT)


@pytest.mark.parametrize("decays", [False, True], ids=["without decay", "with decay"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 1.999])
def test_delta_rule_at_the_limits_of_beta(beta: float, decays: bool) -> None:
    """Beta 0 writes nothing, 1 replaces, 2 reflects; beside it a stretch of one repeated key, whose systems are the hardest to solve."""
    inputs, state = delta_case(256, decays=decays)
    assert isinstance(inputs, DeltaInputs)
    k_BTHK = inputs.k_BTHK.clone()
    k_BTHK[:, 100:140] = k_BTHK[:, 100:101]
    inputs = replace(inputs, beta_BTH=torch.full_like(inputs.beta_BTH, beta), k_BTHK=k_BTHK)
    assert_equal(results(inputs, state, "chunked"), results(inputs, state, "reference"), EXACT)


def test_low_rank_recalls_before_the_decay() -> None:
    """One step from a given state, written as one matrix: b receives what a recalls; neither a nor b is confused with the other."""
    inputs, (S,) = low_rank_case(1)
    _, (final,) = families.run(inputs, "reference", (S,))
    for row, head in ((0, 0), (1, 1)):
        k, v, a, b, log_f = (x[row, 0, head] for x in (inputs.k_BTHK, inputs.v_BTHV, inputs.a_BTHK, inputs.b_BTHK, inputs.log_f_BTHK))
        want = (torch.diag(log_f.exp()) + torch.outer(b, a)) @ S[row, head] + torch.outer(k, v)
        torch.testing.assert_close(final[row, head], want)


@pytest.mark.parametrize("T", [64, 65, 130])
def test_low_rank_replaces_like_the_delta_rule(T: int) -> None:
    """With a = -f k, b = beta k and k = beta k it is the gated delta rule."""
    rule, state = delta_case(T)
    beta, log_f = rule.beta_BTH[..., None], rule.log_f_BTH[..., None].expand_as(rule.k_BTHK)
    key = beta * rule.k_BTHK
    same = DiagonalLowRankInputs(rule.q_BTHK, key, rule.v_BTHV, -log_f.exp() * rule.k_BTHK, key, log_f, scale=rule.scale)
    (o, (final,)), (want, (want_final,)) = families.run(same, "chunked", state), families.run(rule, "chunked", state)
    assert_equal({"o": o, "final": final}, {"o": want, "final": want_final}, EXACT)


@pytest.mark.parametrize("least", [-0.6065, -2.5, -5.0])
def test_low_rank_with_a_bound_stays_near_float64(least: float) -> None:
    """Down to a bound of -2.6 the scores are computed in float32, below it in float64."""
    inputs, state = low_rank_case(130, least=least)
    single = change(inputs, lambda _, x: x.float())
    want = results(change(single, lambda _, x: x.double()), (state[0].float().double(),), "reference")
    assert_equal(results(single, (state[0].float(),), "chunked"), want, SINGLE)


@pytest.mark.parametrize("decay", [gate, *DECAYS.values()], ids=["gate", *DECAYS])
@decaying_cases
def test_float32_stays_near_float64(make: Callable[..., Case], decay: Decay) -> None:
    inputs, state = make(130, decay)
    inputs = change(inputs, lambda _, x: cast(x, torch.float32))
    state = tuple(cast(x, torch.float32) for x in state)
    want = results(change(inputs, lambda _, x: cast(x, torch.float64)), tuple(cast(x, torch.float64) for x in state), "reference")
    assert_equal(results(inputs, state, "chunked"), want, SINGLE)
    assert_equal(results(inputs, state, "reference"), want, SINGLE)


@pytest.mark.parametrize("T", [17, 1334])
@causal_cases
def test_float32_at_odd_and_long_lengths(make: Callable[..., Case], T: int) -> None:
    inputs, _ = make(T)
    got = results(change(inputs, lambda _, x: cast(x, torch.float32)), None, "chunked")
    assert_equal(got, results(inputs, None, "reference"), SINGLE)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@all_cases
def test_bfloat16_inputs_keep_a_wide_state(make: Callable[..., Case], backend: str) -> None:
    inputs, _ = make(65)
    inputs = change(inputs, lambda _, x: cast(x, torch.bfloat16))
    got = results(inputs, None, backend)
    is_cache = inputs.family == "softmax"
    assert got["o"].dtype == (torch.complex64 if got["o"].is_complex() else torch.bfloat16)
    assert got["final 0"].dtype == (torch.complex64 if got["final 0"].is_complex() else torch.bfloat16 if is_cache else torch.float32)
    want = results(change(inputs, lambda _, x: cast(x, torch.float64)), None, "reference")
    assert_equal(got, want, 0.02)
    if not is_cache:
        assert_equal({"final 0": got["final 0"]}, {"final 0": want["final 0"]}, SINGLE)


@recurrent_cases
def test_autocast_does_not_lower_the_precision(make: Callable[..., Case]) -> None:
    inputs, state = make(65)
    inputs = change(inputs, lambda _, x: cast(x, torch.float32))
    want, want_final = families.run(inputs, "chunked", state)
    with torch.autocast("cpu", torch.bfloat16):
        o, final = families.run(inputs, "chunked", state)
    assert torch.equal(o, want)
    assert all(torch.equal(x, y) for x, y in zip(final, want_final, strict=True))


def test_softmax_takes_mixed_dtypes_under_autocast() -> None:
    inputs, _ = softmax_case(33)
    want, _ = families.run(inputs, "reference")
    mixed = change(inputs, lambda name, x: x.to(torch.bfloat16 if name == "v_BTHV" else torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        o, _ = families.run(mixed, "chunked")
    assert o.dtype == torch.bfloat16
    assert_equal({"o": o}, {"o": want}, 0.02)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("t", [1, 20, 64, 99])
@causal_cases
def test_outputs_do_not_see_later_inputs(make: Callable[..., Case], t: int, backend: str) -> None:
    (inputs, state), (other, _) = make(100), make(100)

    def spliced(name: str, x: Tensor) -> Tensor:
        return torch.cat([x[:, :t], tensors(other)[name][:, t:]], 1) if x.ndim > 2 else x

    o, _ = families.run(inputs, backend, state)
    o_changed, _ = families.run(change(inputs, spliced), backend, state)
    assert_equal({"o": o_changed[:, :t]}, {"o": o[:, :t]}, EXACT)
    assert not torch.allclose(o_changed[:, t], o[:, t])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("cut", [1, 20, 64, 99])
@causal_cases
def test_two_calls_joined_by_the_state_equal_one(make: Callable[..., Case], cut: int, backend: str) -> None:
    inputs, state = make(100)
    o, final = families.run(inputs, backend, state)
    o_first, middle = families.run(steps(inputs, slice(0, cut)), backend, state)
    o_second, final_second = families.run(steps(inputs, slice(cut, None)), backend, middle)
    assert_equal(named(torch.cat([o_first, o_second], 1), final_second), named(o, final), EXACT)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@recurrent_cases
def test_masked_leaves_the_state_at_the_true_length(make: Callable[..., Case], backend: str) -> None:
    inputs, state = make(80)
    lengths_B = torch.tensor([0, 37])
    o, final = families.run(inputs.masked(lengths_B), backend, state)
    o_short, final_short = families.run(steps(inputs, slice(0, 37)), backend, state)
    want = tuple(torch.stack([start[0], short[1]]) for start, short in zip(state, final_short, strict=True))
    assert_equal(named(o[1, :37], final), named(o_short[1], want), EXACT)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("causal", [True, False])
def test_softmax_hides_keys_past_the_length(causal: bool, backend: str) -> None:
    inputs, _ = softmax_case(40, causal)
    o, _ = families.run(inputs.masked(torch.tensor([40, 23])), backend)
    o_whole, _ = families.run(inputs, backend)
    o_short, _ = families.run(steps(inputs, slice(0, 23)), backend)
    assert_equal({"full": o[0], "short": o[1, :23]}, {"full": o_whole[0], "short": o_short[1]}, EXACT)


@pytest.mark.parametrize(("causal", "lengths"), [(True, (17, 23)), (False, (17, 23)), (False, (0, 23))])
def test_softmax_with_lengths_equals_reference_with_gradients(causal: bool, lengths: tuple[int, int]) -> None:
    inputs, _ = softmax_case(40, causal)
    masked = inputs.masked(torch.tensor(lengths))
    found = []
    for backend in ("chunked", "reference"):
        leaves: dict[str, Any] = {name: x.detach().requires_grad_() for name, x in tensors(masked).items() if name != "lengths_B"}
        o = families.zero_padding(families.run(replace(masked, **leaves), backend)[0], torch.tensor(lengths))
        gradients = torch.autograd.grad(o.square().sum(), list(leaves.values()))
        found.append({"o": o.detach()} | dict(zip(leaves, gradients, strict=True)))
    got, want = found
    assert_equal(got, want, EXACT)
    assert all(torch.isfinite(x).all() for x in got.values())  # also of a row without any key


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_softmax_refuses_lengths_with_a_cache(backend: str) -> None:
    inputs, cache = softmax_case(4)
    with pytest.raises(ValueError, match="lengths or a cache, not both"):
        families.run(inputs.masked(torch.tensor([4, 3])), backend, cache)
