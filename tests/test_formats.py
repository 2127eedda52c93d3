"""What a file is by its first bytes, and what of it reaches a decoder."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from conftest import picture
from damaged import chunk, encoded
from PIL import Image, features

from micl_zoo.errors import Refused
from micl_zoo.images import decode as module
from micl_zoo.images import integrity
from micl_zoo.images.containers import contents
from micl_zoo.images.decode import Decoding, decode, decode_pixels, refusal_of
from micl_zoo.images.formats import kind_of
from micl_zoo.images.transform import Transform

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def refusal(data: bytes, **options: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        decode(data, **options)
    return caught.value


OTHERS = {
    "JPEG XL": b"\xff\x0a" + bytes(90),
    "JPEG XL, too": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(90),
    "PSD": b"8BPS\0\1" + bytes(90),
    "PDF": b"%PDF-1.7\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "PostScript of DOS": b"\xc5\xd0\xd3\xc6" + bytes(90),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "SVG behind much": b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- made\nby hand -->\n<!DOCTYPE svg>\n<SVG>",
    "HTML": b"<!doctype html><title>404</title>",
    "HTML behind much": b"\n <!-- x --><!-- y --> <html lang=en>",
    "XML": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "JSON": b'{"error": "rate limit"}',
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "video": struct.pack(">I", 24) + b"ftypisom" + bytes(90),
    "video of QuickTime": struct.pack(">I", 24) + b"ftypqt  " + bytes(90),
    "WebM": b"\x1a\x45\xdf\xa3" + bytes(90),
    "AVI": b"RIFF\0\1\0\0AVI LIST" + bytes(90),
    "MPEG": b"\0\0\1\xba" + bytes(90),
    "RAW": struct.pack(">I", 24) + b"ftypcrx " + bytes(90),
    "RAW of Fujifilm": b"FUJIFILMCCD-RAW 0201" + bytes(90),
    "RAW of Olympus": b"IIRO\x08\0\0\0" + bytes(90),
    "RAW of Panasonic": b"IIU\0\x18\0\0\0" + bytes(90),
    "zip": b"PK\3\4" + bytes(90),
    "gzip": b"\x1f\x8b\x08" + bytes(40),
    "xz": b"\xfd7zXZ\0" + bytes(40),
    "tar": bytes(257).replace(b"\0", b"a") + b"ustar\0" + bytes(300),
    "DICOM": bytes(128) + b"DICM" + bytes(90),
    "FITS": b"SIMPLE  =                    T",
    "OpenEXR": b"v/1\1" + bytes(90),
    "XCF": b"gimp xcf v011" + bytes(90),
    "DjVu": b"AT&TFORM" + bytes(90),
    "ICNS": b"icns" + bytes(90),
    "DirectDraw": b"DDS \x7c" + bytes(90),
    "QOI": b"qoif" + bytes(90),
    "metafile": b"\xd7\xcd\xc6\x9a" + bytes(90),
    "NumPy": b"\x93NUMPY\1\0" + bytes(90),
    "parquet": b"PAR1" + bytes(90),
    "OLE": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(90),
    "macOS": b"\0\5\x16\7\0\2\0\0" + bytes(90),
    "program": b"\x7fELF" + bytes(90),
    "sound": b"ID3\4" + bytes(90),
    "HTML without a head": b"<script>location = 'login'</script><p>moved",
    "HTML of a proxy": b"\n<P>404</P>",
    "PAM": b"P7\nWIDTH 2\n",
    "XBM": b"#define it-is_width 9\n",
    "XBM with a comment": b"/* made by hand */\n#define it_width 9\n",
    "XPM": b"/* XPM */\nstatic char",
    "DPX": b"SDPX" + bytes(90),
    "Cineon": b"\x80\x2a\x5f\xd7" + bytes(90),
    "MIFF": b"id=ImageMagick  version=1.0",
    "BLP": b"BLP2" + bytes(90),
    "XWD": b"\0\0\0\x70\0\0\0\7\0\0\0\2" + bytes(90),
    "PICT": bytes(522) + b"\0\x11\2\xff" + bytes(90),
    "cursor": b"\0\0\2\0\1\0" + bytes(90),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_named_with_the_way_on(name: str) -> None:
    refused = refusal(OTHERS[name])
    assert refused.reason == "unsupported"
    assert name.split(",")[0].split(" ")[0].lower() in refused.detail.lower()
    assert ": " in refused.detail


def test_the_table_of_other_formats_says_nothing_of_text_and_noise() -> None:
    random = np.random.default_rng(7)
    for data in (b"Dear Sir or Madam", b"no", bytes(5000), b"\xff" * 5000, b"BMW is a car maker", b"P6 is a processor"):
        assert refusal(data).reason == "not_an_image", data
    for _ in range(50):
        assert refusal(random.bytes(3000)).reason in ("not_an_image", "unsupported")
    assert refusal(b"<!-- " * 800).reason == "not_an_image"  # and takes no time


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_a_tga_without_a_footer_is_known_by_its_length(mode: str) -> None:
    data = encoded(picture(1, 61, 40).convert(mode), "TGA")[:-26]
    assert np.array_equal(
        np.asarray(decode(data)), np.asarray(decode(encoded(picture(1, 61, 40).convert(mode), "TGA")))
    )
    for other in (data[:-1], data + b"\0"):
        assert refusal(other).reason == "unsupported"
        assert "TGA" in refusal(other).detail


def bmp(bits: int, compression: int = 0, masks: tuple[int, ...] = (), pixels: bytes = bytes(8 * 8 * 8)) -> bytes:
    """Of 8 x 8 pixels, with a header of version 5 where there is a mask of alpha."""
    size = 124 if len(masks) == 4 else 40
    extra = struct.pack(f"<{len(masks)}I", *masks).ljust(size - 40, b"\0")
    header = struct.pack("<IiiHHIIiiII", size, 8, 8, 1, bits, compression, len(pixels), 0, 0, 0, 0) + extra
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(pixels), 0, 0, 14 + len(header)) + header + pixels


def test_kinds_of_bmp_that_are_not_read_are_named() -> None:
    core = b"BM" + struct.pack("<IHHI", 600, 0, 0, 30) + struct.pack("<IiiHH", 16, 8, 8, 1, 24) + bytes(500)
    masks = [(0xF00, 0xF0, 0xF), (0x3FF00000, 0xFFC00, 0x3FF)]
    layouts = [bmp(16, 3, masks[0]), bmp(32, 3, masks[1]), core]
    for data in [bmp(2), bmp(64), bmp(0, 4), *(bmp(24, one) for one in (4, 5, 6, 11)), *layouts]:
        refused = refusal(data)
        assert refused.reason == "unsupported"
        assert "BMP" in refused.detail
        assert ": convert it" in refused.detail
    negative = bytearray(bmp(24))
    struct.pack_into("<i", negative, 18, -8)
    assert (refusal(bytes(negative)).reason, "-8 x 8" in refusal(bytes(negative)).detail) == ("damaged", True)


def test_transparency_that_a_bmp_loses_is_refused() -> None:
    masks = (0x7C00, 0x3E0, 0x1F, 0x8000)
    for words, reads in [([0x801F] * 64, True), ([0x001F] * 64, True), ([0x801F] * 63 + [0x1F], False)]:
        data = bmp(16, 3, masks, struct.pack("<64H", *words))
        if reads:
            assert decode(data).getpixel((7, 0)) == (0, 0, 255)
        else:
            assert "transparency" in refusal(data).detail


JPEG = encoded(picture(1, 64, 48), "JPEG", quality=90)
FRAME = JPEG.index(b"\xff\xc0")


@pytest.mark.parametrize(
    ("marker", "name"), [(0xC3, "lossless"), (0xC5, "hierarchical"), (0xF7, "lossless"), (0xCB, "lossless")]
)
def test_rare_kinds_of_jpeg_are_named(marker: int, name: str) -> None:
    refused = refusal(JPEG[: FRAME + 1] + bytes([marker]) + JPEG[FRAME + 2 :])
    assert (refused.reason, name in refused.detail) == ("unsupported", True)


def test_a_jpeg_of_twelve_bits_is_named() -> None:
    assert "12 bits" in refusal(JPEG[: FRAME + 4] + b"\x0c" + JPEG[FRAME + 5 :]).detail


def segment(marker: int, body: bytes) -> bytes:
    return bytes([255, marker]) + struct.pack(">H", len(body) + 2) + body


IN_A_JPEG = {
    "an ICC profile without a body": segment(0xE2, b"ICC_PROFILE\0"),
    "an ICC profile that is cut": segment(0xE2, b"ICC_PROFILE\0\1"),
    "a short mark of Adobe": segment(0xEE, b"Adobe"),
    "a shorter one": segment(0xEE, b"Ado"),
    "a short JFIF": segment(0xE0, b"JFIF\0"),
    "a broken MPF": segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
    "a broken EXIF": segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "a broken 8BIM": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\xff"),
    "an empty comment": segment(0xFE, b""),
    "many blocks of EXIF": segment(0xE1, b"Exif\0\0abcd") * 3000,
    "many comments": segment(0xFE, b"abcd") * 3000,
}


@pytest.mark.parametrize("name", IN_A_JPEG)
@pytest.mark.parametrize("fast", [False, True])
def test_segments_beside_the_pixels_of_a_jpeg_do_not_matter(name: str, fast: bool) -> None:
    odd, transform = JPEG[:2] + IN_A_JPEG[name] + JPEG[2:], Transform.square(32, 32)
    whole = decode_pixels(JPEG, transform, Decoding(fast=fast))
    assert np.array_equal(decode_pixels(odd, transform, Decoding(fast=fast)), whole)


@pytest.mark.parametrize("mode", ["CMYK", "RGB", "L"])
def test_the_colours_of_a_jpeg_are_kept(mode: str) -> None:
    image = picture(2, 64, 48).convert(mode)
    for options in ({}, {"keep_rgb": True} if mode == "RGB" else {}, {"subsampling": 0}):
        data = encoded(image, "JPEG", quality=95, **options)
        with Image.open(io.BytesIO(data)) as plain:
            assert np.array_equal(np.asarray(decode(data)), np.asarray(plain.convert("RGB")))


DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def png_rows(numbers: np.ndarray, bits: int) -> bytes:
    flat = numbers.reshape(len(numbers), -1)
    if bits == 16:
        packed = flat.astype(">u2").view(np.uint8).reshape(len(flat), -1)
    else:
        single = (flat[..., None] >> np.arange(bits - 1, -1, -1)) & 1
        packed = np.packbits(single.reshape(len(flat), -1).astype(np.uint8), axis=1)
    return b"".join(b"\0" + row.tobytes() for row in packed)


def png_file(numbers: np.ndarray, bits: int, colours: int, *chunks: bytes, interlaced: bool = False) -> bytes:
    height, width = numbers.shape[:2]
    parts = [numbers[top::down, left::across] for left, top, across, down in PASSES] if interlaced else [numbers]
    raw = b"".join(png_rows(part, bits) for part in parts if part.size)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colours", "bits"), [(one, bits) for one, depths in DEPTHS.items() for bits in depths])
@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("interlaced", [False, True])
def test_every_kind_of_png_is_right_or_unsupported(colours: int, bits: int, clear: bool, interlaced: bool) -> None:
    y, x = np.mgrid[0:19, 0:23]
    top = 2**bits - 1
    levels = np.stack([(x * 11 + y * 3 + one * 50) % 256 for one in range(CHANNELS[colours])], -1)
    stored = levels * top // 255
    if bits == 16:
        stored[..., 0] = stored[..., 0] & 0xFF00 | (x + y) & 255  # so that the lower bytes are not the higher ones
    random = np.random.default_rng(1)
    palette, alphas = random.integers(0, 256, (min(top, 255) + 1, 3)), random.integers(0, 256, min(top, 255) + 1)
    key, chunks = stored[5, 7], []
    if colours == 3:
        chunks.append(chunk(b"PLTE", palette.astype(np.uint8).tobytes()))
    if clear and colours in (0, 2, 3):
        value = alphas.astype(np.uint8).tobytes() if colours == 3 else struct.pack(f">{len(key)}H", *key.tolist())
        chunks.append(chunk(b"tRNS", value))
    cut = stored >> 8 if bits == 16 else stored * 255 // top
    found = palette[stored[..., 0]] if colours == 3 else cut[..., : 1 if colours in (0, 4) else 3]
    alpha = np.ones((19, 23, 1))
    if colours in (4, 6):
        alpha = cut[..., -1:] / 255
    elif clear:
        alpha = alphas[stored] / 255 if colours == 3 else 1.0 - (stored == key).all(-1, keepdims=True)
    expected = np.broadcast_to(found * alpha + 255 * (1 - alpha), (19, 23, 3))
    data = png_file(stored, bits, colours, *chunks, interlaced=interlaced)
    if (colours, bits, clear) == (2, 16, True):
        assert refusal(data).reason == "unsupported"
    else:
        assert np.abs(np.asarray(decode(data)) - expected).max() <= 1


RGB = np.asarray(picture(3, 40, 30)).astype(int)
WRONG_SUM = chunk(b"pHYs", bytes(9))[:-1] + b"?"
LARGE = zlib.compress(b"history " * 200_000)
IN_A_PNG = {
    "a large profile": chunk(b"iCCP", b"printer\0\0" + LARGE),
    "an empty profile": chunk(b"iCCP", b""),
    "a profile packed by an unknown method": chunk(b"iCCP", b"x\0\1" + LARGE),
    "a large packed text": chunk(b"zTXt", b"Raw profile type xmp\0\0" + LARGE),
    "many of them": chunk(b"zTXt", b"a\0\0" + LARGE) * 200,
    "a large text of other tongues": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE),
    "a text that unpacks to nothing": chunk(b"zTXt", b"Raw profile type exif\0\0nonsense"),
    "a text that is no tags": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nzz00q"),
    "a large text": chunk(b"tEXt", b"workflow\0" + b"a" * 7_000_000),
    "a wrong checksum": WRONG_SUM,
    "a short cHRM": chunk(b"cHRM", b"abc"),
    "a short pHYs": chunk(b"pHYs", b"abc"),
    "a long gAMA": chunk(b"gAMA", bytes(99)),
    "an sRGB that cannot be": chunk(b"sRGB", b""),
    "a chunk nobody knows": chunk(b"prVt", b"abc"),
    "broken tags": chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    "a broken animation": chunk(b"acTL", b"\0") + chunk(b"fcTL", b"") + chunk(b"fdAT", b""),
    "ten thousand chunks": chunk(b"teXt", b"") * 10_000,
}


@pytest.mark.parametrize("name", IN_A_PNG)
def test_chunks_beside_the_pixels_of_a_png_do_not_matter(name: str) -> None:
    data = png_file(RGB, 8, 2, IN_A_PNG[name])
    assert np.array_equal(np.asarray(decode(data)), RGB)
    behind = png_file(RGB, 8, 2).replace(chunk(b"IEND", b""), IN_A_PNG[name] + chunk(b"IEND", b""))
    assert np.array_equal(np.asarray(decode(behind)), RGB)


def test_chunks_that_pixels_need_are_checked() -> None:
    data = png_file(RGB, 8, 2, chunk(b"pHYs", bytes(9)))
    place = data.index(b"IDAT")
    for at in (*range(place, place + 4), place + 9, 20, 30):
        for flip in (1, 0x20, 0x80):
            odd = bytearray(data)
            odd[at] ^= flip
            assert refusal(bytes(odd)).reason in ("damaged", "truncated", "unsupported")
    assert refusal(png_file(RGB, 8, 2, chunk(b"NEWs", b""))).reason == "unsupported"
    apple = data[:8] + chunk(b"CgBI", bytes(4)) + data[8:]
    assert "iPhones" in refusal(apple).detail
    assert refusal(data[:-12]).reason == "truncated"
    assert refusal(data[:8] + data[33:]).reason == "damaged"


def test_pixels_in_many_chunks_are_joined() -> None:
    whole = png_file(RGB, 8, 2)
    at = whole.index(b"IDAT") - 4
    packed = whole[at + 8 : -16]
    pieces = b"".join(chunk(b"IDAT", packed[one : one + 1]) for one in range(len(packed)))
    assert len(packed) > 2 * integrity.MAX_TABLES
    assert np.array_equal(np.asarray(decode(whole[:at] + pieces + chunk(b"IEND", b""))), RGB)


EXIF = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\3\0\0\0\1\0\6\0\0" + bytes(4)  # turned by 90 degrees
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
HEX = b"\nexif\n      %d\n%s\n" % (len(EXIF), EXIF.hex().encode())
TURNING = {
    "eXIf": chunk(b"eXIf", EXIF),
    "eXIf with its name": chunk(b"eXIf", b"Exif\0\0" + EXIF),
    "ImageMagick's text": chunk(b"tEXt", b"Raw profile type exif\0" + HEX),
    "ImageMagick's packed text": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(HEX)),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    "packed XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP + bytes(2_000_000))),
}


@pytest.mark.parametrize("name", TURNING)
@pytest.mark.parametrize("behind", [False, True])
def test_a_png_is_turned_by_each_of_its_tags(name: str, behind: bool) -> None:
    data = png_file(RGB, 8, 2, *([] if behind else [TURNING[name]]))
    if behind:
        data = data.replace(chunk(b"IEND", b""), TURNING[name] + chunk(b"IEND", b""))
    assert np.array_equal(np.asarray(decode(data)), np.rot90(RGB, -1))
    assert np.array_equal(np.asarray(decode(data, exif="keep")), RGB)


IN_A_JPEG_TURNING = {
    "EXIF": segment(0xE1, b"Exif\0\0" + EXIF),
    "EXIF in two parts": segment(0xE1, b"Exif\0\0" + EXIF[:12]) + segment(0xE1, b"Exif\0\0" + EXIF[12:]),
    "XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP),
}


@pytest.mark.parametrize("segments", IN_A_JPEG_TURNING.values(), ids=IN_A_JPEG_TURNING)
def test_a_jpeg_is_turned_by_each_of_its_tags(segments: bytes) -> None:
    assert decode(JPEG[:2] + segments + JPEG[2:]).size == (48, 64)
    assert decode(JPEG[:2] + segments + JPEG[2:], exif="keep").size == (64, 48)


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_chunks(image: Image.Image, **options: Any) -> list[tuple[bytes, bytes]]:
    data, at, found = encoded(image, "WEBP", **options), 12, []
    while at < len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        found.append((data[at : at + 4], data[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return found


def three(*numbers: int) -> bytes:
    return b"".join(struct.pack("<I", number)[:3] for number in numbers)


@pytest.mark.parametrize("options", [{}, {"lossless": True}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_chunks_beside_the_pixels_of_a_webp_do_not_matter(mode: str, options: dict[str, Any]) -> None:
    image = picture(4, 41, 33).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    pixels = [one for one in webp_chunks(image, **options) if one[0] != b"VP8X"]
    plain = np.asarray(decode(encoded(image, "WEBP", **options)))
    flags = 0x2C | (0x10 if mode == "RGBA" else 0)
    head = (b"VP8X", bytes([flags, 0, 0, 0]) + three(40, 32))
    odd = riff(head, (b"ICCP", b"?"), *pixels, (b"EXIF", EXIF), (b"XMP ", b"?" * 1001), (b"what", b""))
    assert np.array_equal(np.asarray(decode(odd, exif="keep")), plain)
    assert np.array_equal(np.asarray(decode(odd)), np.rot90(plain, -1))
    assert refusal(odd[:-9]).reason == "truncated"
    assert np.array_equal(np.asarray(decode(odd + b"behind it", exif="keep")), plain)


@pytest.mark.parametrize("clear", [None, 0, 3])
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (9, 9)])
def test_the_first_frame_of_a_gif_is_put_where_it_is_on_its_canvas(clear: int | None, place: tuple[int, int]) -> None:
    image = picture(1, 20, 10).quantize(8)
    whole = encoded(image, "GIF", **{} if clear is None else {"transparency": clear})
    at = next(start for label, start, _ in integrity.gif_blocks(whole) if label == integrity.FRAME)
    data = bytearray(whole)
    struct.pack_into("<HH", data, 6, 24, 16)
    struct.pack_into("<HH", data, at + 1, *place)
    got, frame = np.asarray(decode(bytes(data))), np.asarray(decode(whole))
    expected = np.full((max(16, place[1] + 10), max(24, place[0] + 20), 3), 255, np.uint8)
    expected[place[1] : place[1] + 10, place[0] : place[0] + 20] = frame
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("high", [0, 0xFF00])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_of_a_transparent_level_only_the_bits_of_the_pixels_count(bits: int, high: int) -> None:
    levels = (np.arange(16) % 2**bits).astype(np.uint8)
    row = np.packbits((levels[:, None] >> np.arange(bits - 1, -1, -1).astype(np.uint8) & 1).reshape(-1)).tobytes()
    for clear in range(min(2**bits, 4)):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 2, bits, 0, 0, 0, 0))
        body = chunk(b"tRNS", struct.pack(">H", high | clear)) + chunk(b"IDAT", zlib.compress((b"\0" + row) * 2))
        got = decode(b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b""))
        expected = np.where(levels == clear, 255, levels.astype(int) * 255 // (2**bits - 1))
        assert np.array_equal(np.asarray(got)[0, :, 1], expected)


def test_a_transparent_colour_has_8_bits_each() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0))
    body = chunk(b"tRNS", b"\1\4\2\5\3\6") + chunk(b"IDAT", zlib.compress(b"\0\1\2\3\4\5\6" * 2))
    got = decode(b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b""))
    assert np.asarray(got)[0].tolist() == [[1, 2, 3], [255, 255, 255]]


def test_a_png_of_colours_has_a_palette() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 3, 0, 0, 0))
    refused = refusal(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(6))) + chunk(b"IEND", b""))
    assert (refused.reason, "palette" in refused.detail) == ("damaged", True)


def test_a_jpeg_that_says_its_height_behind_its_picture_is_named() -> None:
    without = JPEG[: FRAME + 5] + b"\0\0" + JPEG[FRAME + 7 :]
    assert refusal(without).reason == "damaged"
    refused = refusal(without[:-2] + b"\xff\xdc\0\4\0\x30\xff\xd9")
    assert (refused.reason, "DNL" in refused.detail) == ("unsupported", True)


def test_zeros_between_the_blocks_of_a_gif_do_not_matter() -> None:
    data = encoded(picture(1, 20, 10), "GIF")
    assert np.array_equal(np.asarray(decode(data[:-1] + bytes(5) + b";")), np.asarray(decode(data)))
    assert refusal(data[:-1] + b"junk").reason == "damaged"


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow has no JPEG 2000")
@pytest.mark.parametrize("where", ["COD", "COC", "a tile", "behind an unknown marker"])
def test_a_jpeg_2000_of_tiny_precincts_is_refused_before_they_are_made(where: str) -> None:
    small = {"precinct_size": (256, 256), "num_resolutions": 3, "no_jp2": True}
    data = bytearray(encoded(Image.new("L", (512, 512)), "JPEG2000", **small))
    assert decode(bytes(data)).size == (512, 512)
    for at in (8, 24):  # of the picture, of its tile
        struct.pack_into(">II", data, at, 2000, 2000)
    place = data.index(b"\xff\x52")
    style = data[place : place + 14] + b"\0\x11\x11"  # precincts of 1 and 2 pixels
    if where == "COD":
        data[place : place + 17] = style
    elif where == "COC":
        data[place:place] = b"\xff\x53\0\x0c\0\1" + style[9:17]
    elif where == "a tile":
        start = data.index(b"\xff\x90")
        data[start + 12 : start + 12] = style
        struct.pack_into(">I", data, start + 6, struct.unpack_from(">I", data, start + 6)[0] + len(style))
    else:
        data[place : place + 17] = b"\xff\x30" + style
    refused = refusal(bytes(data))
    assert refused.reason == "too_large"
    assert "parts so small" in refused.detail


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow has no JPEG 2000")
@pytest.mark.parametrize("options", [{}, {"no_jp2": True}, {"no_jp2": True, "tile_size": (16, 16)}])
def test_a_jpeg_2000_that_is_cut_off_is_refused(options: dict[str, Any]) -> None:
    data = encoded(picture(1, 40, 30), "JPEG2000", **options)
    for stop in [*range(12, 300), *range(300, len(data) - 2, 97)]:
        assert refusal(data[:stop]).reason in ("truncated", "damaged"), stop


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow has no JPEG 2000")
def test_a_jpeg_2000_may_be_cut_as_its_encoders_cut_it() -> None:
    for options in ({"codeblock_size": (4, 4)}, {"precinct_size": (32, 32)}, {"tile_size": (64, 64)}):
        data = encoded(picture(1, 700, 500), "JPEG2000", **options)
        assert np.array_equal(np.asarray(decode(data)), np.asarray(picture(1, 700, 500)))


def test_a_plain_bitmap_takes_no_memory_for_its_digits() -> None:
    tracemalloc.start()
    assert decode(b"P1 1000 1000\n" + b"1 0\n" * 500_000).getpixel((0, 0)) == (0, 0, 0)
    assert tracemalloc.get_traced_memory()[1] < 12_000_000
    tracemalloc.stop()
    assert refusal(b"P1 2 2\n1 0 2 0").reason == "damaged"


def test_the_first_frame_of_a_webp_is_put_where_it_is_on_its_canvas() -> None:
    image = picture(4, 20, 10)
    pixels = webp_chunks(image, lossless=True)
    inner = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in pixels)
    frame = three(4, 6, 19, 9) + bytes(4) + inner
    head = (b"VP8X", bytes([2, 0, 0, 0]) + three(99, 59))
    whole = riff(head, (b"ANIM", bytes(6)), (b"ANMF", frame), (b"ANMF", frame[:20]))
    expected = np.full((60, 100, 3), 255)
    expected[12:22, 8:28] = np.asarray(image)
    assert np.array_equal(np.asarray(decode(whole)), expected)
    outside = riff(head, (b"ANIM", bytes(6)), (b"ANMF", three(45, 6, 19, 9) + bytes(4) + inner))
    assert refusal(outside).reason == "damaged"
    assert refusal(riff(head, (b"ANIM", bytes(6)))).reason == "truncated"


def test_an_animation_of_pillow_gives_its_first_frame() -> None:
    first, second = picture(4, 41, 33), picture(5, 41, 33)
    for kind, options in {"WEBP": {"lossless": True}, "GIF": {}, "PNG": {}}.items():
        data = encoded(first, kind, save_all=True, append_images=[second], **options)
        got = np.asarray(decode(data)).astype(int)
        assert np.abs(got - np.asarray(first)).mean() <= (12 if kind == "GIF" else 0)


def test_blocks_beside_the_first_frame_of_a_gif_do_not_matter() -> None:
    image = picture(2, 40, 30).quantize(16)
    data = encoded(image, "GIF", transparency=3)
    place = data.index(b"!\xf9")
    odd = b"!\xfe" + b"\1a" * 50_000 + b"\0" + b"!\xff\x0bNETSCAPE2.0\0"
    assert np.array_equal(np.asarray(decode(data[:place] + odd + data[place:])), np.asarray(decode(data)))
    assert (np.asarray(decode(data)) == 255).all(-1).any()


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow has no JPEG 2000")
def test_boxes_beside_the_pixels_of_a_jpeg_2000_do_not_matter() -> None:
    data = encoded(picture(2, 40, 30), "JPEG2000")
    plain = np.asarray(decode(data))
    at = data.index(b"jp2h") - 4
    odd = data[:at] + struct.pack(">I4s", 12, b"xml ") + b"<<<<" + data[at:] + struct.pack(">I4s", 8, b"uuid")
    assert np.array_equal(np.asarray(decode(odd)), plain)
    wrong = data.replace(struct.pack(">II", 30, 40), struct.pack(">II", 31, 40), 1)
    assert refusal(wrong).reason == "damaged"
    bare = data[data.index(b"\xff\x4f\xff\x51") :]
    assert np.array_equal(np.asarray(decode(bare)), plain)


def test_an_icon_is_the_picture_inside_it() -> None:
    small = picture(1, 32, 32)
    large = png_file(np.asarray(picture(2, 70, 60)).astype(int), 8, 2)
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(large), 22)
    assert decode(struct.pack("<HHH", 0, 1, 1) + entry + large).size == (70, 60)
    assert refusal(struct.pack("<HHH", 0, 1, 1) + entry + large, max_pixels=4000).reason == "too_large"
    for options in ({}, {"bitmap_format": "bmp"}):
        got = decode(encoded(small, "ICO", sizes=[(32, 32)], **options))
        assert np.array_equal(np.asarray(got), np.asarray(small))


PPMS = {
    "P1": (b"P1 # x\n3 2\n0 1 0\n#y\n110", [[255, 0, 255], [0, 0, 255]]),
    "P2": (b"P2\n3 2\n#\n4\n0 1 2\n# 9 9\n3 4 9", [[0, 64, 128], [191, 255, 255]]),
    "P2 of 16 bits": (b"P2 2 2 65535 0 257 32896 65535", [[0, 1], [128, 255]]),
    "P4": (b"P4\n3 2\n" + bytes([0b01000000, 0b11000000]), [[255, 0, 255], [0, 0, 255]]),
    "P5": (b"P5\n#\n#\n2 2\n255\n" + bytes([0, 10, 128, 255]), [[0, 10], [128, 255]]),
    "P5 of few values": (b"P5 2 2 3\n" + bytes([0, 1, 2, 3]), [[0, 85], [170, 255]]),
    "P5 of 16 bits": (b"P5 2 2 65535\n" + struct.pack(">4H", 0, 257, 32896, 65535), [[0, 1], [128, 255]]),
    "P5 of 12 bits": (b"P5 2 2 4095\n" + struct.pack(">4H", 0, 16, 2056, 4095), [[0, 0], [128, 255]]),
}


@pytest.mark.parametrize("name", PPMS)
def test_ppm_of_every_kind(name: str) -> None:
    data, expected = PPMS[name]
    got = np.asarray(decode(data)).astype(int)
    assert np.abs(got - np.array(expected)[..., None]).max() <= (1 if "12" in name else 0)


def test_ppm_of_colours_and_broken_ones() -> None:
    levels = np.arange(12).reshape(2, 2, 3) * 20
    for head, kind in {b"P3 2 2 255 ": "plain", b"P6 2 2 255\n": "u1", b"P6 2 2 65535\n": ">u2"}.items():
        body = (
            b" ".join(b"%d" % one for one in levels.flat)
            if kind == "plain"
            else (levels * (257 if "2" in kind else 1)).astype(kind).tobytes()
        )
        assert np.array_equal(np.asarray(decode(head + body)), levels)
        assert refusal((head + body)[: len(head) + 9]).reason == "truncated"
    assert refusal(b"P6\n9400 9400\n255\n" + bytes(100)).reason == "truncated"
    assert refusal(b"P3 2 2 255 1 2 3 x" + b" 4" * 9).reason == "damaged"
    assert refusal(b"P3\n9 9\n255\n" + b"# \n" * 200_000 + b"0 " * 300).reason == "too_large"
    assert refusal(b"Pf\n2 2\n-1.0\n" + bytes(16)).reason == "unsupported"


def test_parts_without_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "MAX_PARTS", 20_000)
    monkeypatch.setattr(integrity, "MAX_BLOCKS", 30_000)
    gif = encoded(picture(1), "GIF")
    many = {
        "PNG": png_file(RGB, 8, 2, chunk(b"teXt", b"") * (integrity.MAX_PARTS + 1)),
        "JPEG": JPEG[:2] + b"\xff\xe5\0\2" * (integrity.MAX_PARTS + 1) + JPEG[2:],
        "GIF": gif[:-1] + b"!\xfe" + b"\1a" * 40_000 + b"\0;",
        "tables": JPEG[:2] + JPEG[JPEG.index(b"\xff\xdb") :][:69] * 2000 + JPEG[2:],
    }
    for data in many.values():
        assert "made to keep a decoder busy" in refusal(data).detail


def test_a_large_jpeg_of_many_scans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "MAX_SCANNED", 3000)
    monkeypatch.setattr(integrity, "LEAST_SCANS", 5)
    data = encoded(picture(1, 64, 48), "JPEG", progressive=True)
    assert refusal(data).detail.startswith("more than 5 scans")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_limit_above_pillow_s_own_is_heeded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # of whom uses Pillow beside this package
    data = encoded(picture(1, 200, 100), kind)
    assert decode(data).size == (200, 100)
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert refusal(data, max_pixels=500).reason == "too_large"
    assert Image.MAX_IMAGE_PIXELS == 1000
    strip = encoded(picture(1, 400, 9), kind)  # of which a part is cut
    assert decode_pixels(strip, Transform.square(8, 8), Decoding()).shape == (8, 8, 3)


def test_there_is_no_upper_wall() -> None:
    assert Decoding(max_pixels=10**12).max_pixels == 10**12
    data = encoded(Image.new("L", (16_000, 12_000), 120), "JPEG", quality=30)
    assert "raise it for extract with --max-pixels, in Python max_pixels=" in refusal(data).detail
    transform = Transform.square(32, 32)
    assert decode_pixels(data, transform, Decoding(fast=True)).mean() == pytest.approx(
        120, abs=2
    )  # 2000 x 1500 pixels are made
    assert "pixels" in refusal(data, max_pixels=10**8).detail


def test_formats_that_take_much_memory_are_refused_earlier() -> None:
    data = encoded(picture(1, 200, 100), "WEBP", lossless=True)
    assert contents(data, "WEBP").bytes_per_pixel == 17
    refused = refusal(data, max_pixels=20_000)
    assert (refused.reason, "MiB to decode in this format" in refused.detail) == ("too_large", True)
    assert decode(data, max_pixels=29_000).size == (200, 100)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "memory"),
        (OSError("out of memory error when reading image file"), "memory"),
        (OSError(12, "Cannot allocate memory"), "memory"),
        (OSError(24, "Too many open files"), "unreadable"),
        (OSError(23, "Too many open files in system"), "unreadable"),
        (OSError("broken data stream"), "damaged"),
        (OSError("image file is truncated"), "truncated"),
    ],
)
def test_a_shortage_is_not_the_image_s_fault(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(module, "to_rgb", fail)
    assert refusal(JPEG).reason == reason
    assert (refusal_of(error) is None) == (reason in ("damaged", "truncated"))


def test_a_decoder_without_memory_does_not_call_the_file_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise OSError("Cannot allocate memory")

    def fail(*_: object, **__: object) -> None:
        raise OSError("broken data stream when reading image file")

    monkeypatch.setattr(module, "to_rgb", fail)
    assert refusal(JPEG).reason == "damaged"
    monkeypatch.setattr(module.mmap, "mmap", no_memory)
    assert refusal(JPEG).reason == "memory"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA"])
def test_no_cut_or_change_raises_anything_but_a_refusal(kind: str) -> None:
    data, random = encoded(picture(1, 40, 30), kind), np.random.default_rng(3)
    assert kind_of(data) == kind
    for stop in range(min(len(data), 120)):
        with pytest.raises(Refused):
            decode(data[:stop])
    for _ in range(150):
        odd = bytearray(data)
        for at in random.integers(0, min(len(data), 200), 3):
            odd[at] = int(random.integers(0, 256))
        with contextlib.suppress(Refused):
            assert decode(bytes(odd), max_pixels=1_000_000).mode == "RGB"
