"""The splits of a cell's task, from files, from a generator, or invented."""

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.files import cache_folder, data_folder
from suites.lra import images, listops, listops_ids, pathfinder, pathfinder_files, readers, retrieval, shards, standins, text
from suites.lra.items import Split, Texts
from suites.lra.places import find
from suites.lra.protocol import LRAConfig

HELD_OUT = 0.1
"""Of text's training data, where an honest validation split is asked for."""
DATA_SEED = 0
"""A generated task is one data set, whatever the cell's seed."""
PATHFINDER_VERSION = 1
SHARD_PIXELS = 1 << 22


@dataclass(frozen=True)
class Data:
    """A task's splits `train`, `validation` and `test`."""

    splits: Mapping[str, Split]

    @property
    def truncated(self) -> int:
        """Items that were cut."""
        return sum(split.truncated for split in self.splits.values())

    @property
    def skipped(self) -> int:
        """Items that were left out as damaged."""
        return sum(sum(split.skipped.values()) for split in self.splits.values())

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits over every item."""
        digest = hashlib.sha256()
        for name in sorted(self.splits):
            split = self.splits[name]
            for part in (split.inputs, split.second):
                arrays = (part.ids_S, part.ends_N) if isinstance(part, Texts) else () if part is None else (part,)
                for array in arrays:
                    digest.update(np.ascontiguousarray(array).data)
            digest.update(split.labels_N.data)
        return digest.hexdigest()[:16]


def published_sizes(dataset: str) -> tuple[int, int, int]:
    """Items of train, validation and test as published, from what the files must hold; text's test data are its validation data too."""
    whole = {"listops": listops.COUNTS, "text": text.COUNTS, "retrieval": retrieval.COUNTS, "image": images.COUNTS}
    if dataset not in whole:
        number = pathfinder_files.COUNT
        held_out = int(number * pathfinder_files.PathfinderOptions().held_out)
        return number - 2 * held_out, held_out, held_out
    counts = whole[dataset]
    if dataset == "image":
        train = int(counts["train"] * (1 - images.ImageOptions().val_split))
        return train, counts["train"] - train, counts["test"]
    return counts["train"], counts.get("val", counts["test"]), counts["test"]


def sizes(config: LRAConfig) -> dict[str, int]:
    """Items of each split that a configuration asks for, known without the data."""
    train, validation, test = published_sizes(config.dataset)
    if config.dataset == "text" and config.validation == "split":
        validation = int(train * HELD_OUT)
        train -= validation
    asked = {"train": config.train_examples, "validation": config.validation_examples, "test": config.test_examples}
    return {name: asked[name] or there for name, there in (("train", train), ("validation", validation), ("test", test))}


@functools.lru_cache(maxsize=2)
def load(config: LRAConfig) -> Data:
    """The data of a task; cells of one worker that share them read them once. ConfigError where they are not there."""
    made = {"files": _read, "generated": _generate, "standin": _invent}[config.source](config)
    for name, wanted in sizes(config).items():
        split = made.splits[name]
        if len(split) + sum(split.skipped.values()) < wanted:
            raise ConfigError(f"{config.dataset} has {len(split)} {name} items, {wanted} are wanted")
    return made


def vocab_size(config: LRAConfig) -> int:
    """Ids of a task of tokens; of real text they are counted in its training data."""
    if config.dataset == "listops":
        return len(listops.TOKENS) + len(listops_ids.SPECIALS)
    return standins.VOCABULARY if config.source == "standin" else load(config).splits["train"].vocab_size


def _read(config: LRAConfig) -> Data:
    """The user's files; a part of a split is drawn by the split's own seed."""
    root, wanted = data_folder(), {"val" if name == "validation" else name: count for name, count in sizes(config).items()}
    if config.dataset == "listops":
        return Data(_named(listops_ids.splits(listops.read(find(root, "listops").folder), config.longest, wanted)))
    options: dict[str, dict[str, object]] = {
        "text": {"max_length": config.longest, "val_split": HELD_OUT if config.validation == "split" else 0.0},
        "retrieval": {"max_length": config.longest},
        "image": {"grey": config.colour == "grey"},
        "pathfinder": {"difficulty": f"curv_contour_length_{config.contour_length}"},
        "pathx": {"difficulty": f"curv_contour_length_{config.contour_length}"},
    }
    return Data(_named(readers.read(config.dataset, root, **options[config.dataset], items=wanted)))


def _named(splits: Mapping[str, Split]) -> dict[str, Split]:
    """Splits under the names that rows have."""
    return {"validation" if name == "val" else name: split for name, split in splits.items()}


def _generate(config: LRAConfig) -> Data:
    """Made once, then read from the cache."""
    wanted, workers = sizes(config), len(os.sched_getaffinity(0))
    if config.dataset == "listops":
        task = listops.ListOps(config.min_tokens, config.max_tokens, config.max_depth)
        return Data(_named(listops_ids.splits(listops.generate(task, DATA_SEED, wanted, cache_folder("lra"), workers), config.longest)))
    drawn = pathfinder.parameters(config.resolution, config.contour_length)
    key = {"version": PATHFINDER_VERSION, "resolution": config.resolution, "contour_length": config.contour_length, "seed": DATA_SEED}
    make = functools.partial(pathfinder.draw_many, drawn, DATA_SEED)
    source = shards.Source("pathfinder", key, make, max(1, SHARD_PIXELS // config.resolution**2 // 16))
    splits, start = {}, 0
    for name, count in wanted.items():
        arrays = shards.generate(cache_folder("lra"), source, range(start, start + count), workers)
        splits[name] = Split(arrays["images"][..., None], arrays["labels"].astype(np.int64))
        start += count
    return Data(splits)


def _invent(config: LRAConfig) -> Data:
    """Stand-ins, made anew each time: that takes a second."""
    maker = {
        "text": lambda count, place: standins.texts(count, config.longest, DATA_SEED, place),
        "retrieval": lambda count, place: standins.pairs(count, config.longest, DATA_SEED, place),
        "image": lambda count, place: standins.images(count, {"grey": 1, "rgb": 3}[config.colour], DATA_SEED, place),
    }[config.dataset]
    splits = {name: maker(count, place) for place, (name, count) in enumerate(sizes(config).items())}
    return Data(splits)
