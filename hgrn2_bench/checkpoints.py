"""Trained language models as folders: `model.safetensors`, and a `config.json` from which the model is built again.

`load` also takes a folder of fla's, as published on the Hugging Face hub (see `hgrn2_bench.fla_models`).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hgrn2_bench import fla_models, registry, weights
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError, DataError
from hgrn2_bench.language import LanguageModel

FORMAT = "hgrn2_bench language model"
VERSION = 1
"""Raised when `load` could not read what an older `save` wrote."""


@dataclass(frozen=True)
class Card:
    """What a checkpoint says beside its weights and the model's configuration."""

    model: str
    """Its name in the registry, or `./file.py:Class`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of its mixer."""
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    """The card of the corpus that it was trained on."""
    tokens: int = 0
    """Training tokens that it has seen."""


def save(model: LanguageModel, card: Card, folder: Path) -> str:
    """Write a checkpoint in place of what `folder` held, and return the SHA-256 of its weights.

    It appears whole or not at all. ConfigError where the folder cannot be written.
    """
    tensors = model.state_dict()
    if model.config.tie_embeddings:
        del tensors["head.weight"]
    with weights.new_folder(folder) as new:
        weights.write_tensors(new / "model.safetensors", tensors)
        sha256 = weights.digest(new / "model.safetensors")
        content = {
            "format": FORMAT,
            "version": VERSION,
            **dataclasses.asdict(card),
            "mixer_version": _mixer_version(card),
            "model_config": dataclasses.asdict(model.config),
            "vocab_size": model.vocab_size,
            "max_len": model.max_len,
            "sha256": sha256,
        }
        weights.write_config(new, content)
    return sha256


def read_card(folder: Path) -> Card:
    """What a checkpoint of ours says beside its weights. DataError where there is none."""
    content = _content(folder)
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in content["settings"].items()}
    return Card(content["model"], settings, content["tokenizer"], content["tokens"])


def load(folder: Path, backend: str = "chunked", device: str = "cpu") -> LanguageModel:
    """The model of a checkpoint of ours or of a folder of fla's, in eval mode, on a resolved backend.

    DataError, one line, where a file is missing, cut short, changed, or of another kind; global random state is left alone.
    """
    if "model_type" in weights.read_config(folder):
        return fla_models.load(folder, backend, device)
    content, card, path = _content(folder), read_card(folder), folder / "model.safetensors"
    tensors = weights.read_tensors(path)
    if weights.digest(path) != content["sha256"]:
        raise DataError(f"{path} is not the file that {folder / 'config.json'} was written with (another SHA-256)")
    mixer = registry.load(card.model)
    if _mixer_version(card) != content["mixer_version"]:
        raise DataError(f"{folder}: saved with version {content['mixer_version']} of {card.model}, here it is {_mixer_version(card)}")
    try:
        config = ModelConfig(**content["model_config"])
        with torch.random.fork_rng(devices=[]):
            model = LanguageModel(config, mixer, card.settings, backend, content["vocab_size"], content["max_len"])
        if config.tie_embeddings:
            tensors["head.weight"] = tensors["embedding.weight"]
        model.load_state_dict(tensors)
    except ConfigError as error:
        raise DataError(f"{folder}: {error}") from None
    except (KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{folder}: config and weights do not make a model here: {' '.join(str(error).split())[:200]}") from None
    return model.to(device).eval()


def _mixer_version(card: Card) -> str:
    """The version of the model's code, with those of its parts."""
    found = registry.model(card.model)
    return found.full_version(dataclasses.asdict(found.settings()) | dict(card.settings))


def _content(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint of ours. DataError where it is something else, of a newer program, or incomplete."""
    content, path = weights.read_config(folder), folder / "config.json"
    if content.get("format") != FORMAT:
        raise DataError(f"{path} is of no checkpoint that this program knows (format {content.get('format')!r})")
    if content.get("version") != VERSION:
        raise DataError(f"{path} has version {content.get('version')}, this program reads {VERSION}")
    needed = [f.name for f in dataclasses.fields(Card)] + ["mixer_version", "model_config", "vocab_size", "max_len", "sha256"]
    if missing := [name for name in needed if name not in content]:
        raise DataError(f"{path} lacks {', '.join(missing)}")
    return content
