"""Contenders in turn, A B C A B C, so that a busy minute of the machine favours none of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from micl_zoo.progress import progress

T = TypeVar("T")
FOREVER = 10**9  # steps; the budget ends a run


def in_turn(title: str, names: Iterable[str], rounds: int, run: Callable[[str], T]) -> dict[str, list[T]]:
    """What `run(name)` returned, one per round, by name."""
    found: dict[str, list[T]] = {name: [] for name in names}
    with progress(title, rounds * len(found), unit="runs") as tick:
        for _ in range(rounds):
            for name, results in found.items():
                results.append(run(name))
                tick(1, name)
    return found


def spread(rates: Sequence[float]) -> tuple[float, float, float]:
    """Median, lowest and highest."""
    return statistics.median(rates), min(rates), max(rates)


def ratio(value: float | None, base: float | None) -> float | None:
    """Quotient of two rates; None if one of them was not measured."""
    return round(value / base, 3) if value is not None and base else None


def rate(embed: Callable[[np.ndarray], object], of: Iterator[np.ndarray], seconds: float) -> float:
    """Images/s over some seconds, at least one batch."""
    start, images = time.perf_counter(), 0
    while not images or time.perf_counter() - start < seconds:
        batch = next(of)
        embed(batch)
        images += len(batch)
    return images / (time.perf_counter() - start)
