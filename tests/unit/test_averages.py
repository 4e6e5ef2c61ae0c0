"""A model's average: over every task of a preset, or none, and why."""

from test_tables import protocol, run

from hgrn2_bench.tables import make_tables

OF = protocol(name="lra", averaged=("dataset", ("a", "b")), solved=None)


def rows(model, **values):
    """Rows of one model: for each task the values of its seeds."""
    return [
        each
        for task, found in values.items()
        for seed, value in enumerate(found)
        for each in run(value, model=model, task=task, settings={"dataset": task}, seed=seed)
    ]


def average(*groups):
    table = make_tables([row for group in groups for row in group], OF)[-1]
    names = [column.name for column in table.columns]
    return {line[0]: dict(zip(names[1:], line[1:], strict=True)) for line in table.lines}


def test_every_task_counts_alike_and_seeds_are_means():
    found = average(rows("gla", a=[0.5, 0.7], b=[0.9]))["gla"]
    assert found == {"a": "0.600", "b": "0.900", "average": "0.750", "why there is none": ""}


def test_a_missing_task_leaves_the_average_blank():
    found = average(rows("gla", a=[0.2]), rows("hgrn2", a=[0.2], b=[0.4]))
    assert found["gla"]["average"] == ""
    assert found["gla"]["why there is none"] == "no b"
    assert found["hgrn2"]["average"] == "0.300"


def test_several_settings_of_a_task_have_no_average():
    other = list(run(0.5, model="gla", task="a", settings={"dataset": "a", "d_model": 32}))
    found = average(rows("gla", a=[0.2], b=[0.4]), other)["gla"]
    assert found["why there is none"] == "several settings of a"
    assert found["average"] == ""


def test_a_mean_at_the_floor_is_marked():
    floors = {"floors": {"chance": 0.5, "majority": 0.48}}
    table = make_tables([*run(0.52, model="gla", task="a", settings={"dataset": "a"}, **floors), *rows("gla", b=[0.9])], OF)[-1]
    assert table.lines == (("gla", "0.520†", "0.900", "0.710", ""),)
    assert table.notes[-1] == "† not learned in this budget"


def test_one_task_alone_makes_no_table_of_averages():
    (table,) = make_tables(rows("gla", a=[0.7]), OF)
    assert "average" not in table.title


def test_a_suite_without_an_average_has_no_such_table():
    assert len(make_tables(rows("gla", a=[0.2]), protocol(solved=None))) == 1
