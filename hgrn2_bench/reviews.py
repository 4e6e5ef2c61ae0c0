"""IMDB's reviews in each layout that they come in: found and read. Imports no torch, no numpy."""

from collections.abc import Iterator
from pathlib import Path

from hgrn2_bench.errors import DataError
from hgrn2_bench.files import Copy, only_copy, searched
from hgrn2_bench.rows import has_column, objects, parquet_footer, shards

EXPECTED = "aclImdb/{train,test}/{pos,neg}/*.txt, or *train*.parquet and *test*.parquet (text, label), or the same as .jsonl or .jsonl.gz"
"""In words; folders above may have any name."""
SPLITS = ("train", "test")
CLASSES = ("neg", "pos")
"""In the order of their labels."""
UNLABELLED = -1
COUNTS = {"train": 25_000, "test": 25_000}
"""Labelled reviews of each file."""
WORDS = {split: split for split in SPLITS}
OTHER_WORDS = {**WORDS, "valid": "validation"}
"""A set with a validation split is another data set's: IMDB has none."""
ENDINGS = ("parquet", "jsonl", "jsonl.gz")


NAME = "the IMDB reviews"
FOLDERS = "aclImdb folders"
"""A layout, beside `parquet` and `json lines`."""


def find_reviews(root: Path) -> Copy:
    """The only copy of the reviews below a folder. ConfigError where there is none, or more than one to choose from."""
    closed = {*SPLITS, *CLASSES, "unsup"}
    found = [each for folder, files in searched(root, closed) for each in _reviews_in(folder, files)]
    return only_copy(found, root, NAME, EXPECTED)


def _reviews_in(folder: Path, files: list[Path]) -> Iterator[Copy]:
    """Copies whose files, or whose folders of splits, lie in this folder."""
    if all((folder / split / name).is_dir() for split in SPLITS for name in CLASSES):
        yield Copy(NAME, FOLDERS, folder, {split: (folder / split,) for split in SPLITS})
    for there in shards(files, OTHER_WORDS, ENDINGS):
        if set(there) != set(SPLITS):
            continue
        paths = [path for split in SPLITS for path in there[split]]
        is_table = paths[0].suffix == ".parquet"
        footers = [parquet_footer(path) for path in paths] if is_table else []
        if all(has_column(footer, "text") and has_column(footer, "label") for footer in footers):
            yield Copy(NAME, "parquet" if is_table else "json lines", folder, {split: tuple(there[split]) for split in SPLITS})


def review_rows(layout: str, path: Path) -> Iterator[tuple[str, int]]:
    """Text and label (0 negative, 1 positive, -1 none) of each review of a file, or of a split's folder, in its order.

    DataError names file and line.
    """
    for where, text, label in _folder_rows(path) if layout == FOLDERS else _table_rows(path):
        if not isinstance(text, str) or isinstance(label, bool) or label not in (0, 1, UNLABELLED):
            raise DataError(f"{where}: text {type(text).__name__}, label {label!r}; expected a string and 0, 1 or -1 (unlabelled)")
        yield text, int(label)


def _folder_rows(folder: Path) -> Iterator[tuple[str, object, object]]:
    """Where each review stands, its text and its label."""
    for label, name in enumerate(CLASSES):
        files = sorted((folder / name).glob("*.txt"), key=lambda path: (path.stem.partition("_")[0].zfill(8), path.stem))
        if not files:
            raise DataError(f"{folder / name}: no reviews (*.txt); expected 12500")
        for path in files:
            try:
                yield str(path), path.read_bytes().decode(), label
            except UnicodeDecodeError:
                raise DataError(f"{path}: not UTF-8: unpack the archive again") from None


def _table_rows(path: Path) -> Iterator[tuple[str, object, object]]:
    """The same of a table."""
    return ((where, row["text"], row["label"]) for where, row in objects(path, ("text", "label")))
