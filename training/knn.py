"""Weighted k-nearest-neighbour accuracy on frozen embeddings, the contract of DINO: cosine, k = 20, T = 0.07."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from micl_zoo.encoder import Encoder, Pool
from micl_zoo.engines import resolve_precision
from micl_zoo.errors import SourceError
from micl_zoo.extract import embed_index
from micl_zoo.sources import PARQUET_CELL, ImageIndex, index_source


def knn_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of test rows whose k nearest training rows vote for their label.

    A neighbour votes exp(cosine / temperature) for its class.

    Args:
        train: (M, D), any scale; rows are L2-normalised here. test: (N, D).
        train_labels: (M,) and test_labels: (N,), whole numbers from 0.
        k: neighbours, M at most.
        temperature: of the votes.
    """
    bank = F.normalize(torch.from_numpy(train).float(), dim=1)  # (M, D)
    labels, truth = torch.from_numpy(train_labels).long(), torch.from_numpy(test_labels).long()
    classes, hits = int(labels.max()) + 1, 0
    for queries, wanted in zip(torch.from_numpy(test).float().split(1024), truth.split(1024), strict=True):
        cosine, nearest = (F.normalize(queries, dim=1) @ bank.T).topk(min(k, len(bank)))  # (n, k)
        votes = torch.zeros(len(queries), classes).scatter_add_(1, labels[nearest], (cosine / temperature).exp())
        hits += int((votes.argmax(1) == wanted).sum())
    return hits / len(test)


class Probe(NamedTuple):
    """A labelled set that a run is measured on while it trains.

    Attributes:
        name: of its folder.
        train: images the neighbours are looked for among.
        test: images asked about.
    """

    name: str
    train: ImageIndex
    test: ImageIndex

    @classmethod
    def open(cls, folder: Path, images: int) -> Probe:
        """A folder with train*.parquet and test.parquet or val.parquet, which have the columns image and label.

        Args:
            folder: of the set.
            images: of the training part, at most; of the test part a quarter of that.

        Raises:
            SourceError: files or labels that are missing.
        """
        test = next((file for name in ("test", "val") if (file := folder / f"{name}.parquet").is_file()), None)
        if test is None or not any(folder.glob("train*.parquet")):
            raise SourceError(
                f"--knn {str(folder)!r} needs a folder with train*.parquet and test.parquet or val.parquet in it"
            )
        train = index_source(sorted(folder.glob("train*.parquet"))).slice(0, images)
        probe = cls(folder.resolve().name, train, index_source(test).slice(0, max(1, images // 4)))
        read_labels(probe.train), read_labels(probe.test)  # now and not in the middle of the run
        return probe

    def measure(self, encoder: Encoder) -> float:
        """K-NN accuracy, 0 to 1."""
        return knn_accuracy(*embed_labelled(encoder, self.train), *embed_labelled(encoder, self.test))


def embed_labelled(
    encoder: Encoder, index: ImageIndex, *, batch_size: int = 64, pool: Pool = "cls"
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, D) and labels (N,) of a parquet index with a `label` column; refused images are left out."""
    autocast, _ = resolve_precision("auto", encoder.device)
    labels = dict(zip((entry.id for entry in index.entries()), read_labels(index), strict=True))
    batches = list(embed_index(encoder, index, batch_size=batch_size, autocast=autocast, pool=pool))
    ids = [name for batch in batches for name in batch.ids]
    return np.concatenate([batch.embeddings for batch in batches]), np.array([labels[name] for name in ids])


def read_labels(index: ImageIndex) -> list[int]:
    """The `label` column of the parquet files behind an index, row by row.

    Raises:
        SourceError: images that are not parquet cells, or a file without the column.
    """
    columns: dict[str, list[int]] = {}
    labels = []
    for entry in index.entries():
        if entry.length != PARQUET_CELL:
            raise SourceError(f"{entry.id!r} has no label: labels are read from the `label` column of parquet files")
        if entry.uri not in columns:
            if "label" not in pq.read_schema(entry.uri).names:
                raise SourceError(f"{entry.uri!r} has no column `label`")
            columns[entry.uri] = pq.read_table(entry.uri, columns=["label"])["label"].to_pylist()
        labels.append(columns[entry.uri][entry.offset])
    return labels
