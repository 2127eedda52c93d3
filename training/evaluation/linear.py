"""Linear classifiers on frozen features: a probe with all learning rates at once, logistic regression, few-shot.

Shapes: N images, D width of the features, C classes, L learning rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from micl_zoo.errors import UsageError

from .labelled import balanced_rows

# DINOv2's grid of learning rates, here for a batch of 256, and two more: small sets took its largest.
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1)
INVERSE_PENALTIES = tuple(10.0 ** (power / 2) for power in range(-10, 3))  # C, 1e-5 to 10
FEW_SHOT_C = 0.1
VALIDATION_PART = 5  # one of so many training images chooses the setting
EPOCHS, BATCH_SIZE, MOMENTUM = 50, 256, 0.9


class Chosen(NamedTuple):
    """A classifier whose setting a validation split of the training images chose.

    Attributes:
        setting: the learning rate, or C.
        validation: accuracy of each setting on the validation split, 0 to 1.
        predictions: (N,) classes of the test images, of the classifier refitted to all training images.
    """

    setting: float
    validation: dict[float, float]
    predictions: np.ndarray


def linear_probe(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    classes: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Chosen:
    """Softmax regression by SGD with momentum and a cosine schedule, one classifier a learning rate, all at once.

    Features are brought to mean 0 and deviation 1 over the training images, as the BatchNorm without affine of MAE's
    protocol does. The best learning rate on a fifth of the training images is taken once more for all of them; the test
    rows are classified once.

    Args:
        train: (M, D), labels: (M,), test: (N, D).
        classes: C.
        learning_rates: peaks, for a batch of 256; they are scaled with the batch.
        epochs: over the training images.
        batch_size: images a step.
        seed: of the split and the order.
        device: that computes.

    Raises:
        UsageError: fewer training images than a validation split needs.
    """
    scaled, asked = standardise(train, test)

    def fit(rows: np.ndarray, numbers: np.ndarray, rates: Sequence[float]) -> Tensor:
        return _sgd(rows, numbers, classes, rates, epochs, batch_size, seed, device)

    fitting, held = validation_split(labels, seed)
    weights = fit(scaled[fitting], labels[fitting], learning_rates)  # (L, D + 1, C)
    hits = [(_predict(scaled[held], one) == labels[held]).mean() for one in weights]
    found = dict(zip(learning_rates, map(float, hits), strict=True))
    best = _best(found)
    return Chosen(best, found, _predict(asked, fit(scaled, labels, [best])[0]))


def logistic_regression(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    classes: int,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Chosen:
    """Multinomial logistic regression by L-BFGS, C chosen on a fifth of the training images.

    What is minimised is scikit-learn's: half the squared weights plus C times the summed cross-entropy; no penalty on
    the bias. Features are brought to mean 0 and deviation 1 first. Each C starts from the weights of the one before.

    Args:
        train: (M, D), labels: (M,), test: (N, D).
        classes: how many there are.
        inverse_penalties: values of C.
        seed: of the split.
        device: that computes.

    Raises:
        UsageError: fewer training images than a validation split needs.
    """
    scaled, asked = standardise(train, test)
    fitting, held = validation_split(labels, seed)
    found, weights = dict[float, float](), None
    for penalty in sorted(inverse_penalties):
        weights = fit_logistic(scaled[fitting], labels[fitting], classes, penalty, start=weights, device=device)
        found[penalty] = float((_predict(scaled[held], weights) == labels[held]).mean())
    best = _best(found)
    return Chosen(best, found, _predict(asked, fit_logistic(scaled, labels, classes, best, device=device)))


def few_shot(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    classes: int,
    shots: int,
    draws: int = 5,
    inverse_penalty: float = FEW_SHOT_C,
    device: str | torch.device = "cpu",
) -> list[np.ndarray]:
    """Predictions (N,) after logistic regression on `shots` images a class, for several draws of them.

    C is fixed: there is nothing to choose it on. Features are scaled by all training images, whose labels are not used
    for that.

    Raises:
        UsageError: a class with fewer training images.
    """
    fewest = int(np.bincount(labels, minlength=classes).min())
    if fewest < shots:
        raise UsageError(f"{shots} images a class asked for, but a class has {fewest} training images")
    scaled, asked = standardise(train, test)
    found = []
    for draw in range(draws):
        rows = balanced_rows(labels, shots * classes, seed=draw)
        weights = fit_logistic(scaled[rows], labels[rows], classes, inverse_penalty, device=device)
        found.append(_predict(asked, weights))
    return found


def standardise(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Mean 0 and deviation 1 for every feature over the training rows, (N, D); a constant feature becomes 0."""
    mean, deviation = train.mean(0), train.std(0)
    deviation = np.where(deviation > 1e-6 * np.abs(train).max(), deviation, np.inf)
    return [((rows - mean) / deviation).astype(np.float32) for rows in (train, *others)]


