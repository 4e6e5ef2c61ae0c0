"""Files of weights: safetensors alone, since they hold numbers and cannot run code; and folders that appear whole or not at all.

Imports no torch before tensors are read or written.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hgrn2_bench.errors import ConfigError, DataError, one_line

if TYPE_CHECKING:
    from torch import Tensor


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `folder/config.json`. DataError, one line, where there is none or it is no JSON object."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of a model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {folder} holds no model") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object")
    return content


TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
)


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The tokenizer's files that a model's folder holds, `tokenizer.json` first; none where it was published without."""
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """Every tensor of a safetensors file, on the CPU. DataError where it is missing, cut short or of another kind."""
    from safetensors.torch import load_file

    with _reading(path):
        return dict(load_file(path))


def check_tensors(path: Path) -> None:
    """DataError where a safetensors file is missing, cut short or of another kind, told from its head and its size."""
    from safetensors import safe_open

    with _reading(path), safe_open(path, framework="np"):
        pass


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """DataError where a safetensors file is missing, or turns out to be none."""
    from safetensors import SafetensorError

    if not path.is_file():
        raise DataError(f"{path} is missing")
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is cut short or no safetensors file: {one_line(error)}") from None


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write tensors from any device to a safetensors file, flushed to the disk."""
    from safetensors.torch import save_file

    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_config(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `folder/config.json`, flushed to the disk."""
    with (folder / "config.json").open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def digest(path: Path) -> str:
    """The SHA-256 of a file in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` at the end; a fault or a kill before that leaves `folder` as it was.

    ConfigError, one line, where it cannot be written.
    """
    temporary, aside = (folder.with_name(f".{folder.name}.{kind}{os.getpid()}") for kind in ("tmp", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rename(aside)
        temporary.rename(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.exists() and aside.exists():
            aside.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
