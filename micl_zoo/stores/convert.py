"""Conversion of a store to one file for other tools: NumPy, safetensors, LanceDB; one part in memory at a time."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from ..errors import StoreError, UsageError
from ..files import atomic_folder, atomic_path, local_path
from ..printing import json_line
from ..progress import Tick, progress
from ..schema import checked, shown
from .parts import ID
from .store import Store, open_store, parts_of

ENDINGS = (".npy", ".safetensors", ".lance", ".lancedb")
DTYPES = ("float16", "float32")
DEFAULT_TABLE = "embeddings"  # where OUT names a LanceDB database and no table
LANCE_ROWS = 4096  # rows per record batch


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote."""

    path: Path  # the file, or the table's folder
    shape: tuple[int, ...]  # of all rows: (N, D), or (N, h, w, D) where a row is all patch tokens
    dtype: str  # data type of the rows
    bytes: int  # size on disk, ids included
    opens_with: str  # one line of Python that opens it, as rows and ids or as a table


@checked
def convert(
    store: Store | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: Any = None,
    overwrite: bool = False,
    incomplete: bool = False,
) -> Converted:
    """Write a store in another format, by the ending of `out`. The rows stay in index order.

    Args:
        store: see `open_store`.
        out: X.npy, with the ids beside it in X.npy.ids.json, a JSON list; X.safetensors, with tensors `embeddings` and
            `ids` (uint8, the bytes of such a list) and the manifest in its header; DATABASE/X.lance, a LanceDB table
            with columns id and vector; DATABASE.lancedb, the same with a table named embeddings.
        dtype: data type of the rows, "float16" or "float32", by name or as NumPy has it; the store's own by default.
        overwrite: replace `out` if it exists. It stays until the new file is whole.
        incomplete: accept a store with missing parts and write the others.

    Raises:
        UsageError: another ending, or `out` exists.
        StoreError: an incomplete store, a damaged part, a number that does not fit the dtype, or no LanceDB.
    """
    path, kind = local_path(out), None if dtype is None else _dtype(dtype)
    store = open_store(store)
    kind = kind or _dtype(store.manifest.dtype)
    if path.suffix not in ENDINGS:
        raise UsageError(f"cannot tell what to write to {str(path)!r}: its name must end in {', '.join(ENDINGS)}")
    if path.suffix == ".lancedb":
        path = path / f"{DEFAULT_TABLE}.lance"
    _check_free(path, overwrite)
    if store.folder.local is not None and path.absolute().is_relative_to(store.folder.local.absolute()):
        raise UsageError(f"{str(path)!r} is inside the store, whose files have names of their own: give another folder")
    store.refuse_strays()
    view = store.snapshot()
    if not view.complete and not incomplete:
        raise StoreError(
            f"{str(store.folder)!r} has {parts_of(len(view.done()), store.manifest.shards)}: run its extract command "
            "again, or give --incomplete (from Python incomplete=True) for the rows that are there"
        )
    shape = (len(view), *store.manifest.shape)
    writers = {".npy": _write_npy, ".safetensors": _write_tensors, ".lance": _write_lance}
    path.parent.mkdir(parents=True, exist_ok=True)
    with progress(f"writing {path.name}", shape[0], unit="rows") as tick:
        size, opens_with = writers[path.suffix](view, path, shape, kind, tick)
    return Converted(path, shape, kind.name, size, opens_with)


def _dtype(asked: Any) -> np.dtype:
    """Take a data type by its name, or as NumPy has it."""
    with contextlib.suppress(TypeError):
        if (kind := np.dtype(asked)).name in DTYPES:
            return kind
    raise UsageError(f"convert: dtype must be one of {', '.join(DTYPES)}, it is {shown(asked)}")


def _check_free(path: Path, overwrite: bool) -> None:
    """Raise a UsageError where writing would replace what is there and should not, or cannot, be replaced."""
    is_folder = path.suffix == ".lance"
    for out in (path, _ids_file(path)) if path.suffix == ".npy" else (path,):
        if not out.exists():
            continue
        if out.is_dir() != is_folder:
            raise UsageError(f"{str(out)!r} is a {'file' if is_folder else 'folder'}: give another name")
        if not overwrite:
            raise UsageError(f"{str(out)!r} exists: give another name, or --overwrite (from Python overwrite=True)")


def _ids_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.ids.json")


def _batches(store: Store, dtype: np.dtype, tick: Tick) -> Iterator[tuple[list[str], np.ndarray]]:
    """Iterate over (ids, (n, dim) rows in C order) of each part."""
    for ids, rows in store.batches():
        try:
            with np.errstate(over="raise"):
                rows = np.ascontiguousarray(rows, dtype)
        except FloatingPointError:
            largest = np.abs(rows).max()
            raise StoreError(f"{largest:g} does not fit {dtype.name}: give --dtype float32") from None
        yield ids, rows
        tick(len(ids))


