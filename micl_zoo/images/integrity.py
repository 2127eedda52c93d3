"""Detects damaged image files that decoders accept silently, filling the gap with grey.

JPEG   is whole to its end mark; one scan of Huffman codes takes exactly the bytes there are; restart marks are in
       order; every component has its scans, a progressive one all its precision. A changed bit that leaves the length
       of the codes is not seen.
PNG    every chunk that pixels depend on fits its checksum, to the end mark; all rows are there.
GIF    every block is there, to the end mark or, as some writers omit it, to the end of a block. It has no checksums.
TIFF   every strip or tile was written; one of deflate or LZMA unpacks to all its pixels and to its end, where deflate
       has a checksum and LZMA one by some writers, not by libtiff; one of JPEG is whole as a JPEG is, but for the
       length of its codes. Of zstd, LZW, PackBits and fax, and of LZMA where Python was built without it, only what
       stops their decoders is seen: a changed byte often is not.

The decoders of WebP, AVIF, HEIC, BMP, JPEG 2000 and PPM refuse a file that is cut off, and nothing in these files tells
a changed pixel from another picture.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from ..errors import Refused
from . import tiff

if TYPE_CHECKING:
    from lzma import LZMADecompressor
    from zlib import _Decompress

    Unpacker = _Decompress | LZMADecompressor

MAX_PARTS, MAX_BLOCKS = 1_000_000, 5_000_000  # chunks or segments of a file; blocks of a GIF: 1 GB has 4 million
MAX_TABLES = 512  # segments of a JPEG that its decoder needs; encoders write 10 or so
# Scans of a JPEG: encoders write 10 or so, and each costs a pass over all coefficients, 2 to 6 ns per pixel.
MAX_SCANS, LEAST_SCANS, MAX_SCANNED = 100, 30, 1 << 30  # at most, always allowed, pixels of all scans together
_SPARE_BYTES = 8  # unread ones that a JPEG may have before its end mark: some cameras leave a few
# Ones are no Huffman code, so they end nothing; the decoder looks 57 bits ahead, and this is 64 of them.
_PADDING = b"\xff\x00" * 8
_MARK, _MARK_OR_RESTART = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]"), re.compile(rb"\xff[^\x00\xff]")
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_SEQUENTIAL = (0xC0, 0xC1)  # start of a frame of Huffman codes that is not progressive
_PROGRESSIVE = (0xC2, 0xCA)  # of Huffman codes, of arithmetic ones
_SOI, _EOI, _SOS, _DRI, _APP0, _APP1, _APP14 = 0xD8, 0xD9, 0xDA, 0xDD, 0xE0, 0xE1, 0xEE
_NEEDED = (0xC4, 0xCC, 0xDB, _DRI)  # tables of codes and of quantisation, arithmetic coding
_FED, _UNPACKED = 1 << 16, 1 << 20  # bytes that are unpacked at a time and that come of it, where they are counted
# Of each pass of an interlaced PNG: left, top and the steps across and down.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PNG_CHECKED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_CONVERT = "convert it to an ordinary JPEG or to PNG, with ImageMagick for example"
_REVERSED = bytes(int(f"{one:08b}"[::-1], 2) for one in range(256))  # the bits of each byte
FRAME = 0x2C  # label of the frames of a GIF


def too_many(count: int, what: str, most: int = 0) -> None:
    """Refuse what has so many parts that walking over them keeps a decoder busy."""
    most = most or MAX_PARTS
    if count > most:
        raise Refused("too_large", f"more than {most:,} parts in one {what}: a file made to keep a decoder busy")


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, stop) of the chunks of a PNG to its end mark; check those that its pixels depend on."""
    view, at, count = memoryview(data), 8, 0
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if end > len(data):
            break
        if _is_checked(kind) and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise Refused("damaged", f"the checksum of the PNG chunk at byte {at:,} does not fit its bytes")
        if not kind.isalpha():
            raise Refused("damaged", f"byte {at:,} of the PNG begins no chunk")
        yield kind, at + 8, end - 4
        if kind == b"IEND":
            return
        at = end
        count += 1
        too_many(count, "PNG")
    raise Refused("truncated", f"the PNG stops at byte {len(data):,} before its end mark")


