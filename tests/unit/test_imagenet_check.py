"""`data imagenet check`: what it finds in made-up sets with every defect, and the command's words and exit codes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import imagenet_folders as made
import lra_folders
import numpy as np
import pytest

from hgrn2_bench.doctor import NOTE, OK, PROBLEM
from hgrn2_bench.errors import ConfigError
from suites.imagenet import check, check_folders, check_pictures, resident
from suites.imagenet.check import findings

pytest.importorskip("pyarrow")
ROOT = Path(__file__).parents[2]
BOTH = {"train": made.items(30, 3), "val": made.items(9, 3, seed=100)}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """ImageNet with three classes, small sets in memory, and a cache of the test's own."""
    monkeypatch.setenv("HGRN2_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(check, "CLASSES", 3)
    monkeypatch.setattr(check, "COUNTS", {"train": 30, "val": 9})
    monkeypatch.setattr(check_folders, "timm_wnids", lambda: made.WNIDS)
    monkeypatch.setattr(resident, "COUNTS", {"train": 40, "test": 10})
    monkeypatch.setattr(resident, "CIFAR_COUNTS", {"train": 40, "test": 10})


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def marked(folder, mark):
    return [str(each) for each in findings(folder) if each.mark == mark]


def the_only(folder, mark):
    (line,) = marked(folder, mark)
    return line


@pytest.mark.parametrize("write", [made.write_folders, made.write_parquet])
def test_a_whole_imagenet_has_neither_problem_nor_note(data, write):
    write(data, BOTH)
    assert marked(data, PROBLEM) == marked(data, NOTE) == []
    lines = "\n".join(marked(data, OK))
    assert f"pictures: found {data}" in lines
    assert "3 wnids, from n01440764 = 0 to n02105855 = 2, those of ImageNet-1k in its order" in lines
    assert "train: 30 pictures, 10 to 10 in each of 3 classes, as expected" in lines
    assert "val: all 9 pictures decode" in lines


def test_shards_name_no_classes(data):
    made.write_tars(data, BOTH)
    assert marked(data, PROBLEM) == []
    assert "the files name none: labels are taken as they are" in the_only(data, NOTE)


def test_a_flat_val_folder_is_not_prepared(data):
    made.write_folders(data, BOTH)
    for path in list((data / "val").glob("*/*")):
        path.rename(data / "val" / path.name)
    first, second = marked(data, PROBLEM)
    assert f"val: {data}/val has 9 pictures and no class folders: not prepared: move each picture into the folder of its wnid" in first
    assert "ILSVRC2012_validation_ground_truth.txt" in first
    assert "no class folders" in second
    for path in list((data / "val").glob("*.JPEG")):
        path.rename(data / "val/n01440764" / path.name)
    assert any("has the class n01440764 alone: not prepared" in line for line in marked(data, PROBLEM))


def test_hidden_and_empty_folders_and_other_files_are_noted(data):
    made.write_folders(data, BOTH)
    (data / "train/.ipynb_checkpoints").mkdir()
    (data / "train/n09999999").mkdir()
    (data / "train/n01440764/Thumbs.db").write_bytes(b"x")
    hidden, empty, other = marked(data, NOTE)
    assert "train: 1 hidden folder: .ipynb_checkpoints: passed over" in hidden
    assert "train: 1 folder without pictures: n09999999: passed over" in empty
    assert "train: 1 file other than pictures: n01440764/Thumbs.db" in other
    assert marked(data, PROBLEM) == []


def test_classes_that_are_not_imagenet_s_are_told(data, monkeypatch):
    made.write_folders(data, BOTH)
    monkeypatch.setattr(check_folders, "timm_wnids", lambda: (*made.WNIDS, "n03000000"))
    assert "1 of ImageNet-1k are missing: n03000000: copy or unpack it again" in the_only(data, PROBLEM)
    monkeypatch.setattr(check_folders, "timm_wnids", lambda: made.WNIDS[:2])
    assert "1 not of ImageNet-1k: n02105855: choose dataset=folder" in the_only(data, PROBLEM)
    monkeypatch.setattr(check_folders, "timm_wnids", tuple)
    assert "not compared with ImageNet's: timm has the list" in the_only(data, NOTE)


def test_a_table_whose_classes_are_in_another_order_is_a_problem(data):
    made.write_parquet(data, BOTH, names=made.WNIDS[::-1])
    assert "not in ImageNet's order, so that labels mean other classes" in the_only(data, PROBLEM)


def test_train_and_val_of_other_classes_are_told(data):
    made.write_folders(data, BOTH, names=("ant", "bee", "cat"))
    shutil.rmtree(data / "val/bee")
    assert "val: 1 classes of train are missing: bee; 0 are not in train" in marked(data, NOTE)[0]
    (data / "val/cat").rename(data / "val/dog")
    agree, refused = marked(data, PROBLEM)
    assert "val: 2 classes of train are missing: bee, cat; 1 are not in train: dog" in agree
    assert "val: class folders that train has not: dog" in refused


def test_one_class_in_two_folders_is_told(data):
    names = ("cat", "Cat", "dog")
    made.write_folders(data, BOTH, names=names)
    assert "one class in 2 folders: Cat, cat: join them" in marked(data, PROBLEM)[0]
    shutil.rmtree(data / "train/dog")
    shutil.copytree(data / "train/cat", data / "train/dog")
    assert any("the same pictures in cat, dog: remove all but one" in line for line in marked(data, PROBLEM))


def test_other_orders_of_classes_are_noted(data):
    made.write_folders(data, {"train": made.items(12, 12), "val": made.items(12, 12)}, names=tuple(map(str, range(12))))
    assert "classes: numbers, taken by value: torchvision takes them as text" in the_only(data, NOTE)
    shutil.rmtree(data)
    made.write_folders(data, {"train": made.items(12, 12), "val": made.items(12, 12)}, names=tuple(f"c{i}" for i in range(12)))
    assert "timm orders by the numbers in names, so its labels differ" in the_only(data, NOTE)


@pytest.mark.parametrize("write", [made.write_folders, made.write_parquet, made.write_tars])
def test_damaged_and_odd_pictures_are_listed(data, write):
    odd = [made.encoded(kind="PNG"), made.encoded(mode="CMYK"), made.encoded(mode="L"), made.encoded()[:150], b""]
    train = [(content, i % 3) for i, content in enumerate([*odd, *(content for content, _ in BOTH["train"][5:])])]
    write(data, {**BOTH, "train": train})
    damaged = the_only(data, PROBLEM)
    assert "train: 2 damaged pictures in all 30: " in damaged
    assert damaged.count("no picture, or cut short") == 2
    assert "copy them again; a run stops at one, or with policy=skip leaves them out and counts them" in damaged
    notes = marked(data, NOTE)
    assert any("train: 1 picture CMYK in all 30" in line and "read as RGB" in line for line in notes)
    assert any("train: 1 picture grey in all 30" in line for line in notes)
    assert any("train: 1 picture PNG named JPEG in all 30" in line and "read by their content" in line for line in notes)


def test_a_large_split_is_sampled_unless_all_is_asked_for(data, monkeypatch):
    made.write_folders(data, BOTH)
    monkeypatch.setattr(check_pictures, "SAMPLE", 5)
    lines = marked(data, OK)
    assert any("train: a sample of 5 of 30 pictures decode (HGRN2_BENCH_CHECK=full tries all)" in line for line in lines)
    monkeypatch.setenv("HGRN2_BENCH_CHECK", "full")
    assert any("train: all 30 pictures decode" in line for line in marked(data, OK))


def test_numbers_that_are_not_imagenet_s_and_missing_labels_are_told(data):
    made.write_parquet(data, {"train": BOTH["train"][:29], "val": [(content, -1) for content, _ in BOTH["val"]]})
    first, second = marked(data, PROBLEM)
    assert "train: 29 pictures, 9 to 10 in each of 3 classes; ImageNet has 30" in first
    assert "val: 9 of 9 pictures have no class (-1)" in second


def test_a_cut_shard_and_an_original_archive_are_problems(data):
    made.write_tars(data, BOTH)
    path = data / "set-val-0001.tar"
    path.write_bytes(path.read_bytes()[:1500])
    (data / "ILSVRC2012_img_train.tar").write_bytes(b"")
    original, cut = marked(data, PROBLEM)
    assert "img_train.tar: the original archive: unpack it into train/, and there each class: for f in *.tar" in original
    assert "val: " in cut
    assert "set-val-0001.tar: no tar, or cut short" in cut


def test_sets_in_memory_are_checked_too(data):
    train, test = lra_folders.colours(40), lra_folders.colours(10, seed=1)
    lra_folders.write_cifar_folders(data / "c", train, test)
    (data / "c/train/cat/0003.png").write_bytes(b"")
    pixels = np.full((40, 28, 28), 33, np.uint8)
    made.write_idx(data / "f", {"train": (pixels, np.arange(40) % 10), "t10k": (pixels[:10], np.arange(10))})
    empty, mean = marked(data, PROBLEM)
    assert "cifar10 train: 1 empty or damaged picture: " in empty
    assert "c/train/cat/0003.png: copy or unpack it again from its source, or leave them out with policy=skip" in empty
    assert "fashion: mean 33.0 of 255, Fashion-MNIST has 72.9: other pictures in files of the same names" in mean
    assert not any("pictures: found" in line for line in marked(data, OK))


def test_a_folder_of_other_things_is_bad_input(data):
    lra_folders.write_imdb_folders(data, {"train": (["a"], ["b"]), "test": (["c"], ["d"])})
    with pytest.raises(ConfigError, match=r"no pictures with classes in .*: expected for example \{train,val\}/<wnid>"):
        list(findings(data))


def test_checking_a_sample_imports_no_torch(data):
    made.write_folders(data, BOTH)
    script = f"""
import sys
from pathlib import Path
from suites.imagenet import check, check_pictures
check_pictures.SAMPLE = 5
assert "a sample of 5" in "".join(map(str, check.findings(Path({str(data)!r}))))
assert not {{"torch", "timm", "torchvision"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_the_command_prints_the_findings_and_tells_by_its_exit_code(data):
    made.write_folders(data, BOTH, names=("ant", "bee", "cat"))
    command = [sys.executable, "-m", "hgrn2_bench", "data", "imagenet", "check", str(data)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("data imagenet: no problem")
    next((data / "train/ant").iterdir()).write_bytes(b"")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert "train: 1 damaged picture in all 30" in done.stdout
