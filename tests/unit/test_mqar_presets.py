"""MQAR's presets say what their sources say: cells, depth, positions, learning rates, batches, data."""

import functools
import math
from collections import Counter

import pytest

from hgrn2_bench import registry
from hgrn2_bench.plan import make_plan
from hgrn2_bench.tuning import count
from suites.mqar.protocol import MIXTURES

PROTOCOL = registry.protocol("mqar")
SETTINGS = ["len64_kv4", "len128_kv8", "len256_kv16", "len512_kv64"]


@functools.cache
def cells(preset):
    return make_plan(["suite=mqar", f"preset={preset}"], "cpu").cells


def found(preset, section, key, model=None):
    """The values of one key over a preset's cells."""
    chosen = [cell for cell in cells(preset) if model in (None, cell.model)]
    return {getattr(getattr(cell, section) if section else cell, key) for cell in chosen}


def by_task(preset, key):
    """A training key's one value in each task."""
    pairs = {(cell.task, getattr(cell.train, key)) for cell in cells(preset)}
    assert len(pairs) == len(PROTOCOL.presets[preset].tasks)
    return dict(pairs)


def log_spaced(low, high):
    """Four rates with equal quotients between two powers of ten."""
    return [10 ** (low + (high - low) * i / 3) for i in range(4)]


ZOOLOGY = ("paper", "zoology", "zoology_head", "based", "short")


@pytest.mark.parametrize("preset", ZOOLOGY)
def test_the_model_around_the_mixers_is_zoology_s(preset):
    facts = {
        "channel_mixer": "identity",
        "norm": "layernorm",
        "tie_embeddings": True,
        "embed_std": 0.02,
        "embed_dropout": 0.1,
        "dropout": 0.0,
        "init": "mixer" if preset == "short" else "blanket",
        "lower_bound": "none",
    }
    assert {key: found(preset, "model_config", key) for key in facts} == {key: {value} for key, value in facts.items()}
    assert found(preset, "data", "vocab_size") == {8192}
    assert found(preset, "data", "power_a") == {0.01}
    assert (found(preset, "train", "weight_decay"), found(preset, "train", "decay_all")) == ({0.1}, {preset != "short"})
    assert {cell.settings["num_heads"] for cell in cells(preset) if cell.model == "attention"} == {1}


@pytest.mark.parametrize("preset", ["paper", "zoology", "zoology_head", "based"])
def test_the_sources_schedule_stop_and_choice(preset):
    facts = {"schedule": "cosine_epoch", "warmup": 0.0, "clip": 0.0, "stop_at": 0.99, "select": "test", "keep": "last", "eval_every": 0}
    assert {key: found(preset, "train", key) for key in facts} == {key: {value} for key, value in facts.items()}
    assert found(preset, "", "seed") == {123}
    assert found(preset, "train", "tune_on") == {"every_seed"}
    assert {cell.settings["dropout"] for cell in cells(preset) if cell.model == "attention"} == {0.1}


@pytest.mark.parametrize("preset", ["paper", "zoology", "zoology_head"])
def test_one_setting_at_a_time(preset):
    assert found(preset, "data", "mixture") == {"none"}
    assert found(preset, "data", "random_fill") == {False}
    assert (found(preset, "data", "train_examples"), found(preset, "data", "test_examples")) == ({100_000}, {3_000})
    assert found(preset, "train", "epochs") == {64}
    assert found(preset, "model_config", "d_model") == {64, 128, 256, 512}
    assert found(preset, "model_config", "positions", "attention") == {"learned"}
    assert {kind for cell in cells(preset) if cell.model != "attention" for kind in [cell.model_config.positions]} == {"none"}
    assert found(preset, "model_config", "conv") == {0}
    assert found(preset, "model_config", "first_layer") == {"none"}


@pytest.mark.parametrize(
    ("preset", "batches"),
    [("paper", [512, 512, 256, 64]), ("zoology", [512, 512, 256, 128]), ("zoology_head", [512, 512, 256]), ("short", [512, 256, 256])],
)
def test_batches_follow_the_length(preset, batches):
    assert by_task(preset, "batch_size") == dict(zip(SETTINGS, batches, strict=False))


def test_paper_is_hgrn2_s_protocol():
    ours = [cell for cell in cells("paper") if cell.model in ("hgrn2", "hgrn1")]
    assert len(ours) == 2 * 4 * 4 * 7  # recipes: 112 runs of each
    assert found("paper", "train", "lr") == {1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2}
    assert found("paper", "model_config", "num_layers") == {2}
    assert found("paper", "data", "shuffle") == {False}
    assert found("paper", "", "dtype") == {"bfloat16"}
    assert PROTOCOL.presets["paper"].source_models == ("hgrn2", "hgrn1")


