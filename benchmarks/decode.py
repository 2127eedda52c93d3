"""The fast decoding beside the exact one, for several margins of the scaled JPEG decode; writes a record.

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
from PIL import Image, ImageDraw

import micl_zoo
import micl_zoo.images.decode
from micl_zoo._version import package_versions
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.files import write_text
from micl_zoo.images.decode import Decoding, decode_pixels
from micl_zoo.images.transform import Transform
from micl_zoo.training.run.provenance import code_commit, machine

MARGINS = (1.0, 1.5, 2.0)
WIDTH, HEIGHT = 4000, 3000

Embed = Callable[[np.ndarray], np.ndarray]  # (B, size, size, 3) uint8 -> (B, D) of unit length


@click.command()
@click.argument("photos", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Passes over the photographs.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The record to write.")
def main(photos: Path, rounds: int, out: Path) -> None:
    """Compare on every .jpg file of the folder PHOTOS."""
    torch.set_num_threads(1)
    files = {path.name: path.read_bytes() for path in sorted(photos.glob("*.jpg"))}
    drawn = drawings()
    encoder = micl_zoo.load(device="cpu")
    random_vit, random_transform = random_weights()
    record = {
        "photographs": {"files": len(files), "pixels_mean": round(mean_pixels(files))},
        "rates": {
            "photographs": rates(files, encoder.transform, rounds),
            "drawings": rates(drawn, encoder.transform, 2),
        },
        "cosines": {
            encoder.name: cosines(files, drawn, encoder.transform, embedder(encoder)),
            "timm vit_base_patch16_224, random": cosines(files, drawn, random_transform, random_vit),
        },
        "margin_in_use": micl_zoo.images.decode.FAST_MARGIN,
        "weights_sha256": encoder.weights_sha256,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": f"python benchmarks/decode.py PHOTOS --rounds {rounds}",
        "commit": code_commit(),
        "machine": machine(encoder.device),
        "versions": package_versions(),
    }
    write_text(out, json.dumps(record, indent=1) + "\n")
    click.echo(json.dumps(record, indent=1))


def embedder(encoder: Encoder) -> Embed:
    """The encoder in fp32."""
    return lambda pixels: encoder.embed_pixels(pixels, normalize=True)


def random_weights() -> tuple[Embed, Transform]:
    """A ViT-B/16 as timm initialises it from seed 0, and its transform."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0).eval()
    transform = Transform.from_timm(vit.pretrained_cfg)

    @torch.inference_mode()
    def embed(pixels: np.ndarray) -> np.ndarray:
        rows: np.ndarray = vit(transform.normalise(torch.from_numpy(pixels))).numpy()
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return embed, transform


def mean_pixels(files: dict[str, bytes]) -> float:
    """Width x height, on average."""
    return sum(math.prod(Image.open(io.BytesIO(data)).size) for data in files.values()) / len(files)


def drawings() -> dict[str, bytes]:
    """JPEG files of 4000 x 3000 whose details are finer than the pixels that are kept, and a smooth one."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    coarse = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    across, down = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    rings = (127.5 + 127.5 * np.cos((across**2 + down**2) * (math.pi / 2 / WIDTH))).astype(np.uint8)
    pictures = {
        "noise": Image.fromarray(noise),
        "noise of 4 x 4 pixels": Image.fromarray(noise[: HEIGHT // 4, : WIDTH // 4]).resize((WIDTH, HEIGHT), 0),
        "text": _text(random),
        "lines": _lines(random),
        "rings of every width": Image.fromarray(rings).convert("RGB"),
        "smooth": Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC),
    }
    return {name: _jpeg(picture) for name, picture in pictures.items()}


def _text(random: np.random.Generator) -> Image.Image:
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(page)
    for top in range(0, HEIGHT, 14):
        draw.text((8, top), "".join(chr(int(code)) for code in random.integers(32, 127, WIDTH // 6)), fill="black")
    return page


def _lines(random: np.random.Generator) -> Image.Image:
    page = Image.new("RGB", (WIDTH, HEIGHT), (240, 240, 230))
    draw = ImageDraw.Draw(page)
    for _ in range(1500):
        ends = random.integers(0, (WIDTH, HEIGHT), (2, 2)).ravel().tolist()
        draw.line(ends, fill=tuple(random.integers(0, 256, 3).tolist()), width=1)
    return page


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pixels_of(data: bytes, transform: Transform, margin: float | None) -> np.ndarray:
    """(size, size, 3) uint8; exact without a margin."""
    micl_zoo.images.decode.FAST_MARGIN = margin or micl_zoo.images.decode.FAST_MARGIN
    return decode_pixels(data, transform, Decoding(fast=margin is not None))


def rates(files: dict[str, bytes], transform: Transform, rounds: int) -> dict[str, float]:
    """Images a second of processor time of each way, the best of some rounds in turn."""
    best = dict.fromkeys((None, *MARGINS), math.inf)
    in_use = micl_zoo.images.decode.FAST_MARGIN
    for _ in range(rounds):
        for margin in best:
            start = time.process_time()
            for data in files.values():
                pixels_of(data, transform, margin)
            best[margin] = min(best[margin], time.process_time() - start)
    micl_zoo.images.decode.FAST_MARGIN = in_use
    return {_name(margin): round(len(files) / seconds, 1) for margin, seconds in best.items()}


def _name(margin: float | None) -> str:
    return f"fast, margin {margin}" if margin else "exact"


def cosines(files: dict[str, bytes], drawn: dict[str, bytes], transform: Transform, embed: Embed) -> dict[str, object]:
    """Between exact and fast: mean and worst over the files, and each drawing's."""
    both = {**files, **drawn}
    rows: dict[bytes, np.ndarray] = {}  # by pixels: where nothing is scaled, all margins give the same
    exact = _rows(both, transform, None, embed, rows)
    found: dict[str, object] = {}
    in_use = micl_zoo.images.decode.FAST_MARGIN
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
    micl_zoo.images.decode.FAST_MARGIN = in_use
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
