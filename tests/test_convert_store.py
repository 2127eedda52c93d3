"""What `convert` wrote is opened by the line of Python it prints, and holds the rows and ids of the store."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from stores import ODD_NAME, make_store, reopened, rewrite_part

import micl_zoo
from micl_zoo import Store
from micl_zoo.cli import main
from micl_zoo.errors import StoreError, UsageError
from micl_zoo.stores.convert import Converted, convert

NAMES = ["x.npy", "x.safetensors", "base/x.lance", "base.lancedb"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> Store:
    return make_store(tmp_path_factory.mktemp("made"), encoder_folder, normalize=False)


@pytest.fixture
def store(made: Store, tmp_path: Path) -> Store:
    return micl_zoo.open_store(shutil.copytree(made.path, tmp_path / "store"))


def opened(made: Converted) -> tuple[list[str], np.ndarray]:
    """By its own line of Python."""
    names: dict[str, Any] = {}
    exec(made.opens_with, names)
    if "table" in names:
        table = names["table"].to_arrow()
        return table["id"].to_pylist(), np.stack(table["vector"].to_numpy(zero_copy_only=False))
    return names["ids"], names["rows"]


def need(name: str) -> None:
    if "lance" in name:
        pytest.importorskip("lancedb")


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_and_ids_come_back(store: Store, tmp_path: Path, name: str, dtype: Any) -> None:
    need(name)
    made = convert(store, tmp_path / name, dtype=dtype)
    ids, rows = opened(made)
    assert ids == store.ids
    assert ODD_NAME in ids
    assert rows.dtype == np.dtype(dtype or "float32") == np.dtype(made.dtype)
    np.testing.assert_array_equal(rows, store.embeddings.astype(rows.dtype))
    assert made.shape == rows.shape == (10, 32)
    assert made.bytes > rows.nbytes
    assert not list(made.path.parent.glob(".*"))


@pytest.mark.parametrize("name", NAMES[:2])
def test_patch_tokens_keep_their_places(tmp_path: Path, encoder_folder: Path, name: str) -> None:
    store = make_store(tmp_path, encoder_folder, count=3, pool="patches")
    _, rows = opened(convert(store, tmp_path / name))
    assert rows.shape[1:] == tuple(store.manifest.shape)
    np.testing.assert_array_equal(rows, store.embeddings)


def test_safetensors_carry_the_manifest_and_are_aligned(store: Store, tmp_path: Path) -> None:
    from safetensors import safe_open

    convert(store, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        manifest = json.loads(file.metadata()["micl_zoo.manifest"])
        assert sorted(file.keys()) == ["embeddings", "ids"]
    assert manifest["weights_sha256"] == store.manifest.weights_sha256
    assert int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_what_is_there_is_not_replaced_unasked(store: Store, tmp_path: Path) -> None:
    for name in NAMES:
        need(name)
        convert(store, tmp_path / name)
        with pytest.raises(UsageError, match="exists: give another name, or --overwrite"):
            convert(store, tmp_path / name)
        convert(store, tmp_path / name, overwrite=True)


def test_an_error_leaves_the_old_file(store: Store, tmp_path: Path) -> None:
    for name in NAMES:
        need(name)
        convert(store, tmp_path / name)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    rows = next(store.batches())[1].copy()
    rewrite_part(store, 0, rows=rows * 1e6, seal=True)
    for name in NAMES:
        with pytest.raises(StoreError, match="does not fit float16: give --dtype float32"):
            convert(reopened(store), tmp_path / name, dtype="float16", overwrite=True)
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert {file for file in before | after if before.get(file) != after.get(file)} == {store.part_path(0)}


def test_incomplete_stores_and_empty_parts(store: Store, tmp_path: Path) -> None:
    store.part_path(2).unlink()
    with pytest.raises(StoreError, match=r"has 2 of 3 parts: .* --incomplete"):
        convert(store, tmp_path / "x.safetensors")
    ids, rows = opened(convert(store, tmp_path / "x.safetensors", incomplete=True))
    assert ids == store.ids
    np.testing.assert_array_equal(rows, store.embeddings)
    rewrite_part(store, 0, ids=[], seal=True)
    assert opened(convert(store, tmp_path / "y.safetensors", incomplete=True))[0] == reopened(store).ids
    store.part_path(0).unlink()
    store.part_path(1).unlink()
    ids, rows = opened(convert(store, tmp_path / "z.safetensors", incomplete=True))
    assert ids == []
    assert rows.shape == (0, 32)


def test_an_ending_that_says_nothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.npy, \.safetensors, \.lance"):
        convert(store, tmp_path / "x.csv")


def test_lancedb_is_asked_for_by_its_extra(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(StoreError, match=r"pip install 'micl-zoo\[lancedb\]'"):
        convert(store, tmp_path / "x.lance")


def test_a_table_s_name_that_lancedb_does_not_take(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("lancedb")
    with pytest.raises(StoreError, match="cannot write the table 'a b'"):
        convert(store, tmp_path / "a b.lance")
    assert [file.name for file in tmp_path.iterdir()] == ["store"]


def test_the_command(store: Store, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["convert", str(store.path), str(tmp_path / "x.npy"), "--dtype", "float16"])
    assert result.exit_code == 0, result.output
    size = sum((tmp_path / name).stat().st_size for name in ("x.npy", "x.npy.ids.json"))
    assert f"10 rows of 32 numbers, float16, {size:,} bytes, in {tmp_path / 'x.npy'}. Open it by:" in result.output
    assert "numpy.load(" in result.output
