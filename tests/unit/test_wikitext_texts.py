"""The wikitext suite's texts: every layout gives the same ids where it must, counts, words and bytes, and bad files in one line."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import lra_folders
import numpy as np
import pytest
import wikitext_folders as made

from hgrn2_bench.errors import ConfigError, DataError
from suites.wikitext import arrays, counts, readers, texts, tokenizers
from suites.wikitext.counts import Counted, Whole
from suites.wikitext.places import Place, locate_bpe
from suites.wikitext.settings import WikitextConfig

ROOT = Path(__file__).parents[2]
SHARED = Path(__file__).parents[3] / "shared" / "data"
RAW = {split: [line.replace("<unk>", "blue") for line in lines] for split, lines in made.LINES.items()}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """The counts of whole files and of GPT-2's BPE, made small; a data folder and a cache of this test."""
    whole = {name: Whole(len(lines), sum(len(line.split()) + 1 for line in lines)) for name, lines in made.LINES.items()}
    monkeypatch.setattr(counts, "SPLITS", whole)
    monkeypatch.setattr(counts, "MAX_UNKNOWN", 0.2)
    monkeypatch.setattr(counts, "TYPES", 16)
    vocabulary, merges = made.small_bpe()
    monkeypatch.setattr(tokenizers, "GPT2_ENTRIES", len(vocabulary))
    monkeypatch.setattr(tokenizers, "GPT2_MERGES", len(merges))
    monkeypatch.setattr(tokenizers, "GPT2_PROBE", ("the the", (vocabulary["the"], vocabulary["Ġthe"])))
    monkeypatch.setenv("HGRN2_BENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HGRN2_BENCH_CACHE", str(tmp_path / "cache"))
    texts.load.cache_clear()
    texts._fingerprint.cache_clear()


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def load(**words):
    texts.load.cache_clear()
    return texts.load(WikitextConfig(**words))


def ids(corpus):
    return {name: split.ids_N.tolist() for name, split in corpus.splits.items()}


def test_words_are_numbered_as_fairseq_numbers_them(data):
    made.write_lines(data / "wikitext-103" / "wikitext-103")
    corpus = load(tokenizer="word")
    order = [",", "=", "lobster", "the", ".", "12", "@-@", "Lobster", "The", "a", "crab", "eats", "pound", "Ünï"]
    order = sorted(order, key=lambda word: (-"".join(made.LINES["train"]).split().count(word), word))
    number = {word: i for i, word in enumerate(order, 4)} | {"<unk>": 3}
    for split, lines in made.LINES.items():
        expected = [i for line in lines for i in [*(number.get(word, 3) for word in line.split()), 2]]
        assert corpus.splits[split].ids_N.tolist() == expected
        assert corpus.splits[split].words == len(expected)
        assert corpus.splits[split].bytes == len("".join(lines).encode())
    assert corpus.vocab_size == 24  # 4 specials, 14 words, made-up ones to a multiple of 8
    assert corpus.start_id == 2
    assert isinstance(corpus.splits["train"].ids_N, np.memmap)


@pytest.mark.parametrize("tokenizer", ["word", "gpt2", "bytes"])
def test_every_layout_of_wikitext_gives_the_same_corpus(data, tokenizer):
    made.write_bpe(data, "vocab")
    lines = made.LINES if tokenizer == "word" else RAW
    made.write_lines(data / "a", "tokens" if tokenizer == "word" else "raw", lines)
    first = load(tokenizer=tokenizer)
    for path in (data / "a").iterdir():
        path.unlink()
    made.write_parquet(data / "hub" / "some", lines)
    second = load(tokenizer=tokenizer)
    assert ids(first) == ids(second)
    assert first.hash == second.hash
    assert [(s.words, s.bytes) for s in first.splits.values()] == [(s.words, s.bytes) for s in second.splits.values()]


def test_fairseq_ids_are_taken_as_they_are(data):
    made.write_lines(data / "text")
    corpus = load(tokenizer="word")
    dictionary = [f"w{i}" for i in range(corpus.vocab_size - 4)]
    for path in (data / "text").iterdir():
        path.unlink()
    lines = {}
    for split, those in made.LINES.items():
        ends = np.cumsum([len(line.split()) + 1 for line in those])[:-1]
        lines[split] = np.split(np.array(corpus.splits[split].ids_N), ends)
    for dtype in ("<u2", "<i4"):
        made.write_fairseq(data / "data-bin", lines, dictionary, dtype)
        again = load(tokenizer="word")
        assert ids(again) == ids(corpus)
        assert [s.words for s in again.splits.values()] == [len(s.ids_N) for s in again.splits.values()]
        assert again.splits["test"].bytes is None
        assert again.vocab_size == corpus.vocab_size
    made.write_fairseq(data / "data-bin", lines, [str(i) for i in range(corpus.vocab_size - 4)])
    bpe = load(tokenizer="gpt2")
    assert bpe.splits["test"].words == counts.SPLITS["test"].words  # by its number of lines
    with pytest.raises(ConfigError, match="which tokenizer=word cannot read"):
        load(tokenizer="word")
    with pytest.raises(ConfigError, match=r"transfer=true: .*ids without their tokenizer"):
        load(tokenizer="gpt2", transfer=True)


