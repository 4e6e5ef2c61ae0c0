"""Files that need an optional package: parquet tables (pyarrow) and encoded images (Pillow)."""

import importlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from hgrn2_bench.errors import ConfigError, DataError

INSTALL = 'pip install "hgrn2_bench[lra]"'
PARQUET_ROWS = 1000
"""Rows held at once."""
GREY_WEIGHTS = (19595, 38470, 7471)
"""0.299, 0.587, 0.114 times 2^16: Pillow's `L`, rounded to nearest."""


def needed(module: str, package: str, purpose: str) -> ModuleType:
    """An optional module. ConfigError, one line with the command that installs it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"{purpose} needs {package}, which is not installed: {INSTALL}") from None


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Rows of some columns; of each sequence of names (`img|image`) the first that is there. DataError names file and column."""
    parquet = needed("pyarrow.parquet", "pyarrow", f"{path}: parquet")
    arrow = needed("pyarrow", "pyarrow", f"{path}: parquet")
    try:
        with parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            names = [next((name for name in column.split("|") if name in there), "") for column in columns]
            if not all(names):
                raise DataError(f"{path}: columns {', '.join(there)}; needed: {', '.join(columns)}")
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=names):
                yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)
    except (arrow.ArrowInvalid, arrow.ArrowIOError, OSError) as error:
        raise DataError(f"{path}: damaged parquet ({str(error).splitlines()[0]})") from None


def decode_image(source: Path | bytes, where: str, mode: str, size: int) -> np.ndarray:
    """A PNG or JPEG file, or its bytes, as uint8 (H, W, C) with C 1 in mode `L` and 3 in `RGB`.

    DataError, which begins with `where`, for what is no image, is cut short or is not `size` pixels in height and width.
    """
    image_module = needed("PIL.Image", "Pillow", f"{where}: an image file")
    try:
        with image_module.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            pixels = np.asarray(image.convert(mode), dtype=np.uint8)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow reports a broken PNG as a SyntaxError
        raise DataError(f"{where}: no image, or cut short ({str(error).splitlines()[0]})") from None
    if pixels.shape[:2] != (size, size):
        height, width = pixels.shape[:2]
        raise DataError(f"{where}: {width}x{height} pixels; expected {size}x{size}")
    return pixels.reshape(size, size, -1)


def grey(pixels_NHW3: np.ndarray) -> np.ndarray:
    """Luminance of RGB images, uint8 (N, H, W, 1), equal to Pillow's conversion to `L` in every value."""
    grey_NHW = np.full(pixels_NHW3.shape[:-1], 0x8000, np.uint32)
    for channel, weight in enumerate(GREY_WEIGHTS):
        grey_NHW += np.uint32(weight) * pixels_NHW3[..., channel]
    return (grey_NHW >> 16).astype(np.uint8)[..., None]
