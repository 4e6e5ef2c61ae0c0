"""HGRN2 language models of flash-linear-attention (fla): its folders read into our model, and our model written as such a folder.

The format is that of `HGRN2ForCausalLM` (fla 0.6, fla/models/hgrn2), in which checkpoints such as fla-hub/hgrn2-1.3B-100B are published:
`config.json` with `model_type` hgrn2, and weights in `model.safetensors` or in shards with an index. The same function is, here:

    mixer            variant fla: read-out scale, SiLU output gate, RMSNorm whose eps is 1e-5 whatever `norm_eps` says, since fla's fused
                     norm and projection does not receive it
    block            RMSNorm with `norm_eps`, SwiGLU without biases
    lower bound      `inclusive`; its table starts at 0 there and at 1 here, which the softmax over layers does not see
    in_proj          fla's i_proj, q_proj and f_proj, one below the other

What only fla has is refused by the name of its field. fla itself is not imported. A model that suite wikitext trained with
`hgrn2.variant=fla` goes to fla, with its tokenizer, by

    fla_models.save(checkpoints.load(trained), new, source=trained)

There nothing says that the tokenizer's `bos_token` stood before each text in training, as a checkpoint of ours does: evaluated from the new
folder it takes `bos=always`, or under lm-eval's own `hf` model `add_bos_token=true`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hgrn2_bench import weights
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.errors import ConfigError, DataError
from hgrn2_bench.fla_config import DEFAULTS, translated, weight_files
from hgrn2_bench.hgrn2 import HGRN2
from hgrn2_bench.language import LanguageModel

SAME = {
    "mixer_norm": "attn_norm",
    "mixer.norm": "attn.g_norm",
    "mixer.out_proj": "attn.o_proj",
    "channel_norm": "mlp_norm",
    "channel.gate": "mlp.gate_proj",
    "channel.up": "mlp.up_proj",
    "channel.down": "mlp.down_proj",
}
"""Parts of a block that have one weight on either side."""


def load(folder: Path, backend: str = "chunked", device: str = "cpu") -> LanguageModel:
    """The model of a folder of fla's, with float32 weights, in eval mode, on a resolved backend.

    DataError, one line, for files that are missing, cut short or of another kind, and for fields whose function our model does not have.
    """
    given = weights.read_config(folder)
    config, settings = translated(given, folder / "config.json")
    values = DEFAULTS | given
    with torch.device("meta"):
        model = LanguageModel(config, HGRN2, settings, backend, values["vocab_size"], values["max_position_embeddings"])
    tensors = _ours(read_shards(folder), config, folder)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise DataError(f"{folder}: its weights lack {name} (in our names)")
        if tensors[name].shape != shape:
            raise DataError(f"{folder}: {name} (in our names) has shape {tuple(tensors[name].shape)}, not {tuple(shape)}")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise DataError(f"{folder}: its weights hold {extra[0]}, which no field of config.json explains")
    model.load_state_dict(tensors, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.to(device).eval()


def save(model: LanguageModel, folder: Path, source: Path | None = None) -> None:
    """Write a model as a folder that fla's `HGRN2ForCausalLM.from_pretrained` reads, in place of what `folder` held.

    `source` is a folder whose tokenizer files are copied. ConfigError, naming the key, where fla has no such model; DataError where
    `source` has no tokenizer.
    """
    content = _fla_config(model)
    copied = weights.tokenizer_files(source) if source else ()
    if source and not copied:
        raise DataError(f"{source} has no tokenizer to copy: hgrn2_bench.text_tokenizers.complete gives a checkpoint of ours its own")
    with weights.new_folder(folder) as new:
        weights.write_tensors(new / "model.safetensors", _theirs(model))
        weights.write_config(new, content)
        for path in copied:
            (new / path.name).write_bytes(path.read_bytes())


def read_shards(folder: Path) -> dict[str, Tensor]:
    """The tensors of `model.safetensors`, or of the shards that its index lists. DataError where they are missing or damaged."""
    return {name: tensor for path in weight_files(folder) for name, tensor in weights.read_tensors(path).items()}


def _ours(theirs: dict[str, Tensor], config: ModelConfig, folder: Path) -> dict[str, Tensor]:
    """The tensors of fla under our names, in float32; those that have no name here keep theirs."""
    theirs = {name: tensor.float() for name, tensor in theirs.items()}
    found: dict[str, Tensor] = {}
    renamed = {"model.embeddings.weight": "embedding.weight", "model.norm.weight": "norm.weight", "model.lower_bounds": "bound_table"}
    if config.tie_embeddings:
        theirs.pop("lm_head.weight", None)
    for name, our_name in (renamed | {"lm_head.weight": "head.weight"}).items():
        if name in theirs:
            found[our_name] = theirs.pop(name)
    for layer in range(config.num_layers):
        there, here = f"model.layers.{layer}", f"blocks.{layer}"
        _split_fused_gate(theirs, f"{there}.mlp", config.channel_width)
        for ours, name in SAME.items():
            if f"{there}.{name}.weight" in theirs:
                found[f"{here}.{ours}.weight"] = theirs.pop(f"{there}.{name}.weight")
        streams = [f"{there}.attn.{stream}_proj.weight" for stream in "iqf"]
        if missing := [name for name in streams if name not in theirs]:
            raise DataError(f"{folder}: its weights lack {missing[0]}")
        found[f"{here}.mixer.in_proj.weight"] = torch.cat([theirs.pop(name) for name in streams])
        for stream in "iqf" if config.conv else "":
            name = f"{there}.attn.{stream}_conv1d.weight"
            if name in theirs:
                found[f"{here}.mixer.conv_{stream}.conv.weight"] = theirs.pop(name)
    if config.tie_embeddings and "embedding.weight" in found:
        found["head.weight"] = found["embedding.weight"]
    return found | theirs


def _split_fused_gate(theirs: dict[str, Tensor], mlp: str, width: int) -> None:
    """Until early 2025 fla held the two input projections of its channel mixer as one `gate_proj`, the gate first."""
    fused = theirs.get(f"{mlp}.gate_proj.weight")
    if fused is not None and f"{mlp}.up_proj.weight" not in theirs and len(fused) == 2 * width:
        theirs[f"{mlp}.gate_proj.weight"], theirs[f"{mlp}.up_proj.weight"] = fused[:width], fused[width:]


def _theirs(model: LanguageModel) -> dict[str, Tensor]:
    """Our tensors under fla's names."""
    ours = model.state_dict()
    found = {"model.embeddings.weight": ours["embedding.weight"], "model.norm.weight": ours["norm.weight"]}
    if model.bound_table is not None:
        found["model.lower_bounds"] = ours["bound_table"]
    if not model.config.tie_embeddings:
        found["lm_head.weight"] = ours["head.weight"]
    for layer in range(model.config.num_layers):
        there, here = f"model.layers.{layer}", f"blocks.{layer}"
        for name, their_name in SAME.items():
            found[f"{there}.{their_name}.weight"] = ours[f"{here}.{name}.weight"]
        for stream, weight in zip("iqf", ours[f"{here}.mixer.in_proj.weight"].chunk(3), strict=True):
            found[f"{there}.attn.{stream}_proj.weight"] = weight
            if model.config.conv:
                found[f"{there}.attn.{stream}_conv1d.weight"] = ours[f"{here}.mixer.conv_{stream}.conv.weight"]
    return found


