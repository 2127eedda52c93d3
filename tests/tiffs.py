"""Writes TIFFs of every layout by its own means, and says what picture each must give."""

from __future__ import annotations

import itertools
import lzma
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK = 0, 1, 2, 3, 5  # photometric
RAW, LZW, DEFLATE, OLD_DEFLATE, PACKBITS, LZMA = 1, 5, 8, 32946, 32773, 34925  # compression
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # sample format
SHORT, LONG, LONG8 = 3, 4, 16
NO_ALPHA, PREMULTIPLIED, ALPHA = 0, 1, 2  # what an extra sample is


class Layout(NamedTuple):
    """How samples lie in a file."""

    bits: int = 8
    photometric: int = RGB
    planar: int = 1
    compression: int = RAW
    order: str = "<"
    tiled: bool = False
    sample_format: int = UNSIGNED
    extra: tuple[int, ...] = ()
    predictor: int = 1
    fill_order: int = 1
    large: bool = False  # BigTIFF

    @property
    def colours(self) -> int:
        """Samples of a pixel without the extra ones."""
        return {RGB: 3, CMYK: 4}.get(self.photometric, 1)


class Written(NamedTuple):
    """A file, and the (H, W, 3) uint8 it must decode to."""

    data: bytes
    expected: np.ndarray


