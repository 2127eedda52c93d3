"""Which process takes which images, and how many steps an epoch has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from micl_zoo.errors import SourceError, UsageError

from ..recipes import AnyRecipe, Recipe

if TYPE_CHECKING:
    import torch


def images_per_process(recipe: Recipe, world: int) -> int:
    """Count the images of one optimiser step that each of `world` processes takes."""
    batch, size, local = recipe.batch_size, recipe.contrast_size, recipe.negatives == "local"
    parts = batch // size if local else batch
    if parts % world == 0:
        return batch // world
    counts = _divisors(parts)
    near = [n for n in counts if n < world][-3:] + [n for n in counts if n > world][:1]
    ways = [f"use {_either(near)} GPU{'s' * (near != [1])}"]
    group = max(n for n in _divisors(batch // world or 1) if n <= size)
    if local and batch % world == 0 and group >= 2:
        ways.append(f"--set contrast_batch={group} (another setting of the method)")
    if local and batch % world == 0:
        ways.append("--set negatives=global (another one, too)")
    else:
        unit = world * (size if local else 1)
        change = f"--set batch_size={max(1, round(batch / unit)) * unit}"
        change += f" --set contrast_batch={size}" if local and not recipe.contrast_batch else ""
        ways.append(f"{change} (the learning rate follows the batch)")
    contrasted = f"groups of {size} images" if local else "the whole batch"
    what = ("group" if local else "image") + "s" * (parts > 1)
    raise UsageError(
        f"negatives={recipe.negatives} contrasts {contrasted}, and {world} processes cannot share {parts} {what} "
        f"alike: {_either(ways)}"
    )


class RefusedImage(NamedTuple):
    """An image of the corpus that cannot be trained on, and why."""

    id: str
    reason: str
    detail: str


def seeded(*parts: int) -> torch.Generator:
    """Make a CPU generator whose stream depends on all the parts and nothing else."""
    import torch  # here, because plans and cards need the rest without it

    state = np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def trained_images(images: int, held_out: int) -> int:
    """Count the images of a corpus that are trained on, so many being held out.

    Raises:
        SourceError: there are none.
    """
    if held_out >= images:
        least = f"--set held_out={images // 10}"
        raise SourceError(f"held_out={held_out} of {images} images leaves none to train on: {least}")
    return images - held_out


def steps_per_epoch(recipe: AnyRecipe, images: int, refused: Sequence[RefusedImage] = ()) -> int:
    """Count the whole batches in a corpus, from which images were left out."""
    if images < recipe.batch_size:
        smaller = f", or a smaller batch with --set batch_size={images}" if images >= 2 else ""
        lost = f" ({len(refused):,} cannot be decoded, the first {': '.join(refused[0])})" if refused else ""
        raise SourceError(
            f"the corpus has {images} usable images{lost} and a batch of {recipe.name} takes {recipe.batch_size}: "
            f"give more images{smaller}"
        )
    return images // recipe.batch_size


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _either(ways: Sequence[object]) -> str:
    *first, last = map(str, ways)
    return f"{', '.join(first)} or {last}" if first else last
