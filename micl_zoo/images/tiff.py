"""TIFF: reads the tags that say how pixels lie, and has each layout decoded by what is known to decode it rightly.

Pillow decodes some layouts to other pictures without a word (planes of 16 bits, 16-bit samples where white is 0, signed
samples, 12 bits). `_pillow_is_right` is what it was found to do right, by trying every layout. tifffile, an extra,
decodes the rest; without it they are refused.

Numbers become 8 bits by their highest 8, so that the largest number there can be is white: 16 bits as 32. A greyscale
picture that would so be black all over, though it is not, holds no picture on that scale (labels, counts, 12-bit
values in 16), and is refused. So are signed and floating-point samples: nothing says which of them is black.
"""

from __future__ import annotations

import importlib
import io
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..errors import Refused

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TYPE_BYTES = {2: 1, 1: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
MAX_PIECES = 1 << 20  # strips or tiles: 89 million pixels in tiles of 16 x 16 are 350,000
ORIENTATION = 274
_FILLED = 1 << 24  # bytes by which a strip may be filled up, be it of 4 billion rows
_MAX_PASSED = 1 << 20  # bytes of a tag that the decoder gets: the palette of 16 bits has 393,216
_WHOLE = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}  # types of whole numbers without a sign
_SIGNED = (6, 8, 9, 17)  # and with one
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR, _PREDICTOR = 273, 277, 278, 279, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _EXTRA, _FORMAT = 322, 323, 324, 325, 338, 339
_SUBTYPE, _OLD_SUBTYPE, _MAKE, _DIRECTORIES, _DNG, _FILL_ORDER = 254, 255, 271, 330, 50706, 266
_COLOURS, _JPEG_TABLES, _SUBSAMPLING = 320, 347, 530
# What else a decoder needs: options of fax, the palette, inks, tables of JPEG (of the old kind, too), YCbCr.
_PASSED = (
    _FILL_ORDER,
    292,
    293,
    _PREDICTOR,
    _COLOURS,
    332,
    _JPEG_TABLES,
    512,
    513,
    514,
    515,
    517,
    518,
    519,
    520,
    521,
    529,
    _SUBSAMPLING,
    531,
    532,
)
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_CAMERA = (32803, 34892)  # photometric: one colour per pixel behind a filter, or the camera's own colours
_RAW, JPEG, _OLD_JPEG, _WEBP, LZMA, DEFLATE = 1, 7, 6, 50001, 34925, (8, 32946)
# Compressions of libtiff wherever it is; fax, LZW, JPEG, deflate, PackBits. Others it may lack.
_ALWAYS = (_RAW, 2, 3, 4, 5, JPEG, *DEFLATE, 32773)
_SOMETIMES = {_OLD_JPEG: "", LZMA: "lzma", 50000: "zstd", _WEBP: "webp"}  # nobody writes JPEG of the old kind
_TIFFFILE = (_RAW, 5, JPEG, *DEFLATE, 32773, LZMA, 50000, _WEBP, 34712, 33005)  # and JPEG 2000


Tags = dict[int, tuple[int, Sequence[int]]]  # type and numbers of each


class Entry(NamedTuple):
    """A tag."""

    kind: int
    length: int  # numbers or letters
    value: memoryview  # as many of its bytes as the file has


class Directory(NamedTuple):
    """The tags of one picture."""

    order: str
    large: bool  # BigTIFF: places and counts have 8 bytes
    entries: dict[int, Entry]
    following: int  # where the next directory is, 0 for none

    def numbers(self, tag: int, default: Sequence[int] = (), most: int = 16) -> tuple[int, ...]:
        """Return the first `most` whole numbers of a tag."""
        entry = self.entries.get(tag)
        if entry is None:
            return tuple(default)
        letter = _WHOLE.get(entry.kind)
        count = min(entry.length, most)
        if letter is None or not count or len(entry.value) < count * TYPE_BYTES[entry.kind]:
            raise Refused("damaged", f"tag {tag} of the TIFF has no number where it should")
        return struct.unpack_from(f"{self.order}{count}{letter}", entry.value)

    def number(self, tag: int, default: int) -> int:
        """Return the number of a tag."""
        return self.numbers(tag, (default,), most=1)[0]


