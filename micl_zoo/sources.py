"""Where images are: any source becomes one ImageIndex, and images are read through it in no other way."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple
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
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
PACKED_STARTS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},/]*(?:,[^{},/]*)+))\}")  # {000..009} or {train,val}
OPEN_ARCHIVES = 100  # kept open by a reader: well below 256, the smallest usual limit of a process
PARQUET_CELL = -1  # as a length: the bytes are a parquet cell and `offset` is its row
INDEX_SCHEMA = pa.schema([("id", pa.string()), ("uri", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])

Kind = Literal["image", "parquet", "tar", "packed tar", "list", "other"]
SourceLike = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Entry(NamedTuple):
    """One image: a stable id, and where its bytes are.

    A file is (path, 0, its size); a member of a tar is (tar, where its bytes start, how many); a parquet cell is
    (file, row, PARQUET_CELL). A path that is not UTF-8 is a file:// URI, and its id has the bytes in question as \\xNN.
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
    """Reads the bytes behind entries.

    It keeps one parquet row group at hand, so that index order reads each once, and the last tars open: they are read
    by position, so a process forked from this one may share them.
    """

    def __init__(self) -> None:
        self._archives: dict[str, pa.OSFile] = {}  # the one used last comes last
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
            return self._member(entry) if entry.offset else _path(entry.uri).read_bytes()
        except (OSError, pa.ArrowException) as error:
            raise Refused("unreadable", str(error)) from None

    def _member(self, entry: Entry) -> bytes:
        archive = self._archives.pop(entry.uri, None) or pa.OSFile(os.fsencode(_path(entry.uri)))
        self._archives[entry.uri] = archive
        if len(self._archives) > OPEN_ARCHIVES:
            del self._archives[next(iter(self._archives))]
        data: bytes = archive.read_at(entry.length, entry.offset)
        if len(data) < entry.length:
            raise Refused("unreadable", f"{entry.uri} is shorter than it was when its members were listed")
        return data

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
            (a column of encoded images, as `datasets` writes it), a tar or a folder or glob of them (as WebDataset
            packs images), or a sequence of any of these. A glob may have braces: "train-{0000..0099}.tar".

    Returns:
        The index, in sorted order within each folder and as packed within each tar. Ids are paths relative to the
        folder, `file.parquet#row`, or `archive.tar#member`.

    Raises:
        SourceError: nothing there, nothing in it that can be an image, a folder that cannot be read, a tar that is
            compressed or damaged, or an id twice.
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
            f"the id {twice!r} occurs more than once, and ids name the rows: list no image twice, pack none twice "
            "under one name, and give one folder above several that have the same names in them"
        )
    return ImageIndex(table)


def _list_one(source: str) -> Iterator[pa.Table]:
    path = Path(source)
    if path.is_dir():
        yield _list_folder(path)
    elif path.is_file():
        yield _list_kind(_kind(path), [path], path.parent)
    elif glob.has_magic(source) or BRACES.search(source):
        yield _list_glob(source)
    else:
        raise SourceError(f"no such source: {source!r} is not a file, a folder or a glob that matches anything")


def _kind(path: Path) -> Kind:
    """By its name alone."""
    suffix, name = path.suffix.lower(), path.name.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in LIST_SUFFIXES:
        return "list"
    if name.endswith(PACKED_SUFFIXES):
        return "packed tar"
    return "parquet" if suffix == ".parquet" else "tar" if suffix == ".tar" else "other"


def _list_kind(kind: Kind, paths: Sequence[Path], base: Path) -> pa.Table:
    """Files that are all of one kind. One that is named and of no known kind is read as an image."""
    if kind == "list":
        return pa.concat_tables(_list_file(path) for path in paths)
    if kind == "parquet":
        return _list_parquet(paths, base)
    if kind in ("tar", "packed tar"):
        return _list_tars(paths, base)
    return _list_files(paths, base)


def _list_folder(folder: Path) -> pa.Table:
    found: dict[Kind, list[Path]] = {"image": [], "parquet": [], "tar": [], "packed tar": []}
    others = 0
    for path in _walk(folder):
        kind = _kind(path)
        if kind in found:
            found[kind].append(path)
        others += kind not in found
    for kind, paths in found.items():  # the first kind that is there
        if paths:
            return _list_kind(kind, paths, folder)
    raise SourceError(
        f"no images in {str(folder)!r}: looked in it and below for {_wanted()}, .parquet and .tar, "
        f"found {others} other files"
    )


