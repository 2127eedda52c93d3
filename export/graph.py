"""Turns an encoder and its transform into ONNX graphs.

Shapes: B images of H x W pixels, as the transform makes them, h x w patches, D numbers per token.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from onnx import ModelProto, checker, compose, parser
from onnx.defs import onnx_opset_version
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from micl_zoo.encoders.encoder import Encoder
from micl_zoo.encoders.onnx_file import OPERATORS
from micl_zoo.encoders.torch_model import TorchModel, compute
from micl_zoo.errors import ExportError
from micl_zoo.images.transform import MAX_ASPECT, Transform
from micl_zoo.zoo.pools import Output

EXAMPLES = 2  # images to trace with: torch takes a batch of one for a constant
MOST = 2**31 - 1  # images per batch; torch 2.6 needs a bound


class _Outputs(nn.Module):
    """The part of an encoder that is exported."""

    def __init__(self, encoder: Encoder, outputs: Sequence[Output]) -> None:
        super().__init__()
        assert isinstance(encoder.runtime, TorchModel)
        self.model, self.anatomy, self.outputs = encoder.model, encoder.runtime.anatomy, tuple(outputs)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Compute `embedding` (B, the widths' sum) and `patches` (B, h, w, D), or one of them, of (B, 3, S, S)."""
        found = compute(self.model, self.anatomy, pixel_values, self.outputs)
        parts = [found[name] for name in self.outputs if name != "patches"]
        pooled = [torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]] if parts else []
        return tuple(pooled + [found[name] for name in self.outputs if name == "patches"])


def encoder_graph(encoder: Encoder, outputs: Sequence[Output], opset: int) -> ModelProto:
    """Trace an encoder: pixel_values (B, 3, H, W) -> embedding[, patches], in float32, for any batch size."""
    if opset > (newest := onnx_opset_version()):
        raise ExportError(f"opset {opset} was asked for, and the newest that the installed onnx knows is {newest}")
    names = ["embedding"] * (set(outputs) != {"patches"}) + ["patches"] * ("patches" in outputs)
    with _quiet(), torch.no_grad(), _PlainMean():
        try:
            made = torch.onnx.export(
                _Outputs(encoder, outputs).eval(),
                (torch.zeros(EXAMPLES, 3, *encoder.transform.size),),
                input_names=["pixel_values"],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch", max=MOST)},),
                opset_version=opset,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
        except Exception as error:  # the exporter's own classes differ from one torch to the next
            what = f"torch {torch.__version__} could not export {encoder.name} ({encoder.config.architecture})"
            raise ExportError(f"{what} to opset {opset}: {_reason(error)}. Nothing was written") from error
    assert made is not None  # it is None only for the older exporter
    model: ModelProto = made.model_proto
    if (found := _opset(model)) != opset:
        made_by = f"torch {torch.__version__} made opset {found}"
        raise ExportError(f"opset {opset} was asked for, and {made_by}: take --opset {found}")
    graph = model.graph
    if unknown := sorted({node.op_type for node in graph.node} - OPERATORS):
        raise ExportError(
            f"{encoder.name} ({encoder.config.architecture}) needs operators that files of micl-zoo do not hold: "
            f"{', '.join(unknown)}. Nothing was written"
        )
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph):
        del item.metadata_props[:]  # torch notes for each node files and lines of this machine
        item.doc_string = ""
    return model


class _PlainMean(TorchFunctionMode):
    """Pools a whole map by a mean: torch's own pooling of channels that lie last becomes a walk over their places."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.adaptive_avg_pool2d and not kwargs and args[1] in (1, (1, 1)):
            return args[0].mean((-2, -1), keepdim=True)
        return func(*args, **(kwargs or {}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch says to its own developers: warnings, and a whole graph where an operator is missing."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """Return the first line of the first cause, which names the operator or the shape; torch wraps it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = (str(error).splitlines() or [""])[0].partition(" Failure message:")[0]
    return f"{type(error).__name__}: {said.rstrip('.')}"


def _opset(model: ModelProto) -> int:
    return int(next(one.version for one in model.opset_import if one.domain == ""))


def with_preprocess(model: ModelProto, transform: Transform) -> ModelProto:
    """Put the transform in front: `images` (B, ?, ?, 3) uint8 RGB of any size, one size per batch."""
    before = parser.parse_model(preprocess_text(transform, _opset(model), model.ir_version))
    checker.check_model(before, full_check=True)
    merged: ModelProto = compose.merge_models(before, model, io_map=[("pre_pixels", "pixel_values")])
    del merged.opset_import[:]  # the same twice, which is one too many for strict readers
    merged.opset_import.extend(model.opset_import)
    return merged


def resize_text(transform: Transform) -> str:
    """Write the attributes of ONNX's antialiased Resize that make it Pillow's.

    Its cubic one is Pillow's bicubic for a = -0.5 and without pixels outside of the image.

    Raises:
        ExportError: it has no such filter.
    """
    found = {"bicubic": 'mode = "cubic", cubic_coeff_a = -0.5, exclude_outside = 1', "bilinear": 'mode = "linear"'}
    if transform.interpolation not in found:
        raise ExportError(
            f"the transform resizes by {transform.interpolation}, and ONNX has {' and '.join(found)} only: export it "
            "without the preprocessing, and resize by Pillow"
        )
    return f"{found[transform.interpolation]}, antialias = 1, axes = [2, 3]"


