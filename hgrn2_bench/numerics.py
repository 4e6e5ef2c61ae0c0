"""A backend against `reference` on the same inputs: what must hold before its speed means anything."""

import math
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hgrn2_bench.ops import cache, families
from hgrn2_bench.ops.families import OpInputs, SoftmaxInputs

TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest relative error by dtype; products of float32 may run in TF32 on a GPU."""


def tensors(inputs: OpInputs) -> dict[str, Tensor]:
    """The tensors of one recurrence's inputs, by name."""
    return {f.name: x for f in fields(inputs) if isinstance(x := getattr(inputs, f.name), Tensor)}  # type: ignore[arg-type]


def relative_error(inputs: OpInputs, backend: str, gradients: bool) -> tuple[float, str]:
    """The largest ||backend - reference|| / ||reference|| over the output and, if asked for, every gradient, and which it is.

    The reference runs in float64. Below 1e-20 an error counts against that. NaN counts as infinite.
    """
    want, got = results(_wide(inputs), "reference", gradients), results(inputs, backend, gradients)
    errors = {name: _error(got[name], x) for name, x in want.items()}
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


@torch.no_grad()
def token_error(before: OpInputs, token: OpInputs, backend: str) -> float:
    """||backend - reference|| / ||reference|| of one token's output, from the state that `reference` leaves after the tokens before it.

    Softmax reads that state from a padded cache, as decoding does.
    """
    _, state = families.run(_wide(before), "reference")
    want, _ = families.run(_wide(token), "reference", state)
    if isinstance(token, SoftmaxInputs):
        T = state[0].shape[1]
        held = tuple(F.pad(x, (0, 0, 0, 0, 0, cache.bucket(T + 1) - T)).to(token.v_BTHV.dtype) for x in state)
        position = torch.tensor([T], device=held[0].device)
        got = cache.attend(token, held, position, cache.mask(held[0].shape[1], position, held[0].dtype))
    else:
        got, _ = families.run(token, backend, tuple(x.to(torch.complex64 if x.is_complex() else torch.float32) for x in state))
    return _error(got, want)


def _error(got: Tensor, want: Tensor) -> float:
    error = ((_widened(got) - want).norm() / want.norm().clamp_min(1e-20)).item()
    return float("inf") if math.isnan(error) else error


def results(inputs: OpInputs, backend: str, gradients: bool) -> dict[str, Tensor]:
    """The output `o` and, if asked for, the gradient of every tensor for a fixed random weighting of it."""
    leaves = {name: x.detach().requires_grad_(gradients) for name, x in tensors(inputs).items()}
    with torch.set_grad_enabled(gradients):
        o, _ = families.run(replace(inputs, **leaves), backend)  # type: ignore[type-var]
    found = {"o": o.detach()}
    if gradients:
        weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(o.device)
        loss = (_widened(o) * weights).sum().real
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        found |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


def _wide(inputs: OpInputs) -> OpInputs:
    return replace(inputs, **{name: _widened(x) for name, x in tensors(inputs).items()})  # type: ignore[type-var]


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)
