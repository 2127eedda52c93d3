"""From an ImageIndex to training batches: the order and every random draw are pure functions of (seed, epoch or step).

Shapes: B images, S source size, C crop size, V views, K/V patches a view, P numbers a patch.
"""

from __future__ import annotations

import atexit
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from itertools import islice, pairwise
from multiprocessing.context import TimeoutError as TooLate
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from micl_zoo.encoders.device import default_workers
from micl_zoo.errors import Refused, SourceError
from micl_zoo.images.decode import decode, decode_crop
from micl_zoo.images.transform import Filter, statistics
from micl_zoo.sources.footer import read_footer
from micl_zoo.sources.index import ImageIndex
from micl_zoo.sources.reader import Reader

from ..micl import draw_views, gather_patches
from ..recipes import AnyRecipe, Recipe
from ..run.order import RefusedImage, seeded, steps_per_epoch

LINUX = sys.platform == "linux"
CROP_TRIES = 10  # as torchvision's RandomResizedCrop: after ten crops that do not fit, the whole image
CROP_DRAWS = 2 * CROP_TRIES + 2  # an area and an aspect ratio a try, and one place
IMAGE_SECONDS = 120  # for one image, at most, as in `extract`
PIECE_SECONDS = 3600  # for a piece, should an image hang where no clock reaches it
SUBSTITUTES = 20  # images that are tried in the place of one that cannot be decoded
PIECE = 256  # images that a worker cuts at a time, at most: 7.5 MB of the 38 patches of 768 numbers of an in1k recipe
WINDOW = 16_384  # rows of a parquet corpus, at least, that are shuffled together: of whole row groups from everywhere
T = TypeVar("T")
Blocks = tuple[int, ...] | None  # where the blocks of rows begin that are best read together; None: rows stand alone
Make = Callable[[bytes, int], tuple[Tensor, ...]]  # from an image file's bytes and its row to what is trained on


class Share(NamedTuple):
    """Which part of each batch this process takes: the rank-th of `world` equal parts, in order."""

    rank: int = 0
    world: int = 1

    def of(self, rows: Tensor) -> Tensor:
        """Take this process's rows: (B, ...) to (B / world, ...)."""
        size = len(rows) // self.world
        return rows[self.rank * size : (self.rank + 1) * size]


WHOLE = Share()


class Seen(NamedTuple):
    """What the network sees of this process's share of a batch."""

    step: int  # number of the batch
    patches: Tensor  # (B, V, K/V, P) float32, normalised
    views: Tensor  # (B, V, K/V), where in the crop's grid they are


class Draws(NamedTuple):
    """Every random number of one batch, drawn on the CPU so that each device sees the same."""

    crops: Tensor  # (B, CROP_DRAWS) uniform
    flips: Tensor  # (B,) bool
    noise: Tensor  # (B, N) uniform, orders the patches
    gain: Tensor  # (B, V, 3, 1), bias: (B, V, 3, 1), grey: (B, V, 1, 1) bool: the colour change of each view
    bias: Tensor
    grey: Tensor

    def share(self, share: Share) -> Draws:
        """Take those of one process."""
        return Draws(*(share.of(numbers) for numbers in self))

    def to(self, device: torch.device) -> Draws:
        """Move them to a device."""
        return Draws(*(numbers.to(device, non_blocking=True) for numbers in self))


def batch_rows(recipe: AnyRecipe, images: int, step: int, blocks: Blocks = None) -> Tensor:
    """List the rows of the corpus in batch number `step`: (B,).

    An epoch is one permutation; its incomplete last batch is left out.
    """
    epoch, at = divmod(step, steps_per_epoch(recipe, images))
    return _epoch_order(recipe.seed, epoch, images, blocks)[at * recipe.batch_size : (at + 1) * recipe.batch_size]


@lru_cache(maxsize=1)
def _epoch_order(seed: int, epoch: int, images: int, blocks: Blocks) -> Tensor:
    generator = seeded(seed, 0, epoch)
    order = torch.randperm(images, generator=generator)
    if blocks is None:
        return order
    sizes = torch.tensor((*blocks, images)).diff()
    shuffled = torch.randperm(len(sizes), generator=generator)
    window = torch.empty_like(sizes)  # of each block; whole blocks, so that none is read for two windows
    window[shuffled] = (sizes[shuffled].cumsum(0) - 1) // WINDOW
    return order[window.repeat_interleave(sizes)[order].argsort(stable=True)]


