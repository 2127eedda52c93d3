"""ImageIndex: the columnar list of images that every source becomes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

PARQUET_CELL = -1  # as a length: the bytes are a parquet cell and `offset` is its row
INDEX_SCHEMA = pa.schema([("id", pa.string()), ("uri", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])
ROWS_AT_ONCE = 100_000  # of a fingerprint: text of some 10 MB, far below the 2 GB of one string array

Row = tuple[str, str, int, int]  # an Entry, unnamed where there are millions of them


class Entry(NamedTuple):
    """One image: a stable id, and where its bytes are.

    A file is (path or URI, 0, its size); a member of a tar is (tar, where its bytes start, how many); a member of a zip
    is (zip, where its local header starts, its compressed bytes); a parquet cell is (file, row, PARQUET_CELL). A path
    that is not UTF-8 is a file:// URI, and its id has the bytes in question as \\xNN. The size of a file is 0 where
    nobody told it: of a link that leads nowhere, of a URI in a list.
    """

    id: str
    uri: str
    offset: int
    length: int


@dataclass(frozen=True)
class ImageIndex:
    """A columnar list of images, in a fixed order.

    Attributes:
        table: columns id, uri (string), offset, length (int64); a row an image.
    """

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, row: int) -> Entry:
        return Entry(*(column[row].as_py() for column in self.table.columns))

    def slice(self, start: int, length: int) -> ImageIndex:
        """Rows start to start + length."""
        return ImageIndex(self.table.slice(start, length))

    def entries(self) -> Iterator[Entry]:
        """Every row in order."""
        for batch in self.table.to_batches():
            yield from (Entry(*row) for row in zip(*(column.to_pylist() for column in batch.columns), strict=True))

    def fingerprint(self) -> str:
        """See `Fingerprint`."""
        whole = Fingerprint()
        whole.update(self)
        return whole.hexdigest()


class Fingerprint:
    """Sha256 over ids, offsets and lengths in order: the same wherever the folder has been moved to.

    An index may come in pieces, and its value does not depend on how it was cut.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, index: ImageIndex) -> None:
        """Go on with the next piece."""
        for batch in index.table.to_batches(max_chunksize=ROWS_AT_ONCE):
            numbers = (batch.column(column).cast(pa.string()) for column in (2, 3))
            lines = pc.binary_join_element_wise(batch.column(0), *numbers, "\0")
            self._digest.update(_text_of(pc.binary_join_element_wise(lines, "", "\n")))  # an id, offset, length a line

    def hexdigest(self) -> str:
        """Of the pieces so far, in hexadecimal."""
        return self._digest.hexdigest()


def _text_of(strings: pa.StringArray) -> memoryview:
    """All strings of an array, one behind the other as they lie in memory: nothing is made for a row."""
    _, ends, text = strings.buffers()
    if not len(strings) or text is None:
        return memoryview(b"")
    first, *_, last = np.frombuffer(ends, np.int32)[strings.offset : strings.offset + len(strings) + 1]
    return memoryview(text)[first:last]


def table_of(rows: list[Row]) -> pa.Table:
    """Rows as the columns of an index."""
    columns = zip(*rows, strict=True) if rows else ([], [], [], [])
    arrays = [pa.array(column, field.type) for column, field in zip(columns, INDEX_SCHEMA, strict=True)]
    return pa.table(arrays, schema=INDEX_SCHEMA)
