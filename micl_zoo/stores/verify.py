"""Verification of a store: hashes its parts, accounts for every image, embeds a sample again from its source."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np

from ..encoders.device import Device
from ..errors import Refused, StoreError
from ..files import Folder
from ..progress import progress
from ..schema import Between, checked, parse_json
from ..sources.index import Entry, Fingerprint
from .manifest import MANIFEST_FILE, Manifest, read_manifest
from .originals import Originals
from .reembed import LoadedEncoder, StoreEncoder, check_loaded, store_encoder
from .store import LEDGER_FILE, Store, part_name, parts_of

MIN_COSINE = 0.9999  # between a row and its image embedded again: other batch sizes and kernels stay above it
UNIT_SLACK = 2e-3  # float16 rounds each number by 2^-11 = 5e-4 of it at most, and bfloat16 models end in float32
BATCH = 32  # images embedded at once
SHOWN = 3  # ids named in a problem that many images have


@dataclass
class Verification:
    """What `verify` found."""

    parts: int = 0  # part files that exist
    shards: int | None = None  # part files of the complete store; None while its images are still being listed
    rows: int = 0  # in the readable parts
    refused: int = 0  # images in the ledgers of these parts
    sampled: int = 0  # images embedded again and compared
    worst_cosine: float | None = None  # of these; None where no image was compared
    gone: list[str] = field(default_factory=list)  # sampled images not readable again, and why; not the store's fault
    unasked: str = ""  # how many sampled images are on which servers that were not asked for them
    unchecked: list[str] = field(default_factory=list)  # files without a checksum, of earlier versions
    problems: list[str] = field(default_factory=list)  # all that is wrong, one sentence each; empty for a sound store

    def summary(self) -> str:
        """Sum it up in one line."""
        said = f"{parts_of(self.parts, self.shards)}, {self.rows:,} rows, {self.refused:,} refused images"
        if self.worst_cosine is not None:
            said += f"; {self.sampled} embedded again, worst cosine {self.worst_cosine:.6f}"
        if self.gone:
            said += f", {len(self.gone)} no longer readable"
        if self.unasked:
            said += f"; not compared: {self.unasked}"
        if self.parts != self.shards:
            said += "; the store is not complete, and the missing parts were not checked"
        if self.unchecked:
            said += f"; an earlier version wrote {len(self.unchecked):,} files without a checksum"
        return said + (f". {len(self.problems)} problems." if self.problems else ". No problem found.")


@checked
def verify(
    store: Store | str | os.PathLike[str],
    *,
    sample: Annotated[int, Between(0)] = 32,
    seed: int | None = 0,
    weights: str | os.PathLike[str] | None = None,
    encoder: LoadedEncoder | None = None,
    device: Device = "auto",
    remote: bool = False,
) -> Verification:
    """Check a store, or what there is of one that is still being written.

    Hashes manifest, index and every part again and compares a part's ids and ledger lines with the index. Rows must be
    finite, and of unit length where the manifest says so; errors.jsonl must agree with the parts. Then a sample is read
    again from its source, embedded at the store's precision, pool and decoding, and compared.

    Args:
        store: see `open_store`.
        sample: images to embed again; 0 needs no encoder.
        seed: seed of the sample.
        weights: file or folder of the store's weights, where they are not published.
        encoder: the store's, loaded already, in the place of weights and device.
        device: see `load`.
        remote: read the sample from all servers that the index names, too, and not only from the one that the store is
            at: requests are made for what you name, and somebody else may have made the store.

    Returns:
        What was found; all problems, not only the first.

    Raises:
        UsageError: a negative sample.
        WeightsError: see `store_encoder`.
    """
    check_loaded(encoder)
    if not isinstance(store, Store):  # by `open_store` a wrong checksum would be an error, and here is one problem
        store = Store(folder := Folder(store), read_manifest(folder)[0])
    problems, again = list[str](), None
    try:
        again = store_encoder(store, weights, str(device), encoder=encoder) if sample else None
    except StoreError as error:
        problems.append(str(error))
    store = store.snapshot(check=False)  # what a damaged part holds is looked at all the same
    shards = store.done()
    found = Verification(parts=len(shards), shards=store.manifest.shards, problems=problems)
    _check_files(store, found)
    _check_index(store, found)
    counts: list[tuple[int, int]] = []  # (shard, rows) of the parts a sample can be taken from
    with progress("checking parts", len(shards), unit="parts") as tick:
        for shard in shards:
            counts.append((shard, _check_part(store, shard, found)))
            tick(1, f"{len(found.problems)} problems" if found.problems else "")
    if len(shards) == found.shards:
        found.problems += _ledger_problems(store)
    if again is not None:
        _embed_again(again, list(_sample(store, counts, sample, seed)), Originals(store, remote=remote), found)
    return found


def _check_files(store: Store, found: Verification) -> None:
    """Look at the manifest's checksum, at files that should not be there, and for parts that should."""
    right = read_manifest(store.folder)[1]
    if right is None:
        found.unchecked.append(MANIFEST_FILE)
    elif not right:
        found.problems.append(f"{MANIFEST_FILE} is not as it was written: its sha256 differs")
    found.problems += [
        f"{name} is no part of this store: move it away or delete it, for a reader of all parts would take it for one"
        for name in store.strays()
    ]
    # `extract` writes errors.jsonl when all parts are there, so a part that is missing beside it was lost.
    if found.shards is not None and found.parts < found.shards and store.folder.exists(LEDGER_FILE):
        found.problems.append(
            f"{found.shards - found.parts:,} of {found.shards:,} parts are missing from a store that was finished, the "
            f"first is {_first_missing(store.done())}: run its extract command again"
        )


