"""The loop around the steps of a run, the same for pre-training and fine-tuning: log, save, stop, go back, go on."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from micl_zoo.encoders.weights import EncoderConfig
from micl_zoo.errors import Interrupted, TrainingError
from micl_zoo.files import write_text
from micl_zoo.progress import progress
from micl_zoo.stop import StopRequest

from ..recipes import AnyRecipe
from .optim import learning_rate, set_learning_rate
from .order import RefusedImage
from .ranks import Ranks
from .rundir import RunDir, restore, snapshot
from .step import Step
from .trackers import Tracker, open_trackers

log = logging.getLogger(__name__)

FLUSH_STEPS, FLUSH_SECONDS = 10, 5.0  # numbers are fetched from the device, checked and written at the first of the two
T = TypeVar("T")
Batch = TypeVar("Batch")
Made = TypeVar("Made")
Line = dict[str, Any]  # of metrics.jsonl


@dataclass(kw_only=True)
class Loop(ABC, Generic[Batch, Made]):
    """Everything that stays while the steps go by, as one rank of any number sees it.

    Attributes:
        step: takes the steps; its recipe and ranks are the loop's.
        folder: folder of the run.
        stop: whether somebody asked to stop.
        steps_per_epoch: whole batches of the data.
        config: how to build the encoder in the checkpoints.
        knn_minutes: minutes between measurements that go by the clock.
        clock: tells what is due.
        trackers: where the lines of metrics.jsonl go besides.
        told: how many of the refused images the other ranks know of.
        logged: names of the numbers that `take` returns, the loss first.
    """

    step: Step
    folder: RunDir
    stop: StopRequest
    steps_per_epoch: int
    config: EncoderConfig
    knn_minutes: float = math.inf
    recipe: AnyRecipe = field(init=False)
    ranks: Ranks = field(init=False)
    clock: Clock = field(init=False)
    total_steps: int = field(init=False)
    trackers: list[Tracker] = field(default_factory=list)
    told: int = 0
    logged: ClassVar[tuple[str, ...]] = ("loss",)

    def __post_init__(self) -> None:
        self.recipe, self.ranks = self.step.recipe, self.step.ranks
        self.clock = Clock(self.recipe.checkpoint_minutes, self.knn_minutes)
        self.total_steps = self.recipe.total_steps(self.steps_per_epoch)
        self.folder.keep_steps = round(self.recipe.keep_epochs * self.steps_per_epoch)

    @abstractmethod
    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield this rank's shares of the batches number first_step to last_step - 1."""

    @abstractmethod
    def take(self, batch: Batch) -> Tensor:
        """Take one optimiser step: the numbers of `logged`, float32, on the device."""

    @abstractmethod
    def batch_ids(self, step: int) -> list[str]:
        """Name the images of a batch."""

    @abstractmethod
    def finish(self) -> Made:
        """Write what a run leaves at its end."""

    @property
    @abstractmethod
    def refused(self) -> list[RefusedImage]:
        """Images that this rank could not decode so far."""

    def checked(self, lines: list[Line]) -> None:
        """Raise when the newest lines say that to go on makes no sense."""

    def measure_due(self, steps: int) -> bool:
        """Tell whether to measure after so many steps; all ranks do when one of them says so."""
        return False

    def measure(self, steps: int) -> None:
        """Measure what the weights are worth, on all ranks together."""

    def run(self, max_steps: int | None, wandb: str | None = None) -> Made | None:
        """Train from the newest checkpoint to the end, and finish; None where `max_steps` came first."""
        first_step, last_step = self.resume(), min(self.total_steps, max_steps or self.total_steps)
        if self.ranks.main:
            self.trackers = open_trackers(self.folder.path, self.folder.record, first_step, wandb_project=wandb)
        if first_step:
            self.note(first_step, "resumed", f"on {self.ranks.world} process{'es' * (self.ranks.world > 1)}")
        for tried_before in (False, True):
            try:
                self.train(first_step, last_step)
                break
            except _NotFinite as found:
                first_step = self.roll_back(found, tried_before)
        made = self.finish() if last_step == self.total_steps else None
        self.close()
        return made

    def train(self, first_step: int, last_step: int) -> None:
        """Take the steps number first_step to last_step - 1."""
        clock, pending = self.clock, list[_Taken]()
        batches = iter(self.batches(first_step, last_step))
        with progress(self.recipe.name, last_step, done=first_step, unit="steps", show=self.ranks.main) as tick:
            for number in range(first_step, last_step):
                batch, steps = clock.waiting(lambda: next(batches)), number + 1
                lr = learning_rate(self.recipe, number, self.total_steps)
                set_learning_rate(self.step.optimizer, lr)
                pending.append(_Taken(number, lr, self.take(batch)))

                due = (clock.save_due(), clock.flush_due(), self.measure_due(steps))
                stopping, save, flush, measure = self.ranks.any(self.stop.asked or self.ranks.orphaned, *due)
                save |= steps == last_step or stopping
                save |= self.folder.keep_steps > 0 and steps % self.folder.keep_steps == 0
                if save or flush or measure or len(pending) == FLUSH_STEPS:
                    lines = self._flush(pending)
                    note = "".join(f"{name} {lines[-1][name]:.3f}  " for name in self.logged)
                    tick(len(lines), note + f"{lines[-1]['images_per_second']:,.0f} images/s")
                    pending.clear()
                if measure:
                    self.measure(steps)
                if save:
                    self._save(steps)
                if stopping:
                    self._leave(steps)
        self.folder.finish_writing()

    def resume(self) -> int:
        """Load the newest whole checkpoint, or write the one before the first step; the next step's number."""
        file = self.ranks.first(self.folder.newest_whole() if self.ranks.main else None)
        if file is None:
            self._save(0)
            return 0
        step, self.clock.before = restore(file, self.step)
        if self.ranks.main:
            self.folder.forget_after(step)
        return step

    def roll_back(self, found: _NotFinite, tried_before: bool) -> int:
        """Keep the batch's ids and go back to the last checkpoint, once; stop the second time."""
        step, file = found.step, self.folder.path / f"nonfinite-step-{found.step:08d}.json"
        if self.ranks.main:
            ids = self.batch_ids(step)
            write_text(file, json.dumps({"step": step, "what": found.what, "ids": ids}, indent=1) + "\n")
        if tried_before:
            raise TrainingError(
                f"{found.what} at step {step}, and it was not the first time: stopped. Checkpoints are only written of "
                f"finite numbers; the ids of the batch are in {str(file)!r}. Look at its images, or try "
                f"--set base_lr={self.recipe.base_lr / 2:g} or --set precision=fp32 in a new --out."
            )
        if self.ranks.main:
            log.warning("%s at step %d: back to the last checkpoint, once. Its ids: %s", found.what, step, file)
        self.step.optimizer.zero_grad(set_to_none=True)
        first_step = self.resume()
        self.note(first_step, "rolled back", f"{found.what} at step {step}")
        return first_step

    def note(self, step: int, event: str, detail: str) -> None:
        """Write a line of metrics.jsonl that is no step's."""
        self.log([{"step": step, "event": event, "detail": detail}])

    def log(self, lines: list[Line]) -> None:
        """Write lines of metrics.jsonl, on the rank that writes."""
        if self.ranks.main:
            self.folder.log(lines)
            for tracker in self.trackers:
                tracker.log(lines)

    def measured(self, steps: int, kind: str, found: dict[str, Any]) -> None:
        """Write the line of a measurement, whose time is no step's."""
        seconds = round(self.clock.seconds(), 1)
        self.log([{"step": steps, "epoch": self.epoch(steps), kind: found, "seconds": seconds}])
        self.clock.measured()

    def snapshot(self) -> dict[str, Tensor]:
        """Copy the weights, see `rundir.snapshot`; all ranks call it, and the one that writes gets them."""
        return snapshot(self.step, moments=False)

    def epoch(self, steps: int) -> float:
        """Count the passes over the data that so many steps are."""
        return round(steps / self.steps_per_epoch, 4)

    def totals(self) -> dict[str, Any]:
        """Sum up a finished run for its record."""
        return {
            "steps": self.total_steps,
            "images_seen": self.total_steps * self.recipe.batch_size,
            "hours": round(self.clock.seconds() / 3600, 3),
            "precision": self.step.precision,
        }

    def close(self) -> None:
        """Finish what the trackers still write."""
        for tracker in self.trackers:
            tracker.close()

    def _flush(self, pending: list[_Taken]) -> list[Line]:
        """Fetch the numbers, agree on them, check and write them."""
        new, self.told = self.refused[self.told :], len(self.refused)
        mine = torch.stack([taken.numbers for taken in pending]).tolist()
        told = self.ranks.gather((mine, new, self.clock.lap(), _weights_finite(self.step.vit)))
        self._refuse([list(image) for _, refused, *_ in told for image in refused])
        seconds, wait = told[0][2]
        every = torch.tensor([numbers for numbers, *_ in told], dtype=torch.float64)  # (ranks, steps, numbers)
        shared = {
            "images_per_second": round(len(pending) * self.recipe.batch_size / seconds, 1),
            "data_wait": round(wait / seconds, 4),
            "seconds": round(self.clock.seconds(), 1),
        }
        lines = []
        for taken, numbers in zip(pending, every.mean(0).tolist(), strict=True):
            if not math.isfinite(numbers[0]):
                raise _NotFinite(f"the loss is {numbers[0]}", taken.step)
            named = dict(zip(self.logged, numbers, strict=True))
            lines.append({"step": taken.step, "epoch": self.epoch(taken.step), **named, "lr": taken.lr, **shared})
        if not all(finite for *_, finite in told):
            raise _NotFinite("a weight is not finite", pending[-1].step)
        self.log(lines)
        self.checked(lines)
        return lines

    def _save(self, steps: int) -> None:
        tensors = snapshot(self.step)
        self.clock.saved()
        if self.ranks.main:
            self.folder.save_checkpoint(steps, self.clock.seconds(), tensors, self.config)

    def _leave(self, steps: int) -> None:
        self.folder.finish_writing()
        self.close()
        number = self.stop.signal or signal.SIGTERM
        text = (
            f"stopped by {signal.Signals(number).name} after step {steps}, with a checkpoint. The same command goes on "
        )
        stopped = Interrupted(f"{text}from there.", signal=number)
        if not self.ranks.main:
            raise SystemExit(stopped.exit_code)  # one of them says it
        raise stopped

    def _refuse(self, images: list[list[str]]) -> None:
        """Say which images cannot be decoded, and keep them in run.json."""
        refused = self.folder.record["data"].setdefault("refused", [])
        new = [image for place, image in enumerate(images) if image not in refused and image not in images[:place]]
        if new and self.ranks.main:
            for image in new:
                log.warning("%s is left out: %s, %s", *image)
            refused += new
            self.folder.save_record()


