"""Object stores and web servers, through fsspec.

Every call stands for itself: no connection or file is kept here, so nothing of them crosses a fork (fsspec keeps its
instances by process). A call that fails is tried three times; then, or where nothing is there, it raises OSError.
fsspec is imported when the first URI is met.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ..errors import MiclZooError, SourceError

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
WAITS = (0.5, 2.0)  # seconds before the second and the third try
BLOCK = 1 << 20  # bytes per request of an archive that is being listed: some ten members of 100 kB
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, MiclZooError)  # no use to ask again

Answer = TypeVar("Answer")


class Listing(NamedTuple):
    """Holds what is directly in a folder."""

    files: dict[str, int | None]  # name -> bytes, None where nobody told them
    folders: dict[str, bool]  # name -> whether it is reached through a link


class Found(NamedTuple):
    """Says what a URI names: a folder, or a file of so many bytes (0 where the server does not say)."""

    is_folder: bool
    size: int


def is_remote(place: str) -> bool:
    """Tell whether a place is a URI of another file system; file:// URIs are paths of this one."""
    match = SCHEME.match(place)
    return match is not None and match[1].lower() != "file"


def is_web(place: str) -> bool:
    """Tell whether a place is a web address, which may have a query; web servers have no folders."""
    return place.startswith(("http://", "https://"))


def list_folder(uri: str) -> Listing:
    """List a folder's own files and folders, hidden ones too."""
    filesystem, path = _filesystem(uri)
    items = _retried(lambda: filesystem.ls(path, detail=True))
    filesystem.invalidate_cache(path)  # it would keep every listing of a walk over millions of files
    listing, above = Listing({}, {}), path.rstrip("/") + "/"
    for item in items:
        name = item["name"].rstrip("/").removeprefix(above)
        if not name or "/" in name or name[0] == "?":  # the folder itself; an index page's links to elsewhere, to sort
            continue
        if item["type"] == "directory":
            listing.folders[name] = False
        else:
            listing.files[name] = item.get("size") or 0
    return listing


def describe(uri: str) -> Found:
    """Find out what a URI names."""
    filesystem, path = _filesystem(uri)
    info = _retried(lambda: filesystem.info(path))
    return Found(info["type"] == "directory", info.get("size") or 0)


def read_file(uri: str, size: int = 0) -> bytes:
    """Read a whole file, which may have grown since it was listed with `size` bytes (0 if unknown)."""
    filesystem, path = _filesystem(uri)
    start = 0 if size else None  # from byte 0 is one request, where s3fs would first ask how large the file is
    return _retried(lambda: filesystem.cat_file(path, start=start))


def read_range(uri: str, offset: int, length: int) -> bytes:
    """Read `length` bytes from `offset` on, fewer at the end of the file, by one ranged request."""
    filesystem, path = _filesystem(uri)
    plain = {} if filesystem.async_impl else {"cache_type": "none"}  # else a buffered file reads megabytes ahead
    data: bytes = _retried(lambda: filesystem.cat_file(path, start=offset, end=offset + length, **plain))
    if len(data) > length:
        raise OSError(f"the server of {uri} sends {len(data)} bytes for {length}: it serves no byte ranges")
    return data


class RemoteFile(io.RawIOBase):
    """A remote file to seek and read in, each time by one ranged request."""

    def __init__(self, uri: str) -> None:
        self.uri, self.position = uri, 0
        self.size = describe(uri).size
        if not self.size:
            raise OSError(f"{uri} is empty, or its server does not tell its size")

    def readable(self) -> bool:
        """Return True."""
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte without a request."""
        self.position = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence])
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as the file goes."""
        length = min(len(buffer), self.size - self.position)
        if length <= 0:
            return 0
        data = read_range(self.uri, self.position, length)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _filesystem(uri: str) -> tuple[Any, str]:
    """Return the instance that fsspec keeps for this process, and the path as it writes it."""
    import fsspec  # type: ignore[import-untyped,unused-ignore]

    scheme = SCHEME.match(uri)
    assert scheme is not None, uri
    protocol = scheme[1].lower()
    try:
        kind = fsspec.get_filesystem_class(protocol)
        return kind(**kind._get_kwargs_from_urls(uri)), kind._strip_protocol(uri)
    except ImportError as error:
        raise SourceError(
            f"{uri!r} needs a package that is not installed ({error}): pip install 'micl-zoo[remote]' has those of "
            "s3://, gs:// and https://"
        ) from None
    except ValueError as error:
        if protocol in fsspec.available_protocols():
            raise SourceError(f"cannot use {uri!r}: {error}") from None
        raise SourceError(
            f"{uri!r} starts with {protocol}://, which fsspec does not know: s3, gs, https, hf …"
        ) from None


def _retried(action: Callable[[], Answer]) -> Answer:
    """Try three times. Packages of protocols have their own errors, so all that is not FINAL counts as a network's."""
    for wait in (*WAITS, None):
        try:
            return action()
        except FINAL as error:
            unreached = isinstance(error.__cause__, OSError)  # how fsspec says that it cannot reach a web server
            if wait is None or not unreached:
                raise
        except Exception as error:
            if wait is None:
                raise OSError(f"{type(error).__name__} at the third try: {error}") from error
        time.sleep(wait)
    raise AssertionError
