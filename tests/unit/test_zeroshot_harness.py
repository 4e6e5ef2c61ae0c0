"""Suite zeroshot: packaged tasks over local rows, and what is made of a model's answers. The model here answers by lengths."""

import json
import logging
import lzma
import math
import os
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
import zeroshot_files as made
from zeroshot_files import ARC, HELLASWAG, LAMBADA, PIQA, ROWS, WINOGRANDE, Lengths, ask, bits_of, harness, value, write_lines, write_own

from hgrn2_bench.engine import SkippedError
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.trainer import DivergedError
from suites.zeroshot import catalogue, network, scores

datasets = pytest.importorskip("datasets", reason="needs lm-eval's datasets")


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    return made.prepare(tmp_path, monkeypatch)


# packaged tasks


@pytest.mark.parametrize("task", ROWS)
def test_every_known_task_runs_on_local_rows_with_its_official_prompt(data, task):
    split = catalogue.TASKS[task].split
    write_lines(data / f"{task}_{split}.jsonl", ROWS[task])
    outcome = ask(task)
    assert outcome.metrics[0].name == "score"
    assert outcome.metrics[0].num_items == len(ROWS[task])
    assert outcome.metrics[0].card["metric"] == catalogue.TASKS[task].rule
    assert outcome.metrics[0].value == value(outcome, catalogue.TASKS[task].rule)
    assert outcome.details["sources"] == {task: "local files, json lines"}
    assert outcome.details["whole"] == {task: len(ROWS[task])}


@pytest.mark.parametrize("task", ["piqa", "hellaswag", "winogrande", "arc_easy", "sciq", "wikitext"])
def test_numbers_and_items_are_those_of_lm_eval_alone(data, tmp_path, task):
    split = catalogue.TASKS[task].split
    path = write_lines(data / f"{task}_{split}.jsonl", ROWS[task])
    ours = ask(task, folder=tmp_path)
    content = {"include": str(catalogue.packaged().files[task]), "task": task, "dataset_path": "json", "dataset_name": None}
    content |= dict.fromkeys(("training_split", "validation_split", "test_split")) | {f"{split}_split": split}
    content |= {"dataset_kwargs": {"data_files": {split: str(path)}, "cache_dir": str(tmp_path / "datasets")}}
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "task.yaml").write_text(json.dumps(content))
    evaluator, tasks = pytest.importorskip("lm_eval.evaluator"), pytest.importorskip("lm_eval.tasks")
    manager = tasks.TaskManager(include_path=str(tmp_path / "plain"), include_defaults=False)
    with harness.quiet():
        loaded = manager.load([task])
        loaded["tasks"][task].set_config("num_fewshot", 0)
        theirs = evaluator.evaluate(Lengths(), loaded, bootstrap_iters=0 if task == "wikitext" else 1)
    for metric in ours.metrics[1:]:
        assert metric.value == theirs["results"][task][f"{metric.name},none"]
        if task != "wikitext":
            error = theirs["results"][task][f"{metric.name}_stderr,none"]
            assert ours.details["stderr"][task][metric.name] == pytest.approx(error)
    with lzma.open(tmp_path / harness.ITEMS, "rt") as file:
        records = [json.loads(line) for line in file]
    assert [record["doc_hash"] for record in records] == [sample["doc_hash"] for sample in theirs["samples"][task]]


def test_prompts_are_the_packaged_ones(data):
    write_lines(data / "piqa_validation.jsonl", PIQA)
    write_lines(data / "winogrande_validation.jsonl", WINOGRANDE)
    lm = Lengths()
    ask("piqa", lm)
    assert lm.asked[0] == (f"Question: {PIQA[0]['goal']}\nAnswer:", f" {PIQA[0]['sol1']}")
    lm = Lengths()
    ask("winogrande", lm)
    assert lm.asked[:2] == [("Ann saw Bob so Ann", " left ."), ("Ann saw Bob so Bob", " left .")]


