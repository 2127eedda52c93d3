"""Listing: any source becomes one ImageIndex, whole or in pieces, and images are read through it alone."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ..errors import SourceError, UsageError
from ..files import to_path
from ..images.formats import SUFFIXES, unknown_format
from . import remote
from .globs import glob_base, glob_files, has_magic, walk
from .index import ImageIndex, Row, table_of
from .kinds import KINDS, WANTED, Kind, Told, kind_of, list_files, nothing
from .lists import LISTS, read_list, read_standard_input
from .notes import Notes, counted
from .parquet import NoImages
from .places import File, absolute, bare, split, suffix_of
from .selection import Selection, read_start, starts_as_image

SourceLike = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
PIECE_SECONDS = 0.2  # after which a piece is given out as far as it has come
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)

# endings by which files are read that have another one: where the mark of their content is, and the mark
BY_ENDING = {".zip": (0, b"PK\3\4"), ".parquet": (0, b"PAR1"), ".tar": (257, b"ustar")}

log = logging.getLogger(__name__)


class _Listed(NamedTuple):
    """The rows of one source."""

    rows: Iterator[Row]
    base: str  # the folder that its names are relative to
    distinct: bool  # whether ids of files are distinct, because they are paths below one folder


def index_source(
    source: SourceLike,
    *,
    exclude: Sequence[str] = (),
    default_exclude: bool = True,
    column: str | None = None,
    id_column: str | None = None,
) -> ImageIndex:
    """List the images of a source.

    Args:
        source: one of these, or a sequence of them. Each may be a path of this machine or a URI that fsspec knows
            (s3://, gs://, https://, file://, hf://datasets/…), with the same ids.
            A folder: recursive; hidden names, stores of embeddings and training runs left out, links to folders
            followed unless they loop; the images in it, by their endings or, where these say nothing, by their first
            bytes; or if there are none its parquet files, or else its tars, or else its zips. On a web server it ends
            in "/".
            One image. A glob ("photos/**/*.jpg"), also with braces: "train-{0000..0099}.tar", "{train,val}/*.png".
            What looks like one is a name where a thing of that very name is there; "[*]" is a letter of a name.
            A list: .txt or .lst with one path per line; .csv or .tsv with a header, .jsonl, or .json (a list, or as in
            COCO a list `images`), with a column of paths (the first of path, file, filename, file_name, image,
            image_path, uri, url) and an optional column `id`. Paths are relative to the list's folder. "-": paths on
            the standard input, relative to the current folder. A tar, as WebDataset packs images. A zip.
            A parquet file with a column of encoded images, as `datasets` writes it: the one that its metadata calls an
            image, or that is called image, img, jpg …, or that is the only one that can be.
        exclude, default_exclude, column, id_column: see `Selection`.

    Returns:
        The index, in sorted order within each folder and as packed within each archive. Ids are paths relative to the
        folder or the fixed part of the glob, `archive.tar#member`, `file.parquet#row`, or what the source has as `id`.
        Where one repeats, the later image gets its file's name and row, its folder's name, or its number. Entries that
        could not be listed are in its `notes`, with what was left out and why, and are logged as a warning.

    Raises:
        SourceError: nothing there, or nothing in it that can be listed: a folder that cannot be read, an archive that
            is compressed, encrypted or damaged, a package missing for a URI.
    """
    wanted = Selection(exclude, default_exclude=default_exclude, column=column, id_column=id_column)
    pieces, notes = list(list_source(source, selection=wanted)), Notes()
    for piece in pieces:
        notes.add(piece.notes)
    if notes.problems:
        log.warning("%s; the first: %s", notes.text(), notes.problems[0].detail)
    return ImageIndex(pa.concat_tables(piece.table for piece in pieces).combine_chunks(), notes)


def list_source(
    source: SourceLike, *, chunk_rows: int = 10_000, selection: Selection | None = None
) -> Iterator[ImageIndex]:
    """List a source in pieces, each given out while the rest is still being listed.

    Memory does not grow with the images, beyond the names of one folder and, where ids can meet (lists, archives,
    several sources), 8 bytes per image. Where pieces are cut depends on the time listing takes; their rows do not.

    Args:
        source: see `index_source`.
        chunk_rows: rows per piece, at most. The last one may have none, and notes alone.
        selection: what is taken, see there; new, for it keeps the notes.

    Raises:
        SourceError: as `index_source`, where nothing could be listed, or where a source is not there, which may be in
            the middle.
        UsageError: chunk_rows is below 1.
    """
    if chunk_rows < 1:
        raise UsageError(f"chunk_rows must be at least 1, got {chunk_rows}")
    many = source_paths(source)
    if not many:
        raise SourceError(f"no images given: the source is empty ({many!r})")
    selection = selection or Selection()
    seen, notes, found, number = _SeenIds(), Notes(), False, 0
    for one in many:
        listed, failed = _list_one(one, selection), None
        pieces = _cut(listed.rows, chunk_rows)
        while True:
            try:
                piece = next(pieces, None)
            except SourceError as error:
                failed, piece = error, None
            notes.add(selection.take_notes())
            if piece is None:
                break
            of_files = listed.distinct and piece[0][2] == "file"
            if not of_files or len(many) > 1 or any("\\x" in row[0] for row in piece):
                # Paths below one folder meet only where one has the bytes that another has as \xNN.
                piece = seen.distinct(piece, listed.base, len(many) > 1, number, notes)
            found, number = True, number + len(piece)
            yield ImageIndex(table_of(piece), notes)
            notes = Notes()
        if failed and len(many) == 1:
            raise failed
        if failed and not isinstance(failed, Told):
            notes.problem(one, absolute(one), str(failed))
    if not found:
        raise nothing(notes)
    if notes:
        yield ImageIndex(table_of([]), notes)


def source_paths(source: SourceLike) -> list[str]:
    """List the paths of one source or several."""
    return [os.fspath(one) for one in ([source] if isinstance(source, str | os.PathLike) else source)]


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
    """Gives images ids that no other has, by 64-bit hashes in sorted runs: 8 bytes per id, where a set takes 60.

    Two ids out of a million that differ have one hash once in 37 million listings, and not again in the next process.
    """

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []  # longest first, each more than the next

    def distinct(self, rows: list[Row], base: str, several: bool, first: int, notes: Notes) -> list[Row]:
        """Give another id to each row whose id was there, in this piece or before; `first` is the row's number."""
        hashes = np.fromiter((hash(row[0]) for row in rows), np.int64, len(rows))
        if self._there(hashes).any() or len(np.unique(hashes)) < len(rows):
            rows = self._renamed(rows, hashes, base, several, first, notes)
            hashes = np.fromiter((hash(row[0]) for row in rows), np.int64, len(rows))
        run = np.sort(hashes)
        while self.runs and len(self.runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self.runs.pop(), run]), kind="stable")
        self.runs.append(run)
        return rows

    def _there(self, hashes: np.ndarray) -> np.ndarray:
        there = np.zeros(len(hashes), bool)
        for old in self.runs:
            there |= old[np.searchsorted(old[:-1], hashes)] == hashes
        return there

    def _renamed(
        self, rows: list[Row], hashes: np.ndarray, base: str, several: bool, first: int, notes: Notes
    ) -> list[Row]:
        there, out, now = self._there(hashes), list[Row](), set[str]()
        for number, (row, again) in enumerate(zip(rows, there.tolist(), strict=True), first):
            name, what = row[0], ""
            if again or name in now:
                name, what = next(
                    (other, how)
                    for other, how in _other_ids(row, base, several, number)
                    if other not in now and not self._there(np.array([hash(other)])).any()
                )
                notes.renamed[what] += 1
            now.add(name)
            out.append((name, *row[1:]))
        return out


