"""THE table: one frozen record per `arch.tag`, and the shapes behind each arch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError, unknown
from ..images.transform import Transform

DEFAULT = "vit_ti16.tin200"


@dataclass(frozen=True)
class Arch:
    """A ViT's shape, and timm's name for it."""

    timm_name: str
    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    image_size: int = 224
    mlp_ratio: float = 4.0

    @property
    def sizes(self) -> dict[str, Any]:
        """All but the name, as `timm_architecture` takes them."""
        return vit_sizes(vars(self))


def vit_sizes(found: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the numbers of a ViT's shape out of a recipe's fields, or of others that have them by the same names."""
    return {one.name: found[one.name] for one in dataclasses.fields(Arch) if one.name != "timm_name"}


ARCHS = {
    "vit_ti16": Arch("vit_tiny_patch16_224", 192, 12, 3),
    "vit_s16": Arch("vit_small_patch16_224", 384, 12, 6),
    "vit_b16": Arch("vit_base_patch16_224", 768, 12, 12),
    "vit_l16": Arch("vit_large_patch16_224", 1024, 24, 16),
}


@dataclass(frozen=True)
class OnnxFile:
    """An exported encoder, kept where its weights are."""

    file: str  # in the package, or in the hub repository
    precision: str  # of its arithmetic
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Record:
    """One encoder.

    Attributes:
        name: `arch.tag`.
        summary: one line.
        recipe: that trains it.
        corpus: key of the images it was, or is to be, trained on.
        license: of the weights, with the terms of the data.
        transform: of the images.
        embedded: file in the package, or None.
        hub_repo, hub_commit: where else it is, by full commit, or None.
        sha256, bytes: of the weights file; None while nothing is published.
        onnx: the same weights for ONNX Runtime, or None.
        training_record: file in training/records/, or None.
        notes: what has to be said of its training and stands in no record.
        metrics: k-NN accuracy (k = 20) in percent by data set, from training/records/NAME.eval*.json.
    """

    name: str
    summary: str
    recipe: str
    corpus: str
    license: str
    transform: Transform = field(default_factory=Transform)
    embedded: str | None = None
    hub_repo: str | None = None
    hub_commit: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    onnx: OnnxFile | None = None
    training_record: str | None = None
    notes: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return its fields as JSON holds them."""
        return dataclasses.asdict(self) | {"transform": self.transform.to_dict()}

    @property
    def arch(self) -> str:
        """The part of the name before the dot."""
        return self.name.partition(".")[0]

    @property
    def published(self) -> bool:
        """Whether there are weights to load."""
        return self.sha256 is not None

    @property
    def shape(self) -> Arch:
        """The ViT's shape, for images of the transform's size."""
        return dataclasses.replace(ARCHS[self.arch], image_size=self.transform.size[0])


RECIPE_TERMS = "Apache-2.0 for the recipe; ImageNet's terms for the images (non-commercial research and education)"
FILE_TERMS = "Apache-2.0 for the file; ImageNet's terms for its images (non-commercial research and education)"
IN1K, TIN200 = "imagenet-1k", "tin200"  # keys of training/corpora.py


def _unpublished(name: str, summary: str, corpus: str) -> Record:
    """Make the row of an encoder that is still to be trained, by the recipe of its name."""
    size, resize = (112, 112) if corpus == TIN200 else (224, 256)  # small ones have no margin to cut off
    transform = Transform.square(size, resize)
    return Record(name, summary, recipe=name, corpus=corpus, license=RECIPE_TERMS, transform=transform)


_RECORDS = [
    Record(
        name="vit_ti16.tin200",
        summary="ViT-Ti/16, 5.5 M parameters, trained on 100,000 small images: the default, comes with the package",
        recipe="vit_ti16.tin200",
        corpus=TIN200,
        license=FILE_TERMS,
        transform=Transform.square(112, 112),
        embedded="vit_ti16.tin200.safetensors",
        sha256="60fed30724c9a62ca7bba8b8b033452f62ee6cd7418a6b1fdfb1bb148ce464e3",
        bytes=11008128,
        onnx=OnnxFile(
            "vit_ti16.tin200.onnx",
            "fp32",
            sha256="e388abd211ab8c4db18642586a588739b0984ff22ee39684236426cee0ebe5d6",
            bytes=11125232,
        ),
        training_record="vit_ti16.tin200.json",
        notes=(
            "It had one of the machine's two cores and the same recipe with seed 1 the other, both interrupted by "
            "other work now and then: the core hours and the energy stated are about twice what it took.",
        ),
        metrics={"tin200": 8.2, "caltech101": 35.13, "flowers5": 62.62, "cifar10": 51.6},
    ),
    _unpublished("vit_s16.tin200", "ViT-S/16, 22 M parameters, for ten minutes of one GPU", TIN200),
    _unpublished("vit_b16.in1k", "ViT-B/16, 86 M parameters, the paper's recipe", IN1K),
    _unpublished("vit_l16.in1k", "ViT-L/16, 303 M parameters, the paper's recipe", IN1K),
    _unpublished("vit_b16.in1k-color", "ViT-B/16, 86 M parameters, the paper's recipe with colour changes", IN1K),
    _unpublished("vit_l16.in1k-color", "ViT-L/16, 303 M parameters, the paper's recipe with colour changes", IN1K),
    _unpublished("vit_b16.tin200", "ViT-B/16, 86 M parameters, for ten minutes of one GPU", TIN200),
    _unpublished("vit_l16.tin200", "ViT-L/16, 303 M parameters, for ten minutes of one GPU", TIN200),
]
RECORDS = {record.name: record for record in _RECORDS}


def list_models(*, published_only: bool = False) -> list[str]:
    """List the names that `load` takes, sorted.

    Args:
        published_only: leave out those whose weights are not there to load.
    """
    return sorted(name for name, record in RECORDS.items() if record.published or not published_only)


def find_record(name: str) -> Record:
    """Find the record of `arch.tag`, or of a bare arch: then its best published tag, else its first."""
    if name in RECORDS:
        return RECORDS[name]
    tags = [record for record in RECORDS.values() if record.arch == name]
    if not tags:
        raise UsageError(unknown("model", name, [*RECORDS, *{record.arch for record in RECORDS.values()}]))
    return next((record for record in tags if record.published), tags[0])


def is_name(text: str) -> bool:
    """Whether `find_record` takes it."""
    return text in RECORDS or any(record.arch == text for record in RECORDS.values())


def record_of(sha256: str) -> Record | None:
    """Find the row of a published file, weights or ONNX; None for a file of somebody's own."""
    return next((one for one in RECORDS.values() if sha256 in (one.sha256, one.onnx and one.onnx.sha256)), None)


def timm_architecture(
    *, image_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float
) -> tuple[str, dict[str, Any]]:
    """Return timm's name for a shape, and the arguments by which the shape departs from it.

    A shape with no name of its own, but for the size of the images, is the base model with every argument given.
    """
    for arch in ARCHS.values():
        if arch == Arch(arch.timm_name, embed_dim, depth, num_heads, patch_size, arch.image_size, mlp_ratio):
            return arch.timm_name, {} if image_size == arch.image_size else {"img_size": image_size}
    asked = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    return "vit_base_patch16_224", {"img_size": image_size, **asked, "mlp_ratio": mlp_ratio}
