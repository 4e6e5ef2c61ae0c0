"""Pictures of the imagenet suite: every layout gives the same ones, splits as named, damage told or counted, never replaced."""

import io
import multiprocessing
import os
import pickle
import re
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import imagenet_folders as made
import numpy as np
import pytest

from hgrn2_bench.errors import ConfigError, DataError
from suites.imagenet import files, pictures
from suites.imagenet.files import fingerprint_of
from suites.imagenet.pictures import load
from suites.imagenet.settings import ImagenetConfig

pytest.importorskip("pyarrow")
TRAIN, VAL = made.items(30, 3), made.items(9, 3, seed=100)
BOTH = {"train": TRAIN, "val": VAL}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder, and a cache of the test's own."""
    monkeypatch.setenv("HGRN2_BENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HGRN2_BENCH_CACHE", str(tmp_path / "cache"))
    files._fingerprint.cache_clear()
    load.cache_clear()
    return tmp_path / "data"


def folder_config(**keys):
    return ImagenetConfig(dataset="folder", **{"validation": "test", **keys})


def read(**keys):
    load.cache_clear()
    files._fingerprint.cache_clear()
    return load(folder_config(**keys))


def contents(split):
    """Pairs of bytes and label, sorted."""
    return sorted((split.encoded(i), int(split.labels_N[i])) for i in range(len(split)))


