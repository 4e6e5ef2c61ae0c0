import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from baselines.lru import LRU
from hgrn2_bench.config import TrainConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, MixerSpec
from hgrn2_bench.trainer import make_optimizer


def build(d_model: int = 6, conv: int = 0, backend: str = "reference", **settings: Any) -> LRU:
    torch.manual_seed(0)
    return LRU(MixerSpec(d_model, conv=conv, backend=backend, settings=settings))


def numpy_of(x: Tensor) -> np.ndarray:
    return x.detach().numpy()


def equations(mixer: LRU, x_TD: Tensor, conv: int) -> np.ndarray:
    """The block's mixer from the paper, one token after the other, with complex matrices B, C and a dense diagonal one."""
    x, T, D = numpy_of(x_TD), *x_TD.shape
    u = x
    if conv:
        taps, past = numpy_of(mixer.conv_u.conv.weight)[:, 0], np.concatenate([np.zeros((conv - 1, D)), x])
        u = np.stack([sum(taps[:, w] * past[t + w] for w in range(conv)) for t in range(T)])
    B = numpy_of(mixer.in_proj.weight)[0::2] + 1j * numpy_of(mixer.in_proj.weight)[1::2]
    C = numpy_of(mixer.C_proj.weight)[:, 0::2] - 1j * numpy_of(mixer.C_proj.weight)[:, 1::2]
    Lambda = np.diag(np.exp(-np.exp(numpy_of(mixer.nu_log)) + 1j * np.exp(numpy_of(mixer.theta_log))))
    gamma, h, y = np.diag(np.exp(numpy_of(mixer.gamma_log))), np.zeros(len(B), dtype=complex), np.zeros((T, D))
    for t in range(T):
        h = Lambda @ h + gamma @ B @ u[t]
        y[t] = (C @ h).real + numpy_of(mixer.D) * x[t]
    gelu = np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))))(y)
    value, gate = np.split(gelu @ numpy_of(mixer.out_proj.weight).T + numpy_of(mixer.out_proj.bias), 2, axis=1)
    return value / (1 + np.exp(-gate))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("settings", [{"d_state": 1}, {"d_state": 9, "r_min": 0.0, "r_max": 0.9, "max_phase": 1.0}])
def test_layer_equals_the_equations(settings: dict[str, Any], conv: int, backend: str) -> None:
    mixer, x = build(conv=conv, backend=backend, **settings).double(), torch.randn(2, 40, 6).double()
    want = np.stack([equations(mixer, x_TD, conv) for x_TD in x])
    np.testing.assert_allclose(mixer(x).numpy(), want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("conv", [0, 4])
def test_decoding_equals_the_forward_pass(conv: int) -> None:
    mixer, x = build(conv=conv, backend="chunked", d_state=9).double(), torch.randn(2, 20, 6).double()
    ctx = Context(return_state=True)
    outputs, state = [mixer(x[:, :15], ctx)], ctx.next_state
    for x_BD in x[:, 15:].unbind(1):
        y_BD, state = mixer.step(x_BD, state)
        outputs.append(y_BD[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), mixer(x), rtol=1e-9, atol=1e-9)


def test_eigenvalues_start_uniform_on_the_ring() -> None:
    r_min, r_max, max_phase = 0.4, 0.8, math.pi / 10
    inputs = build(2, d_state=4096, r_min=r_min, r_max=r_max, max_phase=max_phase).project(torch.randn(1, 1, 2), Context())
    area = (inputs.log_a_BTD[0, 0].exp() ** 2 - r_min**2) / (r_max**2 - r_min**2)
    assert inputs.theta is not None
    for share in (area, inputs.theta / max_phase):
        assert -1e-5 < share.min() < 0.01
        assert 0.99 < share.max() < 1 + 1e-5
        assert [(share < part).float().mean().item() for part in (0.25, 0.5, 0.75)] == pytest.approx([0.25, 0.5, 0.75], abs=0.03)


@torch.no_grad()
def test_states_of_white_noise_start_with_the_size_of_the_input() -> None:
    """gamma keeps E |h|^2 at E |B u|^2, and B has it at half the mean square of u over two real numbers, 1 for unit inputs."""
    mixer = build(64, d_state=512, r_min=0.0, r_max=0.99, backend="chunked")
    inputs = mixer.project(torch.randn(4, 1500, 64), Context())
    h0 = torch.zeros(4, 512, dtype=torch.complex64)
    a = torch.polar(inputs.log_a_BTD[0, 0].exp(), inputs.theta)
    total, counted = 0.0, 0
    for t, v_BN in enumerate(inputs.x_BTD.unbind(1)):
        h0 = a * h0 + v_BN
        if t >= 500:
            total, counted = total + h0.abs().square().mean().item(), counted + 1
    assert total / counted == pytest.approx(1, rel=0.1)


def test_the_whole_disc_is_a_ring_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for drawn in (0.0, 1.0):
        monkeypatch.setattr(torch, "rand_like", lambda x, drawn=drawn: torch.full_like(x, drawn))
        assert all(p.isfinite().all() for p in build(d_state=2, r_min=0.0, r_max=1.0).parameters())


def test_eigenvalues_stay_inside_the_unit_circle_for_any_parameter() -> None:
    mixer = build(2, d_state=3)
    mixer.nu_log.data = torch.tensor([-100.0, 0.0, 5.0])
    decay = mixer.project(torch.randn(1, 1, 2), Context()).log_a_BTD.exp()
    assert (decay <= 1).all()
    assert (decay >= 0).all()


def test_only_eigenvalues_and_gamma_learn_slowly() -> None:
    mixer = build()
    names = {id(p): n for n, p in mixer.named_parameters()}
    groups = make_optimizer(mixer, TrainConfig(lr=2e-3, weight_decay=0.1), "cpu").param_groups
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    want = dict.fromkeys(("nu_log", "theta_log", "gamma_log"), (1e-3, 0.0))
    want |= dict.fromkeys(("in_proj.weight", "D", "out_proj.bias"), (2e-3, 0.0)) | dict.fromkeys(
        ("C_proj.weight", "out_proj.weight"), (2e-3, 0.1)
    )
    assert found == {name: (pytest.approx(lr), decay) for name, (lr, decay) in want.items()}


@pytest.mark.parametrize("conv", [0, 4])
def test_parameter_count(conv: int) -> None:
    d, N = 64, 256
    assert sum(p.numel() for p in build(d, conv).parameters()) == 4 * d * N + 3 * N + d + 2 * d * (d + 1) + conv * d


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"d_state": 0}, "d_state=0 must be at least 1"),
        ({"r_min": 0.9, "r_max": 0.9}, "r_min=0.9 and r_max=0.9 must be radii, 0 <= r_min < r_max <= 1"),
        ({"r_max": 1.1}, "r_max=1.1 must be radii"),
        ({"max_phase": 0.0}, "max_phase=0 must be an angle, 0 < max_phase <= 6.28319"),
        ({"max_phase": 7.0}, "max_phase=7 must be an angle"),
    ],
)
def test_settings_that_make_no_ring_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**settings)


def test_state_and_flops_by_formula() -> None:
    mixer = build(64, conv=4)
    assert mixer.state_size(100) == 8 * 256 + 4 * 3 * 64
    assert mixer.op_flops(100) == 10 * 256 + 2 * 64
