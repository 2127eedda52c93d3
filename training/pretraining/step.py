"""One optimiser step on a process's share of a batch: the same gradients on any number of processes, in any pieces.

A share falls into groups of images that are contrasted with each other, taken one after the other (gradient
accumulation). A group that is too large for the memory is taken in pieces (GradCache, arXiv 2101.06983): what is
contrasted without a graph, the loss and its gradient, then each piece again, with its part of that gradient.

Shapes: b images of this process's share, V views, K/V patches a view, P numbers a patch, D width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from micl_zoo.errors import UsageError

from ..micl import MiCL, contrastive_loss
from ..recipes import Recipe
from ..run.optim import make_optimizer
from ..run.order import images_per_process
from ..run.ranks import Ranks


class TrainStep:
    """Takes steps: `step(patches, views)` changes the weights in place.

    Attributes:
        model: the method with its ViT, under its own names.
        optimizer: of the recipe.
        autocast: dtype of the matrix products, None for that of the weights.

    Args:
        model: on its device, initialised, compiled if it is to be.
        recipe: of the run.
        ranks: this process among all.
        autocast: dtype of the matrix products, None for that of the weights.
        micro_batch: images a forward pass at most; None takes each group whole.

    Raises:
        UsageError: a batch that does not divide among the processes.
    """

    def __init__(
        self,
        model: MiCL,
        recipe: Recipe,
        ranks: Ranks | None = None,
        *,
        autocast: torch.dtype | None = None,
        micro_batch: int | None = None,
    ) -> None:
        self.model, self.recipe, self.ranks, self.autocast = model, recipe, ranks or Ranks(), autocast
        share = images_per_process(recipe, self.ranks.world)
        self.groups = 1 if recipe.negatives == "global" else share // recipe.contrast_size
        self.micro_batch = micro_batch or share
        side = recipe.crop_size // recipe.patch_size
        self._encode = _distribute(_PooledViews(model, (side, side)), recipe, self.ranks)
        self.optimizer = make_optimizer(model.vit, recipe)

    def __call__(self, patches: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            patches: (b, V, K/V, P), normalised pixels of the visible patches of this process's share.
            views: (b, V, K/V), where in the crop's grid they are.

        Returns:
            Loss () and contrastive accuracy () of this share, without gradient and still on the device. Their means
            over the processes are those of the batch.
        """
        loss, accuracy = self.accumulate(patches, views)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, accuracy

    def accumulate(self, patches: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of one step, without taking it."""
        groups = list(zip(patches.chunk(self.groups), views.chunk(self.groups), strict=True))
        found = [self._group(*group, last=group is groups[-1]) for group in groups]
        losses, accuracies = zip(*found, strict=True)
        return torch.stack(losses).mean(), torch.stack(accuracies).mean()

    def _group(self, patches: Tensor, views: Tensor, last: bool) -> tuple[Tensor, Tensor]:
        """Add the gradients of one group; with the last they are averaged over the processes."""
        count = -(-len(patches) // self.micro_batch)
        if count == 1:
            with self._synchronise(last):
                loss, accuracy = self._loss(self._tokens(patches, views))
                (loss / self.groups).backward()
            return loss.detach(), accuracy
        pieces = list(zip(patches.chunk(count), views.chunk(count), strict=True))
        with torch.no_grad():
            tokens = torch.cat([self._tokens(*piece) for piece in pieces])  # (b, V, D)
        tokens.requires_grad_()
        loss, accuracy = self._loss(tokens)
        (loss / self.groups).backward()
        assert tokens.grad is not None
        for piece, gradient in zip(pieces, tokens.grad.chunk(count), strict=True):
            with self._synchronise(last and piece is pieces[-1]):
                self._tokens(*piece).backward(gradient)
        return loss.detach(), accuracy

    def _tokens(self, patches: Tensor, views: Tensor) -> Tensor:
        with torch.autocast(patches.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            tokens: Tensor = self._encode(patches, views)
        return tokens

    def _loss(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        shared = self.recipe.negatives == "global" and self.ranks.world > 1
        return contrastive_loss(
            tokens,
            kappa=self.recipe.kappa,
            temperature=self.recipe.temperature,
            all_rows=self.ranks.all_rows if shared else None,
            first_row=self.ranks.rank * len(tokens) if shared else 0,
        )

    def _synchronise(self, now: bool) -> AbstractContextManager[None]:
        """Whether the backward pass in this context averages the gradients over the processes."""
        if self.ranks.world == 1:
            return nullcontext()
        if isinstance(self._encode, DistributedDataParallel):
            return nullcontext() if now else self._encode.no_sync()
        self._encode.set_requires_gradient_sync(now)
        return nullcontext()


class _PooledViews(nn.Module):
    """The forward pass that DistributedDataParallel and FSDP wrap."""

    def __init__(self, model: MiCL, grid: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.grid = model, grid

    def forward(self, patches: Tensor, views: Tensor) -> Tensor:
        return self.model.pool_views(patches, views, self.grid)


def fsdp_works_on(device: torch.device) -> bool:
    """Torch 2.6 shards on GPUs only."""
    return device.type != "cpu" or hasattr(torch.cpu.Stream, "record_event")


def _distribute(module: _PooledViews, recipe: Recipe, ranks: Ranks) -> Any:
    if ranks.world == 1:
        return module
    device = module.model.vit.cls_token.device
    if recipe.parallel == "fsdp":
        if not fsdp_works_on(device):
            raise UsageError(f"parallel=fsdp needs a GPU with torch {torch.__version__}: --set parallel=ddp")
        from torch.distributed.fsdp import fully_shard

        for block in module.model.vit.blocks:
            fully_shard(block)
        return fully_shard(module)
    return DistributedDataParallel(module, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
