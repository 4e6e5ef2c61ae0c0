"""Which cells run: the whole plan, or a grid on one seed and its best point on the others."""

import dataclasses
import json

import pytest
from test_results import row

from hgrn2_bench import registry
from hgrn2_bench.plan import make_plan
from hgrn2_bench.tuning import count, required

PROTOCOL = registry.protocol("mqar")
GRID = ("lr=1e-4,1e-3,1e-2", "seed=0,1,2", "tune_on=first_seed")


def cells(*words):
    model = () if any(word.startswith("model=") for word in words) else ("model=hgrn2",)
    return make_plan(["suite=mqar", "preset=test", *model, *words], "cpu").cells


def rows(cell, value, test=0.5):
    """What a finished cell leaves: `value` on the selection split; None for one that failed."""
    place = {name: getattr(cell, name) for name in ("preset", "task", "model", "seed", "backend", "device", "dtype", "mixer_version")}
    place |= {"cell": cell.key}
    if value is None:
        made = [row(**place, status="failed", reason="boom", value=None)]
    else:
        made = [row(**place, split=split, value=v) for split, v in (("validation", value), ("test", test))]
    settings = json.loads(json.dumps(cell.fields()))
    return [dataclasses.replace(each, settings=settings) for each in made]


def points(found):
    return sorted((cell.train.lr, cell.seed) for cell in found)


def finish(found, values):
    """Rows of cells by their learning rate, for seed 0 what `values` says, for others the reverse of it."""
    return {cell.key: rows(cell, values[cell.train.lr] * (1 if cell.seed == 0 else -1)) for cell in found}


@pytest.mark.parametrize(
    "words",
    [
        ("lr=1e-4,1e-3", "seed=0,1"),  # every seed tunes
        ("lr=1e-4,1e-3", "seed=0,1", "tune_on=every_seed"),
        ("seed=0,1,2", "tune_on=first_seed"),  # nothing to tune
        ("lr=1e-4,1e-3", "seed=3", "tune_on=first_seed"),  # one seed
        ("d_model=16,32", "seed=0,1", "tune_on=first_seed"),  # a sweep that is no grid
    ],
)
def test_without_a_grid_to_tune_on_one_seed_every_cell_runs(words):
    plan = cells(*words)
    assert required(plan, {}, PROTOCOL) == list(plan)
    assert count(plan, PROTOCOL) == len(plan)


def test_the_grid_runs_on_the_lowest_seed_first():
    plan = cells("lr=1e-4,1e-3,1e-2", "seed=2,0,1", "tune_on=first_seed")
    assert points(required(plan, {}, PROTOCOL)) == [(1e-4, 0), (1e-3, 0), (1e-2, 0)]
    assert (len(plan), count(plan, PROTOCOL)) == (9, 5)


def test_the_others_wait_for_the_whole_grid():
    plan = cells(*GRID)
    first = required(plan, {}, PROTOCOL)
    done = finish(first[:2], {1e-4: 0.9, 1e-3: 0.1, 1e-2: 0.5})
    assert required(plan, done, PROTOCOL) == first


@pytest.mark.parametrize("best", [1e-4, 1e-3, 1e-2])
def test_the_best_point_of_the_first_seed_runs_on_the_others(best):
    plan = cells(*GRID)
    values = {lr: 0.9 if lr == best else 0.2 for lr in (1e-4, 1e-3, 1e-2)}
    done = finish(required(plan, {}, PROTOCOL), values)
    found = required(plan, done, PROTOCOL)
    assert points(found) == sorted([(1e-4, 0), (1e-3, 0), (1e-2, 0), (best, 1), (best, 2)])
    assert len(found) == count(plan, PROTOCOL)
    done |= finish(found, values)  # what the other seeds give does not change the choice
    assert required(plan, done, PROTOCOL) == found


def test_cells_come_in_the_order_of_the_plan():
    plan = cells("seed=0,1", "lr=1e-3,1e-2", "tune_on=first_seed")
    done = finish(required(plan, {}, PROTOCOL), {1e-3: 0.2, 1e-2: 0.9})
    found = required(plan, done, PROTOCOL)
    assert found == [cell for cell in plan if cell in found]


def test_the_choice_is_made_on_the_selection_split():
    plan = cells("lr=1e-3,1e-2", "seed=0,1", "tune_on=first_seed")
    first = required(plan, {}, PROTOCOL)
    done = {cell.key: rows(cell, 0.9, 0.1) if cell.train.lr == 1e-3 else rows(cell, 0.2, 1.0) for cell in first}
    assert (1e-3, 1) in points(required(plan, done, PROTOCOL))
    tested = cells("lr=1e-3,1e-2", "seed=0,1", "tune_on=first_seed", "select=test")
    done = {cell.key: rows(cell, 0.9, 0.1) if cell.train.lr == 1e-3 else rows(cell, 0.2, 1.0) for cell in required(tested, {}, PROTOCOL)}
    assert (1e-2, 1) in points(required(tested, done, PROTOCOL))


def test_equal_points_give_the_lowest_whatever_the_order():
    plan = cells("lr=1e-2,1e-3", "seed=0,1", "tune_on=first_seed")
    done = finish(required(plan, {}, PROTOCOL), {1e-3: 0.5, 1e-2: 0.5})
    assert (1e-3, 1) in points(required(plan, done, PROTOCOL))


def test_a_point_that_failed_is_taken_only_where_all_have():
    plan = cells("lr=1e-3,1e-2", "seed=0,1", "tune_on=first_seed")
    low, high = required(plan, {}, PROTOCOL)
    assert (1e-2, 1) in points(required(plan, {low.key: rows(low, None), high.key: rows(high, 0.01)}, PROTOCOL))
    failed = {low.key: rows(low, None), high.key: rows(high, None)}
    assert points(required(plan, failed, PROTOCOL)) == [(1e-3, 0), (1e-3, 1), (1e-2, 0)]  # the others' failures are shown too


def test_groups_are_tuned_apart():
    plan = cells("model=hgrn2,attention", "conv=0,4", "lr=1e-3,1e-2", "seed=0,1", "tune_on=first_seed")
    assert (len(plan), count(plan, PROTOCOL)) == (16, 12)
    first = required(plan, {}, PROTOCOL)
    assert len(first) == 8

    def high(cell):
        return (cell.model == "hgrn2") == (cell.model_config.conv == 4)

    half = [cell for cell in first if cell.model == "hgrn2"]
    done = {cell.key: rows(cell, 0.9 if high(cell) == (cell.train.lr == 1e-2) else 0.1) for cell in half}
    later = [cell for cell in required(plan, done, PROTOCOL) if cell.seed == 1]
    assert {(c.model, c.model_config.conv, c.train.lr) for c in later} == {("hgrn2", 4, 1e-2), ("hgrn2", 0, 1e-3)}


def test_models_of_one_plan_may_tune_in_different_ways():
    plan = cells("model=hgrn2,attention", "lr=1e-3,1e-2", "seed=0,1", "hgrn2.tune_on=first_seed")
    assert len(required(plan, {}, PROTOCOL)) == 2 + 4
    assert count(plan, PROTOCOL) == 3 + 4
