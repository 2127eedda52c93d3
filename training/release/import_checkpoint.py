"""A checkpoint of the authors' code (AnonymGiant/OCL) or of timm -> an encoder folder; nothing in it is ever run."""

from __future__ import annotations

import argparse
import itertools
import math
import mmap
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from micl_zoo._version import package_versions
from micl_zoo.encoders.build import build_from, timm_config
from micl_zoo.errors import UsageError, WeightsError, nearest
from micl_zoo.files import file_sha256, open_regular
from micl_zoo.images.transform import Transform
from micl_zoo.printing import printable
from micl_zoo.schema import read
from micl_zoo.zoo.config import Depth, Ratio, Side, Width, is_projection
from micl_zoo.zoo.ours import ARCHS, RECORDS, Arch, timm_architecture
from micl_zoo.zoo.public import row_of
from micl_zoo.zoo.weights import CONFIG_FILE, ONNX_FILE, WEIGHTS_FILE, EncoderConfig, read_tensors, save_weights

from ..micl import position_table

CROP_PCT = 224 / 256  # MAE's evaluation, which the authors' code keeps: 224 out of a shorter side of 256
POSITION_TOLERANCE = 1e-5
# Width and heads behind the size words in model names, as in the ViT papers and timm.
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16), "huge": (1280, 16)}
WRAPPERS = ("model", "state_dict", "model_state_dict")  # entries that training code puts its weights in
MOST_SHARED = 4  # times the bytes of a file that its tensors may claim
NEEDED = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")

logger = getLogger(__name__)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_ARGS, DEEPEST_ARG, LONGEST_ARG, LARGEST = 1000, 5, 1000, 2**63  # of a run's command line


@dataclass(frozen=True)
class _Sizes:
    """What a network may be."""

    embed_dim: Width
    depth: Depth
    patch_size: Side
    image_size: Side
    mlp_ratio: Ratio


@dataclass(frozen=True)
class _Checkpoint:
    """What a checkpoint holds besides the optimiser."""

    state: dict[str, Tensor]
    key: str | None  # the entry that they were in
    epoch: int | None
    args: dict[str, Any]  # the run's command line, as JSON-able values


def import_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    architecture: str | None = None,
    key: str | None = None,
    name: str | None = None,
    license: str = "unknown",
    num_heads: int | None = None,
) -> Path:
    """Turn a checkpoint into an encoder folder, which `micl_zoo.load(weights=…)` and timm's loaders take.

    Args:
        checkpoint: a .pth of the authors' code, of timm or of Lightning, a bare state dict, or a .safetensors file.
        out: folder to write, without an encoder in it.
        architecture: timm's name of the model, `arch` or `arch.tag`, of which the transform is taken; names of tensors
            may be those that timm converts. None: a ViT of MiCL's, whose shape is read off the tensors.
        key: the entry of the checkpoint that holds the weights. None: one of WRAPPERS, or all of it.
        name: `arch.tag`; by default the architecture or the known arch of that shape, and "imported".
        license: of the weights. The authors' code is CC BY-NC 4.0; a file does not say whose it is.
        num_heads: attention heads, where the shape is not a known one: weights do not tell.

    Returns:
        The weights file. Its header has the provenance: see `micl_zoo.zoo.weights.header`.

    Raises:
        WeightsError: a file that is not such a checkpoint, or that needs more than tensors and plain values to be read.
        UsageError: an argument that is missing or does not fit, or a folder with an encoder in it.
    """
    if there := [name for name in (WEIGHTS_FILE, CONFIG_FILE, ONNX_FILE) if os.path.lexists(out / name)]:
        raise UsageError(f"{str(out)!r} holds {there[0]} already: give a new folder")
    if name in RECORDS:
        raise UsageError(f"{name} is the name of an encoder of ours: give another one")
    if architecture is not None and num_heads is not None:
        raise UsageError("num_heads is for weights that do not say their architecture: leave it out")
    found, where = _read(checkpoint, key), repr(str(checkpoint))
    provenance = {
        "imported_from": {"file": checkpoint.name, "sha256": file_sha256(checkpoint), "key": found.key},
        "epoch": found.epoch, "args": found.args, "license": license, "versions": package_versions(),
    }  # fmt: skip
    if architecture is not None:
        config = _timm_config(architecture, name, license)
        trained = config.transform.at_size(config.trained_size or config.size)  # positions stay as they were trained
        built, left_out = build_from(replace(config, transform=trained, trained_size=None), found.state, where)
        state = built.model.state_dict()
        config = replace(config, num_classes=getattr(built.model, "num_classes", 0))
        sizes: dict[str, Any] = {"architecture": architecture, "tensors": len(found.state)}
    else:
        state, left_out = _encoder_part(_without_prefix(found.state))
        shape, heads_from = _shape(state, num_heads, str(found.args.get("model", "")), where)
        _check_state(state, shape, where)
        config, sizes = _config(shape, name, license), {**shape.sizes, "num_heads_from": heads_from}
    kept = {"shape": sizes, "left_out": left_out}
    return save_weights(out, state, config, provenance | kept, "float32" if architecture is None else None)


