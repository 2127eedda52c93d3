"""A run's metrics in other programs: TensorBoard where it is installed, Weights & Biases where it is asked for."""

from __future__ import annotations

import hashlib
import importlib
import logging
import warnings
from pathlib import Path
from typing import Any, Protocol

from micl_zoo.errors import UsageError

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes the lines of metrics.jsonl as they are written."""

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Pass lines on: those of steps, of k-NN and of events."""

    def close(self) -> None:
        """Finish what is still being written."""


def open_trackers(
    run: Path, record: dict[str, Any], first_step: int, *, wandb_project: str | None = None
) -> list[Tracker]:
    """Open the trackers of a run, new or resumed. Steps from `first_step` on replace those that were tracked before.

    TensorBoard's files go to RUN/tensorboard. Weights & Biases sends data away, so it is used only when named; it knows
    a resumed run by the start in its run.json, the `record`.
    """
    trackers: list[Tracker] = [_WandB(run, record, wandb_project)] if wandb_project is not None else []
    writer = _summary_writer(run / "tensorboard", first_step)
    return [*trackers, _TensorBoard(writer)] if writer else trackers


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """Name the numbers of a line as they are tracked: train/loss, knn/NAME, test/top1, ..."""
    measured = next((kind for kind in ("knn", "test") if kind in line), None)
    found = line if measured is None else line[measured]
    named = {f"{measured or 'train'}/{name}": value for name, value in found.items() if name != "step"}
    return {name: value for name, value in named.items() if type(value) in (int, float)}


def wandb_id(record: dict[str, Any]) -> str:
    """Make an id that is the same for every piece of one run, from its start and its recipe's name."""
    return hashlib.sha256(f"{record['started']}{record['recipe']['name']}".encode()).hexdigest()[:16]


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if "event" in line:
                self.writer.add_text("events", f"{line['event']}: {line.get('detail', '')}", line["step"])
                continue
            for name, value in scalars(line).items():
                self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()  # as often as metrics.jsonl, so that a killed run has the same lines in both

    def close(self) -> None:
        self.writer.close()


def _summary_writer(folder: Path, first_step: int) -> Any:
    """A TensorBoard writer, or None where TensorBoard is not installed or does not work."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the deprecations of what TensorBoard imports are not the user's
            from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(str(folder), purge_step=first_step)
    except ImportError:
        return None
    except (AttributeError, TypeError, RuntimeError) as error:  # a protobuf or numpy that does not fit
        log.warning("TensorBoard is installed but does not work, the run goes on without it: %s", error)
        return None


class _WandB:
    def __init__(self, run: Path, record: dict[str, Any], project: str) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError:
            raise UsageError(f"to track this run in the project {project!r}: pip install wandb") from None
        known = {"id": wandb_id(record), "name": run.resolve().name, "config": record["recipe"]}
        self.run = wandb.init(project=project, resume="allow", dir=str(run), **known)
        self.run.define_metric("*", step_metric="step")  # a step that is taken again would not be a next wandb step

    def log(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if numbers := scalars(line):
                self.run.log({"step": line["step"], **numbers})

    def close(self) -> None:
        self.run.finish()
