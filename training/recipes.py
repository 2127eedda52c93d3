"""Every number of a run, pre-training or fine-tuning, as frozen dataclasses made by one function per recipe."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from micl_zoo.errors import TrainingError, UsageError, unknown
from micl_zoo.images.transform import Filter, Transform
from micl_zoo.schema import Between, read, wrong_fields, wrong_value
from micl_zoo.zoo.config import MAX_GRID, MAX_PARAMETERS, NAME, Depth, Heads, Ratio, Side, Width
from micl_zoo.zoo.ours import ARCHS, IN1K, TIN200

from .corpora import CORPORA, corpus_key

# Ranges of a run; those of a network are what `load` takes.
Count = Annotated[int, Between(1, 2**20)]
Workers = Annotated[int, Between(0, 4096)]
Many = Annotated[int, Between(1, 2**53)]
Views = Annotated[int, Between(2, 4)]
Chance = Annotated[float, Between(0, 1)]
Amount = Annotated[float, Between(0, 1e6)]
Positive = Annotated[float, Between(1e-6, 1e6)]
Spread = Annotated[float, Between(1e-3, 1e3)]
Text = Annotated[str, Between(1, 200)]
Augmentation = Annotated[str, Between(0, 200)]

KEPT_CHECKPOINTS = 2  # the newest, besides those that stay for good


def kept_patches(num_patches: int, mask_ratio: float, views: int = 2) -> int:
    """K, the patches that stay visible, as many in each view (reference code, for two views)."""
    kept = math.floor(num_patches * (1 - mask_ratio)) // views * views
    if num_patches < views:
        raise UsageError(f"{num_patches} patches are too few for {views} views: use a larger crop_size, or fewer views")
    if not kept:
        limit = math.floor(1e4 * (1 - views / num_patches) - 1e-6) / 1e4  # less than exact, which a float may exceed
        count = {2: "two", 3: "three", 4: "four"}.get(views, views)
        raise UsageError(
            f"mask_ratio {mask_ratio} of {num_patches} patches leaves no patch for {count} views: use {limit} at most"
        )
    return kept


@dataclass(frozen=True, kw_only=True)
class AnyRecipe:
    """The numbers that every run has."""

    name: Text  # for pre-training `arch.tag`
    epochs: Positive  # passes over the images
    warmup_epochs: Amount  # length of the linear warm-up
    batch_size: Count  # images per optimiser step, over all processes; even for fine-tuning, as mixup pairs them
    base_lr: Annotated[float, Between(0, 1e38)]  # learning rate at batch 256; the peak is base_lr * batch_size / 256
    min_lr: Amount = 0.0  # at the end of the half-cycle cosine
    beta1: Annotated[float, Between(0, 0.999_999)] = 0.9  # of AdamW's first moment
    beta2: Annotated[float, Between(0, 0.999_999)] = 0.95  # of its second
    weight_decay: Amount = 0.05  # none of biases, norms and positions, and in fine-tuning of the class token
    # Each block learns at layer_decay times the rate of the one above it, and the patch embedding with class token and
    # position table below all of them; 1 is one rate for all.
    layer_decay: Chance = 1.0
    clip_norm: Amount = 0.0  # largest norm of all gradients together, to which longer ones are scaled; 0 is off
    ema_decay: Chance = 0.0  # of a running mean of the weights, which is measured and saved; 0: the weights themselves
    crop_scale_min: Chance = 0.2  # least area of a crop as a share of the image
    crop_scale_max: Chance = 1.0  # largest
    crop_ratio_min: Positive = 3 / 4  # least width / height of a crop before it is resized to a square
    crop_ratio_max: Positive = 4 / 3  # largest
    flip_probability: Chance = 0.5  # chance of a horizontal flip
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the device is fast at it, else fp32
    seed: Annotated[int, Between(0, 2**63 - 1)] = 0  # of the initialisation, the order and every draw
    checkpoint_minutes: Amount = 10  # between checkpoints, of which the last two stay; one is always written at the end
    keep_epochs: Amount = 0  # epochs between checkpoints that stay for good; 0 keeps none

    @property
    def lr(self) -> float:
        """Peak learning rate: base_lr * batch_size / 256."""
        return self.base_lr * self.batch_size / 256

    def total_steps(self, steps_per_epoch: int) -> int:
        """Count the optimiser steps of the run."""
        return max(1, round(self.epochs * steps_per_epoch))

    def warmup_steps(self, total_steps: int) -> float:
        """Length of the linear warm-up in steps of such a run."""
        return total_steps * self.warmup_epochs / self.epochs

    def __post_init__(self) -> None:
        """Raise a UsageError of all that is out of its range, or does not go together."""
        wrong = wrong_fields(self)
        must = {} if wrong else self._rules()
        if wrong := wrong + [
            f"{rule}, got {getattr(self, rule.split()[0])}" for rule, kept in must.items() if not kept
        ]:
            raise UsageError(f"recipe {self.name}: {'; '.join(wrong)}")

    def _rules(self) -> dict[str, bool]:
        """Say what must hold between fields, and whether it does; a rule begins with its field."""
        return {
            f"warmup_epochs must be from 0 to epochs {self.epochs:g}": self.warmup_epochs <= self.epochs,
            "crop_scale_min must be above 0 and crop_scale_max at most 1": (
                0 < self.crop_scale_min <= self.crop_scale_max
            ),
            f"crop_ratio_min must be at most crop_ratio_max {self.crop_ratio_max:g}": (
                self.crop_ratio_min <= self.crop_ratio_max
            ),
            "layer_decay must be above 0 and at most 1": self.layer_decay > 0,
            "ema_decay must be below 1": self.ema_decay < 1,
        }


@dataclass(frozen=True, kw_only=True)
class Recipe(AnyRecipe):
    """The numbers of a pre-training run; what is neither here nor in `AnyRecipe` is not a choice."""

    epochs: Positive = 200
    warmup_epochs: Amount = 10
    batch_size: Count = 1800
    base_lr: Annotated[float, Between(0, 1e38)] = 5e-5
    corpus: Text  # key in CORPORA of the images that the recipe is meant for
    image_size: Side = 224  # side in pixels of the images that the finished encoder takes
    patch_size: Side = 16  # side in pixels of a patch
    embed_dim: Width = 768  # D, width of the ViT
    depth: Depth = 12  # blocks
    num_heads: Heads = 12  # attention heads per block
    mlp_ratio: Ratio = 4.0  # width of a block's MLP / embed_dim
    norm_eps: float = 1e-6  # of the LayerNorms
    mask_ratio: Chance = 0.8  # share of a crop's patches that no view sees
    views: Views = (
        2  # V, disjoint views that the patches kept are split into; the loss is the mean over all their pairs
    )
    # What is contrasted, by the encoder's names for rows: the class token, the mean of a view's patches, or what timm
    # pools of a view's tokens, with a CLIP's projection or without.
    pooled_token: Literal["cls", "mean", "native", "projection"] = "cls"
    class_position: Literal["zero", "centre"] = "zero"  # of the class token; centre: that of the middle of the grid
    # A frozen table; one drawn at the start, trained without decay; or those of the encoder that a run starts from,
    # rotary ones, too, trained without decay.
    positions: Literal["sincos", "learned", "own"] = "sincos"
    prefix_tokens: Annotated[int, Between(0, 65)] = 1  # class token and registers; others than 1 of a run's start only
    frozen_positions: bool = False  # keep the start's own positions
    frozen_embedding: bool = False  # keep its patch embedding
    frozen_blocks: Annotated[int, Between(0, 128)] = 0  # keep its first blocks, and all that comes before them
    held_out: Annotated[int, Between(0, 2**20)] = 0  # images that are not trained on, to see what changes for them
    start_share: Chance = 0.0  # share of the start's weights in the finished ones (WiSE-FT, arXiv 2109.01903)
    kappa: Amount = 1 / 64  # concentration of the tSP similarity
    temperature: Positive = 0.07  # divides the similarity
    # local: a batch falls into groups of contrast_batch images that are contrasted among themselves, as each GPU of the
    # reference code does; global: all images of the batch are contrasted with each other
    negatives: Literal["local", "global"] = "local"
    contrast_batch: Annotated[int, Between(0, 2**20)] = 0  # images per group with local negatives; 0 is the whole batch
    crop_size: Side = 224  # side in pixels of the training crops; when below image_size, positions are stretched
    interpolation: Filter = "bicubic"  # antialiased filter of the resize to crop_size
    pixel_mean: tuple[Chance, Chance, Chance] = Transform.mean  # RGB, for pixels in 0..1
    pixel_std: tuple[Spread, Spread, Spread] = Transform.std  # the same
    view_color: bool = False  # draw a gain, a bias and greyscale per view (not in the paper)
    color_gain: Amount = 0.4  # half-width of the uniform draw of the gain, per channel, on normalised pixels
    color_bias: Amount = 0.4  # of the bias, likewise
    grey_probability: Chance = 0.2  # chance of a view without colour
    cache: Literal["memory", "none"] = "none"  # memory: decoded once to source_size; none: crops of the full images
    source_size: Side = 256  # side in pixels of the cached images
    parallel: Literal["ddp", "fsdp"] = "ddp"  # each process has all weights, or a part of them and of AdamW's state
    activation_checkpointing: bool = False  # compute each block again in the backward pass, to keep less
    compile: bool = False  # the transformer blocks; on a CPU this needs a C++ compiler and a minute at the start
    save_dtype: Literal["float32", "float16"] = "float32"  # of the finished encoder's file

    @property
    def contrast_size(self) -> int:
        """Images that are contrasted with each other; each has one positive and contrast_size - 1 negatives."""
        return self.batch_size if self.negatives == "global" else self.contrast_batch or self.batch_size

    @property
    def grid(self) -> int:
        """Patches along a side of one training crop."""
        return self.crop_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, patches of one training crop."""
        return self.grid**2

    @property
    def kept(self) -> int:
        """K, patches of one training crop that its views see."""
        return kept_patches(self.num_patches, self.mask_ratio, self.views)

    @property
    def patch_numbers(self) -> int:
        """P, numbers of one patch."""
        return 3 * self.patch_size**2

    def _rules(self) -> dict[str, bool]:
        patch, groups = self.patch_size, self.contrast_batch >= 2 and self.batch_size % self.contrast_size == 0
        own = self.positions == "own"  # the network is the start's
        weights = self.depth * self.embed_dim**2 * (4 + 2 * self.mlp_ratio)
        return super()._rules() | {
            "name must be of letters, digits and .-+_, as arch.tag": NAME.fullmatch(self.name) is not None,
            "norm_eps must be 1e-06, which is what timm's names for a ViT mean": own or self.norm_eps == 1e-6,
            "prefix_tokens must be 1, the class token": own or self.prefix_tokens == 1,
            f"frozen_blocks must be at most depth {self.depth}": self.frozen_blocks <= self.depth,
            f"crop_size must be a multiple of patch_size {patch}": self.crop_size % patch == 0,
            f"image_size must be a multiple of patch_size {patch}": self.image_size % patch == 0,
            f"image_size must be at most {MAX_GRID} patches of patch_size {patch}": self.image_size <= MAX_GRID * patch,
            f"crop_size must be at most {MAX_GRID} patches of patch_size {patch}": self.crop_size <= MAX_GRID * patch,
            f"embed_dim must be a multiple of num_heads {self.num_heads}": self.embed_dim % self.num_heads == 0,
            f"embed_dim must make {MAX_PARAMETERS:,} weights at most, with depth and mlp_ratio": weights
            <= MAX_PARAMETERS,
            "batch_size must be at least 2: each image needs a negative": self.batch_size >= 2,
            "contrast_batch must be 0, or at least 2 and divide batch_size": self.contrast_batch == 0 or groups,
            "mask_ratio must be at least 0 and below 1": self.mask_ratio < 1,
            "class_position must be zero with learned positions, which have a row for the class token": (
                self.positions == "sincos" or self.class_position == "zero"
            ),
            "pooled_token must be cls or mean": own or self.pooled_token in ("cls", "mean"),
            "start_share must be 0 without a start": own or not self.start_share,
            "frozen_positions must be false without a start": own or not self.frozen_positions,
            "frozen_embedding must be false without a start": own or not self.frozen_embedding,
            "frozen_blocks must be 0 without a start": own or not self.frozen_blocks,
        }


