"""`data zeroshot check [DIR]`: what a folder holds of each known task, whether it is whole, and the remedy. Changes nothing."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from hgrn2_bench.doctor import NOTE, OK, PROBLEM, Finding, counted
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.files import Copy
from suites.zeroshot import schemas
from suites.zeroshot.catalogue import RULER, TASKS, packaged
from suites.zeroshot.places import SPLITS, content_hash, is_of, locate, pick, plain, wanted

COPY_AGAIN = "copy it again from its source"
READABLE = tuple(name for name, known in TASKS.items() if not known.is_generated)


def findings(root: Path) -> Iterator[Finding]:
    """A line for each known task and for files of others of lm-eval's. ConfigError where there is no file of any task."""
    there = locate(root)
    others = list(_others(there))
    if not others and not any(is_of(copy, name) for copy in there for name in READABLE):
        raise ConfigError(f"no task's files in {root}: expected files such as {wanted('piqa')}")
    for name in READABLE:
        yield from _task(name, there, root)
    yield from others
    yield Finding(
        NOTE,
        f"{', '.join(RULER[:2])} and the rest of RULER need no files",
        "they are drawn with the model's own tokenizer (pip install wonderwords nltk)",
    )


def _task(name: str, there: Sequence[Copy], root: Path) -> Iterator[Finding]:
    """What is there of one task."""
    try:
        found = pick(there, root, name)
    except ConfigError as error:
        yield Finding(PROBLEM, f"{name}: {error}")
        return
    if found is None:
        parts = [copy for copy in there if is_of(copy, name)]
        text = f"{name}: {parts[0]} has only {', '.join(sorted(parts[0].files))}" if parts else f"{name}: not here"
        yield Finding(NOTE, text, f"wanted {wanted(name)}")
        return
    for split in (split for split in dict.fromkeys(SPLITS.values()) if found.files.get(split)):
        yield _split(name, found, split)


def _split(name: str, found: Copy, split: str) -> Finding:
    """Whether a split can be read; the scored one also whether it is whole."""
    is_scored = split == TASKS[name].split
    try:
        items = len(schemas.read(name, found, split))
        doubt = schemas.check_size(name, str(found), items) if is_scored else ""
    except ConfigError as error:
        return Finding(PROBLEM, f"{name} {split}: {error}")
    if doubt:
        return Finding(NOTE, f"{name} {split}: {doubt}", "see that the file is whole")
    known = ", as expected" if is_scored and TASKS[name].size else ""
    use = f"hash {content_hash(found)}" if is_scored else "examples for fewshot="
    return Finding(OK, f"{name} {split}: {counted(items, 'item')}{known} ({found}), {use}")


def _others(there: Sequence[Copy]) -> Iterator[Finding]:
    """Files with the names of tasks that only lm-eval knows; none where it is not installed."""
    try:
        known = {plain(name): name for name in packaged().files}
    except ConfigError:
        return
    for copy in there:
        name = known.get(copy.what, "")
        if name and name not in TASKS:
            yield Finding(OK, f"{name}: {', '.join(sorted(copy.files))} ({copy}); its fields are not known here and are not checked")
