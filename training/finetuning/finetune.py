"""Fine-tune an encoder on labelled images after MAE's protocol, as one rank of any number, and test what came of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from micl_zoo.encoders.load import load
from micl_zoo.errors import SourceError, TrainingError
from micl_zoo.files import file_sha256, write_text
from micl_zoo.schema import checked
from micl_zoo.stop import StopRequest
from micl_zoo.zoo.ours import DEFAULT
from micl_zoo.zoo.weights import without_head

from ..evaluation.labelled import LabelledSet
from ..evaluation.record import read_result
from ..pretraining.data import Share, loader_workers
from ..recipes import FineTuneRecipe, Many, Workers, finetune_recipe_for, get_finetune_recipe, resolve_recipe
from ..run.loop import Loop, weights_of
from ..run.order import RefusedImage, steps_per_epoch
from ..run.ranks import joined
from ..run.rundir import RunDir, command_text, run_record
from ..run.step import resolve_autocast
from .augment import AugmentedCorpus, Pictures, resized_batches
from .classifier import ClassifierStep, Tested, check_share, make_classifier, measure_classifier, save_classifier

log = logging.getLogger(__name__)

RESULT_FILE = "result.json"
SMOKE_IMAGES = 64  # of each part


@checked
def finetune(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str = DEFAULT,
    weights: str | os.PathLike[str] | None = None,
    labels: str | os.PathLike[str] | None = None,
    recipe: FineTuneRecipe | str | None = None,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    device: str = "auto",
    workers: Workers | None = None,
    max_steps: Many | None = None,
    micro_batch: Many | None = None,
) -> dict[str, Any] | None:
    """Fine-tune and test; the same call again resumes from the last checkpoint, on any number of ranks.

    Args:
        data: a labelled set, see `LabelledSet.open`.
        out: the run's folder; with several machines, on a file system that all of them see.
        model: name of the encoder to start from.
        weights: .safetensors file or folder of your own, in its place.
        labels: table of the images' classes, see `LabelledSet.open`.
        recipe: a recipe or its name; by default the one for the encoder's width.
        overrides: "key=value" changes to a recipe given by name.
        smoke: two epochs on 64 images, to see that all of it works; overrides change that twin of the recipe.
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: processes that decode for this rank; by default the machine's cores shared among its ranks, 16 at most.
        max_steps: stop after that many steps with a checkpoint, for trying things out.
        micro_batch: most images per forward pass; smaller takes less memory and gives the same gradients.

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
    recipe = resolve_recipe(recipe or name, get_finetune_recipe, overrides, smoke=smoke)
    options = [("--data", os.fspath(data)), *([("--labels", str(labels))] if labels else []), ("--recipe", name)]
    subject = shlex.quote(model if weights is None else os.fspath(weights))
    command = command_text(["micl-zoo eval finetune", subject], options, overrides, smoke)
    with joined(device) as (ranks, target):
        check_share(recipe, ranks.world)
        most = SMOKE_IMAGES if smoke else None
        images = LabelledSet.open(os.fspath(data), labels=labels, train_images=most, test_images=most)
        per_epoch = steps_per_epoch(recipe, len(images.train.index))  # too few images start no run
        facts = images.facts | {"labels_sha256": _labels_sha256(images)}
        seen = {key: value for key, value in facts.items() if key != "source"}
        if len(set(ranks.gather(json.dumps(seen, sort_keys=True)))) > 1:
            raise SourceError("the ranks do not see the same images and labels: give all machines the same data")
        record = run_record(recipe, dict(facts), command, target, ranks.world)
        record["encoder"] = {"encoder": encoder.name, "encoder_sha256": encoder.weights_sha256}
        with RunDir.open(Path(out), record, main=ranks.main) as folder:
            if finished := ranks.first(_finished(folder)):
                return finished
            classifier = make_classifier(encoder, recipe, len(images.classes)).to(target)
            autocast = resolve_autocast(recipe, target)
            with StopRequest() as stop:  # before, there is nothing to save
                loop = _Loop(
                    step=ClassifierStep(classifier, recipe, ranks, autocast=autocast, micro_batch=micro_batch),
                    folder=folder,
                    stop=stop,
                    steps_per_epoch=per_epoch,
                    config=dataclasses.replace(encoder.config, name=f"{encoder.name}-finetuned"),
                    images=images,
                    corpus=AugmentedCorpus(images.train, encoder.transform, loader_workers(workers), target),
                )
                return loop.run(max_steps)