@dataclass(frozen=True, kw_only=True)
class FineTuneRecipe(AnyRecipe):
    """The numbers of a fine-tuning run; what is neither here nor in `AnyRecipe` is not a choice."""

    epochs: Positive = 100
    warmup_epochs: Amount = 5
    batch_size: Count = 1024
    base_lr: Annotated[float, Between(0, 1e38)] = 5e-4
    min_lr: Amount = 1e-6
    beta2: Annotated[float, Between(0, 0.999_999)] = 0.999
    crop_scale_min: Chance = 0.08
    layer_decay: Chance = 0.65  # the head learns at the full rate
    drop_path: Chance = 0.1  # chance to skip a branch of the last block, rising linearly from 0 at the first
    pool: Literal["mean", "cls"] = (
        "mean"  # the head sees the patches' mean by a new norm, or the class token by the encoder's
    )
    head_std: Amount = 2e-5  # standard deviation of the head's first weights
    mixup: Amount = 0.8  # alpha of the beta distribution that the shares of two images are drawn from; 0 is off
    cutmix: Amount = 1.0  # the same, where a box of one replaces that of the other
    mix_probability: Chance = 1.0  # chance that a batch is mixed at all; by one of the two where both are on
    label_smoothing: Chance = 0.1  # share of each target that is spread over all classes
    augment: Augmentation = "rand-m9-mstd0.5-inc1"  # timm's name of an automatic augmentation; empty is none
    erase_probability: Chance = 0.25  # chance of one rectangle of noise in an image
    eval_epochs: Amount = 0  # between measurements on the test part, which choose nothing; 0 is one at the end

    def _rules(self) -> dict[str, bool]:
        pairs = self.batch_size >= 2 and self.batch_size % 2 == 0
        return super()._rules() | {
            "drop_path must be below 1": self.drop_path < 1,
            "batch_size must be even and at least 2: mixup pairs its images": pairs,
        }


