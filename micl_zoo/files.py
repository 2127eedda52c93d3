"""Files that appear whole or not at all, locally or on an object store; checksums; locks of folders."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote_to_bytes, urlsplit

import pyarrow as pa

from .errors import MiclZooError, StoreError, UsageError

LOST_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")  # what pathlib makes of an address; no drive of Windows
LOCK_FILE = ".lock.tmp"
OWNER_FILE = ".lock-owner.tmp"  # in its place where the file system has no locks
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # how a file system says that it cannot
NO_LOCKS = (*UNSUPPORTED, errno.ENOLCK)  # Lustre without -o flock, NFS without lockd, some FUSE
# Windows refuses to rename over a file that a reader or a virus scanner has open: seconds between tries, 3 in all.
RENAME_WAITS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5) if os.name == "nt" else ()

logger = getLogger(__name__)


@contextlib.contextmanager
def atomic_path(path: Path, *, unique: bool = False) -> Iterator[Path]:
    """Yield a temporary name beside `path`, synced and renamed if the block succeeds, else removed.

    A reader sees the old file or the whole new one, whenever the process is killed. A `unique` name is no other
    writer's; otherwise every try has the same name, so that a killed run leaves nothing for good. An error of the
    system names a file.
    """
    if not path.name:  # "/" or "."
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{uuid.uuid4().hex[:8]}" if unique else ""
    temporary = path.with_name(f".{path.name}{own}.tmp")
    try:
        with _named_errors(path, temporary):
            temporary.unlink(missing_ok=True)
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)  # as the umask wants it; some writers have their own
            yield temporary
            if stat.S_IMODE(temporary.stat().st_mode) != mode:
                temporary.chmod(mode)
            _sync(temporary)
            _rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _named_errors(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Name the file in an error of the system that names none, as those of writing and syncing, or a temporary one."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None and not isinstance(error, ConnectionError | TimeoutError)
        if error.errno is not None and (unnamed or error.filename == str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise


def _sync(file: Path) -> None:
    with file.open("rb+") as opened:
        try:
            os.fsync(opened.fileno())
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            _warn_once(
                "this file system cannot sync files to its disk (%s): what was written just before a loss of power may "
                "be lost",
                error.strerror,
            )


def _rename(temporary: Path, path: Path) -> None:
    for wait in RENAME_WAITS:
        with contextlib.suppress(PermissionError):
            temporary.replace(path)
            return
        time.sleep(wait)
    temporary.replace(path)


@functools.cache
def _warn_once(text: str, *values: object) -> None:
    logger.warning(text, *values)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which takes its place if the block succeeds, and else is removed."""
    path = path.absolute()
    temporary, old = (path.with_name(f".{path.name}.{end}") for end in ("tmp", "old.tmp"))
    for left_over in (temporary, old):  # by a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.replace(old)
        temporary.replace(path)
    finally:
        for done_with in (temporary, old):
            shutil.rmtree(done_with, ignore_errors=True)


def local_path(given: str | os.PathLike[str]) -> Path:
    """Take a path on this machine to write to; UsageError where it is none, and pathlib would make a folder `s3:`."""
    text = os.fspath(given)
    if not text:
        raise UsageError("it is empty, and must be a path (an unset variable of the shell?)")
    if "://" in text or _lost_slash(text):
        raise UsageError(f"{text!r} is an address, and this must be a path on this machine")
    return Path(text)


def to_path(place: str) -> Path:
    """Return the path of a place on this machine, which may be a file:// URI."""
    return Path(os.fsdecode(unquote_to_bytes(urlsplit(place).path)) if place.lower().startswith("file://") else place)


def _lost_slash(text: str) -> bool:
    """Tell whether a path is what pathlib makes of an address, and no folder is there that has such a name."""
    return LOST_SLASH.match(text) is not None and not Path(text.partition("/")[0]).exists()


