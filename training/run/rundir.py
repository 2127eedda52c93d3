"""All that a run leaves on disk: run.json, metrics.jsonl, checkpoints, the exported encoder."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from micl_zoo._version import package_versions
from micl_zoo.errors import TrainingError
from micl_zoo.files import FolderLock, atomic_path, file_sha256, open_regular, sum_file, write_text
from micl_zoo.schema import read
from micl_zoo.zoo.weights import (
    CHECKPOINT,
    HEADER_KEY,
    WEIGHTS_FILE,
    EncoderConfig,
    header,
    recipe_config,
    save_weights,
)

from ..recipes import KEPT_CHECKPOINTS, AnyRecipe, Recipe, record_differences
from .provenance import code_commit, machine
from .record import METRICS_FILE, RUN_FILE, CheckpointHeader, checked_run, metric_lines, read_run
from .step import Step

MOMENTS = ("exp_avg", "exp_avg_sq")

log = logging.getLogger(__name__)


class RunDir:
    """The folder of one run."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self.record = path, record  # the content of run.json
        self.keep_steps = 0  # a checkpoint after a multiple of so many steps stays for good; 0 keeps none
        self._writing: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._lock: ExitStack | FolderLock = ExitStack()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._lock, self._writer:  # the lock is let go last
            if kind is None:
                self.finish_writing()

    @classmethod
    def open(cls, path: Path, record: dict[str, Any], *, main: bool = True) -> RunDir:
        """Start a run folder, or go on with the one that is there; a rank that does not write only knows the path."""
        run = cls(path, record)
        if not main:
            return run
        there, damage = run._recorded()
        if there is None:
            if path.exists() and any(not child.name.endswith(".tmp") for child in path.iterdir()):
                raise TrainingError(f"{str(path)!r} exists and is no run folder: give a new or empty one")
        elif differences := record_differences(there, record):
            if run.checkpoints() or (path / METRICS_FILE).exists():
                raise TrainingError(f"{str(path)!r} holds another run: {'; '.join(differences)}. Give another --out.")
            there = None  # it ended before its first step: its data could not be used
        run._lock = FolderLock(path, "training in", TrainingError)
        run.record = record if there is None else there
        if damage:
            log.warning("%s: it is made again from what the newest checkpoint says", damage)
            run.record.setdefault("started", record["started"])
        where = {key: record[key] for key in ("commit", "versions", "machine", "processes")}
        if moved := where != {key: run.record.get(key) for key in where}:
            run.record.setdefault("resumed", []).append({**where, "started": record["started"]})
        if moved or damage or there is None:
            run.save_record()
        return run

    def _recorded(self) -> tuple[dict[str, Any] | None, TrainingError | None]:
        """Read run.json, or what it said from the newest whole checkpoint; and why it had to be that."""
        try:
            return read_run(self.path), None
        except TrainingError as damage:
            files = [file for file in reversed(self.checkpoints().values()) if _damage(file) is None]
            if not files:
                raise
            what = f"the header of {str(files[0])!r}"
            said = checked_run(header(files[0]).get("provenance"), what, "it cannot stand in for run.json: new --out")
            return said, damage

    @property
    def encoder_file(self) -> Path:
        """Weights file of the run once it is finished."""
        return self.path / "encoder" / WEIGHTS_FILE

    @property
    def finished(self) -> bool:
        """Whether the run of pre-training has come to its end."""
        return "result" in self.record and self.encoder_file.exists()

    def save_record(self) -> None:
        """Write run.json."""
        write_text(self.path / RUN_FILE, json.dumps(self.record, indent=2) + "\n")

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Append lines to metrics.jsonl."""
        with (self.path / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be taken again, and damaged ones; a last one may be cut off."""
        file = self.path / METRICS_FILE
        if not file.exists():
            return
        damaged = cut_off = 0
        with atomic_path(file) as temporary, temporary.open("wb") as kept:
            for text, found in metric_lines(file):
                cut_off = found is None or not text.endswith(b"\n")
                damaged += cut_off
                # a step's line has the number of steps before it; k-NN and events have the number of steps taken
                if found is not None and not cut_off and found["step"] < step + ("loss" not in found):
                    kept.write(text)
        if damaged > cut_off:
            log.warning("%s: %d damaged lines are dropped", file, damaged)

    def save_checkpoint(self, step: int, seconds: float, tensors: dict[str, Tensor], config: EncoderConfig) -> None:
        """Write a snapshot after `step` steps, in a thread of its own, while the training goes on.

        Beside each checkpoint stands its sha256, as `sha256sum -c` reads it. The last two stay, and those after a
        multiple of `keep_steps`. The header says how to build the encoder, so that the file loads by itself.
        """
        self.finish_writing()
        size, free = sum(value.nbytes for value in tensors.values()), shutil.disk_usage(self.path).free
        if free < size:
            raise _disk_full(self.path, f"a checkpoint takes {size / 2**20:,.0f} MiB, {free / 2**20:,.0f} are free")
        entry = json.dumps({"config": config.to_dict(), "provenance": self.provenance()})
        header = {"format": "pt", "step": str(step), "seconds": repr(seconds), HEADER_KEY: entry}
        self._writing = self._writer.submit(self._write_checkpoint, step, tensors, header)

    def finish_writing(self) -> None:
        """Wait for the checkpoint that is being written."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
                raise _disk_full(self.path, "no space left while a checkpoint was written") from None
            raise TrainingError(f"a checkpoint in {str(self.path)!r} could not be written: {error}") from None

    def _write_checkpoint(self, step: int, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        file = self.checkpoint(step)
        with atomic_path(file) as temporary:
            save_file(tensors, temporary, header)
            write_text(sum_file(file), f"{file_sha256(temporary)}  {file.name}\n")  # first, so that none is without
        files = self.checkpoints().items()
        passing = [old for at, old in files if not (self.keep_steps and at and at % self.keep_steps == 0)]
        for old in passing[:-KEPT_CHECKPOINTS]:
            old.unlink()
            sum_file(old).unlink(missing_ok=True)

    def checkpoint(self, step: int) -> Path:
        """Name the checkpoint after so many steps."""
        return self.path / "checkpoints" / f"step-{step:08d}.safetensors"

    def checkpoints(self) -> dict[int, Path]:
        """List the checkpoints by their steps, oldest first."""
        files = {int(name[1]): self.checkpoint(int(name[1])) for name in self._names() if name}
        return dict(sorted(files.items()))

    def _names(self) -> list[re.Match[str] | None]:
        folder = self.path / "checkpoints"
        return [CHECKPOINT.fullmatch(file.name) for file in folder.glob("step-*.safetensors")]

    def newest_whole(self) -> int | None:
        """Find the steps of the newest checkpoint whose bytes are those that were written; None without a checkpoint.

        A damaged one is renamed to `.damaged`, with a warning.
        """
        self.finish_writing()
        if strange := self._names().count(None):
            log.warning("%d files in checkpoints/ have no name of a checkpoint and are left alone", strange)
        files = self.checkpoints()
        for step, file in reversed(files.items()):
            if (damage := _damage(file)) is None:
                return step
            file.replace(file.with_name(f"{file.name}.damaged"))
            log.warning("%s is damaged (%s): going on from the checkpoint before", file.name, damage)
        if files:
            where = str(self.path / "checkpoints")
            raise TrainingError(f"every checkpoint in {where!r} is damaged: nothing to go on from. Use a new --out.")
        return None

    def save_encoder(
        self, state: dict[str, Tensor], config: EncoderConfig, dtype: Literal["float32", "float16"]
    ) -> Path:
        """Write `encoder/`, which `micl_zoo.load(weights=…)` and timm's hub loader take; returns the weights file."""
        return save_weights(self.path / "encoder", state, config, self.provenance(), dtype)

    def provenance(self) -> dict[str, Any]:
        """Gather what a file of weights says of where it comes from.

        Times and interruptions are left out: two runs that compute the same numbers write the same bytes.
        """
        keys = ("recipe", "command", "commit", "versions", "machine", "encoder")
        found = {key: self.record[key] for key in keys if key in self.record}
        return found | {"data": {key: value for key, value in self.record["data"].items() if key != "refused"}}


