"""Pictures: encoded ones (Pillow), and the grey of coloured ones."""

import io
from pathlib import Path

import numpy as np

from hgrn2_bench.errors import DataError
from hgrn2_bench.rows import needed

EMPTY = "zero-byte file"
"""Why a picture is left out whose file holds nothing."""
GREY_WEIGHTS = (19595, 38470, 7471)
"""0.299, 0.587, 0.114 times 2^16: Pillow's `L`, rounded to nearest."""


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
