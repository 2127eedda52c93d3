"""Listing: any source becomes one ImageIndex, whole or in pieces, and images are read through it alone."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..errors import SourceError, UsageError
from . import remote
from .globs import counted, glob_files, has_magic, walk
from .index import ImageIndex, Row, table_of
from .kinds import KINDS, WANTED, Kind, kind_of, list_files
from .lists import LISTS, read_list, read_standard_input
from .places import File, absolute, bare, suffix_of, to_path

SourceLike = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
PIECE_SECONDS = 0.2  # after which a piece is given out as far as it has come

Listed = tuple[Iterator[Row], bool]  # and whether its ids are distinct, because they are paths below one folder


def index_source(source: SourceLike) -> ImageIndex:
    """List the images of a source.

    Args:
        source: one of these, or a sequence of them. Each may be a path of this machine or a URI that fsspec knows
            (s3://, gs://, https://, file://, hf://datasets/…), with the same ids.
            A folder: recursive; hidden names, links to folders and stores of embeddings left out; the images in it, or
            if there are none its parquet files, or else its tars, or else its zips. On a web server it ends in "/".
            One image. A glob ("photos/**/*.jpg"), also with braces: "train-{0000..0099}.tar", "{train,val}/*.png".
            A list: .txt or .lst with one path per line; .csv with a header, or .jsonl, with a column of paths (the
            first of path, file, filename, file_name, image, image_path, uri, url) and an optional column `id`. Paths
            are relative to the list's folder. "-": paths on the standard input, relative to the current folder.
            A parquet file with a column of encoded images, as `datasets` writes it. A tar, as WebDataset packs images.
            A zip.

    Returns:
        The index, in sorted order within each folder and as packed within each archive. Ids are paths relative to the
        folder or the fixed part of the glob, `archive.tar#member`, `file.parquet#row`, or what the source has as `id`.

    Raises:
        SourceError: nothing there, nothing in it that can be an image, a folder that cannot be read, an archive that is
            compressed, encrypted or damaged, a package missing for a URI, or an id twice.
    """
    return ImageIndex(pa.concat_tables(piece.table for piece in list_source(source)).combine_chunks())


def list_source(source: SourceLike, *, chunk_rows: int = 10_000) -> Iterator[ImageIndex]:
    """List a source in pieces, each given out while the rest is still being listed.

    Memory does not grow with the images, beyond the names of one folder and, where ids can meet (lists, archives,
    several sources), 8 bytes per image. Where pieces are cut depends on the time listing takes; their rows do not.

    Args:
        source: see `index_source`.
        chunk_rows: rows per piece, at most.

    Raises:
        SourceError: as `index_source`, when it is met, which may be in the middle.
        UsageError: chunk_rows is below 1.
    """
    if chunk_rows < 1:
        raise UsageError(f"chunk_rows must be at least 1, got {chunk_rows}")
    many = [source] if isinstance(source, str | os.PathLike) else list(source)
    if not many:
        raise SourceError(f"no images given: the source is empty ({many!r})")
    seen = _SeenIds()
    for one in many:
        rows, distinct = _list_one(os.fspath(one))
        for piece in _cut(rows, chunk_rows):
            # Paths below one folder meet only where one has the bytes that another has as \xNN.
            seen.add([row[0] for row in piece if not distinct or len(many) > 1 or "\\x" in row[0]])
            yield ImageIndex(table_of(piece))


def _cut(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    piece, due = list[Row](), time.monotonic() + PIECE_SECONDS
    for row in rows:
        piece.append(row)
        if len(piece) == size or time.monotonic() > due:
            yield piece
            piece, due = [], time.monotonic() + PIECE_SECONDS
    if piece:
        yield piece


class _SeenIds:
    """Finds an id that comes twice by 64-bit hashes in sorted runs: 8 bytes per id, where a set of them takes 60.

    Two ids out of a million that differ have one hash once in 37 million listings, and not again in the next process.
    """

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []  # longest first, each more than the next

    def add(self, ids: list[str]) -> None:
        if not ids:
            return
        hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
        run, first = np.unique(hashes, return_index=True)
        again = np.ones(len(ids), bool)
        again[first] = False
        for old in self.runs:
            again |= old[np.searchsorted(old[:-1], hashes)] == hashes
        if again.any():
            raise SourceError(
                f"the id {ids[int(again.argmax())]!r} occurs more than once, and ids name the rows: list or pack no "
                "image twice under one name, and give one folder above several that have the same names in them"
            )
        while self.runs and len(self.runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self.runs.pop(), run]), kind="stable")
        self.runs.append(run)


def _list_one(source: str) -> Listed:
    if source == "-":
        return list_files(KINDS[0], read_standard_input()), False
    place = str(to_path(source)) if source.lower().startswith("file://") else source
    is_folder = None if remote.is_remote(place) and has_magic(place) else _is_folder(place)
    if is_folder:
        return _list_folder(place)
    if is_folder is None:
        if has_magic(place):
            files = glob_files(place)
            first = next(files)  # a pattern has at least one file, or is an error
            return _list_kind(kind_of(first.name), itertools.chain([first], files))
        raise SourceError(f"no such source: {source!r} is not a file, a folder or a glob that matches anything")
    if suffix_of(place) in LISTS:
        return list_files(KINDS[0], read_list(place)), False
    kind, size = kind_of(bare(place)) or KINDS[0], None
    if remote.is_remote(place) and kind == KINDS[0]:
        try:
            size = remote.describe(place).size
        except OSError as error:
            raise SourceError(f"no such source: {place!r} cannot be read ({error})") from None
    name = place.rpartition("/")[2] if remote.is_remote(place) else Path(place).name
    return _list_kind(kind, [File(absolute(place), name, size)])


def _is_folder(place: str) -> bool | None:
    """None where nothing is there. Web servers have no folders, but pages that end in a slash may list files."""
    if not remote.is_remote(place):
        return True if Path(place).is_dir() else False if Path(place).is_file() else None
    named = kind_of(place) is not None or suffix_of(place) in LISTS
    if place.endswith("/") or remote.is_web(place) or named:
        return place.endswith("/")
    try:
        return remote.describe(place).is_folder
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SourceError(f"cannot look at {place!r}: {error}") from None


def _list_kind(kind: Kind | None, files: Iterable[File]) -> Listed:
    """List files that are all of one kind. A file that is named and of no known kind is read as an image."""
    kind = kind or KINDS[0]
    return list_files(kind, files), kind == KINDS[0]


def _list_folder(folder: str) -> Listed:
    """List the images as they are met; only where there are none are archives held until the walk ends."""
    held, others, files = dict[Kind, list[File]](), Counter[str](), walk(absolute(folder))
    for file in files:
        kind = kind_of(file.name)
        if kind == KINDS[0]:
            rest = (other for other in files if kind_of(other.name) == kind)
            return _list_kind(kind, itertools.chain([file], rest))
        if kind:
            held.setdefault(kind, []).append(file)
        else:
            others[suffix_of(file.name) or "no ending"] += 1
    for kind in KINDS:
        if kind in held:
            return _list_kind(kind, held[kind])
    wanted = ", ".join([WANTED, *(kind.suffixes[0] for kind in KINDS[1:])])
    raise SourceError(f"no images in {folder!r}: looked in it and below for {wanted}, found {counted(others)}")
