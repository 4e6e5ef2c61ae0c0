"""lm-eval's tasks as objects: the packaged prompt and metrics, with rows of the user's files where there are any, else its own download.

A task's file is written at run time and includes the packaged one; only the source of its rows is another. What cannot be local: members of
a group that a group itself defines, members that are classes of their own, and RULER, whose rows lm-eval draws with the model's tokenizer.
"""

import contextlib
import importlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hgrn2_bench.caching import locked
from hgrn2_bench.engine import SkippedError
from hgrn2_bench.errors import ConfigError, one_line
from hgrn2_bench.files import Copy, cache_folder, data_folder
from hgrn2_bench.hub import INSTALL
from suites.zeroshot import schemas
from suites.zeroshot.catalogue import TASKS, config_of, members, packaged, scored_split
from suites.zeroshot.network import no_code, reachable_only
from suites.zeroshot.places import copies, wanted
from suites.zeroshot.quiet import FEWSHOT_SEED, seeded, silent

READER = "suites.zeroshot.packaged.local_rows"
"""`local_rows`, as a task's file names it."""
PREFIX = "tasks-"
LEFT_S = 24 * 3600
"""Folders so old were left by processes that were killed."""
DEFAULT_LENGTH = 4096
"""RULER's own, in tokens."""
LEAST_LENGTH = 2048
"""What lm-eval repeats in each of RULER's texts takes 500 tokens and more: in short ones it looks for room without end."""


@dataclass(frozen=True)
class Request:
    """What is to be loaded, and how."""

    name: str
    """Of a task, a group, or a set of tasks by tag."""
    own: Path | None = None
    """Folder of task files written at run time: then the name is one of theirs, and nothing else is looked at."""
    fewshot: int = -1
    """Examples before each item; -1: the task's own number."""
    max_length: int = 0
    """Of what RULER draws, in tokens; 0: its own default."""


@dataclass
class Loaded:
    """Tasks ready to be run, and what was found out about them."""

    tasks: dict[str, Any] = field(default_factory=dict)
    """lm-eval's objects by name."""
    is_group: bool = False
    unavailable: dict[str, str] = field(default_factory=dict)
    """Members without data, and why."""
    sources: dict[str, str] = field(default_factory=dict)
    """Where the rows of each are from, in words."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Items of each, of which `limit` may take a part."""
    doubts: list[str] = field(default_factory=list)


def load(request: Request, lm: Any = None) -> Loaded:
    """The tasks of a name; `lm` gives the tokenizer where rows are drawn with it.

    SkippedError, naming the files it wants, where no task has data; ConfigError where a file is damaged or there are two copies.
    """
    need_lm_eval()
    with _scratch() as scratch, silent(), seeded(), no_code(), reachable_only():
        if request.own is not None:
            found = _given(request, scratch)
        elif names := members(request.name):
            found = _known(request, names, lm, scratch)
        else:
            found = _whole(request)
        lacking = {name: fault for name, task in found.tasks.items() if (fault := _set_fewshot(name, task, request.fewshot))}
        found.unavailable |= lacking
        found.tasks = {name: task for name, task in found.tasks.items() if name not in lacking}
        if not found.tasks:
            raise SkippedError(next(iter(lacking.values())))
        for name, task in found.tasks.items():
            found.sizes[name] = len(task.eval_docs)
            if doubt := schemas.check_size(name, found.sources[name], found.sizes[name]) if request.own is None else "":
                found.doubts.append(doubt)
    return found


def need_lm_eval() -> None:
    """SkippedError, with the line that installs it, where lm-eval cannot be imported."""
    try:
        importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise SkippedError(f"zero-shot tasks need lm-eval ({error}): {INSTALL}") from None


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in the cache that is gone afterwards."""
    parent = cache_folder("zeroshot")
    with locked(parent):
        for left in parent.glob(f"{PREFIX}*"):
            if time.time() - left.stat().st_mtime > LEFT_S:
                shutil.rmtree(left, ignore_errors=True)
        made = tempfile.TemporaryDirectory(dir=parent, prefix=PREFIX)
    with made as folder:
        yield Path(folder)


def _given(request: Request, scratch: Path) -> Loaded:
    """Tasks of the caller's folder. What datasets keeps of their files goes to the scratch folder: names there say nothing of content."""
    config: Any = importlib.import_module("datasets.config")
    kept, config.HF_DATASETS_CACHE = config.HF_DATASETS_CACHE, scratch / "datasets"
    try:
        loaded = _manager([request.own]).load([request.name])
        for task in loaded["tasks"].values():
            task.dataset = _in_memory(task.dataset)
    finally:
        config.HF_DATASETS_CACHE = kept
    return Loaded(loaded["tasks"], request.name not in loaded["tasks"], {}, dict.fromkeys(loaded["tasks"], "written for this run"))


