"""A ViT in torch, the backend with gradients. T tokens per image: the class token, others, then the patches'."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import WeightsError
from .config import MAX_PARAMETERS, MAX_PATCHES, MODULES
from .device import Backend, Output, Precision
from .weights import EncoderConfig, Weights, read_tensors, shapes

# Bytes of a number -> the whole numbers that its bits are, and those that add them up.
_BITS = {1: (torch.int8, torch.int32), 2: (torch.int16, torch.int32)}
_BITS |= {4: (torch.int32, torch.int32), 8: (torch.int64, torch.int64)}
INITIALISERS = {"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_", "div_"}


class TorchModel:
    """A timm ViT as an encoder's runtime, see `encoder.Runtime`."""

    name: Backend = "torch"
    precision: Precision | None = None

    def __init__(self, vit: VisionTransformer) -> None:
        self.vit = vit

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.vit.parameters()).device

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), patches down and across."""
        return self.vit.patch_embed.grid_size

    def outputs(self, pixel_values: Tensor, wanted: Collection[Output]) -> dict[Output, Tensor]:
        """Compute outputs, with gradients where torch records them."""
        tokens = self.vit.forward_features(pixel_values.to(next(self.vit.parameters())))
        return split_tokens(self.vit, tokens, wanted)


def split_tokens(vit: VisionTransformer, tokens: Tensor, wanted: Collection[Output]) -> dict[Output, Tensor]:
    """Cut a ViT's tokens (B, T, D) into the outputs wanted: "cls" and "mean" (B, D), "patches" (B, h, w, D)."""
    found: dict[Output, Tensor] = {"cls": tokens[:, 0]}
    patches = tokens[:, vit.num_prefix_tokens :]  # the class token, and registers where it has them
    if "mean" in wanted:
        found["mean"] = patches.mean(1)
    if "patches" in wanted:
        found["patches"] = patches.unflatten(1, vit.patch_embed.grid_size)
    return found


def build_vit(config: EncoderConfig, weights: Weights | None) -> VisionTransformer:
    """Build the timm model with the weights of a file, or with random ones, in float32.

    Raises:
        WeightsError: timm has no such ViT, or the file does not fit it or has numbers that are not finite.
    """
    if weights is None:
        return _create(config, "the configuration")
    where = repr(str(weights.path))
    if not weights.checked:
        _check_fit(config, weights, where)
    vit, state = _create(config, where), {}
    for name, value in read_tensors(weights.path).items():
        state[name] = value.float()
        if not state[name].isfinite().all():
            raise WeightsError(f"{where} cannot be used, {name} holds NaN or infinite numbers: take other weights")
    vit.load_state_dict(state)
    return vit


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Hash what tells changed weights from the same ones: sums of their bits, the same on every device.

    Whole numbers are summed, exactly and in no time (0.1 s for a ViT-B where sha256 takes 0.5 s), by rows and by
    columns, so that values that change places are noticed, too.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        kind, total = _BITS[tensor.itemsize]
        bits = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else max(tensor.numel(), 1)).view(kind)
        sums = [bits.sum(axis, dtype=total).cpu().numpy().tobytes() for axis in (0, 1)]
        digest.update(repr((name, tensor.dtype, tensor.shape, sums)).encode())
    return digest.hexdigest()


class _Shapes(TorchFunctionMode):
    """Makes tensors that have shapes and no memory; torch.device("meta") breaks where timm before 1.0.17 reads one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in INITIALISERS and args and args[0].is_meta:
            return args[0]  # there is nothing to fill, and torch takes a second to find that out
        if func in (torch.empty, torch.zeros, torch.ones, torch.randn) and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _create(config: EncoderConfig, where: str) -> VisionTransformer:
    """Make the timm model of a configuration: of a name that timm lists, with no more than the configuration says."""
    name = config.architecture
    if not timm.models.is_model_in_modules(name, MODULES):
        near = difflib.get_close_matches(name, [one for module in MODULES for one in timm.list_models(module=module)])
        hint = f", it has {' and '.join(near)}" if near else ""
        raise WeightsError(f"{where} asks for {name!r}, and timm {timm.__version__} has no ViT of that name{hint}")
    sizes = {"img_size": config.transform.size, **config.model_args}
    try:
        vit = timm.create_model(name, pretrained=False, num_classes=0, **sizes)
    except Exception as error:  # of torch and timm, for sizes that do not go together
        said = str(error).splitlines() or [type(error).__name__]
        raise WeightsError(f"timm cannot build {name!r} with {sizes}, as {where} asks for: {said[0]}") from None
    if not isinstance(vit, VisionTransformer):
        raise WeightsError(f"{where} asks for {name!r}, which is no VisionTransformer of timm")
    return vit


def _check_fit(config: EncoderConfig, weights: Weights, where: str) -> None:
    """Refuse a file that its configuration does not describe, before any memory is taken for it."""
    with _Shapes():
        vit = _create(config, where)
    _check_shape(vit, config, where)
    _check_tensors({name: tuple(one.shape) for name, one in vit.state_dict().items()}, shapes(weights.path), where)
    _ = weights.sha256  # raises where a checkpoint is not what was written


def _check_shape(vit: VisionTransformer, config: EncoderConfig, where: str) -> None:
    """Refuse a model that is none of ours, or is not what its configuration says elsewhere."""
    size, grid = (config.transform.size,) * 2, vit.patch_embed.grid_size
    problem = ""
    if vit.cls_token is None:
        problem = f"{config.architecture} has no class token, which the embeddings are made of"
    elif vit.embed_dim != config.embed_dim:
        problem = f"num_features is {config.embed_dim}, and its tokens have {vit.embed_dim} numbers"
    elif tuple(vit.patch_embed.img_size) != size:
        problem = f"input_size is {size}, and the model takes images of {tuple(vit.patch_embed.img_size)}"
    elif not 1 <= grid[0] * grid[1] <= MAX_PATCHES:
        problem = f"images have {grid[0]} x {grid[1]} patches, and must have 1 to {MAX_PATCHES:,}"
    elif (numbers := sum(one.numel() for one in vit.parameters())) > MAX_PARAMETERS:
        problem = f"the model has {numbers:,} parameters, and at most {MAX_PARAMETERS:,} are allowed"
    if problem:
        raise WeightsError(f"{where} cannot be loaded: {problem}")


def _check_tensors(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare names and shapes of a model's tensors with those of a file."""
    differ = [name for name in wanted if name in found and found[name] != wanted[name]]
    parts = [
        _some([name for name in wanted if name not in found], "lacks"),
        _some([name for name in found if name not in wanted], "has also"),
        f"has {differ[0]} of shape {found[differ[0]]}, not {wanted[differ[0]]}" if differ else "",
    ]
    if any(parts):
        raise WeightsError(f"{where} does not fit its configuration: it {'; '.join(filter(None, parts))}")


def _some(names: list[str], verb: str) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{verb} {names[0]}{more}" if names else ""
