"""ListOps: golden files, the published distribution, items that depend on seed and index only, and files whose wrong rows are counted."""

import csv
import functools
import gzip
import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from hgrn2_bench.errors import ConfigError
from suites.lra import listops
from suites.lra.items import Texts
from suites.lra.listops import FIRST_OPERATOR, TOKENS, Examples, ListOps, evaluate, expression, tokenize
from suites.lra.listops_ids import Vocabulary, splits

GOLDEN = Path(__file__).parents[1] / "golden"
SHORT = ListOps(100, 500, 6)
TINY = ListOps(1, 6, 2, 3)
"""Two or three digits: 4,400 expressions, so that duplicates come early."""


def golden_lines(name):
    content = (GOLDEN / name).read_bytes()
    return (gzip.decompress(content) if name.endswith(".gz") else content).decode().splitlines()[1:]


def examples_of(part):
    return Examples(Texts(part["codes"], np.cumsum(part["lengths"], dtype=np.int64)), part["labels"])


def texts(examples):
    return [examples.codes[i].tobytes() for i in range(len(examples.codes))]


@functools.cache
def published():
    return examples_of(listops.make(ListOps(), 0, range(3_000)))


def write(path, rows, header=("Source", "Target")):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([header, *rows])
    return path


# text, codes, ids


@pytest.mark.parametrize(("name", "count"), [("listops_short.tsv", 300), ("listops_lra.tsv.gz", 12)])
def test_golden_labels_are_recomputed_and_golden_texts_come_back(name, count):
    rows = [line.split("\t") for line in golden_lines(name)]
    vocabulary = Vocabulary.of(published())
    assert len(rows) == count
    for text, label in rows:
        ids = vocabulary.encode(text)
        assert vocabulary.evaluate(ids) == evaluate(tokenize(text)) == int(label)
        assert vocabulary.decode(ids) == expression(tokenize(text)) == text


def test_text_without_brackets_is_read_and_gets_them():
    codes = tokenize("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2]]")
    assert " ".join(TOKENS[code] for code in codes) == "[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]"
    assert evaluate(codes) == 5
    assert expression(tokenize("[SM 7 [MAX 2 9 ]]")) == "( ( ( [SM 7 ) ( ( ( [MAX 2 ) 9 ) ] ) ) ] )"


@pytest.mark.parametrize(("text", "value"), [("[MED 1 2 ]", 1), ("[MED 9 0 4 5 ]", 4), ("[MED 3 1 2 ]", 2), ("[SM 9 9 9 ]", 7), ("6", 6)])
def test_values_by_hand(text, value):
    assert evaluate(tokenize(text)) == value


@pytest.mark.parametrize("text", ["", "1 2", "[MAX ]", "[MAX 1 2", "1 ]", "[MAX 1 2 ] 3", "[MIN [MAX 1 2 ]"])
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ValueError, match=r"closing bracket without|not one closed expression"):
        evaluate(tokenize(text))
    with pytest.raises(ValueError, match=r"closing bracket without|not one closed expression"):
        expression(tokenize(text))


def test_ids_go_by_frequency_in_the_training_split_and_ties_by_name():
    train = Examples(Texts(np.frombuffer(tokenize("[SM 7 7 7 3 3 5 [SM 3 3 ] 0 ]"), np.uint8), np.array([14])), np.array([0]))
    tokens = Vocabulary.of(train).tokens
    assert tokens[:8] == ("<pad>", "<unk>", "<eos>", "3", "7", "]", "[SM", "0")
    assert tokens[8:] == ("5", "1", "2", "4", "6", "8", "9", "[MAX", "[MED", "[MIN")
    assert len(tokens) == 18


def test_in_the_published_distribution_the_bracket_is_first_and_operators_last():
    tokens = Vocabulary.of(published()).tokens
    assert tokens[3] == "]"
    assert set(tokens[4:14]) == set("0123456789")


# the generator


def test_every_label_is_the_value_and_every_length_is_within_the_bounds():
    for task, examples in ((ListOps(), published()), (SHORT, examples_of(listops.make(SHORT, 1, range(500))))):
        for codes, label in zip(texts(examples), examples.labels_N, strict=True):
            assert evaluate(codes) == label
        lengths = examples.codes.lengths_N
        assert task.min_length < lengths.min() <= lengths.max() < task.max_length


