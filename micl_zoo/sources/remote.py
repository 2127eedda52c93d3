"""Object stores and web servers, through fsspec.

Every call stands for itself: no connection or file is kept here, so nothing of them crosses a fork (fsspec keeps its
instances by process). A call that fails is tried three times; then, or where nothing is there, it raises OSError.
fsspec is imported when the first URI is met.
"""

from __future__ import annotations

import asyncio
import io
import re
import time
from collections.abc import Callable
from time import monotonic
from typing import Any, NamedTuple, TypeVar

from ..errors import MiclZooError, Refused, SourceError

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
WAITS = (0.5, 2.0)  # seconds before the second and the third try
BLOCK = 1 << 20  # bytes per request of an archive that is being listed: some ten members of 100 kB
SILENCE_SECONDS = 15.0  # of a web server, after which an answer is given up; not asked again, for it costs as long
SLOW_SECONDS, SLOW_BYTES = 30.0, 20_000  # an answer may take so long, and a second more per so many bytes
# no use to ask again
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
LATE = (TimeoutError, asyncio.TimeoutError)  # two classes before Python 3.11

Answer = TypeVar("Answer")


class Listing(NamedTuple):
    """Holds what is directly in a folder."""

    files: dict[str, int | None]  # name -> bytes, None where nobody told them
    folders: dict[str, bool]  # name -> whether it is reached through a link
    nameless: int = 0  # what no path leads to: keys that end in "/" and have bytes, and folders of keys as a//b


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
    match = SCHEME.match(place)
    return match is not None and match[1].lower() in ("http", "https")


def list_folder(uri: str) -> Listing:
    """List a folder's own files and folders, hidden ones too."""
    filesystem, path = _filesystem(uri)
    items = _retried(lambda: filesystem.ls(path, detail=True))
    filesystem.invalidate_cache(path)  # it would keep every listing of a walk over millions of files
    files, folders, nameless, above = dict[str, int | None](), dict[str, bool](), 0, path.rstrip("/") + "/"
    for item in items:
        size, is_folder = item.get("size") or 0, item["type"] == "directory"
        name = item["name"].removeprefix(above).rstrip("/")
        if item["name"] == above and not is_web(uri):  # or the mark that consoles make of a folder, without bytes
            nameless += is_folder or size > 0
        elif not name or "/" in name or (is_web(uri) and name[0] == "?"):  # an index page's links to elsewhere, to sort
            continue
        elif is_folder:
            folders[name] = False
        else:
            files[name] = size
    return Listing(files, folders, nameless)


def describe(uri: str) -> Found:
    """Find out what a URI names."""
    filesystem, path = _filesystem(uri)
    info = _retried(lambda: filesystem.info(path))
    return Found(info["type"] == "directory", info.get("size") or 0)


def read_file(uri: str, size: int, most: int) -> bytes:
    """Read a whole file of `most` bytes at most; it had `size` bytes when it was listed, or 0 if nobody told."""
    filesystem, path = _filesystem(uri)
    if is_web(uri):
        data = _retried(lambda: _streamed(filesystem, path, {}, most))
    else:  # from byte 0 is one request, where s3fs would first ask how large the file is
        data = _retried(lambda: _ranged(filesystem, path, 0, most + 1))
    if len(data) > most:
        raise Refused(
            "too_large", f"{uri} has more than {most:,} bytes, and nothing that is meant to be here needs more"
        )
    return data


def read_start(uri: str, size: int) -> bytes:
    """Read the first bytes of a file."""
    filesystem, path = _filesystem(uri)
    if is_web(uri):
        return _retried(lambda: _streamed(filesystem, path, {"Range": f"bytes=0-{size - 1}"}, size))[:size]
    return _retried(lambda: _ranged(filesystem, path, 0, size))


