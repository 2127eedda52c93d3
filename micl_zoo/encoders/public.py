"""The curated table of other people's encoders: what their reference code takes, where timm's defaults differ."""

from __future__ import annotations

from dataclasses import dataclass

from ..images.transform import Transform
from .device import Pool


@dataclass(frozen=True)
class Public:
    """One encoder that timm has, by timm's name."""

    name: str
    repo: str
    pool: Pool = "native"
    transform: Transform | None = None


_PUBLIC: list[Public] = []
PUBLIC = {one.name: one for one in _PUBLIC}


def row_of(name: str | None, repo: str) -> Public | None:
    """Find the row of an encoder by timm's name; without one, of the repository that holds it."""
    if name is not None:
        return PUBLIC.get(name)
    return next((one for one in _PUBLIC if one.repo == repo), None)
