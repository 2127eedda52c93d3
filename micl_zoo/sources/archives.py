"""What files hold: images, tars, zips and parquet files, how each is listed from its headers alone and read again."""

from __future__ import annotations

import itertools
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import Refused, SourceError
from ..images.formats import SUFFIXES
from . import remote
from .index import CELL_LENGTH, Entry
from .places import MAX_BYTES, File, OpenFiles, check_bytes, check_length, open_binary, read_whole, to_path

ZIP_HEADER = struct.Struct("<4s2xHH4xI4xIHH")  # signature, flags, method, CRC, bytes unpacked, lengths of name, extra
ZIP_SLACK = 1024  # bytes a name, the extra fields and what follows the data usually need, so that one read is enough
ZIP_LATE_CRC = 8  # a flag: the CRC follows the data
STORED, DEFLATED = 0, 8
IDS_AT_ONCE = 10_000  # of a parquet's own

Members = Iterable[tuple[str, int, int] | None]  # (id, offset, length) of each image, None for each other member


def list_file(file: File) -> Members:
    """List an image file: itself."""
    size = file.size
    if size is None:
        place = to_path(file.place) if file.place.startswith("file://") else file.place
        try:
            size = os.stat(place).st_size  # noqa: PTH116 - a Path for each file takes as long again
        except OSError:
            size = 0  # a link that leads nowhere: reading it gives the ledger its reason
    return [(file.name, 0, size)]


def read_file(files: OpenFiles, entry: Entry) -> bytes:
    """Read an image file."""
    return read_whole(entry.uri, entry.length)


def _is_image(member: str) -> bool:
    hidden = any(part[:1] == "." and part not in (".", "..") for part in member.split("/"))
    return not hidden and member.lower().endswith(SUFFIXES)


def list_tar(file: File) -> Members:
    """List the images in a tar; ids are `name#member`. One that cannot be listed to its end is an error."""
    with (
        open_binary(file.place) as data,
        tarfile.open(fileobj=data, mode="r:", encoding="utf-8", errors="surrogateescape") as tar,
    ):
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else a kilobyte per member stays in memory
            if member.size < 0:
                raise tarfile.ReadError(f"the size of {member.name!r} is negative")
            inside = member.name.removeprefix("./")
            if not member.isfile() or not _is_image(inside):
                yield None
                continue
            if member.issparse():
                raise SourceError(f"{file.place!r} holds {inside!r} as a sparse file: pack it again without --sparse")
            text = inside.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            yield f"{file.name}#{text}", member.offset_data, member.size
        _check_end(data, tar.offset)


