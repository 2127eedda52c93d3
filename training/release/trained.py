"""A trained encoder and all that is on record of it, published with the package or in a run's folder."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from micl_zoo.errors import TrainingError, UsageError
from micl_zoo.files import file_sha256, write_text
from micl_zoo.images.transform import Transform
from micl_zoo.printing import json_line
from micl_zoo.schema import read, read_json
from micl_zoo.zoo.config import NAME
from micl_zoo.zoo.hub import not_published
from micl_zoo.zoo.ours import OnnxFile, Record, find_record
from micl_zoo.zoo.weights import WEIGHTS_FILE, EncoderConfig, local_weights

from ..corpora import CORPORA, Corpus
from ..evaluation.record import read_measured
from ..pretraining.plan import frozen_count, parameter_count
from ..recipes import Recipe, record_differences, recorded_recipe
from ..run.record import METRICS_FILE, RESTORED, RUN_FILE, FinishedRun, metric_lines, number, read_run

RECORDS_FOLDER = Path(__file__).parents[1] / "records"
Json = dict[str, Any]
OTHERS = ("export", "upright")
CURVE_EVERY = 50  # steps between the points of the curve that a record keeps


class Repeat(NamedTuple):
    """The same recipe trained again with another seed, and measured alike: records and their files."""

    file: str
    record: Json
    evaluation_file: str
    evaluation: Json

    @property
    def run(self) -> Json:
        """Content of run.json."""
        return self.record["run"]


@dataclass(frozen=True)
class Trained:
    """A trained encoder and all that is on record of it."""

    name: str  # arch.tag
    record: Json  # weights (sha256 and bytes), run (run.json), curve, and knn, measured on the way
    file: str  # the weights, as the card names them; so run_file and onnx_file
    load: str  # line of Python that loads it without the hub
    transform: Transform
    license: str  # terms of the weights
    run_file: str = "run.json"
    entry: Record | None = None  # its row in the table of encoders, if it is published
    repeats: tuple[Repeat, ...] = ()  # the recipe trained again with other seeds
    onnx: OnnxFile | None = None  # the same weights as an ONNX file that is published with them
    onnx_file: str = ""
    evaluations: dict[str, Json] = field(default_factory=dict)  # records of `micl-zoo eval all`, by file
    finetunings: dict[str, Json] = field(default_factory=dict)  # of `micl-zoo eval finetune`, by file
    export: Json | None = None  # record of benchmarks/export.py
    upright: Json | None = None  # record of benchmarks/upright.py
    config: EncoderConfig | None = None  # of a run's own encoder: how to build it

    def __post_init__(self) -> None:
        measured = {file: one["encoder"]["weights_sha256"] for file, one in self.evaluations.items()}
        measured |= {file: one["encoder"]["encoder_sha256"] for file, one in self.finetunings.items()}
        measured |= {name: one["weights_sha256"] for name in OTHERS if (one := getattr(self, name))}
        for file, sha256 in measured.items():
            if sha256 != self.weights["sha256"]:
                raise UsageError(
                    f"{file} is of other weights (sha256 {sha256}) than {self.name} ({self.weights['sha256']}): "
                    f"measure these, by micl-zoo eval all {self.target} --data SET -o FILE"
                )
        for file, one in self.evaluations.items():
            if self.name not in one["results"]:
                raise UsageError(f"{file} has no results of {self.name}, but of {', '.join(one['results']) or 'none'}")
        for repeat in self.repeats:
            _check_repeat(repeat, self.run)

    @property
    def weights(self) -> Json:
        """Checksum (sha256) and size (bytes) of the file."""
        return self.record["weights"]

    @property
    def run(self) -> Json:
        """Content of run.json."""
        return self.record["run"]

    @property
    def target(self) -> str:
        """Name for it in commands."""
        return self.name if self.entry else "RUN"

    @property
    def start(self) -> Json | None:
        """What the run started from, if not from random weights: encoder, encoder_sha256, source, license."""
        return self.run.get("encoder") or None

    @property
    def parameters(self) -> tuple[int, int]:
        """Count the network's parameters, and those of them that are a fixed position table."""
        if self.start and self.config:
            from micl_zoo.encoders.build import outline

            return outline(self.config)[0], 0
        fixed = frozen_count(self.recipe)
        return parameter_count(self.recipe) + fixed, fixed

    @property
    def corpus(self) -> Corpus | None:
        """Corpus of a run on the images that its recipe is for; None where the images are the user's own."""
        corpus = CORPORA.get(self.recipe.corpus)
        return corpus if corpus and corpus.images == self.run["data"]["images"] else None

    @property
    def recipe(self) -> Recipe:
        """Recipe of the run, whichever version wrote it."""
        return recorded_recipe(self.run)

    @property
    def made(self) -> Iterator[tuple[str, str, Json]]:
        """Every record: what it is of, its file, its content."""
        yield "training", self.run_file, self.run
        yield from (("evaluation", file, one) for file, one in self.evaluations.items())
        for again in self.repeats:
            yield "training again", again.file, again.run
            yield "evaluation", again.evaluation_file, again.evaluation
        yield from (("fine-tuning", file, one) for file, one in self.finetunings.items())
        for what, name in (("ONNX", "export"), ("orientations", "upright")):
            if record := getattr(self, name):
                yield what, f"{self.name}.{name}.json", record


