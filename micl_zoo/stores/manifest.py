"""Manifest: what all rows of a store have in common, as manifest.json holds it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal

from ..encoders.device import PRECISIONS
from ..errors import StoreError, unknown
from ..files import Folder
from ..schema import MAX_BYTES, Between, parse_json, read, shown
from ..zoo.pools import Pool

FORMAT_VERSION: Literal[2] = 2
LATER_FIELDS = ("source", "image_size")  # which stores of earlier versions have not
MANIFEST_FILE = "manifest.json"
MAX_NUMBERS = 1 << 26  # per row: 256 MB in float32; all patches of a large ViT are 1 << 22
FREE_FIELDS = ("command", "versions", "rows", "shards", "index_sha256", "license")  # may differ when a store is resumed
SOURCE = re.compile(r"(hf-hub:[\w.-]+(/[\w.-]+)?|[\w.-]+)@[0-9a-f]{40}", re.ASCII)  # no path on this machine
CURE = "the files beside it are as they were; give another folder, or extract with --overwrite"

Runtime = Literal["torch", "torch compiled", "openvino", "onnx"]
Count = Annotated[int, Between(0, 1 << 40)]


@dataclass(frozen=True)
class Manifest:
    """What all rows of a store have in common; resuming needs the identifying fields to agree."""

    model: str  # name of the encoder, `arch.tag`
    weights_sha256: str  # checksum of the weights file; of changed or random weights, of the one `save` writes
    transform: str  # id of the transform
    decoding: str  # id of the decoding, from bytes to pixels: exact or fast, EXIF; in earlier versions the pixel limit
    runtime: Runtime  # what ran the model when the store was begun; a part says by what it was made
    precision: str  # a key of PRECISIONS, in which the model ran; "int8" for an ONNX file
    pool: Pool
    normalized: bool  # whether embeddings have unit length
    dtype: Literal["float16", "float32"]  # data type of the stored embeddings
    # of one row: [D], or [h, w, D] for patches; rows are stored flat
    shape: Annotated[list[Annotated[int, Between(1, MAX_NUMBERS)]], Between(1, 3)]
    shard_rows: Annotated[int, Between(1, 1 << 32)]  # most images per shard
    command: str  # that made the store
    versions: dict[str, str]  # of the packages that made it
    rows: Count | None = None  # images in the index, refused ones included; these three are None until all are listed
    shards: Count | None = None
    index_sha256: str | None = None  # fingerprint of the index
    source: str | None = None  # where the encoder was found on the hub, with the commit; None: it was not
    image_size: Annotated[int, Between(1, 4096)] | None = None  # that was asked for in the place of the encoder's own
    license: str | None = None  # of the weights
    format_version: Literal[2] = FORMAT_VERSION  # of this layout

    def __post_init__(self) -> None:
        if prod(self.shape) > MAX_NUMBERS:
            raise ValueError(f"shape {self.shape} is more than {MAX_NUMBERS:,} numbers per row")
        if self.precision not in PRECISIONS:
            raise ValueError(unknown("precision", self.precision, PRECISIONS))
        if self.source is not None and not SOURCE.fullmatch(self.source):
            raise ValueError(f"source is {shown(self.source)}, which is no encoder of the hub at one commit")

    @property
    def dim(self) -> int:
        """Numbers per row."""
        return prod(self.shape)

    def differences(self, other: Manifest) -> list[str]:
        """List the fields that keep two manifests from being of one store, as 'field: … in the store, … asked for'.

        Where only one says a later field, checksum and transform have to do: the same encoder may come from a folder.
        """
        mine, theirs = self._identity(), other._identity()
        unlike = [name for name in mine if name in theirs and mine[name] != theirs[name]]
        return [f"{name}: {mine[name]!r} in the store, {theirs[name]!r} asked for" for name in unlike]

    @property
    def digest(self) -> str:
        """Hash what resuming needs to agree; each part carries it, so that a part of another store is told.

        A field that a later version adds must be left out where it has its default, lest the parts of before differ.
        """
        return fields_sha256(self._identity())

    def _identity(self) -> dict[str, Any]:
        found = {name: value for name, value in dataclasses.asdict(self).items() if name not in FREE_FIELDS}
        found = {name: value for name, value in found.items() if name not in LATER_FIELDS or value is not None}
        found["decoding"] = re.sub(r"-max\d+$", "", self.decoding)  # a limit changes no accepted pixel
        # These compute the same numbers within the tolerance of the precision. An ONNX file has weights of its own.
        found["runtime"] = "onnx" if self.runtime == "onnx" else "torch or openvino"
        return found


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Write manifest.json, with a checksum."""
    fields = dataclasses.asdict(manifest)
    text = json.dumps(fields | {"sha256": fields_sha256(fields)}, indent=2) + "\n"
    folder.write(MANIFEST_FILE, text.encode())


def read_manifest(folder: Folder) -> tuple[Manifest, bool | None]:
    """Read manifest.json; also whether its checksum is right, None where it has none: an earlier version wrote it.

    Raises:
        StoreError: it is missing, damaged, or of another version.
    """
    where = folder.at(MANIFEST_FILE)
    try:
        data = folder.read(MANIFEST_FILE, MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{str(folder)!r} is no store of embeddings: it has no {MANIFEST_FILE}") from None
    except OSError as error:
        raise StoreError(f"cannot read {where!r}: {error.strerror or error}") from None
    fields = parse_json(data, repr(where), StoreError, CURE)
    version = fields.get("format_version") if isinstance(fields, dict) else FORMAT_VERSION
    if type(version) is int and version != FORMAT_VERSION:
        cure = "upgrade micl-zoo" if version > FORMAT_VERSION else "extract it again"
        raise StoreError(f"{where!r} has layout version {version}, this micl-zoo reads {FORMAT_VERSION}: {cure}")
    sha256 = fields.pop("sha256", None) if isinstance(fields, dict) else None
    manifest = read(Manifest, fields, repr(where), StoreError, CURE)
    return manifest, None if sha256 is None else sha256 == fields_sha256(fields)


def fields_sha256(fields: dict[str, Any]) -> str:
    """Hash fields of a manifest; its own hash is over all the others."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
