"""`data wikitext check`: what it finds in made-up folders with every defect."""

import lra_folders
import pytest
import wikitext_folders as made

from hgrn2_bench.datacheck import check_data
from hgrn2_bench.doctor import NOTE, OK, PROBLEM
from hgrn2_bench.errors import ConfigError
from suites.wikitext import counts, readers, tokenizers
from suites.wikitext.check import findings
from suites.wikitext.counts import Whole

IDS = {split: [[7] * len(line.split()) + [2] for line in those] for split, those in made.LINES.items()}
GOOD = dict(made.LINES)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The counts of whole files, made small."""
    whole = {name: Whole(len(lines), sum(len(line.split()) + 1 for line in lines)) for name, lines in made.LINES.items()}
    monkeypatch.setattr(counts, "SPLITS", whole)
    monkeypatch.setattr(counts, "MAX_UNKNOWN", 0.15)
    monkeypatch.setattr(readers, "REVIEWS", {"train": 4, "test": 4})
    monkeypatch.setattr(readers, "HELD_OUT", 1)


def marked(folder, mark, what=""):
    return [str(each) for each in findings(folder) if each.mark == mark and each.text.startswith(what)]


def the_problem(folder):
    (line,) = marked(folder, PROBLEM)
    return line


def test_a_whole_folder_has_no_problem(tmp_path, monkeypatch, capsys):
    vocabulary, merges = made.small_bpe()
    monkeypatch.setattr(tokenizers, "GPT2_ENTRIES", len(vocabulary))
    monkeypatch.setattr(tokenizers, "GPT2_MERGES", len(merges))
    monkeypatch.setattr(tokenizers, "GPT2_PROBE", ("the", (vocabulary["the"],)))
    made.write_lines(tmp_path / "wikitext-103")
    made.write_lines(tmp_path / "wikitext-103-raw", "raw")
    made.write_fairseq(tmp_path / "data-bin", IDS, "abcd")
    made.write_json(tmp_path / "mine")
    made.write_bpe(tmp_path, "vocab")
    lra_folders.write_imdb_lines(tmp_path / "imdb", {split: [("a", 0), ("b", 0), ("c", 1), ("d", 1)] for split in ("train", "test")})
    assert marked(tmp_path, PROBLEM) == []
    found = marked(tmp_path, OK)
    for words in (
        "(tokens), with <unk>",
        "(raw), raw: what",
        "(bin)",
        "dictionary of 8 ids, words",
        "text: found",
        "imdb: found",
        "gpt2: ",
    ):
        assert any(words in line for line in found), words
    assert sum("wikitext103 test: 4 lines, 10 words with their ends of line, 0 <unk>, as expected" in line for line in found) == 3
    assert check_data("wikitext", "check", tmp_path)
    assert "data wikitext: no problem" in capsys.readouterr().out


def test_transfer_files_alone_are_found_and_counted(tmp_path):
    two = {split: made.LINES[split] for split in ("validation", "test")}
    made.write_lines(tmp_path, lines=two, name="wikitext2_{}.{}")
    assert any("transfer test: 4 lines, 10 words" in line for line in marked(tmp_path, OK))
    assert any("wikitext103: not here: expected wiki." in line for line in marked(tmp_path, NOTE))
    assert any("gpt2: no BPE files here: copy GPT-2's" in line for line in marked(tmp_path, NOTE))


def test_a_folder_of_other_things_is_bad_input(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ConfigError, match="no text in"):
        list(findings(tmp_path))


@pytest.mark.parametrize(
    ("split", "lines", "words"),
    [
        ("test", GOOD["test"][:-1], "cut short or another text, copy it again"),
        ("test", [line.replace("\n", "\r\n") for line in GOOD["test"]], "ends with CR LF"),
        ("test", [" = W\0ale = \n", *GOOD["test"][1:]], "1 line with zero bytes"),
        ("test", [], "empty: copy it again"),
        (
            "validation",
            [line.replace("crab", "<unk>") for line in GOOD["validation"]],
            "this is WikiText-2, not WikiText-103: give wikitext-103",
        ),
    ],
)
def test_each_defect_is_named_with_the_file(tmp_path, split, lines, words):
    made.write_lines(tmp_path, lines={**GOOD, split: lines})
    assert words in the_problem(tmp_path)
    assert f"wiki.{made.WORD[split]}.tokens" in the_problem(tmp_path)


def test_the_training_split_of_wikitext_2_is_named(tmp_path, monkeypatch):
    made.write_lines(tmp_path)
    monkeypatch.setattr(counts, "TRAIN_2", counts.SPLITS["train"])
    assert "this is WikiText-2 (5 lines)" in the_problem(tmp_path)


def test_a_difference_from_the_literature_is_a_note(tmp_path, monkeypatch):
    made.write_lines(tmp_path)
    whole = counts.SPLITS["train"]
    monkeypatch.setitem(counts.SPLITS, "train", Whole(whole.lines, whole.words + 1))
    assert "the literature has" in marked(tmp_path, NOTE, "wikitext103 train")[0]
    assert marked(tmp_path, PROBLEM) == []


def test_a_missing_split_bad_utf_8_and_wrong_dictionaries_are_problems(tmp_path):
    made.write_lines(tmp_path / "a")
    (tmp_path / "a" / "wiki.train.tokens").unlink()
    assert "has no train split" in the_problem(tmp_path)
    (tmp_path / "a" / "wiki.valid.tokens").write_bytes(b"good\n\xff\n")
    assert any("wiki.valid.tokens:2: not UTF-8" in line for line in marked(tmp_path, PROBLEM))
    made.write_fairseq(tmp_path / "b", IDS, "abcd")
    (tmp_path / "b" / "dict.txt").write_text("a 1\n")
    assert sum("dict.txt has 5: give the dict.txt" in line for line in marked(tmp_path, PROBLEM)) == 3
    (tmp_path / "b" / "dict.txt").unlink()
    assert any("dict.txt is missing" in line for line in marked(tmp_path, PROBLEM))


def test_a_folder_named_wikitext_2_and_lacking_splits_of_a_text_are_notes(tmp_path):
    made.write_lines(tmp_path / "wikitext-2")
    made.write_json(tmp_path / "mine", {"train": ["a\n"], "test": ["b\n"]})
    assert "is named as WikiText-2: give wikitext-103" in marked(tmp_path, NOTE, "wikitext103")[0]
    assert "has no validation split: dataset=text needs train" in marked(tmp_path, NOTE, "text")[0]


def test_reviews_that_are_not_whole_are_a_problem(tmp_path):
    lra_folders.write_imdb_lines(tmp_path, {split: [("a", 0), ("b", 1)] for split in ("train", "test")})
    assert any("imdb train: " in line and "2 reviews, expected 4" in line for line in marked(tmp_path, PROBLEM))


def test_parquet_files_of_other_texts_are_the_user_s_own(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for split in ("train", "valid", "test"):
        parquet.write_table(pa.table({"text": [f"own words {i}" for i in range(9)]}), tmp_path / f"{split}.parquet")
    assert marked(tmp_path, PROBLEM) == []
    assert len(marked(tmp_path, OK, "text")) == 4
    assert len(marked(tmp_path, NOTE, "wikitext103: no split of it")) == 1
    (tmp_path / "test.parquet").write_bytes((tmp_path / "test.parquet").read_bytes()[:99])
    assert "cut short" in the_problem(tmp_path)