def read_directory(data: bytes, at: int | None = None, *, cut: bool = False) -> Directory:
    """Read the tags at a place of a TIFF, by default the first ones; values are cut to what the file has of them.

    `cut`: the tags may be, too, as many read them in EXIF.

    Raises:
        Refused: there are none at this place.
    """
    order, large = "<" if data.startswith(b"I") else ">", data[2:4] in (b"+\0", b"\0+")
    word, head, step, room = ("Q", "Q", 20, 8) if large else ("I", "H", 12, 4)
    try:
        start: int = struct.unpack_from(order + word, data, room)[0] if at is None else at
        (count,) = struct.unpack_from(order + head, data, start)
        start += struct.calcsize(order + head)
        there = max(len(data) - start, 0) // step
        if count > there and not cut:
            raise Refused("truncated", "the TIFF ends within its tags")
        count = min(count, there)
        found = (struct.unpack_from(f"{order}HH{word}", data, start + number * step) for number in range(count))
        places = range(start + step - room, start + count * step, step)
        entries = {
            tag: Entry(kind, size, _value(data, order, place, TYPE_BYTES.get(kind, 0) * size, room))
            for (tag, kind, size), place in zip(found, places, strict=False)
        }
        following = int.from_bytes(data[start + count * step :][:room], "little" if order == "<" else "big")
    except (struct.error, OverflowError):
        raise Refused("truncated", "the TIFF ends before its tags") from None
    return Directory(order, large, entries, following)


def _value(data: bytes, order: str, place: int, length: int, room: int) -> memoryview:
    if length > room:
        (place,) = struct.unpack_from(order + ("Q" if room == 8 else "I"), data, place)
    return memoryview(data)[place : place + min(length, len(data))]  # no copy: many tags may point at one place


class Layout(NamedTuple):
    """How the pixels of a TIFF lie."""

    width: int
    height: int
    bits: int
    samples: int
    photometric: int
    planar: int  # 1: the samples of a pixel are side by side; 2: a plane per sample
    compression: int
    numbers: int  # 1 unsigned, 2 signed, 3 floating-point
    extra: tuple[int, ...]  # of the samples beyond the colours: 0 nothing known, 1 premultiplied alpha, 2 alpha
    fill_order: int
    large_endian: bool  # a big-endian BigTIFF
    block: tuple[int, int]  # pixels across and down that share their colour: more than one in YCbCr

    @property
    def colours(self) -> int:
        """Samples of a pixel that are no extra ones."""
        return self.samples - len(self.extra)


class Tiff(NamedTuple):
    """A TIFF without what is not needed to decode it."""

    data: bytes
    layout: Layout
    orientation: int
    through_pillow: bool
    places: Sequence[int]  # of each strip or tile
    lengths: Sequence[int]  # bytes of each
    needs: Sequence[int]  # bytes of each without compression
    most: int  # bytes that one may unpack to: some writers fill the last strip up, of several or of one
    jpeg_tables: bytes  # for strips or tiles that are JPEGs without


def read_tiff(data: bytes) -> Tiff:
    """Read the tags, and leave in the file those alone that a decoder needs.

    Raises:
        Refused: a camera's RAW file, a layout that nothing here decodes rightly, or tags that cannot be.
    """
    found = read_directory(data)
    _check_camera(data, found)
    layout = _layout(found)
    through_pillow = _pillow_is_right(layout)
    if layout.compression == _WEBP and _tifffile_is_right(layout) and has_tifffile():
        through_pillow = False  # whose libtiff is mostly built without
    if not through_pillow:
        _check_tifffile(layout)
    shape, pieces = _pieces(data, found, layout)
    tables = found.entries.get(_JPEG_TABLES)
    pared = _pared(data, found, layout, shape)
    return Tiff(pared, layout, orientation_of(found), through_pillow, *pieces, bytes(tables.value if tables else b""))


def orientation_of(found: Directory) -> int:
    """Return the orientation, 1 where there is none; a number that makes no sense turns nothing."""
    entry = found.entries.get(ORIENTATION)
    if entry is None or not entry.length or entry.kind not in (*_WHOLE, *_SIGNED):
        return 1
    value = entry.value[: TYPE_BYTES[entry.kind]]  # of several the first
    return int.from_bytes(value, "little" if found.order == "<" else "big")


