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
MOST_FOOTER = 64 << 20
# What is read of Thrift's FileMetaData, by numbers of fields; the rest is skipped.
_ROWS, _PATH, _UNPACKED, _PACKED, _DICTIONARY = 3, 3, 6, 7, 11
_CHUNK: dict[int, Any] = {3: {_PATH: {}, _UNPACKED: {}, _PACKED: {}, _DICTIONARY: {}}}
_WANTED: dict[int, Any] = {4: {1: _CHUNK, _ROWS: {}}}


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
        groups = _Thrift(end[-length - 8 : -8]).struct(_WANTED).get(4, [])
        return Footer(size, mark, [_group(one) for one in groups])
    except (IndexError, AttributeError, TypeError, RecursionError):
        raise pa.ArrowInvalid("its footer is damaged") from None


def _group(raw: dict[int, Any]) -> Group:
    return Group(max(0, raw.get(_ROWS, 0)), [_chunk(one) for one in raw.get(1, [])])


def _chunk(raw: dict[int, Any]) -> Chunk:
    found = raw.get(3, {})
    name = bytes((found.get(_PATH) or [b""])[0]).decode("utf-8", "replace")
    return Chunk(name, max(0, found.get(_UNPACKED, 0)), max(0, found.get(_PACKED, 0)), found.get(_DICTIONARY))


class _Thrift:
    """Thrift's compact protocol, of which only wanted fields become objects."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self, wanted: dict[int, Any] | None) -> dict[int, Any]:
        """Read a struct: wanted fields by their numbers. Nothing is made of one that is None."""
        found, number = dict[int, Any](), 0
        while head := self._byte():
            kind = head & 15
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            inside = None if wanted is None else wanted.get(number)
            value = kind == 1 if kind in (1, 2) else self._value(kind, inside)
            if inside is not None:
                found[number] = value
        return found

    def _value(self, kind: int, wanted: dict[int, Any] | None) -> Any:
        if kind == 12:
            return self.struct(wanted)
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind == 8:
            return self._skip(self._varint())
        if kind in (9, 10):
            head = self._byte()
            count, inside = head >> 4 if head >> 4 < 15 else self._varint(), head & 15
            values = (self._value(inside, wanted) for _ in range(count))
            return list(values) if wanted is not None else all(True for _ in values)
        if kind == 11:
            return self._map()
        return self._skip({1: 1, 2: 1, 3: 1, 7: 8}[kind] if kind in (1, 2, 3, 7) else len(self.data))

    def _map(self) -> None:
        count = self._varint()
        kinds = self._byte() if count else 0
        for _ in range(count):
            self._value(kinds >> 4, None)
            self._value(kinds & 15, None)

    def _skip(self, length: int) -> bytes:
        self.at += length
        if self.at > len(self.data):
            raise IndexError
        return self.data[self.at - length : self.at]

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise IndexError

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)


def unpacked_dictionary(uri: str, chunk: Chunk) -> int:
    """Read from its header what the page that a column's values are looked up in unpacks to; 0 where there is none."""
    if not chunk.dictionary_at or chunk.dictionary_at < 0:
        return 0
    with open_binary(uri) as file:
        file.seek(chunk.dictionary_at)
        header = file.read(32)
    try:
        return max(0, int(_Header(header).struct({2: {}})[2]))
    except (IndexError, KeyError):
        return chunk.unpacked


class _Header(_Thrift):
    """The header of a page, of which the first bytes are there: its second field is its size, unpacked."""

    def struct(self, wanted: dict[int, Any] | None) -> dict[int, Any]:
        self._byte()
        self._zigzag()
        return {2: self._zigzag()} if self._byte() == 0x15 else {}
