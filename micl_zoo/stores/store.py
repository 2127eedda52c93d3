"""Store: the folder that extract writes, with manifest, index, parts and ledger; opened, checked and read here."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import StoreError
from ..files import LOCK_FILE, OWNER_FILE, Folder
from ..printing import json_line
from ..sources.index import ImageIndex

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 2
PART, BEGINNING = "part-", ".beginning-"  # files of finished and of unfinished shards, before their number
ID, EMBEDDING = "id", "embedding"  # columns of a part, see `Store.schema`; those of the ledger are RefusedRow's
LEDGER_KEY = b"micl_zoo.refused"  # in a part's metadata: its ledger lines, so that both exist or neither does
SHA256_KEY = b"micl_zoo.sha256"  # in a part's metadata: `Rows.sha256`


@dataclass(frozen=True)
class Manifest:
    """What all rows of a store have in common; resuming needs the first eleven fields to agree."""

    model: str  # name of the encoder, `arch.tag`
    weights_sha256: str  # checksum of the weights file; for random weights, of the tensors
    transform: str  # id of the transform
    decoding: str  # id of the decoding, from bytes to pixels: exact or fast, EXIF, pixel limit
    runtime: str  # what ran the model: "torch", "torch compiled", "openvino" or "onnx"
    precision: str  # in which the model ran: "fp32", "bf16", "fp16", or "int8" for an ONNX file
    pool: str  # "cls", "mean", "cls+mean" or "patches"
    normalized: bool  # whether embeddings have unit length
    dtype: str  # data type of the stored embeddings
    shape: list[int]  # of one row: [D], or [h, w, D] for patches; rows are stored flat
    shard_rows: int  # most images per shard
    command: str  # that made the store
    versions: dict[str, str]  # of the packages that made it
    rows: int | None = None  # images in the index, refused ones included; these three are None until all are listed
    shards: int | None = None
    index_sha256: str | None = None  # fingerprint of the index
    format_version: int = FORMAT_VERSION  # of this layout

    @property
    def dim(self) -> int:
        """Numbers per row."""
        return prod(self.shape)

    def differences(self, other: Manifest) -> list[str]:
        """List the fields that keep two manifests from being of one store, as 'field: … in the store, … asked for'."""
        free = {"command", "versions", "rows", "shards", "index_sha256"}
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        unlike = [name for name in mine if name not in free and mine[name] != theirs[name]]
        return [f"{name}: {mine[name]!r} in the store, {theirs[name]!r} asked for" for name in unlike]


@dataclass(frozen=True)
class RefusedRow:
    """One line of the ledger: an image that could not be embedded."""

    id: str  # this and the next as in its Entry
    uri: str
    reason: str  # one word, see `micl_zoo.errors.Reason`
    detail: str  # one sentence


class Rows(NamedTuple):
    """What became of the images of one shard, or of its first ones, in index order."""

    ids: list[str]  # (n,) ids of the embedded images
    embeddings: np.ndarray  # (n, dim) their rows
    refused: list[RefusedRow]  # the images that could not be embedded

    @property
    def images(self) -> int:
        """Number of images accounted for."""
        return len(self.ids) + len(self.refused)

    def sha256(self) -> str:
        """Hash ids, ledger lines and embeddings."""
        words = json.dumps([self.ids, [dataclasses.astuple(row) for row in self.refused]], ensure_ascii=True)
        digest = hashlib.sha256(words.encode())
        digest.update(np.ascontiguousarray(self.embeddings).tobytes())
        return digest.hexdigest()


class Store:
    """A folder of embeddings, local or on an object store. Make one with `create`, open one with `open_store`.

    Its `manifest` says what all rows have in common, its `folder` where they are.
    """

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._snapshot: list[int] | None = None

    def snapshot(self, shards: Iterable[int] | None = None) -> Store:
        """View the store with these parts only, by default those that exist now, unmoved by what is written later."""
        view = copy.copy(self)
        view._snapshot = self.done() if shards is None else sorted(shards)
        return view

    @property
    def path(self) -> Path:
        """The local folder, where there is one."""
        if self.folder.local is None:
            raise StoreError(f"{str(self.folder)!r} is no local folder: copy it to one first")
        return self.folder.local

    @classmethod
    def create(cls, folder: Folder, manifest: Manifest, *, overwrite: bool = False) -> Store:
        """Start a store, or resume the one in the folder; StoreError where that is another or there are other files."""
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
        elif not all(name.endswith(".tmp") for name in names):  # a run killed before its manifest leaves such files
            raise StoreError(f"{str(folder)!r} exists and is no store of embeddings: give a new or empty folder")
        else:
            store = cls(folder, manifest)
            store.write_manifest()
        store.remove_leftovers()
        return store

    def remove_leftovers(self) -> None:
        """Delete the half-written files of killed processes."""
        for below in ("", "index/"):
            for name in self.folder.names(below):
                if name.endswith(".tmp") and name not in (LOCK_FILE, OWNER_FILE):
                    self.folder.remove(below + name)

    def write_manifest(self) -> None:
        """Write manifest.json."""
        text = json.dumps(dataclasses.asdict(self.manifest), indent=2) + "\n"
        self.folder.write("manifest.json", text.encode())

    def indexed(self) -> list[int]:
        """List the numbers of the shards in the index."""
        return _numbers(self.folder.names("index"))

    def write_index(self, number: int, index: ImageIndex) -> None:
        """Write one shard of the index."""
        self.folder.write(f"index/{_part(number)}", _parquet(index.table))

    def shard(self, number: int) -> ImageIndex:
        """Read one shard of the index; StoreError where its file is damaged or missing."""
        table = self._read(f"index/{_part(number)}")
        with self._damage(f"index/{_part(number)}"):
            return ImageIndex.from_table(table)

    def part_path(self, number: int) -> Path:
        """Path of one part in a local store, written or not."""
        return self.path / _part(number)

    def done(self) -> list[int]:
        """List the numbers of the parts that exist, or that the snapshot has, in order."""
        return _numbers(self.folder.names()) if self._snapshot is None else [*self._snapshot]

    def write_part(self, number: int, rows: Rows) -> None:
        """Write one finished shard, rows and ledger lines in one file, and remove the file of its beginning."""
        self.folder.write(_part(number), self._encoded(rows))
        self.folder.remove(_part(number, BEGINNING))

    def write_beginning(self, number: int, rows: Rows) -> None:
        """Keep the first rows of an unfinished shard."""
        self.folder.write(_part(number, BEGINNING), self._encoded(rows))

    def beginning(self, number: int) -> Rows | None:
        """Read what is kept of an unfinished shard; None where nothing is kept or it is damaged."""
        if self.folder.exists(_part(number, BEGINNING)):
            with contextlib.suppress(StoreError):
                return self._checked(_part(number, BEGINNING))
        return None

    def rows(self, number: int) -> Rows:
        """Read one finished shard; StoreError where its part is damaged or missing."""
        return self._decoded(_part(number))[0]

    def check_part(self, number: int) -> Rows:
        """Read one finished shard and hash it again; StoreError where its part is not what was written."""
        return self._checked(_part(number))

    def refused(self) -> Iterator[RefusedRow]:
        """Iterate over the ledger lines of the parts, in index order."""
        for number in self.done():
            yield from _ledger(self._metadata(number).metadata)

    def write_ledger(self, unlisted: Iterable[RefusedRow] = ()) -> int:
        """Write errors.jsonl from the parts, then what was no image of the index; return how many images are in it."""
        refused = list(self.refused())
        lines = [json_line(dataclasses.asdict(row)) + "\n" for row in itertools.chain(refused, unlisted)]
        self.folder.write("errors.jsonl", "".join(lines).encode())
        return len(refused)

    @property
    def complete(self) -> bool:
        """True if all images are listed and every shard has its part."""
        return self.manifest.shards is not None and len(self.done()) == self.manifest.shards

    def __len__(self) -> int:
        return sum(self._metadata(number).num_rows for number in self.done())

    @property
    def ids(self) -> list[str]:
        """The id of every row, in index order."""
        return [name for number in self.done() for name in self._read(_part(number), [ID])[ID].to_pylist()]

    @property
    def embeddings(self) -> np.ndarray:
        """All rows in one array, (N, D) or (N, h, w, D) in the store's dtype. For more than fits, see `batches`."""
        view = self.snapshot()
        out = np.empty((len(view), self.manifest.dim), self.manifest.dtype)
        at = 0
        for _, rows in view.batches():
            out[at : at + len(rows)] = rows
            at += len(rows)
        return out.reshape(-1, *self.manifest.shape)

    def batches(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """Iterate over (ids, (n, dim) rows) part by part in index order, with one part in memory at a time."""
        for number in self.done():
            yield self._columns(self._read(_part(number), [ID, EMBEDDING]))

    def to_arrow(self) -> pa.Table:
        """Return all rows as a table with the columns id and embedding."""
        tables = [self._read(_part(number)).replace_schema_metadata(None) for number in self.done()]
        return pa.concat_tables(tables) if tables else self.schema().empty_table()

    def to_pandas(self) -> pd.DataFrame:
        """Return all rows as a frame indexed by id, with one column per dimension; needs pandas."""
        try:
            import pandas as pd
        except ImportError:
            raise StoreError("to_pandas needs pandas: pip install 'micl-zoo[explore]'") from None
        view = self.snapshot()
        return pd.DataFrame(view.embeddings.reshape(-1, self.manifest.dim), index=pd.Index(view.ids, name=ID))

    def schema(self, metadata: dict[bytes, bytes] | None = None) -> pa.Schema:
        """Columns of a part: id, and embedding, a list of `dim` numbers."""
        kind = pa.list_(pa.from_numpy_dtype(np.dtype(self.manifest.dtype)), self.manifest.dim)
        return pa.schema([(ID, pa.string()), (EMBEDDING, kind)], metadata)

    def _encoded(self, rows: Rows) -> bytes:
        embeddings = np.ascontiguousarray(rows.embeddings, self.manifest.dtype)
        assert embeddings.shape == (len(rows.ids), self.manifest.dim), (embeddings.shape, len(rows.ids))
        rows = rows._replace(embeddings=embeddings)
        ledger = json.dumps([dataclasses.asdict(row) for row in rows.refused])
        schema = self.schema({LEDGER_KEY: ledger.encode(), SHA256_KEY: rows.sha256().encode()})
        flat = pa.array(embeddings.reshape(-1), schema.field(EMBEDDING).type.value_type)
        columns = [pa.array(rows.ids, pa.string()), pa.FixedSizeListArray.from_arrays(flat, self.manifest.dim)]
        return _parquet(pa.table(columns, schema=schema))

    def _decoded(self, name: str) -> tuple[Rows, str]:
        """(what a part holds, what `Rows.sha256` was when it was written)."""
        table = self._read(name)
        with self._damage(name):
            metadata = table.schema.metadata or {}
            return Rows(*self._columns(table), _ledger(metadata)), metadata.get(SHA256_KEY, b"").decode()

    def _checked(self, name: str) -> Rows:
        rows, sha256 = self._decoded(name)
        with self._damage(name):
            if (found := rows.sha256()) != sha256:
                raise ValueError(f"its sha256 is {found}, not {sha256}")
        return rows

    def _columns(self, table: pa.Table) -> tuple[list[str], np.ndarray]:
        flat = table[EMBEDDING].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return table[ID].to_pylist(), flat.reshape(-1, self.manifest.dim)

    def _read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        with self._damage(name):
            return pq.read_table(self.folder.open(name), columns=columns, use_threads=False)

    def _metadata(self, number: int) -> pq.FileMetaData:
        with self._damage(_part(number)):
            return pq.read_metadata(self.folder.open(_part(number)))

    @contextlib.contextmanager
    def _damage(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            where = f"{str(self.folder).rstrip('/')}/{name}"
            raise StoreError(
                f"{where!r} is damaged ({error}): delete it and run the same extract command again"
            ) from None


def open_store(path: Store | str | os.PathLike[str] | Folder) -> Store:
    """Open a folder of embeddings. Of one that is still being written, the finished parts are seen.

    Args:
        path: a local folder, or a URI such as s3://bucket/embeddings; an open store is returned as it is.

    Raises:
        StoreError: there is no store, its manifest is damaged, or its layout is of another version.
    """
    if isinstance(path, Store):
        return path
    folder = path if isinstance(path, Folder) else Folder(path)
    if not folder.exists("manifest.json"):
        raise StoreError(f"{str(folder)!r} is no store of embeddings: it has no manifest.json")
    try:
        fields: dict[str, Any] = json.loads(folder.read("manifest.json"))
        found = fields.get("format_version")
        if found == FORMAT_VERSION:
            return Store(folder, Manifest(**fields))
    except (ValueError, TypeError, AttributeError) as error:
        raise StoreError(f"the manifest of {str(folder)!r} is damaged: {error}") from None
    cure = "upgrade micl-zoo" if isinstance(found, int) and found > FORMAT_VERSION else "extract it again"
    raise StoreError(f"{str(folder)!r} has layout version {found}, this micl-zoo reads {FORMAT_VERSION}: {cure}")


def _part(number: int, start: str = PART) -> str:
    return f"{start}{number:05d}.parquet"


def _numbers(names: Sequence[str]) -> list[int]:
    """Numbers of the parts among these files, sorted."""
    stems = (name.removeprefix(PART).removesuffix(".parquet") for name in names if name.startswith(PART))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def _ledger(metadata: dict[bytes, bytes] | None) -> list[RefusedRow]:
    return [RefusedRow(**row) for row in json.loads((metadata or {}).get(LEDGER_KEY, b"[]"))]


def _parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    shared = [name for name in ("uri", "kind") if name in table.schema.names]  # ids and numbers gain nothing by it
    pq.write_table(table, out, compression="zstd", use_dictionary=shared, write_page_checksum=True)
    return out.getvalue()


def parts_of(parts: int, shards: int | None) -> str:
    """Say how many parts there are, and of how many: unknown before all images are listed."""
    return f"{parts:,} of {'an unknown number of' if shards is None else f'{shards:,}'} parts"


def _clear(folder: Folder, names: list[str]) -> None:
    """Delete a store, the manifest last: a kill in between leaves a store of fewer parts."""
    mine = [name for name in names if name.startswith((PART, f".{PART}", BEGINNING, "errors.jsonl"))]
    for name in [*mine, *(f"index/{name}" for name in folder.names("index")), "manifest.json"]:
        folder.remove(name)