def test_bytes_are_the_text(data):
    made.write_lines(data, "raw", RAW)
    corpus = load(tokenizer="bytes")
    assert (corpus.vocab_size, corpus.start_id) == (256, 10)
    for split, lines in RAW.items():
        assert bytes(corpus.splits[split].ids_N) == "".join(lines).encode()


@pytest.mark.parametrize("kind", ["tokenizer", "vocab", "encoder"])
def test_bpe_reads_stripped_lines_from_any_names(data, kind):
    made.write_bpe(data / "gpt2", kind)
    lines = {**RAW, "test": [" the the \n", " \n", "th\n", " \n"]}
    counts.SPLITS["test"] = Whole(4, 7)
    made.write_lines(data, "raw", lines)
    corpus = load(tokenizer="gpt2")
    number = {entry: i + 4 for entry, i in made.small_bpe()[0].items()}
    assert corpus.splits["test"].ids_N.tolist() == [number["the"], number["Ġthe"], 2, 2, number["th"], 2, 2]
    assert corpus.splits["test"].words == 7
    assert corpus.vocab_size == tokenizers.padded(259) == 264
    assert tokenizers.padded(50_257) == 50_264
    assert corpus.card["tokenizer"] == f"gpt2 {tokenizers.bpe_hash(*made.small_bpe())}, 264 ids"


def test_a_tokenizer_prefers_the_published_text_and_says_which_it_read(data):
    made.write_lines(data / "wikitext-103")
    assert load(tokenizer="bytes").card["text"] == "WikiText-103 with <unk>"
    assert texts.fingerprint_of(WikitextConfig(tokenizer="bytes")).startswith("tokens:")
    made.write_lines(data / "wikitext-103-raw", "raw", RAW)
    texts._fingerprint.cache_clear()
    assert load(tokenizer="bytes").card["text"] == "WikiText-103 raw"
    assert load(tokenizer="word").card["text"] == "WikiText-103 with <unk>"
    assert texts.fingerprint_of(WikitextConfig(tokenizer="bytes")).startswith("raw:")


def test_fingerprints_are_of_what_is_read_wherever_it_lies(data, monkeypatch, tmp_path):
    made.write_lines(data)
    first = texts.fingerprint_of(WikitextConfig(tokenizer="word"))
    made.write_lines(tmp_path / "elsewhere" / "deep")
    monkeypatch.setenv("HGRN2_BENCH_DATA", str(tmp_path / "elsewhere"))
    assert texts.fingerprint_of(WikitextConfig(tokenizer="word")) == first
    made.write_bpe(tmp_path / "elsewhere", "vocab")
    assert texts.fingerprint_of(WikitextConfig(tokenizer="gpt2")) != texts.fingerprint_of(WikitextConfig(tokenizer="bytes"))
    assert texts.fingerprint_of(WikitextConfig(dataset="markov")) == ""


@pytest.mark.parametrize("layout", ["lines", "gz", "json", "json.gz", "whole json", "parquet"])
def test_any_text_in_any_layout(data, layout):
    lines = {**made.LINES, "validation": ["one two\n", "\n", "three\n"]}
    if layout in ("lines", "gz"):
        made.write_lines(data, "txt", lines, name="my_{}.{}", ending=".gz" if layout == "gz" else "")
    elif layout == "parquet":
        made.write_parquet(data, {split: [line[:-1] if line != " \n" else line for line in those] for split, those in lines.items()})
    else:
        made.write_json(data, lines, "{}.jsonl.gz" if "gz" in layout else "{}.jsonl", whole=layout.startswith("whole"))
    corpus = load(dataset="text", tokenizer="bytes")
    assert bytes(corpus.splits["validation"].ids_N) == b"one two\n\nthree\n"
    assert (corpus.splits["validation"].words, corpus.splits["validation"].bytes) == (6, 15)
    assert load(dataset="text", tokenizer="word").splits["validation"].ids_N.tolist() == [3, 3, 2, 2, 3, 2]


