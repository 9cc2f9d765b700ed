"""Replaces bfloat16 in ONNX models by float32, which holds all its values: CPU runtimes have no kernels for it.

Callers still pass and get bfloat16: sessions convert inputs and outputs, as NumPy has no such type either.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def widen(proto: Any) -> None:
    """Replace bfloat16 by float32 in a model: in inputs, outputs, weights, and the types that nodes convert to."""
    import onnx

    for graph in _graphs(proto.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            _widen_type(value.type)
        for tensor in graph.initializer:
            _widen_tensor(tensor)
    for node in _nodes(proto):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.INT and attribute.name in ("to", "dtype", "output_dtype"):
                attribute.i = onnx.TensorProto.FLOAT if attribute.i == onnx.TensorProto.BFLOAT16 else attribute.i
            elif attribute.type == onnx.AttributeProto.TENSOR:
                _widen_tensor(attribute.t)


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and the graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _graphs(inner)


def _nodes(proto: Any) -> Iterator[Any]:
    for graph in _graphs(proto.graph):
        yield from graph.node
    for function in proto.functions:
        yield from function.node


def _widen_type(kind: Any) -> None:
    import onnx

    if kind.HasField("sequence_type"):
        _widen_type(kind.sequence_type.elem_type)
    elif kind.HasField("tensor_type") and kind.tensor_type.elem_type == onnx.TensorProto.BFLOAT16:
        kind.tensor_type.elem_type = onnx.TensorProto.FLOAT


def _widen_tensor(tensor: Any) -> None:
    import numpy as np
    import onnx

    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
