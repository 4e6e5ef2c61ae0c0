import math
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.delta_net import DeltaNet
from hgrn2_bench.interfaces import Context, MixerSpec
from hgrn2_bench.ops import families
from hgrn2_bench.ops.families import DeltaInputs


def build(d_model: int = 16, conv: int = 0, **settings: Any) -> DeltaNet:
    torch.manual_seed(0)
    return DeltaNet(MixerSpec(d_model, conv=conv, backend="reference", settings=settings))


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def equations(mixer: DeltaNet, x_TD: Tensor, H: int, conv: int) -> Tensor:
    """The layer written from the paper, one token and one head after the other, with the state update as one matrix equation."""
    D = x_TD.shape[1]
    K, weights, outputs = D // H, mixer.in_proj.weight.split(D), []
    S, past = [torch.zeros(K, K).double() for _ in range(H)], [[torch.zeros(D).double()] * max(conv - 1, 0) for _ in range(3)]
    for x_D in x_TD:
        streams = []
        for i, W in enumerate(weights):
            stream = W @ x_D
            if conv:
                window, taps = [*past[i], stream], (mixer.conv_q, mixer.conv_k, mixer.conv_v)[i].conv.weight[:, 0]
                past[i], stream = window[1:], torch.stack([taps[:, w] * window[w] for w in range(conv)]).sum(0)
            streams.append(silu(stream))
        beta, heads = 1 / (1 + (-(mixer.beta_proj.weight @ x_D)).exp()), []
        for h in range(H):
            q, k, v = (stream[h * K : (h + 1) * K] for stream in streams)
            q, k = q / (q @ q + 1e-6).sqrt(), k / (k @ k + 1e-6).sqrt()
            S[h] = (torch.eye(K).double() - beta[h] * torch.outer(k, k)) @ S[h] + beta[h] * torch.outer(k, v)
            o = S[h].T @ q / math.sqrt(K)
            heads.append(o / ((o**2).mean() + 1e-5).sqrt() * mixer.norm.weight)
        outputs.append(mixer.out_proj.weight @ torch.cat(heads))
    return torch.stack(outputs)


@torch.no_grad()
@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize(("settings", "H"), [({}, 1), ({"num_heads": 4}, 4)])
def test_layer_equals_the_equations(settings: dict[str, int], H: int, conv: int) -> None:
    mixer, x = build(conv=conv, **settings).double(), torch.randn(2, 6, 16).double()
    torch.nn.init.normal_(mixer.norm.weight)
    torch.testing.assert_close(mixer(x), torch.stack([equations(mixer, x_TD, H, conv) for x_TD in x]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("d", "heads"), [(16, 1), (64, 1), (128, 1), (192, 2), (256, 2), (320, 4), (1024, 8), (2048, 16)])
def test_heads_have_at_most_128_channels(d: int, heads: int) -> None:
    with torch.device("meta"):
        assert build(d).heads == heads


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("conv", [0, 4])
def test_parameter_count(d: int, conv: int) -> None:
    want = 4 * d * d + 2 * d + d // 2 + conv * 3 * d  # four matrices, beta, norm, convolutions
    assert sum(p.numel() for p in build(d, conv, num_heads=2).parameters()) == want


def test_keys_and_queries_have_unit_length_and_nothing_decays() -> None:
    op = build(32, num_heads=2).project(10 * torch.randn(3, 7, 32), Context())
    for x in (op.q_BTHK, op.k_BTHK):
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(3, 7, 2), rtol=1e-4, atol=1e-4)
    assert op.log_f_BTH is None


def test_a_pair_is_recalled_exactly_until_its_key_is_written_again() -> None:
    """With beta = 1 the state gives back the last value stored under a key."""
    keys, v = torch.eye(8)[:, None], torch.randn(1, 3, 1, 8)
    op = DeltaInputs(q_BTHK=keys[None, [0, 0, 0]], k_BTHK=keys[None, [0, 1, 0]], v_BTHV=v, beta_BTH=torch.ones(1, 3, 1))
    o, _ = families.run(op, "chunked")
    torch.testing.assert_close(o, v[:, [0, 0, 2]])


def test_state_and_flops_by_formula() -> None:
    mixer = build(64, conv=4, num_heads=2)
    assert mixer.state_size(100) == 4 * (2 * 32 * 32 + 3 * 3 * 64)
    assert mixer.op_flops(100) == 2 * (6 * 32 * 32 + 2 * 32)
