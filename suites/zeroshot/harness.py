"""One task or group asked by lm-eval's evaluator, and what a cell reports of it: metrics with standard errors, and every item's outcome.

lm-eval makes the prompts, cuts the items among processes and judges the answers; all sums are taken here, over items in their own order, so
that they are the same however the items were divided, and items that were left out are in no denominator.
"""

import importlib
import importlib.metadata
import json
import lzma
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hgrn2_bench.engine import SkippedError
from hgrn2_bench.protocol import Metric
from hgrn2_bench.trainer import DivergedError
from suites.zeroshot.catalogue import TASKS
from suites.zeroshot.network import no_code
from suites.zeroshot.packaged import Loaded, Request, load
from suites.zeroshot.quiet import compiled_once, quiet, seeded
from suites.zeroshot.scores import FRACTION, Scored, docs_hash, group_score, measure
from suites.zeroshot.settings import ZeroshotConfig

ITEMS = "items.jsonl.xz"
"""In the cell's folder: what the model answered to each item."""
LISTED = 50
"""Of the items that were not scored as they stand, so many are named in the row; all of them in ITEMS."""
ABSENT = -1.0
"""RULER's score of an item under another length than its own."""


@dataclass(frozen=True)
class Outcome:
    """What a cell reports."""

    metrics: list[Metric]
    """The score first; empty in all processes but the first."""
    details: dict[str, Any]
    data_hash: str
    """Over the items that were scored, in order."""
    truncated: int
    """Items that the model did not see whole."""
    skipped: int
    """Items that were left out, and are in no denominator."""


def evaluate(lm: Any, config: ZeroshotConfig, folder: Path | None, own: Path | None = None) -> Outcome:
    """Ask a model all items of a task or group; records of the items go to `folder`, task files written at run time are in `own`.

    SkippedError where a task has no data, naming the files it wants; of a group those members are named before the others run.
    ConfigError where a file is damaged; DivergedError where an answer has no finite probability.
    """
    loaded = load(Request(config.lm_task, own, config.fewshot, config.max_length), lm)
    if loaded.unavailable:
        number, reason = len(loaded.unavailable), next(iter(loaded.unavailable.values()))
        print(f"{config.lm_task}: {number} without data, left out: {_shortened(loaded.unavailable)} ({reason})", file=sys.stderr)
    _refuse_code(loaded)
    samples = _asked(lm, loaded, config.limit)
    told = _told(lm)
    if samples is None:
        return Outcome([], {}, "", 0, 0)
    left_out = {(each["task"], each["doc"]) for each in told["items"].get("skipped", ())}
    kept = {name: [each for each in items if (name, each["doc_id"]) not in left_out] for name, items in samples.items()}
    if empty := [name for name, items in kept.items() if not items]:
        raise SkippedError(f"{', '.join(empty)}: every item is longer than the model reads, and truncation=skip leaves it out")
    scored = [_scored(name, loaded.tasks[name], items, config) for name, items in kept.items()]
    if folder is not None:
        _write_items(folder / ITEMS, samples, told["items"])
    return Outcome(
        metrics=_metrics(scored, loaded, config.weighting),
        details=_details(scored, loaded, told, config.weighting),
        data_hash=docs_hash([each.docs for each in scored]),
        truncated=len({(each["task"], each["doc"]) for each in told["items"].get("truncated", ())} - left_out),
        skipped=len(left_out),
    )


