"""A timm model in torch, the backend with gradients: what it gives, and how pools are made of that.

Shapes: B images, T tokens per image (class token, registers, patches), h x w patches, D numbers each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import WeightsError
from ..zoo.pools import Output, Pool
from .device import Backend, Precision

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

    def __init__(
        self, model: nn.Module, size: tuple[int, int], projects: bool = False, anatomy: Anatomy | None = None
    ) -> None:
        self.model, self.size, self.projects = model, size, projects
        self._anatomy = (model, anatomy) if anatomy else None

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

    def forget(self) -> None:
        """Its weights are what it computes with."""

    def outputs(self, pixel_values: Tensor, wanted: Collection[Output]) -> dict[Output, Tensor]:
        """Compute outputs, with gradients where torch records them."""
        return compute(self.model, self.anatomy, pixel_values.to(next(self.model.parameters())), wanted)


def own_pool(pool: Pool, model: nn.Module | None) -> Pool:
    """Say by which name stores hold a model's own row: one that is a class token by that one."""
    if pool != "native" or not isinstance(model, VisionTransformer):
        return pool
    if type(model).forward_head is not VisionTransformer.forward_head:  # a distilled one has two tokens
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
                if goes_by_steps(model):  # which take minutes one by one without numbers
                    raise NotImplementedError
                image = torch.empty(1, 3, *size, device="meta", dtype=where.dtype)
                # Untied: of a module that is in two places torch would leave a tensor without numbers behind.
                return cast("dict[str, Any]", torch.func.functional_call(probe, state, (image,), tie_weights=False))
            except Exception:  # it has tensors outside of its state, or looks at numbers: then with numbers
                return cast("dict[str, Any]", probe(torch.zeros(1, 3, *size, device=where.device, dtype=where.dtype)))
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"the model cannot take images of {size[0]} x {size[1]} pixels: {said}") from None


def goes_by_steps(model: nn.Module) -> bool:
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


@contextmanager
def evaluating(model: nn.Module | None) -> Iterator[None]:
    """Put all parts of a model into eval mode, in which no image changes another's row, and back."""
    training = [one for one in model.modules() if one.training] if model is not None else []
    others = [one for one in model.modules() if not one.training] if training and model is not None else []
    for one in training:
        one.training = False
    try:
        yield
    finally:
        for one in training:
            if type(one).train is not nn.Module.train:  # it also forgets what it kept for eval mode
                one.train()
            one.training = True
        for one in others:
            one.training = False
