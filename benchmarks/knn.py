"""k-NN accuracy of a run's encoder, of the same ViT before training, and of raw pixels; writes the run's record.

    python benchmarks/knn.py runs/vit_ti16.tin200 --data data -o training/records/vit_ti16.tin200.json

The data folder holds tin200/{train-*,val}.parquet and {caltech101,flowers5,cifar10}/{train,test}.parquet, with the
columns image and label.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from micl_zoo.training.knn import embed_labelled, knn_accuracy, read_labels
from micl_zoo.training.pretrain import initial_model
from micl_zoo.training.recipes import Recipe
from micl_zoo.training.rundir import code_commit, encoder_config, machine

import micl_zoo
from micl_zoo.decode import decode
from micl_zoo.encoder import Encoder
from micl_zoo.engines import resolve_precision
from micl_zoo.files import write_text
from micl_zoo.sources import ImageIndex, Reader, index_source
from micl_zoo.store import package_versions
from micl_zoo.transforms import Transform
from micl_zoo.weights import file_sha256

K, TEMPERATURE = 20, 0.07
BANK = 10_000  # training images the neighbours are looked for among; the first so many of the (shuffled) files
SETS = {
    "tin200": ("tin200/train-*.parquet", "tin200/val.parquet"),
    "caltech101": ("caltech101/train.parquet", "caltech101/test.parquet"),
    "flowers5": ("flowers5/train.parquet", "flowers5/test.parquet"),
    "cifar10": ("cifar10/train.parquet", "cifar10/test.parquet"),
}
CURVE_EVERY = 50  # steps between the points of the curve that is kept in the record


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True), help="Folder of the data sets.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The record to write.")
def main(run: Path, data: Path, out: Path) -> None:
    """Measure the encoder of RUN on every data set and write its record."""
    weights = run / "encoder" / "model.safetensors"
    trained = micl_zoo.load(weights=weights)
    made_by = json.loads((run / "run.json").read_text(encoding="utf-8"))
    untrained = before_training(made_by["recipe"]).to(trained.device)
    results: dict[str, dict[str, Any]] = {}
    for name, (train, test) in SETS.items():
        bank, queries = index_source(str(data / train)).slice(0, BANK), index_source(str(data / test))
        start = time.monotonic()
        results[name] = {
            "encoder": accuracy(*embed_labelled(trained, bank), *embed_labelled(trained, queries)),
            "random": accuracy(*embed_labelled(untrained, bank), *embed_labelled(untrained, queries)),
            "pixels": accuracy(*raw_pixels(bank), *raw_pixels(queries)),
            "train_images": len(bank),
            "test_images": len(queries),
        }
        click.echo(f"{name} {results[name]} ({time.monotonic() - start:.0f} s)")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    record = {
        "weights": {"sha256": file_sha256(weights), "bytes": weights.stat().st_size},
        "run": made_by,
        "curve": steps[::CURVE_EVERY] + steps[-1:],
        "knn": results,
        "knn_settings": {
            "k": K,
            "temperature": TEMPERATURE,
            "features": "class token, unit length",
            "transform": trained.transform.id,
            "precision": resolve_precision("auto", trained.device)[1],
            "random": "the same ViT as the run initialised it, before the first step",
            "pixels": "32 x 32 RGB, normalised, unit length",
            "unit": "percent of test images",
        },
        "measured": {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "command": "python benchmarks/knn.py RUN --data DATA -o RECORD",
            "commit": code_commit(),
            "machine": machine(trained.device),
            "versions": package_versions(),
        },
    }
    write_text(out, json.dumps(record, indent=1) + "\n")
    click.echo(f"{out}")


def before_training(fields: dict[str, Any]) -> Encoder:
    """The network of a run at step 0: same initialisation, same seed, same positions."""
    recipe = Recipe(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
    return Encoder(initial_model(recipe).vit, encoder_config(recipe), record=None, weights_sha256=None)


def raw_pixels(index: ImageIndex) -> tuple[np.ndarray, np.ndarray]:
    """32 x 32 pixels as features (N, 3072), and labels (N,)."""
    transform, reader = Transform(32, 32), Reader()
    pixels = np.stack([transform.pixels(decode(reader.read(entry))) for entry in index.entries()])
    features = transform.normalise(torch.from_numpy(pixels)).flatten(1)
    return features.numpy(), np.array(read_labels(index))


def accuracy(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """In percent, to a tenth."""
    return round(100 * knn_accuracy(train, train_labels, test, test_labels, k=K, temperature=TEMPERATURE), 1)


if __name__ == "__main__":
    main()
