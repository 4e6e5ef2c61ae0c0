"""Readers of CIFAR-10 and of Pathfinder: every layout, splits as published, and each kind of damage told in one line."""

import io
import pickle
import sys

import lra_folders as made
import numpy as np
import pytest
from PIL import Image

from hgrn2_bench.errors import ConfigError, DataError
from hgrn2_bench.images import decode_image, grey
from hgrn2_bench.subsets import random_parts
from suites.lra.images import read_images
from suites.lra.places import CLASSES, find
from suites.lra.readers import read

ANY = {"counts": {}}


# Image


def test_grey_is_that_of_pillow_for_every_kind_of_pixel():
    rng = np.random.default_rng(0)
    corners = np.array([[r, g, b] for r in (0, 1, 127, 254, 255) for g in (0, 1, 128, 255) for b in (0, 1, 129, 255)], np.uint8)
    pixels = np.concatenate([corners, rng.integers(0, 256, (100_000, 3), dtype=np.uint8)])[None]
    assert np.array_equal(grey(pixels)[..., 0], np.asarray(Image.fromarray(pixels).convert("L")))


def write_image_parquet(folder, train, test, column="img", struct=True):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder.mkdir(parents=True, exist_ok=True)
    for split, (pixels, labels) in {"train": train, "test": test}.items():
        contents = []
        for image in pixels:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            contents.append({"bytes": buffer.getvalue(), "path": None} if struct else buffer.getvalue())
        parquet.write_table(pa.table({column: contents, "label": labels}), folder / f"{split}-00000-of-00001.parquet")


LAYOUTS = {
    "pickles": lambda folder, train, test: made.write_cifar_pickles(folder / "a", [train], test),
    "new pickles": lambda folder, train, test: made.write_cifar_pickles(folder / "a", [train], test, protocol=5),
    "binaries": lambda folder, train, test: made.write_cifar_binaries(folder / "a", [train], test),
    "folders": made.write_cifar_folders,
    "numbered folders": lambda folder, train, test: made.write_cifar_folders(folder, train, test, tuple("0123456789")),
    "parquet": write_image_parquet,
    "older parquet": lambda folder, train, test: write_image_parquet(folder, train, test, "image", struct=False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_cifar_gives_the_same_images(tmp_path, layout):
    pixels, labels = made.colours(40)
    labels = np.sort(labels)  # folders give classes in turn
    LAYOUTS[layout](tmp_path, (pixels, labels), made.colours(10, seed=1))
    for in_grey, whole in ((True, grey(pixels)), (False, pixels)):
        splits = read("image", tmp_path, grey=in_grey, **ANY)
        kept, held_out = random_parts((36, 4), 42)
        for split, part in (("train", kept), ("val", held_out)):
            assert np.array_equal(splits[split].inputs, whole[part])
            assert np.array_equal(splits[split].labels_N, labels[part])
        assert splits["test"].inputs.shape == (10, 32, 32, 1 if in_grey else 3)
        assert splits["test"].inputs.dtype == np.uint8


def test_batches_are_joined_in_their_order_and_counted(tmp_path):
    batches = [made.colours(10, seed) for seed in range(5)]
    made.write_cifar_pickles(tmp_path / "cifar", batches, made.colours(10))
    splits = read("image", tmp_path, grey=False, counts={"train": 50, "test": 10})
    whole = np.concatenate([pixels for pixels, _ in batches])
    assert np.array_equal(splits["train"].inputs, whole[random_parts((45, 5), 42)[0]])
    with pytest.raises(DataError, match="train: 50 items, expected 50,000"):
        read("image", tmp_path)
    part = read("image", tmp_path, items={"val": 3}, **ANY)
    assert [len(part[split]) for split in ("train", "val", "test")] == [45, 3, 10]


class Trap:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_that_names_code_is_refused_and_not_run(tmp_path, capsys):
    made.write_cifar_pickles(tmp_path / "a", [made.colours(10)], made.colours(10))
    (tmp_path / "a/data_batch_1").write_bytes(pickle.dumps({b"data": Trap(), b"labels": []}))
    with pytest.raises(DataError, match=r"data_batch_1: no CIFAR-10 pickle.*it names builtins.print"):
        read("image", tmp_path, **ANY)
    assert capsys.readouterr().out == ""


def test_damaged_files_of_cifar_are_named(tmp_path):
    made.write_cifar_pickles(tmp_path / "a", [made.colours(10)], made.colours(10))
    path = tmp_path / "a/data_batch_1"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="data_batch_1: no CIFAR-10 pickle, or cut short"):
        read("image", tmp_path / "a", **ANY)
    path.write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.int64), b"labels": [0, 1]}))
    with pytest.raises(DataError, match=r"data_batch_1: data int64 \(2, 3072\) for 2 labels; expected uint8"):
        read("image", tmp_path / "a", **ANY)
    made.write_cifar_binaries(tmp_path / "b", [made.colours(10)], made.colours(10))
    path = tmp_path / "b/data_batch_1.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_1.bin: 30729 bytes, no multiple of 3073: cut short"):
        read("image", tmp_path / "b", **ANY)
    path.write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(DataError, match=r"data_batch_1.bin: labels 10 to 10; CIFAR-10 has 0 to 9"):
        read("image", tmp_path / "b", **ANY)


