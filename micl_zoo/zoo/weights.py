"""Safetensors files of encoders: what their headers and config.json say, written and read. Never a pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..errors import WeightsError
from ..files import atomic_path, file_sha256, read_regular, sum_file, write_text
from ..images.transform import Transform
from ..schema import parse_json, read, read_json, shown
from .config import RunFile, read_config
from .ours import ARCHS, RECORDS, timm_architecture, vit_sizes
from .pools import Pool

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
ONNX_FILE = "model.onnx"
CHANGED = "-changed"  # at the end of the name of weights that are no longer those of the file they came from
# Config and provenance in the safetensors header: one entry, as the library shuffles several.
HEADER_KEY = "micl_zoo"
CHECKPOINT = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,14})\.safetensors")  # not a copy of one
CHECKPOINT_KEYS = {"step", "seconds"}  # in the headers of training's checkpoints
MAX_HEADER = 16 << 20  # bytes; that of a ViT-L's checkpoint has 0.2 MB
NUMBERS = ("F16", "BF16", "F32", "F64", "I64", "I32", "BOOL")  # safetensors' dtypes of weights, and of counters
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pth.tar")
CONVERSION = (
    "`micl-zoo import FILE -o FOLDER --architecture NAME`, with timm's name, makes an encoder of it and runs none"
)
Value = TypeVar("Value")


@dataclass(frozen=True)
class EncoderConfig:
    """What building an encoder takes before its weights are read: timm's hub `config.json`."""

    name: str  # `arch.tag`.
    architecture: str  # timm's model name
    model_args: dict[str, Any]  # where the model departs from timm's defaults for that name
    embed_dim: int  # timm's num_features: numbers per patch
    transform: Transform  # from an image to pixel_values
    license: str = "unknown"  # of the weights
    pool: Pool = "cls"  # by default; "native" is "cls" where timm's own row is the class token
    num_classes: int = 0  # outputs of the classifier that the weights come with, or of a CLIP's projection
    fixed_size: bool | None = None  # whether the model is built for one size of images; None: as timm says of its name
    source: str | None = None  # hf-hub:OWNER/NAME@COMMIT, or timm's arch.tag@COMMIT
    image_size: int | None = None  # that was asked for in the place of its own
    trained_size: tuple[int, int] | None = None  # of the images that the weights' positions are for; None: of these

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images, in pixels."""
        return self.transform.size

    def with_transform(self, transform: Transform) -> EncoderConfig:
        """Return it for other pixels, of another size, too."""
        trained = self.trained_size or self.size
        return dataclasses.replace(
            self, transform=transform, trained_size=None if trained == transform.size else trained
        )

    def at_size(self, side: int) -> EncoderConfig:
        """Return it for square images of another side in pixels; the crop keeps its share."""
        return dataclasses.replace(self.with_transform(self.transform.at_size((side, side))), image_size=side)

    def settled(self, *, resampled: bool) -> EncoderConfig:
        """Return it for a model that is built for its images by now; `resampled` if that changed its weights."""
        if self.trained_size is None:
            return self
        model_args = self.model_args | ({"img_size": list(self.size)} if resampled else {})
        return dataclasses.replace(self, trained_size=None, model_args=model_args)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `config.json`."""
        return {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "num_features": self.embed_dim,
            **({"global_pool": "token"} if self.pool == "cls" else {}),  # for readers; timm builds by model_args
            "model_args": self.model_args,
            "pretrained_cfg": {
                "tag": self.name.partition(".")[2],
                "license": self.license,
                **self.transform.to_timm(),
                **({} if self.fixed_size is None else {"fixed_input_size": self.fixed_size}),
                "num_classes": self.num_classes,
                **_ends(self.architecture),
            },
            "micl_zoo": self._own(),
        }

    def _own(self) -> dict[str, Any]:
        own: dict[str, Any] = {"name": self.name}
        own |= {} if self.pool == "cls" else {"pool": self.pool}
        return own | ({"trained_size": list(self.trained_size)} if self.trained_size else {})

    @classmethod
    def from_dict(cls, body: Any, *, where: str, tagged: bool = False) -> EncoderConfig:
        """Read a parsed `config.json`, ours or timm's; one of the hub is named by timm's tag, one here `.local`."""
        found, model_args = read_config(body, f"the configuration of {where}")
        own, entry = found.micl_zoo, found.pretrained_cfg
        counts = (model_args.pop("num_classes", None), found.num_classes, entry.num_classes, 0)
        return cls(
            name=(own and own.name) or f"{found.architecture}.{(tagged and entry.tag) or 'local'}",
            architecture=found.architecture,
            model_args=model_args,
            embed_dim=found.num_features,
            transform=entry.transform,
            license=entry.license or "unknown",
            pool=own.pool if own else "native",
            num_classes=next(one for one in counts if one is not None),
            fixed_size=entry.fixed_input_size,
            trained_size=own.trained_size if own else None,
        )


