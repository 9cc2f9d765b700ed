"""Weights of 4 bits in groups that share a scale, and the operations that unpack them in a graph.

Any PyTorch can run the graph: ATen operations unpack the bytes. Runtimes that have a kernel for such weights find them
with `torchslim.graph.integer_patterns.find_int4`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torchslim.errors import QuantizeError
from torchslim.graph.integer_patterns import Int4Weight, find_int4

aten = torch.ops.aten
OFFSET = 8  # added to a value so that it fits half an unsigned byte
TINY = 1e-20  # the scale of a group of zeros

__all__ = ["dequantize_groups", "emit", "find_int4", "pack_int4", "quantize_groups", "unpack_int4"]


def quantize_groups(weight: Tensor, *, bits: int = 4, group_size: int = 32) -> tuple[Tensor, Tensor]:
    """Symmetric integers, and a scale for each group of a row: max |w| / (2^(bits - 1) - 1).

    A row is the weight flattened from dimension 1 on; its last group may be shorter. Zeros stay zero.

    Shapes: (rows, ...) -> int8 (rows, length), float32 (rows, ceil(length / group_size)).
    """
    if not 2 <= bits <= 8 or group_size < 1:
        raise QuantizeError(f"bits must be 2 to 8 and group_size at least 1, got {bits} and {group_size}")
    grouped = _grouped(weight.detach().reshape(weight.shape[0], -1).float(), group_size)
    highest = 2 ** (bits - 1) - 1
    scale = (grouped.abs().amax(-1) / highest).clamp(min=TINY)
    steps = (grouped / scale.unsqueeze(-1)).round().clamp(-highest, highest).to(torch.int8)
    return steps.view(len(steps), -1)[:, : weight[0].numel()].contiguous(), scale


def dequantize_groups(values: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Floats from integers in groups, each group with its scale.

    Shapes: (rows, length), (rows, groups) -> (rows, length).
    """
    floats = _grouped(values.float(), group_size) * scale.unsqueeze(-1)
    return floats.view(len(values), -1)[:, : values.shape[1]]


def pack_int4(values: Tensor, group_size: int) -> Tensor:
    """Pack two values in a byte, both plus 8, the even one in the low half; zeros pad rows to whole groups.

    Shapes: (rows, length), each value in -8 ... 7 -> uint8 (rows, ceil(length / group_size) * group_size / 2).
    """
    if group_size % 2:
        raise QuantizeError(f"group_size must be even, got {group_size}: two values share a byte")
    if values.numel() and (values.min() < -OFFSET or values.max() >= OFFSET):
        raise QuantizeError(f"4 bits hold -8 ... 7, got {int(values.min())} ... {int(values.max())}")
    halves = (_grouped(values.to(torch.int16), group_size) + OFFSET).to(torch.uint8).view(len(values), -1)
    return halves[:, 0::2] | (halves[:, 1::2] << 4)


def unpack_int4(packed: Tensor, length: int) -> Tensor:
    """Unpack the values of `pack_int4`, without the padding.

    Shapes: (rows, bytes) -> int8 (rows, length).
    """
    halves = torch.stack([packed & 15, packed >> 4], -1).view(len(packed), -1)
    return halves[:, :length].to(torch.int8) - OFFSET


def emit(model: GraphModule, node: Node, values: Tensor, scale: Tensor, *, group_size: int) -> Node:
    """Replace a weight of the graph by its packed integers; returns the node that now gives the floats.

    Args:
        model: owner of the graph; gets the buffers `<weight>_int4` and `<weight>_scale`, and keeps the float weight,
            which no node reads any more.
        node: the `get_attr` node of the weight.
        values: integers of the weight, (rows, length), as from `quantize_groups`.
        scale: scales of the groups, (rows, groups).
        group_size: how many values share a scale.
    """
    shape = [int(size) for size in node.meta["val"].shape]
    rows, length, groups = values.shape[0], values.shape[1], scale.shape[1]
    name = str(node.target).replace(".", "_")
    while hasattr(model, f"{name}_int4"):
        name += "_"
    weight = Int4Weight(packed=pack_int4(values, group_size), scale=scale.float().contiguous(), shape=tuple(shape))
    model.register_buffer(f"{name}_int4", weight.packed)
    model.register_buffer(f"{name}_scale", weight.scale)
    graph = model.graph
    operations: list[Node] = []

    def add(operation: object, *arguments: object, **options: object) -> Node:
        operations.append(graph.call_function(operation, arguments, options))  # type: ignore[arg-type]
        return operations[-1]

    with graph.inserting_before(node):
        packed, scales = graph.get_attr(f"{name}_int4"), graph.get_attr(f"{name}_scale")
        halves = [add(aten.bitwise_and.Scalar, packed, 15), add(aten.bitwise_right_shift.Tensor_Scalar, packed, 4)]
        grouped = add(aten.view.default, add(aten.stack.default, halves, -1), [rows, groups, group_size])
        # not `to`: an export puts an assertion beside it, which keeps the whole chain alive
        floats = add(aten._to_copy.default, grouped, dtype=torch.float32)
        centered = add(aten.sub.Tensor, floats, OFFSET)
        last = add(aten.mul.Tensor, centered, add(aten.unsqueeze.default, scales, -1))
        last = add(aten.view.default, last, [rows, groups * group_size])
        if groups * group_size != length:
            last = add(aten.slice.Tensor, last, 1, 0, length)
        if [rows, length] != shape or groups * group_size != length:
            last = add(aten.reshape.default, last, shape)  # a padded row was sliced, which allows no view
    for added in (packed, scales, *operations):
        added.meta |= {key: value for key, value in node.meta.items() if key in ("nn_module_stack", "stack_trace")}
    packed.meta["val"], scales.meta["val"], last.meta["val"] = weight.packed, weight.scale, node.meta["val"]
    node.replace_all_uses_with(last)
    graph.erase_node(node)
    model.recompile()
    return last


def _grouped(rows: Tensor, group_size: int) -> Tensor:
    padding = -rows.shape[1] % group_size
    return torch.nn.functional.pad(rows, (0, padding)).view(len(rows), -1, group_size)
