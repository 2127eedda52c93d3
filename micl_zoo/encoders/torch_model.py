"""A timm model in torch, the backend with gradients.

Shapes: B images, T tokens per image (class token, registers, patches), h x w patches, D numbers each.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UsageError, WeightsError
from .config import MAX_PARAMETERS, MAX_PATCHES, MAX_SIDE, MAX_TABLES, PLAIN_MODULES, is_projection
from .device import Backend, Output, Pool, Precision
from .weights import EncoderConfig, Weights, read_tensors, shapes

# Bytes of a number -> the whole numbers that its bits are, and those that add them up.
_BITS = {1: (torch.int8, torch.int32), 2: (torch.int16, torch.int32)}
_BITS |= {4: (torch.int32, torch.int32), 8: (torch.int64, torch.int64)}
INITIALISERS = {"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_", "div_"}
FACTORIES = {
    torch.empty,
    torch.zeros,
    torch.ones,
    torch.randn,
    torch.arange,
    torch.eye,
}  # of all that grows with the image
# What a model computes, before pooling by us: (B, T, D) tokens, or a map (B, D, h, w), and its own pooled rows (B, D).
Raw = Literal["tokens", "map", "native", "projection"]
ROWS: tuple[Literal["native", "projection"], ...] = ("native", "projection")


@dataclass(frozen=True)
class Anatomy:
    """What a timm model gives, as found by a pass that computes shapes and no numbers."""

    shapes: dict[Output, tuple[int, ...]]  # of each output per image: (D,), and (h, w, D) of "patches"
    prefix: int | None  # tokens before the patches'; None: its features are a map, or nothing that patches are made of

    @property
    def raw(self) -> tuple[Raw, ...]:
        """All that its outputs are made of."""
        return raw_for(self, self.shapes)


class TorchModel:
    """A timm model as an encoder's runtime, see `encoder.Runtime`."""

    name: Backend = "torch"
    precision: Precision | None = None

    def __init__(self, model: nn.Module, size: tuple[int, int], projects: bool = False) -> None:
        self.model, self.size, self.projects = model, size, projects
        self._anatomy: tuple[nn.Module, Anatomy] | None = None  # of which model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def anatomy(self) -> Anatomy:
        """What the model gives; looked at once per model."""
        if self._anatomy is None or self._anatomy[0] is not self.model:
            self._anatomy = self.model, find_anatomy(self.model, self.size, self.projects)
        return self._anatomy[1]

    @property
    def shapes(self) -> dict[Output, tuple[int, ...]]:
        """Shape of each of its outputs, per image."""
        return self.anatomy.shapes

    def outputs(self, pixel_values: Tensor, wanted: Collection[Output]) -> dict[Output, Tensor]:
        """Compute outputs, with gradients where torch records them."""
        return compute(self.model, self.anatomy, pixel_values.to(next(self.model.parameters())), wanted)


