"""The corpus of a configuration, from the user's files: found, tokenised once, checked."""

import functools
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hgrn2_bench.caching import folder_of, locked
from hgrn2_bench.config import require
from hgrn2_bench.corpus import Corpus, TokenSplit
from hgrn2_bench.files import cache_folder, data_folder, fingerprint, named
from hgrn2_bench.text_tokenizers import Vocabulary
from suites.wikitext import arrays, counts, fairseq, model_tokenizer
from suites.wikitext.places import DICTIONARY, SPLITS, Place, find, find_transfer
from suites.wikitext.readers import HELD_OUT, SHUFFLE_SEED, count, read_lines
from suites.wikitext.settings import WikitextConfig
from suites.wikitext.tokenizers import EOS, Bpe, Bytes, Tokenizer, Words, bpe_hash, count_words, read_bpe

RULES = 1
"""Raised when the same files give other ids or counts."""
WORD = "white-space separated, and one for each end of line"
NAMES = {"raw": "WikiText-103 raw", "tokens": "WikiText-103 with <unk>", "text": "files of the user's"}


SCORED = ("validation", "test")


@dataclass(frozen=True)
class Source:
    """Whole splits by name, the hash of each one's ids, and what they are."""

    splits: Mapping[str, TokenSplit]
    hashes: Mapping[str, str]
    card: Mapping[str, str]
    vocab_size: int
    start_id: int
    vocabulary: Vocabulary | None = None


@functools.lru_cache(maxsize=2)
def load(config: WikitextConfig, model: Path | None = None) -> Corpus:
    """The splits of a text; cells of one worker that share them open them once. `model`: the folder that tokenizer=model reads.

    ConfigError, one line, where the files are not there; DataError where they are damaged or of another text.
    """
    place = find(data_folder(), config.dataset, config.tokenizer)
    source = _binarised(place, config) if place.form == "bin" else _tokenised(place, config, model)
    digest = hashlib.sha256(json.dumps([sorted(source.card.items()), source.vocab_size, source.start_id]).encode())
    for name in sorted(source.splits):
        digest.update(f"{name} {len(source.splits[name].ids_N)} {source.hashes[name]}".encode())
    hashed = digest.hexdigest()[:16]
    return Corpus(source.splits, source.vocab_size, source.start_id, source.card, hashed, vocabulary=source.vocabulary)


def fingerprint_of(config: WikitextConfig, model: Path | None = None) -> str:
    """16 hex digits over the files that a configuration reads, its BPE and what it transfers to among them; of WikiText-103 after its form.

    `raw:`, `tokens:` or `bin:`. Empty for a generated source. ConfigError where the files are not there. Imports no torch.
    """
    if config.dataset == "markov":
        return ""
    own = model_tokenizer.hash_of(model) if config.tokenizer == "model" else ""
    return _fingerprint(str(data_folder()), config.dataset, config.tokenizer, config.transfer, own)


@functools.cache
def _fingerprint(_root: str, dataset: str, tokenizer: str, transfer: bool, own: str) -> str:
    root = data_folder()
    place = find(root, dataset, tokenizer)
    parts = [_place_fingerprint(place)]
    if transfer:
        parts.append(_place_fingerprint(find_transfer(root)))
    if tokenizer == "gpt2" and place.form != "bin":
        vocabulary, merges, _ = read_bpe(root)
        parts.append(bpe_hash(vocabulary, merges))
    parts += [own] if own else []
    joined = parts[0] if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    return f"{place.form}:{joined}" if dataset == "wikitext103" else joined


def _place_fingerprint(place: Place) -> str:
    files = {**place.files, **({"dictionary": (place.folder / DICTIONARY,)} if place.form == "bin" else {})}
    return fingerprint(named(place.folder, files))


def _tokenised(place: Place, config: WikitextConfig, model: Path | None) -> Source:
    """A text, through the cache."""
    if config.dataset == "wikitext103":  # before minutes are spent on the training split
        for split in SCORED:
            counts.refuse_wrong(str(place.of(split)[0]), split, count(read_lines(place, split)))
    own = model_tokenizer.read(model) if config.tokenizer == "model" else None
    folder = _folder(place, f"model {own.hash}" if own else config.tokenizer)
    with locked(folder):
        tokenizer = own or _tokenizer(place, config.tokenizer, folder)
        stored = _stored(folder, place, (*SCORED, "train"), tokenizer)
    card = _card(place, tokenizer)
    if config.dataset == "wikitext103":
        counts.refuse_wrong(str(place.of("train")[0]), "train", stored["train"].counted)
    if config.transfer:
        target = find_transfer(data_folder())
        folder = _folder(target, tokenizer.hash)
        with locked(folder):
            stored |= {f"transfer_{split}": found for split, found in _stored(folder, target, SCORED, tokenizer).items()}
        card["transfer"] = ", ".join(path.name for split in SCORED for path in target.of(split))
    splits = {name: _cut(each, _asked(name, config)) for name, each in stored.items()}
    hashes = {name: each.hash for name, each in stored.items()}
    return Source(splits, hashes, card, tokenizer.vocab_size, tokenizer.start_id, tokenizer.vocabulary)


