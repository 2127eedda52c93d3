"""Text from outside, made safe to show: file names, ledger lines, what files and servers say."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .errors import MiclZooError

READER_GONE = 141  # exit code, as of a program that SIGPIPE ends

# What is no letter for a reader but an order to a terminal or a browser: controls (C0, C1), marks that turn the
# direction of writing or are invisible, breaks of lines, halves of surrogate pairs, private use.
_UNSAFE = re.compile("[^\\x20-\\x7e]")


def printable(text: str, keep: str = "") -> str:
    """Write all that could move a cursor, hide or reorder text as \\xNN or \\uNNNN; letters of `keep` stay."""
    return _UNSAFE.sub(lambda match: _escaped(match[0], keep), text)


def _escaped(letter: str, keep: str) -> str:
    if letter in keep or letter.isprintable():
        return letter
    number = ord(letter)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def json_line(found: Any) -> str:
    """Write JSON on one line: letters as they are, all that is not `printable` by escapes of JSON's own."""
    text = json.dumps(found, ensure_ascii=False)
    return _UNSAFE.sub(lambda match: match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1], text)


class Output:
    """Standard output or error, safe to print anything to: only printable letters and newlines go through as they are.

    The command line prints by nothing else, and so do libraries that it calls. What the stream has no letters for is
    escaped as well. Standard error that cannot be written is given up, as work goes on without it; standard output
    (`results`) ends the program: quietly where its reader has gone, else with a MiclZooError.
    """

    def __init__(self, stream: Any, *, results: bool = False, escape: bool = True) -> None:
        self.stream, self.results, self.escape = stream, results, escape
        self._lost: OSError | None = None  # why it cannot be written any more

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # a way around
            raise AttributeError(name)
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        shown = printable(text, keep="\n") if self.escape else text
        if text.startswith("\r") and self.stream.isatty():  # a bar of huggingface_hub's, which begins its line again
            shown = "\r" + shown[len(printable("\r")) :]
        if shown:
            self._try(self.stream.write, shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write some texts."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Hand on what was written."""
        self._try(self.stream.flush)

    def _try(self, act: Callable[..., object], *words: str) -> None:
        try:
            if self._lost is None:
                act(*words)
        except OSError as error:
            self._lost = error
            with contextlib.suppress(OSError):  # what is left in the buffer must not fail again at the very end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        if self.results and isinstance(self._lost, BrokenPipeError):
            raise SystemExit(READER_GONE)
        if self.results and self._lost:
            raise MiclZooError(f"standard output cannot be written: {self._lost.strerror or self._lost}")


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Make standard output and error safe to print text from outside to; where there is none, nothing is done."""
    with contextlib.ExitStack() as streams:
        if sys.stdout is not None:
            streams.enter_context(contextlib.redirect_stdout(Output(sys.stdout, results=True)))
        if sys.stderr is not None:
            streams.enter_context(contextlib.redirect_stderr(Output(sys.stderr)))
        yield
        if sys.stdout is not None:
            sys.stdout.flush()


def bar_output() -> Output:
    """Standard error for what moves the cursor on purpose: nothing is escaped."""
    stream = sys.stderr
    return Output(stream.stream if isinstance(stream, Output) else stream, escape=False)
