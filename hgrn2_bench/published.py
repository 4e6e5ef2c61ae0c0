"""Published values beside our own: a verdict for each, never "reproduced" from one run. Reads `published.csv` of this package.

Its columns: suite, table, task, metric, higher_is_better, model, params_m, layers, value, unit, source, note.
"""

import csv
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hgrn2_bench import registry
from hgrn2_bench.lines import Line, Run, best_lines, comparable
from hgrn2_bench.plan import make_plan
from hgrn2_bench.protocol import Protocol
from hgrn2_bench.render import short
from hgrn2_bench.results import Row
from hgrn2_bench.tables import half_interval

TOLERANCE = 0.01
"""Reading error of a value taken off a figure, unless its note says another."""
FREE = ("seed", "cuda_graph", "fingerprint")
"""Settings that a row may have otherwise than its preset, as it may the tuned keys, backend and device."""


def published(suite: str) -> list[dict[str, str]]:
    """The published values of a suite, in the file's order."""
    with (Path(__file__).parent / "published.csv").open(newline="") as file:
        return [line for line in csv.DictReader(file) if line["suite"] == suite]


def verdict(line: dict[str, str], rows: Sequence[Row], protocol: Protocol) -> tuple[str, str]:
    """Our values and how they stand to one published value: within, above or below their interval, or not comparable because ...

    The interval is the range of one or two seeds, and from three on the 95% t-interval of their mean; the learning rate is the table's.
    """
    runs = _our_runs(line, rows, protocol)
    if isinstance(runs, str):
        return "–", f"not comparable because {runs}"
    ours = max(best_lines(runs, protocol), key=lambda each: len(each.runs))  # not the best of backends: the one with most seeds
    if not ours.finished:
        return "–", f"not comparable because our run {ours.first.status}: {ours.first.reason}"
    unit = ours.first.unit
    percent = (unit, line["unit"]) == ("fraction", "%")
    if line["unit"] != unit and not percent:
        return "–", f"not comparable because ours is in {unit} and the published one in {line['unit'] or 'no stated unit'}"
    values = [100 * v if percent else v for v in ours.finished]
    low, high, kind = interval(values)
    target, slack = float(line["value"]), tolerance(line["note"])
    where = "below" if high + slack < target else "above" if low - slack > target else "within"
    lost = len(ours.runs) - len(values)
    words = [f"preset {ours.first.preset}", f"{kind} of {len(values)} seed{'s' * (len(values) > 1)}", *_tuning(ours, runs)]
    words += [f"{lost} more failed"] if lost else []
    return ", ".join(f"{v:.3f}" for v in values), f"{where} ({', '.join(words)}, reading error {slack:g})"


def interval(values: Sequence[float]) -> tuple[float, float, str]:
    """Lowest and highest value that the seeds allow, and what the two are: a range below three values, else a 95% t-interval."""
    if len(values) < 3:
        return min(values), max(values), "range"
    middle, half = sum(values) / len(values), half_interval(values)
    return middle - half, middle + half, "95% t-interval"


def _our_runs(line: dict[str, str], rows: Sequence[Row], protocol: Protocol) -> Sequence[Run] | str:
    """Our runs of what a published value is of, or why there are none: those of the first preset with rows of its own at that depth.

    Two presets may each repeat what is known of one protocol; their rows are never pooled.
    """
    if not line["value"]:
        return f"no value was published: {line['note'] or 'left blank'}"
    presets = [name for name, preset in protocol.presets.items() if line["table"] in preset.reproduces]
    if not presets:
        return f"no preset repeats the protocol of {line['table']}"
    same = [r for r in rows if r.preset in presets and r.protocol_version == protocol.version and _same(line, r)]
    tested = [r for r in same if r.split == "test" and r.metric == line["metric"]]
    if not tested:
        return f"there are no rows of preset {' or '.join(presets)} for this model, task and width"
    deep = [r for r in tested if line["layers"] in ("", str(r.settings["num_layers"]))]
    if not deep:
        return f"ours has {tested[0].settings['num_layers']} layers and the published one {line['layers']}"
    for preset in presets:
        cells = {r.cell for r in deep if r.preset == preset and not departures(r, protocol)}
        if cells:
            parts = comparable([r for r in same if r.cell in cells], protocol, line["metric"])
            return max((part.runs for part in parts), key=len)
    return departures(min(deep, key=lambda r: presets.index(r.preset)), protocol)


def departures(row: Row, protocol: Protocol) -> str:
    """How a row's settings depart from its preset's, `epochs=1, the preset has 64; ...`; empty where they do not.

    A setting that the row lacks did not exist when it ran.
    """
    if row.model not in registry.models():
        return f"{row.model} is not a registered model"
    if row.task not in protocol.presets[row.preset].tasks:
        return f"preset {row.preset} has no task {row.task}"
    preset, mine = preset_settings(protocol.name, row.preset, row.task, row.model), {**row.settings, "dtype": row.dtype}
    fixed = [key for key in preset if key in mine and key not in (*FREE, *protocol.tuned)]
    return "; ".join(f"{k}={short(mine[k])}, the preset has {short(preset[k])}" for k in fixed if mine[k] not in preset[k])


@functools.cache
def preset_settings(suite: str, preset: str, task: str, model: str) -> Mapping[str, list[Any]]:
    """Every value that a preset's own words give to each setting of one model, as rows hold them."""
    found: dict[str, list[Any]] = {}
    for cell in make_plan([f"suite={suite}", f"preset={preset}", f"task={task}", f"model={model}"], "cpu", files=False).cells:
        for key, value in json.loads(json.dumps({**cell.fields(), "dtype": cell.dtype})).items():
            tried = found.setdefault(key, [])
            tried += [] if value in tried else [value]
    return found


def _tuning(ours: Line, runs: Sequence[Run]) -> list[str]:
    """The chosen value of each tuned key, and how much of the preset's grid was tried."""
    row = ours.first
    preset = preset_settings(row.suite, row.preset, row.task, row.model)
    tried = {key: {run.row.settings[key] for run in runs} & set(preset[key]) for key in ours.tuned}
    return [f"{k} {short(v)}, {len(tried[k])} of the preset's {len(preset[k])} tried" for k, v in ours.tuned.items()]


def _same(line: dict[str, str], row: Row) -> bool:
    """Whether a published value and a row are of one model, task and width; BaseConv, base_conv and Base-Conv are one name."""
    task = {plain(row.task), plain(f"{row.task}_d{row.settings.get('d_model')}")}
    return plain(line["task"]) in task and plain(line["model"]) == plain(row.model)


def plain(name: str) -> str:
    """A name without the signs by which its ways of writing differ."""
    return re.sub(r"[-_ ]", "", name.lower())


def tolerance(note: str) -> float:
    """The reading error of a published value."""
    found = re.search(r"\+-(0\.\d+)", note)
    return float(found[1]) if found else TOLERANCE


def reproduced(row: Row, protocol: Protocol) -> float | None:
    """What was published for a row's model, task, width, depth and metric, in the row's unit.

    None unless the row has its preset's settings and the preset repeats that protocol.
    """
    preset = protocol.presets.get(row.preset)
    if preset is None or not preset.reproduces or row.protocol_version != protocol.version or row.split != "test":
        return None
    for line in published(protocol.name):
        known = line["value"] and line["table"] in preset.reproduces and line["metric"] == row.metric and _same(line, row)
        if known and line["layers"] in ("", str(row.settings["num_layers"])) and not departures(row, protocol):
            if line["unit"] == row.unit:
                return float(line["value"])
            if (row.unit, line["unit"]) == ("fraction", "%"):
                return float(line["value"]) / 100
    return None
