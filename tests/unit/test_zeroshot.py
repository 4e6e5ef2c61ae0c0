"""The zeroshot suite: its settings, its own tasks against the official schemas and prompts, and cells from the plan to the rows."""

import json
import lzma
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from lm_eval.api.model import LM

from hgrn2_bench import engine
from hgrn2_bench.cells import SCORES, CellFolder
from hgrn2_bench.errors import ConfigError
from hgrn2_bench.markov_recipe import Recipe
from hgrn2_bench.plan import make_plan
from hgrn2_bench.protocol import Metric
from hgrn2_bench.text_tokenizers import FILES, tokenizer_files_of
from suites.zeroshot import facts, runner
from suites.zeroshot.catalogue import tasks_folder
from suites.zeroshot.harness import Outcome, evaluate
from suites.zeroshot.presets import PRESETS, SIX
from suites.zeroshot.protocol import PROTOCOL, name_task
from suites.zeroshot.settings import ZeroshotConfig

RECIPE = Recipe(symbols=32, facts=4, document=64)
FIELDS = {
    "facts_cloze": {"text": str},
    "facts_goal": {"goal": str, "sol1": str, "sol2": str, "label": int},
    "facts_ending": {"ind": int, "activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": str},
    "facts_blank": {"sentence": str, "option1": str, "option2": str, "answer": str},
    "facts_question": {"id": str, "question": str, "choices": dict, "answerKey": str},
}
"""What a row has in the official data sets."""


def cells(*words):
    return make_plan(["suite=zeroshot", *words], "cpu").cells


def run(cell, results):
    folder = CellFolder(results, cell)
    with folder.lock():
        return engine.run_cell(cell, folder, lambda *_: None, lambda: False), folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The folder of the tasks as they are written."""
    folder = tmp_path_factory.mktemp("own")
    facts.write(folder, RECIPE, tasks_folder())
    return folder


@pytest.fixture(scope="module")
def items(own):
    return {name: [json.loads(line) for line in (own / f"{name}.jsonl").read_text().splitlines()] for name in facts.TASKS}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Rows and folder of preset test for each model."""
    results = tmp_path_factory.mktemp("results")
    return {cell.model: run(cell, results) for cell in cells("preset=test")}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("preset=test", "facts=1"), "facts=1 must be at least 2"),
        (("preset=test", "symbols=7"), "symbols=7 with facts=2 leave 4 values; questions need 5"),
        (("preset=test", "symbols=13", "facts=6"), "symbols=13 with facts=6 leave 6 values"),
        (("preset=test", "document=5"), "document=5 with facts=2 must be at least 6"),
        (("preset=test", "fewshot=2"), "fewshot=2: the tasks of lm_task=smoke have no solved items"),
        (("preset=test", "fewshot=-2"), "fewshot=-2 must be at least 0, or -1"),
        (("preset=test", "limit=-1"), "limit=-1 must not be negative"),
        (("preset=test", "block=1"), "block=1 must be at least 2 tokens"),
        (("preset=test", "bos=yes"), "bos"),
        (("preset=test", "scan=both"), "scan"),
        (("preset=test", "lm_task=piqa"), "symbols=16 has no effect on lm_task=piqa: nothing is trained"),
        (("preset=smoke", "task=piqa"), "piqa"),
        (("preset=evaluate", "model=hgrn2", "task=piqua"), "piqa"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(words, said):
    with pytest.raises(ConfigError, match=said) as caught:
        cells(*words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "smoke-32-facts4"),
        ({"symbols": 16, "facts": 2, "limit": 8}, "smoke-16-facts2-first8"),
        ({"lm_task": "piqa"}, "piqa"),
        ({"lm_task": "mmlu_anatomy", "limit": 100}, "mmlu_anatomy-first100"),
    ],
)
def test_a_task_has_the_name_that_lm_eval_gives_it(fields, name):
    assert name_task(ZeroshotConfig(**fields)) == name


