"""Publishes a finished run on the Hugging Face hub: builds the folder, loads it back, compares, sends one commit."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from micl_zoo.encoders.load import load
from micl_zoo.errors import ExportError, UsageError, WeightsError
from micl_zoo.files import atomic_folder, file_sha256, write_text
from micl_zoo.printing import json_line
from micl_zoo.zoo.ours import RECORDS, OnnxFile, Record
from micl_zoo.zoo.pools import Pool
from micl_zoo.zoo.weights import CONFIG_FILE, ONNX_FILE, WEIGHTS_FILE, config_text, local_weights

from ..evaluation.tables import merge
from ..run.record import METRICS_FILE, RUN_FILE, metric_lines
from .card import one_card
from .trained import Trained, of_run, write_run_record

CARD_FILE, DRIFT_FILE, RECORDS_FOLDER = "README.md", "model.json", "records"
FILES = {CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, ONNX_FILE, DRIFT_FILE}  # beside the records, all that may go up
NO_COMMIT = "<commit>"  # in the row, before there is one
TIMM_TOLERANCE = 1e-5  # the same network in float32
ONNX_DIFFERENCE, ONNX_COSINE = 1e-4, 0.99999  # of embeddings of unit length, as `micl-zoo export` holds fp32 to
LOCAL_TIMM = (1, 0, 26)  # reads safetensors in a local folder from here on
REPO = re.compile(r"(?:[A-Za-z0-9_]+[-.])*[A-Za-z0-9_]+/(?:[A-Za-z0-9_]+[-.])*[A-Za-z0-9_]+")
TOKENS = "https://huggingface.co/settings/tokens"
LONGEST_REPO = 96  # characters, on the hub
WIDTH = 100  # of a line of the row, with its indent

Export = Callable[..., object]  # of `micl_zoo.export.to_onnx` weights= and out=


@dataclass(frozen=True)
class LoadedBack:
    """What loading the folder again gave."""

    images: int  # number of images embedded
    timm: float  # largest difference of a number between timm and micl_zoo
    onnx: float | None  # the same between ONNX Runtime and micl_zoo, at unit length; None without an ONNX file

    def text(self) -> str:
        """One line for a person."""
        others = "" if self.onnx is None else f", and ONNX Runtime to {self.onnx:.1g}"
        return f"timm and micl_zoo give the same embeddings of {self.images} images to {self.timm:.1g}{others}"


@dataclass(frozen=True)
class Publication:
    """What was built, and sent."""

    repo: str  # OWNER/NAME on the hub
    folder: Path  # local folder with what is in the repository
    files: dict[str, int]  # sizes in bytes by name
    loaded_back: LoadedBack  # see `LoadedBack`
    record: Record  # row for the table of encoders
    url: str  # address of the commit, or of the repository where nothing was sent
    commit: str | None  # all 40 digits; None where nothing was sent

    @property
    def row(self) -> str:
        """Row for the table in micl_zoo/zoo/ours.py."""
        return row_text(self.record)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        record = self.record.to_dict()
        return {**dataclasses.asdict(self), "folder": str(self.folder), "record": record, "row": self.row}


def publish(
    run: str | os.PathLike[str],
    repo: str,
    *,
    export: Export | None,
    measured: Sequence[Path] = (),
    out: str | os.PathLike[str] | None = None,
    private: bool = False,
    message: str | None = None,
    dry_run: bool = False,
) -> Publication:
    """Build the hub's folder of a finished run, load it back, and send it to the hub in one commit.

    Args:
        run: folder that `train` wrote.
        repo: OWNER/NAME on the hub, made if missing.
        export: `micl_zoo.export.to_onnx`; None leaves the ONNX file out.
        measured: records of `micl-zoo eval all`, and the result.json of `eval finetune`.
        out: folder to build, by default RUN/hub; an older one is replaced when the new one is whole.
        private: make the repository private; an existing one stays as it is.
        message: commit message.
        dry_run: build and check, but send nothing; needs neither a token nor a network.

    Raises:
        TrainingError: no run, or one that is not finished.
        UsageError: an impossible repository name, a smoke twin, records of other weights, or no token.
        ExportError: what was loaded back does not embed as the encoder does; nothing is sent, an older folder stays.
        WeightsError: the hub refused it or was not reached; the folder stays.
    """
    run, folder = Path(run), Path(out or Path(run) / "hub")
    _check_repo(repo)
    trained = of_run(run, measured)
    if not dry_run:
        _check_sending(trained, repo)
    _check_folder(folder)
    with atomic_folder(folder) as temporary:
        onnx = _build(trained, run, temporary, export, repo)
        loaded_back = check(temporary, trained.weights["sha256"])
        record = make_record(trained, repo, onnx)
    files = {name: (folder / name).stat().st_size for name in _names(folder)}
    from huggingface_hub import constants

    url, commit = f"{constants.ENDPOINT}/{repo}", None
    if not dry_run:
        url, commit = send(folder, repo, private=private, message=message or f"Publish {trained.name}")
    record = dataclasses.replace(record, hub_commit=commit or NO_COMMIT)
    return Publication(repo, folder, files, loaded_back, record, url, commit)


# Before anything is done.


def _check_repo(repo: str) -> None:
    if not REPO.fullmatch(repo) or len(repo) > LONGEST_REPO or repo.endswith(".git"):
        raise UsageError(f"{repo!r} is no repository of the hub: give OWNER/NAME, as in --repo my-lab/vit_ti16-mine")


def _check_sending(trained: Trained, repo: str) -> None:
    from huggingface_hub import get_token

    if trained.name.endswith(".smoke"):
        raise UsageError(
            f"{trained.name} is a smoke-test recipe; its weights are not meant for publication. Train the recipe "
            "itself, or see what would go up with --dry-run"
        )
    if get_token() is None:
        raise UsageError(
            f"there is no token for the hub: make one that may write to {repo.partition('/')[0]} ({TOKENS}) and give "
            "it to `hf auth login`, or set HF_TOKEN; --dry-run needs none"
        )


def _check_folder(folder: Path) -> None:
    """Only what an earlier call built may be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    there = {child.name for child in folder.iterdir()} if folder.is_dir() else set()
    if not {CARD_FILE, RECORDS_FOLDER} <= there or there - {*FILES, RECORDS_FOLDER}:
        raise UsageError(f"{str(folder)!r} exists and was not built by publish: give a new or empty folder by --out")


