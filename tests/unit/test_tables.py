"""Tables as a pure function of rows: what is compared, what counts as worst, what is chosen on which split, what is said beside it."""

import csv
import dataclasses
import io
import itertools
import random
import re
from html.parser import HTMLParser

import pytest
from test_results import failed, row

from hgrn2_bench.protocol import Preset, Protocol
from hgrn2_bench.render import Column, Score, Table, render, short
from hgrn2_bench.tables import half_interval, make_tables

LRS = (1e-4, 1e-3, 1e-2)


def protocol(**changes):
    fields = {"name": "mqar", "version": 1, "metric": "accuracy", "unit": "fraction", "higher_is_better": True}
    return Protocol(**fields | {"data_schema": object, "name_task": str, "presets": {}, "solved": 0.99} | changes)


BIMODAL, SPREAD = protocol(), protocol(solved=None)
LOWER = protocol(metric="ppl", unit="ppl", higher_is_better=False, solved=None)


def run(value, selection=None, settings=None, **changes):
    """The rows of one finished cell: its test value, and its validation value (the same unless given)."""
    validation = row(settings, **changes, split="validation", value=value if selection is None else selection, num_items=1000)
    return [row(settings, **changes, value=value), validation]


def seeds(*values, **changes):
    """The rows of one model: a value per seed, None for a run that failed."""
    runs = (failed("failed", "boom", seed=s, **changes) if v is None else run(v, seed=s, **changes) for s, v in enumerate(values))
    return [each for rows in runs for each in (rows if isinstance(rows, list) else [rows])]


def grid(values, selection=None, seed=0, **changes):
    """The rows of one seed over learning rates."""
    selection = selection or values
    pairs = zip(LRS, values, selection, strict=True)
    return [each for lr, v, s in pairs for each in run(v, s, settings={"lr": lr}, seed=seed, **changes)]


def only(rows, of=BIMODAL, metric=None):
    (table,) = make_tables(rows, of, metric)
    return table


def lines(table):
    """Each line as heading to value, the metric's column called `value`."""
    names = ["value" if ", seed" in c.name else c.name for c in table.columns]
    shown = [[v.text if isinstance(v, Score) else v for v in line] for line in table.lines]
    return [dict(zip(names, line, strict=True)) for line in shown]


def line(rows, of=BIMODAL):
    (found,) = lines(only(rows, of))
    return found


def noted(table, part):
    return any(part in note for note in table.notes)


# the seeds of one line


@pytest.mark.parametrize("of", [BIMODAL, SPREAD])
def test_fewer_than_three_seeds_are_listed(of):
    assert line(seeds(0.5), of)["value"] == "0.500"
    assert line(seeds(0.5, 0.75), of)["value"] == "0.500, 0.750"


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((1.0, 0.4, 0.99), "0.990 [0.400, 1.000], solved 2/3"),
        ((0.4, 0.5, 0.6), "0.500 [0.400, 0.600], solved 0/3"),
        ((1.0, 0.9, 0.4, 0.5), "0.700 [0.400, 1.000], solved 1/4"),  # an even number: the mean of the middle two
        ((1.0, None, 0.5), "0.500 [–, 1.000], solved 1/3"),
        ((None, None, 1.0), "– [–, 1.000], solved 1/3"),
        ((None, None, None), "– [–, –], solved 0/3"),
    ],
)
def test_three_seeds_that_pile_up_show_median_range_and_share_solved(values, shown):
    assert line(seeds(*values))["value"] == shown


def test_share_solved_counts_downwards_where_lower_is_better():
    changes = {"metric": "ppl", "higher_is_better": False}
    found = line(seeds(9.0, 11.0, None, **changes), protocol(metric="ppl", higher_is_better=False, solved=10.0))
    assert found["value"] == "11.000 [9.000, –], solved 1/3"


def test_three_seeds_that_spread_show_mean_and_t_interval():
    # 0.1, 0.2, 0.3: mean 0.2, standard deviation 0.1; t(0.975, 2) = 4.302653, so 4.302653 * 0.1 / sqrt(3) = 0.248414
    assert line(seeds(0.1, 0.2, 0.3), SPREAD)["value"] == "0.200 ± 0.248"
    assert half_interval([0.1, 0.2, 0.3]) == pytest.approx(0.2484138, abs=1e-7)
    # t(0.975, 4) = 2.776445, standard deviation sqrt(2.5): 2.776445 * 1.581139 / sqrt(5) = 1.963243
    assert half_interval([1, 2, 3, 4, 5]) == pytest.approx(1.963243, abs=1e-6)
    assert line(seeds(0.5, 0.5, 0.5), SPREAD)["value"] == "0.500 ± 0.000"


def test_an_interval_is_never_given_over_the_runs_that_survived():
    assert line(seeds(0.1, None, 0.3), SPREAD)["value"] == "0.100, –, 0.300"


def test_seeds_are_named_in_the_heading_in_their_order():
    table = only([*seeds(0.5, 0.75)])
    assert "accuracy, seeds 0, 1" in [c.name for c in table.columns]
    assert "accuracy, seed 0" in [c.name for c in only(seeds(0.5)).columns]


