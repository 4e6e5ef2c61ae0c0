"""Names of models and suites: found from file names and entry points, read as source text, imported only to run.

A model's key is its file name in `baselines/` (or `hgrn2`); a suite's is its folder name in `suites/`. A third party adds its own
through the entry-point groups `hgrn2_bench.baselines` (value `package.module`) and `hgrn2_bench.suites` (value `package`).
`./file.py:Class` names a model of the user's own, and a folder, or `org/name` on the Hugging Face hub, a trained language model, which is
evaluated as it is.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hgrn2_bench import foreign_config
from hgrn2_bench.errors import ConfigError, DataError, unknown
from hgrn2_bench.protocol import Protocol
from hgrn2_bench.trained import Card, Trained, unlike
from hgrn2_bench.trained import read as read_trained

if TYPE_CHECKING:
    from hgrn2_bench.interfaces import Mixer

ROOT = Path(__file__).parent.parent
FACTS = ("version", "family", "gated", "bounded", "rotary", "convolved", "backends", "state_setting", "parts")
"""Class facts that planning reads. `parts`, which most mixers lack, names the setting that lists the models a mixer is built of: their
versions belong to the cell's key, and what applies to one of them applies to the mixer."""
_TYPES: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}
_WORDS = "tuple[str, ...]"


@dataclass(frozen=True)
class Model:
    """A model as its source text describes it."""

    name: str
    """The registry key, or the class name of a file of the user's own."""
    module: str
    """Dotted module name, or the path of a user's file."""
    class_name: str
    summary: str
    settings: type
    """Frozen dataclass of its own settings."""
    facts: dict[str, Any]
    """Its literal ClassVars among FACTS."""
    is_mixer: bool = True
    """False for a plain nn.Module, which is wrapped."""
    trained: Trained | None = None
    """Of a folder: what was trained, which keeps its own configuration and settings."""

    @property
    def version(self) -> str:
        """What changes when the model's numbers may change: the declared version, or for a user's file the hash of its text."""
        if self.module.endswith(".py"):
            return hashlib.sha256(Path(self.module).read_bytes()).hexdigest()[:16]
        return str(self.facts.get("version", 1))

    @property
    def checkpoint(self) -> str:
        """Of a trained model the hash of its weights and config."""
        return self.trained.hash if self.trained else ""

    def parts(self, settings: Mapping[str, Any]) -> "tuple[Model, ...]":
        """The models that this one is built of under `settings`, each once; none for most. ConfigError as `listed` says."""
        name = self.facts.get("parts", "")
        return listed(settings[name], f"{self.name}.{name}") if name else ()

    def full_version(self, settings: Mapping[str, Any]) -> str:
        """The version, and those of all parts: `1 (hgrn2 1, attention 1)`."""
        parts = ", ".join(f"{part.name} {part.version}" for part in self.parts(settings))
        return f"{self.version} ({parts})" if parts else self.version


def check_packages() -> None:
    """Raise ConfigError where another project's `baselines` or `suites` hides ours: the three packages must lie side by side."""
    for package in ("baselines", "suites"):
        spec = importlib.util.find_spec(package)
        origin = spec.origin if spec else None
        if origin is None or Path(origin).resolve().parent.parent != ROOT.resolve():
            where = Path(__file__).parent
            raise ConfigError(f"package {package!r} is {origin or 'missing'}, not the one beside {where}: uninstall the intruder")


@functools.cache
def models() -> dict[str, Model]:
    """Every registered model by key. ConfigError for a key that two sources claim."""
    found: dict[str, Model] = {}
    for name, module, path in _model_files():
        if name in found:
            raise ConfigError(f"two models are called {name!r}: {found[name].module} and {module}; rename one")
        found[name] = read_model(path, name, module)
    return dict(sorted(found.items()))


def _model_files() -> Iterator[tuple[str, str, Path]]:
    yield "hgrn2", "hgrn2_bench.hgrn2", ROOT / "hgrn2_bench/hgrn2.py"
    for path in sorted((ROOT / "baselines").glob("[!_]*.py")):
        yield path.stem, f"baselines.{path.stem}", path
    for point in entry_points(group="hgrn2_bench.baselines"):
        try:
            spec = importlib.util.find_spec(point.value)
        except ImportError:  # its package is missing too
            spec = None
        if spec is None or spec.origin is None:
            raise ConfigError(f"entry point {point.name!r}: module {point.value!r} is missing")
        yield point.name, point.value, Path(spec.origin)


