"""Recognition of integer weights and dynamically quantized inputs in a quantized graph, by the operations around them.

A quantized program computes on dequantized numbers with ATen operations alone, so that it runs anywhere. Each runtime
looks for these patterns and computes them with its own integer kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from torchslim.graph.row_ranges import find_rounded_rows

Constant = Callable[[Node], Tensor | None]  # the stored tensor that a node stands for, None where it is computed

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout)


@dataclass(frozen=True, kw_only=True)
class Int8Weight:
    """`values[i] * scale[i]` along `axis`; the zero points are 0."""

    values: Tensor
    scale: Tensor
    axis: int

    def dequantized(self) -> Tensor:
        """Return the weight as floats."""
        shape = [1] * self.values.dim()
        shape[self.axis] = -1
        return self.values.float() * self.scale.float().view(shape)


@dataclass(frozen=True, kw_only=True)
class Int4Weight:
    """Rows of 4-bit integers in groups that share a scale.

    `packed` is uint8 (rows, groups * group_size / 2), two values in a byte, each plus 8, the even one in the low half;
    `scale` is float32 (rows, groups). A row is the weight flattened from dimension 1 on, padded to whole groups.
    """

    packed: Tensor
    scale: Tensor
    shape: tuple[int, ...]

    @property
    def group_size(self) -> int:
        """Number of values that share a scale."""
        return 2 * self.packed.shape[1] // self.scale.shape[1]

    @property
    def length(self) -> int:
        """Number of values in a row without the padding."""
        return Tensor.numel(torch.empty(self.shape[1:], device="meta"))

    def dequantized(self) -> Tensor:
        """Return the weight as floats."""
        rows, groups = self.scale.shape
        values = torch.stack([self.packed & 15, self.packed >> 4], -1).view(rows, groups, -1).float() - 8
        return (values * self.scale.unsqueeze(-1)).view(rows, -1)[:, : self.length].reshape(self.shape)


def find_int8(node: Any, constant: Constant) -> Int8Weight | None:
    """Return the int8 weight that `node` dequantizes, if any."""
    if not _calls(node, "quantized_decomposed::dequantize_per_channel", ""):
        return None
    values, scale, zero_point = (
        constant(argument) if isinstance(argument, Node) else None for argument in node.args[:3]
    )
    if values is None or scale is None or values.dtype != torch.int8 or (zero_point is not None and zero_point.any()):
        return None
    return Int8Weight(values=values, scale=scale, axis=node.args[3] % values.dim())


def find_dynamic(node: Any) -> Node | None:
    """Return the source of a value that is rounded with ranges of each call, by row or as a whole, if it is one."""
    return find_rounded_rows(node) or find_one_range(node)


def find_one_range(node: Any) -> Node | None:
    """Return the source of a dynamically quantized and dequantized `node`, if any (uint8, one scale for all values)."""
    if not _calls(node, "quantized_decomposed::dequantize_per_tensor", "tensor"):
        return None
    quantize: Any = node.args[0]
    if not _calls(quantize, "quantized_decomposed::quantize_per_tensor", "tensor"):
        return None
    source, scale, zero_point, low, high, dtype = quantize.args[:6]
    choice = _from_choice(scale, 0)
    if choice is None or choice is not _from_choice(zero_point, 1) or choice.args[0] is not source:
        return None
    return source if (low, high, dtype) == (0, 255, torch.uint8) and isinstance(source, Node) else None


def _from_choice(node: Any, index: int) -> Node | None:
    if not isinstance(node, Node) or node.op != "call_function" or len(node.args) < 2 or node.args[1] != index:
        return None
    return node.args[0] if _calls(node.args[0], "quantized_decomposed::choose_qparams", "tensor") else None  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Recurrent:
    """An LSTM or GRU on int8 weights.

    `cells` are those of layer 0 in each direction, then of layer 1, and so on, each with two weights and two biases
    (None for a layer without biases). `source` is the input before its dynamic quantization, None for an input that is
    not quantized: then only the weights are integers.
    """

    kind: str
    x: Node
    source: Node | None
    states: tuple[Node, ...]
    cells: tuple[tuple[Int8Weight, Int8Weight, Tensor | None, Tensor | None], ...]
    layers: int
    bidirectional: bool
    batch_first: bool

    @property
    def directions(self) -> int:
        """Number of directions: 1 or 2."""
        return 2 if self.bidirectional else 1

    @property
    def hidden(self) -> int:
        """Size of the hidden state."""
        return self.cells[0][1].values.shape[1]


def find_recurrent(node: Node, constant: Constant) -> Recurrent | None:
    """Return the LSTM or GRU that `node` computes, if all its weights are int8."""
    if node.target not in (aten.lstm.input, aten.gru.input):
        return None
    kind = "LSTM" if node.target is aten.lstm.input else "GRU"
    arguments: Any = node.args
    x, states, parameters, biased, layers, _, train, bidirectional, batch_first = arguments
    per_cell, directions = 4 if biased else 2, 2 if bidirectional else 1
    if train or len(parameters) != per_cell * directions * layers:  # with a projection each cell has one more weight
        return None
    cells = []
    for start in range(0, len(parameters), per_cell):
        input_weight, hidden_weight = (find_int8(parameter, constant) for parameter in parameters[start : start + 2])
        biases = (
            [constant(parameter) for parameter in parameters[start + 2 : start + per_cell]] if biased else [None, None]
        )
        if input_weight is None or hidden_weight is None or input_weight.axis or hidden_weight.axis:
            return None
        if biased and None in [None if bias is None else True for bias in biases]:
            return None
        cells.append((input_weight, hidden_weight, biases[0], biases[1]))
    return Recurrent(
        kind=kind,
        x=x,
        source=find_one_range(x),
        states=tuple(states) if kind == "LSTM" else (states,),
        cells=tuple(cells),
        layers=layers,
        bidirectional=bidirectional,
        batch_first=batch_first,
    )


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer on an int8 or int4 weight; `source` is its input before the rows are rounded, else None."""

    x: Node
    source: Node | None
    weight: Int8Weight | Int4Weight
    bias: Node | None