def open_regular(path: Path) -> io.FileIO:
    """Open a file to read; OSError at once where it is a pipe, a socket, a device or a folder."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe would be waited for
    if "\0" in str(path) or not stat.S_ISREG(path.stat().st_mode):  # opening some devices does something
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return io.FileIO(os.open(path, flags))


def read_regular(path: Path, most: int = -1) -> bytes:
    """Read a whole file, or so many bytes of it; see `open_regular`."""
    with open_regular(path) as file:
        return (file.readall() if most < 0 else file.read(most)) or b""


def open_arrow(path: Path) -> pa.OSFile:
    """Open a file for pyarrow; see `open_regular`."""
    open_regular(path).close()
    return pa.OSFile(os.fsencode(path))  # as bytes: pyarrow refuses text that is not UTF-8


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class FolderLock:
    """The lock of a folder, until it is closed or this process ends in any way."""

    def __init__(self, folder: Path | None, doing: str, error: type[MiclZooError]) -> None:
        """Take it; raise `error` where another process has it. No folder, an object store, has no lock."""
        self.folder, self.doing, self.error = folder, doing, error
        self._held = contextlib.ExitStack()
        self._file, self._number = Path(), -1  # that stands for it, and its inode
        self._new = False  # whether there was no such file before
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                what = "is no folder, or lies below a file: give a folder, new or empty"
                raise error(f"{str(folder)!r} {what}") from None
            except ValueError:
                raise error(f"{str(folder)!r} is no path: a NUL is in it") from None
            self._new = not (folder / LOCK_FILE).exists()
            self._take(folder, "wait for it, stop it, or give another --out")

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release it."""
        self._held.close()

    def undo(self) -> None:
        """Delete its file, where there was none before: nothing was written to the folder."""
        if self.folder is not None and self._new:
            with contextlib.suppress(OSError):
                (self.folder / LOCK_FILE).unlink()

    def check(self) -> None:
        """Take it again where its file was deleted; raise `error` if another process has done so meanwhile."""
        if self.folder is None or (found := _inode(self._file)) == self._number:
            return
        cure = "the lock of this process was deleted, so it has stopped; what it has written is kept"
        if found >= 0 and self._file.name == OWNER_FILE:  # closing would delete that of the other process
            raise self._other(self.folder, cure)
        self.close()
        self._take(self.folder, cure)

    def _take(self, folder: Path, cure: str) -> None:
        from filelock import Timeout

        try:
            with contextlib.ExitStack() as held:
                self._file = _locked_file(folder, held)
                self._number, self._held = _inode(self._file), held.pop_all()
        except BlockingIOError:
            raise self._other(folder, cure) from None
        except Timeout:
            hint = f". If there is none on any machine, delete {str(folder / OWNER_FILE)!r}"
            raise self._other(folder, cure + hint) from None

    def _other(self, folder: Path, cure: str) -> MiclZooError:
        return self.error(f"another process is {self.doing} {str(folder)!r}: {cure}")


def _locked_file(folder: Path, held: contextlib.ExitStack) -> Path:
    """Take the lock of a folder into `held`; return the file that stands for it. Raise where another process has it."""
    from filelock import SoftFileLock

    file = folder / LOCK_FILE
    while True:
        if file.exists():
            open_regular(file).close()  # raises, where opening a pipe would wait
        opened = held.enter_context(file.open("a"))
        if not _flock(opened, folder):
            break
        if os.fstat(opened.fileno()).st_ino == _inode(file):  # else it was deleted between the two
            return file
    # It names its process: a dead one on this machine is found out, at the second look; elsewhere not.
    lock = SoftFileLock(folder / OWNER_FILE, timeout=1, thread_local=False)
    lock.acquire()
    held.callback(lock.release)
    return folder / OWNER_FILE


def _inode(file: Path) -> int:
    """Number of a file; -1 where it is gone."""
    try:
        return file.stat().st_ino
    except FileNotFoundError:
        return -1


