"""A cell's folder: config, status, curve, checkpoint, rows, and its lock beside it.

`<results>/cells/<suite>/<key>/` holds config.json, status.json, metrics.jsonl, checkpoint.pt, rows.jsonl and error.txt, where its suite
saves trained models also the folder model/, and while a model is asked item by item the folder scores/; the lock is the file `<key>.lock`.
The curve is appended to, and cut back to the checkpoint on resume; every other file is replaced whole, so that a kill leaves the old one or
the new one.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.plan import Cell
from hgrn2_bench.results import Row, read_rows

FINAL = ("ok", "skipped", "diverged")
"""Outcomes that a rerun keeps; failed, oom and timeout are tried again, from their checkpoint where they have one."""


SCORES = "scores"
"""Folder of what is known of single items while a cell runs; whoever writes there names files by the weights that gave the scores."""


class LockedError(Exception):
    """Another run holds the cell."""


def replace_file(path: Path, content: str | bytes) -> None:
    """Write `content` beside `path`, flush it to disk, and rename it over `path`."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_results(results: Path) -> None:
    """ConfigError, one line, where a results folder cannot be made or written (read-only, full, a file in the way)."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        probe = results / f".probe{os.getpid()}"
        try:
            replace_file(probe, b"\0" * 65536)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"results folder {results}: {error.strerror or error}; nothing was run") from None


class CellFolder:
    """One cell's folder under a results folder. Reading needs no lock; writing does.

    With `writes` False, for all processes of a cell but the first, it only looks as if it wrote.
    """

    def __init__(self, results: Path, cell: Cell, writes: bool = True) -> None:
        self.cell, self.writes = cell, writes
        self.path = results / "cells" / cell.suite / cell.key
        self.curve = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint.pt"
        self.weights = self.path / "model"

    def rows(self) -> list[Row] | None:
        """The rows of a finished cell; None where it is unfinished, or where anything in it is damaged.

        ConfigError where a newer program wrote them: they are neither damaged nor readable.
        """
        if self.status().get("outcome") not in FINAL:
            return None
        rows, problems = read_rows(self.path / "rows.jsonl")
        if newer := [text for text in problems if "is newer than this program" in text]:
            raise ConfigError(newer[0])
        return rows if rows and not problems and all(row.cell == self.cell.key for row in rows) else None

    def status(self) -> dict[str, Any]:
        """The content of status.json; empty where there is none that can be read."""
        return read_json(self.path / "status.json")

    def damage(self) -> str:
        """What is wrong with an existing folder, in words; empty for a new or healthy one."""
        if not self.path.exists():
            return ""
        if not self._same_key():
            return "config.json is missing, damaged or of another cell"
        if self.status().get("outcome") in FINAL and self.rows() is None:
            return "rows.jsonl is damaged"
        return ""

    def _same_key(self) -> bool:
        """Whether config.json describes this cell, whatever path or command it was reached by."""
        try:
            return Cell.from_json(read_json(self.path / "config.json")).key == self.cell.key
        except (KeyError, TypeError, ValueError):
            return False

    @contextlib.contextmanager
    def lock(self) -> Iterator[str]:
        """Hold the cell for writing, making its folder if needed; yields a remark where a damaged folder was set aside.

        The kernel releases the lock when its holder dies. Raises LockedError where another run holds it.
        """
        remark = ""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with (self.path.parent / f"{self.path.name}.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LockedError(self.cell.key) from None
            if fault := self.damage():
                aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
                self.path.rename(aside)
                remark = f"cell {self.cell.key}: {fault}; set aside as {aside.name}, running the cell again"
            if not self.path.exists():
                temporary = self.path.with_name(f"{self.path.name}.tmp{os.getpid()}")
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                replace_file(temporary / "config.json", json.dumps(self.cell.to_json(), indent=1))
                temporary.rename(self.path)
            for leftover in self.path.glob("*.tmp*"):  # of a killed writer
                leftover.unlink()
            yield remark

    def start_over(self) -> None:
        """Forget results, curve, checkpoint, trained weights and scores of items."""
        for name in ("status.json", "rows.jsonl", "metrics.jsonl", "checkpoint.pt", "error.txt"):
            self._remove(name)
        if self.writes:
            for folder in (self.weights, self.path / SCORES):
                shutil.rmtree(folder, ignore_errors=True)

    def begin(self) -> None:
        """Mark the cell as running; what an earlier try reached stays noted."""
        self._remove("error.txt")
        self.set_status("running")

    def write(self, name: str, content: str | bytes) -> None:
        """Replace one file of the folder, whole."""
        if self.writes:
            replace_file(self.path / name, content)

    def _remove(self, name: str) -> None:
        if self.writes:
            (self.path / name).unlink(missing_ok=True)

    def add_to_curve(self, record: dict[str, Any]) -> None:
        """Append one line to the curve."""
        if self.writes:
            with self.curve.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def cut_curve(self, size: int) -> None:
        """Leave the first `size` bytes of the curve."""
        if self.writes and self.curve.exists():
            with self.curve.open("r+b") as file:
                file.truncate(size)

    def set_status(self, outcome: str, **facts: Any) -> None:
        """Record where the cell stands (`running`, `interrupted`, or its outcome), keeping the last checkpoint's step."""
        kept = {key: value for key, value in self.status().items() if key in ("step", "steps")}
        self.write("status.json", json.dumps({**kept, "outcome": outcome, **facts}))

    def finish(self, rows: list[Row]) -> None:
        """Write the rows, then the outcome; the checkpoint and the scores of a finished cell are no longer needed."""
        self.write("rows.jsonl", "".join(row.to_json() + "\n" for row in rows))
        self.set_status(rows[0].status, reason=rows[0].reason)
        if rows[0].status in FINAL:
            self._remove(self.checkpoint.name)
            if self.writes:
                shutil.rmtree(self.path / SCORES, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where the file is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_locked(path: Path) -> bool:
    """Whether a run holds the cell folder at `path` right now."""
    try:
        with path.with_name(f"{path.name}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
