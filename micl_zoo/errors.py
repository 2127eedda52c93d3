"""The exceptions of this package; their texts say what was asked, what was found, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal

Reason = Literal[
    "unreadable",
    "empty",
    "not_an_image",
    "truncated",
    "damaged",
    "too_small",
    "too_large",
    "unsupported",
    "memory",
    "crashed",
    "timeout",
    "not_finite",
    "listing",  # of an entry of a source, which no image has
]


class MiclZooError(Exception):
    """Base of every error this package raises on purpose, written for people; `exit_code` is the command line's."""

    exit_code = 1


class UsageError(MiclZooError, ValueError):
    """An argument, a name or a setting that cannot be used."""


class SourceError(MiclZooError, ValueError):
    """A source of images that does not exist, cannot be read, or holds no image."""


class WeightsError(MiclZooError):
    """Weights that are not published, cannot be fetched, or are not the bytes they should be."""


class StoreError(MiclZooError, ValueError):
    """A folder of embeddings that is not one, is damaged, or was made by something else."""


class TrainingError(MiclZooError):
    """A training run that cannot start, go on, or be trusted."""


class ExportError(MiclZooError):
    """An export that could not be made, or whose embeddings are not those of the encoder."""


class Interrupted(MiclZooError):
    """The run was interrupted; everything computed so far is on disk."""

    def __init__(self, text: str, *, signal: int) -> None:
        super().__init__(text)
        self.exit_code = 128 + signal  # as a shell says it


def unknown(kind: str, name: str, valid: Iterable[str]) -> str:
    """Write the text for a name that does not exist: what was asked, the nearest names, and the valid ones."""
    names = sorted(valid)
    return " ".join(filter(None, [f"unknown {kind} {name!r}.", nearest(name, names), f"Valid: {', '.join(names)}."]))


def nearest(name: str, names: Iterable[str]) -> str:
    """Ask whether a name that is like this one was meant; "" where none is."""
    near = difflib.get_close_matches(str(name), list(names), n=2, cutoff=0.6)
    return f"Did you mean {' or '.join(near)}?" if near else ""


class Refused(Exception):
    """Why one image cannot be embedded: a `reason` out of `Reason` and a sentence of `detail`; no failure."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason  # for machines
        self.detail = detail  # for people, a line in the ledger

    def __reduce__(self) -> tuple[type[Refused], tuple[Reason, str]]:
        return Refused, (self.reason, self.detail)  # so that it crosses from a worker process whole
