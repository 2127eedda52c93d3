"""ImageIndex: the columnar list of images that every source becomes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .notes import Notes

TEXT, NUMBER = pa.string(), pa.int64()
INDEX_SCHEMA = pa.schema([("id", TEXT), ("uri", TEXT), ("kind", TEXT), ("offset", NUMBER), ("length", NUMBER)])
# In the place of the length of a parquet cell, which its file does not tell, stands a mark of the file, below this
# number. In an index of an earlier version this itself stands there, and the file is not known by it.
CELL_LENGTH = -1
ROWS_AT_ONCE = 100_000  # of a fingerprint: text of some 10 MB, far below the 2 GB of one string array
ZIP_URI = r"^https?://[^?]*\.(?i:zip)(\?|$)"  # a web address without its query, in an index that states no kinds

Row = tuple[str, str, str, int, int]  # an Entry, unnamed where there are millions of them


class Entry(NamedTuple):
    """One image: a stable id, and where its bytes are."""

    id: str  # bytes that are not UTF-8 as \xNN
    uri: str  # path or URI of the file that its bytes are in; file:// where a path is not UTF-8
    # of that file: "file" is the image itself; others are in `kinds.KINDS`. Behind "parquet:" stands the column, where
    # it is not the first of bytes, which was taken before columns were chosen by their names
    kind: str
    offset: int  # 0 for a file; where a tar's member starts; where a zip's member has its local header; row of a cell
    # in bytes, compressed in a zip; below 0 for a parquet cell; 0 where nobody told: a link to nowhere, a listed URI
    length: int

    def is_same(self, other: Entry) -> bool:
        """Tell whether another index means this image, whose file may have moved since."""
        unmarked = self.length == CELL_LENGTH and other.length < 0
        same = self.length == other.length or unmarked
        return same and (self.id, self.kind, self.offset) == (other.id, other.kind, other.offset)


@dataclass(frozen=True)
class ImageIndex:
    """A columnar list of images, in a fixed order.

    Attributes:
        table: columns id, uri, kind (string), offset, length (int64); one row per image.
        notes: what could not be listed and what was left out; of a piece, since the piece before.
    """

    table: pa.Table
    notes: Notes = field(default_factory=Notes, compare=False)

    @classmethod
    def from_table(cls, table: pa.Table) -> ImageIndex:
        """Take a table as it was stored; where an earlier version wrote it without kinds, they are derived."""
        if "kind" in table.column_names:
            return cls(table)
        uri, web = table["uri"], pc.starts_with(table["uri"], "http://")
        web = pc.or_(web, pc.starts_with(uri, "https://"))
        zipped = pc.if_else(web, pc.match_substring_regex(uri, ZIP_URI), pc.match_substring_regex(uri, r"(?i)\.zip$"))
        cell, inside = pc.equal(table["length"], CELL_LENGTH), pc.not_equal(table["offset"], 0)
        kind = pc.if_else(cell, "parquet", pc.if_else(zipped, "zip", pc.if_else(inside, "tar", "file")))
        return cls(table.add_column(2, INDEX_SCHEMA.field("kind"), kind))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, row: int) -> Entry:
        return Entry(*(column[row].as_py() for column in self.table.columns))

    @property
    def ids(self) -> list[str]:
        """The id of every row."""
        return self.table["id"].to_pylist()

    def slice(self, start: int, length: int) -> ImageIndex:
        """Return rows start to start + length."""
        return ImageIndex(self.table.slice(start, length))

    def entries(self) -> Iterator[Entry]:
        """Yield every row in order."""
        for batch in self.table.to_batches():
            yield from (Entry(*row) for row in zip(*(column.to_pylist() for column in batch.columns), strict=True))

    def of_kind(self, kind: str) -> np.ndarray:
        """Tell which images lie in files of a kind: (N,) bool."""
        kinds = self.table["kind"]
        return pc.or_(pc.equal(kinds, kind), pc.starts_with(kinds, f"{kind}:")).to_numpy()

    def marks(self) -> str:
        """Hash the marks of the parquet files that images lie in, of their content; "" where they lie in none."""
        marks = sorted(length for length in self.table["length"].unique().to_pylist() if length < CELL_LENGTH)
        return hashlib.sha256(repr(marks).encode()).hexdigest() if marks else ""

    def marked_as(self, other: ImageIndex) -> ImageIndex:
        """Take the marks of parquet files of an index of as many rows, where an earlier version left this without."""
        mine, theirs = self.table["length"], other.table["length"]
        known = pc.or_(pc.not_equal(mine, CELL_LENGTH), pc.greater_equal(theirs, 0))
        return ImageIndex(self.table.set_column(4, INDEX_SCHEMA.field("length"), pc.if_else(known, mine, theirs)))

    def fingerprint(self) -> str:
        """Hash the whole index, see `Fingerprint`."""
        whole = Fingerprint()
        whole.update(self)
        return whole.hexdigest()


class Fingerprint:
    """Sha256 over ids, offsets and lengths in order: the same wherever the folder has moved, and in every version.

    An index may come in pieces, and its value does not depend on how it was cut.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, index: ImageIndex) -> None:
        """Go on with the next piece."""
        for batch in index.table.to_batches(max_chunksize=ROWS_AT_ONCE):
            lengths = pc.max_element_wise(batch.column("length"), CELL_LENGTH)  # as before there were marks
            numbers = (column.cast(pa.string()) for column in (batch.column("offset"), lengths))
            lines = pc.binary_join_element_wise(batch.column("id"), *numbers, "\0")
            self._digest.update(_text_of(pc.binary_join_element_wise(lines, "", "\n")))  # one image per line

    def hexdigest(self) -> str:
        """Return the hash of the pieces so far, in hexadecimal."""
        return self._digest.hexdigest()


def _text_of(strings: pa.StringArray) -> memoryview:
    """All strings of an array, one behind the other as they lie in memory: nothing is made for each row."""
    _, ends, text = strings.buffers()
    if not len(strings) or text is None:
        return memoryview(b"")
    first, *_, last = np.frombuffer(ends, np.int32)[strings.offset : strings.offset + len(strings) + 1]
    return memoryview(text)[first:last]


def table_of(rows: list[Row]) -> pa.Table:
    """Turn rows into the columns of an index."""
    columns = zip(*rows, strict=True) if rows else ([],) * len(INDEX_SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, INDEX_SCHEMA, strict=True)]
    return pa.table(arrays, schema=INDEX_SCHEMA)
