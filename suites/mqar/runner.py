"""Runs one MQAR cell: its examples on the device, the loss at the queries, the accuracy.

Shape letters: N examples, B batch, T time, K pairs (labels) per example, V vocabulary.
"""

import functools
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hgrn2_bench import registry
from hgrn2_bench.engine import Shape
from hgrn2_bench.model import SequenceModel
from hgrn2_bench.plan import Cell
from hgrn2_bench.protocol import Metric
from hgrn2_bench.steps import Batch
from hgrn2_bench.trainer import DivergedError
from suites.mqar import data
from suites.mqar.protocol import MQAR, MQARConfig, Segment

SCORED = ("validation", "test")
"""The splits in the setting of training."""


def draw(config: MQARConfig, segment: Segment, seed: int) -> data.Examples:
    """Examples of one segment by the generator that the cell names; in the reference mode the random fill takes the same seed."""
    if config.generator == "reference":
        return data.generate_reference(config.only(segment), segment.examples, seed, torch_seed=seed)
    return data.generate(config.only(segment), segment.examples, seed)


@functools.cache
def floors(task: MQAR) -> dict[str, float]:
    """Accuracy that takes no recall: a uniform guess among the values, and the best guess from a query's rank and cell.

    With a single pair there is nothing to confuse, and the second is left out; with random fill it is an upper bound, since fillers hide
    which tokens are queries.
    """
    found = {"1/|values|": data.uniform_floor(task)}
    if task.num_pairs > 1:
        name = "recall-free guess (upper bound)" if task.random_fill else "recall-free guess"
        found[name] = round(data.recall_free_floor(task), 4)
    return found


def mean_floors(config: MQARConfig, segments: Sequence[Segment], per_query: bool = False) -> dict[str, float]:
    """Floors of several segments together, each weighted by its examples, or by its queries."""
    each = [floors(config.only(s)) for s in segments]
    if len(each) == 1:
        return each[0]
    weights = [s.examples * (s.num_pairs if per_query else 1) for s in segments]
    names = dict.fromkeys(name for found in each for name in found)
    return {n: sum(f.get(n, 0.0) * w for f, w in zip(each, weights, strict=True)) / sum(weights) for n in names}


class Queries:
    """Examples of one segment on the device: token ids (N, T), and position and value of each label (N, K)."""

    def __init__(self, examples: data.Examples, device: str) -> None:
        rows, columns = np.nonzero(examples.labels != data.IGNORED)
        n = len(examples.labels)
        self.tokens_NT = torch.from_numpy(examples.inputs).to(device)
        self.where_NK = torch.from_numpy(columns.reshape(n, -1).astype(np.int32)).to(device)
        self.values_NK = torch.from_numpy(examples.labels[rows, columns].reshape(n, -1)).to(device)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.tokens_NT)

    def batch(self, rows: slice | Tensor) -> Batch:
        """Tokens (B, T), flat positions (B K) of the labels in them, and values (B K) of the examples in `rows`."""
        tokens_BT = self.tokens_NT[rows].long()
        B, T = tokens_BT.shape
        offset_B1 = torch.arange(B, device=tokens_BT.device)[:, None] * T
        return tokens_BT, (self.where_NK[rows] + offset_B1).flatten(), self.values_NK[rows].flatten().long()


@functools.lru_cache(maxsize=2)
def make_splits(config: MQARConfig, seed: int, device: str) -> tuple[dict[str, list[Queries]], str]:
    """Every split's segments on the device, and the hash of all examples; cells of one worker that share both share them."""
    segments = config.segments()
    seeds = data.segment_seeds(seed, len(segments["train"]), sum(map(len, segments.values())))
    drawn_from = itertools.chain(seeds.train, seeds.test)
    drawn = {split: [draw(config, s, next(drawn_from)) for s in parts] for split, parts in segments.items()}
    splits = {split: [Queries(e, device) for e in parts] for split, parts in drawn.items()}
    hashes = [data.data_hash(e) for parts in drawn.values() for e in parts]
    return splits, hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


