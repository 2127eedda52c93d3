"""Measures several encoders side by side on the same labelled sets: one record, which a killed run goes on with."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from micl_zoo.encoders.device import resolve_device
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.encoders.load import load
from micl_zoo.errors import Interrupted, MiclZooError, UsageError, WeightsError
from micl_zoo.files import write_text
from micl_zoo.limits import refused_by_system
from micl_zoo.zoo.names import find_place

from ..run.provenance import made_with
from .evaluate import (
    Baseline,
    Passes,
    check_same,
    check_sets,
    measure,
    new_record,
    protocol_for,
    resumed,
    store_folders,
)
from .features import Features
from .labelled import LabelledSet
from .protocols import Protocol
from .ranking import compared
from .record import Bits, Speed, read_comparison, read_speed
from .tables import Outcomes

log = logging.getLogger(__name__)


def compare(
    encoders: Sequence[str],
    sets: Sequence[LabelledSet],
    protocol: Protocol | None = None,
    *,
    out: Path | None = None,
    stores: Path | None = None,
    baselines: Sequence[Baseline] = (),
    device: str = "auto",
    batch_size: int = 64,
    workers: int | None = None,
    command: str = "",
    show: bool = True,
) -> dict[str, Any]:
    """Measure encoders one after the other on the same sets. One that fails is left out, and the record says why.

    Args:
        encoders: texts that `load` takes, each another.
        sets: see `evaluate`.
        protocol: methods and settings, the same for all.
        out: file of the record, written after every set; what it holds already is not measured again, and stays there.
        stores: folder for the embeddings, a store per encoder and part of a set, which are not computed again. By
            default `out` with the ending .stores; without `out` they are deleted at the end.
        baselines: "pixels", measured once; "random" is of one encoder.
        device: of the models.
        batch_size, workers, command, show: see `evaluate`.

    Returns:
        The record: by the text of each encoder its own `record`, as `evaluate` makes it, width, parameters, licence,
        speed and which test images were classified right; reasons of those that `failed`; and what is `compared`.

    Raises:
        UsageError: an encoder twice, a name or path of nothing, or a record in `out` of another protocol or images.
        Interrupted: SIGTERM or Ctrl-C; what was computed is kept.
    """
    protocol = protocol or Protocol()
    check_sets(sets)
    _check(encoders, baselines)
    record: dict[str, Any] = {"encoders": {}, "failed": {}, "compared": {}, "command": command}
    record |= made_with(resolve_device(device))
    if out is not None and out.exists():
        record = _resumed(record, protocol, sets, out)
    record["asked"] = list(encoders)
    _find([text for text in encoders if text not in record["encoders"]])
    with _folder(stores, out) as folder:
        passes = Passes(batch_size=batch_size, workers=workers, stores=folder, show=show)
        for text in encoders:
            holders = {name: one for one in record["encoders"] for name in record["encoders"][one]["record"]["results"]}
            own = [name for name in baselines if holders.get(name, text) == text]  # once for all encoders
            if reason := _try(record, text, sets, protocol, passes, own, device=device, out=out, command=command):
                log.warning("%s failed: %s", text, reason)
                record["failed"][text] = reason
            there = dict.fromkeys((*encoders, *record["encoders"]))
            record["encoders"] = {name: record["encoders"][name] for name in there if name in record["encoders"]}
            record["compared"] = compared(record)
            _save(record, out)
    return record


def _try(*values: Any, **named: Any) -> str | None:
    """Measure one encoder, see `_measure`; return why it could not be done, None if it could."""
    try:
        _measure(*values, **named)
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        return reason
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next one may be larger
    return None


def _check(encoders: Sequence[str], baselines: Sequence[Baseline]) -> None:
    if twice := sorted({text for text in encoders if list(encoders).count(text) > 1}):
        raise UsageError(f"{', '.join(twice)} was given twice: name each encoder once")
    if "random" in baselines:
        raise UsageError("the baseline 'random' is the untrained twin of one encoder: measure that encoder alone")


def _find(encoders: Sequence[str]) -> None:
    """Raise what a misspelt name or path raises, before hours are spent on those before it."""
    for text in encoders:
        with contextlib.suppress(WeightsError):  # of the hub, which may be there when its turn comes
            place = find_place(text)
            if place.path is not None and not place.path.exists():
                raise UsageError(f"there is no {text!r} here: give a file or folder, or a name of `micl-zoo models`")


def _resumed(asked: dict[str, Any], protocol: Protocol, sets: Sequence[LabelledSet], out: Path) -> dict[str, Any]:
    """Take the record in a file, if its encoders were measured as it is asked for now."""
    there = read_comparison(out, UsageError, "it is not an evaluation record to go on with, choose another file")
    settings = json.loads(json.dumps(asdict(protocol)))
    settings.pop("pools")  # an encoder may have its own
    wanted = {"encoder": {}, "protocol": settings}
    for one in there["encoders"].values():
        check_same(one["record"], wanted, sets, out)
    again = {key: asked[key] for key in ("command", "date", "commit", "machine", "versions")}
    return {**asked, **there, "failed": {}, "resumed": [*there.get("resumed", []), again]}


@contextlib.contextmanager
def _folder(stores: Path | None, out: Path | None) -> Iterator[Path]:
    if stores is None and out is None:
        with tempfile.TemporaryDirectory(prefix="micl-zoo-") as folder:
            yield Path(folder)
    else:
        yield stores or Path(out or "").with_suffix(".stores")


def _measure(
    record: dict[str, Any], text: str, sets: Sequence[LabelledSet], protocol: Protocol, passes: Passes,
    baselines: Sequence[Baseline], *, device: str, out: Path | None, command: str,
) -> None:  # fmt: skip
    """Measure one encoder into the record, which has it from its first set on."""
    encoder = load(text, device=device)
    protocol = protocol_for(encoder, protocol)
    one, asked = record["encoders"].get(text), new_record(encoder, protocol, command)
    if one is None:
        one = {"record": asked, **_facts(encoder, protocol), "embedded": {}, "right": {}}
    else:
        resumed(one["record"], asked, sets, out or Path())

    def keep(labelled: LabelledSet, test: Features, outcomes: Outcomes) -> None:
        refused = set(test.refused)
        embedded = np.array([[name not in refused for name in labelled.test.index.ids]])
        one["embedded"][labelled.name] = asdict(Bits.of(embedded))
        one["right"][labelled.name] = {
            method: {key: asdict(Bits.of(right)) for key, right in keys.items()} for method, keys in outcomes.items()
        }
        one["speed"] = _speed(passes, encoder, sets) or one["speed"]
        record["encoders"][text] = one

    measure(
        one["record"], encoder, sets, protocol, passes, baselines=baselines, keep=keep, save=lambda: _save(record, out)
    )


def _facts(encoder: Encoder, protocol: Protocol) -> dict[str, Any]:
    parameters = sum(one.numel() for one in encoder.parameters())
    terms = encoder.record.license if encoder.record else encoder.config.license
    (width,) = encoder.row_shape(protocol.pools[0])
    return {"width": width, "parameters": parameters, "license": terms, "speed": None}


def _speed(passes: Passes, encoder: Encoder, sets: Sequence[LabelledSet]) -> dict[str, Any] | None:
    """Join how fast the stores of these sets were written, those that were written alike."""
    assert passes.stores is not None
    folders = [folder for labelled in sets for folder in store_folders(passes.stores, encoder, labelled)]
    found: list[Speed] = [speed for folder in folders if (speed := read_speed(folder))]
    if not found:
        return None
    first, *others = found
    for other in others:
        first = first.plus(other) if first.how == other.how else first
    return asdict(first)


def _reason(error: Exception) -> str | None:
    """Say why an encoder could not be measured; None where something else is wrong."""
    if isinstance(error, Interrupted):
        return None
    if isinstance(error, MiclZooError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"it does not fit on the device ({str(error).splitlines()[0]})"
    return None if isinstance(error, OSError) else refused_by_system(error)


def _save(record: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        write_text(out, json.dumps(record, indent=1) + "\n")
