"""Recipes state every number of the method, and refuse what they do not know."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from damaged import complaint, wrecks

from micl_zoo.errors import TrainingError, UsageError
from micl_zoo.training.pretraining.pretrain import initial_model, make_vit
from micl_zoo.training.recipes import RECIPES, Recipe, get_recipe, recorded_recipe, smoke_twin
from micl_zoo.training.run.optim import learning_rate, make_optimizer
from micl_zoo.training.run.record import read_run
from micl_zoo.zoo.ours import RECORDS


def test_the_paper_recipes_have_the_numbers_of_its_sources() -> None:
    for name, shape in {"vit_b16.in1k": (768, 12, 12), "vit_l16.in1k": (1024, 24, 16)}.items():
        recipe = get_recipe(name)
        assert (recipe.embed_dim, recipe.depth, recipe.num_heads) == shape
        assert (recipe.mask_ratio, recipe.kappa, recipe.temperature, recipe.negatives) == (0.8, 1 / 64, 0.07, "local")
        assert (recipe.batch_size, recipe.epochs, recipe.warmup_epochs, recipe.base_lr) == (7200, 800, 40, 5e-5)
        assert recipe.contrast_size == 1800  # of one GPU, of four
        assert (recipe.beta1, recipe.beta2, recipe.weight_decay, recipe.min_lr) == (0.9, 0.95, 0.05, 0)
        assert (recipe.crop_size, recipe.crop_scale_min, recipe.crop_scale_max) == (224, 0.2, 1)
        assert (recipe.interpolation, recipe.flip_probability, recipe.view_color) == ("bicubic", 0.5, False)
        assert recipe.lr == pytest.approx(5e-5 * 7200 / 256)


def test_every_recipe_is_in_the_table_and_claims_its_command() -> None:
    assert {record.recipe for record in RECORDS.values()} == set(RECIPES)
    for name, make in RECIPES.items():
        assert make().name == name
        assert f"micl-zoo train {name} --data" in (make.__doc__ or "")


def test_overrides_are_typed() -> None:
    changes = ["epochs=3", "batch_size=64", "view_color=false", "negatives=global", "pixel_mean=0.5,0.5,0.5"]
    recipe = get_recipe("vit_ti16.tin200", changes)
    assert (recipe.epochs, recipe.batch_size, recipe.view_color) == (3.0, 64, False)
    assert (recipe.negatives, recipe.pixel_mean) == ("global", (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("epoch=3", "unknown recipe field 'epoch'. Did you mean epochs"),
        ("epochs", "--set takes key=value, got 'epochs'"),
        ("epochs=many", "epochs=many: expected a number"),
        ("batch_size=1.5", "batch_size=1.5: expected a whole number"),
        ("view_color=yes", "view_color=yes: expected true or false"),
        ("negatives=all", "negatives=all: expected local or global"),
        ("pixel_mean=0.5,0.5", "expected 3 numbers with commas between"),
        ("crop_size=100", "crop_size must be a multiple of patch_size 16, got 100"),
        ("batch_size=1", "batch_size must be at least 2"),
        ("num_heads=0", "num_heads is 0, and must be 1 to 256"),
        ("warmup_epochs=500", "warmup_epochs must be from 0 to epochs"),
        ("norm_eps=1e-5", "norm_eps must be 1e-06"),
        ("views=5", "views is 5, and must be 2 to 4"),
        ("pooled_token=patches", "pooled_token=patches: expected cls or mean"),
    ],
)
def test_wrong_overrides_say_what_is_expected(change: str, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        get_recipe("vit_ti16.tin200", [change])
    assert text in str(caught.value)


def test_an_unknown_recipe_lists_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Did you mean vit_l16\.in1k"):
        get_recipe("vit_l16.in1")


def test_the_learning_rate_warms_up_and_ends_at_zero(twin: Recipe) -> None:
    recipe = dataclasses.replace(twin, epochs=10, warmup_epochs=2)
    rates = [learning_rate(recipe, step, 100) for step in range(101)]
    assert rates[0] == 0
    assert rates[10] == pytest.approx(recipe.lr / 2)
    assert rates[20] == max(rates) == pytest.approx(recipe.lr)
    assert rates[60] == pytest.approx(recipe.lr / 2)
    assert rates[100] == pytest.approx(0, abs=1e-12)


def test_positions_of_the_class_token_are_chosen_once(twin: Recipe) -> None:
    with pytest.raises(UsageError, match=r"class_position must be zero with learned positions.*, got centre"):
        dataclasses.replace(twin, class_position="centre", positions="learned")


def test_a_smoke_twin_keeps_the_choices_of_the_method() -> None:
    choices = ["views=3", "pooled_token=mean", "positions=learned"]
    recipe = smoke_twin(get_recipe("vit_ti16.tin200", choices))
    assert (recipe.views, recipe.pooled_token, recipe.positions) == (3, "mean", "learned")
    assert smoke_twin(get_recipe("vit_ti16.tin200", ["class_position=centre"])).class_position == "centre"


def test_learned_positions_are_drawn_from_the_seed_and_do_not_decay(twin: Recipe) -> None:
    recipe = dataclasses.replace(twin, positions="learned")
    frozen, model, again = (initial_model(each) for each in (twin, recipe, recipe))
    for name, value in model.vit.state_dict().items():
        assert torch.equal(value, again.vit.state_dict()[name]), name
        assert torch.equal(value, frozen.vit.state_dict()[name]) == (name != "pos_embed"), name
    assert model.vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.15)
    decays = {
        id(p): group["weight_decay"]
        for group in make_optimizer(model.vit, recipe).param_groups
        for p in group["params"]
    }
    assert decays[id(model.vit.pos_embed)] == 0
    assert decays[id(model.vit.cls_token)] == recipe.weight_decay  # as with frozen positions
    frozen_groups = make_optimizer(frozen.vit, twin).param_groups
    assert len(decays) == 1 + sum(len(group["params"]) for group in frozen_groups)


def test_no_decay_on_biases_and_norms(twin: Recipe) -> None:
    vit = make_vit(twin)
    groups = {group["weight_decay"]: group["params"] for group in make_optimizer(vit, twin).param_groups}
    assert set(groups) == {0.0, 0.05}
    assert all(parameter.ndim == 1 for parameter in groups[0.0])
    assert all(parameter.ndim > 1 for parameter in groups[0.05])


def test_a_damaged_record_of_a_run_is_named(tmp_path: Path) -> None:
    assert read_run(tmp_path) is None
    for text in ("{", "[1]"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(TrainingError, match=r"run\.json.* is damaged"):
            read_run(tmp_path)


def test_a_strange_recipe_in_a_record_is_an_error_of_our_own(twin: Recipe) -> None:
    whole = json.loads(json.dumps(dataclasses.asdict(twin)))
    for what, other in wrecks(whole):
        said = complaint(what, lambda other=other: recorded_recipe({"recipe": other}, "run.json"))  # type: ignore[misc]
        assert not said or "run.json" in said, what


@pytest.mark.parametrize(
    "change",
    [
        *("depth=100000", "embed_dim=1000000", "patch_size=0", "crop_size=99999999", "batch_size=999999999999"),
        *("kappa=nan", "base_lr=inf", "beta1=1", "weight_decay=-1", "pixel_std=0,1,1", "mlp_ratio=0", "epochs=1e99"),
        *("crop_ratio_min=5", "temperature=0", "num_heads=0", "views=9", "mask_ratio=1", "flip_probability=2"),
        *("embed_dim=8192 depth=128", "image_size=4096 patch_size=1 crop_size=112", f"name={'x' * 201}", "seed=-1"),
    ],
)
def test_an_absurd_number_is_refused_with_its_range(change: str) -> None:
    with pytest.raises(UsageError, match=r"must be|must make"):
        get_recipe("vit_ti16.tin200", change.split())
