"""Images in the cells of parquet files: which column has them, how rows are listed, and how a cell is read."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import Refused, SourceError
from . import remote
from .archives import Members
from .footer import Footer, Group, read_footer, unpacked_dictionary
from .index import Entry
from .places import File, OpenFiles, check_bytes, join, open_arrow, open_binary, read_whole, split
from .selection import Selection

IMAGE_NAMES = (
    "image",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "picture",
    "photo",
    "pixel_values",
    "image_bytes",
    "img_bytes",
)
# Columns of bytes that are no pictures, or none to embed: never taken because they are the only ones.
NOT_IMAGES = re.compile(
    r"(?i)audio|sound|speech|video|mask|annot|segment|depth|hash|sha\d|md5|crc|digest|embed|latent|label|uuid|thumb|bbox|token"
)
HASH_BYTES = 64  # of a column of fixed size: no image is as small
MOST_ID = 10_000  # letters of an id
MOST_ROWS = 1_000_000  # that a file may claim however small it is
BATCH_BYTES, BATCH_ROWS = 64 << 20, 10_000  # unpacked at once
GROUP_BYTES = 512 << 20  # of rows that are kept at hand
MOST_GROUP_BYTES, MOST_RATIO = 16 << 30, 200  # of a row group, unpacked, and to its bytes in the file where it is large


class NoImages(SourceError):
    """A sound file that has no images: metadata beside those that have."""


def list_parquet(file: File, selection: Selection) -> Members:
    """List the rows of a parquet file; ids are its column of ids, or where there is none `name#row`."""
    parquet = open_parquet(file.place)
    schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
    column = image_column(schema, file.place, selection.column)
    end = read_footer(file.place)
    claimed, most = sum(group.rows for group in end.groups), max(MOST_ROWS, end.size)
    if rows != claimed or not 0 <= rows <= most:
        raise ValueError(
            f"its footer claims {rows:,} rows and {claimed:,} in its row groups; {most:,} at most can be in it"
        )
    if not rows:
        raise NoImages(f"{file.place!r} has no rows")
    own = id_column(schema, file.place, selection.id_column)
    ids = _own_ids(parquet, end, own, file) if own else (f"{file.name}#{row}" for row in range(rows))
    kind = "parquet" if column == _first_column(schema) else f"parquet:{column}"
    return zip(ids, itertools.repeat(kind), range(rows), itertools.repeat(end.mark))


def id_column(schema: pa.Schema, uri: str, asked: str | None) -> str | None:
    """Find the column of ids: the one that is asked for, or `id` if its cells can be text; "none" is none."""
    if asked == "none":
        return None
    name = asked or "id"
    at = schema.get_all_field_indices(name)
    if len(at) == 1 and not pa.types.is_nested(schema.field(at[0]).type):
        return name
    if asked:
        raise SourceError(
            f"{uri!r} has no column of ids {asked!r}: it has {_some(schema.names)}; 'none' names images by their rows"
        )
    return None


def _own_ids(parquet: pq.ParquetFile, end: Footer, column: str, file: File) -> Iterator[str]:
    """Read a column of ids; `name#row` stands where a cell is empty, or far too long."""
    first = 0
    for cells in _batches(parquet, file.place, dict(enumerate(end.groups)), column):
        for row, text in enumerate(_texts(cells), first):
            yield text if text and len(text) <= MOST_ID else f"{file.name}#{row}"
        first += len(cells)


def read_column(uri: str, column: str) -> Iterator[pa.Array]:
    """Read a column, in arrays that take little memory one by one."""
    return _batches(open_parquet(uri), uri, dict(enumerate(read_footer(uri).groups)), column)


def _texts(cells: pa.Array) -> list[str | None]:
    cells = cells.dictionary_decode() if pa.types.is_dictionary(cells.type) else cells
    if pa.types.is_timestamp(cells.type) and cells.type.tz:
        with contextlib.suppress(pa.ArrowInvalid):  # the zone is unknown
            return list(cells.cast(pa.string()).to_pylist())
        cells = cells.cast(pa.timestamp(cells.type.unit))
    try:
        return list(cells.cast(pa.string()).to_pylist())
    except (UnicodeDecodeError, pa.ArrowInvalid):  # bytes that are not UTF-8
        raw = cells.cast(pa.binary()).to_pylist()
        return [None if one is None else one.decode("utf-8", "backslashreplace") for one in raw]


def read_cell(files: OpenFiles, entry: Entry) -> bytes:
    """Read a cell of a parquet file: its bytes, or where it has none the file beside the parquet that it names."""
    key = f"{entry.uri}\0{entry.kind.partition(':')[2]}"
    return files.opened(key, _Cells).read(entry.offset, files.most)


class _Cells:
    """The images of an open parquet file by row; the row group, or slice of a large one, that was read last is kept."""

    def __init__(self, key: str) -> None:
        """Open a file; the key is its place, a NUL, and the column or nothing."""
        uri, _, column = key.partition("\0")
        self.uri, self.file = uri, open_parquet(uri)
        self.column = column or _first_column(self.file.schema_arrow)
        if self.column not in self.file.schema_arrow.names:
            raise Refused(
                "unreadable", f"{uri} has no column of images {self.column or ''!r}, which it had when it was listed"
            )
        self.groups = read_footer(uri).groups
        self.starts = [0, *itertools.accumulate(group.rows for group in self.groups)]
        self.group, self.first = -1, 0  # of the cells at hand: their row group, their first row in it
        self.cells: list[tuple[pa.Array, pa.Array | None]] = []  # their bytes, and their paths if there are any
        self.ends: list[int] = []  # of each array of cells, counted from the first
        self.rest: Iterator[pa.Array] = iter(())  # of the row group, behind the cells

    def read(self, row: int, most: int) -> bytes:
        """Return the bytes of a cell, `most` at most."""
        if row >= self.starts[-1]:
            raise Refused("unreadable", f"row {row} is past the end of {self.uri} ({self.starts[-1]} rows)")
        group = bisect_right(self.starts, row) - 1
        inside = row - self.starts[group]
        try:
            if group != self.group or inside < self.first:
                self.load(group)
            while inside >= self.first + self.ends[-1]:
                self.advance()
        except (pa.ArrowException, OSError) as error:
            self.group = -1
            if (
                isinstance(error, pa.ArrowMemoryError | MemoryError)
                or remote.is_remote(self.uri)
                or error_number(error)
            ):
                raise
            raise Refused("damaged", f"row group {group} of {self.uri} does not unpack: {error}") from None
        at = bisect_right(self.ends, inside - self.first)
        cells, paths = self.cells[at]
        return self.bytes_of(cells, paths, inside - self.first - (self.ends[at] - len(cells)), most)

    def load(self, group: int) -> None:
        """Read a row group, as far as it is kept at hand."""
        chunks = self.groups[group].of(self.column)
        unpacked, packed = sum(one.unpacked for one in chunks), sum(one.packed for one in chunks)
        if unpacked > MOST_GROUP_BYTES or (unpacked > GROUP_BYTES and unpacked > MOST_RATIO * packed):
            raise Refused("too_large", f"row group {group} of {self.uri} unpacks to {unpacked:,} bytes from {packed:,}")
        self.rest, self.first = _batches(self.file, self.uri, {group: self.groups[group]}, self.column), 0
        self.cells, self.ends = [], []
        self.group = group
        self.take()

    def advance(self) -> None:
        """Go on to the next slice of a large row group."""
        self.first += self.ends[-1]
        self.cells, self.ends = [], []
        self.take()

    def take(self) -> None:
        size = 0
        for found in self.rest:
            cells, paths, size = getattr(found, "storage", found), None, size + found.nbytes  # of an extension type
            if pa.types.is_struct(cells.type):
                paths = cells.field("path") if cells.type.get_field_index("path") >= 0 else None
                cells = cells.field("bytes")
            self.cells.append((cells, paths))
            self.ends.append(len(cells) + (self.ends[-1] if self.ends else 0))
            if size > GROUP_BYTES:
                return
        if not self.ends:
            raise pa.ArrowInvalid("it ends before its last row")

    def bytes_of(self, cells: pa.Array, paths: pa.Array | None, at: int, most: int) -> bytes:
        """Turn a cell into bytes, whatever way they are kept."""
        value = cells[at]
        if value.is_valid and _is_numbers(cells.type):
            check_bytes(len(value), most)
            if value.values.null_count:
                raise Refused("damaged", "the parquet cell has numbers that are null in its list of bytes")
            return bytes(value.values.to_numpy(zero_copy_only=False).tobytes())
        found = value.as_py()
        if isinstance(found, bytes):
            check_bytes(len(found), most)
            return found
        if found is not None:
            raise Refused("not_an_image", f"the parquet cell has {cells.type} where the bytes of an image should be")
        path = None if paths is None or not _is_text(paths.type) else _texts(paths.slice(at, 1))[0]
        if not path:
            raise Refused("empty", "the parquet cell is null")
        return self.beside(path, most)

    def beside(self, path: str, most: int) -> bytes:
        """Read the file that a cell without bytes names."""
        if remote.SCHEME.match(path):  # nobody asked for what is at an address in a table
            raise Refused(
                "unreadable", f"the parquet cell has no bytes, and names {path!r}: give such addresses as a list"
            )
        try:
            return read_whole(join(split(self.uri)[0], path), 0, most)
        except ValueError as error:
            raise Refused("unreadable", f"the parquet cell has no bytes, and names {path!r}: {error}") from None


def error_number(error: Exception) -> int | None:
    """Return the system's number of an error, None where it is one of the content."""
    return getattr(error, "errno", None)


