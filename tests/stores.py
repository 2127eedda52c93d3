"""Stores of small pictures, and ways to change what is in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import picture

import micl_zoo
from micl_zoo import Store
from micl_zoo.extraction.extract import extract
from micl_zoo.stores.manifest import fields_sha256

ODD_NAME = 'a line\nbreak, \u00fc and a "quote".jpg'


def make_store(folder: Path, encoder_folder: Path, *, count: int = 10, bad: bool = True, **options: object) -> Store:
    """A store of `count` pictures in shards of 4, in folder/store; with `bad`, one more file is refused."""
    for number in range(count):
        file = folder / "images" / ("below" if number % 2 else "") / (f"{number:03d}.jpg" if number else ODD_NAME)
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number, 40 + number, 44).save(file, quality=90)
    if bad:
        (folder / "images" / "bad.jpg").write_bytes(b"")
    settings = {
        "weights": encoder_folder,
        "devices": "cpu",
        "precision": "fp32",
        "shard_rows": 4,
        "workers": 0,
        **options,
    }
    return extract(folder / "images", folder / "store", **settings).store  # type: ignore[arg-type]


def rewrite_part(
    store: Store,
    shard: int,
    *,
    ids: Sequence[str] | None = None,
    rows: np.ndarray | None = None,
    seal: bool = False,
) -> None:
    """Put other ids or rows into a part, its ledger left as it is; with `seal`, its checksum is made right."""
    table = pq.read_table(store.part_path(shard))
    width = table.schema.field("embedding").type.list_size
    if ids is not None:
        old = table["id"].to_pylist()
        picks = [old.index(name) if name in old else 0 for name in ids]
        table = table.take(pa.array(picks, pa.int64())).set_column(
            0, table.schema.field("id"), pa.array(ids, pa.string())
        )
    if rows is not None:
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.astype(store.manifest.dtype).reshape(-1)), width)
        ids = table["id"].to_pylist() if len(table) == len(rows) else [f"made-{shard}-{n}" for n in range(len(rows))]
        table = pa.table([pa.array(ids, pa.string()), vectors], schema=table.schema)
    pq.write_table(table, store.part_path(shard))
    if seal:
        store.write_part(shard, store.snapshot(check=False).rows(shard))


def edit_manifest(store: Store, *, seal: bool = False, **changes: object) -> None:
    """Write other facts into manifest.json; with `seal`, its checksum is made right."""
    file = store.path / "manifest.json"
    fields = json.loads(file.read_text())
    sha256, fields = fields.pop("sha256"), fields | changes
    file.write_text(json.dumps(fields | {"sha256": fields_sha256(fields) if seal else sha256}))


def reopened(store: Store) -> Store:
    """The same store, as another process would see it."""
    return micl_zoo.open_store(store.path)