# The folder.


def _build(trained: Trained, run: Path, folder: Path, export: Export | None, repo: str) -> OnnxFile | None:
    """Write weights as they are, their config as it was checked, the ONNX file, the records, and a card of all that."""
    weights = local_weights(run / "encoder" / WEIGHTS_FILE)  # timm would follow another config.json anywhere
    shutil.copyfile(weights.path, folder / WEIGHTS_FILE)
    write_text(folder / CONFIG_FILE, config_text(weights.config.to_dict()))
    if export is not None:
        try:
            export(weights=folder, out=folder)
        except UsageError as error:  # what it needs is not installed
            raise UsageError(f"{error}; or leave the ONNX file out by --no-onnx") from None
    records = folder / RECORDS_FOLDER
    records.mkdir()
    shutil.copyfile(run / RUN_FILE, records / RUN_FILE)
    with (records / METRICS_FILE).open("wb") as kept:
        kept.writelines(line.text for line in metric_lines(run / METRICS_FILE) if line.found)
    write_run_record(trained.record, records / f"{trained.name}.json")
    onnx = _onnx_file(folder)
    shown = dataclasses.replace(
        trained,
        run_file=f"{RECORDS_FOLDER}/{RUN_FILE}",
        onnx=onnx,
        onnx_file=onnx.file if onnx else "",
        evaluations=_keep(trained.evaluations, f"{trained.name}.eval", records),
        finetunings=_keep(trained.finetunings, f"{trained.name}.finetune", records),
    )
    write_text(folder / CARD_FILE, one_card(shown, hub=True, repo=repo))
    return onnx