def preprocess_text(transform: Transform, opset: int, ir_version: int) -> str:
    """Write `Transform.pixels` and `normalise`, line by line, in ONNX's own notation.

    Sides are (height, width). ONNX's Round takes halves to the even number, as Python's does, its Div cuts whole
    numbers. Normalising is (pixel / 255 - mean) / std = pixel * gain - offset.
    """
    gain = ", ".join(repr(1 / (255 * std)) for std in transform.std)
    offset = ", ".join(repr(mean / std) for mean, std in zip(transform.mean, transform.std, strict=True))
    fill = ", ".join(f"{value:.1f}" for value in transform.fill)
    (down, across), (height, width) = transform.resize, transform.size
    is_short = transform.mode == "border" or down < height or across < width
    body = f"""
  pre_transposed = Transpose<perm = [0, 3, 1, 2]>(images)
  pre_planes = Reshape(pre_transposed, pre_as_it_is)
  pre_sides = Shape<start = 1, end = 3>(images)
{_STRIP if transform.mode == "center" else _WHOLE}
{_resized_text(transform)}
  pre_image = Resize<{resize_text(transform)}>(pre_strip, , , pre_resized)
{_FILLED if is_short else _COVERED}
  pre_spare = Sub(pre_padded, pre_size)
  pre_spare_number = Cast<to = 1>(pre_spare)
  pre_half = Div(pre_spare_number, pre_two)
  pre_rounded = Round(pre_half)
  pre_first = Cast<to = 7>(pre_rounded)
  pre_last = Add(pre_first, pre_size)
  pre_cut = Slice(pre_canvas, pre_first, pre_last, pre_axes)

  pre_numbers = Cast<to = 1>(pre_cut)
  pre_gained = Mul(pre_numbers, pre_gain)
  pre_pixels = Sub(pre_gained, pre_offset)
"""
    constants = {
        "int64[2] pre_resize": f"{down}, {across}",
        "int64[2] pre_size": f"{height}, {width}",
        "int64[1] pre_max_aspect": f"{MAX_ASPECT}",
        "int64[2] pre_axes": "2, 3",
        "int64[4] pre_as_it_is": "0, 0, 0, 0",  # or ONNX Runtime transposes behind the resize, of wrong axes
        "int64[1] pre_none": "0",
        "int64[1] pre_one": "1",
        "int64[1] pre_int_two": "2",
        "float pre_two": "2.0",
        "float pre_zero": "0.0",
        "float[1, 3, 1, 1] pre_fill": fill,
        "float[1, 3, 1, 1] pre_gain": gain,
        "float[1, 3, 1, 1] pre_offset": offset,
    }
    used = ",\n".join(f"  {name} = {{{value}}}" for name, value in constants.items() if name.split()[-1] in body)
    return f"""
<ir_version: {ir_version}, opset_import: ["" : {opset}]>
preprocess (uint8[batch, height, width, 3] images) => (float[batch, 3, {height}, {width}] pre_pixels)
<
{used}
>
{{
{body}
}}
"""


_WHOLE = """
  pre_strip = Identity(pre_planes)
  pre_kept = Identity(pre_sides)
"""
_STRIP = """
  pre_narrow = ReduceMin<keepdims = 1>(pre_sides)
  pre_longest = Mul(pre_narrow, pre_max_aspect)
  pre_kept = Min(pre_sides, pre_longest)
  pre_over = Sub(pre_sides, pre_kept)
  pre_from = Div(pre_over, pre_int_two)
  pre_to = Add(pre_from, pre_kept)
  pre_strip = Slice(pre_planes, pre_from, pre_to, pre_axes)
"""
_COVERED = """
  pre_padded = Identity(pre_resized)
  pre_canvas = Identity(pre_image)
"""
_FILLED = """
  pre_less = Sub(pre_size, pre_resized)
  pre_lacks = Max(pre_less, pre_none)
  pre_before = Div(pre_lacks, pre_int_two)
  pre_after = Sub(pre_lacks, pre_before)
  pre_pads = Concat<axis = 0>(pre_before, pre_after)
  pre_levels = Cast<to = 1>(pre_image)
  pre_above = Sub(pre_levels, pre_fill)
  pre_around = Pad(pre_above, pre_pads, pre_zero, pre_axes)
  pre_canvas = Add(pre_around, pre_fill)
  pre_padded = Add(pre_resized, pre_lacks)
"""


def _resized_text(transform: Transform) -> str:
    """Write `Transform.geometry`'s size after the resize."""
    if transform.mode == "squash":
        return "  pre_resized = Identity(pre_resize)"
    if transform.mode == "center" and transform.resize[0] == transform.resize[1]:
        return """
  pre_short = ReduceMin<keepdims = 1>(pre_kept)
  pre_scaled = Mul(pre_kept, pre_resize)
  pre_resized = Div(pre_scaled, pre_short)
"""
    return f"""
  pre_exact = Cast<to = 11>(pre_kept)
  pre_aimed = Cast<to = 11>(pre_resize)
  pre_ratios = Div(pre_exact, pre_aimed)
  pre_ratio = {"ReduceMax" if transform.mode == "border" else "ReduceMin"}<keepdims = 1>(pre_ratios)
  pre_quotients = Div(pre_exact, pre_ratio)
  pre_nearest = Round(pre_quotients)
  pre_lengths = Cast<to = 7>(pre_nearest)
  pre_resized = Max(pre_lengths, pre_one)
"""
