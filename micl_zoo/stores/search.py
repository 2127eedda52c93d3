"""The images of a store that are nearest to an image: exact, the same answer every time, a part in memory at a time."""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..errors import Refused, UsageError
from ..files import atomic_path
from ..images.decode import decode
from ..progress import progress
from ..sources.listing import Entry, Reader
from .reembed import store_encoder
from .store import Store
from .verify import only

ImageFile = str | os.PathLike[str] | bytes
PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


class Hit(NamedTuple):
    """One image that was found.

    Attributes:
        rank: 1 for the nearest.
        cosine: of its row and the query, in double precision.
        id: of the image.
        uri, kind, offset, length: where its bytes are, see `micl_zoo.sources.Entry`.
    """

    rank: int
    cosine: float
    id: str
    uri: str
    kind: str
    offset: int
    length: int

    @property
    def entry(self) -> Entry:
        """For `Reader.read`."""
        return Entry(self.id, self.uri, self.kind, self.offset, self.length)


class _Found(NamedTuple):
    cosine: float
    shard: int
    id: str


class _Query(NamedTuple):
    """What is searched for, as the picture shows it: a label and the encoded image, or the refusal."""

    label: str
    data: bytes | Refused


def search(
    store: Store,
    images: ImageFile | Iterable[ImageFile] = (),
    k: int = 10,
    *,
    ids: Sequence[str] = (),
    weights: str | os.PathLike[str] | None = None,
    device: str = "auto",
    exact: bool = False,
    picture: str | os.PathLike[str] | None = None,
) -> list[list[Hit]]:
    """Find the k rows of a store with the largest cosine to each image.

    The cosines are those of double precision, and rows of equal cosine come in index order, so the answer is the same
    everywhere. Of a store that is still being written, the finished parts are searched.

    Args:
        store: see `open_store`.
        images: files or encoded bytes, embedded with the store's encoder at its settings; one or many.
        k: hits for each, fewer where the store has fewer rows.
        ids: rows of the store to search for, too; they need no encoder, and a row does not find itself.
        weights: where the store's weights are not published: their file or folder.
        device: see `load`.
        exact: leave faiss out, where it is installed. The hits are the same with it.
        picture: a file to write: a contact sheet, .png, .jpg or .webp.

    Returns:
        A list of hits for each image, then for each id.

    Raises:
        UsageError: an image that cannot be read, an id that has no row, a store of patch tokens.
        WeightsError: see `store_encoder`.
        StoreError: a part is damaged.
    """
    many = [images] if isinstance(images, str | bytes | os.PathLike) else list(images)
    _check(store, k, len(many) + len(ids), picture)
    store = only(store, store.done())
    data = [_read(image, place) for place, image in enumerate(many)]
    rows = _embedded(store, many, data, weights, device)
    own = _located(store, ids)
    rows += [store.rows(shard).embeddings[row].astype(np.float64) for shard, row in own]
    found = _nearest(store, np.stack(rows), k + bool(ids), None if exact else _faiss())
    for place, name in enumerate(ids, len(many)):
        found[place] = [hit for hit in found[place] if hit.id != name]
    hits = _placed(store, [line[:k] for line in found])
    if picture is not None:
        queries = [_Query(_label(image), one) for image, one in zip(many, data, strict=True)]
        entries = _entries(store, [(shard, name) for (shard, _), name in zip(own, ids, strict=True)])
        queries += [_Query(entry.id, _source(Reader(), entry)) for entry in entries]
        _write_picture(_contact_sheet(queries, hits), Path(picture))
    return hits


def _check(store: Store, k: int, queries: int, picture: str | os.PathLike[str] | None) -> None:
    if k < 1 or not queries:
        raise UsageError(f"search needs k of at least 1 and an image or an id, got k={k} and {queries} to search for")
    if len(store.manifest.shape) > 1:
        raise UsageError(
            f"{str(store.folder)!r} holds all patch tokens of each image (pool {store.manifest.pool!r}), and "
            "search compares one vector an image: extract once more with --pool cls, mean or cls+mean"
        )
    if picture is not None and Path(picture).suffix.lower() not in PICTURE_FORMATS:
        raise UsageError(f"a picture's name ends in {', '.join(PICTURE_FORMATS)}; got {os.fspath(picture)!r}")


def _label(image: ImageFile) -> str:
    return f"{len(image):,} bytes" if isinstance(image, bytes) else Path(image).name


def _read(image: ImageFile, place: int) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise UsageError(f"image {place} ({os.fspath(image)!r}) cannot be read: {error.strerror or error}") from None


