"""Parts: the parquet files of a store, for rows and for the index. They hold their own checksum, and nothing unchecked.

A part is one finished shard: its rows as columns, and in the metadata of the file its ledger and by what it was made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import StoreError
from ..schema import Between, parse_json, read
from ..sources.index import INDEX_SCHEMA, ImageIndex
from .manifest import Manifest, Runtime

ID, EMBEDDING = "id", "embedding"  # columns of a part, see `part_schema`; those of the ledger are RefusedRow's
LEDGER_KEY = b"micl_zoo.refused"  # in a part's metadata: its ledger lines, so that both exist or neither does
MADE_KEY = b"micl_zoo.made"  # in a part's metadata: `Made`
STORE_KEY = b"micl_zoo.store"  # in a part's metadata: `Manifest.digest`, its number; earlier versions wrote none
SHA256_KEY = b"micl_zoo.sha256"  # in a part's metadata: `Rows.sha256`
FILE_KEY = b"micl_zoo.file_sha256"  # in the metadata of every file: see `is_whole`
UNSEALED = b"0" * 64
INDEX_SCHEMAS = (INDEX_SCHEMA, INDEX_SCHEMA.remove(INDEX_SCHEMA.get_field_index("kind")))  # earlier ones had no kinds
CURE = "delete it and run the same extract command again"


@dataclass(frozen=True)
class RefusedRow:
    """One line of the ledger: an image that could not be embedded."""

    id: str  # this and the next as in its Entry
    uri: str
    reason: Annotated[str, Between(1, 100)]  # one word, see `micl_zoo.errors.Reason`
    detail: str  # one sentence


@dataclass(frozen=True)
class _Ledger:
    refused: list[RefusedRow]


@dataclass(frozen=True)
class Made:
    """By what a part was made; of several runs, what all its refusals have been tried with."""

    runtimes: tuple[Runtime, ...]  # that ran the model
    max_pixels: Annotated[int, Between(1)]  # above which images were refused
    formats: tuple[str, ...]  # that could be read, by Pillow's names; () where an earlier version made it

    def then(self, later: Made, kept: Collection[str]) -> Made:
        """Join with a later run, which has not tried again what was refused for the reasons in `kept`."""
        runtimes = tuple(dict.fromkeys((*self.runtimes, *later.runtimes)))
        limit = min(self.max_pixels, later.max_pixels) if "too_large" in kept else later.max_pixels
        both = tuple(name for name in later.formats if name in self.formats)
        return Made(runtimes, limit, both if "unsupported" in kept else later.formats)


class Rows(NamedTuple):
    """What became of the images of one shard, or of its first ones, in index order."""

    ids: list[str]  # (n,) ids of the embedded images
    embeddings: np.ndarray  # (n, dim) their rows
    refused: list[RefusedRow]  # the images that could not be embedded
    made: Made | None = None  # None where an earlier version made it, or nobody has said

    @property
    def images(self) -> int:
        """Number of images accounted for."""
        return len(self.ids) + len(self.refused)

    def sha256(self) -> str:
        """Hash ids, ledger lines, embeddings, and by what they were made."""
        words: list[Any] = [self.ids, [dataclasses.astuple(row) for row in self.refused]]
        if self.made is not None:
            words.append(dataclasses.astuple(self.made))
        digest = hashlib.sha256(json.dumps(words, ensure_ascii=True).encode())
        digest.update(np.ascontiguousarray(self.embeddings).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


def part_schema(manifest: Manifest, number: int, metadata: dict[bytes, bytes] | None = None) -> pa.Schema:
    """Columns of a part: id, and embedding, a list of `dim` numbers; the metadata say of which store and which part."""
    kind = pa.list_(pa.from_numpy_dtype(np.dtype(manifest.dtype)), manifest.dim)
    of = {STORE_KEY: f"{manifest.digest} {number}".encode()}
    return pa.schema([(ID, pa.string()), (EMBEDDING, kind)], of | (metadata or {}))


def encode_part(rows: Rows, manifest: Manifest, number: int) -> bytes:
    """Make the file of a part."""
    embeddings = np.ascontiguousarray(rows.embeddings, manifest.dtype)
    assert embeddings.shape == (len(rows.ids), manifest.dim), (embeddings.shape, len(rows.ids))
    rows = rows._replace(embeddings=embeddings)
    metadata = {LEDGER_KEY: json.dumps([dataclasses.asdict(row) for row in rows.refused]).encode()}
    if rows.made is not None:
        metadata[MADE_KEY] = json.dumps(dataclasses.asdict(rows.made)).encode()
    schema = part_schema(manifest, number, {**metadata, SHA256_KEY: rows.sha256().encode()})
    flat = pa.array(embeddings.reshape(-1), schema.field(EMBEDDING).type.value_type)
    columns = [pa.array(rows.ids, pa.string()), pa.FixedSizeListArray.from_arrays(flat, manifest.dim)]
    return _parquet(pa.table(columns, schema=schema))


def decode_part(table: pa.Table, what: str) -> Rows:
    """Take a part's table apart; `what` names its file in errors."""
    metadata, embeddings = table.schema.metadata or {}, table[EMBEDDING].combine_chunks()
    flat = embeddings.flatten()
    if flat.null_count:
        raise ValueError(f"column {EMBEDDING} has nulls")
    rows = flat.to_numpy(zero_copy_only=False).reshape(-1, embeddings.type.list_size)
    return Rows(table[ID].to_pylist(), rows, decode_ledger(metadata, what), decode_made(metadata, what))