def _fla_config(model: LanguageModel) -> dict[str, Any]:
    """The config.json of our model in fla. ConfigError, naming the key, where fla has no such model."""
    config, mixers = model.config, [mixer for mixer in model.mixers if isinstance(mixer, HGRN2) and mixer.variant == "fla"]
    if len(mixers) < config.num_layers:
        raise ConfigError("only hgrn2 with variant=fla can be written for fla")
    needed = {
        "positions": "none",
        "forget_bias": 0.0,
        "channel_mixer": "glu",
        "glu_activation": "silu",
        "glu_bias": False,
        "norm": "rmsnorm",
        "embed_scale": "none",
        "softmax": "full",
        "scan": "causal",
    }
    other = [f"{name}={value}" for name, value in needed.items() if getattr(config, name) != value]
    other += ["lower_bound=inclusive or none"] if config.lower_bound == "exclusive" else []
    if other:
        raise ConfigError(f"fla has no such model: it would need {', '.join(other)}")
    return DEFAULTS | {
        "architectures": ["HGRN2ForCausalLM"],
        "model_type": "hgrn2",
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_heads": mixers[0].heads,
        "expand_ratio": mixers[0].head_dim,
        "use_short_conv": config.conv > 0,
        "conv_size": config.conv or DEFAULTS["conv_size"],
        "use_lower_bound": config.lower_bound == "inclusive",
        "intermediate_size": model.get_parameter("blocks.0.channel.gate.weight").shape[0],
        "max_position_embeddings": model.max_len,
        "norm_eps": config.norm_eps or 1e-5,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.embed_std,
        "vocab_size": model.vocab_size,
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
    }
