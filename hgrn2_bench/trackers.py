"""Trackers that mirror a cell's curve while it trains: TensorBoard and Weights & Biases. The curve itself is always in metrics.jsonl.

Both are optional packages, imported when a run that asks for one writes its first record.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Protocol

from hgrn2_bench.cells import CellFolder
from hgrn2_bench.errors import ConfigError, unknown

Mirror = Callable[[Mapping[str, Any]], None]
TRACKERS = ("tensorboard", "wandb")


def check_tracker(kind: str) -> None:
    """ConfigError for a tracker that is not known or not installed; an empty name asks for none."""
    if kind and kind not in TRACKERS:
        raise unknown("tracker", kind, TRACKERS)
    if kind and find_spec(kind) is None:
        raise ConfigError(f"--track {kind} needs {kind}: pip install {kind}")


@contextmanager
def mirrored(kind: str, folder: CellFolder) -> Iterator[Mirror]:
    """What hears every record of a cell's curve; it asks for a tracker only if there is a name, and a record."""
    opened: list[_Tracker] = []

    def mirror(record: Mapping[str, Any]) -> None:
        if kind and folder.writes:
            if not opened:
                opened.append({"tensorboard": _TensorBoard, "wandb": _Wandb}[kind](folder, record["step"]))
            opened[0].write({k: v for k, v in record.items() if k != "step" and v is not None}, record["step"])

    try:
        yield mirror
    finally:
        for each in opened:
            each.close()


class _Tracker(Protocol):
    """One open run of a tracker, which goes on after `step` steps where the cell was resumed."""

    def __init__(self, folder: CellFolder, step: int) -> None: ...

    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard(_Tracker):
    """Event files under `tensorboard/` of the cell's folder; those of steps that a resumed cell takes again are hidden."""

    def __init__(self, folder: CellFolder, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step)  # type: ignore[no-untyped-call]

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb(_Tracker):
    """A run of project hgrn2_bench whose id is the cell's key; WANDB_MODE=offline keeps it in the cell's folder."""

    def __init__(self, folder: CellFolder, step: int) -> None:
        import wandb

        cell = folder.cell
        facts = {"suite": cell.suite, "task": cell.task, "model": cell.model, "seed": cell.seed, **cell.fields()}
        name = f"{cell.model} {cell.task} seed {cell.seed}"
        self.run: Any = wandb.init(
            project="hgrn2_bench", id=cell.key, name=name, group=cell.suite, config=facts, dir=str(folder.path), resume="allow"
        )

    def write(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()
