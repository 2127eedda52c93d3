"""The queue of a run: shards from the thread that lists them to whoever embeds them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Semaphore
from typing import Any

from ..errors import MiclZooError

LISTED_AHEAD = 1000  # shards listed and not taken yet; then listing waits
TRIES = 2  # of a shard


class Work:
    """Gives out the shards of a run in order, and takes them back from processes that die.

    All that can happen to a run arrives in one queue, into which every thread and a signal handler may put: shards, the
    end of the source, what processes say, the wish to stop. A single thread takes it in (`receive`, `hear`), and blocks
    there when it has nothing else to do.
    """

    def __init__(self) -> None:
        self.failed: dict[int, str] = {}  # shards that failed too often, and how they did last
        self.error: MiclZooError | None = None  # that ended the source, to be raised after the shards before it
        self.stopped = False  # the run is to keep what it has and to leave
        # Not a queue.Queue: a signal handler that puts into one can wait for a lock which its own thread holds.
        self._arrived: SimpleQueue[tuple[Callable[[Any], object], Any]] = SimpleQueue()
        self._room = Semaphore(LISTED_AHEAD)
        self._listed, self._again = deque[int](), deque[int]()
        self._said: list[Any] = []
        self._tries: Counter[int] = Counter()
        self._ended = False

    def put(self, shard: int) -> None:
        """Add a shard; waits while LISTED_AHEAD are there."""
        self._room.acquire()
        self._arrived.put((self._listed.append, shard))

    def end(self, error: BaseException | None = None) -> None:
        """No other shard comes; `error` says why, if it is not that all are listed."""
        self._arrived.put((self._end, error))

    def tell(self, said: Any) -> None:
        """Pass on a message, for `hear`."""
        self._arrived.put((self._said.append, said))

    def stop(self) -> None:
        """Stop the run. Safe in a signal handler."""
        self.stopped = True
        self._arrived.put((lambda _: None, None))

    def close(self) -> None:
        """Stop, and let go a thread that waits in `put`."""
        self.stop()
        self._room.release()

    def receive(self, seconds: float | None = None) -> None:
        """Take in all that has arrived. If nothing has, wait for it, at most for some seconds."""
        with suppress(Empty):
            act, what = self._arrived.get(timeout=seconds)
            while True:
                act(what)
                act, what = self._arrived.get_nowait()

    def hear(self, seconds: float | None = None) -> list[Any]:
        """Receive; the messages that have arrived, which may be none."""
        self.receive(seconds)
        said = self._said.copy()
        self._said.clear()
        return said

    def take(self) -> int | None:
        """The next shard of those received; None if there is none for now."""
        if self._again:
            return self._again.popleft()
        if not self._listed:
            return None
        self._room.release()
        return self._listed.popleft()

    @property
    def over(self) -> bool:
        """All shards are taken and no other comes, unless one is given back."""
        return self._ended and not self._again and not self._listed

    def give_back(self, shards: Sequence[int], why: str, *, guilty: bool = True) -> None:
        """Return the shards of a process that died; the first is the one it was at.

        That one counts as failed once more if the process is guilty. Losing a whole machine does not count as a failure
        of the shard; it is retried while other machines remain.
        """
        for place, shard in enumerate(shards):
            self._tries[shard] += guilty and place == 0
            if self._tries[shard] >= TRIES:
                self.failed[shard] = why
            else:
                self._again.append(shard)

    def __iter__(self) -> Iterator[int]:
        """Take shards, waiting for each, until there are no more or the run is stopped."""
        while not self.stopped:
            if (shard := self.take()) is not None:
                yield shard
            elif self.over:
                return
            else:
                self.receive()

    def _end(self, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, MiclZooError):
            raise error
        self._ended, self.error = True, error