def test_reviews_are_shuffled_held_out_and_ended(data, monkeypatch):
    monkeypatch.setattr(readers, "REVIEWS", {"train": 40, "test": 4})
    monkeypatch.setattr(readers, "HELD_OUT", 10)
    rows = {"train": [(f"r{i} é", int(i >= 20)) for i in range(40)] + [("unlabelled", -1)], "test": [(f"t{i}", i % 2) for i in range(4)]}
    lra_folders.write_imdb_lines(data, rows)
    corpus = load(dataset="imdb", tokenizer="bytes")
    text = {name: bytes(split.ids_N).decode() for name, split in corpus.splits.items()}
    assert text["test"] == "t0\nt1\nt2\nt3\n"
    train, validation = text["train"].splitlines(), text["validation"].splitlines()
    assert (len(train), len(validation)) == (30, 10)
    assert sorted(train + validation) == sorted(text for text, label in rows["train"] if label >= 0)
    assert 2 <= sum(int(line.split()[0][1:]) >= 20 for line in validation) <= 8  # not of one class
    assert corpus.splits["test"].words == 8  # a word and an end of line each
    assert "shuffled with seed 0" in corpus.card["validation"]
    assert corpus.card["end of line"] == "the newline byte of the text (10)"
    lra_folders.write_imdb_lines(data, {**rows, "test": [("\ud800", 0)] * 4})
    with pytest.raises(DataError, match="test: half of a surrogate pair, which is no character, in review 0"):
        load(dataset="imdb", tokenizer="bytes")


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_transfer_reads_wikitext_with_the_same_tokenizer(data, tokenizer):
    made.write_bpe(data, "vocab")
    made.write_json(data / "mine", RAW)
    made.write_lines(data / "wiki", lines={split: made.LINES[split] for split in ("validation", "test")}, name="wikitext2_{}.{}")
    corpus = load(dataset="text", tokenizer=tokenizer, transfer=True)
    assert set(corpus.splits) == {"train", "validation", "test", "transfer_validation", "transfer_test"}
    assert corpus.splits["transfer_test"].words == counts.SPLITS["test"].words
    assert corpus.card["transfer"] == "wikitext2_valid.tokens, wikitext2_test.tokens"
    if tokenizer == "bytes":
        assert bytes(corpus.splits["transfer_test"].ids_N) == "".join(made.LINES["test"]).encode()
    assert corpus.hash != load(dataset="text", tokenizer=tokenizer).hash


def test_transfer_of_words_is_refused():
    with pytest.raises(ConfigError, match="transfer=true: tokenizer=word has the words of its own training text only"):
        WikitextConfig(dataset="text", tokenizer="word", transfer=True)


def test_a_part_of_a_split_has_its_own_words_and_bytes(data):
    made.write_lines(data)
    whole = load(tokenizer="word").splits["test"]
    part = load(tokenizer="word", eval_tokens=7, train_tokens=2)
    # " = Whale = \n" is 4 tokens and 11 bytes, " the whale \n" 3 and 12
    assert part.splits["test"].ids_N.tolist() == whole.ids_N[:7].tolist()
    assert (part.splits["test"].words, part.splits["test"].bytes) == (7, 23 + 1)
    assert len(part.splits["train"].ids_N) == 2
    in_line = load(tokenizer="word", eval_tokens=5).splits["test"]
    assert (in_line.words, in_line.bytes) == (5, 12 + 4)
    longer = load(tokenizer="word", eval_tokens=1000).splits["test"]
    assert (longer.words, longer.bytes) == (whole.words, whole.bytes)


def test_a_training_split_that_only_the_literature_knows_is_warned_of(data, monkeypatch):
    made.write_lines(data)
    whole = counts.SPLITS["train"]
    monkeypatch.setitem(counts.SPLITS, "train", Whole(whole.lines, whole.words + 1))
    with pytest.warns(UserWarning, match="the literature has 5 lines and"):
        load(tokenizer="word")


def test_another_vocabulary_than_the_literature_has_is_warned_of(data, monkeypatch):
    made.write_lines(data)
    monkeypatch.setattr(counts, "TYPES", 7)
    with pytest.warns(UserWarning, match=r"types, the literature has 7"):
        load(tokenizer="word")


