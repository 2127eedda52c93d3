"""A plan's FLOPs, parameters and bytes are those of the real network; its batch, steps and hours add up."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from micl_zoo.errors import SourceError, UsageError
from micl_zoo.training.micl import MiCL, draw_views, init_weights
from micl_zoo.training.pretraining.plan import (
    GIB,
    format_plan,
    frozen_count,
    make_plan,
    memory_estimate,
    parameter_count,
    step_flops,
)
from micl_zoo.training.pretraining.pretrain import make_vit
from micl_zoo.training.recipes import RECIPES, Recipe, corpus_images, get_recipe, smoke_twin
from micl_zoo.training.run.gpus import GPUS
from micl_zoo.training.run.order import images_per_process
from micl_zoo.training.run.rundir import encoder_config
from micl_zoo.zoo.weights import save_weights

IMAGENET = 1_281_167
SMALL = (
    "image_size=96",
    "crop_size=96",
    "patch_size=8",
    "embed_dim=96",
    "num_heads=3",
    "depth=3",
    "mask_ratio=0.5",
    "batch_size=16",
    "contrast_batch=16",
)


def small_model(recipe: Recipe, *, fused: bool) -> tuple[MiCL, Tensor, Tensor, tuple[int, int]]:
    """A real model of the recipe's shape and the arguments of `contrast` for one batch."""
    vit = make_vit(recipe)
    init_weights(vit, generator=torch.Generator().manual_seed(0))
    for block in vit.blocks:
        block.attn.fused_attn = fused
    vit.set_grad_checkpointing(recipe.activation_checkpointing)
    views = draw_views(torch.rand(recipe.batch_size, recipe.num_patches), recipe.mask_ratio, recipe.views)
    patches = torch.randn(*views.shape, 3 * recipe.patch_size**2)
    side = recipe.crop_size // recipe.patch_size
    model = MiCL(vit, mask_ratio=recipe.mask_ratio, views=recipe.views, pooled_token=recipe.pooled_token)
    return model, patches, views, (side, side)


@pytest.mark.parametrize("choices", [[], ["views=3"], ["views=4", "pooled_token=mean"]], ids=str)
def test_flops_are_those_that_torch_counts(choices: list[str]) -> None:
    """Plain attention, whose products are all counted; pixels get no gradient in either."""
    recipe = get_recipe("vit_b16.in1k", [*SMALL, *choices])
    model, *batch = small_model(recipe, fused=False)
    with FlopCounterMode(display=False) as counter:
        model.contrast(*batch).loss.backward()
    counted = counter.get_total_flops() / recipe.batch_size
    assert step_flops(recipe).total == pytest.approx(counted, rel=0.02)


def test_vit_l16_takes_73_gflop_an_image() -> None:
    flops = step_flops(get_recipe("vit_l16.in1k"))
    assert flops.total / 1e9 == pytest.approx(73, abs=0.5)
    assert flops.blocks == 40 * 2 * 24 * 12 * 1024**2 * 3
    assert flops.similarity < 0.001 * flops.total
    everyone = step_flops(get_recipe("vit_l16.in1k", ["negatives=global"]))
    assert everyone.similarity == 4 * flops.similarity < 0.001 * everyone.total


@pytest.mark.parametrize(
    "recipe", [*map(smoke_twin, (make() for make in RECIPES.values())), get_recipe("vit_ti16.tin200")]
)
def test_parameters_are_those_of_the_vit(recipe: Recipe) -> None:
    counts = {name: parameter.numel() for name, parameter in make_vit(recipe).named_parameters()}
    learned = dataclasses.replace(recipe, positions="learned")
    assert (parameter_count(learned), frozen_count(learned)) == (sum(counts.values()), 0)
    assert frozen_count(recipe) == counts.pop("pos_embed")
    assert parameter_count(recipe) == sum(counts.values())


@pytest.mark.parametrize(("views", "checkpointing"), [(2, "false"), (3, "false"), (2, "true")])
def test_memory_counts_what_autograd_keeps(views: int, checkpointing: str) -> None:
    """Without checkpointing within 3 %: the formula leaves out the norms' means and attention's log-sums."""
    recipe = get_recipe("vit_b16.in1k", [*SMALL, f"views={views}", f"activation_checkpointing={checkpointing}"])
    model, *batch = small_model(recipe, fused=True)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model.contrast(*batch)
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    memory = memory_estimate(recipe, images_per_gpu=recipe.batch_size, gpus=1)
    if recipe.activation_checkpointing:  # at the end of the forward pass, before a block is computed again
        whole = memory_estimate(get_recipe("vit_b16.in1k", SMALL), images_per_gpu=recipe.batch_size, gpus=1)
        assert counted < memory.activations + memory.casts + memory.loss / 2
        assert memory.activations < 0.6 * whole.activations
    else:
        pairs = math.comb(views, 2)
        kept_of_loss = memory.loss * pairs / (pairs + 1)
        assert memory.activations + memory.casts + kept_of_loss == pytest.approx(counted, rel=0.03)