R = TypeVar("R", Recipe, FineTuneRecipe)


def recorded_recipe(record: Mapping[str, Any], what: str = "run.json") -> Recipe:
    """Read the recipe of a run.json, whichever version wrote it; `what` names the file in an error."""
    there, known = record["recipe"], {one.name for one in dataclasses.fields(Recipe)}
    if "mixup" in there:
        raise TrainingError(
            f"that is a fine-tuning run, by recipe {there.get('name')}: its figures are in its result.json and "
            "metrics.jsonl. Give the folder of a pre-training run, which `train --out` wrote."
        )
    kept = {key: value for key, value in there.items() if key in known}
    if isinstance(kept.get("corpus"), str):
        kept["corpus"] = corpus_key(kept["corpus"])  # runs before 0.2 recorded a line of text
    return read(Recipe, kept, f"the recipe in {what}", TrainingError, "give the folder that `train --out` wrote")


def record_differences(there: Mapping[str, Any], asked: Mapping[str, Any], free: Iterable[str] = ()) -> list[str]:
    """List the fields of recipe, data and encoder, in two run.json, that keep two runs from being one.

    A field that one of them lacks had its default; those that change no number may differ, and `free` ones. Runs before
    0.2 know nothing of the marks of their parquet files.
    """
    # The images are told apart by their fingerprint; `corpus` is only what the recipe is meant for.
    free = {*free, "checkpoint_minutes", "keep_epochs", "parallel", "activation_checkpointing", "source", "corpus"}
    kind = Recipe if "corpus" in asked["recipe"] else FineTuneRecipe
    defaults = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    pair = [defaults | one["recipe"] | one.get("data", {}) | one.get("encoder", {}) for one in (there, asked)]
    there, asked = json.loads(json.dumps(pair))  # tuples as JSON gives them back
    keys = [key for key in asked if key not in free and (key != "marks" or key in there)]
    return [f"{k}: {there.get(k)!r} there, {asked[k]!r} asked for" for k in keys if there.get(k) != asked[k]]


