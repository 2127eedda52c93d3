"""The methods of benchmarks/rivals.py, each over the same ViT and the same images in the same order.

MiCL is what `micl-zoo train` runs; the others are in lightly_methods.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor

from micl_zoo.training.pretraining.data import MemoryCorpus
from micl_zoo.training.pretraining.pretrain import make_model
from micl_zoo.training.pretraining.step import TrainStep
from micl_zoo.training.recipes import Recipe
from micl_zoo.training.run.step import resolve_autocast

FOREVER = 10**9  # steps; the budget ends a run
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
        last: share of the budget, at its end, that is trained at LAST_MASK_RATIO; with it, a running mean of the
            weights is kept, too, the encoder `mean`.
    """

    def __init__(self, recipe: Recipe, device: torch.device, *, last: float = 0.0) -> None:
        self.recipe, self._last, self._used = recipe, last, 0.0
        self._step = TrainStep(make_model(recipe, device), recipe, autocast=resolve_autocast(recipe, device))
        self.vit, self.optimizer = self._step.model.vit, self._step.optimizer
        self.settings: dict[str, Any] = {}
        self.extras: dict[str, VisionTransformer] = {}
        self._mean = ModelEmaV3(self.vit, decay=MEAN_DECAY) if last else None
        if self._mean is not None:
            self.settings = {"last_share": last, "last_mask_ratio": LAST_MASK_RATIO, "mean_decay": MEAN_DECAY}
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


def make_method(name: str, recipe: Recipe, device: torch.device, classes: int) -> Method:
    """A method by name.

    Args:
        name: of the method.
        recipe: of the ViT, the crops, the order and the optimizer.
        device: to train on.
        classes: of the corpus, for supervised training.

    Raises:
        ImportError: it is made of lightly's parts, and lightly is not installed.
    """
    if name in ("micl", "micl-last"):
        return MiCLMethod(recipe, device, last=LAST_SHARE if name == "micl-last" else 0.0)
    from lightly_methods import METHODS, Supervised

    made: Method = Supervised(recipe, device, classes) if name == "supervised" else METHODS[name](recipe, device)
    return made
