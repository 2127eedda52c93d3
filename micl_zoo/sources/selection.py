"""Selection: which files of a source are taken, by what was asked for, their endings and their first bytes."""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from ..errors import SourceError
from ..images.formats import SUFFIXES, kind_of
from . import remote
from .names import EXCLUDED, OTHERS
from .notes import Notes
from .places import File, open_regular, suffix_of

START = 32  # bytes of a file that tell what it is
REMOTE_STARTS = 1000  # of files of a listing whose first bytes are asked for: each is a request


class Selection:
    """Says what of a source is taken, and keeps the notes of its listing.

    Args:
        exclude: patterns as a shell's, of names and of paths below the source; what fits one is left out.
        default_exclude: leave out EXCLUDED, too.
        column: column of the images in parquet files; None finds it.
        id_column: column of ids in parquet files; None is `id` where there is one, "none" is the number of the row.
    """

    def __init__(
        self,
        exclude: Sequence[str] = (),
        *,
        default_exclude: bool = True,
        column: str | None = None,
        id_column: str | None = None,
    ) -> None:
        self.column, self.id_column = column, id_column
        self.notes = Notes()
        patterns = [fnmatch.translate(one.removeprefix("./").rstrip("/")) for one in exclude]
        self._asked = re.compile("|".join(patterns)) if patterns else None
        usual = "|".join(map(fnmatch.translate, EXCLUDED if default_exclude else ()))
        self._usual = re.compile(usual or r"(?!)", re.IGNORECASE)
        self._starts = 0  # of remote files that were looked at

    def take_notes(self) -> Notes:
        """Give out the notes since the last call."""
        notes, self.notes = self.notes, Notes()
        return notes

    def asked_out(self, *paths: str) -> bool:
        """Tell whether a pattern that was given fits one of an entry's paths, or a folder or a name in it; count it."""
        if self._asked is None or not any(map(self._asked.match, itertools.chain.from_iterable(map(_parts, paths)))):
            return False
        self.notes.skipped["excluded"] += 1
        return True

    def out(self, name: str, path: str) -> bool:
        """Tell whether a name that was found is excluded, at a path whose folders are not; count it if so."""
        out = self._usual.match(name) or (self._asked and (self._asked.match(name) or self._asked.match(path)))
        if out:
            self.notes.skipped["excluded"] += 1
        return bool(out)

    def hides(self, name: str) -> bool:
        """Tell whether a folder of this name is left out, by whatever rule."""
        return name[:1] == "." or bool(self._usual.match(name) or (self._asked and self._asked.match(name)))

    def member_out(self, member: str) -> bool:
        """Tell whether a member of an archive is hidden or excluded, or in a folder that is; count it if so."""
        names = member.split("/")
        if any(name[:1] == "." and name not in (".", "..") for name in names):
            self.notes.skipped["hidden"] += 1
            return True
        if any(map(self._usual.match, names)):
            self.notes.skipped["excluded"] += 1
            return True
        return self.asked_out(member)

    def file_out(self, name: str) -> bool:
        """Tell whether a file is excluded, whose folders are not; count it if so. No usual pattern fits an image."""
        if self._asked is None and name.lower().endswith(SUFFIXES):
            return False
        return self.out(name.rpartition("/")[2], name)

    def is_image(self, file: File) -> bool:
        """Tell whether a file is an image: by its ending, or by its first bytes where that says nothing."""
        if file.name.lower().endswith(SUFFIXES):
            return True
        if suffix_of(file.name) in OTHERS:
            return False
        if remote.is_remote(file.place):
            self._starts += 1
            if self._starts > REMOTE_STARTS:
                return False
        return starts_as_image(read_start(file.place))

    @contextmanager
    def telling(self, name: str, place: str) -> Iterator[None]:
        """Make a SourceError about one entry a problem."""
        try:
            yield
        except SourceError as error:
            self.notes.problem(name, place, str(error))


def _parts(path: str) -> Iterator[str]:
    """Give each name of a path, and the path up to it."""
    names = path.split("/")
    yield from names
    yield from itertools.accumulate(names, "{}/{}".format)


def read_start(place: str, size: int = START) -> bytes:
    """Read the first bytes of a file; none where it cannot be read."""
    try:
        if remote.is_remote(place):
            return remote.read_start(place, size)
        with open_regular(place) as file:
            return file.read(size) or b""
    except (OSError, ValueError):
        return b""


def member_is_image(member: str, data: BinaryIO, start: int) -> bool:
    """Tell whether a member of an archive is an image; its first byte is at `start` of the data."""
    if member.lower().endswith(SUFFIXES):
        return True
    if suffix_of(member) in OTHERS:
        return False
    data.seek(start)
    return starts_as_image(data.read(START))


def starts_as_image(data: bytes) -> bool:
    """Tell by the first START bytes whether a file is an image; a TGA has its mark at its end."""
    kind = kind_of(data)
    return kind is not None and (kind != "ICO" or (data[4:6] != b"\0\0" and data[9:10] == b"\0"))  # its mark is short
