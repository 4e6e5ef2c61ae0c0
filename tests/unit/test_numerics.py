"""What stands before a timing: a backend that computes the same function as `reference`."""

import pytest
import torch
import torch.nn.functional as F

from hgrn2_bench import numerics
from hgrn2_bench.ops import chunked
from hgrn2_bench.ops.families import DecayInputs, DiagonalInputs, SoftmaxInputs


def decay(dtype=torch.float32):
    torch.manual_seed(0)
    q, k, v, logits = torch.randn(4, 2, 70, 2, 8)
    return DecayInputs(q.to(dtype), k.to(dtype), v.to(dtype), F.logsigmoid(logits))


def test_chunked_passes_with_gradients():
    for inputs in (decay(), SoftmaxInputs(*decay_qkv(), scale=0.3), DiagonalInputs(torch.randn(2, 70, 8), -torch.rand(2, 70, 8))):
        error, _ = numerics.relative_error(inputs, "chunked", gradients=True)
        assert error < 1e-5


def decay_qkv():
    inputs = decay()
    return inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV


def test_a_wrong_output_and_a_wrong_gradient_are_found(monkeypatch):
    right = chunked.per_channel_decay

    def off(inputs, state):
        o, final = right(inputs, state)
        return 1.1 * o, final

    def flat(inputs, state):
        o, final = right(inputs, state)
        return o.detach() + 0 * inputs.q_BTHK.sum() + 0 * inputs.k_BTHK.sum(), final

    monkeypatch.setattr(chunked, "per_channel_decay", off)
    assert numerics.relative_error(decay(), "chunked", gradients=False) == (pytest.approx(0.1, rel=1e-4), "o")
    monkeypatch.setattr(chunked, "per_channel_decay", flat)
    assert numerics.relative_error(decay(), "chunked", gradients=False)[0] < 1e-5
    error, worst = numerics.relative_error(decay(), "chunked", gradients=True)
    assert (error, worst in ("dq_BTHK", "dk_BTHK")) == (pytest.approx(1.0), True)


def test_nan_is_no_small_error(monkeypatch):
    monkeypatch.setattr(chunked, "per_channel_decay", lambda inputs, state: (inputs.v_BTHV * torch.nan, ()))
    assert numerics.relative_error(decay(), "chunked", gradients=False)[0] == float("inf")