def _in_memory(splits: Mapping[str, Any]) -> dict[str, Any]:
    """The same rows, free of the files that they were read from."""
    datasets: Any = importlib.import_module("datasets")
    return {name: datasets.Dataset.from_dict(rows.to_dict(), features=rows.features) for name, rows in splits.items()}


def _whole(request: Request) -> Loaded:
    """A group whose members only lm-eval can tell: it looks through all of its files, and downloads."""
    try:
        loaded = _manager([], include_defaults=True).load([request.name])
    except Exception as error:
        raise SkippedError(f"{request.name}: {_reason(error)}") from error
    return Loaded(loaded["tasks"], True, {}, dict.fromkeys(loaded["tasks"], "downloaded by lm-eval"))


def _known(request: Request, names: Sequence[str], lm: Any, scratch: Path) -> Loaded:
    """Tasks and groups that lm-eval has in files of their own."""
    root = data_folder()
    local = {name: found for name, found in copies(root, request.name).items() if len(names) == 1 or "class" not in config_of(name)}
    metadata = _metadata(names, request, lm, scratch)
    maker = _Maker(scratch / "files", request.name, local, metadata)
    unavailable: dict[str, str] = {}
    try:
        tasks = maker.load(names)
    except ConfigError:
        raise
    except Exception as error:  # which of them it was, one tells by loading each alone
        alone = len(names) == 1
        unavailable = {name: reason for name in names if (reason := _reason(error) if alone else maker.fault(name))}
        if wrong := [name for name in unavailable if name in local]:
            raise ConfigError(f"{wrong[0]}: lm-eval cannot read {local[wrong[0]]}: {unavailable[wrong[0]]}") from None
        left = [name for name in names if name not in unavailable]
        if not left:
            raise SkippedError(_missing(names, unavailable, root)) from None
        tasks = maker.load(left)
    sources = {name: f"local files, {local[name].layout}" if name in local else _source(name) for name in tasks}
    return Loaded(tasks, request.name not in tasks, unavailable, sources)


def _source(name: str) -> str:
    return "drawn by lm-eval" if name in TASKS and TASKS[name].is_generated else "downloaded by lm-eval"


def _missing(names: Sequence[str], unavailable: Mapping[str, str], root: Path) -> str:
    """Why nothing can be run, and what is wanted."""
    files = [wanted(name) for name in names if _source(name).startswith("down") and scored_split(name)]
    shown = f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}" if files else ""
    remedy = f"no data in {root}: wanted {shown}; " if files else ""
    return f"{names[0] if len(names) == 1 else 'no member has data'}: {remedy}lm-eval's own way failed: {unavailable[names[0]]}"


@dataclass(frozen=True)
class _Maker:
    """Writes files of tasks and lets lm-eval read them."""

    folder: Path
    name: str
    local: Mapping[str, Copy]
    metadata: Mapping[str, Any]

    def load(self, names: Sequence[str], alone: bool = False) -> dict[str, Any]:
        """The objects of some tasks, set as the group that was asked for sets its members, unless they are loaded `alone`."""
        if len(names) == 1 and names[0] in self.local and "class" in config_of(names[0]):
            return {names[0]: _local_class(names[0], self.local[names[0]])}
        folder = Path(tempfile.mkdtemp(dir=_made(self.folder)))
        for name in names:
            _write(folder, name, _local_keys(name, self.local[name]) if name in self.local else {})
        in_group = not alone and _is_group(self.name)
        if in_group:
            _write_groups(folder, self.name, frozenset(names))
        loaded: dict[str, Any] = _manager([folder], self.metadata).load([self.name] if in_group else list(names))["tasks"]
        return loaded

    def fault(self, name: str) -> str:
        """Why a task cannot be loaded; empty where it can."""
        try:
            self.load([name], alone=True)
        except ConfigError:
            raise
        except Exception as error:
            return _reason(error)
        return ""


def _is_group(name: str) -> bool:
    """Whether a file of lm-eval's is a group of this name."""
    return name in packaged().heads and packaged().heads[name].is_group


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _manager(folders: Sequence[Path | None], metadata: Mapping[str, Any] | None = None, include_defaults: bool = False) -> Any:
    tasks: Any = importlib.import_module("lm_eval.tasks")
    return tasks.TaskManager(include_path=[str(path) for path in folders], include_defaults=include_defaults, metadata=dict(metadata or {}))


def _write(folder: Path, name: str, keys: Mapping[str, Any]) -> None:
    """A file that includes the packaged one of a task or group; JSON is YAML."""
    lines = [f"include: {json.dumps(str(packaged().files[name]))}"]
    lines += [f"{key}: {value if key == 'custom_dataset' else json.dumps(value)}" for key, value in keys.items()]
    number = len(list(folder.iterdir()))
    (folder / f"{number}.yaml").write_text("\n".join(lines) + "\n")


def _write_groups(folder: Path, name: str, kept: frozenset[str]) -> None:
    """Files of a group and of the groups in it, with the members that are kept."""
    entries = config_of(name).get("task") or []
    listed = [entries] if isinstance(entries, str) else entries
    _write(folder, name, {"task": list(_kept(listed, kept))})
    for entry in listed:
        inner = entry if isinstance(entry, str) else entry.get("group", "")
        if _is_group(inner) and kept & set(members(inner)):
            _write_groups(folder, inner, kept)


