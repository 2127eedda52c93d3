"""Fine-tune an encoder on labelled images after MAE's protocol, as one rank of any number, and test what came of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from micl_zoo.encoders.encoder import Encoder
from micl_zoo.encoders.load import load
from micl_zoo.encoders.zoo import DEFAULT
from micl_zoo.errors import SourceError, UsageError
from micl_zoo.files import file_sha256, write_text
from micl_zoo.images.transform import Transform
from micl_zoo.stop import StopRequest

from ..evaluation.labelled import LabelledSet
from ..pretraining.data import Share, loader_workers
from ..recipes import FineTuneRecipe, finetune_recipe_for, finetune_smoke_twin, get_finetune_recipe
from ..run.loop import Clock, Loop, resolve_autocast, weights_of
from ..run.order import RefusedImage, steps_per_epoch
from ..run.ranks import joined
from ..run.rundir import RunDir, run_record, snapshot
from .augment import AugmentedCorpus, Pictures, resized_batches
from .classifier import (
    ClassifierStep,
    Tested,
    check_share,
    make_classifier,
    measure_classifier,
    save_backbone,
    save_classifier,
)

RESULT_FILE = "result.json"
SMOKE_IMAGES = 64  # of each part


def finetune(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str = DEFAULT,
    weights: str | os.PathLike[str] | None = None,
    labels: Path | None = None,
    recipe: FineTuneRecipe | str | None = None,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    device: str = "auto",
    workers: int | None = None,
    max_steps: int | None = None,
    micro_batch: int | None = None,
) -> dict[str, Any] | None:
    """Fine-tune and test; the same call again goes on from the last checkpoint, on any number of ranks.

    Args:
        data: a labelled set, see `LabelledSet.open`.
        out: the run's folder; with several machines, on a file system that all of them see.
        model: name of the encoder to start from.
        weights: a .safetensors file or a folder of your own, in its place.
        labels: table of the images' classes, see `LabelledSet.open`.
        recipe: a recipe or its name; by default the one for the encoder's width.
        overrides: "key=value" changes to a recipe given by name.
        smoke: two epochs on 64 images, to see that all of it works; overrides change that twin of the recipe.
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: processes that decode for this rank; by default the machine's cores shared among its ranks, 16 at most.
        max_steps: stop after that many steps with a checkpoint, for trying things out.
        micro_batch: images a forward pass at most; smaller takes less memory and gives the same gradients.

    Returns:
        What result.json holds, or None when `max_steps` came first. The accuracy is that of the last step's weights (of
        their running mean with `ema_decay`): no measurement on the test part chooses anything.

    Raises:
        UsageError, WeightsError, SourceError: recipe, encoder or data that cannot be used, a training part smaller than
            one batch among them.
        TrainingError: a folder with another run in it, a loss that is not finite twice, or a full disk.
        Interrupted: SIGTERM or Ctrl-C; a checkpoint was written.
    """
    encoder = load(model, weights=weights, device="cpu")
    name = recipe.name if isinstance(recipe, FineTuneRecipe) else recipe or finetune_recipe_for(encoder.embed_dim)
    recipe = _resolve(recipe or name, overrides, smoke)
    with joined(device) as (ranks, target), StopRequest() as stop:
        check_share(recipe, ranks.world)
        most = SMOKE_IMAGES if smoke else None
        images = LabelledSet.open(os.fspath(data), labels=labels, train_images=most, test_images=most)
        per_epoch = steps_per_epoch(recipe, len(images.train.index))  # too few images start no run
        facts = images.facts | {"labels_sha256": _labels_sha256(images)}
        seen = {key: value for key, value in facts.items() if key != "source"}
        if len(set(ranks.gather(json.dumps(seen, sort_keys=True)))) > 1:
            raise SourceError("the ranks do not see the same images and labels: give all machines the same data")
        command = _command(model, weights, data, labels, name, overrides, smoke)
        record = run_record(recipe, dict(facts), command, target, ranks.world)
        record["encoder"] = {"encoder": encoder.name, "encoder_sha256": encoder.weights_sha256}
        with RunDir.open(Path(out), record) if ranks.main else RunDir(Path(out), record) as folder:
            if finished := ranks.first(_finished(folder)):
                return finished
            autocast, count = resolve_autocast(recipe, target), loader_workers(workers)
            step = ClassifierStep(
                make_classifier(encoder, recipe, len(images.classes)).to(target),
                recipe,
                ranks,
                autocast=autocast,
                micro_batch=micro_batch,
            )
            loop = _Loop(
                recipe=recipe,
                folder=folder,
                ranks=ranks,
                stop=stop,
                clock=Clock(recipe.checkpoint_minutes),
                model=step.model,
                optimizer=step.optimizer,
                ema=step.ema and step.ema.module,
                steps_per_epoch=per_epoch,
                step=step,
                images=images,
                facts=facts,
                corpus=AugmentedCorpus(images.train, encoder.transform, count, target),
                encoder=encoder,
            )
            result = loop.finish() if loop.run(max_steps) else None
            loop.close()
            return result


@dataclass(kw_only=True)
class _Loop(Loop[Pictures]):
    """Fine-tuning: the steps of a classifier, and tests between them."""

    recipe: FineTuneRecipe
    step: ClassifierStep
    images: LabelledSet
    facts: dict[str, Any]
    corpus: AugmentedCorpus
    encoder: Encoder

    @property
    def transform(self) -> Transform:
        """The encoder's own."""
        return self.encoder.transform

    def batches(self, first_step: int, last_step: int) -> Iterator[Pictures]:
        """From the training part."""
        return self.corpus.batches(self.recipe, first_step, last_step, Share(self.ranks.rank, self.ranks.world))

    def take(self, batch: Pictures) -> Tensor:
        """The loss; with mixed images there is no accuracy."""
        return self.step(batch).float()[None]

    def batch_ids(self, step: int) -> list[str]:
        """Those of the training part's index."""
        return [self.images.train.index[row].id for row in self.corpus.index_rows(self.recipe, step).tolist()]

    @property
    def refused(self) -> list[RefusedImage]:
        """Those of the training part."""
        return self.corpus.refused

    def test_due(self, steps: int) -> bool:
        """Every so many epochs; after the last step `finish` does it."""
        every = max(1, round(self.recipe.eval_epochs * self.steps_per_epoch)) if self.recipe.eval_epochs else 0
        return every > 0 and steps % every == 0 and steps < self.total_steps

    def test(self, steps: int) -> None:
        """A line of metrics.jsonl."""
        self.tested(steps)

    @property
    def tested_model(self) -> VisionTransformer:
        """Its weights, or their running means."""
        return self.step.model if self.step.ema is None else cast(VisionTransformer, self.step.ema.module)

    def tested(self, steps: int) -> Tested:
        """What the classifier makes of the test part, as all ranks know it, and a line of metrics.jsonl."""
        device, share = self.step.model.cls_token.device, Share(self.ranks.rank, self.ranks.world)
        batches = resized_batches(self.images.test, self.transform, share, self.corpus.workers, device)
        found = measure_classifier(self.tested_model, batches, self.transform, self.ranks, autocast=self.step.autocast)
        shown = {name: one["accuracy"] for name, one in found.scores(len(self.images.classes)).items()}
        seconds = round(self.clock.seconds(), 1)
        self.log([{"step": steps, "epoch": self.epoch(steps), "test": shown, "seconds": seconds}])
        self.clock.measured()
        return found

    def finish(self) -> dict[str, Any]:
        """Test the last weights, and write encoder/, classifier/, result.json and the record's result."""
        found = self.tested(self.total_steps)
        tensors = snapshot(self.model, ema=self.ema, keep=self.ranks.main)
        result: dict[str, Any] = {}
        if self.ranks.main:
            self._write_weights(weights_of(tensors, "model" if self.ema is None else "ema"))
            result = self._result(found)
            self.folder.record["result"] = {
                key: result[key] for key in ("top1", "steps", "images_seen", "hours", "precision")
            }
            self.folder.save_record()
            write_text(self.folder.path / RESULT_FILE, json.dumps(result, indent=2) + "\n")  # last: it says finished
        return self.ranks.first(result)

    def _write_weights(self, state: dict[str, Tensor]) -> None:
        record, path = self.folder.record, self.folder.path
        keys = ("recipe", "command", "commit", "versions", "machine", "encoder")
        provenance = {key: record[key] for key in keys}  # without times: equal runs write equal bytes
        provenance["data"] = self.facts
        config = dataclasses.replace(self.encoder.config, name=f"{self.encoder.name}-finetuned")
        save_backbone(path / "encoder", state, config, self.recipe, provenance)
        save_classifier(path / "classifier", state, config, self.recipe, self.images.classes, provenance)

    def _result(self, found: Tested) -> dict[str, Any]:
        record, count = self.folder.record, len(self.images.classes)
        described = {key: record[key] for key in ("encoder", "recipe", "command", "commit", "versions", "machine")}
        return {
            **found.scores(count),
            "test_images": len(found.top1),
            "test_refused": [list(image) for image in found.refused],
            "train_refused": record["data"].get("refused", []),
            "classes": list(self.images.classes),
            "data": self.facts,
            **described,
            "classifier_sha256": file_sha256(self.folder.path / "classifier" / "model.safetensors"),
            "processes": self.ranks.world,
            "steps": self.total_steps,
            "images_seen": self.total_steps * self.recipe.batch_size,
            "precision": "fp32" if self.step.autocast is None else "bf16",
            "hours": round(self.clock.seconds() / 3600, 3),
        }


