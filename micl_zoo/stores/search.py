"""Nearest images of a store: exact, the same answer everywhere, with one part in memory at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ..encoders.device import Device
from ..encoders.text import TextEncoder, Tower, check_pair, check_texts, find_tower, load_text
from ..errors import Refused, StoreError, UsageError
from ..files import local_path
from ..progress import progress
from ..schema import Between, checked
from ..sources.index import Entry, ImageIndex
from .contact_sheet import PICTURE_FORMATS, Tile, write_contact_sheet
from .originals import Originals
from .parts import ID
from .reembed import LoadedEncoder, check_loaded, store_encoder
from .store import Store, open_store, part_name

if TYPE_CHECKING:  # it imports torch, which a search for ids does without
    from ..encoders.inputs import ImageLike
else:
    ImageLike = Any
logger = getLogger(__name__)
BLOCK = 1024  # queries per matrix product: with a part of 10,000 rows, 41 MB of cosines


class Hit(NamedTuple):
    """One image that was found."""

    rank: int  # 1 for the nearest
    cosine: float  # of its row and the query, in double precision
    id: str  # this and the rest: the fields of its Entry
    uri: str
    kind: str
    offset: int
    length: int

    @property
    def entry(self) -> Entry:
        """The image, for `Reader.read`."""
        return Entry(*self[2:])


class _Found(NamedTuple):
    cosine: float
    shard: int
    id: str


@checked
def search(
    store: Store | str | os.PathLike[str],
    images: ImageLike | Iterable[ImageLike] = (),
    k: Annotated[int, Between(1)] = 10,
    *,
    ids: Iterable[str] = (),
    texts: str | Iterable[str] = (),
    text_weights: str | os.PathLike[str] | TextEncoder | None = None,
    weights: str | os.PathLike[str] | None = None,
    encoder: LoadedEncoder | None = None,
    device: Device = "auto",
    exact: bool = True,
    picture: str | os.PathLike[str] | None = None,
    remote: bool = False,
) -> list[list[Hit]]:
    """Find the k rows of a store with the largest cosine to each image, text or id.

    The cosines are those of double precision, and rows of equal cosine come in index order, so the answer is the same
    everywhere. Of a store that is still being written, the finished parts are searched.

    Args:
        store: see `open_store`.
        images: one or many images, as `Encoder.embed` takes them, embedded with the store's encoder at its settings.
        k: hits per image, fewer where the store has fewer rows.
        ids: rows of the store to search for, too; they need no encoder, and a row does not find itself.
        texts: one or many texts to search for, taken as they are; the store is one of CLIP, SigLIP or PE.
        text_weights: file or folder with the weights of the text tower, or what `text_encoder` gave; None is the hub.
        weights: file or folder of the store's weights, where they are not published.
        encoder: the store's, loaded already, in the place of weights and device.
        device: see `load`.
        exact: without effect, every search is exact.
        picture: contact sheet to write: .png, .jpg or .webp.
        remote: draw images of all servers that the index names, too, and not only of the one that the store is at.

    Returns:
        A list of hits for each image, then for each text, then for each id.

    Raises:
        UsageError: an image that cannot be read, an id that has no row, a store of patch tokens; see `text_encoder`.
        WeightsError: see `store_encoder` and `text_encoder`.
        StoreError: a part is damaged.
    """
    check_loaded(encoder)
    store = open_store(store)
    many, ids, texts = _many(images), list(ids), [texts] if isinstance(texts, str) else list(texts)
    _check(store, many, ids, texts)
    out = None if picture is None else _picture(picture)
    store = store.snapshot()
    spoken = _spoken(store, texts, text_weights) if texts else []
    data, rows = _embedded(many, store, weights, str(device), encoder) if many else ([], [])
    own = _own(store, ids)
    found = _nearest(store, np.stack([*rows, *spoken, *(own[name][1] for name in ids)]), k + bool(ids))
    for place, name in enumerate(ids, len(many) + len(texts)):
        found[place] = [hit for hit in found[place] if hit.id != name]
    found = [line[:k] for line in found]
    wanted = {(hit.shard, hit.id) for line in found for hit in line} | {(own[i][0], i) for i in ids if picture}
    entries = _entries(store, wanted)
    hits = [[Hit(rank, one.cosine, *entries[one.shard, one.id]) for rank, one in enumerate(line, 1)] for line in found]
    if out is not None:
        queries = [Tile("query", _label(image), one) for image, one in zip(many, data, strict=True)]
        queries += [Tile("query", "", text) for text in texts]
        queries += [Tile("query", name, entries[own[name][0], name]) for name in ids]
        _draw(out, queries, hits, Originals(store, remote=remote))
    return hits


def _draw(out: Path, queries: Sequence[Tile], hits: Sequence[Sequence[Hit]], originals: Originals) -> None:
    tiles = [[Tile(f"{hit.rank}   {hit.cosine:.4f}", hit.id, hit.entry) for hit in line] for line in hits]
    write_contact_sheet(out, list(zip(queries, tiles, strict=True)), originals.read)
    if unasked := originals.unasked():
        logger.warning("not drawn: %s", unasked)


def _many(images: Any) -> list[Any]:
    if isinstance(images, tuple | list):
        return list(images)
    from ..encoders.inputs import one_or_many

    return list(one_or_many(images))


def _check(store: Store, images: Sequence[Any], ids: Sequence[str], texts: Sequence[str]) -> None:
    for name in ids:
        if not isinstance(name, str):
            raise UsageError(f"ids must be texts, got {name!r}")
    check_texts(texts)
    if not images and not ids and not texts:
        raise UsageError("search needs an image, a text or an id, got 0 to search for")
    if len(store.manifest.shape) > 1:
        raise UsageError(
            f"{str(store.folder)!r} holds all patch tokens of each image (pool {store.manifest.pool!r}), and "
            "search compares one vector an image: extract once more with --pool cls, mean or cls+mean"
        )


def _picture(given: str | os.PathLike[str]) -> Path:
    path = local_path(given)
    if path.suffix.lower() not in PICTURE_FORMATS:
        raise UsageError(f"a picture's name ends in {', '.join(PICTURE_FORMATS)}; got {os.fspath(given)!r}")
    if path.is_dir():
        raise UsageError(f"{os.fspath(given)!r} is a folder: give another name for the picture")
    return path


def _label(image: Any) -> str:
    if isinstance(image, str | os.PathLike):
        return Path(os.fsdecode(image)).name
    return f"{len(image):,} bytes" if isinstance(image, bytes) else type(image).__name__


def _embedded(
    images: Sequence[Any],
    store: Store,
    weights: str | os.PathLike[str] | None,
    device: str,
    loaded: LoadedEncoder | None,
) -> tuple[list[bytes | Image.Image], list[np.ndarray]]:
    """Embed each image as a (dim,) float64 row, alone, so that no other changes it; also its bytes or its pixels."""
    from ..encoders.inputs import encoded, open_image

    read, data, pixels = [], list[bytes | Image.Image](), []
    for place, image in enumerate(images):  # before a model is loaded
        with _own_errors(image, place):
            read.append(encoded(image))
    encoder = store_encoder(store, weights, device, encoder=loaded)
    for place, (image, one) in enumerate(zip(images, read, strict=True)):
        data.append(open_image(image, place, encoder.decoding.exif) if one is None else one)
        with _own_errors(image, place):
            pixels.append(encoder.pixels(data[-1]))
    return data, [encoder.rows([one])[0].astype(np.float64) for one in pixels]


@checked
def text_encoder(
    store: Store | str | os.PathLike[str], weights: str | os.PathLike[str] | None = None, *, tower: str | None = None
) -> TextEncoder:
    """Load the text tower that belongs to the encoder of a store, for many searches by text.

    Args:
        store: see `open_store`; its rows are in the space that its encoder shares with texts.
        weights: see `load_text`.
        tower: for a store that was made from files of this machine: timm's name of the encoder that they hold.

    Raises:
        UsageError: the encoder has no text tower, the rows are not in its space, or micl-zoo[text] is not installed.
        WeightsError: see `load_text`.
    """
    store = open_store(store)
    found = find_tower(store.manifest.model, tower)
    _check_pair(store, found)
    return load_text(found, weights, source=store.manifest.source)


def _check_pair(store: Store, tower: Tower) -> None:
    made = store.manifest
    check_pair(tower, made.model, made.pool, made.shape, made.source)


def _spoken(store: Store, texts: Sequence[str], text: str | os.PathLike[str] | TextEncoder | None) -> list[np.ndarray]:
    """Embed each text as a (dim,) float64 row."""
    encoder = text if isinstance(text, TextEncoder) else text_encoder(store, text)
    _check_pair(store, encoder.tower)
    return [*encoder.rows(texts).astype(np.float64)]


@contextlib.contextmanager
def _own_errors(image: Any, place: int) -> Iterator[None]:
    try:
        yield
    except Refused as refused:
        raise UsageError(f"image {place} ({_label(image)}): {refused.detail} [{refused.reason}]") from None
    except Exception as error:  # files that others opened raise whatever damage makes them raise
        name = repr(os.fsdecode(image)) if isinstance(image, str | os.PathLike) else _label(image)
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UsageError(f"image {place} ({name}) cannot be read: {why}") from None


def _own(store: Store, ids: Sequence[str]) -> dict[str, tuple[int, np.ndarray]]:
    """(shard, (dim,) float64 row) of each id; of parts without one, only the ids are read."""
    wanted, quick = set(ids), store.snapshot(check=False)  # the search itself reads and checks every part
    found: dict[str, tuple[int, np.ndarray]] = {}
    for shard in store.done():
        if len(found) < len(wanted) and not wanted.isdisjoint(quick.part_ids(shard)):
            names, rows, *_ = store.rows(shard)
            found |= {name: (shard, rows[at].astype(np.float64)) for at, name in enumerate(names) if name in wanted}
    for name in ids:
        if name not in found:
            line = next((row for row in store.refused() if row.id == name), None)
            why = f"it could not be embedded: {line.detail} [{line.reason}]" if line else "`store.ids` lists the ids"
            raise UsageError(f"no row of {str(store.folder)!r} has the id {name!r}; {why}")
    return found


def _nearest(store: Store, queries: np.ndarray, k: int) -> list[list[_Found]]:
    """Find the k best of all rows for each of (Q, D) float64 queries: float32 proposes, float64 decides."""
    queries = queries / _lengths(queries)[:, None]
    best: list[list[_Found]] = [[] for _ in queries]
    shards = store.done()
    with progress("searching", len(shards), unit="parts") as tick:
        for shard in shards:
            ids, rows, *_ = store.rows(shard)
            single = rows.astype(np.float32)
            single /= _lengths(single)[:, None]
            np.nan_to_num(single, copy=False)
            for start in range(0, len(queries), BLOCK):
                scores = queries[start : start + BLOCK].astype(np.float32) @ single.T  # (B, n)
                for place, line in enumerate(scores, start):
                    near = _candidates(line, k, best[place], rows.shape[1])
                    cosines = _cosines(rows[near], queries[place])
                    new = [_Found(float(cosine), shard, ids[at]) for cosine, at in zip(cosines, near, strict=True)]
                    best[place] = sorted(best[place] + new, key=lambda hit: -hit.cosine)[:k]  # ties in index order
            tick()
    return best


def _candidates(scores: np.ndarray, k: int, best: Sequence[_Found], width: int) -> np.ndarray:
    """Rows of a part, ascending, that can be among the k best: (n,) float32 cosines and the best so far tell."""
    # In float32 the product is off by D 2^-24 at most, whatever the order of its sum, the lengths by as much again, the
    # rounding of either side by a few 2^-24; and two such numbers are compared.
    slack = (2 * width + 8) * 2.0**-23
    floor = best[-1].cosine if len(best) == k else -np.inf
    if len(scores) > k and np.isinf(floor):
        floor = np.partition(scores, -k)[-k]
    return np.flatnonzero(scores >= np.float32(floor) - np.float32(slack))


def _lengths(rows: np.ndarray) -> np.ndarray:
    """(n,), and 1 where a row is all zeros, whose cosine then is 0."""
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return np.where(lengths > 0, lengths, 1)


def _cosines(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """(n,) float64 of (n, D) and a unit (D,): row by row, so that equal rows have equal cosines wherever they are."""
    double = rows.astype(np.float64)
    lengths = np.sqrt((double * double).sum(1))
    return np.nan_to_num((double * query).sum(1) / np.where(lengths > 0, lengths, 1))


def _entries(store: Store, wanted: set[tuple[int, str]]) -> dict[tuple[int, str], Entry]:
    """Look (shard, id) pairs up in the index; each of its shards is read once."""
    found: dict[tuple[int, str], Entry] = {}
    for shard in {shard for shard, _ in wanted}:
        table = store.shard(shard).table
        names = pa.array([name for number, name in wanted if number == shard])
        kept = ImageIndex(table.filter(pc.is_in(table[ID], value_set=names)))
        found |= {(shard, entry.id): entry for entry in kept.entries()}
    for shard, name in wanted - set(found):
        raise StoreError(f"{store.folder.at(part_name(shard))!r} has a row {name!r} that the index has not: see verify")
    return found
