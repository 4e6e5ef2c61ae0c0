"""Results of finished requests in a file that only grows: what was scored before a kill is not scored again.

Each line holds the results of one pass, {key: result}. A line that was cut short by a kill counts as not written, and is removed.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hgrn2_bench.errors import ConfigError

SYNC_EVERY_S = 5.0
"""A crash of the machine, not only of the process, costs at most this much work."""


class Store:
    """Results by key; without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        """ConfigError where the file cannot be read or written."""
        self.found: dict[str, Any] = {}
        self._path, self._synced = path, time.monotonic()
        if path is not None:
            try:
                self._read(path)
            except OSError as error:
                raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from None

    def _read(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        whole = 0
        with path.open("rb") as file:
            for line in file:
                try:
                    content = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    content = None
                if not isinstance(content, dict):
                    break
                self.found |= content
                whole += len(line)
        os.truncate(path, whole)

    def add(self, results: Mapping[str, Any]) -> None:
        """Keep the results of a pass."""
        if self._path is not None:
            self.found |= results
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(results) + "\n")
                if time.monotonic() - self._synced > SYNC_EVERY_S:
                    file.flush()
                    os.fsync(file.fileno())
                    self._synced = time.monotonic()


def key_of(*parts: Any) -> str:
    """32 hex digits over what decides a result."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
