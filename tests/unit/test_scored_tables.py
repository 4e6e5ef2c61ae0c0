"""Tables and comparisons of rows that score items: standard errors, tests over items, tasks of their own unit, the six of the paper."""

import csv
import dataclasses
import io

import pytest
from test_paired import held
from test_results import row
from test_tables import lines, noted, protocol

from hgrn2_bench.compare import Names, compare_models
from hgrn2_bench.render import render
from hgrn2_bench.tables import make_tables

OF = protocol(
    name="zeroshot",
    metric="score",
    solved=None,
    takes_any_language_model=True,
    averaged=("lm_task", ("piqa", "arc")),
    averaged_as=("PIQA", "ARC"),
    beside_metric=(("acc_norm", "acc_norm", "test"), ("perplexity", "perplexity", "test")),
)
ITEMS = 40


def rows(model="a@1", right=30, task="piqa", lm_task="", error=0.05, fixed=True, tokens=3_000_000, **changes):
    """The rows of one cell that has the first so many of 40 items right."""
    correct = [place < right for place in range(ITEMS)]
    details = {"items": {task: {"acc": held(correct)}}, "stderr": {task: {"acc": error, "acc_norm": 0.04}}, "trained_tokens": tokens}
    own = {f"{model}.checkpoint": model} if fixed else {}
    settings = {"lm_task": lm_task or task, "weighting": "items", "fingerprint": "f"} | own | changes.pop("settings", {})
    shared = {"suite": "zeroshot", "preset": "evaluate", "task": task, "model": model, "details": details, "floors": {"chance": 0.3}}
    card = {"metric": "acc", "weighting": "micro: each item counts alike"}
    fields = shared | {"num_items": ITEMS, "card": card} | changes
    score = row(settings, metric="score", value=right / ITEMS, **fields)
    return [score, row(settings, metric="acc_norm", value=0.6, **fields | {"cell": score.cell})]


def only(found):
    (table,) = make_tables(found, OF)
    return table


def test_one_run_has_its_standard_error_over_items_and_what_its_model_has_seen():
    (found,) = lines(only(rows(error=0.068)))
    assert found["value"] == "0.750 ± 0.068"
    assert found["acc_norm"] == "0.600 ± 0.040"
    assert (found["tokens seen"], found["parameters"]) == (3_000_000, 41_234)
    assert "perplexity" not in found
    assert "piqa acc" not in found


def test_what_a_folder_does_not_say_is_not_shown_as_a_number():
    trained = lines(only([*rows(tokens=None), *rows("hgrn2", fixed=False)]))
    assert [each["tokens seen"] for each in trained] == [None, 1_536_000]
    settings = {"conv": None, "positions": None}
    foreign = [
        dataclasses.replace(
            each,
            settings={k: v for k, v in each.settings.items() if k not in settings},
            effective={"local_mixing": "its own", "positions": "its own"},
            state_bytes=None,
        )
        for each in rows()
    ]
    (found,) = lines(only(foreign))
    assert (found["local mixing"], found["positions"], found["state"]) == ("its own", "its own", None)


def test_the_error_and_the_weights_are_explained():
    table = only(rows())
    assert noted(table, "± beside a single run is the standard error over its items")
    assert noted(table, "score counted so: metric acc; weighting micro: each item counts alike")
    assert not noted(only(rows(error="N/A")), "± beside")


def test_several_seeds_have_no_error_over_items():
    found = lines(only([*rows("hgrn2", fixed=False, seed=0), *rows("hgrn2", 20, fixed=False, seed=1)]))
    assert found[0]["value"] == "0.750, 0.500"
    assert found[0]["acc_norm"] == "0.600"


def test_tasks_of_a_group_have_columns_with_their_errors():
    details = {"scored": {"piqa": "acc", "arc": "acc_norm"}, "stderr": {"piqa": {"acc": 0.1}, "arc": {"acc_norm": 0.2}}}
    group = rows(task="smoke", details=details)[0]
    parts = [
        row(dict(group.settings), metric=m, split=t, value=v, **_of(group)) for t, m, v in [("piqa", "acc", 0.7), ("arc", "acc_norm", 0.4)]
    ]
    (found,) = lines(only([group, *parts]))
    assert (found["piqa acc"], found["arc acc_norm"]) == ("0.700 ± 0.100", "0.400 ± 0.200")
    (table,) = make_tables([group, *parts], dataclasses.replace(OF, beside_metric=(("PIQA", "acc", "piqa"),)))
    assert [column.name for column in table.columns if "acc" in column.name or column.name == "PIQA"] == ["PIQA", "arc acc_norm"]
    many = {"scored": {f"t{n}": "acc" for n in range(9)}, "stderr": {}}
    more = [row(dict(group.settings), metric="acc", split=f"t{n}", value=0.5, **_of(group, details=many)) for n in range(9)]
    (found,) = lines(only([dataclasses.replace(group, details=many), *more]))
    assert "t0 acc" not in found


