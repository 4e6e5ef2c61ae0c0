"""Tasks that no preset lists: planned by name where the preset takes such names, and refused with the nearest one elsewhere."""

import dataclasses
import shlex

import pytest

from hgrn2_bench import listing, registry
from hgrn2_bench.errors import ConfigError, unknown
from hgrn2_bench.plan import make_plan
from hgrn2_bench.protocol import Preset, Protocol


@dataclasses.dataclass(frozen=True)
class Data:
    lm_task: str = "smoke"
    limit: int = 0
    fingerprint: str = ""


def words_of(name):
    if name not in ("piqa", "mmlu-law", "1_digit"):
        raise unknown("task", name, ("piqa", "mmlu-law", "1_digit"))
    return (f"lm_task='{name}'",)


@pytest.fixture(autouse=True)
def suite(monkeypatch):
    """A suite with a preset for any task and one for its own alone; none of its files is there."""
    presets = {
        "smoke": Preset("s", "ours", ("model=hgrn2", "num_layers=1"), {"smoke": ()}),
        "evaluate": Preset("s", "ours", ("model=hgrn2",), {"piqa": ("lm_task=piqa",)}, open_tasks=True),
    }
    made = Protocol(
        *("zeroshot", 1, "score", "fraction", True, Data, lambda data: data.lm_task + f"-first{data.limit}" * bool(data.limit)),
        presets=presets,
        open_task=words_of,
        fingerprint=lambda data, *folder: "",
    )
    monkeypatch.setattr(registry, "protocol", lambda name: made)
    monkeypatch.setattr(registry, "suites", lambda: {"zeroshot": "suites.zeroshot"})


def cells(*words):
    return make_plan(["suite=zeroshot", *words], "cpu").cells


def test_a_preset_may_take_any_task_by_name():
    found = cells("preset=evaluate", "task=piqa,mmlu-law,1_digit", "limit=5")
    assert [cell.task for cell in found] == ["piqa-first5", "mmlu-law-first5", "1_digit-first5"]
    assert len({cell.key for cell in found}) == 3
    for cell in found:
        words = [word for word in shlex.split(cell.command) if "=" in word]
        assert [each.key for each in make_plan(words, "cpu").cells] == [cell.key]


def test_a_task_twice_is_one_cell():
    assert len(cells("preset=evaluate", "task=mmlu-law,mmlu-law")) == 1


def test_an_unknown_task_is_refused_in_the_words_of_the_suite():
    with pytest.raises(ConfigError, match=r"Unknown task 'piqq'\. Did you mean 'piqa'\?"):
        cells("preset=evaluate", "task=piqq")


def test_other_presets_take_their_own_tasks_alone():
    with pytest.raises(
        ConfigError,
        match=r"Unknown task of zeroshot preset=smoke 'piqa'\. Available: smoke\. Any other is for trained models: preset=evaluate",
    ):
        cells("preset=smoke", "task=piqa")


def test_the_user_s_words_win_over_those_of_an_open_task():
    (cell,) = cells("preset=evaluate", "task=mmlu-law", "lm_task=piqa")
    assert cell.data.lm_task == "piqa"


def test_a_cell_without_its_files_is_planned_and_gets_another_key_with_them(monkeypatch):
    (bare,) = cells("preset=evaluate")
    assert bare.data.fingerprint == ""
    made = dataclasses.replace(registry.protocol("zeroshot"), fingerprint=lambda data, *folder: "abc")
    monkeypatch.setattr(registry, "protocol", lambda name: made)
    (whole,) = cells("preset=evaluate")
    assert whole.key != bare.key


def test_the_listing_says_where_other_names_are_taken(monkeypatch, capsys):
    monkeypatch.setattr(registry, "suite_summary", lambda name: "summary")
    listing.print_suite("zeroshot")
    shown = {line.strip() for line in capsys.readouterr().out.splitlines()}
    assert "tasks: smoke" in shown
    assert "tasks: piqa; task=NAME takes any other that the suite knows" in shown
