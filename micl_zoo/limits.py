"""What the system refuses, in sentences that name the file or the limit and the way on."""

from __future__ import annotations

import errno
import os

WAY_ON = {
    errno.EACCES: "choose another place, or change its permissions",
    errno.EPERM: "choose another place, or change its permissions",
    errno.EROFS: "choose a place that can be written",
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EIO: "the disk, or the network before it, fails",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "does that path exist?",
    errno.EEXIST: "a file is there: give another name",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "give a folder",
}
# How libraries say that there is no memory, besides MemoryError.
NO_MEMORY = ("allocate memory", "bad alloc", "bad_alloc", "failed to map segment", "Cannot allocate")
NO_THREAD = ("can't start new thread", "Resource temporarily unavailable")


def refused_by_system(error: BaseException) -> str | None:
    """Say what the system has refused; None of an error that is something else."""
    text = str(error).strip()
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(words in text for words in NO_MEMORY):
        most = _limit("AS", "of which this process may have {:,} bytes (ulimit -v)")
        return f"not enough memory{most}: {_first_line(text) or 'close other programs, or ask for less at once'}"
    if number == errno.EAGAIN or any(words in text for words in NO_THREAD):
        most = _limit("NPROC", "this user may have {:,} (ulimit -u)")
        return f"no further process or thread can be started{most}: {_first_line(text)}. Raise the limit, or take fewer"
    if not isinstance(error, OSError):
        return None
    if number in (errno.EMFILE, errno.ENFILE):
        most = _limit("NOFILE", "this process may have {:,} (ulimit -n)")
        return f"too many open files{most}. Raise the limit, or take fewer processes"
    if number == errno.EFBIG:
        most = _limit("FSIZE", "no file may have more than {:,} bytes (ulimit -f)")
        return f"File too large{most}: {_name(error)}. Raise the limit, or choose another place"
    if number == errno.ENOENT and not error.filename and not _has_folder():
        return "the current folder does not exist any more: change to another"
    way_on = WAY_ON.get(number or 0)
    return f"{error.strerror or text or type(error).__name__}: {_name(error)}" + (f" ({way_on})" if way_on else "")


def _name(error: OSError) -> str:
    found = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return " -> ".join(found) or "a file that the system does not name"


def _limit(name: str, words: str) -> str:
    """Words for a limit of this process, where there is one."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    limit = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0]
    return "" if limit == resource.RLIM_INFINITY else f", {words.format(limit)}"


def _has_folder() -> bool:
    try:
        return bool(os.getcwd())  # noqa: PTH109
    except OSError:
        return False


def _first_line(text: str) -> str:
    return text.partition("\n")[0][:300]
