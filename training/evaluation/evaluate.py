"""Measures what an encoder is worth downstream, by the methods of protocols.py, with intervals.

A record says which images, weights, settings and code gave each figure.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch

from micl_zoo.encoders.device import Pool, resolve_precision
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.encoders.torch_model import TorchModel, build_model
from micl_zoo.errors import Refused, SourceError, StoreError, UsageError, unknown
from micl_zoo.files import write_text
from micl_zoo.images.decode import decode
from micl_zoo.images.transform import Transform
from micl_zoo.progress import progress
from micl_zoo.sources.reader import Reader
from micl_zoo.stores.store import Store

from ..micl import init_weights, position_table
from ..run.order import seeded
from ..run.provenance import made_with
from .features import Features, embed_labelled, split_pools, store_features, store_labels
from .knn import Bank, measure_bank
from .labelled import LabelledImages, LabelledSet, number_classes
from .protocols import METHODS, PIXELS, Protocol
from .record import read_evaluation

log = logging.getLogger(__name__)

Baseline = Literal["random", "pixels"]
Results = dict[str, Any]  # of one subject on one set, by method

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
        command: the command that was given, for the record.
        show: show progress bars, on a terminal.

    Returns:
        The record: `results[subject][set][method]`, accuracies in percent of the test images with 95 % intervals, and
        everything they depend on.

    Raises:
        UsageError: two sets of one name, or a record in `out` of another encoder, protocol or other images.
    """
    protocol, places = protocol or Protocol(), [labelled.name for labelled in sets]
    if twice := {name for name in places if places.count(name) > 1}:
        raise UsageError(f"two sets are called {', '.join(sorted(twice))}: rename a folder, a record goes by the names")
    record = _begun(out, _record(_described(encoder), protocol, command, encoder.device), sets)
    chosen = {encoder.name: encoder} | {name: _baseline(name, encoder) for name in baselines}
    for (subject, model), labelled in product(chosen.items(), sets):
        there, started = record["results"].setdefault(subject, {}), time.monotonic()
        if labelled.name in there:
            continue
        features = []
        for part, images in (("training part", labelled.train), ("test part", labelled.test)):
            with progress(f"{subject} on {labelled.name}, {part}", len(images.labels), show=show) as tick:
                how: dict[str, Any] = {"pools": protocol.pools, "batch_size": batch_size, "workers": workers}
                found = pixel_features(images) if model is None else embed_labelled(model, images, tick=tick, **how)
                features.append(found)
        refused = [name for one in features for name in one.refused]
        if refused:
            log.warning("%s: %d images cannot be read and are left out: %s …", labelled.name, len(refused), refused[0])
        record["data"].setdefault(labelled.name, labelled.facts | {"refused": len(refused)})
        alone = replace(protocol, methods=("knn",)) if model is None and "knn" in protocol.methods else protocol
        there[labelled.name] = probe(*features, classes=len(labelled.classes), protocol=alone, device=encoder.device)
        record["minutes"] = round(record["minutes"] + (time.monotonic() - started) / 60, 2)
        if out is not None:
            write_text(out, json.dumps(record, indent=1) + "\n")
    return record


def _begun(out: Path | None, asked: dict[str, Any], sets: Sequence[LabelledSet]) -> dict[str, Any]:
    """Take the record in a file to continue it, or the one asked for."""
    if out is None or not out.exists():
        return asked
    there = read_evaluation(out, UsageError, "it is not an evaluation record to go on with, choose another file")
    pairs = [(key, there[of].get(key), value) for of in ("encoder", "protocol") for key, value in asked[of].items()]
    for labelled in sets:
        if labelled.name in there["data"]:
            known = there["data"][labelled.name]
            pairs += [(f"{labelled.name}, {key}", known.get(key), labelled.facts[key]) for key in SAME_IMAGES]
    if differences := [f"{key} is {mine!r} there, {value!r} asked for" for key, mine, value in pairs if mine != value]:
        raise UsageError(f"{str(out)!r} holds another evaluation: {'; '.join(differences)}. Give another file.")
    again = {key: asked[key] for key in ("command", "date", "commit", "machine", "versions")}
    there.setdefault("minutes", 0.0)
    there.setdefault("resumed", []).append(again)
    return there


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
    if stored in ("cls", "mean"):  # "patches" is refused by store_features
        protocol = replace(protocol, pools=(stored,))
    train_labels, test_labels = store_labels(train, labels), store_labels(test, labels)
    classes, (first, second) = number_classes(list(train_labels.values()), list(test_labels.values()), name)
    numbers = dict(zip(train_labels, first.tolist(), strict=True))
    asked = store_features(test, dict(zip(test_labels, second.tolist(), strict=True)), protocol.pools)
    if protocol.methods == ("knn",):
        bank = _streamed(train, numbers, protocol.pools[0])
        found = {"knn": measure_bank(bank, asked, protocol, len(classes), device)}
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
    transform, reader = Transform(PIXELS, PIXELS), Reader()
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
    }  # fmt: skip


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
