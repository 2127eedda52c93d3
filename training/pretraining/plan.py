"""Works out what a run will cost, from its recipe alone: batch, steps, FLOPs, memory, hours, disk.

V views, T tokens a view (K/V patches and the class token), D width, M = mlp_ratio * D hidden width, L blocks, B images
that are contrasted with each other, P = 3 * patch_size ** 2 numbers a patch. One multiply-add is 2 FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from micl_zoo.errors import UsageError

from ..corpora import CORPORA
from ..recipes import KEPT_CHECKPOINTS, Recipe, vit_l16_in1k
from ..run.gpus import GPUS, Gpu
from ..run.order import images_per_process, steps_per_epoch, trained_images

GIB = 2**30
USABLE = 0.9  # of a card's memory; the rest is for what is not counted: driver, communication, fragmentation
LABEL = 11  # columns before the text of a printed line
Lines = Iterator[tuple[str, str]]  # label and text

PAPER_HOURS, PAPER_GPUS, PAPER_EPOCHS = 133, 4, 800  # ViT-L/16, on A100s
PAPER_IMAGES = CORPORA["imagenet-1k"].images
PAPER_TFLOPS = GPUS[0].bf16_tflops
CODE_EPOCHS = 200  # default of the authors' code; 800 are from their pre-training text


@dataclass(frozen=True)
class Terms:
    """Numbers that add up."""

    @property
    def total(self) -> float:
        """Sum of all terms."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class StepFlops(Terms):
    """FLOPs that the method needs for one image, forward and backward.

    Counted are matrix products. Norms, softmax, GELU and the loss's elementwise work are not.
    """

    patch_embed: float  # embedding of the visible patches; pixels get no gradient, so backward is 1 x forward
    blocks: float  # the four Linear layers of every block; backward is 2 x forward, as for all that follows
    attention: float  # queries x keys and weights x values
    similarity: float  # an image's row of the B x B matrix of each pair of views


@dataclass(frozen=True)
class MemoryEstimate(Terms):
    """Bytes on one GPU at the end of a forward pass, where most is alive.

    An estimate, for eager execution with fused attention.
    """

    weights: float  # fp32, as the gradients and AdamW's two moments
    gradients: float
    adamw: float
    casts: float  # bf16 copies of the matrices, which autocast keeps for the backward pass
    pixels: float  # visible patches of all images of a step on this GPU, fp32
    activations: float  # what the images of one forward pass keep for the backward pass
    loss: float  # fp32 matrices of similarities: six per pair of views kept for the backward pass, six being worked on


class CardPlan(NamedTuple):
    """A plan on one kind of card."""

    card: Gpu  # which
    micro_batch: int  # images a forward pass: the plan's where they fit, else the most that do; 0 when nothing fits
    fits: bool  # whether the plan's own images a forward pass do
    hours: float  # of the whole run at that micro batch
    images_per_second: float  # over all GPUs; what the data must deliver


class PaperRun(NamedTuple):
    """The paper's ViT-L/16 on 4 A100 beside the plan."""

    images_per_second: float  # 800 epochs of ImageNet-1k in 133 h
    mfu: float  # what share of the four cards' peak that is
    hours: float  # those 800 epochs at the plan's MFU, on the same cards


