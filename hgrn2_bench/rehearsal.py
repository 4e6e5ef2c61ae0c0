"""A cell run once for its kernels' sake: they are compiled and tuned, and no number is kept."""

from pathlib import Path

import torch

from hgrn2_bench import registry
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.engine import Runner, build, runner_class
from hgrn2_bench.model import Backbone
from hgrn2_bench.plan import Cell
from hgrn2_bench.trainer import Trainer


def rehearse(cell: Cell) -> None:
    """Launch every kernel that a run of the cell launches, and keep nothing.

    That is what it times; or a training step on each shape of batch, then the evaluation; of a trained model that alone.

    The batches are the cell's own: Triton compiles anew where a size becomes 1 or a multiple of 16, and tunes norms by the number of rows.
    """
    model = build(cell)
    runner = runner_class(cell)(cell)
    model = model.to(cell.device).train(not cell.checkpoint)
    if registry.protocol(cell.suite).speed:
        runner.rehearse(model)  # type: ignore[attr-defined]
        return
    if not cell.checkpoint:
        _train(cell, model, runner)
    runner.report(model.eval())


def _train(cell: Cell, model: Backbone, runner: Runner) -> None:
    """Take a training step on each shape of batch."""
    trainer = Trainer(model, runner, cell.train, CellFolder(Path(), cell), cell.device, cell.dtype)  # which nothing is written to
    seen: set[tuple[torch.Size, ...]] = set()
    for step in range(runner.steps_per_epoch):
        batch = runner.batch(step)
        shapes = tuple(tensor.shape for tensor in batch)
        if shapes not in seen:
            seen.add(shapes)
            trainer.steps(batch, cell.train.lr)
