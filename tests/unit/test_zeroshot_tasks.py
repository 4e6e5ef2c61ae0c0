"""Suite zeroshot: its tasks, the files that they are read from, and the check of a folder."""

import json
import subprocess
import sys
import time

import pytest
import zeroshot_files as made
from zeroshot_files import ARC, BOOLQ, ENDINGS, HELLASWAG, HUB, OPENBOOKQA, PIQA, ROWS, SCIQ, WINOGRANDE, ask, write_lines, write_parquet

from hgrn2_bench import datacheck
from hgrn2_bench.doctor import NOTE, OK, PROBLEM
from hgrn2_bench.errors import ConfigError, DataError
from hgrn2_bench.files import DATA, Copy
from suites.zeroshot import catalogue, places, presets, schemas
from suites.zeroshot.check import findings


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    return made.prepare(tmp_path, monkeypatch)


# the catalogue


def test_the_six_tasks_of_the_table_have_their_rules():
    assert presets.SIX == ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
    assert [name for name in presets.SIX if catalogue.TASKS[name].rule == "acc_norm"] == ["hellaswag", "arc_challenge", "openbookqa"]


@pytest.mark.parametrize("name", ["piqa", "ruler", "mmlu", "mmlu_anatomy", "ai2_arc", "gsm8k"])
def test_names_of_tasks_groups_and_tags_become_words(name):
    assert catalogue.words_of(name) == (f"lm_task={name}",)


@pytest.mark.parametrize(("name", "near"), [("piqqa", "piqa"), ("mmlu_anatomi", "mmlu_anatomy"), ("heLaswag", "hellaswag")])
def test_unknown_names_get_the_nearest(name, near):
    with pytest.raises(ConfigError, match=f"Unknown zero-shot task '{name}'. Did you mean '{near}'"):
        catalogue.words_of(name)


def test_a_name_near_nothing_gets_the_short_list_not_all_of_lm_eval():
    with pytest.raises(ConfigError, match="Available: arc_challenge, ") as caught:
        catalogue.words_of("qqqqzzzz")
    assert len(str(caught.value)) < 1000


def test_looking_up_a_name_parses_no_file():
    catalogue.packaged.cache_clear()
    catalogue._head.cache_clear()
    began = time.process_time()
    catalogue.words_of("mmlu_anatomy")
    assert time.process_time() - began < 3  # 0.3 s on an idle core; lm-eval's own index takes 10