@pytest.mark.parametrize("bounds", [(20, 22), (7, 9)])
def test_bounds_are_exclusive(bounds):
    part = listops.make(ListOps(*bounds, 4, 5), 0, range(50))
    assert set(part["lengths"].tolist()) == {bounds[0] + 1}


def test_lengths_have_the_published_distribution():
    """Expected: 40,000 trees of a plain recursion; standard error of a mean of 3,000 lengths 7.2 tokens."""
    lengths = published().codes.lengths_N
    assert lengths.mean() == pytest.approx(1036.5, abs=29)
    assert lengths.std() == pytest.approx(395, abs=16)
    assert np.percentile(lengths, [5, 25, 50, 75, 95]) == pytest.approx([538, 702, 954, 1313, 1805], abs=55)


def test_labels_have_the_published_distribution():
    shares = np.bincount(published().labels_N, minlength=10) / 3_000
    assert shares == pytest.approx([0.170, 0.091, 0.077, 0.082, 0.089, 0.087, 0.077, 0.072, 0.086, 0.168], abs=0.027)
    roots = published().codes.ids_S[published().codes.ends_N - published().codes.lengths_N]
    of_root = [published().labels_N[roots == FIRST_OPERATOR + kind] for kind in range(4)]
    assert [len(labels) / 3_000 for labels in of_root] == pytest.approx([0.25] * 4, abs=0.032)
    assert np.mean(of_root[0] == 0) == pytest.approx(0.57, abs=0.07)
    assert np.mean(of_root[1] == 9) == pytest.approx(0.57, abs=0.07)
    assert np.bincount(of_root[2], minlength=10)[4:6] / len(of_root[2]) == pytest.approx([0.21, 0.21], abs=0.06)
    assert np.bincount(of_root[3], minlength=10) / len(of_root[3]) == pytest.approx([0.1] * 10, abs=0.045)


def shape(codes):
    """Greatest nesting of operators, and the number of arguments of each."""
    open_args, counts, depth = [0], [], 0
    for code in codes:
        if TOKENS[code] == "]":
            counts.append(open_args.pop())
        else:
            open_args[-1] += 1
            if code >= FIRST_OPERATOR:
                open_args.append(0)
                depth = max(depth, len(open_args) - 1)
    return depth, counts


def test_depth_arguments_and_digits_are_the_published_ones():
    shapes = [shape(codes) for codes in texts(published())[:1_000]]
    assert {depth for depth, _ in shapes} == {9}
    counts = np.bincount([count for _, each in shapes for count in each], minlength=11)
    assert counts[:2].sum() == 0
    assert counts[2:] / counts.sum() == pytest.approx([0.111] * 9, abs=0.005)
    tokens = np.bincount(published().codes.ids_S, minlength=15)
    assert tokens[:10].sum() / tokens[:14].sum() == pytest.approx(0.834, abs=0.002)
    assert tokens[:10] / tokens[:10].sum() == pytest.approx([0.1] * 10, abs=0.002)
    assert tokens[10:14] / tokens[10:14].sum() == pytest.approx([0.25] * 4, abs=0.004)
    assert np.mean([len(expression(codes)) for codes in texts(published())[:300]]) == pytest.approx(6_700, abs=650)


def test_one_published_tree_in_twelve_is_kept():
    """0.0832 of all trees in 40,000 kept ones of a plain recursion; only a quarter of all has an operator at the root."""
    rng = np.random.default_rng(0)
    assert np.mean([listops._tree(ListOps(), rng) is not None for _ in range(4_000)]) / 4 == pytest.approx(0.0832, abs=0.0075)


def test_without_bounds_a_level_holds_one_and_a_half_times_the_nodes_of_the_one_before():
    rng, trees = np.random.default_rng(0), 4_000
    nodes = np.zeros(4)
    for _ in range(trees):
        levels = listops._tree(ListOps(1, 10_000, 4), rng)
        nodes[: len(levels)] += [len(args) for args in levels]
    assert nodes / trees == pytest.approx([1, 6, 9, 13.5], rel=0.06)


def test_an_item_depends_on_seed_and_index_only():
    whole, part = listops.make(SHORT, 3, range(40)), listops.make(SHORT, 3, range(30, 40))
    assert texts(examples_of(whole))[30:] == texts(examples_of(part))
    assert texts(examples_of(listops.make(SHORT, 4, range(30, 40)))) != texts(examples_of(part))
    assert len({*texts(examples_of(whole))}) == 40