def _first_missing(there: list[int]) -> str:
    return part_name(next(number for number in itertools.count() if number not in there))


def _check_index(store: Store, found: Verification) -> None:
    """Read every file of the index again; compare them with the fingerprint that the manifest has of a whole one."""
    fingerprint, manifest, images, problems = Fingerprint(), store.manifest, 0, list[str]()
    there = store.indexed()
    if manifest.shards is not None:
        there = [shard for shard in there if shard < manifest.shards]
        if lost := manifest.shards - len(there):
            problems.append(f"the index: {lost:,} files are missing, the first is index/{_first_missing(there)}")
    for shard in there:
        try:
            index, checked = store.checked_shard(shard)
        except StoreError as error:
            problems.append(f"the index: {error}")
            continue
        fingerprint.update(index)
        images += len(index)
        found.unchecked += [] if checked else [f"index/{part_name(shard)}"]
    if not problems and manifest.index_sha256 is not None:
        if fingerprint.hexdigest() != manifest.index_sha256:
            problems.append("the index is not the one that the manifest names: its sha256 differs")
        if images != manifest.rows:
            problems.append(f"the index has {images:,} images, and the manifest says {manifest.rows}")
    found.problems += problems


def _check_part(store: Store, shard: int, found: Verification) -> int:
    """Add what one part holds and what is wrong with it to `found`; return its rows, 0 where it cannot be used."""
    where = f"part {shard}"
    wrong: list[str] = []
    try:
        try:
            ids, rows, ledger, _ = store.check_part(shard)
        except StoreError as error:
            wrong.append(str(error))
            ids, rows, ledger, _ = store.rows(shard)  # what it holds is looked at all the same
        expected = store.shard(shard).ids
    except StoreError as error:
        found.problems += [f"{where}: {problem}" for problem in dict.fromkeys([*wrong, str(error)])]
        return 0
    wrong += account(expected, ids, [row.id for row in ledger]) + _row_problems(ids, rows, store.manifest)
    found.problems += [f"{where}: {problem}" for problem in wrong]
    found.rows += len(ids)
    found.refused += len(ledger)
    return len(ids)


def account(expected: Sequence[str], rows: Sequence[str], refused: Sequence[str]) -> list[str]:
    """Say what keeps the ids of a part's rows and ledger from being those of the index, each once and in its order."""
    held, known, ledger = Counter([*rows, *refused]), set(expected), set(refused)
    wrong = {
        " of the index: neither a row nor a ledger line": [name for name in expected if name not in held],
        ": more than one row or ledger line": [name for name, times in held.items() if times > 1],
        ": not in this shard of the index": [name for name in held if name not in known],
    }
    if any(wrong.values()):
        return [f"{_named(names)}{what}" for what, names in wrong.items() if names]
    in_order = [name for name in expected if name not in ledger] == list(rows)
    in_order = in_order and [name for name in expected if name in ledger] == list(refused)
    return [] if in_order else ["the rows or ledger lines are not in the order of the index"]


def _row_problems(ids: Sequence[str], rows: np.ndarray, manifest: Manifest) -> list[str]:
    *tokens, width = manifest.shape
    vectors = rows.reshape(len(rows), math.prod(tokens), width).astype(np.float32)  # (n, 1 or h w, D)
    lengths = np.sqrt(np.einsum("ntd,ntd->nt", vectors, vectors))  # (n, 1 or h w)
    broken = ~np.isfinite(lengths).all(1)
    off = ~broken & (np.abs(lengths - 1) > UNIT_SLACK).any(1) if manifest.normalized else np.zeros_like(broken)
    wrong = {"numbers that are not finite": broken, "not of unit length, as the manifest says": off}
    return [f"{_named(list(itertools.compress(ids, mask)))}: {what}" for what, mask in wrong.items() if mask.any()]


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - SHOWN:,} more" if len(ids) > SHOWN else ""
    return ", ".join(map(repr, ids[:SHOWN])) + more