def _keep(measured: Mapping[str, dict[str, Any]], stem: str, records: Path) -> dict[str, dict[str, Any]]:
    """Copy records to where they get names as in training/records/; the records by their new names."""
    kept = {}
    for number, (file, record) in enumerate(measured.items(), start=1):
        name = f"{stem}{f'-{number}' if number > 1 else ''}.json"
        shutil.copyfile(file, records / name)
        kept[f"{RECORDS_FOLDER}/{name}"] = record
    return kept


def _names(folder: Path) -> list[str]:
    """List every file of the folder by its name in the repository."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    assert all(name in FILES or name.startswith(f"{RECORDS_FOLDER}/") for name in names), names
    return names


def _onnx_file(folder: Path) -> OnnxFile | None:
    file = folder / ONNX_FILE
    return OnnxFile(ONNX_FILE, "fp32", file_sha256(file), file.stat().st_size) if file.exists() else None


# Loaded back.


def check(folder: Path, sha256: str) -> LoadedBack:
    """Load a hub folder, whose weights should have a checksum, in every way that people will, and compare."""
    encoder, images = load(weights=folder, device="cpu"), _pictures()
    if encoder.weights_sha256 != sha256:
        raise ExportError(f"the copy in {str(folder)!r} has sha256 {encoder.weights_sha256}, expected {sha256}")
    timms: Pool = "projection" if "projection" in encoder.pools else "native"
    rows = encoder.embed(images, normalize=False, pool=timms)
    differences = np.abs(rows - _by_timm(folder, images))
    if not (differences <= TIMM_TOLERANCE * (1 + np.abs(rows))).all():  # also where it is NaN
        raise ExportError(
            f"timm embeds otherwise than micl_zoo from the same files of {encoder.name}: a difference of "
            f"{differences.max():.2e}, where {TIMM_TOLERANCE:.0e} is allowed. Nothing was sent. Try another timm; here "
            f"is {timm.__version__}"
        )
    onnx = _onnx_difference(folder, images, encoder.embed(images)) if (folder / ONNX_FILE).exists() else None
    return LoadedBack(len(images), float(differences.max()), onnx)


def _by_timm(folder: Path, images: Sequence[Image.Image]) -> np.ndarray:
    """Embed by timm alone, with the transform that it reads from config.json: (images, D)."""
    if tuple(map(int, re.findall(r"\d+", timm.__version__)[:3])) < LOCAL_TIMM:
        wanted = ".".join(map(str, LOCAL_TIMM))
        raise UsageError(f"to load the folder back takes timm {wanted} or newer, here is {timm.__version__}: update it")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        rows: np.ndarray = model(torch.stack([transform(image) for image in images])).numpy()
    return rows


def _onnx_difference(folder: Path, images: Sequence[Image.Image], rows: np.ndarray) -> float:
    """Find the largest difference of embeddings of unit length (images, D)."""
    found = load(weights=folder, backend="onnx", device="cpu").embed(images)
    difference, cosine = float(np.abs(rows - found).max()), float((rows * found).sum(1).min())
    if not (difference <= ONNX_DIFFERENCE and cosine >= ONNX_COSINE):
        raise ExportError(
            f"{ONNX_FILE} embeds otherwise than micl_zoo: a difference of {difference:.2e}, where "
            f"{ONNX_DIFFERENCE:.0e} is allowed, and a cosine of {cosine:.6f}, where {ONNX_COSINE} is the least. "
            "Nothing was sent. Another version of torch or onnxruntime may do better, or leave it out by --no-onnx"
        )
    return difference


def _pictures() -> list[Image.Image]:
    """Make smooth fields of colours in several sizes, the same at every call."""
    random = np.random.default_rng(0)
    coarse = [Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)) for _ in range(4)]
    sizes = ((320, 240), (240, 320), (256, 256), (500, 333))
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(coarse, sizes, strict=True)]


# To the hub.


def send(folder: Path, repo: str, *, private: bool, message: str) -> tuple[str, str]:
    """Make the repository where there is none, and commit the folder to it, once.

    Files that an earlier call sent and this one does not are deleted by the same commit; others in the repository stay.
    Returns the commit's URL and its 40 digits; those of the last one where nothing has changed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, names = HfApi(), _names(folder)
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        gone = set(api.list_repo_files(repo)) - set(names)
        # these would contradict other weights
        stale = sorted(one for one in gone if one in (ONNX_FILE, DRIFT_FILE) or one.startswith(f"{RECORDS_FOLDER}/"))
        add, delete = [CommitOperationAdd(name, folder / name) for name in names], map(CommitOperationDelete, stale)
        made = api.create_commit(repo, [*add, *delete], commit_message=message)  # upload_folder may make several
    except Exception as error:  # huggingface-hub raises its own, httpx's, requests' and OSError
        stays = f"What was built stays in {folder}; the same command tries again."
        raise WeightsError(f"{_refusal(error, repo)}. Nothing was published. {stays}") from error
    assert re.fullmatch("[0-9a-f]{40}", made.oid), made.oid
    return made.commit_url, made.oid


