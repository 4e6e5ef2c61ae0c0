"""Trained language models as folders: `model.safetensors`, and a `config.json` from which the model is built again.

Beside them stand the files of the tokenizer, which no hash covers (see `hgrn2_bench.text_tokenizers`).
`load` also takes a folder of fla's, as published on the Hugging Face hub (see `hgrn2_bench.fla_models`).
"""

import dataclasses
from pathlib import Path

import torch

from hgrn2_bench import fla_models, registry, trained, weights
from hgrn2_bench.errors import ConfigError, DataError
from hgrn2_bench.language import LanguageModel
from hgrn2_bench.text_tokenizers import Vocabulary, tokenizer_files_of
from hgrn2_bench.trained import FORMAT, VERSION, Card, read_card

__all__ = ["FORMAT", "VERSION", "Card", "load", "read_card", "save"]


def save(model: LanguageModel, card: Card, folder: Path, vocabulary: Vocabulary | None = None) -> str:
    """Write a checkpoint in place of what `folder` held, and return the SHA-256 of its weights.

    It has the tokenizer's files where card and vocabulary tell what it is. It appears whole or not at all.
    ConfigError where the folder cannot be written.
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
            "mixer_version": registry.version_of(card.model, card.settings),
            "model_config": dataclasses.asdict(model.config),
            "vocab_size": model.vocab_size,
            "max_len": model.max_len,
            "sha256": sha256,
        }
        weights.write_config(new, content)
        for name, text in tokenizer_files_of(card.tokenizer, vocabulary).items():
            (new / name).write_text(text, encoding="utf-8")
    return sha256


def load(folder: Path, backend: str = "chunked", device: str = "cpu") -> LanguageModel:
    """The model of a checkpoint of ours or of a folder of fla's, in eval mode, on a resolved backend.

    DataError, one line, where a file is missing, cut short, changed, or of another kind; global random state is left alone.
    """
    if not trained.is_own(weights.read_config(folder)):
        return fla_models.load(folder, backend, device)
    content, card = trained.read_content(folder), trained.read_card(folder)
    tensors = weights.read_tensors(folder / "model.safetensors")
    trained.check_digest(folder, content)
    mixer = registry.load(card.model)
    registry.check_version(folder, card, content["mixer_version"])
    config = trained.config_of(folder, content)
    try:
        with torch.random.fork_rng(devices=[]):
            model = LanguageModel(config, mixer, card.settings, backend, content["vocab_size"], content["max_len"])
        if config.tie_embeddings:
            tensors["head.weight"] = tensors["embedding.weight"]
        model.load_state_dict(tensors)
    except ConfigError as error:
        raise DataError(f"{folder}: {error}") from None
    except (KeyError, TypeError, RuntimeError) as error:
        raise trained.unlike(folder, error) from None
    return model.to(device).eval()
