"""Lists of images: the files, and ids if any, that .txt, .csv, .tsv, .json, .jsonl and the standard input name."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ..errors import Refused, SourceError
from ..files import to_path
from . import remote
from .places import File, join, open_binary, read_whole, split, suffix_of
from .selection import Selection

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path", "uri", "url")  # the first that is there
LINE = 16 << 20  # letters of a line, at most
LIST_BYTES = 256 << 20  # of a list that is fetched, or is one piece of JSON

Rows = Iterator[tuple[int, Any]]  # number of a line, and its columns, or what is wrong with it


class Odd(ValueError):
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
    lines = (line.removesuffix("\n").removesuffix("\r") for line in _bounded(text))
    return ((number, {"path": line}) for number, line in enumerate(lines, 1) if line.strip())


class _Lines(Iterator[str]):
    """The lines of a table. Those of a row that is none are read again, each as the beginning of another."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.lines, self.again, self.number = lines, deque[str](), 0  # number of the lines that were taken
        self.row: list[str] = []  # lines of the row that is being read

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else next(self.lines)
        self.row.append(line)
        self.number += 1
        return line

    def back(self) -> str:
        """Keep the first line of the row alone."""
        first, *rest = self.row
        self.again.extendleft(reversed(rest))
        self.number -= len(rest)
        return first


def table_rows(text: TextIO, delimiter: str) -> Iterator[tuple[int, list[str] | Odd]]:
    """Read the rows of a table with their lines. A quote that does not end costs its own line and no others.

    In a .tsv a quote is a letter like any other, unless it is around a whole cell.
    """
    lines, columns = _Lines(_bounded(text)), 0
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.row, row, why = [], list[str](), ""
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            why = f"is no row ({error})"
        alone = delimiter == "\t" and all(line.count(delimiter) + 1 == columns for line in lines.row)
        if why or (len(lines.row) > 1 and alone):
            line = lines.back()
            with contextlib.suppress(csv.Error):  # a cell that is too large
                row = _row_alone(line, delimiter)
            why = "" if row else why
        columns = columns or len(row)
        yield lines.number, Odd(why) if why else row


def _row_alone(line: str, delimiter: str) -> list[str]:
    """Read a line with quotes that are none to the letter, as of one written \\"; without a cell that does not end."""
    if delimiter == "\t":
        return [_unquoted(cell) for cell in line.rstrip("\r\n").split(delimiter)]
    rows = csv.reader([line, ""], delimiter=delimiter)
    row = next(rows)
    return row[:-1] if rows.line_num > 1 else row


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def _csv(text: TextIO, delimiter: str = ",") -> Rows:
    wanted, any_row = dict[str, int](), False
    for number, row in table_rows(text, delimiter):
        if isinstance(row, Odd):
            any_row = True
            yield number, row
        elif not wanted:
            column = next((name for name in PATH_COLUMNS if name in row), "")
            if twice := [name for name in (column, "id") if row.count(name) > 1]:
                raise SourceError(f"its header has {twice[0]!r} {row.count(twice[0])} times")
            if not column:
                yield 1, dict.fromkeys(row[:1000])
                return
            wanted = {name: row.index(name) for name in (*PATH_COLUMNS, "id") if name in row}
        elif row:
            any_row = True
            yield number, {name: row[at] if at < len(row) else None for name, at in wanted.items()}
    if wanted and not any_row:
        raise SourceError("it has a header and no row")


def _tsv(text: TextIO) -> Rows:
    return _csv(text, "\t")


