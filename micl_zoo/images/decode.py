"""Decodes bytes to an upright RGB image, or refuses them by a named reason; guesses and repairs nothing."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import Refused, UsageError, unknown
from .integrity import check_file, check_tags, jpeg_pieces
from .transform import Filter, Transform, resized_part

Exif = Literal["upright", "keep"]

MAX_PIXELS = 89_478_485  # Pillow's own bomb threshold: 256 MiB as 24-bit RGB; it refuses twice as many itself
MIN_SIDE = 2  # a side of one pixel holds no picture: tracking pixels, separators
# By benchmarks/decode.py the worst cosine of 111 photographs is 0.982 at 1 and at 1.5, 0.9991 at 2; of 4000 x 3000 of
# thin lines, text, noise and rings the worst is 0.9988, of text, at each: 1/8 of it is over twice what 112 pixels need.
FAST_MARGIN = 2.0
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF tag; where width and height change places
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_UPRIGHT = {orientation: Image.Transpose[turn] for orientation, turn in enumerate(_TURNS, 2)}
# Formats that are read, by Pillow's names, and the suffixes of their files. EPS and the like are left out: they start
# other programs. HEIF and AVIF are there also where this Pillow cannot read them: what is listed must not depend on the
# packages of the machine, and such files are refused by name.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heics", ".heif", ".heifs", ".hif"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "ICO": (".ico",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
_JPEGS = ("JPEG", "MPO")  # MPO: with more pictures behind, as phones and stereo cameras write
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")


@dataclass(frozen=True)
class Decoding:
    """Says how the bytes of a file become the pixels that an encoder sees."""

    exif: Exif = "upright"  # turned as EXIF says; "keep": as stored, except a HEIC, which its decoding always turns
    # Decode a JPEG at a scale of 1/2, 1/4 or 1/8, with at least FAST_MARGIN times the pixels that the resize needs in
    # each direction, and compute only what the crop keeps. False is the transform to the bit.
    fast: bool = False
    max_pixels: int = MAX_PIXELS  # width x height above which a file is refused before it is decoded

    def __post_init__(self) -> None:
        if self.exif not in get_args(Exif):
            raise UsageError(unknown("exif", self.exif, get_args(Exif)))
        if not 1 <= self.max_pixels <= 2 * MAX_PIXELS:
            raise UsageError(f"max_pixels must be 1 to {2 * MAX_PIXELS:,}, Pillow's own limit; got {self.max_pixels:,}")

    @property
    def id(self) -> str:
        """Name every choice: two stores with the same id and transform id saw the same pixels."""
        return f"{'fast' if self.fast else 'exact'}-{self.exif}-max{self.max_pixels}"

    @classmethod
    def from_id(cls, name: str) -> Decoding:
        """Return the decoding that has this id."""
        match = re.fullmatch(r"(exact|fast)-(upright|keep)-max(\d+)", name)
        if match is None:
            raise UsageError(f"unknown decoding {name!r}: it was made by a newer version, upgrade micl-zoo")
        return cls(exif=cast(Exif, match[2]), fast=match[1] == "fast", max_pixels=int(match[3]))


def decode(data: bytes, *, exif: Exif = "upright", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one encoded image, of several frames the first, to RGB, transparency on white; see `Decoding`."""
    with _refusals(data):
        return to_rgb(_loaded(_opened(data, max_pixels), data), exif=exif)


def decode_pixels(data: bytes, transform: Transform, decoding: Decoding = Decoding()) -> np.ndarray:
    """Decode to the (size, size, 3) uint8 an encoder takes: if exact, equal to `transform.pixels(decode(data))`."""
    if not decoding.fast or transform.size > transform.resize:  # no crop to fuse where it is larger than the picture
        image = decode(data, exif=decoding.exif, max_pixels=decoding.max_pixels)
        with _refusals(data):
            return transform.pixels(image)
    box, most, exif = functools.partial(_kept, transform), decoding.max_pixels, decoding.exif
    return decode_crop(
        data, box, transform.size, transform.interpolation, max_pixels=most, margin=FAST_MARGIN, exif=exif
    )


def decode_crop(
    data: bytes,
    box: Callable[[int, int], Sequence[float]],  # upright width and height -> left, top, right, bottom as their shares
    side: int,  # of the square crop, in pixels
    interpolation: Filter,  # antialiased
    *,
    max_pixels: int = MAX_PIXELS,
    margin: float = 1.0,  # a JPEG is decoded to at least this many times the pixels of the crop in each direction
    exif: Exif = "upright",
) -> np.ndarray:
    """Decode, cut and resize to (side, side, 3) uint8 in one go; a JPEG is decoded at the scale that the crop needs."""
    with _refusals(data):
        image = _opened(data, max_pixels)
    shares: Sequence[float] = ()
    if image.format in _JPEGS:
        turned = exif == "upright" and _orientation(image) in _TURNED
        shares = box(*(image.size[::-1] if turned else image.size))
        least = [math.ceil(margin * side / (shares[axis + 2] - shares[axis])) for axis in (0, 1)]
        image.draft("RGB", (least[1], least[0]) if turned else (least[0], least[1]))  # by 2, 4 or 8, never below that
    with _refusals(data):
        image = to_rgb(_loaded(image, data), exif=exif)
    shares = shares or box(*image.size)
    with _refusals(data):
        left, top, right, bottom = (share * length for share, length in zip(shares, image.size * 2, strict=True))
        cut = (left, top, min(right, image.width), min(bottom, image.height))  # not above the size by a rounding
        return np.asarray(image.resize((side, side), Image.Resampling[interpolation.upper()], box=cut))


