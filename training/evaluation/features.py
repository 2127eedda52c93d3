"""Frozen features of labelled images, embedded here or read from a store that `extract` wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from micl_zoo.encoders.device import resolve_precision
from micl_zoo.encoders.encoder import Encoder, Pool
from micl_zoo.errors import SourceError, UsageError, unknown
from micl_zoo.extraction.extract import embed_index
from micl_zoo.stores.store import Store

from .labelled import Label, LabelledImages, labels_of

POOLS: tuple[Pool, ...] = ("cls", "mean", "cls+mean")  # of one row an image


class Features(NamedTuple):
    """What a probe sees of a part: frozen features and classes.

    Attributes:
        rows: by pool ("cls", "mean", "cls+mean"): (N, D) float32, not normalised unless their store was.
        labels: (N,) int64.
        refused: ids of images that could not be embedded and are left out.
    """

    rows: dict[str, np.ndarray]
    labels: np.ndarray
    refused: tuple[str, ...] = ()


Told = Callable[[int], object]


def embed_labelled(
    encoder: Encoder,
    images: LabelledImages,
    *,
    pools: Sequence[Pool] = ("cls",),
    batch_size: int = 64,
    workers: int | None = None,
    tick: Told = lambda count: None,
) -> Features:
    """Embed a labelled part once, for all pools.

    Args:
        encoder: of any backend.
        images: the part.
        pools: which features to keep.
        batch_size: images a forward pass.
        workers: processes that decode; one a core by default, none for 0.
        tick: called with the number of images, as they are done.
    """
    check_names("pool", pools, POOLS)
    autocast, _ = resolve_precision("auto", encoder.device)
    both: Pool = "cls+mean" if set(pools) != {"cls"} else "cls"
    pieces, ids = [], list[str]()
    for batch in embed_index(
        encoder,
        images.index,
        batch_size=batch_size,
        workers=workers,
        autocast=autocast,
        pool=both,
        normalize=False,
    ):
        pieces.append(batch.embeddings.astype(np.float32, copy=False))
        ids += batch.ids
        tick(batch.images)
    names = images.index.ids
    number = dict(zip(names, images.labels.tolist(), strict=True))
    if not ids:
        raise SourceError(f"none of the {len(names)} images could be embedded, {names[0]!r} the first of them")
    kept = set(ids)
    refused = tuple(name for name in names if name not in kept)
    labels = np.array([number[name] for name in ids], np.int64)
    return Features(split_pools(np.concatenate(pieces), both, pools), labels, refused)


def check_names(kind: str, names: Sequence[str], valid: Sequence[str]) -> None:
    """Raise a UsageError unless there are names and all of them are valid."""
    if not names:
        raise UsageError(f"no {kind} given. Valid: {', '.join(valid)}.")
    for name in names:
        if name not in valid:
            raise UsageError(unknown(kind, name, valid))


def split_pools(rows: np.ndarray, stored: str, pools: Sequence[str]) -> dict[str, np.ndarray]:
    """The wanted pools out of rows that hold one, or both tokens side by side."""
    if stored != "cls+mean":
        return {stored: rows}
    half = rows.shape[1] // 2
    parts = {"cls": rows[:, :half], "mean": rows[:, half:], "cls+mean": rows}
    return {pool: parts[pool] for pool in pools}


def store_labels(store: Store, given: Mapping[str, str] | None = None) -> dict[str, Label]:
    """Id -> label of a store's images, from its index; no image is opened.

    Raises:
        SourceError: an image that has none.
    """
    labels: dict[str, Label] = {}
    for number in store.indexed():
        index = store.shard(number)
        labels |= zip(index.ids, labels_of(index, given), strict=True)
    return labels


def store_features(store: Store, numbers: Mapping[str, int], pools: Sequence[Pool] | None = None) -> Features:
    """All rows of a store with the class number of each id.

    Args:
        store: of pool "cls", "mean" or "cls+mean".
        numbers: id -> class.
        pools: which features to keep, of a "cls+mean" store; all that it holds by default.

    Raises:
        UsageError: a store of patch tokens, or pools that it does not hold.
    """
    stored = store.manifest.pool
    held = POOLS if stored == "cls+mean" else (stored,)
    if stored == "patches" or (pools and not set(pools) <= set(held)):
        raise UsageError(
            f"{str(store.folder)!r} holds the pool {stored!r}, asked for {', '.join(pools or ['one row an image'])}: "
            "extract again with --pool cls+mean"
        )
    rows = store.embeddings.astype(np.float32, copy=False)
    labels = np.array([numbers[name] for name in store.ids], np.int64)
    refused = tuple(row.id for row in store.refused())
    return Features(split_pools(rows, stored, pools or held), labels, refused)
