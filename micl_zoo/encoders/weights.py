"""Safetensors files of encoders: what their headers and config.json say, written and read. Never a pickle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import WeightsError
from ..files import atomic_path, file_sha256, write_text
from ..images.transform import Transform
from .zoo import RECORDS, timm_architecture

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
ONNX_FILE = "model.onnx"
# Config and provenance in the safetensors header: one entry, as the library shuffles several.
HEADER_KEY = "micl_zoo"


@dataclass(frozen=True)
class EncoderConfig:
    """What building an encoder takes before its weights are read: timm's hub `config.json`.

    Attributes:
        name: `arch.tag`.
        architecture: timm's model name.
        model_args: where the model departs from timm's defaults for that name.
        embed_dim: numbers per embedding.
        transform: from an image to pixel_values.
        license: of the weights.
    """

    name: str
    architecture: str
    model_args: dict[str, Any]
    embed_dim: int
    transform: Transform
    license: str = "unknown"

    def to_json(self) -> str:
        """Return the text of `config.json`."""
        body = {
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
        return config_text(body)

    @classmethod
    def from_json(cls, body: dict[str, Any], *, where: str) -> EncoderConfig:
        """Read a parsed `config.json`, ours or timm's.

        Raises:
            WeightsError: something is missing; the text says what, and where.
        """
        try:
            name = body.get("micl_zoo", {}).get("name") or f"{body['architecture']}.local"
            config = body["pretrained_cfg"]
            return cls(
                name=name,
                architecture=body["architecture"],
                model_args=body.get("model_args", {}),
                embed_dim=body["num_features"],
                transform=Transform.from_timm(config),
                license=config.get("license", "unknown"),
            )
        except (KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"the config of {where} is not one that timm or micl-zoo writes: {error!r}") from None


@dataclass(frozen=True)
class Weights:
    """A safetensors file, its bytes checked where there is something to check them against.

    Attributes:
        path: of the file.
        sha256: of its bytes.
        config: how to build the encoder.
    """

    path: Path
    sha256: str
    config: EncoderConfig


def recipe_config(recipe: Mapping[str, Any]) -> EncoderConfig:
    """Return how to build the encoder that a pre-training recipe trains, from the recipe's fields, see run.json."""
    shape = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    architecture, model_args = timm_architecture(**{name: recipe[name] for name in shape})
    size, record = recipe["image_size"], RECORDS.get(recipe["name"])
    if record and record.transform.size == size:
        transform = record.transform
    else:
        transform = Transform(size, size, "bicubic", tuple(recipe["pixel_mean"]), tuple(recipe["pixel_std"]))
    return EncoderConfig(recipe["name"], architecture, model_args, recipe["embed_dim"], transform)


def save_weights(
    folder: Path,
    state: dict[str, Tensor],
    config: EncoderConfig | dict[str, Any],
    provenance: dict[str, Any],
    dtype: Literal["float32", "float16"],
) -> Path:
    """Write `model.safetensors` and `config.json`, in the layout of timm's hub repositories; return the former.

    Args:
        folder: made if need be.
        state: the model's state dict, under timm's names.
        config: goes beside the weights and into their header; of another timm model than an encoder as a dict.
        provenance: goes into the header: recipe, code, data, machine.
        dtype: of the tensors on disk.
    """
    import torch
    from safetensors.torch import save_file

    body = config if isinstance(config, dict) else json.loads(config.to_json())
    tensors = {key: value.detach().to("cpu", getattr(torch, dtype)).contiguous() for key, value in state.items()}
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary, {HEADER_KEY: json.dumps({"config": body, "provenance": provenance})})
    write_text(folder / CONFIG_FILE, config_text(body))
    return folder / WEIGHTS_FILE


def config_text(config: dict[str, Any]) -> str:
    """Return the text of a `config.json`: the same bytes wherever it is written."""
    return json.dumps(config, indent=2) + "\n"


def local_weights(path: Path) -> Weights:
    """Find weights and how to build their encoder.

    Args:
        path: a .safetensors file, among them a checkpoint of a run; a folder with `model.safetensors` and
            `config.json`; or the folder of a run, which stands for its finished encoder, else its newest checkpoint.

    Raises:
        WeightsError: nothing is there, or a pickle, a damaged file, or one without a config.
    """
    file = _weights_file(path)
    if not file.is_file():
        raise WeightsError(
            f"no weights at {str(path)!r}: expected a .safetensors file, a folder with {WEIGHTS_FILE}, or the folder "
            "of a training run"
        )
    if file.suffix == ".onnx":
        raise WeightsError(f'{str(file)!r} is an ONNX file: load it with backend="onnx", extract with --backend onnx')
    if file.suffix != ".safetensors":
        raise WeightsError(
            f"{str(file)!r} is not a .safetensors file. Other formats can run code when they are read; convert it "
            "once with safetensors.torch.save_file(state_dict, 'model.safetensors') on a machine you can lose"
        )
    if "step" in _metadata(file):
        return _checkpoint(file)
    config = header(file).get("config")
    beside = file.parent / CONFIG_FILE
    if config is None and beside.is_file():
        config = _parse(beside.read_text(encoding="utf-8"), str(beside))
    if config is None:
        raise WeightsError(f"{str(file)!r} says nothing of its architecture: put timm's {CONFIG_FILE} beside it")
    return Weights(file, file_sha256(file), EncoderConfig.from_json(config, where=str(file)))


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    newest_first = sorted(path.glob("checkpoints/step-*.safetensors"), reverse=True)
    choices = [path / WEIGHTS_FILE, path / "encoder" / WEIGHTS_FILE, *newest_first]
    return next((file for file in choices if file.is_file()), choices[0])


def _checkpoint(file: Path) -> Weights:
    """Read a run's checkpoint, of which older versions say in run.json alone what was trained."""
    sha256, beside = file_sha256(file), file.with_name(f"{file.name}.sha256")
    if beside.is_file() and beside.read_text(encoding="utf-8").split()[:1] != [sha256]:
        raise WeightsError(f"{str(file)!r} is damaged, it has sha256 {sha256}: take another checkpoint")
    body, run = header(file).get("config"), file.parent.parent / "run.json"
    if body is not None:
        config = EncoderConfig.from_json(body, where=str(file))
    else:
        recipe = _parse(run.read_text(encoding="utf-8"), str(run)).get("recipe", {}) if run.is_file() else {}
        try:
            config = recipe_config(recipe)
        except KeyError:
            raise WeightsError(
                f"{str(file)!r} is a checkpoint that does not say what was trained, nor does {str(run)!r} beside it: "
                "put it back into its run's folder; of an older run of fine-tuning load RUN/encoder"
            ) from None
    return Weights(file, sha256, dataclasses.replace(config, name=f"{config.name}-{file.stem}"))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file; of a run's checkpoint the encoder's part, from the running means if it has them.

    Raises:
        WeightsError: the file is damaged or no safetensors.
    """
    from safetensors import safe_open

    checkpoint = "step" in _metadata(file)
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
    """Return what this package wrote into a safetensors header: `config` and `provenance`; {} for others' files.

    Raises:
        WeightsError: the file is damaged or no safetensors.
    """
    return _parse(_metadata(file).get(HEADER_KEY, "{}"), f"the header of {file}")


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise WeightsError(f"{where} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise WeightsError(f"{where} must be a JSON object, got {type(parsed).__name__}")
    return parsed