def _flock(file: IO[str], folder: Path) -> bool:
    """Lock a file while it is open; False where there are no such locks, BlockingIOError where another process has it.

    Not by filelock's FileLock: without flock, its releases raise, let a second process in, or keep everybody out
    because of the empty file that an earlier run left.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        with _named_errors(folder / LOCK_FILE):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError:  # SMB says so of a lock that another has, others of all locks: then of a new file's, too
        with tempfile.TemporaryFile("a", dir=folder) as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except PermissionError as error:
                return _no_locks(error)
            raise BlockingIOError from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return _no_locks(error)
    return True


def _no_locks(error: OSError) -> bool:
    _warn_once(
        "this file system has no locks (%s): a second process is kept out by the file %s, which may have to be deleted "
        "by hand after a crash",
        error.strerror,
        OWNER_FILE,
    )
    return False


class Folder:
    """A local folder (a path or file://), or a prefix on a file system of fsspec (s3://bucket/prefix)."""

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.location = os.fspath(location)  # path or URI, as given
        if not self.location:
            raise StoreError("a folder is named by nothing (an unset variable of the shell?): give a path or a URI")
        if _lost_slash(self.location):
            raise StoreError(f"{self.location!r} has lost a slash of its address: give it as text, and not as a Path")
        scheme, remote, path = self.location.partition("://")
        self.local = None if remote and scheme.lower() != "file" else to_path(self.location)
        if self.local is not None:
            return
        if "//" in path.strip("/"):  # keys of object stores may be so, and no two programs take them for the same
            raise StoreError(f"{self.location!r} has nothing between two slashes: leave one out")
        import fsspec

        try:
            self._fs, self._root = fsspec.core.url_to_fs(f"{scheme.lower()}://{path}")
        except ImportError as error:
            raise StoreError(
                f"cannot use {self.location!r}: {error}. For object stores: pip install 'micl-zoo[remote]'"
            ) from None
        except Exception as error:  # each kind of file system has its own
            raise StoreError(f"cannot use {self.location!r}: {str(error) or type(error).__name__}") from None
        self._fs.invalidate_cache()
        self._root = self._root.rstrip("/")

    def __str__(self) -> str:
        return self.location

    def __reduce__(self) -> tuple[type[Folder], tuple[str]]:
        return Folder, (self.location,)  # a connection does not cross to another process

    def names(self, below: str = "") -> list[str]:
        """List the files directly below a sub-folder, hidden ones too, sorted and without its name."""
        if self.local is not None:
            folder = self.local / below
            return sorted(child.name for child in folder.iterdir()) if folder.is_dir() else []
        with self._own_errors("list", below):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(f"{self._root}/{below}".rstrip("/"), detail=False)
            except FileNotFoundError:
                return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found if name.rstrip("/") != self._root)

    def exists(self, name: str) -> bool:
        """True if there is such a file."""
        if self.local is not None:
            return (self.local / name).exists()
        with self._own_errors("read", name):
            try:
                self._fs.info(self._at(name))  # its own exists() says False of a server that it cannot reach, too
            except FileNotFoundError as error:
                if _unreached(error):
                    raise
                return False
        return True

    def read(self, name: str, most: int | None = None) -> bytes:
        """Read a whole file, or so many bytes of it."""
        with self._own_errors("read", name):
            if self.local is None:
                return bytes(self._fs.cat_file(self._at(name), start=None, end=most))
            return read_regular(self.local / name, -1 if most is None else most)

    def open(self, name: str) -> Any:
        """Open a file for pyarrow, which reads only what it needs."""
        if self.local is not None:
            return open_arrow(self.local / name)
        with self._own_errors("read", name):
            return pa.PythonFile(self._fs.open(self._at(name), "rb"), mode="r")

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all, by a temporary name or by one upload to the object store."""
        if self.local is None:
            with self._own_errors("write", name):
                self._fs.pipe_file(self._at(name), data)
            return
        with atomic_path(self.local / name, unique=True) as temporary:
            temporary.write_bytes(data)

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        if self.local is not None:
            (self.local / name).unlink(missing_ok=True)
        elif self.exists(name):
            with self._own_errors("delete", name):
                self._fs.rm_file(self._at(name))

    def lock(self) -> FolderLock:
        """Keep other writers out of a local folder, as long as the result is open; object stores have no locks."""
        return FolderLock(self.local, "writing to", StoreError)

    def at(self, name: str) -> str:
        """Name a file to a person."""
        return f"{self.location.rstrip('/')}/{name}"

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _own_errors(self, doing: str, name: str) -> Iterator[None]:
        """Turn what clients of object stores raise, each its own, into a StoreError; local files raise OSError."""
        try:
            yield
        except Exception as error:
            absent = isinstance(error, FileNotFoundError) and not _unreached(error)
            if self.local is not None or (absent and doing != "write"):
                raise
            why = str(error.__cause__ if _unreached(error) else error) or type(error).__name__
            raise StoreError(f"cannot {doing} {self.at(name)!r}: {why}") from None


def _unreached(error: Exception) -> bool:
    """Whether nobody was reached: fsspec says of a web server that it cannot reach that the file is not there."""
    return isinstance(error, FileNotFoundError) and isinstance(error.__cause__, OSError)


def sum_file(file: Path) -> Path:
    """Return where the sha256 of a checkpoint stands, as `sha256sum -c` reads it."""
    return file.with_name(f"{file.name}.sha256")


def file_sha256(file: Path) -> str:
    """Hash a file in pieces, to hexadecimal digits."""
    digest = hashlib.sha256()
    with open_regular(file) as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
