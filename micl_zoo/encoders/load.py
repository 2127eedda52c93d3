"""A name or a path, and the wishes of a user -> an encoder, ready to embed. Alone in knowing every backend."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated

import torch

from ..errors import UsageError, WeightsError, unknown
from ..schema import Between, checked
from ..telemetry import no_telemetry
from ..zoo.hub import hub_weights, record_onnx, record_weights
from ..zoo.names import Place, find_place, timm_repository
from ..zoo.ours import ARCHS, DEFAULT, Record, find_record, is_name, record_of, timm_architecture
from ..zoo.weights import EncoderConfig, Weights, local_weights
from .build import build_model, timm_config
from .device import DTYPES, Backend, Device, find_backend, resolve_device
from .encoder import Encoder


@checked
def load(
    name: str | os.PathLike[str] = DEFAULT,
    *,
    weights: str | os.PathLike[str] | None = None,
    image_size: Annotated[int, Between(1, 4096)] | None = None,
    pretrained: bool = True,
    device: Device = "auto",
    dtype: str = "auto",
    backend: Backend = "torch",
    providers: Annotated[Sequence[str], Between(1)] | None = None,
) -> Encoder:
    """Load an encoder, ready to embed.

    Args:
        name: one of

            - `arch.tag` of our table, or a bare arch for its best published tag, see `list_models`;
            - a path: a .safetensors file, a folder with `model.safetensors` and `config.json`, or of a training run a
              checkpoint or the folder, which stands for its finished encoder, else its newest checkpoint; with backend
              "onnx" the .onnx file that `micl-zoo export` wrote, or its folder. `local-dir:FOLDER` is a path, too;
            - a repository of timm's layout on the hub: `OWNER/NAME` or `hf-hub:OWNER/NAME`, with `@REVISION` behind it
              if need be; where a folder OWNER is here, write hf-hub:;
            - timm's name of weights, such as "vit_small_patch14_reg4_dinov2.lvd142m".
        weights: a path, as `name` takes it; `name` then only says what must be there.
        image_size: side in pixels of the images, where the architecture can take others than it was trained on;
            positions are resampled once, and the transform keeps its crop. None is the encoder's own.
        pretrained: False gives random weights, and only False does; of a name of timm, too, without the network.
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
    device = str(device)
    _check(backend, device, dtype, providers)
    place = _untrained(name, weights) if not pretrained else find_place(name, weights)
    if backend == "onnx":
        if not pretrained or image_size is not None:
            raise UsageError("backend onnx runs exported files as they are: export with the size wanted")
        return _load_onnx(name, place, device, providers)
    target = resolve_device("cpu" if backend == "openvino" else device)
    config, found, record = _find(name, place, pretrained)
    config = config if image_size is None else config.at_size(image_size)
    model, sha256 = build_model(config, found), found.sha256 if found else None
    record = record or (record_of(sha256) if sha256 else None)
    if backend == "openvino":
        from .openvino_model import OpenVinoModel

        return Encoder(OpenVinoModel(model), config, record=record, weights_sha256=sha256)
    model.model.to(target, torch.float32 if dtype == "auto" else getattr(torch, dtype))
    return Encoder(model, config, record=record, weights_sha256=sha256)


def _untrained(name: str | os.PathLike[str], weights: str | os.PathLike[str] | None) -> Place:
    """Find a name of the table or of timm, whose shape can be had without weights, and without a network."""
    if weights is not None or not isinstance(name, str) or not (is_name(name) or timm_repository(name)):
        raise UsageError("pretrained=False gives random weights, and goes with a name of the table or of timm alone")
    return Place(record=find_record(name)) if is_name(name) else Place()


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


def _find(
    name: str | os.PathLike[str], place: Place, pretrained: bool
) -> tuple[EncoderConfig, Weights | None, Record | None]:
    if place.path is not None:
        found = local_weights(place.path)
        _check_arch(name, found.config)
        return found.config, found, None
    if place.pin is not None:
        found = hub_weights(place)
        return found.config, found, None
    record = place.record
    if record is None:
        return timm_config(str(name)), None, None
    if pretrained:
        found = record_weights(record)
        return found.config, found, record
    shape, about = record.shape, (record.transform, record.license)
    return EncoderConfig(record.name, *timm_architecture(**shape.sizes), shape.embed_dim, *about), None, record


def _load_onnx(name: str | os.PathLike[str], place: Place, device: str, providers: Sequence[str] | None) -> Encoder:
    from .onnx_session import OnnxSession, choose_providers, local_onnx, runtime

    runtime()  # raises before anything is downloaded
    if place.record:
        file, sha256 = record_onnx(place.record)
    elif place.path:
        file, sha256 = local_onnx(place.path), None
    else:
        raise WeightsError(f"backend onnx runs exported files: micl-zoo export {name} -o DIR, then give DIR")
    opened = OnnxSession(file, choose_providers(device, providers), sha256)
    config, sha256 = opened.card.config, opened.sha256
    if place.path:
        _check_arch(name, config)
    return Encoder(opened, config, record=record_of(sha256), weights_sha256=sha256)


def _check_arch(name: str | os.PathLike[str], config: EncoderConfig) -> None:
    """Refuse a name that contradicts the weights beside it."""
    arch = name.partition(".")[0] if isinstance(name, str) else ""
    if name != DEFAULT and arch in ARCHS and ARCHS[arch].timm_name != config.architecture:
        raise UsageError(f"{name!r} was asked for, but the weights are those of {config.name} ({config.architecture})")
