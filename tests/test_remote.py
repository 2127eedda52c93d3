"""Object stores and web servers: the same ids, order and bytes as from a folder, against real servers on loopback."""

from __future__ import annotations

import contextlib
import functools
import gzip
import http.server
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture
from damaged import encoded

from micl_zoo.errors import Refused, SourceError, StoreError
from micl_zoo.extraction.extract import extract
from micl_zoo.sources import globs, remote
from micl_zoo.sources.index import Entry
from micl_zoo.sources.listing import index_source, list_source
from micl_zoo.sources.reader import Reader
from micl_zoo.stores.store import open_store
from micl_zoo.training.evaluation.labelled import LabelledSet

BUCKET = "pictures"


def jpeg(seed: int) -> bytes:
    return encoded(picture(seed), "JPEG")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of source, as files."""
    root = tmp_path_factory.mktemp("tree")
    for n, name in enumerate(("b.jpg", "a/x y.jpg", "a/z.PNG", "a.b/c.jpg", ".hidden.jpg", ".git/d.jpg", "notes.md")):
        (root / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "photos" / name).write_bytes(jpeg(n))
    for folder in ("tars", "zips", "tables", "lists"):
        (root / folder).mkdir()
    for n in range(3):
        with tarfile.open(root / f"tars/t-{n:02d}.tar", "w") as archive:
            archive.add(root / "photos/a", arcname="a")
        with zipfile.ZipFile(root / f"zips/t-{n:02d}.zip", "w", zipfile.ZIP_DEFLATED) as packed:
            packed.write(root / "photos/b.jpg", "b.jpg")
            packed.write(root / "photos/a/z.PNG", "a/z.PNG")
        images = [{"bytes": jpeg(10 * n + i), "path": ""} for i in range(3)]
        pq.write_table(pa.table({"image": images}), root / f"tables/t-{n}.parquet", row_group_size=2)
    (root / "plain_text").mkdir()
    for part, labels in (("train", [7, 3, 7]), ("test", [3, 3])):
        cells = [{"bytes": jpeg(n), "path": ""} for n in range(len(labels))]
        pq.write_table(pa.table({"image": cells, "label": labels}), root / f"plain_text/{part}-0.parquet")
    (root / "lists/list.txt").write_text("../photos/b.jpg\n", encoding="utf-8")
    (root / "empty").mkdir()
    (root / "empty/notes.md").write_text("no image")
    return root


@pytest.fixture(scope="module")
def s3(tree: Path) -> Iterator[Callable[[str], str]]:
    """The tree in a bucket of a server that speaks S3."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (names | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
            patch.setenv(name, value)
        import s3fs

        files = s3fs.S3FileSystem()
        files.mkdir(BUCKET)
        for path in tree.rglob("*"):
            if path.is_file():
                files.pipe_file(f"{BUCKET}/{path.relative_to(tree).as_posix()}", path.read_bytes())
        files.pipe_file(f"{BUCKET}/photos/a/", b"")  # as consoles mark a folder
        files.pipe_file(f"{BUCKET}/lists/keys.csv", f"id,uri\none,s3://{BUCKET}/photos/b.jpg\n".encode())
        yield lambda name: f"s3://{BUCKET}/{name}"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that answers byte ranges, and fails as often as it is told."""

    failures = 0
    asked: list[tuple[str, str | None]] = []  # noqa: RUF012 - shared by the requests of a test

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.asked.append((self.path, wanted))
        if Ranges.failures:
            Ranges.failures -= 1
            self.send_error(503)
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        path = Path(self.translate_path(self.path))
        if span is None or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        part = data[int(span[1]) : int(span[2]) + 1 if span[2] else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {span[1]}-{int(span[1]) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


class Hub(Ranges):
    """As much of the Hugging Face hub as a data set's folder needs."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path in ("/api/datasets/micl/tiny", "/api/datasets/micl/tiny/revision/main"):
            self.answer({"id": "micl/tiny", "sha": "0" * 40})
        elif path.startswith("/api/datasets/micl/tiny/tree/main"):
            folder = Path(self.translate_path(path.removeprefix("/api/datasets/micl/tiny/tree/main") or "/"))
            if folder.is_dir():
                self.answer(self.infos(folder.iterdir()))
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
        else:
            self.path = self.path.replace("/datasets/micl/tiny/resolve/main/", "/")
            super().do_GET()

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        paths = form.get("paths") or []
        self.answer(self.infos(path for name in paths if (path := Path(self.translate_path("/" + name))).exists()))

    def infos(self, paths: Iterable[Path]) -> list[dict[str, object]]:
        root = Path(self.translate_path("/"))
        kinds = {True: "directory", False: "file"}
        return [
            {
                "path": p.relative_to(root).as_posix(),
                "type": kinds[p.is_dir()],
                "size": p.stat().st_size,
                "oid": "0" * 40,
            }
            for p in paths
        ]

    def answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class NoRanges(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def serve(tree: Path) -> Iterator[Callable[..., str]]:
    """Starts a web server over the tree; gives its address."""
    pytest.importorskip("aiohttp")
    servers = []

    def start(kind: Any = Ranges, *, folder: bool = True) -> str:
        handler = functools.partial(kind, directory=str(tree)) if folder else kind
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    Ranges.failures = 0
    Ranges.asked.clear()
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def listed(source: object) -> list[tuple[str, bytes]]:
    reader = Reader()
    return [(entry.id, reader.read(entry)) for entry in index_source(source).entries()]  # type: ignore[arg-type]


SOURCES = (
    "photos",
    "photos/b.jpg",
    "photos/*/*.jpg",
    "photos/**/*.{jpg,PNG}",
    "photos/a/{z.PNG,x y.jpg}",
    "tars",
    "tars/t-01.tar",
    "tars/t-{00..02}.tar",
    "tars/*-0[12].tar",
    "zips",
    "zips/t-00.zip",
    "zips/t-{00,02}.zip",
    "tables",
    "tables/t-1.parquet",
    "tables/t-?.parquet",
)


@pytest.mark.parametrize("source", SOURCES)
def test_s3_is_as_a_folder(s3: Callable[[str], str], tree: Path, source: str) -> None:
    here, there = index_source(tree / source), index_source(s3(source))
    assert listed(s3(source)) == listed(tree / source)
    assert there.fingerprint() == here.fingerprint()
    assert all(entry.uri.startswith(f"s3://{BUCKET}/") for entry in there.entries())


def test_lists_in_s3_and_of_it(s3: Callable[[str], str], tmp_path: Path) -> None:
    assert index_source(s3("lists/keys.csv"))[0] == Entry("one", s3("photos/b.jpg"), "file", 0, 0)
    assert listed(s3("lists/keys.csv")) == [("one", jpeg(0))]
    (tmp_path / "list.txt").write_text(f"{s3('photos/b.jpg')}\n{s3('photos/gone.jpg')}\n")
    index = index_source(tmp_path / "list.txt")
    assert Reader().read(index[0]) == jpeg(0)
    with pytest.raises(Refused, match=r"unreadable: .*gone\.jpg"):
        Reader().read(index[1])
    assert len(index_source([s3("photos"), s3("tars")])) == 10


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("empty", r"no images in 's3://pictures/empty': .*found 1 other files \(\.md 1\)"),
        ("nothing/here", "no such source: 's3://pictures/nothing/here'"),
        ("nothing.jpg", r"no such source: 's3://pictures/nothing\.jpg' cannot be read \(nothing is there: "),
        ("tars/t-{02..03}.tar", r"the glob 's3://pictures/tars/t-03\.tar', which .* asks for, matches no file"),
        ("photos/*.webp", r"matches no file: looked in 's3://pictures/photos', where it met 3 other files \(\.jpg 2, "),
        ("gone.tar", r"cannot read 's3://pictures/gone\.tar' as a tar"),
    ],
)
def test_what_is_not_in_s3_is_said(s3: Callable[[str], str], source: str, text: str) -> None:
    with pytest.raises(SourceError, match=text):
        index_source(s3(source))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_reader_opens_its_own_connections(s3: Callable[[str], str]) -> None:
    indexes, reader = [index_source(s3(name)) for name in ("photos", "tars", "zips", "tables")], Reader()

    def read() -> list[bytes]:
        return [reader.read(entry) for index in indexes for entry in index.entries()]

    before = read()
    children = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            try:
                os._exit(0 if read() == before else 1)
            finally:
                os._exit(2)
        children.append(child)
    assert read() == before
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def test_a_web_server(serve: Callable[..., str], tree: Path) -> None:
    web = serve()
    assert listed(f"{web}/photos/b.jpg") == [("b.jpg", jpeg(0))]
    assert listed(f"{web}/photos/b.jpg?size=full") == [("b.jpg?size=full", jpeg(0))]
    for source in ("tars/t-{00..02}.tar", "zips/t-01.zip", "tables/t-1.parquet"):
        assert listed(f"{web}/{source}") == listed(tree / source)
    assert [name for name, _ in listed(f"{web}/photos/")] == ["b.jpg", "a/x%20y.jpg", "a/z.PNG", "a.b/c.jpg"]
    assert listed(f"{web}/tars/*.tar") == listed(tree / "tars")
    assert listed(f"{web}/lists/list.txt") == [("../photos/b.jpg", jpeg(0))]


