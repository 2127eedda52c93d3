"""Writes an encoder as one ONNX file and keeps it only if its embeddings are the encoder's."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from micl_zoo._version import package_versions
from micl_zoo.encoders.build import resample
from micl_zoo.encoders.device import ONNX_PRECISIONS, Precision
from micl_zoo.encoders.encoder import Encoder
from micl_zoo.encoders.load import load
from micl_zoo.encoders.onnx_session import INSTALL, OnnxCard, runtime
from micl_zoo.encoders.torch_model import TorchModel
from micl_zoo.errors import ExportError, UsageError, unknown
from micl_zoo.files import atomic_path, file_sha256, write_text
from micl_zoo.progress import progress
from micl_zoo.sources.listing import SourceLike
from micl_zoo.zoo.ours import DEFAULT
from micl_zoo.zoo.pools import Output

if TYPE_CHECKING:
    from onnx import ModelProto

    from .check import Drift

OPSET, OLDEST_OPSET = 18, 18  # 18: the first with an antialiased Resize, and what the oldest runtimes in use have
LARGEST = 2**31 - 1  # bytes of one protobuf


@dataclass(frozen=True)
class Export:
    """A file that was written and found good.

    Attributes:
        path, bytes, sha256: of the file.
        card: what the file says of itself.
        drift: what was measured.
    """

    path: Path
    bytes: int
    sha256: str
    card: OnnxCard
    drift: Drift

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON holds it."""
        fields = {key: value for key, value in dataclasses.asdict(self).items() if key != "path"}
        fields["card"]["config"]["transform"] = self.card.config.transform.to_dict()
        return {"file": self.path.name} | fields


def to_onnx(
    model: str | Encoder = DEFAULT,
    out: str | os.PathLike[str] = "onnx",
    *,
    weights: str | os.PathLike[str] | None = None,
    precision: Precision = "fp32",
    outputs: Sequence[Output] | None = None,
    image_size: int | None = None,
    with_preprocess: bool = False,
    opset: int = OPSET,
    images: SourceLike | None = None,
    overwrite: bool = False,
    show: bool = True,
) -> Export:
    """Write an encoder to `out`/model[_fp16|_int8][_with_preprocess].onnx, with what was measured in a .json beside it.

    Args:
        model: a name of `list_models`, or a loaded encoder.
        out: folder.
        weights: your own weights, see `load`.
        precision: "fp32"; "fp16", with norms, softmax and pooling in float32; "int8", the blocks' matrix products.
        outputs: of "native", "projection", "cls" and "mean" those wanted go one after the other into `embedding`,
            "patches" into an output of its own; None is the encoder's own pool.
        image_size: side in pixels, see `load`.
        with_preprocess: take `images` (B, H, W, 3) uint8 RGB of any size instead of `pixel_values` (B, 3, S, S).
        opset: of the file, 18 or later; what the installed onnx knows.
        images: source of the images to compare on, see `index_source`; None takes photographs of the package.
        overwrite: replace an existing file.
        show: a progress bar, on a terminal.

    Raises:
        ExportError: the export failed, or its embeddings drifted; no file is left.
        UsageError, WeightsError, SourceError: what was asked for does not exist.
    """
    _check(precision, outputs or [], opset)
    suffix = f"_{precision}" * (precision != "fp32") + "_with_preprocess" * with_preprocess
    file = Path(out) / f"model{suffix}.onnx"
    if file.exists() and not overwrite:
        raise UsageError(f"{str(file)!r} exists: take another folder, or overwrite")
    runtime()  # before any work
    try:
        from .check import BATCHES, measure, photographs
        from .graph import encoder_graph, resize_text
        from .quantize import CONVERSIONS
    except ImportError as error:
        raise UsageError(f"an export needs {error.name}: {INSTALL}") from None
    if isinstance(model, Encoder):
        encoder = _own_copy(model, image_size)
    else:
        encoder = load(model, weights=weights, image_size=image_size, device="cpu")
    chosen = ordered(encoder, outputs)
    if with_preprocess:
        resize_text(encoder.transform)  # raises
    row = CONVERSIONS[precision]
    bounds = (with_preprocess and row.inside) or row.bounds
    pictures = photographs(images)
    if images is None and not bounds.neighbour_agreement:
        pictures = pictures[: sum(BATCHES)]  # the whole ones: quarters are there for neighbours to differ
    with progress(f"exporting {encoder.name}", len(pictures), show=show) as tick:
        tick(0, "tracing")
        graph = row.convert(encoder_graph(encoder, chosen, opset))
        card = make_card(encoder, precision, chosen, with_preprocess)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary:
            save(graph, card, temporary)
            tick(0, "comparing")
            drift = measure(temporary, encoder, pictures, tick)
            if broken := bounds.broken_by(drift):
                raise ExportError(
                    f"{encoder.name} as ONNX in {precision} is not the encoder any more: {'; '.join(broken)}. Compared "
                    f"on {drift.text()}. No file was written. Try precision fp32, which loses nothing, or another "
                    "version of torch or onnxruntime"
                )
            made = Export(file, temporary.stat().st_size, file_sha256(temporary), card, drift)
    write_text(file.with_suffix(".json"), json.dumps(made.as_dict(), indent=1) + "\n")
    return made


