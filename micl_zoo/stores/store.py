"""Store: the folder that extract writes, with manifest, index, parts and ledger; opened, checked and read here."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import StoreError
from ..files import LOCK_FILE, OWNER_FILE, Folder
from ..images.decode import MAX_PIXELS
from ..printing import json_line
from ..schema import checked
from ..sources.index import ImageIndex
from .manifest import MANIFEST_FILE, Manifest, read_manifest, write_manifest
from .parts import (
    CURE,
    ID,
    INDEX_SCHEMAS,
    SHA256_KEY,
    Made,
    RefusedRow,
    Rows,
    check_metadata,
    decode_ledger,
    decode_made,
    decode_part,
    encode_index,
    encode_part,
    is_whole,
    part_schema,
    read_table,
)

if TYPE_CHECKING:
    import pandas as pd

PART, BEGINNING = "part-", ".beginning-"  # files of finished and of unfinished shards, before their number
LEDGER_FILE = "errors.jsonl"
MAX_DIGITS = 12  # of the number of a part


class Store:
    """A folder of embeddings, local or on an object store. Make one with `create`, open one with `open_store`.

    Its `manifest` says what all rows have in common, its `folder` where they are.
    """

    def __init__(self, folder: Folder, manifest: Manifest, *, check: bool = True) -> None:
        """Take a folder; with `check`, the checksum of each part is compared when it is first read."""
        self.folder, self.manifest, self.check = folder, manifest, check
        self._checked = set[int]()  # parts whose checksum was right; shared by all snapshots
        self._snapshot: list[int] | None = None

    def snapshot(self, shards: Iterable[int] | None = None, *, check: bool | None = None) -> Store:
        """View the store with these parts only, by default those that exist now, unmoved by what is written later."""
        view = copy.copy(self)
        view._snapshot = self.done() if shards is None else sorted(shards)
        view.check = self.check if check is None else check
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
        if MANIFEST_FILE in names and overwrite:
            _clear(folder, names)
            names = []
        if MANIFEST_FILE in names:
            found, whole = read_manifest(folder)
            store = cls(folder, found)
            if differences := found.differences(manifest):
                damage = ", or its manifest is damaged, for its sha256 differs" if whole is False else ""
                raise StoreError(
                    f"{str(folder)!r} holds other embeddings{damage}; " + "; ".join(differences) + ". Give another "
                    "output folder, or --overwrite to lose these."
                )
            there = store.indexed()
            longer = found.shards is not None and there == list(range(len(there))) and len(there) > found.shards
            if whole is False or longer:  # the counts in it say nothing, and are made again
                store.manifest = manifest
                store.write_manifest()
            store.refuse_strays()
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
        write_manifest(self.folder, self.manifest)

    def reopen(self, command: str = "") -> None:
        """Note that more images are being listed: how many there are is not known, and no ledger is the last.

        The `command` is that which makes the whole store; by default it stays.
        """
        command = command or self.manifest.command
        self.manifest = dataclasses.replace(self.manifest, command=command, rows=None, shards=None, index_sha256=None)
        self.write_manifest()
        self.folder.remove(LEDGER_FILE)

    def indexed(self) -> list[int]:
        """List the numbers of the shards in the index."""
        return _numbers(self.folder.names("index"))

    def strays(self) -> list[str]:
        """List the files that look like parts and are none: copies, other numbers, or beyond the manifest's shards."""
        index, names, shards = self.folder.names("index"), self.folder.names(), self.manifest.shards
        if shards is None:
            shards = max(_numbers(index), default=-1) + 1

        def strange(found: list[str]) -> list[str]:
            known = {part_name(number) for number in _numbers(found) if number < shards}
            return [name for name in found if name.startswith(PART) and name not in known]

        return strange(names) + [f"index/{name}" for name in strange(index)]

    def refuse_strays(self) -> None:
        """Raise a StoreError that names the first of `strays`."""
        for name in self.strays():
            raise StoreError(
                f"{self.folder.at(name)!r} is no part of this store: its name or number is none that the index and "
                "the manifest have. Move it away or delete it"
            )

    def write_index(self, number: int, index: ImageIndex) -> None:
        """Write one shard of the index."""
        self.folder.write(f"index/{part_name(number)}", encode_index(index))

    def shard(self, number: int) -> ImageIndex:
        """Read one shard of the index; StoreError where its file is damaged or missing."""
        return self.checked_shard(number)[0]

    def checked_shard(self, number: int) -> tuple[ImageIndex, bool]:
        """Read one shard of the index, and tell whether its file has a checksum; earlier versions wrote none."""
        name = f"index/{part_name(number)}"
        with self._damage(name):
            whole = is_whole(data := self.folder.read(name))
            table = read_table(pa.BufferReader(data), INDEX_SCHEMAS, self._most_rows)
            if whole is False and "kind" in table.column_names:
                raise ValueError("its sha256 differs from that of its bytes")
            return ImageIndex.from_table(table.replace_schema_metadata(None)), bool(whole)

    def part_path(self, number: int) -> Path:
        """Path of one part in a local store, written or not."""
        return self.path / part_name(number)

    def has_part(self, number: int) -> bool:
        """True if a shard is finished."""
        return self.folder.exists(part_name(number))

    def done(self) -> list[int]:
        """List the numbers of the parts that exist, or that the snapshot has, in order."""
        if self._snapshot is not None:
            return [*self._snapshot]
        shards = self.manifest.shards
        return [number for number in _numbers(self.folder.names()) if shards is None or number < shards]

    def write_part(self, number: int, rows: Rows) -> None:
        """Write one finished shard, rows and ledger lines in one file, and remove the file of its beginning."""
        self.folder.write(part_name(number), encode_part(rows, self.manifest, number))
        self._checked.discard(number)
        self.folder.remove(part_name(number, BEGINNING))

    def write_beginning(self, number: int, rows: Rows) -> None:
        """Keep the first rows of an unfinished shard."""
        self.folder.write(part_name(number, BEGINNING), encode_part(rows, self.manifest, number))

    def beginning(self, number: int) -> Rows | None:
        """Read what is kept of an unfinished shard; None where nothing is kept or it is damaged."""
        if self.folder.exists(part_name(number, BEGINNING)):
            with contextlib.suppress(StoreError):
                return self._checked_rows(number, BEGINNING)
        return None

    def unfinish(self, number: int) -> None:
        """Make a finished shard the beginning of one that is to have more images."""
        self.write_beginning(number, self.check_part(number))
        self.folder.remove(part_name(number))

    def rows(self, number: int) -> Rows:
        """Read one finished shard; StoreError where its part is damaged or missing."""
        name = part_name(number)
        with self._damage(name):
            return decode_part(self._read(number), repr(self.folder.at(name)))

    def check_part(self, number: int) -> Rows:
        """Read one finished shard and hash it again; StoreError where its part is not what was written."""
        return self._checked_rows(number)

    def refused(self) -> Iterator[RefusedRow]:
        """Iterate over the ledger lines of the parts, in index order."""
        for number in self.done():
            yield from self.ledger(number)

    def ledger(self, number: int) -> list[RefusedRow]:
        """Read the ledger lines of one finished shard, and nothing else of its part."""
        metadata = self._metadata(number).metadata
        with self._damage(part_name(number)):
            return decode_ledger(metadata, repr(self.folder.at(part_name(number))))

    def made(self, number: int) -> Made:
        """Read by what one finished shard was made; of one of an earlier version, what its manifest says."""
        metadata = self._metadata(number).metadata
        with self._damage(part_name(number)):
            return decode_made(metadata, repr(self.folder.at(part_name(number)))) or self.made_before

    @property
    def made_before(self) -> Made:
        """By what a part was made that does not say it: an earlier version had the pixel limit in the manifest."""
        limit = re.search(r"-max(\d{1,18})$", self.manifest.decoding)
        return Made((self.manifest.runtime,), int(limit[1]) if limit else MAX_PIXELS, ())

    def max_pixels(self, least: int) -> int:
        """Return the largest pixel limit under which a part was made."""
        limits = [least]
        for number in self.done():
            with contextlib.suppress(StoreError):  # the damaged part is an error of its own
                limits.append(self.made(number).max_pixels)
        return max(limits)

    def write_ledger(self, unlisted: Iterable[RefusedRow] = ()) -> int:
        """Write errors.jsonl from the parts, then what was no image of the index; return how many images are in it."""
        refused = list(self.refused())
        lines = [json_line(dataclasses.asdict(row)) + "\n" for row in itertools.chain(refused, unlisted)]
        self.folder.write(LEDGER_FILE, "".join(lines).encode())
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
        return [name for number in self.done() for name in self.part_ids(number)]

    def part_ids(self, number: int) -> list[str]:
        """Read the ids of the rows of one finished shard."""
        with self._damage(part_name(number)):
            names: list[str] = self._read(number, [ID])[ID].to_pylist()
            return names

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
            yield self.rows(number)[:2]

    def to_arrow(self) -> pa.Table:
        """Return all rows as a table with the columns id and embedding."""
        tables = list(map(self._table, self.done()))
        return pa.concat_tables(tables) if tables else self.schema().remove_metadata().empty_table()

    def to_pandas(self) -> pd.DataFrame:
        """Return all rows as a frame indexed by id, with one column per dimension; needs pandas."""
        try:
            import pandas as pd
        except ImportError:
            raise StoreError("to_pandas needs pandas: pip install 'micl-zoo[explore]'") from None
        view = self.snapshot()
        return pd.DataFrame(view.embeddings.reshape(-1, self.manifest.dim), index=pd.Index(view.ids, name=ID))

    def schema(self, number: int = 0) -> pa.Schema:
        """Columns of a part of this store, see `part_schema`."""
        return part_schema(self.manifest, number)

    def _table(self, number: int) -> pa.Table:
        with self._damage(part_name(number)):
            return self._read(number).replace_schema_metadata(None)

    def _read(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """Read columns of a part; the first time, all its bytes are hashed."""
        name = part_name(number)
        if not self.check or number in self._checked:
            return read_table(self.folder.open(name), [self.schema(number)], self._most_rows, columns)
        data = self.folder.read(name)
        if (whole := is_whole(data)) is None:
            self._checked_rows(number)  # an earlier version has hashed the rows only
        elif not whole:
            raise ValueError("its sha256 differs from that of its bytes")
        table = read_table(pa.BufferReader(data), [self.schema(number)], self._most_rows, columns)
        self._checked.add(number)
        return table

    def _checked_rows(self, number: int, kind: str = PART) -> Rows:
        name = part_name(number, kind)
        with self._damage(name):
            whole = is_whole(data := self.folder.read(name))
            table = read_table(pa.BufferReader(data), [self.schema(number)], self._most_rows)
            rows = decode_part(table, repr(self.folder.at(name)))
            sha256 = (table.schema.metadata or {}).get(SHA256_KEY, b"")
            if (found := rows.sha256()).encode() != sha256:
                raise ValueError(f"its sha256 is {found}, not {sha256!r}")
            if whole is False:
                raise ValueError("its sha256 differs from that of its bytes")
            return rows

    @property
    def _most_rows(self) -> int:
        """Rows of a file that is read; above those of a shard, so that `verify` can say which are too many."""
        return 2 * self.manifest.shard_rows + 1000

    def _metadata(self, number: int) -> pq.FileMetaData:
        with self._damage(part_name(number)):
            found = pq.read_metadata(self.folder.open(part_name(number)))
            check_metadata(found, [self.schema(number)], self._most_rows)
            return found

    @contextlib.contextmanager
    def _damage(self, name: str) -> Iterator[None]:
        """Turn what reading a file raises into a StoreError that names it. What may pass is no damage."""
        where = self.folder.at(name)
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError:
            raise StoreError(f"{where!r} is missing: run the same extract command again") from None
        except MemoryError:
            raise StoreError(f"cannot read {where!r}: there is not enough memory") from None
        except (OSError, ValueError, KeyError, OverflowError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise StoreError(f"cannot read {where!r}: {os.strerror(error.errno)}") from None
            raise StoreError(f"{where!r} is damaged ({error}): {CURE}") from None


@checked
def open_store(path: Store | Folder | str | os.PathLike[str], *, check: bool = True) -> Store:
    """Open a folder of embeddings. Of one that is still being written, the finished parts are seen.

    Args:
        path: a local folder, or a URI such as s3://bucket/embeddings; an open store is returned as it is.
        check: compare the checksum of each part when it is first read, so that changed bytes are an error and no wrong
            rows; costs about as much as reading it. That of the manifest is always compared.

    Raises:
        StoreError: there is no store, its manifest is damaged, or its layout is of another version.
    """
    if isinstance(path, Store):
        return path
    folder = path if isinstance(path, Folder) else Folder(path)
    manifest, whole = read_manifest(folder)
    if whole is False:
        raise StoreError(
            f"{folder.at(MANIFEST_FILE)!r} is damaged, it is not as it was written (its sha256 differs): run the same "
            "extract command again, which mends it where its counts were changed and else says what was"
        )
    return Store(folder, manifest, check=check)


def part_name(number: int, start: str = PART) -> str:
    """Name of the file of a part, or of a shard of the index."""
    return f"{start}{number:05d}.parquet"


def _numbers(names: Sequence[str]) -> list[int]:
    """Numbers of the parts among these files, sorted; part-1.parquet and "part-00001 (copy).parquet" are none."""
    stems = {name.removeprefix(PART).removesuffix(".parquet") for name in names}
    numbers = {int(stem) for stem in stems if stem.isdecimal() and stem.isascii() and len(stem) <= MAX_DIGITS}
    return sorted(number for number in numbers if part_name(number) in names)


def parts_of(parts: int, shards: int | None) -> str:
    """Say how many parts there are, and of how many: unknown before all images are listed."""
    return f"{parts:,} of {'an unknown number of' if shards is None else f'{shards:,}'} parts"


def _clear(folder: Folder, names: list[str]) -> None:
    """Delete a store, the manifest last: a kill in between leaves a store of fewer parts."""
    mine = [name for name in names if name.startswith((PART, f".{PART}", BEGINNING, LEDGER_FILE))]
    for name in [*mine, *(f"index/{name}" for name in folder.names("index")), MANIFEST_FILE]:
        folder.remove(name)
