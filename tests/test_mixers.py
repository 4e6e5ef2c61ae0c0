"""One contract for every mixer: HGRN2, and each file of `baselines`, in every variant, without and with short convolutions."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

import pytest
import torch
from torch import Tensor, nn

from hgrn2_bench import registry
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec, MixerState
from hgrn2_bench.layers import ShortConv, conv_names
from hgrn2_bench.measure import log_decay_of

D, T = 32, 17
LENGTHS = (1, 17, 65)
MORE_FORMS = {"base_conv": [{"long": "odd"}]}
"""Settings that make another mixer of the same class; the case is layer 1."""
GATES = ("log_f_BTHK", "log_f_BTH", "log_f_BTHM", "s_BTHM", "beta_BTH", "log_a_BTD", "dt_BTD", "A_DN", "a_BTHK", "b_BTHK")


def mixers() -> Iterator[tuple[str, type[Mixer]]]:
    """Registry name and class of every registered mixer."""
    for name in registry.models():
        yield name, registry.load(name)


@dataclass(frozen=True)
class Case:
    cls: type[Mixer]
    settings: dict[str, Any]
    conv: int

    LONGEST: ClassVar[int] = 128

    def build(self, seed: int = 0, **changes: Any) -> Mixer:
        torch.manual_seed(seed)
        spec = MixerSpec(d_model=D, layer=1, num_layers=2, conv=self.conv, settings=self.settings, max_len=self.LONGEST)
        return self.cls(replace(spec, **changes))

    @property
    def shared(self) -> dict[str, Tensor]:
        bound = torch.linspace(0.1, 0.6, D)
        return {"lower_bound": torch.stack([torch.zeros(D), bound])} if self.cls.bounded else {}

    @property
    def carry(self) -> dict[str, Tensor]:
        """What a layer 0 would have left: the same values for every token."""
        return {"values": torch.linspace(-1, 1, D)[None, None]}

    def context(self, **fields: Any) -> Context:
        return Context(shared=self.shared, carry=self.carry, **fields)

    @property
    def is_attention(self) -> bool:
        return self.build().family == "softmax"

    @property
    def by_fft(self) -> bool:
        return self.settings.get("long", "none") != "none"

    @property
    def keeps_all_tokens(self) -> bool:
        return self.is_attention or self.by_fft


def cases(wanted: Callable[[type[Mixer]], bool] = lambda cls: True) -> list[Any]:
    found = []
    for name, cls in mixers():
        variants = get_args(vars(cls).get("__annotations__", {}).get("variant")) or ("",)
        forms = [{"variant": variant} if variant else {} for variant in variants] + MORE_FORMS.get(name, [])
        for settings, conv in itertools.product(forms if wanted(cls) else (), (0, 4) if cls.convolved else (0,)):
            found.append(pytest.param(Case(cls, settings, conv), id="-".join([name, *settings.values(), f"conv{conv}"])))
    return found


@pytest.fixture(params=cases())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


def decode(case: Case, mixer: Mixer, x_BTD: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
    outputs = []
    for x_BD in x_BTD.unbind(1):
        y_BD, state = mixer.step(x_BD, state, case.shared, case.carry)
        outputs.append(y_BD)
    assert state is not None
    return torch.stack(outputs, 1), state


def loss_of(y: Tensor) -> Tensor:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    return (y * weights).sum()


def gradients(mixer: Mixer) -> dict[str, Tensor]:
    missing = [n for n, p in mixer.named_parameters() if p.grad is None]
    assert not missing
    return {n: p.grad for n, p in mixer.named_parameters() if p.grad is not None}


def assert_same_state(got: MixerState, want: MixerState, **tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], **tolerance)


def test_mixers_are_all_found() -> None:
    expected = {"hgrn2", "attention", "gla", "hgrn1", "mamba", "linear_attention", "retnet", "mamba2", "delta_net", "gated_delta_net"}
    assert expected | {"rwkv6", "rwkv7", "gsa", "based", "base_conv", "hybrid"} <= {name for name, _ in mixers()}


@pytest.mark.parametrize("length", LENGTHS)
def test_output_has_the_shape_and_dtype_of_the_input(case: Case, length: int) -> None:
    y = case.build()(inputs(2, length), case.context())
    assert y.shape == (2, length, D)
    assert y.dtype == torch.float32
    assert y.isfinite().all()
    assert y.std() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_mixer_converted_to_another_dtype_keeps_it(case: Case, dtype: torch.dtype) -> None:
    mixer, x = case.build(), inputs(2, T)
    want = mixer(x, case.context())
    y = mixer.to(dtype)(x.to(dtype), case.context())
    assert y.dtype == dtype
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.1 * want.std().item()}
    torch.testing.assert_close(y.float(), want, **tolerance)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_parameter_gets_a_finite_gradient(case: Case, length: int) -> None:
    mixer = case.build(forget_bias=1.0)
    x = inputs(2, length).requires_grad_()
    loss_of(mixer(x, case.context())).backward()
    for name, grad in {**gradients(mixer), "x": x.grad}.items():
        assert grad is not None
        assert grad.isfinite().all(), name
        assert length == 1 or grad.abs().max() > 0, name


@pytest.mark.parametrize("case", cases(lambda cls: cls.bounded))
def test_the_learned_lower_bound_gets_a_gradient(case: Case) -> None:
    bound = case.shared["lower_bound"].requires_grad_()
    for layer in (0, 1):
        loss_of(case.build(layer=layer)(inputs(2, T), Context(shared={"lower_bound": bound}))).backward()
    assert bound.grad is not None
    assert bound.grad.isfinite().all()
    assert (bound.grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_changed_token_leaves_earlier_outputs_untouched(case: Case, backend: str) -> None:
    mixer, x, changed = case.build(backend=backend), inputs(2, 65), 40
    other = x.clone()
    other[:, changed] += 3
    before, after = mixer(x, case.context()), mixer(other, case.context())
    leak = 1e-5 if case.by_fft else 1e-6  # an FFT spreads its rounding over all outputs
    torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=leak)
    seen = (after - before)[:, changed : changed + 2].abs().amax(-1) > 1e-5
    assert seen.all(), "a change must be seen at its token and at the next"


@pytest.mark.parametrize("prompt", [0, 1, 9])
def test_prefill_and_steps_equal_one_forward(case: Case, prompt: int) -> None:
    mixer, x = case.build(positions="rope"), inputs(2, T)
    whole = case.context(return_state=True)
    want = mixer(x, whole)
    prefill = case.context(return_state=True)
    start = mixer(x[:, :prompt], prefill) if prompt else x[:, :0]
    rest, state = decode(case, mixer, x[:, prompt:], prefill.next_state if prompt else None)
    torch.testing.assert_close(torch.cat([start, rest], 1), want, rtol=1e-4, atol=1e-5)
    assert_same_state(state, whole.next_state, rtol=1e-4, atol=1e-5)


def test_two_chunks_equal_one_forward(case: Case) -> None:
    mixer, x = case.build(positions="rope"), inputs(2, 65)
    first = case.context(return_state=True)
    start = mixer(x[:, :33], first)
    rest = mixer(x[:, 33:], case.context(state=first.next_state))
    torch.testing.assert_close(torch.cat([start, rest], 1), mixer(x, case.context()), rtol=1e-4, atol=1e-5)


def test_right_padding_changes_neither_outputs_nor_state(case: Case) -> None:
    mixer, lengths = case.build(positions="rope"), [T, 9, 2, 1]
    x = inputs(len(lengths), T)
    padded = case.context(lengths_B=torch.tensor(lengths), return_state=True)
    y = mixer(x, padded)
    for row, length in enumerate(lengths):
        alone = case.context(return_state=True)
        want = mixer(x[row : row + 1, :length], alone)
        torch.testing.assert_close(y[row : row + 1, :length], want, rtol=1e-4, atol=1e-5)
        if case.is_attention:  # its cache keeps the padding: decoding after padded prefill is refused by the op
            del alone.next_state["op"]
        elif case.by_fft:  # zeros before the tokens
            (past,) = padded.next_state["past"]
            assert past[row, : T - length].abs().sum() == 0
            torch.testing.assert_close(past[row : row + 1, T - length :], alone.next_state.pop("past")[0], rtol=0, atol=0)
        state = {name: tuple(t[row : row + 1] for t in padded.next_state[name]) for name in alone.next_state}
        assert_same_state(state, alone.next_state, rtol=1e-4, atol=1e-5)


def test_one_row_equals_the_same_row_of_a_batch(case: Case) -> None:
    mixer, x = case.build(), inputs(3, T)
    batch = mixer(x, case.context())
    for row in range(3):
        torch.testing.assert_close(mixer(x[row : row + 1], case.context())[0], batch[row], rtol=1e-4, atol=1e-5)


def test_same_seed_same_output(case: Case) -> None:
    x = inputs(2, T)
    a, b, other = (case.build(seed)(x, case.context()) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.allclose(a, other, atol=1e-3)


@pytest.mark.parametrize("length", [1, 5, T])
@pytest.mark.parametrize("itemsize", [4, 2])
def test_state_size_is_what_decoding_holds(case: Case, length: int, itemsize: int) -> None:
    mixer = case.build()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=itemsize == 2):
        _, state = decode(case, mixer, inputs(1, length))
    held = sum(t.numel() * t.element_size() for tensors in state.values() for t in tensors)
    assert mixer.state_size(length, itemsize) == held


def test_chunked_equals_reference(case: Case) -> None:
    results = []
    for backend in ("reference", "chunked"):
        mixer, x, ctx = case.build(backend=backend), inputs(2, 65).requires_grad_(), case.context(return_state=True)
        y = mixer(x, ctx)
        loss_of(y).backward()
        results.append(({"y": y, "x": x.grad, **gradients(mixer)}, ctx.next_state))
    (want, want_state), (got, got_state) = results
    for name, tensor in want.items():
        scale = tensor.abs().max().item()
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, name=name: f"{name}: {m}")
    assert_same_state(got_state, want_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_extreme_inputs_stay_finite(case: Case, backend: str) -> None:
    mixer, x = case.build(backend=backend), (100 * inputs(2, 65)).requires_grad_()
    y = mixer(x, case.context())
    loss_of(y).backward()
    assert y.isfinite().all()
    for name, grad in {**gradients(mixer), "x": x.grad}.items():
        assert grad is not None
        assert grad.isfinite().all(), name


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_autocast_keeps_gates_and_states_in_float32(case: Case, backend: str) -> None:
    mixer, x, ctx = case.build(backend=backend), inputs(2, T), case.context(return_state=True)
    want = mixer(x, case.context())
    with torch.autocast("cpu", torch.bfloat16):
        gates = mixer.project(x, case.context()) if case.cls.family else None
        y = mixer(x, ctx)
    loss_of(y).backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=0.1, atol=0.1 * want.std().item())
    assert all(g.isfinite().all() for g in gradients(mixer).values())
    if gates is None:  # no recurrence: buffers alone
        assert {t.dtype for tensors in ctx.next_state.values() for t in tensors} == {torch.bfloat16}
        return
    given = {name: getattr(gates, name, None) for name in GATES}
    found = {name: gate.dtype for name, gate in given.items() if gate is not None}
    assert set(found.values()) == (set() if case.is_attention else {torch.float32}), found
    states = {t.dtype for t in ctx.next_state["op"]}
    assert states <= ({torch.bfloat16} if case.is_attention else {torch.float32, torch.complex64})


def test_op_flops_grow_with_length_only_where_all_tokens_are_kept(case: Case) -> None:
    short, long = case.build().op_flops(10), case.build().op_flops(1000)
    assert 0 < short <= long
    assert (short < long) == case.keeps_all_tokens


def test_effective_is_json_and_says_what_was_built(case: Case) -> None:
    mixer = case.build()
    effective = mixer.effective()
    assert json.loads(json.dumps(effective)) == effective
    streams = [n.rpartition(".")[2] for n, m in mixer.named_modules() if isinstance(m, ShortConv)]
    assert all(n.startswith("conv_") for n in streams)
    assert sorted(conv_names(mixer)) == sorted(streams)
    assert bool(streams) == bool(case.conv) or not case.cls.convolved
    if "head_k" in effective:
        op = mixer.project(inputs(1, 3), case.context())
        assert op.k_BTHK.shape[2:] == (effective["heads"], effective["head_k"])  # type: ignore[attr-defined]
        assert op.scale == effective["scale"]  # type: ignore[attr-defined]


def test_class_facts_agree_with_the_code(case: Case) -> None:
    mixer = case.build()
    if mixer.family:
        assert mixer.project(inputs(1, 3), case.context()).family == mixer.family
    assert case.cls.family or not case.cls.convolved or hasattr(case.cls, "parts"), (
        "only a mixer built of others may leave its family to them"
    )
    assert set(case.cls.no_weight_decay) <= set(dict(mixer.named_parameters()))
    assert (case.cls.__doc__ or "").strip()


def decay(case: Case, mixer: Mixer) -> Tensor:
    log_decay = log_decay_of(mixer.project(inputs(4, T), Context(carry=case.carry)))
    assert log_decay is not None
    return log_decay.exp()


@pytest.mark.parametrize("case", cases(lambda cls: cls.gated))
def test_forget_bias_raises_the_decay_also_after_all_biases_were_zeroed(case: Case) -> None:
    def medians(zeroed: bool) -> list[float]:
        mixers = [case.build(forget_bias=b) for b in (-2.0, 0.0, 2.0)]
        for mixer in mixers if zeroed else ():
            for module in mixer.modules():
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            mixer.init_forget_bias()
        return [decay(case, mixer).median().item() for mixer in mixers]

    for low, middle, high in (medians(zeroed=False), medians(zeroed=True)):
        assert low < middle - 1e-3 < middle + 1e-3 < high


@pytest.mark.parametrize("case", cases(lambda cls: not cls.gated))
def test_forget_bias_changes_nothing_without_a_gate(case: Case) -> None:
    torch.testing.assert_close(case.build(forget_bias=2.0).state_dict(), case.build().state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("case", cases(lambda cls: bool({"num_heads", "expand_ratio"} & set(cls.setting_names()))))
@pytest.mark.parametrize("bad", [5, 0, 64])
def test_heads_that_do_not_fit_are_refused_with_formula_and_legal_values(case: Case, bad: int) -> None:
    (setting,) = {"num_heads", "expand_ratio"} & set(case.cls.setting_names())
    with pytest.raises(ConfigError, match=rf"must be a multiple of {setting}={bad} \(.* = .* / {setting}\); nearest legal {setting}: \d+"):
        case.build(settings={**case.settings, setting: bad})


def test_unknown_settings_are_refused(case: Case) -> None:
    with pytest.raises(ConfigError, match="has no setting 'expandratio'"):
        case.build(settings={"expandratio": 2})
    if "variant" in case.cls.setting_names():
        with pytest.raises(ConfigError, match=r"Unknown variant 'papr'. Did you mean 'paper'\?"):
            case.build(settings={"variant": "papr"})