def _timm_config(architecture: str, name: str | None, license: str) -> EncoderConfig:
    """How to build a model of timm's, without a classifier; a CLIP with its projection."""
    names = [*timm.list_models(), *timm.list_pretrained()]
    known = timm.get_pretrained_cfg(architecture) if architecture in names else None
    if known is None:
        raise UsageError(f"timm {timm.__version__} has no {architecture!r}. {nearest(architecture, names)}".rstrip())
    config = timm_config(architecture)
    usual = row_of(None, known.hf_hub_id or "")
    if usual and usual.name != config.name and "." in architecture:
        logger.warning("%s is not what its authors run, that is %s: %s", config.name, usual.name, usual.why)
    name = name or f"{config.architecture}.imported"
    _check_name(name)
    classes = config.num_classes if is_projection(config.architecture, config.num_classes) else 0
    return replace(config, name=name, license=license or "unknown", num_classes=classes)


def _read(checkpoint: Path, key: str | None) -> _Checkpoint:
    if not checkpoint.is_file():
        raise WeightsError(f"no checkpoint at {str(checkpoint)!r}: expected a .pth or .safetensors file")
    body: Any = _load(checkpoint)
    if key is None:
        key = next((one for one in WRAPPERS if isinstance(body, dict) and isinstance(body.get(one), dict)), None)
    state = body if key is None else _entry(body, key, checkpoint)
    if not isinstance(state, dict) or not state or not all(map(_is_weight, state, state.values())):
        asked = f"as {key!r}" if key else f"neither as {' or '.join(WRAPPERS)} nor as a whole"
        other = next((one for one in _entries(body) if "state_dict" in one and one != key), "ENTRY")
        raise WeightsError(
            f"{str(checkpoint)!r} has no state dict, {asked}: it is {_kind(body)}; --key {other} (key=) takes an entry"
        )
    weights = {name: value.detach() for name, value in state.items()}
    _check_size(weights, checkpoint)
    rest = body if key else {}
    epoch, args = rest.get("epoch"), rest.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    epoch = epoch if type(epoch) is int and 0 <= epoch < LARGEST else None
    return _Checkpoint(weights, key, epoch, _Plain().dict(args) if isinstance(args, dict) else {})


def _entry(body: Any, key: str, checkpoint: Path) -> Any:
    """Find an entry by its name, or by names with dots between them."""
    if key in _entries(body):
        return body[key]
    first, _, rest = key.partition(".")
    if rest and first in _entries(body):
        return _entry(body[first], rest, checkpoint)
    raise UsageError(f"{str(checkpoint)!r} has no entry {key!r}: it has {_some(_entries(body)) or 'none with names'}")


def _entries(body: Any) -> list[str]:
    return [one for one in body if isinstance(one, str)] if isinstance(body, dict) else []


def _kind(body: Any) -> str:
    return (
        f"a dict with {_some(_entries(body)) or 'no names'}" if isinstance(body, dict) else f"a {type(body).__name__}"
    )


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off what stands before all names: `module.` of DistributedDataParallel, `model.` of Lightning."""
    split = [name.split(".") for name in state]
    before = zip(*(one[:-1] for one in split), strict=False)
    words = sum(1 for _ in itertools.takewhile(lambda word: len({*word}) == 1, before))
    return {".".join(one[words:]): value for one, value in zip(split, state.values(), strict=True)}


def _is_weight(key: object, value: object) -> bool:
    """Whether this is a tensor whose numbers are there, under a name."""
    if not (isinstance(key, str) and isinstance(value, Tensor)):
        return False
    return value.device.type == "cpu" and value.layout == torch.strided and not value.is_quantized


def _check_size(state: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Refuse tensors that claim far more numbers than the file has, by strides of 0 or one storage for many of them.

    Honest files have some tensors under two names, as of tied layers or of running means at their start.
    """
    claimed, there = sum(value.numel() * value.element_size() for value in state.values()), checkpoint.stat().st_size
    if claimed > MOST_SHARED * there or any(value.numel() > _stored(value) for value in state.values()):
        raise WeightsError(f"{str(checkpoint)!r} has {there:,} bytes, and its tensors claim {claimed:,}: it is a fake")


