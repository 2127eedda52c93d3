"""What a configuration may say: of a folder's config.json, a safetensors header or an ONNX file's metadata.

A configuration comes with weights from anywhere, and timm would follow it anywhere: to a pickle, to a server, to more
memory than there is. So only what stands in these tables reaches timm. A wider zoo widens them.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from ..errors import WeightsError
from ..images.transform import Filter, Mode, Transform
from ..schema import Between, read
from .pools import Pool

# Modules of timm whose models take no more than their patches ask for; others have tables by pairs of patches.
PLAIN_MODULES = ("vision_transformer", "deit", "eva", "naflexvit")
MAX_SIDE = 1536  # pixels, of images of the others
# Widths of the spaces that towers share with texts; timm keeps a tower's projection as its classifier.
PROJECTIONS = (384, 512, 640, 768, 896, 1024, 1152, 1280)
TOWERS = re.compile(r"clip|_mci|fastvit_mci|_pe_core_|vitamin")  # in names of architectures that have one
MAX_PARAMETERS = 8_000_000_000  # timm's largest, vit_7b_patch16_dinov3, has 6.7e9
MAX_TABLES = 1 << 28  # numbers that a model makes itself, of which a file has none: BEiT's places by pairs of patches
MAX_GRID = 128  # patches along a side
MAX_PATCHES = MAX_GRID * MAX_GRID  # per image
ARCHITECTURE = re.compile(r"[a-z][a-z0-9_]*", re.ASCII)  # no hf-hub:, no local-dir:, no path, no tag
NAME = re.compile(r"\w(?:[\w.+ ()-]*[\w.+)-])?")  # also part of file names
MIN_CROP, MAX_CROP = 0.05, 4  # share of the resized side; less only costs memory, more only adds a border
SAID = "cannot be used"  # it may be good for timm
CURE = "encoders of 3 channels load, by a config.json as timm or micl-zoo writes it, with timm's plain arguments"

Side = Annotated[int, Between(1, 4096)]  # pixels
Aim = Annotated[int, Between(1, 4096 / MIN_CROP)]  # pixels of a side after the resize
Width = Annotated[int, Between(1, 8192)]  # numbers per token
Depth = Annotated[int, Between(1, 128)]
Heads = Annotated[int, Between(1, 256)]
Widths = Annotated[list[Width], Between(1, 8)]  # by stage
Depths = Annotated[list[Depth], Between(1, 8)]  # by stage
Window = Annotated[int, Between(1, 64)]  # patches
Registers = Annotated[int, Between(0, 64)]
Classes = Annotated[int, Between(0, 1 << 20)]
Ratio = Annotated[float, Between(0.1, 64)]
Rate = Annotated[float, Between(0, 0.999)]
Mean = Annotated[float, Between(-1000, 1000)]  # for pixels in 0..1
Std = Annotated[float, Between(1e-4, 1000)]


@dataclass(frozen=True)
class ModelArgs:
    """Arguments of timm's models that a file may set, under timm's names; None leaves timm's default.

    All of them are numbers in a range or words of a list: none names a file, a server or code.
    """

    num_classes: Classes | None = None
    in_chans: Literal[3] | None = None
    global_pool: (
        Literal["", "avg", "avgmax", "catavgmax", "max", "fast", "token", "map", "soft", "merge", "align"] | None
    ) = None
    img_size: tuple[Side, Side] | Side | None = None
    patch_size: tuple[Side, Side] | Side | None = None
    # widths and depths
    embed_dim: Widths | Width | None = None
    embed_dims: Widths | None = None
    dims: Widths | None = None
    channels: Widths | None = None
    depth: Depths | Depth | None = None
    depths: Depths | None = None
    layers: Depths | None = None
    block_config: Depths | None = None
    num_heads: Annotated[list[Heads], Between(1, 8)] | Heads | None = None
    head_dim: Width | None = None
    mlp_ratio: Annotated[list[Ratio], Between(1, 8)] | Ratio | None = None
    mlp_ratios: Annotated[list[Ratio], Between(1, 8)] | None = None
    head_hidden_size: Width | None = None
    stem_width: Width | None = None
    base_width: Width | None = None
    cardinality: Heads | None = None
    window_size: (
        Annotated[int, Between(1, 64)] | Annotated[list[Annotated[int, Between(1, 64)]], Between(1, 8)] | None
    ) = None
    kernel_sizes: Annotated[list[Window], Between(1, 8)] | Window | None = None
    sr_ratios: Annotated[list[Window], Between(1, 8)] | None = None
    # blocks
    qkv_bias: bool | None = None
    qkv_fused: bool | None = None
    qk_norm: bool | None = None
    attn_type: Literal["eva", "rope"] | None = None
    scale_attn_norm: bool | None = None
    scale_attn_inner: bool | None = None
    scale_mlp_norm: bool | None = None
    scale_mlp: bool | None = None
    swiglu_mlp: bool | None = None
    swiglu_align_to: Annotated[int, Between(0, 512)] | None = None
    conv_mlp: bool | None = None
    conv_bias: bool | None = None
    use_grn: bool | None = None
    distillation: bool | None = None
    linear: bool | None = None
    stem_type: Literal["", "patch", "overlap", "overlap_tiered", "overlap_act", "deep", "deep_tiered"] | None = None
    avg_down: bool | None = None
    output_stride: Literal[8, 16, 32] | None = None
    norm_eps: Annotated[float, Between(1e-12, 0.1)] | None = None
    proj_bias: bool | None = None
    init_values: Annotated[float, Between(0, 10)] | None = None
    ls_init_value: Annotated[float, Between(0, 10)] | None = None
    use_post_norm: bool | None = None
    norm_layer: Literal["layernorm", "layernorm2d", "rmsnorm", "batchnorm2d"] | None = None
    act_layer: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu6", "silu", "hard_swish"] | None = None
    # tokens and positions
    class_token: bool | None = None
    reg_tokens: Registers | None = None
    num_reg_tokens: Registers | None = None
    pos_embed: Literal["", "none", "learn", "learned"] | None = None
    no_embed_class: bool | None = None
    use_abs_pos_emb: bool | None = None
    use_rel_pos_bias: bool | None = None
    use_shared_rel_pos_bias: bool | None = None
    use_rot_pos_emb: bool | None = None
    rope_type: Literal["", "cat", "axial", "mixed", "dinov3"] | None = None
    rope_temperature: Annotated[float, Between(1, 1e6)] | None = None
    rope_grid_offset: Annotated[float, Between(-64, 64)] | None = None
    rope_grid_indexing: Literal["ij", "xy"] | None = None
    rope_rotate_half: bool | None = None
    ref_feat_shape: tuple[Side, Side] | Side | None = None
    dynamic_img_size: bool | None = None
    dynamic_img_pad: bool | None = None
    strict_img_size: bool | None = None
    always_partition: bool | None = None
    # norms and pooling
    pre_norm: bool | None = None
    use_pre_transformer_norm: bool | None = None
    final_norm: bool | None = None
    use_post_transformer_norm: bool | None = None
    fc_norm: bool | None = None
    use_fc_norm: bool | None = None
    head_norm_first: bool | None = None
    head_init_scale: Annotated[float, Between(0, 10)] | None = None
    pool_include_prefix: bool | None = None
    attn_pool_num_heads: Heads | None = None
    attn_pool_mlp_ratio: Ratio | None = None
    # training
    drop_rate: Rate | None = None
    pos_drop_rate: Rate | None = None
    patch_drop_rate: Rate | None = None
    proj_drop_rate: Rate | None = None
    attn_drop_rate: Rate | None = None
    drop_path_rate: Rate | None = None


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
    tag: Annotated[str, Between(0, 200)] | None = None
    num_classes: Classes | None = None
    fixed_input_size: bool | None = None  # None: as timm's own entry for the architecture says

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
    pool: Pool = "cls"
    trained_size: tuple[Side, Side] | None = None  # of the images that the weights' positions are for

    def __post_init__(self) -> None:
        if self.name is not None and not NAME.fullmatch(self.name):
            raise ValueError(f"name must be of letters, digits and .-+_, as arch.tag, it is {self.name!r}")


@dataclass(frozen=True)
class ConfigFile:
    """A `config.json` in timm's layout; what else timm writes there is left out."""

    architecture: str
    num_features: Width
    pretrained_cfg: PretrainedCfg
    num_classes: Classes | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    micl_zoo: Own | None = None

    def __post_init__(self) -> None:
        if len(self.architecture) > 100 or not ARCHITECTURE.fullmatch(self.architecture):
            raise ValueError(f"architecture must be the plain name of a model, it is {self.architecture[:100]!r}")