def _ends(architecture: str) -> dict[str, Any]:
    """Return timm's names of a model's first layer and of its classifier, by which timm adapts weights."""
    if any(architecture == arch.timm_name for arch in ARCHS.values()):
        return {"first_conv": "patch_embed.proj", "classifier": "head"}
    import timm

    known = timm.get_pretrained_cfg(architecture)
    return {"first_conv": known.first_conv, "classifier": known.classifier} if known else {}


@dataclass(frozen=True)
class Weights:
    """A safetensors file; its bytes are checked, where there is something to check them against, with its sha256."""

    path: Path  # of the file
    config: EncoderConfig  # how to build the encoder
    checked: str | None = None  # its sha256, where it was compared with the published one

    @functools.cached_property
    def sha256(self) -> str:
        """Hash the file's bytes, and compare that with what stands beside a checkpoint."""
        found, beside = self.checked or file_sha256(self.path), sum_file(self.path)
        if not self.checked and beside.is_file() and read_regular(beside, len(found)) != found.encode():
            raise WeightsError(f"{str(self.path)!r} is damaged, it has sha256 {found}: take another checkpoint")
        return found


def recipe_config(recipe: Mapping[str, Any]) -> EncoderConfig:
    """Return how to build the encoder that a pre-training recipe trains, from the recipe's fields, see run.json."""
    architecture, model_args = timm_architecture(**vit_sizes(recipe))
    size, record = recipe["image_size"], RECORDS.get(recipe["name"])
    transform = Transform.square(size, size, mean=tuple(recipe["pixel_mean"]), std=tuple(recipe["pixel_std"]))
    if record and record.transform.size == (size, size):
        transform = record.transform
    return EncoderConfig(recipe["name"], architecture, model_args, recipe["embed_dim"], transform)


def save_weights(
    folder: Path,  # made if need be
    state: dict[str, Tensor],  # under timm's names
    config: EncoderConfig | dict[str, Any],  # a dict for another timm model than an encoder; also goes into the header
    provenance: dict[str, Any],  # recipe, code, data, machine; goes into the header
    dtype: Literal["float32", "float16"] | None,  # on disk; None keeps each tensor's own
) -> Path:
    """Write `model.safetensors` and `config.json`, in the layout of timm's hub repositories; return the former."""
    import torch
    from safetensors.torch import save_file

    body = config if isinstance(config, dict) else config.to_dict()
    kind = dtype and getattr(torch, dtype)
    tensors: dict[str, Tensor] = {}
    places = set[int]()
    for key, value in state.items():
        one = value.detach().to("cpu", kind).contiguous()
        tensors[key] = one.clone() if one.numel() and one.untyped_storage().data_ptr() in places else one
        places.add(one.untyped_storage().data_ptr())  # as safetensors takes no tensor twice
    with atomic_path(folder / WEIGHTS_FILE) as temporary:
        save_file(tensors, temporary, {HEADER_KEY: json.dumps({"config": body, "provenance": provenance})})
    write_text(folder / CONFIG_FILE, config_text(body))
    return folder / WEIGHTS_FILE


def config_text(config: dict[str, Any]) -> str:
    """Return the text of a `config.json`: the same bytes wherever it is written."""
    return json.dumps(config, indent=2) + "\n"


def local_weights(path: Path) -> Weights:
    """Find weights, at any path that `load` takes, and how to build their encoder."""
    file = _file_at(path)
    if file.suffix == ".onnx":
        raise WeightsError(f'{str(file)!r} is an ONNX file: load it with backend="onnx", extract with --backend onnx')
    if file.suffix != ".safetensors":
        raise WeightsError(
            f"{str(file)!r} is not a .safetensors file. Other formats can run code when they are read: {CONVERSION}"
        )
    said = header(file).get("config")
    if is_checkpoint(file):
        return Weights(file, _checkpoint_config(file, said))
    beside = file.parent / CONFIG_FILE
    if said is None and not beside.is_file():
        raise WeightsError(f"{str(file)!r} says nothing of its architecture: put timm's {CONFIG_FILE} beside it")
    config = said if said is not None else read_json(beside, WeightsError)
    return Weights(file, EncoderConfig.from_dict(config, where=repr(str(file if said is not None else beside))))


def _file_at(path: Path) -> Path:
    wanted = f"a .safetensors file, a folder with {WEIGHTS_FILE}, or the folder of a training run"
    try:
        if not path.exists():
            raise WeightsError(f"no weights at {str(path)!r}, there is no such file or folder: expected {wanted}")
        file = path
        if path.is_dir():  # the run's finished encoder before its newest checkpoint
            found = (file for file in path.glob("checkpoints/step-*") if CHECKPOINT.fullmatch(file.name))
            checkpoints = sorted(found, key=lambda file: (len(file.name), file.name), reverse=True)
            choices = [path / WEIGHTS_FILE, path / "encoder" / WEIGHTS_FILE, *checkpoints]
            file = next((choice for choice in choices if choice.is_file()), choices[0])
        if not file.is_file():
            raise WeightsError(f"no weights at {str(path)!r}{_others(path)}: expected {wanted}")
        return file
    except OSError as error:  # a folder that may not be entered, a name of thousands of letters
        raise WeightsError(f"cannot read {str(path)!r}: {error.strerror or error}") from None


