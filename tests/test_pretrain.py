"""The loop: it learns, goes on to the bit, stops when it must, and leaves all that is promised on disk."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import TWIN
from micl_zoo.training import pretrain as module
from micl_zoo.training.micl import MiCLOutput
from micl_zoo.training.pretrain import pretrain
from micl_zoo.training.recipes import RECIPES, get_recipe
from safetensors.torch import load_file

import micl_zoo
from micl_zoo.errors import SourceError, TrainingError, UsageError
from micl_zoo.weights import header

RECIPE = "vit_ti16.tin200"


def losses(run: Path) -> list[tuple[int, float, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["accuracy"], line["lr"]) for line in lines if "loss" in line]


def test_a_run_learns_and_leaves_what_is_promised(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, run = image_folder(32), tmp_path / "run"
    made = pretrain(RECIPE, folder, run, overrides=[*TWIN, "epochs=20", "base_lr=0.05"], device="cpu")
    assert made == run / "encoder" / "model.safetensors"
    history = losses(run)
    assert [step for step, *_ in history] == list(range(80))
    first, last = (sum(loss for _, loss, *_ in part) / 8 for part in (history[:8], history[-8:]))
    assert last < first - 0.3

    record = json.loads((run / "run.json").read_text())
    assert record["recipe"]["embed_dim"] == 32
    assert record["data"]["images"] == 32
    assert len(record["data"]["fingerprint"]) == 64
    assert record["result"]["images_seen"] == 640
    assert record["machine"]["cores"] == os.cpu_count()
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert header(made)["provenance"]["recipe"] == record["recipe"]

    before = made.stat().st_mtime_ns
    assert pretrain(RECIPE, folder, run, overrides=[*TWIN, "epochs=20", "base_lr=0.05"], device="cpu") == made
    assert made.stat().st_mtime_ns == before  # a finished run is left alone
    encoder = micl_zoo.load(weights=run / "encoder", device="cpu")
    assert encoder.embed(sorted(folder.glob("*.jpg"))).shape == (16, 32)


@pytest.mark.skipif(
    tuple(map(int, re.findall(r"\d+", timm.__version__)[:3])) < (1, 0, 26),
    reason="timm reads safetensors in a local folder from 1.0.26 on",
)
def test_the_encoder_folder_loads_into_timm_without_us(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(RECIPE, image_folder(8), run, overrides=[*TWIN, "epochs=1", "warmup_epochs=0"], device="cpu")
    model = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=True)
    pixels = torch.randn(2, 3, 32, 32)
    encoder = micl_zoo.load(weights=run / "encoder", device="cpu")
    with torch.inference_mode():
        torch.testing.assert_close(encoder(pixels), model.eval()(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_an_interrupted_run_goes_on_to_the_bit(image_folder: Callable[..., Path], tmp_path: Path, cache: str) -> None:
    folder, options = image_folder(24), [*TWIN, f"cache={cache}"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(RECIPE, folder, whole, overrides=options, device="cpu", workers=0)
    assert pretrain(RECIPE, folder, parts, overrides=options, device="cpu", workers=0, max_steps=5) == parts
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 0.1}\n{"step": 6, "lo')  # lines after the checkpoint, one cut off
    pretrain(RECIPE, folder, parts, overrides=options, device="cpu", workers=0)
    assert losses(whole) == losses(parts)
    assert len(losses(whole)) == 12
    ends = [load_file(run / "encoder" / "model.safetensors") for run in (whole, parts)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own doings
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="compiling needs a C++ compiler")
def test_a_compiled_run_goes_on_to_the_bit_and_is_the_eager_one(
    image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder, plain = image_folder(24), [*TWIN, "depth=1"]
    options = [*plain, "compile=true"]
    whole, parts, eager = (tmp_path / name for name in ("whole", "parts", "eager"))
    pretrain(RECIPE, folder, whole, overrides=options, device="cpu")
    pretrain(RECIPE, folder, parts, overrides=options, device="cpu", max_steps=5)
    torch.compiler.reset()  # as in a new process
    pretrain(RECIPE, folder, parts, overrides=options, device="cpu")
    pretrain(RECIPE, folder, eager, overrides=plain, device="cpu")
    assert losses(whole) == losses(parts)
    assert [loss for _, loss, *_ in losses(whole)] == pytest.approx([loss for _, loss, *_ in losses(eager)], abs=1e-4)


def test_a_run_killed_with_sigkill_goes_on_to_the_bit(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, options = image_folder(24), [*TWIN, "epochs=100"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    sets = [word for change in options for word in ("--set", change)]
    command = [sys.executable, "-m", "micl_zoo", "train", RECIPE, "--data", str(folder), "--device", "cpu", *sets]
    process = subprocess.Popen([*command, "--out", str(killed)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(killed.glob("checkpoints/step-*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was still running
    assert not (killed / "encoder").exists()
    for run in (killed, whole):
        subprocess.run([*command, "--out", str(run)], check=True, stdout=subprocess.DEVNULL)
    assert losses(killed) == losses(whole)
    assert len(losses(whole)) == 300
    assert (killed / "encoder/model.safetensors").read_bytes() == (whole / "encoder/model.safetensors").read_bytes()


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_twin_of_every_recipe_runs(image_folder: Callable[..., Path], tmp_path: Path, name: str) -> None:
    keep = [change for change in TWIN if not change.startswith(("epochs", "warmup"))]
    few = [f"mask_ratio={get_recipe(name).mask_ratio}", "epochs=1", "warmup_epochs=0"]
    if name.endswith("in1k"):
        few += ["crop_size=64", "image_size=64"]  # 64 patches, so that a fifth of them is something
    made = pretrain(name, image_folder(16), tmp_path / "run", overrides=[*keep, *few], device="cpu", workers=0)
    assert micl_zoo.load(weights=made.parent, device="cpu").name == name


def test_a_loss_that_is_not_finite_stops_the_run(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"(the loss is nan at step|after step) \d+.*stopped.*base_lr"):
        pretrain(RECIPE, image_folder(16), tmp_path / "r", overrides=[*TWIN, "base_lr=1e30"], device="cpu")
    assert not (tmp_path / "r" / "encoder").exists()


def test_collapse_is_warned_of(
    image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def collapsed(self: object, patches: torch.Tensor, *rest: Any) -> MiCLOutput:
        flat = patches.new_zeros((), requires_grad=True)
        return MiCLOutput(flat * 0 + torch.tensor(8.0).log(), torch.empty(0), torch.tensor(0.1))

    monkeypatch.setattr(module.MiCL, "contrast", collapsed)
    monkeypatch.setattr(module.RunDir, "save_checkpoint", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        pretrain(RECIPE, image_folder(16), tmp_path / "r", overrides=[*TWIN, "epochs=12"], device="cpu")
    assert "gives every image the same embedding (ln 8 = 2.079)" in caplog.text


def test_a_folder_with_another_run_is_refused(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, run = image_folder(16), tmp_path / "run"
    pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu", max_steps=1)
    with pytest.raises(TrainingError, match=r"holds another run: temperature: 0\.07 there, 0\.1 asked for"):
        pretrain(RECIPE, folder, run, overrides=[*TWIN, "temperature=0.1"], device="cpu")
    (folder / "new.jpg").write_bytes((folder / "000.jpg").read_bytes())
    with pytest.raises(TrainingError, match="images: 16 there, 17 asked for"):
        pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu")
    with pytest.raises(TrainingError, match="exists and is no run folder"):
        pretrain(RECIPE, folder, folder, overrides=TWIN, device="cpu")


def test_a_damaged_checkpoint_says_what_to_do(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, run = image_folder(16), tmp_path / "run"
    pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu", max_steps=2)
    newest = max((run / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(TrainingError, match="delete it to go on from the checkpoint before"):
        pretrain(RECIPE, folder, run, overrides=TWIN, device="cpu")


def test_a_corpus_smaller_than_a_batch_trains_nothing(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has 5 usable images .* takes 8"):
        pretrain(RECIPE, image_folder(5), tmp_path / "r", overrides=TWIN, device="cpu")
    assert not (tmp_path / "r").exists()  # so that the same --out takes more images


def test_a_ratio_that_leaves_no_view_is_refused_before_the_data_are_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leaves no patch for two views"):
        pretrain(RECIPE, "nowhere", tmp_path / "r", overrides=["mask_ratio=0.97"], device="cpu")
