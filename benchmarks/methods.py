"""The methods of benchmarks/rivals.py and benchmarks/adapt.py, over the same ViT and images in the same order.

MiCL is what `micl-zoo train` runs; the others are in lightly_methods.py. `Run` trains any of them in a given time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, cast

import click
import numpy as np
import torch
from contest import FOREVER
from record import version_of
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from micl_zoo.encoders.device import default_workers
from micl_zoo.files import atomic_path, write_text
from micl_zoo.progress import progress
from micl_zoo.sources.listing import index_source
from micl_zoo.training.evaluation.labelled import labels_of, number_classes
from micl_zoo.training.pretraining.data import MemoryCorpus
from micl_zoo.training.pretraining.pretrain import make_model
from micl_zoo.training.pretraining.start import Start
from micl_zoo.training.pretraining.step import TrainStep
from micl_zoo.training.recipes import Recipe
from micl_zoo.training.run.optim import set_learning_rate
from micl_zoo.training.run.provenance import made_with
from micl_zoo.training.run.step import resolve_autocast

WARM_UP = 0.05  # of the budget
CURVE_POINTS = 50
LAST_SHARE, LAST_MASK_RATIO = 0.15, 0.5  # of a run's end with more patches
MEAN_DECAY = 0.998  # of the running mean of the weights: of about 500 steps


class Method(Protocol):
    """One way to train the ViT.

    Attributes:
        vit: the encoder that is saved in the end.
        optimizer: of everything that is trained.
        settings: numbers that the recipe does not hold.
        extras: other encoders that a run leaves, by name.
    """

    vit: VisionTransformer
    optimizer: torch.optim.AdamW
    settings: dict[str, Any]
    extras: dict[str, VisionTransformer]

    def batches(self, corpus: MemoryCorpus, labels: Tensor, workers: int) -> Iterator[Any]:
        """Batches without end, on the device or on their way to it."""
        ...

    def gradients(self, batch: Any, used: float) -> Tensor:
        """Loss () of a batch; its gradients are left in the parameters. `used` is the share of the budget so far."""
        ...


class MiCLMethod:
    """The step that `micl-zoo train` takes, on the batches that it takes it on.

    Args:
        start: the encoder that it starts from in the place of random weights.
        last: share of the budget, at its end, that is trained at LAST_MASK_RATIO.
        mean: whether a running mean of the weights is kept, too, the encoder `mean`.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        *,
        start: Start | None = None,
        last: float = 0.0,
        mean: bool = False,
    ) -> None:
        self.recipe, self._last, self._used = recipe, last, 0.0
        self._step = TrainStep(make_model(recipe, device, start), recipe, autocast=resolve_autocast(recipe, device))
        self.vit, self.optimizer = cast(VisionTransformer, self._step.model.vit), self._step.optimizer
        self.settings: dict[str, Any] = {}
        self.extras: dict[str, VisionTransformer] = {}
        self._mean = ModelEmaV3(self.vit, decay=MEAN_DECAY) if mean else None
        if last:
            self.settings |= {"last_share": last, "last_mask_ratio": LAST_MASK_RATIO}
        if self._mean is not None:
            self.settings |= {"mean_decay": MEAN_DECAY}
            self.extras = {"mean": cast(VisionTransformer, self._mean.module)}

    def batches(self, corpus: MemoryCorpus, labels: Tensor, workers: int) -> Iterator[Any]:
        """Crops are cut on the device: neither labels nor workers are of use."""
        last = dataclasses.replace(self.recipe, mask_ratio=LAST_MASK_RATIO)
        for step in range(FOREVER):
            recipe = last if self._used > 1 - self._last else self.recipe
            yield from corpus.batches(recipe, step, step + 1)

    def gradients(self, batch: Any, used: float) -> Tensor:
        """See `Method`."""
        self._used = used
        if self._mean is not None:  # with the weights of the step before
            self._mean.update(self.vit)
        return self._step.accumulate(batch.patches, batch.views)[0]


def make_method(
    name: str, recipe: Recipe, device: torch.device, classes: int, start: Start | None = None, *, mean: bool = False
) -> Method:
    """A method by name.

    Args:
        name: of the method.
        recipe: of the ViT, the crops, the order and the optimizer.
        device: to train on.
        classes: of the corpus, for supervised training.
        start: the encoder that MiCL or SimCLR starts from.
        mean: whether MiCL keeps a running mean of the weights; "micl-last" does anyway.

    Raises:
        ImportError: it is made of lightly's parts, and lightly is not installed.
    """
    if name in ("micl", "micl-last"):
        last = LAST_SHARE if name == "micl-last" else 0.0
        return MiCLMethod(recipe, device, start=start, last=last, mean=mean or bool(last))
    from lightly_methods import METHODS, Supervised

    given = {"start": start} if start else {}
    made: Method = (
        Supervised(recipe, device, classes) if name == "supervised" else METHODS[name](recipe, device, **given)
    )
    return made


@dataclass(frozen=True)
class Budget:
    """What each arm may use: minutes or images, whichever is given."""

    minutes: float | None
    images: int | None

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.images is None):
            raise click.UsageError("give either --minutes, for equal time, or --images, for equal images")

    def used(self, seconds: float, images: float) -> float:
        """The share of the budget that is used."""
        return seconds / 60 / self.minutes if self.minutes else images / (self.images or 1)


