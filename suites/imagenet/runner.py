"""Runs one cell of the imagenet suite: its pictures on the device, its model, its loss, its accuracies.

Shape letters: N pictures of a split, B of a batch, H height, W width, C channels, K classes.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hgrn2_bench import distributed, measure, registry
from hgrn2_bench.engine import Shape
from hgrn2_bench.pixels import shifted
from hgrn2_bench.plan import Cell
from hgrn2_bench.protocol import Metric
from hgrn2_bench.steps import Batch, replayed
from hgrn2_bench.timing import wait
from hgrn2_bench.trainer import DivergedError
from hgrn2_bench.vision import Patches, VisionModel
from suites.imagenet import drawn
from suites.imagenet.feed import Ahead, Feed, evaluation_transform, images_per_s, loader, training_transform, workers_here
from suites.imagenet.mixing import draw_mixes, erase, mixed, neighbours, shares
from suites.imagenet.order import ALTER, ERASE, MIX, Order, Wanted
from suites.imagenet.pictures import Pictures, PictureSplit, load
from suites.imagenet.settings import DRAWN
from suites.imagenet.task import TaskConfig

TOP = 5
NORMAL = {
    # mean and standard deviation per channel of pixels in 0 .. 1
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion": ((0.286,), (0.353,)),
    DRAWN: ((0.5,), (0.25,)),
}
IMAGENET_NORMAL = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pictures_of(config: TaskConfig) -> Pictures:
    """The pictures of a cell, read or drawn once in a process."""
    return drawn.pictures(config) if config.dataset == DRAWN else load(config)


class Runner:
    """One cell of the suite; see `hgrn2_bench.engine.Runner`."""

    truncated = 0

    def __init__(self, cell: Cell) -> None:
        self.config: TaskConfig = cell.data
        self.pictures = pictures_of(self.config)
        self.data_hash, self.skipped = self.pictures.hash, self.pictures.skipped
        self.seed, self.device, self.dtype = cell.seed, cell.device, cell.dtype
        self.eval_batch_size = cell.train.eval_batch_size
        train = self.pictures.splits["train"]
        self.order = Order(self.config, self.seed, len(train), cell.train.batch_size)
        self.steps_per_epoch = self.order.steps_per_epoch
        self.held = {name: self._held(split) for name, split in self.pictures.splits.items() if split.pixels_NHWC is not None}
        self.on_device = bool(self.held) and self.config.augment in ("none", "shift_flip")
        self.labels = {name: torch.from_numpy(split.labels_N).to(self.device) for name, split in self.pictures.splits.items()}
        normal = torch.tensor(NORMAL.get(self.config.dataset, IMAGENET_NORMAL), device=self.device)
        self.mean_C11, self.sd_C11 = normal[..., None, None]
        self.taken: torch.cuda.Event | None = None
        """When the device had the last batch from the host."""
        if not self.on_device:
            transform = training_transform if self.config.augment != "none" else evaluation_transform
            self.ahead = Ahead(Feed(train, transform(self.config)), self.order.wanted, self.device)

    def _held(self, split: PictureSplit) -> Tensor:
        """The pixels of a split on the device, (N, H, W, C); grey ones three times where timm makes them so."""
        pixels_NHWC = torch.from_numpy(split.pixels_NHWC).to(self.device)
        return pixels_NHWC.expand(-1, -1, -1, self.config.channels) if pixels_NHWC.shape[-1] == 1 else pixels_NHWC

    @staticmethod
    def shape(cell: Cell) -> Shape:
        """Size of the task; the files are listed for it, and no picture is decoded."""
        config: TaskConfig = cell.data
        train = len(pictures_of(config).splits["train"])
        steps = max(1, train // cell.train.batch_size)
        tokens = min(cell.train.batch_size, train * config.repeats) * config.tokens
        return Shape(config.tokens, 1 / config.tokens, steps_per_epoch=steps, tokens_per_epoch=steps * tokens, step_tokens=tokens)

    @staticmethod
    def build(cell: Cell) -> VisionModel:
        """The model of a cell, on the CPU."""
        config: TaskConfig = cell.data
        patches = Patches((config.image_size, config.image_size), config.patch, config.channels, config.pool == "token")
        classes = len(pictures_of(config).classes)
        return VisionModel(cell.model_config, registry.load(cell.model_ref), cell.settings, cell.backend, patches, classes)

    def batch(self, step: int) -> Batch:
        """Batch `step`, a function of (seed, step): this process's pictures (B, C, H, W), and the labels of all.

        Where pictures are mixed also the labels of their neighbours, and how much of the own label counts.
        """
        rows_B = self.order.rows(step)
        own = self.order.own(len(rows_B))
        images_BCHW = self._images(step, rows_B, own)
        labels_B = self.labels["train"][self._there(rows_B)]
        if not self.config.mixes:
            return images_BCHW, labels_B
        mixes = draw_mixes(self.config, len(rows_B), np.random.default_rng([self.seed, MIX, step]))
        images_BCHW = mixed(images_BCHW, mixes, own.start, self.config.mix_group)
        others_B = labels_B[neighbours(len(labels_B), labels_B.device)]
        return images_BCHW, labels_B, others_B, shares(mixes, len(labels_B), self.config.mix_group).to(self.device, non_blocking=True)

    def _there(self, rows_B: np.ndarray) -> Tensor:
        """Numbers of pictures on the device, for which the host does not wait until earlier steps are done."""
        return torch.from_numpy(rows_B).to(self.device, non_blocking=True)

    def _images(self, step: int, rows_B: np.ndarray, own: slice) -> Tensor:
        """The normalised pictures at some places of a batch."""
        if not self.on_device:
            images_BCHW = self._normal(self._ahead(step))
            if self.config.augment == "timm" and self.config.erasing:
                erase(images_BCHW, self.config, [(self.seed, ERASE, step, i) for i in range(own.start, own.stop)])
            return images_BCHW
        whole = self.config.augment == "shift_flip"  # drawn for the whole batch, so that each process draws the same
        pixels_BHWC = self.held["train"][self._there(rows_B if whole else rows_B[own])]
        if whole:
            pixels_BHWC = shifted(pixels_BHWC, np.random.default_rng([self.seed, ALTER, step]))[own]
        return self._normal(pixels_BHWC.permute(0, 3, 1, 2))

    def _ahead(self, step: int) -> Tensor:
        """The pictures of a step as bytes, for the device to copy: once it has the last ones, so that few wait in pinned memory."""
        if self.taken is not None:
            self.taken.synchronize()
        bytes_BCHW = self.ahead.batch(step)
        if self.device != "cuda":
            return bytes_BCHW
        bytes_BCHW, self.taken = bytes_BCHW.to(self.device, non_blocking=True), torch.cuda.Event(blocking=True)
        self.taken.record()
        return bytes_BCHW

    def _normal(self, bytes_BCHW: Tensor) -> Tensor:
        """Numbers as a model takes them, on the device."""
        images_BCHW: Tensor = (bytes_BCHW.to(self.device, non_blocking=True).float() / 255 - self.mean_C11) / self.sd_C11
        return images_BCHW.contiguous()

    def tokens(self, batch: Batch) -> int:
        """Tokens of a batch, over all processes."""
        return len(batch[1]) * self.config.tokens

    def size(self, batch: Batch) -> int:
        """Pictures of a batch."""
        return len(batch[1])

    def targets(self, batch: Batch) -> int:
        """Labels of a batch, or of a part."""
        return len(batch[1])

    def part(self, batch: Batch, rows: slice) -> Batch:
        """Some pictures of a batch, of which this process may hold its own alone; any one where it holds none of them."""
        images_BCHW, *labels = batch
        first = self.order.own(len(labels[0])).start
        begin = rows.start - first if first <= rows.start < first + len(images_BCHW) else 0
        return images_BCHW[begin : begin + rows.stop - rows.start], *(each_B[rows] for each_B in labels)

    def loss(self, model: VisionModel, batch: Batch) -> Tensor:
        """Mean cross-entropy in float32, against smoothed labels and those of both pictures of a pair."""
        images_BCHW, labels_B, *pair = batch
        logits_BK = model.logits(images_BCHW).float()
        if not pair:
            return F.cross_entropy(logits_BK, labels_B, label_smoothing=self.config.smoothing)
        own_B, other_B = (
            F.cross_entropy(logits_BK, each_B, label_smoothing=self.config.smoothing, reduction="none") for each_B in (labels_B, pair[0])
        )
        return (pair[1] * own_B + (1 - pair[1]) * other_B).mean()

    def score(self, model: VisionModel, split: str) -> float:
        """Top-1 accuracy on a split."""
        return self.metrics(model, split)[0].value

    def report(self, model: VisionModel) -> Sequence[Metric]:
        """Every accuracy on validation and test data; top-1 first."""
        return [metric for split in ("validation", "test") for metric in self.metrics(model, split)]

    @torch.no_grad()
    def metrics(self, model: VisionModel, split: str) -> list[Metric]:
        """Top-1, top-5 where there are more classes, and ReaL: each picture once, whoever scores it. DivergedError at logits not finite."""
        number, classes = len(self.labels[split]), len(self.pictures.classes)
        real = self.pictures.real_labels if split == "test" else None
        counts = torch.zeros(5, dtype=torch.int64, device=self.device)
        for rows_B, images_BCHW in self._scored(split):
            logits_BK = model.logits(images_BCHW).float()
            ranked_BK = logits_BK.topk(min(TOP, classes)).indices
            hit_BK = ranked_BK == self.labels[split][self._there(rows_B)][:, None]
            counts[:3] += torch.stack([hit_BK[:, 0].sum(), hit_BK.any(1).sum(), torch.isfinite(logits_BK).all(1).sum()])
            if real is not None:
                given = zip(rows_B.tolist(), ranked_BK[:, 0].tolist(), strict=True)
                hits = [best in real[row] for row, best in given if real[row]]
                counts[3:] += torch.tensor([sum(hits), len(hits)], device=self.device)
        top1, top5, sound, right, labelled = distributed.summed(counts).tolist()
        if sound != number:
            raise DivergedError(f"logits on {split} data are not finite")
        found = [Metric(split, "top1", top1 / number, number, self._floors(split))]
        found += [Metric(split, "top5", top5 / number, number, {"chance": TOP / classes})] * (classes > TOP)
        return found + ([] if real is None else [Metric(split, "real", right / labelled, labelled)])

    def _scored(self, split: str) -> Iterator[tuple[np.ndarray, Tensor]]:
        """The pictures of a split that this process scores, in batches, with their numbers."""
        world = distributed.current()
        rows_N = np.arange(len(self.labels[split]))[world.rank :: world.size]
        batches = [rows_N[i : i + self.eval_batch_size] for i in range(0, len(rows_N), self.eval_batch_size)]
        if self.held:
            for rows_B in batches:
                pixels_BHWC = self.held[split][self._there(rows_B)]
                yield rows_B, self._normal(pixels_BHWC.permute(0, 3, 1, 2))
            return
        feed = Feed(self.pictures.splits[split], evaluation_transform(self.config))
        wanted = [[Wanted(int(row)) for row in rows_B] for rows_B in batches]
        for rows_B, bytes_BCHW in zip(batches, loader(feed, wanted, self.device), strict=True):
            yield rows_B, self._normal(bytes_BCHW)

    def _floors(self, split: str) -> Mapping[str, float]:
        """Accuracy of the class that is most frequent in training, and of guessing."""
        most = int(torch.bincount(self.labels["train"]).argmax())
        majority = (self.labels[split] == most).double().mean().item()
        return {"majority": round(majority, 4), "chance": round(1 / len(self.pictures.classes), 4)}

    @torch.no_grad()
    def details(self, model: VisionModel) -> dict[str, Any]:
        """Work for one picture, and how fast and in how much memory a batch of them is classified."""
        config = self.config
        flops = measure.train_flops_per_token(model, config.tokens, 1 / config.tokens)
        number = min(self.eval_batch_size, len(self.labels["test"]))
        images_BCHW = torch.randn(number, config.channels, config.image_size, config.image_size, device=self.device)

        def classify() -> Tensor:
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
                return model.logits(images_BCHW)

        gpu = self.device == "cuda"
        call: Callable[[], object] = classify
        mode = "eager"
        if gpu:
            torch.cuda.reset_peak_memory_stats()
            call, mode = replayed(classify)
        peak = int(torch.cuda.max_memory_allocated()) if gpu else None
        seconds = []
        for _ in range(13 if gpu else 2):
            began = time.perf_counter()
            call()
            wait(self.device)
            seconds.append(time.perf_counter() - began)
        return {
            "tokens_per_image": config.tokens,
            "forward_flops_per_image": None if flops is None else flops / 3 * config.tokens,
            "inference_images_per_s": number / float(np.median(seconds[3 if gpu else 1 :])),
            "inference_batch": number,
            "inference_mode": mode,
            "inference_peak_bytes": peak,
            "loader_images_per_s": None if self.on_device else images_per_s(self.ahead),
            "loader_workers": None if self.on_device else workers_here(),
        }