@pytest.mark.parametrize(("preset", "settings", "deep", "shuffled"), [("zoology", 4, 4, True), ("zoology_head", 3, 2, False)])
def test_zoology_s_figure_in_its_oldest_and_its_present_form(preset, settings, deep, shuffled):
    assert Counter(cell.model for cell in cells(preset)) == dict.fromkeys(
        ("attention", "base_conv", "hgrn2", "gla", "mamba2", "delta_net"), settings * 4 * 4
    )
    assert sorted(found(preset, "train", "lr")) == pytest.approx(log_spaced(-4, -2), rel=1e-6)
    depth = {(cell.model, cell.model_config.num_layers) for cell in cells(preset)}
    assert depth == {(cell.model, 2 if cell.model == "attention" else deep) for cell in cells(preset)}
    assert found(preset, "data", "shuffle") == {shuffled}
    assert found(preset, "", "dtype") == {"float32"}
    assert {cell.settings["long"] for cell in cells(preset) if cell.model == "base_conv"} == {"odd"}
    assert {cell.settings["width"] for cell in cells(preset) if cell.model == "base_conv"} == {3}
    assert PROTOCOL.presets[preset].reproduces == ("zoology_figure2",)
    assert PROTOCOL.presets[preset].source_models == ("attention", "base_conv")


def test_based_trains_from_short_to_long_and_tests_beyond():
    assert [tuple(s) for s in MIXTURES["based"].train] == [
        (64, 4, 100_000),
        (128, 8, 20_000),
        (256, 16, 20_000),
        (256, 32, 20_000),
        (256, 64, 20_000),
    ]
    assert [tuple(s[:2]) for s in MIXTURES["based"].test] == [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
    assert {s.examples for s in MIXTURES["based"].test} == {1_000}
    assert found("based", "data", "mixture") == {"based"}
    assert found("based", "data", "train_examples") == {180_000}
    assert found("based", "data", "random_fill") == {True}
    assert (found("based", "train", "batch_size"), found("based", "train", "eval_batch_size")) == ({256}, {32})
    assert found("based", "train", "epochs") == {32}
    assert sorted(found("based", "train", "lr")) == pytest.approx(log_spaced(-3, -1.5), rel=1e-6)
    assert (found("based", "model_config", "d_model"), found("based", "model_config", "num_layers")) == ({64, 128}, {2})
    assert found("based", "model_config", "positions") == {"none"}
    assert {cell.settings["feature_dim"] for cell in cells("based") if cell.model == "based"} == {8, 16, 24}
    assert len(cells("based")) == 2 * 4 * (5 + 3)


@pytest.mark.parametrize("model", ["attention", "based", "hgrn2", "gla", "delta_net", "mamba2", "mamba"])
def test_based_s_first_layer_is_a_convolution_but_mamba_has_its_own(model):
    made = make_plan(["suite=mqar", "preset=based", f"model={model}"], "cpu").cells
    own = model in ("mamba", "mamba2")
    assert {(c.model_config.first_layer, c.model_config.conv) for c in made} == {("none", 4) if own else ("base_conv", 0)}


def test_short_compares_ten_models_with_and_without_a_convolution():
    assert len({cell.model for cell in cells("short")}) == 10
    assert len(cells("short")) == 3 * 2 * 3 * 3 * (2 + 9)  # settings, conv, rates, seeds; hgrn2 twice
    assert count(cells("short"), PROTOCOL) == 3 * 2 * (3 + 2) * (2 + 9)  # three rates on one seed, the best on two more
    assert found("short", "model_config", "conv") == {0, 4}
    assert (found("short", "model_config", "d_model"), found("short", "model_config", "num_layers")) == ({64}, {2})
    assert found("short", "model_config", "positions", "attention") == {"rope"}
    assert {c.model_config.positions for c in cells("short") if c.model != "attention"} == {"none"}
    assert (found("short", "model_config", "forget_bias", "hgrn2"), found("short", "model_config", "forget_bias", "gla")) == ({0, 3}, {0})
    assert found("short", "train", "lr") == {3e-3, 1e-2, 3e-2}
    assert (found("short", "", "seed"), found("short", "train", "tune_on")) == ({0, 1, 2}, {"first_seed"})
    assert found("short", "train", "select") == {"validation"}
    assert (found("short", "train", "stop_at"), found("short", "train", "eval_every")) == ({0.998}, {196})
    assert (found("short", "model_config", "init"), found("short", "train", "decay_all")) == ({"mixer"}, {False})
    assert (found("short", "data", "train_examples"), found("short", "data", "random_fill")) == ({100_000}, {False})
    assert (found("short", "data", "validation_examples"), found("short", "data", "test_examples")) == ({3_000}, {3_000})
    steps = {cell.task: cell.train.epochs * math.ceil(100_000 / cell.train.batch_size) for cell in cells("short")}
    assert steps == {"len64_kv4": 1960, "len128_kv8": 1955, "len256_kv16": 1955}


@pytest.mark.parametrize("preset", ["smoke", "test"])
def test_presets_of_our_own_choose_on_validation_data_and_repeat_no_table(preset):
    assert found(preset, "train", "select") == {"validation"}
    assert PROTOCOL.presets[preset].reproduces == PROTOCOL.presets["short"].reproduces == ()
