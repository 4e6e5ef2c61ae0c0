"""Folders in fla's format, written here: fields, names, files; `tests/test_fla_language_models.py` compares with fla itself."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hgrn2_bench import checkpoints, fla_config, fla_models, registry, weights
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError, DataError
from hgrn2_bench.language import LanguageModel

V, D = 24, 16
CONFIG = ModelConfig(
    d_model=D,
    num_layers=2,
    lower_bound="inclusive",
    channel_mixer="glu",
    channel_width=20,
    glu_bias=False,
    norm="rmsnorm",
    norm_eps=1e-6,
    embed_std=1.0,
)


def build(settings=None, **changes):
    torch.manual_seed(0)
    settings = {"variant": "fla", "expand_ratio": 8} | (settings or {})
    model = LanguageModel(dataclasses.replace(CONFIG, **changes), registry.load("hgrn2"), settings, "chunked", V, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens():
    return torch.randint(V, (2, 12), generator=torch.Generator().manual_seed(1))


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewritten(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def folder(tmp_path):
    fla_models.save(build(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"conv": 4}, {"lower_bound": "none"}])
@pytest.mark.parametrize("tokenizer", [False, True])
def test_there_and_back(changes, tokenizer, tmp_path):
    model, source = build(**changes), tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "notes.txt"):
        (source / name).write_text("{}")
    fla_models.save(model, tmp_path / "model", source if tokenizer else None)
    found = [path.name for path in weights.tokenizer_files(tmp_path / "model")]
    assert found == (["tokenizer.json", "tokenizer_config.json"] if tokenizer else [])
    loaded = checkpoints.load(tmp_path / "model")
    assert loaded.config == model.config
    assert torch.equal(loaded.losses(tokens(), tokens())[0], model.losses(tokens(), tokens())[0])
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    assert (loaded.head.weight is loaded.embedding.weight) == model.config.tie_embeddings
    loaded.loss(tokens(), tokens()).backward()


def test_published_fields_make_the_published_model():
    """config.json of fla-hub/hgrn2-1.3B-100B, as far as it sets the function."""
    given = {
        "model_type": "hgrn2",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "expand_ratio": 128,
        "hidden_ratio": 4,
        "vocab_size": 32_000,
    }
    given |= {"norm_eps": 1e-6, "tie_word_embeddings": False, "use_short_conv": False, "attn_mode": "chunk", "fuse_cross_entropy": True}
    config, settings = fla_models.translated(given, "config.json")
    assert settings == {"variant": "fla", "expand_ratio": 128}
    with torch.device("meta"):
        model = LanguageModel(config, registry.load("hgrn2"), settings, "chunked", 32_000, 2048)
    d, w = 2048, 5632
    assert sum(p.numel() for p in model.parameters()) == 2 * 32_000 * d + 24 * (4 * d * d + 3 * d * w + 3 * d) + 24 * d + d


@pytest.mark.parametrize(
    ("d", "ratio", "given", "width"), [(2048, 4, None, 5632), (1024, 4, None, 2816), (768, 4, None, 2048), (64, 3, 100, 100)]
)
def test_width_rule(d, ratio, given, width):
    assert fla_config.swiglu_width(d, ratio, given) == width


def test_half_precision_weights_become_float32(folder):
    want = load_file(folder / "model.safetensors")["lm_head.weight"].bfloat16()
    rewritten(folder, lambda t: t.update({name: x.bfloat16() for name, x in t.items()}))
    model = checkpoints.load(folder)
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, want.float())


def test_the_fused_gate_of_older_files_is_split(folder):
    want = checkpoints.load(folder).losses(tokens(), tokens())[0]

    def fuse(tensors):
        for layer in range(2):
            mlp = f"model.layers.{layer}.mlp"
            tensors[f"{mlp}.gate_proj.weight"] = torch.cat([tensors[f"{mlp}.gate_proj.weight"], tensors.pop(f"{mlp}.up_proj.weight")])

    rewritten(folder, fuse)
    assert torch.equal(checkpoints.load(folder).losses(tokens(), tokens())[0], want)


def shard(folder, files=("a.safetensors", "b.safetensors")):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = dict(zip(files, (names[:9], names[9:]), strict=True))
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_read_by_their_index(folder):
    want = checkpoints.load(folder).losses(tokens(), tokens())[0]
    shard(folder)
    assert torch.equal(checkpoints.load(folder).losses(tokens(), tokens())[0], want)
    (folder / "b.safetensors").unlink()
    with pytest.raises(DataError, match=r"b.safetensors is missing"):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edited(f, model_type="gla"), "model_type is 'gla'; only hgrn2 can be read"),
        (lambda f: edited(f, attn={"layers": [0]}), r"attn=\{'layers': \[0\]\} is not supported, only None"),
        (lambda f: edited(f, attnres_block_size=4), "attnres_block_size=4 is not supported"),
        (lambda f: edited(f, hidden_act="powlu"), "hidden_act='powlu' is not supported, only 'swish'"),
        (lambda f: edited(f, elementwise_affine=False), "elementwise_affine=False is not supported"),
        (lambda f: edited(f, expand_ratio=5), "hidden_size=16 must be a multiple of expand_ratio=5"),
        (lambda f: edited(f, expand_ratio=None, num_heads=3), "hidden_size=16 must be a multiple of num_heads=3"),
        (lambda f: edited(f, hidden_size="wide"), "a field has no usable value"),
        (lambda f: edited(f, vocab_size=25), r"embedding.weight \(in our names\) has shape \(24, 16\), not \(25, 16\)"),
        (lambda f: edited(f, use_lower_bound=False), "hold model.lower_bounds|hold bound_table"),
        (lambda f: edited(f, use_short_conv=True), r"lack blocks.0.mixer.conv_i.conv.weight \(in our names\)"),
        (lambda f: rewritten(f, lambda t: t.pop("model.layers.1.attn.q_proj.weight")), "lack model.layers.1.attn.q_proj.weight"),
        (lambda f: rewritten(f, lambda t: t.update(more=torch.zeros(1))), "hold more, which no field of config.json explains"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "its weights are a pickle, which can run code"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "has no weight_map from names to files"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'), "'../x' is not a file beside it"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(damage, message, folder):
    damage(folder)
    with pytest.raises(DataError, match=message) as caught:
        checkpoints.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"variant": "paper"}, {}, "only hgrn2 with variant=fla can be written for fla"),
        ({}, {"glu_bias": True, "forget_bias": 1.0}, "would need forget_bias=0.0, glu_bias=False"),
        ({}, {"lower_bound": "exclusive"}, "lower_bound=inclusive or none"),
        ({}, {"norm": "layernorm"}, "norm=rmsnorm"),
    ],
)
def test_what_fla_does_not_have_is_not_written(settings, changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        fla_models.save(build(settings, **changes), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_source_without_a_tokenizer_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match="has no tokenizer to copy"):
        fla_models.save(build(), tmp_path / "model", tmp_path)
    assert not (tmp_path / "model").exists()
