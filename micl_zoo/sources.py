"""Where images are: any source becomes one ImageIndex, and images are read through it in no other way."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote_to_bytes, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from .decode import Refused
from .errors import SourceError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
    | {".heic", ".heif"}  # listed even where Pillow cannot read them, so that they are refused by name
)
LIST_SUFFIXES = frozenset({".txt", ".lst"})
PARQUET_CELL = -1  # as a length: the bytes are a parquet cell and `offset` is its row
INDEX_SCHEMA = pa.schema([("id", pa.string()), ("uri", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])

SourceLike = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Entry(NamedTuple):
    """One image: a stable id, and where its bytes are.

    A file is (path, 0, its size); a parquet cell is (file, row, PARQUET_CELL). A path that is not UTF-8 is a file://
    URI, and its id has the bytes in question as \\xNN.
    """

    id: str
    uri: str
    offset: int
    length: int


@dataclass(frozen=True)
class ImageIndex:
    """A columnar list of images, in a fixed order.

    Attributes:
        table: columns id, uri (string), offset, length (int64); a row an image.
    """

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, row: int) -> Entry:
        return Entry(*(column[row].as_py() for column in self.table.columns))

    def slice(self, start: int, length: int) -> ImageIndex:
        """Rows start to start + length."""
        return ImageIndex(self.table.slice(start, length))

    def entries(self) -> Iterator[Entry]:
        """Every row in order."""
        for batch in self.table.to_batches():
            yield from (Entry(*row) for row in zip(*(column.to_pylist() for column in batch.columns), strict=True))

    def fingerprint(self) -> str:
        """Sha256 over ids, offsets and lengths in order: the same wherever the folder has been moved to."""
        digest = hashlib.sha256()
        for entry in self.entries():
            digest.update(f"{entry.id}\0{entry.offset}\0{entry.length}\n".encode())
        return digest.hexdigest()


class Reader:
    """Reads the bytes behind entries; keeps one parquet row group at hand, so that index order reads each once."""

    def __init__(self) -> None:
        self._file: pq.ParquetFile | None = None
        self._uri = ""
        self._first = self._stop = 0
        self._cells: pa.ChunkedArray | None = None

    def read(self, entry: Entry) -> bytes:
        """The encoded image.

        Raises:
            Refused: reason "unreadable", when the file cannot be read.
        """
        try:
            if entry.length == PARQUET_CELL:
                return self._cell(entry.uri, entry.offset)
            with _path(entry.uri).open("rb") as file:
                file.seek(entry.offset)
                return file.read(entry.length if entry.offset else -1)
        except (OSError, pa.ArrowException) as error:
            raise Refused("unreadable", str(error)) from None

    def _cell(self, uri: str, row: int) -> bytes:
        if uri != self._uri or self._file is None:
            self._file, self._uri, self._first, self._stop = _open_parquet(_path(uri)), uri, 0, 0
        if not self._first <= row < self._stop:
            self._load_row_group(self._file, row)
        assert self._cells is not None
        value = self._cells[row - self._first].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise Refused("empty", "the parquet cell is null")
        return bytes(data)

    def _load_row_group(self, file: pq.ParquetFile, row: int) -> None:
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < first + rows:
                column = _image_column(file.schema_arrow, self._uri)
                self._cells = file.read_row_group(group, columns=[column], use_threads=False).column(0)
                self._first, self._stop = first, first + rows
                return
            first += rows
        raise Refused("unreadable", f"row {row} is past the end of {self._uri} ({first} rows)")


def index_source(source: SourceLike) -> ImageIndex:
    """List the images of a source.

    Args:
        source: a folder (recursive; hidden names left out), one image, a glob ("photos/*.jpg"), a list file
            (.txt, one path a line, relative to the list's folder), a parquet file or a folder or glob of them
            (a column of encoded images, as `datasets` writes it), or a sequence of any of these.

    Returns:
        The index, in sorted order within each folder. Ids are paths relative to the folder, or `file.parquet#row`.

    Raises:
        SourceError: nothing there, nothing in it that can be an image, a folder that cannot be read, or an id twice.
    """
    many = [source] if isinstance(source, str | os.PathLike) else list(source)
    tables = [table for one in many for table in _list_one(os.fspath(one))]
    table = pa.concat_tables(tables) if tables else INDEX_SCHEMA.empty_table()
    if not table.num_rows:
        raise SourceError(f"no images given: the source is empty ({many!r})")
    table = table.combine_chunks()
    if len(table["id"].unique()) < len(table):
        counts = table["id"].value_counts().to_pylist()
        twice = next(count["values"] for count in counts if count["counts"] > 1)
        raise SourceError(
            f"the id {twice!r} occurs more than once, and ids name the rows: list no image twice, and give one folder "
            "above several that have the same names in them"
        )
    return ImageIndex(table)


def _list_one(source: str) -> Iterator[pa.Table]:
    path = Path(source)
    if path.is_dir():
        yield _list_folder(path)
    elif path.suffix.lower() == ".parquet" and path.is_file():
        yield _list_parquet([path], path.parent)
    elif path.suffix.lower() in LIST_SUFFIXES and path.is_file():
        yield _list_file(path)
    elif path.is_file():
        yield _list_files([path], path.parent)
    elif glob.has_magic(source):
        yield _list_glob(source)
    else:
        raise SourceError(f"no such source: {source!r} is not a file, a folder or a glob that matches anything")


def _list_folder(folder: Path) -> pa.Table:
    found: dict[str, list[Path]] = {"image": [], "parquet": []}
    others = 0
    for path in _walk(folder):
        suffix = path.suffix.lower()
        kind = "image" if suffix in IMAGE_SUFFIXES else "parquet" if suffix == ".parquet" else None
        if kind:
            found[kind].append(path)
        others += kind is None
    if found["image"]:
        return _list_files(found["image"], folder)
    if found["parquet"]:
        return _list_parquet(found["parquet"], folder)
    wanted = ", ".join(sorted(IMAGE_SUFFIXES))
    raise SourceError(
        f"no images in {str(folder)!r}: looked in it and below for {wanted} and .parquet, found {others} other files"
    )


def _walk(folder: Path) -> Iterator[Path]:
    """Every visible file below the folder, sorted, without following links to folders (they may loop).

    Stores of embeddings below it are left out: the output may lie in the source, and is no part of it.
    """

    def refuse(error: OSError) -> None:
        raise SourceError(f"cannot read the folder {error.filename!r} ({error.strerror}): allow it, or list the others")

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _is_store(Path(root, name)))
        yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))


def _is_store(folder: Path) -> bool:
    """By the files that `store.py` writes before the first part."""
    return (folder / "manifest.json").is_file() and (folder / "index" / "part-00000.parquet").is_file()


def _list_files(paths: Iterable[Path], base: Path) -> pa.Table:
    return _table([Entry(_name(path, base), _uri(path), 0, _size(path)) for path in paths])


def _name(path: Path, base: Path) -> str:
    """Relative to the base, as UTF-8 text: other bytes are written \\xNN."""
    return os.fsencode(path.relative_to(base).as_posix()).decode("utf-8", "backslashreplace")


def _uri(path: Path) -> str:
    """The absolute path, as a file:// URI where it is not UTF-8 text, which is all that an index can hold."""
    text = str(path.absolute())
    try:
        text.encode()
    except UnicodeEncodeError:
        return path.absolute().as_uri()
    return text


def _path(uri: str) -> Path:
    return Path(os.fsdecode(unquote_to_bytes(urlsplit(uri).path)) if uri.startswith("file://") else uri)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # a dangling link: reading it gives the ledger its reason


def _list_file(path: Path) -> pa.Table:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise SourceError(f"the list {str(path)!r} is not UTF-8 text: {error}") from None
    names = [line.strip() for line in lines if line.strip()]
    targets = [path.parent / name for name in names]
    rows = [Entry(name, _uri(target), 0, _size(target)) for name, target in zip(names, targets, strict=True)]
    if not rows:
        raise SourceError(f"the list {str(path)!r} is empty: one path a line is expected")
    return _table(rows)


def _list_glob(pattern: str) -> pa.Table:
    paths = sorted(Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).is_file())  # noqa: PTH207 - absolute patterns
    if not paths:
        raise SourceError(f"the glob {pattern!r} matches no file")
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:fixed])
    if fnmatch.fnmatch(paths[0].name, "*.parquet"):
        return _list_parquet(paths, base)
    return _list_files(paths, base)


