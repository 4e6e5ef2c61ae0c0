import pytest
import torch

timm = pytest.importorskip("timm", reason="timm is not installed: pip install hgrn2_bench[vision]")

from timm.optim import create_optimizer_v2  # noqa: E402

from hgrn2_bench import timm_models  # noqa: E402
from hgrn2_bench.timm_models import MIXERS, WIDTHS  # noqa: E402

NAMES = [f"{mixer}_vit_{size}" for mixer in MIXERS for size in WIDTHS]


def small(name="hgrn2_vit_tiny", **options):
    torch.manual_seed(0)
    return timm.create_model(name, **{"depth": 2, "img_size": 28, "num_classes": 7, **options}).eval()


def test_timm_lists_every_model():
    assert set(NAMES) <= set(timm.list_models())


@pytest.mark.parametrize(("size", "glu", "millions"), [("tiny", 2, 4.77), ("tiny", 3, 6.10), ("small", 2, 18.38), ("small", 3, 23.70)])
def test_parameters_are_those_calculated_for_the_published_models(size, glu, millions):
    with torch.device("meta"):
        model = timm.create_model(f"hgrn2_vit_{size}", glu=glu)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(("size", "millions"), [("tiny", 6.1), ("small", 23.7)])
def test_parameters_of_hgrn1_are_the_published_ones(size, millions):
    with torch.device("meta"):
        model = timm.create_model(f"hgrn1_vit_{size}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", NAMES[::2])
def test_every_model_classifies_images_of_several_sizes(name):
    model = small(name)
    for size in ((28, 28), (42, 28)):
        images = torch.randn(2, 3, *size)
        features = model.forward_features(images)
        assert features.shape == (2, size[0] * size[1] // 14**2, 192)
        assert model.forward_head(features, pre_logits=True).shape == (2, 192)
        assert torch.equal(model.forward_head(features), model(images))
        assert torch.equal(model.logits(images), model(images))
        assert model(images).shape == (2, 7)


@pytest.mark.parametrize("options", [{}, {"global_pool": "token"}])
def test_model_for_another_size_is_the_one_that_resampled_its_positions(options):
    images, model = torch.randn(2, 3, 42, 28), small("attention_vit_tiny", **options)
    expected = model(images)
    model.set_input_size((42, 28), patch_size=14)
    assert model.grid == (3, 2)
    assert len(model.position.weight) == 6 + len(options)
    torch.testing.assert_close(model(images), expected)
    model(images).sum().backward()
    assert model.position.weight.grad is not None
    with pytest.raises(ValueError, match="cannot change"):
        model.set_input_size(28, patch_size=7)
    fixed = small("hgrn2_vit_tiny", positions="sinusoid")
    with pytest.raises(ValueError, match="knows only 4"):
        fixed(images)
    fixed.set_input_size((42, 28))
    assert fixed(images).shape == (2, 7)


def test_model_is_made_on_the_device_and_in_the_type_asked_for():
    model = small("hgrn2_vit_tiny", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_head_can_be_replaced_and_left_out():
    model = small()
    images = torch.randn(2, 3, 28, 28)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    assert model.get_classifier().out_features == model.num_classes == 3
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)
    model.reset_classifier(0, global_pool="")
    assert model(images).shape == (2, 4, 192)
    assert small(num_classes=0)(images).shape == (2, 192)


def test_pooling_that_the_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match="built with a class token or without"):
        small().reset_classifier(3, global_pool="token")
    with pytest.raises(ValueError, match="global_pool='max' must be avg, token"):
        small(global_pool="max")


def test_intermediates_are_what_the_blocks_leave():
    model = small(depth=3)
    images = torch.randn(2, 3, 28, 42)
    final, found = model.forward_intermediates(images)
    assert [t.shape for t in found] == 3 * [(2, 192, 2, 3)]
    assert torch.equal(final, model.forward_features(images))
    last = model.get_intermediate_layers(images, 1, norm=True)[0]
    assert torch.equal(last, final)
    early = model.forward_intermediates(images, [0], stop_early=True, intermediates_only=True, output_fmt="NLC")
    assert torch.equal(early[0].transpose(1, 2).reshape(2, 192, 2, 3), found[0])
    with pytest.raises(ValueError, match="must be NCHW or NLC"):
        model.forward_intermediates(images, output_fmt="NHWC")


def test_readme_s_model_takes_the_size_that_readme_gives():
    model = timm.create_model("hgrn2_vit_tiny", num_classes=10, img_size=112, drop_path_rate=0.1)
    assert model(torch.randn(2, 3, 112, 112)).shape == (2, 10)


