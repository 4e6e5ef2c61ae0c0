"""What a trained model's recurrences do with a batch of tokens: how long they remember, and how much of their state they use.

Of every layer with a decay f, a number between 0 and 1 for each token and channel (or head, where that is all that decays):

    decay              its quantiles
    memory             quantiles of 1 / (1 - f), in tokens: the time after which a write has faded to a share of 1/e
    lower_bound        the mean of the learned bound, where the model has one
    effective_rank     exp of the entropy of the singular values of the state S (K x V of each head) after the last token, those divided
                       by their sum (Roy and Vetterli, EUSIPCO 2007), the mean over sequences and heads: 1 for one outer product,
                       min(K, V) for equal singular values
    rank               min(K, V), the largest it can be

Shape letters: B batch, T time, D width, H heads, K key, V value.
"""

from typing import Any

import torch
from torch import Tensor

from hgrn2_bench import measure
from hgrn2_bench.interfaces import Context, Mixer, MixerState
from hgrn2_bench.model import Backbone, Block

MOST = 2**22
"""Values whose quantiles are taken: of more, so many at equal distances."""
QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


@torch.no_grad()
def probe(model: Backbone, inputs: Tensor) -> dict[str, Any]:
    """One mapping of plain numbers per layer, under `layers`; ValueError for a model in training mode or one that does not read forward.

    Each layer projects twice, so that nothing but the public calls of a mixer is needed.
    """
    if model.training:
        raise ValueError("probes need the model in eval mode: call model.eval() first")
    if model.config.scan != "causal":
        raise ValueError(f"scan={model.config.scan} has no state after the last token")
    x_BTD, shared = model.embed(inputs), model.shared()
    carry: dict[str, Any] = {}
    layers = []
    for block in model.blocks:
        assert isinstance(block, Block)
        found: dict[str, Any] = {"mixer": block.mixer.label or type(block.mixer).__name__.lower()}
        before = Context(shared=shared, carry=dict(carry))
        found |= _decay(block.mixer, block.mixer_norm(x_BTD), before)
        if block.mixer.bounded and "lower_bound" in shared:
            found["lower_bound"] = _rounded(shared["lower_bound"][block.mixer.spec.layer].mean())
        ctx = Context(shared=shared, carry=carry, return_state=True)
        x_BTD = block(x_BTD, ctx)
        layers.append(found | _rank(ctx.next_state))
    return {"layers": layers}


def _decay(mixer: Mixer, x_BTD: Tensor, ctx: Context) -> dict[str, Any]:
    """Quantiles of decay and memory; empty for a mixer whose state does not decay."""
    log_f = measure.log_decay_of(mixer.project(x_BTD, ctx)) if mixer.family else None
    if log_f is None or not log_f.any():
        return {}
    values = log_f.flatten().to(torch.promote_types(log_f.dtype, torch.float32))
    values = values[:: -(-len(values) // MOST)]
    return {"decay": _quantiles(values.exp()), "memory": _quantiles(memory(values))}


def memory(log_f: Tensor) -> Tensor:
    """1 / (1 - f) in tokens, exact also where f rounds to 1."""
    return (-torch.expm1(log_f)).clamp_min(torch.finfo(log_f.dtype).tiny).reciprocal()


def _quantiles(values: Tensor) -> dict[str, float]:
    at = torch.tensor(list(QUANTILES.values()), dtype=values.dtype, device=values.device)
    return dict(zip(QUANTILES, map(_rounded, torch.quantile(values, at)), strict=True))


def _rank(state: MixerState) -> dict[str, Any]:
    """The effective rank of a state of matrices; empty for another."""
    op = state.get("op", ())
    if len(op) != 1 or op[0].ndim != 4 or op[0].is_complex():
        return {}
    S_BHKV = op[0]
    return {"effective_rank": _rounded(effective_rank(S_BHKV).mean()), "rank": min(S_BHKV.shape[-2:])}


def effective_rank(S: Tensor) -> Tensor:
    """The exponential of the entropy of the normalised singular values of matrices (..., K, V), as (...); 1 for a matrix of zeros."""
    values = torch.linalg.svdvals(S.to(torch.promote_types(S.dtype, torch.float32)))
    share = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return (-torch.xlogy(share, share).sum(-1)).exp()


def _rounded(value: Tensor) -> float:
    """Five significant digits, which is more than a batch tells."""
    return float(f"{value.item():.5g}")
