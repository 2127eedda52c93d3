"""Rows of an image, by name."""

from __future__ import annotations

from typing import Literal

Output = Literal["native", "projection", "cls", "mean", "patches"]  # that a model computes; pools are made of them
Pool = Literal["native", "projection", "cls", "mean", "cls+mean", "patches"]
