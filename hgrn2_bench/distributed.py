"""Processes that run a cell together, as torchrun started them: who they are, and what they say to each other. Imports no torch at the top.

Rank 0 decides, prints and writes; the others follow. They have two lines beside the one that carries gradients: one for orders, which wait
as long as it takes, and one for outcomes, which all must give within moments of each other, so that one that failed alone ends the run.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from hgrn2_bench.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

WORK_WITHIN = timedelta(hours=1)
"""For one process to wait for another in a step: reading data comes before the first one."""
ORDER_WITHIN = timedelta(days=30)
OUTCOME_WITHIN = timedelta(seconds=30)


class GroupError(Exception):
    """The processes of a run no longer work together; the text says why."""


@dataclass(frozen=True)
class World:
    """One process among those that work together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this host: the number of its GPU."""
    local_size: int = 1


def world() -> World:
    """As the environment says that torchrun (or Slurm with the same variables) sets. ConfigError where that makes no sense."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        found = World(*(int(os.environ.get(name) or os.environ[name.removeprefix("LOCAL_")]) for name in names))
    except ValueError:
        found = World(-1)
    if not 0 <= found.rank < found.size:
        shown = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
        raise ConfigError(f"the environment does not say which of how many processes this is: {shown}")
    return found


def current() -> World:
    """The processes that work together now: this one alone outside of `group`."""
    return world() if _lines else World()


_lines: dict[str, Any] = {}
"""The lines of this process by name; empty outside of `group`."""


@contextmanager
def group(device: str) -> Iterator[World]:
    """Work together with the other processes, on the GPU of the local rank where there is one. ConfigError where there are too few."""
    import torch
    import torch.distributed as dist

    here = world()
    if device == "cuda" and here.local_size > torch.cuda.device_count():
        raise ConfigError(f"{here.local_size} processes on this host, but torch sees {torch.cuda.device_count()} GPUs: start one for each")
    gpu = here.local_rank < torch.cuda.device_count()
    if gpu:
        torch.cuda.set_device(here.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=WORK_WITHIN)
    _lines.update(
        orders=dist.new_group(backend="gloo", timeout=ORDER_WITHIN), outcomes=dist.new_group(backend="gloo", timeout=OUTCOME_WITHIN)
    )
    try:
        yield here
        dist.destroy_process_group()  # not after a fault: it would wait for processes that are gone
    finally:
        _lines.clear()


def tell(order: tuple[Any, ...]) -> None:
    """Give the other processes an order. GroupError where one of them is gone."""
    _pass_on(order)


def hear() -> tuple[Any, ...]:
    """The next order of rank 0, however long that takes. GroupError where it is gone."""
    return _pass_on(None)


def _pass_on(order: tuple[Any, ...] | None) -> tuple[Any, ...]:
    import torch.distributed as dist

    content = [order]
    try:
        dist.broadcast_object_list(content, src=0, group=_lines["orders"])
    except RuntimeError as error:
        raise GroupError("another process of the run is gone") from error
    return content[0] or ()


def agree(status: str, reason: str) -> None:
    """Nothing where every process ended a cell alike; GroupError, with each one's words, where one did not or is gone."""
    if current().size == 1:
        return
    import torch.distributed as dist

    found: list[tuple[str, str]] = [("", "")] * current().size
    try:
        dist.all_gather_object(found, (status, reason), group=_lines["outcomes"])
    except (RuntimeError, ValueError) as error:
        mine = "" if status == "ok" or "gloo" in reason or "NCCL" in reason else f" (here: {status} {reason})"
        raise GroupError(f"another process of the run failed or is gone{mine}") from error
    if len({each for each, _ in found}) > 1:
        raise GroupError("; ".join(f"rank {rank}: {each} {why}".rstrip() for rank, (each, why) in enumerate(found)))


def from_first(value: float) -> float:
    """Rank 0's value, on every process."""
    if current().size == 1:
        return value
    import torch
    import torch.distributed as dist

    held = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(held, src=0)
    return held.item()


def summed(values: "Tensor") -> "Tensor":
    """The sum of a tensor over all processes, in place."""
    if current().size > 1:
        import torch.distributed as dist

        dist.all_reduce(values)
    return values


def gathered(value: Any) -> list[Any]:
    """Every process's value, by rank."""
    if current().size == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * current().size
    dist.all_gather_object(found, value, group=_lines["orders"])
    return found


def leave(error: Exception) -> None:
    """End this process at once with one line and code 1: the others are in the middle of a step, and nothing can be put right."""
    print(f"error: rank {world().rank}: {error}; the same command continues from the last checkpoint", file=sys.__stderr__, flush=True)
    os._exit(1)
