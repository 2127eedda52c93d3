"""Everything that wants a GPU, in one command: the tests, the card, the training step, extraction, and weights.

    python benchmarks/gpu.py --data data --out gpu-out
    python benchmarks/gpu.py --data data --out trial --device cpu --trial   # the same at a small size, anywhere

Jobs, in this order; one that fails is noted, and the next goes on:
  tests  `pytest -m gpu`, and one line about the card: matrix rate, copy rate
  step   benchmarks/step.py of vit_b16.in1k and vit_l16.in1k
  extract benchmarks/extract.py of a ViT-B/16 and a ViT-L/16 with random weights, on JPEG files made on the spot
  train  the recipes on tin200 one after the other, as long as --minutes last, with k-NN on the way; a run that was cut
         short goes on with the next call when --out still has its folder
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from micl_zoo._version import package_versions
from micl_zoo.encoders.device import resolve_device
from micl_zoo.encoders.weights import save_weights
from micl_zoo.files import write_text
from micl_zoo.training.pretraining.bench import device_name, matrix_rate, timed
from micl_zoo.training.pretraining.pretrain import make_vit
from micl_zoo.training.recipes import get_recipe
from micl_zoo.training.run.provenance import code_commit, machine
from micl_zoo.training.run.rundir import encoder_config

ROOT = Path(__file__).resolve().parents[1]
STEP_RECIPES = ("vit_b16.in1k", "vit_l16.in1k")
TRAIN_RECIPES = ("vit_s16.tin200", "vit_b16.tin200", "vit_l16.tin200")
KNN_SETS = ("caltech101", "cifar10")
COPY_BYTES = {"cuda": 2**32, "cpu": 2**27}


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Folder of the data sets, for `train`.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for records and runs.")
@click.option(
    "--jobs",
    default="tests,step,extract,train",
    show_default=True,
    help="Of those above, with commas between, in order.",
)
@click.option("--recipes", default=",".join(TRAIN_RECIPES), show_default=True, help="For `train`, with commas between.")
@click.option("--minutes", type=float, default=9, show_default=True, help="For all of it; `train` stops in time.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--trial", is_flag=True, help="Small sizes, to see on any machine that all of it runs.")
def main(data: Path | None, out: Path, jobs: str, recipes: str, minutes: float, device: str, trial: bool) -> None:
    """Run the jobs; the last thing printed is a JSON object with all results."""
    stop, target = time.monotonic() + 60 * minutes, resolve_device(device)
    out.mkdir(parents=True, exist_ok=True)
    todo: dict[str, Callable[[], Any]] = {
        "tests": lambda: {"pytest": run_tests(device, trial), "card": card(target)},
        "step": lambda: [step_record(name, out, device, trial) for name in STEP_RECIPES],
        "extract": lambda: [extract_record(name, out, device, trial) for name in STEP_RECIPES],
        "train": lambda: [train(name, data, out, device, trial, stop) for name in recipes.split(",")],
    }
    if wrong := [job for job in jobs.split(",") if job not in todo]:
        raise click.UsageError(f"unknown job {wrong[0]!r}. Valid: {', '.join(todo)}.")
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": code_commit(),
        "machine": machine(target),
        "versions": package_versions(),
    }
    for job in jobs.split(","):
        click.echo(f"== {job}", err=True)
        try:
            results[job] = todo[job]()
        except Exception as error:  # the machine is lent for minutes: what comes after must still run
            results[job] = f"failed: {type(error).__name__}: {error}"
        write_text(out / "gpu.json", json.dumps(results, indent=1) + "\n")
    click.echo(json.dumps(results, indent=1))


def run_tests(device: str, trial: bool) -> str:
    """The last line of `pytest -m gpu`; without a GPU they are collected only."""
    marker = ["-m", "gpu", *(["--collect-only"] if trial or device == "cpu" else [])]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *marker, str(ROOT / "tests")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    click.echo(run.stdout[-4000:] + run.stderr[-2000:], err=True)
    return (run.stdout.strip().splitlines() or ["nothing"])[-1]


def card(device: torch.device) -> dict[str, Any]:
    """Matrix and copy rates."""
    size = COPY_BYTES.get(device.type, 2**27)
    block = torch.empty(size, dtype=torch.uint8, device=device).random_()
    other = torch.empty_like(block)
    copy = min(timed(lambda: other.copy_(block), device) for _ in range(5))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {
        "device": device_name(device),
        "matrix_tflops": round(matrix_rate(device, dtype) / 1e12, 3),
        "matrix_dtype": str(dtype),
        "copy_tb_per_s": round(2 * size / copy / 1e12, 4),  # read once and written once
        "driver": driver() if device.type == "cuda" else None,
    }


def driver() -> str:
    """The version of the card's driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def step_record(recipe: str, out: Path, device: str, trial: bool) -> dict[str, Any]:
    """One record of benchmarks/step.py, in a process of its own so that its memory is free again."""
    file = out / f"step-{recipe.partition('.')[0]}.json"
    small = ["--batch-size", "4", "--rounds", "1", "--set", "compile=false"] if trial else []
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "step.py"),
        recipe,
        "--device",
        device,
        *small,
        "-o",
        str(file),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {key: found[key] for key in ("recipe", "batch_size", "images_per_second", "ratio", "share_of_matrix_rate")}


