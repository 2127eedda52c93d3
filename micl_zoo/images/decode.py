"""Decodes bytes to an upright RGB image, or refuses them by a named reason; guesses and repairs nothing."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import math
import mmap
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
from PIL import Image, ImageFile

from ..errors import Refused, UsageError, unknown
from . import formats, tiff
from .containers import Contents, contents
from .integrity import Jpeg, check_gif, check_png_rows, check_tags, check_tiff, jpeg_pieces
from .transform import Filter, Transform

Exif = Literal["upright", "keep"]

BYTES_PER_PIXEL = 12  # of memory that decoding may take, times the limit of pixels; most formats take 4 to 8
MAX_PIXELS = 89_478_485  # 1 GiB by BYTES_PER_PIXEL, and Pillow's own threshold
MIN_SIDE = 2  # a side of one pixel holds no picture: tracking pixels, separators
# By benchmarks/decode.py the worst cosine of 111 photographs is 0.982 at 1 and at 1.5, 0.9991 at 2; of 4000 x 3000 of
# thin lines, text, noise and rings the worst is 0.9988, of text, at each: 1/8 of it is over twice what 112 pixels need.
FAST_MARGIN = 2.0
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF tag; where width and height change places
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_UPRIGHT = {orientation: Image.Transpose[turn] for orientation, turn in enumerate(_TURNS, 2)}
_BAND = 1 << 22  # pixels that are put on white at a time: what a whole picture of the size would take is 16 bytes each
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
_RAISE = "raise it for extract with --max-pixels, in Python max_pixels="


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
        if type(self.max_pixels) is not int or self.max_pixels < 1:
            raise UsageError(f"max_pixels must be a whole number and at least 1; got {self.max_pixels!r}")

    @property
    def id(self) -> str:
        """Name every choice: two stores with the same id and transform id saw the same pixels, where both saw any."""
        return f"{'fast' if self.fast else 'exact'}-{self.exif}"

    @classmethod
    def from_id(cls, name: str, max_pixels: int = MAX_PIXELS) -> Decoding:
        """Return the decoding that has this id; a limit of pixels at its end, as earlier versions wrote, is heeded."""
        match = re.fullmatch(r"(exact|fast)-(upright|keep)(?:-max([1-9]\d{0,17}))?", name)
        if match is None:
            raise UsageError(f"unknown decoding {name!r}: it was made by a newer version, upgrade micl-zoo")
        return cls(exif=cast(Exif, match[2]), fast=match[1] == "fast", max_pixels=int(match[3] or max_pixels))


def decode(data: bytes, *, exif: Exif = "upright", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one encoded image, of several frames the first, to RGB, transparency on white; see `Decoding`.

    16 bits are cut to their highest 8; of TIFF see `micl_zoo.images.tiff`.

    Raises:
        Refused: it is no picture that can be decoded rightly and at the cost that `max_pixels` allows.
    """
    with _refusals(data, max_pixels):
        return _loaded(_opened(data, max_pixels), data, exif)


def decode_pixels(data: bytes, transform: Transform, decoding: Decoding = Decoding()) -> np.ndarray:
    """Decode to the (*size, 3) uint8 an encoder takes: if exact, equal to `transform.pixels(decode(data))`."""
    if not decoding.fast:
        image = decode(data, exif=decoding.exif, max_pixels=decoding.max_pixels)
        with _refusals(data, decoding.max_pixels):
            return transform.pixels(image)
    return decode_crop(
        data,
        functools.partial(_kept, transform),
        transform.size,
        transform.interpolation,
        max_pixels=decoding.max_pixels,
        margin=FAST_MARGIN,
        exif=decoding.exif,
        fill=transform.fill,
    )