def read_config(found: Any, what: str) -> tuple[ConfigFile, dict[str, Any]]:
    """Read a parsed `config.json`, ours or timm's: what it says, and the arguments for timm.

    Args:
        found: what JSON gave.
        what: names the file in the WeightsError.
    """
    if isinstance(found, dict) and "model_type" in found and "architecture" not in found:
        raise WeightsError(
            f"{what} is of the transformers library: `micl-zoo models` names many such encoders in timm's layout"
        )
    if isinstance(found, dict) and "pretrained_cfg" not in found:  # as timm wrote it at first
        found = found | {"pretrained_cfg": found}
    body = read(ConfigFile, found, what, WeightsError, CURE, others=True, said=SAID)
    asked = read(ModelArgs, body.model_args, f"{what}, model_args,", WeightsError, CURE, said=SAID)
    own = body.micl_zoo
    if body.pretrained_cfg.fixed_input_size and not (own and own.trained_size) and (size := asked.img_size):
        size = (size, size) if isinstance(size, int) else size  # as timm reads it
        body = replace(body, pretrained_cfg=replace(body.pretrained_cfg, input_size=(3, *size)))
    return body, {name: value for name, value in vars(asked).items() if value is not None}


def is_projection(architecture: str, num_classes: int) -> bool:
    """Whether the classifier of a timm model is the projection of an image tower into the space of a text tower."""
    return num_classes in PROJECTIONS and bool(TOWERS.search(architecture))


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