def _refusal(error: Exception, repo: str) -> str:
    """Say why the hub refused, or was not reached."""
    from huggingface_hub import constants

    owner, chain = repo.partition("/")[0], list[BaseException]([error])
    while cause := chain[-1].__cause__:  # the library says "error while uploading", and why in its cause
        chain.append(cause)
    answered = next((one for one in chain if getattr(one, "response", None) is not None), None)
    status = getattr(getattr(answered, "response", None), "status_code", None)
    if status == 401:
        return f"the hub does not know the token: make a new one ({TOKENS}) and give it to `hf auth login` or HF_TOKEN"
    if status == 403:
        return f"the token may not write to {repo}: take one with write access to {owner} ({TOKENS}), or another --repo"
    said = " ".join(str(answered or chain[-1]).split()).rstrip(".") or type(chain[-1]).__name__
    if status is not None:
        return f"the hub refused {repo} with status {status}: {said}"
    return f"{repo} could not be sent to {constants.ENDPOINT}: {said}. Is there a network? HF_ENDPOINT names the hub"


# The row of the table.


def make_record(trained: Trained, repo: str, onnx: OnnxFile | None) -> Record:
    """Make the row for the table of encoders, before there is a commit."""
    there, data = RECORDS.get(trained.name), trained.run["data"]
    summary = f"ViT, {trained.parameters[0] / 1e6:.1f} M parameters, trained on {data['images']:,} images"
    figures = merge(trained.evaluations)["results"].get(trained.name, {})
    return Record(
        name=trained.name, summary=there.summary if there else summary, recipe=trained.recipe.name,
        corpus=trained.recipe.corpus if trained.corpus else f"{data['images']:,} images of one's own",
        license=trained.license, transform=trained.transform, hub_repo=repo, hub_commit=NO_COMMIT,
        sha256=trained.weights["sha256"], bytes=trained.weights["bytes"], onnx=onnx,
        training_record=f"{trained.name}.json",
        metrics={name: of["knn"]["20"]["accuracy"] for name, of in figures.items() if "20" in of.get("knn", {})},
    )  # fmt: skip


def row_text(record: Record) -> str:
    """Write a record as source text for micl_zoo/zoo/ours.py."""
    return f"    {_source(record, 4)},"


def _source(value: object, indent: int) -> str:
    """Write a value as source text, without defaults."""
    if isinstance(value, str):
        return json_line(value)
    if isinstance(value, Mapping):
        return _bracketed("{", [f"{json.dumps(key)}: {one!r}" for key, one in value.items()], "}", indent)
    if not dataclasses.is_dataclass(value):
        return repr(value)
    given = [
        f"{one.name}={_source(getattr(value, one.name), indent + 4)}"
        for one in dataclasses.fields(value)
        if one.default_factory is dataclasses.MISSING or getattr(value, one.name) != one.default_factory()
        if getattr(value, one.name) != one.default
    ]
    return _bracketed(f"{type(value).__name__}(", given, ")", indent)


def _bracketed(start: str, parts: Sequence[str], end: str, indent: int) -> str:
    line = start + ", ".join(parts) + end
    if indent + len(line) <= WIDTH and "\n" not in line:
        return line
    return "\n".join([start, *(f"{' ' * (indent + 4)}{part}," for part in parts), " " * indent + end])
