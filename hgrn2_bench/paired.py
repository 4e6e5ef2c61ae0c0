"""Two models over the same items: McNemar's exact test, which looks at the items that one of them has right and the other wrong.

It says whether these two models differ, not whether two methods do: that takes several seeds.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from hgrn2_bench.items import by_tasks, held, scored
from hgrn2_bench.lines import Line, came_trained
from hgrn2_bench.results import Row

LEVEL = 0.05


@dataclass(frozen=True)
class McNemar:
    """How often each of two models alone is right."""

    items: int
    ours_only: int
    theirs_only: int

    @property
    def p(self) -> float:
        """Two-sided and exact: the items on which one alone is right are coin tosses where the models are alike."""
        from scipy.stats import binomtest

        tosses = self.ours_only + self.theirs_only
        return float(binomtest(self.ours_only, tosses).pvalue) if tosses else 1.0

    @property
    def is_clear(self) -> bool:
        """Whether the two differ."""
        return self.p < LEVEL

    def __str__(self) -> str:
        """In words, with p."""
        return f"McNemar over {self.items} items, p={self.p:.2g}"


def of_lines(ours: Line, theirs: Line) -> McNemar | None:
    """The test of two lines of one run each: of fixed models, or of models trained with one seed; else, and as `of_rows` says, None."""
    runs = (*ours.runs, *theirs.runs)
    fixed = all(came_trained(run.row) for run in runs)
    alike = len(ours.runs) == len(theirs.runs) == 1 and (fixed or runs[0].row.seed == runs[1].row.seed)
    return of_rows(ours.first, theirs.first) if alike and all(run.value is not None for run in runs) else None


def of_rows(ours: Row, theirs: Row) -> McNemar | None:
    """The test over the items that two rows' scores are made of.

    None where these are not the same, where their metric is not right or wrong, and where not every item counts alike.
    """
    tasks = scored(ours)
    if not tasks or tasks != scored(theirs) or by_tasks(ours) or by_tasks(theirs):
        return None
    pairs = [(held(ours, *each), held(theirs, *each)) for each in tasks.items()]
    if any(not a or [a["docs"], a["n"]] != [b.get("docs"), b.get("n")] for a, b in pairs):
        return None
    counts: Sequence[tuple[int, int, int]] = [_counts(a["n"], a["bits"], b["bits"]) for a, b in pairs]
    return McNemar(*map(sum, zip(*counts, strict=True)))


def _counts(n: int, ours: str, theirs: str) -> tuple[int, int, int]:
    """The number of items, and of those that the one or the other alone has right; `numpy.packbits` fills the last byte with zeros."""
    a, b = (int.from_bytes(base64.b64decode(bits)) for bits in (ours, theirs))
    return n, (a & ~b).bit_count(), (b & ~a).bit_count()
