"""A store that somebody else has made contacts nobody: its images on servers are read only where the user says so."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pytest
from click.testing import CliRunner
from stores import ODD_NAME, make_store, reopened

import micl_zoo
from micl_zoo import Store
from micl_zoo.cli import main
from micl_zoo.errors import Refused
from micl_zoo.sources.index import Entry, ImageIndex
from micl_zoo.stores.originals import Originals
from micl_zoo.stores.search import search
from micl_zoo.stores.verify import verify

pytest.importorskip("aiohttp")


class Handler(http.server.SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        super().do_HEAD()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def server(tmp_path: Path, asked: list[str]) -> Iterator[str]:
    kind = type("Recording", (Handler,), {"asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=tmp_path)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, encoder_folder: Path) -> Store:
    return make_store(tmp_path_factory.mktemp("made"), encoder_folder, bad=False)


def at(made: Store, folder: Path, shards: range, server: str) -> Store:
    """A copy of a store and its images in a folder; those of some shards are named as if they were on a server."""
    shutil.copytree(made.path.parent / "images", folder / "images")
    store = micl_zoo.open_store(shutil.copytree(made.path, folder / "store"))
    for shard in shards:
        table = store.shard(shard).table
        uris = [f"{server}/images/{quote(name)}" for name in table["id"].to_pylist()]
        store.write_index(shard, ImageIndex(table.set_column(1, table.schema.field("uri"), pa.array(uris))))
    return reopened(store)


def test_no_server_of_an_index_is_asked_unless_the_user_says_so(
    made: Store, tmp_path: Path, server: str, asked: list[str], encoder_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = at(made, tmp_path, range(3), server)
    found = verify(store, sample=99, weights=encoder_folder, device="cpu")
    told = f"10 images are at '{server}', which is not asked for them without --remote"
    assert (found.sampled, found.gone, found.problems) == (0, [], [])
    assert told in found.summary()
    search(store, ids=[ODD_NAME], picture=tmp_path / "x.png")
    assert told in caplog.text
    assert asked == []

    found = verify(store, sample=99, weights=encoder_folder, device="cpu", remote=True)
    assert (found.problems, found.gone, found.unasked, found.sampled) == ([], [], "", 10)
    assert len(set(asked)) == 10
    caplog.clear()
    search(store, ids=[ODD_NAME], picture=tmp_path / "y.png", remote=True)
    assert caplog.text == ""
    assert (tmp_path / "x.png").read_bytes() != (tmp_path / "y.png").read_bytes()


def test_the_rest_of_a_sample_is_compared(made: Store, tmp_path: Path, encoder_folder: Path) -> None:
    store = at(made, tmp_path, range(1, 2), "ftp://127.0.0.1:9")
    words = ["verify", str(store.path), "--weights", str(encoder_folder), "--device", "cpu"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "; 6 embedded again" in result.output
    assert "not compared: 4 images are at 'ftp://127.0.0.1:9'" in result.output
    result = CliRunner().invoke(main, [*words, "--remote"])
    assert "4 no longer readable" in result.output


def test_the_server_of_the_store_has_been_named(
    made: Store, tmp_path: Path, server: str, asked: list[str], encoder_folder: Path
) -> None:
    at(made, tmp_path, range(3), server)
    store = micl_zoo.open_store(f"{server}/store")
    view = store.snapshot(range(3))  # a web server lists no folders
    entries = [entry for shard in view.done() for entry in store.shard(shard).entries()]
    asked.clear()
    originals = Originals(store, remote=False)
    assert all(originals.read(entry) for entry in entries)
    assert len(asked) >= 10


@pytest.mark.parametrize(
    ("location", "uri", "read"),
    [
        ("s3://bucket/store", "s3://bucket/photos/a.jpg", True),
        ("S3://Bucket/store", "s3://bucket/photos/a.jpg", True),
        ("s3://bucket/store", "s3://other/a.jpg", False),
        ("s3://bucket/store", "s3://bucket2/a.jpg", False),
        ("s3://bucket/store", "gs://bucket/a.jpg", False),
        ("https://good/store", "http://good/a.jpg", False),
        ("https://good/store", "https://good:8080/a.jpg", False),
        ("https://good/store", "https://good@evil/a.jpg", False),
        ("https://good/store", "https://good\\@evil/a.jpg", False),
        ("https://good/store", "https://good?@evil/a.jpg", False),
        ("https://good/store", "https://good.evil/a.jpg", False),
        ("https://good/store", "https://[good/a.jpg", False),
        ("https://good/store", "github://a:b@/x", False),
        ("https://good/store", "reference://x", False),
        ("here/store", "http://127.0.0.1:9/a.jpg", False),
        ("here/store", "/photos/a.jpg", True),
        ("here/store", "file:///photos/a.jpg", True),
        ("s3://bucket/store", "/photos/a.jpg", True),
    ],
)
def test_what_the_user_has_named(
    made: Store, monkeypatch: pytest.MonkeyPatch, location: str, uri: str, read: bool
) -> None:
    monkeypatch.setattr(made.folder, "location", location)
    entry = Entry("a.jpg", uri, "file", 0, 1)
    originals = Originals(made, remote=False)
    assert originals.may_read(entry) is read
    assert (originals.unasked() == "") is read
    assert Originals(made, remote=True).may_read(entry)
    if not read:
        with pytest.raises(Refused, match="--remote"):
            originals.read(entry)


def test_few_servers_are_named(made: Store) -> None:
    originals = Originals(made, remote=False)
    for number in (1, 1, 2, 3, 4, 5):
        originals.may_read(Entry("a", f"http://host{number}\x1b/a", "file", 0, 1))
    assert originals.unasked().startswith(r"6 images are at 'http://host1\x1b', ")
    assert " and 2 more, which" in originals.unasked()
