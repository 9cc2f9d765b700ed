"""Passes over an exported ONNX model before it is saved, so that ONNX Runtime computes it as intended.

Weights that the runtime should hold as floats are written as integers with a Cast and a Mul. ONNX Runtime computes
these once, when it loads the model; it would run a DequantizeLinear at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from torchslim.errors import ExportError
from torchslim.graph.integer_patterns import is_dynamic
from torchslim.runtimes.onnx_biases import MICROSOFT, becomes_gemm, fused_biases, integer_biases
from torchslim.runtimes.onnx_graph import Graph
from torchslim.runtimes.onnx_kernels import PACKED
from torchslim.runtimes.onnx_reshapes import copied_sizes

MOVES = ("Transpose", "Reshape", "Unsqueeze", "Slice", "Concat", "Squeeze", "Split")  # they do not change values
BYTES = ("INT8", "UINT8")


def translations(graph: torch.fx.Graph) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations to ONNX of operations that torch has no translation for, by operation."""
    if not is_dynamic(graph):
        return {}
    from onnxscript import opset18 as op

    quantized = torch.ops.quantized_decomposed

    def choose(x: Any, low: int, high: int, eps: float, dtype: int) -> Any:
        if (low, high) != (0, 255):
            raise ExportError(f"ONNX quantizes dynamically to 0 ... 255 alone, got {low} ... {high}")
        _, scale, zero_point = op.DynamicQuantizeLinear(x)
        return scale, zero_point

    def quantize(x: Any, scale: Any, zero_point: Any, low: int, high: int, dtype: int) -> Any:
        return op.QuantizeLinear(x, scale, zero_point)

    def dequantize(x: Any, scale: Any, zero_point: Any, low: int, high: int, dtype: int) -> Any:
        return op.DequantizeLinear(x, scale, zero_point)

    return {
        quantized.choose_qparams.tensor: choose,
        quantized.quantize_per_tensor.tensor: quantize,
        quantized.dequantize_per_tensor.tensor: dequantize,
    }


def finish(proto: Any, *, lowered: bool = True) -> None:
    """Run all passes; drop constants that they leave without a reader, and the shapes of inner values.

    `lowered` uses operations that ONNX Runtime has beyond the standard.
    """
    graph = Graph(proto.graph)
    integer_biases(graph)
    if lowered and fused_biases(graph) and all(opset.domain != MICROSOFT for opset in proto.opset_import):
        proto.opset_import.append(type(proto.opset_import[0])(domain=MICROSOFT, version=1))
    float_activations(graph)
    float_weights(graph)
    four_bit_weights(graph)
    weights_of_their_own(graph)
    copied_sizes(graph)
    if graph.changed:
        graph.write()
    del proto.graph.value_info[:]
    imports = [opset for opset in proto.opset_import if opset.domain != "torchslim"]
    del proto.opset_import[:]
    proto.opset_import.extend(imports)


def float_activations(graph: Graph) -> None:
    """Write a ReLU or clip after a quantized Gemm or MatMul as Max and Min, unless only roundings read it.

    ONNX Runtime looks for a rounding after a clip. If none follows, it leaves the layer in float, with weights that are
    dequantized at every call. It treats no other activation as a clip.
    """
    makers, readers = graph.makers(), graph.readers()
    for node in list(graph.nodes):
        if node.op_type not in ("Relu", "Clip") or _rounded(node, readers):
            continue
        layer = makers.get(node.input[0])
        if layer is not None and layer.op_type == "Add":
            products = [makers[input_] for input_ in layer.input if input_ in makers]
            layer = next(
                (product for product in products if product.op_type == "MatMul" and becomes_gemm(product, graph)), None
            )
        elif layer is not None and layer.op_type not in ("Gemm", "MatMul"):
            layer = None
        if layer is None or len(readers[node.input[0]]) > 1 or not _quantized_inputs(layer, makers, graph):
            continue
        if node.op_type == "Relu":
            dtype = graph.array(makers[layer.input[0]].input[1]).dtype  # of the input's scale
            bounds = [("Max", graph.store(np.zeros((), dtype), f"{node.name}_zero"))]
        else:
            bounds = [(kind, bound) for kind, bound in zip(("Max", "Min"), node.input[1:], strict=False) if bound]
        if bounds:
            graph.replace(node, *_bounded(node, bounds))


def _rounded(node: Any, readers: Mapping[str, list[Any]]) -> bool:
    """Whether all that is read of a node is its rounded output; ONNX Runtime rounds before it moves values."""
    users = readers.get(node.output[0], [])
    return bool(users) and all(
        user.op_type == "QuantizeLinear" or (user.op_type in ("Transpose", "Reshape") and _rounded(user, readers))
        for user in users
    )


def _bounded(node: Any, bounds: list[tuple[str, str]]) -> list[Any]:
    """Nodes in the layer of `node` that bound its input, one after another."""
    from onnx import helper

    nodes, value = [], node.input[0]
    path, slash, _ = node.name.rpartition("/")
    for index, (kind, bound) in enumerate(bounds, 1):
        output = node.output[0] if index == len(bounds) else f"{node.output[0]}_{kind}"
        name = f"{path}/{kind}" if slash else f"{node.name}_{kind}"
        nodes.append(helper.make_node(kind, [value, bound], [output], name=name))
        value = output
    return nodes


