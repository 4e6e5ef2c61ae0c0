"""Pictures that must be decoded, or altered by timm: made by worker processes ahead of the step that needs them.

A picture of a batch follows from (seed, step, its place in the batch) alone: neither the number of workers nor an interruption changes it.
Workers give bytes; the device makes numbers of them.

Shape letters: B pictures, C channels, H height, W width.
"""

import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hgrn2_bench import distributed
from hgrn2_bench.rows import needed
from hgrn2_bench.seeding import seeded
from suites.imagenet.decode import INSTALL
from suites.imagenet.order import Wanted
from suites.imagenet.pictures import PictureSplit
from suites.imagenet.task import TaskConfig

MOST_WORKERS = 16
"""Worker processes of one process that trains; each works two batches ahead, as DataLoader has it."""
LEAST_ROUNDS, TIMED_S = 2, 1.0
"""Over which a feed is timed, at least: batches of each worker, and seconds."""
STRONGEST = 9.99
"""Magnitude of an operation of RandAugment, of 10: at 10 timm asks Pillow to keep no bit of a colour, which Pillow refuses by now."""
Transform = Callable[[Any], np.ndarray]


def training_transform(config: TaskConfig) -> Transform:
    """What timm does to a training picture, all but erasing: a picture to bytes (C, H, W)."""
    made = _timm().create_transform(
        config.image_size,
        is_training=True,
        use_prefetcher=True,
        color_jitter=config.jitter if config.augment == "timm" else 0.0,
        auto_augment=config.randaugment if config.augment == "timm" else None,
        interpolation="bicubic",
        re_prob=0.0,
    )
    for step in made.transforms:
        for operation in getattr(step, "ops", ()):
            operation.magnitude_max = STRONGEST
    transform: Transform = made
    return transform


def evaluation_transform(config: TaskConfig) -> Transform:
    """The middle of a picture, resized so that the crop is `config.crop` of its shorter side: a picture to bytes (C, H, W)."""
    crop = 1.0 if config.resident else config.crop
    made: Transform = _timm().create_transform(
        config.image_size, is_training=False, use_prefetcher=True, interpolation="bicubic", crop_pct=crop
    )
    return made


def _timm() -> Any:
    return needed("timm.data", "timm", "augmenting and resizing pictures", INSTALL)


class Feed(Dataset[Tensor]):
    """The pictures of a split, each transformed under its own seed."""

    def __init__(self, split: PictureSplit, transform: Transform) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.split)

    def __getitem__(self, wanted: Wanted) -> Tensor:
        """One picture, bytes (C, H, W)."""
        image = self.split.image(wanted.number)
        if not wanted.seed:
            return torch.as_tensor(self.transform(image))
        with seeded(*np.random.SeedSequence(wanted.seed).generate_state(3).tolist()):
            return torch.as_tensor(self.transform(image))


class Ahead:
    """Batches in the order of their steps, made ahead; a step out of order starts anew from there.

    `wanted(step)` gives the pictures of a batch.
    """

    def __init__(self, feed: Feed, wanted: Callable[[int], list[Wanted]], device: str) -> None:
        self.feed, self.wanted, self.device = feed, wanted, device
        self.next_step, self.batches = -1, iter(())

    def batch(self, step: int) -> Tensor:
        """The pictures of one step, bytes (B, C, H, W) on the host."""
        if step != self.next_step:
            self.batches = iter(())  # its workers end before others are forked, which would hold copies of it
            self.batches = iter(loader(self.feed, _Endless(self.wanted, step), self.device))
        self.next_step = step + 1
        return next(self.batches)


def images_per_s(source: Ahead) -> float:
    """Pictures a second of one process's training batches, read again from the first one with nothing else to do.

    Workers that began together end a batch each at about the same time, so that whole rounds of them are counted, but for the first, which
    waits for them to start.
    """
    again, workers = Ahead(source.feed, source.wanted, source.device), max(1, workers_here())
    steps = itertools.count()

    def round_of_batches() -> int:
        return sum(len(again.batch(step)) for step in itertools.islice(steps, workers))

    round_of_batches()
    began, pictures, rounds = time.perf_counter(), 0, 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - began < TIMED_S:
        pictures += round_of_batches()
        rounds += 1
    return pictures / (time.perf_counter() - began)


class _Endless:
    """The batches from one step on."""

    def __init__(self, wanted: Callable[[int], list[Wanted]], step: int) -> None:
        self.wanted, self.step = wanted, step

    def __iter__(self) -> Iterator[list[Wanted]]:
        step = self.step
        while True:
            yield self.wanted(step)
            step += 1


def loader(feed: Feed, batches: Any, device: str) -> DataLoader[Tensor]:
    """Batches of a feed, by worker processes where this process has processors to spare.

    They are forked from a server that has imported torch and timm once and holds nothing else: a loader is made for every evaluation, and
    processes that each import both would take longer than what they read.
    """
    workers = workers_here()
    ahead: dict[str, Any] = {}
    if workers:
        ahead = {"multiprocessing_context": _server(), "worker_init_fn": _end_with_parent}
    own = torch.Generator()  # or it would draw its workers' seeds from the one that dropout draws from
    return DataLoader(feed, batch_sampler=batches, num_workers=workers, pin_memory=device == "cuda", generator=own, **ahead)


def _server() -> BaseContext:
    """Where worker processes come from; neither CUDA nor a thread is in it.

    Each worker imports the program's main module again, whose imports are those of `hgrn2_bench.cli`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hgrn2_bench.cli", "timm.data", __name__])
    return context


def _end_with_parent(_worker: int) -> None:
    """End this worker process when the one that reads its batches is gone: torch asks whether its own parent, the server, is."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def workers_here() -> int:
    """Worker processes for this process: its share of the host's processors but one, none where it has a single one."""
    share = len(os.sched_getaffinity(0)) // distributed.current().local_size
    return min(MOST_WORKERS, share - 1) if share > 1 else 0
