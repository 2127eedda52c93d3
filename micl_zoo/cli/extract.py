"""Images -> a store of embeddings."""

from __future__ import annotations

import json
from typing import Any, get_args

import click

from ..encoders.device import BACKENDS, PRECISIONS
from ..sources.names import EXCLUDED
from ..zoo.ours import DEFAULT
from ..zoo.pools import Pool
from . import _options as opt

REFUSED_EXIT_CODE = 3
POOLS = (
    "Row of an image: the encoder's own (native), a CLIP's projection, class token, mean of the patches, both, or all "
    "patches."
)
DEFAULTS = f"Left out besides: hidden names, {', '.join(EXCLUDED)}."


@click.command(cls=opt.Command)
@click.argument("source", nargs=-1, required=True)
@opt.value("-o", "--out", "Output folder or URI; the same command resumes it.", required=True)
@opt.value("--model", f"Encoder: {opt.MODEL}.", default=DEFAULT, metavar="ENCODER")
@opt.path("--weights", "A file or a folder, which --model takes too.", hidden=True)
@opt.value("--pool", POOLS, type=click.Choice(get_args(Pool)), show_default="the encoder's own")
@opt.IMAGE_SIZE
@opt.value("--normalize/--no-normalize", "Embeddings of unit length, or as they are.", default=True)
@opt.choice("--dtype", ["float32", "float16"], "Data type of the stored embeddings.")
@opt.choice(
    "--precision",
    ["auto", *PRECISIONS],
    "Compute precision. auto: bf16 where fast, else fp32. ONNX files keep their own.",
)
@opt.choice(
    "--backend",
    ["auto", *BACKENDS],
    "Library that runs the model. auto: onnx for ONNX files, openvino (faster) on CPUs that have it, else torch.",
)
@opt.value(
    "--provider",
    "providers",
    "Provider of ONNX Runtime, first choice first: tensorrt, cuda, cpu …",
    multiple=True,
    show_default="cuda on a GPU, else cpu",
)
@opt.flag("--compile", "Compile the model by torch.compile: pays off after thousands of images.")
@opt.value("--devices", "Devices, one process each: auto, all (GPUs), cpu, cuda, mps, cuda:0,cuda:1 …", default="auto")
@opt.count("--processes", "Number of model processes, which share the devices.", show_default="one per device")
@opt.choice("--engine", ["local", "ray"], "Where the work runs: this machine, or all machines of a Ray cluster.")
@opt.value("--address", "Address of the Ray cluster.", show_default="this machine's, or a new one on it")
@opt.workers()
@opt.count("--batch-size", "Images per forward pass.", show_default="256 on a GPU, else 16")
@opt.count("--shard-rows", "Images per part file.", show_default="10,000, fewer for patches")
@opt.flag("--fast-decode", "Decode JPEG at the scale needed: nearly the same pixels; recorded.")
@opt.choice("--exif", ["upright", "keep"], "Orientation: as the camera says, or as the pixels are stored.")
@opt.count("--max-pixels", "Largest image in pixels; larger ones are refused.", show_default="89,478,485")
@opt.value("--image-timeout", "Seconds per image, after which its process is replaced.", type=opt.POSITIVE, default=120)
@opt.value("--column", "Column of the images in parquet files.", show_default="by metadata, name, or the only one")
@opt.value("--id-column", "Column of ids in parquet files; none: file#row.", show_default="id, where there is one")
@opt.value("--exclude", f"Names or paths to leave out, as a shell's pattern. {DEFAULTS}", multiple=True)
@opt.value("--default-exclude/--no-default-exclude", "Leave out thumbnails and trash as listed above.", default=True)
@opt.count("--limit", "Number of images to embed, from the first of the source.")
@opt.value(
    "--retry",
    "Refused images to try again: passing (those whose cause may be gone), all, none, or reasons of errors.jsonl.",
    multiple=True,
    default=["passing"],
    metavar="REASON",
)
@opt.flag("--only-missing", "Add only the images that the store in --out lacks.")
@opt.flag("--overwrite", "Delete the embeddings in --out first.")
@opt.flag("--strict", f"Exit with code {REFUSED_EXIT_CODE} when an image could not be embedded or listed.")
@opt.AS_JSON
@opt.flag("--quiet", "Print nothing but errors.")
def extract(
    source: tuple[str, ...], out: str, strict: bool, as_json: bool, quiet: bool, max_pixels: int | None, **options: Any
) -> None:
    """Embed the images of SOURCE.

    SOURCE is any number of folders, images, globs, lists (.txt, .csv, .tsv, .json, .jsonl, or - for standard input),
    tar and zip archives, and parquet files with encoded images, local or at URIs: s3://, gs://, https://, hf:// …

    Writes manifest.json, index/, part-*.parquet (columns id, embedding) and errors.jsonl, one line per image that
    could not be embedded or entry that could not be listed. Ctrl-C keeps everything computed so far; a run that is
    killed loses at most its last minute.

    Examples:
      micl-zoo extract ~/Pictures -o embeddings
      micl-zoo extract photos/ -o embeddings --model timm/vit_small_patch14_reg4_dinov2.lvd142m
      micl-zoo extract "scans/**/*.png" -o embeddings --pool mean --precision fp32
      micl-zoo extract "shards/train-{0000..0099}.tar" -o embeddings --devices all --dtype float16
      micl-zoo extract s3://bucket/photos -o s3://bucket/embeddings --engine ray --address auto
      find photos -name "*.jpg" -newer last | micl-zoo extract - -o embeddings --only-missing
      micl-zoo extract list.csv -o embeddings --model runs/first/encoder --json
    """
    from ..extraction.extract import extract as run

    if max_pixels is not None:
        options["max_pixels"] = max_pixels
    say = (lambda text: None) if quiet else (lambda text: click.echo(text, err=True))
    summary = run(source, out, show=not quiet, say=say, **options)
    if as_json:
        click.echo(json.dumps(summary.as_dict()))
    elif not quiet:
        click.echo(summary.text())
    for shard, why in summary.failed.items():
        click.echo(f"shard {shard} failed twice: {why}. The same command tries it again.", err=True)
    if summary.refused and not quiet:
        click.echo(f"{summary.refused:,} could not be embedded: see {out}/errors.jsonl", err=True)
    if summary.notes.problems and not quiet:
        click.echo(f"{summary.notes.unlisted:,} could not be listed: see {out}/errors.jsonl", err=True)
    if summary.failed:
        raise SystemExit(1)
    if (summary.refused or summary.notes.problems) and strict:
        raise SystemExit(REFUSED_EXIT_CODE)