def _ledger_problems(store: Store) -> list[str]:
    """Compare errors.jsonl with the ledgers in the parts. `extract` writes it last, so a complete store has one."""
    again = "the same extract command writes it anew"
    if not store.folder.exists(LEDGER_FILE):
        return [f"{LEDGER_FILE} is missing; {again}"]
    try:
        data = store.folder.read(LEDGER_FILE)
        lines = [parse_json(line, LEDGER_FILE, StoreError, again) for line in data.split(b"\n") if line]
        lines = [line for line in lines if not (isinstance(line, dict) and line.get("reason") == "listing")]
    except (StoreError, OSError) as error:
        return [str(error)]
    try:
        ledger = list(store.refused())
    except StoreError:
        return []  # the damaged part is a problem of its own
    for number, (line, row) in enumerate(zip(lines, ledger, strict=False), 1):
        if line != dataclasses.asdict(row):
            return [f"line {number} of {LEDGER_FILE} is not what the part says of {row.id!r}; {again}"]
    if len(lines) != len(ledger):
        return [
            f"{LEDGER_FILE} has {'fewer' if len(lines) < len(ledger) else 'more'} lines than the parts say; {again}"
        ]
    return []


def _sample(
    store: Store, counts: Sequence[tuple[int, int]], size: int, seed: int | None
) -> Iterator[tuple[Entry, np.ndarray]]:
    """Draw (image, its row) for `size` of all rows, in index order; each part is read once."""
    starts = list(itertools.accumulate((rows for _, rows in counts), initial=0))
    picks = sorted(random.Random(seed).sample(range(starts[-1]), min(size, starts[-1])))
    for place, group in itertools.groupby(picks, lambda pick: bisect.bisect_right(starts, pick) - 1):
        shard = counts[place][0]
        ids, rows, *_ = store.rows(shard)
        entries = {entry.id: entry for entry in store.shard(shard).entries()}
        inside = (pick - starts[place] for pick in group)
        yield from ((entries[ids[row]], rows[row].copy()) for row in inside if ids[row] in entries)


def _embed_again(
    encoder: StoreEncoder, sample: Sequence[tuple[Entry, np.ndarray]], originals: Originals, found: Verification
) -> None:
    """Add the sample's cosines to `found`."""
    with progress("embedding again", len(sample)) as tick:
        for start in range(0, len(sample), BATCH):
            there, pixels = [], []
            for entry, row in sample[start : start + BATCH]:
                if not originals.may_read(entry):
                    continue
                try:
                    pixels.append(encoder.pixels(originals.read(entry)))
                    there.append((entry.id, row))
                except Refused as refused:
                    gone = refused.reason in ("unreadable", "too_large", "memory")  # the limit is not the store's
                    text = f"{entry.id!r} has a row, but its source now is {refused.reason} ({refused.detail})"
                    (found.gone if gone else found.problems).append(text)
            if there:
                _compare(there, encoder.rows(pixels), encoder.manifest.shape[-1], found)
            tick(min(BATCH, len(sample) - start))
    found.unasked = originals.unasked()
    if sample and not found.sampled and not found.unasked:
        found.problems.append("no image of the sample could be embedded again, so no number was checked")


def _compare(stored: Sequence[tuple[str, np.ndarray]], again: np.ndarray, width: int, found: Verification) -> None:
    cosines = _cosines(np.stack([row for _, row in stored]), again, width)
    found.sampled += len(stored)
    found.worst_cosine = min(cosines.min().item(), 1.0 if found.worst_cosine is None else found.worst_cosine)
    found.problems += [
        f"{name!r}: its row and its source embedded again have cosine {cosine:.6f}, {MIN_COSINE} at least is expected: "
        "the row or the picture is another"
        for (name, _), cosine in zip(stored, cosines, strict=True)
        if cosine < MIN_COSINE
    ]


def _cosines(first: np.ndarray, second: np.ndarray, width: int) -> np.ndarray:
    """(n, dim) twice -> (n,) float64: cosine of each pair, or of its worst patch token; 0 where it is undefined."""
    a, b = (rows.astype(np.float64).reshape(len(rows), -1, width) for rows in (first, second))  # (n, t, width)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))  # (n, t)
    return np.nan_to_num(cosines, nan=0.0).min(1)
