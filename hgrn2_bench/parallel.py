"""The model as one or several processes train it: whole in each (DDP), or a share of it in each (FSDP2); its state always as one has it.

What is saved and what is evaluated are whole tensors under the names that one process gives them, so a run goes on with any number of
processes, spread in either way.
"""

import copy
import importlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hgrn2_bench import distributed
from hgrn2_bench.config import TrainConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.steps import Batch

Loss = Callable[[Any, Batch], Tensor]


class TaskLoss(nn.Module):
    """A model with its task's loss as what it computes, for wrappers that know nothing but `forward`."""

    def __init__(self, model: nn.Module, batch_loss: Loss) -> None:
        super().__init__()
        self.model, self.batch_loss = model, batch_loss

    def forward(self, *batch: Tensor) -> Tensor:
        """The mean loss of a batch."""
        return self.batch_loss(self.model, batch)


class Trained:
    """A model in training, whole in one process."""

    def __init__(self, model: nn.Module, batch_loss: Loss, device: str) -> None:
        self.whole, self.device = model, device
        self.model = model
        """Whose parameters are trained."""
        self.loss = batch_loss

    def sync(self, last: bool) -> AbstractContextManager[None]:
        """Surrounds the work on one piece of a batch."""
        return nullcontext()

    def evaluated(self) -> nn.Module:
        """The whole model with the weights of now, on the device."""
        return self.whole

    def rest(self) -> None:
        """The whole model is not needed for a while."""


class Replicated(Trained):
    """The whole model in each process; gradients are exchanged while the backward pass of the last piece goes on."""

    def __init__(self, model: nn.Module, batch_loss: Loss, device: str) -> None:
        super().__init__(model, batch_loss, device)
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of depthwise convolutions, a few kilobytes
        self.wrapper = nn.parallel.DistributedDataParallel(TaskLoss(model, batch_loss), gradient_as_bucket_view=True)
        self.loss = lambda _, batch: self.wrapper(*batch)

    def sync(self, last: bool) -> AbstractContextManager[None]:
        """Exchange nothing before the last piece."""
        return nullcontext() if last else self.wrapper.no_sync()  # type: ignore[no-untyped-call]


class Sharded(Trained):
    """A share of every parameter in each process, put together block by block; gradients are exchanged for every piece.

    The whole model waits on the host, and is on the device for evaluation only.
    """

    def __init__(self, model: nn.Module, batch_loss: Loss, device: str) -> None:
        super().__init__(model, batch_loss, device)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device, (distributed.current().size,))
        self.model = copy.deepcopy(model)
        for block in blocks(self.model):
            fully_shard(block, mesh=mesh)
        self.wrapper: Any = fully_shard(TaskLoss(self.model, batch_loss), mesh=mesh)
        self.loss = lambda _, batch: self.wrapper(*batch)
        self.rest()

    def evaluated(self) -> nn.Module:
        """The whole model with the weights of now, on the device."""
        self.whole.to(self.device).load_state_dict({name: full(t) for name, t in self.model.state_dict().items()})
        return self.whole

    def rest(self) -> None:
        """Free the device's memory."""
        self.whole.to("cpu")


def trained(model: nn.Module, batch_loss: Loss, config: TrainConfig, device: str) -> Trained:
    """The model as the processes of now train it."""
    kinds = {"ddp": Replicated, "fsdp": Sharded}
    made = (kinds[config.parallel] if distributed.current().size > 1 else Trained)(model, batch_loss, device)
    if config.compile_blocks:
        _compile(blocks(made.model))
    return made


def _compile(parts: list[nn.Module]) -> None:
    """Compile blocks one by one, those that differ in their layer's number alone into one code; none is left eager as one too many."""
    compiler: Any = importlib.import_module("torch._dynamo").config
    compiler.allow_unspec_int_on_nn_module = True
    compiler.recompile_limit = max(compiler.recompile_limit, 4 * len(parts))
    for part in parts:
        part.compile()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model. ConfigError where it has none."""
    found = getattr(model, "blocks", None)
    if not isinstance(found, nn.ModuleList):
        raise ConfigError(f"{type(model).__name__} has no list of blocks: compile_blocks and parallel=fsdp go block by block")
    return list(found)


def full(value: Any) -> Any:
    """A tensor of which processes hold shares as a whole, which all of them must ask for; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(own: Tensor, whole: Any) -> Any:
    """Of a whole tensor the share that this process has of `own`."""
    if isinstance(own, DTensor) and isinstance(whole, Tensor) and whole.shape == own.shape:
        return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    return whole


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Weights and optimizer state, whole. Of several processes that hold shares all must ask; the copies are on the host then."""
    content = optimizer.state_dict()
    state = {place: {name: _saved(value) for name, value in entry.items()} for place, entry in content["state"].items()}
    weights = {name: _saved(tensor) for name, tensor in model.state_dict().items()}
    return {"model": weights, "optimizer": {"state": state, "param_groups": content["param_groups"]}}


def _saved(value: Any) -> Any:
    return full(value).cpu() if isinstance(value, DTensor) else value


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, content: Mapping[str, Any]) -> None:
    """Put back what `state_of` gave, here and with as many processes as there are now.

    The settings of the optimiser's groups stay: they follow from the configuration, and how they are held from the device.
    """
    own = model.state_dict()
    model.load_state_dict({name: like(own[name], tensor) for name, tensor in content["model"].items()})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = content["optimizer"]["state"]
    state = {place: {name: like(parameters[place], value) for name, value in entry.items()} for place, entry in saved.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