def index_blocks(index: ImageIndex) -> Blocks:
    """Find where the row groups of a parquet corpus begin; None for a corpus of files or byte ranges.

    A parquet row group can only be read whole, so a full permutation would read each of them once for every row in it.
    In a mixed corpus each file and each byte range is a block of its own.
    """
    cells = index.of_kind("parquet")
    if not cells.any():
        return None
    uris = index.table["uri"].combine_chunks().dictionary_encode()
    files, offsets = uris.indices.to_numpy(), index.table["offset"].to_numpy()
    groups = np.arange(len(index))  # no two alike
    for first, stop in pairwise([0, *_changes(files), len(index)]):
        if cells[first]:
            ends = np.cumsum([group.rows for group in read_footer(uris.dictionary[int(files[first])].as_py()).groups])
            groups[first:stop] = ends.searchsorted(offsets[first:stop], side="right")
    return (0, *np.union1d(_changes(files), _changes(groups)).tolist())


def _changes(values: np.ndarray) -> np.ndarray:
    """Places whose value is not that of the place before."""
    return np.flatnonzero(np.diff(values)) + 1


def draw(recipe: Recipe, step: int) -> Draws:
    """Draw the random numbers of batch number `step`."""
    generator, count = seeded(recipe.seed, 1, step), recipe.batch_size

    def spread(width: float) -> Tensor:  # uniform in [-width, width], per view and channel
        return (torch.rand(count, recipe.views, 3, 1, generator=generator) * 2 - 1) * width

    return Draws(
        crops=torch.rand(count, CROP_DRAWS, generator=generator),
        flips=torch.rand(count, generator=generator) < recipe.flip_probability,
        noise=torch.rand(count, recipe.num_patches, generator=generator),
        gain=1 + spread(recipe.color_gain),
        bias=spread(recipe.color_bias),
        grey=torch.rand(count, recipe.views, 1, 1, generator=generator) < recipe.grey_probability,
    )


def crop_boxes(draws: Tensor, aspect: Tensor, recipe: Recipe) -> Tensor:
    """Place RandomResizedCrop boxes for a batch: (B, 4) left, top, right, bottom as shares of each image's sides.

    `draws` are uniform, (B, CROP_DRAWS); `aspect` is the width / height of each image, (B,).
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


def resample(
    images: Tensor,  # (B, 3, S, S) uint8, whole images
    boxes: Tensor,  # (B, 4) float32, left, top, right, bottom in pixels of `images`
    flips: Tensor,  # (B,) bool
    size: int,
    filter_name: Filter,
) -> Tensor:
    """Cut, resize with antialiasing and flip a whole batch on its device: (B, 3, size, size) float32 in 0..255.

    The filter is separable, so a crop is two batched matrix products; the weights are those of Pillow's
    `Image.resize(…, box=…)`, without its rounding and clipping to uint8 between the passes.
    """
    left, top, right, bottom = boxes.unbind(1)
    down, across = images.shape[2:]
    columns = _filter_rows(left, right, across, size, filter_name)  # (B, size, S)
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    rows = _filter_rows(top, bottom, down, size, filter_name)
    return (rows[:, None] @ (images.float() @ columns.mT[:, None])).clamp_(0, 255)


def _filter_rows(start: Tensor, stop: Tensor, length: int, size: int, filter_name: str) -> Tensor:
    """Resampling weights along one axis: (B, size, length), each row summing to one."""
    scale = (stop - start)[:, None, None] / size
    centres = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale  # (B, size, 1)
    pixels = torch.arange(length, device=start.device) + 0.5
    distance = ((pixels - centres) / scale.clamp(min=1)).abs()  # wider than a pixel when shrinking: antialiasing
    if filter_name == "bilinear":
        weights = (1 - distance).clamp(min=0)
    else:
        near = (1.5 * distance - 2.5) * distance * distance + 1  # the cubic of a = -0.5
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    return weights / weights.sum(-1, keepdim=True)


def visible_patches(images: Tensor, boxes: Tensor, draws: Draws, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Cut the patches and views of `Seen` out of whole images (B, 3, S, S) uint8, on their device, see `resample`."""
    draws = draws.to(images.device)
    pixels = resample(images, boxes, draws.flips, recipe.crop_size, recipe.interpolation)
    views = draw_views(draws.noise, recipe.mask_ratio, recipe.views)
    return normalise(gather_patches(pixels, views, recipe.patch_size), draws, recipe), views