def _kept(transform: Transform, width: int, height: int) -> tuple[float, float, float, float]:
    """Find what `Transform.pixels` keeps of a picture, as shares of its sides: left, top, right, bottom."""
    short, side = min(width, height), transform.size
    near, far = [0.0, 0.0], [1.0, 1.0]
    for axis, length in enumerate((width, height)):
        before, strip = resized_part(length, short)
        scaled = int(transform.resize * strip / short)
        start = round((scaled - side) / 2)
        near[axis] = (before + start * strip / scaled) / length
        far[axis] = (before + (start + side) * strip / scaled) / length
    return near[0], near[1], far[0], far[1]


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    check_tags(data)
    image = Image.open(io.BytesIO(data), formats=_formats())
    width, height = image.size
    if width * height > max_pixels:
        raise Refused("too_large", f"{width} x {height} pixels, the limit is {max_pixels:,} in all")
    if min(width, height) < MIN_SIDE:
        raise Refused("too_small", f"{width} x {height} pixels, each side must be at least {MIN_SIDE}")
    return image


def _loaded(image: Image.Image, data: bytes) -> Image.Image:
    """Decode the pixels; refuse them where the file's own checks speak against them."""
    check_file(data, image.format)
    if image.format not in _JPEGS:
        image.load()
        return image
    pieces = jpeg_pieces(data)

    def next_piece(_: int) -> bytes:
        if not pieces:
            raise Refused("damaged", "the codes of the JPEG end before its picture does: bytes are lost or changed")
        return pieces.pop(0)

    image.load_read = next_piece  # type: ignore[attr-defined]  # by which its plug-in reads what it decodes
    image.load()
    if pieces:
        raise Refused("damaged", "the picture of the JPEG ends before its codes do: bytes are lost or changed")
    return image


@contextlib.contextmanager
def _refusals(data: bytes) -> Iterator[None]:
    """Turn whatever Pillow raises into a refusal with a reason."""
    if not data:
        raise Refused("empty", "the file has no bytes")
    try:
        yield
    except Refused:
        raise
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused("too_large", str(error)) from None
    except Exception as error:  # Pillow's plug-ins raise whatever a damaged file makes them raise
        text = str(error) or type(error).__name__
        raise Refused("truncated" if "truncated" in text.lower() else "damaged", text) from None


def _unidentified(data: bytes) -> Refused:
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in _HEIC_BRANDS and "HEIF" not in _formats():
        return Refused("unsupported", "a HEIC file, which needs a plug-in: pip install 'micl-zoo[heif]'")
    if brand in _AVIF_BRANDS and "AVIF" not in _formats():
        return Refused("unsupported", "an AVIF file, which needs a newer Pillow: pip install 'pillow>=11.3'")
    if brand in (*_HEIC_BRANDS, *_AVIF_BRANDS):
        return Refused("damaged", "the file begins as HEIC or AVIF and goes on as neither")
    return Refused("not_an_image", f"no known image format in {len(data):,} bytes")


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the names of those FORMATS that this Pillow reads."""
    Image.init()
    with contextlib.suppress(ImportError):  # one core per process: workers share the machine
        importlib.import_module("pillow_heif").register_heif_opener(decode_threads=1, thumbnails=False)
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> object:
    """Read the orientation from EXIF, or from XMP where EXIF has none."""
    try:
        block = image.info.get("exif", b"")
        if "Raw profile type exif" in image.info:  # how ImageMagick writes it to a PNG: hexadecimal, after three lines
            block = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
        check_tags(block)
        return image.getexif().get(_ORIENTATION)
    except Exception:  # a broken EXIF block says nothing of the pixels, which decode
        return None


def to_rgb(image: Image.Image, *, exif: Exif = "upright") -> Image.Image:
    """Convert an opened image to RGB: upright by its EXIF orientation, transparency on white, 16 bits cut to 8."""
    image.load()  # a PNG may have its EXIF behind its pixels
    orientation = _orientation(image) if exif == "upright" else None
    if isinstance(orientation, int) and orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise Refused("unsupported", "32-bit float pixels have no defined white: convert the file to 8 or 16 bit")
    if image.mode.startswith("I"):  # 16-bit greyscale, whatever Pillow keeps it in
        levels = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) >> 8
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
