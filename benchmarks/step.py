"""A training step beside a straightforward implementation of the same method, in turn on the same batch; a record.

    python benchmarks/step.py vit_b16.in1k --batch-size 64 -o benchmarks/records/step-vit_b16.json

Both start from the same cut images, uint8 on the device, and take an AdamW step. The straightforward one normalises the
whole crops, embeds all patches, drops those that no view sees, and runs the blocks eagerly under autocast. With --start
there is a third, the step that `micl-zoo adapt` takes of a network of the same shape: positions of its own that are
trained, rates by block, gradients clipped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import click
import torch
from contest import in_turn, spread
from record import write
from torch import Tensor

from micl_zoo.encoders.build import build_model
from micl_zoo.encoders.device import autocasting, resolve_device
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.training.micl import MiCL, contrastive_loss, draw_views, gather_patches
from micl_zoo.training.pretraining.bench import (
    CPU_BATCH,
    WARM_UP_STEPS,
    at_a_size_that_fits,
    device_name,
    matrix_rate,
    timed,
)
from micl_zoo.training.pretraining.data import draw, normalise
from micl_zoo.training.pretraining.plan import PAPER_EPOCHS, PAPER_GPUS, PAPER_IMAGES, PAPER_TFLOPS, step_flops
from micl_zoo.training.pretraining.pretrain import make_model
from micl_zoo.training.pretraining.start import Start
from micl_zoo.training.pretraining.step import TrainStep
from micl_zoo.training.recipes import Recipe, get_recipe
from micl_zoo.training.run.optim import set_learning_rate
from micl_zoo.training.run.provenance import made_with
from micl_zoo.training.run.rundir import encoder_config
from micl_zoo.training.run.step import resolve_autocast

LEARNING_RATE = 1e-6


@click.command()
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one number of the recipe.")
@click.option("--batch-size", type=click.IntRange(2), help="Images per step.  [default: the recipe's, until it fits]")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Steps of each, in turn.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--start", is_flag=True, help="Time a step that goes on from an encoder of that shape, too.")
@click.option("--trial", is_flag=True, help="One round of one block, eight images, no compiler.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Record to write.")
def main(
    recipe: str,
    overrides: tuple[str, ...],
    batch_size: int | None,
    rounds: int,
    device: str,
    start: bool,
    trial: bool,
    out: Path,
) -> None:
    """Time a step of RECIPE both ways."""
    if trial:
        overrides, batch_size, rounds = ("depth=1", "compile=false", *overrides), 8, 1
    record = compare(get_recipe(recipe, overrides), batch_size, rounds, resolve_device(device), start=start)
    options = "".join(f" --set {change}" for change in overrides) + " --start" * start
    record["command"] = f"python benchmarks/step.py {recipe}{options} --batch-size {record['batch_size']}"
    write(record, out)
    click.echo(json.dumps(record, indent=1))


def compare(
    recipe: Recipe, batch_size: int | None, rounds: int, device: torch.device, *, start: bool = False
) -> dict[str, object]:
    """The record of both, at the largest batch that fits into a GPU's memory for both of them."""
    size = batch_size or (recipe.contrast_size if device.type == "cuda" else CPU_BATCH)
    return at_a_size_that_fits(recipe, size, batch_size is None, lambda sized: _compare(sized, rounds, device, start))[
        1
    ]


