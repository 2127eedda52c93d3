"""What an encoder is worth downstream: k-NN, linear probe, logistic regression and few-shot, with their intervals.

A record says which images, weights, settings and code gave each figure.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from micl_zoo.encoders.device import resolve_precision
from micl_zoo.encoders.encoder import Encoder, Pool
from micl_zoo.encoders.torch_model import TorchModel
from micl_zoo.errors import Refused, StoreError, UsageError, unknown
from micl_zoo.files import write_text
from micl_zoo.images.decode import decode
from micl_zoo.images.transform import Transform
from micl_zoo.progress import progress
from micl_zoo.sources.listing import Reader
from micl_zoo.stores.store import Store

from ..micl import init_weights, position_table
from ..run.order import seeded
from ..run.provenance import made_with
from .features import POOLS, Features, check_names, embed_labelled, split_pools, store_features, store_labels
from .knn import KS, TEMPERATURE, Bank, knn_predict
from .labelled import LabelledImages, LabelledSet, number_classes
from .linear import (
    EPOCHS,
    FEW_SHOT_C,
    INVERSE_PENALTIES,
    LEARNING_RATES,
    Chosen,
    few_shot,
    linear_probe,
    logistic_regression,
)
from .tables import _percent, score

Method = Literal["knn", "linear", "logreg", "few-shot"]
Baseline = Literal["random", "pixels"]
Results = dict[str, Any]  # of one subject on one set, by method

SAME_IMAGES = ("sha256", "train_fingerprint", "test_fingerprint", "classes")  # of a set's facts
PIXELS = 32  # side of the images whose pixels are a baseline's features


@dataclass(frozen=True)
class Protocol:
    """Every choice of a measurement.

    Attributes:
        methods: which are run.
        pools: features of the linear probe and of logistic regression; k-NN and few-shot take the first.
        ks: neighbours of k-NN.
        temperature: of its votes.
        learning_rates, epochs: of the linear probe.
        inverse_penalties: C of logistic regression.
        shots: images a class of few-shot.
        draws: of those images.
        few_shot_c: C of few-shot.
        seed: of the validation split and the order of the linear probe.
    """

    methods: tuple[Method, ...] = ("knn", "linear", "logreg", "few-shot")
    pools: tuple[Pool, ...] = POOLS
    ks: tuple[int, ...] = KS
    temperature: float = TEMPERATURE
    learning_rates: tuple[float, ...] = LEARNING_RATES
    epochs: int = EPOCHS
    inverse_penalties: tuple[float, ...] = INVERSE_PENALTIES
    shots: tuple[int, ...] = (1, 5, 10)
    draws: int = 5
    few_shot_c: float = FEW_SHOT_C
    seed: int = 0

    def __post_init__(self) -> None:
        check_names("method", self.methods, get_args(Method))
        check_names("pool", self.pools, POOLS)
        counts = {"k": min(self.ks, default=0), "shots": min(self.shots, default=0), "draws": self.draws}
        for name, number in (counts | {"epochs": self.epochs}).items():
            if number < 1:
                raise UsageError(f"{name} must be at least 1, got {number}")


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
        encoder: to measure.
        sets: to measure it on, of different names.
        protocol: methods and settings.
        out: file of the record, which is written after every set; what is in it already is not measured again.
        baselines: "random", the same ViT as it is initialised, measured alike, and "pixels", 32 x 32 of them, measured
            by k-NN alone where that is asked for: classifiers of their 3,072 numbers take longer than all else.
        batch_size: images a forward pass.
        workers: processes that decode; one a core by default, none for 0.
        command: that was given, for the record.
        show: progress bars, on a terminal.

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
    for subject, labelled in product(chosen, sets):
        there, started = record["results"].setdefault(subject, {}), time.monotonic()
        if labelled.name in there:
            continue
        features = []
        for part, images in (("training part", labelled.train), ("test part", labelled.test)):
            with progress(f"{subject} on {labelled.name}, {part}", len(images.labels), show=show) as tick:
                loading = {"batch_size": batch_size, "workers": workers, "tick": tick}
                features.append(_features(chosen[subject], images, protocol, **loading))
        refused = sum(len(one.refused) for one in features)
        record["data"].setdefault(labelled.name, labelled.facts | {"refused": refused})
        how = replace(protocol, methods=("knn",)) if subject == "pixels" and "knn" in protocol.methods else protocol
        there[labelled.name] = probe(*features, classes=len(labelled.classes), protocol=how, device=encoder.device)
        record["minutes"] = round(record["minutes"] + (time.monotonic() - started) / 60, 2)
        if out is not None:
            write_text(out, json.dumps(record, indent=1) + "\n")
    return record


def _features(model: Encoder | None, images: LabelledImages, protocol: Protocol, **how: Any) -> Features:
    return pixel_features(images) if model is None else embed_labelled(model, images, pools=protocol.pools, **how)


def _begun(out: Path | None, asked: dict[str, Any], sets: Sequence[LabelledSet]) -> dict[str, Any]:
    """The record in a file, to go on with, or the one asked for."""
    if out is None or not out.exists():
        return asked
    try:
        there: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        before = {key: dict(there[key]) for key in ("encoder", "protocol", "data", "results")}
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{str(out)!r} is there and no record of an evaluation: give another file") from None
    pairs = [
        (key, before[part].get(key), value) for part in ("encoder", "protocol") for key, value in asked[part].items()
    ]
    for labelled in sets:
        if labelled.name in before["data"]:
            known = before["data"][labelled.name]
            pairs += [(f"{labelled.name}, {key}", known.get(key), labelled.facts[key]) for key in SAME_IMAGES]
    if differences := [f"{key} is {mine!r} there, {value!r} asked for" for key, mine, value in pairs if mine != value]:
        raise UsageError(f"{str(out)!r} holds another evaluation: {'; '.join(differences)}. Give another file.")
    there.setdefault("resumed", []).append(
        {key: asked[key] for key in ("command", "date", "commit", "machine", "versions")}
    )
    return there


def evaluate_stores(
    train: Store, test: Store, protocol: Protocol | None = None, *, labels: Mapping[str, str] | None = None,
    name: str = "stores", command: str = "", device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Measure embeddings that `extract` wrote; no image is opened. The record is that of `evaluate`.

    For k-NN alone the rows of the training store are gone through a part at a time.

    Args:
        train, test: complete stores of the same encoder.
        protocol: methods and settings; of a store with one token, that one is the only pool.
        labels: label by id, for images whose place does not say it.
        name: of the set, in the record.
        command: that was given, for the record.
        device: that computes the classifiers.

    Raises:
        StoreError: a store that is not complete, or two of different encoders.
        SourceError: labels that are missing.
    """
    protocol, started = protocol or Protocol(), time.monotonic()
    _check_pair(train, test)
    stored = train.manifest.pool
    if stored != "cls+mean":
        protocol = Protocol(**{**asdict(protocol), "pools": (stored,)})
    train_labels, test_labels = store_labels(train, labels), store_labels(test, labels)
    classes, (first, second) = number_classes(list(train_labels.values()), list(test_labels.values()), name)
    numbers = [
        dict(zip(ids, part.tolist(), strict=True)) for ids, part in ((train_labels, first), (test_labels, second))
    ]
    asked = store_features(test, numbers[1], protocol.pools)
    if protocol.methods == ("knn",):
        found = {"knn": _knn(_streamed(train, numbers[0], protocol.pools[0]), asked, len(classes), protocol, device)}
    else:
        features = store_features(train, numbers[0], protocol.pools)
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
    pools = [pool for pool in train.rows if pool in protocol.pools or pool == "pixels"]
    first, found = pools[0], Results()
    if "knn" in protocol.methods:
        found["knn"] = _knn([(train.rows[first], train.labels)], test, classes, protocol, device)
    if "linear" in protocol.methods:
        found["linear"] = {
            pool: _chosen("lr", linear_probe(
                train.rows[pool], train.labels, test.rows[pool], classes=classes,
                learning_rates=protocol.learning_rates, epochs=protocol.epochs, seed=protocol.seed, device=device,
            ), test.labels)
            for pool in pools
        }  # fmt: skip
    if "logreg" in protocol.methods:
        found["logreg"] = {
            pool: _chosen("C", logistic_regression(
                train.rows[pool], train.labels, test.rows[pool], classes=classes,
                inverse_penalties=protocol.inverse_penalties, seed=protocol.seed, device=device,
            ), test.labels)
            for pool in pools
        }  # fmt: skip
    if "few-shot" in protocol.methods:
        found["few-shot"] = dict(_few_shots(train, test, first, classes, protocol, device))
    return found


