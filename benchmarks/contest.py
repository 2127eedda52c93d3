"""Contenders in turn, A B C A B C, so that a busy minute of the machine favours none of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from micl_zoo.progress import progress

T = TypeVar("T")


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
