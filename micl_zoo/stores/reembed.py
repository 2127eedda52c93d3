"""The encoder that made a store, loaded again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..encoders.zoo import RECORDS
from ..errors import WeightsError
from ..images.decode import Decoding, decode_pixels
from .store import Manifest, Store

if TYPE_CHECKING:
    from torch import dtype as TorchDtype

    from ..encoders.encoder import Encoder


@dataclass(frozen=True)
class StoreEncoder:
    """The encoder that made a store, at the store's own settings. Made by `store_encoder`.

    Attributes:
        encoder: with the weights of the manifest.
        manifest: the store's.
        autocast: dtype of the arithmetic, or None for float32.
        decoding: from bytes to pixels.
    """

    encoder: Encoder
    manifest: Manifest
    autocast: TorchDtype | None
    decoding: Decoding

    def pixels(self, data: bytes) -> np.ndarray:
        """One encoded image -> (size, size, 3) uint8, decoded as for the store.

        Raises:
            Refused: with the reason.
        """
        return decode_pixels(data, self.encoder.transform, self.decoding)

    def rows(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """B of `pixels` -> (B, dim) float32, as the store would hold them."""
        pool: Any = self.manifest.pool
        normalize = self.manifest.normalized
        rows = self.encoder.embed_pixels(np.stack(pixels), normalize=normalize, pool=pool, autocast=self.autocast)
        return rows.reshape(len(pixels), -1)


def store_encoder(store: Store, weights: str | os.PathLike[str] | None = None, device: str = "auto") -> StoreEncoder:
    """Load the encoder that made a store: by the manifest's name where these weights are published, else from a file.

    Args:
        store: whose encoder.
        weights: a file or folder, see `load`.
        device: see `load`.

    Raises:
        WeightsError: the weights are not published and none were given, or they are not those of the store.
        StoreError: a newer version decoded the images in a way that this one does not know.
    """
    from ..encoders.device import autocast_dtype, backend_again
    from ..encoders.load import load

    manifest = store.manifest
    record = RECORDS.get(manifest.model)
    published = record and (record.onnx and record.onnx.sha256 if manifest.runtime == "onnx" else record.sha256)
    if weights is None and published != manifest.weights_sha256:
        raise WeightsError(
            f"the store was made by weights of {manifest.model} that are not published (sha256 "
            f"{manifest.weights_sha256}): give their file or encoder folder with --weights, from Python with weights=. "
            "`verify --sample 0` and `search --id` need no encoder."
        )
    name: Any = {} if weights else {"name": manifest.model}
    encoder = load(**name, weights=weights, device=device, backend=backend_again(manifest.runtime, device))
    for what, mine, theirs in (
        ("weights of sha256", manifest.weights_sha256, encoder.weights_sha256),
        ("the transform", manifest.transform, encoder.transform.id),
    ):
        if mine != theirs:
            raise WeightsError(
                f"the store was made by {manifest.model} with {what} {mine}, but {encoder.name} "
                f"({weights or 'published'}) has {theirs}: give the weights that made it with --weights"
            )
    return StoreEncoder(encoder, manifest, autocast_dtype(manifest.precision), Decoding.from_id(manifest.decoding))
