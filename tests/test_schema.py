"""The reader of files of facts, and text from outside made safe to show."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from micl_zoo.errors import StoreError
from micl_zoo.printing import json_line, printable
from micl_zoo.schema import MAX_BYTES, Between, parse_json, read, read_json


@dataclass(frozen=True)
class Part:
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.share > 1:
            raise ValueError(f"share {self.share} is more than all")


@dataclass(frozen=True)
class Whole:
    name: str
    kind: Literal["a", "b", 1]
    sizes: list[Annotated[int, Between(1, 64)]]
    pair: tuple[int, int] = (0, 0)
    parts: tuple[Part, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    limit: Annotated[int, Between(1)] | None = None
    open: Any = None


GOOD: dict[str, Any] = {"name": "x", "kind": "a", "sizes": [1, 64]}


def test_what_fits_becomes_the_dataclass() -> None:
    found = read(Whole, {**GOOD, "pair": [1, 2], "parts": [{"share": 1}], "limit": 7, "open": [1]}, "it", StoreError)
    assert found == Whole("x", "a", [1, 64], (1, 2), (Part(1.0),), {}, 7, [1])
    assert isinstance(found.parts[0].share, float)
    assert read(Whole, {**GOOD, "new": 1}, "it", StoreError, others=True) == Whole("x", "a", [1, 64])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": 5}, "name must be a text, it is 5"),
        ({"name": None}, "name must be a text, it is null"),
        ({"kind": "c"}, "kind must be one of a, b, 1, it is 'c'"),
        ({"kind": True}, "kind must be one of a, b, 1, it is true"),
        ({"sizes": [1, True]}, r"sizes\[1\] must be a whole number, it is true"),
        ({"sizes": [65]}, r"sizes\[0\] is 65, and must be 1 to 64"),
        ({"sizes": "11"}, "sizes must be a list, it is '11'"),
        ({"pair": [1]}, "pair must have 2 values, it has 1"),
        ({"parts": [{"share": float("nan")}]}, r"parts\[0\].share must be a finite number"),
        ({"parts": [{"share": 2}]}, r"parts\[0\] cannot be: share 2.0 is more than all"),
        ({"parts": [{"shares": 1}]}, r"parts\[0\].'shares' is no field of it; those are share"),
        ({"notes": {"a\x1b": 1}}, "must be a text, it is 1"),
        ({"notes": []}, "notes must be an object"),
        ({"limit": 0}, "limit is 0, and must be at least 1"),
        ({"new": 1}, "'new' is no field of it"),
    ],
)
def test_what_does_not_fit_is_one_sentence(change: dict[str, Any], says: str) -> None:
    with pytest.raises(StoreError, match=rf"^'m.json' is damaged: .*{says}.*: extract it again$"):
        read(Whole, GOOD | change, "'m.json'", StoreError, "extract it again")


def test_a_missing_field_and_no_object() -> None:
    with pytest.raises(StoreError, match="sizes is missing"):
        read(Whole, {"name": "x", "kind": "a"}, "it", StoreError)
    none: tuple[Any, ...] = (None, [], "x", 1)
    for found in none:
        with pytest.raises(StoreError, match="it must be an object"):
            read(Whole, found, "it", StoreError)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 6000, b'{"a": 1} x', b"\0" * 9])
def test_no_json_is_one_sentence(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(StoreError, match=r"a\.json' is damaged, it is no JSON \(.*\): delete it"):
        read_json(tmp_path / "a.json", StoreError, "delete it")
    with pytest.raises(StoreError, match=r"^the footer is damaged, it is no JSON"):
        parse_json(data, "the footer", StoreError)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(StoreError, match=f"cannot read '{file}'"):
            read_json(file, StoreError)
    with (tmp_path / "large.json").open("wb") as large:
        large.truncate(MAX_BYTES + 1)
    with pytest.raises(StoreError, match="too large for what it should be"):
        read_json(tmp_path / "large.json", StoreError)


def test_printable_leaves_letters_and_escapes_what_acts() -> None:
    assert printable("Füße 漢字 🙂 a'b\\") == "Füße 漢字 🙂 a'b\\"
    assert printable("a\x1b[31m\x9bm\x07\u202eb\u2066\u200b\n\r\x7f\ud800\U000e0001") == (
        r"a\x1b[31m\x9bm\x07\u202eb\u2066\u200b\x0a\x0d\x7f\ud800\U000e0001"
    )
    assert printable("one\ntwo\x1b", keep="\n") == "one\ntwo\\x1b"
    text = "é\x1b\x9b\u202e\U000e0001"
    line = json_line({"id": text, "more": [1, None]})
    assert line.isprintable()
    assert json.loads(line) == {"id": text, "more": [1, None]}
    assert "é" in line
