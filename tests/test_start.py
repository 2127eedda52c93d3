"""Starting from an encoder: the method equals timm's own pass, refuses what it cannot train, and keeps its promises."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from conftest import TWIN
from safetensors.torch import load_file
from test_pretrain import RECIPE, goes_on, half_a_record, killed_after, losses, newest, rolls_back, same_end
from test_ranks import BATCH, FSDP, Case, assert_same, by_groups, make_step, on_ranks, result, seen
from timm.models import save_for_hf
from torch import Tensor, nn

import micl_zoo
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.errors import TrainingError, UsageError
from micl_zoo.extraction.processes import python
from micl_zoo.files import file_sha256
from micl_zoo.training.micl import MiCL, Pooled, gather_patches, stretched_positions
from micl_zoo.training.pretraining import change
from micl_zoo.training.pretraining import pretrain as module
from micl_zoo.training.pretraining.pretrain import initial_model, pretrain
from micl_zoo.training.pretraining.start import NETWORK, Start
from micl_zoo.training.recipes import Recipe, get_recipe
from micl_zoo.training.run.optim import make_optimizer, set_learning_rate
from micl_zoo.zoo.weights import header

VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3}
# One of each way to make tokens and rows: timm's name, its arguments, what is contrasted.
FAMILIES: dict[str, tuple[str, dict[str, Any], Pooled]] = {
    "plain": ("vit_tiny_patch16_224", {"img_size": 64}, "cls"),
    "plain, mean of patches": ("vit_tiny_patch16_224", {"img_size": 64}, "mean"),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "init_values": 0.1}, "cls"),
    "DINOv2 giant": ("vit_giant_patch14_dinov2", {"img_size": 56}, "cls"),
    "TIPSv2": ("vit_base_patch14_reg1_tipsv2", {"img_size": 56}, "cls"),
    "SigLIP": ("vit_base_patch16_siglip_224", {"img_size": 64}, "native"),
    "CLIP": ("vit_base_patch16_clip_224", {"img_size": 64, "num_classes": 512}, "projection"),
    "DeiT-3": ("deit3_small_patch16_224", {"img_size": 64}, "cls"),
    "mean pooling with a norm after it": ("vit_base_patch16_rpn_224", {"img_size": 64}, "native"),
    "EVA": ("eva_giant_patch14_224", {"img_size": 56}, "native"),
    "EVA-02": ("eva02_tiny_patch14_224", {"img_size": 56}, "native"),
    "DINOv3": ("vit_small_patch16_dinov3", {"img_size": 64}, "cls"),
    "PE": ("vit_pe_core_base_patch16_224", {"img_size": 64}, "native"),
    "rope, axial": ("vit_small_patch16_rope_224", {"img_size": 64}, "cls"),
    "rope, mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": 64}, "cls"),
    "rope, mixed, and a table": ("vit_small_patch16_rope_mixed_ape_224", {"img_size": 64}, "cls"),
}


def toy(architecture: str, **arguments: Any) -> Any:
    """A small model of timm's with random weights, none of them trivial."""
    if not timm.is_model(architecture):
        pytest.skip(f"timm {timm.__version__} has no {architecture}")
    model = timm.create_model(architecture, pretrained=False, **{"num_classes": 0, **VIT, **arguments}).eval()
    generator = torch.Generator().manual_seed(3)
    for name, one in model.named_parameters():
        nn.init.normal_(one, mean=float(one.ndim == 1 and name.endswith("weight")), std=0.1, generator=generator)
    return model


def model_of(family: str) -> Any:
    architecture, arguments, _ = FAMILIES[family]
    return toy(architecture, **arguments)


def method(family: str, vit: Any) -> MiCL:
    return MiCL(vit, mask_ratio=0.5, positions="own", pooled_token=FAMILIES[family][2])


def pixels_of(vit: Any, grid: tuple[int, int] | None = None, count: int = 2) -> Tensor:
    (side, _), (down, across) = vit.patch_embed.patch_size, grid or vit.patch_embed.grid_size
    return torch.randn(count, 3, down * side, across * side, generator=torch.Generator().manual_seed(1))


