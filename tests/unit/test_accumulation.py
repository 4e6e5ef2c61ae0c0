"""A batch in pieces: who takes which rows, and that the pieces of every suite add up to the whole."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hgrn2_bench import engine
from hgrn2_bench.accumulation import PieceSteps, check_divisible, pieces
from hgrn2_bench.distributed import World
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.layers import BatchNorm
from hgrn2_bench.plan import make_plan
from hgrn2_bench.steps import Steps
from hgrn2_bench.trainer import make_optimizer
from suites.lra.runner import Runner

ACCUMULATED = "schedule=constant", "clip=0.5"


@pytest.mark.parametrize(("size", "micro", "processes"), list(itertools.product((1, 2, 7, 32, 33), (0, 1, 4, 32), (1, 2, 3, 8))))
def test_every_row_is_taken_once_in_equally_many_pieces(size, micro, processes):
    taken = [pieces(size, micro, World(rank, processes)) for rank in range(processes)]
    assert len({len(each) for each in taken}) == 1
    counted = [row for each in taken for piece in each if piece.counts for row in range(size)[piece.rows]]
    assert counted == list(range(size))
    longest = max(len(range(size)[piece.rows]) for each in taken for piece in each)
    assert longest <= (micro or -(-size // processes))
    assert all(len(range(size)[piece.rows]) >= 1 for each in taken for piece in each)  # a mean over nothing is NaN


def nothing(last):
    return contextlib.nullcontext()


def training(words, micro=None, world=None, exchange=None):
    """A model, and steps on its suite's batches: whole ones, or in pieces of `micro`."""
    cell = make_plan([*words, *ACCUMULATED], "cpu").cells[0]
    task, model = engine.runner_class(cell)(cell), engine.build(cell).train()
    shared = (model, make_optimizer(model, cell.train, "cpu"), task.loss, torch.autocast("cpu", enabled=False), cell.train.clip, False)
    steps = Steps(*shared) if micro is None else PieceSteps(task, micro, world or World(), exchange or nothing, *shared)
    return steps, task, model


SUITES = [
    ("suite=mqar", "preset=test", "model=hgrn2", "train_examples=71"),
    ("suite=mqar", "preset=test", "model=attention", "attention.dropout=0", "train_examples=71", "num_layers=2"),
    ("suite=lra", "preset=test", "model=hgrn2", "task=listops"),
]


@pytest.mark.parametrize("words", SUITES, ids=lambda words: " ".join(words[:1] + words[2:3]))
@pytest.mark.parametrize("micro", [1, 5, 32])
def test_micro_batches_take_the_steps_of_whole_ones(words, micro):
    one, task, whole = training(words)
    other, _, split = training(words, micro)
    for step in range(4):
        batch = task.batch(step)
        torch.testing.assert_close(other(batch, 1e-3), one(batch, 1e-3), rtol=1e-5, atol=1e-6)
        assert other.gradient_norm() == pytest.approx(one.gradient_norm(), rel=1e-4)
    for mine, theirs in zip(split.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-4)  # a step moves a weight by up to 1e-3


@pytest.mark.parametrize("words", SUITES, ids=lambda words: " ".join(words[:1] + words[2:3]))
def test_the_parts_of_a_batch_have_its_loss(words):
    _, task, model = training(words)
    model.eval()
    batch = task.batch(0)
    size = task.size(batch)
    cuts = [slice(0, 2), slice(2, 3), slice(3, size)]
    parts = [task.part(batch, rows) for rows in cuts]
    assert [task.size(part) for part in parts] == [2, 1, size - 3]
    assert sum(task.targets(part) for part in parts) == task.targets(batch)
    total = sum(task.loss(model, part) * task.targets(part) for part in parts) / task.targets(batch)
    torch.testing.assert_close(total, task.loss(model, batch))


def test_a_pair_keeps_its_second_document():
    ids_BT = torch.arange(8)[:, None] * torch.ones(1, 3, dtype=torch.long)
    batch = (ids_BT, torch.arange(8), torch.tensor([0, 1, 0, 1]))
    ids, lengths, labels = Runner.part(SimpleNamespace(), batch, slice(1, 3))
    assert ids[:, 0].tolist() == lengths.tolist() == [1, 2, 5, 6]
    assert labels.tolist() == [1, 0]


class Weighted:
    """Values with how often each counts; the device alone knows how many targets that makes."""

    def size(self, batch):
        return len(batch[0])

    def part(self, batch, rows):
        return tuple(t[rows] for t in batch)

    def targets(self, batch):
        return batch[1].sum()

    def loss(self, model, batch):
        x, count = batch
        return (model(x[:, None])[:, 0].square() * count).sum() / count.sum()


def test_pieces_count_by_their_targets():
    task, rng = Weighted(), torch.Generator().manual_seed(0)
    batch = (torch.randn(9, generator=rng), torch.tensor([1.0, 9, 1, 1, 4, 1, 1, 2, 7]))

    def made(micro):
        torch.manual_seed(0)
        model = nn.Linear(1, 1)
        shared = (model, torch.optim.SGD(model.parameters(), 0.1), task.loss, torch.autocast("cpu", enabled=False), 0.0, False)
        return PieceSteps(task, micro, World(), nothing, *shared), model

    (one, whole), (other, split) = made(0), made(2)
    torch.testing.assert_close(other(batch, 0.1), one(batch, 0.1))
    torch.testing.assert_close(split.weight, whole.weight)


def test_gradients_are_exchanged_with_the_last_piece_alone():
    asked = []
    steps, task, _ = training(SUITES[0], 10, exchange=lambda last: asked.append(last) or nothing(last))
    steps(task.batch(0), 1e-3)
    assert asked == [False, False, False, True]


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ConfigError, match=r"micro_batch=4: this suite cannot split its batches \(its runner has no size, part, targets\)"):
        check_divisible(object(), nn.Linear(1, 1), "micro_batch=4")
    with pytest.raises(ConfigError, match="2 processes: norm=batchnorm needs the whole batch in one piece"):
        check_divisible(Weighted(), nn.Sequential(BatchNorm(3)), "2 processes")
