"""Opens labelled sets: train images, test images, their classes, and a record of what exactly was used."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from micl_zoo.errors import SourceError
from micl_zoo.files import file_sha256, open_regular, to_path
from micl_zoo.schema import parse_json, shown
from micl_zoo.sources.globs import escape
from micl_zoo.sources.index import ImageIndex
from micl_zoo.sources.listing import index_source
from micl_zoo.sources.lists import Odd, table_rows
from micl_zoo.sources.parquet import open_parquet, read_column

from ..corpora import CORPORA

Label = str | int
Part = tuple[ImageIndex, list[Label]]

TEST_NAMES = ("test", "val", "valid", "validation")  # the first that has labels
PARTS, ENDS = ("train", *TEST_NAMES), ("", "*.parquet")  # names of parts, and how they end
TEST_SHARE = 0.2  # of each class, where there are no parts
MOST_LABEL = 1000  # letters
LABEL_COLUMNS = ("label", "labels", "class", "fine_label")
ID_COLUMNS = ("id", "path", "file", "filename", "file_name", "image")


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes."""

    index: ImageIndex  # N images
    labels: np.ndarray  # (N,) int64, numbers into the set's classes

    def most(self, count: int | None) -> LabelledImages:
        """Take at most `count` of them, balanced over the classes, the same ones at every call, in index order."""
        if count is None or count >= len(self.labels):
            return self
        rows = balanced_rows(self.labels, count)
        return LabelledImages(ImageIndex(self.index.table.take(pa.array(rows))), self.labels[rows])


@dataclass(frozen=True)
class LabelledSet:
    """A set to measure an encoder on."""

    name: str  # of its folder
    classes: tuple[str, ...]  # names, sorted; a label is a number into it
    train: LabelledImages
    test: LabelledImages
    facts: dict[str, Any]  # where it came from, how much was taken, the sha256 of its files; whether it is a known set

    @classmethod
    def open(
        cls, place: str | os.PathLike[str], *, labels: str | os.PathLike[str] | None = None,
        train_images: int | None = None, test_images: int | None = None,
    ) -> LabelledSet:  # fmt: skip
        """Open a set in one of the usual layouts.

        Args:
            place: a folder here or at a URI, or the name of a data set on the Hugging Face hub ("uoft-cs/cifar10"),
                with train*.parquet and test*.parquet (or val…, also below `data/`), or with the folders train/ and
                test/ or val/ that have a folder per class, as ImageNet-1k is laid out. A folder here without parts,
                of a folder per class, is split: TEST_SHARE of each class, drawn once and for all, are test images.
            labels: a .csv with the columns id and label, for images whose place does not say it.
            train_images, test_images: take at most so many, balanced over the classes.
        """
        where, name = _where(os.fspath(place))
        given = read_label_file(labels) if labels else None
        split = None
        if _has_parts(where):
            train, found = _open_part(where, ("train",), given)
            test, asked = _open_part(where, TEST_NAMES, given)
        else:
            try:
                (train, found), (test, asked) = _split(where, given)
            except SourceError as error:
                expected = f"{_expected('train')}; or CLASS/*.jpg without parts, of which some are taken for testing"
                raise SourceError(f"no train part with labels in {where!r}: {expected} | {error}") from None
            split = f"{TEST_SHARE:.0%} of each class for testing, by chance with seed 0"
        classes, numbers = number_classes(found, asked, where)
        first = LabelledImages(train, numbers[0]).most(train_images)
        second = LabelledImages(test, numbers[1]).most(test_images)
        facts = {
            "source": name,
            "classes": len(classes),
            "train_images": len(first.labels), "train_images_there": len(found),
            "test_images": len(second.labels), "test_images_there": len(asked),
            "sha256": _hashes(train) | _hashes(test),
            "train_fingerprint": first.index.fingerprint(), "test_fingerprint": second.index.fingerprint(),
        }  # fmt: skip
        facts |= {"split": split} if split else {}
        return cls(name, classes, first, second, facts | {"known": _known(name, facts)})


