"""Text from outside, made safe to show: file names, ledger lines, what files and servers say."""

from __future__ import annotations

import json
import re
from typing import Any

# What is no letter for a reader but an order to a terminal or a browser: controls (C0, C1), marks that turn the
# direction of writing or are invisible, breaks of lines, halves of surrogate pairs, private use.
_UNSAFE = re.compile("[^\\x20-\\x7e]")


def printable(text: str, keep: str = "") -> str:
    """Write all that could move a cursor, hide or reorder text as \\xNN or \\uNNNN; letters of `keep` stay."""
    return _UNSAFE.sub(lambda match: _escaped(match[0], keep), text)


def _escaped(letter: str, keep: str) -> str:
    if letter in keep or letter.isprintable():
        return letter
    number = ord(letter)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def json_line(found: Any) -> str:
    """Write JSON on one line: letters as they are, all that is not `printable` by escapes of JSON's own."""
    text = json.dumps(found, ensure_ascii=False)
    return _UNSAFE.sub(lambda match: match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1], text)
