"""Probes of a trained model, against the definitions."""

import json
import math

import pytest
import torch

from hgrn2_bench import probes, registry
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.language import LanguageModel

B, T, D, K = 2, 33, 16, 8


def build(name="hgrn2", settings=None, **changes):
    torch.manual_seed(0)
    config = ModelConfig(**({"d_model": D, "num_layers": 2, "embed_std": 1.0} | changes))
    return LanguageModel(config, registry.load(name), settings or {}, "chunked", 13, T).eval()


def tokens():
    return torch.randint(13, (B, T), generator=torch.Generator().manual_seed(1))


def test_a_gate_of_known_value_gives_its_memory_bound_and_rank():
    model = build(settings={"expand_ratio": K}, lower_bound="inclusive")
    with torch.no_grad():
        for mixer in model.mixers:
            mixer.in_proj.weight[-D:] = 0
            mixer.in_proj.bias[-D:] = math.log(9)  # sigmoid 0.9
    first, second = probes.probe(model, tokens())["layers"]
    assert first["mixer"] == "hgrn2"
    assert first["decay"] == {name: pytest.approx(0.9, rel=1e-4) for name in ("p10", "median", "p90")}
    assert first["memory"] == {name: pytest.approx(10, rel=1e-4) for name in ("p10", "median", "p90")}
    assert (first["lower_bound"], second["lower_bound"]) == (0, 0.5)
    assert second["memory"]["median"] == pytest.approx(20, rel=1e-4)
    assert first["effective_rank"] == pytest.approx(1, abs=1e-3)  # one key for all tokens: one outer product
    assert first["rank"] == K


def test_effective_rank_of_known_matrices():
    rows = torch.stack([torch.eye(4), torch.ones(4, 4), torch.diag(torch.tensor([1.0, 1, 0, 0])), torch.zeros(4, 4)])
    torch.testing.assert_close(probes.effective_rank(rows), torch.tensor([4.0, 1, 2, 1]), rtol=1e-4, atol=1e-4)
    share = torch.tensor([0.5, 0.3, 0.2])
    want = math.exp(-sum(p * math.log(p) for p in share.tolist()))
    assert probes.effective_rank(7 * torch.diag(share)).item() == pytest.approx(want, rel=1e-5)


def test_memory_is_exact_where_the_decay_rounds_to_one():
    torch.testing.assert_close(probes.memory(torch.tensor([-1e-10, math.log(0.5)])), torch.tensor([1e10, 2.0]))


def test_effective_rank_is_that_of_the_state_after_the_last_token():
    model = build(settings={"expand_ratio": K})
    _, states = model.hidden(tokens(), return_states=True)
    for found, state in zip(probes.probe(model, tokens())["layers"], states, strict=True):
        values = torch.linalg.svdvals(state["op"][0])
        share = values / values.sum(-1, keepdim=True)
        assert found["effective_rank"] == pytest.approx((-(share * share.log()).sum(-1)).exp().mean().item(), rel=1e-3)
        assert 1 < found["effective_rank"] <= K


@pytest.mark.parametrize("name", [name for name in registry.models() if name != "hybrid"])
def test_every_model_is_probed_for_what_it_has(name):
    found = probes.probe(build(name), tokens())
    assert json.loads(json.dumps(found)) == found
    decays = name not in ("attention", "base_conv", "linear_attention", "based", "delta_net")
    matrix = name in ("hgrn2", "gla", "rwkv6", "rwkv7", "retnet", "mamba2", "delta_net", "gated_delta_net", "linear_attention", "based")
    for layer in found["layers"]:
        assert ("decay" in layer) == ("memory" in layer) == decays
        assert ("effective_rank" in layer) == matrix


def test_layers_of_several_kinds_are_told_apart():
    found = probes.probe(build("hybrid", {"layers": ("hgrn2", "attention")}), tokens())["layers"]
    assert [layer["mixer"] for layer in found] == ["hgrn2", "attention"]
    assert list(found[1]) == ["mixer"]


def test_large_batches_are_thinned(monkeypatch):
    model = build(settings={"expand_ratio": K})
    want = probes.probe(model, tokens())["layers"][0]["decay"]
    monkeypatch.setattr(probes, "MOST", 100)
    got = probes.probe(model, tokens())["layers"][0]["decay"]
    assert got["median"] == pytest.approx(want["median"], abs=0.1)


def test_what_cannot_be_probed_is_refused():
    with pytest.raises(ValueError, match="eval mode"):
        probes.probe(build().train(), tokens())
    with pytest.raises(ValueError, match="scan=both has no state"):
        probes.probe(build(scan="both"), tokens())