def _wanted() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))


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
    return _text(os.fsencode(path.relative_to(base).as_posix()))


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


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
    found = set()
    for one in _expand_braces(pattern):
        paths = [Path(match) for match in glob.glob(one, recursive=True) if Path(match).is_file()]  # noqa: PTH207 - absolute patterns
        if not paths:
            part = f", which {pattern!r} asks for," if one != pattern else ""
            raise SourceError(f"the glob {one!r}{part} matches no file")
        found.update(paths)
    paths = sorted(found)
    parts = Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part) or BRACES.search(part)), len(parts) - 1)
    kind = _kind(paths[0])
    return _list_kind("other" if kind == "list" else kind, paths, Path(*parts[:fixed]))


def _expand_braces(pattern: str) -> Iterator[str]:
    """WebDataset's way to name many archives: "{08..10}" stands for 08, 09 and 10, "{train,val}" for either."""
    match = BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, words = match.groups()
    numbers = (str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)) if first else ()
    for choice in words.split(",") if words else numbers:
        yield from _expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


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


def _list_tars(paths: Sequence[Path], base: Path) -> pa.Table:
    tables, others = [], 0
    for path in paths:
        table, rest = _list_tar(path, _name(path, base))
        tables.append(table)
        others += rest
    if not any(map(len, tables)):
        where = repr(str(paths[0])) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        raise SourceError(f"no images in {where}: looked for members ending in {_wanted()}, found {others} others")
    return pa.concat_tables(tables)


def _list_tar(path: Path, name: str) -> tuple[pa.Table, int]:
    """The images in an archive, and the number of other members. Only headers are read."""
    ids, offsets, lengths, others = [], [], [], 0
    for member in _members(path):
        inside = member.name.removeprefix("./")
        if not member.isfile() or not _is_image(inside):
            others += 1
            continue
        if member.issparse():
            raise SourceError(f"{str(path)!r} holds {inside!r} as a sparse file: pack it again without --sparse")
        ids.append(f"{name}#{_text(inside.encode('utf-8', 'surrogateescape'))}")
        offsets.append(member.offset_data)
        lengths.append(member.size)
    columns = [ids, [_uri(path)] * len(ids), offsets, lengths]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, INDEX_SCHEMA, strict=True)]
    return pa.table(arrays, INDEX_SCHEMA), others


def _is_image(member: str) -> bool:
    hidden = any(part[:1] == "." and part not in (".", "..") for part in member.split("/"))
    return not hidden and "." + member.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Every member to the end. An archive that cannot be listed whole is an error, also where its start can."""
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else a kilobyte a member stays in memory
                if member.size < 0:
                    raise tarfile.ReadError(f"the size of {member.name!r} is negative")
                yield member
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        if packer := _packer(path):
            raise SourceError(
                f"{str(path)!r} is compressed with {packer}, so its members cannot be read one by one: unpack it into "
                "a folder, or decompress it to a .tar (images are compressed already)"
            ) from None
        raise SourceError(f"cannot read {str(path)!r} as a tar: {error}. Copy or pack it again.") from None


def _packer(path: Path) -> str | None:
    if not os.access(path, os.R_OK):
        return None
    with path.open("rb") as file:
        start = file.read(6)
    return next((packer for first, packer in PACKED_STARTS.items() if start.startswith(first)), None)


def _check_end(path: Path, offset: int) -> None:
    """`tarfile` ends quietly where a header is damaged, where the file is cut off, and at a first end of several."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"it stops at byte {offset + len(block)} without an end-of-archive mark")
        if any(block):
            raise tarfile.ReadError(f"the header at byte {offset} is damaged")
        while block := file.read(1 << 20):
            if any(block):
                raise tarfile.ReadError(f"more follows its end at byte {offset}, as where archives are joined with cat")


def parquet_row_groups(uri: str) -> list[int]:
    """Rows of each row group of a parquet file of an index."""
    metadata = _open_parquet(_path(uri)).metadata
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


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


def list_source(source, *, chunk_rows=10_000):
    index = index_source(source)
    for start in range(0, len(index), chunk_rows):
        yield index.slice(start, chunk_rows)


class Fingerprint:
    def __init__(self):
        self.digest = hashlib.sha256()

    def update(self, index):
        for entry in index.entries():
            self.digest.update(f"{entry.id}\0{entry.offset}\0{entry.length}\n".encode())

    def hexdigest(self):
        return self.digest.hexdigest()
