"""The tokenizer of a saved language model as files of Hugging Face's: `tokenizer.json` and `tokenizer_config.json`. Imports no torch.

The card of the text that a model was trained on says what it takes. Bytes and the symbols of a generated source follow from the card
alone; words and GPT-2's BPE also need their vocabulary. Complete lines get the ids that they had in training; a text that does not end
with a newline is a line that goes on. What stood before a text in training is `bos_token`. Special tokens have no spelling of their own
within a text (`split_special_tokens`), since each is one of the text's own tokens: the newline, or the separator of documents.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hgrn2_bench.cells import replace_file
from hgrn2_bench.config import require
from hgrn2_bench.trained import read_card

END = "</s>"
UNKNOWN = "<unk>"
OUTER = r"(?:[^\S\n]|[\x1c-\x1f])"
"""White space within a line, as Python strips it: more than the library's regular expressions call so."""
SYMBOL = "s"
"""Before a symbol's number, in a text of a generated source."""
FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Vocabulary:
    """What a card does not hold: the id of each entry, and the merges of a BPE in their order."""

    entries: Mapping[str, int]
    merges: Sequence[tuple[str, str]] = ()


def tokenizer_files_of(card: Mapping[str, str], vocabulary: Vocabulary | None = None) -> dict[str, str]:
    """Contents by file name, for the card of a corpus; empty where the vocabulary it takes is not given, or it is of another kind."""
    name = card.get("tokenizer", "").partition(" ")[0]
    source = re.match(r"markov: (\d+) symbols", card.get("text", ""))
    if name == "bytes":
        made = _bytes()
    elif source:
        made = _symbols(int(source[1]))
    elif name in ("gpt2", "word") and vocabulary:
        made = _gpt2(vocabulary) if name == "gpt2" else _words(vocabulary)
    else:
        return {}
    parts, start = made
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "post_processor": None, **parts}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": start,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    return dict(zip(FILES, (json.dumps(each, ensure_ascii=False) + "\n" for each in (whole, config)), strict=True))


def complete(folder: Path, vocabulary: Vocabulary | None = None) -> None:
    """Give a folder that was saved without its tokenizer the files of it. ConfigError where the vocabulary that it takes is not given."""
    card = read_card(folder).tokenizer
    files = tokenizer_files_of(card, vocabulary)
    require(bool(files), f"{folder}: its tokenizer ({card.get('tokenizer', 'not named')}) cannot be made from its card alone")
    for name in reversed(FILES):
        replace_file(folder / name, files[name])


def byte_entries() -> dict[str, int]:
    """The character that stands for each byte in a byte-level BPE: itself where it can be seen, else the next one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in set(seen)]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


NEWLINE = next(entry for entry, byte in byte_entries().items() if byte == ord("\n"))


def _bytes() -> tuple[dict[str, Any], str]:
    """Bytes, their own ids: a byte-level BPE that merges nothing."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"pre_tokenizer": level, "decoder": level, "model": _bpe(byte_entries(), ())}, NEWLINE


def _gpt2(vocabulary: Vocabulary) -> tuple[dict[str, Any], str]:
    """GPT-2's BPE of each line without its outer white space; the newline is what ended lines in training, never part of a longer entry."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    lines = {"type": "Split", "pattern": {"String": "\n"}, "behavior": "Isolated", "invert": False}
    entries = {entry: i for entry, i in vocabulary.entries.items() if entry != END} | {NEWLINE: vocabulary.entries[END]}
    parts = {
        "normalizer": _replacing((rf"{OUTER}*\n{OUTER}*", "\n"), (rf"\A{OUTER}+", "")),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [lines, level]},
        "decoder": level,
        "model": _bpe(entries, vocabulary.merges),
    }
    return parts, NEWLINE


def _words(vocabulary: Vocabulary) -> tuple[dict[str, Any], str]:
    """White-space separated words; decoded, an end of line is a newline again."""
    ends = {"type": "Replace", "pattern": {"String": END}, "content": "\n"}
    spaced = {"type": "WordPiece", "prefix": "\0", "cleanup": False}
    parts = {
        "normalizer": _replacing((r"\n", f" {END} "), (r"[\x1c-\x1f]", " ")),
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": {"type": "Sequence", "decoders": [ends, spaced]},
        "model": {"type": "WordLevel", "vocab": dict(vocabulary.entries), "unk_token": UNKNOWN},
    }
    return parts, END


def _symbols(symbols: int) -> tuple[dict[str, Any], str]:
    """`s1 s2 ...` in either case; other words are left out, since no symbol means "unknown"; symbols of a larger source are separators."""
    separator = f"{SYMBOL}0"
    found = {"type": "Split", "pattern": {"Regex": rf"\b{SYMBOL}[0-9]+\b"}, "behavior": "Removed", "invert": True}
    vocab = {f"{SYMBOL}{i}": i for i in range(symbols)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": separator}
    return {"normalizer": {"type": "Lowercase"}, "pre_tokenizer": found, "decoder": None, "model": model}, separator


def _bpe(entries: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {"type": "BPE", "dropout": None, "unk_token": None, "vocab": dict(entries), "merges": [list(merge) for merge in merges]}


def _replacing(*pairs: tuple[str, str]) -> dict[str, Any]:
    """A normaliser: regular expressions, one after the other, and what comes in their place."""
    each = [{"type": "Replace", "pattern": {"Regex": pattern}, "content": content} for pattern, content in pairs]
    return {"type": "Sequence", "normalizers": each}
