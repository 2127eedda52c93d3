"""Pre-train one encoder by a recipe, in one process, straight down the page."""

from __future__ import annotations

import logging
import math
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from micl_zoo.encoder import bf16_is_fast, resolve_device
from micl_zoo.errors import TrainingError, UsageError
from micl_zoo.extract import default_workers
from micl_zoo.progress import Tick, progress
from micl_zoo.sources import SourceLike, index_source

from .data import Corpus, MemoryCorpus, StreamedCorpus, seeded, steps_per_epoch, visible_patches
from .micl import MiCL, init_weights, kept_patches
from .optim import learning_rate, make_optimizer, set_learning_rate
from .recipes import Recipe, get_recipe
from .rundir import RunDir, run_record

log = logging.getLogger(__name__)

FLUSH_STEPS = 10  # losses are fetched from the device, checked and written this often
COLLAPSE = 0.99  # of ln(batch), the loss of a network that tells no two images apart


def pretrain(
    recipe: Recipe | str,
    data: SourceLike,
    out: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    device: str = "auto",
    workers: int | None = None,
    max_steps: int | None = None,
) -> Path:
    """Pre-train an encoder; the same call again goes on from the last checkpoint.

    Args:
        recipe: a recipe or its name.
        data: a source of images, see `micl_zoo.sources.index_source`.
        out: the run's folder.
        overrides: "key=value" changes to a recipe given by name.
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: processes that decode, for a recipe with cache "none"; by default one a core, 16 at most.
        max_steps: stop after that many steps with a checkpoint, for trying things out.

    Returns:
        The file of the finished encoder, or the run's folder when `max_steps` came first.

    Raises:
        UsageError, SourceError: recipe or data that cannot be used, a corpus smaller than one batch among them.
        TrainingError: a folder with another run in it, or a loss that is not finite.
    """
    if overrides and not isinstance(recipe, str):
        raise UsageError("overrides change a recipe given by name; change a Recipe with dataclasses.replace")
    recipe = get_recipe(recipe, overrides) if isinstance(recipe, str) else recipe
    target = resolve_device(device)
    _check_compiler(recipe, target)
    kept_patches(recipe.num_patches, recipe.mask_ratio)  # fails now and not after the corpus has been read
    autocast = _autocast(recipe, target)
    index = index_source(data)
    steps_per_epoch(recipe, len(index))  # a corpus smaller than one batch starts no run
    paths = [os.fspath(path) for path in ([data] if isinstance(data, str | os.PathLike) else data)]
    options = [("--data", path) for path in paths] + [("--set", change) for change in overrides]
    command = " ".join(["micl-zoo train", recipe.name, *(f"{name} {shlex.quote(word)}" for name, word in options)])
    facts = {"source": " ".join(paths), "images": len(index), "fingerprint": index.fingerprint()}
    run = RunDir.open(Path(out), run_record(recipe, facts, command, target))
    if run.finished_encoder is not None:
        return run.finished_encoder

    corpus: Corpus
    if recipe.cache == "memory":
        with progress("decoding the corpus", len(index)) as tick:
            corpus = MemoryCorpus.load(index, recipe.source_size, tick=tick)
        corpus.images = corpus.images.to(target)
    else:
        corpus = StreamedCorpus(index, default_workers() if workers is None else workers, [])
    total_steps = max(1, round(recipe.epochs * steps_per_epoch(recipe, len(corpus))))

    vit = make_vit(recipe)
    init_weights(vit, generator=seeded(recipe.seed, 2))  # on the CPU: the same weights for every device
    vit.to(target)
    model = MiCL(vit, mask_ratio=recipe.mask_ratio, kappa=recipe.kappa, temperature=recipe.temperature).train()
    for block in vit.blocks:
        block.attn.fused_attn &= target.type != "cpu"  # for 13 to 20 tokens the CPU's fused backward is the slower one
    if recipe.compile:
        vit.blocks.compile()
    optimizer = make_optimizer(vit, recipe)
    first_step, seconds_before = run.load_checkpoint(vit, optimizer)
    run.forget_after(first_step)

    last_step = min(total_steps, max_steps or total_steps)
    grid = (recipe.crop_size // recipe.patch_size,) * 2
    clock = _Clock(recipe, seconds_before)
    pending: list[tuple[int, float, torch.Tensor, torch.Tensor]] = []
    with progress(recipe.name, last_step, done=first_step, unit="steps") as tick:
        for step, batch, draws in corpus.batches(recipe, first_step, last_step):
            lr = learning_rate(recipe, step, total_steps)
            set_learning_rate(optimizer, lr)
            batch = type(batch)(*(tensor.to(target, non_blocking=True) for tensor in batch))
            patches, views = visible_patches(batch, draws, recipe)  # (B, 2, K/2, P), (B, 2, K/2)
            with torch.autocast(target.type, autocast or torch.bfloat16, enabled=autocast is not None):
                output = model.contrast(patches, views, grid)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            pending.append((step, lr, output.loss.detach(), output.accuracy))

            finished = step + 1 == last_step
            if len(pending) == FLUSH_STEPS or finished:
                lines = _lines(pending, len(corpus), recipe, clock)
                _check(lines, recipe, total_steps, clock)
                run.log(lines)
                _show(tick, lines, last_step)
                pending.clear()
                if finished or clock.checkpoint_due():
                    run.save_checkpoint(step + 1, clock.seconds(), vit, optimizer)
    if last_step < total_steps:
        return run.path

    run.record["data"]["refused"] = [list(refused) for refused in corpus.refused]
    run.record["result"] = {
        "steps": total_steps,
        "images_seen": total_steps * recipe.batch_size,
        "hours": round(clock.seconds() / 3600, 3),
        "precision": "fp32" if autocast is None else "bf16",
    }
    run.save_record()
    return run.save_encoder(vit, recipe)


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


def _check_compiler(recipe: Recipe, device: torch.device) -> None:
    """Before anything is written: compiling for the CPU needs a C++ compiler."""
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"]
    if recipe.compile and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise TrainingError("compile=true needs a C++ compiler, none was found: install one, or --set compile=false")


class _Clock:
    """Seconds of training, earlier pieces of the run included; when a checkpoint is due; whether collapse was told."""

    def __init__(self, recipe: Recipe, seconds_before: float) -> None:
        self.start = self.last_lines = self.last_checkpoint = time.monotonic()
        self.warned = False
        self.before, self.every = seconds_before, 60 * recipe.checkpoint_minutes

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start

    def lap(self) -> float:
        now = time.monotonic()
        lap, self.last_lines = now - self.last_lines, now
        return max(lap, 1e-9)

    def checkpoint_due(self) -> bool:
        if due := time.monotonic() - self.last_checkpoint >= self.every:
            self.last_checkpoint = time.monotonic()
        return due


def _autocast(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    fast = recipe.precision == "auto" and bf16_is_fast(device)
    return torch.bfloat16 if fast or recipe.precision == "bf16" else None


def _lines(
    pending: list[tuple[int, float, torch.Tensor, torch.Tensor]], images: int, recipe: Recipe, clock: _Clock
) -> list[dict[str, Any]]:
    rate = len(pending) * recipe.batch_size / clock.lap()
    return [
        {
            "step": step,
            "epoch": round(step / steps_per_epoch(recipe, images), 4),
            "loss": loss.item(),
            "accuracy": accuracy.item(),
            "lr": lr,
            "images_per_second": round(rate, 1),
            "seconds": round(clock.seconds(), 1),
        }
        for step, lr, loss, accuracy in pending
    ]


def _check(lines: list[dict[str, Any]], recipe: Recipe, total_steps: int, clock: _Clock) -> None:
    """Stop on a loss that is not finite, warn at one that stays at ln(batch)."""
    for line in lines:
        if not math.isfinite(line["loss"]):
            raise TrainingError(
                f"the loss is {line['loss']} at step {line['step']}: stopped. Checkpoints are only written of "
                f"finite losses. Try --set base_lr={recipe.base_lr / 2:g} or --set precision=fp32 in a new --out."
            )
    mean = sum(line["loss"] for line in lines) / len(lines)
    warmed_up = lines[0]["step"] > total_steps * recipe.warmup_epochs / recipe.epochs
    if warmed_up and not clock.warned and mean > COLLAPSE * math.log(recipe.batch_size):
        clock.warned = True
        log.warning(
            "the loss is %.3f, that of a network which gives every image the same embedding (ln %d = %.3f): "
            "lower base_lr or lengthen warmup_epochs",
            mean, recipe.batch_size, math.log(recipe.batch_size),
        )  # fmt: skip


def _show(tick: Tick, lines: list[dict[str, Any]], last_step: int) -> None:
    line = lines[-1]
    rate = line["images_per_second"]
    tick(len(lines), f"loss {line['loss']:.3f}  accuracy {line['accuracy']:.2f}  {rate:,.0f} images/s")
