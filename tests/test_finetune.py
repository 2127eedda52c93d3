"""Fine-tuning: it learns, goes on to the bit, and gives the same gradients however a batch is shared or cut."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.multiprocessing as mp
from click.testing import CliRunner
from damaged import complaint
from PIL import Image
from safetensors.torch import load_file

import micl_zoo
from micl_zoo.cli import main
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.errors import Interrupted, SourceError, TrainingError, UsageError
from micl_zoo.training.evaluation.labelled import LabelledSet
from micl_zoo.training.finetuning import finetune as module
from micl_zoo.training.finetuning.augment import AugmentedCorpus, Pictures, drawing, share_places
from micl_zoo.training.finetuning.classifier import ClassifierStep, make_classifier
from micl_zoo.training.finetuning.finetune import finetune
from micl_zoo.training.pretraining.data import Share
from micl_zoo.training.pretraining.report import write_report
from micl_zoo.training.recipes import (
    FINETUNE_RECIPES,
    AnyRecipe,
    FineTuneRecipe,
    Recipe,
    finetune_recipe_for,
    get_finetune_recipe,
)
from micl_zoo.training.release.trained import of_run
from micl_zoo.training.run.optim import make_layered_optimizer
from micl_zoo.training.run.ranks import Ranks
from micl_zoo.zoo.weights import header

CPU = torch.device("cpu")
COLORS = {"blue": (30, 60, 200), "green": (40, 170, 60), "red": (200, 40, 40)}
QUICK = ("batch_size=8", "precision=fp32", "epochs=3", "warmup_epochs=0.5", "base_lr=0.05", "layer_decay=0.8")
# Every random draw that there is.
RANDOM = (*QUICK, "drop_path=0.3", "mixup=0.8", "cutmix=1", "erase_probability=0.5", "ema_decay=0.8")
reads_safetensors = pytest.mark.skipif(
    tuple(map(int, re.findall(r"\d+", timm.__version__)[:3])) < (1, 0, 26),
    reason="timm reads safetensors in a local folder from 1.0.26 on",
)


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    """A set of three classes that differ in colour: 8 pictures of each to train on and 4 to test on."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for name, color in COLORS.items():
            folder = tmp_path / "colors" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = generator.integers(-30, 31, (10 + number, 12, 3))
                pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
                image = Image.fromarray(pixels).resize((44, 40 + number), Image.Resampling.BICUBIC)
                image.save(folder / f"{number}.png")
    return tmp_path / "colors"


def tune(data: Path, out: Path, encoder: Path, *changes: str, **options: Any) -> dict[str, Any] | None:
    options = {"device": "cpu", "workers": 0, "recipe": "small", **options}
    return finetune(data, out, weights=encoder, overrides=changes, **options)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["lr"]) for line in lines(run) if "loss" in line]


