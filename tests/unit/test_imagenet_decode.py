"""Decoding: right colours from every kind of file, oddities named, damage told."""

import io

import imagenet_folders as made
import numpy as np
import pytest
from PIL import Image

from hgrn2_bench.errors import DataError
from suites.imagenet.decode import decode, oddities


def test_odd_pictures_are_decoded_to_what_they_show():
    plain = np.asarray(made.picture(), np.int16)

    def near(content, tolerance):
        got = decode(content, "x")
        assert got.mode == "RGB"
        return np.abs(np.asarray(got, np.int16) - plain).max() <= tolerance

    assert near(made.encoded(kind="PNG"), 0)
    assert near(made.encoded(kind="JPEG", quality=100, subsampling=0), 6)
    assert near(made.encoded(kind="JPEG", mode="CMYK", quality=100), 8)
    assert near(made.encoded(kind="PNG", mode="RGBA"), 0)
    grey = np.asarray(decode(made.encoded(mode="L", kind="PNG"), "x"))
    assert np.array_equal(grey, np.repeat(np.asarray(made.picture(mode="L"))[..., None], 3, axis=-1))
    deep = io.BytesIO()
    Image.fromarray(np.asarray(made.picture(mode="L")).astype(np.uint16) * 257).save(deep, "PNG")
    assert np.array_equal(np.asarray(decode(deep.getvalue(), "x")), grey)
    with_transparency = made.picture(mode="P")
    palette = io.BytesIO()
    with_transparency.save(palette, "PNG", transparency=bytes([0, 255]))
    assert np.array_equal(np.asarray(decode(palette.getvalue(), "x")), np.asarray(with_transparency.convert("RGB")))


def test_exif_turns_a_picture_where_that_is_asked_for():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = made.encoded(kind="JPEG", exif=exif)
    assert decode(turned, "x").size == (12, 10)
    assert decode(turned, "x", "exif").size == (10, 12)
    assert oddities(turned, "x.jpg") == ["turned by EXIF"]


def test_oddities_are_named():
    assert oddities(made.encoded(), "a.JPEG") == []
    assert oddities(made.encoded(kind="PNG"), "n02105855_2933.JPEG") == ["PNG named JPEG"]
    assert oddities(made.encoded(mode="CMYK"), "a.jpg") == ["CMYK"]
    assert oddities(made.encoded(mode="L"), "row 3") == ["grey"]
    assert oddities(made.encoded(kind="PNG", mode="RGBA"), "a.png") == ["RGBA"]


def test_damaged_exif_data_stop_nobody_but_who_asks_for_them():
    odd = made.encoded(kind="WEBP", exif=b"Exif\0\0garbage!")
    assert decode(odd, "here").size == (12, 10)
    assert oddities(odd, "a.webp") == ["with damaged EXIF data"]
    with pytest.raises(DataError, match=r"^here: no picture, or cut short \(.+\)$"):
        decode(odd, "here", "exif")


def test_whatever_pillow_raises_names_the_picture(monkeypatch):
    def load(self):
        raise TypeError("'IFDRational' object cannot be interpreted as an integer")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(DataError, match=r"^here: no picture, or cut short .*IFDRational"):
        decode(made.encoded(kind="PNG"), "here")


@pytest.mark.parametrize(("content", "reason"), [(b"", "empty"), (b"nonsense", "of no known format")])
def test_files_that_are_no_pictures_are_told_in_the_same_words_each_time(content, reason):
    with pytest.raises(DataError, match=rf"^here: no picture, or cut short \({reason}\)$"):
        decode(content, "here")


def test_bytes_that_are_no_picture_are_told():
    for content in (b"", b"nonsense", made.encoded()[:100], made.encoded(kind="PNG")[:-30]):
        with pytest.raises(DataError, match=r"^here: no picture, or cut short \(.+\)$"):
            decode(content, "here")
