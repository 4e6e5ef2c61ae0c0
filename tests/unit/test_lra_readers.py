"""Where data lie, and the readers of texts: every layout, ids, splits, and each kind of damage told in one line."""

import gzip
import subprocess
import sys
import textwrap

import lra_folders as made
import numpy as np
import pytest
import torch

from hgrn2_bench.errors import ConfigError, DataError
from hgrn2_bench.subsets import drawn, random_parts
from suites.lra.characters import EOS, PAD, UNK, Row, count_vocabulary, encode
from suites.lra.items import take_texts
from suites.lra.places import find, locate
from suites.lra.readers import read

ANY = {"counts": {}}


def decoded(ids, characters):
    return "".join(characters[i - 3] for i in ids if i > EOS)


def source(*texts, label=0):
    return lambda: [Row(label, (text,)) for text in texts]


# Places


@pytest.mark.parametrize("nesting", ["", "lra_release", "lra_release/lra_release"])
def test_the_original_archive_is_found_at_any_nesting(tmp_path, nesting):
    made.write_listops(tmp_path / nesting / "listops-1000")
    made.write_aan(tmp_path / nesting / "tsv_data", {"train": [], "eval": [], "test": []})
    made.write_pathfinder(tmp_path / nesting, each=1)
    made.write_pathfinder(tmp_path / nesting, size=128, each=1)
    found = locate(tmp_path)
    assert sorted(place.what for place in found.places) == ["listops", "pathfinder", "pathx", "retrieval"]
    assert found.faults == ()
    assert find(tmp_path, "listops").of("val")[0].name == "basic_val.tsv"
    assert find(tmp_path, "retrieval").of("val")[0].name == "new_aan_pairs.eval.tsv"


def test_the_renamed_layout_is_found(tmp_path):
    made.write_listops(tmp_path / "listops")
    made.write_aan(tmp_path / "aan", {"train": []})
    made.write_pathfinder(tmp_path / "pathfinder", each=1)
    made.write_imdb_folders(tmp_path / "imdb/aclImdb", {"train": (["a"], ["b"]), "test": (["a"], ["b"])})
    made.write_cifar_binaries(tmp_path / "cifar/cifar-10-batches-bin", [made.colours(1)], made.colours(1))
    assert sorted(place.what for place in locate(tmp_path).places) == ["image", "listops", "pathfinder", "retrieval", "text"]


def test_a_folder_without_the_task_is_told_with_what_was_expected(tmp_path):
    with pytest.raises(ConfigError, match=r"no data of pathx in .*: expected pathfinder128/curv_contour_length_14"):
        find(tmp_path, "pathx")
    with pytest.raises(ConfigError, match="no folder"):
        find(tmp_path / "absent", "pathx")
    with pytest.raises(ConfigError, match=r"Unknown task with a reader 'txt'. Did you mean 'text'"):
        read("txt", tmp_path)


def test_two_copies_are_not_chosen_from(tmp_path):
    for name in ("a", "b"):
        made.write_pathfinder(tmp_path / name, each=1)
    with pytest.raises(ConfigError, match=r"holds 2 copies of pathfinder: .*a/pathfinder32 .*b/pathfinder32 .*; give the folder of one"):
        find(tmp_path, "pathfinder")
    assert find(tmp_path / "b", "pathfinder").what == "pathfinder"


def test_the_inside_of_a_pathfinder_folder_is_told(tmp_path):
    root = made.write_pathfinder(tmp_path, each=1)
    with pytest.raises(ConfigError, match="is one difficulty of Pathfinder: give the folder above"):
        find(root, "pathfinder")


def test_a_lone_file_of_json_lines_is_no_copy_of_text(tmp_path):
    made.write_imdb_lines(tmp_path, {"test": [("a", 0)]})
    assert locate(tmp_path).places == ()


# Characters


def test_ids_are_specials_then_characters_by_frequency_then_alphabet():
    vocabulary = count_vocabulary(source("bbb", "ca", "ca", "d"), max_length=10, min_freq=2)
    assert vocabulary.characters == "bac"
    assert len(vocabulary) == 6
    encoded = encode(source("abd"), vocabulary, 10)
    assert encoded.texts[0][0].tolist() == [4, 3, UNK, EOS]
    assert encoded.texts[0].ids_S.dtype == np.uint8
    assert PAD == 0


