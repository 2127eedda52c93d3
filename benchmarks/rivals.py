"""Compare MiCL with SimCLR, MAE, DINO and supervised training, and with one thing changed, in equal time.

    python benchmarks/rivals.py train --data data --work work --minutes 60 --arms rivals --jobs 2
    python benchmarks/rivals.py train --data data --work work --minutes 60 --arms ablations --jobs 2
    python benchmarks/rivals.py evaluate --data data --work work -o record.json --jobs 2

The rivals need `pip install lightly`; MiCL and its ablations do not. The data folder holds
tin200/{train-*,val}.parquet and {caltech101,flowers5,cifar10}/{train,test}.parquet, with the columns image and label.

Equal time: on a CPU each arm is a process of its own with one thread on one core, and its minutes are those of that
process (`time.process_time`), so that nothing else on the machine favours an arm; on a GPU they are the wall clock's.
Reading images, transforms, forward and backward passes count; building the network and importing do not.
Equal images: `--images N` in the place of `--minutes M`.

An arm is its folder below the work folder: encoder/, and arm.json with its settings, its loss and its times. One that
is there with the same settings is not trained again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import numpy as np
import torch
from contest import ONE_THREAD, free_cores, run_apart, words_of
from methods import Budget, Run, arm_provenance, make_method, open_corpus, prepare_corpus
from record import missing, write
from timm.models.vision_transformer import VisionTransformer

import micl_zoo
from micl_zoo.encoders.device import resolve_device
from micl_zoo.errors import unknown
from micl_zoo.files import file_sha256, write_text
from micl_zoo.training.evaluation.evaluate import pixel_features, probe
from micl_zoo.training.evaluation.features import Features, embed_labelled
from micl_zoo.training.evaluation.labelled import LabelledSet
from micl_zoo.training.evaluation.protocols import Protocol
from micl_zoo.training.evaluation.tables import markdown
from micl_zoo.training.pretraining.pretrain import initial_model
from micl_zoo.training.recipes import Recipe, vit_ti16_tin200
from micl_zoo.training.run.provenance import made_with
from micl_zoo.training.run.rundir import encoder_config
from micl_zoo.zoo.weights import WEIGHTS_FILE, save_weights

CORPUS = "tin200/train-*.parquet"
SOURCE_SIZE = 64  # of its images
SETS = ("tin200", "caltech101", "flowers5", "cifar10")
TRAIN_IMAGES, TEST_IMAGES = 1_500, 1_000  # of each set, at most, classes as even as they come
POOLS: tuple[Literal["cls", "mean"], ...] = ("cls", "mean")
K = 20  # neighbours
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of logistic regression: a third of eval's, as there are many encoders
PROTOCOL = Protocol(methods=("knn", "logreg"), pools=POOLS, ks=(K,), inverse_penalties=PENALTIES)
METHODS = {"knn": f"k-NN {K}", "logreg": "logistic regression"}
REFERENCES = {"random": ":", "pixels": "--"}  # measured, not trained; how the figure draws them

Figures = dict[str, Any]  # of one encoder on one set, by method; and by pool those of all pools


class Size(NamedTuple):
    """The ViT and its images.

    Attributes:
        image_size: side in pixels of the crops and of what the encoder takes.
        patch_size, embed_dim, depth, num_heads: of the ViT.
        batch_size: images per step.
        mask_ratio: of MiCL as this package trains it.
    """

    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    batch_size: int
    mask_ratio: float


SIZES = {
    "cpu": Size(64, 8, 192, 4, 3, batch_size=128, mask_ratio=0.62),  # 24 of 64 patches, 12 a view
    "ti16": Size(112, 16, 192, 12, 3, batch_size=128, mask_ratio=0.5),  # 24 of 49 patches
    "toy": Size(64, 8, 96, 2, 3, batch_size=8, mask_ratio=0.62),  # to see in seconds that all of it runs
    "gpu": Size(112, 16, 384, 12, 6, batch_size=1024, mask_ratio=0.5),  # the same patches of a ViT-S
}


class Arm(NamedTuple):
    """One bar of the figure.

    Attributes:
        says: what it is, in a line.
        method: its name in benchmarks/methods.py.
        base_lr: peak learning rate at batch 256.
        changes: what it changes in the recipe.
    """

    says: str
    method: str
    base_lr: float
    changes: dict[str, Any]


def micl(says: str, method: str = "micl", base_lr: float = 5e-4, **changes: Any) -> Arm:
    """An arm that is MiCL with a colour change per view, but for the changes."""
    return Arm(says, method, base_lr, {"view_color": True, **changes})


def sharp(says: str, method: str = "micl", base_lr: float = 5e-4, **changes: Any) -> Arm:
    """An arm that is mask-0.8-views-3-temperature-0.03 but for the changes."""
    base = {"mask_ratio": 0.8, "views": 3, "temperature": 0.03}
    return micl(f"a fifth kept, in three views, temperature 0.03: {says}", method, base_lr, **{**base, **changes})


RIVALS = {
    "micl-paper": micl(
        "MiCL as in the paper: a fifth of the patches, no colour change", mask_ratio=0.8, view_color=False
    ),
    "micl-ours": micl("MiCL with more patches and a colour change per view"),
    "simclr": Arm("SimCLR on whole crops", "simclr", 5e-4, {}),  # no AdamW value of its authors: that of DINO
    "mae": Arm("MAE, a quarter visible", "mae", 1.5e-4, {}),  # arXiv 2111.06377, appendix A.1, base learning rate
    "dino": Arm("DINO, the teacher", "dino", 5e-4, {}),  # arXiv 2104.14294, section 3.2: 0.0005 * batch / 256
    "supervised": Arm("labels of the corpus: the ceiling", "supervised", 2.5e-4, {}),  # DeiT: 5e-4 * batch / 512
}
ABLATIONS = {
    "mask-0.5": micl("half of the patches kept", mask_ratio=0.5),
    "mask-0.75": micl("a quarter kept", mask_ratio=0.75),
    "mask-0.8": micl("a fifth kept, with colour changes", mask_ratio=0.8),
    "mask-0.8-views-3": micl("a fifth kept, in three views", mask_ratio=0.8, views=3),
    "mask-0.8-temperature-0.03": micl("a fifth kept, temperature 0.03", mask_ratio=0.8, temperature=0.03),
    "mask-0.8-views-3-temperature-0.03": micl(
        "a fifth kept, in three views, temperature 0.03", mask_ratio=0.8, views=3, temperature=0.03
    ),
    "mask-0.9": micl("a tenth kept", mask_ratio=0.9),
    "no-color": micl("no colour change", view_color=False),
    "temperature-0.2": micl("temperature 0.2", temperature=0.2),
    "temperature-0.03": micl("temperature 0.03", temperature=0.03),
    "kappa-0": micl("kappa 0: the cosine", kappa=0.0),
    "kappa-1": micl("kappa 1", kappa=1.0),
    "views-3": micl("the same patches in three views", views=3),
    "views-4": micl("the same patches in four views", views=4),
    "negatives-local-64": micl("negatives from groups of 64", contrast_batch=64),
    "pooled-mean": micl("the mean of the patch tokens is contrasted", pooled_token="mean"),
    "class-centre": micl("the class token at the image's centre", class_position="centre"),
    "positions-learned": micl("learned positions", positions="learned"),
}
BEYOND = {  # mask-0.8-views-3-temperature-0.03, and what may better it
    "sharp-last": sharp("more patches at the end; and the running mean of the weights", "micl-last"),
    "sharp-color-0.8": sharp("twice the colour changes", color_gain=0.8, color_bias=0.8),
    "sharp-color-0.2": sharp("half the colour changes", color_gain=0.2, color_bias=0.2),
    "sharp-rate-1e-3": sharp("twice the learning rate", base_lr=1e-3),
    "sharp-temperature-0.02": sharp("a lower temperature", temperature=0.02),
    "sharp-batch-256": sharp("batches of 256", batch_size=256),
    "sharp-batch-512": sharp("batches of 512", batch_size=512),
    "sharp-crop-0.08": sharp("crops from 8 % of the image on", crop_scale_min=0.08),
}
ARMS = {**RIVALS, **ABLATIONS, **BEYOND}
GROUPS = {"rivals": list(RIVALS), "ablations": list(ABLATIONS), "beyond": list(BEYOND), "all": list(ARMS)}


def frame_recipe(size: Size, seed: int, device: torch.device) -> Recipe:
    """The recipe that all arms start from."""
    return dataclasses.replace(
        vit_ti16_tin200(),
        **size._asdict(),
        views=2,
        temperature=0.07,
        crop_size=size.image_size,
        source_size=SOURCE_SIZE,
        view_color=False,
        precision="fp32" if device.type == "cpu" else "bf16",
        compile=False,
        save_dtype="float32",
        seed=seed,
    )


def recipe_of(name: str, size: Size, seed: int, device: torch.device, base_lr: float | None) -> Recipe:
    """Every number of an arm; of a method that is not MiCL, those of its ViT, crops, order and optimizer."""
    arm = ARMS[name]
    own = {"name": f"vit_{size.patch_size}.{name}", "base_lr": base_lr or arm.base_lr, **arm.changes}
    return dataclasses.replace(frame_recipe(size, seed, device), **own)


@click.group()
def main() -> None:
    """Train and measure MiCL beside other methods."""


work_option = click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder of the arms.")
data_option = click.option(
    "--data", required=True, type=click.Path(path_type=Path, exists=True), help="Folder of the data sets."
)


def budget_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that `train` hands on to `arm`."""
    for option in (
        click.option("--minutes", type=float, help="Budget of each arm: processor time on a CPU, wall clock on a GPU."),
        click.option("--images", type=int, help="Budget of each arm, instead of --minutes."),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights, order and every draw."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        click.option("--size", type=click.Choice(list(SIZES)), help="Size of the ViT.  [default: the device's]"),
        click.option("--learning-rate", type=float, help="Peak rate at batch 256.  [default: each arm's own]"),
    ):
        command = option(command)
    return command


@main.command()
@data_option
@work_option
@click.option(
    "--arms", default="rivals", show_default=True, help="Names, rivals, ablations or all, with commas between."
)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Arms at once, one core each.")
@budget_options
def train(data: Path, work: Path, arms: str, jobs: int, **options: Any) -> None:
    """Train arms, each in a process of its own."""
    names = [name for word in arms.split(",") for name in GROUPS.get(word, [word])]
    if wrong := [name for name in names if name not in ARMS]:
        raise click.UsageError(unknown("arm", wrong[0], [*GROUPS, *ARMS]))
    Budget(options["minutes"], options["images"])
    if why := missing("lightly"):
        click.echo(f"left out, {why}: {', '.join(name for name in names if not is_micl(name)) or 'none of these'}")
        names = [name for name in names if is_micl(name)]
    on_cpu = resolve_device(options["device"]).type == "cpu"
    cores = free_cores(jobs) if on_cpu else [None]  # a GPU takes one arm at a time
    prepare_corpus(data, CORPUS, work / "corpus", SOURCE_SIZE)

    def command(name: str, core: int | None) -> list[str]:
        return [sys.executable, __file__, "arm", name, "--work", str(work), *words_of({**options, "core": core})]

    environment = ONE_THREAD if on_cpu else {}
    if failed := run_apart(names, command, lambda name: work / name / "log.txt", cores, environment):
        raise click.ClickException(f"not trained: {', '.join(failed)}. See log.txt in their folders in {str(work)!r}.")


@main.command(hidden=True)
@click.argument("name")
@work_option
@click.option("--core", type=int, help="Core to run on.")
@budget_options
def arm(
    name: str,
    work: Path,
    core: int | None,
    minutes: float | None,
    images: int | None,
    seed: int,
    device: str,
    size: str | None,
    learning_rate: float | None,
) -> None:
    """Train one arm; `train` starts this in a process of its own."""
    target, budget = resolve_device(device), Budget(minutes, images)
    if core is not None:
        os.sched_setaffinity(0, {core})
    if target.type == "cpu":
        torch.set_num_threads(1)
    recipe = recipe_of(name, SIZES[size or ("gpu" if target.type == "cuda" else "cpu")], seed, target, learning_rate)
    settings = {"method": ARMS[name].method, "budget": dataclasses.asdict(budget), "recipe": dataclasses.asdict(recipe)}
    settings = json.loads(json.dumps(settings))  # as they come back from the file
    file = work / name / "arm.json"
    if file.exists():
        if json.loads(file.read_text(encoding="utf-8"))["settings"] != settings:
            raise click.UsageError(f"{str(file.parent)!r} was trained with other settings: give another --work")
        click.echo("is there already")
        return
    write_text(file, json.dumps(train_arm(name, work, budget, recipe, settings, target), indent=1) + "\n")


def train_arm(
    name: str, work: Path, budget: Budget, recipe: Recipe, settings: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Train, save the encoder, and return what arm.json says."""
    torch.manual_seed(recipe.seed)
    np.random.seed(recipe.seed)  # noqa: NPY002 - lightly's transforms draw from it
    corpus, labels, facts = open_corpus(work / "corpus")
    method = make_method(ARMS[name].method, recipe, device, int(labels.max()) + 1)
    if is_micl(name):
        corpus.images = corpus.images.to(device)
    run = Run(method, recipe, budget, device)
    run.train(corpus, labels)
    provenance = arm_provenance(ARMS[name].says, settings, method, facts, device)
    for folder, vit in {"encoder": method.vit, **method.extras}.items():
        save_encoder(work / name / folder, vit, recipe, provenance)
    result = run.result()
    click.echo(f"{run.images:,} images in {result['minutes']:.2f} minutes, loss {run.losses[-1]:.3f}")
    return {"name": name, "settings": settings, **provenance, "result": result}


def save_encoder(folder: Path, vit: VisionTransformer, recipe: Recipe, provenance: dict[str, Any]) -> None:
    """As a run of `micl-zoo train` leaves it."""
    save_weights(folder, vit.state_dict(), encoder_config(recipe), provenance, recipe.save_dtype)


@main.command()
@data_option
@work_option
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Record to write, with its figure.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Encoders measured at once.")
def evaluate(data: Path, work: Path, out: Path, jobs: int) -> None:
    """Measure every arm of the work folder, the ViT before training, and raw pixels; write record, table and figure."""
    arms = trained_arms(work)
    sets = [LabelledSet.open(data / name, train_images=TRAIN_IMAGES, test_images=TEST_IMAGES) for name in SETS]
    folders: dict[str, Path | None] = {**encoders(work, arms), "pixels": None}
    share_cores = partial(torch.set_num_threads, max(1, torch.get_num_threads() // jobs))
    with ProcessPoolExecutor(jobs, get_context("spawn"), share_cores) as pool:  # fork breaks a torch that has threads
        run = pool.map if jobs > 1 else map
        measured = dict(zip(folders, run(kept_measure, folders.values(), repeat(sets)), strict=True))
    record = {
        "arms": {name: facts(arm) for name, arm in arms.items()},
        "results": measured,
        "unit": "percent of test images; low and high: 95 % bootstrap interval over them, which says nothing of seeds",
        "pool": "of class token and mean of the patch tokens, the one whose logistic regression is better on the "
        "validation split of the training images; by_pool has both",
        "random": "the ViT that every arm starts from",
        "protocol": dataclasses.asdict(PROTOCOL),
        "data": {labelled.name: labelled.facts for labelled in sets},
        "command": "python benchmarks/rivals.py evaluate --data DATA --work WORK -o RECORD",
        **made_with(resolve_device("auto")),
    }
    write(record, out)
    figure(measured, out.with_suffix(".png"))
    for method, title in METHODS.items():
        click.echo(f"\n{title}, % (95 % interval)\n\n{table(record['arms'], measured, method)}")


def facts(arm: dict[str, Any]) -> dict[str, Any]:
    """What a table says of an arm's training, before all else that arm.json says."""
    run = arm["result"]
    shown = {key: run[key] for key in ("minutes", "wall_minutes", "clock", "steps", "images_per_second", "data_share")}
    kept = {key: arm[key] for key in ("trained", "settings", "method_settings", "commit", "machine", "versions")}
    return {"images_seen": run["images"], **shown, **kept, "loss_curve": run["loss_curve"]}


def trained_arms(work: Path) -> dict[str, dict[str, Any]]:
    """What arm.json says of each, in the order of this file.

    Raises:
        click.UsageError: none there, or arms that had not the same budget, seed and ViT.
    """
    files = {name: work / name / "arm.json" for name in ARMS}
    arms = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}
    if not arms:
        raise click.UsageError(f"no arm in {str(work)!r}: train some first")
    frame = ("seed", *(name for name in Size._fields if name not in ("mask_ratio", "batch_size")))
    frames = {
        name: {"budget": arm["settings"]["budget"], **{key: arm["settings"]["recipe"][key] for key in frame}}
        for name, arm in arms.items()
    }
    first = next(iter(frames))
    if other := [name for name, frame in frames.items() if frame != frames[first]]:
        raise click.UsageError(
            f"{other[0]} was trained with {frames[other[0]]}, {first} with {frames[first]}: those of one work folder "
            "are compared, so train them alike"
        )
    return arms


def encoders(work: Path, arms: dict[str, dict[str, Any]]) -> dict[str, Path]:
    """Folder of every encoder there is; `random` is made on the spot."""
    found: dict[str, Path] = {}
    for name in arms:
        found[name] = work / name / "encoder"
        for extra in ("student", "mean"):  # other encoders that the run left, see `methods.Method`
            if (folder := work / name / extra).exists():
                found[f"{name} ({extra})"] = folder
    recipe = arms[next(iter(arms))]["settings"]["recipe"]
    size = Size(**{key: recipe[key] for key in Size._fields})
    start = dataclasses.replace(frame_recipe(size, recipe["seed"], torch.device("cpu")), name="vit.random")
    save_encoder(work / "random" / "encoder", initial_model(start).vit, start, {"trained": "not at all"})
    return {**found, "random": work / "random" / "encoder"}


def kept_measure(encoder: Path | None, sets: list[LabelledSet]) -> dict[str, Figures]:
    """`measure`, or what it found before for the same weights and images."""
    if encoder is None:
        return measure(None, sets)
    kept = encoder.with_name(f"{encoder.name}-figures.json")
    key = [file_sha256(encoder / WEIGHTS_FILE), *map(str, [PROTOCOL, *(labelled.facts for labelled in sets)])]
    if kept.exists() and (there := json.loads(kept.read_text(encoding="utf-8")))["key"] == key:
        return dict(there["figures"])
    found = measure(encoder, sets)
    write_text(kept, json.dumps({"key": key, "figures": found}, indent=1) + "\n")
    return found


def measure(encoder: Path | None, sets: list[LabelledSet]) -> dict[str, Figures]:
    """By set: figures in percent with their 95 % intervals. Without an encoder, of raw pixels."""
    model = None if encoder is None else micl_zoo.load(weights=encoder)
    found: dict[str, Figures] = {}
    for labelled in sets:
        train, test = (
            pixel_features(part) if model is None else embed_labelled(model, part, pools=POOLS, workers=0)
            for part in (labelled.train, labelled.test)
        )
        by_pool = {
            pool: probe(one_pool(train, pool), one_pool(test, pool), classes=len(labelled.classes), protocol=PROTOCOL)
            for pool in train.rows
        }
        best = max(by_pool, key=lambda pool: by_pool[pool]["logreg"][pool]["validation"])
        found[labelled.name] = {"pool": best, **by_pool[best], "by_pool": by_pool}
        click.echo(f"{encoder or 'pixels'}: {labelled.name}", err=True)
    return found


def one_pool(features: Features, pool: str) -> Features:
    """Nothing but the rows of one pool."""
    return features._replace(rows={pool: features.rows[pool]})


def shown(figures: Figures, method: str) -> dict[str, float]:
    """The figure of the pool that the training images choose, see `evaluate`."""
    return dict(figures["knn"][str(K)] if method == "knn" else figures["logreg"][figures["pool"]])


def table(arms: dict[str, dict[str, Any]], measured: dict[str, dict[str, Figures]], method: str) -> str:
    """Markdown with a line per arm."""
    lines = []
    for name, sets in measured.items():
        run = arms.get(name.partition(" ")[0])
        told = (
            [f"{run['images_seen']:,}", f"{run['images_per_second']:,.0f}", f"{run['minutes']:.1f}"]
            if run
            else [""] * 3
        )
        found = [shown(sets[title], method) for title in SETS]
        cells = [f"{one['accuracy']:.1f} ({one['low']:.1f}..{one['high']:.1f})" for one in found]
        mean = np.mean([one["accuracy"] for one in found])
        lines.append([name, *told, *cells, f"{mean:.1f}"])
    return markdown(["arm", "images seen", "images/s", "minutes", *SETS, "mean"], lines)


def figure(measured: dict[str, dict[str, Figures]], file: Path) -> None:
    """A panel a set, a line an arm: k-NN full, logistic regression hollow; references are lines through all."""
    from matplotlib.figure import Figure

    names = [name for name in measured if name not in REFERENCES]
    rivals = [name for name in names if name.partition(" ")[0] in RIVALS]
    places = {name: row + 0.6 * (row >= len(rivals)) for row, name in enumerate(names)}  # a gap before the ablations
    drawn = Figure(figsize=(2.8 * len(SETS) + 1, 0.34 * len(names) + 1.6), dpi=130, layout="constrained")
    panels = drawn.subplots(1, len(SETS), sharey=True)
    for panel, title in zip(panels, SETS, strict=True):
        for reference, style in REFERENCES.items():
            accuracy = shown(measured[reference][title], "knn")["accuracy"]
            panel.axvline(accuracy, color="0.5", linestyle=style, linewidth=1, label=f"{reference}, {METHODS['knn']}")
        for name in names:
            draw_arm(panel, measured[name][title], places[name], "#D55E00" if is_micl(name) else "#0072B2")
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("accuracy, %", fontsize=9)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(list(places.values()), list(places), fontsize=9)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    drawn.legend(once.values(), once.keys(), loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    drawn.savefig(file)


def draw_arm(panel: Any, figures: Figures, place: float, color: str) -> None:
    """Both figures of an arm on a set with their intervals, one a little above the other."""
    for method, offset, fill in (("knn", -0.13, color), ("logreg", 0.13, "white")):
        one = shown(figures, method)
        margins = [[one["accuracy"] - one["low"]], [one["high"] - one["accuracy"]]]
        panel.errorbar(
            one["accuracy"], place + offset, xerr=margins, fmt="o", color=color, markerfacecolor=fill, markersize=4,
            linewidth=1.2, label=METHODS[method],
        )  # fmt: skip


def is_micl(name: str) -> bool:
    """Whether an encoder was trained with MiCL."""
    return (arm := ARMS.get(name.partition(" ")[0])) is not None and arm.method.startswith("micl")


if __name__ == "__main__":
    main()