def test_values_are_in_the_order_of_seeds():
    rows = [
        each
        for seed, (value, digest) in enumerate([(0.5, "c"), (0.6, "a"), (0.4, "b")])
        for each in run(value, seed=seed, data_hash=digest)
    ]
    assert line([*rows, failed("oom", "no memory", seed=3)], SPREAD)["value"] == "0.500, 0.600, 0.400, –"


def test_a_line_that_lacks_a_seed_says_so():
    first, second = lines(only([*seeds(0.9, 0.8, model="gla"), *run(0.7, seed=1, model="mamba")]))
    assert first["status"] == "ok"
    assert (second["value"], second["status"]) == ("0.700", "seed 1 only")


# failures


@pytest.mark.parametrize("status", ["failed", "diverged", "oom", "timeout", "skipped"])
def test_a_run_that_came_to_nothing_is_shown_with_its_reason(status):
    found = line([*run(0.9, seed=0), failed(status, "because of this", seed=1)])
    assert found["value"] == "0.900, –"
    assert found["status"] == f"{status} 1/2: because of this"


def test_every_kind_of_failure_is_counted():
    rows = [failed("oom", "no memory", seed=0), failed("diverged", "loss nan", seed=1), failed("oom", "again", seed=2), *run(1.0, seed=3)]
    status = line(rows)["status"]
    assert "oom 2/4: no memory" in status
    assert "diverged 1/4: loss nan" in status


def test_a_value_of_a_run_that_failed_is_not_shown():
    assert line([row(status="diverged", reason="loss nan at step 9", value=0.7)])["value"] == "–"


def test_a_failed_run_counts_as_the_worst():
    lucky = [failed("diverged", "nan", seed=s, model="gla") for s in (0, 1)] + run(1.0, seed=2, model="gla")
    table = only([*lucky, *seeds(0.6, 0.6, 0.6, model="mamba")])
    assert [found["model"] for found in lines(table)] == ["mamba", "gla"]


def test_one_failed_run_of_three_leaves_the_median():
    table = only([*seeds(0.9, None, 0.8, model="gla"), *seeds(0.7, 0.7, 0.7, model="mamba")])
    assert [found["model"] for found in lines(table)] == ["gla", "mamba"]


def test_a_model_that_never_finished_comes_last_and_stays():
    table = only([failed("oom", "no memory", model="gla"), *run(0.1, model="mamba"), *run(0.9)])
    assert [found["model"] for found in lines(table)] == ["hgrn2", "mamba", "gla"]


def test_a_table_of_failures_only_is_a_table():
    table = only([failed("oom", "no memory", parameters=None, state_bytes=None, tokens_per_s=None, data_hash="")])
    assert lines(table)[0]["status"] == "oom 1/1: no memory"
    for form in ("md", "csv", "latex", "html"):
        assert "no memory" in render(table, form)


# the tuning grid


def test_the_best_learning_rate_is_chosen_on_validation_data():
    table = only(grid((0.5, 0.6, 0.9), selection=(0.5, 0.7, 0.6)))
    (found,) = lines(table)
    assert (found["lr"], found["value"]) == (1e-3, "0.600")
    assert noted(table, "lr chosen on validation data")
    assert not noted(table, "as the published protocol did")


def test_the_best_learning_rate_is_chosen_on_test_data_where_the_protocol_says_so():
    rows = [
        r for lr, v, s in zip(LRS, (0.5, 0.9, 0.6), (0.9, 0.5, 0.6), strict=True) for r in run(v, s, settings={"lr": lr, "select": "test"})
    ]
    table = only(rows)
    assert (lines(table)[0]["lr"], lines(table)[0]["value"]) == (1e-3, "0.900")
    assert noted(table, "lr chosen on test data, as the published protocol did")


def test_stopping_on_test_data_is_noted_without_a_grid():
    assert noted(only(run(0.9, settings={"select": "test"})), "stopped on test data, as the published protocol did")
    assert not noted(only(run(0.9)), "test data, as")


def test_one_learning_rate_is_chosen_for_all_seeds():
    rows = [*grid((0.2, 0.9, 0.1), seed=0), *grid((0.8, 0.3, 0.1), seed=1)]
    (found,) = lines(only(rows))
    assert (found["lr"], found["value"]) == (1e-3, "0.900, 0.300")


def tuned_alone(*others):
    """Two rates on seed 0, of which the lower is better, and the lower on other seeds with the given values."""
    first = {"tune_on": "first_seed"}
    rows = [*run(0.9, settings=first | {"lr": 1e-3}), *run(0.8, settings=first | {"lr": 1e-2})]
    for seed, value in enumerate(others, 1):
        settings = first | {"lr": 1e-3}
        rows += [failed("failed", "boom", seed=seed, settings=settings)] if value is None else run(value, seed=seed, settings=settings)
    return rows


