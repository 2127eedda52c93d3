"""Encoder: images to embeddings, by its own transform and whatever backend computes its outputs.

Shapes: B images, S the transform's side in pixels, h x w patches, D numbers per embedding.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast, get_args, overload

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import UsageError, unknown
from ..files import file_sha256, local_path
from ..images.transform import Transform
from ..progress import progress as progress_bar
from ..zoo.ours import Record
from ..zoo.pools import Output, Pool
from ..zoo.weights import CHANGED, CONFIG_FILE, WEIGHTS_FILE, EncoderConfig, save_weights
from .build import check_described, fingerprint
from .device import BACKENDS, Backend, Precision, autocasting, has_compiler
from .inputs import ImageLike, Skipped, each_made, one_or_many
from .torch_model import evaluating, own_pool

if TYPE_CHECKING:
    from .onnx_session import OnnxCard

Images = ImageLike | Iterable[ImageLike]


class Features(NamedTuple):
    """An encoder's features of a batch, after its final norm.

    Attributes:
        cls: (B, D), the class tokens.
        patches: (B, h, w, D), one token per patch, where the patch is in the image.
    """

    cls: Tensor
    patches: Tensor


class Embedded(NamedTuple):
    """Embeddings of the images that can be read, and what is known of the others.

    Attributes:
        rows: (N, *row_shape(pool)) float32.
        kept: (N,) int64, the place of each row's image among those given.
        skipped: the images left out: `place`, `name`, `reason` (one word, see `Refused`), `detail`.
    """

    rows: np.ndarray
    kept: np.ndarray
    skipped: list[Skipped]


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

    def forget(self) -> None:
        """Take nothing for granted of what was made of the model's weights: they have changed."""


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
        pool: how it embeds unless told otherwise, see `forward`.
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
        self.pool: Pool = own_pool(config.pool, runtime.model)
        if runtime.model is None and self.pool not in self.pools:
            self.pool = self.pools[0]  # what an exported file was made for
        self.card: OnnxCard | None = getattr(runtime, "card", None)
        self._file_sha256 = weights_sha256
        self._loaded = self._fingerprint() if weights_sha256 else ""  # of the weights as they came from that file
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Encoder:
        """Do as torch does for `.to()` and the like: in another data type the weights are still those of the file."""
        before, as_loaded = self._dtype(), not self.changed
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if as_loaded and self._file_sha256 and self._dtype() != before:
            self._loaded = self._fingerprint()
        return self

    def _dtype(self) -> torch.dtype | None:
        return next((one.dtype for one in self.parameters()), None)

    def _fingerprint(self) -> str:
        return fingerprint(self.runtime.model) if self.runtime.model is not None else ""

    @property
    def changed(self) -> bool:
        """Whether the weights have been changed, as by fine-tuning, since they were loaded from a file."""
        return self._file_sha256 is not None and self._fingerprint() != self._loaded

    @property
    def weights_sha256(self) -> str | None:
        """The sha256 of the file that the weights came from; None for random weights and where they were changed."""
        return None if self.changed else self._file_sha256

    @property
    def source(self) -> str | None:
        """The hf-hub:OWNER/NAME@COMMIT that the weights came from; None for others and where they were changed."""
        return None if self.changed else self.config.source

    def identity(self) -> tuple[str, str]:
        """Return name and sha256 of the file of these weights, the one that `save` would write if there is none yet.

        A store has these two in its manifest, so it knows a changed encoder again that is saved only later.
        """
        if (known := self.weights_sha256) is not None:
            return self.name, known
        self.runtime.forget()
        with TemporaryDirectory() as folder:
            return self.config_to_save().name, file_sha256(self.save(folder))

    def check_float32(self) -> None:
        """Refuse weights that are not in float32, as stores and training take them: precision is the arithmetic's.

        Raises:
            UsageError: they were loaded in another data type, or turned into one.
        """
        if (found := self._dtype()) not in (None, torch.float32):
            kept = str(found).removeprefix("torch.")
            way_on = "load it without dtype; the arithmetic is a matter of precision"
            raise UsageError(f"the encoder's weights are in {kept}, and stores and training take float32: {way_on}")

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write `model.safetensors` and `config.json`, which `micl_zoo.load` and timm's `local-dir:` take.

        The same weights make the same file, in their own data type. Its header says what they were loaded from and
        whether they have been changed since; if so, the name ends in "-changed".

        Args:
            folder: made if need be.
            overwrite: replace an encoder that is in the folder.

        Returns:
            The path of model.safetensors.

        Raises:
            UsageError: the encoder has no torch model, or one that was rebuilt in memory; there is an encoder already,
                or the folder cannot be written to.
        """
        if self.runtime.model is None:
            raise UsageError("an exported file has no torch model to save: copy the file")
        place = local_path(folder)
        if not overwrite and (there := [name for name in (WEIGHTS_FILE, CONFIG_FILE) if (place / name).exists()]):
            raise UsageError(f"{str(place / there[0])!r} exists: take another folder, or overwrite=True")
        check_described(self.runtime.model, self.config_to_save())
        state, changed = self.runtime.model.state_dict(), self.changed if self._file_sha256 else None
        source = {"encoder": self.name, "source": self.config.source, "encoder_sha256": self._file_sha256}
        try:
            return save_weights(place, state, self.config_to_save(), source | {"changed": changed}, None)
        except OSError as error:
            raise UsageError(f"cannot write to {str(place)!r}: {error.strerror or error}") from None

    def config_to_save(self) -> EncoderConfig:
        """Return what `save` says of how to build it."""
        name = f"{self.name.removesuffix(CHANGED)}{CHANGED}" if self.changed else self.name
        classes = getattr(self.model, "num_classes", 0)  # that of the file was left out, one may be new
        terms = self.record.license if self.record else self.config.license
        config = self.config.settled(resampled=hasattr(self.model, "set_input_size"))
        how: Any = {"pool": self.pool, "transform": self.transform}
        return replace(config, name=name, num_classes=classes, license=terms, **how)

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
            way_on = " or export the encoder again with --outputs" if self.card else ""
            raise UsageError(f"{self.name} has no pool {pool!r}: take one of {', '.join(self.pools)}{way_on}")
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

    @overload
    def embed(
        self, images: Images, *, batch_size: int = ..., normalize: bool = ..., pool: Pool | None = ...,
        workers: int = ..., progress: bool = ..., skip_bad: Literal[False] = ...,
    ) -> np.ndarray: ...  # fmt: skip

    @overload
    def embed(
        self, images: Images, *, batch_size: int = ..., normalize: bool = ..., pool: Pool | None = ...,
        workers: int = ..., progress: bool = ..., skip_bad: Literal[True],
    ) -> Embedded: ...  # fmt: skip

    def embed(
        self,
        images: Images,
        *,
        batch_size: int = 64,
        normalize: bool = True,
        pool: Pool | None = None,
        skip_bad: bool = False,
        workers: int = 0,
        progress: bool = False,
    ) -> np.ndarray | Embedded:
        """Embed images through this encoder's own transform.

        Args:
            images: one or many of: paths, encoded bytes, files open in binary mode, PIL images, images and rows of
                `datasets` (`{"bytes": …, "path": …}`, `{"image": …}`), arrays or tensors (H, W) or (H, W, 1, 3 or 4),
                of which four are RGB and alpha; tensors also (1, 3 or 4, H, W). White is 255 in uint8, 65,535 in
                uint16, 1 in floats, True in booleans. An array or tensor of four axes is many.
            batch_size: images per forward pass.
            normalize: scale to unit length, so that a dot product is the cosine: each row, with "patches" each token.
            pool: see `forward`.
            skip_bad: leave out images that cannot be read, and say which.
            workers: number of threads that read paths and decode, beside the one that runs the model.
            progress: show a progress bar, on a terminal.

        Returns:
            (images, *row_shape(pool)) float32, in the order given; with skip_bad an `Embedded` of those that can be
            read.

        Raises:
            UsageError: batch_size or workers is no such number, or an image cannot be read; the text has its place.
        """
        size, threads, many = _whole("batch_size", batch_size, 1), _whole("workers", workers, 0), one_or_many(images)
        kept, skipped, rows = list[int](), list[Skipped](), [np.empty((0, *self.row_shape(pool)), np.float32)]
        made = each_made(many, self.transform.pixels, threads)
        total = operator.length_hint(many) or None

        def readable() -> Iterator[np.ndarray]:
            for place, one in enumerate(made):
                if not isinstance(one, Skipped):
                    kept.append(place)
                    yield one
                elif not skip_bad:
                    raise UsageError(str(one))
                else:
                    skipped.append(one)
                    tick(1, f"{len(skipped):,} left out")

        with progress_bar(f"embedding with {self.name}", total, show=progress) as tick, closing(made):
            pixels = readable()
            while batch := list(islice(pixels, size)):
                rows.append(self.embed_pixels(np.stack(batch), normalize=normalize, pool=pool))
                tick(len(batch))
        found = np.concatenate(rows)
        return Embedded(found, np.array(kept, np.int64), skipped) if skip_bad else found

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
        with evaluating(self.runtime.model), autocasting(self.device, None if self.precision else autocast):
            rows = self(self.transform.normalise(pixels), pool)[:count].float()
        return F.normalize(rows, dim=-1) if normalize else rows


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Find what to compile: a transformer's blocks; else the stages, and whatever else is called by itself."""
    children = [model.blocks] if isinstance(getattr(model, "blocks", None), nn.Module) else model.children()
    found = [list(one) if isinstance(one, nn.Sequential | nn.ModuleList) else [one] for one in children]
    return [cast(nn.Module, block) for blocks in found for block in blocks]


def _whole(name: str, value: Any, least: int) -> int:
    """Return a number of whatever type as one that Python can count to."""
    try:
        number = min(operator.index(value), sys.maxsize)
    except TypeError:
        raise UsageError(f"{name} must be a whole number, got {value!r}") from None
    if number < least:
        raise UsageError(f"{name} must be at least {least}, got {number}")
    return number
