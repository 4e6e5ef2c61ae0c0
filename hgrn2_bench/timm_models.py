"""The vision models under the names by which timm makes them: import this module, then `timm.create_model("hgrn2_vit_tiny")`.

Of HGRN2's ImageNet models neither code nor configuration is public. What is known is HGRN1's model (OpenNLPLab/im, `hgrn1d_vit_tiny` and
`_small`) and HGRN2's launch scripts (OpenNLPLab/HGRN2 run_im.py). The defaults here are HGRN1's: width 192 or 384, 12 layers, patches of
14, a mean over the patches, no positions, LayerNorm blocks of mixer and SiLU GLU, a weightless RMS norm before the head, scans in both
directions of the sequence. What HGRN2 may have had otherwise are options, each by name:

    scan            both (default), 2d_parallel, 2d_series, causal
    glu             width of the GLU over the model's: 2 (default) gives 4.77M and 18.38M parameters, 3 gives 6.10M and 23.70M
    positions       none (default), learned (default of attention), sinusoid, rope
    settings        the mixer's own, such as dict(expand_ratio=32)

Any other key of `hgrn2_bench.config.ModelConfig` works too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from hgrn2_bench import registry
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.interfaces import Context
from hgrn2_bench.layers import DropPath
from hgrn2_bench.model import recomputed, sinusoid
from hgrn2_bench.plan import resolve_backend
from hgrn2_bench.vision import Patches, VisionModel, resampled

MIXERS = ("hgrn2", "hgrn1", "gla", "mamba2", "attention")
WIDTHS = {"tiny": 192, "small": 384}
DEPTH, PATCH = 12, 14
OWN: dict[str, dict[str, dict[str, Any]]] = {
    # settings where a mixer's defaults do not fit these widths; heads as DeiT has them (arXiv 2012.12877)
    "hgrn2": {"tiny": {"expand_ratio": 64}, "small": {"expand_ratio": 64}},
    "attention": {"tiny": {"num_heads": 3}, "small": {"num_heads": 6}},
}
POOLS = ("avg", "token", "")
DEIT: dict[str, Any] = {"patch_size": 16, "mlp": 4.0, "global_pool": "token", "final_norm": "as_blocks", "norm_eps": 1e-6}
"""Options that make the attention models DeiT (arXiv 2012.12877), computing what timm's `deit_tiny_patch16_224` and `_small` compute."""


