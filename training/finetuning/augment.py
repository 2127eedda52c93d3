"""Labelled images -> what a classifier is trained and tested on; every draw is a function of (seed, step, place) alone.

Shapes: B images a batch, b of this process's share of it, S side in pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from micl_zoo.errors import Refused, SourceError
from micl_zoo.images.decode import decode, decode_pixels
from micl_zoo.images.transform import Transform
from micl_zoo.sources.listing import Reader

from ..evaluation.labelled import LabelledImages
from ..pretraining.data import WHOLE, Share, batch_rows, index_blocks, open_loader, or_another
from ..recipes import FineTuneRecipe
from ..run.order import RefusedImage

PIECE = 32  # images that a worker prepares at a time: 19 MB of float32 pixels at 224 x 224


class Pictures(NamedTuple):
    """This process's share of a batch, augmented and normalised, on the device.

    Attributes:
        step: number of the batch.
        places: (b,), which of the whole batch they are; on the host.
        pixels: (b, 3, S, S) float32.
        labels: (b,) int64.
    """

    step: int
    places: Tensor
    pixels: Tensor
    labels: Tensor


class Resized(NamedTuple):
    """Some images of a test part, without those that cannot be decoded.

    Attributes:
        pixels: (n, S, S, 3) uint8, as the encoder's own transform has them before it normalises.
        labels: (n,) int64.
        refused: the others.
    """

    pixels: Tensor
    labels: Tensor
    refused: list[RefusedImage]


@contextmanager
def drawing(*parts: int) -> Iterator[None]:
    """Python's, numpy's and torch's global generators on the CPU depend on the parts alone; afterwards as before.

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
    """Places of a batch that one process takes: (B / world,), in order.

    They are mirrored about the middle of the batch: mixup pairs place i with B - 1 - i, so the pairs are the same ones
    in any number of processes.
    """
    front = share.of(torch.arange(batch_size // 2))
    return torch.cat([front, batch_size - 1 - front.flip(0)])


def make_augmentation(recipe: FineTuneRecipe, transform: Transform) -> Callable[[Image.Image], Tensor]:
    """From a whole RGB image to (3, S, S) float32: timm's crop, flip, automatic augmentation and erasing."""
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
    return made


@dataclass
class AugmentedCorpus:
    """The training part of a labelled set, read, decoded and augmented by worker processes.

    Attributes:
        images: the training part.
        transform: of the encoder, for size, filter, mean and deviation.
        workers: processes; 0 decodes in this one.
        device: where the batches go.
        refused: images met so far that could not be decoded; another image of the set took each one's place.
    """

    images: LabelledImages
    transform: Transform
    workers: int
    device: torch.device
    refused: list[RefusedImage] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images.index)

    def index_rows(self, recipe: FineTuneRecipe, step: int) -> Tensor:
        """Which images of the index a batch takes: (B,)."""
        return batch_rows(recipe, len(self), step, index_blocks(self.images.index))

    def batches(
        self, recipe: FineTuneRecipe, first_step: int, last_step: int, share: Share = WHOLE
    ) -> Iterator[Pictures]:
        """Batches number first_step to last_step - 1.

        Raises:
            SourceError: an image that cannot be decoded, and none of those tried in its place can be.
        """
        made, side = _Augmented(self.images, recipe, self.transform, share), self.transform.size
        numbers = range(first_step * made.pieces, last_step * made.pieces)
        loader, places = open_loader(made, numbers, self.workers, self.device), made.places
        for step, *pieces in zip(range(first_step, last_step), *[iter(loader)] * made.pieces, strict=True):
            pixels = torch.empty(len(places), 3, side, side, device=self.device)
            labels = torch.empty(len(places), dtype=torch.int64, device=self.device)
            for piece in pieces:
                if isinstance(piece, SourceError):
                    raise piece
                self.refused += [image for image in dict.fromkeys(piece.refused) if image not in self.refused]
                at = piece.at.to(self.device)
                pixels[at] = piece.pixels.to(self.device, non_blocking=True)
                labels[at] = piece.labels.to(self.device, non_blocking=True)
            yield Pictures(step, places, pixels, labels)


class _Piece(NamedTuple):
    """A part of this process's share: where in it, the pictures, their classes, and what could not be decoded."""

    at: Tensor
    pixels: Tensor
    labels: Tensor
    refused: list[RefusedImage]


class _Augmented(Dataset[_Piece | SourceError]):
    """Number of a piece, counted from step 0 on, -> its images. Each batch is as many pieces."""

    def __init__(self, images: LabelledImages, recipe: FineTuneRecipe, transform: Transform, share: Share) -> None:
        self.images, self.recipe, self.reader = images, recipe, Reader()
        self.augment = make_augmentation(recipe, transform)
        self.blocks = index_blocks(images.index)
        self.places = share_places(recipe.batch_size, share)
        self.pieces = math.ceil(len(self.places) / PIECE)

    def __getitem__(self, number: int) -> _Piece | SourceError:
        try:
            return self._piece(*divmod(number, self.pieces))
        except SourceError as error:  # as it is: what is raised in a worker arrives as the text of a traceback
            return error

    def _piece(self, step: int, piece: int) -> _Piece:
        count, refused = len(self.images.index), list[RefusedImage]()
        rows = batch_rows(self.recipe, count, step, self.blocks)[self.places]
        parts = rows.argsort().tensor_split(self.pieces)  # as they lie, so that few pieces read a row group
        found = []
        for at in parts[piece].tolist():
            where = (self.recipe.seed, step, int(self.places[at]))
            found.append(or_another(self._maker(where, refused), int(rows[at]), where, count, refused))
        pixels, labels = zip(*found, strict=True)
        return _Piece(parts[piece], torch.stack(pixels), torch.tensor(labels), refused)

    def _maker(
        self, where: tuple[int, int, int], refused: list[RefusedImage]
    ) -> Callable[[int], tuple[Tensor, int] | None]:
        """From a row to its picture for one place of a batch, and its class; None with a line in `refused`."""
        seed, step, place = where

        def make(row: int) -> tuple[Tensor, int] | None:
            entry = self.images.index[row]
            try:
                image = decode(self.reader.read(entry))
            except Refused as found:
                refused.append(RefusedImage(entry.id, found.reason, found.detail))
                return None
            with drawing(seed, 4, step, place):
                return self.augment(image), int(self.images.labels[row])

        return make


def resized_batches(
    images: LabelledImages, transform: Transform, share: Share, workers: int, device: torch.device
) -> Iterator[Resized]:
    """This process's part of a test set, in order, on the device; every image is in one part and in it once."""
    rows = torch.arange(len(images.index)).tensor_split(share.world)[share.rank]
    parts = rows.split(PIECE) if len(rows) else ()
    for piece in open_loader(_Resizing(images, transform, parts), range(len(parts)), workers, device):
        if isinstance(piece, SourceError):
            raise piece
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
                pixels.append(torch.from_numpy(decode_pixels(self.reader.read(entry), self.transform).copy()))
                labels.append(int(self.images.labels[row]))
            except Refused as found:
                refused.append(RefusedImage(entry.id, found.reason, found.detail))
            except SourceError as error:
                return error
        none = torch.empty(0, self.transform.size, self.transform.size, 3, dtype=torch.uint8)
        return Resized(torch.stack(pixels) if pixels else none, torch.tensor(labels, dtype=torch.int64), refused)