def _where(place: str) -> tuple[str, str]:
    """Find what to list, and the set's name."""
    path = to_path(place)
    if place and path.exists():
        return str(path), path.resolve().name
    if "://" in place:
        return place.rstrip("/"), place.rstrip("/").rpartition("/")[2]
    if place.count("/") == 1 and not place.startswith((".", "~")) and not Path(place).parent.is_dir():
        return f"hf://datasets/{place}", place
    raise SourceError(
        f"no data set at {place!r}: give a folder, a URI, or OWNER/NAME of a data set on the hub "
        f"(hf://datasets/OWNER/NAME where a folder OWNER is here). Known sets, by the "
        f"name of their folder: {', '.join(CORPORA)}"
    )


def _has_parts(where: str) -> bool:
    """Whether a place has parts of its own for training or for testing, as all have that are not folders here."""
    folder = Path(where)
    if not folder.is_dir():
        return True
    return any(list(folder.glob(f"{inside}{name}{end}")) for inside in ("", "data/") for name in PARTS for end in ENDS)


def _split(where: str, given: Mapping[str, str] | None) -> tuple[Part, Part]:
    """Split a folder that has no parts, class by class; a class of one image is one for training."""
    index = index_source(where)
    found = labels_of(index, given)
    order, rows = np.random.default_rng(0).permutation(len(found)), dict[Label, list[int]]()
    for row in order.tolist():
        rows.setdefault(found[row], []).append(row)
    test = {row for some in rows.values() for row in some[: math.ceil(TEST_SHARE * len(some))] if len(some) > 1}
    parts = [row for row in range(len(found)) if row not in test], sorted(test)
    if not test:
        raise SourceError(f"{where!r} has one image of each class, none to test with: add more, or train/ and test/")
    first, second = ((ImageIndex(index.table.take(pa.array(part))), [found[row] for row in part]) for part in parts)
    return first, second


def _open_part(where: str, names: Sequence[str], given: dict[str, str] | None) -> tuple[ImageIndex, list[Label]]:
    """Open the first part of one of these names that can be listed and has labels."""
    said: list[str] = []
    for name in names:
        for index in _listed(where, name, said):
            try:
                return index, labels_of(index, given)
            except SourceError as error:
                said.append(f"{name}: {error}")
    raise SourceError(
        f"no {' or '.join(names)} part with labels in {where!r}: {_expected(names[0])}"
        + "".join(f" | {one}" for one in said[:3])
    )


def _expected(part: str) -> str:
    return f"expected {part}*.parquet with the columns image and label, or {part}/CLASS/*.jpg"


def _listed(where: str, name: str, said: list[str]) -> Iterator[ImageIndex]:
    folders = ("", "data/", "*/") if where.startswith("hf://") else ("", "data/")
    inside = [*(f"{folder}{name}*.parquet" for folder in folders), f"{name}/"]
    for pattern in inside:
        if "://" in where or any(Path(where).glob(pattern.rstrip("/"))):
            try:
                yield index_source(f"{where if pattern is inside[-1] else escape(where)}/{pattern}")
            except SourceError as error:
                said.append(str(error))


def _hashes(index: ImageIndex) -> dict[str, str]:
    """Hash the local parquet files behind an index; the index's fingerprint identifies other images."""
    files = index.table["uri"].unique().to_pylist()
    local = [Path(uri) for uri in files if uri.endswith(".parquet") and "://" not in uri]
    return {file.name: file_sha256(file) for file in local}


def _known(name: str, facts: dict[str, Any]) -> str:
    """Say how this set compares with the known one of its name."""
    known = CORPORA.get(name.lower().replace("_", "-").rpartition("/")[2])
    if known is None:
        return "not a known set: compare figures only where the sha256 or the fingerprints are the same"
    counts = {
        "classes": (facts["classes"], known.classes),
        "train": (facts["train_images_there"], known.images),
        "test": (facts["test_images_there"], known.test_images),
    }
    differ = [f"{part} {there}, not {expected}" for part, (there, expected) in counts.items() if there != expected]
    differ += [f"other bytes in {file}" for file, sha in known.sha256.items() if facts["sha256"].get(file) != sha]
    return "the known set of this name" if not differ else "other than the known set: " + "; ".join(differ)


