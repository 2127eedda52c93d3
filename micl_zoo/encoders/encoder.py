"""Encoder: a timm ViT with its own transform, from pictures to embeddings.

Shapes: B images, S the transform's side in pixels, h x w = N patches, D numbers a token.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import Refused, UsageError, WeightsError, unknown
from ..images.decode import MIN_SIDE, decode, to_rgb
from ..images.transform import Transform
from .device import bf16_is_fast, resolve_device
from .weights import EncoderConfig, Weights, local_weights, record_weights
from .zoo import ARCHS, DEFAULT, Record, find_record, is_name, record_of, timm_architecture

if TYPE_CHECKING:
    from .openvino_model import OpenVinoViT

Pool = Literal["cls", "mean", "cls+mean", "patches"]
Backend = Literal["torch", "openvino", "onnx"]
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
        config: what it was built from.
        transform: from an image to pixel_values; the only right one for these weights.
        record: its row of the table, found by the sha256 of a file; None for weights that are in none.
        name: `arch.tag`.
        weights_sha256: of the file it came from, or None for random weights.
        embed_dim: D, numbers a token.
        runtime: what computes the tokens in the place of `vit`, or None: torch does.
        precision: "fp32", "fp16" or "int8" where the weights' file fixes it; None where it is chosen at each call.
    """

    def __init__(
        self, vit: VisionTransformer, config: EncoderConfig, *, record: Record | None, weights_sha256: str | None
    ) -> None:
        super().__init__()
        self.vit = vit
        self._describe(config, record, weights_sha256)

    def _describe(self, config: EncoderConfig, record: Record | None, weights_sha256: str | None) -> None:
        self.config = config
        self.transform: Transform = config.transform
        self.record = record
        self.name = config.name
        self.weights_sha256 = weights_sha256
        self.embed_dim = config.embed_dim
        self.precision: str | None = None
        self.runtime: OpenVinoViT | None = None
        self._compiled_size: int | None = None  # images a compiled batch
        self._statistics: tuple[Tensor, Tensor] | None = None
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vit.cls_token.device

    @property
    def backend(self) -> Backend:
        """What computes the tokens."""
        return "torch" if self.runtime is None else "openvino"

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), patches down and across."""
        return self.vit.patch_embed.grid_size

    def row_shape(self, pool: Pool) -> tuple[int, ...]:
        """Of one image's embedding: (D,) for "cls" and "mean", (2D,) for "cls+mean", (h, w, D) for "patches".

        Raises:
            UsageError: a pool that does not exist.
        """
        if pool == "patches":
            return (*self.grid, self.embed_dim)
        if pool not in get_args(Pool):
            raise UsageError(unknown("pool", pool, get_args(Pool)))
        return (2 * self.embed_dim if pool == "cls+mean" else self.embed_dim,)

    def forward(self, pixel_values: Tensor, pool: Pool = "cls") -> Tensor:
        """Normalised images to embeddings, from the tokens after the final norm.

        Args:
            pixel_values: (B, 3, S, S).
            pool: "cls", the class token, which MiCL trains; "mean" of the patch tokens; "cls+mean", the one beside the
                other; "patches", all patch tokens.

        Returns:
            (B, *row_shape(pool)).
        """
        self.row_shape(pool)  # raises
        return pooled(*self.features(pixel_values), pool)

    def features(self, pixel_values: Tensor) -> Features:
        """Normalised images (B, 3, S, S) -> class tokens (B, D) and patch tokens (B, h, w, D)."""
        tokens = self._tokens(pixel_values)
        return Features(tokens[:, 0], tokens[:, 1:].unflatten(1, self.grid))

    def compile_blocks(self, batch_size: int) -> None:
        """Compile the ViT's blocks with `torch.compile`, at their first use, for batches of one size.

        `embed`, `embed_pixels` and `embed_tensor` pad a smaller batch to it, so that a short last one compiles nothing.
        Call it again to change the size.

        Args:
            batch_size: images a forward pass.

        Raises:
            UsageError: the encoder does not run in torch, or there is no compiler for its device.
        """
        if self.backend != "torch":
            raise UsageError(f"the {self.backend} backend compiles by itself: leave compile out, or take backend torch")
        compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"]
        if self.device.type == "cpu" and not any(map(shutil.which, compilers)):
            raise UsageError(
                "to compile for a CPU takes a C++ compiler, none was found: install one, or do not compile"
            )
        if self._compiled_size is None:
            for block in self.vit.blocks:  # one by one: they are alike, so the first one's code serves all
                block.compile(dynamic=False)
        self._compiled_size = batch_size

    def fit_compiled(self, batch_size: int) -> None:
        """Compiled blocks are for no more than so many images from now on, because more do not fit."""
        if self._compiled_size is not None:
            self._compiled_size = min(self._compiled_size, batch_size)

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
            normalize: scale to unit length, so that a dot product is the cosine: each row, with "patches" each token.
            pool: see `forward`.

        Returns:
            (images, *row_shape(pool)) float32, in the order given.

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
        return np.concatenate(rows) if rows else np.empty((0, *self.row_shape(pool)), np.float32)

    def embed_pixels(
        self, pixels: np.ndarray, *, normalize: bool = True, pool: Pool = "cls", autocast: torch.dtype | None = None
    ) -> np.ndarray:
        """Transformed pixels (B, S, S, 3) uint8 -> (B, *row_shape(pool)) float32 on the host. See `embed_tensor`."""
        on_device = torch.from_numpy(pixels).to(self.device)
        rows = self.embed_tensor(on_device, normalize=normalize, pool=pool, autocast=autocast)
        return rows.cpu().numpy()

    @torch.inference_mode()
    def embed_tensor(
        self, pixels: Tensor, *, normalize: bool = True, pool: Pool = "cls", autocast: torch.dtype | None = None
    ) -> Tensor:
        """Transformed pixels to embeddings, both on the encoder's device; the host does not wait for it.

        Args:
            pixels: (B, S, S, 3) uint8.
            normalize, pool: see `embed`.
            autocast: the dtype of the matrix products; None for that of the weights. An ONNX file has its own.

        Returns:
            (B, *row_shape(pool)) float32.
        """
        count = len(pixels)
        autocast = None if self.precision else autocast
        if self._compiled_size and count < self._compiled_size:
            pixels = F.pad(pixels, (0, 0) * 3 + (0, self._compiled_size - count))
        with torch.autocast(self.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            rows = self(self._normalised(pixels), pool)[:count].float()
        return F.normalize(rows, dim=-1) if normalize else rows

    def _normalised(self, pixels: Tensor) -> Tensor:
        """The same as `transform.normalise`, whose constants it keeps: to send them anew would wait for the device."""
        if self._statistics is None or self._statistics[0].device != pixels.device:
            mean, std = (
                torch.tensor(v, device=pixels.device)[:, None, None] for v in (self.transform.mean, self.transform.std)
            )
            self._statistics = mean, std
        mean, std = self._statistics
        return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std  # (B, 3, S, S)

    def _check_pixels(self, pixel_values: Tensor) -> None:
        side = self.transform.size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, side, side):
            raise UsageError(
                f"pixel_values must be (B, 3, {side}, {side}), normalised as encoder.transform does it; "
                f"got {tuple(pixel_values.shape)}"
            )

    def _tokens(self, pixel_values: Tensor) -> Tensor:
        self._check_pixels(pixel_values)
        if self.runtime is not None:
            return self.runtime(pixel_values)
        return cast(Tensor, self.vit.forward_features(pixel_values.to(self.vit.cls_token)))


def pooled(cls: Tensor, patches: Tensor, pool: Pool) -> Tensor:
    """Tokens (B, D) and (B, h, w, D) to embeddings, see `Encoder.forward`."""
    if pool == "cls":
        return cls
    if pool == "patches":
        return patches
    mean = patches.flatten(1, 2).mean(1)
    return mean if pool == "mean" else torch.cat([cls, mean], dim=-1)


def load(
    name: str | os.PathLike[str] = DEFAULT,
    *,
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    backend: Backend = "torch",
    providers: Sequence[str] | None = None,
) -> Encoder:
    """Load an encoder, ready to embed.

    Args:
        name: `arch.tag`, or a bare arch for its best published tag, see `list_models`; or a path, which then stands for
            `weights`: an os.PathLike, or a text that is no name and where something is.
        weights: a .safetensors file, or a folder with `model.safetensors` and `config.json`, of your own; for backend
            "onnx" the .onnx file that `micl-zoo export` wrote, or its folder.
        pretrained: False gives random weights, and only False does.
        device: "auto" (a GPU when there is one), "cpu", "cuda", "cuda:N" or "mps".
        dtype: of the weights in memory: "float32", "bfloat16" or "float16"; "auto" is float32.
        backend: "torch", or "openvino" for Intel's and AMD's CPUs: the same numbers sooner, and no gradients. It
            computes in the precision of `torch.autocast` where the CPU has it, and keeps weights in float32. "onnx"
            takes an exported file to ONNX Runtime, and its precision with it.
        providers: for backend "onnx": ONNX Runtime's names of what is to compute, first choice first, such as
            "TensorrtExecutionProvider" or just "tensorrt". None is CUDA on a GPU, the CPU elsewhere.

    Raises:
        UsageError: a name or an argument that does not exist.
        WeightsError: weights that are not published, not reachable, or not the right ones.
    """
    name, path = _name_and_path(name, weights)
    if path is not None and not pretrained:
        raise UsageError("weights= and pretrained=False contradict each other: give one")
    _check_backend(backend, device, dtype)
    if providers is not None and backend != "onnx":
        raise UsageError(f"providers are ONNX Runtime's: they go with backend onnx, not with {backend}")
    if backend == "onnx":
        from .onnx_session import load_onnx

        if not pretrained:
            raise UsageError("backend onnx runs exported files: export random weights first, or take backend torch")
        return load_onnx(name, path, device, providers)
    target, kind = resolve_device("cpu" if backend == "openvino" else device), _resolve_dtype(dtype)
    if path is not None:
        found = local_weights(path)
        encoder = _build(found.config, found, record_of(found.sha256))
        check_arch(name, found.config)
    else:
        record = find_record(name)
        if pretrained:
            found = record_weights(record)
            encoder = _build(found.config, found, record)
        else:
            architecture, model_args = timm_architecture(**record.shape.sizes)
            config = EncoderConfig(
                record.name, architecture, model_args, record.shape.embed_dim, record.transform, record.license
            )
            encoder = _build(config, None, record)
    if backend == "openvino":
        from .openvino_model import OpenVinoViT

        encoder.runtime = OpenVinoViT(encoder.vit)
    return encoder.to(target, kind)


def _name_and_path(name: str | os.PathLike[str], weights: str | os.PathLike[str] | None) -> tuple[str, Path | None]:
    """The name asked for, and where weights lie on this machine, if they do."""
    if isinstance(name, str) and (not name or is_name(name) or not Path(name).exists()):
        return name, None if weights is None else Path(weights)
    if weights is not None:
        raise UsageError(f"weights of two places were asked for, {str(name)!r} and {str(weights)!r}: give one")
    return DEFAULT, Path(name)


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


def _check_backend(backend: str, device: str, dtype: str) -> None:
    if backend not in get_args(Backend):
        raise UsageError(unknown("backend", backend, get_args(Backend)))
    if backend == "onnx" and dtype != "auto":
        raise UsageError(f"an ONNX file has its own precision, not {dtype!r}: leave dtype out")
    if backend != "openvino":
        return
    if device not in ("auto", "cpu"):
        raise UsageError(
            f"backend openvino runs on the CPU, not on {device!r}: leave device out, or take backend torch"
        )
    if dtype not in ("auto", "float32"):
        raise UsageError(
            f"backend openvino keeps weights in float32, not in {dtype!r}: leave dtype out; the precision of the "
            "arithmetic is that of torch.autocast, or of `micl-zoo extract --precision`"
        )


def check_arch(name: str, config: EncoderConfig) -> None:
    """A name given beside `weights=` must not contradict them."""
    arch = name.partition(".")[0]
    if name != DEFAULT and arch in ARCHS and ARCHS[arch].timm_name != config.architecture:
        raise UsageError(f"{name!r} was asked for, but the weights are those of {config.name} ({config.architecture})")


def precision_advice(precision: str, device: torch.device) -> str | None:
    """One line to warn of a precision that works on the device and is slow there, or None.

    Args:
        precision: "fp32", "bf16" or "fp16".
        device: the encoder's.
    """
    better = "auto, which takes bf16 here" if bf16_is_fast(device) else "auto, which takes fp32 here"
    if precision == "fp16" and device.type == "cpu":
        return f"fp16 is several times slower than fp32 on a CPU. Take precision {better}."
    if precision == "bf16" and device.type in ("cpu", "cuda") and not bf16_is_fast(device):
        what = "CPU" if device.type == "cpu" else "GPU"
        better = better if device.type == "cpu" else "fp16"
        return f"this {what} emulates bf16, which takes longer than fp32. Take precision {better}."
    return None


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
