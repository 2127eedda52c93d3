"""Search: what plain loops find, in the order they find it, and a picture of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from stores import ODD_NAME, make_store, reopened, rewrite_part

import micl_zoo
from micl_zoo import Store
from micl_zoo.cli import main
from micl_zoo.errors import UsageError, WeightsError
from micl_zoo.sources.index import ImageIndex, table_of
from micl_zoo.stores.search import _nearest, search


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> Store:
    return make_store(tmp_path_factory.mktemp("made"), encoder_folder)


@pytest.fixture
def store(made: Store, tmp_path: Path) -> Store:
    """A copy to change; its pictures are those of the one it was made of."""
    return micl_zoo.open_store(shutil.copytree(made.path, tmp_path / "store"))


def fill(store: Store, rows: np.ndarray) -> list[str]:
    """Put (N, 32) rows into the three parts, N / 3 in each; returns their ids."""
    for shard, some in enumerate(np.split(rows, 3)):
        rewrite_part(store, shard, rows=some, seal=True)
    return reopened(store).ids


def plain(rows: np.ndarray, query: np.ndarray, k: int) -> list[int]:
    """The oracle: a loop in double precision; Python's sort keeps equal ones in their order."""
    cosines = [float(row @ query / np.sqrt(row @ row) / np.sqrt(query @ query)) for row in rows.astype(np.float64)]
    return sorted(range(len(rows)), key=lambda at: -round(cosines[at], 13))[:k]


def found(store: Store, queries: np.ndarray, k: int) -> list[list[str]]:
    hits = _nearest(reopened(store), queries.astype(np.float64), k)
    return [[hit.id for hit in line] for line in hits]


@pytest.mark.parametrize("k", [1, 7, 200, 2000])
def test_the_nearest_are_those_of_a_plain_loop(store: Store, k: int) -> None:
    random = np.random.default_rng(k)
    rows = random.standard_normal((600, 32)).astype(np.float32) * random.uniform(0.1, 9, (600, 1)).astype(np.float32)
    queries = random.standard_normal((3, 32))
    ids = fill(store, rows)
    assert found(store, queries, k) == [[ids[at] for at in plain(rows, query, k)] for query in queries]


def test_a_store_may_be_named_by_its_path(store: Store, tmp_path: Path) -> None:
    folder = str(store.path)
    assert micl_zoo.search(folder, ids=store.ids[:2], k=3) == search(store, ids=store.ids[:2], k=3)
    assert micl_zoo.convert(folder, tmp_path / "rows.npy").shape == store.embeddings.shape
    with pytest.raises(micl_zoo.StoreError, match="no store of embeddings"):
        micl_zoo.verify(tmp_path)


def test_equal_rows_come_in_index_order(store: Store) -> None:
    random = np.random.default_rng(0)
    kinds = random.standard_normal((5, 32)).astype(np.float32)
    which = random.integers(0, 5, 600)
    ids = fill(store, kinds[which])
    (line,) = found(store, kinds[2:3], 90)
    assert line == [ids[at] for at in np.flatnonzero(which == 2)[:90]]


def test_rows_too_alike_for_single_precision(store: Store) -> None:
    random = np.random.default_rng(0)
    # Their cosines differ by some 1e-8, and float32 has steps of 6e-8 there.
    rows = (random.standard_normal(32) + 1e-4 * random.standard_normal((600, 32))).astype(np.float32)
    ids = fill(store, rows)
    (line,) = found(store, rows[:1], 20)
    assert line == [ids[at] for at in plain(rows, rows[0].astype(np.float64), 20)]


def test_rows_that_have_no_direction_are_never_near(store: Store) -> None:
    rows = np.random.default_rng(0).standard_normal((9, 32)).astype(np.float32)
    rows[0], rows[1, 5] = 0, np.nan
    ids = fill(store, rows)
    (line,) = found(store, rows[4:5], 4)
    assert line[0] == ids[4]
    assert not {ids[0], ids[1]} & {name for name, at in zip(ids, rows @ rows[4], strict=True) if at > 0} & set(line)
    assert len(found(store, rows[4:5], 20)[0]) == 9


def test_an_image_finds_itself_and_a_row_its_neighbours(made: Store, encoder_folder: Path) -> None:
    file = made.path.parent / "images" / "below" / "003.jpg"
    by_file, by_bytes, by_id = search(
        made, [file, file.read_bytes()], 4, ids=["below/003.jpg"], weights=encoder_folder, device="cpu"
    )
    assert by_file == by_bytes
    assert (by_file[0].rank, by_file[0].id, by_file[0].uri) == (1, "below/003.jpg", str(file))
    assert by_file[0].cosine == pytest.approx(1, abs=1e-6)
    assert [hit.id for hit in by_id[:3]] == [hit.id for hit in by_file[1:]]
    assert [hit.rank for hit in by_id] == [1, 2, 3, 4]
    assert [hit.cosine for hit in by_file] == sorted((hit.cosine for hit in by_file), reverse=True)
    assert search(made, file, 4, weights=encoder_folder, device="cpu") == [by_file]
    assert search(made, ids=["below/003.jpg"]) == [search(made, ids=["below/003.jpg"], exact=True)[0]]
    assert len(search(made, ids=["below/003.jpg"], k=99)[0]) == 9


