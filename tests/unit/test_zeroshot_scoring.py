"""Scores of continuations: exact sums on a table, one reading of a context for all its choices in every mixer, limits, and order."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hgrn2_bench import registry
from hgrn2_bench.config import ModelConfig
from hgrn2_bench.language import LanguageModel
from suites.zeroshot import scoring
from suites.zeroshot.reading import Ours
from suites.zeroshot.scoring import CERTAIN, IMPOSSIBLE, Limits, Scorer, fitted, score

V = 11


class Table:
    """A model whose log p of token b after token a is known: LOG_P[a, b]."""

    can_reuse = True
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.log_p = torch.randn(V, V, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
        self.shapes: list[tuple[int, ...]] = []

    def read(self, ids_BT: Tensor) -> Tensor:
        self.shapes.append(tuple(ids_BT.shape))
        return ids_BT

    def repeated(self, states: Tensor, rows_B: Tensor) -> Tensor:
        return states[rows_B]

    def logits(self, ids_BT: Tensor, where_M: Tensor, states: Any = None) -> Iterator[Tensor]:
        self.shapes.append(tuple(ids_BT.shape))
        found = self.log_p[ids_BT].flatten(0, 1)[where_M] + 3.0  # logits are log p up to a constant
        return iter(found.split(3))


def test_an_answer_of_two_tokens_has_the_sum_of_their_entries_and_nothing_is_shifted():
    table = Table()
    (found,) = score(table, [([1, 2, 3], [4, 5])], Limits(100))
    assert found.log_p == pytest.approx(float(table.log_p[3, 4] + table.log_p[4, 5]), abs=1e-12)


def test_greedy_means_that_every_token_is_the_most_probable():
    table = Table()
    first = int(table.log_p[3].argmax())
    second, other = int(table.log_p[first].argmax()), int(table.log_p[first].argmin())
    found = score(table, [([1, 3], [first, second]), ([1, 3], [first, other]), ([1, 3], [other])], Limits(100))
    assert [each.is_greedy for each in found] == [True, False, first == other]


def requests(seed: int = 0, contexts: int = 7, choices: int = 4, vocab: int = V) -> list[tuple[list[int], list[int]]]:
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(contexts):
        context = draw.integers(vocab, size=draw.integers(1, 40)).tolist()
        found += [(context, draw.integers(vocab, size=draw.integers(1, 9)).tolist()) for _ in range(choices)]
    return [found[i] for i in draw.permutation(len(found))]


@pytest.mark.parametrize(
    "limits",
    [
        Limits(100),
        Limits(100, reuse=False),
        Limits(100, rows=3),
        Limits(100, tokens=1),
        Limits(100, positions=5),
        Limits(100, pass_tokens=10_000, multiple=8),
    ],
)
def test_no_limit_changes_what_a_request_scores(limits):
    table, pairs = Table(), requests()
    for (context, continuation), found in zip(pairs, score(table, pairs, limits), strict=True):
        steps = zip([context[-1], *continuation], continuation, strict=False)
        assert found.log_p == pytest.approx(float(sum(table.log_p[a, b] for a, b in steps)), abs=1e-9)


def test_rows_and_tokens_of_a_pass_keep_to_the_limits():
    table, pairs = Table(), requests(contexts=30)
    score(table, pairs, Limits(100, rows=5))
    assert max(B for B, _ in table.shapes) <= 5
    table = Table()
    score(table, pairs, Limits(100, tokens=120))
    assert max(B * T for B, T in table.shapes) <= 120


def test_padding_never_reaches_beyond_what_the_model_can_read():
    table, contexts = Table(), [tuple(i % V for i in range(n)) for n in (26, 27, 28)]
    pairs = [(context, [n, n]) for context in contexts for n in range(4)]
    score(table, pairs, Limits(29, multiple=16, pass_tokens=1000))
    read, followed = table.shapes
    assert read[1] + followed[1] == 29


def test_the_same_request_is_read_once():
    table = Table()
    found = score(table, [([1, 2], [3]), ([1, 2], [4]), ([1, 2], [3])], Limits(100))
    assert table.shapes == [(1, 2)]
    assert found[0] == found[2] != found[1]


def test_contexts_that_save_little_are_not_read_apart():
    short, long = list(range(9)), [i % V for i in range(40)]
    scorer = Scorer(Table(), Limits(100))
    for context, cut in ((short, 0), (long, 32)):
        pairs = [(n, tuple(context), (n,) * 21 if cut == 0 else (n, n)) for n in range(2)]
        assert {batch.cut for batch in scorer.plan(pairs)} == {cut}


def test_a_context_alone_is_read_whole():
    assert [batch.cut for batch in Scorer(Table(), Limits(100)).plan([(0, tuple(range(10)) * 4, (1, 2))])] == [0]


def test_tokens_read_and_saved_add_up():
    scorer, context = Scorer(Table(), Limits(100)), tuple(i % V for i in range(33))
    (batch,) = scorer.plan([(n, context, (n, n + 1, n + 2)) for n in range(4)])
    scorer.run(batch)
    assert (batch.cut, scorer.read, scorer.saved) == (32, 32 + 4 * 3, 3 * 32)


def test_later_cuts_join_a_pass_only_where_that_wastes_less_than_another_pass_costs():
    pairs = [(10 * k + n, (k,) * length, (n, n)) for k, length in enumerate((17, 25, 33)) for n in range(4)]
    cuts = [[batch.cut for batch in Scorer(Table(), Limits(100, pass_tokens=cost)).plan(pairs)] for cost in (0, 1000)]
    assert cuts == [[16, 24, 32], [16]]


def test_an_empty_continuation_is_certain_and_one_that_cannot_fit_impossible():
    found = score(Table(), [([1], []), ([1], [2] * 9), ([1], [2] * 8)], Limits(8))
    assert found[:2] == [CERTAIN, IMPOSSIBLE]
    assert math.isfinite(found[2].log_p)


def test_an_empty_context_is_refused():
    with pytest.raises(ValueError, match="request 0 has no context"):
        score(Table(), [([], [1])], Limits(8))


def test_what_is_too_long_keeps_its_last_tokens():
    assert fitted(([1, 2, 3], [4, 5]), 3) == ((2, 3), (4, 5))  # of 4 tokens the last is predicted, not read
    assert fitted(([1, 2, 3], [4, 5]), 4) == ((1, 2, 3), (4, 5))
    assert fitted(([1], [2, 3, 4]), 2) == ((), (2, 3, 4))


def test_the_same_requests_give_the_same_passes():
    pairs = [(n, tuple(c), tuple(k)) for n, (c, k) in enumerate(requests(contexts=20))]
    plans = [Scorer(Table(), Limits(100, rows=6)).plan(pairs) for _ in range(2)]
    assert plans[0] == plans[1]
    assert sorted(number for batch in plans[0] for number in batch.requests) == list(range(len(pairs)))


def model_of(name: str, settings: dict[str, Any] | None = None, **words: Any) -> LanguageModel:
    torch.manual_seed(0)
    backbone = {"num_layers": 2, "channel_mixer": "glu", "embed_std": 1.0} | words
    config = ModelConfig(d_model=16, **backbone)
    return LanguageModel(config, registry.load(name), settings or {}, "chunked", 23, 64).eval().double()


ONE_BY_ONE = Limits(200, rows=1, reuse=False)
MIXERS = list(registry.models())


@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_scores_the_same_alone_and_from_a_shared_context(name, conv):
    words = {"conv": conv, "positions": "rope" if name in ("attention", "hybrid") else "none"}
    reader, pairs = Ours(model_of(name, **words)), requests(contexts=5, vocab=23)
    want, scorer = score(reader, pairs, ONE_BY_ONE), Scorer(reader, Limits(200, rows=9, multiple=8))
    batches = scorer.plan([(n, tuple(c), tuple(k)) for n, (c, k) in enumerate(pairs)])
    assert any(batch.cut for batch in batches)
    found: dict[int, Any] = {}
    for batch in batches:
        found |= scorer.run(batch)
    for number, each in enumerate(want):
        assert found[number].log_p == pytest.approx(each.log_p, abs=1e-5)
        assert found[number].is_greedy == each.is_greedy


def test_scores_are_those_of_the_models_own_loss():
    model = model_of("hgrn2")
    context, continuation = [1, 2, 3], [4, 5, 6]
    ids = torch.tensor([context + continuation])
    nats_BT, _ = model.losses(ids[:, :-1], ids[:, 1:])
    (found,) = score(Ours(model), [(context, continuation)], Limits(64))
    assert found.log_p == pytest.approx(-float(nats_BT[0, -3:].sum()), abs=1e-9)


@pytest.mark.parametrize("words", [{"positions": "learned"}, {"positions": "sinusoid"}])
def test_positions_in_a_table_are_read_plainly(words):
    reader, pairs = Ours(model_of("attention", **words)), requests(contexts=4, vocab=23)
    assert not reader.can_reuse
    many = score(reader, pairs, Limits(64, multiple=8))
    for one, each in zip(score(reader, pairs, ONE_BY_ONE), many, strict=True):
        assert one.log_p == pytest.approx(each.log_p, abs=1e-9)


def test_an_adaptive_softmax_is_scored_too():
    model = model_of("hgrn2", softmax="adaptive", cutoffs=(4, 12))
    ids = torch.tensor([[1, 2, 20, 5]])
    nats_BT, _ = model.losses(ids[:, :-1], ids[:, 1:])
    (found,) = score(Ours(model), [([1], [2, 20, 5])], Limits(64))
    assert found.log_p == pytest.approx(-float(nats_BT.sum()), abs=1e-6)


def test_logits_are_made_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 50)
    reader, pairs = Ours(model_of("hgrn2")), requests(contexts=3, vocab=23)
    parts = score(reader, pairs, Limits(64))
    monkeypatch.undo()
    for one, each in zip(score(reader, pairs, Limits(64)), parts, strict=True):
        assert one.log_p == pytest.approx(each.log_p, abs=1e-12)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="eval mode"):
        Ours(model_of("hgrn2").train())