def _list_parquet(paths: Sequence[Path], base: Path) -> pa.Table:
    tables = []
    for path in paths:
        try:
            file = _open_parquet(path)
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"cannot read {str(path)!r} as parquet: {error}") from None
        _image_column(file.schema_arrow, str(path))
        rows = file.metadata.num_rows
        name = _name(path, base)
        own = "id" in file.schema_arrow.names
        ids = file.read(["id"]).column(0).cast(pa.string()).to_pylist() if own else [f"{name}#{i}" for i in range(rows)]
        columns = [ids, [_uri(path)] * rows, range(rows), [PARQUET_CELL] * rows]
        tables.append(pa.table([pa.array(c, f.type) for c, f in zip(columns, INDEX_SCHEMA, strict=True)], INDEX_SCHEMA))
    return pa.concat_tables(tables)


def _open_parquet(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(pa.OSFile(os.fsencode(path)))  # as bytes: pyarrow refuses text that is not UTF-8


def _image_column(schema: pa.Schema, uri: str) -> str:
    """The column of encoded images: binary, or a struct with a binary field `bytes` (the layout of `datasets`)."""
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return str(field.name)
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return str(field.name)
    raise SourceError(
        f"{uri!r} has no column of encoded images (binary, or a struct with `bytes`); it has {schema.names}"
    )


def _table(entries: Sequence[Entry]) -> pa.Table:
    columns: list[Sequence[object]] = list(zip(*entries, strict=True)) if entries else [[], [], [], []]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, INDEX_SCHEMA, strict=True)]
    return pa.table(arrays, schema=INDEX_SCHEMA)
