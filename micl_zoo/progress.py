"""Progress of long work on standard error: a bar where that is a terminal, else a line a minute."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, cast

from .printing import bar_output, printable, safe_output

LINE_SECONDS = 60
MOST_BAR, LEAST_BAR, LEAST_NAME = 40, 8, 12  # columns of the terminal


class Tick(Protocol):
    """Advances a bar. Any thread may call it."""

    def __call__(self, amount: int = 1, note: str = "", *, total: int | None = None, before: int = 0) -> None:
        """Advance by `amount`; `note` replaces the text after the bar, `total` its end; `before` were done earlier."""


@contextmanager
def progress(what: str, total: int | None, *, done: int = 0, unit: str = "images", show: bool = True) -> Iterator[Tick]:
    """Show a bar over `total` units (None: not known yet), of which `done` are there already, with time left and rate.

    Where standard error is not a terminal a line is written every LINE_SECONDS. With `show` False nothing is shown, and
    the same calls cost nothing.
    """
    if not show or sys.stderr is None:
        yield _silent
        return
    if not sys.stderr.isatty():
        yield _Lines(what, total, done, unit)
        return
    from rich import progress as rich
    from rich.cells import cell_len
    from rich.console import Console
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    elapsed, remaining = rich.TimeElapsedColumn(), rich.TimeRemainingColumn()

    class Line(rich.Progress):
        """One line whatever the width: numbers first, then as much of name and bar as there is room for."""

        def make_tasks_table(self, tasks: Iterable[rich.Task]) -> Table:
            grid = Table.grid(padding=(0, 1, 0, 0))
            for task in tasks:
                of, left = (f"/{task.total:,.0f}", f", {remaining.render(task)} left") if task.total else ("", "")
                numbers = [f"{task.completed:,.0f}{of} {unit}", f"{elapsed.render(task)} gone{left}"]
                if unit == "images" and task.speed:  # the note gives the rate of steps, in images
                    numbers.insert(1, f"{task.speed:,.0f} {unit}/s")
                said = fitting([*numbers, *filter(None, [task.fields["note"]])], self.console.width)
                room = self.console.width - 2 - cell_len(said)
                name = shortened(task.description, min(room, max(room - MOST_BAR, LEAST_NAME)))
                cells: list[Any] = [Text(name, no_wrap=True)] if name else []
                if (size := min(MOST_BAR, room - cell_len(name) - 1)) >= LEAST_BAR:
                    cells.append(ProgressBar(task.total, task.completed, width=size, pulse=task.total is None))
                grid.add_row(*cells, Text(said, no_wrap=True, overflow="crop"))
            return grid

    console = Console(file=cast(Any, bar_output()))
    bar = Line(console=console, refresh_per_second=4, speed_estimate_period=600)
    with bar, safe_output():  # it has put streams of its own in the place of standard output and error
        task = bar.add_task(printable(what), total=total, completed=done, note="")
        lock = threading.Lock()

        def tick(amount: int = 1, note: str = "", *, total: int | None = None, before: int = 0) -> None:
            with lock:
                shown = bar.tasks[0]
                shown.completed += before  # not by `update`, which would count it into the rate
                shown.total = shown.total if total is None else total  # which would forget the rate
                bar.update(task, advance=amount, note=printable(note) or shown.fields["note"])

        yield tick


class _Lines:
    """The tick of a bar that nobody watches: a line now and then, for the log that standard error is."""

    def __init__(self, what: str, total: int | None, done: int, unit: str) -> None:
        self.what, self.total, self.done, self.unit = printable(what), total, done, unit
        self.first, self.note, self.lock = done, "", threading.Lock()
        self.started = self.told = time.monotonic()

    def __call__(self, amount: int = 1, note: str = "", *, total: int | None = None, before: int = 0) -> None:
        with self.lock:
            self.done, self.first = self.done + amount + before, self.first + before
            self.total, self.note = self.total if total is None else total, printable(note) or self.note
            if (now := time.monotonic()) - self.told < LINE_SECONDS:
                return
            self.told, gone = now, now - self.started
            of = f"/{self.total:,}" if self.total else ""
            parts = [f"{self.what}: {self.done:,}{of} {self.unit}", f"{_clock(gone)} gone"]
            if self.total and self.done > self.first:
                left = gone * (self.total - self.done) / (self.done - self.first)
                parts[-1] += f", {_clock(left)} left"
            line = "  ".join([*parts, *filter(None, [self.note])])
        with contextlib.suppress(OSError, ValueError):  # a log that is closed
            print(line, file=bar_output(), flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds))))


def fitting(parts: list[str], width: int) -> str:
    """Join as many parts of a line as there is room for; the first stays."""
    while len(parts) > 1 and len("  ".join(parts)) >= width:
        parts = parts[:-1]
    return "  ".join(parts)


def shortened(name: str, width: int) -> str:
    """Leave out the middle of a name that is wider; all of it where too little would be left."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(name) <= width:
        return name
    if width < LEAST_NAME:
        return ""
    start, end = (width - 1) // 2, name
    while cell_len(end) > width - 1 - start:
        end = end[1:]
    return f"{set_cell_size(name, start)}…{end}"


def _silent(amount: int = 1, note: str = "", *, total: int | None = None, before: int = 0) -> None:
    pass