def test_characters_are_counted_after_cutting_and_only_where_there_is_a_label():
    assert count_vocabulary(source("abcxyz"), max_length=4, min_freq=1).characters == "abc"
    assert count_vocabulary(source("abc", label=-1), max_length=4, min_freq=1).characters == ""


@pytest.mark.parametrize(("length", "expected", "cut"), [(3, 4, 0), (4, 5, 0), (5, 5, 1), (50, 5, 1)])
def test_texts_are_cut_to_leave_room_for_eos(length, expected, cut):
    vocabulary = count_vocabulary(source("a"), 5, 1)
    split = encode(source("a" * length), vocabulary, 5).split(np.arange(1))
    assert split.inputs[0].tolist() == [3] * (expected - 1) + [EOS]
    assert split.truncated == cut


def test_characters_not_bytes_are_counted_and_empty_texts_keep_eos():
    texts = ("é", "", "😀é")
    vocabulary = count_vocabulary(source(*texts), 10, 1)
    encoded = encode(source(*texts), vocabulary, 10)
    assert encoded.texts[0].lengths_N.tolist() == [2, 1, 3]
    assert [decoded(encoded.texts[0][i], vocabulary.characters) for i in range(3)] == list(texts)


def test_more_than_256_ids_take_two_bytes():
    text = "".join(map(chr, range(0x100, 0x300)))
    vocabulary = count_vocabulary(source(text), 1000, 1)
    encoded = encode(source(text, "\u0101"), vocabulary, 1000)
    assert encoded.texts[0].ids_S.dtype == np.int16
    assert decoded(encoded.texts[0][0], vocabulary.characters) == text
    assert encoded.texts[0][1].tolist() == [4, EOS]


# Splits


def test_random_parts_are_those_of_torch():
    parts = random_parts((70, 20, 10), 42)
    theirs = torch.utils.data.random_split(range(100), (70, 20, 10), torch.Generator().manual_seed(42))
    assert [part.tolist() for part in parts] == [list(part.indices) for part in theirs]


def test_a_subset_is_drawn_over_the_whole_and_repeats():
    sorted_by_class = np.arange(1000)
    part = drawn(sorted_by_class, 100, 1)
    assert 30 < np.count_nonzero(part >= 500) < 70
    assert np.array_equal(part, drawn(sorted_by_class, 100, 1))
    assert drawn(sorted_by_class, 0, 1) is sorted_by_class


def test_taken_texts_are_those_of_the_indices():
    texts = encode(source("a", "bb", "", "cc"), count_vocabulary(source("abc"), 9, 1), 9).texts[0]
    taken = take_texts(texts, np.array([3, 0, 2]))
    assert [taken[i].tolist() for i in range(3)] == [texts[3].tolist(), texts[0].tolist(), texts[2].tolist()]
    assert len(take_texts(texts, np.arange(0))) == 0


# Text

REVIEWS = {"train": (["bad bad", "no"], ["good", "fine"]), "test": (["zzz"], ["good good"])}


def reviews(rows_of):
    return {split: [(text, label) for label, those in enumerate(both) for text in those] for split, both in rows_of.items()}


def write_text_parquet(folder, rows):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for split, those in {**rows, "unsupervised": [("Z", -1)]}.items():
        table = pa.table({"text": [text for text, _ in those], "label": [label for _, label in those]})
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("layout", ["folders", "json lines", "plain json lines", "parquet"])
def test_every_layout_of_imdb_gives_the_same_ids(tmp_path, layout):
    if layout == "folders":
        made.write_imdb_folders(tmp_path / "aclImdb", REVIEWS)
    elif layout == "parquet":
        write_text_parquet(tmp_path, reviews(REVIEWS))
    else:
        made.write_imdb_lines(tmp_path, reviews(REVIEWS), "imdb_{}.jsonl" + ".gz" * (layout == "json lines"))
    splits = read("text", tmp_path, min_freq=1, **ANY)
    characters = "doabn efgi"  # seen three times, twice, once
    assert [decoded(splits["train"].inputs[i], characters) for i in range(4)] == ["bad bad", "no", "good", "fine"]
    assert splits["train"].labels_N.tolist() == [0, 0, 1, 1]
    assert splits["test"].inputs[0].tolist() == [UNK, UNK, UNK, EOS]
    assert np.array_equal(splits["val"].inputs.ids_S, splits["test"].inputs.ids_S)


