"""Published values beside our own: a verdict for each, never "reproduced" from one run. Reads `published.csv` of this package.

Its columns: suite, table, task, metric, higher_is_better, model, params_m, layers, value, unit, source, note.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from hgrn2_bench.protocol import Protocol
from hgrn2_bench.render import Column, Table
from hgrn2_bench.results import Row

TOLERANCE = 0.01
"""Reading error of a value taken off a figure, unless its note says another."""


def published(suite: str) -> list[dict[str, str]]:
    """The published values of a suite, in the file's order."""
    with (Path(__file__).parent / "published.csv").open(newline="") as file:
        return [line for line in csv.DictReader(file) if line["suite"] == suite]


def verdict(line: dict[str, str], rows: Sequence[Row], protocol: Protocol) -> tuple[str, str]:
    """Our values and how they stand to one published value: within, above or below their range, or not comparable because ..."""
    if not line["value"]:
        return "–", f"not comparable because no value was published: {line['note'] or 'left blank'}"
    reproducing = [name for name, preset in protocol.presets.items() if line["table"] in preset.reproduces]
    if not reproducing:
        return "–", f"not comparable because no preset repeats the protocol of {line['table']}"
    ours = [r for r in rows if r.preset in reproducing and r.protocol_version == protocol.version]
    same = [r for r in ours if r.metric == line["metric"] and r.split == "test" and _same(line, r)]
    if not same:
        return "–", f"not comparable because there are no rows of preset {' or '.join(reproducing)} for this model, task and width"
    depth = [r for r in same if not line["layers"] or str(r.settings["num_layers"]) == line["layers"]]
    if not depth:
        return "–", f"not comparable because ours has {same[0].settings['num_layers']} layers and the published one {line['layers']}"
    known = [r for r in depth if r.status == "ok" and r.value is not None]
    if not known:
        return "–", f"not comparable because our run {depth[0].status}: {depth[0].reason}"
    percent = (known[0].unit, line["unit"]) == ("fraction", "%")
    if line["unit"] != known[0].unit and not percent:
        return "–", f"not comparable because ours is in {known[0].unit} and the published one in {line['unit'] or 'no stated unit'}"
    pick = max if protocol.higher_is_better else min
    rates = sorted({float(r.settings["lr"]) for r in known})
    best = pick(rates, key=lambda lr: pick(_values(known, lr)))
    values = [100 * v if percent else v for v in _values(known, best)]
    target, slack = float(line["value"]), _tolerance(line["note"])
    where = "below" if values[-1] + slack < target else "above" if values[0] - slack > target else "within"
    lost = sum(r.settings["lr"] == best for r in depth) - len(values)
    words = [f"range of {len(values)} seed{'s' * (len(values) > 1)} at lr {best:g}", *([f"{lost} more failed"] if lost else [])]
    return ", ".join(f"{v:.3f}" for v in values), f"{where} ({', '.join(words)}, reading error {slack:g})"


def _values(rows: Sequence[Row], lr: float) -> list[float]:
    """Values at one learning rate, ascending."""
    return sorted(r.value for r in rows if r.settings["lr"] == lr and r.value is not None)


def _same(line: dict[str, str], row: Row) -> bool:
    task = {row.task, f"{row.task}_d{row.settings.get('d_model')}"}
    return line["task"] in task and line["model"].lower().replace("-", "_") == row.model


def _tolerance(note: str) -> float:
    found = re.search(r"\+-(0\.\d+)", note)
    return float(found[1]) if found else TOLERANCE


def reproduced(row: Row, protocol: Protocol) -> float | None:
    """What was published for a row's model, task, width, depth and metric, in the row's unit; None unless its preset repeats that."""
    preset = protocol.presets.get(row.preset)
    if preset is None or not preset.reproduces or row.protocol_version != protocol.version or row.split != "test":
        return None
    for line in published(protocol.name):
        known = line["value"] and line["table"] in preset.reproduces and line["metric"] == row.metric and _same(line, row)
        if known and line["layers"] in ("", str(row.settings["num_layers"])):
            if line["unit"] == row.unit:
                return float(line["value"])
            if (row.unit, line["unit"]) == ("fraction", "%"):
                return float(line["value"]) / 100
    return None


def published_table(rows: Sequence[Row], protocol: Protocol) -> Table | None:
    """All published values of the suite with our own and the verdict; None where nothing is published for it."""
    lines = published(protocol.name)
    if not lines:
        return None
    columns = tuple(Column(name) for name in ("model", "task", "layers", "published", "ours", "verdict"))
    body = []
    for line in lines:
        ours, words = verdict(line, rows, protocol)
        body.append((line["model"], line["task"], line["layers"] or "–", line["value"], ours, words))
    sources = dict.fromkeys(f"{line['table']}: {line['source']}" for line in lines)
    return Table(f"{protocol.name}: published values", columns, tuple(body), tuple(sources))
