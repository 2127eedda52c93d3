"""Pre-train one encoder by a recipe, straight down the page, as one rank of any number."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from micl_zoo.encoders.device import has_compiler, total_memory
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.encoders.torch_model import TorchModel
from micl_zoo.errors import SourceError, TrainingError, UsageError
from micl_zoo.progress import progress
from micl_zoo.schema import checked
from micl_zoo.sources.index import ImageIndex
from micl_zoo.sources.listing import SourceLike, index_source, source_paths
from micl_zoo.stop import StopRequest
from micl_zoo.zoo.ours import vit_sizes

from ..evaluation.knn import measure_knn
from ..evaluation.labelled import LabelledSet
from ..micl import MiCL, Vit, init_weights
from ..recipes import RECIPES, Amount, Many, Recipe, Workers, get_recipe, kept_patches, resolve_recipe
from ..run.loop import Line, Loop, weights_of
from ..run.order import RefusedImage, images_per_process, seeded, steps_per_epoch
from ..run.ranks import Ranks, joined
from ..run.record import METRICS_FILE, VIEWS_FILE
from ..run.rundir import RunDir, command_text, encoder_config, run_record
from ..run.step import resolve_autocast
from .change import PICTURE, Looked, Split, compare, draw_neighbours, drift, look, split_images
from .data import Corpus, MemoryCorpus, Seen, Share, StreamedCorpus, loader_workers, made_up_patches
from .plan import fitting_images
from .start import Start, freeze
from .step import TrainStep
from .views import views_picture

log = logging.getLogger(__name__)

COLLAPSE = 0.99  # of ln(negatives + 1), the loss of a network that tells no two images apart
COLLAPSE_STEPS = 200  # after the warm-up, one after the other


@dataclass(frozen=True)
class Images:
    """What to train on, listed."""

    paths: list[str]  # as they were given
    index: ImageIndex

    @classmethod
    def open(cls, data: SourceLike) -> Images:
        """List a source, see `micl_zoo.index_source`."""
        return cls(source_paths(data), index_source(data))


@checked
def pretrain(
    recipe: Recipe | str,
    data: SourceLike | Images,
    out: str | os.PathLike[str],
    *,
    init: Start | Encoder | str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    device: str = "auto",
    workers: Workers | None = None,
    max_steps: Many | None = None,
    micro_batch: Many | None = None,
    knn: SourceLike = (),
    knn_minutes: Amount = 30,
    knn_images: Many = 10_000,
    wandb: str | None = None,
    command: str | None = None,
    reasons: Mapping[str, str] | None = None,
) -> Path:
    """Pre-train an encoder; the same call again resumes from the last checkpoint, on any number of ranks.

    Args:
        recipe: a recipe or its name.
        data: a source of images, see `micl_zoo.index_source`.
        out: the run's folder; with several machines, on a file system that all of them see.
        init: an encoder to start from in the place of random weights, or what `micl_zoo.load` finds it by: its network
            takes the place of the recipe's.
        overrides: "key=value" changes to a recipe given by name.
        smoke: train the recipe's small twin instead, see `smoke_twin`; overrides change the twin.
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: processes that decode for this rank, for a recipe with cache "none"; by default the machine's cores
            shared among its ranks, 16 at most.
        max_steps: stop after that many steps with a checkpoint, for trying things out.
        micro_batch: most images per forward pass; smaller takes less memory and gives the same gradients.
        knn: folders with labelled images, or one, see `LabelledSet.open`, measured while the run goes on.
        knn_minutes: minutes between those measurements; there is always one at the end.
        knn_images: number of training images of each set among which neighbours are looked for.
        wandb: project of Weights & Biases that the run is sent to.
        command: the command that was given, for run.json; by default the one that does the same.
        reasons: why fields of the recipe are what they are, for run.json and the report.

    Returns:
        The file of the finished encoder, or the run's folder when `max_steps` came first.

    Raises:
        UsageError, SourceError: recipe or data that cannot be used, a corpus smaller than one batch among them.
        TrainingError: a folder with another run in it, a loss that is not finite twice, collapse, or a full disk.
        Interrupted: SIGTERM or Ctrl-C; a checkpoint was written.
    """
    name = recipe if isinstance(recipe, str) else recipe.name
    start = init if init is None or isinstance(init, Start) else Start.open(init)
    recipe = resolve_recipe(recipe, get_recipe, () if start else overrides, smoke=smoke)
    if start:  # a recipe's own name is that of another network
        recipe = start.recipe(dataclasses.replace(recipe, name=start.name) if name in RECIPES else recipe, overrides)
    elif recipe.positions == "own":
        raise UsageError("positions=own are those of an encoder to start from: give one, --init ENCODER")
    kept_patches(recipe.num_patches, recipe.mask_ratio, recipe.views)  # fails before the corpus is read
    with joined(device) as (ranks, target):
        if recipe.compile and target.type == "cpu" and not has_compiler():
            raise TrainingError("compile=true needs a C++ compiler, none was found: install one or --set compile=false")
        images_per_process(recipe, ranks.world)
        probes = _probes(knn, knn_images) if ranks.main else []
        images = data if isinstance(data, Images) else Images.open(data)
        index = images.index
        split = split_images(index, recipe)
        steps_per_epoch(recipe, len(split.trained))  # a corpus smaller than one batch starts no run
        facts = {"source": " ".join(images.paths), "images": len(split.trained), "fingerprint": index.fingerprint()}
        facts |= {"marks": marks} if (marks := index.marks()) else {}
        if len(set(ranks.gather(facts["fingerprint"]))) > 1:
            raise SourceError("the ranks do not see the same images: give all machines the same data")
        if command is None:
            named = os.fspath(init) if isinstance(init, str | os.PathLike) else start.encoder.name if start else ""
            options = [("--init", named)] if start else []
            options += named_options(images, out, knn)
            command = command_text(["micl-zoo train", name], options, overrides, smoke)
        record = run_record(recipe, facts, command, target, ranks.world)
        record |= {"encoder": start.facts()} if start else {}
        record |= {"reasons": dict(reasons)} if reasons else {}
        with RunDir.open(Path(out), record, main=ranks.main) as folder:
            if ranks.first(folder.finished):
                if probes:
                    log.warning("the run is finished, and --knn adds nothing: micl-zoo eval all measures its encoder")
                return folder.encoder_file
            corpus = _read_corpus(split.trained, recipe, target, workers, ranks)
            autocast, model = resolve_autocast(recipe, target), make_model(recipe, target, start)
            with StopRequest() as stop:  # before, there is nothing to save
                step = TrainStep(model, recipe, ranks, autocast=autocast, micro_batch=micro_batch)
                if micro_batch is None:
                    _fit(step, recipe, target, ranks)
                loop = _Loop(
                    step=step,
                    folder=folder,
                    stop=stop,
                    steps_per_epoch=steps_per_epoch(recipe, len(corpus), corpus.refused),
                    config=start.config(recipe) if start else encoder_config(recipe),
                    knn_minutes=knn_minutes,
                    split=split,
                    corpus=corpus,
                    probes=probes,
                    start=start,
                    workers=workers,
                )
                return loop.run(max_steps, wandb) or folder.path


def named_options(images: Images, out: str | os.PathLike[str], knn: SourceLike) -> list[tuple[str, str]]:
    """List the options of a command that say what is read and written."""
    places = {"--data": images.paths, "--out": [os.fspath(out)], "--knn": source_paths(knn)}
    return [(option, path) for option, paths in places.items() for path in paths]


def _probes(knn: SourceLike, images: int) -> list[LabelledSet]:
    """Open labelled sets, each once; those that share a name are called what they were given as."""
    asked = max(1, images // 4)
    sets = {one: LabelledSet.open(one, train_images=images, test_images=asked) for one in source_paths(knn)}
    names = Counter(one.name for one in sets.values())
    return [dataclasses.replace(one, name=place if names[one.name] > 1 else one.name) for place, one in sets.items()]


@contextmanager
def _measuring() -> Iterator[None]:
    """Go on where images to measure with are gone: what was trained is worth more."""
    try:
        yield
    except SourceError as error:
        log.warning("nothing is measured: %s", error)


@dataclass(kw_only=True)
class _Loop(Loop[Seen, Path]):
    """Pre-training: the steps of the method, k-NN beside them, and an eye on collapse."""

    step: TrainStep
    recipe: Recipe = field(init=False)
    split: Split
    corpus: Corpus
    probes: list[LabelledSet]
    start: Start | None = None
    workers: int | None = None  # decoding processes of measurements
    after: Looked | None = None  # what the newest weights that were measured make of the images
    flat_steps: int = 0
    logged = ("loss", "accuracy")

    def batches(self, first_step: int, last_step: int) -> Iterator[Seen]:
        """Cut batches from the corpus, and keep a picture of the first."""
        share, file = Share(self.ranks.rank, self.ranks.world), self.folder.path / VIEWS_FILE
        for seen in self.corpus.batches(self.recipe, first_step, last_step, share):
            if seen.step == first_step and self.ranks.main and not file.exists():
                views_picture(seen.patches, seen.views, self.recipe).save(file)
            yield seen

    def take(self, batch: Seen) -> Tensor:
        loss, accuracy = self.step(batch.patches, batch.views)
        return torch.stack([loss.float(), accuracy])

    def batch_ids(self, step: int) -> list[str]:
        return [self.split.trained[row].id for row in self.corpus.index_rows(self.recipe, step).tolist()]

    @property
    def refused(self) -> list[RefusedImage]:
        return self.corpus.refused

    def checked(self, lines: list[Line]) -> None:
        worst = math.log(self.recipe.contrast_size)
        warm_up = self.recipe.warmup_steps(self.total_steps)
        for line in lines:
            self.flat_steps = self.flat_steps + 1 if line["step"] > warm_up and line["loss"] > COLLAPSE * worst else 0
        if self.flat_steps >= COLLAPSE_STEPS:
            raise TrainingError(
                f"the loss has been {lines[-1]['loss']:.3f} for {self.flat_steps} steps, that of a network which gives "
                f"every image the same embedding (ln {self.recipe.contrast_size} = {worst:.3f}): stopped. Try a lower "
                f"base_lr (--set base_lr={self.recipe.base_lr / 2:g}), a longer warm-up or more images in a new --out."
            )

    def begin(self) -> None:
        if self.start and self.ranks.main and not (self.folder.path / METRICS_FILE).exists():
            self._tell(0, self.before)

    @cached_property
    def before(self) -> Looked:
        """What the start makes of the images; looked at again by a run that is resumed."""
        assert self.start
        return self._look(copy.deepcopy(self.start.encoder))  # which stays where it is

    def measure_due(self, steps: int) -> bool:
        """Measure by the clock and at the end; who was told to stop has no time for it."""
        by_clock = self.clock.due("knn") and not self.stop.asked
        return bool(self.probes or self.start) and (steps == self.total_steps or by_clock)

    def measure(self, steps: int) -> None:
        state = self.weights()
        if not self.ranks.main:
            return
        encoder = self.encoder_of(state)
        with _measuring():
            if self.start:
                self.after = None  # should the look fail, that of earlier weights must not stand for these
                self.after = self._look(encoder)
                self._tell(steps, self.after)
                return
            encoder.to(next(self.step.vit.parameters()).device)
            found = {probe.name: measure_knn(encoder, probe, self.recipe.pooled_token) for probe in self.probes}
            self.measured(steps, "knn", found)

    def _look(self, encoder: Encoder) -> Looked:
        encoder.to(next(self.step.vit.parameters()).device)
        return look(encoder, self.split.shown, self.probes, self.recipe.pooled_token, self.workers)

    def _tell(self, steps: int, found: Looked) -> None:
        """Write the lines of a measurement."""
        if self.probes:
            self.measured(steps, "knn", found.knn)
        self.measured(steps, "kept", {"cosine": drift(self.before, found, self.split)})

    def weights(self) -> dict[str, Tensor]:
        """Copy what the run would leave now: the weights or their running means, with the start's share of them."""
        state = weights_of(self.snapshot(), "ema" if self.step.ema else "model")
        share = self.recipe.start_share
        return self.start.mixed(state, share) if self.start and share else state

    def encoder_of(self, state: dict[str, Tensor]) -> Encoder:
        """Make an encoder of weights, on the CPU."""
        if self.start:
            return self.start.with_weights(state)
        vit = make_vit(self.recipe)
        vit.load_state_dict(state)
        return Encoder(TorchModel(vit, self.config.size), self.config, record=None, weights_sha256=None)

    def finish(self) -> Path:
        state = self.weights()
        if self.ranks.main:
            self.folder.record["result"] = self.totals()
            if self.start:
                with _measuring():
                    after = self.after or self._look(self.encoder_of(state))  # None where it was not looked at
                    self.folder.record["change"] = compare(self.before, after, self.split)
                    draw_neighbours(self.folder.path / PICTURE, self.before, after, self.split.shown)
            self.folder.save_record()
            self.folder.save_encoder(state, self.config, self.recipe.save_dtype)
        self.ranks.first(None)  # all of them end when it is there
        return self.folder.encoder_file


