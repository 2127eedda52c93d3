"""Writes the index of a store, shard by shard, while the first images are being embedded."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Iterator
from itertools import chain, count

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import StoreError
from ..progress import Tick
from ..sources.index import Entry, Fingerprint, ImageIndex, Row, table_of
from ..sources.notes import Notes
from ..stores.store import Store
from .options import ExtractOptions
from .retry import check_part_fits, mark_changed, part_tried_again
from .work import Work

# What --only-missing leaves out besides the images that the store has, in the words of Notes.skipped.
CHANGED = "images whose names the store has for others, of another size or content"
ELSEWHERE = "images whose names the store has from another place"


class Indexing:
    """Cuts a source into shards in a thread of its own, writes their index, and puts those to do into the work.

    A store that has an index already keeps it, and the source must still be what it was: ids, offsets and lengths. What
    may have changed is where images are (a folder that was moved), the size of images without a row (a file that was
    not whole), and how many come after the last (a --limit that was left out). The index is written anew then.

    `work` gets the shards without a part and those with images to try again, then the end or what was met: a
    SourceError, or a StoreError if the source is not that of the store. `tick` is told of the images of finished
    shards, and at the end of the number of images.
    """

    def __init__(
        self, store: Store, pieces: Iterator[ImageIndex], work: Work, tick: Tick, options: ExtractOptions, command: str
    ) -> None:
        self.store, self.work, self.tick, self.options = store, work, tick, options
        self.command = command  # of this run, for the manifest
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
        before = there[-1] + 1 if there else 0  # shards, some of whose index files may be lost
        fingerprint, known, first = Fingerprint(), dict[str, Entry](), 0
        if self.options.only_missing:
            for first, index in enumerate(map(self.store.shard, range(before)), start=1):
                known.update((entry.id, entry) for entry in index.entries())
                self._announce(first - 1, index, fingerprint)
        pieces = _limited(self._noting(pieces), self.options.limit)
        if known:
            pieces = self._missing(pieces, known)
        rows = _cut(pieces, self.store.manifest.shard_rows)
        for number, index in zip(count(first), rows):
            if self.work.stopped:
                return
            if number >= before:
                self._add(number, index)
            elif differs := self._compare(number, index, last=number == before - 1):
                self._check_same_images(number, before, chain([index], rows), differs)
                for first in range(number, before):
                    self._announce(first, self.store.shard(first), fingerprint)
                first = before
                break
            self._announce(number, index, fingerprint)
            first = number + 1
        if first < before:
            more = next(number for number in there if number >= first)
            raise self._fewer() or _other(self.store, more, 0, self.store.shard(more)[0].id, None)
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

    def _missing(self, pieces: Iterator[ImageIndex], known: dict[str, Entry]) -> Iterator[ImageIndex]:
        """Leave out the images whose ids the store has, and count those that may be others."""
        for piece in pieces:
            fresh = list[Row]()
            for entry in piece.entries():
                if (before := known.get(entry.id)) is None:
                    fresh.append(entry)
                elif not before.is_same(entry):
                    self.notes.skipped[CHANGED] += 1
                elif before.uri != entry.uri:
                    self.notes.skipped[ELSEWHERE] += 1
            yield ImageIndex(table_of(fresh))

    def _announce(self, number: int, index: ImageIndex, fingerprint: Fingerprint) -> None:
        fingerprint.update(index)
        self.images += len(index)
        if number not in self.done:
            self.work.put(number)
            return
        again = set[str]()
        with contextlib.suppress(StoreError):  # a damaged part is told when all others are done
            again = part_tried_again(self.store, number, self.options)
        self.tick(0, before=len(index) - len(again))
        if again:
            self.work.put(number)

    def _add(self, number: int, index: ImageIndex) -> None:
        """Write a shard that the index has not, or has shorter."""
        if self.store.manifest.shards is not None:
            self.store.reopen("" if self.options.only_missing else self.command)
        if number in self.done:
            self.store.unfinish(number)  # before the index: a part is never shorter than its shard
            self.done.remove(number)
        self.store.write_index(number, index)

    def _compare(self, number: int, index: ImageIndex, *, last: bool) -> StoreError | None:
        """See that a shard has the images it had, and write it anew where it may be another; else say what differs."""
        try:
            before = self.store.shard(number)
        except StoreError:  # lost or damaged
            return self._restore(number, index)
        longer = last and len(before) < len(index)
        compared = index.slice(0, len(before)) if longer else index
        for name in ("id", "offset", "kind"):
            if (row := _first_difference(before, compared, name)) is not None:
                shorter = self._fewer() if row == len(compared) else None
                return shorter or _differs(self.store, number, row, before, index)
        marked = before.marked_as(compared)
        resized = pc.not_equal(marked.table["length"], compared.table["length"]).combine_chunks()
        if names := set(compared.table["id"].filter(resized).to_pylist()):
            if names & self._embedded(number):
                row = _first_difference(marked, compared, "length")
                return _differs(self.store, number, row or 0, before, index)
            mark_changed(self.store, number, names)
        if longer:
            self._add(number, index)
        elif any(_first_difference(before, index, name) is not None for name in ("uri", "length")):
            self.store.write_index(number, index)
        return None

    def _embedded(self, number: int) -> set[str]:
        """Return the ids of a shard's images that have a row."""
        if number in self.done:
            return set(self.store.part_ids(number))
        begun = self.store.beginning(number)
        return set(begun.ids) if begun else set()

    def _restore(self, number: int, index: ImageIndex) -> StoreError | None:
        """Write a shard of the index anew, if its part is of the same images."""
        if number in self.done:
            check_part_fits(self.store, number, index, self.store.rows(number))
        self.store.write_index(number, index)
        return None

    def _fewer(self) -> StoreError | None:
        """Say that the source ends before the store does because of --limit."""
        if self.options.limit is None:
            return None
        return StoreError(
            f"{str(self.store.folder)!r} has more than the first {self.options.limit:,} images of the source: leave "
            "--limit out, or give another --out"
        )

    def _check_same_images(self, number: int, before: int, rest: Iterator[ImageIndex], differs: StoreError) -> None:
        """Raise unless the rest of the source is the rest of the index, in the order that --only-missing has left."""
        shards = [self.store.shard(shard).ids for shard in range(number, before)]
        left = dict.fromkeys(chain.from_iterable(shards))
        found = dict[str, Entry]()
        for entry in (entry for index in rest for entry in index.entries()):
            if entry.id not in left:
                first = repr(entry.id) in str(differs)  # which says where, too
                raise differs if first else _unlike(self.store, f"{entry.id!r} is in the source and not in the store")
            found[entry.id] = entry
        if missing := next((name for name in left if name not in found), None):
            raise self._fewer() or _unlike(self.store, f"{missing!r} is in the store and not in the source")
        for shard, ids in enumerate(shards, number):
            in_order = ImageIndex(table_of([found[name] for name in ids]))
            if other := self._compare(shard, in_order, last=False):
                raise other


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


