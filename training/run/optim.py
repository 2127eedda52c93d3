"""AdamW with timm's parameter groups, and the learning rate of every step."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from ..recipes import AnyRecipe, Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Make fused AdamW; weight decay on matrices and the class token, none on biases, norms and learned positions.

    With layer-wise decay it is that of fine-tuning.
    """
    if recipe.layer_decay < 1:
        return make_layered_optimizer(model, recipe)
    without = [] if recipe.positions == "sincos" else ["pos_embed", "rope.*"]
    return _adamw(param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=without), recipe)


def make_layered_optimizer(model: nn.Module, recipe: AnyRecipe) -> torch.optim.AdamW:
    """Make fused AdamW whose deeper layers learn slower (BEiT, arXiv 2106.08254), by `lr_scale` of their group.

    No weight decay on biases, norms, the class token and positions. What is not trained makes no layer of its own.
    """
    fixed, layers = list(cast(Any, model).no_weight_decay()), cast(Any, model).group_matcher()
    layers["stem"] += "|^rope"  # timm counts rotary positions to the head, whose rate is the highest
    trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    seen: Any = SimpleNamespace(group_matcher=lambda coarse: layers, named_parameters=lambda: trained)
    return _adamw(param_groups_layer_decay(seen, recipe.weight_decay, fixed, layer_decay=recipe.layer_decay), recipe)


def _adamw(groups: Any, recipe: AnyRecipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=0.0, betas=(recipe.beta1, recipe.beta2), fused=True)


def learning_rate(recipe: AnyRecipe, step: int, total_steps: int) -> float:
    """Compute the linear warm-up to recipe.lr, then a half-cycle cosine to min_lr, set per step (reference code)."""
    warmup = recipe.warmup_steps(total_steps)
    if step < warmup:
        return recipe.lr * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group, times its `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
