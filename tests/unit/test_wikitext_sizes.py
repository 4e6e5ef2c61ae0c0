"""The sizes of language models against those published, counted without memory for their weights."""

import dataclasses

import pytest
import torch

from hgrn2_bench import measure, registry
from hgrn2_bench.config import ModelConfig, convert, parse_words
from hgrn2_bench.language import LanguageModel
from suites.wikitext import sizes


def parameters(name, *words, vocab=sizes.VOCABULARY):
    model, plain = registry.model(name), {f.name for f in dataclasses.fields(ModelConfig)}
    own, config = {f.name for f in dataclasses.fields(model.settings)}, {}
    settings = {}
    for word in parse_words(words):
        if word.owner == name and word.key in own:
            settings[word.key] = convert(model.settings, word.key, word.values[0], word.name)
        elif word.owner in ("", name):
            assert word.key in plain, word.text
            config[word.key] = convert(ModelConfig, word.key, word.values[0], word.name)
    with torch.device("meta"):
        built = LanguageModel(ModelConfig(**config), registry.load(name), settings, "chunked", vocab, 512)
    return measure.parameters(built)[0]


@pytest.mark.parametrize(
    ("model", "widths", "millions"),
    [
        ("hgrn2", "hgrn2", 44.66),
        ("hgrn2", "hgrn2_small", 41.51),
        ("hgrn1", "hgrn1", 46.25),
    ],
)
def test_published_models_have_the_published_sizes(model, widths, millions):
    """To the digits that are printed; with `paper` variants, biases everywhere and affine norms."""
    assert round(parameters(model, *sizes.PUBLISHED, f"channel_width={sizes.PUBLISHED_WIDTHS[widths]}") / 1e6, 2) == millions


def test_no_head_width_of_the_sweep_changes_the_number_of_parameters():
    words = (*sizes.PUBLISHED, "channel_width=1365")
    assert {parameters("hgrn2", *words, f"hgrn2.expand_ratio={ratio}") for ratio in sizes.EXPAND_RATIOS} == {44_660_732}


def test_the_control_has_twice_the_projections():
    """Per layer 8 d^2 weights and 7 d biases instead of 4 d^2 and 4 d, and a norm of 2 d channels."""
    words, d = (*sizes.PUBLISHED, "channel_width=1365"), 512
    grown = parameters("hgrn1", *words, "hgrn1.variant=expand2") - parameters("hgrn2", *words)
    assert grown == 6 * (4 * d * d + 3 * d + 2 * d)


def test_published_default_of_the_authors_language_model():
    """359.8M: 24 layers of width 1024, GLU 2816 without activation, norms without weight, no biases, 50,272 words, tied."""
    words = "d_model=1024 num_layers=24 channel_mixer=glu channel_width=2816 glu_activation=none glu_bias=false norm=simple_rmsnorm"
    rest = ("tie_embeddings=true", "lower_bound=inclusive", "hgrn2.variant=paper_lm")
    assert round(parameters("hgrn2", *words.split(), *rest, vocab=50_272) / 1e6, 1) == 359.8


@pytest.mark.parametrize(("name", "millions"), [("130M", 123.6), ("340M", 359.9), ("1.3B", 1336.3)])
def test_named_sizes(name, millions):
    assert round(parameters("hgrn2", *sizes.SIZES[name]) / 1e6, 1) == millions


@pytest.mark.parametrize("model", ["hgrn1", "attention", "gla", "delta_net", "linear_attention", "gsa", "rwkv7"])
def test_baselines_of_like_projections_are_as_large_as_hgrn2(model):
    assert parameters(model, *sizes.SIZES["130M"]) == pytest.approx(parameters("hgrn2", *sizes.SIZES["130M"]), rel=0.05)


@pytest.mark.parametrize("model", ["retnet", "mamba2", "mamba", "gated_delta_net", "rwkv6", "based"])
def test_others_can_be_built_at_these_sizes_and_need_a_match(model):
    assert parameters(model, *sizes.SIZES["130M"]) == pytest.approx(parameters("hgrn2", *sizes.SIZES["130M"]), rel=0.25)


def test_published_1_3b_is_that_size_untied():
    words = [word for word in sizes.SIZES["1.3B"] if word != "tie_embeddings=true"]
    assert round(parameters("hgrn2", *words, vocab=32_000) / 1e6, 1) == 1364.4
