"""Encoder: images to embeddings, by its own transform and whatever backend computes its outputs.

Shapes: B images, S the transform's side in pixels, h x w patches, D numbers per embedding.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import Refused, UsageError, unknown
from ..files import read_regular
from ..images.decode import MIN_SIDE, Exif, decode, refusal_of, to_rgb
from ..images.transform import Transform
from .device import BACKENDS, Backend, Output, Pool, Precision, autocasting, has_compiler
from .weights import EncoderConfig
from .zoo import Record

if TYPE_CHECKING:
    from .onnx_session import OnnxCard

ImageLike = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryIO
    | dict[str, Any]
    | Image.Image
    | np.ndarray
    | Tensor
)
Bytes = bytes | bytearray | memoryview
_CHANNELS = (1, 3, 4)  # grey, RGB, RGB and alpha
_WANTED = (
    "give paths, encoded bytes, open files, PIL images, dictionaries with bytes or path, or uint8 arrays or tensors of "
    "(H, W) or (H, W, 1, 3 or 4)"
)


class Features(NamedTuple):
    """An encoder's features of a batch, after its final norm.

    Attributes:
        cls: (B, D), the class tokens.
        patches: (B, h, w, D), one token per patch, where the patch is in the image.
    """

    cls: Tensor
    patches: Tensor


class Runtime(Protocol):
    """What computes an encoder's outputs: one class per backend, chosen by `load`."""

    model: Any  # the timm model whose weights these are; None: only the backend's own file has them

    name: Backend
    precision: Precision | None  # that the weights' file fixes; None: each call chooses it

    @property
    def device(self) -> torch.device:
        """Where pixels must be and embeddings are."""

    @property
    def shapes(self) -> Mapping[Output, tuple[int, ...]]:
        """Shape of each output that it has, per image: (D,), and (h, w, D) of "patches"."""

    def outputs(self, pixel_values: Tensor, wanted: Collection[Output]) -> dict[Output, Tensor]:
        """Compute the outputs wanted of (B, 3, S, S): "patches" (B, h, w, D), the others (B, D)."""


