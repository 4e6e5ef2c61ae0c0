"""What a user's words may say in a run: keys that are known, given once and to some effect; and which word wins. Imports no torch."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hgrn2_bench import fla_config, registry
from hgrn2_bench.config import PLAN_KEYS, CellConfig, MatchConfig, ModelConfig, TrainConfig, Word
from hgrn2_bench.errors import ConfigError, DataError, unknown
from hgrn2_bench.files import WORD
from hgrn2_bench.protocol import Protocol

MATCH_KEYS = tuple(f.name for f in dataclasses.fields(MatchConfig))
EVALUATING = ("eval_batch_size",)
"""Keys of training that scoring takes too."""
FIXED = {f.name for schema in (ModelConfig, TrainConfig, MatchConfig) for f in dataclasses.fields(schema)} - set(EVALUATING) | {"seed"}
"""Keys that a trained model does not take: what it is, how it is trained or matched, and the seed, by which nothing is drawn."""
NO_SIGNS = "write plain {}=value; Hydra's signs +, ~ and @ mean nothing here"


@dataclass
class Axes:
    """The sweeps of one layer stack for one model: name to values, in the order first seen."""

    plain: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    own: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def apply(self, words: Iterable[Word], model: registry.Model) -> None:
        """Let one layer's words win over those before."""
        for word in words:
            if not word.owner:
                self.plain[word.key] = word.values
                self.own.pop(word.key, None)
        for word in words:
            if word.owner == model.name:
                self.own[axis_name(word, model)] = word.values


def axis_name(word: Word, model: registry.Model) -> str:
    """The name of a word's axis for one model: `model.key` for a setting of the mixer's own, which may share its name with a plain key."""
    return word.name if word.owner and word.key in {f.name for f in dataclasses.fields(model.settings)} else word.key


def sections(protocol: Protocol) -> dict[str, type]:
    """Section name to schema, for the plain keys of one suite."""
    return {
        "cell": CellConfig,
        "model_config": ModelConfig,
        "train": TrainConfig,
        "data": protocol.data_schema,
        "matching": MatchConfig,
    }


def check_names(parsed: Sequence[Word], protocol: Protocol, chosen: Sequence[registry.Model]) -> None:
    """Refuse unknown keys, repeated keys, and keys of models that are not in the run."""
    schemas = sections(protocol)
    plain = [f.name for s in schemas.values() for f in dataclasses.fields(s)]
    models = {m.name: m for m in chosen}
    own = {m.name: [f.name for f in dataclasses.fields(m.settings)] for m in chosen}
    reads_files = [WORD.removesuffix("=")] if protocol.fingerprint is not None else []
    usable = [name for name in plain if name not in protocol.idle]
    known = [*PLAN_KEYS, *reads_files, *usable, *(f"{m}.{k}" for m, keys in own.items() for k in keys)]
    seen: set[str] = set()
    for word in parsed:
        if word.name in seen:
            raise ConfigError(f"{word.name!r} is given twice; a sweep is written {word.name}=a,b")
        seen.add(word.name)
        if word.owner and word.owner not in own and word.owner in registry.models():
            raise ConfigError(f"{word.text!r} has no effect: the run has no model {word.owner!r}")
        if word.owner and (word.owner not in own or word.key not in (*own[word.owner], *plain)):
            raise unknown("key", word.name, [*known, *(f"{m}.{k}" for m in own for k in plain if k == word.key)])
        if not word.owner and word.key not in (*PLAN_KEYS, *plain):
            raise unknown("key", word.key, known)
        if word.key in protocol.idle and word.key not in own.get(word.owner, ()):
            raise ConfigError(f"{word.text!r} has no effect on suite={protocol.name}")
        if not word.plain:
            raise ConfigError(f"{word.text!r}: {NO_SIGNS.format(word.name)}")
        word.check_list(*([models[word.owner].settings] if word.owner else []), ModelConfig)
        if word.owner and word.key in MATCH_KEYS and word.key not in own[word.owner]:
            raise ConfigError(f"{word.text!r}: a match holds for all models of a run; write {word.key}=value")


def check_models(chosen: Sequence[registry.Model]) -> None:
    """Refuse two different files whose class, and so whose rows, have one name."""
    for one, other in itertools.combinations(chosen, 2):
        if one.name == other.name and one.version != other.version:
            raise ConfigError(f"two models are called {one.name!r}: {one.module} and {other.module}; rename one class")


def check_trained(parsed: Sequence[Word], protocol: Protocol, chosen: Sequence[registry.Model]) -> None:
    """Refuse trained models in a suite that does not evaluate them, and words that no model of the run would take."""
    kept = [model for model in chosen if model.trained]
    if kept and not (protocol.saves_weights or protocol.takes_any_language_model):
        raise ConfigError(f"suite={protocol.name} trains its models: {kept[0].name} is a trained language model")
    for found in (model.trained for model in kept if model.trained):
        if found.foreign and not protocol.takes_any_language_model:
            where = f"{found.folder / 'config.json'}: model_type is {found.card.model!r}"
            raise DataError(f"{where}; only {fla_config.MODEL_TYPE} can be read by suite={protocol.name}")
    for word in parsed:
        if kept and len(kept) == len(chosen) and not word.owner and word.key in FIXED:
            raise ConfigError(f"{word.text!r} has no effect: {kept[0].name} is trained and stays as it is")
