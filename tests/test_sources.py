"""Every source becomes the same kind of index."""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import json
import os
import sys
import tarfile
import zipfile
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture
from damaged import encoded
from PIL import Image

from micl_zoo.errors import Refused, SourceError, UsageError
from micl_zoo.extraction.extract import Summary, extract
from micl_zoo.images.decode import decode
from micl_zoo.images.formats import FORMATS, SUFFIXES, readable
from micl_zoo.sources import archives, globs
from micl_zoo.sources import listing as sources
from micl_zoo.sources.index import Entry, Fingerprint, ImageIndex
from micl_zoo.sources.kinds import KINDS, Kind
from micl_zoo.sources.listing import index_source, list_source
from micl_zoo.sources.places import File, OpenFiles
from micl_zoo.sources.reader import Reader
from micl_zoo.stores.store import open_store


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


def damaged() -> Iterator[tuple[str, Callable[[bytes], bytes], str]]:
    yield "within", lambda data: data[:3000], "unexpected end of data"
    yield "boundary", lambda data: data[:3072], "it stops at byte 3072 without an end-of-archive mark"
    yield "header", lambda data: data[:1700] + b"XX" + data[1702:], "the header at byte 1536 is damaged"
    yield "first", lambda data: b"XX" + data[2:], "bad checksum"
    yield "empty", lambda data: b"", "empty file"
    yield "text", lambda data: b"no tar at all" * 100, "invalid header|bad checksum"
    yield "joined", lambda data: data + data, "more follows its end at byte 4608"


@pytest.mark.parametrize(("change", "text"), [case[1:] for case in damaged()], ids=[case[0] for case in damaged()])
def test_a_damaged_tar_is_not_half_listed(tmp_path: Path, change: Callable[[bytes], bytes], text: str) -> None:
    path = tar(tmp_path / "a.tar", {f"{n}.jpg": b"j" * 1000 for n in range(3)})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SourceError, match=rf"cannot read '.*a\.tar' as a tar: .*({text})"):
        index_source(path)


def test_a_sparse_member_and_no_image_at_all(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"a.jpg": b"j" * 600}, form=tarfile.GNU_FORMAT)
    header = bytearray(path.read_bytes()[:512])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
    path.write_bytes(bytes(header) + path.read_bytes()[512:])
    with pytest.raises(SourceError, match=r"holds 'a\.jpg' as a sparse file"):
        index_source(path)
    with pytest.raises(SourceError, match=r"no images in .*b\.tar': looked for members ending in .*found 1 others"):
        index_source(tar(tmp_path / "b.tar", {"a.cls": b"1"}))


def test_a_tar_that_shrank_or_holds_a_name_twice(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"a.jpg": jpeg(0)})
    index = index_source(path)
    os.truncate(path, 600)
    with pytest.raises(Refused, match=r"a\.tar is shorter than it was when its members were listed"):
        Reader().read(index[0])
    with tarfile.open(tar(tmp_path / "b.tar", {"a.jpg": jpeg(0)}), "a") as archive:
        archive.addfile(tarfile.TarInfo("./a.jpg"))
    with pytest.raises(SourceError, match=r"the id 'b\.tar#a\.jpg' occurs more than once"):
        index_source(tmp_path / "b.tar")


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
    lines = [f"{entry.id}\0{entry.offset}\0{entry.length}\n" for entry in index.entries()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_an_id_is_found_again_in_any_later_piece(tmp_path: Path) -> None:
    names = [f"{n}.jpg" for n in range(500)]
    for again in (0, 7, 250, 499):
        (tmp_path / "list.txt").write_text("\n".join([*names, names[again]]))
        with pytest.raises(SourceError, match=rf"the id '{again}\.jpg' occurs more than once"):
            list(list_source(tmp_path / "list.txt", chunk_rows=1 + again % 97))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are text")
def test_a_name_that_looks_like_another_s_bytes(tmp_path: Path) -> None:
    for name in (b"caf\xe9.jpg", rb"caf\xe9.jpg", b"caf\xc3\xa9.jpg"):
        (tmp_path / os.fsdecode(name)).touch()
    with pytest.raises(SourceError, match=r"the id 'caf\\\\xe9\.jpg' occurs more than once"):
        index_source(tmp_path)


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
        ("a.csv", "path\n", "is empty"),
        ("a.csv", "", "is empty"),
        ("a.jsonl", '{"path": "a.jpg"}\n{"path": ', "line 2 of the list .* is no JSON object: Expecting"),
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
        (central + 8, 1, "'a.jpg' encrypted: unpack it"),
        (central + 10, 12, "compression method 12: pack"),
    ):
        path.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
        with pytest.raises(SourceError, match=text):
            index_source(path)
    for broken in (b"", b"PK", data[:-30], b"x" * 3000):
        path.write_bytes(broken)
        with pytest.raises(SourceError, match=r"cannot read '.*a\.zip' as a zip: .*Copy or pack it again"):
            index_source(path)
    with pytest.raises(SourceError, match=r"no images in .*b\.zip': looked for members .*found 1 others"):
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

    def list_lines(file: File) -> archives.Members:
        at = 0
        for line in Path(file.place).read_text().splitlines(keepends=True):
            name, comma, data = line.rstrip().partition(",")
            yield (f"{file.name}#{name}", at + len(name) + 1, len(data)) if comma else None
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
    calls: Counter[str] = Counter()
    for name, owner in (("parquet_row_groups", archives), ("load", archives._Cells)):
        whole = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, name=name, whole=whole: calls.update([name]) or whole(*args))
    reader, index = Reader(), index_source(tmp_path / "a.parquet")
    assert [reader.read(entry) for entry in index.entries()] == rows
    assert calls == {"parquet_row_groups": 1, "load": 300}
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