def _other_ids(row: Row, base: str, several: bool, number: int) -> Iterator[tuple[str, str]]:
    """Ids for an image whose own was there, and how they are made; there is no end of them."""
    name, place, kind, offset, _ = row
    inside = place.removeprefix(base).lstrip("/\\") if place.startswith(base) else place
    better = {"file": inside, "parquet": f"{inside}#{offset}"}.get(kind.partition(":")[0], name)
    if better != name:
        yield better, "became file#row" if kind != "file" else "became paths"
    if several:
        yield f"{base.rstrip('/').rpartition('/')[2]}/{better}", "got the name of their folder"
    while True:
        name = f"{name}#{number}"
        yield name, "got their number"


def _list_one(source: str, selection: Selection) -> _Listed:
    if source == "-":
        rows = list_files(_as_images(read_standard_input(selection)), selection)
        return _Listed(rows, str(Path.cwd()), False)
    place = str(to_path(source)) if source.lower().startswith("file://") else source
    is_folder = _is_folder(place)
    if is_folder:
        return _Listed(_list_folder(place, selection), absolute(place), True)
    if is_folder is None:
        if has_magic(place):
            return _Listed(_list_glob(place, selection), glob_base(place)[0], False)
        raise SourceError(f"no such source: {source[:500]!r} is not a file, a folder or a glob that matches anything")
    base, name = split(place)
    if suffix_of(place) in LISTS:
        return _Listed(list_files(_as_images(read_list(place, selection)), selection), base, False)
    kind, size = kind_of(bare(place)) or KINDS[0], None
    if remote.is_remote(place) and kind == KINDS[0]:
        try:
            size = remote.describe(place).size
        except OSError as error:
            raise SourceError(f"no such source: {place!r} cannot be read ({error})") from None
    if kind == KINDS[0] and not bare(place).lower().endswith(SUFFIXES):
        _check_start(place)
    return _Listed(list_files([(kind, File(absolute(place), name, size))], selection), base, True)


