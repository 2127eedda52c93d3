"""Files that appear whole or not at all, locally or on an object store; checksums; locks of folders."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from .errors import MiclZooError, StoreError

LOCK_FILE = ".lock.tmp"
OWNER_FILE = ".lock-owner.tmp"  # in its place where the file system has no locks
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre without -o flock, NFS without lockd, some FUSE


@contextlib.contextmanager
def atomic_path(path: Path, *, unique: bool = False) -> Iterator[Path]:
    """Yield a temporary name beside `path`, synced and renamed if the block succeeds, else removed.

    A reader sees the old file or the whole new one, whenever the process is killed. A `unique` name is no other
    writer's; otherwise every try has the same name, so that a killed run leaves nothing for good.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{uuid.uuid4().hex[:8]}" if unique else ""
    temporary = path.with_name(f".{path.name}{own}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def lock_folder(folder: Path, doing: str, error: type[MiclZooError]) -> contextlib.ExitStack:
    """Lock a folder until the result is closed or this process ends in any way; raise `error` where another has it."""
    from filelock import SoftFileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    hint = ""
    with contextlib.ExitStack() as held:
        try:
            if not _flock(held.enter_context((folder / LOCK_FILE).open("a"))):
                # It names its process: a dead one on this machine is found out, at the second look; elsewhere not.
                lock = SoftFileLock(folder / OWNER_FILE, timeout=1, thread_local=False)
                hint = f". If there is none on any machine, delete {lock.lock_file!r}"
                lock.acquire()
                held.callback(lock.release)
        except (BlockingIOError, Timeout):
            raise error(
                f"another process is {doing} {str(folder)!r}: wait for it, stop it, or give another --out{hint}"
            ) from None
        return held.pop_all()


def _flock(file: IO[str]) -> bool:
    """Lock a file while it is open; False where there are no such locks, BlockingIOError where another process has it.

    Not by filelock's FileLock: without flock, its releases raise, let a second process in, or keep everybody out
    because of the empty file that an earlier run left.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


class Folder:
    """A local folder, or a prefix on a file system of fsspec (s3://bucket/prefix), whose files have names."""

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.location = os.fspath(location)  # path or URI, as given
        self.local = None if "://" in self.location else Path(self.location)  # None: on another file system
        if self.local is not None:
            return
        import fsspec

        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.location)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"cannot write to {self.location!r}: {error}. For object stores: pip install 'micl-zoo[remote]'"
            ) from None
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
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(f"{self._root}/{below}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found if name.rstrip("/") != self._root)

    def exists(self, name: str) -> bool:
        """True if there is such a file."""
        return (self.local / name).exists() if self.local is not None else bool(self._fs.exists(self._at(name)))

    def read(self, name: str) -> bytes:
        """Read a whole file."""
        return bytes(self._fs.cat_file(self._at(name))) if self.local is None else (self.local / name).read_bytes()

    def open(self, name: str) -> Any:
        """Open a file for pyarrow, which reads only what it needs."""
        if self.local is not None:
            return pa.OSFile(os.fsencode(self.local / name))
        return pa.PythonFile(self._fs.open(self._at(name), "rb"), mode="r")

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all, by a temporary name or by one upload to the object store."""
        if self.local is None:
            self._fs.pipe_file(self._at(name), data)
            return
        with atomic_path(self.local / name, unique=True) as temporary:
            temporary.write_bytes(data)

    def remove(self, name: str) -> None:
        """Delete a file if it exists."""
        if self.local is not None:
            (self.local / name).unlink(missing_ok=True)
        elif self.exists(name):
            self._fs.rm_file(self._at(name))

    def lock(self) -> contextlib.ExitStack:
        """Keep other writers out of a local folder, as long as the result is open; object stores have no locks."""
        return contextlib.ExitStack() if self.local is None else lock_folder(self.local, "writing to", StoreError)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"


def sum_file(file: Path) -> Path:
    """Return where the sha256 of a checkpoint stands, as `sha256sum -c` reads it."""
    return file.with_name(f"{file.name}.sha256")


def file_sha256(file: Path) -> str:
    """Hash a file in pieces, to hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