def test_items_are_those_of_this_version():
    """Another hash means that the same seed gives other data: raise VERSION."""
    digests = [hashlib.sha256(listops.make(task, 7, range(20))["codes"]).hexdigest()[:16] for task in (ListOps(), SHORT)]
    assert (listops.VERSION, digests) == (1, ["7079842323d8d134", "51c032e99ee4074c"])


def test_bounds_that_no_tree_meets_are_refused(monkeypatch):
    for wrong in ((0, 10), (500, 501), (10, 5), (500, 2_000, 3, 10), (500, 2_000, 1, 10), (500, 2_000, 10, 1)):
        with pytest.raises(ConfigError, match=r"leave no length between them|must be at least 2"):
            ListOps(*wrong)
    monkeypatch.setattr(listops, "MAX_TRIES", 50)
    with pytest.raises(ConfigError, match="none of 50 trees has a length between the bounds"):
        listops.example(ListOps(119, 121, 3, 10), 0, 0)


# splits


def test_generated_splits_are_the_first_different_items_in_order(tmp_path):
    stream = texts(examples_of(listops.make(TINY, 0, range(700))))
    first = list(dict.fromkeys(stream))
    small = listops.generate(TINY, 0, {"train": 250, "val": 30, "test": 20}, tmp_path)
    large = listops.generate(TINY, 0, {"train": 500, "val": 30, "test": 20}, tmp_path)
    assert texts(small["train"]) + texts(small["val"]) + texts(small["test"]) == first[:300]
    assert texts(large["train"]) + texts(large["val"]) + texts(large["test"]) == first[:550]
    assert sum(each.skipped.get("duplicate", 0) for each in large.values()) == stream.index(first[549]) - 549 > 0
    for each in large.values():
        assert [evaluate(codes) for codes in texts(each)] == each.labels_N.tolist()


def test_more_expressions_than_there_are_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(listops, "MAX_DRAWS", 2)
    with pytest.raises(ConfigError, match=r"500 different expressions are wanted, and 1\d\d\d items hold 3\d\d"):
        listops.generate(ListOps(1, 5, 2, 2), 0, {"train": 480, "val": 10, "test": 10}, tmp_path)
    with pytest.raises(ConfigError, match="at least one expression"):
        listops.generate(TINY, 0, {"train": 480, "val": 0}, tmp_path)


def test_splits_end_with_eos_and_nothing_is_cut():
    made = splits({"train": published(), "val": examples_of(listops.make(ListOps(), 1, range(5)))})
    vocabulary = Vocabulary.of(published())
    for examples, split in ((published(), made["train"]), (examples_of(listops.make(ListOps(), 1, range(5))), made["val"])):
        assert (split.truncated, split.skipped, split.labels_N.dtype, split.inputs.ids_S.dtype) == (0, {}, np.int64, np.uint8)
        assert split.labels_N.tolist() == examples.labels_N.tolist()
        assert split.inputs.lengths_N.tolist() == (examples.codes.lengths_N + 1).tolist()
        assert np.count_nonzero(split.inputs.ids_S == 2) == len(split)
        for i in range(0, len(split), 50):
            ids = split.inputs[i]
            assert ids[-1] == 2
            assert vocabulary.evaluate(ids) == split.labels_N[i]
            assert tokenize(vocabulary.decode(ids)) == examples.codes[i].tobytes()


def test_what_is_longer_than_the_limit_is_cut_counted_and_still_ends_with_eos():
    """A limit of 8 holds seven tokens and <eos>: an expression of exactly seven is whole."""
    words = ["[MAX 1 2 3 4 5 ]", "[MIN 1 2 3 4 5 6 ]", "3", "[SM [MAX 1 2 ] [MIN 3 4 ] ]"]
    lengths = [len(tokenize(text)) for text in words]
    codes = np.frombuffer(b"".join(map(tokenize, words)), np.uint8)
    split = splits({"train": Examples(Texts(codes, np.cumsum(lengths)), np.zeros(4, np.uint8))}, 8)["train"]
    tokens = Vocabulary.of(Examples(Texts(codes, np.cumsum(lengths)), np.zeros(4, np.uint8))).tokens
    assert split.truncated == 2
    assert [" ".join(tokens[i] for i in split.inputs[n]) for n in range(4)] == [
        "[MAX 1 2 3 4 5 ] <eos>",
        "[MIN 1 2 3 4 5 6 <eos>",
        "3 <eos>",
        "[SM [MAX 1 2 ] [MIN 3 <eos>",
    ]


