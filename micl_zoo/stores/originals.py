"""The images that a store was made of, read where its index says that they are."""

from __future__ import annotations

from collections import Counter

from ..errors import Refused
from ..sources.index import Entry
from ..sources.reader import Reader
from ..sources.remote import is_remote
from .store import Store

SHOWN = 3  # servers that are named


class Originals:
    """Reads images of a store; from a server only if its user has named that, or allows all.

    The index of a store that somebody else has made may name any server. The one that the store itself is at was named
    to open it.
    """

    def __init__(self, store: Store, *, remote: bool) -> None:
        self._reader, self._remote, self._own = Reader(), remote, _server(store.folder.location)
        self._unasked = Counter[str]()

    def may_read(self, entry: Entry) -> bool:
        """Tell whether an image is on this machine or on a server that may be asked; count it if not."""
        server = _server(entry.uri)
        if self._remote or server in ("", self._own):
            return True
        self._unasked[server] += 1
        return False

    def read(self, entry: Entry) -> bytes:
        """Read one encoded image; raise Refused where that cannot or may not be."""
        if not self.may_read(entry):
            raise Refused("unreadable", "its server is not asked without --remote (from Python remote=True)")
        return self._reader.read(entry)

    def unasked(self) -> str:
        """Say how many images are on which servers that were not asked; "" where there are none."""
        if not self._unasked:
            return ""
        names = [repr(name) for name, _ in self._unasked.most_common(SHOWN)]
        more = f" and {len(self._unasked) - SHOWN:,} more" if len(self._unasked) > SHOWN else ""
        return (
            f"{self._unasked.total():,} images are at {', '.join(names)}{more}, which is not asked for them without "
            "--remote (from Python remote=True)"
        )


def _server(place: str) -> str:
    """Return scheme and host, or bucket, of an address as they are written; "" of a path of this machine."""
    return "/".join(place.split("/", 3)[:3]).lower() if is_remote(place) else ""