class Runner:
    """One cell of MQAR; see `hgrn2_bench.engine.Runner`."""

    truncated = 0
    skipped = 0

    def __init__(self, cell: Cell) -> None:
        self.config: MQARConfig = cell.data
        self.segments = self.config.segments()
        self.splits, self.data_hash = make_splits(self.config, cell.seed, cell.device)
        self.batch_size, self.eval_batch_size = cell.train.batch_size, cell.train.eval_batch_size
        self.starts = [(q, start) for q in self.splits["train"] for start in range(0, len(q), self.batch_size)]
        self.steps_per_epoch = len(self.starts)
        self.seed, self.max_len = cell.seed, self.shape(cell).seq_len
        self.order: tuple[int, Tensor] | None = None
        self.extrapolates = cell.model_config.positions != "learned"

    @staticmethod
    def shape(cell: Cell) -> Shape:
        """Size of the task, for a mixture that of its longest test segment; the last batch of a segment may be short."""
        config: MQARConfig = cell.data
        train, test = config.segments()["train"], config.segments()["test"]
        tokens = sum(s.examples * s.seq_len for s in train)
        steps = sum(-(-s.examples // cell.train.batch_size) for s in train)
        full = min(cell.train.batch_size, train[0].examples) * train[0].seq_len
        return Shape(
            seq_len=max(s.seq_len for s in (*train, *test)),
            labels_per_token=sum(s.examples * s.num_pairs for s in train) / tokens,
            steps_per_epoch=steps,
            tokens_per_epoch=tokens,
            step_tokens=full if len(train) == 1 else round(tokens / steps),
        )

    @staticmethod
    def build(cell: Cell) -> SequenceModel:
        """The model of a cell, on the CPU."""
        mixer, length = registry.load(cell.model_ref), Runner.shape(cell).seq_len
        return SequenceModel(cell.model_config, mixer, cell.settings, cell.backend, cell.data.vocab_size, length)

    def batch(self, step: int) -> Batch:
        """Batch `step`: segment after segment, in an order that every epoch repeats, as in the source; or shuffled by (seed, epoch)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        queries, start = self.starts[place]
        if not self.config.shuffle:
            return queries.batch(slice(start, start + self.batch_size))
        return queries.batch(self._order(epoch, queries)[start : start + self.batch_size])

    def _order(self, epoch: int, queries: Queries) -> Tensor:
        """The examples in the order of one shuffled epoch."""
        if self.order is None or self.order[0] != epoch:
            permutation = np.random.default_rng([self.seed, epoch]).permutation(len(queries))
            self.order = (epoch, torch.from_numpy(permutation).to(queries.tokens_NT.device))
        return self.order[1]

    def size(self, batch: Batch) -> int:
        """Examples of a batch."""
        return len(batch[0])

    def targets(self, batch: Batch) -> int:
        """Queries of a batch."""
        return len(batch[2])

    def part(self, batch: Batch, rows: slice) -> Batch:
        """Some examples of a batch, which all have as many queries."""
        tokens_BT, where, values = batch
        B, T = tokens_BT.shape
        return tokens_BT[rows], (where.view(B, -1)[rows] - rows.start * T).flatten(), values.view(B, -1)[rows].flatten()

    def loss(self, model: SequenceModel, batch: Batch) -> Tensor:
        """Mean cross-entropy over the queries of a batch."""
        return model.loss(*batch)

    def score(self, model: SequenceModel, split: str) -> float:
        """Accuracy on a split."""
        return self.metrics(model, split)[0].value

    def report(self, model: SequenceModel) -> Sequence[Metric]:
        """Accuracy of the trained model on every split but train; nothing longer than they know is asked of learned positions."""
        known = [s for s, parts in self.segments.items() if self.extrapolates or max(p.seq_len for p in parts) <= self.max_len]
        return [metric for split in ("validation", *(s for s in known if s.startswith("test"))) for metric in self.metrics(model, split)]

    @torch.no_grad()
    def metrics(self, model: SequenceModel, split: str) -> Sequence[Metric]:
        """Accuracy as the source defines it, the mean over examples of the share of queries answered, and over all queries at once.

        For a mixture also accuracy on each of its segments.
        """
        parts, segments = [self._right(model, q, split) for q in self.splits[split]], self.segments[split]
        shares, tokens = torch.cat([p.double().mean(1) for p in parts]), torch.cat([p.flatten() for p in parts])
        metrics = [
            Metric(split, "accuracy", shares.mean().item(), len(shares), mean_floors(self.config, segments)),
            Metric(split, "accuracy_token", tokens.double().mean().item(), len(tokens), mean_floors(self.config, segments, True)),
        ]
        if len(parts) > 1:
            for right_NK, s in zip(parts, segments, strict=True):
                value, name = right_NK.double().mean().item(), f"accuracy_len{s.seq_len}_kv{s.num_pairs}"
                metrics.append(Metric(split, name, value, len(right_NK), floors(self.config.only(s))))
        return metrics

    def _right(self, model: SequenceModel, queries: Queries, split: str) -> Tensor:
        """Which queries (N, K) the model answers: none whose logits are not all finite.

        DivergedError where there are such, unless the split goes beyond training: failing there undoes nothing that was learned.
        """
        right_NK = torch.empty_like(queries.values_NK, dtype=torch.bool)
        sound = torch.ones((), dtype=torch.bool, device=right_NK.device)
        for start in range(0, len(queries), self.eval_batch_size):
            rows = slice(start, start + self.eval_batch_size)
            tokens_BT, where, values = queries.batch(rows)
            logits = model.logits(tokens_BT, where)
            finite = torch.isfinite(logits).all(-1)
            sound &= finite.all()
            right_NK[rows] = (finite & (logits.argmax(-1) == values)).view(-1, right_NK.shape[1])
        if split in SCORED and not sound:
            raise DivergedError(f"logits on {split} data are not finite")
        return right_NK
