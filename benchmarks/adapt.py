"""Go on with a small encoder on images of one's own, without labels: which settings help, and does it help at all?

    python benchmarks/adapt.py train --data data --work work --corpus caltech101 --minutes 5 --jobs 2
    python benchmarks/adapt.py evaluate --data data --work work -o record.json --jobs 2

SimCLR needs `pip install lightly`; MiCL does not. The data folder holds {train,test}.parquet, with columns image and
label, below each of caltech101, flowers5 and cifar10. Every arm but `random` starts from vit_ti16.tin200, which comes
with the package. It sees the images of the corpus's training part, and is measured on both parts with their labels.

The clock: each arm is a process of its own with one thread on one core, and its minutes are those of that process
(`time.process_time`). Reading images, transforms, forward and backward passes count; building the network and importing
do not. The learning rate goes by the share of the minutes that is used: warm-up for 5 %, then a half-cycle cosine.

An arm is its folder CORPUS-MINUTES-SEED/ARM below the work folder: encoder/, and arm.json with its settings, its loss
and its times. One that is there with the same settings is not trained again. The arm `base` leaves three more encoders:
`ema`, the running mean of its weights, and `share-0.25` and `share-0.5`, with that share of the start's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
import torch.nn.functional as F
from contest import ONE_THREAD, free_cores, run_apart, words_of
from methods import Budget, Run, arm_provenance, make_method, open_corpus, prepare_corpus
from record import missing, write
from rivals import METHODS, PENALTIES, K, data_option, facts, work_option

import micl_zoo
from micl_zoo.encoders.device import autocast_dtype, resolve_precision
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.errors import unknown
from micl_zoo.files import atomic_path, file_sha256, write_text
from micl_zoo.images.decode import decode
from micl_zoo.images.transform import Transform
from micl_zoo.progress import progress
from micl_zoo.sources.reader import Reader
from micl_zoo.training.evaluation.features import Features
from micl_zoo.training.evaluation.labelled import LabelledImages, LabelledSet
from micl_zoo.training.evaluation.protocols import METHODS as WAYS
from micl_zoo.training.evaluation.protocols import Protocol
from micl_zoo.training.evaluation.ranking import Outcome, difference
from micl_zoo.training.evaluation.record import Bits
from micl_zoo.training.evaluation.tables import markdown, take_outcomes
from micl_zoo.training.pretraining import adapt
from micl_zoo.training.pretraining.start import Start
from micl_zoo.training.recipes import Recipe, vit_ti16_tin200
from micl_zoo.training.run.provenance import made_with
from micl_zoo.zoo.ours import DEFAULT
from micl_zoo.zoo.weights import WEIGHTS_FILE, save_weights

CPU = torch.device("cpu")
CORPORA = {"caltech101": 128, "flowers5": 128, "cifar10": 32}  # side in pixels at which the decoded images are kept
NICE = 5  # of the processes that train: others that use the machine go first
TRIAL_BATCH = 8
SHARES = (0.25, 0.5)  # of the start's weights, in the encoders that `base` leaves besides its own
ON_ALL_SETS = ("adapt", "random", "simclr")  # arms that are measured on the sets they were not adapted to, too
PROTOCOL = Protocol(methods=("knn", "logreg"), pools=("cls",), ks=(K,), inverse_penalties=PENALTIES)
KEYS = {"knn": str(K), "logreg": "cls"}  # of the figure that is shown, by method

Figures = dict[str, Any]  # of one encoder on one set


class Arm(NamedTuple):
    """One way to go on."""

    says: str  # what it is, in a line
    changes: dict[str, Any]  # what it changes in the recipe of `base`
    method: str = "micl"  # its name in benchmarks/methods.py
    from_start: bool = True  # whether it starts from the encoder, not from random weights


def one(says: str, **changes: Any) -> Arm:
    """An arm that is `base` but for the changes."""
    return Arm(says, changes)


def seen(says: str, **changes: Any) -> Arm:
    """An arm that keeps half of the patches and has the learning rate of pre-training, and the changes."""
    return one(
        f"half of the patches kept, learning rate 1e-3: {says}", **{"mask_ratio": 0.5, "base_lr": 1e-3, **changes}
    )


def chosen(says: str, **changes: Any) -> Arm:
    """An arm that has the settings that `micl-zoo adapt` chooses, and the changes."""
    settings = {
        "mask_ratio": adapt.MASK_RATIO,
        "views": adapt.VIEWS,
        "base_lr": adapt.RATE,
        "layer_decay": adapt.LAYER_DECAY,
        "temperature": adapt.TEMPERATURE,
    }
    return one(f"the settings of micl-zoo adapt: {says}", **{**settings, **changes})


SETTINGS = {
    "base": one("what the other arms change one thing of"),
    "rate-5e-5": one("a quarter of the learning rate", base_lr=5e-5),
    "rate-5e-4": one("2.5 times the learning rate", base_lr=5e-4),
    "rate-1e-3": one("5 times the learning rate, that of pre-training", base_lr=1e-3),
    "decay-1": one("one learning rate for all layers", layer_decay=1.0),
    "decay-0.65": one("learning rates that fall faster towards the first layer", layer_decay=0.65),
    "mask-0.5": one("24 of 49 patches kept, 8 a view", mask_ratio=0.5),
    "mask-0.8": one("9 of 49 patches kept, 3 a view", mask_ratio=0.8),
    "views-2": one("14 patches in two views, not 15 in three", views=2),
    "temperature-0.07": one("temperature 0.07", temperature=0.07),
    "color-off": one("no colour change", view_color=False),
    "crop-0.5": one("crops from 50 % of the image on", crop_scale_min=0.5),
}
SEEN = {  # of SETTINGS, more patches and a higher rate gained most: what may better the two together
    "seen": seen("what the other arms of these change one thing of"),
    "seen-mask-0": seen("all patches kept, 16 a view", mask_ratio=0.0),
    "seen-views-2": seen("24 patches in two views, 12 a view", views=2),
    "seen-mask-0-views-2": seen("all patches kept, in two views, 24 a view", mask_ratio=0.0, views=2),
    "seen-decay-1": seen("one learning rate for all layers", layer_decay=1.0),
    "seen-rate-2e-3": seen("twice the learning rate", base_lr=2e-3),
    "seen-mask-0.25": seen("36 patches kept, 12 a view", mask_ratio=0.25),
    "seen-temperature-0.07": seen("temperature 0.07", temperature=0.07),
    "seen-temperature-0.02": seen("temperature 0.02", temperature=0.02),
    "seen-temperature-0.01": seen("temperature 0.01", temperature=0.01),
    "seen-sharp": seen("temperature 0.01, one learning rate for all layers", temperature=0.01, layer_decay=1.0),
    "seen-sharper": seen("temperature 0.005, one learning rate for all layers", temperature=0.005, layer_decay=1.0),
    "seen-color-off": seen("no colour change", view_color=False),
    "seen-crop-0.5": seen("crops from 50 % of the image on", crop_scale_min=0.5),
}
CHOSEN = {  # what these came to, and parts that stay as they are
    "adapt": chosen("what the other arms of these change one thing of"),
    "adapt-frozen-embedding": chosen(
        "patch embedding and positions kept as they are", frozen_embedding=True, frozen_positions=True
    ),
    "adapt-frozen-6": chosen("the first half of the blocks kept as they are", frozen_blocks=6),
}
OTHERS = {
    "random": Arm(
        "the same time from random weights: positions, learning rate and no layer-wise decay as in pre-training",
        {"positions": "sincos", "base_lr": 1e-3, "layer_decay": 1.0},
        from_start=False,
    ),
    "simclr": Arm("SimCLR on whole crops", {"base_lr": 5e-4}, "simclr"),
    "simclr-rate-1e-4": Arm("SimCLR at a fifth of the learning rate", {"base_lr": 1e-4}, "simclr"),
}
ARMS = {**SETTINGS, **SEEN, **CHOSEN, **OTHERS}
GROUPS = {
    "settings": list(SETTINGS),
    "seen": list(SEEN),
    "chosen": list(CHOSEN),
    "others": list(OTHERS),
    "all": list(ARMS),
}


def recipe_of(name: str, corpus: str, seed: int, start: Start, *, trial: bool) -> Recipe:
    """Every number of an arm; of a method that is not MiCL, those of its crops, order and optimizer."""
    base = dataclasses.replace(
        vit_ti16_tin200(),  # mask_ratio 0.69, three views, temperature 0.03, colour changes
        name=f"{start.encoder.name.partition('.')[0]}.{corpus}-{name}",
        corpus=corpus,
        source_size=CORPORA[corpus],
        batch_size=256,
        base_lr=2e-4,
        layer_decay=0.85,
        clip_norm=1.0,
        weight_decay=0.05,
        precision="auto",
        compile=False,
        save_dtype="float32",
        seed=seed,
    )
    changed = dataclasses.replace(start.recipe(base), **ARMS[name].changes)
    return dataclasses.replace(changed, batch_size=min(changed.batch_size, TRIAL_BATCH)) if trial else changed


@click.group()
def main() -> None:
    """Adapt an encoder to images without labels by one setting or another, and measure what it gains."""


@main.command()
@data_option
@work_option
@click.option("--corpus", type=click.Choice(list(CORPORA)), default="caltech101", show_default=True, help="Images.")
@click.option("--minutes", type=float, default=5.0, show_default=True, help="Processor time of each arm.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the order and every draw.")
@click.option(
    "--arms",
    default="all",
    show_default=True,
    help=f"Names or groups ({', '.join(GROUPS)}), with commas between.",
)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Arms at once, one core each.")
@click.option("--trial", is_flag=True, help="Batches of 8, to see in seconds that all of it runs.")
def train(data: Path, work: Path, corpus: str, minutes: float, seed: int, arms: str, jobs: int, trial: bool) -> None:
    """Train arms, each in a process of its own."""
    names = [name for word in arms.split(",") for name in GROUPS.get(word, [word])]
    if wrong := [name for name in names if name not in ARMS]:
        raise click.UsageError(unknown("arm", wrong[0], [*GROUPS, *ARMS]))
    if why := missing("lightly"):
        left = [name for name in names if ARMS[name].method != "micl"]
        click.echo(f"left out, {why}: {', '.join(left) or 'none of these'}")
        names = [name for name in names if name not in left]
    cores, run = free_cores(jobs), run_folder(work, corpus, minutes, seed)
    prepare_corpus(data, f"{corpus}/train.parquet", work / f"corpus-{corpus}", CORPORA[corpus])
    options = {"work": work, "corpus": corpus, "minutes": minutes, "seed": seed, "nice": NICE}

    def command(name: str, core: int | None) -> list[str]:
        words = words_of({**options, "core": core})
        return [sys.executable, __file__, "arm", name, *words, *["--trial"] * trial]

    if failed := run_apart(names, command, lambda name: run / name / "log.txt", cores, ONE_THREAD):
        raise click.ClickException(f"not trained: {', '.join(failed)}. See log.txt in their folders in {str(run)!r}.")


def run_folder(work: Path, corpus: str, minutes: float, seed: int) -> Path:
    """Name the folder of the arms that are compared with each other."""
    return work / f"{corpus}-{minutes:g}-{seed}"


@main.command(hidden=True)
@click.argument("name")
@work_option
@click.option("--corpus", required=True, help="Images.")
@click.option("--minutes", type=float, required=True, help="Processor time.")
@click.option("--seed", type=int, required=True, help="Seed of the order and every draw.")
@click.option("--core", type=int, help="Core to run on.")
@click.option("--nice", type=int, help="How much others that use the machine go first.")
@click.option("--trial", is_flag=True, help="Batches of 8.")
def arm(
    name: str, work: Path, corpus: str, minutes: float, seed: int, core: int | None, nice: int | None, trial: bool
) -> None:
    """Train one arm; `train` starts this in a process of its own."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    if nice and hasattr(os, "nice"):
        os.nice(nice)
    torch.set_num_threads(1)
    start, budget = Start.open(DEFAULT), Budget(minutes, None)
    recipe = recipe_of(name, corpus, seed, start, trial=trial)
    settings = {
        "method": ARMS[name].method,
        "start": start.facts() if ARMS[name].from_start else None,
        "budget": dataclasses.asdict(budget),
        "recipe": dataclasses.asdict(recipe),
    }
    settings = json.loads(json.dumps(settings))  # as they come back from the file
    folder = run_folder(work, corpus, minutes, seed) / name
    file = folder / "arm.json"
    if file.exists():
        if json.loads(file.read_text(encoding="utf-8"))["settings"] != settings:
            raise click.UsageError(f"{str(folder)!r} was trained with other settings: give another --work")
        click.echo("is there already")
        return
    told = train_arm(name, folder, work / f"corpus-{corpus}", budget, recipe, settings, start)
    write_text(file, json.dumps(told, indent=1) + "\n")