# torch.distributed.checkpoint.state_dict was tried in the place of `snapshot` and `restore`. To read the state of an
# optimizer that has taken no step it takes an empty one, and leaves its step count at 1: the numbers of the run change.
# On the host it hands out the tensors themselves, which a thread cannot write while the training goes on.
def snapshot(step: Step, *, moments: bool = True) -> dict[str, Tensor]:
    """Copy whole tensors to the host: weights `model.*`, their running means `ema.*`, moments `exp_avg(_sq).*`.

    Where each process has a part of them, all must call this together; the rank that writes gets the tensors.
    """
    tensors = {f"{prefix}.{name}": value for prefix, name, value in _weights(step)}
    for name, parameter in step.vit.named_parameters() if moments else ():
        if state := step.optimizer.state.get(parameter):
            tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS}
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if step.ranks.main:
            found[name] = whole.detach().to("cpu", copy=True).contiguous()
    return found


def restore(file: Path, step: Step) -> tuple[int, float]:
    """Put a checkpoint back in place, of any number of processes; the steps taken and seconds spent so far."""
    with safe_open(file, framework="pt") as opened:  # on the host: no card has room for two
        said = _checkpoint_header(opened.metadata(), file)
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    steps = said.step
    _check_tensors(file, tensors, step, steps)
    with torch.no_grad():
        for prefix, name, value in _weights(step):
            value.copy_(_like(value, tensors[f"{prefix}.{name}"]))
    step.optimizer.state.clear()
    for name, parameter in step.vit.named_parameters():
        if f"{MOMENTS[0]}.{name}" in tensors:
            moments = {moment: _like(parameter, tensors[f"{moment}.{name}"]).clone() for moment in MOMENTS}
            step.optimizer.state[parameter] = {"step": torch.tensor(float(steps), device=parameter.device), **moments}
    return steps, said.seconds


