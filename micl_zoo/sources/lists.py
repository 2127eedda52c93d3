"""List files: the paths, and ids where there are any, that .txt, .csv, .jsonl and the standard input name."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from ..errors import SourceError
from . import remote
from .reader import bare, open_binary

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "uri", "url")  # the first that is there

Targets = Iterator[tuple[str, str]]  # path as it is written, id


def read_list(place: str) -> Targets:
    """The paths of a list and the ids of their images, which are the paths where the list has no `id`.

    Args:
        place: a path or URI that ends in .csv, .jsonl, .ndjson, or else has one path a line.

    Raises:
        SourceError: it is empty, no text, cannot be read, or has no column of paths.
    """
    suffix = bare(place).lower().rpartition(".")[2]
    targets = {"csv": _csv_targets, "jsonl": _json_targets, "ndjson": _json_targets}.get(suffix, _line_targets)
    found = False
    try:
        with _open_text(place) as text:
            for target in targets(place, text):
                found = True
                yield target
    except UnicodeDecodeError as error:
        raise SourceError(f"the list {place!r} is not UTF-8 text: {error}") from None
    except (OSError, csv.Error) as error:
        raise SourceError(f"cannot read the list {place!r}: {error}") from None
    if not found:
        raise SourceError(f"the list {place!r} is empty: one path a line is expected")


def read_standard_input() -> Iterator[str]:
    """Lines as `find` prints them: names may have bytes that are not UTF-8.

    Raises:
        SourceError: there is none.
    """
    found = False
    for line in sys.stdin.buffer:
        if path := os.fsdecode(line).strip():
            found = True
            yield path
    if not found:
        raise SourceError("the standard input is empty: one path a line is expected")


def _open_text(place: str) -> TextIO:
    file = io.BytesIO(remote.read_file(place)) if remote.is_remote(place) else open_binary(place)
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="" if bare(place).lower().endswith(".csv") else None)


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