def decode_ledger(metadata: dict[bytes, bytes] | None, what: str) -> list[RefusedRow]:
    """Read the ledger in the metadata of a part."""
    lines = parse_json((metadata or {}).get(LEDGER_KEY, b"[]"), what, StoreError, CURE)
    return read(_Ledger, {"refused": lines}, what, StoreError, CURE).refused


def decode_made(metadata: dict[bytes, bytes] | None, what: str) -> Made | None:
    """Read by what a part was made; None where an earlier version made it."""
    found = (metadata or {}).get(MADE_KEY)
    return None if found is None else read(Made, parse_json(found, what, StoreError, CURE), what, StoreError, CURE)


def encode_index(index: ImageIndex) -> bytes:
    """Make the file of one shard of the index."""
    return _parquet(index.table.replace_schema_metadata(None))


def is_whole(data: bytes) -> bool | None:
    """Hash a file of a store, its own checksum taken for zeros; None where it has none: an earlier version wrote it."""
    metadata = pq.read_metadata(pa.BufferReader(data)).metadata or {}
    if (sha256 := metadata.get(FILE_KEY)) is None:
        return False if MADE_KEY in metadata else None
    at = data.rfind(sha256, data.rfind(FILE_KEY))
    return at >= 0 and _sha256_without(data, at) == sha256


def _sha256_without(data: bytes, at: int) -> bytes:
    digest, view = hashlib.sha256(), memoryview(data)
    for piece in (view[:at], UNSEALED, view[at + len(UNSEALED) :]):
        digest.update(piece)
    return digest.hexdigest().encode()


def read_table(file: Any, schemas: Sequence[pa.Schema], most: int, columns: list[str] | None = None) -> pa.Table:
    """Read a parquet file with the columns of one of these schemas, no nulls, `most` rows at most; else ValueError."""
    opened = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=True)
    check_metadata(opened.metadata, schemas, most)
    table = opened.read(columns, use_threads=False)
    for name in table.column_names:
        if table[name].null_count:
            raise ValueError(f"column {name} has nulls")
    return table


def check_metadata(found: pq.FileMetaData, schemas: Sequence[pa.Schema], most: int) -> None:
    """Raise ValueError unless a parquet file says that it has what `read_table` needs."""
    have, *valid = ([(field.name, field.type) for field in one] for one in (found.schema.to_arrow_schema(), *schemas))
    if have not in valid:
        shown = [", ".join(f"{name}: {kind}" for name, kind in one)[:300] for one in (have, valid[0])]
        raise ValueError(f"its columns are {shown[0]}, expected are {shown[1]}")
    expected = (schemas[0].metadata or {}).get(STORE_KEY, b"")
    of = (found.metadata or {}).get(STORE_KEY, expected)
    if expected and of != expected:
        store, _, number = of.partition(b" ")
        if store == expected.partition(b" ")[0]:
            what = number[:20].decode("ascii", "replace")
            raise ValueError(f"it is part {what} of this store, under the name of another")
        raise ValueError("its rows were made by another encoder or with other settings than the manifest says")
    groups = sum(found.row_group(group).num_rows for group in range(found.num_row_groups))
    if not 0 <= found.num_rows <= most or groups != found.num_rows:
        raise ValueError(f"it has {found.num_rows:,} rows, {groups:,} in its groups, at most {most:,} are read")


def _parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    shared = [name for name in ("uri", "kind") if name in table.schema.names]  # ids and numbers gain nothing by it
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), FILE_KEY: UNSEALED})
    pq.write_table(table, out, compression="zstd", use_dictionary=shared, write_page_checksum=True)
    data = bytearray(out.getbuffer())
    at = data.rfind(UNSEALED, data.rfind(FILE_KEY))  # the last are the footer's; Arrow's own are in base64
    data[at : at + len(UNSEALED)] = _sha256_without(bytes(data), at)
    return bytes(data)