class Plan:
    """Every number of a run that follows from its recipe, its images and its GPUs, see `make_plan`."""

    def __init__(
        self, recipe: Recipe, images: int, gpus: int, nodes: int, micro_batch: int | None, mfu: float,
        counts: tuple[int, int] | None,
    ) -> None:  # fmt: skip
        self.recipe, self.images = recipe, trained_images(images, recipe.held_out)
        self.gpus, self.nodes, self.mfu = gpus, nodes, mfu
        self.world = gpus * nodes  # processes, one per GPU
        self.images_per_process = images_per_process(recipe, self.world)  # of one optimiser step
        # images that one GPU contrasts at a time: a group of its own, or its part of a batch with global negatives
        self.share = min(self.images_per_process, recipe.contrast_size)
        self.turns = self.images_per_process // self.share  # shares that a GPU takes in a step, gradients added up
        self.micro_batch = _piece(self.share, micro_batch or self.share)  # images per forward pass: equal pieces
        self.chunks = math.ceil(self.share / self.micro_batch)  # forward passes per share; more than one is GradCache
        self.passes = _passes(recipe, chunked=self.chunks > 1)  # what is computed over what the method needs

        self.steps_per_epoch = steps_per_epoch(recipe, self.images)  # whole batches in the corpus
        self.total_steps = recipe.total_steps(self.steps_per_epoch)
        self.warmup_steps = round(recipe.warmup_steps(self.total_steps))
        self.images_seen = self.total_steps * recipe.batch_size  # over the whole run

        self.kept = recipe.kept  # K, visible patches of an image
        self.view_tokens = self.kept // recipe.views + recipe.prefix_tokens  # T, class token and registers among them
        self.parameters, self.frozen = counts or (parameter_count(recipe), frozen_count(recipe))  # trained, fixed
        self.flops = step_flops(recipe)  # that the method needs, per image
        self.total_flops = self.images_seen * self.flops.total * self.passes  # repeated forward passes included
        self.memory = memory_estimate(recipe, images_per_gpu=self.micro_batch, gpus=self.world)
        # of the decoded images that every GPU holds with cache "memory"
        self.corpus_bytes = 3 * recipe.source_size**2 * self.images if recipe.cache == "memory" else 0

        self.checkpoint_bytes = 4 * (3 * self.parameters + self.frozen)  # of one file: fp32 weights and two moments
        self.lasting_checkpoints = math.floor(recipe.epochs / recipe.keep_epochs) if recipe.keep_epochs else 0
        self.encoder_bytes = (self.parameters + self.frozen) * (2 if recipe.save_dtype == "float16" else 4)
        # the most that the run's folder takes: a new checkpoint is written before an old one goes
        self.disk_bytes = self.encoder_bytes + self.checkpoint_bytes * (KEPT_CHECKPOINTS + 1 + self.lasting_checkpoints)

        self.cards = [_on_card(card, self) for card in GPUS]
        self.paper = _beside_the_paper(self)  # for the paper's ViT-L/16 on its corpus, else None


def make_plan(
    recipe: Recipe, *, images: int, gpus: int = 1, nodes: int = 1, micro_batch: int | None = None, mfu: float = 0.5,
    counts: tuple[int, int] | None = None,
) -> Plan:  # fmt: skip
    """Work out what a run over so many images will cost, on `nodes` machines of `gpus` GPUs.

    A forward pass takes `micro_batch` images at most, by default as many as one GPU contrasts at a time; `mfu` is the
    share of a card's peak that is reached, 0 to 1. `counts` are the parameters that are trained, and those that are
    not, of a network that a run starts from.
    """
    asked = {"gpus": gpus, "nodes": nodes, "micro_batch": 1 if micro_batch is None else micro_batch}
    if wrong := [name for name, number in asked.items() if number < 1]:
        raise UsageError(f"{wrong[0]} must be at least 1, got {asked[wrong[0]]}")
    if not 0 < mfu <= 1:
        raise UsageError(f"mfu is a share of the card's peak, above 0 and at most 1, got {mfu:g}")
    return Plan(recipe, images, gpus, nodes, micro_batch, mfu, counts)


def step_flops(recipe: Recipe) -> StepFlops:
    """Count the FLOPs that the method needs for one image: its views of T tokens, forward and backward.

    What a program computes beyond that is not here: forward passes that are repeated, or the product that fused
    attention computes again in its backward pass. ViT-L/16 at mask ratio 0.8: 40 tokens x 2 x 302 M weights x 3 =
    72.5 GFLOP, 73 with all terms.
    """
    kept, width, depth, views = recipe.kept, recipe.embed_dim, recipe.depth, recipe.views
    tokens = kept // views + recipe.prefix_tokens
    return StepFlops(
        patch_embed=2 * 2 * kept * recipe.patch_numbers * width,
        blocks=3 * depth * 2 * (views * tokens) * _block_matrices(recipe),
        attention=3 * depth * views * 2 * (2 * tokens**2 * width),  # V views x 2 products of 2 T^2 D each
        similarity=3 * math.comb(views, 2) * 2 * recipe.contrast_size * width,
    )


def parameter_count(recipe: Recipe) -> int:
    """Count the numbers that are trained: all but a fixed position table, see `frozen_count`."""
    width = recipe.embed_dim
    biases = 3 * width + width + _hidden(recipe) + width  # of qkv, proj, fc1, fc2
    block = _block_matrices(recipe) + biases + 4 * width  # and two norms
    embed = (recipe.patch_numbers + 1) * width
    learned = 0 if recipe.positions == "sincos" else _positions(recipe)
    return embed + width + recipe.depth * block + 2 * width + learned  # the class token before, a norm after


def frozen_count(recipe: Recipe) -> int:
    """Count the numbers of a fixed `pos_embed`, which files carry but no step changes: (1 + N) D."""
    return _positions(recipe) if recipe.positions == "sincos" else 0


