"""Pre-train one encoder by a recipe, straight down the page, as one rank of any number."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.distributed.tensor import DTensor

from micl_zoo.encoder import Encoder, bf16_is_fast
from micl_zoo.errors import Interrupted, SourceError, TrainingError, UsageError
from micl_zoo.files import write_text
from micl_zoo.progress import progress
from micl_zoo.sources import ImageIndex, SourceLike, index_source
from micl_zoo.stop import StopRequest
from micl_zoo.workers import default_workers

from .data import Corpus, MemoryCorpus, Share, StreamedCorpus, seeded, steps_per_epoch
from .knn import measure_knn
from .labelled import LabelledSet
from .micl import MiCL, init_weights, kept_patches
from .optim import learning_rate, set_learning_rate
from .plan import images_per_process
from .ranks import Ranks, joined
from .recipes import Recipe, get_recipe, smoke_twin
from .report import views_picture
from .rundir import RunDir, encoder_config, restore, run_record, snapshot
from .step import TrainStep
from .trackers import Tracker, open_trackers

log = logging.getLogger(__name__)

FLUSH_STEPS, FLUSH_SECONDS = 10, 5.0  # losses are fetched from the device, checked and written at the first of the two
COLLAPSE = 0.99  # of ln(negatives + 1), the loss of a network that tells no two images apart
COLLAPSE_STEPS = 200  # after the warm-up, one after the other
T = TypeVar("T")


def pretrain(
    recipe: Recipe | str,
    data: SourceLike,
    out: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    device: str = "auto",
    workers: int | None = None,
    max_steps: int | None = None,
    micro_batch: int | None = None,
    knn: Sequence[str | os.PathLike[str]] = (),
    knn_minutes: float = 30,
    knn_images: int = 10_000,
    wandb: str | None = None,
) -> Path:
    """Pre-train an encoder; the same call again goes on from the last checkpoint, on any number of ranks.

    Args:
        recipe: a recipe or its name.
        data: a source of images, see `micl_zoo.sources.index_source`.
        out: the run's folder; with several machines, on a file system that all of them see.
        overrides: "key=value" changes to a recipe given by name.
        smoke: train the recipe's small twin instead, see `smoke_twin`; overrides change the twin.
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: processes that decode for this rank, for a recipe with cache "none"; by default the machine's cores
            shared among its ranks, 16 at most.
        max_steps: stop after that many steps with a checkpoint, for trying things out.
        micro_batch: images a forward pass at most; smaller takes less memory and gives the same gradients.
        knn: folders with labelled images, see `LabelledSet.open`, measured while the run goes on.
        knn_minutes: time between those measurements; there is always one at the end.
        knn_images: training images of each that neighbours are looked for among.
        wandb: project of Weights & Biases that the run is sent to.

    Returns:
        The file of the finished encoder, or the run's folder when `max_steps` came first.

    Raises:
        UsageError, SourceError: recipe or data that cannot be used, a corpus smaller than one batch among them.
        TrainingError: a folder with another run in it, a loss that is not finite twice, collapse, or a full disk.
        Interrupted: SIGTERM or Ctrl-C; a checkpoint was written.
    """
    name = recipe if isinstance(recipe, str) else recipe.name
    recipe = _resolve(recipe, overrides, smoke)
    kept_patches(recipe.num_patches, recipe.mask_ratio, recipe.views)  # fails before the corpus is read
    with joined(device) as (ranks, target), StopRequest() as stop:
        _check_compiler(recipe, target)
        images_per_process(recipe, ranks.world)
        probes = (
            [LabelledSet.open(folder, train_images=knn_images, test_images=max(1, knn_images // 4)) for folder in knn]
            if ranks.main
            else []
        )
        index = index_source(data)
        steps_per_epoch(recipe, len(index))  # a corpus smaller than one batch starts no run
        paths = [os.fspath(path) for path in ([data] if isinstance(data, str | os.PathLike) else data)]
        facts = {"source": " ".join(paths), "images": len(index), "fingerprint": index.fingerprint()}
        if len(set(ranks.gather(facts["fingerprint"]))) > 1:
            raise SourceError("the ranks do not see the same images: give all machines the same data")
        record = run_record(recipe, facts, _command(name, paths, overrides, smoke), target, ranks.world)
        with RunDir.open(Path(out), record) if ranks.main else RunDir(Path(out), record) as folder:
            if finished := ranks.first(folder.finished_encoder):
                return finished

            corpus = _read_corpus(index, recipe, target, workers, ranks)
            total_steps = max(1, round(recipe.epochs * steps_per_epoch(recipe, len(corpus))))
            folder.keep_steps = round(recipe.keep_epochs * steps_per_epoch(recipe, len(corpus)))
            autocast = resolve_autocast(recipe, target)
            step = TrainStep(make_model(recipe, target), recipe, ranks, autocast=autocast, micro_batch=micro_batch)
            loop = _Loop(
                recipe, folder, ranks, stop, step, index, corpus, total_steps, probes, Clock(recipe, knn_minutes)
            )
            first_step = loop.resume()
            loop.trackers = (
                open_trackers(folder.path, folder.record, first_step, wandb_project=wandb) if ranks.main else []
            )
            if first_step:
                loop.note(first_step, "resumed", f"on {ranks.world} process{'es' * (ranks.world > 1)}")

            last_step = min(total_steps, max_steps or total_steps)
            for tried_before in (False, True):
                try:
                    loop.train(first_step, last_step)
                    break
                except _NotFinite as found:
                    first_step = loop.roll_back(found, tried_before)
            made = loop.finish(autocast) if last_step == total_steps else folder.path
            for tracker in loop.trackers:
                tracker.close()
            return made


@dataclass
class _Loop:
    """Everything that stays while the steps go by."""

    recipe: Recipe
    folder: RunDir
    ranks: Ranks
    stop: StopRequest
    step: TrainStep
    index: ImageIndex
    corpus: Corpus
    total_steps: int
    probes: list[LabelledSet]
    clock: Clock
    trackers: list[Tracker] = field(default_factory=list)
    told: int = 0  # how many of the corpus's refused images the other ranks know of
    flat_steps: int = 0

    def train(self, first_step: int, last_step: int) -> None:
        """Steps number first_step to last_step - 1."""
        recipe, clock, pending = self.recipe, self.clock, list[_Taken]()
        batches = iter(self.corpus.batches(recipe, first_step, last_step, Share(self.ranks.rank, self.ranks.world)))
        with progress(recipe.name, last_step, done=first_step, unit="steps", show=self.ranks.main) as tick:
            for number in range(first_step, last_step):
                seen = clock.waiting(lambda: next(batches))
                if number == first_step:
                    self._picture(seen.patches, seen.views)
                lr = learning_rate(recipe, number, self.total_steps)
                set_learning_rate(self.step.optimizer, lr)
                loss, accuracy = self.step(seen.patches, seen.views)
                pending.append(_Taken(number, lr, loss, accuracy))

                last = number + 1 == last_step
                stop = self.stop.asked or self.ranks.orphaned
                stopping, save, flush = self.ranks.any(stop, clock.save_due(), clock.flush_due())
                save |= last or stopping or (self.folder.keep_steps > 0 and (number + 1) % self.folder.keep_steps == 0)
                if save or flush or len(pending) == FLUSH_STEPS:
                    lines = self._flush(pending)
                    note = f"loss {lines[-1]['loss']:.3f}  accuracy {lines[-1]['accuracy']:.2f}  "
                    tick(len(lines), note + f"{lines[-1]['images_per_second']:,.0f} images/s")
                    pending.clear()
                if save:
                    self._save(number + 1, last=number + 1 == self.total_steps)
                if stopping:
                    self._leave(number + 1)
        self.folder.finish_writing()

    def resume(self) -> int:
        """Load the newest whole checkpoint, or write the one before the first step; the next step's number."""
        file = self.ranks.first(self.folder.newest_whole() if self.ranks.main else None)
        if file is None:
            self._save(0, last=False)
            return 0
        step, self.clock.before = restore(file, self.step.model.vit, self.step.optimizer)
        if self.ranks.main:
            self.folder.forget_after(step)
        return step

    def roll_back(self, found: _NotFinite, tried_before: bool) -> int:
        """Once: keep the batch's ids and go back to the last checkpoint. The second time: stop."""
        step, file = found.step, self.folder.path / f"nonfinite-step-{found.step:08d}.json"
        if self.ranks.main:
            ids = [self.index[row].id for row in self.corpus.index_rows(self.recipe, step).tolist()]
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
        """A line of metrics.jsonl that is no step's."""
        self._log([{"step": step, "event": event, "detail": detail}])

    def finish(self, autocast: torch.dtype | None) -> Path:
        """Write the record's result and the encoder."""
        state = snapshot(self.step.model.vit, keep=self.ranks.main)
        file = None
        if self.ranks.main:
            self.folder.record["result"] = {
                "steps": self.total_steps,
                "images_seen": self.total_steps * self.recipe.batch_size,
                "hours": round(self.clock.seconds() / 3600, 3),
                "precision": "fp32" if autocast is None else "bf16",
            }
            self.folder.save_record()
            file = self.folder.save_encoder(_weights(state), self.recipe)
        made = self.ranks.first(file)
        assert made is not None
        return made

    def _flush(self, pending: list[_Taken]) -> list[dict[str, Any]]:
        """Fetch the losses, agree on them, check and write them."""
        new, self.told = self.corpus.refused[self.told :], len(self.corpus.refused)
        mine = torch.stack([torch.stack([taken.loss.float(), taken.accuracy]) for taken in pending]).tolist()
        told = self.ranks.gather((mine, new, self.clock.lap(), _weights_finite(self.step.model.vit)))
        self._refuse([list(image) for _, refused, *_ in told for image in refused])
        seconds, wait = told[0][2]
        means = torch.tensor([losses for losses, *_ in told], dtype=torch.float64).mean(0).tolist()  # (steps, 2)
        shared = {
            "images_per_second": round(len(pending) * self.recipe.batch_size / seconds, 1),
            "data_wait": round(wait / seconds, 4),
            "seconds": round(self.clock.seconds(), 1),
        }
        per_epoch = steps_per_epoch(self.recipe, len(self.corpus))
        lines = []
        for taken, (loss, accuracy) in zip(pending, means, strict=True):
            if not math.isfinite(loss):
                raise _NotFinite(f"the loss is {loss}", taken.step)
            where = {"step": taken.step, "epoch": round(taken.step / per_epoch, 4)}
            lines.append({**where, "loss": loss, "accuracy": accuracy, "lr": taken.lr, **shared})
        if not all(finite for *_, finite in told):
            raise _NotFinite("a weight is not finite", pending[-1].step)
        self._log(lines)
        self._check_collapse(lines)
        return lines

    def _check_collapse(self, lines: list[dict[str, Any]]) -> None:
        worst = math.log(self.recipe.contrast_size)
        warm_up = self.total_steps * self.recipe.warmup_epochs / self.recipe.epochs
        for line in lines:
            self.flat_steps = self.flat_steps + 1 if line["step"] > warm_up and line["loss"] > COLLAPSE * worst else 0
        if self.flat_steps >= COLLAPSE_STEPS:
            raise TrainingError(
                f"the loss has been {lines[-1]['loss']:.3f} for {self.flat_steps} steps, that of a network which gives "
                f"every image the same embedding (ln {self.recipe.contrast_size} = {worst:.3f}): stopped. Try a lower "
                f"base_lr (--set base_lr={self.recipe.base_lr / 2:g}), a longer warm-up or more images in a new --out."
            )

    def _save(self, steps: int, *, last: bool) -> None:
        """A checkpoint, and k-NN when it is time for it."""
        tensors = snapshot(self.step.model.vit, self.step.optimizer, keep=self.ranks.main)
        self.clock.saved()
        if self.ranks.main:
            self.folder.save_checkpoint(steps, self.clock.seconds(), tensors)
            if self.probes and steps and (last or self.clock.knn_due()):
                self._measure(steps, _weights(tensors))

    def _measure(self, steps: int, state: dict[str, Tensor]) -> None:
        vit = make_vit(self.recipe)
        vit.load_state_dict(state)
        encoder = Encoder(vit, encoder_config(self.recipe), record=None, weights_sha256=None)
        encoder.to(self.step.model.vit.cls_token.device)
        found = {probe.name: round(measure_knn(encoder, probe, self.recipe.pooled_token), 4) for probe in self.probes}
        epoch = round(steps / steps_per_epoch(self.recipe, len(self.corpus)), 4)
        self._log([{"step": steps, "epoch": epoch, "knn": found, "seconds": round(self.clock.seconds(), 1)}])
        self.clock.measured()

    def _leave(self, steps: int) -> None:
        self.folder.finish_writing()
        for tracker in self.trackers:
            tracker.close()
        name = signal.Signals(self.stop.signal or signal.SIGTERM).name
        text = f"stopped by {name} after step {steps}, with a checkpoint. The same command goes on from there."
        stopped = Interrupted(text, signal=self.stop.signal or signal.SIGTERM)
        if not self.ranks.main:
            raise SystemExit(stopped.exit_code)  # one of them says it
        raise stopped

    def _log(self, lines: list[dict[str, Any]]) -> None:
        if self.ranks.main:
            self.folder.log(lines)
            for tracker in self.trackers:
                tracker.log(lines)

    def _refuse(self, images: list[list[str]]) -> None:
        """Say which images cannot be decoded, and keep them in run.json."""
        refused = self.folder.record["data"].setdefault("refused", [])
        new = [image for place, image in enumerate(images) if image not in refused and image not in images[:place]]
        if new and self.ranks.main:
            for image in new:
                log.warning("%s is left out: %s, %s", *image)
            refused += new
            self.folder.save_record()

    def _picture(self, patches: Tensor, views: Tensor) -> None:
        file = self.folder.path / "views.png"
        if self.ranks.main and not file.exists():
            views_picture(patches, views, self.recipe).save(file)