def _kept(entries: Sequence[Any], kept: frozenset[str]) -> Iterator[Any]:
    """What a group lists, without what has no member that is kept."""
    for entry in entries:
        if not isinstance(entry, str) and not isinstance(entry.get("task", ""), str):
            inner = list(_kept(entry["task"], kept))
            yield from [{**entry, "task": inner}] if inner else []
        elif kept & set(members(entry if isinstance(entry, str) else entry.get("group") or entry["task"])):
            yield entry


def _local_keys(name: str, copy: Copy) -> dict[str, Any]:
    """What a task's own file says where its rows are in files: splits that are not there are no splits."""
    config = config_of(name)
    keys: dict[str, Any] = {"task": name, "dataset_path": "local", "dataset_name": None, "custom_dataset": f"!function {READER}"}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        split = config.get(key)
        keys[key] = split if split and copy.files.get(split) else None
    if keys["fewshot_split"] is None and "split" in (config.get("fewshot_config") or {}):
        keys["fewshot_config"] = None
    splits = [split for split in (keys[key] for key in ("training_split", "validation_split", "test_split", "fewshot_split")) if split]
    files = {split: [str(path) for path in paths] for split, paths in copy.files.items()}
    keys["dataset_kwargs"] = {"local": {"task": name, "splits": sorted(set(splits)), "folder": str(copy.folder), "files": files}}
    return keys


def local_rows(local: Mapping[str, Any], **_: Any) -> dict[str, Any]:
    """Splits of a task from the user's files, as lm-eval calls for them: `local` is what `_local_keys` wrote.

    They stay in memory, so that no cache can take one file for another. DataError where a row is not as the hub has it.
    """
    files = {split: tuple(map(Path, paths)) for split, paths in local["files"].items()}
    copy = Copy(local["task"], "", Path(local["folder"]), files)
    return {split: _rows(local["task"], copy, split) for split in local["splits"]}


def _rows(task: str, copy: Copy, split: str) -> Any:
    datasets: Any = importlib.import_module("datasets")
    arrow: Any = importlib.import_module("pyarrow")
    try:
        return datasets.Dataset.from_list(schemas.read(task, copy, split))
    except (arrow.ArrowInvalid, arrow.ArrowTypeError) as error:
        raise ConfigError(f"{copy.of(split)[0]}: rows differ in the type of a field ({str(error).splitlines()[0]})") from None


def _local_class(name: str, copy: Copy) -> Any:
    """A task that lm-eval packages as a class, with rows of files instead of its download."""
    loader: Any = importlib.import_module("lm_eval.tasks._yaml_loader")
    packaged_class: Any = loader.load_yaml(packaged().files[name])["class"]

    def download(self: Any, *_: Any, **__: Any) -> None:
        self.dataset = {scored_split(name): _rows(name, copy, scored_split(name))}

    task = type(packaged_class.__name__, (packaged_class,), {"download": download})()
    task.config.task = name
    return task


def _metadata(names: Sequence[str], request: Request, lm: Any, scratch: Path) -> dict[str, Any]:
    """What tasks that are drawn are told: a tokenizer, as a fresh folder (no code of a model's comes with it), and a length."""
    if not any(name in TASKS and TASKS[name].is_generated for name in names):
        return {}
    length = request.max_length or DEFAULT_LENGTH
    if length < LEAST_LENGTH:
        raise SkippedError(
            f"{request.name}: lm-eval draws RULER's texts of {LEAST_LENGTH:,} tokens and more, max_length={length} is too short"
        )
    tokenizer: Any = getattr(lm, "tokenizer", None)
    if not hasattr(tokenizer, "save_pretrained"):
        raise SkippedError(f"{request.name} is drawn with the model's tokenizer, and this model has none that can be saved")
    tokenizer.save_pretrained(scratch / "tokenizer")
    return {"tokenizer": str(scratch / "tokenizer"), "max_seq_lengths": [length]}


def _set_fewshot(name: str, task: Any, asked: int) -> str:
    """Give a task its number of examples by lm-eval's rule: one that is fixed at 0 stays so; what is missing for them, in words."""
    own = task.get_config("num_fewshot")
    shots = own or 0 if asked < 0 or own == 0 else asked
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    if not shots or task.get_config("dataset_path") != "local":
        return ""
    split = config_of(name).get("fewshot_split") or config_of(name).get("training_split")
    if not split or split in task.dataset:
        return ""
    return f"{name}: its {shots} examples are drawn from its {split} split, which is not here: wanted {wanted(name, split)}"


def _reason(error: Exception) -> str:
    """One line of what lm-eval or datasets said."""
    text = one_line(error) or type(error).__name__
    return f"{type(error).__name__}: {text}"[:200]