def test_special_tokens_inside_an_expression_are_refused():
    with pytest.raises(ValueError, match="special token"):
        Vocabulary.of(published()).evaluate(np.array([0, 3, 2]))


# files


def test_files_give_back_what_was_written(tmp_path):
    counts = {"train": 60, "val": 20, "test": 20}
    made = listops.generate(SHORT, 0, counts, tmp_path / "cache")
    for name, examples in made.items():
        rows = [(expression(codes), label) for codes, label in zip(texts(examples), examples.labels_N.tolist(), strict=True)]
        path = write(tmp_path / listops.FILES[name], rows)
        assert path.read_bytes().count(b"\r\n") == counts[name] + 1
    found = listops.read(tmp_path)
    assert {name: len(each.labels_N) for name, each in found.items()} == counts
    for name in counts:
        assert (texts(found[name]), found[name].labels_N.tolist()) == (texts(made[name]), made[name].labels_N.tolist())
        assert found[name].skipped == {}
    for one, other in zip(splits(found).values(), splits(made).values(), strict=True):
        np.testing.assert_array_equal(one.inputs.ids_S, other.inputs.ids_S)


def test_wrong_rows_are_counted_by_reason_and_the_others_kept(tmp_path):
    good = [("( ( ( [MAX 2 ) 9 ) ] )", "9"), ("( ( ( [MIN 2 ) 9 ) ] )", "2")]
    wrong = [
        ("( ( ( [MAX 2 ) 9 ) ] )", "8"),
        ("( ( ( [MAX 2 ) 9 ) ] )", "x"),
        ("( ( ( [MAX 2 ) 9 ) ] )", "10"),
        ("( ( ( [FIRST 2 ) 9 ) ] )", "2"),
        ("( ( ( [MAX é ) 9 ) ] )", "9"),
        ("( ( ( [MAX 2 ) 9 )", "9"),
        ("( ( [MAX ) ] )", "9"),
        ("( ( ( [MAX 2 ) 9 ) ] )",),
        ("( ( ( [MAX 2 ) 9 ) ] )", "9", "9"),
        ("1 " * 70_000, "1"),
    ]
    found = listops.read_file(write(tmp_path / "rows.tsv", [good[0], *wrong, good[1]]))
    assert [expression(codes) for codes in texts(found)] == [text for text, _ in good]
    assert found.labels_N.tolist() == [9, 2]
    assert found.skipped == {
        "label is not the value": 1,
        "label is not a digit": 2,
        "foreign token": 2,
        "not one closed expression": 1,
        "closing bracket without operator or arguments": 1,
        "not two fields": 2,
        "field larger than field limit (131072)": 1,
    }


def test_quoted_fields_are_read_as_csv_writes_them(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_bytes(b'"Source"\t"Target"\r\n"( ( ( [MAX 2 ) 9 ) ] )"\t"9"\r\n')
    assert listops.read_file(path).labels_N.tolist() == [9]


def test_files_that_are_none_of_listops_are_refused(tmp_path):
    write(tmp_path / "basic_train.tsv", [("1", "1")])
    with pytest.raises(ConfigError, match=r"has no basic_val.tsv, basic_test.tsv; it must hold"):
        listops.read(tmp_path)
    with pytest.raises(ConfigError, match=r"rows.tsv: its first line must be Source<TAB>Target"):
        listops.read_file(write(tmp_path / "rows.tsv", [("1", "1")], header=("1", "1")))
    (tmp_path / "empty.tsv").touch()
    with pytest.raises(ConfigError, match=r"empty.tsv: its first line"):
        listops.read_file(tmp_path / "empty.tsv")
    with pytest.raises(ConfigError, match=r"no row that is right; wrong rows: \{'foreign token': 1\}"):
        listops.read_file(write(tmp_path / "rows.tsv", [("one", "1")]))


def test_reading_holds_one_row_and_the_codes(tmp_path):
    line = max(golden_lines("listops_lra.tsv.gz"), key=len)
    path = write(tmp_path / "rows.tsv", [line.split("\t")] * 200)
    tracemalloc.start()
    found = listops.read_file(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 3
    assert len(found.labels_N) == 200
