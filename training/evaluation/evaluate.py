"""Measures what an encoder is worth downstream, by the methods of protocols.py, with intervals.

A record says which images, weights, settings and code gave each figure.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch

from micl_zoo.encoders.build import build_model
from micl_zoo.encoders.device import resolve_precision
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.encoders.torch_model import TorchModel
from micl_zoo.errors import Refused, SourceError, StoreError, UsageError, unknown
from micl_zoo.files import write_text
from micl_zoo.images.decode import decode
from micl_zoo.images.transform import Transform
from micl_zoo.progress import progress
from micl_zoo.sources.reader import Reader
from micl_zoo.stores.store import Store
from micl_zoo.zoo.pools import Pool

from ..micl import init_weights, position_table
from ..run.order import seeded
from ..run.provenance import made_with
from .features import Features, embed_labelled, split_pools, store_features, store_labels, stored_features
from .knn import Bank, measure_bank
from .labelled import LabelledImages, LabelledSet, number_classes
from .protocols import METHODS, PIXELS, ROW_POOLS, Protocol, pools_of
from .record import read_evaluation
from .tables import Outcomes, take_outcomes

log = logging.getLogger(__name__)

Baseline = Literal["random", "pixels"]
Results = dict[str, Any]  # of one subject on one set, by method


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How images are gone through."""

    batch_size: int = 64  # images per forward pass
    workers: int | None = None  # decoding processes; None is one per core
    stores: Path | None = None  # folder that embeddings are kept in; None keeps none
    show: bool = True  # progress bars, on a terminal


SAME_IMAGES = ("sha256", "train_fingerprint", "test_fingerprint", "classes")  # of a set's facts


def evaluate(
    encoder: Encoder,
    sets: Sequence[LabelledSet],
    protocol: Protocol | None = None,
    *,
    out: Path | None = None,
    baselines: Sequence[Baseline] = (),
    batch_size: int = 64,
    workers: int | None = None,
    stores: Path | None = None,
    command: str = "",
    show: bool = True,
) -> dict[str, Any]:
    """Measure an encoder on labelled sets. Every image is embedded once, whatever the methods.

    Args:
        encoder: encoder to measure.
        sets: sets to measure it on, with different names.
        protocol: methods and settings.
        out: file of the record, written after every set; what it holds already is not measured again.
        baselines: "random", the same ViT as it is initialised, measured alike, and "pixels", 32 x 32 of them, measured
            by k-NN alone where that is asked for: classifiers of their 3,072 numbers take longer than all else.
        batch_size: images per forward pass.
        workers: decoding processes; one per core by default, none for 0.
        stores: folder for a store per part of a set, which another call with it does not embed again; None keeps none.
        command: the command that was given, for the record.
        show: show progress bars, on a terminal.

    Returns:
        The record: `results[subject][set][method]`, accuracies in percent of the test images with 95 % intervals, and
        everything they depend on.

    Raises:
        UsageError: two sets of one name, or a record in `out` of another encoder, protocol or other images.
    """
    protocol = protocol_for(encoder, protocol or Protocol())
    check_sets(sets)
    record = new_record(encoder, protocol, command)
    if out is not None and out.exists():
        there = read_evaluation(out, UsageError, "it is not an evaluation record to go on with, choose another file")
        record = resumed(there, record, sets, out)

    def save() -> None:
        if out is not None:
            write_text(out, json.dumps(record, indent=1) + "\n")

    passes = Passes(batch_size=batch_size, workers=workers, stores=stores, show=show)
    measure(record, encoder, sets, protocol, passes, baselines=baselines, save=save)
    return record


def protocol_for(encoder: Encoder, protocol: Protocol) -> Protocol:
    """Fit the pools to an encoder, see `pools_of`; UsageError where it lacks one that was asked for."""
    pools = pools_of(protocol.pools, encoder.pool, encoder.pools)
    for pool in pools:
        encoder.row_shape(pool)
    return replace(protocol, pools=pools)


def check_sets(sets: Sequence[LabelledSet]) -> None:
    """Refuse two sets of one name."""
    places = [labelled.name for labelled in sets]
    if twice := {name for name in places if places.count(name) > 1}:
        raise UsageError(f"two sets are called {', '.join(sorted(twice))}: rename a folder, a record goes by the names")


def measure(
    record: dict[str, Any], encoder: Encoder, sets: Sequence[LabelledSet], protocol: Protocol, passes: Passes, *,
    baselines: Sequence[Baseline] = (), save: Callable[[], None],
    keep: Callable[[LabelledSet, Features, Outcomes], None] = lambda labelled, test, outcomes: None,
) -> None:  # fmt: skip
    """Add what a record lacks, and `save` it after every set; `keep` is given each image's outcomes of the encoder."""
    chosen = {encoder.name: encoder} | {name: _baseline(name, encoder) for name in baselines}
    for (subject, model), labelled in product(chosen.items(), sets):
        there, started = record["results"].setdefault(subject, {}), time.monotonic()
        if labelled.name in there:
            continue
        train, test = _features(subject, model, labelled, protocol, passes, store=model is encoder)
        refused = [*train.refused, *test.refused]
        if refused:
            log.warning("%s: %d images cannot be read and are left out: %s …", labelled.name, len(refused), refused[0])
        record["data"].setdefault(labelled.name, labelled.facts | {"refused": len(refused)})
        alone = replace(protocol, methods=("knn",)) if model is None and "knn" in protocol.methods else protocol
        found = _probed(train, test, classes=len(labelled.classes), protocol=alone, device=encoder.device)
        there[labelled.name], outcomes = take_outcomes(found)
        if model is encoder:
            keep(labelled, test, outcomes)
        record["minutes"] = round(record["minutes"] + (time.monotonic() - started) / 60, 2)
        save()