class Encoder(nn.Module):
    """An encoder in eval mode. Made by `load`.

    Attributes:
        model: the timm model, for fine-tuning; an AttributeError on backend onnx. A model put in its place is what
            backend torch computes with from then on. A ViT's is `vit`, too.
        runtime: what computes the outputs.
        config: what it was built from.
        transform: from an image to pixel_values; the only right one for these weights.
        record: its row of the table, found by the sha256 of a file; None for weights that are in none.
        name: `arch.tag`.
        source: hf-hub:OWNER/NAME@COMMIT that its weights came from, or None.
        pool: how it embeds unless told otherwise, see `forward`.
        weights_sha256: of the file it came from, or None for random weights.
        card: what an ONNX file says of itself; None on the other backends.
    """

    model: nn.Module

    def __init__(
        self, runtime: Runtime, config: EncoderConfig, *, record: Record | None, weights_sha256: str | None
    ) -> None:
        super().__init__()
        self.runtime = runtime
        if runtime.model is not None:
            self.model = runtime.model
        self.config = config
        self.transform: Transform = config.transform
        self.record = record
        self.name = config.name
        self.source = config.source
        self.weights_sha256 = weights_sha256
        self.pool: Pool = config.pool if config.pool != "native" else _own_name(runtime)
        self.card: OnnxCard | None = getattr(runtime, "card", None)
        self._compiled_size: int | None = None  # images per compiled batch
        self.eval()

    def __setattr__(self, name: str, value: Any) -> None:
        name = "model" if name == "vit" else name
        super().__setattr__(name, value)
        if name == "model":
            self.runtime.model = value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in ("model", "vit"):
                raise
            if self.runtime.model is None:
                raise AttributeError("an exported file has no torch model: load with backend='torch'") from None
            raise

    @property
    def vit(self) -> VisionTransformer:
        """The timm model of a ViT."""
        if not isinstance(self.model, VisionTransformer):
            raise AttributeError(f"{self.config.architecture} is no VisionTransformer of timm: its model is `.model`")
        return self.model

    @property
    def device(self) -> torch.device:
        """Where pixels and embeddings are."""
        return self.runtime.device

    @property
    def backend(self) -> Backend:
        """What computes the outputs."""
        return self.runtime.name

    @property
    def precision(self) -> Precision | None:
        """The precision that the weights' file fixes, as ONNX files do; None: each call chooses it."""
        return self.runtime.precision

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The pools that it has, see `forward`."""
        has = self.runtime.shapes
        return tuple(pool for pool in get_args(Pool) if all(part in has for part in pool.split("+")))

    @property
    def embed_dim(self) -> int:
        """D, numbers per embedding by its own pool."""
        return self.row_shape()[-1]

    def row_shape(self, pool: Pool | None = None) -> tuple[int, ...]:
        """Return one embedding's shape: (D,), the sum of both widths for "cls+mean", (h, w, D) for "patches".

        Raises:
            UsageError: the encoder does not have the pool.
        """
        pool = pool or self.pool
        if pool not in get_args(Pool):
            raise UsageError(unknown("pool", pool, self.pools))
        if pool not in self.pools:
            raise UsageError(f"{self.name} has no pool {pool!r}: take one of {', '.join(self.pools)}")
        shapes = [self.runtime.shapes[cast(Output, part)] for part in pool.split("+")]
        return shapes[0] if len(shapes) == 1 else (sum(width for (width,) in shapes),)

    def forward(self, pixel_values: Tensor, pool: Pool | None = None) -> Tensor:
        """Compute embeddings of normalised images.

        Args:
            pixel_values: (B, 3, S, S).
            pool: None is the encoder's own: for ours "cls", the class token, which MiCL trains. "native", the row that
                timm pools, as the classifier of the model would get it; "projection", a CLIP's into the space of its
                texts; "mean" of the patch tokens; "cls+mean", the two side by side; "patches", all patch tokens, or a
                CNN's last map. See `pools`.

        Returns:
            (B, *row_shape(pool)).

        Raises:
            UsageError: the pool, the shape or gradients cannot be had.
        """
        pool = pool or self.pool
        self.row_shape(pool)  # raises
        parts = cast("list[Output]", pool.split("+"))
        found = self.outputs(pixel_values, parts)
        return torch.cat([found[part] for part in parts], dim=-1) if len(parts) > 1 else found[parts[0]]

    def features(self, pixel_values: Tensor) -> Features:
        """Compute the class tokens (B, D) and patch tokens (B, h, w, D) of normalised images (B, 3, S, S)."""
        self.row_shape("cls+mean")  # raises where there are none
        found = self.outputs(pixel_values, ("cls", "patches"))
        return Features(found["cls"], found["patches"])

    def outputs(self, pixel_values: Tensor, wanted: Collection[Output]) -> dict[Output, Tensor]:
        """Compute at least the outputs wanted: "patches" (B, h, w, D), the others (B, D)."""
        size = self.config.size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, *size):
            wanted_shape = f"(B, 3, {size[0]}, {size[1]}), normalised as encoder.transform does it"
            raise UsageError(f"pixel_values must be {wanted_shape}; got {tuple(pixel_values.shape)}")
        return self.runtime.outputs(pixel_values, wanted)

    def compile_blocks(self, batch_size: int) -> None:
        """Compile the model's blocks with `torch.compile`, at their first use, for batches of one size.

        `embed`, `embed_pixels` and `embed_tensor` pad a smaller batch to it, so that a short last one compiles nothing.
        Call it again to change the size.

        Args:
            batch_size: images per forward pass.

        Raises:
            UsageError: the encoder does not run in torch, or there is no compiler for its device.
        """
        if not BACKENDS[self.backend].compiles:
            raise UsageError(f"the {self.backend} backend compiles by itself: leave compile out, or take backend torch")
        if self.device.type == "cpu" and not has_compiler():
            raise UsageError(
                "compiling for the CPU needs a C++ compiler and none was found: install one, or leave out --compile"
            )
        if self._compiled_size is None:
            for block in _blocks(self.model):  # one by one: they are alike, so the first one's code serves all
                block.compile(dynamic=False)
        self._compiled_size = batch_size

    def fit_compiled(self, batch_size: int) -> None:
        """Cap the batch size of the compiled blocks after an out-of-memory error."""
        if self._compiled_size is not None:
            self._compiled_size = min(self._compiled_size, batch_size)

    def embed(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        batch_size: int = 64,
        normalize: bool = True,
        pool: Pool | None = None,
    ) -> np.ndarray:
        """Embed images through this encoder's own transform.

        Args:
            images: one or many of: paths, encoded bytes, files open in binary mode, PIL images, dictionaries of data
                sets (`{"bytes": …, "path": …}`), uint8 arrays or tensors (H, W) or (H, W, 1, 3 or 4), of which four
                are RGB and alpha. An array or tensor of four axes is many.
            batch_size: images per forward pass.
            normalize: scale to unit length, so that a dot product is the cosine: each row, with "patches" each token.
            pool: see `forward`.

        Returns:
            (images, *row_shape(pool)) float32, in the order given.

        Raises:
            UsageError: batch_size is no whole number of at least 1, or an image cannot be read; the text has its place.
                `extract` goes on past such images.
        """
        size, many = _whole(batch_size), one_or_many(images)
        pixels = (self.transform.pixels(open_image(image, place)) for place, image in enumerate(many))
        rows = [np.empty((0, *self.row_shape(pool)), np.float32)]
        while batch := list(islice(pixels, size)):
            rows.append(self.embed_pixels(np.stack(batch), normalize=normalize, pool=pool))
        return np.concatenate(rows)

    def embed_pixels(
        self,
        pixels: np.ndarray,
        *,
        normalize: bool = True,
        pool: Pool | None = None,
        autocast: torch.dtype | None = None,
    ) -> np.ndarray:
        """Embed transformed pixels (B, S, S, 3) uint8: (B, *row_shape(pool)) float32. See `embed_tensor`."""
        on_device = torch.from_numpy(pixels).to(self.device)
        return self.embed_tensor(on_device, normalize=normalize, pool=pool, autocast=autocast).cpu().numpy()

    @torch.inference_mode()
    def embed_tensor(
        self, pixels: Tensor, *, normalize: bool = True, pool: Pool | None = None, autocast: torch.dtype | None = None
    ) -> Tensor:
        """Embed transformed pixels on the encoder's device, where the embeddings stay; the host does not wait for it.

        Args:
            pixels: (B, S, S, 3) uint8.
            normalize: see `embed`.
            pool: see `forward`.
            autocast: dtype of the matrix products, None for that of the weights. ONNX files keep their own.

        Returns:
            (B, *row_shape(pool)) float32.
        """
        count = len(pixels)
        if self._compiled_size and count < self._compiled_size:
            pixels = F.pad(pixels, (0, 0) * 3 + (0, self._compiled_size - count))
        with autocasting(self.device, None if self.precision else autocast):
            rows = self(self.transform.normalise(pixels), pool)[:count].float()
        return F.normalize(rows, dim=-1) if normalize else rows


def _own_name(runtime: Runtime) -> Pool:
    """Say by which name stores hold a model's own row: a class token by that one."""
    model: Any = runtime.model
    is_token = isinstance(model, VisionTransformer) and model.global_pool == "token" and "cls" in runtime.shapes
    return "cls" if is_token and isinstance(model.fc_norm, nn.Identity) else "native"


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Find what to compile: a transformer's blocks; else the stages, and whatever else is called by itself."""
    children = [model.blocks] if isinstance(getattr(model, "blocks", None), nn.Module) else model.children()
    found = [list(one) if isinstance(one, nn.Sequential | nn.ModuleList) else [one] for one in children]
    return [cast(nn.Module, block) for blocks in found for block in blocks]