@dataclass(frozen=True)
class _Taken:
    """A step whose numbers are still on the device."""

    step: int
    lr: float
    loss: Tensor
    accuracy: Tensor


class _NotFinite(Exception):
    """Raised alike on every rank."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what)
        self.what, self.step = what, step


class Clock:
    """Seconds of training, earlier pieces of the run included, and what is due."""

    def __init__(self, recipe: Recipe, knn_minutes: float) -> None:
        self.start = self.last_lap = self.last_save = self.last_knn = time.monotonic()
        self.before = self.waited = 0.0
        self.save_every, self.knn_every = 60 * recipe.checkpoint_minutes, 60 * knn_minutes

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


def make_vit(recipe: Recipe) -> VisionTransformer:
    """The timm ViT that a recipe trains, not initialised yet."""
    return VisionTransformer(
        img_size=recipe.image_size,
        patch_size=recipe.patch_size,
        embed_dim=recipe.embed_dim,
        depth=recipe.depth,
        num_heads=recipe.num_heads,
        mlp_ratio=recipe.mlp_ratio,
        num_classes=0,
        weight_init="skip",
    )


def initial_model(recipe: Recipe) -> MiCL:
    """The method with its ViT, initialised from the recipe's seed, on the CPU: the same weights for every device."""
    vit = make_vit(recipe)
    init_weights(vit, learned_positions=recipe.positions == "learned", generator=seeded(recipe.seed, 2))
    return MiCL(
        vit,
        mask_ratio=recipe.mask_ratio,
        kappa=recipe.kappa,
        temperature=recipe.temperature,
        views=recipe.views,
        pooled_token=recipe.pooled_token,
        class_position=recipe.class_position,
        positions=recipe.positions,
    )


