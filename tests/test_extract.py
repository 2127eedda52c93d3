"""Extraction: every image has a row or a ledger line, whatever happens to the process."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from conftest import picture
from damaged import encoded
from PIL import Image

import micl_zoo
from micl_zoo.cli import main
from micl_zoo.encoders.device import resolve_precision
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.errors import Interrupted, MiclZooError, SourceError, StoreError, UsageError
from micl_zoo.extraction import decoders as workers
from micl_zoo.extraction import engines
from micl_zoo.extraction.engines import Local, Worker
from micl_zoo.extraction.extract import extract
from micl_zoo.extraction.options import ExtractOptions
from micl_zoo.extraction.runner import Event
from micl_zoo.extraction.work import Work
from micl_zoo.files import Folder
from micl_zoo.images.decode import decode_pixels
from micl_zoo.sources.index import ImageIndex
from micl_zoo.stop import StopRequest
from micl_zoo.stores.store import Store


def files(store: Path) -> dict[str, bytes]:
    """All but the command that made it."""
    found = {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}
    found["manifest.json"] = json.dumps(json.loads(found["manifest.json"]) | {"command": ""}).encode()
    return found


def ledger(store: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (store / "errors.jsonl").read_text().splitlines()]


def test_rows_are_those_of_embed_in_index_order(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    folder = image_folder(11)
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    summary = extract(folder, tmp_path / "s", model=encoder, shard_rows=4, batch_size=3, workers=2, precision="fp32")
    assert (summary.images, summary.embedded, summary.refused) == (11, 11, 0)
    store = micl_zoo.open_store(tmp_path / "s")
    assert store.ids == [entry.id for entry in micl_zoo.index_source(folder).entries()]
    expected = encoder.embed([folder / name for name in store.ids])
    np.testing.assert_allclose(store.embeddings, expected, atol=1e-6)
    assert store.complete
    assert len(store) == 11
    assert [len(ids) for ids, _ in store.batches()] == [4, 4, 3]
    assert store.manifest.shards == 3

    table = pq.read_table(store.part_path(0))
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    frame = store.to_pandas()
    np.testing.assert_array_equal(frame.to_numpy(), store.embeddings)
    assert list(frame.index) == store.ids
    assert store.to_arrow()["id"].to_pylist() == store.ids


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_pool_and_normalisation(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path, pool: str
) -> None:
    folder = image_folder(3)
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    extract(folder, tmp_path / "s", model=encoder, pool=pool, normalize=False, workers=0, precision="fp32")  # type: ignore[arg-type]
    store = micl_zoo.open_store(tmp_path / "s")
    paths = [folder / name for name in store.ids]
    expected = encoder.embed(paths, pool=pool, normalize=False)  # type: ignore[arg-type]
    np.testing.assert_allclose(store.embeddings, expected, atol=1e-5)
    assert (store.manifest.pool, store.manifest.normalized) == (pool, False)


def test_an_index_is_a_source(image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path) -> None:
    folder, how = image_folder(5), {"weights": encoder_folder, "workers": 0, "devices": "cpu", "shard_rows": 2}
    index = micl_zoo.index_source(folder)
    stores = [extract(folder, tmp_path / "a", **how).store, extract(index, tmp_path / "b", **how).store]
    assert stores[0].manifest.index_sha256 == stores[1].manifest.index_sha256
    for number in range(3):
        assert len({store.part_path(number).read_bytes() for store in stores}) == 1
    part = ImageIndex(index.table.take([3, 1]))
    assert extract(part, tmp_path / "part", **how).store.ids == part.ids


def test_each_bad_image_costs_its_own_line_and_nothing_else(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    folder = image_folder(9)
    good = {entry.id for entry in micl_zoo.index_source(folder).entries()}
    picture(99, 200, 200).save(folder / "whole.jpg", quality=95)
    (folder / "a-truncated.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-4000])
    (folder / "a-zero.jpg").write_bytes(b"")
    (folder / "b-text.jpg").write_text("this is no picture")
    Image.new("RGB", (1, 1)).save(folder / "c-pixel.png")
    (folder / "d-gone.png").symlink_to("nowhere")
    summary = extract(folder, tmp_path / "s", weights=encoder_folder, shard_rows=5, batch_size=2, workers=2)
    assert (summary.embedded, summary.refused) == (10, 5)
    store = micl_zoo.open_store(tmp_path / "s")
    assert set(store.ids) == good | {"whole.jpg"}
    lines = ledger(tmp_path / "s")
    assert [(line["id"], line["reason"]) for line in lines] == [
        ("a-truncated.jpg", "truncated"),
        ("a-zero.jpg", "empty"),
        ("b-text.jpg", "not_an_image"),
        ("c-pixel.png", "too_small"),
        ("d-gone.png", "unreadable"),
    ]
    assert all(line["detail"] and line["uri"].endswith(line["id"]) for line in lines)


def test_a_shard_of_bad_images_only(image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path) -> None:
    folder = image_folder(3)
    for number in range(4):
        (folder / f"0000-{number}.jpg").write_bytes(b"")
    summary = extract(folder, tmp_path / "s", weights=encoder_folder, shard_rows=2, workers=0)
    assert (summary.embedded, summary.refused) == (3, 4)
    assert micl_zoo.open_store(tmp_path / "s").embeddings.shape == (3, 32)


def test_not_one_image_is_an_error(encoder_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.jpg").write_bytes(b"")
    with pytest.raises(MiclZooError, match=r"none of the 1 images could be embedded: see .*errors\.jsonl"):
        extract(tmp_path / "in", tmp_path / "s", weights=encoder_folder, workers=0)


def test_exif_orientations_embed_alike(encoder_folder: Path, tmp_path: Path) -> None:
    scene, folder = picture(7, 120, 90), tmp_path / "in"
    folder.mkdir()
    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = scene.transpose(turns[orientation]) if orientation in turns else scene
        stored.save(folder / f"scene-{orientation}.png", exif=exif)
    extract(folder, tmp_path / "s", weights=encoder_folder, workers=0)
    rows = micl_zoo.open_store(tmp_path / "s").embeddings
    np.testing.assert_allclose(rows @ rows.T, 1, atol=1e-5)


def test_the_same_call_again_does_nothing_and_fills_gaps(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    folder, out = image_folder(10), tmp_path / "s"
    (folder / "005-bad.jpg").write_bytes(b"")
    first = extract(folder, out, weights=encoder_folder, shard_rows=3, workers=0)
    before = files(out)
    assert (first.shards_before, first.computed) == (0, 11)
    again = extract(folder, out, weights=encoder_folder, shard_rows=3, workers=0)
    assert (again.shards_before, again.computed, again.refused) == (4, 0, 1)
    assert files(out) == before
    (out / "part-00001.parquet").unlink()
    (out / "part-00003.parquet").unlink()
    (out / "errors.jsonl").unlink()
    third = extract(folder, out, weights=encoder_folder, shard_rows=3, workers=2)
    assert (third.shards_before, third.computed) == (2, 5)
    assert files(out) == before


def test_killed_at_any_moment_and_run_again_gives_the_same_files(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    folder = image_folder(240)
    (folder / "100-bad.jpg").write_bytes(b"no")
    options: dict[str, Any] = {"weights": encoder_folder, "shard_rows": 6, "batch_size": 4, "workers": 1}
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "micl_zoo", "extract", str(folder), *words]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for parts in (1, 12):  # killed twice: after the first part, and in the middle of the rest
        process = subprocess.Popen([*command, "-o", str(killed)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(list(killed.glob("part-*.parquet"))) < parts and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it was still running
    assert not micl_zoo.open_store(killed).complete
    for out in (killed, whole):
        extract(folder, out, **options)
    assert files(killed) == files(whole)
    assert len(micl_zoo.open_store(killed)) == 240


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"pool": "mean"}, "pool: 'cls' in the store, 'mean' asked for"),
        ({"normalize": False}, "normalized: True in the store, False asked for"),
        ({"precision": "bf16"}, "precision: 'fp32' in the store, 'bf16' asked for"),
        ({"shard_rows": 5}, "shard_rows: 10000 in the store, 5 asked for"),
        ({"dtype": "float16"}, "dtype: 'float32' in the store, 'float16' asked for"),
        ({"exif": "keep"}, "decoding: 'exact-upright' in the store, 'exact-keep' asked for"),
    ],
)
def test_a_store_of_something_else_is_refused(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path, change: dict[str, object], field: str
) -> None:
    folder, out = image_folder(2), tmp_path / "s"
    options: dict[str, object] = {"weights": encoder_folder, "workers": 0, "precision": "fp32"}
    extract(folder, out, **options)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=field):
        extract(folder, out, **(options | change))  # type: ignore[arg-type]


def test_other_weights_and_other_images_are_refused(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    folder, out = image_folder(2), tmp_path / "s"
    extract(folder, out, weights=encoder_folder, workers=0)
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    encoder.vit.cls_token.data += 1
    with pytest.raises(StoreError, match="weights_sha256"):
        extract(folder, out, model=encoder, workers=0)
    picture(9).save(folder / "more.jpg")
    with pytest.raises(StoreError, match=r"row 1 of shard 0: .*'more.jpg' in the source\. --only-missing adds"):
        extract(folder, out, weights=encoder_folder, workers=0)
    (folder / "more.jpg").unlink()
    picture(9).save(folder / "000.jpg", quality=30)
    with pytest.raises(StoreError, match=r"row 0 of shard 0: '000.jpg' has another size"):
        extract(folder, out, weights=encoder_folder, workers=0)
    with pytest.raises(StoreError, match="exists and is no store"):
        extract(folder, folder, weights=encoder_folder, workers=0)


def test_moved_pictures_are_found_again(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    folder, out = image_folder(6), tmp_path / "s"
    extract(folder, out, weights=encoder_folder, shard_rows=3, workers=0)
    (out / "part-00001.parquet").unlink()
    summary = extract(folder.rename(tmp_path / "moved"), out, weights=encoder_folder, shard_rows=3, workers=0)
    assert (summary.embedded, summary.refused) == (6, 0)


def test_random_encoders_are_not_mixed(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = image_folder(1)
    extract(folder, tmp_path / "s", model=micl_zoo.load(pretrained=False, device="cpu"), workers=0)
    with pytest.raises(StoreError, match="weights_sha256"):
        extract(folder, tmp_path / "s", model=micl_zoo.load(pretrained=False, device="cpu"), workers=0)


def test_stores_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"has no manifest\.json"):
        micl_zoo.open_store(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(StoreError, match="layout version 99, this micl-zoo reads 2: upgrade"):
        micl_zoo.open_store(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        micl_zoo.open_store(tmp_path)


def test_a_damaged_part_says_what_to_do(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    extract(image_folder(2), tmp_path / "s", weights=encoder_folder, workers=0)
    store = micl_zoo.open_store(tmp_path / "s")
    part = store.part_path(0)
    good = part.read_bytes()
    part.write_bytes(good[:100] + bytes(200) + good[300:])
    with pytest.raises(StoreError, match="delete it and run the same extract command again"):
        _ = list(store.batches())


def test_precisions(image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path) -> None:
    folder = image_folder(6)
    for precision in ("fp32", "bf16"):
        extract(folder, tmp_path / precision, weights=encoder_folder, precision=precision, workers=0)  # type: ignore[arg-type]
    exact, fast = (micl_zoo.open_store(tmp_path / name).embeddings for name in ("fp32", "bf16"))
    assert (exact * fast).sum(1).min() > 0.999
    assert not np.array_equal(exact, fast)
    assert resolve_precision("auto", torch.device("cpu")) in ("fp32", "bf16")
    with pytest.raises(UsageError, match=r"unknown precision 'int4'\. Valid: auto, fp32, bf16, fp16, int8"):
        resolve_precision("int4", torch.device("cpu"))  # type: ignore[arg-type]


def test_stopped_in_the_middle_of_a_shard_keeps_its_beginning(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    folder, options = image_folder(40), {"weights": encoder_folder, "workers": 0, "batch_size": 4}
    (folder / "007-bad.jpg").write_bytes(b"no")
    out, seen = tmp_path / "s", 0

    def decode_and_stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 18:
            signal.raise_signal(signal.SIGINT)
        return decode_pixels(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "decode_pixels", decode_and_stop)
        with pytest.raises(Interrupted, match="run the same command to go on") as stop:
            extract(folder, out, **options)  # type: ignore[arg-type]
    assert stop.value.exit_code == 130
    kept = micl_zoo.open_store(out).beginning(0)
    assert kept is not None
    assert 4 <= kept.images <= 20
    assert not micl_zoo.open_store(out).complete
    summary = extract(folder, out, **options)  # type: ignore[arg-type]
    assert summary.computed == 41 - kept.images
    extract(folder, tmp_path / "whole", **options)  # type: ignore[arg-type]
    assert files(out) == files(tmp_path / "whole")


def test_a_damaged_beginning_is_done_again(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    folder, out = image_folder(6), tmp_path / "s"
    extract(folder, out, weights=encoder_folder, workers=0)
    before, part = files(out), out / "part-00000.parquet"
    part.rename(out / ".beginning-00000.parquet")
    (out / ".beginning-00000.parquet").write_bytes(part_bytes := before["part-00000.parquet"][:-100])
    assert part_bytes
    assert extract(folder, out, weights=encoder_folder, workers=0).computed == 6
    assert files(out) == before


@pytest.mark.parametrize("options", [{"processes": 2, "devices": "cpu"}, {"batch_size": 1, "workers": 0}])
def test_the_parts_do_not_depend_on_who_made_them(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder = image_folder(30)
    (folder / "007-bad.jpg").write_bytes(b"no")
    shared: dict[str, Any] = {"weights": encoder_folder, "shard_rows": 4, "precision": "fp32"}
    extract(folder, tmp_path / "one", workers=2, **shared)
    summary = extract(folder, tmp_path / "other", **shared, **options)
    assert (summary.embedded, summary.refused, summary.failed) == (30, 1, {})
    assert files(tmp_path / "other") == files(tmp_path / "one")


def test_only_missing_adds_what_is_new(image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path) -> None:
    folder, out = image_folder(5), tmp_path / "s"
    extract(folder, out, weights=encoder_folder, workers=0, shard_rows=2, limit=3)
    before, rows = micl_zoo.open_store(out).ids, micl_zoo.open_store(out).embeddings
    assert micl_zoo.open_store(out).complete
    picture(50).save(folder / "000-first.jpg")
    (folder / "000.jpg").unlink()  # its row stays
    summary = extract(folder, out, weights=encoder_folder, workers=0, shard_rows=2, only_missing=True)
    store = micl_zoo.open_store(out)
    assert store.ids == [*before, *(n for n in sorted(ids_of(folder), key=in_order) if n not in before)]
    assert (summary.images, summary.computed, store.complete, store.manifest.shards) == (6, 3, True, 4)
    np.testing.assert_array_equal(store.embeddings[:3], rows)
    assert extract(folder, out, weights=encoder_folder, workers=0, shard_rows=2, only_missing=True).computed == 0


def ids_of(folder: Path) -> list[str]:
    return [entry.id for entry in micl_zoo.index_source(folder).entries()]


def in_order(name: str) -> tuple[bool, str]:
    return "/" in name, name


def test_overwrite_starts_anew_and_only_in_a_store(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    folder, out = image_folder(5), tmp_path / "s"
    extract(folder, out, weights=encoder_folder, workers=0, shard_rows=2)
    extract(folder, out, weights=encoder_folder, workers=0, shard_rows=4, pool="mean", overwrite=True)
    extract(folder, tmp_path / "new", weights=encoder_folder, workers=0, shard_rows=4, pool="mean")
    assert files(out) == files(tmp_path / "new")
    with pytest.raises(StoreError, match="exists and is no store"):
        extract(folder, folder, weights=encoder_folder, workers=0, overwrite=True)


def test_half_precision_rows(image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path) -> None:
    folder = image_folder(3)
    for dtype in ("float16", "float32"):
        extract(folder, tmp_path / dtype, weights=encoder_folder, workers=0, dtype=dtype)  # type: ignore[arg-type]
    half, whole = (micl_zoo.open_store(tmp_path / dtype) for dtype in ("float16", "float32"))
    np.testing.assert_array_equal(half.embeddings, whole.embeddings.astype(np.float16))
    assert half.to_arrow().schema.field("embedding").type == pa.list_(pa.float16(), 32)


def test_a_store_in_use_is_refused(image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path) -> None:
    folder = image_folder(1)
    with Folder(tmp_path / "s").lock(), pytest.raises(StoreError, match="another process is writing"):  # type: ignore[union-attr]
        extract(folder, tmp_path / "s", weights=encoder_folder, workers=0)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_store_in_use_is_refused_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fcntl = pytest.importorskip("fcntl")
    folder = Folder(tmp_path)
    folder.lock().close()  # leaves its file, which is nobody's lock

    def flock(file: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with folder.lock(), pytest.raises(StoreError, match=r"another process is writing .* delete '.*lock-owner.tmp'"):
        Folder(tmp_path).lock()
    with Folder(tmp_path).lock():
        pass
    monkeypatch.setattr(fcntl, "flock", lambda file, how: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        Folder(tmp_path).lock()


def test_a_store_that_is_being_written_can_be_read(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    folder, out, seen = image_folder(6), tmp_path / "s", []

    def look(number: int) -> None:
        store = micl_zoo.open_store(out)
        seen.append((len(store), store.complete, len(store.ids), store.embeddings.shape))

    with pytest.MonkeyPatch.context() as patch:
        write = Store.write_part
        patch.setattr(Store, "write_part", lambda self, number, rows: (look(number), write(self, number, rows))[0])
        extract(folder, out, weights=encoder_folder, workers=0, shard_rows=3)
    assert seen == [(0, False, 0, (0, 32)), (3, False, 3, (3, 32))]


def test_a_part_whose_numbers_were_changed_is_found(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    extract(image_folder(4), tmp_path / "s", weights=encoder_folder, workers=0, shard_rows=2)
    store = micl_zoo.open_store(tmp_path / "s")
    store.check_part(1)
    table = pq.read_table(store.part_path(1))
    pq.write_table(table.set_column(1, "embedding", table["embedding"].take([1, 0])), store.part_path(1))
    with pytest.raises(StoreError, match=r"part-00001\.parquet' is damaged \(its sha256 is"):
        store.check_part(1)
    store.check_part(0)


def test_an_error_in_the_middle_of_the_source_keeps_what_came_before(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, out = micl_zoo.index_source(image_folder(10)), tmp_path / "s"

    def pieces(_: object, **__: object) -> Iterator[ImageIndex]:
        yield index.slice(0, 4)
        yield index.slice(4, 2)
        raise SourceError("the tar is damaged")

    monkeypatch.setattr("micl_zoo.extraction.extract.list_source", pieces)
    with pytest.raises(SourceError, match="the tar is damaged"):
        extract("x", out, weights=encoder_folder, workers=0, shard_rows=2)
    assert len(micl_zoo.open_store(out)) == 6


@pytest.mark.parametrize("options", [{"workers": 0}, {"processes": 2, "devices": "cpu"}])
def test_the_first_images_are_embedded_while_the_others_are_listed(
    image_folder: Callable[..., Path],
    encoder_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    index, out, seen = micl_zoo.index_source(image_folder(6)), tmp_path / "s", []

    def pieces(_: object, **__: object) -> Iterator[ImageIndex]:
        yield index.slice(0, 4)
        deadline = time.monotonic() + 100
        while not (out / "part-00001.parquet").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.extend(path.name for path in sorted(out.glob("part-*")))
        yield index.slice(4, 2)

    monkeypatch.setattr("micl_zoo.extraction.extract.list_source", pieces)
    assert extract("x", out, weights=encoder_folder, shard_rows=2, **options).embedded == 6
    assert "part-00001.parquet" in seen
    assert "part-00002.parquet" not in seen


def test_short_of_memory_the_batch_is_halved(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sizes = image_folder(11), []
    extract(folder, tmp_path / "whole", weights=encoder_folder, workers=0, batch_size=8)
    embed = Encoder.embed_tensor

    def small(self: Encoder, pixels: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return embed(self, pixels, **options)

    monkeypatch.setattr(Encoder, "embed_tensor", small)
    extract(folder, tmp_path / "s", weights=encoder_folder, workers=0, batch_size=8)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]
    assert files(tmp_path / "s") == files(tmp_path / "whole")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Encoder, "embed_tensor", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):  # another error is not taken for it
        extract(folder, tmp_path / "t", weights=encoder_folder, workers=0, batch_size=1)


def test_not_even_one_image_fits(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(Encoder, "embed_tensor", none)
    with pytest.raises(MiclZooError, match="does not fit: not even one image at a time"):
        extract(image_folder(3), tmp_path / "s", weights=encoder_folder, workers=0)


def test_a_model_process_that_is_killed_is_replaced(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    folder, killed = image_folder(120), []
    options: dict[str, Any] = {"weights": encoder_folder, "shard_rows": 6, "precision": "fp32", "devices": "cpu"}

    def kill_one(self: Worker, said: Any) -> Iterator[Event]:
        for event in heard(self, said):
            if not killed and event.finished:
                assert isinstance(self, engines._Process)
                killed.append(self.child.process.pid)
                self.child.process.kill()
            yield event

    with pytest.MonkeyPatch.context() as patch:
        heard = Worker.heard
        patch.setattr(Worker, "heard", kill_one)
        summary = extract(folder, tmp_path / "s", processes=2, **options)
    assert killed
    assert (summary.embedded, summary.failed) == (120, {})
    extract(folder, tmp_path / "whole", workers=0, **options)
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_shards_that_fail_twice_are_reported_and_the_rest_goes_on() -> None:
    work = Work()
    assert (work.take(), work.over) == (None, False)
    for shard in (0, 1, 2):
        work.put(shard)
    work.end()
    work.receive()
    assert [work.take(), work.take(), work.take(), work.over] == [0, 1, 2, True]
    work.give_back([1, 2], "was killed")
    assert not work.over
    assert [work.take(), work.take()] == [1, 2]
    work.give_back([1, 2], "was killed again")
    assert work.failed == {1: "was killed again"}
    assert [work.take(), work.take(), work.over] == [2, None, True]


def test_listing_waits_when_it_is_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("micl_zoo.extraction.work.LISTED_AHEAD", 3)
    work, put = Work(), []

    def lists() -> None:
        for shard in range(10):
            work.put(shard)
            put.append(shard)
            if work.stopped:
                return

    thread = threading.Thread(target=lists)
    thread.start()
    assert [next(iter(work)), next(iter(work))] == [0, 1]
    time.sleep(0.2)
    assert put == [0, 1, 2, 3, 4]  # the two that were taken, and three
    work.close()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("how", ["shard", "end", "error", "stop", "message"])
def test_whatever_happens_wakes_the_one_that_waits(how: str) -> None:
    work = Work()
    act: dict[str, Callable[[], None]] = {
        "shard": lambda: work.put(5),
        "end": work.end,
        "error": lambda: work.end(SourceError("gone")),
        "stop": lambda: os.kill(os.getpid(), signal.SIGTERM),  # to the process, as from outside
        "message": lambda: work.tell("hello"),
    }
    timer = threading.Timer(0.2, act[how])
    with StopRequest(wake=work.stop):
        timer.start()
        said = work.hear(60)
    timer.join()
    assert (work.take() == 5) == (how == "shard")
    assert work.over == (how in ("end", "error"))
    assert isinstance(work.error, SourceError) == (how == "error")
    assert work.stopped == (how == "stop")
    assert said == ["hello"] * (how == "message")
    failing = Work()
    failing.end(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):  # a fault of ours is not kept for later
        failing.receive()


def test_a_model_process_that_cannot_work_says_why(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> Any:
        (encoder_folder / "model.safetensors").rename(tmp_path / "moved")  # after the first process has read it
        return store_create(*_)

    store_create = Store.create
    monkeypatch.setattr(Store, "create", lambda *args, **kwargs: gone(*args))
    with pytest.raises(MiclZooError, match=r"model\.safetensors"):
        extract(image_folder(4), tmp_path / "s", weights=encoder_folder, processes=2, devices="cpu")
    (tmp_path / "moved").rename(encoder_folder / "model.safetensors")


def test_devices_and_processes() -> None:
    assert Local.find("cpu", 3).devices == ["cpu", "cpu", "cpu"]
    assert str(Local.find("cpu,cpu", None)) == "2 processes on cpu"
    for devices, processes, text in (("all", None, "every GPU"), ("", None, "no device"), ("cpu,cpu", 1, "name fewer")):
        if devices != "all" or not torch.cuda.is_available():
            with pytest.raises(UsageError, match=text):
                Local.find(devices, processes)
    with pytest.raises(UsageError, match="save it, and give its folder by weights="):
        extract("x.jpg", "y", model=micl_zoo.load(pretrained=False, device="cpu"), processes=2)


@pytest.mark.parametrize(
    "options", [["--workers", "0"], pytest.param(["--processes", "2", "--devices", "cpu"], marks=pytest.mark.slow)]
)
def test_a_full_disk_is_said_in_a_line(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path, options: list[str]
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\n"
        "def hook(event, args):\n"
        "    if event == 'open' and '/s/.part-' in str(args[0]):\n"
        "        raise OSError(28, 'No space left on device', args[0])\n"
        "sys.addaudithook(hook)\n"
    )
    command = [sys.executable, "-m", "micl_zoo", "extract", str(image_folder(4)), "-o", str(tmp_path / "s")]
    command += ["--weights", str(encoder_folder), *options]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 1
    assert "Error: No space left on device: " in run.stderr
    assert "Traceback" not in run.stderr


def test_a_loaded_encoder_keeps_its_backend(
    monkeypatch: pytest.MonkeyPatch, image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    monkeypatch.setattr("micl_zoo.encoders.device.find_spec", lambda name: object())  # OpenVINO, it seems, is here
    made = extract(image_folder(1), tmp_path / "s", model=encoder, workers=0, precision="fp32")
    assert made.store.manifest.runtime == "torch"
    with pytest.raises(UsageError, match="backend must be one of auto, torch, openvino, onnx, it is 'tensorrt'"):
        extract("x.jpg", tmp_path / "t", backend="tensorrt")


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"limit": 0}, "limit is 0, and must be 1 to "),
        ({"dtype": "float64"}, "dtype must be one of float16, float32, it is 'float64'"),
        ({"engine": "spark"}, "engine must be one of local, ray, it is 'spark'"),
        ({"exif": "sideways"}, "exif must be one of upright, keep, it is 'sideways'"),
        ({"max_pixels": 0}, "max_pixels is 0, and must be 1 to "),
    ],
)
def test_options_that_mean_nothing(option: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        ExtractOptions(**option)
    with pytest.raises(UsageError, match=text):
        extract("x.jpg", "y", **option)


def test_the_command_of_a_store_makes_it_again(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"normalize": False, "fast_decode": True, "shard_rows": 2, "pool": "mean", "limit": 3}
    options = ExtractOptions(weights=encoder_folder, workers=0, **changes)
    store = extract(image_folder(4), tmp_path / "s", options, show=False).store
    words = shlex.split(store.manifest.command)
    assert words[:3] == ["micl-zoo", "extract", str(tmp_path / "images")]
    assert {"--no-normalize", "--fast-decode"} < set(words)
    assert words[words.index("--shard-rows") + 1] == "2"
    subprocess.run([sys.executable, "-m", "micl_zoo", *words[1:], "-o", tmp_path / "again", "--quiet"], check=True)
    assert files(tmp_path / "again") == files(tmp_path / "s")


def test_options_and_changes_to_them(image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path) -> None:
    options = ExtractOptions(weights=encoder_folder, workers=0, pool="mean")
    assert extract(image_folder(1), tmp_path / "s", options, limit=1).store.manifest.pool == "mean"
    with pytest.raises(UsageError, match=r"unknown option 'batchsize'\. Did you mean batch_size"):
        extract("x.jpg", "y", batchsize=3)


def test_what_runs_where_is_said(image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    options: dict[str, Any] = {"weights": encoder_folder, "devices": "cpu", "backend": "torch", "say": said.append}
    extract(image_folder(2), tmp_path / "s", workers=1, precision="fp16", **options)
    assert said[0] == "vit_ti16.tin200 on cpu: torch in fp16, batches of 16, 1 process decoding"
    assert "several times slower" in said[1]


def test_what_could_not_be_listed_has_its_line_is_counted_and_told(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    tars, out = tmp_path / "tars", tmp_path / "out"
    tars.mkdir()
    for name, data in (("a.tar", 10), ("b.tar", 2)):
        with tarfile.open(tars / name, "w") as archive:
            archive.add(image_folder(data, name), arcname=".")
    whole = (tars / "a.tar").read_bytes()
    (tars / "a.tar").write_bytes(whole[: len(whole) // 2])
    (tars / "notes.txt").write_text("x")
    words = ["extract", str(tars), "-o", str(out), "--weights", str(encoder_folder), "--workers", "0"]
    for strict, code in ((), 0), (("--strict",), 3):  # listed again, and found again, by every run
        done = CliRunner().invoke(main, [*words, *strict])
        assert done.exit_code == code, done.output
        assert "1 could not be listed; left out: 1 other files (.txt 1)" in done.output
        (line,) = ledger(out)
        assert (line["id"], line["uri"], line["reason"]) == ("a.tar", str(tars / "a.tar"), "listing")
        assert "unexpected end of data" in line["detail"]
    assert micl_zoo.verify(out, sample=0).problems == []
    told = json.loads(CliRunner().invoke(main, [*words, "--json", "--quiet"]).stdout.splitlines()[-1])
    assert told["notes"] == {"unlisted": 1, "others": {".txt": 1}, "skipped": {}, "renamed": {}}
    (tars / "a.tar").write_bytes(whole)
    done = CliRunner().invoke(main, [*words, "--only-missing", "--strict"])
    assert (done.exit_code, ledger(out)) == (0, [])
    assert len(micl_zoo.open_store(out)) == 12


def test_the_column_is_part_of_the_index(encoder_folder: Path, tmp_path: Path) -> None:
    cells = [[encoded(picture(seed + n), "PNG") for n in range(3)] for seed in (0, 10)]
    pq.write_table(pa.table({"left": cells[0], "right": cells[1]}), tmp_path / "a.parquet")
    options: dict[str, Any] = {"weights": encoder_folder, "workers": 0, "precision": "fp32"}
    rows = {}
    for name in ("left", "right"):
        summary = extract(tmp_path / "a.parquet", tmp_path / name, column=name, **options)
        rows[name] = summary.store.embeddings
        assert f"--column {name}" in summary.store.manifest.command
    assert not np.allclose(rows["left"], rows["right"])
    with pytest.raises(StoreError, match="has another size or column"):
        extract(tmp_path / "a.parquet", tmp_path / "left", column="right", **options)


def test_training_and_evaluation_hear_of_what_was_not_listed(
    image_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    folder = image_folder(2)
    (tmp_path / "list.txt").write_text("images/000.jpg\na\0b\n")
    assert len(micl_zoo.index_source([folder, tmp_path / "list.txt"])) == 3
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "1 could not be listed" in record.getMessage()