def _json_lines(text: TextIO) -> Rows:
    for number, line in enumerate(_bounded(text), 1):
        if line.endswith("\0"):
            yield number, Odd(f"is longer than {LINE:,} letters")
        elif line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                deep = isinstance(error, RecursionError)
                yield number, Odd(f"is no JSON object: {'it is nested too deep' if deep else error}")


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
    base, name = split(place)
    try:
        with _text_of(place) as text:
            for number, file in _read_rows(LISTS[suffix_of(place)](text), base):
                if isinstance(file, Odd):
                    said = f"line {number} of the list {place!r} {file}"
                    selection.notes.problem(f"{name}#{number}", place, said)
                elif not _out(file, base, selection):
                    yield file
    except SourceError as error:
        raise SourceError(f"cannot read the list {place!r}: {error}") from None
    except (OSError, Refused) as error:
        raise SourceError(f"cannot read the list {place!r}: {error}") from None


def _text_of(place: str) -> TextIO:
    """Open a list; bytes that are not UTF-8 become surrogates, so that they spoil their own line alone."""
    there = remote.is_remote(place)
    file: BinaryIO = io.BytesIO(read_whole(place, 0, LIST_BYTES)) if there else open_binary(place)
    start = file.read(4)
    file.seek(0)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or start == b"\0\0\xfe\xff":
        file.close()
        wide = b"\0\0" in start
        raise SourceError(
            f"it is not UTF-8 text but UTF-{'32' if wide else '16, as PowerShell writes by >'}: save it as UTF-8"
        )
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_rows(rows: Rows, base: str) -> Iterator[tuple[int, File | Odd]]:
    column, any_row = "", False
    for number, row in rows:
        any_row = True
        if isinstance(row, dict):
            column = column or next((name for name in PATH_COLUMNS if name in row), "")
        try:
            yield number, _file_of(row, column, base)
        except Odd as error:
            yield number, error
    if not any_row:
        raise SourceError("it is empty: one path per line is expected")


def _file_of(row: Any, column: str, base: str) -> File:
    """Find the file that a row means; Odd where it means none."""
    if isinstance(row, Odd):
        raise row
    if not isinstance(row, dict):
        raise Odd(f"is no JSON object: {str(row)[:60]}")
    if not column:
        looked, had = ", ".join(PATH_COLUMNS), ", ".join(map(str, list(row)[:20]))
        raise Odd(f"has no column of paths: looked for {looked}, found {had[:1000]}")
    path = row.get(column)
    path = _trimmed(base, path) if isinstance(path, str) else path
    if not isinstance(path, str) or not path:
        raise Odd(f"has no {column}: {str(path)[:60] if path else repr(path)}")
    name = row.get("id", path)
    if type(name) not in (str, int) or name == "" or (type(name) is int and abs(name) >> 64):
        raise Odd(f"has no id: {str(name)[:60]}")
    for text in (path, str(name)):
        if not _is_text(text):
            raise Odd(f"is not UTF-8 text: {text[:60]!r}")
        if "\0" in text:
            raise Odd(f"holds what no path has, a NUL, or is too long: {text[:60]!r}")
    try:
        return _file(base, path, str(name))
    except ValueError as error:
        raise Odd(f"has no path that can be used ({error}): {path[:60]!r}") from None


def _trimmed(base: str, path: str) -> str:
    """Drop blanks at the ends of a path, unless there is a file of that very name."""
    bare = path.strip()
    return path if bare != path and os.path.lexists(Path(base, path)) else bare


def _out(file: File, base: str, selection: Selection) -> bool:
    """Tell whether a file is excluded, by its id or its path below the list's folder; count it if so."""
    inside = file.place.removeprefix(join(base, "")).replace(os.sep, "/")
    return selection.asked_out(inside, inside if "://" in file.name or Path(file.name).is_absolute() else file.name)


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
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        path = os.fsdecode(line).removesuffix("\n").removesuffix("\r")
        if path := _trimmed(base, path):
            found = True
            if "\0" in path or len(path) >= LINE:
                said = (
                    f"line {number} of the standard input holds what no path has, a NUL, or is too long: {path[:60]!r}"
                )
                selection.notes.problem(f"-#{number}", "-", f"{said}. Of find, take -print, not -print0.")
            elif not _out(file := _file(base, path, path), base, selection):
                yield file
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
