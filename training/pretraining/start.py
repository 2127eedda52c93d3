"""The encoder that a run starts from, in the place of random weights: what it fixes of a recipe, what is trained."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from micl_zoo.encoders.encoder import Encoder
from micl_zoo.encoders.load import load
from micl_zoo.errors import UsageError
from micl_zoo.zoo.config import NAME
from micl_zoo.zoo.weights import EncoderConfig

from ..micl import MiCL, Pooled, Vit, check_trainable
from ..recipes import Recipe, overridden

# Fields of a recipe that say what the network is: those of the start hold.
NETWORK = (
    "image_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "norm_eps", "prefix_tokens",
    "positions", "class_position", "pooled_token", "pixel_mean", "pixel_std",
)  # fmt: skip
POOLED: dict[str, Pooled] = {"cls": "cls", "cls+mean": "cls", "mean": "mean", "projection": "projection"}


@dataclass(frozen=True)
class Start:
    """An encoder that MiCL can train, in float32 on the CPU; its own weights are not changed."""

    encoder: Encoder

    @classmethod
    def open(cls, given: Encoder | str | os.PathLike[str], image_size: int | None = None) -> Start:
        """Load an encoder, or take a loaded one.

        Raises:
            UsageError, WeightsError: it cannot be loaded, or not trained, see `check_trainable`.
        """
        if isinstance(given, Encoder) and image_size and given.config.size != (image_size, image_size):
            raise UsageError(
                f"image_size {image_size} is not that of the encoder, which is loaded already: give what it is loaded "
                f"by, or load it with image_size={image_size}"
            )
        encoder = given if isinstance(given, Encoder) else load(given, image_size=image_size, device="cpu")
        if encoder.backend != "torch":
            raise UsageError(f"training needs the encoder in torch, not in {encoder.backend}: load it without backend")
        encoder.check_float32()
        start = cls(encoder)
        check_trainable(encoder.model, start.pooled)
        height, width = encoder.config.size
        if height != width:
            raise UsageError(
                f"{encoder.name} takes images of {width} x {height} pixels, and training cuts squares: give an "
                f"image_size, such as {min(height, width)}"
            )
        return start

    @property
    def name(self) -> str:
        """What is made of it is called, unless it is given another name."""
        name = f"{self.encoder.name}-adapted"
        return name if NAME.fullmatch(name) else "encoder.adapted"

    @property
    def pooled(self) -> Pooled:
        """What of it is contrasted: the row that it embeds with."""
        return POOLED.get(self.encoder.pool, "native")

    def model(self) -> Vit:
        """Copy its network, all of it to be trained, in eval mode: the method has no dropout."""
        return cast(Vit, copy.deepcopy(self.encoder.model)).eval().requires_grad_(True)

    def with_weights(self, state: dict[str, Any]) -> Encoder:
        """Copy it with other weights."""
        made = copy.deepcopy(self.encoder)
        made.model.load_state_dict(state)
        return made

    def mixed(self, state: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        """Replace a share of other weights by its own (WiSE-FT, arXiv 2109.01903)."""
        own = self.encoder.model.state_dict()
        return {
            key: one.lerp(own[key].to(one.device), share) if one.is_floating_point() else one
            for key, one in state.items()
        }

    def facts(self) -> dict[str, str | None]:
        """Say for run.json and for the finished file what it is."""
        (name, sha256), terms = self.encoder.identity(), self.encoder.config_to_save().license
        return {"encoder": name, "encoder_sha256": sha256, "source": self.encoder.source, "license": terms}

    def config(self, recipe: Recipe) -> EncoderConfig:
        """Say how to build what a recipe makes of it; the start's licence travels along."""
        return dataclasses.replace(self.encoder.config_to_save(), name=recipe.name, source=None)

    def recipe(self, recipe: Recipe, overrides: Iterable[str] = ()) -> Recipe:
        """Put its network into a recipe, and then changes of other fields.

        Crops keep to whole patches: their side is rounded down to some where the recipe was meant for others.
        """
        fixed, changes = self.network(), tuple(overrides)
        if given := [name for name in (change.partition("=")[0] for change in changes) if name in NETWORK]:
            raise UsageError(f"{given[0]} is that of the encoder that the run starts from: leave it out")
        side = fixed["patch_size"]
        crop = max(side, recipe.crop_size // side * side)
        return overridden(dataclasses.replace(recipe, **fixed, crop_size=crop), changes)

    def network(self) -> dict[str, Any]:
        """Say what the network is, in fields of a recipe."""
        vit, transform = cast(Any, self.encoder.model), self.encoder.transform
        block, width = vit.blocks[0], int(vit.embed_dim)
        matrices = sum(one.numel() for one in block.parameters() if one.ndim > 1)
        return {
            "image_size": self.encoder.config.size[0],
            "patch_size": int(vit.patch_embed.patch_size[0]),
            "embed_dim": width,
            "depth": len(vit.blocks),
            "num_heads": int(getattr(getattr(block, "attn", block), "num_heads", 1)),
            # of a gated MLP that of a plain one with as many weights: 4 D^2 of a block are the attention's
            "mlp_ratio": max(0.1, round((matrices / width**2 - 4) / 2, 4)),
            "norm_eps": float(getattr(getattr(block, "norm1", None), "eps", 1e-6)),
            "prefix_tokens": int(vit.num_prefix_tokens),
            "positions": "own",
            "class_position": "zero",
            "pooled_token": self.pooled,
            "pixel_mean": tuple(transform.mean),
            "pixel_std": tuple(transform.std),
        }


def freeze(model: MiCL, recipe: Recipe) -> None:
    """Take out of training what a recipe keeps, and what the row that is contrasted does not depend on."""
    vit: Any = model.vit
    kept: list[Any] = [] if recipe.pooled_token == "projection" else [vit.head]
    kept += [vit.fc_norm, vit.attn_pool] if recipe.pooled_token in ("cls", "mean") else []
    kept += [vit.pos_embed, getattr(vit, "rope", None)] if recipe.frozen_positions or recipe.frozen_blocks else []
    kept += [vit.patch_embed] if recipe.frozen_embedding or recipe.frozen_blocks else []
    if recipe.frozen_blocks:
        kept += [vit.cls_token, vit.reg_token, vit.norm_pre, *vit.blocks[: recipe.frozen_blocks]]
    for one in kept:
        if one is not None:
            one.requires_grad_(False)