def make_model(recipe: Recipe, device: torch.device) -> MiCL:
    """The method as it is at the first step, on its device, compiled when the recipe says so."""
    model = initial_model(recipe).to(device).train()
    model.vit.set_grad_checkpointing(recipe.activation_checkpointing)
    for block in model.vit.blocks:
        block.attn.fused_attn &= device.type != "cpu"  # for 13 to 20 tokens the CPU's fused backward is the slower one
        if recipe.compile:
            block.compile()  # one by one, so that gradients travel while the blocks before still compute theirs
    return model


def resolve_autocast(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """Dtype of the matrix products, None for float32."""
    fast = recipe.precision == "auto" and bf16_is_fast(device)
    return torch.bfloat16 if fast or recipe.precision == "bf16" else None


def _resolve(recipe: Recipe | str, overrides: Sequence[str], smoke: bool) -> Recipe:
    if overrides and not isinstance(recipe, str):
        raise UsageError("overrides change a recipe given by name; change a Recipe with dataclasses.replace")
    if isinstance(recipe, str):
        return get_recipe(recipe, overrides, smoke=smoke)
    return smoke_twin(recipe) if smoke else recipe


def _command(name: str, paths: list[str], overrides: Sequence[str], smoke: bool) -> str:
    options = [("--data", path) for path in paths] + [("--set", change) for change in overrides]
    words = ["micl-zoo train", name, *["--smoke"] * smoke]
    return " ".join(words + [f"{option} {shlex.quote(word)}" for option, word in options])


def _read_corpus(index: ImageIndex, recipe: Recipe, device: torch.device, workers: int | None, ranks: Ranks) -> Corpus:
    if recipe.cache == "none":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return StreamedCorpus(index, max(1, default_workers() // here) if workers is None else workers, device)
    with progress("decoding the corpus", len(index), show=ranks.main) as tick:
        corpus = MemoryCorpus.load(index, recipe.source_size, tick=tick)
    corpus.images = corpus.images.to(device)
    return corpus


def _check_compiler(recipe: Recipe, device: torch.device) -> None:
    """Before anything is written: compiling for the CPU needs a C++ compiler."""
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"]
    if recipe.compile and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise TrainingError("compile=true needs a C++ compiler, none was found: install one, or --set compile=false")


def _weights_finite(vit: VisionTransformer) -> bool:
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in vit.parameters()]
    return bool(torch.stack([part.detach().isfinite().all() for part in parts]).all())


def _weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
