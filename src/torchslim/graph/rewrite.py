"""Changes of a captured graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

SHARED_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "from_node")


def graft(graph: Graph, traced: Graph, inputs: Sequence[Node], before: Node, owner: Node) -> Any:
    """Copy a traced graph before a node, as operations of the owner's layer: the nodes of what it returns.

    Args:
        graph: changed.
        traced: what is copied.
        inputs: the nodes that stand for its placeholders.
        before: of the graph; the copies come before it.
        owner: whose layer and lines of code they get.
    """
    places = [node for node in traced.nodes if node.op == "placeholder"]
    old = set(graph.nodes)
    with graph.inserting_before(before):
        result = graph.graph_copy(traced, dict(zip(places, inputs, strict=True)))
    for node in graph.nodes:
        if node not in old:
            node.meta |= {key: owner.meta[key] for key in SHARED_META if key in owner.meta}
    return result


def strip_unused(model: GraphModule) -> None:
    """Delete parameters, buffers and submodules that the graph no longer uses: the float copies of its weights."""
    model.delete_all_unused_submodules()
    used = {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}
    stored: Sequence[str] = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    for name in stored:
        if name not in used:
            owner, _, attribute = name.rpartition(".")
            delattr(model.get_submodule(owner), attribute)