def test_hidden_folders_are_no_class_and_empty_pictures_are_counted(tmp_path):
    made.write_cifar_folders(tmp_path, made.colours(20), made.colours(10))
    (tmp_path / "train/.ipynb_checkpoints").mkdir()
    (tmp_path / "train/cat/zz.png").touch()
    splits = read("image", tmp_path, **ANY)
    assert len(splits["train"]) + len(splits["val"]) == 20
    assert splits["train"].skipped == {"zero-byte file": 1}
    assert splits["test"].skipped == {}
    (tmp_path / "train/cattle").mkdir()
    (tmp_path / "train/dog").rename(tmp_path / "train/.dog")
    with pytest.raises(DataError, match="class folders missing: dog; unknown: cattle"):
        read("image", tmp_path, **ANY)


def test_a_picture_cut_short_or_of_another_size_is_named(tmp_path):
    made.write_cifar_folders(tmp_path, made.colours(20), made.colours(10))
    path = tmp_path / f"train/{CLASSES[0]}/0000.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"airplane/0000.png: no image, or cut short"):
        read("image", tmp_path, **ANY)
    Image.new("RGB", (28, 32)).save(path)
    with pytest.raises(DataError, match=r"airplane/0000.png: 28x32 pixels; expected 32x32"):
        read("image", tmp_path, **ANY)


def test_a_damaged_or_foreign_parquet_is_told(tmp_path):
    write_image_parquet(tmp_path, made.colours(20), made.colours(10))
    path = tmp_path / "train-00000-of-00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=r"train-00000-of-00001.parquet: no parquet file, or cut short"):
        find(tmp_path, "image")
    path.write_bytes(whole[:4] + bytes(2000) + whole[2004:])
    with pytest.raises(DataError, match=r"train-00000-of-00001.parquet.*(damaged parquet|no image)"):
        read("image", tmp_path, **ANY)


def test_a_missing_package_is_one_line_with_its_install_command(tmp_path, monkeypatch):
    made.write_cifar_folders(tmp_path, made.colours(10), made.colours(10))
    place = find(tmp_path, "image")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ConfigError, match=r'needs Pillow, which is not installed: pip install "hgrn2_bench\[lra\]"'):
        read_images(place, None)


def test_bytes_that_are_no_image_are_told():
    with pytest.raises(DataError, match="row 3: no image, or cut short"):
        decode_image(b"nonsense", "row 3", "L", 32)


# Pathfinder


