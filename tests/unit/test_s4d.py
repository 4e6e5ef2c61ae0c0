import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from baselines.s4d import S4D
from hgrn2_bench.config import TrainConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, MixerSpec
from hgrn2_bench.measure import log_decay_of
from hgrn2_bench.trainer import make_optimizer


def build(d_model: int = 6, conv: int = 0, backend: str = "reference", **settings: Any) -> S4D:
    torch.manual_seed(0)
    return S4D(MixerSpec(d_model, conv=conv, backend=backend, settings=settings))


def shaken(mixer: S4D) -> S4D:
    """The mixer in float64 with every parameter moved off its starting value, and steps large enough for the decay to matter."""
    with torch.no_grad():
        for parameter in mixer.double().parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        mixer.log_dt += 1
    return mixer


def numpy_of(x: Tensor) -> np.ndarray:
    return x.detach().numpy()


def equations(mixer: S4D, x_TD: Tensor, conv: int) -> np.ndarray:
    """The layer from the paper with its matrices written out: both states of each pair, and exp(dt A) as a dense P x P matrix."""
    x, T, D = numpy_of(x_TD), *x_TD.shape
    u = x
    if conv:
        taps, past = numpy_of(mixer.conv_u.conv.weight)[:, 0], np.concatenate([np.zeros((conv - 1, D)), x])
        u = np.stack([sum(taps[:, w] * past[t + w] for w in range(conv)) for t in range(T)])
    y = np.zeros((T, D))
    for d in range(D):
        half = -np.exp(numpy_of(mixer.log_A_real)[d]) + 1j * numpy_of(mixer.A_imag)[d]
        A = np.diag(np.concatenate([half, half.conj()]))
        B, C = (numpy_of(pair)[d] @ np.array([1, 1j]) for pair in (mixer.B, mixer.C))
        B, C = (np.concatenate([z, z.conj()]) for z in (B, C))
        dt = np.exp(numpy_of(mixer.log_dt)[d])
        A_bar = np.diag(np.exp(dt * np.diag(A)))
        B_bar = np.linalg.inv(A) @ (A_bar - np.eye(len(A))) @ B
        h = np.zeros(len(A), dtype=complex)
        for t in range(T):
            h = A_bar @ h + B_bar * u[t, d]
            assert abs((C @ h).imag) < 1e-12
            y[t, d] = (C @ h).real + numpy_of(mixer.D)[d] * u[t, d]
    gelu = np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))))(y)
    value, gate = np.split(gelu @ numpy_of(mixer.out_proj.weight).T + numpy_of(mixer.out_proj.bias), 2, axis=1)
    return value / (1 + np.exp(-gate))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("settings", [{"d_state": 2}, {"d_state": 8}, {"d_state": 8, "init": "legs"}])
