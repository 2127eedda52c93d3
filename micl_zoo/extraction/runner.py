"""Embeds shards in one process: decoding, transfer, model and writing overlap; each image has a row or a refusal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ..encoders.device import Backend
from ..encoders.encoder import Encoder
from ..errors import MiclZooError, Refused
from ..sources.index import Entry, ImageIndex
from ..stores.manifest import Runtime
from ..stores.parts import Made, RefusedRow, Rows
from ..stores.store import Store
from ..zoo.pools import Pool
from .decoders import Batch, Decoders
from .options import ExtractOptions
from .retry import begins, check_part_fits, made_now, merged, tried_again
from .work import Work

SAVE_SECONDS = 60.0  # between two saves of the beginning of a shard: what a killed run can lose


@dataclass
class Times:
    """Seconds spent in each stage by one process."""

    read: float = 0.0  # this and `decode`: of the decoding processes, added up
    decode: float = 0.0
    wait: float = 0.0  # for them
    transfer: float = 0.0  # this and the others: of the process that runs the model
    model: float = 0.0
    write: float = 0.0

    def add(self, other: Times) -> None:
        """Add the times of another piece of work."""
        for name, seconds in vars(other).items():
            setattr(self, name, getattr(self, name) + seconds)

    @property
    def bottleneck(self) -> str:
        """Name the stage that the others wait for: read, decode, transfer, model or write; "" before any work."""
        waits = {"read" if self.read > self.decode else "decode": self.wait}
        waits |= {"transfer": self.transfer, "model": self.model, "write": self.write}
        stage = max(waits, key=lambda name: waits[name])
        return stage if waits[stage] else ""


class Event(NamedTuple):
    """Progress."""

    shard: int  # its number
    images: int  # images embedded or refused since the last event
    refused: int  # images refused since the last event
    finished: bool  # the shard's part is on disk
    times: Times  # times since the last event
    again: bool = False  # these images had been refused before


@dataclass
class _Shard:
    """A shard that is being embedded, and the rows computed so far."""

    number: int
    index: ImageIndex
    size: int  # images to go through
    made: Made  # by what
    before: Rows | None = None  # its part, of which some refused images are tried again
    pieces: list[Rows] = field(default_factory=list)
    saved: float = field(default_factory=time.monotonic)

    @property
    def images(self) -> int:
        return sum(piece.images for piece in self.pieces)

    def rows(self) -> Rows:
        """Join the pieces; of images that are tried again, with the rest of their part."""
        ids = [name for piece in self.pieces for name in piece.ids]
        refused = [row for piece in self.pieces for row in piece.refused]
        rows = Rows(ids, np.concatenate([piece.embeddings for piece in self.pieces]), refused, self.made)
        self.pieces = [rows]
        return rows if self.before is None else merged(self.index, self.before, rows, self.made)


_Launched = tuple[Batch, list[Tensor], Any]  # a batch, its rows, the event after which the device has computed them


class Model:
    """An encoder that embeds decoded pixels, in smaller pieces where its device has not the memory for all at once."""

    def __init__(self, encoder: Encoder, *, pool: Pool, normalize: bool, autocast: torch.dtype | None) -> None:
        self.encoder, self.pool, self.normalize, self.autocast = encoder, pool, normalize, autocast
        self.images_at_once: int | None = None  # that the device has memory for; None before any did not fit
        self.times = Times()

    def launch(self, pixels: np.ndarray) -> tuple[list[Tensor], Any]:
        """Start embedding (n, size, size, 3) uint8: float32 rows on the host, valid once the event has happened."""
        rows, start = [], 0
        while start < len(pixels):
            piece = pixels[start : start + (self.images_at_once or len(pixels))]
            try:
                rows.append(self._embed(piece))
                start += len(piece)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                self._halve(len(piece), error)
        if self.encoder.device.type != "cuda":
            return rows, None
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
        on_device = (on_host.pin_memory() if device.type == "cuda" else on_host).to(device, non_blocking=True)
        middle = time.perf_counter()
        self.times.transfer += middle - start
        rows = self.encoder.embed_tensor(on_device, normalize=self.normalize, pool=self.pool, autocast=self.autocast)
        if device.type == "cuda":
            rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
        rows = rows.cpu()
        self.times.model += time.perf_counter() - middle
        return rows

    def _halve(self, images: int, error: Exception) -> None:
        short = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not short and "can't allocate memory" not in str(error).lower():
            if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
                raise error
            raise MiclZooError(
                f"torch.compile failed for {self.encoder.name} ({str(error).splitlines()[0]}): leave compile out; or "
                "delete its cache, TORCHINDUCTOR_CACHE_DIR or torchinductor_USER in the folder for temporary files, in "
                "which a compilation that was killed leaves half a file"
            ) from None
        if images == 1:
            raise MiclZooError(
                f"{self.encoder.name} does not fit: not even one image at a time ({str(error).splitlines()[0]}). "
                "Take a smaller model, a smaller --precision, or another device."
            ) from None
        self.images_at_once = images // 2
        self.encoder.fit_compiled(self.images_at_once)
        if self.encoder.device.type == "cuda":
            torch.cuda.empty_cache()


class Runner:
    """Embeds shards of a store with one model, its own decoding processes, and a thread that writes."""

    def __init__(
        self, encoder: Encoder, options: ExtractOptions, batch_size: int, workers: int, autocast: torch.dtype | None
    ) -> None:
        self.model = Model(encoder, pool=options.pool or encoder.pool, normalize=options.normalize, autocast=autocast)
        self.options, self.batch_size = options, batch_size
        self.made = made_now(runtime_name(encoder.backend, options.compile), options)
        self.decoders = Decoders(encoder.transform, options.decoding, workers, batch_size, options.image_timeout)
        self._planned: Iterator[tuple[_Shard, Sequence[Entry]]] = iter(())  # batches of the shard taken last
        self._launched: deque[_Launched] = deque()
        self._started: dict[int, _Shard] = {}
        self._writer = ThreadPoolExecutor(1, "write")
        self._writing: deque[tuple[int, bool, Future[None]]] = deque()  # shard, all of it, when it is done

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()
        self.decoders.__exit__()

    def embed(self, index: ImageIndex) -> Iterator[Rows]:
        """Embed an index batch by batch, without a store."""
        for start in range(0, len(index), self.batch_size):
            if not self.decoders.room and (launched := self._next()):
                yield self._collect(*launched)
            self.decoders.submit(None, list(index.slice(start, self.batch_size).entries()))
        while launched := self._next():
            yield self._collect(*launched)

    def run(self, store: Store, work: Work) -> Generator[Event, None, None]:
        """Embed shards of a store, in order, until there are no more or the work is stopped.

        Whatever ends it, the beginnings of unfinished shards are kept for the next run.
        """
        try:
            while not work.stopped:
                work.receive(0)
                self._plan(store, work)
                if launched := self._next():
                    yield self._add(store, launched[0].tag, self._collect(*launched))
                    yield from self._written(idle=False)
                elif self._writing:
                    yield from self._written(idle=True)
                elif work.over:
                    break
                elif not work.stopped:
                    work.receive()
        finally:  # also of an error: nothing that was computed is lost
            wait([future for *_, future in self._writing])  # else an older beginning could come after the newer one
            for shard in self._started.values():
                if shard.pieces:
                    _save(store, shard, shard.rows())
        yield from self._written(idle=True)

    def _plan(self, store: Store, work: Work) -> None:
        """Submit batches while there is room. None spans two shards."""
        while self.decoders.room:
            if batch := next(self._planned, None):
                self.decoders.submit(*batch)
            elif (number := work.take()) is not None:
                self._planned = self._batches(store, number)
            else:
                return

    def _batches(self, store: Store, number: int) -> Iterator[tuple[_Shard, Sequence[Entry]]]:
        """Cut what is to be done of a shard into batches."""
        index = store.shard(number)
        shard, left = self._begun(store, number, index)
        self._started[number] = shard
        if not len(left):
            self._finish(store, shard)
        for start in range(0, len(left), self.batch_size):
            yield shard, list(left.slice(start, self.batch_size).entries())

    def _begun(self, store: Store, number: int, index: ImageIndex) -> tuple[_Shard, ImageIndex]:
        """Begin a shard, or go on with what there is of it; also the images left to do."""
        if store.has_part(number):
            rows = store.rows(number)
            check_part_fits(store, number, index, rows)
            rows = rows._replace(made=rows.made or store.made_before)
            again = tried_again(rows.refused, rows.made or store.made_before, self.options)
            left = ImageIndex(index.table.filter(pa.array([name in again for name in index.ids], pa.bool_())))
            return _Shard(number, index, len(left), self.made, before=rows), left
        begun = store.beginning(number)
        if begun is None or not 0 < begun.images <= len(index) or not begins(index, begun):
            return _Shard(number, index, len(index), self.made), index
        made = (begun.made or store.made_before).then(self.made, {row.reason for row in begun.refused})
        return _Shard(number, index, len(index), made, pieces=[begun]), index.slice(begun.images, len(index))

    def _next(self) -> _Launched | None:
        """Wait for the next batch to be embedded; None if none was submitted."""
        ahead = 2 if self.model.encoder.device.type == "cuda" else 1  # a GPU works on one while another is collected
        while self.decoders.pending and len(self._launched) < ahead:
            start = time.perf_counter()
            batch = self.decoders.take()
            self.model.times.wait += time.perf_counter() - start
            self.model.times.read += batch.read_seconds
            self.model.times.decode += batch.decode_seconds
            self._launched.append((batch, *self.model.launch(batch.pixels)))
        return self._launched.popleft() if self._launched else None

    def _add(self, store: Store, shard: _Shard, rows: Rows) -> Event:
        """Add rows to their shard, and write that when it is whole or was not saved for long."""
        shard.pieces.append(rows)
        if shard.images == shard.size:
            self._finish(store, shard)
        elif time.monotonic() - shard.saved > SAVE_SECONDS and not self._writing:
            shard.saved = time.monotonic()
            self._writing.append((shard.number, False, self._writer.submit(_save, store, shard, shard.rows())))
        return Event(shard.number, rows.images, len(rows.refused), False, self._times(), shard.before is not None)

    def _finish(self, store: Store, shard: _Shard) -> None:
        """Write a shard that is whole; nothing where trying again has changed nothing."""
        del self._started[shard.number]
        rows = shard.rows() if shard.pieces else shard.before
        assert rows is not None
        self._writing.append((shard.number, True, self._writer.submit(_save, store, shard, rows)))

    def _collect(self, batch: Batch, rows: list[Tensor], event: Any) -> Rows:
        embeddings, refused = self.model.finish(rows, event), dict(batch.refused)
        places = [place for place in range(len(batch.entries)) if place not in refused]
        for at, why in not_finite(embeddings, self.options.dtype).items():
            refused[places[at]] = why
        if len(refused) > len(batch.refused):
            embeddings = embeddings[[at for at, place in enumerate(places) if place not in refused]]
        ids = [entry.id for place, entry in enumerate(batch.entries) if place not in refused]
        reasons = [(batch.entries[place], refused[place]) for place in sorted(refused)]
        lines = [RefusedRow(entry.id, entry.uri, why.reason, why.detail) for entry, why in reasons]
        return Rows(ids, embeddings, lines)

    def _written(self, *, idle: bool) -> Iterator[Event]:
        """Tell what was written meanwhile. With a part waiting behind another, writing is what the rest waits for."""
        while self._writing and (idle or len(self._writing) > 1 or self._writing[0][2].done()):
            start = time.perf_counter()
            number, whole, future = self._writing.popleft()
            future.result()
            self.model.times.write += time.perf_counter() - start
            if whole:
                yield Event(number, 0, 0, True, self._times())

    def _times(self) -> Times:
        """Return the times since the last call."""
        times, self.model.times = self.model.times, Times()
        return times


def _save(store: Store, shard: _Shard, rows: Rows) -> None:
    """Write what there is of a shard: its part, if it is whole or was before, else its beginning."""
    if shard.before is None and rows.images < len(shard.index):
        store.write_beginning(shard.number, rows)
    elif shard.before is None or (rows.ids, rows.refused, rows.made) != (
        shard.before.ids,
        shard.before.refused,
        shard.before.made,
    ):
        store.write_part(shard.number, rows)


def not_finite(rows: np.ndarray, dtype: str) -> dict[int, Refused]:
    """Refuse rows, (n, dim), that are not numbers; by their places."""
    with np.errstate(over="ignore"):
        stored = rows.astype(dtype, copy=False)
    found = {}
    for at in np.flatnonzero(~np.isfinite(stored).all(1)).tolist():
        fits = "its numbers are too large for float16: extract with --dtype float32"
        computed = "the model computed for it what is no finite number: try --precision fp32 or another backend"
        found[at] = Refused("not_finite", fits if np.isfinite(rows[at]).all() else computed)
    return found


def runtime_name(backend: Backend, compiled: bool) -> Runtime:
    """Name what runs the model, as manifests and parts have it."""
    return cast(Runtime, backend + " compiled" * compiled)