def test_two_files_of_one_name_are_never_confused(data):
    path = write_lines(data / "piqa_validation.jsonl", PIQA)
    first = ask("piqa")
    times = path.stat()
    write_lines(path, [{**row, "label": 1 - row["label"]} for row in PIQA])  # same name and size
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = ask("piqa")
    assert first.data_hash != second.data_hash
    assert value(first, "acc") == pytest.approx(1 - value(second, "acc"))


def test_nothing_is_left_in_the_cache_and_the_user_s_is_not_touched(data, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    write_lines(data / "hellaswag_validation.jsonl", HELLASWAG)
    ask("hellaswag")
    write_own(tmp_path / "own")
    ask("made", own=tmp_path / "own")
    assert not (tmp_path / "hub").exists()
    assert [path.name for path in (tmp_path / "cache" / "zeroshot").iterdir()] == ["lock"]
    assert tmp_path / "hub" == datasets.config.HF_DATASETS_CACHE


def test_examples_come_from_the_train_file_and_are_refused_without_it(data):
    write_lines(data / "arc_easy_test.jsonl", ARC)
    with pytest.raises(SkippedError, match=r"2 examples are drawn from its train split, which is not here: wanted arc_easy_train"):
        ask("arc_easy", fewshot=2)
    write_lines(data / "arc_easy_train.jsonl", ARC)
    lm = Lengths()
    outcome = ask("arc_easy", lm, fewshot=2)
    assert lm.asked[0][0].count("Question:") == 3
    assert outcome.metrics[0].card["fewshot"] == "2"


def test_a_task_of_lm_eval_that_is_not_known_here_reads_local_files_too(data):
    rows = [{"question": f"{i}?", "choices": ["a", "bb", "ccc", "d"], "answer": i % 4} for i in range(5)]
    write_lines(data / "mmlu/anatomy/test.jsonl", rows)  # the hub's folders
    outcome = ask("mmlu_anatomy")
    assert value(outcome, "acc") == 0.4  # of equal lengths the first: right for answers 0 and 0
    assert outcome.metrics[0].floors == {"chance": 0.25}


def test_a_group_sets_its_members_as_in_lm_eval_though_only_one_is_left(data):
    write_lines(data / "arc_challenge_test.jsonl", ARC)
    write_lines(data / "arc_challenge_train.jsonl", ARC * 9)
    lm = Lengths()
    outcome = ask("openllm", lm)  # which asks arc_challenge with 25 examples
    assert lm.asked[0][0].count("Question:") == 26
    assert outcome.metrics[0].card["members"].startswith(f"1 of {len(catalogue.members('openllm'))}, without")


def test_a_task_without_data_is_skipped_with_the_files_it_wants():
    with pytest.raises(
        SkippedError, match=r"hellaswag: no data in .*: wanted hellaswag_validation.jsonl \(ctx_a, .*lm-eval's own way failed"
    ):
        ask("hellaswag")


def test_of_a_group_members_without_data_are_listed_before_and_others_run(data, capsys):
    write_lines(data / "arc_easy_test.jsonl", ARC)

    class Listening(Lengths):
        def loglikelihood(self, requests, **_):
            self.heard = capsys.readouterr().err
            return super().loglikelihood(requests)

    lm = Listening()
    outcome = ask("ai2_arc", lm)
    assert "ai2_arc: 1 without data, left out: arc_challenge (ConnectionError" in lm.heard
    assert list(outcome.details["unavailable"]) == ["arc_challenge"]
    assert outcome.metrics[0].card["members"].startswith("1 of 2, without arc_challenge (")
    assert value(outcome, "acc", "arc_easy") == outcome.metrics[0].value


def test_a_loading_script_that_is_no_more_skips_its_task(data, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found piqa.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SkippedError, match=r"wanted piqa_validation.jsonl.*Dataset scripts are no longer supported, but found piqa.py"):
        ask("piqa")


def test_rows_that_lm_eval_cannot_take_are_a_fault_of_the_file_not_missing_data(data):
    write_lines(data / "mmlu_anatomy_test.jsonl", [{"question": "a"}])
    with pytest.raises(ConfigError, match=r"mmlu_anatomy: lm-eval cannot read .*choices"):
        ask("mmlu_anatomy")


@pytest.mark.parametrize(("settings", "words"), [({}, "none that can be saved"), ({"max_length": 512}, "max_length=512 is too short")])
def test_ruler_says_what_it_wants(settings, words):
    with pytest.raises(SkippedError, match=words):
        ask("ruler_vt", **settings)


def test_code_from_the_hub_is_not_run():
    with pytest.raises(SkippedError, match="metric code_eval is code from the hub, and this suite runs none"):
        ask("humaneval")
    assert not hasattr(sys.modules.get("evaluate"), "load") or sys.modules["evaluate"].load is not network._refuse


def test_no_network_is_found_out_once_and_leaves_the_libraries_as_they_were(monkeypatch):
    monkeypatch.undo()
    asked = []

    def urlopen(*_: Any, **__: Any) -> None:
        asked.append(1)
        raise OSError("no route")

    monkeypatch.setattr(network.urllib.request, "urlopen", urlopen)
    before = datasets.config.HF_HUB_OFFLINE
    network.reaches_hub.cache_clear()
    for _ in range(3):
        with network.reachable_only():
            assert datasets.config.HF_HUB_OFFLINE
    network.reaches_hub.cache_clear()
    assert len(asked) == (0 if before else 1)
    assert before == datasets.config.HF_HUB_OFFLINE


# scores


@pytest.mark.parametrize(
    ("weighting", "mean", "words"), [("items", 5 / 1010, "every item alike (micro)"), ("tasks", 0.25, "every member alike (macro)")]
)
def test_a_group_of_10_and_1000_says_how_it_is_weighted(tmp_path, weighting, mean, words):
    write_own(tmp_path / "own")
    outcome = ask("made", own=tmp_path / "own", weighting=weighting)
    score = outcome.metrics[0]
    assert (score.value, score.num_items, score.split) == (pytest.approx(mean), 1010, "test")
    assert score.card["weighting"] == words
    assert score.card["members"] == "2"
    assert value(outcome, "acc", "small") == 0.5
    assert value(outcome, "acc", "large") == 0.0


def test_standard_errors_are_never_zero_between_0_and_1():
    values = [1] * 14 + [0] * 293
    error = scores.stderr("mean", values, 14 / 307)
    assert error == pytest.approx(0.0119, abs=5e-5)
    assert error == pytest.approx(math.sqrt(14 / 307 * 293 / 307 / 306))
    assert scores.stderr("mean", [1.0], 1.0) is None


def test_a_group_s_standard_error_is_that_of_its_mean_of_members():
    def member(name: str, right: int, of: int) -> scores.Scored:
        found = scores.measure("acc", [1.0] * right + [0.0] * (of - right), harness.mean, True)
        return scores.Scored(name, {"acc": found}, "acc", of, "", 0.5)

    members = [member("a", 14, 307), member("b", 500, 1000)]
    errors = [each.score.stderr for each in members]
    for weighting, weights in (("items", (307 / 1307, 1000 / 1307)), ("tasks", (0.5, 0.5))):
        found = scores.group_score(members, weighting)
        assert found.stderr == pytest.approx(math.hypot(*(w * error for w, error in zip(weights, errors, strict=True))))
        assert found.stderr > 0
        assert found.chance == pytest.approx(0.5)
    # a member that is measured in something else has no place in the mean
    words = scores.measure("word_perplexity", [(-4.0, 2), (-3.0, 1)], weighted_perplexity, False)
    other = scores.Scored("c", {"word_perplexity": words}, "word_perplexity", 2, "")
    found = scores.group_score([other, *members], "items")
    assert found.left_out == ("c",)
    assert found.value == pytest.approx(514 / 1307)


def weighted_perplexity(items: list) -> float:
    return math.exp(-sum(nats for nats, _ in items) / sum(words for _, words in items))


def test_closed_forms_agree_with_resampling():
    rng = np.random.default_rng(0)
    nats, words = -rng.gamma(2.0, 3.0, 400), rng.integers(5, 50, 400)
    pairs = list(zip(nats * words, words, strict=True))
    drawn = [rng.integers(0, 400, 400) for _ in range(2000)]
    plain = [math.exp(-nats[each].mean()) for each in drawn]
    ratios = [-(nats * words)[each].sum() / words[each].sum() for each in drawn]
    assert scores.stderr("perplexity", list(nats), math.exp(-nats.mean())) == pytest.approx(np.std(plain), rel=0.1)
    assert scores.stderr("bits_per_byte", pairs, 0.0) == pytest.approx(np.std(ratios) / math.log(2), rel=0.1)
    whole = weighted_perplexity(pairs)
    assert scores.stderr("weighted_perplexity", pairs, whole) == pytest.approx(np.std(np.exp(ratios)), rel=0.1)


def test_values_errors_and_bits_are_those_of_the_items(data, tmp_path):
    write_lines(data / "piqa_validation.jsonl", PIQA)
    outcome = ask("piqa", folder=tmp_path)
    right = [(len(row["sol1"]) > len(row["sol2"])) == bool(row["label"]) for row in PIQA]  # the shorter one, of equal ones the first
    assert value(outcome, "acc") == sum(right) / 10
    entry = outcome.details["items"]["piqa"]["acc"]
    assert bits_of(entry) == right
    assert outcome.details["stderr"]["piqa"]["acc"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(10))
    assert outcome.metrics[0].floors == {"chance": 0.5}
    assert outcome.details["versions"] == {"piqa": "1.0"}
    with lzma.open(tmp_path / harness.ITEMS, "rt") as file:
        records = [json.loads(line) for line in file]
    assert [record["doc_id"] for record in records] == list(range(10))
    assert [record["acc"] for record in records] == right
    assert records[1]["log_likelihoods"] == [-1.0 - len(PIQA[1]["sol1"]), -1.0 - len(PIQA[1]["sol2"])]
    assert records[1]["target"] == 1
    assert scores.docs_hash([record["doc_hash"] for record in records]) == entry["docs"]


def test_lambada_s_perplexity_has_a_standard_error_and_no_bits(data):
    write_lines(data / "lambada_openai_test.jsonl", LAMBADA)
    outcome = ask("lambada_openai")
    nats = np.array([len(row["text"].split(" ")[-1]) + 1 for row in LAMBADA])
    assert value(outcome, "perplexity") == pytest.approx(math.exp(nats.mean()))
    assert outcome.details["stderr"]["lambada_openai"]["perplexity"] == pytest.approx(
        math.exp(nats.mean()) * nats.std(ddof=1) / math.sqrt(len(nats))
    )
    assert list(outcome.details["items"]["lambada_openai"]) == ["acc"]
    (row,) = [metric for metric in outcome.metrics if metric.name == "perplexity"]
    assert (row.unit, row.higher_is_better) == ("per item", False)


def test_a_limit_takes_the_first_items(data):
    write_lines(data / "piqa_validation.jsonl", PIQA)
    whole, part = ask("piqa"), ask("piqa", limit=3)
    assert part.metrics[0].num_items == 3
    assert bits_of(part.details["items"]["piqa"]["acc"]) == bits_of(whole.details["items"]["piqa"]["acc"])[:3]
    assert part.details["whole"] == {"piqa": 10}
    assert part.data_hash != whole.data_hash


def test_items_are_the_same_however_many_processes_share_them(data, tmp_path):
    write_lines(data / "piqa_validation.jsonl", PIQA)
    alone = ask("piqa", folder=tmp_path)
    mail: dict = {}
    outcomes = []
    for rank in (1, 2, 0):
        lm = Lengths(rank, 3, mail)
        lm.told_items = {"truncated": [{"task": "piqa", "doc": rank, "choice": 0}]}
        outcomes.append(ask("piqa", lm))
    assert [each.metrics for each in outcomes[:2]] == [[], []]
    together = outcomes[2]
    assert together.metrics == alone.metrics
    assert together.details["items"] == alone.details["items"]
    assert together.data_hash == alone.data_hash
    assert together.truncated == 3


def test_truncated_items_are_counted_and_listed(data, tmp_path):
    write_lines(data / "piqa_validation.jsonl", PIQA)
    lm = Lengths()
    lm.told_items = {"truncated": [{"task": "piqa", "doc": 4, "choice": choice, "tokens": 99} for choice in (0, 1)]}
    lm.told_items["truncated"].append({"task": "piqa", "doc": 5, "choice": 0, "tokens": 99})
    lm.told_items |= {"skipped": [{"task": "piqa", "doc": doc, "choice": 1, "tokens": 99} for doc in (4, 7)]}
    outcome = ask("piqa", lm, folder=tmp_path)
    assert (outcome.truncated, outcome.skipped) == (1, 2)
    assert outcome.metrics[0].num_items == len(PIQA) - 2
    assert outcome.details["scoring"]["items"]["truncated"][0] == {"task": "piqa", "doc": 4, "choice": 0, "tokens": 99}
    with lzma.open(tmp_path / harness.ITEMS, "rt") as file:
        noted = {record["doc_id"]: record["noted"] for record in map(json.loads, file) if "noted" in record}
    assert noted == {4: ["skipped", "truncated"], 5: ["truncated"], 7: ["skipped"]}


def test_items_that_are_left_out_are_in_no_denominator(data):
    write_lines(data / "piqa_validation.jsonl", PIQA)

    class Short(Lengths):
        def loglikelihood(self, requests, **_):
            left = [request for request in requests if request.doc_id in (2, 5)]
            self.told_items = {"skipped": [{"task": request.task_name, "doc": request.doc_id} for request in left]}
            found = super().loglikelihood(requests)
            return [(math.nan, False) if request in left else each for request, each in zip(requests, found, strict=True)]

    whole, outcome = ask("piqa"), ask("piqa", Short())
    kept = [right for i, right in enumerate(bits_of(whole.details["items"]["piqa"]["acc"])) if i not in (2, 5)]
    assert (outcome.skipped, outcome.metrics[0].num_items) == (2, 8)
    assert value(outcome, "acc") == sum(kept) / 8
    assert outcome.data_hash != whole.data_hash


def test_answers_that_are_no_numbers_are_divergence(data):
    write_lines(data / "lambada_openai_test.jsonl", LAMBADA)
    for nats, words in ((math.nan, "perplexity is nan"), (-math.inf, "perplexity is inf"), (-1e6, "too large to be a number")):

        class Odd(Lengths):
            nats: float

            def loglikelihood(self, requests, **_):
                return [(self.nats, False) for _ in requests]

        lm = Odd()
        lm.nats = nats
        with pytest.raises(DivergedError, match=words):
            ask("lambada_openai", lm)


def test_the_caller_s_random_state_log_and_screen_stay_as_they_were(data, capsys):
    write_lines(data / "hellaswag_validation.jsonl", HELLASWAG)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    level = logging.getLogger("lm_eval").level
    ask("hellaswag")
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    assert logging.getLogger("lm_eval").level == level
    assert capsys.readouterr() == ("", "")


def test_equal_runs_give_equal_outcomes(data):
    write_lines(data / "arc_easy_test.jsonl", ARC)
    write_lines(data / "arc_easy_train.jsonl", ARC * 3)
    assert ask("arc_easy", fewshot=2) == ask("arc_easy", fewshot=2)