def _labels_sha256(images: LabelledSet) -> str:
    """Of the names of the classes and of the class of each image of both parts."""
    digest = hashlib.sha256("\0".join(images.classes).encode())
    for part in (images.train, images.test):
        digest.update(part.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _finished(folder: RunDir) -> dict[str, Any] | None:
    file = folder.path / RESULT_FILE
    if "result" not in folder.record or not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _resolve(recipe: FineTuneRecipe | str, overrides: Sequence[str], smoke: bool) -> FineTuneRecipe:
    if isinstance(recipe, FineTuneRecipe):
        if overrides:
            raise UsageError(
                "overrides change a recipe given by name; change a recipe of your own with dataclasses.replace"
            )
        return finetune_smoke_twin(recipe) if smoke else recipe
    return get_finetune_recipe(recipe, overrides, smoke=smoke)


def _command(
    model: str,
    weights: str | os.PathLike[str] | None,
    data: str | os.PathLike[str],
    labels: Path | None,
    recipe: str,
    overrides: Sequence[str],
    smoke: bool,
) -> str:
    options = [("--data", os.fspath(data)), *([("--labels", str(labels))] if labels else [])]
    options += [("--recipe", recipe), *(("--set", change) for change in overrides)]
    encoder = shlex.quote(model if weights is None else os.fspath(weights))
    words = ["micl-zoo eval finetune", encoder, *["--smoke"] * smoke]
    return " ".join(words + [f"{option} {shlex.quote(word)}" for option, word in options])
