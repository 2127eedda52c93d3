"""Refused images are tried again where their cause may be gone, and a store grows where more was asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import picture
from test_extract import files, ledger

import micl_zoo
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.errors import Refused, StoreError, UsageError
from micl_zoo.extraction import decoders, indexing, retry
from micl_zoo.extraction.extract import Summary, extract
from micl_zoo.extraction.options import ExtractOptions
from micl_zoo.images.decode import decode_pixels
from micl_zoo.stores.parts import Made, RefusedRow
from micl_zoo.stores.verify import verify

Run = Callable[..., Summary]


@pytest.fixture
def run(encoder_folder: Path, tmp_path: Path) -> Run:
    """Extracts tmp_path/images into tmp_path/s, four images per shard."""
    options: dict[str, Any] = {"weights": encoder_folder, "devices": "cpu", "precision": "fp32", "backend": "torch"}
    options |= {"shard_rows": 4, "workers": 0, "batch_size": 2}

    def go(out: str = "s", *, source: str = "images", **changes: Any) -> Summary:
        return extract(tmp_path / source, tmp_path / out, **(options | changes))

    return go


def refusing(reasons: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have images refused by their names."""
    read = decoders.Reader.read

    def refuse(self: Any, entry: Any) -> bytes:
        if entry.id in reasons:
            raise Refused(reasons[entry.id], "for a test")  # type: ignore[arg-type]
        return read(self, entry)

    monkeypatch.setattr(decoders.Reader, "read", refuse)