def _write_ids(store: Store, file: BinaryIO) -> None:
    """Write a JSON list of all ids, one per line, since an id may hold any character, line breaks too."""
    between = b"[\n"
    for shard in store.done():
        for name in store.part_ids(shard):
            file.write(between + json_line(name).encode())
            between = b",\n"
    file.write(b"\n]\n" if between == b",\n" else b"[]\n")


def _write_npy(store: Store, path: Path, shape: tuple[int, ...], dtype: np.dtype, tick: Tick) -> tuple[int, str]:
    # Written and not memory-mapped: a full disk is an error of write(), and ends a process that writes to a map.
    names = _ids_file(path)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with atomic_path(path) as array, atomic_path(names) as listing:  # renamed last first: never rows without ids
        with array.open("wb") as file:
            np.lib.format.write_array_header_2_0(file, header)
            for _, rows in _batches(store, dtype, tick):
                file.write(rows.data)
        with listing.open("wb") as file:
            _write_ids(store, file)
    line = (
        f"import json, numpy, pathlib; rows = numpy.load({str(path)!r}, mmap_mode='r'); "
        f"ids = json.loads(pathlib.Path({str(names)!r}).read_bytes())"
    )
    return path.stat().st_size + names.stat().st_size, line


def _write_tensors(store: Store, path: Path, shape: tuple[int, ...], dtype: np.dtype, tick: Tick) -> tuple[int, str]:
    """The format: a length (8 bytes, little endian), a JSON header of that length, the tensors one after another."""
    rows_end = math.prod(shape) * dtype.itemsize

    def header(ids_bytes: int) -> bytes:
        tensors = {
            "__metadata__": {"micl_zoo.manifest": json.dumps(asdict(store.manifest))},
            "embeddings": {"dtype": f"F{8 * dtype.itemsize}", "shape": shape, "data_offsets": [0, rows_end]},
            "ids": {"dtype": "U8", "shape": [ids_bytes], "data_offsets": [rows_end, rows_end + ids_bytes]},
        }
        return json.dumps(tensors).encode()

    length = -(-len(header(10**15)) // 8) * 8  # spaces fill it up, and what follows begins at a multiple of 8
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.seek(8 + length)
        for _, rows in _batches(store, dtype, tick):
            file.write(rows.data)
        assert file.tell() == 8 + length + rows_end, (file.tell(), length, rows_end)
        _write_ids(store, file)
        ids_bytes = file.tell() - 8 - length - rows_end
        file.seek(0)
        file.write(length.to_bytes(8, "little") + header(ids_bytes).ljust(length))
    line = (
        f"import json, safetensors.numpy; tensors = safetensors.numpy.load_file({str(path)!r}); "
        "rows = tensors['embeddings']; ids = json.loads(tensors['ids'].tobytes())"
    )
    return path.stat().st_size, line


def _write_lance(store: Store, path: Path, shape: tuple[int, ...], dtype: np.dtype, tick: Tick) -> tuple[int, str]:
    """Write a LanceDB table: the folder NAME.lance in the database's folder, which may be moved once it is written."""
    try:
        import lancedb
    except ImportError:
        raise StoreError("a LanceDB table needs lancedb: pip install 'micl-zoo[lancedb]'") from None
    width = math.prod(shape[1:])
    schema = pa.schema([(ID, pa.string()), ("vector", pa.list_(pa.from_numpy_dtype(dtype), width))])
    failed: list[StoreError] = []

    def record_batches() -> Iterator[pa.RecordBatch]:
        try:
            for ids, rows in _batches(store, dtype, tick):
                vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), width)
                batch = pa.record_batch([pa.array(ids, pa.string()), vectors], schema=schema)
                yield from (batch.slice(start, LANCE_ROWS) for start in range(0, len(ids), LANCE_ROWS))
        except StoreError as error:
            failed.append(error)
            raise

    with atomic_folder(path) as folder:
        try:
            table = pa.RecordBatchReader.from_batches(schema, record_batches())
            lancedb.connect(folder).create_table(path.stem, table)
        except Exception as error:
            if failed:  # LanceDB hides what its source raised in an error of its own
                raise failed[0] from None
            raise StoreError(f"LanceDB cannot write the table {path.stem!r}: {error}") from None
        for child in (folder / path.name).iterdir():
            child.rename(folder / child.name)
        (folder / path.name).rmdir()
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return size, f"import lancedb; table = lancedb.connect({str(path.parent)!r}).open_table({path.stem!r})"
