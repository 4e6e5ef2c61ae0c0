"""One contract for every mixer: HGRN2, and each file of `baselines`, in every variant, without and with short convolutions."""

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from hgrn2_bench import contract, registry
from hgrn2_bench.contract import Subject, loss_of
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec
from hgrn2_bench.layers import ShortConv, conv_names
from hgrn2_bench.measure import log_decay_of

D, T = 32, 17
LENGTHS = (1, 17, 65)
LONGEST = 128
MORE_FORMS = {"base_conv": [{"long": "odd"}]}
"""Settings that make another mixer of the same class; the case is layer 1."""
GATES = ("log_f_BTHK", "log_f_BTH", "log_f_BTHM", "s_BTHM", "beta_BTH", "log_a_BTD", "log_a_DN", "dt_BTD", "A_DN", "a_BTHK", "b_BTHK")


def mixers() -> Iterator[tuple[str, type[Mixer]]]:
    """Registry name and class of every registered mixer."""
    for name in registry.models():
        yield name, registry.load(name)


def by_fft(case: Subject) -> bool:
    """Whether it is a convolution as long as the sequence: it keeps all tokens, and its rounding is that of FFTs."""
    return case.spec.settings.get("long", "none") != "none"


def cases(wanted: Callable[[type[Mixer]], bool] = lambda cls: True) -> list[Any]:
    found = []
    for name, cls in mixers():
        variants = get_args(vars(cls).get("__annotations__", {}).get("variant")) or ("",)
        forms = [{"variant": variant} if variant else {} for variant in variants] + MORE_FORMS.get(name, [])
        for settings, conv in itertools.product(forms if wanted(cls) else (), (0, 4) if cls.convolved else (0,)):
            spec = MixerSpec(d_model=D, layer=1, num_layers=2, conv=conv, settings=settings, max_len=LONGEST)
            found.append(pytest.param(Subject(cls, spec), id="-".join([name, *settings.values(), f"conv{conv}"])))
    return found


@pytest.fixture(params=cases())
def case(request: pytest.FixtureRequest) -> Subject:
    return request.param


def gradients(mixer: Mixer) -> dict[str, Tensor]:
    missing = [n for n, p in mixer.named_parameters() if p.grad is None]
    assert not missing
    return {n: p.grad for n, p in mixer.named_parameters() if p.grad is not None}


def test_mixers_are_all_found() -> None:
    expected = {"hgrn2", "attention", "gla", "hgrn1", "mamba", "linear_attention", "retnet", "mamba2", "delta_net", "gated_delta_net"}
    assert expected | {"rwkv6", "rwkv7", "gsa", "based", "base_conv", "hybrid", "s4d", "lru"} <= {name for name, _ in mixers()}


