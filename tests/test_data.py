"""Order, crops and pixels of the training batches."""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import picture
from damaged import encoded
from PIL import Image
from torch import Tensor

from micl_zoo.errors import SourceError
from micl_zoo.images.decode import decode
from micl_zoo.sources import parquet as parquet_file
from micl_zoo.sources.index import ImageIndex
from micl_zoo.sources.listing import index_source
from micl_zoo.sources.reader import Reader
from micl_zoo.training.micl import draw_views
from micl_zoo.training.pretraining import data
from micl_zoo.training.pretraining.data import (
    CROP_DRAWS,
    CROP_TRIES,
    WHOLE,
    MemoryCorpus,
    Seen,
    Share,
    StreamedCorpus,
    batch_rows,
    change_color,
    crop_boxes,
    draw,
    index_blocks,
    normalise,
    resample,
    visible_patches,
)
from micl_zoo.training.recipes import Recipe
from micl_zoo.training.run.order import RefusedImage, steps_per_epoch

CPU = torch.device("cpu")


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets how many rows of a parquet corpus are shuffled together."""

    def resize(rows: int) -> None:
        monkeypatch.setattr(data, "WINDOW", rows)
        data._epoch_order.cache_clear()

    yield resize
    data._epoch_order.cache_clear()


def stream(
    index: ImageIndex, recipe: Recipe, steps: tuple[int, int] = (0, 2), *, workers: int = 0, share: Share = WHOLE
) -> tuple[list[Seen], list[RefusedImage]]:
    corpus = StreamedCorpus(index, workers, CPU)
    return list(corpus.batches(recipe, *steps, share)), corpus.refused


def assert_same(first: Sequence[Seen], second: Sequence[Seen]) -> None:
    assert [seen.step for seen in first] == [seen.step for seen in second]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.patches, other.patches)
        assert torch.equal(one.views, other.views)


def jpeg(seed: int) -> bytes:
    return encoded(picture(seed, 40 + seed % 20, 44), "JPEG", quality=90)


def parquet(path: Path, images: Sequence[bytes], group: int, **columns: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": image, "path": None} for image in images]
    pq.write_table(pa.table({**columns, "image": cells}), path, row_group_size=group)
    return path


def tar(path: Path, images: Sequence[bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, image in enumerate(images):
            member = tarfile.TarInfo(f"{number:03d}.jpg")
            member.size = len(image)
            archive.addfile(member, io.BytesIO(image))
    return path


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


def test_flips_and_grey_come_as_often_as_the_recipe_says(twin: Recipe) -> None:
    recipe = dataclasses.replace(twin, batch_size=4000, flip_probability=0.3, grey_probability=0.8)
    drawn = draw(recipe, 0)
    assert drawn.flips.float().mean() == pytest.approx(0.3, abs=0.03)
    assert drawn.grey.float().mean() == pytest.approx(0.8, abs=0.03)
    assert not draw(dataclasses.replace(recipe, flip_probability=0.0), 0).flips.any()
    assert draw(dataclasses.replace(recipe, flip_probability=1.0), 0).flips.all()


def test_a_corpus_smaller_than_a_batch_is_an_error(twin: Recipe) -> None:
    with pytest.raises(SourceError, match=r"has 5 usable images .* takes 8.*--set batch_size=5"):
        steps_per_epoch(twin, 5)
    with pytest.raises(SourceError, match=r"has 0 usable images .* takes 8: give more images$"):
        steps_per_epoch(twin, 0)


def a_box(draws: Sequence[float], aspect: float, recipe: Recipe) -> list[float]:
    """One image's box, try by try."""
    *tries, across, down = draws
    for area_draw, ratio_draw in zip(tries[:CROP_TRIES], tries[CROP_TRIES:], strict=True):
        area = recipe.crop_scale_min + area_draw * (recipe.crop_scale_max - recipe.crop_scale_min)
        ratio = recipe.crop_ratio_min * (recipe.crop_ratio_max / recipe.crop_ratio_min) ** ratio_draw
        width, height = (area * ratio / aspect) ** 0.5, (area / ratio * aspect) ** 0.5
        if width <= 1 and height <= 1:
            left, top = across * (1 - width), down * (1 - height)
            return [left, top, left + width, top + height]
    return [0, 0, 1, 1]


