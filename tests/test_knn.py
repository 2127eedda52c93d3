"""k-NN against plain loops."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture
from micl_zoo.training.knn import embed_labelled, knn_accuracy, read_labels

import micl_zoo
from micl_zoo.errors import SourceError
from micl_zoo.sources import index_source


def test_equals_plain_loops() -> None:
    random = np.random.default_rng(0)
    train, test = random.normal(size=(60, 5)).astype(np.float32), random.normal(size=(2100, 5)).astype(np.float32)
    train_labels, test_labels = random.integers(0, 4, 60), random.integers(0, 4, 2100)
    hits = 0
    for row, truth in zip(test[:200], test_labels[:200], strict=True):
        cosine = [float(row @ other) / math.hypot(*row) / math.hypot(*other) for other in train]
        nearest = sorted(range(60), key=lambda i: -cosine[i])[:7]
        votes = [sum(math.exp(cosine[i] / 0.1) for i in nearest if train_labels[i] == c) for c in range(4)]
        hits += votes.index(max(votes)) == truth
    got = knn_accuracy(train, train_labels, test[:200], test_labels[:200], k=7, temperature=0.1)
    assert got == hits / 200
    pieces = knn_accuracy(train, train_labels, test, test_labels, k=7)  # more than one piece of queries
    assert 0.15 < pieces < 0.35  # chance is a quarter


def test_own_images_are_found_again() -> None:
    rows = np.eye(6, dtype=np.float32)
    assert knn_accuracy(rows, np.arange(6), 3 * rows, np.arange(6), k=20) == 1


def test_labels_stay_with_their_images(tmp_path: Path, encoder_folder: Path) -> None:
    def cell(seed: int) -> bytes:
        buffer = io.BytesIO()
        picture(seed).save(buffer, "PNG")
        return buffer.getvalue()

    images = [{"bytes": cell(n) if n != 2 else b"broken", "path": ""} for n in range(5)]
    pq.write_table(pa.table({"image": images, "label": [4, 3, 2, 1, 0]}), tmp_path / "a.parquet")
    encoder = micl_zoo.load(weights=encoder_folder, device="cpu")
    rows, labels = embed_labelled(encoder, index_source(tmp_path), batch_size=2)
    assert rows.shape == (4, 32)
    assert labels.tolist() == [4, 3, 1, 0]


def test_no_labels_is_an_error(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(SourceError, match="labels are read from the `label` column"):
        read_labels(index_source(tmp_path))
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "b.parquet")
    with pytest.raises(SourceError, match="has no column `label`"):
        read_labels(index_source(tmp_path / "b.parquet"))
