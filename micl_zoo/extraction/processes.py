"""Child processes with a pipe to each: started clean, with no thread or lock of this one in them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any, cast

from ..printing import Output

CAN_START = os.name == "posix"  # relies on POSIX file-descriptor inheritance


class Child:
    """A process that runs one function of this package, and the pipe to it."""

    def __init__(self, function: str, *, files: Sequence[int] = ()) -> None:
        """Start "module:name", which takes the file descriptors of its pipe and of open `files` that it inherits."""
        here, there = Pipe()
        module, _, name = function.partition(":")
        numbers = [there.fileno(), *files]
        code = f"from {module} import {name}; {name}({', '.join(map(str, numbers))})"
        # In a session of its own, Ctrl-C on the terminal is not heard, even before it can say that it ignores it.
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=numbers, stdin=subprocess.DEVNULL, start_new_session=True
        )
        there.close()
        self.connection: Connection[Any, Any] = here  # EOFError in receiving means that the process has died

    def send(self, message: Any) -> None:
        """Send a message; if the process has died meanwhile, reading its answers shows it."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def kill(self) -> str:
        """Kill the process, and say what it had died of before."""
        code = self.process.poll()
        if code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self.process.wait(0.2)  # its pipe may close a moment before it has ended
        self.process.kill()
        self.process.wait()
        if code is None:
            return "did not end"
        return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"

    def end(self) -> str:
        """Kill the process, and close the pipe."""
        ended = self.kill()
        self.connection.close()
        return ended


def parent_pipe(number: int) -> Connection[Any, Any]:
    """Open the child's end. Signals sent to all processes at once are left to the parent, which closes the pipe."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    sys.stderr = cast(Any, Output(sys.stderr))
    return Connection(number)


def wait_for_message(pipe: Connection[Any, Any]) -> bool:
    """Wait for a message; False when the parent has died."""
    parent = os.getppid()
    with contextlib.suppress(EOFError, OSError):
        while os.getppid() == parent:
            if pipe.poll(5):
                return True
    return False