def _others(path: Path) -> str:
    """Say what is in a folder in the place of what should be."""
    names = sorted(file.name for file in path.glob("*") if file.is_file()) if path.is_dir() else []
    if found := [name for name in names if name.endswith(".safetensors")]:
        return f", but {found[0]}, which can be given itself"
    if found := [name for name in names if name.endswith(PICKLES)]:
        return f", but the pickle {found[0]}, which can run code when it is read: {CONVERSION}"
    return ""


def _checkpoint_config(file: Path, said: Any) -> EncoderConfig:
    """Read what a run's checkpoint holds, of which older versions say in run.json alone what was trained."""
    if said is not None:
        config = EncoderConfig.from_dict(said, where=repr(str(file)))
    else:
        run = file.parent.parent / "run.json"
        cure = "put the checkpoint back into its run's folder; of an older run of fine-tuning load RUN/encoder"
        if not run.is_file():
            missing = f"is a checkpoint that does not say what was trained, nor does {str(run)!r}, which is not there"
            raise WeightsError(f"{str(file)!r} {missing}: {cure}")
        found = read(RunFile, read_json(run, WeightsError, cure), repr(str(run)), WeightsError, cure, others=True)
        config = recipe_config(vars(found.recipe))
    return dataclasses.replace(config, name=f"{config.name}-{file.stem}")


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of the tensors that `read_tensors` gives, from the header alone."""
    found = {}
    with _opened(file) as opened:
        for name in opened.keys():  # noqa: SIM118, it is no dict
            one = opened.get_slice(name)
            if one.get_dtype() not in NUMBERS:
                raise WeightsError(f"{str(file)!r}: {name} is of type {one.get_dtype()}, not of {', '.join(NUMBERS)}")
            found[name] = tuple(one.get_shape())
    return _encoder_part(found, file)


def read_tensors(file: Path, only: Collection[str] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file; of a run's checkpoint the encoder's part, from the running means if it has them.

    Args:
        file: of weights.
        only: names of the tensors to read; None is all.
    """
    with _opened(file, "pt") as opened:
        wanted = _encoder_part({name: name for name in opened.keys()}, file)  # noqa: SIM118
        wanted = {key: name for key, name in wanted.items() if only is None or key in only}
        return {key: opened.get_tensor(name) for key, name in wanted.items()}


def _encoder_part(found: Mapping[str, Value], file: Path) -> dict[str, Value]:
    """Pick what is the encoder's, under its own names, out of what stands in a file by name."""
    if not is_checkpoint(file):
        return dict(found)
    prefix = "ema." if any(name.startswith("ema.") for name in found) else "model."
    state = {name[len(prefix) :]: one for name, one in found.items() if name.startswith(prefix)}
    return state if _is_pretraining(file) else without_head(state)


def _is_pretraining(file: Path) -> bool:
    """Whether a checkpoint says that it is of pre-training, whose head and norms, if any, are the encoder's own."""
    said = header(file).get("provenance")
    recipe = said.get("recipe") if isinstance(said, dict) else None
    return isinstance(recipe, dict) and "mask_ratio" in recipe


def without_head(state: Mapping[str, Value]) -> dict[str, Value]:
    """Turn the state of a classifier into that of an encoder; an encoder's own state comes back as it is.

    An encoder has its final norm before it pools. One that pools by the mean gets the classifier's norm, which was
    trained for the mean of the patch tokens: embeddings by pool "mean" are near what the head saw, and not equal to it.
    """
    return {key.replace("fc_norm.", "norm."): value for key, value in state.items() if not key.startswith("head.")}


def is_checkpoint(file: Path) -> bool:
    """Whether a safetensors file is a checkpoint of a run."""
    return _metadata(file).keys() >= CHECKPOINT_KEYS


def _metadata(file: Path) -> dict[str, str]:
    with _opened(file) as opened:
        return opened.metadata() or {}


@contextlib.contextmanager
def _opened(file: Path, framework: Literal["numpy", "pt"] = "numpy") -> Iterator[Any]:
    """Open a safetensors file whose header is no longer than headers are; with numpy torch is not imported."""
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if length > MAX_HEADER:
            raise WeightsError(f"{str(file)!r} is damaged or no safetensors file: a header of {length:,} bytes")
        with safe_open(file, framework=framework) as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{str(file)!r} is damaged or no safetensors file: {error}") from None
    except MemoryError:
        raise WeightsError(f"{str(file)!r} does not fit into memory: take a machine or a limit with more") from None


def header(file: Path) -> dict[str, Any]:
    """Return what this package wrote into a safetensors header: `config` and `provenance`; {} for others' files."""
    what = f"the header of {str(file)!r}"
    found = parse_json(_metadata(file).get(HEADER_KEY, "{}"), what, WeightsError)
    if not isinstance(found, dict):
        raise WeightsError(f"{what} is damaged: {HEADER_KEY} must be an object, it is {shown(found)}")
    return found
