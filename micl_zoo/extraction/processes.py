"""Processes of our own with a pipe to each: started clean, with no thread or lock of this one in them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

CAN_START = os.name == "posix"  # they inherit open files, which Windows does otherwise


class Child:
    """A process that runs one function of this package, and the pipe to it.

    Attributes:
        connection: to send to it and receive from it; at its end (EOFError) it has died.
        ready: it has said so.
        since: when it was last heard of, or was given work when it had none (monotonic seconds).
    """

    def __init__(self, function: str, *, files: Sequence[int] = ()) -> None:
        """Start it.

        Args:
            function: "module:name" of one that takes the numbers of its pipe and files.
            files: numbers of open files that it inherits.
        """
        here, there = Pipe()
        module, _, name = function.partition(":")
        numbers = [there.fileno(), *files]
        code = f"from {module} import {name}; {name}({', '.join(map(str, numbers))})"
        self.process = subprocess.Popen([sys.executable, "-c", code], pass_fds=numbers, stdin=subprocess.DEVNULL)
        there.close()
        self.connection: Connection[Any, Any] = here
        self.ready = False
        self.since = time.monotonic()

    def send(self, message: Any) -> None:
        """Send; that it has died meanwhile is seen when its answers are read."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def end(self) -> str:
        """Kill it, and say what it had died of before."""
        code = self.process.poll()
        if code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(0.2)  # its pipe may close a moment before it has ended
        self.process.kill()
        self.process.wait()
        self.connection.close()
        if code is None:
            return "did not end"
        return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"


def parent_pipe(number: int) -> Connection[Any, Any]:
    """The child's end. Signals that reach all processes at once are left to the parent, which closes the pipe."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    return Connection(number)


def wait_for_message(pipe: Connection[Any, Any]) -> bool:
    """Wait for one; False when the parent has died."""
    parent = os.getppid()
    try:
        while not pipe.poll(5):
            if os.getppid() != parent:
                return False
    except (EOFError, OSError):
        return False
    return True
