"""From labelled images to what a classifier is trained and tested on; draws are functions of (seed, step, place) alone.

Shapes: B images a batch, b of this process's share of it, S side in pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from micl_zoo.errors import Refused, SourceError, UsageError
from micl_zoo.images.decode import decode, decode_pixels
from micl_zoo.images.transform import Transform
from micl_zoo.sources.reader import Reader

from ..evaluation.labelled import LabelledImages
from ..pretraining.data import IMAGE_SECONDS, WHOLE, Pieces, Share, Streamed, open_loader, time_limit
from ..recipes import FineTuneRecipe
from ..run.order import RefusedImage

PIECE = 32  # images that a worker prepares at a time: 19 MB of float32 pixels at 224 x 224


class Pictures(NamedTuple):
    """This process's share of a batch, augmented and normalised, on the device."""

    step: int  # number of the batch
    places: Tensor  # (b,), which of the whole batch they are; on the host
    pixels: Tensor  # (b, 3, S, S) float32
    labels: Tensor  # (b,) int64


class Resized(NamedTuple):
    """Some images of a test part, without those that cannot be decoded."""

    pixels: Tensor  # (n, S, S, 3) uint8, as the encoder's own transform has them before it normalises
    labels: Tensor  # (n,) int64
    refused: list[RefusedImage]  # the others


@contextmanager
def drawing(*parts: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch on the CPU by the parts alone; afterwards as before.

    They are what timm's augmentations and its mixup draw from.
    """
    words = [int(word) for word in np.random.SeedSequence(parts).generate_state(3)]
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - what timm draws from
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(words[0])
            np.random.seed(words[1])  # noqa: NPY002
            torch.default_generator.manual_seed(words[2])
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


def share_places(batch_size: int, share: Share) -> Tensor:
    """List the places of a batch that one process takes: (B / world,), in order.

    They are mirrored about the middle of the batch: mixup pairs place i with B - 1 - i, so the pairs are the same ones
    in any number of processes.
    """
    front = share.of(torch.arange(batch_size // 2))
    return torch.cat([front, batch_size - 1 - front.flip(0)])


class AugmentedCorpus(Streamed):
    """The training part of a labelled set, read, decoded and augmented by worker processes."""

    def __init__(self, images: LabelledImages, transform: Transform, workers: int, device: torch.device) -> None:
        super().__init__(images.index, workers, device)
        self.images, self.transform = images, transform

    def batches(
        self, recipe: FineTuneRecipe, first_step: int, last_step: int, share: Share = WHOLE
    ) -> Iterator[Pictures]:
        """Yield the batches number first_step to last_step - 1, see `shares`."""
        pieces = _Augmented(self.images, recipe, self.transform, share)
        for step, (pixels, labels) in self.shares(pieces, first_step, last_step):
            yield Pictures(step, pieces.places, pixels, labels)


class _Augmented(Pieces):
    """Augmented pixels (3, S, S) and the class () of each image."""

    def __init__(self, images: LabelledImages, recipe: FineTuneRecipe, transform: Transform, share: Share) -> None:
        super().__init__(images.index, recipe, share_places(recipe.batch_size, share), PIECE)
        self.labels = images.labels
        # whole RGB image -> (3, S, S) float32: timm's crop, flip, automatic augmentation and erasing
        self.augment = _augmentation(recipe, transform)

    def makers(self, step: int, places: Tensor) -> Iterator[Callable[[bytes, int], tuple[Tensor, ...]]]:
        """Draw by the place in the batch."""
        return (partial(self._picture, step, place) for place in places.tolist())

    def _picture(self, step: int, place: int, data: bytes, row: int) -> tuple[Tensor, ...]:
        image = decode(data)
        with drawing(self.recipe.seed, 4, step, place):
            return self.augment(image), torch.tensor(int(self.labels[row]))


def _augmentation(recipe: FineTuneRecipe, transform: Transform) -> Callable[[Image.Image], Tensor]:
    """Make timm's crop, flip, automatic augmentation and erasing: whole RGB image -> (3, S, S) float32."""
    try:
        made: Callable[[Image.Image], Tensor] = create_transform(
            input_size=transform.size,
            is_training=True,
            scale=(recipe.crop_scale_min, recipe.crop_scale_max),
            ratio=(recipe.crop_ratio_min, recipe.crop_ratio_max),
            hflip=recipe.flip_probability,
            color_jitter=None,
            auto_augment=recipe.augment or None,
            interpolation=transform.interpolation,
            mean=transform.mean,
            std=transform.std,
            re_prob=recipe.erase_probability,
            re_mode="pixel",  # MAE's: noise of the normalised pixels' own deviation
        )
    except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:  # timm parses the name as it goes
        raise UsageError(
            f"augment={recipe.augment}: timm knows no such augmentation ({error}): try rand-m9-mstd0.5-inc1, or none"
        ) from None
    return made


def resized_batches(
    images: LabelledImages, transform: Transform, share: Share, workers: int, device: torch.device
) -> Iterator[Resized]:
    """Yield this process's part of a test set, in order, on the device; every image is in one part, once."""
    rows = torch.arange(len(images.index)).tensor_split(share.world)[share.rank]
    parts = rows.split(PIECE) if len(rows) else ()
    for piece in open_loader(_Resizing(images, transform, parts), range(len(parts)), workers, device):
        yield piece._replace(pixels=piece.pixels.to(device), labels=piece.labels.to(device))


class _Resizing(Dataset[Resized | SourceError]):
    """Number of a part -> its images by the encoder's own transform."""

    def __init__(self, images: LabelledImages, transform: Transform, parts: tuple[Tensor, ...]) -> None:
        self.images, self.transform, self.parts, self.reader = images, transform, parts, Reader()

    def __getitem__(self, number: int) -> Resized | SourceError:
        pixels, labels, refused = list[Tensor](), list[int](), list[RefusedImage]()
        for row in self.parts[number].tolist():
            entry = self.images.index[row]
            try:
                with time_limit(IMAGE_SECONDS):
                    pixels.append(torch.from_numpy(decode_pixels(self.reader.read(entry), self.transform).copy()))
                labels.append(int(self.images.labels[row]))
            except Refused as found:
                refused.append(RefusedImage(entry.id, found.reason, found.detail))
            except SourceError as error:
                return error
        none = torch.empty(0, *self.transform.size, 3, dtype=torch.uint8)
        return Resized(torch.stack(pixels) if pixels else none, torch.tensor(labels, dtype=torch.int64), refused)
