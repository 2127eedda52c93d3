"""Compares an exported file with its encoder, on real photographs and at several batch sizes.

Shapes: n images, D numbers per embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from micl_zoo.encoders.encoder import Encoder
from micl_zoo.encoders.onnx_session import OnnxCard, choose_providers, open_session
from micl_zoo.errors import ExportError, Refused, UsageError, WeightsError
from micl_zoo.images.decode import decode
from micl_zoo.sources.listing import SourceLike, index_source
from micl_zoo.sources.reader import Reader
from micl_zoo.zoo.pools import Output

PHOTOGRAPHS = Path(__file__).with_name("photographs")
BATCHES = (1, 2, 7)  # sizes to run, the last one over and over: a batch frozen at the exporter's example fails
MOST = 256  # images of a source that are compared


@dataclass(frozen=True)
class Drift:
    """How far an exported file is from its encoder in float32, over images and outputs.

    Attributes:
        images: number of images compared.
        max_difference: largest difference of two numbers, in embeddings of unit length.
        cosine_mean, cosine_min: between the two embeddings of an image.
        neighbour_agreement: share of the images whose nearest other image is the same.
    """

    images: int
    max_difference: float
    cosine_mean: float
    cosine_min: float
    neighbour_agreement: float

    def text(self) -> str:
        """Return one line for a person."""
        cosine = f"cosine {self.cosine_mean:.6f} on average and {self.cosine_min:.6f} at least"
        others = f"nearest neighbour the same for {self.neighbour_agreement:.1%}"
        return f"{self.images} photographs: {cosine}, largest difference {self.max_difference:.1e}, {others}"


@dataclass(frozen=True)
class Bounds:
    """What a drift must keep, see `Drift`."""

    max_difference: float = 2.0
    cosine_min: float = -1.0
    neighbour_agreement: float = 0.0

    def broken_by(self, drift: Drift) -> list[str]:
        """List in words what a drift does not keep; NaN keeps nothing."""
        most, least, share = self.max_difference, self.cosine_min, self.neighbour_agreement
        apart, cosine, same = drift.max_difference, drift.cosine_min, drift.neighbour_agreement
        kept = {
            f"a difference of {apart:.2e}, where {most:.0e} is allowed": apart <= most,
            f"a cosine of {cosine:.6f}, where {least} is the least": cosine >= least,
            f"the same nearest neighbour for {same:.1%} of the images, where {share:.0%} is the least": same >= share,
        }
        return [text for text, is_kept in kept.items() if not is_kept]


def measure(
    file: Path,
    encoder: Encoder,  # in torch, float32
    images: Sequence[Image.Image],  # RGB, at least sum(BATCHES)
    tick: Callable[[int], Any] = lambda images: None,
) -> Drift:
    """Embed images with an ONNX file in ONNX Runtime and with the encoder it was made from, and compare."""
    try:
        session, card = open_session(file, choose_providers("cpu"))
    except WeightsError as error:
        raise ExportError(f"{encoder.name} as ONNX is not what can be opened: {error}") from error
    pairs: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in card.outputs]
    rest = iter(images)
    sizes = chain(BATCHES, repeat(BATCHES[-1]))
    while batch := list(islice(rest, next(sizes))):
        if card.preprocess:
            batch = same_size(batch)
        try:
            found = _by_file(session, card, batch)
        except Exception as error:  # ONNX Runtime's classes are private
            raise ExportError(f"{card.config.name} as ONNX does not run on {len(batch)} images: {error}") from error
        for pair, expected, rows in zip(pairs, _by_encoder(encoder, card.outputs, batch), found, strict=True):
            pair[0].append(_unit(expected))
            pair[1].append(_unit(rows))
        tick(len(batch))
    return _drift([(np.concatenate(expected), np.concatenate(found)) for expected, found in pairs])


def same_size(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Cut images from their corner to one size, as one array holds no others."""
    width, height = (min(image.size[axis] for image in images) for axis in (0, 1))
    return [image.crop((0, 0, width, height)) for image in images]


def _by_file(session: Any, card: OnnxCard, batch: Sequence[Image.Image]) -> list[np.ndarray]:
    """Compute a file's outputs, one by one: (B, D), patches (B, h, w, D)."""
    if card.preprocess:
        raw = session.run(None, {"images": np.stack([np.asarray(image) for image in batch])})
    else:  # through the file's own transform, as a user's images will go
        normalised = torch.stack([card.config.transform(image) for image in batch])
        raw = session.run(None, {"pixel_values": normalised.numpy()})
    ends = np.cumsum(card.widths)
    return [*(np.split(raw[0], ends[:-1], axis=1) if len(ends) else []), *raw[min(len(ends), 1) :]]


@torch.inference_mode()
def _by_encoder(encoder: Encoder, outputs: Sequence[Output], batch: Sequence[Image.Image]) -> list[np.ndarray]:
    found = encoder.outputs(torch.stack([encoder.transform(image) for image in batch]), outputs)
    return [found[name].numpy() for name in outputs]


def _unit(rows: np.ndarray) -> np.ndarray:
    """(n, …, D), each D scaled to unit length -> (n, …D) of unit length, float64."""
    rows = rows.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows.reshape(len(rows), -1) / np.sqrt(rows[0].size // rows.shape[-1])


def _drift(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Drift:
    """Return the worst drift over the outputs, each given as (n, numbers) twice."""
    cosines = np.stack([(a * b).sum(1) for a, b in pairs])
    return Drift(
        images=len(pairs[0][0]),
        max_difference=float(max(np.abs(a - b).max() for a, b in pairs)),
        cosine_mean=float(cosines.mean(1).min()),
        cosine_min=float(cosines.min()),
        neighbour_agreement=float(min((nearest(a) == nearest(b)).mean() for a, b in pairs)),
    )


def nearest(rows: np.ndarray) -> np.ndarray:
    """Return which other row is nearest to each of (n, D) of unit length: (n,)."""
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -np.inf)
    return np.asarray(cosines.argmax(1))


def photographs(source: SourceLike | None = None) -> list[Image.Image]:
    """Read the images to compare on: a source's, or ten photographs of the package, whole and in quarters."""
    if source is None:
        whole = [decode(file.read_bytes()) for file in sorted(PHOTOGRAPHS.glob("*.jpg"))]
        return whole + [quarter for image in whole for quarter in quarters(image)]
    images, reader = [], Reader()
    for entry in index_source(source).entries():
        with suppress(Refused):
            images.append(decode(reader.read(entry)))
        if len(images) == MOST:
            break
    if len(images) < sum(BATCHES):
        counts = f"{sum(BATCHES)} images or more and {len(images)} could be read"
        raise UsageError(f"comparing takes {counts}: give more, or leave images out for those that come with micl-zoo")
    return images


def quarters(image: Image.Image) -> list[Image.Image]:
    """Cut an image into its four quarters."""
    width, height = image.width // 2, image.height // 2
    corners = [(left, top) for left in (0, width) for top in (0, height)]
    return [image.crop((left, top, left + width, top + height)) for left, top in corners]
