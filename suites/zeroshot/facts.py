"""The tasks of preset smoke: questions on documents of the generated source, in the schemas and with the prompts of official tasks.

A document begins with its facts, `s3 s17 s1 s9 ...` (key, value), and later comes a key again, behind which stands the same value. Each
task asks for such a value as an official one asks for its answer, and is called after what it asks, not after that task:

    facts_cloze      lambada_openai   the last word of a text
    facts_goal       piqa             two solutions: the value, and that of another fact
    facts_ending     hellaswag        four endings: the key with its value or with another's
    facts_blank      winogrande       two values for a blank among the facts; what follows names the right one later
    facts_question   arc_easy         three to five choices, labelled A, B, ... or 1, 2, ...

What the prompts add, such as "Question:", no symbol stands for: the tokenizer leaves it out (see `hgrn2_bench.text_tokenizers`).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hgrn2_bench.markov import SOURCE_SEED, draw_split, make_source
from hgrn2_bench.markov_recipe import Recipe
from hgrn2_bench.text_tokenizers import SYMBOL
from suites.zeroshot.settings import SMOKE

ITEMS = 200
"""Of each task."""
LONGEST = 60
"""Tokens of a document up to the value that is asked for: with the token before them they fit into a block of 64."""
LOTS = 3 * 4 * 5
"""Every number of choices divides it."""
STREAM = 4
"""Of the source's seed: train, validation and test text have 1 to 3."""


@dataclass(frozen=True)
class Question:
    """A document up to a key that comes again, and the values that may follow."""

    told: tuple[tuple[str, str], ...]
    """Its facts: key and value."""
    since: tuple[str, ...]
    """The words between the facts and the key."""
    key: str
    value: str
    others: tuple[str, ...]
    """Wrong values: first those of the other facts, then such as no fact of the document has."""
    lot: int
    """Drawn for the place of the right answer."""

    def words(self) -> list[str]:
        """All up to the key, which is the last."""
        return [*(word for fact in self.told for word in fact), *self.since, self.key]


@dataclass(frozen=True)
class Task:
    """One of the tasks: the packaged one whose schema and prompt it has, below lm-eval's tasks, and the split it is scored on."""

    packaged: str
    split: str
    item: Callable[[Question, int], Mapping[str, Any]]
    """An item of a question and its number."""


def write(folder: Path, recipe: Recipe, packaged: Path) -> None:
    """Write items and task files for lm-eval into a folder; `packaged` is where its own tasks are."""
    source = draw_questions(recipe)
    for name, task in TASKS.items():
        items = [task.item(question, number) for number, question in zip(range(ITEMS), source, strict=False)]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(item) + "\n" for item in items))
        content = {
            "include": str(packaged / task.packaged),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "training_split": None,
            "validation_split": None,
            "test_split": None,
            f"{task.split}_split": task.split,
            "dataset_kwargs": {"data_files": {task.split: str(data)}},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(content, indent=1))  # every JSON file is a YAML file
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": SMOKE, "task": list(TASKS), "aggregate_metric_list": [mean], "metadata": {"version": 1}}
    (folder / f"{SMOKE}.yaml").write_text(json.dumps(group, indent=1))


def draw_questions(recipe: Recipe) -> Iterator[Question]:
    """Questions without end, the same for every seed and model, each on a document of its own."""
    source, rng = make_source(recipe.symbols), np.random.default_rng([SOURCE_SEED, STREAM])
    stream = 0
    while True:
        text = draw_split(source, recipe, ITEMS * recipe.document, (SOURCE_SEED, STREAM, stream))
        assert text.recalled_N is not None
        assert text.document_N is not None
        ends = np.flatnonzero(np.diff(text.document_N)) + 1
        for ids_T, recalled_T in zip(np.split(text.ids_N, ends), np.split(text.recalled_N, ends), strict=True):
            if question := _question(ids_T, np.flatnonzero(recalled_T[:LONGEST]), recipe, rng):
                yield question
        stream += 1


def _question(ids_T: np.ndarray, places: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> Question | None:
    """The question on one of the places where a value is recalled; None where there is none of them."""
    F = recipe.facts
    if not len(places):
        return None
    place = int(rng.choice(places))
    words = [f"{SYMBOL}{i}" for i in ids_T[: place + 1].tolist()]
    told = tuple(zip(words[: 2 * F : 2], words[1 : 2 * F : 2], strict=True))
    values = [value for _, value in told]
    free = [word for word in (f"{SYMBOL}{i}" for i in range(F + 1, recipe.symbols)) if word not in values]
    others = [value for value in rng.permutation(values).tolist() if value != words[-1]] + rng.permutation(free).tolist()
    return Question(told, tuple(words[2 * F : place - 1]), words[place - 1], words[place], tuple(others), int(rng.integers(LOTS)))


def _cloze(question: Question, _number: int) -> dict[str, Any]:
    return {"text": " ".join([*question.words(), question.value])}


def _goal(question: Question, _number: int) -> dict[str, Any]:
    values, label = _shuffled(question, 2)
    return {"goal": " ".join(question.words()), "sol1": values[0], "sol2": values[1], "label": label}


def _ending(question: Question, number: int) -> dict[str, Any]:
    values, label = _shuffled(question, 4)
    told, endings = " ".join(question.words()[: 2 * len(question.told)]), [f"{question.key} {value}" for value in values]
    activity, since = "Recalling facts", " ".join(question.since)
    return {"ind": number, "activity_label": activity, "ctx_a": told, "ctx_b": since, "endings": endings, "label": str(label)}


def _blank(question: Question, _number: int) -> dict[str, Any]:
    (first, second), label = _shuffled(question, 2, beyond=len(question.told) - 1)
    told = [word for key, value in question.told for word in (key, "_" if key == question.key else value)]
    sentence = " ".join([*told, *question.since, question.key, question.value])
    return {"sentence": sentence, "option1": first, "option2": second, "answer": str(label + 1)}


def _question_of(question: Question, number: int) -> dict[str, Any]:
    values, label = _shuffled(question, 3 + number % 3)
    labels = [str(i + 1) if number % 4 == 3 else "ABCDE"[i] for i in range(len(values))]
    choices = {"text": values, "label": labels}
    return {"id": f"facts_{number}", "question": " ".join(question.words()), "choices": choices, "answerKey": labels[label]}


def _shuffled(question: Question, choices: int, beyond: int = 0) -> tuple[list[str], int]:
    """So many values, and the place of the right one; `beyond`: wrong ones that are passed over."""
    values, label = list(question.others[beyond : beyond + choices - 1]), question.lot % choices
    values.insert(label, question.value)
    return values, label


TASKS = {
    "facts_cloze": Task("lambada/lambada_openai.yaml", "test", _cloze),
    "facts_goal": Task("piqa/piqa.yaml", "validation", _goal),
    "facts_ending": Task("hellaswag/hellaswag.yaml", "validation", _ending),
    "facts_blank": Task("winogrande/default.yaml", "validation", _blank),
    "facts_question": Task("arc/arc_easy.yaml", "test", _question_of),
}
