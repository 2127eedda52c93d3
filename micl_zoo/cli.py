"""The command line: a shell over the library. Heavy imports stay inside the commands, so that help answers at once."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click

from ._version import __version__
from .errors import MiclZooError
from .zoo import DEFAULT, RECORDS, Record, find_record

REFUSED_EXIT_CODE = 3


class _Group(click.Group):
    """Turns the package's own errors into one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MiclZooError as error:
            raise click.ClickException(str(error)) from error
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
  micl-zoo extract data/train.parquet -o embeddings --model vit_ti16.tin200 --workers 8
  micl-zoo extract list.txt -o embeddings --weights runs/first/encoder"""
)
@click.argument("source", nargs=-1, required=True)
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write; the same command again goes on.",
)
@click.option("--model", default=DEFAULT, show_default=True, help="Name of an encoder, see `micl-zoo models`.")
@click.option("--weights", type=click.Path(path_type=Path), help="A .safetensors file or encoder folder of your own.")
@click.option(
    "--pool",
    type=click.Choice(["cls", "mean"]),
    default="cls",
    show_default=True,
    help="Class token, or mean of the patch tokens.",
)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images a forward pass.")
@click.option("--shard-rows", type=click.IntRange(1), default=10_000, show_default=True, help="Images a part file.")
@click.option("--workers", type=click.IntRange(0), help="Processes that decode.  [default: one a core, 16 at most]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="auto: bf16 where it is fast, else fp32.",
)
@click.option("--normalize/--no-normalize", default=True, show_default=True, help="Scale rows to unit length.")
@click.option("--strict", is_flag=True, help=f"Exit with code {REFUSED_EXIT_CODE} when an image could not be embedded.")
def extract(source: tuple[str, ...], out: Path, strict: bool, **options: Any) -> None:
    """Embed the images of SOURCE: folders, images, a glob, a list file (.txt), or parquet with encoded images.

    Writes manifest.json, index/, part-*.parquet (columns id, embedding) and errors.jsonl, one line per image that
    could not be embedded. A killed run loses at most the shard it was working on.
    """
    from .extract import extract as run

    try:
        summary = run(source, out, **options)
    except KeyboardInterrupt:
        click.echo(f"\nStopped. Finished shards are safe in {out}: run the same command to go on.", err=True)
        sys.exit(130)
    rate = f", {summary.computed / summary.seconds:,.0f} images/s" if summary.computed else ""
    skipped = f", {summary.shards_before} shards were done already" if summary.shards_before else ""
    manifest = summary.store.manifest
    click.echo(
        f"{summary.embedded:,} of {summary.images:,} images embedded by {manifest.model} in {manifest.precision}, "
        f"{manifest.dim} numbers each, in {out} ({summary.seconds:.1f} s{rate}{skipped})"
    )
    if summary.refused:
        click.echo(f"{summary.refused:,} could not be embedded: see {out / 'errors.jsonl'}", err=True)
        if strict:
            sys.exit(REFUSED_EXIT_CODE)


@main.command(
    epilog="""\b
Examples:
  micl-zoo train vit_ti16.tin200 --data "tin200/train-*.parquet" --out runs/vit_ti16.tin200
  micl-zoo train vit_ti16.tin200 --data photos/ --out runs/mine --set name=vit_ti16.mine --set batch_size=64
  micl-zoo train vit_b16.in1k --data imagenet/train --out runs/vit_b16 --device cuda"""
)
@click.argument("recipe")
@click.option(
    "--data", required=True, multiple=True, help="Images to train on: any source that extract takes. May be repeated."
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the run; the same command again goes on."
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one number of the recipe. May be repeated."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--workers",
    type=click.IntRange(0),
    help="Processes that decode, for recipes with cache=none.  [default: one a core, 16 at most]",
)
@click.option("--max-steps", type=click.IntRange(1), help="Stop with a checkpoint after that many steps.")
def train(recipe: str, data: tuple[str, ...], out: Path, **options: Any) -> None:
    """Pre-train an encoder by RECIPE (names: `micl-zoo models`).

    Writes run.json, metrics.jsonl, checkpoints/ and encoder/, which `micl_zoo.load(weights=...)` takes. A killed run
    goes on from its last checkpoint with the same numbers.
    """
    from micl_zoo.training.pretrain import pretrain

    try:
        made = pretrain(recipe, data[0] if len(data) == 1 else data, out, **options)
    except KeyboardInterrupt:
        click.echo(f"\nStopped. Run the same command to go on from the last checkpoint in {out}.", err=True)
        sys.exit(130)
    if made == out:
        click.echo(f"Stopped at --max-steps. Run the same command without it to go on from {out}.")
    else:
        click.echo(f"The encoder is in {made.parent}: micl_zoo.load(weights={str(made.parent)!r}).")


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
    record = find_record(name)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(record), indent=2))
        return
    shape = record.shape
    rows = {
        "name": record.name,
        "summary": record.summary,
        "shape": f"{shape.embed_dim} wide, {shape.depth} blocks, {shape.num_heads} heads, timm's {shape.timm_name}",
        "weights": _where(record) + (f", {record.bytes:,} bytes, sha256 {record.sha256}" if record.sha256 else ""),
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
        from .weights import not_published

        click.echo("\n" + not_published(record))


def _where(record: Record) -> str:
    if not record.published:
        return "not published"
    return "embedded" if record.embedded else f"hub {record.hub_repo}"
