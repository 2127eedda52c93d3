"""The loop around the steps of a run, the same for pre-training and fine-tuning: log, save, stop, go back, go on."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from micl_zoo.errors import Interrupted, TrainingError
from micl_zoo.files import write_text
from micl_zoo.progress import progress
from micl_zoo.stop import StopRequest
from micl_zoo.zoo.weights import EncoderConfig

from ..recipes import AnyRecipe
from .optim import learning_rate, set_learning_rate
from .order import RefusedImage
from .ranks import Ranks
from .rundir import RunDir, restore, snapshot
from .step import Step
from .trackers import Tracker, open_trackers

log = logging.getLogger(__name__)

FLUSH_STEPS, FLUSH_SECONDS = 10, 5.0  # numbers are fetched from the device, checked and written at the first of the two
Batch = TypeVar("Batch")
Made = TypeVar("Made")
Line = dict[str, Any]  # of metrics.jsonl


@dataclass(kw_only=True)
class Loop(ABC, Generic[Batch, Made]):
    """Everything that stays while the steps go by, as one rank of any number sees it."""

    step: Step  # takes the steps; its recipe and ranks are the loop's
    folder: RunDir  # folder of the run
    stop: StopRequest  # whether somebody asked to stop
    steps_per_epoch: int  # whole batches of the data
    config: EncoderConfig  # how to build the encoder in the checkpoints
    knn_minutes: float = math.inf  # minutes between measurements that go by the clock
    recipe: AnyRecipe = field(init=False)
    ranks: Ranks = field(init=False)
    clock: Clock = field(init=False)  # tells what is due
    total_steps: int = field(init=False)
    trackers: list[Tracker] = field(default_factory=list)  # where the lines of metrics.jsonl go besides.
    told: int = 0  # how many of the refused images the other ranks know of
    logged: ClassVar[tuple[str, ...]] = ("loss",)  # names of the numbers that `take` returns, the loss first

    def __post_init__(self) -> None:
        self.recipe, self.ranks = self.step.recipe, self.step.ranks
        self.clock = Clock(flush=FLUSH_SECONDS, save=60 * self.recipe.checkpoint_minutes, knn=60 * self.knn_minutes)
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

    def begin(self) -> None:
        """Measure what there is before the first step."""

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
        if not first_step:
            self.begin()
        else:
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
        clock, pending = self.clock, list[tuple[int, float, Tensor]]()  # their numbers are still on the device
        batches = iter(self.batches(first_step, last_step))
        with progress(self.recipe.name, last_step, done=first_step, unit="steps", show=self.ranks.main) as tick:
            for number in range(first_step, last_step):
                batch, steps = clock.next_of(batches), number + 1
                lr = learning_rate(self.recipe, number, self.total_steps)
                set_learning_rate(self.step.optimizer, lr)
                pending.append((number, lr, self.take(batch)))
                due = (clock.due("save"), clock.due("flush"), self.measure_due(steps))
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
        newest = self.ranks.first(self.folder.newest_whole() if self.ranks.main else None)
        if newest is None:
            self._save(0)
            return 0
        step, self.clock.before = restore(self.folder.checkpoint(newest), self.step)
        if self.ranks.main:
            self.folder.forget_after(step)
        return step

    def roll_back(self, found: _NotFinite, tried_before: bool) -> int:
        """Keep the batch's ids and go back to the last checkpoint, once; stop the second time."""
        what, step = found.args
        file = self.folder.path / f"nonfinite-step-{step:08d}.json"
        if self.ranks.main:
            write_text(file, json.dumps({"step": step, "what": what, "ids": self.batch_ids(step)}, indent=1) + "\n")
        if tried_before:
            raise TrainingError(
                f"{what} at step {step}, and it was not the first time: stopped. Checkpoints are only written of "
                f"finite numbers; the ids of the batch are in {str(file)!r}. Look at its images, or try "
                f"--set base_lr={self.recipe.base_lr / 2:g} or --set precision=fp32 in a new --out."
            )
        if self.ranks.main:
            log.warning("%s at step %d: back to the last checkpoint, once. Its ids: %s", what, step, file)
        self.step.optimizer.zero_grad(set_to_none=True)
        first_step = self.resume()
        self.note(first_step, "rolled back", f"{what} at step {step}")
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
        self.clock.done("knn", "flush")

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

    def _flush(self, pending: list[tuple[int, float, Tensor]]) -> list[Line]:
        """Fetch the numbers, agree on them, check and write them."""
        steps, rates, taken = zip(*pending, strict=True)
        new, self.told = self.refused[self.told :], len(self.refused)
        told = self.ranks.gather((torch.stack(taken).tolist(), new, self.clock.lap(), _weights_finite(self.step.vit)))
        self._refuse([list(image) for _, refused, *_ in told for image in refused])
        seconds, wait = told[0][2]
        every = torch.tensor([numbers for numbers, *_ in told], dtype=torch.float64)  # (ranks, steps, numbers)
        shared = {"images_per_second": round(len(steps) * self.recipe.batch_size / seconds, 1)}
        shared |= {"data_wait": round(wait / seconds, 4), "seconds": round(self.clock.seconds(), 1)}
        lines = []
        for step, lr, numbers in zip(steps, rates, every.mean(0).tolist(), strict=True):
            if not math.isfinite(numbers[0]):
                raise _NotFinite(f"the loss is {numbers[0]}", step)
            named = dict(zip(self.logged, numbers, strict=True))
            lines.append({"step": step, "epoch": self.epoch(step), **named, "lr": lr, **shared})
        if not all(finite for *_, finite in told):
            raise _NotFinite("a weight is not finite", steps[-1])
        self.log(lines)
        self.checked(lines)
        return lines

    def _save(self, steps: int) -> None:
        tensors = snapshot(self.step)
        self.clock.done("save")
        if self.ranks.main:
            self.folder.save_checkpoint(steps, self.clock.seconds(), tensors, self.config)

    def _leave(self, steps: int) -> None:
        self.folder.finish_writing()
        self.close()
        number = self.stop.signal or signal.SIGTERM
        told = f"stopped by {signal.Signals(number).name} after step {steps}, with a checkpoint"
        stopped = Interrupted(f"{told}. The same command goes on from there.", signal=number)
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