def check_same(there: dict[str, Any], asked: dict[str, Any], sets: Sequence[LabelledSet], out: Path) -> None:
    """Raise a UsageError where the record in a file is of another encoder, protocol or other images than asked for."""
    pairs = [(key, there[of].get(key), value) for of in ("encoder", "protocol") for key, value in asked[of].items()]
    for labelled in sets:
        if labelled.name in there["data"]:
            known = there["data"][labelled.name]
            pairs += [(f"{labelled.name}, {key}", known.get(key), labelled.facts[key]) for key in SAME_IMAGES]
    if differences := [f"{key} is {mine!r} there, {value!r} asked for" for key, mine, value in pairs if mine != value]:
        raise UsageError(f"{str(out)!r} holds another evaluation: {'; '.join(differences)}. Give another file.")


def resumed(there: dict[str, Any], asked: dict[str, Any], sets: Sequence[LabelledSet], out: Path) -> dict[str, Any]:
    """Go on with the record in a file, see `check_same`."""
    check_same(there, asked, sets, out)
    again = {key: asked[key] for key in ("command", "date", "commit", "machine", "versions")}
    there.setdefault("minutes", 0.0)
    there.setdefault("resumed", []).append(again)
    return there


def _features(
    subject: str, model: Encoder | None, labelled: LabelledSet, protocol: Protocol, passes: Passes, *, store: bool
) -> tuple[Features, Features]:
    """Take the features of both parts: of pixels where there is no model, and with `store` kept if that is wanted."""
    folders = store_folders(passes.stores, model, labelled) if model and passes.stores and store else None

    def part(number: int, what: str, images: LabelledImages) -> Features:
        how: dict[str, Any] = {"pools": protocol.pools, "batch_size": passes.batch_size, "workers": passes.workers}
        if model is not None and folders is not None:
            return stored_features(model, images, folders[number], show=passes.show, **how)
        with progress(f"{subject} on {labelled.name}, {what}", len(images.labels), show=passes.show) as tick:
            return pixel_features(images) if model is None else embed_labelled(model, images, tick=tick, **how)

    return part(0, "training part", labelled.train), part(1, "test part", labelled.test)


def store_folders(stores: Path, encoder: Encoder, labelled: LabelledSet) -> list[Path]:
    """Name the stores of an encoder's embeddings of a set's two parts; other weights or images have other ones."""
    digest = hashlib.sha256(json.dumps(_described(encoder)).encode()).hexdigest()
    below = stores / f"{_file_name(encoder.name)}-{digest[:8]}"
    marks = {part: labelled.facts[f"{part}_fingerprint"][:8] for part in ("train", "test")}
    return [below / f"{_file_name(labelled.name)}-{part}-{mark}" for part, mark in marks.items()]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]|^\.", "_", text)[:100]