def _compare(recipe: Recipe, rounds: int, device: torch.device, start: bool) -> dict[str, object]:
    autocast = resolve_autocast(recipe, device)
    shape = (recipe.batch_size, 3, recipe.crop_size, recipe.crop_size)
    crops = torch.randint(256, shape, dtype=torch.uint8, device=device)
    noise = draw(recipe, 0).noise.to(device)
    ways = {"ours": ours(recipe, device, autocast), "straightforward": straightforward(recipe, device, autocast)}
    if start:
        ways["from a start"] = from_a_start(recipe, device, autocast)
    losses = {name: float(step(crops, noise)) for name, step in ways.items()}  # the first step: equal weights
    peak: dict[str, float] = {}
    for name, step in ways.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(WARM_UP_STEPS):
            step(crops, noise)
        if device.type == "cuda":
            peak[name] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    matrix = matrix_rate(device, autocast or torch.float32)
    seconds = in_turn(recipe.name, ways, rounds, lambda name: timed(lambda: ways[name](crops, noise), device))
    matrix = max(matrix, matrix_rate(device, autocast or torch.float32))
    rates = {name: recipe.batch_size / spread(times)[0] for name, times in seconds.items()}
    flops = step_flops(recipe).total
    mfu = rates["ours"] * flops / matrix
    return {
        "recipe": recipe.name,
        "batch_size": recipe.batch_size,
        "precision": "fp32" if autocast is None else "bf16",
        "compiled": recipe.compile,
        "images_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "ratio": round(rates["ours"] / rates["straightforward"], 3),
        **({"start_ratio": round(rates["from a start"] / rates["ours"], 3)} if start else {}),
        "first_loss": losses,
        "gflop_per_image": round(flops / 1e9, 3),
        "model_tflops": round(rates["ours"] * flops / 1e12, 4),
        "matrix_tflops": round(matrix / 1e12, 4),
        "share_of_matrix_rate": round(mfu, 4),
        "peak_memory_gib": peak,
        "hours_of_800_epochs_on_4_a100_at_that_share": round(
            PAPER_EPOCHS * PAPER_IMAGES * flops / (PAPER_GPUS * PAPER_TFLOPS * 1e12 * mfu) / 3600, 1
        ),
        "device": device_name(device),
        **made_with(device),
    }


def ours(recipe: Recipe, device: torch.device, autocast: torch.dtype | None) -> Callable[[Tensor, Tensor], Tensor]:
    """The step of the training loop, from cut images."""
    return _steps(make_model(recipe, device), recipe, autocast)


def from_a_start(
    recipe: Recipe, device: torch.device, autocast: torch.dtype | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The step of `adapt`, whose network has the recipe's shape and random weights."""
    config = encoder_config(recipe)
    start = Start(Encoder(build_model(config, None), config, record=None, weights_sha256=None))
    adapted = dataclasses.replace(start.recipe(recipe), layer_decay=0.85, clip_norm=1.0)
    return _steps(make_model(adapted, device, start), adapted, autocast)


def _steps(model: MiCL, recipe: Recipe, autocast: torch.dtype | None) -> Callable[[Tensor, Tensor], Tensor]:
    step = TrainStep(model, recipe, autocast=autocast)
    set_learning_rate(step.optimizer, LEARNING_RATE)
    plain = dataclasses.replace(recipe, view_color=False)

    def take(crops: Tensor, noise: Tensor) -> Tensor:
        views = draw_views(noise, recipe.mask_ratio, recipe.views)
        patches = normalise(gather_patches(crops, views, recipe.patch_size).float(), draw(plain, 0), plain)
        return step(patches, views)[0]

    return take


def straightforward(
    recipe: Recipe, device: torch.device, autocast: torch.dtype | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The method as one writes it down first: embed every patch, keep those of the views, eager blocks."""
    model = make_model(dataclasses.replace(recipe, compile=False), device)
    vit = model.vit
    for block in vit.blocks:
        block.attn.fused_attn = True  # torch's scaled_dot_product_attention, what timm takes by itself
    optimizer = torch.optim.AdamW(vit.parameters(), lr=LEARNING_RATE, betas=(recipe.beta1, recipe.beta2))
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (recipe.pixel_mean, recipe.pixel_std))
    positions = model._positions((recipe.crop_size // recipe.patch_size,) * 2, device)

    def take(crops: Tensor, noise: Tensor) -> Tensor:
        pixel_values = (crops.float() / 255 - mean) / std
        views = draw_views(noise, recipe.mask_ratio, recipe.views)  # (B, V, K/V)
        with autocasting(device, autocast):
            tokens = vit.patch_embed.proj(pixel_values).flatten(2).mT + positions[1:]  # (B, N, D)
            rows = torch.arange(len(crops), device=device)[:, None, None]
            kept = tokens[rows, views].flatten(0, 1)  # (VB, K/V, D)
            class_token = (vit.cls_token + positions[:1]).expand(len(kept), -1, -1)
            tokens = vit.norm(vit.blocks(torch.cat([class_token, kept], dim=1)))
            pooled = tokens[:, 0] if recipe.pooled_token == "cls" else tokens[:, 1:].mean(1)
            pooled = pooled.unflatten(0, (-1, recipe.views))
            loss, _ = contrastive_loss(pooled, kappa=recipe.kappa, temperature=recipe.temperature)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return take


if __name__ == "__main__":
    main()