@dataclass(kw_only=True)
class _Loop(Loop[Pictures, dict[str, Any]]):
    """Fine-tuning: the steps of a classifier, and tests between them."""

    step: ClassifierStep
    recipe: FineTuneRecipe = field(init=False)
    images: LabelledSet
    corpus: AugmentedCorpus

    def batches(self, first_step: int, last_step: int) -> Iterator[Pictures]:
        """Augment batches of the training part."""
        return self.corpus.batches(self.recipe, first_step, last_step, Share(self.ranks.rank, self.ranks.world))

    def take(self, batch: Pictures) -> Tensor:
        """Take a step: the loss; with mixed images there is no accuracy."""
        return self.step(batch).float()[None]

    def batch_ids(self, step: int) -> list[str]:
        """Name the images of a batch by the training part's index."""
        return [self.images.train.index[row].id for row in self.corpus.index_rows(self.recipe, step).tolist()]

    @property
    def refused(self) -> list[RefusedImage]:
        """Images of the training part that could not be decoded."""
        return self.corpus.refused

    def measure_due(self, steps: int) -> bool:
        """Test every `eval_epochs`; after the last step `finish` does it."""
        every = max(1, round(self.recipe.eval_epochs * self.steps_per_epoch)) if self.recipe.eval_epochs else 0
        return every > 0 and steps % every == 0 and steps < self.total_steps

    def measure(self, steps: int) -> None:
        """Test the weights as they are."""
        self.tested(steps)

    def tested(self, steps: int) -> Tested:
        """Test the classifier, or its running mean; all ranks know the result, and metrics.jsonl has a line of it."""
        share, transform = Share(self.ranks.rank, self.ranks.world), self.config.transform
        device, ema = self.step.vit.cls_token.device, self.step.ema
        batches = resized_batches(self.images.test, transform, share, self.corpus.workers, device)
        model = self.step.vit if ema is None else cast(VisionTransformer, ema.module)
        found = measure_classifier(model, batches, transform, self.ranks, autocast=self.step.autocast)
        shown = {name: one["accuracy"] for name, one in found.scores(len(self.images.classes)).items()}
        self.measured(steps, "test", shown)
        return found

    def finish(self) -> dict[str, Any]:
        """Test the last weights, and write encoder/, classifier/, result.json and the record's result."""
        found, tensors = self.tested(self.total_steps), self.snapshot()
        result: dict[str, Any] = {}
        if self.ranks.main:
            folder, classes, totals = self.folder, self.images.classes, self.totals()
            state, provenance = weights_of(tensors, "ema" if self.step.ema else "model"), folder.provenance()
            folder.save_encoder(without_head(state), self.config, "float32")
            made = save_classifier(folder.path / "classifier", state, self.config, self.recipe, classes, provenance)
            result = {
                **found.scores(len(classes)),
                "test_images": len(found.top1),
                "test_refused": [list(image) for image in found.refused],
                "train_refused": folder.record["data"].get("refused", []),
                "classes": list(classes),
                **provenance,
                "classifier_sha256": file_sha256(made),
                "processes": self.ranks.world,
                **totals,
            }
            folder.record["result"] = {"top1": result["top1"], **totals}
            folder.save_record()
            write_text(folder.path / RESULT_FILE, json.dumps(result, indent=2) + "\n")  # last: it says finished
        return self.ranks.first(result)


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
    try:
        return read_result(file, TrainingError, "the last weights are tested again")
    except TrainingError as damage:
        log.warning("%s", damage)
        return None
