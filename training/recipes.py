"""Every number of a pre-training run, as frozen dataclasses made by one function a recipe."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from micl_zoo.errors import UsageError, unknown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Recipe:
    """The resolved numbers of one run; what is not here is not a choice.

    Attributes:
        name: of the recipe, `arch.tag`.
        corpus: what it is meant to be trained on.
        image_size: side in pixels of the images the finished encoder takes.
        patch_size, embed_dim, depth, num_heads, mlp_ratio, norm_eps: of the ViT.
        mask_ratio: share of a crop's patches that neither view sees.
        kappa, temperature: of the tSP similarity.
        negatives: "local", those of the same process (the reference code), or "global", those of all.
        crop_size: side in pixels of the training crops; when below image_size, positions are stretched.
        crop_scale_min, crop_scale_max: area of a crop as a share of the image.
        crop_ratio_min, crop_ratio_max: its width / height before it is resized to a square.
        interpolation: filter of that resize, antialiased.
        flip_probability: of a horizontal flip.
        pixel_mean, pixel_std: RGB, for pixels in 0..1.
        view_color: draw a gain, a bias and greyscale per view (not in the paper).
        color_gain, color_bias: half-widths of the uniform draws, per channel, on normalised pixels.
        grey_probability: of a view without colour.
        cache: "memory" decodes the corpus once to source_size; "none" cuts every crop from the full image, in workers.
        source_size: side in pixels of the cached images.
        epochs, warmup_epochs: length of the run and of the linear warm-up.
        batch_size: images a step, over all processes.
        base_lr: learning rate at batch 256; the one used is base_lr * batch_size / 256.
        min_lr: where the half-cycle cosine ends.
        beta1, beta2, weight_decay: of AdamW; no decay on biases and norms.
        compile: compile the transformer blocks; on a CPU this needs a C++ compiler and a minute at the start.
        save_dtype: of the finished encoder's file.
        precision: "auto" is bf16 autocast where the device computes it fast, else fp32.
        seed: of the initialisation, the order and every draw.
        checkpoint_minutes: time between checkpoints; one is always written at the end.
    """

    name: str
    corpus: str
    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    mask_ratio: float = 0.8
    kappa: float = 1 / 64
    temperature: float = 0.07
    negatives: Literal["local", "global"] = "local"
    crop_size: int = 224
    crop_scale_min: float = 0.2
    crop_scale_max: float = 1.0
    crop_ratio_min: float = 3 / 4
    crop_ratio_max: float = 4 / 3
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip_probability: float = 0.5
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    pixel_std: tuple[float, float, float] = IMAGENET_STD
    view_color: bool = False
    color_gain: float = 0.4
    color_bias: float = 0.4
    grey_probability: float = 0.2
    cache: Literal["memory", "none"] = "none"
    source_size: int = 256
    epochs: float = 200
    warmup_epochs: float = 10
    batch_size: int = 1800
    base_lr: float = 5e-5
    min_lr: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.05
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    save_dtype: Literal["float32", "float16"] = "float32"
    seed: int = 0
    checkpoint_minutes: float = 10

    @property
    def lr(self) -> float:
        """Peak learning rate: base_lr * batch_size / 256."""
        return self.base_lr * self.batch_size / 256

    @property
    def num_patches(self) -> int:
        """N, patches of one training crop."""
        return (self.crop_size // self.patch_size) ** 2

    def __post_init__(self) -> None:
        whole = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "crop_size", "source_size")
        if wrong := [name for name in whole if getattr(self, name) < 1]:
            raise UsageError(f"recipe {self.name}: {wrong[0]} must be at least 1, got {getattr(self, wrong[0])}")
        must = {
            "norm_eps must be 1e-06, which is what timm's names for a ViT mean": self.norm_eps == 1e-6,
            "seed must be at least 0": self.seed >= 0,
            f"warmup_epochs must be from 0 to epochs {self.epochs:g}": 0 <= self.warmup_epochs <= self.epochs,
            f"crop_size must be a multiple of patch_size {self.patch_size}": self.crop_size % self.patch_size == 0,
            f"image_size must be a multiple of patch_size {self.patch_size}": self.image_size % self.patch_size == 0,
            f"embed_dim must be a multiple of num_heads {self.num_heads}": self.embed_dim % self.num_heads == 0,
            "batch_size must be at least 2: each image needs a negative": self.batch_size >= 2,
            "mask_ratio must be at least 0 and below 1": 0 <= self.mask_ratio < 1,
            "temperature must be above 0": self.temperature > 0,
            "epochs must be above 0": self.epochs > 0,
            "crop_scale_min must be above 0 and crop_scale_max at most 1": 0
            < self.crop_scale_min
            <= self.crop_scale_max
            <= 1,
        }
        if broken := [rule for rule, kept in must.items() if not kept]:
            raise UsageError(f"recipe {self.name}: " + "; ".join(f"{rule}, got {self._got(rule)}" for rule in broken))

    def _got(self, rule: str) -> object:
        return getattr(self, rule.split()[0])


def vit_b16_in1k() -> Recipe:
    """ViT-B/16 on ImageNet-1k as the paper's code trains by default.

    Command: `micl-zoo train vit_b16.in1k --data /data/imagenet/train --out runs/vit_b16`
    Hardware: 4 x A100 in the paper; this repository has not run it. Hours: not measured. Score: not measured.
    The reference batch is 1800 a GPU with negatives of the same GPU; one process here takes 1800 images in all.
    """
    return Recipe(name="vit_b16.in1k", corpus="ImageNet-1k train, 1,281,167 images")


def vit_l16_in1k() -> Recipe:
    """ViT-L/16 on ImageNet-1k as the paper's code trains by default.

    Command: `micl-zoo train vit_l16.in1k --data /data/imagenet/train --out runs/vit_l16`
    Hardware: 4 x A100 in the paper, which states 133 h and 85.8 % after fine-tuning; this repository has not run it.
    The sources disagree on batch, epochs and learning rate (docs/method.md); these are the code's defaults.
    """
    return Recipe(
        name="vit_l16.in1k", corpus="ImageNet-1k train, 1,281,167 images", embed_dim=1024, depth=24, num_heads=16
    )


def vit_ti16_tin200() -> Recipe:
    """ViT-Ti/16 on 100,000 images of 64 x 64 (Tiny ImageNet-200): the encoder that comes with the package.

    Command: `micl-zoo train vit_ti16.tin200 --data "tin200/train-*.parquet" --out runs/vit_ti16.tin200`
    Hardware: 2 CPU cores with bf16. Hours: 1.5. Score: k-NN 26.8 % on caltech101, 43.8 % on cifar10, 48.5 % on flowers5
    and 5.6 % on tin200 (training/records/vit_ti16.tin200.json, with the baselines).
    Differs from the paper: crops of 112 with 24 of 49 patches, stretched positions, colour changes per view.
    """
    return Recipe(
        name="vit_ti16.tin200",
        corpus="Tiny ImageNet-200 train, 100,000 images of 64 x 64",
        embed_dim=192,
        num_heads=3,
        mask_ratio=0.5,  # 24 of 49 patches, 12 a view
        crop_size=112,
        view_color=True,
        cache="memory",
        source_size=64,
        epochs=12,
        warmup_epochs=0.5,
        batch_size=512,
        base_lr=5e-4,  # 1e-3 at batch 512
        compile=True,
        save_dtype="float16",  # 11 MB, so that it can come with the package
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "vit_b16.in1k": vit_b16_in1k,
    "vit_l16.in1k": vit_l16_in1k,
    "vit_ti16.tin200": vit_ti16_tin200,
}


def get_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe by name, with `key=value` changes.

    Raises:
        UsageError: a name, a key or a value that does not exist; the nearest names are listed.
    """
    if name not in RECIPES:
        raise UsageError(unknown("recipe", name, RECIPES))
    recipe = RECIPES[name]()
    changes = dict(_parse_override(override) for override in overrides)
    return dataclasses.replace(recipe, **changes)


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    types = get_type_hints(Recipe)
    if not equals:
        raise UsageError(f"--set takes key=value, got {text!r}")
    if key not in types:
        raise UsageError(unknown("recipe field", key, types))
    try:
        return key, _convert(value, types[key])
    except ValueError:
        raise UsageError(f"{key}={value}: expected {_describe(types[key])}") from None


def _convert(value: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(value)
        return value
    if get_origin(kind) is tuple:
        numbers = json.loads(f"[{value}]")
        if len(numbers) != len(get_args(kind)):
            raise ValueError(value)
        return tuple(float(number) for number in numbers)
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(value)
        return value.lower() == "true"
    return kind(value)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"{len(get_args(kind))} numbers with commas between"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
