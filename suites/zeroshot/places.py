"""Which files of a folder hold a task's splits, whatever they are called. Reads names, and all bytes for the fingerprint."""

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from hgrn2_bench.errors import DataError
from hgrn2_bench.files import Copy, data_folder, only_copy, searched
from suites.zeroshot.catalogue import TASKS, config_of, members, scored_split
from suites.zeroshot.schemas import FIELDS, LABELS

SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "test": "test"}
"""What files call a split."""
LAYOUTS = {"jsonl": "json lines", "jsonl.gz": "json lines, gzipped", "json": "json", "parquet": "parquet"}
NAME = re.compile(
    rf"(?:(?P<task>.+)[-_.])?(?P<split>{'|'.join(SPLITS)})(?P<number>[-_.]?\d[\w-]*)?\.(?P<ending>{'|'.join(map(re.escape, LAYOUTS))})",
    re.IGNORECASE,
)
"""`piqa_validation.jsonl`, `validation-00000-of-00001.parquet`."""
BETWEEN = {"data", "default", "main", "plain_text", "wikitext_2_raw_v1"}
"""Folders of the hub between a task's folder and its files."""
CLOSED = {"imgs", "metadata", "pos", "neg", "unsup", "train", "val", "validation", "test"}
"""Folders of items, which are many: never searched."""
APART = "-labels.lst"
"""End of the name of such a file: piqa's own release has one answer a line."""


def plain(name: str) -> str:
    """A name as they are compared: small, with `_` for `-` and `.`."""
    return re.sub(r"[-.]", "_", name.lower())


def copies(root: Path, name: str) -> dict[str, Copy]:
    """The copy of a task's scored split below a folder, or of each member of a group, where there is one. ConfigError for several."""
    located = locate(root) if root.is_dir() else []
    return {task: found for task in members(name) if (found := pick(located, root, task))} if located else {}


def pick(there: Sequence[Copy], root: Path, task: str) -> Copy | None:
    """The one of some copies that has a task's scored split; None where none has. ConfigError where several have."""
    fitting = [copy for copy in there if copy.files.get(scored_split(task)) and is_of(copy, task)]
    return only_copy(fitting, root, task, wanted(task)) if fitting else None


def is_of(copy: Copy, task: str) -> bool:
    """Whether files have a task's name, or lie in folders named as the hub names its data set."""
    known = TASKS.get(task)
    if known:
        return not known.is_generated and copy.what in (plain(task), *known.folders)
    config = config_of(task)
    dataset, part = plain(str(config.get("dataset_path")).rpartition("/")[2]), plain(str(config.get("dataset_name")))
    return copy.what == plain(task) or (copy.what, plain(copy.folder.parent.name)) == (part, dataset)


def locate(root: Path) -> list[Copy]:
    """All sets of files named as splits in a folder or four below it; `what` is the plain name of the task that they may be of."""
    return [copy for folder, files in searched(root.resolve(), CLOSED) for copy in _sets(folder, files)]


def _sets(folder: Path, files: Sequence[Path]) -> Iterator[Copy]:
    """Sets of a folder's files: numbered parts of a split are one, any other second file of a split is another copy."""
    found: dict[tuple[str, str], list[dict[str, list[Path]]]] = {}
    for path in files:
        if match := NAME.fullmatch(path.name):
            sets = found.setdefault((plain(match["task"] or _folder_name(folder)), match["ending"].lower()), [])
            _put(path, SPLITS[match["split"].lower()], sets, is_part=bool(match["number"]))
    for (task, ending), sets in found.items():
        for splits in sets:
            apart = {f"{split}_{LABELS}": _apart(paths[0]) for split, paths in splits.items()}
            whole = {split: tuple(paths) for split, paths in splits.items()} | {key: (it,) for key, it in apart.items() if it.is_file()}
            yield Copy(task, LAYOUTS[ending], folder, whole)


def _put(path: Path, split: str, sets: list[dict[str, list[Path]]], is_part: bool) -> None:
    """Into the first set that has none of this split yet, or the other parts of it."""
    for files in sets:
        there = files.setdefault(split, [])
        if not there or (is_part and (match := NAME.fullmatch(there[-1].name)) and match["number"]):
            there.append(path)
            return
    sets.append({split: [path]})


def _apart(path: Path) -> Path:
    """Where the answers of a file may stand apart."""
    return path.with_name(path.name.partition(".")[0] + APART)


def _folder_name(folder: Path) -> str:
    """Of a folder, or of the one above where it only says which configuration of a data set it holds."""
    return _folder_name(folder.parent) if plain(folder.name) in BETWEEN else folder.name


def wanted(task: str, split: str = "") -> str:
    """The files of a task's scored split, or of another, in words."""
    split = split or scored_split(task)
    fields = f" ({', '.join(FIELDS[task])})" if task in FIELDS else ""
    return f"{task}_{split}.jsonl{fields}, or {task}/{split}-*.parquet"


def content_hash(files: Copy) -> str:
    """16 hex digits over all bytes of the files of each split, in order; free of where they lie and what they are called.

    DataError where one cannot be read.
    """
    digest = hashlib.sha256()
    for split in sorted(files.files):
        for path in files.files[split]:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror})") from None
            digest.update(f"{split} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def fingerprint_of(name: str) -> str:
    """What tells the local files of a task or group from any others; empty where it has none, and lm-eval would download.

    ConfigError where one has more than one copy.
    """
    return _fingerprint(name, data_folder().absolute())


@functools.cache
def _fingerprint(name: str, root: Path) -> str:
    each = [f"{task}:{content_hash(found)}" for task, found in copies(root, name).items()]
    return hashlib.sha256(" ".join(each).encode()).hexdigest()[:16] if each else ""