def find_linear(node: Node, constant: Constant) -> Linear | None:
    """Return the linear layer that `node` computes, if its weight is int8 or int4 and its input has no fixed scale."""
    if node.target is not aten.linear.default:
        return None
    arguments: Any = node.args
    x, stored, bias = (*arguments, None)[:3]
    weight: Int8Weight | Int4Weight | None = find_int8(stored, constant) or find_int4(stored, constant)
    source = find_rounded_rows(x)
    if weight is None or (isinstance(weight, Int8Weight) and (weight.axis or weight.values.dim() != 2)):
        return None
    if source is None and isinstance(x.target, torch._ops.OpOverload) and "dequantize_per_tensor" in x.target.name():
        return None
    return Linear(x=x, source=source, weight=weight, bias=bias)


def is_dynamic(graph: torch.fx.Graph) -> bool:
    """Whether the graph chooses scales of whole tensors at run time."""
    return any(_calls(node, "quantized_decomposed::choose_qparams", "tensor") for node in graph.nodes)


def _calls(node: Any, name: str, overload: str) -> bool:
    """Whether the node calls this operation, compared by name: the operation may not be registered here."""
    if not isinstance(node, Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return bool(node.target.name() == (f"{name}.{overload}" if overload else name))


def find_int4(node: Any, constant: Constant) -> Int4Weight | None:
    """Return the int4 weight whose chain of nodes, as `torchslim.quantize.weight_only` emits it, ends in `node`."""
    shape, sources = _static_shape(node), int4_sources(node)
    if shape is None or sources is None:
        return None
    packed, scale = map(constant, sources)
    if packed is None or scale is None or packed.dtype != torch.uint8 or scale.dim() != 2:
        return None
    return Int4Weight(packed=packed, scale=scale, shape=shape)


def int4_sources(node: Any) -> tuple[Node, Node] | None:
    """The nodes of the packed integers and of the scales whose chain ends in `node`, if it is one."""
    node = _back(node, VIEWS)
    if _is(node, (aten.slice.Tensor,)):
        if tuple(node.args[1:3]) != (1, 0):
            return None
        node = node.args[0]
    product = _back(node, VIEWS)
    if not _is(product, (aten.mul.Tensor,)):
        return None
    difference, unsqueezed = product.args
    if not _is(difference, (aten.sub.Tensor,)) or difference.args[1] != 8 or difference.kwargs.get("alpha", 1) != 1:
        return None
    stacked = _back(_back(difference.args[0], CASTS), VIEWS)
    if not _is(unsqueezed, (aten.unsqueeze.default,)) or not _is(stacked, (aten.stack.default,)):
        return None
    packed, scale = _halved(stacked), unsqueezed.args[0]
    return (packed, scale) if packed is not None and isinstance(scale, Node) else None


def int4_weights(graph: torch.fx.Graph, constant: Constant) -> dict[Node, Int4Weight]:
    """Return the int4 weights of a graph by the last node of their chains."""
    weights = {node: find_int4(node, constant) for node in graph.nodes}
    # a chain may end in several views that all match: keep the last
    return {
        node: weight
        for node, weight in weights.items()
        if weight is not None and not all(weights.get(user) for user in node.users)
    }


def _halved(stacked: Any) -> Node | None:
    """Return the bytes whose low and high halves a node stacks, if any."""
    parts = stacked.args[0]
    axis = stacked.args[1] if len(stacked.args) > 1 else 0
    if len(parts) != 2 or axis not in (-1, 2):
        return None
    low, high = parts
    masks = _is(low, (aten.bitwise_and.Scalar,)) and low.args[1] == 15
    shifts = _is(high, (aten.bitwise_right_shift.Tensor_Scalar,)) and high.args[1] == 4
    return low.args[0] if masks and shifts and low.args[0] is high.args[0] else None


def _is(node: Any, targets: Sequence[Any]) -> bool:
    return isinstance(node, Node) and node.target in targets


def _back(node: Any, targets: Sequence[Any]) -> Any:
    """Return the input of a run of consecutive operations from `targets` that ends in `node`."""
    while _is(node, targets):
        node = node.args[0]
    return node


def _static_shape(node: Any) -> tuple[int, ...] | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape) or value.dim() < 2:
        return None
    return tuple(value.shape)