@dataclass(frozen=True)
class _Taken:
    """A step whose numbers are still on the device."""

    step: int
    lr: float
    numbers: Tensor


class _NotFinite(Exception):
    """Raised alike on every rank."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what)
        self.what, self.step = what, step


class Clock:
    """Seconds of training, earlier pieces of the run included, and what is due."""

    def __init__(self, checkpoint_minutes: float, knn_minutes: float) -> None:
        self.start = self.last_lap = self.last_save = self.last_knn = time.monotonic()
        self.before = self.waited = 0.0
        self.save_every, self.knn_every = 60 * checkpoint_minutes, 60 * knn_minutes

    def seconds(self) -> float:
        """Count the seconds of the whole run."""
        return self.before + time.monotonic() - self.start

    def waiting(self, what: Callable[[], T]) -> T:
        """Do what is waited for, and count the time."""
        start = time.monotonic()
        found = what()
        self.waited += time.monotonic() - start
        return found

    def lap(self) -> tuple[float, float]:
        """Count the seconds since the last lap, and those of them spent waiting for data."""
        now = time.monotonic()
        lap, waited = max(now - self.last_lap, 1e-9), self.waited
        self.last_lap, self.waited = now, 0.0
        return lap, min(waited, lap)

    def flush_due(self) -> bool:
        """Tell whether it is time to show something."""
        return time.monotonic() - self.last_lap >= FLUSH_SECONDS

    def save_due(self) -> bool:
        """Tell whether it is time for a checkpoint."""
        return time.monotonic() - self.last_save >= self.save_every

    def saved(self) -> None:
        """Note that a checkpoint is being written."""
        self.last_save = time.monotonic()

    def knn_due(self) -> bool:
        """Tell whether it is time for k-NN."""
        return time.monotonic() - self.last_knn >= self.knn_every

    def measured(self) -> None:
        """Note that a measurement is over; its time is no step's."""
        self.last_knn = self.last_lap = time.monotonic()


def weights_of(tensors: dict[str, Tensor], prefix: str = "model") -> dict[str, Tensor]:
    """Take one part of a snapshot, see `rundir.snapshot`, under a model's own names."""
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}


def _weights_finite(model: nn.Module) -> bool:
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return bool(torch.stack([part.detach().isfinite().all() for part in parts]).all())
