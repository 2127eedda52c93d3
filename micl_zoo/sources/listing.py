"""Where images are: any source becomes one ImageIndex, whole or in pieces, and images are read through it alone."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from ..errors import SourceError, UsageError
from . import remote
from .archives import IMAGE_SUFFIXES, list_parquets, list_tars, list_zips, wanted
from .index import PARQUET_CELL, Entry, Fingerprint, ImageIndex, Row, table_of
from .lists import read_list, read_standard_input
from .reader import Reader, bare, parquet_row_groups, to_path, to_uri

__all__ = [
    "PARQUET_CELL",
    "Entry",
    "Fingerprint",
    "ImageIndex",
    "Reader",
    "SourceLike",
    "index_source",
    "list_source",
    "parquet_row_groups",
]

Kind = Literal["image", "parquet", "tar", "zip", "packed tar", "list", "other"]
SourceLike = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

KINDS: dict[str, Kind] = {
    **dict.fromkeys(IMAGE_SUFFIXES, "image"),
    **dict.fromkeys((".txt", ".lst", ".csv", ".jsonl", ".ndjson"), "list"),
    ".parquet": "parquet",
    ".tar": "tar",
    ".zip": "zip",
}
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},/]*(?:,[^{},/]*)+))\}")  # {000..009} or {train,val}
PIECE_SECONDS = 0.2  # after which a piece is given out as far as it has come

Listed = tuple[
    Iterator[Row], bool
]  # and whether its ids differ from each other because they are paths below one folder


class File(NamedTuple):
    """A file that was met: its place (path or URI), its name below the source, its bytes if the listing told them."""

    place: str
    name: str
    size: int | None


def index_source(source: SourceLike) -> ImageIndex:
    """List the images of a source.

    Args:
        source: one of these, or a sequence of them. Each may be a path of this machine or a URI that fsspec knows
            (s3://, gs://, https://, file://, hf://datasets/…), with the same ids.
            A folder: recursive; hidden names, links to folders and stores of embeddings left out; the images in it, or
            if there are none its parquet files, or else its tars, or else its zips. On a web server it ends in "/".
            One image. A glob ("photos/**/*.jpg"), also with braces: "train-{0000..0099}.tar", "{train,val}/*.png".
            A list: .txt or .lst with one path a line; .csv with a header, or .jsonl, with a column of paths (the first
            of path, file, filename, file_name, image, image_path, uri, url) and, if you like, a column `id`. Paths are
            relative to the list's folder. "-": one path a line of the standard input, relative to the current folder.
            A parquet file with a column of encoded images, as `datasets` writes it. A tar, as WebDataset packs images.
            A zip.

    Returns:
        The index, in sorted order within each folder and as packed within each archive. Ids are paths relative to the
        folder or the fixed part of the glob, `archive.tar#member`, `file.parquet#row`, or what the source has as `id`.

    Raises:
        SourceError: nothing there, nothing in it that can be an image, a folder that cannot be read, an archive that is
            compressed, encrypted or damaged, a package missing for a URI, or an id twice.
    """
    tables = [piece.table for piece in list_source(source)]
    return ImageIndex(pa.concat_tables(tables).combine_chunks())


def list_source(source: SourceLike, *, chunk_rows: int = 10_000) -> Iterator[ImageIndex]:
    """The index of a source in pieces, each given out while the rest is still being listed.

    Memory does not grow with the images, beyond the names of one folder and, where ids can meet (lists, archives,
    several sources), 8 bytes an image. Where pieces are cut depends on the time listing takes; their rows do not.

    Args:
        source: see `index_source`.
        chunk_rows: of a piece, at most.

    Raises:
        SourceError: as `index_source`, when it is met, which may be in the middle.
        UsageError: chunk_rows below 1.
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
    piece: list[Row] = []
    due = time.monotonic() + PIECE_SECONDS
    for row in rows:
        piece.append(row)
        if len(piece) == size or time.monotonic() > due:
            yield piece
            piece, due = [], time.monotonic() + PIECE_SECONDS
    if piece:
        yield piece


class _SeenIds:
    """Finds an id that comes twice by 64-bit hashes in sorted runs: 8 bytes an id, where a set of them takes 60.

    Two ids out of a million that differ have one hash once in 37 million listings, and not again in the next process.
    """

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []  # longest first, each more than the next

    def add(self, ids: list[str]) -> None:
        """Raises SourceError where an id has been there before."""
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
                f"the id {ids[int(again.argmax())]!r} occurs more than once, and ids name the rows: list no image "
                "twice, pack none twice under one name, and give one folder above several that have the same names in "
                "them"
            )
        while self.runs and len(self.runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self.runs.pop(), run]), kind="stable")
        self.runs.append(run)


