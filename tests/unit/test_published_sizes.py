"""Published models of several sizes beside our own: which are comparable, and why the others are not."""

import dataclasses

import pytest
from test_results import row
from test_tables import protocol

from hgrn2_bench import registry
from hgrn2_bench.protocol import Preset
from hgrn2_bench.published import published
from hgrn2_bench.published_tables import published_table

TASKS = ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
HEADINGS = ("PIQA", "HS", "WG", "ARC-e", "ARC-c", "OBQA")
HGRN2_150M = (66.43, 35.44, 51.70, 46.63, 24.32, 28.40)
PRESETS = {
    "evaluate": Preset("s", "lm-eval", (), {}, reproduces=("zero_shot_main",)),
    "smoke": Preset("s", "ours", (), {}),
}
OF = protocol(
    name="zeroshot", metric="score", solved=None, presets=PRESETS, averaged=("lm_task", TASKS), averaged_as=HEADINGS, unit="fraction"
)


def rows(scores=HGRN2_150M, model="mine@1", kind="hgrn2", tokens=100e9, error=0.01, tasks=TASKS, ending="", **changes):
    """A fixed model's rows, one for each task, scored in percent."""
    return [
        row(
            {"lm_task": task, f"{model}.checkpoint": model},
            suite="zeroshot",
            task=f"{task}{ending}",
            model=model,
            metric="score",
            value=score / 100,
            card={"metric": "acc"},
            details={"trained_model": kind, "trained_tokens": tokens, "stderr": {task: {"acc": error}}},
            **{"preset": "evaluate", "parameters": 150_000_000, "floors": {}} | changes,
        )
        for task, score in zip(tasks, scores, strict=True)
    ]


def lines(found):
    table = published_table(found, OF)
    names = [column.name for column in table.columns]
    return [dict(zip(names, line, strict=True)) for line in table.lines]


def verdict(found, model="HGRN2", parameters=150e6):
    (line,) = [line for line in lines(found) if (line["model"], line["parameters"]) == (model, parameters)]
    return line["verdict on ours"]


def test_every_published_model_has_a_line_with_its_sizes():
    found = lines([])
    assert len(found) * 7 == len(published("zeroshot")) == 189
    assert {line["verdict on ours"] for line in found} == {"not comparable because there are no rows of such a model over whole tasks"}
    (small,) = [line for line in found if (line["model"], line["parameters"]) == ("HGRN2", 150e6)]
    assert [float(small[heading]) for heading in HEADINGS] == list(HGRN2_150M)
    assert (small["AVG"], small["tokens seen"]) == ("42.15", 100e9)
    assert {line["tokens seen"] for line in found if line["model"] == "RWKV-4"} == {None}


def test_ours_stand_below_in_percent_with_their_average():
    *_, mine = lines(rows())
    assert (mine["model"], mine["parameters"], mine["tokens seen"]) == ("mine@1 (ours)", 150_000_000, 100e9)
    assert [float(mine[heading]) for heading in HEADINGS] == list(HGRN2_150M)
    assert mine["AVG"] == "42.15"
    *_, mine = lines(rows()[1:])
    assert (mine["PIQA"], mine["AVG"]) == ("–", "–")


def test_a_model_of_the_same_kind_size_and_tokens_gets_a_verdict_for_each_task():
    assert verdict(rows()) == "mine@1: within on PIQA, HS, WG, ARC-e, ARC-c, OBQA, AVG"
    # 1.96 standard errors of one point are 1.96 points; of the average of six 0.80
    apart = [value + gap for value, gap in zip(HGRN2_150M, (1.9, 2.0, -1.9, -2.0, 0, 4.9), strict=True)]
    assert verdict(rows(apart)) == "mine@1: within on PIQA, WG, ARC-c, above on HS, OBQA, AVG, below on ARC-e"
    assert verdict(rows()[:1]) == "mine@1: within on PIQA"


@pytest.mark.parametrize("published_name", ["hgrn2", "HGRN-2"])
def test_kinds_are_found_however_they_are_written(published_name):
    assert verdict(rows(kind=published_name)).startswith("mine@1: within")
    assert verdict(rows(kind="gpt_neo", parameters=130_000_000, tokens=300e9), "GPT-Neo", 130e6).startswith("mine@1: ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "gla"}, "there are no rows of such a model over whole tasks"),
        ({"preset": "smoke"}, "there are no rows of such a model over whole tasks"),
        ({"ending": "-first100"}, "there are no rows of such a model over whole tasks"),
        ({"protocol_version": 2}, "there are no rows of such a model over whole tasks"),
        ({"status": "skipped"}, "there are no rows of such a model over whole tasks"),
        ({"parameters": 1_200_000}, "mine@1 has 1.2M parameters, the published one 150M"),
        ({"parameters": 168_000_000}, "mine@1 has 168M parameters, the published one 150M"),
        ({"tokens": 3_300_000}, "mine@1 has 3.3M tokens of training, the published one 100G"),
        ({"tokens": None}, "mine@1 does not say its tokens of training"),
    ],
)
def test_others_are_not_comparable_and_the_reason_is_given(changes, reason):
    assert verdict(rows(**changes)) == f"not comparable because {reason}"


def test_a_published_model_that_does_not_say_its_tokens_is_not_comparable():
    found = rows(kind="rwkv4", parameters=170_000_000)
    reason = "mine@1 has 100G tokens of training, the published one does not say"
    assert verdict(found, "RWKV-4", 170e6) == f"not comparable because {reason}"


def test_several_of_ours_are_told_apart():
    small = rows(model="tiny@2", parameters=1_000_000)
    assert verdict([*rows(), *small]).startswith("mine@1: within on PIQA")
    assert "tiny@2" not in verdict([*rows(), *small])


def test_several_seeds_compare_their_own_interval():
    changes = {"model": "hgrn2", "settings": {"lm_task": "piqa"}, "tokens": int(100e9), "details": {}}
    first, second = (dataclasses.replace(rows()[0], seed=seed, cell=str(seed), value=0.6 + 0.01 * seed, **changes) for seed in range(2))
    assert verdict([first, second]) == "hgrn2: below on PIQA"
    assert verdict([first, dataclasses.replace(second, value=0.67)]) == "hgrn2: within on PIQA"


def test_one_setting_of_a_task_alone_is_compared():
    again = [dataclasses.replace(each, settings={**each.settings, "fewshot": 5}, cell="other") for each in rows()[:1]]
    assert verdict([*rows(), *again]) == "mine@1: within on HS, WG, ARC-e, ARC-c, OBQA"


def test_a_suite_without_sizes_keeps_a_line_for_each_value():
    table = published_table([], registry.protocol("mqar"))
    assert len(table.lines) == len(published("mqar"))
