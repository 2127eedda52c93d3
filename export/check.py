"""An exported file against its encoder, on real photographs and at several batch sizes.

Shapes: n images, D numbers an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from micl_zoo.encoders.encoder import Encoder, pooled
from micl_zoo.encoders.onnx_session import OnnxCard, Output, choose_providers, open_session
from micl_zoo.errors import ExportError, Refused, UsageError
from micl_zoo.images.decode import decode
from micl_zoo.sources.listing import Reader, SourceLike, index_source

PHOTOGRAPHS = Path(__file__).with_name("photographs")
BATCHES = (1, 2, 7)  # sizes to run, the last one over and over: a batch frozen at the exporter's example fails
MOST = 256  # images of a source that are compared


@dataclass(frozen=True)
class Drift:
    """How far an exported file is from its encoder in float32, over images and outputs.

    Attributes:
        images: that were compared.
        max_difference: between numbers of embeddings of unit length.
        cosine_mean, cosine_min: of the two embeddings of an image.
        neighbour_agreement: share of the images whose nearest other image is the same.
    """

    images: int
    max_difference: float
    cosine_mean: float
    cosine_min: float
    neighbour_agreement: float

    def text(self) -> str:
        """One line for a person."""
        return (
            f"{self.images} photographs: cosine {self.cosine_mean:.6f} on average and {self.cosine_min:.6f} at least, "
            f"largest difference {self.max_difference:.1e}, nearest neighbour the same for "
            f"{self.neighbour_agreement:.1%}"
        )


@dataclass(frozen=True)
class Bounds:
    """What a drift must keep.

    Attributes:
        max_difference, cosine_min, neighbour_agreement: see `Drift`.
    """

    max_difference: float = 2.0
    cosine_min: float = -1.0
    neighbour_agreement: float = 0.0

    def broken_by(self, drift: Drift) -> list[str]:
        """What of it a drift does not keep, in words."""
        broken = []
        if not drift.max_difference <= self.max_difference:  # also where it is NaN
            broken.append(f"a difference of {drift.max_difference:.2e}, where {self.max_difference:.0e} is allowed")
        if not drift.cosine_min >= self.cosine_min:
            broken.append(f"a cosine of {drift.cosine_min:.6f}, where {self.cosine_min} is the least")
        if not drift.neighbour_agreement >= self.neighbour_agreement:
            least = f"{self.neighbour_agreement:.0%} is the least"
            broken.append(
                f"the same nearest neighbour for {drift.neighbour_agreement:.1%} of the images, where {least}"
            )
        return broken


BOUNDS = {
    "fp32": Bounds(max_difference=1e-4, cosine_min=0.99999),
    "fp16": Bounds(cosine_min=0.999),
    "int8": Bounds(cosine_min=0.98, neighbour_agreement=0.95),
}
# With the transform inside, some pixels in ten thousand come out a level away from Pillow's.
PREPROCESS_BOUNDS = BOUNDS | {"fp32": Bounds(cosine_min=0.9999)}


def measure(
    file: Path, encoder: Encoder, images: Sequence[Image.Image], tick: Callable[[int], Any] = lambda images: None
) -> Drift:
    """Open a file with ONNX Runtime, embed images with it and with the encoder it was made from, and compare.

    Args:
        file: that was written.
        encoder: in torch, float32.
        images: RGB, at least as many as BATCHES run.
        tick: is called with the number of images done.

    Raises:
        ExportError: the file cannot be opened, or not run at one of the batch sizes.
    """
    session, card = open_session(file, choose_providers("cpu"))
    pairs: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in card.outputs]
    for batch in in_batches(images):
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


def in_batches(images: Sequence[Image.Image]) -> Iterator[list[Image.Image]]:
    """The images in batches of BATCHES, the last of them until there are no more."""
    rest = iter(images)
    for size in chain(BATCHES, repeat(BATCHES[-1])):
        batch = list(islice(rest, size))
        if not batch:
            return
        yield batch


def same_size(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Cut from the corner, as one array holds images of one size only."""
    width, height = (min(image.size[axis] for image in images) for axis in (0, 1))
    return [image.crop((0, 0, width, height)) for image in images]


def _by_file(session: Any, card: OnnxCard, batch: Sequence[Image.Image]) -> list[np.ndarray]:
    """What a file's outputs are, one by one: (B, D), patches (B, h, w, D)."""
    if card.preprocess:
        raw = session.run(None, {"images": np.stack([np.asarray(image) for image in batch])})
    else:  # through the file's own transform, as a user's images will go
        normalised = torch.stack([card.config.transform(image) for image in batch])
        raw = session.run(None, {"pixel_values": normalised.numpy()})
    tokens = len(card.pooled)
    return [*(np.split(raw[0], tokens, axis=1) if tokens else []), *raw[min(tokens, 1) :]]


@torch.inference_mode()
def _by_encoder(encoder: Encoder, outputs: Sequence[Output], batch: Sequence[Image.Image]) -> list[np.ndarray]:
    """What they should be."""
    cls, patches = encoder.features(torch.stack([encoder.transform(image) for image in batch]))
    return [pooled(cls, patches, name).numpy() for name in outputs]


def _unit(rows: np.ndarray) -> np.ndarray:
    """(n, …, D), each D scaled to unit length -> (n, …D) of unit length, float64."""
    rows = rows.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows.reshape(len(rows), -1) / np.sqrt(rows[0].size // rows.shape[-1])


def _drift(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Drift:
    """The worst over the outputs, each as (n, numbers) twice."""
    cosines = np.stack([(a * b).sum(1) for a, b in pairs])
    return Drift(
        images=len(pairs[0][0]),
        max_difference=float(max(np.abs(a - b).max() for a, b in pairs)),
        cosine_mean=float(cosines.mean(1).min()),
        cosine_min=float(cosines.min()),
        neighbour_agreement=float(min((nearest(a) == nearest(b)).mean() for a, b in pairs)),
    )


def nearest(rows: np.ndarray) -> np.ndarray:
    """(n, D) of unit length -> (n,): which other row is nearest to each."""
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -np.inf)
    found: np.ndarray = cosines.argmax(1)
    return found


def photographs(source: SourceLike | None = None) -> list[Image.Image]:
    """What files are compared on: a source's, or ten photographs that come with the package, whole and in quarters.

    Raises:
        UsageError: fewer images than all batch sizes take.
        SourceError: no such source.
    """
    if source is None:
        whole = [decode(file.read_bytes()) for file in sorted(PHOTOGRAPHS.glob("*.jpg"))]
        return whole + [quarter for image in whole for quarter in quarters(image)]
    images, reader = [], Reader()
    for entry in index_source(source).entries():
        try:
            images.append(decode(reader.read(entry)))
        except Refused:
            continue
        if len(images) == MOST:
            break
    if len(images) < sum(BATCHES):
        raise UsageError(
            f"to compare takes {sum(BATCHES)} images or more, {len(images)} could be read: give more, or leave images "
            "out for those that come with micl-zoo"
        )
    return images


def quarters(image: Image.Image) -> list[Image.Image]:
    """The four of them."""
    width, height = image.width // 2, image.height // 2
    corners = [(left, top) for left in (0, width) for top in (0, height)]
    return [image.crop((left, top, left + width, top + height)) for left, top in corners]
