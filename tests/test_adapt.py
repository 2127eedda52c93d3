"""Going on with an encoder on one's own images: the recipe that chooses itself, what is said of before and after."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from conftest import picture
from PIL import Image
from test_pretrain import labelled, without_processes  # noqa: F401, a fixture

import micl_zoo
from micl_zoo.cli import main
from micl_zoo.errors import SourceError, TrainingError, UsageError
from micl_zoo.sources.listing import index_source
from micl_zoo.training.evaluation.knn import Right
from micl_zoo.training.pretraining import change
from micl_zoo.training.pretraining.adapt import BATCH, MOST_CACHE, adapt, choose
from micl_zoo.training.pretraining.change import Looked, Split, compare, drift, nearest, split_images
from micl_zoo.training.pretraining.data import made_up_patches
from micl_zoo.training.pretraining.plan import make_plan
from micl_zoo.training.pretraining.pretrain import make_model, parameter_counts
from micl_zoo.training.pretraining.start import Start
from micl_zoo.training.pretraining.step import TrainStep
from micl_zoo.training.pretraining.verdict import is_non_commercial, told
from micl_zoo.training.recipes import recorded_recipe
from micl_zoo.zoo.weights import EncoderConfig, header, save_weights

NAME = "vit_small_patch14_reg4_dinov2.tiny"
QUICK = ("--set", "epochs=2", "--set", "batch_size=8", "--set", "precision=fp32", "--device", "cpu")


@pytest.fixture(scope="module")
def start_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT with registers, patch 14 and LayerScale, under terms that bar commerce."""
    torch.manual_seed(0)
    sizes = {"img_size": 56, "embed_dim": 32, "depth": 2, "num_heads": 2}
    vit = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, **sizes)
    folder = tmp_path_factory.mktemp("start")
    transform = micl_zoo.Transform.square(56, 56)
    config = EncoderConfig(NAME, "vit_small_patch14_reg4_dinov2", sizes, 32, transform, license="cc-by-nc-4.0")
    save_weights(folder, vit.state_dict(), config, {}, "float32")
    return folder


@pytest.fixture
def start(start_folder: Path) -> Start:
    return Start.open(start_folder)


def invoke(*words: object) -> Result:
    return CliRunner().invoke(main, list(map(str, words)))


# What is chosen.


def test_each_choice_has_a_reason_and_follows_the_images(start: Start) -> None:
    few, many, sea = (choose(start, images).recipe for images in (80, 5_000, 3_000_000))
    assert [one.held_out for one in (few, many, sea)] == [8, 256, 256]
    assert [one.batch_size for one in (few, many, sea)] == [32, BATCH, BATCH]
    assert few.epochs > many.epochs > sea.epochs >= 1
    assert few.base_lr == many.base_lr
    assert (few.cache, sea.cache) == ("memory", "none")
    assert (few.patch_size, few.crop_size, few.prefix_tokens, few.positions) == (14, 56, 5, "own")
    assert all(one.reason for one in choose(start, 40).choices)


def test_a_change_is_followed_by_what_depends_on_it(start: Start) -> None:
    chosen = choose(start, 5_000, ["epochs=1", "batch_size=32", "crop_size=112"])
    made = {one.name: one for one in chosen.choices}
    assert chosen.recipe.epochs == 1
    assert chosen.recipe.warmup_epochs == pytest.approx(0.05)
    assert "as asked" in made["epochs"].reason
    assert "as asked" not in made["warmup_epochs"].reason
    assert chosen.recipe.source_size == 128


@pytest.mark.parametrize(
    ("images", "change", "said"),
    [
        (3, "epochs=1", "3 images are too few"),
        (100, "epoch=1", "Did you mean epochs"),
        (100, "depth=3", "depth is that of the encoder"),
        (100, "epochs=many", "expected a number"),
        (100, "frozen_blocks=3", "frozen_blocks must be at most depth 2"),
        (100, "crop_size=50", "crop_size must be a multiple of patch_size 14"),
        (100, "crop_size=0", "^crop_size is 0, and must be 1 to 4,096$"),
        (100, "epochs=-1", "^epochs is -1.0, and must be"),
        (20, "held_out=20", "held_out=20 of 20 images leaves none to train on"),
        (100, "name=../x", "name must be of letters, digits"),
    ],
)
def test_what_cannot_be_is_said(start: Start, images: int, change: str, said: str) -> None:
    with pytest.raises((UsageError, SourceError), match=said):
        choose(start, images, [change])


