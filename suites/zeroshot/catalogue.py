"""Which tasks there are: those known here, and any that lm-eval packages. Reads lm-eval's files; imports neither it nor torch."""

import difflib
import functools
import importlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from hgrn2_bench.errors import ConfigError, unknown
from hgrn2_bench.hub import INSTALL


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known here of one of lm-eval's tasks."""

    split: str
    """That is scored."""
    size: int = 0
    """Items of that split; 0: not known."""
    is_counted: bool = False
    """Whether the size was counted in real files; else it is the literature's."""
    rule: str = "acc"
    """The metric that is the task's score."""
    folders: tuple[str, ...] = ()
    """Further names of folders in which its files come."""
    is_generated: bool = False
    """Made by lm-eval with the model's own tokenizer: no file is read."""


RULER = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multiquery",
    "niah_multivalue",
    "ruler_vt",
    "ruler_cwe",
    "ruler_fwe",
    "ruler_qa_squad",
    "ruler_qa_hotpot",
)
"""Members of lm-eval's group `ruler` (arXiv 2404.06654)."""
TASKS: Mapping[str, Known] = {
    # the columns of the zero-shot table of arXiv 2404.07904; which accuracy each holds is inferred: length-normalised where usual
    "piqa": Known(split="validation", size=1838, is_counted=True, folders=("physicaliqa_train_dev",)),
    "hellaswag": Known(split="validation", size=10042, rule="acc_norm"),
    "winogrande": Known(split="validation", size=1267, folders=("winogrande_xl",)),
    "arc_easy": Known(split="test", size=2376),
    "arc_challenge": Known(split="test", size=1172, rule="acc_norm"),
    "openbookqa": Known(split="test", size=500, rule="acc_norm"),
    "lambada_openai": Known(split="test", size=5153, is_counted=True),
    "boolq": Known(split="validation", size=3270),
    "sciq": Known(split="test", size=1000),
    "wikitext": Known(split="test", rule="word_perplexity", folders=("wikitext_document_level",)),
    # recall on real text (arXiv 2402.18668), in lm-eval's own classes
    "fda": Known(split="validation", rule="contains", folders=("based_fda",)),
    "swde": Known(split="validation", rule="contains", folders=("based_swde_v2", "based_swde")),
    "squad_completion": Known(split="validation", rule="contains", folders=("based_squad",)),
    **{name: Known(split="test", rule="", is_generated=True) for name in RULER},
}
GROUPS: Mapping[str, tuple[str, ...]] = {"ruler": RULER}

HEAD = re.compile(rb"^[\"']?(task|group|tag|class|include)[\"']?[ \t]*:[ \t]*(.*(?:\n[ \t]*-[ \t].*)*)", re.MULTILINE)
"""A key of a YAML file that says what it is, at the start of a line, with its value."""
ITEM = re.compile(r"[^\s,\[\]\"'#-][^\s,\[\]\"'#]*")
"""A name in such a value."""


class Head(NamedTuple):
    """What a task's file says of itself, without its prompt."""

    name: str
    is_group: bool
    tags: tuple[str, ...] | None
    """None where the file says nothing of tags: then those of what it includes hold."""
    includes: tuple[str, ...]


class Packaged(NamedTuple):
    """What lm-eval packages."""

    files: Mapping[str, Path]
    """Of each task and group."""
    heads: Mapping[str, Head]
    tags: Mapping[str, tuple[str, ...]]
    """Tasks of each set with a name, which may stand for a task as well."""


def words_of(name: str) -> tuple[str, ...]:
    """The words of the task of a name: `("lm_task=piqa",)`.

    ConfigError with the nearest names where neither this catalogue nor lm-eval has it, and with the line that installs lm-eval where only
    that could tell.
    """
    if name not in TASKS and name not in GROUPS:
        found = packaged()
        if name not in found.files and name not in found.tags:
            near = difflib.get_close_matches(name.lower(), [*found.files, *found.tags], n=1, cutoff=0.5)
            raise unknown("zero-shot task", name, [*TASKS, *GROUPS, *near])  # not all 14,000
    return (f"lm_task={name}" if re.fullmatch(r"[\w.-]+", name) else f"lm_task='{name}'",)


