"""Runs one MQAR cell: its examples on the device, the loss at the queries, the accuracy.

Shape letters: N examples, B batch, T time, K pairs (labels) per example, V vocabulary.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hgrn2_bench import registry
from hgrn2_bench.engine import Shape
from hgrn2_bench.model import SequenceModel
from hgrn2_bench.plan import Cell
from hgrn2_bench.protocol import Metric
from hgrn2_bench.trainer import DivergedError
from suites.mqar import data
from suites.mqar.protocol import MQARConfig


def draw(config: MQARConfig, num_examples: int, seed: int) -> data.Examples:
    """Examples of one split by the generator that the cell names; in the reference mode the random fill takes the same seed."""
    if config.generator == "reference":
        return data.generate_reference(config, num_examples, seed, torch_seed=seed)
    return data.generate(config, num_examples, seed)


@functools.cache
def floors(config: MQARConfig) -> dict[str, float]:
    """Accuracy that takes no recall: a uniform guess among the values, and the best guess from a query's rank and cell.

    With a single pair there is nothing to confuse, and the second is left out; with random fill it is an upper bound, since fillers hide
    which tokens are queries.
    """
    found = {"1/|values|": data.uniform_floor(config)}
    if config.num_pairs > 1:
        name = "recall-free guess (upper bound)" if config.random_fill else "recall-free guess"
        found[name] = round(data.recall_free_floor(config), 4)
    return found


class Queries:
    """Examples ready for the device: token ids (N, T), and position and value of each label (N, K)."""

    def __init__(self, examples: data.Examples, device: str) -> None:
        rows, columns = np.nonzero(examples.labels != data.IGNORED)
        n = len(examples.labels)
        self.tokens_NT = torch.from_numpy(examples.inputs).to(device)
        self.where_NK = torch.from_numpy(columns.reshape(n, -1).astype(np.int32)).to(device)
        self.values_NK = torch.from_numpy(examples.labels[rows, columns].reshape(n, -1)).to(device)

    def batch(self, start: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, T), flat positions (B K) of the labels in them, and values (B K) of examples start .. start + size - 1."""
        tokens_BT = self.tokens_NT[start : start + size].long()
        B, T = tokens_BT.shape
        offset_B1 = torch.arange(B, device=tokens_BT.device)[:, None] * T
        where_BK = self.where_NK[start : start + size] + offset_B1
        return tokens_BT, where_BK.flatten(), self.values_NK[start : start + size].flatten().long()


class Runner:
    """One cell of MQAR; see `hgrn2_bench.engine.Runner`."""

    truncated = 0
    skipped = 0

    def __init__(self, cell: Cell) -> None:
        config: MQARConfig = cell.data
        sizes = {"train": config.train_examples, "test": config.test_examples, "validation": config.validation_examples}
        seeds = data.segment_seeds(cell.seed, 1, 2)
        examples = {s: draw(config, n, seed) for (s, n), seed in zip(sizes.items(), (*seeds.train, *seeds.test), strict=True)}
        self.splits = {split: Queries(e, cell.device) for split, e in examples.items()}
        self.data_hash = hashlib.sha256("".join(data.data_hash(e) for e in examples.values()).encode()).hexdigest()[:16]
        self.floors = floors(config)
        self.batch_size, self.eval_batch_size = cell.train.batch_size, cell.train.eval_batch_size
        self.steps_per_epoch = self.shape(cell).steps_per_epoch

    @staticmethod
    def shape(cell: Cell) -> Shape:
        """Size of the task; the last batch of an epoch may be short."""
        config: MQARConfig = cell.data
        return Shape(
            seq_len=config.seq_len,
            labels_per_token=config.num_pairs / config.seq_len,
            steps_per_epoch=-(-config.train_examples // cell.train.batch_size),
            tokens_per_epoch=config.train_examples * config.seq_len,
        )

    @staticmethod
    def build(cell: Cell) -> SequenceModel:
        """The model of a cell, on the CPU."""
        config: MQARConfig = cell.data
        return SequenceModel(
            cell.model_config, registry.load(cell.model_ref), cell.settings, cell.backend, config.vocab_size, config.seq_len
        )

    def loss(self, model: SequenceModel, step: int) -> Tensor:
        """Mean cross-entropy over the queries of batch `step`: fixed order, the same in every epoch, as in the source."""
        start = step % self.steps_per_epoch * self.batch_size
        tokens_BT, where, values = self.splits["train"].batch(start, self.batch_size)
        return F.cross_entropy(model.logits(tokens_BT, where).float(), values)

    def score(self, model: SequenceModel, split: str) -> float:
        """Accuracy on a split."""
        return self.metrics(model, split)[0].value

    @torch.no_grad()
    def metrics(self, model: SequenceModel, split: str) -> Sequence[Metric]:
        """Accuracy as the source defines it, the mean over examples of the share of queries answered, and over all queries at once."""
        queries = self.splits[split]
        right_NK = torch.empty_like(queries.values_NK, dtype=torch.bool)
        n, k = right_NK.shape
        for start in range(0, n, self.eval_batch_size):
            tokens_BT, where, values = queries.batch(start, self.eval_batch_size)
            logits = model.logits(tokens_BT, where)
            if not torch.isfinite(logits).all():
                raise DivergedError(f"logits on {split} data are not finite")
            right_NK[start : start + self.eval_batch_size] = (logits.argmax(-1) == values).view(-1, k)
        per_example = right_NK.double().mean(1).mean().item()
        return [
            Metric(split, "accuracy", per_example, n, self.floors),
            Metric(split, "accuracy_token", right_NK.double().mean().item(), n * k, self.floors),
        ]