def test_fsdp_divides_what_ddp_repeats() -> None:
    recipe = get_recipe("vit_l16.in1k")
    ddp = memory_estimate(recipe, images_per_gpu=100, gpus=4)
    fsdp = memory_estimate(dataclasses.replace(recipe, parallel="fsdp"), images_per_gpu=100, gpus=4)
    assert ddp.gradients == 4 * parameter_count(recipe)
    assert ddp.adamw == 2 * ddp.gradients
    assert (fsdp.gradients, fsdp.adamw) == (ddp.gradients / 4, ddp.adamw / 4)
    assert fsdp.weights < ddp.weights
    assert fsdp.activations == ddp.activations


def test_the_paper_s_run() -> None:
    plan = make_plan(get_recipe("vit_l16.in1k"), images=IMAGENET, gpus=4)
    assert (plan.world, plan.images_per_process, plan.share, plan.turns, plan.chunks) == (4, 1800, 1800, 1, 1)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (177, 177 * 800, 177 * 40)
    assert (plan.kept, plan.view_tokens, plan.passes) == (38, 20, 1)
    assert plan.recipe.lr == pytest.approx(1.40625e-3)
    assert plan.paper is not None
    assert plan.paper.images_per_second == pytest.approx(2141, abs=1)
    assert plan.paper.mfu == pytest.approx(73e9 * 2141 / (4 * 312e12), rel=0.01)
    assert plan.paper.hours == pytest.approx(133 * plan.paper.mfu / 0.5)
    text = format_plan(plan)
    for line in (
        "1,800 images a GPU x 4 GPUs x 1 turn = 7,200 an optimiser step",
        "5e-05 x 7,200 / 256 = 0.00140625",
        "1,281,167 // 7,200 = 177 an epoch, x 800 epochs = 141,600, the first 7,080 warm-up",
        "72.8 GFLOP an image",
        "133 h on 4 A100: 800 epochs x 1,281,167 / 478,800 s = 2,141 images/s (535 if 200)",
        "= 12.5% MFU; at 50% the same 4 take 33.2 h",
    ):
        assert line in text
    assert "GradCache" not in text


def test_other_choices_of_the_method_are_in_the_plan() -> None:
    plan = make_plan(get_recipe("vit_l16.in1k", ["views=4", "positions=learned"]), images=IMAGENET, gpus=4)
    assert (plan.kept, plan.view_tokens, plan.frozen, plan.paper) == (36, 10, 0, None)
    text = format_plan(plan)
    assert "K = 36 kept at mask ratio 0.8: 4 views x (9 + class) = 40 tokens" in text
    assert "6 pairs of views are contrasted, the loss is their mean" in text
    assert f"{plan.parameters:,} parameters, positions among them" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_smaller_micro_batch_is_gradcache() -> None:
    recipe = get_recipe("vit_l16.in1k")
    whole, pieces = (make_plan(recipe, images=IMAGENET, gpus=2, micro_batch=most) for most in (None, 500))
    assert (whole.turns, pieces.turns, pieces.chunks, pieces.micro_batch) == (2, 2, 4, 450)
    assert pieces.total_flops == pytest.approx(whole.total_flops * 4 / 3)
    assert pieces.cards[3].hours == pytest.approx(whole.cards[3].hours * 4 / 3)
    assert pieces.memory.total < whole.memory.total / 2
    assert "1,800 images a GPU x 2 GPUs x 2 turns (gradients add up) = 7,200" in format_plan(pieces)
    assert "GradCache  1,800 = 4 x 450 a pass" in format_plan(pieces)
    assert "images x 4/3" in format_plan(pieces)
    assert "GradCache" not in format_plan(whole)
    assert make_plan(recipe, images=IMAGENET, micro_batch=5000).micro_batch == 1800


@pytest.mark.parametrize("share", [7, 10, 97, 1800])
@pytest.mark.parametrize("most", [1, 3, 4, 50, 96])
def test_pieces_are_those_of_torch_chunk(share: int, most: int) -> None:
    recipe = get_recipe("vit_l16.in1k", [f"batch_size={share}", f"contrast_batch={share}"])
    plan = make_plan(recipe, images=IMAGENET, micro_batch=most)
    pieces = torch.arange(share).chunk(math.ceil(share / most))
    assert plan.micro_batch == len(pieces[0]) <= most or plan.chunks == 1
    assert plan.chunks == len(pieces)


def test_global_negatives_are_shared_by_all_gpus() -> None:
    recipe = get_recipe("vit_l16.in1k", ["negatives=global", "activation_checkpointing=true"])
    plan = make_plan(recipe, images=IMAGENET, gpus=8, nodes=2, micro_batch=225)
    assert (plan.world, plan.images_per_process, plan.share, plan.turns, plan.chunks) == (16, 450, 450, 1, 2)
    assert plan.passes == 5 / 3
    assert "16 GPUs (2 nodes x 8)" in format_plan(plan)
    assert "global: all 7,200 images among themselves, 7,199 negatives each" in format_plan(plan)