@pytest.mark.parametrize("others", [(0.1, 0.2), (0.95, 0.99), (None, 0.1), (None, None)])
def test_seeds_beside_the_one_that_was_tuned_on_have_no_say(others):
    rows = tuned_alone(*others)
    assert line(rows)["lr"] == 1e-3
    assert line([r for r in rows if r.seed == 0])["lr"] == 1e-3
    assert noted(only(rows), "lr chosen on validation data of the first seed")


def test_every_seed_has_a_say_where_every_seed_was_tuned():
    rows = [dataclasses.replace(r, settings={**r.settings, "tune_on": "every_seed"}) for r in tuned_alone(0.1, 0.2)]
    assert line(rows)["lr"] == 1e-2
    assert not noted(only(rows), "first seed")


def test_the_lowest_value_is_chosen_where_lower_is_better():
    changes = {"metric": "ppl", "higher_is_better": False, "floors": {}}
    (found,) = lines(only(grid((20.0, 18.0, 30.0), **changes), LOWER))
    assert (found["lr"], found["value"]) == (1e-3, "18.000")
    table = only([*run(20.0, model="gla", **changes), *run(10.0, model="mamba", **changes)], LOWER)
    assert [f["model"] for f in lines(table)] == ["mamba", "gla"]


@pytest.mark.parametrize(
    ("values", "lr", "edge"), [((0.9, 0.5, 0.1), 1e-4, True), ((0.1, 0.5, 0.9), 1e-2, True), ((0.1, 0.9, 0.5), 1e-3, False)]
)
def test_a_best_learning_rate_at_the_edge_of_its_grid_is_flagged(values, lr, edge):
    (found,) = lines(only(grid(values)))
    assert found["lr"] == lr
    assert ("best lr at the edge of its grid" in found["status"]) is edge


def test_a_grid_point_with_a_failed_run_is_never_preferred():
    rows = [r for lr in LRS for s in (0, 1) for r in run(0.9 if lr == 1e-3 else 0.4, settings={"lr": lr}, seed=s)]
    broken = [r for r in rows if not (r.settings["lr"] == 1e-3 and r.seed == 1)]
    broken.append(failed("diverged", "nan", settings={"lr": 1e-3}, seed=1))
    assert lines(only(rows))[0]["lr"] == 1e-3
    (found,) = lines(only(broken))
    assert found["lr"] != 1e-3
    assert found["value"] == "0.400, 0.400"


def test_of_points_that_all_have_failures_the_one_with_fewest_is_taken():
    rows = [failed("diverged", "nan", settings={"lr": lr}, seed=s) for lr in LRS for s in (0, 1, 2) if (lr, s) != (1e-3, 2)]
    (found,) = lines(only([*rows, *run(0.9, settings={"lr": 1e-3}, seed=2)]))
    assert found["lr"] == 1e-3
    assert "diverged 2/3" in found["status"]


def test_a_point_without_its_selection_value_is_not_preferred():
    rows = [row({"lr": 1e-2}, value=0.99), *run(0.5, settings={"lr": 1e-3})]
    assert lines(only(rows))[0]["lr"] == 1e-3


def test_learning_rates_are_shown_where_lines_differ_in_them_without_a_grid():
    found = lines(only([*run(0.9, settings={"lr": 1e-3}, model="gla"), *run(0.8, settings={"lr": 1e-2}, model="mamba")]))
    assert [f["lr"] for f in found] == [1e-3, 1e-2]
    table = only([*grid((0.1, 0.9, 0.2), model="gla"), *run(0.8, settings={"lr": 1e-2}, model="mamba")])
    assert [f["lr"] for f in lines(table)] == [1e-3, 1e-2]
    assert "lr" not in lines(only([*run(0.9, model="gla"), *run(0.8, model="mamba")]))[0]


# what counts as learned


def test_floors_are_printed():
    assert noted(
        only(run(0.9, floors={"1/|values|": 0.0625, "recall-free guess": 0.31})), "floors: 1/|values| 0.062; recall-free guess 0.310"
    )


def test_floors_that_differ_between_lines_are_printed_as_a_range():
    rows = [*run(0.9, model="gla", floors={"f": 1000.0}), *run(0.8, model="mamba", floors={"f": 0.25, "g": 0.5})]
    assert noted(only(rows), "floors: f 0.250 to 1000.000; g 0.500")


def test_a_model_at_the_floor_has_not_learned_and_ranks_below():
    floors = {"uniform": 0.06, "recall-free guess": 0.31}
    # two standard errors of 0.31 over 3,000 examples are 0.0169
    table = only(
        [*run(0.326, model="gla", floors=floors), *run(0.328, model="mamba", floors=floors), *run(0.2, model="hgrn1", floors=floors)]
    )
    assert [(f["model"], f["status"]) for f in lines(table)] == [
        ("mamba", "ok"),
        ("gla", "not learned in this budget"),
        ("hgrn1", "not learned in this budget"),
    ]


def test_a_model_above_the_floor_ranks_above_one_at_its_higher_floor():
    table = only([*run(0.5, model="gla", floors={"f": 0.5}), *run(0.4, model="mamba", floors={"f": 0.1})])
    assert [f["model"] for f in lines(table)] == ["mamba", "gla"]


