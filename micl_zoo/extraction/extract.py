"""Source -> shards -> embeddings: every image has a row or a line in the ledger, whatever happens to the processes."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, cast

import numpy as np
import torch

from .._version import package_versions
from ..encoders.device import BACKENDS, Backend, choose_backend, default_workers, precision_advice
from ..encoders.encoder import Encoder
from ..encoders.load import load
from ..errors import Interrupted, MiclZooError, StoreError, UsageError, unknown
from ..files import Folder
from ..progress import progress
from ..schema import checked, shown
from ..sources.index import ImageIndex
from ..sources.listing import list_source
from ..sources.notes import Notes
from ..stop import StopRequest
from ..stores.manifest import Manifest, read_manifest
from ..stores.parts import RefusedRow, Rows
from ..stores.store import Store
from ..zoo.names import find_place, pinned_again
from .cluster import Cluster
from .engines import Job, Local
from .indexing import Indexing
from .options import ExtractOptions
from .retry import check_part_fits
from .runner import Event, Runner, Times, runtime_name
from .work import Work

Source = str | os.PathLike[str] | ImageIndex | Sequence[str | os.PathLike[str]]
SHARD_ROWS = 10_000
PART_BYTES = 64 << 20  # of a part of long rows, such as patches: it is held in memory


@dataclass
class Summary:
    """What a call of `extract` did.

    Attributes:
        store: the finished store.
        devices: devices of the processes that ran the model.
        batch_size: images per batch.
        images: images in the index.
        embedded: images with a row.
        refused: images with a line in errors.jsonl.
        notes: what could not be listed, which has lines there, too, and what was left out of the source and why.
        failed: shards that failed twice, and how; their images have neither.
        shards_before: shards that were there already.
        computed: images this call went through.
        tried_again: those of them that had been refused before.
        recovered: those of these that have a row now.
        seconds: duration, without loading the model.
        start_up_seconds: time until the first image was begun with.
        times: time spent in each stage, added up over processes.
    """

    store: Store
    devices: list[str]
    batch_size: int
    images: int = 0
    embedded: int = 0
    refused: int = 0
    notes: Notes = field(default_factory=Notes)
    failed: dict[int, str] = field(default_factory=dict)
    shards_before: int = 0
    computed: int = 0
    tried_again: int = 0
    recovered: int = 0
    seconds: float = 0.0
    start_up_seconds: float = 0.0
    times: Times = field(default_factory=Times)

    @property
    def images_per_second(self) -> float:
        """Images per second that this call went through."""
        return self.computed / self.seconds if self.computed else 0.0

    def text(self) -> str:
        """One line for a person."""
        manifest = self.store.manifest
        rate = f", {self.images_per_second:,.1f} images/s, waiting for: {self.times.bottleneck}" * bool(self.computed)
        done = self.shards_before
        before = f", {done:,} shard{'s were' if done > 1 else ' was'} done already" if done else ""
        again = f", {self.tried_again:,} tried again and {self.recovered:,} of them embedded" * bool(self.tried_again)
        return (
            f"{self.embedded:,} of {self.images:,} images embedded by {manifest.model} in {manifest.precision}, "
            f"{' x '.join(map(str, manifest.shape))} numbers each, in {self.store.folder} "
            f"({self.seconds:.1f} s{rate}{before}{again})" + (f"; {said}" if (said := self.notes.text()) else "")
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "out": self.store.folder.location,
            **{name: value for name, value in vars(self).items() if name != "store"},
            "images_per_second": self.images_per_second,
            "bottleneck": self.times.bottleneck,
            "times": vars(self.times),
            "notes": self.notes.as_dict(),
            "manifest": dataclasses.asdict(self.store.manifest),
        }


@checked
def extract(
    source: Source,
    out: str | os.PathLike[str],
    options: ExtractOptions | None = None,
    *,
    show: bool = True,
    say: Callable[[str], None] = lambda text: None,
    **changes: Any,
) -> Summary:
    """Embed every image of a source into a store; the same call again skips the shards that are done.

    Args:
        source: see `micl_zoo.index_source`; or an index that it made, of which rows may have been taken.
        out: the store: a folder, or a URI such as s3://bucket/embeddings; new, or made by the same call.
        options: see `ExtractOptions`; None is the default ones.
        show: show a progress bar, on a terminal.
        say: is told in one line what runs where.
        changes: fields of `ExtractOptions` by name, such as `extract("photos/", "embeddings", pool="mean")`; `encoder`
            is another word for `model`. An encoder is taken as it is in memory, fine-tuned or not.

    Raises:
        SourceError, UsageError, WeightsError: what was asked for does not exist.
        StoreError: `out` holds something else, or another process writes to it.
        Interrupted: SIGTERM or Ctrl-C; what was computed is kept.
        MiclZooError: not one image of the source could be embedded; errors.jsonl says why.
    """
    started = time.monotonic()
    options, encoder = _named(replace(options or ExtractOptions(), **_fields(changes)), folder := Folder(out))
    places = _places(options)
    job = _job(options, places)
    pieces = _listed(source, options)
    pieces = chain([next(pieces)], pieces)  # a source without images is no reason to load a model
    if encoder is None and places.several:  # the processes load it; here it only says what the store will hold
        kind: Backend = "onnx" if job.backend == "onnx" else "torch"
        more: Any = {"weights": options.weights, "image_size": options.image_size}
        encoder = load(cast(str, options.model), device="cpu", backend=kind, **more)
    elif encoder is None:
        encoder = job.encoder(places.devices[0])
    if (own := encoder.precision) and options.precision not in ("auto", own):
        raise UsageError(
            f"the ONNX file of {encoder.name} computes in {own}, not in {options.precision}: leave precision out, or "
            f"export another with --precision {options.precision}"
        )
    pool = options.pool or encoder.pool
    encoder.row_shape(pool)  # raises, before there is a store
    job = replace(job, precision=own or job.precision, options=replace(options, pool=pool))
    say(_sentence(encoder, job, places))
    if not own and (advice := precision_advice(job.precision, torch.device(places.devices[0]))):
        say(advice)
    if "projection" in encoder.pools and pool != "projection":
        say("these rows are not in the encoder's space of texts: `search --text` takes those of --pool projection")
    work = Work()
    with folder.lock() as lock, StopRequest(wake=work.stop) as stop:
        asked = _manifest(encoder, job, source)
        try:
            store = Store.create(folder, asked, overwrite=options.overwrite)
        except StoreError:
            lock.undo()
            raise
        summary = Summary(store, places.devices, job.batch_size)
        with progress(f"embedding with {encoder.name}", None, show=show) as tick:
            indexing = Indexing(store, pieces, work, tick, options, asked.command)
            begun = time.monotonic()
            try:
                for event in places.run(job, encoder, store, work):
                    if not summary.computed:  # a process has loaded its model meanwhile
                        begun = time.monotonic() - event.times.wait - event.times.transfer - event.times.model
                    tick(event.images, _count(summary, event))
                    if event.finished:
                        lock.check()
                summary.seconds, summary.start_up_seconds = time.monotonic() - begun, begun - started
            finally:
                indexing.stop()
        if stop.asked:
            raise _interrupted(stop, summary)
        if work.error is not None:
            raise work.error
        lock.check()
        summary.images, summary.failed, summary.shards_before = indexing.images, work.failed, len(indexing.done)
        summary.notes = indexing.notes
        _finish(summary)
        return summary


def _count(summary: Summary, event: Event) -> str:
    """Add an event; what to say beside the progress bar."""
    summary.times.add(event.times)
    summary.computed += event.images
    summary.refused += event.refused
    if event.again:
        summary.tried_again += event.images
        summary.recovered += event.images - event.refused
    refused = f"{summary.refused:,} refused" if summary.refused else ""
    slowest = f"waiting for: {summary.times.bottleneck}" if summary.times.bottleneck else ""
    return ", ".join(filter(None, [refused, slowest]))


def _interrupted(stop: StopRequest, summary: Summary) -> Interrupted:
    number, store = stop.signal or signal.SIGTERM, summary.store
    return Interrupted(
        f"stopped by {signal.Signals(number).name}. All {summary.computed:,} images of this run are safe in "
        f"{store.folder}, in {len(store.done()):,} finished shards and the beginnings of others: "
        "run the same command to go on",
        signal=number,
    )


def _finish(summary: Summary) -> None:
    """Write the ledger, and see that nothing is missing."""
    store = summary.store
    store.remove_leftovers()
    unlisted = [RefusedRow(one.id, one.uri, "listing", one.detail) for one in summary.notes.problems]
    summary.refused, summary.embedded = store.write_ledger(unlisted), len(store)
    if not summary.failed and summary.embedded + summary.refused != summary.images:
        for number in store.done():
            check_part_fits(store, number, store.shard(number), store.rows(number))
        raise AssertionError(summary)
    if not summary.embedded and summary.refused == summary.images:
        raise MiclZooError(
            f"none of the {summary.refused} images could be embedded: see {store.folder.location}/errors.jsonl"
        )


def _fields(changes: dict[str, Any]) -> dict[str, Any]:
    """Options by their names as fields, of which `encoder` is another name of one."""
    if "encoder" in changes and "model" in changes:
        raise UsageError("encoder and model are two words for the same: give one")
    changes = {"model" if name == "encoder" else name: value for name, value in changes.items()}
    for name in changes:
        if name not in (known := [field.name for field in dataclasses.fields(ExtractOptions)]):
            raise UsageError(unknown("option", name, known))
    return changes


def _named(options: ExtractOptions, folder: Folder) -> tuple[ExtractOptions, Encoder | None]:
    """Options whose model is a name; and the encoder if one was given, which decides the others itself."""
    encoder = options.model
    if not isinstance(encoder, Encoder):
        if not isinstance(encoder, str | os.PathLike):
            raise UsageError(f"model must be a name, a path or an Encoder, it is {shown(encoder)}")
        if isinstance(encoder, str) and options.weights is None and not options.overwrite:
            encoder = pinned_again(encoder, _source_of(folder))
        place = find_place(encoder, options.weights)
        path = place.path and place.path.absolute()
        name = place.source or (place.record and place.record.name) or str(encoder)
        model, weights = (name, path) if options.weights is not None else (str(path or name), None)
        of_file = choose_backend(options.backend, weights=path)
        backend = of_file if of_file == "onnx" else options.backend
        providers = tuple(options.providers or ()) or None
        return replace(options, model=model, weights=weights, backend=backend, providers=providers), None
    if options.image_size is not None:
        raise UsageError("image_size goes with a name: load the encoder with it")
    if options.engine == "ray" or (options.processes or 1) > 1:
        raise UsageError("several processes load the model themselves: save it, and give its folder by weights=")
    encoder.check_float32()
    device = str(encoder.device)
    return replace(options, model=encoder.name, weights=None, backend=encoder.backend, devices=device), encoder


def _source_of(folder: Folder) -> str | None:
    """Return the source in the manifest of the store that is there, if there is one that can be read."""
    with suppress(StoreError):
        return read_manifest(folder)[0].source
    return None


def _places(options: ExtractOptions) -> Local | Cluster:
    if options.engine == "ray":
        return Cluster.join(options.address, options.processes)
    devices = options.devices
    if devices == "auto" and options.backend == "openvino":
        devices = "cpu"
    elif devices == "auto" and options.backend == "onnx":
        from ..encoders.onnx_session import GPU, choose_providers

        on_gpu = choose_providers("auto", options.providers)[0][0] in GPU and torch.cuda.is_available()
        devices = "cuda" if on_gpu else "cpu"
    return Local.find(devices, options.processes)


def _job(options: ExtractOptions, places: Local | Cluster) -> Job:
    """Resolve what is left open."""
    precision = options.precision if options.backend == "onnx" else places.precision(options.precision)
    device = torch.device(places.devices[0])
    backend = choose_backend(options.backend, device=device, precision=precision, compile=options.compile)
    if options.compile and not BACKENDS[backend].compiles:  # before there is a store
        raise UsageError(f"the {backend} backend compiles by itself: leave compile out, or take backend torch")
    return Job(
        options,
        backend=backend,
        precision=precision,
        batch_size=options.batch_size or (256 if device.type == "cuda" else 16),
        workers=places.workers(options.workers),
        threads=places.threads,
    )


def _sentence(encoder: Encoder, job: Job, places: Local | Cluster) -> str:
    runtime = runtime_name(job.backend, job.options.compile)
    return (
        f"{encoder.name} on {places}: {runtime} in {job.precision}, batches of {job.batch_size}, "
        f"{job.workers} process{'es' * (job.workers != 1)} decoding" + (" for each" if places.several else "")
    )


def _manifest(encoder: Encoder, job: Job, source: Source) -> Manifest:
    options = job.options
    shape = encoder.row_shape(options.pool)
    row_bytes = math.prod(shape) * np.dtype(options.dtype).itemsize
    name, sha256 = encoder.identity()
    image_size = encoder.config.image_size
    asked: Any = {"model": (encoder.source or name) if options.model == encoder.name else options.model}
    asked |= {"image_size": image_size, "backend": job.backend, "precision": job.precision}
    return Manifest(
        model=name,
        weights_sha256=sha256,
        transform=encoder.transform.id,
        decoding=options.decoding.id,
        runtime=runtime_name(job.backend, options.compile),
        precision=cast(Any, job.precision),
        pool=options.pool or encoder.pool,
        normalized=options.normalize,
        dtype=options.dtype,
        shape=list(shape),
        shard_rows=options.shard_rows or max(1, min(SHARD_ROWS, PART_BYTES // row_bytes)),
        command=replace(options, **asked).command(_sources(source)),
        versions=package_versions(*([module, f"{module}-gpu"] if (module := BACKENDS[job.backend].module) else [])),
        source=encoder.source,
        image_size=image_size,
        license=(encoder.record or encoder.config).license,
    )


def _listed(source: Source, options: ExtractOptions) -> Iterator[ImageIndex]:
    return iter([source]) if isinstance(source, ImageIndex) else list_source(source, selection=options.selection())


def _sources(source: Source) -> Sequence[str | os.PathLike[str]]:
    """Name the sources as a command does; an index has no name."""
    if isinstance(source, str | os.PathLike):
        return [source]
    return [] if isinstance(source, ImageIndex) else source


def embed_index(
    encoder: Encoder, index: ImageIndex, options: ExtractOptions, autocast: torch.dtype | None
) -> Iterator[Rows]:
    """Embed an index batch by batch, in order, without a store; `autocast` is for matrix products, None for float32."""
    workers = default_workers() if options.workers is None else options.workers
    with Runner(encoder, options, options.batch_size or 64, workers, autocast) as runner:
        yield from runner.embed(index)