def evaluate_stores(
    train: Store, test: Store, protocol: Protocol | None = None, *, labels: Mapping[str, str] | None = None,
    name: str = "stores", command: str = "", device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Measure embeddings that `extract` wrote; no image is opened. The record is that of `evaluate`.

    The stores are complete and of the same encoder; the token of stores with one token is the only pool. `labels` are
    by id, for images whose place does not say it. For k-NN alone, the training store is read one part at a time.
    """
    protocol, started = protocol or Protocol(), time.monotonic()
    _check_pair(train, test)
    stored = train.manifest.pool
    if stored in ROW_POOLS and stored != "cls+mean":  # "patches" is refused by store_features
        protocol = replace(protocol, pools=(stored,))
    train_labels, test_labels = store_labels(train, labels), store_labels(test, labels)
    classes, (first, second) = number_classes(list(train_labels.values()), list(test_labels.values()), name)
    numbers = dict(zip(train_labels, first.tolist(), strict=True))
    asked = store_features(test, dict(zip(test_labels, second.tolist(), strict=True)), protocol.pools)
    if protocol.methods == ("knn",):
        bank = _streamed(train, numbers, protocol.pools[0])
        found, _ = take_outcomes({"knn": measure_bank(bank, asked, protocol, len(classes), device)})
    else:
        features = store_features(train, numbers, protocol.pools)
        found = probe(features, asked, classes=len(classes), protocol=protocol, device=device)
    manifest = train.manifest
    facts = {
        "classes": len(classes),
        "train_images": len(train), "test_images": len(test),
        "train_fingerprint": manifest.index_sha256, "test_fingerprint": test.manifest.index_sha256,
        "refused": sum(1 for store in (train, test) for _ in store.refused()),
    }  # fmt: skip
    subject = {
        "name": manifest.model, "weights_sha256": manifest.weights_sha256, "transform": manifest.transform,
        "precision": manifest.precision, "normalized": manifest.normalized,
    }  # fmt: skip
    record = _record(subject, protocol, command, device)
    minutes = round((time.monotonic() - started) / 60, 2)
    return record | {"results": {manifest.model: {name: found}}, "data": {name: facts}, "minutes": minutes}


def probe(
    train: Features, test: Features, *, classes: int, protocol: Protocol, device: str | torch.device = "cpu"
) -> Results:
    """Run the protocol's methods on features; accuracies in percent."""
    return take_outcomes(_probed(train, test, classes=classes, protocol=protocol, device=device))[0]


def _probed(
    train: Features, test: Features, *, classes: int, protocol: Protocol, device: str | torch.device
) -> Results:
    chosen = [method for method in METHODS.values() if method.name in protocol.methods]
    return {one.name: one.measure(train, test, protocol, classes, device) for one in chosen}


def _baseline(name: str, encoder: Encoder) -> Encoder | None:
    if name not in get_args(Baseline):
        raise UsageError(unknown("baseline", name, get_args(Baseline)))
    return random_encoder(encoder) if name == "random" else None


def random_encoder(encoder: Encoder, seed: int = 0) -> Encoder:
    """The same model as the method initialises it, before any step, or timm if it is not ours; the transform stays."""
    if encoder.backend != "torch":
        raise UsageError("the baseline 'random' needs the encoder in torch: load it with backend='torch'")
    config, fresh = encoder.config, {"record": None, "weights_sha256": None}
    if config.pool != "cls":
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return Encoder(build_model(config, None), config, **fresh).to(encoder.device)
    vit, grid = copy.deepcopy(encoder.vit), cast("tuple[int, int]", encoder.row_shape("patches")[:2])
    init_weights(vit, generator=seeded(seed, 2))
    with torch.no_grad():
        vit.pos_embed.copy_(position_table(encoder.embed_dim, grid, grid))
    return Encoder(TorchModel(vit, config.size), config, **fresh)


def pixel_features(images: LabelledImages) -> Features:
    """Take 32 x 32 RGB pixels as features: rows {"pixels": (N, 3072)}."""
    transform, reader = Transform.square(PIXELS, PIXELS), Reader()
    pixels, kept, refused = list[np.ndarray](), list[int](), list[str]()
    for row, entry in enumerate(images.index.entries()):
        try:
            pixels.append(transform.pixels(decode(reader.read(entry))))
            kept.append(row)
        except Refused:
            refused.append(entry.id)
    if not kept:
        raise SourceError(f"none of the {len(images.labels)} images could be decoded, {refused[0]!r} the first of them")
    rows = transform.normalise(torch.from_numpy(np.stack(pixels))).flatten(1).numpy()
    return Features({"pixels": rows}, images.labels[kept], tuple(refused))


def _check_pair(train: Store, test: Store) -> None:
    for store in (train, test):
        if not store.complete:
            raise StoreError(f"{str(store.folder)!r} is not complete: run the same extract command again first")
    for field in ("model", "weights_sha256", "transform", "pool", "normalized", "shape"):
        mine, theirs = getattr(train.manifest, field), getattr(test.manifest, field)
        if mine != theirs:
            raise StoreError(f"the stores differ in {field}: {mine!r} in the training store, {theirs!r} in the other")


def _streamed(store: Store, numbers: Mapping[str, int], pool: Pool) -> Bank:
    """Read one pool of a store, one part at a time."""
    for ids, rows in store.batches():
        chosen = split_pools(rows, store.manifest.pool, (pool,))[pool]
        yield chosen.astype(np.float32), np.array([numbers[name] for name in ids], np.int64)


def _described(encoder: Encoder) -> dict[str, Any]:
    return {
        "name": encoder.name, "weights_sha256": encoder.weights_sha256, "transform": encoder.transform.id,
        "precision": resolve_precision("auto", encoder.device), "backend": encoder.backend,
    } | ({"source": encoder.source} if encoder.source else {})  # fmt: skip


def new_record(encoder: Encoder, protocol: Protocol, command: str) -> dict[str, Any]:
    """Begin a record of an encoder."""
    return _record(_described(encoder), protocol, command, encoder.device)


def _record(encoder: dict[str, Any], protocol: Protocol, command: str, device: str | torch.device) -> dict[str, Any]:
    return {
        "encoder": encoder,
        "results": {},
        "unit": "percent of test images; low and high: 95 % bootstrap interval over them; spread: standard deviation "
        "over draws of training images",
        "protocol": json.loads(json.dumps(asdict(protocol))),  # as it comes back from a file
        "data": {},
        "minutes": 0.0,
        "command": command,
        **made_with(torch.device(device)),
    }
