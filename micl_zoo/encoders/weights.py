"""Safetensors files of encoders: what their headers and config.json say, written and read. Never a pickle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import WeightsError
from ..files import atomic_path, file_sha256, sum_file, write_text
from ..images.transform import Transform
from .zoo import RECORDS, timm_architecture, vit_sizes

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
ONNX_FILE = "model.onnx"
# Config and provenance in the safetensors header: one entry, as the library shuffles several.
HEADER_KEY = "micl_zoo"
CHECKPOINT_KEYS = {"step", "seconds"}  # in the headers of training's checkpoints


@dataclass(frozen=True)
class EncoderConfig:
    """What building an encoder takes before its weights are read: timm's hub `config.json`."""

    name: str  # `arch.tag`.
    architecture: str  # timm's model name
    model_args: dict[str, Any]  # where the model departs from timm's defaults for that name
    embed_dim: int  # numbers per embedding
    transform: Transform  # from an image to pixel_values
    license: str = "unknown"  # of the weights

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `config.json`."""
        return {
            "architecture": self.architecture,
            "num_classes": 0,
            "num_features": self.embed_dim,
            "global_pool": "token",
            "model_args": self.model_args,
            "pretrained_cfg": {
                "tag": self.name.partition(".")[2],
                "license": self.license,
                **self.transform.to_timm(),
                "num_classes": 0,
                "first_conv": "patch_embed.proj",
                "classifier": "head",
            },
            "micl_zoo": {"name": self.name},
        }

    @classmethod
    def from_dict(cls, body: dict[str, Any], *, where: str) -> EncoderConfig:
        """Read a parsed `config.json`, ours or timm's."""
        try:
            architecture, config = body["architecture"], body["pretrained_cfg"]
            name = body.get("micl_zoo", {}).get("name") or f"{architecture}.local"
            shape = (architecture, body.get("model_args", {}), body["num_features"])
            return cls(name, *shape, Transform.from_timm(config), config.get("license", "unknown"))
        except (KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"the config of {where} is not one that timm or micl-zoo writes: {error!r}") from None


@dataclass(frozen=True)
class Weights:
    """A safetensors file, its bytes checked where there is something to check them against."""

    path: Path  # of the file
    sha256: str  # of its bytes
    config: EncoderConfig  # how to build the encoder


def recipe_config(recipe: Mapping[str, Any]) -> EncoderConfig:
    """Return how to build the encoder that a pre-training recipe trains, from the recipe's fields, see run.json."""
    architecture, model_args = timm_architecture(**vit_sizes(recipe))
    size, record = recipe["image_size"], RECORDS.get(recipe["name"])
    transform = Transform(size, size, "bicubic", tuple(recipe["pixel_mean"]), tuple(recipe["pixel_std"]))
    if record and record.transform.size == size:
        transform = record.transform
    return EncoderConfig(recipe["name"], architecture, model_args, recipe["embed_dim"], transform)


def save_weights(
    folder: Path,  # made if need be
    state: dict[str, Tensor],  # under timm's names
    config: EncoderConfig | dict[str, Any],  # a dict for another timm model than an encoder; also goes into the header
    provenance: dict[str, Any],  # recipe, code, data, machine; goes into the header
    dtype: Literal["float32", "float16"],  # on disk
) -> Path:
    """Write `model.safetensors` and `config.json`, in the layout of timm's hub repositories; return the former."""
    import torch
    from safetensors.torch import save_file

    body = config if isinstance(config, dict) else config.to_dict()
    tensors = {key: value.detach().to("cpu", getattr(torch, dtype)).contiguous() for key, value in state.items()}
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary, {HEADER_KEY: json.dumps({"config": body, "provenance": provenance})})
    write_text(folder / CONFIG_FILE, config_text(body))
    return folder / WEIGHTS_FILE


def config_text(config: dict[str, Any]) -> str:
    """Return the text of a `config.json`: the same bytes wherever it is written."""
    return json.dumps(config, indent=2) + "\n"