def _first_difference(before: ImageIndex, index: ImageIndex, name: str) -> int | None:
    """Find the first row in which a column of two indexes differs."""
    mine, theirs = (table[name].combine_chunks() for table in (before.table, index.table))
    if mine.equals(theirs):
        return None
    shared = min(len(mine), len(theirs))
    unlike: int = pc.index(pc.not_equal(mine.slice(0, shared), theirs.slice(0, shared)), True).as_py()
    return shared if unlike < 0 else unlike


def _differs(store: Store, number: int, row: int, before: ImageIndex, index: ImageIndex) -> StoreError:
    ids = [table["id"][row].as_py() if row < len(table) else None for table in (before.table, index.table)]
    return _other(store, number, row, *ids)


def _other(store: Store, number: int, row: int, mine: str | None, theirs: str | None) -> StoreError:
    names = ["nothing" if name is None else repr(name) for name in (mine, theirs)]
    what = (
        f"{names[0]} in the store, {names[1]} in the source"
        if mine != theirs
        else f"{mine!r} has another size or column, or its file other content"
    )
    return _unlike(store, f"the first that differs is row {row} of shard {number}: {what}")


def _unlike(store: Store, what: str) -> StoreError:
    return StoreError(
        f"{str(store.folder)!r} was made of other images; {what}. --only-missing adds the images that the store has "
        "not, --overwrite starts anew."
    )
