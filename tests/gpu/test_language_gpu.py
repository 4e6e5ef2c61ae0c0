"""Language models on the GPU: fla's fused loss beside the chunked one, its memory, a step in a CUDA graph, states carried."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu_marks import UNTUNED

from hgrn2_bench import checkpoints, engine, fla_models, registry
from hgrn2_bench.cells import CellFolder
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.language import LanguageModel
from hgrn2_bench.ops import fla
from hgrn2_bench.plan import make_plan

pytestmark = UNTUNED

V, T = 5000, 128
CONFIG = ModelConfig(
    d_model=64, num_layers=2, lower_bound="inclusive", channel_mixer="glu", glu_activation="none", tie_embeddings=True, embed_scale="sqrt"
)


def build(backend: str, vocab_size: int = V) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(CONFIG, registry.load("hgrn2"), {"expand_ratio": 32}, backend, vocab_size, T).cuda()


def batch(vocab_size: int = V, B: int = 4) -> torch.Tensor:
    return torch.randint(vocab_size, (2, B, T), generator=torch.Generator().manual_seed(1)).cuda()


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-2), (True, 5e-2)])
def test_fused_and_chunked_loss_agree_with_their_gradients(half: bool, tolerance: float) -> None:
    results = []
    for backend in ("chunked", "fla"):
        model = build(backend)
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            loss = model.loss(*batch())
        assert loss.dtype == torch.float32
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for want, got in zip(*results, strict=True):
        assert got.dtype == torch.float32
        assert ((got - want).norm() / want.norm()).item() < tolerance


def test_the_fused_loss_makes_no_tensor_of_all_logits() -> None:
    model, (inputs, targets) = build("fla", 50_264), batch(50_264, B=64)
    with torch.autocast("cuda", torch.bfloat16):
        model.loss(inputs, targets).backward()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.loss(inputs, targets).backward()
    assert torch.cuda.max_memory_allocated() - before < inputs.numel() * 50_264  # bytes: half of what all logits take in bfloat16


def test_a_folder_of_fla_s_runs_on_its_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = {"channel_mixer": "glu", "glu_bias": False, "norm": "rmsnorm", "lower_bound": "inclusive", "embed_std": 1.0}
    config, (inputs, targets) = ModelConfig(d_model=64, num_layers=2, **words), batch(50)
    made = LanguageModel(config, registry.load("hgrn2"), {"variant": "fla", "expand_ratio": 32}, "chunked", 50, T)
    fla_models.save(made, tmp_path / "model")
    got, _ = checkpoints.load(tmp_path / "model", "fla", "cuda").losses(inputs, targets)
    want, _ = checkpoints.load(tmp_path / "model").losses(inputs.cpu(), targets.cpu())
    torch.testing.assert_close(got.cpu(), want, rtol=1e-2, atol=1e-2)


def test_states_carry_on_fla() -> None:
    model, (inputs, targets) = build("fla").eval(), batch()
    whole, _ = model.losses(inputs, targets)
    first, states = model.losses(inputs[:, :70], targets[:, :70], return_states=True)
    rest, _ = model.losses(inputs[:, 70:], targets[:, 70:], states)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-2, atol=1e-2)


def test_a_trained_model_in_a_run_has_the_same_numbers_on_either_device(tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = {"channel_mixer": "glu", "glu_bias": False, "norm": "rmsnorm", "lower_bound": "inclusive", "embed_std": 1.0}
    made = LanguageModel(
        ModelConfig(d_model=64, num_layers=2, **words), registry.load("hgrn2"), {"variant": "fla", "expand_ratio": 32}, "chunked", 16, T
    )
    fla_models.save(made, tmp_path / "model")
    found = []
    for device in ("cpu", "cuda"):
        (cell,) = make_plan(["suite=wikitext", "preset=test", f"model={tmp_path / 'model'}"], device).cells
        folder = CellFolder(tmp_path, cell)
        with folder.lock():
            rows = engine.run_cell(cell, folder, lambda *_: None, lambda: False)
        assert {(row.status, row.backend) for row in rows} == {("ok", {"cpu": "chunked", "cuda": "fla"}[device])}
        found.append({(row.split, row.metric): row.value for row in rows})
    assert found[0] == pytest.approx(found[1], rel=1e-2, abs=1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_gated_unit_agrees_with_its_kernel(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    gate, up, weight = (torch.randn(3, 70, 96, device="cuda", dtype=dtype) for _ in range(3))

    def grads(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], kind: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in (gate, up)]
        found = product(*leaves)
        return [found.detach(), *torch.autograd.grad((found * weight.to(kind)).sum(), leaves)]

    exact = grads(lambda x, y: torch.nn.functional.silu(x) * y, torch.float64)
    for mine, expected in zip(grads(fla.swiglu, dtype), exact, strict=True):
        assert (mine.double() - expected).abs().max() <= tolerance * expected.abs().max()