def decode_crop(
    data: bytes,
    box: Callable[[int, int], Sequence[float]],  # upright width and height -> left, top, right, bottom as their shares
    size: tuple[int, int],  # height and width of the crop, in pixels
    interpolation: Filter,  # antialiased
    *,
    max_pixels: int = MAX_PIXELS,
    margin: float = 1.0,  # a JPEG is decoded to at least this many times the pixels of the crop in each direction
    exif: Exif = "upright",
    fill: tuple[int, int, int] = (0, 0, 0),  # RGB of what lies outside of the picture: shares below 0 and above 1
) -> np.ndarray:
    """Decode, cut and resize to (*size, 3) uint8 in one go; a JPEG is decoded at the scale that the crop needs."""
    shares: Sequence[float] = ()
    with _refusals(data, max_pixels):
        opened = _opened(data, max_pixels, scaled=True)
    if opened.contents.jpeg and opened.image:
        stored = (opened.contents.width, opened.contents.height)
        turned = exif == "upright" and opened.contents.turn in _TURNED
        shares = box(*(stored[::-1] if turned else stored))
        least = [math.ceil(margin * size[1 - axis] / (shares[axis + 2] - shares[axis])) for axis in (0, 1)]
        opened.image.draft(
            "RGB", (least[1], least[0]) if turned else (least[0], least[1])
        )  # by 2, 4 or 8, never below that
    with _refusals(data, max_pixels):
        _check_size(opened, max_pixels)
        picture = _loaded(opened, data, exif)
    shares = shares or box(*picture.size)
    with _refusals(data, max_pixels):
        return _cut(picture, shares, size, Image.Resampling[interpolation.upper()], fill)


def _cut(
    picture: Image.Image,
    shares: Sequence[float],
    size: tuple[int, int],
    kernel: Image.Resampling,
    fill: tuple[int, int, int],
) -> np.ndarray:
    """Cut shares of the sides, resize them to a (height, width), and fill what lies outside of the picture."""
    near, far, part = [0.0, 0.0], [0.0, 0.0], [0, 0, 0, 0]  # of the picture; of the crop that it covers
    for axis, side in enumerate(size[::-1]):
        first, last, length = shares[axis], shares[axis + 2], picture.size[axis]
        near[axis], far[axis] = max(first, 0) * length, min(last * length, length)  # not above it by a rounding
        part[axis] = round(max(-first, 0) * side / (last - first))
        part[axis + 2] = side - round(max(last - 1, 0) * side / (last - first))
    covers = (part[2] - part[0], part[3] - part[1])
    cut = picture.resize(covers, kernel, box=(near[0], near[1], far[0], far[1]))
    if covers == size[::-1]:
        return np.asarray(cut)
    canvas = Image.new("RGB", size[::-1], fill)
    canvas.paste(cut, (part[0], part[1]))
    return np.asarray(canvas)


def _kept(transform: Transform, width: int, height: int) -> tuple[float, float, float, float]:
    """Find what `Transform.pixels` keeps of a picture, as shares of its sides: left, top, right, bottom."""
    strip, resized, starts = transform.geometry(width, height)
    near, far = [0.0, 0.0], [1.0, 1.0]
    for axis, length in enumerate((width, height)):
        before, kept = strip[axis], strip[axis + 2] - strip[axis]
        start, side = starts[axis], transform.size[1 - axis]
        near[axis] = (before + start * kept / resized[axis]) / length
        far[axis] = (before + (start + side) * kept / resized[axis]) / length
    return near[0], near[1], far[0], far[1]


class _Opened(NamedTuple):
    """A file whose head was read, and no pixels yet."""

    kind: str  # in FORMATS
    contents: Contents
    image: ImageFile.ImageFile | None  # None: a TIFF that tifffile decodes

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what will be decoded."""
        found = self.contents
        if found.canvas:
            return found.canvas[:2]
        return self.image.size if self.image else (found.width, found.height)


def _opened(data: bytes, max_pixels: int, *, scaled: bool = False) -> _Opened:
    kind = formats.kind_of(data)
    if kind is None:
        raise formats.unknown_format(data)
    formats.check_readable(kind)
    if kind in ("AVIF", "HEIF"):
        check_tags(data)
    found = contents(data, kind)
    scaled = scaled and found.jpeg is not None
    if found.width and not scaled:  # before its plug-in takes memory for it
        _check_pixels(found.width, found.height, found.bytes_per_pixel, max_pixels)
    opened = _Opened(found.kind or kind, found, None)
    if not (found.tiff and not found.tiff.through_pillow):
        with _short_of_memory(opened):
            opened = opened._replace(image=_plugin(opened))
    if not scaled:
        _check_size(opened, max_pixels)
    _check_sides(*((found.width, found.height) if scaled else opened.size))
    return opened


def _plugin(opened: _Opened) -> ImageFile.ImageFile:
    """Open by one plug-in of Pillow: a file that begins like a format is of that, or damaged."""
    try:
        return Image.OPEN[opened.kind][0](io.BytesIO(opened.contents.data), "")
    except (SyntaxError, IndexError, TypeError, KeyError, struct.error) as error:
        raise Refused("damaged", f"the file begins as {opened.kind} and goes on as none ({error})") from None


@contextlib.contextmanager
def _short_of_memory(opened: _Opened) -> Iterator[None]:
    """Tell decoders that had no memory, and call the file damaged, from damaged files."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        width, height = opened.size
        try:
            mmap.mmap(-1, int(width * height * opened.contents.bytes_per_pixel) + 1).close()
        except (OSError, OverflowError, ValueError):
            raise MemoryError(str(error)) from None
        raise


