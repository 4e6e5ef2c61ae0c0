import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.hybrid import Hybrid
from hgrn2_bench import engine, measure, registry
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.interfaces import Context, Mixer, MixerSpec
from hgrn2_bench.model import SequenceModel
from hgrn2_bench.plan import make_plan
from hgrn2_bench.results import Row

D = 16
SPEC = MixerSpec(D, num_layers=3, conv=4, forget_bias=1.0, positions="rope", backend="reference")


def build(*layers: str, **changes: Any) -> Hybrid:
    torch.manual_seed(0)
    return Hybrid(replace(SPEC, settings={"layers": layers}, **changes))


def alone(name: str, **changes: Any) -> Mixer:
    torch.manual_seed(0)
    return registry.load(name)(replace(SPEC, **changes))


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))


def model(*layers: str, conv: int = 0, num_layers: int = 2, **changes: Any) -> SequenceModel:
    torch.manual_seed(0)
    config = ModelConfig(d_model=D, num_layers=num_layers, conv=conv, **changes)
    return SequenceModel(config, Hybrid, {"layers": layers} if layers else {}, "chunked", 11, 12)


@pytest.mark.parametrize(("layer", "name"), list(enumerate(["hgrn2", "hgrn2", "attention"] * 2)))
def test_the_pattern_repeats_over_the_depth(layer: int, name: str) -> None:
    mixer = build("hgrn2", "hgrn2", "attention", layer=layer, num_layers=6)
    assert mixer.label == name
    assert type(mixer.part) is registry.load(name)
    assert mixer.part.spec == replace(SPEC, layer=layer, first={"hgrn2": 0, "attention": 2}[name], num_layers=6)


def test_the_first_layer_of_a_kind_is_looked_for_behind_another_model_s_first_layer() -> None:
    mixers = model("rwkv7", "gla", num_layers=4, first_layer="base_conv").mixers
    assert [m.label for m in mixers] == ["base_conv", "gla", "rwkv7", "gla"]
    assert [m.part.spec.first for m in mixers if isinstance(m, Hybrid)] == [1, 2, 1]


def test_an_rwkv7_whose_layer_0_another_mixer_took_runs() -> None:
    built = model("rwkv7", "gla", num_layers=6, first_layer="base_conv")
    built(torch.randint(11, (2, 12))).sum().backward()
    assert all(p.grad is not None for p in built.mixers[4].parameters())


def test_a_part_without_a_recurrence_takes_any_backend() -> None:
    assert build("base_conv", backend="fla").part.spec.backend == "fla"


@pytest.mark.parametrize("name", sorted(set(registry.models()) - {"hybrid"}))
def test_a_layer_is_its_part(name: str) -> None:
    """Every answer of the contract, under a lower bound, true lengths and an incoming state."""
    mixer, part = build("hgrn2", name, "gla", layer=1), alone(name, layer=1, first=1)
    shared = {"lower_bound": torch.full((3, D), 0.3)}
    for lengths in (None, torch.tensor([9, 4])):
        contexts = [Context(shared=shared, return_state=True, lengths_B=lengths) for _ in range(2)]
        y, want = (m(inputs(2, 9), ctx) for m, ctx in zip((mixer, part), contexts, strict=True))
        assert torch.equal(y, want)
        torch.testing.assert_close(contexts[0].next_state, contexts[1].next_state, rtol=0, atol=0)
    torch.testing.assert_close(mixer.step(inputs(2), None, shared), part.step(inputs(2), None, shared), rtol=0, atol=0)
    if part.family:
        ops = [m.project(inputs(2, 5), Context(shared=shared)) for m in (mixer, part)]
        torch.testing.assert_close(vars(ops[0]), vars(ops[1]), rtol=0, atol=0)
    for fact in ("family", "gated", "bounded", "rotary"):
        assert getattr(mixer, fact) == getattr(part, fact)
    assert (mixer.state_size(7, 2), mixer.op_flops(7), mixer.effective()) == (part.state_size(7, 2), part.op_flops(7), part.effective())


def test_readout_is_the_parts() -> None:
    o, x = torch.randn(2, 5, 1, D), inputs(2, 5)
    assert torch.equal(build("attention").readout(o, x), alone("attention").readout(o, x))