def vit_b16_in1k() -> Recipe:
    """Train ViT-B/16 on ImageNet-1k: the paper's 800 epochs on 4 GPUs.

    Command: `micl-zoo train vit_b16.in1k --data /data/imagenet/train --out runs/vit_b16 --gpus 4`
    Hardware: 4 x A100 in the paper; this repository has not run it. Hours: not measured, `--plan` shows the arithmetic.
    Score: not measured. Choices among the sources: see `vit_l16_in1k`.
    """
    return Recipe(
        name="vit_b16.in1k",
        corpus=IN1K,
        **_shape("vit_b16"),
        epochs=800,
        warmup_epochs=40,
        batch_size=7200,  # 4 GPUs x 1800
        contrast_batch=1800,
        base_lr=5e-5,  # 5e-5 x 7200 / 256 = 1.41e-3
        compile=True,
        keep_epochs=100,
    )


def vit_l16_in1k() -> Recipe:
    """Train ViT-L/16 on ImageNet-1k: the paper's 800 epochs on 4 GPUs.

    Command: `micl-zoo train vit_l16.in1k --data /data/imagenet/train --out runs/vit_l16 --gpus 4`
    Hardware: 4 x A100 in the paper, which states 133 h and 85.8 % after fine-tuning; this repository has not run it.
    The sources disagree (docs/method.md). Epochs and warm-up are those of the authors' pre-training text; batch per
    GPU, base learning rate and mask ratio are their code's defaults. The peak, 5e-5 x 7200 / 256 = 1.41e-3, is close to
    the 1.2e-3 that the text's own pair gives, 1.5e-4 at a batch of 2048.
    """
    return dataclasses.replace(vit_b16_in1k(), name="vit_l16.in1k", **_shape("vit_l16"))


