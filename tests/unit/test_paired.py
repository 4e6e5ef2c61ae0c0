"""Tests over the items of two models: the exact p, what may be tested, and what a row says of its score's error."""

import base64

import numpy as np
import pytest
from test_results import row

from hgrn2_bench import items, paired
from hgrn2_bench.lines import Line, Run
from hgrn2_bench.paired import McNemar


def held(correct, docs="d0c5"):
    """What a row holds of one metric's items."""
    bits = base64.b64encode(np.packbits(np.array(correct, bool)).tobytes()).decode()
    return {"docs": docs, "n": len(correct), "bits": bits}


def scored(settings=None, card="acc", errors=None, model="m", fixed=True, seed=0, **tasks):
    """A row of a model over some tasks, each with its items by metric; of a fixed checkpoint, or trained with a seed."""
    details = {"items": tasks, "stderr": {task: {metric: (errors or {}).get(task, 0.1) for metric in each} for task, each in tasks.items()}}
    own = {f"{model}.checkpoint": "abc"} if fixed else {}
    return row((settings or {}) | own, model=model, details=details, card={"metric": card}, seed=seed)


def line(*rows):
    return Line(tuple(Run(each, {}) for each in rows), {}, False, ())


# the exact test


@pytest.mark.parametrize(
    ("ours", "theirs", "p"),
    [
        (5, 1, 14 / 64),  # two sides of (1 + 6) / 2^6
        (1, 5, 14 / 64),
        (6, 0, 2 / 64),
        (0, 0, 1.0),
        (3, 3, 1.0),
        (9, 2, 2 * (1 + 11 + 55) / 2**11),
        (1, 0, 1.0),
    ],
)
def test_p_is_twice_the_smaller_tail_of_fair_coins(ours, theirs, p):
    found = McNemar(100, ours, theirs)
    assert found.p == pytest.approx(p)
    assert found.is_clear is (p < 0.05)


def test_a_test_names_its_items_and_p():
    assert str(McNemar(1838, 6, 0)) == "McNemar over 1838 items, p=0.031"


@pytest.mark.parametrize("n", [1, 7, 8, 9, 1838])
def test_items_are_counted_bit_by_bit(n):
    draw = np.random.default_rng(n)
    a, b = draw.random(n) < 0.5, draw.random(n) < 0.6
    found = paired.of_rows(scored(t={"acc": held(a)}), scored(t={"acc": held(b)}))
    assert found == McNemar(n, int((a & ~b).sum()), int((b & ~a).sum()))


def test_tasks_of_a_group_are_tested_together():
    ours = scored(a={"acc": held([1, 1, 0])}, b={"acc": held([1, 0, 0, 1])})
    theirs = scored(a={"acc": held([0, 1, 0])}, b={"acc": held([1, 1, 0, 0])})
    assert paired.of_rows(ours, theirs) == McNemar(7, 2, 1)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (scored(t={"acc": held([1, 0])}), scored(t={"acc": held([1, 0], docs="other")})),
        (scored(t={"acc": held([1, 0])}), scored(t={"acc": held([1, 0, 0])})),
        (scored(t={"acc": held([1, 0])}), scored(u={"acc": held([1, 0])})),
        (scored(t={"acc": held([1, 0])}), scored(t={"acc_norm": held([1, 0])}, card="acc_norm")),
        (scored(t={"acc": held([1, 0])}), row()),
        (row(), row()),
        (scored(t={"perplexity": {}}, card="perplexity"), scored(t={"perplexity": {}}, card="perplexity")),
        (
            scored({"weighting": "tasks"}, a={"acc": held([1, 0])}, b={"acc": held([1])}),
            scored(a={"acc": held([1, 0])}, b={"acc": held([1])}),
        ),
        (*[scored({"weighting": "tasks"}, a={"acc": held([1, 0])}, b={"acc": held([1])})] * 2,),
    ],
)
def test_other_items_are_not_tested(ours, theirs):
    assert paired.of_rows(ours, theirs) is None
    assert paired.of_rows(theirs, ours) is None


def test_a_group_of_one_task_has_no_weights():
    one = scored({"weighting": "tasks"}, a={"acc": held([1, 0])})
    assert paired.of_rows(one, one) == McNemar(2, 0, 0)


# which lines


def one(**changes):
    return scored(t={"acc": held([1, 0])}, **changes)


def test_fixed_models_are_tested_and_trained_ones_of_one_seed():
    assert paired.of_lines(line(one()), line(one(model="n")))
    assert paired.of_lines(line(one()), line(one(model="n", seed=1)))  # a checkpoint has no seed
    assert paired.of_lines(line(one(fixed=False, seed=2)), line(one(fixed=False, seed=2, model="n")))


def test_seeds_are_never_mixed():
    ours = line(one(fixed=False, seed=1))
    assert paired.of_lines(ours, line(one(fixed=False, seed=2, model="n"))) is None
    assert paired.of_lines(ours, line(one(model="n"))) is None
    assert paired.of_lines(ours, line(one(fixed=False, seed=1), one(fixed=False, seed=2))) is None
    assert paired.of_lines(line(one()), line(row(status="failed", value=None))) is None


# what the score is, and its error


def test_the_score_is_what_the_row_or_else_its_card_says():
    found = scored(card="mean of acc_norm", a={"acc_norm": held([1])}, b={"acc_norm": held([1])})
    assert items.scored(found) == {"a": "acc_norm", "b": "acc_norm"}
    assert items.scored(row(details={"scored": {"a": "acc", "b": "acc_norm"}})) == {"a": "acc", "b": "acc_norm"}
    assert items.scored(scored(a={"acc": held([1])}, b={"f1": held([1])})) == {}
    assert items.scored(scored(card="mean of acc, acc_norm", a={"acc": held([1]), "acc_norm": held([1])})) == {}
    assert items.scored(row()) == {}


def test_the_error_of_one_task_is_its_own():
    found = scored(a={"acc": held([1, 0])}, errors={"a": 0.25})
    assert items.score_error(found) == 0.25
    assert items.error_of(found, "test", "acc") == 0.25
    assert items.error_of(found, "test", "acc_norm") is None


def test_the_error_of_a_group_follows_its_weights():
    sizes = {"a": {"acc": held([1] * 30)}, "b": {"acc": held([1] * 10)}}
    errors = {"a": 0.04, "b": 0.12}
    # by items (30 * 0.04, 10 * 0.12) / 40 = sqrt(1.2^2 + 1.2^2) / 40; by tasks sqrt(0.04^2 + 0.12^2) / 2
    assert items.score_error(scored(errors=errors, **sizes)) == pytest.approx(1.2 * 2**0.5 / 40)
    assert items.score_error(scored({"weighting": "tasks"}, errors=errors, **sizes)) == pytest.approx(0.016**0.5 / 2)
    assert items.error_of(scored(errors=errors, **sizes), "b", "acc") == 0.12
    assert items.error_of(scored(errors=errors, **sizes), "test", "acc") is None


@pytest.mark.parametrize("error", ["N/A", None])
def test_an_error_that_is_not_known_is_none(error):
    assert items.score_error(scored(a={"acc": held([1])}, b={"acc": held([1])}, errors={"a": error})) is None
    assert items.score_error(row()) is None
