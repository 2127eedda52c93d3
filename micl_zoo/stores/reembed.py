"""The encoder that made a store, loaded again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import StoreError, UsageError, WeightsError
from ..images.decode import Decoding, decode_pixels
from ..schema import shown
from ..zoo.ours import RECORDS
from ..zoo.weights import CHANGED
from .manifest import MANIFEST_FILE, Manifest
from .store import Store

if TYPE_CHECKING:
    from torch import dtype as TorchDtype

    from ..encoders.encoder import Encoder

    LoadedEncoder = Encoder
else:
    LoadedEncoder = Any  # a search for ids does without torch


def check_loaded(encoder: Any) -> None:
    """Refuse what is no Encoder, before anything else is done."""
    if encoder is not None and not hasattr(encoder, "embed_pixels"):
        raise UsageError(f"encoder must be an Encoder, it is {shown(encoder)}")


@dataclass(frozen=True)
class StoreEncoder:
    """The encoder that made a store, at the store's own settings. Made by `store_encoder`."""

    encoder: Encoder  # with the weights of the manifest
    manifest: Manifest  # the store's
    autocast: TorchDtype | None  # data type of the arithmetic, or None for float32
    decoding: Decoding  # how bytes become pixels

    def pixels(self, image: bytes | Image.Image) -> np.ndarray:
        """Decode one encoded image as for the store, or take a picture in RGB, to (size, size, 3) uint8."""
        if isinstance(image, Image.Image):
            return self.encoder.transform.pixels(image)
        return decode_pixels(image, self.encoder.transform, self.decoding)

    def rows(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Embed B results of `pixels` to (B, dim) float32, as the store would hold them."""
        options: Any = {"normalize": self.manifest.normalized, "pool": self.manifest.pool}
        return self.encoder.embed_pixels(np.stack(pixels), autocast=self.autocast, **options).reshape(len(pixels), -1)


def store_encoder(
    store: Store,
    weights: str | os.PathLike[str] | None = None,
    device: str = "auto",
    *,
    encoder: LoadedEncoder | None = None,  # that is loaded already, in the place of weights and device
) -> StoreEncoder:
    """Load the encoder that made a store, by the manifest's name where its weights are published, else from a file."""
    from ..encoders.device import autocast_dtype

    manifest, where = store.manifest, repr(store.folder.at(MANIFEST_FILE))
    try:
        decoding = Decoding.from_id(manifest.decoding)
    except UsageError:
        raise StoreError(
            f"{where} has a decoding {manifest.decoding!r}, which this micl-zoo does not know: it is damaged, or a "
            "newer version made the store, and an upgrade reads it"
        ) from None
    given = encoder is not None or weights is not None
    if encoder is None:
        encoder = _loaded(store, weights, device)
    elif weights is not None or device != "auto":
        raise UsageError(f"an encoder has its {'device' if weights is None else 'weights'}: leave that argument out")
    encoder.check_float32()
    made = f" of {manifest.image_size} pixels" if manifest.image_size else ""
    for what, mine, theirs, way_on in (
        ("weights of sha256", manifest.weights_sha256, encoder.identity()[1], "give those with --model"),
        ("the transform", manifest.transform, encoder.transform.id, f"it takes the encoder for images{made}"),
    ):
        if mine != theirs:
            raise WeightsError(
                f"the store was made by {manifest.model} with {what} {mine}, but {encoder.name} "
                f"({'given' if given else 'published'}) has {theirs}: {way_on}"
            )
    if (shape := list(encoder.row_shape(manifest.pool))) != manifest.shape:
        raise StoreError(
            f"{where} is damaged: it says that rows are of shape {manifest.shape}, and with pool {manifest.pool} those "
            f"of {encoder.name} are of {shape}"
        )
    decoding = replace(decoding, max_pixels=store.max_pixels(decoding.max_pixels))
    return StoreEncoder(encoder, manifest, autocast_dtype(manifest.precision), decoding)


def _loaded(store: Store, weights: str | os.PathLike[str] | None, device: str) -> Encoder:
    from ..encoders.device import backend_again
    from ..encoders.load import load
    from ..zoo.names import pinned_again

    manifest = store.manifest
    record = RECORDS.get(manifest.model)
    published = record and (record.onnx and record.onnx.sha256 if manifest.runtime == "onnx" else record.sha256)
    if weights is None and manifest.source is None and published != manifest.weights_sha256:
        saved = "; `encoder.save(FOLDER)` writes them" if manifest.model.endswith(CHANGED) else ""
        raise WeightsError(
            f"the store was made with weights of {manifest.model} that are not published (sha256 "
            f"{manifest.weights_sha256}), by `{manifest.command}`: give their file or encoder folder with --model, "
            f"from Python with weights={saved}. `verify --sample 0` and `search --id` need no encoder."
        )
    name: str | os.PathLike[str] = weights or manifest.source or manifest.model
    name = pinned_again(name, manifest.source) if isinstance(name, str) else name
    backend = backend_again(manifest.runtime, device)
    return load(name, image_size=manifest.image_size, device=device, backend=backend)