@pytest.mark.parametrize(
    ("majority", "chance", "value", "learned"),
    [
        (0.45, 0.5, 0.55, False),  # every answer the class that is rarer in training, and more frequent here
        (0.45, 0.5, 0.6, True),
        (0.6, 0.5, 0.7, True),
        (0.02, 0.1, 0.2, True),  # of ten classes no other's share is known
    ],
)
def test_the_rarer_of_two_classes_is_a_floor_too(majority, chance, value, learned):
    table = only(run(value, floors={"majority": majority, "chance": chance}))
    assert ("not learned" in lines(table)[0]["status"]) != learned
    assert noted(table, f"floors: majority {majority:.3f}; chance {chance:.3f}" + "; minority 0.550" * (majority == 0.45))


def test_a_floor_counts_downwards_where_lower_is_better():
    changes = {"metric": "ppl", "higher_is_better": False, "floors": {"unigram": 700.0, "bigram": 200.0}}
    found = lines(only([*run(201.0, model="gla", **changes), *run(150.0, model="mamba", **changes)], LOWER))
    assert [(f["model"], f["status"]) for f in found] == [("mamba", "ok"), ("gla", "not learned in this budget")]


def test_a_median_run_that_failed_is_called_failed_and_not_unlearned():
    assert line(seeds(None, None, 0.9))["status"] == "failed 2/3: boom"


# comparing models

FIVE = [0.90, 0.91, 0.92, 0.93, 0.94]
NEAR = [0.91, 0.90, 0.93, 0.92, 0.94]


def status_of_second(first, second):
    table = only([*seeds(*first, model="gla"), *seeds(*second, model="mamba")], SPREAD)
    return {f["model"]: f["status"] for f in lines(table)}["mamba"]


def test_models_are_called_indistinguishable_only_from_five_paired_seeds():
    words = "not distinguishable from best (paired t-test over seeds)"
    assert status_of_second(FIVE, [*NEAR[:4], 0.939]) == words
    assert status_of_second(FIVE[:4], [0.90, 0.91, 0.92, 0.929]) == "ok"
    assert status_of_second(FIVE, [v - 0.05 for v in NEAR]) == "ok"


def test_failed_runs_are_no_pairs():
    assert "not distinguishable" not in status_of_second(FIVE, [*NEAR[:4], None])


def test_a_constant_difference_is_a_difference():
    assert status_of_second([0.9, 0.8, 0.7, 0.6, 0.5], [0.8, 0.7, 0.6, 0.5, 0.4]) == "ok"
    assert "not distinguishable" in status_of_second(FIVE, FIVE)


def test_the_paired_test_agrees_with_scipy():
    from scipy.stats import ttest_rel

    draw = random.Random(0)
    outcomes = set()
    for _ in range(60):
        first = [0.6 + 0.1 * draw.random() for _ in range(6)]
        second = [v - 0.03 * draw.random() + 0.01 for v in first]
        if sum(second) > sum(first):
            first, second = second, first
        same = ttest_rel(first, second).pvalue > 0.05
        rows = [*seeds(*first, model="gla"), *seeds(*second, model="mamba")]
        found = lines(only(rows, SPREAD))
        assert any("not distinguishable" in f["status"] for f in found) == same
        outcomes.add(same)
    assert outcomes == {True, False}


def test_a_model_that_has_not_learned_is_compared_with_none():
    found = lines(only([*seeds(*[0.3] * 5, model="gla"), *seeds(*[0.3] * 5, model="mamba")]))
    assert {f["status"] for f in found} == {"not learned in this budget"}


# what shares a table


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"preset": "paper"}, None),
        ({"task": "len64_kv4"}, None),
        ({"protocol_version": 2}, "another protocol version, precision or device"),
        ({"dtype": "bfloat16"}, "another protocol version, precision or device"),
        ({"data_hash": "d9"}, "other data (data hash)"),
    ],
)
def test_rows_that_cannot_be_compared_never_share_a_table(changes, why):
    tables = make_tables([*run(0.9, model="gla"), *run(0.8, model="mamba", **changes)], BIMODAL)
    assert sorted(f["model"] for table in tables for f in lines(table)) == ["gla", "mamba"]
    assert [len(table.lines) for table in tables] == [1, 1]
    for table in tables:
        assert why is None or noted(table, why)
        assert why is not None or not noted(table, "in a table of their own")


def test_rows_of_other_seeds_may_have_other_data():
    rows = [*run(0.9, seed=0, data_hash="a"), *run(0.8, seed=1, data_hash="b"), *run(0.7, seed=0, data_hash="a", model="gla")]
    assert len(only(rows).lines) == 2


@pytest.mark.parametrize("hashes", list(itertools.permutations("abcd")))
def test_data_of_different_settings_are_never_mixed_between_seeds(hashes):
    small, large = {"vocab_size": 32}, {"vocab_size": 64}
    rows = [
        each
        for model in ("gla", "mamba")
        for seed in (0, 1)
        for settings, digest in ((small, hashes[seed]), (large, hashes[2 + seed]))
        for each in run(0.5, seed=seed, settings=settings, data_hash=digest, model=model)
    ]
    tables = make_tables(rows, BIMODAL)
    assert len(tables) == 2
    for table in tables:
        assert {f["value"] for f in lines(table)} == {"0.500, 0.500"}
        assert noted(table, "this one: vocab_size 32") != noted(table, "this one: vocab_size 64")