def _check_tensors(file: Path, tensors: Mapping[str, Tensor], step: Step, steps: int) -> None:
    """Refuse a checkpoint of another network: each weight has its place, and the moments after the first step."""
    wanted = {f"{prefix}.{name}": value for prefix, name, value in _weights(step)}
    for name, parameter in step.vit.named_parameters():
        if parameter.requires_grad and steps:
            wanted |= {f"{moment}.{name}": parameter for moment in MOMENTS}
    fits = {name: name in tensors and _kind(tensors[name]) == _kind(value) for name, value in wanted.items()}
    if strange := [name for name, right in fits.items() if not right]:
        found = _kind(tensors[strange[0]]) if strange[0] in tensors else "not there"
        raise TrainingError(
            f"{str(file)!r} is no checkpoint of this run: {strange[0]} must be {_kind(wanted[strange[0]])}, it is "
            f"{found}. Remove that file to go on from the one before, or give a new --out"
        )


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def _checkpoint_header(found: Mapping[str, str] | None, file: Path) -> CheckpointHeader:
    """Read the header, whose values are texts."""
    try:
        numbers = {name: json.loads(text) for name, text in (found or {}).items() if name in ("step", "seconds")}
    except (ValueError, RecursionError):
        numbers = {}
    said = read(CheckpointHeader, numbers, f"the header of {str(file)!r}", TrainingError)
    if file.name != f"step-{said.step:08d}.safetensors":
        raise TrainingError(f"the header of {str(file)!r} is damaged: it is of step {said.step}")
    return said


def _weights(step: Step) -> list[tuple[str, str, Tensor]]:
    """List what a checkpoint holds of the weights: (model or ema, name, tensor)."""
    modules = {"model": step.vit} | ({"ema": step.ema.module} if step.ema else {})
    return [(prefix, name, value) for prefix, module in modules.items() for name, value in module.state_dict().items()]


def _like(there: Tensor, value: Tensor) -> Tensor:
    """On the device of `there`, and cut among the processes as it is."""
    value = value.to(there.device)
    return distribute_tensor(value, there.device_mesh, there.placements) if isinstance(there, DTensor) else value


def _damage(file: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        with open_regular(sum_file(file)) as beside:
            wanted = beside.read(64)
        if file_sha256(file).encode() != wanted:
            return "its bytes do not have the sha256 that was written beside it"
        with safe_open(file, framework="pt") as opened:
            _checkpoint_header(opened.metadata(), file)
    except (OSError, SafetensorError, TrainingError) as error:
        return str(error)
    return None


def _disk_full(path: Path, detail: str) -> TrainingError:
    return TrainingError(
        f"the disk of {str(path)!r} is full ({detail}): stopped. The checkpoints that are there are whole: "
        "make room and run the same command to go on"
    )


def encoder_config(recipe: Recipe) -> EncoderConfig:
    """Return how to build what a recipe trains."""
    return recipe_config(vars(recipe))


def command_text(
    words: Sequence[str], options: Iterable[tuple[str, str]], overrides: Iterable[str], smoke: bool
) -> str:
    """Write the command that makes a run."""
    options = [*options, *(("--set", change) for change in overrides)]
    return " ".join([*words, *["--smoke"] * smoke, *(f"{option} {shlex.quote(value)}" for option, value in options)])


def run_record(
    recipe: AnyRecipe, data: dict[str, Any], command: str, device: torch.device, processes: int = 1
) -> dict[str, Any]:
    """Write what run.json says before the first step."""
    return {
        "recipe": dataclasses.asdict(recipe),
        "data": data,
        "command": command,
        "commit": code_commit(),
        "versions": package_versions(),
        "machine": machine(device),
        "processes": processes,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
