"""A configuration and a file of weights -> the timm model of them, or an error before memory is taken for it."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import inspect
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..errors import UsageError, WeightsError
from ..zoo.config import MAX_PARAMETERS, MAX_PATCHES, MAX_SIDE, MAX_TABLES, PLAIN_MODULES, is_projection
from ..zoo.hub import with_row
from ..zoo.pools import Output, Pool
from ..zoo.public import PUBLIC
from ..zoo.weights import EncoderConfig, Weights, read_tensors, shapes
from .torch_model import Anatomy, TorchModel, find_anatomy, goes_by_steps, own_pool

# Bytes of a number -> the whole numbers that its bits are, and those that add them up.
_BITS = {1: (torch.int8, torch.int32), 2: (torch.int16, torch.int32)}
_BITS |= {4: (torch.int32, torch.int32), 8: (torch.int64, torch.int64)}
# Not normal_: torch's trunc_normal_ draws with it until all numbers are within its bounds.
RANDOM = {"uniform_", "erfinv_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_"}
UNREADABLE = {getattr(torch, "float4_e2m1fn_x2", None)}  # torch has the type, and cannot turn it into another
FILTERS = ("checkpoint_filter_fn", "_filter_fn", "pretrained_filter_fn")  # timm's names of what converts a layout
INITIALISERS = RANDOM | {"normal_", "mul_", "add_", "clamp_", "fill_", "zero_", "div_"}
FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.randn, torch.arange, torch.eye}  # of what grows with the image


def build_model(config: EncoderConfig, weights: Weights | None) -> TorchModel:
    """Build the timm model with the weights of a file, or with random ones, in float32.

    A classifier that the file has is left out, unless it is the projection of a CLIP.

    Raises:
        WeightsError: timm has no such model, or the file does not fit it or has numbers that are not finite.
    """
    if weights is None:
        projects = is_projection(config.architecture, config.num_classes)
        return _sized(_create(config, "the configuration", head=projects), config, projects)
    where = config.source or repr(str(weights.path))
    state, anatomy = dict[str, Tensor](), None
    if weights.checked is None or config.source is not None:  # else it is of a row of our table, whose file fits
        state, anatomy = _fitting(config, shapes(weights.path), lambda: read_tensors(weights.path), where)
        _ = weights.sha256  # raises where a checkpoint is not what was written
    return _filled(config, state or read_tensors(weights.path), where, anatomy)


def build_from(config: EncoderConfig, state: dict[str, Tensor], where: str) -> tuple[TorchModel, list[str] | None]:
    """Build the timm model with weights of another file, by its names or by those that timm converts.

    Returns:
        The model, and the names of tensors that have no place in it; None where timm converted them, so nobody knows.

    Raises:
        WeightsError: tensors of the model are missing, or of other shapes; or see `build_model`.
    """
    with _Shapes():
        bare = _create(config, where, head=False)
        full = _create(config, where, head=True) if config.num_classes else bare
    anatomy, needed, known = _check_model(bare, config, where), _sizes(bare.state_dict()), _sizes(full.state_dict())
    problems = list[str]()
    for names in _unwrapped(state):
        inside = {name: state[given] for name, given in names.items()}
        for convert in (None, *_converters(full, config.architecture)):
            try:
                found = dict(inside) if convert is None else dict(convert(dict(inside), full))
            except Exception:  # of a layout that this one does not know
                continue
            for name in needed.keys() - found.keys():
                if name.endswith("num_batches_tracked"):  # which files of before it have not, and no row depends on
                    found[name] = torch.zeros((), dtype=torch.int64)
            problems.append(
                _misfit(needed, known, {name: size for name, size in _sizes(found).items() if name in known})
            )
            if not problems[-1]:
                used = {given for name, given in names.items() if name in known}
                left_out = [given for given in state if given not in used] if convert is None else None
                return _filled(config, found, where, anatomy), left_out
    raise WeightsError(f"{where} does not fit timm's {config.architecture}: it {problems[0]}")


def _unwrapped(state: Mapping[str, Tensor]) -> Iterator[dict[str, str]]:
    """Name the tensors of a file without what its maker put before all or most of them: `module.`, `model.`."""
    names = {name: name for name in state}
    while names:
        yield names
        words = Counter(name.partition(".")[0] for name in names if "." in name)
        first = max(words, key=words.__getitem__, default="")
        if 2 * words[first] <= len(names):
            return
        names = {name.partition(".")[2]: given for name, given in names.items() if name.startswith(f"{first}.")}


def _converters(model: nn.Module, architecture: str) -> Iterator[Callable[..., Any]]:
    """Find timm's functions that turn the layouts of a model's authors into its own."""
    modules = dict.fromkeys((type(model).__module__, timm.models.model_entrypoint(architecture).__module__))
    for found in (getattr(sys.modules[module], name, None) for module in modules for name in FILTERS):
        if found is not None:
            yield found
            if "adapt_layer_scale" in inspect.signature(found).parameters:
                yield functools.partial(found, adapt_layer_scale=True)


def _filled(
    config: EncoderConfig, state: Mapping[str, Tensor], where: str, anatomy: Anatomy | None = None
) -> TorchModel:
    projects = is_projection(config.architecture, config.num_classes)
    with _Unset():
        model = _create(config, where, head=projects)
    wanted = model.state_dict()
    if projects and wanted.keys() - state.keys():  # the tower alone
        return _filled(dataclasses.replace(config, num_classes=0), state, where)
    for name in wanted:
        kind = state[name].dtype
        if (is_float := wanted[name].is_floating_point()) != kind.is_floating_point or kind in UNREADABLE:
            raise WeightsError(f"{where} does not fit its configuration: {name} is of type {kind}")
        wanted[name] = state[name].float() if is_float else state[name]
        if not (wanted[name].sum().isfinite() or wanted[name].isfinite().all()):  # a sum is quick, and can overflow
            raise WeightsError(f"{where} cannot be used, {name} holds NaN or infinite numbers: take other weights")
    model.load_state_dict(wanted)
    return _sized(model, config, projects, None if projects else anatomy)


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


def _sized(model: nn.Module, config: EncoderConfig, projects: bool, anatomy: Anatomy | None = None) -> TorchModel:
    if config.trained_size:
        return resample(model, config, projects)
    return TorchModel(model, config.size, projects, anatomy)


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


def timm_config(name: str) -> EncoderConfig:
    """Say how to build an encoder of timm's table, with the choices of ours, for random weights."""
    known = timm.get_pretrained_cfg(name)
    with _Shapes():
        features = timm.create_model(known.architecture, pretrained=False).num_features
    body = {"architecture": known.architecture, "num_features": int(features)}
    entry = {key: value for key, value in known.to_dict().items() if value is not None}
    config = EncoderConfig.from_dict(body | {"pretrained_cfg": entry}, where=f"timm's {name}", tagged=True)
    return with_row(config, PUBLIC.get(config.name))


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
        try:
            return func(*args, **kwargs)
        except RuntimeError:  # of numbers that timm makes otherwise, and puts together with those without memory
            args, kwargs = tree_map_only(Tensor, lambda one: one.to("meta"), (args, kwargs))
            return func(*args, **kwargs)


