"""Is a store what it says: parts re-hashed, every image accounted for, a sample embedded again from its source."""

from __future__ import annotations

import bisect
import copy
import dataclasses
import itertools
import json
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..errors import Refused, StoreError, UsageError
from ..progress import progress
from ..sources.listing import Entry, Fingerprint, Reader
from .reembed import StoreEncoder, store_encoder
from .store import Manifest, Store

if TYPE_CHECKING:
    pass

MIN_COSINE = 0.9999  # of a row and the same image embedded again: above it lie other batch sizes and other kernels
UNIT_SLACK = 2e-3  # float16 rounds each number by 2^-11 = 5e-4 of it at most, and bfloat16 models end in float32
BATCH = 32  # images embedded at once
SHOWN = 3  # ids named in a problem that many have


@dataclass
class Verification:
    """What `verify` found.

    Attributes:
        parts: part files that are there.
        shards: part files of the complete store; None while its images are still being listed.
        rows: in the parts that can be read.
        refused: images in the ledgers of these parts.
        sampled: images embedded again and compared.
        worst_cosine: of these, or None where none was compared.
        gone: images of the sample that could not be read again, with the reason. No fault of the store.
        problems: all that is wrong, a sentence each; empty for a sound store.
    """

    parts: int = 0
    shards: int | None = None
    rows: int = 0
    refused: int = 0
    sampled: int = 0
    worst_cosine: float | None = None
    gone: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line for a person."""
        missing = (
            "" if self.parts == self.shards else "; the store is not complete, and the missing parts were not checked"
        )
        worst = (
            ""
            if self.worst_cosine is None
            else f"; {self.sampled} embedded again, worst cosine {self.worst_cosine:.6f}"
        )
        gone = f", {len(self.gone)} not to be read any more" if self.gone else ""
        verdict = f"{len(self.problems)} problems." if self.problems else "No problem found."
        return (
            f"{self.parts:,} of {shards_of(self.shards)} parts, {self.rows:,} rows, {self.refused:,} refused images"
            f"{worst}{gone}{missing}. {verdict}"
        )


def shards_of(shards: int | None) -> str:
    """How many parts a store is to have, for a person: not known before all images are listed."""
    return "an unknown number of" if shards is None else f"{shards:,}"


def only(store: Store, shards: Iterable[int]) -> Store:
    """The store with these parts alone. Given those that are done, a snapshot: what is written later is not seen."""
    view, kept = copy.copy(store), sorted(shards)
    view.done = lambda: kept  # type: ignore[method-assign]
    return view


def verify(
    store: Store,
    *,
    sample: int = 32,
    seed: int = 0,
    weights: str | os.PathLike[str] | None = None,
    device: str = "auto",
) -> Verification:
    """Check a store, or what there is of one that is still being written.

    The index and every part are hashed again, and a part's ids and ledger lines are held against the index; rows must
    be finite, and of unit length where the manifest says so; errors.jsonl must be the parts' ledgers. Then a sample is
    read again from its source, embedded at the store's precision, pool and decoding, and compared.

    Args:
        store: see `open_store`.
        sample: images to embed again; 0 needs no encoder.
        seed: of the sample.
        weights: where the store's weights are not published: their file or folder.
        device: see `load`.

    Returns:
        What was found; all problems, not only the first.

    Raises:
        UsageError: a negative sample.
        WeightsError: see `store_encoder`.
    """
    if sample < 0:
        raise UsageError(f"sample must be 0 or more images, got {sample}")
    encoder = store_encoder(store, weights, device) if sample else None
    shards = store.done()
    found = Verification(parts=len(shards), shards=store.manifest.shards, problems=_index_problems(store))
    counts: list[tuple[int, int]] = []  # (shard, rows) of the parts a sample can be taken from
    with progress("checking parts", len(shards), unit="parts") as tick:
        for shard in shards:
            counts.append((shard, _check_part(store, shard, found)))
            tick(1, f"{len(found.problems)} problems" if found.problems else "")
    if len(shards) == found.shards:
        found.problems += _ledger_problems(only(store, shards))
    if encoder is not None:
        _embed_again(encoder, list(_sample(store, counts, sample, seed)), found)
    return found


def _check_part(store: Store, shard: int, found: Verification) -> int:
    """Adds what one part holds and what is wrong with it to `found`; returns its rows, 0 where it cannot be used."""
    where = f"part {shard}"
    if found.shards is not None and shard >= found.shards:
        found.problems.append(f"{where} belongs to no shard of the index, which has {found.shards}")
        return 0
    wrong: list[str] = []
    try:
        store.check_part(shard)
    except StoreError as error:
        wrong.append(str(error))
    try:
        ids, rows, ledger = store.rows(shard)
        expected = store.shard(shard).table["id"].to_pylist()
    except StoreError as error:
        found.problems += [f"{where}: {problem}" for problem in dict.fromkeys([*wrong, str(error)])]
        return 0
    wrong += account(expected, ids, [row.id for row in ledger]) + _row_problems(ids, rows, store.manifest)
    found.problems += [f"{where}: {problem}" for problem in wrong]
    found.rows += len(ids)
    found.refused += len(ledger)
    return len(ids)


def _index_problems(store: Store) -> list[str]:
    """The index against the fingerprint in the manifest, which is there once all images are listed."""
    if store.manifest.index_sha256 is None:
        return []
    fingerprint = Fingerprint()
    try:
        for shard in range(store.manifest.shards or 0):
            fingerprint.update(store.shard(shard))
    except StoreError as error:
        return [f"the index: {error}"]
    same = fingerprint.hexdigest() == store.manifest.index_sha256
    return [] if same else ["the index is not the one that the manifest names: its sha256 differs"]


def account(expected: Sequence[str], rows: Sequence[str], refused: Sequence[str]) -> list[str]:
    """What keeps rows and ledger from being the images of the index, each once and in its order.

    Args:
        expected: ids of a shard of the index.
        rows: ids of the part's rows.
        refused: ids of its ledger lines.
    """
    held, known, ledger = Counter([*rows, *refused]), set(expected), set(refused)
    problems = []
    if missing := [name for name in expected if name not in held]:
        problems.append(f"{_named(missing)} of the index: neither a row nor a ledger line")
    if twice := [name for name, times in held.items() if times > 1]:
        problems.append(f"{_named(twice)}: more than one row or ledger line")
    if strange := [name for name in held if name not in known]:
        problems.append(f"{_named(strange)}: not in this shard of the index")
    if problems:
        return problems
    in_order = [name for name in expected if name not in ledger] == list(rows)
    if not in_order or [name for name in expected if name in ledger] != list(refused):
        problems.append("the rows or ledger lines are not in the order of the index")
    return problems


def _row_problems(ids: Sequence[str], rows: np.ndarray, manifest: Manifest) -> list[str]:
    *tokens, width = manifest.shape
    vectors = rows.reshape(len(rows), math.prod(tokens), width).astype(np.float32)  # (n, 1 or h w, D)
    lengths = np.sqrt(np.einsum("ntd,ntd->nt", vectors, vectors))  # (n, 1 or h w)
    broken = ~np.isfinite(lengths).all(1)
    off = ~broken & (np.abs(lengths - 1) > UNIT_SLACK).any(1) if manifest.normalized else np.zeros_like(broken)
    problems = []
    if broken.any():
        problems.append(f"{_named(list(itertools.compress(ids, broken)))}: numbers that are not finite")
    if off.any():
        problems.append(f"{_named(list(itertools.compress(ids, off)))}: not of unit length, as the manifest says")
    return problems


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - SHOWN:,} more" if len(ids) > SHOWN else ""
    return ", ".join(map(repr, ids[:SHOWN])) + more


def _ledger_problems(store: Store) -> list[str]:
    """Errors.jsonl against the ledgers in the parts, line by line. `extract` writes it last, so of a complete store."""
    again = "the same extract command writes it anew"
    if not store.folder.exists("errors.jsonl"):
        return [f"errors.jsonl is missing; {again}"]
    lines = [line for line in store.folder.read("errors.jsonl").split(b"\n") if line]
    try:
        for number, (line, row) in enumerate(itertools.zip_longest(lines, store.refused()), 1):
            if line is None or row is None:
                return [f"errors.jsonl has {'fewer' if line is None else 'more'} lines than the parts say; {again}"]
            if json.loads(line) != dataclasses.asdict(row):
                return [f"line {number} of errors.jsonl is not what the part says of {row.id!r}; {again}"]
    except StoreError:
        return []  # of the damaged part, which has its own line
    except ValueError as error:
        return [f"errors.jsonl is damaged ({error}); {again}"]
    return []


def _sample(
    store: Store, counts: Sequence[tuple[int, int]], sample: int, seed: int
) -> Iterator[tuple[Entry, np.ndarray]]:
    """(where the image is, its row) of `sample` rows out of all, in index order; each part is read once."""
    starts = list(itertools.accumulate((rows for _, rows in counts), initial=0))
    picks = sorted(random.Random(seed).sample(range(starts[-1]), min(sample, starts[-1])))
    for place, group in itertools.groupby(picks, lambda pick: bisect.bisect_right(starts, pick) - 1):
        shard = counts[place][0]
        ids, rows, _ = store.rows(shard)
        entries = {entry.id: entry for entry in store.shard(shard).entries()}
        inside = (pick - starts[place] for pick in group)
        yield from ((entries[ids[row]], rows[row].copy()) for row in inside if ids[row] in entries)


def _embed_again(encoder: StoreEncoder, sample: Sequence[tuple[Entry, np.ndarray]], found: Verification) -> None:
    """Adds the sample's cosines to `found`."""
    reader = Reader()
    with progress("embedding again", len(sample)) as tick:
        for start in range(0, len(sample), BATCH):
            entries, rows, pixels = [], [], []
            for entry, row in sample[start : start + BATCH]:
                try:
                    pixels.append(encoder.pixels(reader.read(entry)))
                except Refused as refused:
                    gone = refused.reason == "unreadable"
                    text = f"{entry.id!r} has a row, but its source now is {refused.reason} ({refused.detail})"
                    (found.gone if gone else found.problems).append(text)
                    continue
                entries.append(entry)
                rows.append(row)
            if entries:
                _compare(encoder, entries, np.stack(rows), encoder.rows(pixels), found)
            tick(min(BATCH, len(sample) - start))
    if sample and not found.sampled:
        found.problems.append("no image of the sample could be embedded again, so no number was checked")


def _compare(
    encoder: StoreEncoder, entries: Sequence[Entry], stored: np.ndarray, again: np.ndarray, found: Verification
) -> None:
    cosines = _cosines(stored, again, encoder.manifest.shape[-1])
    found.sampled += len(entries)
    found.worst_cosine = min([float(cosines.min()), *([] if found.worst_cosine is None else [found.worst_cosine])])
    for entry, cosine in zip(entries, cosines, strict=True):
        if cosine < MIN_COSINE:
            found.problems.append(
                f"{entry.id!r}: its row and its source embedded again have cosine {cosine:.6f}, {MIN_COSINE} at least "
                "is expected: the row or the picture is another"
            )


def _cosines(first: np.ndarray, second: np.ndarray, width: int) -> np.ndarray:
    """(n, dim) twice -> (n,) float64: the cosine of each pair, of its worst patch token; 0 where it is undefined."""
    a, b = (rows.astype(np.float64).reshape(len(rows), -1, width) for rows in (first, second))  # (n, t, width)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))  # (n, t)
    return np.nan_to_num(cosines, nan=0.0).min(1)
