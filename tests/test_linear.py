"""Against scikit-learn's logistic regression, against autograd, and what chooses the setting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from micl_zoo.errors import UsageError
from micl_zoo.training.evaluation import linear
from micl_zoo.training.evaluation.linear import (
    few_shot,
    fit_logistic,
    linear_probe,
    logistic_regression,
    standardise,
    validation_split,
)


def clouds(count: int, classes: int = 5, noise: float = 2.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(classes, 24))
    labels = np.arange(count) % classes
    return (centres[labels] + noise * random.normal(size=(count, 24))).astype(np.float32) * 3 + 1, labels


@pytest.mark.parametrize("penalty", [1e-3, 0.1, 10.0])
def test_logistic_regression_is_scikit_learn_s(penalty: float) -> None:
    train, labels = clouds(800)
    test, truth = clouds(1000, seed=1)
    scaled, asked = standardise(train, test)
    weights = fit_logistic(scaled, labels, 5, penalty).numpy()
    theirs = LogisticRegression(C=penalty, max_iter=2000, tol=1e-6).fit(scaled, labels)
    mine = (asked @ weights[:-1] + weights[-1]).argmax(1)
    assert abs((mine == truth).mean() - theirs.score(asked, truth)) <= 0.003
    centred = weights[:-1] - weights[:-1].mean(1, keepdims=True)  # a shift common to all classes changes nothing
    np.testing.assert_allclose(centred.T, theirs.coef_, atol=5e-3 * np.abs(theirs.coef_).max())


def test_all_learning_rates_at_once_are_each_alone() -> None:
    train, labels = clouds(60)
    rows = standardise(train)[0]
    rates = (0.003, 0.1)
    together = linear._sgd(rows, labels, 5, rates, 3, 16, 0, "cpu")  # (L, D + 1, C)
    for rate, found in zip(rates, together, strict=True):
        weights = torch.zeros(25, 5, requires_grad=True)
        optimizer = torch.optim.SGD([weights], lr=0, momentum=0.9)
        inputs, generator = torch.cat([torch.from_numpy(rows), torch.ones(60, 1)], 1), torch.Generator().manual_seed(0)
        for step in range(9):  # 3 epochs of 3 whole batches
            if step % 3 == 0:
                batches = torch.randperm(60, generator=generator).split(16)
            batch = batches[step % 3]
            optimizer.param_groups[0]["lr"] = rate * 16 / 256 * 0.5 * (1 + np.cos(np.pi * step / 9))
            optimizer.zero_grad()
            F.cross_entropy(inputs[batch] @ weights, torch.from_numpy(labels)[batch]).backward()
            optimizer.step()
        torch.testing.assert_close(found, weights.detach(), atol=1e-6, rtol=1e-4)


def test_a_probe_learns_and_the_validation_split_chooses() -> None:
    train, labels = clouds(500, noise=1.0)
    test, truth = clouds(300, noise=1.0, seed=1)
    for found in (
        linear_probe(train, labels, test, classes=5, epochs=20),
        logistic_regression(train, labels, test, classes=5),
    ):
        assert found.validation[found.setting] == max(found.validation.values())
        assert (found.predictions == truth).mean() > 0.95
    hopeless = linear_probe(train, labels, test, classes=5, epochs=1, learning_rates=(1e-9, 0.1))
    assert hopeless.setting == 0.1


def test_the_validation_split_is_even_and_apart() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    fitting, held = validation_split(labels)
    assert len(held) == 20
    assert sorted([*fitting, *held]) == list(range(100))
    assert np.bincount(labels[held]).tolist() == [7, 7, 6] or max(np.bincount(labels[held])) <= 7
    with pytest.raises(UsageError, match="3 training images are too few"):
        validation_split(labels[:3])


def test_few_shots_draw_anew_and_need_enough_images() -> None:
    train, labels = clouds(200, noise=1.0)
    test, truth = clouds(300, noise=1.0, seed=1)
    one, ten = (few_shot(train, labels, test, classes=5, shots=shots) for shots in (1, 10))
    assert len(one) == 5
    assert len({tuple(predictions) for predictions in one}) == 5
    accuracies = [np.mean([(predictions == truth).mean() for predictions in found]) for found in (one, ten)]
    assert accuracies[0] < accuracies[1]
    with pytest.raises(UsageError, match="41 images per class asked for, but a class has 40"):
        few_shot(train, labels, test, classes=5, shots=41)


def test_constant_features_become_zero() -> None:
    rows = np.array([[1, 5], [3, 5], [5, 5]], np.float32)
    np.testing.assert_allclose(standardise(rows)[0][:, 1], 0)
    np.testing.assert_allclose(standardise(rows)[0][:, 0], [-1.2247449, 0, 1.2247449])
