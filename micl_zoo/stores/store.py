"""What extract leaves behind: manifest, index, parts, ledger; and how it is opened, checked and read."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import StoreError
from ..files import LOCK_FILE, Folder
from ..sources.listing import ImageIndex

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 2
LEDGER_KEY = b"micl_zoo.refused"  # a part carries its own ledger lines, so both exist or neither does
SHA256_KEY = b"micl_zoo.sha256"  # and the hash of all that it says


@dataclass(frozen=True)
class Manifest:
    """What every row of a store has in common; to go on with a store, the first eleven must agree.

    Attributes:
        model: `arch.tag`.
        weights_sha256: of the safetensors file; for random weights, of the tensors.
        transform: the transform's id.
        decoding: how bytes became pixels: exact or fast, EXIF, pixel limit.
        runtime: what ran the model: "torch", "torch compiled" or "openvino".
        precision: "fp32", "bf16" or "fp16", in which the model ran.
        pool: "cls", "mean", "cls+mean" or "patches".
        normalized: embeddings have unit length.
        dtype: of the rows on disk.
        shape: of a row: [D], or [h, w, D] for patches; rows are stored flat.
        shard_rows: images a shard, at most.
        command: what made it.
        versions: of the packages that made it.
        rows: images in the index, None until all are listed. Parts hold these less the refused ones.
        shards: in which they are cut, None until all are listed.
        index_sha256: the index's fingerprint, None until all are listed.
        format_version: of this layout.
    """

    model: str
    weights_sha256: str
    transform: str
    decoding: str
    runtime: str
    precision: str
    pool: str
    normalized: bool
    dtype: str
    shape: list[int]
    shard_rows: int
    command: str
    versions: dict[str, str]
    rows: int | None = None
    shards: int | None = None
    index_sha256: str | None = None
    format_version: int = FORMAT_VERSION

    @property
    def dim(self) -> int:
        """Numbers a row."""
        return prod(self.shape)

    def differences(self, other: Manifest) -> list[str]:
        """The fields that keep the two from being one store, as 'field: this in the store, that asked for'."""
        free = {"command", "versions", "rows", "shards", "index_sha256"}
        names = [field.name for field in dataclasses.fields(self) if field.name not in free]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [
            f"{name}: {mine!r} in the store, {theirs!r} asked for" for name, mine, theirs in pairs if mine != theirs
        ]


@dataclass(frozen=True)
class RefusedRow:
    """One line of the ledger: an image that could not be embedded.

    Attributes:
        id, uri: the image.
        reason: one word, see `micl_zoo.decode.Reason`.
        detail: one sentence.
    """

    id: str
    uri: str
    reason: str
    detail: str


class Rows(NamedTuple):
    """Images of a shard after the model, in index order: all of them, or the first ones.

    Attributes:
        ids: (n,), of the images that have a row.
        embeddings: (n, dim).
        refused: the others.
    """

    ids: list[str]
    embeddings: np.ndarray
    refused: list[RefusedRow]

    @property
    def images(self) -> int:
        """That these rows account for."""
        return len(self.ids) + len(self.refused)

    def sha256(self) -> str:
        """Of all that it says."""
        words = json.dumps([self.ids, [dataclasses.astuple(row) for row in self.refused]], ensure_ascii=True)
        digest = hashlib.sha256(words.encode())
        digest.update(np.ascontiguousarray(self.embeddings).tobytes())
        return digest.hexdigest()


class Store:
    """A folder of embeddings, local or on an object store. Make one with `create`, open one with `open_store`.

    Attributes:
        folder: where it lies.
        manifest: what all rows have in common.
    """

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @property
    def path(self) -> Path:
        """The local folder.

        Raises:
            StoreError: it lies elsewhere.
        """
        if self.folder.local is None:
            raise StoreError(f"{str(self.folder)!r} is no local folder: copy it to one first")
        return self.folder.local

    @classmethod
    def create(cls, folder: Folder, manifest: Manifest, *, overwrite: bool = False) -> Store:
        """Start a store, or go on with the one that is there.

        Raises:
            StoreError: the folder holds a store of something else (the fields that differ are named), or other files.
        """
        names = folder.names()
        if "manifest.json" in names and overwrite:
            _clear(folder, names)
            names = []
        if "manifest.json" in names:
            store = open_store(folder)
            if differences := store.manifest.differences(manifest):
                raise StoreError(
                    f"{str(folder)!r} holds other embeddings; " + "; ".join(differences) + ". Give another output "
                    "folder, or --overwrite to lose these."
                )
        elif any(not _leftover(name) for name in names):
            raise StoreError(f"{str(folder)!r} exists and is no store of embeddings: give a new or empty folder")
        else:
            store = cls(folder, manifest)
            store.write_manifest()
        store.remove_leftovers()
        return store

    def remove_leftovers(self) -> None:
        """Delete what processes that were killed have left half written."""
        for below in ("", "index"):
            for name in self.folder.names(below):
                if name.endswith(".tmp") and name != LOCK_FILE:
                    self.folder.remove(f"{below}/{name}" if below else name)

    def write_manifest(self) -> None:
        """Write manifest.json."""
        text = json.dumps(dataclasses.asdict(self.manifest), indent=2) + "\n"
        self.folder.write("manifest.json", text.encode())

    def indexed(self) -> list[int]:
        """Numbers of the shards whose images are known, by one listing."""
        return _numbers(self.folder.names("index"), "part-")

    def write_index(self, number: int, index: ImageIndex) -> None:
        """Write the images of one shard."""
        self.folder.write(f"index/{_part(number)}", _parquet(index.table))

    def shard(self, number: int) -> ImageIndex:
        """The images of one shard, from its number alone."""
        with self._damage(f"index/{_part(number)}"):
            return ImageIndex.from_table(pq.read_table(self.folder.open(f"index/{_part(number)}"), use_threads=False))

    def part_path(self, number: int) -> Path:
        """Where shard `number` is, or will be, in a local store."""
        return self.path / _part(number)

    def done(self) -> list[int]:
        """Numbers of the shards that exist, in order, by one listing."""
        return _numbers(self.folder.names(), "part-")

    def write_part(self, number: int, rows: Rows) -> None:
        """Write one finished shard, rows and ledger lines in one file, and drop what was kept of its beginning."""
        self.folder.write(_part(number), self._encoded(rows))
        self.folder.remove(_beginning(number))

    def write_beginning(self, number: int, rows: Rows) -> None:
        """Keep the first rows of a shard that is not finished."""
        self.folder.write(_beginning(number), self._encoded(rows))

    def beginning(self, number: int) -> Rows | None:
        """What is kept of a shard that is not finished; None where there is nothing or it is damaged."""
        if not self.folder.exists(_beginning(number)):
            return None
        with contextlib.suppress(StoreError):
            rows, sha256 = self._decoded(_beginning(number))
            return rows if rows.sha256() == sha256 else None
        return None

    def rows(self, number: int) -> Rows:
        """One finished shard.

        Raises:
            StoreError: its part is damaged or not there.
        """
        return self._decoded(_part(number))[0]

    def check_part(self, number: int) -> None:
        """Hash one finished shard again.

        Raises:
            StoreError: its part is not what was written.
        """
        rows, sha256 = self._decoded(_part(number))
        if rows.sha256() != sha256:
            raise self._damaged(_part(number), f"its sha256 is {rows.sha256()}, not {sha256}")

    def refused(self) -> Iterator[RefusedRow]:
        """The ledger, in index order, as the parts hold it."""
        for number in self.done():
            yield from _ledger(self._metadata(number).metadata)

    def write_ledger(self) -> int:
        """Write errors.jsonl from the parts; returns its number of lines."""
        lines = [json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in self.refused()]
        self.folder.write("errors.jsonl", "".join(lines).encode())
        return len(lines)

    @property
    def complete(self) -> bool:
        """All images are listed, and every shard is there."""
        return self.manifest.shards is not None and len(self.done()) == self.manifest.shards

    def __len__(self) -> int:
        return sum(self._metadata(number).num_rows for number in self.done())

    @property
    def ids(self) -> list[str]:
        """The id of every row, in index order."""
        return [name for number in self.done() for name in self._table(number, ["id"])["id"].to_pylist()]

    @property
    def embeddings(self) -> np.ndarray:
        """All rows in one array, (N, D) or (N, h, w, D) in the store's dtype. For more than fits, see `batches`."""
        out = np.empty((len(self), self.manifest.dim), self.manifest.dtype)
        at = 0
        for _, rows in self.batches():
            out[at : at + len(rows)] = rows
            at += len(rows)
        return out.reshape(-1, *self.manifest.shape)

    def batches(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """(ids, (n, dim) rows) part by part in index order; one part in memory at a time."""
        for number in self.done():
            yield self._columns(self._table(number, ["id", "embedding"]))

    def to_arrow(self) -> pa.Table:
        """Columns id and embedding, all rows."""
        tables = [self._table(number, ["id", "embedding"]).replace_schema_metadata(None) for number in self.done()]
        return pa.concat_tables(tables) if tables else self._schema().empty_table()

    def to_pandas(self) -> pd.DataFrame:
        """A frame indexed by id, a column a dimension.

        Raises:
            StoreError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise StoreError("to_pandas needs pandas: pip install 'micl-zoo[explore]'") from None
        rows = self.embeddings.reshape(-1, self.manifest.dim)
        return pd.DataFrame(rows, index=pd.Index(self.ids, name="id"))

    def _schema(self, metadata: dict[bytes, bytes] | None = None) -> pa.Schema:
        kind = pa.list_(pa.from_numpy_dtype(np.dtype(self.manifest.dtype)), self.manifest.dim)
        return pa.schema([("id", pa.string()), ("embedding", kind)], metadata)

    def _encoded(self, rows: Rows) -> bytes:
        embeddings = np.ascontiguousarray(rows.embeddings, self.manifest.dtype)
        assert embeddings.shape == (len(rows.ids), self.manifest.dim), (embeddings.shape, len(rows.ids))
        rows = rows._replace(embeddings=embeddings)
        ledger = json.dumps([dataclasses.asdict(row) for row in rows.refused])
        schema = self._schema({LEDGER_KEY: ledger.encode(), SHA256_KEY: rows.sha256().encode()})
        flat = pa.array(embeddings.reshape(-1), schema.field("embedding").type.value_type)
        columns = [pa.array(rows.ids, pa.string()), pa.FixedSizeListArray.from_arrays(flat, self.manifest.dim)]
        return _parquet(pa.table(columns, schema=schema))

    def _decoded(self, name: str) -> tuple[Rows, str]:
        with self._damage(name):
            table = pq.read_table(self.folder.open(name), use_threads=False)
            metadata = table.schema.metadata or {}
            return Rows(*self._columns(table), _ledger(metadata)), metadata.get(SHA256_KEY, b"").decode()

    def _columns(self, table: pa.Table) -> tuple[list[str], np.ndarray]:
        flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return table["id"].to_pylist(), flat.reshape(-1, self.manifest.dim)

    def _table(self, number: int, columns: list[str]) -> pa.Table:
        with self._damage(_part(number)):
            return pq.read_table(self.folder.open(_part(number)), columns=columns)

    def _metadata(self, number: int) -> pq.FileMetaData:
        with self._damage(_part(number)):
            return pq.read_metadata(self.folder.open(_part(number)))

    @contextlib.contextmanager
    def _damage(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise self._damaged(name, str(error)) from None

    def _damaged(self, name: str, how: str) -> StoreError:
        where = f"{str(self.folder).rstrip('/')}/{name}"
        return StoreError(f"{where!r} is damaged ({how}): delete it and run the same extract command again")


def open_store(path: str | os.PathLike[str] | Folder) -> Store:
    """Open a folder of embeddings: complete, or still being written, of which the finished parts are seen.

    Args:
        path: a local folder, or a URI such as s3://bucket/embeddings.

    Raises:
        StoreError: no store there, a damaged manifest, or a layout of another version.
    """
    folder = path if isinstance(path, Folder) else Folder(path)
    if not folder.exists("manifest.json"):
        raise StoreError(f"{str(folder)!r} is no store of embeddings: it has no manifest.json")
    try:
        fields: dict[str, Any] = json.loads(folder.read("manifest.json"))
        found = fields.get("format_version")
        if found != FORMAT_VERSION:
            newer = isinstance(found, int) and found > FORMAT_VERSION
            raise StoreError(
                f"{str(folder)!r} has layout version {found}, this micl-zoo reads {FORMAT_VERSION}: "
                + ("upgrade micl-zoo" if newer else "extract it again")
            )
        return Store(folder, Manifest(**fields))
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"the manifest of {str(folder)!r} is damaged: {error}") from None


def _part(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _beginning(number: int) -> str:
    return f".beginning-{number:05d}.parquet"


def _numbers(names: Sequence[str], start: str) -> list[int]:
    """Of the files named start + number + .parquet, sorted."""
    stems = (name.removeprefix(start).removesuffix(".parquet") for name in names if name.startswith(start))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def _ledger(metadata: dict[bytes, bytes] | None) -> list[RefusedRow]:
    return [RefusedRow(**row) for row in json.loads((metadata or {}).get(LEDGER_KEY, b"[]"))]


def _parquet(table: pa.Table) -> bytes:
    """With a dictionary for what many rows share; ids and numbers gain nothing by one. The pages carry checksums."""
    out = io.BytesIO()
    shared = [name for name in ("uri", "kind") if name in table.schema.names]
    pq.write_table(table, out, compression="zstd", use_dictionary=shared, write_page_checksum=True)
    return out.getvalue()


def _leftover(name: str) -> bool:
    """What a run killed before its manifest was written leaves behind."""
    return name.endswith(".tmp")


def _clear(folder: Folder, names: list[str]) -> None:
    """Delete a store, the manifest last: killed in between, a store of fewer parts is left."""
    starts = ("part-", ".part-", ".beginning-", "errors.jsonl")
    mine = [name for name in names if name.startswith(starts)]
    for name in [*mine, *(f"index/{name}" for name in folder.names("index")), "manifest.json"]:
        folder.remove(name)