def test_lines_of_few_seeds_join_the_data_that_they_share():
    full = [
        each
        for size, digests in ((32, "ab"), (64, "cd"))
        for seed in (0, 1)
        for each in run(0.5, seed=seed, settings={"vocab_size": size}, data_hash=digests[seed], model="mamba")
    ]
    part = [*run(0.6, seed=1, settings={"vocab_size": 64}, data_hash="d"), *run(0.7, seed=0, settings={"vocab_size": 32}, data_hash="a")]
    tables = make_tables([*full, *part], BIMODAL)
    assert [[f["model"] for f in lines(table)] for table in tables] == [["hgrn2", "mamba"], ["hgrn2", "mamba"]]


def test_data_that_changed_under_equal_settings_is_named_by_its_hash():
    tables = make_tables([*run(0.9, data_hash="old"), *run(0.8, data_hash="new", time="2025-02-01T00:00:00+00:00", model="gla")], BIMODAL)
    assert [len(table.lines) for table in tables] == [1, 1]
    assert {note.rpartition(": ")[2] for table in tables for note in table.notes if "data hash" in note} == {
        "data hash old",
        "data hash new",
    }


def carded(window, **changes):
    return {"card": {"unit": "nats", "window": window, "tokenizer": "gpt2"}, **changes}


def test_rows_whose_metric_is_defined_otherwise_never_share_a_table():
    rows = [
        *run(0.9, **carded("0")),
        *run(0.8, **carded("0", model="gla")),
        *run(0.7, **carded("400", model="mamba")),
        *run(0.6, model="s4d"),
    ]
    tables = make_tables(rows, BIMODAL)
    assert sorted(tuple(f["model"] for f in lines(table)) for table in tables) == [("hgrn2", "gla"), ("mamba",), ("s4d",)]
    told = {note.rpartition("this one: ")[2] for table in tables for note in table.notes if "defined otherwise (its card)" in note}
    assert told == {"tokenizer gpt2, unit nats, window 0", "tokenizer gpt2, unit nats, window 400", "no card"}
    two = make_tables(rows[:-2], BIMODAL)
    assert {note.rpartition("this one: ")[2] for table in two for note in table.notes if "its card" in note} == {"window 0", "window 400"}


def test_rows_of_one_card_say_nothing_of_it():
    assert not noted(only([*run(0.9, **carded("0")), *run(0.8, **carded("0", model="gla"))]), "card")


def test_cards_of_other_metrics_split_nothing():
    other = row(metric="other", value=1.0, **carded("400"))
    assert not noted(only([*run(0.9, **carded("0")), other]), "card")


def test_a_failure_stays_with_the_card_of_its_own_line():
    wide, narrow = {"vocab_size": 64}, {"vocab_size": 32}
    rows = [*run(0.9, settings=narrow, **carded("0")), *run(0.8, settings=wide, **carded("400"))]
    rows += [failed("oom", "no memory", seed=1, settings=each) for each in (narrow, wide)]
    rows += [failed("oom", "no memory", model="gla", settings=wide)]
    tables = make_tables(rows, BIMODAL)
    assert [[(f["model"], f["value"]) for f in lines(table)] for table in tables] == [
        [("hgrn2", "0.900, –"), ("gla", "–")],
        [("hgrn2", "0.800, –")],
    ]


def test_data_that_differ_within_one_card_split_once_more():
    rows = [
        *run(0.9, **carded("0", data_hash="a")),
        *run(0.8, **carded("0", model="gla", data_hash="b")),
        *run(0.7, **carded("400", model="mamba")),
    ]
    tables = make_tables(rows, BIMODAL)
    assert [len(table.lines) for table in tables] == [1, 1, 1]
    assert sum(noted(table, "other data (data hash)") for table in tables) == 2


def test_a_failure_without_data_stands_beside_the_others():
    table = only([*run(0.9, model="gla"), failed("oom", "no memory", data_hash="")])
    assert [f["model"] for f in lines(table)] == ["gla", "hgrn2"]


def test_the_newest_run_of_a_cell_counts():
    old = run(0.5, time="2025-01-01T00:00:00+00:00")
    new = [failed("diverged", "nan", time="2025-01-02T00:00:00+00:00")]
    newest = run(0.7, time="2025-01-03T00:00:00+00:00")
    assert line([*new, *old])["status"] == "diverged 1/1: nan"
    assert line([*newest, *new, *old])["value"] == "0.700"


def test_speed_suites_split_by_device_name():
    rows = [*run(0.9, device_name="H100"), *run(0.8, device_name="A100", model="gla")]
    tables = make_tables(rows, protocol(speed=True, across="d_model"))
    assert [len(table.lines) for table in tables] == [1, 1]
    assert all(noted(table, "another protocol version, precision or device") for table in tables)