@pytest.mark.parametrize("aspect", [0.2, 0.75, 1.0, 2.5, 6.0])
def test_a_crop_box_is_the_first_that_fits(twin: Recipe, aspect: float) -> None:
    draws = torch.rand(500, CROP_DRAWS, generator=torch.Generator().manual_seed(1))
    boxes = crop_boxes(draws, torch.full((500,), aspect), twin)
    expected = torch.tensor([a_box(row, aspect, twin) for row in draws.tolist()])
    torch.testing.assert_close(boxes, expected, rtol=0, atol=1e-5)


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
def test_resample_equals_pillow(
    filter_name: Literal["bicubic", "bilinear"], box: tuple[float, float, float, float], size: int
) -> None:
    image = picture(1).point(lambda level: 50 + 0.6 * level)  # no overshoot to clip between the passes
    expected = np.asarray(image.resize((size, size), Image.Resampling[filter_name.upper()], box=box)).transpose(2, 0, 1)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    boxes = torch.tensor([box], dtype=torch.float32)
    got = resample(pixels, boxes, torch.tensor([False]), size, filter_name)[0].numpy()
    assert np.abs(got - expected).max() <= 1.51  # Pillow rounds to whole levels after each of its two passes
    flipped = resample(pixels, boxes, torch.tensor([True]), size, filter_name)[0].numpy()
    np.testing.assert_array_equal(flipped, got[:, :, ::-1])


