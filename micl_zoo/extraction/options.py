"""The options of `extract`: name, type, default and meaning of each, stated once."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from ..encoders.device import Backend, Precision
from ..errors import Reason, UsageError, unknown
from ..images.decode import MAX_PIXELS, Decoding, Exif
from ..schema import Between, wrong_fields
from ..sources.selection import Selection
from ..zoo.ours import DEFAULT
from ..zoo.pools import Pool

if TYPE_CHECKING:  # it imports torch, which a command line that only shows its help does without
    from ..encoders.encoder import Encoder
else:
    Encoder = Any  # `extract` itself sees what it is

Count = Annotated[int, Between(1, 2**53)]
Dtype = Literal["float16", "float32"]
EngineName = Literal["local", "ray"]
RETRY_WORDS = ("passing", "all", "none", *get_args(Reason))

# The options that change the rows of a store; its manifest gives them as a command line, in this order.
ROW_OPTIONS = (
    *(
        "model",
        "weights",
        "image_size",
        "pool",
        "dtype",
        "precision",
        "backend",
        "exif",
        "max_pixels",
        "shard_rows",
        "limit",
    ),
    *("compile", "fast_decode", "normalize", "column", "id_column", "exclude", "default_exclude"),
)


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What can be chosen about an extraction.

    Attributes:
        model: name or path, see `load`, or a loaded encoder, which decides `devices` and `backend` itself.
        weights: a path, which may as well be given as `model`.
        pool: see `Encoder.forward`; None is the encoder's own.
        image_size: side in pixels of the images, see `load`; None is the encoder's own.
        normalize: scale embeddings to unit length.
        dtype: data type of the stored embeddings.
        precision: compute precision; "auto" is bf16 where the device computes it fast, else fp32. ONNX files keep their
            own.
        backend: "torch", "openvino" for CPUs, or "onnx"; "auto" is "onnx" for an .onnx file, and "openvino" where it is
            installed and can be used.
        providers: execution providers of ONNX Runtime, see `load`.
        compile: compile the model by torch.compile; pays off after thousands of images.
        devices: "auto", "all" GPUs, or device names separated by commas; one process each.
        processes: number of model processes, which share the devices; None is one per device, with Ray one per GPU of
            the cluster.
        engine: "local", or "ray" for a cluster.
        address: address of the Ray cluster; None is the one this machine belongs to, or a new one on it.
        batch_size: images per batch; None is 256 on a GPU, 16 on a CPU. Halved where memory is short.
        shard_rows: images per part file; None is 10,000, fewer for long rows such as patches.
        workers: decoding processes per machine; None is one per core, 16 at most; 0 decodes in the model process.
        fast_decode: decode JPEG at the scale that is needed: nearly the same pixels, and the store says so.
        exif: "upright" turns pictures as their cameras say, "keep" leaves them as they are stored.
        max_pixels: width x height above which an image is refused.
        image_timeout: seconds a process may take to read and decode an image before it is replaced.
        column: column of the images in parquet files; None finds it, see `index_source`.
        id_column: column of ids in parquet files; None is `id` where there is one, "none" names images by their rows.
        exclude: patterns of names and of paths below the source that are left out, such as "*_small.jpg".
        default_exclude: leave out thumbnails and trash of cameras, NAS and desktops, too, see `sources.names`.
        limit: embed only the first images of the source.
        retry: refused images to try again: "passing", those whose cause may be gone; "all", "none", or reasons of the
            ledger; several separated by commas.
        only_missing: add the images that the store lacks; those it has may be gone from the source.
        overwrite: delete the embeddings in the output first.

    Raises:
        UsageError: a value that is not valid.
    """

    model: str | os.PathLike[str] | Encoder = DEFAULT
    weights: str | os.PathLike[str] | None = None
    pool: Pool | None = None
    image_size: Annotated[int, Between(1, 4096)] | None = None
    normalize: bool = True
    dtype: Dtype = "float32"
    precision: Precision = "auto"
    backend: Literal["auto", Backend] = "auto"
    providers: Sequence[str] | None = None
    compile: bool = False
    devices: str = "auto"
    processes: Count | None = None
    engine: EngineName = "local"
    address: str | None = None
    batch_size: Annotated[int, Between(1, 2**20)] | None = None
    shard_rows: Count | None = None
    workers: Annotated[int, Between(0)] | None = None
    fast_decode: bool = False
    exif: Exif = "upright"
    max_pixels: Count = MAX_PIXELS
    image_timeout: Annotated[float, Between(0.001)] = 120.0
    column: str | None = None
    id_column: str | None = None
    exclude: Sequence[str] = ()
    default_exclude: bool = True
    limit: Count | None = None
    retry: str | Sequence[str] = "passing"
    only_missing: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if wrong := wrong_fields(self):
            raise UsageError("; ".join(wrong))
        if self.only_missing and self.overwrite:
            raise UsageError("only_missing keeps what is there, and overwrite deletes it: give one of them")
        for word in self.retried - set(RETRY_WORDS):
            raise UsageError(unknown("reason to retry", word, RETRY_WORDS))

    @property
    def retried(self) -> frozenset[str]:
        """The words of `retry`; "none" stands for no word."""
        words = [self.retry] if isinstance(self.retry, str) else self.retry
        return frozenset(word.strip() for text in words for word in text.split(",") if word.strip()) - {"none"}

    @property
    def decoding(self) -> Decoding:
        """How the bytes of an image become pixels."""
        return Decoding(exif=self.exif, fast=self.fast_decode, max_pixels=self.max_pixels)

    def selection(self) -> Selection:
        """Make the selection of what is listed of a source."""
        return Selection(
            self.exclude, default_exclude=self.default_exclude, column=self.column, id_column=self.id_column
        )

    def command(self, sources: Sequence[str | os.PathLike[str]]) -> str:
        """The command line that computes the same rows from the same sources; it leaves out where they are written."""
        words = []
        for name in ROW_OPTIONS:
            value, option = getattr(self, name), name.replace("_", "-")
            if name in ("normalize", "default_exclude"):
                words += [] if value else [f"--no-{option}"]
            elif name == "exclude":
                words += [word for pattern in value for word in ("--exclude", pattern)]
            elif isinstance(value, bool):
                words += [f"--{option}"] * value
            elif value is not None:
                words += [f"--{option}", str(value)]
        return shlex.join(["micl-zoo", "extract", *(os.fspath(one) for one in sources), *words])
