"""Progress bars for long work, on standard error if that is a terminal."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

from .printing import bar_output, printable, safe_output


class Tick(Protocol):
    """Advances a bar. Any thread may call it."""

    def __call__(self, amount: int = 1, note: str = "", *, total: int | None = None, before: int = 0) -> None:
        """Advance by `amount`; `note` replaces the text after the bar, `total` its end; `before` were done earlier."""


@contextmanager
def progress(what: str, total: int | None, *, done: int = 0, unit: str = "images", show: bool = True) -> Iterator[Tick]:
    """Show a bar over `total` units (None: not known yet), of which `done` are there already, with time left and rate.

    Where standard error is not a terminal, or with `show` False, nothing is shown and the same calls cost nothing.
    """
    if not show or sys.stderr is None or not sys.stderr.isatty():
        yield _silent
        return
    from rich import progress as rich
    from rich.console import Console
    from rich.text import Text

    class Rate(rich.ProgressColumn):
        def render(self, task: rich.Task) -> Text:
            return Text(f"{task.speed:,.0f} {unit}/s" if task.speed else "")

    text = functools.partial(rich.TextColumn, markup=False)
    rate = [Rate()] if unit == "images" else []  # the note gives the rate of steps, in images
    columns = [text("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn(), text(unit), *rate]
    columns += [rich.TimeElapsedColumn(), text("gone,"), rich.TimeRemainingColumn(), text("left  {task.fields[note]}")]
    console = Console(file=cast(Any, bar_output()))
    bar = rich.Progress(*columns, console=console, refresh_per_second=4, speed_estimate_period=600)
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


def _silent(amount: int = 1, note: str = "", *, total: int | None = None, before: int = 0) -> None:
    pass
