"""Compare fast decoding with exact decoding, for several margins of the scaled JPEG decode; writes a record.

    python benchmarks/decode.py photos -o benchmarks/records/decode.json

How alike: the cosine of the embeddings of both, with the encoder that comes with the package and with a ViT-B/16 of
random weights, in fp32. How fast: one thread, files in memory, by processor time. Besides the photographs, drawings
that are hard on a scaled decode: noise, fine text, thin lines, and one smooth picture, each 4000 x 3000.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import timm
import torch
from contest import in_turn
from PIL import Image, ImageDraw
from record import write

import micl_zoo
import micl_zoo.images.decode
from micl_zoo.images.decode import Decoding, decode_pixels
from micl_zoo.images.transform import Transform
from micl_zoo.training.run.provenance import made_with

MARGINS = (1.0, 1.5, 2.0)
DRAWN, DRAWN_IN_TRIAL = (4000, 3000), (800, 600)
RANDOM, RANDOM_IN_TRIAL = "vit_base_patch16_224", "vit_tiny_patch16_224"

Embed = Callable[[np.ndarray], np.ndarray]  # (B, size, size, 3) uint8 -> (B, D) of unit length


@click.command()
@click.argument("photos", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Passes over the photographs.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Record to write.")
@click.option("--trial", is_flag=True, help="Small drawings and a small random ViT: does all of it run?")
def main(photos: Path, rounds: int, out: Path, trial: bool) -> None:
    """Compare on every .jpg file of the folder PHOTOS."""
    torch.set_num_threads(1)
    files = {path.name: path.read_bytes() for path in sorted(photos.glob("*.jpg"))}
    drawn = drawings(*(DRAWN_IN_TRIAL if trial else DRAWN))
    encoder, random_name = micl_zoo.load(device="cpu"), RANDOM_IN_TRIAL if trial else RANDOM
    random_vit, random_transform = random_weights(random_name)
    record = {
        "photographs": {"files": len(files), "pixels_mean": round(mean_pixels(files))},
        "rates": {
            "photographs": rates(files, encoder.transform, rounds),
            "drawings": rates(drawn, encoder.transform, 2),
        },
        "cosines": {
            encoder.name: cosines(
                files, drawn, encoder.transform, lambda pixels: encoder.embed_pixels(pixels, normalize=True)
            ),
            f"timm {random_name}, random": cosines(files, drawn, random_transform, random_vit),
        },
        "margin_in_use": micl_zoo.images.decode.FAST_MARGIN,
        "weights_sha256": encoder.weights_sha256,
        "command": f"python benchmarks/decode.py PHOTOS --rounds {rounds}",
        **made_with(encoder.device),
    }
    write(record, out)
    click.echo(json.dumps(record, indent=1))


def random_weights(name: str) -> tuple[Embed, Transform]:
    """A ViT as timm initialises it from seed 0, and its transform."""
    torch.manual_seed(0)
    vit = timm.create_model(name, pretrained=False, num_classes=0).eval()
    transform = Transform.from_timm(vit.pretrained_cfg)

    @torch.inference_mode()
    def embed(pixels: np.ndarray) -> np.ndarray:
        rows: np.ndarray = vit(transform.normalise(torch.from_numpy(pixels))).numpy()
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return embed, transform


def mean_pixels(files: dict[str, bytes]) -> float:
    """Mean of width x height."""
    return sum(math.prod(Image.open(io.BytesIO(data)).size) for data in files.values()) / len(files)


def drawings(width: int, height: int) -> dict[str, bytes]:
    """JPEG files whose details are finer than the pixels that are kept, and a smooth one."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    coarse = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    rings = (127.5 + 127.5 * np.cos((across**2 + down**2) * (math.pi / 2 / width))).astype(np.uint8)
    pictures = {
        "noise": Image.fromarray(noise),
        "noise of 4 x 4 pixels": Image.fromarray(noise[: height // 4, : width // 4]).resize((width, height), 0),
        "text": _text(random, width, height),
        "lines": _lines(random, width, height),
        "rings of every width": Image.fromarray(rings).convert("RGB"),
        "smooth": Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC),
    }
    return {name: _jpeg(picture) for name, picture in pictures.items()}


def _text(random: np.random.Generator, width: int, height: int) -> Image.Image:
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for top in range(0, height, 14):
        draw.text((8, top), "".join(chr(int(code)) for code in random.integers(32, 127, width // 6)), fill="black")
    return page


def _lines(random: np.random.Generator, width: int, height: int) -> Image.Image:
    page = Image.new("RGB", (width, height), (240, 240, 230))
    draw = ImageDraw.Draw(page)
    for _ in range(1500):
        ends = random.integers(0, (width, height), (2, 2)).ravel().tolist()
        draw.line(ends, fill=tuple(random.integers(0, 256, 3).tolist()), width=1)
    return page


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pixels_of(data: bytes, transform: Transform, margin: float | None) -> np.ndarray:
    """Decode to (size, size, 3) uint8; exactly without a margin."""
    in_use = micl_zoo.images.decode.FAST_MARGIN
    micl_zoo.images.decode.FAST_MARGIN = margin or in_use
    try:
        return decode_pixels(data, transform, Decoding(fast=margin is not None))
    finally:
        micl_zoo.images.decode.FAST_MARGIN = in_use


def rates(files: dict[str, bytes], transform: Transform, rounds: int) -> dict[str, float]:
    """Images per second of processor time of each way, the best of some rounds in turn."""
    ways = {_name(margin): margin for margin in (None, *MARGINS)}

    def seconds(name: str) -> float:
        start = time.process_time()
        for data in files.values():
            pixels_of(data, transform, ways[name])
        return time.process_time() - start

    found = in_turn("decoding", ways, rounds, seconds)
    return {name: round(len(files) / min(spent), 1) for name, spent in found.items()}


def _name(margin: float | None) -> str:
    return f"fast, margin {margin}" if margin else "exact"


def cosines(files: dict[str, bytes], drawn: dict[str, bytes], transform: Transform, embed: Embed) -> dict[str, object]:
    """Cosines of exact and fast embeddings: mean and worst of the files, and each drawing's."""
    both = {**files, **drawn}
    rows: dict[bytes, np.ndarray] = {}  # by pixels: where nothing is scaled, all margins give the same
    exact = _rows(both, transform, None, embed, rows)
    found: dict[str, object] = {}
    for margin in MARGINS:
        cosine = (exact * _rows(both, transform, margin, embed, rows)).sum(axis=1)
        of_files = cosine[: len(files)]
        found[_name(margin)] = {
            "mean": round(float(of_files.mean()), 6),
            "worst": round(float(of_files.min()), 6),
            "worst_file": list(files)[int(of_files.argmin())],
            "drawings": {name: round(float(value), 6) for name, value in zip(drawn, cosine[len(files) :], strict=True)},
        }
        click.echo(f"{_name(margin)}: {found[_name(margin)]}", err=True)
    return found


def _rows(
    files: dict[str, bytes], transform: Transform, margin: float | None, embed: Embed, rows: dict[bytes, np.ndarray]
) -> np.ndarray:
    pixels = {data: pixels_of(data, transform, margin) for data in files.values()}
    new = {found.tobytes(): found for found in pixels.values() if found.tobytes() not in rows}
    for at in range(0, len(new), 16):
        batch = list(new)[at : at + 16]
        rows.update(zip(batch, embed(np.stack([new[key] for key in batch])).astype(float), strict=True))
    return np.stack([rows[pixels[data].tobytes()] for data in files.values()])


if __name__ == "__main__":
    main()