def vit_b16_in1k_color() -> Recipe:
    """Train ViT-B/16 on ImageNet-1k: the paper's settings and a colour change per view, which is ours.

    Command: `micl-zoo train vit_b16.in1k-color --data /data/imagenet/train --out runs/vit_b16-color --gpus 4`
    Not run by this repository; hours and score: not measured. In minutes of a small ViT the change was the clearest
    gain over the paper's settings, most of it on caltech101 (training/README.md, records/ablations*.json).
    """
    return dataclasses.replace(vit_b16_in1k(), name="vit_b16.in1k-color", view_color=True)


def vit_l16_in1k_color() -> Recipe:
    """Train ViT-L/16 on ImageNet-1k: the paper's settings and a colour change per view, see `vit_b16_in1k_color`.

    Command: `micl-zoo train vit_l16.in1k-color --data /data/imagenet/train --out runs/vit_l16-color --gpus 4`
    Not run by this repository; hours and score: not measured.
    """
    return dataclasses.replace(vit_l16_in1k(), name="vit_l16.in1k-color", view_color=True)


def vit_ti16_tin200() -> Recipe:
    """Train ViT-Ti/16 on 100,000 images of 64 x 64 (Tiny ImageNet-200): the encoder that comes with the package.

    Command: `micl-zoo train vit_ti16.tin200 --data "tin200/train-*.parquet" --out runs/vit_ti16.tin200`
    Hardware: one CPU core with bf16. Hours: 1.1. Score: k-NN 35.1 % on caltech101, 51.6 % on cifar10, 62.6 % on
    flowers5 and 8.2 % on tin200 (MODEL_CARD.md, with those of other seeds).
    Differs from the paper: images and crops of 112, three views of 5 of 49 patches, temperature 0.03, colour changes
    per view.
    """
    return Recipe(
        name="vit_ti16.tin200",
        corpus=TIN200,
        **_shape("vit_ti16"),
        image_size=112,
        mask_ratio=0.69,  # 15 of 49 patches, 5 per view
        views=3,
        temperature=0.03,
        crop_size=112,
        view_color=True,
        cache="memory",
        source_size=64,
        epochs=16,
        warmup_epochs=0.5,
        batch_size=512,
        base_lr=1e-3,  # 2e-3 at batch 512
        compile=True,
        save_dtype="float16",  # 11 MB, so that it can come with the package
    )


def vit_s16_tin200() -> Recipe:
    """Train ViT-S/16 on 100,000 images of 64 x 64 (Tiny ImageNet-200), the corpus in the memory of one GPU.

    Command: `micl-zoo train vit_s16.tin200 --data "tin200/train-*.parquet" --out runs/vit_s16.tin200`
    Hardware: meant for ten minutes of one H100; not run yet. Score: not measured.
    Arithmetic: 600 epochs = 59 M images x 1.56 GFLOP (three views of 4 tokens, forward and backward) = 92 PFLOP: 3
    minutes at half of the card's 989 TFLOP/s, 10 minutes at 15 % of them.
    Three views and temperature 0.03 are what did best at the size of ViT-Ti/16 (training/README.md); in runs of this
    length they were not compared.
    """
    return dataclasses.replace(
        vit_ti16_tin200(),
        name="vit_s16.tin200",
        **_shape("vit_s16"),
        mask_ratio=0.8,  # 9 of 49 patches, 3 per view
        epochs=600,
        warmup_epochs=20,
        batch_size=2048,
        base_lr=2e-4,  # 1.6e-3 at batch 2048
    )


