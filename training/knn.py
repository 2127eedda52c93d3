"""Weighted k-nearest-neighbour accuracy on frozen embeddings, the contract of DINO: cosine, k = 20, T = 0.07."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from micl_zoo.encoder import Encoder
from micl_zoo.errors import SourceError
from micl_zoo.extract import embed_batches, resolve_precision
from micl_zoo.sources import PARQUET_CELL, ImageIndex


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


def embed_labelled(encoder: Encoder, index: ImageIndex, *, batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, D) and labels (N,) of a parquet index with a `label` column; refused images are left out."""
    autocast, _ = resolve_precision("auto", encoder.device)
    labels = dict(zip((entry.id for entry in index.entries()), read_labels(index), strict=True))
    batches = list(embed_batches(encoder, iter([index]), batch_size, autocast=autocast))
    ids = [name for batch in batches for name in batch.ids]
    return np.concatenate([batch.rows for batch in batches]), np.array([labels[name] for name in ids])


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
