"""Puts quantized programs into the form that XNNPACK's kernels are matched by; the rest computes in float.

XNNPACK knows these integer layers: weights int8 per channel between activations with a fixed int8 grid; the same
weights, or int4 in groups, with activations that are rounded row by row at each call; and pairs of conversions around
operations that take integers. Quantized programs of ours hold unsigned activations and spell row-wise rounding out in
plain arithmetic.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from torchslim.graph.export import layer_of
from torchslim.graph.integer_patterns import (
    Constant,
    Int4Weight,
    Int8Weight,
    find_dynamic,
    find_int4,
    find_int8,
    int4_sources,
    int4_weights,
)
from torchslim.graph.rewrite import SHARED_META
from torchslim.graph.row_ranges import find_rounded_rows
from torchslim.runtimes.kernel_listing import decomposed

aten = torch.ops.aten
QUANTIZE, DEQUANTIZE = "quantize_per_tensor.default", "dequantize_per_tensor.default"
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv1d.padding, aten.conv2d.padding)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input)
FUSED = (
    aten.relu.default,
    aten.relu_.default,
    aten.relu6.default,
    aten.relu6_.default,
    aten.hardtanh.default,
    aten.hardtanh_.default,
)
"""Activations that XNNPACK computes inside the layer before them."""
GROUPS_OF_TRANSPOSED = 6  # index of the argument
GROUP, OFFSET = 32, 8  # of 4-bit weights: sizes of groups are multiples of it; from 0..15 to -8..7
SHIFT = 128  # from unsigned to signed bytes


def for_xnnpack(program: ExportedProgram) -> tuple[ExportedProgram, list[str]]:
    """A copy of a program whose integer layers XNNPACK computes, and the layers whose weights became floats."""
    if not _quantized(program):
        return program, []
    program = program.run_decompositions({})  # a copy; nothing is decomposed
    graph = program.graph
    constant = _constants(program)
    _rows_by_token(graph, constant)
    grouped = _weights_alone(graph, constant)
    in_float = _weights_in_float(graph, constant)
    _concatenations_on_one_grid(graph)
    _signed(graph)
    _own_conversions(graph)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return (_folded(program) if in_float or grouped else program), in_float


def _quantized(program: ExportedProgram) -> bool:
    tensors = (*program.state_dict.values(), *program.constants.values())
    integers = any(isinstance(tensor, Tensor) and tensor.dtype in (torch.int8, torch.uint8) for tensor in tensors)
    return integers or any(decomposed(node) for node in program.graph.nodes)


def _constants(program: ExportedProgram) -> Constant:
    """The stored tensor of an input node, None for other nodes."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    stored = {**program.state_dict, **program.constants}

    def constant(node: Node) -> Tensor | None:
        return stored.get(names.get(node.name, "")) if node.op == "placeholder" else None

    return constant


def _rows_by_token(graph: Graph, constant: Constant) -> None:
    """Replace dynamic rounding before int8 linear layers by XNNPACK's own, and leave it out elsewhere.

    A linear layer on a fixed grid whose output stays in float, such as that of the model, has the same kernel.
    """
    for node in list(graph.nodes):
        if decomposed(node) == DEQUANTIZE:
            for user in list(node.users):
                if _linear_on_int8(user, constant) and user.args[0] is node and not _rounded_behind(user):
                    user.update_arg(0, _by_token(graph, node, user))
        elif (source := find_dynamic(node)) is not None:
            for user in list(node.users):
                fits = _linear_on_int8(user, constant) and user.args[0] is node and find_rounded_rows(node) is not None
                user.replace_input_with(node, _by_token(graph, source, user) if fits else source)


def _weights_alone(graph: Graph, constant: Constant) -> bool:
    """Round the rows of floats before linear layers whose weights alone are integers: XNNPACK has no other kernel.

    Weights of 4 bits keep their groups, unless a group is padded or no multiple of 32. Returns whether there are any.
    """
    grouped = False
    for node in list(graph.nodes):
        if (
            node.target is not aten.linear.default
            or decomposed(node.args[0])
            or node.meta["val"].dtype != torch.float32
        ):
            continue
        weight = find_int4(node.args[1], constant)
        if weight is not None:
            if weight.group_size % GROUP or weight.length % weight.group_size:
                continue
            node.update_arg(1, _by_group(graph, node.args[1], weight, node))
            grouped = True
        elif not _linear_on_int8(node, constant):
            continue
        node.update_arg(0, _by_token(graph, node.args[0], node))
    return grouped


