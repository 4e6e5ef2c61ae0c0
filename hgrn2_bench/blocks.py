"""Training on blocks of token ids: what a language suite's runner gives the training loop, whatever text the ids come from.

Shape letters: N tokens of a split, B blocks of a batch, T tokens of a block.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hgrn2_bench.config import require
from hgrn2_bench.corpus import Corpus
from hgrn2_bench.engine import Shape
from hgrn2_bench.language import LanguageModel
from hgrn2_bench.plan import Cell
from hgrn2_bench.steps import Batch


@dataclass(frozen=True)
class Text:
    """The ids (N,) of a split, what stands before them, how many windows are scored at once, and where."""

    ids_N: NDArray[np.integer]
    start_id: int
    batch_size: int = 32
    device: str = "cpu"

    def __len__(self) -> int:
        """Number of tokens, every one of which is predicted."""
        return len(self.ids_N)

    def pairs(self, begin_B: NDArray[np.int64], width: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) on the device: targets from each begin on, inputs the tokens one before them."""
        place = begin_B[:, None] + np.arange(-1, width)
        ids = np.where(place < 0, self.start_id, self.ids_N[place.clip(min=0)]).astype(np.int64)
        ids_BT = torch.from_numpy(ids).to(self.device)
        return ids_BT[:, :-1], ids_BT[:, 1:]


class BlockTask:
    """The half of a runner that trains: the whole blocks of split `train`, shuffled by (seed, epoch), each once an epoch.

    The cell's data settings have a `block`: tokens of a training sample. Blocks that fill no batch wait for the next epoch's order.
    """

    def __init__(self, cell: Cell, corpus: Corpus) -> None:
        self.corpus, self.block = corpus, cell.data.block
        self.batch_size, self.eval_batch_size = cell.train.batch_size, cell.train.eval_batch_size
        self.seed, self.device = cell.seed, cell.device
        self.steps_per_epoch, self.blocks = _steps(corpus, cell)
        self.order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def batch(self, step: int) -> Batch:
        """Inputs and targets (B, T) of batch `step`."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self.order[0] != epoch:
            self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.blocks)
        rows = self.order[1][place * self.batch_size : (place + 1) * self.batch_size]
        return self.text("train").pairs(rows * self.block, self.block)

    def text(self, split: str) -> Text:
        """The ids of a split as scoring takes them."""
        return Text(self.corpus.splits[split].ids_N, self.corpus.start_id, self.eval_batch_size, self.device)

    def size(self, batch: Batch) -> int:
        """Blocks of a batch."""
        return len(batch[0])

    def part(self, batch: Batch, rows: slice) -> Batch:
        """Some of them."""
        return tuple(tokens[rows] for tokens in batch)

    def targets(self, batch: Batch) -> int:
        """Tokens that a batch predicts."""
        return batch[1].numel()

    def loss(self, model: LanguageModel, batch: Batch) -> Tensor:
        """Mean nats of a batch."""
        return model.loss(*batch)


def shape_of(cell: Cell, corpus: Corpus, learns: bool = True) -> Shape:
    """Size of a cell's training on a corpus. ConfigError where it learns and the text is shorter than one block."""
    steps, blocks = _steps(corpus, cell)
    few = f"block={cell.data.block} is longer than all text to train on, {len(corpus.splits['train'].ids_N):,} tokens"
    require(blocks > 0 or not learns, few)
    tokens = min(cell.train.batch_size, blocks) * cell.data.block
    return Shape(cell.data.block, labels_per_token=1.0, steps_per_epoch=steps, tokens_per_epoch=steps * tokens, step_tokens=tokens)


def _steps(corpus: Corpus, cell: Cell) -> tuple[int, int]:
    """Steps of an epoch, and the whole blocks of the training split."""
    blocks = len(corpus.splits["train"].ids_N) // cell.data.block
    return max(1, blocks // cell.train.batch_size), blocks
