"""Contact sheet: each query and the images found for it, in one picture."""

from __future__ import annotations

import math
import textwrap
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..errors import Refused
from ..files import atomic_path
from ..images.decode import decode
from ..printing import printable
from ..sources.index import Entry

PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
TILE, QUERY_TILE, GAP = 168, 224, 16  # pixels
COLUMNS = 6  # most hits beside each other
MOST_LETTERS = 250  # of a name that are looked at from either end: more than two lines hold
LINE, LABEL_LINES = 17, 3  # below a tile: its head, and two lines of its name
PAPER, MOUNT, GREY, INK, SOFT, RULE = "#ffffff", "#f3f3f1", "#c9c9c5", "#1c1c1a", "#6a6a66", "#dcdcd8"

Read = Callable[[Entry], bytes]  # an image of the store to its bytes, or raises Refused


class Tile(NamedTuple):
    """One image of the sheet, or a text."""

    head: str  # first line below it
    name: str  # its id or file, on the lines after that
    source: bytes | Image.Image | Entry | str  # the image, encoded or not, or where it is; or the text


def write_contact_sheet(out: Path, bands: Sequence[tuple[Tile, Sequence[Tile]]], read: Read, halves: int = 0) -> None:
    """Draw a band for each query, at the left, with its hits at the right, at most COLUMNS of them beside each other.

    With `halves` the hits are in two groups of so many, side by side. `out` ends in one of PICTURE_FORMATS.
    """
    cell = TILE + LINE * LABEL_LINES + GAP
    most = max(1, *(len(hits) for _, hits in bands))
    columns = 2 * halves or math.ceil(most / math.ceil(most / COLUMNS))  # lines of equal length
    between = 2 * GAP if halves else 0
    lines = [max(1, math.ceil(len(hits) / columns)) for _, hits in bands]
    heights = [max(QUERY_TILE + LINE * LABEL_LINES + GAP, count * cell) + GAP for count in lines]
    width = GAP + QUERY_TILE + 2 * GAP + columns * (TILE + GAP) + between
    sheet = Image.new("RGB", (width, sum(heights)), PAPER)
    top = 0
    for (query, hits), height in zip(bands, heights, strict=True):
        if top:
            ImageDraw.Draw(sheet).line((GAP, top, width - GAP, top), RULE)
        _draw(sheet, (GAP, top + GAP), QUERY_TILE, query, read)
        for place, hit in enumerate(hits):
            row, column = divmod(place, columns)
            left = QUERY_TILE + 3 * GAP + column * (TILE + GAP) + (between if halves and column >= halves else 0)
            _draw(sheet, (left, top + GAP + row * cell), TILE, hit, read)
        top += height
    with atomic_path(out) as temporary:
        sheet.save(temporary, PICTURE_FORMATS[out.suffix.lower()])


def _draw(sheet: Image.Image, corner: tuple[int, int], side: int, tile: Tile, read: Read) -> None:
    draw, (left, top) = ImageDraw.Draw(sheet), corner
    bold, font = ImageFont.load_default(15), ImageFont.load_default(13)
    mount = (left, top, left + side - 1, top + side - 1)
    try:
        if isinstance(tile.source, str):
            draw.rectangle(mount, MOUNT)
            text, letters = _wrapped(tile.source, side)
            draw.multiline_text((left + side / 2, top + side / 2), text, INK, letters, "mm", align="center")
        else:
            found = read(tile.source) if isinstance(tile.source, Entry) else tile.source
            opened = decode(found) if isinstance(found, bytes) else found
            image = ImageOps.contain(opened, (side, side), Image.Resampling.LANCZOS)
            draw.rectangle(mount, MOUNT)
            sheet.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
    except Refused as refused:
        what = "cannot be read" if refused.reason == "unreadable" else refused.reason.replace("_", " ")
        draw.rectangle(mount, GREY)
        draw.text((left + side / 2, top + side / 2), what, INK, font, "mm")
    draw.text((left, top + side + 4), tile.head, INK, bold)
    for number, text in enumerate(_fitted(printable(tile.name), font, side), 1):
        draw.text((left, top + side + 5 + number * LINE), text, SOFT, font)


def _wrapped(text: str, side: int) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """Break a text into lines, and choose the largest letters in which they fit into a square tile."""
    lines = "\n".join(textwrap.wrap(printable(text), 18, max_lines=9, placeholder=" ..."))
    fonts = [ImageFont.load_default(size) for size in range(26, 8, -2)]
    draw = ImageDraw.Draw(Image.new("1", (1, 1)))
    boxes = (draw.multiline_textbbox((0, 0), lines, font) for font in fonts)
    fits = (font for font, box in zip(fonts, boxes, strict=True) if max(box[2], box[3]) <= side - GAP)
    return lines, next(fits, fonts[-1])


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a name into two lines of `width` pixels; a longer one keeps its end, which tells files apart."""
    if len(text) > 2 * MOST_LETTERS:
        text = text[:MOST_LETTERS] + text[-MOST_LETTERS:]
    lines: list[str] = []
    while text and len(lines) < LABEL_LINES - 1:
        fits = max(
            1, bisect_right(range(1, len(text) + 1), width, key=lambda cut: math.ceil(font.getlength(text[:cut])))
        )
        if len(lines) == LABEL_LINES - 2 and fits < len(text):
            places = range(len(text) - 1)
            start = bisect_left(places, -width, key=lambda place: -math.ceil(font.getlength("..." + text[place:])))
            return [*lines, "..." + text[start:]]
        lines.append(text[:fits])
        text = text[fits:]
    return lines
