import pytest
import torch
from torch import nn

from hgrn2_bench import measure, registry
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.layers import DropPath
from hgrn2_bench.vision import Patches, VisionModel


def model_of(mixer="hgrn2", patches=None, classes=5, settings=None, **keys):
    torch.manual_seed(0)
    config = ModelConfig(**{"d_model": 16, "num_layers": 2, "scan": "both", "channel_mixer": "glu", **keys})
    patches = patches or Patches((8, 12), 4)
    return VisionModel(config, registry.load(mixer), settings or {}, "chunked", patches, classes).eval()


def test_patches_are_read_row_by_row():
    model = model_of()
    images = torch.randn(2, 3, 8, 12)
    weight, bias = model.embedding.proj.weight, model.embedding.proj.bias
    patch = images[:, :, 4:8, 0:4].reshape(2, -1)  # second row, first column: token 3 of a grid of 2 x 3
    torch.testing.assert_close(model.embed(images)[:, 3], patch @ weight.flatten(1).T + bias)


def test_patches_must_cover_the_image():
    with pytest.raises(ConfigError, match=r"8 x 10 pixels is not made of whole patches of 4 x 4"):
        Patches((8, 10), 4)
    with pytest.raises(ValueError, match=r"8 x 10 pixels are not made of whole patches of 4 x 4"):
        model_of()(torch.randn(1, 3, 8, 10))


@pytest.mark.parametrize("scan", ["both", "2d_parallel", "2d_series"])
def test_other_sizes_of_image_have_their_own_grid(scan):
    model = model_of(scan=scan)
    wide = torch.randn(1, 3, 4, 24)
    assert model(wide).shape == (1, 6, 16)
    assert model.grid_of(wide) == (1, 6)
    twin = model_of(scan=scan, patches=Patches((4, 24), 4))
    torch.testing.assert_close(model.logits(wide), twin.logits(wide))


def test_two_dimensional_scan_of_a_transposed_image_is_transposed():
    model = model_of(scan="2d_parallel", patches=Patches((8, 8), 4))
    with torch.no_grad():
        model.embedding.proj.weight.copy_(model.embedding.proj.weight.mean((2, 3), keepdim=True).expand_as(model.embedding.proj.weight))
    images = torch.randn(1, 3, 8, 12)
    one, other = model(images).unflatten(1, (2, 3)), model(images.transpose(2, 3)).unflatten(1, (3, 2))
    torch.testing.assert_close(one, other.transpose(1, 2))
    assert not torch.allclose(model_of(scan="both")(images).mean(1), model(images).mean(1))


def test_class_token_is_read_and_has_a_place_of_its_own():
    model = model_of("attention", Patches((8, 12), 4, class_token=True), positions="learned")
    x = model(torch.randn(2, 3, 8, 12))
    assert x.shape == (2, 7, 16)
    assert torch.equal(model.pooled(x), x[:, 0])
    assert len(model.position.weight) == 7
    with pytest.raises(ConfigError, match="a class token has no place"):
        model_of(patches=Patches((8, 12), 4, class_token=True), scan="2d_parallel")


def test_learned_positions_are_resampled_for_another_size():
    model = model_of("attention", Patches((8, 12), 4, class_token=True), positions="learned")
    with torch.no_grad():
        model.position.weight.copy_(torch.arange(7.0)[:, None].expand(7, 16))
        model.position.weight[1:] = 5.0
    blank = torch.zeros(1, 3, 16, 16)
    added = model.embed(blank) - model.embedding(blank)[:, :1]
    torch.testing.assert_close(added[:, 1:], torch.full((1, 16, 16), 5.0))  # a constant table stays one


def test_fixed_positions_refuse_a_larger_image():
    model = model_of(positions="sinusoid")
    with pytest.raises(ValueError, match="12 tokens, but positions=sinusoid knows only 6"):
        model(torch.randn(1, 3, 16, 12))


def test_flops_count_the_patch_embedding():
    small, large = (model_of(patches=Patches((8, 8), 4, channels)) for channels in (1, 3))
    gap = measure.train_flops_per_token(large, 4) - measure.train_flops_per_token(small, 4)
    assert gap == 6 * 2 * 16 * 16  # 3 passes, 2 per weight; two channels of 4 x 4 pixels to 16


def test_final_norm_may_differ_from_that_of_the_blocks():
    model = model_of(final_norm="simple_rmsnorm")
    assert not [*model.norm.parameters()]
    assert isinstance(model.blocks[0].mixer_norm, nn.LayerNorm)


def test_truncated_initialisation_is_that_of_timm():
    model = model_of("attention", init="truncated", d_model=64)
    weights = torch.cat([m.weight.flatten() for m in model.blocks.modules() if isinstance(m, nn.Linear)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert not any(m.bias.any() for m in model.modules() if isinstance(m, nn.Linear))


def test_drop_path_keeps_the_mean_and_drops_whole_rows():
    torch.manual_seed(0)
    path = DropPath(0.25).train()
    out = path(torch.ones(4000, 2, 3))
    assert out.mean().item() == pytest.approx(1, abs=0.03)
    assert sorted({tuple(row.unique().tolist()) for row in out}) == [(0.0,), (torch.tensor(4 / 3).item(),)]
    assert torch.equal(path.eval()(out), out)


def test_drop_path_rises_from_layer_to_layer():
    model = model_of(drop_path=0.2, num_layers=3)
    assert [block.path.dropout for block in model.blocks] == [0, 0.1, 0.2]


def test_recomputing_a_block_drops_the_same_rows():
    images = torch.randn(6, 3, 8, 12)
    found = []
    for recompute in (False, True):
        model = model_of(drop_path=0.5, recompute=recompute).train()
        torch.manual_seed(3)
        model.logits(images).sum().backward()
        found.append(model.embedding.proj.weight.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("positions", ["none", "learned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_blocks_add_to_has_the_type_of_the_parameters_and_tokens_in_rows(dtype, positions, token):
    model, seen = model_of(patches=Patches((8, 12), 4, class_token=token), positions=positions).to(dtype), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, found: seen.extend([given[0], found]))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        model.logits(torch.randn(2, 3, 8, 12, dtype=dtype))
    assert {x_BTD.dtype for x_BTD in seen} == {dtype}
    assert all(x_BTD.is_contiguous() for x_BTD in seen)
