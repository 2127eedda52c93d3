"""The method against the reference outputs, plain loops in float64, and its own promises."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_vit
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from micl_zoo.errors import UsageError
from micl_zoo.training.micl import (
    MiCL,
    contrastive_loss,
    draw_views,
    gather_patches,
    kept_patches,
    position_table,
    stretched_positions,
)

REFERENCE = Path(__file__).parent / "reference"
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=["parity_a", "parity_b"])
def reference(request: pytest.FixtureRequest) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(REFERENCE / f"{request.param}.safetensors", framework="pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def reference_model(meta: dict[str, str], tensors: dict[str, Tensor]) -> MiCL:
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    vit = VisionTransformer(**{name: int(meta[name]) for name in names}, num_classes=0)
    model = MiCL(
        vit,
        mask_ratio=float(meta["mask_ratio"]),
        kappa=float(meta["kappa"]),
        temperature=float(meta["temperature"]),
    )
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    torch.testing.assert_close(vit.pos_embed.data, state["pos_embed"], **EXACT)  # computed here, before it is loaded
    vit.load_state_dict(state)
    return model


def test_reference_views(reference: tuple[dict[str, str], dict[str, Tensor]]) -> None:
    meta, tensors = reference
    views = draw_views(tensors["noise"], float(meta["mask_ratio"]))
    mask = torch.ones_like(tensors["mask"]).scatter(1, views.flatten(1), 0)
    assert torch.equal(mask, tensors["mask"])
    model = reference_model(meta, tensors)
    grid = model.grid_size
    tokens = model.encode_views(gather_patches(tensors["pixel_values"], views, model.patch_size), views, grid)
    torch.testing.assert_close(tokens.flatten(0, 1), tensors["latent"], **EXACT)  # every token of every view in order


def test_reference_class_tokens_loss_and_gradients(reference: tuple[dict[str, str], dict[str, Tensor]]) -> None:
    meta, tensors = reference
    model = reference_model(meta, tensors)
    output = model(tensors["pixel_values"], tensors["noise"])
    output.loss.backward()
    torch.testing.assert_close(output.pooled.flatten(0, 1), tensors["latent"][:, 0], **EXACT)
    torch.testing.assert_close(output.loss[None], tensors["loss"], **EXACT)
    parameters = dict(model.vit.named_parameters())
    gradients = {key.removeprefix("grad."): value for key, value in tensors.items() if key.startswith("grad.")}
    assert len(gradients) == 3
    for name, gradient in gradients.items():
        torch.testing.assert_close(parameters[name].grad, gradient, **EXACT)


def loss_in_plain_loops(tokens: list[list[list[float]]], kappa: float, temperature: float) -> float:
    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    def similarity(a: list[float], b: list[float]) -> float:
        c = cosine(a, b)
        return 0.5 * (1 + c) / (1 + (1 - c) * kappa) / temperature

    total, pairs = 0.0, list(combinations(range(len(tokens[0])), 2))
    for image in tokens:
        for a, b in pairs:
            there = sum(math.exp(similarity(image[a], other[b])) for other in tokens)
            back = sum(math.exp(similarity(image[b], other[a])) for other in tokens)
            own = similarity(image[a], image[b])
            total += (math.log(there) - own + math.log(back) - own) / 2
    return total / len(tokens) / len(pairs)


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize(("kappa", "temperature"), [(1 / 64, 0.07), (1.0, 0.5), (0.0, 1.0)])
def test_loss_equals_plain_loops_in_float64(kappa: float, temperature: float, views: int) -> None:
    tokens = torch.randn(7, views, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss, _ = contrastive_loss(tokens, kappa=kappa, temperature=temperature)
    assert loss.item() == pytest.approx(loss_in_plain_loops(tokens.tolist(), kappa, temperature), rel=1e-10)


@pytest.mark.parametrize(
    "choices",
    [
        {"mask_ratio": 0.5},
        {"mask_ratio": 0.2, "views": 3, "class_position": "centre"},
        {"mask_ratio": 0.0, "views": 4, "pooled_token": "mean", "positions": "learned"},
    ],
    ids=lambda choices: "-".join(choices),
)
def test_model_equals_embedding_every_patch_first_in_float64(choices: dict[str, Any]) -> None:
    vit = small_vit().double()
    model = MiCL(vit, **choices)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=generator)
    noise = torch.rand(4, 16, generator=generator)
    everything = vit.patch_embed(pixels) + vit.pos_embed[:, 1:]  # (4, 16, D): what the straightforward way computes
    expected = []
    for image in range(4):
        for order in torch.argsort(noise[image])[: 4 * model.views].split(4):
            tokens = torch.cat([vit.cls_token[0] + vit.pos_embed[0, :1], everything[image, order]])[None]
            tokens = vit.norm(vit.blocks(tokens))[0]
            expected.append(tokens[1:].mean(0) if model.pooled_token == "mean" else tokens[0])
    output = model(pixels, noise)
    torch.testing.assert_close(output.pooled.flatten(0, 1), torch.stack(expected), rtol=1e-10, atol=1e-10)
    assert output.loss.item() == pytest.approx(loss_in_plain_loops(output.pooled.tolist(), 1 / 64, 0.07), rel=1e-10)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.1, 0.33, 0.5, 0.75, 0.8, 0.9, 0.97])
def test_views_are_disjoint_and_of_equal_size(mask_ratio: float, count: int) -> None:
    views = draw_views(torch.rand(5, 196), mask_ratio, count)
    kept = math.floor(196 * (1 - mask_ratio)) // count * count
    assert views.shape == (5, count, kept // count)
    for image in views.flatten(1):
        assert len(set(image.tolist())) == kept


def test_kept_patches_of_the_paper() -> None:
    assert kept_patches(196, 0.8) == 38
    assert kept_patches(196, 0.9) == 18
    assert kept_patches(49, 0.5) == 24


@pytest.mark.parametrize("mask_ratio", [0.99, 0.995])
def test_a_mask_ratio_that_leaves_no_view_is_an_error(mask_ratio: float) -> None:
    with pytest.raises(UsageError, match=r"leaves no patch for two views: use 0\.9897 at most"):
        kept_patches(196, mask_ratio)
    assert kept_patches(196, 0.9897) == 2  # the advice holds


@pytest.mark.parametrize(("views", "word", "limit"), [(2, "two", 0.9199), (3, "three", 0.8799), (4, "four", 0.8399)])
def test_the_advised_mask_ratio_leaves_a_patch_a_view(views: int, word: str, limit: float) -> None:
    with pytest.raises(UsageError, match=f"leaves no patch for {word} views: use {limit} at most"):
        kept_patches(25, 0.99, views)
    assert kept_patches(25, limit, views) == views


@pytest.mark.parametrize("mask_ratio", [-0.1, 1.0, 1.5])
def test_a_mask_ratio_out_of_range_is_an_error(mask_ratio: float) -> None:
    with pytest.raises(UsageError, match="mask_ratio must be at least 0 and below 1"):
        MiCL(small_vit(), mask_ratio=mask_ratio)


def test_other_vits_are_refused_with_the_reason() -> None:
    averaged = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, global_pool="avg")
    with pytest.raises(UsageError, match="global_pool other than 'token'"):
        MiCL(averaged, mask_ratio=0.5)
    registers = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, reg_tokens=4)
    with pytest.raises(UsageError, match="prefix tokens besides the class token"):
        MiCL(registers, mask_ratio=0.5)


def test_pixels_of_a_wrong_shape_are_refused() -> None:
    model = MiCL(small_vit(), mask_ratio=0.5)
    for shape in [(2, 3, 30, 32), (2, 1, 32, 32), (3, 32, 32)]:
        with pytest.raises(UsageError, match=r"must be \(B, 3, H, W\)"):
            model(torch.zeros(shape))


def test_smaller_crops_stretch_the_positions() -> None:
    table = position_table(32, (2, 2), (4, 4))
    fine = position_table(32, (40, 40), (4, 4))  # ten positions to a patch of the full grid
    # The centre of the first of two patches, 0.5 in units of the 4 x 4 grid, lies between fine positions 9 and 10.
    between = (fine[1 + 9 * 40 + 9] + fine[1 + 10 * 40 + 10]) / 2
    torch.testing.assert_close(table[1], between, rtol=0, atol=2e-3)
    assert torch.equal(table[0], torch.zeros(32))
    model = MiCL(small_vit(), mask_ratio=0.0)
    assert torch.isfinite(model(torch.randn(3, 3, 16, 16)).loss)


@pytest.mark.parametrize("grid", [(5, 5), (2, 3)])
def test_the_centre_is_the_position_of_the_middle_patch(grid: tuple[int, int]) -> None:
    full = position_table(32, (5, 5), (5, 5))
    table = position_table(32, grid, (5, 5), class_position="centre")  # smaller crops have the same middle
    torch.testing.assert_close(table[0], full[1 + 12], rtol=0, atol=1e-6)
    assert torch.equal(table[1:], position_table(32, grid, (5, 5))[1:])
    vit = small_vit()
    MiCL(vit, mask_ratio=0.5, class_position="centre")
    torch.testing.assert_close(vit.pos_embed[0, 0], position_table(32, (1, 1), (4, 4))[1])
    assert torch.equal(vit.pos_embed[0, 1:], small_vit().pos_embed[0, 1:])


def between(rows: list[list[Tensor]], down: float, across: float) -> Tensor:
    """The rows of a grid at a place between their centres, at the edge those of the edge."""
    down, across = (min(max(place, 0.0), size - 1.0) for place, size in ((down, len(rows)), (across, len(rows[0]))))
    top, left = min(int(down), len(rows) - 2), min(int(across), len(rows[0]) - 2)
    upper, lower = (row[left] + (across - left) * (row[left + 1] - row[left]) for row in rows[top : top + 2])
    return upper + (down - top) * (lower - upper)


@pytest.mark.parametrize("grid", [(2, 2), (3, 2), (4, 4), (6, 4)])
def test_a_learned_table_is_stretched_as_the_frozen_one(grid: tuple[int, int]) -> None:
    table = torch.randn(1 + 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = [list(row) for row in table[1:].unflatten(0, (4, 4))]
    places = [
        ((i + 0.5) * 4 / grid[0] - 0.5, (j + 0.5) * 4 / grid[1] - 0.5) for i in range(grid[0]) for j in range(grid[1])
    ]
    expected = torch.stack([table[0], *(between(rows, *place) for place in places)])
    torch.testing.assert_close(stretched_positions(table, (4, 4), grid), expected, rtol=1e-10, atol=1e-10)
    # The same places: a frozen table, which is smooth where positions change slowly, agrees with it.
    slow = position_table(128, (4, 4), (4, 4))
    torch.testing.assert_close(
        stretched_positions(slow, (4, 4), (2, 2))[:, 20:32],
        position_table(128, (2, 2), (4, 4))[:, 20:32],
        rtol=0,
        atol=1e-3,
    )


@pytest.mark.parametrize("size", [32, 16])
def test_learned_positions_are_trained(size: int) -> None:
    vit = small_vit()
    before = vit.pos_embed.detach().clone()
    model = MiCL(vit, mask_ratio=0.0, positions="learned")
    assert torch.equal(vit.pos_embed, before)  # left as they were
    model(torch.randn(3, 3, size, size)).loss.backward()
    assert vit.pos_embed.grad is not None
    assert (vit.pos_embed.grad[0].abs().amax(1) > 0).all()  # of every patch, and of the class token


def test_choices_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="views must be at least 2, got 1"):
        MiCL(small_vit(), mask_ratio=0.5, views=1)
    with pytest.raises(UsageError, match="class_position must be zero with learned positions"):
        MiCL(small_vit(), mask_ratio=0.5, class_position="centre", positions="learned")


def test_positions_stay_frozen_and_out_of_the_optimiser() -> None:
    model = MiCL(small_vit(), mask_ratio=0.5)
    model(torch.randn(3, 3, 32, 32)).loss.backward()
    assert not model.vit.pos_embed.requires_grad
    trained = {name for name, p in model.vit.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.vit.named_parameters()} - {"pos_embed"}


def test_the_loss_is_float32_under_autocast() -> None:
    model = MiCL(small_vit(), mask_ratio=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(4, 3, 32, 32))
    assert output.loss.dtype == torch.float32
    tokens = torch.randn(64, 2, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = contrastive_loss(tokens, kappa=1 / 64, temperature=0.07)
    wide, _ = contrastive_loss(tokens.double(), kappa=1 / 64, temperature=0.07)
    assert low.item() == pytest.approx(wide.item(), rel=1e-5)  # a bf16 product would be off by 1e-2


def test_accuracy_counts_matches_both_ways() -> None:
    same = torch.eye(4)[:, None].expand(4, 2, 4)
    assert contrastive_loss(same, kappa=1 / 64, temperature=0.07)[1] == 1
    swapped = torch.stack([torch.eye(4), torch.eye(4).roll(1, 0)], dim=1)
    assert contrastive_loss(swapped, kappa=1 / 64, temperature=0.07)[1] == 0
    three = torch.cat([same, swapped[:, 1:]], dim=1)  # of three pairs of views one matches
    assert contrastive_loss(three, kappa=1 / 64, temperature=0.07)[1].item() == pytest.approx(1 / 3)
