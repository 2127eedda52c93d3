"""Every source becomes the same kind of index."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import itertools
import json
import os
import re
import sys
import tarfile
import zipfile
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture
from damaged import encoded
from PIL import Image

from micl_zoo.errors import Refused, SourceError, StoreError, UsageError
from micl_zoo.extraction.extract import Summary, extract
from micl_zoo.images.decode import decode
from micl_zoo.images.formats import FORMATS, SUFFIXES, readable
from micl_zoo.sources import archives, footer, globs
from micl_zoo.sources import listing as sources
from micl_zoo.sources import parquet as tables
from micl_zoo.sources.footer import read_footer, unpacked_dictionary
from micl_zoo.sources.index import Entry, Fingerprint, ImageIndex
from micl_zoo.sources.kinds import KINDS, Kind
from micl_zoo.sources.listing import index_source, list_source
from micl_zoo.sources.notes import Notes
from micl_zoo.sources.places import File, OpenFiles
from micl_zoo.sources.reader import Reader
from micl_zoo.sources.selection import Selection, starts_as_image
from micl_zoo.stores.store import open_store
from micl_zoo.stores.verify import verify


def jpeg(seed: int) -> bytes:
    return encoded(picture(seed), "JPEG")


def parquet(path: Path, count: int, *, own_ids: bool = False, first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": jpeg(first + n), "path": f"{n}.jpg"} for n in range(count)]
    columns: dict[str, object] = {"image": images, "label": list(range(count))}
    if own_ids:
        columns["id"] = [f"own-{n}" for n in range(count)]
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def tar(path: Path, members: dict[str, bytes], *, mode: str = "w", form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(str(path), mode, format=form, encoding="utf-8", errors="surrogateescape") as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
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
    assert entry == Entry("000.jpg", str(folder / "000.jpg"), "file", 0, (folder / "000.jpg").stat().st_size)


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


def test_ids_that_repeat_get_the_name_of_their_folder(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, other = image_folder(2), image_folder(2, "others")
    index = index_source([folder, other])
    expected = ["000.jpg", "below/001.jpg", "others/000.jpg", "others/below/001.jpg"]
    assert index.ids == expected
    assert index.notes.text() == "2 ids repeat and got the name of their folder"
    for rows in (1, 3):  # however it is cut
        assert [name for piece in list_source([folder, other], chunk_rows=rows) for name in piece.ids] == expected
    again = ids([folder, other, other])
    assert again[:4] == expected
    assert len(set(again)) == 6


def test_ids_of_a_column_or_a_list_that_repeat_become_rows_and_paths(tmp_path: Path) -> None:
    cells = [jpeg(n) for n in range(4)]
    pq.write_table(pa.table({"id": ["cat", "cat", None, "dog"], "image": cells}), tmp_path / "classes.parquet")
    assert ids(tmp_path / "classes.parquet") == ["cat", "classes.parquet#1", "classes.parquet#2", "dog"]
    for part in ("train", "test"):
        (tmp_path / "splits").mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": [0, 1], "image": cells[:2]}), tmp_path / f"splits/{part}.parquet")
    assert ids(tmp_path / "splits") == ["0", "1", "train.parquet#0", "train.parquet#1"]
    assert index_source(tmp_path / "splits", id_column="none").ids[1] == "test.parquet#1"
    (tmp_path / "list.csv").write_text("id,path\ncat,a/1.jpg\ncat,a/2.jpg\ncat,a/2.jpg\n")
    assert ids(tmp_path / "list.csv") == ["cat", "a/2.jpg", "cat#2"]


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
        (lambda p: (p / "empty.txt").write_text("\n") and p / "empty.txt", "one path per line is expected"),
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


def test_members_of_a_tar_are_read_where_they_lie(tmp_path: Path) -> None:
    members = {f"./below/{n:03d}.jpg": jpeg(n) for n in range(3)} | {"a.b.PNG": b"x", "empty.jpg": b""}
    others = {"000.cls": b"0", "000.json": b"{}", ".hidden.jpg": b"x", "__/._000.jpg": b"x", ".git/000.jpg": b"x"}
    index = index_source(tar(tmp_path / "a.tar", members | others))
    inside = ["below/000.jpg", "below/001.jpg", "below/002.jpg", "a.b.PNG", "empty.jpg"]
    assert [entry.id for entry in index.entries()] == [f"a.tar#{name}" for name in inside]
    assert (index[1].uri, index[1].length) == (str(tmp_path / "a.tar"), len(jpeg(1)))
    reader = Reader()
    for row in (2, 0, 4, 1, 3):
        assert reader.read(index[row]) == list(members.values())[row]


def test_a_tar_may_hold_links_and_folders(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = image_folder(4)
    (folder / "link.jpg").symlink_to("000.jpg")
    (folder / "same.jpg").hardlink_to(folder / "000.jpg")
    (folder / "folder.jpg").mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder, arcname=".")
    assert len(ids(tmp_path / "a.tar")) == 4
    listed = index_source(tmp_path / "a.tar")
    packed = {Reader().read(entry) for entry in listed.entries()}
    assert packed == {(folder / name).read_bytes() for name in ids(folder) if name not in ("link.jpg", "same.jpg")}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names_in_a_tar(tmp_path: Path, form: int) -> None:
    long, odd = "f" * 150 + "/" + "n" * 180 + ".jpg", os.fsdecode(b"caf\xe9 #1.jpg")
    path = tar(tmp_path / "a.tar", {long: jpeg(0), "d\u00e9j\u00e0.jpg": jpeg(1), odd: jpeg(2)}, form=form)
    assert ids(path) == [f"a.tar#{long}", "a.tar#d\u00e9j\u00e0.jpg", r"a.tar#caf\xe9 #1.jpg"]
    assert [Reader().read(entry) for entry in index_source(path).entries()] == [jpeg(0), jpeg(1), jpeg(2)]


def test_folders_globs_and_braces_of_tars(tmp_path: Path) -> None:
    for n in (8, 9, 10):
        tar(tmp_path / f"shards/train-{n:03d}.tar", {f"{n}.jpg": jpeg(n), f"{n}.cls": b"1"})
    tar(tmp_path / "shards/val/labels.tar", {"1.cls": b"1"})
    expected = ["train-008.tar#8.jpg", "train-009.tar#9.jpg", "train-010.tar#10.jpg"]
    for source in ("shards", "shards/*.tar", "shards/train-{008..010}.tar", "shards/{train,train}-0{08..10}.tar"):
        assert ids(tmp_path / source) == expected
    assert ids(f"{tmp_path}/{{shards,shards}}/train-009.tar") == ["shards/train-009.tar#9.jpg"]
    with pytest.raises(SourceError, match=r"train-011\.tar', which '.*\{008\.\.012\}\.tar' asks for, matches no file"):
        index_source(tmp_path / "shards/train-{008..012}.tar")
    (tmp_path / "shards/a.jpg").write_bytes(jpeg(0))
    assert ids(tmp_path / "shards") == ["a.jpg"]


def test_a_name_with_braces_is_a_name(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(1)
    (folder / "000.jpg").rename(folder / "{1..2}.jpg")
    assert ids(folder / "{1..2}.jpg") == ["{1..2}.jpg"]


def test_a_reader_keeps_few_archives_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("micl_zoo.sources.places.OPEN_ARCHIVES", 2)
    for n in range(4):
        tar(tmp_path / f"{n}.tar", {"a.jpg": jpeg(n)})
    index, reader = index_source(tmp_path), Reader()
    for row in (0, 1, 0, 2, 3, 0, 3):
        assert reader.read(index[row]) == jpeg(row)
    assert list(reader._files._archives) == [str(tmp_path / "0.tar"), str(tmp_path / "3.tar")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_gives_the_embeddings_of_its_folder(
    image_folder: Callable[..., Path], encoder_folder: Path, tmp_path: Path, workers: int
) -> None:
    folder = image_folder(6)
    names = ids(folder)
    tar(tmp_path / "tars/a.tar", {name: (folder / name).read_bytes() for name in names[:4]})
    tar(tmp_path / "tars/b.tar", {name: (folder / name).read_bytes() for name in names[4:]} | {"x.jpg": b"no"})

    def embed(source: Path) -> Summary:
        return extract(source, source.with_suffix(".out"), weights=encoder_folder, workers=workers, precision="fp32")

    summary, expected = embed(tmp_path / "tars"), embed(folder)
    assert (summary.embedded, summary.refused) == (6, 1)
    assert summary.store.ids == [f"a.tar#{n}" for n in names[:4]] + [f"b.tar#{n}" for n in names[4:]]
    np.testing.assert_allclose(summary.store.embeddings, expected.store.embeddings, atol=1e-6)


@pytest.mark.parametrize(
    ("ending", "mode"), [("tar.gz", "w:gz"), ("tgz", "w:gz"), ("tar.xz", "w:xz"), ("tar", "w:bz2")]
)
def test_a_compressed_tar_is_refused_where_it_is_meant(tmp_path: Path, ending: str, mode: str) -> None:
    path = tar(tmp_path / f"in/a.{ending}", {"a.jpg": jpeg(0)}, mode=mode)
    for source in (path, path.parent, tmp_path / f"in/*.{ending}"):
        with pytest.raises(SourceError, match=r"is compressed with (gzip|xz|bzip2), .* unpack it into a folder, or"):
            index_source(source)
    if ending != "tar":
        tar(tmp_path / "in/b.tar", {"b.jpg": jpeg(1)})
        assert ids(path.parent) == ["b.tar#b.jpg"]


def damaged() -> Iterator[tuple[str, Callable[[bytes], bytes], str, int]]:
    yield "within", lambda data: data[:3000], "unexpected end of data", 1
    yield "boundary", lambda data: data[:3072], "it stops at byte 3072 without an end-of-archive mark", 2
    yield "header", lambda data: data[:1700] + b"XX" + data[1702:], "the header at byte 1536 is damaged", 1
    yield "first", lambda data: b"XX" + data[2:], "bad checksum", 0
    yield "empty", lambda data: b"", "empty file", 0
    yield "text", lambda data: b"no tar at all" * 100, "invalid header|bad checksum", 0
    yield "joined", lambda data: data + data, "more follows its end at byte 4608", 3


@pytest.mark.parametrize(
    ("change", "text", "before"), [case[1:] for case in damaged()], ids=[case[0] for case in damaged()]
)
def test_of_a_damaged_tar_what_is_before_the_damage_is_listed_and_the_rest_told(
    tmp_path: Path, change: Callable[[bytes], bytes], text: str, before: int
) -> None:
    path = tar(tmp_path / "tars/a.tar", {f"{n}.jpg": b"j" * 1000 for n in range(3)})
    path.write_bytes(change(path.read_bytes()))
    said = rf"cannot read '.*a\.tar' as a tar: .*({text})"
    if not before:
        with pytest.raises(SourceError, match=said):
            index_source(path)
    tar(tmp_path / "tars/b.tar", {"b.jpg": b""})
    index = index_source(tmp_path / "tars")
    assert index.ids == [*(f"a.tar#{n}.jpg" for n in range(before)), "b.tar#b.jpg"]
    (problem,) = index.notes.problems
    assert problem[:2] == ("a.tar", str(path))
    assert re.match(said, problem.detail)


def test_a_sparse_member_and_no_image_at_all(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"a.jpg": b"j" * 600}, form=tarfile.GNU_FORMAT)
    header = bytearray(path.read_bytes()[:512])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
    path.write_bytes(bytes(header) + path.read_bytes()[512:])
    with pytest.raises(SourceError, match=r"'a\.jpg' in .* is a sparse file"):
        index_source(path)
    with pytest.raises(SourceError, match=r"no images in .*b\.tar': looked for members ending in .*found 1 other"):
        index_source(tar(tmp_path / "b.tar", {"a.cls": b"1"}))


def test_a_tar_that_shrank_or_holds_a_name_twice(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"a.jpg": jpeg(0)})
    index = index_source(path)
    os.truncate(path, 600)
    with pytest.raises(Refused, match=r"a\.tar is shorter than it was when its members were listed"):
        Reader().read(index[0])
    with tarfile.open(tar(tmp_path / "b.tar", {"a.jpg": jpeg(0)}), "a") as archive:
        archive.addfile(tarfile.TarInfo("./a.jpg"))
    assert ids(tmp_path / "b.tar") == ["b.tar#a.jpg", "b.tar#a.jpg#1"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_forked_processes_may_share_a_reader(tmp_path: Path) -> None:
    members = {f"{n:03d}.jpg": bytes([n]) * 5000 for n in range(200)}
    index, reader = index_source(tar(tmp_path / "a.tar", members)), Reader()

    def all_right() -> bool:
        return all(reader.read(entry) == data for entry, data in zip(index.entries(), members.values(), strict=True))

    assert all_right()
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            try:
                os._exit(0 if all_right() else 1)
            finally:
                os._exit(2)
        children.append(child)
    assert all_right()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_a_folder_is_listed_while_it_is_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(12):
        (tmp_path / f"{n // 3}").mkdir(exist_ok=True)
        (tmp_path / f"{n // 3}/{n:02d}.jpg").touch()
    scanned, scan = [], globs._scan
    monkeypatch.setattr(globs, "_scan", lambda folder: scanned.append(folder) or scan(folder))
    monkeypatch.setattr(sources, "PIECE_SECONDS", 60)
    pieces = list_source(tmp_path, chunk_rows=3)
    assert len(next(pieces)) == 3
    assert scanned == [str(tmp_path), str(tmp_path / "0")]
    assert [len(piece) for piece in pieces] == [3, 3, 3]
    monkeypatch.setattr(sources, "PIECE_SECONDS", -1)  # as where listing is slow
    assert [len(piece) for piece in list_source(tmp_path)] == [1] * 12
    with pytest.raises(UsageError, match="chunk_rows must be at least 1, got 0"):
        next(list_source(tmp_path, chunk_rows=0))


@pytest.mark.parametrize("rows", [1, 2, 5, 1000])
def test_pieces_make_the_index_and_its_fingerprint(tmp_path: Path, rows: int) -> None:
    parquet(tmp_path / "a.parquet", 5, own_ids=True)
    tar(tmp_path / "b.tar", {f"{n}\n\u00e9.jpg": b"x" * n for n in range(7)})
    (tmp_path / "c.jpg").write_bytes(b"")
    source = [tmp_path / "c.jpg", tmp_path / "b.tar", tmp_path / "a.parquet"]
    pieces, whole = list(list_source(source, chunk_rows=rows)), index_source(source)
    assert [entry for piece in pieces for entry in piece.entries()] == list(whole.entries())
    assert max(map(len, pieces)) <= rows
    fingerprint = Fingerprint()
    for piece in pieces:
        fingerprint.update(piece)
    assert fingerprint.hexdigest() == whole.fingerprint()
    assert fingerprint.hexdigest() == plain_fingerprint(whole)
    cut = Fingerprint()
    for start in (0, 3, 4):
        cut.update(whole.slice(start, {0: 3, 3: 1, 4: 100}[start]))
    cut.update(whole.slice(0, 0))
    assert cut.hexdigest() == whole.fingerprint()


def plain_fingerprint(index: ImageIndex) -> str:
    lines = [f"{entry.id}\0{entry.offset}\0{max(entry.length, -1)}\n" for entry in index.entries()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_an_id_is_found_again_in_any_later_piece(tmp_path: Path) -> None:
    names = [f"{n}.jpg" for n in range(500)]
    for again in (0, 7, 250, 499):
        (tmp_path / "list.txt").write_text("\n".join([*names, names[again]]))
        pieces = list_source(tmp_path / "list.txt", chunk_rows=1 + again % 97)
        assert [name for piece in pieces for name in piece.ids] == [*names, f"{again}.jpg#500"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are text")
def test_a_name_that_looks_like_another_s_bytes(tmp_path: Path) -> None:
    for name in (b"caf\xe9.jpg", rb"caf\xe9.jpg", b"caf\xc3\xa9.jpg"):
        (tmp_path / os.fsdecode(name)).touch()
    assert len(set(ids(tmp_path))) == 3


@pytest.mark.parametrize(
    "pattern", ["*.jpg", "**/*.jpg", "*/*", "**", "a*/**/?.jpg", "a/../a/*.jpg", "[ab]/[!1].jpg", ".h/*"]
)
def test_globs_are_python_s_and_sorted_by_names(tmp_path: Path, pattern: str) -> None:
    for name in (
        "a/1.jpg",
        "a/2.jpg",
        "a.jpg",
        "a/b/1.jpg",
        "a/b/c/2.jpg",
        "b/3.jpg",
        "a.b/4.jpg",
        ".h/5.jpg",
        "a/.6.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = sorted(Path(name) for name in glob.glob(f"{tmp_path}/{pattern}", recursive=True) if Path(name).is_file())  # noqa: PTH207 - the oracle
    assert [entry.uri for entry in index_source(f"{tmp_path}/{pattern}").entries()] == list(map(str, found))


def test_globs_relative_linked_and_looping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.jpg").write_bytes(jpeg(1))
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real/loop").symlink_to("..")
    monkeypatch.chdir(tmp_path)
    assert ids("*/*.jpg") == ["link/a.jpg", "real/a.jpg"]
    assert ids("**/*.jpg") == ["real/a.jpg"]
    entry = index_source("real/{a,a}.jpg")[0]
    assert entry == Entry("a.jpg", str(tmp_path / "real/a.jpg"), "file", 0, len(jpeg(1)))


def test_lists_with_columns(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b, c.jpg").write_bytes(jpeg(1))
    rows = [{"label": 1, "image": "a/b, c.jpg", "id": 7}, {"image": "gone.jpg", "id": "eight"}]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "rows.csv").write_text(
        '\ufefflabel,image,id\r\n1,"a/b, c.jpg",7\r\n,gone.jpg,eight\r\n', encoding="utf-8"
    )
    for name in ("rows.jsonl", "rows.csv"):
        index = index_source(tmp_path / name)
        assert list(index.entries()) == [
            Entry("7", str(tmp_path / "a/b, c.jpg"), "file", 0, len(jpeg(1))),
            Entry("eight", str(tmp_path / "gone.jpg"), "file", 0, 0),
        ]
        assert Reader().read(index[0]) == jpeg(1)
    (tmp_path / "files.csv").write_text("url,filename\nx,a/b.jpg\n")
    assert ids(tmp_path / "files.csv") == ["a/b.jpg"]


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.csv", "label,id\n1,2\n", "no column of paths: looked for path, file, .*, found label, id"),
        ("a.csv", "path,id\n,2\n", "line 2 of the list .* has no path: ''"),
        ("a.csv", "id,path\n1\n", "line 2 of the list .* has no path: None"),
        ("a.csv", "path,path\na.png,b.png\n", "its header has 'path' 2 times"),
        ("a.tsv", "id\tpath\tid\n1\ta.png\t2\n", "its header has 'id' 2 times"),
        ("a.csv", "path\n", "it has a header and no row"),
        ("a.csv", "", "is empty"),
        ("a.jsonl", '\n{"path": ', "line 2 of the list .* is no JSON object: Expecting"),
        ("a.jsonl", '["a.jpg"]', r"line 1 of the list .* is no JSON object: \[.a\.jpg.\]"),
        ("a.jsonl", '{"path": "a.jpg", "id": null}', "line 1 of the list .* has no id: None"),
        ("a.txt", "caf\udce9.jpg", "is not UTF-8 text"),
    ],
)
def test_a_list_that_cannot_be_used(tmp_path: Path, name: str, text: str, error: str) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SourceError, match=error):
        index_source(tmp_path / name)


def test_the_standard_input(image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    image_folder(2)
    monkeypatch.chdir(tmp_path)
    names = [os.fsdecode(b"caf\xe9.jpg"), "other.jpg"] if sys.platform == "linux" else ["other.jpg"]
    for name in names:
        Path(name).write_bytes(jpeg(5))
    lines = b"".join(os.fsencode(name) + b"\n\n" for name in ["./images/000.jpg", *names])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    entries = list(index_source(["images/below", "-"]).entries())
    assert [entry.id for entry in entries] == [
        "001.jpg",
        "./images/000.jpg",
        *([r"caf\xe9.jpg"] * len(names[1:])),
        "other.jpg",
    ]
    assert Reader().read(entries[2]) == jpeg(5)
    with pytest.raises(SourceError, match="the standard input is empty"):
        index_source("-")


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_of_a_zip(tmp_path: Path, method: int) -> None:
    images = {"a.jpg": jpeg(0), "below/d\u00e9j\u00e0 #1.JPG": jpeg(1), "empty.png": b"", "n" * 900 + "/a.jpg": jpeg(2)}
    path = zipped(tmp_path / "z/a.zip", images | {"notes.txt": b"x", "__MACOSX/._a.jpg": b"x", "dir.jpg/": b""}, method)
    index = index_source(path)
    assert [entry.id for entry in index.entries()] == [f"a.zip#{name}" for name in images]
    assert index[0][1:] == (str(path), "zip", 0, zipfile.ZipFile(path).getinfo("a.jpg").compress_size)
    reader = Reader()
    for row in (3, 0, 2, 1):
        assert reader.read(index[row]) == list(images.values())[row]
    zipped(tmp_path / "z/b.zip", {"b.jpg": jpeg(3)})
    expected = [*(f"a.zip#{name}" for name in images), "b.zip#b.jpg"]
    assert ids(tmp_path / "z") == ids(f"{tmp_path}/z/*.zip") == ids(f"{tmp_path}/z/{{a,b}}.zip") == expected
    data = b"#!/bin/sh\n" + path.read_bytes()  # as a program that unpacks itself
    path.write_bytes(data)
    assert reader.read(index_source(path)[1]) == Reader().read(index_source(path)[1]) == jpeg(1)


def test_a_zip_that_was_streamed_or_is_large(tmp_path: Path) -> None:
    with (tmp_path / "a.zip").open("wb") as file, zipfile.ZipFile(NoSeek(file), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", jpeg(0))
        with archive.open("b.jpg", "w", force_zip64=True) as member:
            member.write(jpeg(1))
    assert [Reader().read(entry) for entry in index_source(tmp_path / "a.zip").entries()] == [jpeg(0), jpeg(1)]


class NoSeek(io.RawIOBase):
    def __init__(self, file: io.BufferedWriter) -> None:
        self.file = file

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        return self.file.write(data)  # type: ignore[arg-type]


def test_a_zip_that_cannot_be_used(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip", {"a.jpg": jpeg(0)})
    data = path.read_bytes()
    central = data.index(b"PK\x01\x02")
    for at, value, text in (
        (central + 8, 1, "'a.jpg' in .* is encrypted: unpack it"),
        (central + 10, 12, "compression method 12: pack"),
    ):
        path.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
        with pytest.raises(SourceError, match=text):
            index_source(path)
    for broken in (b"", b"PK", data[:-30], b"x" * 3000):
        path.write_bytes(broken)
        with pytest.raises(SourceError, match=r"cannot read '.*a\.zip' as a zip: .*Copy or pack it again"):
            index_source(path)
    with pytest.raises(SourceError, match=r"no images in .*b\.zip': looked for members .*found 1 other"):
        index_source(zipped(tmp_path / "b.zip", {"a.txt": b""}))


def test_a_damaged_member_of_a_zip_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path / "a.zip", {"a.jpg": jpeg(0), "b.jpg": bytes(100_000)})
    data, (first, bomb) = path.read_bytes(), index_source(path).entries()
    for at, reason in ((0, "unreadable"), (14, "damaged"), (60, "damaged|truncated"), (500, "damaged|truncated")):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        with pytest.raises(Refused, match=rf"^({reason}): "):
            Reader().read(first)
    path.write_bytes(data[:200])
    with pytest.raises(Refused, match=r"^unreadable: .* is shorter than it was"):
        Reader().read(first)
    path.write_bytes(data)
    assert Reader().read(bomb) == bytes(100_000)
    monkeypatch.setattr("micl_zoo.sources.places.MAX_BYTES", 99_999)
    with pytest.raises(Refused, match=r"^too_large: "):
        Reader().read(bomb)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_what_is_no_regular_file_is_refused_at_once(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(1)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "sparse.jpg").touch()
    os.truncate(folder / "sparse.jpg", 1 << 40)
    refusals = {}
    for entry in itertools.islice(index_source(folder).entries(), 1, None):
        with pytest.raises(Refused) as caught:
            Reader().read(entry)
        refusals[entry.id] = caught.value.reason
    unreadable = dict.fromkeys(("pipe.jpg", "self.jpg", "zero.jpg"), "unreadable")
    assert refusals == unreadable | {"sparse.jpg": "too_large"}


def test_a_kind_of_source_is_added_by_two_functions_and_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.b64").write_text(f"one,{b64encode(jpeg(1)).decode()}\nnothing\ntwo,{b64encode(jpeg(2)).decode()}\n")

    def list_lines(file: File, selection: Selection) -> archives.Members:
        at = 0
        for line in Path(file.place).read_text().splitlines(keepends=True):
            name, comma, data = line.rstrip().partition(",")
            if comma:
                yield f"{file.name}#{name}", "base64", at + len(name) + 1, len(data)
            else:
                selection.notes.other(name)
            at += len(line)

    def read_line(files: OpenFiles, entry: Entry) -> bytes:
        return b64decode(files.read_range(entry.uri, entry.offset, entry.length))

    KINDS.append(Kind("base64", "lines of base64", (".b64",), list_lines, read_line))
    try:
        for source in (tmp_path, tmp_path / "a.b64", str(tmp_path / "*.b64")):
            index = index_source(source)
            assert [(entry.id, entry.kind) for entry in index.entries()] == [
                (f"a.b64#{n}", "base64") for n in ("one", "two")
            ]
            assert [Reader().read(entry) for entry in index.entries()] == [jpeg(1), jpeg(2)]
        (tmp_path / "b.b64").write_bytes(b"\xff")
        with pytest.raises(SourceError, match=r"cannot read '.*b\.b64' as lines of base64"):
            index_source(tmp_path / "b.b64")
    finally:
        KINDS.pop()
    with pytest.raises(SourceError, match=r"unknown kind of source 'base64'.* Valid: file, parquet, tar, zip"):
        Reader().read(index[0])


def test_an_index_without_kinds_is_that_with_them(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    sources = [
        image_folder(2),
        parquet(tmp_path / "a.parquet", 2),
        tar(tmp_path / "a.tar", {"a.jpg": jpeg(0), "b.jpg": jpeg(1)}),
        zipped(tmp_path / "A.ZIP", {"a.jpg": jpeg(0), "b.jpg": jpeg(1)}),
    ]
    index = index_source(sources)
    kinds = ["file", "file", "parquet", "parquet", "tar", "tar", "zip", "zip"]
    assert index.table["kind"].to_pylist() == kinds
    lengths = pa.array([max(length, -1) for length in index.table["length"].to_pylist()])
    index = ImageIndex(index.table.set_column(4, "length", lengths))  # a version without kinds had no marks of files
    before = index.table.drop_columns(["kind"])
    assert ImageIndex.from_table(before).table.equals(index.table)
    assert ImageIndex.from_table(index.table) == index
    lines = "".join(f"{entry.id}\0{entry.offset}\0{entry.length}\n" for entry in index.entries())
    assert index.fingerprint() == hashlib.sha256(lines.encode()).hexdigest()
    places = {
        "https://h/a.zip?sig=1": "zip",
        "https://h/a.ZIP": "zip",
        "https://h/a.tar?name=b.zip": "tar",
        "s3://b/a.tar?.zip": "zip",
        "/data/zip": "tar",
    }
    offsets = pa.array([512] * len(places))
    table = pa.table({"id": list(places), "uri": list(places), "offset": offsets, "length": offsets})
    assert ImageIndex.from_table(table).table["kind"].to_pylist() == list(places.values())


def test_a_store_whose_index_states_no_kinds_goes_on(tmp_path: Path, encoder_folder: Path) -> None:
    source = zipped(tmp_path / "a.zip", {f"{n}.jpg": jpeg(n) for n in range(5)})
    extract(source, tmp_path / "out", weights=encoder_folder, workers=0, shard_rows=2)
    store = open_store(tmp_path / "out")
    whole, rows = store.manifest.index_sha256, store.embeddings
    for part in (tmp_path / "out/index").iterdir():
        pq.write_table(pq.read_table(part).drop_columns(["kind"]), part)
    (tmp_path / "out/part-00001.parquet").unlink()
    extract(source, tmp_path / "out", weights=encoder_folder, workers=0, shard_rows=2)
    again = open_store(tmp_path / "out")
    assert again.manifest.index_sha256 == whole
    assert np.array_equal(again.embeddings, rows)


def test_each_row_group_is_read_once_and_looked_up_in_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [jpeg(n % 3) for n in range(300)]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet", row_group_size=1)
    reader, index, calls = Reader(), index_source(tmp_path / "a.parquet"), Counter[str]()
    for name, owner in (("read_footer", tables), ("load", tables._Cells)):
        whole = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, name=name, whole=whole: calls.update([name]) or whole(*args))
    assert [reader.read(entry) for entry in index.entries()] == rows
    assert calls == {"read_footer": 1, "load": 300}
    assert reader.read(index[7]) == rows[7]
    with pytest.raises(Refused, match=r"row 300 is past the end of .* \(300 rows\)"):
        reader.read(index[0]._replace(offset=300))


def test_a_folder_lists_whatever_decode_reads(tmp_path: Path) -> None:
    assert set(readable()) <= set(FORMATS)
    registered = {suffix for suffix, name in Image.registered_extensions().items() if name in readable()}
    assert registered <= set(SUFFIXES)
    for suffix in SUFFIXES:
        (tmp_path / f"a{suffix}").touch()
    assert sorted(ids(tmp_path)) == sorted(f"a{suffix}" for suffix in SUFFIXES)
    picture(3).save(tmp_path / "picture.ppm")
    assert decode(Reader().read(index_source(tmp_path / "picture.ppm")[0])).size == picture(3).size


def notes_of(source: object, **options: Any) -> Notes:
    return index_source(source, **options).notes  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["", "/**/*.jpg", "/*/*.jpg"])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such file")])
def test_a_folder_that_cannot_be_read_does_not_end_the_others(
    image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, pattern: str, error: OSError
) -> None:
    folder = image_folder(2)
    for name in ("locked", "below/locked"):
        (folder / name).mkdir()
    scan = os.scandir

    def scandir(place: str) -> Any:
        if place.endswith("locked"):
            raise error
        return scan(place)

    monkeypatch.setattr(os, "scandir", scandir)
    index = index_source(f"{folder}{pattern}")
    assert index.ids[-1] == "below/001.jpg"
    assert ("locked", str(folder / "locked")) in [problem[:2] for problem in index.notes.problems]
    assert "cannot read the folder" in index.notes.problems[0].detail
    (folder / "000.jpg").unlink()
    (folder / "below/001.jpg").unlink()
    with pytest.raises(SourceError, match=r"cannot read the folder .*locked|matches no file"):
        index_source(f"{folder}{pattern}")


def test_one_bad_archive_and_one_bad_member_cost_themselves(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"1.jpg": jpeg(0)})
    tar(tmp_path / "b.tar.gz", {"2.jpg": jpeg(0)}, mode="w:gz")
    (tmp_path / "c.tar").write_bytes(b"no tar" * 200)
    assert index_source(tmp_path).ids == ["a.tar#1.jpg"]
    assert [problem.id for problem in notes_of(tmp_path).problems] == ["b.tar.gz", "c.tar"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("good.jpg", "odd.jpg", "secret.jpg"):
            archive.writestr(name, jpeg(1), zipfile.ZIP_BZIP2 if name == "odd.jpg" else zipfile.ZIP_STORED)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    index = index_source(tmp_path / "a.zip")
    assert index.ids == ["a.zip#good.jpg"]
    assert [problem.id for problem in index.notes.problems] == ["a.zip#odd.jpg", "a.zip#secret.jpg"]


def test_metadata_beside_images_is_told_and_beside_tars_is_left_out(tmp_path: Path) -> None:
    parquet(tmp_path / "a/1.parquet", 2)
    pq.write_table(pa.table({"url": ["x"], "status": ["y"]}), tmp_path / "a/0.parquet")
    index = index_source(tmp_path / "a")
    assert index.ids == ["1.parquet#0", "1.parquet#1"]
    assert [problem.id for problem in index.notes.problems] == ["0.parquet"]
    tar(tmp_path / "b/0.tar", {"1.jpg": jpeg(0), "1.json": b"{}"})
    pq.write_table(pa.table({"url": ["x"], "status": ["y"]}), tmp_path / "b/0.parquet")
    (tmp_path / "b/0_stats.json").write_text("{}")
    index = index_source(tmp_path / "b")
    assert index.ids == ["0.tar#1.jpg"]
    assert index.notes.as_dict()["others"] == {".json": 2, ".parquet": 1}
    assert not index.notes.problems


@pytest.mark.parametrize(
    ("name", "text", "good"),
    [
        ("a.csv", "id,path\n1,a.jpg\n2,\n3\n4,b.jpg\n", ["1", "4"]),
        ("a.csv", "path\n" + "a" * 200_000 + "\nb.jpg\n", ["b.jpg"]),
        ("a.tsv", "path\tlabel\na.jpg\tcat\n\tdog\n", ["a.jpg"]),
        ("a.jsonl", '{"path": "a.jpg"}\n{"path": 3}\n[]\n{\n{"path": "b.jpg", "id": true}\n', ["a.jpg"]),
        ("a.jsonl", '{"path": ' + "[" * 200_000 + '\n{"path": "a.jpg", "id": 7}\n', ["7"]),
        ("a.jsonl", r'{"path": "\ud800.jpg"}' + "\n" + r'{"path": "a\u0000.jpg"}' + '\n{"path": "a.jpg"}', ["a.jpg"]),
        ("a.json", '{"images": [{"file_name": "a.jpg", "id": 1}, {"id": 2}]}', ["1"]),
        ("a.json", '["a.jpg", 7, "b.jpg"]', ["a.jpg", "b.jpg"]),
        ("a.txt", "caf\udce9.jpg\na\0b.jpg\nfile:///x%00y\na.jpg\n", ["a.jpg"]),
    ],
)
def test_a_row_without_a_path_costs_itself(tmp_path: Path, name: str, text: str, good: list[str]) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    index = index_source(tmp_path / name)
    assert index.ids == good
    assert index.notes.problems
    assert all(re.match(rf"{name}#[0-9]+$", problem.id) for problem in index.notes.problems)


@pytest.mark.parametrize("name", ["list.7z", "a.docx", "a.rar", "a.csv.gz", "a.mp4", "a.xml", "empty", "odd.bin"])
def test_a_wrong_source_is_told_as_such_and_leaves_nothing(tmp_path: Path, name: str, encoder_folder: Path) -> None:
    starts = {"list.7z": b"7z\xbc\xaf\x27\x1c", "a.docx": b"PK\3\4", "a.rar": b"Rar!", "a.csv.gz": b"\x1f\x8b"}
    (tmp_path / name).write_bytes(b"" if name == "empty" else starts.get(name, b"text") + bytes(100))
    with pytest.raises(SourceError, match="is no image, list or archive that can be read"):
        extract(tmp_path / name, tmp_path / "out", weights=encoder_folder, workers=0)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_what_is_excluded_is_counted(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = image_folder(2)
    for name in ("@eaDir/a.jpg", "below/lost+found/b.jpg", "#recycle/c.jpg", "d_small.jpg", "clip.THM", "thumbs.db"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(jpeg(3))
    (folder / ".hidden").mkdir()
    assert ids(f"{folder}/**/*.jpg") == ["000.jpg", "below/001.jpg", "d_small.jpg"]
    index = index_source(folder)
    assert index.ids == ["000.jpg", "d_small.jpg", "below/001.jpg"]
    assert index.notes.skipped == {"excluded": 5, "hidden": 1}
    assert index_source(folder, exclude=["*_small.*", "below"]).ids == ["000.jpg"]
    assert index_source(folder, exclude=["below/*"]).ids == ["000.jpg", "d_small.jpg"]
    assert len(index_source(folder, default_exclude=False)) == 7  # the camera's thumbnail is a JPEG by its first bytes
    assert ids(f"{folder}/@eaDir/*.jpg") == ["a.jpg"]  # what is named is taken
    members = {"a.jpg": jpeg(0), "__MACOSX/b.jpg": b"", "x/@eaDir/c.jpg": b"", "._d.jpg": b"", "e_small.jpg": b""}
    for archive in (tar(tmp_path / "a.tar", members), zipped(tmp_path / "a.zip", members)):
        index = index_source(archive, exclude=["*_small*"])
        assert index.ids == [f"{archive.name}#a.jpg"]
        assert index.notes.skipped == {"excluded": 3, "hidden": 1}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM", "ICO", "AVIF"])
def test_files_and_members_without_a_known_ending_are_sniffed(tmp_path: Path, form: str) -> None:
    if form not in readable():
        pytest.skip(f"this Pillow has no {form}")
    data = encoded(picture(1), form)
    assert starts_as_image(data)
    images = dict.fromkeys(("no ending", "photo.jpg?w=640", "a.jpg_large", "a.bin"), data)
    others = {"notes": b"text of no image", "P": b"Python", "BM.x": b"BMW is no bitmap, as all know", "fake.txt": data}
    (tmp_path / "folder").mkdir()
    for name, content in (images | others).items():
        (tmp_path / "folder" / name).write_bytes(content)
    assert sorted(ids(tmp_path / "folder")) == sorted(images)
    assert notes_of(tmp_path / "folder").others == {"no ending": 2, ".x": 1, ".txt": 1}
    for archive in (tar(tmp_path / "a.tar", images | others), zipped(tmp_path / "a.zip", images | others)):
        assert ids(archive) == [f"{archive.name}#{name}" for name in images]
        assert notes_of(archive).others.total() == 4


def test_links_to_folders_are_followed_once_and_never_in_a_circle(tmp_path: Path) -> None:
    for name in ("pool/cat/1.jpg", "pool/cat/2.jpg", "pool/dog/1.jpg", "set/bird/1.jpg", "set/.store/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(0))
    links = {"cat": "../pool/cat", "again": "bird", "up": "..", "bird/self": ".", "shown": ".store", "gone": "nowhere"}
    for name, target in links.items():
        (tmp_path / "set" / name).symlink_to(target)
    (tmp_path / "pool/cat/back").symlink_to("../cat")
    (tmp_path / "pool/cat/home").symlink_to("../../set")
    expected = ["bird/1.jpg", "cat/1.jpg", "cat/2.jpg", "shown/3.jpg"]
    for source in (tmp_path / "set", f"{tmp_path}/set/**/*.jpg"):
        assert ids(source) == expected
        assert notes_of(source).skipped.total() >= 4
    assert ids(tmp_path / "set/cat")[:2] == ["1.jpg", "2.jpg"]
    (tmp_path / "two").mkdir()
    (tmp_path / "two/all").symlink_to("../pool")
    (tmp_path / "two/cat").symlink_to("../pool/cat")
    assert [name for name in ids(tmp_path / "two") if "home" not in name] == [
        "all/cat/1.jpg",
        "all/cat/2.jpg",
        "all/dog/1.jpg",
    ]


def test_a_folder_of_links_that_double_is_listed_once(tmp_path: Path) -> None:
    for level in range(30):  # 2^30 ways lead to the last
        (tmp_path / f"pool/{level}").mkdir(parents=True)
        for side in "ab":
            (tmp_path / f"pool/{level}/{side}").symlink_to(f"../{level + 1}")
    (tmp_path / "pool/30").mkdir()
    (tmp_path / "pool/30/x.jpg").write_bytes(jpeg(0))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/first").symlink_to("../pool/0")
    assert len(ids(tmp_path / "in")) == 1


IMAGE = {"bytes": b"", "path": ""}
SAMPLE = [b"\xff\xd8\xffone", b"\xff\xd8\xfftwo"]


def write_columns(path: Path, told: dict[str, str] | None = None, **columns: Any) -> Path:
    table = pa.table(columns)
    if told:
        info = {"info": {"features": {name: {"_type": kind} for name, kind in told.items()}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path)
    return path


def read_all(source: object, **options: Any) -> list[bytes]:
    return [Reader().read(entry) for entry in index_source(source, **options).entries()]  # type: ignore[arg-type]


MASKS = [b"mask 1", b"mask 2"]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"mask": MASKS, "image": SAMPLE}, {}),
        ({"annotation": [{"bytes": b, "path": None} for b in MASKS], "Image": SAMPLE}, {}),
        ({"audio": [{"bytes": b, "path": None} for b in MASKS], "scan": SAMPLE}, {}),
        ({"sha256": MASKS, "content": SAMPLE}, {}),
        ({"key": pa.array([b"a" * 16] * 2, pa.binary(16)), "content": SAMPLE}, {}),
        ({"left": MASKS, "right": SAMPLE}, {"left": "Audio", "right": "Image"}),
        ({"label_map": MASKS, "picture": SAMPLE}, {"label_map": "Image", "picture": "Image"}),
        ({"a.b": MASKS, "image": SAMPLE, "image.path": ["x", "y"]}, {}),
    ],
)
def test_the_column_of_images_is_never_the_first_by_chance(
    tmp_path: Path, columns: dict[str, Any], told: dict[str, str]
) -> None:
    path = write_columns(tmp_path / "a.parquet", told, **columns)
    assert read_all(path) == SAMPLE


def test_where_two_columns_could_be_images_they_are_named(tmp_path: Path) -> None:
    path = write_columns(tmp_path / "a.parquet", left=MASKS, right=SAMPLE)
    with pytest.raises(SourceError, match=r"\['left', 'right'\] can be; say which by --column"):
        index_source(path)
    assert read_all(path, column="right") == SAMPLE
    assert read_all(path, column="left") == MASKS
    with pytest.raises(SourceError, match=r"no column of encoded images 'wrong': those that can be are \['left'"):
        index_source(path, column="wrong")
    for only in ({"audio": MASKS}, {"mask": MASKS}, {"phash": MASKS}, {"embedding": MASKS}):
        with pytest.raises(SourceError, match="say which by --column"):
            index_source(write_columns(tmp_path / "b.parquet", **only))
    with pytest.raises(SourceError, match="has no column of ids 'name'"):
        index_source(path, column="left", id_column="name")


def test_cells_are_bytes_in_every_way_that_parquet_keeps_them(tmp_path: Path) -> None:
    plain = pa.array(SAMPLE)
    views = [plain.cast(pa.binary_view())] if hasattr(pa, "binary_view") else []
    wide = [cell.ljust(100, b"\0") for cell in SAMPLE]
    kinds = [plain.cast(pa.large_binary()), plain.dictionary_encode(), *views]
    kinds += [
        pa.array([list(cell) for cell in SAMPLE], kind) for kind in (pa.list_(pa.uint8()), pa.large_list(pa.uint8()))
    ]
    kinds += [pa.StructArray.from_arrays([one], ["bytes"]) for one in kinds]
    for kind in kinds:
        assert read_all(write_columns(tmp_path / "a.parquet", image=kind)) == SAMPLE, kind.type
    assert read_all(write_columns(tmp_path / "b.parquet", image=pa.array(wide, pa.binary(100)))) == wide
    for odd in (pa.array([{"bytes": "text"}]), pa.array([{"bytes": 7}]), pa.array([{"bytes": [1, 300]}])):
        with pytest.raises(SourceError, match=r"the bytes of 'image' are (string|int64|list)"):
            index_source(write_columns(tmp_path / "c.parquet", image=odd))
    with pytest.raises(SourceError, match="has no rows"):
        index_source(write_columns(tmp_path / "d.parquet", image=pa.array([], pa.binary())))


def test_a_cell_without_bytes_is_the_file_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(jpeg(0))
    paths = ["x.jpg", str(tmp_path / "x.jpg"), "gone.jpg", None, "https://example.org/x.jpg", "a\0b"]
    cells = pa.array(
        [{"bytes": None, "path": path} for path in paths], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    first, second, *others = index_source(write_columns(tmp_path / "a.parquet", image=cells)).entries()
    assert Reader().read(first) == Reader().read(second) == jpeg(0)
    reasons = []
    for entry in others:
        with pytest.raises(Refused) as caught:
            Reader().read(entry)
        reasons.append(caught.value.reason)
    assert reasons == ["unreadable", "empty", "unreadable", "unreadable"]


def test_a_parquet_with_other_content_is_noticed_and_one_of_an_earlier_index_is_not(
    tmp_path: Path, encoder_folder: Path
) -> None:
    source, out = parquet(tmp_path / "a.parquet", 3), tmp_path / "out"
    run: dict[str, Any] = {"weights": encoder_folder, "workers": 0}
    extract(source, out, **run)
    whole = index_source(source)
    assert extract(source, out, **run).shards_before == 1
    table = pq.read_table(out / "index/part-00000.parquet")
    earlier = table.set_column(4, "length", pa.array([-1] * 3))
    pq.write_table(earlier, out / "index/part-00000.parquet")
    assert extract(source, out, **run).shards_before == 1  # it is not known to be another, and is marked from now on
    assert verify(out, sample=0).problems == []
    parquet(source, 3, first=7)
    assert index_source(source).fingerprint() == whole.fingerprint()
    assert index_source(source).marks() != whole.marks()
    with pytest.raises(StoreError, match="its file other content"):
        extract(source, out, **run)


def test_damaged_pages_of_a_parquet_are_found(tmp_path: Path) -> None:
    cells = [os.urandom(1000) for _ in range(4)]
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet", write_page_checksum=True, compression="none")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    index = index_source(tmp_path / "a.parquet")
    data[data.index(cells[2]) + 500] ^= 1
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(Refused, match=r"damaged: row group 0 of .* does not unpack"):
        Reader().read(index[2])


def test_bombs_in_parquet_are_read_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "GROUP_BYTES", 4 << 20)
    monkeypatch.setattr(tables, "BATCH_BYTES", 2 << 20)
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), pa.array([bytes(1 << 20)]))
    pq.write_table(pa.table({"image": same}), tmp_path / "a.parquet", compression="zstd")  # 500 MB in 1 kB
    before = pa.total_allocated_bytes()
    reader, index = Reader(), index_source(tmp_path / "a.parquet")
    for row in (0, 499, 250):
        assert reader.read(index[row]) == bytes(1 << 20)
        assert pa.total_allocated_bytes() - before < 30 << 20
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False}
    pq.write_table(pa.table({"image": [bytes(1 << 20)] * 20}), tmp_path / "b.parquet", **options)
    with pytest.raises(Refused, match=r"too_large: row group 0 of .* unpacks to"):
        Reader().read(index_source(tmp_path / "b.parquet")[0])
    rows = [os.urandom(1 << 20) for _ in range(12)]  # a large row group that is none: read in slices, in any order
    pq.write_table(pa.table({"image": rows}), tmp_path / "c.parquet", **options)
    reader, index = Reader(), index_source(tmp_path / "c.parquet")
    assert [reader.read(index[row]) for row in (0, 7, 3, 11, 10)] == [rows[row] for row in (0, 7, 3, 11, 10)]


@pytest.mark.parametrize("pattern", ["{1..9999}" * 4, "{1..99999999}", "{a,b}" * 60, "{5..1}", "{" * 3000 + "1..2}"])
def test_braces_without_end_are_an_error_at_once(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(SourceError):
        index_source(f"{tmp_path}/{pattern}.jpg")


def test_many_folders_named_by_braces_are_looked_up_not_compared(tmp_path: Path) -> None:
    for number in (7, 20_000):
        (tmp_path / f"{number:05d}").mkdir()
        (tmp_path / f"{number:05d}/a.jpg").touch()
    with pytest.raises(SourceError, match="matches no file"):
        index_source(f"{tmp_path}/{{00000..20000}}/*.jpg")
    with pytest.raises(SourceError, match="globs at once"):
        index_source(f"{tmp_path}/{{00000..20000}}*")


@pytest.mark.parametrize(
    "place", ["a\0b", "a" * 5000, "a/" * 3000, "*" * 3000, "\udc80/*.jpg", "file:///%00", "file://%ff"]
)
def test_odd_places_are_not_there(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError):
        index_source(place)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("name", ["a.tar", "a.zip", "a.parquet", "odd"])
def test_pipes_are_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(SourceError):
        index_source(tmp_path)
    with pytest.raises(SourceError, match="is no regular file"):
        index_source(tmp_path / name)
    tar(tmp_path / "good.tar", {"a.jpg": b""})
    if name == "a.tar":
        assert [problem.id for problem in notes_of(tmp_path).problems] == ["a.tar"]


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_files_of_the_kernel_are_refused_in_little_time(tmp_path: Path) -> None:
    places = ["/proc/self/pagemap", "/proc/kcore", "/proc/self/mem", "/dev/zero", "/dev/null", "/", "/proc/kmsg"]
    (tmp_path / "list.txt").write_text("\n".join(places))
    for entry in index_source(tmp_path / "list.txt").entries():
        with pytest.raises(Refused):
            decode(Reader().read(entry))


def header(size: int, kind: bytes, name: bytes = b"x.jpg") -> bytes:
    block = bytearray(512)
    block[: len(name)], block[156:157], block[257:265] = name, kind, b"ustar\x0000"
    block[124:136] = b"\x80" + size.to_bytes(11, "big") if size >= 0 else (256**12 + size).to_bytes(12, "big")
    block[148:156] = b"%06o\0 " % (256 + sum(block))
    return bytes(block)


@pytest.mark.parametrize("size", [-512, 8 << 30, 1 << 50, 1 << 60, 1 << 80])
@pytest.mark.parametrize("kind", [b"0", b"L", b"K", b"x", b"g", b"S", b"1", b"7"])
def test_headers_of_tars_that_claim_what_is_not_there(tmp_path: Path, kind: bytes, size: int) -> None:
    (tmp_path / "a.tar").write_bytes(header(size, kind) + bytes(2048))
    with pytest.raises(SourceError):
        index_source(tmp_path / "a.tar")


def test_headers_without_end(tmp_path: Path) -> None:
    for kind in (b"x", b"L"):
        (tmp_path / "a.tar").write_bytes(header(0, kind) * 5000 + bytes(1024))
        with pytest.raises(SourceError, match="it is nested too deep"):
            index_source(tmp_path / "a.tar")


def test_a_raised_limit_of_pixels_allows_more_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("micl_zoo.sources.places.MAX_BYTES", 1000)
    (tmp_path / "a.jpg").write_bytes(bytes(2000))
    entry = index_source(tmp_path / "a.jpg")[0]
    with pytest.raises(Refused, match="too_large"):
        Reader().read(entry)
    assert len(Reader(max_pixels=1000).read(entry)) == 2000


def test_footers_say_what_pyarrow_reads_in_them(tmp_path: Path) -> None:
    struct = pa.array([{"bytes": jpeg(1), "path": None}] * 9)
    table = pa.table({"id": list(map(str, range(9))), "image": struct, "tags": [["a", "b"]] * 9, "a.b": [True] * 9})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4, use_dictionary=["id"], compression="zstd")
    file, end = pq.ParquetFile(tmp_path / "a.parquet").metadata, read_footer(str(tmp_path / "a.parquet"))
    assert end.size == (tmp_path / "a.parquet").stat().st_size
    for number, group in enumerate(end.groups):
        theirs = file.row_group(number)
        columns = [theirs.column(leaf) for leaf in range(theirs.num_columns)]
        assert group.rows == theirs.num_rows
        assert [one[1:] for one in group.chunks] == [
            (one.total_uncompressed_size, one.total_compressed_size, one.dictionary_page_offset) for one in columns
        ]
    assert [one.column for one in end.groups[0].chunks] == ["id", "image", "image", "tags", "a.b"]
    assert unpacked_dictionary(str(tmp_path / "a.parquet"), end.groups[0].chunks[0]) == 4 * (4 + 1)


def test_a_changed_footer_ends_no_process(tmp_path: Path) -> None:
    """pyarrow's `RowGroupMetaData.column` does on some of these, with "terminate called"."""
    pq.write_table(pa.table({"id": ["a", "b"], "image": [jpeg(1), jpeg(2)]}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    length = int.from_bytes(whole[-8:-4], "little")
    for at in range(len(whole) - 8 - length, len(whole) - 8, 7):
        for bit in (1, 16, 128):
            changed = bytearray(whole)
            changed[at] ^= bit
            (tmp_path / "b.parquet").write_bytes(changed)
            with contextlib.suppress(SourceError):
                for entry in index_source(tmp_path / "b.parquet").entries():
                    with contextlib.suppress(Refused):
                        Reader().read(entry)


@pytest.mark.parametrize(
    ("name", "text", "good", "problems"),
    [
        ("a.tsv", 'path\tcaption\n0.png\t"hello\n1.png\tworld\n2.png\tx\n', "0 1 2", []),
        ("a.tsv", 'path\tcaption\n0.png\t"hello\n1.png\tbye"\n2.png\tx\n', "0 1 2", []),
        ("a.tsv", 'path\tcaption\n0.png\t"of two\nlines"\n1.png\t"a" b\n"2.png"\t"\n', "0 1 2", []),
        ("a.tsv", 'path\n0.png\n"1.png\n2.png\n', '0 "1 2', []),
        ("a.csv", "path\n0.png\n" + '"1.png\n' + "2.png\n3.png\n4.png\n", "0 2 3 4", [3]),
        ("a.csv", 'path,caption\n0.png,"a\n1.png,"b\n2.png,c\n', "0 1 2", []),
        ("a.csv", 'path,caption\n0.png,"of two\n""lines"""\n1.png,"a" b\n2.png,c\n', "0 1 2", []),
        ("a.csv", 'path,caption\n0.png,"he said \\\\"hi\\\\""\n1.png,"a \\\\"b\\\\" c"\n', "0 1", []),
    ],
)
def test_a_quote_that_does_not_end_costs_its_own_row(
    tmp_path: Path, name: str, text: str, good: str, problems: list[int]
) -> None:
    (tmp_path / name).write_text(text)
    index = index_source(tmp_path / name)
    assert [name.removesuffix(".png") for name in index.ids] == good.split()
    assert [problem.id for problem in index.notes.problems] == [f"{name}#{line}" for line in problems]
    assert all("is no row (" in one.detail for one in index.notes.problems)


def test_a_cell_beyond_the_limit_of_csv_costs_its_own_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('path,caption\n0.png,"' + "x\n" * 70_000 + "1.png,y\n")
    index = index_source(tmp_path / "a.csv")
    assert (len(index), index.ids[-1], [one.id for one in index.notes.problems]) == (70_001, "1.png", [])
    (tmp_path / "a.csv").write_text('"path\n0.png\n')
    with pytest.raises(SourceError, match=r"line 1 of the list .* is no row"):
        index_source(tmp_path / "a.csv")


@pytest.mark.parametrize("kind", ["list.txt", "list.csv", "-"])
def test_blanks_at_the_ends_of_a_path_are_part_of_a_name_that_is_there(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [" lead.png", "trail.png ", "both.png", "\tt.png\t"]
    for name in names:
        (tmp_path / name).write_bytes(jpeg(1))
    text = "\r\n".join(["\ufeff" + ("path" if kind == "list.csv" else "both.png"), *names[:2], " both.png ", names[3]])
    if kind == "-":
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        index = index_source(["-"])
    else:
        (tmp_path / kind).write_bytes(text.encode())
        index = index_source(tmp_path / kind)
    taken = [Path(uri).name for uri in index.table["uri"].to_pylist()]
    assert taken == ["both.png"] * (kind != "list.csv") + [*names[:2], "both.png", names[3]]
    assert min(index.table["length"].to_pylist()) == len(jpeg(1))


@pytest.mark.parametrize(
    ("start", "called"), [("utf-16", "UTF-16, as"), ("utf-32", "UTF-32:"), ("utf-32-be", "UTF-32:")]
)
def test_a_list_of_wide_letters_is_called_by_its_name(tmp_path: Path, start: str, called: str) -> None:
    (tmp_path / "a.txt").write_bytes(("\ufeff" * start.endswith("be") + "a.png\n").encode(start))
    with pytest.raises(SourceError, match=f"it is not UTF-8 text but {called}"):
        index_source(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "pattern", ["raw/tmp", "raw/tmp/", "./raw/tmp", "./raw/tmp/", "tmp", "tmp/", "raw/tmp/*", "*/tm?"]
)
def test_an_exclusion_holds_in_every_kind_of_source(
    tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {"raw/tmp/below/a.png": jpeg(1), "raw/tmp/a.png": jpeg(2), "b.png": jpeg(3), "raw/tmpx/c.png": jpeg(4)}
    for name, data in members.items():
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(data)
    (tmp_path / "f/l.txt").write_text("".join(f"./{name}\n" for name in members))
    (tmp_path / "f/m.txt").write_text("".join(f"{tmp_path}/f/{name}\n" for name in members))
    (tmp_path / "f/l.csv").write_text("id,path\n" + "".join(f"{n},{name}\n" for n, name in enumerate(members)))
    tar(tmp_path / "a.tar", members)
    zipped(tmp_path / "a.zip", members)
    monkeypatch.chdir(tmp_path / "f")
    for source in ("f", "f/**/*.png", "f/l.txt", "f/m.txt", "f/l.csv", "a.tar", "a.zip", "-"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("".join(f"./{n}\n" for n in members).encode())))
        index = index_source(source if source == "-" else f"{tmp_path}/{source}", exclude=[pattern, "nothing"])
        assert len(index) == 2, (source, index.ids)
        assert index.notes.skipped["excluded"] == (1 if source in ("f", "f/**/*.png") and "/*" not in pattern else 2)


def test_an_exclusion_is_of_ids_and_of_paths(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("id,path\n1,a.png\n2,a_small.png\nthird_small.png,c.png\n")
    index = index_source(tmp_path / "l.csv", exclude=["*_small.png"])
    assert (index.ids, index.notes.skipped) == (["1"], {"excluded": 2})


def test_each_source_that_fails_is_told_and_counted_once(tmp_path: Path, image_folder: Callable[..., Path]) -> None:
    folder = image_folder(2)
    (tmp_path / "bad.tar").write_bytes(b"xxxx" * 1000)
    (tmp_path / "worse.zip").write_bytes(b"x" * 100)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "void.txt").touch()
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "zero.parquet")
    tar(tmp_path / "none.tar", {"a.md": b""})
    wrong = ["bad.tar", "nothing", "worse.zip", "void.txt", "zero.parquet", "none.tar", "nothing/*.webp"]
    for order in ([*wrong, "images"], ["images", *wrong], [*wrong[:3], "images", *wrong[3:]]):
        notes = notes_of([tmp_path / name for name in order])
        assert [problem.uri for problem in notes.problems] == [str(tmp_path / name) for name in wrong]
        assert notes.others == {".md": 1}
    with pytest.raises(SourceError, match=r"bad\.tar' as a tar.*; 5 more could not be listed"):
        index_source([tmp_path / name for name in wrong[:6]])
    assert folder.is_dir()


def test_files_without_images_are_counted_where_others_are_taken(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "zero.parquet")
    tar(tmp_path / "a.tar", {"a.jpg": jpeg(1)})
    zipped(tmp_path / "a.zip", {"a.jpg": jpeg(1)})
    notes = notes_of(tmp_path)
    assert (notes.problems, notes.others) == ([], {".parquet": 1, ".zip": 1})
    (tmp_path / "zero.parquet").write_bytes(b"PAR1")
    notes = notes_of(tmp_path)
    assert (len(notes.problems), notes.others) == (1, {".zip": 1})


def test_folders_that_a_glob_matches_are_told(tmp_path: Path) -> None:
    for name in ("2020.png", "2020-01/a.png", "2020-02/b.png", "other/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(1))
    index = index_source(f"{tmp_path}/2020*")
    assert (index.ids, index.notes.skipped) == (["2020.png"], {globs.FOLDERS: 2})
    with pytest.raises(SourceError, match=r"matches no file: looked in .*, where it met .*2 folders that the glob"):
        index_source(f"{tmp_path}/2020-*")
    (tmp_path / "2020-01" / "up").symlink_to("..")
    assert index_source(f"{tmp_path}/**/*").notes.skipped == {"links that loop": 1}
    (tmp_path / "2020-01" / "up").unlink()
    for whole in ("**", "**/*", "2020*/*", "2020-0[12]/**"):
        assert not index_source(f"{tmp_path}/{whole}").notes.skipped


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.date32(), 10**8),
        (pa.timestamp("us"), 2**62),
        (pa.timestamp("us", "Mars/X"), 1),
        (pa.duration("s"), 2**62),
        (pa.time64("us"), 10**18),
        (pa.list_(pa.string()), ["x.jpg"]),
        (pa.string(), ""),
        (pa.string(), None),
    ],
)
def test_a_path_beside_no_bytes_that_is_no_text_is_none(tmp_path: Path, kind: pa.DataType, value: Any) -> None:
    cells = pa.StructArray.from_arrays([pa.array([None, jpeg(1)]), pa.array([value, None], kind)], ["bytes", "path"])
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
    index = index_source(tmp_path / "a.parquet")
    with pytest.raises(Refused, match="empty: the parquet cell is null"):
        Reader().read(index[0])
    assert Reader().read(index[1]) == jpeg(1)


