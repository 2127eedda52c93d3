"""A corpus of damaged files, from every format that Pillow writes and an encoder may be given."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import picture
from PIL import Image, features

from micl_zoo.errors import MiclZooError

# Kinds whose files carry no checksum of their pixels: a changed byte gives another valid picture, and nobody can tell.
# All of them are refused where they are cut off; a JPEG also where bytes are lost, or changed so that its codes end
# elsewhere.
NO_CHECKSUM = frozenset(
    {
        "jpeg",
        "jpeg-grey",
        "jpeg-cmyk",
        "jpeg-progressive",
        "jpeg-restarts",
        "webp",
        "webp-lossless",
        "gif",
        "gif-frames",
    }
    | {"bmp", "tiff", "tiff-lzw", "tiff-deflate", "tiff-jpeg", "avif", "jpeg2000", "ppm", "tga", "ico"}
)

# Kinds where bytes lost from the middle are seen: JPEG's codes no longer fit its picture, the others miss their length.
CUT_IS_SEEN = frozenset({"jpeg", "jpeg-grey", "jpeg-cmyk", "jpeg-progressive", "jpeg-restarts", "bmp", "tiff", "ppm"})


class Damaged(NamedTuple):
    """One file.

    Attributes:
        name: of the file; what was done to it.
        data: its bytes.
        certain: it must be refused; else it may be a picture as good as any.
    """

    name: str
    data: bytes
    certain: bool = True


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """A file in memory."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def whole_files() -> dict[str, bytes]:
    """Undamaged files by kind: a picture with some noise, so that every part of a file matters."""
    noise = np.random.default_rng(0).integers(-25, 25, (60, 80, 3))
    image = Image.fromarray((np.asarray(picture(1, 80, 60), dtype=int) + noise).clip(0, 255).astype(np.uint8))
    deep = Image.fromarray(np.random.default_rng(1).integers(0, 65536, (60, 80), dtype=np.uint16))
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpeg": (image, "JPEG", {"quality": 90}),
        "jpeg-grey": (image.convert("L"), "JPEG", {"quality": 90}),
        "jpeg-cmyk": (image.convert("CMYK"), "JPEG", {"quality": 90}),
        "jpeg-progressive": (image, "JPEG", {"quality": 90, "progressive": True}),
        "jpeg-restarts": (image, "JPEG", {"quality": 90, "restart_marker_rows": 1}),
        "png": (image, "PNG", {}),
        "png-16": (deep, "PNG", {}),
        "png-palette": (image.quantize(64), "PNG", {}),
        "webp": (image, "WEBP", {}),
        "webp-lossless": (image, "WEBP", {"lossless": True}),
        "gif": (image, "GIF", {}),
        "gif-frames": (image, "GIF", {"save_all": True, "append_images": [picture(2, 80, 60)]}),
        "bmp": (image, "BMP", {}),
        "tiff": (image, "TIFF", {}),
        "tiff-lzw": (image, "TIFF", {"compression": "tiff_lzw"}),
        "tiff-deflate": (image, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "tiff-jpeg": (image, "TIFF", {"compression": "jpeg"}),
        "ppm": (image, "PPM", {}),
        "tga": (image, "TGA", {}),
        "ico": (image, "ICO", {"sizes": [(48, 48)]}),
    }
    if features.check("jpg_2000"):
        kinds["jpeg2000"] = (image, "JPEG2000", {})
    if "AVIF" in Image.SAVE:
        kinds["avif"] = (image, "AVIF", {})
    return {kind: encoded(image, name, **options) for kind, (image, name, options) in kinds.items()}


def corpus() -> list[Damaged]:
    """All of it, the same every time."""
    found = [*_others(), *bombs()]
    for number, (kind, data) in enumerate(whole_files().items()):
        found += _cut(kind, data)
        found += _changed(kind, data, np.random.default_rng(number))
    return found


