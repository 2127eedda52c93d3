"""ImageIndex -> shards -> embeddings: workers decode while the model runs, and a finished shard is never done again."""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .decode import Refused, decode
from .encoder import Encoder, Pool, bf16_is_fast, load
from .errors import MiclZooError, UsageError
from .progress import progress
from .sources import Entry, ImageIndex, Reader, SourceLike, index_source
from .store import Manifest, RefusedRow, Store, package_versions
from .transforms import Transform
from .zoo import DEFAULT

Precision = Literal["auto", "fp32", "bf16", "fp16"]
MAX_WORKERS = 16


class Embedded(NamedTuple):
    """One batch, after the model.

    Attributes:
        ids: of the images that have a row.
        rows: (len(ids), D) float32.
        refused: the others.
    """

    ids: list[str]
    rows: np.ndarray
    refused: list[RefusedRow]


@dataclass(frozen=True)
class Summary:
    """What a call of `extract` did.

    Attributes:
        store: the finished store.
        images: in the source.
        embedded: of them with a row.
        refused: of them with a line in errors.jsonl.
        shards_before: shards that were there already.
        computed: images this call went through.
        seconds: it took, loading the model left out.
    """

    store: Store
    images: int
    embedded: int
    refused: int
    shards_before: int
    computed: int
    seconds: float


def extract(
    source: SourceLike,
    out: str | os.PathLike[str],
    *,
    model: str | Encoder = DEFAULT,
    weights: str | os.PathLike[str] | None = None,
    pool: Pool = "cls",
    batch_size: int = 64,
    shard_rows: int = 10_000,
    workers: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    normalize: bool = True,
) -> Summary:
    """Embed every image of a source into a store; the same call again skips the shards that are done.

    Args:
        source: see `micl_zoo.sources.index_source`.
        out: the store's folder, new or made by the same call.
        model: a name of `list_models`, or a loaded encoder (then `weights` and `device` are its own).
        weights: a file or folder of your own, see `load`.
        pool: "cls" or "mean" of the patch tokens.
        batch_size: images a forward pass.
        shard_rows: images a part file; what a killed run can lose.
        workers: processes that decode; one a core by default, 16 at most; 0 decodes in this process.
        device: see `load`.
        precision: of the model's arithmetic; "auto" is bf16 where the device computes it fast, else fp32.
        normalize: rows of unit length.

    Raises:
        SourceError, UsageError, WeightsError: what was asked for does not exist.
        StoreError: `out` holds something else.
        MiclZooError: not one image of the source could be embedded; errors.jsonl says why.
    """
    if batch_size < 1 or shard_rows < 1:
        raise UsageError(f"batch_size and shard_rows must be at least 1, got {batch_size} and {shard_rows}")
    index = index_source(source)
    encoder = model if isinstance(model, Encoder) else load(model, weights=weights, device=device)
    autocast, precision_used = resolve_precision(precision, encoder.device)
    options = [] if isinstance(model, Encoder) else [f"--model {model}"]
    options += [f"--weights {os.fspath(weights)}"] if weights else []
    manifest = _manifest(encoder, index, source, options, pool, shard_rows, precision_used, normalize)
    store = Store.create(Path(out), manifest, index)
    done = store.done()
    pending = [shard for shard in range(manifest.shards) if shard not in done]
    before = manifest.rows - sum(map(store.shard_size, pending))
    start = time.monotonic()
    with progress(f"embedding with {encoder.name}", manifest.rows, done=before) as tick:
        batches = embed_batches(
            encoder, (store.shard(shard) for shard in pending), batch_size, workers, autocast, pool, normalize
        )
        refused_now = 0
        for shard in pending:
            parts: list[Embedded] = []
            for _ in range(math.ceil(store.shard_size(shard) / batch_size)):
                parts.append(next(batches))
                refused_now += len(parts[-1].refused)
                tick(len(parts[-1].ids) + len(parts[-1].refused), f"{refused_now} refused" if refused_now else "")
            ids = [name for part in parts for name in part.ids]
            store.write_part(shard, ids, np.concatenate([p.rows for p in parts]), [r for p in parts for r in p.refused])
    refused = store.write_ledger()
    summary = Summary(
        store, manifest.rows, len(store), refused, len(done), manifest.rows - before, time.monotonic() - start
    )
    assert summary.embedded + summary.refused == summary.images, summary
    if not summary.embedded:
        raise MiclZooError(f"none of the {refused} images could be embedded: see {store.path / 'errors.jsonl'}")
    return summary


