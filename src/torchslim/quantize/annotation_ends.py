"""Where layers and concatenations end in a graph that is being annotated."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from torchslim.quantize.aten_ops import (
    ANNOTATION,
    BATCH_NORMS,
    CLAMPS,
    CONCATS,
    DROPOUTS,
    argument,
)


def end_of_layer(node: Node) -> Node:
    """The batch norm (in training), relu or relu6 that a runtime fuses with a layer; `node` where there is none."""
    for fused in (BATCH_NORMS, CLAMPS):
        users = list(node.users)
        if len(users) == 1 and users[0].target in fused:
            node = users[0]
    return node


def end_of_concat(node: Node) -> Node:
    """The clamp that is the only reader of a concatenation, else `node`: a batch norm behind it stays in float."""
    end = end_of_layer(node) if node.target in CONCATS else node
    return end if end.target in CLAMPS and argument(end, 0) is node else node


def layer_before(node: Node) -> Node:
    """The node that computes a value, before the norms, clamps and dropouts behind it."""
    while node.target in (*CLAMPS, *BATCH_NORMS, *DROPOUTS) and (before := argument(node, 0)) is not None:
        node = before
    return node


def quantized_output(node: Node | None) -> bool:
    annotation = node.meta.get(ANNOTATION) if node is not None else None
    return annotation is not None and annotation.output_qspec is not None


def flat(value: Any) -> list[Node]:
    return [item for item in value if isinstance(item, Node)] if isinstance(value, (tuple, list)) else []
