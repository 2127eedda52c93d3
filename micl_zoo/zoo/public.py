"""The curated table of other people's encoders, by timm's names: what their own code takes, and what they cost.

Where a row has a pool or a transform, timm's default for the same weights is another, and embeddings differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..images.transform import Filter, Transform
from .pools import Pool

IMAGENET: Any = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP: Any = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
HALF: Any = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


# From pixels to rows, by benchmarks/encoders.py.
SPEED_RECORD = "benchmarks/records/2026-11-28-encoders.json"
SPEED_ON = "2 cores of an Intel Xeon with AMX, OpenVINO in bf16"
IMAGES_PER_SECOND = {
    "vit_small_patch14_reg4_dinov2.lvd142m": 41.4,
    "vit_base_patch14_reg4_dinov2.lvd142m": 11.6,
    "vit_small_patch16_dinov3.lvd1689m": 31.0,
    "vit_base_patch16_dinov3.lvd1689m": 9.5,
    "vit_base_patch16_siglip_224.v2_webli": 13.4,
    "vit_base_patch32_clip_quickgelu_224.openai": 48.2,
    "vit_pe_core_base_patch16_224.fb": 7.8,
    "vit_base_patch16_224.mae": 13.0,
    "vit_base_patch16_224.dino": 13.1,
    "convnext_tiny.in12k_ft_in1k": 32.1,
    "resnet50.a1_in1k": 69.2,
}


@dataclass(frozen=True)
class Public:
    """One encoder whose weights timm has.

    Attributes:
        name: timm's, `arch.tag`.
        license: as timm's table says; the card on the hub is what counts, and is shown when the weights are fetched.
        width: numbers per embedding by the pool.
        parameters: in all, the projection among them.
        gmacs: 1e9 multiplications with addition per image of the transform's size, of matrix products and convolutions.
        pool: that reference code takes.
        transform: that reference code takes, where timm's differs; None is the one in the repository.
        why: what timm has in its place, and where the row's choice comes from.
        knn, linear: published accuracy on ImageNet-1k in percent, k-NN and linear probe.
        figures: where these were published.
        repo: on the hub; "" is timm's of the same name.
        size: side of the images in pixels, where there is no transform here.
    """

    name: str
    license: str
    width: int
    parameters: int
    gmacs: float
    pool: Pool = "native"
    transform: Transform | None = None
    why: str = ""
    knn: float | None = None
    linear: float | None = None
    figures: str = ""
    repo: str = ""
    size: int = 224

    @property
    def pixels(self) -> int:
        """Side of the images."""
        return self.transform.size[0] if self.transform else self.size

    @property
    def images_per_second(self) -> float | None:
        """Measured by benchmarks/encoders.py, see SPEED_RECORD; None where nobody has."""
        return IMAGES_PER_SECOND.get(self.name)

    @property
    def repository(self) -> str:
        """Where its weights are on the hub."""
        return self.repo or f"timm/{self.name}"


def _dinov2(size: str, width: int, parameters: int, gmacs: float, knn: float, linear: float) -> Public:
    why = "224 of 256 pixels, as in the evaluations of facebookresearch/dinov2; timm takes 518, 5.3 times the patches"
    return Public(
        *(f"vit_{size}_patch14_reg4_dinov2.lvd142m", "apache-2.0", width, parameters, gmacs),
        pool="cls",
        transform=Transform.square(224, 256, **IMAGENET),
        why=why,
        knn=knn,
        linear=linear,
        figures="README of facebookresearch/dinov2, models with registers",
    )


def _dinov3(size: str, width: int, parameters: int, gmacs: float) -> Public:
    why = "the class token, as in facebookresearch/dinov3; timm takes the mean of the patches (issue 2681)"
    row = (f"vit_{size}_patch16_dinov3.lvd1689m", "dinov3-license", width, parameters, gmacs)
    return Public(*row, pool="cls", why=why, size=256)


def _squashed(size: int, interpolation: Filter) -> Transform:
    return Transform((size, size), (size, size), "squash", interpolation, **HALF)


def _siglip2(name: str, size: int, width: int, parameters: int, gmacs: float) -> Public:
    why = "both sides are resized and nothing is cut off, as in open_clip's table; timm crops to 90 %"
    return Public(name, "apache-2.0", width, parameters, gmacs, transform=_squashed(size, "bicubic"), why=why)


def _clip(arch: str, width: int, parameters: int, gmacs: float) -> Public:
    why = (
        "the projection, QuickGELU and the whole square, as in openai/CLIP; the repository's own configuration says "
        "GELU, and timm cuts 10 % off the images of some"
    )
    return Public(
        *(f"{arch}_clip_quickgelu_224.openai", "apache-2.0", width, parameters, gmacs),
        pool="projection",
        transform=Transform.square(224, 224, **CLIP),
        why=why,
        repo=f"timm/{arch}_clip_224.openai",
    )


def _pe(name: str, size: int, parameters: int, gmacs: float) -> Public:
    why = "the projection, and both sides resized by bilinear, as in open_clip's table; timm crops, by bicubic"
    row = (name, "apache-2.0", 1024, parameters, gmacs)
    return Public(*row, pool="projection", transform=_squashed(size, "bilinear"), why=why)


def _tipsv2(size: str, width: int, parameters: int, gmacs: float, knn: float) -> Public:
    row = (f"vit_{size}_patch14_reg1_tipsv2.webli", "apache-2.0", width, parameters, gmacs)
    return Public(*row, pool="cls", knn=knn, figures="TIPSv2's authors", size=448)


_PUBLIC = [
    _dinov2("small", 384, 21_629_952, 6.23, 79.1, 80.9),
    _dinov2("base", 768, 85_727_232, 23.54, 82.0, 84.6),
    _dinov2("large", 1024, 303_230_976, 82.32, 83.8, 86.7),
    _dinov3("small", 384, 21_586_944, 6.25),
    _dinov3("base", 768, 85_641_216, 23.57),
    _dinov3("large", 1024, 303_079_424, 82.37),
    _siglip2("vit_base_patch16_siglip_224.v2_webli", 224, 768, 92_884_224, 17.71),
    _siglip2("vit_so400m_patch14_siglip_378.v2_webli", 378, 1152, 428_225_600, 335.17),
    _clip("vit_base_patch32", 512, 87_849_728, 4.41),
    _clip("vit_large_patch14", 768, 303_966_976, 81.01),
    _pe("vit_pe_core_base_patch16_224.fb", 224, 93_673_984, 17.80),
    _pe("vit_pe_core_large_patch14_336.fb", 336, 317_152_256, 192.18),
    _tipsv2("base", 768, 86_314_752, 107.01, 79.8),
    _tipsv2("large", 1024, 304_014_336, 362.20, 82.5),
    Public("vit_base_patch16_224.mae", "cc-by-nc-4.0", 768, 85_798_656, 17.56, "cls"),
    Public("vit_base_patch16_224.dino", "apache-2.0", 768, 85_798_656, 17.56, "cls"),
    Public("convnext_tiny.in12k_ft_in1k", "apache-2.0", 768, 27_820_128, 4.45),
    Public("resnet50.a1_in1k", "apache-2.0", 2048, 23_508_032, 4.09),
]
PUBLIC = {one.name: one for one in _PUBLIC}


def row_of(name: str | None, repo: str) -> Public | None:
    """Find the row of an encoder by timm's name; without one, of the repository that holds it."""
    if name is not None:
        return PUBLIC.get(name)
    return next((one for one in _PUBLIC if one.repository == repo), None)


def is_cached(row: Public) -> bool:
    """Whether the weights of a public encoder are in the cache of the hub on this machine, of whatever commit."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{row.repository.replace('/', '--')}" / "snapshots"
    return any(folder.glob("*/*.safetensors"))