def _positions(recipe: Recipe) -> int:
    return (1 + (recipe.image_size // recipe.patch_size) ** 2) * recipe.embed_dim


def memory_estimate(recipe: Recipe, *, images_per_gpu: int, gpus: int) -> MemoryEstimate:
    """Estimate the memory of one GPU while it trains.

    Weights and gradients are 4 bytes a number, AdamW's moments 8; "fsdp" divides these three by `gpus` and adds the
    weights of two whole blocks, the one at work and the next. Precision "auto" is taken for bf16. What an image keeps
    is listed in `_activation_bytes`.
    Not counted: the CUDA context, buffers of communication and of fused kernels, fragmentation, a corpus that is held
    on the GPU (cache "memory"). Compiled blocks keep less.

    `images_per_gpu` are those of a forward pass; `gpus` counts over all nodes.
    """
    trained, block = parameter_count(recipe), _block_matrices(recipe)
    sharded = recipe.parallel == "fsdp" and gpus > 1
    parts = gpus if sharded else 1
    rows = min(recipe.batch_size / gpus, recipe.contrast_size)
    return MemoryEstimate(
        weights=4 * (trained / parts + frozen_count(recipe)) + (2 * 4 * block if sharded else 0),
        gradients=4 * trained / parts,
        adamw=2 * 4 * trained / parts,
        casts=0 if recipe.precision == "fp32" else 2 * block * recipe.depth,
        pixels=4 * recipe.kept * recipe.patch_numbers * recipe.batch_size / gpus,
        activations=images_per_gpu * _activation_bytes(recipe),
        loss=6 * (math.comb(recipe.views, 2) + 1) * 4 * rows * recipe.contrast_size,
    )


def _activation_bytes(recipe: Recipe) -> int:
    """What one image keeps for the backward pass.

    The residual stream is fp32; what enters or leaves a matrix product is h = 2 bytes a number (bf16 autocast) or 4.

        patches  what the product takes        2 P a patch   with bf16; fp32 is what came
        block    two norms' inputs             2 x 4 D a token, the first is the block's own input
                 qkv's and fc1's inputs        2 x h D
                 queries, keys, values         3 x h D
                 attention's output                h D
                 fc1's output, before GELU         h M
                 fc2's input, after GELU           h M
        after    the last block's output         4 D

    With activation checkpointing every block keeps its own input, 4 D, and one block at a time the rest.
    """
    half = 4 if recipe.precision == "fp32" else 2
    width, hidden = recipe.embed_dim, _hidden(recipe)
    rest = 4 * width + half * (6 * width + 2 * hidden)
    blocks = 4 * width * recipe.depth + rest * (1 if recipe.activation_checkpointing else recipe.depth)
    patches = 0 if recipe.precision == "fp32" else 2 * recipe.kept * recipe.patch_numbers
    return (recipe.kept + recipe.views * recipe.prefix_tokens) * (blocks + 4 * width) + patches


def fitting_images(recipe: Recipe, room: float, *, gpus: int = 1) -> int:
    """Estimate how many images a forward pass may take for all to fit into `room` bytes; 0 where none does."""
    fixed = memory_estimate(recipe, images_per_gpu=0, gpus=gpus).total
    return max(0, math.floor((room - fixed) / _activation_bytes(recipe)))


def _hidden(recipe: Recipe) -> int:
    return int(recipe.embed_dim * recipe.mlp_ratio)


def _block_matrices(recipe: Recipe) -> int:
    """Numbers in qkv (3 D^2), proj (D^2), fc1 and fc2 (D M each)."""
    return 4 * recipe.embed_dim**2 + 2 * recipe.embed_dim * _hidden(recipe)


def _passes(recipe: Recipe, *, chunked: bool) -> float:
    return (3 + chunked + recipe.activation_checkpointing) / 3  # forward 1, backward 2, repeated forwards 1 each


def _on_card(card: Gpu, plan: Plan) -> CardPlan:
    recipe = plan.recipe
    most = fitting_images(recipe, USABLE * card.memory_gib * GIB - plan.corpus_bytes, gpus=plan.world)
    fits = plan.micro_batch <= most
    micro_batch = plan.micro_batch if fits else _piece(plan.share, most)
    flops = plan.flops.total * _passes(recipe, chunked=micro_batch < plan.share)
    rate = plan.world * card.bf16_tflops * 1e12 * plan.mfu / flops
    return CardPlan(card, micro_batch, fits, plan.images_seen / rate / 3600, rate)


def _beside_the_paper(plan: Plan) -> PaperRun | None:
    paper = vit_l16_in1k()
    alike = ("corpus", "patch_size", "embed_dim", "depth", "mlp_ratio", "crop_size", "mask_ratio", "views")
    if any(getattr(plan.recipe, name) != getattr(paper, name) for name in alike):
        return None
    images = PAPER_EPOCHS * PAPER_IMAGES
    rate = images / (PAPER_HOURS * 3600)
    mfu = rate * plan.flops.total / (PAPER_GPUS * PAPER_TFLOPS * 1e12)
    return PaperRun(rate, mfu, PAPER_HOURS * mfu / plan.mfu)


def _piece(share: int, most: int) -> int:
    """Images of the largest of as few equal pieces as hold `most` images each; 0 when they hold none."""
    return math.ceil(share / math.ceil(share / most)) if most else 0


def format_plan(plan: Plan) -> str:
    """Write the plan for a person: each number with its arithmetic, in 100 columns."""
    nodes = f" ({plan.nodes} nodes x {plan.gpus})" if plan.nodes > 1 else ""
    head = f"{plan.recipe.name}, {plan.images:,} images, {_gpus(plan)}{nodes}: a plan, nothing is trained"
    parts = (_batch_lines, _length_lines, _network_lines, _memory_lines, _disk_lines, _paper_lines)
    lines = [f"{label:<{LABEL}}{text}" for part in parts for label, text in part(plan)]
    return "\n".join([head, "", *lines, "", *_card_lines(plan)])


def _batch_lines(plan: Plan) -> Lines:
    recipe = plan.recipe
    turns = f"{plan.turns} turns (gradients add up)" if plan.turns > 1 else "1 turn"
    yield "batch", f"{plan.share:,} images a GPU x {_gpus(plan)} x {turns} = {recipe.batch_size:,} an optimiser step"
    contrasted = "groups of" if recipe.negatives == "local" else "all"
    each = f"{recipe.contrast_size - 1:,} negatives each"
    yield "negatives", f"{recipe.negatives}: {contrasted} {recipe.contrast_size:,} images among themselves, {each}"
    if plan.chunks > 1:
        full, rest = divmod(plan.share, plan.micro_batch)
        sizes = f"{full} x {plan.micro_batch:,}" + (f" + {rest:,}" if rest else "")
        yield "GradCache", f"{plan.share:,} = {sizes} a pass: same gradients, one more forward pass, FLOPs x 4/3"
    lr = f"{recipe.base_lr:g} x {recipe.batch_size:,} / 256 = {recipe.lr:g}"
    yield "rate", f"{lr} at its peak, then a cosine to {recipe.min_lr:g}"


def _length_lines(plan: Plan) -> Lines:
    recipe = plan.recipe
    epoch = f"{plan.images:,} // {recipe.batch_size:,} = {plan.steps_per_epoch:,} an epoch"
    run = f"x {recipe.epochs:g} epochs = {plan.total_steps:,}, the first {plan.warmup_steps:,} warm-up"
    yield "steps", f"{epoch}, {run}"
    yield "images", f"{plan.total_steps:,} x {recipe.batch_size:,} = {_count(plan.images_seen)} seen"


def _network_lines(plan: Plan) -> Lines:
    recipe, flops, views = plan.recipe, plan.flops, plan.recipe.views
    patches = f"N = {recipe.grid} x {recipe.grid} = {recipe.num_patches}"
    patches += f", K = {plan.kept} kept at mask ratio {recipe.mask_ratio:g}"
    prefix = "class" if recipe.prefix_tokens == 1 else f"{recipe.prefix_tokens} others"
    yield "patches", f"{patches}: {views} views x ({plan.kept // views} + {prefix}) = {views * plan.view_tokens} tokens"
    if views > 2:
        yield "", f"{math.comb(views, 2)} pairs of views are contrasted, the loss is their mean"
    shape = f"width {recipe.embed_dim:,}, depth {recipe.depth}, {recipe.num_heads} heads"
    fixed = "fixed positions" if recipe.positions == "sincos" else "that stay as they are"
    positions = f" + {plan.frozen:,} {fixed}" if plan.frozen else ", positions among them"
    yield "network", f"{shape}: {plan.parameters:,} parameters{positions}"
    size, unit = (1e9, "GFLOP") if flops.total >= 1e8 else (1e6, "MFLOP")
    yield "compute", f"{flops.total / size:.3g} {unit} an image, forward and backward (a multiply-add is 2) ="
    yield "", _terms(flops, size, ".3g", " + ")
    again = f" x {round(3 * plan.passes)}/3 (forward passes done again)" if plan.passes > 1 else ""
    yield "", f"x {_count(plan.images_seen)} images{again} = {_scaled(plan.total_flops, 'FLOP', 'EPTG')} in all"


def _memory_lines(plan: Plan) -> Lines:
    size, unit, digits = (GIB, "GiB", ",.1f") if plan.memory.total >= 4 * GIB else (2**20, "MiB", ",.0f")
    total = f"{plan.memory.total / size:{digits}} {unit}"
    yield "memory", f"about {total} a GPU at {plan.micro_batch:,} images a forward pass, an estimate:"
    yield "", _terms(plan.memory, size, digits, ", ")
    if plan.corpus_bytes:
        pixels = f"{plan.images:,} images x 3 x {plan.recipe.source_size}^2 bytes"
        yield "", f"and the corpus on every GPU: {pixels} = {plan.corpus_bytes / size:{digits}} {unit}"


def _disk_lines(plan: Plan) -> Lines:
    yield "disk", f"checkpoint: 3 x 4 bytes a parameter (weights, two moments) = {_scaled(plan.checkpoint_bytes, 'B')}"
    lasting = f" + {plan.lasting_checkpoints} for good" if plan.lasting_checkpoints else ""
    encoder = f"{_scaled(plan.encoder_bytes, 'B')} of encoder in {plan.recipe.save_dtype}"
    yield "", f"x (last {KEPT_CHECKPOINTS} + 1 being written{lasting}) + {encoder} = {_scaled(plan.disk_bytes, 'B')}"


def _paper_lines(plan: Plan) -> Lines:
    if plan.paper is None:
        return
    epochs = f"{PAPER_EPOCHS} epochs x {PAPER_IMAGES:,} / {PAPER_HOURS * 3600:,} s"
    rate = plan.paper.images_per_second
    fewer = f"{rate * CODE_EPOCHS / PAPER_EPOCHS:,.0f} if {CODE_EPOCHS}"
    yield "paper", f"{PAPER_HOURS} h on {PAPER_GPUS} A100: {epochs} = {rate:,.0f} images/s ({fewer})"
    mfu = f"x {plan.flops.total / 1e9:.3g} GFLOP / ({PAPER_GPUS} x {PAPER_TFLOPS:g} TFLOP/s) = {plan.paper.mfu:.1%} MFU"
    yield "", f"{mfu}; at {plan.mfu:.0%} the same 4 take {plan.paper.hours:.1f} h"


def _card_lines(plan: Plan) -> Iterator[str]:
    """A row a card: what it offers, the run's time and rates on it, and whether a forward pass fits."""
    yield f"On {_gpus(plan)} at {plan.mfu:.0%} MFU; images/s are what the data must deliver:"
    yield f"{'':<{LABEL}}{'TFLOP/s':>7}{'GiB':>5}{'time':>10}{'images/s':>12}{'a GPU':>12}  memory"
    for row in plan.cards:
        rates, verdict = f"{'-':>10}{'-':>12}{'-':>12}", "does not fit at any --micro-batch"
        if row.micro_batch:
            each = row.images_per_second / plan.world
            rates = f"{_time(row.hours):>10}{row.images_per_second:>12,.0f}{each:>12,.0f}"
            verdict = "fits" if row.fits else f"does not fit, --micro-batch {row.micro_batch} would"
        yield f"{row.card.name:<{LABEL}}{row.card.bf16_tflops:>7g}{row.card.memory_gib:>5g}{rates}  {verdict}"
    notes = f"Fits: into {USABLE:.0%} of the memory."
    if any(row.micro_batch and not row.fits for row in plan.cards):
        notes += " Where --micro-batch is named, time and rates are with it."
    yield notes
    if plan.recipe.precision == "fp32":
        yield "The TFLOP/s are those of bf16: this recipe's fp32 takes several times as long."


def _gpus(plan: Plan) -> str:
    return f"{plan.world} GPU{'s' * (plan.world > 1)}"


def _terms(terms: Terms, size: float, digits: str, between: str) -> str:
    return between.join(f"{name.replace('_', ' ')} {value / size:{digits}}" for name, value in vars(terms).items())


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


def _time(hours: float) -> str:
    number, unit = next(((hours * n, u) for n, u in ((1, "h"), (60, "min")) if hours * n >= 1), (3600 * hours, "s"))
    return f"{number:,.1f} {unit}"


def _scaled(number: float, unit: str, prefixes: str = "GMk") -> str:
    sizes = {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
    prefix = next((one for one in prefixes if number >= sizes[one]), prefixes[-1])
    return f"{number / sizes[prefix]:,.1f} {prefix}{unit}"
