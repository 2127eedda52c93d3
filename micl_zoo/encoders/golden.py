"""Reference embeddings of four generated images, which show whether an installation and a machine compute right.

The images are computed in whole numbers, the same everywhere, at the encoder's own size, so that nothing resizes them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .._version import package_versions
from ..errors import WeightsError
from ..files import write_text
from ..schema import read, read_json
from ..zoo.hub import embedded_file
from ..zoo.pools import Pool

if TYPE_CHECKING:
    import numpy as np

    from ..zoo.ours import Record
    from ..zoo.public import Public
    from .encoder import Encoder

NUMBERS, DIGITS = 64, 7  # the first NUMBERS of each embedding are kept, rounded
TOLERANCE = 1e-4  # of each number, in fp32


@dataclass(frozen=True)
class GoldenFile:
    """What an encoder must give; files of before the later fields are of encoders of ours."""

    embeddings: dict[str, list[float]]  # by image
    pool: Pool = "cls"
    source: str | None = None  # with the commit, see `EncoderConfig`
    encoder: str | None = None  # its name


def golden_file(row: Record | Public) -> Path:
    """Return the golden file of an encoder that comes with the package; WeightsError where there is none."""
    return embedded_file(f"{row.name}.golden.json")


def read_golden(file: Path) -> GoldenFile:
    """Read a golden file.

    Raises:
        WeightsError: it is damaged.
    """
    cure = "reinstall micl-zoo for a file of the package, write another one anew"
    return read(GoldenFile, read_json(file, WeightsError, cure), repr(str(file)), WeightsError, cure, others=True)


def golden_images(height: int, width: int) -> dict[str, np.ndarray]:
    """Return the images by name: (height, width, 3) uint8."""
    import numpy as np

    down, across = np.mgrid[:height, :width]
    radius = (2 * down - height) ** 2 + (2 * across - width) ** 2
    squares = (down // 16 + across // 16) % 2
    words = np.random.PCG64(0).random_raw((height, width, 3))  # the generator's own bits, which no release may change
    planes = {
        "gradient": [255 * down // height, 255 * across // width, 255 - 255 * down // height],
        "rings": [radius // 256 % 256, radius // 512 % 256, radius // 1024 % 256],
        "squares": [230 * squares, 40 + 90 * squares, 200 - 160 * squares],
    }
    images = {name: np.stack(channels, axis=-1).astype(np.uint8) for name, channels in planes.items()}
    return {**images, "noise": (words >> np.uint64(56)).astype(np.uint8)}


def golden_numbers(encoder: Encoder, pool: Pool) -> dict[str, list[float]]:
    """Compute by image the first NUMBERS numbers of its embedding."""
    images = golden_images(*encoder.transform.size)
    rows = encoder.embed(list(images.values()), pool=pool)
    return {name: [round(float(n), DIGITS) for n in row[:NUMBERS]] for name, row in zip(images, rows, strict=True)}


def write_golden(encoder: Encoder, file: Path) -> None:
    """Write a golden file: what the encoder is, and one line per image."""
    about = {
        "encoder": encoder.name,
        "weights_sha256": encoder.weights_sha256,
        "source": encoder.source,
        "pool": encoder.pool,
        "timm": package_versions()["timm"],
    }
    head = "\n".join(f" {json.dumps(key)}: {json.dumps(value)}," for key, value in about.items())
    rows = golden_numbers(encoder, encoder.pool).items()
    lines = ",\n".join(f'  "{name}": {json.dumps(row)}' for name, row in rows)
    write_text(file, f'{{\n{head}\n "embeddings": {{\n{lines}\n }}\n}}\n')


def golden_difference(encoder: Encoder, file: Path) -> float:
    """Return the largest difference to the golden file's numbers; in fp32 any backend keeps it within TOLERANCE."""
    golden = read_golden(file)
    if golden.encoder not in (None, encoder.name):
        raise WeightsError(f"{str(file)!r} is of {golden.encoder}, and this is {encoder.name}: give its own file")
    wanted, made = golden.embeddings, golden_numbers(encoder, golden.pool)
    if {name: len(row) for name, row in wanted.items()} != {name: len(row) for name, row in made.items()}:
        found = f"it has {', '.join(wanted)} with other numbers"
        raise WeightsError(f"{str(file)!r} is damaged or of another encoder, {found}: write it anew")
    return max(abs(one - other) for name in wanted for one, other in zip(wanted[name], made[name], strict=True))
