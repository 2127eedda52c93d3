"""Detects damaged image files that decoders accept silently, filling the gap with grey.

JPEG   is whole to its end mark; one scan of Huffman codes takes exactly the bytes there are; restart marks are in
       order; a progressive file has all its precision. A changed bit that leaves the length of the codes is not seen.
PNG    every chunk fits its checksum, to the end mark.
GIF    every block is there, to the end mark or, as some writers omit it, to the end of a block. It has no checksums.
TGA    has the footer of version 2; without it nothing tells a TGA from other bytes.

The decoders of WebP, AVIF, HEIC, BMP, TIFF, JPEG 2000 and PPM refuse a file that is cut off (TIFF's also a wrong
checksum of deflate), and nothing in these files tells a changed pixel from another picture.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import Refused

MAX_SCANS = 100  # of a progressive JPEG; encoders write 10 or so, and each costs a pass over all of its coefficients
_SPARE_BYTES = 8  # unread ones that a JPEG may have before its end mark: some cameras leave a few
# Ones are no Huffman code, so they end nothing; the decoder looks 57 bits ahead, and this is 64 of them.
_PADDING = b"\xff\x00" * 8
_MARK, _MARK_OR_RESTART = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]"), re.compile(rb"\xff[^\x00\xff]")
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), (0xC2,)  # start of a frame of Huffman codes; others are rare
_SOI, _EOI, _SOS, _DRI, _APP1, _APP2 = 0xD8, 0xD9, 0xDA, 0xDD, 0xE1, 0xE2
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TYPE_BYTES = {2: 1, 1: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def check_file(data: bytes, kind: str | None) -> None:
    """Apply the checks that a whole file of a format of Pillow carries; those of a JPEG are in `jpeg_pieces`."""
    if kind == "PNG":
        _check_png(data)
    elif kind == "GIF":
        _check_gif(data)
    elif kind == "TGA" and not data.endswith(b"TRUEVISION-XFILE.\0"):
        raise Refused(
            "unsupported", "a TGA without the footer of version 2 cannot be told from other bytes: convert it to PNG"
        )


def _check_png(data: bytes) -> None:
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 12 + length
        if end > len(data):
            break
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise Refused("damaged", f"the checksum of the PNG chunk at byte {at:,} does not fit its bytes")
        if data[at + 4 : at + 8] == b"IEND":
            return
        at = end
    raise Refused("truncated", f"the PNG stops at byte {len(data):,} before its end mark")


def _check_gif(data: bytes) -> None:
    at, frames = 13 + _colour_table(data[10]), 0
    while at < len(data) and data[at] != 0x3B:
        if data[at] == 0x21:  # extension: its label, then its blocks
            at += 2
        elif data[at] == 0x2C and at + 10 < len(data):  # frame: place, size, flags, colours, width of the first code
            at += 11 + _colour_table(data[at + 9])
            frames += 1
        else:
            raise Refused("damaged", f"byte {at:,} of the GIF begins no block")
        while at < len(data) and data[at]:
            at += data[at] + 1
        at += 1
    if not frames or at > len(data):
        raise Refused("truncated", f"the GIF stops at byte {len(data):,} within a block")


def _colour_table(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


class JpegScans(NamedTuple):
    """Where the compressed picture of a JPEG lies."""

    frame: int  # the marker its frame begins with: sequential, progressive or something else
    interval: int  # blocks between restart marks; 0 for none
    headers: list[bytes]  # what each scan's header holds
    starts: list[int]  # of the bytes behind each header
    stops: list[int]


def jpeg_pieces(data: bytes) -> list[bytes]:
    """Check a JPEG and cut it into the pieces that show whether its codes fit its picture.

    A decoder must want the second piece after the first, and no more after the second: libjpeg decodes codes that went
    astray to the end of the data or to the end of the picture, whichever comes first, and neither is an error for it.
    """
    found = _scans(data)
    _check_restarts(data, found)
    _check_precision(found)
    if found.frame not in _SEQUENTIAL or len(found.starts) != 1:
        return [data]  # decoded once all scans are in: nothing shows how far each came
    start, stop = found.starts[0], found.stops[0]
    used = len(data[start:stop].rstrip(b"\0\xff"))
    cut = start + max(used - 1 - _SPARE_BYTES, 0)
    return [data[:cut], data[cut:stop] + _PADDING]


def _scans(data: bytes) -> JpegScans:
    frame = interval = 0
    headers, starts, stops = list[bytes](), list[int](), list[int]()
    for marker, start, end in _segments(data):
        if len(stops) < len(starts):
            stops.append(start - 2)
        if marker == _EOI and starts:
            return JpegScans(frame, interval, headers, starts, stops)
        if marker < 0xC0 or 0xD0 <= marker <= 0xD7:
            raise Refused("damaged", f"the marker {marker:02x} at byte {start - 2:,} of the JPEG has no place there")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = marker
        elif marker == _DRI:
            interval = int.from_bytes(data[start + 2 : end], "big")
        elif marker == _SOS:
            headers.append(data[start + 2 : end])
            starts.append(end)
        if len(starts) > MAX_SCANS:
            raise Refused("too_large", f"more than {MAX_SCANS} scans in one JPEG: a file made to keep a decoder busy")
    raise Refused("truncated", f"the JPEG stops at byte {len(data):,} before its end mark")


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of what stands between two marks, length included; skip the bytes of scans."""
    at, pattern = 2, _MARK_OR_RESTART
    while match := pattern.search(data, at):
        at = start = match.end()
        marker = data[start - 1]
        if marker not in (_SOI, _EOI, 0x01) and not 0xD0 <= marker <= 0xD7:
            at += max(int.from_bytes(data[start : start + 2], "big"), 2)
        if marker == _DRI and any(data[start + 2 : at]):
            pattern = _MARK
        yield marker, start, at
        if marker == _EOI:
            return


