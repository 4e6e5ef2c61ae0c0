"""Images per second at 224 x 224 of HGRN2's models and of timm's DeiT: a training step and inference, both in a CUDA graph, in bfloat16."""

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hgrn2_bench.steps import Batch, Steps, replayed
from hgrn2_bench.timing import wait

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("fla") is None, reason="needs flash-linear-attention"),
    pytest.mark.skipif(find_spec("timm") is None, reason="needs timm"),
    pytest.mark.filterwarnings("ignore"),  # fla and Triton warn about themselves
]

DEVICE = "cuda"
WARM, TIMED, LONGEST = 6, 20, 10.0
"""Calls before the clock, at most so many timed, for so many seconds at most."""


def make(name: str, **options: object) -> nn.Module:
    import timm

    import hgrn2_bench.timm_models  # noqa: F401 - registers its models

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, drop_path_rate=0.1, **options)
    return model.to(DEVICE)


def images_per_s(call: Callable[[], object], number: int) -> float:
    """By the median of the calls."""
    for _ in range(WARM):
        call()
    times: list[float] = []
    while len(times) < TIMED and sum(times) < LONGEST:
        wait(DEVICE)
        began = time.perf_counter()
        call()
        wait(DEVICE)
        times.append(time.perf_counter() - began)
    return number / statistics.median(times)


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16)


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    images_BCHW, labels_B = batch
    return F.cross_entropy(model(images_BCHW).float(), labels_B)


def rates(model: nn.Module, batch: Batch) -> tuple[float, float, set[str]]:
    """Images per second in training and inference, and how both were run."""
    gpu = DEVICE == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-4, device=DEVICE), fused=gpu, capturable=gpu)
    steps = Steps(model.train(), optimizer, loss, autocast(), clip=1.0, graph=gpu)
    trained = images_per_s(lambda: steps(batch, 1e-4), len(batch[0]))
    model.eval()

    @torch.no_grad()
    def infer() -> torch.Tensor:
        with autocast():
            logits: torch.Tensor = model(batch[0])
        return logits

    call, mode = replayed(infer)
    return trained, images_per_s(call, len(batch[0])), {steps.mode, mode}


@pytest.mark.parametrize(("size", "batch_size"), [("tiny", 256), ("small", 128)])
@pytest.mark.parametrize("kind", ["hgrn2_vit_{}", "deit_{}_patch16_224"])
def test_images_per_second(kind: str, size: str, batch_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    name = kind.format(size)
    images = torch.randn(batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    labels = torch.arange(batch_size, device=DEVICE)
    trained, inferred, modes = rates(make(name), (images, labels))
    with capsys.disabled():
        print(f"\n{name}, batch {batch_size}, bfloat16: {trained:.0f} images/s in training, {inferred:.0f} in inference")
    assert min(trained, inferred) > 0
    assert modes == {"CUDA graph"}
