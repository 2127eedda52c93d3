"""Verification: no damage passes, all of it is named, and a sound store is called sound."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import picture
from safetensors.torch import load_file, save_file
from stores import ODD_NAME, edit_manifest, make_store, reopened, rewrite_part

import micl_zoo
from micl_zoo import Store
from micl_zoo.cli import main
from micl_zoo.errors import StoreError, UsageError, WeightsError
from micl_zoo.extraction.extract import extract
from micl_zoo.stores import parts
from micl_zoo.stores.convert import convert
from micl_zoo.stores.parts import LEDGER_KEY, MADE_KEY, STORE_KEY
from micl_zoo.stores.search import search
from micl_zoo.stores.verify import account, verify
from micl_zoo.zoo.ours import DEFAULT, RECORDS


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


def test_a_decoding_that_is_not_known_is_a_problem_among_others(store: Store, encoder_folder: Path) -> None:
    edit_manifest(store, seal=True, decoding="sharp-upright-max9")
    (store.path / "errors.jsonl").unlink()
    problems = "\n".join(verify(store.path, weights=encoder_folder, device="cpu").problems)
    assert "'sharp-upright-max9', which this micl-zoo does not know: it is damaged, or a newer version" in problems
    assert "errors.jsonl is missing" in problems
    with pytest.raises(StoreError, match="does not know"):
        search(reopened(store), b"", weights=encoder_folder, device="cpu")


def test_a_shape_that_the_encoder_does_not_have(store: Store, encoder_folder: Path) -> None:
    edit_manifest(store, seal=True, pool="cls+mean")
    text = r"it says that rows are of shape \[32\], and with pool cls\+mean those of .* are of \[64\]"
    with pytest.raises(StoreError, match=text):
        search(reopened(store), b"", weights=encoder_folder, device="cpu")
    assert "with pool cls+mean" in "".join(verify(store.path, weights=encoder_folder, device="cpu").problems)


CHANGES = [{"shards": 0}, {"shards": 2}, {"shards": None}, {"rows": 3}, {"pool": "mean"}, {"normalized": False}]
CHANGES += [{"precision": "bf16"}, {"decoding": "fast-upright"}, {"command": "rm"}, {"versions": {}}, {"model": "x"}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_manifest_that_is_not_as_it_was_written(store: Store, tmp_path: Path, changes: dict[str, object]) -> None:
    edit_manifest(store, **changes)
    for act in (micl_zoo.open_store, search, lambda path: convert(path, tmp_path / "x.npy")):
        with pytest.raises(StoreError, match=r"manifest\.json' is damaged, it is not as it was written .its sha256"):
            act(store.path)
    assert not (tmp_path / "x.npy").exists()
    assert "manifest.json is not as it was written" in "".join(verify(store.path, sample=0).problems)
    result = CliRunner().invoke(main, ["verify", str(store.path), "--sample", "0"])
    assert (result.exit_code, "Traceback" in result.output) == (1, False)


def again(store: Store, images: Path, encoder_folder: Path, **options: object) -> None:
    given = {"weights": encoder_folder, "devices": "cpu", "precision": "fp32", "shard_rows": 4, "workers": 0, **options}
    extract(images, store.path, **given)  # type: ignore[arg-type]


def files(store: Store) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in store.path.rglob("*.parquet")}


@pytest.mark.parametrize("changes", [*CHANGES[:4], {"command": "rm"}, {"versions": {}}], ids=str)
@pytest.mark.parametrize("seal", [False, True])
def test_extract_mends_the_counts_of_a_manifest(
    sound: Store, store: Store, encoder_folder: Path, changes: dict[str, object], seal: bool
) -> None:
    before = files(store)
    edit_manifest(store, seal=seal, **changes)
    again(store, sound.path.parent / "images", encoder_folder)
    assert files(store) == before
    assert verify(store.path, sample=0).problems == []
    for name in ("rows", "shards", "index_sha256"):
        assert getattr(reopened(store).manifest, name) == getattr(sound.manifest, name)


def test_extract_says_that_a_manifest_may_be_damaged(sound: Store, store: Store, encoder_folder: Path) -> None:
    edit_manifest(store, pool="mean")
    with pytest.raises(StoreError, match=r"or its manifest is damaged, for its sha256 differs; pool: 'mean'"):
        again(store, sound.path.parent / "images", encoder_folder)


def test_files_beyond_the_shards_are_named(store: Store, tmp_path: Path) -> None:
    edit_manifest(store, seal=True, shards=1)
    names = [f"{below}part-0000{number}.parquet" for below in ("", "index/") for number in (1, 2)]
    assert reopened(store).strays() == names
    assert all(name in wrong(store) for name in names)
    with pytest.raises(StoreError, match=r"part-00001\.parquet' is no part of this store"):
        convert(store.path, tmp_path / "x.npy")


@pytest.fixture(scope="module")
def others(sound: Store, tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> dict[str, Store]:
    """Stores of the same images by other weights, and with other settings."""
    folder = tmp_path_factory.mktemp("others")
    (folder / "images").symlink_to(sound.path.parent / "images")
    tensors = load_file(encoder_folder / "model.safetensors")
    shutil.copytree(encoder_folder, folder / "encoder")
    save_file({name: one * 1.1 for name, one in tensors.items()}, folder / "encoder" / "model.safetensors")
    made = {"weights": {"weights": folder / "encoder"}, "exif": {"exif": "keep"}, "plain": {"normalize": False}}
    made |= {"mean": {"pool": "mean"}}
    settings = {"weights": encoder_folder, "devices": "cpu", "precision": "fp32", "shard_rows": 4, "workers": 0}
    return {
        name: extract(folder / "images", folder / name, **{**settings, **options}).store  # type: ignore[arg-type]
        for name, options in made.items()
    }


@pytest.mark.parametrize("name", ["weights", "exif", "plain", "mean"])
def test_a_part_of_another_encoder_or_other_settings(
    sound: Store, store: Store, others: dict[str, Store], encoder_folder: Path, tmp_path: Path, name: str
) -> None:
    shutil.copy(others[name].part_path(1), store.part_path(1))
    text = r"part-00001\.parquet' is damaged \(its rows were made by another encoder or with other settings"
    for check in (True, False):
        opened = micl_zoo.open_store(store.path, check=check)
        for act in (len, Store.to_arrow, lambda one: search(one, ids=[ODD_NAME]), lambda one: list(one.refused())):
            with pytest.raises(StoreError, match=text):
                act(opened)
        with pytest.raises(StoreError, match=text):
            convert(opened, tmp_path / "x.npy")
    assert "by another encoder" in wrong(store)
    with pytest.raises(StoreError, match=text):
        again(store, sound.path.parent / "images", encoder_folder)
    store.part_path(1).unlink()
    again(store, sound.path.parent / "images", encoder_folder)
    assert files(reopened(store)).keys() == files(store).keys()
    assert store.part_path(1).read_bytes() == sound.part_path(1).read_bytes()


def test_a_beginning_of_another_encoder_is_not_gone_on_with(
    sound: Store, store: Store, others: dict[str, Store], encoder_folder: Path
) -> None:
    store.part_path(1).unlink()
    shutil.copy(others["weights"].part_path(1), store.path / ".beginning-00001.parquet")
    again(store, sound.path.parent / "images", encoder_folder)
    assert store.part_path(1).read_bytes() == sound.part_path(1).read_bytes()


def test_a_part_of_an_earlier_version_says_not_of_which_store_it_is(store: Store) -> None:
    for file in store.path.glob("part-*.parquet"):
        table = pq.read_table(file)
        metadata = {key: value for key, value in table.schema.metadata.items() if key != STORE_KEY}
        file.write_bytes(parts._parquet(table.replace_schema_metadata(metadata)))
    assert STORE_KEY not in pq.read_metadata(store.part_path(0)).metadata
    assert wrong(store) == ""
    assert len(search(reopened(store), ids=[ODD_NAME])[0]) == 9


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
    with pytest.raises(WeightsError, match=r"weights of vit_ti16.tin200 that are not published .* --model"):
        verify(sound)
    published = Path(micl_zoo.__file__).parent / "embedded" / "vit_ti16.tin200.safetensors"
    with pytest.raises(WeightsError, match=rf"but vit_ti16\.tin200 .* has {str(RECORDS[DEFAULT].sha256)[:10]}"):
        verify(sound, weights=published)
    with pytest.raises(UsageError, match="verify: sample is -1, and must be at least 0"):
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


def test_flipped_bits_are_seen_and_change_no_row_in_silence(sound: Store, tmp_path: Path) -> None:
    ids, rows, entries = sound.ids, sound.embeddings, list(sound.shard(0).entries())
    random, missed = np.random.default_rng(0), 0
    for name in ("part-00000.parquet", "index/part-00000.parquet", "manifest.json") * 40:
        store = Path(shutil.copytree(sound.path, tmp_path / "store", dirs_exist_ok=True))
        data = bytearray((store / name).read_bytes())
        data[random.integers(len(data))] ^= 1 << random.integers(8)
        (store / name).write_bytes(data)
        with contextlib.suppress(StoreError):
            opened = micl_zoo.open_store(store)
            assert opened.ids == ids
            assert opened.to_arrow()["id"].to_pylist() == ids
            np.testing.assert_array_equal(opened.embeddings, rows)
        with contextlib.suppress(StoreError):
            assert list(micl_zoo.open_store(store).shard(0).entries()) == entries
        with contextlib.suppress(StoreError):
            found = verify(store, sample=0)
            missed += not found.problems and not found.unchecked
    assert missed == 0


@pytest.mark.parametrize("act", ["ids", "embeddings", "batches", "to_arrow", "to_pandas", "rows", "search", "convert"])
def test_a_changed_part_is_an_error_and_may_be_read_on_purpose(store: Store, tmp_path: Path, act: str) -> None:
    rewrite_part(store, 0, rows=-store.rows(0).embeddings)

    def read(opened: Store) -> object:
        if act == "search":
            return search(opened, ids=[store.ids[-1]])
        if act == "convert":
            return convert(opened, tmp_path / "rows.npy", overwrite=True)
        if act == "batches":
            return list(opened.batches())
        found = getattr(opened, act)
        return found(0) if act == "rows" else found() if callable(found) else found

    store = micl_zoo.open_store(store.path, check=False)
    read(store)
    with pytest.raises(StoreError, match=r"part-00000\.parquet' is damaged \(its sha256 differs.*run the same extract"):
        read(reopened(store))
    words = {"search": ["--id", store.ids[-1]], "convert": [str(tmp_path / "new.npy")]}
    if act in words:
        words = [act, str(store.path), *words[act]]
        assert "is damaged" in CliRunner().invoke(main, words).output
        assert CliRunner().invoke(main, [*words, "--no-check"]).exit_code == 0


@pytest.mark.parametrize(
    "name",
    [
        "part-1.parquet",
        "part-00001 (copy).parquet",
        "part-99999.parquet",
        "part-x",
        "index/part-9.parquet",
        "part-\u0661.parquet",
    ],
)
def test_files_that_look_like_parts(store: Store, tmp_path: Path, name: str) -> None:
    ids = store.ids
    shutil.copy(store.part_path(0), store.path / name)
    assert f"{name} is no part of this store" in wrong(store)
    assert reopened(store).ids == ids
    assert reopened(store).complete
    with pytest.raises(StoreError, match="is no part of this store"):
        convert(reopened(store), tmp_path / "rows.npy")
    with pytest.raises(StoreError, match="is no part of this store"):
        Store.create(store.folder, store.manifest)
    result = CliRunner().invoke(main, ["search", str(store.path), "--id", ids[0]])
    assert name in result.output


def test_a_part_that_is_gone_from_a_finished_store(store: Store) -> None:
    shutil.move(store.part_path(1), store.path / "part-99999.parquet")  # as many as before
    assert not reopened(store).complete
    assert "1 of 3 parts are missing from a store that was finished, the first is part-00001.parquet" in wrong(store)
    (store.path / "part-99999.parquet").unlink()
    assert CliRunner().invoke(main, ["verify", str(store.path), "--sample", "0"]).exit_code == 1


def test_a_store_without_checksums_says_what_cannot_be_checked(store: Store) -> None:
    manifest = json.loads((store.path / "manifest.json").read_text())
    del manifest["sha256"]
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    for file in (store.path / "index").iterdir():
        pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    found = verify(reopened(store), sample=0)
    assert found.problems == []
    assert found.unchecked == ["manifest.json", *(f"index/part-0000{n}.parquet" for n in range(3))]
    assert "an earlier version wrote 4 files without a checksum" in found.summary()


FIELDS = {
    "shape": ([], [0], [-1], [1 << 40], [32.5], "32", [1 << 20, 1 << 20], None, [[32]]),
    "dtype": ("float64", "", 4, None),
    "shard_rows": (0, -4, 10**30, 1.5, "4", True, float("nan")),
    "rows": (-1, "11", 1e300),
    "shards": (-1, [3], 10**20),
    "pool": ("max", None),
    "precision": ("fp4", 16),
    "runtime": ("tensorflow", {}),
    "normalized": ("yes", 1),
    "versions": ([], {"torch": 2}),
    "model": (3, None),
    "source": (
        "hf-hub:a/b",
        f"/etc/a@{'0' * 40}",
        f"hf-hub:../a@{'0' * 40}",
        f"a/b@{'0' * 40}",
        f"\\\\a\\b@{'0' * 40}",
        3,
    ),
    "format_version": (1, 3, "2", None, 2.0),
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in FIELDS.items() for value in values])
def test_a_manifest_made_by_hand(sound: Store, tmp_path: Path, field: str, value: object) -> None:
    fields = json.loads((sound.path / "manifest.json").read_text()) | {field: value}
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(StoreError, match=r"manifest\.json' (is damaged|has layout version)"):
        micl_zoo.open_store(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{", "[" * 100_000, "\ud800", "{}", '{"model": "x"}', "\0\0"])
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(StoreError, match=r"manifest\.json' is damaged"):
        micl_zoo.open_store(tmp_path)


ID, VECTOR = pa.array(["a"]), pa.FixedSizeListArray.from_arrays(pa.array(np.ones(32, np.float32)), 32)
TABLES = {
    "columns": pa.table({"id": ID}),
    "order": pa.table({"embedding": VECTOR, "id": ID}),
    "names": pa.table({"id": ID, "vector": VECTOR}),
    "numbers": pa.table({"id": ID, "embedding": VECTOR.cast(pa.list_(pa.float64(), 32))}),
    "width": pa.table({"id": ID, "embedding": pa.FixedSizeListArray.from_arrays(pa.array(np.ones(8, np.float32)), 8)}),
    "no list": pa.table({"id": ID, "embedding": pa.array([1.0])}),
    "ids": pa.table({"id": pa.array([7]), "embedding": VECTOR}),
    "null id": pa.table({"id": pa.array([None], pa.string()), "embedding": VECTOR}),
    "null row": pa.table({"id": ID, "embedding": pa.array([None], pa.list_(pa.float32(), 32))}),
    "null number": pa.table({"id": ID, "embedding": pa.array([[None] * 32], pa.list_(pa.float32(), 32))}),
    "rows": pa.table({"id": pa.array(["a"] * 5000), "embedding": VECTOR.take(pa.array([0] * 5000))}),
}


@pytest.mark.parametrize("name", TABLES)
def test_parts_made_by_hand(store: Store, name: str) -> None:
    pq.write_table(TABLES[name], store.part_path(0))
    for check in (True, False):
        opened = micl_zoo.open_store(store.path, check=check)
        with pytest.raises(StoreError, match=r"part-00000\.parquet' is damaged"):
            _ = (opened.ids, opened.embeddings, opened.rows(0))
    assert "part 0: " in wrong(store)
    for file in ((store.path / "index" / "part-00001.parquet"),):
        pq.write_table(TABLES[name], file)
        with pytest.raises(StoreError, match=r"index/part-00001\.parquet' is damaged"):
            reopened(store).shard(1)


@pytest.mark.parametrize(
    "ledger", [b"", b"{}", b"[1]", b'[{"id": 1}]', b"\xff", b"[" * 100_000, b'[{"id": "a"}]', b"null"]
)
@pytest.mark.parametrize("key", [LEDGER_KEY, MADE_KEY])
def test_the_metadata_of_a_part_made_by_hand(store: Store, ledger: bytes, key: bytes) -> None:
    table = pq.read_table(store.part_path(0))
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, key: ledger}), store.part_path(0))
    opened = micl_zoo.open_store(store.path, check=False)
    for read in (lambda: opened.rows(0), lambda: opened.made(0) if key == MADE_KEY else list(opened.refused())):
        with pytest.raises(StoreError, match=r"part-00000\.parquet' is damaged"):
            read()
    assert "part 0: " in wrong(store)


def test_what_cannot_be_read_is_not_called_damaged(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(number: int) -> Callable[..., None]:
        def fail(*_: object) -> None:
            raise OSError(number, "text")

        return fail

    for number, text in ((errno.EACCES, "Permission denied"), (errno.EMFILE, "Too many open files")):
        with monkeypatch.context() as patch:
            patch.setattr(type(store.folder), "read", fails(number))
            with pytest.raises(StoreError, match=rf"cannot read '.*part-00000\.parquet': {text}"):
                Store(store.folder, store.manifest).rows(0)
    store.part_path(0).unlink()
    with pytest.raises(StoreError, match=r"part-00000\.parquet' is missing: run the same extract command again"):
        reopened(store).rows(0)


def test_a_row_that_the_index_has_not(store: Store) -> None:
    rewrite_part(store, 0, ids=["x", "y", "z"], seal=True)
    with pytest.raises(StoreError, match=r"part-00000\.parquet' has a row '[xyz]' that the index has not"):
        search(reopened(store), ids=["x"], k=20)
