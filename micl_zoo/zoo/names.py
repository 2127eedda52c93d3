"""What a name means: a row of a table, a path on this machine, or a repository of the hub at one commit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError, WeightsError, nearest
from . import pins
from .ours import DEFAULT, RECORDS, Record, find_record, is_name
from .pins import Pin
from .public import PUBLIC, row_of

LOCAL = "local-dir:"  # as timm writes it
PAGES = ("https://huggingface.co/", "huggingface.co/", "https://hf.co/")
FILES = (".safetensors", ".onnx")


@dataclass(frozen=True)
class Place:
    """Where the encoder that was asked for is: at one of three."""

    record: Record | None = None  # its row, whose weights come with the package, or are published, or not yet
    path: Path | None = None  # on this machine
    pin: Pin | None = None  # on the hub
    architecture: str | None = None  # asked for by timm's name, where the repository alone means another

    @property
    def pinned(self) -> Pin:
        """The pin of a place on the hub."""
        assert self.pin
        return self.pin

    @property
    def source(self) -> str | None:
        """The name of a place on the hub that means the same commit from now on."""
        if self.pin is None:
            return None
        return f"{self.architecture}@{self.pin.commit}" if self.architecture else self.pin.source


def find_place(name: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None) -> Place:
    """Find what a name means; a repository of the hub is looked up, and nothing of it downloaded.

    Args:
        name: see `micl_zoo.load`.
        weights: a path, beside which a name only says what must be there.

    Raises:
        UsageError: it means nothing.
        WeightsError: the hub has no such repository, or cannot be reached.
    """
    if weights is not None:
        if (name != DEFAULT and not isinstance(name, str)) or _path(str(name)):
            raise UsageError(f"weights of two places were asked for, {str(name)!r} and {str(weights)!r}: give one")
        find_record(str(name))  # raises
        return Place(path=Path(weights))
    if not isinstance(name, str):
        return Place(path=Path(name))
    if is_name(name):
        return Place(record=find_record(name))
    if path := _path(name):
        return Place(path=path)
    if found := pins.parse(name):
        try:
            return Place(pin=pins.pin(*found))
        except WeightsError as error:
            here = "" if name.startswith(pins.PREFIXES) else f"there is no file or folder {name!r} here; "
            near = _near_timm(name) if name.startswith("timm/") else ""
            raise WeightsError(f"{here}{error}{near}") from None
    tag, _, revision = name.partition("@")
    if found := timm_repository(tag):
        other = None if _means(found[1]) == found[0] else found[0]
        return Place(pin=pins.pin(found[1], revision or None, name=name), architecture=other)
    raise UsageError(_unknown(name))


def _near_timm(name: str) -> str:
    import timm

    text = name.removeprefix("timm/").partition("@")[0]
    near = "" if timm.models.is_model_pretrained(text) and "." in text else nearest(text, timm.list_pretrained())
    return f". {near}" if near else ""


def _unknown(name: str) -> str:
    import timm

    ours = [*RECORDS, *{record.arch for record in RECORDS.values()}, *PUBLIC]
    asked, every = name.strip().lower(), [*ours, *timm.list_pretrained()]
    inside = [one for one in every if len(asked) > 2 and asked in one.lower()]  # dinov2, clip
    near = f"Did you mean {' or '.join(inside[:2])}?" if inside else nearest(asked, every)
    here = nearest(name, [one.name for one in Path().iterdir()]) if Path().is_dir() else ""
    what = "no encoder has it, and no file or folder here" + (f" ({here})" if here else "")
    way_on = (
        "`micl-zoo models` lists names; any name of timm with weights, OWNER/NAME on the hub and a path are names, too"
    )
    return " ".join(filter(None, [f"unknown model {name!r}: {what}.", near, f"{way_on}."]))


def _path(text: str) -> Path | None:
    """Return the path that a text means, if it means one: because it says so, or something is there.

    Raises:
        UsageError: it is a page, or OWNER/NAME where the folder OWNER is here: a path with a mistake in it.
    """
    if text.startswith(PAGES):
        raise UsageError(
            f"{text!r} is a page: give {text.partition('.co/')[2].split('/tree/')[0]!r}, the repository's name"
        )
    if text.startswith(LOCAL):
        return Path(text.removeprefix(LOCAL)).expanduser()
    if not text or text.startswith(pins.PREFIXES):
        return None
    path = Path(text)
    try:
        if path.exists() or text.endswith(FILES) or text.startswith((".", "~", os.sep)):
            return path.expanduser()
        if pins.parse(text) is None:
            return path if "/" in text or os.sep in text else None
        is_wrong = path.parent.exists()
    except OSError:  # a name of thousands of letters, a folder that may not be entered
        return path
    if is_wrong:  # and is not sent anywhere
        hub = f"if OWNER/NAME on the hub is meant, give {pins.PREFIXES[0]}{text}"
        raise UsageError(f"no weights at {text!r}: folder {str(path.parent)!r} is here and has no such entry; {hub}")
    return None


def timm_repository(name: str) -> tuple[str, str] | None:
    """Return `arch.tag` and the repository of timm's weights of that name, or of a bare arch's own default."""
    if row := PUBLIC.get(name):
        return row.name, row.repository
    import timm

    known = timm.get_pretrained_cfg(name) if timm.models.is_model_pretrained(name) else None
    if known is None or "/" not in (known.hf_hub_id or ""):
        return None
    return f"{known.architecture}.{known.tag}", known.hf_hub_id


def hub_of(source: str | None) -> tuple[str | None, str | None]:
    """Return repository and commit of a `Place.source`."""
    if not source:
        return None, None
    tag, _, commit = source.partition("@")
    return pins.parse(source) or ((timm_repository(tag) or (None, None))[1], commit)


def pinned_again(name: str, source: str | None) -> str:
    """Return the source of an earlier call, if a name without a revision means the same encoder; else the name."""
    asked, known = pins.parse(name), source and (pins.parse(source) or source.split("@"))
    if asked is None and (found := timm_repository(name)):
        arch, repo = found
        asked = (repo if _means(repo) == arch else arch), None
    same = asked is not None and asked[1] is None and known and known[0] == asked[0]
    return source if same and source else name


def _means(repo: str) -> str:
    """Say which `arch.tag` a repository alone means: that of the curated table, else that of its own name."""
    row = row_of(None, repo)
    return row.name if row else repo.partition("/")[2]
