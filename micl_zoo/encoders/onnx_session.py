"""A file of `micl-zoo export` in ONNX Runtime, without gradients. Optional: micl-zoo[onnx]."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..errors import MiclZooError, UsageError, WeightsError
from ..images.transform import Transform
from .device import BACKENDS, Backend, Output, Precision
from .weights import ONNX_FILE, EncoderConfig, config_text

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FORMAT = "1"  # of the metadata
INSTALL = BACKENDS["onnx"].install
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
GPU = (CUDA, TENSORRT)


@dataclass(frozen=True)
class OnnxCard:
    """What an exported file says of itself, in its metadata."""

    config: EncoderConfig  # of the encoder it was made from, with the transform of this file
    weights_sha256: str | None  # of the safetensors it was made from, or None for random weights
    precision: Precision  # of its arithmetic
    outputs: tuple[Output, ...]  # "cls" and "mean", one after the other in `embedding`; "patches" by that name
    grid: tuple[int, int]  # (h, w), patches down and across
    preprocess: bool  # whether the transform is inside, for uint8 images of any size
    versions: dict[str, str]  # of the packages that wrote it

    @property
    def pooled(self) -> list[Output]:
        """The outputs in `embedding`, one after the other."""
        return [name for name in self.outputs if name != "patches"]

    def to_metadata(self) -> dict[str, str]:
        """Return it as ONNX keeps it: texts by name."""
        return {
            "micl_zoo": FORMAT,
            "name": self.config.name,
            "license": self.config.license,
            "weights_sha256": self.weights_sha256 or "",
            "precision": self.precision,
            "pooling": "+".join(self.pooled),
            "outputs": ",".join(self.outputs),
            **{name: json.dumps(getattr(self, name)) for name in ("grid", "preprocess", "versions")},
            "transform": json.dumps(dataclasses.asdict(self.config.transform)),
            "transform_id": self.config.transform.id,
            "config": config_text(self.config.to_dict()),
        }

    @classmethod
    def from_metadata(cls, found: dict[str, str], *, where: str) -> OnnxCard:
        """Read the metadata of a file."""
        if found.get("micl_zoo") != FORMAT:
            said = f"has format {found['micl_zoo']}" if "micl_zoo" in found else "does not say which encoder it holds"
            raise WeightsError(f"{where} {said}: this version runs files written by `micl-zoo export`, format {FORMAT}")
        config = EncoderConfig.from_dict(json.loads(found["config"]), where=where)
        transform = json.loads(found["transform"])
        transform |= {name: tuple(transform[name]) for name in ("mean", "std")}
        return cls(
            config=dataclasses.replace(config, transform=Transform(**transform)),
            weights_sha256=found["weights_sha256"] or None,
            precision=cast(Precision, found["precision"]),
            outputs=cast("tuple[Output, ...]", tuple(found["outputs"].split(","))),
            grid=tuple(json.loads(found["grid"])),
            preprocess=json.loads(found["preprocess"]),
            versions=json.loads(found["versions"]),
        )


class OnnxSession:
    """An exported file in ONNX Runtime as an encoder's runtime, see `encoder.Runtime`."""

    name: Backend = "onnx"
    vit = None
    device = torch.device("cpu")  # pixels go in from the host and embeddings come back to it, wherever it computes

    def __init__(self, session: InferenceSession, card: OnnxCard) -> None:
        self.session, self.card = session, card
        self.precision: Precision | None = card.precision
        self.grid = card.grid

    def outputs(self, pixel_values: Tensor, wanted: Collection[Output]) -> dict[Output, Tensor]:
        """Compute outputs in float32; the mean is taken from the patches if the file lacks it."""
        if torch.is_grad_enabled():
            raise UsageError("backend onnx computes no gradients: call it under torch.no_grad(), or take backend torch")
        has = self.card.outputs
        sources: set[Output] = {"patches" if one == "mean" and one not in has else one for one in wanted}
        if missing := sorted(sources - set(has)):
            gives = f"the ONNX file of {self.card.config.name} gives {', '.join(has)} and not {', '.join(missing)}"
            raise UsageError(f"{gives}: export it with --outputs {','.join([*has, *missing])}")
        names = sorted({"patches" if one == "patches" else "embedding" for one in sources})
        images = pixel_values.detach().float().contiguous().numpy()
        try:
            arrays = self.session.run(names, {"pixel_values": images})
        except Exception as error:  # ONNX Runtime has a class of its own for each kind, all of them private
            if "allocate memory" in str(error):
                raise MemoryError(str(error)) from None  # as the others say it
            raise MiclZooError(f"ONNX Runtime failed on {len(images)} images: {error}") from error
        raw = {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
        found: dict[Output, Tensor] = {}
        if "embedding" in raw:
            found |= zip(self.card.pooled, raw["embedding"].split(self.card.config.embed_dim, dim=1), strict=True)
        if "patches" in raw:
            found["patches"] = raw["patches"]
        if "mean" in wanted and "mean" not in found:
            found["mean"] = raw["patches"].flatten(1, 2).mean(1)
        return found


def local_onnx(path: Path) -> Path:
    """Find the .onnx file at a path, or the one in a folder."""
    if path.is_file() and path.suffix == ".onnx":
        return path
    found = sorted(path.glob("*.onnx")) if path.is_dir() else []
    chosen = [file for file in found if file.name == ONNX_FILE] or found
    if len(chosen) == 1:
        return chosen[0]
    several = f": give one of {', '.join(file.name for file in found)}" if found else ""
    raise WeightsError(f"backend onnx needs an .onnx file that `micl-zoo export` wrote, {str(path)!r} is none{several}")


def choose_providers(device: str, providers: Sequence[str] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Return ONNX Runtime's execution providers with their settings, first choice first; arguments: see `load`."""
    kind, _, number = device.partition(":")
    has = runtime().get_available_providers()
    finds_gpu = kind == "auto" and torch.cuda.is_available()
    if finds_gpu and providers is None and CUDA not in has:
        what = f"there is a GPU, but ONNX Runtime has no {CUDA}: running on the CPU"
        logging.getLogger(__name__).warning(f"{what}. `micl-zoo doctor` says how to fix it")
    on_gpu = kind == "cuda" or (finds_gpu and CUDA in has)
    names = {one.removesuffix(tail).lower(): one for one in has for tail in ("", "ExecutionProvider")}
    chosen: list[tuple[str, dict[str, Any]]] = []
    for asked in providers or (["cuda"] if on_gpu else ["cpu"]):
        if (name := names.get(asked.lower())) is None:
            way_on = f"For NVIDIA GPUs: {INSTALL}; `micl-zoo doctor` says what is installed and how to fix it"
            raise UsageError(f"this ONNX Runtime has no {asked} provider, it has {', '.join(has)}. {way_on}")
        # Without use_tf32 fp32 would have 10 bits of mantissa, unlike torch's by default.
        settings = {CUDA: {"device_id": number or "0", "use_tf32": "0"}, TENSORRT: {"device_id": number or "0"}}
        chosen.append((name, settings.get(name, {})))
    return chosen


def runtime() -> Any:
    """Import onnxruntime."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"backend onnx needs ONNX Runtime ({error}): {INSTALL}") from None
    if not hasattr(onnxruntime, "InferenceSession"):
        raise UsageError("onnxruntime is installed in part only: `micl-zoo doctor` says how to fix it")
    return onnxruntime


def open_session(file: Path, providers: list[tuple[str, dict[str, Any]]]) -> tuple[Any, OnnxCard]:
    """Open a file on the first of the providers, never on the CPU in its place, and read its card."""
    onnxruntime = runtime()
    if providers[0][0] != CPU and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA's libraries, where torch or NVIDIA's packages have them
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; nobody can do anything about its warnings
    names = [name for name, _ in providers]
    fall_back = [CPU] if CPU not in names else []
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=[*providers, *fall_back])
    except Exception as error:  # ONNX Runtime has a class of its own for each kind, all of them private
        raise WeightsError(f"ONNX Runtime cannot open {str(file)!r}: {str(error).splitlines()[0]}") from None
    if names[0] not in session.get_providers():
        raise UsageError(
            f"{names[0]} was asked for, but ONNX Runtime fell back to {', '.join(session.get_providers())}: the "
            "libraries it needs could not be loaded, or there is no such device. `micl-zoo doctor` says which; "
            'device="cpu" runs it there'
        )
    return session, OnnxCard.from_metadata(session.get_modelmeta().custom_metadata_map, where=repr(str(file)))