def validation_split(labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit and rows to choose by: a fifth of the training images, classes as even as they come.

    Raises:
        UsageError: fewer than five images.
    """
    if len(labels) < VALIDATION_PART:
        raise UsageError(f"{len(labels)} training images are too few to hold a fifth of them back: give at least 5")
    held = balanced_rows(labels, len(labels) // VALIDATION_PART, seed)
    return np.setdiff1d(np.arange(len(labels)), held), held


def fit_logistic(
    rows: np.ndarray,
    labels: np.ndarray,
    classes: int,
    inverse_penalty: float,
    *,
    start: Tensor | None = None,
    iterations: int = 500,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Weights and, in the last row, biases of a multinomial logistic regression: (D + 1, C).

    Args:
        rows: (N, D), labels: (N,).
        classes: C, of the result's columns.
        inverse_penalty: what scikit-learn calls C.
        start: weights to begin at.
        iterations: of L-BFGS, at most.
        device: that computes.
    """
    inputs, target = _with_ones(rows, device), torch.from_numpy(labels).to(device)
    shape = (inputs.shape[1], classes)
    weights = torch.zeros(shape, device=device) if start is None else start.clone()
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=iterations, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:  # scikit-learn's, over C N
        optimizer.zero_grad()
        penalty = weights[:-1].square().sum() / (2 * inverse_penalty * len(inputs))
        loss = F.cross_entropy(inputs @ weights, target) + penalty
        loss.backward()
        return loss

    optimizer.step(objective)
    return weights.detach()


def _sgd(
    rows: np.ndarray,
    labels: np.ndarray,
    classes: int,
    rates: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
    device: str | torch.device,
) -> Tensor:
    """Weights and, in the last row, biases of one classifier a learning rate: (L, D + 1, C)."""
    inputs, target = _with_ones(rows, device), torch.from_numpy(labels).to(device)
    batch_size = min(batch_size, len(inputs))
    steps = epochs * (len(inputs) // batch_size)
    peaks = torch.tensor(rates, device=device)[:, None] * batch_size / 256  # (L, 1)
    weights = torch.zeros(inputs.shape[1], len(rates) * classes, device=device)  # (D + 1, L C)
    velocity, generator = torch.zeros_like(weights), torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % (len(inputs) // batch_size) == 0:
            batches = iter(torch.randperm(len(inputs), generator=generator).to(device).split(batch_size))
        batch = next(batches)
        chances = (inputs[batch] @ weights).unflatten(1, (len(rates), classes)).softmax(2)  # (B, L, C)
        chances[torch.arange(len(batch), device=device), :, target[batch]] -= 1  # the gradient of the cross-entropy
        gradient = inputs[batch].T @ chances.flatten(1) / len(batch)
        velocity.mul_(MOMENTUM).add_(gradient)
        rate = peaks * (0.5 * (1 + np.cos(np.pi * step / steps)))
        weights -= (velocity.unflatten(1, (len(rates), classes)) * rate).flatten(1)
    return weights.unflatten(1, (len(rates), classes)).transpose(0, 1)


def _with_ones(rows: np.ndarray, device: str | torch.device) -> Tensor:
    inputs = torch.from_numpy(rows).to(device)
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)  # (N, D + 1)


def _predict(rows: np.ndarray, weights: Tensor) -> np.ndarray:
    return (_with_ones(rows, weights.device) @ weights).argmax(1).cpu().numpy()


def _best(found: Mapping[float, float]) -> float:
    """The setting of the highest accuracy; of several, the one in their middle."""
    top = [setting for setting, accuracy in found.items() if accuracy == max(found.values())]
    return top[len(top) // 2]
