"""Published files: from the package or the hub, their sha256 checked on every load, or copied into a folder."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path

from ..errors import UsageError, WeightsError
from ..files import atomic_path, file_sha256
from ..schema import read_json
from .names import Place, find_place
from .ours import Record
from .pins import Pin, PinnedFile
from .public import Public, row_of
from .weights import CONFIG_FILE, ONNX_FILE, WEIGHTS_FILE, EncoderConfig, Weights, config_text, header

logger = getLogger(__name__)


@dataclass(frozen=True)
class Placed:
    """A file in the folder."""

    path: Path
    bytes: int
    sha256: str
    kept: bool  # it was there already


def download(name: str, folder: str | os.PathLike[str], *, onnx: bool = False, overwrite: bool = False) -> list[Placed]:
    """Put `config.json` and `model.safetensors` of an encoder into a folder, which `load` takes without a network.

    They come from the package, or from the hub by full commit, and have the sha256 of the table or of the hub. A file
    that is there with the right bytes stays, so repeating an interrupted call completes it.

    Args:
        name: of our table, of the hub or of timm, see `load`.
        folder: made if need be.
        onnx: put `model.onnx` there, too.
        overwrite: replace files with other bytes.

    Raises:
        UsageError: no such name, or the folder has one of the files with other bytes.
        WeightsError: not published, not reachable, or not the right bytes.
    """
    place, folder = find_place(name), Path(folder)
    if place.path is not None:
        raise UsageError(f"{str(place.path)!r} is on this machine: copy it")
    record = place.record
    if record and record.sha256 is None:
        raise WeightsError(not_published(record))
    if onnx and (record is None or record.onnx is None):
        raise WeightsError(f"no ONNX file of {name} is published: leave onnx out, and export it from the folder")
    sha256 = record.sha256 if record else _hub_sha256(place.pinned)
    weights, config, exported = (folder / file for file in (WEIGHTS_FILE, CONFIG_FILE, ONNX_FILE))
    wanted = {weights: sha256} | ({exported: record.onnx.sha256} if onnx and record and record.onnx else {})
    kept = {file: _is_there(file, sum_, overwrite) for file, sum_ in wanted.items()}  # raises before any download
    sources = {weights: weights if kept[weights] else _weights(place).path}
    body = header(sources[weights])["config"] if record else hub_config(place).to_dict()  # ours as it is on the hub
    text = config_text(body).encode()
    wanted[config] = hashlib.sha256(text).hexdigest()
    kept[config] = _is_there(config, wanted[config], overwrite)
    if onnx and record:
        sources[exported] = exported if kept[exported] else record_onnx(record)[0]
    for file, sum_ in wanted.items():
        if not kept[file]:
            _place(file, sources.get(file, text), sum_)
    return [Placed(file, file.stat().st_size, sum_ or file_sha256(file), kept[file]) for file, sum_ in wanted.items()]


def _weights(place: Place) -> Weights:
    return record_weights(place.record) if place.record else hub_weights(place)


def _hub_sha256(pin: Pin) -> str:
    """Return the sha256 of the weights, which the hub does not tell of files that are small."""
    return pin.files[pin.weights].sha256 or file_sha256(pin.fetch(pin.weights))


def hub_config(place: Place) -> EncoderConfig:
    """Say how to build an encoder of the hub: its own configuration, with the choices of the curated table.

    Raises:
        WeightsError: it cannot be had, or is no timm configuration.
    """
    pin = place.pinned
    config, row = _own_config(pin), row_of(place.architecture, pin.repo)
    if architecture := place.architecture or (row and row.name):
        config = replace(config, name=architecture, architecture=architecture.partition(".")[0])
    if place.architecture and (usual := row_of(None, pin.repo)):
        logger.warning("%s is not what its authors run, that is %s: %s", config.name, usual.name, usual.why)
    config = with_row(config, row)
    return replace(config, license=pin.license or config.license, source=place.source)


def _own_config(pin: Pin) -> EncoderConfig:
    if CONFIG_FILE not in pin.files:
        way_on = f"take a repository of timm's layout, or put timm's {CONFIG_FILE} beside its weights in a folder"
        raise WeightsError(f"{pin.source} has no {CONFIG_FILE}, so it does not say how to build its encoder: {way_on}")
    return EncoderConfig.from_dict(read_json(pin.fetch(CONFIG_FILE), WeightsError), where=pin.source, tagged=True)


def with_row(config: EncoderConfig, row: Public | None) -> EncoderConfig:
    """Return it with the choices of its row of the curated table, if it has one."""
    return replace(config.with_transform(row.transform or config.transform), pool=row.pool) if row else config


def hub_weights(place: Place) -> Weights:
    """Fetch the weights of an encoder of the hub, by the sha256 that the hub tells.

    Raises:
        WeightsError: see `Pin.fetch` and `hub_config`; or their header says something else than config.json.
    """
    pin, name = place.pinned, place.pinned.weights  # raises before anything is fetched
    config = hub_config(place)
    file = replace(pin, license=config.license).fetch(name)  # shows it
    if (said := header(file).get("config")) is not None:  # by which a downloaded folder is built
        both = EncoderConfig.from_dict(said, where=pin.source, tagged=True), _own_config(pin)
        if replace(both[0], license=both[1].license) != both[1]:
            differ = f"{CONFIG_FILE} and the header of {name} say differently how to build its encoder"
            raise WeightsError(f"{pin.source} contradicts itself, {differ}: take another commit, or save it again")
    return Weights(file, config, checked=pin.files[name].sha256)


def _is_there(file: Path, sha256: str | None, overwrite: bool) -> bool:
    """Return whether the file exists with the right bytes; raise if others are in its place."""
    found = file_sha256(file) if file.exists() and sha256 else None
    if found not in (None, sha256) and not overwrite:
        bytes_found = f"other bytes: sha256 {found}, published {sha256}"
        raise UsageError(f"{str(file)!r} is there with {bytes_found}. Take another folder, or overwrite")
    return found == sha256


def _place(file: Path, source: Path | bytes, sha256: str | None) -> None:
    """Write a file whole or not at all, and only if its copy has the right bytes."""
    with atomic_path(file) as temporary:
        if isinstance(source, bytes):
            temporary.write_bytes(source)
        else:
            shutil.copyfile(source, temporary)
        if sha256 is not None and (found := file_sha256(temporary)) != sha256:
            raise WeightsError(f"the copy to {str(file)!r} has sha256 {found}, expected {sha256}: try it again")


def record_weights(record: Record) -> Weights:
    """Find the weights of a row of the table, in the package or on the hub."""
    if not record.embedded and not (record.hub_repo and record.hub_commit):
        raise WeightsError(not_published(record))
    file = _published(record, "weights", record.embedded or WEIGHTS_FILE, record.sha256)
    config = EncoderConfig.from_dict(header(file).get("config", {}), where=record.name)
    assert config.transform == record.transform, (config.transform, record.transform)
    return Weights(file, config, checked=record.sha256)


def record_onnx(record: Record) -> tuple[Path, str]:
    """Find the ONNX file of a row of the table, where its weights are, and its sha256."""
    if record.onnx is None:
        way_on = f'micl-zoo export {record.name} -o DIR, and then micl_zoo.load("DIR", backend="onnx")'
        raise WeightsError(f"no ONNX file of {record.name} comes with micl-zoo: {way_on}")
    return _published(record, "ONNX file", record.onnx.file, record.onnx.sha256), record.onnx.sha256


def _published(record: Record, what: str, name: str, sha256: str | None) -> Path:
    """Find a published file and check its bytes."""
    if not record.embedded:
        repo, commit = record.hub_repo, record.hub_commit
        assert repo
        assert commit
        assert sha256
        return Pin(repo, commit, record.license, {name: PinnedFile(None, sha256)}).fetch(name)
    file = embedded_file(name)
    if (found := file_sha256(file)) != sha256:
        raise WeightsError(
            f"the bytes of {name}, {what} of {record.name}, are not the published ones: sha256 {found}, expected "
            f"{sha256}. Reinstall micl-zoo."
        )
    return file


def embedded_file(name: str) -> Path:
    """Return a file that comes with the package."""
    file = Path(__file__).parents[1] / "embedded" / name
    if not file.is_file():
        raise WeightsError(f"the package is incomplete: {name} is missing. Reinstall micl-zoo.")
    return file


def not_published(record: Record) -> str:
    """Return the text for an encoder without weights: the three ways on."""
    arch = record.arch
    return (
        f"no weights of {record.name} are published yet. Three ways on: "
        f"(1) train it: micl-zoo train {record.recipe} --data IMAGES --out RUN; "
        f'(2) load weights of your own: micl_zoo.load("RUN"); '
        f'(3) start from random weights: micl_zoo.load("{arch}", pretrained=False).'
    )