def _of(each, **changes):
    names = ("suite", "preset", "task", "model", "details", "card", "cell", "floors")
    return {name: getattr(each, name) for name in names} | changes


@pytest.mark.parametrize(
    ("other", "status"),
    [
        (29, "not distinguishable from best (McNemar over 40 items, p=1)"),
        (25, "not distinguishable from best (McNemar over 40 items, p=0.062)"),  # 5 of 5 against: 2 / 2^5
        (24, "ok"),  # 6 of 6 against: 2 / 2^6 = 0.031
    ],
)
def test_a_fixed_model_is_tested_against_the_best_over_the_items(other, status):
    first, second = lines(only([*rows(), *rows("b@2", other)]))
    assert (first["model"], first["status"], second["status"]) == ("a@1", "ok", status)


def test_models_of_other_seeds_are_not_tested_over_items():
    found = [*rows("hgrn2", 30, fixed=False), *rows("gla", 29, fixed=False, seed=1)]
    assert [each["status"] for each in lines(only(found))] == ["seed 0 only", "seed 1 only"]


def test_a_task_in_which_less_is_better_ranks_so():
    changes = {"unit": "per word", "higher_is_better": False, "floors": {}, "task": "wiki"}
    found = [dataclasses.replace(rows(model, **changes)[0], value=value) for model, value in (("a@1", 30.0), ("b@2", 20.0))]
    table = only(found)
    assert "(per word; lower is better)" in table.title
    assert [each["model"] for each in lines(table)] == ["b@2", "a@1"]


def test_a_cell_that_was_skipped_for_want_of_files_makes_way_for_one_that_ran():
    skipped = dataclasses.replace(rows(settings={"fingerprint": ""})[0], status="skipped", value=None, reason="no file", details={})
    (found,) = lines(only([skipped, *rows()]))
    assert found["status"] == "ok"
    (found,) = lines(only([skipped]))
    assert found["status"] == "skipped 1/1: no file"
    assert len(lines(only([skipped, *rows("b@2")]))) == 2
    assert len(lines(only([dataclasses.replace(skipped, settings=rows()[0].settings | {"fingerprint": "g"}), *rows()]))) == 2


def test_a_cell_that_failed_on_its_files_makes_way_for_one_that_later_ran_with_others():
    (good,) = rows()[:1]
    failed = {"status": "failed", "value": None, "reason": "piqa: line 3 is no JSON", "details": {}, "data_hash": ""}
    broken = dataclasses.replace(
        good, cell="f" * 16, settings=good.settings | {"fingerprint": "g"}, time="2026-01-01T00:00:00+00:00", **failed
    )
    later = [dataclasses.replace(each, time="2026-01-01T00:01:00+00:00") for each in rows(settings={"fingerprint": "h"})]
    (found,) = lines(only([broken, *later]))
    assert found["status"] == "ok"
    assert len(lines(only([dataclasses.replace(broken, time="2026-01-01T00:02:00+00:00"), *later]))) == 2  # the files are worse now
    assert len(make_tables([dataclasses.replace(broken, data_hash="d"), *later], OF)) == 2  # the model failed, not the files


def test_a_fixed_model_had_no_budget_and_no_speed():
    table = only([dataclasses.replace(each, tokens_per_s=None, workers=2) for each in rows(right=12)])
    (found,) = lines(table)
    assert found["status"] == "no better than the floor"
    budget = dataclasses.replace(OF, budget=("vocab_size",))
    assert not noted(make_tables(rows(), budget)[0], "vocab_size")
    assert noted(make_tables([*rows(), *rows("hgrn2", fixed=False)], budget)[0], "vocab_size 32")
    assert not noted(table, "speed measured")


# the six of the paper


def averages(*groups):
    *_, table = make_tables([each for group in groups for each in group], OF)
    names = [column.name for column in table.columns]
    return table, [dict(zip(names, line, strict=True)) for line in table.lines]


def test_the_average_has_the_paper_s_headings_sizes_and_an_error():
    table, (found,) = averages(rows(error=0.06), rows(task="arc", right=20, error=0.08))
    assert found == {
        "model": "a@1",
        "parameters": 41_234,
        "tokens seen": 3_000_000,
        "PIQA": "0.750",
        "ARC": "0.500",
        "average": "0.625 ± 0.050",  # sqrt(0.06^2 + 0.08^2) / 2
        "why there is none": "",
    }
    assert "± is the standard error over the items of all tasks" in table.notes


