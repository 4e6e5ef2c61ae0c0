"""Pictures as RGB, whatever their files hold; files are told by their content, not by their name.

A JPEG whose data end early is refused. One with wrong bytes in its middle decodes to something: its format has no checksums.
"""

from __future__ import annotations

import io
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

from hgrn2_bench.errors import DataError
from hgrn2_bench.rows import needed

if TYPE_CHECKING:
    from PIL.Image import Image

INSTALL = 'pip install "hgrn2_bench[vision]"'
ORIENTATION = 0x0112
"""The EXIF tag; 1 is upright."""


def pillow(purpose: str, module: str = "PIL.Image") -> ModuleType:
    """A module of Pillow's. ConfigError with the command that installs it."""
    return needed(module, "Pillow", purpose, INSTALL)


def decode(content: bytes, where: str, orientation: str = "stored") -> Image:
    """An encoded picture as a Pillow image of mode RGB. DataError, which begins with `where`, for what is none or is cut short.

    CMYK is converted, grey repeated, 16 bits are scaled to 8, transparency is dropped as the usual loaders drop it. `orientation=exif`
    turns the picture as its EXIF data say.
    """
    with quiet():
        return decode_aloud(content, where, orientation)


def quiet() -> warnings.catch_warnings:
    """No word about damaged EXIF data, transparent palettes and large pictures: none hinders decoding. Not for threads: it is global."""
    return warnings.catch_warnings(action="ignore")


def decode_aloud(content: bytes, where: str, orientation: str = "stored") -> Image:
    """`decode` with Pillow's warnings."""
    module = pillow(f"{where}: a picture")
    try:
        with module.open(io.BytesIO(content)) as image:
            image.load()
            if orientation == "exif":
                image = pillow(where, "PIL.ImageOps").exif_transpose(image)
            return _to_rgb(image)
    except Exception as error:  # damaged files make Pillow raise nearly anything
        if isinstance(error, module.UnidentifiedImageError):
            reason = "of no known format" if content else "empty"
        else:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{where}: no picture, or cut short ({reason})") from None


def _to_rgb(image: Image) -> Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips all above 255 to white
        return image.point(lambda value: value / 257, "L").convert("RGB")
    return image.convert("RGB")


def oddities(content: bytes, name: str) -> list[str]:
    """What a check tells of a picture that decodes: another format than its name says, colours other than RGB, a turned camera."""
    module = pillow(f"{name}: a picture")
    with quiet(), module.open(io.BytesIO(content)) as image:
        named = module.registered_extensions().get("." + name.lower().rpartition(".")[2])
        found = [f"{image.format} named {named}"] if named and image.format not in (named, "MPO") else []
        found += {"L": ["grey"], "RGB": []}.get(image.mode, [image.mode])
        try:
            turned = image.getexif().get(ORIENTATION, 1) not in (0, 1)
        except Exception:  # as in `decode_aloud`
            return [*found, "with damaged EXIF data"]
        return found + ["turned by EXIF"] * turned