def make_vit(recipe: Recipe) -> VisionTransformer:
    """Build the timm ViT that a recipe trains, not initialised yet."""
    sizes = vit_sizes(vars(recipe))
    return VisionTransformer(sizes.pop("image_size"), **sizes, num_classes=0, weight_init="skip")


def initial_model(recipe: Recipe, start: Start | None = None) -> MiCL:
    """Make the method with its ViT on the CPU: the start's, or weights drawn by the seed, the same for every device."""
    vit: Vit
    if start:
        vit = start.model()
    else:
        vit = make_vit(recipe)
        init_weights(vit, learned_positions=recipe.positions == "learned", generator=seeded(recipe.seed, 2))
    names = ("mask_ratio", "kappa", "temperature", "views", "pooled_token", "class_position", "positions")
    model = MiCL(vit, **{name: getattr(recipe, name) for name in names})
    if start:
        freeze(model, recipe)
    return model


def parameter_counts(recipe: Recipe, start: Start) -> tuple[int, int]:
    """Count the parameters of a start that a recipe trains, and those that stay as they are."""
    every = [(one.numel(), one.requires_grad) for one in initial_model(recipe, start).vit.parameters()]
    return tuple(sum(count for count, trained in every if trained is wanted) for wanted in (True, False))


def make_model(recipe: Recipe, device: torch.device, start: Start | None = None) -> MiCL:
    """Make the method as it is at the first step, on its device, compiled when the recipe says so."""
    model = initial_model(recipe, start).to(device)
    model.vit.set_grad_checkpointing(recipe.activation_checkpointing)
    for module in model.vit.modules():
        if hasattr(module, "fused_attn"):  # for 13 to 20 tokens the CPU's fused backward is the slower one
            module.fused_attn &= device.type != "cpu"
    for block in model.vit.blocks if recipe.compile else ():
        block.compile()  # one by one, so that gradients travel while the blocks before still compute theirs
    return model