def test_cards_name_the_micro_batch_that_fits() -> None:
    recipe = get_recipe("vit_l16.in1k")
    plan = make_plan(recipe, images=IMAGENET, gpus=4)
    assert any(not row.fits for row in plan.cards)
    for row in plan.cards:
        again = make_plan(recipe, images=IMAGENET, gpus=4, micro_batch=row.micro_batch)
        there = next(other for other in again.cards if other.card == row.card)
        assert there.fits
        assert again.memory.total <= 0.9 * row.card.memory_gib * GIB
        assert (there.hours, there.images_per_second) == (row.hours, row.images_per_second)
        rate = 4 * row.card.bf16_tflops * 1e12 * 0.5 / (again.flops.total * again.passes)
        assert row.images_per_second == pytest.approx(rate)
        assert row.hours == pytest.approx(plan.images_seen / rate / 3600)
        assert (f"does not fit, --micro-batch {row.micro_batch} would" in format_plan(plan)) != row.fits
    huge = make_plan(dataclasses.replace(recipe, cache="memory"), images=IMAGENET, gpus=4)  # 252 GB on each GPU
    assert {row.micro_batch for row in huge.cards} == {0}
    assert format_plan(huge).count("does not fit at any --micro-batch") == len(GPUS)


def test_the_encoder_s_file_has_the_planned_size(tmp_path: Path) -> None:
    recipe = get_recipe("vit_ti16.tin200")
    file = save_weights(tmp_path, make_vit(recipe).state_dict(), encoder_config(recipe), {}, recipe.save_dtype)
    plan = make_plan(recipe, images=100_000)
    assert file.stat().st_size == pytest.approx(plan.encoder_bytes, rel=0.01)
    assert plan.checkpoint_bytes == pytest.approx(3 * 4 * parameter_count(recipe), rel=0.01)
    assert plan.disk_bytes == plan.encoder_bytes + 3 * plan.checkpoint_bytes
    assert make_plan(get_recipe("vit_l16.in1k"), images=IMAGENET).lasting_checkpoints == 8


@pytest.mark.parametrize(
    ("name", "changes", "world", "ways"),
    [
        ("vit_l16.in1k", [], 8, ["use 1, 2 or 4 GPUs", "--set contrast_batch=900 (", "--set negatives=global ("]),
        ("vit_l16.in1k", [], 3, ["use 1, 2 or 4 GPUs", "--set contrast_batch=1200 (", "--set negatives=global ("]),
        ("vit_l16.in1k", [], 7, ["use 1, 2 or 4 GPUs", "--set batch_size=12600 ("]),
        ("vit_s16.tin200", [], 2, ["use 1 GPU", "--set contrast_batch=1024 (", "--set negatives=global ("]),
        ("vit_s16.tin200", [], 3, ["use 1 GPU", "--set batch_size=6144 --set contrast_batch=2048 ("]),
        ("vit_s16.tin200", ["negatives=global"], 3, ["use 1, 2 or 4 GPUs", "--set batch_size=2049 ("]),
        ("vit_s16.tin200", ["negatives=global"], 4096, ["use 512, 1024 or 2048 GPUs", "--set batch_size=4096 ("]),
    ],
)
def test_processes_that_cannot_share_are_told_what_works(
    name: str, changes: list[str], world: int, ways: list[str]
) -> None:
    recipe = get_recipe(name, changes)
    with pytest.raises(UsageError) as caught:
        images_per_process(recipe, world)
    text = str(caught.value)
    assert f"negatives={recipe.negatives} contrasts " in text
    assert f"{world} processes cannot share" in text
    for way in ways:
        assert way in text
        counts = [int(number) for number in re.findall(r"\d+", way)] if way.startswith("use") else [world]
        changed = get_recipe(name, [*changes, *re.findall(r"--set (\S+)", way)])
        for count in counts:
            assert images_per_process(changed, count) * count == changed.batch_size


def test_plans_that_cannot_be() -> None:
    recipe = get_recipe("vit_ti16.tin200")
    for word in ("gpus", "nodes", "micro_batch"):
        with pytest.raises(UsageError, match=f"{word} must be at least 1, got 0"):
            make_plan(recipe, images=1000, **{word: 0})
    with pytest.raises(UsageError, match="mfu is a share of the card's peak, above 0 and at most 1, got 50"):
        make_plan(recipe, images=1000, mfu=50)
    with pytest.raises(SourceError, match="the corpus has 100 usable images"):
        make_plan(recipe, images=100)
    with pytest.raises(UsageError, match="leaves no patch for three views"):
        make_plan(get_recipe("vit_ti16.tin200", ["mask_ratio=0.99"]), images=1000)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("small", [False, True])
def test_every_recipe_s_plan_is_one_narrow_screen(name: str, small: bool) -> None:
    recipe = smoke_twin(get_recipe(name)) if small else get_recipe(name)
    plan = make_plan(recipe, images=corpus_images(recipe), micro_batch=max(1, recipe.contrast_size // 3))
    lines = format_plan(plan).splitlines()
    assert lines[0].startswith(f"{recipe.name}, {corpus_images(recipe):,} images, 1 GPU:")
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 34
    assert (plan.paper is not None) == (recipe.name in {"vit_l16.in1k", "vit_l16.in1k-color"})


def test_importing_a_plan_is_light() -> None:
    code = "import sys, micl_zoo.training.pretraining.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
