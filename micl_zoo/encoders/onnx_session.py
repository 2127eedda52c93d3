"""A file of `micl-zoo export` in ONNX Runtime, without gradients. Optional: micl-zoo[onnx]."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor

from ..errors import MiclZooError, UsageError, WeightsError
from ..files import file_sha256
from ..schema import parse_json, read, shown
from ..telemetry import no_telemetry
from ..zoo.config import Side, TransformFile, Width
from ..zoo.pools import Output
from ..zoo.weights import ONNX_FILE, EncoderConfig, config_text
from .device import BACKENDS, ONNX_PRECISIONS, Backend, Precision
from .onnx_file import check_file

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FORMAT = "1"  # of the metadata
CURE = "export the encoder again with `micl-zoo export`"
INSTALL = BACKENDS["onnx"].install
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
GPU = (CUDA, TENSORRT)


@dataclass(frozen=True)
class CardFile:
    """The metadata of an exported file as they are read, but for its configuration, see `OnnxCard`."""

    weights_sha256: str
    precision: str
    outputs: tuple[Output, ...]
    grid: tuple[Side, Side] | None
    preprocess: bool
    versions: dict[str, str]
    transform: TransformFile
    widths: dict[str, Width] | None = None  # None: a file of the time when all were num_features

    def __post_init__(self) -> None:
        if self.precision not in ONNX_PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(ONNX_PRECISIONS)}, it is {shown(self.precision)}")
        if not re.fullmatch("([0-9a-f]{64})?", self.weights_sha256):
            raise ValueError(f"weights_sha256 must be 64 hexadecimal digits, it is {shown(self.weights_sha256)}")
        if list(self.outputs) != [name for name in get_args(Output) if name in self.outputs]:
            raise ValueError(f"outputs must be some of {', '.join(get_args(Output))}, in this order")


@dataclass(frozen=True)
class OnnxCard:
    """What an exported file says of itself, in its metadata."""

    config: EncoderConfig  # of the encoder it was made from, with the transform of this file
    weights_sha256: str | None  # of the safetensors it was made from, or None for random weights
    precision: Precision  # of its arithmetic
    outputs: tuple[Output, ...]  # all but "patches" one after the other in `embedding`; "patches" by that name
    shapes: dict[Output, tuple[int, ...]]  # of each of them, per image
    preprocess: bool  # whether the transform is inside, for uint8 images of any size
    versions: dict[str, str]  # of the packages that wrote it

    @property
    def pooled(self) -> list[Output]:
        """The outputs in `embedding`, one after the other."""
        return [name for name in self.outputs if name != "patches"]

    @property
    def widths(self) -> list[int]:
        """Numbers of each output in `embedding`."""
        return [self.shapes[name][0] for name in self.pooled]

    @property
    def ports(self) -> dict[str, tuple[int, ...]]:
        """What comes out for each image, by name."""
        found: dict[str, tuple[int, ...]] = {"embedding": (sum(self.widths),)} if self.pooled else {}
        return found | ({"patches": self.shapes["patches"]} if "patches" in self.outputs else {})

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
            "grid": json.dumps(self.shapes["patches"][:2] if "patches" in self.outputs else None),
            "widths": json.dumps({name: self.shapes[name][-1] for name in self.outputs}),
            **{name: json.dumps(getattr(self, name)) for name in ("preprocess", "versions")},
            "transform": json.dumps(self.config.transform.to_dict()),
            "transform_id": self.config.transform.id,
            "config": config_text(self.config.to_dict()),
        }

    @classmethod
    def from_metadata(cls, found: Mapping[str, str], *, where: str) -> OnnxCard:
        """Read the metadata of a file; WeightsError where they are not what `to_metadata` writes."""
        if found.get("micl_zoo") != FORMAT:
            said = f"has format {found['micl_zoo']}" if "micl_zoo" in found else "does not say which encoder it holds"
            raise WeightsError(f"{where} {said}: this version runs files written by `micl-zoo export`, format {FORMAT}")
        named = ("config", "grid", "preprocess", "versions", "transform", "widths")
        parsed = {name: parse_json(found.get(name, "null"), f"{name} of {where}", WeightsError, CURE) for name in named}
        config = EncoderConfig.from_dict(parsed.pop("config"), where=where)
        parsed |= {name: found.get(name) for name in ("precision", "weights_sha256")}
        parsed["outputs"] = found.get("outputs", "").split(",")
        card = read(CardFile, parsed, f"the metadata of {where}", WeightsError, CURE)
        return cls(
            config=dataclasses.replace(config, transform=card.transform.transform),
            weights_sha256=card.weights_sha256 or None,
            precision=cast(Precision, card.precision),
            outputs=card.outputs,
            shapes=_shapes(card, config.embed_dim, where),
            preprocess=card.preprocess,
            versions=card.versions,
        )


def _shapes(card: CardFile, width: int, where: str) -> dict[Output, tuple[int, ...]]:
    widths = dict.fromkeys(card.outputs, width) if card.widths is None else card.widths
    if set(widths) != set(card.outputs) or ("patches" in widths and card.grid is None):
        raise WeightsError(f"the metadata of {where} are damaged, they lack sizes of {', '.join(card.outputs)}: {CURE}")
    grid = card.grid or ()
    return {name: (*grid, widths[name]) if name == "patches" else (widths[name],) for name in card.outputs}


class OnnxSession:
    """An exported file in ONNX Runtime as an encoder's runtime, see `encoder.Runtime`."""

    name: Backend = "onnx"
    model = None
    device = torch.device("cpu")  # pixels go in from the host and embeddings come back to it, wherever it computes

    def __init__(self, file: Path, providers: list[tuple[str, dict[str, Any]]], sha256: str | None = None) -> None:
        """Open a file; `sha256` is that of its bytes, None if nobody has looked."""
        self.session, self.card = open_session(file, providers)
        if self.card.preprocess:
            inside = f"{str(file)!r} has the transform inside, for use without micl-zoo"
            raise WeightsError(f"{inside}: export one without --with-preprocess")
        self.sha256 = sha256 or file_sha256(file)
        self.precision: Precision | None = self.card.precision
        self.shapes = dict(self.card.shapes)
        if "patches" in self.shapes:  # of which a mean can be taken
            self.shapes.setdefault("mean", self.shapes["patches"][-1:])
        self._opened = (file, providers)

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxSession:
        return self  # it has no state that a copy could change

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (*self._opened, self.sha256)  # a session itself stays in its process

    def forget(self) -> None:
        """A file's weights do not change."""

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
        for name, array in zip(names, arrays, strict=True):
            if array.shape != (wanted_shape := (len(images), *self.card.ports[name])):
                raise MiclZooError(f"the ONNX file gives {name} of {array.shape}, where it says {wanted_shape}: {CURE}")
        raw = {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}
        found: dict[Output, Tensor] = {}
        if "embedding" in raw:
            found |= zip(self.card.pooled, raw["embedding"].split(self.card.widths, dim=1), strict=True)
        if "patches" in raw:
            found["patches"] = raw["patches"]
        if "mean" in wanted and "mean" not in found:
            found["mean"] = raw["patches"].flatten(1, 2).mean(1)
        return found


