"""Goes on with an encoder on one's own images: chooses every number of the run, and says why."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from micl_zoo.encoders.encoder import Encoder
from micl_zoo.errors import SourceError
from micl_zoo.sources.listing import SourceLike
from micl_zoo.zoo.config import NAME

from ..recipes import Recipe
from ..run.rundir import command_text
from .plan import GIB
from .pretrain import Images, pretrain
from .start import Start

OWN_IMAGES = "images of one's own"
LEAST = 8  # images: fewer are no batch of negatives
SEEN = 200_000  # images that a short run sees
MOST_EPOCHS, LEAST_EPOCHS = 100, 1
BATCH = 256
PEAK = 2e-4  # learning rate at the top, of any batch
LAYER_DECAY = 0.85
VIEWS, PATCHES = 3, 15  # of which each view sees at least five
TEMPERATURE = 0.03
MOST_CACHE = 4 * GIB  # bytes of decoded images in memory


class Choice(NamedTuple):
    """A field of the recipe that was chosen."""

    name: str
    value: Any
    reason: str


class Chosen(NamedTuple):
    """A recipe, and why its numbers are what they are."""

    recipe: Recipe
    choices: list[Choice]

    def text(self) -> str:
        """Write the choices for a person, a line each."""
        width = max(len(one.name) for one in self.choices)
        values = [f"{one.value:g}" if isinstance(one.value, float) else str(one.value) for one in self.choices]
        most = max(len(value) for value in values)
        lines = [
            f"  {one.name:<{width}}  {value:<{most}}  {one.reason}"
            for one, value in zip(self.choices, values, strict=True)
        ]
        return "\n".join(lines)


def choose(start: Start, images: int, overrides: Iterable[str] = ()) -> Chosen:
    """Choose a recipe for going on with an encoder on so many images.

    Args:
        start: the encoder.
        images: number of images that there are.
        overrides: "key=value" changes.

    Raises:
        UsageError, SourceError: a change that is none, or too few images.
    """
    if images < LEAST:
        raise SourceError(f"{images} images are too few to learn from: give {LEAST} or more, better thousands")
    held_out = min(256, images // 10)
    trained = images - held_out
    batch = min(BATCH, 2 ** int(math.log2(trained)))
    epochs = round(min(MOST_EPOCHS, max(LEAST_EPOCHS, SEEN / trained)), 1)
    size, patch = start.encoder.config.size[0], start.encoder.model.patch_embed.patch_size[0]
    patches = (size // patch) ** 2
    kept = min(max(PATCHES, patches // 5), patches)
    mask_ratio = math.floor(100 * (1 - kept / patches)) / 100
    source = math.ceil(size * 8 / 7)
    in_memory = 3 * source**2 * trained
    cache = "memory" if in_memory <= MOST_CACHE else "none"
    choices = [
        Choice("held_out", held_out, f"of {images:,} images, a tenth and at most 256: they show what changes"),
        Choice("epochs", epochs, f"{SEEN:,} images seen / {trained:,}, from {LEAST_EPOCHS} to {MOST_EPOCHS}"),
        Choice("warmup_epochs", round(epochs / 20, 3), "a twentieth of the run"),
        Choice("batch_size", batch, f"at most {BATCH}: more steps teach a short run more than more negatives"),
        Choice("negatives", "global", "all images of a batch, on any number of GPUs"),
        Choice("base_lr", PEAK * 256 / batch, f"a peak of {PEAK:g} at this batch: a start is not to be forgotten"),
        Choice("layer_decay", LAYER_DECAY, "lower blocks learn slower: what they know holds for most images"),
        Choice("clip_norm", 1.0, "an odd batch moves the weights no further than others"),
        Choice("crop_size", size, "the size that the encoder takes"),
        Choice("mask_ratio", mask_ratio, f"{kept} of {patches} patches stay visible"),
        Choice("views", VIEWS, f"disjoint sets of {kept // VIEWS} patches that are to be found alike"),
        Choice("temperature", TEMPERATURE, "sharper than the paper's 0.07, ahead in this project's short runs"),
        Choice("view_color", True, "else the colours of an image give away which views belong together"),
        Choice("cache", cache, f"decoded images take {in_memory / GIB:.1f} GiB, up to {MOST_CACHE / GIB:g} stay in memory"),
        Choice("source_size", source, "of those in memory: 8/7 of the crop"),
    ]  # fmt: skip
    base = Recipe(name=_name(start), corpus=OWN_IMAGES, checkpoint_minutes=5)
    recipe = start.recipe(dataclasses.replace(base, **{one.name: one.value for one in choices}), overrides)
    return Chosen(recipe, [_changed(one, recipe) for one in choices])


def _changed(choice: Choice, recipe: Recipe) -> Choice:
    value = getattr(recipe, choice.name)
    return choice if value == choice.value else Choice(choice.name, value, f"as asked; {choice.value} was chosen")


def _name(start: Start) -> str:
    name = f"{start.encoder.name}-adapted"
    return name if NAME.fullmatch(name) else "encoder.adapted"


def adapt(
    encoder: Encoder | str | os.PathLike[str],
    data: SourceLike,
    out: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    overrides: Sequence[str] = (),
    tell: Callable[[Chosen], object] = lambda chosen: None,
    **how: Any,
) -> Path:
    """Go on with an encoder by MiCL on images without labels; the same call again resumes from the last checkpoint.

    Args:
        encoder: a loaded encoder, or what `micl_zoo.load` finds one by: any ViT of timm's VisionTransformer and Eva.
        data: a source of images, see `micl_zoo.index_source`.
        out: the run's folder; its `neighbours.png` shows images' nearest before and after, run.json what changed.
        image_size: side in pixels of the images, in the place of the encoder's own.
        overrides: "key=value" changes to the recipe that is chosen, see `choose`.
        tell: called with the recipe that is chosen, before anything is trained.
        how: device, workers, max_steps, micro_batch, knn, knn_minutes, knn_images and wandb, as `pretrain` takes them.

    Returns:
        The file of the finished encoder, or the run's folder when `max_steps` came first.

    Raises:
        UsageError: an encoder that MiCL cannot train, see `check_trainable`; or as `pretrain`.
    """
    start, images = Start.open(encoder, image_size), Images.open(data)
    chosen = choose(start, len(images.index), overrides)
    tell(chosen)
    name = start.encoder.name if isinstance(encoder, Encoder) else os.fspath(encoder)
    options = [
        *(("--data", path) for path in images.paths),
        *([("--image-size", str(image_size))] if image_size else []),
    ]
    command = command_text(["micl-zoo adapt", shlex.quote(name)], options, overrides, smoke=False)
    reasons = {one.name: one.reason for one in chosen.choices}
    return pretrain(chosen.recipe, images, out, init=start, command=command, reasons=reasons, **how)
