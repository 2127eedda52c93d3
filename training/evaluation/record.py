"""Records of evaluations as they are read again: what tables, cards and a resumed evaluation need of them."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from micl_zoo.errors import MiclZooError, UsageError
from micl_zoo.schema import Between, read, read_json

from ..run.record import Machine
from .protocols import METHODS, Protocol

Percent = Annotated[float, Between(0, 100)]
Images = Annotated[int, Between(0, 2**53)]
Fact = str | int | float | None


@dataclass(frozen=True)
class Figure:
    """An accuracy with its interval or its spread over draws, or why there is none."""

    accuracy: Percent | None = None
    low: Percent | None = None
    high: Percent | None = None
    spread: Percent | None = None
    validation: Percent | None = None  # accuracy on the images that chose a setting
    lr: Annotated[float, Between(0)] | None = None  # those settings
    C: Annotated[float, Between(0)] | None = None
    left_out: str | None = None

    def __post_init__(self) -> None:
        if self.accuracy is None and self.left_out is None:
            raise ValueError("it has neither an accuracy nor a left_out")
        if self.accuracy is not None and self.spread is None and (self.low is None or self.high is None):
            raise ValueError("its accuracy has neither low and high nor a spread")


@dataclass(frozen=True)
class SetFacts:
    """What a set of images was."""

    classes: Images
    train_images: Images
    test_images: Images
    source: str = ""
    train_images_there: Images | None = None
    test_images_there: Images | None = None
    refused: Images = 0
    known: str = "-"
    sha256: dict[str, str] = field(default_factory=dict)
    train_fingerprint: str | None = None
    test_fingerprint: str | None = None


@dataclass(frozen=True)
class Subject:
    """The encoder that was measured."""

    name: str
    weights_sha256: str | None
    precision: str
    transform: str | None = None
    backend: str | None = None


@dataclass(frozen=True)
class Made:
    """Where, when and by what a record was made."""

    command: str = "not recorded"
    date: str | None = None
    started: str | None = None
    commit: str | None = None
    machine: Machine = None  # type: ignore[assignment]  # of a record that does not say it
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationFile(Made):
    """What `micl-zoo eval` writes, but `eval finetune`."""

    encoder: Subject = field(kw_only=True)
    results: dict[str, dict[str, dict[str, dict[str, Figure]]]] = field(kw_only=True)  # by subject, set, method, key
    protocol: dict[str, Any] = field(kw_only=True)
    data: dict[str, SetFacts] = field(kw_only=True)
    minutes: Annotated[float, Between(0)] = 0.0
    resumed: list[Made] = field(default_factory=list)

    def __post_init__(self) -> None:
        sets = [(name, found) for each in self.results.values() for name, found in each.items()]
        if unknown := next((name for name, _ in sets if name not in self.data), None):
            raise ValueError(f"data has nothing on the set {unknown!r} of its results")
        if lacking := [one.name for one in fields(Protocol) if one.name not in self.protocol]:
            raise ValueError(f"protocol has no {lacking[0]}")
        for method in METHODS.values():
            figures = [] if method.by_key else [one for _, found in sets for one in found.get(method.name, {}).values()]
            if any(None in (one.accuracy, one.validation, getattr(one, method.chosen)) for one in figures):
                raise ValueError(f"a figure of {method.name} lacks accuracy, validation or {method.chosen}")


@dataclass(frozen=True)
class Speed:
    """How fast images became embeddings, from their files on; without loading the model."""

    images: Annotated[int, Between(1, 2**53)]
    seconds: Annotated[float, Between(1e-9)]
    device: str
    chip: str  # name of the card or the processor
    precision: str
    batch_size: Images
    workers: Images  # decoding processes

    @property
    def images_per_second(self) -> float:
        """Images per second."""
        return self.images / self.seconds

    @property
    def how(self) -> tuple[Fact, ...]:
        """What speeds are compared within."""
        return tuple(value for name, value in vars(self).items() if name not in ("images", "seconds"))

    def plus(self, other: Speed) -> Speed:
        """Join it with the speed of other images, gone through alike."""
        return replace(self, images=self.images + other.images, seconds=self.seconds + other.seconds)


def speed_file(store: Path) -> Path:
    """Name the file beside a store that holds its `Speed`."""
    return store.with_name(f"{store.name}.json")


def read_speed(store: Path) -> Speed | None:
    """Read how fast a store was written; None where nobody knows."""
    file, cure = speed_file(store), "delete it: the images/s are then not known"
    return read(Speed, read_json(file, UsageError, cure), repr(str(file)), UsageError, cure) if file.exists() else None


@dataclass(frozen=True)
class Bits:
    """Rows of yes or no per image, such as whether each was classified right by one draw of training images."""

    draws: Annotated[int, Between(1, 1 << 20)]  # rows
    images: Images  # N
    packed: str  # base64; each row begins with a byte of its own

    def __post_init__(self) -> None:
        if len(base64.b64decode(self.packed, validate=True)) != self.draws * -(-self.images // 8):
            raise ValueError(f"packed is not as long as {self.draws} x {self.images} bits are")

    @classmethod
    def of(cls, found: np.ndarray) -> Bits:
        """Pack (draws, N) bool."""
        draws, images = found.shape
        return cls(draws, images, base64.b64encode(np.packbits(found, axis=1).tobytes()).decode())

    def array(self) -> np.ndarray:
        """Unpack: (draws, N) bool."""
        packed = np.frombuffer(base64.b64decode(self.packed), np.uint8).reshape(self.draws, -1)
        return np.unpackbits(packed, axis=1, count=self.images).astype(bool)


@dataclass(frozen=True)
class Candidate:
    """One of the encoders of a comparison."""

    record: EvaluationFile  # as it is where this encoder is measured alone
    embed_dim: Images
    parameters: Images
    license: str
    speed: Speed | None = None
    embedded: dict[str, Bits] = field(default_factory=dict)  # by set: which test images have a row
    right: dict[str, dict[str, dict[str, Bits]]] = field(default_factory=dict)  # by set, method, key; of those images

    def __post_init__(self) -> None:
        if self.record.encoder.name not in self.record.results:
            raise ValueError(f"its record has no results of {self.record.encoder.name!r}")
        for name, methods in self.right.items():
            counts = {bits.images for keys in methods.values() for bits in keys.values()}
            if name not in self.embedded or counts - {int(self.embedded[name].array().sum())}:
                raise ValueError(f"the images of embedded and right differ in {name!r}")


@dataclass(frozen=True)
class ComparisonFile(Made):
    """What `micl-zoo eval` writes of several encoders."""

    encoders: dict[str, Candidate] = field(kw_only=True)  # by the text that names them
    asked: list[str] = field(default_factory=list)  # those of the last call, in its order
    failed: dict[str, str] = field(default_factory=dict)  # why, of those that could not be measured
    compared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Interval:
    """An accuracy with its interval."""

    accuracy: Percent
    low: Percent
    high: Percent


@dataclass(frozen=True)
class Tuned:
    """The encoder that fine-tuning started from."""

    encoder: str
    encoder_sha256: str | None


@dataclass(frozen=True)
class TunedBy:
    """Its recipe, as far as a card goes."""

    name: str
    epochs: Annotated[float, Between(0, 1e6)]
    batch_size: Images


@dataclass(frozen=True)
class TunedFile(Made):
    """What `micl-zoo eval finetune` writes, its result.json."""

    top1: Interval = field(kw_only=True)
    test_images: Images = field(kw_only=True)
    encoder: Tuned = field(kw_only=True)
    data: SetFacts = field(kw_only=True)
    recipe: TunedBy = field(kw_only=True)
    machine: Machine = field(kw_only=True)
    steps: Images = field(kw_only=True)
    hours: Annotated[float, Between(0, 1e9)] = field(kw_only=True)
    top5: Interval | None = None
    classes: list[str] = field(default_factory=list)
    test_refused: list[tuple[str, str, str]] = field(default_factory=list)
    train_refused: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.data.source:
            raise ValueError("data has no source")


def read_result(file: Path, error: type[MiclZooError], cure: str) -> dict[str, Any]:
    """Read the result.json of fine-tuning, with all its fields."""
    found = read_json(file, error, cure)
    read(TunedFile, found, repr(str(file)), error, cure, others=True)
    return dict(found)


def read_evaluation(file: Path, error: type[MiclZooError], cure: str) -> dict[str, Any]:
    """Read the record of an evaluation, with all its fields."""
    found, what = read_json(file, error, cure), repr(str(file))
    if isinstance(found, dict) and "encoders" in found:
        raise error(f"{what} is a record of several encoders, and that of one is needed: choose another file")
    record = read(EvaluationFile, found, what, error, cure, others=True)
    read(Protocol, record.protocol, f"the protocol in {what}", error, cure, others=True)
    return dict(found)


def read_comparison(file: Path, error: type[MiclZooError], cure: str) -> dict[str, Any]:
    """Read the record of several encoders, with all its fields."""
    found, what = read_json(file, error, cure), repr(str(file))
    if isinstance(found, dict) and "results" in found:
        raise error(f"{what} is the record of one encoder, and several were asked for: choose another file")
    record = read(ComparisonFile, found, what, error, cure, others=True)
    for text, one in record.encoders.items():
        read(Protocol, one.record.protocol, f"the protocol of {text} in {what}", error, cure, others=True)
    return dict(found)


def read_measured(file: Path, sha256: str) -> dict[str, Any]:
    """Read a record of any kind, for a card; of several encoders, the part on those weights."""
    cure = "give a record that `eval all -o` wrote, or the result.json of `eval finetune`"
    keys = found if isinstance(found := read_json(file, UsageError, cure), dict) else {}
    if "encoders" not in keys:
        return (read_result if "top1" in keys else read_evaluation)(file, UsageError, cure)
    parts = [one["record"] for one in read_comparison(file, UsageError, cure)["encoders"].values()]
    if not (own := [one for one in parts if one["encoder"]["weights_sha256"] == sha256]):
        raise UsageError(f"{str(file)!r} has no encoder with these weights, sha256 {sha256}: {cure}")
    return dict(own[0])
