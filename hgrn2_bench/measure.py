"""What a model costs, and what was really built: parameters, state bytes, FLOPs, decay at initialisation, causality."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hgrn2_bench import directions, provenance, timing
from hgrn2_bench.interfaces import Context, Mixer
from hgrn2_bench.layers import ShortConv, conv_names
from hgrn2_bench.model import Backbone
from hgrn2_bench.ops import families


def parameters(model: Backbone) -> tuple[int, int]:
    """All parameters, and those that are no embedding: token and position tables and the output head left out. Tied tensors count once."""
    total = sum(p.numel() for p in model.parameters())
    tables = {id(p): p.numel() for m in (model.embedding, model.position, model.head) if m is not None for p in m.parameters()}
    return total, total - sum(tables.values())


def state_bytes(model: Backbone, seq_len: int, itemsize: int = 4) -> int | None:
    """Bytes that decoding holds for one sequence after `seq_len` tokens, summed over layers; activations take `itemsize` bytes.

    None under a scan that is not causal: it has no decoding.
    """
    return None if model.config.scan != "causal" else sum(m.state_size(seq_len, itemsize) for m in model.mixers)


def train_flops_per_token(model: Backbone, seq_len: int, labels_per_token: float = 1.0) -> float | None:
    """Training FLOPs per token, three times the forward pass; None where a plain module's own work cannot be known.

    Forward: 2 per weight of every matrix as often as it is applied to each token (the head only where there are labels), plus each
    mixer's recurrence in its recurrent form (`Mixer.op_flops`), once for every scan; norms and activations are left out. An adaptive
    softmax counts whole, which is more than it takes.
    """
    patches = getattr(model.embedding, "matrix_weights", 0)
    matrices = patches + matrix_weights(model.blocks) + sum(repeated_weights(m) for m in model.mixers)
    head = getattr(model.head, "matrix_weights", matrix_weights(model.head)) * labels_per_token
    recurrences = [(m.op_flops(seq_len), directions.scans(m)) for m in model.mixers]
    known = [flops * scans for flops, scans in recurrences if flops is not None]
    return 3 * (2 * (matrices + head) + sum(known)) if len(known) == len(recurrences) else None


def repeated_weights(mixer: Mixer) -> int:
    """Weights of the matrices of a mixer for every time that its scan applies them to a token beyond the first."""
    matrices = [(name, m) for name, m in mixer.named_modules() if isinstance(m, nn.Linear | nn.Conv1d)]
    return sum((directions.uses(mixer, name) - 1) * m.weight.numel() for name, m in matrices)


def matrix_weights(module: nn.Module) -> int:
    """Weights of all matrices that a module applies to each token."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | nn.Conv1d))


@torch.no_grad()
def sample_inputs(model: Backbone, mixer: Mixer, seq_len: int = 64) -> families.OpInputs | None:
    """What a mixer of the model hands to its recurrence on standard normal input; None for a plain module."""
    if not mixer.family:
        return None
    x_BTD = torch.randn(4, seq_len, model.config.d_model, generator=torch.Generator().manual_seed(0)).to(next(model.embedding.parameters()))
    return mixer.project(x_BTD, Context(shared=model.shared()))


def log_decay_of(inputs: families.OpInputs) -> Tensor | None:
    """The log decay that an op's inputs carry, or None."""
    match inputs:
        case families.DecayInputs() | families.DiagonalLowRankInputs():
            return inputs.log_f_BTHK
        case families.ScalarDecayInputs() | families.DeltaInputs():
            return inputs.log_f_BTH
        case families.SlotInputs():
            return inputs.log_f_BTHM
        case families.DiagonalInputs():
            return inputs.log_a_BTD
        case families.DiagonalSSMInputs():
            return inputs.log_a_DN
        case families.SelectiveInputs():
            return inputs.dt_BTD[..., None] * inputs.A_DN
    return None