def test_features_only_models_prune_what_is_not_needed():
    model = timm.create_model("hgrn2_vit_tiny", features_only=True, depth=3, img_size=28, out_indices=[0, 1])
    assert [t.shape for t in model(torch.randn(1, 3, 28, 28))] == 2 * [(1, 192, 2, 2)]
    assert model.feature_info.channels() == [192, 192]
    assert model.feature_info.reduction() == [14, 14]
    assert len(model.model.blocks) == 2


def test_class_token_is_left_out_of_intermediates_or_given_beside_them():
    model, images = small("attention_vit_tiny", global_pool="token"), torch.randn(1, 3, 28, 28)
    assert [t.shape for t in model.forward_intermediates(images)[1]] == 2 * [(1, 192, 2, 2)]
    ((patches, token),) = model.get_intermediate_layers(images, 1, False, True, True)
    assert torch.equal(torch.cat([token, patches], 1), model.forward_features(images))
    plain = small()
    assert plain.get_intermediate_layers(images, 1, False, True)[0].shape == (1, 4, 192)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_models_work_in_the_precision_of_their_parameters(pool):
    model = small("attention_vit_tiny", global_pool=pool).train().bfloat16()
    logits = model(torch.randn(2, 3, 28, 28).bfloat16())
    logits.sum().backward()
    assert logits.dtype == torch.bfloat16
    assert small("hgrn2_vit_tiny").bfloat16()(torch.randn(2, 3, 28, 28).bfloat16()).dtype == torch.bfloat16


def test_drop_path_and_checkpointing_change_no_evaluation():
    images = torch.randn(2, 3, 28, 28)
    plain, dropping = small(), small(drop_path_rate=0.3)
    assert dropping.blocks[1].path.dropout == 0.3
    assert torch.equal(plain(images), dropping(images))
    dropping.set_drop_path_rate(0.1)
    assert dropping.blocks[1].path.dropout == 0.1
    plain.set_grad_checkpointing()
    kept = plain.forward_features(images)
    torch.testing.assert_close(kept, small().forward_features(images))


def test_options_are_named_and_unknown_ones_refused():
    model = small(scan="2d_parallel", glu=3, settings={"expand_ratio": 32}, patch_size=7)
    assert model.config.scan == "2d_parallel"
    assert model.config.channel_width == 3 * 192
    assert model.blocks[0].mixer.head_dim == 32
    assert model.patches.grid == (4, 4)
    with pytest.raises(TypeError, match="unknown_option"):
        small(unknown_option=1)


def test_timm_optimiser_decays_no_vector_and_no_position():
    model = small("attention_vit_tiny")
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05).param_groups
    free = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert id(model.position.weight) in free
    assert id(model.blocks[0].mixer.in_proj.weight) not in free
    by_layer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5).param_groups
    assert len({group["lr_scale"] for group in by_layer}) == 4  # stem, two blocks, head with the last norm


def test_data_settings_are_those_of_the_published_evaluation():
    config = timm.data.resolve_data_config({}, model=small())
    assert config["input_size"] == (3, 224, 224)
    assert config["crop_pct"] == 224 / 256


DEIT = {"blocks.{}.norm1": "mixer_norm", "blocks.{}.attn.qkv": "mixer.in_proj", "blocks.{}.attn.proj": "mixer.out_proj"}
DEIT |= {"blocks.{}.norm2": "channel_norm", "blocks.{}.mlp.fc1": "channel.up", "blocks.{}.mlp.fc2": "channel.down"}


def test_attention_with_deit_settings_is_timms_deit():
    torch.manual_seed(0)
    theirs = timm.create_model("deit_tiny_patch16_224", depth=2, img_size=48, num_classes=7).eval()
    torch.nn.init.normal_(theirs.cls_token)
    mine = small("attention_vit_tiny", img_size=48, **timm_models.DEIT)
    given = theirs.state_dict()
    names = {
        f"{old.format(i)}.{kind}": f"blocks.{i}.{new}.{kind}" for old, new in DEIT.items() for kind in ("weight", "bias") for i in (0, 1)
    }
    names |= {f"{old}.{kind}": f"{new}.{kind}" for old, new in {"norm": "norm", "head": "head"}.items() for kind in ("weight", "bias")}
    names |= {f"patch_embed.proj.{kind}": f"embedding.proj.{kind}" for kind in ("weight", "bias")}
    state = {names[name]: tensor for name, tensor in given.items() if name in names}
    mine.load_state_dict({**state, "class_token": given["cls_token"][0, 0], "position.weight": given["pos_embed"][0]})
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(mine(images), theirs(images), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in theirs.parameters())