def test_a_member_is_one_ranged_request(serve: Callable[..., str]) -> None:
    entries = [index_source(f"{serve()}/{name}")[0] for name in ("tars/t-00.tar", "zips/t-00.zip")]
    for entry in entries:
        Ranges.asked.clear()
        Reader().read(entry)
        ((path, wanted),) = Ranges.asked
        assert entry.uri.endswith(path)
        assert wanted is not None
        assert wanted.startswith(f"bytes={entry.offset}-")


def test_a_server_without_ranges_serves_files_only(serve: Callable[..., str]) -> None:
    plain = serve(NoRanges)
    assert listed(f"{plain}/photos/b.jpg") == [("b.jpg", jpeg(0))]
    assert listed(f"{plain}/lists/list.txt") == [("../photos/b.jpg", jpeg(0))]
    entry = index_source(f"{serve()}/tars/t-00.tar")[0]
    with pytest.raises(Refused, match="serves no byte ranges"):
        Reader().read(entry._replace(uri=f"{plain}/tars/t-00.tar"))


def test_a_failing_server_is_asked_three_times(serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=waits.append))
    entry = index_source(f"{serve()}/photos/b.jpg")[0]
    Ranges.failures = 2
    assert Reader().read(entry) == jpeg(0)
    assert waits == [0.5, 2.0]
    Ranges.failures = 3
    with pytest.raises(Refused, match=r"unreadable: .*photos/b\.jpg: answer 503 Service Unavailable, at the third try"):
        Reader().read(entry)
    assert not Ranges.failures
    waits.clear()
    with pytest.raises(Refused, match="unreadable"):
        Reader().read(entry._replace(uri=entry.uri.replace("b.jpg", "gone.jpg")))
    assert not waits


