import copy
import math

import pytest
import torch

from hgrn2_bench import layers
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.hgrn2 import HGRN2
from hgrn2_bench.interfaces import Context, MixerSpec
from hgrn2_bench.layers import (
    FollowsBackend,
    ForgetGate,
    LayerNorm,
    RMSNorm,
    ShortConv,
    conv_buffers,
    conv_names,
    for_a_graph,
    forget_gate,
    l2_norm,
    token_shift,
)
from hgrn2_bench.model import GLU, SequenceModel
from hgrn2_bench.ops import fla, norms
from hgrn2_bench.ops import gate as gate_module


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_short_conv_equals_an_explicit_sum(width: int, length: int, bias: bool) -> None:
    torch.manual_seed(0)
    conv, x = ShortConv(3, width, "conv_x", bias), torch.randn(2, length, 3)
    weight = conv.conv.weight
    for row in range(2):
        for t in range(length):
            for d in range(3):
                taps = [weight[d, 0, w] * x[row, t - (width - 1 - w), d] for w in range(width) if t - (width - 1 - w) >= 0]
                want = sum(taps, conv.conv.bias[d] if conv.conv.bias is not None else torch.zeros(()))
                torch.testing.assert_close(conv(x, Context())[row, t, d], want)


def test_short_conv_buffer_holds_the_last_valid_inputs() -> None:
    conv, x = ShortConv(2, 4, "conv_x"), torch.arange(1.0, 21).reshape(2, 5, 2)
    ctx = Context(lengths_B=torch.tensor([5, 1]), return_state=True)
    conv(x, ctx)
    (buffer,) = ctx.next_state["conv_x"]
    assert torch.equal(buffer[0], x[0, 2:])
    assert torch.equal(buffer[1], torch.stack([torch.zeros(2), torch.zeros(2), x[1, 0]]))
    assert (conv_buffers(conv), conv_names(conv)) == (6, ["conv_x"])


def test_token_shift_gives_the_token_before_and_keeps_the_last_valid_one() -> None:
    x = torch.arange(1.0, 21).reshape(2, 5, 2)
    ctx = Context(lengths_B=torch.tensor([5, 2]), return_state=True)
    shifted = token_shift(x, ctx)
    assert torch.equal(shifted, torch.cat([torch.zeros(2, 1, 2), x[:, :-1]], 1))
    (last,) = ctx.next_state["shift"]
    assert torch.equal(last[:, 0], torch.stack([x[0, 4], x[1, 1]]))
    following = Context(state=ctx.next_state, return_state=True)
    assert torch.equal(token_shift(x[:, :1], following), last)
    assert torch.equal(following.next_state["shift"][0], x[:, :1])


@pytest.mark.parametrize("bound", [None, 0.0, 1e-6, 0.25, 0.9])
def test_forget_gate_is_exact_over_the_whole_range_of_logits(bound: float | None) -> None:
    z = torch.linspace(-80, 80, 1601)
    log_f, rest = forget_gate(z, None if bound is None else torch.full_like(z, bound))
    for logit, got_log_f, got_rest in zip(z.tolist(), log_f.tolist(), rest.tolist(), strict=True):
        share = 1 / (1 + math.exp(-logit))
        closed = (1 - (bound or 0)) / (1 + math.exp(logit))  # 1 - f
        want = math.log1p(-closed) if closed < 0.5 else math.log((bound or 0) + (1 - (bound or 0)) * share)
        # float32: relative to the value, and to the size of the logit where the bound cancels it
        assert got_log_f == pytest.approx(want, rel=1e-5, abs=2e-6 * max(1, -logit) * bool(bound))
        assert got_rest == pytest.approx(closed, rel=2e-5, abs=1e-37)


@pytest.mark.parametrize("logit", [-1000.0, -60.0, -20.0, 0.0, 20.0, 1000.0])
@pytest.mark.parametrize("bound", [0.0, 1e-9, 0.5])
def test_forget_gate_has_finite_gradients_at_the_extremes(logit: float, bound: float) -> None:
    z, lb = torch.tensor([logit], requires_grad=True), torch.tensor([bound], requires_grad=True)
    log_f, rest = forget_gate(z, lb)
    (log_f + rest).sum().backward()
    assert all(t is not None and t.isfinite().all() for t in (log_f, rest, z.grad, lb.grad))