def test_planning_imports_neither_torch_nor_lm_eval(data):
    write_lines(data / "piqa_validation.jsonl", PIQA)
    code = """
import sys
from suites.zeroshot import catalogue, check, places
assert catalogue.words_of("mmlu_anatomy") and places.fingerprint_of("piqa") and catalogue.members("mmlu")
print(sorted({"torch", "lm_eval", "numpy", "datasets", "transformers", "pyarrow"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_lm_eval_known_names_pass_and_others_get_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(catalogue, "find_spec", lambda _: None)
    catalogue.packaged.cache_clear()
    assert catalogue.words_of("piqa") == ("lm_task=piqa",)
    with pytest.raises(ConfigError, match=r'not installed: pip install "hgrn2_bench\[zeroshot\]"'):
        catalogue.words_of("mmlu")
    monkeypatch.undo()
    catalogue.packaged.cache_clear()


def test_members_of_groups_tags_and_groups_of_groups():
    assert len(catalogue.members("mmlu")) == 57
    assert catalogue.members("ai2_arc") == ("arc_challenge", "arc_easy")  # a tag, which one of them inherits
    assert catalogue.members("ruler") == catalogue.RULER
    assert set(catalogue.RULER) == set(catalogue._listed(catalogue.config_of("ruler")["task"]))
    assert catalogue.members("flan_held_in") == ()  # says itself what a member is


def test_every_known_task_is_packaged_with_the_split_and_fields_that_are_written_here():
    for name, known in catalogue.TASKS.items():
        config = catalogue.config_of(name)
        assert "class" in config or known.split == (config.get("test_split") or config["validation_split"]), name


# files


@pytest.mark.parametrize("task", HUB)
def test_layouts_of_the_hub_are_found_and_read(data, task):
    write_parquet(data / HUB[task], ROWS[task])
    found = places.copies(data, task)[task]
    assert schemas.read(task, found, catalogue.TASKS[task].split) == ROWS[task]
    others = [name for name in HUB if name != task and places.copies(data, name)]
    assert others == []


@pytest.mark.parametrize(
    "name",
    [
        "piqa_validation.jsonl",
        "piqa-valid.jsonl.gz",
        "PIQA/dev.jsonl",
        "PIQA_VALIDATION.JSONL.GZ",
        "a/b/piqa/piqa_val.jsonl",
        "piqa.validation.json",
        "piqa/data/val-00000-of-00001.jsonl",
    ],
)
def test_names_as_users_have_them(data, name):
    write_lines(data / name, PIQA)
    found = places.copies(data, "piqa")["piqa"]
    assert schemas.read("piqa", found, "validation") == PIQA


def test_a_json_list_is_read(data):
    (data / "piqa_validation.json").write_text(json.dumps(PIQA))
    assert schemas.read("piqa", places.copies(data, "piqa")["piqa"], "validation") == PIQA


def test_numbered_parts_are_one_split_in_order(data):
    for number in range(2):
        write_parquet(data / f"piqa/validation-0000{number}-of-00002.parquet", PIQA[5 * number : 5 * number + 5])
    assert schemas.read("piqa", places.copies(data, "piqa")["piqa"], "validation") == PIQA


def test_answers_in_a_file_of_their_own_are_joined_by_line(data):
    bare = [{key: row[key] for key in ("goal", "sol1", "sol2")} for row in PIQA]
    write_lines(data / "physicaliqa-train-dev/dev.jsonl", bare)
    answers = data / "physicaliqa-train-dev/dev-labels.lst"
    answers.write_text("".join(f"{row['label']}\n" for row in PIQA))
    first = places.fingerprint_of("piqa")
    assert schemas.read("piqa", places.copies(data, "piqa")["piqa"], "validation") == PIQA
    answers.write_text("0\n" * 10)
    places._fingerprint.cache_clear()
    assert places.fingerprint_of("piqa") != first
    for text, fault in (
        ("0\n" * 9, "fewer answers than"),
        ("0\n" * 11, "more answers than rows"),
        ("0\nyes\n", "labels.lst:2: expected the number"),
    ):
        answers.write_text(text)
        with pytest.raises(DataError, match=fault):
            schemas.read("piqa", places.copies(data, "piqa")["piqa"], "validation")


@pytest.mark.parametrize(
    "second",
    ["piqa_validation.parquet", "piqa_val.jsonl", "more/piqa_validation.jsonl", "piqa/plain_text/validation-00000-of-00001.parquet"],
)
def test_two_copies_are_one_clear_line(data, second):
    write_lines(data / "piqa_validation.jsonl", PIQA)
    (write_parquet if second.endswith("parquet") else write_lines)(data / second, PIQA)
    with pytest.raises(ConfigError, match=r"holds 2 copies of piqa: .*; give the folder of one"):
        places.fingerprint_of("piqa")


def test_a_copy_with_other_splits_only_is_none(data):
    write_lines(data / "piqa_train.jsonl", PIQA)
    assert places.copies(data, "piqa") == {}


def test_fingerprints_follow_content_not_place(data, tmp_path, monkeypatch):
    assert places.fingerprint_of("piqa") == ""
    places._fingerprint.cache_clear()
    write_lines(data / "piqa_validation.jsonl", PIQA)
    first = places.fingerprint_of("piqa")
    other = tmp_path / "elsewhere"
    write_lines(other / "deep/PIQA/dev.jsonl", PIQA)
    monkeypatch.setenv(DATA, str(other))
    assert places.fingerprint_of("piqa") == first
    changed = [*PIQA[:5], {**PIQA[5], "label": 1 - PIQA[5]["label"]}, *PIQA[6:]]  # same size, same ends
    write_lines(other / "deep/PIQA/dev.jsonl", changed)
    places._fingerprint.cache_clear()
    assert places.fingerprint_of("piqa") != first
    assert places.fingerprint_of("hellaswag") == ""


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("piqa", {"goal": "a", "sol1": "b", "sol2": "c"}, "no field 'label'; piqa needs goal, sol1, sol2, label, here: goal, sol1, sol2"),
        ("piqa", {**PIQA[0], "label": "0"}, 'label is "0", expected a number from 0 to 1'),
        ("piqa", {**PIQA[0], "label": -1}, "label is -1, expected a number from 0 to 1"),
        ("piqa", {**PIQA[0], "label": True}, "label is true"),
        ("hellaswag", {**HELLASWAG[0], "label": 3}, 'label is 3, expected one of "0", "1", "2", "3", as text'),
        ("hellaswag", {**HELLASWAG[0], "endings": ENDINGS[:3]}, "expected a list of 4 texts"),
        ("winogrande", {**WINOGRANDE[0], "sentence": "no blank"}, "expected a text with the blank `_`"),
        ("winogrande", {**WINOGRANDE[0], "answer": ""}, 'answer is "", expected one of "1", "2"'),
        ("arc_easy", {**ARC[0], "choices": [{"text": "a", "label": "A"}]}, "expected {text: [...], label: [...]}"),
        ("arc_challenge", {**ARC[0], "answerKey": "E"}, 'answerKey is "E", expected one of the labels A, B, C, D'),
        ("openbookqa", {**OPENBOOKQA[0], "answerKey": "C "}, "answerKey"),
        ("lambada_openai", {"text": "word"}, "expected a text of at least two words"),
        ("boolq", {**BOOLQ[0], "label": False}, "label is false, expected a number"),
        ("wikitext", {"text": "a"}, "no field 'page'"),
        ("fda", {"text": "a", "value": " "}, "value is"),
    ],
)
def test_a_wrong_row_is_named_with_file_and_line(data, task, row, words):
    split = catalogue.TASKS[task].split
    path = write_lines(data / f"{task}_{split}.jsonl", [*ROWS[task][:2], row])
    with pytest.raises(DataError) as caught:
        schemas.read(task, places.copies(data, task)[task], split)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "piqa_validation.jsonl: no rows: copy it again"),
        (b'{"goal": "a", "sol1"', "piqa_validation.jsonl:1: expected one JSON object"),
        (b"[1]\n", "piqa_validation.jsonl:1: expected one JSON object"),
        (b"\xff\n", "piqa_validation.jsonl:1: expected one JSON object"),
    ],
)
def test_damaged_files_are_named(data, content, words):
    (data / "piqa_validation.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=words):
        ask("piqa")


def test_damaged_parquet_gzip_and_lists_are_named(data):
    path = write_parquet(data / "piqa_validation.parquet", PIQA)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="no parquet file, or cut short"):
        schemas.read("piqa", places.copies(data, "piqa")["piqa"], "validation")
    path.unlink()
    path = write_lines(data / "piqa_validation.jsonl.gz", PIQA)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cut short or damaged"):
        schemas.read("piqa", places.copies(data, "piqa")["piqa"], "validation")
    path.unlink()
    (data / "piqa_validation.json").write_text(json.dumps(PIQA)[:-9])
    with pytest.raises(DataError, match="no JSON, or cut short"):
        schemas.read("piqa", places.copies(data, "piqa")["piqa"], "validation")


def test_counted_sizes_are_asserted_and_those_of_the_literature_doubted(data):
    write_lines(data / "piqa_validation.jsonl", PIQA[:-1])
    with pytest.raises(DataError, match="9 items, expected 10: a part of the data, cut short"):
        ask("piqa")
    write_lines(data / "sciq_test.jsonl", SCIQ[:2])
    assert ask("sciq").details["doubts"] == ["sciq from local files, json lines: 2 items, the literature has 3"]


# the check of a folder


def test_check_says_what_is_there_what_is_wrong_and_what_is_wanted(data, capsys):
    write_lines(data / "piqa_validation.jsonl", PIQA)
    write_parquet(data / HUB["arc_easy"], ARC)
    write_lines(data / "arc_challenge_train.jsonl", ARC)
    write_lines(data / "sciq_test.jsonl", SCIQ[:2])
    write_lines(data / "boolq_validation.jsonl", [{"passage": "a"}])
    write_lines(data / "winogrande_validation.jsonl", WINOGRANDE)
    write_lines(data / "winogrande_dev.jsonl", WINOGRANDE)
    write_lines(data / "mmlu_anatomy_test.jsonl", [{"question": "a"}])
    lines = {mark: [str(each) for each in findings(data) if each.mark == mark] for mark in (OK, NOTE, PROBLEM)}
    for mark, words in (
        (OK, "piqa validation: 10 items, as expected"),
        (OK, "arc_easy test: 6 items, as expected"),
        (OK, "mmlu_anatomy: test ("),
        (NOTE, "arc_challenge: " + str(data)),
        (NOTE, "has only train: wanted arc_challenge_test.jsonl"),
        (NOTE, "sciq test: sciq from"),
        (NOTE, "hellaswag: not here: wanted hellaswag_validation.jsonl"),
        (PROBLEM, "boolq_validation.jsonl:1: no field 'question'"),
        (PROBLEM, "holds 2 copies of winogrande"),
    ):
        assert any(words in line for line in lines[mark]), words
    assert len(lines[PROBLEM]) == 2
    assert not datacheck.check_data("zeroshot", "check", data)
    assert "2 PROBLEMs" in capsys.readouterr().out


def test_check_of_a_folder_of_other_things_is_bad_input(data):
    (data / "photos").mkdir()
    with pytest.raises(ConfigError, match=r"no task's files in .*: expected files such as piqa_validation.jsonl"):
        list(findings(data))


def test_split_files_name_what_is_missing(tmp_path):
    copy = Copy("piqa", "json lines", tmp_path, {"train": (tmp_path / "a",)})
    with pytest.raises(DataError, match="no validation split of piqa; here: train"):
        copy.of("validation")
