"""What a folder holds of texts: WikiText-103 in each of its forms, files of any text, GPT-2's BPE. Reads names only, and parquet files."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hgrn2_bench.errors import DataError
from hgrn2_bench.files import Copy, check_data_folder, only_copy, searched
from hgrn2_bench.reviews import find_reviews
from hgrn2_bench.rows import has_column, parquet_footer, parquet_rows, shards
from suites.wikitext.counts import UNKNOWN

SPLITS = ("train", "validation", "test")
WORDS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}
"""What files call a split."""
ENDINGS = ("txt", "txt.gz", "tokens", "raw", "jsonl", "jsonl.gz", "parquet")
EXPECTED = {
    "wikitext103": "wiki.{train,valid,test}.tokens, or the same as .raw, or {train,validation,test}-*.parquet (text), "
    "or {train,valid,test}.{bin,idx} with dict.txt",
    "text": "{train,validation,test} in the names of three files (or more) that else agree, as .txt, .jsonl (text) or .parquet (text)",
    "transfer": "wiki.{valid,test}.tokens or wikitext2_{valid,test}.tokens",
}
"""In words; folders above may have any name."""
PREFERRED = {"word": ("tokens", "bin", "raw"), "gpt2": ("raw", "bin", "tokens"), "bytes": ("raw", "tokens"), "model": ("raw", "tokens")}
"""Forms of WikiText-103 that a tokenizer can read, the published one first."""
NAMED_2 = re.compile(r"wiki(text)?[-_]?2(?!\d)", re.IGNORECASE)
"""How a file or folder of WikiText-2 is named."""
BPE_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""GPT-2's, as different packages name them."""
DICTIONARY = "dict.txt"
DICTIONARY_HEAD = 1000
"""Entries that tell a dictionary of words from one of BPE ids."""
CLOSED = {"imgs", "metadata", "pos", "neg", "unsup"}
"""Folders of items, which are many: never searched for texts."""


@dataclass(frozen=True)
class Place(Copy):
    """One copy of one text; its layout is `lines`, `json`, `parquet`, `fairseq`, or one of reviews."""

    form: str
    """`tokens` or `raw` (what WikiText's words are), `bin` (ids already), `text`, `reviews`."""

    def __str__(self) -> str:
        """`DIR (tokens)`."""
        return f"{self.folder} ({self.form}{', parquet' if self.layout == 'parquet' else ''})"

    @property
    def missing(self) -> list[str]:
        """Splits that are not there."""
        return [split for split in SPLITS if not self.files.get(split)]

    def lacks(self, split: str) -> str:
        """What to say where a split is missing."""
        return f"{self.folder}: no {split} split ({self.form}); expected {EXPECTED.get(self.what, '')}"


def find(root: Path, dataset: str, tokenizer: str) -> Place:
    """The copy of a text that a tokenizer reads. ConfigError where there is none, or more than one to choose from."""
    check_data_folder(root, dataset)
    if dataset == "imdb":
        return find_imdb(root)
    if dataset == "text":
        sets = list(locate_texts(root))
        lacking = [f"{place} has no {' and no '.join(place.missing)} split" for place in sets if place.missing]
        return only_copy([place for place in sets if not place.missing], root, dataset, EXPECTED[dataset], lacking)
    there = list(locate_wikitext(root))
    named = [place for place in there if not is_named_2(place.folder, root)] or there
    readable = [place for place in named if place.form != "bin" or holds_words(place) == (tokenizer == "word")]
    for form in PREFERRED[tokenizer]:
        if found_of_form := [place for place in readable if place.form == form]:
            return only_copy(found_of_form, root, dataset, EXPECTED[dataset])
    remarks = [f"found {place}, which tokenizer={tokenizer} cannot read" for place in named]
    remarks += [f"{place.folder} has files of WikiText-2" for place in locate_transfer(root) if is_named_2(place.of("test")[0], root)]
    return only_copy([], root, dataset, EXPECTED[dataset], remarks)


def find_imdb(root: Path) -> Place:
    """The only copy of IMDB's reviews. ConfigError where there is none, or more than one to choose from."""
    found = find_reviews(root)
    return Place("imdb", found.layout, found.folder, found.files, "reviews")


