"""A trained encoder and all that is on record of it, published with the package or in a run's folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from micl_zoo.encoders.hub import not_published
from micl_zoo.encoders.weights import WEIGHTS_FILE, local_weights
from micl_zoo.encoders.zoo import OnnxFile, Record, find_record
from micl_zoo.errors import TrainingError, UsageError
from micl_zoo.files import file_sha256, write_text
from micl_zoo.images.transform import Transform

from ..corpora import CORPORA, Corpus
from ..recipes import Recipe, record_differences, recorded_recipe

RECORDS_FOLDER = Path(__file__).parents[1] / "records"
CURVE_EVERY = 50  # steps between the points of the curve that a record keeps


class Repeat(NamedTuple):
    """The same recipe trained again with another seed, and measured alike.

    Attributes:
        file: of the run's record.
        record: as that of the encoder.
        evaluation_file: of its figures.
        evaluation: record of `micl-zoo eval all`.
    """

    file: str
    record: dict[str, Any]
    evaluation_file: str
    evaluation: dict[str, Any]

    @property
    def run(self) -> dict[str, Any]:
        """What run.json says."""
        run: dict[str, Any] = self.record["run"]
        return run


@dataclass(frozen=True)
class Trained:
    """A trained encoder and all that is on record of it.

    Attributes:
        name: `arch.tag`.
        record: weights (sha256 and bytes), run (run.json), curve, and knn, measured on the way.
        file: of the weights, as the card names it.
        load: the line of Python that loads it, without the hub.
        run_file: the record of its training, as the card names it.
        transform: of its images.
        license: of the weights.
        entry: its row in the table of encoders, of a published one.
        repeats: the recipe trained again with other seeds.
        onnx: the same weights as an ONNX file that is published with them, and onnx_file: where, as the card names it.
        evaluations, finetunings: records of `micl-zoo eval all` and `eval finetune`, by file.
        export, upright: records of benchmarks/export.py and benchmarks/upright.py.
    """

    name: str
    record: dict[str, Any]
    file: str
    load: str
    transform: Transform
    license: str
    run_file: str = "run.json"
    entry: Record | None = None
    repeats: tuple[Repeat, ...] = ()
    onnx: OnnxFile | None = None
    onnx_file: str = ""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    finetunings: dict[str, dict[str, Any]] = field(default_factory=dict)
    export: dict[str, Any] | None = None
    upright: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        measured = {file: one["encoder"]["weights_sha256"] for file, one in self.evaluations.items()}
        measured |= {file: one["encoder"]["encoder_sha256"] for file, one in self.finetunings.items()}
        measured |= {name: one["weights_sha256"] for name in ("export", "upright") if (one := getattr(self, name))}
        for file, sha256 in measured.items():
            if sha256 != self.weights["sha256"]:
                raise UsageError(
                    f"{file} is of other weights (sha256 {sha256}) than {self.name} ({self.weights['sha256']}): "
                    f"measure these, by micl-zoo eval all {self.target} --data SET -o FILE"
                )
        for repeat in self.repeats:
            _check_repeat(repeat, self.run)

    @property
    def weights(self) -> dict[str, Any]:
        """Of the file: sha256 and bytes."""
        weights: dict[str, Any] = self.record["weights"]
        return weights

    @property
    def run(self) -> dict[str, Any]:
        """What run.json says."""
        run: dict[str, Any] = self.record["run"]
        return run

    @property
    def target(self) -> str:
        """What a command names it by."""
        return self.name if self.entry else "RUN"

    @property
    def corpus(self) -> Corpus | None:
        """Of a run on the images that its recipe is for; None where the images are the user's own."""
        corpus = CORPORA.get(self.recipe.corpus)
        return corpus if corpus and corpus.images == self.run["data"]["images"] else None

    @property
    def recipe(self) -> Recipe:
        """Recipe of the run, whichever version wrote it."""
        return recorded_recipe(self.run)

    @property
    def made(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
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


@dataclass(frozen=True)
class Comparison:
    """Records of benchmarks/rivals.py on one question, by file."""

    what: str
    title: str
    records: dict[str, dict[str, Any]]
    about: str = ""

    @property
    def arms(self) -> dict[str, str]:
        """Name and description of every arm."""
        return {name: arm["trained"] for record in self.records.values() for name, arm in record["arms"].items()}


def comparisons(records: Path | None = None) -> list[Comparison]:
    """Read the records in which the same ViT was trained in several ways; none where there are none."""
    folder, base = (
        records or RECORDS_FOLDER,
        "Each arm but `micl-paper` is `micl-ours` with what its line says changed.",
    )
    found = (
        Comparison("other methods", "MiCL beside other methods", _read_all(folder, "rivals*.json")),
        Comparison("one thing changed", "MiCL with one thing changed", _read_all(folder, "ablations*.json"), base),
    )
    return [one for one in found if one.records]


def published(name: str, records: Path | None = None) -> Trained:
    """A published encoder with the records that come with the package.

    Raises:
        UsageError: no such name, no weights, or records of other weights.
    """
    entry, records = find_record(name), records or RECORDS_FOLDER
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
        evaluations=_read_all(records, f"{entry.name}.eval*.json"),
        finetunings=_read_all(records, f"{entry.name}.finetune*.json"),
        export=_read_if_there(records / f"{entry.name}.export.json"),
        upright=_read_if_there(records / f"{entry.name}.upright.json"),
    )