def extract_record(recipe: str, out: Path, device: str, trial: bool) -> dict[str, Any]:
    """One record of benchmarks/extract.py: model alone, from files to store, and the plain loops."""
    photos, weights = out / "jpegs", out / f"random-{recipe.partition('.')[0]}"
    if not photos.exists():
        make_jpegs(photos, 16 if trial else 512)
    chosen = get_recipe(recipe, ("depth=1", "embed_dim=64", "num_heads=1", f"name={recipe}.small") if trial else ())
    note = {"recipe": "none: random weights"}
    save_weights(weights, make_vit(chosen).state_dict(), encoder_config(chosen), note, "float32")
    file = out / f"extract-{recipe.partition('.')[0]}.json"
    options = ["--weights", str(weights), "--device", device, "--out", str(file)]
    options += ["--images", "32" if trial else "20480", "--batch-size", "8" if trial else "256"]
    command = [sys.executable, str(ROOT / "benchmarks" / "extract.py"), str(photos), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {"recipe": recipe, **{key: found[key] for key in ("figures", "goals")}}


def make_jpegs(folder: Path, count: int) -> None:
    """Smooth pictures with some noise, 500 x 375 and about 60 kB each, like the photographs of ImageNet."""
    folder.mkdir(parents=True)
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = np.clip(smooth + random.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:04d}.jpg", quality=88)


def train(recipe: str, data: Path | None, out: Path, device: str, trial: bool, stop: float) -> dict[str, Any]:
    """One recipe, or as much of it as there is time for: it is told to stop 45 seconds before the end."""
    seconds = stop - time.monotonic() - 45
    if data is None or (seconds < 30 and not trial):
        return {"recipe": recipe, "state": "not started: no data given" if data is None else "not started: no time"}
    run, source = out / recipe, str(data / "tin200" / ("val.parquet" if trial else "train-*.parquet"))
    knn = [] if trial else [word for name in KNN_SETS for word in ("--knn", str(data / name))]
    small = ["--smoke", "--max-steps", "5"] if trial else []
    command = [sys.executable, "-m", "micl_zoo", "train", recipe, "--data", source, "--out", str(run)]
    command += ["--device", device, "--knn-minutes", "3", "--knn-images", "2000", *knn, *small]
    process = subprocess.Popen(command)
    try:
        process.wait(timeout=max(seconds, 60))
    except subprocess.TimeoutExpired:
        process.terminate()  # it writes a checkpoint first
        process.wait(timeout=60)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "recipe": recipe,
        "state": "finished" if (run / "encoder").exists() else "stopped with a checkpoint",
        "last": next((line for line in reversed(lines) if "loss" in line), None),
        "knn": [{"step": line["step"], **line["knn"]} for line in lines if "knn" in line],
    }


if __name__ == "__main__":
    main()