def written(layout: Layout, width: int = 37, height: int = 21) -> Written:
    """Write a picture of which no two rows, columns or samples are alike."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [x * 6 + y, y * 11 + x * 2, 255 - x * 5 - y, x * y // 4, 40 + x * 4 + y * 3, 90 + y * 5]
    levels = np.stack(waves[: layout.colours + len(layout.extra)], -1) % 256  # (H, W, S), as 8 bits have it
    top = 2 ** min(layout.bits, 8) - 1
    if layout.bits < 8:
        levels = levels * top // 255
    if PREMULTIPLIED in layout.extra:
        levels[..., : layout.colours] = levels[..., : layout.colours] * levels[..., -1:] // 255
    palette = None
    if layout.photometric == PALETTE:
        palette = np.random.default_rng(0).integers(0, 256, (3, 2**layout.bits)) * 257
    data = encoded_tiff(stored(levels, layout), layout, palette)
    return Written(data, pictured(levels, layout, top, palette))


def stored(levels: np.ndarray, layout: Layout) -> np.ndarray:
    """Turn levels of at most 8 bits into the numbers of the file: 255 becomes the largest there is."""
    if layout.sample_format == FLOAT:
        return levels / 255
    wide = levels.astype(np.int64)
    if layout.bits > 8 and layout.photometric != PALETTE:
        wide = wide << (layout.bits - 8)
    return wide - 2 ** (layout.bits - 1) if layout.sample_format == SIGNED else wide


def pictured(levels: np.ndarray, layout: Layout, top: int, palette: np.ndarray | None) -> np.ndarray:
    """Compute the picture: 8 bits, transparency on white."""
    colours, extra = levels[..., : layout.colours], levels[..., layout.colours :]
    if palette is not None:
        found = (palette // 257).T[colours[..., 0]]
    elif layout.photometric == CMYK:
        inks = (colours * 255 // top).astype(np.uint8)
        found = np.asarray(Image.frombytes("CMYK", inks.shape[1::-1], inks.tobytes()).convert("RGB"))
    else:
        scaled = colours * 255 // top
        found = np.broadcast_to(255 - scaled if layout.photometric == WHITE_IS_ZERO else scaled, (*levels.shape[:2], 3))
    if layout.extra and layout.extra[0] in (PREMULTIPLIED, ALPHA):
        alpha = extra[..., :1] / 255
        return found * alpha + 255 * (1 - alpha) if layout.extra[0] == ALPHA else found + 255 * (1 - alpha)
    return found


def encoded_tiff(samples: np.ndarray, layout: Layout, palette: np.ndarray | None = None) -> bytes:
    """Write (H, W, S) numbers."""
    height, width, count = samples.shape
    side = (16, 16) if layout.tiled else (8, width)
    planes = [samples] if layout.planar == 1 else [samples[..., one : one + 1] for one in range(count)]
    pieces = [packed(piece, layout) for plane in planes for piece in _cut(plane, side, layout.tiled)]
    tags: dict[int, tuple[int, Sequence[int]]] = {
        256: (LONG, [width]),
        257: (LONG, [height]),
        258: (SHORT, [layout.bits] * count),
        259: (SHORT, [layout.compression]),
        262: (SHORT, [layout.photometric]),
        266: (SHORT, [layout.fill_order]),
        277: (SHORT, [count]),
        284: (SHORT, [layout.planar]),
        317: (SHORT, [layout.predictor]),
        339: (SHORT, [layout.sample_format] * count),
    }
    if layout.extra:
        tags[338] = (SHORT, layout.extra)
    if palette is not None:
        tags[320] = (SHORT, palette.reshape(-1).tolist())
    if layout.tiled:
        tags |= {322: (LONG, [side[1]]), 323: (LONG, [side[0]])}
    else:
        tags[278] = (LONG, [side[0]])
    return with_tags(tags, pieces, layout.order, layout.large, (324, 325) if layout.tiled else (273, 279))


def with_tags(
    tags: dict[int, tuple[int, Sequence[int]]],
    pieces: Sequence[bytes],
    order: str = "<",
    large: bool = False,
    where: tuple[int, int] = (273, 279),
) -> bytes:
    """Write tags and pieces behind one another: the head, the pieces, what does not fit a tag, the tags."""
    head = 16 if large else 8
    starts = list(itertools.accumulate((len(piece) for piece in pieces), initial=head))
    body = bytearray(b"".join(pieces))
    tags = tags | {where[0]: (LONG, starts[:-1]), where[1]: (LONG, [len(piece) for piece in pieces])}
    entries, room = b"", 8 if large else 4
    for tag, (kind, values) in sorted(tags.items()):
        value = struct.pack(f"{order}{len(values)}{ {SHORT: 'H', LONG: 'I', LONG8: 'Q'}[kind] }", *values)
        if len(value) > room:
            body += bytes(-len(body) % 2)
            place, value = head + len(body), value
            body += value
            value = struct.pack(order + ("Q" if large else "I"), place)
        entries += struct.pack(order + ("HHQ" if large else "HHI"), tag, kind, len(values)) + value.ljust(room, b"\0")
    body += bytes(-len(body) % 2)
    mark = b"II" if order == "<" else b"MM"
    first = head + len(body)
    if large:
        start = mark + struct.pack(order + "HHHQ", 43, 8, 0, first)
        return start + bytes(body) + struct.pack(order + "Q", len(tags)) + entries + bytes(8)
    start = mark + struct.pack(order + "HI", 42, first)
    return start + bytes(body) + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def _cut(plane: np.ndarray, side: tuple[int, int], padded: bool) -> Iterator[np.ndarray]:
    for top in range(0, plane.shape[0], side[0]):
        for left in range(0, plane.shape[1], side[1]):
            piece = plane[top : top + side[0], left : left + side[1]]
            if padded:
                rest = ((0, side[0] - piece.shape[0]), (0, side[1] - piece.shape[1]), (0, 0))
                piece = np.pad(piece, rest, constant_values=1)
            yield piece


def packed(samples: np.ndarray, layout: Layout) -> bytes:
    """Write one strip or tile, compressed."""
    if layout.sample_format == FLOAT:
        raw = samples.astype(f"{layout.order}f{layout.bits // 8}").tobytes()
    else:
        numbers = samples % 2**layout.bits
        if layout.predictor == 2:
            numbers = np.concatenate([numbers[:, :1], np.diff(numbers, axis=1)], 1) % 2**layout.bits
        rows = numbers.reshape(len(numbers), -1)
        raw = _bits(rows, layout.bits) if layout.bits % 8 else _bytes(rows, layout.bits // 8, layout.order)
    done = {
        RAW: lambda: raw,
        LZW: lambda: lzw(raw),
        DEFLATE: lambda: zlib.compress(raw),
        OLD_DEFLATE: lambda: zlib.compress(raw),
        PACKBITS: lambda: packbits(raw, len(raw) // len(samples)),
        LZMA: lambda: lzma.compress(raw),
    }[layout.compression]()
    if layout.fill_order == 2:
        return np.packbits(np.unpackbits(np.frombuffer(done, np.uint8)), bitorder="little").tobytes()
    return done


def _bits(rows: np.ndarray, bits: int) -> bytes:
    single = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1  # the highest first, rows filled up to bytes
    return np.packbits(single.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def _bytes(rows: np.ndarray, width: int, order: str) -> bytes:
    single = (rows[..., None] >> 8 * np.arange(width)) & 255
    return (single if order == "<" else single[..., ::-1]).astype(np.uint8).tobytes()


def packbits(raw: bytes, row: int) -> bytes:
    """Compress by runs, each row by itself."""
    found = bytearray()
    for start in range(0, len(raw), row):
        for value, run in itertools.groupby(raw[start : start + row]):
            length = len(list(run))
            while length > 1:
                step = min(length, 128)
                found += bytes([257 - step & 255 if step > 1 else 0, value])
                length -= step
            if length:
                found += bytes([0, value])
    return bytes(found)


def lzw(raw: bytes) -> bytes:
    """Compress as TIFF does: codes of 9 bits and more, the highest bit first, widened one code early."""
    codes: list[str] = [f"{256:09b}"]
    table = {bytes([one]): one for one in range(256)}
    after, known, width = 258, b"", 9
    for one in raw:
        longer = known + bytes([one])
        if longer in table:
            known = longer
            continue
        codes.append(f"{table[known]:0{width}b}")
        table[longer], after, known = after, after + 1, bytes([one])
        width = max(9, after.bit_length())
        if after == 4094:
            codes.append(f"{256:0{width}b}")
            table, after, width = {bytes([value]): value for value in range(256)}, 258, 9
    codes.append(f"{table[known]:0{width}b}")
    codes.append(f"{257:0{max(9, (after + 1).bit_length())}b}")
    text = "".join(codes)
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")