def read_range(uri: str, offset: int, length: int) -> bytes:
    """Read `length` bytes from `offset` on, fewer at the end of the file, by one ranged request."""
    filesystem, path = _filesystem(uri)
    if is_web(uri):
        span = {"Range": f"bytes={offset}-{offset + length - 1}"}
        data = _retried(lambda: _streamed(filesystem, path, span, length))
    else:
        data = _retried(lambda: _ranged(filesystem, path, offset, offset + length))
    if len(data) > length:
        raise OSError(f"the server of {uri} sends more than the {length} bytes asked for: it serves no byte ranges")
    return data


def _ranged(filesystem: Any, path: str, start: int, end: int) -> bytes:
    plain = {} if filesystem.async_impl else {"cache_type": "none"}  # else a buffered file reads megabytes ahead
    try:
        return bytes(filesystem.cat_file(path, start=start, end=end, **plain))
    except Exception as error:
        if start == 0 and "InvalidRange" in f"{type(error).__name__} {error}":  # how S3 says that a file has no bytes
            return b""
        raise


def _streamed(filesystem: Any, path: str, headers: dict[str, str], most: int) -> bytes:
    """Read an answer of a web server up to a little more than `most` bytes, however large or slow it claims to be."""
    data, begun = bytearray(), monotonic()
    with filesystem.open(path, block_size=0, size=1, headers={"Accept-Encoding": "identity", **headers}) as answer:
        while len(data) <= most and (piece := answer.read(BLOCK)):
            data += piece
            if monotonic() - begun > SLOW_SECONDS + len(data) / SLOW_BYTES:
                raise TimeoutError(f"the server of {path} sends too slowly: {len(data):,} bytes so far")
    return bytes(data)


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
    uri = protocol + uri[scheme.end(1) :]  # fsspec knows no capitals
    try:
        kind = fsspec.get_filesystem_class(protocol)
        options = kind._get_kwargs_from_urls(uri)
        if is_web(uri):
            options["client_kwargs"] = _patience(fsspec.config.conf.get(protocol, {}).get("client_kwargs", {}))
        return kind(**options), kind._strip_protocol(uri)
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
    except Exception as error:  # each kind of file system has its own
        raise SourceError(f"cannot use {uri!r}: {type(error).__name__}: {error}") from None


def _patience(options: dict[str, Any]) -> dict[str, Any]:
    import aiohttp

    return {
        "timeout": aiohttp.ClientTimeout(total=300, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS),
        **options,
    }


def _retried(action: Callable[[], Answer]) -> Answer:
    """Try three times. Packages of protocols have their own errors, so all that is not FINAL counts as a network's."""
    for wait in (*WAITS, None):
        try:
            return action()
        except (MiclZooError, Refused):
            raise
        except FINAL as error:
            unreached = isinstance(error.__cause__, OSError)  # how fsspec says that it cannot reach a web server
            if wait is None or not unreached:
                raise next(kind for kind in FINAL if isinstance(error, kind))(_why(error)) from error
        except LATE as error:
            raise OSError(_why(error)) from error
        except Exception as error:
            if wait is None:
                raise OSError(f"{_why(error)}, at the third try") from error
        time.sleep(wait)
    raise AssertionError


def _why(error: BaseException) -> str:
    """Say in words why a call failed: of a web server fsspec gives the address alone, and the reason as the cause."""
    bare = isinstance(error, FileNotFoundError) and SCHEME.match(str(error)) is not None
    if bare and error.__cause__ is not None:
        return _why(error.__cause__)
    if (status := getattr(error, "status", None)) is not None:  # of aiohttp, whose text has the address and all headers
        first = next(iter(str(getattr(error, "message", "")).splitlines()), "")
        return f"answer {status} {first}".rstrip(" :") if status else f"{type(error).__name__} {first}".rstrip()
    if isinstance(error, FileNotFoundError):
        return "answer 404 Not Found" if bare else f"nothing is there: {error}"
    if isinstance(error, LATE):
        return f"{type(error).__name__}: {str(error) or 'no answer'}"
    return str(error) if isinstance(error, FINAL) else f"{type(error).__name__}: {error}"
