"""Looks through an ONNX file before ONNX Runtime opens it, which computes constants and takes memory as a file asks.

The file is a protobuf: fields of a number, a type and a value, within one another. Not read by the onnx package, which
is not always there, and which makes objects of all that a file holds: a few bytes each become hundreds.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path

from ..errors import WeightsError

# What `micl-zoo export` writes, of every architecture, precision and opset, and their kin. No loops, branches and
# functions, which may never end, none that makes much out of nothing (ConstantOfShape, Tile, Range), none of other
# makers' domains.
_OPERATORS = """
    Abs Add And Attention AveragePool BatchNormalization Cast CastLike Clip Concat Constant Conv Cos DepthToSpace
    DequantizeLinear Div DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements
    GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid
    HardSwish Identity InstanceNormalization IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
    LpNormalization MatMul MatMulInteger Max MaxPool Min Mish Mod Mul Neg Not Or Pad Pow PRelu QuantizeLinear
    Reciprocal ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Resize RMSNormalization Round Selu
    Shape Sigmoid Sign Sin Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Swish Tanh
    Transpose Unsqueeze Where
"""
OPERATORS = frozenset(_OPERATORS.split())
MAX_FIELDS = 1_000_000  # that are looked at; a ViT-L has 50,000
MAX_REST = 8 << 20  # bytes of all but the tensors' numbers; 0.1 MB of the encoder that comes with the package
MAX_RANK = 16
PLAIN = ("", "ai.onnx")  # names of the standard's domain
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # types of a field on the wire

Span = tuple[int, int]  # of a field's bytes in the file


class _Wrong(ValueError):
    """What is wrong with a file."""


class _Walk:
    """The fields of one file, counted."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data, self.fields = data, 0

    def __call__(self, span: Span) -> Iterator[tuple[int, int | Span]]:
        """Yield number and value of each field of a message; the value of fixed-size ones is their bytes' span."""
        at, end = span
        while at < end:
            self.fields += 1
            if self.fields > MAX_FIELDS:
                raise _Wrong(f"it has more than {MAX_FIELDS:,} fields")
            tag, at = self._varint(at, end)
            number, kind = tag >> 3, tag & 7
            if kind == VARINT:
                value, at = self._varint(at, end)
                yield number, value
                continue
            if kind == BYTES:
                length, at = self._varint(at, end)
            elif kind in (FIXED32, FIXED64):
                length = 4 if kind == FIXED32 else 8
            else:
                raise _Wrong(f"a field of type {kind}, which no ONNX file has")
            if not number or length > end - at:
                raise _Wrong("a field is longer than what is around it")
            yield number, (at, at + length)
            at += length

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self.data[at]
            value, at = value | (byte & 127) << shift, at + 1
            if byte < 128:
                return value, at
        raise _Wrong("a number in it does not end")

    def text(self, value: int | Span) -> str:
        """Return a text of at most a kilobyte."""
        start, end = _span(value)
        if end - start > 1024:
            raise _Wrong(f"a name in it has {end - start:,} bytes")
        return self.data[start:end].decode("utf-8", "replace")

    def numbers(self, value: int | Span) -> list[int]:
        """Return dimensions, of which one or many stand in a field."""
        if isinstance(value, int):
            return [value]
        found, (at, end) = list[int](), value
        while at < end and len(found) <= MAX_RANK:
            one, at = self._varint(at, end)
            found.append(one)
        return found


def _span(value: int | Span) -> Span:
    if isinstance(value, int):
        raise _Wrong("a number stands where a text or a part should")
    return value


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _Wrong("its metadata are no UTF-8") from None


def check_file(file: Path) -> dict[str, str]:
    """Return an ONNX file's metadata, if the file holds nothing but what `micl-zoo export` writes.

    Raises:
        WeightsError: it cannot be read, or holds other operators, or data that are not where they may be.
    """
    try:
        with file.open("rb") as opened:
            size = file.stat().st_size
            if not size:
                raise _Wrong("it is empty")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _model(_Walk(data), size, file)
    except OSError as error:
        raise WeightsError(f"cannot open {str(file)!r}: {error.strerror or error}") from None
    except _Wrong as problem:
        raise WeightsError(f"cannot open {str(file)!r}, {problem}: export it with `micl-zoo export`") from None


