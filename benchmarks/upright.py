"""Measure how alike the EXIF orientations of one scene embed, from a store that extract wrote; writes a record.

micl-zoo extract photos -o embeddings
python benchmarks/upright.py embeddings --prefix exif-orientation- -o training/records/vit_ti16.tin200.upright.json
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import torch
from record import write

import micl_zoo
from micl_zoo.training.run.provenance import made_with


@click.command()
@click.argument("store", type=click.Path(path_type=Path, exists=True))
@click.option("--prefix", default="exif-orientation-", show_default=True, help="Start of the ids that show the scene.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Record to write.")
def main(store: Path, prefix: str, out: Path) -> None:
    """Compare the rows of STORE whose ids begin with --prefix with each other and with all others."""
    opened = micl_zoo.open_store(store)
    rows = opened.embeddings / np.linalg.norm(opened.embeddings, axis=1, keepdims=True)
    same = np.array([name.startswith(prefix) for name in opened.ids])
    cosine = rows[same] @ rows.T  # (scene, all)
    count = int(same.sum())
    pairs = cosine[:, same][np.triu_indices(count, 1)]
    made = made_with(torch.device("cpu"))
    record = {
        "images_of_the_scene": count,
        "other_images": len(rows) - count,
        "mean_pairwise_cosine": round(float(pairs.mean()), 4),
        "lowest_pairwise_cosine": round(float(pairs.min()), 4),
        "highest_cosine_to_another": round(float(cosine[:, ~same].max()), 4),
        "model": opened.manifest.model,
        "weights_sha256": opened.manifest.weights_sha256,
        "precision": opened.manifest.precision,
        "date": made["date"],
        "command": f"python benchmarks/upright.py STORE --prefix {prefix}",
        "commit": made["commit"],
        "versions": opened.manifest.versions,
    }
    write(record, out)
    click.echo(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