@pytest.mark.parametrize(
    ("split", "found", "words"),
    [
        ("validation", Counted(3_760, 217_646, 11_718), "11,718 <unk> of 217,646 words: this is WikiText-2"),
        ("test", Counted(4_358, 245_569, 15_218), "this is WikiText-2, not WikiText-103: give wikitext-103"),
        ("train", Counted(36_718, 2_088_628, 54_625), r"this is WikiText-2 \(36,718 lines\)"),
        ("test", Counted(4_358, 245_568, 900), "4,358 lines and 245,568 words with their ends of line, WikiText-103 has"),
        ("validation", Counted(3_761, 217_646, 900), "cut short or another text"),
        ("train", Counted(1_000_000, 57_000_000, 0), "cut short or another text"),
    ],
)
def test_what_is_not_wikitext_103_is_named(monkeypatch, split, found, words):
    monkeypatch.undo()
    with pytest.raises(DataError, match=words):
        counts.refuse_wrong("x", split, found)


def test_whole_counts_pass(monkeypatch):
    monkeypatch.undo()
    for split, whole in counts.SPLITS.items():
        counts.refuse_wrong("x", split, Counted(whole.lines, whole.words, 0))


def one_bad_line(data, make):
    """The error of a folder of text that `make` has damaged."""
    made.write_lines(data, "txt", name="{}.{}")
    make()
    with pytest.raises(ConfigError) as caught:
        load(dataset="text", tokenizer="bytes")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damaged_text_is_named_with_its_line(data):
    path = data / "valid.txt"
    bad = b"good\n" * 300_000 + b"b\xff\xfe\n"  # beyond the first batch
    assert f"{path}:300001: not UTF-8" in one_bad_line(data, lambda: path.write_bytes(bad))
    assert f"{path}: empty" in one_bad_line(data, lambda: path.write_bytes(b""))
    lacking = one_bad_line(data, path.unlink)
    assert f"no data of text in {data}" in lacking
    assert "has no validation split" in lacking


def test_a_table_without_rows_is_refused(data):
    made.write_parquet(data, {**made.LINES, "validation": []})
    with pytest.raises(DataError, match=r"validation-00000-of-00001\.parquet: no rows"):
        load(dataset="text", tokenizer="bytes")


def test_a_missing_file_of_a_numbered_set_is_told(data):
    made.write_parquet(data, made.LINES)
    load(dataset="text", tokenizer="bytes")
    (data / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"1 of 2 files train-\*-of-00002\* are there: copy the others too"):
        load(dataset="text", tokenizer="bytes")


def test_damaged_tables_are_named_with_their_line(data):
    def write(content, name="validation.jsonl"):
        for path in data.glob("*.txt"):
            path.unlink()
        made.write_json(data, name="{}" + name.removeprefix("validation"))
        (data / name).write_bytes(content)

    row = json.dumps({"text": "good"}).encode() + b"\n"
    assert 'validation.jsonl:2: expected one JSON object with "text"' in one_bad_line(data, lambda: write(row + b'{"label": 1}\n'))
    assert "validation.jsonl:1: text is int, expected a string" in one_bad_line(data, lambda: write(b'{"text": 1}\n'))
    assert "validation.jsonl:1: half of a surrogate pair" in one_bad_line(data, lambda: write(b'{"text": "\\ud800"}\n'))
    for path in data.iterdir():
        path.unlink()
    cut = gzip.compress(row * 1000)[:-20]
    assert "cut short or damaged after line" in one_bad_line(data, lambda: write(cut, "validation.jsonl.gz"))


def test_wrong_line_ends_and_two_copies_are_refused(data):
    made.write_lines(data, lines={**made.LINES, "test": [line.replace("\n", "\r\n") for line in made.LINES["test"]]})
    with pytest.raises(DataError, match=r"wiki\.test\.tokens:1: ends with CR LF"):
        load(tokenizer="word")
    for name in "ab":
        made.write_lines(data / name)
    with pytest.raises(ConfigError, match="holds 3 copies of wikitext103"):
        load(tokenizer="word")


def test_a_folder_of_wikitext_2_beside_is_passed_over(data):
    made.write_lines(data / "wikitext-2")
    made.write_lines(data / "wikitext-103")
    assert load(tokenizer="word").splits["train"].words == counts.SPLITS["train"].words


