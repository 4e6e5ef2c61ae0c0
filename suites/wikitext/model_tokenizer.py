"""The tokenizer that a published model brings: `tokenizer.json`, and which of its ids stands before a text. Imports no torch."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from hgrn2_bench.config import require
from hgrn2_bench.errors import DataError
from hgrn2_bench.rows import needed
from hgrn2_bench.text_tokenizers import Vocabulary
from suites.wikitext.readers import Batch
from suites.wikitext.tokenizers import INSTALL, Encoded, dtype_of

NAMES = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
"""Files that may say which token begins or ends a text; the first that names one of both counts."""


class ModelTokenizer:
    """The tokenizer of a folder, on the text as it stands: pieces of about a megabyte, whole lines with their ends, each by itself."""

    name = "model"
    end_of_line = "the newline of the text, as the model's tokenizer sees it"
    vocabulary: Vocabulary | None = None

    def __init__(self, tokenizer: Any, digest: str, start_id: int) -> None:
        """`tokenizer` of the library of that name; its truncation and padding are switched off."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self.hash, self.start_id = tokenizer, digest, start_id
        self.vocab_size = max(start_id, *tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, lines: Batch) -> Encoded:
        """Ids of consecutive lines; a token that spans the end of a line belongs to the line where it begins."""
        found = self._tokenizer.encode("".join(lines), add_special_tokens=False)
        begin_N = np.array([begin for begin, _ in found.offsets], np.int64)
        end_L = np.cumsum([len(line) for line in lines])
        line_N = np.searchsorted(end_L, begin_N, side="right").clip(max=len(lines) - 1)
        return Encoded(np.array(found.ids, dtype_of(self.vocab_size)), np.bincount(line_N, minlength=len(lines)))


def hash_of(model: Path | None) -> str:
    """16 hex digits over `tokenizer.json` and the token before a text. ConfigError or DataError, one line, where they are not there."""
    path, start = _found(model)
    return hashlib.sha256(path.read_bytes() + json.dumps(start).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=2)
def read(model: Path | None) -> ModelTokenizer:
    """The tokenizer of a model's folder. ConfigError or DataError, one line, where there is none."""
    path, start = _found(model)
    library = needed("tokenizers", "tokenizers", "tokenizer=model", INSTALL)
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no narrower one
        raise DataError(f"{path}: no tokenizer, or cut short ({str(error).splitlines()[0]}): copy it again") from None
    start_id = tokenizer.token_to_id(start) if isinstance(start, str) else start
    if start_id is None:
        raise DataError(f"{path} has no token {start!r}, which the files beside it let texts begin with")
    return ModelTokenizer(tokenizer, hash_of(model), start_id)


def _found(model: Path | None) -> tuple[Path, str | int]:
    """The file, and the token or id that stands before a text: the one that begins texts, else the one that ends them."""
    if model is None:
        require(False, "tokenizer=model is that of a trained model: name its folder, model=DIR")
    assert model is not None
    path = model / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"tokenizer=model: {path} is missing; copy it there, or choose the tokenizer that the model was trained with")
    for content in (_object(model / name) for name in NAMES):
        for key in ("bos_token", "bos_token_id", "eos_token", "eos_token_id"):
            token = content.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str | int):
                return path, token
    raise DataError(f"{model}: none of {', '.join(NAMES)} says which token begins or ends a text (bos_token, eos_token)")


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file. DataError where it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise DataError(f"{path} is damaged: copy it again") from None
    return content if isinstance(content, dict) else {}
