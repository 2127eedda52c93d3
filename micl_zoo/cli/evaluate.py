"""What an encoder is worth on labelled images."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from ..encoders.zoo import DEFAULT
from . import _options as opt

SET = (
    "Labelled set: a folder with train*.parquet and test*.parquet or val…, or with train/CLASS/ and test/ or val/; "
    "a URI; or OWNER/NAME on the hub."
)
LABELS = opt.path("--labels", "Table of the classes: a csv of id and label.")
MEASURED = opt.together(  # of knn, linear, logreg, few-shot and all
    click.argument("encoder", required=False),
    opt.value("--data", SET, multiple=True),
    opt.value("--train", "train_store", "Store with the training embeddings, instead of ENCODER and --data."),
    opt.value("--test", "test_store", "Store with the test embeddings, made with the same encoder."),
    LABELS,
    opt.count("--train-images", "Use at most N train images per set, balanced over the classes."),
    opt.count("--test-images", "Use at most N test images per set, balanced over the classes."),
    opt.choice("--baseline", "baselines", "random pixels", "Untrained ViT, or raw pixels (k-NN).", multiple=True),
    opt.count("--batch-size", "Images per forward pass.", default=64),
    opt.workers(default="one per core"),
    opt.DEVICE,
    opt.path("-o", "--out", "Record to write; the same command resumes it."),
    opt.path("--plot", "picture", "Picture to write, a name that ends in .png, .svg or .pdf."),
    opt.flag("--json", "as_json", "Print the record instead of a table."),
    opt.choice("--pool", "pools", "cls mean cls+mean", "Class token, mean of the patches, or both.", multiple=True),
)
SEED = opt.value("--seed", "Seed of the validation split and the order.", type=int, default=0)


@click.group("eval", cls=opt.Group)
def eval_() -> None:
    """Measure an encoder on labelled images: k-NN, linear probe, logistic regression, few-shot, fine-tuning.

    Examples:
      micl-zoo eval all vit_ti16.tin200 --data caltech101 --data flowers5 -o record.json --plot record.png
      micl-zoo eval knn runs/first --data imagenet
      micl-zoo eval knn --train embeddings-train --test embeddings-val --labels labels.csv
      micl-zoo eval finetune vit_ti16.tin200 --data flowers5 --out runs/flowers
    """


@eval_.command("knn")
@MEASURED
@opt.count("-k", "ks", "Number of neighbours.", multiple=True, show_default="10, 20, 100, 200")
@opt.value("--temperature", "Temperature of the votes.", type=opt.POSITIVE, default=0.07)
def eval_knn(**options: Any) -> None:
    """Weighted k-nearest neighbours: nothing is trained, nothing is chosen.

    With two stores, the one with the training embeddings may be larger than memory.

    Examples:
      micl-zoo eval knn vit_ti16.tin200 --data caltech101
      micl-zoo eval knn --train embeddings-train --test embeddings-val -o knn.json
    """
    _measure(("knn",), options)


@eval_.command("linear")
@MEASURED
@SEED
@opt.count("--epochs", "Passes over the training part.", default=50)
def eval_linear(**options: Any) -> None:
    """A linear probe on frozen features, fifteen learning rates at once.

    A fifth of the training part chooses the learning rate; the test part is classified once.

    Examples:
      micl-zoo eval linear vit_ti16.tin200 --data caltech101 --pool cls --pool cls+mean
      micl-zoo eval linear --train embeddings-train --test embeddings-val --epochs 20
    """
    _measure(("linear",), options)


@eval_.command("logreg")
@MEASURED
@SEED
def eval_logreg(**options: Any) -> None:
    """Logistic regression on frozen features, by L-BFGS over a grid of C.

    A fifth of the training part chooses C; the test part is classified once.

    Examples:
      micl-zoo eval logreg vit_ti16.tin200 --data caltech101
      micl-zoo eval logreg --train embeddings-train --test embeddings-val
    """
    _measure(("logreg",), options)


@eval_.command("few-shot")
@MEASURED
@opt.count("--shots", "Train images per class.", multiple=True, show_default="1, 5, 10")
@opt.count("--draws", "Number of random draws of those images.", default=5)
def eval_few_shot(**options: Any) -> None:
    """Logistic regression on a few images per class: mean and spread over several draws of them.

    Examples:
      micl-zoo eval few-shot vit_ti16.tin200 --data caltech101
      micl-zoo eval few-shot vit_ti16.tin200 --data caltech101 --shots 2 --shots 20 --draws 10
    """
    _measure(("few-shot",), options)


@eval_.command("all")
@MEASURED
@SEED
def eval_all(**options: Any) -> None:
    """k-NN, linear probe, logistic regression and few-shot from one pass over the images.

    Examples:
      micl-zoo eval all vit_ti16.tin200 --data caltech101 --data flowers5 -o record.json --plot record.png
      micl-zoo eval all runs/first --data imagenet --baseline random --baseline pixels
    """
    _measure(("knn", "linear", "logreg", "few-shot"), options)


def _measure(methods: Any, options: dict[str, Any]) -> None:
    """Measure, print, write the record and the picture; `methods` are those of a `Protocol`."""
    from micl_zoo.training.evaluation.evaluate import Protocol
    from micl_zoo.training.evaluation.tables import plot, table

    from ..files import write_text

    names = ("pools", "ks", "temperature", "epochs", "shots", "draws", "seed")
    given = {name: value for name in names if (value := options.pop(name, None)) not in (None, ())}
    out, picture, as_json = options["out"], options.pop("picture"), options.pop("as_json")
    record = _record(Protocol(methods=methods, **given), options)
    text = json.dumps(record, indent=1)
    if out is not None:
        write_text(out, text + "\n")
    if picture is not None:
        plot(record, picture)
    click.echo(text if as_json else table(record))
    for written in filter(None, (out, picture)):
        click.echo(f"Written: {written}", err=True)


def _record(protocol: Any, options: dict[str, Any]) -> dict[str, Any]:
    from micl_zoo.training.evaluation.evaluate import evaluate, evaluate_stores
    from micl_zoo.training.evaluation.labelled import LabelledSet, read_label_file

    from ..encoders.device import resolve_device
    from ..encoders.encoder import load

    encoder, data, labels, device = (options.pop(name) for name in ("encoder", "data", "labels", "device"))
    stores = [options.pop(name) for name in ("train_store", "test_store")]
    most = {name: options.pop(name) for name in ("train_images", "test_images")}
    command = shlex.join(["micl-zoo", *opt.call_words()])
    if any(stores):
        if not all(stores) or encoder or data or options["baselines"]:
            raise click.UsageError("two stores need --train and --test, and neither ENCODER, --data nor --baseline")
        from ..stores.store import open_store

        opened, given = map(open_store, stores), read_label_file(labels) if labels else None
        return evaluate_stores(*opened, protocol, labels=given, command=command, device=str(resolve_device(device)))
    if encoder is None or not data:
        raise click.UsageError("give an ENCODER and --data, or two stores by --train and --test")
    sets = [LabelledSet.open(place, labels=labels, **most) for place in data]
    weights = opt.encoder_of(encoder)
    loaded = load(weights.pop("model", DEFAULT), **weights, device=device)
    return evaluate(loaded, sets, protocol, command=command, **options)


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

    ENCODER is a name (see `micl-zoo models`), the folder of a training run or of an encoder, or a .safetensors file.

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

    found = finetune(data, out, **opt.encoder_of(encoder), **options)
    if not says():
        return
    if found is None:
        click.echo(f"Stopped at --max-steps. Run the same command without it to resume {out}.", err=as_json)
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
