"""Tiny made-up copies of the Long Range Arena's data, in every layout that its readers accept."""

import gzip
import json
import pickle

import numpy as np
from PIL import Image

from suites.lra.places import CLASSES

LISTOPS_ROW = "( ( ( [MAX 2 ) 9 ) ] )\t9"
DASHES = {32: "2 0.5", 128: "5 1.5"}


def write_listops(folder, rows=(LISTOPS_ROW,) * 3):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        (folder / f"basic_{split}.tsv").write_text("\r\n".join(["Source\tTarget", *rows, ""]), newline="")


def write_imdb_folders(folder, texts):
    """`texts`: split -> (negative, positive)."""
    for split, both in texts.items():
        for name, those in zip(("neg", "pos"), both, strict=True):
            (folder / split / name).mkdir(parents=True)
            for i, text in enumerate(those):
                (folder / split / name / f"{i}_{i % 4 + 1}.txt").write_bytes(text.encode())
    (folder / "train/unsup").mkdir(exist_ok=True)
    (folder / "train/unsup/0_0.txt").write_text("not to be read: Z")


def write_imdb_lines(folder, rows, name="imdb_{}.jsonl.gz"):
    """`rows`: split -> [(text, label)]."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, those in rows.items():
        content = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in those).encode()
        (folder / name.format(split)).write_bytes(gzip.compress(content) if name.endswith("gz") else content)


def write_aan(folder, rows):
    """`rows`: split -> lines without their ends."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, those in rows.items():
        (folder / f"new_aan_pairs.{split}.tsv").write_bytes("".join(f"{line}\n" for line in those).encode())


def aan_rows(number, text='a "quoted" paper'):
    return [f"{i % 2}.0\t{i}\t{i + 1}\t{text} {i}\tother" for i in range(number)]


def colours(number, seed=0):
    """Images uint8 (N, 32, 32, 3) and their labels, each class in turn."""
    return np.random.default_rng(seed).integers(0, 256, (number, 32, 32, 3), dtype=np.uint8), np.arange(number) % 10


def write_cifar_pickles(folder, batches, test, protocol=2):
    folder.mkdir(parents=True)
    for name, (pixels, labels) in {**{f"data_batch_{i + 1}": batch for i, batch in enumerate(batches)}, "test_batch": test}.items():
        planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        (folder / name).write_bytes(pickle.dumps({b"data": planes, b"labels": labels.tolist()}, protocol=protocol))


def write_cifar_binaries(folder, batches, test):
    folder.mkdir(parents=True)
    for name, (pixels, labels) in {**{f"data_batch_{i + 1}": batch for i, batch in enumerate(batches)}, "test_batch": test}.items():
        planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        np.concatenate([labels[:, None].astype(np.uint8), planes], axis=1).tofile(folder / f"{name}.bin")


def write_cifar_folders(folder, train, test, names=CLASSES):
    for split, (pixels, labels) in {"train": train, "test": test}.items():
        for name in names:
            (folder / split / name).mkdir(parents=True)
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            Image.fromarray(image).save(folder / split / names[label] / f"{i:04}.png")


def margin_picture(margin, size, rng):
    """Dashes in rows, with gaps of about twice the margin."""
    pixels = np.zeros((size, size), np.uint8)
    start = int(rng.integers(2, 6))
    for y in range(start, size - 4, 20):
        for x in range(start, size - 8, 5 + 2 * margin):
            pixels[y : y + 2, x : x + 5] = 200
    return pixels


def write_pathfinder(folder, size=32, difficulty="curv_contour_length_14", contour=14, batches=(0, 1), each=20, margins=(1,), binary=False):
    """A difficulty of a resolution; pictures show their margins, labels alternate."""
    rng = np.random.default_rng(0)
    root = folder / f"pathfinder{size}" / difficulty
    (root / "metadata").mkdir(parents=True)
    for batch in batches:
        (root / f"imgs/{batch}").mkdir(parents=True)
        lines = []
        for i in range(each):
            margin = int(rng.choice(margins))
            Image.fromarray(margin_picture(margin, size, rng)).save(root / f"imgs/{batch}/sample_{i}.png")
            lines.append(f"imgs/{batch} sample_{i}.png {i} {i % 2} 1.8 {contour} 4 {DASHES[size]} {margin} 1")
        path = root / f"metadata/{batch}.npy"
        if binary:
            np.save(path, np.array([line.split() for line in lines]))
        else:
            path.write_text("\n".join(lines) + "\n")
    return root
