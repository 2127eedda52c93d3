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

from micl_zoo.encoders.device import bf16_is_fast
from micl_zoo.errors import Interrupted, TrainingError
from micl_zoo.files import write_text
from micl_zoo.progress import progress
from micl_zoo.stop import StopRequest

from ..recipes import AnyRecipe
from .optim import learning_rate, set_learning_rate
from .order import RefusedImage
from .ranks import Ranks
from .rundir import RunDir, restore, snapshot
from .trackers import Tracker, open_trackers

log = logging.getLogger(__name__)

FLUSH_STEPS, FLUSH_SECONDS = 10, 5.0  # numbers are fetched from the device, checked and written at the first of the two
T = TypeVar("T")
Batch = TypeVar("Batch")
Line = dict[str, Any]  # of metrics.jsonl


@dataclass(kw_only=True)
class Loop(ABC, Generic[Batch]):
    """Everything that stays while the steps go by, as one rank of any number sees it.

    Attributes:
        recipe: of the run.
        folder: of the run.
        ranks: this process among all.
        stop: whether somebody asked for it.
        clock: what is due.
        model: what is trained; checkpoints have its weights under its own names.
        optimizer: of the model.
        ema: running means of the weights, or None.
        steps_per_epoch: whole batches of the data.
        total_steps: of the run.
        trackers: where the lines of metrics.jsonl go besides.
        told: how many of the refused images the other ranks know of.
        logged: names of the numbers that `take` returns, the loss first.
    """

    recipe: AnyRecipe
    folder: RunDir
    ranks: Ranks
    stop: StopRequest
    clock: Clock
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: nn.Module | None = None
    steps_per_epoch: int
    total_steps: int = field(init=False)
    trackers: list[Tracker] = field(default_factory=list)
    told: int = 0
    logged: ClassVar[tuple[str, ...]] = ("loss",)

    def __post_init__(self) -> None:
        self.total_steps = max(1, round(self.recipe.epochs * self.steps_per_epoch))
        self.folder.keep_steps = round(self.recipe.keep_epochs * self.steps_per_epoch)

    @abstractmethod
    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """This rank's shares of the batches number first_step to last_step - 1."""

    @abstractmethod
    def take(self, batch: Batch) -> Tensor:
        """One optimiser step: `logged`'s numbers, float32, on the device; their means over the ranks are logged."""

    @abstractmethod
    def batch_ids(self, step: int) -> list[str]:
        """The images of a batch."""

    @property
    @abstractmethod
    def refused(self) -> list[RefusedImage]:
        """Images that this rank could not decode so far."""

    def checked(self, lines: list[Line]) -> None:
        """Raise when the newest lines say that to go on makes no sense."""

    def test_due(self, steps: int) -> bool:
        """All ranks measure something after so many steps."""
        return False

    def test(self, steps: int) -> None:
        """Measure it."""

    def saved(self, steps: int, tensors: dict[str, Tensor]) -> None:
        """Called on the rank that writes, after a checkpoint."""

    def run(self, max_steps: int | None, wandb: str | None = None) -> bool:
        """From the newest checkpoint to the end, or to `max_steps`; returns whether that is the end."""
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
        return last_step == self.total_steps

    def train(self, first_step: int, last_step: int) -> None:
        """Steps number first_step to last_step - 1."""
        clock, pending = self.clock, list[_Taken]()
        batches = iter(self.batches(first_step, last_step))
        with progress(self.recipe.name, last_step, done=first_step, unit="steps", show=self.ranks.main) as tick:
            for number in range(first_step, last_step):
                batch, steps = clock.waiting(lambda: next(batches)), number + 1
                lr = learning_rate(self.recipe, number, self.total_steps)
                set_learning_rate(self.optimizer, lr)
                pending.append(_Taken(number, lr, self.take(batch)))

                stop = self.stop.asked or self.ranks.orphaned
                stopping, save, flush = self.ranks.any(stop, clock.save_due(), clock.flush_due())
                save |= steps == last_step or stopping
                save |= self.folder.keep_steps > 0 and steps % self.folder.keep_steps == 0
                test = self.test_due(steps)
                if save or flush or test or len(pending) == FLUSH_STEPS:
                    lines = self._flush(pending)
                    note = "".join(f"{name} {lines[-1][name]:.3f}  " for name in self.logged)
                    tick(len(lines), note + f"{lines[-1]['images_per_second']:,.0f} images/s")
                    pending.clear()
                if test:
                    self.test(steps)
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
        step, self.clock.before = restore(file, self.model, self.optimizer, ema=self.ema)
        if self.ranks.main:
            self.folder.forget_after(step)
        return step

    def roll_back(self, found: _NotFinite, tried_before: bool) -> int:
        """Once: keep the batch's ids and go back to the last checkpoint. The second time: stop."""
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
        self.optimizer.zero_grad(set_to_none=True)
        first_step = self.resume()
        self.note(first_step, "rolled back", f"{found.what} at step {step}")
        return first_step

    def note(self, step: int, event: str, detail: str) -> None:
        """A line of metrics.jsonl that is no step's."""
        self.log([{"step": step, "event": event, "detail": detail}])

    def log(self, lines: list[Line]) -> None:
        """Write lines of metrics.jsonl, on the rank that writes."""
        if self.ranks.main:
            self.folder.log(lines)
            for tracker in self.trackers:
                tracker.log(lines)

    def epoch(self, steps: int) -> float:
        """How many passes over the data so many steps are."""
        return round(steps / self.steps_per_epoch, 4)

    def close(self) -> None:
        """Finish what the trackers still write."""
        for tracker in self.trackers:
            tracker.close()

    def _flush(self, pending: list[_Taken]) -> list[Line]:
        """Fetch the numbers, agree on them, check and write them."""
        new, self.told = self.refused[self.told :], len(self.refused)
        mine = torch.stack([taken.numbers for taken in pending]).tolist()
        told = self.ranks.gather((mine, new, self.clock.lap(), _weights_finite(self.model)))
        self._refuse([list(image) for _, refused, *_ in told for image in refused])
        seconds, wait = told[0][2]
        every = torch.tensor([numbers for numbers, *_ in told], dtype=torch.float64)  # (ranks, steps, numbers)
        means = every.mean(0).tolist()
        shared = {
            "images_per_second": round(len(pending) * self.recipe.batch_size / seconds, 1),
            "data_wait": round(wait / seconds, 4),
            "seconds": round(self.clock.seconds(), 1),
        }
        lines = []
        for taken, numbers in zip(pending, means, strict=True):
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
        tensors = snapshot(self.model, self.optimizer, ema=self.ema, keep=self.ranks.main)
        self.clock.saved()
        if self.ranks.main:
            self.folder.save_checkpoint(steps, self.clock.seconds(), tensors)
            self.saved(steps, tensors)

    def _leave(self, steps: int) -> None:
        self.folder.finish_writing()
        self.close()
        name = signal.Signals(self.stop.signal or signal.SIGTERM).name
        text = f"stopped by {name} after step {steps}, with a checkpoint. The same command goes on from there."
        stopped = Interrupted(text, signal=self.stop.signal or signal.SIGTERM)
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

    def __init__(self, checkpoint_minutes: float, knn_minutes: float = math.inf) -> None:
        self.start = self.last_lap = self.last_save = self.last_knn = time.monotonic()
        self.before = self.waited = 0.0
        self.save_every, self.knn_every = 60 * checkpoint_minutes, 60 * knn_minutes

    def seconds(self) -> float:
        """Of the whole run."""
        return self.before + time.monotonic() - self.start

    def waiting(self, what: Callable[[], T]) -> T:
        """Do what is waited for, and count the time."""
        start = time.monotonic()
        found = what()
        self.waited += time.monotonic() - start
        return found

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and those of them spent waiting for data."""
        now = time.monotonic()
        lap, waited = max(now - self.last_lap, 1e-9), self.waited
        self.last_lap, self.waited = now, 0.0
        return lap, min(waited, lap)

    def flush_due(self) -> bool:
        """It is time to show something."""
        return time.monotonic() - self.last_lap >= FLUSH_SECONDS

    def save_due(self) -> bool:
        """It is time for a checkpoint."""
        return time.monotonic() - self.last_save >= self.save_every

    def saved(self) -> None:
        """A checkpoint is being written."""
        self.last_save = time.monotonic()

    def knn_due(self) -> bool:
        """It is time to measure."""
        return time.monotonic() - self.last_knn >= self.knn_every

    def measured(self) -> None:
        """The measurement is over; its time is no step's."""
        self.last_knn = self.last_lap = time.monotonic()


def resolve_autocast(recipe: AnyRecipe, device: torch.device) -> torch.dtype | None:
    """Dtype of the matrix products, None for float32."""
    fast = recipe.precision == "auto" and bf16_is_fast(device)
    return torch.bfloat16 if fast or recipe.precision == "bf16" else None


def weights_of(tensors: dict[str, Tensor], prefix: str = "model") -> dict[str, Tensor]:
    """The part of a snapshot, see `rundir.snapshot`, under a model's own names."""
    return {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}


def _weights_finite(model: nn.Module) -> bool:
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return bool(torch.stack([part.detach().isfinite().all() for part in parts]).all())
