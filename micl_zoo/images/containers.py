"""Takes out of a file what its decoder needs, and the tags that say how it is turned.

All else (profiles, comments, thumbnails, further frames) stays away from the decoder: it says nothing about the pixels
of the first picture, so neither its faults nor its size may decide over them. What a file claims is compared with what
it has before memory is taken for it.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ..errors import Refused
from . import integrity, tiff
from .integrity import Jpeg, too_many

_TEXT = 1 << 20  # bytes that are unpacked of a text that may hold the orientation
_PLAIN, _PLAIN_COMMENTS = 32 << 20, 100_000  # bytes of a plain PPM, which is text: 10 million numbers
_PNG_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_IEND = b"\0\0\0\0IEND\xaeB`\x82"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_KEYS = _RAW_EXIF, _XMP_TEXT = b"Raw profile type exif", b"XML:com.adobe.xmp"
_UNKNOWN_CHUNK = {b"CgBI": "a PNG as Apple packs it for iPhones (CgBI): convert it, with sips or pngcrush for example"}
_ORIENTATION_OF_XMP = re.compile(rb"tiff:Orientation(?:=\"|>)([0-9])")
# Markers of JPEG 2000: begin of a tile's part and of its data, styles of coding; those that have a length to OpenJPEG.
_SOT, _SOD, _COD, _COC = 0xFF90, 0xFF93, 0xFF52, 0xFF53
_WITH_LENGTH = b"\x50\x51\x52\x53\x55\x57\x58\x59\x5c\x5d\x5e\x5f\x60\x61\x63\x64\x74\x75\x77\x78\x90"
# Bytes that the parts of a JPEG 2000 may always take, and per sample: blocks of 4 x 4, the smallest, take 25 of them.
_LEAST_BOOKS, _BOOKS = 64 << 20, 48
_INNER = {34712: "JPEG2000", 33005: "JPEG2000", 50001: "WEBP"}  # compressions of TIFF that are formats of their own
_JP2_NEEDED = (b"ihdr", b"bpcc", b"colr", b"pclr", b"cmap", b"cdef")


class Contents(NamedTuple):
    """What of a file matters to its pixels."""

    data: bytes  # for the decoder
    width: int = 0  # as stored; 0 where only the decoder reads it
    height: int = 0
    exif: bytes = b""  # a block of tags
    xmp: bytes = b""
    orientation: int = 1  # where it is not in a block
    # Level of grey or colour that is transparent, where the decoder would take the numbers for others.
    clear: int | tuple[int, ...] | None = None
    reads_tags_itself: bool = False  # the decoder does, which turns the picture by other means, too
    bytes_per_pixel: float = 8  # of memory that decoding takes at its peak; a picture of RGB alone is 4 of them
    kind: str = ""  # where it is another format's than the file
    jpeg: Jpeg | None = None
    tiff: tiff.Tiff | None = None
    canvas: tuple[int, int, int, int] | None = None  # width and height around the frame; left and top of it

    @property
    def turn(self) -> int:
        """Orientation, 1 to 8, by the first of its places that has one."""
        return _turn(self.exif, self.xmp, self.orientation)


def _turn(exif: bytes, xmp: bytes, otherwise: int) -> int:
    """Read the orientation from EXIF, or from XMP where EXIF has none."""
    block = exif.removeprefix(b"Exif\0\0")
    if block.startswith(tiff.STARTS):
        try:
            found = tiff.read_directory(block, cut=True)
        except Refused:
            return 1  # a broken EXIF block says nothing of the pixels, which decode
        if tiff.ORIENTATION in found.entries:
            return tiff.orientation_of(found)
    match = _ORIENTATION_OF_XMP.search(xmp[:_TEXT])
    return int(match[1]) if match else otherwise


def contents(data: bytes, kind: str) -> Contents:
    """Take out of a file of a format of Pillow what its decoder needs."""
    reader = _READERS.get(kind)
    try:
        return reader(data) if reader else Contents(data, reads_tags_itself=True)
    except (struct.error, IndexError):
        raise Refused("truncated", f"the {kind} stops at byte {len(data):,} within its head") from None


def _jpeg(data: bytes) -> Contents:
    head = integrity.jpeg_head(data)
    return Contents(
        head.data, head.width, head.height, head.exif, head.xmp, bytes_per_pixel=head.bytes_per_pixel, jpeg=head
    )


def _png(data: bytes) -> Contents:
    """Leave out all chunks but those for pixels: their number, size and checksums say nothing about these."""
    if data[12:16] not in (b"IHDR", b"CgBI"):
        raise Refused("damaged", "the PNG does not begin with its size")
    texts, exif, clear, others, pieces, has_palette = dict[bytes, bytes](), b"", b"", 0, 0, False
    for kind, start, stop in integrity.png_chunks(data):
        if kind == b"IDAT":
            pieces += 1
        elif kind == b"tRNS":
            clear = data[start:stop]
        elif kind == b"PLTE":
            has_palette = True
        elif kind not in _PNG_NEEDED:
            others += 1
        if kind == b"eXIf":
            exif = data[start:stop]
        elif kind in _TEXTS and (key := data[start : min(stop, start + 80)].partition(b"\0")[0]) in _KEYS:
            texts[key] = data[start - 4 : stop]
        elif kind[:1].isupper() and kind not in _PNG_NEEDED:
            raise Refused("unsupported", _UNKNOWN_CHUNK.get(kind, f"a PNG whose pixels need a chunk {kind.decode()}"))
    if raw := _text(texts.get(_RAW_EXIF)):  # how ImageMagick writes it: hexadecimal, after three lines
        exif = _unhex(raw) or exif
    width, height, bits, colours = struct.unpack_from(">IIBB", data, 16)
    if colours == 3 and not has_palette:
        raise Refused("damaged", "the PNG has no palette for its colours")
    if clear and bits == 16 and colours == 2:
        raise Refused("unsupported", "a PNG of 16-bit RGB with one transparent colour: convert it to 8 bits or to RGBA")
    pixels = _png_of_pixels(data) if others or pieces > integrity.MAX_TABLES else data
    return Contents(pixels, width, height, exif, _text(texts.get(_XMP_TEXT)), clear=_clear(clear, bits, colours))


def _clear(chunk: bytes, bits: int, colours: int) -> int | tuple[int, ...] | None:
    """Return the transparent level or colour of a PNG of up to 8 bits; of each number only its lowest bits count."""
    count = {0: 1, 2: 3}.get(colours, 0)
    if not count or bits > 8 or len(chunk) < 2 * count:
        return None
    numbers = [(one & 2**bits - 1) * 255 // (2**bits - 1) for one in struct.unpack_from(f">{count}H", chunk)]
    return numbers[0] if count == 1 else tuple(numbers)


def _png_of_pixels(data: bytes) -> bytes:
    """Write a PNG of the chunks for pixels, these as one."""
    before, pixels = [data[:8]], bytearray(b"IDAT")
    for kind, start, stop in integrity.png_chunks(data):
        if kind == b"IDAT":
            pixels += memoryview(data)[start:stop]
        elif kind in _PNG_NEEDED and kind != b"IEND":
            before.append(data[start - 8 : stop + 4])
    sums = struct.pack(">I", len(pixels) - 4), struct.pack(">I", zlib.crc32(pixels))
    return b"".join([*before, sums[0], pixels, sums[1], _IEND])


def _text(chunk: bytes | None) -> bytes:
    """Return what a chunk of text says behind its keyword."""
    kind, _, value = (chunk or b"").partition(b"\0")
    packed = kind.startswith(b"zTXt")
    if kind.startswith(b"iTXt"):
        packed, value = value[:1] == b"\1", value[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif packed:
        value = value[1:]
    if not packed:
        return value[:_TEXT]
    try:
        return zlib.decompressobj().decompress(value, _TEXT)
    except zlib.error:
        return b""


def _unhex(text: bytes) -> bytes:
    digits = re.sub(rb"[^0-9a-fA-F]", b"", b"".join(text.split(b"\n")[3:]))
    return bytes.fromhex(digits[: len(digits) // 2 * 2].decode())


def _gif(data: bytes) -> Contents:
    """Keep the first frame, with what says which of its colours is transparent, as a file of its own size."""
    canvas: tuple[int, int] = struct.unpack_from("<HH", data, 6)
    control = b""
    for label, start, stop in integrity.gif_blocks(data):
        if label == 0x21F9:
            control = data[start:stop]
        elif label == integrity.FRAME:
            left, top, width, height = struct.unpack_from("<4H", data, start + 1)
            if not (width and height):
                raise Refused("damaged", f"the first frame of the GIF is {width} x {height} pixels")
            colours = data[10 : 13 + integrity.colour_table(data[10])]
            head, frame = struct.pack("<HH", width, height), struct.pack("<B4H", integrity.FRAME, 0, 0, width, height)
            pixels = b"".join([data[:6], head, colours, control, frame, data[start + 9 : stop], b";"])
            if (left, top, width, height) == (0, 0, *canvas):
                return Contents(pixels, width, height, bytes_per_pixel=6)
            whole = max(canvas[0], left + width), max(canvas[1], top + height)  # frames may reach over the canvas
            cost = 4 + 6 * width * height / (whole[0] * whole[1])
            return Contents(pixels, *whole, bytes_per_pixel=cost, canvas=(*whole, left, top))
    raise Refused("truncated", f"the GIF stops at byte {len(data):,} before its first frame")


def _webp(data: bytes) -> Contents:
    """Keep the picture, of an animation the first frame, as a file of its own."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise Refused("truncated", f"the WebP stops at byte {len(data):,} of {end:,}")
    chunks, animated = dict[bytes, tuple[int, int]](), False
    for kind, start, stop in _riff(data, 12, end):
        animated = animated or kind == b"ANIM"
        chunks.setdefault(kind, (start, stop))
        if kind == b"VP8X" and data[start] & 2:
            animated = True
    exif, xmp = (data[slice(*chunks[kind])] if kind in chunks else b"" for kind in (b"EXIF", b"XMP "))
    if b"VP8X" not in chunks:
        return Contents(data, *_webp_size(data, chunks), exif, xmp, bytes_per_pixel=_webp_cost(chunks))
    start = chunks[b"VP8X"][0]
    canvas = _three(data, start + 4) + 1, _three(data, start + 7) + 1
    if not animated:
        return Contents(_webp_still(data, chunks, canvas), *canvas, exif, xmp, bytes_per_pixel=_webp_cost(chunks))
    if b"ANMF" not in chunks:
        raise Refused("truncated", "the WebP is an animation without a frame")
    first, stop = chunks[b"ANMF"]
    left, top, width, height = (_three(data, first + 3 * place) for place in range(4))
    inner = dict[bytes, tuple[int, int]]()
    for kind, *place in _riff(data, first + 16, stop):
        inner.setdefault(kind, (place[0], place[1]))
    size = (width + 1, height + 1)
    if 2 * left + size[0] > canvas[0] or 2 * top + size[1] > canvas[1]:
        raise Refused("damaged", "the first frame of the WebP lies outside of its canvas")
    pixels = _webp_still(data, inner, size)
    cost = 8 + _webp_cost(inner) * size[0] * size[1] / (canvas[0] * canvas[1])
    return Contents(pixels, *canvas, exif, xmp, bytes_per_pixel=cost, canvas=(*canvas, 2 * left, 2 * top))


