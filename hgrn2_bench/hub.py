"""Models by the name that they have on the Hugging Face hub: their files are fetched into that library's own cache. Imports no torch."""

import re
from pathlib import Path

from hgrn2_bench.errors import ConfigError, DataError, one_line
from hgrn2_bench.rows import needed

FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "token*.json", "*.model", "vocab.json")
MORE_FILES = ("merges.txt", "special_tokens_map.json", "added_tokens.json")
"""What is fetched: weights as numbers, their configuration, and the tokenizer; never code."""
INSTALL = 'pip install "hgrn2_bench[zeroshot]"'
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def folder_of(ref: str) -> Path:
    """The folder that a path or a name such as `fla-hub/hgrn2-1.3B-100B` stands for; a folder that is there counts first.

    ConfigError or DataError, one line, where there is none and the hub does not give it.
    """
    path = Path(ref).expanduser()
    if path.is_dir():
        return path
    if not NAME.fullmatch(ref):
        raise DataError(f"{ref}: no such folder, and no name on the Hugging Face hub, which would be OWNER/MODEL")
    return fetch(ref)


def fetch(name: str) -> Path:
    """The folder of a model of the hub, fetched unless it already was. ConfigError, one line, where it cannot be had."""
    library = needed("huggingface_hub", "huggingface_hub", f"model={name}", INSTALL)
    try:
        return Path(library.snapshot_download(name, allow_patterns=[*FILES, *MORE_FILES]))
    except Exception as error:  # no network, no such name, no right to it, a full disk: each has a class of its own
        why = f"{type(error).__name__}: {one_line(error).partition('. ')[0][:200]}"
        raise ConfigError(f"{name}: not a folder here, and the Hugging Face hub did not give it ({why})") from None
