"""Concatenations of parts with different ranges: float operations read the parts before they share a grid."""

from __future__ import annotations

from operator import getitem
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from torchslim.quantize.aten_ops import CLAMPS, CONCATS, MOVES, SPLITS, argument
from torchslim.quantize.quantizer import COMPUTES_ON_INTEGERS, SHARED_GRID

LARGEST_RATIO = 4.0  # of the widest to the narrowest range of parts: there, the narrowest loses two of its eight bits


def keep_own_grids(model: GraphModule) -> None:
    """Let float operations and outputs read concatenations before rounding, where the ranges of the parts differ.

    A concatenation of parts with similar ranges stays as it is: one Q/DQ pair costs less than one for each part.

    Args:
        model: a prepared graph that has observed its calibration data; changed.
    """
    for node in reversed(list(model.graph.nodes)):
        if SHARED_GRID not in node.meta:
            continue
        spans = _spans(model, node)
        if max(spans) <= LARGEST_RATIO * min(spans):
            continue
        rounded = [user for user in node.users if _observer(model, user) is not None]
        changed = [_read_around(model, user, node) for user in rounded]
        if any(changed):
            _unround(model, node)
    model.graph.eliminate_dead_code()
    model.recompile()


def _concat(node: Node) -> Node:
    """The concatenation that a node with a shared grid is, or that it clamps."""
    while node.target in CLAMPS and (before := argument(node, 0)) is not None:
        node = before
    assert node.target in CONCATS, f"{node} is no concatenation"
    return node


def _spans(model: GraphModule, node: Node) -> list[float]:
    """Scales of all parts of a concatenation, and of the parts of concatenations inside it."""
    parts: Any = _concat(node).args[0]
    spans = []
    for part in parts:
        scale: Any = None
        while (observer := _observer(model, part)) is not None or part.target in MOVES:
            if observer is not None:
                scale, _ = observer.calculate_qparams()
            before = argument(part, 0)
            assert before is not None, "observers and moves have a source"
            part = before
        spans += _spans(model, part) if SHARED_GRID in part.meta else [] if scale is None else [float(scale)]
    return spans or [1.0]


def _observer(model: GraphModule, node: Node) -> Any:
    module: nn.Module | None = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if hasattr(module, "calculate_qparams") else None


def _read_around(model: GraphModule, rounded: Node, plain: Node) -> bool:
    """Make float readers of a rounded value, also behind moves, read the plain one; returns if there were any."""
    changed = False
    for user in list(rounded.users):
        if _observer(model, user) is not None:
            changed |= _read_around(model, user, plain)
        elif user.target in (*MOVES, *SPLITS, getitem):
            with model.graph.inserting_after(user):
                copied = model.graph.node_copy(user, lambda source: plain if source is rounded else source)
            changed |= _read_around(model, user, copied)
        elif not user.meta.get(COMPUTES_ON_INTEGERS):
            user.replace_input_with(rounded, plain)
            changed = True
    return changed


def _unround(model: GraphModule, node: Node) -> None:
    """Join the parts as floats: parts that no layer gives as integers are no longer rounded for the concatenation."""
    concat = _concat(node)
    parts: Any = concat.args[0]
    # parts that verification left in float have no observer
    floats = {index for index in node.meta[SHARED_GRID] if _observer(model, parts[index]) is not None}
    concat.args = (
        [argument(part, 0) if index in floats else part for index, part in enumerate(parts)],
        *concat.args[1:],
    )
    concat.meta[COMPUTES_ON_INTEGERS] = False
