"""Images on the GPU: a captured step beside the eager one, batches made beside a step, 2-D scans of more heads than a launch takes."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hgrn2_bench import engine, registry
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.ops import fla
from hgrn2_bench.plan import Cell, make_plan
from hgrn2_bench.steps import Steps
from hgrn2_bench.trainer import make_optimizer
from hgrn2_bench.vision import Patches, VisionModel
from suites.imagenet.runner import Runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("fla") is None, reason="needs flash-linear-attention"),
    pytest.mark.filterwarnings("ignore"),  # fla and Triton warn about themselves
    pytest.mark.usefixtures("no_tuning"),
]

DEVICE = "cuda"
SIZES = ("image_size=32", "patch=2", "d_model=192", "num_layers=6", "channel_width=384", "batch_size=32", "train_examples=192")
HEADS = {"hgrn2": "hgrn2.expand_ratio=64", "attention": "attention.num_heads=3", "gla": "gla.num_heads=3"}
WARM = 3
"""Steps before the capture, at rate 0: they leave every weight as it was."""


def cell(model: str, scan: str) -> Cell:
    """A cell of the size of preset `short` on drawn pictures, whose batches are mixed."""
    words = ("suite=imagenet", "preset=test", *SIZES, "clip=1.0", f"model={model}", HEADS[model], f"scan={scan}")
    (made,) = make_plan(words, DEVICE).cells
    return made


def losses_and_norms(made: Cell, graph: bool, rates: list[float]) -> tuple[Tensor, Tensor, str]:
    """What the steps at these rates leave, after the warm ones, and how they were taken."""
    task, model = Runner(made), engine.build(made).to(DEVICE).train()
    autocast = torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=made.dtype == "bfloat16")
    steps = Steps(model, make_optimizer(model, made.train, DEVICE), task.loss, autocast, made.train.clip, graph)
    found = []
    for step, rate in enumerate([0.0] * WARM + rates):
        loss = steps(task.batch(step), rate)
        found.append((loss, torch.tensor(steps.gradient_norm())))
    losses, norms = zip(*found[WARM:], strict=True)
    return torch.stack(losses).cpu(), torch.stack(norms), steps.mode


@pytest.mark.parametrize(("model", "scan"), [("hgrn2", "both"), ("hgrn2", "2d_parallel"), ("attention", "both"), ("gla", "both")])
def test_a_captured_step_is_the_eager_one(model: str, scan: str) -> None:
    made = cell(model, scan)
    captured, eager = (losses_and_norms(made, graph, [0.0, 1e-3, 1e-3]) for graph in (True, False))
    assert (captured[2], eager[2]) == ("CUDA graph", "eager")
    for got, want in zip(captured[:2], eager[:2], strict=True):
        torch.testing.assert_close(got[:2], want[:2], rtol=1e-3, atol=1e-5)  # of equal weights
        torch.testing.assert_close(got[2], want[2], rtol=2e-2, atol=1e-5)  # after an update, in which AdamW divides by small gradients


@pytest.mark.parametrize("augment", ["timm", "shift_flip"])
def test_the_host_makes_a_batch_without_waiting_for_the_step_before(augment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    from imagenet_folders import items, write_folders

    write_folders(tmp_path, {"train": items(96, 3), "val": items(6, 3, 96)})
    monkeypatch.setenv("HGRN2_BENCH_DATA", str(tmp_path))
    encoded = ("dataset=folder", "mixup=0.8", "cutmix=1.0", "mix_group=2", "train_examples=0", "validation_examples=0", "test_examples=0")
    words = (*(encoded if augment == "timm" else ()), "image_size=32", "patch=4", "batch_size=32", f"augment={augment}")
    (made,) = make_plan(("suite=imagenet", "preset=test", "model=attention", *words), DEVICE).cells
    task = Runner(made)
    task.batch(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, *_ = task.batch(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert images.isfinite().all()


def parted(expand_ratio: int, side: int = 32, D: int = 192) -> VisionModel:
    torch.manual_seed(0)
    config = ModelConfig(d_model=D, num_layers=1, scan="2d_parallel", lower_bound="exclusive", channel_mixer="glu", channel_width=D)
    backend = "fla" if DEVICE == "cuda" else "chunked"
    return VisionModel(config, registry.load("hgrn2"), {"expand_ratio": expand_ratio}, backend, Patches((side, side), 2), 10).to(DEVICE)


def gradients(model: VisionModel, images_BCHW: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Logits and summed gradient of the batch in pieces of this size."""
    model.zero_grad()
    logits = []
    for piece in images_BCHW.split(size):
        logits.append(model.logits(piece))
        logits[-1].square().sum().backward()
    return torch.cat(logits).detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def far(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("expand_ratio", [1, 2, 8])
def test_a_batch_of_many_heads_in_2d_has_the_results_of_its_pieces(expand_ratio: int) -> None:
    B, side, D = 256, 32, 192
    lines, heads = 2 * B * side // 2, D // expand_ratio
    assert lines * heads > fla.MAX_GRID  # heads of 1 and 2 are scanned as channels, those of 8 go to the chunk kernel in parts
    model, images = parted(expand_ratio, side, D), torch.randn(B, 3, side, side, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    small = fla.MAX_GRID // (side * heads)  # in 2 x side / 2 lines an image
    whole, pieces = gradients(model, images, B), gradients(model, images, small)
    assert far(whole[0], pieces[0]) < 1e-2
    assert far(whole[1], pieces[1]) < 1e-2