def _check_end(file: BinaryIO, offset: int) -> None:
    """`tarfile` ends quietly where a header is damaged, where the file is cut off, and at a first end of several."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it stops at byte {offset + len(block)} without an end-of-archive mark")
    if any(block):
        raise tarfile.ReadError(f"the header at byte {offset} is damaged")
    while block := file.read(1 << 20):
        if any(block):
            raise tarfile.ReadError(f"more follows its end at byte {offset}, as where archives are joined with cat")


def read_member(files: OpenFiles, entry: Entry) -> bytes:
    """Read a member of a tar."""
    data = files.read_range(entry.uri, entry.offset, entry.length)
    check_length(data, entry.length, entry.uri)
    return data


def list_zip(file: File) -> Members:
    """List the images in a zip; ids are `name#member`."""
    with open_binary(file.place) as data, zipfile.ZipFile(data) as archive:
        members = archive.infolist()
    if any(member.header_offset < 0 for member in members):
        raise zipfile.BadZipFile("its directory points before its start")
    for member in members:
        inside = member.filename.removeprefix("./")
        if member.is_dir() or stat.S_ISLNK(member.external_attr >> 16) or not _is_image(inside):
            yield None
            continue
        if member.flag_bits & 1:
            raise SourceError(f"{file.place!r} holds {inside!r} encrypted: unpack it, or pack it without a password")
        if member.compress_type not in (STORED, DEFLATED):
            raise SourceError(
                f"{file.place!r} holds {inside!r} by compression method {member.compress_type}: pack it again, stored "
                "or deflated (images are compressed already: zip -0)"
            )
        yield f"{file.name}#{inside}", member.header_offset, member.compress_size


def read_zipped(files: OpenFiles, entry: Entry) -> bytes:
    """Read the member of a zip whose local header is at the offset, unpacked and checked."""
    data = files.read_range(entry.uri, entry.offset, ZIP_HEADER.size + entry.length + ZIP_SLACK)
    if len(data) < ZIP_HEADER.size or data[:4] != b"PK\x03\x04":
        raise Refused("unreadable", f"{entry.uri} has no member at byte {entry.offset}, where one was listed")
    _, flags, method, crc, _, name, extra = ZIP_HEADER.unpack_from(data)
    start = ZIP_HEADER.size + name + extra
    if start + entry.length + 8 > len(data):
        data, start = files.read_range(entry.uri, entry.offset + start, entry.length + ZIP_SLACK), 0
    packed, rest = data[start : start + entry.length], data[start + entry.length :][:8]
    check_length(packed, entry.length, entry.uri)
    image = _inflate(packed) if method == DEFLATED else packed
    late = (int.from_bytes(rest[:4], "little"), int.from_bytes(rest[4:], "little"))  # without a signature, or with one
    if zlib.crc32(image) not in (late if flags & ZIP_LATE_CRC else (crc,)):
        raise Refused("damaged", "its bytes do not have the checksum that the zip gives")
    return image


def _inflate(packed: bytes) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflater.decompress(packed, MAX_BYTES + 1)  # a few kilobytes can stand for gigabytes
    except zlib.error as error:
        raise Refused("damaged", f"the zip's member does not unpack: {error}") from None
    check_bytes(len(data))
    if not inflater.eof:
        raise Refused("truncated", "it ends early in the zip")
    return data


def list_parquet(file: File) -> Members:
    """List the rows of a parquet file; ids are its column `id`, or without one `name#row`."""
    parquet = open_parquet(file.place)
    image_column(parquet.schema_arrow, file.place)
    own, rows = "id" in parquet.schema_arrow.names, range(parquet.metadata.num_rows)
    ids = _own_ids(parquet, file.place) if own else (f"{file.name}#{row}" for row in rows)
    return zip(ids, rows, itertools.repeat(CELL_LENGTH))


def _own_ids(parquet: pq.ParquetFile, uri: str) -> Iterator[str]:
    first = 0
    for batch in parquet.iter_batches(IDS_AT_ONCE, columns=["id"], use_threads=False):
        ids = batch.column(0).cast(pa.string())
        if ids.null_count:
            row = first + ids.is_null().to_pylist().index(True)
            raise SourceError(f"row {row} of {uri!r} has no id: fill its column `id`, or rename the column")
        yield from ids.to_pylist()
        first += len(ids)


def read_cell(files: OpenFiles, entry: Entry) -> bytes:
    """Read a cell of a parquet file."""
    value = files.opened(entry.uri, _Cells)[entry.offset]
    data = value["bytes"] if isinstance(value, dict) else value
    if data is None:
        raise Refused("empty", "the parquet cell is null")
    return bytes(data)


class _Cells:
    """The images of an open parquet file by row; the row group that was read last is kept."""

    def __init__(self, uri: str) -> None:
        self.uri, self.file = uri, open_parquet(uri)
        self.column = image_column(self.file.schema_arrow, uri)
        self.starts = [0, *itertools.accumulate(parquet_row_groups(self.file))]
        self.group, self.cells = -1, pa.chunked_array([], pa.binary())

    def __getitem__(self, row: int) -> bytes | dict[str, bytes | None] | None:
        if row >= self.starts[-1]:
            raise Refused("unreadable", f"row {row} is past the end of {self.uri} ({self.starts[-1]} rows)")
        group = bisect_right(self.starts, row) - 1
        if group != self.group:
            self.load(group)
        return self.cells[row - self.starts[group]].as_py()

    def load(self, group: int) -> None:
        self.cells = self.file.read_row_group(group, columns=[self.column], use_threads=False).column(0)
        self.group = group


def open_parquet(uri: str) -> pq.ParquetFile:
    """Open a parquet file of an index."""
    if remote.is_remote(uri):
        return pq.ParquetFile(pa.PythonFile(remote.RemoteFile(uri), mode="r"))
    return pq.ParquetFile(pa.OSFile(os.fsencode(to_path(uri))))  # as bytes: pyarrow refuses text that is not UTF-8


def parquet_row_groups(file: pq.ParquetFile) -> list[int]:
    """Return the rows of each row group."""
    return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


def image_column(schema: pa.Schema, uri: str) -> str:
    """Find the column of encoded images: binary, or a struct with a binary field `bytes` (the layout of `datasets`)."""
    for name, kind in zip(schema.names, schema.types, strict=True):
        of_datasets = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if of_datasets or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return str(name)
    raise SourceError(f"{uri!r} has no column of encoded images (binary or struct with `bytes`): it has {schema.names}")
