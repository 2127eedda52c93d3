"""Reader: the bytes behind the entries of an index, local or remote."""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import Refused, SourceError
from . import remote
from .index import PARQUET_CELL, Entry

OPEN_ARCHIVES = 100  # kept open by a reader: well below 256, the smallest usual limit of a process
MAX_BYTES = 1 << 30  # of one image: 89 million pixels of four 16-bit channels, uncompressed, are 716 MB
ZIP_HEADER = struct.Struct(
    "<4s2xHH4xI4xIHH"
)  # signature, flags, method, CRC, bytes unpacked, lengths of name and extra
ZIP_SLACK = 1024  # bytes a name, the extra fields and what follows the data usually need, so that one read is enough
ZIP_LATE_CRC = 8  # a flag: the CRC follows the data
STORED, DEFLATED = 0, 8


class Reader:
    """Reads the bytes behind entries.

    It keeps one parquet row group at hand, so that index order reads each once, and the last tars and zips open: they
    are read by position, so a process forked from this one may share them. Of remote files it keeps nothing open.
    """

    def __init__(self) -> None:
        self._archives: dict[str, pa.OSFile] = {}  # the one used last comes last
        self._file: pq.ParquetFile | None = None
        self._uri = ""
        self._first = self._stop = 0
        self._cells: pa.ChunkedArray | None = None

    def read(self, entry: Entry) -> bytes:
        """The encoded image.

        Raises:
            Refused: reason "unreadable", when the file cannot be read (what is remote is tried three times); "damaged"
                or "truncated", when a zip's member is not what it was; "too_large" above MAX_BYTES.
            SourceError: a package for the kind of URI is missing.
        """
        try:
            if entry.length == PARQUET_CELL:
                return self._cell(entry.uri, entry.offset)
            if entry.length > MAX_BYTES:
                raise _too_large(f"{entry.length} bytes")
            if is_zip(entry.uri):
                return self._zipped(entry)
            return self._exactly(entry.uri, entry.offset, entry.length) if entry.offset else _whole(entry)
        except (OSError, pa.ArrowException) as error:
            raise Refused("unreadable", str(error) if entry.uri in str(error) else f"{entry.uri}: {error}") from None

    def _exactly(self, uri: str, offset: int, length: int) -> bytes:
        data = self._range(uri, offset, length)
        if len(data) < length:
            raise Refused("unreadable", f"{uri} is shorter than it was when its members were listed")
        return data

    def _range(self, uri: str, offset: int, length: int) -> bytes:
        if remote.is_remote(uri):
            return remote.read_range(uri, offset, length) if length else b""
        archive = self._archives.pop(uri, None) or pa.OSFile(os.fsencode(to_path(uri)))
        self._archives[uri] = archive
        if len(self._archives) > OPEN_ARCHIVES:
            del self._archives[next(iter(self._archives))]
        return bytes(archive.read_at(length, offset))

    def _zipped(self, entry: Entry) -> bytes:
        """The member whose local header is at the offset, unpacked and checked."""
        data = self._range(entry.uri, entry.offset, ZIP_HEADER.size + entry.length + ZIP_SLACK)
        if len(data) < ZIP_HEADER.size or data[:4] != b"PK\x03\x04":
            raise Refused("unreadable", f"{entry.uri} has no member at byte {entry.offset}, where one was listed")
        _, flags, method, crc, _, name, extra = ZIP_HEADER.unpack_from(data)
        start = ZIP_HEADER.size + name + extra
        if start + entry.length + 8 > len(data):
            data, start = self._range(entry.uri, entry.offset + start, entry.length + ZIP_SLACK), 0
        packed, rest = data[start : start + entry.length], data[start + entry.length :][:8]
        if len(packed) < entry.length:
            raise Refused("unreadable", f"{entry.uri} is shorter than it was when its members were listed")
        image = _inflate(packed) if method == DEFLATED else packed
        late = {
            int.from_bytes(rest[:4], "little"),
            int.from_bytes(rest[4:], "little"),
        }  # with a signature before, or not
        if zlib.crc32(image) not in (late if flags & ZIP_LATE_CRC else {crc}):
            raise Refused("damaged", "its bytes do not have the checksum that the zip gives")
        return image

    def _cell(self, uri: str, row: int) -> bytes:
        if uri != self._uri or self._file is None:
            self._file, self._uri, self._first, self._stop = open_parquet(uri), uri, 0, 0
        if not self._first <= row < self._stop:
            self._load_row_group(self._file, row)
        assert self._cells is not None
        value = self._cells[row - self._first].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise Refused("empty", "the parquet cell is null")
        return bytes(data)

    def _load_row_group(self, file: pq.ParquetFile, row: int) -> None:
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < first + rows:
                column = image_column(file.schema_arrow, self._uri)
                self._cells = file.read_row_group(group, columns=[column], use_threads=False).column(0)
                self._first, self._stop = first, first + rows
                return
            first += rows
        raise Refused("unreadable", f"row {row} is past the end of {self._uri} ({first} rows)")