def _model(walk: _Walk, size: int, file: Path) -> dict[str, str]:
    """Look through a ModelProto."""
    metadata, data, graphs = dict[str, str](), 0, 0
    for number, value in walk((0, size)):
        if number == 7:
            graphs += 1
            data += _graph(walk, _span(value), file)
        elif number == 8:
            domain = next((walk.text(one) for at, one in walk(_span(value)) if at == 1), "")
            if domain not in PLAIN:
                raise _Wrong(f"it needs operators of {domain!r}")
        elif number == 14:
            start, end = _span(value)
            if end - start > MAX_REST:
                raise _Wrong(f"metadata of {end - start:,} bytes")
            entry = {at: walk.data[slice(*_span(one))] for at, one in walk((start, end))}
            metadata[_utf8(entry.get(1, b""))] = _utf8(entry.get(2, b""))
        elif number in (20, 25):
            raise _Wrong("it holds functions or a training")
    if graphs != 1:
        raise _Wrong("it holds no graph" if not graphs else "it holds several graphs")
    if size - data > MAX_REST:
        raise _Wrong(f"{size - data:,} of its bytes are no numbers of tensors")
    return metadata


def _graph(walk: _Walk, span: Span, file: Path) -> int:
    """Look through a GraphProto; return the bytes of its tensors."""
    data = 0
    for number, value in walk(span):
        if number == 1:
            data += _node(walk, _span(value), file)
        elif number == 5:
            data += _tensor(walk, _span(value), file)
        elif number == 15:
            raise _Wrong("it holds sparse tensors")
    return data


def _node(walk: _Walk, span: Span, file: Path) -> int:
    """Look through a NodeProto."""
    kind, domain, data = "", "", 0
    for number, value in walk(span):
        if number == 4:
            kind = walk.text(value)
        elif number == 7:
            domain = walk.text(value)
        elif number == 5:
            data += _attribute(walk, _span(value), file)
    if domain not in PLAIN or kind not in OPERATORS:
        raise _Wrong(f"it has the operator {f'{domain}.{kind}' if domain else kind!r}, which may do anything")
    return data


def _attribute(walk: _Walk, span: Span, file: Path) -> int:
    data = 0
    for number, value in walk(span):
        if number in (6, 11, 22, 23):
            raise _Wrong("it has graphs or sparse tensors within operators")
        if number in (5, 10):
            data += _tensor(walk, _span(value), file)
    return data


def _tensor(walk: _Walk, span: Span, file: Path) -> int:
    """Look through a TensorProto; return the bytes of its numbers. It may claim no more numbers than it has."""
    dims, data, outside, length = list[int](), 0, {}, span[1] - span[0]
    for number, value in walk(span):
        if number == 1:
            dims += walk.numbers(value)
            if len(dims) > MAX_RANK:
                raise _Wrong(f"a tensor of more than {MAX_RANK} dimensions")
        elif number == 9:
            data += _span(value)[1] - _span(value)[0]
        elif number == 13:
            entry = {at: walk.text(one) for at, one in walk(_span(value))}
            outside[entry.get(1, "")] = entry.get(2, "")
    if outside:
        length = _beside(outside.get("location", ""), file)
    if math.prod(dims) > 2 * length:  # two of four bits are the most that a byte holds
        raise _Wrong(f"a tensor of {' x '.join(map(str, dims[:8]))} numbers with data of {length:,} bytes")
    return data


def _beside(location: str, file: Path) -> int:
    """Return the size of a file with a tensor's numbers, which must lie beside the ONNX file."""
    beside = file.parent / location
    plain = location not in ("", ".", "..") and not set(location) & set("/\\:\0")
    if not plain or beside.is_symlink() or not beside.is_file():
        raise _Wrong(f"its data are to be read from {location!r}, which is no file beside it")
    return beside.stat().st_size
