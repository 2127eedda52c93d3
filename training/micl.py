"""The whole method: masked image contrastive learning (MiCL, arXiv 2411.09858 v1; renamed OCL in v2).

Keep a fifth of an image's patches, split them into two disjoint views, contrast the class tokens over the batch.

Shapes: B images, N patches of the whole image, K patches kept (K/2 a view), D width,
P = 3 * patch_size ** 2 numbers a patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from micl_zoo.errors import UsageError


class MiCLOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        loss: () float32.
        class_tokens: (B, 2, D), after the final norm, not L2-normalised.
        accuracy: () float32 without gradient: how often an image's other view is the most similar of the batch.
    """

    loss: Tensor
    class_tokens: Tensor
    accuracy: Tensor


class MiCL(nn.Module):
    """MiCL over a timm `VisionTransformer`; the ViT's weights are trained in place, under timm's names.

    The position table is replaced by the frozen 2-D sin-cos one; no other weight is touched (see `init_weights`).

    Args:
        vit: with a class token, no other prefix token, and class-token pooling (`num_classes=0`).
        mask_ratio: share of the patches that neither view sees; K = floor(N * (1 - mask_ratio)) // 2 * 2 are kept.
        kappa: concentration of the T-distributed spherical similarity.
        temperature: divides the similarity.

    Raises:
        UsageError: a ViT without what is named above, or a mask ratio outside [0, 1).
    """

    def __init__(
        self, vit: VisionTransformer, *, mask_ratio: float, kappa: float = 1 / 64, temperature: float = 0.07
    ) -> None:
        super().__init__()
        _check_vit(vit)
        if not 0 <= mask_ratio < 1:
            raise UsageError(f"mask_ratio must be at least 0 and below 1, got {mask_ratio}")
        self.vit = vit
        self.mask_ratio = mask_ratio
        self.kappa = kappa
        self.temperature = temperature
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.grid_size: tuple[int, int] = vit.patch_embed.grid_size
        with torch.no_grad():
            vit.pos_embed.copy_(position_table(vit.embed_dim, self.grid_size, self.grid_size))
        vit.pos_embed.requires_grad_(False)

    def forward(self, pixel_values: Tensor, noise: Tensor | None = None) -> MiCLOutput:
        """Loss of a batch of whole images; only the visible patches are embedded.

        Args:
            pixel_values: (B, 3, H, W), normalised. Where H and W differ from the ViT's own size, the positions are
                stretched over its grid.
            noise: (B, N), whose ascending argsort orders the patches. Drawn uniformly when not given.

        Raises:
            UsageError: sizes that do not fit, or a mask ratio that leaves no view.
        """
        grid = grid_of(pixel_values, self.patch_size)
        if noise is None:
            noise = torch.rand(pixel_values.shape[0], grid[0] * grid[1], device=pixel_values.device)
        views = draw_views(noise, self.mask_ratio)  # (B, 2, K/2)
        return self.contrast(gather_patches(pixel_values, views, self.patch_size), views, grid)

    def contrast(self, patches: Tensor, views: Tensor, grid: tuple[int, int]) -> MiCLOutput:
        """Loss of patches that were gathered already.

        Args:
            patches: (B, 2, K/2, P), normalised pixels of the visible patches, flattened channel first.
            views: (B, 2, K/2), where in the grid each patch is, row by row.
            grid: patches down and across the image they came from.
        """
        class_tokens = self.class_tokens(patches, views, grid)
        loss, accuracy = contrastive_loss(class_tokens, kappa=self.kappa, temperature=self.temperature)
        return MiCLOutput(loss, class_tokens, accuracy)

    def class_tokens(self, patches: Tensor, views: Tensor, grid: tuple[int, int]) -> Tensor:
        """The class token of each view after the final norm: (B, 2, D). The arguments are those of `contrast`."""
        return self.vit.norm(self._blocks(patches, views, grid)[:, :, 0])

    def encode_views(self, patches: Tensor, views: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens of both views after the final norm, the class token first: (B, 2, K/2 + 1, D)."""
        return self.vit.norm(self._blocks(patches, views, grid))

    def _blocks(self, patches: Tensor, views: Tensor, grid: tuple[int, int]) -> Tensor:
        batch = patches.shape[0]
        positions = self._positions(grid, patches.device)  # (1 + N, D)
        conv = self.vit.patch_embed.proj
        tokens = F.linear(patches, conv.weight.flatten(1), conv.bias)  # (B, 2, K/2, D)
        tokens = tokens + positions[1:][views]
        tokens = tokens.flatten(0, 1)  # (2B, K/2, D)
        class_token = (self.vit.cls_token + positions[:1]).expand(2 * batch, -1, -1).to(tokens.dtype)
        tokens = torch.cat([class_token, tokens], dim=1)  # (2B, K/2 + 1, D)
        tokens = self.vit.norm_pre(tokens)
        for block in self.vit.blocks:
            tokens = checkpoint(block, tokens, use_reentrant=False) if self.vit.grad_checkpointing else block(tokens)
        return tokens.unflatten(0, (batch, 2))

    def _positions(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        if grid == self.grid_size:
            return self.vit.pos_embed[0]
        return position_table(self.vit.embed_dim, grid, self.grid_size).to(device)


def grid_of(pixel_values: Tensor, patch_size: int) -> tuple[int, int]:
    """Patches down and across (B, 3, H, W).

    Raises:
        UsageError: another number of dimensions or channels, or sides that are no multiple of the patch size.
    """
    shape = tuple(pixel_values.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] % patch_size or shape[3] % patch_size:
        raise UsageError(f"pixel_values must be (B, 3, H, W) with H and W multiples of {patch_size}, got {shape}")
    return shape[2] // patch_size, shape[3] // patch_size


def kept_patches(num_patches: int, mask_ratio: float) -> int:
    """K, the even number of patches that stay visible, half of them in each view (reference code).

    Raises:
        UsageError: when a view would be empty.
    """
    kept = math.floor(num_patches * (1 - mask_ratio)) // 2 * 2
    if kept < 2:
        limit = math.floor(1e4 * (1 - 2 / num_patches)) / 1e4
        raise UsageError(
            f"mask_ratio {mask_ratio} of {num_patches} patches leaves no patch for two views: use {limit} at most"
        )
    return kept


def draw_views(noise: Tensor, mask_ratio: float) -> Tensor:
    """Two disjoint random sets of patches an image: noise (B, N) -> indices (B, 2, K/2)."""
    kept = kept_patches(noise.shape[1], mask_ratio)
    return noise.argsort(dim=1, stable=True)[:, :kept].unflatten(1, (2, kept // 2))


def gather_patches(pixel_values: Tensor, views: Tensor, patch_size: int) -> Tensor:
    """The visible patches only: (B, 3, H, W) at (B, V, K/2) -> (B, V, K/2, P), each flattened channel first."""
    down, across = grid_of(pixel_values, patch_size)
    batch = pixel_values.shape[0]
    grid = pixel_values.reshape(batch, 3, down, patch_size, across, patch_size)
    rows = torch.arange(batch, device=views.device)[:, None, None]
    patches = grid.permute(0, 2, 4, 1, 3, 5)[rows, views // across, views % across]  # (B, V, K/2, 3, p, p)
    return patches.flatten(3)


def contrastive_loss(
    class_tokens: Tensor,
    *,
    kappa: float,
    temperature: float,
    all_rows: Callable[[Tensor], Tensor] | None = None,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """Symmetric cross-entropy over tSP similarities, in float32 at least, whatever the autocast dtype.

    Args:
        class_tokens: (B, 2, D).
        kappa: concentration of the similarity.
        temperature: divides the similarity.
        all_rows: for negatives from other processes: from the rows of this one, (B, 2, D), to those of all. Only this
            process's rows of the matrix are computed; the mean over the processes is the loss of the whole batch.
        first_row: where this process's rows begin among all.

    Returns:
        The loss () and, without gradient, the contrastive accuracy ().
    """
    with torch.autocast(class_tokens.device.type, enabled=False):
        wide = class_tokens if class_tokens.dtype == torch.float64 else class_tokens.float()
        unit = F.normalize(wide, dim=-1)  # (B, 2, D)
        first, second = unit.unbind(1)
        if all_rows is None:
            cosines = [cosine := first @ second.T, cosine.T]  # (B, B), who asks by who is asked
        else:
            every_first, every_second = all_rows(unit).unbind(1)
            cosines = [first @ every_second.T, second @ every_first.T]  # (B, world * B)
        target = torch.arange(len(unit), device=unit.device) + first_row
        logits = [0.5 * (1 + cosine) / (1 + (1 - cosine) * kappa) / temperature for cosine in cosines]
        loss = (F.cross_entropy(logits[0], target) + F.cross_entropy(logits[1], target)) / 2
        hits = [(asked.argmax(1) == target).float().mean() for asked in logits]
    return loss, ((hits[0] + hits[1]) / 2).detach()


def position_table(embed_dim: int, grid: tuple[int, int], full_grid: tuple[int, int]) -> Tensor:
    """The fixed 2-D sin-cos positions (reference code), a zero row for the class token first: (1 + N, D) float32.

    The first half of a row encodes the patch's column, the second its row, each as sines then cosines at
    embed_dim / 4 frequencies.
    A grid smaller than `full_grid` is stretched over it: patch centres keep their place in the image.

    Raises:
        UsageError: a width that is no multiple of 4.
    """
    if embed_dim % 4:
        raise UsageError(f"embed_dim must be a multiple of 4 for sin-cos positions, got {embed_dim}")
    frequencies = 10000.0 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))
    axes = [
        (torch.arange(n, dtype=torch.float64) + 0.5) * (full / n) - 0.5 for n, full in zip(grid, full_grid, strict=True)
    ]
    row, column = torch.meshgrid(*axes, indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (column, row)]  # (N, D/4) each
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, embed_dim, dtype=torch.float64), table]).float()


def init_weights(vit: VisionTransformer, *, generator: torch.Generator | None = None) -> None:
    """Initialise as the paper's code does: xavier-uniform Linears (the patch embedding too), class token std 0.02."""
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    conv = vit.patch_embed.proj
    nn.init.xavier_uniform_(conv.weight.data.flatten(1), generator=generator)
    nn.init.zeros_(conv.bias)
    nn.init.normal_(vit.cls_token, std=0.02, generator=generator)


def _check_vit(vit: VisionTransformer) -> None:
    problems = {
        "no class token": vit.cls_token is None,
        "prefix tokens besides the class token": getattr(vit, "num_prefix_tokens", 1) != 1,
        "no position table with a row for the class token": vit.pos_embed is None
        or getattr(vit, "no_embed_class", False),
        "global_pool other than 'token'": vit.global_pool != "token",
    }
    if found := [what for what, wrong in problems.items() if wrong]:
        raise UsageError(
            f"MiCL needs a timm VisionTransformer that pools its class token; this one has {', '.join(found)}"
        )
