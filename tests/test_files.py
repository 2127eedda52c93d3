"""Files and locks on file systems that lack something: one line of warning and on; errors name the file."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from micl_zoo import files
from micl_zoo.errors import StoreError
from micl_zoo.files import LOCK_FILE, OWNER_FILE, Folder, atomic_path, write_text
from micl_zoo.stores.manifest import read_manifest

fcntl = pytest.importorskip("fcntl")


@pytest.fixture(autouse=True)
def _untold() -> None:
    files._warn_once.cache_clear()


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_whoever_may_read_a_folder_may_read_its_files(tmp_path: Path) -> None:
    for mode in (0o600, 0o666):  # as writers with temporary files of their own leave it, and others
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("x")
            temporary.chmod(mode)
        (tmp_path / "plain").write_text("x")
        assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EACCES]
)
def test_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, number: int) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    for _ in range(2):
        with Folder(tmp_path).lock(), pytest.raises(StoreError, match=r"another process is writing .* delete '.*owner"):
            Folder(tmp_path).lock()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "this file system has no locks" in caplog.text
    assert not (tmp_path / OWNER_FILE).exists()


def test_a_lock_that_another_has_where_that_is_called_a_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def smb(file: Any, how: int) -> None:
        if str(file.name).endswith(LOCK_FILE):
            raise OSError(errno.EACCES, "Permission denied")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", smb)
    with pytest.raises(StoreError, match="another process is writing"):
        Folder(tmp_path).lock()


def test_a_lock_file_that_is_deleted_lets_nobody_in(tmp_path: Path) -> None:
    with Folder(tmp_path).lock() as first:
        first.check()
        (tmp_path / LOCK_FILE).unlink()
        first.check()  # it is taken again
        with pytest.raises(StoreError, match="another process is writing"):
            Folder(tmp_path).lock()
        (tmp_path / LOCK_FILE).unlink()
        with Folder(tmp_path).lock(), pytest.raises(StoreError, match="the lock of this process was deleted"):
            first.check()
    Folder(tmp_path).lock().close()


def test_an_owner_s_file_that_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOSYS))
    with Folder(tmp_path).lock() as first:
        (tmp_path / OWNER_FILE).unlink()
        first.check()
        assert (tmp_path / OWNER_FILE).exists()
        (tmp_path / OWNER_FILE).unlink()
        with Folder(tmp_path).lock(), pytest.raises(StoreError, match="the lock of this process was deleted"):
            first.check()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_no_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, number: int) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    for name in ("a", "b"):
        write_text(tmp_path / name, "whole")
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["a", "b"]
    assert len(caplog.records) == 1


def test_an_error_of_the_system_names_what_was_asked_for_and_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "folder", Path("/"), Path()):
        with pytest.raises(IsADirectoryError) as caught:
            write_text(place, "x")
        assert (caught.value.filename, caught.value.filename2) == (str(place), None)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "write"])
def test_an_error_of_the_system_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    if call == "fsync":
        monkeypatch.setattr(os, "fsync", failing(number))

    def write() -> None:
        with atomic_path(tmp_path / "new.txt") as temporary:
            temporary.write_text("half")
            if call == "write":
                failing(number)()

    with pytest.raises(OSError, match=r"new\.txt") as caught:
        write()
    assert caught.value.errno == number
    assert list(tmp_path.iterdir()) == []


def test_a_rename_waits_for_a_reader_that_has_the_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries, replace = [], Path.replace

    def busy(self: Path, to: Path) -> Path:
        tries.append(self)
        if len(tries) < 3:
            raise PermissionError(errno.EACCES, "in use", str(to))
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", busy)
    monkeypatch.setattr(files, "RENAME_WAITS", (0, 0, 0))
    write_text(tmp_path / "a", "whole")
    assert (tmp_path / "a").read_text() == "whole"
    assert len(tries) == 3
    tries.clear()
    monkeypatch.setattr(files, "RENAME_WAITS", ())
    with pytest.raises(PermissionError, match="in use"):
        write_text(tmp_path / "a", "new")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_what_a_client_of_an_object_store_raises_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder("memory://bucket/store")

    class ClientError(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise ClientError("slow down")

    for method, act in (
        ("cat_file", lambda: folder.read("a")),
        ("pipe_file", lambda: folder.write("a", b"")),
        ("open", lambda: folder.open("a")),
        ("info", lambda: folder.exists("a")),
        ("ls", lambda: folder.names()),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(type(folder._fs), method, fail)
            with pytest.raises(StoreError, match=r"memory://bucket/store/.*slow down"):
                act()


@pytest.mark.parametrize(
    "uri", ["github://a", "reference://x", "zip://x", "dir://x", "generic://x", "ftp://127.0.0.1:9/x", "foo://x"]
)
def test_an_address_that_cannot_be_used_is_one_sentence(uri: str) -> None:
    with pytest.raises(StoreError, match=rf"^cannot use '{uri}': \S"):
        Folder(uri)


@pytest.mark.parametrize("given", [Path("s3://bucket/store"), "s3:/bucket/store", Path("memory://store")])
def test_an_address_as_a_path_is_no_folder_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="has lost a slash of its address: give it as text"):
        Folder(given)
    assert list(tmp_path.iterdir()) == []
    assert Folder(tmp_path / "s3:").local == tmp_path / "s3:"


def test_schemes_may_be_in_capitals() -> None:
    Folder("MEMORY://bucket/capitals").write("a", b"1")
    assert Folder("memory://bucket/capitals").read("a") == b"1"
    assert Folder("memory://bucket/capitals").exists("a")
    assert not Folder("memory://bucket/capitals").exists("b")


def test_a_server_that_is_not_reached_is_no_missing_file() -> None:
    pytest.importorskip("aiohttp")
    folder = Folder("http://127.0.0.1:9/x")
    for act in (lambda: folder.exists("a"), lambda: folder.read("a"), lambda: read_manifest(folder)):
        with pytest.raises(StoreError, match=r"^cannot read 'http://127.0.0.1:9/x/.*connect"):
            act()


def test_a_file_uri_is_a_local_folder(tmp_path: Path) -> None:
    for uri in (f"file://{tmp_path}/a%20b", f"FILE://{tmp_path}/a%20b"):
        folder = Folder(uri)
        folder.write("x", b"1")
        assert (folder.local, (tmp_path / "a b" / "x").read_bytes()) == (tmp_path / "a b", b"1")
        folder.lock().close()


@pytest.mark.parametrize("place", ["", "memory://bucket//store", "memory://bucket/a///b/", "s3://bucket//o"])
def test_a_folder_without_a_name_is_refused(place: str) -> None:
    with pytest.raises(StoreError, match=r"named by nothing|has nothing between two slashes"):
        Folder(place)


def test_a_scheme_in_capitals_is_one() -> None:
    Folder("Memory://bucket/store/").write("a", b"1")
    assert Folder("memory://bucket/store").read("a") == b"1"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for place in ("file", "file/below", "link"):
        with pytest.raises(StoreError, match="is no folder, or lies below a file: give a folder"):
            Folder(tmp_path / place).lock()
    with pytest.raises(StoreError, match="is no path: a NUL is in it"):
        Folder("a\0b").lock()


def test_what_cannot_be_written_is_an_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder("memory://bucket/store")

    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(type(folder._fs), "pipe_file", fail)
    with pytest.raises(StoreError, match=r"cannot write 'memory://bucket/store/a': The specified bucket"):
        folder.write("a", b"")
    with pytest.raises(FileNotFoundError):
        folder.read("no such file")


def test_a_lock_that_is_undone_leaves_no_file(tmp_path: Path) -> None:
    for _ in range(2):
        with Folder(tmp_path).lock() as lock:
            lock.undo()
        assert not list(tmp_path.iterdir())
    Folder(tmp_path).lock().close()
    with Folder(tmp_path).lock() as lock:
        lock.undo()  # the file of an earlier one stays
    assert [file.name for file in tmp_path.iterdir()] == [LOCK_FILE]
