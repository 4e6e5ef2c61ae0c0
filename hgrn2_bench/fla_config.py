"""The `config.json` of a folder of fla's in our terms, and the files of its weights. Imports no torch; see `hgrn2_bench.fla_models`."""

import json
import math
from pathlib import Path
from typing import Any

from hgrn2_bench.config import ModelConfig, heads_of
from hgrn2_bench.errors import ConfigError, DataError

MODEL_TYPE = "hgrn2"
DEFAULTS: dict[str, Any] = {
    # of HGRN2Config, fla 0.6
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_heads": None,
    "expand_ratio": 128,
    "use_short_conv": False,
    "conv_size": 4,
    "use_lower_bound": True,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "max_position_embeddings": 2048,
    "elementwise_affine": True,
    "norm_eps": 1e-6,
    "attn": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "vocab_size": 32_000,
    "attnres_block_size": None,
    "quantization_config": None,
}
ONLY: dict[str, Any] = {
    "hidden_act": "swish",
    "elementwise_affine": True,
    "attn": None,
    "attnres_block_size": None,
    "quantization_config": None,
}
"""Fields that change the function, with the one value that our model has. Which kernels are fused, and `attn_mode`, do not change it."""


def translated(given: dict[str, Any], path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Our configuration and mixer settings for the content of fla's config.json. DataError, naming the field, where there are none."""
    if given.get("model_type") != MODEL_TYPE:
        raise DataError(f"{path}: model_type is {given.get('model_type')!r}; only {MODEL_TYPE} can be read")
    values = DEFAULTS | given
    for name, only in ONLY.items():
        if values[name] != only:
            raise DataError(f"{path}: {name}={values[name]!r} is not supported, only {only!r}")
    try:
        d_model, ratio = int(values["hidden_size"]), values["expand_ratio"]
        if ratio is None:
            ratio = heads_of(d_model, int(values["num_heads"]), "num_heads", "hidden_size", "head dimension")
        heads_of(d_model, int(ratio), "expand_ratio", "hidden_size")
        config = ModelConfig(
            d_model=d_model,
            num_layers=int(values["num_hidden_layers"]),
            conv=int(values["conv_size"]) if values["use_short_conv"] else 0,
            lower_bound="inclusive" if values["use_lower_bound"] else "none",
            channel_mixer="glu",
            channel_width=swiglu_width(d_model, values["hidden_ratio"], values["intermediate_size"]),
            glu_bias=False,
            norm="rmsnorm",
            norm_eps=float(values["norm_eps"]),
            tie_embeddings=bool(values["tie_word_embeddings"]),
            embed_std=float(values["initializer_range"]),
        )
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: a field has no usable value ({error})") from None
    return config, {"variant": "fla", "expand_ratio": int(ratio)}


def swiglu_width(d_model: int, hidden_ratio: float | None, given: int | None) -> int:
    """The width of fla's channel mixer: the one given, or two thirds of `hidden_ratio` times the width, rounded up to a multiple of 256."""
    return given or 256 * math.ceil(int(d_model * (hidden_ratio or 4) * 2 / 3) / 256)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """`model.safetensors`, or the shards that its index lists, there or not. DataError for a damaged index, and where there are pickles."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(named.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{index} is damaged: it has no weight_map from names to files") from None
        if outside := [shard for shard in shards if Path(shard).name != shard]:
            raise DataError(f"{index}: {outside[0]!r} is not a file beside it")
        return tuple(folder / shard for shard in shards)
    path = folder / "model.safetensors"
    if not path.is_file() and list(folder.glob("pytorch_model*")):
        raise DataError(f"{folder}: its weights are a pickle, which can run code: convert them to model.safetensors")
    return (path,)