def _stored(value: Tensor) -> int:
    return value.untyped_storage().nbytes() // value.element_size()


def _load(checkpoint: Path) -> Any:
    """The content of a file, by torch's restricted unpickler: tensors and plain values, and nothing that runs."""
    where = repr(str(checkpoint))
    if checkpoint.suffix == ".safetensors":
        return read_tensors(checkpoint)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped where the format allows it, so that the optimiser's two thirds of the file stay on disk.
            mapped = zipfile.is_zipfile(checkpoint)
            if mapped and _is_compressed(checkpoint):
                raise ValueError("compressed")  # torch compresses nothing, and what unpacks has no bounds
            if _names_bytearray(checkpoint):
                raise ValueError("GLOBAL builtins.bytearray")  # torch would make one of any size
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of kinds of pickles: what cannot be read is said below
                return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the unpickler raises whatever a damaged file makes it raise
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise WeightsError(
                f"{where} asks for {foreign[1]}, which is neither a tensor nor a plain value. Reading that could run "
                "code, so the file is refused; nothing in it was run. Ask its makers for the state dict alone: "
                "torch.save(model.state_dict(), FILE)"
            ) from None
        raise WeightsError(
            f"{where} is damaged or was not written by torch.save ({type(error).__name__}): fetch or copy it again"
        ) from None


def _is_compressed(checkpoint: Path) -> bool:
    with zipfile.ZipFile(checkpoint) as packed:
        return any(one.compress_type != zipfile.ZIP_STORED for one in packed.infolist())


def _names_bytearray(checkpoint: Path) -> bool:
    with open_regular(checkpoint) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(b"\nbytearray\n") >= 0  # as a pickle names a global


class _Plain:
    """Values as JSON can hold them, and as many as a command line has: what cannot be is named by its type."""

    def __init__(self) -> None:
        self.left = MOST_ARGS  # a pickle may have the same list a million times, in lists of lists of it

    def dict(self, found: Mapping[Any, Any], depth: int = 0) -> dict[str, Any]:
        """Take what has a name."""
        named = [(str(key), value) for key, value in found.items() if isinstance(key, str | bool | float)]
        named += [(str(key), value) for key, value in found.items() if type(key) is int and abs(key) < LARGEST]
        return {key[:LONGEST_ARG]: self.value(value, depth + 1) for key, value in named[:MOST_ARGS] if self.left > 0}

    def value(self, value: Any, depth: int) -> Any:
        """Take one value, and what is in it."""
        self.left -= 1
        if isinstance(value, dict) and depth < DEEPEST_ARG:
            return self.dict(value, depth)
        if isinstance(value, list | tuple) and depth < DEEPEST_ARG:
            return [self.value(item, depth + 1) for item in value[:MOST_ARGS] if self.left > 0]
        if isinstance(value, str):
            return value[:LONGEST_ARG]
        if value is None or isinstance(value, bool) or (isinstance(value, int) and abs(value) < LARGEST):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        return f"<{type(value).__name__}>"


