"""Extraction: every image has a row or a ledger line, whatever happens to the process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import picture
from PIL import Image

import micl_zoo
from micl_zoo.errors import MiclZooError, StoreError, UsageError
from micl_zoo.extract import extract, resolve_precision


def files(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


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
    options = ["--weights", str(encoder_folder), "--shard-rows", "6", "--batch-size", "4", "--workers", "1"]
    command = [sys.executable, "-m", "micl_zoo", "extract", str(folder), *options]
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
        subprocess.run([*command, "-o", str(out)], check=True, stdout=subprocess.DEVNULL)
    assert files(killed) == files(whole)
    assert len(micl_zoo.open_store(killed)) == 240


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"pool": "mean"}, "pool: 'cls' in the store, 'mean' asked for"),
        ({"normalize": False}, "normalized: True in the store, False asked for"),
        ({"precision": "bf16"}, "precision: 'fp32' in the store, 'bf16' asked for"),
        ({"shard_rows": 5}, "shard_rows: 10000 in the store, 5 asked for"),
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
    encoder.weights_sha256 = "0" * 64
    with pytest.raises(StoreError, match="weights_sha256"):
        extract(folder, out, model=encoder, workers=0)
    picture(9).save(folder / "more.jpg")
    with pytest.raises(StoreError, match="index_sha256"):
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
    with pytest.raises(StoreError, match="layout version 99, this micl-zoo reads 1: upgrade"):
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
    assert resolve_precision("auto", torch.device("cpu"))[1] in ("fp32", "bf16")
    with pytest.raises(UsageError, match=r"unknown precision 'int8'\. Valid: auto, fp32, bf16, fp16"):
        resolve_precision("int8", torch.device("cpu"))  # type: ignore[arg-type]