def test_a_data_set_of_the_hub(serve: Callable[..., str], tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("fsspec.config")
    monkeypatch.setitem(config.conf, "hf", {"endpoint": serve(Hub), "token": False})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for source in ("photos", "photos/b.jpg", "tars/*.tar", "zips/t-00.zip", "tables", "tables/t-{0,2}.parquet"):
        assert listed(f"hf://datasets/micl/tiny/{source}") == listed(tree / source), source


def test_a_labelled_set_of_the_hub(serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("fsspec.config")
    monkeypatch.setitem(config.conf, "hf", {"endpoint": serve(Hub), "token": False})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = LabelledSet.open("micl/tiny")
    assert (found.name, found.classes) == ("micl/tiny", ("3", "7"))
    assert found.train.labels.tolist() == [1, 0, 1]
    assert found.test.labels.tolist() == [0, 0]
    assert Reader().read(found.train.index[2]) == jpeg(2)


def test_file_uris_are_paths(tree: Path) -> None:
    for source in ("photos", "photos/a/x y.jpg", "photos/*/*.jpg", "tars/t-{00..01}.tar"):
        plain = index_source(tree / source)
        for scheme in ("file", "FILE"):
            assert index_source(f"{scheme}://{tree}/{source}".replace(" ", "%20")).table == plain.table


def test_any_file_system_of_fsspec(tree: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for path in tree.rglob("*.*"):
        if path.is_file():
            memory.pipe_file(f"/box/{path.relative_to(tree).as_posix()}", path.read_bytes())
    try:
        for source in SOURCES:
            assert listed(f"memory://box/{source}") == listed(tree / source), source
        pieces = list(list_source("memory://box/photos", chunk_rows=3))
        assert [len(piece) for piece in pieces] == [3, 1]
    finally:
        memory.rm("/box", recursive=True)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")

    def missing(protocol: str) -> Any:
        raise ImportError(f"Install {protocol}fs")

    with pytest.raises(SourceError, match="starts with nope://, which fsspec does not know"):
        index_source("nope://bucket/a.jpg")
    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(SourceError, match=re.escape("pip install 'micl-zoo[remote]'")):
        index_source("s3://b/x/")
    with pytest.raises(Refused, match=re.escape("pip install 'micl-zoo[remote]'")):  # may pass: it is no verdict on it
        Reader().read(Entry("a", "s3://b/a.jpg", "file", 0, 1))


@pytest.mark.parametrize("uri", ["s3://", "http://[::1", "reference://x", "dir://", "github://a:b@c/d.png"])
def test_an_address_that_cannot_be_used_costs_its_own_line(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote, "WAITS", ())
    with pytest.raises(Refused, match="unreadable"):
        Reader().read(Entry("a", uri, "file", 0, 0))


class Hostile(http.server.BaseHTTPRequestHandler):
    """Answers without end, claims what no server has, packs gigabytes into kilobytes, or says nothing."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(1 << 50))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        what = self.path.rpartition("/")[2]
        if what.startswith("hang"):
            time.sleep(3)
            return
        self.send_response(206 if what.startswith("range") else 200)
        if what.startswith("gzip"):
            self.send_header("Content-Encoding", "gzip")
        if not what.startswith("endless"):
            self.send_header("Content-Length", str(1 << 50))
        self.end_headers()
        block = gzip.compress(bytes(10 << 20)) if what.startswith("gzip") else bytes(1 << 20)
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(block)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("name", ["endless", "claims", "gzip", "range", "hang"])
@pytest.mark.parametrize("ending", ["", ".jpg", ".csv", ".jsonl", ".tar", ".zip", ".parquet"])
def test_a_hostile_web_server_costs_little(
    name: str, ending: str, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "WAITS", ())
    monkeypatch.setattr(remote, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr("micl_zoo.sources.lists.LIST_BYTES", 5 << 20)
    monkeypatch.setattr("micl_zoo.sources.places.MAX_BYTES", 5 << 20)
    pytest.importorskip("fsspec").get_filesystem_class("http").clear_instance_cache()
    uri = f"{serve(Hostile, folder=False)}/{name}{ending}"
    with pytest.raises((SourceError, Refused)):
        Reader().read(index_source(uri)[0])


def test_a_remote_file_seeks_and_reads_like_any_other(tree: Path) -> None:
    pytest.importorskip("fsspec").filesystem("memory").pipe_file("/numbers", bytes(range(100)))
    file = remote.RemoteFile("memory://numbers")
    assert (file.seek(-10, io.SEEK_END), file.read()) == (90, bytes(range(90, 100)))
    assert (file.seek(5), file.seek(5, io.SEEK_CUR), file.read(3), file.tell()) == (5, 10, bytes((10, 11, 12)), 13)
    assert (file.seek(200), file.read()) == (200, b"")


def test_local_sources_import_nothing_remote(tree: Path) -> None:
    code = (
        "import sys; from micl_zoo.sources.listing import index_source; from micl_zoo.sources.reader import Reader\n"
        "for entry in index_source(sys.argv[1:]).entries(): Reader().read(entry)\n"
        "print([name for name in ('fsspec', 's3fs', 'aiohttp') if name in sys.modules])"
    )
    words = [str(tree / name) for name in ("photos", "tars", "zips", "tables", "lists/list.txt")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_extract_from_and_to_an_object_store(
    tree: Path, s3: Callable[[str], str], encoder_folder: Path, tmp_path: Path, processes: int
) -> None:
    options: dict[str, Any] = {"weights": encoder_folder, "workers": 2, "shard_rows": 2, "devices": "cpu"}
    out = s3(f"embeddings-{processes}")
    first = extract(s3("photos"), out, processes=processes, limit=2, **options)
    assert (first.embedded, first.images) == (2, 2)
    summary = extract(s3("photos"), out, processes=processes, only_missing=True, **options)
    assert (summary.embedded, summary.computed, summary.shards_before) == (4, 2, 1)
    extract(tree / "photos", tmp_path / "here", **options)
    there, here = open_store(out), open_store(tmp_path / "here")
    assert (there.complete, there.ids) == (True, here.ids)
    np.testing.assert_array_equal(there.embeddings, here.embeddings)
    assert there.folder.names() == [
        "errors.jsonl",
        "index",
        "manifest.json",
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    with pytest.raises(StoreError, match="pool: 'cls' in the store, 'mean' asked for"):
        extract(s3("photos"), out, pool="mean", **options)
    extract(s3("photos"), out, pool="mean", overwrite=True, **options)
    assert open_store(out).manifest.pool == "mean"


def test_a_key_is_meant_where_it_looks_like_a_glob(s3: Callable[[str], str]) -> None:
    import s3fs

    keys = ["a[1].png", "a*.png", "b?.png", "{x,y}.png", "d[0]/c.png", "t{1..2}.csv"]
    twins = ["a1.png", "ab.png", "bc.png", "x.png", "y.png", "d0/c.png", "d0/e.png"]
    data = {name: b"path\na1.png\n" if name.endswith(".csv") else jpeg(n) for n, name in enumerate(keys + twins)}
    for name, content in data.items():
        s3fs.S3FileSystem().pipe_file(f"{BUCKET}/odd/{name}", content)
    for name in keys[:4]:
        assert listed(s3(f"odd/{name}")) == [(name, data[name])]
        assert listed(s3(f"odd/{globs.escape(name)}")) == [(name, data[name])]
    assert listed(s3("odd/d[0]")) == listed(s3("odd/d[0]/")) == [("c.png", data["d[0]/c.png"])]
    assert listed(s3("odd/d[[]0]/*.png")) == [("c.png", data["d[0]/c.png"])]
    assert listed(s3("odd/t{1..2}.csv")) == [("a1.png", data["a1.png"])]
    assert [name for name, _ in listed(s3("odd/a[2-9b].png"))] == ["ab.png"]
    with pytest.raises(SourceError, match=r"matches no file.*a \*, \?, \[ or \{ of a name is written \[\*\]"):
        index_source(s3("odd/a[2].png"))


def test_keys_that_no_path_leads_to_are_counted(s3: Callable[[str], str]) -> None:
    import s3fs

    keys = ["d//b.png", "d/e.png", "?q.png", "sub/x.png", "z.png/", "z.png/i.png", "a///b.png", "b?c.png", "m/m.png"]
    for key in keys:
        s3fs.S3FileSystem().pipe_file(f"{BUCKET}/keys/{key}", jpeg(1))
    s3fs.S3FileSystem().pipe_file(f"{BUCKET}/keys/m/", b"")
    for source in ("keys", "keys/**/*"):
        index = index_source(s3(source))
        assert sorted(index.ids) == ["?q.png", "b?c.png", "d/e.png", "m/m.png", "sub/x.png", "z.png/i.png"]
        assert index.notes.skipped == {"keys that end in / or have nothing between two": 3}
        assert {data for _, data in listed(s3(source))} == {jpeg(1)}
    s3fs.S3FileSystem().mkdir("lead")
    s3fs.S3FileSystem().pipe_file("lead//a.png", jpeg(1))
    s3fs.S3FileSystem().pipe_file("lead/b.png", jpeg(1))
    index = index_source("s3://lead")
    assert (index.ids, sum(index.notes.skipped.values()), index.notes.problems) == (["b.png"], 1, [])


class Odd(http.server.BaseHTTPRequestHandler):
    """Answers with the status that the name says, or with a picture or a list of one."""

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        status = int(name[:3]) if name[:3].isdigit() else 200
        data = b"a.png\n./b.png\n" if name.endswith(".txt") else jpeg(3)
        self.send_response(status, "Nope" if status == 403 else None)
        self.send_header("Content-Length", str(len(data)))
        if status == 302:
            self.send_header("Location", self.path)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("403", "answer 403 Nope"),
        ("404", "answer 404 Not Found"),
        ("410", "answer 410 Gone"),
        ("302", "TooManyRedirects"),
    ],
)
@pytest.mark.parametrize("ending", ["png", "tar", "zip", "parquet", "txt"])
def test_a_web_server_s_refusal_is_told(
    serve: Callable[..., str], status: str, said: str, ending: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=lambda _: None))
    web = serve(Odd, folder=False)
    with pytest.raises(SourceError, match=rf"/{status}\.{ending}'.*{said}") as caught:
        index_source(f"{web}/{status}.{ending}")
    assert "again" not in str(caught.value)
    if ending == "png":
        (tmp_path / "list.txt").write_text(f"{web}/{status}.png")
        with pytest.raises(Refused, match=f"unreadable: .*{said}"):
            listed(tmp_path / "list.txt")
        with pytest.raises(SourceError, match="Cannot connect to host"):
            index_source("http://127.0.0.1:1/x.png")


def test_addresses_with_capitals_and_slashes_in_their_query(
    serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    web = serve(Odd, folder=False)
    capitals = web.replace("http", "HttP")
    assert remote.is_web(capitals)
    monkeypatch.setattr(remote, "BLOCK", 1 << 10)
    for address in (web, capitals):
        assert listed(f"{address}/list.txt?token=a/b") == [("a.png", jpeg(3)), ("./b.png", jpeg(3))]
        assert listed(f"{address}/a.png?x=1&y=/b") == [("a.png?x=1&y=/b", jpeg(3))]
        with pytest.raises(Refused, match="too_large"):
            remote.read_file(f"{address}/a.png", 0, 100)


def test_a_scheme_in_capitals_is_an_object_store_s(s3: Callable[[str], str]) -> None:
    assert listed("S" + s3("photos")[1:]) == listed(s3("photos"))
    assert listed("S" + s3("photos/*/*.jpg")[1:]) == listed(s3("photos/*/*.jpg"))