def read_label_file(file: str | os.PathLike[str]) -> dict[str, str]:
    """Read labels by id from a .csv with a column label (or class) and one of ids or paths."""
    try:
        opened = io.BufferedReader(open_regular(Path(file)))
        with io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as text:
            rows = table_rows(text, ",")
            columns = row if isinstance(row := next(rows, (1, []))[1], list) else []
            ids, label = (
                next((columns.index(c) for c in wanted if columns.count(c) == 1), None)
                for wanted in (ID_COLUMNS, LABEL_COLUMNS)
            )
            if ids is None or label is None:
                raise SourceError(
                    f"the labels {os.fspath(file)!r} need a column of ids ({', '.join(ID_COLUMNS)}) and one of labels "
                    f"({', '.join(LABEL_COLUMNS)}), each once; found {', '.join(columns) or 'none'}"
                )
            found: dict[str, str] = {}
            for number, row in rows:
                if isinstance(row, Odd):
                    raise SourceError(f"line {number} of the labels {os.fspath(file)!r} {row}")
                if not row:
                    continue
                name, given = (row[at] if at < len(row) else "" for at in (ids, label))
                if not name:
                    raise SourceError(f"the labels {os.fspath(file)!r} have no {columns[ids]} in line {number}")
                if found.setdefault(name, given) != given:
                    raise SourceError(
                        f"the labels {os.fspath(file)!r} have two for {name!r}, {found[name]!r} and, in line "
                        f"{number}, {given!r}: keep one"
                    )
            return found
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"cannot read the labels {os.fspath(file)!r}: {error}") from None


def clean_label(found: Any) -> Label | None:
    """Turn what a cell holds into a label; None where it holds none: empty, NaN, or below 0.

    Tables with a cell missing keep whole numbers as floats, which are the same labels.

    Raises:
        ValueError: several, or something that is no name and no number.
    """
    if found is None or found != found or (isinstance(found, str) and not found.strip()):
        return None
    if isinstance(found, bool):
        return str(found)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if isinstance(found, int):
        return found if found >= 0 else None
    if isinstance(found, bytes):
        return found.decode()  # a UnicodeDecodeError is a ValueError
    if isinstance(found, list | tuple | dict):
        raise ValueError(f"{shown(found)} is no single label: measure sets with one class per image")
    if not isinstance(found, str):
        raise ValueError(f"{shown(found)} is neither a name nor a whole number")
    return found


def labels_of(index: ImageIndex, given: Mapping[str, str] | None = None) -> list[Label]:
    """Find the label of each image: given by its id, or the parquet's column, or the first folder of its id."""
    if given is not None:
        ids = index.ids
        if missing := [name for name in ids if not given.get(name)]:
            raise SourceError(
                f"{len(missing):,} of {len(ids):,} images have no label, {missing[0]!r} the first of them: labels go "
                f"by the ids of the images, such as {ids[0]!r}"
            )
        return [given[name] for name in ids]
    columns: dict[str, list[Label]] = {}  # by file
    rows = zip(*(index.table[name].to_pylist() for name in ("id", "uri", "kind", "offset")), strict=True)
    return [_label(columns, *row) for row in rows]


def _label(columns: dict[str, list[Label]], name: str, uri: str, kind: str, offset: int) -> Label:
    if kind.partition(":")[0] == "parquet":
        if uri not in columns:
            columns[uri] = _label_column(uri)
        if not 0 <= offset < len(columns[uri]):
            raise SourceError(f"{uri!r} has {len(columns[uri]):,} rows, and an image was row {offset}: it has changed")
        return columns[uri][offset]
    # the archive's folder; where it has none, that of the member
    *archive, inside = re.split(r"(?i)\.(?:tar|zip)#", name, maxsplit=1) if kind in ("tar", "zip") else [name]
    folder = next((part.partition("/")[0] for part in (*archive, inside) if "/" in part), "")
    if not folder:
        raise SourceError(
            f"{name!r} has no label: put images into a folder per class, have a column `label` in parquet files, or "
            "give --labels with a csv of id and label"
        )
    return folder


