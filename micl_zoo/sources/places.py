"""Places of files: paths of this machine and URIs that fsspec knows, named, opened and read alike."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import unquote_to_bytes, urlsplit

import pyarrow as pa

from ..errors import Refused
from . import remote

OPEN_ARCHIVES = 100  # kept open by a reader: well below 256, the smallest usual limit of a process
MAX_BYTES = 1 << 30  # of one image: 89 million pixels of four 16-bit channels, uncompressed, are 716 MB

Opened = TypeVar("Opened")


class File(NamedTuple):
    """A file that was met: its place (path or URI), its name below the source, its bytes if the listing told them."""

    place: str
    name: str
    size: int | None


def bare(uri: str) -> str:
    """Drop the query of a web address; other places stay as they are."""
    return uri.partition("?")[0] if remote.is_web(uri) else uri


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
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def to_uri(path: str) -> str:
    """Turn an absolute path into a file:// URI where it is not UTF-8 text, which is all that an index can hold."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return Path(path).as_uri()
    return path


def to_path(uri: str) -> Path:
    """Return the path of a local place."""
    return Path(os.fsdecode(unquote_to_bytes(urlsplit(uri).path)) if uri.lower().startswith("file://") else uri)


def open_binary(uri: str) -> BinaryIO:
    """Open a file to seek and read in, buffered."""
    if remote.is_remote(uri):
        return io.BufferedReader(remote.RemoteFile(uri), remote.BLOCK)
    return to_path(uri).open("rb")


def read_whole(uri: str, size: int) -> bytes:
    """Read a file as it is now, which may be larger than the `size` it had when it was listed."""
    if remote.is_remote(uri):
        return remote.read_file(uri, size)
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe would be waited for
    with os.fdopen(os.open(to_path(uri), flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Refused("unreadable", f"{uri} is no regular file")
        check_bytes(status.st_size)
        return file.read()


def check_bytes(size: int) -> None:
    """Raise Refused where an image has more bytes than any of a usual size."""
    if size > MAX_BYTES:
        raise Refused("too_large", f"no image of a usual size needs more than {MAX_BYTES} bytes: it has {size}")


def check_length(data: bytes, length: int, uri: str) -> None:
    """Raise Refused where the bytes of a member are not all there."""
    if len(data) < length:
        raise Refused("unreadable", f"{uri} is shorter than it was when its members were listed")


class OpenFiles:
    """The archives that a reader keeps open.

    They are read by position, so a process forked from this one may share them. Remote files are not kept open.
    """

    def __init__(self) -> None:
        self._archives: dict[str, pa.OSFile] = {}  # the one used last comes last
        self._last: dict[Callable[[str], Any], tuple[str, Any]] = {}

    def read_range(self, uri: str, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset` on, fewer at the end of the file."""
        if remote.is_remote(uri):
            return remote.read_range(uri, offset, length) if length else b""
        archive = self._archives[uri] = self._archives.pop(uri, None) or pa.OSFile(os.fsencode(to_path(uri)))
        if len(self._archives) > OPEN_ARCHIVES:
            del self._archives[next(iter(self._archives))]
        return bytes(archive.read_at(length, offset))

    def opened(self, uri: str, open_file: Callable[[str], Opened]) -> Opened:
        """Return what `open_file` makes of a place; the last one is kept for each such function."""
        last, file = self._last.get(open_file, ("", None))
        if last != uri:
            _, file = self._last[open_file] = uri, open_file(uri)
        return file