@pytest.mark.parametrize(
    "changes", [{}, {"only_missing": True}, pytest.param({"processes": 2}, marks=pytest.mark.slow)]
)
def test_what_may_pass_is_tried_again_and_gives_the_store_of_one_run(
    image_folder: Callable[..., Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any
) -> None:
    folder = image_folder(10)
    (folder / "004.jpg").rename(folder / "zz.jpg")  # last of its shard, and the first of another
    (folder / "bad.jpg").write_bytes(b"")
    with monkeypatch.context() as patch:
        refusing({"000.jpg": "unreadable", "zz.jpg": "timeout", "below/001.jpg": "crashed", "002.jpg": "memory"}, patch)
        assert run().refused == 5
    untouched = (tmp_path / "s" / "part-00002.parquet").stat().st_mtime_ns
    again = run(**changes)
    assert (again.tried_again, again.recovered, again.refused, again.computed) == (4, 4, 1, 4)
    assert "4 tried again and 4 of them embedded" in again.text()
    run("whole")
    assert files(tmp_path / "s") == files(tmp_path / "whole")
    assert (tmp_path / "s" / "part-00002.parquet").stat().st_mtime_ns == untouched
    third = run(**changes)
    assert (third.tried_again, third.computed, third.shards_before) == (0, 0, 3)


def test_what_is_refused_again_changes_nothing(
    image_folder: Callable[..., Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_folder(6)
    refusing({"000.jpg": "unreadable", "002.jpg": "damaged", "below/001.jpg": "unreadable"}, monkeypatch)
    run()
    times = [part.stat().st_mtime_ns for part in sorted((tmp_path / "s").glob("part-*"))]
    again = run()
    assert (again.tried_again, again.recovered, again.refused) == (2, 0, 3)
    assert [part.stat().st_mtime_ns for part in sorted((tmp_path / "s").glob("part-*"))] == times
    assert run(retry="none").tried_again == 0
    assert run(retry="all").tried_again == 3
    assert run(retry="damaged, timeout").tried_again == 1
    assert run(retry=["damaged", "unreadable"]).tried_again == 3
    with pytest.raises(UsageError, match=r"unknown reason to retry 'tiemout'\. Did you mean timeout"):
        run(retry="tiemout")


def test_limits_and_formats_decide() -> None:
    rows = [RefusedRow(reason, "", reason, "") for reason in ("too_large", "unsupported", "empty", "unreadable")]
    now = Made(("torch",), 1000, tuple(retry.readable()))

    def chosen(before: Made, **options: Any) -> set[str]:
        return retry.tried_again(rows, before, ExtractOptions(max_pixels=1000, **options))

    assert chosen(now) == {"unreadable"}
    assert chosen(Made(("torch",), 999, now.formats)) == {"unreadable", "too_large"}
    assert chosen(Made(("torch",), 2000, now.formats[1:])) == {"unreadable", "unsupported"}
    assert chosen(Made(("torch",), 1000, ())) == {"unreadable", "unsupported"}  # an earlier version did not say
    assert chosen(now, retry="all") == {"too_large", "unsupported", "empty", "unreadable"}
    assert chosen(Made(("torch",), 1, ()), retry="none") == set()


def test_what_was_not_tried_keeps_its_limit() -> None:
    first, later = Made(("torch",), 100, ("JPEG",)), Made(("openvino",), 900, ("HEIF", "JPEG"))
    assert first.then(later, {"empty"}) == Made(("torch", "openvino"), 900, ("HEIF", "JPEG"))
    assert first.then(later, {"too_large"}) == Made(("torch", "openvino"), 100, ("HEIF", "JPEG"))
    assert first.then(later, {"unsupported"}) == Made(("torch", "openvino"), 900, ("JPEG",))


def test_a_larger_limit_takes_in_what_was_too_large(
    image_folder: Callable[..., Path], run: Run, encoder_folder: Path, tmp_path: Path
) -> None:
    folder = image_folder(5)
    picture(9, 200, 100).save(folder / "large.png")
    assert [row["reason"] for row in (run(max_pixels=10_000), ledger(tmp_path / "s"))[1]] == ["too_large"]
    assert run(max_pixels=15_000).tried_again == 1  # and too large again: noted
    assert run(max_pixels=15_000).tried_again == 0
    assert run(max_pixels=20_000).recovered == 1
    store = run().store
    assert len(store) == 6
    found = verify(store, sample=10, weights=encoder_folder, device="cpu")
    assert (found.problems, found.gone) == ([], [])


def test_a_store_of_an_earlier_version_with_a_limit_in_its_name(
    image_folder: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    image_folder(3)
    run()
    file = tmp_path / "s" / "manifest.json"
    fields = json.loads(file.read_text())
    for decoding in ("exact-upright-max89478485", "exact-upright-max7", "exact-upright"):
        fields |= {"decoding": decoding, "runtime": "openvino"}
        fields.pop("sha256", None)
        file.write_text(json.dumps(fields))
        assert run(max_pixels=50_000_000).shards_before == 1
    with pytest.raises(StoreError, match="decoding: 'exact-upright' in the store, 'exact-keep' asked for"):
        run(exif="keep")


def test_a_retry_that_is_stopped_keeps_what_it_has(
    image_folder: Callable[..., Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_folder(8)
    names = [entry.id for entry in micl_zoo.index_source(tmp_path / "images").entries()]
    with monkeypatch.context() as patch:
        refusing(dict.fromkeys(names[:7], "unreadable"), patch)
        run(shard_rows=8)
    seen = 0

    def fail(*args: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 5:
            raise ZeroDivisionError
        return decode_pixels(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(decoders, "decode_pixels", fail)
        with pytest.raises(ZeroDivisionError):
            run(shard_rows=8)
    store = micl_zoo.open_store(tmp_path / "s")
    assert store.complete
    assert store.ids == [*names[:4], *names[7:]]
    assert "line 1 of errors.jsonl is not what the part says" in str(verify(store, sample=0).problems)
    run(shard_rows=8)
    run("whole", shard_rows=8)
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_a_link_whose_mount_is_back_and_a_file_that_is_whole_now(
    image_folder: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    folder = image_folder(4)
    (folder / "away.jpg").symlink_to(tmp_path / "mount.jpg")
    picture(8).save(tmp_path / "mount.jpg", quality=90)
    data = (tmp_path / "mount.jpg").read_bytes()
    (folder / "part.jpg").write_bytes(data[:300])
    (tmp_path / "mount.jpg").unlink()
    assert run().refused == 2
    (tmp_path / "mount.jpg").write_bytes(data)
    (folder / "part.jpg").write_bytes(data)
    assert run().recovered == 2
    run("whole")
    assert files(tmp_path / "s") == files(tmp_path / "whole")
    (folder / "part.jpg").write_bytes(data[:-4])  # one that has a row is another image
    with pytest.raises(StoreError, match=r"'part\.jpg' has another size"):
        run()


@pytest.mark.parametrize(
    ("limit", "options"), [(2, {}), (4, {}), (6, {}), pytest.param(2, {"processes": 2}, marks=pytest.mark.slow)]
)
def test_a_limit_and_then_all(
    image_folder: Callable[..., Path], run: Run, tmp_path: Path, limit: int, options: Any
) -> None:
    folder = image_folder(11)
    (folder / "000-bad.jpg").write_bytes(b"")
    assert run(limit=limit).images == limit
    rest = run(**options)
    assert (rest.images, rest.computed) == (12, 12 - limit)
    run("whole")
    assert files(tmp_path / "s") == files(tmp_path / "whole")
    assert "--limit" not in rest.store.manifest.command
    with pytest.raises(StoreError, match=r"has more than the first 6 images of the source: leave --limit out"):
        run(limit=6)
    assert run(limit=99).computed == 0


def test_a_kill_while_a_shard_is_made_longer_loses_nothing(
    image_folder: Callable[..., Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_folder(11)
    run("whole")
    for step in ("reopen", "write_beginning", "write_index"):
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        run(limit=6)
        with monkeypatch.context() as patch:

            def die(*_: Any, **__: Any) -> None:
                raise KeyError("killed")

            patch.setattr(micl_zoo.Store, step, die)
            with pytest.raises(KeyError, match="killed"):
                run()
        assert run().computed <= 7
        assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_only_missing_and_then_the_plain_command(image_folder: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    folder = image_folder(6)
    run()
    picture(20).save(folder / "000-new.jpg")
    picture(21).save(folder / "below" / "000-new.jpg")
    assert run(only_missing=True).computed == 2
    before = files(tmp_path / "s")
    (tmp_path / "s" / "part-00000.parquet").unlink()
    assert run().computed == 4
    assert files(tmp_path / "s") == before
    picture(22).save(folder / "000-newer.jpg")
    with pytest.raises(StoreError, match=r"'000-newer\.jpg' is in the source and not in the store"):
        run()
    (folder / "000-newer.jpg").unlink()
    (folder / "002.jpg").unlink()
    with pytest.raises(StoreError, match=r"'002\.jpg' is in the store and not in the source"):
        run()


def test_only_missing_counts_other_images_of_equal_names(
    image_folder: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    folder = image_folder(5)
    run()
    for name in ("000.jpg", "002.jpg"):
        picture(60, 50).save(folder / name)
    picture(61).save(folder / "new.jpg")
    summary = run(only_missing=True)
    assert (summary.computed, summary.embedded, summary.notes.skipped) == (1, 6, {indexing.CHANGED: 2})
    assert "left out: 2 images whose names the store has for others, of another size" in summary.text()
    shutil.copytree(folder, tmp_path / "copy")
    elsewhere = run(source="copy", only_missing=True).notes.skipped
    assert elsewhere == {indexing.CHANGED: 2, indexing.ELSEWHERE: 4}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_repaired_image_is_tried_again_behind_what_only_missing_added(
    image_folder: Callable[..., Path], run: Run, tmp_path: Path, processes: int
) -> None:
    folder = image_folder(6)
    data = (folder / "002.jpg").read_bytes()
    (folder / "002.jpg").write_bytes(data[:400])
    assert run().refused == 1
    (folder / "002.jpg").write_bytes(data)
    picture(20).save(folder / "001-new.jpg")
    added = run(only_missing=True)
    assert (added.computed, added.refused, added.notes.skipped) == (1, 1, {indexing.CHANGED: 1})
    summary = run(processes=processes)
    assert (summary.tried_again, summary.recovered, summary.refused, summary.embedded) == (1, 1, 0, 7)
    assert verify(summary.store, sample=0).problems == []
    assert run().computed == 0
    (folder / "000.jpg").write_bytes(data)  # one that has a row is another image
    with pytest.raises(StoreError, match=r"'000\.jpg' has another size"):
        run()


def test_a_lost_or_damaged_file_of_the_index_is_written_anew(
    image_folder: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    folder = image_folder(11)
    run()
    before = files(tmp_path / "s")
    (tmp_path / "s" / "index" / "part-00000.parquet").unlink()
    (tmp_path / "s" / "index" / "part-00001.parquet").write_bytes(b"PAR1")
    assert run().computed == 0
    assert files(tmp_path / "s") == before
    (tmp_path / "s" / "index" / "part-00000.parquet").unlink()
    picture(9).save(folder / "000-other.jpg")
    with pytest.raises(StoreError, match=r"part-00000\.parquet' has other images than its shard of the index"):
        run()


def test_a_part_says_by_what_it_was_made(image_folder: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    image_folder(1)
    store = run(max_pixels=5000).store
    assert store.made(0) == Made(("torch",), 5000, tuple(sorted(retry.readable())))
    assert b"micl_zoo.made" in pq.read_metadata(store.part_path(0)).metadata


@pytest.mark.parametrize(("dtype", "value", "way"), [("float32", np.nan, "fp32"), ("float16", 1e6, "dtype float32")])
def test_rows_that_are_no_numbers_are_ledger_lines(
    image_folder: Callable[..., Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str,
    value: float, way: str,
) -> None:  # fmt: skip
    folder, embed, seen = image_folder(5), Encoder.embed_tensor, []
    (folder / "000-bad.jpg").write_bytes(b"")

    def spoil(self: Encoder, pixels: Any, **options: Any) -> Any:
        rows = embed(self, pixels, **options).clone()
        seen.append(len(rows))
        if len(seen) == 2:  # 002.jpg and 004.jpg, or what comes there
            rows[0, 3] = value
        return rows

    monkeypatch.setattr(Encoder, "embed_tensor", spoil)
    summary = run(dtype=dtype, shard_rows=10)
    names = [entry.id for entry in micl_zoo.index_source(folder).entries()]
    lines = ledger(tmp_path / "s")
    assert [line["reason"] for line in lines] == ["empty", "not_finite"]
    assert way in lines[1]["detail"]
    assert summary.store.ids == [name for name in names if name not in {line["id"] for line in lines}]
    assert np.isfinite(summary.store.embeddings).all()
    assert verify(summary.store, sample=0).problems == []


def test_the_option_of_the_command_line(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from micl_zoo.cli import main

    folder = image_folder(3)
    (folder / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    words = ["extract", str(folder), "-o", str(tmp_path / "s"), "--weights", str(encoder_folder), "--workers", "0"]
    assert CliRunner().invoke(main, words).exit_code == 0
    shutil.copy(folder / "000.jpg", tmp_path / "gone.jpg")
    result = CliRunner().invoke(main, [*words, "--retry", "none"])
    assert "tried again" not in result.output
    result = CliRunner().invoke(main, [*words, "--retry", "timeout", "--retry", "unreadable"])
    assert "1 tried again and 1 of them embedded" in result.output, result.output
    assert "Valid: " in CliRunner().invoke(main, [*words, "--retry", "never"]).output


def test_a_folder_that_is_no_store_is_left_as_it_was(image_folder: Callable[..., Path], run: Run) -> None:
    folder = image_folder(2)
    before = sorted(folder.rglob("*"))
    for options in ({}, {"overwrite": True}):
        with pytest.raises(StoreError, match="exists and is no store of embeddings"):
            run("images", **options)
        assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("junk", ["index/part-00009.parquet", "part-00009.parquet", "index/part-00001.parquet"])
def test_a_stray_file_of_a_whole_store_is_named(image_folder: Callable[..., Path], run: Run, junk: str) -> None:
    image_folder(3)
    store = run().store
    (store.path / junk).write_bytes(b"x")
    for options in ({}, {"only_missing": True}):
        with pytest.raises(StoreError, match=rf"{junk}' is (no part of this store|damaged).* delete it"):
            run(**options)
    (store.path / junk).unlink()
    assert run().computed == 0


def test_a_part_in_the_place_of_another_is_named(image_folder: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    image_folder(8)
    whole, few = run().store.path, run("few", limit=2).store.path
    part = (whole / "part-00001.parquet").read_bytes()
    shutil.copy(whole / "part-00000.parquet", whole / "part-00001.parquet")
    with pytest.raises(StoreError, match=r"part-00001\.parquet.*it is part 0 of this store, under the name of another"):
        _ = micl_zoo.open_store(whole).embeddings
    (whole / "part-00001.parquet").write_bytes(part)
    shutil.copy(few / "part-00000.parquet", whole / "part-00000.parquet")
    with pytest.raises(StoreError, match=r"part-00000\.parquet' has other images than its shard of the index"):
        run()
