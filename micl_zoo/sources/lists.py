"""Lists of images: the files, and ids if any, that .txt, .csv, .tsv, .json, .jsonl and the standard input name."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ..errors import Refused, SourceError
from . import remote
from .places import File, join, open_binary, read_whole, suffix_of, to_path
from .selection import Selection

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "uri", "url")  # the first that is there
LINE = 16 << 20  # letters of a line, at most
LIST_BYTES = 256 << 20  # of a list that is fetched, or is one piece of JSON

Rows = Iterator[tuple[int, Any]]  # number of a line, and its columns, or what is wrong with it


class _Odd(ValueError):
    """What is wrong with one row of a list."""


def _bounded(text: TextIO) -> Iterator[str]:
    """Yield lines; of one that is far too long the beginning, with a letter that no text has."""
    while line := text.readline(LINE):
        if len(line) == LINE and not line.endswith(("\n", "\r")):
            while (rest := text.readline(LINE)) and not rest.endswith(("\n", "\r")):
                pass
            line = line[:60] + "\0"
        yield line


def _lines(text: TextIO) -> Rows:
    return ((number, {"path": path}) for number, line in enumerate(_bounded(text), 1) if (path := line.strip()))


def _csv(text: TextIO, delimiter: str = ",") -> Rows:
    lines = csv.reader(_bounded(text), delimiter=delimiter)
    header: list[str] | None = None
    while True:
        try:
            row = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            yield lines.line_num, _Odd(str(error))
            continue
        if header is None:
            header = row
            wanted = {name: header.index(name) for name in (*PATH_COLUMNS, "id") if name in header}
            if not wanted.keys() - {"id"}:
                yield 1, dict.fromkeys(row[:1000])
                return
        elif row:
            yield lines.line_num, {name: row[at] if at < len(row) else None for name, at in wanted.items()}


def _tsv(text: TextIO) -> Rows:
    return _csv(text, "\t")


def _json_lines(text: TextIO) -> Rows:
    for number, line in enumerate(_bounded(text), 1):
        if line.endswith("\0"):
            yield number, _Odd(f"is longer than {LINE:,} letters")
        elif line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                deep = isinstance(error, RecursionError)
                yield number, _Odd(f"is no JSON object: {'it is nested too deep' if deep else error}")


def _json(text: TextIO) -> Rows:
    """One piece of JSON: a list, or as in COCO an object with a list `images`; of objects, or of paths."""
    try:
        data = text.read(LIST_BYTES)
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        why = f"it has more than {LIST_BYTES:,} letters" if len(data) == LIST_BYTES else error
        raise SourceError(f"it is no JSON ({why}): one object per line, as .jsonl, has no limit") from None
    rows = found.get("images") if isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise SourceError(
            "it is no list of images: a list of objects with a path is expected, or an object with `images`"
        )
    for number, row in enumerate(rows, 1):
        yield number, {"path": row} if isinstance(row, str) else row


LISTS = {
    **{".txt": _lines, ".lst": _lines, ".csv": _csv, ".tsv": _tsv},
    **{".json": _json, ".jsonl": _json_lines, ".ndjson": _json_lines},
}


def read_list(place: str, selection: Selection) -> Iterator[File]:
    """Read the files of a list, a place with a suffix of LISTS; their names are its column `id`, or else the paths.

    A line that names no file is a problem of the notes.
    """
    base = place.rpartition("/")[0] if remote.is_remote(place) else str(Path(place).absolute().parent)
    name = place.rpartition("/")[2] if remote.is_remote(place) else Path(place).name
    try:
        with _text_of(place) as text:
            for number, file in _read_rows(LISTS[suffix_of(place)](text), base):
                if isinstance(file, _Odd):
                    said = f"line {number} of the list {place!r} {file}"
                    selection.notes.problem(f"{name}#{number}", place, said)
                elif not selection.asked_out(file.name):
                    yield file
    except SourceError as error:
        raise SourceError(f"cannot read the list {place!r}: {error}") from None
    except (OSError, Refused) as error:
        raise SourceError(f"cannot read the list {place!r}: {error}") from None


def _text_of(place: str) -> TextIO:
    """Open a list; bytes that are not UTF-8 become surrogates, so that they spoil their own line alone."""
    there = remote.is_remote(place)
    file: BinaryIO = io.BytesIO(read_whole(place, 0, LIST_BYTES)) if there else open_binary(place)
    start = file.read(2)
    file.seek(0)
    if start in (b"\xff\xfe", b"\xfe\xff"):
        file.close()
        raise SourceError("it is not UTF-8 text but UTF-16, as PowerShell's > writes: save it as UTF-8")
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_rows(rows: Rows, base: str) -> Iterator[tuple[int, File | _Odd]]:
    column, any_row = "", False
    for number, row in rows:
        any_row = True
        if isinstance(row, dict):
            column = column or next((name for name in PATH_COLUMNS if name in row), "")
        try:
            yield number, _file_of(row, column, base)
        except _Odd as error:
            yield number, error
    if not any_row:
        raise SourceError("it is empty: one path per line is expected")


def _file_of(row: Any, column: str, base: str) -> File:
    """Find the file that a row means; _Odd where it means none."""
    if isinstance(row, _Odd):
        raise row
    if not isinstance(row, dict):
        raise _Odd(f"is no JSON object: {str(row)[:60]}")
    if not column:
        looked, had = ", ".join(PATH_COLUMNS), ", ".join(map(str, list(row)[:20]))
        raise _Odd(f"has no column of paths: looked for {looked}, found {had[:1000]}")
    path = row.get(column)
    if not isinstance(path, str) or not path:
        raise _Odd(f"has no {column}: {str(path)[:60] if path else repr(path)}")
    name = row.get("id", path)
    if type(name) not in (str, int) or name == "" or (type(name) is int and abs(name) >> 64):
        raise _Odd(f"has no id: {str(name)[:60]}")
    for text in (path, str(name)):
        if not _is_text(text):
            raise _Odd(f"is not UTF-8 text: {text[:60]!r}")
        if "\0" in text:
            raise _Odd(f"holds what no path has, a NUL, or is too long: {text[:60]!r}")
    try:
        return _file(base, path, str(name))
    except ValueError as error:
        raise _Odd(f"has no path that can be used ({error}): {path[:60]!r}") from None


def _is_text(text: str) -> bool:
    with contextlib.suppress(UnicodeEncodeError):
        text.encode()
        return True
    return False


def read_standard_input(selection: Selection) -> Iterator[File]:
    """Read the files that lines as `find` prints them name; they may have bytes that are not UTF-8."""
    base, found = str(Path.cwd()), False
    if sys.stdin is None:
        raise SourceError("the standard input is closed: one path per line is expected")
    lines: Iterable[bytes] = iter(lambda: sys.stdin.buffer.readline(LINE), b"")
    for number, line in enumerate(lines, 1):
        if path := os.fsdecode(line).strip():
            found = True
            if "\0" in path or len(path) >= LINE:
                said = (
                    f"line {number} of the standard input holds what no path has, a NUL, or is too long: {path[:60]!r}"
                )
                selection.notes.problem(f"-#{number}", "-", f"{said}. Of find, take -print, not -print0.")
            elif not selection.asked_out(path):
                yield _file(base, path, path)
    if not found:
        raise SourceError("the standard input is empty: one path per line is expected")


def _file(base: str, path: str, name: str) -> File:
    """Find the file that a list means. Remote files are not asked for their sizes: that were a request for each."""
    if path.lower().startswith("file://"):
        path = str(to_path(path))
        if "\0" in path:
            raise ValueError("it holds a NUL")
    elif remote.is_remote(path):
        return File(path, name, 0)
    elif remote.is_remote(base):
        return File(join(base, path.removeprefix("./")), name, 0)
    return File(str(Path(base, path)), name, None)