def _list_one(source: str) -> Listed:
    if source == "-":
        return _list_standard_input(), False
    place = str(to_path(source)) if source.lower().startswith("file://") else source
    is_folder = None if remote.is_remote(place) and _has_magic(place) else _is_folder(place)
    if is_folder:
        return _list_folder(place)
    kind = _kind(bare(place))
    if is_folder is not None and kind == "list":
        return _list_file(place), False
    if is_folder is not None:
        size = _remote_size(place) if remote.is_remote(place) and kind in ("image", "other") else None
        return _list_kind(kind, iter([File(_absolute(place), _name(place), size)]))
    if _has_magic(place):
        return _list_glob(place)
    raise SourceError(f"no such source: {source!r} is not a file, a folder or a glob that matches anything")


def _is_folder(place: str) -> bool | None:
    """None where nothing is there. Web servers have no folders, but pages that end in a slash may list files."""
    if not remote.is_remote(place):
        return True if Path(place).is_dir() else False if Path(place).is_file() else None
    if place.endswith("/") or place.startswith(("http://", "https://")) or _kind(place) != "other":
        return place.endswith("/")
    try:
        return remote.describe(place).is_folder
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SourceError(f"cannot look at {place!r}: {error}") from None


def _kind(name: str) -> Kind:
    """By its name alone."""
    name = name.lower()
    kind = KINDS.get(_suffix(name), "other")
    return "packed tar" if kind == "other" and name.endswith(PACKED_SUFFIXES) else kind


def _suffix(name: str) -> str:
    _, dot, ending = name.rpartition(".")
    return dot + ending if dot else ""


def _absolute(place: str) -> str:
    return place if remote.is_remote(place) else str(Path(place).absolute())


def _name(place: str) -> str:
    return place.rpartition("/")[2] if remote.is_remote(place) else Path(place).name


def _join(folder: str, name: str) -> str:
    if remote.is_remote(folder):
        return f"{folder.removesuffix('/')}/{name}" if not folder.endswith("://") else folder + name
    return os.path.join(folder, name)  # noqa: PTH118 - it ends in a separator where the name is empty


def _list_kind(kind: Kind, files: Iterator[File]) -> Listed:
    """Files that are all of one kind. One that is named and of no known kind is read as an image."""
    archives = {"parquet": list_parquets, "tar": list_tars, "packed tar": list_tars, "zip": list_zips}
    if kind in archives:
        return archives[kind]((to_uri(file.place), _text(file.name)) for file in files), False
    return _list_images(files), True


def _list_images(files: Iterable[File]) -> Iterator[Row]:
    for place, name, size in files:
        try:
            size = os.stat(place).st_size if size is None else size  # noqa: PTH116 - a Path a file takes as long again
        except OSError:
            size = 0  # a link that leads nowhere: reading it gives the ledger its reason
        try:
            place.encode()
        except UnicodeEncodeError:
            yield _text(name), to_uri(place), 0, size
        else:
            yield name, place, 0, size