def test_all_rows_are_searched_for_by_reading_each_part_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    ids = fill(store, random.standard_normal((2400, 32)).astype(np.float32))  # more than one block of queries
    rows, read, reads = reopened(store).embeddings, Store.rows, []
    for shard in range(3):
        store.write_index(shard, ImageIndex(table_of([(name, "", "file", 0, 0) for name in ids[800 * shard :][:800]])))
    monkeypatch.setattr(Store, "rows", lambda self, number: (reads.append(number), read(self, number))[1])
    hits = search(reopened(store), ids=ids, k=3)
    assert sorted(reads) == [0, 0, 1, 1, 2, 2]
    for at in (0, 1, 1100, 2399):
        assert [hit.id for hit in hits[at]] == [ids[n] for n in plain(rows, rows[at].astype(np.float64), 4)[1:]]


def test_what_cannot_be_searched_for(made: Store, encoder_folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    for images, options, text in (
        ((), {}, "needs an image, a text or an id, got 0 to search for"),
        ((), {"ids": ["nowhere.jpg"]}, "has the id 'nowhere.jpg'; .*store.ids"),
        ((), {"ids": ["bad.jpg"]}, r"it could not be embedded: .* \[empty\]"),
        (bad, {}, r"image 0 \(bad.jpg\): .* \[not_an_image\]"),
        (tmp_path / "none.jpg", {}, "image 0 .* cannot be read: No such file"),
        (bad, {"picture": "x.txt"}, "a picture's name ends in .png, .jpg"),
        (bad, {"k": 0}, "search: k is 0, and must be at least 1"),
    ):
        with pytest.raises(UsageError, match=text):
            search(made, images, weights=encoder_folder, device="cpu", **options)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="--model"):
        search(made, bad)


def test_patch_tokens_are_refused(made: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "manifest", dataclasses.replace(made.manifest, shape=[2, 2, 8]))
    with pytest.raises(UsageError, match=r"holds all patch tokens of each image .* extract once more with --pool cls"):
        search(made, ids=["002.jpg"])


def test_a_store_that_is_still_being_written(store: Store) -> None:
    gone = set(reopened(store).ids)
    store.part_path(1).unlink()
    there = reopened(store).ids
    gone -= set(there)
    (hits,) = search(reopened(store), ids=[there[0]], k=99)
    assert {hit.id for hit in hits} == set(there[1:])
    result = CliRunner().invoke(main, ["search", str(store.path), "--id", there[0]])
    assert "is not complete: searching 2 of 3 parts" in result.output


def test_the_contact_sheet(tmp_path: Path, encoder_folder: Path) -> None:
    store = make_store(tmp_path, encoder_folder)
    (tmp_path / "images" / "004.jpg").unlink()
    query = tmp_path / "images" / "002.jpg"
    out = tmp_path / "sheet.png"
    hits = search(store, query, ids=[ODD_NAME], weights=encoder_folder, device="cpu", picture=out)
    with Image.open(out) as opened:
        sheet = opened.convert("RGB")
    assert sheet.width > 1000
    grey = (0xC9, 0xC9, 0xC5)
    counts = {color: count for count, color in sheet.getcolors(1 << 24) or []}
    assert sum(hit.id == "004.jpg" for line in hits for hit in line) == 2
    assert counts[grey] == pytest.approx(2 * 168 * 168, rel=0.05)  # two tiles less the words on them
    assert not list(tmp_path.glob(".*"))


def test_the_command(made: Store, encoder_folder: Path, tmp_path: Path) -> None:
    file = made.path.parent / "images" / "002.jpg"
    words = ["search", str(made.path), "-k", "2"]
    own = ["--weights", str(encoder_folder), "--device", "cpu"]
    result = CliRunner().invoke(main, [*words, str(file), "--id", ODD_NAME, "--picture", str(tmp_path / "x.jpg"), *own])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == str(file)
    assert lines[1] == "   1   1.0000  002.jpg"
    assert lines[3] == ODD_NAME.replace("\n", r"\x0a")
    assert len(lines) == 7
    with Image.open(tmp_path / "x.jpg") as sheet:
        assert sheet.format == "JPEG"
    result = CliRunner().invoke(main, [*words, "--id", ODD_NAME, "--json"])
    hits = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(hit["query"], hit["rank"]) for hit in hits] == [(ODD_NAME, 1), (ODD_NAME, 2)]
    assert set(hits[0]) == {"query", "rank", "cosine", "id", "uri", "kind", "offset", "length"}
    assert CliRunner().invoke(main, words).exit_code == 2