@pytest.mark.parametrize("images", [20, 284, 540])
def test_damaged_images_leave_a_batch(start: Start, images: int) -> None:
    recipe = choose(start, images).recipe
    assert recipe.batch_size <= (images - recipe.held_out) / 2


def test_what_a_change_asks_for_is_not_undone(start: Start) -> None:
    assert choose(start, 100, ["contrast_batch=8", "batch_size=16"]).recipe.contrast_size == 8
    assert choose(start, 100, ["epochs=5000"]).recipe.warmup_epochs == 250
    few = choose(start, 100, ["crop_size=28"]).recipe  # 4 patches
    assert (few.kept, few.views) == (3, 3)
    with pytest.raises(UsageError, match="1 patches are too few for 2 views"):
        _ = choose(start, 100, ["crop_size=14"]).recipe.kept


def test_a_loaded_encoder_keeps_its_size(start: Start) -> None:
    assert Start.open(start.encoder, 56).encoder is start.encoder
    with pytest.raises(UsageError, match="image_size 70 is not that of the encoder"):
        Start.open(start.encoder, 70)


def test_encoders_of_others_are_moved_less(start: Start) -> None:
    ours = choose(Start.open("vit_ti16.tin200"), 5_000).recipe
    theirs = choose(start, 5_000).recipe
    assert ours.base_lr * ours.embed_dim == pytest.approx(5 * theirs.base_lr * theirs.embed_dim)


def test_large_corpora_stay_on_disk_as_the_reason_says(start: Start) -> None:
    recipe = choose(start, 100_000).recipe
    assert (3 * recipe.source_size**2 * 100_000 <= MOST_CACHE) == (recipe.cache == "memory")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["vit_large_patch16_224", "vit_large_patch16_dinov3"])
def test_a_vit_l_fits_into_a_card_of_24_gib(architecture: str, tmp_path: Path) -> None:
    start = Start.open(micl_zoo.load(architecture, pretrained=False))
    recipe = choose(start, 10_000).recipe
    plan = make_plan(recipe, images=10_000 - recipe.held_out, counts=parameter_counts(recipe, start))
    (card,) = [row for row in plan.cards if row.card.memory_gib == 24]
    assert card.micro_batch > 0
    assert plan.parameters + plan.frozen == sum(one.numel() for one in start.encoder.model.parameters())


# What is looked at.


def test_images_that_are_held_out_are_not_trained_on(image_folder: Callable[..., Path], start: Start) -> None:
    index = index_source(image_folder(count=30))
    recipe = choose(start, 30, ["held_out=6"]).recipe
    split = split_images(index, recipe)
    held = set(split.shown.ids[:6])
    assert len(held) == 6
    assert not held & set(split.trained.ids)
    assert held | set(split.trained.ids) == set(index.ids)
    assert split.trained.ids == [name for name in index.ids if name not in held]  # in their order
    with pytest.raises(SourceError, match="leaves none to train on"):
        split_images(index, dataclasses.replace(recipe, held_out=30))


def test_an_image_that_is_listed_again_is_held_out_with_it(image_folder: Callable[..., Path], start: Start) -> None:
    folder = image_folder(count=20)
    index = index_source([folder, folder])
    split = split_images(index, choose(start, 40, ["held_out=6"]).recipe)
    held = {entry.uri for entry in list(split.shown.entries())[:6]}
    assert not held & {entry.uri for entry in split.trained.entries()}
    assert len(split.trained) == 40 - 2 * len(held)


def looked(rows: np.ndarray, right: dict[str, np.ndarray] | None = None) -> Looked:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    found = {name: Right(dict(enumerate(map(bool, some))), 0) for name, some in (right or {}).items()}  # type: ignore[arg-type]
    return Looked([str(place) for place in range(len(rows))], unit.astype(np.float32), found)


