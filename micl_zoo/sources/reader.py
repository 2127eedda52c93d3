"""Reader: the bytes behind the entries of an index, local or remote."""

from __future__ import annotations

import pyarrow as pa

from ..errors import Refused, SourceError, unknown
from .index import Entry
from .kinds import KINDS
from .places import OpenFiles, check_bytes


class Reader:
    """Reads the bytes behind entries.

    It keeps one parquet row group at hand, so that index order reads each once, and the last tars and zips open, which
    a process forked from this one may share. It keeps no connection.
    """

    def __init__(self) -> None:
        self._files = OpenFiles()

    def read(self, entry: Entry) -> bytes:
        """Read one encoded image.

        Raises:
            Refused: reason "unreadable" when the file cannot be read (what is remote is tried three times); "damaged"
                or "truncated" when a zip's member is not what it was; "too_large" above MAX_BYTES.
            SourceError: a package for the kind of URI is missing, or the kind of file is not known.
        """
        try:
            check_bytes(entry.length)
            for kind in KINDS:
                if kind.name == entry.kind:
                    return kind.read(self._files, entry)
        except (OSError, pa.ArrowException) as error:
            raise Refused("unreadable", str(error) if entry.uri in str(error) else f"{entry.uri}: {error}") from None
        raise SourceError(unknown("kind of source", entry.kind, {kind.name for kind in KINDS}) + " Upgrade micl-zoo.")