def test_other_metrics_have_tables_of_their_own():
    rows = [*run(0.9), *run(0.7, metric="accuracy_token"), failed("oom", "no memory", model="gla")]
    assert [f["value"] for f in lines(only(rows))] == ["0.900", "–"]
    table = only(rows, metric="accuracy_token")
    assert [f["value"] for f in lines(table)] == ["0.700", "–"]
    assert "accuracy_token on test data" in table.title


def test_tables_come_in_alphabetical_order():
    rows = [
        each
        for preset, task in (("smoke", "b"), ("paper", "b"), ("smoke", "a"), ("paper", "a"))
        for each in run(0.9, preset=preset, task=task)
    ]
    titles = [table.title.split(":")[0] for table in make_tables(rows, BIMODAL)]
    assert titles == [f"mqar, preset {preset}, {task}" for preset in ("paper", "smoke") for task in "ab"]


def test_no_rows_give_no_table():
    assert make_tables([], BIMODAL) == []
    assert make_tables(run(0.9), BIMODAL, "ppl") == []


# columns


def test_settings_that_differ_become_columns_and_equal_ones_do_not():
    table = only([*run(0.9, settings={"d_model": 64}), *run(0.8, settings={"d_model": 128})])
    assert [f["d_model"] for f in lines(table)] == [64, 128]
    assert not {"num_layers", "vocab_size", "seed", "select"} & {c.name for c in table.columns}


def test_no_column_is_shown_twice():
    rows = [*grid((0.1, 0.9, 0.2), model="gla"), *run(0.8, settings={"conv": 0, "positions": "rope"}, model="mamba")]
    names = [c.name for c in only([*rows, *run(0.7, settings={"lr": 1e-2})]).columns]
    assert len(names) == len(set(names))
    assert "conv" not in names


def test_a_models_own_settings_become_columns_among_its_lines():
    rows = [
        *run(0.9, settings={"hgrn2.expand_ratio": 16}),
        *run(0.8, settings={"hgrn2.expand_ratio": None}),
        *run(0.7, settings={"gla.num_heads": 2}, model="gla"),
    ]
    found = lines(only(rows))
    assert "gla.num_heads" not in found[0]
    assert [f["hgrn2.expand_ratio"] for f in found] == [16, None, None]
    assert "| – " in render(only(rows), "md")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("backend", {"backend": "reference"}),
        ("device", {"device": "cuda"}),
        ("version", {"mixer_version": "2"}),
    ],
)
def test_runs_that_differ_in_how_they_ran_are_lines_of_their_own(name, changes):
    found = lines(only([*run(0.9), *run(0.8, **changes)]))
    assert [f["value"] for f in found] == ["0.900", "0.800"]
    assert found[0][name] != found[1][name]


def test_over_how_many_processes_a_batch_was_spread_sets_no_line_apart():
    assert len(lines(only([*run(0.9, seed=0), *run(0.8, seed=1, processes=8, settings={"parallel": "fsdp"})]))) == 1


def test_versions_are_compared_within_a_model_only():
    names = [c.name for c in only([*run(0.9), *run(0.8, model="hybrid", mixer_version="1 (gla 1)")]).columns]
    assert "version" not in names


def test_a_list_is_shown_as_its_words():
    rows = [
        *run(0.9, settings={"hybrid.layers": ["gla", "hgrn2"]}, model="hybrid"),
        *run(0.8, settings={"hybrid.layers": ["gla"]}, model="hybrid"),
    ]
    assert [f["hybrid.layers"] for f in lines(only(rows))] == [["gla", "hgrn2"], ["gla"]]
    assert "| gla, hgrn2 " in render(only(rows), "md")
    assert short(("hgrn2", "attention")) == "hgrn2, attention"


def test_layers_of_several_kinds_are_named_in_a_note():
    rows = [*run(0.9, model="hybrid", effective={"layers": ["gla", "hgrn2"]}), *run(0.8)]
    assert noted(only(rows), "layers of hybrid: gla, hgrn2")
    assert not noted(only(run(0.8)), "layers of")


def test_costs_and_fairness_are_columns():
    (found,) = lines(only(run(0.9, settings={"conv": 4, "positions": "learned"})))
    assert (found["parameters"], found["non-embedding"], found["state"], found["train FLOPs/token"]) == (41_234, 39_186, 32_768, 250_000.0)
    assert (found["local mixing"], found["positions"]) == ("conv 4", "learned")
    assert lines(only(run(0.9, settings={"conv": 0})))[0]["local mixing"] == "none"


def test_costs_come_from_a_run_that_finished():
    rows = [failed("failed", "boom", seed=0, parameters=None, state_bytes=None), *run(0.9, seed=1)]
    assert line(rows)["parameters"] == 41_234


def test_speed_is_the_median_of_a_line_on_one_device():
    rows = [each for seed, speed in enumerate((100.0, 900.0, 200.0)) for each in run(0.9, seed=seed, tokens_per_s=speed)]
    assert line(rows)["tokens/s"] == 200.0