def test_the_table_of_the_paper_is_the_usual_list_for_trained_models():
    assert tuple(PRESETS["evaluate"].tasks) == SIX
    assert [cell.task for cell in make_plan(["suite=zeroshot", "preset=evaluate", "model=hgrn2"], "cpu", files=False).cells] == list(SIX)
    assert PROTOCOL.averaged == ("lm_task", SIX)


def test_an_untrained_model_is_not_asked_lm_evals_tasks():
    (cell,) = make_plan(["suite=zeroshot", "preset=evaluate", "model=hgrn2", "task=piqa"], "cpu", files=False).cells
    with pytest.raises(ConfigError, match=r"^task=piqa is for trained models: write model=DIR; preset=smoke trains hgrn2 in place$"):
        engine.build(cell)


@pytest.mark.parametrize("name", FIELDS)
def test_items_have_the_official_schema(name, items):
    assert len(items[name]) == facts.ITEMS
    for item in items[name]:
        assert {field: type(value) for field, value in item.items()} == FIELDS[name]
    assert len({json.dumps(item) for item in items[name]}) == facts.ITEMS


def told(words):
    """The value of each key that a document begins with."""
    return dict(zip(words[: 2 * RECIPE.facts : 2], words[1 : 2 * RECIPE.facts : 2], strict=True))


def test_every_right_answer_is_the_value_that_the_document_gave_its_key(items):
    for item in items["facts_cloze"]:
        *words, key, value = item["text"].split(" ")
        assert told([*words, key])[key] == value
        assert len(words) + 2 <= facts.LONGEST
    for item in items["facts_goal"]:
        words, choices = item["goal"].split(" "), [item["sol1"], item["sol2"]]
        assert told(words)[words[-1]] == choices[item["label"]]
        assert choices[1 - item["label"]] in set(told(words).values()) - {choices[item["label"]]}
    for item in items["facts_ending"]:
        values = told(item["ctx_a"].split(" "))
        key, value = item["endings"][int(item["label"])].split(" ")
        assert values[key] == value
        assert {ending.split(" ")[0] for ending in item["endings"]} == {key}
        assert len(set(item["endings"])) == 4
    for item in items["facts_blank"]:
        before, after = item["sentence"].split("_")
        key, value = after.split(" ")[-2:]
        options = [item["option1"], item["option2"]]
        assert before.split(" ")[-2] == key
        assert options[int(item["answer"]) - 1] == value
        assert options[2 - int(item["answer"])] not in told([*before.split(" ")[:-1], value, *after.split(" ")[1:]]).values()
    for item in items["facts_question"]:
        words, choices = item["question"].split(" "), item["choices"]
        assert choices["text"][choices["label"].index(item["answerKey"])] == told(words)[words[-1]]
        assert len(set(choices["text"])) == len(choices["text"]) == len(choices["label"])


def test_choices_vary_as_officially_and_no_place_is_favoured(items):
    questions = items["facts_question"]
    assert {len(item["choices"]["label"]) for item in questions} == {3, 4, 5}
    assert {tuple(item["choices"]["label"]) for item in questions} >= {("A", "B", "C", "D"), ("1", "2", "3", "4")}
    for places, choices in (
        ([item["label"] for item in items["facts_goal"]], 2),
        ([int(item["label"]) for item in items["facts_ending"]], 4),
        ([int(item["answer"]) - 1 for item in items["facts_blank"]], 2),
    ):
        counts = np.bincount(places, minlength=choices)
        assert np.abs(counts - facts.ITEMS / choices).max() < 4 * (facts.ITEMS / choices) ** 0.5


def test_items_are_the_same_each_time_and_others_for_another_source(own, tmp_path):
    for folder, recipe in ((tmp_path / "again", RECIPE), (tmp_path / "other", Recipe(32, 4, 65))):
        folder.mkdir()
        facts.write(folder, recipe, tasks_folder())
    for name in facts.TASKS:
        text = (own / f"{name}.jsonl").read_bytes()
        assert (tmp_path / "again" / f"{name}.jsonl").read_bytes() == text
        assert (tmp_path / "other" / f"{name}.jsonl").read_bytes() != text


