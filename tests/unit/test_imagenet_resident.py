"""Sets held as pixels: CIFAR-10, CIFAR-100 and Fashion-MNIST in every layout; damage told or counted."""

import io
import pickle

import imagenet_folders as made
import lra_folders
import numpy as np
import pytest
from PIL import Image

from hgrn2_bench.errors import DataError
from suites.imagenet import resident
from suites.imagenet.pictures import load
from suites.imagenet.settings import ImagenetConfig

pytest.importorskip("pyarrow")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder."""
    monkeypatch.setenv("HGRN2_BENCH_DATA", str(tmp_path / "data"))
    load.cache_clear()
    return tmp_path / "data"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(resident, "COUNTS", {"train": 40, "test": 10})
    monkeypatch.setattr(resident, "CIFAR_COUNTS", {"train": 40, "test": 10})


def test_cifar_10_is_read_in_every_layout_of_the_core(data, small):
    train, test = lra_folders.colours(40), lra_folders.colours(10, seed=1)
    lra_folders.write_cifar_pickles(data / "a", [train], test)
    found = load(ImagenetConfig(dataset="cifar10", validation="test"))
    assert np.array_equal(found.splits["train"].pixels_NHWC, train[0])
    assert np.array_equal(found.splits["test"].labels_N, test[1])
    assert np.array_equal(np.asarray(found.splits["test"].image(3)), test[0][3])
    assert found.classes[3] == "cat"
    split = load(ImagenetConfig(dataset="cifar10"))
    assert [len(split.splits[name]) for name in ("train", "validation", "test")] == [36, 4, 10]


def test_empty_and_damaged_pictures_of_cifar_stop_a_run_or_are_counted(data, small):
    train, test = lra_folders.colours(40), lra_folders.colours(10, seed=1)
    lra_folders.write_cifar_folders(data, train, test)
    (data / "train/cat/0003.png").write_bytes(b"")
    (data / "train/cat/0013.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"cat/0013.png: no image"):
        load(ImagenetConfig(dataset="cifar10", validation="test"))
    found = load(ImagenetConfig(dataset="cifar10", validation="test", policy="skip"))
    assert found.splits["train"].skipped == {"zero-byte file": 1, "damaged file": 1}
    assert len(found.splits["train"]) == 38
    (data / "train/cat/0013.png").unlink()
    (data / "train/cat/9.png").write_bytes((data / "train/cat/0023.png").read_bytes())
    load.cache_clear()
    with pytest.raises(DataError, match=r"cat/0003.png: zero-byte file; copy it again, or leave it out with policy=skip"):
        load(ImagenetConfig(dataset="cifar10", validation="test"))


@pytest.mark.parametrize("layout", ["pickles", "binaries", "parquet"])
def test_cifar_100_is_read_by_its_fine_labels(data, small, layout):
    pixels = lra_folders.colours(40)[0]
    fine = np.arange(40) * 2 + 1
    planes = pixels.transpose(0, 3, 1, 2).reshape(40, -1)
    data.mkdir()
    for split, number in (("train", 40), ("test", 10)):
        if layout == "pickles":
            table = {b"data": planes[:number], b"fine_labels": fine[:number].tolist(), b"coarse_labels": [0] * number}
            (data / split).write_bytes(pickle.dumps(table))
        elif layout == "binaries":
            records = np.concatenate([np.zeros((40, 1), np.uint8), fine[:, None].astype(np.uint8), planes], axis=1)
            records[:number].tofile(data / f"{split}.bin")
        else:
            write_cifar_100_parquet(data / f"{split}.parquet", pixels[:number], fine[:number])
    found = load(ImagenetConfig(dataset="cifar100", validation="test"))
    assert np.array_equal(found.splits["train"].pixels_NHWC, pixels)
    assert np.array_equal(found.splits["train"].labels_N, fine)
    assert len(found.classes) == 100
    assert (found.classes[0], found.classes[99]) == ("apple", "worm")


def write_cifar_100_parquet(path, pixels, fine):
    import pyarrow as pa
    from pyarrow import parquet

    images = []
    for each in pixels:
        buffer = io.BytesIO()
        Image.fromarray(each).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    parquet.write_table(pa.table({"img": images, "fine_label": fine, "coarse_label": fine % 20}), path)


@pytest.mark.parametrize("compressed", [True, False])
def test_fashion_is_read_from_its_idx_files(data, small, compressed):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    labels = np.arange(40) % 10
    made.write_idx(data / "x", {"train": (pixels, labels), "t10k": (pixels[:10], labels[:10])}, compressed)
    found = load(ImagenetConfig(dataset="fashion", validation="test"))
    assert np.array_equal(found.splits["train"].pixels_NHWC[..., 0], pixels)
    assert all(split.pixels_NHWC.flags.writeable for split in found.splits.values())
    assert found.splits["train"].image(1).mode == "RGB"
    assert found.classes[9] == "ankle boot"
    path = next((data / "x").glob("train-images*"))
    path.write_bytes(path.read_bytes()[:-100])
    load.cache_clear()
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*cut short"):
        load(ImagenetConfig(dataset="fashion", validation="test"))
    labels_path = next((data / "x").glob("train-labels*"))
    path.write_bytes(labels_path.read_bytes())
    with pytest.raises(DataError, match=r"no IDX file of 3 dimensions: it begins with 00 00 08 01, not 00 00 08 03"):
        load(ImagenetConfig(dataset="fashion", validation="test"))
