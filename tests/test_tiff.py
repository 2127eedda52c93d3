"""TIFF: every layout decodes to the right picture or is refused as unsupported, never to another picture."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from conftest import picture
from damaged import encoded
from PIL import Image, features
from tiffs import (
    ALPHA,
    BLACK_IS_ZERO,
    CMYK,
    DEFLATE,
    FLOAT,
    LONG,
    LZMA,
    LZW,
    NO_ALPHA,
    OLD_DEFLATE,
    PACKBITS,
    PALETTE,
    PREMULTIPLIED,
    RAW,
    RGB,
    SHORT,
    SIGNED,
    WHITE_IS_ZERO,
    Layout,
    encoded_tiff,
    with_tags,
    written,
)

from micl_zoo.errors import Refused
from micl_zoo.images import tiff
from micl_zoo.images.decode import decode

PHOTOMETRICS = (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK)
ZSTD, WEBP, JPEG2000 = 50000, 50001, 34712  # compressions that nothing here writes
ORDERS, TILED, PLANES = "<>", (False, True), (1, 2)


def outcome(layout: Layout) -> str:
    data, expected = written(layout, 19, 17)
    try:
        got = np.asarray(decode(data)).astype(float)
    except Refused as refused:
        return refused.reason
    assert got.shape == expected.shape
    return "right" if np.abs(got - expected).max() <= (2 if layout.extra else 0) else "wrong"


def outcomes(layouts: Iterable[Layout]) -> Counter[str]:
    found = {layout: outcome(layout) for layout in layouts}
    assert {layout: how for layout, how in found.items() if how not in ("right", "unsupported")} == {}
    return Counter(found.values())


def layouts(bits: int, **options: Any) -> list[Layout]:
    colours = [one for one in PHOTOMETRICS if one != PALETTE or bits <= 8]
    grid = itertools.product(colours, PLANES, (RAW, LZW, DEFLATE, PACKBITS), ORDERS, TILED)
    return [Layout(bits, *one, **options) for one in grid]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16, 24, 32])
@pytest.mark.parametrize("by_tifffile", [True, False])
def test_every_layout_is_right_or_unsupported(bits: int, by_tifffile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_tifffile and not tiff.has_tifffile():
        pytest.skip("tifffile is not installed")
    monkeypatch.setattr(tiff, "has_tifffile", lambda: by_tifffile)
    found = outcomes(layouts(bits))
    if by_tifffile and bits != 24:
        assert found["right"] == found.total()
    assert found["right"] >= {1: 96, 2: 96, 4: 96, 8: 128, 16: 48}.get(bits, 0)


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_signed_samples_have_no_black(bits: int) -> None:
    assert outcomes(layouts(bits, sample_format=SIGNED)).keys() == {"unsupported"}


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_floating_point_samples_have_no_white(bits: int) -> None:
    grid = itertools.product((BLACK_IS_ZERO, RGB), PLANES, (RAW, DEFLATE), ORDERS, TILED)
    assert outcomes(Layout(bits, *one, sample_format=FLOAT) for one in grid).keys() == {"unsupported"}


@pytest.mark.parametrize("extra", [(NO_ALPHA,), (ALPHA,), (PREMULTIPLIED,), (ALPHA, NO_ALPHA), (NO_ALPHA, NO_ALPHA)])
def test_extra_samples_are_alpha_or_left_out(extra: tuple[int, ...]) -> None:
    grid = itertools.product((8, 16), PHOTOMETRICS, PLANES, (RAW, DEFLATE), ORDERS)
    found = outcomes(Layout(*one, extra=extra) for one in grid if one[:2] != (16, PALETTE))
    assert found["right"] >= 4  # by Pillow alone


def test_rarer_ways_to_write_are_right_or_unsupported() -> None:
    kinds = [
        (bits, colours) for bits in (1, 4, 8, 16, 32) for colours in PHOTOMETRICS if colours != PALETTE or bits <= 8
    ]
    rare: list[dict[str, Any]] = [
        *({"predictor": 2, "compression": one, "planar": planar} for one in (LZW, DEFLATE) for planar in PLANES),
        *({"fill_order": 2, "compression": one, "planar": planar} for one in (RAW, LZW) for planar in PLANES),
        *({"large": True, "compression": one, "tiled": tiled} for one in (RAW, DEFLATE) for tiled in TILED),
        *({"compression": one} for one in (OLD_DEFLATE, LZMA)),
    ]
    grid = [Layout(bits, colours, order=order, **one) for bits, colours in kinds for one in rare for order in ORDERS]
    found = outcomes(one for one in grid if one.predictor == 1 or one.bits >= 8)
    assert found["right"] > found["unsupported"] * 0.5  # by Pillow alone


def test_what_pillow_does_wrong_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff, "has_tifffile", lambda: False)
    with pytest.raises(Refused, match=r"unsupported: .*pip install 'micl-zoo\[tiff\]'"):
        decode(written(Layout(16, RGB, planar=2)).data)


@pytest.mark.parametrize("bits", [16, 32])
def test_what_would_become_black_all_over_is_refused(bits: int) -> None:
    if bits == 32 and not tiff.has_tifffile():
        pytest.skip("tifffile is not installed")
    layout = Layout(bits, BLACK_IS_ZERO)
    labels = np.arange(20 * 30).reshape(20, 30, 1) % 256
    with pytest.raises(Refused, match=r"unsupported: .*at most 255, which would be black all over"):
        decode(encoded_tiff(labels, layout))
    assert decode(encoded_tiff(np.zeros_like(labels), layout)).getpixel((3, 3)) == (0, 0, 0)
    visible = decode(encoded_tiff(labels << (bits - 8), layout))
    assert np.array_equal(np.asarray(visible)[..., 1], labels[..., 0])


Tags = dict[int, tuple[int, Sequence[int]]]
PLAIN: Tags = {
    256: (LONG, [16]),
    257: (LONG, [16]),
    258: (SHORT, [8]),
    259: (SHORT, [RAW]),
    262: (SHORT, [BLACK_IS_ZERO]),
    277: (SHORT, [1]),
    278: (LONG, [16]),
}
YCBCR = PLAIN | {277: (SHORT, [3]), 258: (SHORT, [8] * 3), 262: (SHORT, [6]), 259: (SHORT, [DEFLATE])}
PIXELS = bytes(range(256))


def test_tags_that_pixels_do_not_need_do_not_matter() -> None:
    odd: Tags = {
        270: (SHORT, [9] * 70_000),
        282: (SHORT, [0]),
        305: (SHORT, [7]),
        700: (SHORT, [1, 2]),
        34665: (LONG, [2**32 - 1]),
        34675: (SHORT, [1]),
        34853: (LONG, [8]),
    }
    got = decode(with_tags(PLAIN | odd, [PIXELS]))
    assert np.asarray(got)[..., 0].tobytes() == PIXELS


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("large", [False, True])
def test_orientation_is_heeded_or_kept(order: str, large: bool) -> None:
    data = with_tags(PLAIN | {274: (SHORT, [6])}, [PIXELS], order, large)
    stored = np.frombuffer(PIXELS, np.uint8).reshape(16, 16)
    if large and order == ">" and not tiff.has_tifffile():
        pytest.skip("tifffile is not installed")
    assert np.array_equal(np.asarray(decode(data))[..., 0], np.rot90(stored, -1))
    assert np.array_equal(np.asarray(decode(data, exif="keep"))[..., 0], stored)


CAMERAS: dict[str, Tags] = {
    "a DNG": {254: (LONG, [1]), 50706: (SHORT, [1, 4])},
    "a DNG whose first picture is whole": {50706: (SHORT, [1, 4])},
    "a colour filter": {262: (SHORT, [32803])},
    "the camera's own colours": {262: (SHORT, [34892])},
    "a thumbnail before others": {254: (LONG, [1]), 330: (LONG, [8, 8])},
    "a thumbnail in the old way": {255: (SHORT, [2]), 330: (LONG, [8])},
}


@pytest.mark.parametrize("tags", CAMERAS.values(), ids=CAMERAS)
def test_no_thumbnail_takes_the_place_of_a_picture(tags: Tags) -> None:
    with pytest.raises(Refused, match=r"unsupported: a (DNG|RAW|TIFF whose first picture is a thumbnail)"):
        decode(with_tags(PLAIN | tags, [PIXELS]))


def test_a_raw_file_of_canon_or_nikon_is_known() -> None:
    data = with_tags(PLAIN, [b"CR\2\0" + PIXELS[4:]])
    with pytest.raises(Refused, match=r"unsupported: a RAW file of a camera"):
        decode(data)
    inner = with_tags(PLAIN | {262: (SHORT, [32803])}, [PIXELS])
    at = struct.unpack_from("<I", inner, 4)[0]
    outer = with_tags(PLAIN | {330: (LONG, [at + 8])}, [inner[8:], PIXELS])  # the pieces begin where its head ends
    moved = inner[:8] + outer[8:]
    assert tiff.read_directory(moved, at)
    first = struct.unpack_from("<I", outer, 4)[0]
    moved = moved[:4] + struct.pack("<I", first) + moved[8:]
    whole = moved.replace(struct.pack("<HHII", 330, 4, 1, at + 8), struct.pack("<HHII", 330, 4, 1, at))
    with pytest.raises(Refused, match=r"unsupported: a RAW file of a camera"):
        decode(whole)


BROKEN: dict[str, tuple[Tags, list[bytes], str]] = {
    "no width": ({256: (LONG, [0])}, [PIXELS], "damaged"),
    "fewer strips than rows": ({278: (LONG, [4])}, [PIXELS], "damaged"),
    "too short a strip": ({}, [PIXELS[:-1]], "truncated"),
    "five bands": ({277: (SHORT, [5]), 258: (SHORT, [8] * 5)}, [PIXELS * 5], "unsupported"),
    "samples of several widths": (
        {277: (SHORT, [3]), 258: (SHORT, [5, 6, 5]), 262: (SHORT, [2])},
        [PIXELS * 3],
        "unsupported",
    ),
    "a picture of the size of a continent": ({256: (LONG, [10**6]), 257: (LONG, [10**6])}, [PIXELS], "damaged"),
    "a compression nobody knows": ({259: (SHORT, [4711])}, [PIXELS], "unsupported"),
    "colours of the laboratory": (
        {262: (SHORT, [8]), 277: (SHORT, [3]), 258: (SHORT, [8] * 3)},
        [PIXELS * 3],
        "unsupported",
    ),
    "tiles without end": (
        {322: (LONG, [2**31]), 323: (LONG, [2**31]), 324: (LONG, [8]), 325: (LONG, [9])},
        [PIXELS],
        "damaged",
    ),
}


@pytest.mark.parametrize(("tags", "pieces", "reason"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_is_refused_by_its_reason(tags: Tags, pieces: list[bytes], reason: str) -> None:
    with pytest.raises(Refused) as caught:
        decode(with_tags(PLAIN | tags, pieces))
    assert caught.value.reason == reason


def patched(data: bytes, tag: int, change: Callable[[int, int], int]) -> bytes:
    """With changed numbers in a tag of type LONG: of each its place among them and itself."""
    found = tiff.read_directory(data)
    assert found.entries[tag].kind == LONG
    numbers = [change(*one) for one in enumerate(found.numbers(tag, most=1000))]
    old, new = bytes(found.entries[tag].value), struct.pack(f"{found.order}{len(numbers)}I", *numbers)
    assert data.count(old) == 1
    return data.replace(old, new)


def reason(data: bytes) -> str:
    try:
        decode(data)
    except Refused as refused:
        return refused.reason
    return "decoded"


@pytest.mark.parametrize("compression", [RAW, LZW, DEFLATE, OLD_DEFLATE, PACKBITS, LZMA])
@pytest.mark.parametrize("tiled", TILED)
@pytest.mark.parametrize(("bits", "planar"), [(8, 1), (16, 2)])  # by Pillow, by tifffile
def test_what_was_never_written_is_no_picture(compression: int, tiled: bool, bits: int, planar: int) -> None:
    if planar == 2 and not tiff.has_tifffile():
        pytest.skip("tifffile is not installed")
    data = written(Layout(bits, RGB, planar=planar, compression=compression, tiled=tiled)).data
    places, counts = (324, 325) if tiled else (273, 279)
    assert reason(data) == "decoded"
    for these in ({1}, set(range(1000))):
        nowhere = patched(data, places, lambda number, place, these=these: 0 if number in these else place)
        assert reason(nowhere) == "damaged"
        with pytest.raises(Refused, match=r"of [0-9]+ strips or tiles of the TIFF were never written"):
            decode(patched(nowhere, counts, lambda number, count, these=these: 0 if number in these else count))
    assert reason(patched(data, counts, lambda number, count: count if number else 0)) == "damaged"


def test_counts_do_not_matter_where_all_pixels_are_there() -> None:
    tags = PLAIN | {257: (LONG, [13]), 278: (LONG, [8])}  # the last of two strips has five rows
    data = with_tags(tags, [PIXELS[:128], PIXELS[128:208]])
    expected = PIXELS[:208]
    for change in (lambda number, count: 0, lambda number, count: count + 48, lambda number, count: 10**9):
        got = decode(patched(data, 279, change))
        assert np.asarray(got)[..., 0].tobytes() == expected
    assert reason(patched(data, 279, lambda number, count: count - 1)) == "truncated"


@pytest.mark.parametrize("compression", [DEFLATE, LZMA])
@pytest.mark.parametrize("fill_order", [1, 2])
@pytest.mark.parametrize("tiled", TILED)
def test_a_strip_or_tile_unpacks_to_its_end(compression: int, fill_order: int, tiled: bool) -> None:
    if compression == LZMA and not tiff.pillow_unpacks(LZMA):
        pytest.skip("nothing here reads it")
    noise = np.random.default_rng(0).integers(0, 64, (48, 48, 1)) * 4
    data = encoded_tiff(noise, Layout(8, BLACK_IS_ZERO, compression=compression, tiled=tiled, fill_order=fill_order))
    assert np.array_equal(np.asarray(decode(data))[..., 0], noise[..., 0])
    found = tiff.read_directory(data)
    place, count = (found.numbers(tag, most=2)[1] for tag in ((324, 325) if tiled else (273, 279)))
    for start in range(place + 8, place + count - 4, 16):
        zeroed = data[:start] + bytes(place + count - start) + data[place + count :]
        assert reason(zeroed) in ("damaged", "truncated"), start - place
    assert reason(data[: place + count - 4] + b"\0\1\2\3" + data[place + count :]) == "damaged"


@pytest.mark.parametrize("rows", [5, 8, 15, 16])
def test_a_last_strip_may_be_filled_up(rows: int) -> None:
    tags = PLAIN | {257: (LONG, [13]), 278: (LONG, [rows]), 259: (SHORT, [DEFLATE])}
    strips = [PIXELS[start : start + 16 * rows].ljust(16 * rows, b"x") for start in range(0, 208, 16 * rows)]
    data = with_tags(tags, [zlib.compress(strip) for strip in strips])
    assert np.asarray(decode(data))[..., 0].tobytes() == PIXELS[:208]
    short = with_tags(tags, [zlib.compress(strips[0][: 16 * min(rows, 13) - 8]), *map(zlib.compress, strips[1:])])
    assert reason(short) in ("damaged", "truncated")


def test_a_strip_of_many_rows_is_not_unpacked_without_end() -> None:
    tags = PLAIN | {259: (SHORT, [DEFLATE]), 278: (LONG, [2**32 - 1])}
    assert reason(with_tags(tags, [zlib.compress(PIXELS)])) == "decoded"
    assert reason(with_tags(tags, [zlib.compress(PIXELS + bytes(20_000_000))])) == "damaged"


@pytest.mark.parametrize("block", [(1, 1), (2, 1), (2, 2), (4, 2), None])
@pytest.mark.parametrize(("width", "height", "rows"), [(16, 16, 16), (19, 13, 13), (19, 13, 8)])
def test_colours_in_deflate_may_be_of_several_pixels(
    block: tuple[int, int] | None, width: int, height: int, rows: int
) -> None:
    across, down = block or (2, 2)  # as it is without the tag
    one = bytes(range(60, 60 + across * down)) + bytes([90, 160])  # some grey and the same two colours
    strips = [one * (-(-width // across) * -(-min(rows, height - top) // down)) for top in range(0, height, rows)]
    tags = YCBCR | {256: (LONG, [width]), 257: (LONG, [height]), 278: (LONG, [rows])}
    tags |= {530: (SHORT, block)} if block else {}
    got = decode(with_tags(tags, [zlib.compress(strip) for strip in strips]))
    assert got.size == (width, height)
    whole = np.asarray(Image.new("YCbCr", (1, 1), (60, 90, 160)).convert("RGB"), int)
    assert np.abs(np.asarray(got, int)[0, 0] - whole[0, 0]).max() <= 2
    for short in (strips[-1][:-1], strips[-1][: -len(one)]):
        data = with_tags(tags, [zlib.compress(strip) for strip in [*strips[:-1], short]])
        assert reason(data) in ("damaged", "truncated")


@pytest.mark.parametrize("block", [(0, 2), (2, 0), (2,)])
def test_no_colours_are_of_no_pixels(block: tuple[int, ...]) -> None:
    assert reason(with_tags(YCBCR | {530: (SHORT, block)}, [zlib.compress(PIXELS * 3)])) == "damaged"


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "CMYK"])
def test_a_jpeg_in_a_tiff_is_whole(mode: str) -> None:
    data = encoded(picture(1, 64, 48).convert(mode), "TIFF", compression="jpeg", tiffinfo={278: 16})
    assert reason(data) == "decoded"
    places, counts = (tiff.read_directory(data).numbers(tag) for tag in (273, 279))
    assert len(places) == 3
    for place, count in zip(places, counts, strict=True):
        assert reason(data[: place + count - 30] + bytes(30) + data[place + count :]) == "truncated"


def test_a_jpeg_in_a_tiff_has_no_more_scans_than_another() -> None:
    jpeg = encoded(picture(1, 16, 16).convert("L"), "JPEG", progressive=True)
    start = jpeg.rindex(b"\xff\xda")
    tags = PLAIN | {259: (SHORT, [7])}
    assert reason(with_tags(tags, [jpeg])) == "decoded"
    assert reason(with_tags(tags, [jpeg[:-2] + jpeg[start:-2] * 100 + jpeg[-2:]])) == "too_large"


@pytest.mark.parametrize("compression", [LZMA, ZSTD, WEBP, JPEG2000])
def test_damage_is_told_from_what_nothing_here_unpacks(compression: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = with_tags(PLAIN | {259: (SHORT, [compression])}, [b"RIFF\xff\x4f\xff\x51" + bytes(60)])
    reads = tiff.has_tifffile() or (compression != JPEG2000 and tiff.pillow_unpacks(compression))
    assert reason(data) in (("damaged", "truncated") if reads or compression == WEBP else ("unsupported",))
    monkeypatch.setattr(tiff, "has_tifffile", lambda: False)
    monkeypatch.setattr(tiff, "pillow_unpacks", lambda compression: False)
    assert reason(data) == "unsupported" or compression == WEBP


@pytest.mark.parametrize("compression", [JPEG2000, WEBP, 7])
def test_what_lies_in_a_strip_has_no_more_pixels_than_it(compression: int) -> None:
    kind = {JPEG2000: "JPEG2000", WEBP: "WEBP", 7: "JPEG"}[compression]
    options = {"subsampling": 0} if kind == "JPEG" else {}
    if kind == "JPEG2000" and not (tiff.has_tifffile() and features.check("jpg_2000")):
        pytest.skip("nothing here reads it")
    colours = PLAIN | {277: (SHORT, [3]), 258: (SHORT, [8] * 3), 262: (SHORT, [RGB]), 259: (SHORT, [compression])}
    small, large = (encoded(picture(1, side, side), kind, **options) for side in (16, 160))
    if tiff.has_tifffile() or compression == 7:
        assert reason(with_tags(colours, [small])) == "decoded"
    with pytest.raises(Refused, match=r"damaged: a strip or tile of the TIFF is a .* of 160 x 160"):
        decode(with_tags(colours, [large]))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_palette_of_small_numbers_is_one_of_8_bits(order: str, bits: int) -> None:
    palette = np.random.default_rng(0).integers(0, 256, (3, 2**bits))
    levels = np.arange(19 * 17).reshape(17, 19, 1) % 2**bits
    for colours in (palette, palette * 257):
        data = encoded_tiff(levels, Layout(bits, PALETTE, order=order), colours)
        assert np.array_equal(np.asarray(decode(data)), palette.T[levels[..., 0]])


def test_more_strips_than_needed_are_left_out() -> None:
    data = with_tags(PLAIN | {278: (LONG, [8])}, [PIXELS[:128], PIXELS[128:], *[b"x"] * 30_000])
    assert np.asarray(decode(data))[..., 0].tobytes() == PIXELS


def test_pillow_s_own_files_decode() -> None:
    image = picture(1, 60, 40)
    for options in ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"tiffinfo": {270: "x"}}):
        assert np.array_equal(np.asarray(decode(encoded(image, "TIFF", **options))), np.asarray(image))
    for compression in ("group3", "group4"):
        black = image.convert("1")
        got = decode(encoded(black, "TIFF", compression=compression))
        assert np.array_equal(np.asarray(got), np.asarray(black.convert("RGB")))
    several = encoded(image, "TIFF", save_all=True, append_images=[picture(2, 60, 40)])
    assert np.array_equal(np.asarray(decode(several)), np.asarray(image))
    for mode in ("L", "LA", "RGBA", "CMYK", "P", "1"):
        stored = image.convert(mode)
        assert np.array_equal(np.asarray(decode(encoded(stored, "TIFF"))), np.asarray(stored.convert("RGB")))