def _shortened(names: Iterable[str]) -> str:
    """The first names of many."""
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _refuse_code(loaded: Loaded) -> None:
    """SkippedError for tasks that run what a model writes."""
    unsafe = [name for name, task in loaded.tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise SkippedError(f"{', '.join(unsafe)}: lm-eval runs the model's answers as code; this suite does not")


def _asked(lm: Any, loaded: Loaded, limit: int) -> dict[str, list[dict[str, Any]]] | None:
    """lm-eval's records of each task's items, ordered by item; None in all processes but the first."""
    evaluator: Any = importlib.import_module("lm_eval.evaluator")
    with quiet(), seeded(), compiled_once(), no_code():
        try:
            # without bootstrap, and without a cache of requests or answers, which would not know the model
            results = evaluator.evaluate(
                lm, {"tasks": loaded.tasks, "groups": {}}, limit=limit or None, bootstrap_iters=0, log_samples=True, cache_requests=False
            )
        except OverflowError:
            raise DivergedError(f"{', '.join(loaded.tasks)}: a perplexity is too large to be a number") from None
    if results is None:
        return None
    return {name: sorted(results["samples"][name], key=lambda each: each["doc_id"]) for name in loaded.tasks}


def _told(lm: Any) -> dict[str, Any]:
    """What the model says of its scoring; of several processes that of the first, with the items of all."""
    own: dict[str, Any] = dict(lm.told())
    everyone = lm.gather_object(own, dst=0)
    items: dict[str, list[dict[str, Any]]] = {}
    for each in everyone or ():
        for kind, those in each.get("items", {}).items():
            items.setdefault(kind, []).extend(those)
    return {**own, "items": items}


def _scored(name: str, task: Any, items: Sequence[Mapping[str, Any]], config: ZeroshotConfig) -> Scored:
    """A task's metrics over its items, by the functions that lm-eval has for them.

    What is told of them holds for every model, whichever token its tokenizer begins a text with: models share a table by it.
    """
    filters = list(dict.fromkeys(each["filter"] for each in items))
    measures = {}
    for kind in filters:
        those = [each for each in items if each["filter"] == kind]
        for metric in dict.fromkeys(metric for each in those for metric in each["metrics"]):
            values = [each[metric] for each in those if metric in each and not _is_absent(name, each[metric])]
            if not values:
                continue
            label = metric if len(filters) == 1 else f"{metric}@{kind}"
            aggregate = task.aggregation().get(metric, mean)
            found = measure(label, values, aggregate, task.higher_is_better().get(metric, True))
            if not math.isfinite(found.value):
                raise DivergedError(f"{name}: {label} is {found.value}")
            measures[label] = found
    once = [each for each in items if each["filter"] == filters[0]]
    facts = {"task_version": str(task.VERSION), "fewshot": str(task.get_config("num_fewshot") or 0)}
    facts |= {"bos": config.bos, "truncation": config.truncation}
    return Scored(
        name, measures, _primary(name, measures), len(once), docs_hash([each["doc_hash"] for each in once]), _chance(task, once), facts
    )


def _is_absent(name: str, value: Any) -> bool:
    return name in TASKS and TASKS[name].is_generated and value == ABSENT


def mean(values: Sequence[float]) -> float:
    """lm-eval's rule for a metric without a function of its own; named so that its standard error is known."""
    return sum(values) / len(values)


def _primary(name: str, measures: Mapping[str, Any]) -> str:
    """The metric that is a task's score: that of the HGRN2 table, or accuracy, or else the task's first."""
    rule = TASKS[name].rule if name in TASKS else "acc"
    return next((label for label in (rule, "acc") if label in measures), next(iter(measures)))


def _chance(task: Any, items: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean of 1 / choices; None where a task has none."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    return sum(1 / len(task.doc_to_choice(each["doc"])) for each in items) / len(items)


def _metrics(scored: Sequence[Scored], loaded: Loaded, weighting: str) -> list[Metric]:
    """The score, then every metric of every member."""
    first = _group_metric(scored, loaded, weighting) if loaded.is_group else _metric("test", scored[0], scored[0].primary, "score")
    members = [_metric(each.name if loaded.is_group else "test", each, label, label) for each in scored for label in each.measures]
    return [first, *members]


def _metric(split: str, task: Scored, label: str, name: str) -> Metric:
    """One metric of a task as a row has it."""
    found = task.measures[label]
    floors = {"chance": task.chance} if task.chance is not None and label.startswith("acc") else {}
    card = {"metric": label, **task.facts}
    return Metric(split, name, found.value, found.num_items, floors, found.unit, found.higher_is_better, card)


def _group_metric(scored: Sequence[Scored], loaded: Loaded, weighting: str) -> Metric:
    """A group's score; its card says which members are in it, so that a part of a group never stands beside the whole."""
    found = group_score(scored, weighting)
    absent = [*loaded.unavailable, *found.left_out]
    members = len(scored) + len(loaded.unavailable)
    how = {"items": "every item alike (micro)", "tasks": "every member alike (macro)"}[weighting]
    without = f" of {members}, without {_shortened(absent)} ({docs_hash(absent)})" if absent else ""
    card = {"metric": f"mean of {found.metric}", "weighting": how, "members": f"{members - len(absent)}{without}"}
    for key in scored[0].facts:
        card[key] = ", ".join(sorted({each.facts[key] for each in scored}))
    first = next(each for each in scored if each.name not in found.left_out).score
    floors = {"chance": found.chance} if found.chance is not None and first.unit == FRACTION else {}
    return Metric("test", "score", found.value, found.num_items, floors, first.unit, first.higher_is_better, card)


def _details(scored: Sequence[Scored], loaded: Loaded, told: Mapping[str, Any], weighting: str) -> dict[str, Any]:
    """What a row keeps beside its value: enough for a paired test of two models item by item."""
    left_out = group_score(scored, weighting).left_out
    errors = {task.name: {label: each.stderr for label, each in task.measures.items() if each.stderr is not None} for task in scored}
    right = {
        task.name: {
            label: {"docs": task.docs, "n": each.num_items, "bits": each.bits} for label, each in task.measures.items() if each.bits
        }
        for task in scored
    }
    listed = {kind: list(items)[:LISTED] for kind, items in told["items"].items()}
    return {
        "scored": {task.name: task.primary for task in scored if task.name not in left_out},
        "stderr": errors,
        "items": right,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "versions": {task.name: task.facts["task_version"] for task in scored},
        "sources": dict(loaded.sources),
        "whole": dict(loaded.sizes),
        "unavailable": dict(loaded.unavailable),
        "doubts": list(loaded.doubts),
        "scoring": {**told, "items": listed},
    }


def _write_items(path: Path, samples: Mapping[str, Sequence[Mapping[str, Any]]], noted: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """One JSON object an item and filter: what was asked is told by its hash, what was answered in full."""
    marks: dict[tuple[str, int], list[str]] = {}
    for kind, those in noted.items():
        for each in those:
            marks.setdefault((each["task"], each["doc"]), []).append(kind)
    half = path.with_suffix(".part")
    with lzma.open(half, "wt", encoding="utf-8") as file:
        for name, items in samples.items():
            for each in items:
                file.write(json.dumps(_record(name, each, marks.get((name, each["doc_id"]), ())), default=str) + "\n")
    half.replace(path)


def _record(name: str, item: Mapping[str, Any], marks: Sequence[str]) -> dict[str, Any]:
    """An item's answers: log-likelihoods in nats and whether each is what greedy decoding gives, or the text that was written."""
    answers = [answer for request in item["resps"] for answer in request]
    pairs = [answer for answer in answers if isinstance(answer, tuple | list) and len(answer) == 2]
    found = {"task": name, "doc_id": item["doc_id"], "doc_hash": item["doc_hash"], "target": item["target"], "filter": item["filter"]}
    if pairs:
        found |= {"log_likelihoods": [float(nats) for nats, _ in pairs], "is_greedy": [bool(greedy) for _, greedy in pairs]}
    else:
        found |= {"answers": answers}
    found |= {metric: item[metric] for metric in item["metrics"]}
    return found | ({"noted": sorted(set(marks))} if marks else {})
