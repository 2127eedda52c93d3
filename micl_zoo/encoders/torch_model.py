"""A ViT in torch, the backend with gradients. T = 1 + N tokens per image, the class token first."""

from __future__ import annotations

from collections.abc import Collection

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ..errors import WeightsError
from .device import Backend, Precision
from .encoder import Output
from .weights import EncoderConfig, Weights, read_tensors


class TorchModel:
    """A timm ViT as an encoder's runtime, see `encoder.Runtime`."""

    name: Backend = "torch"
    precision: Precision | None = None

    def __init__(self, vit: VisionTransformer) -> None:
        self.vit = vit

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.vit.parameters()).device

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), patches down and across."""
        return self.vit.patch_embed.grid_size

    def outputs(self, pixel_values: Tensor, wanted: Collection[Output]) -> dict[Output, Tensor]:
        """Compute outputs, with gradients where torch records them."""
        tokens = self.vit.forward_features(pixel_values.to(next(self.vit.parameters())))
        return split_tokens(tokens, self.grid, wanted)


def split_tokens(tokens: Tensor, grid: tuple[int, int], wanted: Collection[Output]) -> dict[Output, Tensor]:
    """Cut tokens (B, T, D) into the outputs wanted: "cls" and "mean" (B, D), "patches" (B, h, w, D)."""
    found: dict[Output, Tensor] = {"cls": tokens[:, 0]}
    if "mean" in wanted:
        found["mean"] = tokens[:, 1:].mean(1)
    if "patches" in wanted:
        found["patches"] = tokens[:, 1:].unflatten(1, grid)
    return found


def build_vit(config: EncoderConfig, weights: Weights | None) -> VisionTransformer:
    """Build the timm model with the weights of a file, or with random ones, in float32."""
    try:
        vit: VisionTransformer = timm.create_model(config.architecture, num_classes=0, **config.model_args)
    except (RuntimeError, TypeError) as error:
        raise WeightsError(f"timm cannot build {config.architecture!r} with {config.model_args}: {error}") from None
    if weights is not None:
        state = {key: value.float() for key, value in read_tensors(weights.path).items()}
        try:
            vit.load_state_dict(state)
        except RuntimeError as error:
            raise WeightsError(f"{str(weights.path)!r} does not fit {config.architecture}: {error}") from None
    return vit
