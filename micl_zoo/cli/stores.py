"""What can be done with a store of embeddings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from ..printing import printable
from . import _options as opt


@click.command(cls=opt.Command)
@click.argument("store")
@click.argument("images", metavar="[IMAGE]...", nargs=-1, type=opt.LocalPath())
@opt.value("--id", "ids", "Id of a row of the store to search for.", multiple=True)
@opt.value("--text", "texts", "Text to search for.", multiple=True)
@opt.count("-k", "Number of hits per image, text or id.", default=10)
@opt.STORE_MODEL
@opt.path("--text-weights", "Weights of the text tower, a file or a folder, for use without a network.")
@opt.value("--text-tower", "Name of the encoder whose text tower it is, for stores made from local files.")
@opt.DEVICE
@opt.flag("--exact", "Without effect: every search is exact.")
@opt.path("--picture", "Contact sheet to write too, a name that ends in .png, .jpg or .webp.")
@opt.REMOTE
@opt.UNCHECKED
@opt.flag("--json", "as_json", "Print one JSON object per hit and line.")
def search(
    store: str,
    images: tuple[Path, ...],
    as_json: bool,
    picture: Path | None,
    check: bool,
    text_weights: Path | None,
    text_tower: str | None,
    **options: Any,
) -> None:
    """Find the images in STORE that are nearest to each IMAGE, or to a text: rank, cosine, id.

    A row given by --id does not find itself. Of a store that is still being written, the finished parts are searched.
    --text needs a store of a CLIP, SigLIP or PE encoder in the space that it shares with texts.

    Examples:
      micl-zoo search embeddings cat.jpg
      micl-zoo search embeddings cat.jpg dog.jpg -k 20 --picture nearest.png
      micl-zoo search embeddings --id 2024/beach.jpg --json
      micl-zoo search embeddings --text "a red dress" --picture dresses.png
    """
    texts = options["texts"]
    if not images and not options["ids"] and not texts:
        raise click.UsageError("search needs an IMAGE, --text or --id")
    from ..encoders.text import check_texts
    from ..stores.search import search as run
    from ..stores.search import text_encoder
    from ..stores.store import open_store, parts_of

    opened = open_store(store, check=check)
    if strays := opened.strays():
        click.echo(f"not searched, for it is no part of {store}: {', '.join(map(printable, strays))}", err=True)
    if not opened.complete:
        click.echo(
            f"{store} is not complete: searching {parts_of(len(opened.done()), opened.manifest.shards)}", err=True
        )
    check_texts(texts)
    tower = text_encoder(opened, text_weights, tower=text_tower) if texts else None
    if tower:
        click.echo(f"Text tower: {tower}", err=True)
    found = run(opened, images, picture=picture, text_weights=tower, **options)
    for query, hits in zip([*map(str, images), *texts, *options["ids"]], found, strict=True):
        if not as_json:
            click.echo(printable(query))
        for hit in hits:
            text = f"{hit.rank:>4}  {hit.cosine:7.4f}  {printable(hit.id)}"
            click.echo(json.dumps({"query": query, **hit._asdict()}) if as_json else text)
    if picture:
        click.echo(f"The contact sheet is in {picture}.", err=as_json)


@click.command(cls=opt.Command)
@click.argument("store")
@opt.count("--sample", "Number of images to read again, embed and compare; 0 needs no encoder.", least=0, default=32)
@opt.value("--seed", "Seed of the sample.", type=int, default=0)
@opt.REMOTE
@opt.STORE_MODEL
@opt.DEVICE
@opt.AS_JSON
def verify(store: str, as_json: bool, **options: Any) -> None:
    """Check the embeddings in STORE: no part damaged, no image lost, and the same numbers when computed again.

    Hashes every part, compares ids and ledger with the index, and embeds a sample of the images once more (cosine at
    least 0.9999). Lists all problems; exit code 1 when there is one.

    Examples:
      micl-zoo verify embeddings
      micl-zoo verify embeddings --sample 200 --model runs/first/encoder
      micl-zoo verify embeddings --remote
      micl-zoo verify embeddings --sample 0 --json
    """
    from ..stores.verify import verify as run

    found = run(store, **options)
    lines = [f"Problem: {line}" for line in found.problems] + [f"Not compared: {line}" for line in found.gone]
    if lines and not as_json:
        click.echo("\n".join(lines), err=True)
    click.echo(json.dumps(dataclasses.asdict(found), indent=2) if as_json else found.summary())
    raise SystemExit(1 if found.problems else 0)


@click.command(cls=opt.Command)
@click.argument("store")
@click.argument("out", type=opt.LocalPath())
@opt.choice("--dtype", ["float16", "float32"], "Data type of the rows.", default=None, show_default="the store's")
@opt.flag("--overwrite", "Replace OUT if it exists.")
@opt.flag("--incomplete", "Convert the parts that exist, where some are missing.")
@opt.UNCHECKED
def convert(store: str, out: Path, check: bool, **options: Any) -> None:
    """Write the embeddings in STORE to OUT, in the format of its name: .npy, .safetensors, .lance or .lancedb.

    The ids go into OUT.ids.json beside a .npy, into the tensor `ids` of a .safetensors, and into the column `id` beside
    `vector` of a LanceDB table. DATABASE/X.lance is the table X, DATABASE.lancedb the table `embeddings` in it.

    Examples:
      micl-zoo convert embeddings rows.npy
      micl-zoo convert embeddings rows.safetensors --dtype float16
      micl-zoo convert embeddings database/photos.lance
    """
    from ..stores.convert import convert as run
    from ..stores.store import open_store

    made = run(open_store(store, check=check), out, **options)
    rows, *each = made.shape
    found = f"{rows:,} rows of {' x '.join(map(str, each))} numbers, {made.dtype}, {made.bytes:,} bytes, in {made.path}"
    click.echo(f"{found}. Open it by:\n  {made.opens_with}")