@reads_safetensors
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_run_learns_and_leaves_what_is_promised(
    colors: Path, encoder_folder: Path, tmp_path: Path, pool: str
) -> None:
    changes, run = (*QUICK, "epochs=10", "eval_epochs=5", f"pool={pool}"), tmp_path / "run"
    found = tune(colors, run, encoder_folder, *changes)
    assert found is not None
    assert (found["top1"], found["test_images"]) == ({"accuracy": 100.0, "low": 100.0, "high": 100.0}, 12)
    assert found == json.loads((run / "result.json").read_text())
    assert found["classes"] == ["blue", "green", "red"]
    assert found["encoder"]["encoder_sha256"] == micl_zoo.load(weights=encoder_folder).weights_sha256
    assert [step for step, *_ in losses(run)] == list(range(30))
    assert [line["step"] for line in lines(run) if "test" in line] == [15, 30]
    record = json.loads((run / "run.json").read_text())
    assert record["result"]["top1"] == found["top1"]
    assert "--recipe small --set batch_size=8" in record["command"]

    before = (run / "result.json").stat().st_mtime_ns
    assert tune(colors, run, encoder_folder, *changes) == found
    assert (run / "result.json").stat().st_mtime_ns == before  # a finished run is left alone

    model = timm.create_model(f"local-dir:{run / 'classifier'}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == found["classes"]
    encoder = micl_zoo.load(weights=run / "encoder", device="cpu")
    pixels = torch.stack([encoder.transform(Image.open(file)) for file in sorted((colors / "test").rglob("*.png"))])
    with torch.inference_mode():
        logits = model(pixels)
        assert logits.argmax(1).tolist() == [0] * 4 + [1] * 4 + [2] * 4
        if pool == "cls":
            torch.testing.assert_close(model.head(encoder(pixels)), logits, rtol=1e-5, atol=1e-5)
        else:  # its norm comes before the mean: near, and not equal
            assert model.head(encoder(pixels, "mean")).argmax(1).tolist() == logits.argmax(1).tolist()
    trained = load_file(sorted((run / "checkpoints").glob("*.safetensors"))[-1])
    assert torch.equal(trained["model.head.weight"], model.head.weight)
    assert header(run / "classifier" / "model.safetensors")["provenance"]["recipe"]["pool"] == pool
    for describe in (write_report, of_run):
        with pytest.raises(TrainingError, match=r"a fine-tuning run, by recipe small.*result\.json"):
            describe(run)


def test_an_interrupted_run_goes_on_to_the_bit_with_any_number_of_workers(
    colors: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    state = random.getstate()
    tune(colors, whole, encoder_folder, *RANDOM)
    assert tune(colors, parts, encoder_folder, *RANDOM, max_steps=4, workers=2) is None
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.1}\n{"step": 5, "lo')  # lines after the checkpoint, one cut off
    tune(colors, parts, encoder_folder, *RANDOM)
    assert len(losses(whole)) == 9
    assert losses(whole) == losses(parts)
    for kind in ("encoder", "classifier"):
        ends = [load_file(run / kind / "model.safetensors") for run in (whole, parts)]
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert random.getstate() == state
    assert micl_zoo.load(weights=whole / "encoder", device="cpu").name == "vit_ti16.tin200-finetuned"
    last = load_file(whole / "checkpoints" / "step-00000009.safetensors")
    assert torch.equal(last["ema.head.weight"], ends[0]["head.weight"])
    assert not torch.equal(last["model.head.weight"], ends[0]["head.weight"])


def test_a_request_to_stop_writes_a_checkpoint(
    colors: Path, encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = module.ClassifierStep.__call__

    def told_to_stop(self: ClassifierStep, pictures: Pictures) -> torch.Tensor:
        if pictures.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, pictures)

    monkeypatch.setattr(module.ClassifierStep, "__call__", told_to_stop)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 4, with a checkpoint") as caught:
        tune(colors, tmp_path / "run", encoder_folder, *QUICK)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert (tmp_path / "run" / "checkpoints" / "step-00000004.safetensors.sha256").exists()


def one_rank(rank: int, port: int, data: Path, out: Path, weights: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    found = tune(data, out / "two", weights, *RANDOM)
    (out / f"rank-{rank}.json").write_text(json.dumps(found))


def test_two_processes_train_and_test_as_one(colors: Path, encoder_folder: Path, tmp_path: Path) -> None:
    (colors / "test" / "red" / "1.png").write_bytes(b"")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["micl_zoo.training.finetuning.finetune"])
    mp.start_processes(one_rank, (port, colors, tmp_path, encoder_folder), nprocs=2, start_method="forkserver")
    one = tune(colors, tmp_path / "one", encoder_folder, *RANDOM)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert one is not None
    assert first == second == json.loads((tmp_path / "two" / "result.json").read_text())
    assert (first["processes"], first["test_images"], first["test_refused"]) == (2, 11, one["test_refused"])
    assert first["top1"] == one["top1"]
    found, wanted = ([loss for _, loss, _ in losses(tmp_path / name)] for name in ("two", "one"))
    assert len(wanted) == 9
    assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
def test_the_command_starts_two_processes(colors: Path, encoder_folder: Path, tmp_path: Path) -> None:
    words = ["eval", "finetune", encoder_folder, "--data", colors, "--out", tmp_path / "two", "--smoke"]
    words += ["--device", "cpu", "--workers", 0, "--gpus", 2, "--json"]
    command = [sys.executable, "-m", "micl_zoo", *map(str, words)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert json.loads(said) == json.loads((tmp_path / "two" / "result.json").read_text())
    assert json.loads(said)["processes"] == 2


def test_processes_are_started_with_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[tuple[list[str], dict[str, Any]]]()
    monkeypatch.setattr("micl_zoo.training.run.launch.launch", lambda words, **how: started.append((words, how)))
    words = ["eval", "finetune", "runs/a", "--data", "b", "--out", "c", "--set", "epochs=1"]
    result = CliRunner().invoke(main, [*words, "--gpus", "4", "--restarts=1"])
    assert result.exit_code == 0, result.output
    assert started == [(words, {"gpus": 4, "nodes": 1, "rdzv": None, "restarts": 1})]


@pytest.fixture
def encoder(encoder_folder: Path) -> Encoder:
    return micl_zoo.load(weights=encoder_folder, device="cpu")


def recipe(*changes: str) -> FineTuneRecipe:
    return get_finetune_recipe("small", changes)


def pictures(places: torch.Tensor, step: int = 3) -> Pictures:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(8, 3, 32, 32, generator=generator)
    return Pictures(step, places, pixels[places], torch.arange(8)[places] % 3)


def gradients(encoder: Encoder, chosen: FineTuneRecipe, share: Share, micro_batch: int | None = None) -> list[Any]:
    step = ClassifierStep(make_classifier(encoder, chosen, 3), chosen, micro_batch=micro_batch)
    loss = step.accumulate(pictures(share_places(8, share)))
    return [loss, *(parameter.grad for parameter in step.vit.parameters())]


@pytest.mark.parametrize("mix", [("mixup=0.8", "cutmix=0"), ("mixup=0", "cutmix=1"), ("mixup=0", "cutmix=0")])
def test_shares_and_pieces_have_the_gradients_of_the_whole_batch(encoder: Encoder, mix: tuple[str, ...]) -> None:
    chosen = recipe(*RANDOM, *mix, "head_std=0.1")
    whole = gradients(encoder, chosen, Share())
    assert len(whole) > 20
    halves = zip(*(gradients(encoder, chosen, Share(rank, 2)) for rank in range(2)), strict=True)
    pieces = gradients(encoder, chosen, Share(), micro_batch=3)
    for wanted, half, piece in zip(whole, halves, pieces, strict=True):
        assert wanted.abs().max() > 1e-6
        torch.testing.assert_close((half[0] + half[1]) / 2, wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(piece, wanted, rtol=0, atol=1e-6)
    assert not torch.equal(gradients(encoder, recipe(*QUICK, "head_std=0.1"), Share())[0], whole[0])


def test_the_loss_is_that_of_a_plain_loop(encoder: Encoder) -> None:
    chosen = recipe(*QUICK, "label_smoothing=0.2", "head_std=0.1")
    batch = pictures(torch.arange(8))
    step = ClassifierStep(make_classifier(encoder, chosen, 3), chosen)
    total = 0.0
    for pixels, label in zip(batch.pixels, batch.labels.tolist(), strict=True):
        tokens = encoder.vit.blocks(encoder.vit._pos_embed(encoder.vit.patch_embed(pixels[None])))
        mean = tokens[0, 1:].mean(0)  # of the patch tokens before the norm
        normed = (mean - mean.mean()) / (mean.var(unbiased=False) + 1e-6).sqrt()
        logits = step.vit.head(normed).double()
        share = logits.exp() / logits.exp().sum()
        total -= sum(math.log(share[c].item()) * (0.2 / 3 + 0.8 * (c == label)) for c in range(3)) / 8
    assert step.accumulate(batch).item() == pytest.approx(total, abs=1e-5)


def test_deeper_layers_learn_slower(encoder: Encoder) -> None:
    chosen = recipe("layer_decay=0.5")
    model = make_classifier(encoder, chosen, 3)
    groups = make_layered_optimizer(model, chosen).param_groups
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
            scale = 0.5**3
        elif match := re.match(r"blocks\.(\d+)\.", name):
            scale = 0.5 ** (2 - int(match[1]))
        else:
            scale = 1.0
        decays = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        assert found.pop(id(parameter)) == (scale, 0.05 if decays else 0.0), name
    assert not found


def test_the_running_mean_is_that_of_a_plain_loop(encoder: Encoder) -> None:
    chosen = recipe(*QUICK, "ema_decay=0.7")
    step = ClassifierStep(make_classifier(encoder, chosen, 3), chosen)
    for group in step.optimizer.param_groups:
        group["lr"] = 0.01
    wanted = {name: value.clone() for name, value in step.vit.state_dict().items()}
    for number in range(3):
        step(pictures(torch.arange(8), number))
        for name, value in step.vit.state_dict().items():
            wanted[name] = 0.7 * wanted[name] + 0.3 * value
    assert step.ema is not None
    for name, value in step.ema.module.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)
    assert not torch.equal(wanted["head.weight"], step.vit.head.weight)


def test_a_place_of_a_step_has_one_picture_in_any_share(colors: Path, encoder: Encoder) -> None:
    images, chosen = LabelledSet.open(colors), recipe(*RANDOM)

    def seen(share: Share) -> dict[tuple[int, int], tuple[torch.Tensor, int]]:
        corpus = AugmentedCorpus(images.train, encoder.transform, 0, CPU)
        return {
            (batch.step, int(place)): (pixels, int(label))
            for batch in corpus.batches(chosen, 1, 4, share)
            for place, pixels, label in zip(batch.places, batch.pixels, batch.labels, strict=True)
        }

    whole, shared = seen(Share()), seen(Share(0, 2)) | seen(Share(1, 2))
    assert set(whole) == set(shared) == {(step, place) for step in (1, 2, 3) for place in range(8)}
    assert all(torch.equal(whole[at][0], shared[at][0]) and whole[at][1] == shared[at][1] for at in whole)
    assert len({pixels.sum().item() for pixels, _ in whole.values()}) == 24
    assert sorted(label for (step, _), (_, label) in whole.items() if step < 3) != [0] * 16


def test_partners_of_mixup_are_in_one_share() -> None:
    for share in (Share(0, 3), Share(1, 3), Share(2, 3)):
        places = share_places(12, share).tolist()
        assert [11 - place for place in places[::-1]] == places
        assert places == sorted(places)
    assert share_places(12, Share()).tolist() == list(range(12))


def test_draws_leave_the_global_generators_alone() -> None:
    def numbers() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]  # noqa: NPY002
    with drawing(0, 1):
        first = numbers()
    with drawing(0, 2):
        assert not set(first) & set(numbers())
    with drawing(0, 1):
        assert numbers() == first
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_images_that_cannot_be_decoded_are_named(
    colors: Path, encoder_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (colors / "train" / "red" / "0.png").write_bytes(b"not a picture")
    (colors / "test" / "red" / "1.png").write_bytes(b"")
    found = tune(colors, tmp_path / "run", encoder_folder, *QUICK)
    assert found is not None
    assert found["test_images"] == 11
    assert [image[1] for image in found["test_refused"]] == ["empty"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [image[1] for image in record["data"]["refused"]] == ["not_an_image"]
    assert found["train_refused"] == record["data"]["refused"]
    assert "0.png is left out" in caplog.text
    for file in (colors / "test").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(SourceError, match="no image of the test part can be decoded"):
        tune(colors, tmp_path / "other", encoder_folder, *QUICK, "epochs=0.1", "warmup_epochs=0")


def test_what_does_not_go_together_is_refused(colors: Path, encoder_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UsageError, match=r"unknown recipe field 'layer_decai'. Did you mean layer_decay"):
        tune(colors, run, encoder_folder, "layer_decai=0.5")
    with pytest.raises(UsageError, match=r"unknown fine-tuning recipe 'mae_x'. Did you mean"):
        tune(colors, run, encoder_folder, recipe="mae_x")
    with pytest.raises(UsageError, match=r"drop_path is 2\.0, and must be 0 to 1"):
        tune(colors, run, encoder_folder, "drop_path=2")
    with pytest.raises(UsageError, match="batch_size must be even"):
        tune(colors, run, encoder_folder, "batch_size=7")
    with pytest.raises(SourceError, match=r"has 24 usable images .* takes 64"):
        tune(colors, run, encoder_folder)
    assert not run.exists()
    tune(colors, run, encoder_folder, *QUICK, max_steps=1)
    with pytest.raises(TrainingError, match=r"holds another run: label_smoothing: 0\.1 there, 0\.2 asked for"):
        tune(colors, run, encoder_folder, *QUICK, "label_smoothing=0.2")
    with pytest.raises(TrainingError, match=r"holds another run: encoder_sha256: .* there, .* asked for"):
        finetune(colors, run, overrides=[*QUICK], device="cpu", recipe="small")


@pytest.mark.parametrize("name", ["foo", "rand-m9-mstdx", "rand-x", "augmix-", "3a-zz"])
def test_an_augmentation_that_timm_does_not_know_is_refused(
    colors: Path, encoder_folder: Path, tmp_path: Path, name: str
) -> None:
    said = complaint(
        name, lambda: tune(colors, tmp_path / "run", encoder_folder, *QUICK, f"augment={name}", max_steps=1)
    )
    assert not said or "timm knows no such augmentation" in said


def test_a_damaged_result_is_made_again(
    colors: Path, encoder_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    found = tune(colors, run, encoder_folder, *QUICK)
    for text in ("{", "[]", '{"top1": 3}', "\0\0"):
        (run / "result.json").write_text(text)
        again = tune(colors, run, encoder_folder, *QUICK)
        assert again is not None
        assert found is not None
        assert again["top1"] == found["top1"]
        assert json.loads((run / "result.json").read_text()) == again
    assert caplog.text.count("the last weights are tested again") == 4


def test_a_share_without_pairs_is_refused(encoder: Encoder) -> None:
    with pytest.raises(UsageError, match=r"pairs that 3 processes can share alike: --set batch_size=6"):
        ClassifierStep(make_classifier(encoder, recipe(*QUICK), 3), recipe(*QUICK), Ranks(0, 3))


def test_the_recipes_have_the_numbers_of_mae() -> None:
    base, large = get_finetune_recipe("mae_b"), get_finetune_recipe("mae_l")
    assert (base.epochs, base.base_lr, base.layer_decay, base.drop_path) == (100, 5e-4, 0.65, 0.1)
    assert (large.epochs, large.base_lr, large.layer_decay, large.drop_path) == (50, 1e-3, 0.75, 0.2)
    for chosen in (base, large):
        assert (chosen.batch_size, chosen.warmup_epochs, chosen.weight_decay) == (1024, 5, 0.05)
        assert (chosen.mixup, chosen.cutmix, chosen.label_smoothing) == (0.8, 1.0, 0.1)
        assert (chosen.augment, chosen.erase_probability, chosen.pool) == ("rand-m9-mstd0.5-inc1", 0.25, "mean")
        assert (chosen.beta1, chosen.beta2, chosen.ema_decay, chosen.head_std) == (0.9, 0.999, 0, 2e-5)
    assert base.lr == pytest.approx(2e-3)
    assert {width: finetune_recipe_for(width) for width in (192, 384, 768, 1024)} == {
        192: "small", 384: "small", 768: "mae_b", 1024: "mae_l",
    }  # fmt: skip
    for name, make in FINETUNE_RECIPES.items():
        assert make().name == name
        assert f"--recipe {name}" in (make.__doc__ or "")
    for kind in (Recipe, FineTuneRecipe):  # every field is explained beside it, or in the line above
        source = inspect.getsource(AnyRecipe) + inspect.getsource(kind)
        for field in dataclasses.fields(kind):
            assert re.search(rf"^    {field.name}: .*  # \w|# .*\n    {field.name}: ", source, re.MULTILINE), field.name


def test_the_command_says_what_came_of_it(colors: Path, encoder_folder: Path, tmp_path: Path) -> None:
    words = ["eval", "finetune", encoder_folder, "--data", colors, "--out", tmp_path / "run", "--smoke"]
    words += ["--device", "cpu", "--workers", 0, "--set", "epochs=2"]
    result = CliRunner().invoke(main, list(map(str, [*words, "--max-steps", 1])))
    assert "Stopped at --max-steps" in result.output
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert re.search(r"Top-1 \d+\.\d % \(95 % interval \d+\.\d to \d+\.\d\) on 12 test images\.", result.output)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["name"] == "small.smoke"
