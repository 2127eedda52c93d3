"""The files of a run as they are read again, whichever version wrote them: run.json, metrics.jsonl, checkpoints."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from micl_zoo.errors import TrainingError
from micl_zoo.files import open_regular
from micl_zoo.schema import Between, read, read_json

RUN_FILE, METRICS_FILE, VIEWS_FILE = "run.json", "metrics.jsonl", "views.png"
RESTORED = "the command that started the run makes it again from the newest checkpoint"
LARGEST = 1e100  # of a measured number
LONGEST_LINE = 1 << 20  # bytes of metrics.jsonl; a step's line has 200
Count = Annotated[int, Between(0, 2**53)]
Amount = Annotated[float, Between(0)]
Share = Annotated[float, Between(0, 1)]
Fact = str | int | float | bool | None


@dataclass(frozen=True)
class Images:
    """What was trained on: a source, or the parts of a labelled set with more fields."""

    source: str = "not recorded"
    images: Count = 0
    fingerprint: str | None = None
    refused: list[tuple[str, str, str]] = field(default_factory=list)  # id, reason, detail


@dataclass(frozen=True)
class Machine:
    """What computed, as a card says it."""

    processor: str
    cores: Annotated[int, Between(1, 2**20)]
    device: str | None = None
    card: str | None = None
    card_memory_gib: Amount | None = None
    threads: Annotated[int, Between(1, 2**20)] | None = None

    def __post_init__(self) -> None:
        if self.card is not None and self.card_memory_gib is None:
            raise ValueError("it has a card and no card_memory_gib")


@dataclass(frozen=True)
class Corpus:
    """What a finished run was trained on."""

    source: str
    images: Annotated[int, Between(1, 2**53)]
    fingerprint: str
    refused: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What a finished run came to."""

    steps: Count
    images_seen: Count
    hours: Annotated[float, Between(0, 1e9)]
    precision: str


@dataclass(frozen=True)
class Piece:
    """A piece of a run that was resumed with other code or elsewhere."""

    started: str | None = None
    commit: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Fact] = field(default_factory=dict)
    processes: Count = 1


@dataclass(frozen=True)
class KnnChange:
    """k-NN on one set before and after a run: shares of the test images, and an interval of the change in points."""

    before: Share
    after: Share
    low: Annotated[float, Between(-101, 101)]
    high: Annotated[float, Between(-101, 101)]
    images: Count
    left_out: Count = 0


@dataclass(frozen=True)
class Change:
    """What a run has made of the encoder that it started from, see `pretraining.change`."""

    cosine: Annotated[float, Between(-2, 2)]
    neighbours: Amount
    of_neighbours: Count
    images: Count
    among: Count
    held_out: bool
    left_out: Count = 0
    knn: dict[str, KnnChange] = field(default_factory=dict)


@dataclass(frozen=True)
class StartFacts:
    """The encoder that a run started from."""

    encoder: str
    encoder_sha256: str | None = None
    source: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class RunFile(Piece):
    """run.json."""

    recipe: dict[str, Fact | list[Fact]] = field(kw_only=True)  # see `recorded_recipe`
    data: Images = field(default_factory=Images, kw_only=True)
    command: str | None = None
    encoder: StartFacts | None = None  # that the run started from
    reasons: dict[str, str] = field(default_factory=dict)  # why fields of the recipe are what they are
    change: Change | None = None
    resumed: list[Piece] = field(default_factory=list)
    result: Result = None  # type: ignore[assignment]  # of a run that is not finished


@dataclass(frozen=True)
class FinishedRun:
    """run.json of a run of pre-training that has come to its end, as far as a card goes."""

    data: Corpus
    machine: Machine
    result: Result
    processes: Annotated[int, Between(1, 2**20)] = 1


@dataclass(frozen=True)
class CheckpointHeader:
    """What the header of a checkpoint says besides how to build its encoder."""

    step: Count
    seconds: Amount


def read_run(folder: Path, cure: str = "give another folder") -> dict[str, Any] | None:
    """Read the run.json of a run's folder, with all its fields; None where there is none."""
    file = folder / RUN_FILE
    return checked_run(read_json(file, TrainingError, cure), repr(str(file)), cure) if file.exists() else None


def checked_run(found: Any, what: str, cure: str = "") -> dict[str, Any]:
    """Check what run.json holds, or another record of it that `what` names, and give it back."""
    read(RunFile, found, what, TrainingError, cure, others=True)
    return dict(found)


def number(found: Any) -> float:
    """Take a number of a line; NaN for anything else, and for one that is no number of a run."""
    return float(found) if type(found) in (int, float) and abs(found) <= LARGEST else math.nan


class MetricLine(NamedTuple):
    """A line of metrics.jsonl."""

    text: bytes  # with its end
    found: dict[str, Any] | None  # with a `step`, a whole number; None of a damaged line


def metric_lines(file: Path) -> Iterator[MetricLine]:
    """Read metrics.jsonl line by line, in bounded memory; nothing where there is none.

    A power cut leaves zeros or half a line, and the run goes on behind them.
    """
    if not file.is_file():
        return
    with open_regular(file) as raw, io.BufferedReader(raw) as lines:
        while text := lines.readline(LONGEST_LINE):
            yield MetricLine(text, _parsed(text))


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(line, dict) and type(line.get("step")) is int and 0 <= line["step"] <= 2**53
    return line if whole else None
