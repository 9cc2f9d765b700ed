"""Edits of a captured graph: grafting traced operations, deleting unused weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

SHARED_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "from_node")


def graft(graph: Graph, traced: Graph, inputs: Sequence[Node], before: Node, owner: Node) -> Any:
    """Copy a traced graph before a node, as operations of the owner's layer, and return the nodes of its outputs.

    Args:
        graph: changed in place.
        traced: the graph to copy.
        inputs: nodes that replace the placeholders of `traced`.
        before: node of `graph` before which the copies are inserted.
        owner: node whose layer and lines of code the copies get.
    """
    places = [node for node in traced.nodes if node.op == "placeholder"]
    copies = dict(zip(places, inputs, strict=True))
    with graph.inserting_before(before):
        result = graph.graph_copy(traced, copies)
    for original, node in copies.items():
        if original.op != "placeholder":
            node.meta |= {key: owner.meta[key] for key in SHARED_META if key in owner.meta}
    return result


def inputs_first(graph: Graph) -> None:
    """Move the inputs before all operations: exporters of programs expect them there."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(node for node in graph.nodes if node.op != "placeholder")  # the output, if nothing else
    for node in inputs:
        first.prepend(node)


def strip_unused(model: GraphModule) -> None:
    """Delete parameters, buffers and submodules that the graph no longer uses, such as float copies of its weights."""
    model.delete_all_unused_submodules()
    used = {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}
    stored: Sequence[str] = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    for name in stored:
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(model.get_submodule(owner), attribute)


def place_constants(model: GraphModule, device: torch.device) -> None:
    """Make all operations that name a device, such as `arange`, name `device`: a capture fixes that of its example."""

    def placed(argument: Any) -> Any:
        return device if isinstance(argument, torch.device) else argument

    for graph_module in model.modules():
        if not isinstance(graph_module, GraphModule):
            continue
        changed = False
        for node in graph_module.graph.nodes:
            args, kwargs = map_aggregate(node.args, placed), map_aggregate(node.kwargs, placed)
            if (args, kwargs) != (node.args, node.kwargs):
                node.args, node.kwargs = args, kwargs
                changed = True
        if changed:
            graph_module.recompile()
