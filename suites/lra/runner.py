"""Runs one LRA cell: its data on the device, its model, its loss, its accuracy.

Shape letters: N items, B batch, P pairs, T time, S tokens of all items, H height, W width, C channels.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hgrn2_bench import registry
from hgrn2_bench.classifier import Classifier
from hgrn2_bench.engine import Shape
from hgrn2_bench.pixels import shifted
from hgrn2_bench.plan import Cell
from hgrn2_bench.protocol import Metric
from hgrn2_bench.steps import Batch
from hgrn2_bench.trainer import DivergedError
from suites.lra.data import Data, load, sizes, vocab_size
from suites.lra.items import Split, Texts
from suites.lra.protocol import CLASSES, WORDS, LRAConfig

ROUND, LENGTHS = 64, 16
"""Padding that the model skips fills a batch of texts up to one of at most LENGTHS lengths, multiples of ROUND tokens: for each the GPU
holds a recorded step. Padding that is read as text ends with the longest text, as in the published runs."""
WINDOW = 50
"""Batches whose texts are sorted by length together."""
EVAL_TOKENS = 1 << 18
"""Tokens that a model reads at once where it is scored: both documents of a pair count, and a text read both ways counts twice."""
NORMAL = {
    # mean and standard deviation per channel of pixels in 0 .. 1: state-spaces/s4 for grey, OpenNLPLab/lra for colour
    ("image", "grey"): ((122.6 / 255,), (61.0 / 255,)),
    ("image", "rgb"): ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
}


class Documents:
    """Texts on a device: their ids one after another (S), where each begins, and how long it is."""

    def __init__(self, texts: Texts, device: str) -> None:
        self.lengths_N = texts.lengths_N
        self.ids_S = torch.from_numpy(texts.ids_S).to(device)
        self.starts_N = torch.from_numpy(texts.ends_N - self.lengths_N).to(device)
        self.on_device_N = torch.from_numpy(self.lengths_N).to(device)

    def batch(self, rows_B: Tensor, T: int) -> tuple[Tensor, Tensor]:
        """Ids (B, T), 0 after the end of each, and lengths (B,)."""
        lengths_B, place_T = self.on_device_N[rows_B], torch.arange(T, device=rows_B.device)
        where_BT = (self.starts_N[rows_B][:, None] + place_T).clamp_(max=len(self.ids_S) - 1)
        return self.ids_S[where_BT].long().masked_fill_(place_T >= lengths_B[:, None], 0), lengths_B


class Items:
    """One split on a device."""

    def __init__(self, split: Split, config: LRAConfig, device: str) -> None:
        self.config, self.device = config, device
        self.labels_N = torch.from_numpy(split.labels_N).to(device)
        parts = [part for part in (split.inputs, split.second) if part is not None]
        self.documents = [Documents(part, device) for part in parts if isinstance(part, Texts)]
        self.pixels_NHWC = None if self.documents else torch.from_numpy(split.inputs).to(device)
        lengths = [each.lengths_N for each in self.documents]
        self.lengths_N = np.maximum.reduce(lengths) if lengths else np.full(len(split), config.longest)

    def __len__(self) -> int:
        """Number of items."""
        return len(self.labels_N)

    def batch(self, rows: np.ndarray, augmented_by: Sequence[int] = ()) -> Batch:
        """Inputs (B, T) or (B, T, C), lengths (B,) of texts, labels; of pairs inputs and lengths of 2 P documents, the first ones first.

        Images are augmented where there is a seed to do it by.
        """
        rows_B = torch.from_numpy(rows).to(self.device)
        labels_B = self.labels_N[rows_B]
        if self.pixels_NHWC is not None:
            pixels_BHWC = self.pixels_NHWC[rows_B]
            if augmented_by:
                pixels_BHWC = shifted(pixels_BHWC, np.random.default_rng(augmented_by))
            return self._normal(pixels_BHWC).flatten(1, 2), labels_B
        T = self._padded(int(self.lengths_N[rows].max()))
        found = [each.batch(rows_B, T) for each in self.documents]
        return torch.cat([ids for ids, _ in found]), torch.cat([lengths for _, lengths in found]), labels_B

    def _padded(self, length: int) -> int:
        """Tokens of a batch whose longest text has `length`."""
        if not self.config.mask_padding:
            return length
        unit = ROUND * math.ceil(self.config.longest / (ROUND * LENGTHS))
        return min(self.config.longest, math.ceil(length / unit) * unit)

    def _normal(self, pixels_BHWC: Tensor) -> Tensor:
        """Pixels as a model takes them."""
        mean, sd = NORMAL.get((self.config.dataset, self.config.colour), ((0.5,), (0.5,)) if self.config.centred else ((0.0,), (1.0,)))
        return (pixels_BHWC / 255 - pixels_BHWC.new_tensor(mean, dtype=torch.float32)) / pixels_BHWC.new_tensor(sd, dtype=torch.float32)


class Runner:
    """One cell of LRA; see `hgrn2_bench.engine.Runner`."""

    def __init__(self, cell: Cell) -> None:
        self.config: LRAConfig = cell.data
        self.data: Data = load(self.config)
        self.splits = {name: Items(split, self.config, cell.device) for name, split in self.data.splits.items()}
        self.ways = 1 if cell.model_config.scan == "causal" else 2
        self.batch_size, self.eval_batch_size, self.seed = cell.train.batch_size, cell.train.eval_batch_size, cell.seed
        self.data_hash, self.truncated, self.skipped = self.data.hash, self.data.truncated, self.data.skipped
        self.steps_per_epoch = max(1, len(self.splits["train"]) // self.batch_size)
        self.order: tuple[int, list[np.ndarray]] = (-1, [])

    @staticmethod
    def shape(cell: Cell) -> Shape:
        """Size of the task; texts count with their greatest length, since shorter ones are not known without the data."""
        config: LRAConfig = cell.data
        size = sizes(config)
        batch = min(cell.train.batch_size, size["train"])
        steps, documents = max(1, size["train"] // cell.train.batch_size), 2 if config.dataset == "retrieval" else 1
        tokens = batch * documents * config.longest
        return Shape(
            seq_len=config.longest,
            labels_per_token=1 / (documents * config.longest),
            steps_per_epoch=steps,
            tokens_per_epoch=steps * tokens,
            step_tokens=tokens,
        )

    @staticmethod
    def build(cell: Cell) -> Classifier:
        """The model of a cell, on the CPU."""
        config: LRAConfig = cell.data
        words = config.dataset in WORDS
        return Classifier(
            cell.model_config,
            registry.load(cell.model_ref),
            cell.settings,
            cell.backend,
            config.longest,
            vocab_size=vocab_size(config) if words else 0,
            channels=0 if words else {"grey": 1, "rgb": 3}[config.colour],
            classes=CLASSES[config.dataset],
            pairs=config.dataset == "retrieval",
            mask_padding=config.mask_padding,
            grid=None if words else (grid_side(config), grid_side(config)),
        )

    def batch(self, step: int) -> Batch:
        """Batch `step`, a function of (seed, step) alone."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self.order[0] != epoch:
            self.order = epoch, list(self._batches(epoch))
        return self.splits["train"].batch(self.order[1][place], (self.seed, 1, step) if self.config.augment else ())

    def _batches(self, epoch: int) -> Iterator[np.ndarray]:
        """The rows of each batch of an epoch: shuffled, every item once but those that fill no batch.

        With `sort_lengths` the items of WINDOW batches are sorted by length before they are cut, and all batches shuffled after.
        """
        rng = np.random.default_rng([self.seed, 0, epoch])
        items, B = self.splits["train"], self.batch_size
        rows_N = rng.permutation(len(items))[: self.steps_per_epoch * B]
        if items.documents and self.config.sort_lengths:
            parts = np.array_split(rows_N, np.arange(B * WINDOW, len(rows_N), B * WINDOW))
            rows_N = np.concatenate([part[np.argsort(items.lengths_N[part], kind="stable")] for part in parts])
            batches = np.array_split(rows_N, np.arange(B, len(rows_N), B))
            return (batches[i] for i in rng.permutation(len(batches)))
        return iter(np.array_split(rows_N, np.arange(B, len(rows_N), B)))

    def size(self, batch: Batch) -> int:
        """Items, or pairs, of a batch."""
        return len(batch[-1])

    def targets(self, batch: Batch) -> int:
        """Labels of a batch."""
        return len(batch[-1])

    def part(self, batch: Batch, rows: slice) -> Batch:
        """Some items of a batch, or pairs, whose first documents come first."""
        *inputs, labels_B = batch
        B = len(labels_B)
        return (*(torch.cat([each[rows] for each in tensor.split(B)]) for tensor in inputs), labels_B[rows])

    def loss(self, model: Classifier, batch: Batch) -> Tensor:
        """Mean cross-entropy of a batch."""
        return model.loss(*_unpacked(batch))

    def score(self, model: Classifier, split: str) -> float:
        """Accuracy on a split."""
        return self.metric(model, split).value

    def report(self, model: Classifier) -> Sequence[Metric]:
        """Accuracy on validation and test data."""
        return [self.metric(model, split) for split in ("validation", "test")]

    @torch.no_grad()
    def metric(self, model: Classifier, split: str) -> Metric:
        """The share of a split's items that the model classifies right, every item scored. DivergedError where logits are not finite."""
        items = self.splits[split]
        right, sound = torch.zeros((), dtype=torch.int64, device=items.device), torch.ones((), dtype=torch.bool, device=items.device)
        for inputs, lengths_B, labels in self._scored(items):
            logits = model.logits(inputs, lengths_B)
            sound &= torch.isfinite(logits).all()
            right += (logits.argmax(-1) == labels).sum()
        if not sound:
            raise DivergedError(f"logits on {split} data are not finite")
        return Metric(split, "accuracy", right.item() / len(items), len(items), self._floors(split))

    def _scored(self, items: Items) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Inputs, lengths and labels of a split by length, of at most EVAL_TOKENS or one item.

        Batches of `eval_batch_size` are padded first and then cut: padding that is read as text does not depend on the cut.
        """
        order_N = np.argsort(items.lengths_N, kind="stable")
        for start in range(0, len(items), self.eval_batch_size):
            batch = items.batch(order_N[start : start + self.eval_batch_size])
            inputs, labels_B = batch[0], batch[-1]
            tokens = self.ways * inputs.shape[0] * inputs.shape[1] // len(labels_B)
            most = max(1, EVAL_TOKENS // tokens)
            for first in range(0, len(labels_B), most):
                yield _unpacked(self.part(batch, slice(first, first + most)))

    def _floors(self, split: str) -> Mapping[str, float]:
        """Accuracy of the class that is most frequent in training, and of guessing, which is more where few items were drawn."""
        most = int(torch.bincount(self.splits["train"].labels_N).argmax())
        majority = (self.splits[split].labels_N == most).double().mean().item()
        return {"majority": round(majority, 4), "chance": round(1 / CLASSES[self.config.dataset], 4)}


def _unpacked(batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
    """Inputs, lengths where there are any, labels."""
    return (batch[0], None, batch[1]) if len(batch) == 2 else (batch[0], batch[1], batch[2])


def grid_side(config: LRAConfig) -> int:
    """Rows and columns of an image."""
    return 32 if config.dataset == "image" else config.resolution
