"""`data lra check`: what it finds in made-up folders with every defect, and the command's words and exit codes."""

import subprocess
import sys
import textwrap

import lra_folders as made
import numpy as np
import pytest
from PIL import Image

from hgrn2_bench.datacheck import check_data
from hgrn2_bench.doctor import NOTE, OK, PROBLEM
from hgrn2_bench.errors import ConfigError
from suites.lra import check_pathfinder, images, listops, retrieval, text
from suites.lra.check import findings
from suites.lra.places import EXPECTED


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The numbers of whole data sets, made small."""
    monkeypatch.setattr(listops, "COUNTS", {"train": 3, "val": 3, "test": 3})
    monkeypatch.setattr(text, "COUNTS", {"train": 4, "test": 4})
    monkeypatch.setattr(retrieval, "COUNTS", {"train": 6, "val": 4, "test": 2})
    monkeypatch.setattr(images, "COUNTS", {"train": 40, "test": 10})
    monkeypatch.setattr(check_pathfinder, "COUNT", 40)


def marked(folder, mark, task=""):
    """Lines of one kind, of one task."""
    return [str(each) for each in findings(folder) if each.mark == mark and each.text.startswith(task)]


def the_problem(folder):
    (line,) = marked(folder, PROBLEM)
    return line


def whole_text(folder):
    made.write_imdb_folders(folder, {"train": (["a", "b"], ["c", "d"]), "test": (["e", "f"], ["g", "h"])})


def whole_retrieval(folder):
    made.write_aan(folder, {"train": made.aan_rows(6), "eval": made.aan_rows(4), "test": made.aan_rows(2)})


def test_a_whole_folder_has_no_problem_and_a_line_for_every_task(tmp_path):
    made.write_listops(tmp_path / "listops-1000")
    whole_text(tmp_path / "aclImdb")
    whole_retrieval(tmp_path / "tsv_data")
    made.write_cifar_folders(tmp_path / "cifar", made.colours(40), made.colours(10))
    made.write_pathfinder(tmp_path)
    made.write_pathfinder(tmp_path, size=128, margins=(2, 3))
    assert marked(tmp_path, PROBLEM) == []
    found = marked(tmp_path, OK)
    for task in EXPECTED:
        assert any(f"{task}: found" in line for line in found)
    assert any("listops train: 3 items, as expected" in line for line in found)
    assert any("retrieval test: 2 items, as expected" in line for line in found)
    assert any("image train: 40 items, as expected" in line for line in found)
    assert any("pathfinder curv_contour_length_14: every picture is there, whole and 32x32" in line for line in found)
    assert any("pathx curv_contour_length_14: margins seen agree with the metadata in 100% of pairs" in line for line in found)


def test_tasks_that_are_not_there_are_notes_with_what_was_expected(tmp_path):
    made.write_listops(tmp_path)
    assert marked(tmp_path, NOTE, "pathx") == [f"note     pathx: not here: expected {EXPECTED['pathx']}"]
    assert len(marked(tmp_path, NOTE)) == 5


def test_a_folder_of_other_things_is_bad_input(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ConfigError, match="nothing of the Long Range Arena in"):
        list(findings(tmp_path))


def test_two_copies_are_both_checked_and_told(tmp_path):
    for name in "ab":
        made.write_pathfinder(tmp_path / name)
    assert "pathfinder: 2 copies: " in the_problem(tmp_path)
    assert len([line for line in marked(tmp_path, OK) if "every picture is there" in line]) == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("( [MAX 2 ) 9 )\t9", "bad line, the first {}:5: brackets [ ] do not match"),
        ("( ( [MAX 2 ) ]\t9", "bad line, the first {}:5: brackets ( ) do not match"),
        ("( ( [MAX 2 ) ] )", "bad line, the first {}:5: not an expression, a tab and a digit"),
    ],
)
def test_broken_lines_of_listops_are_named(tmp_path, row, words):
    made.write_listops(tmp_path / "a", (made.LISTOPS_ROW,) * 3)
    path = tmp_path / "a/basic_val.tsv"
    path.write_bytes(path.read_bytes() + row.encode())
    lines = marked(tmp_path, PROBLEM)
    assert words.format(path) in lines[0]
    assert "listops val: 4 items, expected 3" in lines[1]
    assert marked(tmp_path, NOTE, "listops") == [
        f"note     listops val: the last line of {path} has no end: see whether the file was cut short"
    ]


def test_listops_without_its_header_is_told(tmp_path):
    made.write_listops(tmp_path / "a")
    path = tmp_path / "a/basic_test.tsv"
    path.write_bytes(path.read_bytes().partition(b"\n")[2])
    assert ":1: b'( ( ( [MAX" in marked(tmp_path, PROBLEM)[0]


def test_duplicates_of_text_are_counted(tmp_path):
    made.write_imdb_folders(tmp_path, {"train": (["a", "a"], ["c", "d"]), "test": (["a", "f"], ["d", "h"])})
    notes = marked(tmp_path, NOTE, "text")
    assert "vocabulary of 3 ids: the published files give 134" in notes[0]
    assert "1 texts twice in train, 0 in test; 2 of train are in test too: left in; the published files have 96, 199, 123" in notes[1]


def test_the_head_of_a_file_sorted_by_class_is_a_problem(tmp_path):
    made.write_imdb_lines(tmp_path, {"train": [("a", 0)] * 3, "test": [("a", 0), ("b", 0), ("c", 1), ("d", 1)]})
    lines = marked(tmp_path, PROBLEM)
    assert "text train: 3 items, expected 4: copy or unpack it again" in lines[0]
    assert "text train: items by class 3, 0: a subset sorted by class: such a head of a sorted file" in lines[1]
    assert any("text test: items by class 2, 2, sorted by class" in line for line in marked(tmp_path, OK))


def test_merged_and_broken_rows_of_retrieval_are_counted_and_named(tmp_path):
    whole_retrieval(tmp_path)
    merged = ["\\n".join(made.aan_rows(2)), *made.aan_rows(4)]
    made.write_aan(tmp_path, {"train": merged})
    lines = marked(tmp_path, PROBLEM)
    assert "retrieval train: 1 bad line, the first" in lines[0]
    assert "new_aan_pairs.train.tsv:1: 9 columns instead of 5" in lines[0]
    assert "retrieval train: 5 items, expected 6" in lines[1]


def test_ids_without_texts_are_explained(tmp_path):
    whole_retrieval(tmp_path)
    made.write_aan(tmp_path, {"train": ["1.0\t1\t2"] * 6})
    assert "6 bad lines, the first" in the_problem(tmp_path)
    assert "rebuild them from the AAN corpus" in the_problem(tmp_path)


def test_numbers_of_the_literature_only_are_notes(tmp_path):
    whole_retrieval(tmp_path)
    made.write_aan(tmp_path, {"test": made.aan_rows(1)})
    vocabulary, number = marked(tmp_path, NOTE, "retrieval")
    assert vocabulary.endswith("retrieval: vocabulary of 21 ids: the published files give 98")
    assert number.endswith("retrieval test: 1 items, the literature has 2: see that the file is whole")


def test_a_missing_batch_of_cifar_is_a_problem(tmp_path):
    made.write_cifar_pickles(tmp_path / "a", [made.colours(10)] * 3, made.colours(10))
    assert "image train: 30 items, expected 40" in the_problem(tmp_path)


def test_empty_pictures_and_jpeg_are_told(tmp_path):
    made.write_cifar_folders(tmp_path, made.colours(40), made.colours(10))
    Image.new("RGB", (32, 32)).save(tmp_path / "test/dog/a.jpg")
    (tmp_path / "test/cat/0003.png").write_bytes(b"")
    assert f"image test: 1 zero-byte file, left out: {tmp_path}/test/cat/0003.png" in the_problem(tmp_path)
    assert not any("JPEG" in line for line in marked(tmp_path, NOTE))
    Image.new("RGB", (32, 32)).save(tmp_path / "train/dog/a.jpg")
    assert any('report results as "CIFAR-10 (JPEG)"' in line for line in marked(tmp_path, NOTE))


def test_images_that_are_not_cifar_are_told_by_their_greys(tmp_path):
    dark = np.zeros((40, 32, 32, 3), np.uint8), np.arange(40) % 10
    made.write_cifar_binaries(tmp_path / "a", [dark], made.colours(10))
    assert any("grey mean 0.0, sd 0.0 of 255: CIFAR-10 has 122.6 and 61.0" in line for line in marked(tmp_path, NOTE))


def test_a_damaged_file_is_a_problem_and_other_tasks_are_checked(tmp_path):
    made.write_listops(tmp_path / "listops")
    made.write_cifar_binaries(tmp_path / "a", [made.colours(40)], made.colours(10))
    with (tmp_path / "a/data_batch_1.bin").open("ab") as file:
        file.write(b"x")
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    lines = marked(tmp_path, PROBLEM)
    assert "train.parquet: no parquet file, or cut short (4 bytes)" in lines[0]
    assert "image: " in lines[1]
    assert "data_batch_1.bin: 122921 bytes, no multiple of 3073" in lines[1]
    assert any("listops test: 3 items" in line for line in marked(tmp_path, OK))


def test_zero_byte_pictures_are_listed(tmp_path):
    root = made.write_pathfinder(tmp_path)
    for i in (3, 5):
        (root / f"imgs/1/sample_{i}.png").write_bytes(b"")
    assert "2 x zero-byte PNG: imgs/1/sample_3.png, imgs/1/sample_5.png: unpack the archive again" in the_problem(tmp_path)


def test_the_empty_picture_of_the_published_archive_is_a_note(tmp_path):
    made.write_pathfinder(tmp_path)
    root = made.write_pathfinder(tmp_path, difficulty="curv_baseline", contour=6)
    (root / "imgs/0/sample_3.png").rename(root / "imgs/0/sample_172.png")
    (root / "imgs/0/sample_172.png").write_bytes(b"")
    path = root / "metadata/0.npy"
    path.write_text(path.read_text().replace("sample_3.png", "sample_172.png"))
    assert marked(tmp_path, PROBLEM) == []
    (note,) = marked(tmp_path, NOTE, "pathfinder ")
    assert "zero-byte PNG imgs/0/sample_172.png, as in the published archive: readers leave it out and count it" in note


def test_missing_broken_and_extra_pictures_are_told(tmp_path):
    root = made.write_pathfinder(tmp_path)
    (root / "imgs/0/sample_1.png").rename(root / "imgs/0/other.png")
    path = root / "imgs/0/sample_2.png"
    path.write_bytes(path.read_bytes()[:-1])
    lines = marked(tmp_path, PROBLEM)
    assert "1 x missing file: imgs/0/sample_1.png" in lines[0]
    assert "1 x file cut short or no PNG: imgs/0/sample_2.png" in lines[1]
    assert "1 picture without metadata" in marked(tmp_path, NOTE, "pathfinder")[0]


def test_swapped_resolutions_and_difficulties_are_told(tmp_path):
    made.write_pathfinder(tmp_path, contour=9)
    (tmp_path / "pathfinder32").rename(tmp_path / "pathfinder128")
    lines = marked(tmp_path, PROBLEM)
    assert "contours of 9 dashes, expected 14: another difficulty under this name" in lines[0]
    assert "dashes of 2 by 0.5 pixels, expected 5 by 1.5: another resolution under this name" in lines[1]
    assert "40 pictures of 32x32 pixels, expected 128x128: another resolution under the name pathfinder128" in lines[2]


def test_exchanged_metadata_files_are_told(tmp_path):
    root = made.write_pathfinder(tmp_path)
    (root / "metadata/0.npy").rename(root / "metadata/7.npy")
    assert f"20 lines name a folder of another batch, the first {root}/metadata/7.npy:1" in the_problem(tmp_path)


def test_exchanged_pictures_are_told_where_margins_show_it(tmp_path):
    root = made.write_pathfinder(tmp_path, size=128, margins=(2, 3))
    for name, to in (("0", "other"), ("1", "0"), ("other", "1")):
        (root / "imgs" / name).rename(root / "imgs" / to)
    assert "labels of other pictures, with which a model stays at chance" in the_problem(tmp_path)


def test_wrong_nesting_of_a_difficulty_is_told(tmp_path):
    root = made.write_pathfinder(tmp_path)
    (root / "inner").mkdir()
    for name in ("imgs", "metadata"):
        (root / name).rename(root / "inner" / name)
    assert f"wrong nesting: {root} holds inner: move imgs and metadata directly into it" in the_problem(tmp_path)


def test_a_sorted_subset_of_pathfinder_is_told_by_its_labels(tmp_path):
    root = made.write_pathfinder(tmp_path)
    for path in (root / "metadata").iterdir():
        path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines() if line.split()[3] == "1"))
    assert "20 lines of metadata, 100.0% with label 1, expected 40" in the_problem(tmp_path)


# The command


def bench(*words, cwd):
    return subprocess.run([sys.executable, "-m", "hgrn2_bench", *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=120)


def test_the_command_prints_findings_a_summary_and_ends_with_one_for_problems(tmp_path):
    made.write_listops(tmp_path / "listops")
    done = bench("data", "lra", "check", "listops", cwd=tmp_path)
    assert done.returncode == 1
    assert "PROBLEM  listops train: 3 items, expected 96,000: copy or unpack it again from its source" in done.stdout
    assert done.stdout.splitlines()[-1] == "data lra: 3 PROBLEMs, 5 notes, 1 ok"
    assert done.stderr == ""


def test_without_a_folder_the_one_that_runs_read_is_checked(tmp_path, monkeypatch, capsys):
    made.write_listops(tmp_path / "listops")
    monkeypatch.setenv("HGRN2_BENCH_DATA", str(tmp_path))
    assert check_data("lra", "check")
    assert f"listops: found {tmp_path / 'listops'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["lraa", "check", "."], "Unknown suite 'lraa'. Did you mean 'lra'?"),
        (["mqar", "check", "."], "suite mqar reads no data; suites that do: imagenet, lra"),
        (["lra", "chek", "."], "Unknown action 'chek'. Did you mean 'check'?"),
        (["lra", "check", "absent"], "no folder absent"),
        (["lra", "check"], "no folder data; name one, or set HGRN2_BENCH_DATA to it"),
        (["lra", "check", "."], "nothing of the Long Range Arena in .: expected"),
    ],
)
def test_wrong_words_are_one_line_and_import_no_torch(tmp_path, words, line):
    script = f"""
        import sys
        from hgrn2_bench.cli import main
        sys.argv = ["hgrn2_bench", "data", *{words!r}]
        try:
            main()
        finally:
            assert not {{"torch", "pandas", "fla"}} & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {line}")
    assert len(done.stderr.splitlines()) == 1