@functools.cache
def suites() -> dict[str, str]:
    """Every registered suite: key to package name."""
    found = {path.parent.name: f"suites.{path.parent.name}" for path in sorted((ROOT / "suites").glob("*/protocol.py"))}
    for point in entry_points(group="hgrn2_bench.suites"):
        if point.name in found:
            raise ConfigError(f"two suites are called {point.name!r}: {found[point.name]} and {point.value}; rename one")
        found[point.name] = point.value
    return found


def data_checks() -> dict[str, str]:
    """Every suite that reads data of the user's and can check them: key to the name of its module `check`."""
    found = {path.parent.name: f"suites.{path.parent.name}.check" for path in sorted((ROOT / "suites").glob("*/check.py"))}
    for point in entry_points(group="hgrn2_bench.suites"):
        with contextlib.suppress(ImportError):  # its package is missing
            if importlib.util.find_spec(f"{point.value}.check"):
                found[point.name] = f"{point.value}.check"
    return found


def suite_summary(name: str) -> str:
    """First docstring line of a suite's package, read without importing it."""
    spec = importlib.util.find_spec(suites()[name])
    return _summary(ast.parse(Path(spec.origin).read_text())) if spec and spec.origin else ""


def protocol(name: str) -> Protocol:
    """A suite's protocol; imports no torch. ConfigError with the nearest name for an unknown suite."""
    if name not in suites():
        raise unknown("suite", name, suites())
    module = f"{suites()[name]}.protocol"
    try:
        found = getattr(importlib.import_module(module), "PROTOCOL", None)
    except ImportError as error:
        raise ConfigError(f"suite {name!r}: cannot import {module}: {error}") from None
    if not isinstance(found, Protocol) or found.name != name:
        raise ConfigError(f"{module}: PROTOCOL must be a hgrn2_bench.protocol.Protocol named {name!r}")
    return found


def model(ref: str) -> Model:
    """A model by key, by `./file.py:Class`, or by the folder or the name on the hub of a trained one.

    ConfigError with the nearest name, or saying what is wrong with the file or folder.
    """
    if names_folder(ref):
        return _trained_model(ref)
    if ".py" in ref:
        return _user_model(ref)
    if ref not in models():
        raise unknown("model", ref, models())
    return models()[ref]


def names_folder(ref: str) -> bool:
    """Whether a model is named by a folder, or by a name on the hub; one that is not there is told by its slash."""
    return ref not in models() and (Path(ref).is_dir() or ("/" in ref and ".py" not in ref))


@functools.cache
def _trained_model(ref: str) -> Model:
    """The model of a folder, under a name of its own. DataError, one line, where the folder holds none that can be built here."""
    found = _from_hub(ref) if _names_hub(ref) else read_trained(Path(ref))
    if found.foreign:
        return _foreign_model(found)
    base = model(found.card.model)
    try:
        base.settings(**found.card.settings)
    except TypeError as error:
        raise unlike(found.folder, error) from None
    if found.mixer_version:
        check_version(found.folder, found.card, found.mixer_version)
    return dataclasses.replace(base, name=found.label, trained=found)


def _names_hub(ref: str) -> bool:
    """Whether a name is one on the hub, `org/name`: where a folder `org` lies here, a folder in that is meant."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", ref)) and not Path(ref).parent.exists()


def _from_hub(ref: str) -> Trained:
    """A model of the hub, whose weights, tokenizer and configuration are fetched unless they are here. ConfigError where they cannot be."""
    hub: Any = importlib.import_module("hgrn2_bench.hub")
    return dataclasses.replace(read_trained(hub.fetch(ref)), name=ref.rpartition("/")[2])


def _foreign_model(found: Trained) -> Model:
    """A trained model that is none of ours: its settings are what its configuration says of its size."""
    fields = [(name, type(value), dataclasses.field(default=value)) for name, value in found.card.settings.items()]
    settings = dataclasses.make_dataclass("Settings", fields, frozen=True)
    facts = {"version": "", "backends": (foreign_config.BACKEND,)}
    return Model(found.label, "transformers", "", f"{found.card.model} of {found.folder}", settings, facts, is_mixer=False, trained=found)


def version_of(ref: str, settings: Mapping[str, Any]) -> str:
    """The version of a model's code under some settings, with those of its parts."""
    found = model(ref)
    return found.full_version(dataclasses.asdict(found.settings()) | dict(settings))


