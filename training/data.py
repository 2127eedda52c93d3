"""ImageIndex -> training batches: the order and every random draw are pure functions of (seed, epoch or step).

Shapes: B images, S source size, C crop size, V = 2 views, K/2 patches a view, P numbers a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from micl_zoo.decode import Refused, decode
from micl_zoo.errors import SourceError
from micl_zoo.sources import Entry, ImageIndex, Reader

from .micl import draw_views, gather_patches
from .recipes import Recipe

CROP_TRIES = 10  # as torchvision's RandomResizedCrop: after ten crops that do not fit, the whole image
CROP_DRAWS = 2 * CROP_TRIES + 2  # an area and an aspect ratio a try, and one place


class Batch(NamedTuple):
    """Source pixels and what to cut out of them.

    Attributes:
        images: (B, 3, S, S) uint8; whole images, or crops already cut by a worker.
        boxes: (B, 4) float32, left, top, right, bottom in pixels of `images`.
    """

    images: Tensor
    boxes: Tensor


class Draws(NamedTuple):
    """Every random number of one batch, drawn on the CPU so that each device sees the same.

    Attributes:
        crops: (B, CROP_DRAWS) uniform.
        flips: (B,) bool.
        noise: (B, N) uniform, orders the patches.
        gain: (B, 2, 3, 1), bias: (B, 2, 3, 1), grey: (B, 2, 1, 1) bool: the colour change of each view.
    """

    crops: Tensor
    flips: Tensor
    noise: Tensor
    gain: Tensor
    bias: Tensor
    grey: Tensor


class RefusedImage(NamedTuple):
    """An image of the corpus that cannot be trained on, and why."""

    id: str
    reason: str
    detail: str


def seeded(*parts: int) -> torch.Generator:
    """A CPU generator whose stream depends on all the parts and nothing else."""
    state = np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def steps_per_epoch(recipe: Recipe, images: int) -> int:
    """Whole batches in a corpus.

    Raises:
        SourceError: a corpus smaller than one batch.
    """
    if images < recipe.batch_size:
        raise SourceError(
            f"the corpus has {images} usable images and a batch of {recipe.name} takes {recipe.batch_size}: "
            f"give more images, or a smaller batch with --set batch_size={images}"
        )
    return images // recipe.batch_size


def batch_rows(recipe: Recipe, images: int, step: int) -> Tensor:
    """Rows of the corpus in batch number `step`: (B,).

    An epoch is one permutation; its incomplete last batch is left out.
    """
    epoch, at = divmod(step, steps_per_epoch(recipe, images))
    return _epoch_order(recipe.seed, epoch, images)[at * recipe.batch_size : (at + 1) * recipe.batch_size]


@lru_cache(maxsize=1)
def _epoch_order(seed: int, epoch: int, images: int) -> Tensor:
    return torch.randperm(images, generator=seeded(seed, 0, epoch))


def draw(recipe: Recipe, step: int) -> Draws:
    """The random numbers of batch number `step`."""
    generator, count = seeded(recipe.seed, 1, step), recipe.batch_size

    def spread(width: float) -> Tensor:  # uniform in [-width, width], per view and channel
        return (torch.rand(count, 2, 3, 1, generator=generator) * 2 - 1) * width

    return Draws(
        crops=torch.rand(count, CROP_DRAWS, generator=generator),
        flips=torch.rand(count, generator=generator) < recipe.flip_probability,
        noise=torch.rand(count, recipe.num_patches, generator=generator),
        gain=1 + spread(recipe.color_gain),
        bias=spread(recipe.color_bias),
        grey=torch.rand(count, 2, 1, 1, generator=generator) < recipe.grey_probability,
    )


def crop_boxes(draws: Tensor, aspect: Tensor, recipe: Recipe) -> Tensor:
    """RandomResizedCrop boxes for a batch, as shares of each image's sides.

    Args:
        draws: (B, CROP_DRAWS) uniform.
        aspect: (B,) width / height of the images.
        recipe: for the range of areas and of aspect ratios.

    Returns:
        (B, 4) left, top, right, bottom in [0, 1].
    """
    area_draw, ratio_draw = draws[:, :CROP_TRIES], draws[:, CROP_TRIES : 2 * CROP_TRIES]
    area = recipe.crop_scale_min + area_draw * (recipe.crop_scale_max - recipe.crop_scale_min)  # (B, tries)
    log_min, log_max = np.log(recipe.crop_ratio_min), np.log(recipe.crop_ratio_max)
    ratio = torch.exp(log_min + ratio_draw * (log_max - log_min)) / aspect[:, None]  # in units of the image's own sides
    size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=-1)  # (B, tries, 2) width, height
    fits = (size <= 1).all(-1)
    first = fits.int().argmax(1)  # the first that fits
    size = size[torch.arange(len(size)), first]
    size = torch.where(fits.any(1)[:, None], size, torch.ones(()))  # (B, 2)
    corner = draws[:, -2:] * (1 - size)
    return torch.cat([corner, corner + size], dim=1)


def resample(batch: Batch, flips: Tensor, size: int, filter_name: Literal["bicubic", "bilinear"]) -> Tensor:
    """Cut, resize with antialiasing and flip a whole batch on its device: (B, 3, size, size) float32 in 0..255.

    The filter is separable, so a crop is two batched matrix products; the weights are those of Pillow's
    `Image.resize(…, box=…)`, without its rounding and clipping to uint8 between the passes.
    """
    left, top, right, bottom = batch.boxes.unbind(1)
    down, across = batch.images.shape[2:]
    columns = _filter_rows(left, right, across, size, filter_name)  # (B, size, S)
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    rows = _filter_rows(top, bottom, down, size, filter_name)
    pixels = batch.images.float()
    return (rows[:, None] @ (pixels @ columns.mT[:, None])).clamp_(0, 255)


def _filter_rows(start: Tensor, stop: Tensor, length: int, size: int, filter_name: str) -> Tensor:
    """Resampling weights along one axis: (B, size, length), each row summing to one."""
    scale = (stop - start)[:, None, None] / size
    centres = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale  # (B, size, 1)
    pixels = torch.arange(length, device=start.device) + 0.5
    distance = ((pixels - centres) / scale.clamp(min=1)).abs()  # wider than a pixel when shrinking: antialiasing
    weights = _cubic(distance) if filter_name == "bicubic" else (1 - distance).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


def _cubic(distance: Tensor) -> Tensor:
    near = (1.5 * distance - 2.5) * distance * distance + 1  # the cubic of a = -0.5
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def visible_patches(batch: Batch, draws: Draws, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """From source pixels to what the network sees, on the device of the batch.

    Returns:
        patches (B, 2, K/2, P) float32, cropped, flipped, normalised, each view with its own colour change; and
        views (B, 2, K/2), where in the crop's grid they are.
    """
    device = batch.images.device
    draws = Draws(*(numbers.to(device, non_blocking=True) for numbers in draws))
    pixels = resample(batch, draws.flips, recipe.crop_size, recipe.interpolation)
    mean, std = (torch.tensor(v, device=device)[:, None, None] * 255 for v in (recipe.pixel_mean, recipe.pixel_std))
    views = draw_views(draws.noise, recipe.mask_ratio)
    patches = gather_patches((pixels - mean) / std, views, recipe.patch_size)
    return (change_color(patches, draws) if recipe.view_color else patches), views


def change_color(patches: Tensor, draws: Draws) -> Tensor:
    """A random gain, bias and greyscale per view: patches (B, 2, K/2, P), the same shape back."""
    colors = patches.unflatten(3, (3, -1))  # (B, 2, K/2, 3, p * p)
    luma = torch.tensor([0.299, 0.587, 0.114], device=patches.device)[:, None]
    grey = (colors * luma).sum(3, keepdim=True)
    colors = torch.where(draws.grey[:, :, :, :, None], grey, colors)
    return (colors * draws.gain[:, :, None] + draws.bias[:, :, None]).flatten(3)


@dataclass
class MemoryCorpus:
    """A small corpus decoded once into memory, on the host or the device: crops are cut out of it batch by batch.

    Attributes:
        images: (M, 3, S, S) uint8; an image that is not square is squeezed to S x S and remembers its aspect ratio.
        aspect: (M,) width / height before squeezing.
        refused: the images left out.
    """

    images: Tensor
    aspect: Tensor
    refused: list[RefusedImage]

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, recipe: Recipe, first_step: int, last_step: int) -> Iterator[tuple[int, Batch, Draws]]:
        """Batches number first_step to last_step - 1."""
        for step in range(first_step, last_step):
            draws, rows = draw(recipe, step), batch_rows(recipe, len(self), step)
            boxes = crop_boxes(draws.crops, self.aspect[rows], recipe) * recipe.source_size
            device = self.images.device
            yield step, Batch(self.images[rows.to(device)], boxes.to(device)), draws

    @classmethod
    def load(cls, index: ImageIndex, source_size: int, *, tick: Callable[[], None] = lambda: None) -> MemoryCorpus:
        """Decode a whole index. `tick` is called once an image."""
        images = torch.empty(len(index), 3, source_size, source_size, dtype=torch.uint8)
        aspect, refused, kept, reader = torch.ones(len(index)), [], 0, Reader()
        entries = index.entries()
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
            while chunk := list(islice(entries, 4096)):
                data = [_read(reader, entry) for entry in chunk]
                for entry, found in zip(chunk, pool.map(lambda d: _squeeze(d, source_size), data), strict=True):
                    tick()
                    if isinstance(found, Refused):
                        refused.append(RefusedImage(entry.id, found.reason, found.detail))
                        continue
                    images[kept], aspect[kept] = torch.from_numpy(found[0]), found[1]
                    kept += 1
        return cls(images[:kept], aspect[:kept], refused)


@dataclass
class StreamedCorpus:
    """A large corpus: worker processes read, decode and cut each crop; a crop arrives as uint8.

    Attributes:
        index: the images.
        workers: processes; 0 decodes in this one.
        refused: images met so far that could not be decoded; each gave its place to a copy of another of its batch.
    """

    index: ImageIndex
    workers: int
    refused: list[RefusedImage]

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, recipe: Recipe, first_step: int, last_step: int) -> Iterator[tuple[int, Batch, Draws]]:
        """Batches number first_step to last_step - 1."""
        plan = _StepList(recipe, len(self), first_step, last_step)
        loader = DataLoader(
            _Crops(self.index, recipe), batch_sampler=plan, num_workers=self.workers, collate_fn=list, pin_memory=False
        )
        for step, samples in zip(range(first_step, last_step), loader, strict=True):
            self.refused += [s for s in samples if isinstance(s, RefusedImage) and s not in self.refused]
            crops = [s for s in samples if not isinstance(s, RefusedImage)]
            if len(crops) < 2:
                raise SourceError(
                    f"batch {step} has {len(crops)} readable images of {len(samples)}: {self.refused[-1]}"
                )
            filled = crops + [crops[i % len(crops)] for i in range(len(samples) - len(crops))]
            images = torch.from_numpy(np.stack(filled))
            box = torch.tensor([0.0, 0.0, images.shape[3], images.shape[2]])
            yield step, Batch(images, box.expand(len(images), 4)), draw(recipe, step)


Corpus = MemoryCorpus | StreamedCorpus


class _StepList:
    """Batch sampler: for each step, its rows, each with the draws that place its crop."""

    def __init__(self, recipe: Recipe, images: int, first: int, last: int) -> None:
        self.recipe, self.images, self.first, self.last = recipe, images, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, Tensor]]]:
        for step in range(self.first, self.last):
            rows = batch_rows(self.recipe, self.images, step).tolist()
            yield list(zip(rows, draw(self.recipe, step).crops, strict=True))


class _Crops(Dataset[object]):
    def __init__(self, index: ImageIndex, recipe: Recipe) -> None:
        self.index, self.recipe, self.reader = index, recipe, Reader()

    def __getitem__(self, sample: tuple[int, Tensor]) -> np.ndarray | RefusedImage:
        row, draws = sample
        entry = self.index[row]
        try:
            image = decode(self.reader.read(entry))
        except Refused as refused:
            return RefusedImage(entry.id, refused.reason, refused.detail)
        shares = crop_boxes(draws[None], torch.tensor([image.width / image.height]), self.recipe)[0].tolist()
        sides = (image.width, image.height) * 2
        box = tuple(share * side for share, side in zip(shares, sides, strict=True))
        resampling = Image.Resampling[self.recipe.interpolation.upper()]
        size = (self.recipe.crop_size, self.recipe.crop_size)
        return np.array(image.resize(size, resampling, box=box)).transpose(2, 0, 1)


def _read(reader: Reader, entry: Entry) -> bytes | Refused:
    try:
        return reader.read(entry)
    except Refused as refused:
        return refused


def _squeeze(data: bytes | Refused, size: int) -> tuple[np.ndarray, float] | Refused:
    if isinstance(data, Refused):
        return data
    try:
        image = decode(data)
    except Refused as refused:
        return refused
    aspect = image.width / image.height
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(image).transpose(2, 0, 1), aspect
