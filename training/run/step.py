"""The frame of an optimiser step on a process's share of a batch, the same for pre-training and fine-tuning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from micl_zoo.encoders.device import autocast_dtype, autocasting, resolve_precision
from micl_zoo.errors import UsageError

from ..micl import Vit
from ..recipes import AnyRecipe
from .ranks import Ranks


class Step(ABC):
    """Takes steps: `step(*share_of_a_batch)` changes the weights in place."""

    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None = None  # running means of the weights
    synchronises = True  # whether gradients are averaged over the processes at all

    def __init__(
        self,
        module: nn.Module,
        vit: Vit,
        recipe: AnyRecipe,
        ranks: Ranks,
        autocast: torch.dtype | None,
        *,
        sharded: bool = False,
    ) -> None:
        self.vit, self.recipe, self.ranks = vit, recipe, ranks  # vit: the network that is trained, under its own names
        self.autocast = autocast  # dtype of the matrix products, None for that of the weights
        self._forward = _distribute(module, vit, ranks, sharded=sharded)

    def __call__(self, *share: Any) -> Any:
        """Take one step: what `accumulate` gives, numbers of this share, without gradient and still on the device.

        Their means over the processes are those of the batch.
        """
        found = self.accumulate(*share)
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.vit.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.vit)
        return found

    @abstractmethod
    def accumulate(self, *share: Any, **_: Any) -> Any:
        """Compute the gradients of one step, without taking it."""

    @property
    def precision(self) -> str:
        """Name of the precision of the matrix products."""
        return "fp32" if self.autocast is None else "bf16"

    def _compute(self, *inputs: Tensor) -> Any:
        with autocasting(inputs[0].device, self.autocast):
            return self._forward(*inputs)

    def _synchronise(self, now: bool) -> AbstractContextManager[None]:
        """Average the gradients over the processes in the backward pass of this context, or not yet."""
        now = now and self.synchronises
        if isinstance(self._forward, DistributedDataParallel):
            return nullcontext() if now else self._forward.no_sync()
        if self.ranks.world > 1:
            self._forward.set_requires_gradient_sync(now)
        return nullcontext()


def resolve_autocast(recipe: AnyRecipe, device: torch.device) -> torch.dtype | None:
    """Return the dtype of the matrix products on a device, None for float32."""
    return autocast_dtype(resolve_precision(recipe.precision, device))


def fsdp_works_on(device: torch.device) -> bool:
    """Tell whether torch shards on this device: torch 2.6 does so on GPUs only."""
    return device.type != "cpu" or hasattr(torch.cpu.Stream, "record_event")


def _distribute(module: nn.Module, vit: Vit, ranks: Ranks, *, sharded: bool) -> Any:
    if ranks.world == 1:
        return module
    device = next(vit.parameters()).device
    if not sharded:
        own = [device] if device.type == "cuda" else None
        return DistributedDataParallel(module, own, gradient_as_bucket_view=True)
    if not fsdp_works_on(device):
        raise UsageError(f"parallel=fsdp needs a GPU with torch {torch.__version__}: --set parallel=ddp")
    from torch.distributed.fsdp import fully_shard

    for block in vit.blocks:
        fully_shard(block)
    return fully_shard(module)
