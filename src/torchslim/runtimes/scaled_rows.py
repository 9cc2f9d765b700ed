"""Linear layers whose input is rounded by row, for compilers that know static pairs only: a constant grid and a factor.

A row over its largest magnitude is rounded on a constant grid, and the layer's product is multiplied by that magnitude.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from torchslim.core.isolation import quiet
from torchslim.graph.integer_patterns import find_linear
from torchslim.graph.layers import stored_tensors
from torchslim.graph.row_ranges import LEVELS, SMALLEST, ZERO_POINT

aten = torch.ops.aten


def rows_scaled(program: ExportedProgram) -> ExportedProgram:
    """The program with static pairs in place of ranges by row; `program` itself if it has none."""
    stored = stored_tensors(program)

    def source_of(node: Node) -> Node | None:
        """The input of a linear layer before its rows are rounded."""
        linear = find_linear(node, lambda stands_for: stored.get(stands_for.name))
        return None if linear is None else linear.source

    if not any(map(source_of, program.graph.nodes)):
        return program
    with quiet():
        import torchao.quantization.pt2e  # noqa: F401 - registers the operations
    program = program.run_decompositions({})  # a copy; nothing is decomposed
    graph, scaled = program.graph_module.graph, dict[Node, tuple[Node, Node]]()
    for node in list(graph.nodes):
        if (source := source_of(node)) is None:
            continue
        if source not in scaled:
            scaled[source] = _scaled(graph, source, node)
        rows, magnitudes = scaled[source]
        _, weight, bias = (*node.args, None)[:3]
        node.args = (rows, weight)
        with graph.inserting_after(node):
            product = graph.call_function(aten.mul.Tensor, (node, magnitudes))
        with graph.inserting_after(product):
            result = product if bias is None else graph.call_function(aten.add.Tensor, (product, bias))
        for user in [user for user in node.users if user is not product]:
            user.replace_input_with(node, result)
        for added in (product, result):
            added.meta = dict(node.meta)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _scaled(graph: Graph, source: Node, before: Node) -> tuple[Node, Node]:
    """The rounded rows of `source` over their largest magnitudes, and these magnitudes."""
    quantized = torch.ops.quantized_decomposed
    grid = (1 / LEVELS, ZERO_POINT, 0, 255, torch.uint8)
    value = source.meta["val"]
    with graph.inserting_before(before):
        absolute = graph.call_function(aten.abs.default, (source,))
        largest = graph.call_function(aten.amax.default, (absolute, [-1], True))
        magnitudes = graph.call_function(aten.clamp.default, (largest, SMALLEST))
        ratios = graph.call_function(aten.div.Tensor, (source, magnitudes))
        rows = graph.call_function(quantized.quantize_per_tensor.default, (ratios, *grid))
        floats = graph.call_function(quantized.dequantize_per_tensor.default, (rows, *grid))
    for node in (absolute, ratios, rows, floats):
        node.meta = {**before.meta, "val": value if node is not rows else value.to(torch.uint8)}
    for node in (largest, magnitudes):
        node.meta = {**before.meta, "val": value[..., :1]}
    return floats, magnitudes
