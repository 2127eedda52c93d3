"""One process embeds shards: decoding, transfer, model and writing overlap; each image has a row or a refusal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..encoders.encoder import Encoder, Pool
from ..errors import MiclZooError
from ..images.decode import Decoding
from ..sources.index import Entry, ImageIndex
from ..stores.store import RefusedRow, Rows, Store
from .decoders import Batch, Decoders

SAVE_SECONDS = 60.0  # between two times that the beginning of a shard is kept: what a killed run can lose


@dataclass
class Times:
    """Seconds, of one process.

    Attributes:
        read, decode: in the processes that decode, added up.
        wait: for them.
        transfer, model, write: of the process that runs the model.
    """

    read: float = 0.0
    decode: float = 0.0
    wait: float = 0.0
    transfer: float = 0.0
    model: float = 0.0
    write: float = 0.0

    def add(self, other: Times) -> None:
        """Add those of another piece of work."""
        for name, seconds in vars(other).items():
            setattr(self, name, getattr(self, name) + seconds)

    @property
    def bottleneck(self) -> str:
        """The stage that the others wait for: read, decode, transfer, model or write; "" before there was any work."""
        waits = {"read" if self.read > self.decode else "decode": self.wait}
        waits |= {"transfer": self.transfer, "model": self.model, "write": self.write}
        stage = max(waits, key=lambda name: waits[name])
        return stage if waits[stage] else ""


class Event(NamedTuple):
    """Progress.

    Attributes:
        shard: its number.
        images: that were embedded or refused since the last event.
        refused: of them without a row.
        finished: the shard's part is on disk.
        times: since the last event.
    """

    shard: int
    images: int
    refused: int
    finished: bool
    times: Times


@dataclass
class _Shard:
    """A shard on its way, and what is there of it so far."""

    number: int
    size: int
    pieces: list[Rows] = field(default_factory=list)
    saved: float = field(default_factory=time.monotonic)

    @property
    def images(self) -> int:
        return sum(piece.images for piece in self.pieces)

    def rows(self) -> Rows:
        """All pieces as one, which takes their place."""
        ids = [name for piece in self.pieces for name in piece.ids]
        refused = [row for piece in self.pieces for row in piece.refused]
        self.pieces = [Rows(ids, np.concatenate([piece.embeddings for piece in self.pieces]), refused)]
        return self.pieces[0]


class _Launched(NamedTuple):
    """A batch whose rows the device may still be at work on."""

    batch: Batch
    rows: list[Tensor]
    event: Any


class Model:
    """An encoder that embeds decoded pixels, in smaller pieces where its device has not the memory for all at once.

    Attributes:
        images_at_once: that have fitted so far, at most; None before any did not fit.
    """

    def __init__(self, encoder: Encoder, *, pool: Pool, normalize: bool, autocast: torch.dtype | None) -> None:
        self.encoder, self.pool, self.normalize, self.autocast = encoder, pool, normalize, autocast
        self.images_at_once: int | None = None
        self.times = Times()

    def launch(self, pixels: np.ndarray) -> tuple[list[Tensor], Any]:
        """Start on (n, size, size, 3) uint8; the rows come as float32 on the host, good once the event has happened."""
        rows, start = [], 0
        while start < len(pixels):
            piece = pixels[start : start + (self.images_at_once or len(pixels))]
            try:
                rows.append(self._embed(piece))
                start += len(piece)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                self._halve(len(piece), error)
        event = None
        if self.encoder.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.encoder.device))
        return rows, event

    def finish(self, rows: list[Tensor], event: Any) -> np.ndarray:
        """Wait for launched rows: (n, dim) float32."""
        start = time.perf_counter()
        if event is not None:
            event.synchronize()
        dim = int(np.prod(self.encoder.row_shape(self.pool)))
        found = [piece.numpy().reshape(len(piece), dim) for piece in rows]
        self.times.model += time.perf_counter() - start
        return np.concatenate(found) if found else np.empty((0, dim), np.float32)

    def _embed(self, pixels: np.ndarray) -> Tensor:
        start = time.perf_counter()
        on_host, device = torch.from_numpy(pixels), self.encoder.device
        if device.type == "cuda":
            on_host = on_host.pin_memory()
        on_device = on_host.to(device, non_blocking=True)
        middle = time.perf_counter()
        rows = self.encoder.embed_tensor(on_device, normalize=self.normalize, pool=self.pool, autocast=self.autocast)
        if device.type == "cuda":
            rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
        rows = rows.cpu()
        self.times.transfer += middle - start
        self.times.model += time.perf_counter() - middle
        return rows

    def _halve(self, images: int, error: Exception) -> None:
        if not _out_of_memory(error):
            raise error
        if images == 1:
            raise MiclZooError(
                f"{self.encoder.name} does not fit: not even one image at a time ({str(error).splitlines()[0]}). "
                "Take a smaller model, a smaller --precision, or another device."
            ) from None
        self.images_at_once = images // 2
        self.encoder.fit_compiled(self.images_at_once)
        if self.encoder.device.type == "cuda":
            torch.cuda.empty_cache()


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text


class Runner:
    """Embeds shards of a store with one model, its own processes that decode, and a thread that writes."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        pool: Pool = "cls",
        normalize: bool = True,
        autocast: torch.dtype | None = None,
        decoding: Decoding,
        batch_size: int,
        workers: int,
        image_timeout: float = 120.0,
    ) -> None:
        self.model = Model(encoder, pool=pool, normalize=normalize, autocast=autocast)
        self.batch_size = batch_size
        self.decoders = Decoders(
            encoder.transform, decoding, workers=workers, batch_size=batch_size, image_timeout=image_timeout
        )
        self._writer = ThreadPoolExecutor(1, "write")
        self._writing: deque[tuple[int, bool, Future[None]]] = deque()  # shard, all of it, when it is done

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()
        self.decoders.__exit__()

    def embed(self, index: ImageIndex) -> Iterator[Rows]:
        """An index batch by batch, without a store."""
        starts = range(0, len(index), self.batch_size)
        batches = ((None, list(index.slice(start, self.batch_size).entries())) for start in starts)
        yield from (self._collect(launched) for launched in self._launches(batches) if launched is not None)

    def run(
        self, store: Store, shards: Iterable[int | None], stop: Callable[[], bool] = lambda: False
    ) -> Generator[Event, None, None]:
        """Embed shards of a store, in order.

        Args:
            store: that has the index of the shards.
            shards: numbers; None where there is none yet but may be soon.
            stop: asked after every batch; when it is time, the beginnings of shards are kept, for the next run.
        """
        started: dict[int, _Shard] = {}
        try:
            for launched in self._launches(self._plan(store, shards, started)):
                if launched is not None:
                    yield self._add(store, started, launched)
                yield from self._written(idle=launched is None)
                if stop():
                    break
        finally:  # also of an error: nothing that was computed is lost
            wait([future for *_, future in self._writing])  # else an older beginning could come after the newer one
            for shard in started.values():
                if shard.pieces:
                    store.write_beginning(shard.number, shard.rows())
        yield from self._written(idle=True)

    def _add(self, store: Store, started: dict[int, _Shard], launched: _Launched) -> Event:
        """Put a batch to its shard, and write that when it is whole or was not saved for long."""
        rows, shard = self._collect(launched), launched.batch.tag
        shard.pieces.append(rows)
        if shard.images == shard.size:
            del started[shard.number]
            self._write(shard, store.write_part)
        elif time.monotonic() - shard.saved > SAVE_SECONDS and not self._writing:
            self._write(shard, store.write_beginning)
        return Event(shard.number, rows.images, len(rows.refused), False, self._times())

    def _plan(
        self, store: Store, shards: Iterable[int | None], started: dict[int, _Shard]
    ) -> Iterator[tuple[_Shard, Sequence[Entry]] | None]:
        """The batches of shards, which never span two of them, from where an earlier run has stopped."""
        for number in shards:
            if number is None:
                yield None
                continue
            index, begun = store.shard(number), store.beginning(number)
            shard = started[number] = _Shard(number, len(index))
            if begun is not None and begun.images < len(index):
                shard.pieces.append(begun)
            for start in range(shard.images, len(index), self.batch_size):
                yield shard, list(index.slice(start, self.batch_size).entries())

    def _launches(self, batches: Iterable[tuple[Any, Sequence[Entry]] | None]) -> Iterator[_Launched | None]:
        """Batches on their way through the model; None where there are none for now.

        On a GPU the next batch is under way before the last is waited for.
        """
        before: deque[_Launched] = deque()
        start = time.perf_counter()
        for batch in self.decoders.batches(batches):
            self.model.times.wait += time.perf_counter() - start
            if batch is not None:
                self.model.times.read += batch.read_seconds
                self.model.times.decode += batch.decode_seconds
                before.append(_Launched(batch, *self.model.launch(batch.pixels)))
            while before and (batch is None or before[0].event is None or len(before) > 1):
                yield before.popleft()
            if batch is None:
                yield None
            start = time.perf_counter()
        yield from before

    def _collect(self, launched: _Launched) -> Rows:
        batch = launched.batch
        refused = [
            RefusedRow(entry.id, entry.uri, batch.refused[place].reason, batch.refused[place].detail)
            for place, entry in enumerate(batch.entries)
            if place in batch.refused
        ]
        ids = [entry.id for place, entry in enumerate(batch.entries) if place not in batch.refused]
        return Rows(ids, self.model.finish(launched.rows, launched.event), refused)

    def _write(self, shard: _Shard, write: Callable[[int, Rows], None]) -> None:
        shard.saved = time.monotonic()
        rows = shard.rows()
        future = self._writer.submit(write, shard.number, rows)
        self._writing.append((shard.number, rows.images == shard.size, future))

    def _written(self, *, idle: bool) -> Iterator[Event]:
        """What was written meanwhile. With a part waiting behind another, writing is what the rest waits for."""
        while self._writing and (idle or len(self._writing) > 1 or self._writing[0][2].done()):
            start = time.perf_counter()
            number, whole, future = self._writing.popleft()
            future.result()
            self.model.times.write += time.perf_counter() - start
            if whole:
                yield Event(number, 0, 0, True, self._times())

    def _times(self) -> Times:
        """Since it was asked last."""
        times, self.model.times = self.model.times, Times()
        return times