class Reader(LM):
    """A model without weights that reads as lm-eval asks: after a key it expects the value told first, with or without a memory."""

    def __init__(self, remembers):
        super().__init__()
        self.remembers, self.asked = remembers, []

    def told(self):
        return {}

    def loglikelihood(self, requests, **_):
        return [self._score(*request.args) for request in requests]

    def _score(self, context, continuation):
        self.asked.append((context, continuation))
        before = [word.lower().strip(":.,") for word in context.split() if word.lower().strip(":.,")[1:].isdigit()]
        words = [*before, *continuation.split()]
        values = told(words)
        nats = 0.0
        for place in range(len(before), len(words)):
            if self.remembers and words[place - 1] in values and place >= 2 * RECIPE.facts:
                nats += 0.0 if words[place] == values[words[place - 1]] else -9.0
            else:
                nats -= 3.0
        return nats, nats == 0

    def loglikelihood_rolling(self, requests, **_):
        raise NotImplementedError

    def generate_until(self, requests, **_):
        raise NotImplementedError


@pytest.mark.parametrize(("remembers", "least", "most"), [(True, 1.0, 1.0), (False, 0.1, 0.6)])
def test_who_remembers_the_facts_answers_all_and_who_does_not_guesses(remembers, least, most, own):
    found = evaluate(Reader(remembers), ZeroshotConfig(), None, own)
    score, *members = found.metrics
    assert (score.split, score.name, score.num_items) == ("test", "score", 5 * facts.ITEMS)
    assert least <= score.value <= most
    by_name = {(metric.split, metric.name): metric.value for metric in members}
    assert {split for split, _ in by_name} == set(facts.TASKS)
    if remembers:
        assert {by_name[name, "acc"] for name in facts.TASKS} == {1.0}
    else:
        assert by_name["facts_cloze", "acc"] == 0
        assert score.value == pytest.approx(0.33, abs=0.12)


def test_prompts_are_those_of_the_packaged_tasks(own, items):
    model = Reader(True)
    evaluate(model, ZeroshotConfig(limit=1), None, own)
    first = {name: those[0] for name, those in items.items()}
    text, goal, ending, question = (first[f"facts_{name}"] for name in ("cloze", "goal", "ending", "question"))
    before, after = first["facts_blank"]["sentence"].split("_")
    query = f"Recalling facts: {ending['ctx_a']} {ending['ctx_b'].capitalize()}"
    wanted = [
        (" ".join(text["text"].split(" ")[:-1]), f" {text['text'].split(' ')[-1]}"),
        *((f"Question: {goal['goal']}\nAnswer:", f" {goal[name]}") for name in ("sol1", "sol2")),
        *((query.strip(), f" {each}") for each in ending["endings"]),
        *((before + first["facts_blank"][name], f" {after.strip()}") for name in ("option1", "option2")),
        *((f"Question: {question['question']}\nAnswer:", f" {each}") for each in question["choices"]["text"]),
    ]
    assert sorted((context.strip(), continuation) for context, continuation in set(model.asked)) == sorted(wanted)


def test_a_cell_reports_the_score_each_members_metrics_and_how_well_the_source_was_learned(done):
    for model, (rows, folder) in done.items():
        assert {row.status for row in rows} == {"ok"}, rows[0].reason
        first = rows[0]
        assert (first.split, first.metric, first.unit, first.higher_is_better, first.num_items) == ("test", "score", "fraction", True, 40)
        found = {(row.split, row.metric): row for row in rows}
        values = [found[name, "acc"].value for name in facts.TASKS]
        assert first.value == pytest.approx(np.mean(values))
        assert found["facts_cloze", "perplexity"].higher_is_better is False
        assert ("facts_goal", "acc_norm") in found
        learned = found["validation", "perplexity"]
        assert (learned.unit, learned.num_items) == ("per token", runner.SCORED_TOKENS)
        assert 1 < learned.value < 20
        assert (first.truncated, first.skipped, first.task, first.model) == (0, 0, "smoke-16-facts2-first8", model)
        assert set(first.details["items"]) == set(first.details["stderr"]) == set(facts.TASKS)
        assert len(lzma.decompress((folder.path / "items.jsonl.xz").read_bytes()).splitlines()) == 40
        assert not (folder.path / SCORES).exists()
    assert len({rows[0].data_hash for rows, _ in done.values()}) == 1