def test_other_tasks_are_no_part_of_it():
    assert all("average" not in table.title for table in make_tables([*rows(), *rows(task="lambada"), *rows(task="wiki")], OF))
    table, found = averages(rows(), rows(task="arc"), rows(task="lambada"), rows("b@2", task="lambada"))
    assert [each["model"] for each in found] == ["a@1"]
    assert "tasks: arc, piqa" in table.notes


def test_parts_of_tasks_have_averages_of_their_own():
    part = [rows(task=f"{task}-first10", lm_task=task, right=10) for task in ("piqa", "arc")]
    tables = [table for table in make_tables([*rows(), *rows(task="arc"), *part[0], *part[1]], OF) if "average" in table.title]
    assert sorted((table.lines[0][3], table.notes[0]) for table in tables) == [
        ("0.250†", "tasks: arc-first10, piqa-first10"),
        ("0.750", "tasks: arc, piqa"),
    ]


def test_a_task_that_was_skipped_is_called_so():
    skipped = dataclasses.replace(rows(task="arc")[0], status="skipped", value=None, reason="no file")
    _, (found,) = averages(rows(), [skipped])
    assert found["why there is none"] == "skipped arc"
    _, (found,) = averages(rows(), [dataclasses.replace(skipped, status="oom")])
    assert found["why there is none"] == "failed runs of arc"


# comparisons


def compared(*groups):
    (report,) = compare_models([each for group in groups for each in group], {"zeroshot": OF}, Names("a@1", "b@2"))
    names = [column.name for column in report.table.columns]
    return report, [dict(zip(names, line, strict=True)) for line in report.table.lines]


@pytest.mark.parametrize(
    ("other", "finding", "p"),
    [(24, "a@1 is better", "0.031"), (36, "a@1 is worse", "0.031"), (31, "not distinguishable", "1")],
)
def test_two_fixed_models_are_compared_over_their_items(other, finding, p):
    report, (found,) = compared(rows(), rows("b@2", other))
    assert (found["finding"], found["pairs"]) == (finding, 1)
    told = f"one run of each: exact test of these two models over the same items, at p < 0.05: piqa McNemar over 40 items, p={p}"
    assert told in report.table.notes
    assert not any(note.startswith("not equal") for note in report.table.notes)


def test_without_the_same_items_nothing_is_claimed_of_one_pair():
    other = [dataclasses.replace(each, details={}) for each in rows("b@2", 24)]
    report, (found,) = compared(rows(), other)
    assert found["finding"] == "no claim (under 5 paired seeds)"
    assert not any("exact test" in note for note in report.table.notes)


def test_tasks_of_another_unit_have_a_report_of_their_own():
    changes = {"unit": "per word", "higher_is_better": False, "task": "wiki", "floors": {}}
    perplexity = [dataclasses.replace(rows(model, **changes)[0], value=v, details={}) for model, v in (("a@1", 30.0), ("b@2", 20.0))]
    found = compare_models([*rows(), *rows("b@2", 24), *perplexity], {"zeroshot": OF}, Names("a@1", "b@2"))
    titles = [report.table.title.rpartition("(")[2] for report in found]
    assert titles == ["fraction; higher is better)", "per word; lower is better)"]
    assert "lower score" in found[1].sentence


def test_a_model_without_a_setting_is_not_called_unequal_in_it():
    other = [
        dataclasses.replace(each, settings={k: v for k, v in each.settings.items() if k not in ("conv", "positions", "num_layers")})
        for each in rows("b@2", 24)
    ]
    report, (found,) = compared(rows(), other)
    assert found["finding"] == "a@1 is better"
    assert not any(note.startswith("not equal: conv") for note in report.table.notes)


def test_the_foot_says_what_models_that_learned_here_share_beside_trained_ones():
    learning = ("lr", "batch_size", "epochs", "weight_decay", "warmup", "schedule", "stop_at", "channel_mixer")
    came = [dataclasses.replace(each, settings={k: v for k, v in each.settings.items() if k not in learning}) for each in rows()]
    here = [each for model in ("hgrn2", "gla") for each in rows(model, 20, fixed=False, settings={"epochs": 2})]
    (trained,) = make_tables([*came, *here], dataclasses.replace(OF, budget=("weighting",)))
    assert [note for note in trained.notes if note.startswith("the same")] == [
        "the same for every line: weighting items",
        "the same for every line that learned here: lr 0.001, batch_size 32, epochs 2, weight_decay 0.1, warmup 0.1, schedule cosine, "
        "stop_at 0.0, channel_mixer none",
    ]


def test_csv_holds_further_metrics_unrounded():
    found = rows()
    found[1] = dataclasses.replace(found[1], value=0.123456)
    (head, line) = csv.reader(io.StringIO(render(only(found), "csv")))
    assert (line[head.index("score seed 0")], line[head.index("acc_norm seed 0")]) == ("0.75", "0.123456")
    assert "0.123 ± 0.040" in render(only(found), "md")
