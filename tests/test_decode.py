"""What decodes to what, and what is refused with which reason."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from micl_zoo.decode import Refused, decode


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "JPEG", "WEBP", "GIF"])
def test_common_formats(kind: str) -> None:
    image = picture(0)
    got = decode(encoded(image, kind))
    assert (got.mode, got.size) == ("RGB", image.size)
    difference = np.abs(np.asarray(got, dtype=int) - np.asarray(image, dtype=int)).mean()
    assert difference == 0 if kind in ("PNG", "BMP", "TIFF") else difference < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(orientation: int) -> None:
    upright = picture(3)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = decode(encoded(stored, "PNG", exif=exif))
    assert np.array_equal(np.asarray(got), np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_does_not_cost_the_picture() -> None:
    data = encoded(picture(0), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert decode(data).size == picture(0).size


def test_transparency_is_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    got = decode(encoded(image, "PNG"))
    assert got.getpixel((0, 0)) == (255, 0, 0)
    assert got.getpixel((3, 3)) == (255, 255, 255)
    palette = image.quantize(4)
    assert decode(encoded(palette, "GIF", transparency=palette.getpixel((3, 3)))).getpixel((3, 3)) == (255, 255, 255)


def test_a_transparent_colour_of_an_rgb_png_is_white() -> None:
    image = Image.new("RGB", (4, 4), (9, 8, 7))
    assert decode(encoded(image, "PNG", transparency=(9, 8, 7))).getpixel((0, 0)) == (255, 255, 255)


def test_lab_pixels_decode_or_are_refused() -> None:
    with contextlib.suppress(Refused):
        assert decode(encoded(Image.new("LAB", (4, 4)), "TIFF")).mode == "RGB"


def test_sixteen_bits_are_cut_to_eight() -> None:
    levels = np.array([[0, 257 * 10], [257 * 128, 65535]], dtype=np.uint16)
    got = np.asarray(decode(encoded(Image.fromarray(levels), "PNG")))
    assert got[:, :, 0].tolist() == [[0, 10], [128, 255]]
    assert np.array_equal(got[:, :, 0], got[:, :, 2])


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    grey = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    got = decode(encoded(grey, kind))
    assert (got.mode, got.getpixel((4, 4))) == ("RGB", (255, 255, 255))


def refusal(data: bytes, **options: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        decode(data, **options)
    return caught.value


def test_refusals_name_their_reason() -> None:
    jpeg = encoded(picture(0, 200, 200), "JPEG", quality=95)
    assert refusal(b"").reason == "empty"
    assert refusal(b"Dear Sir or Madam").reason == "not_an_image"
    assert refusal(jpeg[: len(jpeg) // 2]).reason == "truncated"
    assert refusal(encoded(Image.new("RGB", (1, 1)), "PNG")).reason == "too_small"
    assert "at least 2" in refusal(encoded(Image.new("RGB", (1, 9)), "PNG")).detail
    assert refusal(jpeg, max_pixels=1000).reason == "too_large"
    assert "200 x 200" in refusal(jpeg, max_pixels=1000).detail
    assert refusal(encoded(Image.new("F", (4, 4)), "TIFF")).reason == "unsupported"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_no_cut_of_a_file_does_anything_but_decode_or_refuse(kind: str) -> None:
    data = encoded(picture(0, 64, 64), kind)
    for tenth in range(10):
        with contextlib.suppress(Refused):
            assert decode(data[: len(data) * tenth // 10]).mode == "RGB"


def test_a_refusal_survives_the_way_between_processes() -> None:
    import pickle

    copy = pickle.loads(pickle.dumps(Refused("truncated", "cut off")))
    assert (copy.reason, copy.detail, str(copy)) == ("truncated", "cut off", "truncated: cut off")
