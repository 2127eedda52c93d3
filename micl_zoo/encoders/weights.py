"""Embedded file | local file or folder | hub -> the verified safetensors of one encoder. Never a pickle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import WeightsError
from ..files import file_sha256
from ..images.transform import Transform

if TYPE_CHECKING:
    from torch import Tensor

    from .zoo import Record

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
ONNX_FILE = "model.onnx"
# Config and provenance in the safetensors header: one entry, as the library shuffles several.
HEADER_KEY = "micl_zoo"


@dataclass(frozen=True)
class EncoderConfig:
    """What it takes to build an encoder before its weights are read: timm's hub `config.json`.

    Attributes:
        name: `arch.tag`.
        architecture: timm's model name.
        model_args: where the model departs from timm's defaults for that name.
        embed_dim: numbers an embedding.
        transform: of the images.
        license: of the weights.
    """

    name: str
    architecture: str
    model_args: dict[str, Any]
    embed_dim: int
    transform: Transform
    license: str = "unknown"

    def to_json(self) -> str:
        """The text of `config.json`."""
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
            WeightsError: what is missing, and where.
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
    """A safetensors file whose bytes were checked where there is something to check them against.

    Attributes:
        path: of the file.
        sha256: of its bytes.
        config: how to build the encoder.
    """

    path: Path
    sha256: str
    config: EncoderConfig


def save_weights(
    folder: Path,
    state: dict[str, Tensor],
    config: EncoderConfig,
    provenance: dict[str, Any],
    dtype: Literal["float32", "float16"],
) -> Path:
    """Write `model.safetensors` and `config.json`, the layout of timm's hub repositories.

    Args:
        folder: made if need be.
        state: the ViT's state dict, under timm's names.
        config: goes beside the weights and into their header.
        provenance: goes into the header: recipe, code, data, machine.
        dtype: of the tensors on disk.
    """
    return write_weights(folder, state, json.loads(config.to_json()), provenance, dtype)


def config_text(config: dict[str, Any]) -> str:
    """The text of a `config.json`: the same bytes wherever it is written."""
    return json.dumps(config, indent=2) + "\n"


def write_weights(
    folder: Path,
    state: dict[str, Tensor],
    config: dict[str, Any],
    provenance: dict[str, Any],
    dtype: Literal["float32", "float16"],
) -> Path:
    """As `save_weights`, of any timm model: `config` is what its hub `config.json` says."""
    import torch
    from safetensors.torch import save_file

    from ..files import atomic_path, write_text

    tensors = {key: value.detach().to("cpu", getattr(torch, dtype)).contiguous() for key, value in state.items()}
    entry = json.dumps({"config": config, "provenance": provenance})
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary, {HEADER_KEY: entry})
    write_text(folder / CONFIG_FILE, config_text(config))
    return folder / WEIGHTS_FILE


def local_weights(path: Path) -> Weights:
    """Weights from a file, or from a folder with `model.safetensors` and `config.json`. They are taken as they are.

    Raises:
        WeightsError: nothing there, a pickle, or a file without a config.
    """
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise WeightsError(
            f"no weights at {str(path)!r}: expected a .safetensors file, or a folder with {WEIGHTS_FILE}"
        )
    if file.suffix == ".onnx":
        raise WeightsError(f'{str(file)!r} is an ONNX file: load it with backend="onnx", extract with --backend onnx')
    if file.suffix != ".safetensors":
        raise WeightsError(
            f"{str(file)!r} is not a .safetensors file. Other formats can run code when they are read; convert it "
            "once with safetensors.torch.save_file(state_dict, 'model.safetensors') on a machine you can lose"
        )
    config = header(file).get("config")
    beside = file.parent / CONFIG_FILE
    if config is None and beside.is_file():
        config = _parse(beside.read_text(encoding="utf-8"), str(beside))
    if config is None:
        raise WeightsError(f"{str(file)!r} says nothing of its architecture: put timm's {CONFIG_FILE} beside it")
    return Weights(file, file_sha256(file), EncoderConfig.from_json(config, where=str(file)))


def header(file: Path) -> dict[str, Any]:
    """What this package wrote into a safetensors header: `config` and `provenance`; empty for others' files.

    Raises:
        WeightsError: the file is damaged or no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            entry = (opened.metadata() or {}).get(HEADER_KEY, "{}")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{str(file)!r} is damaged or no safetensors file: {error}") from None
    return _parse(entry, f"the header of {file}")


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise WeightsError(f"{where} is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise WeightsError(f"{where} must be a JSON object, got {type(parsed).__name__}")
    return parsed


def record_weights(record: Record) -> Weights:
    """The weights of a row of the table: embedded in the package or from the hub, sha256 checked on every load.

    Raises:
        WeightsError: not published, not reachable, or not the right bytes.
    """
    if record.embedded:
        file = embedded_file(record.embedded)
        found = file_sha256(file)
    elif record.hub_repo and record.hub_commit:
        file, found = _from_hub(record, WEIGHTS_FILE, record.sha256)
    else:
        raise WeightsError(not_published(record))
    if found != record.sha256:
        raise WeightsError(
            f"the weights of {record.name} are not the published ones: sha256 {found}, expected {record.sha256}. "
            f"Delete {file.name} where it lies ({file.parent}) and load again."
        )
    config = EncoderConfig.from_json(header(file).get("config", {}), where=record.name)
    assert config.transform == record.transform, (config.transform, record.transform)
    return Weights(file, found, config)


def record_onnx(record: Record) -> tuple[Path, str]:
    """The ONNX file of a row of the table, from where its weights are, and its sha256, checked on every load.

    Raises:
        WeightsError: there is none, not reachable, or not the right bytes.
    """
    if record.onnx is None:
        raise WeightsError(
            f"no ONNX file of {record.name} comes with micl-zoo: micl-zoo export {record.name} -o DIR, and then "
            'micl_zoo.load(weights="DIR", backend="onnx")'
        )
    if record.embedded:
        file, mend = embedded_file(record.onnx.file), "Reinstall micl-zoo."
        found = file_sha256(file)
    else:
        file, found = _from_hub(record, record.onnx.file, record.onnx.sha256)
        mend = f"Delete {file.name} where it lies ({file.parent}) and load again."
    if found != record.onnx.sha256:
        raise WeightsError(
            f"the ONNX file of {record.name} is not the published one: sha256 {found}, expected {record.onnx.sha256}. "
            + mend
        )
    return file, found


def embedded_file(name: str) -> Path:
    """A file that comes with the package.

    Raises:
        WeightsError: it does not.
    """
    file = Path(__file__).parents[1] / "embedded" / name
    if not file.is_file():
        raise WeightsError(f"the package is incomplete: {name} is missing. Reinstall micl-zoo.")
    return file


def not_published(record: Record) -> str:
    """The text for an encoder without weights: the three ways on."""
    arch = record.arch
    return (
        f"no weights of {record.name} are published yet. Three ways on: "
        f"(1) train it: micl-zoo train {record.recipe} --data IMAGES --out RUN; "
        f'(2) load weights of your own: micl_zoo.load("{arch}", weights="RUN/encoder"); '
        f'(3) start from random weights: micl_zoo.load("{arch}", pretrained=False).'
    )


def _from_hub(record: Record, name: str, sha256: str | None) -> tuple[Path, str]:
    """Download a file or find it in the cache, by full commit; a cached one with wrong bytes is fetched once more."""
    from huggingface_hub import hf_hub_download

    assert record.hub_repo is not None
    repo, found, file = record.hub_repo, "", Path()
    for force in (False, True):
        try:
            file_name = hf_hub_download(repo, name, revision=record.hub_commit, force_download=force)
        except Exception as error:  # huggingface-hub raises its own, httpx's, requests' and OSError
            if found:
                break
            raise WeightsError(
                f"cannot fetch {record.name} from {repo} at {record.hub_commit}: {error}. "
                f"Without a network, run micl-zoo download {record.name} --to FOLDER where there is one, bring FOLDER "
                f'here and give micl_zoo.load("{record.name}", weights="FOLDER").'
            ) from error
        file = Path(file_name)
        found = file_sha256(file)
        if found == sha256:
            break
    return file, found
