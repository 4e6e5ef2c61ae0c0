"""A 340M HGRN2's training step beside a bare loop over fla's own model: the same layers, batch and precision, taking turns."""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from gpu_marks import WITH_FLA
from torch import nn

from hgrn2_bench import registry
from hgrn2_bench.config import ModelConfig, TrainConfig
from hgrn2_bench.language import LanguageModel
from hgrn2_bench.steps import Steps
from hgrn2_bench.trainer import make_optimizer

pytestmark = WITH_FLA

B, T, V, D, LAYERS, WIDTH = 8, 2048, 50_264, 1024, 24, 2816
ROUNDS, STEPS, CLIP, LR = 5, 8, 1.0, 1e-4


def tokens() -> torch.Tensor:
    return torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0)).cuda()


def autocast() -> torch.autocast:
    return torch.autocast("cuda", torch.bfloat16)


def ours() -> tuple[nn.Module, Callable[[], object]]:
    config = ModelConfig(
        d_model=D,
        num_layers=LAYERS,
        lower_bound="inclusive",
        norm="rmsnorm",
        channel_mixer="glu",
        channel_width=WIDTH,
        glu_bias=False,
        tie_embeddings=True,
    )
    model = LanguageModel(config, registry.load("hgrn2"), {"variant": "fla", "expand_ratio": 128}, "fla", V, T).cuda().train()
    optimizer = make_optimizer(model, TrainConfig(lr=LR), "cuda")
    steps = Steps(model, optimizer, lambda model, batch: model.loss(*batch), autocast(), CLIP, graph=True)
    ids = tokens()
    batch = (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    return model, lambda: steps(batch, LR)


def theirs() -> tuple[nn.Module, Callable[[], object]]:
    from fla.models import HGRN2Config, HGRN2ForCausalLM

    config = HGRN2Config(
        hidden_size=D, num_hidden_layers=LAYERS, expand_ratio=128, intermediate_size=WIDTH, vocab_size=V, tie_word_embeddings=True
    )
    model = HGRN2ForCausalLM(config).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    ids = tokens()[:, :-1].contiguous()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return model, step


def seconds(step: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / STEPS


def test_a_step_is_as_fast_as_a_bare_loop_over_flas_model(capsys: pytest.CaptureFixture[str]) -> None:
    (mine, my_step), (other, other_step) = ours(), theirs()
    sizes = [sum(p.numel() for p in model.parameters()) for model in (mine, other)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)
    for step in (my_step, other_step):
        for _ in range(6):
            step()
    rounds = [(seconds(my_step), seconds(other_step)) for _ in range(ROUNDS)]
    rates = [B * T / statistics.median(times) for times in zip(*rounds, strict=True)]
    with capsys.disabled():
        print(f"\ntokens/s of {sizes[0] / 1e6:.0f}M parameters: ours {rates[0]:.0f}, bare loop over fla's {rates[1]:.0f}")
    assert statistics.median(theirs / mine for mine, theirs in rounds) > 0.98
