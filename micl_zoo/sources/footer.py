"""The footer of a parquet file, as far as bounds are made of it: rows and sizes by row group and column.

Not by pyarrow, whose `RowGroupMetaData.column` ends the whole process on some damaged footers, by a C++ exception that
nobody catches.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, NamedTuple

import pyarrow as pa

from .index import CELL_LENGTH
from .places import open_binary

TAIL = 64 << 10  # bytes of the end of a file, at least, that its mark is made of
MOST_FOOTER = 32 << 20  # bytes of a footer: 100 row groups of 3,000 columns, or 6,000 of 50; they take a few seconds
# What is read of Thrift's FileMetaData, by numbers of fields; the rest is skipped.
_ROWS, _PATH, _UNPACKED, _PACKED, _DICTIONARY = 3, 3, 6, 7, 11
_CHUNK: dict[int, Any] = {3: {_PATH: {}, _UNPACKED: {}, _PACKED: {}, _DICTIONARY: {}}}
_WANTED: dict[int, Any] = {4: {1: _CHUNK, _ROWS: {}}}
# Thrift's kinds of values, and the bytes of those that always have as many: as elements, booleans have one.
_TRUE, _FALSE, _BYTES, _MAP, _STRUCT = 1, 2, 8, 11, 12
_NUMBERS, _LISTS, _SIZES = (4, 5, 6), (9, 10), {1: 1, 2: 1, 3: 1, 7: 8}


class Chunk(NamedTuple):
    """A column in a row group; a column of structs has one for each field."""

    column: str  # its name, of a struct that of the struct
    unpacked: int  # bytes
    packed: int
    dictionary_at: int | None  # byte of the file where the page is that its values are looked up in


class Group(NamedTuple):
    """A row group."""

    rows: int
    chunks: list[Chunk]

    def of(self, column: str) -> list[Chunk]:
        """Return the chunks of a column."""
        return [one for one in self.chunks if one.column == column]


class Footer(NamedTuple):
    """The end of a parquet file."""

    size: int  # bytes of the file
    mark: int  # a number below CELL_LENGTH made of the end: the footer tells the sizes of all pages
    groups: list[Group]


def read_footer(uri: str) -> Footer:
    """Read the end of a parquet file that pyarrow has opened. Raises OSError, or ArrowInvalid where it is damaged."""
    with open_binary(uri) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
        if length + 8 > min(size, MOST_FOOTER):
            raise pa.ArrowInvalid(f"its footer has {length:,} bytes, {min(size, MOST_FOOTER):,} at most can be read")
        file.seek(max(0, size - max(length + 8, TAIL)))
        end = file.read(MOST_FOOTER)
    digest = hashlib.sha256(end).digest()
    mark = CELL_LENGTH - 1 - (int.from_bytes(digest[:8], "little") >> 2)
    try:
        groups = _struct(end[-length - 8 : -8], 0, _WANTED)[0].get(4, [])
        return Footer(size, mark, [_group(one) for one in groups])
    except (IndexError, AttributeError, TypeError, RecursionError):
        raise pa.ArrowInvalid("its footer is damaged") from None


def _group(raw: dict[int, Any]) -> Group:
    return Group(max(0, raw.get(_ROWS, 0)), [_chunk(one) for one in raw.get(1, [])])


def _chunk(raw: dict[int, Any]) -> Chunk:
    found = raw.get(3, {})
    (name, *_), at = found.get(_PATH) or [b""], found.get(_DICTIONARY)
    if not isinstance(name, bytes) or not isinstance(at, int | None):
        raise TypeError
    return Chunk(name.decode("utf-8", "replace"), max(0, found.get(_UNPACKED, 0)), max(0, found.get(_PACKED, 0)), at)


# Thrift's compact protocol: each function gives what starts at a byte, and where it ends. Only wanted fields become
# objects; the rest, most of a footer, is skipped in one loop, for a footer may have megabytes.


def _struct(data: bytes, at: int, wanted: dict[int, Any]) -> tuple[dict[int, Any], int]:
    """Read the wanted fields of a struct by their numbers, each with those that are wanted inside of it."""
    found, number = dict[int, Any](), 0
    while head := data[at]:
        at += 1
        kind, number = head & 15, number + (head >> 4)
        if head < 16:
            number, at = _signed(data, at)
        if kind in (_TRUE, _FALSE):
            continue
        if (inside := wanted.get(number)) is None:
            at = _skip(data, at, kind)
        else:
            found[number], at = _value(data, at, kind, inside)
    return found, at + 1


def _value(data: bytes, at: int, kind: int, wanted: dict[int, Any]) -> tuple[Any, int]:
    if kind == _STRUCT:
        return _struct(data, at, wanted)
    if kind in _NUMBERS:
        return _signed(data, at)
    if kind == _BYTES:
        length, at = _number(data, at)
        if at + length > len(data):
            raise IndexError
        return data[at : at + length], at + length
    if kind not in _LISTS:
        return None, _skip(data, at, kind)
    count, inside, at = _list_head(data, at)
    values = []
    for _ in range(count):
        value, at = _value(data, at, inside, wanted)
        values.append(value)
    return values, at


def _skip(data: bytes, at: int, kind: int) -> int:
    """Return where a value ends."""
    if kind == _STRUCT:
        while head := data[at]:
            at += 1
            if head < 16:
                _, at = _number(data, at)
            if 3 < (inside := head & 15) < 7:  # a number
                while data[at] > 127:
                    at += 1
                at += 1
            elif inside == _BYTES and data[at] < 128:
                at += data[at] + 1
            elif inside > _FALSE:
                at = _skip(data, at, inside)
        return at + 1
    if kind == _BYTES or kind in _NUMBERS:
        number, at = _number(data, at)
        return at + number * (kind == _BYTES)
    if kind in _LISTS:
        count, inside, at = _list_head(data, at)
        for _ in range(count):
            at = _skip(data, at, inside)
        return at
    if kind == _MAP:
        return _skip_map(data, at)
    if at >= len(data) or kind not in _SIZES:
        raise IndexError
    return at + _SIZES[kind]


def _skip_map(data: bytes, at: int) -> int:
    count, at = _number(data, at)
    if not count:
        return at
    kinds, at = data[at], at + 1
    for _ in range(count):
        at = _skip(data, _skip(data, at, kinds >> 4), kinds & 15)
    return at


def _list_head(data: bytes, at: int) -> tuple[int, int, int]:
    """Read how many elements a list has, and of which kind."""
    head, count, at = data[at], data[at] >> 4, at + 1
    if count == 15:
        count, at = _number(data, at)
    return count, head & 15, at


def _number(data: bytes, at: int) -> tuple[int, int]:
    if (value := data[at]) < 128:
        return value, at + 1
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise IndexError


def _signed(data: bytes, at: int) -> tuple[int, int]:
    value, at = _number(data, at)
    return (value >> 1) ^ -(value & 1), at


def unpacked_dictionary(uri: str, chunk: Chunk) -> int:
    """Read from its header what the page that a column's values are looked up in unpacks to; 0 where there is none."""
    if not chunk.dictionary_at or chunk.dictionary_at < 0:
        return 0
    with open_binary(uri) as file:
        file.seek(chunk.dictionary_at)
        header = file.read(32)
    try:  # its second field is its size, unpacked; what follows is not all there
        _, at = _signed(header, 1)
        return max(0, _signed(header, at + 1)[0]) if header[at] == 0x15 else chunk.unpacked
    except IndexError:
        return chunk.unpacked