def find_transfer(root: Path) -> Place:
    """WikiText's validation and test split as .tokens, WikiText-103's where both are there. ConfigError where none are, or several."""
    there = list(locate_transfer(root))
    whole = [place for place in there if not is_named_2(place.of("test")[0], root)]
    return only_copy(whole or there, root, "transfer", EXPECTED["transfer"])


def is_named_2(path: Path, root: Path) -> bool:
    """Whether a name on the way from the root says WikiText-2."""
    return any(NAMED_2.match(part) for part in path.relative_to(root).parts)


def locate_wikitext(root: Path) -> Iterator[Place]:
    """Every copy of WikiText-103, or of what has its names, in a folder or at most four below it."""
    for folder, files in searched(root, CLOSED):
        names = {path.name: path for path in files}
        for form in ("tokens", "raw"):
            there = {WORDS[word]: (names[name],) for word in ("train", "valid", "test") if (name := f"wiki.{word}.{form}") in names}
            if there:
                yield Place("wikitext103", "lines", folder, there, form)
        pairs = {
            WORDS[word]: (names[f"{word}.bin"], names[f"{word}.idx"])
            for word in ("train", "valid", "test")
            if {f"{word}.bin", f"{word}.idx"} <= set(names)
        }
        if pairs:
            yield Place("wikitext103", "fairseq", folder, pairs, "bin")
        for shard in shards(files, WORDS, ("parquet",)):
            if set(shard) == set(SPLITS) and all(_is_text_alone(path) for paths in shard.values() for path in paths):
                whole = {split: tuple(paths) for split, paths in shard.items()}
                yield Place("wikitext103", "parquet", folder, whole, _form(shard["validation"]))


def locate_texts(root: Path) -> Iterator[Place]:
    """Every set of text files that has a training split."""
    for folder, files in searched(root, CLOSED):
        for there in shards(files, WORDS, ENDINGS):
            if "train" not in there:
                continue
            name = there["train"][0].name
            layout = "parquet" if name.endswith("parquet") else "json" if ".jsonl" in name else "lines"
            if layout != "parquet" or all(has_column(parquet_footer(path), "text") for paths in there.values() for path in paths):
                yield Place("text", layout, folder, {split: tuple(paths) for split, paths in there.items()}, "text")


def locate_transfer(root: Path) -> Iterator[Place]:
    """Every pair of validation and test split of WikiText as .tokens."""
    for folder, files in searched(root, CLOSED):
        names = {path.name: path for path in files}
        for pattern in ("wiki.{}.tokens", "wikitext2_{}.tokens"):
            pair = {WORDS[word]: (names[pattern.format(word)],) for word in ("valid", "test") if pattern.format(word) in names}
            if len(pair) > 1:
                yield Place("transfer", "lines", folder, pair, "tokens")


def locate_bpe(root: Path) -> Iterator[tuple[Path, ...]]:
    """Every set of files that describes a BPE."""
    for folder, files in searched(root, CLOSED):
        there = {path.name for path in files}
        yield from (tuple(folder / name for name in names) for names in BPE_FILES if there.issuperset(names))


def _is_text_alone(path: Path) -> bool:
    """Whether a parquet file has texts without labels."""
    footer = parquet_footer(path)
    return has_column(footer, "text") and not has_column(footer, "label")


def _form(validation: Sequence[Path]) -> str:
    """Which of WikiText's two texts a table holds: that with `<unk>` for rare words, or the raw one."""
    has_unknown = any(UNKNOWN in (text or "") for path in validation for (text,) in parquet_rows(path, ("text",)))
    return "tokens" if has_unknown else "raw"


def holds_words(place: Place) -> bool:
    """Whether the dictionary beside fairseq's files is one of words, not of BPE ids written as numbers. DataError where there is none."""
    path = place.folder / DICTIONARY
    if not path.is_file():
        raise DataError(f"{path} is missing: fairseq's .bin files are ids of its entries; copy it to them")
    with path.open("rb") as file:
        head = [line.rpartition(b" ")[0] for line in itertools.islice(file, DICTIONARY_HEAD)]
    return not all(entry.isdigit() or entry.startswith((b"madeupword", b"<")) for entry in head)