class _Unset(TorchFunctionMode):
    """Leaves out the random numbers of weights that are read from a file next: half of the time that building takes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in RANDOM and (args or "tensor" in kwargs):
            return args[0] if args else kwargs["tensor"]
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


def _fitting(
    config: EncoderConfig, found: Mapping[str, tuple[int, ...]], read: Callable[[], dict[str, Tensor]], where: str
) -> tuple[dict[str, Tensor], Anatomy | None]:
    """Refuse tensors, of shapes by name, that a configuration does not describe, before memory is taken for a model.

    Returns:
        The tensors in timm's layout, if they are in another that timm knows; else none, and nothing was read. And what
        the model gives, see `_check_model`.
    """
    with _Shapes():
        bare = _create(config, where, head=False)
        full = _create(config, where, head=True) if config.num_classes else bare
    anatomy = _check_model(bare, config, where)
    needed, known = _sizes(bare.state_dict()), _sizes(full.state_dict())
    if not (problem := _misfit(needed, known, found)):
        return {}, anatomy
    is_other = 2 * len(needed.keys() & found.keys()) < len(needed)  # the layout, and not a number here or there
    convert = getattr(sys.modules[type(full).__module__], "checkpoint_filter_fn", None)
    try:
        state = cast("dict[str, Tensor]", convert(read(), full)) if convert and is_other else {}
        fits = bool(state) and not _misfit(needed, known, _sizes(state))
    except WeightsError:
        raise
    except Exception:  # whatever a layout that timm does not know makes of its conversion
        fits = False
    if not fits:
        raise WeightsError(f"{where} does not fit its configuration: it {problem}")
    return state, anatomy


def _check_model(model: nn.Module, config: EncoderConfig, where: str) -> Anatomy | None:
    """Refuse a model that is none of ours, or is not what its configuration says elsewhere.

    Returns:
        What it gives without a projection; None where that takes too long to find out.
    """
    width, problem, found = getattr(model, "num_features", config.embed_dim), "", None
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None) or (1, 1)
    if width != config.embed_dim:
        problem = f"num_features is {config.embed_dim}, and its tokens have {width} numbers"
    elif not 1 <= math.prod(grid) <= MAX_PATCHES:
        problem = f"images have {grid[0]} x {grid[1]} patches, and must have 1 to {MAX_PATCHES:,}"
    elif (numbers := sum(one.numel() for one in model.parameters())) > MAX_PARAMETERS:
        problem = f"the model has {numbers:,} parameters, and at most {MAX_PARAMETERS:,} are allowed"
    elif (numbers := sum(one.numel() for one in model.buffers())) > MAX_TABLES:
        problem = f"the model has tables of {numbers:,} numbers, and at most {MAX_TABLES:,} are allowed"
    elif not goes_by_steps(model):
        try:
            size = config.trained_size or config.size
            found = find_anatomy(model, size, projects=False)
            grid = found.shapes.get("patches", (1, 1))[:2]
            if math.prod(grid) > MAX_PATCHES:  # of a model that does not say it before
                problem = f"images have {grid[0]} x {grid[1]} patches, and must have 1 to {MAX_PATCHES:,}"
        except WeightsError as error:
            problem = str(error)
    if problem:
        raise WeightsError(f"{where} cannot be loaded: {problem}")
    return found


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