@pytest.mark.parametrize("model", ["hgrn2", "attention"])
@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_model_that_learned_in_place_answers_alike_from_its_folder(model, tokenizer, done, tmp_path):
    rows, folder = done[model]
    shutil.copytree(folder.weights, tmp_path / "kept")
    for name in () if tokenizer else FILES:
        (tmp_path / "kept" / name).unlink()
    (cell,) = cells("preset=test", f"model={tmp_path / 'kept'}")
    again, _ = run(cell, tmp_path / "results")
    assert {row.status for row in again} == {"ok"}, again[0].reason
    assert (again[0].steps, again[0].weights_hash) == (0, rows[0].weights_hash)
    before = {(row.split, row.metric): row.value for row in rows if row.split != "validation"}
    assert {(row.split, row.metric): row.value for row in again} == pytest.approx(before)
    assert again[0].data_hash == rows[0].data_hash


def test_the_tokenizer_of_a_model_that_is_none_of_ours_decides_what_begins_a_text(done, tmp_path, monkeypatch):
    rows, folder = done["hgrn2"]
    assert rows[0].details["scoring"]["bos"].startswith("always: token 0")
    monkeypatch.setattr(runner.loading, "is_own_folder", lambda ref: False)  # as HGRN2 in the format of fla
    again, _ = run(cells("preset=test", f"model={folder.weights}")[0], tmp_path)
    assert again[0].details["scoring"]["bos"].startswith("auto: token 0")


def test_a_model_of_another_maker_is_asked_as_it_is(tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=256, n_embd=16, n_layer=1, n_head=2, n_positions=512, bos_token_id=10, eos_token_id=10)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "other")
    for name, text in tokenizer_files_of({"tokenizer": "bytes 0"}).items():
        (tmp_path / "other" / name).write_text(text)
    rows, _ = run(cells("preset=test", f"model={tmp_path / 'other'}")[0], tmp_path / "results")
    assert {row.status for row in rows} == {"ok"}, rows[0].reason
    assert (rows[0].backend, rows[0].steps, rows[0].truncated) == ("transformers", 0, 0)
    assert (rows[0].details["scoring"]["bos"], rows[0].details["scoring"]["max_length"]) == ("auto: token 10 as the tokenizer has it", 512)
    assert not any(row.split == "validation" for row in rows)


@pytest.fixture
def fake(monkeypatch):
    """What scoring would be given; nothing is asked."""
    calls = []

    def answer(lm, config, folder, own):
        calls.append((lm, folder, own, sorted(path.name for path in own.iterdir())))
        return Outcome([Metric("test", "score", 0.5, 4)], {"n": len(calls)}, "hash", truncated=3, skipped=2)

    monkeypatch.setattr(runner, "evaluate", answer)
    monkeypatch.setattr(runner, "BenchLM", lambda **given: given)
    return calls


def test_counts_and_details_of_scoring_reach_the_rows(fake, tmp_path):
    rows, folder = run(cells("preset=test", "model=hgrn2", "bos=never", "truncation=skip", "max_length=40", "check=false")[0], tmp_path)
    assert (rows[0].value, rows[0].truncated, rows[0].skipped, rows[0].data_hash) == (0.5, 3, 2, "hash")
    assert rows[0].details == {"n": 1}
    ((given, records, own, names),) = fake
    assert records == folder.path
    assert given["store"].parent == folder.path / SCORES
    asked = {"bos": "never", "truncation": "skip", "max_length": 40, "check": False, "batch_size": 256, "dtype": "float32"}
    assert given.items() >= asked.items()
    assert set(names) >= {"smoke.yaml", "facts_cloze.yaml", "facts_cloze.jsonl"}
    assert not own.exists()


