"""Tiny made-up sets of pictures, in every layout that the imagenet suite reads."""

import gzip
import io
import json
import tarfile

import numpy as np
from PIL import Image

WNIDS = ("n01440764", "n01443537", "n02105855")


def picture(seed=0, size=(12, 10), mode="RGB"):
    """A Pillow image of smooth random colours, `size` wide and high."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BILINEAR).convert(mode)


def encoded(seed=0, kind="JPEG", mode="RGB", **options):
    buffer = io.BytesIO()
    picture(seed, mode=mode).save(buffer, kind, **options)
    return buffer.getvalue()


def items(number, classes, seed=0):
    """(bytes, label) of so many pictures, each class in turn."""
    return [(encoded(seed + i), i % classes) for i in range(number)]


def write_folders(folder, splits, names=WNIDS):
    """`splits`: split -> [(bytes, label)]."""
    for split, those in splits.items():
        for name in names:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
        for i, (content, label) in enumerate(those):
            stem = f"ILSVRC2012_val_{i + 1:08}" if split == "val" else f"{names[label]}_{i}"
            (folder / split / names[label] / f"{stem}.JPEG").write_bytes(content)


def write_parquet(folder, splits, names=WNIDS, struct=True, column="image", files=2):
    """Each split in so many files; with `names` as the Hub writes class names."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    for split, those in splits.items():
        for part in range(files):
            contents = [content for content, _ in those[part::files]]
            images = [{"bytes": content, "path": f"ILSVRC2012_val_{i + 1:08}.JPEG"} for i, content in enumerate(contents)]
            table = pa.table({column: images if struct else contents, "label": [label for _, label in those[part::files]]})
            if names:
                features = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
                table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
            parquet.write_table(table, folder / f"{split}-{part:05}-of-{files:05}.parquet")


def write_tars(folder, splits, labels="cls", info=False, files=2):
    folder.mkdir(parents=True, exist_ok=True)
    names = {split: [f"set-{split}-{part:04}.tar" for part in range(files)] for split in splits}
    for split, those in splits.items():
        for part, name in enumerate(names[split]):
            with tarfile.open(folder / name, "w") as tar:
                for i, (content, label) in enumerate(those[part::files]):
                    told = str(label).encode() if labels == "cls" else json.dumps({"label": label, "filename": "x"}).encode()
                    for ending, each in (("jpg", content), (labels, told)):
                        member = tarfile.TarInfo(f"{split}_{part}_{i}.{ending}")
                        member.size = len(each)
                        tar.addfile(member, io.BytesIO(each))
    if info:
        splits_of = {split: {"name": split, "filenames": files} for split, files in names.items()}
        (folder / "_info.json").write_text(json.dumps({"splits": splits_of}))


def write_idx(folder, splits, compressed=True):
    """`splits`: `train` or `t10k` -> (uint8 (N, 28, 28), labels)."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, (pixels, labels) in splits.items():
        for kind, magic, array in (("images-idx3", 2051, pixels), ("labels-idx1", 2049, labels.astype(np.uint8))):
            content = np.array([magic, *array.shape], ">u4").tobytes() + array.tobytes()
            path = folder / f"{split}-{kind}-ubyte{'.gz' if compressed else ''}"
            path.write_bytes(gzip.compress(content) if compressed else content)
