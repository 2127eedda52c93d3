"""Source -> shards -> embeddings: every image has a row or a line in the ledger, whatever happens to the processes."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from .._version import package_versions
from ..encoders.device import Backend, Precision, choose_backend, default_workers, precision_advice
from ..encoders.encoder import Encoder, Pool
from ..encoders.load import load
from ..encoders.zoo import DEFAULT
from ..errors import Interrupted, MiclZooError, UsageError
from ..files import Folder
from ..images.decode import MAX_PIXELS, Decoding
from ..progress import Tick, progress
from ..sources.index import ImageIndex
from ..sources.listing import SourceLike, list_source
from ..stop import StopRequest
from ..stores.store import Manifest, Rows, Store
from .engines import Engine, Job, Local, Work
from .indexing import Listing
from .runner import Runner, Times

if TYPE_CHECKING:
    from .cluster import Cluster

SHARD_ROWS = 10_000
PART_BYTES = 64 << 20  # of a part of long rows, such as patches: it is held in memory

Dtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class Summary:
    """What a call of `extract` did.

    Attributes:
        store: the finished store.
        images: in its index.
        embedded: of them with a row.
        refused: of them with a line in errors.jsonl.
        failed: shards that failed twice, and how; their images have neither.
        shards_before: shards that were there already.
        computed: images this call went through.
        seconds: it took, loading the model left out.
        start_up_seconds: until the first image was begun with.
        times: of the stages, added up over processes.
        devices: of the processes that ran the model.
        batch_size: images a batch.
    """

    store: Store
    images: int
    embedded: int
    refused: int
    failed: dict[int, str]
    shards_before: int
    computed: int
    seconds: float
    start_up_seconds: float
    times: Times
    devices: list[str]
    batch_size: int

    @property
    def images_per_second(self) -> float:
        """Of those that this call went through."""
        return self.computed / self.seconds if self.computed else 0.0

    def text(self) -> str:
        """One line for a person."""
        manifest = self.store.manifest
        rate = (
            f", {self.images_per_second:,.1f} images/s, waiting for: {self.times.bottleneck}" if self.computed else ""
        )
        before = f", {self.shards_before:,} shards were done already" if self.shards_before else ""
        return (
            f"{self.embedded:,} of {self.images:,} images embedded by {manifest.model} in {manifest.precision}, "
            f"{' x '.join(map(str, manifest.shape))} numbers each, in {self.store.folder} "
            f"({self.seconds:.1f} s{rate}{before})"
        )

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        numbers = {name: value for name, value in vars(self).items() if name not in ("store", "times")}
        manifest = dataclasses.asdict(self.store.manifest)
        return {
            "out": self.store.folder.location,
            **numbers,
            "images_per_second": self.images_per_second,
            "bottleneck": self.times.bottleneck,
            "times": vars(self.times),
            "manifest": manifest,
        }


def extract(
    source: SourceLike,
    out: str | os.PathLike[str],
    *,
    model: str | Encoder = DEFAULT,
    weights: str | os.PathLike[str] | None = None,
    pool: Pool = "cls",
    normalize: bool = True,
    dtype: Dtype = "float32",
    precision: Precision = "auto",
    backend: Backend | Literal["auto"] = "auto",
    providers: Sequence[str] | None = None,
    compile: bool = False,
    devices: str = "auto",
    processes: int | None = None,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    batch_size: int | None = None,
    shard_rows: int | None = None,
    workers: int | None = None,
    fast_decode: bool = False,
    exif: Literal["upright", "keep"] = "upright",
    max_pixels: int = MAX_PIXELS,
    image_timeout: float = 120.0,
    limit: int | None = None,
    only_missing: bool = False,
    overwrite: bool = False,
    show: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Summary:
    """Embed every image of a source into a store; the same call again skips the shards that are done.

    Args:
        source: see `micl_zoo.sources.index_source`.
        out: the store: a folder, or a URI such as s3://bucket/embeddings; new, or made by the same call.
        model: a name of `list_models`, or a loaded encoder (then `weights`, `devices` and `backend` are its own).
        weights: a file or folder of your own, see `load`.
        pool: "cls" token, "mean" of the patch tokens, "cls+mean" one after the other, or all "patches".
        normalize: embeddings of unit length.
        dtype: of the rows on disk.
        precision: of the model's arithmetic; "auto" is bf16 where the device computes it fast, else fp32; of an ONNX
            file its own.
        backend: "torch", "openvino" for processors, or "onnx"; "auto" is "onnx" for an .onnx file, and "openvino" where
            it is installed and can be used.
        providers: of ONNX Runtime, see `load`.
        compile: the model by torch.compile; pays off after thousands of images.
        devices: "auto", "all" GPUs, or names with commas between them; a process each.
        processes: that run the model and share the devices; None is one a device, with Ray one a GPU of the cluster.
        engine: "local", or "ray" for a cluster.
        address: of the Ray cluster; None is the one this machine belongs to, or a new one on it.
        batch_size: images a batch; None is 256 on a GPU, 16 on a processor. Halved where memory is short.
        shard_rows: images a part file; None is 10,000, fewer of long rows such as patches.
        workers: processes that decode, on each machine; None is one a core, 16 at most; 0 decodes where the model runs.
        fast_decode: decode JPEG at the scale that is needed: nearly the same pixels, and the store says so.
        exif: "upright" turns pictures as their cameras say, "keep" leaves them as they are stored.
        max_pixels: width x height above which an image is refused.
        image_timeout: seconds a process may take to read and decode an image before it is replaced.
        limit: of a long source, the first images only.
        only_missing: add the images that the store has not; those it has may be gone from the source.
        overwrite: delete the embeddings that are in `out`.
        show: a progress bar, on a terminal.
        say: is told in one line what runs where.

    Raises:
        SourceError, UsageError, WeightsError: what was asked for does not exist.
        StoreError: `out` holds something else, or another process writes to it.
        Interrupted: SIGTERM or Ctrl-C; what was computed is kept.
        MiclZooError: not one image of the source could be embedded; errors.jsonl says why.
    """
    start = time.monotonic()
    _check(batch_size=batch_size, shard_rows=shard_rows, limit=limit, processes=processes)
    if backend == "auto" and weights is not None and Path(weights).suffix == ".onnx":
        backend = "onnx"
    places = _places(model, _devices(devices, backend, providers), processes, engine, address)
    is_onnx = (model.backend if isinstance(model, Encoder) else backend) == "onnx"
    resolved = precision if is_onnx else places.precision(precision)
    ran_by = _backend(model, backend, places.kind, resolved, compile=compile)
    pieces = list_source(source)
    pieces = chain([next(pieces)], pieces)  # a source without images is no reason to load a model
    job = Job(
        model=model.name if isinstance(model, Encoder) else model,
        weights=None if weights is None else os.fspath(Path(weights).absolute()),
        backend=ran_by,
        compile=compile,
        precision=resolved,
        pool=pool,
        normalize=normalize,
        decoding=Decoding(exif=exif, fast=fast_decode, max_pixels=max_pixels),
        batch_size=batch_size or (256 if places.kind == "cuda" else 16),
        workers=places.workers(workers),
        image_timeout=image_timeout,
        threads=places.threads,
        providers=tuple(providers) if providers else None,
    )
    if isinstance(model, Encoder):
        encoder = model
    elif places.several:  # the processes load it; here it only says what the store will hold
        encoder = load(model, weights=weights, device="cpu", backend="onnx" if is_onnx else "torch")
    else:
        encoder = job.encoder(places.devices[0])
    if encoder.precision:
        job = dataclasses.replace(job, precision=_own_precision(encoder, precision))
    say(_sentence(encoder, job, places))
    if not is_onnx and (advice := precision_advice(job.precision, torch.device(places.kind))):
        say(advice)
    folder = Folder(out)
    with folder.lock() or nullcontext(), StopRequest() as stop:
        command = _command(source, job, dtype, shard_rows, limit)
        manifest = _manifest(encoder, job, dtype, shard_rows, command)
        store = Store.create(folder, manifest, overwrite=overwrite)
        listing = Listing(store, pieces, limit=limit, only_missing=only_missing)
        try:
            run = _Run(store, listing, start)
            run.go(places.engine(job, encoder), stop, f"embedding with {encoder.name}", show=show)
        finally:
            listing.stop()
        return run.summary(places.devices, job.batch_size)


class _Run:
    """What is counted while shards are embedded."""

    def __init__(self, store: Store, listing: Listing, started: float) -> None:
        self.store, self.listing, self.started = store, listing, started
        self.done = set(store.done())
        self.before = len(self.done)
        self.computed = self.refused = 0
        self.times = Times()
        self.begun = time.monotonic()
        self.work = Work(iter(()))

    def go(self, engine: Engine, stop: StopRequest, what: str, *, show: bool) -> None:
        """Embed what is not there yet."""
        with progress(what, None, show=show) as tick:
            self.work = Work(self._to_do(tick))
            for event in engine(self.store, self.work, lambda: stop.asked):
                if not self.computed:  # a process has loaded its model meanwhile
                    self.begun = time.monotonic() - event.times.wait - event.times.transfer - event.times.model
                self.times.add(event.times)
                self.computed += event.images
                self.refused += event.refused
                tick(event.images, self._note(), total=self.listing.images if self.listing.finished else None)
        self.seconds = time.monotonic() - self.begun
        if stop.asked:
            raise self._interrupted(stop)
        if self.work.error is not None:
            raise self.work.error

    def _to_do(self, tick: Tick) -> Iterator[int | None]:
        """Shards that have no part yet, as they are listed."""
        for found in self.listing.shards():
            if found is None:
                yield None
            elif found[0] in self.done:
                tick(0, before=found[1])
            else:
                yield found[0]

    def _note(self) -> str:
        refused = [f"{self.refused:,} refused"] if self.refused else []
        slowest = [f"waiting for: {self.times.bottleneck}"] if self.times.bottleneck else []
        return ", ".join(refused + slowest)

    def _interrupted(self, stop: StopRequest) -> Interrupted:
        number = stop.signal or signal.SIGTERM
        return Interrupted(
            f"stopped by {signal.Signals(number).name}. All {self.computed:,} images of this run are safe in "
            f"{self.store.folder}, in {len(self.store.done()):,} finished shards and the beginnings of others: "
            "run the same command to go on",
            signal=number,
        )

    def summary(self, devices: list[str], batch_size: int) -> Summary:
        """Count what there is now, and see that nothing is missing."""
        self.store.remove_leftovers()
        refused, embedded = self.store.write_ledger(), len(self.store)
        images = self.listing.images
        if not self.work.failed:
            assert embedded + refused == images, (embedded, refused, images)
        if not embedded and refused == images:
            raise MiclZooError(
                f"none of the {refused} images could be embedded: see {self.store.folder.location}/errors.jsonl"
            )
        return Summary(
            store=self.store,
            images=images,
            embedded=embedded,
            refused=refused,
            failed=self.work.failed,
            shards_before=self.before,
            computed=self.computed,
            seconds=self.seconds,
            start_up_seconds=self.begun - self.started,
            times=self.times,
            devices=devices,
            batch_size=batch_size,
        )


def _check(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")


def _places(
    model: str | Encoder, devices: str, processes: int | None, engine: str, address: str | None
) -> Local | Cluster:
    if engine not in ("local", "ray"):
        raise UsageError(f"unknown engine {engine!r}. Valid: local, ray.")
    if isinstance(model, Encoder):
        if engine == "ray" or (processes or 1) > 1:
            raise UsageError("several processes load the model themselves: give its name or weights=, not an Encoder")
        return Local([str(model.device)])
    if engine == "ray":
        from .cluster import Cluster

        return Cluster.join(address, processes)
    return Local.find(devices, processes)


def _devices(devices: str, backend: str, providers: Sequence[str] | None) -> str:
    """What "auto" is, where the backend decides it."""
    if devices != "auto" or backend not in ("openvino", "onnx"):
        return devices
    if backend == "onnx":
        from ..encoders.onnx_session import GPU, choose_providers

        on_gpu = choose_providers("auto", providers)[0][0] in GPU and torch.cuda.is_available()
        return "cuda" if on_gpu else "cpu"
    return "cpu"


def _own_precision(encoder: Encoder, asked: Precision) -> str:
    """That of an encoder whose file fixes it."""
    assert encoder.precision is not None
    if asked not in ("auto", encoder.precision):
        raise UsageError(
            f"the ONNX file of {encoder.name} computes in {encoder.precision}, not in {asked}: leave precision out, or "
            f"export another with --precision {asked}"
        )
    return encoder.precision


def _backend(model: str | Encoder, wanted: str, kind: str, precision: str, *, compile: bool) -> Backend:
    """ "auto" is OpenVINO on a processor where it is installed and computes in that precision, else torch."""
    if isinstance(model, Encoder):
        return model.backend
    return choose_backend(wanted, device=torch.device(kind), precision=precision, compile=compile)


def _sentence(encoder: Encoder, job: Job, places: Local | Cluster) -> str:
    return (
        f"{encoder.name} on {places}: {_runtime(job)} in {job.precision}, batches of {job.batch_size}, "
        f"{job.workers} process{'es' * (job.workers != 1)} decoding" + (" for each" if places.several else "")
    )


def _runtime(job: Job) -> str:
    return job.backend + (" compiled" if job.compile else "")


def _manifest(encoder: Encoder, job: Job, dtype: Dtype, shard_rows: int | None, command: str) -> Manifest:
    if dtype not in get_args(Dtype):
        raise UsageError(f"unknown dtype {dtype!r}. Valid: {', '.join(get_args(Dtype))}.")
    shape = encoder.row_shape(job.pool)
    row_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    return Manifest(
        model=encoder.name,
        weights_sha256=encoder.weights_sha256 or _tensors_sha256(encoder),
        transform=encoder.transform.id,
        decoding=job.decoding.id,
        runtime=_runtime(job),
        precision=job.precision,
        pool=job.pool,
        normalized=job.normalize,
        dtype=dtype,
        shape=list(shape),
        shard_rows=shard_rows or max(1, min(SHARD_ROWS, PART_BYTES // row_bytes)),
        command=command,
        versions=package_versions(),
    )


def _command(source: SourceLike, job: Job, dtype: Dtype, shard_rows: int | None, limit: int | None) -> str:
    """That makes the same store, given the same source and out."""
    sources = [source] if isinstance(source, str | os.PathLike) else source
    options: dict[str, Any] = {
        "--model": job.model,
        "--weights": job.weights,
        "--pool": job.pool,
        "--dtype": dtype,
        "--precision": job.precision,
        "--backend": job.backend,
        "--exif": job.decoding.exif,
        "--max-pixels": job.decoding.max_pixels,
        "--shard-rows": shard_rows,
        "--limit": limit,
    }
    flags = {"--compile": job.compile, "--fast-decode": job.decoding.fast, "--no-normalize": not job.normalize}
    words = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    words += [name for name, is_set in flags.items() if is_set]
    return shlex.join(["micl-zoo", "extract", *(os.fspath(one) for one in sources), *words])


def _tensors_sha256(encoder: Encoder) -> str:
    """Tells random weights apart, which come from no file."""
    digest = hashlib.sha256()
    for name, tensor in encoder.vit.state_dict().items():
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def embed_index(
    encoder: Encoder,
    index: ImageIndex,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    autocast: torch.dtype | None = None,
    pool: Pool = "cls",
    normalize: bool = True,
    decoding: Decoding | None = None,
) -> Iterator[Rows]:
    """Embed an index batch by batch, in order, without a store.

    Args:
        encoder, index: the model and the images.
        batch_size, workers, pool, normalize: see `extract`.
        autocast: dtype of the model's arithmetic, None for float32.
        decoding: see `Decoding`; None is the exact one.
    """
    with Runner(
        encoder,
        pool=pool,
        normalize=normalize,
        autocast=autocast,
        decoding=decoding or Decoding(),
        batch_size=batch_size,
        workers=default_workers() if workers is None else workers,
    ) as runner:
        yield from runner.embed(index)
