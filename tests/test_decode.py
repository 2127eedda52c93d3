"""What decodes to what, and what is refused with which reason."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
from conftest import picture
from damaged import encoded
from PIL import Image

from micl_zoo.errors import Refused, UsageError
from micl_zoo.images import decode as module
from micl_zoo.images import formats
from micl_zoo.images.decode import Decoding, decode, decode_crop, decode_pixels
from micl_zoo.images.transform import Transform


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "JPEG", "WEBP", "GIF"])
def test_common_formats(kind: str) -> None:
    image = picture(0)
    got = decode(encoded(image, kind))
    assert (got.mode, got.size) == ("RGB", image.size)
    difference = np.abs(np.asarray(got, dtype=int) - np.asarray(image, dtype=int)).mean()
    assert difference == 0 if kind in ("PNG", "BMP", "TIFF") else difference < 12


def stored_as(upright: Image.Image, orientation: int) -> tuple[Image.Image, Image.Exif]:
    """What a camera that was held so stores, and what it notes."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    return upright.transpose(undo[orientation]) if orientation in undo else upright, exif


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(orientation: int) -> None:
    upright = picture(3)
    stored, exif = stored_as(upright, orientation)
    got = decode(encoded(stored, "PNG", exif=exif))
    assert np.array_equal(np.asarray(got), np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_does_not_cost_the_picture() -> None:
    data = encoded(picture(0), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert decode(data).size == picture(0).size


def test_transparency_is_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    got = decode(encoded(image, "PNG"))
    assert got.getpixel((0, 0)) == (255, 0, 0)
    assert got.getpixel((3, 3)) == (255, 255, 255)
    palette = image.quantize(4)
    assert decode(encoded(palette, "GIF", transparency=palette.getpixel((3, 3)))).getpixel((3, 3)) == (255, 255, 255)


def test_a_transparent_colour_of_an_rgb_png_is_white() -> None:
    image = Image.new("RGB", (4, 4), (9, 8, 7))
    assert decode(encoded(image, "PNG", transparency=(9, 8, 7))).getpixel((0, 0)) == (255, 255, 255)


def test_lab_pixels_decode_or_are_refused() -> None:
    with contextlib.suppress(Refused):
        assert decode(encoded(Image.new("LAB", (4, 4)), "TIFF")).mode == "RGB"


def test_sixteen_bits_are_cut_to_eight() -> None:
    levels = np.array([[0, 257 * 10], [257 * 128, 65535]], dtype=np.uint16)
    got = np.asarray(decode(encoded(Image.fromarray(levels), "PNG")))
    assert got[:, :, 0].tolist() == [[0, 10], [128, 255]]
    assert np.array_equal(got[:, :, 0], got[:, :, 2])


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    grey = Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode)
    got = decode(encoded(grey, kind))
    assert (got.mode, got.getpixel((4, 4))) == ("RGB", (255, 255, 255))


def refusal(data: bytes, **options: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        decode(data, **options)
    return caught.value


def test_refusals_name_their_reason() -> None:
    jpeg = encoded(picture(0, 200, 200), "JPEG", quality=95)
    assert refusal(b"").reason == "empty"
    assert refusal(b"Dear Sir or Madam").reason == "not_an_image"
    assert refusal(jpeg[: len(jpeg) // 2]).reason == "truncated"
    assert refusal(encoded(Image.new("RGB", (1, 1)), "PNG")).reason == "too_small"
    assert "at least 2" in refusal(encoded(Image.new("RGB", (1, 9)), "PNG")).detail
    assert refusal(jpeg, max_pixels=1000).reason == "too_large"
    assert "200 x 200" in refusal(jpeg, max_pixels=1000).detail
    assert refusal(encoded(Image.new("F", (4, 4)), "TIFF")).reason == "unsupported"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_no_cut_of_a_file_does_anything_but_decode_or_refuse(kind: str) -> None:
    data = encoded(picture(0, 64, 64), kind)
    for tenth in range(10):
        with contextlib.suppress(Refused):
            assert decode(data[: len(data) * tenth // 10]).mode == "RGB"


def test_a_refusal_survives_the_way_between_processes() -> None:
    import pickle

    copy = pickle.loads(pickle.dumps(Refused("truncated", "cut off")))
    assert (copy.reason, copy.detail, str(copy)) == ("truncated", "cut off", "truncated: cut off")


WHOLE, PART = (0.0, 0.0, 1.0, 1.0), (0.125, 0.25, 0.75, 0.875)
Filter = Literal["bicubic", "bilinear"]


def crop_of(data: bytes, box: Sequence[float], side: int, interpolation: Filter = "bicubic") -> np.ndarray:
    return decode_crop(data, lambda width, height: box, (side, side), interpolation)


def crop_in_full(image: Image.Image, box: Sequence[float], side: int, interpolation: Filter = "bicubic") -> np.ndarray:
    """The same crop of a picture that is decoded already."""
    left, top, right, bottom = (share * length for share, length in zip(box, image.size * 2, strict=True))
    resampling = Image.Resampling[interpolation.upper()]
    return np.asarray(image.resize((side, side), resampling, box=(left, top, right, bottom)))


def apart(first: np.ndarray, second: np.ndarray) -> float:
    """Mean difference in levels of 255."""
    return float(np.abs(first.astype(float) - second.astype(float)).mean())


@pytest.fixture
def decoded_sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Grows by the size of every picture that is decoded, upright and before the crop is cut."""
    sizes: list[tuple[int, int]] = []
    to_rgb = module.to_rgb

    def noted(image: Image.Image, **options: Any) -> Image.Image:
        upright = to_rgb(image, **options)
        sizes.append(upright.size)
        return upright

    monkeypatch.setattr(module, "to_rgb", noted)
    return sizes


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_crop_is_that_of_the_decoded_picture(kind: str, interpolation: Filter) -> None:
    data = encoded(picture(0, 97, 61), kind)
    for box, side in [(WHOLE, 31), (WHOLE, 64), (PART, 20), (PART, 48)]:  # 97 / 31 allows 2, 61 / 31 only 1
        got = crop_of(data, box, side, interpolation)
        assert got.shape == (side, side, 3)
        assert got.dtype == np.uint8
        assert np.array_equal(got, crop_in_full(decode(data), box, side, interpolation))


@pytest.mark.parametrize(("width", "height"), [(1600, 1200), (1599, 1201), (3001, 2003)])
@pytest.mark.parametrize("box", [WHOLE, PART, (0.5, 0.5, 1.0, 1.0), (0.6, 0.1, 0.9, 0.35)])
@pytest.mark.parametrize("options", [{}, {"progressive": True, "subsampling": 0}])
def test_a_large_jpeg_is_decoded_at_the_scale_that_the_crop_needs(
    width: int, height: int, box: Sequence[float], options: dict[str, Any], decoded_sizes: list[tuple[int, int]]
) -> None:
    data, side = encoded(picture(1, width, height), "JPEG", quality=90, **options), 224
    got = crop_of(data, box, side)
    ((across, down),) = decoded_sizes
    assert across * (box[2] - box[0]) >= side  # nothing is enlarged that the file has in full
    assert down * (box[3] - box[1]) >= side
    least = min(width * (box[2] - box[0]), height * (box[3] - box[1])) / side
    scale = max(scale for scale in (1, 2, 4, 8) if scale <= least)
    assert (across, down) == (-(-width // scale), -(-height // scale))
    full = crop_in_full(decode(data), box, side)
    # 0.3 levels where the scale divides the sides. Else a decoded pixel at the edge is part picture and part padding,
    # which shifts the crop by less than that pixel: 0.8 levels.
    assert apart(got, full) <= (0.4 if width % scale == height % scale == 0 else 1.0)
    assert full.std() > 20


def test_the_scale_is_the_smaller_of_the_two_sides(decoded_sizes: list[tuple[int, int]]) -> None:
    data = encoded(picture(1, 1600, 500), "JPEG")
    crop_of(data, WHOLE, 224)
    crop_of(data, (0.0, 0.0, 0.25, 1.0), 224)
    assert decoded_sizes == [(800, 250), (1600, 500)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_cropped_upright(orientation: int, kind: str) -> None:
    upright = picture(3, 96, 64)
    stored, exif = stored_as(upright, orientation)
    data = encoded(stored, kind, exif=exif, **{"lossless": True} if kind == "WEBP" else {})
    asked = []

    def box(width: int, height: int) -> Sequence[float]:
        asked.append((width, height))
        return PART

    got = decode_crop(data, box, (32, 32), "bicubic")
    assert asked == [(96, 64)]
    assert np.array_equal(got, crop_in_full(decode(data), PART, 32))
    assert apart(got, crop_in_full(upright, PART, 32)) <= (8 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_is_scaled_by_its_upright_sides(orientation: int, decoded_sizes: list[tuple[int, int]]) -> None:
    upright, box = picture(3, 1600, 640), (0.05, 0.1, 0.35, 0.9)  # 480 x 512 pixels are halved; lying, 192 are not
    stored, exif = stored_as(upright, orientation)
    got = crop_of(encoded(stored, "JPEG", exif=exif, quality=95), box, 224)
    assert decoded_sizes == [(800, 320)]
    assert apart(got, crop_in_full(upright, box, 224)) <= 1


def exif_block(kind: int, count: int, value: bytes) -> bytes:
    """With an orientation of that TIFF type and no other entry."""
    entry = b"\x01\x12" + kind.to_bytes(2, "big") + count.to_bytes(4, "big") + value.ljust(4, b"\0")
    return b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + entry + bytes(4)


SHORT, TEXT = 3, 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Metadata Warning")
@pytest.mark.parametrize(
    "block",
    [
        *(exif_block(SHORT, 1, number.to_bytes(2, "big")) for number in (0, 9, 65535)),
        exif_block(SHORT, 2, b"\0\x06\0\x06"),
        exif_block(TEXT, 2, b"6"),
        exif_block(SHORT, 1, b"\0\x06")[:-9],
        b"Exif\0\0no such thing",
    ],
    ids=["none", "nine", "largest", "two", "text", "cut off", "no EXIF"],
)
def test_an_exif_block_without_sense_does_not_cost_the_crop(block: bytes) -> None:
    data, asked = encoded(picture(0, 60, 40), "JPEG", exif=block), []

    def box(width: int, height: int) -> Sequence[float]:
        asked.append((width, height))
        return PART

    assert np.array_equal(decode_crop(data, box, (32, 32), "bicubic"), crop_in_full(decode(data), PART, 32))
    assert asked == [decode(data).size]


@pytest.mark.parametrize(
    "block",
    [
        *(exif_block(kind, 1, b"\6".rjust(width, b"\0")) for kind, width in [(1, 1), (4, 4), (6, 1), (8, 2), (9, 4)]),
        exif_block(SHORT, 2, b"\0\6\0\6"),
        exif_block(1, 4, b"\6\6\6\6"),
        exif_block(SHORT, 1, b"\0\6").replace(b"\0\x08\0\1", b"\0\x08\0\x63"),
    ],
    ids=["byte", "long", "signed byte", "signed short", "signed long", "two", "four", "more entries than there are"],
)
def test_an_orientation_may_be_of_any_whole_type(block: bytes) -> None:
    upright = picture(3, 96, 64)
    stored, _ = stored_as(upright, 6)
    got = decode(encoded(stored, "JPEG", exif=block, quality=95))
    assert got.size == upright.size
    assert apart(np.asarray(got), np.asarray(upright)) <= 8


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr"])
def test_jpegs_of_other_modes_are_cropped_in_rgb(mode: str, decoded_sizes: list[tuple[int, int]]) -> None:
    small, large = (encoded(picture(2, *size).convert(mode), "JPEG") for size in [(60, 40), (960, 640)])
    assert np.array_equal(crop_of(small, PART, 32), crop_in_full(decode(small), PART, 32))
    decoded_sizes.clear()
    assert apart(crop_of(large, PART, 64), crop_in_full(decode(large), PART, 64)) <= 1
    assert decoded_sizes == [(240, 160), (960, 640)]


def test_the_crop_of_a_transparent_picture_is_on_white() -> None:
    image = picture(2, 60, 40).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = encoded(image, "PNG")
    assert np.array_equal(crop_of(data, PART, 32), crop_in_full(decode(data), PART, 32))
    clear = encoded(Image.new("RGBA", (40, 40), (9, 8, 7, 0)), "PNG")
    assert (crop_of(clear, PART, 16) == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("width", "height"), [(33, 57), (113, 1001), (1999, 1333), (2, 2), (3, 500)])
def test_a_box_reaches_to_the_very_edge(kind: str, width: int, height: int) -> None:
    data = encoded(Image.linear_gradient("L").resize((width, height)), kind)
    above = float(np.nextafter(np.float32(1), np.float32(2)))  # what a sum in float32 may come to
    for box in (WHOLE, (0.5, 0.5, 1.0, 1.0), (1 / 3, 1 / 7, above, above)):
        got = crop_of(data, box, 32)
        rounded = [min(share, 1.0) for share in box]
        assert apart(got, crop_in_full(decode(data), rounded, 32)) <= 1


def test_a_crop_is_refused_with_the_same_reasons() -> None:
    jpeg = encoded(picture(0, 400, 400), "JPEG", quality=95)
    cases = {
        b"": "empty",
        b"Dear Sir or Madam": "not_an_image",
        jpeg[: len(jpeg) // 2]: "truncated",
        encoded(Image.new("RGB", (1, 1)), "PNG"): "too_small",
        encoded(Image.new("F", (4, 4)), "TIFF"): "unsupported",
    }
    for data, reason in cases.items():
        for side in (32, 400):  # with scaling, and without
            with pytest.raises(Refused) as caught:
                crop_of(data, WHOLE, side)
            assert caught.value.reason == reason
            assert caught.value.detail == refusal(data).detail
    with pytest.raises(Refused, match="50 x 50"):  # what it would be decoded to
        decode_crop(jpeg, lambda width, height: WHOLE, (32, 32), "bicubic", max_pixels=1000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_no_cut_of_a_file_does_anything_but_give_a_crop_or_refuse(kind: str) -> None:
    data = encoded(picture(0, 200, 150), kind)
    for part in range(40):
        with contextlib.suppress(Refused):
            assert crop_of(data[: len(data) * part // 40], WHOLE, 32).shape == (32, 32, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_mistake_in_the_box_is_not_taken_for_a_damaged_file(kind: str) -> None:
    def box(width: int, height: int) -> Sequence[float]:
        raise ZeroDivisionError("a mistake")

    with pytest.raises(ZeroDivisionError):
        decode_crop(encoded(picture(0), kind), box, (32, 32), "bicubic")


def test_a_decoding_is_named_and_checked() -> None:
    assert Decoding().id == Decoding(max_pixels=1000).id == "exact-upright"
    assert Decoding(exif="keep", fast=True).id == "fast-keep"
    for one in (Decoding(), Decoding(fast=True), Decoding(exif="keep", fast=True)):
        assert Decoding.from_id(one.id) == one
    assert Decoding.from_id("fast-keep-max1000") == Decoding(exif="keep", fast=True, max_pixels=1000)
    assert Decoding.from_id("exact-upright", 10**10).max_pixels == 10**10
    for wrong in ("exact", "exact-upright-", "exact-upright-max0", "exact-upright-max" + "9" * 30, "newer-upright"):
        with pytest.raises(UsageError, match="upgrade micl-zoo"):
            Decoding.from_id(wrong)
    with pytest.raises(UsageError, match=r"unknown exif 'turn'. Valid: keep, upright"):
        Decoding(exif="turn")  # type: ignore[arg-type]
    for pixels in (0, -1, 1e9, "9", True):
        with pytest.raises(UsageError, match=r"max_pixels must be a whole number and at least 1"):
            Decoding(max_pixels=pixels)  # type: ignore[arg-type]


TRANSFORMS = [Transform(), Transform.square(224, 248), Transform.square(32, 37, interpolation="bilinear")]
TRANSFORMS += [Transform.square(64, 50)]  # larger than the picture: the rest is black
TRANSFORMS += [Transform((64, 48), (71, 53)), Transform((80, 60), (80, 60), "squash", "bilinear")]
TRANSFORMS += [Transform.square(64, 64, mode="border", mean=(0.5, 0.4, 0.1)), Transform((60, 71), (66, 78), "border")]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.id.partition("-0")[0])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF"])
def test_exact_pixels_are_those_of_the_transform(kind: str, transform: Transform) -> None:
    for size in [(97, 61), (61, 97), (64, 64), (600, 31), (700, 500)]:
        data = encoded(picture(1, 700, 600).resize(size), kind)
        got = decode_pixels(data, transform)
        assert np.array_equal(got, transform.pixels(decode(data)))
        assert (got.shape, got.dtype) == ((*transform.size, 3), np.uint8)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.id.partition("-0")[0])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_fast_pixels_are_close_to_the_exact_ones(kind: str, transform: Transform) -> None:
    large = [(1999, 1333), (1000, 3000)] if kind == "JPEG" else []
    for size in [(97, 61), (61, 97), (64, 64), (600, 31), (31, 600), *large]:
        data = encoded(picture(1, 700, 600).resize(size), kind)
        got, exact = (decode_pixels(data, transform, Decoding(fast=fast)) for fast in (True, False))
        assert got.shape == exact.shape
        assert apart(got, exact) <= (0.8 if size in large else 0.25), size  # a rounding, or a scaled decode


def test_the_fast_path_decodes_at_a_scale_of_twice_the_need(decoded_sizes: list[tuple[int, int]]) -> None:
    transform, fast = Transform.square(224, 224), Decoding(fast=True)
    for shorter in (440, 447, 448, 895, 896, 1791, 1792, 3584):
        data = encoded(picture(1, shorter * 4 // 3, shorter), "JPEG")
        decode_pixels(data, transform, fast)
    assert [height for _, height in decoded_sizes] == [440, 447, 448, 895, 448, 896, 448, 448]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_heeded_or_kept_on_both_paths(orientation: int) -> None:
    upright, transform = picture(3, 960, 640), Transform.square(64, 64)
    stored, exif = stored_as(upright, orientation)
    data = encoded(stored, "JPEG", exif=exif, quality=95)
    for fast in (False, True):
        assert apart(decode_pixels(data, transform, Decoding(fast=fast)), transform.pixels(upright)) <= 1.5
        kept = decode_pixels(data, transform, Decoding(exif="keep", fast=fast))
        assert apart(kept, transform.pixels(stored)) <= 1.5
    assert decode(data, exif="keep").size == stored.size


def test_both_paths_refuse_above_the_limit() -> None:
    data = encoded(picture(0, 100, 100), "JPEG")
    for fast in (False, True):
        with pytest.raises(
            Refused, match=r"too_large: 100 x 100 pixels, the limit is 9,999 .*--max-pixels.*max_pixels="
        ):
            decode_pixels(data, Transform(), Decoding(fast=fast, max_pixels=9_999))


def test_a_jpeg_with_more_pictures_behind_it_is_scaled_as_any(decoded_sizes: list[tuple[int, int]]) -> None:
    data = encoded(picture(1, 1600, 1200), "MPO", save_all=True, append_images=[picture(2, 1600, 1200)])
    got = decode_pixels(data, Transform.square(64, 64), Decoding(fast=True))
    assert decoded_sizes == [(200, 150)]
    assert apart(got, Transform.square(64, 64).pixels(picture(1, 1600, 1200))) <= 1.5


def test_a_tga_is_known_by_its_footer() -> None:
    data = encoded(picture(1), "TGA")
    assert decode(data).size == picture(1).size
    assert refusal(data[:-30]).reason == "unsupported"


HEIC_START = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_a_heic_without_the_plug_in_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    read = tuple(name for name in formats.readable() if name not in ("HEIF", "AVIF"))
    monkeypatch.setattr(formats, "readable", lambda: read)
    assert refusal(HEIC_START + bytes(200)).reason == "unsupported"
    assert "pip install 'micl-zoo[heif]'" in refusal(HEIC_START + bytes(200)).detail
    assert "pip install 'pillow>=11.3'" in refusal(HEIC_START.replace(b"heic", b"avif") + bytes(200)).detail


@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_decodes_upright_with_the_plug_in(orientation: int) -> None:
    pytest.importorskip("pillow_heif")
    decode(encoded(picture(0), "PNG"))  # which registers it
    if "HEIF" not in Image.SAVE:
        pytest.skip("this plug-in has no encoder")
    upright = picture(3, 96, 64)
    stored, exif = stored_as(upright, orientation)
    data = encoded(stored, "HEIF", exif=exif.tobytes(), quality=95)  # in bytes, by which the plug-in writes its turn
    assert decode(data).size == upright.size
    assert apart(np.asarray(decode(data)), np.asarray(upright)) <= 6
    assert refusal(data[: len(data) // 2]).reason in ("damaged", "truncated")


def test_avif_decodes() -> None:
    decode(encoded(picture(0), "PNG"))
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    image = picture(3, 96, 64)
    assert apart(np.asarray(decode(encoded(image, "AVIF", quality=90))), np.asarray(image)) <= 6
