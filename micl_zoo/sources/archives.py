"""What files hold: images, tars and zips, how each is listed from its headers alone and read again."""

from __future__ import annotations

import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from typing import BinaryIO

from ..errors import Refused, SourceError
from ..files import to_path
from ..images.formats import SUFFIXES
from .index import Entry
from .places import File, OpenFiles, check_bytes, check_length, open_binary, read_whole
from .selection import Selection, member_is_image

ZIP_HEADER = struct.Struct("<4s2xHH4xI4xIHH")  # signature, flags, method, CRC, bytes unpacked, lengths of name, extra
ZIP_SLACK = 1024  # bytes a name, the extra fields and what follows the data usually need, so that one read is enough
ZIP_LATE_CRC = 8  # a flag: the CRC follows the data
STORED, DEFLATED = 0, 8
INFLATED = 64 << 20  # bytes that are unpacked without counting them first
HEADER_BYTES = 16 << 20  # of a name or of attributes in a tar

Members = Iterable[tuple[str, str, int, int]]  # (id, kind, offset, length) of each image, as in its Entry


def list_file(file: File, _: Selection) -> Members:
    """List an image file: itself."""
    size = file.size
    if size is None:
        place = to_path(file.place) if file.place.startswith("file://") else file.place
        try:
            size = os.stat(place).st_size  # noqa: PTH116 - a Path for each file takes as long again
        except (OSError, ValueError):
            size = 0  # a link that leads nowhere: reading it gives the ledger its reason
    return [(file.name, "file", 0, size)]


def read_file(files: OpenFiles, entry: Entry) -> bytes:
    """Read an image file."""
    return read_whole(entry.uri, entry.length, files.most)


def list_tar(file: File, selection: Selection) -> Members:
    """List the images in a tar; ids are `name#member`. One that cannot be listed to its end is an error at the end."""
    with (
        open_binary(file.place, most=HEADER_BYTES) as data,
        tarfile.open(fileobj=data, mode="r:", encoding="utf-8", errors="surrogateescape") as tar,
    ):
        end = data.seek(0, os.SEEK_END)
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else a kilobyte per member stays in memory
            if member.size < 0:
                raise tarfile.ReadError(f"the size of {member.name!r} is negative")
            if member.isreg() and not member.issparse() and member.offset_data + member.size > end:
                raise tarfile.ReadError(f"unexpected end of data in {member.name!r}")
            inside = member.name.removeprefix("./")
            if _tar_image(file, member, inside, data, selection):
                text = inside.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                yield f"{file.name}#{text}", "tar", member.offset_data, member.size
        _check_end(data, tar.offset)


def _tar_image(file: File, member: tarfile.TarInfo, inside: str, data: BinaryIO, selection: Selection) -> bool:
    """Tell whether a member is an image; what is not is noted."""
    if member.isdir() or selection.member_out(inside):
        return False
    if member.issym() or member.islnk():
        selection.notes.skipped["links in archives"] += 1
    elif not member.isreg():
        selection.notes.skipped["special files"] += 1
    elif member.issparse():
        _problem(selection, file, inside, "is a sparse file: pack it again without --sparse")
    elif member_is_image(inside, data, member.offset_data):
        return True
    else:
        selection.notes.other(inside)
    return False


def _problem(selection: Selection, file: File, inside: str, what: str) -> None:
    selection.notes.problem(f"{file.name}#{inside}", file.place, f"{inside!r} in {file.place!r} {what}")


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


def list_zip(file: File, selection: Selection) -> Members:
    """List the images in a zip; ids are `name#member`."""
    with open_binary(file.place) as data, _open_zip(file.place, data) as archive:
        members, end = archive.infolist(), data.seek(0, os.SEEK_END)
        if any(member.header_offset < 0 for member in members):
            raise zipfile.BadZipFile("its directory points before its start")
        for member in members:
            inside = member.filename.removeprefix("./")
            if _zip_image(file, member, inside, archive, selection, end):
                yield f"{file.name}#{inside}", "zip", member.header_offset, member.compress_size