def _encoder_part(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Without the parts that only training needs; and the names of those parts."""
    left_out = [key for key in state if key == "mask_token" or key.startswith(("decoder_", "head."))]
    return {key: value for key, value in state.items() if key not in left_out}, left_out


def _shape(state: Mapping[str, Tensor], num_heads: int | None, model: str, where: str) -> tuple[Arch, str]:
    """The ViT's shape, read off its tensors, and where the number of heads comes from."""
    if missing := [key for key in NEEDED if key not in state]:
        raise WeightsError(
            f"{where} is no ViT of this method: it lacks {_some(missing)}; it has {_some(state)}. Weights of another "
            "model of timm need its name, --architecture resnet50 (architecture=)"
        )
    cls_token, pos_embed, patches, hidden = (tuple(state[key].shape) for key in NEEDED)
    grid = math.isqrt(pos_embed[1] - 1) if len(pos_embed) == 3 and pos_embed[1] > 1 else 0
    ranks = tuple(map(len, (cls_token, patches, hidden)))
    if ranks != (3, 4, 2) or 0 in (*cls_token, *patches, grid) or pos_embed[1] != 1 + grid * grid:
        shapes = ", ".join(f"{key} {tuple(state[key].shape)}" for key in NEEDED)
        raise WeightsError(f"{where} is no ViT of this method on square images: it has {shapes}")
    width, depth = cls_token[2], len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    sizes = {"embed_dim": width, "depth": depth, "mlp_ratio": hidden[0] / width}
    sizes |= {"patch_size": patches[2], "image_size": grid * patches[2]}
    read(_Sizes, sizes, f"the network in {where}", WeightsError)
    heads, heads_from = _heads(width, depth, num_heads, model)
    ratio = hidden[0] / width
    if int(width * ratio) < hidden[0]:  # as timm multiplies; rounding can lose a unit
        ratio = math.nextafter(ratio, math.inf)
    return Arch("", width, depth, heads, patches[2], grid * patches[2], ratio), heads_from


def _heads(width: int, depth: int, given: int | None, model: str) -> tuple[int, str]:
    """The number of attention heads, from the option, a known shape, or the model's name in the run's arguments."""
    if given is not None:
        if given < 1 or width % given:
            raise UsageError(f"num_heads={given} does not divide the width of the weights, {width}")
        return given, "given"
    for arch in ARCHS.values():
        if (arch.embed_dim, arch.depth) == (width, depth):
            return arch.num_heads, arch.timm_name
    for word, (size, heads) in SIZES.items():
        if word in model.lower() and size == width:
            return heads, model
    raise UsageError(
        f"the number of attention heads is not in the weights, and no known encoder is {width} wide and {depth} blocks "
        "deep: give --num-heads N (num_heads=N), as the code that trained it says"
    )


def _check_state(state: Mapping[str, Tensor], shape: Arch, where: str) -> None:
    """Every tensor that the ViT has and no other, of its shape, finite; and the position table of the method."""
    expected = _expected(shape)
    missing, unexpected = [k for k in expected if k not in state], [k for k in state if k not in expected]
    if missing or unexpected:
        parts = [f"it lacks {_some(missing)}"] if missing else []
        parts += [f"it has {_some(unexpected)} besides"] if unexpected else []
        raise WeightsError(f"{where} is no ViT of this method, {shape.depth} blocks deep: {'; '.join(parts)}")
    for key, size in expected.items():
        value = state[key]
        if tuple(value.shape) != size or value.dtype not in FLOATS:
            raise WeightsError(f"{where}: {key} must be {size} floats, got {tuple(value.shape)} {value.dtype}")
    if broken := [key for key in expected if not state[key].isfinite().all()]:
        raise WeightsError(f"{where}: not finite: {_some(broken)}. The run had failed: take an earlier checkpoint.")
    grid = (shape.image_size // shape.patch_size,) * 2
    off = (state["pos_embed"][0].float() - position_table(shape.embed_dim, grid, grid)).abs().max().item()
    if off > POSITION_TOLERANCE:
        raise WeightsError(
            f"{where}: pos_embed is not the fixed sin-cos table that MiCL and MAE train with (it is off by {off:.2g}, "
            f"{POSITION_TOLERANCE:g} is allowed): another method's weights, or fine-tuned or half-precision ones"
        )


def _expected(shape: Arch) -> dict[str, tuple[int, ...]]:
    """Ask timm for the name and shape of every tensor; nothing is allocated."""
    architecture, model_args = timm_architecture(**shape.sizes)
    with torch.device("meta"):
        vit = timm.create_model(architecture, num_classes=0, **model_args)
    return {key: tuple(value.shape) for key, value in vit.state_dict().items()}


def _config(shape: Arch, name: str | None, license: str) -> EncoderConfig:
    """How to build it, with the evaluation transform of the authors' code."""
    architecture, model_args = timm_architecture(**shape.sizes)
    known = next((arch for arch in ARCHS if ARCHS[arch].timm_name == architecture and not model_args), None)
    name = name or f"{known or f'vit_{shape.embed_dim}x{shape.depth}'}.imported"
    arch = _check_name(name)
    if arch in ARCHS and arch != known:
        raise UsageError(f"{name!r} was asked for, but the weights are those of {known or 'no arch with a name'}")
    transform = Transform.square(shape.image_size, int(shape.image_size / CROP_PCT))
    return EncoderConfig(name, architecture, model_args, shape.embed_dim, transform, license)


def _check_name(name: str) -> str:
    arch, _, tag = name.partition(".")
    if not (re.fullmatch(r"\w+", arch, re.ASCII) and re.fullmatch(r"[\w.-]{1,100}", tag, re.ASCII)):
        raise UsageError(f"a name is arch.tag, as vit_b16.imported, got {name!r}")
    return arch


def _some(keys: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = [printable(key) for key in keys]  # on one line
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