def of_run(run: Path, measured: Sequence[Path] = ()) -> Trained:
    """The encoder of a finished run of one's own.

    Args:
        run: folder that `train` wrote.
        measured: records of `micl-zoo eval all`, and the result.json of `eval finetune`.

    Raises:
        TrainingError: no run, or one that has not come to its end.
        UsageError: records of other weights.
    """
    record, weights = run_record(run), local_weights(run / "encoder")
    found = {str(file): _read(file) for file in measured}
    trained = Trained(
        name=weights.config.name,
        record=record,
        file="encoder/model.safetensors",
        load=f'micl_zoo.load(weights="{run.as_posix()}/encoder")',
        transform=weights.config.transform,
        license=weights.config.license,
        evaluations={file: one for file, one in found.items() if "results" in one},
        finetunings={file: one for file, one in found.items() if "results" not in one},
    )
    if trained.license == "unknown" and trained.corpus:
        return dataclasses.replace(trained, license=trained.corpus.license)
    return trained


def run_record(run: Path) -> dict[str, Any]:
    """What a run is kept by: the weights' sha256 and bytes, run.json, every 50th step of its curve, and its k-NN.

    Raises:
        TrainingError: no run, one that has not come to its end, or one of fine-tuning.
    """
    try:
        made_by = json.loads((run / "run.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        recorded_recipe(made_by)  # of fine-tuning there is no card
    except FileNotFoundError as error:
        raise TrainingError(
            f"no run to describe: {error.filename!r} does not exist. Give the folder that `train --out` wrote."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"run.json or metrics.jsonl in {str(run)!r} is damaged: {error}") from None
    file = run / "encoder" / "model.safetensors"
    if "result" not in made_by or not file.exists():
        raise TrainingError(f"{str(run)!r} has not come to its end: give the command it was started by again, to go on")
    steps = [line for line in lines if "loss" in line]
    kept = steps[::CURVE_EVERY] + ([] if (len(steps) - 1) % CURVE_EVERY == 0 else steps[-1:])
    return {
        "weights": {"sha256": file_sha256(file), "bytes": file.stat().st_size},
        "run": made_by,
        "curve": kept,
        "knn": [line for line in lines if "knn" in line],
    }


def write_run_record(run: Path, file: Path) -> None:
    """Write `run_record` as it lies in training/records/."""
    write_text(file, json.dumps(run_record(run), indent=1) + "\n")


def _read_repeats(folder: Path, name: str) -> Iterator[Repeat]:
    for measured in sorted(folder.glob(f"{name}.seed*.eval.json")):
        run = measured.with_name(measured.name.removesuffix(".eval.json") + ".json")
        yield Repeat(run.name, _read(run), measured.name, _read(measured))


def _check_repeat(repeat: Repeat, run: dict[str, Any]) -> None:
    """It is the run's recipe on the run's images, and the figures are of its weights.

    Raises:
        UsageError: it is not.
    """
    if differences := record_differences(repeat.run, run, free=["seed"]):
        raise UsageError(f"{repeat.file} is no repetition with another seed ({'; '.join(differences)})")
    wanted, found = repeat.record["weights"]["sha256"], repeat.evaluation["encoder"]["weights_sha256"]
    if wanted != found:
        raise UsageError(f"{repeat.evaluation_file} is of other weights (sha256 {found}) than {repeat.file} ({wanted})")


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no such record: {str(file)!r}") from None
    except ValueError as error:
        raise UsageError(f"{str(file)!r} is no record: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{str(file)!r} is no record: it holds no JSON object")
    return found


def _read_if_there(file: Path) -> dict[str, Any] | None:
    return _read(file) if file.exists() else None


def _read_all(folder: Path, pattern: str) -> dict[str, dict[str, Any]]:
    return {file.name: _read(file) for file in sorted(folder.glob(pattern), key=lambda file: file.stem)}
