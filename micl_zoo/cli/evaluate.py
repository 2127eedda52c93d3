"""What an encoder is worth on labelled images."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..errors import MiclZooError
from . import _options as opt

SET = (
    "Labelled set: a folder with train*.parquet and test*.parquet or val…, or with train/CLASS/ and test/ or val/; or "
    "of CLASS/ alone, of which a fifth is for testing; a URI; or OWNER/NAME on the hub."
)
LABELS = opt.path("--labels", "Table of the classes: a csv of id and label.")
MEASURED = opt.together(  # of knn, linear, logreg, few-shot and all
    click.argument("encoders", nargs=-1, metavar="[ENCODER]..."),
    opt.value("--data", SET, multiple=True),
    opt.value("--train", "train_store", "Store with the training embeddings, instead of ENCODER and --data."),
    opt.value("--test", "test_store", "Store with the test embeddings, made with the same encoder."),
    LABELS,
    opt.count("--train-images", "Use at most N train images per set, balanced over the classes."),
    opt.count("--test-images", "Use at most N test images per set, balanced over the classes."),
    opt.choice(
        "--baseline", "baselines", ["random", "pixels"], "Baseline to add: untrained ViT, raw pixels.", multiple=True
    ),
    opt.count("--batch-size", "Images per forward pass.", default=64),
    opt.workers(default="one per core"),
    opt.DEVICE,
    opt.path("-o", "--out", "Record to write; the same command resumes it."),
    opt.path(
        "--stores",
        "Folder to keep embeddings in, for the next call.",
        show_default="for several encoders the name of -o, ending in .stores; else none",
    ),
    opt.path("--plot", "picture", "Picture to write, a name that ends in .png, .svg or .pdf."),
    opt.flag("--json", "as_json", "Print the record instead of a table."),
)


def _setting(field: Any) -> Callable[[opt.F], opt.F]:
    """An option from a field of a `Protocol`; its values have the type of the default's."""
    several, least = isinstance(field.default, tuple), field.metadata["least"]
    kinds = {int: click.IntRange(least), float: opt.Number(least, min_open=True)}
    kind = kinds.get(type(field.default[0] if several else field.default)) or click.Choice(field.metadata["choices"])
    settings = {"multiple": True} if several else {}
    return opt.value(
        field.metadata["flag"], field.name, field.metadata["help"], type=kind, default=field.default, **settings
    )


class _Methods(opt.Group):
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
        options = opt.together(MEASURED, *map(_setting, option_fields(method.settings)))
        command = options(lambda **given: _measure(methods, **given))
        return click.command(cmd_name, cls=opt.Command, help=f"{method.help}\n\nExamples:{examples}")(command)


@click.group("eval", cls=_Methods)
def eval_() -> None:
    """Measure encoders on labelled images: k-NN, linear probe, logistic regression, few-shot, fine-tuning.

    With several encoders, the table and the plot have them side by side.

    Examples:
      micl-zoo eval all vit_ti16.tin200 --data caltech101 --data flowers5 -o record.json --plot record.png
      micl-zoo eval all vit_ti16.tin200 runs/first runs/second --data mine/ -o record.json --plot record.png
      micl-zoo eval all resnet50.a1_in1k timm/vit_small_patch14_reg4_dinov2.lvd142m --data mine/
      micl-zoo eval knn runs/first --data imagenet
      micl-zoo eval knn --train embeddings-train --test embeddings-val --labels labels.csv
      micl-zoo eval finetune vit_ti16.tin200 --data flowers5 --out runs/flowers
    """


def _measure(methods: Any, picture: Path | None, as_json: bool, **options: Any) -> None:
    """Measure, print, write the record and the picture; `methods` are those of a `Protocol`."""
    from micl_zoo.training.evaluation import ranking, tables
    from micl_zoo.training.evaluation.protocols import Protocol, option_fields

    from ..files import write_text

    if picture is not None:
        tables.check_plot(picture)
    names = [field.name for field in option_fields()]
    given = {name: value for name in names if (value := options.pop(name, None)) not in (None, ())}
    out, record = options["out"], _record(Protocol(methods=methods, **given), options)
    shown: Any = ranking if "encoders" in record else tables
    text = json.dumps(record, indent=1)
    if out is not None:
        write_text(out, text + "\n")
    click.echo(text if as_json else shown.table(record))
    if not record.get("encoders", True):
        picture = None  # none could be measured
    if picture is not None:
        shown.plot(record, picture)
    for written in filter(None, (out, picture)):
        click.echo(f"Written: {written}", err=True)
    if failed := record.get("failed"):
        raise MiclZooError(
            f"{len(failed)} of {len(record['asked'])} encoders could not be measured: {', '.join(failed)}"
        )


