"""Small images and a small encoder, made here: no test needs data or a network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a real hub; those that serve one say so
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: networks this small are slowed down by a second thread

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from micl_zoo.training.micl import init_weights, position_table
from micl_zoo.training.recipes import Recipe, get_recipe
from micl_zoo.training.run.rundir import encoder_config
from micl_zoo.zoo.weights import save_weights

# A twin of the shipped recipe that trains in seconds; every code path is the real one.
TWIN = (
    "image_size=32",
    "crop_size=32",
    "mask_ratio=0.5",
    "views=2",
    "temperature=0.07",
    "base_lr=5e-4",
    "patch_size=8",
    "embed_dim=32",
    "depth=2",
    "num_heads=2",
    "source_size=32",
    "batch_size=8",
    "epochs=4",
    "warmup_epochs=1",
    "compile=false",
    "precision=fp32",
    "checkpoint_minutes=0",
)


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """A smooth colour field with a few rectangles: like a photograph, unlike noise, different for every seed."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    for _ in range(3):
        left, top = int(random.integers(0, width - 8)), int(random.integers(0, height - 8))
        image.paste(tuple(int(v) for v in random.integers(0, 256, 3)), (left, top, left + 8, top + 8))
    return image


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of `count` JPEG files, half of them in a folder below."""

    def make(count: int = 12, name: str = "images") -> Path:
        folder = tmp_path / name
        for number in range(count):
            below = folder / "below" if number % 2 else folder
            below.mkdir(parents=True, exist_ok=True)
            picture(number, 40 + number, 44).save(below / f"{number:03d}.jpg", quality=90)
        return folder

    return make


@pytest.fixture(scope="session")
def twin() -> Recipe:
    """The shipped recipe at a size that trains in seconds."""
    return get_recipe("vit_ti16.tin200", TWIN)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory, twin: Recipe) -> Path:
    """A run's `encoder/` folder with random weights of the twin's shape."""
    folder = tmp_path_factory.mktemp("encoder")
    vit = small_vit()
    save_weights(folder, vit.state_dict(), encoder_config(twin), {"recipe": "none: random weights"}, "float32")
    return folder


def small_vit() -> VisionTransformer:
    """A ViT initialised as the method says, from seed 0."""
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    init_weights(vit, generator=torch.Generator().manual_seed(0))
    grid = vit.patch_embed.grid_size
    with torch.no_grad():
        vit.pos_embed.copy_(position_table(vit.embed_dim, grid, grid))
    return vit
