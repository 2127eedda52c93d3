"""Frozen features of labelled images, embedded here or read from a store that `extract` wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from micl_zoo.encoders.device import autocast_dtype, default_workers, resolve_precision
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.errors import SourceError, StoreError, UsageError
from micl_zoo.extraction.extract import embed_index, extract
from micl_zoo.extraction.options import ExtractOptions
from micl_zoo.files import write_text
from micl_zoo.stores.store import Store
from micl_zoo.zoo.pools import Pool

from ..run.provenance import machine
from .labelled import Label, LabelledImages, labels_of
from .protocols import POOLS, ROW_POOLS, check_names
from .record import Speed, read_speed, speed_file


class Features(NamedTuple):
    """Frozen features and classes of a part, as methods see them."""

    rows: dict[str, np.ndarray]  # by pool ("cls", "mean", "cls+mean"): (N, D) float32, normalised if their store was
    labels: np.ndarray  # (N,) int64
    refused: tuple[str, ...] = ()  # ids of images that could not be embedded and are left out


Device = str | torch.device
Figures = dict[str, dict[str, Any]]  # of one method, by key or by pool


def embed_labelled(
    encoder: Encoder, images: LabelledImages, *, pools: Sequence[Pool] = ("cls",), batch_size: int = 64,
    workers: int | None = None, tick: Callable[[int], object] = lambda count: None,
) -> Features:  # fmt: skip
    """Embed a labelled part once, for all pools; `tick` is called with the number of images whenever some are done."""
    check_names("pool", pools, ROW_POOLS)
    autocast = autocast_dtype(resolve_precision("auto", encoder.device))
    both = "cls" if set(pools) == {"cls"} else _pass(encoder, pools)
    pieces, ids = [], list[str]()
    options = ExtractOptions(pool=both, batch_size=batch_size, workers=workers, normalize=False)
    for batch in embed_index(encoder, images.index, options, autocast):
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


def stored_features(
    encoder: Encoder, images: LabelledImages, folder: Path, *, pools: Sequence[Pool] = ("cls",), batch_size: int = 64,
    workers: int | None = None, show: bool = True,
) -> Features:  # fmt: skip
    """Embed a labelled part into the store in a folder, or read what it holds; `FOLDER.json` says how fast it went."""
    check_names("pool", pools, ROW_POOLS)
    options = ExtractOptions(
        model=encoder, pool=_pass(encoder, pools), batch_size=batch_size, workers=workers, normalize=False
    )
    done = extract(images.index, folder, options, show=show)
    if done.computed > done.tried_again:
        chip = machine(encoder.device)
        now = Speed(
            images=done.computed, seconds=done.seconds, device=str(encoder.device),
            chip=chip.get("card", chip["processor"]), precision=done.store.manifest.precision, batch_size=batch_size,
            workers=default_workers() if workers is None else workers,
        )  # fmt: skip
        before = read_speed(folder)
        if before and before.how == now.how:  # that run was killed, and this one did the rest
            now = now.plus(before)
        write_text(speed_file(folder), json.dumps(asdict(now)) + "\n")
    return store_features(done.store, dict(zip(images.index.ids, images.labels.tolist(), strict=True)), pools)


def _pass(encoder: Encoder, pools: Sequence[Pool]) -> Pool:
    """Choose the pool that has all pools asked for in one pass, or may be asked for by the next call."""
    alone = pools[0] not in POOLS or (len(pools) == 1 and "cls+mean" not in encoder.pools)
    return pools[0] if alone else "cls+mean"


def split_pools(rows: np.ndarray, stored: str, pools: Sequence[str]) -> dict[str, np.ndarray]:
    """Take the wanted pools out of rows that hold one, or both tokens side by side."""
    if stored != "cls+mean":
        return {stored: rows}
    half = rows.shape[1] // 2
    parts = {"cls": rows[:, :half], "mean": rows[:, half:], "cls+mean": rows}
    return {pool: parts[pool] for pool in pools}


def store_labels(store: Store, given: Mapping[str, str] | None = None) -> dict[str, Label]:
    """Map the ids of a store's images to labels, from its index; no image is opened."""
    labels: dict[str, Label] = {}
    for number in store.indexed():
        index = store.shard(number)
        labels |= zip(index.ids, labels_of(index, given), strict=True)
    return labels


def store_features(store: Store, numbers: Mapping[str, int], pools: Sequence[Pool]) -> Features:
    """Read the rows of some pools of a store, with the class number of each id."""
    stored = store.manifest.pool
    held = POOLS if stored == "cls+mean" else (stored,)
    if not set(pools) <= set(held):
        raise UsageError(
            f"{str(store.folder)!r} holds the pool {stored!r}, asked for {', '.join(pools)}: "
            "extract again with --pool cls+mean"
        )
    rows = split_pools(store.embeddings.astype(np.float32, copy=False), stored, pools)
    ids = store.ids  # reads every part
    if lost := [name for name in ids if name not in numbers]:
        raise StoreError(
            f"{len(lost):,} images of {str(store.folder)!r} are not in its index, of which a part is missing: "
            f"{lost[0]!r} first. The same extract command makes it again"
        )
    labels = np.array([numbers[name] for name in ids], np.int64)
    return Features(rows, labels, tuple(row.id for row in store.refused()))