def _whole(entry: Entry) -> bytes:
    """A file as it is now, which may be larger than it was when it was listed."""
    if remote.is_remote(entry.uri):
        return remote.read_file(entry.uri, entry.length)
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe would be waited for
    with os.fdopen(os.open(to_path(entry.uri), flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise Refused("unreadable", f"{entry.uri} is no regular file")
        if status.st_size > MAX_BYTES:
            raise _too_large(f"{status.st_size} bytes")
        return file.read()


def _inflate(packed: bytes) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflater.decompress(packed, MAX_BYTES)  # a few kilobytes can stand for gigabytes
    except zlib.error as error:
        raise Refused("damaged", f"the zip's member does not unpack: {error}") from None
    if not inflater.eof:
        raise (
            _too_large("more, unpacked") if len(data) == MAX_BYTES else Refused("truncated", "it ends early in the zip")
        )
    return data


def _too_large(found: str) -> Refused:
    return Refused("too_large", f"no image of a usual size needs more than {MAX_BYTES} bytes: it has {found}")


def is_zip(uri: str) -> bool:
    """By its name, without the query of a web address."""
    return bare(uri).lower().endswith(".zip")


def bare(uri: str) -> str:
    """A web address without its query; other places as they are."""
    return uri.partition("?")[0] if uri.startswith(("http://", "https://")) else uri


def to_uri(path: str) -> str:
    """An absolute path, as a file:// URI where it is not UTF-8 text, which is all that an index can hold."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return Path(path).as_uri()
    return path


def to_path(uri: str) -> Path:
    """The path of a local place."""
    return Path(os.fsdecode(unquote_to_bytes(urlsplit(uri).path)) if uri.startswith("file://") else uri)


def open_binary(uri: str) -> BinaryIO:
    """A file to seek and read in, buffered.

    Raises:
        OSError: it cannot be opened.
    """
    if remote.is_remote(uri):
        return io.BufferedReader(remote.RemoteFile(uri), remote.BLOCK)
    return to_path(uri).open("rb")


def open_parquet(uri: str) -> pq.ParquetFile:
    """A parquet file of an index.

    Raises:
        OSError, pyarrow.ArrowException: it cannot be opened, or is none.
    """
    if remote.is_remote(uri):
        return pq.ParquetFile(pa.PythonFile(remote.RemoteFile(uri), mode="r"))
    return pq.ParquetFile(pa.OSFile(os.fsencode(to_path(uri))))  # as bytes: pyarrow refuses text that is not UTF-8


def parquet_row_groups(uri: str) -> list[int]:
    """Rows of each row group of a parquet file of an index."""
    metadata = open_parquet(uri).metadata
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def image_column(schema: pa.Schema, uri: str) -> str:
    """The column of encoded images: binary, or a struct with a binary field `bytes` (the layout of `datasets`).

    Raises:
        SourceError: there is none.
    """
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return str(field.name)
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return str(field.name)
    raise SourceError(
        f"{uri!r} has no column of encoded images (binary, or a struct with `bytes`); it has {schema.names}"
    )