def all_patches(pixels: Tensor, side: int) -> Tensor:
    """One view with all of them, in order: (B, 1, N)."""
    return torch.arange(pixels.shape[2] // side * (pixels.shape[3] // side)).expand(len(pixels), 1, -1)


def passed(model: MiCL, pixels: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B, V, R + K/V, D) and what is contrasted (B, V, D)."""
    side = model.patch_size
    given = (gather_patches(pixels, views, side), views, (pixels.shape[2] // side, pixels.shape[3] // side))
    return model.encode_views(*given), model.pool_views(*given)


def timm_row(vit: Any, tokens: Tensor, pooled: Pooled) -> Tensor:
    if pooled == "mean":
        return tokens[:, vit.num_prefix_tokens :].mean(1)
    return tokens[:, 0] if pooled == "cls" else vit.forward_head(tokens, pre_logits=pooled == "native")


def by_timm_s_blocks(vit: Any, pixels: Tensor, views: Tensor) -> Tensor:
    """The oracle: all patches are embedded and given their positions, then those of a view go through the blocks."""
    found = vit._pos_embed(vit.patch_embed(pixels))
    tokens, rope = found if isinstance(found, tuple) else (found, None)
    first, made = vit.num_prefix_tokens, []
    for image, sets in zip(tokens, views, strict=True):
        for view in sets:
            rows = vit.norm_pre(torch.cat([image[:first], image[first + view]])[None])
            for number, block in enumerate(vit.blocks):
                if rope is None:
                    rows = block(rows)
                else:
                    rows = block(rows, rope=(rope[number] if vit.rope_mixed else rope)[..., view, :])
            made.append(vit.norm(rows)[0])
    return torch.stack(made).unflatten(0, views.shape[:2])


def two_views(vit: Any, pixels: Tensor) -> Tensor:
    """A third of the patches in each of two views."""
    side = vit.patch_embed.patch_size[0]
    count = pixels.shape[2] // side * (pixels.shape[3] // side)
    order = torch.rand(len(pixels), count, generator=torch.Generator().manual_seed(2)).argsort(1)
    return order[:, : 2 * (count // 3)].unflatten(1, (2, -1))


def gradients(vit: Any) -> dict[str, Tensor]:
    return {name: one.grad for name, one in vit.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_with_all_patches_in_one_view_it_is_timm_s_own_pass(family: str) -> None:
    vit = model_of(family)
    pixels, model = pixels_of(vit), method(family, vit)
    views = all_patches(pixels, model.patch_size)
    tokens, row = passed(model, pixels, views)
    expected = vit.forward_features(pixels)
    assert expected.std() > 0.1
    near = {"rtol": 1e-5, "atol": 1e-5 * max(1, expected.std().item())}  # without a final norm tokens are larger
    torch.testing.assert_close(tokens[:, 0], expected, **near)
    torch.testing.assert_close(row[:, 0], timm_row(vit, expected, FAMILIES[family][2]), rtol=1e-5, atol=1e-5)
    order = torch.randperm(views.shape[2], generator=torch.Generator().manual_seed(2))
    prefix = torch.arange(vit.num_prefix_tokens)
    shuffled = expected[:, torch.cat([prefix, vit.num_prefix_tokens + order])]
    torch.testing.assert_close(passed(model, pixels, views[..., order])[0][:, 0], shuffled, **near)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_views_of_a_masked_image_go_through_timm_s_blocks(family: str) -> None:
    vit = model_of(family)
    pixels = pixels_of(vit)
    views, pooled = two_views(vit, pixels), FAMILIES[family][2]
    tokens, rows = passed(method(family, vit), pixels, views)
    expected = by_timm_s_blocks(vit, pixels, views)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.flatten(0, 1), timm_row(vit, expected.flatten(0, 1), pooled), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(3, 2), (5, 5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_crops_of_another_size_see_what_timm_makes_for_it(family: str, grid: tuple[int, int]) -> None:
    vit = model_of(family)
    other, model, pixels = copy.deepcopy(vit), method(family, vit), pixels_of(vit, grid)
    other.set_input_size(img_size=tuple(pixels.shape[2:]))
    if vit.pos_embed is not None:  # a table is stretched in the method's own way, see test_micl
        table = stretched_positions(vit.pos_embed.detach()[0], vit.patch_embed.grid_size, grid)
        other.pos_embed = nn.Parameter(table[None])
    with torch.no_grad():
        tokens, _ = passed(model, pixels, all_patches(pixels, model.patch_size))
        torch.testing.assert_close(tokens[:, 0], other.forward_features(pixels), rtol=1e-5, atol=1e-5)
        views = two_views(vit, pixels)
        torch.testing.assert_close(
            passed(model, pixels, views)[0], by_timm_s_blocks(other, pixels, views), rtol=1e-5, atol=1e-5
        )
    model(pixels).loss.backward()
    learnt = set(gradients(vit))
    vit.zero_grad()
    model(pixels_of(vit)).loss.backward()
    assert learnt == set(gradients(vit))  # learned rotary positions among them


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_blocks_give_equal_gradients_and_bf16_is_near(family: str) -> None:
    vit = model_of(family)
    model, pixels = method(family, vit), pixels_of(vit, count=4)
    noise = torch.rand(4, vit.patch_embed.num_patches, generator=torch.Generator().manual_seed(2))
    output = model(pixels, noise)
    output.loss.backward()
    once = gradients(vit)
    vit.zero_grad()
    vit.set_grad_checkpointing()
    model(pixels, noise).loss.backward()
    again = gradients(vit)
    assert once.keys() == again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        low = model(pixels, noise)
    assert low.loss.dtype == torch.float32
    near, exact = (nn.functional.normalize(one.pooled.float(), dim=-1) for one in (low, output))
    torch.testing.assert_close(near, exact, rtol=0, atol=2e-2)
    assert (near * exact).sum(-1).min() > 0.999


# What cannot be trained, with a word of the reason.
STAGES = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "CNN": ("resnet18", {"layers": (1, 1, 1, 1)}, "a ResNet of timm: it does not take patches as tokens"),
    "Swin": ("swin_tiny_patch4_window7_224", {"img_size": 56, **STAGES}, "does not take patches as tokens"),
    "NaFlex": ("naflexvit_base_patch16_gap", VIT, "images of any shape"),
    "BEiT": ("beit_base_patch16_224", {"img_size": 64, **VIT}, "table of relative positions"),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64, **VIT}, "second class token"),
    "stem": ("vit_tiny_r_s16_p8_224", {"img_size": 64, **VIT}, "convolutions that see their neighbours"),
    "no square": ("vit_tiny_patch16_224", {"img_size": 64, "patch_size": (16, 8), **VIT}, "patches are not squares"),
    "SigLIP": ("vit_base_patch16_siglip_224", {"img_size": 64, **VIT}, "no class token to contrast"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_cannot_be_trained_is_refused_with_the_reason(kind: str) -> None:
    architecture, arguments, reason = OTHERS[kind]
    model = timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)
    with pytest.raises(UsageError, match=f"MiCL cannot train this model.*{reason}"):
        MiCL(model, mask_ratio=0.5, positions="own")


@pytest.mark.parametrize(
    ("pooled", "arguments", "reason"),
    [
        ("cls", {"class_token": False, "global_pool": "avg"}, "no class token to contrast"),
        ("projection", {}, "no projection to contrast"),
        ("native", {"global_pool": ""}, "pools no row to contrast"),
    ],
)
def test_a_row_that_a_model_lacks_is_refused(pooled: Pooled, arguments: dict[str, Any], reason: str) -> None:
    vit = toy("vit_tiny_patch16_224", img_size=64, **arguments)
    with pytest.raises(UsageError, match=reason):
        MiCL(vit, mask_ratio=0.5, positions="own", pooled_token=pooled)


# Runs. What they start from has images and patches of the twin's size.
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "registers": ("vit_small_patch14_reg4_dinov2", {"init_values": 0.1}),
    "CLIP": ("vit_base_patch16_clip_224", {"num_classes": 512}),  # that embeds by its projection
    "SigLIP": ("vit_base_patch16_siglip_224", {}),
    "rpn": ("vit_base_patch16_rpn_224", {}),
    "rope": ("vit_small_patch16_rope_mixed_224", {"img_size": 64}),  # the crops are smaller
    "EVA-02": ("eva02_tiny_patch14_224", {}),
}
OPTIONS = [one for one in TWIN if one.partition("=")[0] not in NETWORK] + ["save_dtype=float32"]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the folder of an encoder to start from as timm does, once."""
    made: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in made:
            architecture, arguments = STARTS[kind]
            arguments = {**SMALL, **arguments}
            model, made[kind] = toy(architecture, **arguments), tmp_path_factory.mktemp("start") / kind
            save_for_hf(model, made[kind], model_args=arguments, safe_serialization=True)
            if kind == "CLIP":
                encoder = micl_zoo.load(made[kind], device="cpu")
                encoder.pool = "projection"
                made[kind] = encoder.save(made[kind] / "projecting").parent
        return made[kind]

    return save


@pytest.fixture
def folder(started: Callable[[str], Path]) -> Path:
    """The encoder that most of these runs start from: a class token, registers, LayerScale."""
    return started("registers")


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at held-out images without other processes and draw none, which takes longer than the runs of this file."""
    made = change.ExtractOptions
    monkeypatch.setattr(change, "ExtractOptions", lambda **how: made(**{**how, "workers": 0}))
    monkeypatch.setattr(module, "draw_neighbours", lambda *_: None)


def state_of(file: Path) -> dict[str, Tensor]:
    return load_file(file if file.is_file() else file / "model.safetensors")


def moved(made: Path, start: Path) -> set[str]:
    """Names of the weights that a run has changed."""
    before, after = state_of(start), state_of(made)
    assert before.keys() == after.keys()
    return {name for name in after if not torch.equal(before[name], after[name])}


def test_the_finished_encoder_is_the_start_with_other_weights(
    folder: Path, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"license": "apache-2.0", "crop_pct": 0.9, "mean": [0.4, 0.5, 0.6]}
    shutil.copytree(folder, tmp_path / "start")
    (tmp_path / "start" / "config.json").write_text(json.dumps(config))
    encoder = micl_zoo.load(tmp_path / "start", device="cpu").requires_grad_(False)
    before, images = copy.deepcopy(encoder.state_dict()), image_folder(24)
    made = pretrain(RECIPE, images, tmp_path / "run", init=encoder, overrides=OPTIONS, device="cpu")
    assert not encoder.changed
    assert not any(one.requires_grad for one in encoder.parameters())
    assert all(torch.equal(one, before[key]) for key, one in encoder.state_dict().items())

    again = micl_zoo.load(made, device="cpu")
    assert moved(made, folder) == set(state_of(made))
    assert (again.transform, again.pool, again.pools) == (encoder.transform, encoder.pool, encoder.pools)
    assert (again.config.license, again.config.architecture) == ("apache-2.0", encoder.config.architecture)
    assert again.embed(sorted(images.glob("*.jpg"))).shape == (12, 32)
    facts = {"encoder": encoder.name, "encoder_sha256": file_sha256(folder / "model.safetensors")}
    facts |= {"source": None, "license": "apache-2.0"}
    said = header(made)["provenance"]
    assert said["encoder"] == facts == json.loads((tmp_path / "run" / "run.json").read_text())["encoder"]
    network = {name: said["recipe"][name] for name in NETWORK}
    assert network["pixel_mean"] == [0.4, 0.5, 0.6]
    assert (network["patch_size"], network["prefix_tokens"], network["pooled_token"]) == (8, 5, "cls")


def test_a_run_starts_from_what_a_run_or_save_has_left(
    folder: Path, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    images, options = image_folder(16), [*OPTIONS, "epochs=1", "warmup_epochs=0"]
    first = pretrain(RECIPE, images, tmp_path / "first", init=folder, overrides=options, device="cpu")
    again = pretrain(RECIPE, images, tmp_path / "second", init=tmp_path / "first", overrides=options, device="cpu")
    assert header(again)["provenance"]["encoder"]["encoder_sha256"] == file_sha256(first)
    encoder = micl_zoo.load(folder, device="cpu")
    with torch.no_grad():
        encoder.vit.cls_token += 1
    made = pretrain(RECIPE, images, tmp_path / "third", init=encoder, overrides=options, device="cpu")
    said = header(made)["provenance"]["encoder"]
    assert (said["encoder"], said["encoder_sha256"]) == encoder.identity()
    saved = encoder.save(tmp_path / "saved")
    assert said["encoder_sha256"] == file_sha256(saved)
    same = pretrain(RECIPE, images, tmp_path / "fourth", init=saved.parent, overrides=options, device="cpu")
    assert all(torch.equal(one, state_of(made)[key]) for key, one in state_of(same).items())
    larger = micl_zoo.load(folder, device="cpu", image_size=64)
    made = pretrain(RECIPE, images, tmp_path / "fifth", init=larger, overrides=options, device="cpu")
    assert state_of(made)["pos_embed"].shape == larger.vit.pos_embed.shape
    assert micl_zoo.load(made, device="cpu").transform == larger.transform
    assert pretrain(RECIPE, images, tmp_path / "smoke", init=folder, smoke=True, device="cpu", max_steps=1).exists()


def test_what_a_start_fixes_of_a_recipe(started: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = {"img_size": 56, **VIT}
    giant = toy("vit_giant_patch14_dinov2", **arguments)
    save_for_hf(giant, tmp_path / "giant", model_args=arguments, safe_serialization=True)
    recipe = Start.open(tmp_path / "giant").recipe(get_recipe("vit_b16.in1k"))
    plain = 4 * 48**2 + sum(one.numel() for one in giant.blocks[0].mlp.parameters() if one.ndim > 1)
    assert 48**2 * (4 + 2 * recipe.mlp_ratio) == pytest.approx(plain, rel=1e-4)
    assert (recipe.image_size, recipe.crop_size, recipe.depth, recipe.num_heads) == (56, 224, 2, 3)
    for side, crop in ((64, 56), (24, 14), (8, 14)):  # whole patches, and one at least
        other = get_recipe(RECIPE, ["image_size=64", "patch_size=8", f"crop_size={side}"])
        assert Start.open(tmp_path / "giant").recipe(other).crop_size == crop
    recipe = Start.open(started("EVA-02")).recipe(get_recipe(RECIPE), OPTIONS)
    assert (recipe.prefix_tokens, recipe.positions, recipe.pooled_token) == (1, "own", "native")
    assert Start.open(started("CLIP")).recipe(get_recipe(RECIPE), OPTIONS).pooled_token == "projection"


@pytest.mark.parametrize("kind", ["registers", "CLIP", "SigLIP"])
def test_the_row_that_is_trained_is_looked_at_with_the_weights_that_are_saved(
    started: Callable[[str], Path],
    image_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    seen_by, look = list[tuple[Encoder, str]](), module.look

    def spy(encoder: Encoder, shown: Any, probes: Any, pool: Any, workers: Any) -> Any:
        seen_by.append((encoder, pool))
        return look(encoder, shown, probes, pool, workers)

    monkeypatch.setattr(module, "look", spy)
    options = [*OPTIONS, "epochs=2", "warmup_epochs=0", "start_share=0.5", "ema_decay=0.5"]
    how: dict[str, Any] = {"init": started(kind), "overrides": options, "device": "cpu"}
    made = pretrain(RECIPE, image_folder(8), tmp_path / "run", **how)
    finished = micl_zoo.load(made, device="cpu")
    assert {pool for _, pool in seen_by} == {finished.pool}
    for (encoder, _), file in zip((seen_by[0], seen_by[-1]), (started(kind), made), strict=True):
        state = encoder.model.state_dict()
        assert all(torch.equal(one, state[key]) for key, one in state_of(file).items())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("registers", ["ema_decay=0.7", "start_share=0.3", "clip_norm=0.5", "layer_decay=0.8"]),
        ("rope", ["views=3", "mask_ratio=0.1"]),
        ("EVA-02", ["frozen_blocks=1"]),
        ("CLIP", ["activation_checkpointing=true"]),
        ("SigLIP", ["cache=none"]),
    ],
)
def test_an_interrupted_run_goes_on_to_the_bit(
    started: Callable[[str], Path], image_folder: Callable[..., Path], tmp_path: Path, kind: str, changes: list[str]
) -> None:
    goes_on(image_folder(16), tmp_path, 3, init=started(kind), overrides=[*OPTIONS, "epochs=3", *changes])


@pytest.mark.slow  # another process, for the path of test_pretrain
def test_a_run_that_is_killed_goes_on(folder: Path, image_folder: Callable[..., Path], tmp_path: Path) -> None:
    images, options = image_folder(16), [*OPTIONS, "epochs=15"]
    code = (
        "from micl_zoo.training.pretraining.pretrain import pretrain; "
        "recipe, data, out, init, *overrides = sys.argv[1:]; "
        "pretrain(recipe, data, out, init=init, overrides=overrides, device='cpu')"
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed_after(2, python(code, RECIPE, str(images), str(killed), str(folder), *options), killed)
    for run in (killed, whole):
        pretrain(RECIPE, images, run, init=folder, overrides=options, device="cpu")
    same_end(whole, killed)
    assert len(losses(whole)) == 30


def test_a_loss_that_is_not_finite_once_is_rolled_back(
    folder: Path, image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = ["ema_decay=0.9", "clip_norm=1", "frozen_embedding=true"]
    rolls_back(image_folder(24), tmp_path, monkeypatch, init=folder, overrides=[*OPTIONS, *choices])


def test_a_damaged_record_is_made_again_with_the_start(
    folder: Path, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    images, run, options = image_folder(16), tmp_path / "run", [*OPTIONS, "epochs=2"]
    how: dict[str, Any] = {"init": folder, "overrides": options, "device": "cpu"}
    pretrain(RECIPE, images, run, max_steps=1, **how)
    before = json.loads((run / "run.json").read_text())
    half_a_record(run)
    pretrain(RECIPE, images, run, **how)
    after = json.loads((run / "run.json").read_text())
    assert (after["encoder"], after["recipe"]) == (before["encoder"], before["recipe"])


def test_another_start_is_another_run(
    started: Callable[[str], Path], folder: Path, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    images, run = image_folder(16), tmp_path / "run"
    pretrain(RECIPE, images, run, init=folder, overrides=OPTIONS, device="cpu", max_steps=1)
    encoder = micl_zoo.load(folder, device="cpu")
    with torch.no_grad():
        encoder.vit.cls_token += 1
    for other, reason in ((encoder, "encoder_sha256"), (started("EVA-02"), "prefix_tokens: 5 there, 1 asked for")):
        with pytest.raises(TrainingError, match=f"holds another run: .*{reason}"):
            pretrain(RECIPE, images, run, init=other, overrides=OPTIONS, device="cpu")
    with pytest.raises(TrainingError, match=r"holds another run: .*positions: 'own' there, 'sincos' asked for"):
        pretrain(RECIPE, images, run, overrides=TWIN, device="cpu")
    pretrain(RECIPE, images, tmp_path / "random", overrides=TWIN, device="cpu", max_steps=1)
    with pytest.raises(TrainingError, match=r"holds another run: .*encoder_sha256: None there"):
        pretrain(RECIPE, images, tmp_path / "random", init=folder, overrides=OPTIONS, device="cpu")
    moved_away = shutil.copytree(folder, tmp_path / "elsewhere")  # the same bytes
    pretrain(RECIPE, images, run, init=moved_away, overrides=OPTIONS, device="cpu", max_steps=2)
    assert len(losses(run)) == 2


def test_starts_that_cannot_be_are_refused(
    started: Callable[[str], Path], folder: Path, tmp_path: Path, twin: Recipe
) -> None:
    def refused(reason: str, init: Any, *overrides: str) -> None:
        with pytest.raises(UsageError, match=reason):
            pretrain(RECIPE, "nowhere", tmp_path / "run", init=init, overrides=[*OPTIONS, *overrides], device="cpu")

    refused("patch_size is that of the encoder that the run starts from", folder, "patch_size=16")
    refused("positions is that of the encoder", folder, "positions=sincos")
    refused("frozen_blocks must be at most depth 2", folder, "frozen_blocks=3")
    refused("weights are in bfloat16.*load it without dtype", micl_zoo.load(folder, device="cpu", dtype="bfloat16"))
    with pytest.raises(UsageError, match="positions=own are those of an encoder to start from"):
        pretrain(RECIPE, "nowhere", tmp_path / "run", overrides=[*TWIN, "positions=own"], device="cpu")
    frozen = ("frozen_positions=true", "frozen_embedding=true", "frozen_blocks=1")
    for given in ("start_share=0.5", "prefix_tokens=5", "pooled_token=native", *frozen):
        with pytest.raises(UsageError, match=f"{given.partition('=')[0]} must be"):
            get_recipe(RECIPE, [*TWIN, given])
    for name in ("onnx", "openvino"):  # of which neither has weights that could be trained
        runtime: Any = SimpleNamespace(model=None, name=name, shapes={"cls": (32,)}, precision=None)
        opened = Encoder(runtime, micl_zoo.load(folder, device="cpu").config, record=None, weights_sha256="0" * 64)
        refused(f"needs the encoder in torch, not in {name}", opened)
    lacking = micl_zoo.load(started("SigLIP"), device="cpu")
    lacking.pool = "cls"
    refused("no class token to contrast", lacking)
    model = timm.create_model("test_resnet", pretrained=False)
    save_for_hf(model, tmp_path / "cnn", safe_serialization=True)
    refused("cannot train this model, a ResNet of timm", tmp_path / "cnn")
    wide = toy("vit_tiny_patch16_224", img_size=(64, 32), pretrained_cfg_overlay={"input_size": (3, 64, 32)})
    save_for_hf(wide, tmp_path / "wide", model_args={**VIT, "img_size": (64, 32)}, safe_serialization=True)
    refused("32 x 64 pixels, and training cuts squares", tmp_path / "wide")
    assert Start.open(tmp_path / "wide", image_size=32).recipe(twin).image_size == 32
    assert not (tmp_path / "run").exists()


KEPT: dict[str, Callable[[str], bool]] = {
    "frozen_positions=true": lambda name: name in ("pos_embed", "rope.freqs"),
    "frozen_embedding=true": lambda name: name.startswith("patch_embed"),
    "frozen_blocks=1": lambda name: not name.startswith(("blocks.1", "norm.")),
    "frozen_blocks=2": lambda name: not name.startswith("norm."),
}


@pytest.mark.parametrize("kind", ["registers", "rope"])
@pytest.mark.parametrize("frozen", KEPT)
def test_frozen_parts_stay_to_the_bit_and_the_others_move(
    started: Callable[[str], Path], image_folder: Callable[..., Path], tmp_path: Path, kind: str, frozen: str
) -> None:
    options = [*OPTIONS, "epochs=1", "warmup_epochs=0", "ema_decay=0.5", frozen]
    made = pretrain(RECIPE, image_folder(8), tmp_path / "run", init=started(kind), overrides=options, device="cpu")
    names = set(state_of(made))
    kept = {name for name in names if KEPT[frozen](name)}
    assert kept
    assert moved(made, started(kind)) == names - kept


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP", "rpn", "EVA-02"])
def test_all_that_a_row_depends_on_is_trained_and_a_checkpoint_loads(
    started: Callable[[str], Path], image_folder: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    start, run, options = started(kind), tmp_path / "run", [*OPTIONS, "epochs=2", "warmup_epochs=0"]
    pretrain(RECIPE, image_folder(8), run, init=start, overrides=options, device="cpu", max_steps=1)
    alone = shutil.copy(newest(run), tmp_path / "alone.safetensors")
    encoder, opened = micl_zoo.load(start, device="cpu"), micl_zoo.load(alone, device="cpu")
    assert (opened.pool, opened.pools, opened.embed_dim) == (encoder.pool, encoder.pools, encoder.embed_dim)
    made = pretrain(RECIPE, image_folder(8), run, init=start, overrides=options, device="cpu")
    assert moved(made, start) == set(state_of(made))
    finished = micl_zoo.load(made, device="cpu")
    assert (finished.pool, finished.pools) == (encoder.pool, encoder.pools)
    again = micl_zoo.load(newest(run), device="cpu").state_dict()  # the last checkpoint holds what was saved
    assert all(torch.equal(one, again[key]) for key, one in finished.state_dict().items())


def test_means_and_the_start_s_share_are_as_computed_by_hand(
    folder: Path, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    options = [*OPTIONS, "epochs=4", "keep_epochs=1", "ema_decay=0.6", "start_share=0.25"]  # a step is an epoch
    made = pretrain(RECIPE, image_folder(8), tmp_path / "run", init=folder, overrides=options, device="cpu")
    start = state_of(folder)
    mean = {key: one.double() for key, one in start.items()}
    for step in (1, 2, 3, 4):
        state = load_file(tmp_path / "run" / "checkpoints" / f"step-{step:08d}.safetensors")
        mean = {key: 0.6 * one + 0.4 * state[f"model.{key}"] for key, one in mean.items()}
        for key, one in mean.items():
            torch.testing.assert_close(state[f"ema.{key}"].double(), one, rtol=1e-6, atol=1e-7)
    for key, one in state_of(made).items():
        torch.testing.assert_close(one.double(), 0.75 * mean[key] + 0.25 * start[key], rtol=1e-6, atol=1e-7)
    assert not torch.equal(state["model.cls_token"], state["ema.cls_token"])


def rates(given: Path | Encoder, *changes: str) -> dict[str, tuple[float, float]]:
    """Learning rate, of a peak of 1, and weight decay by name."""
    start = Start.open(given)
    recipe = start.recipe(get_recipe(RECIPE), [*OPTIONS, *changes])
    vit = initial_model(recipe, start).vit
    optimizer = make_optimizer(vit, recipe)
    set_learning_rate(optimizer, 1.0)
    found = {
        id(one): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for one in group["params"]
    }
    return {name: found[id(one)] for name, one in vit.named_parameters() if one.requires_grad}


@pytest.mark.parametrize("kind", STARTS)
def test_lower_layers_learn_slower_and_positions_never_decay(started: Callable[[str], Path], kind: str) -> None:
    plain, layered = rates(started(kind)), rates(started(kind), "layer_decay=0.5")
    assert plain.keys() == layered.keys()
    assert {lr for lr, _ in plain.values()} == {1.0}
    heads = ("attn_pool", "fc_norm", "head")
    top = 0.5 if any(name.startswith(heads) for name in layered) else 1.0
    wanted = {"blocks.1.": top, "blocks.0.": top / 2, "norm.": top, **dict.fromkeys(heads, 1.0)}
    for name, (lr, decay) in layered.items():
        stem = top / 4  # class token, registers, positions, patch embedding and a norm before the blocks
        assert lr == pytest.approx(next((one for start, one in wanted.items() if name.startswith(start)), stem)), name
        # of matrices alone; without layers of tokens, too
        assert (decay > 0) == ((name.endswith("weight") and "norm" not in name) or name == "attn_pool.latent"), name
    for name, (_, decay) in plain.items():
        tokens = name in ("cls_token", "reg_token")
        assert (decay > 0) == (layered[name][1] > 0 or tokens), name


def test_what_is_not_trained_makes_no_layer(started: Callable[[str], Path]) -> None:
    encoder = micl_zoo.load(started("SigLIP"), device="cpu")
    encoder.pool = "mean"  # not that of its attention
    found = rates(encoder, "layer_decay=0.5", "frozen_embedding=true")
    assert {name for name in found if name.startswith(("attn_pool", "patch_embed"))} == set()
    assert (found["blocks.1.mlp.fc1.weight"][0], found["blocks.0.mlp.fc1.weight"][0]) == (1.0, 0.5)


@pytest.fixture
def method_of(started: Callable[[str], Path]) -> Callable[..., tuple[Recipe, Path]]:
    def make(kind: str, **changes: Any) -> tuple[Recipe, Path]:
        recipe = Start.open(started(kind)).recipe(get_recipe(RECIPE), OPTIONS)
        return dataclasses.replace(recipe, batch_size=BATCH, **changes), started(kind)

    return make


def test_longer_gradients_are_cut_to_clip_norm(method_of: Callable[..., tuple[Recipe, Path]]) -> None:
    taken: dict[float, dict[str, Tensor]] = {}
    for clip in (0.0, 1e-3, 1e3):
        recipe, start = method_of("registers", clip_norm=clip, contrast_batch=8)
        step = make_step(recipe, micro_batch=3, init=start)

        def keep(*_: Any, vit: Any = step.vit, clip: float = clip) -> None:
            taken[clip] = {name: one.clone() for name, one in gradients(vit).items()}

        step.optimizer.register_step_pre_hook(keep)  # what the step is taken with
        step(*seen(2))
    norms = {clip: torch.cat([one.flatten() for one in found.values()]).norm().item() for clip, found in taken.items()}
    assert norms[1e3] == norms[0.0] > 0.01
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)
    for name, one in taken[1e-3].items():
        torch.testing.assert_close(one, taken[0.0][name] * 1e-3 / norms[0.0], rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("kind", STARTS)
def test_pieces_give_the_gradients_of_one_graph(method_of: Callable[..., tuple[Recipe, Path]], kind: str) -> None:
    recipe, start = method_of(kind, contrast_batch=8)
    wanted = by_groups(recipe, start)
    for size in (None, 3):
        assert_same(result(make_step(recipe, micro_batch=size, init=start)), wanted, least=0)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_give_the_gradients_of_one(
    method_of: Callable[..., tuple[Recipe, Path]], tmp_path: Path, parallel: str
) -> None:
    if parallel == "fsdp" and not FSDP:
        pytest.skip("torch shards on GPUs only")
    changes: list[dict[str, Any]] = [{"negatives": "global"}, {"contrast_batch": 8, "frozen_blocks": 1}]
    kinds = ("registers", "rope") if parallel == "ddp" else STARTS
    made = [method_of(kind, parallel=parallel, **change) for kind in kinds for change in changes]
    cases: list[Case] = [(recipe, (None, 3)[number % 2], start) for number, (recipe, start) in enumerate(made)]
    for (recipe, _, start), found in zip(cases, on_ranks(2, cases, tmp_path / "found.pt"), strict=True):
        assert_same(found, by_groups(recipe, start), least=0)
