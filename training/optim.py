"""AdamW with timm's parameter groups, and the learning rate of every step."""

from __future__ import annotations

import math

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from .recipes import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices and the class token, none on biases, norms and learned positions."""
    without = ["pos_embed"] if recipe.positions == "learned" else []
    groups = param_groups_weight_decay(model, weight_decay=recipe.weight_decay, no_weight_decay_list=without)
    return torch.optim.AdamW(groups, lr=0.0, betas=(recipe.beta1, recipe.beta2), fused=True)


def learning_rate(recipe: Recipe, step: int, total_steps: int) -> float:
    """Linear warm-up to recipe.lr, then a half-cycle cosine to min_lr, set per step (reference code)."""
    warmup = total_steps * recipe.warmup_epochs / recipe.epochs
    if step < warmup:
        return recipe.lr * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """For every group alike."""
    for group in optimizer.param_groups:
        group["lr"] = lr