def published(name: str, records: Path | None = None) -> Trained:
    """Gather a published encoder and the records that come with the package."""
    entry, records = find_record(name), records or RECORDS_FOLDER
    export, upright = (next(iter(read_all(records, f"{entry.name}.{of}.json").values()), None) for of in OTHERS)
    if entry.training_record is None:
        raise UsageError(f"there is nothing to say in a card: {not_published(entry)}")
    at = "micl_zoo/embedded/{}" if entry.embedded else f"{{}} of {entry.hub_repo}"
    return Trained(
        name=entry.name,
        record=_read(records / entry.training_record),
        file=at.format(entry.embedded or WEIGHTS_FILE),
        load=f'micl_zoo.load("{entry.name}")',
        transform=entry.transform,
        license=entry.license,
        run_file=entry.training_record,
        entry=entry,
        repeats=tuple(_read_repeats(records, entry.name)),
        onnx=entry.onnx,
        onnx_file=at.format(entry.onnx.file) if entry.onnx else "",
        evaluations=read_all(records, f"{entry.name}.eval*.json"),
        finetunings=read_all(records, f"{entry.name}.finetune*.json"),
        export=export,
        upright=upright,
    )


def of_run(run: Path, measured: Sequence[Path] = ()) -> Trained:
    """Gather the encoder of a finished run of one's own, with records of `eval all` and results of `eval finetune`."""
    record, weights = run_record(run), local_weights(run / "encoder")
    found = {str(file): read_measured(file, record["weights"]["sha256"]) for file in measured}
    _check_name(weights.config.name, run)
    trained = Trained(
        name=weights.config.name,
        record=record,
        file=f"encoder/{WEIGHTS_FILE}",
        load=f"micl_zoo.load(weights={json_line(f'{run.as_posix()}/encoder')})",
        transform=weights.config.transform,
        license=weights.config.license,
        config=weights.config,
        evaluations={file: one for file, one in found.items() if "results" in one},
        finetunings={file: one for file, one in found.items() if "results" not in one},
    )
    if trained.license == "unknown" and trained.corpus:
        return dataclasses.replace(trained, license=trained.corpus.license)
    return trained


def run_record(run: Path) -> Json:
    """Make the record of a run: the weights' sha256 and bytes, run.json, every 50th step of its curve, its k-NN."""
    made_by, where = read_run(run, RESTORED), repr(str(run / RUN_FILE))
    if made_by is None:
        raise TrainingError(f"no run to describe: {where} does not exist. Give the folder that `train --out` wrote.")
    recorded_recipe(made_by, where)  # of fine-tuning there is no card
    file = run / "encoder" / WEIGHTS_FILE
    if made_by.get("result") is None or not file.exists():
        raise TrainingError(f"{str(run)!r} is not finished: rerun the command that started it to resume")
    read(FinishedRun, made_by, where, TrainingError, "a card cannot be made of it", others=True)
    lines = [line for _, line in metric_lines(run / METRICS_FILE) if line is not None]
    steps = [line for line in lines if math.isfinite(number(line.get("loss")) + number(line.get("accuracy")))]
    if not steps:
        raise TrainingError(f"{str(run / METRICS_FILE)!r} has no whole line of a step: a card cannot be made of it")
    kept = steps[::CURVE_EVERY] + steps[-1:] * ((len(steps) - 1) % CURVE_EVERY != 0)
    weights = {"sha256": file_sha256(file), "bytes": file.stat().st_size}
    return {"weights": weights, "run": made_by, "curve": kept, "knn": [line for line in lines if "knn" in line]}


def _check_name(name: str, run: Path) -> None:
    """Refuse a name that would lead files of it elsewhere: it comes out of the header of the weights."""
    if not NAME.fullmatch(name):
        raise UsageError(f"the encoder in {str(run)!r} is called {name!r}, which is no arch.tag: it cannot be a file's")


def write_run_record(record: Json, file: Path) -> None:
    """Write a `run_record` as it lies in training/records/."""
    write_text(file, json.dumps(record, indent=1) + "\n")


def _read_repeats(folder: Path, name: str) -> Iterator[Repeat]:
    for measured in sorted(folder.glob(f"{name}.seed*.eval.json")):
        run = measured.with_name(measured.name.removesuffix(".eval.json") + ".json")
        yield Repeat(run.name, _read(run), measured.name, _read(measured))


def _check_repeat(repeat: Repeat, run: Json) -> None:
    """Refuse one that is not the run's recipe on the run's images, or whose figures are of other weights."""
    if differences := record_differences(repeat.run, run, free=["seed"]):
        raise UsageError(f"{repeat.file} is no repetition with another seed ({'; '.join(differences)})")
    wanted, found = repeat.record["weights"]["sha256"], repeat.evaluation["encoder"]["weights_sha256"]
    if wanted != found:
        raise UsageError(f"{repeat.evaluation_file} is of other weights (sha256 {found}) than {repeat.file} ({wanted})")


def read_all(folder: Path | None, pattern: str) -> dict[str, Json]:
    """Read the records of a folder, by default those of the package, whose names match a pattern."""
    files = sorted((folder or RECORDS_FOLDER).glob(pattern), key=lambda file: file.stem)
    return {file.name: _read(file) for file in files}


def _read(file: Path) -> Json:
    found = read_json(file, UsageError, "take the record that came with the package")
    if not isinstance(found, dict):
        raise UsageError(f"{str(file)!r} is not a record: it holds no JSON object")
    return found
