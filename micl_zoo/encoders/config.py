"""What a configuration may say: of a folder's config.json, a safetensors header or an ONNX file's metadata.

A configuration comes with weights from anywhere, and timm would follow it anywhere: to a pickle, to a server, to more
memory than there is. So only what stands in these tables reaches timm. A wider zoo widens them.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from ..errors import WeightsError
from ..images.transform import Filter, Mode, Transform
from ..schema import Between, read

MODULES = ("vision_transformer", "deit")  # of timm: the architectures that may be asked for are theirs
MAX_PARAMETERS = 4_000_000_000  # timm's largest of them has 2.7e9
MAX_GRID = 128  # patches along a side
MAX_PATCHES = MAX_GRID * MAX_GRID  # per image
ARCHITECTURE = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)  # no hf-hub:, no local-dir:, no path, no tag
NAME = re.compile(r"\w(?:[\w.+ ()-]*[\w.+)-])?")  # also part of file names
MIN_CROP, MAX_CROP = 0.05, 4  # share of the resized side; less only costs memory, more only adds a border
CURE = "take the config.json that timm or micl-zoo wrote for these weights"

Side = Annotated[int, Between(1, 4096)]  # pixels
Aim = Annotated[int, Between(1, 4096 / MIN_CROP)]  # pixels of a side after the resize
Width = Annotated[int, Between(1, 8192)]  # numbers per token
Depth = Annotated[int, Between(1, 128)]
Heads = Annotated[int, Between(1, 256)]
Ratio = Annotated[float, Between(0.1, 64)]
Rate = Annotated[float, Between(0, 0.999)]
Mean = Annotated[float, Between(-1000, 1000)]  # for pixels in 0..1
Std = Annotated[float, Between(1e-4, 1000)]


@dataclass(frozen=True)
class ModelArgs:
    """Arguments of timm's VisionTransformer that a file may set, under timm's names; None leaves timm's default."""

    img_size: tuple[Side, Side] | Side | None = None
    patch_size: tuple[Side, Side] | Side | None = None
    in_chans: Literal[3] | None = None
    embed_dim: Width | None = None
    depth: Depth | None = None
    num_heads: Heads | None = None
    mlp_ratio: Ratio | None = None
    qkv_bias: bool | None = None
    qk_norm: bool | None = None
    scale_attn_norm: bool | None = None
    scale_mlp_norm: bool | None = None
    proj_bias: bool | None = None
    init_values: Annotated[float, Between(0, 10)] | None = None
    class_token: bool | None = None
    reg_tokens: Annotated[int, Between(0, 64)] | None = None
    pos_embed: Literal["", "none", "learn"] | None = None
    no_embed_class: bool | None = None
    pre_norm: bool | None = None
    final_norm: bool | None = None
    fc_norm: bool | None = None
    global_pool: Literal["", "avg", "avgmax", "max", "token", "map"] | None = None
    pool_include_prefix: bool | None = None
    dynamic_img_size: bool | None = None
    drop_rate: Rate | None = None
    pos_drop_rate: Rate | None = None
    patch_drop_rate: Rate | None = None
    proj_drop_rate: Rate | None = None
    attn_drop_rate: Rate | None = None
    drop_path_rate: Rate | None = None
    norm_layer: Literal["layernorm", "rmsnorm"] | None = None
    act_layer: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"] | None = None


@dataclass(frozen=True)
class PretrainedCfg:
    """Entries of timm's `pretrained_cfg` that are used; the others are left out. Defaults are timm's."""

    input_size: tuple[Literal[3], Side, Side] = (3, 224, 224)
    interpolation: Filter = "bicubic"
    crop_pct: Annotated[float, Between(MIN_CROP, MAX_CROP)] = 0.875
    crop_mode: Mode = "center"
    mean: tuple[Mean, Mean, Mean] = Transform.mean
    std: tuple[Std, Std, Std] = Transform.std
    license: Annotated[str, Between(0, 1000)] | None = None

    def __post_init__(self) -> None:
        if min(self.transform.resize) < 1:
            raise ValueError(f"crop_pct {self.crop_pct:g} leaves nothing of images of {list(self.input_size[1:])}")

    @property
    def transform(self) -> Transform:
        """The evaluation transform that it describes."""
        return Transform.from_timm(asdict(self))


@dataclass(frozen=True)
class TransformFile:
    """A `Transform` as an ONNX file's metadata say it: (height, width), of squares from the centre one number."""

    size: tuple[Side, Side] | Side
    resize: tuple[Aim, Aim] | Aim
    interpolation: Filter
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Std, Std, Std]
    mode: Mode = "center"

    def __post_init__(self) -> None:
        size, resize = self.transform.size, self.transform.resize
        if any(not MIN_CROP * aim <= side <= MAX_CROP * aim for side, aim in zip(size, resize, strict=True)):
            raise ValueError(f"resize is {self.resize} for images of {self.size}")

    @property
    def transform(self) -> Transform:
        """The transform that it describes."""
        size, resize = (one if isinstance(one, tuple) else (one, one) for one in (self.size, self.resize))
        return Transform(size, resize, self.mode, self.interpolation, self.mean, self.std)


@dataclass(frozen=True)
class Own:
    """What only this package writes into a `config.json`."""

    name: Annotated[str, Between(1, 200)] | None = None

    def __post_init__(self) -> None:
        if self.name is not None and not NAME.fullmatch(self.name):
            raise ValueError(f"name must be arch.tag, of letters, digits and .-+_, it is {self.name!r}")


@dataclass(frozen=True)
class ConfigFile:
    """A `config.json` in timm's layout; what else timm writes there is left out."""

    architecture: str
    num_features: Width
    pretrained_cfg: PretrainedCfg
    model_args: dict[str, Any] = field(default_factory=dict)
    micl_zoo: Own = field(default_factory=Own)

    def __post_init__(self) -> None:
        if len(self.architecture) > 100 or not ARCHITECTURE.fullmatch(self.architecture):
            raise ValueError(f"architecture must be the plain name of a ViT of timm, it is {self.architecture[:100]!r}")


def read_config(found: Any, what: str) -> tuple[ConfigFile, dict[str, Any]]:
    """Read a parsed `config.json`, ours or timm's: what it says, and the arguments for timm.

    Args:
        found: what JSON gave.
        what: names the file in the WeightsError.
    """
    body = read(ConfigFile, found, what, WeightsError, CURE, others=True)
    asked = read(ModelArgs, body.model_args, f"{what}, model_args,", WeightsError, CURE)
    return body, {name: value for name, value in vars(asked).items() if value is not None}


@dataclass(frozen=True)
class RecipeShape:
    """Fields of a recipe in a run.json that say how to build its encoder."""

    name: Annotated[str, Between(1, 200)]
    image_size: Side
    patch_size: Side
    embed_dim: Width
    depth: Depth
    num_heads: Heads
    mlp_ratio: Ratio
    pixel_mean: tuple[Mean, Mean, Mean]
    pixel_std: tuple[Std, Std, Std]


@dataclass(frozen=True)
class RunFile:
    """A run.json, as far as an encoder goes."""

    recipe: RecipeShape
