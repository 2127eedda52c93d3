"""What `embed` makes of numbers of every type, of tensors, of rows of data sets; threads, progress and what is bad."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from damaged import encoded
from PIL import Image

import micl_zoo
from micl_zoo.encoders import encoder as encoder_module
from micl_zoo.encoders.encoder import Embedded, Encoder
from micl_zoo.encoders.inputs import each_made, open_image
from micl_zoo.errors import Refused, UsageError

PIXELS = np.array(picture(3))  # (40, 48, 3) uint8


@pytest.fixture
def encoder(encoder_folder: Path) -> Encoder:
    return micl_zoo.load(encoder_folder, device="cpu")


def rgb(image: Any) -> np.ndarray:
    return np.asarray(open_image(image, 0))


def through_png(image: Image.Image) -> np.ndarray:
    return rgb(encoded(image, "PNG"))


def test_numbers_mean_what_their_type_says() -> None:
    floats = [(PIXELS / 255).astype(kind) for kind in (np.float16, np.float32, np.float64, np.longdouble, ">f4")]
    for one in [*floats, *map(torch.from_numpy, floats[:3]), torch.from_numpy(floats[1]).requires_grad_()]:
        np.testing.assert_array_equal(rgb(one), PIXELS)
    in_bf16 = torch.from_numpy(floats[1]).bfloat16()
    np.testing.assert_array_equal(rgb(in_bf16), (in_bf16.float() * 255).round().to(torch.uint8))
    mask = PIXELS[..., 0] > 99
    for one in (mask, torch.from_numpy(mask), mask[..., None]):
        np.testing.assert_array_equal(rgb(one), through_png(Image.fromarray(mask)))
    deep = np.random.default_rng(0).integers(0, 1 << 16, (20, 30), np.uint16)
    for one in (deep, deep.astype(">u2"), torch.from_numpy(deep), deep[..., None]):
        np.testing.assert_array_equal(rgb(one), through_png(Image.fromarray(deep)))
    colours = PIXELS.astype(np.uint16) * 257
    np.testing.assert_array_equal(rgb(colours), PIXELS)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tensors_have_their_channels_first_or_last(encoder: Encoder, channels: int) -> None:
    pixels = torch.from_numpy(np.dstack([PIXELS, PIXELS[..., :1]])[..., :channels].copy())
    for last in (pixels, pixels / 255):
        first = last.permute(2, 0, 1)
        np.testing.assert_array_equal(rgb(first), rgb(last.numpy()))
        np.testing.assert_array_equal(rgb({"image": first, "label": 3}), rgb(last))
        expected = encoder.embed([last.numpy(), last.flip(0).numpy()])
        np.testing.assert_array_equal(encoder.embed(torch.stack([first, first.flip(1)])), expected)
        np.testing.assert_array_equal(encoder.embed(torch.stack([last, last.flip(0)])), expected)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (PIXELS.astype(np.float32), "numbers of float32 must be 0, black, to 1, white; got 0 to 255: scale them"),
        (
            torch.from_numpy(PIXELS / 255 * 2 - 1),
            r"numbers of float64 must be .*; got -1 to 1: .*encoder\(pixel_values",
        ),
        (np.where(PIXELS > 9, np.nan, 0), "got NaN"),
        (np.where(PIXELS > 9, np.inf, 0), "got 0 to inf"),
        (
            PIXELS.astype(np.int64),
            "numbers of int64 have no defined black and white: give numbers of 0 to 255 in uint8",
        ),
        (torch.from_numpy(PIXELS).int(), "numbers of int32 have no defined"),
        (PIXELS.astype(np.complex64), "numbers of complex64 have no defined"),
        (torch.from_numpy(PIXELS).to(torch.complex64).conj(), "numbers of complex64 have no defined"),
        (PIXELS.astype(object), "numbers of object have no defined"),
        (PIXELS.astype(str), "numbers of <U3 have no defined"),
        (PIXELS.astype(np.uint16), "16-bit numbers of at most .*, which would be black all over"),
        (torch.zeros(3, 8, 3), r"a tensor of \(3, 8, 3\) may have its channels first or last: give an array"),
        (torch.zeros(1, 8, 4), "may have its channels first or last"),
        (np.zeros((3, 8, 8)), "move its first axis to the end"),
        (torch.zeros(2, 8, 8), r"must be \(H, W\)"),
        ({"image": {"bytes": None, "path": None}}, r'got a dictionary of \["bytes", "path"'),
        ({"image": [1]}, "give paths.*got list"),
        ((picture(0), 3), "got tuple"),
    ],
)
def test_what_may_be_two_things_is_neither(image: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_image(image, 0)


def test_rows_of_data_sets_are_images(encoder: Encoder) -> None:
    data = encoded(picture(3), "PNG")
    rows: list[Any] = [{"image": picture(3), "label": 1}, {"img": {"bytes": data, "path": "a.png"}}, {"image": data}]
    for row in rows:
        np.testing.assert_array_equal(rgb(row), PIXELS)
    assert len(encoder.embed(iter(rows))) == len(encoder.embed(rows, workers=2)) == 3
    np.testing.assert_array_equal(encoder.embed(rows[0]), encoder.embed(picture(3)))  # one row is one image


def mixed(folder: Path) -> list[Any]:
    """Images of every kind, of which those at 1, 4 and 6 are bad."""
    data = encoded(picture(0), "PNG")
    file = io.BytesIO(encoded(picture(1), "JPEG"))
    (folder / "a.png").write_bytes(data)
    good: list[Any] = [data, folder / "a.png", file, {"bytes": data, "path": None}, picture(2), file, PIXELS]
    for place, bad in {1: folder / "gone.jpg", 4: data[:200], 6: 3.5}.items():
        good.insert(place, bad)
    return good


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_cannot_be_read_is_left_out_and_named(encoder: Encoder, tmp_path: Path, workers: int) -> None:
    images = mixed(tmp_path)
    found = encoder.embed(iter(images), skip_bad=True, batch_size=3, workers=workers)
    assert isinstance(found, Embedded)
    assert found.kept.tolist() == [0, 2, 3, 5, 7, 8, 9]
    expected = [encoder.embed([images[place]]) for place in found.kept]
    np.testing.assert_allclose(found.rows, np.concatenate(expected), atol=1e-6)
    assert [(one.place, one.reason) for one in found.skipped] == [
        (1, "unreadable"),
        (4, "truncated"),
        (6, "unsupported"),
    ]
    assert found.skipped[0].name.endswith("gone.jpg")
    assert (found.skipped[1].name, found.skipped[2].name) == ("bytes", "float")
    assert str(found.skipped[1]).startswith("image 4 (bytes): ")
    with pytest.raises(UsageError, match=r"image 1 \(.*gone.jpg\): .*No such file.* \[unreadable\]"):
        encoder.embed(images, workers=workers)
    nothing = encoder.embed([b"", None], skip_bad=True, workers=workers)
    assert (nothing.rows.shape, nothing.kept.shape, len(nothing.skipped)) == ((0, 32), (0,), 2)


def test_threads_hold_few_images_and_end() -> None:
    data, taken, most = encoded(picture(0), "PNG"), 0, 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield data

    before = threading.active_count()
    made = each_made(endless(), np.asarray, threads=2)
    for done in range(50):
        assert not isinstance(next(made), Refused)
        most = max(most, taken - done)
    assert most <= 10
    made.close()
    assert threading.active_count() == before


def test_frames_that_reuse_their_memory_are_each_their_own(encoder: Encoder) -> None:
    def frames() -> Iterator[np.ndarray]:
        frame = np.empty_like(PIXELS)
        for seed in range(9):
            frame[:] = np.asarray(picture(seed))
            yield frame

    expected = encoder.embed([picture(seed) for seed in range(9)])
    np.testing.assert_allclose(encoder.embed(frames(), workers=2), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "said"), [(-1, "must be at least 0, got -1"), (1.5, "a whole number"), ("2", "whole")]
)
def test_workers_are_a_number(encoder: Encoder, wrong: Any, said: str) -> None:
    with pytest.raises(UsageError, match=f"workers .*{said}"):
        encoder.embed([], workers=wrong)


def test_a_bar_counts_every_image(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images, ticks, opened, real = mixed(tmp_path), list[tuple[int, str]](), list[Any](), encoder_module.progress_bar

    class Bar:
        def __init__(self, what: str, total: int | None, **options: Any) -> None:
            opened.append((total, options))
            self.bar = real(what, total, **options)

        def __enter__(self) -> Any:
            self.bar.__enter__()
            return lambda amount=1, note="": ticks.append((amount, note))

        def __exit__(self, *error: Any) -> None:
            self.bar.__exit__(*error)

    monkeypatch.setattr(encoder_module, "progress_bar", Bar)
    encoder.embed(images, skip_bad=True, progress=True, batch_size=4)
    encoder.embed((one for one in images), skip_bad=True)
    assert opened == [(10, {"show": True}), (None, {"show": False})]
    assert sum(amount for amount, _ in ticks) == 20
    assert ticks.count((1, "3 left out")) == 2
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert len(encoder.embed(images[2], progress=True)) == 1  # no terminal, no bar
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
