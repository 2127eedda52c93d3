"""From a source to the index of a store, shard by shard, while the first images are being embedded."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Iterator
from itertools import count

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import StoreError
from ..sources.index import Fingerprint, ImageIndex
from ..stores.store import Store


class Listing:
    """Cuts a source into shards in a thread of its own and writes their index; tells which there are so far.

    A store that has an index already keeps it, and the source must still be what it was: ids, offsets and lengths. Only
    where images are may have changed (a folder that was moved). The index is written anew then.
    """

    def __init__(
        self, store: Store, pieces: Iterator[ImageIndex], *, limit: int | None = None, only_missing: bool = False
    ) -> None:
        """Start.

        Args:
            store: to write the index into.
            pieces: of the source's index, see `list_source`.
            limit: images at most.
            only_missing: leave what the store's index has as it is, and add the images that it has not.
        """
        self.store, self.limit, self.only_missing = store, limit, only_missing
        self.images = 0
        self._ready: deque[tuple[int, int]] = deque()
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, args=(pieces,), name="listing", daemon=True)
        self._thread.start()

    @property
    def finished(self) -> bool:
        """All is listed; `images` is their number."""
        return not self._thread.is_alive()

    def shards(self) -> Iterator[tuple[int, int] | None]:
        """All shards in order, each with its number of images; None where none is listed yet.

        Raises:
            SourceError: of the source.
            StoreError: the source is not that of the store.
        """
        while True:
            ended = self.finished  # asked first: what was listed last is then in the queue
            if self._ready:
                yield self._ready.popleft()
            elif not ended:
                yield None
            elif self._error is not None:
                raise self._error
            else:
                return

    def stop(self) -> None:
        """List no further."""
        self._stopped = True
        self._thread.join(5)  # it ends with the process if it waits for a server

    def _run(self, pieces: Iterator[ImageIndex]) -> None:
        try:
            self._list(pieces)
        except BaseException as error:  # for `shards`, in the thread that works
            self._error = error

    def _list(self, pieces: Iterator[ImageIndex]) -> None:
        there = self.store.indexed()
        if there != list(range(len(there))):
            lost = min(set(range(max(there))) - set(there))
            raise StoreError(
                f"index/part-{lost:05d}.parquet is missing from {str(self.store.folder)!r}: --overwrite starts anew"
            )
        fingerprint = Fingerprint()
        known: set[str] = set()
        first = 0
        if self.only_missing:
            for first, index in enumerate(map(self.store.shard, there), start=1):
                known.update(index.ids)
                self._announce(first - 1, index, fingerprint)
        rows = _cut(_new(_limited(pieces, self.limit), known), self.store.manifest.shard_rows)
        for number, index in zip(count(first), rows):
            if self._stopped:
                return
            if number < len(there):
                _compare(self.store, number, index)
            else:
                self.store.write_index(number, index)
            self._announce(number, index, fingerprint)
            first = number + 1
        if first < len(there):
            raise _other(self.store, first, 0, self.store.shard(first)[0].id, None)
        self._finish(first, fingerprint.hexdigest())

    def _announce(self, number: int, index: ImageIndex, fingerprint: Fingerprint) -> None:
        fingerprint.update(index)
        self.images += len(index)
        self._ready.append((number, len(index)))

    def _finish(self, shards: int, sha256: str) -> None:
        store = self.store
        finished = dataclasses.replace(store.manifest, rows=self.images, shards=shards, index_sha256=sha256)
        if finished != store.manifest:
            store.manifest = finished
            store.write_manifest()


def _limited(pieces: Iterator[ImageIndex], limit: int | None) -> Iterator[ImageIndex]:
    left = limit
    for piece in pieces:
        if left is None:
            yield piece
            continue
        yield piece.slice(0, left)
        left -= len(piece)
        if left <= 0:
            return


def _new(pieces: Iterator[ImageIndex], known: set[str]) -> Iterator[ImageIndex]:
    """Without the images that are known."""
    for piece in pieces:
        if known:
            fresh = pa.array([name not in known for name in piece.ids], pa.bool_())
            yield ImageIndex(piece.table.filter(fresh))
        else:
            yield piece


def _cut(pieces: Iterator[ImageIndex], rows: int) -> Iterator[ImageIndex]:
    """Pieces of any size, as pieces of `rows` images each but the last."""
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
    rest = pa.concat_tables(held) if held else None
    if rest is not None and len(rest):
        yield ImageIndex(rest.combine_chunks())


def _compare(store: Store, number: int, index: ImageIndex) -> None:
    """Raise unless a shard still has the images it had; write their places anew where they moved."""
    before = store.shard(number)
    for name in ("id", "offset", "length"):
        mine, theirs = before.table[name].combine_chunks(), index.table[name].combine_chunks()
        if mine.equals(theirs):
            continue
        shared = min(len(mine), len(theirs))
        unlike = pc.index(pc.not_equal(mine.slice(0, shared), theirs.slice(0, shared)), True).as_py()
        row = shared if unlike < 0 else unlike
        ids = [table["id"][row].as_py() if row < len(table) else None for table in (before.table, index.table)]
        raise _other(store, number, row, *ids)
    if before.table["uri"].combine_chunks() != index.table["uri"].combine_chunks():
        store.write_index(number, index)


def _other(store: Store, number: int, row: int, mine: str | None, theirs: str | None) -> StoreError:
    names = ["nothing" if name is None else repr(name) for name in (mine, theirs)]
    what = f"{names[0]} in the store, {names[1]} in the source" if mine != theirs else f"{mine!r} has another size"
    return StoreError(
        f"{str(store.folder)!r} was made of other images; the first that differs is row {row} of shard {number}: "
        f"{what}. --only-missing adds the images that the store has not, --overwrite starts anew."
    )