def _check_camera(data: bytes, found: Directory) -> None:
    """Refuse what has a small picture in front of the one it is about."""
    make = bytes(found.entries[_MAKE].value[:40]).rstrip(b"\0 ").decode("latin-1") if _MAKE in found.entries else ""
    below = [_photometric(data, at) for at in _places(found)]
    if data[8:10] == b"CR" or _DNG in found.entries or any(one in _CAMERA for one in (_photometric_of(found), *below)):
        name = "a DNG" if _DNG in found.entries else f"a RAW file of a camera by {make or 'an unknown maker'}"
        raise Refused(
            "unsupported", f"{name}: develop it to JPEG, PNG or 8-bit TIFF, with darktable or dcraw for example"
        )
    small = _small(found)
    if small and (below or found.following):
        raise Refused(
            "unsupported", "a TIFF whose first picture is a thumbnail of another one in it: save that one alone"
        )


def _small(found: Directory) -> bool:
    return _peek(found, _SUBTYPE) & 1 == 1 or _peek(found, _OLD_SUBTYPE) == 2


def _places(found: Directory) -> tuple[int, ...]:
    try:
        return found.numbers(_DIRECTORIES, most=8)
    except Refused:
        return ()


def _photometric(data: bytes, at: int) -> int:
    try:
        return _photometric_of(read_directory(data, at))
    except Refused:
        return 0


def _photometric_of(found: Directory) -> int:
    return _peek(found, _PHOTOMETRIC)


def _peek(found: Directory, tag: int) -> int:
    """Return the number of a tag that only tells what a file is; 0 where it is broken."""
    try:
        return found.number(tag, 0)
    except Refused:
        return 0


def _layout(found: Directory) -> Layout:
    width, height, compression = found.number(_WIDTH, 0), found.number(_HEIGHT, 0), found.number(_COMPRESSION, _RAW)
    photometric = _YCBCR if compression == _OLD_JPEG else found.number(_PHOTOMETRIC, _WHITE_IS_ZERO)
    colours = {_RGB: 3, _CMYK: 4, _YCBCR: 3, 8: 3, 9: 3, 10: 3}.get(photometric, 1)
    samples = found.number(_SAMPLES, 3 if compression in (JPEG, _OLD_JPEG) and colours == 3 else 1)
    bits, numbers = (set(found.numbers(tag, (1,))) for tag in (_BITS, _FORMAT))
    if not 1 <= samples <= 16 or len(bits) > 1 or len(numbers) > 1:
        raise Refused("unsupported", f"a TIFF of {samples} samples per pixel of {sorted(bits)} bits: {_CURE}")
    if photometric == _YCBCR and samples == 1:
        photometric, colours = _BLACK_IS_ZERO, 1
    extra = found.numbers(_EXTRA)[: max(samples - colours, 0)]
    if not extra and (photometric, samples) == (_RGB, 4):
        extra = (2,)  # as Pillow and many others take it
    if samples - len(extra) != colours:
        raise Refused("unsupported", f"a TIFF of {samples} bands, of which nothing says which are colours: {_CURE}")
    planar = found.number(_PLANAR, 1) if samples > 1 else 1
    order = found.number(_FILL_ORDER, 1)
    first = (width, height, bits.pop(), samples, photometric, planar, compression, numbers.pop())
    return Layout(*first, extra, order, found.large and found.order == ">", _block(found, photometric, compression))


def _block(found: Directory, photometric: int, compression: int) -> tuple[int, int]:
    if photometric != _YCBCR or compression in (JPEG, _OLD_JPEG):  # which say it themselves
        return 1, 1
    numbers = found.numbers(_SUBSAMPLING, (2, 2), most=2)
    if len(numbers) < 2 or not all(numbers):
        raise Refused("damaged", f"tag {_SUBSAMPLING} of the TIFF has no number where it should")
    return numbers[0], numbers[1]


_CURE = "convert it to 8 bits of grey or RGB"


