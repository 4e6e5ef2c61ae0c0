"""Checkpoints: the same model after loading, one clear line for what is missing, cut, changed or foreign, and nothing half written."""

import json
import shutil

import pytest
import torch

from hgrn2_bench import checkpoints, registry, weights
from hgrn2_bench.checkpoints import Card
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError, DataError
from hgrn2_bench.language import LanguageModel

V, T = 19, 12
CARD = Card("hgrn2", {"expand_ratio": 8}, {"tokenizer": "bytes, sha256 00", "words": "split at spaces"}, 12_345)


def build(card=CARD, **changes):
    torch.manual_seed(0)
    config = ModelConfig(
        **({"d_model": 16, "num_layers": 2, "channel_mixer": "glu", "embed_std": 1.0, "lower_bound": "inclusive"} | changes)
    )
    return LanguageModel(config, registry.load(card.model), card.settings, "chunked", V, T).eval()


def tokens():
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("card", "changes"),
    [
        (CARD, {}),
        (CARD, {"tie_embeddings": True, "positions": "sinusoid"}),
        (CARD, {"softmax": "adaptive", "cutoffs": (4, 9), "tie_embeddings": True}),
        (Card("hybrid", {"layers": ("hgrn2", "gla")}), {"positions": "learned"}),
        (Card("hgrn1", {"variant": "paper"}), {"norm": "batchnorm"}),
    ],
)
def test_a_loaded_model_is_the_saved_one(card, changes, tmp_path):
    model = build(card, **changes)
    model.rank({i: i for i in range(V)})
    state = torch.get_rng_state()
    sha256 = checkpoints.save(model, card, tmp_path / "model")
    loaded = checkpoints.load(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loaded.losses(tokens(), tokens())[0], model.losses(tokens(), tokens())[0])
    assert loaded.config == model.config
    assert not loaded.training
    assert checkpoints.read_card(tmp_path / "model") == card
    assert (loaded.head.weight is loaded.embedding.weight) == model.config.tie_embeddings
    assert sha256 == weights.digest(tmp_path / "model" / "model.safetensors")


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside(tmp_path):
    checkpoints.save(build(), CARD, tmp_path / "model")
    (tmp_path / "model" / "stray").touch()
    checkpoints.save(build(), Card("hgrn2", CARD.settings, tokens=7), tmp_path / "model")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "model", "model.safetensors"]
    assert checkpoints.read_card(tmp_path / "model").tokens == 7


def test_a_fault_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoints.save(build(), CARD, tmp_path / "model")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "write_config", full)
    with pytest.raises(ConfigError, match="model cannot be written: No space left on device"):
        checkpoints.save(build(), CARD, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert checkpoints.load(tmp_path / "model").vocab_size == V


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"model: no such folder of a model"),
        (lambda f: (f / "config.json").unlink(), r"config.json is missing: .* holds no model"),
        (lambda f: (f / "config.json").write_text('{"format"'), r"config.json cannot be read: "),
        (lambda f: (f / "config.json").write_text("[]"), r"config.json holds no JSON object"),
        (lambda f: (f / "config.json").write_text("{}"), r"of no checkpoint that this program knows \(format None\)"),
        (lambda f: edited(f, version=2), r"has version 2, this program reads 1"),
        (lambda f: edited(f, mixer_version="0"), r"saved with version 0 of hgrn2, here it is"),
        (lambda f: edited(f, model="hgnr2"), r"Unknown model 'hgnr2'. Did you mean 'hgrn2'"),
        (lambda f: edited(f, model_config={"d_modle": 3}), r"config and weights do not make a model here: .*d_modle"),
        (lambda f: edited(f, vocab_size=V + 1), r"config and weights do not make a model here: .*size mismatch"),
        (lambda f: edited(f, settings={"expand_ratio": 5}), r"d_model=16 must be a multiple of expand_ratio=5"),
        (lambda f: edited(f, model_type="llama"), r"model_type is 'llama'; only hgrn2 can be read"),
        (lambda f: (f / "model.safetensors").unlink(), r"model.safetensors is missing"),
        (cut, r"model.safetensors is cut short or no safetensors file: "),
        (flip, r"is not the file that .*config.json was written with \(another SHA-256\)"),
    ],
)
def test_damage_is_told_in_one_line(damage, message, tmp_path):
    folder = tmp_path / "model"
    checkpoints.save(build(), CARD, folder)
    damage(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        checkpoints.load(folder)
    assert "\n" not in str(caught.value)


def test_a_config_without_some_keys_names_them(tmp_path):
    checkpoints.save(build(), CARD, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": checkpoints.FORMAT, "version": 1, "model": "hgrn2"}))
    with pytest.raises(DataError, match="lacks settings, tokenizer, tokens, mixer_version"):
        checkpoints.read_card(tmp_path)
