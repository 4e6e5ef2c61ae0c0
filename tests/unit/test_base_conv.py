import math
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.base_conv import BaseConv
from hgrn2_bench import measure, registry
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, MixerSpec
from hgrn2_bench.model import SequenceModel
from hgrn2_bench.plan import make_plan

D, LONGEST = 6, 24


def build(d_model: int = D, layer: int = 1, max_len: int = LONGEST, **settings: Any) -> BaseConv:
    torch.manual_seed(0)
    return BaseConv(MixerSpec(d_model, layer=layer, num_layers=4, max_len=max_len, settings=settings))


def filter_of(mixer: BaseConv, lag: int) -> Tensor:
    """The taps of one lag, one per channel, written from the published features."""
    L = mixer.spec.max_len
    angle = 1e-4 * 2 * math.pi * lag / L
    z = torch.tensor([lag / (L - 1), math.cos(angle), -math.sin(angle)], dtype=torch.float64)
    hidden = (mixer.filter_in.weight @ z + mixer.filter_in.bias).clamp(min=0)
    return mixer.filter_out.weight @ hidden + mixer.filter_out.bias


def equations(mixer: BaseConv, x_TD: Tensor) -> Tensor:
    """The layer written from its equations, one token and one tap after the other."""
    outputs = []
    for t, x in enumerate(x_TD):
        if mixer.is_long:
            mixed = x + sum((filter_of(mixer, s) * x_TD[t - s] for s in range(t + 1)), torch.zeros(D).double())
        else:
            weight, bias = mixer.conv_x.conv.weight[:, 0], mixer.conv_x.conv.bias
            taps = range(min(mixer.width, t + 1))
            mixed = sum((weight[:, mixer.width - 1 - s] * x_TD[t - s] for s in taps), torch.zeros(D).double()) + bias
        outputs.append(mixed * (mixer.gate_proj.weight @ x + mixer.gate_proj.bias) + x)
    return torch.stack(outputs)


@pytest.mark.parametrize("length", [1, 2, 17, LONGEST])
@pytest.mark.parametrize("settings", [{}, {"width": 1}, {"width": 5}, {"long": "all"}])
def test_layer_equals_the_equations_with_every_gradient(settings: dict[str, Any], length: int) -> None:
    mixer, x = build(**settings).double(), torch.randn(2, length, D).double().requires_grad_()
    want, y = torch.stack([equations(mixer, x_TD) for x_TD in x]), mixer(x)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    inputs, weights = {"x": x, **dict(mixer.named_parameters())}, torch.randn_like(y)
    got, expected = (torch.autograd.grad((out * weights).sum(), list(inputs.values())) for out in (y, want))
    for name, one, other in zip(inputs, got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
        assert one.abs().max() > 1e-6, name


@pytest.mark.parametrize(("long", "long_layers"), [("none", []), ("odd", [1, 3]), ("all", [0, 1, 2, 3])])
def test_long_layers_are_the_chosen_ones(long: str, long_layers: list[int]) -> None:
    mixers = [build(layer=layer, long=long) for layer in range(4)]
    assert [layer for layer, mixer in enumerate(mixers) if mixer.is_long] == long_layers
    assert all(hasattr(mixer, "conv_x") != mixer.is_long for mixer in mixers)
    assert {tuple(mixer.effective()["long_layers"]) for mixer in mixers} == {tuple(long_layers)}


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"width": 5}, {"long": "all"}])
def test_decoding_equals_the_forward_pass(settings: dict[str, Any]) -> None:
    mixer, x = build(**settings).double(), torch.randn(2, 9, D).double()
    state, outputs = None, []
    for x_BD in x.unbind(1):
        y_BD, state = mixer.step(x_BD, state)
        outputs.append(y_BD)
    torch.testing.assert_close(torch.stack(outputs, 1), mixer(x), rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"long": "all"}])
