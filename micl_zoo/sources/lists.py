"""Lists of images: the files, and ids if there are any, that .txt, .csv, .jsonl and the standard input name."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from ..errors import SourceError
from . import remote
from .places import File, join, open_binary, suffix_of, to_path

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "uri", "url")  # the first that is there

Targets = Iterator[tuple[str, str]]  # path as it is written, id


def read_list(place: str) -> Iterator[File]:
    """Read the files of a list; their names are the column `id`, or without one the paths.

    Args:
        place: a path or URI whose suffix is one of LISTS.

    Raises:
        SourceError: it is empty, no text, cannot be read, or has no column of paths.
    """
    base = place.rpartition("/")[0] if remote.is_remote(place) else str(Path(place).absolute().parent)
    found = False
    try:
        file = io.BytesIO(remote.read_file(place)) if remote.is_remote(place) else open_binary(place)
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            for path, name in LISTS[suffix_of(place)](place, text):
                found = True
                yield _file(base, path, name)
    except UnicodeDecodeError as error:
        raise SourceError(f"the list {place!r} is not UTF-8 text: {error}") from None
    except (OSError, csv.Error) as error:
        raise SourceError(f"cannot read the list {place!r}: {error}") from None
    if not found:
        raise SourceError(f"the list {place!r} is empty: one path per line is expected")


def read_standard_input() -> Iterator[File]:
    """Read the files that lines as `find` prints them name; they may have bytes that are not UTF-8.

    Raises:
        SourceError: there is none.
    """
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


def _line_targets(place: str, text: TextIO) -> Targets:
    for line in text:
        if path := line.strip():
            yield path, path


def _csv_targets(place: str, text: TextIO) -> Targets:
    lines = csv.DictReader(text)
    columns = lines.fieldnames or []
    column = _path_column(place, columns) if columns else ""
    for row in lines:
        yield _target(place, row, column, lines.line_num)


def _json_targets(place: str, text: TextIO) -> Targets:
    column = ""
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SourceError(f"line {number} of the list {place!r} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise SourceError(f"line {number} of the list {place!r} is no JSON object: {line.strip()[:40]}")
        column = column or _path_column(place, list(row))
        yield _target(place, row, column, number)


def _path_column(place: str, columns: Sequence[str]) -> str:
    for column in PATH_COLUMNS:
        if column in columns:
            return column
    raise SourceError(
        f"the list {place!r} has no column of paths: looked for {', '.join(PATH_COLUMNS)}, found {', '.join(columns)}"
    )


def _target(place: str, row: dict[str, object], column: str, number: int) -> tuple[str, str]:
    path = row.get(column)
    if not isinstance(path, str) or not path:
        raise SourceError(f"line {number} of the list {place!r} has no {column}: {path!r}")
    name = row.get("id", path)
    if not isinstance(name, str | int) or name == "":
        raise SourceError(f"line {number} of the list {place!r} has no id: {name!r}")
    return path, str(name)


LISTS = {
    ".txt": _line_targets,
    ".lst": _line_targets,
    ".csv": _csv_targets,
    ".jsonl": _json_targets,
    ".ndjson": _json_targets,
}