def _label_column(uri: str) -> list[Label]:
    file = open_parquet(uri)
    names = file.schema_arrow.names
    column = next((name for name in LABEL_COLUMNS if names.count(name) == 1), None)
    if column is None:
        raise SourceError(
            f"{uri!r} has no column of labels: looked for {', '.join(LABEL_COLUMNS)}, each once, found "
            f"{', '.join(names)}"
        )
    try:
        cleaned = [clean_label(cell) for cells in read_column(uri, column) for cell in _values(cells)]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SourceError(f"{uri!r} has no labels in its column {column!r}: {error}") from None
    labels = [label for label in cleaned if label is not None]
    if none := len(cleaned) - len(labels):
        raise SourceError(
            f"{uri!r} has no label for {none:,} of {len(cleaned):,} images: its column {column!r} is empty or -1 "
            "there, which is how parts without labels are kept"
        )
    classes = _class_names(file.schema_arrow, column, uri)
    return [_named(label, classes, uri) for label in labels] if classes else labels


def _values(cells: pa.Array) -> list[Any]:
    """Turn cells into Python's values, of which dates can have none, and text that is too long for a name is none."""
    if pa.types.is_temporal(cells.type):
        raise ValueError(f"{cells.type} is neither a name nor a whole number")
    try:
        values: list[Any] = cells.to_pylist()
    except (KeyError, OverflowError) as error:  # a date inside of something
        raise ValueError(str(error)) from None
    if long := next((one for one in values if isinstance(one, str | bytes) and len(one) > MOST_LABEL), None):
        raise ValueError(f"{shown(long)} has {len(long):,} letters, {MOST_LABEL:,} at most are a name")
    return values


def _named(label: Label, names: list[str], uri: str) -> Label:
    if isinstance(label, str):
        return label
    if label >= len(names):
        raise SourceError(f"{uri!r} has the label {label}, and its metadata name {len(names)} classes, from 0 on")
    return names[label]


def _class_names(schema: pa.Schema, column: str, uri: str) -> list[str]:
    """Read the names of a ClassLabel column of `datasets`; none where the file lacks them, or has one twice."""
    found = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"), f"the metadata of {uri!r}", SourceError)
    for key in ("info", "features", column, "names"):
        found = found.get(key) if isinstance(found, dict) else None
    names = [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
    return names if len(set(names)) == len(found or []) else []


def number_classes(
    train: Sequence[Label], test: Sequence[Label], where: str
) -> tuple[tuple[str, ...], tuple[np.ndarray, np.ndarray]]:
    """Sort the class names, and turn the labels of both parts into numbers into them.

    Where some are names and some are numbers, as in parts that were written differently, all of them are names.
    """
    if len({type(label) for label in (*train, *test)}) > 1:
        train, test = list(map(str, train)), list(map(str, test))
    if not test:
        raise SourceError(f"{where!r} has no test image")
    classes: list[Any] = sorted(set(train))  # names alone, or numbers
    if len(classes) < 2:
        raise SourceError(f"{where!r} has the one class {classes}: two are needed to tell apart")
    if strange := sorted(map(str, set(test) - set(classes))):
        raise SourceError(f"{where!r} has test images of classes that no training image has: {', '.join(strange[:5])}")
    number = {label: place for place, label in enumerate(classes)}
    parts = tuple(np.array([number[label] for label in part], np.int64) for part in (train, test))
    return tuple(map(str, classes)), (parts[0], parts[1])


def balanced_rows(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Draw sorted rows of `count` images so that no class has two more than another that still has some."""
    order = np.random.default_rng(seed).permutation(len(labels))
    turn = np.empty(len(labels), np.int64)  # of each image within its class
    seen: dict[int, int] = {}
    for row in order.tolist():
        turn[row] = seen.setdefault(int(labels[row]), 0)
        seen[int(labels[row])] += 1
    return np.sort(order[np.argsort(turn[order], kind="stable")][:count])
