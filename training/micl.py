"""The whole method: masked image contrastive learning (MiCL, arXiv 2411.09858 v1; renamed OCL in v2).

Keep a fifth of an image's patches, split them into two disjoint views, contrast the class tokens over the batch.

Shapes: B images, N patches of the whole image, K patches kept, V views (two in the paper; K/V patches each), R tokens
before the patches' (class token and registers), D width, P = 3 * patch_size ** 2 numbers a patch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import combinations
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from micl_zoo.errors import UsageError

from .recipes import kept_patches

Vit: TypeAlias = VisionTransformer | Eva
Pooled = Literal["cls", "mean", "native", "projection"]  # see `zoo.pools.Pool`
# Why models that have patches and tokens cannot be trained, by the class that timm has for them.
OTHERS = {
    "VisionTransformerDistilled": "has a second class token that is trained on a teacher's labels",
    "Beit": "has a table of relative positions of all patches, which a view has not",
    "NaFlexVit": "puts images of any shape into its sequence by itself",
}


class MiCLOutput(NamedTuple):
    """What one forward pass gives."""

    loss: Tensor  # () float32
    pooled: Tensor  # (B, V, D), what is contrasted of each view, after the final norm, not L2-normalised
    accuracy: Tensor  # () float32 without gradient: how often an image's other view is the most similar of the batch


class MiCL(nn.Module):
    """MiCL over a timm `VisionTransformer` or `Eva`; its weights are trained in place, under timm's names.

    The position table is replaced by the frozen 2-D sin-cos one, or trained as it is; no other weight is touched (see
    `init_weights`).
    """

    def __init__(
        self,
        vit: Vit,  # see `check_trainable`
        *,
        mask_ratio: float,  # share of the patches that no view sees; K = floor(N * (1 - mask_ratio)) // V * V are kept
        kappa: float = 1 / 64,  # concentration of the T-distributed spherical similarity
        temperature: float = 0.07,  # divides the similarity
        views: int = 2,  # V, at least 2
        pooled_token: Pooled = "cls",  # what is contrasted: class token, mean patch of a view, or what timm pools of it
        class_position: Literal["zero", "centre"] = "zero",  # of the frozen table's row for the class token
        # The frozen table, of a ViT with a class token alone; or the ViT's, called "own" where they are a start's.
        positions: Literal["sincos", "learned", "own"] = "sincos",
    ) -> None:
        super().__init__()
        check_trainable(vit, pooled_token)
        if not 0 <= mask_ratio < 1:
            raise UsageError(f"mask_ratio must be at least 0 and below 1, got {mask_ratio}")
        if views < 2:
            raise UsageError(f"views must be at least 2, got {views}")
        if positions != "sincos" and class_position != "zero":
            raise UsageError("class_position must be zero with learned positions: they have a row for the class token")
        self.vit, self.views, self.pooled_token = vit, views, pooled_token
        self.class_position, self.positions = class_position, positions
        self.mask_ratio, self.kappa, self.temperature = mask_ratio, kappa, temperature
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.grid_size: tuple[int, int] = vit.patch_embed.grid_size
        self.prefix: int = vit.num_prefix_tokens  # R
        if positions == "sincos":
            _check_plain(vit)
            with torch.no_grad():
                vit.pos_embed.copy_(self._sincos(self.grid_size))
        if vit.pos_embed is not None:
            vit.pos_embed.requires_grad_(positions != "sincos")

    def forward(self, pixel_values: Tensor, noise: Tensor | None = None) -> MiCLOutput:
        """Loss of a batch of whole images, (B, 3, H, W), normalised; only the visible patches are embedded.

        Where H and W differ from the ViT's own size, the positions are stretched over its grid. The patches are ordered
        by the ascending argsort of `noise`, (B, N), drawn uniformly when not given.
        """
        grid = grid_of(pixel_values, self.patch_size)
        if noise is None:
            noise = torch.rand(pixel_values.shape[0], grid[0] * grid[1], device=pixel_values.device)
        views = draw_views(noise, self.mask_ratio, self.views)  # (B, V, K/V)
        return self.contrast(gather_patches(pixel_values, views, self.patch_size), views, grid)

    def contrast(self, patches: Tensor, views: Tensor, grid: tuple[int, int]) -> MiCLOutput:
        """Loss of patches that were gathered already.

        Args:
            patches: (B, V, K/V, P), normalised pixels of the visible patches, flattened channel first.
            views: (B, V, K/V), where in the grid each patch is, row by row.
            grid: patches down and across the image they came from.
        """
        pooled = self.pool_views(patches, views, grid)
        loss, accuracy = contrastive_loss(pooled, kappa=self.kappa, temperature=self.temperature)
        return MiCLOutput(loss, pooled, accuracy)

    def pool_views(self, patches: Tensor, views: Tensor, grid: tuple[int, int]) -> Tensor:
        """What is contrasted of each view, after the final norm: (B, V, D). The arguments are those of `contrast`."""
        if self.pooled_token == "cls":
            return self.vit.norm(self._blocks(patches, views, grid)[:, :, 0])
        tokens = self.encode_views(patches, views, grid)
        if self.pooled_token == "mean":
            return tokens[:, :, self.prefix :].mean(2)
        rows = self.vit.forward_head(tokens.flatten(0, 1), pre_logits=self.pooled_token == "native")
        return rows.unflatten(0, tokens.shape[:2])

    def encode_views(self, patches: Tensor, views: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens of all views after the final norm, class token and registers first: (B, V, R + K/V, D).

        With all patches in one view, in order, they are those that timm's own forward pass gives.
        """
        return self.vit.norm(self._blocks(patches, views, grid))

    def _blocks(self, patches: Tensor, views: Tensor, grid: tuple[int, int]) -> Tensor:
        vit, sequences = self.vit, patches.shape[:2]  # B, V
        conv, positions = vit.patch_embed.proj, self._positions(grid, patches.device)
        tokens = vit.patch_embed.norm(F.linear(patches, conv.weight.flatten(1), conv.bias))  # (B, V, K/V, D)
        prefix = [one for one in (vit.cls_token, vit.reg_token) if one is not None]  # (1, 1 or more, D) each
        if positions is not None:
            first = len(positions) - grid[0] * grid[1]  # R, or 0 where only patches have positions
            tokens = tokens + F.embedding(views, positions[first:])  # not [views], whose gradient differs by run
            prefix = [torch.cat(prefix, dim=1) + positions[:first]] if first else prefix
        tokens = tokens.to(conv.weight.dtype).flatten(0, 1)  # (VB, K/V, D)
        tokens = torch.cat([*(one.expand(len(tokens), -1, -1).to(tokens.dtype) for one in prefix), tokens], dim=1)
        tokens = vit.norm_pre(tokens)  # (VB, R + K/V, D)
        rotary = self._rotary(views, grid)
        for number, block in enumerate(vit.blocks):
            turns: dict[str, Any] = {"rope": rotary[number % len(rotary)]} if rotary else {}
            if vit.grad_checkpointing:
                tokens = checkpoint(block, tokens, use_reentrant=False, **turns)
            else:
                tokens = block(tokens, **turns)
        return tokens.unflatten(0, sequences)

    def _positions(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        if self.positions == "sincos" and grid != self.grid_size:
            return self._sincos(grid).to(device)
        if (own := self.vit.pos_embed) is None or grid == self.grid_size:
            return own if own is None else own[0]
        return stretched_positions(own[0], self.grid_size, grid)

    def _rotary(self, views: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """Rotary tables at the visible patches, (VB, 1 or heads, K/V, E): none, one for all blocks, or one for each.

        On another grid than the ViT's they are those that timm gives a model for images of that size.
        """
        if (rope := getattr(self.vit, "rope", None)) is None:
            return ()
        cached = getattr(rope, "feat_shape", None)
        if cached is not None and tuple(cached) != grid:
            # with the learned frequencies themselves, if it has some: a copy of them would take their gradient
            rope = copy.deepcopy(rope, {id(one): one for one in rope.parameters()})
            rope.update_feat_shape(list(grid))
        table = rope.get_embed() if cached is not None else rope.get_embed(shape=list(grid))  # (N, E)
        table = table[None, None] if table.ndim == 2 else table  # (1 or blocks, 1 or heads, N, E)
        last = table.movedim(2, 0)  # (N, blocks, heads, E)
        rows = F.embedding(views.flatten(0, 1), last.flatten(1)).unflatten(2, last.shape[1:])
        return rows.permute(2, 0, 3, 1, 4).unbind(0)

    def _sincos(self, grid: tuple[int, int]) -> Tensor:
        return position_table(self.vit.embed_dim, grid, self.grid_size, class_position=self.class_position)


def grid_of(pixel_values: Tensor, patch_size: int) -> tuple[int, int]:
    """Patches down and across (B, 3, H, W)."""
    shape = tuple(pixel_values.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] % patch_size or shape[3] % patch_size:
        raise UsageError(f"pixel_values must be (B, 3, H, W) with H and W multiples of {patch_size}, got {shape}")
    return shape[2] // patch_size, shape[3] // patch_size


def draw_views(noise: Tensor, mask_ratio: float, views: int = 2) -> Tensor:
    """Disjoint random sets of patches, `views` an image: noise (B, N) -> indices (B, V, K/V)."""
    kept = kept_patches(noise.shape[1], mask_ratio, views)
    return noise.argsort(dim=1, stable=True)[:, :kept].unflatten(1, (views, -1))


def gather_patches(pixel_values: Tensor, views: Tensor, patch_size: int) -> Tensor:
    """The visible patches only: (B, 3, H, W) at (B, V, K/V) -> (B, V, K/V, P), each flattened channel first."""
    down, across = grid_of(pixel_values, patch_size)
    grid = pixel_values.reshape(-1, 3, down, patch_size, across, patch_size)
    rows = torch.arange(len(grid), device=views.device)[:, None, None]
    return grid.permute(0, 2, 4, 1, 3, 5)[rows, views // across, views % across].flatten(3)  # of (B, V, K/V, 3, p, p)


def contrastive_loss(
    pooled: Tensor,  # (B, V, D), a vector per view
    *,
    kappa: float,
    temperature: float,
    all_rows: Callable[[Tensor], Tensor] | None = None,
    first_row: int = 0,  # where this process's rows begin among all
) -> tuple[Tensor, Tensor]:
    """Symmetric cross-entropy over tSP similarities, in float32 at least, whatever the autocast dtype.

    With more than two views it is the mean over all pairs of views. For negatives from other processes `all_rows` turns
    the rows of this one, (B, V, D), into those of all: only this process's rows of the matrix are computed, and the
    mean over the processes is the loss of the whole batch.

    Returns:
        The loss () and, without gradient, the contrastive accuracy ().
    """
    with torch.autocast(pooled.device.type, enabled=False):
        unit = F.normalize(pooled if pooled.dtype == torch.float64 else pooled.float(), dim=-1)  # (B, V, D)
        every = unit if all_rows is None else all_rows(unit)  # (world * B, V, D)
        target = torch.arange(len(unit), device=unit.device) + first_row
        losses, hits = [], []
        for first, second in combinations(range(unit.shape[1]), 2):
            there = unit[:, first] @ every[:, second].T  # (B, world * B), who asks by who is asked
            back = there.T if all_rows is None else unit[:, second] @ every[:, first].T
            for cosine in (there, back):
                logits = 0.5 * (1 + cosine) / (1 + (1 - cosine) * kappa) / temperature
                losses.append(F.cross_entropy(logits, target))
                hits.append((logits.argmax(1) == target).float().mean())
    return torch.stack(losses).mean(), torch.stack(hits).mean()


def position_table(
    embed_dim: int,  # D
    grid: tuple[int, int],  # patches down and across
    full_grid: tuple[int, int],  # those of the images that the ViT takes
    *,
    class_position: Literal["zero", "centre"] = "zero",  # of the first row; centre: that of the middle of the full grid
) -> Tensor:
    """The fixed 2-D sin-cos positions (reference code), a row for the class token first: (1 + N, D) float32.

    The first half of a row encodes the patch's column, the second its row, each as sines then cosines at
    embed_dim / 4 frequencies. A grid smaller than `full_grid` is stretched over it: patch centres keep their place.
    """
    if embed_dim % 4:
        raise UsageError(f"embed_dim must be a multiple of 4 for sin-cos positions, got {embed_dim}")
    table = _sincos(embed_dim, *(_centres(n, full) for n, full in zip(grid, full_grid, strict=True)))
    middle = _sincos(embed_dim, *(_centres(1, full) for full in full_grid))
    return torch.cat([middle if class_position == "centre" else torch.zeros_like(middle), table]).float()


def stretched_positions(table: Tensor, full_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """A table (R + M, D) of a full grid -> (R + N, D), bilinearly, where `position_table` puts the patches of `grid`.

    The rows for class token and registers, the first, stay.
    """
    first = len(table) - full_grid[0] * full_grid[1]
    full = table[first:].unflatten(0, full_grid).permute(2, 0, 1)  # (D, down, across)
    rows = F.interpolate(full[None], size=grid, mode="bilinear", align_corners=False)[0].flatten(1).T  # (N, D)
    return torch.cat([table[:first], rows])


def _centres(count: int, full: int) -> Tensor:
    """Where the centres of `count` patches lie that are stretched over `full` of them: (count,) float64."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) * (full / count) - 0.5


def _sincos(embed_dim: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Positions of the grid of all rows and columns: (R,) and (C,) -> (R * C, D) float64."""
    frequencies = 10000.0 ** -(torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (column, row)]  # (R * C, D/4) each
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


def init_weights(
    vit: VisionTransformer, *, learned_positions: bool = False, generator: torch.Generator | None = None
) -> None:
    """Initialise in place as the paper's code: xavier-uniform Linears (the patch embedding too), class token std 0.02.

    Learned positions are drawn, too, last and with std 0.02.
    """
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
    if learned_positions:
        nn.init.normal_(vit.pos_embed, std=0.02, generator=generator)


def check_trainable(model: Any, pooled_token: Pooled = "cls") -> None:
    """Refuse a model that MiCL cannot train: its patches must be tokens that can be left out one by one.

    Raises:
        UsageError: it is no `VisionTransformer` or `Eva` of timm's, its patches are not cut as squares by one linear
            layer, or it lacks the row that is to be contrasted.
    """
    kind = type(model)
    if kind not in (VisionTransformer, Eva):
        why = "does not take patches as tokens of which most can be left out"
        raise UsageError(
            f"MiCL cannot train this model, a {kind.__name__} of timm: it {OTHERS.get(kind.__name__, why)}. It trains "
            "timm's VisionTransformer and Eva: DINO, DINOv2, DINOv3, MAE, CLIP, SigLIP, DeiT-3, EVA-02, PE and ours"
        )
    embed, tower = model.patch_embed, bool(getattr(model, "num_classes", 0))
    proj = getattr(embed, "proj", None)
    is_cut = type(embed) is PatchEmbed and isinstance(proj, nn.Conv2d) and proj.kernel_size == proj.stride
    lacks = {
        "its patches are made by convolutions that see their neighbours": not is_cut,
        "its patches are not squares": is_cut and len(set(embed.patch_size)) > 1,
        "it has no class token to contrast": pooled_token == "cls" and model.cls_token is None,
        "it has no projection to contrast": pooled_token == "projection" and not tower,
        "it pools no row to contrast": pooled_token in ("native", "projection") and not model.global_pool,
    }
    if found := [what for what, wrong in lacks.items() if wrong]:
        raise UsageError(f"MiCL cannot train this model: {' and '.join(found)}")


def _check_plain(vit: Vit) -> None:
    problems = {
        "rotary positions": getattr(vit, "rope", None) is not None,
        "no class token": vit.cls_token is None,
        "prefix tokens besides the class token": vit.num_prefix_tokens != 1,
        "no position table with a row for the class token": vit.pos_embed is None or vit.no_embed_class,
        "global_pool other than 'token'": vit.global_pool != "token",
    }
    if found := [what for what, wrong in problems.items() if wrong]:
        raise UsageError(f"sin-cos positions are for a ViT that pools its class token; this has {', '.join(found)}")