def check_version(folder: Path, card: Card, saved: str) -> None:
    """DataError where a folder was saved with another version of its model's code than is here."""
    if (here := version_of(card.model, card.settings)) != saved:
        raise DataError(f"{folder}: saved with version {saved} of {card.model}, here it is {here}")


def listed(names: Sequence[str], setting: str) -> tuple[Model, ...]:
    """The registered models that a setting lists, each once, in the order first seen.

    ConfigError with the nearest name for an unknown one, for one that lists models itself, and for an empty list.
    """
    if not names:
        raise ConfigError(f"{setting}=[] names no model")
    single = {name: found for name, found in models().items() if "parts" not in found.facts}
    for name in names:
        if name in models() and name not in single:
            raise ConfigError(f"{setting}: {name!r} is itself built of other models; name those")
        if name not in single:
            raise unknown(f"model in {setting}", name, single)
    return tuple(single[name] for name in dict.fromkeys(names))


def first_layer(name: str) -> tuple[Model, ...]:
    """The model whose mixer takes layer 0; nothing for `none`. ConfigError for an unknown name, and for a model built of others."""
    if name not in ("none", *models()):
        raise unknown("first_layer", name, ["none", *models()])
    return () if name == "none" else listed((name,), "first_layer")


@functools.cache
def _user_model(ref: str) -> Model:
    path, _, class_name = ref.partition(":")
    if not class_name.isidentifier():
        raise ConfigError(f"model={ref}: name the class too, as in {path}:MyMixer")
    if not Path(path).is_file():
        raise ConfigError(f"model={ref}: no file {path}")
    if class_name in models():
        raise ConfigError(f"model={ref}: {class_name!r} is already a registered model; rename the class")
    return read_model(Path(path), class_name, path, class_name)


def read_model(path: Path, name: str, module: str, class_name: str | None = None) -> Model:
    """Read a model's class, settings and facts from its source text; ConfigError where the file does not hold one."""
    try:
        tree = ast.parse(path.read_text())
    except SyntaxError as error:
        raise ConfigError(f"model {name!r}: cannot read {path}, line {error.lineno}: {error.msg}") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"model {name!r}: cannot read {path}: {error}") from None
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    mixers = [c for c in classes if any(ast.unparse(b).split(".")[-1] == "Mixer" for b in c.bases)]
    if class_name is not None:
        chosen = [c for c in classes if c.name == class_name]
        if not classes:
            raise ConfigError(f"model={module}:{class_name}: {path} defines no class")
        if not chosen:
            raise unknown(f"class in {path}:", class_name, [c.name for c in classes])
    else:
        chosen = mixers
        if len(chosen) != 1:
            raise ConfigError(f"model {name!r}: {path} must define exactly one subclass of Mixer, not {len(chosen)}")
    node = chosen[0]
    is_mixer = node in mixers
    summary = _summary(tree) or (ast.get_docstring(node) or "").split("\n")[0]
    fields = list(_class_settings(node) if is_mixer else _init_settings(node))
    settings = dataclasses.make_dataclass(f"{node.name}Settings", fields, frozen=True)
    facts = _facts(node) if is_mixer else {"backends": ("module",)}
    if "parts" in facts and (facts["parts"], tuple) not in [(field[0], field[1]) for field in fields]:
        raise ConfigError(f"{node.name}: 'parts' must name a setting of type {_WORDS}, not {facts['parts']!r}")
    numbers = [field for field, kind, _ in fields if kind in (int, float, int | None, float | None)]
    if facts.get("state_setting") and facts["state_setting"] not in numbers:
        raise ConfigError(f"{node.name}: state_setting {facts['state_setting']!r} is none of its settings that are numbers")
    return Model(name, module, node.name, summary, settings, facts, is_mixer)


