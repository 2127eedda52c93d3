"""The method against the reference outputs, plain loops in float64, and its own promises."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import small_vit
from micl_zoo.training.micl import MiCL, contrastive_loss, draw_views, gather_patches, kept_patches, position_table
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from micl_zoo.errors import UsageError

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

    total = 0.0
    for i, (first, second) in enumerate(tokens):
        there = sum(math.exp(similarity(first, other[1])) for other in tokens)
        back = sum(math.exp(similarity(second, other[0])) for other in tokens)
        own = similarity(*tokens[i])
        total += (math.log(there) - own + math.log(back) - own) / 2
    return total / len(tokens)


@pytest.mark.parametrize(("kappa", "temperature"), [(1 / 64, 0.07), (1.0, 0.5), (0.0, 1.0)])
def test_loss_equals_plain_loops_in_float64(kappa: float, temperature: float) -> None:
    tokens = torch.randn(7, 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss, _ = contrastive_loss(tokens, kappa=kappa, temperature=temperature)
    assert loss.item() == pytest.approx(loss_in_plain_loops(tokens.tolist(), kappa, temperature), rel=1e-10)


def test_model_equals_embedding_every_patch_first_in_float64() -> None:
    vit = small_vit().double()
    model = MiCL(vit, mask_ratio=0.5)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=generator)
    noise = torch.rand(4, 16, generator=generator)
    everything = vit.patch_embed(pixels) + vit.pos_embed[:, 1:]  # (4, 16, D): what the straightforward way computes
    expected = []
    for image in range(4):
        for order in torch.argsort(noise[image])[:8].split(4):
            tokens = torch.cat([vit.cls_token[0] + vit.pos_embed[0, :1], everything[image, order]])[None]
            expected.append(vit.norm(vit.blocks(tokens))[0, 0])
    output = model(pixels, noise)
    torch.testing.assert_close(output.pooled.flatten(0, 1), torch.stack(expected), rtol=1e-10, atol=1e-10)
    assert output.loss.item() == pytest.approx(loss_in_plain_loops(output.pooled.tolist(), 1 / 64, 0.07), rel=1e-10)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.1, 0.33, 0.5, 0.75, 0.8, 0.9, 0.98])
def test_views_are_disjoint_and_of_equal_size(mask_ratio: float) -> None:
    views = draw_views(torch.rand(5, 196), mask_ratio)
    kept = math.floor(196 * (1 - mask_ratio)) // 2 * 2
    assert views.shape == (5, 2, kept // 2)
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
