"""Encoders with random weights, for speed only, and photographs made on the spot; a module of the scripts beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from micl_zoo.training.pretraining.pretrain import initial_model
from micl_zoo.training.recipes import get_recipe
from micl_zoo.training.run.rundir import encoder_config
from micl_zoo.zoo.weights import save_weights

# A network of milliseconds, for --trial and for what does not depend on the weights.
SMALL = ("name=vit_ti8.small", "image_size=64", "crop_size=64", "patch_size=8", "depth=4")
PHOTO_WIDTH, PHOTO_HEIGHT = 500, 375  # the usual size of ImageNet's photographs


def random_encoder(folder: Path, recipe: str, changes: tuple[str, ...] = ()) -> Path:
    """Write an encoder folder with random weights of a recipe's shape; its name ends in `.random`."""
    chosen = get_recipe(recipe, changes)
    config = encoder_config(chosen)
    config = dataclasses.replace(config, name=f"{config.name.partition('.')[0]}.random")
    save_weights(folder, initial_model(chosen).vit.state_dict(), config, {"recipe": "none: random weights"}, "float32")
    return folder


def photographs(folder: Path, count: int) -> Path:
    """Write JPEG files of about 60 kB: smooth colours with some noise."""
    folder.mkdir(parents=True)
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((PHOTO_WIDTH, PHOTO_HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = np.clip(smooth + random.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:04d}.jpg", quality=88)
    return folder