def test_decoding_goes_on_from_each_row_s_own_length(settings: dict[str, Any]) -> None:
    mixer, x, lengths = build(**settings).double(), torch.randn(3, 10, D).double(), [1, 4, 6]
    ctx = Context(lengths_B=torch.tensor(lengths), return_state=True)
    mixer(x[:, :6], ctx)
    again = Context(lengths_B=torch.tensor([2, 1, 3]), state=ctx.next_state, return_state=True)
    mixer(x[:, 6:9], again)
    y_BD, _ = mixer.step(x[:, 9], again.next_state)
    for row, (first, second) in enumerate(zip(lengths, [2, 1, 3], strict=True)):
        alone = torch.cat([x[row, :first], x[row, 6 : 6 + second], x[row, 9:]])
        torch.testing.assert_close(y_BD[row], mixer(alone[None])[0, -1], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_long_convolution_is_causal_to_rounding_and_does_not_wrap_around() -> None:
    mixer, x = build(long="all").double(), torch.randn(1, LONGEST, D).double()
    changed = x.clone()
    changed[:, -1] += 1e3
    torch.testing.assert_close(mixer(changed)[:, :-1], mixer(x)[:, :-1], rtol=0, atol=1e-10)


@torch.no_grad()
def test_autocast_computes_the_filter_in_float32() -> None:
    mixer = build(64, max_len=2000, long="all")
    with torch.autocast("cpu", torch.bfloat16):
        taps = mixer.taps(2000)
    assert taps.dtype == torch.float32
    torch.testing.assert_close(taps, mixer.taps(2000), rtol=0, atol=0)


def test_more_tokens_than_the_filter_has_taps_are_refused() -> None:
    mixer, x = build(long="all"), torch.randn(1, LONGEST, D)
    ctx = Context(return_state=True)
    mixer(x, ctx)
    with pytest.raises(ValueError, match="25 tokens, but base_conv's long filter knows only 24"):
        mixer.step(x[:, 0], ctx.next_state)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 0}, "width=0 must be at least 1"),
        ({"long": "od"}, r"Unknown long 'od'. Did you mean 'odd'\? Available: all, none, odd."),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**settings)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_long_filter_needs_the_longest_length(layer: int) -> None:
    with pytest.raises(ConfigError, match="long=odd needs the length of the longest sequence: give MixerSpec its max_len"):
        build(layer=layer, max_len=0, long="odd")
    assert build(layer=layer, max_len=0)


@pytest.mark.parametrize("d", [64, 128])
def test_parameter_count(d: int) -> None:
    gate, network = d * d + d, 3 * 16 + 16 + 16 * d + d
    assert sum(p.numel() for p in build(d).parameters()) == gate + 3 * d + d
    assert sum(p.numel() for p in build(d, long="all").parameters()) == gate + network


def model(seq_len: int = 12, conv: int = 0, **settings: Any) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(ModelConfig(d_model=16, conv=conv), registry.load("base_conv"), settings, "chunked", 11, seq_len)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({}, "own conv 3"), ({"width": 4, "long": "odd"}, "own conv 4, own long conv"), ({"long": "all"}, "own long conv")],
)
def test_its_own_convolution_is_shown_as_local_mixing(settings: dict[str, Any], words: str) -> None:
    for conv in (0, 4):
        found = measure.effective(model(conv=conv, **settings))
        assert found["local_mixing"] == words
        assert found["conv"] == ([] if settings.get("long") == "all" else ["conv_x"])
        assert found["causal"] is True
        assert found["kernel"] == "the module's own"
        assert found["state_dtype"] == "that of the activations"


def test_a_single_layer_has_no_odd_one() -> None:
    mixer = BaseConv(MixerSpec(D, settings={"long": "odd"}))
    assert (mixer.is_long, mixer.effective()["local_mixing"], mixer.effective()["long_taps"]) == (False, "own conv 3", None)


def test_the_model_gives_the_filter_its_longest_length() -> None:
    short, long = model(long="odd").mixers
    assert (short.is_long, long.is_long) == (False, True)
    assert long.spec.max_len == 12
    assert long.effective()["long_taps"] == 12


def test_a_model_of_fewer_tokens_than_the_causality_probe_is_described_too() -> None:
    assert measure.effective(model(seq_len=5, long="all"))["causal"] is True


def test_the_protocol_s_convolution_is_left_out_of_its_cells() -> None:
    plan = make_plan(["suite=mqar", "preset=test", "model=base_conv,gla", "conv=0,4"], "cpu")
    found = sorted((cell.model, cell.model_config.conv) for cell in plan.cells)
    assert [(name, conv) for name, conv in dict.fromkeys(found) if name == "base_conv"] == [("base_conv", 0)]
    assert {conv for name, conv in found if name == "gla"} == {0, 4}
    assert "conv has no effect on base_conv: left out" in plan.notes


def test_state_and_flops_by_formula() -> None:
    short, long = build(64), build(64, long="all")
    assert short.state_size(100) == 4 * 2 * 64
    assert long.state_size(100, itemsize=2) == 2 * 100 * 64
    assert short.op_flops(100) == 2 * 64
    transforms = 3 * 2.5 * 200 * math.log2(200)
    assert long.op_flops(100) == pytest.approx(64 * (3 + (transforms + 6 * 101) / 100))


def test_training_flops_count_the_network_of_a_long_filter() -> None:
    short, long = (model(long=long) for long in ("none", "odd"))
    taps, network = 3 * 16, 3 * 16 + 16 * 16
    more = 2 * (network - taps) + long.mixers[1].op_flops(12) - short.mixers[1].op_flops(12)
    found = [measure.train_flops_per_token(m, 12) for m in (short, long)]
    assert found[1] - found[0] == pytest.approx(3 * more)