def test_an_honest_validation_split_takes_part_of_the_training_file(tmp_path):
    rows = [(f"{i:03}", int(i >= 50)) for i in range(100)]
    made.write_imdb_lines(tmp_path, {"train": rows, "test": rows[:10]})
    splits = read("text", tmp_path, min_freq=1, val_split=0.2, **ANY)
    assert [len(splits[split]) for split in ("train", "val", "test")] == [80, 20, 10]
    seen = [tuple(splits[split].inputs[i]) for split in ("train", "val") for i in range(len(splits[split]))]
    assert len(set(seen)) == 100
    assert 5 <= splits["val"].labels_N.sum() <= 15
    again = read("text", tmp_path, min_freq=1, val_split=0.2, **ANY)
    assert np.array_equal(again["val"].inputs.ids_S, splits["val"].inputs.ids_S)
    other = read("text", tmp_path, min_freq=1, val_split=0.2, seed=1, **ANY)
    assert not np.array_equal(other["val"].inputs.ids_S, splits["val"].inputs.ids_S)


def test_subsets_of_text_are_of_both_classes_and_count_their_cut_texts(tmp_path):
    rows = [("a" * (20 if i % 2 else 5), int(i >= 500)) for i in range(1000)]
    made.write_imdb_lines(tmp_path, {"train": rows, "test": rows})
    splits = read("text", tmp_path, max_length=10, items={"train": 200, "val": 200}, **ANY)
    assert [len(splits[split]) for split in ("train", "val", "test")] == [200, 200, 1000]
    assert 60 < splits["train"].labels_N.sum() < 140
    assert splits["train"].truncated == np.count_nonzero(splits["train"].inputs.lengths_N == 10) > 50


def test_unlabelled_texts_are_left_out_and_counted(tmp_path):
    made.write_imdb_lines(tmp_path, {"train": [("a", 0), ("b", -1), ("c", 1)], "test": [("a", 0)]})
    split = read("text", tmp_path, **ANY)["train"]
    assert len(split) == 2
    assert split.skipped == {"unlabelled": 1}


def test_an_incomplete_imdb_is_refused(tmp_path):
    made.write_imdb_lines(tmp_path, {"train": [("a", 0)], "test": [("a", 0)]})
    with pytest.raises(DataError, match=r"\(json lines\), train: 1 items, expected 25,000: a part of the data, or cut short"):
        read("text", tmp_path)


def test_damaged_json_lines_name_file_and_line(tmp_path):
    made.write_imdb_lines(tmp_path, {"train": [("a", 0), ("b", 2)], "test": [("a", 0)]})
    with pytest.raises(DataError, match=r"imdb_train.jsonl.gz:2: text str, label 2; expected a string and 0, 1 or -1"):
        read("text", tmp_path, **ANY)
    (tmp_path / "imdb_train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a", "label": 0}\n{"text": "b"}\n'))
    with pytest.raises(DataError, match=r'imdb_train.jsonl.gz:2: expected one JSON object with "text" and "label"'):
        read("text", tmp_path, **ANY)


def test_a_truncated_gzip_is_told_with_the_last_good_line(tmp_path):
    rng = np.random.default_rng(0)
    made.write_imdb_lines(tmp_path, {"train": [(str(rng.random()), 0) for _ in range(5000)], "test": [("a", 0)]})
    path = tmp_path / "imdb_train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"imdb_train.jsonl.gz: cut short or damaged after line \d{4}: copy it again"):
        read("text", tmp_path, **ANY)


def test_reviews_are_read_in_the_order_of_their_numbers(tmp_path):
    made.write_imdb_folders(tmp_path, {split: ([f"{i}" for i in range(12)], ["x"]) for split in ("train", "test")})
    splits = read("text", tmp_path, min_freq=1, **ANY)
    characters = count_vocabulary(source(*map(str, range(12)), "x"), 99, 1).characters
    assert [decoded(splits["test"].inputs[i], characters) for i in range(12)] == [str(i) for i in range(12)]


