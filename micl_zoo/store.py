"""What extract leaves on disk: manifest, index, parts, ledger; and how it is opened, checked and read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import StoreError
from .sources import ImageIndex

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1
SHARDS_PER_INDEX_PART = 100  # a worker finds its rows from the shard's number alone
LEDGER_KEY = b"micl_zoo.refused"  # a part carries its own ledger lines, so both exist or neither does


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; when the block ends well it is synced and renamed, else removed.

    Whoever looks sees the old file or the whole new one, whenever the process is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # the same at every try, so a killed run leaves nothing for good
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def package_versions() -> dict[str, str]:
    """Of what can change a number."""
    found = {"python": platform.python_version()}
    for name in ("micl-zoo", "torch", "timm", "numpy", "pillow", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class Manifest:
    """What every row of a store has in common; to go on with a store, all but rows, command and versions must agree.

    Attributes:
        model: `arch.tag`.
        weights_sha256: of the safetensors file; for random weights, of the tensors.
        transform: the transform's id.
        pool: "cls" or "mean".
        normalized: rows have unit length.
        precision: "fp32", "bf16" or "fp16", in which the model ran.
        dtype: of the rows on disk.
        dim: numbers a row.
        index_sha256: the index's fingerprint.
        shard_rows: images a shard; the last may have fewer.
        rows: images in the index. Parts hold these less the refused ones.
        command: what made it.
        versions: of the packages that made it.
        format_version: of this layout.
    """

    model: str
    weights_sha256: str
    transform: str
    pool: str
    normalized: bool
    precision: str
    dtype: str
    dim: int
    index_sha256: str
    shard_rows: int
    rows: int
    command: str
    versions: dict[str, str]
    format_version: int = FORMAT_VERSION

    @property
    def shards(self) -> int:
        """How many parts a complete store has."""
        return -(-self.rows // self.shard_rows)

    def differences(self, other: Manifest) -> list[str]:
        """The fields that keep the two from being one store, as 'field: this, that'."""
        free = {"rows", "command", "versions"}
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


class Store:
    """A folder of embeddings. Make one with `create`, open one with `open_store`.

    Attributes:
        path: the folder.
        manifest: what all rows have in common.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def create(cls, path: Path, manifest: Manifest, index: ImageIndex) -> Store:
        """Start a store, or go on with the one that is there.

        Raises:
            StoreError: the folder holds a store of something else (the fields that differ are named), or other files.
        """
        if (path / "manifest.json").exists():
            store = open_store(path)
            if differences := store.manifest.differences(manifest):
                raise StoreError(
                    f"{str(path)!r} holds other embeddings; " + "; ".join(differences) + ". Give another output folder."
                )
            if len(index) and store.shard(0)[0].uri != index[0].uri:
                store.write_index(index)  # the pictures were moved since
            return store
        if path.exists() and any(not _leftover(child.name) for child in path.iterdir()):
            raise StoreError(f"{str(path)!r} exists and is no store of embeddings: give a new or empty folder")
        store = cls(path, manifest)
        store.write_index(index)
        write_text(path / "manifest.json", json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")
        return store

    def write_index(self, index: ImageIndex) -> None:
        """Write index/, in parts of SHARDS_PER_INDEX_PART shards, a row group a shard."""
        rows = self.manifest.shard_rows * SHARDS_PER_INDEX_PART
        for number, start in enumerate(range(0, len(index), rows)):
            with atomic_path(self.path / "index" / f"part-{number:05d}.parquet") as temporary:
                part = index.slice(start, rows).table
                pq.write_table(part, temporary, compression="zstd", row_group_size=self.manifest.shard_rows)

    def part_path(self, shard: int) -> Path:
        """Where shard number `shard` is, or will be."""
        return self.path / f"part-{shard:05d}.parquet"

    def done(self) -> set[int]:
        """Numbers of the shards that exist, by one listing."""
        numbers = (child.stem.removeprefix("part-") for child in self.path.glob("part-*.parquet"))
        return {int(number) for number in numbers if number.isdecimal()}

    def shard(self, number: int) -> ImageIndex:
        """The images of one shard, from its number alone."""
        part, within = divmod(number, SHARDS_PER_INDEX_PART)
        file = pq.ParquetFile(self.path / "index" / f"part-{part:05d}.parquet")
        return ImageIndex(file.read_row_group(within))  # a row group a shard, see write_index

    def shard_size(self, number: int) -> int:
        """Images in one shard."""
        return min(self.manifest.shard_rows, self.manifest.rows - number * self.manifest.shard_rows)

    def write_part(self, shard: int, ids: list[str], rows: np.ndarray, refused: list[RefusedRow]) -> None:
        """Write one finished shard: its rows and its ledger lines in one atomic file.

        Args:
            shard: its number.
            ids: (n,), in index order.
            rows: (n, dim) embeddings.
            refused: the images of the shard that have no row.
        """
        assert rows.shape == (len(ids), self.manifest.dim), (rows.shape, len(ids), self.manifest.dim)
        kind = pa.from_numpy_dtype(np.dtype(self.manifest.dtype))
        flat = pa.array(np.ascontiguousarray(rows, dtype=self.manifest.dtype).reshape(-1), kind)
        embedding = pa.FixedSizeListArray.from_arrays(flat, self.manifest.dim)
        ledger = json.dumps([dataclasses.asdict(row) for row in refused])
        schema = pa.schema([("id", pa.string()), ("embedding", embedding.type)], {LEDGER_KEY: ledger.encode()})
        table = pa.table([pa.array(ids, pa.string()), embedding], schema=schema)
        with atomic_path(self.part_path(shard)) as temporary:
            pq.write_table(table, temporary, compression="zstd", use_dictionary=False)

    def refused(self) -> Iterator[RefusedRow]:
        """The ledger, in index order, as the parts hold it."""
        for shard in sorted(self.done()):
            metadata = self._metadata(shard).metadata or {}
            yield from (RefusedRow(**row) for row in json.loads(metadata.get(LEDGER_KEY, b"[]")))

    def write_ledger(self) -> int:
        """Write errors.jsonl from the parts; returns its number of lines."""
        lines = [json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in self.refused()]
        write_text(self.path / "errors.jsonl", "".join(lines))
        return len(lines)

    @property
    def complete(self) -> bool:
        """Every shard is there."""
        return len(self.done()) == self.manifest.shards

    def __len__(self) -> int:
        return sum(self._metadata(shard).num_rows for shard in self.done())

    @property
    def ids(self) -> list[str]:
        """The id of every row, in index order."""
        return [name for shard in sorted(self.done()) for name in self._read(shard, ["id"])["id"].to_pylist()]

    @property
    def embeddings(self) -> np.ndarray:
        """All rows in one array, (N, dim) in the store's dtype. For more than fits in memory, see `batches`."""
        out = np.empty((len(self), self.manifest.dim), self.manifest.dtype)
        at = 0
        for _, rows in self.batches():
            out[at : at + len(rows)] = rows
            at += len(rows)
        return out

    def batches(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """(ids, (n, dim) rows) part by part in index order; one part in memory at a time."""
        for shard in sorted(self.done()):
            table = self._read(shard, ["id", "embedding"])
            flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            yield table["id"].to_pylist(), flat.reshape(-1, self.manifest.dim)

    def to_arrow(self) -> pa.Table:
        """Columns id and embedding, all rows."""
        tables = [self._read(shard, ["id", "embedding"]) for shard in sorted(self.done())]
        kind = pa.list_(pa.from_numpy_dtype(np.dtype(self.manifest.dtype)), self.manifest.dim)
        schema = pa.schema([("id", pa.string()), ("embedding", kind)])
        return (
            pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
            if tables
            else schema.empty_table()
        )

    def to_pandas(self) -> pd.DataFrame:
        """A frame indexed by id, a column a dimension.

        Raises:
            StoreError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise StoreError("to_pandas needs pandas: pip install 'micl-zoo[explore]'") from None
        return pd.DataFrame(self.embeddings, index=pd.Index(self.ids, name="id"))

    def _read(self, shard: int, columns: list[str]) -> pa.Table:
        with self._damage(shard):
            return pq.read_table(self.part_path(shard), columns=columns)

    def _metadata(self, shard: int) -> pq.FileMetaData:
        with self._damage(shard):
            return pq.read_metadata(self.part_path(shard))

    @contextlib.contextmanager
    def _damage(self, shard: int) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            path = self.part_path(shard)
            raise StoreError(
                f"{str(path)!r} is damaged ({error}): delete it and run the same extract command again"
            ) from None


def open_store(path: str | os.PathLike[str]) -> Store:
    """Open a folder of embeddings, complete or not.

    Raises:
        StoreError: no store there, a damaged manifest, or a layout newer than this version reads.
    """
    folder = Path(path)
    file = folder / "manifest.json"
    if not file.exists():
        raise StoreError(f"{str(folder)!r} is no store of embeddings: it has no manifest.json")
    try:
        fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{str(folder)!r} has layout version {version}, this micl-zoo reads {FORMAT_VERSION}: upgrade micl-zoo"
            )
        return Store(folder, Manifest(**fields))
    except (json.JSONDecodeError, TypeError) as error:
        raise StoreError(f"the manifest of {str(folder)!r} is damaged: {error}") from None


def _leftover(name: str) -> bool:
    """What a run killed before its manifest was written leaves behind."""
    return name == "index" or name.endswith(".tmp")
