"""The picture of what the network sees: the two masked views of some images."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from ..recipes import Recipe

PICTURE_IMAGES = 8  # shown of a batch
PICTURE_TILE = 112  # pixels that a view is at least wide: small crops are enlarged by a whole number
PICTURE_GAP = 8  # pixels between views
HIDDEN = 128  # the grey of what a view does not show
GROUND = 48  # the grey between views: dark enough that the two cannot be confused


def views_picture(patches: Tensor, views: Tensor, recipe: Recipe) -> Image.Image:
    """Draw what the network sees of the first eight images of a batch: view 1 on top; all else is grey.

    `patches` are normalised, (B, V, K/V, P), each channel first; `views` (B, V, K/V) tells where in the crop's grid.
    """
    rows, count, side, grid = recipe.views, min(PICTURE_IMAGES, len(patches)), recipe.patch_size, recipe.grid
    mean, std = (torch.tensor(v)[:, None, None] for v in (recipe.pixel_mean, recipe.pixel_std))
    pixels = patches[:count].detach().float().cpu().unflatten(3, (3, side, side)) * std + mean
    cells = torch.full((count, rows, grid * grid, 3, side, side), HIDDEN, dtype=torch.uint8)
    image, view = torch.arange(count)[:, None, None], torch.arange(rows)[None, :, None]
    cells[image, view, views[:count].cpu()] = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    tiles = cells.unflatten(2, (grid, grid)).permute(0, 1, 2, 5, 3, 6, 4).reshape(count, rows, grid * side, -1, 3)
    enlarge = max(1, PICTURE_TILE // (grid * side))
    pitch = enlarge * grid * side + PICTURE_GAP
    sheet = Image.new("RGB", (count * pitch + PICTURE_GAP, rows * pitch + PICTURE_GAP), (GROUND,) * 3)
    for column, image_views in enumerate(tiles.numpy()):
        for row, tile in enumerate(image_views):
            shown = Image.fromarray(tile).resize((pitch - PICTURE_GAP,) * 2, Image.Resampling.NEAREST)
            sheet.paste(shown, (PICTURE_GAP + column * pitch, PICTURE_GAP + row * pitch))
    return sheet