def test_visible_patches_are_those_of_the_whole_crop(image_folder: Callable[..., Path], twin: Recipe) -> None:
    plain = dataclasses.replace(twin, view_color=False)
    corpus = MemoryCorpus.load(index_source(image_folder(8)), plain.source_size)
    seen, rows, draws = next(corpus.batches(plain, 0, 1)), batch_rows(plain, 8, 0), draw(plain, 0)
    boxes = crop_boxes(draws.crops, corpus.aspect[rows], plain) * plain.source_size
    images = corpus.images[rows]
    patches, views = visible_patches(images, boxes, draws, plain)
    assert torch.equal(seen.patches, patches)
    assert torch.equal(seen.views, views)
    crop = resample(images, boxes, draws.flips, 32, "bicubic") / 255
    crop = (crop - torch.tensor(plain.pixel_mean)[:, None, None]) / torch.tensor(plain.pixel_std)[:, None, None]
    for image, view, place in [(0, 0, 0), (5, 1, 3), (7, 0, 2)]:
        row, column = divmod(int(views[image, view, place]), 4)
        expected = crop[image, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten()
        torch.testing.assert_close(patches[image, view, place], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("views", [2, 3])
def test_colour_changes_are_one_per_view(twin: Recipe, views: int) -> None:
    twin = dataclasses.replace(twin, views=views)
    draws = draw(twin, 0)
    patches = torch.rand(8, views, 4, 3 * 64)
    changed = change_color(patches, draws).unflatten(3, (3, 64))
    pixels = patches.unflatten(3, (3, 64))
    image, view = next((i, v) for i in range(8) for v in reversed(range(views)) if not draws.grey[i, v])
    expected = pixels[image, view] * draws.gain[image, view] + draws.bias[image, view]
    torch.testing.assert_close(changed[image, view], expected)
    grey = dataclasses.replace(twin, grey_probability=1.0, color_gain=0.0, color_bias=0.0)
    levels = change_color(patches, draw(grey, 0)).unflatten(3, (3, 64))
    torch.testing.assert_close(levels[..., 0, :], levels[..., 2, :])
    assert len(draws.gain[0].unique(dim=0)) == views


def cut_with_pillow(index: ImageIndex, recipe: Recipe, step: int, rows: Sequence[int]) -> Tensor:
    """What a batch must hold, image by image: whole picture, box, resize, mirror, slices of 8 x 8."""
    draws, side = draw(recipe, step), recipe.patch_size
    views = draw_views(draws.noise, recipe.mask_ratio, recipe.views)
    crops = []
    for row, numbers, flip in zip(rows, draws.crops, draws.flips, strict=True):
        image = decode(Reader().read(index[row]))
        left, top, right, bottom = a_box(numbers.tolist(), image.width / image.height, recipe)
        box = (left * image.width, top * image.height, right * image.width, bottom * image.height)
        crop = image.resize((recipe.crop_size, recipe.crop_size), Image.Resampling.BICUBIC, box=box)
        crops.append(np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop))
    patches = torch.empty(*views.shape, 3, side, side)
    for place in np.ndindex(*views.shape):
        row, column = divmod(int(views[place]), recipe.crop_size // side)
        patch = crops[place[0]][side * row : side * (row + 1), side * column : side * (column + 1)]
        patches[place] = torch.from_numpy(patch.copy()).permute(2, 0, 1)
    return normalise(patches.flatten(3), draws, recipe)


@pytest.mark.parametrize(("flip_probability", "views"), [(0.0, 2), (0.5, 3), (1.0, 4)])
def test_streamed_patches_are_those_of_a_whole_pillow_crop(
    image_folder: Callable[..., Path], twin: Recipe, flip_probability: float, views: int
) -> None:
    index = index_source(image_folder(16))
    recipe = dataclasses.replace(twin, flip_probability=flip_probability, views=views)
    for seen in stream(index, recipe, (1, 4))[0]:
        level = 1 / 255 / min(recipe.pixel_std) * (1 + recipe.color_gain)  # boxes are rounded to float32: one at most
        rows = batch_rows(recipe, 16, seen.step).tolist()
        difference = (seen.patches - cut_with_pillow(index, recipe, seen.step, rows)).abs()
        assert difference.max() <= 1.01 * level
        assert difference.mean() < 0.002 * level
        assert torch.equal(seen.views, draw_views(draw(recipe, seen.step).noise, recipe.mask_ratio, views))


def test_streamed_patches_are_whole_levels_before_they_are_normalised(
    image_folder: Callable[..., Path], twin: Recipe
) -> None:
    plain = dataclasses.replace(twin, view_color=False)
    (seen,), _ = stream(index_source(image_folder(8)), plain, (0, 1))
    mean, std = (torch.tensor(v)[:, None] * 255 for v in (plain.pixel_mean, plain.pixel_std))
    levels = seen.patches.unflatten(3, (3, -1)) * std + mean
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert levels.min() >= -1e-3
    assert levels.max() <= 255 + 1e-3
    assert levels.std() > 20


def test_streamed_patches_match_the_cached_ones(image_folder: Callable[..., Path], twin: Recipe) -> None:
    index = index_source(image_folder(16))
    recipe = dataclasses.replace(twin, source_size=128, view_color=False)  # the cache enlarges: only rounding differs
    cached = next(MemoryCorpus.load(index, recipe.source_size).batches(recipe, 1, 2))
    streamed = stream(index, recipe, (1, 2))[0][0]
    assert torch.equal(cached.views, streamed.views)
    difference = (cached.patches - streamed.patches).abs().mean() * 255 * np.mean(recipe.pixel_std)
    assert difference < 3  # levels of 255: the way through the cache blurs edges a little


def test_the_cache_remembers_where_in_the_index_its_images_were(
    image_folder: Callable[..., Path], twin: Recipe
) -> None:
    folder = image_folder(17)
    (folder / "004.jpg").write_bytes(b"not a picture")
    index = index_source(folder)
    corpus = MemoryCorpus.load(index, 32)
    assert corpus.rows.tolist() == [row for row in range(17) if index[row].id != "004.jpg"]
    for place, row in enumerate(corpus.rows.tolist()):
        image = decode(Reader().read(index[row]))
        assert corpus.aspect[place] == pytest.approx(image.width / image.height)
        expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
        assert np.array_equal(corpus.images[place].permute(1, 2, 0).numpy(), expected)
    epoch = [row for step in range(2) for row in corpus.index_rows(twin, step).tolist()]
    assert sorted(epoch) == corpus.rows.tolist()


def damaged(folder: Path, *names: str) -> ImageIndex:
    for name in names:
        (folder / name).write_bytes(b"not a picture")
    return index_source(folder)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("broken", [(), ("004.jpg", "010.jpg", "below/003.jpg", "below/007.jpg")])
def test_streaming_is_the_same_for_any_number_of_workers(
    image_folder: Callable[..., Path], twin: Recipe, broken: tuple[str, ...]
) -> None:
    index = damaged(image_folder(16), *broken)
    seen, refused = stream(index, twin, (1, 5))
    assert {image.id for image in refused} == set(broken)
    for workers in (1, 3):
        again, also_refused = stream(index, twin, (1, 5), workers=workers)
        assert_same(again, seen)
        assert also_refused == refused


@pytest.mark.parametrize("images", [1, 3, 4])
def test_streaming_is_the_same_for_pieces_of_any_size(
    image_folder: Callable[..., Path], twin: Recipe, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    index = damaged(image_folder(16), "004.jpg", "below/003.jpg", "below/007.jpg")
    seen, refused = stream(index, twin, (1, 5))
    half = stream(index, twin, (1, 5), share=Share(1, 2))[0]
    monkeypatch.setattr(data, "PIECE", images)
    for workers in (0, 2):
        again, also_refused = stream(index, twin, (1, 5), workers=workers)
        assert_same(again, seen)
        assert also_refused == refused
    assert_same(stream(index, twin, (1, 5), share=Share(1, 2))[0], half)


@pytest.mark.parametrize("broken", [(), ("004.jpg", "010.jpg", "below/003.jpg", "below/007.jpg")])
@pytest.mark.parametrize("cache", ["memory", "none"])
def test_the_shares_of_all_processes_are_the_whole_batch(
    image_folder: Callable[..., Path], twin: Recipe, cache: str, broken: tuple[str, ...]
) -> None:
    index = damaged(image_folder(24), *broken)

    def taken(share: Share) -> tuple[list[Seen], list[RefusedImage]]:
        corpus = MemoryCorpus.load(index, 32) if cache == "memory" else StreamedCorpus(index, 0, CPU)
        return list(corpus.batches(twin, 0, 4, share)), corpus.refused

    whole, refused = taken(WHOLE)
    assert {image.id for image in refused} == set(broken)
    for world in (1, 2, 4):
        shares = [taken(Share(rank, world)) for rank in range(world)]
        parts = zip(*(seen for seen, _ in shares), strict=True)
        together = [
            Seen(of_step[0].step, torch.cat([s.patches for s in of_step]), torch.cat([s.views for s in of_step]))
            for of_step in parts
        ]
        assert_same(together, whole)
        assert {image for _, images in shares for image in images} == set(refused)


def test_another_image_of_the_corpus_takes_the_place_of_a_damaged_one(
    image_folder: Callable[..., Path], twin: Recipe
) -> None:
    folder = image_folder(16)
    plain = dataclasses.replace(twin, view_color=False)
    before, _ = stream(index_source(folder), plain)
    index = damaged(folder, "004.jpg")
    after, refused = stream(index, plain)
    assert [(image.id, image.reason) for image in refused] == [("004.jpg", "not_an_image")]
    row = next(row for row in range(16) if index[row].id == "004.jpg")
    for old, new in zip(before, after, strict=True):
        rows = batch_rows(plain, 16, old.step)
        same = (old.patches == new.patches).flatten(1).all(1)
        assert same.tolist() == (rows != row).tolist()
        for place in (~same).nonzero()[:, 0].tolist():
            others = [cut_with_pillow(index, plain, old.step, [other] * 8) for other in range(16) if other != row]
            far = [(new.patches[place] - patches[place]).abs().mean() for patches in others]
            assert sum(distance < 1e-3 for distance in far) == 1
    assert any(row in batch_rows(plain, 16, step) for step in range(2))


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_a_damaged_image_is_left_out_and_named(image_folder: Callable[..., Path], twin: Recipe, cache: str) -> None:
    index = damaged(image_folder(16), "004.jpg")
    corpus = MemoryCorpus.load(index, 32) if cache == "memory" else StreamedCorpus(index, 0, CPU)
    for seen in corpus.batches(twin, 0, 4):  # two epochs: named once
        assert len(seen.patches) == len(seen.views) == twin.batch_size
    assert [(refused.id, refused.reason) for refused in corpus.refused] == [("004.jpg", "not_an_image")]


def test_a_damaged_image_is_named_once_where_it_is_tried_for_another_too(
    image_folder: Callable[..., Path], twin: Recipe
) -> None:
    names = ["000.jpg", *(f"below/{number:03d}.jpg" for number in (1, 3, 5, 7))]
    _, refused = stream(damaged(image_folder(8), *names), twin, (0, 3))
    assert sorted(image.id for image in refused) == names


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corpus_of_which_no_image_can_be_read_ends_with_a_reason(
    image_folder: Callable[..., Path], twin: Recipe, workers: int
) -> None:
    folder = image_folder(16)
    index = index_source(folder)
    first = index[int(batch_rows(twin, 16, 0).min())].id
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(SourceError) as caught:
        stream(index, twin, workers=workers)
    assert str(caught.value).startswith(f"{first!r} cannot be trained on (unreadable: [Errno 2]")
    assert "20 images tried in its place" in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_a_signal_to_all_processes_ends_no_worker(image_folder: Callable[..., Path], twin: Recipe, name: str) -> None:
    index = index_source(image_folder(16))
    batches = StreamedCorpus(index, 1, CPU).batches(twin, 0, 40)
    seen = [next(batches)]
    workers = multiprocessing.active_children()
    assert len(workers) == 1
    subprocess.run(["kill", f"-{name}", str(workers[0].pid)], check=True)
    assert_same([*seen, *batches], stream(index, twin, (0, 40))[0])


LEAVES_A_WORKER = """
import multiprocessing, os, signal, sys, threading, time
from micl_zoo.training.pretraining.data import lifeline, settle_worker

def work(ready, pipe):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()  # as libraries do: takes any signal
    settle_worker(pipe, 0)
    ready.set()
    time.sleep(600)

fork = multiprocessing.get_context("fork")
ready = fork.Event()
fork.Process(target=work, args=(ready, lifeline(os.getpid())), daemon=True).start()
ready.wait()
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
@pytest.mark.parametrize("end", ["killed", "returns"])
def test_a_worker_ends_with_its_parent(end: str) -> None:
    # Both ends are waited for: the worker holds the pipe of the output open.
    run = subprocess.run([sys.executable, "-c", LEAVES_A_WORKER, end], capture_output=True, timeout=120, check=False)
    assert run.returncode == (-signal.SIGKILL if end == "killed" else 0), run.stderr


def test_a_folder_a_tar_and_parquet_files_give_the_same_patches(
    image_folder: Callable[..., Path], tmp_path: Path, twin: Recipe
) -> None:
    folder = index_source(image_folder(20))
    images = [Reader().read(entry) for entry in folder.entries()]
    parquet(tmp_path / "rows" / "a.parquet", images[:13], group=3)
    parquet(tmp_path / "rows" / "b.parquet", images[13:], group=100)
    seen, _ = stream(folder, twin, (1, 5))
    assert_same(stream(index_source(tar(tmp_path / "a.tar", images)), twin, (1, 5))[0], seen)
    assert_same(stream(index_source(tmp_path / "rows"), twin, (1, 5), workers=1)[0], seen)


def test_blocks_are_the_row_groups(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    images = [jpeg(0)] * 7
    parquet(tmp_path / "rows" / "a.parquet", images, group=3)
    parquet(tmp_path / "rows" / "b.parquet", images[:4], group=1, id=["q", "r", "s", "t"])
    parquet(tmp_path / "rows" / "c.parquet", images[:2], group=5)
    parquet(tmp_path / "rows" / "d.parquet", images[:5], group=5, id=["u", "v", "w", "x", "y"])
    index = index_source(tmp_path / "rows")
    assert index_blocks(index) == (0, 3, 6, 7, 8, 9, 10, 11, 13)
    assert index_blocks(index.slice(2, 10)) == (0, 1, 4, 5, 6, 7, 8, 9)
    assert index_blocks(index_source(tmp_path / "rows" / "d.parquet")) == (0,)
    folder = image_folder(3)
    assert index_blocks(index_source(folder)) is None
    assert index_blocks(index_source(tar(tmp_path / "a.tar", images))) is None
    mixed = index_source([folder, tmp_path / "rows" / "a.parquet", tmp_path / "a.tar"])
    assert index_blocks(mixed) == (0, 1, 2, 3, 6, 9, *range(10, 17))


def random_blocks(images: int, largest: int) -> tuple[int, ...]:
    sizes = np.random.default_rng(0).integers(1, largest + 1, images)
    starts = np.concatenate([[0], sizes.cumsum()])
    return tuple(starts[starts < images].tolist())


@pytest.mark.parametrize(
    ("images", "blocks", "rows"),
    [
        (403, tuple(range(0, 403, 10)), 40),
        (403, random_blocks(403, 20), 50),
        (400, tuple(range(400)), 32),  # groups of one row
        (400, (0,), 16),  # one group, larger than what is shuffled together
        (400, (0, 1, 399), 16),
        (40, tuple(range(0, 40, 4)), 1000),
    ],
)
def test_an_epoch_with_row_groups_is_a_permutation(
    window: Callable[[int], None], twin: Recipe, images: int, blocks: tuple[int, ...], rows: int
) -> None:
    window(rows)
    steps = steps_per_epoch(twin, images)

    def epoch(recipe: Recipe, number: int) -> list[int]:
        data._epoch_order.cache_clear()
        return torch.cat([batch_rows(recipe, images, number * steps + at, blocks) for at in range(steps)]).tolist()

    first = epoch(twin, 0)
    assert len(set(first)) == len(first) == steps * 8
    assert min(first) >= 0
    assert max(first) < images
    assert first == epoch(twin, 0)
    assert first != epoch(twin, 1)
    assert first != epoch(dataclasses.replace(twin, seed=1), 0)
    assert sorted(data._epoch_order(0, 0, images, blocks).tolist()) == list(range(images))
    assert [batch_rows(twin, images, step, blocks).tolist() for step in (steps + 1, 1)] == [
        epoch(twin, 1)[8:16],
        first[8:16],
    ]


def test_the_rows_of_a_step_are_of_few_row_groups(window: Callable[[int], None], twin: Recipe) -> None:
    window(100)
    images, group = 5000, 10
    order = data._epoch_order(0, 0, images, tuple(range(0, images, group))).numpy()
    for at in range(0, images, 100):  # whole row groups from everywhere, in any order
        groups = Counter((order[at : at + 100] // group).tolist())
        assert set(groups.values()) == {group}
        assert max(groups) - min(groups) > 100
    assert (np.diff(order) == 1).mean() < 0.03

    def groups_of_steps(recipe: Recipe) -> list[int]:
        steps, blocks = steps_per_epoch(recipe, images), tuple(range(0, images, group))
        return [len((batch_rows(recipe, images, step, blocks) // group).unique()) for step in range(steps)]

    found = groups_of_steps(dataclasses.replace(twin, batch_size=80))
    assert max(found) <= 20  # those of two windows, where 80 rows from anywhere are of 74 groups
    assert np.mean(found) < 16


def test_a_row_group_larger_than_the_window_is_shuffled_whole(window: Callable[[int], None]) -> None:
    window(100)
    order = data._epoch_order(0, 0, 2000, (0, 1000)).numpy()
    halves = order.reshape(2, 1000) // 1000
    assert sorted([set(half) for half in halves.tolist()], key=sum) == [{0}, {1}]
    assert np.ptp(order[:100] % 1000) > 900


def test_no_row_group_is_read_twice_for_a_share_of_a_batch(
    window: Callable[[int], None], tmp_path: Path, twin: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    window(12)
    for name in "abc":
        parquet(tmp_path / "rows" / f"{name}.parquet", [jpeg(n) for n in range(20)], group=4)
    index = index_source(tmp_path / "rows")
    loads: Counter[tuple[str, int]] = Counter()
    load = parquet_file._Cells.load

    def counted(cells: Any, group: int) -> None:
        load(cells, group)
        loads[cells.uri, group] += 1

    monkeypatch.setattr(parquet_file._Cells, "load", counted)
    for step in range(7):
        for world in (1, 2):
            loads.clear()
            stream(index, twin, (step, step + 1), share=Share(0, world))
            assert set(loads.values()) == {1}
            assert len(loads) <= 6  # groups of two windows
    loads.clear()
    stream(index, twin, (0, 7))
    assert max(loads.values()) <= 3  # steps of eight rows that a window of 12 to 15 reaches into


def test_the_corpus_names_the_rows_it_takes(window: Callable[[int], None], tmp_path: Path, twin: Recipe) -> None:
    window(8)
    index = index_source(parquet(tmp_path / "a.parquet", [jpeg(n) for n in range(32)], group=4))
    plain = dataclasses.replace(twin, view_color=False)
    corpus = StreamedCorpus(index, 0, CPU)
    (seen,) = corpus.batches(plain, 2, 3)
    rows = corpus.index_rows(plain, 2).tolist()
    assert rows == batch_rows(plain, 32, 2, tuple(range(0, 32, 4))).tolist()
    assert (seen.patches - cut_with_pillow(index, plain, 2, rows)).abs().mean() < 1e-3


@pytest.mark.parametrize("cache", ["memory", "none"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_takes_for_ever_is_left_out(
    image_folder: Callable[..., Path], twin: Recipe, monkeypatch: pytest.MonkeyPatch, cache: str, workers: int
) -> None:
    folder, ends = image_folder(12), threading.Event()

    def slow(content: bytes, *how: Any) -> Any:
        if content == b"endless":
            while not ends.wait(0.01):
                pass
        return real(content, *how)

    (folder / "000.jpg").write_bytes(b"endless")
    name = "decode" if cache == "memory" else "decode_crop"
    real = getattr(data, name)
    monkeypatch.setattr(data, name, slow)
    monkeypatch.setattr(data, "IMAGE_SECONDS", 0.3)
    index = index_source(folder)
    if cache == "memory":
        refused = data.MemoryCorpus.load(index, 32).refused
    else:
        corpus = data.StreamedCorpus(index, workers, torch.device("cpu"))
        list(corpus.batches(dataclasses.replace(twin, batch_size=4), 0, 3))
        refused = corpus.refused
    ends.set()
    assert [(one.id, one.reason) for one in refused] == [("000.jpg", "timeout")]


def test_a_worker_that_dies_is_said(image_folder: Callable[..., Path], twin: Recipe, monkeypatch: Any) -> None:
    monkeypatch.setattr(data, "decode_crop", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    corpus = data.StreamedCorpus(index_source(image_folder(12)), 1, torch.device("cpu"))
    with pytest.raises(SourceError, match="a process that decodes images has died or hangs"):
        list(corpus.batches(dataclasses.replace(twin, batch_size=4), 0, 3))