def _embedded(
    store: Store,
    images: Sequence[ImageFile],
    data: Sequence[bytes],
    weights: str | os.PathLike[str] | None,
    device: str,
) -> list[np.ndarray]:
    """A (dim,) float64 row for each image; without images no encoder is loaded."""
    if not images:
        return []
    encoder = store_encoder(store, weights, device)
    pixels = []
    for place, (image, one) in enumerate(zip(images, data, strict=True)):
        try:
            pixels.append(encoder.pixels(one))
        except Refused as refused:
            raise UsageError(f"image {place} ({_label(image)}): {refused.detail} [{refused.reason}]") from None
    return [row.astype(np.float64) for one in pixels for row in encoder.rows([one])]  # alone: the same in any company


def _located(store: Store, ids: Sequence[str]) -> list[tuple[int, int]]:
    """(shard, row within its part) of each id; only the id columns are read."""
    places: dict[str, tuple[int, int]] = {}
    wanted = set(ids)
    for shard in store.done():
        if len(places) == len(wanted):
            break
        names = only(store, [shard]).ids
        places |= {name: (shard, row) for row, name in enumerate(names) if name in wanted}
    for name in ids:
        if name not in places:
            line = next((row for row in store.refused() if row.id == name), None)
            why = (
                f"it could not be embedded: {line.detail} [{line.reason}]"
                if line
                else "ids are as `store.ids` has them"
            )
            raise UsageError(f"no row of {str(store.folder)!r} has the id {name!r}; {why}")
    return [places[name] for name in ids]