def _pillow_is_right(one: Layout) -> bool:
    """Tell whether Pillow decodes a layout rightly; found by trying all of them against an encoder of our own."""
    unread = one.compression not in (*_ALWAYS, *_SOMETIMES) or one.fill_order not in (1, 2) or one.large_endian
    if one.numbers != 1 or unread:
        return False
    plain, chunky, first = not one.extra, one.planar == 1, one.extra[:1]
    alpha = len(one.extra) == 1 and first[0] in (0, 1, 2)
    if one.fill_order == 2:
        right = one.photometric in (_BLACK_IS_ZERO, _RGB) or (one.photometric == _WHITE_IS_ZERO and one.bits < 8)
        if not (right and plain and chunky and one.bits <= 8):
            return False
    if one.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO):
        sixteen = one.bits == 16 and one.photometric == _BLACK_IS_ZERO
        return chunky and (
            (plain and (one.bits in (1, 2, 4, 8) or sixteen)) or (alpha and one.bits == 8 and one.photometric == 1)
        )
    if one.photometric == _RGB and one.bits == 8:
        return plain or (chunky and first[0] in (0, 1, 2) and not any(one.extra[1:]) and len(one.extra) <= 3)
    if one.photometric == _RGB and one.bits == 16:
        return chunky and (plain or alpha)
    if one.photometric == _PALETTE:
        return chunky and plain and one.bits in (1, 2, 4, 8)
    if one.photometric == _CMYK:
        return (plain and one.bits == 8) or (
            chunky and one.bits in (8, 16) and (plain or (one.bits == 8 and not any(one.extra)))
        )
    return one.photometric == _YCBCR and one.bits == 8 and plain and chunky and one.compression != _RAW


def _check_tifffile(one: Layout) -> None:
    """Raise Refused where tifffile does not decode a layout either, or is not there."""
    if one.numbers != 1:
        kind = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}.get(one.numbers, "undefined")
        raise Refused(
            "unsupported", f"a TIFF of {one.bits}-bit {kind} samples, which have no defined black and white: {_CURE}"
        )
    what = (
        f"a TIFF of {one.samples} x {one.bits} bits, photometric {one.photometric}, planar {one.planar}, "
        f"compression {one.compression}"
    )
    if not _tifffile_is_right(one):
        raise Refused("unsupported", f"{what}: {_CURE}, without compression or by deflate or LZW")
    if not has_tifffile():
        raise Refused("unsupported", f"{what}, which Pillow does not decode rightly: pip install 'micl-zoo[tiff]'")


def _tifffile_is_right(one: Layout) -> bool:
    """Tell whether tifffile decodes a layout rightly, by the same trial."""
    alpha = one.extra[:1] in ((1,), (2,))
    return (
        one.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _CMYK, _PALETTE)
        and one.compression in _TIFFFILE
        and one.bits in (1, 2, 4, 8, 12, 16, 24, 32)
        and one.planar in (1, 2)
        and one.fill_order in (1, 2)
        and not (one.compression == JPEG and one.colours > 1)  # in colours of its own
        and not (one.photometric == _CMYK and alpha)
        and not (one.photometric == _PALETTE and (one.bits > 16 or one.extra[:1] == (1,)))
        and not (one.photometric == _WHITE_IS_ZERO and one.extra[:1] == (1,))
    )


def undecoded(one: Layout, error: Exception, *, missing: bool) -> Exception:
    """Say why a layout was not decoded: what unpacks it may be missing."""
    if isinstance(error, MemoryError) or one.compression in _ALWAYS:
        return error
    if missing:
        return Refused(
            "unsupported", f"a TIFF of compression {one.compression}, which could not be read ({error}): {_CURE}"
        )
    return Refused("damaged", f"strips or tiles of the TIFF do not unpack ({error})")


def pillow_unpacks(compression: int) -> bool:
    """Tell whether the libtiff of this Pillow has a compression; it says of a missing one what it says of damage."""
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), "TIFF", compression=_SOMETIMES[compression])
    except Exception:  # whatever its encoder raises
        return False
    return True


def has_tifffile() -> bool:
    """Tell whether tifffile and its decoders are installed."""
    try:
        importlib.import_module("imagecodecs")
        importlib.import_module("tifffile")
    except ModuleNotFoundError:
        return False
    return True