def _cut(kind: str, data: bytes) -> Iterator[Damaged]:
    """Cut off at every tenth and just before the end; and with the middle lost."""
    for tenth in range(1, 10):
        yield Damaged(f"{kind}-cut-at-{tenth}0-percent", data[: len(data) * tenth // 10])
    yield Damaged(f"{kind}-cut-before-its-end", data[:-24])
    third = len(data) // 3
    lossless = kind not in NO_CHECKSUM
    yield Damaged(f"{kind}-without-its-middle", data[:third] + data[2 * third :], lossless or kind in CUT_IS_SEEN)
    if kind.startswith("jpeg") and kind != "jpeg2000":
        yield Damaged(f"{kind}-cut-and-ended", data[: len(data) * 2 // 3] + b"\xff\xd9")


def _changed(kind: str, data: bytes, random: np.random.Generator) -> Iterator[Damaged]:
    """A byte flipped in the header, the middle, the tail; and a wrong first word."""
    size = len(data)
    for part, (low, high) in {
        "header": (2, 40),
        "middle": (size // 3, 2 * size // 3),
        "tail": (size - 40, size),
    }.items():
        for time in range(2):
            flipped = bytearray(data)
            flipped[int(random.integers(low, high))] ^= int(random.integers(1, 256))
            yield Damaged(f"{kind}-flipped-in-its-{part}-{time}", bytes(flipped), kind not in NO_CHECKSUM)
    yield Damaged(f"{kind}-with-a-wrong-start", b"\x7fELF" + data[4:])


def _others() -> Iterator[Damaged]:
    """Not pictures at all."""
    random = np.random.default_rng(5)
    texts = {
        "empty": b"",
        "one-byte": b"\xff",
        "letter": b"Dear Sir or Madam,\n",
        "html": b"<!doctype html><html><body>404 Not Found</body></html>",
        "json": b'{"error": "rate limit"}',
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\nshowpage\n",
        "pdf": b"%PDF-1.7\n1 0 obj\n",
        "gzip": b"\x1f\x8b\x08" + bytes(40),
        "zeros": bytes(5000),
        "ones": b"\xff" * 5000,
        "jpeg-start": b"\xff\xd8\xff",
        "png-start": b"\x89PNG\r\n\x1a\n",
        "riff-start": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        "gif-start": b"GIF89a",
        "heic-start": struct.pack(">I8s4s4s", 24, b"ftypheic", b"\0\0\0\0", b"heic") + bytes(40),
        "avif-start": struct.pack(">I8s4s4s", 24, b"ftypavif", b"\0\0\0\0", b"avif") + bytes(40),
    }
    yield from (Damaged(name, data) for name, data in texts.items())
    yield from (Damaged(f"random-{number}", random.bytes(3000)) for number in range(5))


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    """A PNG of 8-bit grey with a right checksum everywhere."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = b"".join(chunks) + chunk(b"IDAT", zlib.compress(pixels or bytes(min((width + 1) * height, 5000))))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def tiff(tags: list[tuple[int, int, int, int]], tail: bytes = b"") -> bytes:
    """Little-endian, with these (tag, type, count, value)."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + tail


def bombs() -> Iterator[Damaged]:
    """Small files that claim to be large, or are where they should not be."""
    jpeg = encoded(picture(1), "JPEG")
    frame = jpeg.index(b"\xff\xc0") + 5
    zeros = zlib.compress(bytes(20_000_000), 9)
    half = 2**31 - 1
    strip = [(258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, half), (278, 4, 1, half), (279, 4, 1, half)]
    many = [(tag, 1, 1_000_000, 8) for tag in range(1000, 6000)]
    for name, (width, height) in {"absurd": (half, half), "large": (60_000, 60_000), "long": (half, 2)}.items():
        yield Damaged(f"png-{name}", png(width, height))
        yield Damaged(f"tiff-{name}", tiff([(256, 4, 1, width), (257, 4, 1, height), *strip]))
        yield Damaged(
            f"bmp-{name}", b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, width, height, 1, 24, *bytes(6))
        )
        yield Damaged(f"ppm-{name}", f"P6 {width} {height} 255\n".encode() + bytes(99))
    for width, height in ((65535, 65535), (0, 0), (0, 9), (9, 0)):
        size = f"{width}-by-{height}"
        yield Damaged(f"jpeg-{size}", jpeg[:frame] + struct.pack(">HH", height, width) + jpeg[frame + 4 :])
        yield Damaged(f"png-{size}", png(width, height))
        yield Damaged(f"tiff-{size}", tiff([(256, 4, 1, width), (257, 4, 1, height), *strip]))
        yield Damaged(f"tga-{size}", struct.pack("<BBB5xHHHHBB", 0, 0, 2, 0, 0, width, height, 24, 0) + bytes(99))
    gif = encoded(picture(1), "GIF")
    yield Damaged("gif-65535-by-65535", gif[:6] + b"\xff\xff\xff\xff" + gif[10:])
    canvas = struct.pack("<I", 16_382)[:3] * 2
    yield Damaged("webp-canvas", b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0" + canvas + b"ANIM\x06\0\0\0" + bytes(6))
    yield Damaged("png-chunk-of-2-gigabytes", png(9, 9)[:33] + struct.pack(">I", half) + b"IDAT" + bytes(99))
    yield Damaged("png-text-bomb", png(9, 9, *(chunk(b"zTXt", b"a\0\0" + zeros) for _ in range(3))), certain=False)
    yield Damaged("png-one-pixel", png(1, 1))
    yield Damaged("tiff-tags", tiff([(256, 4, 1, 9), (257, 4, 1, 9), *strip, *many], bytes(1_000_000)))
    exif = tiff([(tag, 1, 60_000, 0) for tag in range(1000, 6000)])
    marks = b"".join(
        b"\xff\xe1" + struct.pack(">H", 65_000) + b"Exif\0\0" + exif.ljust(64_992, b"\0") for _ in range(9)
    )
    yield Damaged("jpeg-tags", jpeg[:2] + marks + jpeg[2:], certain=False)
    yield Damaged("jpeg-scans", _many_scans())


def _many_scans() -> bytes:
    """A progressive JPEG that says its first scan over and over."""
    jpeg = encoded(picture(1), "JPEG", progressive=True)
    start = jpeg.index(b"\xff\xda")
    stop = jpeg.index(b"\xff\xda", start + 2)
    return jpeg[:stop] + jpeg[start:stop] * 500 + jpeg[stop:]


STRANGE = (None, True, -1, 10**400, float("nan"), "\x1b[2J", [], {}, [[]])


def wrecks(made: Any, at: tuple[Any, ...] = (), spare: str = "") -> Iterator[tuple[str, Any]]:
    """Copies of what JSON holds with one thing strange or missing, and the place of it; inside `spare` all stays."""
    for key in list(made) if isinstance(made, dict) else range(min(len(made), 2)) if isinstance(made, list) else ():
        for strange in (*STRANGE, "missing"):
            other = made.copy()
            if strange == "missing":
                del other[key]
            else:
                other[key] = strange
            yield f"{(*at, key)}: {str(strange)[:20]}", other
        for what, inner in wrecks(made[key], (*at, key)) if key != spare else ():
            other = made.copy()
            other[key] = inner
            yield what, other


def complaint(what: str, call: Callable[[], object]) -> str:
    """What a call says in an error of our own; empty where it says nothing. Any other error fails the test."""
    try:
        call()
    except MiclZooError as error:
        return str(error)
    except Exception as error:
        pytest.fail(f"{what}: {error!r}")
    return ""