def _manifest(
    encoder: Encoder,
    index: ImageIndex,
    source: SourceLike,
    options: list[str],
    pool: Pool,
    shard_rows: int,
    precision: str,
    normalize: bool,
) -> Manifest:
    paths = [source] if isinstance(source, str | os.PathLike) else source
    words = [shlex.quote(os.fspath(path)) for path in paths]
    words += [*options, f"--pool {pool} --shard-rows {shard_rows} --precision {precision}"]
    words += [] if normalize else ["--no-normalize"]
    return Manifest(
        model=encoder.name,
        weights_sha256=encoder.weights_sha256 or _tensors_sha256(encoder),
        transform=encoder.transform.id,
        pool=pool,
        normalized=normalize,
        precision=precision,
        dtype="float32",
        dim=encoder.embed_dim,
        index_sha256=index.fingerprint(),
        shard_rows=shard_rows,
        rows=len(index),
        command=" ".join(["micl-zoo extract", *words]),
        versions=package_versions(),
    )


def _tensors_sha256(encoder: Encoder) -> str:
    """Tells random weights apart, which come from no file."""
    digest = hashlib.sha256()
    for name, tensor in encoder.vit.state_dict().items():
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Processes that decode, where nothing else is asked for: one a usable core, MAX_WORKERS at most."""
    return min(usable_cores(), MAX_WORKERS)


def resolve_precision(precision: Precision, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The autocast dtype, None for float32, and its name.

    Raises:
        UsageError: a precision that does not exist.
    """
    kinds: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision == "auto":
        precision = "bf16" if bf16_is_fast(device) else "fp32"
    if precision not in kinds:
        raise UsageError(f"unknown precision {precision!r}. Valid: auto, {', '.join(kinds)}.")
    return kinds[precision], precision


def embed_batches(
    encoder: Encoder,
    shards: Iterator[ImageIndex],
    batch_size: int = 64,
    workers: int | None = None,
    autocast: torch.dtype | None = None,
    pool: Pool = "cls",
    normalize: bool = True,
) -> Iterator[Embedded]:
    """Embed indexes one after the other, in order, in batches that never span two of them."""
    loader = DataLoader(
        _Pixels(encoder.transform),
        batch_sampler=_Plan(shards, batch_size),
        num_workers=default_workers() if workers is None else workers,
        collate_fn=_collate,
        worker_init_fn=settle_worker,
    )
    for ids, pixels, refused in loader:
        rows = np.empty((0, encoder.embed_dim), np.float32)
        if ids:
            rows = encoder.embed_pixels(pixels.numpy(), normalize=normalize, pool=pool, autocast=autocast)
        yield Embedded(ids, rows, refused)


class _Plan:
    """The batch sampler: entries instead of numbers, so that workers need no index."""

    def __init__(self, shards: Iterator[ImageIndex], batch_size: int) -> None:
        self.shards, self.batch_size = shards, batch_size

    def __iter__(self) -> Iterator[list[Entry]]:
        for shard in self.shards:
            for start in range(0, len(shard), self.batch_size):
                yield list(shard.slice(start, self.batch_size).entries())


class _Pixels(Dataset[object]):
    """Entry -> (entry, transformed pixels or the refusal); runs in the workers."""

    def __init__(self, transform: Transform) -> None:
        self.transform, self.reader = transform, Reader()

    def __getitem__(self, entry: Entry) -> tuple[Entry, np.ndarray | Refused]:
        try:
            return entry, self.transform.pixels(decode(self.reader.read(entry)))
        except Refused as refused:
            return entry, refused
        except (MemoryError, OSError, ValueError) as error:  # past decoding: a picture too odd to resize
            return entry, Refused("damaged", f"{type(error).__name__}: {error}")


def _collate(samples: Sequence[tuple[Entry, np.ndarray | Refused]]) -> tuple[list[str], Tensor, list[RefusedRow]]:
    ids, pixels, refused = [], [], []
    for entry, found in samples:
        if isinstance(found, Refused):
            refused.append(RefusedRow(entry.id, entry.uri, found.reason, found.detail))
        else:
            ids.append(entry.id)
            pixels.append(found)
    return ids, torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0), refused


def settle_worker(_: int) -> None:
    """Signals are for the parent, which then ends its workers; Pillow's complaints about odd files for the ledger."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """A scheduler's SIGTERM reaches all processes, and a worker that ends takes the run with it: heed the parent's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