def _text(name: str) -> str:
    """As UTF-8 text: other bytes are written \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _remote_size(uri: str) -> int:
    try:
        return remote.describe(uri).size
    except OSError as error:
        raise SourceError(f"no such source: {uri!r} cannot be read ({error})") from None


def _scan(folder: str) -> remote.Listing:
    """One folder as it is, hidden names too."""
    try:
        if remote.is_remote(folder):
            return remote.list_folder(folder)
        listing = remote.Listing({}, {})
        with os.scandir(folder) as items:
            for item in items:
                if _leads_to_folder(item):
                    listing.folders[item.name] = item.is_symlink()
                else:
                    listing.files[item.name] = None
        return listing
    except OSError as error:
        why = error.strerror or str(error)
        raise SourceError(f"cannot read the folder {folder!r} ({why}): allow it, or list the others") from None


def _leads_to_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:
        return False  # a link to itself: a file that cannot be read


def _walk(folder: str) -> Iterator[File]:
    """Every visible file below the folder: a folder's own in order, then its folders in order.

    Links to folders are not followed (they may loop). Stores of embeddings below it are left out: the output may lie in
    the source, and is no part of it.
    """
    below = [(folder, "")]
    while below:
        place, prefix = below.pop()
        listing = _scan(place)
        if prefix and _is_store(place, listing):
            continue
        inside = _join(place, "")
        for name in sorted(listing.files):
            if name[0] != ".":
                yield File(inside + name, prefix + name, listing.files[name])
        names = sorted((n for n, linked in listing.folders.items() if n[0] != "." and not linked), reverse=True)
        below += [(inside + name, f"{prefix}{name}/") for name in names]


def _is_store(folder: str, listing: remote.Listing) -> bool:
    """By the files that `store.py` writes before the first part."""
    if "manifest.json" not in listing.files or "index" not in listing.folders:
        return False
    return "part-00000.parquet" in _scan(_join(folder, "index")).files


def _list_folder(folder: str) -> Listed:
    """The images as they are met; only where there is none are archives held until the walk ends."""
    held: dict[Kind, list[File]] = {"parquet": [], "tar": [], "zip": [], "packed tar": []}
    others: Counter[str] = Counter()
    files = _walk(_absolute(folder))
    for file in files:
        kind = _kind(file.name)
        if kind == "image":
            rest = (other for other in files if _kind(other.name) == "image")
            return _list_kind(kind, itertools.chain([file], rest))
        if kind in held:
            held[kind].append(file)
        else:
            others[_suffix(file.name).lower() or "no ending"] += 1
    for kind, found in held.items():  # the first kind that is there
        if found:
            return _list_kind(kind, iter(found))
    raise SourceError(
        f"no images in {folder!r}: looked in it and below for {wanted()}, .parquet, .tar and .zip, "
        f"found {_counted(others)}"
    )


def _counted(others: Counter[str]) -> str:
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3))
    return f"{others.total()} other files" + (f" ({kinds}{', …' if len(others) > 3 else ''})" if others else "")


def _has_magic(place: str) -> bool:
    """A web address may have a "?" of its own."""
    text = place.replace("?", "") if place.startswith(("http://", "https://")) else place
    return glob.has_magic(text) or BRACES.search(text) is not None


def _expand_braces(pattern: str) -> Iterator[str]:
    """WebDataset's way to name many archives: "{08..10}" stands for 08, 09 and 10, "{train,val}" for either."""
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, words = match.groups()
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)) if first else ()
    for choice in words.split(",") if words else numbers:
        yield from _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def _list_glob(pattern: str) -> Listed:
    root, parts = _parts(pattern)
    fixed = next((i for i, part in enumerate(parts) if _has_magic(root + part)), len(parts))
    base = _absolute(root + "/".join(parts[:fixed]) or ".")
    patterns = {_parts(one)[1][fixed:]: one for one in _expand_braces(pattern)}
    if any(_has_magic(one) for one in patterns.values()):
        files = _Glob(pattern, patterns).files(base)
    else:
        files = _named(pattern, patterns, base)
    first = next(files)  # a pattern has at least one file, or is an error
    kind = _kind(first.name)
    return _list_kind("other" if kind == "list" else kind, itertools.chain([first], files))


def _parts(pattern: str) -> tuple[str, tuple[str, ...]]:
    """What is before the first name ("s3://", "/", "C:\\" or nothing), and the names."""
    if scheme := remote.SCHEME.match(pattern):
        return scheme[0], tuple(pattern[scheme.end() :].split("/"))
    path = Path(pattern)
    return path.anchor, path.parts[1:] if path.anchor else path.parts


def _no_match(pattern: str, one: str, why: str = "") -> SourceError:
    part = f", which {pattern!r} asks for," if one != pattern else ""
    return SourceError(f"the glob {one!r}{part} matches no file{why}")


