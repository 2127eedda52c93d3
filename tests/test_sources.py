"""Every source becomes the same kind of index."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture

from micl_zoo.decode import Refused, decode
from micl_zoo.errors import SourceError
from micl_zoo.extract import extract
from micl_zoo.sources import Entry, Reader, index_source


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


def parquet(path: Path, count: int, *, own_ids: bool = False, first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": jpeg(first + n), "path": f"{n}.jpg"} for n in range(count)]
    columns: dict[str, object] = {"image": images, "label": list(range(count))}
    if own_ids:
        columns["id"] = [f"own-{n}" for n in range(count)]
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def ids(source: object) -> list[str]:
    return [entry.id for entry in index_source(source).entries()]  # type: ignore[arg-type]


def test_a_folder_is_walked_in_order(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(4)
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.jpg").write_bytes(jpeg(0))
    (folder / "UPPER.PNG").write_bytes(jpeg(0))
    assert ids(folder) == ["000.jpg", "002.jpg", "UPPER.PNG", "below/001.jpg", "below/003.jpg"]
    entry = index_source(folder)[0]
    assert entry == Entry("000.jpg", str(folder / "000.jpg"), 0, (folder / "000.jpg").stat().st_size)


def test_a_loop_of_links_ends(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(2)
    (folder / "loop").symlink_to(folder)
    assert ids(folder) == ["000.jpg", "below/001.jpg"]


def test_a_glob_a_list_a_file_and_several(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = image_folder(4)
    assert ids(f"{folder}/**/00[13].jpg") == ["below/001.jpg", "below/003.jpg"]
    listing = tmp_path / "list.txt"
    listing.write_text("images/002.jpg\n\n  images/below/001.jpg  \n")
    assert ids(listing) == ["images/002.jpg", "images/below/001.jpg"]
    assert ids(folder / "000.jpg") == ["000.jpg"]
    assert ids([folder / "000.jpg", listing]) == ["000.jpg", "images/002.jpg", "images/below/001.jpg"]


def test_parquet_cells_are_read_by_row(tmp_path: Path) -> None:
    parquet(tmp_path / "data/a.parquet", 5)
    parquet(tmp_path / "data/b.parquet", 3, first=5)
    index = index_source(tmp_path / "data")
    assert [entry.id for entry in index.entries()][3:7] == [
        "a.parquet#3",
        "a.parquet#4",
        "b.parquet#0",
        "b.parquet#1",
    ]
    reader = Reader()
    for row in [0, 4, 7, 1, 5]:  # forward, backward, across files
        assert reader.read(index[row]) == jpeg(row)
    assert ids(parquet(tmp_path / "own.parquet", 2, own_ids=True)) == ["own-0", "own-1"]
    assert ids(f"{tmp_path}/data/*.parquet") == ids(tmp_path / "data")


def test_the_fingerprint_follows_the_images_not_the_place(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = image_folder(3)
    before = index_source(folder).fingerprint()
    moved = folder.rename(tmp_path / "moved")
    assert index_source(moved).fingerprint() == before
    (moved / "new.jpg").write_bytes(jpeg(9))
    assert index_source(moved).fingerprint() != before


def test_an_id_twice_is_an_error(image_folder: Callable[..., Path]) -> None:
    folder, other = image_folder(2), image_folder(2, "others")
    with pytest.raises(SourceError, match=r"the id '000\.jpg' occurs more than once"):
        index_source([folder, other])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are text")
def test_a_name_that_is_not_utf8_is_read_like_any_other(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(1)
    odd = folder / os.fsdecode(b"caf\xe9 %41.jpg")
    odd.write_bytes(jpeg(5))
    for source in (folder, f"{folder}/*.jpg"):
        entry = index_source(source)[1]
        assert entry.id == r"caf\xe9 %41.jpg"
        assert Reader().read(entry) == jpeg(5)
    assert index_source(odd)[0] == entry


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are text")
def test_lists_and_parquet_in_a_folder_that_is_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    table = parquet(tmp_path / "a.parquet", 3).rename(folder / "a.parquet")
    (folder / "b.jpg").write_bytes(jpeg(7))
    (folder / "list.txt").write_text("b.jpg\n")
    listed = index_source(folder / "list.txt")
    assert listed[0].id == "b.jpg"
    assert Reader().read(listed[0]) == jpeg(7)
    for source, first in ((table, "a.parquet#0"), (f"{tmp_path}/*/*.parquet", r"caf\xe9/a.parquet#0")):
        index = index_source(source)
        assert index[0].id == first
        assert Reader().read(index[2]) == jpeg(2)


def test_a_store_inside_the_source_is_no_part_of_it(tmp_path: Path, encoder_folder: Path) -> None:
    parquet(tmp_path / "data/a.parquet", 3)
    for _ in range(2):
        extract(tmp_path / "data", tmp_path / "data/embeddings", weights=encoder_folder, workers=0)
    assert ids(tmp_path / "data") == ["a.parquet#0", "a.parquet#1", "a.parquet#2"]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: p / "missing", "no such source"),
        (lambda p: p / "*.jpg", "matches no file"),
        (lambda p: (p / "empty.txt").write_text("\n") and p / "empty.txt", "one path a line is expected"),
        (lambda p: (p / "bad.parquet").write_bytes(b"no") and p / "bad.parquet", "cannot read .* as parquet"),
        (lambda p: [], "no images given"),
    ],
)
def test_nothing_found_says_what_was_looked_for(tmp_path: Path, make: Callable[[Path], object], text: str) -> None:
    with pytest.raises(SourceError, match=text):
        index_source(make(tmp_path))  # type: ignore[arg-type]


def test_a_folder_without_images_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"no images in .*looked in it and below for .*\.png.*found 1 other files"):
        index_source(tmp_path)
    pq.write_table(pa.table({"label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=r"no column of encoded images .* it has \['label'\]"):
        index_source(tmp_path)


def test_a_file_that_cannot_be_read_is_refused(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(2)
    (folder / "gone.jpg").symlink_to("nowhere")
    (folder / "folder.jpg").mkdir()
    index = index_source(folder)
    gone = next(entry for entry in index.entries() if entry.id == "gone.jpg")
    with pytest.raises(Refused, match="unreadable"):
        Reader().read(gone)
    assert "folder.jpg" not in ids(folder)


def test_a_file_that_grew_since_it_was_listed_is_read_whole(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(1)
    index = index_source(folder)
    os.truncate(folder / "000.jpg", 0)
    (folder / "000.jpg").write_bytes(jpeg(77))
    assert decode(Reader().read(index[0])).size == picture(77).size
