"""Memory of a process and of all below it, as Linux shares it out; a module of the scripts beside it."""

from __future__ import annotations

import re
from pathlib import Path


def tree(pid: int) -> list[int]:
    """A process and all below it; nothing where it has ended or there is no /proc."""
    try:  # each thread has the children that it started
        children = [word for file in Path(f"/proc/{pid}/task").glob("*/children") for word in file.read_text().split()]
    except OSError:
        return []
    return [pid, *(one for child in children for one in tree(int(child)))]


def own_bytes(pid: int) -> int:
    """Of one process, each page that several share in shares (PSS); 0 where it has ended or there is no /proc."""
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def tree_bytes(pid: int) -> int:
    """Of a process and all below it."""
    return sum(map(own_bytes, tree(pid)))
