"""One optimiser step on a process's share of a batch: the same gradients on any number of processes, in any pieces.

A share falls into groups of images that are contrasted with each other, taken one after the other (gradient
accumulation). A group that is too large for the memory is taken in pieces (GradCache, arXiv 2101.06983): what is
contrasted without a graph, the loss and its gradient, then each piece again, with its part of that gradient.

Shapes: b images of this process's share, V views, K/V patches a view, P numbers a patch, D width.
"""

from __future__ import annotations

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from micl_zoo.errors import TrainingError

from ..micl import MiCL, contrastive_loss
from ..recipes import Recipe
from ..run.optim import make_optimizer
from ..run.order import images_per_process
from ..run.ranks import Ranks
from ..run.step import Step

NO_ROOM = (
    "the network does not fit into this device's memory, not even one image at a time: take a smaller encoder, "
    "--set activation_checkpointing=true, or --set parallel=fsdp on several GPUs"
)


class TrainStep(Step):
    """Takes steps of the method: `step(patches, views)` changes the weights in place, see `Step`."""

    recipe: Recipe

    def __init__(
        self,
        model: MiCL,  # the method with its ViT: on its device, initialised, compiled if it is to be
        recipe: Recipe,
        ranks: Ranks | None = None,
        *,
        autocast: torch.dtype | None = None,
        micro_batch: int | None = None,  # most images per forward pass; None takes each group whole
    ) -> None:
        self.model, ranks = model, ranks or Ranks()
        share = images_per_process(recipe, ranks.world)
        self.groups = 1 if recipe.negatives == "global" else share // recipe.contrast_size
        self.micro_batch = micro_batch or share
        forward, sharded = _PooledViews(model, (recipe.grid, recipe.grid)), recipe.parallel == "fsdp"
        super().__init__(forward, model.vit, recipe, ranks, autocast, sharded=sharded)
        self.optimizer = make_optimizer(model.vit, recipe)
        self.ema = ModelEmaV3(model.vit, decay=recipe.ema_decay) if recipe.ema_decay else None

    def fit(self, patches: Tensor, views: Tensor) -> None:
        """Halve the images per forward pass until a step on such a share fits into memory; no weight is changed.

        Raises:
            TrainingError: not even one image at a time fits.
        """
        self.synchronises = False  # a process that has no memory leaves the others waiting
        while True:
            try:
                self.accumulate(patches, views)
                self.optimizer.step()  # at a rate of 0, for the memory of its moments
                break
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise TrainingError(NO_ROOM) from None
            finally:
                self.optimizer.zero_grad(set_to_none=True)
                self.optimizer.state.clear()
            self.micro_batch = -(-self.micro_batch // 2)
            if patches.device.type == "cuda":
                torch.cuda.empty_cache()
        self.synchronises = True

    def accumulate(self, patches: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of one step, without taking it: loss () and contrastive accuracy () of this share.

        `patches` (b, V, K/V, P) are normalised pixels; `views` (b, V, K/V) tells where in the crop's grid they are.
        """
        groups = list(zip(patches.chunk(self.groups), views.chunk(self.groups), strict=True))
        found = [self._group(*group, last=group is groups[-1]) for group in groups]
        losses, accuracies = zip(*found, strict=True)
        return torch.stack(losses).mean(), torch.stack(accuracies).mean()

    def _group(self, patches: Tensor, views: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """Add the gradients of one group; with the last they are averaged over the processes."""
        count = -(-len(patches) // self.micro_batch)
        if count == 1:
            with self._synchronise(last):
                loss, accuracy = self._loss(self._compute(patches, views))
                (loss / self.groups).backward()
            return loss.detach(), accuracy
        pieces = list(zip(patches.chunk(count), views.chunk(count), strict=True))
        with torch.no_grad():
            tokens = torch.cat([self._compute(*piece) for piece in pieces])  # (b, V, D)
        tokens.requires_grad_()
        loss, accuracy = self._loss(tokens)
        (loss / self.groups).backward()
        assert tokens.grad is not None
        for piece, gradient in zip(pieces, tokens.grad.chunk(count), strict=True):
            with self._synchronise(last and piece is pieces[-1]):
                self._compute(*piece).backward(gradient)
        return loss.detach(), accuracy

    def _loss(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        recipe, ranks = self.recipe, self.ranks
        shared = recipe.negatives == "global" and ranks.world > 1
        rows, first = (ranks.all_rows, ranks.rank * len(tokens)) if shared else (None, 0)
        return contrastive_loss(
            tokens, kappa=recipe.kappa, temperature=recipe.temperature, all_rows=rows, first_row=first
        )


class _PooledViews(nn.Module):
    """The forward pass that DistributedDataParallel and FSDP wrap."""

    def __init__(self, model: MiCL, grid: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.grid = model, grid

    def forward(self, patches: Tensor, views: Tensor) -> Tensor:
        return self.model.pool_views(patches, views, self.grid).clone()  # no view, of which FSDP warns