def vit_b16_tin200() -> Recipe:
    """Train ViT-B/16 as `vit_s16_tin200`, in fewer epochs.

    Command: `micl-zoo train vit_b16.tin200 --data "tin200/train-*.parquet" --out runs/vit_b16.tin200`
    Hardware: meant for ten minutes of one H100; not run yet. Score: not measured.
    Arithmetic: 200 epochs = 20 M images x 6.17 GFLOP = 121 PFLOP: 4 minutes at half of the card's 989 TFLOP/s, 8 at a
    quarter. At 172 MB in float16 the encoder is too large to come with the package.
    """
    shape, lr = _shape("vit_b16"), 1.5e-4  # 1.2e-3 at batch 2048
    return dataclasses.replace(
        vit_s16_tin200(), name="vit_b16.tin200", **shape, epochs=200, warmup_epochs=10, base_lr=lr
    )


def vit_l16_tin200() -> Recipe:
    """Train ViT-L/16 as `vit_s16_tin200`, in fewer epochs.

    Command: `micl-zoo train vit_l16.tin200 --data "tin200/train-*.parquet" --out runs/vit_l16.tin200`
    Hardware: meant for ten minutes of one H100; not run yet. Score: not measured.
    Arithmetic: 60 epochs = 5.9 M images x 21.8 GFLOP = 129 PFLOP: 4 minutes at half of the card's 989 TFLOP/s, 9 at a
    quarter.
    """
    shape, lr = _shape("vit_l16"), 1e-4  # 8e-4 at batch 2048
    return dataclasses.replace(vit_s16_tin200(), name="vit_l16.tin200", **shape, epochs=60, warmup_epochs=5, base_lr=lr)


def _shape(arch: str) -> dict[str, Any]:
    return {name: getattr(ARCHS[arch], name) for name in ("embed_dim", "depth", "num_heads")}


_IN1K = (vit_b16_in1k, vit_l16_in1k, vit_b16_in1k_color, vit_l16_in1k_color)
_TIN200 = (vit_ti16_tin200, vit_s16_tin200, vit_b16_tin200, vit_l16_tin200)
RECIPES: dict[str, Callable[[], Recipe]] = {make().name: make for make in (*_IN1K, *_TIN200)}


def mae_b() -> FineTuneRecipe:
    """Fine-tune ViT-B on ImageNet-1k, as MAE (arXiv 2111.06377, table 9) does and MiCL after it.

    Command: `micl-zoo eval finetune runs/vit_b16 --data /data/imagenet --out runs/vit_b16-ft --recipe mae_b --gpus 8`
    Not run by this repository. Score: not measured; the paper does not state one for ViT-B at 224 pixels.
    """
    return FineTuneRecipe(name="mae_b")  # 5e-4 x 1024 / 256 = 2e-3


def mae_l() -> FineTuneRecipe:
    """Fine-tune ViT-L on ImageNet-1k, as MAE (arXiv 2111.06377, table 9) does and MiCL after it.

    Command: `micl-zoo eval finetune runs/vit_l16 --data /data/imagenet --out runs/vit_l16-ft --recipe mae_l --gpus 8`
    Not run by this repository. Score: not measured; the paper states 85.8 %.
    """
    return FineTuneRecipe(name="mae_l", epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2)  # 4e-3 at batch 1024


def small() -> FineTuneRecipe:
    """Fine-tune ViT-Ti or ViT-S on some thousands of images, on a CPU or one GPU.

    Command: `micl-zoo eval finetune vit_ti16.tin200 --data flowers5 --out runs/flowers --recipe small`
    Our own, from no paper, and not tuned. Measured once: 67.1 % on flowers5, where logistic regression on the frozen
    encoder has 65.4 %, within the interval (MODEL_CARD.md).
    Against MAE's: a short run, small batches, no mixing, no erasing, a milder augmentation, larger crops: few steps of
    a small network are not enough to overfit.
    """
    return FineTuneRecipe(
        name="small",
        epochs=15,
        warmup_epochs=1,
        batch_size=64,
        base_lr=2e-3,  # 5e-4 at batch 64
        layer_decay=0.75,
        drop_path=0.0,
        mixup=0.0,
        cutmix=0.0,
        augment="rand-m5-mstd0.5-inc1",
        erase_probability=0.0,
        crop_scale_min=0.35,
    )


FINETUNE_RECIPES: dict[str, Callable[[], FineTuneRecipe]] = {"mae_b": mae_b, "mae_l": mae_l, "small": small}


def finetune_recipe_for(embed_dim: int) -> str:
    """Name the recipe for an encoder of this width: `small` below ViT-B's 768, `mae_l` from ViT-L's 1024 on."""
    return "small" if embed_dim < 768 else "mae_b" if embed_dim < 1024 else "mae_l"


