"""Votes against scikit-learn's and plain loops, whatever the pieces of the bank."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from micl_zoo.errors import UsageError
from micl_zoo.training.evaluation import knn
from micl_zoo.training.evaluation.knn import knn_accuracy, knn_predict


def rows_of(random: np.random.Generator, count: int, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    labels = random.integers(0, classes, count)
    centres = np.random.default_rng(7).normal(size=(classes, 16))
    return (centres[labels] + 2 * random.normal(size=(count, 16))).astype(np.float32), labels


def test_votes_are_scikit_learn_s() -> None:
    random = np.random.default_rng(0)
    (train, train_labels), (test, _) = rows_of(random, 700), rows_of(random, 300)
    found = knn_predict([(train, train_labels)], test, classes=4, ks=(1, 10, 50))
    for k, predictions in found.items():
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda far: np.exp((1 - far) / 0.07))
        np.testing.assert_array_equal(predictions, theirs.fit(train, train_labels).predict(test))


def test_a_bank_in_pieces_is_the_whole_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    (train, labels), (test, _) = rows_of(random, 500), rows_of(random, 200)
    whole = knn_predict([(train, labels)], test, classes=4)
    monkeypatch.setattr(knn, "QUERY_ROWS", 33)
    monkeypatch.setattr(knn, "BANK_ROWS", 70)
    pieces = ((train[start : start + 90], labels[start : start + 90]) for start in range(0, 500, 90))
    for k, predictions in knn_predict(pieces, test, classes=4).items():
        np.testing.assert_array_equal(predictions, whole[k])


def test_accuracy_is_that_of_a_plain_loop() -> None:
    random = np.random.default_rng(2)
    (train, train_labels), (test, test_labels) = rows_of(random, 120), rows_of(random, 60)
    hits = 0
    for row, truth in zip(test, test_labels, strict=True):
        cosine = train @ row / (np.linalg.norm(train, axis=1) * np.linalg.norm(row))
        nearest = np.argsort(-cosine)[:7]
        votes = [sum(np.exp(cosine[i] / 0.1) for i in nearest if train_labels[i] == c) for c in range(4)]
        hits += votes.index(max(votes)) == truth
    assert knn_accuracy(train, train_labels, test, test_labels, k=7, temperature=0.1) == hits / 60
    assert hits > 30  # chance is a quarter


@pytest.mark.parametrize("temperature", [1e-3, 1e-4, 1e-12, 1e-300])
def test_however_low_the_temperature_the_nearest_decides(temperature: float) -> None:
    random = np.random.default_rng(3)
    (train, labels), (test, _) = rows_of(random, 400), rows_of(random, 200)
    nearest = knn_predict([(train, labels)], test, classes=4, ks=(1,))[1]
    found = knn_predict([(train, labels)], test, classes=4, ks=(200,), temperature=temperature)[200]
    assert np.mean(found == nearest) > 0.95


def test_fewer_rows_than_neighbours_all_vote() -> None:
    rows = np.eye(6, dtype=np.float32)
    assert knn_accuracy(rows, np.arange(6), 3 * rows, np.arange(6), k=20) == 1


def test_no_bank_or_another_width_is_an_error() -> None:
    rows = np.eye(3, dtype=np.float32)
    with pytest.raises(UsageError, match="nothing to look for neighbours among"):
        knn_predict([], rows, classes=2)
    with pytest.raises(UsageError, match="rows of 2 numbers, the queries of 3"):
        knn_predict([(rows[:, :2], np.arange(3))], rows, classes=3)
