"""Log-probabilities of continuations: every request exact, no token read more often than it has to be.

Requests with the same context share one reading of it. The context is cut at a multiple of BLOCK tokens, its last token always behind the
cut, since that one predicts the first token of the continuation. Contexts with one cut go through the model together, without padding, and
leave their states; what is behind the cut and all but the last token of each continuation follow from those, padded on the right. What a
causal model says of a token cannot depend on tokens after it, so padding changes nothing. Logits exist only at the positions that predict
a continuation, a part of them at a time.

Shape letters: B rows, T tokens, M positions that predict, E predictions (a position may be asked for several tokens), V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hgrn2_bench.trainer import DivergedError

BLOCK = 8
"""Contexts are cut at multiples of so many tokens."""
LEAST_SAVED = 0.2
"""A context is read apart only where that saves at least this share of the tokens of its requests."""
CHUNK_LOGITS = 2**25
"""Logits in float32 that exist at once."""

NOT_A_NUMBER = "the model's probabilities are no numbers: look at its weights for NaN and infinity, and at its dtype for overflow"

Ids = tuple[int, ...]
Pair = tuple[Sequence[int], Sequence[int]]


class Score(NamedTuple):
    """What is known of a continuation: its log p in nats, and whether each token of it was the most probable one."""

    log_p: float
    is_greedy: bool


CERTAIN = Score(0.0, True)
"""Of an empty continuation."""
IMPOSSIBLE = Score(-math.inf, False)
"""Of a continuation that is longer than all that the model can read."""


class Reader(Protocol):
    """What scoring asks of a model; see `suites.zeroshot.reading`."""

    can_reuse: bool
    """Whether `states` may follow a common beginning."""

    @property
    def device(self) -> torch.device:
        """Where ids are wanted."""

    def read(self, ids_BT: Tensor) -> Any:
        """States after prompts of one length."""

    def repeated(self, states: Any, rows_B: Tensor) -> Any:
        """States of which row b is row `rows_B[b]` of those given, which stay as they are."""

    def logits(self, ids_BT: Tensor, where_M: Tensor, states: Any = None) -> Iterator[Tensor]:
        """Logits at flat positions of (B, T), in parts (m, V) in their order; `states` are such, of the tokens before."""


@dataclass(frozen=True)
class Limits:
    """How much of a set of requests goes through the model at once."""

    max_length: int
    """Tokens that the model reads of one request; of a longer one the last so many."""
    rows: int = 0
    """Requests of a pass; 0: as many as `tokens` allows."""
    tokens: int = 2**16
    """Padded tokens of a pass, unless a single row has more."""
    positions: int = 2**14
    """Predicting positions of a pass, likewise."""
    pass_tokens: int = 0
    """Starting a pass takes as long as so many tokens of it."""
    multiple: int = 1
    """Lengths are padded up to a multiple of this, so that there are few of them."""
    reuse: bool = True


@dataclass(frozen=True)
class Row:
    """What one row of a batch reads, and the requests that it answers: those that differ in the last token at most."""

    context: Ids
    rest: Ids
    """The continuation without its last token."""
    asked: list[tuple[int, int]] = field(default_factory=list)
    """Number of each request, and the last token of its continuation."""

    def __len__(self) -> int:
        """Tokens read."""
        return len(self.context) + len(self.rest)


@dataclass(frozen=True)
class Group:
    """Rows with one context."""

    rows: tuple[Row, ...]

    @property
    def cut(self) -> int:
        """Tokens of the context that may be read once for all rows."""
        return (len(self.rows[0].context) - 1) // BLOCK * BLOCK

    @property
    def saved(self) -> int:
        """Tokens that this saves."""
        return self.cut * (len(self.rows) - 1)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, self.rows))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.rows))


@dataclass(frozen=True)
class Pass:
    """One batch: groups whose contexts are read once up to the cut, or with a cut of 0 rows that are read whole."""

    groups: tuple[Group, ...]
    cut: int = 0

    @property
    def rows(self) -> list[Row]:
        """All rows, group by group."""
        return [row for group in self.groups for row in group.rows]

    @property
    def requests(self) -> list[int]:
        """Numbers of the requests that it answers."""
        return [number for row in self.rows for number, _ in row.asked]


def fitted(pair: Pair, max_length: int) -> tuple[Ids, Ids]:
    """The last `max_length` + 1 tokens of a request, the last of which is not read: what is too long loses its beginning, as in lm-eval.

    The context is empty where the continuation alone is too long.
    """
    context, continuation = tuple(pair[0]), tuple(pair[1])
    room = max_length + 1 - len(continuation)
    return (context[-room:] if room > 0 else ()), continuation


def plan(pairs: Iterable[tuple[int, Ids, Ids]], limits: Limits, can_reuse: bool) -> list[Pass]:
    """The passes that answer numbered requests (number, context, continuation), none of which is empty or too long.

    The same requests in the same order always give the same passes.
    """
    rows: dict[tuple[Ids, Ids], Row] = {}
    for number, context, continuation in pairs:
        key = context, continuation[:-1]
        rows.setdefault(key, Row(*key)).asked.append((number, continuation[-1]))
    contexts: dict[Ids, list[Row]] = {}
    for row in rows.values():
        contexts.setdefault(row.context, []).append(row)
    shared, whole = [], []
    for found in contexts.values():
        group = Group(tuple(found))
        if limits.reuse and can_reuse and group.saved and group.saved >= LEAST_SAVED * group.tokens:
            most = limits.rows or len(found)
            shared += [Group(group.rows[start : start + most]) for start in range(0, len(found), most)]
        else:
            whole += [Group((row,)) for row in found]
    return [*_whole_passes(whole, limits), *_shared_passes(shared, limits)]


def _whole_passes(groups: list[Group], limits: Limits) -> Iterator[Pass]:
    """Rows from the longest to the shortest, as many at once as the limits allow."""
    held: list[Group] = []
    for group in sorted(groups, key=lambda group: -group.longest):
        if held and not _fits([*held, group], 0, limits):
            yield Pass(tuple(held))
            held = []
        held.append(group)
    if held:
        yield Pass(tuple(held))


def _shared_passes(groups: list[Group], limits: Limits) -> Iterator[Pass]:
    """Groups from the earliest cut to the latest.

    Those with later cuts join a pass, cut where it is, as long as what that wastes costs less than a pass of their own.
    """
    held: list[Group] = []
    needed = 0
    for group in sorted(groups, key=lambda group: (group.cut, group.longest)):
        own = group.tokens - group.saved
        cut = held[0].cut if held else group.cut
        wasted = _padded([*held, group], cut, limits) - needed - own
        if held and not (_fits([*held, group], cut, limits) and (cut == group.cut or wasted <= limits.pass_tokens)):
            yield Pass(tuple(held), cut)
            held, needed = [], 0
        held.append(group)
        needed += own
    if held:
        yield Pass(tuple(held), held[0].cut)


def _padded(groups: list[Group], cut: int, limits: Limits) -> int:
    """Tokens of a pass, its padding included."""
    width = padded_width(max(group.longest for group in groups) - cut, cut, limits)
    return len(groups) * cut + sum(len(group.rows) for group in groups) * width


def padded_width(tokens: int, cut: int, limits: Limits) -> int:
    """Tokens of the longest row behind the cut, padded to the multiple as far as the model can read."""
    return max(tokens, min(-(-tokens // limits.multiple) * limits.multiple, limits.max_length - cut))


def _fits(groups: list[Group], cut: int, limits: Limits) -> bool:
    """Whether a pass keeps to the limits."""
    rows = sum(len(group.rows) for group in groups)
    positions = sum(len(row.rest) + 1 for group in groups for row in group.rows)
    within = positions <= limits.positions and _padded(groups, cut, limits) <= limits.tokens
    return within and (not limits.rows or rows <= limits.rows)


class Scorer:
    """Runs passes on a model, and counts what it read."""

    def __init__(self, reader: Reader, limits: Limits) -> None:
        self.reader, self.limits = reader, limits
        self.read = self.saved = 0
        """Tokens read without padding, and tokens that would have been read without shared contexts and rows beside them."""

    def plan(self, pairs: Iterable[tuple[int, Ids, Ids]]) -> list[Pass]:
        """The passes that answer these requests."""
        return plan(pairs, self.limits, self.reader.can_reuse)

    @torch.no_grad()
    def run(self, batch: Pass) -> dict[int, Score]:
        """The score of every request of a pass, by its number. DivergedError where the model gives no numbers."""
        states, width = None, padded_width(max(map(len, batch.rows)) - batch.cut, batch.cut, self.limits)
        if batch.cut:
            prompts = [group.rows[0].context[: batch.cut] for group in batch.groups]
            states = self.reader.read(self._tensor(np.array(prompts, np.int64)))
            of = np.repeat(np.arange(len(prompts)), [len(group.rows) for group in batch.groups])
            states = self.reader.repeated(states, self._tensor(of))
        ids_BT = np.zeros((len(batch.rows), width), np.int64)
        for b, row in enumerate(batch.rows):
            behind = (row.context + row.rest)[batch.cut :]
            ids_BT[b, : len(behind)] = behind
        asked = _asked(batch, width)
        log_p_E, hits_E = self._predictions(ids_BT, asked, states)
        if np.isnan(log_p_E).any():
            raise DivergedError(NOT_A_NUMBER)
        self._count(batch)
        starts = np.cumsum([0, *asked.lengths[:-1]])
        sums, greedy = np.add.reduceat(log_p_E, starts), np.logical_and.reduceat(hits_E, starts)
        return {n: Score(float(s), bool(g)) for n, s, g in zip(batch.requests, sums, greedy, strict=True)}

    def _predictions(self, ids_BT: np.ndarray, asked: "Asked", states: Any) -> tuple[np.ndarray, np.ndarray]:
        """Each log p (E,) in float64 and whether nothing was more probable (E,), in the order of the requests: one wait for the device."""
        order = np.argsort(asked.which, kind="stable")
        which, targets = asked.which[order], self._tensor(asked.targets[order])
        index = self._tensor(which)
        found, start = [], 0
        for logits in self.reader.logits(self._tensor(ids_BT), self._tensor(asked.where), states):
            for part in logits.split(max(1, CHUNK_LOGITS // logits.shape[1])):
                a, b = np.searchsorted(which, (start, start + len(part)))
                found.append(_log_p(part, index[a:b] - start, targets[a:b]))
                start += len(part)
        both = torch.cat(found, 1).cpu().numpy()
        back = np.argsort(order, kind="stable")
        return both[0][back], both[1][back] > 0

    def _count(self, batch: Pass) -> None:
        rows = sum(len(row) - batch.cut for row in batch.rows)
        self.read += rows + batch.cut * len(batch.groups)
        alone = sum(len(row) * len(row.asked) for row in batch.rows)
        self.saved += alone - rows - batch.cut * len(batch.groups)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.reader.device)


class Asked(NamedTuple):
    """The predictions of a pass."""

    where: np.ndarray
    """Flat positions (M,) in (B, T)."""
    which: np.ndarray
    """The position, by its number among those, of each prediction (E,)."""
    targets: np.ndarray
    """The token of each prediction (E,)."""
    lengths: list[int]
    """Predictions of each request, request by request."""


def _asked(batch: Pass, width: int) -> Asked:
    """Which positions predict which tokens: the last of the context the first of the continuation, and so on."""
    where: list[int] = []
    which: list[int] = []
    targets: list[int] = []
    lengths = []
    for b, row in enumerate(batch.rows):
        begin, n = b * width + len(row.context) - batch.cut - 1, len(row.rest) + 1
        for _, last in row.asked:
            which += range(len(where), len(where) + n)
            targets += [*row.rest, last]
            lengths.append(n)
        where += range(begin, begin + n)
    return Asked(np.array(where), np.array(which), np.array(targets), lengths)


def _log_p(logits_MV: Tensor, index_E: Tensor, targets_E: Tensor) -> Tensor:
    """Each target's log p at its position, and whether each is the most probable token there, (2, E) in float64."""
    wide = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32))
    log_p_E = wide[index_E, targets_E] - wide.logsumexp(-1)[index_E]
    return torch.stack([log_p_E.double(), (wide.argmax(-1)[index_E] == targets_E).double()])


def score(reader: Reader, pairs: Sequence[Pair], limits: Limits) -> list[Score]:
    """The scores of pairs (context ids, continuation ids). An empty continuation is certain; one that does not fit gets log p -inf.

    ValueError for an empty context: something must predict the first token.
    """
    known: dict[int, Score] = {}
    asked = []
    for number, pair in enumerate(pairs):
        if not len(pair[0]):
            raise ValueError(f"request {number} has no context: put the token before it that begins a text")
        context, continuation = fitted(pair, limits.max_length)
        if not continuation or not context:
            known[number] = CERTAIN if not continuation else IMPOSSIBLE
        else:
            asked.append((number, context, continuation))
    scorer = Scorer(reader, limits)
    for batch in scorer.plan(asked):
        known |= scorer.run(batch)
    return [known[number] for number in range(len(pairs))]
