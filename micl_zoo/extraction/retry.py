"""Refused images that are tried again: which they are, and how what becomes of them gets into their part."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..errors import StoreError
from ..images.formats import readable
from ..sources.index import ImageIndex
from ..stores.parts import Made, RefusedRow, Rows
from ..stores.store import Store, part_name
from .options import ExtractOptions

PASSING = ("unreadable", "timeout", "crashed", "memory")  # may have been of the moment and not of the image
CHANGED = "unreadable"  # reason of a refused image that is another file now


def made_now(runtime: str, options: ExtractOptions) -> Made:
    """By what a process makes a part."""
    return Made((runtime,), options.max_pixels, tuple(sorted(readable())))  # type: ignore[arg-type]


def tried_again(refused: Sequence[RefusedRow], before: Made, options: ExtractOptions) -> set[str]:
    """Choose the ids of refused images that a run tries again; `before` says by what they were refused."""
    reasons = set(options.retried)
    if "passing" in reasons:
        reasons.update(PASSING)
        reasons.update(["too_large"] * (options.max_pixels > before.max_pixels))
        reasons.update(["unsupported"] * (not set(readable()) <= set(before.formats)))
    return {row.id for row in refused if row.reason in reasons or "all" in reasons}


def part_tried_again(store: Store, number: int, options: ExtractOptions) -> set[str]:
    """Choose the ids of a finished shard that a run tries again; only the metadata of its part are read."""
    refused = store.ledger(number) if options.retried else []
    return tried_again(refused, store.made(number), options) if refused else set()


def merged(index: ImageIndex, before: Rows, fresh: Rows, made: Made) -> Rows:
    """Put what became of images that were tried again in the place of their ledger lines, all in index order."""
    tried = {*fresh.ids, *(row.id for row in fresh.refused)}
    kept = [row for row in before.refused if row.id not in tried]
    places = {name: place for place, name in enumerate(index.ids)}
    ids = [*before.ids, *fresh.ids]
    order = sorted(range(len(ids)), key=lambda at: places[ids[at]])
    return Rows(
        [ids[at] for at in order],
        np.concatenate([before.embeddings, fresh.embeddings])[order],
        sorted([*kept, *fresh.refused], key=lambda row: places[row.id]),
        (before.made or made).then(made, {row.reason for row in kept}),
    )


def check_part_fits(store: Store, number: int, index: ImageIndex, rows: Rows) -> None:
    """Raise a StoreError unless a part has the images of its shard, each once."""
    held = [*rows.ids, *(row.id for row in rows.refused)]
    if len(held) != len(index) or set(held) != set(index.ids):
        raise StoreError(
            f"{store.folder.at(part_name(number))!r} has other images than its shard of the index: delete it and run "
            "the same extract command again"
        )


def begins(index: ImageIndex, rows: Rows) -> bool:
    """Tell whether rows are of the first images of an index."""
    return {*rows.ids, *(row.id for row in rows.refused)} == set(index.slice(0, rows.images).ids)


def mark_changed(store: Store, number: int, names: set[str]) -> None:
    """Have refused images that are other files now tried again, in a part or the beginning of one."""
    done = number in store.done()
    rows = store.rows(number) if done else store.beginning(number)
    if rows is None:
        return
    refused = [
        dataclasses.replace(row, reason=CHANGED, detail=f"it has changed since it was refused as {row.reason}")
        if row.id in names
        else row
        for row in rows.refused
    ]
    (store.write_part if done else store.write_beginning)(number, rows._replace(refused=refused))