@pytest.mark.parametrize("length", LENGTHS)
def test_output_has_the_shape_and_dtype_of_the_input(case: Subject, length: int) -> None:
    contract.shape(case, (length,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_mixer_converted_to_another_dtype_keeps_it(case: Subject, dtype: torch.dtype) -> None:
    """And computes what its rounded weights say: S4D's kernel moves more with the rounding of its step sizes than with that of the sums."""
    mixer, x = case.build().to(dtype), case.inputs(2, T).to(dtype)
    want = copy.deepcopy(mixer).float()(x.float(), case.context())
    y = mixer(x, case.context())
    assert y.dtype == dtype
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.1 * want.std().item()}
    torch.testing.assert_close(y.float(), want, **tolerance)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_parameter_gets_a_finite_gradient(case: Subject, length: int) -> None:
    contract.gradients(case.having(forget_bias=1.0), (length,))


@pytest.mark.parametrize("case", cases(lambda cls: cls.bounded))
def test_the_learned_lower_bound_gets_a_gradient(case: Subject) -> None:
    bound = case.shared["lower_bound"].requires_grad_()
    for layer in (0, 1):
        loss_of(case.having(layer=layer).build()(case.inputs(2, T), Context(shared={"lower_bound": bound}))).backward()
    assert bound.grad is not None
    assert bound.grad.isfinite().all()
    assert (bound.grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_changed_token_leaves_earlier_outputs_untouched(case: Subject, backend: str) -> None:
    case, changed = case.having(backend=backend), 40
    contract.causality(case, relative=1e-6 if by_fft(case) else 1e-7)
    mixer, x = case.build(), case.inputs(2, 65)
    other = x.clone()
    other[:, changed] += 3
    before, after = mixer(x, case.context()), mixer(other, case.context())
    leak = 1e-5 if by_fft(case) else 1e-6  # an FFT spreads its rounding over all outputs
    torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=leak)
    seen = (after - before)[:, changed : changed + 2].abs().amax(-1) > 1e-5
    assert seen.all(), "a change must be seen at its token and at the next"


@pytest.mark.parametrize("prompt", [0, 1, 9])
def test_prefill_and_steps_equal_one_forward(case: Subject, prompt: int) -> None:
    contract.decoding(case, (prompt,))


def test_two_chunks_equal_one_forward(case: Subject) -> None:
    contract.two_chunks(case)


def test_right_padding_changes_neither_outputs_nor_state(case: Subject) -> None:
    contract.padding(case)
    if by_fft(case):
        lengths, x, padded = [T, 9, 2, 1], case.inputs(4, T), case.context(return_state=True)
        padded.lengths_B = torch.tensor(lengths)
        case.build()(x, padded)
        (past,) = padded.next_state["past"]
        for row, length in enumerate(lengths):
            assert past[row, : T - length].abs().sum() == 0, "zeros come first"
            torch.testing.assert_close(past[row, T - length :], x[row, :length], rtol=0, atol=0)


def test_one_row_equals_the_same_row_of_a_batch(case: Subject) -> None:
    contract.batch_independence(case)


def test_same_seed_same_output(case: Subject) -> None:
    contract.determinism(case)
    x = case.inputs(2, T)
    one, other = (case.build(seed)(x, case.context()) for seed in (0, 1))
    assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("itemsize", [4, 2])
def test_state_size_is_what_decoding_holds(case: Subject, itemsize: int) -> None:
    contract.state_bytes(case, (1, 5, T), itemsize)


@pytest.mark.parametrize("case", cases(lambda cls: bool(cls.state_setting)))
@pytest.mark.parametrize("itemsize", [4, 2])
def test_state_setting_changes_what_decoding_holds(case: Subject, itemsize: int) -> None:
    setting, default = case.cls.state_setting, getattr(case.cls, case.cls.state_setting)
    assert setting in case.cls.setting_names()
    sizes = set()
    for value in (1.0, 2.0) if isinstance(default, float) else (2, 4):
        changed = case.at_rope.having(settings={**case.spec.settings, setting: value})
        contract.state_bytes(changed, (2, 9), itemsize)
        sizes.add(changed.build().state_size(9, itemsize))
    assert len(sizes) == 2


def test_chunked_equals_reference(case: Subject) -> None:
    contract.backends(case)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_extreme_inputs_stay_finite(case: Subject, backend: str) -> None:
    mixer, x = case.having(backend=backend).build(), (100 * case.inputs(2, 65)).requires_grad_()
    y = mixer(x, case.context())
    loss_of(y).backward()
    assert y.isfinite().all()
    for name, grad in {**gradients(mixer), "x": x.grad}.items():
        assert grad is not None
        assert grad.isfinite().all(), name


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_autocast_keeps_gates_and_states_in_float32(case: Subject, backend: str) -> None:
    mixer, x, ctx = case.having(backend=backend).build(), case.inputs(2, T), case.context(return_state=True)
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


def test_op_flops_grow_with_length_only_where_all_tokens_are_kept(case: Subject) -> None:
    short, long = case.build().op_flops(10), case.build().op_flops(1000)
    assert 0 < short <= long
    assert (short < long) == (case.is_attention or by_fft(case))


def test_effective_is_json_and_says_what_was_built(case: Subject) -> None:
    mixer = case.build()
    effective = mixer.effective()
    assert json.loads(json.dumps(effective)) == effective
    streams = [n.rpartition(".")[2] for n, m in mixer.named_modules() if isinstance(m, ShortConv)]
    assert all(n.startswith("conv_") for n in streams)
    assert sorted(conv_names(mixer)) == sorted(streams)
    assert bool(streams) == bool(case.spec.conv) or not case.cls.convolved
    if "head_k" in effective:
        op = mixer.project(case.inputs(1, 3), case.context())
        assert op.k_BTHK.shape[2:] == (effective["heads"], effective["head_k"])  # type: ignore[attr-defined]
        assert op.scale == effective["scale"]  # type: ignore[attr-defined]


def test_class_facts_agree_with_the_code(case: Subject) -> None:
    mixer = case.build()
    if mixer.family:
        assert mixer.project(case.inputs(1, 3), case.context()).family == mixer.family
    assert case.cls.family or not case.cls.convolved or hasattr(case.cls, "parts"), (
        "only a mixer built of others may leave its family to them"
    )
    assert {*case.cls.no_weight_decay, *case.cls.max_lr} <= set(dict(mixer.named_parameters()))
    assert (case.cls.__doc__ or "").strip()


def decay(case: Subject, mixer: Mixer) -> Tensor:
    log_decay = log_decay_of(mixer.project(case.inputs(4, T), Context(carry=dict(case.carry))))
    assert log_decay is not None
    return log_decay.exp()


@pytest.mark.parametrize("case", cases(lambda cls: cls.gated))
def test_forget_bias_raises_the_decay_also_after_all_biases_were_zeroed(case: Subject) -> None:
    def medians(zeroed: bool) -> list[float]:
        mixers = [case.having(forget_bias=b).build() for b in (-2.0, 0.0, 2.0)]
        for mixer in mixers if zeroed else ():
            for module in mixer.modules():
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            mixer.init_forget_bias()
        return [decay(case, mixer).median().item() for mixer in mixers]

    for low, middle, high in (medians(zeroed=False), medians(zeroed=True)):
        assert low < middle - 1e-3 < middle + 1e-3 < high


@pytest.mark.parametrize("case", cases(lambda cls: not cls.gated))
def test_forget_bias_changes_nothing_without_a_gate(case: Subject) -> None:
    torch.testing.assert_close(case.having(forget_bias=2.0).build().state_dict(), case.build().state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("case", cases(lambda cls: bool({"num_heads", "expand_ratio"} & set(cls.setting_names()))))
@pytest.mark.parametrize("bad", [5, 0, 64])
def test_heads_that_do_not_fit_are_refused_with_formula_and_legal_values(case: Subject, bad: int) -> None:
    (setting,) = {"num_heads", "expand_ratio"} & set(case.cls.setting_names())
    with pytest.raises(ConfigError, match=rf"must be a multiple of {setting}={bad} \(.* = .* / {setting}\); nearest legal {setting}: \d+"):
        case.having(settings={**case.spec.settings, setting: bad}).build()


def test_unknown_settings_are_refused(case: Subject) -> None:
    with pytest.raises(ConfigError, match="has no setting 'expandratio'"):
        case.having(settings={"expandratio": 2}).build()
    if "variant" in case.cls.setting_names():
        with pytest.raises(ConfigError, match=r"Unknown variant 'papr'. Did you mean 'paper'\?"):
            case.having(settings={"variant": "papr"}).build()
