"""Lists of images: the files, and ids if there are any, that .txt, .csv, .jsonl and the standard input name."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ..errors import SourceError
from . import remote
from .places import File, join, open_binary, suffix_of, to_path

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "uri", "url")  # the first that is there

Rows = Iterator[tuple[int, Any]]  # number of a line, and its columns


def _lines(text: TextIO) -> Rows:
    return ((number, {"path": path}) for number, line in enumerate(text, 1) if (path := line.strip()))


def _csv(text: TextIO) -> Rows:
    lines = csv.DictReader(text)
    return ((lines.line_num, row) for row in lines)


def _json(text: TextIO) -> Rows:
    for number, line in enumerate(text, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                yield number, error


LISTS = {".txt": _lines, ".lst": _lines, ".csv": _csv, ".jsonl": _json, ".ndjson": _json}


def read_list(place: str) -> Iterator[File]:
    """Read the files of a list, a place with a suffix of LISTS; their names are its column `id`, or else the paths."""
    base = place.rpartition("/")[0] if remote.is_remote(place) else str(Path(place).absolute().parent)
    column = ""
    try:
        file = io.BytesIO(remote.read_file(place)) if remote.is_remote(place) else open_binary(place)
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            for number, row in LISTS[suffix_of(place)](text):
                line = f"line {number} of the list {place!r}"
                if not isinstance(row, dict):
                    raise SourceError(f"{line} is no JSON object: {str(row)[:60]}")
                column = column or next((name for name in PATH_COLUMNS if name in row), "")
                if not column:
                    looked, had = ", ".join(PATH_COLUMNS), ", ".join(map(str, row))
                    raise SourceError(f"the list {place!r} has no column of paths: looked for {looked}, found {had}")
                path = row.get(column)
                if not isinstance(path, str) or not path:
                    raise SourceError(f"{line} has no {column}: {path!r}")
                name = row.get("id", path)
                if not isinstance(name, str | int) or name == "":
                    raise SourceError(f"{line} has no id: {name!r}")
                yield _file(base, path, str(name))
    except UnicodeDecodeError as error:
        raise SourceError(f"the list {place!r} is not UTF-8 text: {error}") from None
    except (OSError, csv.Error) as error:
        raise SourceError(f"cannot read the list {place!r}: {error}") from None
    if not column:
        raise SourceError(f"the list {place!r} is empty: one path per line is expected")


def read_standard_input() -> Iterator[File]:
    """Read the files that lines as `find` prints them name; they may have bytes that are not UTF-8."""
    base, found = str(Path.cwd()), False
    for line in sys.stdin.buffer:
        if path := os.fsdecode(line).strip():
            found = True
            yield _file(base, path, path)
    if not found:
        raise SourceError("the standard input is empty: one path per line is expected")


def _file(base: str, path: str, name: str) -> File:
    """Find the file that a list means. Remote files are not asked for their sizes: that were a request for each."""
    if path.lower().startswith("file://"):
        path = str(to_path(path))
    elif remote.is_remote(path):
        return File(path, name, 0)
    elif remote.is_remote(base):
        return File(join(base, path.removeprefix("./")), name, 0)
    return File(str(Path(base, path)), name, None)
