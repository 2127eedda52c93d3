"""Encoders for others: model cards, the hub, checkpoints of the authors' code."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from . import _options as opt

MEASURED = opt.path("--eval", "measured", "Record of `eval all`, or result.json of `eval finetune`.", multiple=True)


@click.command(cls=opt.Command)
@click.argument("encoder", required=False)
@MEASURED
@opt.flag("--hub", "Add the front matter that the Hugging Face hub reads.")
@opt.flag("--ablations", "Write, in place of a card, MiCL beside other methods and with one thing changed.")
@opt.path("-o", "--out", "File to write.", show_default="standard output")
@opt.path("--check", "File to compare with the card: exit code 1 when it differs.")
@opt.path("--record", "File for the record of a run, in place of a card.")
def card(encoder: str | None, measured: tuple[Path, ...], check: Path | None, record: Path | None, **how: Any) -> None:
    """Write the model card of ENCODER from its records: uses, limits, data, training, compute, every figure.

    ENCODER is a published name (see `micl-zoo models`) or the folder of a finished training run. Without it, the card
    covers all published encoders, as in the repository.

    Examples:
      micl-zoo card vit_ti16.tin200
      micl-zoo card -o MODEL_CARD.md
      micl-zoo card runs/first --eval record.json --hub -o hub/README.md
      micl-zoo card --check MODEL_CARD.md
      micl-zoo card --ablations --check docs/ablations.md
    """
    out = how.pop("out")
    if encoder is None and (measured or how["hub"] or record):
        raise click.UsageError("--eval, --hub and --record need an ENCODER")
    if encoder and how["ablations"]:
        raise click.UsageError("--ablations is of no single ENCODER: leave it out")
    if sum(map(bool, (out, check, record))) > 1 or (record and (measured or how["hub"])):
        raise click.UsageError("-o, --check and --record go alone; a record takes neither --eval nor --hub")
    from micl_zoo.training.release import card as cards
    from micl_zoo.training.release.trained import run_record, write_run_record

    from ..files import write_text

    if record and encoder:
        write_run_record(run_record(Path(encoder)), record)
        click.echo(f"The record of {encoder} is in {record}.")
        return
    text = cards.card(encoder, measured, **how)
    if check:
        cards.check_card(check, text, shlex.join(["micl-zoo", *opt.call_words(leave_out={"check"}), "-o", str(check)]))
        click.echo(f"{check} is what the records say.")
    elif out:
        write_text(out, text)
        click.echo(f"The card is in {out}.")
    else:
        click.echo(text, nl=False)


@click.command(cls=opt.Command)
@click.argument("run", type=opt.LocalPath())
@opt.value("--repo", "Repository on the Hugging Face hub, made if missing.", required=True, metavar="OWNER/NAME")
@MEASURED
@opt.path("-o", "--out", "Folder to build.", show_default="RUN/hub")
@opt.flag("--no-onnx", "Leave out the ONNX file.")
@opt.flag("--private", "Make the repository private.")
@opt.value("--message", "Message of the commit.", show_default="Publish NAME")
@opt.flag("--dry-run", "Build and check, but send nothing: needs neither token nor network.")
@opt.AS_JSON
def publish(run: Path, repo: str, no_onnx: bool, as_json: bool, **options: Any) -> None:
    """Put the encoder of the finished training run in the folder RUN on the Hugging Face hub, in one commit.

    Builds the repository's folder anew: config.json and model.safetensors as the run wrote them, model.onnx, the model
    card, and records/. Loads it with timm, micl_zoo and ONNX Runtime, which must embed alike, and sends it. Prints the
    row for the table in micl_zoo/zoo/ours.py, with the commit.

    The token is that of huggingface_hub: from `hf auth login`, or HF_TOKEN.

    Examples:
      micl-zoo publish runs/first --repo my-lab/vit_ti16-first --eval record.json --dry-run
      micl-zoo publish runs/first --repo my-lab/vit_ti16-first --eval record.json
      micl-zoo publish runs/first --repo my-lab/vit_ti16-first --no-onnx --private
    """
    from micl_zoo import export
    from micl_zoo.training.release.publish import publish as run_
    from micl_zoo.training.run.record import read_run

    made = run_(run, repo, export=None if no_onnx else export.to_onnx, **options)
    if as_json:
        click.echo(json.dumps(made.as_dict()))
        return
    for name, size in made.files.items():
        click.echo(f"{size:>15,}  {name}")
    click.echo(f"{sum(made.files.values()):>15,}  bytes in {made.folder}")
    click.echo(f"Loaded back: {made.loaded_back.text()}.")
    click.echo(f"Published: {made.url}" if made.commit else f"A dry run, nothing was sent to {made.url}")
    if (read_run(run) or {}).get("encoder"):  # the table is for encoders that recipes make
        click.echo(f"It loads by micl_zoo.load({json.dumps(repo)}).")
        return
    measured = "" if made.record.metrics else ", without metrics, as no record with k-NN was given by --eval"
    records = made.folder / "records" / f"{made.record.name}*.json"
    click.echo(f"Its row for micl_zoo/zoo/ours.py{measured}; {records} are for training/records/:\n\n{made.row}")


@click.command("import", cls=opt.Command)
@click.argument("checkpoint", type=opt.LocalPath())
@opt.path("-o", "--out", "Folder to write the encoder to.", required=True)
@opt.value("--architecture", "timm's name of the model.", show_default="a ViT of MiCL, whose shape the tensors say")
@opt.value("--key", "Entry of the file that holds the weights.", show_default="model or state_dict, else all of it")
@opt.value("--name", "arch.tag of the encoder.", show_default="the arch of that shape, and `imported`")
@opt.value("--license", "Licence of the weights; that of the authors' code is CC BY-NC 4.0.", default="unknown")
@opt.count("--num-heads", "Number of attention heads, for a shape that is not a known one.")
def import_(checkpoint: Path, out: Path, **options: Any) -> None:
    """Turn CHECKPOINT, a .pth of the authors' code (AnonymGiant/OCL) or of timm, into an encoder that loads here.

    Takes a bare state dict and .safetensors, too. No code in the file is run; a file that needs that is refused.

    Examples:
      micl-zoo import checkpoint-199.pth -o encoders/theirs --name vit_b16.theirs --license "CC BY-NC 4.0"
      micl-zoo import small.pth -o encoders/small --num-heads 4
      micl-zoo import model_best.pth.tar -o encoders/birds --architecture resnet50.a1_in1k --key state_dict_ema
    """
    from micl_zoo.training.release.import_checkpoint import import_checkpoint

    from ..printing import printable
    from ..zoo.weights import header

    made = header(import_checkpoint(checkpoint, out, **options))
    found, name = made["provenance"], made["config"]["micl_zoo"]["name"]
    shape = found["shape"]
    if "architecture" in shape:
        text = f"{name}: {shape['architecture']} of timm, {made['config']['num_features']} numbers per patch"
    else:
        text = (
            f"{name}: {shape['embed_dim']} wide, {shape['depth']} blocks, {shape['num_heads']} heads "
            f"({shape['num_heads_from']}), patches of {shape['patch_size']}, images of {shape['image_size']}"
        )
    click.echo(printable(text))
    epoch = "not said" if found["epoch"] is None else found["epoch"]
    click.echo(printable(f"epoch: {epoch}; licence: {found['license']}"))
    if found["left_out"] is None:
        click.echo(f"layout: converted by timm, {shape['tensors']} tensors of the file; what has no place was left out")
    else:
        left_out = dict.fromkeys(key.partition(".")[0] for key in found["left_out"])  # in the file's order
        click.echo(printable(f"left out: {', '.join(left_out) or 'nothing'} ({len(found['left_out'])} tensors)"))
    click.echo(f"The encoder is in {out}: micl_zoo.load({str(out)!r}).")
