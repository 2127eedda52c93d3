"""Fits linear classifiers to frozen features: a probe with all learning rates at once, logistic regression, few-shot.

Shapes: N images, D width of the features, C classes, L learning rates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from micl_zoo.errors import UsageError

from .features import Device, Features, Figures
from .labelled import balanced_rows
from .protocols import Protocol
from .tables import percent, scored

VALIDATION_PART = 5  # one of so many training images chooses the setting
BATCH_SIZE, MOMENTUM = 256, 0.9


class Chosen(NamedTuple):
    """A classifier whose setting a validation split of the training images chose."""

    setting: float  # the learning rate, or C
    validation: dict[float, float]  # accuracy of each setting on the validation split, 0 to 1
    predictions: np.ndarray  # (N,) classes of the test images, of the classifier refitted to all training images


def linear_probe(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, classes: int,
    learning_rates: Sequence[float] = Protocol.learning_rates, epochs: int = Protocol.epochs,
    batch_size: int = BATCH_SIZE, seed: int = 0, device: Device = "cpu",
) -> Chosen:  # fmt: skip
    """Fit softmax regression by SGD with momentum and a cosine schedule, one classifier per learning rate, all at once.

    Features, train (M, D) and test (N, D), are brought to mean 0 and deviation 1 over the training images, as the
    BatchNorm without affine of MAE's protocol does. The learning rates are peaks for a batch of 256, scaled with the
    batch; the best on a fifth of the training images is taken once more for all of them, and the test rows are
    classified once.
    """
    scaled, asked = standardise(train, test)

    fitting, held = validation_split(labels, seed)
    how = (epochs, batch_size, seed, device)
    weights = _sgd(scaled[fitting], labels[fitting], classes, learning_rates, *how)  # (L, D + 1, C)
    hits = [(_predict(scaled[held], one) == labels[held]).mean() for one in weights]
    found = dict(zip(learning_rates, map(float, hits), strict=True))
    best = _best(found)
    return Chosen(best, found, _predict(asked, _sgd(scaled, labels, classes, [best], *how)[0]))


def logistic_regression(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, classes: int,
    inverse_penalties: Sequence[float] = Protocol.inverse_penalties, seed: int = 0, device: Device = "cpu",
) -> Chosen:  # fmt: skip
    """Fit multinomial logistic regression by L-BFGS, with C chosen on a fifth of the training images.

    The objective is scikit-learn's: half the squared weights plus C times the summed cross-entropy; no penalty on
    the bias. Features are brought to mean 0 and deviation 1 first. Each C starts from the weights of the one before.
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
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, classes: int, shots: int, draws: int = Protocol.draws,
    inverse_penalty: float = Protocol.few_shot_c, device: Device = "cpu",
) -> list[np.ndarray]:  # fmt: skip
    """Predict classes (N,) by logistic regression on `shots` images per class, for several draws of them.

    C is fixed: there is nothing to choose it on. Features are scaled by all training images, without their labels.
    """
    fewest = int(np.bincount(labels, minlength=classes).min())
    if fewest < shots:
        raise UsageError(f"{shots} images per class asked for, but a class has {fewest} training images")
    scaled, asked = standardise(train, test)
    found = []
    for draw in range(draws):
        rows = balanced_rows(labels, shots * classes, seed=draw)
        weights = fit_logistic(scaled[rows], labels[rows], classes, inverse_penalty, device=device)
        found.append(_predict(asked, weights))
    return found


def measure_linear(train: Features, test: Features, protocol: Protocol, classes: int, device: Device) -> Figures:
    """Measure each pool by `linear_probe`; figures by pool."""
    how = {"learning_rates": protocol.learning_rates, "epochs": protocol.epochs, "seed": protocol.seed}
    return _by_pool(linear_probe, "lr", train, test, classes=classes, device=device, **how)


