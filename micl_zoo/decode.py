"""Bytes -> upright RGB image, or a refusal with a named reason. Nothing is guessed and nothing is repaired."""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Reason = Literal[
    "unreadable",
    "empty",
    "not_an_image",
    "truncated",
    "damaged",
    "too_small",
    "too_large",
    "unsupported",
    "crashed",
    "timeout",
]

MAX_PIXELS = 89_478_485  # Pillow's own bomb threshold: 256 MiB as 24-bit RGB
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF tag; where width and height change places
MIN_SIDE = 2  # a side of one pixel holds no picture: tracking pixels, separators


class Refused(Exception):
    """Why one image cannot be embedded: an answer, one line in the ledger, not a failure.

    Attributes:
        reason: one word out of `Reason`, for machines.
        detail: one sentence, for people.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[Refused], tuple[Reason, str]]:
        return Refused, (self.reason, self.detail)  # so that it crosses from a worker process whole


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one encoded image to RGB, upright by its EXIF orientation, transparency on white.

    Args:
        data: the whole file.
        max_pixels: width x height above which the image is refused before it is decoded.

    Returns:
        An image of mode "RGB". Of a GIF or TIFF with several frames, the first.

    Raises:
        Refused: with the reason and a sentence.
    """
    with _refusals(data):
        return _loaded(_opened(data, max_pixels))


def decode_crop(
    data: bytes,
    box: Callable[[int, int], Sequence[float]],
    side: int,
    interpolation: Literal["bicubic", "bilinear"],
    *,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decode, cut and resize in one go, for training: a JPEG is decoded at the scale that the crop needs.

    Args:
        data: the whole file.
        box: from the upright width and height to left, top, right and bottom as shares of them.
        side: of the square crop, in pixels.
        interpolation: filter of the resize, antialiased.
        max_pixels: as for `decode`.

    Returns:
        (side, side, 3) uint8.

    Raises:
        Refused: with the reason and a sentence.
    """
    with _refusals(data):
        image = _opened(data, max_pixels)
    shares: Sequence[float] = ()
    if image.format == "JPEG":
        turned = _is_turned(image)
        shares = box(*(image.size[::-1] if turned else image.size))
        least = [math.ceil(side / (shares[axis + 2] - shares[axis])) for axis in (0, 1)]  # so that the crop has `side`
        image.draft("RGB", (least[1], least[0]) if turned else (least[0], least[1]))  # by 2, 4 or 8, never below that
    with _refusals(data):
        image = _loaded(image)
    shares = shares or box(*image.size)
    left, top, right, bottom = (share * length for share, length in zip(shares, image.size * 2, strict=True))
    cut = (left, top, min(right, image.width), min(bottom, image.height))  # not above the size by a rounding
    return np.asarray(image.resize((side, side), Image.Resampling[interpolation.upper()], box=cut))


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=_formats())
    _check_size(image.size, max_pixels)
    return image


def _loaded(image: Image.Image) -> Image.Image:
    image.load()
    return to_rgb(image)


@contextlib.contextmanager
def _refusals(data: bytes) -> Iterator[None]:
    """Whatever Pillow raises becomes a refusal with a reason."""
    if not data:
        raise Refused("empty", "the file has no bytes")
    try:
        yield
    except Refused:
        raise
    except UnidentifiedImageError:
        raise Refused("not_an_image", f"no known image format in {len(data):,} bytes") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused("too_large", str(error)) from None
    except Exception as error:  # Pillow's plug-ins raise whatever a damaged file makes them raise
        text = str(error) or type(error).__name__
        raise Refused("truncated" if "truncated" in text.lower() else "damaged", text) from None


@functools.cache
def _formats() -> tuple[str, ...]:
    """Of the picture formats, those this Pillow reads. Without EPS and the like, which start other programs."""
    Image.init()
    wanted = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "ICO", "TGA")
    return tuple(name for name in wanted if name in Image.OPEN)


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise Refused("too_large", f"{width} x {height} pixels, the limit is {max_pixels:,} in all")
    if min(width, height) < MIN_SIDE:
        raise Refused("too_small", f"{width} x {height} pixels, each side must be at least {MIN_SIDE}")


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION) in _TURNED
    except Exception:  # as in _upright
        return False


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing of the pixels, which decoded
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image as RGB: upright by its EXIF orientation, transparency on white, 16 bits cut to 8.

    Raises:
        Refused: pixels without a defined white.
    """
    image = _upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise Refused("unsupported", "32-bit float pixels have no defined white: convert the file to 8 or 16 bit")
    if image.mode.startswith("I"):  # 16-bit greyscale, whatever Pillow keeps it in
        levels = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) >> 8
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class Decoding:
    exif: Literal["upright", "keep"] = "upright"
    fast: bool = False
    max_pixels: int = MAX_PIXELS

    @property
    def id(self) -> str:
        return f"{'fast' if self.fast else 'exact'}-{self.exif}-max{self.max_pixels}"


def decode_pixels(data, transform, decoding):
    return transform.pixels(decode(data, max_pixels=decoding.max_pixels))
