"""Order, crops and pixels of the training batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from micl_zoo.training.data import (
    CROP_DRAWS,
    Batch,
    MemoryCorpus,
    StreamedCorpus,
    batch_rows,
    change_color,
    crop_boxes,
    draw,
    resample,
    steps_per_epoch,
    visible_patches,
)
from micl_zoo.training.recipes import Recipe
from PIL import Image

from micl_zoo.errors import SourceError
from micl_zoo.sources import index_source


def test_an_epoch_is_a_permutation_and_depends_on_seed_and_epoch_only(twin: Recipe) -> None:
    def epoch(recipe: Recipe, number: int) -> list[int]:
        return [row for step in range(5 * number, 5 * number + 5) for row in batch_rows(recipe, 40, step).tolist()]

    first = epoch(twin, 0)
    assert sorted(first) == list(range(40))
    assert first == epoch(twin, 0)
    assert first != epoch(twin, 1)
    assert first != epoch(dataclasses.replace(twin, seed=1), 0)


def test_draws_depend_on_the_step_only(twin: Recipe) -> None:
    assert all(torch.equal(a, b) for a, b in zip(draw(twin, 3), draw(twin, 3), strict=True))
    assert not torch.equal(draw(twin, 3).noise, draw(twin, 4).noise)


def test_a_corpus_smaller_than_a_batch_is_an_error(twin: Recipe) -> None:
    with pytest.raises(SourceError, match=r"has 5 usable images .* takes 8.*--set batch_size=5"):
        steps_per_epoch(twin, 5)


@pytest.mark.parametrize("aspect", [0.3, 1.0, 3.0])
def test_crop_boxes_keep_to_the_recipe(twin: Recipe, aspect: float) -> None:
    draws = torch.rand(2000, CROP_DRAWS, generator=torch.Generator().manual_seed(0))
    left, top, right, bottom = crop_boxes(draws, torch.full((2000,), aspect), twin).unbind(1)
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 1 + 1e-6
    assert bottom.max() <= 1 + 1e-6
    area, ratio = (right - left) * (bottom - top), (right - left) * aspect / (bottom - top)
    whole = area > 0.9999  # none of ten tries fitted
    assert area.min() >= twin.crop_scale_min - 1e-6
    assert ratio[~whole].min() >= 0.7499
    assert ratio[~whole].max() <= 1.3334
    assert area.std() > 0.1


@pytest.mark.parametrize("filter_name", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("box", "size"),
    [((0, 0, 48, 40), 48), ((3.5, 2.25, 30.0, 39.5), 56), ((0, 0, 48, 40), 12), ((10, 10, 47.5, 20), 16)],
)
def test_resample_equals_pillow(filter_name: str, box: tuple[float, ...], size: int) -> None:
    image = picture(1).point(lambda level: 50 + 0.6 * level)  # no overshoot to clip between the passes
    expected = np.asarray(image.resize((size, size), Image.Resampling[filter_name.upper()], box=box)).transpose(2, 0, 1)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    batch = Batch(pixels, torch.tensor([box], dtype=torch.float32))
    got = resample(batch, torch.tensor([False]), size, filter_name)[0].numpy()  # type: ignore[arg-type]
    assert np.abs(got - expected).max() <= 1.51  # Pillow rounds to whole levels after each of its two passes
    flipped = resample(batch, torch.tensor([True]), size, filter_name)[0].numpy()  # type: ignore[arg-type]
    np.testing.assert_array_equal(flipped, got[:, :, ::-1])


def test_visible_patches_are_those_of_the_whole_crop(image_folder: Callable[..., Path], twin: Recipe) -> None:
    plain = dataclasses.replace(twin, view_color=False)
    corpus = MemoryCorpus.load(index_source(image_folder(8)), plain.source_size)
    _, batch, draws = next(corpus.batches(plain, 0, 1))
    patches, views = visible_patches(batch, draws, plain)
    crop = resample(batch, draws.flips, 32, "bicubic") / 255
    crop = (crop - torch.tensor(plain.pixel_mean)[:, None, None]) / torch.tensor(plain.pixel_std)[:, None, None]
    for image, view, place in [(0, 0, 0), (5, 1, 3), (7, 0, 2)]:
        row, column = divmod(int(views[image, view, place]), 4)
        expected = crop[image, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten()
        torch.testing.assert_close(patches[image, view, place], expected, rtol=1e-5, atol=1e-5)


def test_colour_changes_are_one_per_view(twin: Recipe) -> None:
    draws = draw(twin, 0)
    patches = torch.rand(8, 2, 4, 3 * 64)
    changed = change_color(patches, draws).unflatten(3, (3, 64))
    pixels = patches.unflatten(3, (3, 64))
    image, view = next((i, v) for i in range(8) for v in range(2) if not draws.grey[i, v])
    expected = pixels[image, view] * draws.gain[image, view] + draws.bias[image, view]
    torch.testing.assert_close(changed[image, view], expected)
    grey = dataclasses.replace(twin, grey_probability=1.0, color_gain=0.0, color_bias=0.0)
    levels = change_color(patches, draw(grey, 0)).unflatten(3, (3, 64))
    torch.testing.assert_close(levels[..., 0, :], levels[..., 2, :])
    assert not torch.equal(draws.gain[:, 0], draws.gain[:, 1])


def test_streamed_crops_match_the_cached_ones(image_folder: Callable[..., Path], twin: Recipe) -> None:
    index = index_source(image_folder(16))
    recipe = dataclasses.replace(twin, source_size=128)  # the cache enlarges, so that only rounding differs
    cached = MemoryCorpus.load(index, recipe.source_size).batches(recipe, 1, 2)
    streamed = StreamedCorpus(index, 0, []).batches(recipe, 1, 2)
    (_, whole, draws), (_, cut, same) = next(cached), next(streamed)
    assert torch.equal(draws.noise, same.noise)
    difference = resample(whole, draws.flips, 32, "bicubic") - resample(cut, draws.flips, 32, "bicubic")
    assert difference.abs().mean() < 3  # levels of 255: the way through the cache blurs edges a little


def test_streaming_is_the_same_for_any_number_of_workers(image_folder: Callable[..., Path], twin: Recipe) -> None:
    index = index_source(image_folder(16))
    runs = [[b.images for _, b, _ in StreamedCorpus(index, n, []).batches(twin, 1, 4)] for n in (0, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_damaged_image_is_left_out_and_named(image_folder: Callable[..., Path], twin: Recipe, cache: str) -> None:
    folder = image_folder(16)
    (folder / "004.jpg").write_bytes(b"not a picture")
    index = index_source(folder)
    corpus = MemoryCorpus.load(index, 32) if cache == "memory" else StreamedCorpus(index, 0, [])
    for _, batch, _ in corpus.batches(twin, 0, 2):
        assert len(batch.images) == twin.batch_size
    assert [(refused.id, refused.reason) for refused in corpus.refused] == [("004.jpg", "not_an_image")]
