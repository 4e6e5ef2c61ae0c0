"""What a row of each known task must hold, as the hub has it; and rows of files, each held to that. Imports neither torch nor lm_eval."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hgrn2_bench.errors import DataError
from hgrn2_bench.files import Copy
from hgrn2_bench.rows import objects
from suites.zeroshot.catalogue import TASKS

Row = dict[str, Any]
Check = Callable[[Any, Row], str]
"""Of a value and its row: what was expected instead, in words; empty where the value is right."""
LABELS = "labels"
"""With a split's name and `_` before it, the key of a file of answers that stand apart."""
APART = {"piqa": "label"}
"""Tasks whose own release has the answers in such a file, and the field that they are."""


def _string(value: Any, row: Row) -> str:
    return "" if isinstance(value, str) else "a string"


def _text(value: Any, row: Row) -> str:
    return "" if isinstance(value, str) and value.strip() else "a text"


def _index(choices: int) -> Check:
    """The number of a choice, as a number."""
    return lambda value, row: "" if type(value) is int and 0 <= value < choices else f"a number from 0 to {choices - 1}"


def _one_of(*words: str) -> Check:
    """One of some strings."""
    return lambda value, row: "" if isinstance(value, str) and value in words else f"one of {', '.join(map(json.dumps, words))}, as text"


def _texts(number: int) -> Check:
    def check(value: Any, row: Row) -> str:
        is_right = isinstance(value, list) and len(value) == number and all(isinstance(each, str) for each in value)
        return "" if is_right else f"a list of {number} texts"

    return check


def _with_blank(value: Any, row: Row) -> str:
    return "" if isinstance(value, str) and "_" in value else "a text with the blank `_`"


def _words(value: Any, row: Row) -> str:
    return "" if isinstance(value, str) and " " in value.strip() else "a text of at least two words"


def _choices(value: Any, row: Row) -> str:
    """As the hub has them: two lists of one length."""
    lists: list[Any] = [value.get("text"), value.get("label")] if isinstance(value, dict) else []
    is_right = len(lists) == 2 and all(isinstance(each, list) and each and all(isinstance(x, str) for x in each) for each in lists)
    return "" if is_right and len(lists[0]) == len(lists[1]) else "{text: [...], label: [...]} with as many labels as texts"


def _answer(value: Any, row: Row) -> str:
    labels = row["choices"]["label"]
    return "" if isinstance(value, str) and value in labels else f"one of the labels {', '.join(labels)}, as text"


def _answer_behind_blanks(value: Any, row: Row) -> str:
    return _answer(value.lstrip() if isinstance(value, str) else value, row)


FIELDS: Mapping[str, Mapping[str, Check]] = {
    "piqa": {"goal": _text, "sol1": _string, "sol2": _string, "label": _index(2)},
    "hellaswag": {"ctx_a": _string, "ctx_b": _string, "activity_label": _string, "endings": _texts(4), "label": _one_of(*"0123")},
    "winogrande": {"sentence": _with_blank, "option1": _text, "option2": _text, "answer": _one_of("1", "2")},
    "arc_easy": {"question": _text, "choices": _choices, "answerKey": _answer},
    "arc_challenge": {"question": _text, "choices": _choices, "answerKey": _answer},
    "openbookqa": {"question_stem": _text, "choices": _choices, "answerKey": _answer_behind_blanks},
    "lambada_openai": {"text": _words},
    "boolq": {"passage": _text, "question": _text, "label": _index(2)},
    "sciq": {
        "support": _string,
        "question": _text,
        "distractor1": _text,
        "distractor2": _text,
        "distractor3": _text,
        "correct_answer": _text,
    },
    "wikitext": {"page": _string},
    **{task: {"text": _text, "value": _text} for task in ("fda", "swde", "squad_completion")},
}
"""Fields that the packaged prompt reads, each with its check; those of a task stand in the order in which they are checked."""


def read(task: str, copy: Copy, split: str) -> list[Row]:
    """The rows of a split, whole and in order. DataError, one line that names file and row, where one is not as the hub has it.

    Of tasks that are not known here any JSON objects are rows.
    """
    rows: list[Row] = []
    for path in copy.of(split):
        before = len(rows)
        rows += _complete(task, _rows(path), copy, split)
        if len(rows) == before:
            raise DataError(f"{path}: no rows: copy it again")
    return rows


def _complete(task: str, rows: Iterator[tuple[str, Row]], copy: Copy, split: str) -> Iterator[Row]:
    """Rows with the answers that stand apart, each held to its schema."""
    apart = copy.files.get(f"{split}_{LABELS}", ()) if task in APART else ()
    labels = iter(_labels(apart[0])) if apart else None
    where = ""
    for where, row in rows:
        if labels is not None and APART[task] not in row:
            answer = next(labels, None)
            if answer is None:
                raise DataError(f"{apart[0]}: fewer answers than {where} has rows: copy both again")
            row[APART[task]] = answer
        _hold(task, row, where)
        yield row
    if labels is not None and len(list(labels)) and where:
        raise DataError(f"{apart[0]}: more answers than rows in {copy.of(split)[0]}: copy both again")


def _hold(task: str, row: Row, where: str) -> None:
    """DataError where a row lacks a field, or has another type of value in it."""
    for field, check in FIELDS.get(task, {}).items():
        if field not in row:
            raise DataError(f"{where}: no field {field!r}; {task} needs {', '.join(FIELDS[task])}, here: {', '.join(row)}")
        if expected := check(row[field], row):
            raise DataError(f"{where}: {field} is {_shown(row[field])}, expected {expected}")


def _shown(value: Any) -> str:
    """A value as JSON, not all of a long one."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _labels(path: Path) -> list[int]:
    """Answers, one a line. DataError where a line is no number."""
    lines = path.read_text(errors="replace").split("\n")
    lines = lines[:-1] if not lines[-1] else lines
    for number, line in enumerate(lines, 1):
        if not line.strip().isdigit():
            raise DataError(f"{path}:{number}: expected the number of the right answer, found {_shown(line)}")
    return [int(line) for line in lines]


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a file, and in words where each is. DataError where it is damaged."""
    if path.suffix.lower() == ".json" and _is_list(path):
        yield from ((f"{path}, item {i}", row) for i, row in enumerate(_listed(path)))
    else:
        yield from objects(path)


def _is_list(path: Path) -> bool:
    """Whether a JSON file is one list instead of an object a line."""
    with path.open("rb") as file:
        return file.read(1000).lstrip()[:1] == b"["


def _listed(path: Path) -> Sequence[Row]:
    try:
        rows = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: no JSON, or cut short ({error}): copy it again") from None
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of objects")
    return list(rows)


def check_size(task: str, where: str, items: int) -> str:
    """A doubt about the number of items of a task's whole scored split, in words; empty where there is none; `where` it is from.

    DataError where the number was counted in real files and is another; numbers of the literature are doubts.
    """
    known = TASKS.get(task)
    if known is None or known.size in (0, items):
        return ""
    fault = f"{task} from {where}: {items:,} items"
    if known.is_counted:
        raise DataError(f"{fault}, expected {known.size:,}: a part of the data, cut short, or another set")
    return f"{fault}, the literature has {known.size:,}"