def resample(model: nn.Module, config: EncoderConfig, projects: bool) -> TorchModel:
    """Make a model take images of the configuration's size; it changes its positions, once.

    Raises:
        UsageError: it takes images of one size only, or not of this one.
    """
    down, across = _patch(model)
    if config.size[0] % down or config.size[1] % across:  # the rest would be left out, without a word
        asked = " x ".join(str(side) for side in sorted({*config.size}, key=config.size.index))
        near = config.size[0] // down * down
        way_on = f"take {near} or {near + down}" if near else f"take {down} or more"
        raise UsageError(f"image_size must be a multiple of the patch size, {down}; got {asked}: {way_on}")
    try:
        if hasattr(model, "set_input_size"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, of how BEiT's tables are resampled
                cast(Any, model).set_input_size(img_size=config.size)
        made = TorchModel(model, config.size, projects)
        made.anatomy  # noqa: B018, which passes an image through
    except Exception as error:  # of timm's layers, for sides that are no multiple of what they cut
        height, width = config.size
        said = (str(error).splitlines() or [type(error).__name__])[0]
        said = said.rpartition("pixels: ")[2]  # as find_anatomy says it
        wrong = f"{config.name} cannot take images of {height} x {width} pixels ({said}): give another image_size"
        raise UsageError(wrong) from None
    return made


def _patch(model: Any) -> tuple[int, int]:
    """Return (height, width) of what a model cuts images into; (1, 1) where it leaves no pixel out."""
    embed = getattr(model, "patch_embed", None)
    size = 1 if getattr(embed, "dynamic_img_pad", False) else getattr(embed, "patch_size", 1)
    return cast("tuple[int, int]", tuple(size) if isinstance(size, list | tuple) else (size, size))


def own_pool(pool: Pool, model: nn.Module | None) -> Pool:
    """Say by which name stores hold a model's own row: one that is a class token by that one."""
    if pool != "native" or not isinstance(model, VisionTransformer):
        return pool
    is_token = model.global_pool == "token" and model.cls_token is not None and isinstance(model.fc_norm, nn.Identity)
    return "cls" if is_token else "native"


def raw_for(anatomy: Anatomy, wanted: Collection[Output]) -> tuple[Raw, ...]:
    """Say what a model must compute for some outputs."""
    ours = {"cls", "mean", "patches"} & set(wanted)
    pieces: list[Raw] = ["map" if anatomy.prefix is None else "tokens"] if ours else []
    return (*pieces, *(one for one in ROWS if one in wanted))


def compute(model: Any, anatomy: Anatomy, pixel_values: Tensor, wanted: Collection[Output]) -> dict[Output, Tensor]:
    """Compute outputs of (B, 3, H, W) by a timm model."""
    raw = raw_for(anatomy, wanted)
    return finish(anatomy, dict(zip(raw, compute_raw(model, pixel_values, raw), strict=True)), wanted)


def compute_raw(model: Any, pixel_values: Tensor, raw: Collection[Raw]) -> tuple[Tensor, ...]:
    """Run a timm model once: what is asked for of it, in this order."""
    found: dict[Raw, Tensor] = {}
    if "map" in raw:
        features, (found["map"],) = model.forward_intermediates(pixel_values, indices=1, norm=True, output_fmt="NCHW")
    else:
        features = model.forward_features(pixel_values)
    if "tokens" in raw:
        found["tokens"] = features
    if "native" in raw:
        found["native"] = model.forward_head(features, pre_logits=True)
    if "projection" in raw:
        found["projection"] = model.forward_head(features)
    return tuple(found[one] for one in raw)


def finish(anatomy: Anatomy, raw: Mapping[Raw, Tensor], wanted: Collection[Output]) -> dict[Output, Tensor]:
    """Make the outputs wanted of what a model has computed: patches (B, h, w, D), others (B, D)."""
    found: dict[Output, Tensor] = {one: raw[one] for one in ROWS if one in raw}
    if "tokens" in raw:
        assert anatomy.prefix is not None
        found |= {"cls": raw["tokens"][:, 0]} if "cls" in wanted else {}
        patches = raw["tokens"][:, anatomy.prefix :]
        if "mean" in wanted:
            found["mean"] = patches.mean(1)
        if "patches" in wanted:
            found["patches"] = patches.unflatten(1, anatomy.shapes["patches"][:2])
    elif "map" in raw:
        found |= {"mean": raw["map"].mean((2, 3))} if "mean" in wanted else {}
        found |= {"patches": raw["map"].permute(0, 2, 3, 1)} if "patches" in wanted else {}
    return found


class RawModel(nn.Module):
    """The part of a timm model that is converted to other runtimes: (B, 3, H, W) -> what is asked for, in order."""

    def __init__(self, model: nn.Module, raw: tuple[Raw, ...]) -> None:
        super().__init__()
        self.model, self.raw = model, raw

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Compute it."""
        return compute_raw(self.model, pixel_values, self.raw)


class _Probe(nn.Module):
    """Finds what a model gives for one image: features, pooled rows, map."""

    def __init__(self, model: nn.Module, projects: bool) -> None:
        super().__init__()
        self.model, self.projects = model, projects

    def forward(self, pixel_values: Tensor) -> dict[str, Any]:
        model: Any = self.model
        found = {"features": model.forward_features(pixel_values)}
        try:
            found["native"] = model.forward_head(found["features"], pre_logits=True)
        except TypeError:  # a head that knows no rows before its logits
            found["native"] = None
        if self.projects:
            found["projection"] = model.forward_head(found["features"])
        try:
            last, maps = model.forward_intermediates(pixel_values, indices=1, norm=True, output_fmt="NCHW")
            found["map"] = maps[-1] if last.shape == found["features"].shape else None
        except Exception:  # AttributeError where there is none; of models whose features are no one tensor, anything
            found["map"] = None
        return found


def find_anatomy(model: nn.Module, size: tuple[int, int], projects: bool) -> Anatomy:
    """Find what a model gives for images of (height, width), with tensors that have shapes and no numbers.

    Raises:
        WeightsError: it cannot take such images, or gives no row for one.
    """
    found = _probed(model, size, projects)
    rows: dict[Output, tuple[int, ...]] = {}
    for name in ROWS:
        if (row := found.get(name)) is not None:
            if not isinstance(row, Tensor) or row.ndim != 2:
                raise WeightsError("the model gives no row of numbers per image, which an embedding is")
            rows[name] = (row.shape[1],)
    tokens, maps = found["features"], found["map"]
    prefix = _prefix(model, tokens, maps)
    if maps is not None and (prefix is not None or not _is_tokens(tokens)):
        rows |= {"mean": (maps.shape[1],), "patches": (*maps.shape[2:], maps.shape[1])}
        if prefix and _has_class_token(model):
            rows["cls"] = (tokens.shape[2],)
    if not rows:
        raise WeightsError("the model gives no row of numbers per image, which an embedding is")
    return Anatomy(rows, prefix)


def _probed(model: nn.Module, size: tuple[int, int], projects: bool) -> dict[str, Any]:
    probe, where = _Probe(model, projects), next(model.parameters())
    state = {name: one.to("meta") for name, one in (*probe.named_parameters(), *probe.named_buffers())}
    try:
        with torch.no_grad(), evaluating(model):  # dropping patches would change the shapes
            try:
                if _steps(model):  # which take minutes one by one without numbers
                    raise NotImplementedError
                image = torch.empty(1, 3, *size, device="meta", dtype=where.dtype)
                return cast("dict[str, Any]", torch.func.functional_call(probe, state, (image,)))
            except Exception:  # it has tensors outside of its state, or looks at numbers: then with numbers
                return cast("dict[str, Any]", probe(torch.zeros(1, 3, *size, device=where.device, dtype=where.dtype)))
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"the model cannot take images of {size[0]} x {size[1]} pixels: {said}") from None


def _steps(model: nn.Module) -> bool:
    """Whether a model goes through its input step by step."""
    return any(isinstance(one, nn.RNNBase) for one in model.modules())


def _is_tokens(features: Any) -> bool:
    return isinstance(features, Tensor) and features.ndim == 3


def _prefix(model: Any, tokens: Any, maps: Tensor | None) -> int | None:
    """Count the tokens before the patches', if the features are tokens and the rest of them are the map's."""
    prefix = getattr(model, "num_prefix_tokens", 0)
    if maps is None or not _is_tokens(tokens) or tokens.shape[2] != maps.shape[1]:
        return None
    return prefix if tokens.shape[1] == prefix + maps.shape[2] * maps.shape[3] else None


def _has_class_token(model: nn.Module) -> bool:
    return any(name.rpartition(".")[2] == "cls_token" for name, _ in model.named_parameters())


def build_model(config: EncoderConfig, weights: Weights | None) -> TorchModel:
    """Build the timm model with the weights of a file, or with random ones, in float32.

    A classifier that the file has is left out, unless it is the projection of a CLIP.

    Raises:
        WeightsError: timm has no such model, or the file does not fit it or has numbers that are not finite.
    """
    projects = is_projection(config.architecture, config.num_classes)
    if weights is None:
        return _sized(_create(config, "the configuration", head=projects), config, projects)
    where = config.source or repr(str(weights.path))
    is_ours = weights.checked is not None and config.source is None  # of a row of our table, whose file fits
    state = {} if is_ours else _fitting(config, weights, where)
    state = state or read_tensors(weights.path)
    model = _create(config, where, head=projects)
    wanted = model.state_dict()
    if projects and wanted.keys() - state.keys():  # the tower alone
        return build_model(dataclasses.replace(config, num_classes=0), weights)
    for name in wanted:
        if (is_float := wanted[name].is_floating_point()) != state[name].is_floating_point():
            raise WeightsError(f"{where} does not fit its configuration: {name} is of type {state[name].dtype}")
        wanted[name] = state[name].float() if is_float else state[name]
        if not wanted[name].isfinite().all():
            raise WeightsError(f"{where} cannot be used, {name} holds NaN or infinite numbers: take other weights")
    model.load_state_dict(wanted)
    return _sized(model, config, projects)


def _sized(model: nn.Module, config: EncoderConfig, projects: bool) -> TorchModel:
    return resample(model, config, projects) if config.trained_size else TorchModel(model, config.size, projects)


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Hash what tells a changed model from the same one: its layers, and sums of its weights' bits, on any device.

    Whole numbers are summed, exactly and in no time (0.1 s for a ViT-B where sha256 takes 0.5 s), by rows and by
    columns, so that values that change places are noticed, too.
    """
    digest = hashlib.sha256(build_of(model).encode())
    for name, tensor in model.state_dict().items():
        kind, total = _BITS[tensor.itemsize]
        bits = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else max(tensor.numel(), 1)).view(kind)
        sums = [bits.sum(axis, dtype=total).cpu().numpy().tobytes() for axis in (0, 1)]
        digest.update(repr((name, tensor.dtype, tensor.shape, sums)).encode())
    return digest.hexdigest()


