"""Child processes with a pipe to each: started clean, with no thread or lock of this one in them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, cast

from ..printing import Output

CAN_START = os.name == "posix"  # relies on POSIX file-descriptor inheritance
# Code before what imports this package: it lies where the parent has it, be that a checkout that is not installed.
FIND_PACKAGE = f"sys.path.append({str(Path(__file__).resolve().parents[2])!r})"


def python(code: str, *words: str, flags: Sequence[str] = ()) -> list[str]:
    """Write the command line of a process that runs `code`, with `words` in sys.argv, on this interpreter's modules.

    No module comes from the folder in which the user happens to be, which may be a download: Python itself looks there
    first, for `-c` and `-m` alike. Start it in the `child_environment`.
    """
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    same = [word for name, word in (("ignore_environment", "-E"), ("no_user_site", "-s")) if getattr(sys.flags, name)]
    clean = "import sys; sys.path[:] = filter(None, sys.path)"
    return [sys.executable, *safe, *same, *flags, "-c", f"{clean}; {code}", *words]


def child_environment() -> dict[str, str]:
    """Return this process's environment, but of PYTHONPATH what is absolute: the rest means the current folder, too."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(os.path.isabs, paths))}


class Child:
    """A process that runs one function of this package, and the pipe to it."""

    def __init__(self, function: str, *, files: Sequence[int] = ()) -> None:
        """Start "module:name", which takes the file descriptors of its pipe and of open `files` that it inherits."""
        here, there = Pipe()
        module, _, name = function.partition(":")
        numbers = [there.fileno(), *files]
        code = f"{FIND_PACKAGE}; from {module} import {name}; {name}({', '.join(map(str, numbers))})"
        # In a session of its own, Ctrl-C on the terminal is not heard, even before it can say that it ignores it.
        how: dict[str, Any] = {"env": child_environment(), "stdin": subprocess.DEVNULL, "start_new_session": True}
        self.process = subprocess.Popen(python(code), pass_fds=numbers, **how)
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