def test_blanket_initialisation_and_the_forget_bias_reach_the_part() -> None:
    mixer = model("gla", "attention", init="blanket", forget_bias=2.0).mixers[0]
    assert isinstance(mixer, Hybrid)
    assert mixer.part.get_parameter("forget_proj.bias").tolist() == [2.0] * (D // 2)
    assert mixer.part.get_parameter("out_proj.weight").std().item() == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize(
    ("layers", "num_layers", "words"),
    [
        (
            ("hgrn2", "attention"),
            1,
            r"num_layers=1 must be a multiple of 2, .* hybrid\.layers=\[hgrn2,attention\]; nearest legal num_layers: 2$",
        ),
        (("hgrn2", "attention"), 3, r"num_layers=3 must be a multiple of 2, .* nearest legal num_layers: 2 or 4$"),
        (("gla", "gla", "attention"), 8, r"must be a multiple of 3, .* nearest legal num_layers: 6 or 9$"),
        (("hgrn2", "atention"), 2, r"Unknown model in hybrid\.layers 'atention'\. Did you mean 'attention'\?"),
        (("hgrn2", "hybrid"), 2, r"hybrid\.layers: 'hybrid' is itself built of other models"),
        ((), 2, r"hybrid\.layers=\[\] names no model"),
    ],
)
def test_patterns_that_cannot_be_built_are_refused(layers: tuple[str, ...], num_layers: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build(*layers, num_layers=num_layers)
    assert "\n" not in str(caught.value)


def test_a_part_without_the_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^backend=fla: mamba has only reference, chunked$"):
        build("mamba", backend="fla")


def test_costs_are_the_sum_over_the_parts() -> None:
    built = model("hgrn2", "attention")
    hgrn2, attention = (registry.load(name)(MixerSpec(D)) for name in ("hgrn2", "attention"))
    assert measure.state_bytes(built, 12) == hgrn2.state_size(12) + attention.state_size(12)
    matrices = sum(p.numel() for m in (hgrn2, attention) for p in m.parameters() if p.ndim == 2)
    flops = sum(m.op_flops(12) or 0 for m in (hgrn2, attention))
    assert measure.train_flops_per_token(built, 12) == 3 * (2 * (matrices + 11 * D) + flops)


def test_effective_describes_every_part() -> None:
    said = measure.effective(model("gla", "attention", "mamba", "gla", num_layers=4))
    assert said["layers"] == ["gla", "attention", "mamba", "gla"]
    assert said["kernel"] == "gla: chunked.per_channel_decay; attention: chunked.softmax; mamba: chunked.selective_scan"
    assert said["heads"] == "gla: 4; attention: 1; mamba: 1"
    assert said["causal"] is True
    assert said["positions"] == "none"
    assert said["median_decay_at_init"].startswith("gla: 0.9")
    assert json.loads(json.dumps(said)) == said


def test_effective_of_one_kind_is_that_of_the_part() -> None:
    plain = SequenceModel(ModelConfig(d_model=D, conv=4), registry.load("gla"), {}, "chunked", 11, 12)
    said, want = measure.effective(model("gla", conv=4)), measure.effective(plain)
    assert said | {"median_decay_at_init": 0} == want | {"median_decay_at_init": 0}  # their embeddings took other random numbers


def run(tmp_path: Any, *words: str) -> list[Row]:
    (cell,) = make_plan(["suite=mqar", "preset=test", "model=hybrid", "num_layers=2", *words], "cpu").cells
    folder = CellFolder(tmp_path, cell)
    with folder.lock():
        return engine.run_cell(cell, folder, lambda *_: None, lambda: False)


def test_rows_hold_the_pattern_as_json_does(tmp_path: Any) -> None:
    row = run(tmp_path, "hybrid.layers=[gla,hgrn2]")[0]
    assert row.status == "ok"
    assert row.settings["hybrid.layers"] == row.effective["layers"] == ["gla", "hgrn2"]
    assert row.mixer_version == registry.model("hybrid").full_version({"layers": ("gla", "hgrn2")})


def test_a_part_that_changed_since_the_plan_is_not_run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = make_plan(["suite=mqar", "preset=test", "model=hybrid", "num_layers=2"], "cpu").cells
    monkeypatch.setitem(registry.model("attention").facts, "version", 99)
    folder = CellFolder(tmp_path, cell)
    with folder.lock():
        (row,) = engine.run_cell(cell, folder, lambda *_: None, lambda: False)
    assert (row.status, row.reason) == ("failed", "hybrid changed after the run was planned; run again")
