"""Lines to token ids: words as fairseq counts them, GPT-2's BPE as HGRN2's recipe uses it, bytes.

Ids of words and of BPE are fairseq's: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, then the entries, padded with made-up ones to a multiple
of 8 (fairseq/data/dictionary.py). Each line, a blank one too, ends with one `</s>`. Bytes are their own ids; a line ends as its text does.

Shape letters: N tokens, L lines.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from hgrn2_bench.errors import ConfigError, DataError
from hgrn2_bench.rows import needed
from hgrn2_bench.text_tokenizers import END, UNKNOWN, Vocabulary
from suites.wikitext.places import locate_bpe
from suites.wikitext.readers import Batch

SPECIALS = ("<s>", "<pad>", END, UNKNOWN)
EOS, UNK = 2, 3
MULTIPLE = 8
INSTALL = 'pip install "hgrn2_bench[wikitext]"'
GPT2_ENTRIES, GPT2_MERGES = 50_257, 50_000
GPT2_PROBE = ("Hello world!", (15496, 995, 0))
"""A text and its ids, which no other BPE of this size gives."""


class Encoded(NamedTuple):
    """Ids of some lines, (N,), and how many each line has, (L,)."""

    ids_N: np.ndarray
    lengths_L: np.ndarray


class Tokenizer(Protocol):
    """What turns lines into ids."""

    name: str
    hash: str
    """16 hex digits over all that decides the ids."""
    vocab_size: int
    start_id: int
    """What stands before the first token of a split."""
    end_of_line: str
    """The rule, in words."""
    vocabulary: Vocabulary | None
    """With which a saved model's own tokenizer is written; None where its card tells it, or it is no tokenizer of ours."""

    def encode(self, lines: Batch) -> Encoded:
        """Ids of consecutive lines."""
        ...


def padded(entries: int) -> int:
    """Size of a fairseq dictionary, specials and made-up entries included."""
    return -(-(entries + len(SPECIALS)) // MULTIPLE) * MULTIPLE


def dtype_of(vocab_size: int) -> np.dtype:
    """The smallest type that holds all ids."""
    return np.dtype(np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.int32)


class Bytes:
    """UTF-8 bytes, their own ids."""

    name = "bytes"
    hash = hashlib.sha256(b"bytes").hexdigest()[:16]
    vocab_size = 256
    start_id = ord("\n")
    end_of_line = "the newline byte of the text (10)"
    vocabulary: Vocabulary | None = None

    def encode(self, lines: Batch) -> Encoded:
        """Ids of consecutive lines."""
        return Encoded(np.frombuffer("".join(lines).encode(), np.uint8), np.array(list(map(byte_length, lines))))


class Words:
    """White-space separated words that the training split has."""

    name = "word"
    start_id = EOS
    end_of_line = "</s> after each line, blank ones too"

    def __init__(self, words: Sequence[str]) -> None:
        """`words` in the order of their ids."""
        self.hash = hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
        self.vocab_size = padded(len(words))
        self._ids = {word: i for i, word in enumerate(words, len(SPECIALS))} | {name: i for i, name in enumerate(SPECIALS)}
        self._dtype = dtype_of(self.vocab_size)
        self.vocabulary: Vocabulary | None = Vocabulary(self._ids)

    def encode(self, lines: Batch) -> Encoded:
        """Ids of consecutive lines."""
        get, ids, lengths = self._ids.get, [], []
        for line in lines:
            words = line.split()
            ids += [get(word, UNK) for word in words]
            ids.append(EOS)
            lengths.append(len(words) + 1)
        return Encoded(np.array(ids, self._dtype), np.array(lengths))


def count_words(batches: Iterable[Batch]) -> list[str]:
    """The words of a text by falling count, equal counts in code point order; without those named as the specials, whose ids they have."""
    counts: Counter[str] = Counter()
    for batch in batches:
        counts.update(word for line in batch for word in line.split())
    for special in SPECIALS:
        del counts[special]
    return sorted(counts, key=lambda word: (-counts[word], word))


class Bpe:
    """GPT-2's byte-level BPE of each line without its outer white space."""

    name = "gpt2"
    start_id = EOS
    end_of_line = "outer white space stripped, </s> after each line, blank ones too"

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]], where: str) -> None:
        """DataError, which begins with `where`, where they are not GPT-2's."""
        self.hash = bpe_hash(vocabulary, merges)
        self.vocab_size = padded(len(vocabulary))
        specials = {name: i for i, name in enumerate(SPECIALS)}
        self.vocabulary: Vocabulary | None = Vocabulary({entry: i + len(SPECIALS) for entry, i in vocabulary.items()} | specials, merges)
        library = needed("tokenizers", "tokenizers", "tokenizer=gpt2", INSTALL)
        text, ids = GPT2_PROBE
        try:
            self._bpe = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=merges))
            self._bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
            given = tuple(self._bpe.encode(text).ids)
        except Exception as error:  # the library has no narrower one
            raise DataError(f"{where}: no byte-level BPE ({str(error).splitlines()[0]}): copy it again") from None
        if (len(vocabulary), len(merges), given) != (GPT2_ENTRIES, GPT2_MERGES, ids):
            found = f"{len(vocabulary):,} entries and {len(merges):,} merges"
            raise DataError(f"{where}: {found}: not GPT-2's BPE, which has {GPT2_ENTRIES:,} and {GPT2_MERGES:,}; copy that of model gpt2")

    def encode(self, lines: Batch) -> Encoded:
        """Ids of consecutive lines."""
        dtype, end = dtype_of(self.vocab_size), [EOS - len(SPECIALS)]
        ids = [each.ids + end for each in self._bpe.encode_batch_fast([line.strip() for line in lines], add_special_tokens=False)]
        flat_N = np.array([i for line in ids for i in line], np.int64) + len(SPECIALS)
        return Encoded(flat_N.astype(dtype), np.array([len(line) for line in ids]))


def read_bpe(root: Path) -> tuple[dict[str, int], list[tuple[str, str]], str]:
    """Vocabulary, merges and file name of the BPE nearest to the root. ConfigError where there is none, DataError where it is damaged."""
    paths = next(locate_bpe(root), None)
    if paths is None:
        names = "tokenizer.json, vocab.json with merges.txt, or encoder.json with vocab.bpe"
        raise ConfigError(f"tokenizer=gpt2 needs GPT-2's BPE in {root}: {names}; copy them there, or choose tokenizer=word or bytes")
    try:
        table = json.loads(paths[0].read_bytes())
        if len(paths) == 1:
            return table["model"]["vocab"], [_pair(merge) for merge in table["model"]["merges"]], str(paths[0])
        lines = paths[1].read_bytes().decode().split("\n")
        return dict(table), [_pair(line) for line in lines if line and not line.startswith("#version")], str(paths[0])
    except (ValueError, KeyError, TypeError):  # no JSON, not UTF-8, no such key, another shape
        raise DataError(f"{' or '.join(map(str, paths))}: no byte-level BPE, or cut short: copy it again") from None


def bpe_hash(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> str:
    """16 hex digits over a BPE, in whichever files it came."""
    return hashlib.sha256(json.dumps([sorted(vocabulary.items()), merges]).encode()).hexdigest()[:16]


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge, written in one string or two. ValueError for anything else."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def byte_length(text: str) -> int:
    """UTF-8 bytes of a text."""
    return len(text) if text.isascii() else len(text.encode())
