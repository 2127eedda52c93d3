"""Walks folders: whole, by globs, and by braces that name many files."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..errors import SourceError
from . import remote
from .places import File, absolute, join, suffix_of

BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},/]*(?:,[^{},/]*)+))\}")  # {000..009} or {train,val}
Position = tuple[tuple[str, ...], tuple[str, ...]]  # the names of a pattern, and those that a walk has still to match


def _scan(folder: str) -> remote.Listing:
    """List one folder as it is, hidden names too."""
    try:
        if remote.is_remote(folder):
            return remote.list_folder(folder)
        listing = remote.Listing({}, {})
        with os.scandir(folder) as items:
            for item in items:
                if _leads_to_folder(item):
                    listing.folders[item.name] = item.is_symlink()
                else:
                    listing.files[item.name] = None
        return listing
    except OSError as error:
        why = error.strerror or str(error)
        raise SourceError(f"cannot read the folder {folder!r} ({why}): allow it, or list the others") from None


def _leads_to_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:
        return False  # a link to itself: a file that cannot be read


def walk(folder: str) -> Iterator[File]:
    """Yield every visible file below the folder: a folder's own in order, then its folders in order.

    Links to folders are not followed (they may loop). Stores of embeddings below it are left out: the output may lie in
    the source, and is no part of it.
    """
    below = [(folder, "")]
    while below:
        place, prefix = below.pop()
        listing, inside = _scan(place), join(place, "")
        if prefix and _is_store(place, listing):
            continue
        for name in sorted(listing.files):
            if name[0] != ".":
                yield File(inside + name, prefix + name, listing.files[name])
        names = sorted((n for n, linked in listing.folders.items() if n[0] != "." and not linked), reverse=True)
        below += [(inside + name, f"{prefix}{name}/") for name in names]


def _is_store(folder: str, listing: remote.Listing) -> bool:
    """Recognise a store by the files that are written before its first part."""
    begun = "manifest.json" in listing.files and "index" in listing.folders
    return begun and "part-00000.parquet" in _scan(join(folder, "index")).files


def counted(others: Counter[str]) -> str:
    """Say how many other files there are, by their suffixes, for people."""
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3))
    return f"{others.total()} other files" + (f" ({kinds}{', …' if len(others) > 3 else ''})" if others else "")


def has_magic(place: str) -> bool:
    """Tell whether a place is a glob or has braces. A web address may have a "?" of its own."""
    text = place.replace("?", "") if remote.is_web(place) else place
    return glob.has_magic(text) or BRACES.search(text) is not None


def _expand_braces(pattern: str) -> Iterator[str]:
    """Expand braces as WebDataset does: "{08..10}" stands for 08, 09 and 10, "{train,val}" for either."""
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, words = match.groups()
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)) if first else ()
    for choice in words.split(",") if words else numbers:
        yield from _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def glob_files(pattern: str) -> Iterator[File]:
    """Find the files that a glob matches, by their names in order; names are relative to its fixed part."""
    root, parts = _parts(pattern)
    fixed = next((i for i, part in enumerate(parts) if has_magic(root + part)), len(parts))
    base = absolute(root + "/".join(parts[:fixed]) or ".")
    patterns = {_parts(one)[1][fixed:]: one for one in _expand_braces(pattern)}
    if any(has_magic(one) for one in patterns.values()):
        return _Glob(pattern, patterns).files(base)
    return _named(pattern, patterns, base)


def _parts(pattern: str) -> tuple[str, tuple[str, ...]]:
    """Split off what is before the first name ("s3://", "/", "C:\\" or nothing) from the names."""
    if scheme := remote.SCHEME.match(pattern):
        return scheme[0], tuple(pattern[scheme.end() :].split("/"))
    path = Path(pattern)
    return path.anchor, path.parts[1:] if path.anchor else path.parts


def _no_match(pattern: str, one: str, why: str = "") -> SourceError:
    part = f", which {pattern!r} asks for," if one != pattern else ""
    return SourceError(f"the glob {one!r}{part} matches no file{why}")


def _named(pattern: str, patterns: dict[tuple[str, ...], str], base: str) -> Iterator[File]:
    """Look up the files that braces name one by one, those of this machine all before the first is given out."""
    for one in patterns.values():
        if not remote.is_remote(one) and not Path(one).is_file():
            raise _no_match(pattern, one)
    for parts in sorted(patterns):
        place, size = join(base, "/".join(parts)), None
        if remote.is_remote(place):
            try:
                size = remote.describe(place).size
            except OSError as error:
                raise _no_match(pattern, patterns[parts], f" ({error})") from None
        yield File(place, "/".join(parts), size)


class _Glob:
    """Walks for several patterns at once: folders are read once, files come sorted by their names."""

    def __init__(self, pattern: str, patterns: dict[tuple[str, ...], str]) -> None:
        self.pattern, self.patterns = pattern, patterns
        self.matched: set[tuple[str, ...]] = set()
        self.others: Counter[str] = Counter()

    def files(self, base: str) -> Iterator[File]:
        """Raises SourceError at the end where one of the patterns matched no file."""
        if remote.is_remote(base) or Path(base).is_dir():
            yield from self._walk(base, "", {(names, names) for names in self.patterns})
        for names, one in self.patterns.items():
            if names not in self.matched:
                raise _no_match(self.pattern, one, f": looked in {base!r}, where it met {counted(self.others)}")

    def _walk(self, folder: str, prefix: str, at: set[Position]) -> Iterator[File]:
        listing, inside = _scan(folder), join(folder, "")
        if prefix and _is_store(folder, listing):
            return
        at = _skip(at)
        for name in sorted(listing.files.keys() | listing.folders.keys()):
            fit = [(names, rest) for names, rest in at if _fits(name, rest[0])]
            ends = {names for names, rest in fit if len(rest) == 1}
            if name in listing.files and ends:
                self.matched |= ends
                yield File(inside + name, prefix + name, listing.files[name])
            elif name in listing.files:
                self.others[suffix_of(name) or "no ending"] += 1
            if name in listing.folders:  # "**" follows no links, which may loop; a name that is asked for is followed
                below = {(names, rest[1:]) for names, rest in fit if rest[0] != "**" and len(rest) > 1}
                if not listing.folders[name]:
                    below |= {(names, rest) for names, rest in fit if rest[0] == "**"}
                if below:
                    yield from self._walk(inside + name, f"{prefix}{name}/", below)


def _skip(at: set[Position]) -> set[Position]:
    """Add the positions behind "**", which may stand for no folder."""
    more = {(names, rest[1:]) for names, rest in at if rest[0] == "**" and len(rest) > 1} - at
    return _skip(at | more) if more else at


def _fits(name: str, part: str) -> bool:
    return (name[0] != "." or part[0] == ".") and fnmatch.fnmatch(name, "*" if part == "**" else part)
