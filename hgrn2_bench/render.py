"""Tables as text: Markdown, csv, LaTeX, HTML; and how numbers are shown to a person."""

import csv
import html
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FORMATS = ("md", "csv", "latex", "html", "jsonl")
"""What `table --format` takes; jsonl prints the rows themselves."""


@dataclass(frozen=True)
class Column:
    """A heading and how its values are shown to a person; csv keeps them raw."""

    name: str
    show: Callable[[Any], str] = str


@dataclass(frozen=True)
class Table:
    """A title, columns, lines of raw values, and the notes below; a refused table has notes only."""

    title: str
    columns: tuple[Column, ...]
    lines: tuple[tuple[Any, ...], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """A line's result: in words, and the value of each seed (None where it has none)."""

    text: str
    by_seed: Mapping[int, float | None]

    def __str__(self) -> str:
        """The words."""
        return self.text


def short(value: Any) -> str:
    """A setting's value; a dash for none, commas between the words of a list."""
    if isinstance(value, list | tuple):
        return ", ".join(map(short, value))
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def count(value: float | None) -> str:
    """`41.2k`: three digits and a factor."""
    if value is None:
        return "–"
    for factor, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:  # what three digits round up to it
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def byte_count(value: float | None) -> str:
    """Bytes with three digits and a factor of 1000."""
    return "–" if value is None else f"{count(value)}B"


def render(table: Table, form: str) -> str:
    """A table as `md`, `csv`, `latex` or `html` text; notes follow, except in csv, whose first column repeats the title.

    Of a table without columns nothing but title and notes is printed, in csv as a comment.
    """
    from tabulate import tabulate

    names = [column.name for column in table.columns]
    if form == "csv":
        return _csv(table) if table.columns else "".join(f"# {table.title}: {note}\n" for note in table.notes)
    body = [[" ".join(column.show(value).split()) for column, value in zip(table.columns, line, strict=True)] for line in table.lines]
    if form == "md":
        names, body = [_piped(name) for name in names], [[_piped(text) for text in line] for line in body]
    kind = {"md": "github", "latex": "latex_booktabs", "html": "html"}[form]
    grid = tabulate(body, names, tablefmt=kind, disable_numparse=True)
    if form == "md":
        return "\n".join([f"**{table.title}**", "", grid, "", *(f"- {note}" for note in table.notes), ""])
    if form == "html":
        return "\n".join([f"<p>{html.escape(table.title)}</p>", grid, *(f"<p>{html.escape(note)}</p>" for note in table.notes), ""])
    return "\n".join([f"% {table.title}", grid, *(f"% {note}" for note in table.notes), ""])


def _csv(table: Table) -> str:
    """Raw values; a score becomes one column per seed."""
    seeds = sorted({seed for line in table.lines for value in line if isinstance(value, Score) for seed in value.by_seed})
    scored = {i for line in table.lines for i, value in enumerate(line) if isinstance(value, Score)}
    names: list[Any] = ["table"]
    for i, column in enumerate(table.columns):
        names += [f"{column.name.split(',')[0]} seed {seed}" for seed in seeds] if i in scored else [column.name]
    body = [names]
    for line in table.lines:
        body.append([table.title])
        for value in line:
            body[-1] += [value.by_seed.get(seed) for seed in seeds] if isinstance(value, Score) else [value]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(body)
    return text.getvalue()


def _piped(text: str) -> str:
    """Text whose bars do not end a Markdown cell."""
    return text.replace("|", r"\|")
