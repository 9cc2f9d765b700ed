"""Passes over an ONNX model that compute the biases of quantized layers inside of the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torchslim.runtimes.onnx_graph import Graph

MICROSOFT = "com.microsoft"


def integer_biases(graph: Graph) -> None:
    """Store the biases of quantized layers as integers, at the scale of the products that they are added to.

    Otherwise ONNX Runtime runs a Gemm with a float output (a network's last layer) in float, and where all sizes are
    fixed it makes a Gemm of every product and sum. It has a pass that converts the bias where the output is quantized,
    but that pass also quantizes the weights of layers that were left in float.
    """
    from onnx import helper

    dequantized = {node.output[0]: node for node in graph.nodes if node.op_type == "DequantizeLinear"}
    makers, readers = graph.makers(), graph.readers()
    for node in list(graph.nodes):
        if node.op_type in ("Gemm", "Conv") and len(node.input) == 3:
            owner, place, left_name, right_name = node, 2, node.input[0], node.input[1]
        elif node.op_type == "MatMul" and (addition := _sum_of(node, graph, readers)) is not None:
            if not becomes_gemm(node, graph):
                continue
            (owner, place), left_name = addition, node.input[0]
            maker = makers.get(node.input[1])
            right_name = maker.input[0] if maker is not None and maker.op_type == "Transpose" else node.input[1]
        else:
            continue
        if any(operand not in dequantized for operand in (left_name, right_name)):
            continue
        scale_names = [dequantized[operand].input[1] for operand in (left_name, right_name)]
        if owner.input[place] not in graph.constants or any(
            scale_name not in graph.constants for scale_name in scale_names
        ):
            continue
        # in float64: the product of two small scales must not become 0 before the division by it
        left_scale, right_scale = (graph.array(scale_name).astype(np.float64) for scale_name in scale_names)
        steps = np.rint(graph.array(owner.input[place]) / (left_scale * right_scale)).clip(-(2**31) + 1, 2**31 - 1)
        integers = graph.store(steps.astype(np.int32), f"{node.name}_bias")
        scale = graph.store((left_scale * right_scale).astype(np.float32), f"{node.name}_bias_scale")
        axis = {"axis": 0} if right_scale.ndim else {}
        name = f"{node.name}_bias_float"
        graph.insert(node, helper.make_node("DequantizeLinear", [integers, scale], [name], name=name, **axis))
        owner.input[place] = name


def fused_biases(graph: Graph) -> bool:
    """Add the biases of quantized products inside of the products; return whether there were any.

    ONNX Runtime computes a product of two dequantized factors on integers, but adds the bias in a pass of its own. A
    Gelu is an exception: ONNX Runtime adds the bias inside of it.
    """
    from onnx import TensorProto, helper

    makers, readers = graph.makers(), graph.readers()
    found = False
    for node in list(graph.nodes):
        if node.op_type != "MatMul" or (addition := _sum_of(node, graph, readers)) is None:
            continue
        total, place = addition
        if becomes_gemm(node, graph) or any(user.op_type == "Gelu" for user in readers.get(total.output[0], [])):
            continue
        moved = makers.get(node.input[1])
        transpose = moved if moved is not None and moved.op_type == "Transpose" else None
        factors: list[Any] = [makers.get(node.input[0]), moved if transpose is None else makers.get(transpose.input[0])]
        if any(factor is None or factor.op_type != "DequantizeLinear" for factor in factors):
            continue
        left, right = factors
        scales: list[Any] = [graph.constants.get(factor.input[1]) for factor in factors]
        bias, weight = graph.constants[total.input[place]], graph.constants.get(right.input[0])
        if weight is None or len(weight.dims) != 2 or left.input[0] in graph.constants or None in scales:
            continue
        columns = weight.dims[1 if transpose is None else 0]
        axis = next((attribute.i for attribute in right.attribute if attribute.name == "axis"), 1) % 2
        by_column = not scales[1].dims or axis == (1 if transpose is None else 0)
        floats = all(constant.data_type == TensorProto.FLOAT for constant in (bias, *scales))
        if not (floats and by_column) or scales[0].dims or list(bias.dims) != [columns]:
            continue
        if len(right.input) > 2 and (right.input[2] not in graph.constants or graph.array(right.input[2]).any()):
            continue
        name, zero_point = f"{node.name}_weight", left.input[2] if len(left.input) > 2 else ""
        turned = [] if transpose is None else [helper.make_node("Transpose", [weight.name], [name], name=name)]
        inputs = [left.input[0], name if turned else weight.name, left.input[1], right.input[1], zero_point, ""]
        product = helper.make_node(
            "MatMulIntegerToFloat", [*inputs, bias.name], list(total.output), name=node.name, domain=MICROSOFT
        )
        graph.replace(total, *turned, product)
        graph.nodes = [other for other in graph.nodes if other is not node]
        found = True
    if found:
        _drop_unread(graph, ("Transpose", "DequantizeLinear"))
    return found


def _drop_unread(graph: Graph, kinds: Sequence[str]) -> None:
    """Delete nodes of these kinds that nothing reads."""
    outputs = {output.name for output in graph.proto.output}
    while unread := [
        node
        for readers in [graph.readers()]
        for node in graph.nodes
        if node.op_type in kinds and not any(name in readers or name in outputs for name in node.output)
    ]:
        graph.nodes = [node for node in graph.nodes if all(node is not other for other in unread)]


def _sum_of(product: Any, graph: Graph, readers: Mapping[str, list[Any]]) -> tuple[Any, int] | None:
    """The node that adds a stored vector to `product` and is its only reader, and the index of the vector's input."""
    users = readers.get(product.output[0], [])
    if len(users) != 1 or users[0].op_type != "Add":
        return None
    place = 1 if users[0].input[0] == product.output[0] else 0
    stored = graph.constants.get(users[0].input[place])
    return (users[0], place) if stored is not None and len(stored.dims) == 1 else None


def becomes_gemm(product: Any, graph: Graph) -> bool:
    """Whether ONNX Runtime makes a Gemm of a product and the addition of a vector.

    It does so for matrices, and where all sizes are fixed.
    """
    return graph.fixed or graph.ranks.get(product.output[0]) == 2
