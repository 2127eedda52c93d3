"""The program `micl-zoo`, which `python -m micl_zoo` is as well."""

from __future__ import annotations

import os
import sys

try:
    from .stop import Program
except KeyboardInterrupt:  # so early that nothing else could take it
    sys.exit(130)


def main(words: list[str] | None = None, prog_name: str = "micl-zoo") -> None:
    """Run the command line with `words`, by default those that the program was called with; does not return."""
    with Program():  # before anything that takes time is imported
        _open_standard_files()
        from .cli import main as command

        command.main(words, prog_name=prog_name)


def _open_standard_files() -> None:
    """Open what the caller has closed (`2>&-`) on nothing, lest a file that is opened next get its place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


if __name__ == "__main__":
    main()