def _webp_cost(chunks: dict[bytes, tuple[int, int]]) -> float:
    return 17 if b"VP8L" in chunks else 13  # two canvases and a copy of RGBA; without loss one more; and some


def _webp_size(data: bytes, chunks: dict[bytes, tuple[int, int]]) -> tuple[int, int]:
    """Read the size from the head of the pixels."""
    if b"VP8 " in chunks:
        width, height = struct.unpack_from("<HH", data, chunks[b"VP8 "][0] + 6)
        return width & 0x3FFF, height & 0x3FFF
    if b"VP8L" in chunks:
        (bits,) = struct.unpack_from("<I", data, chunks[b"VP8L"][0] + 1)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise Refused("truncated", "the WebP has no picture in it")


def _webp_still(data: bytes, chunks: dict[bytes, tuple[int, int]], size: tuple[int, int]) -> bytes:
    """Write a WebP of one picture."""
    if _webp_size(data, chunks) != size:
        raise Refused("damaged", "the picture of the WebP has another size than its canvas")
    kinds = (b"ALPH", b"VP8 ") if b"VP8 " in chunks else (b"VP8L",)
    pieces = [(kind, data[slice(*chunks[kind])]) for kind in kinds if kind in chunks]
    if len(pieces) == 2:
        sides = b"".join(struct.pack("<I", side - 1)[:3] for side in size)
        pieces.insert(0, (b"VP8X", bytes([0x10, 0, 0, 0]) + sides))
    written = (kind + struct.pack("<I", len(piece)) + piece + b"\0" * (len(piece) % 2) for kind, piece in pieces)
    body = b"WEBP" + b"".join(written)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _riff(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, stop) of chunks; those behind the pixels may be cut off."""
    count = 0
    while at + 8 <= end:
        stop = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if stop > end:
            raise Refused("truncated", f"the WebP stops within the chunk at byte {at:,}")
        yield data[at : at + 4], at + 8, stop
        at = stop + stop % 2
        count += 1
        too_many(count, "WebP")


def _three(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 3], "little")


def _bmp(data: bytes) -> Contents:
    size, core = struct.unpack_from("<I", data, 14)[0], data[14] == 12
    width, height = struct.unpack_from("<HH" if core else "<ii", data, 18)
    if width < 1 or not height:
        raise Refused("damaged", f"the BMP says that it is {width} x {abs(height)} pixels")
    if size >= 56 and struct.unpack_from("<HI", data, 28) == (16, 3):
        _check_opaque(data, width, abs(height))
    return Contents(data, width, abs(height), reads_tags_itself=True)


def _check_opaque(data: bytes, width: int, height: int) -> None:
    """Refuse a BMP of 16 bits with transparency, which its plug-in leaves out; one value all over means none."""
    (alpha,), (start,) = struct.unpack_from("<H", data, 66), struct.unpack_from("<I", data, 10)
    row = width + width % 2
    words = np.frombuffer(data, "<u2", min(row * height, max(len(data) - start, 0) // 2), min(start, len(data)))
    levels = words[: len(words) // row * row].reshape(-1, row)[:, :width] & alpha
    if levels.min(initial=alpha) != levels.max(initial=0) and alpha:
        raise Refused("unsupported", "a BMP of 16 bits with transparency: convert it to PNG")


def _tiff(data: bytes) -> Contents:
    found = tiff.read_tiff(data)
    one = found.layout
    if one.compression in _INNER:
        _check_inner(data, found, _INNER[one.compression])
    stored = one.samples * max(one.bits, 8) / 8
    needs = stored + 4 + 4 * (one.photometric != 2 or bool(one.extra))
    return Contents(found.data, one.width, one.height, orientation=found.orientation, bytes_per_pixel=needs, tiff=found)


def _check_inner(data: bytes, found: tiff.Tiff, kind: str) -> None:
    """Refuse a TIFF of which a strip or tile is a file that claims more pixels than it has room for."""
    most = 2 * 8 * max(found.needs) // found.layout.bits
    for place, length in zip(found.places, found.lengths, strict=True):
        inner = contents(data[place : place + length], kind)
        if inner.width * inner.height > most:
            size = f"{inner.width} x {inner.height} pixels"
            raise Refused("damaged", f"a strip or tile of the TIFF is a {kind} of {size}, more than it has room for")


def _ico(data: bytes) -> Contents:
    """Take the largest picture, of several that are as large the one of most colours, as Pillow does."""
    (count,) = struct.unpack_from("<H", data, 4)
    entries = [struct.unpack_from("<BBBBHHII", data, 6 + 16 * number) for number in range(count)]
    if not entries:
        raise Refused("truncated", "the ICO has no picture in it")
    depths = [
        bits or (colours != 0 and (colours - 1).bit_length()) or 256 for _, _, colours, _, _, bits, _, _ in entries
    ]
    sizes = [(one[0] or 256) * (one[1] or 256) for one in entries]
    best = max(range(count), key=lambda number: (sizes[number], -depths[number], -number))
    entry = entries[best]
    size, start = entry[6:]
    picture = data[start : start + size]
    if len(picture) < size:
        raise Refused("truncated", f"the ICO stops at byte {len(data):,} within its picture")
    if picture.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(picture)._replace(kind="PNG")
    width, height = struct.unpack_from("<ii", picture, 4)
    alone = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", *entry[:7], 22) + picture
    return Contents(alone, abs(width), abs(height) // 2, bytes_per_pixel=12)


def _ppm(data: bytes) -> Contents:
    """Write it with 255 (16-bit grey: 65,535) for white and without comments."""
    kind = data[:2]
    if kind in (b"PF", b"Pf"):
        raise Refused(
            "unsupported", "a PFM of floating-point pixels, which have no defined white: convert it to 8 bits"
        )
    plain = kind in (b"P1", b"P2", b"P3")
    if plain and len(data) > _PLAIN:
        raise Refused(
            "too_large", f"a PPM written as text of {len(data):,} bytes, the limit is {_PLAIN:,}: convert it to PNG"
        )
    if plain and data.count(b"#") > _PLAIN_COMMENTS:
        raise Refused(
            "too_large", f"more than {_PLAIN_COMMENTS:,} comments in one PPM: a file made to keep a decoder busy"
        )
    numbers, at = _ppm_head(data, 2 if kind in (b"P1", b"P4") else 3)
    width, height, most = (*numbers, 1)[:3]
    samples = 3 if kind in (b"P3", b"P6") else 1
    if not (width and height and 1 <= most <= 65535):
        raise Refused("damaged", f"the PPM says that it is {width} x {height} pixels of values up to {most}")
    sized = Contents(b"", width, height, bytes_per_pixel=16 if most not in (1, 255) or plain else 4)
    count = width * height * samples
    needs = (
        (count if kind != b"P1" else width * height)
        if plain
        else -(-width // 8) * height
        if kind == b"P4"
        else count * (1 + (most > 255))
    )
    if len(data) - at < needs:
        raise Refused("truncated", f"the PPM has {len(data) - at:,} bytes for {needs:,} of pixels")
    start = b"P%d %d %d\n" % (int(kind[1:]) + 3 * plain, width, height)
    if plain:
        values = _plain_numbers(data, at, count, single=kind == b"P1")
        if kind == b"P1":
            return sized._replace(data=start + np.packbits(values.reshape(height, width) != 0, axis=1).tobytes())
    elif kind == b"P4" or (most == 255 and samples):
        return sized._replace(data=start + (b"" if kind == b"P4" else b"255\n") + data[at : at + needs])
    else:
        values = np.frombuffer(data, ">u2" if most > 255 else "u1", count, at)
    return sized._replace(data=start + _stretched(values, most, deep=samples == 1))


def _stretched(values: np.ndarray, most: int, *, deep: bool) -> bytes:
    """Bring numbers up to `most` to 255, as grey of more than 8 bits to 65,535; the end of a PPM."""
    top = 65535 if most > 255 and deep else 255
    table = np.minimum(np.rint(np.arange(65536 if most > 255 else 256) / most * top), top).astype(
        ">u2" if top > 255 else "u1"
    )
    return b"%d\n" % top + table[np.minimum(values, len(table) - 1)].tobytes()


def _ppm_head(data: bytes, count: int) -> tuple[list[int], int]:
    """Read numbers, and where the pixels begin."""
    numbers, at, part = list[int](), 2, re.compile(rb"\s*(?:#[^\r\n]*|([0-9]{1,10}))")
    for parts in range(1, 1 << 62):
        too_many(parts, "PPM")
        match = part.match(data, at)
        if match is None:
            raise Refused("damaged", "the head of the PPM is broken")
        at = match.end()
        if match[1]:
            numbers.append(int(match[1]))
            if len(numbers) == count:
                break
    return numbers, at + 1


def _plain_numbers(data: bytes, at: int, count: int, *, single: bool) -> np.ndarray:
    """Read numbers written as text, of P1 digits that may stand without space."""
    text = re.sub(rb"#[^\r\n]*", b"", data[at:]) if b"#" in data[at:] else data[at:]
    if text.translate(None, b"01 \t\n\v\f\r" if single else b"0123456789 \t\n\v\f\r"):
        raise Refused("damaged", "the PPM has letters among its numbers")
    if single:
        values = np.frombuffer(text.translate(None, b" \t\n\v\f\r"), np.uint8) - ord("0")
    else:
        values = np.fromstring(text.strip() or b"0", np.int64, sep=" ")
    if len(values) < count:
        raise Refused("truncated", f"the PPM has {len(values):,} of {count:,} numbers")
    return np.clip(values[:count], 0, 65535)


def _jpeg2000(data: bytes) -> Contents:
    """Keep the boxes that say what the numbers mean, and the first picture."""
    if data.startswith(b"\xff\x4f"):
        return _codestream(data, data)
    kept, header = [data[:12]], b""
    for kind, start, body, stop in _boxes(data, 12, len(data)):
        if kind == b"ftyp":
            kept.append(data[start:stop])
        elif kind == b"jp2h":
            inner = [data[a:c] for name, a, _, c in _boxes(data, body, stop) if name in _JP2_NEEDED]
            header = struct.pack(">I4s", 8 + sum(map(len, inner)), b"jp2h") + b"".join(inner)
        elif kind == b"jp2c":
            picture = data[body:stop]
            box = struct.pack(">I4s", len(picture) + 8 if len(picture) < 1 << 31 else 0, b"jp2c")
            found = _codestream(b"".join([*kept, header, box, picture]), picture)
            place = header.find(b"ihdr")
            if place < 0 or struct.unpack_from(">II", header, place + 4) != (found.height, found.width):
                raise Refused("damaged", "the JPEG 2000 has another size than its head says")
            return found
    raise Refused("truncated", f"the JPEG 2000 stops at byte {len(data):,} before its picture")


def _codestream(data: bytes, picture: bytes) -> Contents:
    right, bottom, left, top, tile_width, tile_height = struct.unpack_from(">6I", picture, 8)
    width, height = right - left, bottom - top
    (count,) = struct.unpack_from(">H", picture, 40)
    if not (width > 0 and height > 0 and tile_width and tile_height and count):
        raise Refused("damaged", "the JPEG 2000 has no size")
    tiles = -(-right // tile_width) * -(-bottom // tile_height)
    too_many(tiles * 80, "JPEG 2000")  # 65,535 by the standard, and kilobytes of memory each
    tile = min(tile_width, width), min(tile_height, height)
    one = count * max((_bookkeeping(style, *tile) for style in _styles(picture, count)), default=0)  # bytes of a tile
    if one * tiles > max(_LEAST_BOOKS, _BOOKS * count * width * height):
        what = f"a JPEG 2000 in parts so small that they take {one * tiles >> 20:,} MiB"
        raise Refused("too_large", f"{what}: a file made to keep a decoder busy")
    share = tile[0] * tile[1] / (width * height)
    return Contents(data, width, height, bytes_per_pixel=4 + 5 * count * share + one / (width * height))


def _styles(picture: bytes, count: int) -> Iterator[bytes]:
    """Yield what each COD and COC of a codestream says, from its levels on; found as OpenJPEG finds them."""
    at, end, parts, has_data = 2, len(picture), 0, False
    while at + 4 <= len(picture):
        marker, length = struct.unpack_from(">HH", picture, at)
        parts += 1
        too_many(parts, "JPEG 2000")
        if marker == _SOT:
            size = int.from_bytes(picture[at + 6 : at + 10], "big")
            end = at + size if size else len(picture)
        elif marker in (_COD, _COC):
            start = at + (9 if marker == _COD else 6 + (count > 256))
            has_precincts = picture[at + 4 if marker == _COD else start - 1] & 1
            yield picture[start : at + 2 + length if has_precincts else start + 5]
        elif marker == _SOD and end > at:
            at, has_data = end, True
            continue
        elif marker < 0xFF00 or marker == _SOD:
            return
        at += 2 + length if marker & 255 in _WITH_LENGTH else 2
    if not has_data:  # to OpenJPEG a picture of one grey
        raise Refused("truncated", f"the JPEG 2000 stops at byte {len(picture):,} within its head")


def _bookkeeping(style: bytes, width: int, height: int) -> int:
    """Estimate the bytes that OpenJPEG takes to keep the precincts and blocks of one component of a tile."""
    if len(style) < 5:
        return 0  # which it refuses
    found, levels = 0, min(style[0], 32)
    for level, size in enumerate((style[5:] or b"\xff" * (levels + 1))[: levels + 1]):
        precincts = blocks = 3 if level else 1  # one of each per band
        for length, precinct, block in ((width, size & 15, style[1] + 2), (height, size >> 4, style[2] + 2)):
            across = -(-length >> levels - level)
            parts = -(-across >> precinct)
            precincts *= parts
            if level:  # of each band, half as long
                across, precinct = (across + 1) // 2, max(precinct - 1, 0)
            blocks *= max(parts, -(-across >> min(block, precinct)))
        found += 200 * precincts + 400 * blocks  # as measured
    return found


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int, int]]:
    """Yield (kind, start, start of its body, stop)."""
    count = 0
    while at + 8 <= end:
        size, body = int.from_bytes(data[at : at + 4], "big"), at + 8
        if size == 1:
            size, body = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        stop = at + size if size else end
        if stop > end or stop < body:
            raise Refused("truncated", f"the JPEG 2000 stops within the box at byte {at:,}")
        yield data[at + 4 : at + 8], at, body, stop
        at = stop
        count += 1
        too_many(count, "JPEG 2000")


_READERS: dict[str, Callable[[bytes], Contents]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "GIF": _gif,
    "BMP": _bmp,
    "TIFF": _tiff,
    "JPEG2000": _jpeg2000,
    "PPM": _ppm,
    "ICO": _ico,
}