def _is_folder(place: str) -> bool | None:
    """None where nothing is there. Web servers have no folders, but pages that end in a slash may list files.

    What looks like a glob is a name where a thing of that very name is there; not on a web server, which may answer
    whatever is asked.
    """
    if not remote.is_remote(place):
        return _is_local_folder(place)
    named = kind_of(place) is not None or suffix_of(place) in LISTS
    web, magic = remote.is_web(place), has_magic(place)
    if magic and web:
        return None
    if (place.endswith("/") or web or named) and not magic:
        return place.endswith("/")
    try:
        return remote.describe(place).is_folder
    except FileNotFoundError:
        return None
    except OSError as error:
        if magic:  # the glob tells why
            return None
        raise SourceError(f"cannot look at {place!r}: {error}") from None


def _is_local_folder(place: str) -> bool | None:
    try:
        mode = os.stat(place).st_mode  # noqa: PTH116 - a Path would hide why
    except ValueError:
        return None
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise SourceError(f"cannot look at {place!r}: {error.strerror or error}") from None
    if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
        return stat.S_ISDIR(mode)
    raise SourceError(f"{place!r} is no regular file but a pipe, a socket or a device: - reads paths on standard input")


def _check_start(place: str) -> None:
    """Raise SourceError where a file that is no image by its name is none by its first bytes either."""
    start = read_start(place, 512)
    if starts_as_image(start) or (not start and remote.is_remote(place)):
        return
    told = unknown_format(start)
    what = told.detail
    if told.reason == "not_an_image":
        what = "its first bytes are those of no format that is read: give images, or a list of them as .txt or .csv"
    for ending, (at, mark) in BY_ENDING.items():
        if start[at : at + len(mark)] == mark:
            what = f"its content is that of a {ending}: name it so"
    raise SourceError(f"{place!r} is no image, list or archive that can be read: {what if start else 'it is empty'}")


def _as_images(files: Iterable[File]) -> Iterator[tuple[Kind, File]]:
    """Take files for images whatever their names say, for they were named one by one."""
    return ((KINDS[0], file) for file in files)


def _list_glob(pattern: str, selection: Selection) -> Iterator[Row]:
    """List what a glob matches, each file by its own kind."""
    return list_files(_kinds_of(glob_files(pattern, selection), selection), selection)


def _kinds_of(files: Iterable[File], selection: Selection) -> Iterator[tuple[Kind, File]]:
    image = KINDS[0]
    for file in files:
        if selection.file_out(file.name):
            continue
        if kind := image if selection.is_image(file) else kind_of(file.name):
            yield kind, file
        else:
            selection.notes.other(file.name)


def _list_folder(folder: str, selection: Selection) -> Iterator[Row]:
    """List the images as they are met; only where there are none are archives held until the walk ends."""
    held = dict[str, list[tuple[Kind, File]]]()
    files = _kinds_of(walk(absolute(folder), selection), selection)
    for kind, file in files:
        if kind == KINDS[0]:
            _leave_out(held.values(), selection)
            yield from list_files(itertools.chain([(kind, file)], _images_of(files, selection)), selection)
            return
        held.setdefault(kind.name, []).append((kind, file))
    errors = list[SourceError]()
    for name in dict.fromkeys(kind.name for kind in KINDS):
        if name in held:
            try:
                yield from list_files(held[name], selection)
                del held[name]
                _leave_out(held.values(), selection)
                return
            except SourceError as error:  # none of them has an image
                errors.append(error)
                if isinstance(error, Told):
                    del held[name]
    if selection.notes.problems:
        raise nothing(selection.notes)
    wanted = ", ".join([WANTED, *(kind.suffixes[0] for kind in KINDS[1:])])
    left = selection.notes.left_out() or counted(selection.notes.others)
    raise (errors or [NoImages(f"no images in {folder!r}: looked in it and below for {wanted}, found {left}")])[0]


def _images_of(files: Iterable[tuple[Kind, File]], selection: Selection) -> Iterator[tuple[Kind, File]]:
    image = KINDS[0]
    for one in files:
        if one[0] is image:
            yield one
        else:
            selection.notes.other(one[1].name)


def _leave_out(held: Iterable[list[tuple[Kind, File]]], selection: Selection) -> None:
    for _, file in itertools.chain.from_iterable(held):
        selection.notes.other(file.name)
