"""Where every cell of a results folder stands."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tabulate import tabulate

from hgrn2_bench.cells import is_locked, read_json
from hgrn2_bench.errors import ConfigError

STATE_FILES = ("config.json", "status.json", "metrics.jsonl")


def status_lines(results: Path) -> Iterator[str]:
    """A table of outcomes, then a line for each cell that runs or was interrupted. ConfigError where there is no such folder."""
    if not results.is_dir():
        raise ConfigError(f"no results folder {results}")
    counts: dict[tuple[str, ...], Counter[str]] = {}
    running: list[str] = []
    for path in sorted(results.glob("cells/*/*/")):
        config, state = read_json(path / "config.json"), read_json(path / "status.json")
        if not {"suite", "preset", "task", "model", "seed"} <= set(config) or path.name != path.name.split(".")[0]:
            print(f"note: {path} is no cell (damaged, set aside or foreign): left out", file=sys.stderr)
            continue
        outcome = state.get("outcome", "not started")
        if outcome in ("running", "interrupted"):
            outcome = "running" if is_locked(path) else "interrupted"
            age = time.time() - max(file.stat().st_mtime for name in STATE_FILES if (file := path / name).exists())
            running.append(
                f"{outcome}: {config['model']} {config['task']} seed {config['seed']}, step {state.get('step', 0)} of "
                f"{state.get('steps', '?')} at the last checkpoint, last written {age:.0f} s ago"
            )
        key = tuple(str(config[k]) for k in ("suite", "preset", "task", "model"))
        counts.setdefault(key, Counter())[outcome] += 1
    lines = [[*key, ", ".join(f"{n} {word}" for word, n in sorted(count.items()))] for key, count in sorted(counts.items())]
    yield tabulate(lines, ["suite", "preset", "task", "model", "cells"], tablefmt="github") if lines else f"no cells in {results}"
    yield from running