def corpus_images(recipe: Recipe) -> int:
    """Count the images of the corpus that a recipe is meant for."""
    if recipe.corpus not in CORPORA:
        raise UsageError(unknown("corpus", recipe.corpus, CORPORA))
    return CORPORA[recipe.corpus].images


def smoke_twin(recipe: R) -> R:
    """Shrink a recipe to what trains in seconds on a CPU: real code paths, a worthless result, a name with `.smoke`.

    The twin for pre-training keeps what the method is made of (mask ratio, views, similarity, negatives and their
    groups, colour, cache, parallel) and shrinks the network, the crops and the batch.
    """
    changes: dict[str, Any] = {"name": f"{recipe.name}.smoke", "epochs": 2, "warmup_epochs": 0.5, "batch_size": 16}
    changes |= {"precision": "fp32", "keep_epochs": 0}
    if isinstance(recipe, FineTuneRecipe):
        return dataclasses.replace(recipe, **changes | {"eval_epochs": 1})
    groups = recipe.batch_size // recipe.contrast_size
    changes |= {"name": f"{recipe.name.partition('.')[0]}.smoke", "checkpoint_minutes": 0, "compile": False}
    changes |= {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "image_size": 64}
    changes["crop_size"] = 64 if recipe.crop_size == recipe.image_size else 32  # 64 or 16 patches
    changes["source_size"] = min(recipe.source_size, 64)
    changes["contrast_batch"] = 16 // groups if recipe.contrast_batch else 0
    return dataclasses.replace(recipe, **changes)


def get_recipe(name: str, overrides: Iterable[str] = (), *, smoke: bool = False) -> Recipe:
    """Make a recipe by name, or its smoke twin, with `key=value` changes."""
    return _get("recipe", RECIPES, name, overrides, smoke)


def get_finetune_recipe(name: str, overrides: Iterable[str] = (), *, smoke: bool = False) -> FineTuneRecipe:
    """Make a recipe for fine-tuning, see `get_recipe`."""
    return _get("fine-tuning recipe", FINETUNE_RECIPES, name, overrides, smoke)


def _get(kind: str, table: Mapping[str, Callable[[], R]], name: str, overrides: Iterable[str], smoke: bool) -> R:
    if name not in table:
        raise UsageError(unknown(kind, name, table))
    return overridden(smoke_twin(table[name]()) if smoke else table[name](), overrides)


def overridden(recipe: R, overrides: Iterable[str]) -> R:
    """Apply `key=value` changes to a recipe."""
    return dataclasses.replace(recipe, **parsed(type(recipe), overrides))


def parsed(kind: type[AnyRecipe], overrides: Iterable[str]) -> dict[str, Any]:
    """Read `key=value` changes to a kind of recipe, each checked for its name, type and range."""
    types, limits = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    found = dict(_parse_override(override, types) for override in overrides)
    if wrong := [text for key, value in found.items() if (text := wrong_value(limits[key], value, key))]:
        raise UsageError("; ".join(wrong))
    return found


def resolve_recipe(recipe: R | str, get: Callable[..., R], overrides: Iterable[str] = (), *, smoke: bool = False) -> R:
    """Take a recipe as it is, or by name from `get_recipe` or `get_finetune_recipe` with its changes."""
    if isinstance(recipe, str):
        return get(recipe, overrides, smoke=smoke)
    if tuple(overrides):
        raise UsageError("overrides change a recipe given by name; change your own with dataclasses.replace")
    return smoke_twin(recipe) if smoke else recipe


def _parse_override(text: str, types: dict[str, Any]) -> tuple[str, Any]:
    """Read a `key=value` text, checked for its name and type."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set takes key=value, got {text!r}")
    if key not in types:
        raise UsageError(unknown("recipe field", key, types))
    kind, choices = types[key], get_args(types[key])
    origin = get_origin(kind)
    try:
        if origin is Literal:
            return key, {choice: choice for choice in choices}[value]
        if origin is tuple:
            return key, tuple(kind(part) for kind, part in zip(choices, value.split(","), strict=True))
        return key, {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        names[tuple] = f"{len(choices)} numbers with commas between"
        expected = " or ".join(choices) if origin is Literal else names[origin or kind]
        raise UsageError(f"{key}={value}: expected {expected}") from None
