"""What a run has made of the encoder that it started from: neighbours, drift and k-NN, before and after.

Shapes: G images looked at, of which the first H were not trained on; D width, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from micl_zoo.encoders.device import autocast_dtype, resolve_precision
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.errors import SourceError
from micl_zoo.extraction.extract import embed_index
from micl_zoo.extraction.options import ExtractOptions
from micl_zoo.sources.index import ImageIndex
from micl_zoo.sources.reader import Reader
from micl_zoo.stores.contact_sheet import Tile, write_contact_sheet
from micl_zoo.zoo.pools import Pool

from ..evaluation.knn import Right, measure_right
from ..evaluation.labelled import LabelledSet
from ..evaluation.ranking import difference
from ..recipes import Recipe
from ..run.order import seeded, trained_images

SHOWN_IMAGES = 1000  # G: neighbours are looked for among them
QUERIES, NEIGHBOURS = 8, 6  # of the picture
PICTURE = "neighbours.png"


class Split(NamedTuple):
    """The images of a source: what is trained on, and what is looked at."""

    trained: ImageIndex
    shown: ImageIndex  # G images, the H that are not trained on first
    held_out: int  # H


def split_images(index: ImageIndex, recipe: Recipe) -> Split:
    """Draw the images that are not trained on, and those among which neighbours are looked for, by the recipe's seed.

    An image that is listed again is not trained on either where it is held out.

    Raises:
        SourceError: none would be left to train on.
    """
    count, held = len(index), recipe.held_out
    trained_images(count, held)
    order = torch.randperm(count, generator=seeded(recipe.seed, 7)).numpy()
    shown = ImageIndex(index.table.take(pa.array(order[: max(held, SHOWN_IMAGES)])))
    if not held:
        return Split(index, shown, held)
    offsets = index.table["offset"].cast(pa.string())
    places = pc.binary_join_element_wise(index.table["uri"], offsets, "#")
    known = pc.is_in(places, value_set=places.take(pa.array(order[:held])).combine_chunks())
    return Split(ImageIndex(index.table.filter(pc.invert(known))), shown, held)


class Looked(NamedTuple):
    """What an encoder makes of the images, at one time."""

    ids: list[str]  # of the images that could be embedded, in the order of `Split.shown`
    rows: np.ndarray  # (G, D) float32, unit length
    right: dict[str, Right]  # by labelled set, of k-NN

    @property
    def knn(self) -> dict[str, float]:
        """Accuracy on each set, 0 to 1."""
        return {name: right.accuracy for name, right in self.right.items()}


def look(
    encoder: Encoder, shown: ImageIndex, probes: Sequence[LabelledSet], pool: Pool, workers: int | None = None
) -> Looked:
    """Embed the images that are looked at, and measure k-NN on the labelled sets, with so many decoding processes."""
    autocast = autocast_dtype(resolve_precision("auto", encoder.device))
    pieces = list(embed_index(encoder, shown, ExtractOptions(pool=pool, batch_size=64, workers=workers), autocast))
    ids = [name for piece in pieces for name in piece.ids]
    if not ids:
        lost = pieces[0].refused[0]
        raise SourceError(f"none of {len(shown):,} images can be embedded, {lost.id!r}: {lost.reason}, {lost.detail}")
    rows = np.concatenate([piece.embeddings.astype(np.float32, copy=False) for piece in pieces])
    return Looked(ids, rows, {probe.name: measure_right(encoder, probe, pool) for probe in probes})


def drift(before: Looked, after: Looked, split: Split) -> float:
    """Average the cosine of embeddings before and after, of the images that were not trained on if there are any."""
    before, after = _common(before, after)
    places, _ = _judges(before, split)
    return round(float((before.rows[places] * after.rows[places]).sum(1).mean()), 4)


def _common(before: Looked, after: Looked) -> tuple[Looked, Looked]:
    """Keep what could be embedded both times."""
    if before.ids == after.ids:
        return before, after
    both = set(before.ids) & set(after.ids)
    kept = [[place for place, name in enumerate(one.ids) if name in both] for one in (before, after)]
    first, second = (
        Looked([one.ids[place] for place in places], one.rows[places], one.right)
        for one, places in zip((before, after), kept, strict=True)
    )
    return first, second


def _judges(seen: Looked, split: Split) -> tuple[list[int], bool]:
    """Find the places of the images that were not trained on; all of them, and False, where there are none."""
    held = set(split.shown.ids[: split.held_out])
    places = [place for place, name in enumerate(seen.ids) if name in held]
    return places or list(range(len(seen.ids))), bool(places)


def compare(before: Looked, after: Looked, split: Split) -> dict[str, Any]:
    """Sum up what changed, for run.json.

    Returns:
        `knn` by set with an interval of the paired difference in points; of the images that were not trained on, the
        mean `cosine` of their embeddings before and after, and how many of the nearest `neighbours` stayed. What could
        not be embedded both times is `left_out`.
    """
    before, after = _common(before, after)
    knn = {}
    for name, (found, lost) in before.right.items():
        later = after.right[name]
        both = [one for one in found if one in later.found]
        if not both:
            raise SourceError(f"no test image of {name} could be embedded both before and after")
        was, now = (np.array([[right[one] for one in both]]) for right in (found, later.found))
        low, high = difference(*((right, np.ones(len(both), bool)) for right in (now, was)))
        knn[name] = {"before": round(float(was.mean()), 4), "after": round(float(now.mean()), 4), "low": low}
        knn[name] |= {"high": high, "images": len(both), "left_out": max(lost, later.left_out)}
    places, held_out = _judges(before, split)
    stay = [len(set(was) & set(now)) for was, now in zip(nearest(before, places), nearest(after, places), strict=True)]
    return {
        "knn": knn,
        "cosine": drift(before, after, split),
        "neighbours": round(float(np.mean(stay)), 2),
        "of_neighbours": min(NEIGHBOURS, len(before.ids) - 1),
        "images": len(places),
        "among": len(before.ids),
        "held_out": held_out,
        "left_out": len(split.shown) - len(before.ids),
    }


def nearest(seen: Looked, places: Sequence[int]) -> list[list[int]]:
    """Find the places of the nearest others of some images, nearest first."""
    cosines = seen.rows[list(places)] @ seen.rows.T  # (n, G)
    cosines[np.arange(len(places)), list(places)] = -2
    return np.argsort(-cosines, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(seen.ids) - 1)].tolist()


def draw_neighbours(file: Path, before: Looked, after: Looked, shown: ImageIndex) -> None:
    """Draw queries, and beside each its nearest before and after: neither is chosen, they are the first by chance."""
    before, after = _common(before, after)
    entries = {entry.id: entry for entry in shown.entries()}
    places = list(range(min(QUERIES, len(before.ids))))
    bands = []
    for place, *found in zip(places, nearest(before, places), nearest(after, places), strict=True):
        hits = [
            Tile(f"{when} {rank}   {seen.rows[place] @ seen.rows[at]:.3f}", seen.ids[at], entries[seen.ids[at]])
            for when, seen, line in zip(("before", "after"), (before, after), found, strict=True)
            for rank, at in enumerate(line, 1)
        ]
        name = before.ids[place]
        bands.append((Tile("query", name, entries[name]), hits))
    write_contact_sheet(file, bands, Reader().read, halves=len(hits) // 2)
