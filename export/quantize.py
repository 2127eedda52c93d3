"""Smaller graphs: half-precision weights and arithmetic, int8 matrix products."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

# What stays in float32 where the rest is fp16: norms, the softmax, the mean over patches.
FLOAT32_OPS = ("LayerNormalization", "Softmax", "ReduceMean")
LARGE = 1024  # numbers from which on a tensor is worth a node
# Weights take 7 bits of their 8. Processors without VNNI add pairs of products of 8 bits in 16, which overflow: on the
# encoder that comes with the package all 8 bits lose more there than the eighth bit gains (benchmarks/records).
WEIGHT_MAX = 63
ZERO = 128  # of activations, as unsigned bytes: fixed, so that an image's numbers do not depend on its batch
SMALLEST = 1e-12  # scale of a token: one that is all zero stays that


def store_in_half(model: ModelProto) -> ModelProto:
    """Keep float32 tensors as float16 in the file where that loses nothing; ONNX Runtime turns them back on opening."""
    kept, casts = [], []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor) if tensor.data_type == TensorProto.FLOAT else np.zeros(0)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if values.size >= LARGE and np.array_equal(half.astype(np.float32), values):
            stored = f"{tensor.name}_half"
            kept.append(numpy_helper.from_array(half, stored))
            casts.append(helper.make_node("Cast", [stored], [tensor.name], f"{tensor.name}_cast", to=TensorProto.FLOAT))
        else:
            kept.append(tensor)
    return _rebuilt(model, [*casts, *model.graph.node], kept)


def to_fp16(model: ModelProto) -> ModelProto:
    """Weights and arithmetic in float16, but for FLOAT32_OPS; inputs and outputs stay float32."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numbers below 6e-8 become that; the comparison with PyTorch judges it
        made: ModelProto = convert_float_to_float16(
            model, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPS]
        )
    return made


def to_int8(model: ModelProto) -> ModelProto:
    """The blocks' matrix products with weights in int8: weights a scale a column, activations a scale a token.

    ONNX Runtime's own dynamic quantisation has one scale for a whole batch, so that an image's embedding would depend
    on the images beside it; its static one needs calibration, and was further off (benchmarks/records).
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[NodeProto] = []
    added = [
        numpy_helper.from_array(np.array([-1], np.int64), "int8_last_axis"),
        numpy_helper.from_array(np.float32(1 / 127), "int8_per_step"),
        numpy_helper.from_array(np.float32(SMALLEST), "int8_smallest"),
        numpy_helper.from_array(np.float32(1), "int8_one"),
        numpy_helper.from_array(np.uint8(ZERO), "int8_zero"),
    ]
    replaced = set()
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            weight = node.input[1]
            replaced.add(weight)
            integers, scales = _quantized(numpy_helper.to_array(tensors[weight]))
            added += [numpy_helper.from_array(integers, f"{node.name}_int8")]
            added += [numpy_helper.from_array(scales, f"{node.name}_scales")]
            nodes += _integer_product(node)
        else:
            nodes.append(node)
    return _rebuilt(model, nodes, [one for name, one in tensors.items() if name not in replaced] + added)


def _quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(in, out) float32 -> the same int8, and (out,) float32 scales."""
    scales = np.maximum(np.abs(weight).max(axis=0) / WEIGHT_MAX, SMALLEST).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales


def _integer_product(node: NodeProto) -> list[NodeProto]:
    """X (B, N, in) times weights, as nodes: bytes = x / scale + ZERO, product in int32, times both scales."""
    x, result, own = node.input[0], node.output[0], node.name

    def make(kind: str, inputs: list[str], output: str, **settings: Any) -> NodeProto:
        return helper.make_node(kind, inputs, [output], f"{own}_{kind}_{output}", **settings)

    def name(part: str) -> str:
        return f"{own}_{part}"

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
    """The model with other nodes and tensors, in place of a copy: it may be gigabytes."""
    graph = model.graph
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
    return model