def test_missing_data_say_what_was_expected(data):
    with pytest.raises(ConfigError, match="is no folder; give data_dir=DIR or set HGRN2_BENCH_DATA, or choose preset=smoke"):
        load()
    made.write_lines(data, name="wikitext2_{}.{}")
    with pytest.raises(ConfigError, match=r"no data of wikitext103 in .*: expected wiki\..*has files of WikiText-2"):
        load()
    made.write_lines(data, "raw", RAW)
    with pytest.raises(ConfigError, match=r"tokenizer=gpt2 needs GPT-2's BPE in .*vocab\.json with merges\.txt"):
        load()
    (data / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    with pytest.raises(DataError, match=r"tokenizer\.json: no byte-level BPE"):
        load()


def test_another_bpe_than_gpt2s_is_refused(data, monkeypatch):
    made.write_lines(data, "raw", RAW)
    made.write_bpe(data, "vocab")
    monkeypatch.setattr(tokenizers, "GPT2_ENTRIES", 50_257)
    with pytest.raises(DataError, match=r"vocab\.json: 259 entries and 3 merges: not GPT-2's BPE, which has 50,257"):
        load()
    vocabulary = made.small_bpe()[0]
    (data / "vocab.json").write_text(json.dumps({entry: i for entry, i in vocabulary.items() if entry != "the"}))
    with pytest.raises(DataError, match=r"vocab\.json: no byte-level BPE \(Error while initializing BPE"):
        load()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "dict.txt").write_text("a 1\n"), "dict.txt has 5: give the dict.txt that was made with it"),
        (lambda d: (d / "dict.txt").write_text("a\n"), "dict.txt:1: expected an entry"),
        (lambda d: (d / "dict.txt").unlink(), "dict.txt is missing"),
        (lambda d: (d / "test.bin").write_bytes(b"\0\0"), "test.bin: 2 bytes, test.idx says"),
        (lambda d: (d / "test.idx").write_bytes(b"TNTIDX\0\0"), "test.idx: no index of fairseq's memory-mapped format"),
        (lambda d: (d / "test.idx").write_bytes((d / "test.idx").read_bytes()[:-1]), "for 4 lines: cut short"),
    ],
)
def test_damaged_fairseq_files_are_named(data, damage, words):
    lines = {split: [[7] * len(line.split()) + [2] for line in those] for split, those in made.LINES.items()}
    made.write_fairseq(data, lines, "abcd")
    damage(data)
    with pytest.raises(DataError, match=words):
        load(tokenizer="word")


@pytest.mark.parametrize("tokenizer", [tokenizers.Bytes(), tokenizers.Words(["some", "words"])])
def test_memory_holds_a_batch_not_the_text(tmp_path, tokenizer):
    line = "some words of no meaning, again and again " * 10 + "\n"
    path = tmp_path / "train.txt"
    path.write_text(line * 60_000)
    place = Place("text", "lines", tmp_path, {"train": (path,)}, "text")
    tracemalloc.start()
    stored = arrays.stored_split(tmp_path, "train", tokenizer, lambda: readers.read_lines(place, "train"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stored.counted == Counted(60_000, 60_000 * 81, 0)
    assert path.stat().st_size > 25e6
    assert peak < 15e6, peak


def test_the_order_of_words_is_the_same_in_every_process():
    source = "from suites.wikitext.tokenizers import count_words; print(count_words([['b a c c d e f g']]))"
    run = [
        subprocess.run(
            [sys.executable, "-c", source], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        for seed in "12"
    ]
    assert run[0].stdout == run[1].stdout == b"['c', 'a', 'b', 'd', 'e', 'f', 'g']\n"


def test_no_torch_is_needed_for_a_fingerprint():
    source = "import sys, suites.wikitext.texts, suites.wikitext.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], cwd=ROOT, check=False).returncode == 0


def real(name):
    """A file of WikiText's that a developer may have beside the project."""
    path = SHARED / f"wikitext2_{name}.tokens"
    if not path.exists():
        pytest.skip(f"no {path.name} in {SHARED}")
    return Place("transfer", "lines", SHARED, {"test": (path,)}, "tokens")


@pytest.mark.parametrize(("name", "words"), [("valid", 217_646), ("test", 245_569)])
def test_the_real_files_have_the_known_counts(name, words):
    assert readers.count(readers.read_lines(real(name), "test")).words == words


@pytest.mark.parametrize(("name", "tokens"), [("valid", 255_114), ("test", 291_731)])
def test_the_real_files_have_the_known_number_of_bpe_ids(monkeypatch, name, tokens):
    monkeypatch.undo()
    place = real(name)
    if next(locate_bpe(SHARED), None) is None:
        pytest.skip(f"no BPE of GPT-2's in {SHARED}")
    bpe = tokenizers.Bpe(*tokenizers.read_bpe(SHARED))
    assert sum(len(bpe.encode(batch).ids_N) for batch in readers.read_lines(place, "test")) == tokens