def test_a_path_beside_no_bytes_is_text_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(jpeg(2))
    texts = [pa.array(["x.jpg"]), pa.array(["x.jpg"], pa.large_string()), pa.array(["x.jpg"]).dictionary_encode()]
    for text in texts:
        cells = pa.StructArray.from_arrays([pa.array([None], pa.binary()), text], ["bytes", "path"])
        pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
        assert read_all(tmp_path / "a.parquet") == [jpeg(2)]
    odd = pa.StringArray.from_buffers(1, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe"))
    cells = pa.StructArray.from_arrays([pa.array([None], pa.binary()), odd], ["bytes", "path"])
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
    with pytest.raises(Refused, match=r"unreadable: .*No such file.*\\xff\\\\xfe"):
        read_all(tmp_path / "a.parquet")


def test_ids_of_an_unknown_time_zone_are_of_utc(tmp_path: Path) -> None:
    for zone, first in (("Mars/X", "1970-01-01 00:00:01.000"), ("Europe/Berlin", "1970-01-01 01:00:01.000+0100")):
        write_columns(tmp_path / "a.parquet", id=pa.array([1, 2], pa.timestamp("s", zone)), image=[jpeg(0), jpeg(1)])
        assert ids(tmp_path / "a.parquet")[0] == first


def test_a_footer_of_many_row_groups_and_columns_is_read(tmp_path: Path) -> None:
    columns = {f"column-{number}": list(range(300)) for number in range(40)}
    pq.write_table(pa.table({"image": [b"x"] * 300, **columns}), tmp_path / "a.parquet", row_group_size=1)
    groups = read_footer(str(tmp_path / "a.parquet")).groups
    assert [(group.rows, len(group.chunks), group.chunks[40].column) for group in groups] == [
        (1, 41, "column-39")
    ] * 300


def test_a_footer_of_other_types_is_damaged() -> None:
    for found in ({3: [5]}, {3: [b"a"], 11: b"x"}, {3: [b"a"], 6: [1]}):
        with pytest.raises(TypeError):
            footer._chunk({3: found})
    for odd in (b"\x19\xfc" + b"\xff" * 9 + b"\x7f", b"\x19\xf0\xff\xff\x7f", b"\x18\xff\xff\x7f", b"\x1b\x7f\xdd"):
        with pytest.raises(IndexError):
            footer._struct(odd + b"\x01" * 20, 0, footer._WANTED)


def test_a_zip_whose_names_are_not_what_they_are_said_to_be(tmp_path: Path) -> None:
    data = zipped(tmp_path / "a.zip", {"caf\u00e9.jpg": jpeg(1), "b.jpg": jpeg(2)}).read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace("\u00e9".encode(), b"\xff\xff"))
    with pytest.raises(SourceError, match=r"a\.zip' has a name that is said to be UTF-8 text and is none: unpack it"):
        index_source(tmp_path / "a.zip")