def _pared(data: bytes, found: Directory, one: Layout, shape: Tags) -> bytes:
    """Write the tags that a decoder needs behind the file, and point at them: strips and tiles stay where they are."""
    tags: Tags = {
        _WIDTH: (4, [one.width]),
        _HEIGHT: (4, [one.height]),
        _BITS: (3, [one.bits] * one.samples),
        _COMPRESSION: (3, [one.compression]),
        _PHOTOMETRIC: (3, [one.photometric]),
        _SAMPLES: (3, [one.samples]),
        _PLANAR: (3, [one.planar]),
        _FORMAT: (3, [one.numbers] * one.samples),
        **({_EXTRA: (3, one.extra)} if one.extra else {}),
        **shape,
    }
    letter, room = ("Q", 8) if found.large else ("I", 4)
    values = {
        tag: (kind, len(numbers), struct.pack(f"{found.order}{len(numbers)}{_WHOLE[kind]}", *numbers))
        for tag, (kind, numbers) in tags.items()
    }
    _check_whole(found)
    values |= {
        tag: (entry.kind, entry.length, bytes(entry.value)) for tag, entry in found.entries.items() if tag in _PASSED
    }
    if _COLOURS in values and one.photometric == _PALETTE:
        values[_COLOURS] = _palette(found.order, *values[_COLOURS])
    tail = io.BytesIO()
    start = len(data) + len(data) % 2
    entries = b""
    for tag, (kind, count, value) in sorted(values.items()):
        if len(value) > room:
            place = start + tail.tell()
            tail.write(value + b"\0" * (len(value) % 2))
            value = struct.pack(found.order + letter, place)
        entries += struct.pack(f"{found.order}HH{letter}", tag, kind, count) + value.ljust(room, b"\0")
    head = struct.pack(found.order + ("Q" if found.large else "H"), len(values))
    first = struct.pack(found.order + letter, start + tail.tell())
    end = bytes(room)
    return b"".join(
        [data[:room], first, data[2 * room :], b"\0" * (len(data) % 2), tail.getvalue(), head, entries, end]
    )


