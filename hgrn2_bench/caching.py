"""Folders of the cache: named after what decides their content, written by one process at a time. Imports neither torch nor numpy."""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.files import CACHE


def folder_of(parent: Path, name: str, key: Mapping[str, object]) -> Path:
    """The folder of a key's files; `key` holds everything that decides them, as JSON."""
    return parent / f"{name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made if needed, for writing; waits for another process that holds it. The kernel frees it when its holder dies."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A write that fails (a full disk, a folder that cannot be written) becomes one line with the remedy."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; make room, or set {CACHE} to a folder elsewhere") from None