class TimmVision(VisionModel):
    """A `VisionModel` with the methods that timm's tools call on its vision transformers; its state dict is the same."""

    def __init__(
        self,
        mixer: str,
        config: ModelConfig,
        settings: Mapping[str, Any],
        backend: str = "auto",
        img_size: int | tuple[int, int] = 224,
        patch_size: int = PATCH,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        found = registry.model(mixer)
        backend = resolve_backend(backend, "cuda" if torch.cuda.is_available() else "cpu", found)
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        patches = Patches((size[0], size[1]), patch_size, in_chans, class_token=_pool(global_pool) == "token")
        super().__init__(config, registry.load(mixer), settings, backend, patches, num_classes)
        self.num_classes, self.global_pool, self.head_drop = num_classes, global_pool, nn.Dropout(drop_rate)
        self.num_features = self.head_hidden_size = self.embed_dim = config.d_model
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": config.d_model, "reduction": patch_size} for i in range(config.num_layers)
        ]
        self.to(device=device, dtype=dtype)

    def forward(self, inputs: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Logits (B, N)."""
        return self.forward_head(self.forward_features(inputs))

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        """Hidden states (B, T, D) after the last norm."""
        return super().forward(images_BCHW)

    def forward_head(self, x_BTD: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled and classified; with `pre_logits` only pooled, (B, D)."""
        x = self.pooled(x_BTD) if self.global_pool else x_BTD
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What the chosen blocks leave, (B, D, rows, columns) or with NLC (B, T, D), the class token apart; and the final hidden states.

        `indices` are the last so many blocks, or these; all by default. With `return_prefix_tokens` each comes in a pair with its class
        token (B, 1, D), where there is one. ValueError for another format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} must be NCHW or NLC")
        taken, last = feature_take_indices(len(self.blocks), indices)
        grid, first, found = self.grid_of(x), int(self.patches.class_token), []
        ctx = Context(shared=self.shared(), grid=grid)
        x_BTD = self.embed(x)
        for place, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            ctx = replace(ctx, aside={})
            x_BTD = recomputed(block, x_BTD, ctx) if self.config.recompute and torch.is_grad_enabled() else block(x_BTD, ctx)
            if place in taken:
                kept = self.norm(x_BTD) if norm else x_BTD
                image = kept[:, first:].transpose(1, 2).unflatten(2, grid).contiguous() if output_fmt == "NCHW" else kept[:, first:]
                found.append((image, kept[:, :first]) if return_prefix_tokens and first else image)
        return found if intermediates_only else (self.norm(x_BTD), found)

    def get_intermediate_layers(
        self, x: Tensor, n: int | Sequence[int] = 1, reshape: bool = False, return_prefix_tokens: bool = False, norm: bool = False
    ) -> list[Any]:
        """The same under DINO's name."""
        kind = "NCHW" if reshape else "NLC"
        found: list[Any] = self.forward_intermediates(x, n, return_prefix_tokens, norm, output_fmt=kind, intermediates_only=True)
        return found

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop the blocks after the last of these, and norm and head where asked; the indices that are left."""
        taken, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        kept: list[int] = taken
        return kept

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Another head; with 0 classes none. ValueError for a pooling that this model cannot change to."""
        if global_pool is not None:
            if (_pool(global_pool) == "token") != self.patches.class_token and global_pool:
                raise ValueError(f"global_pool={global_pool!r}: a model is built with a class token or without; it cannot change later")
            self.global_pool = global_pool
        place = next(self.parameters())
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes).to(place) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser must not decay."""
        mixers = {f"blocks.{i}.mixer.{name}" for i, mixer in enumerate(self.mixers) for name in mixer.no_weight_decay}
        return mixers | {"position.weight", "class_token", "bound_table"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Names by depth, for learning rates that differ by layer."""
        return {"stem": r"^embedding|^position|^class_token|^bound_table", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99_999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input in training."""
        self.config = replace(self.config, recompute=enable)

    @torch.no_grad()
    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None) -> None:
        """Build for another size of images: learned positions are resampled once, as `resampled` does in every call.

        Sinusoidal positions are computed for as many tokens as the new size has. ValueError for other patches than those that the
        model has; ConfigError where they do not cover the image.
        """
        patch = self.patches.patch
        if patch_size is not None and patch_size not in (patch, (patch, patch)):
            raise ValueError(f"patch_size={patch_size}: the patches of this model are {patch} x {patch} and cannot change")
        if img_size is None:
            return
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        patches = replace(self.patches, size=size)
        if self.position is not None:
            self.position = nn.Embedding.from_pretrained(resampled(self.position.weight, self.patches, patches.grid), freeze=False)
        if self.config.positions == "sinusoid":
            self.register_buffer("sinusoid", sinusoid(patches.tokens, self.embed_dim).to(self.get_buffer("sinusoid")), persistent=False)
        self.patches, self.grid = patches, patches.grid

    def set_drop_path_rate(self, rate: float) -> None:
        """Another stochastic depth."""
        self.config = replace(self.config, drop_path=rate)
        for place, block in enumerate(self.blocks):
            block.path = DropPath(rate * place / max(1, len(self.blocks) - 1))


def _pool(name: str) -> str:
    """The name, if it is one. ValueError for any other."""
    if name not in POOLS:
        raise ValueError(f"global_pool={name!r} must be avg, token, or empty for none")
    return name


def make(
    mixer: str,
    size: str,
    *,
    drop_path_rate: float = 0.0,
    glu: float = 2.0,
    mlp: float = 0.0,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> TimmVision:
    """A model of this mixer and size; `options` are keys of ModelConfig or arguments of TimmVision.

    `mlp` in place of `glu` gives blocks with a GELU MLP of this ratio, as DeiT's have.
    """
    D = options.pop("d_model", options.pop("embed_dim", WIDTHS[size]))
    wide = {"channel_mixer": "mlp", "channel_width": round(mlp * D)} if mlp else {"channel_mixer": "glu", "channel_width": round(glu * D)}
    facts = registry.model(mixer).facts
    usual: dict[str, Any] = {
        "d_model": D,
        "num_layers": options.pop("depth", DEPTH),
        "scan": "both",
        "final_norm": "simple_rmsnorm",
        "lower_bound": "exclusive" if facts.get("bounded", False) else "none",
        "positions": "learned" if facts.get("family") == "softmax" else "none",
        "init": "truncated",
        "drop_path": drop_path_rate,
        **wide,
    }
    own = {f.name for f in fields(ModelConfig)}
    usual |= {name: options.pop(name) for name in [*options] if name in own}
    chosen = {**OWN.get(mixer, {}).get(size, {}), **(settings or {})}
    return TimmVision(mixer, ModelConfig(**usual), chosen, **options)


def _entry(mixer: str, size: str) -> Callable[..., nn.Module]:
    """The function by which timm makes this model."""

    def entry(pretrained: bool = False, **options: Any) -> nn.Module:
        model: nn.Module = build_model_with_cfg(
            lambda **given: make(mixer, size, **given), name, pretrained, feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **options
        )
        return model

    name = f"{mixer}_vit_{size}"
    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{mixer}, width {WIDTHS[size]}, {DEPTH} layers, patches of {PATCH}."
    return entry


_CARD = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "crop_pct": 0.875,  # resize 256, crop 224
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "embedding.proj",
    "classifier": "head",
}
default_cfgs = generate_default_cfgs({f"{mixer}_vit_{size}.untrained": _CARD for mixer in MIXERS for size in WIDTHS})
for _mixer in MIXERS:
    for _size in WIDTHS:
        globals()[f"{_mixer}_vit_{_size}"] = register_model(_entry(_mixer, _size))
