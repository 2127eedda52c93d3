"""Contenders that the machine favours none of: in turn, A B C A B C, or each a process of its own on one core."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import click
import numpy as np

from micl_zoo.progress import progress

T = TypeVar("T")
FOREVER = 10**9  # steps; the budget ends a run
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",  # glibc: memory stays with the process; else the methods with large tensors
    "MALLOC_TRIM_THRESHOLD_": "-1",  # spend up to half of their time on page faults
}


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


def free_cores(jobs: int) -> list[int | None]:
    """List a core for each job, as far as the system says which there are.

    Raises:
        click.UsageError: fewer cores than jobs.
    """
    there = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None] * jobs
    if len(there) < jobs:
        raise click.UsageError(f"--jobs {jobs} needs as many cores, this process may use {len(there)}")
    return list(there[:jobs])


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Write options as words of a command line; one that is None is left out."""
    given = {f"--{key.replace('_', '-')}": value for key, value in options.items() if value is not None}
    return [str(word) for pair in given.items() for word in pair]


def run_apart(
    names: Iterable[str],
    command: Callable[[str, int | None], Sequence[str]],
    log: Callable[[str], Path],
    cores: Sequence[int | None],
    environment: Mapping[str, str],
) -> list[str]:
    """Run a command per name in a process of its own, as many at once as there are cores.

    Args:
        names: of the commands; one that is there twice runs once.
        command: its words, by name and core.
        log: the file that what it says is added to, by name.
        cores: those to run on; None is any.
        environment: variables that it has besides those of this process.

    Returns:
        The names of those that failed.
    """
    free: SimpleQueue[int | None] = SimpleQueue()
    for core in cores:
        free.put(core)

    def run(name: str) -> int:
        core, file = free.get(), log(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as to:
            variables = {**os.environ, **environment}
            code = subprocess.run(command(name, core), stdout=to, stderr=to, check=False, env=variables).returncode
        free.put(core)
        click.echo(f"{name}: " + (file.read_text(encoding="utf-8").strip().splitlines() or ["nothing said"])[-1])
        return code

    once = list(dict.fromkeys(names))
    with ThreadPoolExecutor(len(cores)) as pool:
        codes = list(pool.map(run, once))
    return [name for name, code in zip(once, codes, strict=True) if code]