def _fit(step: TrainStep, recipe: Recipe, device: torch.device, ranks: Ranks) -> None:
    """Choose the images per forward pass: on a GPU by trying, on a CPU by an estimate, for half of the memory."""
    if device.type == "cuda" and recipe.parallel == "ddp":
        share = dataclasses.replace(recipe, batch_size=images_per_process(recipe, ranks.world), contrast_batch=0)
        patches, views = made_up_patches(share, device)
        step.fit(patches.to(device).float(), views)
    elif device.type == "cpu" and (memory := total_memory()):  # not the free memory: a resumed run does the same
        room = memory / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        step.micro_batch = min(step.micro_batch, max(1, fitting_images(recipe, room, gpus=ranks.world)))
    if step.micro_batch < min(recipe.contrast_size, images_per_process(recipe, ranks.world)) and ranks.main:
        log.info("%d images per forward pass fit into memory; the gradients are those of all", step.micro_batch)


def _read_corpus(index: ImageIndex, recipe: Recipe, device: torch.device, workers: int | None, ranks: Ranks) -> Corpus:
    if recipe.cache == "none":
        return StreamedCorpus(index, loader_workers(workers), device)
    with progress("decoding the corpus", len(index), show=ranks.main) as tick:
        corpus = MemoryCorpus.load(index, recipe.source_size, tick=tick)
    corpus.images = corpus.images.to(device)
    return corpus