def _open_zip(place: str, data: BinaryIO) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(data)
    except UnicodeDecodeError:  # zipfile reads all names or none
        raise SourceError(
            f"{place!r} has a name that is said to be UTF-8 text and is none: unpack it into a folder, or pack it again"
        ) from None


def _zip_image(
    file: File, member: zipfile.ZipInfo, inside: str, archive: zipfile.ZipFile, selection: Selection, end: int
) -> bool:
    """Tell whether a member is an image; what is not is noted. `end` is the size of the zip."""
    if member.is_dir() or selection.member_out(inside):
        return False
    can = not member.flag_bits & 1 and member.compress_type in (STORED, DEFLATED)
    if stat.S_ISLNK(member.external_attr >> 16):
        selection.notes.skipped["links in archives"] += 1
    elif not (inside.lower().endswith(SUFFIXES) or (can and _starts(archive, member, inside))):
        selection.notes.other(inside)
    elif member.header_offset + member.compress_size > end:
        _problem(selection, file, inside, "is said to lie past its end: copy or pack it again")
    elif member.flag_bits & 1:
        _problem(selection, file, inside, "is encrypted: unpack it, or pack it without a password")
    elif not can:
        how = f"compression method {member.compress_type}: pack it again, stored or deflated"
        _problem(selection, file, inside, f"is packed by {how} (images are compressed already: zip -0)")
    else:
        return True
    return False


def _starts(archive: zipfile.ZipFile, member: zipfile.ZipInfo, inside: str) -> bool:
    try:
        with archive.open(member) as data:
            return member_is_image(inside, data, 0)  # type: ignore[arg-type]
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return False  # damaged, and by its name no image either


def read_zipped(files: OpenFiles, entry: Entry) -> bytes:
    """Read the member of a zip whose local header is at the offset, unpacked and checked."""
    data = files.read_range(entry.uri, entry.offset, ZIP_HEADER.size + entry.length + ZIP_SLACK)
    if len(data) < ZIP_HEADER.size or data[:4] != b"PK\x03\x04":
        raise Refused("unreadable", f"{entry.uri} has no member at byte {entry.offset}, where one was listed")
    _, flags, method, crc, size, name, extra = ZIP_HEADER.unpack_from(data)
    start = ZIP_HEADER.size + name + extra
    if start + entry.length + 8 > len(data):
        data, start = files.read_range(entry.uri, entry.offset + start, entry.length + ZIP_SLACK), 0
    packed, rest = data[start : start + entry.length], data[start + entry.length :][:8]
    check_length(packed, entry.length, entry.uri)
    known = 0 < size < 0xFFFFFFFF and not flags & ZIP_LATE_CRC
    image = _inflate(packed, size if known else None, files.most) if method == DEFLATED else packed
    late = (int.from_bytes(rest[:4], "little"), int.from_bytes(rest[4:], "little"))  # without a signature, or with one
    if zlib.crc32(image) not in (late if flags & ZIP_LATE_CRC else (crc,)):
        raise Refused("damaged", "its bytes do not have the checksum that the zip gives")
    return image


def _inflate(packed: bytes, size: int | None, most: int) -> bytes:
    """Unpack a member of so many bytes, None if unknown; a few kilobytes can stand for gigabytes."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        if size is None or size > INFLATED:
            size = _unpacked_size(packed, most)
        check_bytes(size, most)
        data = inflater.decompress(packed, size + 1)
        if not inflater.eof and len(data) <= size:
            data += inflater.decompress(inflater.unconsumed_tail, 1)  # there may be an end without bytes
    except zlib.error as error:
        raise Refused("damaged", f"the zip's member does not unpack: {error}") from None
    if len(data) > size:
        raise Refused("damaged", f"it unpacks to more than the {size:,} bytes that the zip gives")
    if not inflater.eof:
        raise Refused("truncated", "it ends early in the zip")
    return data


def _unpacked_size(packed: bytes, most: int) -> int:
    """Count the bytes that a member unpacks to, up to one more than `most`, in little memory."""
    inflater, size, left = zlib.decompressobj(-zlib.MAX_WBITS), 0, packed
    while size <= most and not inflater.eof:
        step = len(inflater.decompress(left, 1 << 20))
        left, size = inflater.unconsumed_tail, size + step
        if not step and not left:
            break
    return size