def _summary(tree: ast.Module) -> str:
    return (ast.get_docstring(tree) or "").split("\n")[0]


def _field(name: str, annotation: ast.expr, default: ast.expr, where: str) -> tuple[str, Any, Any]:
    """A dataclass field from an annotation and a literal default, both as source text."""
    text = ast.unparse(annotation)
    try:
        value = ast.literal_eval(default)
    except ValueError:
        raise ConfigError(f"{where}: the default of {name!r} must be a literal") from None
    plain = text.removesuffix("| None").strip()
    choices: tuple[Any, ...] = ()
    if plain.startswith(("Literal[", "typing.Literal[")):
        with contextlib.suppress(ValueError):  # a name among them: refused below
            choices = ast.literal_eval(plain[plain.index("[") + 1 : -1] + ",")
    kind = str if choices and all(isinstance(c, str) for c in choices) else tuple if text == _WORDS else _TYPES.get(plain)
    if kind is None:
        kinds = f"int, float, bool, str, Literal of words or one of them | None, or {_WORDS}"
        raise ConfigError(f"{where}: setting {name!r} must be {kinds}, not {text}")
    optional = plain != text
    if kind is float and type(value) is int:
        value = float(value)  # so that a default and the same value typed give one cell
    legal = value in choices if choices else type(value) is kind
    if kind is tuple and legal:
        legal = all(isinstance(word, str) for word in tuple(value))
    if not legal and not (optional and value is None):
        raise ConfigError(f"{where}: the default of {name!r} is {value!r}, not {text}")
    return name, (kind | None if optional else kind), dataclasses.field(default=value, metadata={"choices": choices})


def _class_settings(node: ast.ClassDef) -> Iterator[tuple[str, Any, Any]]:
    """Settings of a Mixer: its annotated class attributes with a literal default."""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and "ClassVar" not in ast.unparse(item.annotation):
            if item.value is None:
                raise ConfigError(f"{node.name}: setting {item.target.id!r} needs a default")
            yield _field(item.target.id, item.annotation, item.value, node.name)


def _init_settings(node: ast.ClassDef) -> Iterator[tuple[str, Any, Any]]:
    """Settings of a plain module: annotated `__init__` parameters with a default, after `d_model`."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            args = [*item.args.posonlyargs, *item.args.args][-len(item.args.defaults) :] if item.args.defaults else []
            pairs = [*zip(args, item.args.defaults, strict=True), *zip(item.args.kwonlyargs, item.args.kw_defaults, strict=True)]
            for arg, default in pairs:
                if arg.annotation is not None and default is not None and arg.arg != "d_model":
                    yield _field(arg.arg, arg.annotation, default, node.name)


def _facts(node: ast.ClassDef) -> dict[str, Any]:
    """Literal values of the class variables that planning needs; ConfigError for one that is not literal."""
    facts = {}
    for item in node.body:
        target = item.target if isinstance(item, ast.AnnAssign) else item.targets[0] if isinstance(item, ast.Assign) else None
        value = getattr(item, "value", None)
        if isinstance(target, ast.Name) and target.id in FACTS and value is not None:
            try:
                facts[target.id] = ast.literal_eval(value)
            except ValueError:
                raise ConfigError(f"{node.name}: {target.id!r} must be a literal, because it is read from the source text") from None
    return facts


def load(ref: str) -> "type[Mixer]":
    """Import a model's class; a plain nn.Module comes back wrapped as a Mixer that decodes by recomputing."""
    from hgrn2_bench import interfaces

    found = model(ref)
    module = _import_file(Path(found.module)) if found.module.endswith(".py") else importlib.import_module(found.module)
    cls = getattr(module, found.class_name)
    if not (isinstance(cls, type) and issubclass(cls, interfaces.Mixer)):
        return interfaces.recomputing(cls)
    if not found.is_mixer:
        raise ConfigError(f"model={ref}: {found.class_name} must name Mixer itself as its base, so that its settings can be read")
    return cls


def _import_file(path: Path) -> ModuleType:
    """Import a user's file under a name of its own, so that it hides no other module."""
    name = f"hgrn2_bench_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # or the next cell would find half a module
        raise
    return module
