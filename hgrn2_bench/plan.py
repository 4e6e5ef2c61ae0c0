"""From words to cells: the product of all sweeps, checked, with equal cells merged. Imports no torch.

Layers, later ones winning key by key: schema defaults, the preset's words, the task's words, the user's words; within a layer
`model.key` wins over `key`. A cell's key is a hash of everything that can change its numbers, so a finished cell is found again.
"""

import dataclasses
import hashlib
import itertools
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hgrn2_bench import foreign_config, provenance, registry
from hgrn2_bench.backends import resolve_backend
from hgrn2_bench.config import PLAN_KEYS, CellConfig, MatchConfig, ModelConfig, TrainConfig, Word, convert, parse_words, schema_of, written
from hgrn2_bench.errors import ConfigError, unknown
from hgrn2_bench.protocol import Preset, Protocol
from hgrn2_bench.trained import Trained
from hgrn2_bench.words import EVALUATING, FIXED, NO_SIGNS, Axes, axis_name, check_models, check_names, check_trained, sections

SHOWN = ("conv", "positions", "forget_bias", "lower_bound", "num_layers", "first_layer")
"""What of a trained model's configuration keeps its plain name in rows, where tables and comparisons read it."""


@dataclass(frozen=True)
class Cell:
    """One run: complete, frozen, and JSON-ready. `data` is an instance of the suite's own schema."""

    suite: str
    protocol_version: int
    preset: str
    task: str
    model: str
    model_ref: str
    """How to find the model (a registry key, `./file.py:Class`, or the folder of a trained one); not part of the key."""
    mixer_version: str
    seed: int
    backend: str
    dtype: str
    device: str
    settings: Mapping[str, Any]
    """The mixer's own settings, all of them."""
    model_config: ModelConfig
    train: TrainConfig
    data: Any
    command: str
    """The command that runs exactly this cell; not part of the key."""
    processes: int = 1
    """Of one timed run. A run that trains takes as many as it is started with, and is the same cell."""
    matching: MatchConfig = field(default_factory=MatchConfig)
    """What was matched."""
    machine: str = ""
    """The name of the GPU or processor, where the cell's number is its speed."""
    checkpoint: str = ""
    """Of a trained model that is evaluated: the hash of its weights and config, which stands in the key for its name."""

    @property
    def key(self) -> str:
        """16 hex digits over everything that can change the numbers, and over what was matched (a tolerance changes neither).

        Plain keys count where they differ from their schema's default, so that a new key orphans no finished cell. The price: whoever
        changes a default raises the protocol's version. Over how many processes training spreads a batch, and how, changes nothing.
        """
        content = {k: v for k, v in self.to_json().items() if k not in ("model_ref", "command")}
        content |= {name: _departures(getattr(self, name)) for name in ("model_config", "train", "data", "matching")}
        content["matching"].pop("match_tolerance", None)
        content["train"].pop("parallel", None)
        for name in ("machine", "checkpoint"):
            if not content[name]:
                del content[name]
        if self.checkpoint:
            del content["model"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def alike(self) -> str:
        """The same text for cells that build the same model and cost the same: equal but for seed and learning rate."""
        content = self.to_json() | {"seed": 0, "command": ""}
        return json.dumps(content | {"train": content["train"] | {"lr": 0}}, sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        """Plain containers, as stored in `config.json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Cell":
        """The cell that `to_json` stored."""
        schema = registry.protocol(content["suite"]).data_schema
        sections = {"model_config": ModelConfig, "train": TrainConfig, "data": schema, "matching": MatchConfig}
        built = {k: sections[k](**v) if k in sections else v for k, v in content.items()}
        built["settings"] = {k: tuple(v) if isinstance(v, list) else v for k, v in content["settings"].items()}
        return Cell(**built)

    def fields(self) -> dict[str, Any]:
        """Every setting of the cell under the name a user types, the mixer's own with its prefix.

        Of a trained model also its configuration has the prefix, but for what tables show, and there is none of training. A foreign one
        has no configuration of ours.
        """
        configs = () if self.backend == foreign_config.BACKEND else (self.model_config,)
        parts = (*configs, self.train, self.data, self.matching)
        plain = {k: v for part in parts for k, v in dataclasses.asdict(part).items()}
        own = dict(self.settings)
        if self.checkpoint:
            fixed = {k: v for config in configs for k, v in dataclasses.asdict(config).items() if k not in SHOWN}
            plain = {k: v for k, v in plain.items() if k not in fixed and (k in EVALUATING or k not in _own(TrainConfig, plain))}
            own = fixed | own | {"checkpoint": self.checkpoint}
        return plain | {f"{self.model}.{k}": v for k, v in own.items()}

    def changed(self, values: Mapping[str, Any]) -> "Cell":
        """The cell with other values of its model, mixer or matching, by the names that a user types; its command stays."""
        prefix = f"{self.model}."
        settings = dict(self.settings) | {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        model_config = dataclasses.replace(self.model_config, **_own(ModelConfig, values))
        matching = dataclasses.replace(self.matching, **_own(MatchConfig, values))
        return dataclasses.replace(self, settings=settings, model_config=model_config, matching=matching)


@dataclass(frozen=True)
class Plan:
    """The cells of one command, in the order they run, and remarks for the user."""

    protocol: Protocol
    preset: str
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()
    given: frozenset[str] = frozenset()
    """Names of the words that the user typed."""


@dataclass(frozen=True)
class Description:
    """What a planned cell will build and cost."""

    parameters: int
    non_embedding_parameters: int
    state_bytes: int | None
    train_flops_per_token: float | None
    steps: int
    tokens: int
    seconds: float | None
    """Estimated training time here; None where it was not probed."""
    effective: Mapping[str, Any]


def make_plan(words: Sequence[str], device: str, files: bool = True) -> Plan:
    """Turn a user's words into cells for a `device` type (cpu or cuda). ConfigError, one line, for anything that cannot run.

    Without `files` no data file is looked at: cells that need some have no fingerprint, and are not for running.
    """
    parsed = parse_words(words)
    protocol, preset_name, preset = _protocol_and_preset(parsed)
    given = {word.key: word for word in parsed if not word.owner}
    preset_words = parse_words(preset.words)
    refs = next((w.values for w in (*parsed, *preset_words) if w.name == "model"), ())
    if not refs:
        raise ConfigError(f"preset={preset_name} names no model: write model=DIR for the folder of a trained one")
    chosen = [registry.model(str(ref)) for ref in refs]
    tasks = _tasks(given["task"].values if "task" in given else tuple(preset.tasks), protocol, preset_name)
    check_names(parsed, protocol, chosen)
    check_models(chosen)
    check_trained(parsed, protocol, chosen)
    untrained = [model.name for model in chosen if not model.trained]
    # planned without files, such cells are for looking at
    if files and untrained and not any(word.name == "model" for word in preset_words):
        raise ConfigError(f"preset={preset_name} is for trained models: write model=DIR; preset=smoke trains {untrained[0]}")
    cells: dict[str, Cell] = {}
    notes: dict[str, None] = {}
    for (task, task_words), (ref, model) in itertools.product(tasks.items(), zip(refs, chosen, strict=True)):
        axes = Axes()
        for layer in (preset_words, task_words, parsed):
            axes.apply(layer, model)
        planned = protocol if files else dataclasses.replace(protocol, fingerprint=None)
        maker = _CellMaker(planned, preset_name, task, model, str(ref), device, parsed, axes)
        for cell in maker.cells():
            cells.setdefault(cell.key, cell)
        notes |= dict.fromkeys(maker.notes)
    ordered = tuple(taking_turns(cells.values()) if protocol.speed else cells.values())
    return Plan(protocol, preset_name, ordered, tuple(notes), frozenset(word.name for word in parsed))


def _tasks(names: Sequence[Any], protocol: Protocol, preset_name: str) -> dict[str, list[Word]]:
    """The words of each task: those of the preset, or of any other name where it takes such. ConfigError for an unknown name."""
    preset = protocol.presets[preset_name]
    found: dict[str, list[Word]] = {}
    for name in map(str, names):
        if name in preset.tasks:
            found[name] = parse_words(preset.tasks[name])
        elif preset.open_tasks and protocol.open_task:
            found[name] = parse_words(protocol.open_task(name))
        else:
            error = unknown(f"task of {protocol.name} preset={preset_name}", name, preset.tasks)
            others = [other for other, each in protocol.presets.items() if each.open_tasks and protocol.open_task]
            raise ConfigError(f"{error} Any other is for trained models: preset={others[0]} model=DIR.") if others else error
    return found


def taking_turns(cells: Collection[Cell]) -> list[Cell]:
    """Cells that time something, so ordered that drift favours nobody: repeat after repeat (the seeds), models in turn at each size."""
    sizes = {size: place for place, size in enumerate(dict.fromkeys((cell.task, cell.data, cell.dtype) for cell in cells))}
    return sorted(cells, key=lambda cell: (cell.seed, sizes[cell.task, cell.data, cell.dtype]))


def plan_beside(ref: str, others: Sequence[str], usual: Sequence[str], words: Sequence[str], device: str) -> tuple[Cell, ...]:
    """One cell of a model and one of each of the others, in one setting; the user's words win over the usual ones, key by key."""
    given = {word.partition("=")[0] for word in words}
    models = list(dict.fromkeys([ref, *others]))
    kept = [word for word in usual if word.partition("=")[0] not in given]
    cells = make_plan([f"model={','.join(models)}", *kept, *words], device).cells
    if len(cells) != len(models):
        raise ConfigError("one setting at a time: one model, one task, one value a key")
    return cells


def _protocol_and_preset(parsed: Sequence[Word]) -> tuple[Protocol, str, Preset]:
    single: dict[str, str] = {}
    for word in parsed:
        if not word.owner and word.key in ("suite", "preset"):
            if not word.plain:
                raise ConfigError(f"{word.text!r}: {NO_SIGNS.format(word.name)}")
            if len(word.values) != 1:
                raise ConfigError(f"{word.text!r}: one {word.key} at a time")
            single[word.key] = str(word.values[0])
    if "suite" not in single:
        raise ConfigError(f"name a suite: suite={'|'.join(registry.suites())}")
    protocol = registry.protocol(single["suite"])
    name = single.get("preset", _usual_preset(parsed, protocol))
    if name not in protocol.presets:
        raise unknown(f"preset of {protocol.name}", name, protocol.presets)
    return protocol, name, protocol.presets[name]


def _usual_preset(parsed: Sequence[Word], protocol: Protocol) -> str:
    """The preset where none is given."""
    refs = [str(ref) for word in parsed if word.name == "model" for ref in word.values]
    evaluates = bool(refs) and all(map(registry.names_folder, refs)) and "evaluate" in protocol.presets
    return "evaluate" if evaluates else "smoke"


class _CellMaker:
    """Builds the cells of one task and model from its axes."""

    def __init__(
        self, protocol: Protocol, preset: str, task: str, model: registry.Model, ref: str, device: str, user: Sequence[Word], axes: Axes
    ) -> None:
        self.protocol, self.preset, self.task, self.model, self.ref, self.device = protocol, preset, task, model, ref, device
        self.user = [w for w in user if w.owner in ("", model.name) and w.key not in PLAN_KEYS]
        self.axes = {k: v for k, v in axes.plain.items() if k not in PLAN_KEYS} | axes.own
        self.notes: list[str] = []
        if model.trained:
            self._fix(model.trained)

    def _fix(self, trained: Trained) -> None:
        """Let a trained model keep its own configuration and settings, and say which of the user's words it does not take."""
        if left := sorted(word.key for word in self.user if word.key in FIXED):
            self.notes.append(f"{', '.join(left)}: no effect on {self.model.name}, which is trained")
        self.notes += [trained.remark] if trained.remark else []
        self.user = [word for word in self.user if word.key not in FIXED]
        config = {} if trained.foreign else {f.name: getattr(trained.config, f.name) for f in dataclasses.fields(ModelConfig)}
        own = {f"{self.model.name}.{name}": value for name, value in trained.card.settings.items()}
        kept = {name: values for name, values in self.axes.items() if name not in FIXED}
        self.axes = kept | {name: (value,) for name, value in {**config, **own}.items()}

    def cells(self) -> list[Cell]:
        """Every combination, or ConfigError for the first that is illegal."""
        axes = {name: self._converted(name, values) for name, values in self.axes.items()}
        combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        mixers = [self._mixers(values) for values in combinations]
        idle = [frozenset() if self.model.trained else self._idle(*each) for each in zip(combinations, mixers, strict=True)]
        self._note_idle(idle)
        return [self._cell(*each, axes) for each in zip(map(_without, combinations, idle), mixers, strict=True)]

    def _converted(self, name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        found = schema_of(sections(self.protocol), name)
        schema = found[1] if found else self.model.settings
        return tuple(convert(schema, name.rpartition(".")[2], value, name) for value in values)

    def _mixers(self, values: Mapping[str, Any]) -> tuple[registry.Model, ...]:
        """The models whose mixers a cell's layers have: its own or the parts of that, and the one that `first_layer` names."""
        name = self.model.facts.get("parts", "")
        parts = self.model.parts({name: values.get(f"{self.model.name}.{name}", getattr(self.model.settings, name))}) if name else ()
        return (*(parts or (self.model,)), *registry.first_layer(values.get("first_layer", "none")))

    def _idle(self, values: Mapping[str, Any], mixers: Sequence[registry.Model]) -> frozenset[str]:
        """The shared keys among the values that none of a cell's mixers can use; a sweep over them would repeat equal cells."""
        used = {
            "conv": any(m.is_mixer and m.facts.get("convolved", True) for m in mixers),  # a plain module is not told of it
            "forget_bias": any(m.facts.get("gated", False) for m in mixers),
            "lower_bound": any(m.facts.get("bounded", False) for m in mixers),
            "positions": values.get("positions") != "rope" or any(m.facts.get("rotary", False) for m in mixers),
        }
        return frozenset(key for key, is_used in used.items() if key in values and not is_used)

    def _note_idle(self, idle: Sequence[frozenset[str]]) -> None:
        """Say which keys have no effect on any cell; `positions` only loses its value rope."""
        asked = {word.key for word in self.user}
        nowhere = frozenset.intersection(*idle)
        self.notes += [f"{key} has no effect on {self.model.name}: left out" for key in sorted(nowhere & asked - {"positions"})]
        if any("positions" in each for each in idle):
            self.notes.append(f"positions=rope has no effect on {self.model.name}: none")

    def _cell(self, values: dict[str, Any], mixers: Sequence[registry.Model], axes: Mapping[str, tuple[Any, ...]]) -> Cell:
        schemas = sections(self.protocol)
        built = {section: schema(**_own(schema, values)) for section, schema in schemas.items()}
        prefix = f"{self.model.name}."
        own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        settings = dataclasses.asdict(self.model.settings(**own))
        cell: CellConfig = built.pop("cell")
        if self.protocol.fingerprint is not None:
            folder = (self.model.trained.folder,) if self.model.trained else ()
            built["data"] = dataclasses.replace(built["data"], fingerprint=self.protocol.fingerprint(built["data"], *folder))
        task = self.protocol.name_task(built["data"])
        self._check_order(built["model_config"], built["data"], task, mixers)
        return Cell(
            suite=self.protocol.name,
            protocol_version=self.protocol.version,
            preset=self.preset,
            task=task,
            model=self.model.name,
            model_ref=self.ref,
            mixer_version=versions(self.model, settings, built["model_config"].first_layer),
            seed=cell.seed,
            backend=resolve_backend(cell.backend, self.device, *mixers),
            dtype=cell.dtype,
            device=self.device,
            settings=settings,
            command=self._command(values, axes, cell.seed),
            machine=provenance.device_name(self.device) if self.protocol.speed else "",
            checkpoint=self.model.checkpoint,
            **built,
        )

    def _check_order(self, config: ModelConfig, data: Any, task: str, mixers: Sequence[registry.Model]) -> None:
        """ConfigError for an order of reading that the task does not have; a note where a model cannot know any."""
        if config.scan.startswith("2d") and not (self.protocol.has_images and self.protocol.has_images(data)):
            raise ConfigError(f"scan={config.scan} needs images: {task} gives sequences, without height and width")
        sees_all = config.scan != "causal" and all(each.facts.get("family") == "softmax" for each in mixers)
        if sees_all and config.positions == "none" and not config.conv:
            self.notes.append(f"{self.model.name} with scan={config.scan} and positions=none cannot know the order of its tokens")

    def _command(self, values: Mapping[str, Any], axes: Mapping[str, tuple[Any, ...]], seed: int) -> str:
        """The words that give exactly this cell: the user's own and every swept value."""
        typed = [axis_name(word, self.model) for word in self.user]
        swept = [name for name, tried in axes.items() if len(tried) > 1]
        words = [f"suite={self.protocol.name}", f"preset={self.preset}"]
        words += [f"task={written(self.task)}", f"model={written(self.ref)}", *([] if self.model.trained else [f"seed={seed}"])]
        words += [f"{name}={written(values[name])}" for name in dict.fromkeys([*swept, *typed]) if name in values and name != "seed"]
        return shlex.join(["python", "-m", "hgrn2_bench", "run", *words, "--device", self.device])


def _without(values: Mapping[str, Any], idle: frozenset[str]) -> dict[str, Any]:
    """The values that have an effect; positions that have none are `none`, whatever the preset says."""
    kept = {key: value for key, value in values.items() if key not in idle}
    return kept | ({"positions": "none"} if "positions" in idle else {})


def versions(model: registry.Model, settings: Mapping[str, Any], first: str) -> str:
    """The version of a model and of its parts, with that of the mixer in its first layer where it has one of its own."""
    return " ".join([model.full_version(settings), *(f"{each.name}:{each.version}" for each in registry.first_layer(first))])


def swept(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """For each cell's key the settings in which cells of its task and model differ, under the names a user types; the seed left out."""
    found = {cell.key: cell.fields() for cell in cells}
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.task, cell.model), []).append(cell)
    differ = {
        place: [k for k, v in found[same[0].key].items() if any(found[cell.key][k] != v for cell in same)] for place, same in groups.items()
    }
    return {cell.key: {k: found[cell.key][k] for k in differ[cell.task, cell.model]} for cell in cells}


def _departures(section: Any) -> dict[str, Any]:
    """The fields of a section that differ from their defaults."""
    return {f.name: value for f in dataclasses.fields(section) if (value := getattr(section, f.name)) != f.default}


def _own(schema: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are fields of `schema`."""
    names = {f.name for f in dataclasses.fields(schema)}
    return {k: v for k, v in values.items() if k in names}