def test_forget_gate_gradients_equal_those_of_the_plain_formula() -> None:
    z, lb = torch.linspace(-6, 6, 25, dtype=torch.float64), torch.full((25,), 0.3, dtype=torch.float64)

    def plain(z: torch.Tensor, lb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        f = lb + (1 - lb) * z.sigmoid()
        return f.log(), 1 - f

    for index in (0, 1):
        got, want = (
            torch.autograd.functional.jacobian(lambda a, b, f=f, index=index: f(a, b)[index].sum(), (z, lb)) for f in (forget_gate, plain)
        )
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_forget_gate_takes_the_row_of_its_layer() -> None:
    table = torch.tensor([[0.0, 0.0], [0.25, 0.5], [0.75, 0.9]])
    for layer in range(3):
        log_f, rest = ForgetGate(MixerSpec(2, layer=layer), True)(torch.full((1, 1, 2), -100.0), Context(shared={"lower_bound": table}))
        torch.testing.assert_close(log_f.exp()[0, 0], table[layer], rtol=1e-4, atol=1e-30)
        torch.testing.assert_close(rest[0, 0], 1 - table[layer])


@pytest.mark.parametrize(("conv", "projection_bias", "own"), [(0, True, False), (0, False, True), (4, True, True), (4, False, True)])
def test_forget_bias_goes_where_it_reaches_the_logit_unchanged(conv: int, projection_bias: bool, own: bool) -> None:
    gate, projection = ForgetGate(MixerSpec(2, conv=conv, forget_bias=3.0), projection_bias), torch.nn.Linear(2, 6, bias=projection_bias)
    before = None if projection.bias is None else projection.bias.detach().clone()
    for _ in range(1 + own):  # its own bias is set, not added to: a second call changes nothing
        gate.init_bias(projection)
    assert (gate.bias is not None) == own
    if own:
        assert gate.bias is not None
        assert gate.bias.tolist() == [3.0, 3.0]
    elif before is not None:
        torch.testing.assert_close(projection.bias - before, torch.tensor([0.0, 0, 0, 0, 3, 3]))


def test_a_gate_without_forget_bias_has_no_parameters() -> None:
    assert not list(ForgetGate(MixerSpec(2, conv=4), False).parameters())


def test_l2_norm_has_length_one_in_any_dtype_and_leaves_zero_alone() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(l2_norm(x).norm(dim=-1), torch.ones(3))
    assert l2_norm(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(l2_norm(x.bfloat16()).float(), l2_norm(x), rtol=0.02, atol=1e-3)
    zero = torch.zeros(2, 4, requires_grad=True)
    l2_norm(zero).sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


# layers that have a kernel of fla; the kernels' numbers are in test_fla_interpreter.py and gpu/test_fla_gpu.py


@pytest.mark.parametrize("backend", ["chunked", "reference", "fla"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_model_tells_its_backend_to_every_layer_that_follows_it(backend: str, norm: str) -> None:
    model = SequenceModel(ModelConfig(d_model=16, conv=4, norm=norm), HGRN2, {}, backend, 11, 12)
    followers = [module for module in model.modules() if isinstance(module, FollowsBackend)]
    assert {type(module) for module in followers} == {ShortConv, LayerNorm if norm == "layernorm" else RMSNorm, LayerNorm, ForgetGate}
    assert {module.backend for module in followers} == {backend}


@pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
def test_norms_are_torch_s_own_off_the_gpu(make: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    mine, plain = make(8, eps=1e-5), {LayerNorm: torch.nn.LayerNorm, RMSNorm: torch.nn.RMSNorm}[make](8, eps=1e-5)
    x = torch.randn(2, 3, 8)
    for backend in ("chunked", "fla"):
        mine.backend = backend  # on the CPU no Triton kernel can run, whatever the backend
        assert torch.equal(mine(x), plain(x))
    assert mine.state_dict().keys() == plain.state_dict().keys()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype]]:
    """What reaches the kernels in Triton, as (name, dtype of the input); every tensor counts as one on a GPU."""
    found: list[tuple[str, torch.dtype]] = []

    def kernel(name: str):
        def run(x: torch.Tensor, *_: object) -> torch.Tensor:
            found.append((name, x.dtype))
            return x

        return run

    for module, name in ((norms, "layer_norm"), (norms, "rms_norm"), (fla, "causal_conv"), (fla, "swiglu")):
        monkeypatch.setattr(module, name, kernel(name))
    monkeypatch.setattr(FollowsBackend, "on_triton", lambda self, x: self.backend == "fla")
    return found


def test_norms_run_in_triton_for_a_graph_and_on_large_inputs(asked: list[tuple[str, torch.dtype]], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 8).bfloat16()
    for layer, kernel in ((LayerNorm(8).bfloat16(), "layer_norm"), (RMSNorm(8, eps=1e-5).bfloat16(), "rms_norm")):
        layer(x)
        with for_a_graph():
            layer(x)
        layer.backend = "fla"
        layer(x)
        with for_a_graph(), for_a_graph(on=False):  # the outer one holds
            copy.deepcopy(layer).double()(x.double())
            assert asked == []
            layer(x)
        with torch.no_grad(), monkeypatch.context() as small:
            small.setattr(layers, "LARGE", x.numel())
            layer(x)
            small.setattr(torch.compiler, "is_compiling", lambda: True)
            layer(x)
            layer.double()(x.double())
        assert asked == [(kernel, torch.bfloat16)] * 2
        asked.clear()
    without = RMSNorm(8)  # torch chooses eps by the dtype
    without.backend = "fla"
    with for_a_graph():
        without(x.float())
    assert asked == []


@pytest.mark.parametrize("layer", [LayerNorm(8), RMSNorm(8, eps=1e-5)], ids=["layer", "rms"])
def test_a_norm_in_triton_is_in_float32_under_autocast(asked: list[tuple[str, torch.dtype]], layer: torch.nn.Module) -> None:
    layer.backend = "fla"
    with torch.autocast("cpu", torch.bfloat16), for_a_graph():
        layer(torch.randn(2, 3, 8).bfloat16())
    assert [dtype for _, dtype in asked] == [torch.float32]


def test_norms_that_no_kernel_holds_are_torch_s(asked: list[tuple[str, torch.dtype]], monkeypatch: pytest.MonkeyPatch) -> None:
    over_two, wide, narrow = LayerNorm((3, 8)), LayerNorm(8), RMSNorm(4, eps=1e-5)
    for layer in (over_two, wide, narrow):
        layer.backend = "fla"
    x = torch.randn(2, 3, 8)
    monkeypatch.setattr(layers, "WIDEST", 7)
    with for_a_graph():
        torch.testing.assert_close(over_two(x), torch.nn.functional.layer_norm(x, (3, 8)))
        with pytest.raises(RuntimeError, match="normalized_shape"):
            narrow(x)
        wide(x)
    assert asked == []


@pytest.mark.parametrize("bounded", [False, True])
def test_a_forget_gate_gives_its_kernel_the_bound_of_its_layer_and_the_type_of_the_key(
    bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[torch.Tensor | None, torch.dtype]] = []

    def kernel(logit: torch.Tensor, bound: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        given.append((bound, dtype))
        return logit, logit

    monkeypatch.setattr(gate_module, "forget_gate", kernel)
    monkeypatch.setattr(FollowsBackend, "on_triton", lambda self, x: self.backend == "fla")
    gate = ForgetGate(MixerSpec(6, layer=1), projection_bias=True)
    gate.backend = "fla"
    bound_LD = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.2, 0.3]])
    ctx = Context(shared={"lower_bound": bound_LD} if bounded else {})
    gate(torch.randn(1, 2, 6), ctx, torch.bfloat16)
    gate(torch.randn(1, 2, 6), ctx)
    gate(torch.randn(1, 2, 6).double(), ctx)  # torch's
    assert [dtype for _, dtype in given] == [torch.bfloat16, torch.float32]
    for bound, _ in given:
        assert (bound is not None) == bounded
        assert bound is None or torch.equal(bound, bound_LD[1].repeat(2))


@pytest.mark.parametrize("variant", ["paper", "fla"])
def test_hgrn2_rounds_its_key_as_its_query(variant: str) -> None:
    mixer = HGRN2(MixerSpec(8, settings={"variant": variant, "expand_ratio": 4}))
    with torch.autocast("cpu", torch.bfloat16):
        inputs = mixer.project(torch.randn(1, 3, 8), Context())
    assert (inputs.q_BTHK.dtype, inputs.k_BTHK.dtype, inputs.log_f_BTHK.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_a_convolution_gives_fla_s_kernel_what_it_holds_and_takes_it_off_again(asked: list[tuple[str, torch.dtype]]) -> None:
    conv, x = ShortConv(2, 4, "conv_x"), torch.arange(1.0, 21).reshape(2, 5, 2)
    conv.backend = "fla"
    ctx = Context(return_state=True)
    with torch.no_grad():
        assert torch.equal(conv(x, Context()), x)  # nothing before it: nothing is padded
        assert torch.equal(conv(x, ctx), x)
        assert torch.equal(conv(x, Context(state=ctx.next_state)), x)
    assert torch.equal(ctx.next_state["conv_x"][0], x[:, 2:])
    assert asked == [("causal_conv", torch.float32)] * 3


def test_a_gated_unit_takes_fla_s_kernel_for_a_graph_and_on_large_inputs(
    asked: list[tuple[str, torch.dtype]], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 3, 8)
    for activation, expected in (("none", []), ("silu", [("swiglu", torch.float32)])):
        unit = GLU(8, 12, activation=activation)
        plain = unit(x)
        with for_a_graph():
            unit(x)
        unit.backend = "fla"
        assert torch.equal(unit(x), plain)
        assert asked == []
        with for_a_graph():
            unit(x)
        with torch.no_grad(), monkeypatch.context() as small:
            small.setattr(layers, "LARGE", 2 * 3 * 12)
            unit(x)
        assert asked == expected * 2
        asked.clear()
