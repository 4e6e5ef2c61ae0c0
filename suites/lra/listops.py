"""ListOps: nested operators over lists of digits, in prefix form; the label is the value, one of ten classes.

Source: Long Range Arena (arXiv 2011.04006), google-research/long-range-arena, lra_benchmarks/data/listops.py; the ids are those of
state-spaces/s4, src/dataloaders/lra.py. The generator has the published distribution and seeds of its own: the published files came from an
unseeded run and cannot be made again, only read.

Letters: N expressions, S tokens of all expressions together, n nodes of one level of a tree. Inside this module a token is a code, its
place in TOKENS; what a model reads are the ids of a `Vocabulary`.
"""

import csv
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from hgrn2_bench.errors import ConfigError
from hgrn2_bench.subsets import drawn
from suites.lra import shards
from suites.lra.items import Split, Texts, take_texts

T = TypeVar("T")
Progress = Callable[[int, int], None]

VERSION = 1
"""Raised when the same seed gives other expressions."""
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
CLOSE = "]"
TOKENS = (*"0123456789", *OPERATORS, CLOSE)
"""The closed set of tokens, in the order of their codes."""
SPECIALS = ("<pad>", "<unk>", "<eos>")
"""Tokens with the ids 0, 1, 2; state-spaces/s4. Nothing here is unknown: a text with a foreign token is refused."""
EOS = SPECIALS.index("<eos>")
CODES = {token: code for code, token in enumerate(TOKENS)}
FIRST_OPERATOR, CLOSE_CODE = CODES[OPERATORS[0]], CODES[CLOSE]
APPLY: dict[int, Callable[[list[int]], int]] = {
    CODES["[MIN"]: min,
    CODES["[MAX"]: max,
    CODES["[MED"]: lambda args: (sorted(args)[(len(args) - 1) // 2] + sorted(args)[len(args) // 2]) // 2,
    CODES["[SM"]: lambda args: sum(args) % 10,
}
NODES_PER_OPERATOR = 4
"""One node of this many is an operator, where the depth allows one."""
MAX_TRIES = 100_000
"""Trees that one item may take. The published bounds keep one in three of those whose root is an operator."""
MAX_DRAWS = 20
"""Items drawn, for each different one wanted, before it is held that there are no more."""
SHARD = 1_000
"""Items in a file of the cache, about 1 MB."""
FILES = {"train": "basic_train.tsv", "val": "basic_val.tsv", "test": "basic_test.tsv"}
COUNTS = {"train": 96_000, "val": 2_000, "test": 2_000}
"""Expressions of the published splits."""
MAX_TOKENS = 2_048
"""Greatest length with <eos>, as published; no published or generated expression reaches it."""
PART_SEED = 42
"""Draws the part of a file that is asked for."""


@dataclass(frozen=True)
class ListOps:
    """What decides the distribution; the defaults are the published ones."""

    min_length: int = 500
    """Tokens (digits, operators and closing brackets), exclusive."""
    max_length: int = 2_000
    """Tokens, exclusive."""
    max_depth: int = 10
    """Levels of the tree; on the last one all nodes are digits."""
    max_args: int = 10
    """The number of arguments is uniform from 2 to this."""

    def __post_init__(self) -> None:
        """ConfigError where no expression can be right."""
        if self.max_depth < 2 or self.max_args < 2:
            raise ConfigError(f"max_depth={self.max_depth} and max_args={self.max_args} must be at least 2")
        longest = sum(self.max_args**level * (2 if level < self.max_depth - 1 else 1) for level in range(self.max_depth))
        if self.min_length < 1 or self.max_length - self.min_length < 2 or self.min_length >= longest:
            raise ConfigError(
                f"min_length={self.min_length} and max_length={self.max_length} leave no length between them: both are exclusive, the "
                f"least is 1, and depth {self.max_depth} with {self.max_args} arguments gives at most {longest} tokens"
            )


@dataclass(frozen=True)
class Examples:
    """Expressions as codes, with their values."""

    codes: Texts
    """uint8."""
    labels_N: np.ndarray
    """uint8."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Rows or items left out, by reason."""


# the generator


def example(task: ListOps, seed: int, index: int) -> tuple[np.ndarray, int]:
    """Item `index` of the stream of a seed: its codes, uint8, and its value. Depends on nothing else."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(index,))))
    for _ in range(MAX_TRIES):
        if levels := _tree(task, rng):
            return _write_out(levels, rng)
    raise ConfigError(f"{task}: none of {MAX_TRIES} trees has a length between the bounds")


def _tree(task: ListOps, rng: np.random.Generator) -> list[np.ndarray] | None:
    """The number of arguments of each node (0 for a digit), level by level; None where the length is out of bounds.

    The root is an operator: no lower bound lets a lone digit pass, so that leaving it out changes nothing but the speed. One
    draw decides both whether a node is an operator and its number of arguments. The arguments of a level's operators, in order, are
    the nodes of the next level.
    """
    choices = task.max_args - 1
    levels = [rng.integers(2, task.max_args + 1, 1)]
    length, nodes = 2, int(levels[0][0])
    while nodes:
        if length + nodes >= task.max_length:
            return None
        if len(levels) == task.max_depth - 1:
            args_n = np.zeros(nodes, np.int64)
        else:
            drawn_n = rng.integers(NODES_PER_OPERATOR * choices, size=nodes)
            args_n = np.where(drawn_n < choices, drawn_n + 2, 0)
        levels.append(args_n)
        length += nodes + int(np.count_nonzero(args_n))
        nodes = int(args_n.sum())
    return levels if task.min_length < length < task.max_length else None


def _write_out(levels: list[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Draw the symbols of a tree; its codes in order, and its value."""
    symbols = [np.where(args_n > 0, rng.integers(4, size=len(args_n)), rng.integers(10, size=len(args_n))) for args_n in levels]
    sizes, value = _measure(levels, symbols)
    codes = np.empty(sizes[0][0], np.uint8)
    place_n = np.zeros(1, np.int64)
    for level, (args_n, symbols_n, size_n) in enumerate(zip(levels, symbols, sizes, strict=True)):
        codes[place_n] = symbols_n + FIRST_OPERATOR * (args_n > 0)
        nodes = np.flatnonzero(args_n)
        codes[place_n[nodes] + size_n[nodes] - 1] = CLOSE_CODE
        if len(nodes):
            before_n, args_n = _starts(sizes[level + 1]), args_n[nodes]
            place_n = before_n + np.repeat(place_n[nodes] + 1 - before_n[_starts(args_n)], args_n)
    return codes, value


def _measure(levels: list[np.ndarray], symbols: list[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """Tokens of the tree under each node, level by level; the value of the root."""
    sizes, values_n = [np.ones_like(levels[-1])], symbols[-1]
    for args_n, symbols_n in zip(levels[-2::-1], symbols[-2::-1], strict=True):
        nodes = np.flatnonzero(args_n)
        starts, below_n = _starts(args_n[nodes]), values_n
        size_n, values_n = np.ones_like(args_n), symbols_n.copy()
        size_n[nodes] = 2 + np.add.reduceat(sizes[-1], starts)
        values_n[nodes] = _apply(symbols_n[nodes], below_n, starts)
        sizes.append(size_n)
    return sizes[::-1], int(values_n[0])


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where each of consecutive groups begins."""
    return np.cumsum(counts) - counts


def _apply(operators: np.ndarray, values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The value of each operator (its place in OPERATORS) over its group of the values; groups begin at `starts`."""
    counts = np.diff(starts, append=len(values))
    group = np.repeat(np.arange(len(starts)), counts)
    ordered = np.sort(group * 10 + values) % 10
    low, high = ordered[starts + (counts - 1) // 2], ordered[starts + counts // 2]
    results = (ordered[starts], ordered[starts + counts - 1], (low + high) // 2, np.add.reduceat(values, starts) % 10)
    return np.choose(operators, results)


def make(task: ListOps, seed: int, items: range) -> dict[str, np.ndarray]:
    """A range of items of the stream: codes (S,) uint8, lengths (N,) int32, labels (N,) uint8."""
    made = [example(task, seed, index) for index in items]
    codes, labels = zip(*made, strict=True)
    return {
        "codes": np.concatenate(codes),
        "lengths": np.array([len(each) for each in codes], np.int32),
        "labels": np.array(labels, np.uint8),
    }


def generate(
    task: ListOps, seed: int, counts: Mapping[str, int], cache: Path, workers: int = 1, progress: Progress | None = None
) -> dict[str, Examples]:
    """Splits of the given sizes, cut in order from the first different expressions of a seed's stream; made once, then read from `cache`.

    An expression equal to an earlier one is dropped, and the stream read on: larger counts give the same expressions first. `skipped` of
    a split counts what was dropped on the way to its last expression.
    """
    key = {"version": VERSION, "seed": seed, **asdict(task)}
    source = shards.Source("listops", key, functools.partial(make, task, seed), SHARD)
    if min(counts.values()) < 1:
        raise ConfigError(f"each split of ListOps needs at least one expression, not {dict(counts)}")
    wanted, seen, parts, drawn = sum(counts.values()), set[bytes](), list[dict[str, np.ndarray]](), 0
    kept = np.zeros(0, np.int64)
    while len(kept) < wanted:
        if drawn > MAX_DRAWS * wanted:
            raise ConfigError(f"{task}: {wanted} different expressions are wanted, and {drawn} items hold {len(kept)}")
        block = range(drawn, drawn + wanted - len(kept))
        parts.append(shards.generate(cache, source, block, workers, progress))
        kept = np.append(kept, drawn + np.flatnonzero(_first_seen(parts[-1], seen)))
        drawn = block.stop
    arrays = parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return dict(_cut(arrays, kept, counts))


def _first_seen(part: Mapping[str, np.ndarray], seen: set[bytes]) -> np.ndarray:
    """Whether an expression is in `seen` for the first time, (n,); adds all."""
    texts = Texts(part["codes"], np.cumsum(part["lengths"], dtype=np.int64))
    new = np.zeros(len(texts), np.bool_)
    for i in range(len(texts)):
        digest = hashlib.blake2b(texts[i].tobytes(), digest_size=16).digest()
        new[i] = digest not in seen
        seen.add(digest)
    return new


def _cut(arrays: Mapping[str, np.ndarray], kept: np.ndarray, counts: Mapping[str, int]) -> Iterator[tuple[str, Examples]]:
    """Each split's name and its share of the items `kept`, in order."""
    lengths, start, drawn = arrays["lengths"].astype(np.int64), 0, 0
    ends = np.cumsum(lengths)
    for name, count in counts.items():
        items, first = kept[start : start + count], drawn
        start, drawn = start + count, int(items[-1]) + 1
        codes, mine = arrays["codes"][ends[first] - lengths[first] : ends[drawn - 1]], np.zeros(drawn - first, np.bool_)
        mine[items - first] = True
        if duplicates := drawn - first - count:
            codes = codes[np.repeat(mine, lengths[first:drawn])]
        skipped = {"duplicate": duplicates} if duplicates else {}
        yield name, Examples(Texts(codes, np.cumsum(lengths[items])), arrays["labels"][items], skipped)


# the published files


def read(folder: Path) -> dict[str, Examples]:
    """The published files under `folder`, row by row; ConfigError where one is missing or is no such file.

    Rows that are not right are left out and counted in `skipped`, by reason; the value of every expression is computed again.
    """
    if missing := [name for name in FILES.values() if not (folder / name).is_file()]:
        raise ConfigError(f"ListOps: {folder} has no {', '.join(missing)}; it must hold {', '.join(FILES.values())}")
    return {split: read_file(folder / name) for split, name in FILES.items()}


def read_file(path: Path) -> Examples:
    """The rows of one file `Source<TAB>Target`. Memory: the codes and one row. An unclosed quote counts once, whatever it swallows."""
    codes, lengths, labels, skipped = bytearray(), list[int](), bytearray(), Counter[str]()
    with path.open(newline="", encoding="ascii", errors="replace") as file:
        rows = csv.reader(file, delimiter="\t")
        if next(rows, None) != ["Source", "Target"]:
            raise ConfigError(f"{path}: its first line must be Source<TAB>Target")
        while True:
            try:
                row, label = _parse(next(rows))
            except StopIteration:
                break
            except (ValueError, csv.Error) as error:
                skipped[str(error)] += 1
                continue
            codes += row
            lengths.append(len(row))
            labels.append(label)
    if not lengths:
        raise ConfigError(f"{path} has no row that is right; wrong rows: {dict(skipped) or 'none'}")
    ends = np.cumsum(lengths, dtype=np.int64)
    return Examples(Texts(np.frombuffer(codes, np.uint8), ends), np.frombuffer(labels, np.uint8), dict(skipped))


def _parse(row: list[str]) -> tuple[bytes, int]:
    """Codes and label of a row; ValueError with the reason where it is wrong."""
    if len(row) != 2:
        raise ValueError("not two fields")
    codes, label = tokenize(row[0]), row[1]
    if label not in TOKENS[:10]:
        raise ValueError("label is not a digit")
    if evaluate(codes) != int(label):
        raise ValueError("label is not the value")
    return codes, int(label)


# text, codes, ids


def tokenize(text: str) -> bytes:
    """The codes of an expression, bracketed as published or not; ValueError where a token is foreign."""
    words = text.replace("(", " ").replace(")", " ").replace(CLOSE, f" {CLOSE} ").split()
    try:
        return bytes([CODES[word] for word in words])
    except KeyError:
        raise ValueError("foreign token") from None


def evaluate(codes: Iterable[int]) -> int:
    """The value of an expression; ValueError where the codes are none."""
    return _fold(codes, range(10), lambda operator, args: APPLY[operator](args))


def expression(codes: Iterable[int]) -> str:
    """The text of an expression as the published files have it: every prefix of an operator's list stands in brackets."""

    def bracket(operator: int, args: list[str]) -> str:
        return "( " * (len(args) + 1) + TOKENS[operator] + "".join(f" {each} )" for each in args) + f" {CLOSE} )"

    return _fold(codes, TOKENS, bracket)


def _fold(codes: Iterable[int], leaves: Sequence[T], node: Callable[[int, list[T]], T]) -> T:
    """What `node` makes of each operator and its arguments, innermost first, by a stack; `leaves` are the digits."""
    stack: list[tuple[int, list[T]]] = []
    args: list[T] = []
    for code in codes:
        if code < FIRST_OPERATOR:
            args.append(leaves[code])
        elif code < CLOSE_CODE:
            stack.append((code, args))
            args = []
        elif not stack or not args:
            raise ValueError("closing bracket without operator or arguments")
        else:
            (operator, outer), inner = stack.pop(), args
            args = outer
            args.append(node(operator, inner))
    if stack or len(args) != 1:
        raise ValueError("not one closed expression")
    return args[0]


@dataclass(frozen=True)
class Vocabulary:
    """Ids of tokens: SPECIALS, then the closed set of tokens by falling frequency in the training split, ties by name."""

    tokens: tuple[str, ...]
    """In the order of their ids."""

    @classmethod
    def of(cls, train: Examples) -> "Vocabulary":
        """The vocabulary of a training split; a token that does not occur has its id nevertheless. The closing bracket is named X here."""
        counts = [np.count_nonzero(train.codes.ids_S == code) for code in range(len(TOKENS))]  # bincount would take 8 bytes a token
        ordered = sorted(TOKENS, key=lambda token: (-counts[CODES[token]], "X" if token == CLOSE else token))
        return cls((*SPECIALS, *ordered))

    @property
    def ids(self) -> np.ndarray:
        """The id of each code, uint8 (15,)."""
        return np.array([self.tokens.index(token) for token in TOKENS], np.uint8)

    def encode(self, text: str) -> np.ndarray:
        """The ids of an expression's text, uint8, without <eos>."""
        return self.ids[np.frombuffer(tokenize(text), np.uint8)]

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids, as published."""
        return expression(self._codes(ids))

    def evaluate(self, ids: np.ndarray) -> int:
        """The value of ids."""
        return evaluate(self._codes(ids))

    def _codes(self, ids: np.ndarray) -> list[int]:
        """The codes of ids up to the first <eos>, if there is one."""
        tokens = [self.tokens[i] for i in ids.tolist()]
        tokens = tokens[: tokens.index("<eos>")] if "<eos>" in tokens else tokens
        if any(token in SPECIALS for token in tokens):
            raise ValueError("special token inside an expression")
        return [CODES[token] for token in tokens]


def splits(examples: Mapping[str, Examples], max_tokens: int = MAX_TOKENS, items: Mapping[str, int] | None = None) -> dict[str, Split]:
    """What a model reads: the ids of the training split's vocabulary, cut to max_tokens - 1, then <eos>.

    Of a split that `items` names, at most so many examples, drawn by a seed; the vocabulary is that of all.
    """
    ids = Vocabulary.of(examples["train"]).ids
    return {name: _split(_some(each, (items or {}).get(name, 0)), ids, max_tokens) for name, each in examples.items()}


def _some(examples: Examples, number: int) -> Examples:
    rows_N = drawn(np.arange(len(examples.labels_N)), number, PART_SEED)
    return replace(examples, codes=take_texts(examples.codes, rows_N), labels_N=examples.labels_N[rows_N])


def _split(examples: Examples, ids: np.ndarray, max_tokens: int) -> Split:
    codes, lengths = examples.codes.ids_S, examples.codes.lengths_N
    kept = np.minimum(lengths, max_tokens - 1)
    truncated = int(np.count_nonzero(kept < lengths))
    if truncated:
        place_S = np.arange(len(codes)) - np.repeat(examples.codes.ends_N - lengths, lengths)
        codes = codes[place_S < np.repeat(kept, lengths)]
    ends = np.cumsum(kept + 1)
    ids_S, real_S = np.full(ends[-1], EOS, np.uint8), np.ones(ends[-1], np.bool_)
    real_S[ends - 1] = False
    ids_S[real_S] = ids[codes]
    return Split(Texts(ids_S, ends), examples.labels_N.astype(np.int64), truncated=truncated, skipped=dict(examples.skipped))
