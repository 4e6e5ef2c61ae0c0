import math
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.retnet import RetNet, turn, turn_table
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, MixerSpec

T = 6


def build(d_model: int = 16, conv: int = 0, backend: str = "reference", **settings: Any) -> RetNet:
    torch.manual_seed(0)
    return RetNet(MixerSpec(d_model, conv=conv, backend=backend, settings=settings))


def turned(x_K: Tensor, t: int) -> Tensor:
    """Channel pair (2j, 2j + 1) as a complex number times exp(i t theta_j)."""
    pairs, y = len(x_K) // 2, torch.empty_like(x_K)
    for j in range(pairs):
        angle = t * 10_000 ** (-j / (pairs - 1) if pairs > 1 else 0.0)
        z = complex(x_K[2 * j].item(), x_K[2 * j + 1].item()) * complex(math.cos(angle), math.sin(angle))
        y[2 * j], y[2 * j + 1] = z.real, z.imag
    return y


def equations(mixer: RetNet, x_TD: Tensor, K: int, V: int) -> Tensor:
    """The layer written from the paper, one token and one head after the other."""
    H = mixer.num_heads
    W_q, W_k, W_v = mixer.in_proj.weight.split([H * K, H * K, H * V])
    S, outputs = [torch.zeros(K, V).double() for _ in range(H)], []
    for t, x_D in enumerate(x_TD):
        q, k, v = W_q @ x_D, W_k @ x_D, W_v @ x_D
        heads = []
        for h in range(H):
            keys, values = slice(h * K, (h + 1) * K), slice(h * V, (h + 1) * V)
            q_h, k_h = (turned(y[keys], t) if mixer.rotate else y[keys] for y in (q, k))
            S[h] = (1 - 2.0 ** (-5 - h)) * S[h] + torch.outer(k_h, v[values])
            o = S[h].T @ q_h / math.sqrt(K)
            heads.append(o / ((o**2).mean() + 1e-6).sqrt())
        gate = mixer.gate_proj.weight @ x_D
        outputs.append(mixer.out_proj.weight @ (torch.cat(heads) * gate / (1 + (-gate).exp())))
    return torch.stack(outputs)


SETTINGS = [
    ({}, 2, 4),
    ({"num_heads": 2}, 8, 16),
    ({"num_heads": 2, "expand_k": 0.5, "expand_v": 1.0}, 4, 8),
    ({"num_heads": 16, "rotate": False}, 1, 2),
]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("settings", "K", "V"), SETTINGS)
def test_layer_equals_the_equations(backend: str, settings: dict[str, Any], K: int, V: int) -> None:
    mixer, x = build(backend=backend, **settings).double(), torch.randn(2, T, 16).double()
    want = torch.stack([equations(mixer, x_TD, K, V) for x_TD in x])
    torch.testing.assert_close(mixer(x), want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("prompt", [0, 4])
@pytest.mark.parametrize("settings", [s for s, _, _ in SETTINGS])
def test_decoding_equals_the_forward_pass(conv: int, prompt: int, settings: dict[str, Any]) -> None:
    mixer, x = build(conv=conv, **settings).double(), torch.randn(2, T, 16).double()
    prefill = Context(return_state=True)
    outputs = list(mixer(x[:, :prompt], prefill).unbind(1)) if prompt else []
    state = prefill.next_state if prompt else None
    for x_BD in x[:, prompt:].unbind(1):
        y_BD, state = mixer.step(x_BD, state)
        outputs.append(y_BD)
    torch.testing.assert_close(torch.stack(outputs, 1), mixer(x), rtol=1e-9, atol=1e-9)
    assert state is not None
    if mixer.rotate:
        assert state["position"][0].tolist() == [T, T]
    else:
        assert "position" not in state


@torch.no_grad()
def test_decoding_after_padded_prompts_turns_every_row_by_its_own_length() -> None:
    mixer, x, lengths = build().double(), torch.randn(3, T, 16).double(), [5, 2, 1]
    prefill = Context(lengths_B=torch.tensor(lengths), return_state=True)
    mixer(x, prefill)
    after = torch.randn(3, 16).double()
    y_BD, state = mixer.step(after, prefill.next_state)
    assert state["position"][0].tolist() == [6, 3, 2]
    for row, length in enumerate(lengths):
        want = mixer(torch.cat([x[row, :length], after[row : row + 1]])[None])[0, -1]
        torch.testing.assert_close(y_BD[row], want, rtol=1e-9, atol=1e-9)


def test_rotation_depends_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(t: int, s: int) -> Tensor:
        return (turn(q, turn_table(torch.tensor([[t]]), q)) * turn(k, turn_table(torch.tensor([[s]]), k))).sum()

    torch.testing.assert_close(score(3, 0), score(100_003, 100_000), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(score(3, 0), score(4, 0))


def test_rotation_is_no_matter_of_the_protocol_s_positions() -> None:
    x = torch.randn(1, T, 16, generator=torch.Generator().manual_seed(1))
    rope = RetNet(MixerSpec(16, positions="rope", backend="reference"))
    rope.load_state_dict(build().state_dict())
    assert torch.equal(rope(x), build()(x))
    assert not torch.allclose(build(rotate=False)(x), build()(x), atol=1e-4)


def test_decays_are_fixed_and_exact() -> None:
    log_f_BTH = build().project(torch.randn(2, T, 16), Context()).log_f_BTH
    assert log_f_BTH.shape == (2, T, 8)
    want = torch.tensor([math.log1p(-(2.0 ** -(5 + h))) for h in range(8)])
    torch.testing.assert_close(log_f_BTH, want.expand(2, T, 8), rtol=1e-6, atol=0)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("conv", [0, 4])
def test_parameter_count(d: int, conv: int) -> None:
    queries_keys, values_gate_output = 2 * d * d, 3 * d * 2 * d  # 8 d^2, as the paper counts
    assert sum(p.numel() for p in build(d, conv).parameters()) == queries_keys + values_gate_output + conv * 4 * d


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_heads": 7}, r"d_model \* expand_k=64 must be a multiple of num_heads=7 \(.*\); nearest legal num_heads: 4 or 8"),
        (
            {"num_heads": 64},
            r"d_model \* expand_k / 2=32 must be a multiple of num_heads=64 \(rotated pairs .*\); nearest legal num_heads: 32",
        ),
        ({"num_heads": 4, "expand_v": 1.03125}, r"d_model \* expand_v=66 must be a multiple of num_heads=4 .*: 3 or 6"),
        ({"expand_k": 0.3}, r"d_model \* expand_k = 64 \* 0.3 = 19.2 must be a whole number .* nearest legal expand_k: 0.296875 or 0.3125"),
        ({"expand_v": -1.0}, r"d_model \* expand_v = 64 \* -1 = -64 must be a whole number"),
        ({"expand_k": 0.015625, "num_heads": 1}, r"d_model \* expand_k = 1 must be even, or rotate=false"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(64, **settings)


def test_state_and_flops_by_formula() -> None:
    mixer = build(64, conv=4)  # 8 heads of 8 keys and 16 values; one position
    assert mixer.state_size(100) == 4 * (8 * 8 * 16 + 1 + 3 * (64 + 64 + 128))
    assert mixer.state_size(100, itemsize=2) == 4 * (8 * 8 * 16 + 1) + 2 * 3 * (64 + 64 + 128)
    assert build(64, rotate=False).state_size(100) == 4 * 8 * 8 * 16
    assert mixer.op_flops(100) == 5 * 8 * 16 * 8
