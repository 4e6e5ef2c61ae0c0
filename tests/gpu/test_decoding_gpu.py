"""Decoding replayed as a CUDA graph against the eager loop and one forward pass, for every model."""

import dataclasses

import pytest
import torch
from gpu_marks import UNTUNED
from torch import nn

from hgrn2_bench import registry
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.decoding import Decoder
from hgrn2_bench.interfaces import recomputing
from hgrn2_bench.layers import for_a_graph
from hgrn2_bench.model import SequenceModel
from hgrn2_bench.steps import EAGER_STEPS

pytestmark = UNTUNED

B, T, PROMPT, VOCAB = 4, 90, 70, 64
BASE = ModelConfig(d_model=64, num_layers=2, channel_mixer="glu", embed_std=1.0)
TOLERANCES = {torch.float32: 1e-2, torch.bfloat16: 0.1}
"""Of the deviation of the logits, against one forward pass: another kernel, whose matrix products run in tf32 or bf16."""
SMALLER = {"based": {"feature_dim": 8}}  # at its 273 features the first configuration, all that is tried here, does not fit the GPU


def build(name, conv=4, dtype=torch.float32, settings=None):
    torch.manual_seed(0)
    mixer = registry.load(name)
    backend = "fla" if "fla" in mixer.backends else "chunked"
    positions = "rope" if name in ("attention", "hybrid") else "none"
    config = dataclasses.replace(BASE, conv=conv if mixer.convolved else 0, positions=positions)
    return SequenceModel(config, mixer, settings or {}, backend, VOCAB, T).cuda().eval().to(dtype)


def tokens(seed=1, length=T):
    return torch.randint(VOCAB, (B, length), generator=torch.Generator().manual_seed(seed)).cuda()


def decode(decoder, tokens_BT, prompt=PROMPT):
    first = decoder.prefill(tokens_BT[:, :prompt])
    return torch.stack([first, *(decoder.step(tokens_B) for tokens_B in tokens_BT[:, prompt:].unbind(1))], 1)


@torch.no_grad()
def whole(model, tokens_BT):
    return model.head(model(tokens_BT))


def largest(got, want):
    return ((got.float() - want.float()).abs().max() / want.float().std()).item()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", sorted(registry.models()))
def test_a_graph_decodes_as_the_eager_loop_does(name, dtype):
    model = build(name, dtype=dtype, settings=SMALLER.get(name))
    graph, eager = (Decoder(model, B, T, graph=on) for on in (True, False))
    for seed in (1, 2):  # the second prompt meets the graph of the first
        with for_a_graph():  # the same kernels for both
            got, want = decode(graph, tokens(seed)), decode(eager, tokens(seed))
        assert largest(got, want) < 1e-3
        assert largest(got, whole(model, tokens(seed))[:, PROMPT - 1 :]) < TOLERANCES[dtype]
    assert (graph.mode, eager.mode) == ("CUDA graph", "eager")
    assert graph.warm_steps == EAGER_STEPS + 1


def test_a_graph_captured_under_autocast_outlives_it():
    model = build("attention")
    graph, eager = (Decoder(model, B, T, graph=on) for on in (True, False))
    with torch.autocast("cuda", torch.bfloat16), for_a_graph():
        first = decode(graph, tokens())
        want = decode(eager, tokens())
    assert largest(first, want) < 1e-3
    assert graph.mode == "CUDA graph"
    filler = [torch.full((64, 1024), 1e4, device="cuda", dtype=torch.bfloat16) for _ in range(64)]  # takes what autocast has given back
    with torch.autocast("cuda", torch.bfloat16), for_a_graph():
        assert torch.equal(decode(graph, tokens()), first)
    assert len(filler) == 64


def test_a_plain_module_stays_eager():
    class Mean(nn.Module):
        def __init__(self, d_model):
            super().__init__()

        def forward(self, x):
            return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]

    model = SequenceModel(BASE, recomputing(Mean), {}, "chunked", VOCAB, T).cuda().eval()
    decoder = Decoder(model, B, T, graph=True)
    assert largest(decode(decoder, tokens()), whole(model, tokens())[:, PROMPT - 1 :]) < 1e-2
    assert decoder.mode == "eager; cannot be captured in a CUDA graph: the state of Mean grows with every token"


def test_a_model_that_waits_for_the_gpu_stays_eager_and_decodes_on():
    model = build("hgrn2")
    model.norm.register_forward_hook(lambda module, inputs, out: out if out.isfinite().all().item() else 2 * out)
    decoder = Decoder(model, B, T, graph=True)
    stream = torch.cuda.current_stream()
    assert largest(decode(decoder, tokens()), whole(model, tokens())[:, PROMPT - 1 :]) < TOLERANCES[torch.float32]
    assert decoder.mode.startswith("eager; cannot be captured in a CUDA graph: ")
    assert torch.cuda.current_stream() == stream


@pytest.mark.parametrize(
    ("name", "kernel"), [("hgrn2", "fla.fused_recurrent_gla"), ("gated_delta_net", "fla.fused_recurrent_gated_delta_rule")]
)
def test_one_token_takes_a_recurrent_kernel(name, kernel):
    assert Decoder(build(name), B, T, graph=True).kernel == kernel