def _check_restarts(data: bytes, found: JpegScans) -> None:
    if not found.interval:
        return
    for start, stop in zip(found.starts, found.stops, strict=True):
        marks = b"".join(_RESTART.findall(data, start, stop))
        expected = bytes(range(0xD0, 0xD8)) * (len(marks) // 8 + 1)
        if not expected.startswith(marks):
            raise Refused("damaged", "the restart marks of the JPEG are not in order: part of it is missing")


def _check_precision(found: JpegScans) -> None:
    """A progressive JPEG sends every coefficient in several scans, down to its last bit: bit 0."""
    if found.frame not in _PROGRESSIVE:
        return
    missing: dict[int, set[int]] = {}
    for header in found.headers:
        if len(header) < 1 or len(header) != 4 + 2 * header[0]:
            raise Refused("damaged", "a scan of the JPEG has a header of the wrong length")
        first, last, bits = header[-3:]
        for component in header[1:-3:2]:
            left = missing.setdefault(component, set(range(64)))
            if not bits & 15:
                left.difference_update(range(first, last + 1))
    if any(missing.values()):
        raise Refused("truncated", "the JPEG stops before the scans that complete its picture")


def check_tags(data: bytes) -> None:  # a file before Pillow opens it, or a block of EXIF
    """Refuse tags too many and too long to read: Pillow copies what each points at, and all may point at one place."""
    if data.startswith(b"\xff\xd8"):
        blocks = _jpeg_tag_blocks(data)
    elif data[4:8] == b"ftyp":  # AVIF and HEIC: somewhere
        blocks = [data[at:] for start in _TIFF_STARTS if (at := data.find(start)) >= 0]
    else:
        blocks = [data.removeprefix(b"Exif\0\0")]
    for block in blocks:
        limit = 2 * len(block) + (1 << 20)
        if block.startswith(_TIFF_STARTS) and _tag_bytes(block) > limit:
            raise Refused("too_large", f"its tags claim more than {limit:,} bytes, out of {len(block):,}")


def _jpeg_tag_blocks(data: bytes) -> list[bytes]:
    exif, others = b"", []
    for marker, start, end in _segments(data):
        if marker == _SOS:
            break
        if marker == _APP1 and data.startswith(b"Exif\0\0", start + 2):
            exif += data[start + 8 : end]  # several count as one
        elif marker == _APP2 and data.startswith(b"MPF\0", start + 2):
            others.append(data[start + 6 : end])
    return [exif, *others]


def _tag_bytes(block: bytes) -> int:
    """Count the bytes that the tags of the first directory point at, each as far as the block goes."""
    order = "<" if block.startswith(b"I") else ">"
    large = b"+" in block[:4]  # BigTIFF: all numbers are of 8 bytes
    head, entry, pointer = ("Q", "HHQ", 16) if large else ("H", "HHL", 8)
    step = struct.calcsize(order + entry) + pointer // 2
    try:
        (at,) = struct.unpack_from(order + ("Q" if large else "L"), block, pointer // 2)
        (count,) = struct.unpack_from(order + head, block, at)
    except struct.error:
        return 0
    at += struct.calcsize(order + head)
    found = 0
    for place in range(at, min(at + count * step, len(block) - step + 1), step):
        _, kind, length = struct.unpack_from(order + entry, block, place)
        found += min(_TYPE_BYTES.get(kind, 0) * length, len(block))
    return found