@pytest.mark.parametrize("other", [{"model": "gla"}, {"seed": 1}], ids=["other line", "same line"])
def test_speed_is_dropped_where_rows_come_from_several_devices(other):
    table = only([*run(0.9), *run(0.8, device_name="B processor", **other)])
    assert "tokens/s" not in [c.name for c in table.columns]
    assert noted(table, "no speed column: the rows come from several devices")


def test_what_never_ran_does_not_take_the_speed_column_away():
    table = only([*run(0.9), failed("oom", "no memory", model="gla", device_name="none", tokens_per_s=None)])
    assert [f["tokens/s"] for f in lines(table)] == [25_600.0, None]


def test_further_speeds_have_columns_where_one_device_gave_them_in_one_way():
    of = protocol(solved=None, rates=(("images/s", "images", ("mode", "batch")), ("pages/s", "pages", ())))
    told = {"mode": "graph", "batch": 8, "pages": None}
    rows = [each for n, seed in ((100, 0), (300, 1), (200, 2)) for each in run(0.5, seed=seed, details={"images": n, **told})]
    rows += run(0.4, model="gla")
    table = only(rows, of)
    assert [found.get("images/s") for found in lines(table)] == [200, None]
    assert noted(table, "images/s: mode graph, batch 8")
    assert "pages/s" not in [column.name for column in table.columns]
    for other in ({"device_name": "other"}, {"details": {"images": 50, **told, "mode": "eager"}}):
        assert "images/s" not in [column.name for column in only([*rows, *run(0.3, **other, seed=3)], of).columns]


# notes


def test_notes_name_the_budget_that_all_lines_share():
    table = only([*run(0.9, settings={"batch_size": 8}, model="gla"), *run(0.8, model="mamba")])
    (note,) = [n for n in table.notes if n.startswith("the same for every line: ")]
    assert "weight_decay 0.1, warmup 0.1, schedule cosine" in note
    assert "batch_size" not in note
    assert [f["batch_size"] for f in lines(table)] == [8, 32]


def test_notes_name_version_precision_backend_device_and_commit():
    rows = [*run(0.9, dirty=True), *run(0.8, model="gla", commit="fedcba9876543210", backend="reference", threads=2)]
    devices = "A processor (cpu, 1 thread); A processor (cpu, 2 threads)"
    commits = "0123456789+changes, fedcba9876"
    assert f"protocol version 1, float32, backend chunked, reference, {devices}, commit {commits}" in only(rows).notes


def test_notes_count_truncated_and_skipped_items():
    assert noted(only(run(0.9, truncated=3, skipped=2)), "5 truncated or skipped items")
    assert noted(only([*run(0.9, truncated=5), *run(0.8, truncated=5, model="gla")]), "5 truncated or skipped items")
    assert noted(only([*run(0.9, truncated=5), *run(0.8, model="gla")]), "0 to 5 truncated or skipped items")
    assert not noted(only(run(0.9)), "truncated")


def test_a_title_says_what_is_shown():
    assert only(run(0.9)).title == "mqar, preset smoke, len32_kv4: accuracy on test data (fraction; higher is better)"
    changes = {"metric": "ppl", "higher_is_better": False}
    assert "lower is better" in only(run(9.0, **changes), LOWER).title


def test_tables_do_not_depend_on_the_order_of_rows():
    rows = [
        *grid((0.2, 0.9, 0.1), seed=0),
        *grid((0.8, 0.3, 0.1), seed=1),
        *grid((0.9, 0.9, 0.9), seed=0, model="gla"),
        *seeds(0.5, None, 0.7, model="mamba"),
        *seeds(0.5, 0.5, model="attention", data_hash="d9"),
        *run(0.4, preset="paper", settings={"d_model": 128}),
        *run(0.4, preset="paper", settings={"d_model": 256}),
        *run(0.3, time="2024-01-01T00:00:00+00:00", commit="abc"),
        failed("oom", "no memory", model="hgrn1", data_hash=""),
    ]
    want = make_tables(rows, BIMODAL)
    for seed in range(8):
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert [render(t, "md") for t in make_tables(shuffled, BIMODAL)] == [render(t, "md") for t in want]


# rendering

SHOWN = Table(
    "a title <1>",
    (Column("model"), Column("share|all"), Column("status", lambda value: str(value))),
    (("hgrn2", 0.125, "ok"), ("gla", None, "failed 1/1: a | b\nc <d> & e_f 100%")),
    ("a note <2>", "another"),
)


def test_markdown_is_one_line_per_line_whatever_a_reason_holds():
    text = render(SHOWN, "md")
    body = [part for part in text.splitlines() if part.startswith("|")]
    assert len(body) == 4
    assert {len(re.findall(r"(?<!\\)\|", part)) for part in body} == {4}
    assert r"failed 1/1: a \| b c" in text
    assert text.startswith("**a title <1>**\n")
    assert text.endswith("- a note <2>\n- another\n")