def build_of(model: Any) -> str:
    """Say how a model is built: its layers with their settings, how it pools, and what was hooked into it."""
    hooks = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())
    pools = [getattr(model, name, None) for name in ("global_pool", "num_prefix_tokens", "num_classes")]
    return repr((repr(model), [one for one in pools if isinstance(one, str | int)], hooks))


def check_described(model: nn.Module, config: EncoderConfig) -> None:
    """Refuse a model that was rebuilt in memory and is not what timm makes of its configuration any more.

    Raises:
        UsageError: its layers, its pooling or its tensors are others.
    """
    head = bool(getattr(model, "num_classes", 0))
    with _Shapes():
        made = _create(config, "the configuration", head=head)
    same_tensors = _sizes(made.state_dict()) == _sizes(model.state_dict())
    if not same_tensors or build_of(made) != build_of(model):
        raise UsageError(
            f"the model is not what timm makes of {config.architecture} any more: its layers, pooling, sizes or hooks "
            "were changed in memory. timm.models.save_for_hf(encoder.model, FOLDER, safe_serialization=True) writes "
            "what timm knows of it"
        )


@contextmanager
def evaluating(model: nn.Module | None) -> Iterator[None]:
    """Put all parts of a model into eval mode, in which no image changes another's row, and back."""
    training = [one for one in model.modules() if one.training] if model is not None else []
    for one in training:
        one.training = False
    try:
        yield
    finally:
        for one in training:
            one.training = True


