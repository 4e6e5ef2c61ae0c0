"""Language models of other makers, in folders as transformers saves them: what `config.json` says of one. Imports no torch.

Such a model is none of ours: it has no configuration of ours and no mixer, and runs on transformers' code (or fla's, registered there).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hgrn2_bench.errors import DataError

BACKEND = "transformers"
"""What rows of such a model say instead of one of our backends."""
FACTS = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "vocab_size": ("vocab_size",),
}
"""Sizes that rows show, and the names that model types have for them."""
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx")
HEADS = ("ForCausalLM", "LMHeadModel")
"""Endings of the classes that predict the next token."""


def settings_of(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The model's type, and its sizes where they are given. DataError where it does not predict the next token."""
    classes = content.get("architectures") or []
    if not isinstance(classes, list) or not any(str(name).endswith(HEADS) for name in classes):
        told = ", ".join(map(str, classes)) if isinstance(classes, list) and classes else "none"
        raise DataError(f"{path}: {content['model_type']!r} of architectures {told}; a causal model's ends in {' or '.join(HEADS)}")
    sizes = {name: _first(content, names) for name, names in FACTS.items()}
    return {"model_type": str(content["model_type"])} | {name: size for name, size in sizes.items() if size}


def length_of(content: Mapping[str, Any]) -> int:
    """Tokens that it was made for; 0 where its configuration does not say."""
    return _first(content, LENGTHS)


def remark(content: Mapping[str, Any], path: Path) -> str:
    """What to say before it runs; empty for most."""
    named = "auto_map" in content
    return f"{path} names code of the folder's own (auto_map): it is not run, transformers' own code for {content['model_type']} is" * named


def _first(content: Mapping[str, Any], names: tuple[str, ...]) -> int:
    return next((content[name] for name in names if type(content.get(name)) is int), 0)