def test_weights_of_one_cell_never_share_scores(fake, tmp_path):
    rows, folder = run(cells("preset=test", "model=hgrn2", "ema=0.9")[0], tmp_path)
    assert {row.split for row in rows} == {"test", "validation", "test_ema", "validation_ema"}
    (first, records, *_), (second, further, *_) = fake
    assert first["store"] != second["store"]
    assert first["store"].name == f"{rows[0].weights_hash[:16]}.jsonl"
    assert (records, further) == (folder.path, None)
    assert rows[0].details == {"n": 1}


def test_a_process_that_does_not_write_keeps_nothing(fake, tmp_path):
    cell = cells("preset=test", "model=hgrn2")[0]
    folder = CellFolder(tmp_path, cell, writes=False)
    with folder.lock():
        engine.run_cell(cell, folder, lambda *_: None, lambda: False)
    ((given, records, *_),) = fake
    assert given["store"] is None
    assert records is None


def test_scores_of_items_outlive_a_kill_and_nothing_else(tmp_path):
    cell = cells("preset=test", "model=hgrn2")[0]
    folder = CellFolder(tmp_path, cell)
    with folder.lock():
        for forget in (folder.start_over, lambda: folder.finish(engine.make_rows(cell, [], "ok", "", engine.Facts()))):
            (folder.path / SCORES).mkdir()
            folder.begin()
            folder.set_status("interrupted")
            assert (folder.path / SCORES).exists()
            forget()
            assert not (folder.path / SCORES).exists()
        (folder.path / SCORES).mkdir()
        folder.finish(engine.make_rows(cell, [], "failed", "why", engine.Facts()))
        assert (folder.path / SCORES).exists()


def test_selection_goes_by_the_mean_nats_of_whole_blocks():
    (cell,) = cells("preset=test", "model=hgrn2", "eval_batch_size=3")
    task, model = runner.Runner(cell), engine.build(cell).eval()
    ids = torch.from_numpy(task.corpus.splits["validation"].ids_N.astype(np.int64))
    inputs = torch.cat([torch.zeros(1, dtype=torch.long), ids[:-1]]).reshape(-1, 64)
    nats, _ = model.losses(inputs, ids.reshape(-1, 64))
    assert task.score(model, "validation") == pytest.approx(-float(nats.mean()), rel=1e-5)


def test_the_command_line_runs_it_and_finds_it_again(tmp_path):
    command = [sys.executable, "-m", "hgrn2_bench", "run", "suite=zeroshot", "preset=test", "model=hgrn2", "--results", str(tmp_path)]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert "Traceback" not in first.stderr
    assert "smoke-16-facts2-first8" in first.stdout
    (row,) = {line for path in tmp_path.glob("cells/*/*/rows.jsonl") for line in path.read_text().splitlines()[:1]}
    assert json.loads(row)["status"] == "ok"
    assert str(tmp_path) not in json.dumps(json.loads(row)["settings"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model=nowhere", "task=piqa"], "Unknown model 'nowhere'"),
        (["model=hgrn2", "task=piqa"], "Available: smoke. Any other is for trained models: preset=evaluate model=DIR."),
        (["preset=evaluate", "model=hgrn2", "task=smoke"], "task=smoke asks models that are trained in place: write preset=smoke"),
    ],
)
def test_models_and_tasks_that_do_not_fit_name_what_is_wrong(words, told):
    with pytest.raises(ConfigError) as caught:
        make_plan(["suite=zeroshot", *words], "cpu")
    assert told in str(caught.value)
