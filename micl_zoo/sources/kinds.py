"""The kinds of file that images come in: THE table of how each is recognised, listed, read and called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from tarfile import TarError
from typing import NamedTuple
from zipfile import BadZipFile

import pyarrow as pa

from ..errors import SourceError
from ..images.formats import SUFFIXES
from . import archives
from .archives import Members
from .index import Entry, Row
from .places import File, OpenFiles, as_text, open_binary, to_uri

PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
PACKED_STARTS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
UNREADABLE = (OSError, ValueError, OverflowError, NotImplementedError, TarError, BadZipFile, pa.ArrowException)
WANTED = ", ".join(sorted(SUFFIXES))  # the suffixes of images, for people


class Kind(NamedTuple):
    """One kind of file. To add one, write its two functions and give it a row in KINDS."""

    name: str  # in the column `kind` of an index
    called: str  # in errors, behind "cannot read … as"
    suffixes: tuple[str, ...]  # of its files' names, in lower case
    # gives (id, offset, length) for each image of a file, None for each other member. The file's place and name are
    # UTF-8 text. Raises SourceError or one of UNREADABLE.
    list: Callable[[File], Members]
    # gives the encoded image of an entry. Raises Refused, OSError or pyarrow.ArrowException.
    read: Callable[[OpenFiles, Entry], bytes]


KINDS = [  # a folder without images gives the files of the next kind that it has
    Kind("file", "an image", SUFFIXES, archives.list_file, archives.read_file),
    Kind("parquet", "parquet", (".parquet",), archives.list_parquet, archives.read_cell),
    Kind("tar", "a tar", (".tar",), archives.list_tar, archives.read_member),
    Kind("zip", "a zip", (".zip",), archives.list_zip, archives.read_zipped),
    Kind("tar", "a tar", PACKED_SUFFIXES, archives.list_tar, archives.read_member),  # to be refused by name
]


def kind_of(name: str) -> Kind | None:
    """Return the kind of a file by its name alone."""
    name = name.lower()
    return next((kind for kind in KINDS if name.endswith(kind.suffixes)), None)


def list_files(kind: Kind, files: Iterable[File]) -> Iterator[Row]:
    """List the images in files of one kind."""
    first, count, others, found = "", 0, 0, False
    for file in files:
        if not (file.place.isascii() and file.name.isascii()):
            file = File(to_uri(file.place), as_text(file.name), file.size)
        uri = file.place
        first, count = first or uri, count + 1
        try:
            for member in kind.list(file):
                if member is None:
                    others += 1
                else:
                    found = True
                    yield member[0], uri, kind.name, member[1], member[2]
        except SourceError:
            raise
        except UNREADABLE as error:
            raise _unreadable(uri, kind, error) from None
    if not found:
        where = repr(first) + (f" and {count - 1} more" if count > 1 else "")
        raise SourceError(f"no images in {where}: looked for members ending in {WANTED}, found {others} others")


def _unreadable(uri: str, kind: Kind, error: Exception) -> SourceError:
    start = b""
    with contextlib.suppress(OSError), open_binary(uri) as file:
        start = file.read(6)
    for first, packer in PACKED_STARTS.items():
        if start.startswith(first):
            return SourceError(
                f"{uri!r} is compressed with {packer}, so its members cannot be read one by one: unpack it into "
                "a folder, or decompress it to a .tar (images are compressed already)"
            )
    return SourceError(f"cannot read {uri!r} as {kind.called}: {error}. Copy or pack it again.")