def effective(model: Backbone) -> dict[str, Any]:
    """What was really built: the mixer's own word, and what the core knows of kernel, positions, local mixing and decay.

    Where the layers hold several mixers, `layers` names them all, and a fact in which they differ is told of each: `hgrn2: 1; gla: 4`.
    """
    first = {mixer.label: mixer for mixer in reversed(model.mixers)}
    parts = {label: _effective(model, first[label]) for label in dict.fromkeys(mixer.label for mixer in model.mixers)}
    if len(parts) == 1:
        return next(iter(parts.values()))
    keys = dict.fromkeys(key for facts in parts.values() for key in facts)
    joined = {key: _joined({label: facts[key] for label, facts in parts.items() if key in facts}, len(parts)) for key in keys}
    causal = [facts["causal"] for facts in parts.values()]
    return {"layers": [mixer.label for mixer in model.mixers]} | joined | {"causal": None if None in causal else all(causal)}


def _joined(values: Mapping[str, Any], parts: int) -> Any:
    """One value where all parts have it, else a text with the value of each part that has one."""
    told = list(values.values())
    if len(told) == parts and all(value == told[0] for value in told):
        return told[0]
    return "; ".join(f"{label}: {value}" for label, value in values.items())


def _effective(model: Backbone, mixer: Mixer) -> dict[str, Any]:
    inputs = sample_inputs(model, mixer)
    decay = None if inputs is None else log_decay_of(inputs)
    recurrent = mixer.family not in ("", "softmax")
    widths = {m.width for m in mixer.modules() if isinstance(m, ShortConv)}
    return {
        "local_mixing": " ".join(f"conv {width}" for width in sorted(widths)) or "none",
        "conv": conv_names(mixer),
        "causal": is_causal(model, mixer),
        **({} if mixer.spec.scan == "causal" else {"scan": directions.describe(mixer)}),
        **mixer.effective(),
        "kernel": kernel(mixer.spec.backend, inputs),
        "state_dtype": "float32" if recurrent else "that of the activations",
        "positions": model.config.positions,
        "median_decay_at_init": None if decay is None else round(decay.float().exp().median().item(), 4),
    }


@torch.no_grad()
def is_causal(model: Backbone, mixer: Mixer, seq_len: int = 16) -> bool | None:
    """Whether a changed last token leaves a mixer's earlier outputs as they were; None on fla, whose kernels need a GPU.

    False without a test where the scan itself looks ahead.
    """
    if mixer.spec.scan != "causal":
        return False
    if mixer.spec.backend == "fla":
        return None
    was_training = mixer.training
    mixer.eval()
    seq_len = min(seq_len, mixer.spec.max_len or seq_len)
    x_BTD = torch.randn(2, seq_len, model.config.d_model, generator=torch.Generator().manual_seed(0)).to(
        next(model.embedding.parameters()).device
    )
    changed_BTD = x_BTD.clone()
    changed_BTD[:, -1] += 1.0
    y_BTD, other_BTD = (mixer(x, Context(shared=model.shared()))[:, :-1] for x in (x_BTD, changed_BTD))
    mixer.train(was_training)
    return torch.allclose(y_BTD, other_BTD, rtol=1e-4, atol=1e-5, equal_nan=True)


def weights_hash(model: nn.Module) -> str:
    """16 hex digits over every parameter and buffer, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def peak_rate(train_flops_per_token: float | None, device: str, devices: int) -> float | None:
    """Tokens per second at which training reaches the bfloat16 peak of so many devices by their data sheet; None where it is not known."""
    peak = timing.data_sheet(provenance.device_name(device)) if device == "cuda" else None
    return peak[0] * devices / train_flops_per_token if peak and train_flops_per_token else None


def kernel(backend: str, inputs: families.OpInputs | None) -> str:
    """The implementation that runs the recurrence."""
    if inputs is None:
        return "the module's own"
    if backend == "fla":
        from hgrn2_bench.ops import fla

        return fla.kernel_name(inputs)
    return f"{backend}.{inputs.family}"
