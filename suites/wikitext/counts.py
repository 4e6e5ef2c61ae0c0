"""What whole files of WikiText-103 hold, and what tells WikiText-2 from it.

Lines, words and the `<unk>` of WikiText-2 in validation and test were counted on the real files (WikiText-2 has the same articles there);
numbers of the training split are the literature's (arXiv 1609.07843), so that a small difference only warns.
"""

import warnings
from dataclasses import dataclass

from hgrn2_bench.errors import DataError

TYPES = 267_735
"""Of the training split, `<unk>` and the end of line included."""
UNKNOWN = "<unk>"
MAX_UNKNOWN = 0.02
"""Share of `<unk>` in validation and test: 0.004 in WikiText-103, whose vocabulary is the larger, 0.05 in WikiText-2."""
LEAST_TRAIN = 0.9
"""Share of the training words; below it no difference of versions explains what is missing."""
INSTEAD = "give wikitext-103/wiki.{train,valid,test}.tokens, or wikitext-103-raw"


@dataclass(frozen=True)
class Whole:
    """What a whole split has."""

    lines: int
    words: int
    """White-space separated, and one for each end of line."""


SPLITS = {"train": Whole(1_801_350, 103_227_021), "validation": Whole(3_760, 217_646), "test": Whole(4_358, 245_569)}
TRAIN_2 = Whole(36_718, 2_088_628)
"""WikiText-2."""


@dataclass(frozen=True)
class Counted:
    """What a split was found to have."""

    lines: int
    words: int
    """White-space separated, and one for each end of line."""
    unknown: int
    """How many of them are `<unk>`."""


def refuse_wrong(where: str, split: str, found: Counted) -> None:
    """DataError, which begins with `where`, for a split that is not WikiText-103's; a warning where only the literature knows."""
    if fault := fault_of(split, found):
        raise DataError(f"{where}: {fault}")
    if doubt := doubt_of(split, found):
        warnings.warn(f"{where}: {doubt}", stacklevel=2)


def fault_of(split: str, found: Counted) -> str:
    """What is certainly wrong with a split of WikiText-103, with the remedy; empty where nothing is."""
    whole = SPLITS[split]
    is_train = split == "train"
    if is_train and TRAIN_2 in (Whole(found.lines, found.words), Whole(found.lines, TRAIN_2.words)):
        return f"this is WikiText-2 ({found.lines:,} lines), not WikiText-103: {INSTEAD}"
    if not is_train and found.unknown > MAX_UNKNOWN * found.words:
        return f"{found.unknown:,} {UNKNOWN} of {found.words:,} words: this is WikiText-2, not WikiText-103: {INSTEAD}"
    if found.words < whole.words * (LEAST_TRAIN if is_train else 1) or (not is_train and found != with_counts(whole, found)):
        return f"{_numbers(found)}, WikiText-103 has {_numbers(whole)}: cut short or another text, copy it again"
    return ""


def with_counts(whole: Whole, found: Counted) -> Counted:
    """What would have been found in a whole split."""
    return Counted(whole.lines, whole.words, found.unknown)


def doubt_of(split: str, found: Counted) -> str:
    """How a split differs from what only the literature knows; empty where it does not."""
    whole = SPLITS[split]
    return "" if found == with_counts(whole, found) else f"{_numbers(found)}; the literature has {_numbers(whole)}"


def words_of_lines(split: str, lines: int) -> int:
    """Words of a split that is known by its number of lines alone: the lines themselves where it is not whole."""
    return SPLITS[split].words if lines == SPLITS[split].lines else lines


def _numbers(of: Whole | Counted) -> str:
    return f"{of.lines:,} lines and {of.words:,} words with their ends of line"
