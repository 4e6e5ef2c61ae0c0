"""What `data imagenet check` tells of the pictures themselves: damaged ones, and odd ones that decode all the same."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hgrn2_bench.doctor import NOTE, OK, PROBLEM, Finding, counted
from hgrn2_bench.errors import DataError
from suites.imagenet.decode import decode_aloud, oddities, quiet
from suites.imagenet.stored import Stored

FULL = "HGRN2_BENCH_CHECK"
"""Set to `full`, every picture is decoded."""
SAMPLE, SEED = 10_000, 0
"""Of a split of more pictures, so many are decoded, drawn by the seed; with FULL, all."""
NAMED = 5
"""Files named in one line."""
REMEDIES = {
    "grey": "read as RGB with three equal channels",
    "CMYK": "read as RGB",
    "turned by EXIF": "read as stored, as published results have them; orientation=exif turns them",
}
READ_BY_CONTENT = "read by their content, as RGB"


def picture_findings(title: str, stored: Stored) -> Iterator[Finding]:
    """A line for the damaged pictures of a split, and one for each kind of odd ones; `title` names the split."""
    asked = len(stored) if os.environ.get(FULL) == "full" else min(SAMPLE, len(stored))
    tried = np.sort(np.random.default_rng(SEED).choice(len(stored), asked, replace=False)).tolist()
    which = f"all {len(tried):,}" if len(tried) == len(stored) else f"a sample of {len(tried):,} of {len(stored):,}"
    more = "" if len(tried) == len(stored) else f" ({FULL}=full tries all)"
    damaged: list[str] = []
    odd: dict[str, list[str]] = {}
    with quiet(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # Pillow decodes outside Python's lock
        for where, fault, kinds in pool.map(lambda i: _tried(stored, i), tried):
            damaged += [fault] if fault else []
            for kind in kinds:
                odd.setdefault(kind, []).append(where)
    if damaged:
        remedy = "copy them again; a run stops at one, or with policy=skip leaves them out and counts them"
        named = "; ".join(damaged[:NAMED])
        yield Finding(PROBLEM, f"{title}: {counted(len(damaged), 'damaged picture')} in {which}: {named}{_more(damaged)}", remedy)
    else:
        yield Finding(OK, f"{title}: {which} pictures decode{more}")
    for kind, places in sorted(odd.items()):
        text = f"{title}: {counted(len(places), 'picture')} {kind} in {which}: {', '.join(places[:NAMED])}{_more(places)}"
        yield Finding(NOTE, text, REMEDIES.get(kind, READ_BY_CONTENT))


def _tried(stored: Stored, i: int) -> tuple[str, str, list[str]]:
    """Where picture i is, what is wrong with it, and what is odd about it."""
    where = stored.where(i)
    try:
        content = stored.read(i)
        decode_aloud(content, where)
        return where, "", oddities(content, where)
    except DataError as error:
        return where, str(error), []


def _more(listed: list[str]) -> str:
    return ", ..." if len(listed) > NAMED else ""
