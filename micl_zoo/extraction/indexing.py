"""Writes the index of a store, shard by shard, while the first images are being embedded."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Iterator
from itertools import count

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import StoreError
from ..progress import Tick
from ..sources.index import Fingerprint, ImageIndex
from ..sources.notes import Notes
from ..stores.store import Store
from .options import ExtractOptions
from .work import Work


class Indexing:
    """Cuts a source into shards in a thread of its own, writes their index, and puts those to do into the work.

    A store that has an index already keeps it, and the source must still be what it was: ids, offsets and lengths. Only
    where images are may have changed (a folder that was moved). The index is written anew then.

    `work` gets the shards without a part, then the end or what was met: a SourceError, or a StoreError if the source is
    not that of the store. `tick` is told of the shards with a part, and at the end of the number of images.
    """

    def __init__(
        self, store: Store, pieces: Iterator[ImageIndex], work: Work, tick: Tick, options: ExtractOptions
    ) -> None:
        self.store, self.work, self.tick, self.options = store, work, tick, options
        self.images = 0  # listed so far
        self.notes = Notes()  # of the listing so far
        self.done = set(store.done())
        self._thread = threading.Thread(target=self._run, args=(pieces,), name="indexing", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """List no further."""
        self.work.close()
        self._thread.join(5)  # it ends with the process if it waits for a server

    def _run(self, pieces: Iterator[ImageIndex]) -> None:
        try:
            self._list(pieces)
            self.work.end()
        except BaseException as error:  # for the thread that works
            self.work.end(error)

    def _list(self, pieces: Iterator[ImageIndex]) -> None:
        there = self.store.indexed()
        if there != list(range(len(there))):
            lost = min(set(range(max(there))) - set(there))
            raise StoreError(
                f"index/part-{lost:05d}.parquet is missing from {str(self.store.folder)!r}: --overwrite starts anew"
            )
        fingerprint, known, first = Fingerprint(), set[str](), 0
        if self.options.only_missing:
            for first, index in enumerate(map(self.store.shard, there), start=1):
                known.update(index.ids)
                self._announce(first - 1, index, fingerprint)
        pieces = _limited(self._noting(pieces), self.options.limit)
        if known:
            fresh = ((piece.table, pa.array([name not in known for name in piece.ids], pa.bool_())) for piece in pieces)
            pieces = (ImageIndex(table.filter(mask)) for table, mask in fresh)
        rows = _cut(pieces, self.store.manifest.shard_rows)
        for number, index in zip(count(first), rows):
            if self.work.stopped:
                return
            if number < len(there):
                _compare(self.store, number, index)
            else:
                self.store.write_index(number, index)
            self._announce(number, index, fingerprint)
            first = number + 1
        if first < len(there):
            raise _other(self.store, first, 0, self.store.shard(first)[0].id, None)
        sha256 = fingerprint.hexdigest()
        finished = dataclasses.replace(self.store.manifest, rows=self.images, shards=first, index_sha256=sha256)
        if finished != self.store.manifest:
            self.store.manifest = finished
            self.store.write_manifest()
        self.tick(0, total=self.images)

    def _noting(self, pieces: Iterator[ImageIndex]) -> Iterator[ImageIndex]:
        for piece in pieces:
            self.notes.add(piece.notes)
            yield piece

    def _announce(self, number: int, index: ImageIndex, fingerprint: Fingerprint) -> None:
        fingerprint.update(index)
        self.images += len(index)
        if number in self.done:
            self.tick(0, before=len(index))
        else:
            self.work.put(number)


def _limited(pieces: Iterator[ImageIndex], limit: int | None) -> Iterator[ImageIndex]:
    left = sys.maxsize if limit is None else limit
    for piece in pieces:
        yield piece.slice(0, left)
        left -= len(piece)
        if left <= 0:
            return


def _cut(pieces: Iterator[ImageIndex], rows: int) -> Iterator[ImageIndex]:
    """Cut pieces of any size into pieces of `rows` images, but for the last."""
    held: list[pa.Table] = []
    for piece in pieces:
        held.append(piece.table)
        if sum(map(len, held)) < rows:
            continue
        table = pa.concat_tables(held)
        whole = len(table) // rows * rows
        for start in range(0, whole, rows):
            yield ImageIndex(table.slice(start, rows).combine_chunks())
        held = [table.slice(whole)]
    if any(map(len, held)):
        yield ImageIndex(pa.concat_tables(held).combine_chunks())


def _compare(store: Store, number: int, index: ImageIndex) -> None:
    """Raise unless a shard still has the images it had; write their places anew where they moved."""
    there = before = store.shard(number)
    if len(before) == len(index):
        before = before.marked_as(index)
    for name in ("id", "offset", "length", "kind"):
        mine, theirs = before.table[name].combine_chunks(), index.table[name].combine_chunks()
        if mine.equals(theirs):
            continue
        shared = min(len(mine), len(theirs))
        unlike = pc.index(pc.not_equal(mine.slice(0, shared), theirs.slice(0, shared)), True).as_py()
        row = shared if unlike < 0 else unlike
        ids = [table["id"][row].as_py() if row < len(table) else None for table in (before.table, index.table)]
        raise _other(store, number, row, *ids)
    if any(there.table[name].combine_chunks() != index.table[name].combine_chunks() for name in ("uri", "length")):
        store.write_index(number, index)


def _other(store: Store, number: int, row: int, mine: str | None, theirs: str | None) -> StoreError:
    names = ["nothing" if name is None else repr(name) for name in (mine, theirs)]
    what = (
        f"{names[0]} in the store, {names[1]} in the source"
        if mine != theirs
        else f"{mine!r} has another size or column, or its file other content"
    )
    return StoreError(
        f"{str(store.folder)!r} was made of other images; the first that differs is row {row} of shard {number}: "
        f"{what}. --only-missing adds the images that the store has not, --overwrite starts anew."
    )
