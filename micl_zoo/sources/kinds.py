"""The kinds of file that images come in: THE table of how each is recognised, listed, read and called."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from tarfile import TarError
from typing import NamedTuple
from zipfile import BadZipFile
from zlib import error as ZlibError

import pyarrow as pa

from ..errors import SourceError
from ..images.formats import SUFFIXES
from . import archives, parquet, remote
from .archives import Members
from .index import Entry, Row
from .notes import Notes
from .parquet import NoImages
from .places import File, OpenFiles, as_text, to_uri
from .selection import Selection, read_start

PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
PACKED_STARTS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# what a damaged or hostile archive makes its library raise
UNREADABLE = (
    *(OSError, ValueError, OverflowError, NotImplementedError, RecursionError, MemoryError, KeyError, IndexError),
    *(AttributeError, TypeError, EOFError, struct.error, TarError, BadZipFile, ZlibError, pa.ArrowException),
)
WANTED = ", ".join(sorted(SUFFIXES))  # the suffixes of images, for people


class Told(SourceError):
    """A source of which nothing could be listed, as its notes say entry by entry."""


class Kind(NamedTuple):
    """One kind of file. To add one, write its two functions and give it a row in KINDS."""

    name: str  # in the column `kind` of an index, there before ":" if more is to be said
    called: str  # in errors, behind "cannot read … as"
    suffixes: tuple[str, ...]  # of its files' names, in lower case
    # gives (id, kind, offset, length) for each image of a file, and notes what else is in it. The file's place and name
    # are UTF-8 text. Raises SourceError or one of UNREADABLE, also after some images, which stay.
    list: Callable[[File, Selection], Members]
    # gives the encoded image of an entry. Raises Refused, OSError or pyarrow.ArrowException.
    read: Callable[[OpenFiles, Entry], bytes]


KINDS = [  # a folder without images gives the files of the next kind that it has
    Kind("file", "an image", SUFFIXES, archives.list_file, archives.read_file),
    Kind("parquet", "parquet", (".parquet",), parquet.list_parquet, parquet.read_cell),
    Kind("tar", "a tar", (".tar",), archives.list_tar, archives.read_member),
    Kind("zip", "a zip", (".zip",), archives.list_zip, archives.read_zipped),
    Kind("tar", "a tar", PACKED_SUFFIXES, archives.list_tar, archives.read_member),  # to be refused by name
]


def kind_of(name: str) -> Kind | None:
    """Return the kind of a file by its name alone."""
    name = name.lower()
    return next((kind for kind in KINDS if name.endswith(kind.suffixes)), None)


def list_files(files: Iterable[tuple[Kind, File]], selection: Selection) -> Iterator[Row]:
    """List the images in files, each of its kind.

    A file that cannot be listed, or not to its end, is a problem of the notes. Raises NoImages at the end where no file
    has images, and SourceError where that is because of problems.
    """
    first, count, found = "", 0, False
    without = list[tuple[File, str]]()
    for kind, file in files:
        if not (file.place.isascii() and file.name.isascii()):
            file = File(to_uri(file.place), as_text(file.name), file.size)
        uri = file.place
        first, count = first or uri, count + 1
        try:
            for name, form, offset, length in kind.list(file, selection):
                found = True
                yield name, uri, form, offset, length
        except NoImages as error:
            without.append((file, str(error)))
        except SourceError as error:
            selection.notes.problem(file.name, uri, str(error))
        except UNREADABLE as error:
            selection.notes.problem(file.name, uri, _unreadable(uri, kind, error))
    notes = selection.notes
    if found:
        for file, why in without:
            notes.problem(file.name, file.place, why)
        return
    if notes.problems:
        raise nothing(notes)
    if without:
        raise NoImages(without[0][1] + (f", as {len(without) - 1} more" if len(without) > 1 else ""))
    where = repr(first) + (f" and {count - 1} more" if count > 1 else "")
    left = notes.left_out() or "nothing"
    raise NoImages(f"no images in {where}: looked for members ending in {WANTED}, found {left}")


def nothing(notes: Notes) -> Told:
    """Make the error of a source of which nothing could be listed."""
    first, more = notes.problems[0].detail, notes.unlisted - 1
    return Told(f"{first.rstrip('.')}; {more:,} more could not be listed" if more else first)


def _unreadable(uri: str, kind: Kind, error: BaseException) -> str:
    start = read_start(uri)
    for first, packer in PACKED_STARTS.items():
        if start.startswith(first):
            return (
                f"{uri!r} is compressed with {packer}, so its members cannot be read one by one: unpack it into "
                "a folder, or decompress it to a .tar (images are compressed already)"
            )
    why = str(error) or type(error).__name__
    if remote.is_remote(uri) and isinstance(error, OSError):  # of the way there, not of the content
        return f"cannot read {uri!r} as {kind.called}: {why}"
    if isinstance(error, RecursionError | MemoryError):
        why = "it is nested too deep" if isinstance(error, RecursionError) else "it needs more memory than there is"
    return f"cannot read {uri!r} as {kind.called}: {why}. Copy or pack it again."
