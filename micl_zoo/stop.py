"""Graceful shutdown: SIGTERM and the first Ctrl-C set a flag that is checked at safe points."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class StopRequest:
    """Notes SIGTERM (a pre-emption) and the first Ctrl-C, so that a loop can stop between two steps."""

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
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait for the step
        self._wake()
