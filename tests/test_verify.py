"""Verification: no damage passes, all of it is named, and a sound store is called sound."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import picture
from stores import ODD_NAME, make_store, reopened, rewrite_part

import micl_zoo
from micl_zoo import Store
from micl_zoo.cli import main
from micl_zoo.encoders.zoo import DEFAULT, RECORDS
from micl_zoo.errors import UsageError, WeightsError
from micl_zoo.stores.convert import convert
from micl_zoo.stores.search import search
from micl_zoo.stores.verify import account, verify


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> Store:
    return make_store(tmp_path_factory.mktemp("sound"), encoder_folder)


@pytest.fixture
def store(sound: Store, tmp_path: Path) -> Store:
    """A copy to damage; its pictures are those of the sound one."""
    return micl_zoo.open_store(shutil.copytree(sound.path, tmp_path / "store"))


def wrong(store: Store) -> str:
    return "\n".join(verify(reopened(store), sample=0).problems)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pool": "mean"},
        {"pool": "cls+mean", "dtype": "float16"},
        {"pool": "patches", "dtype": "float16"},
        {"normalize": False},
        {"precision": "bf16"},
        {"fast_decode": True, "exif": "keep"},
    ],
    ids=str,
)
def test_a_sound_store(tmp_path: Path, encoder_folder: Path, options: dict[str, object]) -> None:
    store = make_store(tmp_path, encoder_folder, **options)
    found = verify(store, sample=100, weights=encoder_folder, device="cpu")
    assert found.problems == []
    assert found.gone == []
    assert (found.parts, found.shards, found.rows, found.refused, found.sampled) == (3, 3, 10, 1, 10)
    assert found.worst_cosine is not None
    assert found.worst_cosine >= 0.9999


def test_the_sample_is_seeded_and_as_large_as_asked(sound: Store, encoder_folder: Path) -> None:
    found = [verify(sound, sample=3, seed=seed, weights=encoder_folder, device="cpu") for seed in (1, 1, 2)]
    assert [one.sampled for one in found] == [3, 3, 3]
    assert found[0] == found[1]


def test_a_part_that_is_cut_short(store: Store) -> None:
    data = store.part_path(1).read_bytes()
    store.part_path(1).write_bytes(data[: len(data) // 2])
    assert "part 1: " in wrong(store)
    assert "part-00001.parquet" in wrong(store)


def test_a_number_that_was_changed(store: Store) -> None:
    rows = store.embeddings[:3].copy()
    rows[1] = -rows[1]  # finite and of unit length: only the hash tells
    rewrite_part(store, 0, rows=rows)
    assert "part 0: " in wrong(store)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda ids: ids[1:], "neither a row nor a ledger line"),
        (lambda ids: [*ids, ids[0]], "more than one row or ledger line"),
        (lambda ids: [*ids, "stranger.jpg"], "'stranger.jpg': not in this shard of the index"),
        (lambda ids: ids[::-1], "not in the order of the index"),
    ],
)
def test_ids_that_are_not_those_of_the_index(store: Store, change: Callable[[list[str]], list[str]], text: str) -> None:
    ids = next(store.batches())[0]
    rewrite_part(store, 0, ids=change(ids))
    assert text in wrong(store)


def test_account_for_every_image() -> None:
    assert account(["a", "b", "c"], ["a", "c"], ["b"]) == []
    assert account(["a", "b"], [], ["a", "b"]) == []
    assert account([*"abcdef"], ["b"], []) == ["'a', 'c', 'd' and 2 more of the index: neither a row nor a ledger line"]
    assert account(["a", "b"], ["a", "b"], ["b"]) == ["'b': more than one row or ledger line"]
    assert account(["a", "b"], [], ["b", "a"]) == ["the rows or ledger lines are not in the order of the index"]


def test_rows_that_are_not_numbers_or_not_of_unit_length(store: Store) -> None:
    ids, rows = next(store.batches())
    changed = rows.copy()
    changed[0], changed[1, 3] = changed[0] * 1.01, np.nan
    rewrite_part(store, 0, rows=changed)
    assert f"{ids[1]!r}: numbers that are not finite" in wrong(store)
    assert f"{ids[0]!r}: not of unit length" in wrong(store)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda lines: [], "fewer lines"),
        (lambda lines: lines * 2, "more lines"),
        (lambda lines: [lines[0].replace("empty", "damaged")], "line 1 of errors.jsonl is not what the part says"),
        (lambda lines: [lines[0][:-9]], "errors.jsonl is damaged"),
        (None, "errors.jsonl is missing"),
    ],
)
def test_a_ledger_that_is_not_the_parts(
    store: Store, change: Callable[[list[str]], list[str]] | None, text: str
) -> None:
    file = store.path / "errors.jsonl"
    if change is None:
        file.unlink()
    else:
        file.write_text("".join(change(file.read_text().splitlines(keepends=True))))
    assert text in wrong(store)


def test_rows_of_other_pictures(store: Store, encoder_folder: Path) -> None:
    ids, rows = next(store.batches())
    rewrite_part(store, 0, rows=rows[[1, 0, *range(2, len(rows))]])
    problems = verify(reopened(store), sample=100, weights=encoder_folder, device="cpu").problems
    changed = [text for text in problems if "cosine" in text]
    assert len(changed) == 2
    assert repr(ids[0]) in changed[0]
    assert repr(ids[1]) in changed[1]


def test_all_problems_are_listed(store: Store) -> None:
    (store.path / "errors.jsonl").unlink()
    store.part_path(1).write_bytes(b"PAR1")
    ids = next(store.batches())[0]
    rewrite_part(store, 0, ids=[*ids[1:], "stranger.jpg"])
    for expected in ("part 0: ", "neither a row", "'stranger.jpg'", "part 1: ", "errors.jsonl is missing"):
        assert expected in wrong(store)


def test_sources_that_are_gone_or_changed(tmp_path: Path, encoder_folder: Path) -> None:
    store = make_store(tmp_path, encoder_folder, bad=False)
    images = tmp_path / "images"
    (images / "below" / "001.jpg").unlink()
    (images / "002.jpg").write_bytes(b"no picture any more, but some text instead")
    picture(99, 42, 44).save(images / "004.jpg")
    found = verify(store, sample=100, weights=encoder_folder, device="cpu")
    assert found.sampled == 8
    assert len(found.gone) == 1
    assert "'below/001.jpg' has a row, but its source now is unreadable" in found.gone[0]
    assert len(found.problems) == 2
    assert "'002.jpg' has a row, but its source now is not_an_image" in "\n".join(found.problems)
    assert "'004.jpg': its row and its source embedded again have cosine" in "\n".join(found.problems)

    shutil.rmtree(images)
    found = verify(store, sample=4, weights=encoder_folder, device="cpu")
    assert (found.sampled, found.worst_cosine, len(found.gone)) == (0, None, 4)
    assert found.problems == ["no image of the sample could be embedded again, so no number was checked"]


def test_a_store_that_is_still_being_written(store: Store, encoder_folder: Path) -> None:
    store.part_path(2).unlink()
    (store.path / "errors.jsonl").unlink()  # is written last
    found = verify(store, weights=encoder_folder, device="cpu")
    assert found.problems == []
    assert (found.parts, found.shards, found.sampled) == (2, 3, found.rows)
    assert "2 of 3 parts" in found.summary()
    assert "not complete" in found.summary()


def test_a_snapshot_does_not_move(store: Store) -> None:
    part = store.part_path(1).read_bytes()
    store.part_path(1).unlink()
    now, first = store.snapshot(), store.snapshot([0])
    store.part_path(1).write_bytes(part)
    assert (store.done(), now.done(), first.done()) == ([0, 1, 2], [0, 2], [0])
    assert now.snapshot().done() == [0, 2]
    assert store.complete
    assert not now.complete
    assert len(now) == len(now.ids) == len(now.embeddings) == len(now.to_pandas()) == len(now.to_arrow()) < len(store)
    assert first.ids == store.ids[: len(first)]


def test_an_index_that_is_another(store: Store) -> None:
    (store.path / "index" / "part-00001.parquet").replace(store.path / "index" / "part-00000.parquet")
    shutil.copy(store.path / "index" / "part-00002.parquet", store.path / "index" / "part-00001.parquet")
    assert "the index is not the one that the manifest names" in wrong(store)
    assert "neither a row nor a ledger line" in wrong(store)
    (store.path / "index" / "part-00000.parquet").unlink()
    assert "the index: " in wrong(store)


def test_a_store_whose_images_are_still_being_listed(store: Store) -> None:
    file = store.path / "manifest.json"
    manifest = json.loads(file.read_text()) | {"rows": None, "shards": None, "index_sha256": None}
    del manifest["sha256"]
    file.write_text(json.dumps(manifest))
    found = verify(reopened(store), sample=0)
    assert found.problems == []
    assert "3 of an unknown number of parts" in found.summary()


def test_a_decoding_that_is_not_known(store: Store, encoder_folder: Path) -> None:
    file = store.path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"decoding": "sharp-upright-max9"}))
    with pytest.raises(UsageError, match="unknown decoding 'sharp-upright-max9': it was made by a newer version"):
        verify(reopened(store), weights=encoder_folder, device="cpu")


def test_a_part_of_no_shard(store: Store) -> None:
    shutil.copy(store.part_path(0), store.part_path(7))
    assert "part-00007.parquet is no part of this store" in wrong(store)


def test_a_store_on_an_object_store(sound: Store, tmp_path: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").put(str(sound.path), "/bucket/sound", recursive=True)
    store = micl_zoo.open_store("memory://bucket/sound")
    assert verify(store, sample=0) == verify(sound, sample=0)
    assert search(store, ids=[ODD_NAME]) == search(sound, ids=[ODD_NAME])
    convert(store, tmp_path / "remote.npy")
    convert(sound, tmp_path / "local.npy")
    assert (tmp_path / "remote.npy").read_bytes() == (tmp_path / "local.npy").read_bytes()


def test_weights_are_asked_for_and_checked(sound: Store, encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"weights of vit_ti16.tin200 that are not published .* --weights"):
        verify(sound)
    published = Path(micl_zoo.__file__).parent / "embedded" / "vit_ti16.tin200.safetensors"
    with pytest.raises(WeightsError, match=rf"but vit_ti16\.tin200 .* has {str(RECORDS[DEFAULT].sha256)[:10]}"):
        verify(sound, weights=published)
    with pytest.raises(UsageError, match="got -1"):
        verify(sound, sample=-1)
    assert verify(sound, sample=0).problems == []


def test_the_command(store: Store, encoder_folder: Path) -> None:
    words = ["verify", str(store.path), "--weights", str(encoder_folder), "--device", "cpu", "--sample", "5"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert result.output == (
        "3 of 3 parts, 10 rows, 1 refused images; 5 embedded again, worst cosine 1.000000. No problem found.\n"
    )
    rewrite_part(store, 0, ids=[ODD_NAME, "a", "b"])
    (store.path / "errors.jsonl").unlink()
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert result.output.count("Problem: ") >= 2
    result = CliRunner().invoke(main, [*words, "--json"])
    assert result.exit_code == 1
    assert len(json.loads(result.output)["problems"]) >= 2
