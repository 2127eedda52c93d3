"""Reader: the bytes behind the entries of an index, local or remote."""

from __future__ import annotations

import pyarrow as pa

from ..errors import Refused, SourceError, unknown
from .index import Entry
from .kinds import KINDS
from .places import OpenFiles, check_bytes, most_bytes


class Reader:
    """Reads the bytes behind entries.

    It keeps one parquet row group at hand, so that index order reads each once, and the last tars and zips open, which
    a process forked from this one may share. It keeps no connection. With a limit of pixels above the usual one, images
    may have more bytes, too.
    """

    def __init__(self, max_pixels: int = 0) -> None:
        self._files = OpenFiles(most_bytes(max_pixels))

    def read(self, entry: Entry) -> bytes:
        """Read one encoded image."""
        try:
            check_bytes(entry.length, self._files.most)
            name = entry.kind.partition(":")[0]
            for kind in KINDS:
                if kind.name == name:
                    return kind.read(self._files, entry)
        except (OSError, pa.ArrowException, SourceError) as error:  # SourceError: a URI that cannot be used
            raise Refused("unreadable", str(error) if entry.uri in str(error) else f"{entry.uri}: {error}") from None
        raise SourceError(unknown("kind of source", entry.kind, {kind.name for kind in KINDS}) + " Upgrade micl-zoo.")