def outline(config: EncoderConfig) -> tuple[int, dict[Output, tuple[int, ...]], Pool]:
    """Find the number of parameters, the shape of each output per image, and the own pool of an encoder by its
    configuration alone.

    Raises:
        WeightsError: timm has no such model.
    """
    projects, where = is_projection(config.architecture, config.num_classes), "the configuration"
    with _Shapes():
        model = _create(config, where, head=projects)
        _check_model(model, config, where)
        shapes = _sized(model, config, projects).shapes
    return sum(one.numel() for one in model.parameters()), shapes, own_pool(config.pool, model)


def features_of(architecture: str) -> int:
    """Return timm's num_features of an architecture."""
    with _Shapes():
        return int(timm.create_model(architecture, pretrained=False).num_features)


class _Shapes(TorchFunctionMode):
    """Makes tensors that have shapes and no memory; torch.device("meta") breaks where timm before 1.0.17 reads one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in INITIALISERS and args and args[0].is_meta:
            return args[0]  # there is nothing to fill, and torch takes a second to find that out
        if func in FACTORIES and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _create(config: EncoderConfig, where: str, *, head: bool) -> nn.Module:
    """Make the timm model of a configuration: of a name that timm lists, with no more than the configuration says."""
    name, (height, width) = config.architecture, config.trained_size or config.size
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models())
        hint = f", it has {' and '.join(near)}" if near else ""
        has = f"timm {timm.__version__} has no model of that name{hint}"
        raise WeightsError(f"{where} asks for {name!r}, and {has}: upgrade timm (pip install --upgrade timm)")
    if max(height, width) > MAX_SIDE and not timm.models.is_model_in_modules(name, PLAIN_MODULES):
        raise WeightsError(f"{where} asks for {name!r} of {height} x {width} pixels, at most {MAX_SIDE} are allowed")
    known = timm.get_pretrained_cfg(name)
    fixed = known is not None and known.fixed_input_size if config.fixed_size is None else config.fixed_size
    said = {"architecture": name, "input_size": (3, height, width), "fixed_input_size": fixed}
    said |= {"first_conv": known.first_conv, "classifier": known.classifier, "tag": known.tag} if known else {}
    arguments = {**config.model_args, "num_classes": config.num_classes if head else 0}
    try:
        return cast(nn.Module, timm.create_model(name, pretrained=False, pretrained_cfg=said, **arguments))
    except Exception as error:  # of torch and timm, for sizes that do not go together
        text = str(error).splitlines() or [type(error).__name__]
        asked = f"{config.model_args} and images of {height} x {width}"
        raise WeightsError(f"timm cannot build {name!r} with {asked}, as {where} asks for: {text[0]}") from None


def _fitting(config: EncoderConfig, weights: Weights, where: str) -> dict[str, Tensor]:
    """Refuse a file that its configuration does not describe, before any memory is taken for a model.

    Returns:
        The file's tensors in timm's layout, if they are in another that timm knows; else none, and nothing was read.
    """
    with _Shapes():
        bare = _create(config, where, head=False)
        full = _create(config, where, head=True) if config.num_classes else bare
    _check_model(bare, config, where)
    needed, known = _sizes(bare.state_dict()), _sizes(full.state_dict())
    found = shapes(weights.path)
    if not (problem := _misfit(needed, known, found)):
        _ = weights.sha256  # raises where a checkpoint is not what was written
        return {}
    is_other = 2 * len(needed.keys() & found.keys()) < len(needed)  # the layout, and not a number here or there
    convert = getattr(sys.modules[type(full).__module__], "checkpoint_filter_fn", None)
    try:
        state = cast("dict[str, Tensor]", convert(read_tensors(weights.path), full)) if convert and is_other else {}
        fits = bool(state) and not _misfit(needed, known, _sizes(state))
    except WeightsError:
        raise
    except Exception:  # whatever a layout that timm does not know makes of its conversion
        fits = False
    if not fits:
        raise WeightsError(f"{where} does not fit its configuration: it {problem}")
    return state


def _check_model(model: nn.Module, config: EncoderConfig, where: str) -> None:
    """Refuse a model that is none of ours, or is not what its configuration says elsewhere."""
    width, problem = getattr(model, "num_features", config.embed_dim), ""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None) or (1, 1)
    if width != config.embed_dim:
        problem = f"num_features is {config.embed_dim}, and its tokens have {width} numbers"
    elif not 1 <= math.prod(grid) <= MAX_PATCHES:
        problem = f"images have {grid[0]} x {grid[1]} patches, and must have 1 to {MAX_PATCHES:,}"
    elif (numbers := sum(one.numel() for one in model.parameters())) > MAX_PARAMETERS:
        problem = f"the model has {numbers:,} parameters, and at most {MAX_PARAMETERS:,} are allowed"
    elif (numbers := sum(one.numel() for one in model.buffers())) > MAX_TABLES:
        problem = f"the model has tables of {numbers:,} numbers, and at most {MAX_TABLES:,} are allowed"
    elif not _steps(model):
        try:
            size = config.trained_size or config.size
            found = find_anatomy(model, size, projects=False).shapes.get("patches", (1, 1))
            if math.prod(found[:2]) > MAX_PATCHES:  # of a model that does not say it before
                problem = f"images have {found[0]} x {found[1]} patches, and must have 1 to {MAX_PATCHES:,}"
        except WeightsError as error:
            problem = str(error)
    if problem:
        raise WeightsError(f"{where} cannot be loaded: {problem}")


def _sizes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(one.shape) for name, one in state.items()}


def _misfit(
    needed: Mapping[str, tuple[int, ...]], known: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> str:
    """Compare names and shapes of a file's tensors with those that a model needs, and those that it knows."""
    wanted = {**known, **needed}
    differ = [name for name in wanted if name in found and found[name] != wanted[name]]
    parts = [
        _some([name for name in needed if name not in found], "lacks"),
        _some([name for name in found if name not in wanted], "has also"),
        f"has {differ[0]} of shape {found[differ[0]]}, not {wanted[differ[0]]}" if differ else "",
    ]
    return "; ".join(filter(None, parts))


def _some(names: list[str], verb: str) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{verb} {names[0]}{more}" if names else ""
