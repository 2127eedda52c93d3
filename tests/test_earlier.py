"""Stores and runs made by version 0.1 (commit cf90fb7) are opened, verified, searched and resumed.

They lie in earlier/: `finished`, a store of `photos(5)` and an empty file, made with the default encoder in fp32 with
4 rows per shard; `stopped`, the same stopped by SIGTERM after two images; `run`, a training on `photos(12)` with TINY
stopped by --max-steps 5, and in run-on.jsonl the lines that version 0.1 wrote when it resumed that run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from micl_zoo import Store, open_store
from micl_zoo.extraction.extract import Summary, extract
from micl_zoo.stores.search import search
from micl_zoo.stores.verify import verify
from micl_zoo.training.pretraining.pretrain import pretrain

EARLIER = Path(__file__).parent / "earlier"
TINY = (
    *("image_size=16", "crop_size=16", "source_size=16", "patch_size=8", "embed_dim=16", "depth=1", "num_heads=2"),
    *("views=2", "batch_size=4", "epochs=4", "warmup_epochs=1", "mask_ratio=0.5", "base_lr=0.02", "compile=false"),
    *("precision=fp32", "checkpoint_minutes=0"),
)


def photos(folder: Path, count: int) -> Path:
    """The pictures that everything in earlier/ was made of. A BMP has the same bytes from every version of Pillow."""
    folder.mkdir()
    for number in range(count):
        y, x, channel = np.ogrid[:40, :48, :3]
        pixels = (x * (number + 2) + y * (3 * number + 1) + channel * 50 * number) % 256
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.bmp")
    return folder


def again(name: str, folder: Path) -> Summary:
    """Run the extract command of a store in earlier/ again, on a copy of it."""
    source, out = photos(folder / "pictures", 5), folder / name
    (source / "bad.bmp").write_bytes(b"")
    shutil.copytree(EARLIER / name, out)
    return extract(source, out, devices="cpu", precision="fp32", shard_rows=4, workers=0, batch_size=1)


def parts(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("part-*")}


def check(store: Store) -> None:
    """The store is sound, embeds again to what it holds, and finds what it should."""
    found = verify(store, sample=5, device="cpu")
    assert found.problems == []
    assert (found.rows, found.refused, found.sampled) == (5, 1, 5)
    file = store.path.parent / "pictures" / "3.bmp"
    (by_file, by_id) = search(store, file, ids=["3.bmp"], device="cpu")
    assert by_file[0][2] == "3.bmp"
    assert [hit.id for hit in by_id] == [hit.id for hit in by_file[1:]]


def test_a_finished_store_is_read_where_its_pictures_are_gone() -> None:
    store = open_store(EARLIER / "finished")
    assert store.complete
    assert store.ids == [f"{number}.bmp" for number in range(5)]
    assert store.embeddings.shape == (5, 192)
    assert [row.id for row in store.refused()] == ["bad.bmp"]
    assert verify(store, sample=0).problems == []
    assert len(search(store, ids=["0.bmp"])[0]) == 4


def test_what_parts_say_of_their_store_stays_the_same_in_every_version() -> None:
    digest = open_store(EARLIER / "finished").manifest.digest
    assert digest == "a7222b89b793ddc3ea0aac31495dbffad32a33cef7ccd663e9745eb0c50ef1d1"


def test_a_finished_store_is_resumed(tmp_path: Path) -> None:
    summary = again("finished", tmp_path)
    assert summary.shards_before == 2
    assert parts(tmp_path / "finished") == parts(EARLIER / "finished")
    check(summary.store)


def test_a_stopped_store_is_resumed_and_its_rows_are_kept(tmp_path: Path) -> None:
    stopped, finished = open_store(EARLIER / "stopped"), open_store(EARLIER / "finished")
    begun = stopped.beginning(0)
    assert begun is not None
    assert begun.ids == ["0.bmp", "1.bmp"]
    assert not stopped.complete
    assert verify(stopped, sample=0).problems == []
    store = again("stopped", tmp_path).store
    assert store.beginning(0) is None
    np.testing.assert_array_equal(store.embeddings[:2], begun.embeddings)
    np.testing.assert_allclose(store.embeddings, finished.embeddings, atol=1e-5)  # torch and the processor may differ
    assert store.ids == finished.ids
    check(store)


def test_a_store_of_other_settings_is_still_refused(tmp_path: Path) -> None:
    shutil.copytree(EARLIER / "finished", tmp_path / "finished")
    with pytest.raises(ValueError, match="pool: 'cls' in the store, 'mean' asked for"):
        extract(photos(tmp_path / "pictures", 5), tmp_path / "finished", devices="cpu", precision="fp32", pool="mean")


def losses(file: Path, start: int) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if "loss" in line and line["step"] >= start]


def test_a_run_is_resumed_and_goes_the_same_way(tmp_path: Path) -> None:
    run = Path(shutil.copytree(EARLIER / "run", tmp_path / "run"))
    made = pretrain("vit_ti16.tin200", photos(tmp_path / "training", 12), run, overrides=TINY, device="cpu", workers=0)
    assert made == run / "encoder" / "model.safetensors"
    assert losses(run / "metrics.jsonl", 0)[:5] == losses(EARLIER / "run" / "metrics.jsonl", 0)
    told, now = losses(EARLIER / "run-on.jsonl", 5), losses(run / "metrics.jsonl", 5)
    assert [line["step"] for line in now] == list(range(5, 12))
    for before, after in zip(told, now, strict=True):
        assert after.keys() == before.keys()
        assert [after[key] for key in ("epoch", "accuracy")] == [before[key] for key in ("epoch", "accuracy")]
        assert after["lr"] == pytest.approx(before["lr"])
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-3)
