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
from micl_zoo.schema import checked
from micl_zoo.sources.listing import SourceLike

from ..recipes import Recipe, parsed
from ..run.order import trained_images
from ..run.rundir import command_text
from .plan import GIB
from .pretrain import Images, named_options, pretrain
from .start import Start

OWN_IMAGES = "images of one's own"
LEAST = 8  # images: fewer are no batch of negatives
SEEN = 200_000  # images that a short run sees
MOST_EPOCHS = 100
BATCH = 256
RATE = 1e-3  # at batch 256, of our encoders
CAREFUL_RATE = 2e-4  # of all others, most of which were trained far longer: a guess
RATE_WIDTH = 192  # at which the first was measured; for other widths it is a guess
LAYER_DECAY = 0.85
VIEWS, MASK_RATIO = 3, 0.5
TEMPERATURE = 0.01
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
        names, values = [one.name for one in self.choices], [_shown(one.value) for one in self.choices]
        wide, most = (max(map(len, texts)) for texts in (names, values))
        reasons = [one.reason for one in self.choices]
        rows = zip(names, values, reasons, strict=True)
        return "\n".join(f"  {name:<{wide}}  {value:<{most}}  {reason}" for name, value, reason in rows)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


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
    changes = tuple(overrides)
    asked, network, choices = parsed(Recipe, changes), start.network(), list[Choice]()

    def put(name: str, value: Any, reason: str) -> Any:
        """Choose a value, or take what was asked for: what is chosen after it goes by that."""
        if name in asked and asked[name] != value:
            value, reason = asked[name], f"as asked; {_shown(value)} was chosen"
        choices.append(Choice(name, value, reason))
        return value

    held = put("held_out", min(256, images // 10), f"of {images:,} images, a tenth or 256: they show what changes")
    trained = trained_images(images, held)
    epochs = min(MOST_EPOCHS, max(1, round(SEEN / trained, 1)))
    most = epochs == MOST_EPOCHS
    why = f"the most: {MOST_EPOCHS * trained:,} images are seen" if most else f"{SEEN:,} images are seen / {trained:,}"
    epochs = put("epochs", epochs, why)
    put("warmup_epochs", round(epochs / 20, 3), "a twentieth of the run")
    batch = min(BATCH, 2 ** int(math.log2(max(4, trained // 2))))
    put("batch_size", batch, f"at most {BATCH}, and half of the images: a short run gains more by steps than negatives")
    if group := asked.get("contrast_batch"):
        put("negatives", "local", f"groups of {group} images, as contrast_batch asks")
    else:
        put("negatives", "global", "all images of a batch, on any number of GPUs")
    width = network["embed_dim"]
    rate, why = RATE, "as in trials"
    if start.encoder.record is None:
        rate, why = CAREFUL_RATE, f"a guess, the {RATE:g} of trials with our encoders being too fast for most others"
    put("base_lr", rate * RATE_WIDTH / width, f"{rate:g} x {RATE_WIDTH} / {width}, its width: {why}")
    put("layer_decay", LAYER_DECAY, "lower blocks learn slower: what they know holds for most images")
    put("clip_norm", 1.0, "an odd batch moves the weights no further than others")
    size, patch = network["image_size"], network["patch_size"]
    size = put("crop_size", size, "the size that the encoder takes")
    patches = (size // patch) ** 2
    if patches * (1 - MASK_RATIO) >= VIEWS:
        put("mask_ratio", MASK_RATIO, f"half of {patches} patches stay visible: the paper's fifth harmed in trials")
    else:
        put("mask_ratio", 0.0, f"{patches} patches are too few to hide some")
    put("views", max(2, min(VIEWS, patches)), "disjoint sets of the visible patches, which are to be found alike")
    put("temperature", TEMPERATURE, "in trials 0.02 and 0.03 gained less, and the paper's 0.07 harmed")
    put("view_color", True, "without it, what an encoder knew was lost in trials")
    source = put("source_size", math.ceil(size * 8 / 7), "of the images in memory: 8/7 of the crop")
    memory = 3 * source**2 * trained
    cache = "memory" if memory <= MOST_CACHE else "none"
    put("cache", cache, f"decoded they take {memory / GIB:.2g} GiB, and up to {MOST_CACHE / GIB:g} stay in memory")
    base = start.recipe(Recipe(name=start.name, corpus=OWN_IMAGES, checkpoint_minutes=5))
    base = dataclasses.replace(base, **{one.name: one.value for one in choices})
    return Chosen(start.recipe(base, changes), choices)


@checked
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
    options = named_options(images, out, how.get("knn", ()))
    options += [("--image-size", str(image_size))] if image_size else []
    command = command_text(["micl-zoo adapt", shlex.quote(name)], options, overrides, smoke=False)
    reasons = {one.name: one.reason for one in chosen.choices}
    return pretrain(chosen.recipe, images, out, init=start, command=command, reasons=reasons, **how)
