"""`data wikitext check [DIR]`: what a folder holds of WikiText-103 and other texts, whether it is whole, the remedy. Changes nothing."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hgrn2_bench.doctor import NOTE, OK, PROBLEM, Finding, counted
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.reviews import EXPECTED as REVIEWS_EXPECTED
from suites.wikitext import counts, fairseq
from suites.wikitext.places import (
    EXPECTED,
    SPLITS,
    Place,
    find_imdb,
    holds_words,
    is_named_2,
    locate_bpe,
    locate_texts,
    locate_transfer,
    locate_wikitext,
)
from suites.wikitext.readers import Batch, count, read_lines
from suites.wikitext.tokenizers import Bpe, padded, read_bpe

COPY_AGAIN = "copy or unpack it again from its source"
GPT2_IDS = padded(50_257)
FORMS = {
    "tokens": "with <unk> for rare words: what tokenizer=word reads; gpt2 and bytes read the raw text in published numbers",
    "raw": "raw: what tokenizer=gpt2 and bytes read; word reads the text with <unk> in published numbers",
}


def findings(root: Path) -> Iterator[Finding]:
    """A line for each thing found in a folder, as it is found. ConfigError where there is no text that the suite reads."""
    (wikitext, bad), (own, also_bad) = (_located(find, root) for find in (locate_wikitext, locate_texts))
    transfer = list(locate_transfer(root))  # reads names alone
    unread = list(dict.fromkeys(bad + also_bad))
    texts = [place for place in own if place.folder not in {known.folder for known in wikitext}]
    reviews = list(_reviews(root))
    if not (wikitext or transfer or texts or unread or any(each.mark != NOTE for each in reviews)):
        raise ConfigError(f"no text in {root}: expected {EXPECTED['wikitext103']}")
    yield from (Finding(PROBLEM, message) for message in unread)
    if not wikitext and not unread:
        yield Finding(NOTE, "wikitext103: not here", f"expected {EXPECTED['wikitext103']}")
    for place in wikitext:
        yield from _checked_or_text(place, root, [each for each in own if each.folder == place.folder])
    for place in transfer:
        if place.folder not in {known.folder for known in wikitext if known.form == "tokens"}:
            yield from _lines("transfer", place, ("validation", "test"))
    for place in texts:
        yield from _text(place)
    yield from reviews
    yield _bpe(root)


def _located(find: Callable[[Path], Iterator[Place]], root: Path) -> tuple[list[Place], list[str]]:
    """What a search finds up to the first file that cannot be read, and what is wrong with that one."""
    found: list[Place] = []
    try:
        found.extend(find(root))  # keeps what came before an error
    except ConfigError as error:
        return found, [str(error)]
    return found, []


def _checked_or_text(place: Place, root: Path, own: Sequence[Place]) -> Iterator[Finding]:
    """Findings of one copy of WikiText-103; of parquet files that have its names and no split of it, of the user's own text."""
    found = list(_checked(place, root)) if place.layout == "parquet" and own else None
    if found is None:
        yield from _checked(place, root)
    elif any(each.mark == OK for each in found[1:]):  # behind the line that names the copy
        yield from found
    else:
        yield Finding(NOTE, f"wikitext103: no split of it in {place}", "taken for text of your own, which dataset=text reads")
        for text in own:
            yield from _text(text)


def _checked(place: Place, root: Path) -> Iterator[Finding]:
    """Findings of one copy of WikiText-103, or of what has its names."""
    yield Finding(OK, f"wikitext103: found {place}{', ' + FORMS[place.form] if place.form in FORMS else ''}")
    if is_named_2(place.folder, root):
        yield Finding(NOTE, f"wikitext103: {place.folder} is named as WikiText-2", counts.INSTEAD)
    if place.missing:
        yield Finding(PROBLEM, f"wikitext103: {place} has no {' and no '.join(place.missing)} split", COPY_AGAIN)
    there = tuple(split for split in SPLITS if place.files.get(split))
    yield from _binarised(place, there) if place.form == "bin" else _lines("wikitext103", place, there)


def _lines(what: str, place: Place, splits: tuple[str, ...]) -> Iterator[Finding]:
    """Whether each split is whole; what its reader refuses is a problem."""
    for split in splits:
        odd = _Odd()
        try:
            found = count(odd.watch(read_lines(place, split)))
        except ConfigError as error:
            yield Finding(PROBLEM, f"{what} {split}: {error}")
            continue
        if odd.zeros:
            yield Finding(PROBLEM, f"{what} {split}: {counted(odd.zeros, 'line')} with zero bytes: {_names(place, split)}", COPY_AGAIN)
        yield _split_finding(what, place, split, found)


