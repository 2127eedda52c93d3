"""Turns a float32 graph into each precision that is exported, and says how near it must stay to the encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from micl_zoo.errors import ExportError

from .check import Bounds

# What stays in float32 where the rest is fp16: norms, the softmax, the mean over patches.
FLOAT32_OPS = ("LayerNormalization", "Softmax", "ReduceMean")
LARGE = 1024  # numbers that a tensor needs to be worth a node
# Weights take 7 bits of their 8. Processors without VNNI add pairs of products of 8 bits in 16, which overflow: on the
# encoder that comes with the package all 8 bits lose more there than the eighth bit gains (benchmarks/records).
WEIGHT_MAX = 63
ZERO = 128  # of activations, as unsigned bytes: fixed, so that an image's numbers do not depend on its batch
SMALLEST = 1e-12  # scale of a token, so that one of zeros stays zero


def store_in_half(model: ModelProto) -> ModelProto:
    """Store float32 tensors as float16 where that loses nothing; ONNX Runtime turns them back on opening."""
    kept, casts = [], []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor) if tensor.data_type == TensorProto.FLOAT else np.zeros(0)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if values.size >= LARGE and np.array_equal(half.astype(np.float32), values):
            stored = f"{tensor.name}_half"
            kept.append(numpy_helper.from_array(half, stored))
            casts.append(_cast(stored, tensor.name, TensorProto.FLOAT))
        else:
            kept.append(tensor)
    return _rebuilt(model, [*casts, *model.graph.node], kept)


def to_fp16(model: ModelProto) -> ModelProto:
    """Turn weights and arithmetic into float16, except inputs, outputs, and FLOAT32_OPS with their weights.

    ONNX Runtime's own converter also rounds the weights of those, and before 1.32 it breaks on tensors that two of them
    share.
    """
    graph = model.graph
    del graph.value_info[:]  # these types no longer hold
    outer = {one.name: f"{one.name}_fp16" for one in (*graph.input, *graph.output)}
    nodes = [_cast(one.name, outer[one.name], TensorProto.FLOAT16) for one in graph.input]
    exact = {name for node in graph.node if node.op_type in FLOAT32_OPS for name in node.input[1:]}  # their weights
    outer |= {name: f"{name}_fp16" for name in exact}  # the others may read the same tensor
    for node in graph.node:
        if node.op_type in FLOAT32_OPS:
            source, result = (outer.get(name, name) for name in (node.input[0], node.output[0]))
            node.input[0], node.output[0] = f"{result}_from_fp16", f"{result}_fp32"
            nodes.append(_cast(source, node.input[0], TensorProto.FLOAT))
            nodes += [node, _cast(node.output[0], result, TensorProto.FLOAT16)]
        else:
            for names in (node.input, node.output):
                names[:] = [outer.get(name, name) for name in names]
            nodes.append(node)
    nodes += [_cast(outer[one.name], one.name, TensorProto.FLOAT) for one in graph.output]
    kept = [one for one in graph.initializer if one.name in exact]
    return _rebuilt(model, nodes, kept + [_half(one, outer.get(one.name, one.name)) for one in graph.initializer])


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], f"cast_{target}", to=to)


def _half(tensor: TensorProto, name: str) -> TensorProto:
    """Rename a tensor, and turn float32 into float16."""
    values, largest = numpy_helper.to_array(tensor), np.finfo(np.float16).max
    if tensor.data_type == TensorProto.FLOAT:
        values = np.clip(values, -largest, largest).astype(np.float16)
    return numpy_helper.from_array(values, name)


def to_int8(model: ModelProto) -> ModelProto:
    """Compute the blocks' matrix products in int8, with one scale per column of weights and per token.

    ONNX Runtime's own dynamic quantisation has one scale per batch, so that an image's embedding would depend on the
    images beside it; its static one needs calibration, and was further off (benchmarks/records).
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[NodeProto] = []
    steps = {"per_step": np.float32(1 / 127), "smallest": np.float32(SMALLEST), "one": np.float32(1)}
    constants = {"last_axis": np.array([-1], np.int64), **steps, "zero": np.uint8(ZERO)}
    added = [numpy_helper.from_array(value, f"int8_{name}") for name, value in constants.items()]
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            integers, scales = _quantized(numpy_helper.to_array(tensors[node.input[1]]))
            added.append(numpy_helper.from_array(integers, f"{node.name}_int8"))
            added.append(numpy_helper.from_array(scales, f"{node.name}_scales"))
            nodes += _integer_product(node)
        else:
            nodes.append(node)
    if len(nodes) == len(model.graph.node):
        raise ExportError(
            "int8 is for the matrix products of transformers, and this encoder has none: take precision fp16"
        )
    return _rebuilt(model, nodes, [*tensors.values(), *added])


def _quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise (in, out) float32: (in, out) int8 and (out,) float32 scales."""
    scales = np.maximum(np.abs(weight).max(axis=0) / WEIGHT_MAX, SMALLEST).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales


def _integer_product(node: NodeProto) -> list[NodeProto]:
    """Build x (B, N, in) times weights: bytes = x / scale + ZERO, product in int32, times both scales."""
    x, result = node.input[0], node.output[0]

    def make(kind: str, inputs: list[str], output: str, **settings: Any) -> NodeProto:
        return helper.make_node(kind, inputs, [output], f"{node.name}_{kind}_{output}", **settings)

    def name(part: str) -> str:
        return f"{node.name}_{part}"

    return [
        make("Abs", [x], name("sizes")),
        make("ReduceMax", [name("sizes"), "int8_last_axis"], name("largest"), keepdims=1),
        make("Mul", [name("largest"), "int8_per_step"], name("step")),
        make("Max", [name("step"), "int8_smallest"], name("scale")),
        make("Div", [x, name("scale")], name("steps")),
        make("QuantizeLinear", [name("steps"), "int8_one", "int8_zero"], name("bytes")),
        make("MatMulInteger", [name("bytes"), name("int8"), "int8_zero"], name("sums")),
        make("Cast", [name("sums")], name("numbers"), to=TensorProto.FLOAT),
        make("Mul", [name("numbers"), name("scale")], name("scaled")),
        make("Mul", [name("scaled"), name("scales")], result),
    ]


def _rebuilt(model: ModelProto, nodes: list[NodeProto], tensors: list[TensorProto]) -> ModelProto:
    """Replace a model's nodes, and keep the tensors that they read; no copy, as it may be gigabytes."""
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in tensors if tensor.name in read]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(kept)
    return model


@dataclass(frozen=True)
class Conversion:
    """One precision."""

    convert: Callable[[ModelProto], ModelProto]  # from the float32 graph; may change it in place
    bounds: Bounds  # what the file must keep
    inside: Bounds | None = None  # with the transform inside: some pixels in ten thousand are a level off Pillow's


CONVERSIONS = {
    "fp32": Conversion(store_in_half, Bounds(max_difference=1e-4, cosine_min=0.99999), Bounds(cosine_min=0.9999)),
    "fp16": Conversion(to_fp16, Bounds(cosine_min=0.999)),
    "int8": Conversion(to_int8, Bounds(cosine_min=0.98, neighbour_agreement=0.95)),
}