def _check(precision: str, outputs: Sequence[str], opset: int) -> None:
    valid = {"precision": ONNX_PRECISIONS, "output": get_args(Output)}
    for kind, name in [("precision", precision), *(("output", output) for output in outputs)]:
        if name not in valid[kind]:
            raise UsageError(unknown(kind, name, valid[kind]))
    if opset < OLDEST_OPSET:
        raise UsageError(f"opset must be {OLDEST_OPSET} or later, got {opset}")


def _own_copy(encoder: Encoder, side: int | None) -> Encoder:
    """Copy an encoder to the CPU in float32, for another size of image where one is given."""
    if not isinstance(encoder.runtime, TorchModel):
        raise UsageError(f"an encoder of backend {encoder.backend} cannot be exported: load it with backend torch")
    made = copy.deepcopy(encoder).cpu().float().eval()
    if side is None:
        return made
    config = encoder.config.at_size(side)
    model = resample(made.model, config, encoder.runtime.projects)
    return Encoder(model, config, record=encoder.record, weights_sha256=encoder.weights_sha256)


def ordered(encoder: Encoder, outputs: Sequence[Output] | None) -> list[Output]:
    """Sort outputs; None is the encoder's own pool."""
    asked = encoder.pool.split("+") if outputs is None else outputs
    if not asked:
        raise UsageError(f"an export needs an output: {', '.join(encoder.runtime.shapes)}")
    for name in asked:
        if name not in encoder.runtime.shapes:
            raise UsageError(f"{encoder.name} has no output {name!r}: take some of {', '.join(encoder.runtime.shapes)}")
    return [name for name in get_args(Output) if name in asked]


def make_card(encoder: Encoder, precision: Precision, outputs: Sequence[Output], preprocess: bool) -> OnnxCard:
    """Return what a file will say of itself."""
    versions = package_versions() | {name: version(name) for name in ("onnx", "onnxscript")}
    config = encoder.config
    if encoder.record:  # whose terms are complete, unlike those of the weights' own config
        config = dataclasses.replace(config, license=encoder.record.license)
    resampled = hasattr(encoder.model, "set_input_size")
    config = dataclasses.replace(config.settled(resampled=resampled), pool=encoder.pool)  # by the name it has there
    shapes = {name: encoder.runtime.shapes[name] for name in outputs}
    return OnnxCard(config, encoder.weights_sha256, precision, tuple(outputs), shapes, preprocess, versions)


def save(graph: ModelProto, card: OnnxCard, file: Path) -> None:
    """Write one file with its metadata."""
    import onnx

    from .graph import with_preprocess

    if card.preprocess:
        graph = with_preprocess(graph, card.config.transform)
    onnx.helper.set_model_props(graph, card.to_metadata())
    graph.producer_name, graph.producer_version = "micl-zoo", card.versions["micl-zoo"]
    if graph.ByteSize() > LARGEST:
        has = f"{card.config.name} in {card.precision} has {graph.ByteSize():,} bytes"
        raise ExportError(f"{has}, one ONNX file holds {LARGEST:,}: take precision fp16 or int8")
    file.write_bytes(graph.SerializeToString())