def _knn(
    bank: Bank, test: Features, classes: int, protocol: Protocol, device: str | torch.device
) -> dict[str, dict[str, float]]:
    queries = next(iter(test.rows.values()))
    found = knn_predict(
        bank, queries, classes=classes, ks=protocol.ks, temperature=protocol.temperature, device=device
    )  # fmt: skip
    return {str(k): score(predictions == test.labels) for k, predictions in found.items()}


def _chosen(setting: str, found: Chosen, labels: np.ndarray) -> dict[str, float]:
    validation = _percent(max(found.validation.values()))
    return {**score(found.predictions == labels), setting: found.setting, "validation": validation}


def _few_shots(
    train: Features, test: Features, pool: str, classes: int, protocol: Protocol, device: str | torch.device
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Mean and spread over the draws; a class with too few images leaves that number of shots out, with the reason."""
    for shots in protocol.shots:
        try:
            found = few_shot(
                train.rows[pool], train.labels, test.rows[pool], classes=classes, shots=shots, draws=protocol.draws,
                inverse_penalty=protocol.few_shot_c, device=device,
            )  # fmt: skip
        except UsageError as error:
            yield str(shots), {"left_out": str(error)}
            continue
        draws = [float((predictions == test.labels).mean()) for predictions in found]
        spread = float(np.std(draws, ddof=1)) if len(draws) > 1 else 0.0
        yield (
            str(shots),
            {"accuracy": _percent(float(np.mean(draws))), "spread": _percent(spread), "draws": [*map(_percent, draws)]},
        )


def _baseline(name: str, encoder: Encoder) -> Encoder | None:
    if name not in get_args(Baseline):
        raise UsageError(unknown("baseline", name, get_args(Baseline)))
    return random_encoder(encoder) if name == "random" else None


def random_encoder(encoder: Encoder, seed: int = 0) -> Encoder:
    """The same ViT as the method initialises it, before any step; the transform stays.

    Raises:
        UsageError: an encoder that is no torch model.
    """
    if encoder.backend != "torch":
        raise UsageError("the baseline 'random' needs the encoder in torch: load it with backend='torch'")
    vit = copy.deepcopy(encoder.vit)
    init_weights(vit, generator=seeded(seed, 2))
    with torch.no_grad():
        vit.pos_embed.copy_(position_table(encoder.embed_dim, encoder.grid, encoder.grid))
    return Encoder(TorchModel(vit), encoder.config, record=None, weights_sha256=None)


def pixel_features(images: LabelledImages) -> Features:
    """32 x 32 RGB pixels as features: rows {"pixels": (N, 3072)}."""
    transform, reader = Transform(PIXELS, PIXELS), Reader()
    pixels, kept, refused = list[np.ndarray](), list[int](), list[str]()
    for row, entry in enumerate(images.index.entries()):
        try:
            pixels.append(transform.pixels(decode(reader.read(entry))))
            kept.append(row)
        except Refused:
            refused.append(entry.id)
    rows = transform.normalise(torch.from_numpy(np.stack(pixels))).flatten(1).numpy()
    return Features({"pixels": rows}, images.labels[kept], tuple(refused))


def _check_pair(train: Store, test: Store) -> None:
    for store in (train, test):
        if not store.complete:
            raise StoreError(f"{str(store.folder)!r} is not complete: run the same extract command again first")
    same = ("model", "weights_sha256", "transform", "pool", "normalized", "shape")
    for field in same:
        mine, theirs = getattr(train.manifest, field), getattr(test.manifest, field)
        if mine != theirs:
            raise StoreError(f"the stores differ in {field}: {mine!r} to learn from, {theirs!r} to be asked about")


def _streamed(store: Store, numbers: Mapping[str, int], pool: Pool) -> Bank:
    """The rows of a store a part at a time, of the pool that k-NN takes."""
    for ids, rows in store.batches():
        chosen = split_pools(rows, store.manifest.pool, (pool,))[pool]
        yield chosen.astype(np.float32), np.array([numbers[name] for name in ids], np.int64)


def _described(encoder: Encoder) -> dict[str, Any]:
    return {
        "name": encoder.name,
        "weights_sha256": encoder.weights_sha256,
        "transform": encoder.transform.id,
        "precision": resolve_precision("auto", encoder.device)[1],
        "backend": encoder.backend,
    }


def _record(encoder: dict[str, Any], protocol: Protocol, command: str, device: str | torch.device) -> dict[str, Any]:
    """A record without figures."""
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