class _NotFinite(Exception):
    """Raised alike on every rank, of (what, step)."""


class Clock:
    """Seconds of training, earlier pieces of the run included, and what is due."""

    def __init__(self, **every: float) -> None:  # seconds between two of a kind: flush, save, knn
        self.start, self.before, self.waited = time.monotonic(), 0.0, 0.0
        self.every, self.last = every, dict.fromkeys(every, self.start)

    def seconds(self) -> float:
        """Count the seconds of the whole run."""
        return self.before + time.monotonic() - self.start

    def next_of(self, batches: Iterator[Batch]) -> Batch:
        """Take the next batch, and count the time spent waiting for it."""
        start = time.monotonic()
        found = next(batches)
        self.waited += time.monotonic() - start
        return found

    def lap(self) -> tuple[float, float]:
        """Count the seconds since the last lap, and those of them spent waiting for data."""
        lap, waited = max(time.monotonic() - self.last["flush"], 1e-9), self.waited
        self.done("flush")
        self.waited = 0.0
        return lap, min(waited, lap)

    def due(self, kind: str) -> bool:
        """Tell whether it is time for one of a kind."""
        return time.monotonic() - self.last[kind] >= self.every[kind]

    def done(self, *kinds: str) -> None:
        """Note that one of each kind is done, or on its way."""
        self.last |= dict.fromkeys(kinds, time.monotonic())


def weights_of(tensors: dict[str, Tensor], prefix: str = "model") -> dict[str, Tensor]:
    """Take one part of a snapshot, see `rundir.snapshot`, under a model's own names."""
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}


def _weights_finite(model: nn.Module) -> bool:
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return bool(torch.stack([part.detach().isfinite().all() for part in parts]).all())