def open_parquet(uri: str) -> pq.ParquetFile:
    """Open a parquet file of an index; checksums of its pages, where it has them, are verified."""
    source = pa.PythonFile(open_binary(uri), mode="r") if remote.is_remote(uri) else open_arrow(uri)
    return pq.ParquetFile(source, page_checksum_verification=True)


def _batches(file: pq.ParquetFile, uri: str, groups: dict[int, Group], column: str) -> Iterator[pa.Array]:
    """Read a column in slices of so few rows that none takes much memory, whatever is in them."""
    for number, group in groups.items():
        chunks, rows = group.of(column), max(1, group.rows)
        unpacked = sum(one.unpacked for one in chunks)
        each = max(1, unpacked // rows)
        if rows * unpacked > GROUP_BYTES:  # all rows may be the one value of a page that they are looked up in
            each = max([each, *(unpacked_dictionary(uri, one) for one in chunks)])
        size = max(1, min(BATCH_ROWS, BATCH_BYTES // each))
        for batch in file.iter_batches(size, row_groups=[number], columns=[column], use_threads=False):
            yield batch.column(batch.schema.get_field_index(column))


def _first_column(schema: pa.Schema) -> str:
    """Find the first column of bytes, or struct that has them, as versions did that knew no names; "" for none."""
    for name, kind in zip(schema.names, schema.types, strict=True):
        of_datasets = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if of_datasets or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return str(name)
    return ""


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    view = getattr(pa.types, "is_string_view", lambda _: False)(kind)
    return view or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_numbers(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and (pa.types.is_uint8(kind.value_type) or pa.types.is_int8(kind.value_type))


def _has_bytes(kind: pa.DataType) -> bool:
    """Tell whether cells of a type can be encoded images."""
    if isinstance(kind, pa.BaseExtensionType):
        return _has_bytes(kind.storage_type)
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and (_has_bytes(kind.field(at).type) or pa.types.is_null(kind.field(at).type))
    if pa.types.is_dictionary(kind):
        return _has_bytes(kind.value_type)
    if pa.types.is_fixed_size_binary(kind):
        return kind.byte_width > HASH_BYTES
    view = getattr(pa.types, "is_binary_view", lambda _: False)(kind)
    return view or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or _is_numbers(kind)


def image_column(schema: pa.Schema, uri: str, asked: str | None = None) -> str:
    """Find the column of encoded images: as asked, by what `datasets` wrote of it, by its name, or the only one.

    Raises SourceError with the columns that could be meant where none is, or several are, and NoImages where none can.
    """
    names = [str(name) for name in schema.names]
    can = [name for name, kind in zip(names, schema.types, strict=True) if _has_bytes(kind) and names.count(name) == 1]
    if asked is not None:
        if asked in can:
            return asked
        raise SourceError(f"{uri!r} has no column of encoded images {asked!r}: those that can be are {_some(can)}")
    features = _features(schema)
    told = [name for name in can if features.get(name) == "Image"]
    left = told or [name for name in can if features.get(name) in (None, "Value") and not NOT_IMAGES.search(name)]
    for wanted in IMAGE_NAMES:
        if named := [name for name in left if name.lower() == wanted]:
            return named[0]
    if len(left) == 1:
        return left[0]
    if can:
        raise SourceError(
            f"{uri!r} has no column that is the images for sure: {_some(can)} can be; say which by --column (column=)"
        )
    text = [
        n
        for n, kind in zip(names, schema.types, strict=True)
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    ]
    twice = [name for name in IMAGE_NAMES if names.count(name) > 1]
    odd = f"; {twice[0]!r} is there {names.count(twice[0])} times" if twice else ""
    odd += f"; the bytes of {text[0]!r} are {schema.field(text[0]).type.field('bytes').type}" if text else ""
    raise NoImages(
        f"{uri!r} has no column of encoded images (binary or struct with `bytes`): it has {_some(names)}{odd}"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
    return f"{list(names[:20])}{more}"


def _features(schema: pa.Schema) -> dict[str, str]:
    """Read the types of columns that `datasets` wrote beside them: Image, Audio, Value …"""
    try:
        told: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {
            name: str(feature["_type"])
            for name, feature in told.items()
            if isinstance(feature, dict) and "_type" in feature
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # none, or no such; the columns speak for themselves