def some_split(image_folder: Callable[..., Path], held: int) -> Split:
    index = index_source(image_folder(count=9))
    return Split(index, index, held)


def test_change_is_as_a_plain_loop_counts_it(image_folder: Callable[..., Path]) -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(9, 4)), generator.normal(size=(9, 4))
    was, now = looked(first), looked(second)
    split = some_split(image_folder, held=0)
    found = compare(was, now, split)
    cosines = [float(a @ b) for a, b in zip(was.rows, now.rows, strict=True)]
    assert found["cosine"] == pytest.approx(np.mean(cosines), abs=1e-4)
    stay = []
    for place in range(9):
        near = [
            sorted((other for other in range(9) if other != place), key=lambda o: -seen.rows[place] @ seen.rows[o])[:6]
            for seen in (was, now)
        ]
        stay.append(len(set(near[0]) & set(near[1])))
        assert nearest(was, [place])[0] == near[0]
    assert found["neighbours"] == pytest.approx(np.mean(stay), abs=0.01)
    assert compare(was, was, split)["neighbours"] == 6
    assert drift(was, was, split) == pytest.approx(1)


def test_images_that_could_be_read_once_only_are_left_out(image_folder: Callable[..., Path]) -> None:
    rows = np.random.default_rng(0).normal(size=(9, 4))
    was = looked(rows)
    now = Looked(was.ids[1:], was.rows[1:], {})
    found = compare(was, now, some_split(image_folder, held=0))
    assert (found["among"], found["cosine"]) == (8, pytest.approx(1))


def test_what_is_looked_at_is_said_as_it_is(image_folder: Callable[..., Path], start: Start) -> None:
    split, recipe = some_split(image_folder, held=2), choose(start, 100).recipe
    seen = looked(np.random.default_rng(0).normal(size=(9, 4)))._replace(ids=split.shown.ids)
    found = compare(seen, seen, split)
    assert "Images not trained on: 2. Their" in " ".join(told({"change": found}, recipe))
    damaged = Looked(seen.ids[2:], seen.rows[2:], {})  # the two that were held out
    found = compare(damaged, damaged, split)
    text = " ".join(told({"change": found}, recipe))
    assert "Images looked at, all of them trained on: 7 (2 more could not be embedded)." in text


def test_labelled_images_are_paired_by_their_ids(image_folder: Callable[..., Path], start: Start) -> None:
    rows, recipe = np.random.default_rng(0).normal(size=(9, 4)), choose(start, 100).recipe
    was = looked(rows)._replace(right={"mine": Right({"a": True, "b": False, "c": True}, 0)})
    now = looked(rows)._replace(right={"mine": Right({"c": True, "a": True}, 1)})
    found = compare(was, now, some_split(image_folder, held=0))
    assert found["knn"]["mine"]["images"] == 2
    assert (found["knn"]["mine"]["before"], found["knn"]["mine"]["after"]) == (1, 1)
    assert "2 test images (1 labelled images could not be embedded)" in " ".join(told({"change": found}, recipe))
    gone = now._replace(right={"mine": Right({"d": True}, 2)})
    with pytest.raises(SourceError, match="no test image of mine could be embedded both before and after"):
        compare(was, gone, some_split(image_folder, held=0))


RIGHT = np.arange(400) < 200  # half of them


@pytest.mark.parametrize(
    ("after", "verdict", "advice"),
    [
        (np.arange(400) < 280, "better", None),
        (np.arange(400) < 120, "worse, it forgot", "start_share=0.5"),
        (np.arange(400) < 203, "no difference can be told", "nothing was gained"),
    ],
)
def test_the_verdict_is_in_plain_words(
    image_folder: Callable[..., Path], start: Start, after: np.ndarray, verdict: str, advice: str | None
) -> None:
    rows = np.random.default_rng(0).normal(size=(9, 4))
    found = compare(looked(rows, {"mine": RIGHT}), looked(rows, {"mine": after}), some_split(image_folder, held=0))
    recipe = choose(start, 100).recipe
    text = " ".join(told({"change": found, "encoder": {"encoder": "x", "license": "cc-by-nc-4.0"}}, recipe))
    assert f": {verdict}." in text
    assert "50.0 % before" in text
    assert advice is None or advice in text
    assert "Commercial use is not allowed" in text
    assert ("forgot" in text) == (found["knn"]["mine"]["high"] < 0)