def _record(protocol: Any, options: dict[str, Any]) -> dict[str, Any]:
    from micl_zoo.training.evaluation.compare import compare
    from micl_zoo.training.evaluation.evaluate import evaluate, evaluate_stores
    from micl_zoo.training.evaluation.labelled import LabelledSet, read_label_file

    from ..encoders.device import resolve_device
    from ..encoders.load import load
    from ..stores.store import open_store

    encoders, data, labels, device = (options.pop(name) for name in ("encoders", "data", "labels", "device"))
    stores = [options.pop(name) for name in ("train_store", "test_store")]
    most = {name: options.pop(name) for name in ("train_images", "test_images")}
    command = shlex.join(["micl-zoo", *opt.call_words()])
    if any(stores):
        if not all(stores) or encoders or data or options["baselines"] or options["stores"]:
            raise click.UsageError("two stores need --train and --test, and no ENCODER, --data, --baseline or --stores")
        train, test = map(open_store, stores)
        given = read_label_file(labels) if labels else None
        return evaluate_stores(train, test, protocol, labels=given, command=command, device=str(resolve_device(device)))
    if not encoders or not data:
        missing = "an ENCODER" if data else "--data" if encoders else "an ENCODER and --data"
        raise click.UsageError(f"give {missing}, or two stores by --train and --test")
    sets = [LabelledSet.open(place, labels=labels, **most) for place in data]
    if len(encoders) > 1:
        return compare(encoders, sets, protocol, device=device, command=command, **options)
    return evaluate(load(encoders[0], device=device), sets, protocol, command=command, **options)


@eval_.command("finetune")
@click.argument("encoder")
@opt.value("--data", SET, required=True)
@opt.path("--out", "Folder of the run; the same command resumes it.", required=True)
@LABELS
@opt.value("--recipe", "Recipe: small, mae_b or mae_l.", show_default="the one for the encoder's width")
@opt.OVERRIDES
@opt.flag("--smoke", "Two epochs on 64 images, a test of the whole chain.")
@opt.RANKS
@opt.workers("Decoding processes per GPU.", "the cores, shared; at most 16")
@opt.AS_JSON
def eval_finetune(encoder: str, data: str, out: Path, as_json: bool, **options: Any) -> None:
    """Fine-tune ENCODER and a linear head on the training part of a labelled set, and test on its test part.

    ENCODER, a ViT, is a name of `micl-zoo models`, OWNER/NAME on the hub, a name of timm, a file or a folder.

    Follows MAE's protocol; the recipe holds the numbers. Writes run.json, metrics.jsonl, checkpoints/, result.json,
    classifier/, which timm loads, and encoder/, the same without its head. The accuracy is that of the last step. A
    killed run resumes from its last checkpoint; SIGTERM and Ctrl-C write one first.

    Examples:
      micl-zoo eval finetune vit_ti16.tin200 --data flowers5 --out runs/flowers
      micl-zoo eval finetune runs/first --data birds/ --out runs/birds --set epochs=30 --set eval_epochs=5
      micl-zoo eval finetune runs/vit_b16 --data imagenet --out runs/vit_b16-ft --recipe mae_b --gpus 8
      micl-zoo eval finetune runs/vit_b16 --data imagenet --out runs/smoke --smoke --device cpu --gpus 2
    """
    if opt.start_ranks(options):
        return
    from micl_zoo.training.finetuning.finetune import finetune
    from micl_zoo.training.run.ranks import says

    found = finetune(data, out, model=encoder, **options)
    if not says():
        return
    if found is None:
        click.echo(f"Stopped at --max-steps. Run the same command without it to resume {out}.", err=as_json)
    else:
        click.echo(json.dumps(found) if as_json else _finetuned(found, out))


def _finetuned(found: dict[str, Any], out: Path) -> str:
    top1, top5 = found["top1"], f", top-5 {found['top5']['accuracy']:.1f} %" if "top5" in found else ""
    left_out = f", {len(found['test_refused'])} left out: see result.json" if found["test_refused"] else ""
    return (
        f"Top-1 {top1['accuracy']:.1f} % (95 % interval {top1['low']:.1f} to {top1['high']:.1f}){top5} "
        f"on {found['test_images']:,} test images{left_out}.\n"
        f'The classifier is in {out / "classifier"}: timm.create_model("local-dir:{out / "classifier"}", '
        f"pretrained=True). The encoder is in {out / 'encoder'}."
    )