def tasks_folder() -> Path:
    """Where lm-eval's tasks are. ConfigError, with the line that installs it, where there is no lm-eval."""
    found = find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"zero-shot tasks need lm-eval, which is not installed: {INSTALL}")
    return Path(found.submodule_search_locations[0]) / "tasks"


@functools.cache
def packaged() -> Packaged:
    """All that lm-eval packages, from the heads of its files. ConfigError where it is not installed."""
    files: dict[str, Path] = {}
    heads: dict[str, Head] = {}
    tags: dict[str, list[str]] = {}
    for path in _yaml_files(tasks_folder()):
        head = _head(path)
        if not head.name or head.name in files:  # of two with one name lm-eval takes the first too
            continue
        files[head.name], heads[head.name] = path, head
        for tag in () if head.is_group else _tags(path):
            tags.setdefault(tag, []).append(head.name)
    return Packaged(files, heads, {tag: tuple(sorted(names)) for tag, names in tags.items() if tag not in files})


def _yaml_files(folder: Path) -> Iterator[Path]:
    """In lm-eval's order."""
    found = [f"{parent}/{name}" for parent, _, names in os.walk(folder) for name in names if name.endswith(".yaml")]
    yield from map(Path, sorted(found))


@functools.cache
def _head(path: Path) -> Head:
    values = {match[1].decode(): match[2].decode() for match in HEAD.finditer(path.read_bytes())}
    names = {key: ITEM.findall(value) for key, value in values.items()}
    is_group = "group" in names and "class" not in names
    own = names.get("group" if is_group else "task", [])
    name = own[0] if len(own) == 1 else ""
    return Head(name, is_group, tuple(names["tag"]) if "tag" in names else None, tuple(names.get("include", ())))


def _tags(path: Path) -> tuple[str, ...]:
    """Tags of a file, or else of what it includes."""
    head = _head(path)
    if head.tags is not None:
        return head.tags
    there = [path.parent / include for include in head.includes]
    return tuple(tag for included in there if included.is_file() for tag in _tags(included))


def members(name: str) -> tuple[str, ...]:
    """The tasks that a name stands for: itself, or those of a group or tag, and of the groups in it, each once.

    None where a group itself says what a member of it is, instead of naming a file's task.
    """
    if name in TASKS:
        return (name,)
    if name in GROUPS:
        return GROUPS[name]
    try:
        return tuple(dict.fromkeys(_members(name)))
    except LookupError:
        return ()


def _members(name: str) -> Iterator[str]:
    found = packaged()
    if name in found.heads and not found.heads[name].is_group:
        yield name
    elif name in found.heads:
        yield from _listed(config_of(name).get("task") or ())
    elif name in found.tags:
        yield from found.tags[name]
    else:
        raise LookupError(name)


def _listed(entries: Sequence[Any] | str) -> Iterator[str]:
    """Tasks that a group lists: by name, with changes, or in a group of their own."""
    for entry in [entries] if isinstance(entries, str) else entries:
        if isinstance(entry, str):
            yield from _members(entry)
        elif "task" in entry and not isinstance(entry["task"], str):
            yield from _listed(entry["task"])
        else:
            yield from _members(entry.get("group") or entry["task"])


@functools.cache
def config_of(name: str) -> Mapping[str, Any]:
    """What the packaged file of a task or group says, with what it includes; functions are left out as None."""
    return _parsed(packaged().files[name])


def _parsed(path: Path) -> dict[str, Any]:
    yaml: Any = importlib.import_module("yaml")

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """Knows lm-eval's `!function`, and calls none."""

    yaml.add_constructor("!function", lambda loader, node: None, Loader=Loader)
    own = yaml.load(path.read_bytes(), Loader=Loader)
    included = own.pop("include", None) or []
    merged: dict[str, Any] = {}
    for each in [included] if isinstance(included, str) else included:
        merged |= _parsed(path.parent / each)
    return merged | own


def scored_split(name: str) -> str:
    """The split of a task that lm-eval scores; empty where its file does not say."""
    if name in TASKS:
        return TASKS[name].split
    config = config_of(name)
    return config.get("test_split") or config.get("validation_split") or ""