def test_without_labels_nothing_is_claimed(image_folder: Callable[..., Path], start: Start) -> None:
    rows = np.random.default_rng(0).normal(size=(9, 4))
    found = compare(looked(rows), looked(rows), some_split(image_folder, held=2))
    text = " ".join(told({"change": found}, choose(start, 100).recipe))
    assert "nothing here says whether it is better" in text
    assert "before," not in text
    assert told({}, choose(start, 100).recipe) == []


@pytest.mark.parametrize(
    ("terms", "barred"),
    [
        ("apache-2.0", False), ("mit", False), ("dinov3-license", False), ("cc-by-4.0", False), ("gnc-1", False),
        ("cc-by-nc-4.0", True), ("cc-by-nc-sa-4.0", True), ("CC BY-NC 4.0", True), ("research-only", True),
        ("Non-commercial research", True), ("noncommercial", True), ("cc_by_nc_4_0", True), ("apple-amlr", True),
        ("Research use only", True), ("no commercial use", True), ("apple-ascl", False),
        ("commercial use is allowed, non-commercial too", False),
    ],
)  # fmt: skip
def test_licences_that_bar_commerce_are_known(terms: str, barred: bool) -> None:
    assert is_non_commercial(terms) is barred


# The command.


@pytest.fixture
def own_decoding(without_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Have all images decoded by the process itself."""
    made = change.ExtractOptions
    monkeypatch.setattr(change, "ExtractOptions", lambda **how: made(**{**how, "workers": 0}))


@pytest.mark.usefixtures("own_decoding")
def test_a_folder_of_photographs_becomes_an_encoder_with_before_and_after(
    image_folder: Callable[..., Path], start_folder: Path, tmp_path: Path
) -> None:
    photos, run = image_folder(count=30), tmp_path / "run"
    labelled(tmp_path / "set", "train", 24)
    labelled(tmp_path / "set", "test", 12)
    command = ["adapt", start_folder, "--data", photos, "--out", run, "--knn", tmp_path / "set", *QUICK]
    done = invoke(*command)
    assert done.exit_code == 0, done.output
    assert re.search(r"epochs +2 +as asked", done.output)
    assert "learn slower" in done.output
    assert "k-NN on set, 12 test images:" in done.output
    assert "Commercial use is not allowed" in done.output
    made = json.loads((run / "run.json").read_text())
    assert made["command"] == " ".join(map(str, command)).replace("adapt", "micl-zoo adapt", 1).partition(" --dev")[0]
    assert made["encoder"]["encoder"] == NAME
    assert made["encoder"]["license"] == "cc-by-nc-4.0"
    assert made["data"]["images"] == 27
    assert made["change"]["images"] == 3
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "knn" in line] == [0, 6]
    assert [line["step"] for line in lines if "kept" in line] == [0, 6]
    assert next(line for line in lines if "kept" in line)["kept"]["cosine"] == pytest.approx(1, abs=1e-4)
    with Image.open(run / "neighbours.png") as drawn:
        assert drawn.width > 2000
    encoder = micl_zoo.load(run, device="cpu")
    assert encoder.name == f"{NAME}-adapted"
    assert encoder.config.license == "cc-by-nc-4.0"
    assert encoder.embed([picture(0)]).shape == (1, 32)
    said = header(run / "encoder" / "model.safetensors")["provenance"]
    assert said["encoder"] == made["encoder"]
    assert said["recipe"]["positions"] == "own"
    assert invoke(*command).exit_code == 0  # it is finished
    # what is made of it
    assert invoke("report", run).exit_code == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Before and after" in page
    assert "nearest images before and after" in page
    assert NAME in page
    assert (run / "report" / "neighbours.png").read_bytes() == (run / "neighbours.png").read_bytes()
    card = invoke("card", run)
    assert card.exit_code == 0, card.output
    assert "`vit_small_patch14_reg4_dinov2`" in card.output
    assert "img_size=56" in card.output
    assert made["encoder"]["encoder_sha256"] in card.output
    assert "Commercial use is not allowed" in card.output
    sent = invoke("publish", run, "--repo", "my-lab/mine", "--dry-run", "--no-onnx")
    assert sent.exit_code == 0, sent.output
    assert 'micl_zoo.load("my-lab/mine")' in sent.output
    assert "Record(" not in sent.output
    front = (run / "hub" / "README.md").read_text(encoding="utf-8").partition("\n---")[0]
    assert "license: cc-by-nc-4.0" in front


def test_a_plan_trains_nothing(image_folder: Callable[..., Path], start_folder: Path, tmp_path: Path) -> None:
    photos = image_folder(count=30)
    done = invoke("adapt", start_folder, "--data", photos, "--plan", "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "layer_decay" in done.output
    assert "a plan, nothing is trained" in done.output
    assert "RTX 4090" in done.output
    assert not (tmp_path / "run").exists()
    assert invoke("adapt", start_folder, "--data", photos).exit_code == 2  # without --out
    plan = invoke("train", "vit_b16.in1k", "--init", start_folder, "--plan")
    assert plan.exit_code == 0, plan.output
    assert "2 others" not in plan.output
    assert "5 others" in plan.output


@pytest.mark.usefixtures("own_decoding")
def test_a_recipe_starts_from_an_encoder(image_folder: Callable[..., Path], start_folder: Path, tmp_path: Path) -> None:
    photos, run = image_folder(count=16), tmp_path / "run"
    words = ["train", "vit_ti16.tin200", "--init", start_folder, "--data", photos, "--out", run, "--smoke"]
    done = invoke(*words, "--device", "cpu", "--set", "batch_size=8")
    assert done.exit_code == 0, done.output
    recipe = recorded_recipe(json.loads((run / "run.json").read_text()))
    assert (recipe.patch_size, recipe.embed_dim, recipe.crop_size % 14) == (14, 32, 0)
    assert "--init" in json.loads((run / "run.json").read_text())["command"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("resnet18", "--data", "."), "cannot"),
        (("runs/nothing", "--data", "."), "nothing"),
    ],
)
def test_an_encoder_that_is_not_there_is_said(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = invoke("adapt", *words, "--out", tmp_path / "run")
    assert done.exit_code == 1, done.output
    assert said in done.output


@pytest.mark.usefixtures("own_decoding")
def test_an_encoder_in_memory_is_not_changed(
    image_folder: Callable[..., Path], start_folder: Path, tmp_path: Path
) -> None:
    encoder = micl_zoo.load(start_folder, device="cpu")
    before = {name: one.clone() for name, one in encoder.model.state_dict().items()}
    made = adapt(
        encoder, image_folder(count=16), tmp_path / "run", device="cpu", overrides=("epochs=1", "batch_size=8")
    )
    assert made.exists()
    assert not encoder.changed
    assert all(torch.equal(one, before[name]) for name, one in encoder.model.state_dict().items())


# Memory.


def test_images_per_forward_pass_are_halved_until_they_fit(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(choose(start, 100).recipe, batch_size=32, precision="fp32")
    step = TrainStep(make_model(recipe, torch.device("cpu"), start), recipe)
    weights = {name: one.clone() for name, one in step.vit.state_dict().items()}
    compute, most, tried = step._compute, 9, []

    def short(*inputs: torch.Tensor) -> Any:
        tried.append(len(inputs[0]))
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError
        return compute(*inputs)

    monkeypatch.setattr(step, "_compute", short)
    patches, views = made_up_patches(recipe, torch.device("cpu"))
    step.fit(patches.float(), views)
    assert step.micro_batch == 8
    assert max(tried) == 32
    assert step.synchronises
    assert not step.optimizer.state
    assert all(torch.equal(one, weights[name]) for name, one in step.vit.state_dict().items())
    most = 0
    with pytest.raises(TrainingError, match="not even one image at a time"):
        step.fit(patches.float(), views)


@pytest.mark.usefixtures("own_decoding")
def test_a_run_that_took_no_step_keeps_no_folder(
    image_folder: Callable[..., Path], start_folder: Path, tmp_path: Path
) -> None:
    photos, run = image_folder(count=20), tmp_path / "run"
    for file in list(photos.glob("*.jpg")):
        file.write_bytes(b"damaged")
    failed = invoke("adapt", start_folder, "--data", photos, "--out", run, *QUICK, "--set", "batch_size=16")
    assert re.search(r"has \d usable images \(\d+ cannot be decoded, the first .*jpg: .*smaller batch", failed.output)
    words = ("adapt", start_folder, "--data", photos, "--out", run, *QUICK, "--set", "batch_size=4")
    assert invoke(*words).exit_code == 0
    other = invoke("adapt", start_folder, "--data", photos, "--out", run, *QUICK, "--set", "batch_size=2")
    assert "holds another run: batch_size: 4 there, 2 asked for" in other.output


@pytest.mark.usefixtures("own_decoding")
def test_a_run_within_its_images_is_no_image_of_them(
    image_folder: Callable[..., Path], start_folder: Path, tmp_path: Path
) -> None:
    photos = image_folder(count=20)
    words = ("adapt", start_folder, "--data", photos, "--out", photos / "run", *QUICK)
    assert invoke(*words, "--max-steps", "1").exit_code == 0
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    listed = index_source(photos)
    assert len(listed) == 20
    assert listed.notes.skipped["training runs"] == 1
    assert invoke(*words).exit_code == 0  # it is finished


@pytest.mark.usefixtures("own_decoding")
def test_sets_of_one_name_are_both_measured(
    image_folder: Callable[..., Path], start_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sets = [tmp_path / "first" / "lab", tmp_path / "second" / "lab"]
    for one in sets:
        one.parent.mkdir()
        labelled(one, "train", 24)
        labelled(one, "test", 12)
    run, how = tmp_path / "run", {"overrides": ["epochs=1", "batch_size=8", "precision=fp32"], "device": "cpu"}
    adapt(start_folder, photos := image_folder(count=20), run, knn=[*sets, sets[0]], **how)
    assert set(json.loads((run / "run.json").read_text())["change"]["knn"]) == set(map(str, sets))
    adapt(start_folder, photos, run, knn=sets[0], **how)  # one set needs no list
    assert "the run is finished, and --knn adds nothing" in caplog.text


@pytest.mark.usefixtures("own_decoding")
def test_images_to_measure_with_that_are_gone_at_the_end_lose_nothing(
    image_folder: Callable[..., Path], start_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos, run, sets = image_folder(count=20), tmp_path / "run", tmp_path / "set"
    labelled(sets, "train", 24)
    labelled(sets, "test", 12)
    words = ("adapt", start_folder, "--data", photos, "--out", run, "--knn", sets, "--knn-minutes", "0", *QUICK)
    real, calls = change.measure_right, []

    def gone(*given: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:  # it is there at the start, and after the first step
            raise SourceError("the disk is gone")
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(change, "measure_right", gone)
        done = invoke(*words)
    assert done.exit_code == 0, done.output
    assert "nothing is measured: the disk is gone" in caplog.text
    assert micl_zoo.load(run, device="cpu").name == f"{NAME}-adapted"
    assert "neighbours.png" not in done.output
    assert "change" not in json.loads((run / "run.json").read_text())  # nor what was seen of earlier weights


@pytest.mark.parametrize("how", [{"max_steps": -1}, {"micro_batch": 0}, {"knn_images": 0}, {"workers": -1}])
def test_numbers_that_cannot_be_are_refused_before_anything(
    how: dict[str, Any], image_folder: Callable[..., Path], start_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"pretrain: {next(iter(how))} is "):
        adapt(start_folder, image_folder(count=20), tmp_path / "run", **how)
    assert not (tmp_path / "run").exists()
