"""Folders of trained language models, as far as planning reads them: what a model is, and the hash of it. Imports no torch.

Ours are written by `hgrn2_bench.checkpoints`; HGRN2 of fla, as published on the Hugging Face hub, is read by `hgrn2_bench.fla_config`, and
any other type of model by `hgrn2_bench.foreign_config`.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hgrn2_bench import fla_config, foreign_config, weights
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError, DataError, one_line

FORMAT = "hgrn2_bench language model"
VERSION = 1
"""Raised when `hgrn2_bench.checkpoints.load` could not read what an older `save` wrote."""


@dataclass(frozen=True)
class Card:
    """What a checkpoint says beside its weights and the model's configuration."""

    model: str
    """Its name in the registry, or `./file.py:Class`; of a foreign model its type."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of its mixer; of a foreign model what its configuration says of its size."""
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    """The card of the corpus that it was trained on."""
    tokens: int = 0
    """Training tokens that it has seen."""


@dataclass(frozen=True)
class Trained:
    """A trained model, without its weights."""

    folder: Path
    card: Card
    config: ModelConfig
    """Says nothing of a foreign model."""
    vocab_size: int
    """0 where a foreign model's folder does not say."""
    max_len: int
    """Tokens of a training sample; 0 where a foreign model's folder does not say."""
    mixer_version: str
    """Of the code that trained it; empty where the folder does not say."""
    hash: str
    """16 hex digits over `config.json`, the weights and, but for ours, the tokenizer's files, wherever the folder lies."""
    foreign: bool = False
    """Whether it is none of our models, nor one that can be read as ours."""
    remark: str = ""
    """What to say before it runs."""
    name: str = ""
    """Where it is not the folder's."""

    @property
    def tokens(self) -> int | None:
        """Training tokens that it has seen; None where the folder does not say."""
        return self.card.tokens or None

    @property
    def told(self) -> dict[str, Any]:
        """What a row says of its training."""
        return {"trained_model": self.card.model, "trained_tokens": self.tokens, "trained_on": dict(self.card.tokenizer)}

    @property
    def label(self) -> str:
        """A short name: the folder's and the first digits of the hash; for a folder that is just called `model` the mixer's."""
        name = self.name or self.folder.resolve().name
        label = self.card.model.rpartition(":")[2] if name == "model" else re.sub(r"[^\w.+-]", "_", name)
        return f"{label}@{self.hash[:6]}"


def is_own(content: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of a checkpoint of ours."""
    return "model_type" not in content


def is_foreign(content: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of none of our models, nor of one that can be read as ours."""
    return content.get("model_type", fla_config.MODEL_TYPE) != fla_config.MODEL_TYPE


def read(folder: Path) -> Trained:
    """What a folder holds. DataError, one line, for files that are missing, cut short, changed, or of another kind."""
    content = weights.read_config(folder)
    if is_foreign(content):
        return _foreign(folder, content)
    if not is_own(content):
        config, settings = fla_config.translated(content, folder / "config.json")
        values = fla_config.DEFAULTS | content
        card, version = Card(fla_config.MODEL_TYPE, settings), ""
        sizes = values["vocab_size"], values["max_position_embeddings"]
        files = fla_config.weight_files(folder)
    else:
        content, card = read_content(folder), read_card(folder)
        config, version = config_of(folder, content), content["mixer_version"]
        sizes = content["vocab_size"], content["max_len"]
        files = (folder / "model.safetensors",)
    digests = _digests(files)
    if "sha256" in content:
        check_digest(folder, content, digests["model.safetensors"])
    return Trained(folder, card, config, *sizes, mixer_version=version, hash=_hash(folder, content, digests))


def _foreign(folder: Path, content: Mapping[str, Any]) -> Trained:
    """What the folder of a model of another type holds."""
    path = folder / "config.json"
    card = Card(str(content["model_type"]), foreign_config.settings_of(content, path))
    sizes = card.settings.get("vocab_size", 0), foreign_config.length_of(content)
    digest = _hash(folder, content, _digests(fla_config.weight_files(folder)))
    remark = foreign_config.remark(content, path)
    return Trained(folder, card, ModelConfig(), *sizes, mixer_version="", hash=digest, foreign=True, remark=remark)


def _digests(files: Sequence[Path]) -> dict[str, str]:
    """The SHA-256 of each file of weights. DataError, before any is read, where one is missing, cut short or of another kind."""
    for path in files:
        weights.check_tensors(path)
    return {path.name: weights.digest(path) for path in files}


def _hash(folder: Path, content: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    tokenizer = () if is_own(content) else weights.tokenizer_files(folder)  # a checkpoint of ours tells its own in config.json
    digests = {**digests, **{path.name: weights.digest(path) for path in tokenizer}}
    return hashlib.sha256(json.dumps([content, digests], sort_keys=True).encode()).hexdigest()[:16]


def read_card(folder: Path) -> Card:
    """What a checkpoint of ours says beside its weights. DataError where there is none."""
    content = read_content(folder)
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in content["settings"].items()}
    return Card(content["model"], settings, content["tokenizer"], content["tokens"])


def config_of(folder: Path, content: Mapping[str, Any]) -> ModelConfig:
    """The configuration of the model of a checkpoint of ours. DataError where it is none here."""
    try:
        return ModelConfig(**content["model_config"])
    except ConfigError as error:
        raise DataError(f"{folder}: {error}") from None
    except TypeError as error:
        raise unlike(folder, error) from None


def unlike(folder: Path, error: Exception) -> DataError:
    """What a folder is whose parts do not fit one another."""
    return DataError(f"{folder}: config and weights do not make a model here: {one_line(error)[:200]}")


def check_digest(folder: Path, content: Mapping[str, Any], found: str = "") -> None:
    """DataError where the weights (of the digest `found`, else it is taken) are not those that a checkpoint of ours was saved with."""
    path = folder / "model.safetensors"
    if (found or weights.digest(path)) != content["sha256"]:
        raise DataError(f"{path} is not the file that {folder / 'config.json'} was written with (another SHA-256)")


def read_content(folder: Path) -> dict[str, Any]:
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
