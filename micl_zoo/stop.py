"""Stopping on Ctrl-C, SIGTERM and SIGHUP: long work at the next safe point, a program at any moment, without noise."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


def _signals() -> list[int]:
    """What tells a program to end; under nohup, a terminal that is closed does not."""
    hangup = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # Windows has none
    return [signal.SIGINT, signal.SIGTERM, *(one for one in hangup if signal.getsignal(one) is not signal.SIG_IGN)]


class StopRequest:
    """Notes SIGTERM (a pre-emption), SIGHUP and the first Ctrl-C, so that a loop can stop between two steps."""

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self.signal: int | None = None  # which one came
        self._wake = wake  # called by the signal handler, for a loop that waits; it must not take a lock
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """True once it is time to stop."""
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._note) for number in _signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        before = self._before[signal.SIGINT]
        if isinstance(before, Program):
            before.told = number
        signal.signal(signal.SIGINT, before)  # a second Ctrl-C does not wait for the step
        self._wake()


class Program:
    """A program that ends on a signal with exit code 128 + its number, wherever it is, and leaves no traceback.

    The first signal unwinds it, so that half-written files are removed; but not in the middle of an import, where C
    code makes any other error of that. A second one ends it where it is. An instance is the handler of the signals.
    """

    def __init__(self) -> None:
        self.told = 0  # the signal that came, or that a StopRequest has noted
        self._unwinding = self._over = False
        self._process, self._before = os.getpid(), dict[int, Any]()

    def __enter__(self) -> Program:
        first = not isinstance(signal.getsignal(signal.SIGINT), Program)
        if first and threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self) for number in _signals()}
            sys.unraisablehook, threading.excepthook = self._unraisable, self._in_thread
            for number in self._before:  # once all is done, while the interpreter takes itself apart
                atexit.register(signal.signal, number, signal.SIG_IGN)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._over = True  # from here on, to the very end of the interpreter
        if self._unwinding or (self.told and kind is not SystemExit):
            with contextlib.suppress(Exception):
                print(f"Error: stopped by {signal.Signals(self.told).name}", file=sys.stderr, flush=True)
            os._exit(128 + self.told)  # not by way of threads that would be waited for
        if kind is None and self._before:  # a caller goes on
            sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.told or self._over or os.getpid() != self._process or _importing(frame):
            _show_cursor()
            os._exit(128 + number)
        self.told, self._unwinding = number, True
        raise SystemExit(128 + number)  # which libraries do not take for an error

    def _unraisable(self, found: sys.UnraisableHookArgs) -> None:
        """End the program where the signal was swallowed, as in a destructor; what breaks besides is no news."""
        if self._unwinding and isinstance(found.exc_value, SystemExit):
            os._exit(128 + self.told)
        if not self.told:
            sys.__unraisablehook__(found)

    def _in_thread(self, found: threading.ExceptHookArgs) -> None:
        if not self.told:
            threading.__excepthook__(found)


def _importing(frame: FrameType | None) -> bool:
    """Whether an import is under way."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _show_cursor() -> None:
    """Undo what a progress bar does to the terminal."""
    with contextlib.suppress(OSError):
        if os.isatty(2):
            os.write(2, b"\x1b[?25h")