def normalise(patches: Tensor, draws: Draws, recipe: Recipe) -> Tensor:
    """Normalise patches (B, V, K/V, P) of pixels in 0..255, each view with its own colour change."""
    colors = patches.unflatten(3, (3, -1))
    mean, std = (one[:, None] * 255 for one in statistics(recipe.pixel_mean, recipe.pixel_std, patches.device))
    patches = ((colors - mean) / std).flatten(3)
    return change_color(patches, draws) if recipe.view_color else patches


def change_color(patches: Tensor, draws: Draws) -> Tensor:
    """Apply a random gain, bias and greyscale per view: patches (B, V, K/V, P), the same shape back."""
    colors = patches.unflatten(3, (3, -1))  # (B, V, K/V, 3, p * p)
    luma = torch.tensor([0.299, 0.587, 0.114], device=patches.device)[:, None]
    grey = (colors * luma).sum(3, keepdim=True)
    colors = torch.where(draws.grey[:, :, :, :, None], grey, colors)
    return (colors * draws.gain[:, :, None] + draws.bias[:, :, None]).flatten(3)


def made_up_patches(recipe: Recipe, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make random patches (B, V, K/V, P) uint8 on the host, pinned for a GPU, and places (B, V, K/V) on the device."""
    shape = (recipe.batch_size, recipe.views, recipe.kept // recipe.views, recipe.patch_numbers)
    pixels = torch.randint(256, shape, dtype=torch.uint8)
    views = draw_views(torch.rand(recipe.batch_size, recipe.num_patches), recipe.mask_ratio, recipe.views)
    return (pixels.pin_memory() if device.type == "cuda" else pixels), views.to(device)


@dataclass
class MemoryCorpus:
    """A small corpus decoded once into memory, on the host or the device: crops are cut out of it batch by batch."""

    # (M, 3, S, S) uint8; an image that is not square is squeezed to S x S and remembers its aspect ratio
    images: Tensor
    aspect: Tensor  # (M,) width / height before squeezing
    rows: Tensor  # (M,) where in the index they were
    refused: list[RefusedImage]  # the images left out

    def __len__(self) -> int:
        return len(self.images)

    def index_rows(self, recipe: Recipe, step: int) -> Tensor:
        """Look up which images of the index a batch takes: (B,)."""
        return self.rows[batch_rows(recipe, len(self), step)]

    def batches(self, recipe: Recipe, first_step: int, last_step: int, share: Share = WHOLE) -> Iterator[Seen]:
        """Yield the batches number first_step to last_step - 1, on the device of the images."""
        device = self.images.device
        for step in range(first_step, last_step):
            draws, rows = draw(recipe, step).share(share), share.of(batch_rows(recipe, len(self), step))
            boxes = crop_boxes(draws.crops, self.aspect[rows], recipe) * recipe.source_size
            yield Seen(step, *visible_patches(self.images[rows.to(device)], boxes.to(device), draws, recipe))

    @classmethod
    def load(cls, index: ImageIndex, source_size: int, *, tick: Callable[[], None] = lambda: None) -> MemoryCorpus:
        """Decode a whole index. `tick` is called once per image."""
        images = torch.empty(len(index), 3, source_size, source_size, dtype=torch.uint8)
        aspect, reader, entries = torch.ones(len(index)), Reader(), enumerate(index.entries())
        rows, refused = list[int](), list[RefusedImage]()
        # Pillow decodes outside the interpreter lock. This pool does not wait at its end for a picture that hangs.
        with ThreadPool() as pool:
            while chunk := list(islice(entries, 4096)):
                data = [_or_refused(reader.read, entry) for _, entry in chunk]
                squeezed = [pool.apply_async(_or_refused, (_squeeze, source_size, one)) for one in data]
                for (row, entry), coming in zip(chunk, squeezed, strict=True):
                    found = _or_refused(_in_time, coming)
                    tick()
                    if isinstance(found, Refused):
                        refused.append(RefusedImage(entry.id, found.reason, found.detail))
                    else:
                        images[len(rows)], aspect[len(rows)] = torch.from_numpy(found[0]), found[1]
                        rows.append(row)
        return cls(images[: len(rows)], aspect[: len(rows)], torch.tensor(rows, dtype=torch.int64), refused)


def _or_refused(make: Callable[..., T], *given: Any) -> T | Refused:
    try:
        return make(*given)
    except Refused as refused:
        return refused


def _in_time(coming: AsyncResult[T]) -> T:
    try:
        return coming.get(IMAGE_SECONDS)
    except TooLate:
        raise Refused("timeout", f"it took longer than {IMAGE_SECONDS} s") from None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Refused in what takes longer; in a main thread, where the system has such a clock."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise Refused("timeout", f"it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # and every second again, should somebody catch it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _squeeze(size: int, data: bytes | Refused) -> tuple[np.ndarray, float]:
    if isinstance(data, Refused):
        raise data
    image = decode(data)
    aspect = image.width / image.height
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(image).transpose(2, 0, 1), aspect


@dataclass
class Streamed:
    """Images that worker processes read and prepare while the training goes on."""

    index: ImageIndex  # the images
    workers: int  # number of processes; 0 decodes in this one
    device: torch.device  # where the batches go
    # images met so far that could not be decoded; another image of the index took each one's place
    refused: list[RefusedImage] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.index)

    def index_rows(self, recipe: AnyRecipe, step: int) -> Tensor:
        """Look up which images of the index a batch takes: (B,)."""
        return batch_rows(recipe, len(self), step, index_blocks(self.index))

    def shares(self, pieces: Pieces, first_step: int, last_step: int) -> Iterator[tuple[int, list[Tensor]]]:
        """Put the shares of the batches number first_step to last_step - 1 together, on the device."""
        numbers = range(first_step * pieces.count, last_step * pieces.count)
        loader = open_loader(pieces, numbers, self.workers, self.device)
        for step, *found in zip(range(first_step, last_step), *[loader] * pieces.count, strict=True):
            whole: list[Tensor] = []
            for piece in found:
                self.refused += [image for image in dict.fromkeys(piece.refused) if image not in self.refused]
                for number, part in enumerate(piece.tensors):
                    if number == len(whole):
                        shape = (len(pieces.places), *part.shape[1:])
                        whole.append(torch.empty(shape, dtype=part.dtype, device=self.device))
                    whole[number][piece.at.to(self.device)] = part.to(self.device, non_blocking=True)
            yield step, whole


class StreamedCorpus(Streamed):
    """A large corpus: worker processes read, decode and cut each image; only its visible patches arrive, as uint8."""

    def batches(self, recipe: Recipe, first_step: int, last_step: int, share: Share = WHOLE) -> Iterator[Seen]:
        """Yield the batches number first_step to last_step - 1, see `shares`."""
        for step, (pixels,) in self.shares(_Crops(self.index, recipe, share), first_step, last_step):
            draws = draw(recipe, step).share(share).to(self.device)
            views = draw_views(draws.noise, recipe.mask_ratio, recipe.views)  # (B, V, K/V)
            yield Seen(step, normalise(pixels, draws, recipe), views)


Corpus = MemoryCorpus | StreamedCorpus


def open_loader(
    pieces: Dataset[T | SourceError], numbers: Sequence[int], workers: int, device: torch.device
) -> Iterator[T]:
    """Load what `pieces` has under each of the numbers, in order, by `workers` processes or, with 0, by this one.

    Pieces return a SourceError rather than to raise it: what is raised in a worker arrives as a traceback's text.
    """
    if not LINUX:  # workers start as `python -c`, which would look for modules in the current folder
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    loader: DataLoader[T | SourceError] = DataLoader(
        pieces,
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        timeout=PIECE_SECONDS if workers else 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=partial(settle_worker, lifeline(os.getpid())),
        multiprocessing_context="fork" if workers and LINUX else None,  # shares the index, starts at once
    )
    return _loaded(loader)


def _loaded(loader: Iterable[T | SourceError]) -> Iterator[T]:
    """Yield pieces, raise what they are in the place of one, and say what torch means by a RuntimeError."""
    try:
        for piece in loader:
            if isinstance(piece, SourceError):
                raise piece
            yield piece
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise SourceError(
            f"a process that decodes images has died or hangs ({str(error).splitlines()[0]}): the same command goes on "
            "from the last checkpoint; --workers 0 shows whether an image does it"
        ) from None


def loader_workers(workers: int | None) -> int:
    """Count the processes that decode for this rank: as asked, or the machine's cores shared among its ranks."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, default_workers() // here) if workers is None else workers


class Piece(NamedTuple):
    """Some images of this process's share of a batch."""

    at: Tensor  # (b,), where in the share they belong
    tensors: list[Tensor]  # what is made of them, (b, ...) each.
    refused: list[RefusedImage]  # images met that could not be decoded


class Pieces(Dataset[Piece | SourceError]):
    """From the number of a piece, counted from step 0 on, to its images. Each batch has as many pieces."""

    def __init__(self, index: ImageIndex, recipe: AnyRecipe, places: Tensor, size: int) -> None:
        self.index, self.recipe, self.reader, self.blocks = index, recipe, Reader(), index_blocks(index)
        self.places = places  # (b,), which places of a whole batch are this process's share
        self.count = math.ceil(len(places) / size)  # pieces of a share

    def __getitem__(self, number: int) -> Piece | SourceError:
        (step, piece), refused, made = divmod(number, self.count), list[RefusedImage](), []
        try:
            rows = batch_rows(self.recipe, len(self.index), step, self.blocks)[self.places]
            at = rows.argsort().tensor_split(self.count)[piece]  # as they lie, so that few pieces read a row group
            places = self.places[at]
            for make, place, row in zip(self.makers(step, places), places.tolist(), rows[at].tolist(), strict=True):
                made.append(self._made(make, row, (step, place), refused))
        except SourceError as error:  # as it is, see `open_loader`
            return error
        return Piece(at, [torch.stack(parts) for parts in zip(*made, strict=True)], refused)

    def _made(self, make: Make, row: int, where: tuple[int, int], refused: list[RefusedImage]) -> tuple[Tensor, ...]:
        """Make tensors of the image in a row, or of another image where that one cannot be decoded.

        Step and place in the whole batch say what the others are: the same ones in any share.
        """

        def rows() -> Iterator[int]:
            yield row
            generator = seeded(self.recipe.seed, 3, *where)
            yield from torch.randint(len(self.index), (SUBSTITUTES,), generator=generator).tolist()

        for tried in rows():
            entry = self.index[tried]
            try:
                with time_limit(IMAGE_SECONDS):
                    return make(self.reader.read(entry), tried)
            except Refused as found:
                refused.append(RefusedImage(entry.id, found.reason, found.detail))
        damaged = refused[-1 - SUBSTITUTES]
        raise SourceError(
            f"{damaged.id!r} cannot be trained on ({damaged.reason}: {damaged.detail}), and neither can any of "
            f"{SUBSTITUTES} images tried in its place: look whether the corpus is still there, and whole"
        )

    def makers(self, step: int, places: Tensor) -> Iterable[Make]:
        """Yield, for each place of a batch, what makes tensors of its image."""
        raise NotImplementedError


class _Crops(Pieces):
    """Visible patches (V, K/V, P) uint8 of each image."""

    recipe: Recipe

    def __init__(self, index: ImageIndex, recipe: Recipe, share: Share) -> None:
        super().__init__(index, recipe, share.of(torch.arange(recipe.batch_size)), PIECE)

    def makers(self, step: int, places: Tensor) -> Iterator[Make]:
        draws = Draws(*(numbers[places] for numbers in draw(self.recipe, step)))
        views = draw_views(draws.noise, self.recipe.mask_ratio, self.recipe.views)  # (b, V, K/V)
        for crops, flip, seen in zip(draws.crops, draws.flips, views.numpy(), strict=True):
            yield partial(self._patches, crops, bool(flip), seen)

    def _patches(self, draws: Tensor, flip: bool, views: np.ndarray, data: bytes, _: int) -> tuple[Tensor, ...]:
        def box(width: int, height: int) -> Sequence[float]:
            return crop_boxes(draws[None], torch.tensor([width / height]), self.recipe)[0].tolist()

        size = (self.recipe.crop_size, self.recipe.crop_size)
        crop = decode_crop(data, box, size, self.recipe.interpolation)  # (C, C, 3)
        crop, side, grid = crop[:, ::-1] if flip else crop, self.recipe.patch_size, self.recipe.grid
        patches = crop.reshape(grid, side, grid, side, 3).transpose(0, 2, 4, 1, 3)  # (down, across, 3, p, p)
        return (torch.from_numpy(patches[views // grid, views % grid].reshape(*views.shape, -1)),)


@cache
def lifeline(parent: int) -> tuple[int, int]:
    """Open a pipe that closes when this process, `parent`, ends in any way; each process has one of its own."""
    reading, writing = os.pipe()
    atexit.register(os.close, writing)  # before multiprocessing waits for its children
    return reading, writing


def settle_worker(pipe: tuple[int, int], _: int) -> None:
    """Leave signals to the parent and end with it; Pillow's complaints about odd files are for the ledger.

    A scheduler's SIGTERM reaches all processes, and a worker that ended would take the run with it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")
    if LINUX:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.close(pipe[1])
        threading.Thread(target=_end_with, args=(pipe[0],), daemon=True).start()


def _end_with(reading: int) -> None:
    os.read(reading, 1)  # nothing is ever written
    os._exit(0)