@pytest.mark.parametrize("binary", [False, True])
def test_pathfinder_is_split_as_published_whatever_its_metadata_are(tmp_path, binary):
    root = made.write_pathfinder(tmp_path, batches=(10, 9), binary=binary)
    splits = read("pathfinder", tmp_path, count=None)
    order = [root / f"imgs/{batch}/sample_{i}.png" for batch in (9, 10) for i in range(20)]
    parts = random_parts((32, 4, 4), 42)
    for split, part in zip(("train", "val", "test"), parts, strict=True):
        expected = [np.asarray(Image.open(order[i])) for i in part]
        assert np.array_equal(splits[split].inputs[..., 0], expected)
        assert splits[split].labels_N.tolist() == [i % 20 % 2 for i in part]


def test_empty_pictures_are_left_out_before_the_split_and_counted(tmp_path):
    root = made.write_pathfinder(tmp_path)
    (root / "imgs/0/sample_3.png").write_bytes(b"")
    splits = read("pathfinder", tmp_path, count=40, items={"train": 10})
    assert [len(splits[split]) for split in ("train", "val", "test")] == [10, 3, 3]
    assert splits["train"].skipped == {"zero-byte file": 1}


def test_another_difficulty_must_be_asked_for(tmp_path):
    made.write_pathfinder(tmp_path, difficulty="curv_baseline", contour=6)
    assert len(read("pathfinder", tmp_path, difficulty="curv_baseline", count=None)["val"]) == 4
    with pytest.raises(DataError, match="no curv_contour_length_14 split of pathfinder"):
        read("pathfinder", tmp_path)


def test_broken_metadata_name_file_and_line(tmp_path):
    root = made.write_pathfinder(tmp_path)
    path = root / "metadata/0.npy"
    path.write_text(path.read_text() + "imgs/0 sample_20.png 20 1\n")
    with pytest.raises(DataError, match=r"metadata/0.npy:21: 'imgs/0 sample_20.png 20 1' is no line of metadata"):
        read("pathfinder", tmp_path)
    path.write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(DataError, match=r"metadata/0.npy: neither text nor a NumPy array of strings"):
        read("pathfinder", tmp_path)
    for each in (root / "metadata").glob("*.npy"):
        each.write_text("")
    with pytest.raises(DataError, match="metadata: its files are empty"):
        read("pathfinder", tmp_path)


def test_missing_and_broken_pictures_are_named(tmp_path):
    root = made.write_pathfinder(tmp_path)
    path = root / "imgs/1/sample_7.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"imgs/1/sample_7.png: no image, or cut short"):
        read("pathfinder", tmp_path, count=None)
    path.unlink()
    with pytest.raises(DataError, match=r"metadata/1.npy:8: no file .*imgs/1/sample_7.png"):
        read("pathfinder", tmp_path, count=None)


def test_a_folder_of_another_difficulty_or_resolution_is_refused(tmp_path):
    made.write_pathfinder(tmp_path / "a", contour=9)
    with pytest.raises(DataError, match="contours of 9 dashes, expected 14: another difficulty under this name"):
        read("pathfinder", tmp_path / "a", count=None)
    made.write_pathfinder(tmp_path / "b")
    (tmp_path / "b/pathfinder32").rename(tmp_path / "b/pathfinder128")
    with pytest.raises(DataError, match="32x32 pixels; expected 128x128"):
        read("pathx", tmp_path / "b", count=None)


def test_labels_of_other_pictures_are_refused(tmp_path):
    root = made.write_pathfinder(tmp_path, size=128, margins=(2, 3), each=30)
    assert read("pathx", tmp_path, count=None)["train"].inputs.shape == (48, 128, 128, 1)
    (root / "imgs/0").rename(root / "imgs/other")
    (root / "imgs/1").rename(root / "imgs/0")
    (root / "imgs/other").rename(root / "imgs/1")
    with pytest.raises(DataError, match="its metadata belong to other pictures"):
        read("pathx", tmp_path, count=None)


def test_too_few_images_are_refused(tmp_path):
    made.write_pathfinder(tmp_path, batches=(0,), each=5)
    with pytest.raises(DataError, match="5 images, too few"):
        read("pathfinder", tmp_path, count=None)
    with pytest.raises(DataError, match=r"5 items, expected 200,000"):
        read("pathfinder", tmp_path)