def _stored(folder: Path, place: Place, splits: Sequence[str], tokenizer: Tokenizer) -> dict[str, arrays.Stored]:
    """Splits of a text, tokenised where they are not yet. The folder is locked."""
    return {split: arrays.stored_split(folder, split, tokenizer, partial(read_lines, place, split)) for split in splits}


def _folder(place: Place, tokenizer: str) -> Path:
    """Where a text is kept; files that changed in their middle alone are told by their times."""
    times = [path.stat().st_mtime_ns for paths in place.files.values() for path in paths]
    key = {"rules": RULES, "dataset": place.what, "files": _place_fingerprint(place), "times": times, "tokenizer": tokenizer}
    if tokenizer == "gpt2":
        vocabulary, merges, _ = read_bpe(data_folder())
        key["bpe"] = bpe_hash(vocabulary, merges)
    return folder_of(cache_folder("wikitext"), place.what, key)


def _tokenizer(place: Place, name: str, folder: Path) -> Tokenizer:
    """The tokenizer of this name, for words with the vocabulary of the training split."""
    if name == "bytes":
        return Bytes()
    if name == "gpt2":
        return Bpe(*read_bpe(data_folder()))
    words = arrays.stored_words(folder, lambda: count_words(read_lines(place, "train")))
    types = len(words) + 2  # <unk> and the end of line
    if place.what == "wikitext103" and types != counts.TYPES:
        warnings.warn(f"{place}: {types:,} types, the literature has {counts.TYPES:,}", stacklevel=2)
    return Words(words)


def _card(place: Place, tokenizer: Tokenizer) -> dict[str, str]:
    """How the text became tokens."""
    card = {
        "text": NAMES.get(place.form, place.form),
        "tokenizer": f"{tokenizer.name} {tokenizer.hash}, {tokenizer.vocab_size} ids",
        "end of line": tokenizer.end_of_line,
        "word": WORD,
    }
    if place.what == "imdb":
        card["text"] = "IMDB reviews, a line each"
        card["validation"] = f"the last {HELD_OUT} training reviews, shuffled with seed {SHUFFLE_SEED}"
    return card


def _asked(name: str, config: WikitextConfig) -> int:
    """Tokens of a split that a configuration takes; 0: all."""
    return config.train_tokens if name == "train" else config.eval_tokens


def _cut(stored: arrays.Stored, tokens: int) -> TokenSplit:
    words, size = stored.first(tokens)
    return TokenSplit(stored.ids_N[: tokens or None], words, size)


def _binarised(place: Place, config: WikitextConfig) -> Source:
    """Ids that fairseq made, where they are."""
    require(not config.transfer, f"transfer=true: {place} has ids without their tokenizer; give the text itself")
    dictionary = fairseq.read_dictionary(place)
    splits, hashes = {}, {}
    for split in SPLITS:
        whole = fairseq.read_split(place, split, dictionary)
        words = len(whole.ids_N) if config.tokenizer == "word" else counts.words_of_lines(split, whole.lines)
        where = str(place.of(split)[0])
        counts.refuse_wrong(where, split, counts.Counted(whole.lines, words, whole.unknown))
        ids_N = whole.ids_N[: _asked(split, config) or None]
        is_whole = len(ids_N) == len(whole.ids_N)
        splits[split] = TokenSplit(ids_N, words if is_whole else len(ids_N) if config.tokenizer == "word" else None, None)
        hashes[split] = whole.hash
    card = {
        "text": "WikiText-103, binarised by fairseq",
        "tokenizer": f"{config.tokenizer}, {DICTIONARY} {dictionary.hash}, {dictionary.size} ids",
        "end of line": Words.end_of_line,
        "word": WORD,
    }
    return Source(splits, hashes, card, dictionary.size, EOS)