def float_weights(graph: Graph) -> None:
    """Rewrite weights that no integer kernel reads, so that they are computed at load instead of at every call."""
    from onnx import TensorProto, helper

    makers, readers = graph.makers(), graph.readers()
    kinds = [TensorProto.DataType.Value(kind) for kind in BYTES]
    for node in list(graph.nodes):
        weight = graph.constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weight is None or weight.data_type not in kinds or node.input[1] not in graph.constants:
            continue
        if len(node.input) > 2 and (node.input[2] not in graph.constants or graph.array(node.input[2]).any()):
            continue
        if any(_quantized_inputs(user, makers, graph) for user in _users(node, readers)):
            continue
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        scale = graph.array(node.input[1])
        if scale.ndim:
            scale = scale.reshape([-1 if index == axis % len(weight.dims) else 1 for index in range(len(weight.dims))])
        name = node.output[0]
        stored = graph.store(scale.astype(np.float32), f"{name}_scale")
        cast = helper.make_node("Cast", [weight.name], [f"{name}_cast"], name=f"{name}_cast", to=TensorProto.FLOAT)
        graph.replace(node, cast, helper.make_node("Mul", [f"{name}_cast", stored], [name], name=node.name))


def weights_of_their_own(graph: Graph) -> None:
    """Give each layer that reads a weight its own DequantizeLinear of shared integers: ONNX Runtime fuses no other.

    Otherwise a layer that is called several times, or tied weights, would compute in float.
    """
    dequantized: set[str] = set()
    for node in graph.nodes:
        source = graph.constants if node.op_type == "DequantizeLinear" else dequantized
        if node.op_type in ("DequantizeLinear", *MOVES) and node.input[0] in source:
            dequantized.add(node.output[0])
    outputs = {output.name for output in graph.proto.output}
    readers = graph.readers()
    used_names = {name for node in graph.nodes for name in (*node.output, node.name)} | set(graph.constants)
    for node in reversed(list(graph.nodes)):  # copy nodes that move a weight first, then the weight for each copy
        name = node.output[0]
        users = readers.get(name, []) if name in dequantized and name not in outputs else []
        for number, user in enumerate(users[1:], 1):
            copied = type(node).FromString(node.SerializeToString())
            copied.name, copied.output[0] = (_free(f"{base}_{number}", used_names) for base in (node.name, name))
            user.input[:] = [copied.output[0] if input_ == name else input_ for input_ in user.input]
            readers.setdefault(copied.input[0], []).append(copied)
            graph.insert(node, copied)


def _free(name: str, used_names: set[str]) -> str:
    while name in used_names:
        name += "_"
    used_names.add(name)
    return name


def _users(node: Any, readers: Mapping[str, list[Any]]) -> Iterator[Any]:
    """Yield the nodes that compute with the outputs of `node`, directly or after `MOVES`."""
    for name in node.output:
        for user in readers.get(name, ()):
            if user.op_type in MOVES:
                yield from _users(user, readers)
            else:
                yield user


def _quantized_inputs(node: Any, makers: Mapping[str, Any], graph: Graph) -> bool:
    """Whether the node reads an activation with a fixed scale; the runtime has an integer kernel for such a node."""
    for name in node.input:
        maker = makers.get(name)
        while maker is not None and maker.op_type in MOVES:
            maker = makers.get(maker.input[0])
        if maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] not in graph.constants:
            return maker.input[1] in graph.constants
    return False


def four_bit_weights(graph: Graph) -> None:
    """Unpack the two values of each byte, with operations that every version of ONNX Runtime computes at load."""
    from onnx import TensorProto, helper

    for node in list(graph.nodes):
        if node.op_type != PACKED or node.domain != "torchslim":
            continue
        packed, scale = node.input
        shape = next(list(attribute.ints) for attribute in node.attribute if attribute.name == "shape")
        rows, groups = graph.constants[scale].dims
        size, length, name = 2 * graph.constants[packed].dims[1] // groups, int(np.prod(shape[1:])), node.output[0]
        constants = {
            "mask": np.uint8(15),
            "four": np.uint8(4),
            "eight": np.float32(8),
            "last": np.array([-1]),
            "groups": np.array([rows, groups, size]),
            "row": np.array([rows, groups * size]),
            "shape": np.array(shape),
            "start": np.array([0]),
            "end": np.array([length]),
            "axis": np.array([1]),
            "scale": graph.array(scale)[:, :, None],
        }
        for key, value in constants.items():
            graph.store(value, f"{name}_{key}")

        def step(operation: str, inputs: list[str], output: str, name: str = name, **attributes: Any) -> Any:
            input_names = [input_[1:] if input_.startswith("=") else f"{name}_{input_}" for input_ in inputs]
            output_name = f"{name}_{output}" if output else name
            return helper.make_node(operation, input_names, [output_name], name=output_name, **attributes)

        graph.replace(
            node,
            step("BitwiseAnd", [f"={packed}", "mask"], "low"),
            step("BitShift", [f"={packed}", "four"], "high", direction="RIGHT"),
            step("Unsqueeze", ["low", "last"], "lows"),
            step("Unsqueeze", ["high", "last"], "highs"),
            step("Concat", ["lows", "highs"], "pairs", axis=-1),
            step("Reshape", ["pairs", "groups"], "grouped"),
            step("Cast", ["grouped"], "cast", to=TensorProto.FLOAT),
            step("Sub", ["cast", "eight"], "centered"),
            step("Mul", ["centered", "scale"], "scaled"),
            step("Reshape", ["scaled", "row"], "rows"),
            step("Slice", ["rows", "start", "end", "axis"], "cut"),
            step("Reshape", ["cut", "shape"], ""),
        )
