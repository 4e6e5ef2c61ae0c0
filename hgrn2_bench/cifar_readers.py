"""The images of CIFAR-10 and CIFAR-100, file by file, from every layout that `hgrn2_bench.cifar` finds.

Shape letters: N items, H height, W width.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hgrn2_bench.cifar import BINARIES, FOLDERS, IMAGE_COLUMN, PARQUET, PICKLES, SIZE, Cifar
from hgrn2_bench.errors import DataError
from hgrn2_bench.files import subfolders
from hgrn2_bench.images import decode_image
from hgrn2_bench.rows import parquet_rows

PIXELS = 3 * SIZE * SIZE
PICTURES = (".png", ".jpg", ".jpeg")


class Batch(NamedTuple):
    """Images in colour, uint8 (N, 32, 32, 3), their labels, int64, and where images were left out: empty files, and damaged ones."""

    pixels_NHW3: np.ndarray
    labels_N: np.ndarray
    empty: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()


def read_batches(cifar: Cifar, layout: str, paths: Sequence[Path], skip: bool = False) -> Iterator[Batch]:
    """Images of each file, or folder of class folders. DataError names the file, and the row in it, that cannot be used.

    With `skip`, encoded images that do not decode are left out as empty ones always are.
    """
    for path in paths:
        batch = _encoded_batch(ENCODED[layout](cifar, path), skip) if layout in ENCODED else ARRAYS[layout](cifar, path)
        if not len(batch.labels_N):
            raise DataError(f"{path}: no images")
        last = len(cifar.classes) - 1
        if batch.labels_N.min() < 0 or batch.labels_N.max() > last:
            raise DataError(f"{path}: labels {batch.labels_N.min()} to {batch.labels_N.max()}; {cifar.name} has 0 to {last}")
        yield batch


class _ArraysOnly(pickle.Unpickler):
    """Loads numpy arrays, bytes, strings, numbers, lists and dictionaries; a pickle that names anything else is refused, not run."""

    ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
        **{(f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0] for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(pickle.HIGHEST_PROTOCOL)[0] for core in ("core", "_core")},
    }

    def find_class(self, module: str, name: str) -> Any:
        """One of the few names that arrays need."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self.ALLOWED[module, name]


def _pickle_batch(cifar: Cifar, path: Path) -> Batch:
    try:
        with path.open("rb") as file:
            found = _ArraysOnly(file, encoding="bytes").load()
        named = {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}
        pixels, labels = np.asarray(named["data"]), np.asarray(named[cifar.key])
    except Exception as error:  # damaged pickles raise nearly anything
        raise DataError(f"{path}: no {cifar.name} pickle, or cut short ({type(error).__name__}: {error})") from None
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), PIXELS):
        raise DataError(f"{path}: data {pixels.dtype} {pixels.shape} for {len(labels)} labels; expected uint8 (N, {PIXELS})")
    return Batch(_planes(pixels), labels.astype(np.int64))


def _binary_batch(cifar: Cifar, path: Path) -> Batch:
    raw, record = np.fromfile(path, np.uint8), cifar.label_bytes + PIXELS
    if len(raw) % record:
        raise DataError(f"{path}: {len(raw)} bytes, no multiple of {record}: cut short, or not {cifar.name}; copy it again")
    records = raw.reshape(-1, record)
    return Batch(_planes(records[:, cifar.label_bytes :]), records[:, cifar.label_bytes - 1].astype(np.int64))


def _planes(pixels: np.ndarray) -> np.ndarray:
    """Images of a plane for each colour, row by row, as (N, H, W, 3)."""
    return np.ascontiguousarray(pixels.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1))


class Encoded(NamedTuple):
    """An image file, or its bytes, and its label."""

    source: Path | bytes
    where: str
    label: int

    @property
    def is_empty(self) -> bool:
        """Whether the file has no bytes."""
        return not (self.source.stat().st_size if isinstance(self.source, Path) else self.source)


def _encoded_batch(images: Iterator[Encoded], skip: bool) -> Batch:
    pixels, labels, empty, damaged = [], [], [], []
    for each in images:
        if each.is_empty:
            empty.append(each.where)
            continue
        try:
            pixels.append(decode_image(each.source, each.where, "RGB", SIZE))
        except DataError:
            if not skip:
                raise
            damaged.append(each.where)
            continue
        labels.append(each.label)
    return Batch(np.array(pixels), np.array(labels, np.int64), tuple(empty), tuple(damaged))


def _in_folders(cifar: Cifar, folder: Path) -> Iterator[Encoded]:
    """Pictures by class folder, in the order of the labels; hidden folders are none."""
    paths = {path.name: path for path in subfolders(folder)}
    names, numbers = cifar.folder_names
    classes = numbers if set(paths) == set(numbers) else names
    if set(paths) != set(classes):
        missing, foreign = sorted(set(classes) - set(paths)), sorted(set(paths) - set(classes))
        raise DataError(f"{folder}: class folders missing: {', '.join(missing) or 'none'}; unknown: {', '.join(foreign) or 'none'}")
    for label, name in enumerate(classes):
        for path in sorted(path for path in paths[name].iterdir() if path.suffix.lower() in PICTURES and not path.name.startswith(".")):
            yield Encoded(path, str(path), label)


def _in_parquet(cifar: Cifar, path: Path) -> Iterator[Encoded]:
    for number, (image, label) in enumerate(parquet_rows(path, (IMAGE_COLUMN, cifar.label))):
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes | None) or not isinstance(label, int):
            kinds = f"{type(content).__name__} and {type(label).__name__}"
            raise DataError(f"{path}, row {number}: image and label are {kinds}; expected the bytes of a file and a number")
        yield Encoded(content or b"", f"{path}, row {number}", label)


ARRAYS: dict[str, Callable[[Cifar, Path], Batch]] = {PICKLES: _pickle_batch, BINARIES: _binary_batch}
ENCODED: dict[str, Callable[[Cifar, Path], Iterator[Encoded]]] = {FOLDERS: _in_folders, PARQUET: _in_parquet}
"""How a layout is read."""
