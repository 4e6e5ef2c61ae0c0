"""A cache of generated data: made in shards by several processes, kept in a folder named after everything that decides the data.

`<folder>/<name>-<hash of the key>/` holds key.json, one file `<first item>-<end>.npz` for each shard, and a lock file, in which whoever
makes a shard holds that range of bytes. A shard is written under another name, flushed and renamed, so that a kill leaves whole shards
only; the next call makes the rest. A file ends with a checksum of its content and of where it belongs; one that fails it is made again,
with a warning.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hgrn2_bench.cells import replace_file

Arrays = Mapping[str, np.ndarray]

CHECKSUM_BYTES = 32
WAIT_S = 0.2
"""Time between two looks at shards that another process is making."""


@dataclass(frozen=True)
class Source:
    """Where items come from."""

    name: str
    """First part of the folder's name."""
    key: Mapping[str, object]
    """Everything that decides the items: each parameter, the seed, the generator's version. Values as JSON has them."""
    make: Callable[[range], Arrays]
    """Arrays of the items of a range. Item i depends on i and the key only; the arrays of two ranges, one after the other along axis 0,
    are those of the joined range. Called in other processes: a function of a module, or a `functools.partial` of one."""
    shard: int
    """Items in a file. One shard at a time is in the memory of each process, three times: arrays, compressed, and on its way."""

    def folder(self, parent: Path) -> Path:
        """The folder of the key's shards under `parent`."""
        return parent / f"{self.name}-{hashlib.sha256(self._text.encode()).hexdigest()[:16]}"

    @property
    def _text(self) -> str:
        return json.dumps(self.key, sort_keys=True)


def generate(
    parent: Path, source: Source, items: range, workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> dict[str, np.ndarray]:
    """The arrays of consecutive items, read from the cache under `parent`; what is missing there is made by `workers` processes.

    Memory: the result and one shard for each process. `progress` gets the number of items that are there, and of all. Processes that share
    a folder share the work: each makes shards that no other is making. A daemonic process, which may have no children, makes its shards
    itself. Children are started with `spawn`: a script that asks for several needs its `if __name__ == "__main__"`. OSError passes through,
    naming the path (a full disk, a folder that cannot be written), and leaves nothing half-written.
    """
    folder = source.folder(parent)
    shards = [items[i : i + source.shard] for i in range(0, len(items), source.shard)]
    if missing := [shard for shard in shards if not path_of(folder, shard).exists()]:
        folder.mkdir(parents=True, exist_ok=True)
        _put(folder / "key.json", json.dumps(dict(source.key), sort_keys=True, indent=1).encode())
        left = sum(map(len, missing))
        for made in _make_all(folder, source, missing, workers):
            left -= len(made)
            if progress:
                progress(len(items) - left, len(items))
    return _join(folder, source, shards)


def path_of(folder: Path, shard: range) -> Path:
    """The file of a shard."""
    return folder / f"{shard.start:09d}-{shard.stop:09d}.npz"


def _make_all(folder: Path, source: Source, shards: list[range], workers: int) -> Iterator[range]:
    """Yields each shard when its file is there, whoever made it."""
    workers = 1 if multiprocessing.current_process().daemon else min(workers, len(shards))
    with _pool(workers) as pool:
        while shards:
            if pool:
                futures = {pool.submit(_make, folder, source, shard): shard for shard in shards}
                outcomes = ((futures[future], future.result()) for future in as_completed(futures))
            else:
                outcomes = ((shard, _make(folder, source, shard)) for shard in shards)
            busy = []
            for shard, there in outcomes:
                if there:
                    yield shard
                else:
                    busy.append(shard)
            if busy:
                time.sleep(WAIT_S)
            shards = busy


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """A pool of processes, which on leaving finish only what they have begun; None for a single worker."""
    if workers <= 1:
        yield None
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """In a process of the pool: leave Ctrl-C to the parent, and die with it, where a pool's process would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make(folder: Path, source: Source, shard: range) -> bool:
    """Make one shard and put its file in place; False where another process is about it."""
    path = path_of(folder, shard)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, len(shard), shard.start)  # the kernel frees it when its holder dies
        except (BlockingIOError, PermissionError):  # the two answers that POSIX allows
            return False
        if _read(folder, shard) is not None:
            return True
        for leftover in folder.glob(f"{path.name}.tmp*"):  # of a killed writer
            leftover.unlink()
        buffer, arrays = io.BytesIO(), dict(source.make(shard))
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # mypy takes the names for its switch
        content = buffer.getvalue()
        _put(path, content + _checksum(folder, shard, content))  # zip readers pass over what follows an archive
    return True


def _put(path: Path, content: bytes) -> None:
    """Write a whole file or none."""
    try:
        replace_file(path, content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _read(folder: Path, shard: range) -> dict[str, np.ndarray] | None:
    """The arrays of a shard; None where its file is missing or damaged."""
    try:
        content = path_of(folder, shard).read_bytes()
    except FileNotFoundError:
        return None
    content, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    if checksum != _checksum(folder, shard, content):
        return None
    with np.load(io.BytesIO(content)) as file:
        return dict(file)


def _checksum(folder: Path, shard: range, content: bytes) -> bytes:
    """SHA-256 over which shard of which key it is, and its file's content."""
    return hashlib.sha256(f"{folder.name} {shard.start} {shard.stop} ".encode() + content).digest()


def _join(folder: Path, source: Source, shards: list[range]) -> dict[str, np.ndarray]:
    """All shards' arrays, one after another along axis 0."""
    joined: dict[str, np.ndarray] = {}
    for shard in shards:
        for name, piece in _sound(folder, source, shard).items():
            whole = joined.setdefault(name, np.empty((0, *piece.shape[1:]), piece.dtype))
            start = len(whole)
            whole.resize((start + len(piece), *piece.shape[1:]), refcheck=False)  # in place: concatenating would hold everything twice
            whole[start:] = piece
    return joined


def _sound(folder: Path, source: Source, shard: range) -> dict[str, np.ndarray]:
    """The arrays of a shard whose file was there; made again where it is damaged."""
    arrays = _read(folder, shard)
    if arrays is None:
        warnings.warn(f"{path_of(folder, shard)} is damaged; it is made again", stacklevel=4)
        while not _make(folder, source, shard):
            time.sleep(WAIT_S)
        arrays = _read(folder, shard)
    if arrays is None:
        raise OSError(f"{path_of(folder, shard)} is damaged again: the disk does not give back what was written")
    return arrays