class _Odd:
    """Counts, of the lines that pass, those that hold a zero byte."""

    def __init__(self) -> None:
        self.zeros = 0

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.zeros += sum("\0" in line for line in batch)
            yield batch


def _split_finding(what: str, place: Place, split: str, found: counts.Counted) -> Finding:
    """Whether a split has what a whole one has; of what is only scored, `<unk>` may be WikiText-2's."""
    line = f"{what} {split}: {found.lines:,} lines, {found.words:,} words with their ends of line, {found.unknown:,} {counts.UNKNOWN}"
    if what == "transfer":
        known = counts.Counted(found.lines, found.words, 0)
        fault, doubt = counts.fault_of(split, known), ""
        line += f" ({_names(place, split)})"
    else:
        fault, doubt = counts.fault_of(split, found), counts.doubt_of(split, found)
    if fault:
        return Finding(PROBLEM, f"{what} {split}: {_names(place, split)}: {fault}")
    return Finding(NOTE, f"{what} {split}: {doubt}", "see that the file is whole") if doubt else Finding(OK, f"{line}, as expected")


def _names(place: Place, split: str) -> str:
    return ", ".join(map(str, place.of(split)))


def _binarised(place: Place, splits: tuple[str, ...]) -> Iterator[Finding]:
    """Whether ids, index and dictionary belong together, and how many there are."""
    try:
        has_words = holds_words(place)
        dictionary = fairseq.read_dictionary(place)
    except ConfigError as error:
        yield Finding(PROBLEM, f"wikitext103: {error}")
        return
    yield Finding(OK, f"wikitext103: dictionary of {dictionary.size:,} ids, {'words' if has_words else 'BPE ids'}")
    if not has_words and dictionary.size not in (GPT2_IDS, GPT2_IDS + 1):
        yield Finding(NOTE, f"wikitext103: {dictionary.size:,} ids", f"the published dictionary of GPT-2's BPE has {GPT2_IDS:,}")
    for split in splits:
        try:
            whole = fairseq.read_split(place, split, dictionary)
        except ConfigError as error:
            yield Finding(PROBLEM, f"wikitext103 {split}: {error}")
            continue
        words = len(whole.ids_N) if has_words else counts.words_of_lines(split, whole.lines)
        yield Finding(OK, f"wikitext103 {split}: {len(whole.ids_N):,} ids")
        yield _split_finding("wikitext103", place, split, counts.Counted(whole.lines, words, whole.unknown))


def _text(place: Place) -> Iterator[Finding]:
    """What a set of the user's own files has; the suite needs all three splits."""
    if place.missing:
        yield Finding(NOTE, f"text: {place} has no {' and no '.join(place.missing)} split", "dataset=text needs train, validation and test")
        return
    yield Finding(OK, f"text: found {place}")
    for split in SPLITS:
        try:
            found = count(read_lines(place, split))
            yield Finding(OK, f"text {split}: {found.lines:,} lines, {found.words:,} words with their ends of line")
        except ConfigError as error:
            yield Finding(PROBLEM, f"text {split}: {error}")


def _reviews(root: Path) -> Iterator[Finding]:
    """Whether the folder has IMDB's reviews, all of them."""
    try:
        place = find_imdb(root)
    except ConfigError as error:
        is_absent = str(error).startswith("no data of the IMDB reviews")
        yield Finding(NOTE, "imdb: not here", f"expected {REVIEWS_EXPECTED}") if is_absent else Finding(PROBLEM, f"imdb: {error}")
        return
    yield Finding(OK, f"imdb: found {place.folder} ({place.layout})")
    for split in SPLITS:
        try:
            lines = count(read_lines(place, split)).lines
            yield Finding(OK, f"imdb {split}: {lines:,} lines of reviews")
        except ConfigError as error:
            yield Finding(PROBLEM, f"imdb {split}: {error}")


def _bpe(root: Path) -> Finding:
    """Whether GPT-2's BPE is there."""
    if next(locate_bpe(root), None) is None:
        return Finding(
            NOTE, "tokenizer=gpt2: no BPE files here", "copy GPT-2's tokenizer.json, or vocab.json and merges.txt, into the folder"
        )
    try:
        vocabulary, merges, where = read_bpe(root)
        return Finding(OK, f"tokenizer=gpt2: {where}, hash {Bpe(vocabulary, merges, where).hash}")
    except ConfigError as error:
        return Finding(PROBLEM, f"tokenizer=gpt2: {error}")
