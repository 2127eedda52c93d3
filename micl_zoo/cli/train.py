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
@opt.value("--init", f"Encoder to start from in the place of random weights: {opt.MODEL}.", metavar="ENCODER")
@opt.OVERRIDES
@opt.flag("--smoke", "Train the recipe's small twin: a test of the whole chain in seconds.")
@opt.flag("--plan", "Print the cost of the run (steps, FLOPs, memory, hours, disk) and stop.")
@opt.RANKS
@opt.workers("Decoding processes per GPU, with cache=none.", "the cores, shared; at most 16")
@opt.KNN
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
      micl-zoo train vit_b16.in1k --init vit_base_patch16_224.mae --data images/ --out runs/from-mae --gpus 4
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


@click.command(cls=opt.Command)
@click.argument("encoder")
@opt.value("--data", f"Images to learn from, without labels: {opt.SOURCE}", multiple=True, required=True)
@opt.path("--out", "Folder of the run; the same command resumes it.")
@opt.IMAGE_SIZE
@opt.value("--set", "overrides", "Change to one of the numbers that are chosen.", multiple=True, metavar="KEY=VALUE")
@opt.flag("--plan", "Print what is chosen and what it costs (steps, FLOPs, memory, hours, disk) and stop.")
@opt.RANKS
@opt.workers("Decoding processes per GPU, with cache=none.", "the cores, shared; at most 16")
@opt.KNN
def adapt(encoder: str, data: tuple[str, ...], out: Path | None, plan: bool, **options: Any) -> None:
    """Go on with ENCODER on your own images, without labels, by masked image contrastive learning (MiCL).

    ENCODER is a name of `micl-zoo models`, OWNER/NAME on the hub, a name of timm, a file or a folder: any ViT, such as
    DINOv2, DINOv3, CLIP, SigLIP, MAE or EVA-02. Every number of the run is chosen, printed with its reason, and can be
    changed by --set. The run's folder has the encoder, and neighbours.png: images and what was nearest to them before
    and after. Labelled images, given by --knn, tell whether it was worth it.

    Examples:
      micl-zoo adapt vit_small_patch14_reg4_dinov2.lvd142m --data photos/ --out runs/mine
      micl-zoo adapt vit_ti16.tin200 --data photos/ --out runs/small --knn labelled/
      micl-zoo adapt runs/mine --data more/ --out runs/again --set epochs=20 --set frozen_blocks=6
      micl-zoo adapt vit_large_patch16_dinov3.lvd1689m --data scans/ --plan
    """
    if not plan and out is None:
        raise click.UsageError("adapt needs --out (only --plan does without)")
    from micl_zoo.training.pretraining.adapt import Chosen, choose
    from micl_zoo.training.pretraining.adapt import adapt as run
    from micl_zoo.training.pretraining.change import PICTURE
    from micl_zoo.training.pretraining.pretrain import Images, parameter_counts
    from micl_zoo.training.pretraining.start import Start
    from micl_zoo.training.pretraining.verdict import told
    from micl_zoo.training.recipes import recorded_recipe
    from micl_zoo.training.run.ranks import says
    from micl_zoo.training.run.record import read_run

    def tell(chosen: Chosen) -> None:
        if says():
            click.echo(f"Chosen, each to be changed by --set:\n{chosen.text()}\n", err=not plan)

    if plan:
        from micl_zoo.training.pretraining.plan import format_plan, make_plan

        start, images = Start.open(encoder, options["image_size"]), Images.open(data)
        chosen = choose(start, len(images.index), options["overrides"])
        tell(chosen)
        how: dict[str, Any] = {name: options[name] for name in ("nodes", "micro_batch")}
        how |= {"counts": parameter_counts(chosen.recipe, start), "gpus": options["gpus"] or 1}
        click.echo(format_plan(make_plan(chosen.recipe, images=len(images.index), **how)))
        return
    if opt.start_ranks(options):
        return
    made = run(encoder, data, out or Path(), tell=tell, **options)
    if not says():
        return
    if made == out:
        click.echo(f"Stopped at --max-steps. Run the same command without it to resume {out}.")
        return
    record = read_run(made.parents[1]) or {}
    for line in told(record, recorded_recipe(record)):
        click.echo(line)
    drawn = (made.parents[1] / PICTURE).exists()
    seen = f"Neighbours before and after are in {out}/{PICTURE}, all else in" if drawn else "All of the run is in"
    click.echo(f"{seen} `micl-zoo report {out}`.")
    click.echo(f"The encoder is in {made.parent}: micl_zoo.load({str(made.parent)!r}).")


def _plan(name: str, data: tuple[str, ...], images: int | None, mfu: float, **options: Any) -> str:
    from micl_zoo.training.pretraining.plan import format_plan, make_plan
    from micl_zoo.training.recipes import corpus_images, get_recipe

    overrides, counts = options["overrides"], None
    recipe = get_recipe(name, () if options["init"] else overrides, smoke=options["smoke"])
    if options["init"]:
        from micl_zoo.training.pretraining.pretrain import parameter_counts
        from micl_zoo.training.pretraining.start import Start

        start = Start.open(options["init"])
        recipe = start.recipe(recipe, overrides)
        counts = parameter_counts(recipe, start)
    if data:
        from ..sources.listing import index_source

        images = len(index_source(data))
    images, gpus = images or corpus_images(recipe), options["gpus"] or 1
    how = {name: options[name] for name in ("nodes", "micro_batch")}
    return format_plan(make_plan(recipe, images=images, gpus=gpus, mfu=mfu, counts=counts, **how))


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