def _named(pattern: str, patterns: dict[tuple[str, ...], str], base: str) -> Iterator[File]:
    """Files that braces name one by one: looked up, not looked for. Those of this machine all before the first."""
    for one in patterns.values():
        if not remote.is_remote(one) and not Path(one).is_file():
            raise _no_match(pattern, one)
    for parts in sorted(patterns):
        place, size = _join(base, "/".join(parts)), None
        if remote.is_remote(place):
            try:
                size = remote.describe(place).size
            except OSError as error:
                raise _no_match(pattern, patterns[parts], f" ({error})") from None
        yield File(place, "/".join(parts), size)


class _Glob:
    """Patterns of names and where in each a walk has come: folders are read once, files come sorted by their names."""

    def __init__(self, pattern: str, patterns: dict[tuple[str, ...], str]) -> None:
        self.pattern, self.patterns, self.names = pattern, patterns, list(patterns)
        self.matched: set[int] = set()
        self.others: Counter[str] = Counter()

    def files(self, base: str) -> Iterator[File]:
        """Raises SourceError at the end where one of the patterns matched no file."""
        if remote.is_remote(base) or Path(base).is_dir():
            yield from self._walk(base, "", {(number, 0) for number in range(len(self.names))})
        for number, parts in enumerate(self.names):
            if number not in self.matched:
                why = f": looked in {base!r}, where it met {_counted(self.others)}"
                raise _no_match(self.pattern, self.patterns[parts], why)

    def _walk(self, folder: str, prefix: str, at: set[tuple[int, int]]) -> Iterator[File]:
        """At: (pattern, position in it) of all that the folder's names may match."""
        listing = _scan(folder)
        if prefix and _is_store(folder, listing):
            return
        at, inside = self._skip(at), _join(folder, "")
        for name in sorted(listing.files.keys() | listing.folders.keys()):
            ends = {number for number, i in at if i + 1 == len(self.names[number]) and self._fits(name, number, i)}
            if name in listing.files and ends:
                self.matched |= ends
                yield File(inside + name, prefix + name, listing.files[name])
            elif name in listing.files:
                self.others[_suffix(name).lower() or "no ending"] += 1
            if name in listing.folders and (below := self._below(name, at, linked=listing.folders[name])):
                yield from self._walk(inside + name, f"{prefix}{name}/", below)

    def _skip(self, at: set[tuple[int, int]]) -> set[tuple[int, int]]:
        """With the positions behind "**", which may stand for no folder."""
        more = {(n, i + 1) for n, i in at if self.names[n][i] == "**" and i + 1 < len(self.names[n])} - at
        return self._skip(at | more) if more else at

    def _fits(self, name: str, number: int, i: int) -> bool:
        part = self.names[number][i]
        return (name[0] != "." or part[0] == ".") and fnmatch.fnmatch(name, "*" if part == "**" else part)

    def _below(self, name: str, at: set[tuple[int, int]], *, linked: bool) -> set[tuple[int, int]]:
        """Positions within a folder. "**" follows no links, which may loop; a name that is asked for is followed."""
        stay = {(n, i) for n, i in at if self.names[n][i] == "**" and name[0] != "." and not linked}
        on = {(n, i + 1) for n, i in at if i + 1 < len(self.names[n]) and self.names[n][i] != "**"}
        return stay | {(n, i) for n, i in on if self._fits(name, n, i - 1)}


def _list_file(place: str) -> Iterator[Row]:
    base = place.rpartition("/")[0] if remote.is_remote(place) else str(Path(place).absolute().parent)
    return _list_images(_target(base, path, name) for path, name in read_list(place))


def _list_standard_input() -> Iterator[Row]:
    base = str(Path.cwd())
    return _list_images(_target(base, path, path) for path in read_standard_input())


def _target(base: str, path: str, name: str) -> File:
    """A path in a list. Files of other machines are not asked for their sizes: that were a request for each."""
    if path.lower().startswith("file://"):
        path = str(to_path(path))
    elif remote.is_remote(path):
        return File(path, name, 0)
    elif remote.is_remote(base):
        return File(_join(base, path.removeprefix("./")), name, 0)
    return File(str(Path(base, path)), name, None)