def test_a_missing_class_folder_and_foreign_bytes_are_told(tmp_path):
    made.write_imdb_folders(tmp_path, {"train": (["a"], []), "test": (["a"], ["b"])})
    with pytest.raises(DataError, match=r"train/pos: no reviews"):
        read("text", tmp_path, **ANY)
    (tmp_path / "train/pos/0_9.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"train/pos/0_9.txt: not UTF-8"):
        read("text", tmp_path, **ANY)


def test_wrong_options_are_refused(tmp_path):
    made.write_imdb_folders(tmp_path, REVIEWS)
    for words in ({"max_length": 1}, {"val_split": 1.0}):
        with pytest.raises(ConfigError, match=f"{next(iter(words))}="):
            read("text", tmp_path, **words)


# Retrieval


def test_pairs_keep_their_quotes_and_share_one_vocabulary(tmp_path):
    lines = ['1.0\t7\t8\t"ab\tc"', "0.0\t7\t8\tb'x'\t" + "y" * 20]
    made.write_aan(tmp_path, {"train": lines, "eval": lines[:1], "test": lines[1:]})
    splits = read("retrieval", tmp_path, max_length=10, **ANY)
    assert [len(splits[split]) for split in ("train", "val", "test")] == [2, 1, 1]
    train = splits["train"]
    characters = count_vocabulary(lambda: [Row(0, ('"ab', 'c"')), Row(0, ("b'x'", "y" * 20))], 10, 1).characters
    assert [decoded(train.inputs[i], characters) for i in range(2)] == ['"ab', "b'x'"]
    assert [decoded(train.second[i], characters) for i in range(2)] == ['c"', "y" * 9]
    assert train.labels_N.tolist() == [1, 0]
    assert train.truncated == 1
    assert splits["val"].truncated == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("1.0\t1\t2\ta", "4 columns instead of 5"),
        ("1.0\t1\t2\ta\tb\n0.0\t1\t2\ta\tb\t0.0\t1\t2\tc", "9 columns instead of 5 .*: merged or broken lines"),
        ("1.0\t1\t2", "ids without texts"),
        ("1.0\t1\t2\t\t", "ids without texts"),
        ("label\t1\t2\ta\tb", "label 'label' instead of 0.0 or 1.0: a header, or merged lines"),
        ("nan\t1\t2\ta\tb", "label 'nan' instead"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, words):
    made.write_aan(tmp_path, {"train": [*made.aan_rows(2), line], "eval": made.aan_rows(1), "test": made.aan_rows(1)})
    number = 3 + line.count("\n")
    with pytest.raises(DataError, match=rf"new_aan_pairs.train.tsv:{number}: {words}"):
        read("retrieval", tmp_path, **ANY)


def test_merged_lines_are_seen_by_their_number(tmp_path):
    made.write_aan(tmp_path, {split: made.aan_rows(4) for split in ("train", "eval", "test")})
    with pytest.raises(DataError, match=r"train.tsv: 4 items, expected 147,086: cut short, or lines merged by a program that obeys quotes"):
        read("retrieval", tmp_path)
    with pytest.raises(DataError, match="4 items, expected 5"):
        read("retrieval", tmp_path, counts={"test": 5})


def test_a_missing_split_is_told_before_anything_is_read(tmp_path):
    made.write_aan(tmp_path, {"train": ["broken"], "test": []})
    with pytest.raises(DataError, match=r"no val split of retrieval .* expected tsv_data/new_aan_pairs"):
        read("retrieval", tmp_path)


def test_ids_do_not_depend_on_the_hash_seed(tmp_path):
    made.write_aan(tmp_path, {split: made.aan_rows(30) for split in ("train", "eval", "test")})
    script = f"""
        import hashlib
        from pathlib import Path
        from suites.lra.readers import read
        splits = read("retrieval", Path({str(tmp_path)!r}), counts={{}})
        print(hashlib.sha256(b"".join(s.inputs.ids_S.tobytes() + s.second.ids_S.tobytes() for s in splits.values())).hexdigest())
    """
    path = {"PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    one, two = (subprocess.run(command, env={**path, "PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout for seed in "12")
    assert one == two != b""
