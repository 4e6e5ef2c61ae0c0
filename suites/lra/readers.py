"""Real data of every task from a folder of the user's, whatever its layout; ListOps is read where it is tokenised."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hgrn2_bench.errors import unknown
from suites.lra.images import ImageOptions, read_images
from suites.lra.items import Split
from suites.lra.pathfinder_files import PathfinderOptions, read_pathfinder
from suites.lra.places import find
from suites.lra.retrieval import RetrievalOptions, read_retrieval
from suites.lra.text import TextOptions, read_text


class Reader(NamedTuple):
    """How a task's data are read."""

    options: type
    read: Callable[..., dict[str, Split]]
    """(Place, options) -> splits."""


READERS = {
    "text": Reader(TextOptions, read_text),
    "retrieval": Reader(RetrievalOptions, read_retrieval),
    "image": Reader(ImageOptions, read_images),
    "pathfinder": Reader(PathfinderOptions, read_pathfinder),
    "pathx": Reader(PathfinderOptions, read_pathfinder),
}


def read(task: str, root: Path, **options: Any) -> dict[str, Split]:
    """The splits train, val and test of a task, found anywhere in `root`; options are the fields of the reader's own record.

    ConfigError where the data are not there, or there twice; DataError, one line that names file and line, where they are damaged.
    """
    if task not in READERS:
        raise unknown("task with a reader", task, READERS)
    return READERS[task].read(find(root, task), READERS[task].options(**options))