def _palette(order: str, kind: int, count: int, value: bytes) -> tuple[int, int, bytes]:
    """Bring colours of 8 bits, which some writers put where 16 belong, to 16: as libtiff does."""
    colours = np.frombuffer(value[: len(value) // 2 * 2], order + "u2")
    if kind == 3 and colours.max(initial=0) < 256:
        value = (colours * np.array(257, order + "u2")).tobytes()
    return kind, count, value


def _check_whole(found: Directory) -> None:
    for tag, entry in found.entries.items():
        length = TYPE_BYTES.get(entry.kind, 0) * entry.length
        if tag in _PASSED and length > _MAX_PASSED:
            raise Refused("damaged", f"tag {tag} of the TIFF has {length:,} bytes, of which no decoder needs so many")
        if tag in _PASSED and len(entry.value) < length:
            raise Refused("truncated", f"the TIFF ends within its tag {tag}")


def _pieces(
    data: bytes, found: Directory, one: Layout
) -> tuple[Tags, tuple[Sequence[int], Sequence[int], Sequence[int], int]]:
    """Check where the strips or tiles are; more than the picture needs are left out."""
    planes = one.samples if one.planar == 2 else 1
    if min(one.width, one.height) < 1 or one.planar not in (1, 2):
        raise Refused("damaged", f"the TIFF says that it is {one.width} x {one.height} pixels in {one.planar} planes")
    tiled = _TILES in found.entries
    if tiled:
        across, rows = found.number(_TILE_WIDTH, 0), found.number(_TILE_HEIGHT, 0)
        down = rows
        limits, starts, sizes = (one.width + 4096, one.height + 4096), _TILES, _TILE_BYTES
        shape = {_TILE_WIDTH: (4, [across]), _TILE_HEIGHT: (4, [down])}
    else:
        across, rows = one.width, found.number(_ROWS, one.height)
        down = min(rows, one.height)
        limits, starts, sizes = (one.width, one.height), _STRIPS, _STRIP_BYTES
        shape = {_ROWS: (4, [down])}
    if not (1 <= across <= limits[0] and 1 <= down <= limits[1]):
        raise Refused(
            "damaged",
            f"the strips or tiles of the TIFF are {across} x {down} pixels, the picture {one.width} x {one.height}",
        )
    count = planes * -(-one.width // across) * -(-one.height // down)
    if count > MAX_PIECES:
        raise Refused("too_large", f"the TIFF is in {count:,} strips or tiles; the limit is {MAX_PIECES:,}")
    places = found.numbers(starts, most=count)
    needs: Sequence[int] = _raw_lengths(one, across, down, count, tiled=tiled)
    lengths: Sequence[int] = found.numbers(sizes, needs, most=count)
    if len(places) < count or len(lengths) < count:
        raise Refused("damaged", f"the TIFF has {min(len(places), len(lengths)):,} of {count:,} strips or tiles")
    if one.compression == _RAW:
        lengths = needs if all(places) and not any(lengths) else tuple(map(min, lengths, needs))
    _check_places(len(data), one, places, lengths, needs)
    kind = 16 if found.large else 4
    most = min(_raw_length(one, across, rows), max(needs) + _FILLED)
    return {**shape, starts: (kind, places), sizes: (kind, lengths)}, (places, lengths, needs, most)


def _check_places(size: int, one: Layout, places: Sequence[int], lengths: Sequence[int], needs: Sequence[int]) -> None:
    unwritten = sum(not (place and length) for place, length in zip(places, lengths, strict=True))
    if unwritten and one.compression != _OLD_JPEG:  # which may lie elsewhere
        raise Refused(
            "damaged", f"{unwritten:,} of {len(places):,} strips or tiles of the TIFF were never written: it is sparse"
        )
    if any(place + length > size for place, length in zip(places, lengths, strict=True)):
        raise Refused("truncated", f"strips or tiles of the TIFF lie behind its end at byte {size:,}")
    if sum(lengths) > 2 * size + (1 << 20):
        raise Refused("damaged", "strips or tiles of the TIFF lie in one another")
    if one.compression == _RAW and any(need > length for need, length in zip(needs, lengths, strict=True)):
        raise Refused("truncated", "strips or tiles of the TIFF have fewer bytes than their pixels")


def _raw_lengths(one: Layout, across: int, down: int, count: int, *, tiled: bool) -> list[int]:
    """Compute how many bytes each strip or tile has without compression."""
    planes = one.samples if one.planar == 2 else 1
    last = down if tiled else one.height - (-(-one.height // down) - 1) * down  # strips end with the picture
    whole, end = (_raw_length(one, across, rows) for rows in (down, last))
    return [*[whole] * (count // planes - 1), end] * planes


def _raw_length(one: Layout, across: int, rows: int) -> int:
    width, height = one.block
    samples = 1 if one.planar == 2 else one.samples + width * height - 1  # of a block
    return -(-rows // height) * -(-(-(-across // width) * samples * one.bits) // 8)


def through_tifffile(found: Tiff) -> Image.Image:
    """Decode by tifffile to a picture of 8 bits."""
    tifffile, one = importlib.import_module("tifffile"), found.layout
    try:
        with tifffile.TiffFile(io.BytesIO(found.data)) as file:
            palette = file.pages[0].colormap
            array: np.ndarray[Any, Any] = file.pages[0].asarray(maxworkers=1)
    except Exception as error:  # its decoders raise each their own
        missing = isinstance(error, ImportError) or "requires the 'imagecodecs' package" in str(error)
        raise undecoded(one, error, missing=missing) from None
    if one.planar == 1:
        array = np.moveaxis(array.reshape(one.height, one.width, one.samples), -1, 0)  # a view: samples come first
    check_visible(array, one.bits)
    alpha = one.extra[:1] in ((1,), (2,))
    bands = [
        scaled(band, one.bits) for band in array.reshape(one.samples, one.height, one.width)[: one.colours + alpha]
    ]
    if one.photometric == _PALETTE:
        bands[:1] = [(np.asarray(colours) >> 8).astype(np.uint8)[array[0].astype(np.uint16)] for colours in palette]
    elif one.photometric == _WHITE_IS_ZERO:
        bands[0] = 255 - bands[0]
    del array
    premultiplied = one.extra[:1] == (1,)
    modes = {1: "L", 2: "La" if premultiplied else "LA", 3: "RGB", 4: "RGBa" if premultiplied else "RGBA"}
    mode = "CMYK" if one.photometric == _CMYK else modes[len(bands)]
    return Image.merge(mode, [Image.fromarray(np.ascontiguousarray(band)) for band in bands])


def scaled(numbers: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Bring unsigned numbers to 8 bits, by their highest 8, or spread fewer over the range."""
    if bits <= 8:
        return (numbers.astype(np.uint8) * (255 // (2**bits - 1))).astype(np.uint8)
    return (numbers >> (bits - 8)).astype(np.uint8)


def check_visible(numbers: np.ndarray[Any, Any], bits: int) -> None:
    """Raise Refused where `scaled` would make 0 of all numbers, and not all are."""
    largest = int(numbers.max(initial=0))
    if 0 < largest < 1 << max(bits - 8, 0):
        raise Refused(
            "unsupported",
            f"{bits}-bit numbers of at most {largest:,}, which would be black all over: white is {2**bits - 1:,}. "
            "They are labels, counts or values of fewer bits: convert it to 8 bits",
        )
