"""Labelled images: a folder of parquet files or of ImageFolder's layout -> index and class numbers, train and test."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from micl_zoo.errors import SourceError
from micl_zoo.sources import ImageIndex, index_source

from .knn import read_labels


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes.

    Attributes:
        index: N images.
        labels: (N,) int64, numbers of classes.
    """

    index: ImageIndex
    labels: np.ndarray


@dataclass(frozen=True)
class LabelledSet:
    """A data set with a training and a test part.

    Attributes:
        name: of its folder.
        classes: names, by number.
        train, test: the two parts.
        facts: for a record: source, counts, fingerprints.
    """

    name: str
    classes: tuple[str, ...]
    train: LabelledImages
    test: LabelledImages
    facts: dict[str, Any]

    @classmethod
    def open(
        cls,
        place: str | Path,
        *,
        labels: Path | None = None,
        train_images: int | None = None,
        test_images: int | None = None,
    ) -> LabelledSet:
        """A folder with train*.parquet and test.parquet or val.parquet, or with train/CLASS/ and test/CLASS/ or val/.

        Args:
            place: the folder.
            labels: not read yet.
            train_images, test_images: of each part at most.

        Raises:
            SourceError: a part that is missing.
        """
        folder = Path(place)
        files, test = sorted(folder.glob("train*.parquet")), _first(folder, "test.parquet", "val.parquet")
        if files and test is not None:
            parts = [_of_parquet(index_source(source)) for source in (files, test)]
            classes = tuple(str(number) for number in range(1 + int(max(part.labels.max() for part in parts))))
        else:
            test = _first(folder, "test", "val")
            if test is None or not (folder / "train").is_dir():
                raise SourceError(f"{str(folder)!r} has no training and test part")
            classes = tuple(sorted(child.name for child in (folder / "train").iterdir() if child.is_dir()))
            parts = [_of_folder(source, classes) for source in (folder / "train", test)]
        train, tested = (_cut(part, count) for part, count in zip(parts, (train_images, test_images), strict=True))
        facts = {"source": str(place), "classes": len(classes)}
        for name, part in (("train", train), ("test", tested)):
            digest = hashlib.sha256(part.index.fingerprint().encode() + part.labels.tobytes()).hexdigest()
            facts |= {f"{name}_images": len(part.index), f"{name}_fingerprint": digest}
        return cls(folder.resolve().name, classes, train, tested, facts)


def _first(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def _of_parquet(index: ImageIndex) -> LabelledImages:
    return LabelledImages(index, np.array(read_labels(index), dtype=np.int64))


def _of_folder(folder: Path, classes: tuple[str, ...]) -> LabelledImages:
    index = index_source(folder)
    return LabelledImages(index, np.array([classes.index(entry.id.split("/")[0]) for entry in index.entries()]))


def _cut(images: LabelledImages, count: int | None) -> LabelledImages:
    count = len(images.index) if count is None else count
    return LabelledImages(images.index.slice(0, count), images.labels[:count])
