"""Compare `micl-zoo extract` with what people write by hand, in turn on the same photographs and weights.

    python benchmarks/extract.py photos/ --images 512 --repeat 3 --out benchmarks/records/extract.json

Every contender is a process of its own, so that its start-up and its peak memory are its own. What is compared is the
rate while running: of a loop from its first finished batch on, of extract from `--json`, where only loading the model
is left out. Both include the end: the last batch, and the rows on disk. Start-up is the wall time less images / rate.
A loop finds its second batch decoded when its clock starts, so --images should be many batches. Prints a table, and
writes a record.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import click
import torch
from contest import in_turn, ratio, spread
from memory import tree_bytes
from record import made_on, missing, options_text, write
from toys import SMALL, random_encoder

import micl_zoo
from micl_zoo.encoders.device import bf16_is_fast, fast_precision, resolve_device, usable_cores
from micl_zoo.errors import UsageError, unknown

LOOPS, LIGHTLY = (Path(__file__).with_name(name) for name in ("loops.py", "lightly_embed.py"))
EXTRACT = [sys.executable, "-m", "micl_zoo", "extract"]
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
SHOWN = ("images", "repeat", "batch_size")  # options that a record's command repeats
MEMORY_SAMPLE_SECONDS = 0.25
BASELINE = "plain fp32"


@dataclass(frozen=True)
class Contender:
    """One way to embed the photographs.

    Attributes:
        name: in the table.
        command: that runs it; OUT stands for a new path each time.
        precision: of its arithmetic.
        twin: the model alone in the same precision and backend, by its name here.
        skip: why it cannot run here, or None.
    """

    name: str
    command: list[str]
    precision: str
    twin: str | None = None
    skip: str | None = None


@dataclass(frozen=True)
class Run:
    """One run of a contender.

    Attributes:
        rate: images/s while running, or None where it does not say.
        wall: seconds from start to exit.
        peak_mb: largest sum of its processes' memory, shared pages counted once; None where Linux does not tell.
        matrix_tflops: what it measured of the matrix rate, if it did.
    """

    rate: float | None
    wall: float
    peak_mb: float | None
    matrix_tflops: float | None


@dataclass(frozen=True)
class Settings:
    """What all contenders are given.

    Attributes:
        photos: folder of `images` files.
        weights: encoder folder.
        scratch: folder for temporary files.
        batch_size: of the loops.
        device: its name.
        seconds: for the model alone.
        lightly_python: Python of an environment with lightly-train, or None.
    """

    photos: Path
    weights: Path
    scratch: Path
    images: int
    batch_size: int
    device: str
    seconds: float
    lightly_python: str | None

    @property
    def onnx(self) -> Path:
        """The exported model."""
        return self.scratch / "model.onnx"

    @property
    def checkpoint(self) -> Path:
        """The weights as lightly-train keeps them."""
        return self.scratch / "lightly.ckpt"


@click.command()
@click.argument("photos", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--images", type=click.IntRange(2), default=128, show_default=True, help="Files, by repeating PHOTOS.")
@click.option("--repeat", type=click.IntRange(1), default=1, show_default=True, help="Runs of each, in turn.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Batch size of the loops.")
@click.option("--weights", type=click.Path(path_type=Path), help="Encoder folder.  [default: a random ViT-B/16]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--seconds", type=click.FloatRange(0), default=15, show_default=True, help="Time for the model alone.")
@click.option("--lightly-python", metavar="PATH", help="Python of an environment with lightly-train.")
@click.option("--only", multiple=True, metavar="NAME", help="Contenders to run.  [default: all]")
@click.option("--trial", is_flag=True, help="Nine images and a small random encoder: does all of it run?")
@click.option("--out", type=click.Path(path_type=Path), help="Record to write.")
def main(
    photos: Path, weights: Path | None, only: Sequence[str], repeat: int, trial: bool, out: Path | None, **options: Any
) -> None:
    """Embed PHOTOS in every way there is."""
    if trial:
        options |= {"images": 9, "batch_size": 4, "seconds": 0}
    options["device"] = str(resolve_device(options["device"]))
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        made = partial(random_encoder, scratch / "encoder")
        encoder = weights or (made("vit_ti16.tin200", SMALL) if trial else made("vit_b16.in1k"))
        files = repeated(photos, options["images"], scratch / "photos")
        record = compare(Settings(files, encoder, scratch, **options), only, repeat)
    record["weights"] = str(weights) if weights else f"random {'ViT-Ti/8' if trial else 'ViT-B/16'}, for speed only"
    record["command"] = f"python benchmarks/extract.py PHOTOS {options_text({**options, 'repeat': repeat}, *SHOWN)}"
    click.echo(table(record))
    write(record, out)


def compare(settings: Settings, only: Sequence[str], repeat: int) -> dict[str, Any]:
    """The record of all contenders."""
    device = torch.device(settings.device)
    every = {one.name: one for one in contenders(settings, device)}
    for name in set(only) - set(every):
        raise UsageError(unknown("contender", name, every))
    asked = [one for name, one in every.items() if not only or name in only]
    skipped = {one.name: one.skip for one in asked if one.skip}
    if {"extract auto", "extract fp32"} <= {one.name for one in asked} and every["extract auto"].precision == "fp32":
        skipped["extract fp32"] = "extract auto is that here"
    chosen = {one.name: one for one in asked if one.name not in skipped}
    prepare(set(chosen), settings)
    runs = run_all(chosen, repeat, settings.scratch, skipped)
    flops = image_flops(settings.weights)
    figures = {
        name: summarised(one, runs, settings.images, flops, matrix_rate_measured(asked, runs, one.precision))
        for name, one in chosen.items()
        if runs[name]
    }
    made = made_on(device)
    made["machine"]["usable_cores"] = usable_cores()
    return {
        "figures": figures,
        "skipped": skipped,
        "goals": goals(figures, device),
        "images": settings.images,
        "repeats": repeat,
        "batch_size_of_the_loops": settings.batch_size,
        "gflop_per_image": round(flops / 1e9, 3),
        "device": settings.device,
        **made,
    }


def contenders(settings: Settings, device: torch.device) -> list[Contender]:
    """All of them, those that cannot run here with the reason."""
    auto = fast_precision(device)
    no_bf16 = None if auto == "bf16" else "bf16 is emulated here, which takes longer than fp32"
    no_openvino = missing("openvino") if device.type == "cpu" else "openvino runs on the CPU"
    return [
        ours("extract auto", settings, auto, "auto"),
        ours("extract openvino", settings, auto, "auto", backend="openvino", skip=no_openvino),
        ours("extract fp32", settings, "fp32", "fp32"),
        loop("plain fp32", "plain", settings, "fp32"),
        loop("plain bf16", "plain", settings, "bf16", skip=no_bf16),
        loop("onnxruntime fp32", "onnx", settings, "fp32", skip=no_onnx(device)),
        lightly_train(settings),
        alone("model fp32", settings, "fp32"),
        alone("model bf16", settings, "bf16", skip=no_bf16),
        alone("model openvino", settings, auto, backend="openvino", skip=no_openvino),
    ]


def ours(
    name: str, settings: Settings, precision: str, asked: str, *, backend: str = "torch", skip: str | None = None
) -> Contender:
    """Extract, end to end."""
    words = [*EXTRACT, str(settings.photos), "-o", "OUT", "--weights", str(settings.weights), "--precision", asked]
    words += ["--devices", settings.device, "--backend", backend, "--json"]
    twin = f"model {backend}" if backend != "torch" else f"model {precision}"
    return Contender(name, words, precision, twin, skip)


def loop(name: str, way: str, settings: Settings, precision: str, *, skip: str | None = None) -> Contender:
    """A loop of benchmarks/loops.py, with a worker a core."""
    words = [sys.executable, str(LOOPS), way, str(settings.photos), "--weights", str(settings.weights)]
    words += ["--device", settings.device, "--batch-size", str(settings.batch_size), "--workers", str(usable_cores())]
    words += ["--onnx", str(settings.onnx)] if way == "onnx" else ["--precision", precision]
    return Contender(name, words, precision, skip=skip)


def alone(
    name: str, settings: Settings, precision: str, *, backend: str = "torch", skip: str | None = None
) -> Contender:
    """The model without files and decoding."""
    size = settings.batch_size if settings.device != "cpu" else min(16, settings.batch_size)
    words = [sys.executable, str(LOOPS), "model", "--weights", str(settings.weights), "--device", settings.device]
    words += ["--precision", precision, "--backend", backend, "--batch-size", str(size)]
    return Contender(name, [*words, "--seconds", str(settings.seconds)], precision, skip=skip)


def lightly_train(settings: Settings) -> Contender:
    """`lightly-train embed` with the same weights, where an environment that has it was given."""
    words = [settings.lightly_python or "", str(LIGHTLY), "embed", str(settings.photos), "--out", "OUT"]
    words += ["--checkpoint", str(settings.checkpoint), "--device", settings.device]
    words += ["--batch-size", str(settings.batch_size), "--workers", str(usable_cores())]
    skip = None if settings.lightly_python else "no environment with lightly-train was given: --lightly-python"
    return Contender("lightly-train fp32", words, "fp32", skip=skip)


def no_onnx(device: torch.device) -> str | None:
    """Why ONNX Runtime cannot run here, or None."""
    if why := missing("onnxruntime", "onnxscript"):
        return why
    import onnxruntime

    if device.type == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this onnxruntime is for the CPU only: install onnxruntime-gpu"
    return None


def prepare(names: set[str], settings: Settings) -> None:
    """What two contenders read in the place of the encoder folder; a user makes it once, so it is not in their time."""
    weights = ["--weights", str(settings.weights)]
    if "onnxruntime fp32" in names:
        words = [sys.executable, str(LOOPS), "export", *weights, "--onnx", str(settings.onnx)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    if "lightly-train fp32" in names:
        words = [str(settings.lightly_python), str(LIGHTLY), "checkpoint", *weights]
        subprocess.run([*words, "--checkpoint", str(settings.checkpoint)], check=True, stdout=subprocess.DEVNULL)


def run_all(chosen: dict[str, Contender], repeat: int, scratch: Path, failed: dict[str, str]) -> dict[str, list[Run]]:
    """Runs of each contender in turn; one that fails is not tried again, and `failed` gets its last words."""
    numbers = count()

    def once(name: str) -> Run | None:
        if name not in failed:
            found = run(chosen[name], scratch / f"run-{next(numbers)}")
            if isinstance(found, Run):
                return found
            failed[name] = found
        return None

    runs = in_turn("contenders", chosen, repeat, once)
    return {name: [one for one in found if one] for name, found in runs.items()}


def run(one: Contender, out: Path) -> Run | str:
    """Run a contender to its end; the last line it complained with where it failed."""
    words = [str(out) if word == "OUT" else word for word in one.command]
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        process = subprocess.Popen(words, stdout=said, stderr=complained)
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(MEMORY_SAMPLE_SECONDS)
        wall = time.perf_counter() - start
        texts = [(file.seek(0), file.read().strip())[1] for file in (said, complained)]
    if process.returncode:
        return f"exit code {process.returncode}: {texts[1].splitlines()[-1] if texts[1] else 'no message'}"
    told = last_json(texts[0])
    rate = told["images"] / told["seconds"] if told.get("seconds") else None
    return Run(rate, wall, peak / 1e6 if peak else None, told.get("matrix_tflops"))


def last_json(text: str) -> dict[str, Any]:
    """The object on the last line, or an empty one: a contender need not say anything."""
    try:
        found = json.loads(text.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def summarised(
    one: Contender, runs: dict[str, list[Run]], images: int, flops: float, matrix: float | None
) -> dict[str, Any]:
    """A contender's row: medians of its runs, the rate's extremes, and what share it reaches of what was measured."""
    own = runs[one.name]
    rates = [run.rate or images / run.wall for run in own]  # one that tells no rate is taken by the wall clock
    (rate, lowest, highest), alone = spread(rates), own[0].matrix_tflops is not None
    plain, twin = (median_rate(runs.get(name, [])) for name in (BASELINE, one.twin or ""))
    waits = [run.wall - images / run.rate for run in own if run.rate]
    peaks = [run.peak_mb for run in own if run.peak_mb]
    return {
        "precision": one.precision,
        "images_per_second": round(rate, 3),
        "lowest_and_highest": [round(lowest, 3), round(highest, 3)],
        "ratio_to_plain_fp32": ratio(rate, plain),
        "share_of_model_only": ratio(rate, twin),
        "share_of_matrix_rate": ratio(rate * flops / 1e12, matrix),
        "matrix_tflops": matrix,
        "start_up_seconds": None if alone or not waits else round(statistics.median(waits), 3),
        "wall_seconds": None if alone else round(statistics.median(run.wall for run in own), 3),
        "peak_mb": round(statistics.median(peaks)) if peaks else None,
    }


def median_rate(runs: list[Run]) -> float | None:
    """Images/s, or None without runs that tell it."""
    rates = [run.rate for run in runs if run.rate]
    return statistics.median(rates) if rates else None


def matrix_rate_measured(asked: list[Contender], runs: dict[str, list[Run]], precision: str) -> float | None:
    """The best TFLOP/s that the runs of the model alone measured for a precision."""
    alike = [run for one in asked if one.precision == precision for run in runs.get(one.name, [])]
    found = [run.matrix_tflops for run in alike if run.matrix_tflops]
    return round(max(found), 4) if found else None


def goals(figures: dict[str, dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """What extract is to reach, and whether it did; None where the contenders of a goal did not run."""
    mine = {name: row for name, row in figures.items() if name.startswith("extract")}
    auto = mine.get("extract auto", {})
    same = [
        row["images_per_second"]
        for name, row in figures.items()
        if not name.startswith(("extract", "model")) and row["precision"] == auto.get("precision")
    ]
    fastest = max((row["ratio_to_plain_fp32"] or 0 for row in mine.values()), default=None)
    asked: list[tuple[str, float | None, float, bool]] = [
        ("--precision auto over the plain fp32 loop", auto.get("ratio_to_plain_fp32"), 1.8, True),
        ("--precision auto, share of the matrix rate", auto.get("share_of_matrix_rate"), 0.75, True),
        ("the fastest extract over the plain fp32 loop", fastest, 2.4, True),
        (
            "--precision auto over the best of the others at the same precision",
            ratio(auto["images_per_second"], max(same)) if auto and same else None,
            1.0,
            False,
        ),
        *((f"{name} over its model alone", row["share_of_model_only"], 0.9, False) for name, row in mine.items()),
    ]
    bf16 = bf16_is_fast(device)
    return [
        {
            "goal": goal,
            "figure": figure,
            "at_least": least,
            "met": None if not figure else figure >= least,
            "asked_of_this_machine": bf16 or not wants_bf16,
        }
        for goal, figure, least, wants_bf16 in asked
    ]


def table(record: dict[str, Any]) -> str:
    """For a person."""
    columns = {
        "images/s": "images_per_second",
        "to plain": "ratio_to_plain_fp32",
        "start-up s": "start_up_seconds",
        "peak MB": "peak_mb",
        "of model": "share_of_model_only",
        "of matrix": "share_of_matrix_rate",
    }
    lines = [f"{'':20}" + "".join(f"{title:>12}" for title in columns)]
    for name, row in record["figures"].items():
        cells = ["-" if row[key] is None else f"{row[key]:,}" for key in columns.values()]
        lines.append(f"{name:20}" + "".join(f"{cell:>12}" for cell in cells))
    lines += [f"{name}: left out, {why}" for name, why in record["skipped"].items()]
    for goal in record["goals"]:
        said = {True: "met", False: "not met", None: "not measured"}[goal["met"]]
        where = "" if goal["asked_of_this_machine"] else " (asked of a processor that computes bf16 fast)"
        lines.append(f"{goal['goal']}: {goal['figure']}, at least {goal['at_least']} {said}{where}")
    return "\n".join(lines)


def repeated(photos: Path, images: int, folder: Path) -> Path:
    """A folder of that many image files: links to the photographs, one after the other, over and over."""
    found = sorted(path.resolve() for path in photos.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise click.UsageError(f"no {', '.join(sorted(IMAGE_SUFFIXES))} below {photos}")
    folder.mkdir()
    for number in range(images):
        photo = found[number % len(found)]
        photo.read_bytes()  # so that no contender is the one that finds it on a cold disk
        (folder / f"{number:07d}{photo.suffix}").symlink_to(photo)
    return folder


def image_flops(weights: Path) -> float:
    """FLOPs of one image, counted from the shapes; a multiplication and an addition are two.

    ViT-B/16, 197 tokens: 2 x 197 x 85 M weights of the blocks, 12 x 4 x 197^2 x 768 of attention, 2 x 196 x 0.6 M of
    the patch embedding: 35.1 GFLOP.
    """
    vit = micl_zoo.load(weights=weights, device="cpu").vit
    patches, width, depth = vit.patch_embed.num_patches, vit.embed_dim, len(vit.blocks)
    matrices = sum(weight.numel() for weight in vit.blocks.parameters() if weight.ndim == 2)
    attention = depth * 4 * (patches + 1) ** 2 * width
    return float(2 * (patches + 1) * matrices + attention + 2 * patches * vit.patch_embed.proj.weight.numel())


if __name__ == "__main__":
    main()
