"""Every recurrence's kernel against `reference` on this machine, forward and backward; `doctor` runs it in processes of its own.

`python -m hgrn2_bench.selftest` says what torch sees and compares the backends of the CPU where it sees no GPU;
`python -m hgrn2_bench.selftest CASE` compares one case on the GPU. One process a case: they compile side by side, and one that ends
its process, or breaks the GPU for its process, is one finding. A JSON object a line on standard output; all else goes to standard error.

Shape letters as in `hgrn2_bench.ops.families`.
"""

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hgrn2_bench.errors import one_line
from hgrn2_bench.measure import kernel
from hgrn2_bench.numerics import relative_error, tensors
from hgrn2_bench.ops import autotune, families, fla
from hgrn2_bench.ops.families import OpInputs

SIZES = {"B": 2, "T": 100, "H": 2, "K": 32, "V": 32, "M": 16, "D": 32, "N": 4}
"""T is more than one chunk of the kernels, and no whole number of them."""
DTYPES = (torch.float32, torch.bfloat16)
WIDE = ("log_f", "log_a", "theta", "beta", "dt", "A")
"""Gates stay in float32, as mixers have them under autocast; so does what is complex, in complex64."""


def samples() -> dict[str, OpInputs]:
    """Random inputs by case, the same each time: gates as sigmoids give them, keys and removals of unit length."""
    generator = torch.Generator().manual_seed(0)

    def draw(letters: str) -> Tensor:
        return torch.randn([SIZES[letter] for letter in letters], generator=generator)

    def decay(letters: str) -> Tensor:
        return F.logsigmoid(draw(letters) + 2)

    q_BTHK, k_BTHK, v_BTHV = draw("BTHK"), F.normalize(draw("BTHK"), dim=-1), draw("BTHV")
    a_BTHK, log_f_BTHM, scale = F.normalize(draw("BTHK"), dim=-1), decay("BTHM"), SIZES["K"] ** -0.5
    qkv = (q_BTHK, k_BTHK, v_BTHV)
    return {
        "per_channel_decay": families.DecayInputs(*qkv, decay("BTHK"), scale),
        "scalar_decay": families.ScalarDecayInputs(*qkv, decay("BTH"), scale),
        "delta_rule": families.DeltaInputs(*qkv, draw("BTH").sigmoid(), decay("BTH"), scale),
        "delta_rule without decay": families.DeltaInputs(*qkv, draw("BTH").sigmoid(), None, scale),
        "diagonal_low_rank": families.DiagonalLowRankInputs(*qkv, a_BTHK, -a_BTHK * draw("BTHK").sigmoid(), decay("BTHK"), scale),
        "gated_slots": families.SlotInputs(*qkv, -torch.expm1(log_f_BTHM), log_f_BTHM, scale),
        "diagonal_scan": families.DiagonalInputs(draw("BTD"), decay("BTD")),
        "diagonal_ssm": families.DiagonalSSMInputs(draw("BTD"), decay("DN"), draw("DN"), torch.complex(draw("DN"), draw("DN"))),
        "selective_scan": families.SelectiveInputs(draw("BTD"), F.softplus(draw("BTD")), -draw("DN").exp(), draw("BTN"), draw("BTN")),
        "softmax": families.SoftmaxInputs(*qkv, scale),
    }


def placed(inputs: OpInputs, device: str, dtype: torch.dtype) -> OpInputs:
    """The inputs on a device, all but the gates in `dtype`."""

    def target(name: str, x: Tensor) -> torch.dtype:
        return torch.complex64 if x.is_complex() else torch.float32 if name.startswith(WIDE) else dtype

    return replace(inputs, **{name: x.to(device, target(name, x)) for name, x in tensors(inputs).items()})  # type: ignore[type-var]


def compare(case: str, device: str) -> Iterator[dict[str, Any]]:
    """For each dtype the largest relative error over the output and every gradient, or what was raised instead.

    On a GPU the kernels of fla run, each with the first configuration that it admits: results are looked at, not speed.
    """
    for dtype in DTYPES:
        inputs = placed(samples()[case], device, dtype)
        backend = "fla" if device == "cuda" and hasattr(fla, inputs.family) else "chunked"
        said = {"case": case, "family": inputs.family, "kernel": kernel(backend, inputs), "dtype": str(dtype).removeprefix("torch.")}
        try:
            if backend == "fla":
                fla.load(inputs)
                autotune.take_first()
            error, tensor = relative_error(inputs, backend, gradients=True)
            yield said | {"error": error, "tensor": tensor}
        except Exception as fault:  # kernels may raise anything; the other dtype may still be well
            yield said | {"fault": f"{type(fault).__name__}: {one_line(fault)}"}


def torch_facts() -> dict[str, Any]:
    """What torch says of itself and of the GPU; `reason` where it was built for CUDA and cannot use it."""
    available, reason = False, ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            available = torch.cuda.is_available()
            if available:
                torch.zeros(1, device="cuda")
        except RuntimeError as error:
            available, reason = False, str(error)
    reason = reason or " ".join(str(warning.message) for warning in caught)
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda or "",
        "available": available,
        "reason": "" if available else " ".join(reason.split()),
        "cases": list(samples()),
    }


def main(cases: list[str]) -> None:
    """Print what torch sees and, without a GPU, every case on the CPU; or the given cases on the GPU."""
    torch.set_num_threads(1)
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        if not cases:
            facts = torch_facts()
            print(json.dumps(facts), file=output, flush=True)
        for case in cases or ([] if facts["available"] else facts["cases"]):
            for line in compare(case, "cuda" if cases else "cpu"):
                print(json.dumps(line), file=output, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
