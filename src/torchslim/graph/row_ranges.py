"""Dynamic ranges by row: a linear layer's input is rounded with a range of its own for every row of features.

A row is what a linear layer multiplies: a sample of a batch, or a token of a sentence. With one range for a whole
tensor, a sample's result would depend on the other samples of its batch and on padding. The grid is symmetric, since
integer kernels take one zero point for all rows: a row over its largest magnitude lies in [-1, 1], and the grid of that
is constant. So `linear(round(x)) = linear(round(x / m)) * m`, with a constant scale inside and one product behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from torchslim.graph.rewrite import SHARED_META

LEVELS = 127  # on both sides of zero
ZERO_POINT = 128  # of the same grid in unsigned bytes, which processors multiply faster
SMALLEST = 1e-20  # a row of zeros divides by this; larger bounds turn networks with tiny activations into zeros

aten = torch.ops.aten


def row_magnitudes(x: Tensor) -> Tensor:
    """The largest magnitude of every row: (..., features) -> (..., 1)."""
    return x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)


def rounded_by_row(x: Tensor) -> Tensor:
    """`x` on the grids of its rows; the graph of a quantized model computes the same."""
    scale = row_magnitudes(x) / LEVELS
    return torch.round(x / scale) * scale


def insert_rounding(graph: Graph, source: Node, before: Node) -> Node:
    """Insert the operations that round the rows of `source`, and return the rounded value's node."""
    with graph.inserting_before(before):
        magnitude = graph.call_function(
            aten.amax.default, (graph.call_function(aten.abs.default, (source,)), [-1], True)
        )
        bounded = graph.call_function(aten.clamp.default, (magnitude, SMALLEST))
        scale = graph.call_function(aten.div.Tensor, (bounded, LEVELS))
        steps = graph.call_function(aten.round.default, (graph.call_function(aten.div.Tensor, (source, scale)),))
        rounded = graph.call_function(aten.mul.Tensor, (steps, scale))
    inserted = [
        rounded,
        *rounded.all_input_nodes,
        *steps.all_input_nodes,
        bounded,
        magnitude,
        *magnitude.all_input_nodes,
    ]
    for node in inserted:
        if node is not source:
            node.meta |= {key: before.meta[key] for key in SHARED_META if key in before.meta}
    return rounded


def find_rounded_rows(node: Any) -> Node | None:
    """The source of a node that `insert_rounding` inserted, if it is one."""
    steps, scale = _arguments(node, aten.mul.Tensor, 2)
    (quotient,) = _arguments(steps, aten.round.default, 1)
    source, same_scale = _arguments(quotient, aten.div.Tensor, 2)
    bounded, levels = _arguments(scale, aten.div.Tensor, 2)
    largest, smallest = _arguments(bounded, aten.clamp.default, 2)
    magnitude, dims, kept = _arguments(largest, aten.amax.default, 3)
    (same_source,) = _arguments(magnitude, aten.abs.default, 1)
    found = same_scale is scale and same_source is source and (levels, smallest) == (LEVELS, SMALLEST)
    return source if found and isinstance(source, Node) and (list(dims or ()), kept) == ([-1], True) else None


def _arguments(node: Any, target: Any, count: int) -> Sequence[Any]:
    """The arguments of a node that calls `target` with `count` of them, else as many times None."""
    called = isinstance(node, Node) and node.target is target and len(node.args) == count
    return node.args if called else (None,) * count


def rows_in_place_of_tensors(program: GraphModule) -> None:
    """Round the dynamic inputs of linear layers by row, where a conversion has rounded them with one range."""
    graph = program.graph
    for node in list(graph.nodes):
        readers = [user for user in node.users if user.target is aten.linear.default and user.args[0] is node]
        source = _source_of_one_range(node)
        if source is None or not readers:
            continue
        rounded = insert_rounding(graph, source, node)
        for reader in readers:
            reader.replace_input_with(node, rounded)
    graph.eliminate_dead_code()
    program.recompile()


def _source_of_one_range(node: Node) -> Node | None:
    """The value that a node rounds with a range that is computed at each call, if it does."""
    if str(node.target) != "quantized_decomposed.dequantize_per_tensor.tensor":
        return None
    rounded = node.args[0]
    source = rounded.args[0] if isinstance(rounded, Node) else None
    return source if isinstance(source, Node) else None
