"""Pre-training: run it, measure this machine for it, look at a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import _options as opt

SECONDS = opt.value("--seconds", "Length of the measurement in seconds.", type=opt.Number(1), default=20)


@click.command(cls=opt.Command)
@click.argument("recipe")
@opt.value("--data", f"Images to train on: {opt.SOURCE}", multiple=True)
@opt.path("--out", "Folder of the run; the same command resumes it.")
@opt.OVERRIDES
@opt.flag("--smoke", "Train the recipe's small twin: a test of the whole chain in seconds.")
@opt.flag("--plan", "Print the cost of the run (steps, FLOPs, memory, hours, disk) and stop.")
@opt.RANKS
@opt.workers("Decoding processes per GPU, with cache=none.", "the cores, shared; at most 16")
@opt.path("--knn", "Folder with a k-NN set: train*.parquet and test or val.parquet (image, label).", multiple=True)
@opt.value("--knn-minutes", "Minutes between k-NN evaluations.", type=opt.Number(0), default=30)
@opt.count("--knn-images", "Number of images to search in each k-NN set.", least=20, default=10_000)
@opt.value("--wandb", "Project of Weights & Biases to send the run to.", metavar="PROJECT")
@opt.value("--mfu", "FLOP/s utilisation, for --plan.", type=opt.Number(0, 1, min_open=True), default=0.5)
@opt.count("--images", "Size of the corpus, for --plan without --data.")
def train(recipe: str, data: tuple[str, ...], out: Path | None, plan: bool, **options: Any) -> None:
    """Pre-train an encoder by RECIPE (names: `micl-zoo models`).

    Writes run.json, metrics.jsonl, views.png, checkpoints/ and encoder/, which `micl_zoo.load(FOLDER)` takes;
    `micl-zoo report` shows a run. A killed run resumes from its last checkpoint with the same numbers, on any number of
    GPUs. SIGTERM and Ctrl-C write a checkpoint first.

    Examples:
      micl-zoo train vit_ti16.tin200 --data "tin200/train-*.parquet" --out runs/vit_ti16.tin200
      micl-zoo train vit_ti16.tin200 --data photos/ --out runs/mine --set name=vit_ti16.mine --set batch_size=64
      micl-zoo train vit_l16.in1k --data imagenet/train --out runs/vit_l16 --gpus 4
      micl-zoo train vit_l16.in1k --plan --gpus 4
      micl-zoo train vit_l16.in1k --data photos/ --out runs/smoke --smoke --device cpu --gpus 2
    """
    of_plan = {name: options.pop(name) for name in ("images", "mfu")}
    if plan:
        click.echo(_plan(recipe, data, **of_plan, **options))
        return
    if not data or out is None:
        raise click.UsageError("train needs --data and --out (only --plan does without)")
    if opt.start_ranks(options):
        return
    from micl_zoo.training.pretraining.pretrain import pretrain
    from micl_zoo.training.run.ranks import says

    made = pretrain(recipe, data[0] if len(data) == 1 else data, out, **options)
    stopped = f"Stopped at --max-steps. Run the same command without it to resume {out}."
    encoder = f"The encoder is in {made.parent}: micl_zoo.load({str(made.parent)!r})."
    if says():
        click.echo(stopped if made == out else encoder)


def _plan(name: str, data: tuple[str, ...], images: int | None, mfu: float, **options: Any) -> str:
    from micl_zoo.training.pretraining.plan import format_plan, make_plan
    from micl_zoo.training.recipes import corpus_images, get_recipe

    recipe = get_recipe(name, options["overrides"], smoke=options["smoke"])
    if data:
        from ..sources.listing import index_source

        images = len(index_source(data))
    images, gpus = images or corpus_images(recipe), options["gpus"] or 1
    how = {name: options[name] for name in ("nodes", "micro_batch")}
    return format_plan(make_plan(recipe, images=images, gpus=gpus, mfu=mfu, **how))


@click.group(cls=opt.Group)
def bench() -> None:
    """Measure this machine on a recipe: how long a step takes, and how fast the data arrive.

    Examples:
      micl-zoo bench step vit_l16.in1k
      micl-zoo bench data vit_l16.in1k --data imagenet/train
    """


@bench.command("step")
@click.argument("recipe")
@opt.OVERRIDES
@opt.count("--batch-size", "Images per step.", least=2, show_default="the largest that fits, on a GPU")
@SECONDS
@opt.TRAINING_DEVICE
@opt.AS_JSON
def bench_step(recipe: str, as_json: bool, **options: Any) -> None:
    """Take training steps of RECIPE on generated pixels.

    Prints images/s, model TFLOP/s, their share of the machine's measured matrix rate, peak memory and data wait.

    Examples:
      micl-zoo bench step vit_l16.in1k
      micl-zoo bench step vit_b16.in1k --batch-size 64 --device cpu --json
    """
    from micl_zoo.training.pretraining.bench import bench_step as run

    found = run(recipe, **options)
    click.echo(found.json() if as_json else found.text())


@bench.command("data")
@click.argument("recipe")
@opt.value("--data", f"Images to read: {opt.SOURCE}", required=True, multiple=True)
@opt.OVERRIDES
@opt.workers()
@SECONDS
@opt.value(
    "--images-per-second", "wanted", "Images/s that the GPUs take (`bench step`).", type=opt.POSITIVE, default=8500
)
@opt.AS_JSON
def bench_data(recipe: str, data: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Read, decode and crop the images of a source as training RECIPE does.

    Prints images/s, images/s per core, and how many cores keep the GPUs of the recipe busy.

    Examples:
      micl-zoo bench data vit_l16.in1k --data imagenet/train
      micl-zoo bench data vit_l16.in1k --data "shards/train-*.tar" --workers 16 --images-per-second 8500
    """
    from micl_zoo.training.pretraining.bench import bench_data as run

    found = run(recipe, data, **options)
    click.echo(found.json() if as_json else found.text())


@click.command(cls=opt.Command)
@click.argument("run", type=opt.LocalPath())
@opt.path("-o", "--out", "Page to write, a name that ends in .html.", show_default="RUN/report.html")
def report(run: Path, out: Path | None) -> None:
    """Show the training run in the folder RUN on one page: charts, what the network saw, everything recorded.

    Works while the run goes on, too. The page needs no other file; its pictures are also written as PNG files into a
    folder beside it.

    Examples:
      micl-zoo report runs/vit_ti16.tin200
      micl-zoo report runs/first -o reports/first.html
    """
    from micl_zoo.training.pretraining.report import pictures_folder, write_report

    page = write_report(run, out)
    click.echo(f"The report is in {page}, its pictures are in {pictures_folder(page)}.")
