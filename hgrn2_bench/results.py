"""One metric per JSON line: the row, its schema, its reader. Imports none of our modules, and neither torch nor pandas at the top."""

import dataclasses
import json
import lzma
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

SCHEMA_VERSION = 3
OUTCOMES = ("ok", "failed", "skipped", "oom", "diverged", "timeout")


@dataclass(frozen=True)
class Row:
    """One metric of one cell, with everything needed to compare and to repeat it. Times in seconds, sizes in bytes."""

    suite: str
    protocol_version: int
    preset: str
    task: str
    model: str
    settings: Mapping[str, Any]
    """Every setting of the cell under the name a user types."""
    effective: Mapping[str, Any]
    """What was really built."""
    seed: int
    split: str
    metric: str
    value: float | None
    """None where the cell has no value: see `status`."""
    unit: str
    higher_is_better: bool
    num_items: int
    floors: Mapping[str, float]
    """Trivial baselines of the task for this metric: a model that does not beat them has not learned."""
    parameters: int | None
    non_embedding_parameters: int | None
    state_bytes: int | None
    """What decoding holds for one sequence after the task's length, over all layers."""
    train_flops_per_token: float | None
    steps: int
    tokens: int
    wall_s: float
    compile_s: float
    step_s: float | None
    """Median seconds of one training step."""
    tokens_per_s: float | None
    """Median over windows of training steps."""
    peak_bytes: int | None
    """Peak of torch's allocator on a GPU; None on a CPU, where a process that serves many cells cannot tell its own from theirs."""
    device: str
    """Device type: cpu or cuda."""
    device_name: str
    threads: int
    workers: int
    """Cells that ran at once on the machine: speed is measured beside `workers` - 1 others."""
    processes: int
    """That worked on the cell together when it ended."""
    backend: str
    dtype: str
    versions: Mapping[str, str]
    data_hash: str
    truncated: int
    skipped: int
    weights_hash: str
    commit: str
    dirty: bool
    status: str
    reason: str
    command: str
    cell: str
    """The cell's key."""
    time: str
    """UTC, when the cell ended."""
    mixer_version: str = ""
    """The model's own version, or the hash of a user's file: other code under the same name."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Of a timed cell: how the number came about; of a trained one, whether its number of processes changed. Since schema 2."""
    card: Mapping[str, str] = field(default_factory=dict)
    """How the metric is defined, in words: rows of different cards never share a table. Since schema 3."""
    schema_version: int = SCHEMA_VERSION

    VOLATILE = ("wall_s", "compile_s", "step_s", "tokens_per_s", "peak_bytes", "device_name", "workers", "time", "details")
    """Fields that differ between two runs of one cell: times, memory and host."""

    def to_json(self) -> str:
        """One line, keys in a fixed order; NaN is not JSON and never written."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)


_REQUIRED = tuple(f.name for f in dataclasses.fields(Row) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)


_NUMBER = (int, float, type(None))
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("settings", "effective", "floors", "versions", "details", "card"), dict),
    **dict.fromkeys(
        ("suite", "preset", "task", "model", "split", "metric", "unit", "status", "reason", "cell", "time", "device_name"), str
    ),
    **dict.fromkeys(("seed", "protocol_version", "num_items", "steps", "tokens", "truncated", "skipped", "workers"), int),
    **dict.fromkeys(("value", "parameters", "state_bytes", "train_flops_per_token", "tokens_per_s", "step_s"), _NUMBER),
}


def parse_row(line: str) -> Row:
    """The row of one JSON line. ValueError saying what is wrong: not JSON, missing fields, a newer schema, an unknown outcome."""
    try:
        content = json.loads(line, parse_constant=_refuse)
    except json.JSONDecodeError:
        raise ValueError("not a complete JSON line (truncated?)") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    version = content.get("schema_version", 0)
    if not isinstance(version, int):
        raise ValueError(f"not a result row: schema version {version!r}")
    if version > SCHEMA_VERSION:
        raise ValueError(f"schema version {version} is newer than this program's {SCHEMA_VERSION}: update hgrn2_bench")
    missing = [name for name in _REQUIRED if name not in content]
    if missing:
        raise ValueError(f"not a result row: no field {', '.join(missing[:3])}")
    for name, kind in _KINDS.items():
        if name in content and not isinstance(content[name], kind):
            raise ValueError(f"not a result row: {name} is {content[name]!r}"[:120])
    if content["status"] not in OUTCOMES:
        raise ValueError(f"unknown status {content['status']!r}")
    known = {f.name for f in dataclasses.fields(Row)}
    return Row(**{k: v for k, v in content.items() if k in known})


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """Rows of one JSON-lines file, which may be xz-compressed, and one remark for every line that is not a row.

    A missing or unreadable file is a remark too.
    """
    try:
        with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
            text = file.read()
    except (OSError, UnicodeDecodeError, EOFError, lzma.LZMAError) as error:
        return [], [f"{path}: {getattr(error, 'strerror', None) or error}"]
    rows, problems = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(parse_row(line))
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}; line left out")
    return rows, problems


def find_rows(results: Path, suite: str) -> tuple[list[Row], list[str]]:
    """Every row of a suite in a results folder: those of its cells, and those of files under `rows/`; a row held twice counts once.

    Folders whose name has a dot are being written or were set aside as damaged: left out.
    """
    cells = (path for path in (results / "cells" / suite).glob("*/rows.jsonl") if "." not in path.parent.name)
    paths = sorted(cells) + _kept(results)
    found: dict[str, Row] = {}
    problems: list[str] = []
    for path in paths:
        rows, faults = read_rows(path)
        problems += faults
        found |= {row.to_json(): row for row in rows if row.suite == suite}
    return list(found.values()), problems


def _kept(results: Path) -> list[Path]:
    """The files of rows under `rows/` of a results folder."""
    return sorted(path for ending in ("jsonl", "jsonl.xz") for path in (results / "rows").glob(f"**/*.{ending}"))


def archived(results: Path, suite: str) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows kept under `rows/` of a results folder, by cell: the newest where a cell is there twice; and what could not be read."""
    found: dict[str, list[Row]] = {}
    problems: list[str] = []
    for path in _kept(results):
        rows, faults = read_rows(path)
        problems += faults
        for row in rows:
            if row.suite == suite:
                found.setdefault(row.cell, []).append(row)
    newest = {cell: [row for row in rows if row.time == max(r.time for r in rows)] for cell, rows in found.items()}
    return newest, problems


def frame(rows: Iterable[Row]) -> "pandas.DataFrame":
    """Rows as a pandas table, settings and effective values spread into columns `settings.d_model`, `effective.heads`, ..."""
    import pandas

    return pandas.json_normalize([dataclasses.asdict(row) for row in rows])