def local_weights(path: Path) -> Weights:
    """Find weights, at any path that `load` takes, and how to build their encoder."""
    file = path
    if path.is_dir():  # the run's finished encoder before its newest checkpoint
        checkpoints = sorted(path.glob("checkpoints/step-*.safetensors"), reverse=True)
        choices = [path / WEIGHTS_FILE, path / "encoder" / WEIGHTS_FILE, *checkpoints]
        file = next((choice for choice in choices if choice.is_file()), choices[0])
    if not file.is_file():
        wanted = f"a .safetensors file, a folder with {WEIGHTS_FILE}, or the folder of a training run"
        raise WeightsError(f"no weights at {str(path)!r}: expected {wanted}")
    if file.suffix == ".onnx":
        raise WeightsError(f'{str(file)!r} is an ONNX file: load it with backend="onnx", extract with --backend onnx')
    if file.suffix != ".safetensors":
        raise WeightsError(
            f"{str(file)!r} is not a .safetensors file. Other formats can run code when they are read; convert it "
            "once with safetensors.torch.save_file(state_dict, 'model.safetensors') on a machine you can lose"
        )
    if _metadata(file).keys() >= CHECKPOINT_KEYS:
        return _checkpoint(file)
    config = header(file).get("config") or _json(file.parent / CONFIG_FILE)
    if config is None:
        raise WeightsError(f"{str(file)!r} says nothing of its architecture: put timm's {CONFIG_FILE} beside it")
    return Weights(file, file_sha256(file), EncoderConfig.from_dict(config, where=str(file)))


def _checkpoint(file: Path) -> Weights:
    """Read a run's checkpoint, of which older versions say in run.json alone what was trained."""
    sha256, beside = file_sha256(file), sum_file(file)
    if beside.is_file() and beside.read_text(encoding="utf-8").split()[:1] != [sha256]:
        raise WeightsError(f"{str(file)!r} is damaged, it has sha256 {sha256}: take another checkpoint")
    body, run = header(file).get("config"), file.parent.parent / "run.json"
    try:
        config = EncoderConfig.from_dict(body, where=str(file)) if body else recipe_config((_json(run) or {})["recipe"])
    except KeyError:
        raise WeightsError(
            f"{str(file)!r} is a checkpoint that does not say what was trained, nor does {str(run)!r} beside it: "
            "put it back into its run's folder; of an older run of fine-tuning load RUN/encoder"
        ) from None
    return Weights(file, sha256, dataclasses.replace(config, name=f"{config.name}-{file.stem}"))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file; of a run's checkpoint the encoder's part, from the running means if it has them."""
    from safetensors import safe_open

    checkpoint = _metadata(file).keys() >= CHECKPOINT_KEYS
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
        means = any(name.startswith("ema.") for name in names)
        prefix = "" if not checkpoint else "ema." if means else "model."
        tensors = {name[len(prefix) :]: opened.get_tensor(name) for name in names if name.startswith(prefix)}
    return without_head(tensors) if checkpoint else tensors


def without_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the state of a classifier into that of an encoder; an encoder's own state comes back as it is.

    An encoder has its final norm before it pools. One that pools by the mean gets the classifier's norm, which was
    trained for the mean of the patch tokens: embeddings by pool "mean" are near what the head saw, and not equal to it.
    """
    return {key.replace("fc_norm.", "norm."): value for key, value in state.items() if not key.startswith("head.")}


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{str(file)!r} is damaged or no safetensors file: {error}") from None


def header(file: Path) -> dict[str, Any]:
    """Return what this package wrote into a safetensors header: `config` and `provenance`; {} for others' files."""
    return _parse(_metadata(file).get(HEADER_KEY, "{}"), f"the header of {file}")


def _json(file: Path) -> dict[str, Any] | None:
    return _parse(file.read_text(encoding="utf-8"), str(file)) if file.is_file() else None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise WeightsError(f"{where} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise WeightsError(f"{where} must be a JSON object, got {type(parsed).__name__}")
    return parsed
