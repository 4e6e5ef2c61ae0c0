"""Lines of a text from its files, in batches: never more of it in memory. Each line ends as the original text ends it."""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from hgrn2_bench.errors import DataError
from hgrn2_bench.reviews import COUNTS as REVIEWS
from hgrn2_bench.reviews import UNLABELLED, review_rows
from hgrn2_bench.rows import check_whole, objects
from suites.wikitext.counts import UNKNOWN, Counted
from suites.wikitext.places import Place

BATCH_BYTES = 1 << 20
"""Of lines held at once, or one line where it is longer."""
HELD_OUT = 1_000
"""Of the shuffled training reviews, the last so many are the validation split."""
SHUFFLE_SEED = 0

Batch = list[str]
"""Consecutive lines, line ends included."""


def read_lines(place: Place, split: str) -> Iterator[Batch]:
    """The lines of a split. DataError, one line that names file and line, where a file is damaged, empty, not UTF-8, or missing.

    A row of a table and a review are a document: its lines, with one end of line after the last.
    """
    if place.what == "imdb":
        yield from _batches(_reviews(place, split))
        return
    check_whole(place.of(split))
    for path in place.of(split):
        if not path.stat().st_size:
            raise DataError(f"{path}: empty: copy it again")
        if place.layout == "lines":
            yield from _file_lines(path, is_wikitext=place.what != "text")
        else:
            yield from _batches(_documents(path, blank=" \n" if place.what == "wikitext103" else "\n"))


def count(batches: Iterable[Batch]) -> Counted:
    """Lines, words and `<unk>` of a text."""
    lines, words, unknown = 0, 0, 0
    for batch in batches:
        lines += len(batch)
        words += len(batch) + sum(len(line.split()) for line in batch)
        unknown += sum(line.count(UNKNOWN) for line in batch)
    return Counted(lines, words, unknown)


def _file_lines(path: Path, is_wikitext: bool) -> Iterator[Batch]:
    """Lines of a text file, gzipped or not."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while lines := file.readlines(BATCH_BYTES):
                if is_wikitext and lines[0].endswith(b"\r\n"):
                    raise DataError(f"{path}:{number + 1}: ends with CR LF, WikiText's lines with LF: unpack the archive again, as binary")
                try:
                    yield [line.decode() for line in lines]
                except UnicodeDecodeError:
                    raise DataError(f"{path}:{number + 1 + _undecodable(lines)}: not UTF-8: copy the file again, or convert it") from None
                number += len(lines)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path}: cut short or damaged after line {number}: copy it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _undecodable(lines: list[bytes]) -> int:
    """Which line is the first that is not UTF-8."""
    for i, line in enumerate(lines):
        try:
            line.decode()
        except UnicodeDecodeError:
            return i
    return len(lines)


def _documents(path: Path, blank: str) -> Iterator[str]:
    """Texts of a table; an empty one is a blank line."""
    is_empty = True
    for where, row in objects(path, ("text",)):
        text = row["text"]
        if not isinstance(text, str):
            raise DataError(f"{where}: text is {type(text).__name__}, expected a string")
        if not _is_unicode(text):
            raise DataError(f"{where}: half of a surrogate pair, which is no character: repair the line")
        is_empty = False
        yield text or blank
    if is_empty:
        raise DataError(f"{path}: no rows: copy it again")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reviews(place: Place, split: str) -> Iterator[str]:
    """Labelled reviews: those of the test file in its order, those of the training file, sorted by class, in a drawn order."""
    source = "test" if split == "test" else "train"
    texts = [text for path in place.of(source) for text, label in review_rows(place.layout, path) if label != UNLABELLED]
    if len(texts) != REVIEWS[source]:
        raise DataError(f"{place}, {source}: {len(texts):,} reviews, expected {REVIEWS[source]:,}: a part of the data, or cut short")
    if odd := [i for i, text in enumerate(texts) if not _is_unicode(text)]:
        raise DataError(f"{place}, {source}: half of a surrogate pair, which is no character, in review {odd[0]}: repair it")
    if source == "test":
        yield from texts
        return
    order = np.random.RandomState(SHUFFLE_SEED).permutation(len(texts))  # the legacy generator: its stream never changes
    kept = order[-HELD_OUT:] if split == "validation" else order[:-HELD_OUT]
    yield from (texts[i] for i in kept)


def _batches(documents: Iterable[str]) -> Iterator[Batch]:
    """Lines of documents."""
    batch: Batch = []
    size = 0
    for document in documents:
        batch += [f"{line}\n" for line in document.removesuffix("\n").split("\n")]
        size += len(document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
