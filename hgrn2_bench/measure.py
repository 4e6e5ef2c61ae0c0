"""What a model costs: parameters, state bytes, FLOPs, decay at initialisation, peak memory."""

import contextlib
import ctypes
import resource
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hgrn2_bench.interfaces import Context
from hgrn2_bench.model import SequenceModel
from hgrn2_bench.ops import families


def parameters(model: SequenceModel) -> tuple[int, int]:
    """All parameters, and those that are no embedding: token and position tables and the output head left out. Tied tensors count once."""
    total = sum(p.numel() for p in model.parameters())
    tables = {id(m.weight): m.weight.numel() for m in (model.embedding, model.position, model.head) if m is not None}
    return total, total - sum(tables.values())


def state_bytes(model: SequenceModel, seq_len: int, itemsize: int = 4) -> int:
    """Bytes that decoding holds for one sequence after `seq_len` tokens, summed over layers; activations take `itemsize` bytes."""
    return sum(m.state_size(seq_len, itemsize) for m in model.mixers)


def train_flops_per_token(model: SequenceModel, seq_len: int, labels_per_token: float = 1.0) -> float:
    """Training FLOPs per token, three times the forward pass.

    Forward: 2 per weight of every matrix applied to each token (the head only where there are labels), plus each mixer's
    recurrence in its recurrent form (`Mixer.op_flops`); norms and activations are left out.
    """
    matrices = sum(p.numel() for m in model.blocks.modules() if isinstance(m, nn.Linear | nn.Conv1d) for p in [m.weight])
    head = model.head.weight.numel() * labels_per_token
    return 3 * (2 * (matrices + head) + sum(m.op_flops(seq_len) for m in model.mixers))


@torch.no_grad()
def sample_inputs(model: SequenceModel, seq_len: int = 64) -> families.OpInputs | None:
    """What the first layer hands to its recurrence on standard normal input; None for a plain module."""
    mixer = model.mixers[0]
    if not mixer.family:
        return None
    device = model.embedding.weight.device
    x_BTD = torch.randn(4, seq_len, model.config.d_model, generator=torch.Generator().manual_seed(0)).to(device)
    return mixer.project(x_BTD, Context(shared=model.shared()))


def log_decay_of(inputs: families.OpInputs) -> Tensor | None:
    """The log decay that an op's inputs carry, or None."""
    match inputs:
        case families.DecayInputs():
            return inputs.log_f_BTHK
        case families.ScalarDecayInputs():
            return inputs.log_f_BTH
        case families.DiagonalInputs():
            return inputs.log_a_BTD
        case families.SelectiveInputs():
            return inputs.dt_BTD[..., None] * inputs.A_DN
    return None


def effective(model: SequenceModel) -> dict[str, Any]:
    """What was really built: the mixer's own word, and what the core knows of kernel, positions, local mixing and decay."""
    mixer = model.mixers[0]
    inputs = sample_inputs(model)
    decay = None if inputs is None else log_decay_of(inputs)
    recurrent = mixer.family not in ("", "softmax")
    return {
        **mixer.effective(),
        "kernel": kernel(mixer.spec.backend, inputs),
        "state_dtype": "float32" if recurrent else "that of the activations",
        "local_mixing": f"conv {mixer.spec.conv}" if mixer.spec.conv else "none",
        "positions": model.config.positions,
        "median_decay_at_init": None if decay is None else round(decay.float().exp().median().item(), 4),
    }


def kernel(backend: str, inputs: families.OpInputs | None) -> str:
    """The implementation that runs the recurrence."""
    if inputs is None:
        return "the module's own"
    if backend == "fla":
        from hgrn2_bench.ops import fla

        return fla.kernel_name(inputs)
    return f"{backend}.{inputs.family}"


class PeakMemory:
    """Peak memory in bytes since it was made: of torch's allocator on a GPU; on a CPU of the process, above what it held then."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError, AttributeError):  # hand what earlier cells freed back to the system, where libc can
                ctypes.CDLL(None).malloc_trim(0)
            with contextlib.suppress(OSError):  # without it the peak counts from the start of the process, which serves several cells
                Path("/proc/self/clear_refs").write_text("5")
            self.before = self._process_peak()

    def read(self) -> int:
        """The peak so far."""
        if self.device == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return max(0, self._process_peak() - self.before)

    def _process_peak(self) -> int:
        try:
            line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
