"""Progress bars for long work, on standard error if that is a terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Tick(Protocol):
    """Advances a bar. Any thread may call it."""

    def __call__(self, amount: int = 1, note: str = "", *, total: int | None = None, before: int = 0) -> None:
        """Advance by `amount`; `note` replaces the text after the bar, `total` its end; `before` were done earlier."""


@contextmanager
def progress(what: str, total: int | None, *, done: int = 0, unit: str = "images", show: bool = True) -> Iterator[Tick]:
    """Show a bar over `total` units (None: not known yet), of which `done` are there already, with time left and rate.

    Where standard error is not a terminal, or with `show` False, nothing is shown and the same calls cost nothing.
    """
    if not show or not sys.stderr.isatty():
        yield _silent
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f} {unit}/s" if task.speed else "")

    rate = [Rate()] if unit == "images" else []  # the note gives the rate of steps, in images
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), *rate]
    clocks = [TimeElapsedColumn(), TextColumn("gone,"), TimeRemainingColumn(), TextColumn("left  {task.fields[note]}")]
    with Progress(
        *columns, *clocks, console=Console(stderr=True), refresh_per_second=4, speed_estimate_period=600
    ) as bar:
        task = bar.add_task(what, total=total, completed=done, note="")
        note_now, lock = "", threading.Lock()

        def tick(amount: int = 1, note: str = "", *, total: int | None = None, before: int = 0) -> None:
            nonlocal note_now
            with lock:
                note_now = note or note_now
                shown = bar.tasks[0]
                shown.completed += before  # not by `update`, which would count it into the rate
                shown.total = shown.total if total is None else total  # which would forget the rate
                bar.update(task, advance=amount, note=note_now)

        yield tick


def _silent(amount: int = 1, note: str = "", *, total: int | None = None, before: int = 0) -> None:
    pass