def train_arm(
    name: str, folder: Path, images: Path, budget: Budget, recipe: Recipe, settings: dict[str, Any], start: Start
) -> dict[str, Any]:
    """Train, save the encoders, and return what arm.json says."""
    torch.manual_seed(recipe.seed)
    np.random.seed(recipe.seed)  # noqa: NPY002 - lightly's transforms draw from it
    (corpus, labels, source), base = open_corpus(images), name == "base"
    before = start if ARMS[name].from_start else None
    method = make_method(ARMS[name].method, recipe, CPU, int(labels.max()) + 1, before, mean=base)
    run = Run(method, recipe, budget, CPU)
    run.train(corpus, labels)
    provenance = arm_provenance(ARMS[name].says, settings, method, source, CPU)
    end = method.vit.state_dict()
    encoders = {"encoder": end}
    if base:
        encoders["ema"] = method.extras["mean"].state_dict()
        encoders |= {f"share-{share:g}": start.mixed(end, share) for share in SHARES}
    for kind, state in encoders.items():
        save_weights(folder / kind, state, start.config(recipe), provenance, recipe.save_dtype)
    result = run.result()
    click.echo(f"{run.images:,} images in {result['minutes']:.2f} minutes, loss {run.losses[-1]:.3f}")
    return {"name": name, "settings": settings, **provenance, "result": result}


