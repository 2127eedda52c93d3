"""What archives hold: the rows of tars, zips and parquet files, from their headers alone."""

from __future__ import annotations

import stat
import tarfile
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import SourceError
from .index import PARQUET_CELL, Row
from .reader import DEFLATED, STORED, image_column, open_binary, open_parquet

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
    | {".heic", ".heif"}  # listed even where Pillow cannot read them, so that they are refused by name
)
PACKED_STARTS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
IDS_AT_ONCE = 10_000  # of a parquet's own

Members = Generator[Row, None, int]  # the images in an archive; returns the number of other members


def wanted() -> str:
    """The endings of image names, for people."""
    return ", ".join(sorted(IMAGE_SUFFIXES))


def list_tars(archives: Iterable[tuple[str, str]]) -> Iterator[Row]:
    """Images packed in tars, given as (uri, name in the ids); ids are `name#member`.

    Raises:
        SourceError: one that is compressed, damaged or cannot be read; no image in any.
    """
    return _list_members(archives, _tar_images)


def list_zips(archives: Iterable[tuple[str, str]]) -> Iterator[Row]:
    """Images packed in zips, as `list_tars` does.

    Raises:
        SourceError: one that is damaged or cannot be read, an encrypted image, an odd compression; no image in any.
    """
    return _list_members(archives, _zip_images)


def _list_members(archives: Iterable[tuple[str, str]], images: Callable[[str, str], Members]) -> Iterator[Row]:
    first, count, others, found = "", 0, 0, False
    for uri, name in archives:
        first, count = first or uri, count + 1
        members = images(uri, name)
        while True:
            try:
                row = next(members)
            except StopIteration as end:
                others += end.value
                break
            found = True
            yield row
    if not found:
        where = repr(first) + (f" and {count - 1} more" if count > 1 else "")
        raise SourceError(f"no images in {where}: looked for members ending in {wanted()}, found {others} others")


def _tar_images(uri: str, name: str) -> Members:
    others = 0
    for member in _tar_members(uri):
        inside = member.name.removeprefix("./")
        if not member.isfile() or not _is_image(inside):
            others += 1
            continue
        if member.issparse():
            raise SourceError(f"{uri!r} holds {inside!r} as a sparse file: pack it again without --sparse")
        text = inside.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        yield f"{name}#{text}", uri, member.offset_data, member.size
    return others


def _is_image(member: str) -> bool:
    hidden = any(part[:1] == "." and part not in (".", "..") for part in member.split("/"))
    return not hidden and "." + member.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def _tar_members(uri: str) -> Iterator[tarfile.TarInfo]:
    """Every member to the end. An archive that cannot be listed whole is an error, also where its start can."""
    try:
        with (
            open_binary(uri) as file,
            tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar,
        ):
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else a kilobyte a member stays in memory
                if member.size < 0:
                    raise tarfile.ReadError(f"the size of {member.name!r} is negative")
                yield member
            _check_end(file, tar.offset)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        if packer := _packer(uri):
            raise SourceError(
                f"{uri!r} is compressed with {packer}, so its members cannot be read one by one: unpack it into "
                "a folder, or decompress it to a .tar (images are compressed already)"
            ) from None
        raise SourceError(f"cannot read {uri!r} as a tar: {error}. Copy or pack it again.") from None


def _packer(uri: str) -> str | None:
    try:
        with open_binary(uri) as file:
            start = file.read(6)
    except OSError:
        return None
    return next((packer for first, packer in PACKED_STARTS.items() if start.startswith(first)), None)


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


def _zip_images(uri: str, name: str) -> Members:
    others = 0
    for member in _zip_members(uri):
        inside = member.filename.removeprefix("./")
        if member.is_dir() or stat.S_ISLNK(member.external_attr >> 16) or not _is_image(inside):
            others += 1
            continue
        if member.flag_bits & 1:
            raise SourceError(
                f"{uri!r} holds {inside!r} encrypted: unpack it with its password, or pack it without one"
            )
        if member.compress_type not in (STORED, DEFLATED):
            raise SourceError(
                f"{uri!r} holds {inside!r} by compression method {member.compress_type}: pack it again, stored or "
                "deflated (images are compressed already: zip -0)"
            )
        yield f"{name}#{inside}", uri, member.header_offset, member.compress_size
    return others


def _zip_members(uri: str) -> Iterator[zipfile.ZipInfo]:
    try:
        with open_binary(uri) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        if any(member.header_offset < 0 for member in members):
            raise zipfile.BadZipFile("its directory points before its start")
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise SourceError(f"cannot read {uri!r} as a zip: {error}. Copy or pack it again.") from None
    yield from members


def list_parquets(files: Iterable[tuple[str, str]]) -> Iterator[Row]:
    """Rows of parquet files, given as (uri, name in the ids); ids are the column `id`, or without one `name#row`.

    Raises:
        SourceError: one that cannot be read, that has no column of images, or a row without an id.
    """
    for uri, name in files:
        try:
            file = open_parquet(uri)
            image_column(file.schema_arrow, uri)
            own = "id" in file.schema_arrow.names
            ids = _own_ids(file, uri) if own else (f"{name}#{row}" for row in range(file.metadata.num_rows))
            for row, text in enumerate(ids):
                yield text, uri, row, PARQUET_CELL
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"cannot read {uri!r} as parquet: {error}") from None


def _own_ids(file: pq.ParquetFile, uri: str) -> Iterator[str]:
    first = 0
    for batch in file.iter_batches(IDS_AT_ONCE, columns=["id"], use_threads=False):
        ids = batch.column(0).cast(pa.string())
        if ids.null_count:
            row = first + ids.is_null().to_pylist().index(True)
            raise SourceError(f"row {row} of {uri!r} has no id: fill its column `id`, or rename the column")
        yield from ids.to_pylist()
        first += len(ids)