def test_csv_keeps_raw_values():
    table = only([*run(0.9, settings={"lr": 1e-3, "d_model": 64}), *run(0.8, settings={"lr": 1e-2, "d_model": 128}, model="gla")])
    names, *body = csv.reader(io.StringIO(render(table, "csv")))
    assert names == ["table", *("accuracy seed 0" if ", seed" in c.name else c.name for c in table.columns)]
    first = dict(zip(names, body[0], strict=True))
    assert [first[k] for k in ("parameters", "state", "train FLOPs/token", "tokens/s")] == ["41234", "32768", "250000.0", "25600.0"]
    assert (first["d_model"], first["accuracy seed 0"], first["table"]) == ("64", "0.9", table.title)
    assert len(body) == 2


def test_csv_has_a_column_for_each_seed_and_leaves_failures_empty():
    names, *body = csv.reader(io.StringIO(render(only(seeds(0.25, None, 0.75)), "csv")))
    assert [dict(zip(names, body[0], strict=True))[f"accuracy seed {s}"] for s in range(3)] == ["0.25", "", "0.75"]


def test_csv_quotes_what_it_must():
    names, *body = csv.reader(io.StringIO(render(SHOWN, "csv")))
    assert names == ["table", "model", "share|all", "status"]
    assert body == [["a title <1>", "hgrn2", "0.125", "ok"], ["a title <1>", "gla", "", "failed 1/1: a | b\nc <d> & e_f 100%"]]


def test_latex_escapes_what_it_must():
    text = render(SHOWN, "latex")
    assert r"\toprule" in text
    assert r"\& e\_f 100\%" in text
    assert text.startswith("% a title")
    assert [part for part in text.splitlines() if part.startswith("% ")] == ["% a title <1>", "% a note <2>", "% another"]


def test_html_is_well_formed():
    class Reader(HTMLParser):
        """Collects text and checks that tags close in order."""

        def __init__(self):
            super().__init__()
            self.open, self.text = [], []

        def handle_starttag(self, tag, attrs):
            self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_data(self, data):
            self.text.append(data.strip())

    reader = Reader()
    reader.feed(render(SHOWN, "html"))
    reader.close()
    assert reader.open == []
    assert {"a title <1>", "a note <2>", "hgrn2"} <= set(reader.text)
    assert any("a | b c <d> & e_f 100%" in text for text in reader.text)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1k"),
        (41_234, "41.2k"),
        (999_499, "999k"),
        (999_600, "1M"),
        (2.5e9, "2.5G"),
        (3e12, "3T"),
    ],
)
def test_counts_are_shown_with_three_digits(value, shown):
    rows = run(0.9, parameters=value)
    column = next(c for c in only(rows).columns if c.name == "parameters")
    assert column.show(value) == shown


def test_sizes_and_settings_are_shown_for_people():
    rows = [*run(0.9, settings={"stop_at": 1e-05}), *run(0.8, settings={"stop_at": None})]
    text = render(only(rows), "md")
    assert "32.8kB" in text
    assert "1e-05" in text
    assert "250k" in text


# what a status says


def test_lines_that_solve_everything_are_not_told_apart_by_how_their_stop_fell():
    rows = [*seeds(*[0.9991] * 6), *seeds(*[0.9996] * 6, model="gla")]
    assert {each["status"] for each in lines(only(rows))} == {"ok"}


def test_a_failed_pair_leaves_no_verdict():
    rows = [*seeds(0.5, 0.6, 0.7, 0.5, 0.6, None), *seeds(0.5, 0.6, 0.7, 0.6, 0.6, 0.6, model="gla")]
    assert not any("not distinguishable" in each["status"] for each in lines(only(rows)))


def test_seeds_above_the_floor_of_a_line_below_it_are_counted():
    rows = seeds(0.2, 0.2, 0.9, floors={"guess": 0.31})
    assert "not learned in this budget (1 of 3 seeds beat the floor)" in line(rows)["status"]


def test_models_that_the_source_did_not_run_are_our_extension():
    preset = Preset("s", "s", (), {}, source_models=("hgrn2",))
    of = protocol(presets={"smoke": preset})
    told = {each["model"]: each["status"] for each in lines(only([*run(0.9), *run(0.8, model="gla")], of))}
    assert told == {"hgrn2": "ok", "gla": "our extension of the protocol"}


def test_rows_from_before_there_were_scans_stand_beside_later_ones():
    old, new = run(0.9, seed=0), run(0.8, seed=1, settings={"scan": "causal"})
    (line,) = lines(only([*old, *new]))
    assert "scan" not in line
    assert {line["scan"] for line in lines(only([*old, *run(0.7, settings={"scan": "both"})]))} == {"both", "causal"}


def test_a_scan_that_looks_ahead_is_a_note_and_no_fault():
    told = {"scan": "both (all positions at once)", "causal": False}
    table = only([*run(0.9, settings={"scan": "both"}, effective=told), *run(0.8, settings={"scan": "both"}, model="gla", effective=told)])
    assert "scan both (all positions at once), nothing is decoded and no state held: gla, hgrn2" in table.notes
    assert not any("not causal" in line["status"] for line in lines(table))
    (leaking,) = lines(only(run(0.9, effective={"causal": False})))
    assert "not causal" in leaking["status"]