def measure_logreg(train: Features, test: Features, protocol: Protocol, classes: int, device: Device) -> Figures:
    """Measure each pool by `logistic_regression`; figures by pool."""
    how = {"inverse_penalties": protocol.inverse_penalties, "seed": protocol.seed}
    return _by_pool(logistic_regression, "C", train, test, classes=classes, device=device, **how)


def _by_pool(fit: Callable[..., Chosen], setting: str, train: Features, test: Features, **how: Any) -> Figures:
    figures = Figures()
    for pool, rows in train.rows.items():
        found = fit(rows, train.labels, test.rows[pool], **how)
        validation = percent(max(found.validation.values()))
        figures[pool] = {**scored(found.predictions == test.labels), setting: found.setting, "validation": validation}
    return figures


def measure_few_shot(train: Features, test: Features, protocol: Protocol, classes: int, device: Device) -> Figures:
    """Measure the first pool by `few_shot`; mean and spread over the draws, by number of shots.

    Where a class has too few images for a number of shots, its figure is the reason: {"left_out": text}.
    """
    pool, figures = next(iter(train.rows)), Figures()
    rows = (train.rows[pool], train.labels, test.rows[pool])
    how: dict[str, Any] = {"draws": protocol.draws, "inverse_penalty": protocol.few_shot_c, "device": device}
    for shots in protocol.shots:
        try:
            found = few_shot(*rows, classes=classes, shots=shots, **how)
        except UsageError as error:
            figures[str(shots)] = {"left_out": str(error)}
            continue
        right = np.stack([predictions == test.labels for predictions in found])  # (draws, N)
        draws = [float(share) for share in right.mean(1)]
        spread = float(np.std(draws, ddof=1)) if len(draws) > 1 else 0.0
        mean = percent(float(np.mean(draws)))
        figure = {"accuracy": mean, "spread": percent(spread), "draws": [*map(percent, draws)], "right": right}
        figures[str(shots)] = figure
    return figures


def standardise(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Bring every feature to mean 0 and deviation 1 over the training rows (N, D); a constant feature becomes 0."""
    mean, deviation = train.mean(0), train.std(0)
    deviation = np.where(deviation > 1e-6 * np.abs(train).max(), deviation, np.inf)
    return [((rows - mean) / deviation).astype(np.float32) for rows in (train, *others)]


def validation_split(labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Choose rows to fit on, and a fifth of the training images, balanced over the classes, to choose a setting by."""
    if len(labels) < VALIDATION_PART:
        raise UsageError(f"{len(labels)} training images are too few to hold a fifth of them back: give at least 5")
    held = balanced_rows(labels, len(labels) // VALIDATION_PART, seed)
    return np.setdiff1d(np.arange(len(labels)), held), held


def fit_logistic(
    rows: np.ndarray, labels: np.ndarray, classes: int, inverse_penalty: float, *, start: Tensor | None = None,
    iterations: int = 500, device: Device = "cpu",
) -> Tensor:  # fmt: skip
    """Fit multinomial logistic regression from `start` on: weights and, in the last row, biases (D + 1, C)."""
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
    rows: np.ndarray, labels: np.ndarray, classes: int, rates: Sequence[float], epochs: int, batch_size: int, seed: int,
    device: Device,
) -> Tensor:  # fmt: skip
    """Fit one classifier per learning rate: weights and, in the last row, biases (L, D + 1, C)."""
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


def _with_ones(rows: np.ndarray, device: Device) -> Tensor:
    inputs = torch.from_numpy(rows).to(device)
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)  # (N, D + 1)


def _predict(rows: np.ndarray, weights: Tensor) -> np.ndarray:
    return (_with_ones(rows, weights.device) @ weights).argmax(1).cpu().numpy()


def _best(found: Mapping[float, float]) -> float:
    """Take the setting with the highest accuracy; of several, the one in their middle."""
    top = [setting for setting, accuracy in found.items() if accuracy == max(found.values())]
    return top[len(top) // 2]