LAYOUTS = {
    "folders": made.write_folders,
    "other names of the splits": lambda folder, splits: made.write_folders(
        folder, {"training": splits["train"], "validation": splits["val"]}
    ),
    "parquet": made.write_parquet,
    "parquet of plain bytes without names": lambda folder, splits: made.write_parquet(folder, splits, (), False, "img"),
    "tars with cls": made.write_tars,
    "tars with json": lambda folder, splits: made.write_tars(folder, splits, "json"),
    "tars with info": lambda folder, splits: made.write_tars(folder, splits, info=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pictures(data, layout):
    LAYOUTS[layout](data / "deep" / "er", BOTH)
    found = read()
    assert contents(found.splits["train"]) == sorted(TRAIN)
    assert contents(found.splits["test"]) == contents(found.splits["validation"]) == sorted(VAL)
    assert len(found.classes) == 3
    assert found.classes in (made.WNIDS, ("0", "1", "2"))
    assert found.skipped == 0
    assert found.splits["train"].image(0).size == (12, 10)


@pytest.mark.parametrize("layout", ["folders", "parquet", "tars with cls"])
def test_workers_read_the_same_however_they_are_started(data, layout):
    LAYOUTS[layout](data, BOTH)
    split = read().splits["train"]
    expected = [split.encoded(i) for i in range(len(split))]
    assert len(pickle.dumps(split)) < 10_000  # no pictures travel
    for method in ("fork", "spawn"):
        with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
            assert list(pool.map(split.encoded, range(len(split)))) == expected


def test_a_held_out_part_selects_unless_the_test_data_are_asked_for(data):
    made.write_folders(data, BOTH)
    found = read(validation="split", validation_examples=6)
    train, validation = contents(found.splits["train"]), contents(found.splits["validation"])
    assert (len(train), len(validation)) == (24, 6)
    assert sorted(train + validation) == sorted(TRAIN)
    assert contents(found.splits["test"]) == sorted(VAL)
    assert len(read(validation="split").splits["validation"]) == 3
    assert contents(read(validation="split", validation_examples=6).splits["validation"]) == validation
    assert found.hash != read().hash


def test_a_set_of_three_splits_is_used_as_it_is(data):
    test = made.items(6, 3, seed=200)
    made.write_folders(data, {**BOTH, "test": test})
    made.write_folders(data / "notes", {"other": made.items(3, 3)})
    found = read(validation="split")
    assert [contents(found.splits[name]) for name in ("train", "validation", "test")] == [sorted(TRAIN), sorted(VAL), sorted(test)]


def test_a_set_without_test_data_holds_some_out_and_says_so(data):
    made.write_parquet(data, {"pictures": TRAIN}, files=1)
    found = read(validation="split")
    assert [len(found.splits[name]) for name in ("train", "validation", "test")] == [25, 2, 3]
    assert sorted(item for split in found.splits.values() for item in contents(split)) == sorted(TRAIN)
    assert "no test data" in found.notes[0]


def test_unlabelled_test_data_are_passed_over(data):
    made.write_parquet(data, {**BOTH, "test": [(content, -1) for content, _ in VAL]})
    assert contents(read().splits["test"]) == sorted(VAL)


def test_a_part_is_drawn_by_seed_and_more_than_there_is_refused(data):
    made.write_folders(data, BOTH)
    few = contents(read(train_examples=7).splits["train"])
    assert len(few) == 7
    assert {label for _, label in few} == {0, 1, 2}
    assert few == contents(read(train_examples=7).splits["train"])
    with pytest.raises(ConfigError, match="folder has 9 test pictures, 10 are wanted"):
        read(test_examples=10)


def test_hidden_and_empty_folders_are_no_classes(data):
    made.write_folders(data, BOTH, names=("a", "b", "c"))
    for split in ("train", "val"):
        (data / split / ".ipynb_checkpoints").mkdir()
        (data / split / ".ipynb_checkpoints/x.jpg").write_bytes(made.encoded())
        (data / split / "aa").mkdir()
    (data / "train/a/.hidden.jpg").write_bytes(b"")
    found = read()
    assert found.classes == ("a", "b", "c")
    assert contents(found.splits["train"]) == sorted(TRAIN)


def test_numbered_classes_are_taken_by_value(data):
    names = tuple(map(str, range(12)))
    made.write_folders(data, {"train": made.items(24, 12), "val": made.items(12, 12)}, names=names)
    found = read()
    assert found.classes == names
    assert contents(found.splits["train"]) == sorted(made.items(24, 12))


def test_a_class_of_val_alone_and_a_flat_val_are_refused(data):
    made.write_folders(data, BOTH)
    (data / "val/n02105855").rename(data / "val/n09999999")
    with pytest.raises(DataError, match=r"val: class folders that train has not: n09999999"):
        read()
    for path in list((data / "val").glob("*/*")):
        path.rename(data / "val" / path.name)
    with pytest.raises(DataError, match=r"val: no class folders with pictures: move each picture into the folder of its class"):
        read()


def test_imagenet_has_a_thousand_classes_and_a_val_split(data):
    made.write_folders(data, BOTH)
    with pytest.raises(ConfigError, match="3 classes, ImageNet-1k has 1,000; choose dataset=folder"):
        load(ImagenetConfig())
    (data / "val").rename(data / "elsewhere")
    with pytest.raises(DataError, match="no val split"):
        load(ImagenetConfig(test_examples=1))


@pytest.mark.parametrize("layout", ["folders", "parquet", "tars with cls"])
def test_a_damaged_picture_is_an_error_that_names_it_or_a_counted_skip(data, layout):
    whole = TRAIN[4][0]
    damaged = [*TRAIN[:4], (whole[: len(whole) // 2], TRAIN[4][1]), *TRAIN[5:20], (b"", 0), *TRAIN[21:]]
    LAYOUTS[layout](data, {"train": damaged, "val": VAL})
    split = read().splits["train"]
    bad = [i for i in range(len(split)) if (split.encoded(i), int(split.labels_N[i])) not in TRAIN]
    assert len(split) == 30
    assert len(bad) == 2
    for i in bad:
        with pytest.raises(DataError, match=r"(n0\d+|parquet, row|tar, train_).*: no picture, or cut short"):
            split.image(i)
    found = read(policy="skip")
    assert contents(found.splits["train"]) == sorted(item for i, item in enumerate(TRAIN) if i not in (4, 20))
    assert found.splits["train"].skipped == {"damaged file": 2}
    assert found.skipped == 2
    assert read(policy="skip").hash == found.hash  # now from the cache
    assert read(policy="skip").hash != read().hash


def test_pictures_of_one_name_in_two_splits_are_told_apart(data):
    for split in ("train", "val"):
        (data / split / "a").mkdir(parents=True)
        for i in range(4):
            content = made.encoded(i)
            (data / split / "a" / f"{i}.jpg").write_bytes(content[:300] if (split, i) == ("val", 2) else content)
    splits = read(policy="skip", validation="test").splits
    assert {name: split.skipped for name, split in splits.items()} == {
        "train": {},
        "validation": {"damaged file": 1},
        "test": {"damaged file": 1},
    }


def test_a_repaired_picture_is_back(data):
    made.write_folders(data, BOTH)
    path = data / "train" / made.WNIDS[0] / f"{made.WNIDS[0]}_0.JPEG"
    whole = path.read_bytes()
    path.write_bytes(b"")
    assert read(policy="skip").skipped == 1
    path.write_bytes(whole)
    assert read(policy="skip").skipped == 0


def test_a_picture_that_is_damaged_later_is_left_out_too(data):
    made.write_folders(data, BOTH)
    assert read(policy="skip").skipped == 0
    path = data / "train" / made.WNIDS[1] / f"{made.WNIDS[1]}_4.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    assert read(policy="skip").skipped == 1


def test_what_is_damaged_is_told_by_how_pictures_are_read(data):
    odd = made.encoded(kind="WEBP", exif=b"Exif\0\0garbage!")
    made.write_folders(data, {"train": [(odd, 0), *TRAIN[1:]], "val": VAL})
    assert [read(policy="skip", orientation=way).skipped for way in ("stored", "exif", "stored")] == [0, 1, 0]


def test_pictures_that_cannot_be_read_are_named_or_left_out(data):
    made.write_folders(data, BOTH)
    (data / "train" / made.WNIDS[0] / "zz.jpg").symlink_to("/nowhere.jpg")
    split = read().splits["train"]
    (gone,) = [i for i in range(len(split)) if split.where(i).endswith("zz.jpg")]
    with pytest.raises(DataError, match=r"zz.jpg: cannot be read \(No such file.*\); copy it again, or leave it out with policy=skip$"):
        split.image(gone)
    assert read(policy="skip").splits["train"].skipped == {"damaged file": 1}


def test_a_link_to_a_folder_around_it_adds_no_pictures(data):
    made.write_folders(data, BOTH)
    (data / "elsewhere").mkdir()
    (data / "elsewhere" / "x.jpg").write_bytes(made.encoded(77))
    for name, target in (("up", ".."), ("self", "."), ("more", data / "elsewhere")):
        (data / "train" / made.WNIDS[0] / name).symlink_to(target)
    assert len(read().splits["train"]) == len(TRAIN) + 1


def test_a_class_folder_that_cannot_be_listed_is_named(data, monkeypatch):
    made.write_folders(data, BOTH)
    scandir = os.scandir

    def refused(path="."):
        if str(path).endswith(made.WNIDS[2]):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=rf"{made.WNIDS[2]}: cannot be read \(Permission denied\)$"):
        read()


@pytest.mark.parametrize("write", [made.write_parquet, made.write_tars])
def test_a_missing_file_of_a_numbered_set_is_told(data, write):
    write(data, BOTH)
    for path in data.iterdir():  # as the Hub names parquet files, each with a hash of its own, and others tars
        stem, number = re.fullmatch(r"(\D*)-(\d+).*", path.name).groups()
        path.rename(data / f"{stem}-{int(number):05}-of-00002-{path.stat().st_size:x}{path.suffix}")
    assert len(read().splits["train"]) == 30
    next(data.glob("*train-00001*")).unlink()
    with pytest.raises(DataError, match=r"1 of 2 files (set-)?train-\*-of-00002\* are there: copy the others too"):
        read()


def test_a_cut_shard_and_samples_without_their_half_are_told(data):
    made.write_tars(data, BOTH)
    path = data / "set-train-0001.tar"
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(DataError, match=r"set-train-0001.tar: no tar, or cut short"):
        read()
    with tarfile.open(data / "set-train-0000.tar") as tar:
        whole = tar.getmembers()[4].offset
    made.write_tars(data, BOTH)
    os.truncate(data / "set-train-0000.tar", whole)
    with pytest.raises(DataError, match=r"set-train-0000.tar: no tar, or cut short \(the block that ends a tar is missing\)"):
        read()
    made.write_tars(data, BOTH)
    for ending, lacks in (("cls", "no picture"), ("jpg", "no class")):
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo(f"a/b.{ending}")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"1"))
        with pytest.raises(DataError, match=rf"set-train-0001.tar: sample a/b has {lacks}"):
            read()


def test_original_archives_and_missing_data_are_told_with_the_remedy(data):
    with pytest.raises(ConfigError, match="is no folder; give data_dir=DIR or set HGRN2_BENCH_DATA"):
        read()
    data.mkdir()
    (data / "ILSVRC2012_img_train.tar").write_bytes(b"")
    (data / "ILSVRC2012_img_val.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"expected .*train,val.*img_train.tar: the original archive: unpack.*img_val.tar.*wnid"):
        load(ImagenetConfig())


def test_two_copies_are_told_and_sets_are_known_by_their_names(data):
    made.write_folders(data / "a", BOTH)
    made.write_parquet(data / "b", BOTH)
    with pytest.raises(ConfigError, match=r"holds 2 copies of folder: .*a \(image folders\), .*b \(parquet\); give the folder of one"):
        read()
    (data / "b").rename(data / "cifar-10")
    assert contents(read().splits["train"]) == sorted(TRAIN)


def test_fingerprints_tell_sets_apart_wherever_they_lie(data, monkeypatch, tmp_path):
    made.write_folders(data, BOTH)
    first = fingerprint_of(folder_config())
    assert len(first) == 16
    made.write_folders(tmp_path / "moved", BOTH)
    monkeypatch.setenv("HGRN2_BENCH_DATA", str(tmp_path / "moved"))
    assert fingerprint_of(folder_config()) == first
    files._fingerprint.cache_clear()
    (tmp_path / "moved/train/n01440764/n01440764_0.JPEG").rename(tmp_path / "moved/train/n01440764/other.JPEG")
    assert fingerprint_of(folder_config()) != first
    assert fingerprint_of(ImagenetConfig(dataset="drawn")) == ""


def test_real_labels_follow_the_numbers_in_names(data, monkeypatch):
    made.write_folders(data, BOTH)
    monkeypatch.setattr(pictures, "IMAGENET_CLASSES", 3)
    monkeypatch.setattr(pictures, "REAL_COUNT", 9)
    (data / "real.json").write_text(str([[i, i + 1] if i != 4 else [] for i in range(9)]))
    found = load(ImagenetConfig(real_labels=True, validation="test"))
    numbers = [int(Path(found.splits["test"].where(i)).stem[-8:]) for i in range(9)]
    assert sorted(numbers) == list(range(1, 10))
    assert found.real_labels == tuple((n - 1, n) if n != 5 else () for n in numbers)
    path = next((data / "val").glob("*/*00000003.JPEG"))
    path.rename(path.with_name("three.JPEG"))
    load.cache_clear()
    with pytest.raises(ConfigError, match=r"three.JPEG: real_labels=true needs the names that ImageNet gave"):
        load(ImagenetConfig(real_labels=True, validation="test"))
    (data / "real.json").write_text("[[0]]")
    load.cache_clear()
    with pytest.raises(ConfigError, match=r"real.json: expected a list of 9 lists of classes"):
        load(ImagenetConfig(real_labels=True, validation="test"))


def test_keys_without_effect_are_refused():
    for keys, words in (
        ({"dataset": "cifar10", "real_labels": True}, "real_labels=true: there are none of cifar10"),
        ({"dataset": "fashion", "orientation": "exif"}, "orientation=exif has no effect on dataset=fashion"),
        ({"dataset": "drawn", "policy": "skip"}, "policy=skip has no effect on dataset=drawn"),
        ({"train_examples": -1}, "train_examples=-1 must not be negative"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            ImagenetConfig(**keys)


# Real files


REAL = Path(os.environ.get("HGRN2_BENCH_DATA", Path(__file__).parents[3] / "shared/data"))


def test_a_real_picture_of_every_class_decodes(data, monkeypatch):
    if not (REAL / "imagenet_1img_per_class_256.parquet").is_file():
        pytest.skip(f"no imagenet_1img_per_class_256.parquet in {REAL}")
    monkeypatch.setenv("HGRN2_BENCH_DATA", str(REAL))
    found = read(validation="split")
    assert sum(map(len, found.splits.values())) == 1000
    assert found.classes == (files.timm_wnids() or found.classes)
    for split in found.splits.values():
        assert max(min(split.image(i).size) for i in range(len(split))) == 256


def test_real_cifar_10_is_named_as_jpeg(data, monkeypatch):
    if not (REAL / "cifar10_jpeg_test.parquet").is_file():
        pytest.skip(f"no cifar10_jpeg_test.parquet in {REAL}")
    monkeypatch.setenv("HGRN2_BENCH_DATA", str(REAL))
    assert fingerprint_of(ImagenetConfig(dataset="cifar10")).startswith("jpeg:")
    found = load(ImagenetConfig(dataset="cifar10"))
    assert [len(found.splits[name]) for name in ("train", "validation", "test")] == [45_000, 5_000, 10_000]
    assert np.bincount(found.splits["test"].labels_N).tolist() == [1000] * 10