def test_layer_equals_the_equations(settings: dict[str, Any], conv: int, backend: str) -> None:
    mixer, x = shaken(build(conv=conv, backend=backend, **settings)), torch.randn(2, 70, 6).double()
    want = np.stack([equations(mixer, x_TD, conv) for x_TD in x])
    np.testing.assert_allclose(mixer(x).numpy(), want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("conv", [0, 4])
def test_decoding_equals_the_forward_pass(conv: int) -> None:
    mixer, x = shaken(build(conv=conv, backend="chunked", d_state=8)), torch.randn(2, 70, 6).double()
    ctx = Context(return_state=True)
    outputs, state = [mixer(x[:, :66], ctx)], ctx.next_state
    for x_BD in x[:, 66:].unbind(1):
        y_BD, state = mixer.step(x_BD, state)
        outputs.append(y_BD[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x), rtol=1e-9, atol=1e-9)


def test_starting_step_sizes_are_log_uniform() -> None:
    dt = build(4096, d_state=2).log_dt.exp()
    assert dt.min().item() == pytest.approx(1e-3, rel=0.01)
    assert dt.max().item() == pytest.approx(1e-1, rel=0.01)
    assert (dt < 1e-2).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_starting_system_is_the_published_one() -> None:
    mixer = build(256)
    torch.testing.assert_close(mixer.log_A_real.exp(), torch.full((256, 32), 0.5))
    torch.testing.assert_close(mixer.A_imag[7], math.pi * torch.arange(32))
    assert (torch.view_as_complex(mixer.B.detach()) == 1).all()
    C = torch.view_as_complex(mixer.C.detach())
    assert C.abs().square().mean().item() == pytest.approx(1, abs=0.05)  # standard complex normal
    assert C.mean().abs().item() < 0.05
    assert mixer.D.std().item() == pytest.approx(1, abs=0.15)


def test_the_row_tells_the_median_decay() -> None:
    decay = log_decay_of(build(64).project(torch.randn(1, 1, 64), Context()))
    assert decay is not None
    assert decay.exp().median().item() == pytest.approx(math.exp(-0.5 * 1e-2), abs=2e-3)  # half the median step, log-uniform


def test_inv_frequencies_follow_the_formula() -> None:
    A_imag = build(3, init="inv", d_state=4).A_imag
    want = [4 / math.pi * (4 / 1 - 1), 4 / math.pi * (4 / 3 - 1)]
    torch.testing.assert_close(A_imag, torch.tensor(want).repeat(3, 1))


def test_legs_frequencies_are_those_of_hippo_without_its_low_rank_term() -> None:
    P = 16
    A, p = np.zeros((P, P)), np.array([(n + 0.5) ** 0.5 for n in range(P)])
    for n in range(P):
        A[n, n] = -(n + 1)
        for k in range(n):
            A[n, k] = -(((2 * n + 1) * (2 * k + 1)) ** 0.5)
    values = np.linalg.eigvals(A + np.outer(p, p))
    np.testing.assert_allclose(values.real, -0.5, atol=1e-9)
    want = sorted(values.imag[values.imag > 0])
    np.testing.assert_allclose(numpy_of(build(2, init="legs", d_state=P).A_imag), np.tile(want, (2, 1)), rtol=1e-5)
    inv = sorted(build(1, init="inv", d_state=P).A_imag[0].tolist())
    assert want[-1] == pytest.approx(inv[-1], rel=0.1)  # what `inv` was made from: the largest frequencies agree


def test_only_the_system_learns_slowly_and_undecayed() -> None:
    mixer = build()
    names = {id(p): n for n, p in mixer.named_parameters()}
    groups = make_optimizer(mixer, TrainConfig(lr=5e-3, weight_decay=0.1), "cpu").param_groups
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    slow = dict.fromkeys(("log_dt", "log_A_real", "A_imag", "B"), (1e-3, 0.0))
    fast = dict.fromkeys(("C", "out_proj.weight"), (5e-3, 0.1)) | dict.fromkeys(("D", "out_proj.bias"), (5e-3, 0.0))
    assert found == {name: (pytest.approx(lr), decay) for name, (lr, decay) in (slow | fast).items()}


@pytest.mark.parametrize("conv", [0, 4])
def test_parameter_count(conv: int) -> None:
    d, N = 64, 32
    assert sum(p.numel() for p in build(d, conv).parameters()) == d * (2 + 6 * N) + 2 * d * (d + 1) + conv * d


@pytest.mark.parametrize(("d_state", "legal"), [(5, "4 or 6"), (1, "2"), (0, "2"), (-2, "2")])
def test_states_without_partners_are_refused(d_state: int, legal: str) -> None:
    with pytest.raises(ConfigError, match=rf"d_state={d_state} must be even, states come in pairs; nearest legal d_state: {legal}$"):
        build(d_state=d_state)


def test_unknown_starting_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Unknown init 'leg'. Did you mean 'legs'\?"):
        build(init="leg")


def test_state_and_flops_by_formula() -> None:
    mixer = build(64, conv=4)
    assert mixer.state_size(100) == 8 * 64 * 32 + 4 * 3 * 64
    assert mixer.op_flops(100) == 64 * (11 * 32 + 2)