def _by_group(graph: Graph, chain: Any, weight: Int4Weight, user: Node) -> Node:
    """The operation that dequantizes groups of 4-bit weights, as XNNPACK knows it; its inputs are folded later."""
    sources = int4_sources(chain)
    assert sources is not None, "it has been found"
    packed, scale = sources
    with graph.inserting_before(user):
        halves = [
            graph.call_function(aten.bitwise_and.Scalar, (packed, 15)),
            graph.call_function(aten.bitwise_right_shift.Tensor_Scalar, (packed, 4)),
        ]
        pairs = graph.call_function(aten.stack.default, (halves, -1))
        rows = graph.call_function(aten.view.default, (pairs, list(weight.shape)))
        signed = graph.call_function(aten._to_copy.default, (rows,), {"dtype": torch.int8})
        values = graph.call_function(aten.sub.Tensor, (signed, OFFSET))
        zeros = graph.call_function(aten.mul.Tensor, (scale, 0.0))
        zero_points = graph.call_function(aten._to_copy.default, (zeros,), {"dtype": torch.int32})
        grid = (-OFFSET, OFFSET - 1, torch.int8, weight.group_size, torch.float32)
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel_group.default
        floats = graph.call_function(dequantize, (values, scale, zero_points, *grid))
    for node in (*halves, pairs, rows, signed, values, zeros, zero_points, floats):
        _place(node, user)
    return floats


def _linear_on_int8(node: Node, constant: Constant) -> bool:
    weight = find_int8(node.args[1], constant) if node.target is aten.linear.default else None
    return weight is not None and weight.axis == 0 and weight.values.dim() == 2


def _by_token(graph: Graph, source: Node, user: Node) -> Node:
    """The operations with which XNNPACK rounds the rows of `source` for one layer."""
    operations, limits = torch.ops.quantized_decomposed, (-128, 127, torch.int8)
    with graph.inserting_before(user):
        chosen = graph.call_function(operations.choose_qparams_per_token_asymmetric.default, (source, torch.int8))
        scale, zero_point = (graph.call_function(operator.getitem, (chosen, index)) for index in (0, 1))
        rounded = graph.call_function(operations.quantize_per_token.default, (source, scale, zero_point, *limits))
        value = graph.call_function(
            operations.dequantize_per_token.default, (rounded, scale, zero_point, *limits, torch.float32)
        )
    for node in (chosen, scale, zero_point, rounded, value):
        _place(node, user)
    return value


def _weights_in_float(graph: Graph, constant: Constant) -> list[str]:
    """Compute weights without an integer kernel by plain arithmetic on constants; return their layers."""
    in_float = []
    for node in list(graph.nodes):
        if (weight := find_int8(node, constant)) is None:
            continue
        users = [user for user in node.users if not _has_kernel(user, node, weight)]
        if users:
            value = _arithmetic(graph, node, weight.values.dim(), weight.axis)
            for user in users:
                user.replace_input_with(node, value)
            in_float += [layer_of(user) for user in users]
    in_float += [layer_of(user) for node in int4_weights(graph, constant) for user in node.users]
    return list(dict.fromkeys(in_float))


def _has_kernel(layer: Node, weight_node: Node, weight: Int8Weight) -> bool:
    """Whether XNNPACK computes a layer on integers, with this weight."""
    if len(layer.args) < 2 or layer.args[1] is not weight_node:
        return False
    if "_per_token" in decomposed(layer.args[0]):
        return True
    if layer.target in TRANSPOSED:
        right_axis = weight.axis == 1 and layer.args[GROUPS_OF_TRANSPOSED:][:1] in ((), (1,))
    else:
        right_axis = weight.axis == 0 and layer.target in (*CONVOLUTIONS, aten.linear.default)
    return right_axis and decomposed(layer.args[0]) == DEQUANTIZE and _rounded_behind(layer)