@main.command()
@data_option
@work_option
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Record to write.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Encoders measured at once.")
def evaluate(data: Path, work: Path, out: Path, jobs: int) -> None:
    """Measure the start and every arm of the work folder; write the record, print a table per run."""
    runs = trained_runs(work)
    if not runs:
        raise click.UsageError(f"no arm in {str(work)!r}: train some first")
    start = Start.open(DEFAULT)
    first = work / "start" / "encoder"
    start.encoder.save(first, overwrite=True)
    sets = {name: LabelledSet.open(data / name) for name in CORPORA}
    for labelled in sets.values():
        decoded(labelled, start.encoder.transform, work)
    asked = [(first, labelled) for labelled in sets.values()]
    for run, arms in runs.items():
        for name, folder in encoders(work / run, arms).items():
            own = run.partition("-")[0]
            asked += [(folder, sets[each]) for each in sets if each == own or name in ON_ALL_SETS]
    share_cores = partial(torch.set_num_threads, max(1, torch.get_num_threads() // jobs))
    with ProcessPoolExecutor(jobs, get_context("spawn"), share_cores) as pool:  # fork breaks a torch that has threads
        each = pool.map if jobs > 1 else map
        list(each(kept_measure, asked[: len(sets)], repeat(work)))  # the start, which the others are compared with
        found = list(each(kept_measure, asked, repeat(work)))
    measured: dict[Path, dict[str, Figures]] = {}
    for (folder, labelled), figures in zip(asked, found, strict=True):
        measured.setdefault(folder, {})[labelled.name] = figures
    record = {
        "start": {**start.facts(), "results": measured[first]},
        "runs": {
            run: {
                "arms": {name: facts(arm) for name, arm in arms.items()},
                "results": {
                    name: compared(measured[folder], measured[first])
                    for name, folder in encoders(work / run, arms).items()
                },
            }
            for run, arms in runs.items()
        },
        "unit": "percent of test images; low and high: 95 % bootstrap interval over them, which says nothing of seeds",
        "difference": "to the start, in points, paired by test image, with the 95 % interval of this one difference",
        "cosine": "mean, over the test images, of that of the encoder's embedding and the start's",
        "right": "which test images are classified right, packed as micl_zoo.training.evaluation.record.Bits",
        "protocol": dataclasses.asdict(PROTOCOL),
        "data": {labelled.name: labelled.facts for labelled in sets.values()},
        "command": "python benchmarks/adapt.py evaluate --data DATA --work WORK -o RECORD",
        **made_with(CPU),
    }
    write(record, out)
    for run in runs:
        click.echo(f"\n{run}\n\n{table(record, run)}")
        if text := elsewhere(record, run):
            click.echo(f"\n{run}, on the other sets\n\n{text}")


def trained_runs(work: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What arm.json says of each arm, by run, in the order of this file."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for run in sorted({file.parts[-3] for file in work.glob("*/*/arm.json")}):
        files = {name: work / run / name / "arm.json" for name in ARMS}
        found[run] = {name: json.loads(file.read_text("utf-8")) for name, file in files.items() if file.exists()}
    return found


def encoders(run: Path, arms: dict[str, Any]) -> dict[str, Path]:
    """Folder of every encoder of a run."""
    found: dict[str, Path] = {}
    for name in arms:
        found[name] = run / name / "encoder"
        for extra in ("ema", *(f"share-{share:g}" for share in SHARES)):
            if (folder := run / name / extra).exists():
                found[f"{name} ({extra})"] = folder
    return found


def decoded(labelled: LabelledSet, transform: Transform, work: Path) -> tuple[np.ndarray, np.ndarray]:
    """What an encoder sees of the training and test images, (N, S, S, 3) uint8, decoded once into files."""
    found = []
    for part, images in (("train", labelled.train), ("test", labelled.test)):
        key = hashlib.sha256(f"{images.index.fingerprint()} {transform}".encode()).hexdigest()[:12]
        file = work / "pixels" / f"{labelled.name}-{part}-{key}.npy"
        if not file.exists():
            with atomic_path(file) as temporary, temporary.open("wb") as opened:
                np.save(opened, pixels_of(images, transform, f"decoding {labelled.name}, {part}"))
        found.append(np.load(file, mmap_mode="r"))
    return found[0], found[1]


def pixels_of(images: LabelledImages, transform: Transform, title: str) -> np.ndarray:
    """Decode, resize and crop: (N, S, S, 3) uint8."""
    reader, rows = Reader(), []
    with progress(title, len(images.labels)) as tick:
        for entry in images.index.entries():
            rows.append(transform.pixels(decode(reader.read(entry))))
            tick(1)
    return np.stack(rows)


def kept_measure(asked: tuple[Path, LabelledSet], work: Path) -> Figures:
    """`measure`, or what it found before for the same weights, start and images."""
    folder, labelled = asked
    kept = folder.with_name(f"{folder.name}-{labelled.name}.json")
    weights = [file_sha256(one / WEIGHTS_FILE) for one in (folder, work / "start" / "encoder")]
    key = [*weights, str(PROTOCOL), str(labelled.facts)]
    if kept.exists() and (there := json.loads(kept.read_text(encoding="utf-8")))["key"] == key:
        return dict(there["figures"])
    found = measure(folder, labelled, work)
    write_text(kept, json.dumps({"key": key, "figures": found}, indent=1) + "\n")
    click.echo(f"{folder}: {labelled.name}", err=True)
    return found


def measure(folder: Path, labelled: LabelledSet, work: Path) -> Figures:
    """Figures in percent with their 95 % intervals, by method; which images are right; the cosine to the start."""
    encoder = micl_zoo.load(weights=folder, device="cpu")
    parts = zip(decoded(labelled, encoder.transform, work), (labelled.train, labelled.test), strict=True)
    train, test = (Features({"cls": embedded(encoder, pixels)}, images.labels) for pixels, images in parts)
    how = (PROTOCOL, len(labelled.classes), "cpu")
    figures, outcomes = take_outcomes({name: WAYS[name].measure(train, test, *how) for name in PROTOCOL.methods})
    start = work / "start" / f"{labelled.name}-test.npy"
    if folder == work / "start" / "encoder":
        with atomic_path(start) as temporary, temporary.open("wb") as opened:
            np.save(opened, test.rows["cls"])
    before, after = torch.from_numpy(np.load(start)), torch.from_numpy(test.rows["cls"])
    right = {name: dataclasses.asdict(Bits.of(outcomes[name][key])) for name, key in KEYS.items()}
    return {**figures, "cosine": round(float(F.cosine_similarity(before, after).mean()), 4), "right": right}


def embedded(encoder: Encoder, pixels: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Class tokens (N, D) float32 of pixels, in the precision that `micl-zoo eval` takes."""
    autocast = autocast_dtype(resolve_precision("auto", encoder.device))
    batches = (pixels[first : first + batch_size] for first in range(0, len(pixels), batch_size))
    rows = [encoder.embed_pixels(np.array(one), normalize=False, pool="cls", autocast=autocast) for one in batches]
    return np.concatenate(rows)


def compared(sets: dict[str, Figures], start: dict[str, Figures]) -> dict[str, Figures]:
    """Figures on each set, with the differences to the start's."""
    found = {}
    for name, figures in sets.items():
        apart = {}
        for method in PROTOCOL.methods:
            mine, other = (shown(one, method)["accuracy"] for one in (figures, start[name]))
            low, high = difference(outcome(figures, method), outcome(start[name], method))
            apart[method] = {"points": round(mine - other, 2), "low": low, "high": high}
        found[name] = {**figures, "difference": apart}
    return found


def outcome(figures: Figures, method: str) -> Outcome:
    """Which test images are right, of all of them."""
    right = Bits(**figures["right"][method]).array()
    return right, np.ones(right.shape[1], bool)


def shown(figures: Figures, method: str) -> dict[str, float]:
    """The figure of a method."""
    return dict(figures[method][KEYS[method]])


def table(record: dict[str, Any], run: str) -> str:
    """Markdown with a line per encoder, on the set that it was adapted to, best k-NN first; the start among them."""
    corpus, there = run.partition("-")[0], record["runs"][run]
    results = {name: sets[corpus] for name, sets in there["results"].items()}
    results["(start)"] = record["start"]["results"][corpus]
    lines = []
    for name in sorted(results, key=lambda name: -shown(results[name], "knn")["accuracy"]):
        arm, figures = there["arms"].get(name), results[name]
        told = [f"{arm['images_seen']:,}", f"{arm['images_per_second']:,.0f}", last_loss(arm)] if arm else [""] * 3
        lines.append([name, *cells(figures), f"{figures['cosine']:.3f}", *told])
    return markdown(["arm", *heads(), "cosine", "images seen", "images/s", "last loss"], lines)


def elsewhere(record: dict[str, Any], run: str) -> str:
    """Markdown with a line per encoder and set that it was not adapted to; empty where none was measured."""
    own, lines = run.partition("-")[0], []
    for name, sets in record["runs"][run]["results"].items():
        lines += [[title, name, *cells(one), f"{one['cosine']:.3f}"] for title, one in sets.items() if title != own]
    starts = [[title, "(start)", *cells(one), ""] for title, one in record["start"]["results"].items() if title != own]
    order = sorted([*starts, *lines], key=lambda line: line[0])  # the start first, as sorting is stable
    return markdown(["set", "arm", *heads(), "cosine"], order) if lines else ""


def heads() -> list[str]:
    """Heads of the columns of `cells`."""
    return [text for title in METHODS.values() for text in (f"{title}, %", "difference (95 %)")]


def cells(figures: Figures) -> list[str]:
    """Figures and differences to the start, by method."""
    found = []
    for method in METHODS:
        apart = figures.get("difference", {}).get(method)
        found.append(f"{shown(figures, method)['accuracy']:.1f}")
        found.append(f"{apart['points']:+.1f} ({apart['low']:+.1f}..{apart['high']:+.1f})" if apart else "")
    return found


def last_loss(arm: dict[str, Any]) -> str:
    """Mean loss of the last piece of the curve."""
    return f"{arm['loss_curve'][-1]['loss']:.3f}"


if __name__ == "__main__":
    main()
