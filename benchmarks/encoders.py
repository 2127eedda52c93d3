"""How fast are other people's encoders on this machine? The small ones of `micl-zoo models`; writes a record.

    python benchmarks/encoders.py -o benchmarks/records/encoders.json

From pixels in memory to rows, by every backend that is installed, in the precision that `extract` takes by itself, and
by a plain loop around the same timm model, all in turn. Weights are random: none need be fetched, and speed does not
depend on them. What `extract` would take by itself here is what the table shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from contest import in_turn, rate, ratio, spread
from record import made_on, missing, options_text
from record import write as write_record

from micl_zoo import Encoder, Transform
from micl_zoo.encoders.build import build_model
from micl_zoo.encoders.device import autocast_dtype, autocasting, choose_backend, fast_precision
from micl_zoo.encoders.openvino_model import OpenVinoModel
from micl_zoo.zoo.public import IMAGENET, PUBLIC, Public
from micl_zoo.zoo.weights import EncoderConfig

MOST_PARAMETERS, MOST_GMACS = 100_000_000, 25.0
Embed = Callable[[np.ndarray], np.ndarray]  # (B, S, S, 3) uint8 -> (B, D)

# Networks of milliseconds, for --trial: a class token, and a CNN's own row.
SMALL = {
    "test_vit.trial": Public("test_vit.trial", "none", 64, 300_864, 0.005, "cls", size=64),
    "test_resnet.trial": Public("test_resnet.trial", "none", 96, 372_688, 0.016, size=64),
}


@click.command()
@click.option(
    "--rows", "names", multiple=True, metavar="NAME", help="Row of the table; may be repeated.  [default: all]"
)
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Images per forward pass.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Turns of every contender.")
@click.option("--seconds", type=click.FloatRange(0), default=6, show_default=True, help="Least time of one turn.")
@click.option("--trial", is_flag=True, help="Two tiny networks, a batch of each: does all of it run?")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Record to write, after every encoder.")
def main(names: tuple[str, ...], trial: bool, out: Path | None, **options: Any) -> None:
    """Measure the encoders of the table that have at most 100 M parameters and 25 GMAC."""
    torch.manual_seed(0)
    table = SMALL if trial else PUBLIC
    if unknown := set(names) - set(table):
        raise click.UsageError(f"no rows of the table: {', '.join(sorted(unknown))}. It has {', '.join(table)}")
    if trial:
        options |= {"batch_size": 2, "rounds": 1, "seconds": 0}
    rows = [table[name] for name in names or table]
    record: dict[str, Any] = {"encoders": {}, "left_out": {row.name: why for row in rows if (why := too_large(row))}}
    record |= {"unit": "images/s, from pixels to rows; ratio: to timm's model in fp32 in a plain loop", **options}
    chosen = [f"--rows {name}" for name in names]
    words = ["python benchmarks/encoders.py", *["--trial"] * trial, *chosen, options_text(options, *options)]
    record["command"] = " ".join(words)
    record |= made_on(torch.device("cpu"))
    for row in rows:
        if row.name in record["left_out"]:
            continue
        record["encoders"][row.name] = measured(row, **options)
        write_record(record, out)
        click.echo(line(row.name, record["encoders"][row.name]))
    for name, why in record["left_out"].items():
        click.echo(f"{name}: left out, {why}")
    if why_not := missing("openvino"):
        click.echo(f"openvino: left out, {why_not}")


def too_large(row: Public) -> str | None:
    """Say why an encoder is not measured; None if it is."""
    if row.parameters <= MOST_PARAMETERS and row.gmacs <= MOST_GMACS:
        return None
    return f"{row.parameters / 1e6:,.0f} M parameters, {row.gmacs:,.0f} GMAC per image"


def measured(row: Public, batch_size: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Images/s of every contender, and by how much their rows in float32 differ."""
    encoder = random_encoder(row)
    every, kind = contenders(encoder), fast_precision(encoder.device)
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, *encoder.transform.size, 3), dtype=np.uint8)
    apart = np.abs(encoder.embed_pixels(pixels, normalize=False) - plain(encoder, "fp32")(pixels)).max()

    def once(name: str) -> float:
        every[name](pixels)
        return rate(every[name], itertools.repeat(pixels), seconds)

    rates = in_turn(row.name, every, rounds, once)
    base, found = spread(rates["timm fp32"])[0], dict[str, Any]()
    for name, some in rates.items():
        median, lowest, highest = spread(some)
        found[name] = {"median": round(median, 2), "lowest": round(lowest, 2), "highest": round(highest, 2)}
        found[name]["ratio"] = ratio(median, base)
    by_itself = f"{choose_backend('auto', device=encoder.device, precision=kind)} {kind}"
    facts = {"pool": encoder.pool, "pixels": row.pixels, "difference_from_timm": float(apart)}
    return {**facts, "by_itself": by_itself, "images_per_second": found}


def random_encoder(row: Public) -> Encoder:
    """A row's encoder on the CPU, of its size and pool."""
    outputs = row.width if row.pool == "projection" else 0
    transform = row.transform or Transform.square(row.size, row.size, **IMAGENET)
    config = EncoderConfig(
        row.name, row.name.partition(".")[0], {}, row.width, transform, row.license, row.pool, outputs
    )
    encoder = Encoder(build_model(config, None), config, record=None, weights_sha256=None)
    assert encoder.row_shape() == (row.width,), f"{row.name} has rows of {encoder.row_shape()}"
    return encoder


def contenders(encoder: Encoder) -> dict[str, Embed]:
    """What is measured, by name."""
    kind = fast_precision(encoder.device)
    every = {"torch": encoder}
    if not missing("openvino"):
        twin = OpenVinoModel(encoder.runtime)  # type: ignore[arg-type]  # of backend torch
        every["openvino"] = Encoder(twin, encoder.config, record=None, weights_sha256=None)
    found = {f"{name} {kind}": ours(one, kind) for name, one in every.items()}
    return found | {f"timm {precision}": plain(encoder, precision) for precision in dict.fromkeys(("fp32", kind))}


def ours(encoder: Encoder, precision: str) -> Embed:
    """Embed as `extract` does."""
    return lambda pixels: encoder.embed_pixels(pixels, autocast=autocast_dtype(precision))


def plain(encoder: Encoder, precision: str) -> Embed:
    """Call timm's model the way people write it."""
    mean, std = (torch.tensor(getattr(encoder.transform, name)).view(3, 1, 1) for name in ("mean", "std"))
    model: Any = encoder.model
    kind, of_token = autocast_dtype(precision), encoder.pool == "cls"

    @torch.inference_mode()
    def embed(pixels: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()  # (B, 3, S, S), laid out as by ToTensor
        images = (images.float() / 255 - mean) / std
        with autocasting(encoder.device, kind):
            rows = model.forward_features(images)[:, 0] if of_token else model(images)  # (B, D)
        return np.asarray(rows.float())

    return embed


def shown(record: dict[str, Any]) -> dict[str, float]:
    """What `micl-zoo models` shows: images/s by what `extract` takes by itself."""
    every = record["encoders"].items()
    return {name: round(one["images_per_second"][one["by_itself"]]["median"], 1) for name, one in every}


def line(name: str, one: dict[str, Any]) -> str:
    """One encoder, for a person."""
    rates = (f"{who} {row['median']:,.1f} ({row['ratio']})" for who, row in one["images_per_second"].items())
    return f"{name}, {one['pixels']} pixels, images/s (and ratio to timm fp32): {', '.join(rates)}"


if __name__ == "__main__":
    main()