def _rounded_behind(layer: Node) -> bool:
    """Whether a layer's only reader, behind an activation, rounds its output to integers."""
    for _ in range(2):
        if len(layer.users) != 1:
            return False
        reader = next(iter(layer.users))
        if decomposed(reader) == QUANTIZE:
            return True
        if reader.target not in FUSED:
            return False
        layer = reader
    return False


def _arithmetic(graph: Graph, node: Node, rank: int, axis: int) -> Node:
    """Operations on constants that dequantize a weight."""
    values, scale = node.args[:2]
    shape = [1] * rank
    shape[axis] = -1
    with graph.inserting_before(node):
        floats = graph.call_function(aten._to_copy.default, (values,), {"dtype": torch.float32})
        scales = graph.call_function(aten._to_copy.default, (scale,), {"dtype": torch.float32})
        scales = graph.call_function(aten.view.default, (scales, shape))
        return graph.call_function(aten.mul.Tensor, (floats, scales))


def _concatenations_on_one_grid(graph: Graph) -> None:
    """Round the inputs of an integer concatenation to the grid of its output, as XNNPACK's kernel has one grid.

    The output is rounded to that grid anyway, so no number changes.
    """
    for node in list(graph.nodes):
        reader = next(iter(node.users), None)
        if node.target is not aten.cat.default or len(node.users) != 1 or decomposed(reader) != QUANTIZE:
            continue
        assert reader is not None
        grid = reader.args[1:6]
        for source in dict.fromkeys(node.args[0]):
            if decomposed(source) != DEQUANTIZE or source.args[1:6] == grid:
                continue
            with graph.inserting_before(node):
                rounded = graph.call_function(reader.target, (source, *grid))
                value = graph.call_function(source.target, (rounded, *grid))
            for new, like in ((rounded, source.args[0]), (value, source)):
                new.meta["val"] = like.meta["val"]
                _place(new, node)
            node.replace_input_with(source, value)


def _signed(graph: Graph) -> None:
    """Shift activations of unsigned bytes to signed ones: the same numbers on the same grid."""
    for node in _unsigned(graph):
        value, scale, zero_point, low, high, _, *rest = node.args
        node.args = (value, scale, zero_point - SHIFT, low - SHIFT, high - SHIFT, torch.int8, *rest)  # type: ignore[operator]
        if decomposed(node) == QUANTIZE:
            node.meta["val"] = node.meta["val"].to(torch.int8)


def _own_conversions(graph: Graph) -> None:
    """Give each reader of a value its own conversion back to floats.

    The partitioner takes layers that share one into a group. If other layers stand between them, as inside a residual
    block, the group depends on itself, and the program cannot be lowered.
    """
    for node in list(graph.nodes):
        if decomposed(node) != DEQUANTIZE:
            continue
        for user in list(node.users)[1:]:
            with graph.inserting_before(node):
                copied = graph.node_copy(node)
            user.replace_input_with(node, copied)


def _unsigned(graph: Graph) -> Iterator[Node]:
    """Conversions to unsigned bytes that are read by conversions back alone, and those."""
    for node in list(graph.nodes):
        to_bytes = decomposed(node) == QUANTIZE and node.args[5] is torch.uint8
        if to_bytes and all(decomposed(user) == DEQUANTIZE for user in node.users):
            yield node
            yield from list(node.users)


def _folded(program: ExportedProgram) -> ExportedProgram:
    """The program with arithmetic on constants computed, except the conversions that kernels look for."""
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    program._state_dict, program._constants = dict(program.state_dict), dict(program.constants)
    kept: set[Any] = {node.target for node in program.graph.nodes if decomposed(node)}
    kept |= {aten.full.default, aten.arange.default, aten.arange.start, aten.arange.start_step}
    folded: ExportedProgram = constant_prop_pass(program, custom_skip_targets=kept)
    return folded


def _place(node: Node, owner: Node) -> None:
    node.meta |= {key: owner.meta[key] for key in SHARED_META if key in owner.meta}
