"""Encoder: a timm ViT with its own transform, from pictures to embeddings."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .decode import MIN_SIDE, Refused, decode, to_rgb
from .errors import UsageError, WeightsError
from .transforms import Transform
from .weights import EncoderConfig, Weights, local_weights, record_weights
from .zoo import ARCHS, DEFAULT, Record, find_record

Pool = Literal["cls", "mean"]
ImageLike = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


class Features(NamedTuple):
    """What the ViT says of a batch, after its final norm.

    Attributes:
        cls: (B, D), the class tokens.
        patches: (B, h, w, D), a token for each patch, where it is in the image.
    """

    cls: Tensor
    patches: Tensor


class Encoder(nn.Module):
    """An encoder in eval mode. Made by `load`.

    Attributes:
        vit: the timm model, for fine-tuning.
        transform: from an image to pixel_values; the only right one for these weights.
        record: its row of the table, or None for weights of your own.
        name: `arch.tag`.
        weights_sha256: of the file it came from, or None for random weights.
        embed_dim: D, numbers an embedding.
    """

    def __init__(
        self, vit: VisionTransformer, config: EncoderConfig, *, record: Record | None, weights_sha256: str | None
    ) -> None:
        super().__init__()
        self.vit = vit
        self.transform: Transform = config.transform
        self.record = record
        self.name = config.name
        self.weights_sha256 = weights_sha256
        self.embed_dim: int = vit.embed_dim
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vit.cls_token.device

    def forward(self, pixel_values: Tensor, pool: Pool = "cls") -> Tensor:
        """Normalised images (B, 3, H, W) -> embeddings (B, D): the class token, or the mean of the patch tokens."""
        if pool not in get_args(Pool):
            raise UsageError(f"unknown pool {pool!r}. Valid: {', '.join(get_args(Pool))}.")
        tokens = self._tokens(pixel_values)  # (B, 1 + N, D)
        return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(1)

    def features(self, pixel_values: Tensor) -> Features:
        """Normalised images (B, 3, H, W) -> class tokens (B, D) and patch tokens (B, h, w, D)."""
        tokens = self._tokens(pixel_values)
        return Features(tokens[:, 0], tokens[:, 1:].unflatten(1, self.vit.patch_embed.grid_size))

    def embed(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        batch_size: int = 64,
        normalize: bool = True,
        pool: Pool = "cls",
    ) -> np.ndarray:
        """Pictures to embeddings, through this encoder's own transform.

        Args:
            images: paths, encoded bytes, PIL images, or uint8 RGB arrays (H, W, 3); one or many.
            batch_size: images a forward pass.
            normalize: scale each row to unit length, so that a dot product is the cosine.
            pool: "cls" or "mean".

        Returns:
            (N, D) float32, in the order given.

        Raises:
            UsageError: an image that cannot be read; it is named by its place. `extract` goes on past such images.
        """
        many: Iterable[ImageLike] = [cast(ImageLike, images)] if _is_one(images) else cast(Iterable[ImageLike], images)
        rows: list[np.ndarray] = []
        batch: list[np.ndarray] = []
        for place, image in enumerate(many):
            batch.append(self.transform.pixels(_open(image, place)))
            if len(batch) == batch_size:
                rows.append(self.embed_pixels(np.stack(batch), normalize=normalize, pool=pool))
                batch = []
        if batch:
            rows.append(self.embed_pixels(np.stack(batch), normalize=normalize, pool=pool))
        return np.concatenate(rows) if rows else np.empty((0, self.embed_dim), np.float32)

    @torch.inference_mode()
    def embed_pixels(
        self, pixels: np.ndarray, *, normalize: bool = True, pool: Pool = "cls", autocast: torch.dtype | None = None
    ) -> np.ndarray:
        """Transformed pixels (B, size, size, 3) uint8 -> (B, D) float32 on the host."""
        pixel_values = self.transform.normalise(torch.from_numpy(pixels).to(self.device))
        with torch.autocast(self.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            rows = self(pixel_values, pool).float()
        rows = F.normalize(rows, dim=-1) if normalize else rows
        return cast(np.ndarray, rows.cpu().numpy())

    @torch.inference_mode()
    def embed_tensor(self, pixels, *, normalize=True, pool="cls", autocast=None):
        pixel_values = self.transform.normalise(pixels)
        with torch.autocast(self.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            rows = self(pixel_values, pool).float()
        return F.normalize(rows, dim=-1) if normalize else rows

    def row_shape(self, pool):
        return (self.embed_dim,)

    def _tokens(self, pixel_values: Tensor) -> Tensor:
        side = self.transform.size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, side, side):
            raise UsageError(
                f"pixel_values must be (B, 3, {side}, {side}), normalised as encoder.transform does it; "
                f"got {tuple(pixel_values.shape)}"
            )
        return cast(Tensor, self.vit.forward_features(pixel_values.to(self.vit.cls_token)))


def load(
    name: str = DEFAULT,
    *,
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    backend: Literal["torch"] = "torch",
) -> Encoder:
    """Load an encoder, ready to embed.

    Args:
        name: `arch.tag`, or a bare arch for its best published tag. See `list_models`.
        weights: a .safetensors file, or a folder with `model.safetensors` and `config.json`, of your own.
        pretrained: False gives random weights, and only False does.
        device: "auto" (a GPU when there is one), "cpu", "cuda", "cuda:N" or "mps".
        dtype: of the weights in memory: "float32", "bfloat16" or "float16"; "auto" is float32.
        backend: "torch".

    Raises:
        UsageError: a name or an argument that does not exist.
        WeightsError: weights that are not published, not reachable, or not the right ones.
    """
    if backend != "torch":
        raise UsageError(f"unknown backend {backend!r}. Valid: torch.")
    if weights is not None and not pretrained:
        raise UsageError("weights= and pretrained=False contradict each other: give one")
    target, kind = resolve_device(device), _resolve_dtype(dtype)
    if weights is not None:
        found = local_weights(Path(weights))
        encoder = _build(found.config, found, None)
        _check_arch(name, found.config)
    else:
        record = find_record(name)
        if pretrained:
            found = record_weights(record)
            encoder = _build(found.config, found, record)
        else:
            config = EncoderConfig(
                record.name, record.shape.timm_name, {}, record.shape.embed_dim, record.transform, record.license
            )
            encoder = _build(config, None, record)
    return encoder.to(target, kind)


def _build(config: EncoderConfig, weights: Weights | None, record: Record | None) -> Encoder:
    try:
        vit = timm.create_model(config.architecture, pretrained=False, num_classes=0, **config.model_args)
    except (RuntimeError, TypeError) as error:
        raise WeightsError(f"timm cannot build {config.architecture!r} with {config.model_args}: {error}") from None
    if weights is not None:
        state = {key: value.float() for key, value in load_file(weights.path).items()}
        try:
            vit.load_state_dict(state)
        except RuntimeError as error:
            raise WeightsError(f"{str(weights.path)!r} does not fit {config.architecture}: {error}") from None
    return Encoder(vit, config, record=record, weights_sha256=weights.sha256 if weights else None)


def _check_arch(name: str, config: EncoderConfig) -> None:
    """A name given beside `weights=` must not contradict them."""
    arch = name.partition(".")[0]
    if name != DEFAULT and arch in ARCHS and ARCHS[arch].timm_name != config.architecture:
        raise UsageError(f"{name!r} was asked for, but the weights are those of {config.name} ({config.architecture})")


def resolve_device(device: str) -> torch.device:
    """ "auto" is a GPU when there is one, else Apple's, else the CPU.

    Raises:
        UsageError: a device this machine, or this build of torch, does not have.
    """
    if device == "auto":
        has_mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return target


def bf16_is_fast(device: torch.device) -> bool:
    """The device multiplies bf16 matrices faster than float32 ones: Ampere and later, AVX-512 BF16, AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private to torch, so asked for with care
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def _resolve_dtype(dtype: str) -> torch.dtype:
    valid = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in valid:
        raise UsageError(f"unknown dtype {dtype!r}. Valid: {', '.join(valid)}.")
    return valid[dtype]


def _is_one(images: Any) -> bool:
    return isinstance(images, str | os.PathLike | bytes | Image.Image) or (
        isinstance(images, np.ndarray) and images.ndim == 3
    )


def _open(image: ImageLike, place: int) -> Image.Image:
    try:
        if isinstance(image, str | os.PathLike):
            return decode(Path(image).read_bytes())
        if isinstance(image, bytes):
            return decode(image)
        if isinstance(image, np.ndarray):
            return _from_array(image)
        if min(image.size) < MIN_SIDE:
            raise Refused("too_small", f"{image.size}")
        return to_rgb(image)
    except Refused as refused:
        what = image if isinstance(image, str | os.PathLike) else type(image).__name__
        raise UsageError(f"image {place} ({what}): {refused.detail} [{refused.reason}]") from None
    except OSError as error:
        raise UsageError(f"image {place}: {error}") from None


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or min(array.shape[:2]) < MIN_SIDE:
        raise Refused("unsupported", f"an array must be (H, W, 3) uint8 RGB, got {array.shape} {array.dtype}")
    return Image.fromarray(array)