def _reopened(file: Path, providers: list[tuple[str, dict[str, Any]]], sha256: str) -> OnnxSession:
    """Open the file of a session that came from another process."""
    made = OnnxSession(file, providers)
    if made.sha256 != sha256:
        raise WeightsError(f"{str(file)!r} has changed, it has sha256 {made.sha256} and had {sha256}: load it again")
    return made


def local_onnx(path: Path) -> Path:
    """Find the .onnx file at a path, or the one in a folder."""
    try:
        if path.is_file() and path.suffix == ".onnx":
            return path
        found = sorted(path.glob("*.onnx")) if path.is_dir() else []
    except OSError as error:  # a folder that may not be entered, a name of thousands of letters
        raise WeightsError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
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
    no_telemetry()
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"backend onnx needs ONNX Runtime ({error}): {INSTALL}") from None
    if not hasattr(onnxruntime, "InferenceSession"):
        raise UsageError("onnxruntime is installed in part only: `micl-zoo doctor` says how to fix it")
    if sys.platform == "win32":  # there its events go to the system's own collector, which knows no variable
        onnxruntime.disable_telemetry_events()
    return onnxruntime


def open_session(file: Path, providers: list[tuple[str, dict[str, Any]]]) -> tuple[Any, OnnxCard]:
    """Open a file on the first of the providers, never on the CPU in its place, and read its card."""
    onnxruntime = runtime()
    card = OnnxCard.from_metadata(check_file(file), where=repr(str(file)))  # before it is opened, which computes
    if providers[0][0] != CPU and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA's libraries, where torch or NVIDIA's packages have them
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # it prints names of the file as they are; what is an error is raised, too
    names = [name for name, _ in providers]
    fall_back = [CPU] if CPU not in names else []
    try:
        use = {"providers": [*providers, *fall_back], "enable_fallback": 0}  # it would print, and hide why
        session = onnxruntime.InferenceSession(str(file), options, **use)
    except Exception as error:  # ONNX Runtime has a class of its own for each kind, all of them private
        said = str(error).splitlines() or [type(error).__name__]
        raise WeightsError(f"ONNX Runtime cannot open {str(file)!r}: {said[0]}") from None
    if names[0] not in session.get_providers():
        raise UsageError(
            f"{names[0]} was asked for, but ONNX Runtime fell back to {', '.join(session.get_providers())}: the "
            "libraries it needs could not be loaded, or there is no such device. `micl-zoo doctor` says which; "
            'device="cpu" runs it there'
        )
    _check_ports(session, card, repr(str(file)))
    return session, card


def _check_ports(session: InferenceSession, card: OnnxCard, where: str) -> None:
    """Compare what goes in and comes out with the card; the first axis is free, and both others of images."""
    goes_in: dict[str, tuple[int | None, ...]] = {"pixel_values": (3, *card.config.transform.size)}
    if card.preprocess:
        goes_in = {"images": (None, None, 3)}
    comes_out: dict[str, tuple[int | None, ...]] = {**card.ports}
    for ports, wanted in ((session.get_inputs(), goes_in), (session.get_outputs(), comes_out)):
        found = {one.name: [one.type, *one.shape] for one in ports}
        kind = "tensor(uint8)" if "images" in wanted else "tensor(float)"
        if found.keys() != wanted.keys() or not all(_fits(found[name], [kind, None, *wanted[name]]) for name in wanted):
            said = f"its metadata say {kind} of {wanted}, without the number of images"
            raise WeightsError(f"{where} is damaged, its graph has {found} where {said}: {CURE}")


def _fits(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether a type and sizes are those wanted; sizes that are not known before a run are texts or None."""
    known = [isinstance(one, int) for one in found]
    return (
        len(found) == len(wanted)
        and found[0] == wanted[0]
        and not known[1]
        and all(not sure or one == other for sure, one, other in zip(known[2:], found[2:], wanted[2:], strict=True))
    )