@dataclass
class Run:
    """One arm while it trains.

    Attributes:
        method, recipe, budget, device: what is trained, and how.
        losses: of each step.
        images: seen so far.
        seconds: by the budget's clock; of them, data_seconds until a batch was there.
        wall_seconds: by the wall clock.
    """

    method: Method
    recipe: Recipe
    budget: Budget
    device: torch.device
    losses: list[float] = field(default_factory=list)
    images: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    wall_seconds: float = 0.0

    def train(self, corpus: MemoryCorpus, labels: Tensor) -> None:
        """Steps until the middle of the next one would be past the budget; a step's learning rate is its middle's."""
        workers = 0 if self.device.type == "cpu" else default_workers()
        batches = self.method.batches(corpus, labels, workers)
        clock = time.process_time if self.device.type == "cpu" else time.monotonic
        start, wall, used, last = clock(), time.monotonic(), 0.0, 0.0
        while used + last / 2 < 1:
            begun = clock()
            batch = next(batches)
            self.data_seconds += clock() - begun
            self.losses.append(float(self.method.gradients(batch, used)))  # waits for the device
            self.images += self.recipe.batch_size
            if self.recipe.clip_norm:
                trained = [one for group in self.method.optimizer.param_groups for one in group["params"]]
                nn.utils.clip_grad_norm_(trained, self.recipe.clip_norm)
            middle = (used + self.budget.used(clock() - start, self.images)) / 2
            set_learning_rate(self.method.optimizer, self.recipe.lr * schedule(middle))
            self.method.optimizer.step()
            self.method.optimizer.zero_grad(set_to_none=True)
            self.seconds, before = clock() - start, used
            used = self.budget.used(self.seconds, self.images)
            last = used - before
            self._tell(before, used)
        self.wall_seconds = time.monotonic() - wall

    def _tell(self, before: float, used: float) -> None:
        """A line every tenth of the way."""
        if not math.isfinite(self.losses[-1]):
            raise click.ClickException(
                f"the loss is {self.losses[-1]} at step {len(self.losses)}: try a lower --learning-rate"
            )
        if int(10 * before) != int(10 * used):
            click.echo(f"{used:.0%}: {self.images:,} images, loss {self.losses[-1]:.3f}")
            sys.stdout.flush()

    def result(self) -> dict[str, Any]:
        """Times, rates and the loss."""
        return {
            "minutes": round(self.seconds / 60, 3),
            "clock": "processor" if self.device.type == "cpu" else "wall",
            "wall_minutes": round(self.wall_seconds / 60, 3),
            "images": self.images,
            "steps": len(self.losses),
            "images_per_second": round(self.images / self.seconds, 1),
            "data_share": round(self.data_seconds / self.seconds, 3),
            "loss_curve": curve(self.losses, self.recipe.batch_size),
        }


def arm_provenance(
    says: str, settings: dict[str, Any], method: Method, data: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """What arm.json, and the header of the arm's encoders, say of how they were made."""
    told = {"trained": says, **settings, "method_settings": method.settings, "data": data}
    return {**told, "lightly": version_of("lightly"), **made_with(device)}


def schedule(used: float) -> float:
    """Share of the peak learning rate: a linear warm-up, then a half-cycle cosine to 0."""
    if used < WARM_UP:
        return used / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (min(used, 1.0) - WARM_UP) / (1 - WARM_UP)))


def curve(losses: list[float], batch_size: int) -> list[dict[str, float]]:
    """Means of equal pieces of the run, by the images seen at their end."""
    places = np.linspace(0, len(losses), min(CURVE_POINTS, len(losses)) + 1).astype(int)
    pieces = [(stop, losses[first:stop]) for first, stop in pairwise(places)]
    return [{"images": int(stop) * batch_size, "loss": round(float(np.mean(piece)), 5)} for stop, piece in pieces]


def prepare_corpus(data: Path, source: str, folder: Path, source_size: int) -> None:
    """Decode a corpus once; each arm maps the files into its memory.

    Args:
        data: folder of the data sets.
        source: images below it.
        folder: where the decoded images go.
        source_size: their side in pixels.
    """
    facts = folder / "facts.json"
    index = index_source(str(data / source))
    fingerprint = index.fingerprint()
    if facts.exists():
        if json.loads(facts.read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
            raise click.UsageError(f"{str(folder)!r} was made with another corpus: give another --work")
        return
    with progress("decoding the corpus", len(index)) as tick:
        corpus = MemoryCorpus.load(index, source_size, tick=tick)
    told = labels_of(index)
    _, (numbered, _) = number_classes(told, told, source)
    labels = torch.from_numpy(numbered)[corpus.rows]
    numbers = {"images": corpus.images, "aspect": corpus.aspect, "rows": corpus.rows, "labels": labels}
    for name, values in numbers.items():
        with atomic_path(facts.with_name(f"{name}.npy")) as temporary, temporary.open("wb") as file:
            np.save(file, values.numpy())
    said = {"source": source, "images": len(corpus), "refused": len(corpus.refused)}
    write_text(facts, json.dumps({**said, "fingerprint": fingerprint}, indent=1) + "\n")


def open_corpus(folder: Path) -> tuple[MemoryCorpus, Tensor, dict[str, Any]]:
    """Open what `prepare_corpus` decoded: the corpus, its labels (M,), and what it is."""
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    names = ("images", "aspect", "rows", "labels")
    images, aspect, rows, labels = (torch.from_numpy(np.load(folder / f"{n}.npy", mmap_mode="c")) for n in names)
    return MemoryCorpus(images, aspect, rows, []), labels, facts
