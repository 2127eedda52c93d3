"""Walks folders: whole, by globs, and by braces that name many files."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import SourceError
from . import remote
from .notes import counted
from .places import File, absolute, join
from .selection import Selection

# {000..009} or {train,val}
BRACES = re.compile(r"\{(?!\])(?:([0-9]{1,18})\.\.([0-9]{1,18})|([^{},/]*(?:,[^{},/]*)+))\}")
ESCAPED = re.compile(r"\[([*?[{])\]")  # a letter of a name that has a meaning in globs
HINT = "a *, ?, [ or { of a name is written [*], [?], [[] or [{]"
FOLDERS = "folders that the glob matches, where FOLDER/** takes what is in them"
MOST_NAMES = 200_000  # that the braces of one pattern may stand for
MOST_BRACES = 50
MOST_WILD = 1000  # different globs that names of one folder are compared with
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


class _Links:
    """Decides which links to folders are followed: none that loops, and none into what is listed anyway.

    Each folder is known by where it really is: what lies below a root, which is the source or a link that was followed,
    is listed by its real place.
    """

    def __init__(self, source: str, selection: Selection) -> None:
        self.source, self.selection = source, selection
        self.roots = [source if remote.is_remote(source) else os.path.realpath(source)]

    def enter(self, place: str, linked: bool) -> bool:
        """Tell whether to list a folder, which may be a link; count it if not."""
        if not linked:
            return place == self.source or len(self.roots) == 1 or os.path.realpath(place) not in self.roots
        target, here = os.path.realpath(place), os.path.realpath(os.path.dirname(place))  # noqa: PTH120 - text
        if _below(here, target) is not None:
            self.selection.notes.skipped["links that loop"] += 1
            return False
        if any(self._listed(root, target) for root in self.roots):
            self.selection.notes.skipped["links to folders that are listed anyway"] += 1
            return False
        self.roots.append(target)
        return True

    def _listed(self, root: str, target: str) -> bool:
        inside = _below(target, root)
        return inside is not None and not any(self.selection.hides(name) for name in inside)


def _below(place: str, folder: str) -> list[str] | None:
    """Names that lead from a folder to a place below it, none if that is the folder; None where it is not below it."""
    if place == folder:
        return []
    start = join(folder, "")
    return list(Path(place[len(start) :]).parts) if place.startswith(start) else None


def walk(folder: str, selection: Selection) -> Iterator[File]:
    """Yield every visible file below the folder: a folder's own in order, then its folders in order.

    Links to folders are followed as `_Links` says. A folder that cannot be read is a problem of the notes. Stores of
    embeddings below it are left out: the output may lie in the source, and is no part of it.
    """
    links, below = _Links(folder, selection), [(folder, "", False)]
    while below:
        place, prefix, linked = below.pop()
        if not links.enter(place, linked) or not (listing := _opened(place, prefix, selection)):
            continue
        inside = join(place, "")
        for name in sorted(listing.files):
            if name[0] == ".":
                selection.notes.skipped["hidden"] += 1
            else:
                yield File(inside + name, prefix + name, listing.files[name])
        names = [name for name in sorted(listing.folders, reverse=True) if not _unseen(name, prefix, selection)]
        below += [(inside + name, f"{prefix}{name}/", listing.folders[name]) for name in names]


def _opened(place: str, prefix: str, selection: Selection) -> remote.Listing | None:
    """List a folder of a walk; None, and a note, where it cannot be read or is a store or a run."""
    with selection.telling(prefix.rstrip("/") or Path(place).name, place):
        listing = _scan(place)
        if listing.nameless:
            selection.notes.skipped["keys that end in / or have nothing between two"] += listing.nameless
        made = _made_here(place, listing) if prefix else ""
        if not made:
            return listing
        selection.notes.skipped[made] += 1
    return None


def _unseen(name: str, prefix: str, selection: Selection) -> bool:
    """Tell whether a folder is hidden or excluded; count it if so."""
    if name[0] == ".":
        selection.notes.skipped["hidden"] += 1
        return True
    return selection.out(name, prefix + name)


def _made_here(folder: str, listing: remote.Listing) -> str:
    """Recognise what micl-zoo writes into a folder, by the files that are there first; empty for other folders."""
    begun = "manifest.json" in listing.files and "index" in listing.folders
    if begun and "part-00000.parquet" in _scan(join(folder, "index")).files:
        return "stores of embeddings"
    trained = "metrics.jsonl" in listing.files or "checkpoints" in listing.folders
    return "training runs" if "run.json" in listing.files and trained else ""


def has_magic(place: str) -> bool:
    """Tell whether a place is a glob or has braces. A web address may have a "?" of its own."""
    text = place.replace("?", "") if remote.is_web(place) else place
    return glob.has_magic(text) or BRACES.search(text) is not None


def escape(place: str) -> str:
    """Write a place so that a glob which begins with it means the thing of that very name."""
    return re.sub(r"[*?[{]", r"[\g<0>]", place)


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


def _all_names(pattern: str) -> list[str]:
    """Expand braces to a list; SourceError where it has no end that is near."""
    names = []
    if pattern.count("{") <= MOST_BRACES:
        names = list(itertools.islice(_expand_braces(pattern), MOST_NAMES + 1))
    if not names or len(names) > MOST_NAMES:
        raise SourceError(
            f"the braces of {pattern[:200]!r} stand for more than {MOST_NAMES:,} names, or there are more than "
            f"{MOST_BRACES} of them, or one counts down to nothing: use *, or give a list of the files"
        )
    return names


def glob_files(pattern: str, selection: Selection) -> Iterator[File]:
    """Find the files that a glob matches, by their names in order; names are relative to its fixed part."""
    base, fixed = glob_base(pattern)
    patterns = {_parts(one)[1][fixed:]: one for one in _all_names(pattern)}
    if any(has_magic(one) for one in patterns.values()):
        return _Glob(pattern, patterns, selection).files(base)
    return _named(pattern, patterns, base)


def glob_base(pattern: str) -> tuple[str, int]:
    """Find the folder that a glob's names are relative to, and how many of its parts lead there."""
    root, parts = _parts(pattern)
    magic = (i for i, part in enumerate(parts) if has_magic(root + ESCAPED.sub("", part)))
    fixed = next(magic, len(parts) - 1)
    return absolute(root + ESCAPED.sub(r"\1", "/".join(parts[:fixed])) or "."), fixed


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

    def __init__(self, pattern: str, patterns: dict[tuple[str, ...], str], selection: Selection) -> None:
        self.pattern, self.patterns, self.selection = pattern, patterns, selection
        self.matched: set[tuple[str, ...]] = set()

    def files(self, base: str) -> Iterator[File]:
        """Raises SourceError at the end where one of the patterns matched no file."""
        if remote.is_remote(base) or Path(base).is_dir():
            links = _Links(base, self.selection)
            levels = [self._level(base, "", {(names, names) for names in self.patterns}, links)]
            while levels:  # not by recursion: folders lie as deep as they like
                if (found := next(levels[-1], None)) is None:
                    levels.pop()
                elif isinstance(found, File):
                    yield found
                else:
                    levels.append(self._level(*found, links))
        for names, one in self.patterns.items():
            if names not in self.matched:
                met = self.selection.notes.left_out() or counted(self.selection.notes.others)
                problems = self.selection.notes.problems
                why = f"; {problems[0].detail}" if problems else ""
                raise _no_match(self.pattern, one, f": looked in {base!r}, where it met {met}{why} ({HINT})")

    def _level(
        self, folder: str, prefix: str, at: set[Position], links: _Links
    ) -> Iterator[File | tuple[str, str, set[Position]]]:
        """Yield a folder's files that match, and the folders that are to be walked, with the positions in them."""
        if (listing := _opened(folder, prefix, self.selection)) is None:
            return
        inside, parts = join(folder, ""), dict[str, list[Position]]()
        for position in _skip(at):
            parts.setdefault(position[1][0], []).append(position)
        wild = [part for part in parts if has_magic(part)]
        if len(wild) > MOST_WILD:
            raise SourceError(
                f"{self.pattern[:200]!r} stands for {len(wild):,} globs at once: use * in place of braces"
            )
        for name in sorted(listing.files.keys() | listing.folders.keys()):
            fit = [] if name in wild else parts.get(name, [])
            fit = fit + [position for part in wild if _fits(name, part) for position in parts[part]]
            if name in listing.folders and fit and name not in parts and self.selection.out(name, prefix + name):
                continue  # but what is named in full is taken
            ends = {names for names, rest in fit if len(rest) == 1}
            if name in listing.files and ends:
                self.matched |= ends
                yield File(inside + name, prefix + name, listing.files[name])
            elif name in listing.files:
                self.selection.notes.other(name)
            elif below := self._below(inside + name, fit, listing.folders[name], links):
                yield inside + name, f"{prefix}{name}/", below
            elif ends and not any(rest[0] == "**" for _, rest in fit):
                self.selection.notes.skipped[FOLDERS] += 1

    def _below(self, place: str, fit: list[Position], linked: bool, links: _Links) -> set[Position]:
        """Positions in a folder; "**" follows no link that loops, a name that is asked for is followed."""
        below = {(names, rest[1:]) for names, rest in fit if rest[0] != "**" and len(rest) > 1}
        deep = {(names, rest) for names, rest in fit if rest[0] == "**"}
        return below | deep if deep and links.enter(place, linked) else below


def _skip(at: set[Position]) -> set[Position]:
    """Add the positions behind "**", which may stand for no folder."""
    more = {(names, rest[1:]) for names, rest in at if rest[0] == "**" and len(rest) > 1} - at
    return _skip(at | more) if more else at


def _fits(name: str, part: str) -> bool:
    return (name[0] != "." or part[:1] == ".") and fnmatch.fnmatch(name, "*" if part == "**" else part)