@functools.lru_cache(maxsize=1024)
def _is_checked(kind: bytes) -> bool:
    """Tell whether it is a chunk for pixels, or one with a wrong byte in its name."""
    return any(sum(map(int.__ne__, kind, one)) < 2 for one in _PNG_CHECKED)


def check_png_rows(data: bytes) -> None:
    """Refuse a PNG that packs fewer rows than it has; its decoder leaves the rest black without a word."""
    width, height, bits, colours = struct.unpack_from(">IIBB", data, 16)
    step = bits * {2: 3, 4: 2, 6: 4}.get(colours, 1)
    passes = _ADAM7 if data[28] else ((0, 0, 1, 1),)
    sizes = [(-(-(width - left) // across), -(-(height - top) // down)) for left, top, across, down in passes]
    needs = sum(rows * (1 + -(-columns * step // 8)) for columns, rows in sizes if columns > 0)
    pixels = b"".join(data[start:stop] for kind, start, stop in png_chunks(data) if kind == b"IDAT")
    if _unpacked(zlib.decompressobj(-15), pixels[2:], needs) < needs:  # without its checksum: each chunk has its own
        raise Refused("truncated", "the PNG has fewer rows of pixels than its size says: the rest was never written")


def _unpacked(unpacker: Unpacker, packed: bytes | memoryview, most: int) -> int:
    """Count the bytes that deflate or LZMA unpacks to, and stop where they are more than `most`."""
    view, room = memoryview(packed), most + 1
    for start in range(0, len(view), _FED):  # what is left over of each is copied at each step
        rest: bytes | memoryview = view[start : start + _FED]
        while room and not unpacker.eof and (part := unpacker.decompress(rest, min(room, _UNPACKED))):
            room -= len(part)
            rest = getattr(unpacker, "unconsumed_tail", b"")  # LZMA's keeps it
    return most + 1 - room


def check_gif(data: bytes) -> None:
    """Refuse a GIF that is cut off within a block."""
    if not sum(label == FRAME for label, _, _ in gif_blocks(data)):
        raise Refused("truncated", f"the GIF stops at byte {len(data):,} within a block")


def gif_blocks(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (label, start, stop) of the frames of a GIF and of its extensions, whose labels have 0x21 before them."""
    at, count = 13 + colour_table(data[10]), 0
    while at < len(data) and data[at] != 0x3B:
        start, label = at, data[at]
        if not label:  # some writers leave zeros between blocks
            at += 1
            count += 1
            too_many(count, "GIF", MAX_BLOCKS)
            continue
        if label == 0x21 and at + 1 < len(data):  # extension: its label, then its blocks
            label, at = 0x2100 | data[at + 1], at + 2
        elif label == FRAME and at + 10 < len(data):  # frame: place, size, flags, colours, width of the first code
            at += 11 + colour_table(data[at + 9])
        elif label in (0x21, FRAME):
            raise Refused("truncated", f"the GIF stops at byte {len(data):,} within a block")
        else:
            raise Refused("damaged", f"byte {at:,} of the GIF begins no block")
        while at < len(data) and data[at]:
            at += data[at] + 1
            count += 1
            if count > MAX_BLOCKS:
                too_many(count, "GIF", MAX_BLOCKS)
        at += 1
        if at > len(data):
            raise Refused("truncated", f"the GIF stops at byte {len(data):,} within a block")
        yield label, start, at


def colour_table(flags: int) -> int:
    """Return the bytes of a table of colours of a GIF."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


class Jpeg(NamedTuple):
    """What stands in a JPEG before its first scan."""

    data: bytes  # all that a decoder needs of it, with the header of the first scan
    frame: int  # the marker its frame begins with: sequential, progressive or something else
    interval: int  # blocks between restart marks; 0 for none
    width: int
    height: int
    bytes_per_pixel: float  # of memory, beside the decoded picture; by the size before scaling
    exif: bytes  # several blocks count as one
    xmp: bytes
    scan: int  # where the header of the first scan begins
    components: bytes  # their numbers

    @property
    def is_arithmetic(self) -> bool:
        """Its codes are not Huffman's, which not every decoder reads."""
        return self.frame in (0xC9, 0xCA)


def jpeg_head(data: bytes, *, alone: bool = True) -> Jpeg:
    """Read a JPEG up to its first scan; not `alone`: it is in a TIFF, which may have any number of samples.

    Raises:
        Refused: a kind of JPEG that cannot be decoded, or none.
    """
    kept, frame, interval, sizes = [b"\xff\xd8"], 0, 0, b""
    exif, xmp, adobe = list[bytes](), b"", b""
    for marker, start, end in _segments(data):
        if marker in _NEEDED:
            kept.append(data[start - 2 : end])
            if marker == _DRI:
                interval = int.from_bytes(data[start + 2 : end], "big")
        elif marker == _APP1 and data.startswith(b"Exif\0\0", start + 2):
            exif.append(data[start + 8 : end])
        elif marker == _APP1 and not xmp and data.startswith(b"http://ns.adobe.com/xap/1.0/\0", start + 2):
            xmp = data[start + 31 : end]
        elif marker == _APP14 and end - start >= 14 and data.startswith(b"Adobe", start + 2):
            adobe = data[start - 2 : end]  # says in which colours the samples are
        elif marker == _APP0 and len(kept) == 1 and end - start >= 16 and data.startswith(b"JFIF\0", start + 2):
            kept.append(data[start - 2 : end])  # likewise
        elif 0xC0 <= marker <= 0xCF or marker == 0xF7:
            if frame:
                raise Refused("damaged", "the JPEG has two frames")
            frame, sizes = marker, data[start + 2 : end]
            _check_kind(frame, sizes)
            if alone and sizes[5] not in (1, 3, 4):
                raise Refused("unsupported", f"a JPEG of {sizes[5]} components: {_CONVERT}")
            kept.append(data[start - 2 : end])
        elif marker == _SOS:
            if not frame:
                raise Refused("damaged", "the JPEG has a scan before its frame")
            joined = b"".join([*kept[:1], adobe, *kept[1:], data[start - 2 : end]])
            height, width = struct.unpack_from(">HH", sizes, 1)
            if not height and data.find(b"\xff\xdc\0\x04", end) > 0:
                raise Refused("unsupported", f"a JPEG that says its height behind its picture (DNL): {_CONVERT}")
            at_once = frame in _SEQUENTIAL and data[start + 2] == sizes[5]
            kept_back = 0.0 if at_once else _coefficients(sizes)
            return Jpeg(joined, frame, interval, width, height, kept_back, b"".join(exif), xmp, start - 2, sizes[6::3])
        elif marker < 0xC0 or 0xD0 <= marker <= 0xD7:
            raise Refused("damaged", f"the marker {marker:02x} at byte {start - 2:,} of the JPEG has no place there")
        if len(kept) > MAX_TABLES:
            raise Refused("too_large", f"more than {MAX_TABLES} tables in one JPEG: a file made to keep a decoder busy")
    raise Refused("truncated", f"the JPEG stops at byte {len(data):,} before its end mark")


def _check_kind(frame: int, sizes: bytes) -> None:
    if frame in (0xC3, 0xC7, 0xCB, 0xCF, 0xF7):
        raise Refused("unsupported", f"a lossless JPEG: {_CONVERT}")
    if frame in (0xC5, 0xC6, 0xCD, 0xCE):
        raise Refused("unsupported", f"a hierarchical JPEG: {_CONVERT}")
    if len(sizes) < 6 or len(sizes) != 6 + 3 * sizes[5]:
        raise Refused("damaged", "the frame of the JPEG has a header of the wrong length")
    if sizes[0] != 8:
        raise Refused("unsupported", f"a JPEG of {sizes[0]} bits: {_CONVERT}")


def _coefficients(sizes: bytes) -> float:
    """Compute the bytes per pixel of the coefficients, which are kept until all scans are in, of one scan not."""
    factors = [(one >> 4, one & 15) for one in sizes[7::3]]
    most = max(across for across, _ in factors) * max(down for _, down in factors)
    return 2 * sum(across * down for across, down in factors) / max(most, 1)


class JpegScans(NamedTuple):
    """Where the compressed picture of a JPEG lies."""

    headers: list[bytes]  # what each scan's header holds
    starts: list[int]  # of the bytes behind each header
    stops: list[int]


def jpeg_pieces(data: bytes, head: Jpeg) -> list[bytes]:
    """Check a JPEG and cut it into the pieces that show whether its codes fit its picture.

    A decoder must want the second piece after the first, and no more after the second: libjpeg decodes codes that went
    astray to the end of the data or to the end of the picture, whichever comes first, and neither is an error for it.
    """
    found = _checked_scans(data, head, head.width * head.height)
    if head.frame not in _SEQUENTIAL or len(found.starts) != 1:
        return [head.data + data[found.starts[0] :]]  # decoded once all scans are in: nothing shows how far each came
    start, stop = found.starts[0], found.stops[0]
    used = len(data[start:stop].rstrip(b"\0\xff"))
    cut = start + max(used - 1 - _SPARE_BYTES, 0)
    return [b"".join((head.data, memoryview(data)[start:cut])), data[cut:stop] + _PADDING]


def _checked_scans(data: bytes, head: Jpeg, pixels: int) -> JpegScans:
    """Find the scans; `pixels`: of the whole picture, of which a JPEG in a TIFF may be a part."""
    found = _scans(data, head, pixels)
    _check_restarts(data, found, head)
    _check_precision(found, head)
    return found


def _scans(data: bytes, head: Jpeg, pixels: int) -> JpegScans:
    headers, starts, stops = list[bytes](), list[int](), list[int]()
    scans = min(MAX_SCANS, max(MAX_SCANNED // max(pixels, 1), LEAST_SCANS))
    for marker, start, end in _segments(data, head.scan, restarts=head.interval > 0):
        if len(stops) < len(starts):
            stops.append(start - 2)
        if marker == _EOI:
            return JpegScans(headers, starts, stops)
        if marker < 0xC0 or 0xD0 <= marker <= 0xD7:
            raise Refused("damaged", f"the marker {marker:02x} at byte {start - 2:,} of the JPEG has no place there")
        if marker == _SOS:
            headers.append(data[start + 2 : end])
            starts.append(end)
        if len(starts) > scans:
            raise Refused("too_large", f"more than {scans} scans in one JPEG: a file made to keep a decoder busy")
    raise Refused("truncated", f"the JPEG stops at byte {len(data):,} before its end mark")


def _segments(data: bytes, at: int = 2, *, restarts: bool = False) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of what stands between two marks, length included; skip the bytes of scans.

    `restarts`: restart marks are expected, and skipped.
    """
    pattern, count = _MARK if restarts else _MARK_OR_RESTART, 0
    while match := pattern.search(data, at):
        count += 1
        too_many(count, "JPEG")
        at = start = match.end()
        marker = data[start - 1]
        if marker not in (_SOI, _EOI, 0x01) and not 0xD0 <= marker <= 0xD7:
            at += max(int.from_bytes(data[start : start + 2], "big"), 2)
        if marker == _DRI and any(data[start + 2 : at]):
            pattern = _MARK
        yield marker, start, at
        if marker == _EOI:
            return


def _check_restarts(data: bytes, found: JpegScans, head: Jpeg) -> None:
    if not head.interval:
        return
    most = -(-head.width // 8) * -(-head.height // 8)  # blocks of a component
    for start, stop in zip(found.starts, found.stops, strict=True):
        for number, mark in enumerate(_RESTART.finditer(data, start, stop)):
            if data[mark.start() + 1] != 0xD0 + number % 8 or number > most:
                raise Refused("damaged", "the restart marks of the JPEG are not in order: part of it is missing")


def _check_precision(found: JpegScans, head: Jpeg) -> None:
    """Each component has its scan; a progressive one sends every coefficient in several, down to its last bit: bit 0.

    Without them the decoder takes nought, which is grey.
    """
    missing = {component: set(range(64)) for component in head.components}
    for header in found.headers:
        if len(header) < 1 or len(header) != 4 + 2 * header[0]:
            raise Refused("damaged", "a scan of the JPEG has a header of the wrong length")
        first, last, bits = header[-3:] if head.frame in _PROGRESSIVE else (0, 63, 0)
        for component in header[1:-3:2]:
            if not bits & 15:
                missing.get(component, set()).difference_update(range(first, last + 1))
    if any(missing.values()):
        raise Refused("truncated", "the JPEG stops before the scans that complete its picture")


def check_tiff(found: tiff.Tiff) -> None:
    """Refuse a TIFF of which a strip or tile is not whole, where its decoder would take what there is for all."""
    one, view, largest = found.layout, memoryview(found.data), max(found.needs)
    is_jpeg = one.compression == tiff.JPEG and one.bits == 8
    new_unpacker = _unpacker(one.compression) if found.through_pillow else None  # tifffile goes to the end
    tables = [found.jpeg_tables[start:end] for mark, start, end in _segments(found.jpeg_tables) if mark == _DRI]
    for place, length, needs in zip(found.places, found.lengths, found.needs, strict=True):
        piece = view[place : place + length]
        if new_unpacker:
            packed = bytes(piece).translate(_REVERSED) if one.fill_order == 2 else piece
            _check_unpacked(new_unpacker(), packed, needs, found.most)
        elif is_jpeg:
            head = jpeg_head(bytes(piece), alone=False)
            if head.width * head.height > 2 * largest:
                raise Refused(
                    "damaged", f"a strip or tile of the TIFF is a JPEG of {head.width} x {head.height} pixels"
                )
            if tables and not head.interval:
                head = head._replace(interval=int.from_bytes(tables[-1][2:], "big"))
            _checked_scans(bytes(piece), head, one.width * one.height)


def _unpacker(compression: int) -> Callable[[], Unpacker] | None:
    """Find what unpacks strips or tiles, for their end, to which libtiff does not go."""
    if compression in tiff.DEFLATE:
        return zlib.decompressobj
    if compression == tiff.LZMA and tiff.pillow_unpacks(compression):
        with contextlib.suppress(ImportError):  # a Python may be built without
            found: Callable[[], Unpacker] = importlib.import_module("lzma").LZMADecompressor
            return found
    return None


def _check_unpacked(unpacker: Unpacker, packed: bytes | memoryview, needs: int, most: int) -> None:
    size = _unpacked(unpacker, packed, most)
    if size < needs or not (unpacker.eof or size == needs):  # some writers omit the checksum
        raise Refused("damaged", "a strip or tile of the TIFF unpacks to other bytes than its pixels")


def check_tags(data: bytes) -> None:  # a block of EXIF, or an AVIF or HEIC that has one somewhere
    """Refuse tags too many and too long to read: Pillow copies what each points at, and all may point at one place."""
    for at in [data.find(start) for start in tiff.STARTS]:
        limit = 2 * len(data) + (1 << 20)
        if at >= 0 and _tag_bytes(data[at:]) > limit:
            raise Refused("too_large", f"its tags claim more than {limit:,} bytes, out of {len(data):,}")


def _tag_bytes(block: bytes) -> int:
    """Count the bytes that the tags of the first directory point at, each as far as the block goes."""
    try:
        entries = tiff.read_directory(block, cut=True).entries.values()
    except Refused:
        return 0
    return sum(min(tiff.TYPE_BYTES.get(entry.kind, 0) * entry.length, len(block)) for entry in entries)
