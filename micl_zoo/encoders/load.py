"""A name or a path, and the wishes of a user -> an encoder, ready to embed. Alone in knowing every backend."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch

from ..errors import UsageError, unknown
from ..schema import Between, checked
from ..telemetry import no_telemetry
from .device import DTYPES, Backend, Device, find_backend, resolve_device
from .encoder import Encoder
from .hub import record_onnx, record_weights
from .torch_model import TorchModel, build_vit
from .weights import EncoderConfig, Weights, local_weights
from .zoo import ARCHS, DEFAULT, Record, find_record, is_name, record_of, timm_architecture


@checked
def load(
    name: str | os.PathLike[str] = DEFAULT,
    *,
    weights: str | os.PathLike[str] | None = None,
    pretrained: bool = True,
    device: Device = "auto",
    dtype: str = "auto",
    backend: Backend = "torch",
    providers: Annotated[Sequence[str], Between(1)] | None = None,
) -> Encoder:
    """Load an encoder, ready to embed.

    Args:
        name: `arch.tag`, or a bare arch for its best published tag, see `list_models`; or a path, which then stands for
            `weights`: an os.PathLike, or a text that is no name and reads like a path, or where something is.
        weights: your own weights: a .safetensors file, a folder with `model.safetensors` and `config.json`, or of a
            training run a checkpoint or the folder, which stands for its finished encoder, else its newest checkpoint.
            For backend "onnx" the .onnx file that `micl-zoo export` wrote, or its folder.
        pretrained: False gives random weights, and only False does.
        device: "auto" (a GPU when there is one), "cpu", "cuda", "cuda:N" or "mps".
        dtype: of the weights in memory: "float32", "bfloat16" or "float16"; "auto" is float32.
        backend: "torch"; "openvino", faster on Intel's and AMD's CPUs, without gradients, in the precision of
            `torch.autocast` where the CPU has it; or "onnx", which runs an exported file in ONNX Runtime, in the file's
            precision.
        providers: for backend "onnx": ONNX Runtime's execution providers, first choice first, such as
            "TensorrtExecutionProvider" or just "tensorrt". None is CUDA on a GPU, the CPU elsewhere.

    Raises:
        UsageError: a name or an argument that does not exist.
        WeightsError: the weights are not published, not reachable, or not the right ones.
    """
    no_telemetry()
    name, path = _name_and_path(name, weights)
    if path is not None and not pretrained:
        raise UsageError("weights= and pretrained=False contradict each other: give one")
    device = str(device)
    _check(backend, device, dtype, providers)
    if backend == "onnx":
        if not pretrained:
            raise UsageError("backend onnx runs exported files: export random weights first, or take backend torch")
        return _load_onnx(name, path, device, providers)
    target = resolve_device("cpu" if backend == "openvino" else device)
    config, found, record = _find(name, path, pretrained)
    vit, sha256 = build_vit(config, found), found.sha256 if found else None
    record = record or (record_of(sha256) if sha256 else None)
    if backend == "openvino":
        from .openvino_model import OpenVinoModel

        return Encoder(OpenVinoModel(vit), config, record=record, weights_sha256=sha256)
    vit = vit.to(target, torch.float32 if dtype == "auto" else getattr(torch, dtype))
    return Encoder(TorchModel(vit), config, record=record, weights_sha256=sha256)


def _name_and_path(name: str | os.PathLike[str], weights: str | os.PathLike[str] | None) -> tuple[str, Path | None]:
    """Tell the name asked for from a path, where weights are on this machine."""
    if isinstance(name, str) and (not name or is_name(name) or not _is_path(name)):
        return name, None if weights is None else Path(weights)
    if weights is not None:
        raise UsageError(f"weights of two places were asked for, {str(name)!r} and {str(weights)!r}: give one")
    return DEFAULT, Path(name)


def _is_path(text: str) -> bool:
    """Whether a text that is no name can only mean a path, or something is there."""
    try:
        return "/" in text or os.sep in text or text.endswith((".safetensors", ".onnx")) or Path(text).exists()
    except OSError:  # a name of thousands of letters, a folder that may not be entered
        return True


def _check(backend: str, device: str, dtype: str, providers: Sequence[str] | None) -> None:
    row = find_backend(backend)
    if dtype not in ("auto", *DTYPES):
        raise UsageError(unknown("dtype", dtype, ("auto", *DTYPES)))
    if dtype not in ("auto", *row.dtypes):
        kept = " or ".join(row.dtypes) or "the precision of the file"
        raise UsageError(
            f"backend {backend} keeps weights in {kept}, not in {dtype!r}: leave dtype out; the precision of the "
            "arithmetic is another matter, see torch.autocast and `micl-zoo extract --precision`"
        )
    if providers is not None and not row.exported:
        raise UsageError(f"providers are ONNX Runtime's: they go with backend onnx, not with {backend}")
    if row.devices and providers is None and device.partition(":")[0] not in ("auto", *row.devices):
        runs = f"runs on {' and '.join(row.devices)}, not on {device!r}"
        raise UsageError(f"backend {backend} {runs}: leave device out, or take backend torch")


def _find(name: str, path: Path | None, pretrained: bool) -> tuple[EncoderConfig, Weights | None, Record | None]:
    if path is not None:
        found = local_weights(path)
        _check_arch(name, found.config)
        return found.config, found, None
    record = find_record(name)
    if pretrained:
        found = record_weights(record)
        return found.config, found, record
    shape, about = record.shape, (record.transform, record.license)
    return EncoderConfig(record.name, *timm_architecture(**shape.sizes), shape.embed_dim, *about), None, record


def _load_onnx(name: str, path: Path | None, device: str, providers: Sequence[str] | None) -> Encoder:
    from .onnx_session import OnnxSession, choose_providers, local_onnx, runtime

    runtime()  # raises before anything is downloaded
    file, sha256 = (local_onnx(path), None) if path else record_onnx(find_record(name))
    opened = OnnxSession(file, choose_providers(device, providers), sha256)
    config, sha256 = opened.card.config, opened.sha256
    if path is not None:
        _check_arch(name, config)
    return Encoder(opened, config, record=record_of(sha256), weights_sha256=sha256)


def _check_arch(name: str, config: EncoderConfig) -> None:
    """Refuse a name that contradicts the weights beside it."""
    arch = name.partition(".")[0]
    if name != DEFAULT and arch in ARCHS and ARCHS[arch].timm_name != config.architecture:
        raise UsageError(f"{name!r} was asked for, but the weights are those of {config.name} ({config.architecture})")