def _check_size(opened: _Opened, max_pixels: int) -> None:
    """Raise Refused where the pixels that will be made are too many, or the memory for them too much, or too few."""
    found, (width, height) = opened.contents, opened.size
    needs = found.bytes_per_pixel
    if found.jpeg:  # decoded at a scale, of which the coefficients know nothing
        needs = 4 + found.jpeg.bytes_per_pixel * found.width * found.height / max(width * height, 1)
    _check_pixels(width, height, needs, max_pixels)


def _check_pixels(width: int, height: int, bytes_per_pixel: float, max_pixels: int) -> None:
    pixels = width * height
    if pixels > max_pixels:
        raise Refused("too_large", f"{width} x {height} pixels, the limit is {max_pixels:,} in all: {_RAISE}")
    if pixels * bytes_per_pixel > BYTES_PER_PIXEL * max_pixels:
        megabytes, most = (int(one) >> 20 for one in (pixels * bytes_per_pixel, BYTES_PER_PIXEL * max_pixels))
        raise Refused(
            "too_large",
            f"{width} x {height} pixels, which take {megabytes:,} MiB to decode in this format; the limit of "
            f"{max_pixels:,} pixels allows {most:,}: {_RAISE}",
        )


def _check_sides(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise Refused("too_small", f"{width} x {height} pixels, each side must be at least {MIN_SIDE}")


def _loaded(opened: _Opened, data: bytes, exif: Exif) -> Image.Image:
    """Decode the pixels to RGB; refuse them where the file's own checks speak against them."""
    found = opened.contents
    with _short_of_memory(opened):
        image = _pixels(opened, data)
        return to_rgb(image, exif=exif, orientation=None if found.reads_tags_itself else found.turn)


def _pixels(opened: _Opened, data: bytes) -> Image.Image:
    found, image = opened.contents, opened.image
    if found.tiff:
        check_tiff(found.tiff)
        return _load_tiff(image, found.tiff) if image else tiff.through_tifffile(found.tiff)
    assert image
    if opened.kind == "GIF":
        check_gif(data)
    if found.jpeg:
        _load_jpeg(image, found.jpeg, jpeg_pieces(data, found.jpeg))
    if opened.kind == "WEBP":
        _load_webp(image)
    else:
        image.load()
    if opened.kind == "PNG" and _is_zero(image, found):
        check_png_rows(found.data)
    if found.clear is not None:
        image.info["transparency"] = found.clear
    return _on_canvas(image, *found.canvas) if found.canvas else image


def _is_zero(image: Image.Image, found: Contents) -> bool:
    """Tell whether the row that a PNG packs last is zero, as its decoder leaves it where there is none."""
    interlaced = found.data[28]  # then rows of odd numbers come last
    last = found.height - 1 - (found.height % 2 if interlaced else 0)
    return not any(image.crop((0, last, image.width, last + 1)).tobytes())


def _load_jpeg(image: ImageFile.ImageFile, head: Jpeg, pieces: list[bytes]) -> None:
    def next_piece(_: int) -> bytes:
        if not pieces:
            raise Refused("damaged", "the codes of the JPEG end before its picture does: bytes are lost or changed")
        return pieces.pop(0)

    image.load_read = next_piece  # type: ignore[attr-defined]  # by which its plug-in reads what it decodes
    try:
        image.load()
    except OSError as error:
        if head.is_arithmetic:
            raise Refused("unsupported", f"a JPEG of arithmetic codes, which Pillow did not read: {error}") from None
        raise
    if pieces:
        raise Refused("damaged", "the picture of the JPEG ends before its codes do: bytes are lost or changed")


def _load_tiff(image: ImageFile.ImageFile, found: tiff.Tiff) -> Image.Image:
    try:
        image.load()
    except OSError as error:
        missing = not tiff.pillow_unpacks(found.layout.compression)
        raise tiff.undecoded(found.layout, error, missing=missing) from None
    return image


def _load_webp(image: ImageFile.ImageFile) -> None:
    prepare = image.load_prepare

    def without_decoder() -> None:
        image._decoder = None  # type: ignore[attr-defined]  # it holds two canvases, and is done
        prepare()

    image.load_prepare = without_decoder  # type: ignore[method-assign]
    try:
        image.load()
    finally:
        del image.load_prepare  # it refers to the image, which would keep the pixels until the next collection


def _on_canvas(frame: Image.Image, width: int, height: int, left: int, top: int) -> Image.Image:
    whole = Image.new("RGB", (width, height), "white")
    whole.paste(to_rgb(frame, exif="keep"), (left, top))
    return whole


_limit_lock, _limit_users, _limit_before = threading.Lock(), 0, [Image.MAX_IMAGE_PIXELS]


@contextlib.contextmanager
def _pillow_limit(max_pixels: int) -> Iterator[None]:
    """Lift Pillow's own limit while a picture is decoded under a higher one; it is one for all threads."""
    global _limit_users
    if Image.MAX_IMAGE_PIXELS is None or max_pixels <= Image.MAX_IMAGE_PIXELS:
        yield
        return
    with _limit_lock:
        if not _limit_users:
            _limit_before[0] = Image.MAX_IMAGE_PIXELS
        _limit_users += 1
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        with _limit_lock:
            _limit_users -= 1
            if not _limit_users:
                Image.MAX_IMAGE_PIXELS = _limit_before[0]


@contextlib.contextmanager
def _refusals(data: bytes, max_pixels: int) -> Iterator[None]:
    """Turn whatever Pillow raises into a refusal with a reason."""
    if not data:
        raise Refused("empty", "the file has no bytes")
    try:
        with _pillow_limit(max_pixels):
            yield
    except Refused:
        raise
    except Exception as error:  # Pillow's plug-ins raise whatever a damaged file makes them raise
        raise refusal_of(error) or _damaged(error) from None


def _damaged(error: Exception) -> Refused:
    text = str(error) or type(error).__name__
    if text.startswith("Unsupported"):  # as Pillow says of kinds of BMP
        return Refused("unsupported", f"{text}: {formats.CONVERT}")
    return Refused("truncated" if "truncated" in text.lower() else "damaged", text)


def refusal_of(error: BaseException) -> Refused | None:
    """Say why an image was not decoded, where it is not the image's fault: memory or files of the process run out."""
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return Refused("memory", "not enough memory to decode it")
    if isinstance(error, OSError) and error.errno in _SHORTAGES:
        return Refused(
            "memory" if error.errno == errno.ENOMEM else "unreadable", f"{error.strerror}: not the image's fault"
        )
    return None


def _orientation(image: Image.Image) -> object:
    """Read the orientation of an image that Pillow opened, from EXIF, or from XMP where EXIF has none."""
    try:
        check_tags(image.info.get("exif", b""))
        return image.getexif().get(_ORIENTATION)
    except Exception:  # a broken EXIF block says nothing of the pixels, which decode
        return None


def to_rgb(image: Image.Image, *, exif: Exif = "upright", orientation: int | None = None) -> Image.Image:
    """Convert an opened image to RGB: transparency on white, 16 bits cut to 8, upright.

    `orientation`: 1 to 8 as in EXIF, where it is known; else the image's own tags are asked.
    """
    image.load()  # a PNG may have its EXIF behind its pixels
    if exif == "upright":
        turn = _orientation(image) if orientation is None else orientation
        if isinstance(turn, int) and turn in _UPRIGHT:
            image = image.transpose(_UPRIGHT[turn])
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise Refused("unsupported", "32-bit float pixels have no defined white: convert the file to 8 or 16 bit")
    if image.mode.startswith("I"):  # 16-bit greyscale, whatever Pillow keeps it in
        return _cut_to_8_bits(image)
    return _on_white(image) if image.has_transparency_data else image.convert("RGB")


def _cut_to_8_bits(image: Image.Image) -> Image.Image:
    numbers = np.asarray(image)
    least, most = numbers.min(initial=0), numbers.max(initial=0)
    if least < 0 or most > 65535:
        what = f"32-bit numbers from {least:,} to {most:,}, which have no defined black and white"
        raise Refused("unsupported", f"{what}: convert it to 8 or 16 bits")
    tiff.check_visible(numbers, 16)
    levels, clear = tiff.scaled(numbers, 16), image.info.get("transparency")
    if isinstance(clear, int):
        levels[numbers == clear] = 255
    return Image.fromarray(levels).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # which Pillow converts to nothing else
        image = image.convert("LA")
    width, height = image.size
    rows = max(_BAND // width, 1)
    if height <= rows:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    whole = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(top + rows, height)))
        whole.paste(_on_white(band), (0, top))
    return whole