def _faiss() -> Any:
    """The module, or None where it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def _nearest(store: Store, queries: np.ndarray, k: int, faiss: Any) -> list[list[_Found]]:
    """The k best of all rows for each of (Q, dim) float64 queries: float32 proposes, float64 decides."""
    queries = queries / _lengths(queries)[:, None]
    coarse = queries.astype(np.float32)
    best: list[list[_Found]] = [[] for _ in queries]
    shards = store.done()
    with progress("searching", len(shards), unit="parts") as tick:
        for shard in shards:
            ids, rows, _ = store.rows(shard)
            single = rows.astype(np.float32)
            single /= _lengths(single)[:, None]
            np.nan_to_num(single, copy=False)
            floors = np.array([line[-1].cosine if len(line) == k else -np.inf for line in best], np.float32)
            for place, near in enumerate(_candidates(single, coarse, k, floors, faiss)):
                cosines = _cosines(rows[near], queries[place])
                new = [
                    _Found(float(cosines[at]), shard, ids[near[at]]) for at in np.argsort(-cosines, kind="stable")[:k]
                ]
                best[place] = sorted(best[place] + new, key=lambda hit: -hit.cosine)[:k]  # stable: ties in index order
            tick()
    return best


def _candidates(rows: np.ndarray, queries: np.ndarray, k: int, floors: np.ndarray, faiss: Any) -> list[np.ndarray]:
    """For each query the rows, ascending, that can be among its k best.

    Args:
        rows: (n, D) float32, unit length.
        queries: (Q, D) float32, unit length.
        k: hits wanted.
        floors: (Q,) the k-th best cosine so far, -inf where there are fewer than k.
        faiss: the module, or None for NumPy.
    """
    # In float32 the product is off by D 2^-24 at most, whatever the order of its sum, the lengths by as much again, the
    # rounding of either side by a few 2^-24; and two such numbers are compared.
    slack = (2 * rows.shape[1] + 8) * 2.0**-23
    no_floor = len(rows) > k and bool(np.isinf(floors).any())
    if faiss is None:
        scores = queries @ rows.T  # (Q, n)
        floors = np.maximum(floors, np.partition(scores, -k)[:, -k]) if no_floor else floors
        return [np.flatnonzero(line >= floor) for line, floor in zip(scores, floors - slack, strict=True)]
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    floors = np.maximum(floors, index.search(queries, k)[0][:, -1]) if no_floor else floors
    ranges = (index.range_search(query[None], floor) for query, floor in zip(queries, floors - slack, strict=True))
    return [np.sort(found) for _, _, found in ranges]


def _lengths(rows: np.ndarray) -> np.ndarray:
    """(n,), and 1 where a row is all zeros, whose cosine then is 0."""
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return np.where(lengths > 0, lengths, 1)


def _cosines(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """(n,) float64 of (n, D) and a unit (D,): row by row, so that equal rows have equal cosines wherever they are."""
    double = rows.astype(np.float64)
    lengths = np.sqrt((double * double).sum(1))
    return np.nan_to_num((double * query).sum(1) / np.where(lengths > 0, lengths, 1))


def _entries(store: Store, wanted: Sequence[tuple[int, str]]) -> list[Entry]:
    """Where the images are, of (shard, id) pairs; each shard of the index is read once."""
    found: dict[tuple[int, str], Entry] = {}
    for shard, group in itertools.groupby(sorted(set(wanted)), lambda pair: pair[0]):
        index = store.shard(shard)
        kept = index.table.filter(pc.is_in(index.table["id"], value_set=pa.array([name for _, name in group])))
        found |= {(shard, entry.id): entry for entry in type(index)(kept).entries()}
    return [found[pair] for pair in wanted]


def _placed(store: Store, found: Sequence[Sequence[_Found]]) -> list[list[Hit]]:
    entries = iter(_entries(store, [(hit.shard, hit.id) for line in found for hit in line]))
    return [[Hit(rank, hit.cosine, *next(entries)) for rank, hit in enumerate(line, 1)] for line in found]


# The contact sheet: lengths in pixels, and the most hits of a line.
TILE, QUERY_TILE, GAP, COLUMNS = 168, 224, 16, 6
LINE, LABEL_LINES = 17, 3  # under a tile: rank and cosine, and two lines of the id
PAPER, MOUNT, GREY, INK, SOFT, RULE = "#ffffff", "#f3f3f1", "#c9c9c5", "#1c1c1a", "#6a6a66", "#dcdcd8"


def _source(reader: Reader, entry: Entry) -> bytes | Refused:
    try:
        return reader.read(entry)
    except Refused as refused:
        return refused


def _contact_sheet(queries: Sequence[_Query], hits: Sequence[Sequence[Hit]]) -> Image.Image:
    """Each query at left, what it found at right, on lines of equal length; as many bands as queries."""
    cell = TILE + LINE * LABEL_LINES + GAP
    most = max(1, *map(len, hits))
    columns = math.ceil(most / math.ceil(most / COLUMNS))
    lines = [max(1, math.ceil(len(line) / columns)) for line in hits]
    heights = [max(QUERY_TILE + LINE * LABEL_LINES + GAP, count * cell) + GAP for count in lines]
    width = GAP + QUERY_TILE + 2 * GAP + columns * (TILE + GAP)
    sheet = Image.new("RGB", (width, sum(heights)), PAPER)
    draw, reader, top = ImageDraw.Draw(sheet), Reader(), 0
    for query, line, height in zip(queries, hits, heights, strict=True):
        if top:
            draw.line((GAP, top, width - GAP, top), RULE)
        _draw_tile(sheet, (GAP, top + GAP), QUERY_TILE, query.data, "query", query.label)
        for place, hit in enumerate(line):
            row, column = divmod(place, columns)
            corner = (QUERY_TILE + 3 * GAP + column * (TILE + GAP), top + GAP + row * cell)
            _draw_tile(sheet, corner, TILE, _source(reader, hit.entry), f"{hit.rank}   {hit.cosine:.4f}", hit.id)
        top += height
    return sheet


def _draw_tile(
    sheet: Image.Image, corner: tuple[int, int], side: int, data: bytes | Refused, head: str, name: str
) -> None:
    """One image in its square, with two labels under it."""
    draw, (left, top) = ImageDraw.Draw(sheet), corner
    bold, font = ImageFont.load_default(15), ImageFont.load_default(13)
    try:
        if isinstance(data, Refused):
            raise data
        image = ImageOps.contain(decode(data), (side, side), Image.Resampling.LANCZOS)
        draw.rectangle((left, top, left + side - 1, top + side - 1), MOUNT)
        sheet.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
    except Refused as refused:
        what = "source is gone" if refused.reason == "unreadable" else refused.reason.replace("_", " ")
        draw.rectangle((left, top, left + side - 1, top + side - 1), GREY)
        draw.text((left + side / 2, top + side / 2), what, INK, font, "mm")
    draw.text((left, top + side + 4), head, INK, bold)
    for number, text in enumerate(_fitted(printable(name), font, side), 1):
        draw.text((left, top + side + 5 + number * LINE), text, SOFT, font)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text on LABEL_LINES - 1 lines of `width` pixels; of a longer one its end, too, which tells files apart."""
    lines: list[str] = []
    while text and len(lines) < LABEL_LINES - 1:
        fits = next((cut for cut in range(len(text), 1, -1) if font.getlength(text[:cut]) <= width), 1)
        if len(lines) == LABEL_LINES - 2 and fits < len(text):
            start = next((i for i in range(len(text)) if font.getlength("..." + text[i:]) <= width), len(text) - 1)
            return [*lines, "..." + text[start:]]
        lines.append(text[:fits])
        text = text[fits:]
    return lines


def printable(text: str) -> str:
    """An id as one line for people: what would move the cursor or the terminal becomes a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _write_picture(sheet: Image.Image, out: Path) -> None:
    encoded = io.BytesIO()
    sheet.save(encoded, PICTURE_FORMATS[out.suffix.lower()])
    with atomic_path(out) as temporary:
        temporary.write_bytes(encoded.getvalue())
