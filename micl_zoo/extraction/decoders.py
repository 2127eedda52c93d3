"""Processes that read and decode: pixels come back through shared memory, and a dead or hung process costs one image.

Not torch's DataLoader, which ends the whole run with the first worker that dies, cannot say which image it died of, and
waits forever for one that hangs.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import mmap
import os
import pickle
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MiclZooError, Refused
from ..images import formats
from ..images.decode import BYTES_PER_PIXEL, Decoding, decode_pixels, refusal_of
from ..images.transform import Transform
from ..sources.index import Entry
from ..sources.reader import Reader
from .processes import CAN_START, Child, parent_pipe, wait_for_message

TRIES = 2  # of an image by itself, after the process that had it among others was lost
CHUNK = 8  # images per message: few enough that all processes work on the batch that is needed next
QUEUED_BYTES = 1 << 16  # of messages that a process has not answered: less than any pipe holds, so sending never waits
STARTS = 3  # of processes that die before they come to work, in a row; then something is wrong with all of them
READ_BYTES = 2 << 30  # of memory that a process may take to read: an image, or the row group of a table that it is in
BATCHES_AHEAD = 3  # decoded or being decoded; each has its place in the shared memory

Outcome = tuple[dict[int, Refused], float, float]  # of a chunk: refusals by place in it, seconds to read and to decode


@dataclass
class Batch:
    """Images that were read and decoded, or refused."""

    tag: Any  # what came with the entries
    entries: Sequence[Entry]  # the images asked for, in order
    slots: np.ndarray  # (batch_size, size, size, 3) uint8, this batch's part of the shared memory
    left: int  # images that are not decoded yet
    refused: dict[int, Refused] = field(default_factory=dict)  # by place in `entries`
    read_seconds: float = 0.0  # of the decoding processes, added up
    decode_seconds: float = 0.0  # likewise

    @property
    def pixels(self) -> np.ndarray:
        """(n, *size, 3) uint8 of the images that were not refused, in order."""
        if not self.refused:
            return self.slots[: len(self.entries)]
        return self.slots[[place for place in range(len(self.entries)) if place not in self.refused]]


@dataclass
class _Chunk:
    batch: Batch
    slot: int
    at: int
    entries: Sequence[Entry]
    alone: int = 0  # times a process died or hung over it and it alone


class _Process(Child):
    """One process, and the chunks that it was given and has not answered."""

    def __init__(self, job: bytes, memory: int) -> None:
        super().__init__("micl_zoo.extraction.decoders:work", files=[memory])
        self.chunks: deque[tuple[_Chunk, int]] = deque()  # with the bytes of their messages, oldest first
        self.queued = 0  # bytes of these messages
        self.ready = False  # it has come to work
        self.since = time.monotonic()  # when it last answered, or was given work when it had none
        self.connection.send_bytes(job)

    def give(self, chunk: _Chunk) -> bool:
        """Send a chunk, unless so much waits already that sending could block."""
        message = pickle.dumps((chunk.slot, chunk.at, list(chunk.entries)), pickle.HIGHEST_PROTOCOL)
        if self.chunks and self.queued + len(message) > QUEUED_BYTES:
            return False
        if not self.chunks:
            self.since = time.monotonic()
        self.chunks.append((chunk, len(message)))
        self.queued += len(message)
        with contextlib.suppress(OSError):  # it has died, which is seen when its answers are read
            self.connection.send_bytes(message)
        return True

    def answered(self) -> _Chunk:
        """Take the oldest chunk off."""
        chunk, size = self.chunks.popleft()
        self.queued -= size
        self.since = time.monotonic()
        return chunk


class Decoders:
    """Reads and decodes batches ahead of whoever takes them, in processes of its own or, with none, in this one.

    A process that dies or hangs is replaced. The images that it had are tried again one by one; the one that takes a
    process along TRIES times is refused. With 0 workers nothing guards against crashes and hangs. `batch_size` is that
    of the largest batch, `image_timeout` the seconds that a process may take over one image or a chunk of CHUNK.
    """

    def __init__(
        self, transform: Transform, decoding: Decoding, workers: int, batch_size: int, image_timeout: float
    ) -> None:
        self.transform, self.decoding, self.image_timeout = transform, decoding, image_timeout
        shape = (BATCHES_AHEAD, batch_size, *transform.size, 3)
        self._file = _unnamed_file()
        self._file.truncate(math.prod(shape))
        self._slots = np.frombuffer(mmap.mmap(self._file.fileno(), math.prod(shape)), np.uint8).reshape(shape)
        self._job = pickle.dumps((transform, decoding, shape))
        self._reader = Reader(decoding.max_pixels)
        self._processes = [_Process(self._job, self._file.fileno()) for _ in range(workers if CAN_START else 0)]
        self.pending: deque[Batch] = deque()  # submitted and not taken
        self._submitted = 0
        self._backlog: deque[_Chunk] = deque()
        self._stillborn = 0  # processes in a row that died before they came to work

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.process.kill()  # all at once, then wait
        for process in self._processes:
            process.end()
        self._file.close()

    @property
    def room(self) -> bool:
        """Another batch can be submitted."""
        return len(self.pending) < BATCHES_AHEAD

    def submit(self, tag: Any, entries: Sequence[Entry]) -> None:
        """Decode a batch, of `batch_size` at most. The pixels of the one that was taken last are lost."""
        assert self.room
        slot = self._submitted % BATCHES_AHEAD  # they are taken in order: it is free, or that of the batch taken last
        self._submitted += 1
        self.pending.append(batch := Batch(tag, entries, self._slots[slot], len(entries)))
        starts = range(0, len(entries), CHUNK)
        self._backlog.extend(_Chunk(batch, slot, at, entries[at : at + CHUNK]) for at in starts)

    def take(self) -> Batch:
        """Wait for the oldest batch."""
        self._pump(0)
        while self.pending[0].left:
            self._pump(0.5)
        return self.pending.popleft()

    def _pump(self, seconds: float) -> None:
        """Give out chunks, and take answers that come within some seconds."""
        if not self._processes:
            if self._backlog:
                chunk = self._backlog.popleft()
                pixels = chunk.batch.slots[chunk.at :]
                self._settle(chunk, _decode_into(pixels, chunk.entries, self._reader, self.transform, self.decoding))
            return
        self._give_out()
        ready = wait([process.connection for process in self._processes], seconds)
        for process in [process for process in self._processes if process.connection in ready]:
            self._take(process)
        for process in self._processes:
            if process.chunks and process.ready and time.monotonic() - process.since > self.image_timeout:
                self._replace(process, "timeout", f"it took longer than {self.image_timeout:g} s")
        self._give_out()

    def _give_out(self) -> None:
        while self._backlog:
            process = min(self._processes, key=lambda one: len(one.chunks))
            if not process.give(self._backlog[0]):
                return
            self._backlog.popleft()

    def _take(self, process: _Process) -> None:
        try:
            while process.connection.poll():
                answer = process.connection.recv()
                if answer is None:
                    process.ready, process.since, self._stillborn = True, time.monotonic(), 0
                else:
                    self._settle(process.answered(), answer)
        except (EOFError, OSError):
            self._replace(process, "crashed", "the process that decoded it")

    def _settle(self, chunk: _Chunk, outcome: Outcome) -> None:
        batch, (refused, reading, decoding) = chunk.batch, outcome
        batch.left -= len(chunk.entries)
        batch.refused |= {chunk.at + place: why for place, why in refused.items()}
        batch.read_seconds, batch.decode_seconds = batch.read_seconds + reading, batch.decode_seconds + decoding

    def _replace(self, process: _Process, reason: Any, what: str) -> None:
        """Replace a process, and put its chunks back, those of the first one by one."""
        ended = process.end()
        self._stillborn += not process.ready
        if self._stillborn >= STARTS:
            raise MiclZooError(f"a process that decodes images could not start: it {ended}. Its own message is above.")
        self._processes[self._processes.index(process)] = _Process(self._job, self._file.fileno())
        chunks = [chunk for chunk, _ in process.chunks]
        if chunks and process.ready:
            first = chunks.pop(0)
            first.alone += len(first.entries) == 1
            if first.alone == TRIES:
                detail = f"{what} {ended}" if reason == "crashed" else what
                self._settle(first, ({0: Refused(reason, f"{detail}, {TRIES} times")}, 0.0, 0.0))
            else:
                singly = [replace(first, at=first.at + at, entries=[one]) for at, one in enumerate(first.entries)]
                chunks = [*singly, *chunks]
        self._backlog.extendleft(reversed(chunks))


def _unnamed_file() -> Any:
    """Open a file in memory where the system can: /dev/shm is small in containers, and does not limit this one."""
    with contextlib.suppress(AttributeError, OSError):  # of other systems, and of sandboxes
        return os.fdopen(os.memfd_create("micl-zoo-pixels"), "rb+", buffering=0)
    return tempfile.TemporaryFile()


def _decode_into(
    pixels: np.ndarray, entries: Sequence[Entry], reader: Reader, transform: Transform, decoding: Decoding
) -> Outcome:
    """Read and decode entries into the first rows of (n, *size, 3) uint8."""
    refused: dict[int, Refused] = {}
    reading = decoded = 0.0
    for place, entry in enumerate(entries):
        start = middle = time.perf_counter()
        try:
            data = reader.read(entry)
            middle = time.perf_counter()
            pixels[place] = decode_pixels(data, transform, decoding)
        except Refused as error:
            refused[place] = Refused(error.reason, error.detail)  # without its traceback, which holds what was decoded
        except (MemoryError, OSError, ValueError) as error:  # past decoding: a picture too odd to resize
            refused[place] = refusal_of(error) or Refused("damaged", f"{type(error).__name__}: {error}")
        end = time.perf_counter()
        reading, decoded = reading + middle - start, decoded + end - middle
    return refused, reading, decoded


def work(connection: int, memory: int) -> None:
    """Run a decoding process: chunks in, outcomes out, until the other end is gone. Takes two file descriptors."""
    pipe = parent_pipe(connection)
    warnings.filterwarnings("ignore", module="PIL")  # its complaints about odd files; refusals are for the ledger
    transform, decoding, shape = pickle.loads(pipe.recv_bytes())
    formats.readable()  # imports plug-ins now, not when an image leaves no memory for them
    with contextlib.suppress(ModuleNotFoundError):  # one core per process: workers share the machine
        vars(importlib.import_module("PIL.AvifImagePlugin"))["DEFAULT_MAX_THREADS"] = 1
    limit = _limit_memory(decoding)
    slots = np.frombuffer(mmap.mmap(memory, math.prod(shape)), np.uint8).reshape(shape)
    reader = Reader(decoding.max_pixels)
    with contextlib.suppress(EOFError, OSError):
        pipe.send(None)
        while wait_for_message(pipe):
            slot, at, entries = pickle.loads(pipe.recv_bytes())
            refused, *seconds = _decode_into(slots[slot, at:], entries, reader, transform, decoding)
            pipe.send(({place: _with_limit(why, limit) for place, why in refused.items()}, *seconds))


def _limit_memory(decoding: Decoding) -> int:
    """Limit the memory of this process, where Linux counts it: what it has now, and twice what a picture may take.

    Returns: bytes, 0 for no limit.
    """
    try:
        resource = importlib.import_module("resource")
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + READ_BYTES + 2 * BYTES_PER_PIXEL * decoding.max_pixels
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ImportError, OSError, ValueError, OverflowError):
        return 0
    return limit


def _with_limit(refused: Refused, limit: int) -> Refused:
    if refused.reason != "memory" or not limit:
        return refused
    detail = f"{refused.detail}: a decoding process may have {limit >> 20:,} MiB, more under a higher --max-pixels"
    return Refused("memory", detail)