def _whole(batch_size: Any) -> int:
    """Return a size of whatever type as one that Python can count to."""
    try:
        size = min(operator.index(batch_size), sys.maxsize)
    except TypeError:
        raise UsageError(f"batch_size must be a whole number, got {batch_size!r}") from None
    if size < 1:
        raise UsageError(f"batch_size must be at least 1, got {size}")
    return size


def one_or_many(images: Any) -> Iterable[Any]:
    """Go through what `Encoder.embed` takes image by image."""
    return [images] if _is_one(images) else _iterated(images)


def _is_one(images: Any) -> bool:
    """Tell one image from many: an array of three axes is one, for (N, H, W) and (3, H, W) cannot be told apart."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim in (2, 3)
    return isinstance(images, str | os.PathLike | Image.Image | dict | Bytes) or hasattr(images, "read")


def _iterated(images: Any) -> Iterable[Any]:
    try:
        if isinstance(images, Tensor):  # one by one they would be copied from their device one by one
            images = _on_host(images)
        if isinstance(images, np.generic):  # some iterate over nothing
            raise TypeError
        return iter(images)
    except Refused as refused:
        raise UsageError(f"images: {refused.detail}") from None
    except TypeError:  # not iterable, an array without axes
        raise UsageError(f"images: {_WANTED}; got {_shown(images)}") from None


def open_image(image: Any, place: int, exif: Exif = "upright") -> Image.Image:
    """Decode or convert whatever is an image to RGB; UsageError, which has its place, where that cannot be."""
    try:
        found = _decoded(image)
        if min(found.size) < MIN_SIDE:
            raise Refused("too_small", f"{found.size}")
        return to_rgb(found, exif=exif)
    except Exception as error:  # images and files that others opened raise whatever damage makes them raise
        refused = error if isinstance(error, Refused) else refusal_of(error)
        why = f"{refused.detail} [{refused.reason}]" if refused else str(error) or type(error).__name__
        raise UsageError(f"image {place} ({_shown(image)}): {why}") from None


def _decoded(image: Any) -> Image.Image:
    """Decode or convert whatever is an image without a doubt."""
    if (data := encoded(image)) is not None:
        return decode(data)
    image = _of_dict(image)
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        image = _on_host(image).numpy()
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise Refused("unsupported", _WANTED)


def encoded(image: Any) -> bytes | None:
    """Return the bytes of an image that is encoded, be it in a file; None of one that is pixels already."""
    image = _of_dict(image)
    if isinstance(image, Bytes):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        path = os.fsdecode(image)
        if "://" in path and not Path(path).exists():
            raise Refused("unreadable", "an address is not fetched here: `extract` reads it, or give its bytes")
        return read_regular(Path(path))
    return None if isinstance(image, Image.Image) or not hasattr(image, "read") else _read(image)


def _of_dict(image: Any) -> Any:
    """Take what a dictionary, as data sets have it, holds: bytes, else the path of a file."""
    if isinstance(image, dict):
        return next((image[key] for key in ("bytes", "path") if image.get(key) is not None), None)
    return image


def _read(file: BinaryIO) -> bytes:
    if getattr(file, "seekable", bool)():  # from its start, as Pillow reads it
        file.seek(0)
    data: object = file.read()
    if isinstance(data, Bytes):
        return bytes(data)
    if isinstance(data, str):
        raise Refused("unsupported", "the file is open as text: open it in mode 'rb'")
    raise Refused("unreadable", f"its read() gives {type(data).__name__}, not bytes")


def _on_host(tensor: Tensor) -> Tensor:
    """Copy a tensor of pixels from wherever it is."""
    if tensor.dtype != torch.uint8:
        got = str(tensor.dtype).removeprefix("torch.")
        raise Refused("unsupported", f"a tensor must be uint8, 0 to 255; got {got}: scale and convert it")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "nested" if tensor.is_nested else "meta" if tensor.is_meta else str(tensor.layout)
        raise Refused("unsupported", f"a tensor must be dense, with its pixels in memory; got a {kind} one")
    return tensor.detach().cpu().resolve_neg()


def _from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8:
        raise Refused("unsupported", f"an array must be uint8, 0 to 255; got {array.dtype}: scale and convert it")
    if array.ndim not in (2, 3) or channels not in _CHANNELS or not array.size:
        hint = ": move its first axis to the end" if array.ndim == 3 and array.shape[0] in _CHANNELS else ""
        raise Refused(
            "unsupported", f"an array must be (H, W), or (H, W, C) of {_CHANNELS} channels; got {array.shape}{hint}"
        )
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and channels == 1 else array))


def _shown(image: Any) -> str:
    return str(image) if isinstance(image, str | os.PathLike) else type(image).__name__
