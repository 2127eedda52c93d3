"""Places of files: paths of this machine and URIs that fsspec knows, named, opened and read alike."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import pyarrow as pa

from .. import files
from ..errors import Refused
from . import remote

OPEN_ARCHIVES = 100  # kept open by a reader: well below 256, the smallest usual limit of a process
MAX_BYTES = 768 << 20  # of one image: 89 million pixels of four 16-bit channels, uncompressed, are 716 MB
UNSIZED_BYTES = 16 << 20  # of a file whose size is told as 0: those in /proc have no end, or none that is near
READ_BYTES = 512 << 20  # at once of an archive: the directory of a zip of five million members

Opened = TypeVar("Opened")


class File(NamedTuple):
    """A file that was met: its place (path or URI), its name below the source, its bytes if the listing told them."""

    place: str
    name: str
    size: int | None


def bare(uri: str) -> str:
    """Drop the query of a web address; other places stay as they are."""
    return uri.partition("?")[0] if remote.is_web(uri) else uri


def split(place: str) -> tuple[str, str]:
    """Split a place into the folder that it lies in and its name, which keeps the query of a web address."""
    if remote.SCHEME.match(place):
        folder = bare(place).rpartition("/")[0]
        return folder, place[len(folder) + 1 :]
    return str(Path(place).absolute().parent), Path(place).name


def suffix_of(place: str) -> str:
    """Return the suffix in lower case with its dot, "" where there is none."""
    _, dot, ending = bare(place).lower().rpartition("/")[2].rpartition(".")
    return dot + ending if dot else ""


def absolute(place: str) -> str:
    """Make a local path absolute."""
    return place if remote.is_remote(place) else str(Path(place).absolute())


def join(folder: str, name: str) -> str:
    """Put a name below a folder; an empty name leaves a separator at the end."""
    if remote.is_remote(folder):
        return f"{folder.removesuffix('/')}/{name}" if not folder.endswith("://") else folder + name
    return os.path.join(folder, name)  # noqa: PTH118 - it ends in a separator where the name is empty


def as_text(name: str) -> str:
    """Write a name as UTF-8 text, with other bytes as \\xNN."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a pair of surrogates, which no name of a file has
        return name.encode("utf-8", "backslashreplace").decode()


def to_uri(path: str) -> str:
    """Turn an absolute path into a file:// URI where it is not UTF-8 text, which is all that an index can hold."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return as_text(path) if remote.is_remote(path) else Path(path).as_uri()
    return path


def open_regular(place: str) -> io.FileIO:
    """Open a file of this machine; OSError at once where it is a pipe, a socket, a device or a folder."""
    return files.open_regular(files.to_path(place))


class _Archive(io.BufferedReader):
    """A buffered file that reads no more at once than an archive needs: what a header claims may have no end."""

    most = READ_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.most:
            raise OSError(f"a header claims {size:,} bytes where {self.most:,} at most can be")
        return super().read(size)


def open_binary(uri: str, *, most: int = READ_BYTES) -> BinaryIO:
    """Open a regular file to seek and read in, buffered, at most so many bytes at once."""
    raw = remote.RemoteFile(uri) if remote.is_remote(uri) else open_regular(uri)
    file = _Archive(raw, remote.BLOCK if remote.is_remote(uri) else io.DEFAULT_BUFFER_SIZE)
    file.most = most
    return file


def read_whole(uri: str, size: int, most: int) -> bytes:
    """Read a file as it is now, which may be larger than the `size` it had when it was listed; `most` bytes of it."""
    if remote.is_remote(uri):
        return remote.read_file(uri, size, most)
    with io.BufferedReader(open_regular(uri)) as file:
        there = os.fstat(file.fileno()).st_size
        check_bytes(there, most)
        data = file.read((there or min(UNSIZED_BYTES, most)) + 1) or b""
        if there and len(data) > there:  # it grows while it is read
            data += file.read(most + 1 - len(data))
    check_bytes(len(data), most if there else min(UNSIZED_BYTES, most))
    return data


def most_bytes(max_pixels: int) -> int:
    """Bytes that an image of so many pixels can need, of four 16-bit channels and all that a file has besides."""
    return max(MAX_BYTES, 8 * max_pixels)


def check_bytes(size: int, most: int) -> None:
    """Raise Refused where an image has more bytes than any of a usual size."""
    if size > most:
        raise Refused(
            "too_large", f"it has more than {most:,} bytes, and no image within the limit of pixels needs more"
        )


def check_length(data: bytes, length: int, uri: str) -> None:
    """Raise Refused where the bytes of a member are not all there."""
    if len(data) < length:
        raise Refused("unreadable", f"{uri} is shorter than it was when its members were listed")


def open_arrow(uri: str) -> pa.OSFile:
    """Open a regular file of this machine for pyarrow."""
    return files.open_arrow(files.to_path(uri))


class OpenFiles:
    """The archives that a reader keeps open.

    They are read by position, so a process forked from this one may share them. Remote files are not kept open.
    `most` is the number of bytes that an image may have, unpacked.
    """

    def __init__(self, most: int) -> None:
        self.most = most  # bytes of an image
        self._archives: dict[str, pa.OSFile] = {}  # the one used last comes last
        self._last: dict[Callable[[str], Any], tuple[str, Any]] = {}

    def read_range(self, uri: str, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset` on, fewer at the end of the file."""
        if remote.is_remote(uri):
            return remote.read_range(uri, offset, length) if length else b""
        archive = self._archives[uri] = self._archives.pop(uri, None) or open_arrow(uri)
        if len(self._archives) > OPEN_ARCHIVES:
            del self._archives[next(iter(self._archives))]
        return bytes(archive.read_at(max(0, min(length, archive.size() - offset)), offset))  # it makes room for all

    def opened(self, uri: str, open_file: Callable[[str], Opened]) -> Opened:
        """Return what `open_file` makes of a place; the last one is kept for each such function."""
        last, file = self._last.get(open_file, ("", None))
        if last != uri:
            _, file = self._last[open_file] = uri, open_file(uri)
        return file
