"""Kinds of ATen operations for the quantizer (with weights, additions, moves), and helpers for their nodes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from torchslim.graph.export import WRAPPED

aten = torch.ops.aten
ANNOTATION = "quantization_annotation"  # torchao's key in `Node.meta` for the specs of inputs and output
TAKES_GRIDS = "torchslim_takes_grids"  # our key in `Node.meta`, in place of the specs once a graph is prepared


def batch_norm(*args: Any) -> Tensor:
    """`aten.batch_norm` under another name, which keeps library passes from folding it."""
    return aten.batch_norm.default(*args)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Weighted:
    """Argument positions of an operation's input, weight and bias, and the axis of the weight for the outputs."""

    kind: str
    source: int
    weight: int
    bias: int | None
    axis: int


WEIGHTED: dict[Any, Weighted] = {
    aten.linear.default: Weighted("linear", 0, 1, 2, 0),
    aten.addmm.default: Weighted("linear", 1, 2, 0, 1),
    aten.mm.default: Weighted("linear", 0, 1, None, 1),
    aten.matmul.default: Weighted("linear", 0, 1, None, 1),
}
for _rank in (1, 2, 3):
    for _overload in ("default", "padding"):
        _conv = getattr(getattr(aten, f"conv{_rank}d"), _overload)
        WEIGHTED[_conv] = Weighted(f"conv{_rank}d", 0, 1, 2, 0)
    _transposed = getattr(aten, f"conv_transpose{_rank}d")
    WEIGHTED[getattr(_transposed, _transposed.overloads()[0])] = Weighted(f"conv_transpose{_rank}d", 0, 1, 2, 1)

# argument positions of the factors in products of two activations
PRODUCTS: dict[Any, tuple[int, int]] = {
    aten.matmul.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
}
RECURRENT: dict[Any, str] = {aten.lstm.input: "lstm", aten.gru.input: "gru"}
EMBEDDINGS = (aten.embedding.default,)
ADDITIONS = (aten.add.Tensor, aten.add_.Tensor)
CONCATS = (aten.cat.default,)
LAYER_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
BATCH_NORMS = (aten.batch_norm.default, batch_norm)
DROPOUTS = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.alpha_dropout.default)
CLAMPS = (aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default)
# operations that return several tensors, which `getitem` nodes select
SPLITS = (
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)
GATES = (aten.sigmoid.default, aten.sigmoid_.default)
GATED = (aten.mul.Tensor, aten.mul_.Tensor)
# every element of the output is one of the input (or a zero): scale and zero point stay the same
POOLS = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
MOVES = (
    *POOLS,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.pixel_shuffle.default,
    aten.channel_shuffle.default,
    aten.upsample_nearest2d.vec,
    aten.roll.default,
    aten.unflatten.int,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.narrow.default,
    aten.swapaxes.default,
    aten.t.default,
)


def weighted(node: Node) -> Weighted | None:
    """Argument positions of an operation with a weight; None for others, and for products of two activations."""
    layer = WEIGHTED.get(node.target) if node.op == "call_function" else None
    if layer is None or len(node.args) <= layer.weight:
        return None
    weight = node.args[layer.weight]
    product = node.target in (aten.mm.default, aten.matmul.default, aten.addmm.default)
    if product and not (isinstance(weight, Node) and is_constant(weight) and len(shape_of(weight)) == 2):
        return None
    return layer


def argument(node: Node, index: int | None) -> Node | None:
    """The argument of `node` at position `index`; None where it is missing or not a node."""
    value = node.args[index] if index is not None and len(node.args) > index else None
    return value if isinstance(value, Node) else None


def padded_with_infinity(node: Node) -> bool:
    """Whether a pool reads a tensor padded with infinity (TensorFlow pads with minus infinity), which is on no grid."""
    source = argument(node, 0)
    values = source.args[-1:] if source is not None and "pad" in op_name(source) else ()
    return any(isinstance(value, float) and math.isinf(value) for value in values)


def behind(node: Node | None) -> Node | None:
    """The `get_attr` node that `node` is or, as an observer, reads; None where the tensor is computed."""
    source = argument(node, 0) if node is not None and node.op == "call_module" else node
    return source if source is not None and source.op == "get_attr" else None


def along(values: Tensor, other: Tensor, axis: int) -> Tensor:
    """The vector `values`, reshaped to broadcast along dimension `axis` of `other`."""
    shape = [1] * other.dim()
    shape[axis] = -1
    return values.view(shape)


def is_constant(node: Node) -> bool:
    """Whether a value is computed from stored tensors alone."""
    seen: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder" or current.op not in ("get_attr", "call_function", "call_module"):
            return False
        pending += current.all_input_nodes
    return bool(seen)


def shape_of(node: Node) -> tuple[Any, ...]:
    """The shape of a node's value; empty where it is unknown."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def stored_name(node: Node) -> str:
    """Path of a stored tensor in the model; empty for other nodes."""
    return str(node.target).removeprefix(WRAPPED) if node.op == "get_attr" else ""


def op_name(node: Node) -> str:
    """Name of a node's operation, as reasons in records give it."""
    return str(node.target).removesuffix(".default")


def tensor_of(model: GraphModule, node: Node) -> Tensor:
    """The tensor that a get_attr node reads."""
    value: Tensor = attrgetter(str(node.target))(model)
    return value


def set_tensor(model: GraphModule, node: Node, value: Tensor) -> None:
    """Make a get_attr node read `value`, stored under a new name: other nodes may read the old tensor."""
    name = f"_{node.name}"
    while hasattr(model, name):
        name += "_"
    old = tensor_of(model, node)
    if isinstance(old, nn.Parameter):
        model.register_parameter(name, nn.Parameter(value, requires_grad=old.requires_grad))
    else:
        model.register_buffer(name, value)
    node.target = name


def add_tensor(model: GraphModule, before: Node, name: str, value: Tensor) -> Node:
    """Store a tensor in the model; returns a new node that reads it, in front of the node `before`."""
    while hasattr(model, name):
        name += "_"
    model.register_parameter(name, nn.Parameter(value, requires_grad=False))
    with model.graph.inserting_before(before):
        node = model.graph.get_attr(name)
    node.meta["val"] = value
    return node


def weights_of(node: Node) -> Iterator[Node]:
    """The floating-point matrices and filters that a node reads from the model itself."""
    for source in node.all_input_nodes:
        value = source.meta.get("val")
        if source.op == "get_attr" and isinstance(value, Tensor) and value.dim() >= 2 and value.is_floating_point():
            yield source
